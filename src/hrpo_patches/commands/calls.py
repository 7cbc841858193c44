"""The commands that are a parser and a call, `think`, `doctor`, `merge` and others; do no work."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from hrpo_patches.commands.console import stdout_console
from hrpo_patches.commands.flags import Written, add_thinking_flags, plain_parser, switch_of
from hrpo_patches.extras import require_package
from hrpo_patches.files import replace
from hrpo_thinking.config import OPTIONS, ThinkingConfig
from hrpo_thinking.errors import InputError
from hrpo_thinking.parts import RESIDUALS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def info(argv: Written) -> None:
    """Print what thinking adds to a model, or the memory that training it takes."""
    from hrpo_patches.models.cost import config_that_thinks, costs, table_of
    from hrpo_patches.training.plan import Shapes, plan
    from hrpo_patches.training.plan import table_of as plan_table

    shaping = [name for name, option in OPTIONS.items() if option.shapes]
    parser = plain_parser("hrpo info", "Show what thinking adds to a model: parameters, and multiply-adds a token.")
    parser.add_argument("model", help="hub id, folder, config.json, or smollm2-135m; no weights are loaded")
    add_thinking_flags(parser, shaping)
    text = "show the memory of a step of hrpo train instead, by the flags below, which are those of hrpo train"
    parser.add_argument("--plan", action="store_true", help=text)
    for one in fields(Shapes):
        kind = {"type": int} if type(one.default) is int else {"type": switch_of} if one.default is True else {}
        parser.add_argument(f"--{one.name}", default=one.default, **kind, **one.metadata)
    given = parser.parse_args(argv)
    thinking = ThinkingConfig(**{name: getattr(given, name) for name in shaping})
    asked = {one.name: getattr(given, one.name) for one in fields(Shapes)}
    if not given.plan:
        if changed := [name for name, value in asked.items() if value != parser.get_default(name)]:
            raise InputError(f"--{changed[0]} is about the memory of training; add --plan.")
        stdout_console().print(table_of(costs(given.model, thinking), given.model))
        return
    if small := [name for name, value in asked.items() if type(value) is int and value < 1]:
        raise InputError(f"--{small[0]} must be at least 1, not {asked[small[0]]}.")
    config = config_that_thinks(given.model, thinking)
    with stdout_console().status("Planning"):
        found = plan(config, Shapes(**asked))
    stdout_console().print(plan_table(found, given.model))


def report(argv: Written) -> None:
    """Draw runs side by side."""
    from hrpo_patches.monitor.report import read_runs, table, write_report

    text = "Draw training runs side by side into a PNG, and put them into a Markdown table."
    parser = plain_parser("hrpo report", text)
    text = "the --output_dir of a run, also unfinished"
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help=text)
    text = "where they go, without the ending; must not exist"
    parser.add_argument("--out", type=Path, default=Path("report"), help=text)
    given = parser.parse_args(argv)
    paths = write_report(given.runs, given.out)
    print(table(read_runs(given.runs)))
    print(*paths, sep="\n")


def think(argv: Written) -> None:
    """Show one completion, token by token."""
    from hrpo_patches.evaluation import think as inside
    from hrpo_patches.models.base import open_model
    from hrpo_patches.models.hub import run_folder
    from hrpo_patches.tasks.prompts import prompt_for
    from hrpo_patches.thinking.backbone import is_untrained

    given = _think_parser().parse_args(argv)
    if given.png is not None:
        inside.check_png(given.png)
    console = stdout_console()
    with console.status("loading"):
        model, tokenizer = open_model(given.model, given.base)
    prompt, trained = given.prompt, False
    if not given.plain:
        prompt, trained = prompt_for(run_folder(given.model), tokenizer, given.prompt)
    with console.status("thinking"):
        numbers = (given.max_new_tokens, given.temperature, given.top, given.seed)
        thoughts = inside.think(model, tokenizer, prompt, *numbers)
    title = shorten(f"{given.model}: {given.prompt}", 100, placeholder=" …")
    console.print(inside.table_of(thoughts, title))
    if trained:
        console.print("Asked as in training, with the instruction of the run; --plain asks the text alone.")
    elif not given.plain and not is_untrained(model):
        console.print("Asked without an instruction: what this model was asked in training is not recorded with it.")
    if is_untrained(model):
        console.print("The thinking weights are fresh, not trained: the residuals mean nothing yet.")
    if given.png is not None:
        print(inside.draw(thoughts, title, given.png))


def _think_parser() -> argparse.ArgumentParser:
    text = "Show one completion: each token's a, its residual's nearest words, and the entropy of its step."
    parser = plain_parser("hrpo think", text)
    parser.add_argument("model", help="an adapter's folder or hub id, a merged model, any base, or smollm2-135m")
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--plain", action="store_true", help="the text alone, with no instruction or chat template")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="where the completion is cut")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the sampling; 0 is greedy")
    parser.add_argument("--seed", type=int, default=42, help="of the sampling")
    parser.add_argument("--top", type=int, default=3, help="words for each residual")
    parser.add_argument("--base", help="the base model, if not the one that the adapter names")
    parser.add_argument("--png", type=Path, help="draw it into this file, too; must not exist")
    return parser


def doctor(argv: Written) -> int:
    """Look whether all of it works together; returns 1 if something does not."""
    from hrpo_patches.evaluation.doctor import Examination

    def memory(config: PreTrainedConfig) -> int:
        import torch

        from hrpo_patches.training.plan import Shapes, plan

        dtype, gpu = str(config.dtype).removeprefix("torch."), torch.cuda.is_available()
        on_cpu: dict[str, Any] = {} if gpu else {"gradient_checkpointing": False, "optim": "adamw_torch"}
        return plan(config, Shapes(dtype=dtype, **on_cpu)).peak

    parser = plain_parser("hrpo doctor", "Look whether machine, model, data and engine can think together.")
    parser.add_argument("model", nargs="?", help="an adapter, a merged model, any base, or smollm2-135m, to be tried")
    parser.add_argument("--base", help="the base model, if not the one that the adapter names")
    parser.add_argument("--task", help="a task, whose problems are tried; by default gsm8k where there is a --dataset")
    parser.add_argument("--dataset", help="hub id, .jsonl file or folder of the task's problems")
    parser.add_argument("--engine", default="auto", help="generate, continuous, vllm or auto")
    parser.add_argument("--json", action="store_true", help="print JSON, for a report of a bug")
    given = parser.parse_args(argv)
    console, findings = stdout_console(), []
    for finding in Examination(given.model, given.base, given.task, given.dataset, given.engine, memory):
        findings.append(finding)
        if not given.json:
            mark = {True: "[green]ok  [/]", False: "[red]BAD [/]", None: "[dim]-   [/]"}[finding.fine]
            console.print(f"{mark} {finding.what}: {escape(finding.says)}", highlight=False)
    bad = [finding.what for finding in findings if finding.fine is False]
    if given.json:
        print(json.dumps({"healthy": not bad, "findings": [vars(finding) for finding in findings]}, indent=1))
    else:
        unknown = [finding.what for finding in findings if finding.fine is None]
        says = f"{len(bad)} of {len(findings)} checks failed: {', '.join(bad)}." if bad else "Healthy"
        console.print(says if bad else f"{says}, but see {', '.join(unknown)}." if unknown else f"{says}.")
    return int(bool(bad))


def lm_eval(argv: Written) -> int:
    """Run lm-evaluation-harness with `hrpo` among its models."""
    require_package("lm_eval", "lm_eval")
    from hrpo_patches.evaluation.harness import main

    return main(argv)


def merge(argv: Written) -> None:
    """Make a full model of an adapter, which keeps what the adapter was asked in training."""
    from hrpo_patches.models.hub import run_folder
    from hrpo_patches.models.merge import merge as run
    from hrpo_patches.tasks.prompts import RUN_FILE, TEMPLATE, recorded_prompt

    parser = plain_parser("hrpo merge", "Make a full model, which thinks by default, of an adapter and its base.")
    parser.add_argument("adapter", help="the folder or the hub id of a trained adapter")
    parser.add_argument("destination", type=Path, help="the full model's folder; must not exist")
    parser.add_argument("--base", help="the base model, if not the one that the adapter names")
    given = parser.parse_args(argv)
    folder = run(given.adapter, given.destination, given.base)
    if template := recorded_prompt(run_folder(given.adapter)):
        replace(folder / RUN_FILE, json.dumps({TEMPLATE: template}) + "\n")
    print(folder)


def convert(argv: Written) -> None:
    """Make a published HRPO adapter one of ours."""
    from hrpo_patches.models.merge import convert as run

    text = "Make a published HRPO adapter (LoRA, gates, Lambda) say how it thinks."
    parser = plain_parser("hrpo convert", text)
    parser.add_argument("source", type=Path, help="the folder of the published adapter")
    parser.add_argument("destination", type=Path, help="the new adapter's folder; must not exist")
    text = "embedding: what it was trained with; projection: with a fresh projection, to be trained further"
    parser.add_argument("--residual", choices=tuple(RESIDUALS), required=True, help=text)
    text = "the marker that it was trained with"
    parser.add_argument("--answer_start", default=ThinkingConfig.answer_start, help=text)
    given = parser.parse_args(argv)
    print(run(given.source, given.destination, given.residual, given.answer_start))
