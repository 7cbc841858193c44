"""Train a Qwen2 or Llama model on GSM8K (or data of its shape) with hybrid latent reasoning; --help lists the options."""

import hrpo_patches  # noqa: F401 - installs the patches, so it comes before everything else

from hrpo_patches.run import console, main

if __name__ == "__main__":
    console(main)
