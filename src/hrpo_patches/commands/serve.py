"""`hrpo serve`: starts vLLM's server on a model that thinks, and becomes it; what is served is merged first."""

from __future__ import annotations

import os
import sys

from rich.console import Console

from hrpo_patches.commands.flags import Written, plain_parser
from hrpo_patches.models.merge import merged_for
from hrpo_vllm.names import CANNOT, cannot, check_version

_NAME = "--served-model-name"
_MORE = (
    "All other flags are vLLM's (vllm serve --help), such as --port 8000 --dtype float32. Requests think unless they "
    'say {"vllm_xargs": {"thinking": false}}.'
)


def check_flags(words: list[str]) -> None:
    """Raise `InputError` for flags of vLLM's that ask for what cannot think."""
    for at, word in enumerate(words):
        flag, said, value = word.partition("=")
        name = flag.partition(".")[0]  # --speculative-config.method names a part of a value
        name = name.replace("_", "-") if name.startswith("--") else name
        value = value if said else "".join(words[at + 1 : at + 2])
        if value not in ("1", "auto"):  # a pipeline of one, and vLLM's own worker
            for what, flags in CANNOT.items():
                if name in flags:
                    raise cannot(what)


def main(argv: Written) -> None:
    """Serve a model by vLLM, through its OpenAI interface; does not return.

    Raises:
        InputError: before the server starts, if the model cannot think in the vLLM that is installed.
    """
    parser = plain_parser("hrpo serve", "Serve a model that thinks, by vLLM and its OpenAI interface.")
    parser.epilog = _MORE
    parser.add_argument("model", help="folder or hub id, of an adapter (merged in the cache) or of a full model")
    parser.add_argument("--base", help="the base model, if not the one that the adapter names")
    given, words = parser.parse_known_args(argv)
    check_version()
    check_flags(words)
    with Console(stderr=True).status("merging"):
        model = merged_for(given.model, given.base)
    print(f"serving {model}", flush=True)
    if not any(word.partition("=")[0] == _NAME for word in words):
        words = [_NAME, given.model, *words]
    # Not `vllm serve`: the command line of the package for CPUs looks for metadata under a name that it has not.
    server = "vllm.entrypoints.openai.api_server"
    os.execv(sys.executable, [sys.executable, "-m", server, "--model", model, *words])
