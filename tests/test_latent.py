"""The experiment on credit through time: its data, its arms and its file of results."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, tiny_model

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
    flags = ["--runs", tmp_path, "--out", out, "--written", 2, "--taught", 2, "--product", 1, "--width", 16]
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


def loaded(name, monkeypatch):
    monkeypatch.syspath_prepend(str(PATH.parent))
    spec = importlib.util.spec_from_file_location(name, PATH.with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_grpo_begins_with_the_model_that_has_thought_and_rewards_nothing_but_the_answer(tmp_path, monkeypatch, capsys):
    grpo = loaded("latent_grpo", monkeypatch)
    latent, out = grpo.latent, tmp_path / "grpo.jsonl"
    taught = ["--runs", tmp_path, "--out", tmp_path / "out.jsonl", "--arms", "all", "k1", "--written", 1]
    taught += [
        "--replaced",
        1,
        "--product",
        1,
        "--batch_size",
        4,
        "--batch_size_start",
        4,
        "--every",
        1,
        "--tests",
        20,
    ]
    latent.main(list(map(str, taught)))
    assert grpo.tokenizer_of()("e3 e59 e0 _ _")["input_ids"] == [3, 59, 0, latent.BLANK, latent.BLANK]
    assert grpo.tokenizer_of().get_vocab()["."] == latent.FILLER
    assert grpo.right([[62, 7, 63], [62, 7], [7, 63], [62, 8, 63]], ["e7"] * 4) == [1.0, 0.0, 0.0, 0.0]
    flags = ["--runs", tmp_path, "--out", out, "--seeds", 0, "--steps", 2, "--batch_size", 16, "--length", 8]
    flags = list(map(str, [*flags, "--form", 2, "--tests", 20]))
    (weights,) = tmp_path.glob("all-*.safetensors")
    defaults = latent.parsed(["--runs", str(tmp_path)])
    weights.rename(latent.weights_of("all", defaults, 0, latent.options_of(defaults)))
    grpo.main(flags)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["passes"] for row in rows] == ["1", "all"] and rows[0]["before"] == rows[1]["before"]
    assert [len(row["log"]) for row in rows] == [2, 2]
    assert [row["log"][0]["kl"] for row in rows] == pytest.approx([0, 0], abs=1e-5)
    assert rows[0]["log"][0]["reward"] == rows[1]["log"][0]["reward"]
    grpo.main(flags)
    assert len(out.read_text().splitlines()) == 2 and "done already" in capsys.readouterr().out
    report = loaded("latent_report", monkeypatch)
    report.main(["--results", str(tmp_path / "out.jsonl"), "--grpo", str(out), "--png", str(tmp_path / "latent.png")])
    printed = capsys.readouterr().out
    assert "| `all` | **" in printed and "| 1 | " in printed and "swapped" in printed
    assert (tmp_path / "latent.png").stat().st_size > 10_000


def test_the_cost_benchmark_measures_every_number_of_passes_and_the_drift(tmp_path, monkeypatch, capsys):
    tiny_model("llama", thinking=False).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    bench = loaded("passes", monkeypatch)
    flags = ["--model_name", str(tmp_path / "base"), "--thoughts", "4", "--out", str(tmp_path / "cost.json")]
    bench.main([*flags, "--rounds", "2"])
    (found,) = json.loads((tmp_path / "cost.json").read_text())["costs"]
    assert len(found["rounds"]) == 2 and all(set(row) == set(bench.KINDS) for row in found["rounds"])
    bench.main([*flags, "--drift"])
    drift = json.loads((tmp_path / "cost.json").read_text())
    assert drift["float32, k = 2"]["largest"] < 1e-3 and drift["bfloat16, k = all"]["largest"] < 1
