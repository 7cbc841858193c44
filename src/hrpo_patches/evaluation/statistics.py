"""Numbers that sum up graded answers: accuracy, its error, pass@k, majority@k."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any


def standard_error(values: list[float]) -> float:
    """Of the mean of independent values, each between 0 and 1: sqrt(p (1 - p) / n) where all are 0 or 1."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values)) / len(values)


def wilson(right: float, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval for a share, 95% by default; within 0 and 1 also where none or all are right."""
    p, spread = right / total, z * z / total
    middle = p + spread / 2
    half = z * math.sqrt(p * (1 - p) / total + spread / (4 * total))
    return (max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread)))


def paired(one: list[bool], other: list[bool]) -> dict[str, float]:
    """Two sets of verdicts on the same problems: the difference of their accuracies, and McNemar's exact p.

    Returns:
        difference, gained (right in `one` alone), lost (right in `other` alone), and p, two-sided: the chance of a
        split at least as uneven if each of these problems had gone either way with even odds.
    """
    gained = sum(a and not b for a, b in zip(one, other, strict=True))
    lost = sum(b and not a for a, b in zip(one, other, strict=True))
    differing = gained + lost
    tail = sum(math.comb(differing, k) for k in range(min(gained, lost) + 1)) / 2**differing
    difference = (gained - lost) / len(one)
    return {"difference": difference, "gained": gained, "lost": lost, "p": min(1.0, 2 * tail)}


def pass_at(k: int, right: int, samples: int) -> float:
    """The chance that one of `k` samples is right at least, where `right` of `samples` are (arXiv 2107.03374)."""
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def majority(answers: list[str | None], same: Callable[[str, str], bool]) -> str | None:
    """The answer that most samples give, the first of several; None if no sample gives one."""
    groups: list[list[str]] = []
    for answer in answers:
        if answer:
            group = next((group for group in groups if same(group[0], answer)), None)
            groups.append([answer]) if group is None else group.append(answer)
    return max(groups, key=len)[0] if groups else None


def summarise(
    problems: list[dict[str, Any]], is_right: Callable[[int, str], bool], same: Callable[[str, str], bool]
) -> dict[str, Any]:
    """The scores of graded problems.

    Args:
        problems: each with "samples", which are dicts with "right", "answer", "tokens" and "marker".
        is_right: whether an answer to the problem of this number is right.
        same: whether two answers are the same.

    Returns:
        mean, standard_error, wilson (over problems), right and total (over samples), mean_tokens, marker_rate, partner
        (the share of answers that are right for the problem whose thoughts were swapped in), and for several samples
        pass@k for k = 1, 2, 4, ... and majority@N.
    """
    samples = len(problems[0]["samples"])
    counts = [sum(sample["right"] for sample in problem["samples"]) for problem in problems]
    means = [count / samples for count in counts]
    flat = [sample for problem in problems for sample in problem["samples"]]
    scores: dict[str, Any] = {
        "mean": sum(means) / len(means),
        "standard_error": standard_error(means),
        "wilson": wilson(sum(means), len(means)),
        "right": sum(counts),
        "total": len(flat),
        "mean_tokens": sum(sample["tokens"] for sample in flat) / len(flat),
        "marker_rate": sum(sample["marker"] is not None for sample in flat) / len(flat),
    }
    if partners := [sample["partner_right"] for sample in flat if sample.get("partner_right") is not None]:
        scores["partner"] = sum(partners) / len(partners)
    if samples > 1:
        ks = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
        scores |= {f"pass@{k}": sum(pass_at(k, count, samples) for count in counts) / len(counts) for k in ks}
        chosen = [majority([sample["answer"] for sample in problem["samples"]], same) for problem in problems]
        verdicts = [answer is not None and is_right(i, answer) for i, answer in enumerate(chosen)]
        scores[f"majority@{samples}"] = sum(verdicts) / len(verdicts)
    return scores
