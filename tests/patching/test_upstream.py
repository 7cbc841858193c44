"""What we lean on in other libraries: `upstream.TABLE` against what is installed, and src/ against the table."""

import ast
import inspect
import pkgutil
import platform
import sys
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import pytest

import hrpo_patches  # isort: split

from peft.utils.other import ModulesToSaveWrapper
from transformers import LlamaForCausalLM, LlamaModel, Trainer
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerationMode
from trl import GRPOTrainer
from upstream_rows import SRC, TEXTS, complaints, plain_names, users

import hrpo_thinking
from hrpo_patches.patching.declared import declared
from hrpo_patches.upstream import TABLE

OURS = ("hrpo_patches", "hrpo_thinking", "hrpo_vllm")
NAMES = {one for row in TABLE for spellings in plain_names(row) for one in spellings}
ELSEWHERE = {"vllm", "unsloth"}  # whose rows are checked in environments of their own
BY_NAME = ("getattr", "hasattr", "setattr", "delattr")


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


@pytest.mark.parametrize("package", sorted({row.package for row in TABLE} - ELSEWHERE))
def test_the_installed_version_has_every_name_of_the_table(package):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    found = complaints(package, platform.python_version() if package == "argparse" else version(package))
    assert not found, "\n".join(found)


def test_every_name_of_the_table_is_used_for_a_reason():
    unused = [f"{row.where} {names[0]}" for row in TABLE for names in plain_names(row) if not users(names)]
    assert not unused, "remove them from hrpo_patches/upstream.py"
    for row in TABLE:
        assert row.use in ("override", "call", "replace", "read", "add") and row.why and row.drop_when, row


def taken(tree, own):
    """(line, name) of private names that a file takes from elsewhere, as far as its syntax decides that."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] not in OURS:
            hidden = any(map(is_private, node.module.split(".")))
            yield from ((node.lineno, one.name) for one in node.names if hidden or is_private(one.name))
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            if node.attr not in own or ast.unparse(node.value) == "super()":
                yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in BY_NAME:
            name = getattr(node.args[1], "value", None)
            if isinstance(name, str) and is_private(name) and name not in own:
                yield node.lineno, name


def defined(tree):
    """The names of a file's functions, classes and variables, and of the attributes of its own objects."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def test_private_names_that_src_takes_from_other_libraries_are_in_the_table():
    trees = {path.relative_to(SRC): ast.parse(text) for path, text in TEXTS.items()}
    own = {name for tree in trees.values() for name in defined(tree)}
    found = [(path, line, name) for path, tree in trees.items() for line, name in taken(tree, own)]
    assert len(found) > 20
    unknown = [f"{path}:{line} {name}" for path, line, name in found if name not in NAMES]
    assert not unknown, "add them to hrpo_patches/upstream.py"


def own_classes():
    """The classes of src/ that can be imported here, and those of a family that inherit from them."""
    packages = [pkgutil.walk_packages(one.__path__, f"{one.__name__}.") for one in (hrpo_patches, hrpo_thinking)]
    modules = [one.name for one in chain(*packages) if not one.name.endswith("__main__")]
    for name in modules:
        if name != "hrpo_patches.evaluation.harness" or find_spec("lm_eval"):
            import_module(name)
    values = [value for name in modules if name in sys.modules for value in vars(sys.modules[name]).values()]
    return [LlamaModel, LlamaForCausalLM, *{one for one in values if inspect.isclass(one) and is_ours(one)}]


def is_ours(kind):
    return kind.__module__.startswith(OURS)


@cache
def declared_by(module):
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return declared(Path(file).read_text()) if file.endswith(".py") else {}


def private_names(kinds):
    """Private names of classes: methods, variables, and attributes of their objects."""
    scopes = [(f"{kind.__qualname__}.", declared_by(kind.__module__)) for kind in kinds]
    names = {name.removeprefix(scope) for scope, there in scopes for name in there if name.startswith(scope)}
    return {name for name in names if is_private(name)}


def test_private_names_that_our_classes_share_with_their_upstream_bases_are_in_the_table():
    shared = {}
    for kind in own_classes():
        ours, theirs = (private_names(one for one in kind.__mro__ if is_ours(one) is own) for own in (True, False))
        shared |= dict.fromkeys(ours & theirs, kind.__name__)
    assert {"_generate", "_keep_in_fp32_modules"} <= shared.keys()
    unknown = {name: kind for name, kind in shared.items() if name not in NAMES}
    assert not unknown, "an override belongs in hrpo_patches/upstream.py; a name that collides must change"


def test_trl_generates_with_the_names_we_use():
    source = inspect.getsource(GRPOTrainer)
    for name in ("self.model_wrapped", "self._dist.summon_full_params", "self.eos_token_ids"):
        assert name in source
    assert 'if "ref" in model.peft_config else None' in source


def test_peft_names_the_trained_copies_in_files_as_we_read_them():
    assert "modules_to_save.{adapter_name}" in inspect.getsource(ModulesToSaveWrapper.adapter_state_dict)


def test_sample_is_the_loop_for_greedy_and_sampling():
    assert {GENERATION_MODES_MAPPING[mode] for mode in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH)} == {
        "_sample"
    }


def test_a_callback_sees_the_gradients_before_the_step_and_the_log_line_before_the_reporters():
    step = inspect.getsource(Trainer._run_epoch)
    order = ["_clip_grad_norm(", "on_pre_optimizer_step(", "self.optimizer.step()", "_maybe_log_save_evaluate("]
    assert [step.index(name) for name in order] == sorted(step.index(name) for name in order)
    log = inspect.getsource(Trainer.log)
    assert log.index("log_history.append(output)") < log.index("on_log(self.args, self.state, self.control, logs)")
