"""Train a model on MATH with hybrid latent reasoning; see --help."""

import sys
from functools import partial

from hrpo_patches.commands.main import exit_status, train

main = partial(train, task="math", prog="hrpo_math.py")

if __name__ == "__main__":
    sys.exit(exit_status(main))
