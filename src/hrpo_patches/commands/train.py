"""A training run from its command line to its report: the one `main` behind the training scripts."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import set_seed

from hrpo_patches.commands.arguments import RunArguments, parse
from hrpo_patches.evaluation.generate import greedy_completions
from hrpo_patches.evaluation.scores import standard_error
from hrpo_patches.models.adapter import load_adapter
from hrpo_patches.models.backends import backend_named, start_backend
from hrpo_patches.models.base import load_model
from hrpo_patches.models.record import check_same_thinking
from hrpo_patches.monitor.report import draw, read_run, write_json
from hrpo_patches.tasks.base import Task
from hrpo_patches.tasks.problems import find_task, load_problems, split_held_out
from hrpo_patches.tasks.prompts import examples_of, prompt_of, uses_chat, with_prompts
from hrpo_patches.tasks.rewards import answer_reward, format_reward, grade
from hrpo_patches.training.trainer import HRPOTrainer
from hrpo_thinking.errors import InputError
from hrpo_thinking.marker import marker_table
from hrpo_thinking.parts import parts_of, spelled

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_trainer(arguments: RunArguments) -> tuple[HRPOTrainer, Task, list[dict[str, Any]]]:
    """The trainer of a run, its task, and its held-out problems (which may be none).

    Raises:
        InputError: something of the run's data, model, adapter or options cannot work.
    """
    arguments.backend = start_backend(arguments.backend)
    task = find_task(arguments.task, arguments.dataset, seed=arguments.seed)
    problems = load_problems(task, arguments.dataset, "train", arguments.corpus)
    train, held_out = split_held_out(problems, arguments.eval_problems, arguments.seed)
    try:
        config = arguments.trainer_config()
    except (ValueError, ImportError) as error:
        raise InputError(" ".join(str(error).split())) from None
    set_seed(arguments.seed)
    longest = arguments.max_prompt_length + arguments.max_completion_length
    model, tokenizer = load_model(
        arguments.model_name, arguments.thinking(), backend=arguments.backend, max_seq_length=longest
    )
    marker_table(tokenizer, arguments.answer_start)
    examples = examples_of(task, arguments.answer_start, arguments.shots, arguments.examples)
    chat = uses_chat(arguments.prompt, tokenizer)
    rows, held_out_rows = (
        with_prompts(
            part,
            lambda question: prompt_of(task, question, arguments.answer_start, examples, chat),
            tokenizer,
            arguments.max_prompt_length,
        )
        for part in (train, held_out)
    )
    needed = config.generation_batch_size // config.num_generations
    if len(rows) < needed:
        raise InputError(
            f"{len(rows)} training problems are too few: one step needs {needed} (per_device_train_batch_size x "
            f"gradient_accumulation_steps / group_size); lower these, or give more data."
        )
    lora = {"r": arguments.lora_rank, "lora_alpha": 2 * arguments.lora_rank, "target_modules": LORA_TARGETS}
    peft_config: PeftConfig | None = None
    if arguments.adapter is not None:
        if arguments.residual is None:
            raise InputError("--adapter continues a thinking adapter; it does not go with --residual none.")
        check_same_thinking(Path(arguments.adapter), None, arguments.thinking())
        model = load_adapter(
            model,
            arguments.adapter,
            residual=arguments.residual,
            init_projection=arguments.init_projection,
            is_trainable=True,
        )
    else:
        backend = backend_named(arguments.backend)
        model, peft_config = backend.add_adapter(model, lora, parts_of(arguments.residual), arguments.seed)
    form = [format_reward(arguments.answer_start)] if arguments.format_reward else []
    trainer = HRPOTrainer(
        model,
        [answer_reward(task, arguments.answer_start), *form],
        config,
        Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    return trainer, task, held_out_rows


def evaluate(
    trainer: HRPOTrainer, task: Task, held_out: list[Any], arguments: RunArguments, title: str
) -> dict[str, Any]:
    """Greedy accuracy of the trainer's model, thinking as it is trained to: right, total, mean, standard_error."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    texts = greedy_completions(
        model,
        trainer._tokenizer,
        [row["prompt"] for row in held_out],
        arguments.max_completion_length,
        thinking=arguments.residual is not None,
        batch_size=arguments.eval_batch_size,
        title=title,
        thoughts=trainer.args.thoughts,
    )
    verdicts = [grade(task, row, text, arguments.answer_start) for row, text in zip(held_out, texts, strict=True)]
    counts = {"right": int(sum(verdicts)), "total": len(verdicts)}
    return counts | {"mean": sum(verdicts) / len(verdicts), "standard_error": standard_error(verdicts)}


def main(argv: list[str] | None = None, task_name: str = "gsm8k") -> dict[str, Any]:
    """Train from a command line (by default this process's), save the adapter and `report.json`; returns the report.

    Args:
        argv: the flags.
        task_name: of the task, where --task names none.

    Raises:
        InputError: before any training, if the run cannot work.
    """
    arguments = parse(argv, task_name)
    trainer, task, held_out = make_trainer(arguments)
    started = time.monotonic()
    source = (arguments.dataset or "").partition("?")[0]
    given = asdict(arguments) | {"residual": spelled(arguments.residual)}
    title = ", ".join(dict.fromkeys(filter(None, (given["model_name"], given["residual"], task.name, source))))
    record: dict[str, Any] = {"title": title, "arguments": given}
    if held_out:
        record["before"] = evaluate(trainer, task, held_out, arguments, "Answering before")
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
    if held_out:
        record["after"] = evaluate(trainer, task, held_out, arguments, "Answering after")
    record |= {"seconds": round(time.monotonic() - started, 1), "log": trainer.state.log_history}
    if trainer.accelerator.is_main_process:
        _finish(record, Path(arguments.output_dir), arguments.report)
    return record


def _finish(record: dict[str, Any], folder: Path, picture: bool) -> None:
    written = [write_json(record, folder)]
    run = read_run(folder)
    if picture:
        written.append(draw([run], folder / "report.png"))
    table = Table(title=record["title"])
    for column in ("", "greedy accuracy", "standard error", "problems"):
        table.add_column(column)
    for name in ("before", "after"):
        if name in record:
            row = record[name]
            table.add_row(
                name, f"{row['mean']:.3f}", f"{row['standard_error']:.3f}", f"{row['right']} of {row['total']}"
            )
    console = Console()
    if table.row_count:
        console.print(table)
    for text in run.warnings:
        console.print(f"[bold]warning:[/bold] {escape(text)}")
    console.print(f"adapter in {folder}; {' and '.join(str(path) for path in written)} in {record['seconds']:.0f} s")
