"""What both trainers share: the optimizer's groups, the monitor, what is saved beside weights, and what is pushed.

A save holds how the model thinks, its forced thoughts, and its card. A push takes what `hrpo push` takes of a folder:
no pickled file, nothing of the run's state, no path of this machine.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from huggingface_hub import HfApi
from torch import nn, optim
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import HubStrategy

from hrpo_patches.models.card import author_of, public_name, read_card, write_card
from hrpo_patches.models.push import asking_the_hub, check_name, check_token, files_of, open_repository, push
from hrpo_patches.models.record import THINKING_FILE, save_pauses, save_thinking
from hrpo_patches.monitor.callback import ThinkingMonitor
from hrpo_patches.thinking.backbone import causal_lm, thinking_backbone
from hrpo_patches.training.checks import check_model, choose_bptt
from hrpo_patches.training.distributed import InShards
from hrpo_patches.training.optim import regroup
from hrpo_thinking.errors import InputError, SaveError, require

logger = logging.getLogger(__name__)


def check_push(args: TrainingArguments, base: str | None) -> None:
    """Raise `InputError` if a run cannot be pushed as its training arguments say.

    Args:
        args: a `TrainingArguments` with `push_to_hub`.
        base: the base model of the adapter that is trained; None where all weights are.
    """
    strategy = HubStrategy(args.hub_strategy)
    require(
        strategy not in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS),
        f"hub_strategy={strategy.value} pushes the optimizer's state, pickled, with paths of this machine; use "
        f"every_save or end.",
    )
    if args.hub_model_id is not None and "/" in args.hub_model_id:
        check_name(args.hub_model_id)
    check_token(args.hub_token)
    require(
        base is None or public_name(base) is not None,
        f"push_to_hub pushes an adapter of {base!r}, which is not a hub id, so nobody else can load it. Train from "
        f"its hub id, or push the finished run by hrpo push with --base owner/model.",
    )


class ThinkingTrainer(InShards):
    """A trainer of a model that thinks.

    Attributes:
        method: by which it trains, for the card.
        monitor: that measures the run; None with `monitor=False`.
    """

    method = ""
    monitor: ThinkingMonitor | None = None
    _constructed = False
    _tag_names: list[str] = []  # noqa: RUF012 - TRL's own type
    _fillers: list[int] = []  # noqa: RUF012 - the ids of the forced thoughts that a completion begins with

    def _base_model(self) -> PreTrainedModel:
        """The causal language model in what is trained."""
        model: PreTrainedModel = causal_lm(self.accelerator.unwrap_model(self.model))
        return model

    def _check_model(self, tokenizer: PreTrainedTokenizerBase, rollout: GenerationConfig | None) -> None:
        """Choose how far the gradient flows, check the model for it, and measure what training can change."""
        base = self._base_model()
        choose_bptt(base, self.args)
        check_model(self.model, base, tokenizer, self.args, rollout)
        thinking_backbone(base).residual_norm()  # of the embeddings, which training may change

    def create_optimizer(self, model: nn.Module | None = None) -> optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        return regroup(self, optimizer, self.args.learning_rates) if fresh and self.args.residual else optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:  # another process writes
            return
        folder, fillers = str(output_dir or self.args.output_dir), self._fillers
        if self.args.residual is not None:
            save_thinking(self.accelerator.unwrap_model(self.model), folder)
            self.write_card(folder)
        elif fillers and is_peft_model(self.model):  # a full model's own file says so already
            save_pauses(fillers, self._base_model().generation_config.eos_token_id, folder)

    def write_card(self, folder: str | Path) -> None:
        """Write the model card of what was saved in `folder`, if it thinks."""
        if (Path(folder) / THINKING_FILE).is_file():
            write_card(folder, self._base_model().config._name_or_path, self.method, list(self._tag_names))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As TRL's and transformers', but that of a model that thinks says so, and one that a user wrote is kept."""
        if self.args.residual is None:
            if author_of(read_card(Path(self.args.output_dir))) != "the user":
                super().create_model_card(*args, **kwargs)
        elif self.is_world_process_zero():
            self.write_card(self.args.output_dir)

    def _finish_construction(self) -> None:
        """Called by a constructor at its end: add the monitor, and create the repository that the run is pushed to."""
        if self.args.monitor:
            unwrapped = self.accelerator.unwrap_model(self.model)
            self.monitor = ThinkingMonitor(unwrapped, self.args, estimate_marker=False).first_in(self)
        self._constructed = True
        if self.args.push_to_hub:
            self.init_hf_repo()

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As transformers': create the repository that the run is pushed to.

        transformers calls it while it constructs a trainer, which may be refused later: then it only checks, so that a
        run that does not begin leaves no repository.

        Raises:
            InputError: the run cannot be pushed (`check_push`), or the repository is public and was to be private.
            SaveError: the hub cannot be reached or refuses.
        """
        if not self.is_world_process_zero():
            return
        args, base = self.args, self._base_model().config._name_or_path
        check_push(args, base if is_peft_model(self.accelerator.unwrap_model(self.model)) else None)
        self.push_in_progress = None
        if not self._constructed:
            return
        name = args.hub_model_id or Path(args.output_dir).resolve().name
        with asking_the_hub(f"creating {name} on the hub"):
            api = HfApi(token=token or args.hub_token)
            self.hub_model_id = open_repository(api, name, args.hub_private_repo if private is None else private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save the model to `args.output_dir` and push it, as transformers does; returns the URL.

        Args:
            commit_message: of the commit.
            blocking: False returns a `Future` of the URL.
            token: by default `args.hub_token`, or the one that huggingface_hub knows.
            revision: by default `args.hub_revision`.
            private: whether a repository that does not exist yet is created private.
            kwargs: of transformers' card, and unused: the card is that of `write_card`.

        Raises:
            InputError: as `init_hf_repo`.
            SaveError: the hub cannot be reached or refuses.
        """
        if self.hub_model_id is None:  # `args.push_to_hub` was not set
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        arguments = (str(self.args.output_dir), str(commit_message), token, revision)
        return self.push_saved(*arguments) if blocking else HfApi().run_as_future(self.push_saved, *arguments)

    def push_saved(
        self, folder: str, message: str = "End of training", token: str | None = None, revision: str | None = None
    ) -> str | None:
        """Push what is saved in `folder`; returns the URL, None in all processes but the first."""
        if not self.is_world_process_zero():
            return None
        args, name = self.args, str(self.hub_model_id)
        revision, token = revision or args.hub_revision, token or args.hub_token
        return push(files_of(Path(folder), name), name, None, revision, token, others="keep", message=message)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        try:  # and wait: the folder may be deleted afterwards
            self.push_saved(checkpoint_folder, f"Training in progress, step {self.state.global_step}")
        except (SaveError, InputError) as error:
            logger.warning(f"{error} Training continues, and the next save is pushed again.")
