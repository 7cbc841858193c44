"""A hunk goes where its text stands once in the scope that it names, and nowhere else."""

import pytest

from hrpo_patches.patching.placing import Misfit, hunks_of, owners, placed

SOURCE = """import os


class One:
    x = 1

    @property
    def size(self):
        value = 1
        return value

    def other(self):
        value = 1

        def inner():
            return value

        return inner


def size():
    value = 1
    return value
"""

DIFF = """Why: it is asked for.

--- a/one.py
+++ b/one.py
@@ One.size @@
         value = 1
+        value += 1
"""


def test_a_hunk_is_placed_in_its_scope_although_its_text_stands_in_others_too():
    result = placed(SOURCE, hunks_of(DIFF))
    assert result.count("value += 1") == 1
    assert result.index("def size") < result.index("value += 1") < result.index("def other")


@pytest.mark.parametrize(
    ("hunk", "where"),
    [
        ("@@ module @@\n import os\n+import sys\n", "import os\nimport sys\n"),
        ("@@ One @@\n     x = 1\n+    y = 2\n", "x = 1\n    y = 2\n"),
        ("@@ One @@\n-class One:\n+class One(Two):\n     x = 1\n", "class One(Two):\n    x = 1\n"),
        ("@@ One.other.inner @@\n-            return value\n+            return 2\n", "return 2\n"),
        ("@@ size @@\n     value = 1\n+    value = 3\n", "    value = 1\n    value = 3\n"),
    ],
)
def test_modules_classes_functions_and_functions_in_functions_are_scopes(hunk, where):
    assert where in placed(SOURCE, hunks_of(hunk))


def test_every_line_belongs_to_the_innermost_definition_with_its_decorators():
    owner = dict(zip(SOURCE.split("\n"), owners(SOURCE), strict=True))
    assert owner["    @property"] == "One.size"
    assert owner["    x = 1"] == "One" and owner["import os"] == "module"
    assert owner["            return value"] == "One.other.inner" and owner["        return inner"] == "One.other"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("        value = 1\n        return", "        value = 2\n        return"), "'value = 1' 0 times"),
        (("        value = 1\n        return", "        value = 1\n        value = 1\n        return"), "2 times"),
        (("def size(self)", "def length(self)"), "finds no One.size"),
    ],
)
def test_a_text_that_is_not_there_or_twice_is_a_misfit_by_name(edit, message):
    with pytest.raises(Misfit, match=message):
        placed(SOURCE.replace(*edit, 1), hunks_of(DIFF))


def test_what_changes_outside_of_the_scope_changes_nothing():
    moved = "# a line more\n" + SOURCE.replace(
        "    def other(self):\n        value = 1", "    def other(self):\n        value = 9"
    )
    assert placed(moved, hunks_of(DIFF)).count("value += 1") == 1


def test_a_hunk_fits_in_the_words_of_either_version_but_not_of_both():
    either = DIFF + "@@ or @@\n         number = 1\n+        number += 1\n"
    assert "value += 1" in placed(SOURCE, hunks_of(either))
    renamed = SOURCE.replace("        value = 1\n        return", "        number = 1\n        return")
    assert "number += 1" in placed(renamed, hunks_of(either))
    with pytest.raises(Misfit, match="2 times"):
        placed(
            SOURCE.replace(
                "        value = 1\n        return", "        value = 1\n        number = 1\n        return"
            ),
            hunks_of(either),
        )


def test_hunks_that_overlap_are_a_misfit():
    with pytest.raises(Misfit, match="overlaps itself in One.size"):
        placed(SOURCE, hunks_of(DIFF + DIFF[DIFF.index("@@") :]))


def test_an_insertion_that_leaves_its_scope_by_the_syntax_of_the_result_is_a_misfit():
    with pytest.raises(Misfit, match="does not stay in its scope One.size"):
        placed(SOURCE, hunks_of("@@ One.size @@\n         return value\n+\n+    lost = 1\n"))
