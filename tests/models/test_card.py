"""A saved model's card says how to load it and how it thinks, and names nothing of a machine."""

import pytest
from huggingface_hub import ModelCard
from runs import small_trainer
from tiny import tiny_model

from hrpo_patches.models.card import PAPER, public_name, write_card
from hrpo_patches.models.smollm2 import SMOLLM2, cache_folder


@pytest.mark.parametrize("peft", [True, False], ids=["adapter", "model"])
def test_a_card_names_the_paper_the_marker_and_how_to_load_it_and_no_path(tmp_path, peft):
    model = tiny_model("llama", thinking={"r_min": 0.5, "r_max": 0.9})
    model.config._name_or_path = str(tmp_path / "base")
    options = {} if peft else {"peft_config": None, "beta": 0.0}
    trainer = small_trainer(tmp_path / "run", model=model, answer_start="###", save_strategy="steps", **options)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
        card = ModelCard.load(folder / "README.md", ignore_metadata_errors=True)
        text = str(card)
        assert PAPER in text and "`###`" in text and "0.9" in text and "arXiv 2505.18454" in text
        assert ("load_adapter(" in text) == peft and ("AutoModelForCausalLM.from_pretrained" in text) != peft
        assert str(tmp_path) not in text and "None" not in text and "More Information" not in text
        assert card.data.library_name == ("peft" if peft else "transformers") and "hrpo" in card.data.tags


def test_a_card_that_a_user_wrote_is_kept_and_one_of_a_library_is_not(tmp_path):
    model = tiny_model("llama")
    (tmp_path / "config.json").write_text(model.config.to_json_string())
    own = f"# My model\n\nAfter {PAPER}, trained with hrpo_patches.\n"
    for before, kept in ((own, True), ("# Model Card for Model ID\n", False), ("", False)):
        (tmp_path / "README.md").write_text(before)
        write_card(tmp_path, None, None, ["hrpo"])
        assert ((tmp_path / "README.md").read_text() == own) == kept
    write_card(tmp_path, "someone/base", None, ["hrpo"])
    assert "base_model: someone/base" in (tmp_path / "README.md").read_text()  # ours, which is written again


@pytest.mark.parametrize("residual", ["projection", None], ids=["thinking", "plain"])
def test_a_run_keeps_the_card_that_a_user_wrote_in_its_folder(tmp_path, residual):
    (tmp_path / "README.md").write_text("# My model\n\nNotes.\n")
    model = tiny_model("llama", thinking=None)
    trainer = small_trainer(tmp_path, model=model, residual=residual, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    assert "# My model\n\nNotes.\n" in (tmp_path / "README.md").read_text()


def test_only_a_hub_id_is_public():
    assert public_name("Qwen/Qwen2.5-1.5B-Instruct") == "Qwen/Qwen2.5-1.5B-Instruct"
    assert public_name(str(cache_folder() / SMOLLM2)) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert public_name("/home/someone/model") is None and public_name("./model") is None and public_name("") is None
