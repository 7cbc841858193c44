"""Lets a model answer the problems of a task, and grades each sample as it comes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hrpo_patches.engines.batches import Decoding, complete
from hrpo_patches.evaluation.progress import Progressed
from hrpo_patches.tasks.base import Problem, Task
from hrpo_patches.tasks.rewards import answer_of, grade
from hrpo_patches.thinking.controls import partners
from hrpo_thinking.marker import marker_table


@dataclass
class Questions:
    """The problems of a task, as they are put to a model.

    Attributes:
        task: reads and grades.
        problems: with their gold answers.
        marker: the answer marker.
        ids: the prompt's token ids of every sample, those of one problem side by side.
        samples: how many completions each problem has.
    """

    task: Task
    problems: list[Problem]
    marker: str
    ids: list[list[int]]
    samples: int = 1

    @property
    def golds(self) -> list[str]:
        """The gold answer of every sample."""
        return [str(problem["answer"]) for problem in self.problems for _ in range(self.samples)]

    def problem(self, item: int) -> Problem:
        """The problem of a sample."""
        return self.problems[item // self.samples]

    def donors(self, batch: list[int]) -> dict[int, int]:
        """For samples that are decoded together, the one whose thoughts each gets by the control "swapped", while all
        think."""
        ranks = {gold: i for i, gold in enumerate(dict.fromkeys(self.golds[i] for i in batch))}
        groups = torch.tensor([ranks[self.golds[i]] for i in batch])
        rows, others = partners(torch.ones(len(batch), dtype=torch.bool), groups)
        return {batch[row]: batch[other] for row, other in zip(rows.tolist(), others.tolist(), strict=True)}


def answer_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Questions,
    decoding: Decoding,
    done: Progressed,
    title: str = "Answering",
) -> None:
    """Answer what `done` does not hold yet, batch by batch, with a bar that shows the accuracy so far.

    Args:
        model, tokenizer: the tokenizer must pad on the left.
        questions: what is asked.
        decoding: how it is answered.
        done: takes each batch's samples as they come.
        title: of the bar.
    """
    task, marker, ids = questions.task, questions.marker, questions.ids
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
        bar = progress.add_task(title, total=len(ids), completed=len(right), accuracy=_share(right))
        for batch, rows in complete(model, tokenizer, ids, decoding, len(done.batches), questions.golds):
            samples = []
            donors = questions.donors(batch) if decoding.control == "swapped" else {}
            for item, row in zip(batch, rows, strict=True):
                text = str(tokenizer.decode(row, skip_special_tokens=True))
                problem = questions.problem(item)
                verdict = bool(grade(task, problem, text, marker))
                position = marker_position(row, table)
                answer = answer_of(text, marker, task.lines(problem))
                named = {"item": item, "completion": text, "answer": answer, "right": verdict}
                if item in donors:
                    named["partner_right"] = bool(grade(task, questions.problem(donors[item]), text, marker))
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
