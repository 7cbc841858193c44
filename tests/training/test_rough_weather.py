"""What a run does when the world is not as it should be: what a person reads, and that checkpoints are whole."""

import json
import math
import shutil
import time

import processes
import pytest
import torch
from runs import run_of_sums, small_trainer
from safetensors.torch import load_file, save_file
from tiny import END, byte_tokenizer, tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hrpo_patches import HRPOTrainer, load_adapter
from hrpo_patches.commands.main import train
from hrpo_patches.tasks.prompts import with_prompts
from hrpo_thinking.errors import InputError

# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    options = {"group_size": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    options |= {"max_completion_length": 8, "temperature": 1, "save_steps": 1, "max_steps": 4}
    return ["train", *run_of_sums(tmp_path_factory.mktemp("rough"), 4, **options)]


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_resumes_to_the_end(words, folder, last, tmp_path):
    """The checkpoint loads, and the run that is resumed from it is the one that nothing befell."""
    base = AutoModelForCausalLM.from_pretrained(words[words.index("--model_name") + 1])
    load_adapter(base, folder / f"checkpoint-{last}")
    train([*words[1:], "--output_dir", str(folder), "--resume_from_checkpoint", "latest"])
    train([*words[1:], "--output_dir", str(tmp_path / "whole")])
    ours, theirs = weights(folder), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt"])
def test_a_disk_that_is_full_is_a_sentence_and_the_run_resumes_when_there_is_room(words, file, tmp_path):
    train([*words[1:], "--max_steps", "1", "--output_dir", str(tmp_path / "one")])
    sizes = sorted(path.stat().st_size for path in (tmp_path / "one" / "checkpoint-1").iterdir())
    room = (tmp_path / "one" / "checkpoint-1" / file).stat().st_size - 1
    assert room < sizes[-1]
    folder = tmp_path / "run"
    done = processes.run(processes.limited, 2, room, *words, "--output_dir", folder)
    assert done.returncode == 2
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert sentence.startswith(f"error: checkpoint-3 could not be written to {folder} (")
    assert "Traceback" not in done.stderr and "make room, and resume from the last one" in sentence
    assert_resumes_to_the_end(words, folder, 2, tmp_path)


def test_a_disk_that_is_full_at_the_end_is_a_sentence_and_the_last_checkpoint_is_whole(words, tmp_path):
    train([*words[1:], "--max_steps", "1", "--save_strategy", "no", "--output_dir", str(tmp_path / "one")])
    room = (tmp_path / "one" / "adapter_model.safetensors").stat().st_size - 1
    folder = tmp_path / "run"
    done = processes.run(processes.limited, 3, room, *words, "--save_steps", 3, "--output_dir", folder)
    assert done.returncode == 2 and "could not be written" in done.stderr and "Traceback" not in done.stderr
    assert_resumes_to_the_end(words, folder, 3, tmp_path)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_damaged_checkpoint_is_named_when_it_is_resumed(words, file, tmp_path):
    folder = tmp_path / "run"
    train([*words[1:], "--max_steps", "2", "--output_dir", str(folder)])
    damaged = folder / "checkpoint-2" / file
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    again = [*words[1:], "--output_dir", str(folder), "--resume_from_checkpoint"]
    with pytest.raises(InputError, match="cannot resume from .*checkpoint-2: a file is damaged"):
        train([*again, "latest"])
    train([*again, str(folder / "checkpoint-1")])
    assert (folder / "checkpoint-4").is_dir()


def test_a_damaged_model_is_a_sentence(words, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(words[words.index("--model_name") + 1], base)
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="could not be loaded: "):
        train([*words[1:], "--model_name", str(base), "--output_dir", str(tmp_path / "run")])


def test_a_log_that_finds_no_room_is_a_sentence_too(words, tmp_path):
    done = processes.run(processes.limited, 0, 1000, *words, "--save_steps", 9, "--output_dir", tmp_path / "run")
    log = tmp_path / "run" / "monitor.jsonl"
    assert done.returncode == 2 and f"error: {log} could not be written: File too large." in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_is_started_twice_in_one_folder_is_refused_and_the_first_goes_on(words, tmp_path):
    began, go, folder = tmp_path / "began", tmp_path / "go", tmp_path / "run"
    first = processes.start(processes.waiting, began, go, *words, "--output_dir", folder, out=tmp_path / "log")
    try:
        until = time.monotonic() + 120
        while not began.exists() and time.monotonic() < until and first.is_alive():
            time.sleep(0.05)
        with pytest.raises(InputError, match="another run is writing to"):
            train([*words[1:], "--output_dir", str(folder)])
    finally:
        go.touch()
        assert processes.wait([first]) == [0]
    train([*words[1:], "--output_dir", str(tmp_path / "whole")])
    ours, theirs = weights(folder), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert not (folder / ".lock").exists()


def test_a_run_that_is_refused_leaves_no_folder_behind(words, tmp_path):
    with pytest.raises(InputError, match="too few"):
        train([*words[1:], "--per_device_train_batch_size", "400", "--output_dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_to_is_a_sentence(words, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="run cannot be written to: Not a directory."):
        train([*words[1:], "--output_dir", str(tmp_path / "file" / "run")])


# --- prompts, completions, tokenizers --------------------------------------------------------------------------------


def speaks(model, token):
    """Let a model say one token, whatever it reads."""
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)), requires_grad=False)
        model.lm_head.bias[token] = 100.0
    return model


def test_completions_that_are_empty_train(tmp_path, tokenizer):
    model = speaks(tiny_model("llama", thinking={"r_min": 0.5, "r_max": 0.9}), tokenizer.convert_tokens_to_ids(END))
    trainer = small_trainer(tmp_path, model=model, max_steps=2)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["completions/max_length"] for row in rows] == [1, 1]
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)


@pytest.mark.parametrize("options", [{}, {"bptt": "sequential"}, {"bptt": 0}])
def test_a_run_whose_completions_never_think_trains(tmp_path, tokenizer, options):
    marker = tokenizer.convert_tokens_to_ids("####")
    model = speaks(tiny_model("llama", thinking={"r_min": 0.5, "r_max": 0.9}), marker)
    trainer = small_trainer(tmp_path, model=model, max_steps=2, **options)
    trainer.train()
    assert trainer.state.log_history[0]["embeds_ratio"] == 0.0  # of no position
    assert math.isfinite(trainer.state.log_history[0]["grad_norm"])


def test_a_hundred_thousand_problems_are_counted_with_a_bar(tokenizer, capsys, caplog):
    problems = [{"question": f"{i}?", "answer": "1"} for i in range(100_000)]
    rows = with_prompts(problems, lambda question: question, tokenizer, 5)
    assert len(rows) == 10_000 and rows[-1]["prompt"] == "9999?"
    assert "90000 of 100000 problems have prompts of more than 5 tokens and are skipped." in caplog.text
    assert "Counting tokens" in capsys.readouterr().out


def sentence_piece():
    """A unigram tokenizer as SentencePiece makes them: words begin with ▁, and rare characters are bytes."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<pad>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    words = ["▁", "▁#", "##", "###", "####", "▁####", "#", "#7", "▁a", "e", "t", "▁What", "is", "▁3", "7", "+", "?"]
    backend = Tokenizer(models.Unigram([*pieces, *((word, -3.0) for word in words)], unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def unpadded():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    return tokenizer


def added(special):
    tokenizer = byte_tokenizer()
    new = ["<answer>", "####!"] if not special else ["<|im_end|>"]
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in new])
    return tokenizer


TOKENIZERS = {
    "without a pad token": unpadded,
    "with added tokens": lambda: added(special=False),
    "with several end tokens": lambda: added(special=True),
    "of SentencePiece": sentence_piece,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_thinks_up_to_the_marker_whatever_its_tokenizer(kind, tied, tmp_path, monkeypatch):
    tokenizer = TOKENIZERS[kind]()
    ends = [tokenizer.eos_token_id, *([len(tokenizer) - 1] if "end" in kind else [])]
    size = {"vocab_size": len(tokenizer) + 3, "eos_token_id": ends, "pad_token_id": tokenizer.pad_token_id}
    model = tiny_model("llama", thinking={"r_min": 0.5, "r_max": 0.9}, tie_word_embeddings=tied, **size)
    model.generation_config.eos_token_id = ends
    vocabulary = tokenizer.get_vocab()
    likely = [token for text, token in vocabulary.items() if "#" in text] + ends
    model.lm_head.register_forward_hook(lambda module, args, logits: logits.index_add(-1, *biased(likely, logits)))
    made = []
    stock = HRPOTrainer._complete
    monkeypatch.setattr(HRPOTrainer, "_complete", lambda *args, **more: made.append(stock(*args, **more)) or made[-1])
    trainer = small_trainer(
        tmp_path, model=model, tokenizer=tokenizer, max_completion_length=12, max_steps=4, temperature=1.0
    )
    trainer.train()
    answered = ended = 0
    for one in made:
        for tokens, mask in zip(one.tokens, one.thinking.mask.tolist(), strict=True):
            said = ["####" in tokenizer.decode(tokens[: n + 1], skip_special_tokens=False) for n in range(len(tokens))]
            alive = len(tokens) - (tokens[-1] in ends)
            assert mask[:alive] == [not seen for seen in said[:alive]]
            answered, ended = answered + any(said), ended + (tokens[-1] in ends)
            assert not set(tokens[:-1]) & set(ends)
    assert answered > 5 and ended > 0
    last = trainer.state.log_history[-2]
    assert math.isfinite(last["loss"]) and last["projection/grad_norm"] > 0
    again = load_adapter(
        tiny_model("llama", thinking=None, tie_word_embeddings=tied, **size), saved(trainer, tmp_path)
    )
    assert again.generation_config.thinking


def biased(tokens, logits):
    """What `index_add` needs to make these tokens likely."""
    return torch.tensor(tokens), torch.full((*logits.shape[:-1], len(tokens)), 2.0)


def saved(trainer, folder):
    trainer.save_model(str(folder / "saved"))
    return folder / "saved"


# --- adapters --------------------------------------------------------------------------------------------------------


def cut(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_json(folder):
    (folder / "adapter_config.json").write_text("{")


def renamed(folder):
    held = weights(folder)
    moved = {name.replace("layers.0", "layers.7"): value for name, value in held.items()}
    save_file(moved, folder / "adapter_model.safetensors")


def resized(folder):
    held = weights(folder)
    name = next(name for name in held if "thinking_projection" in name)
    save_file(held | {name: torch.zeros(3, 3)}, folder / "adapter_model.safetensors")


def lora_resized(folder):
    held = weights(folder)
    name = next(name for name in held if "lora_A" in name)
    save_file(held | {name: torch.zeros(3, 3)}, folder / "adapter_model.safetensors")


def no_record(folder):
    (folder / "thinking_config.json").write_text("[1, 2]")


def escaping(folder):
    record = json.loads((folder / "thinking_config.json").read_text())
    (folder / "thinking_config.json").write_text(json.dumps(record | {"residual": "../../elsewhere"}))


DAMAGE = [
    (cut, "damaged"),
    (no_json, "adapter_config.json"),
    (renamed, "lacks|no place for"),
    (resized, "this base model needs"),
    (lora_resized, "another base model|damaged"),
    (no_record, "damaged"),
    (escaping, "asks for what is not there"),
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    return saved(small_trainer(folder), folder)


@pytest.mark.parametrize(("damage", "sentence"), DAMAGE)
def test_a_damaged_adapter_is_refused_in_a_sentence(damage, sentence, adapter, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    damage(folder)
    with pytest.raises(InputError, match=sentence) as refused:
        load_adapter(tiny_model("llama", thinking=None), folder)
    assert str(folder) in str(refused.value)
