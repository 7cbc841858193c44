"""TRL's own classes, also in a process where unsloth has put classes that it generates in their place.

On a GPU `import unsloth` rewrites `trl.GRPOTrainer` and `trl.GRPOConfig`. Ours derive from TRL's as released, so a
second, private copy of the two modules is loaded from TRL's files; unsloth's own trainers are left as they are.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any


def trl_class(module: str, name: str) -> Any:
    """The class `name` of TRL's `module` (dotted, e.g. trl.trainer.grpo_trainer) as its file defines it."""
    current = import_module(module)
    return getattr(current if "unsloth" not in sys.modules else _private_copy(current), name)


def _private_copy(module: ModuleType) -> ModuleType:
    package, _, name = module.__name__.rpartition(".")
    private = f"{package}._hrpo_{name}"  # in the same package, for the file's relative imports
    if private not in sys.modules:
        assert module.__file__ is not None
        spec = spec_from_file_location(private, module.__file__)
        assert spec is not None and spec.loader is not None
        # Under its name before it runs: dataclasses look their module up there.
        sys.modules[private] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[private])
    return sys.modules[private]
