"""Gives questions their documents: the row's own, else the nearest of a corpus by BM25; knows texts, no models."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hrpo_patches.errors import InputError
from hrpo_patches.sources import json_rows
from hrpo_patches.tasks.base import Problem, Row
from hrpo_patches.tasks.qa import TOP, documents_of, with_documents


class Retriever:
    """BM25 (bm25s) over documents; English stop words are left out.

    Raises:
        InputError: bm25s is not installed, or there are no documents.
    """

    def __init__(self, documents: list[str]) -> None:
        if find_spec("bm25s") is None:
            raise InputError("retrieval needs bm25s; run: pip install 'hrpo_patches[rag]'")
        if not documents:
            raise InputError("there are no documents to search.")
        import bm25s

        self.documents = documents
        self._tokenize = bm25s.tokenize
        self._index = bm25s.BM25()
        self._index.index(bm25s.tokenize(documents, show_progress=False), show_progress=False)

    def top(self, question: str, count: int = TOP) -> list[str]:
        """The `count` nearest documents, nearest first."""
        query: Any = self._tokenize([question], show_progress=False, return_ids=False)
        count = min(count, len(self.documents))
        found, _ = self._index.retrieve(query, k=count, show_progress=False)
        return [self.documents[i] for i in found[0]]


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
    if not body:
        raise InputError(f"{where} has {sorted(row)}, but a document needs 'text' or 'contents'.")
    return f"{row['title']}: {body}" if row.get("title") else str(body)


def with_retrieved(problems: list[Problem], rows: list[Row], corpus: str | None) -> list[Problem]:
    """The problems with their documents before the question: of the row's own the nearest three, else of the corpus.

    Raises:
        InputError: a row has no documents and there is no corpus.
    """
    retriever = Retriever(read_corpus(Path(corpus))) if corpus is not None else None
    found: list[Problem] = []
    for problem, row in zip(problems, rows, strict=True):
        own = documents_of(row)
        if len(own) <= TOP and own:
            documents = own
        elif own or retriever is not None:
            source = Retriever(own) if own else retriever
            documents = source.top(problem["question"]) if source is not None else []
        else:
            raise InputError(
                f"the question {problem['question']!r} comes without documents; give a folder of them with --corpus."
            )
        found.append({"question": with_documents(problem["question"], documents), "answer": problem["answer"]})
    return found
