"""The memory of a training run before there is one: the real rollout, loss and gradient, on tensors without data.

torch's fake tensors have shapes and no values, so that the model's own code runs, and a model of any size takes no
memory. What is counted is the storages that are alive at once. Not counted: what a process takes before it has a
model (on a GPU some 500 MiB), the scratch memory of single kernels, and the gaps of an allocator.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig

from hrpo_patches.thinking import adjoint
from hrpo_patches.thinking.backbone import temporarily
from hrpo_patches.thinking.replay import distribution_head
from hrpo_patches.training.logprobs import forward_scores
from hrpo_thinking.errors import require
from hrpo_thinking.inputs import Bptt, ThinkingInputs, depth_of
from hrpo_thinking.parts import parts_of

GIB = 2**30
# Bytes that an optimizer keeps per trained weight.
OPTIMIZERS = {"adamw_torch": 8, "adamw_torch_fused": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "sgd": 0}
DTYPES, ENGINES = ("float32", "bfloat16", "float16"), ("generate", "continuous", "vllm")
PRODUCTS = 2  # of the exact gradient: it takes as many as its series needs, one after the other


def _flag(default: object, text: str, choices: tuple[object, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class Shapes:
    """What the memory of a run depends on, beside its model; the names are those of the flags of `hrpo train`."""

    per_device_train_batch_size: int = _flag(8, "completions in one backward")
    gradient_accumulation_steps: int = _flag(4, "backwards in one step of the optimizer; a rollout is for all of them")
    max_prompt_length: int = _flag(1024, "tokens")
    max_completion_length: int = _flag(1024, "tokens")
    lora_rank: int = _flag(32, "of the adapter of all linear layers")
    gradient_checkpointing: bool = _flag(True, "compute layers again in the backward", (True, False))
    dtype: str = _flag("bfloat16", "of the base; the loss runs under autocast to it", DTYPES)
    bptt: int | str = _flag("exact", "how many thoughts back the gradient flows: exact, or a number")
    optim: str = _flag("paged_adamw_8bit", "the optimizer", tuple(OPTIMIZERS))
    engine: str = _flag("generate", "of rollouts; vLLM has weights and keys of its own", ENGINES)


@dataclass(frozen=True)
class Plan:
    """Bytes.

    Attributes:
        weights: of the base and the thinking modules in it.
        trained: the weights of the adapter, a copy of the thinking modules among them.
        optimizer: its state.
        engine: what an engine of its own holds at all times.
        rollout: what making completions takes for its time, beside all of the above.
        loss: what loss and gradient of one batch take for their time, the gradients among it.
    """

    weights: int
    trained: int
    optimizer: int
    engine: int
    rollout: int
    loss: int

    @property
    def peak(self) -> int:
        """The most that is held at once."""
        return self.weights + self.trained + self.optimizer + self.engine + max(self.rollout, self.loss)


class _Living(TorchDispatchMode):
    """Counts the bytes of the storages that operations within it make, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:  # a view, or what an operation changes in place
            return

        def end(_: object) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, end)
        self.now += size
        self.most = max(self.most, self.now)


def plan(config: PreTrainedConfig, shapes: Shapes) -> Plan:
    """The memory of a run of `hrpo train` on one device.

    Args:
        config: of a model that thinks (`models.cost.config_that_thinks`).
        shapes: of the run.

    Raises:
        InputError: the gradient is "sequential", or the optimizer is unknown.
    """
    text = "bptt=sequential cannot be planned: it holds the graph of each step of decoding; take exact."
    require(depth_of(shapes.bptt) != "sequential", text)
    require(shapes.optim in OPTIMIZERS, f"optim must be one of {', '.join(OPTIMIZERS)}, not {shapes.optim!r}.")
    config = deepcopy(config)
    norm = config.thinking.get("embedding_norm") or 1.0  # which a model without weights cannot measure
    config.thinking = config.thinking | {"embedding_norm": norm}
    parts = parts_of(config.thinking["residual"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, shapes.dtype))
        lora = LoraConfig(
            r=shapes.lora_rank, target_modules="all-linear", exclude_modules=parts, modules_to_save=parts
        )
        model = get_peft_model(model, lora)
    trained = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    count = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    living = _Living()
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True), living:
        warnings.simplefilter("ignore", FutureWarning)  # names that the oldest transformers needs
        model = model.to_empty(device="cpu")
        base = living.now
        rollout = _rollout(model, shapes, living) - base
        loss = _loss(model, shapes, living) - base
    weights, engine = base - trained, 0
    if shapes.engine == "vllm":
        engine = weights + rollout
        rollout = 0
    return Plan(weights, trained, count * OPTIMIZERS[shapes.optim], engine, rollout, loss)


def _rollout(model: PeftModel, shapes: Shapes, living: _Living) -> int:
    """The most bytes at once while completions are made: reading prompts, then the last token's step."""
    rows = shapes.per_device_train_batch_size * shapes.gradient_accumulation_steps
    inner: Any = model.get_base_model().eval()
    length = shapes.max_completion_length
    living.most = living.now
    with torch.no_grad():
        cache: Any = DynamicCache(config=inner.config)
        ids = torch.zeros(rows, shapes.max_prompt_length, dtype=torch.long)
        mask = torch.ones(rows, shapes.max_prompt_length + length, dtype=torch.long)
        options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        inner(ids, attention_mask=mask[:, : ids.shape[1]], **options)
        # Instead of `length` steps: all keys and values but the last one's at once, which is the most that lives.
        for layer in cache.layers:
            keys = layer.keys[:, :, :1].expand(-1, -1, length - 1, -1).clone()
            layer.update(keys, keys.clone())
        states = torch.zeros(rows, length, inner.config.hidden_size, dtype=inner.dtype)
        out = inner(ids[:, :1], attention_mask=mask, **options)
        states = states.clone()  # the steps', and the stack of them
        out.logits.float().softmax(-1)
    return living.most


def _loss(model: PeftModel, shapes: Shapes, living: _Living) -> int:
    """The most bytes at once in loss and backward of one batch, whose completions think from end to end."""
    rows, length = shapes.per_device_train_batch_size, shapes.max_completion_length
    inner: Any = model.get_base_model()
    depth = depth_of(shapes.bptt)
    depth = PRODUCTS if depth == "exact" else depth
    if shapes.gradient_checkpointing:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
        inner.enable_input_require_grads()
    model.train()
    living.most = living.now
    ids = torch.zeros(rows, shapes.max_prompt_length + length, dtype=torch.long)
    states = torch.zeros(rows, length, inner.config.hidden_size, dtype=inner.dtype)
    thinks = torch.ones(rows, length, dtype=torch.bool)
    residual = inner.config.thinking["residual"]
    rule = Bptt(depth, head=distribution_head(inner, residual, 1.0)) if depth else None
    thinking = ThinkingInputs(states, thinks, residual, rule)
    with temporarily(adjoint, _number=lambda *_: 1.0):  # meta tensors have no values: compute all terms
        with torch.autocast("cpu", inner.dtype, enabled=inner.dtype != torch.float32):
            logps, _ = forward_scores(model, inner, ids, torch.ones_like(ids), length, 1.0, thinking_inputs=thinking)
        logps.sum().backward()
    return living.most


def table_of(estimate: Plan, title: str) -> Table:
    """The plan as a table, in GiB."""
    table = Table(title=title, caption="GiB on one device; what a process takes before it has a model comes on top.")
    table.add_column("", no_wrap=True)
    table.add_column("GiB", justify="right")
    rows = {
        "weights": estimate.weights,
        "adapter": estimate.trained,
        "optimizer": estimate.optimizer,
        "vLLM": estimate.engine,
        "rollout (temporary)": estimate.rollout,
        "loss and gradient (temporary)": estimate.loss,
    }
    for name, size in rows.items():
        table.add_row(name, f"{size / GIB:.2f}", end_section=name.startswith("loss"))
    table.add_row("peak", f"{estimate.peak / GIB:.2f}")
    return table
