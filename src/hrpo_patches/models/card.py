"""The model card of what a run saves: how to load it, how it thinks, how it was trained and how well it answers."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hrpo_patches.models.record import THINKING_FILE
from hrpo_patches.models.smollm2 import SMOLLM2, cache_folder
from hrpo_thinking.config import OPTIONS

CARD = "README.md"
PACKAGES = ("hrpo_patches", "transformers", "trl", "peft", "torch")
SMOLLM2_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PAPER = "https://arxiv.org/abs/2505.18454"
_USE = """import hrpo_patches  # before transformers
from transformers import {imports}

{model}
tokenizer = AutoTokenizer.from_pretrained("{here}", padding_side="left")
prompt = tokenizer(["What is 3 + 4?"], return_tensors="pt")
out = model.generate(**prompt, tokenizer=tokenizer, max_new_tokens=256)"""


def public_name(base: str | None) -> str | None:
    """The hub id of a base model, or None for a folder: a card names nothing of a machine."""
    if not base:
        return None
    if Path(base).resolve() == (cache_folder() / SMOLLM2).resolve():
        return SMOLLM2_ID
    is_path = Path(base).exists() or base.startswith((".", "/", "~")) or base.count("/") != 1
    return None if is_path else base


def write_card(folder: str | Path, base: str | None, trained_by: str, tags: list[str]) -> None:
    """Write `README.md` into a folder that a trainer saved a model or an adapter to.

    Args:
        folder: with `thinking_config.json`, and `report.json` if the run has ended.
        base: the base model, a hub id or a folder.
        trained_by: the method, for the text.
        tags: for the hub.
    """
    folder, base = Path(folder), public_name(base)
    adapter = (folder / "adapter_config.json").is_file()
    record: dict[str, Any] = json.loads((folder / THINKING_FILE).read_text())
    data = ModelCardData(
        base_model=base, library_name="peft" if adapter else "transformers", tags=["latent-reasoning", *tags]
    )
    here = "THIS_REPOSITORY_OR_FOLDER"
    loaded = (
        f'model = hrpo_patches.load_adapter("{base or "THE_BASE_MODEL"}", "{here}")'
        if adapter
        else f'model = AutoModelForCausalLM.from_pretrained("{here}")'
    )
    imports = "AutoTokenizer" if adapter else "AutoModelForCausalLM, AutoTokenizer"
    use = _USE.format(imports=imports, model=loaded, here=here)
    rows = [
        f"| `{name}` | `{record[name]}` | {OPTIONS[name].help} |" for name in OPTIONS if record.get(name) is not None
    ]
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# A model that thinks: {base or 'hybrid latent reasoning'}",
        f"While it thinks, the input of each step blends the sampled token's embedding with a vector that a learned "
        f"layer makes from the model's own last hidden state (HRPO, [arXiv 2505.18454]({PAPER})). Trained by "
        f"{trained_by} with hrpo_patches.",
        f"## Use\n\n```python\n{use}\n```\n\nWithout hrpo_patches it does not think: PEFT alone loads an adapter "
        f"without its thoughts.",
        "## How it thinks\n\n| option | value | what |\n|---|---|---|\n" + "\n".join(rows),
        *_results(folder / "report.json"),
        "## Versions\n\n" + ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        f"## Citation\n\nYue et al., *Hybrid Latent Reasoning via Reinforcement Learning*, 2025, {PAPER}.",
    ]
    ModelCard("\n\n".join(parts) + "\n", ignore_metadata_errors=True).save(folder / CARD)


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
