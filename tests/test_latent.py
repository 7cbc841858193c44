"""The experiment on credit through time: its data, its arms, GRPO on top, its files of results and their report."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, tiny_model

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SMALL = "--taught 2 --product 1 --batch_size 4 --batch_size_start 4 --every 1 --tests 20".split()  # noqa: SIM905


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def benchmarks_import_each_other(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture
def latent():
    return loaded("latent")


@pytest.fixture
def data():
    return loaded("latent_words")


def test_the_table_is_that_of_the_alternating_group(data):
    table = data.alternating()
    identity = next(i for i in range(60) if torch.equal(table[i], torch.arange(60)))
    everything = torch.arange(60)
    assert torch.equal(table[:, identity], everything)
    assert all(sorted(row) == list(range(60)) for row in [*table.tolist(), *table.T.tolist()])
    a, b, c = torch.randint(60, (3, 500))
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])
    inverse = (table == identity).long().argmax(1)
    commutators = table[table[everything[:, None], everything], table[inverse[:, None], inverse]]
    assert len(commutators.unique()) == 60  # its commutators are all of it: it is not solvable


def test_words_for_testing_are_never_trained_on(data):
    trained = data.words_of(2000, 2, False, torch.Generator().manual_seed(0)).tolist()
    tested = data.words_of(300, 2, True, torch.Generator().manual_seed(1)).tolist()
    assert not {tuple(word) for word in trained} & {tuple(word) for word in tested}


def test_a_lesson_says_the_products_that_are_not_thought_and_the_answer(data):
    table, words = data.alternating(), torch.tensor([[3, 7, 11]])
    three = int(table[table[3, 7], 11])
    tokens, labels = data.lesson(words, table, 2)
    blanks = [data.BLANK] * (data.SLOTS - 3)
    assert tokens[0].tolist() == [3, 7, 11, *blanks, data.FILLER, data.FILLER, three, data.EQUALS, three]
    assert labels[0, data.SLOTS :].tolist() == [-100, -100, three, -100, three]
    _, labels = data.lesson(words, table, 3)
    assert labels[0, data.SLOTS :].tolist() == [-100] * 4 + [three]  # the product is the only loss
    tokens, labels = data.lesson(words, table, 0, steps=False)
    assert tokens[0, data.SLOTS :].tolist() == [data.EQUALS, three] and labels[0].max() == labels[0, -1] == three


def test_more_layers_add_nothing_at_the_start(latent, tmp_path):
    args = latent.parsed(["--runs", str(tmp_path), "--written", "1", "--width", "16"])
    tokens = torch.randint(60, (2, 30))
    two, five = (latent.model_of(latent.ARMS[name], args, 0).eval() for name in ("fillers", "fillers-5"))
    assert len(five.model.layers) == 5
    torch.testing.assert_close(two(tokens).logits, five(tokens).logits)


def test_the_projection_starts_where_it_gives_the_embedding_of_the_product(latent, data, tmp_path):
    args = latent.parsed(["--runs", str(tmp_path), "--written", "1"])
    model = latent.model_of(latent.ARMS["all"], args, 0)
    table = data.alternating()
    words = data.words_of(50, 24, True, torch.Generator().manual_seed(0))
    hidden = model.model(data.lesson(words, table, 0)[0]).last_hidden_state[:, data.SLOTS - 1 : -3]
    wanted = model.get_input_embeddings()(data.prefix_products(words, table))
    assert (model.model.thinking_projection(hidden) - wanted).norm() < 0.999 * wanted.norm()
    plain = latent.model_of(
        latent.ARMS["all"], latent.parsed(["--runs", str(tmp_path), "--written", "1", "--no-fit"]), 0
    )
    assert not torch.equal(plain.model.thinking_projection.weight, model.model.thinking_projection.weight)


def test_every_arm_runs_is_written_once_and_is_done_when_asked_again(latent, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(latent, "CURVED", (16,))
    out = tmp_path / "out.jsonl"
    flags = [*map(str, ["--runs", tmp_path, "--out", out, "--written", 2, "--width", 16]), *SMALL]
    latent.main(flags)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["arm"] for row in rows] == list(latent.ARMS)
    for row in rows:
        assert set(row["accuracy"]) == set(row["begun"]) == {"8", "16", "20", "23", "24"}
        assert ("controls" in row) == (row["residual"] is not None)
        assert len(row["curve"]) == {"written": 0, "none": 1}.get(row["arm"], 3)
    before = out.read_bytes()
    latent.main(flags)
    assert out.read_bytes() == before and "done already" in capsys.readouterr().out
    out.unlink()
    latent.main([*flags, "--arms", "k1"])  # is not trained again, either: its weights are there
    assert json.loads(out.read_text()) == next(row for row in rows if row["arm"] == "k1")
    latent.main([*flags, "--arms", "k1", "--curriculum", "readout"])
    assert len(out.read_text().splitlines()) == 2


def test_the_values_of_an_arm_do_not_depend_on_its_bptt_and_its_gradient_does(latent, data, tmp_path):
    args = latent.parsed(["--runs", str(tmp_path), "--written", "1", "--width", "16"])
    table, words = data.alternating(), torch.randint(60, (4, 6))
    values, gradients = [], []
    for name in ("k1", "k4", "all", "exact"):
        model = latent.model_of(latent.ARMS[name], args, 0)
        loss = latent.loss_of(model, latent.ARMS[name], words, table, 6)
        loss.backward()
        values.append(loss.item())
        gradients.append(model.model.layers[1].mlp.down_proj.weight.grad.clone())
    assert values == pytest.approx([values[0]] * 4, rel=1e-4)
    assert not torch.allclose(gradients[0], gradients[2], rtol=0.01) and not torch.allclose(gradients[0], gradients[1])
    assert (gradients[2] - gradients[3]).norm() < 5e-3 * gradients[2].norm()


def test_grpo_begins_with_the_model_that_has_thought_and_rewards_nothing_but_the_answer(
    data, tmp_path, capsys, monkeypatch
):
    grpo = loaded("latent_grpo")
    latent, out = grpo.latent, tmp_path / "grpo.jsonl"
    arms = ["--runs", tmp_path, "--out", tmp_path / "out.jsonl", "--arms", "all", "k1", "--written", 1, "--width", 16]
    monkeypatch.setattr(latent, "CURVED", (16,))
    latent.main([*map(str, arms), *SMALL])
    monkeypatch.setattr(latent, "TESTED", (8,))
    assert grpo.tokenizer_of()("e3 e59 e0 _ _")["input_ids"] == [3, 59, 0, data.BLANK, data.BLANK]
    assert grpo.tokenizer_of().get_vocab()["."] == data.FILLER
    assert grpo.right([[62, 7, 63], [62, 7], [7, 63], [62, 8, 63]], ["e7"] * 4) == [1.0, 0.0, 0.0, 0.0]
    flags = ["--runs", tmp_path, "--out", out, "--seeds", 0, "--steps", 2, "--batch_size", 16, "--length", 8]
    flags = list(map(str, [*flags, "--form", 2, "--tests", 20, "--written", 1, "--taught", 2]))
    grpo.main(flags)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["bptt"] for row in rows] == ["0", "exact"] and rows[0]["before"] == rows[1]["before"]
    assert [len(row["log"]) for row in rows] == [2, 2]
    assert [row["log"][0]["kl"] for row in rows] == pytest.approx([0, 0], abs=1e-5)
    assert rows[0]["log"][0]["reward"] == rows[1]["log"][0]["reward"]
    grpo.main(flags)
    assert len(out.read_text().splitlines()) == 2 and "done already" in capsys.readouterr().out
    report = ["--results", tmp_path / "out.jsonl", "--grpo", out, "--png", tmp_path / "latent.png"]
    loaded("latent_report").main(list(map(str, report)))
    printed = capsys.readouterr().out
    assert "| `all` | **" in printed and "| 0 | " in printed and "swapped" in printed
    assert (tmp_path / "latent.png").stat().st_size > 10_000


def test_the_cost_benchmark_measures_every_bptt_and_the_drift(tmp_path, capsys):
    tiny_model("llama", thinking=False).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    bench = loaded("bptt")
    flags = ["--model_name", str(tmp_path / "base"), "--thoughts", "4", "--out", str(tmp_path / "cost.json")]
    bench.main([*flags, "--rounds", "2"])
    (found,) = json.loads((tmp_path / "cost.json").read_text())["costs"]
    assert len(found["rounds"]) == 2 and all(set(row) == set(bench.KINDS) for row in found["rounds"])
    bench.main([*flags, "--drift"])
    drift = json.loads((tmp_path / "cost.json").read_text())
    assert drift["float32"]["largest"] < 1e-3 and drift["bfloat16"]["largest"] < 1
