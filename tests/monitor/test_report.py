"""Runs side by side: what is read from their folders, drawn and put into a table."""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from hrpo_patches import extras
from hrpo_patches.commands.main import main
from hrpo_patches.monitor.log import RunLog
from hrpo_patches.monitor.report import PANELS, Run, draw, read_run, read_runs, table, write_json, write_report
from hrpo_thinking.errors import InputError

SCORES = {"mean": 0.5, "standard_error": 0.1, "total": 25}
ENDED = {"log": [{"step": 8}]}  # as many steps as `make_run` makes
FULL = dict.fromkeys(PANELS, 0.5) | {"kl": 0.002, "loss": 0.1, "step_time": 3.0}


def make_run(folder, residual="projection", steps=8, record=None, keys=FULL):
    log = RunLog(folder)
    log.begin(0, {"residual": residual})
    for step in range(1, steps + 1):
        log.write({"step": step, **dict.fromkeys(keys, step / 10), "loss": 0.1})
    log.write({"step": steps, "eval_reward": 1.0})
    if record is not None:
        write_json(ENDED | record, folder)
    return folder


def plain(folder, **options):
    return make_run(folder, "none", keys=["reward", "marker_rate", "completions/mean_length", "kl"], **options)


def texts(figure):
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved, for a look at what is in it."""
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: saved.append(self) or save(self, *args, **kw))
    return saved


def test_a_run_is_read_from_its_folder(tmp_path):
    run = read_run(make_run(tmp_path / "run", record={"title": "t", "after": SCORES}))
    assert (run.name, run.residual, run.record["title"]) == ("run", "projection", "t")
    assert run.series("reward") == (list(range(1, 9)), [step / 10 for step in range(1, 9)])
    assert run.series("eval_reward") == ([8], [1.0]) and run.series("nothing") == ([], [])


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / part / "run") for part in "ab"] + [make_run(tmp_path / "other")]
    assert [run.name for run in read_runs(folders)] == [str(folders[0]), str(folders[1]), "other"]


def test_the_figure_has_title_axes_units_and_a_legend_that_names_each_run_once(tmp_path, figures):
    runs = read_runs([make_run(tmp_path / "ours"), plain(tmp_path / "control")])
    assert imread(draw(runs, tmp_path / "both.png")).std() > 0.05
    (figure,) = figures
    assert figure.get_suptitle() == "2 runs side by side"
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [sum(run in text for text in shown) for run in ("ours (projection)", "control (none)")] == [1, 1]
    assert figure.legends[0].get_title().get_text() == "faint: each log line; bold: mean of the last eighth of them"
    for axes, (title, label) in zip(figure.axes, PANELS.values(), strict=True):
        assert (axes.get_title(), axes.get_ylabel(), axes.get_xlabel()) == (title, label, "optimizer step")
    drawn = [len(axes.lines) for axes in figure.axes]
    both = {"reward", "marker_rate", "loss", "completions/mean_length"}  # each run: single steps and their mean
    assert drawn == [4 if key in both else 2 for key in PANELS]


def test_steps_are_whole_and_a_reward_is_called_an_accuracy_only_where_it_is_one(tmp_path, figures):
    names = ["reward", "rewards/answer_is_right/mean"]
    right = make_run(tmp_path / "right", keys=names, steps=3)
    format_too = make_run(tmp_path / "format", keys=[*names, "rewards/answer_has_its_format/mean"], steps=3)
    own = make_run(tmp_path / "own", keys=["reward", "rewards/reward/mean"], steps=3)
    for folders, label in (
        ([right], "mean over completions; 1 is right"),
        ([format_too], "mean reward over completions"),
        ([right, own], "mean reward over completions"),
    ):
        draw(read_runs(folders), tmp_path / "out.png")
        axes = figures[-1].axes[0]
        assert axes.get_title() == "Reward" and axes.get_ylabel() == label
        assert all(tick == int(tick) for axes in figures[-1].axes for tick in axes.get_xticks())


def test_a_figure_of_one_run_says_what_it_is_and_how_it_ended(tmp_path, figures):
    record = {"title": "a run", "before": SCORES, "after": SCORES | {"mean": 0.7}}
    draw([read_run(plain(tmp_path / "run", record=record))], tmp_path / "one.png")
    (figure,) = figures
    assert figure.get_suptitle() == (
        "a run\ngreedy accuracy on 25 held-out problems: 0.500 ± 0.100 before, 0.700 ± 0.100 after"
    )
    assert [axes.get_title() for axes in figure.axes] == ["Reward", "Marker rate", "Loss", "Completion length"]


def test_rounding_noise_is_drawn_as_a_flat_line(tmp_path, figures):
    rows = [{"step": i, "loss": 0.0, "a/mean": 0.9972 + i * 1e-7} for i in range(5)]
    draw([Run("run", "projection", rows, {})], tmp_path / "flat.png")
    low, high = figures[0].axes[1].get_ylim()
    assert high - low == pytest.approx(2e-3, rel=0.01)


def test_the_table_has_a_row_for_each_run_and_its_warnings(tmp_path):
    ours = make_run(tmp_path / "ours", record={"title": "t", "before": SCORES, "after": SCORES})
    RunLog(ours).write({"step": 8, "loss": 0.1, "warnings": ["Something is wrong."]})
    RunLog(ours).write({"step": 8, "stopped": "It is not finite."})
    lines = table(read_runs([ours, plain(tmp_path / "control")])).splitlines()
    head, rule, first, second = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:4])
    assert len(head) == len(rule) == len(first) == len(second)
    cells = dict(zip(head, first, strict=True))
    assert cells["reward, first quarter"] == "0.150" and cells["reward, last quarter"] == "0.750"
    assert cells["accuracy after"] == "0.500 ± 0.100" and cells["steps"] == "8"
    assert dict(zip(head, second, strict=True))["a, last quarter"] == "–"
    assert lines[-2:] == ["- **ours**: Something is wrong.", "- **ours**: It is not finite."]


def test_the_command_writes_both_files_and_never_over_others(tmp_path, capsys, monkeypatch):
    folders = [str(make_run(tmp_path / "ours")), str(plain(tmp_path / "control"))]
    stem = tmp_path / "new" / "both"
    assert main(["report", *folders, "--out", str(stem)]) == 0
    assert (shown := capsys.readouterr().out).startswith("| run |") and f"{stem}.png" in shown
    assert (tmp_path / "new" / "both.md").read_text().startswith("![2 runs side by side](both.png)\n\n| run |")
    before = (tmp_path / "new" / "both.png").read_bytes()
    assert main(["report", folders[0], "--out", str(stem)]) == 2
    assert "both.png exists already; give another --out" in capsys.readouterr().err
    assert (tmp_path / "new" / "both.png").read_bytes() == before
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    assert main(["report", folders[0]]) == 2
    assert "report needs matplotlib; run: pip install" in capsys.readouterr().err


def test_a_folder_that_holds_no_run_is_named(tmp_path):
    with pytest.raises(InputError, match=r"holds neither monitor.jsonl nor report.json"):
        read_run(tmp_path)
    (tmp_path / "monitor.jsonl").write_text("")
    with pytest.raises(InputError, match="does not begin with what the run is"):
        read_run(tmp_path)
    make_run(tmp_path / "run")
    (tmp_path / "run" / "report.json").write_text("{")
    with pytest.raises(InputError, match=r"report.json is no JSON"):
        write_report([tmp_path / "run"], tmp_path / "out")
    assert json.loads((tmp_path / "run" / "monitor.jsonl").read_text().splitlines()[0])["step"] == 0


def test_a_report_of_fewer_steps_than_the_log_is_of_an_earlier_end(tmp_path):
    folder = make_run(tmp_path / "run", record={"title": "t", "before": SCORES, "after": SCORES})
    assert "after" in read_run(folder).record
    RunLog(folder).write({"step": 9, "loss": 0.1})
    assert "after" not in read_run(folder).record and "before" in read_run(folder).record


def test_names_of_any_kind_and_runs_of_any_length_can_be_drawn(tmp_path, figures):
    names = ["_hidden", "$a$b$", "one", "none"]
    runs = read_runs([make_run(tmp_path / name, steps=i) for name, i in zip(names, (3, 2, 1, 0), strict=True)])
    draw(runs, tmp_path / "out.png")
    (figure,) = figures
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == [f"{name} (projection)" for name in names]
    dots = [line.get_marker() for line in figure.axes[0].lines[::2]]
    assert dots[2] == "o" and dots[0] in (None, "None") and len(dots) == 3


@pytest.mark.parametrize("out", [".", "x.png", "x.md", "file/x"])
def test_a_name_that_cannot_be_two_files_is_refused(tmp_path, out):
    (tmp_path / "file").write_text("mine")
    run = make_run(tmp_path / "run")
    with pytest.raises(InputError, match="--out is the name of two files, without their endings"):
        write_report([run], Path(out) if out == "." else tmp_path / out)


@pytest.mark.parametrize(("text", "sentence"), [("[]", "holds no report"), ("{", "is no JSON")])
def test_a_damaged_report_is_named(tmp_path, text, sentence):
    run = make_run(tmp_path / "run")
    (run / "report.json").write_text(text)
    with pytest.raises(InputError, match=sentence):
        read_run(run)


def test_a_report_without_its_accuracy_still_has_a_title(tmp_path, figures):
    run = make_run(tmp_path / "run", record={"title": "t", "before": SCORES, "after": None})
    draw([read_run(run)], tmp_path / "out.png")
    assert figures[0].get_suptitle() == "t" and "| – |" in table([read_run(run)])


def test_the_title_of_several_runs_is_what_they_have_in_common(tmp_path, figures):
    titles = {"a": "model, projection, sums", "b": "model, none, sums"}
    runs = read_runs([make_run(tmp_path / name, record={"title": title}) for name, title in titles.items()])
    draw(runs, tmp_path / "both.png")
    assert figures[0].get_suptitle() == "model, sums: 2 runs side by side"
