"""Places the hunks of a diff by scope: a hunk names class and function.

A hunk begins with `@@ Class.function @@` (`@@ module @@` outside of both) and holds lines as in a unified diff,
without line numbers: it goes where its text stands exactly once among that scope's own lines, and nowhere else. Where
versions differ in their words, `@@ or @@` stands between the one and the other.
"""

from __future__ import annotations

import ast
from typing import NamedTuple

_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
MODULE = "module"


class Misfit(Exception):
    """A hunk cannot be placed; the message says which, and how often its text was found."""


class Change(NamedTuple):
    """The lines that are expected, and those that take their place."""

    old: list[str]
    new: list[str]


class Hunk(NamedTuple):
    """A change in one scope, in the words of one version or of another: exactly one of them stands there, once."""

    scope: str
    changes: list[Change]


def hunks_of(diff: str) -> list[Hunk]:
    """The hunks of a diff, in order; what stands before the first is its header."""
    hunks: list[Hunk] = []
    for line in diff.splitlines():
        if line == "@@ or @@":
            hunks[-1].changes.append(Change([], []))
        elif line.startswith("@@ "):
            hunks.append(Hunk(line.removeprefix("@@ ").removesuffix(" @@"), [Change([], [])]))
        elif hunks:
            change = hunks[-1].changes[-1]
            if line[:1] in (" ", "-", ""):
                change.old.append(line[1:])
            if line[:1] in (" ", "+", ""):
                change.new.append(line[1:])
    return hunks


def owners(source: str) -> list[str]:
    """For each line, the innermost class or function that it belongs to, decorators and header included."""
    owner = [MODULE] * (source.count("\n") + 1)

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                continue  # most of a tree, and no definition is in one
            inner = prefix
            if isinstance(child, _DEFINITIONS):
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                name, inner = f"{prefix}{child.name}", f"{prefix}{child.name}."
                owner[first - 1 : child.end_lineno] = [name] * ((child.end_lineno or first) - first + 1)
            visit(child, inner)

    try:
        visit(ast.parse(source), "")
    except SyntaxError as error:
        raise Misfit(f"finds what is no Python ({error})") from None
    return owner


def place_of(hunk: Hunk, lines: list[str], owner: list[str]) -> tuple[int, Change]:
    """The index of the line that the hunk begins at, and the change in the words that stand there.

    Raises:
        Misfit: its text is not there, or more than once.
    """
    places = []
    for change in hunk.changes:
        width = len(change.old)
        own = [hunk.scope] * width
        found = (i for i in range(len(lines)) if lines[i : i + width] == change.old and owner[i : i + width] == own)
        places += [(i, change) for i in found]
    if len(places) != 1:
        if hunk.scope not in owner:
            raise Misfit(f"finds no {hunk.scope}")
        anchor = max(hunk.changes[0].old, key=lambda line: len(line.strip()), default="").strip()
        raise Misfit(f"finds the lines around {anchor!r} {len(places)} times, not once, in {hunk.scope}")
    return places[0]


def placed(source: str, hunks: list[Hunk]) -> str:
    """`source` with every hunk applied, each of which is then in its scope by the syntax of the result.

    Raises:
        Misfit: a hunk cannot be placed, two overlap, or the result holds one in another scope.
    """
    lines, owner = source.split("\n"), owners(source)
    found = sorted((*place_of(hunk, lines, owner), hunk.scope) for hunk in hunks)
    result: list[str] = []
    starts, end = [], 0
    for start, change, scope in found:
        if start < end:
            raise Misfit(f"overlaps itself in {scope}")
        result += lines[end:start]
        starts.append(len(result))
        result += change.new
        end = start + len(change.old)
    text = "\n".join(result + lines[end:])
    after = owners(text)
    for start, (_, change, scope) in zip(starts, found, strict=True):
        if set(after[start : start + len(change.new)]) - {scope}:
            raise Misfit(f"does not stay in its scope {scope}")
    return text
