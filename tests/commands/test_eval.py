"""`eval` as a person runs it: what it writes, how it resumes after a kill, and what it refuses."""

import json
import re
import shutil
from pathlib import Path

import processes
import pytest
from runs import small_trainer
from tiny import FAMILIES, byte_tokenizer, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hrpo_patches.commands import eval as evaluation
from hrpo_patches.commands.eval import main, parse, settings_of
from hrpo_patches.commands.main import main as cli
from hrpo_patches.engines import batches
from hrpo_patches.evaluation import answers
from hrpo_patches.evaluation.answers import marker_position
from hrpo_patches.tasks.problems import find_task, load_problems
from hrpo_patches.thinking.controls import CONTROLS
from hrpo_thinking.errors import InputError
from hrpo_thinking.marker import marker_table

MARKER = "a"  # which a random model says now and then


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, an adapter trained on it, and some problems."""
    folder = tmp_path_factory.mktemp("eval")
    model = tiny_model("llama", thinking=False)
    model.config.thinking = None
    model.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", thinking={"r_min": 0.5, "r_max": 0.9})
    trainer = small_trainer(folder / "adapter", model=model, answer_start=MARKER)
    trainer.train()
    trainer.save_model()
    rows = [{"question": f"{i}" * (1 + i % 5) + "?", "answer": f"#### {i}"} for i in range(12)]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def command(folder, tmp_path):
    """Flags of an evaluation, with more to come."""

    def flags(*more, out="out.json", adapter=True):
        model = ["--adapter", str(folder / "adapter")] if adapter else ["--model", str(folder / "base")]
        data = ["--dataset", str(folder / "problems.jsonl"), "--max_new_tokens", "24", "--batch_size", "5"]
        return [*model, *data, "--out", str(tmp_path / out), *more]

    return flags


def test_the_results_hold_everything_about_every_completion(command, tmp_path, capsys):
    results = main(command())
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(results))
    assert results["settings"]["task"] == "gsm8k" and results["answer_start"] == MARKER
    assert [problem["gold"] for problem in results["problems"]] == [[str(i)] for i in range(12)]
    samples = [problem["samples"] for problem in results["problems"]]
    assert all(len(row) == 1 for row in samples)
    for problem, (sample,) in zip(results["problems"], samples, strict=True):
        assert problem["prompt"].endswith("?\n") and set(sample) == {
            "completion",
            "answer",
            "right",
            "tokens",
            "marker",
        }
        assert (sample["marker"] is not None) == (MARKER in sample["completion"])
        assert sample["marker"] is None or sample["marker"] <= sample["tokens"] <= 24
    assert any(sample["marker"] for (sample,) in samples) and results["scores"]["total"] == 12
    shown = " ".join(capsys.readouterr().out.split())
    assert "accuracy 0.000 ± 0.000 (95%: 0.000 to 0.243)" in shown and "marker in" in shown
    assert not (tmp_path / "out.json.part").exists()


def test_thinking_is_what_it_was_trained_for_and_can_be_left_out(command, folder):
    soft, hard = (main(command(flag, out=f"{flag}.json")) for flag in ("--thinking", "--no-thinking"))
    assert [p["samples"] for p in soft["problems"]] != [p["samples"] for p in hard["problems"]]
    base = main(command("--no-thinking", "--answer_start", MARKER, out="base.json", adapter=False))
    assert base["answer_start"] == MARKER
    with pytest.raises(InputError, match="never trained to think, so it would think at random; add --no-thinking"):
        main(command(out="x.json", adapter=False))
    with pytest.raises(InputError, match="--answer_start '####' cannot be used .* thinking at 'a'; remove it"):
        main(command("--answer_start", "####", out="x.json"))


def test_samples_are_summed_up_as_pass_and_majority(command):
    sampled = ["--no-greedy", "--temperature", "1.0", "--samples", "4", "--limit", "3"]
    results = main(command(*sampled))
    assert {"pass@1", "pass@2", "pass@4", "majority@4"} <= results["scores"].keys() and results["scores"][
        "total"
    ] == 12
    for problem in results["problems"]:
        assert len({sample["completion"] for sample in problem["samples"]}) > 1
    again = main(command(*sampled, out="again.json"))
    assert again["problems"] == results["problems"]
    other = main(command(*sampled, "--seed", "7", out="other.json"))
    assert other["problems"] != results["problems"]


@pytest.mark.parametrize("decoding", [[], ["--no-greedy", "--temperature", "1.0", "--samples", "2"]])
def test_a_killed_evaluation_goes_on_to_the_same_results(command, tmp_path, decoding, monkeypatch):
    whole = main(command(*decoding, out="whole.json"))
    arguments = command(*decoding, out="killed.json")
    killed = processes.run(processes.killed_while_it_writes, "eval", *arguments)
    assert killed.returncode == -9, killed.stderr[-1000:]
    assert (tmp_path / "killed.json.part").exists() and not (tmp_path / "killed.json").exists()
    batches, complete = [], answers.complete
    monkeypatch.setattr(answers, "complete", lambda *args: batches.append(args[4]) or complete(*args))
    assert main(arguments) == whole and batches == [2]
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_what_another_evaluation_has_begun_is_not_gone_on_with(command, tmp_path):
    main(command(out="whole.json"))
    (tmp_path / "out.json.part").write_text(json.dumps({"task": "svamp"}) + "\n")
    with pytest.raises(InputError, match=r"out.json.part belongs to another evaluation \(other .*task"):
        main(command())
    before = (tmp_path / "whole.json").read_bytes()
    with pytest.raises(InputError, match="whole.json exists already; give another --out"):
        main(command(out="whole.json"))
    assert (tmp_path / "whole.json").read_bytes() == before


def test_an_adapter_of_another_base_model_is_refused(command, folder, tmp_path):
    config = tiny_config("llama", thinking=False)
    config.num_hidden_layers = 1
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="belongs to another base model|has no place for"):
        main(command("--model", str(tmp_path / "other")))


@pytest.fixture(scope="module")
def plain(folder):
    """An adapter without thinking weights for the base model."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    trainer = small_trainer(folder / "plain", model=model, residual="none")
    trainer.train()
    trainer.save_model()
    return folder / "plain"


@pytest.mark.parametrize(
    ("family", "changed", "sentence"),
    [
        ("llama", {"num_hidden_layers": 1}, "belongs to another base model: .* no place for"),
        ("llama", {"num_hidden_layers": 3}, "belongs to another base model: .* is missing"),
        ("llama", {"hidden_size": 64}, "belongs to another base model: .*size mismatch"),
        ("qwen2", {}, "is an adapter for LlamaForCausalLM, not for Qwen2ForCausalLM"),
    ],
)
def test_a_plain_adapter_of_another_base_model_is_refused_too(
    command, folder, plain, tmp_path, family, changed, sentence
):
    config = tiny_config(family, thinking=False)
    for name, value in changed.items():
        setattr(config, name, value)
    FAMILIES[family][1](config).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    flags = ["--model", str(tmp_path / "other"), "--adapter", str(plain), "--no-thinking"]
    with pytest.raises(InputError, match=sentence):
        main(command(*flags))
    if family == "qwen2":
        with pytest.raises(InputError, match=sentence):
            main(command(*flags[:2]))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--task", "gsm9k"], "unknown task 'gsm9k'; did you mean gsm8k"),
        (["--samples", "3"], "are all the same; add --no-greedy"),
        (["--limit", "0"], "--limit must be 1 or more"),
        (["--batch_size", "0"], "--batch_size must be above 0"),
        (["--no-greedy", "--temperature", "0"], "--temperature must be 0.01 or more"),
        (["--prompt", "loud"], "argument --prompt: invalid choice: 'loud'"),
        (["--prompt", "chat"], "needs a chat template"),
        (["--split", "dev"], "argument --split: invalid choice: 'dev'"),
        (["--adapter", "nowhere"], "nowhere holds no adapter"),
        (["--dataset", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--task", "svamp"], "needs 'Body' and 'Question' and 'Answer'"),
        (["--task", "nq"], "comes without documents; give a folder of them with --corpus"),
        (["--task", "nq", "--corpus", "nowhere"], "the corpus nowhere does not exist"),
        (["--out", "x" * 300], "cannot be written"),
        (["--dataset", "reasoning_gym:chain_summ"], "no generator 'chain_summ'; there are chain_sum"),
        (["--task", "chain_sum"], "unknown task 'chain_sum'"),
        (["--dataset", "reasoning_gym:chain_sum?min_terms=0.5"], "cannot make a problem with these options"),
        (["--dataset", "reasoning_gym:graph_color"], "without a gold answer"),
        (["--out", "no/where.json"], "the folder of no/where.json does not exist"),
        (["--shots", "99"], "worked examples, not 99"),
        (["--nonsense", "1"], "--nonsense"),
        (["--seed", "-1"], "--seed must be from 0"),
        (["--answer_start", ""], "--answer_start must be a text"),
    ],
)
def test_what_cannot_work_is_a_sentence(command, flags, sentence, capsys):
    assert cli(["eval", *command(), *flags]) == 2
    shown = capsys.readouterr().err
    last = shown.splitlines()[-1]  # after the bar of the weights, if it came so far
    assert last.startswith("error: ") and sentence in last


def test_a_model_has_to_be_named(capsys):
    assert cli(["eval"]) == 2
    assert "name a model with --model, or an adapter with --adapter" in capsys.readouterr().err


def test_the_help_shows_the_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        cli(["eval", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "--no-greedy" in shown and "--no-thinking" in shown and "default: 512" in shown


def test_the_script_is_the_same_command(command, tmp_path):
    script = Path(__file__).parents[2] / "scripts" / "eval.py"
    run = processes.run(processes.script, script, *command("--limit", "2"))
    assert run.returncode == 0 and (tmp_path / "out.json").is_file(), run.stderr[-1000:]


def test_the_marker_position_counts_tokens():
    tokenizer = byte_tokenizer()
    table = marker_table(tokenizer, "####")
    ids = tokenizer("ab####7")["input_ids"]
    whole = [tokenizer.convert_tokens_to_ids(token) for token in ("a", "####", "#7")]
    assert marker_position(ids, table) == 6 and marker_position(whole, table) == 2
    assert marker_position(ids[:5], table) is None and marker_position([], table) is None


def test_a_padding_token_of_the_model_that_no_tokenizer_has_is_foreign_text(command, folder, tmp_path):
    tiny_model("llama", thinking=False, vocab_size=300).save_pretrained(tmp_path / "padded")
    byte_tokenizer().save_pretrained(tmp_path / "padded")
    flags = command("--no-thinking", "--no-greedy", "--temperature", "2.0", "--model", str(tmp_path / "padded"))
    assert main(flags[2:])["scores"]["total"] == 12


def test_a_plain_adapter_is_read_out_hard_and_cannot_think(command, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    trainer = small_trainer(tmp_path / "plain", model=model, residual="none", learning_rate=0.1)
    trainer.train()
    trainer.save_model()
    flags = [*command()[2:], "--adapter", str(tmp_path / "plain")]
    with pytest.raises(InputError, match="never trained to think"):
        main(flags)
    plain = main([*flags, "--no-thinking"])
    base = main(command("--no-thinking", out="base.json", adapter=False))
    assert [p["samples"] for p in plain["problems"]] != [p["samples"] for p in base["problems"]]


def test_a_generator_is_evaluated_on_draws_of_its_own(folder, tmp_path):
    name = "reasoning_gym:chain_sum?min_digits=6&max_digits=6"
    flags = ["--adapter", str(folder / "adapter"), "--task", name, "--limit", "20", "--max_new_tokens", "2"]
    prompts = {}
    for split in ("train", "test"):
        results = main([*flags, "--split", split, "--out", str(tmp_path / f"{split}.json")])
        prompts[split] = {problem["prompt"] for problem in results["problems"]}
    trained = {problem["question"] for problem in load_problems(find_task(name, None, 10_000, 42))}
    assert all(any(question in prompt for question in trained) for prompt in prompts["train"])
    assert not any(prompt.strip().rpartition("\n")[2] in trained for prompt in prompts["test"])


def test_a_repetition_penalty_in_the_models_file_is_not_greedy_decoding(command, folder, tmp_path):
    plain = main(command(out="plain.json"))
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    base.generation_config.repetition_penalty = 1.5
    base.config.thinking = None
    shutil.copytree(folder / "base", tmp_path / "penal")
    base.generation_config.save_pretrained(tmp_path / "penal")
    penal = main(command("--model", str(tmp_path / "penal"), out="penal.json"))
    assert penal["problems"] == plain["problems"]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ('{"task": "svamp"}\n', r"out.json.part belongs to another evaluation \(other .*task"),
        ("garbage\n", "line 1 of .*out.json.part is not .* damaged. Remove it"),
        ("[]\n", "line 1 of .* damaged"),
        ("{}\n[]\n7\n", "line 3 of .* damaged"),
    ],
)
def test_a_part_that_is_foreign_or_damaged_is_named_and_kept(command, tmp_path, part, message):
    (tmp_path / "out.json.part").write_text(part)
    with pytest.raises(InputError, match=message):
        main(command())
    assert (tmp_path / "out.json.part").read_text() == part


def test_an_evaluation_does_not_go_on_with_another_model(command, folder, tmp_path):
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    flags = command("--adapter", str(tmp_path / "adapter"))
    killed = processes.run(processes.killed_while_it_writes, "eval", *flags)
    assert killed.returncode == -9
    file = tmp_path / "adapter" / "thinking_config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(InputError, match="another evaluation .other adapter_files"):
        main(flags)


@pytest.mark.parametrize(
    ("record", "flags", "warning"),
    [
        (None, [], None),
        (None, ["--split", "train"], "--split train takes problems that models are trained on"),
        ({"task": "gsm8k", "dataset": "problems.jsonl"}, [], "adapter was trained on .*problems.jsonl"),
        ({"task": "gsm8k", "dataset": "others.jsonl"}, [], None),
        ({"task": "gsm8k", "dataset": None}, [], None),
        ({"task": "gsm8k", "dataset": None}, ["--dataset", "openai/gsm8k:main@train"], "on openai/gsm8k:main@train"),
        ({"task": "gsm8k", "dataset": "."}, ["--dataset", "."], None),
    ],
)
def test_problems_of_the_training_are_a_warning(folder, tmp_path, monkeypatch, caplog, record, flags, warning):
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    for name in ("problems.jsonl", "train.jsonl", "test.jsonl"):
        shutil.copy(folder / "problems.jsonl", tmp_path / name)
    if record is not None:
        (tmp_path / "adapter" / "run.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    arguments = parse(["--adapter", "adapter", "--dataset", str(tmp_path / "problems.jsonl"), *flags])
    evaluation.warn_of_training_data(arguments, find_task("gsm8k", None))
    messages = [one.getMessage() for one in caplog.records if one.name == evaluation.__name__]
    assert len(messages) == (warning is not None)
    assert warning is None or re.search(f"{warning}.*: the accuracy is not that on unseen problems.", messages[0])


def test_two_evaluations_do_not_write_one_file(command, tmp_path, monkeypatch):
    settings = {"x": 1}
    first = evaluation.Progressed(tmp_path / "two.json", settings)
    with pytest.raises(InputError, match="another evaluation is writing"):
        evaluation.Progressed(tmp_path / "two.json", settings)
    first._lock.release()

    def meanwhile(*_):
        (tmp_path / "out.json").write_text("mine")
        return {"mean": 0.0}

    monkeypatch.setattr(evaluation, "summarise", meanwhile)
    with pytest.raises(InputError, match="was created by another process .* The results are in .*out.json.whole"):
        main(command("--limit", "2"))
    assert (tmp_path / "out.json").read_text() == "mine" and (tmp_path / "out.json.whole").is_file()


@pytest.fixture(scope="module")
def thoughtful(folder):
    """An adapter that was trained with two forced thoughts."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base", thinking={"r_min": 0.2, "r_max": 0.5})
    trainer = small_trainer(folder / "thoughtful", model=base, answer_start=MARKER, thoughts=2, filler="~")
    trainer.train()
    trainer.save_model()
    return folder / "thoughtful"


def test_results_beside_the_weights_do_not_make_it_another_evaluation(command, thoughtful):
    arguments = parse([*command(), "--adapter", str(thoughtful)])
    before = settings_of(arguments, [], [])
    (thoughtful / "eval.json.part").write_text("[]")
    assert settings_of(arguments, [], []) == before and before["adapter_files"]
    (thoughtful / "adapter_config.json").touch()
    assert settings_of(arguments, [], []) != before


def completed(results):
    return [sample["completion"] for problem in results["problems"] for sample in problem["samples"]]


def test_forced_thoughts_are_the_models_own_and_no_text_and_can_be_left_out(command, thoughtful, tmp_path):
    flags = ["--adapter", str(thoughtful)]
    results = main([*command(out="own.json"), *flags])
    assert results["settings"]["thoughts"] == 2
    assert not any("~" in text[:1] for text in completed(results))
    assert max(s["tokens"] for p in results["problems"] for s in p["samples"]) <= 22
    pauses = main([*command("--no-thinking", out="pauses.json"), *flags])
    none = main([*command("--no-thinking", "--thoughts", "0", out="none.json"), *flags])
    assert pauses["settings"]["thoughts"] == 2 and none["settings"]["thoughts"] == 0
    assert len({tuple(completed(r)) for r in (results, pauses, none)}) == 3


def test_every_control_can_be_asked_for_and_off_is_no_thinking(command, thoughtful):
    flags = ["--adapter", str(thoughtful), "--batch_size", "4"]
    texts = {name: completed(main([*command("--control", name, out=f"{name}.json"), *flags])) for name in CONTROLS}
    plain = completed(main([*command("--no-thinking", out="plain.json"), *flags]))
    assert texts["off"] == plain and texts["live"] != plain
    assert all(texts[name] != texts["live"] for name in CONTROLS if name != "live")


def test_each_batch_is_controlled_by_its_own_gold_answers(command, thoughtful, monkeypatch):
    seen = []
    controlled = batches.controlled

    def spy(model, name, golds):
        seen.append(golds)
        return controlled(model, name, golds)

    monkeypatch.setattr(batches, "controlled", spy)
    results = main([*command("--control", "swapped"), "--adapter", str(thoughtful), "--batch_size", "4"])
    golds = [str(problem["gold"]) for problem in results["problems"]]
    lengths = [len(problem["prompt"]) for problem in results["problems"]]
    order = sorted(range(12), key=lambda i: lengths[i])
    assert seen == [[golds[i] for i in order[start : start + 4]] for start in (0, 4, 8)]


def test_a_refused_control_leaves_nothing_that_blocks_the_corrected_command(command, tmp_path):
    with pytest.raises(InputError, match="a batch holds one"):
        main(command("--control", "swapped", "--batch_size", "1"))
    assert not (tmp_path / "out.json.part").exists()
    main(command("--control", "swapped", "--batch_size", "6"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--thoughts", "-1"], "--thoughts must be 0 or more, not -1"),
        (["--thoughts", "24"], "--thoughts=24 must be smaller than --max_new_tokens=24"),
        (["--thoughts", "2", "--filler", "<nosuch>"], "no token '<nosuch>'"),
        (["--control", "shuffled"], "--control: invalid choice: 'shuffled'"),
        (["--control", "mean", "--no-thinking"], "cannot be combined with --no-thinking"),
        (["--control", "swapped", "--batch_size", "11"], "a batch holds one"),
    ],
)
def test_thoughts_and_controls_that_cannot_be_are_refused(command, flags, message, tmp_path):
    with pytest.raises(InputError, match=message):
        main(command(*flags))
    assert not (tmp_path / "out.json").exists()


def test_all_controls_and_numbers_of_thoughts_are_compared_on_the_same_problems(command, thoughtful, tmp_path, capsys):
    flags = ["--adapter", str(thoughtful), "--batch_size", "4", "--thoughts", "1", "3", "--control", "all"]
    results = main([*command(*flags)])["variations"]
    kinds = [(one["settings"]["thoughts"], one["settings"]["control"]) for one in results]
    assert kinds == [(count, name) for count in (1, 3) for name in CONTROLS]
    for (count, name), one in zip(kinds, results, strict=True):
        fixed = [*command("--control", name, "--thoughts", str(count), out=f"{count}{name}.json"), *flags[:4]]
        assert completed(one) == completed(main(fixed))
        against = one.get("paired", {}).get("against")
        if (count, name) == (1, "live"):
            assert against is None
        else:
            assert against == {"control": "live", "thoughts": count if name != "live" else 1}
        assert ("partner" in one["scores"]) == (name == "swapped")
    shown = capsys.readouterr().out
    assert "--thoughts 3 are more than the 2 that this model was trained with" in shown and "McNemar" in shown
    assert json.loads((tmp_path / "out.json").read_text())["variations"] == json.loads(json.dumps(results))
    assert not list(tmp_path.glob("*.part"))


def test_swapped_answers_are_also_graded_by_the_problem_whose_thoughts_they_got(command, thoughtful, monkeypatch):
    rows = {"1": "2", "2": "1"}
    problems = [{"question": f"{one}?", "answer": [one]} for one in rows]
    questions = answers.Questions(find_task("gsm8k", None), problems, MARKER, [[5], [6]])
    assert questions.donors([0, 1]) == {0: 1, 1: 0}
    assert questions.donors([1, 0]) == {0: 1, 1: 0}


def test_several_thoughts_under_one_control_are_tested_against_the_fewest(command, thoughtful):
    flags = ["--adapter", str(thoughtful), "--control", "off", "--thoughts", "3", "0"]
    most, none = main(command(*flags))["variations"]
    assert most["paired"]["against"] == {"control": "off", "thoughts": 0} and "paired" not in none


def test_several_samples_of_a_problem_are_not_tested_as_if_they_were_one(command, thoughtful):
    flags = ["--adapter", str(thoughtful), "--thoughts", "0", "2", "--no-greedy", "--samples", "2"]
    assert not any("paired" in one for one in main(command(*flags))["variations"])
