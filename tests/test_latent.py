"""The experiment on credit through time: its data, its arms and its file of results."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[1] / "benchmarks" / "latent.py"


@pytest.fixture(scope="module")
def latent():
    spec = importlib.util.spec_from_file_location("latent", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_that_of_the_alternating_group(latent):
    table = latent.alternating()
    identity = next(i for i in range(60) if torch.equal(table[i], torch.arange(60)))
    everything = torch.arange(60)
    assert torch.equal(table[:, identity], everything)
    assert all(sorted(row) == list(range(60)) for row in [*table.tolist(), *table.T.tolist()])
    a, b, c = torch.randint(60, (3, 500))
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])
    assert (table[a, b] != table[b, a]).any()  # and its commutators are the whole group: it is not solvable
    inverse = (table == identity).long().argmax(1)
    commutators = table[table[everything[:, None], everything], table[inverse[:, None], inverse]]
    assert len(commutators.unique()) == 60


def test_words_for_testing_are_never_trained_on(latent):
    trained = latent.words_of(2000, 2, False, torch.Generator().manual_seed(0)).tolist()
    tested = latent.words_of(300, 2, True, torch.Generator().manual_seed(1)).tolist()
    assert not {tuple(word) for word in trained} & {tuple(word) for word in tested}


def test_a_lesson_says_the_products_that_are_not_thought_and_the_answer(latent):
    table = latent.alternating()
    words = torch.tensor([[3, 7, 11]])
    two = int(table[3, 7])
    three = int(table[two, 11])
    tokens, labels = latent.lesson(words, table, 2, latent.ARMS["all"])
    blanks = [latent.BLANK] * (latent.SLOTS - 3)
    assert tokens[0].tolist() == [3, 7, 11, *blanks, latent.FILLER, latent.FILLER, three, latent.EQUALS, three]
    assert labels[0, latent.SLOTS :].tolist() == [-100, -100, three, -100, three]
    tokens, labels = latent.lesson(words, table, 3, latent.ARMS["fillers"])
    assert labels[0, latent.SLOTS :].tolist() == [-100] * 4 + [three]  # the product is the only loss
    tokens, _ = latent.lesson(words, table, 0, latent.ARMS["none"])
    assert tokens[0, latent.SLOTS :].tolist() == [latent.EQUALS, three]


def test_more_layers_add_nothing_at_the_start(latent, tmp_path):
    args = latent.parsed(["--runs", str(tmp_path), "--written", "1", "--width", "16", "--out", str(tmp_path / "out")])
    tokens = torch.randint(60, (2, 30))
    two, five = (latent.begun(latent.ARMS[name], args, 0).eval() for name in ("fillers", "fillers-5"))
    assert len(five.model.layers) == 5
    torch.testing.assert_close(two(tokens).logits, five(tokens).logits)


def test_every_arm_runs_is_written_once_and_is_done_when_asked_again(latent, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    flags = ["--runs", tmp_path, "--out", out, "--written", 2, "--replaced", 2, "--product", 1, "--width", 16]
    flags = list(map(str, [*flags, "--batch_size", 4, "--batch_size_start", 4, "--every", 1, "--tests", 40]))
    latent.main(flags)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["arm"] for row in rows] == list(latent.ARMS)
    for row in rows:
        assert set(row["accuracy"]) == {"8", "16", "24"}
        assert ("controls" in row) == (row["residual"] is not None)
        assert len(row["curve"]) == {"written": 0, "none": 1}.get(row["arm"], 3)
    before = out.read_bytes()
    latent.main(flags)
    assert out.read_bytes() == before and "done already" in capsys.readouterr().out
    latent.main([*flags, "--arms", "k1", "--lr", "0.01"])
    assert len(out.read_text().splitlines()) == len(rows) + 1


def test_the_values_of_an_arm_do_not_depend_on_its_passes_and_its_gradient_does(latent, tmp_path):
    args = latent.parsed(["--runs", str(tmp_path), "--written", "1", "--width", "16"])
    table, words = latent.alternating(), torch.randint(60, (4, 6))
    values, gradients = [], []
    for name in ("k1", "k4", "all"):
        model = latent.begun(latent.ARMS[name], args, 0)
        loss = latent.loss_of(model, latent.ARMS[name], words, table, 6)
        loss.backward()
        values.append(loss.item())
        gradients.append(model.model.layers[1].mlp.down_proj.weight.grad.clone())
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)
    assert not torch.allclose(gradients[0], gradients[2], rtol=0.01) and not torch.allclose(gradients[0], gradients[1])
