"""Commands in the documents exist, with the flags that they are shown with."""

import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout, suppress
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hrpo_patches import __version__
from hrpo_patches.commands.main import main as cli
from hrpo_patches.models.smollm2 import smollm2_folder

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOK = ROOT / "notebooks" / "hrpo.ipynb"
LINKED = [*PAGES, ROOT / "README.zh-CN.md", ROOT / "CHANGELOG.md", NOTEBOOK]
OTHERS = {"pip", "git", "hf", "cd", "curl", "vllm", "for", "pre-commit"}  # commands that are not ours


def commands():
    """(page, words) of each command in a console block, its comment left out."""
    for page in PAGES:
        for line in re.findall(r"^\$ ((?:.*\\\n)*.*)$", page.read_text(), re.M):
            for part in re.split(r" && | \| ", re.sub(r"\\\n\s*", " ", line)):
                if words := shlex.split(part, comments=True):
                    yield page.name, words


@cache
def help_of(*command):
    """What a command's help prints."""
    said, program = io.StringIO(), str(ROOT / command[0])
    whole = "--help_all" if command[0].startswith("scripts/") or command == ("hrpo", "train") else "--help"
    with redirect_stdout(said), suppress(SystemExit), pytest.MonkeyPatch.context() as patch:
        if command[0] == "hrpo":
            cli([*command[1:], whole])
        else:
            patch.setattr(sys, "argv", [program, whole])
            patch.syspath_prepend(str(Path(program).parent))
            runpy.run_path(program, run_name="__main__")
    return said.getvalue()


def test_each_page_of_commands_is_read():
    pages = {page for page, _ in commands()}
    assert pages >= {"README.md", "CONTRIBUTING.md", "training.md", "evaluation.md", "vllm.md", "results.md", "use.md"}
    assert sum(1 for _ in commands()) > 50


@pytest.mark.parametrize(("page", "words"), commands(), ids=lambda value: value if isinstance(value, str) else None)
def test_a_command_exists_with_its_flags(page, words):
    program, *rest = words
    for word in rest:
        if word.startswith(("configs/", "scripts/", "benchmarks/")) and ".json" not in word:
            assert (ROOT / word).exists(), word
    if program == "accelerate":  # whose own flags test_several tries
        program, rest = "python", rest[next(i for i, word in enumerate(rest) if word.startswith("scripts/")) :]
    flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
    if program in OTHERS or program.startswith(".") or (page == "tutorial.md" and program == "python"):
        return  # the tutorial's programs are its own
    if program == "make":
        assert set(rest) <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)), words
        return
    if program == "python":
        known = help_of(rest[0])
    else:
        assert program == "hrpo", words
        known = help_of(program, *rest[:1]) if rest else help_of(program)
    if rest[:1] != ["serve"]:  # the rest of its flags are vLLM's
        missing = [flag for flag in flags if not re.search(rf"{re.escape(flag)}\b", known)]
        assert known and not missing, missing


def prose_of(page):
    """A page without its blocks of code; of a notebook, the cells of text."""
    text = page.read_text()
    if page.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


def anchors_of(page):
    """The names that a page's headings have in a link."""
    titles = re.findall(r"^#+ (.*)$", prose_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.name)
def test_a_local_link_leads_to_a_file_and_a_heading_of_it(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)) if "://" not in link]
    assert links or page.parent.name == "docs"
    for link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link


def test_the_version_is_the_same_wherever_it_stands():
    assert re.search(r"^## (\S+)", LINKED[-2].read_text(), re.M)[1] == __version__
    assert f"hrpo_patches-{__version__}-py3" in NOTEBOOK.read_text()


@pytest.mark.smollm2
def test_the_readmes_script_trains(tmp_path):
    (code,) = (
        block for block in re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.S) if "HRPOTrainer(" in block
    )
    for there, here in (("Qwen/Qwen2.5-0.5B-Instruct", str(smollm2_folder())), ("max_steps=50", "max_steps=1")):
        assert there in code
        code = code.replace(there, here)
    code = code.replace("max_completion_length=64", "max_completion_length=16")  # of which a CPU makes eight
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    weights = load_file(tmp_path / "runs" / "mine" / "adapter_model.safetensors")
    assert any("thinking_projection" in name for name in weights) and any("lora_A" in name for name in weights)
    log = [json.loads(line) for line in (tmp_path / "runs" / "mine" / "monitor.jsonl").read_text().splitlines()]
    assert (tmp_path / "runs" / "mine" / "thinking_config.json").is_file() and len(log) >= 1
