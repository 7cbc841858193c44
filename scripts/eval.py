"""Let a model answer the problems of a task, and grade them; see --help."""

import sys

from hrpo_patches.commands.main import evaluate as main
from hrpo_patches.commands.main import exit_status

if __name__ == "__main__":
    sys.exit(exit_status(main))
