"""`hrpo merge` and `hrpo convert`: adapters made into other things; knows their flags, leaves the work to others."""

from __future__ import annotations

from pathlib import Path

from hrpo_patches.commands.flags import Written, plain_parser
from hrpo_thinking.config import ThinkingConfig
from hrpo_thinking.parts import RESIDUALS


def merge(argv: Written) -> None:
    """Make a full model of an adapter."""
    from hrpo_patches.models.merge import merge as run

    parser = plain_parser("hrpo merge", "Make a full model, which thinks by default, of an adapter and its base.")
    parser.add_argument("adapter", help="the folder or the hub id of a trained adapter")
    parser.add_argument("destination", type=Path, help="the full model's folder; must not exist")
    parser.add_argument("--base", help="the base model, if not the one that the adapter names")
    given = parser.parse_args(argv)
    print(run(given.adapter, given.destination, given.base))


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
