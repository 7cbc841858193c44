"""Train a model on NQ and HotpotQA, with documents, with hybrid latent reasoning; see --help."""

import sys
from functools import partial

from hrpo_patches.commands.main import exit_status, train

main = partial(train, task="rag", prog="hrpo_rag.py")

if __name__ == "__main__":
    sys.exit(exit_status(main))
