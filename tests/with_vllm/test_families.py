"""A family added as docs/add-a-model.md says breaks no engine; where it has no class of vLLM's it is refused there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
REFUSED = "thinking Arcee models are not supported in vLLM, only Llama, "

# The family's diffs apply, plain and thinking models of the others run, and thinking is refused before work.
BESIDE = """
import os, sys
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
import hrpo_patches
from pathlib import Path
from engines import SIZES, assert_same, big_enough, engine, generated, plain, thought
from transformers import ArceeConfig, ArceeForCausalLM, AutoConfig
from hrpo_patches.engines.choice import Needs, choose_engine
from hrpo_patches.models.merge import merged_for
from hrpo_thinking.config import NEEDS_US
from hrpo_thinking.errors import InputError
from hrpo_vllm import engine_options
from tiny import byte_tokenizer

tokenizer, folder = byte_tokenizer(), Path(sys.argv[1])
prompt = tokenizer("What is 3 + 4?")["input_ids"]
model = big_enough("llama", thinking=None)
with engine(model, tokenizer, folder / "plain") as llm:
    assert plain(llm, [prompt], new=8) == [generated(model, tokenizer, prompt, new=8, thinking=False)[0]]
model = big_enough("llama")
with engine(model, tokenizer, folder / "thinking") as llm:
    assert_same(thought(llm, [prompt], new=8)[0], generated(model, tokenizer, prompt, new=8))

heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
config = ArceeConfig(**SIZES | heads, num_hidden_layers=1, vocab_size=len(tokenizer), eos_token_id=None, thinking={})
added = ArceeForCausalLM(config)
assert generated(added, tokenizer, prompt, new=8)[2].any()
added.save_pretrained(folder / "added")
tokenizer.save_pretrained(folder / "added")
for ask in (
    lambda: engine_options(added.config),
    lambda: choose_engine("vllm", added, Needs("projection")),
    lambda: merged_for(str(folder / "added"), None),
    lambda: AutoConfig.for_model("arcee" + NEEDS_US),  # what an engine reads in a merged model's folder
):
    try:
        ask()
    except InputError as error:
        print(error)
assert choose_engine("auto", added, Needs("projection"))[0] != "vllm"
"""


def test_a_new_family_breaks_no_engine_and_is_refused_in_vllm_by_name(tmp_path):
    for folder in ("src", "patches"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    table = tmp_path / "src" / "hrpo_thinking" / "families.py"
    rows, end, rest = table.read_text().partition("\n}\n")
    table.write_text(f'{rows}\n    "arcee": Family("Arcee"),{end}{rest}')
    paths = [tmp_path / "src", Path(__file__).parent, ROOT / "tests"]
    changed = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}

    def run(*arguments):
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=changed, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run("-m", "hrpo_patches", "refresh", "--into", tmp_path / "patches" / "transformers")
    said = run("-c", BESIDE, tmp_path)
    assert said.count(REFUSED) == 4, said
