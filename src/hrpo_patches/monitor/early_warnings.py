"""Reads a run's log row by row and says what goes wrong, once each, with a remedy."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

PATIENCE = 20  # optimizer steps after which something that never came is missed
IN_A_ROW = 5  # rows that a fault must last
SHARE = 0.01  # of the input; less of the embedding, or of the residual, is as good as none
COLLAPSE = 0.2  # of the longest mean thinking so far; thinking that is as short has collapsed
LONG = 8.0  # tokens; shorter thinking cannot collapse
GAIN = 100.0  # of the gradient through thoughts over the published one
RUNAWAY = 1.0  # KL divergence from the base model, nats a token

Row = dict[str, Any]


class EarlyWarnings:
    """Judges a run by the rows of its log, each with "step" and whatever else was logged; missing keys are skipped.

    Args:
        marker: the answer marker.
        max_completion_length: where completions are cut, in tokens; None if that is not known.
        start: the step that the run starts from. A resumed run is checked again.
    """

    def __init__(self, marker: str, max_completion_length: int | None = None, start: int = 0) -> None:
        self.marker = marker
        self.cut = f" (completions are cut at {max_completion_length} tokens)" if max_completion_length else ""
        self.start = start
        self.said: set[str] = set()
        self.seen: set[str] = set()
        self.lasting: Counter[str] = Counter()
        self.drift: float | None = None
        self.longest = 0.0

    def read(self, row: Row) -> list[str]:
        """The warnings that the next row gives rise to, each a sentence or two."""
        if "loss" not in row:  # an evaluation, or the summary at the end
            return []
        self.seen |= {key for key in ("marker_rate", "reward") if row.get(key)}
        faults = self._now(row)
        self.lasting = Counter({name: self.lasting[name] + 1 for name in faults})
        found = {name for name in faults if self.lasting[name] >= IN_A_ROW}
        if row["step"] - self.start >= PATIENCE:
            found |= self._never(row)
        new = sorted(found - self.said)
        self.said |= found
        return [self._text(name, row) for name in new]

    def _now(self, row: Row) -> set[str]:
        """What is wrong in this row; worth a word when it lasts."""
        a, kl = row.get("a/mean"), row.get("kl")
        trained = "projection/weight_norm" in row
        gradient, base = row.get("projection/grad_norm") or 0.0, row.get("base/grad_norm") or 0.0
        still = trained and row.get("projection/drift") == self.drift
        self.drift = row.get("projection/drift")
        length = row.get("thinking/length")
        self.longest = max(self.longest, length or 0.0)
        written = "stage" in row and "a/mean" not in row  # a supervised batch in which nothing thinks
        faults = {
            "a_high": a is not None and max(0.0, 1 - a * a) ** 0.5 < SHARE,
            "a_low": a is not None and a < SHARE,
            "no_gradient": trained and not gradient and base > 0 and not written,
            "not_moving": still and gradient > 0 and row.get("learning_rate", 0) > 0,
            "kl": kl is not None and kl > RUNAWAY,
            "collapse": self.longest >= LONG and length is not None and length < COLLAPSE * self.longest,
            "gain": (row.get("bptt/gain") or 0.0) > GAIN,
            "overflow": not math.isfinite(row.get("grad_norm") or 0.0),
        }
        return {name for name, holds in faults.items() if holds}

    def _never(self, row: Row) -> set[str]:
        if "reward" in row and "marker_rate" in row and "marker_rate" not in self.seen:
            return {"marker"}  # which explains a reward of zero
        return {"reward"} if "reward" in row and "reward" not in self.seen else set()

    def _text(self, name: str, row: Row) -> str:
        unrewarded = ", so thinking never ends" if "reward" in self.seen else ", so every reward is 0"
        marker, a, kl = self.marker, f"{row.get('a/mean', 1):.5f}", f"{row.get('kl') or 0:.3g}"
        return {
            "marker": f"No completion of the first {PATIENCE} steps carries the answer marker {marker!r}"
            f"{unrewarded}. Show the marker in the prompt (a worked example that ends in '{marker} 42' helps most), "
            f"raise max_completion_length{self.cut}, or start from an instruction-tuned model.",
            "reward": f"The reward has been 0 for {PATIENCE} steps, so nothing is learned. Take easier problems, more "
            f"completions a prompt (group_size), or a model that solves some of them already.",
            "a_high": f"The share a of the embedding is at {a}, so the residual is as good as switched off. Start "
            f"from a smaller residual_r_max, or lower lr_residual_Lambda and lr_residual_gate.",
            "a_low": f"The share a of the embedding is at {a}, so the sampled tokens hardly reach the model. Start "
            f"from a larger residual_r_min, or lower lr_residual_Lambda and lr_residual_gate.",
            "no_gradient": f"thinking_projection has had no gradient in {IN_A_ROW} logged steps, while the rest has. "
            f"Check that completions think (marker_rate, thinking_mask), and that the loss replays hidden states and "
            f"not finished residuals.",
            "not_moving": f"thinking_projection has a gradient but has not moved in {IN_A_ROW} logged steps. Check "
            f"that the optimizer holds it (HRPOTrainer or patch_trainer_optimizer does that), that "
            f"lr_thinking_projection is above 0, and that its weights are float32.",
            "kl": f"The KL divergence from the base model has been above {RUNAWAY} nats a token in {IN_A_ROW} logged "
            f"steps and is at {kl}. Lower the learning rates, or raise beta.",
            "collapse": f"Thinking has shrunk from {self.longest:.0f} to {row.get('thinking/length') or 0:.1f} tokens "
            f"before the marker (thinking/length). Lower the learning rates, raise beta, or force thoughts "
            f"(--thoughts); a reward for length alone would be gamed.",
            "gain": f"The gradient through the thoughts has been more than {GAIN:.0f} times the published one in "
            f"{IN_A_ROW} logged steps and is at {row.get('bptt/gain') or 0:.3g} (bptt/gain): it grows from thought to "
            f"thought. Start from a larger residual_r_min, or truncate it (bptt=4).",
            "overflow": f"The norm of the gradient has not been finite in {IN_A_ROW} logged steps, so that clipping "
            f"made every gradient zero and nothing was learned. Truncate the gradient (bptt=4), start from a larger "
            f"residual_r_min, or lower the learning rates.",
        }[name]
