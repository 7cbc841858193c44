"""Train a Qwen2 or Llama model on GSM8K, or data of its shape, with hybrid latent reasoning; see --help."""

from hrpo_patches.run import console, main

if __name__ == "__main__":
    console(main)
