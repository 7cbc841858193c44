"""Train a model on MMLU and ARC with hybrid latent reasoning; see --help."""

import sys
from functools import partial

from hrpo_patches.commands.main import exit_status, train

main = partial(train, task="mmlu", prog="hrpo_mmlu.py")

if __name__ == "__main__":
    sys.exit(exit_status(main))
