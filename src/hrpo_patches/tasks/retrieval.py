"""Gives questions their documents: the row's own, else the nearest of a corpus by BM25."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.progress import track

from hrpo_patches.extras import require_package
from hrpo_patches.tasks.base import Problem, Row
from hrpo_patches.tasks.qa import TOP, documents_of, with_documents
from hrpo_patches.tasks.sources import json_rows
from hrpo_thinking.errors import InputError


class Retriever:
    """BM25 (bm25s) over documents; without English stop words.

    Raises:
        InputError: bm25s is not installed, or `documents` is empty.
    """

    def __init__(self, documents: list[str]) -> None:
        require_package("bm25s", "retrieval")
        if not documents:
            raise InputError("the corpus must hold at least one document.")
        import bm25s

        self.documents = documents
        self._tokenize = bm25s.tokenize
        self._index = bm25s.BM25()
        try:
            self._index.index(bm25s.tokenize(documents, show_progress=False), show_progress=False)
        except ValueError:
            raise InputError("the documents hold no words to search for, but empty ones and stop words.") from None

    def top(self, questions: list[str], count: int = TOP, progress: bool = False) -> list[list[str]]:
        """For each question the `count` nearest documents, nearest first; with a progress bar if asked for."""
        queries: Any = self._tokenize(questions, show_progress=False, return_ids=False)
        count = min(count, len(self.documents))
        found, _ = self._index.retrieve(queries, k=count, show_progress=progress)
        return [[self.documents[i] for i in row] for row in found]


def read_corpus(path: Path) -> list[str]:
    """The documents of a corpus: a `.jsonl` file, or a folder of them, with `text` or `contents`, perhaps a `title`.

    Raises:
        InputError: it does not exist, holds no documents, or a row has no text.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not path.exists() or not files:
        raise InputError(f"the corpus {path} does not exist, or is a folder without .jsonl files.")
    documents = [_document(row, where) for file in files for row, where in json_rows(file)]
    if not documents:
        raise InputError(f"the corpus {path} holds no documents.")
    return documents


def _document(row: Row, where: str) -> str:
    body = row.get("text") or row.get("contents")
    if not isinstance(body, str) or not body.strip():
        raise InputError(f"{where} has {sorted(row)}, but a document needs 'text' or 'contents'.")
    return f"{row['title']}: {body}" if row.get("title") else str(body)


def _own(row: Row, question: str) -> list[str]:
    try:
        return documents_of(row)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the question {question!r} has a context that cannot be read: {error}.") from None


def with_retrieved(problems: list[Problem], rows: list[Row], corpus: str | None) -> list[Problem]:
    """The problems with their documents before the question: of the row's own the nearest three, else of the corpus.

    Raises:
        InputError: a row has no documents and no corpus was given.
    """
    if corpus is not None and not Path(corpus).exists():
        raise InputError(f"the corpus {corpus} does not exist.")
    documents = [_own(row, problem["question"]) for row, problem in zip(rows, problems, strict=True)]
    bare = [i for i, own in enumerate(documents) if not own]
    if bare and corpus is None:
        question = problems[bare[0]]["question"]
        raise InputError(f"the question {question!r} comes without documents; give a folder of them with --corpus.")
    if bare:
        found = Retriever(read_corpus(Path(str(corpus)))).top([problems[i]["question"] for i in bare], progress=True)
        for i, nearest in zip(bare, found, strict=True):
            documents[i] = nearest
    many = [i for i, own in enumerate(documents) if len(own) > TOP]
    for i in track(many, description="Choosing documents") if many else []:
        (documents[i],) = Retriever(documents[i]).top([problems[i]["question"]])
    return [
        {"question": with_documents(problem["question"], own), "answer": problem["answer"]}
        for problem, own in zip(problems, documents, strict=True)
    ]
