"""Looks into one completion: what each token was blended with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hrpo_patches.extras import require_package
from hrpo_patches.tasks.prompts import Prompt, prompt_ids
from hrpo_patches.thinking.backbone import causal_lm, thinking_backbone
from hrpo_patches.thinking.decoding import by_temperature, ends_of
from hrpo_thinking.errors import require
from hrpo_thinking.parts import RESIDUALS

_CHUNK = 32  # positions whose residuals are compared with the vocabulary at once
_ROW = 20  # tokens in one row of the picture


@dataclass
class Thought:
    """One token of a completion.

    Attributes:
        token: its text.
        share: a, the share of its embedding in its input, the mean over d; 1 where it does not think.
        thinks: whether its embedding was blended with a residual.
        words: the vocabulary's words nearest to that residual, by cosine, nearest first, each with its cosine; none
            for a residual of zeros, which a control may put there.
        entropy: of the distribution that it was chosen from, in nats.
    """

    token: str
    share: float
    thinks: bool
    words: list[tuple[str, float]]
    entropy: float


def check_numbers(max_new_tokens: int, temperature: float, top: int, seed: int) -> None:
    """Raise `InputError` unless `think` can work with these numbers."""
    require(max_new_tokens >= 1 and top >= 1, "max_new_tokens and top must be 1 or more.")
    require(
        (temperature == 0 or 0.01 <= temperature < math.inf) and 0 <= seed < 2**32,
        "temperature must be 0, for greedy, or 0.01 or more, and seed from 0 to 2**32 - 1.",
    )


@torch.no_grad()
def think(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top: int = 3,
    seed: int = 42,
    partner: Prompt | None = None,
) -> list[Thought]:
    """One thinking completion of `prompt`, token by token; within `controlled`, as it was blended there.

    Args:
        model, tokenizer: as `models.open_model` gives them.
        prompt: a text or a conversation.
        max_new_tokens: where the completion is cut.
        temperature: of the sampling; 0 is greedy.
        top: how many words each residual is described by.
        seed: of the sampling.
        partner: another prompt, decoded as the second row of the batch, for the control "swapped".

    Raises:
        InputError: a number is out of its range, or the model cannot think.
    """
    check_numbers(max_new_tokens, temperature, top, seed)
    rows = [prompt_ids(tokenizer, one) for one in ([prompt] if partner is None else [prompt, partner])]
    require(all(rows), "the prompt and the partner's must each have a token; one of them is empty.")
    inputs = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(model.device)
    set_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    generate: Any = model.generate
    with by_temperature(model):
        out = generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends_of(model, tokenizer) or None,
            thinking=True,
            tokenizer=tokenizer,
            return_dict_in_generate=True,
            output_scores=True,
            **(sampling if temperature else {"do_sample": False}),
        )
    start = inputs["input_ids"].shape[1]
    completions = out.sequences[:, start:]
    length = int(out.attention_mask[0, start:].sum())  # the partner's may be longer
    tokens = completions[0, :length].tolist()
    entropies = torch.stack([_entropy(scores[0]) for scores in out.scores[:length]])
    base, backbone = causal_lm(model), thinking_backbone(model)
    residuals, mask = RESIDUALS[out.thinking_residual].make(backbone, out.thinking_states), out.thinking_mask
    if backbone.thinking_control is not None:
        residuals, mask = backbone.thinking_control(residuals, base.get_input_embeddings()(completions), mask)
    residuals = residuals[0, :length]
    words = _nearest(residuals, base.get_input_embeddings().weight, top)
    felt = (mask[0, :length] & residuals.any(-1)).tolist()
    texts = [str(tokenizer.decode([token])) for token in tokens]
    named = [[(str(tokenizer.decode([i])), cosine) for i, cosine in near] for near in words]
    shares, thinks = torch.where(mask, out.thinking_ratio, 1.0)[0, :length].tolist(), mask[0, :length].tolist()
    shown = [near if on else [] for near, on in zip(named, felt, strict=True)]
    return [Thought(*one) for one in zip(texts, shares, thinks, shown, entropies.tolist(), strict=True)]


def _entropy(scores: Tensor) -> Tensor:
    """Of the distribution that scores (V) give, in nats."""
    log_p = scores.float().log_softmax(-1)
    return -torch.where(log_p > -math.inf, log_p.exp() * log_p, 0.0).sum()


def _nearest(residuals: Tensor, embeddings: Tensor, top: int) -> list[list[tuple[int, float]]]:
    """For each residual (C, d) the ids of the nearest rows of (V, d), with their cosines."""
    directions = normalize(embeddings.float(), dim=-1)
    found = []
    for chunk in residuals.float().split(_CHUNK):
        cosines, ids = (normalize(chunk, dim=-1) @ directions.T).topk(min(top, len(directions)))
        found += [list(zip(*pair, strict=True)) for pair in zip(ids.tolist(), cosines.tolist(), strict=True)]
    return found


def visible(text: str) -> str:
    """A token's text on one line, with its spaces, line breaks and control characters to be seen."""
    text = text.replace("\n", "⏎").replace(" ", "·") or "∅"
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def cells_of(thought: Thought, plain: str = "answer") -> tuple[str, str, str, str]:
    """A token as it is shown: its text, a (or `plain`, if it does not think), words and entropy."""
    words = "  ".join(f"{visible(word)} {cosine:.2f}" for word, cosine in thought.words)
    share = f"{thought.share:.4f}" if thought.thinks else plain
    return visible(thought.token), share, words, f"{thought.entropy:.2f}"


def table_of(thoughts: list[Thought], title: str) -> Table:
    """The completion as a table, a row for each token."""
    table = Table(
        title=Text(title),
        caption="a: share of the token's embedding in its input; words: the vocabulary's "
        "nearest to the residual, with cosines; entropy: of the step, in nats",
    )
    table.add_column("token", no_wrap=True)
    table.add_column("a", justify="right")
    table.add_column("the residual's nearest words")
    table.add_column("entropy", justify="right")
    table.add_column("")
    most = max((thought.entropy for thought in thoughts), default=0.0) or 1.0
    for thought in thoughts:
        token, share, words, entropy = cells_of(thought)
        bar = "▇" * round(10 * thought.entropy / most)
        table.add_row(Text(token), share, Text(words), entropy, bar)
    return table


def check_png(path: Path) -> None:
    """Raise `InputError` unless a picture can be written to `path`."""
    require_package("matplotlib", "--png")
    require(path.suffix.lower() == ".png", f"--png needs a name that ends in .png, not {path}.")
    require(not path.exists(), f"{path} exists already; give another --png.")
    require(path.parent.is_dir(), f"{path.parent} is not a folder.")


def draw(thoughts: list[Thought], title: str, path: Path) -> Path:
    """Draw the completion into a PNG: entropy and a of each token, over the token and its residual's nearest word."""
    from matplotlib.figure import Figure

    rows = [thoughts[start : start + _ROW] for start in range(0, len(thoughts), _ROW)]
    figure = Figure(figsize=(14, 1 + 2.6 * len(rows)), layout="constrained")
    most = max(thought.entropy for thought in thoughts) or 1.0
    blended = [thought.share for thought in thoughts if thought.thinks] or [1.0]
    margin = 0.1 * (max(blended) - min(blended)) + 1e-4
    for axes, row in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        places = range(len(row))
        bars = axes.bar(places, [t.entropy for t in row], color="C0", alpha=0.5, label="entropy of the step (left)")
        axes.set(ylabel="entropy, nats", ylim=(0, 1.1 * most), xlim=(-0.6, _ROW - 0.4))
        shares = axes.twinx()
        known = [t.share if t.thinks else math.nan for t in row]
        (line,) = shares.plot(places, known, "C1.-", label="share a of the embedding (right)")
        shares.set(ylabel="a", ylim=(min(blended) - margin, max(blended) + margin))
        shares.ticklabel_format(useOffset=False)
        labels = [f"{visible(t.token)}\n{visible(t.words[0][0]) if t.words else ''}" for t in row]
        axes.set_xticks(places, labels, fontsize=8, parse_math=False)
    figure.legend([bars, line], [bars.get_label(), line.get_label()], loc="outside lower center", ncols=2)
    note = "below each token: the vocabulary's word nearest to its residual, while it thinks"
    figure.suptitle(f"{title}\n{note}", parse_math=False)
    figure.savefig(path, dpi=110)
    return path
