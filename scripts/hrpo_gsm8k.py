"""Train a model on GSM8K, or data of its shape, with hybrid latent reasoning; see --help."""

import sys
from functools import partial

from hrpo_patches.commands.main import exit_status, train

main = partial(train, task="gsm8k", prog="hrpo_gsm8k.py")

if __name__ == "__main__":
    sys.exit(exit_status(main))
