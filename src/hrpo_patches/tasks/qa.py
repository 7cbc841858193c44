"""Questions with a name for an answer and documents to find it in: NQ, TriviaQA, HotpotQA, 2WikiMultiHopQA, Bamboogle.

The hub's rows are those of FlashRAG (Jin et al., arXiv 2405.13576).
"""

from __future__ import annotations

from typing import Any

from hrpo_patches.tasks.base import Problem, Row, Task, Unreadable, steps, text
from hrpo_patches.tasks.graders.names import exact_match

HUB = "RUC-NLPIR/FlashRAG_datasets"
TOP = 3  # documents that a question comes with


def documents_of(row: Row) -> list[str]:
    """The documents that a row brings with it, each a title and a text; none if it has no `context`.

    A context is {"title": [...], "sentences" or "content": [...]}, a list of [title, sentences], of {"title", "text"}
    or of texts, or one text.
    """
    metadata = row.get("metadata")
    context: Any = row.get("context") or (metadata.get("context") if isinstance(metadata, dict) else None)
    if isinstance(context, dict):
        bodies = context.get("sentences") or context.get("content") or context.get("text") or []
        titles = context.get("title") or [""] * len(bodies)
        context = list(zip(titles, bodies, strict=False))
    documents = [context] if isinstance(context, str) else [_document(item) for item in context or []]
    return [document for document in documents if document.strip()]


def _document(item: str | dict[str, Any] | list[Any] | tuple[Any, ...]) -> str:
    if isinstance(item, dict):
        item = item.get("title", ""), item.get("text") or item.get("contents") or ""
    if isinstance(item, str):
        return item
    title, body = (*item, "", "")[:2]
    body = body if isinstance(body, str) else " ".join(str(part).strip() for part in body or [])
    return f"{title}: {body}" if title else body


def with_documents(question: str, documents: list[str]) -> str:
    """The question after its documents, which are numbered."""
    numbered = [f"[{i}] {document}" for i, document in enumerate(documents, 1)]
    return "\n".join([*numbered, question])


def read(row: Row) -> Problem:
    """`golden_answers` or `answer`: a list of names, or one."""
    golds = row.get("golden_answers") or row.get("answer")
    golds = [golds] if isinstance(golds, str) else golds
    if not isinstance(golds, list) or not all(isinstance(gold, str) for gold in golds):
        raise Unreadable("needs a text, or a list of texts, as its answer")
    return {"question": text(row, "question"), "answer": golds}


def _task(name: str, train: tuple[str, ...], test: tuple[str, ...]) -> Task:
    return Task(
        name=name,
        train=tuple(f"{HUB}:{part}" for part in train),
        test=tuple(f"{HUB}:{part}" for part in test),
        shapes={("question", "golden_answers"): read, ("question", "answer"): read},
        instruction=steps(
            "Marie Curie", "Answer the question from the documents", "the answer alone, as short as possible"
        ),
        examples=(
            "[1] Blue Lake: Blue Lake lies in the Harlow hills and feeds the river Tarn.\n"
            "[2] Tarn: The Tarn meets the sea at Port Ellery.\n"
            "Where does the river that Blue Lake feeds meet the sea?\n"
            "Blue Lake feeds the Tarn, which meets the sea at Port Ellery. {marker} Port Ellery",
            "[1] The Glass Hour: The Glass Hour is a novel of 1911 by Ida Moreau.\n"
            "[2] Ida Moreau: Ida Moreau was born in Lyon.\nIn which city was the author of The Glass Hour born?\n"
            "Ida Moreau wrote it, and she was born in Lyon. {marker} Lyon",
        ),
        grader=exact_match,
        retrieval=True,
    )


RAG = _task("rag", ("nq@train", "hotpotqa@train"), ("hotpotqa@dev",))
NQ = _task("nq", ("nq@train",), ("nq@test",))
TRIVIAQA = _task("triviaqa", ("triviaqa@train",), ("triviaqa@test",))
HOTPOTQA = _task("hotpotqa", ("hotpotqa@train",), ("hotpotqa@dev",))
WIKI = _task("2wikimultihopqa", ("2wikimultihopqa@train",), ("2wikimultihopqa@dev",))
BAMBOOGLE = _task("bamboogle", (), ("bamboogle@test",))
