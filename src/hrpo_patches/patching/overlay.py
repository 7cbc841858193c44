"""Finds, checks and applies the diffs under patches/ as upstream modules are imported.

Nothing is written to disk: a finder at the front of `sys.meta_path` hands Python the patched source of the few modules
that have a diff. Every diff of a package is checked when the package itself is first imported, so that a hunk that
does not fit is one error at the first import, before any work.
"""

from __future__ import annotations

# Every process that imports hrpo_patches pays for these imports: typing, dataclasses and importlib.abc stay out.
import linecache
import sys
from collections import namedtuple
from collections.abc import Sequence
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

from hrpo_thinking.errors import PatchError


class Patch(namedtuple("Patch", ["package", "file", "target"])):
    """One diff: `file` changes `target` (relative to the folder that holds the package) of `package`."""

    __slots__ = ()
    package: str
    file: Path
    target: str

    @property
    def module(self) -> str:
        """The dotted name of the module that the diff changes."""
        return self.target.removesuffix(".py").replace("/", ".")

    @property
    def name(self) -> str:
        """The diff's name under patches/."""
        return f"{self.package}/{self.file.name}"


def patches_root() -> Path:
    """The folder of the diffs: inside the package in a wheel, beside `src/` in a checkout."""
    inside = Path(__file__).parents[1] / "patches"
    return inside if inside.is_dir() else Path(__file__).parents[3] / "patches"


@cache
def all_patches() -> tuple[Patch, ...]:
    """Every diff, by package and name."""
    patches = []
    for file in sorted(patches_root().glob("*/*.patch")):
        header = next(line for line in file.read_text().splitlines() if line.startswith("+++ b/"))
        patches.append(Patch(file.parent.name, file, header.removeprefix("+++ b/")))
    if not patches:
        raise PatchError(f"hrpo_patches found no patches under {patches_root()}; reinstall hrpo_patches.")
    return tuple(patches)


def patches_for(package: str) -> list[Patch]:
    """The diffs for `package`."""
    return [patch for patch in all_patches() if patch.package == package]


@cache
def patched_packages() -> frozenset[str]:
    """The packages that there are diffs for."""
    return frozenset(patch.package for patch in all_patches())


@cache
def installed_version(package: str) -> str | None:
    """The installed version of `package`, or None."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cannot_patch(package: str, why: str) -> PatchError:
    """The error of a package that does not fit, with what to install: a version that hrpo_patches itself asks for."""
    from importlib.metadata import PackageNotFoundError, requires

    try:
        needs = [need.partition(";")[0].strip() for need in requires("hrpo_patches") or ()]
    except PackageNotFoundError:  # a checkout that is merely on the path
        needs = []
    wanted = next((need for need in needs if need.startswith((f"{package}=", f"{package}<", f"{package}>"))), package)
    return PatchError(
        f"hrpo_patches cannot patch {package} {installed_version(package)}: {why}; run: pip install --force-reinstall "
        f"--no-deps '{wanted}'"
    )


def site_of(package: str) -> Path | None:
    """The folder that holds the installed `package`, without importing it."""
    spec = PathFinder.find_spec(package)
    return Path(spec.origin).parents[1] if spec is not None and spec.origin is not None else None


def check(package: str) -> None:
    """Raise `PatchError` unless every diff for the installed `package` can be placed."""
    for patch in patches_for(package):
        patched_source(patch, installed_source(patch))


def installed_source(patch: Patch) -> str:
    """The source that the diff is for, as it is installed; a `PatchError` if it is missing."""
    site = site_of(patch.package)
    if site is None or not (site / patch.target).is_file():
        raise cannot_patch(patch.package, f"{patch.target} is missing")
    return (site / patch.target).read_text(encoding="utf-8")


@cache
def patched_source(patch: Patch, original: str) -> str:
    """`original` with the diff applied, each hunk where its text stands once in the scope that it names.

    Raises:
        PatchError: a hunk's text is not there, or more than once.
    """
    from hrpo_patches.patching.placing import Misfit, hunks_of, placed

    try:
        return placed(original, hunks_of(patch.file.read_text(encoding="utf-8")))
    except Misfit as misfit:
        where = f"in {patch.target}, which differs from the versions that it fits"
        raise cannot_patch(patch.package, f"{patch.name} {misfit} {where}") from None


def state_of(patch: Patch) -> str:
    """One of: applied; not yet imported; refused, and why; not installed."""
    if installed_version(patch.package) is None or site_of(patch.package) is None:
        return "package not installed"
    if patch in APPLIED:
        return "applied"
    try:
        patched_source(patch, installed_source(patch))
    except PatchError as error:
        return f"refused: {error}"
    return "not yet imported (fits)"


class PatchedLoader(SourceFileLoader):
    """Loads a module from its patched source. `inspect`, tracebacks and pdb show the patched lines."""

    def __init__(self, patch: Patch, path: str) -> None:
        super().__init__(patch.module, path)
        self.patch = patch

    def get_data(self, path: str) -> bytes:
        source = patched_source(self.patch, super().get_data(path).decode("utf-8"))
        # mtime None keeps `linecache.checkcache` from going back to the file on disk.
        linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
        return source.encode("utf-8")

    def path_stats(self, path: str) -> dict[str, float]:
        raise OSError("patched source has no bytecode cache")

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        APPLIED.add(self.patch)


APPLIED: set[Patch] = set()


class PatchFinder:
    """Checks a package when it is first imported, and loads its patched modules through `PatchedLoader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package = fullname.partition(".")[0]
        if package not in patched_packages():
            return None
        if fullname == package:
            # Where the package is not installed, or a folder merely has its name, Python's own error is the right one.
            if site_of(fullname) is not None:
                check(fullname)
            return None
        patch = next((patch for patch in patches_for(package) if patch.module == fullname), None)
        spec = PathFinder.find_spec(fullname, path, target) if patch is not None else None
        if patch is None or spec is None or spec.origin is None:
            return None
        return spec_from_file_location(fullname, spec.origin, loader=PatchedLoader(patch, spec.origin))


def install() -> None:
    """Put the finder at the front of `sys.meta_path`; does nothing when it is already there.

    Raises:
        PatchError: a module that has a diff is already imported unpatched, or an imported package does not fit.
    """
    if any(isinstance(finder, PatchFinder) for finder in sys.meta_path):
        return
    early = [patch.module for patch in all_patches() if patch.module in sys.modules]
    if early:
        raise PatchError(
            f"{early[-1]} was imported before hrpo_patches, so it is not patched; "
            f"put `import hrpo_patches` before the first import of {early[-1].partition('.')[0]}."
        )
    for package in patched_packages() & set(sys.modules):
        check(package)
    sys.meta_path.insert(0, PatchFinder())
