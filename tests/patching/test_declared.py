"""Names read from a source that nothing imports."""

from hrpo_patches.patching.declared import declared, gone, rows_of
from hrpo_patches.upstream import Row

SOURCE = """
from elsewhere import LLM as Engine

if True:
    def helper(one, *, two=2, **rest): ...

class Trainer:
    kept: list[str] = []

    def _save(self, folder, state=None):
        local = 1
        self._metrics[local] = self.state, self._losses = folder, state
        self.model._mark = True
"""


def problems(*names, where="library.trainer:Trainer", use="read"):
    sources = {"library/trainer.py": SOURCE, "library/__init__.py": "x = 1"}
    return [(name, has) for _, name, has in gone([Row(where, names, use, "why", "never")], sources.get)]


def test_a_source_declares_functions_classes_imports_and_attributes():
    found = declared(SOURCE)
    assert found["helper"] == ["one", "two", "**rest"] and found["Trainer._save"] == ["self", "folder", "state"]
    assert {"Engine", "Trainer.kept", "Trainer.state", "Trainer._losses", "Trainer._mark"} <= found.keys()
    assert not [name for name in found if name.rpartition(".")[2] in ("local", "elsewhere")]


def test_what_a_version_has_is_no_problem():
    assert not problems("_save(self, folder, state)", "_save(self, folder, ...)", "kept | held", "held | _mark")
    assert not problems("x", where="library") and not problems("_hook", use="add")


def test_what_moved_is_named_with_what_is_there():
    assert problems("_load | _read") == [("_load | _read", None)]
    assert problems("_save(self, path, ...)") == [("_save(self, path, ...)", "_save(self, folder, state)")]
    assert problems("_save(self, folder)") and problems("_save(self, folder, state, more, ...)")
    assert problems("kept", where="library.utils:Trainer") == [("kept", None)]
    assert problems("_mark", use="add") == [("_mark", "_mark")]


def test_a_name_that_came_later_is_not_asked_of_an_older_version():
    later = next(row for row in rows_of("trl", "1.16.0") if row.since == "1.16")
    assert later not in rows_of("trl", "1.15.0")
