"""Looks whether a machine, a model, its data and an engine can think together; prints and changes nothing.

What a look needs is imported by it: the first ones have something to say where transformers cannot be imported.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from hrpo_patches.patching import overlay
from hrpo_thinking.errors import InputError, PatchError

GIB = 2**30
ROOM = 1 * GIB  # of disk that a run wants at the least
NEW = 16  # tokens of the completion that is tried
QUESTION = "What is 3 + 4?"
# Of log-probabilities, rollout against replay.
TOLERANCE = {"torch.float32": 1e-3, "torch.bfloat16": 0.5, "torch.float16": 0.1}


@dataclass
class Finding:
    """What one look saw.

    Attributes:
        what: was looked at.
        fine: whether it works; None where nothing could be seen, because of something before.
        says: what was seen, or what is wrong and what to do.
    """

    what: str
    fine: bool | None
    says: str


class Unseen(Exception):
    """There is nothing to look at; the message says why."""


class Examination:
    """The looks, each of which leaves what it found for the next.

    Args:
        name, base: of the model, as for `open_model`; without a name, the machine alone is looked at.
        task, dataset: of the data, as for `find_task`; without a task, a made-up question stands for it.
        engine: one of `engines.choice.CHOICES`.
        memory: the bytes that a step of training takes, by the config of a model that thinks.
    """

    def __init__(
        self,
        name: str | None,
        base: str | None,
        task: str | None,
        dataset: str | None,
        engine: str,
        memory: Callable[[Any], int] | None = None,
    ) -> None:
        self.name, self.base, self.task, self.dataset, self.asked = name, base, task, dataset, engine
        self.memory = memory
        self.model: Any = None
        self.tokenizer: Any = None
        self.marker = self.residual = ""
        self.ids: list[int] = []
        self.rollout: Any = None
        self.replayed: Any = None

    def __iter__(self) -> Iterator[Finding]:
        """Look at one thing after the other."""
        looks: dict[str, Callable[[], str]] = {
            "versions": self.versions,
            "patches": self.patches,
            "machine": self.machine,
            "model": self.loads,
            "tokenizer": self.spells,
            "data": self.asks,
            "rollout": self.thinks,
            "replay": self.replays,
            "gradient": self.learns,
            "engine": self.chooses,
            "memory": self.fits,
        }
        for what, look in looks.items():
            try:
                yield Finding(what, True, look())
            except Unseen as why:
                yield Finding(what, None, str(why))
            except (InputError, PatchError) as error:
                yield Finding(what, False, str(error))
            except Exception as error:  # of whatever kind: a doctor who falls ill says less than one who names it
                yield Finding(what, False, f"{type(error).__name__}: {error}. Report it, with --json.")

    # --- the machine -----------------------------------------------------------------------------------------------

    def versions(self) -> str:
        """Whether what is installed is what hrpo_patches asks for, of itself and of its extras."""
        seen, wrong = [f"Python {platform.python_version()}"], []
        for requirement in map(Requirement, requires("hrpo_patches") or []):
            optional = requirement.marker is not None
            if requirement.marker is not None and requirement.marker.evaluate({"extra": "dev"}):
                continue
            try:
                found = version(requirement.name)
            except PackageNotFoundError:
                if not optional:
                    wrong.append(f"{requirement.name} is missing: pip install '{requirement.name}'")
                continue
            seen.append(f"{requirement.name} {found}")
            if not requirement.specifier.contains(found.partition("+")[0], prereleases=True):
                wrong.append(f"{requirement.name} is {found}: pip install '{requirement.name}{requirement.specifier}'")
        if wrong:
            raise InputError("; ".join(wrong) + ".")
        return ", ".join(seen)

    def patches(self) -> str:
        """Whether every diff of an installed package is applied or fits."""
        states = {patch: overlay.state_of(patch) for patch in overlay.all_patches()}
        for state in states.values():
            if state.startswith("refused: "):
                raise PatchError(state.removeprefix("refused: "))
        fitting = [patch for patch, state in states.items() if state != "package not installed"]
        return f"{len(fitting)} diffs fit {', '.join(sorted({patch.package for patch in fitting}))}"

    def machine(self) -> str:
        """Devices, dtypes and room."""
        import torch

        from hrpo_patches.device import has_bf16

        if shutil.disk_usage(Path.cwd()).free < ROOM:
            raise InputError(f"less than {ROOM / GIB:.0f} GiB of the disk of {Path.cwd()} are free; make room.")
        if not torch.cuda.is_available():
            return f"no GPU; {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, float32"
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        dtype = "bfloat16" if has_bf16() else "float32"
        return f"{torch.cuda.device_count()} GPU ({', '.join(sorted(names))}), {dtype}"

    # --- the model, its tokenizer and its data ---------------------------------------------------------------------

    def loads(self) -> str:
        """Whether the model loads, and its weights are numbers."""
        import torch

        from hrpo_patches.models.base import open_model
        from hrpo_patches.thinking.backbone import causal_lm, is_untrained
        from hrpo_thinking.config import ThinkingConfig

        if self.name is None:
            raise Unseen("name a model to have it tried")
        model, self.tokenizer = open_model(self.name, self.base)
        for name, weight in model.named_parameters():
            if not torch.isfinite(weight).all():
                raise InputError(
                    f"{name} of {self.name} is not finite; train it again, or from an earlier checkpoint."
                )
        self.model, thinking = model, ThinkingConfig.from_dict(causal_lm(model).config.thinking)
        self.marker, self.residual = thinking.answer_start, thinking.residual
        trained = "never trained to think" if is_untrained(model) else "trained to think"
        millions = sum(weight.numel() for weight in model.parameters()) / 1e6
        dtype = str(causal_lm(model).dtype).removeprefix("torch.")
        return (
            f"{self.name}: {causal_lm(model).config.model_type}, {millions:.0f} million weights, {dtype}, {trained}, "
            f"{self.residual} residual, marker {self.marker!r}"
        )

    def spells(self) -> str:
        """Whether tokenizer and model speak of the same tokens, and a completion can end."""
        from hrpo_patches.thinking.backbone import causal_lm
        from hrpo_patches.thinking.decoding import ends_of
        from hrpo_thinking.marker import marker_table

        tokenizer, rows = self.tokenizer, len(self._seen().get_input_embeddings().weight)
        if len(tokenizer) > rows:
            raise InputError(
                f"the tokenizer has {len(tokenizer)} tokens and the model embeds {rows}: they do not belong together, "
                f"or tokens were added; take the model's own tokenizer, or call resize_token_embeddings."
            )
        marker_table(tokenizer, self.marker, causal_lm(self.model).config.vocab_size)
        ends = ends_of(self.model, tokenizer)
        if not ends:
            raise InputError(
                "neither model nor tokenizer has an end token, so that every completion runs to its limit; set "
                "eos_token_id in the model's generation_config.json."
            )
        template = "a chat template" if tokenizer.chat_template is not None else "no chat template"
        return f"{len(tokenizer)} tokens, {template}, spells {self.marker!r}, ends with {ends}"

    def asks(self) -> str:
        """Whether the problems can be read, and their gold answers are right by the grader."""
        from hrpo_patches.tasks.problems import find_task, load_problems
        from hrpo_patches.tasks.prompts import prompt_ids, prompt_of, uses_chat

        if self.task is None and self.dataset is None:
            summary = "a made-up question; name --task or --dataset to have data tried"
            if self.model is None:
                raise Unseen(summary)
            chat = self.tokenizer.chat_template is not None
            self.ids = prompt_ids(self.tokenizer, [{"role": "user", "content": QUESTION}] if chat else QUESTION)
            return summary
        task = find_task(self.task or "gsm8k", self.dataset, size=100)
        problems = load_problems(task, self.dataset)
        for number, problem in enumerate(problems[:100], 1):
            if not all(task.is_right(problem, gold) for gold in problem["answer"]):
                raise InputError(
                    f"problem {number} of {task.name} has the gold answer {problem['answer'][0]!r}, which its own "
                    f"grader does not accept; fix the data, or use another --task."
                )
        summary = f"{len(problems)} problems of {task.name}, gold answers right"
        if self.model is None:
            return summary
        chat = uses_chat("auto", self.tokenizer)
        prompts = [prompt_of(task, problem["question"], self.marker, [], chat) for problem in problems[:100]]
        lengths = [prompt_ids(self.tokenizer, prompt) for prompt in prompts]
        self.ids = lengths[0]
        return f"{summary}; prompts of {min(map(len, lengths))} to {max(map(len, lengths))} tokens"

    # --- a completion ----------------------------------------------------------------------------------------------

    def thinks(self) -> str:
        """Whether a sampled completion has thoughts."""
        import torch

        from hrpo_patches.thinking.decoding import by_temperature

        model, ids = self._seen(), torch.tensor([self._asked()], device=self._seen().device)
        torch.manual_seed(0)
        sampling = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
        with torch.no_grad(), by_temperature(model):
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                tokenizer=self.tokenizer,
                thinking=True,
                thoughts=0,
                max_new_tokens=NEW,
                pad_token_id=self.tokenizer.pad_token_id,
                return_dict_in_generate=True,
                output_scores=True,
                **sampling,
            )
        if not out.thinking_mask[:, :-1].any():
            raise InputError(f"the completion ended, or said {self.marker!r}, before it thought; try another --task.")
        self.rollout = out
        return f"{out.thinking_mask.shape[1]} tokens, {int(out.thinking_mask.sum())} thoughts"

    def replays(self) -> str:
        """Whether the replay has the rollout's log-probabilities."""
        import torch

        from hrpo_patches.thinking.backbone import causal_lm
        from hrpo_patches.thinking.replay import replay_forward
        from hrpo_thinking.parts import is_thinking_parameter

        if (out := self.rollout) is None:
            raise Unseen("nothing was rolled out")
        for name, weight in self.model.named_parameters():
            weight.requires_grad_(is_thinking_parameter(name))
        replay = replay_forward(
            self.model,
            out.sequences,
            thinking_states=out.thinking_states,
            thinking_mask=out.thinking_mask,
            thinking_residual=out.thinking_residual,
        )
        tokens = out.sequences[0, -out.thinking_mask.shape[1] :, None]
        replayed = replay.logits[0, -len(tokens) - 1 : -1].float().log_softmax(-1).gather(1, tokens)
        sampled = torch.stack(out.scores, 1)[0].float().log_softmax(-1).gather(1, tokens)
        apart, most = (replayed - sampled).abs().max().item(), TOLERANCE[str(causal_lm(self.model).dtype)]
        if not apart < most:
            raise InputError(
                f"log-probabilities of rollout and replay differ by {apart:.2g}, more than {most}: training would "
                f"learn from what was never said. The model's forward must pass thinking_inputs on; leave it as it "
                f"is, or try another attn_implementation."
            )
        self.replayed = replayed
        return f"log-probabilities of the rollout, {apart:.1e} apart"

    def learns(self) -> str:
        """Whether each thinking module that is used has a gradient."""
        import torch

        from hrpo_thinking.parts import parts_of

        if self.replayed is None:
            raise Unseen("nothing was replayed")
        named = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        grads = torch.autograd.grad(self.replayed.sum(), [weight for _, weight in named], allow_unused=True)
        norms = {}
        for part in parts_of(self.residual):
            of_part = [grad for (name, _), grad in zip(named, grads, strict=True) if part in name and grad is not None]
            norms[part] = sum(grad.float().square().sum().item() for grad in of_part) ** 0.5
            if not 0 < norms[part] < math.inf:
                raise InputError(
                    f"the gradient of {part} is {norms[part]}, so that it would not learn; leave the model's forward "
                    f"and its thinking modules as they are."
                )
        return ", ".join(f"{part} {norm:.1e}" for part, norm in norms.items())

    def chooses(self) -> str:
        """Which engine is taken and why, and whether it says what generate says."""
        from hrpo_patches.engines.batches import Decoding, complete
        from hrpo_patches.engines.choice import Needs, choose_engine
        from hrpo_patches.thinking.backbone import causal_lm

        model, ids = self._seen(), [self._asked()]
        engine, why = choose_engine(self.asked, model, Needs(self.residual))
        if engine == "generate":
            return f"{engine} ({why})"
        ways = [Decoding(NEW, thinking=True, engine=one) for one in ("generate", engine)]
        one, other = (next(iter(complete(model, self.tokenizer, ids, way)))[1][0] for way in ways)
        if one != other and causal_lm(model).dtype.itemsize == 4:
            raise InputError(f"{engine} says {other} where generate says {one}; use --engine generate.")
        return f"{engine} ({why}), {'says what generate says' if one == other else 'rounds otherwise than generate'}"

    def fits(self) -> str:
        """What a step of training takes of the device's memory."""
        import torch

        from hrpo_patches.thinking.backbone import causal_lm

        model = causal_lm(self._seen())
        if self.memory is None:
            raise Unseen("it was not planned")
        try:
            need, device = self.memory(model.config), model.device
        except Exception as error:  # a plan that fails says nothing about the model
            raise Unseen(f"it could not be planned ({type(error).__name__}: {error})") from None
        if device.type == "cuda":
            have = torch.cuda.get_device_properties(device).total_memory
        else:
            have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        says = f"a step of hrpo train with its defaults takes about {need / GIB:.1f} of {have / GIB:.1f} GiB"
        if need < have:
            return says
        raise Unseen(
            f"{says}: lower --per_device_train_batch_size, --max_completion_length or --max_prompt_length; hrpo info "
            f"MODEL --plan says what they take"
        )

    def _seen(self) -> Any:
        if self.model is None:
            raise Unseen("the model could not be looked at")
        return self.model

    def _asked(self) -> list[int]:
        if not self.ids:
            raise Unseen("a prompt is missing")
        return self.ids
