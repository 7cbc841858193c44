"""`hrpo eval`: an evaluation from its command line to its file of results; leaves the work to others."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hrpo_patches.commands.console import stdout_console
from hrpo_patches.commands.flags import Written, add_first_flags, option, parser_of, read, with_config
from hrpo_patches.engines.batches import Decoding, batches_of
from hrpo_patches.engines.choice import CHOICES, ENGINE_HELP, Needs, choose_engine
from hrpo_patches.evaluation.answers import Questions, answer_all
from hrpo_patches.evaluation.progress import Progressed
from hrpo_patches.evaluation.statistics import paired, summarise
from hrpo_patches.files import create, listed
from hrpo_patches.models.base import base_of, open_model
from hrpo_patches.models.hub import adapter_folder
from hrpo_patches.tasks.base import Problem, Task
from hrpo_patches.tasks.problems import find_task, load_problems
from hrpo_patches.tasks.prompts import PROMPTS, examples_of, prompt_ids, prompt_of, run_records, uses_chat
from hrpo_patches.tasks.sources import place_of, sources_of
from hrpo_patches.thinking.backbone import causal_lm, is_untrained
from hrpo_patches.thinking.controls import CONTROLS, check_control
from hrpo_patches.thinking.decoding import check_filler, filler_id
from hrpo_thinking.config import ThinkingConfig
from hrpo_thinking.errors import InputError, require
from hrpo_thinking.request import check_room

logger = logging.getLogger(__name__)

# Added to the seed of a generator, whose i-th problem comes of seed + i, so that no draw of a training is drawn again.
UNSEEN = 10**8
ALL = "all"  # of the controls
# The ends of names of files, in a model's or an adapter's folder, that decide what it answers.
ANSWERING = (".safetensors", "config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja")


@dataclass
class EvalArguments:
    """Everything that an evaluation takes."""

    model: str | None = option(None, "A merged model, a hub id or folder, or smollm2-135m; with --adapter, its base.")
    adapter: str | None = option(
        None, "Folder or hub id of a trained adapter; its base is the one that it names, or --model."
    )
    task: str = option("gsm8k", "A task, reasoning_gym:NAME?option=value, or package.module:TASK.")
    dataset: str | None = option(None, "Hub id, .jsonl file or folder; by default where the task has its problems.")
    corpus: str | None = option(None, "File or folder of documents for questions that come without.")
    split: str = option("test", "Part of the data set.", choices=("test", "train"))
    limit: int | None = option(None, "Take the first so many problems.")
    greedy: bool = option(True, "Greedy decoding; --no-greedy samples.")
    temperature: float = option(0.5, "Sampling temperature, for --no-greedy.")
    samples: int = option(1, "Completions of each problem, for --no-greedy.")
    thinking: bool = option(True, "Let the model think; --no-thinking answers with thinking off.")
    thoughts: list[int] = field(
        default_factory=list,
        metadata={"help": "Forced thoughts before a completion, one number or several; by default the model's own."},
    )
    filler: str | None = option(None, "Name of the token that a forced thought is; by default the model's own.")
    control: str = option(
        "live",
        "What takes the place of the thoughts: " + "; ".join(f"{k}, {v}" for k, v in CONTROLS.items()) + "; all, each "
        "of these in turn.",
        choices=(*CONTROLS, ALL),
    )
    max_new_tokens: int = option(512, "Completions are cut at so many tokens.")
    engine: str = option("generate", ENGINE_HELP, choices=CHOICES)
    batch_size: int = option(16, "Completions at once.")
    prompt: str = option("auto", "chat, plain, or auto: chat if the tokenizer has a chat template.", choices=PROMPTS)
    shots: int = option(0, "How many of the task's worked examples the prompt shows.")
    examples: list[str] = field(default_factory=list, metadata={"help": "Worked examples of your own for the prompt."})
    answer_start: str | None = option(None, "The answer marker; by default the one that the model was trained with.")
    seed: int = option(42, "Seed of the sampling, and of a generator.")
    out: str = option("eval.json", "Where the results go; must not exist. An interrupted run leaves OUT.part.")

    def check(self) -> None:
        """Raise `InputError` for whatever can be known to be wrong before any work."""
        require(
            self.model is not None or self.adapter is not None,
            "name a model with --model, or an adapter with --adapter.",
        )
        if self.adapter is not None:
            adapter_folder(self.adapter)
        require(
            not self.greedy or self.samples == 1,
            f"--samples {self.samples} of greedy decoding are all the same; add --no-greedy.",
        )
        require(
            self.temperature >= 0.01,
            f"--temperature must be 0.01 or more, not {self.temperature}; greedy is --greedy.",
        )
        for name in ("samples", "batch_size", "max_new_tokens"):
            require(getattr(self, name) > 0, f"--{name} must be above 0, not {getattr(self, name)}.")
        for count in self.thoughts:
            require(count >= 0, f"--thoughts must be 0 or more, not {count}.")
            check_room(count, self.max_new_tokens, "--thoughts", "--max_new_tokens")
        if len(set(self.thoughts)) < len(self.thoughts):
            raise InputError(f"--thoughts {' '.join(map(str, self.thoughts))}: expected different numbers.")
        require(
            self.control == "live" or self.thinking,
            f"--control {self.control} replaces thoughts; it cannot be combined with --no-thinking.",
        )
        require(0 <= self.seed < 2**31, f"--seed must be from 0 to 2**31 - 1, not {self.seed}.")
        require(self.answer_start != "", "--answer_start must be a text.")
        require(self.limit is None or self.limit >= 1, f"--limit must be 1 or more, not {self.limit}.")
        require(not os.path.lexists(self.out), f"{self.out} exists already; give another --out.")
        require(Path(self.out).absolute().parent.is_dir(), f"the folder of {self.out} does not exist.")

    @property
    def forced(self) -> int:
        """The most forced thoughts of a completion."""
        return max(self.thoughts, default=0)

    def variations(self) -> list[EvalArguments]:
        """One evaluation for each control and number of thoughts."""
        controls = tuple(CONTROLS) if self.control == ALL else (self.control,)
        return [replace(self, control=control, thoughts=[count]) for count in self.thoughts for control in controls]

    @property
    def decoding(self) -> Decoding:
        """How the prompts are answered."""
        shared = {one.name: getattr(self, one.name) for one in fields(Decoding)}
        temperature = 0.0 if self.greedy else self.temperature
        return Decoding(**shared | {"temperature": temperature, "thoughts": self.forced})


def parse(argv: Written) -> EvalArguments:
    """The arguments of a command line, checked; an `InputError` if they cannot work."""
    parser = parser_of(
        EvalArguments, prog="hrpo eval", description="Let a model answer a task's problems, and grade them."
    )
    add_first_flags(parser)
    arguments: EvalArguments = read(parser, with_config(argv))[0]
    arguments.check()
    return arguments


def opened(arguments: EvalArguments) -> tuple[Any, PreTrainedTokenizerBase, str]:
    """The model, its tokenizer and the answer marker.

    Raises:
        InputError: as `open_model`; thinking is asked of a model that was never trained to, or with another marker.
    """
    if arguments.adapter is not None:
        model, tokenizer = open_model(arguments.adapter, arguments.model)
    else:
        model, tokenizer = open_model(str(arguments.model))
    thinking = ThinkingConfig.from_dict(causal_lm(model).config.thinking)  # which every opened model has
    marker = arguments.answer_start or thinking.answer_start
    generation = model.generation_config
    trained = generation.thoughts or 0
    arguments.thoughts = arguments.thoughts or [trained]
    if 0 < trained < arguments.forced:
        print(f"--thoughts {arguments.forced} are more than the {trained} that this model was trained with.")
    if arguments.forced and (arguments.filler or generation.filler_token_id is None):
        named = replace(thinking, filler=arguments.filler or thinking.filler)
        generation.filler_token_id = filler_id(tokenizer, named)
    check_room(arguments.forced, arguments.max_new_tokens, "the model's forced thoughts", "--max_new_tokens")
    require(
        not arguments.thinking or not is_untrained(model),
        "this model was never trained to think, so it would think at random; add --no-thinking.",
    )
    require(
        not arguments.thinking or marker == thinking.answer_start,
        f"--answer_start {marker!r} cannot be used with a model that was trained to stop thinking at "
        f"{thinking.answer_start!r}; remove it, or add --no-thinking.",
    )
    if arguments.forced:
        check_filler(model, generation)
    return model, tokenizer, marker


def warn_of_training_data(arguments: EvalArguments, task: Task) -> None:
    """Warn if the problems are those that the model was trained on, as far as its run's record or --split says."""
    folder = str(arguments.model) if arguments.adapter is None else str(adapter_folder(arguments.adapter))
    record = next((one for one in run_records(folder) if "task" in one), {})
    trained: set[str] = set()
    if record.get("dataset") is not None or record.get("task") == arguments.task:
        trained = {place_of(source, "train") for source in sources_of(task, record.get("dataset"), "train")}
    places = {place_of(source, arguments.split) for source in sources_of(task, arguments.dataset, arguments.split)}
    if seen := sorted(trained & places):
        why = f"{folder} was trained on {', '.join(seen)}"
    elif arguments.split == "train":
        why = "--split train takes problems that models are trained on"
    else:
        return
    logger.warning(f"{why}: the accuracy is not that on unseen problems.")


def use_engine(arguments: EvalArguments, model: PreTrainedModel, longest: int) -> None:
    """Put the engine that answers into `arguments`; `longest`: tokens of a prompt and its completion.

    Raises:
        InputError: as `choose_engine`.
    """
    residual = ThinkingConfig.from_dict(causal_lm(model).config.thinking).residual if arguments.thinking else None
    asked, needs = arguments.engine, Needs(residual, arguments.forced, arguments.control, longest)
    arguments.engine, why = choose_engine(asked, model, needs)
    if asked == "auto":
        print(f"engine: {arguments.engine} ({why})")


def settings_of(arguments: EvalArguments, prompts: list[Any], problems: list[Problem]) -> dict[str, Any]:
    """What makes two evaluations the same one: flags, prompts, gold answers, and the files of adapter and base."""
    settings = {key: value for key, value in asdict(arguments).items() if key != "out"}
    settings["thoughts"] = arguments.forced
    content = json.dumps([prompts, [problem["answer"] for problem in problems]])
    settings["problems"] = hashlib.sha256(content.encode()).hexdigest()
    adapter = adapter_folder(arguments.adapter) if arguments.adapter is not None else None
    base = base_of(adapter, arguments.model) if adapter is not None else arguments.model
    for name, folder in (("adapter_files", adapter), ("model_files", base)):
        if folder is not None and Path(folder).is_dir():
            # Not all: the results may go into this folder, and a picture or a card changes no answer.
            settings[name] = [one for one in listed(Path(folder)) if str(one[0]).endswith(ANSWERING)]
    return settings


def main(argv: Written) -> dict[str, Any]:
    """Evaluate from a command line and write the results; returns them.

    Raises:
        InputError: before the first completion, if the evaluation cannot work.
    """
    arguments = parse(argv)
    seed = arguments.seed + (UNSEEN if arguments.split == "test" else 0)
    task = find_task(arguments.task, arguments.dataset, arguments.limit or 1000, seed)
    problems = load_problems(task, arguments.dataset, arguments.split, arguments.corpus)[: arguments.limit]
    warn_of_training_data(arguments, task)
    model, tokenizer, marker = opened(arguments)
    examples = examples_of(task, marker, arguments.shots, arguments.examples)
    chat = uses_chat(arguments.prompt, tokenizer)
    prompts = [prompt_of(task, problem["question"], marker, examples, chat) for problem in problems]
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts for _ in range(arguments.samples)]
    questions = Questions(task, problems, marker, ids, arguments.samples)
    golds = [[questions.golds[i] for i in batch] for batch in batches_of(ids, arguments.batch_size)]
    variations = arguments.variations()
    for one in variations:
        use_engine(one, model, max(map(len, ids), default=0) + arguments.max_new_tokens)
        check_control(one.control, golds)
    out, several = Path(arguments.out), len(variations) > 1
    parts = [out.with_name(f"{out.name}.{one.control}-{one.forced}") if several else out for one in variations]
    settings = [settings_of(one, prompts, problems) for one in variations]
    done = [Progressed(part, own) for part, own in zip(parts, settings, strict=True)]
    results: list[dict[str, Any]] = []
    for one, own, batches in zip(variations, settings, done, strict=True):
        title = f"{one.control}, {one.forced} thoughts" if several else "Answering"
        answer_all(model, tokenizer, questions, one.decoding, batches, title)
        results.append({"settings": own, "answer_start": marker} | graded(questions, prompts, batches))
    written: dict[str, Any] = {"variations": compared(results)} if several else results[0]
    create(out, json.dumps(written, indent=1, ensure_ascii=False) + "\n")
    for batches in done:
        batches.remove()
    title = f"{arguments.adapter or arguments.model}, {task.name}"
    if several:
        show_all(written["variations"], title, out)
    else:
        show(written["scores"], title, out)
    return written


def graded(questions: Questions, prompts: list[Any], done: Progressed) -> dict[str, Any]:
    """The scores of an evaluation, and its samples by problem."""
    samples = sorted((sample for batch in done.batches for sample in batch), key=lambda sample: sample["item"])
    n, task, problems = questions.samples, questions.task, questions.problems
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
    return {"scores": scores, "problems": rows}


def compared(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations, each tested against the live one of as many thoughts, problem by problem.

    A live one, or one of a single control, is tested against that of the fewest thoughts. Of several samples of a
    problem nothing is tested.
    """
    if any(len(row["samples"]) > 1 for one in results for row in one["problems"]):
        return results
    verdicts = [[row["samples"][0]["right"] for row in one["problems"]] for one in results]
    kinds = [(one["settings"]["control"], one["settings"]["thoughts"]) for one in results]
    for i, (control, count) in enumerate(kinds):
        fewest = min(thoughts for name, thoughts in kinds if name == control)
        base = ("live", count) if control != "live" and ("live", count) in kinds else (control, fewest)
        if base != kinds[i]:
            against = {"control": base[0], "thoughts": base[1]}
            results[i]["paired"] = {"against": against} | paired(verdicts[i], verdicts[kinds.index(base)])
    return results


def show_all(variations: list[dict[str, Any]], title: str, out: Path) -> None:
    """Print the scores of several evaluations of the same problems as a table."""
    table = Table(title=title)
    for column in (
        "forced thoughts",
        "control",
        "accuracy",
        "95%",
        "difference",
        "p",
        "partner's answer",
        "tokens",
    ):
        table.add_column(column)
    for one in variations:
        scores, settings = one["scores"], one["settings"]
        low, high = scores["wilson"]
        pair, partner = one.get("paired"), scores.get("partner")
        table.add_row(
            str(settings["thoughts"]),
            settings["control"],
            f"{scores['mean']:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{pair['difference']:+.3f}" if pair else "",
            f"{pair['p']:.2g}" if pair else "",
            f"{partner:.3f}" if partner is not None else "",
            f"{scores['mean_tokens']:.0f}",
        )
    console = stdout_console()
    console.print(table)
    count = len(variations[0]["problems"])
    console.print(
        f"{count} problems; p: McNemar's exact test against live thoughts, live: against the fewest; {out}",
        markup=False,
    )


def show(scores: dict[str, Any], title: str, out: Path) -> None:
    """Print the scores."""
    low, high = scores["wilson"]
    console = stdout_console()
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
