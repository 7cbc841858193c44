"""Tiny random models and a byte-level tokenizer; nothing here needs a network."""

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hrpo_thinking import families

HASHES = ["##", "###", "####", "#####", "Ġ####", "#7", "#72", "a#", "#b", "a####b"]
END, PAD = "<end>", "<pad>"
FAMILIES = {  # config and model class, by model type; importing the table patches nothing
    kind: (getattr(transformers, family.config), getattr(transformers, family.causal_lm))
    for kind, family in families.FAMILIES.items()
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, and so are some runs of marker characters and two special tokens."""
    vocabulary = {token: i for i, token in enumerate([*bytes_to_unicode().values(), *HASHES, END, PAD])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def tiny_config(family: str, **options):
    """A config of two layers, d = 32, that fits `byte_tokenizer`, of a model that thinks, unless thinking=None."""
    size = len(byte_tokenizer())
    given = {
        "vocab_size": size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": size - 2,
        "pad_token_id": size - 1,
        "thinking": {},
    } | options
    if given["thinking"] is None:
        del given["thinking"]
    return FAMILIES[family][0](**given)


def tiny_model(family: str, seed: int = 0, **options):
    """A random model whose logits are lively enough for differences to show."""
    torch.manual_seed(seed)
    return FAMILIES[family][1](tiny_config(family, **options)).eval()
