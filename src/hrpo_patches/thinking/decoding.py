"""The state that `_sample` carries from step to step while a model thinks.

One object lives for one call of `generate`. Before each forward it hands over the last token's state and whether that
token thinks; after each it takes the state that the next token was sampled from. It never waits for the device.
"""

from __future__ import annotations

import copy
import warnings
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from hrpo_patches.thinking.backbone import causal_lm, temporarily, thinking_backbone
from hrpo_patches.thinking.mixin import ThinkingMixin
from hrpo_thinking.config import ThinkingConfig
from hrpo_thinking.errors import InputError
from hrpo_thinking.inputs import ThinkingInputs
from hrpo_thinking.marker import marker_table, thinking_table
from hrpo_thinking.parts import FALLBACK, RESIDUALS, parts_of
from hrpo_thinking.request import check_room

if TYPE_CHECKING:  # transformers is importing this module
    from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList
    from transformers.utils import ModelOutput

    from hrpo_patches.thinking.backbone import Model

    class Sampling(GenerationConfig):
        """`GenerationConfig` with the fields that the patches add."""

        thinking: bool | None
        thoughts: int | None
        filler_token_id: int | None
        eos_token_id: int | list[int] | None


# What changes the distribution that a rollout samples from, beside the temperature, and the values that do not; the
# last names are vLLM's.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "top_k": (0, -1),
    **dict.fromkeys(("top_p", "typical_p", "repetition_penalty", "encoder_repetition_penalty"), (1.0,)),
    **dict.fromkeys(("min_p", "top_h", "epsilon_cutoff", "eta_cutoff"), (0.0,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    **dict.fromkeys(("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens"), ()),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "watermarking_config"), ()),
    **dict.fromkeys(("exponential_decay_length_penalty",), ()),
    "guidance_scale": (1.0,),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "min_tokens"), (0,)),
    **dict.fromkeys(("logit_bias", "bad_words", "allowed_token_ids", "structured_outputs"), ()),
}
_RATIO_CHUNK = 128  # columns of the (B, C, d) gate that are computed at once


def changed_distribution(options: Any) -> tuple[str, Any] | None:
    """The first option that changes the distribution, and its value; `options`: a dict or a config."""
    given = options if isinstance(options, dict) else {name: getattr(options, name, None) for name in NEUTRAL}
    for name, neutral in NEUTRAL.items():
        if (value := given.get(name)) not in (None, [], {}, *neutral):
            return name, value
    return None


def by_temperature(model: Model) -> AbstractContextManager[None]:
    """Within, what is sampled from `model` follows from its logits, the temperature and what `generate` is asked for.

    The model's own generation config may name more (`min_p`, `no_repeat_ngram_size`), of which no loss knows.
    """
    inner = causal_lm(model)
    config = copy.deepcopy(inner.generation_config)
    for name in NEUTRAL:
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    return temporarily(inner, generation_config=config)


def ends_of(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids that end a completion, as in training: the model's, and the tokenizer's end token."""
    ends = end_ids(causal_lm(model).generation_config)
    end: Any = tokenizer.eos_token_id
    return ends if end is None or end in ends else [end, *ends]


def end_ids(generation_config: GenerationConfig) -> list[int]:
    """The token ids that end a completion by this config, which holds one, several or none."""
    ends = getattr(generation_config, "eos_token_id", None)
    return [] if ends is None else list(ends) if isinstance(ends, list) else [ends]


def refuse_thinking(generation_config: GenerationConfig | dict[str, Any], what: str) -> None:
    """Raise `InputError` if a config, or keywords, ask for thinking in a kind of decoding that cannot think."""
    asked = generation_config if isinstance(generation_config, dict) else {}
    if any(asked.get(name, getattr(generation_config, name, None)) for name in ("thinking", "thoughts")):
        raise InputError(
            f"{what} cannot think; generate with thinking=False and thoughts=0, or decode greedily or by sampling."
        )


def filler_id(tokenizer: PreTrainedTokenizerBase | None, thinking: ThinkingConfig) -> int:
    """The id of the token that stands for a forced thought.

    Raises:
        InputError: the tokenizer is missing, lacks the token, or the token ends a completion.
    """
    if tokenizer is None:
        raise InputError("generate(thoughts=...) needs tokenizer=..., to know which token is the filler.")
    name = thinking.filler
    found = tokenizer.get_vocab().get(name)
    if found is None:
        raise InputError(f"the tokenizer has no token {name!r} to be the filler of forced thoughts; name another one.")
    if found in (tokenizer.eos_token_id, tokenizer.pad_token_id):
        raise InputError(f"the filler {name!r} is the tokenizer's end or padding token; name another one.")
    return int(found)


def check_request(
    model: Model,
    generation_config: Sampling,
    generation_mode: str,
    tokenizer: PreTrainedTokenizerBase | None,
    custom_generate: Any = None,
) -> None:
    """Called by `generate` before any work: is what was asked for possible?

    Raises:
        InputError: thinking or forced thoughts were asked for together with something that cannot do them.
    """
    wanted, forced = generation_config.thinking, generation_config.thoughts
    if wanted not in (None, True, False):
        raise InputError(f"generate(thinking=...) must be True or False, not {wanted!r}.")
    if forced is not None and (isinstance(forced, bool) or not isinstance(forced, int) or forced < 0):
        raise InputError(f"generate(thoughts=...) must be a whole number from 0, not {forced!r}.")
    if not (wanted or forced):
        return
    backbone = thinking_backbone(model) if wanted else None
    if (generation_config.num_beams or 1) > 1:
        raise InputError(
            f"thinking needs num_beams=1, not {generation_config.num_beams}: beams share no hidden state."
        )
    if custom_generate is not None or generation_mode not in ("greedy_search", "sample"):
        mode = "custom_generate" if custom_generate is not None else str(getattr(generation_mode, "value", ""))
        refuse_thinking(generation_config, mode)
    if forced and generation_config.filler_token_id is None:
        thinking = ThinkingConfig.of(model.config) or ThinkingConfig()
        generation_config.filler_token_id = filler_id(tokenizer, thinking)
    if forced:
        check_filler(model, generation_config)
    if backbone is not None:
        check_thinking(backbone, tokenizer)


def check_filler(model: Model, generation_config: Sampling) -> None:
    """Raise `InputError` unless the filler of forced thoughts is a token of the model that ends no completion."""
    filler = generation_config.filler_token_id
    table: Any = model.get_input_embeddings().weight  # (V, d)
    if not isinstance(filler, int) or not 0 <= filler < len(table):
        raise InputError(f"filler_token_id must be the id of one of the model's tokens, not {filler!r}.")
    if filler in end_ids(generation_config):
        raise InputError(f"the filler of forced thoughts, token {filler}, ends a completion; name another one.")


def check_thinking(backbone: ThinkingMixin, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raise `InputError` unless a backbone can think with the weights it has, up to a marker that can be spelled."""
    if tokenizer is None:
        raise InputError("generate(thinking=True) needs tokenizer=..., to know which tokens spell the answer marker.")
    thinking = ThinkingConfig.from_dict(backbone.config.thinking)
    if getattr(backbone.thinking_residual_Lambda, "disable_adapters", False):
        raise InputError(
            "the adapter is switched off, and its thinking weights with it; generate with thinking=False."
        )
    # Whether PEFT's `modules_to_save` holds a copy of each thinking module.
    wrapped = {name: hasattr(getattr(backbone, name), "original_module") for name in parts_of(thinking.residual)}
    lacking = [name for name, there in wrapped.items() if not there]
    if lacking and any(wrapped.values()):
        raise InputError(
            f"this adapter holds thinking gates but no {lacking[0]}, so it was not trained with the "
            f"{thinking.residual}; load it with hrpo_patches.load_adapter(model, folder), which reads what it was "
            f"trained with, or pass init_projection=True to start a projection for it."
        )
    marker_table(tokenizer, thinking.answer_start, backbone.config.vocab_size)


def start_thinking(
    model: Model,
    input_ids: Tensor,
    generation_config: Sampling,
    model_kwargs: dict[str, Any],
    stopping_criteria: StoppingCriteriaList,
) -> ThinkingDecoder | ForcedThoughts | None:
    """Called by `_sample` before the prefill: the decoder, or None where nothing is thought or forced.

    `model_kwargs` loses the tokenizer and gains the request for the last hidden state; stopping criteria that look at
    text do not see forced thoughts.

    Raises:
        InputError: there are more forced thoughts than a completion has room for, or prompts are padded on the right.
    """
    forced = generation_config.thoughts or 0
    if forced:
        check_room(forced, generation_config.max_length - input_ids.shape[1])
        stopping_criteria[:] = [_over_text(criterion, input_ids.shape[1], forced) for criterion in stopping_criteria]
    if not generation_config.thinking:
        return ForcedThoughts(forced, generation_config.filler_token_id) if forced else None
    # Without a cache every forward reads all positions again, and needs all their states.
    record = generation_config.return_dict_in_generate or not model_kwargs["use_cache"]
    seen = model_kwargs.get("attention_mask")
    seen = seen if isinstance(seen, Tensor) and seen.shape == input_ids.shape else None  # or a dict, or 4-D
    if seen is not None and not seen[:, -1].all():
        raise InputError(
            "generate(thinking=True) requires prompts that are padded on the left: the first thought is made from the "
            "last position. Set tokenizer.padding_side = 'left'."
        )
    decoder = ThinkingDecoder(model, input_ids, model_kwargs.pop("tokenizer"), bool(record), seen)
    decoder.forced = ForcedThoughts(forced, generation_config.filler_token_id)
    model_kwargs["output_last_hidden_state"] = True
    return decoder


def decoder_only_output(thinking: dict[str, Any], **fields: Any) -> Any:
    """Called by `_sample`: stock's output, or ours with what `ThinkingDecoder.outputs` returns."""
    from hrpo_patches.thinking.outputs import GenerateDecoderOnlyOutput, ThinkingDecoderOnlyOutput

    return ThinkingDecoderOnlyOutput(**fields, **thinking) if thinking else GenerateDecoderOnlyOutput(**fields)


def _over_text(criterion: Any, start: int, forced: int) -> Any:
    """A stopping criterion that sees the prompt, up to `start`, and what follows the forced thoughts."""
    from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

    if isinstance(criterion, (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria)):
        return criterion  # they look at the length, the clock, and the last token

    def without_fillers(input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        if input_ids.shape[1] <= start + forced:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        text = torch.cat([input_ids[:, :start], input_ids[:, start + forced :]], dim=1)
        return criterion(text, scores, **kwargs)

    return without_fillers


class ForcedThoughts:
    """The first `count` tokens of a completion are the filler; alone, they are pauses in which nothing is thought."""

    def __init__(self, count: int, filler: int | None) -> None:
        self.count, self.filler, self.steps = count, filler or 0, 0

    def observe(self, outputs: ModelOutput, scores: Tensor, next_tokens: Tensor, unfinished: Tensor) -> Tensor:
        """The next tokens: the sampled ones, or fillers."""
        self.steps += 1
        return torch.full_like(next_tokens, self.filler) if self.steps <= self.count else next_tokens

    def model_inputs(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        """Nothing is blended."""
        return model_inputs

    def undo(self, steps: int) -> None:
        """Forget the last steps."""
        self.steps -= steps

    def outputs(self, sequences: Tensor) -> dict[str, Any]:
        """Nothing was thought."""
        return {}


class ThinkingDecoder:
    """Which sequences still think, and what their next input is blended with.

    Args:
        model: the causal language model.
        input_ids: (B, P), the prompt.
        tokenizer: spells the answer marker.
        record: whether every step is kept for the output; without it only the last step is.
        attention_mask: (B, P) of the prompt; by default no position is padding.

    Attributes:
        residual: what is really used, "projection" or "embedding".
    """

    def __init__(
        self,
        model: Model,
        input_ids: Tensor,
        tokenizer: PreTrainedTokenizerBase,
        record: bool,
        attention_mask: Tensor | None = None,
    ) -> None:
        self.backbone = thinking_backbone(model)
        thinking = ThinkingConfig.from_dict(self.backbone.config.thinking)
        self.residual = thinking.residual
        self.record = record
        self.embeddings: Any = model.get_input_embeddings().weight
        table = thinking_table(tokenizer, thinking, self.backbone.config.vocab_size)
        self.table = table.to(input_ids.device)
        self.answering = table.shape[1] - 1
        self.progress = input_ids.new_zeros(input_ids.shape[0])
        self.prompt_length = input_ids.shape[1]
        self.forced = ForcedThoughts(0, None)
        self.states: list[Tensor] = []  # each (B, d)
        self.masks: list[Tensor] = []  # each (B,)
        self.prompt_mask = attention_mask if attention_mask is not None else torch.ones_like(input_ids)
        self.real: list[Tensor] = []  # each (B,), 0 where a sequence had ended before

    def model_inputs(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        """The next forward's inputs with the thinking of the positions that it reads: one, or all without a cache."""
        input_ids = model_inputs["input_ids"]
        # Column j of the states is that of completion token j, which this forward reads: the last `width` positions.
        width = min(input_ids.shape[1], len(self.states))
        states, mask = torch.stack(self.states[-width:], dim=1), torch.stack(self.masks[-width:], dim=1)
        return model_inputs | {"thinking_inputs": ThinkingInputs(states, mask, self.residual)}

    def observe(self, outputs: ModelOutput, scores: Tensor, next_tokens: Tensor, unfinished: Tensor) -> Tensor:
        """Take the state that the next tokens came from; returns these: `next_tokens`, or fillers.

        Args:
            outputs: of the forward; `last_hidden_state` (B, L, d) if the model hands it over.
            scores: (B, V), after the logits processors.
            next_tokens: (B,).
            unfinished: (B,), 0 for sequences that had ended before this step.
        """
        hidden: Tensor | None = getattr(outputs, "last_hidden_state", None)
        if RESIDUALS[self.residual].needs_state and hidden is None:
            self._fall_back()
        last = hidden[:, -1] if hidden is not None else None  # (B, d), that `scores` were computed from
        state = RESIDUALS[self.residual].observe(last, scores, self.embeddings)
        next_tokens = self.forced.observe(outputs, scores, next_tokens, unfinished)
        if self.forced.steps > self.forced.count:  # a filler is not text
            # One look-up per row, on the device: nothing waits for the host. The last state is absorbing.
            self.progress = self.table[next_tokens.to(self.table.device), self.progress]
        mask = (self.progress != self.answering) & unfinished.bool()  # padding behind an end token is not a thought
        if not self.record and len(self.states) == 1:
            self.states.clear()
            self.masks.clear()
            self.real.clear()
        self.states.append(state)
        self.masks.append(mask)
        self.real.append(unfinished)
        return next_tokens

    def _fall_back(self) -> None:
        if self.states:
            raise RuntimeError("the model returned a last hidden state in some decoding steps and none in others.")
        wanted, self.residual = self.residual, FALLBACK
        warnings.warn(
            f"the model's forward returns no last_hidden_state, so the {wanted} residual cannot be computed; this "
            f"generate() uses the {FALLBACK} residual instead (see thinking_residual in its output).",
            UserWarning,
            stacklevel=2,
        )

    def undo(self, steps: int) -> None:
        """Forget the last steps, as `_undo_generation_steps` does for the tokens."""
        self.forced.undo(steps)
        if steps:
            del self.states[-steps:], self.masks[-steps:], self.real[-steps:]

    def outputs(self, sequences: Tensor) -> dict[str, Any]:
        """What `generate` returns beside `sequences` (B, P + C); column c belongs to completion token c.

        Returns:
            thinking_states (B, C, d), thinking_mask (B, C) bool, thinking_ratio (B, C) float32, the mean over d of the
            share a of the embedding, 1 where a position does not think, thinking_residual, and attention_mask
            (B, P + C) of `sequences`.
        """
        # unsloth generates in inference mode, whose tensors no backward could use: the replay needs ordinary ones.
        with torch.inference_mode(False), torch.no_grad():
            states, mask = torch.stack(self.states, dim=1), torch.stack(self.masks, dim=1)
        tokens = sequences[:, self.prompt_length :]
        # The gates of all columns at once would hold several (B, C, d) in float32.
        chunks = [
            self.backbone.thinking_decay(embedding(chunk, self.embeddings)).mean(-1)
            for chunk in tokens.split(_RATIO_CHUNK, dim=1)
        ]
        ratio = torch.cat(chunks, dim=1).float()
        return {
            "thinking_states": states,
            "thinking_mask": mask,
            "thinking_ratio": torch.where(mask.to(ratio.device), ratio, 1.0),
            "thinking_residual": self.residual,
            "attention_mask": torch.cat([self.prompt_mask, torch.stack(self.real, dim=1).to(self.prompt_mask)], dim=1),
        }
