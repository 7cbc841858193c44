"""The overlay: what is patched shows, what does not fit is one sentence, and importing it is cheap."""

import importlib.util
import inspect
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from transformers import LlamaForCausalLM, LlamaModel
from transformers.generation import GenerationMixin
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from hrpo_patches.patching import overlay
from hrpo_thinking.inputs import ThinkingInputs


def python(code, path=None):
    """Run `code` in a fresh interpreter, with `path` before everything else."""
    prefix = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    return subprocess.run([sys.executable, "-c", prefix + code], capture_output=True, text=True, check=False)


def last_line(result):
    return result.stderr.strip().splitlines()[-1]


@pytest.fixture
def site(tmp_path):
    """A folder with just the transformers files that have diffs, and a version that a test can write."""

    def write(version="5.17.0", edit=None):
        info = tmp_path / f"transformers-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n")
        real = Path(importlib.util.find_spec("transformers").origin).parents[1]
        for patch in overlay.all_patches():
            if patch.package == "transformers":
                target = tmp_path / patch.target
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(real / patch.target, target)
        (tmp_path / "transformers" / "__init__.py").write_text("raise SystemExit('the fake was imported')")
        if edit:
            file, old, new = edit
            text = (tmp_path / file).read_text()
            assert old in text
            (tmp_path / file).write_text(text.replace(old, new))
        return tmp_path

    return write


def test_importing_it_imports_neither_torch_nor_transformers():
    code = "import hrpo_patches, sys; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    assert python(code).returncode == 0


def test_importing_it_costs_less_than_50_ms():
    code = "import time; t = time.perf_counter(); import hrpo_patches; print(time.perf_counter() - t)"
    assert min(float(python(code).stdout) for _ in range(5)) < 0.05


@pytest.mark.parametrize("function", [LlamaModel.forward, Qwen2Model.forward])
def test_getsource_shows_the_patched_lines(function):
    assert "inputs_embeds, thinking_inputs, hidden_states = self.think(" in inspect.getsource(function)
    assert "thinking.observe(outputs" in inspect.getsource(GenerationMixin._sample)


def test_a_traceback_shows_the_patched_line():
    model = tiny_model("llama")
    try:
        model(
            torch.zeros(1, 2, dtype=torch.long),
            thinking_inputs=ThinkingInputs(torch.zeros(1, 9, 32), torch.ones(1, 9)),
        )
    except ValueError:
        assert "inputs_embeds, thinking_inputs, hidden_states = self.think(" in traceback.format_exc()
    else:
        pytest.fail("nothing was raised")


def test_the_class_keeps_its_own_file():
    assert inspect.getsourcefile(LlamaForCausalLM).endswith("transformers/models/llama/modeling_llama.py")


def test_every_installed_diff_is_applied_once_its_module_is_imported():
    from hrpo_patches.patching.export import installed_patches

    for patch in installed_patches():
        importlib.import_module(patch.module)
        assert patch in overlay.APPLIED


def test_a_version_that_lacks_a_block_is_refused_by_name_at_the_first_import(site):
    edit = (
        "transformers/generation/utils.py",
        "        if streamer is not None:\n            streamer.end()",
        "        pass",
    )
    result = python("import hrpo_patches\nimport transformers", site("5.16.0", edit))
    assert result.returncode == 1
    for part in (
        "transformers 5.16.0",
        "generation-utils.patch",
        "GenerationMixin._sample",
        "0 times",
        "generation/utils.py",
    ):
        assert part in last_line(result)
    assert "run: pip install --force-reinstall --no-deps 'transformers" in last_line(result)


def test_another_version_with_the_same_content_is_patched(site):
    assert "the fake was imported" in last_line(python("import hrpo_patches\nimport transformers", site("5.99.0")))


@pytest.mark.parametrize(
    ("line", "scope"),
    [
        ("class LlamaPreTrainedModel(PreTrainedModel):", "finds no LlamaPreTrainedModel"),
        ("        self.rotary_emb = LlamaRotaryEmbedding(config=config)", "LlamaModel.__init__"),
        ("        return CausalLMOutputWithPast(", "LlamaForCausalLM.forward"),
    ],
)
def test_one_character_in_what_a_hunk_holds_is_refused_with_what_moved(site, line, scope):
    at = line.index("L")
    edit = ("transformers/models/llama/modeling_llama.py", line, line[:at] + "X" + line[at + 1 :])
    result = python("import hrpo_patches\nimport transformers", site(edit=edit))
    assert result.returncode == 1
    for part in ("transformers 5.17.0", "transformers/llama.patch", scope, "modeling_llama.py", "--force-reinstall"):
        assert part in last_line(result)


def test_a_character_elsewhere_and_a_line_more_are_not_refused(site):
    edit = ("transformers/models/llama/modeling_llama.py", "class LlamaMLP(", "# a line more\nclass LlamaMLP_(")
    assert "the fake was imported" in last_line(python("import hrpo_patches\nimport transformers", site(edit=edit)))


def test_a_hunk_with_two_places_is_refused(site):
    line = (
        "        self.rotary_emb = LlamaRotaryEmbedding(config=config)\n        self.gradient_checkpointing = False\n"
    )
    twice = "        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)\n" + line
    edit = ("transformers/models/llama/modeling_llama.py", line, line + twice)
    result = python("import hrpo_patches\nimport transformers", site(edit=edit))
    assert "2 times, not once, in LlamaModel.__init__" in last_line(result)


def test_the_script_says_a_refusal_in_one_sentence(site):
    script = Path(__file__).parents[2] / "scripts" / "hrpo_gsm8k.py"
    code = f"import runpy; sys.argv = ['x']; runpy.run_path({str(script)!r}, run_name='__main__')"
    edit = ("transformers/models/llama/modeling_llama.py", "class LlamaModel(", "class LlamaNet(")
    result = python(code, site(edit=edit))
    assert result.returncode == 2
    assert result.stderr.startswith("error: hrpo_patches cannot patch") and len(result.stderr.splitlines()) == 1


def test_a_missing_file_is_refused(site):
    folder = site()
    (folder / "transformers/integrations/peft.py").unlink()
    assert "peft.py is missing" in last_line(python("import hrpo_patches\nimport transformers", folder))


def test_files_that_fit_are_imported(site):
    assert "the fake was imported" in last_line(python("import hrpo_patches\nimport transformers", site()))


def test_models_imported_before_it_are_refused_and_nothing_is_installed():
    code = (
        "import transformers.models.llama.modeling_llama, sys\n"
        "before = list(sys.meta_path)\n"
        "try:\n    import hrpo_patches\n"
        "except ImportError as error:\n    print(error, sys.meta_path == before)\n"
    )
    out = python(code).stdout
    assert "put `import hrpo_patches` before the first import of transformers." in out
    assert out.strip().endswith("True")


def test_transformers_alone_may_be_imported_before_it():
    code = (
        "import sys, transformers\n"
        "import hrpo_patches\n"
        "from transformers.models.llama.modeling_llama import LlamaModel\n"
        "assert hasattr(LlamaModel, 'blend_thinking')"
    )
    assert python(code).returncode == 0


def test_it_is_installed_once():
    before = list(sys.meta_path)
    overlay.install()
    assert sys.meta_path == before


@pytest.fixture
def other_unsloth(tmp_path):
    """A site folder with unsloth 2026.9.1, of which nothing may be run."""
    info = tmp_path / "unsloth-2026.9.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: unsloth\nVersion: 2026.9.1\n")
    (tmp_path / "unsloth").mkdir()
    (tmp_path / "unsloth" / "__init__.py").write_text("raise SystemExit('the fake was imported')")
    return tmp_path


def test_an_unsloth_without_patches_is_refused_by_name_when_it_is_imported(other_unsloth):
    result = python("import hrpo_patches, unsloth", other_unsloth)
    assert result.returncode == 1
    assert "cannot patch unsloth 2026.9.1: unsloth/models/llama.py is missing" in last_line(result)
    assert "run: pip install --force-reinstall --no-deps 'unsloth" in last_line(result)


def test_an_unsloth_without_patches_is_no_obstacle_to_those_who_do_not_import_it(other_unsloth):
    assert python("import hrpo_patches, transformers", other_unsloth).returncode == 0


def test_status_refuses_an_unsloth_without_patches_by_name(other_unsloth):
    result = python("from hrpo_patches.commands.main import main; sys.exit(main(['status']))", other_unsloth)
    lines = [line for line in result.stdout.splitlines() if " unsloth/" in line and ".patch" in line]
    assert result.returncode == 1 and len(lines) == 2
    for line in lines:
        assert "2026.9.1" in line and "refused" in line  # then the table folds it


def test_a_folder_that_merely_has_the_name_of_a_package_is_not_the_package(tmp_path):
    (tmp_path / "unsloth").mkdir()
    result = python("import hrpo_patches, unsloth; print(list(unsloth.__path__))", tmp_path)
    assert result.returncode == 0 and str(tmp_path) in result.stdout


def test_patches_that_come_after_unsloth_are_an_error_with_the_remedy():
    code = "import types; sys.modules['unsloth.save'] = types.ModuleType('unsloth.save'); import hrpo_patches"
    assert "put `import hrpo_patches` before the first import of unsloth" in last_line(python("import sys; " + code))
