"""Runs a program with unsloth's devices stubbed: python on_harness.py PROGRAM ARGUMENT ..."""

import runpy
import sys

import hrpo_patches  # noqa: F401 - before unsloth

import harness  # isort: skip

assert harness.unsloth
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
