"""Parameter groups: base, gates, Λ and projection, each with its learning rate.

Names are matched by component, so PEFT's, DDP's and torch.compile's prefixes and infixes do not matter.
"""

from __future__ import annotations

from typing import Any

from torch import nn, optim
from transformers import Trainer

from hrpo_thinking.errors import require
from hrpo_thinking.parts import RATES, group_of


def regroup(trainer: Trainer, optimizer: optim.Optimizer, learning_rates: dict[str, float]) -> optim.Optimizer:
    """Put the parameters of a trainer's fresh `optimizer` into our groups; its class and options stay as they are.

    Each trainable parameter is in one group, which has a "name"; none is empty. Thinking weights never decay: Λ would
    be pulled towards a = 2^(-c r), away from the smooth start, and the projection has no scale because its output is
    normalised.

    Raises:
        InputError: the optimizer has groups of its own kind (GaLore, LOMO, ...).
    """
    own = {key for group in optimizer.param_groups for key in group} - {"params", *optimizer.defaults}
    text = f"optim={trainer.args.optim!s} groups its parameters itself; use one of the AdamW family."
    require(not own and not optimizer.state, text)
    rates = {"base": trainer.args.learning_rate} | learning_rates
    model: Any = trainer.model
    # transformers excludes biases and norms from weight decay; thinking weights are excluded below.
    decayed = set(trainer.get_decay_parameter_names(model))
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = group_of(name)
            decay = trainer.args.weight_decay if name in decayed and kind == "base" else 0.0
            key = kind if decay else f"{kind}_no_decay"
            group = groups.setdefault(key, {"name": key, "params": [], "lr": rates[kind], "weight_decay": decay})
            group["params"].append(parameter)
    optimizer.param_groups.clear()
    for group in groups.values():
        optimizer.add_param_group(group)
    return optimizer


def patch_trainer_optimizer(
    trainer: Trainer,
    lr_residual_gate: float = RATES["gate"],
    lr_residual_Lambda: float = RATES["Lambda"],
    lr_thinking_projection: float = RATES["projection"],
) -> None:
    """Give any Hugging Face `Trainer` separate groups for the gates, Λ and the projection of its model.

    Call it before `trainer.train()`. The base learning rate, weight decay and optimizer stay the training arguments'.

    Raises:
        InputError: the model has no trainable thinking weights, or the trainer already has an optimizer.
    """
    require(
        trainer.optimizer is None,
        "this trainer already has an optimizer; call patch_trainer_optimizer before training.",
    )
    model: Any = trainer.model
    require(
        any(group_of(name) != "base" and p.requires_grad for name, p in model.named_parameters()),
        "the trainer's model has no trainable thinking weights; load it with thinking={}, and with PEFT name the "
        "thinking modules in LoraConfig(modules_to_save=...), or use HRPOTrainer, which does both.",
    )
    rates = {"gate": lr_residual_gate, "Lambda": lr_residual_Lambda, "projection": lr_thinking_projection}

    create = trainer.create_optimizer

    def create_optimizer(model: nn.Module | None = None) -> optim.Optimizer:
        fresh = trainer.optimizer is None
        optimizer = create(model)
        return regroup(trainer, optimizer, rates) if fresh else optimizer

    trainer.create_optimizer = create_optimizer  # type: ignore[method-assign]
