"""`python -m hrpo_patches` is `hrpo`."""

from hrpo_patches.commands.main import run

if __name__ == "__main__":
    run()
