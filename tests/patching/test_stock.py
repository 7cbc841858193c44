"""With the patches loaded and thinking not asked for, everything is stock transformers' bit for bit."""

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import FAMILIES, tiny_model

HERE = Path(__file__).parents[1]


def probe(out, kind):
    subprocess.run([sys.executable, HERE / "stock_probe.py", out, kind], check=True, cwd=HERE)
    return load_file(out)


def test_logits_loss_gradients_and_generations_equal_stock_in_another_process(tmp_path):
    stock, patched = probe(tmp_path / "stock", "stock"), probe(tmp_path / "patched", "patched")
    assert stock.keys() == patched.keys() and len(stock) > 50
    different = [key for key in stock if not torch.equal(stock[key], patched[key])]
    assert not different


def test_the_state_dict_of_thinking_false_has_stock_keys():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tiny import FAMILIES, tiny_model\n"
        "assert 'hrpo_patches' not in sys.modules\n"
        "print('\\n'.join(f'{f} {k}' for f in FAMILIES for k in tiny_model(f, thinking=None).state_dict()))"
    )
    out = subprocess.run([sys.executable, "-c", code, HERE], check=True, capture_output=True, text=True).stdout
    ours = [f"{family} {key}" for family in FAMILIES for key in tiny_model(family, thinking=False).state_dict()]
    assert out.split("\n")[:-1] == ours
