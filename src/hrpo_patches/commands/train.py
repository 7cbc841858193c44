"""`hrpo train`: a run from its command line to its report."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftConfig
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl.models import unwrap_model_for_generation

from hrpo_patches.commands.console import stdout_console
from hrpo_patches.commands.flags import Written
from hrpo_patches.commands.refusals import in_a_sentence
from hrpo_patches.commands.resume import state_of, write_record
from hrpo_patches.commands.train_flags import Run, own_names, parse
from hrpo_patches.device import placed
from hrpo_patches.engines.batches import Decoding, complete, completions
from hrpo_patches.engines.choice import Needs, choose_engine
from hrpo_patches.evaluation.statistics import standard_error
from hrpo_patches.files import alone
from hrpo_patches.models.adapter import load_adapter
from hrpo_patches.models.backends import backend_named
from hrpo_patches.models.base import load_model, tokenizer_of
from hrpo_patches.models.record import check_same_thinking
from hrpo_patches.models.smollm2 import found
from hrpo_patches.monitor.progress import ProgressLines
from hrpo_patches.monitor.report import draw, read_run, write_json
from hrpo_patches.tasks.base import Task
from hrpo_patches.tasks.problems import find_task, load_problems, split_held_out
from hrpo_patches.tasks.prompts import (
    QUESTION,
    Prompt,
    examples_of,
    fix_template,
    prompt_ids,
    prompt_of,
    uses_chat,
    with_prompts,
)
from hrpo_patches.tasks.rewards import answer_reward, format_reward, grade
from hrpo_patches.thinking.batching import cache_size
from hrpo_patches.thinking.shards import partitioned, whole
from hrpo_patches.training.config import HRPOConfig
from hrpo_patches.training.start import Place, fit_projection
from hrpo_patches.training.termination import STATUS, NoStepsLeft, SaveOnTermination
from hrpo_patches.training.trainer import HRPOTrainer
from hrpo_thinking.errors import require
from hrpo_thinking.marker import marker_table
from hrpo_thinking.parts import NONE, parts_of, spelled

if TYPE_CHECKING:
    from hrpo_patches.commands.sft import SFTRun
    from hrpo_patches.training.sft import HRPOSFTTrainer
    from hrpo_patches.training.shared import ThinkingTrainer

FITTED, WRITTEN = 64, 64  # prompts that a projection is fitted on, and tokens of each completion
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_trainer(run: Run) -> tuple[HRPOTrainer, Task, list[dict[str, Any]]]:
    """The trainer of a run, its task, and its held-out problems (which may be none).

    Raises:
        InputError: something of the run's data, model, adapter or options cannot work.
    """
    about, config = run.about, run.config
    task = find_task(about.task, about.dataset, seed=config.seed)
    problems = load_problems(task, about.dataset, "train", about.corpus)
    train, held_out = split_held_out(problems, about.eval_problems, config.seed)
    set_seed(config.seed)
    longest = about.max_prompt_length + (config.max_completion_length or 0)
    init: dict[str, Any] = dict(config.model_init_kwargs or {})  # type: ignore[arg-type]  # TRL has read it
    config.model_init_kwargs = None  # or TRL would say that it cannot use them
    dtype = getattr(torch, init.pop("dtype")) if "dtype" in init else None
    model, tokenizer = load_model(about.model_name, run.thinking(), dtype, run.backend, longest, **init)
    marker_table(tokenizer, config.answer_start)
    if about.adapter is not None:
        tokenizer.chat_template = tokenizer_of(Path(about.adapter), found(about.model_name)).chat_template
    template_options: Any = config.chat_template_kwargs or {}
    fix_template(tokenizer, template_options, uses_chat(about.prompt, tokenizer))
    ask = asker(run, task, tokenizer)
    rows, held_out_rows = (with_prompts(part, ask, tokenizer, about.max_prompt_length) for part in (train, held_out))
    run.question = rows[0]["question"]
    _check_enough(len(rows), config)
    _use_engine(engine_of(run, model, longest), config, model, longest)
    if about.projection_start == "lstsq":
        start_projection(model, tokenizer, [row["prompt"] for row in rows[:FITTED]], run)
    model, peft_config = _with_adapter(model, run)
    if about.format_reward:
        config.reward_weights = [1.0, about.format_reward]
    form = [format_reward(config.answer_start)] if about.format_reward else []
    trainer = HRPOTrainer(
        model,
        [answer_reward(task, config.answer_start), *form],
        config,
        Dataset.from_list(rows),
        Dataset.from_list(held_out_rows) if held_out_rows else None,
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    return trainer, task, held_out_rows


def start_projection(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Any], run: Run) -> None:
    """Fit the projection to what the base writes: from the state before a token to its embedding."""
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    length = min(WRITTEN, run.config.max_completion_length or WRITTEN)
    decoding = Decoding(length, thinking=False, batch_size=run.about.eval_batch_size)
    model = placed(model, run.config.device)
    texts, total = [], -(-len(ids) // decoding.batch_size)
    for batch, rows in track(complete(model, tokenizer, ids, decoding), "Fitting the projection", total):
        for i, row in zip(batch, rows, strict=True):
            places = [Place(len(ids[i]) + at - 1, [token], [1.0]) for at, token in enumerate(row)]
            texts.append((ids[i] + row, places))
    left = fit_projection(model, texts, bool(run.config.bf16))
    print(f"projection: fitted to {sum(len(places) for _, places in texts)} tokens; {left:.2f} is left over")


def _use_engine(engine: str, config: HRPOConfig, model: PreTrainedModel, longest: int) -> None:
    """Let training make its rollouts with one of `ENGINES`, of a size for prompts and completions of `longest`."""
    if engine == "continuous":
        config.use_transformers_continuous_batching = True
        given: Any = config.transformers_continuous_batching_config or {}
        size = cache_size(model, longest, config.generation_batch_size or 1, config.device)
        config.transformers_continuous_batching_config = size | given
    if engine == "vllm":
        config.use_vllm = True
        if config.residual is not None:
            config.check_vllm()
            config.check_distribution()
        config.vllm_max_model_length = config.vllm_max_model_length or longest


def engine_of(run: Run, model: PreTrainedModel, longest: int) -> str:
    """The engine of a run's completions, `longest` with their prompts; what `auto` takes is said, with the reason."""
    thinking = run.thinking()
    forced = thinking.thoughts if thinking is not None else run.config.thoughts or 0
    asked = run.about.engine if run.config.engine == "generate" else run.config.engine
    longest = run.config.vllm_max_model_length or longest
    needs = Needs(run.config.residual, forced, longest=longest, device=run.config.device)
    engine, why = choose_engine(asked, model, needs)
    if run.about.engine == "auto":
        print(f"engine: {engine} ({why})")
    return engine


def asker(run: Any, task: Task, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], Prompt]:
    """What makes the prompt of a question, in a run of `hrpo train` or `hrpo sft`."""
    marker = run.config.answer_start
    examples = examples_of(task, marker, run.about.shots, run.about.examples)
    chat = uses_chat(run.about.prompt, tokenizer)
    return lambda question: prompt_of(task, question, marker, examples, chat)


def _check_enough(rows: int, config: Any) -> None:
    needed = config.generation_batch_size // config.num_generations
    require(
        rows >= needed,
        f"{rows} training problems are too few: one step needs {needed} (per_device_train_batch_size x "
        f"gradient_accumulation_steps / group_size); lower these, or give more data.",
    )


def _with_adapter(model: PreTrainedModel, run: Run) -> tuple[Any, PeftConfig | None]:
    """The model with its adapter, or with the config that the trainer makes one from."""
    about, config = run.about, run.config
    backend = backend_named(run.backend)
    config.gradient_checkpointing = config.gradient_checkpointing and not backend.own_checkpointing
    if about.adapter is None:
        lora = {"r": about.lora_rank, "lora_alpha": 2 * about.lora_rank, "target_modules": LORA_TARGETS}
        return backend.add_adapter(model, lora, parts_of(config.residual), config.seed)
    check_same_thinking(Path(about.adapter), None, run.thinking())
    return load_adapter(model, about.adapter, config.residual, about.init_projection, is_trainable=True), None


def evaluate(trainer: HRPOTrainer, task: Task, held_out: list[Any], batch_size: int, title: str) -> dict[str, Any]:
    """Greedy accuracy of the trainer's model, thinking as it is trained to: right, total, mean, standard_error.

    Of several processes, each answers its share, where it can do so alone.
    """
    args = trainer.args
    thinking = args.residual is not None
    decoding = Decoding(args.max_completion_length, thinking, batch_size=batch_size, thoughts=args.thoughts)
    decoding.engine = args.engine if thinking or args.use_vllm else "generate"
    engine = trainer.vllm_generation if decoding.engine == "vllm" else None
    if engine is not None:
        engine.refresh_weights()
    accelerator = trainer.accelerator
    model, shown = accelerator.unwrap_model(trainer.model), accelerator.is_main_process
    alike = partitioned(model)  # ZeRO-3's processes must generate in step, so each answers all
    own = held_out if alike else held_out[accelerator.process_index :: accelerator.num_processes]
    gathered = unwrap_model_for_generation(trainer.model_wrapped, accelerator) if alike else nullcontext(model)
    with gathered as model, whole(model):
        prompts = [row["prompt"] for row in own]
        texts = completions(model, trainer._tokenizer, prompts, decoding, title if shown else None, engine)
    graded = [grade(task, row, text, args.answer_start) for row, text in zip(own, texts, strict=True)]
    verdicts = graded if alike else gather_object(graded)
    counts = {"right": int(sum(verdicts)), "total": len(verdicts)}
    return counts | {"mean": sum(verdicts) / len(verdicts), "standard_error": standard_error(verdicts)}


def main(
    words: Written, task: str = "gsm8k", backend: str = "transformers", prog: str = "hrpo train"
) -> dict[str, Any]:
    """Train from a command line, save the adapter and `report.json`; returns the report.

    Args:
        words: the flags, but --backend and --config (`flags.split_backend`).
        task: where --task names none.
        backend: that was started.
        prog: what the command is called in its help.

    Raises:
        InputError: before any training, if the run cannot work.
        SystemExit: with `termination.STATUS`, after SIGTERM; a checkpoint of the last step is saved.
    """
    run = parse(words, task, backend, prog)
    first = run.config.process_index == 0
    with alone(Path(str(run.config.output_dir))) if first else nullcontext():
        return trained(run)


def train_and_save(trainer: ThinkingTrainer, resumed: str | None, words: Written) -> None:
    """Train to the end and save the model; `resumed` is a checkpoint, and `words` the command line.

    Raises:
        InputError: before the first step, what another library refuses.
        SystemExit: with `termination.STATUS`, after SIGTERM; a checkpoint of the last step is saved.
    """
    with SaveOnTermination(trainer.accelerator) as termination:
        trainer.add_callback(termination)
        ProgressLines.replace_bar(trainer)
        began = state_of(Path(resumed))["global_step"] if resumed else 0
        with suppress(NoStepsLeft), in_a_sentence(words, own_names(), lambda: trainer.state.global_step <= began):
            trainer.train(resume_from_checkpoint=resumed)
    if termination.received:
        if trainer.accelerator.is_main_process:
            step = trainer.state.global_step
            print(f"SIGTERM received: saved after step {step}; resume by --resume_from_checkpoint latest.")
        raise SystemExit(STATUS)
    trainer.save_model(_internal_call=True)  # `finish` pushes it, with its report


def trained(run: Run) -> dict[str, Any]:
    """Do what `main` does, with a run that was parsed."""
    asked = run.record()
    with in_a_sentence(run.words, own_names()):
        trainer, chosen, held_out = make_trainer(run)
    template = asker(run, chosen, trainer._tokenizer)(QUESTION)
    write_record(run.config, asked, template)
    started = time.monotonic()
    source = (run.about.dataset or "").partition("?")[0]
    parts = (run.about.model_name, spelled(run.config.residual), chosen.name, source)
    record: dict[str, Any] = {
        "title": ", ".join(dict.fromkeys(filter(None, parts))),
        "arguments": asked | run.record(),
    }
    record["prompt"] = template
    if held_out:
        record["before"] = evaluate(trainer, chosen, held_out, run.about.eval_batch_size, "Answering before")
    train_and_save(trainer, run.config.resume_from_checkpoint, run.words)
    if held_out:
        record["after"] = evaluate(trainer, chosen, held_out, run.about.eval_batch_size, "Answering after")
    record |= {"seconds": round(time.monotonic() - started, 1), "log": trainer.state.log_history}
    if trainer.accelerator.is_main_process:
        finish(trainer, record, run)
    return record


def finish(trainer: HRPOTrainer | HRPOSFTTrainer, record: dict[str, Any], run: Run | SFTRun) -> None:
    """Write a run's `report.json`, model card and, if asked for, picture, and print its accuracies and warnings.

    Args:
        trainer: has trained.
        record: of the report.
        run: says where, and what comes next.

    Raises:
        SaveError: the run is to be pushed, and the hub cannot be reached or refuses.
    """
    folder = Path(str(run.config.output_dir))
    written = [write_json(record, folder)]
    trainer.write_card(folder)
    finished = read_run(folder)
    if run.about.report:
        written.append(draw([finished], folder / "report.png"))
    table = Table(title=record["title"])
    for column in ("", "greedy accuracy", "standard error", "problems"):
        table.add_column(column)
    for name in ("before", "after"):
        if name in record:
            row = record[name]
            table.add_row(
                name, f"{row['mean']:.3f}", f"{row['standard_error']:.3f}", f"{row['right']} of {row['total']}"
            )
    console = stdout_console()
    if table.row_count:
        console.print(table)
    for text in finished.warnings:
        console.print(f"[bold]warning:[/bold] {escape(text)}")
    console.print(f"saved in {folder}; {' and '.join(str(path) for path in written)} in {record['seconds']:.0f} s")
    if trainer.args.push_to_hub:
        print(f"pushed: {trainer.push_saved(str(folder))}")
    print("next:", *next_commands(record["arguments"], folder, run.question), sep="\n  ")


def next_commands(arguments: dict[str, Any], folder: Path, question: str) -> list[str]:
    """What a person may want to do with what a run has saved: command lines, with its paths and a question."""
    thinks, full = arguments["residual"] not in (None, NONE), not arguments["lora_rank"]
    evaluation = ["eval", "--model" if full else "--adapter", folder, "--task", arguments["task"]]
    for name in ("dataset", "corpus", "prompt", "shots"):
        if arguments.get(name):
            evaluation += [f"--{name}", arguments[name]]
    if arguments.get("examples"):
        evaluation += ["--examples", *arguments["examples"]]
    if arguments.get("max_completion_length"):
        evaluation += ["--max_new_tokens", arguments["max_completion_length"]]
    evaluation += ["--limit", 200]
    evaluation += ["--control", "all"] if thinks else ["--no-thinking"]
    commands = [[*evaluation, "--out", folder / "eval.json"]]
    if thinks:
        commands.append(["think", folder, "--prompt", question])
    if thinks and not full:
        commands.append(["merge", folder, folder.with_name(f"{folder.name}-merged")])
    return [shlex.join(["hrpo", *map(str, words)]) for words in commands]
