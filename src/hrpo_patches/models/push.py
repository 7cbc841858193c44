"""What of a finished run, an adapter or a full model is pushed to the hub, and pushing it.

Nothing pickled is pushed, nothing of a training run's state, and no path of this machine.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

from hrpo_patches.files import missing
from hrpo_patches.models.card import BASE, CARD, HERE, author_of, card_of, public_name, read_card
from hrpo_patches.models.hub import CONFIG
from hrpo_patches.models.record import GENERATION_FILE, THINKING_FILE, read_thinking
from hrpo_thinking.errors import InputError, SaveError, require
from hrpo_thinking.parts import is_thinking_parameter, parts_of

REPORT = "report.json"
ADAPTER = ("adapter_model.safetensors", CONFIG, THINKING_FILE)
MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
SHARED = (*TOKENIZER, GENERATION_FILE, REPORT, CARD, "LICENSE*")
VOCABULARIES = TOKENIZER[:-2]  # where a word may look like a path
# Of a run's report: what may be pushed. Its title names the data, which may be in a folder.
REPORTED = ("arguments", "prompt", "before", "after", "stage", "last_stage", "thoughts", "seconds", "log")

Files = dict[str, Path | bytes]  # what is pushed, by name: a file as it is, or the bytes of one that is rewritten


def files_of(folder: Path, repo_id: str, base: str | None = None) -> Files:
    """The files of an adapter or a full model that are pushed to `repo_id`.

    Args:
        folder: an adapter's, a full model's that thinks or that a run has trained, or a checkpoint's.
        repo_id: owner/name, which the card says.
        base: the hub id of the base model, by default the one that an adapter names.

    Raises:
        InputError: the folder holds none of these or a damaged one, the base model of an adapter has no hub id, or a
            file names a path of this machine.
    """
    text = f"the base model must be named by its hub id, owner/name, not {base!r}."
    require(base is None or public_name(base) is not None, text)
    adapter = _kind_of(folder) == "adapter"
    weights = list(ADAPTER) if adapter else [*_weights(folder), "config.json"]
    names = {path.name for pattern in (*weights, *SHARED) for path in folder.glob(pattern)}
    files: Files = {name: folder / name for name in sorted(names)}
    config = _read(folder / CONFIG) if adapter else {}
    trained_on, card = config.get("base_model_name_or_path"), read_card(folder)
    # Our card leaves the base's place open where training loaded it from a folder.
    in_a_folder = author_of(card) == "us" and BASE in card
    base = base or (None if in_a_folder else public_name(trained_on, folder))
    require(
        base is not None or not adapter,
        f"{folder} was trained on {trained_on!r}, which is not a hub id, so nobody else can load it. Name the same "
        f"model on the hub (--base owner/model), or push the full model that hrpo merge makes.",
    )
    if adapter:
        files[CONFIG] = _json(config | {"base_model_name_or_path": base})
    if REPORT in files:
        files[REPORT] = _json(_public_report(_read(folder / REPORT)))
    files[CARD] = _card(folder, card, repo_id, base).encode()
    here = (folder.absolute(), folder.resolve(), Path.cwd(), Path.home())
    _refuse_paths(files, [trained_on or "", *map(str, here)])
    return dict(sorted(files.items()))


def _read(file: Path) -> dict[str, Any]:
    """What a JSON file holds; an `InputError` if it is damaged."""
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is damaged: {error}.") from None
    require(isinstance(content, dict), f"{file} is damaged: expected an object, got {type(content).__name__}.")
    return content


def _kind_of(folder: Path) -> Literal["adapter", "model"]:
    """What a folder holds; an `InputError` where it is neither, or not complete."""
    try:
        adapter = (folder / CONFIG).is_file() and (folder / ADAPTER[0]).is_file()
        if adapter:
            problem = _problem_of_adapter(folder)
        elif (folder / "config.json").is_file() and (weights := _weights(folder)):
            problem = _problem_of_model(folder, weights)
        else:
            problem = _problem_of_folder(folder)
    except InputError:
        raise
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        problem = f"{folder} holds a file that is damaged or cannot be read: {error}."
    require(problem is None, str(problem))
    return "adapter" if adapter else "model"


def _problem_of_adapter(folder: Path) -> str | None:
    """Why an adapter would not load again as it was trained."""
    record, keys = read_thinking(folder), _keys(folder / ADAPTER[0])
    if record is None and any(map(is_thinking_parameter, keys)):
        return f"{folder} does not say how it thinks; hrpo convert makes an adapter that does."
    for part in parts_of(record["residual"]) if record else ():
        if not any(f".{part}." in key for key in keys):
            return f"{folder} lacks {part}: it was saved without its thinking weights."
    return None


def _weights(folder: Path) -> list[str]:
    """The files that a full model's weights are loaded from, as transformers does: one, or else an index and shards.

    A save that leaves other shards in the folder does not load them.
    """
    if (folder / MODEL).is_file():
        return [MODEL]
    shards = set(_read(folder / INDEX)["weight_map"].values()) if (folder / INDEX).is_file() else set()
    return [INDEX, *sorted(shards)] if shards else []


def _problem_of_model(folder: Path, weights: list[str]) -> str | None:
    """Why a full model is not pushed."""
    for name in weights:
        if not (folder / name).is_file():
            return f"{folder} lacks {name}: it is damaged."
        if name != INDEX:
            _keys(folder / name)  # raises where the file is damaged
    if not (_read(folder / "config.json").get("thinking") or (folder / REPORT).is_file()):
        return f"{folder} holds a full model that was not trained to think."
    return None


def _problem_of_folder(folder: Path) -> str:
    """What to say of a folder that holds neither an adapter nor a model."""
    if not folder.is_dir():
        return missing(str(folder)) or f"{folder} is not a folder."
    if checkpoints := sorted(folder.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime):
        return f"{folder} is a run that has not finished. Resume it, or push its last checkpoint, {checkpoints[-1]}."
    return f"{folder} holds neither an adapter ({CONFIG}, {ADAPTER[0]}) nor a full model (config.json, {MODEL})."


def _keys(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as weights:
        return list(weights.keys())


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _public_report(report: dict[str, Any]) -> dict[str, Any]:
    """A run's report as it is pushed (`REPORTED`), with only those arguments that have no slash: no path is left."""
    public = {name: report[name] for name in REPORTED if name in report}
    arguments = {n: value for n, value in report.get("arguments", {}).items() if not set("/\\") & set(str(value))}
    arguments.pop("output_dir", None)
    return public | {"arguments": arguments}


def _card(folder: Path, text: str, repo_id: str, base: str | None) -> str:
    """The card that is pushed, which names the base: the folder's, or a fresh one where a library wrote that.

    Ours also names the repository. The text of a user's card stays as it is.
    """
    author = author_of(text)
    if author == "the user" and base is None:
        return text
    text = card_of(folder, base, None, ["hrpo"]) if author == "a library" else text
    card = ModelCard(text, ignore_metadata_errors=True)
    named = card.data.get("base_model") or BASE
    if base is not None:
        card.data["base_model"] = base
    return str(card) if author == "the user" else str(card).replace(named, base or named).replace(HERE, repo_id)


def _refuse_paths(files: Files, paths: list[str]) -> None:
    """Raise `InputError` if a text names one of these paths, or one within."""
    for name, content in files.items():
        if name in VOCABULARIES or name.endswith(".safetensors"):
            continue
        text = content.decode() if isinstance(content, bytes) else content.read_text(errors="replace")
        for path in paths:
            spelled = "|".join(map(re.escape, {path, json.dumps(path)[1:-1]}))  # JSON escapes what is not ASCII
            # Not the end of a web address or the start of a longer name.
            local = os.path.isabs(path) and path != os.sep
            named = local and re.search(rf"(?<![\w.])(?:{spelled})(?![\w-])", text)
            require(not named, f"{name} names {path}, a path of this machine; remove it there, and push again.")


def check_name(repo_id: str) -> None:
    """Raise `InputError` unless `repo_id` is owner/name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"{repo_id!r} is not a name for the hub: {' '.join(str(error).split())}") from None
    text = f"expected owner/name, got {repo_id!r}: the owner is your user name or an organization."
    require(repo_id.count("/") == 1, text)


def check_token(token: str | None = None) -> None:
    """Raise `InputError` if no token is given or known to huggingface_hub."""
    require(
        token or get_token(),
        "no Hugging Face token was found, and pushing requires one that may write: log in by `hf auth login`, or set "
        "HF_TOKEN.",
    )


@contextmanager
def asking_the_hub(what: str) -> Iterator[None]:
    """Within, whatever fails is a `SaveError`, which says so; only the hub is asked there.

    Args:
        what: is done, as in "pushing to owner/name".
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of httpx, hf_xet and huggingface_hub, which have no parent in common
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        lines = [line for line in str(cause).splitlines() if line.strip() and "more information" not in line]
        why = " ".join([*lines[:1], *lines[1:][-1:]]) or type(cause).__name__
        raise SaveError(f"{what} failed: {why.rstrip('.')}.") from error


def files_on_hub(api: HfApi, repo_id: str, revision: str | None) -> set[str]:
    """The files of a repository at a revision; empty where one of them does not exist."""
    try:
        info = api.model_info(repo_id, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return set()
    return {one.rfilename for one in info.siblings or ()} - {".gitattributes"}


def open_repository(api: HfApi, repo_id: str, private: bool | None) -> str:
    """Create a repository, if it does not exist; returns its id.

    Raises:
        InputError: it was to be private, and exists and is public.
    """
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    text = f"{name} exists and is public; change that in its settings on the hub, or push elsewhere."
    require(not private or api.model_info(name).private is not False, text)
    return name


def push(
    files: Files,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    others: Literal["refuse", "delete", "keep"] = "refuse",
    message: str = "Push by hrpo_patches",
) -> str:
    """Push files to a repository of the hub, which is created if need be, in one commit.

    Args:
        files: from `files_of`.
        repo_id: owner/name.
        private: whether a repository that does not exist yet is created private.
        revision: the branch, created if need be; by default main.
        token: by default the one that huggingface_hub knows.
        others: what to do about a repository, or a branch, that holds files: refuse it, delete those that are not
            pushed, or keep them beside.
        message: of the commit.

    Returns:
        The URL of the repository, at the revision.

    Raises:
        InputError: the token is missing, the repository holds files, or it is public and was to be private.
        SaveError: the hub cannot be reached or refuses the push.
    """
    check_token(token)
    api = HfApi(token=token)
    with asking_the_hub(f"pushing to {repo_id}"):
        existing = files_on_hub(api, repo_id, revision)
        names = ", ".join(sorted(existing)[:4]) + (", ..." if len(existing) > 4 else "")
        require(
            not existing or others != "refuse",
            f"{repo_id} already holds files ({names}); push to another name or another --revision, or replace them by "
            f"--overwrite.",
        )
        repo_id = open_repository(api, repo_id, private)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        stale = files_on_hub(api, repo_id, revision) - set(files) if others != "keep" else set()  # or what main has
        api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, content) for name, content in files.items()),
                *(CommitOperationDelete(name) for name in sorted(stale)),
            ],
            commit_message=message,
            revision=revision,
        )
    return f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision is not None else "")
