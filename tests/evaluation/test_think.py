"""A look into one completion shows what the model really did."""

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console
from runs import small_trainer
from tiny import byte_tokenizer, tiny_model

from hrpo_patches import load_adapter
from hrpo_patches.commands.main import main
from hrpo_patches.evaluation.think import draw, table_of, think, visible
from hrpo_patches.thinking.backbone import is_untrained
from hrpo_thinking.errors import InputError

LIVELY = {"r_min": 0.5, "r_max": 0.9}


@pytest.fixture
def base(tmp_path, family):
    model = tiny_model(family, thinking=False)
    model.config.thinking = None
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("residual", ["projection", "embedding"])
def test_each_token_has_its_own_a_words_and_entropy(family, tokenizer, residual):
    model = tiny_model(family, thinking=LIVELY | {"residual": residual, "answer_start": "a"})
    thoughts = think(model, tokenizer, "Hi", max_new_tokens=20, temperature=1.0, top=4, seed=3)
    torch.manual_seed(3)
    ids = tokenizer("Hi", return_tensors="pt")
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    wanted = {"max_new_tokens": 20, "thinking": True, "return_dict_in_generate": True, "output_scores": True}
    out = model.generate(**ids, **wanted, **sampling, tokenizer=tokenizer)
    tokens = out.sequences[0, 2:].tolist()
    assert [thought.token for thought in thoughts] == [tokenizer.decode([token]) for token in tokens]
    assert [thought.share for thought in thoughts] == out.thinking_ratio[0].tolist()
    assert [thought.thinks for thought in thoughts] == out.thinking_mask[0].tolist()
    embeddings = model.get_input_embeddings().weight
    for c, thought in enumerate(thoughts):
        p = out.scores[c][0].softmax(-1)
        assert thought.entropy == pytest.approx(-(p * p.clamp(min=1e-30).log()).sum().item(), abs=1e-4)
        state = out.thinking_states[0, c]
        s = model.model.projected_residual(state) if residual == "projection" else state
        best = torch.cosine_similarity(s, embeddings).topk(4)
        expected = [tokenizer.decode([i]) for i in best.indices.tolist()] if thought.thinks else []
        assert [word for word, _ in thought.words] == expected
        assert [cosine for _, cosine in thought.words] == pytest.approx(
            best.values.tolist()[: len(expected)], abs=1e-5
        )


def test_greedy_is_greedy_and_takes_no_random_numbers(tokenizer):
    model = tiny_model("llama", thinking=LIVELY)
    one, other = (think(model, tokenizer, "Hi", max_new_tokens=8, seed=seed) for seed in (1, 2))
    assert one == other and len(one) == 8


def test_numbers_out_of_range_are_refused(tokenizer):
    model = tiny_model("llama")
    for wrong in ({"max_new_tokens": 0}, {"top": 0}):
        with pytest.raises(InputError, match="must be 1 or more"):
            think(model, tokenizer, "Hi", **wrong)
    for wrong in ({"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": 1e-40}, {"seed": -1}):
        with pytest.raises(InputError, match="temperature must be 0, for greedy, or 0.01 or more, and seed"):
            think(model, tokenizer, "Hi", **wrong)
    with pytest.raises(InputError, match="one of them is empty"):
        think(model, tokenizer, "")


def test_the_table_and_the_picture_hold_any_token(tokenizer, tmp_path):
    model = tiny_model("llama", thinking=LIVELY)
    thoughts = think(model, tokenizer, "Hi", max_new_tokens=45, temperature=1.0)
    thoughts[0].token, thoughts[1].token = "[bold]$x_1$ ", "\n"
    console = Console(width=120, record=True)
    console.print(table_of(thoughts, "[red]a title"))
    text = console.export_text()
    assert "[red]a title" in text and "[bold]$x_1$·" in text and "⏎" in text
    assert f"{thoughts[0].share:.4f}" in text and f"{thoughts[0].entropy:.2f}" in text
    picture = imread(draw(thoughts, "$ unbalanced", tmp_path / "t.png"))
    assert picture.std() > 0.05 and picture.shape[0] > picture.shape[1] / 2  # three rows


def test_an_empty_token_is_still_seen():
    assert visible("") == "∅" and visible("a b\n\t") == "a·b⏎\\x09"


def test_only_fresh_weights_are_called_untrained(base, tmp_path):
    trainer = small_trainer(tmp_path / "run", model=tiny_model("llama", thinking=LIVELY))
    assert is_untrained(trainer.model)
    trainer.train()
    trainer.save_model()
    assert not is_untrained(trainer.model)
    trained = load_adapter(tiny_model("llama"), tmp_path / "run")
    assert not is_untrained(trained)
    trained.get_base_model().model.thinking_projection.modules_to_save.default.reset_parameters()
    assert is_untrained(trained)  # one that is used and fresh is enough
    trained.config.thinking["residual"] = "embedding"
    assert not is_untrained(trained)  # which does not use the projection


def test_the_command_looks_into_a_base_an_adapter_and_a_merged_model(base, tmp_path, capsys):
    command = ["think", "--prompt", "Hi [there]", "--max_new_tokens", "5"]
    assert main([*command, str(base)]) == 0
    shown = capsys.readouterr().out
    assert "[there]" in shown and "are fresh, not trained" in shown

    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, thinking=LIVELY)
    trainer = small_trainer(tmp_path / "run", model=model, residual="embedding", answer_start="##")
    trainer.train()
    trainer.save_model()
    assert main([*command, str(tmp_path / "run"), "--png", str(tmp_path / "a.png")]) == 0
    adapter = capsys.readouterr().out
    assert "are fresh" not in adapter and "a.png" in adapter and (tmp_path / "a.png").is_file()
    assert "Asked without an instruction" in adapter  # of a trainer in Python, which records no prompt
    assert main(["merge", str(tmp_path / "run"), str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    assert main([*command, str(tmp_path / "merged")]) == 0
    merged = capsys.readouterr().out
    rows = [[line for line in text.splitlines() if "│" in line] for text in (adapter, merged)]
    assert rows[0] == rows[1] and len(rows[0]) == 5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--png", "old.png"], "old.png exists already; give another --png"),
        (["--png", "new.pdf"], "needs a name that ends in .png"),
        (["--png", "nowhere/new.png"], "nowhere is not a folder"),
        (["--base", "other"], "is not an adapter, so it has no base model"),
        (["--max_new_tokens", "0"], "must be 1 or more"),
    ],
)
def test_what_cannot_work_is_a_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.png").write_text("mine")
    tiny_model("llama", thinking=False).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    assert main(["think", "base", "--prompt", "Hi", *arguments]) == 2
    assert sentence in capsys.readouterr().err and (tmp_path / "old.png").read_text() == "mine"


def test_a_damaged_adapter_config_is_a_sentence(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{")
    assert main(["think", str(tmp_path), "--prompt", "Hi"]) == 2
    assert "adapter_config.json is damaged" in capsys.readouterr().err
