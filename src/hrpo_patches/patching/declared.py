"""Reads which names a module's source declares, without importing it, and which rows of `upstream.TABLE` are gone."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from packaging.version import Version

from hrpo_patches.upstream import TABLE, Row


def declared(source: str) -> dict[str, list[str] | None]:
    """The names that a module declares, by qualified name ("Class.method"): a function's parameters, else None.

    Imported names count, and every attribute that the code of a class sets, on whatever object.
    """
    found: dict[str, list[str] | None] = {}

    def visit(node: ast.AST, prefix: str, owner: str, local: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                found[f"{prefix}{child.name}"] = None
                visit(child, f"{prefix}{child.name}.", f"{prefix}{child.name}.", False)
                continue
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found[f"{prefix}{child.name}"] = parameters(child.args)
                visit(child, f"{prefix}{child.name}.", owner, True)
                continue
            if isinstance(child, ast.alias) and not local:
                found[f"{prefix}{child.asname or child.name}"] = None
            elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store) and not local:
                found[f"{prefix}{child.id}"] = None
            elif isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
                found.setdefault(f"{owner}{child.attr}", None)
            visit(child, prefix, owner, local)

    visit(ast.parse(source), "", "", False)
    return found


def parameters(arguments: ast.arguments) -> list[str]:
    """The names of a function's parameters in order, with "*" and "**" before those that collect the rest."""
    names = [one.arg for one in (*arguments.posonlyargs, *arguments.args)]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [one.arg for one in arguments.kwonlyargs]
    return names + ([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])


def installed(file: str) -> str | None:
    """The source of an installed module by its path ("trl/trainer/utils.py"), None if it is missing."""
    spec = find_spec(file.partition("/")[0].removesuffix(".py"))
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parents[1 if spec.submodule_search_locations else 0]
    return (root / file).read_text() if (root / file).is_file() else None


def rows_of(package: str, version: str) -> list[Row]:
    """The rows of `upstream.TABLE` about this version of a package."""
    return [row for row in TABLE if row.package == package and Version(row.since) <= Version(version)]


def gone(rows: Iterable[Row], read: Callable[[str], str | None] = installed) -> Iterator[tuple[Row, str, str | None]]:
    """Each name of the rows that a version of their package does not have as they say.

    Args:
        rows: of `upstream.TABLE`.
        read: returns the source of a module by its path in the package, None if it is missing.

    Returns:
        the row, the name as in the row, and what is there: None, or the name with its own parameters.
    """
    modules: dict[str, dict[str, list[str] | None]] = {}
    for row in rows:
        module, _, scope = row.where.partition(":")
        if module not in modules:
            file = module.replace(".", "/")
            modules[module] = declared(read(f"{file}.py") or read(f"{file}/__init__.py") or "")
        for wanted in row.names:
            there = [found for one in wanted.split(" | ") if (found := found_as(one, scope, modules[module]))]
            fits = not there if row.use == "add" else bool(set(there) & set(wanted.split(" | ")))
            if not fits:
                yield row, wanted, there[0] if there else None


def found_as(wanted: str, scope: str, there: dict[str, list[str] | None]) -> str | None:
    """`wanted` ("name" or "function(parameter, ...)") if declared so, else as it is declared; None if missing."""
    name, _, given = wanted.removesuffix(")").partition("(")
    qualified = f"{scope}.{name}".removeprefix(".")
    if qualified not in there:
        return None
    found, expected = there[qualified] or [], given.split(", ")
    same = found[: len(expected) - 1] == expected[:-1] if given.endswith("...") else found == expected
    return wanted if same or not given else f"{name}({', '.join(found)})"
