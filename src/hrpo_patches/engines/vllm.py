"""vLLM in the process of a model: TRL's engine with the model's weights, which also thinks, and runs on a CPU.

How vLLM's own model thinks is `hrpo_vllm`'s part.
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration

from hrpo_patches.engines.base import NOT_FINITE, Completions, Sampling
from hrpo_patches.thinking.backbone import causal_lm, ratio_of, temporarily, thinking_backbone
from hrpo_patches.thinking.decoding import end_ids
from hrpo_thinking.config import ThinkingConfig
from hrpo_thinking.errors import InputError
from hrpo_thinking.inputs import ThinkingInputs
from hrpo_thinking.marker import thinking_table
from hrpo_thinking.request import ThinkingRequest
from hrpo_vllm import engine_options, take_thoughts, weights_arrived
from hrpo_vllm.names import KEY, THINKING, THOUGHTS, check_version

if TYPE_CHECKING:
    from types import ModuleType

    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from hrpo_patches.thinking.backbone import Model

CACHE = 4 << 30  # bytes of keys and values on a CPU; vLLM's own wish is a share of all memory
ON_CPU = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def _adapters(part: LoraLayer) -> list[str]:
    """The active adapters that hold weights for a layer, be it linear or an embedding."""
    return [one for one in part.active_adapters if one in part.lora_A or one in part.lora_embedding_A]


# What the adapters of a LoRA layer add to the parameters of the layer beneath.
_ADDED: dict[str, Any] = {
    "weight": lambda part: [part.get_delta_weight(one) for one in _adapters(part)],
    "bias": lambda part: [part.lora_B[one].bias * part.scaling[one] for one in _adapters(part) if part.lora_bias[one]],
}


def _refuse_untied(model: Model) -> None:
    """Raise `InputError` for an adapter that changes one of two tied weights, which vLLM holds once."""
    both = model.get_input_embeddings(), model.get_output_embeddings()
    copied = both[0].weight is not both[1].weight  # LoRA's layers hand out the weight beneath
    if not model.config.tie_word_embeddings:
        return
    for part in both:
        if isinstance(part, BaseTunerLayer) or (isinstance(part, ModulesToSaveWrapper) and copied):
            raise InputError(
                "this model's embeddings and head are tied, and the adapter changes one of them alone; vLLM has one "
                "weight for both. Leave embed_tokens and lm_head out of the adapter, or use --engine generate."
            )


class ThinkingVLLM(VLLMGeneration):
    """`Engine` by TRL's `VLLMGeneration` in colocate mode, whose completions think where the model can.

    Its tokenizer is the trainer's, which may spell what the one in the model's folder cannot.

    Args:
        filler: the id of the token that forced thoughts are; by default the one that the model's config names.

    Attributes:
        thinking: whether completions think; by default where the model can.
        forced: how many forced thoughts each begins with.
        seeds: of each completion's sampling; without, all are drawn from torch's generator.
        states: of the last `generate`, for each completion the states (C, d) that its tokens were sampled from, forced
            thoughts included; in the engine's dtype, on the CPU.

    Raises:
        InputError: vLLM cannot think as the model does, or this engine not run here.
    """

    def __init__(
        self,
        model: Model,
        accelerator: Accelerator,
        processing_class: PreTrainedTokenizerBase,
        *args: Any,
        filler: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.thinking, self.forced = ThinkingConfig.of(causal_lm(model).config) is not None, 0
        self.seeds: list[int] = []
        self.states: list[Tensor] = []
        self._asked, self._filler = 0, filler
        super().__init__(model, accelerator, processing_class, *args, **kwargs)

    def _init_vllm(self) -> None:
        check_version()
        if not self.model.name_or_path:
            raise InputError("vLLM reads a model's files first; load it from a folder or from the hub.")
        for name, part in self.model.named_modules():
            if isinstance(part, LoraLayer) and any(part.lora_bias.values()) and part.get_base_layer().bias is None:
                raise InputError(f"the adapter has a bias for {name}, which has none in vLLM; leave lora_bias out.")
        _refuse_untied(causal_lm(self.model))
        if self.accelerator.device.type == "cpu":
            if self.accelerator.num_processes > 1:
                raise InputError("vLLM beside several training processes needs GPUs; use another engine.")
            for name, value in ON_CPU.items():
                os.environ.setdefault(name, value)
        # The trainer's tokenizer, which may have tokens that the model's folder lacks, in a folder of its own.
        make: Any = vllm_generation.LLM
        words = TemporaryDirectory(prefix="hrpo-tokenizer-")
        weakref.finalize(self, words.cleanup)
        self.processing_class.save_pretrained(words.name)
        own = {"tokenizer": words.name} | self._options()
        with temporarily(vllm_generation, LLM=lambda **options: make(**options | own)):
            super()._init_vllm()
        if self.thinking:
            self.weights().thoughts.bound = math.inf  # all are taken after each generation

    def _options(self) -> dict[str, Any]:
        """What differs from TRL's options of `vllm.LLM`."""
        own: dict[str, Any] = {}
        if self.thinking:
            backbone = thinking_backbone(self.model)
            backbone.residual_norm()  # is measured, for the record
            record = backbone.config.thinking
            if self._filler is not None:
                tokenizer: Any = self.processing_class
                record = record | {"filler": tokenizer.convert_ids_to_tokens(self._filler)}
            own = engine_options(causal_lm(self.model).config, record)
        if self.accelerator.device.type == "cpu":
            dtype = str(causal_lm(self.model).dtype).removeprefix("torch.")
            own |= {"distributed_executor_backend": None, "dtype": dtype, "enforce_eager": True}
            if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
                own["kv_cache_memory_bytes"] = CACHE
        return own

    def _filler_id(self) -> int | None:
        """The id of the token that vLLM takes for a forced thought; None where the tokenizer lacks it."""
        thinking = ThinkingConfig.of(causal_lm(self.model).config)
        if self._filler is not None or thinking is None:
            return self._filler
        tokenizer: Any = self.processing_class
        return tokenizer.get_vocab().get(thinking.filler)

    def sync_weights(self) -> None:
        if (
            self.accelerator.device.type == "cpu"
        ):  # whose kernels pack their weights, so that they are loaded like a checkpoint
            runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
            runner.reload_weights(self._iter_named_params())
            self.llm.reset_prefix_cache()
        else:
            super().sync_weights()
        if self.thinking:
            weights_arrived(self.llm)

    def _iter_named_params(self) -> Iterator[tuple[str, Tensor]]:
        """As TRL's; but an adapter is added to a copy of each weight: merging it and taking it off again rounds."""
        model: Any = self.model
        parts = [(name, part) for name, part in model.named_modules() if isinstance(part, LoraLayer)]
        layers: Any = {f"{name}.base_layer.{kind}": (part, kind) for name, part in parts for kind in _ADDED}
        # DoRA and quantized weights have no plain sum of base and delta: TRL's merge is right for them.
        odd = any(any(part.use_dora.values()) or not part.weight.is_floating_point() for _, part in parts)
        if not layers or odd or self._dist.is_fsdp or self.accelerator.num_processes > 1:
            yield from super()._iter_named_params()
            return
        for name, weight in model.named_parameters():
            if model.prefix in name or "original_module" in name:
                continue
            value = weight.detach()
            if name in layers:
                part, kind = layers[name]
                value = value + sum(_ADDED[kind](part))
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            yield self._fix_param_name_to_vllm(plain, ["modules_to_save.default."]), value

    def generate(
        self, prompts: list[list[int]], images: Any, num_generations: int, profiler: Any = None
    ) -> tuple[Any, ...]:
        self.states = []
        capable = ThinkingConfig.of(causal_lm(self.model).config) is not None
        if not capable:
            return super().generate(prompts, images, num_generations, profiler)
        # vLLM finishes requests in any order: the thoughts of each are asked for by a key that is never used twice.
        keys = [f"{self._asked + i}" for i in range(len(prompts))] if self.thinking else []
        self._asked += len(prompts)
        generate = self.llm.generate

        # TRL gives all requests one SamplingParams; thinking needs one each, with its key and its seed.
        def ask(requests: Any, sampling_params: Any, **kwargs: Any) -> Any:
            each = []
            for i in range(len(requests)):
                own = {THINKING: True, THOUGHTS: self.forced, KEY: keys[i]} if keys else {THINKING: False}
                each.append(sampling_params.clone())
                each[-1].extra_args = (sampling_params.extra_args or {}) | own
                each[-1].seed = self.seeds[i] if self.seeds else sampling_params.seed
            return generate(requests, sampling_params=each, **kwargs)

        with temporarily(self.llm, generate=ask):
            out = super().generate(prompts, images, num_generations, profiler)
        if keys:
            kept = take_thoughts(self.llm, keys)
            # One state more than tokens: that of the token after the last, which was never sampled.
            self.states = [kept[key][: len(tokens)] for key, tokens in zip(keys, out[1], strict=True)]
        return out

    def refresh_weights(self) -> None:
        """Send the model's weights to vLLM."""
        self.sync_weights()

    def complete(self, prompts: list[list[int]], sampling: Sampling) -> Completions:
        """As `Engine.complete`, by the sampling alone, whatever training asks this engine for.

        Each completion has a seed of its own, drawn from torch's generator.

        Raises:
            InputError: the filler of the sampling's forced thoughts is not the one that this engine was started with.
        """
        forced, filler = sampling.thoughts or 0, self._filler_id()
        if forced and sampling.filler_token_id not in (None, filler):
            raise InputError(
                f"this vLLM engine was started with the filler token {filler}, and filler_token_id is "
                f"{sampling.filler_token_id}; start another engine for it."
            )
        seeds = torch.randint(2**31, (len(prompts),)).tolist()
        # vLLM has its own end tokens from the files of the base model; an adapter may have been trained with others.
        ends = {"ignore_eos": True, "stop_token_ids": end_ids(sampling)}
        own = {"thinking": bool(sampling.thinking), "forced": forced, "seeds": seeds, "generation_kwargs": ends}
        own |= {"max_completion_length": sampling.max_new_tokens}
        own |= {"temperature": sampling.temperature if sampling.do_sample else 0.0}
        with temporarily(self, **own, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0):
            _, tokens, logprobs, _ = self.generate(prompts, None, 1)
            if sampling.thinking and sampling.return_dict_in_generate:
                return self.completions(tokens, [[one[0] for one in row] for row in logprobs])
        return Completions([row[forced:] for row in tokens])

    def completions(self, tokens: list[list[int]], logprobs: Any) -> Completions:
        """What the last `generate` returned, with the thoughts of its completions.

        Args:
            tokens: of each completion, forced thoughts included.
            logprobs: of these tokens.

        Raises:
            RuntimeError: a log-probability is not a number.
        """
        if any(one is None or math.isnan(one) for row in logprobs for one in row):
            raise RuntimeError(f"vLLM returned a {NOT_FINITE} that holds no numbers")
        backbone = thinking_backbone(self.model)
        thinking = ThinkingConfig.from_dict(backbone.config.thinking)
        table = thinking_table(self.processing_class, thinking, backbone.config.vocab_size).numpy()  # type: ignore[arg-type]
        masks, ratios = [], []
        # vLLM returns states, not masks: the marker's automaton reads the same tokens again.
        for row in tokens:
            record = ThinkingRequest(table, self.forced)
            masks.append(torch.tensor([record.read(i, token) for i, token in enumerate(row)]))
            ratios.append(ratio_of(backbone, row, masks[-1]))
        device = ratios[0].device
        states, mask = pad_sequence(self.states, batch_first=True), pad_sequence(masks, batch_first=True)
        return Completions(
            [row[self.forced :] for row in tokens],
            [row[self.forced :] for row in logprobs],
            ThinkingInputs(states.to(device), mask.to(device), thinking.residual),
            pad_sequence(ratios, batch_first=True, padding_value=1.0),
        )

    def weights(self) -> Any:
        """vLLM's own model."""
        return self.llm.llm_engine.model_executor.driver_worker.model_runner.model


@contextmanager
def running_engine(
    model: Model, tokenizer: PreTrainedTokenizerBase, longest: int, rows: int
) -> Iterator[ThinkingVLLM]:
    """Within, an engine with the weights of a model that no trainer has.

    Args:
        model, tokenizer: loaded from a folder or the hub.
        longest: tokens of a prompt and its completion.
        rows: how many completions may be worked on at once.
    """
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    filler = causal_lm(model).generation_config.filler_token_id
    engine = ThinkingVLLM(model, accelerator, tokenizer, max_model_length=longest, max_num_seqs=rows, filler=filler)
    try:
        engine.sync_weights()
        yield engine
    finally:
        engine.llm.llm_engine.engine_core.shutdown()


def engines_that_think(module: ModuleType) -> AbstractContextManager[None]:
    """Within, a trainer of TRL's `module` makes the vLLM engine that thinks, and that runs on a CPU, too."""
    return temporarily(module, VLLMGeneration=ThinkingVLLM)
