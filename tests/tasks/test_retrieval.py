"""Documents for questions: the nearest by BM25, from the row or from a corpus."""

import json

import pytest

from hrpo_patches import extras
from hrpo_patches.tasks.retrieval import Retriever, read_corpus, with_retrieved
from hrpo_thinking.errors import InputError

DOCUMENTS = [
    {"title": "Tarn", "text": "The river Tarn meets the sea at Port Ellery."},
    {"title": "Moreau", "text": "Ida Moreau was born in Lyon."},
    {"id": 7, "contents": "Bats are mammals."},
    {"title": "Everest", "text": "Everest is the highest mountain."},
]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i, part in enumerate((DOCUMENTS[:2], DOCUMENTS[2:])):
        (folder / f"{i}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return folder


def question(text):
    return {"question": text, "answer": ["x"]}


def test_a_corpus_is_a_file_or_a_folder_of_them(corpus):
    documents = read_corpus(corpus)
    assert documents[0] == "Tarn: The river Tarn meets the sea at Port Ellery." and documents[2] == "Bats are mammals."
    assert read_corpus(corpus / "0.jsonl") == documents[:2]


def test_the_nearest_document_comes_first(corpus):
    retriever = Retriever(read_corpus(corpus))
    (born,), (mountain,) = (
        retriever.top([text], 1) for text in ("Where was Ida Moreau born?", "The highest mountain?")
    )
    assert born[0].startswith("Moreau") and mountain == ["Everest: Everest is the highest mountain."]
    both = retriever.top(["Where was Ida Moreau born?", "The highest mountain?"])
    assert [documents[0] for documents in both] == [born[0], mountain[0]]
    assert len(retriever.top(["Zzyzx?"])[0]) == 3 and len(retriever.top(["bats"], 9)[0]) == 4


def test_a_question_without_documents_gets_the_three_nearest_of_the_corpus(corpus):
    (found,) = with_retrieved([question("Where does the Tarn meet the sea?")], [{}], str(corpus))
    lines = found["question"].splitlines()
    assert lines[0].startswith("[1] Tarn: ") and len(lines) == 4 and lines[3] == "Where does the Tarn meet the sea?"


def test_of_many_documents_of_its_own_a_question_keeps_the_three_nearest():
    row = {"context": [f"{document.get('title', 'Bats')} {document.get('text', 'fly')}" for document in DOCUMENTS]}
    (found,) = with_retrieved([question("Where was Ida Moreau born?")], [row], None)
    assert found["question"].startswith("[1] Moreau Ida Moreau was born") and found["question"].count("[") == 3


def test_what_cannot_be_searched_is_one_sentence(corpus, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="'Where\\?' comes without documents; give a folder of them with --corpus"):
        with_retrieved([question("Where?")], [{}], None)
    with pytest.raises(InputError, match="the corpus .*nowhere does not exist"):
        with_retrieved([question("Where?")], [{"context": ["x"]}], str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="folder without .jsonl files"):
        read_corpus(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no documents"):
        read_corpus(tmp_path / "empty.jsonl")
    (tmp_path / "empty.jsonl").write_text('{"title": "x"}')
    with pytest.raises(InputError, match=r"line 1 has \['title'\], but a document needs 'text' or 'contents'"):
        read_corpus(tmp_path / "empty.jsonl")
    with pytest.raises(InputError, match="hold no words to search for"):
        Retriever(["the", "a"])
    with pytest.raises(InputError, match="at least one document"):
        Retriever([])
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="retrieval needs bm25s; run: pip install"):
        Retriever(["x"])


def test_questions_with_and_without_documents_of_their_own_may_stand_side_by_side(corpus):
    problems = [question("Where was Ida Moreau born?"), question("Which mountain?"), question("Where was Ida born?")]
    found = with_retrieved(problems, [{}, {"context": ["The only one."]}, {}], str(corpus))
    assert found[1]["question"] == "[1] The only one.\nWhich mountain?"
    assert all(found[i]["question"].startswith("[1] Moreau: ") for i in (0, 2))
