"""How large and how knotted the code is, as a Markdown table: `python scripts/metrics.py`.

Lines are lines of files, blank ones and docstrings included. It needs grimp, which import-linter brings.
"""

import ast
import json
import subprocess
import sys
import tokenize
from collections.abc import Callable, Iterable
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"
PACKAGES = ("hrpo_patches", "hrpo_thinking", "hrpo_vllm")
COMMENTED = ("hrpo_patches/thinking", "hrpo_patches/training", "hrpo_patches/engines", "hrpo_thinking")

# Imports a module, then what the functions of loaded modules of ours import, until nothing new comes.
CLOSURE = """
import ast, importlib, json, sys
import hrpo_patches
ours = ("hrpo_patches", "hrpo_thinking", "hrpo_vllm")
def loaded():
    return {name: module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] in ours}
importlib.import_module(sys.argv[1])
first, read = loaded(), set()
while todo := loaded().keys() - read:
    for name in todo:
        read.add(name)
        for node in ast.walk(ast.parse(open(sys.modules[name].__file__).read())):
            for path in [node.module] if isinstance(node, ast.ImportFrom) else []:
                if path.partition(".")[0] in ours:
                    for wanted in (path, *(f"{path}.{one.name}" for one in node.names)):
                        try:
                            importlib.import_module(wanted)
                        except ImportError:  # a name of a module, or vLLM is not installed
                            pass
print(json.dumps([sorted(first.values()), sorted(loaded().values())]))
"""


def length(files: Iterable[Path]) -> int:
    """The lines of all files."""
    return sum(len(file.read_text(errors="replace").splitlines()) for file in files)


def closure(module: str) -> tuple[list[Path], list[Path]]:
    """Our files that importing a module loads, and those with what their functions import later."""
    done = subprocess.run([sys.executable, "-c", CLOSURE, module], capture_output=True, text=True, check=True)
    first, whole = json.loads(done.stdout.splitlines()[-1])
    return [Path(file) for file in first], [Path(file) for file in whole]


def count(files: Iterable[Path], wanted: Callable[[ast.AST], bool]) -> int:
    """The nodes of all files' syntax trees that are wanted."""
    return sum(wanted(node) for file in files for node in ast.walk(ast.parse(file.read_text())))


def is_parameter(node: ast.AST) -> bool:
    """Whether a node is a parameter of a function, of which self and cls are none."""
    return isinstance(node, ast.arg) and node.arg not in ("self", "cls")


def is_any(node: ast.AST) -> bool:
    """Whether a node is a parameter that is annotated with `Any` itself."""
    return is_parameter(node) and isinstance(kind := getattr(node, "annotation", None), ast.Name) and kind.id == "Any"


def comments(file: Path) -> int:
    """The lines of a file with a comment, alone or after code."""
    with file.open("rb") as source:
        return sum(token.type == tokenize.COMMENT for token in tokenize.tokenize(source.readline))


def circles() -> list[list[str]]:
    """Groups of modules that import each other, directly or not, imports in functions included."""
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True, cache_dir=None)
    groups = {
        tuple(sorted({one} | (graph.find_upstream_modules(one) & graph.find_downstream_modules(one))))
        for one in graph.modules
    }
    return [list(group) for group in sorted(groups) if len(group) > 1]


def main() -> None:
    """Print the table."""
    source = sorted(SRC.rglob("*.py"))
    tests, patches = [*(ROOT / "tests").rglob("*.py")], [one for one in (ROOT / "patches").rglob("*") if one.is_file()]
    first, whole = closure("hrpo_patches.commands.train")
    parameters, untyped = count(source, is_parameter), count(source, is_any)
    raises, found = count(source, lambda node: isinstance(node, ast.Raise)), circles()
    rows = {
        "lines of src/": f"{length(source)} in {len(source)} files",
        "lines of tests/": f"{length(tests)} in {len(tests)} files",
        "lines of patches/": f"{length(patches)} in {len(patches)} files",
        "loaded by importing `hrpo train`": f"{length(first)} lines in {len(first)} files",
        "with what its functions import": f"{length(whole)} lines in {len(whole)} files",
        "raises per 1,000 lines of src/": f"{1000 * raises / length(source):.1f} ({raises})",
        "parameters annotated `Any`": f"{untyped / parameters:.1%} ({untyped} of {parameters})",
    }
    for name in COMMENTED:
        if files := sorted((SRC / name).rglob("*.py")):
            rows[f"comments per 100 lines of {name}"] = f"{100 * sum(map(comments, files)) / length(files):.1f}"
    rows["import circles"] = f"{len(found)} ({sum(map(len, found))} modules)"
    print("| measure | value |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items()), sep="\n")
    for group in found:
        print("\ncircle:", ", ".join(group))


if __name__ == "__main__":
    main()
