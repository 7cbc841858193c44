"""The notebook runs from its first cell to its last on a tiny model, and is stored without what a run leaves in it."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from tiny import byte_tokenizer, tiny_model

FILE = Path(__file__).parents[1] / "notebooks" / "hrpo.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(FILE, as_version=4)


def test_the_notebook_runs_on_a_tiny_model_and_shows_tables_and_a_picture(notebook, tmp_path, monkeypatch):
    tiny_model("llama", thinking=False, max_position_embeddings=1024).save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    monkeypatch.setenv("HRPO_NOTEBOOK_MODEL", str(tmp_path / "tiny"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}}).execute()
    shown = [output.data for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
    tables = [data["text/plain"] for data in shown if "text/html" in data]
    assert [re.findall("reward|nearest words|control", table)[0] for table in tables[-3:]] == [
        "reward",
        "nearest words",
        "control",
    ]
    assert all(control in tables[-1] for control in ("live", "zeroed", "off"))
    assert [data for data in shown if "image/png" in data]
    assert list(tmp_path.glob("hrpo-*/adapter_model.safetensors"))


def test_the_notebook_is_stored_without_outputs_and_without_paths_of_a_machine(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None and not cell.metadata
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert not re.findall(r"/(?:home|root|work|Users|tmp|content|kaggle)/|[A-Z]:\\\\", FILE.read_text())
    assert json.dumps(json.loads(FILE.read_text()), indent=1, ensure_ascii=False) + "\n" == FILE.read_text()
