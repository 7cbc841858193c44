"""An evaluation, from its command line to its file of results; knows flags and files, leaves the work to others."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase

from hrpo_patches.commands.command_line import option, parsed
from hrpo_patches.evaluation.generate import Decoding, batches_of, complete
from hrpo_patches.evaluation.scores import summarise
from hrpo_patches.models.base import base_of, open_model
from hrpo_patches.tasks.base import Problem, Task
from hrpo_patches.tasks.problems import find_task, load_problems
from hrpo_patches.tasks.prompts import examples_of, prompt_ids, prompt_of, uses_chat
from hrpo_patches.tasks.rewards import answer_of, grade
from hrpo_patches.thinking.backbone import causal_lm, is_untrained
from hrpo_patches.thinking.controls import CONTROLS, check_control
from hrpo_patches.thinking.decoding import filler_id
from hrpo_thinking.config import ThinkingConfig
from hrpo_thinking.errors import InputError
from hrpo_thinking.marker import marker_table

# Added to the seed of a generator, whose i-th problem comes of seed + i, so that no draw of a training is drawn again.
UNSEEN = 10**8


@dataclass
class EvalArguments:
    """Everything that an evaluation takes."""

    model: str | None = option(None, "A merged model, a hub id or folder, or smollm2-135m; with --adapter, its base.")
    adapter: str | None = option(None, "Folder of a trained adapter; its base is the one that it names, or --model.")
    task: str = option("gsm8k", "A task, reasoning_gym:NAME?option=value, or package.module:TASK.")
    dataset: str | None = option(None, "Hub id, .jsonl file or folder; by default where the task has its problems.")
    corpus: str | None = option(None, "File or folder of documents for questions that come without.")
    split: str = option("test", "Part of the data set: test or train.")
    limit: int | None = option(None, "Take the first so many problems.")
    greedy: bool = option(True, "Greedy decoding; --no-greedy samples.")
    temperature: float = option(0.5, "Sampling temperature, for --no-greedy.")
    samples: int = option(1, "Completions of each problem, for --no-greedy.")
    thinking: bool = option(True, "Let the model think; --no-thinking reads it out hard.")
    thoughts: int | None = option(None, "Forced thoughts before each completion; by default the model's own.")
    filler: str | None = option(None, "Name of the token that a forced thought is; by default the model's own.")
    control: str = option(
        "live", "What takes the place of the thoughts: " + "; ".join(f"{k}, {v}" for k, v in CONTROLS.items()) + "."
    )
    max_new_tokens: int = option(512, "Completions are cut at so many tokens.")
    batch_size: int = option(16, "Completions at once.")
    prompt: str = option("auto", "chat, plain, or auto: chat if the tokenizer has a chat template.")
    shots: int = option(0, "How many of the task's worked examples the prompt shows.")
    examples: list[str] = field(default_factory=list, metadata={"help": "Worked examples of your own for the prompt."})
    answer_start: str | None = option(None, "The answer marker; by default the one that the model was trained with.")
    seed: int = option(42, "Seed of the sampling, and of a generator.")
    out: str = option("eval.json", "Where the results go; must not exist. An interrupted run leaves OUT.part.")

    def check(self) -> None:
        """Raise `InputError` for whatever can be known to be wrong before any work."""
        if self.model is None and self.adapter is None:
            raise InputError("name a model with --model, or an adapter with --adapter.")
        if self.adapter is not None and not (Path(self.adapter) / "adapter_config.json").is_file():
            raise InputError(f"{self.adapter} holds no adapter: adapter_config.json is missing.")
        if self.greedy and self.samples != 1:
            raise InputError(f"--samples {self.samples} of greedy decoding are all the same; add --no-greedy.")
        if not self.temperature >= 0.01:
            raise InputError(f"--temperature has to be 0.01 or more, not {self.temperature}; greedy is --greedy.")
        for name in ("samples", "batch_size", "max_new_tokens"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name} has to be above 0, not {getattr(self, name)}.")
        if self.thoughts is not None and not 0 <= self.thoughts < self.max_new_tokens:
            raise InputError(
                f"--thoughts has to be from 0 to below --max_new_tokens {self.max_new_tokens}, not {self.thoughts}."
            )
        check_control(self.control, [])
        if self.control != "live" and not self.thinking:
            raise InputError(f"--control {self.control} replaces thoughts; it does not go with --no-thinking.")
        if not 0 <= self.seed < 2**31:
            raise InputError(f"--seed has to be from 0 to 2**31 - 1, not {self.seed}.")
        if self.answer_start == "":
            raise InputError("--answer_start has to be a text.")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"--limit has to be 1 or more, not {self.limit}.")
        if self.prompt not in ("auto", "chat", "plain"):
            raise InputError(f"--prompt has to be auto, chat or plain, not {self.prompt!r}.")
        if self.split not in ("train", "test"):
            raise InputError(f"--split has to be train or test, not {self.split!r}.")
        if os.path.lexists(self.out):
            raise InputError(f"{self.out} exists already; give another --out.")
        if not Path(self.out).absolute().parent.is_dir():
            raise InputError(f"the folder of {self.out} does not exist.")

    @property
    def decoding(self) -> Decoding:
        """How the prompts are answered."""
        temperature = 0.0 if self.greedy else self.temperature
        return Decoding(
            self.max_new_tokens,
            self.thinking,
            temperature,
            self.batch_size,
            self.seed,
            self.thoughts or 0,
            self.control,
        )


def parse(argv: list[str] | None) -> EvalArguments:
    """The arguments of a command line (by default this process's), checked; an `InputError` if they cannot work."""
    return parsed(EvalArguments, argv, prog="python -m hrpo_patches eval")


class Progressed:
    """What an evaluation has done so far, in a file beside its results: the settings, then a line for each batch.

    Raises:
        InputError: the file belongs to an evaluation with other settings.
    """

    def __init__(self, out: Path, settings: dict[str, Any]) -> None:
        self.path = out.with_name(out.name + ".part")
        try:
            self._lock = self.path.open("a")  # held until the process ends
        except OSError as error:
            raise InputError(f"{out} cannot be written: {error.strerror}.") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another evaluation is writing {self.path}; wait, or give another --out.") from None
        lines = self.path.read_text(errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n")]  # a kill may cut the last one
        try:
            whole = [json.loads(line) for line in kept]
        except ValueError:
            whole = [None]
        if whole and whole[0] != settings:
            begun = whole[0] if isinstance(whole[0], dict) else {}
            other = sorted(key for key in settings if begun.get(key) != settings[key])
            raise InputError(
                f"{self.path} belongs to another evaluation (other {', '.join(other)}); give another --out, or remove "
                f"it."
            )
        self.batches: list[list[dict[str, Any]]] = whole[1:]
        self.path.write_text("".join(kept) or json.dumps(settings) + "\n")

    def add(self, samples: list[dict[str, Any]]) -> None:
        """Write one batch's samples, in one call of the operating system."""
        self.batches.append(samples)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(file, (json.dumps(samples) + "\n").encode())
        finally:
            os.close(file)


def opened(arguments: EvalArguments) -> tuple[Any, PreTrainedTokenizerBase, str]:
    """The model, its tokenizer and the answer marker.

    Raises:
        InputError: as `open_model`; thinking is asked of a model that was never trained to, or with another marker.
    """
    if arguments.adapter is not None:
        model, tokenizer = open_model(arguments.adapter, arguments.model)
    else:
        model, tokenizer = open_model(str(arguments.model))
    base = causal_lm(model)
    trained = not is_untrained(model)
    thinking = ThinkingConfig.of(base.config)
    own = thinking.answer_start if thinking is not None else "####"
    marker = arguments.answer_start or own
    generation = model.generation_config
    arguments.thoughts = arguments.thoughts if arguments.thoughts is not None else generation.thoughts or 0
    if arguments.thoughts and (arguments.filler or generation.filler_token_id is None):
        known = thinking or ThinkingConfig()
        generation.filler_token_id = filler_id(tokenizer, replace(known, filler=arguments.filler or known.filler))
    if not arguments.thoughts < arguments.max_new_tokens:
        raise InputError(
            f"the model's {arguments.thoughts} forced thoughts leave no room in --max_new_tokens "
            f"{arguments.max_new_tokens}."
        )
    if arguments.thinking and not trained:
        raise InputError("this model was never trained to think, so it would think at random; add --no-thinking.")
    if arguments.thinking and marker != own:
        raise InputError(f"this model was trained to stop thinking at {own!r}, not at {marker!r}.")
    return model, tokenizer, marker


def prompts_of(
    arguments: EvalArguments, task: Task, problems: list[Problem], marker: str, tokenizer: PreTrainedTokenizerBase
) -> list[Any]:
    """A prompt for each problem."""
    examples = examples_of(task, marker, arguments.shots, arguments.examples)
    chat = uses_chat(arguments.prompt, tokenizer)
    return [prompt_of(task, problem["question"], marker, examples, chat) for problem in problems]


def token_ids(
    arguments: EvalArguments, prompts: list[Any], problems: list[Problem], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[list[int]], list[str]]:
    """The ids of every sample's prompt, and its gold answer; an `InputError` if the control cannot be applied."""
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts for _ in range(arguments.samples)]
    golds = [str(problem["answer"]) for problem in problems for _ in range(arguments.samples)]
    check_control(arguments.control, [[golds[i] for i in batch] for batch in batches_of(ids, arguments.batch_size)])
    return ids, golds


def answer_all(
    arguments: EvalArguments,
    task: Task,
    problems: list[Problem],
    tokens: tuple[list[list[int]], list[str]],
    opened_model: tuple[Any, PreTrainedTokenizerBase, str],
    done: Progressed,
) -> None:
    """Answer what `done` does not hold yet, batch by batch, with a bar that shows the accuracy so far.

    `tokens` are those of `token_ids`.
    """
    model, tokenizer, marker = opened_model
    ids, golds = tokens
    table = marker_table(tokenizer, marker, model.config.vocab_size)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[accuracy]}"),
    )
    with Progress(*columns) as progress:
        right = [sample["right"] for batch in done.batches for sample in batch]
        bar = progress.add_task("Answering", total=len(ids), completed=len(right), accuracy=_share(right))
        for batch, rows in complete(model, tokenizer, ids, arguments.decoding, len(done.batches), golds):
            samples = []
            for item, row in zip(batch, rows, strict=True):
                text = tokenizer.decode(row, skip_special_tokens=True)
                problem = problems[item // arguments.samples]
                verdict = bool(grade(task, problem, text, marker))
                position = marker_position(row, table)
                answer = answer_of(text, marker, task.lines(problem))
                named = {"item": item, "completion": text, "answer": answer, "right": verdict}
                samples.append(named | {"tokens": len(row), "marker": position})
            done.add(samples)
            right += [sample["right"] for sample in samples]
            progress.update(bar, advance=len(batch), accuracy=_share(right))


def _share(right: list[bool]) -> str:
    return f"accuracy {sum(right) / len(right):.3f}" if right else ""


def marker_position(row: list[int], table: torch.Tensor) -> int | None:
    """The number of tokens up to and including the one that completes the marker; None without one."""
    state, last = 0, table.shape[1] - 1
    for i, token in enumerate(row, 1):
        state = int(table[token, state])
        if state == last:
            return i
    return None


def settings_of(arguments: EvalArguments, prompts: list[Any], problems: list[Problem]) -> dict[str, Any]:
    """What makes two evaluations the same one: flags, prompts, gold answers, and the files of adapter and base."""
    settings = {key: value for key, value in asdict(arguments).items() if key != "out"}
    content = json.dumps([prompts, [problem["answer"] for problem in problems]])
    settings["problems"] = hashlib.sha256(content.encode()).hexdigest()
    base = base_of(Path(arguments.adapter), arguments.model) if arguments.adapter is not None else arguments.model
    for name, folder in (("adapter_files", arguments.adapter), ("model_files", base)):
        if folder is not None and Path(folder).is_dir():
            files = sorted(path for path in Path(folder).iterdir() if path.is_file())
            settings[name] = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return settings


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Evaluate from a command line (by default this process's) and write the results; returns them.

    Raises:
        InputError: before the first completion, if the evaluation cannot work.
    """
    arguments = parse(argv)
    seed = arguments.seed + (UNSEEN if arguments.split == "test" else 0)
    task = find_task(arguments.task, arguments.dataset, arguments.limit or 1000, seed)
    problems = load_problems(task, arguments.dataset, arguments.split, arguments.corpus)[: arguments.limit]
    model, tokenizer, marker = opened(arguments)
    prompts = prompts_of(arguments, task, problems, marker, tokenizer)
    tokens = token_ids(arguments, prompts, problems, tokenizer)  # refuses before there is a file of progress
    settings = settings_of(arguments, prompts, problems)
    done = Progressed(Path(arguments.out), settings)
    answer_all(arguments, task, problems, tokens, (model, tokenizer, marker), done)
    samples = sorted((sample for batch in done.batches for sample in batch), key=lambda sample: sample["item"])
    n = arguments.samples
    rows = [
        {
            "prompt": prompt,
            "gold": problem["answer"],
            "samples": [{k: v for k, v in s.items() if k != "item"} for s in samples[i * n : (i + 1) * n]],
        }
        for i, (problem, prompt) in enumerate(zip(problems, prompts, strict=True))
    ]
    scores = summarise(
        rows,
        lambda i, answer: task.is_right(problems[i], answer),
        lambda one, other: one.casefold() == other.casefold() or task.grader(one, other),
    )
    results = {"settings": settings, "answer_start": marker, "scores": scores, "problems": rows}
    building = done.path.with_suffix(".whole")
    building.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    try:
        os.link(building, arguments.out)  # which replaces nothing
    except FileExistsError:
        raise InputError(f"{arguments.out} has come into being meanwhile; the results are in {building}.") from None
    building.unlink()
    done.path.unlink(missing_ok=True)
    show(scores, f"{arguments.adapter or arguments.model}, {task.name}", Path(arguments.out))
    return results


def show(scores: dict[str, Any], title: str, out: Path) -> None:
    """Print the scores."""
    low, high = scores["wilson"]
    console = Console()
    console.print(
        f"{title}: accuracy {scores['mean']:.3f} ± {scores['standard_error']:.3f} (95%: {low:.3f} to {high:.3f})"
    )
    more = {name: value for name, value in scores.items() if "@" in name}
    for name, value in more.items():
        console.print(f"{name}: {value:.3f}")
    console.print(
        f"{scores['right']} of {scores['total']} completions right; {scores['mean_tokens']:.0f} tokens each, "
        f"marker in {scores['marker_rate']:.0%}; {out}",
        markup=False,
    )
