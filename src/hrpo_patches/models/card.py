"""The model card of what a run saves: how to load it, how it thinks, how it was trained and how well it answers."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import ModelCard, ModelCardData

from hrpo_patches.models.hub import CONFIG
from hrpo_patches.models.record import THINKING_FILE
from hrpo_patches.models.smollm2 import SMOLLM2, cache_folder
from hrpo_thinking.config import OPTIONS

CARD = "README.md"
PACKAGES = ("hrpo_patches", "transformers", "trl", "peft", "torch")
SMOLLM2_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAPER = "https://arxiv.org/abs/2505.18454"
HERE, BASE = "THIS_REPOSITORY_OR_FOLDER", "THE_BASE_MODEL"  # in a card, until it is pushed
TITLES = ("A model that thinks", "A model that does not think")
# What PEFT, TRL and transformers write into cards that nobody has edited.
GENERATED = (
    "# Model Card for Model ID",
    "It has been trained using [TRL](https://github.com/huggingface/trl).",
    "This model card has been generated automatically according to the information the Trainer had access to.",
)
_USE = """import hrpo_patches  # before transformers
from transformers import {imports}

{model}
tokenizer = AutoTokenizer.from_pretrained("{here}", padding_side="left")
prompt = tokenizer(["What is 3 + 4?"], return_tensors="pt")
out = model.generate(**prompt, tokenizer=tokenizer, max_new_tokens=256)"""


def public_name(base: str | None, folder: Path | None = None) -> str | None:
    """The hub id of a base model, or None for a folder: a card names nothing of a machine.

    Args:
        base: as it is named.
        folder: of a run that names it. Training may have started in any of the folders above it, and a relative path
            is tried from each; by default only from the working directory.
    """
    if not base:
        return None
    if base == SMOLLM2 or Path(base).resolve() == (cache_folder() / SMOLLM2).resolve():
        return SMOLLM2_ID
    if base.startswith((".", "/", "~")) or base.count("/") != 1:
        return None
    above = folder.resolve().parents if folder is not None else ()
    return None if any((place / base).exists() for place in (Path.cwd(), *above)) else base


def author_of(card: str) -> Literal["us", "a library", "the user"]:
    """Who wrote the text of a card; an empty one is a library's, for it says nothing."""
    if any(line.startswith(tuple(f"# {title}" for title in TITLES)) for line in card.splitlines()):
        return "us"
    return "a library" if not card.strip() or any(text in card for text in GENERATED) else "the user"


def read_card(folder: Path) -> str:
    """The text of the card in a folder; empty without a card."""
    return (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else ""


def write_card(folder: str | Path, base: str | None, trained_by: str | None, tags: list[str]) -> None:
    """Write `README.md` into a folder that a trainer saved a model or an adapter to; one of the user's own is kept.

    Args:
        folder: with `thinking_config.json` or a model's `config.json`, and `report.json` if the run has ended.
        base: the base model, a hub id or a folder.
        trained_by: the method, for the text; None where it is not known.
        tags: for the hub.
    """
    folder = Path(folder)
    if author_of(read_card(folder)) != "the user":
        ModelCard(card_of(folder, base, trained_by, tags), ignore_metadata_errors=True).save(folder / CARD)


def card_of(folder: Path, base: str | None, trained_by: str | None, tags: list[str]) -> str:
    """The text of `write_card`; that of a model that does not think says so."""
    base, record = public_name(base), _thinking_of(folder)
    adapter = (folder / CONFIG).is_file()
    latent = ["latent-reasoning"] if record else []
    library = "peft" if adapter else "transformers"
    data = ModelCardData(base_model=base, library_name=library, tags=[*latent, *tags])
    loads = f'hrpo_patches.load_adapter("{base or BASE}", "{HERE}")'
    imports = "AutoTokenizer"
    if not (adapter and record):
        loads, imports = f'AutoModelForCausalLM.from_pretrained("{HERE}")', "AutoModelForCausalLM, AutoTokenizer"
    use = _USE.format(imports=imports, model=f"model = {loads}", here=HERE)
    by = f" Trained by {trained_by} with hrpo_patches." if trained_by else " Trained with hrpo_patches."
    hrpo = f"(HRPO, [arXiv 2505.18454]({PAPER}))"
    title = TITLES[0] if record else TITLES[1]
    what = (
        f"While it thinks, the input of each step blends the sampled token's embedding with a vector that a learned "
        f"layer makes from the model's own last hidden state {hrpo}."
        if record
        else f"A plain model, the control of hybrid latent reasoning {hrpo}: the input of each step is the embedding "
        f"of the sampled token."
    )
    without = "PEFT alone loads an adapter without its thoughts." if adapter else "transformers alone refuses it."
    rows = [
        f"| `{name}` | `{record[name]}` | {OPTIONS[name].help} |" for name in OPTIONS if record.get(name) is not None
    ]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}: {base or 'hybrid latent reasoning'}",
        what + by,
        f"## Use\n\n```python\n{use}\n```",
        *([f"Without hrpo_patches it does not think: {without}"] if record else []),
        *(["## How it thinks\n\n| option | value | what |\n|---|---|---|\n" + "\n".join(rows)] if record else []),
        *_results(folder / "report.json"),
        "## Versions\n\n" + ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        f"## Citation\n\nYue et al., *Hybrid Latent Reasoning via Reinforcement Learning*, 2025, {PAPER}.",
    ]
    return "\n\n".join(parts) + "\n"


def _thinking_of(folder: Path) -> dict[str, Any]:
    """How what is saved in `folder` thinks; empty if it does not."""
    if (folder / THINKING_FILE).is_file():
        return json.loads((folder / THINKING_FILE).read_text())
    config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    return thinking if isinstance(thinking := config.get("thinking"), dict) else {}


def _results(file: Path) -> list[str]:
    """What a run's report says of its task and its accuracy."""
    if not file.is_file():
        return []
    report = json.loads(file.read_text())
    lines = [f"Task: {report['arguments'].get('task')}; greedy answers to held-out problems:", ""]
    for name in ("before", "after"):
        if name in report:
            row = report[name]
            lines.append(
                f"- {name} training {row['mean']:.3f} ± {row['standard_error']:.3f}, of {row['total']} problems"
            )
    return ["## Results\n\n" + "\n".join(lines)] if len(lines) > 2 else []
