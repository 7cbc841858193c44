"""The picture of a run."""

from matplotlib.image import imread

from hrpo_patches.report import draw, series, write_json

LOG = [
    {"step": i, "reward": i / 10, "marker_rate": 1.0, "embeds_ratio": 0.99, "projection/weight_norm": 0.5 + i}
    for i in range(1, 6)
]


def test_a_metric_is_read_where_it_was_logged():
    assert series([*LOG, {"step": 6, "train_loss": 1.0}], "reward") == ([1, 2, 3, 4, 5], [0.1, 0.2, 0.3, 0.4, 0.5])


def test_the_picture_is_drawn_also_for_a_run_without_thinking(tmp_path):
    scores = {"mean": 0.5, "standard_error": 0.1, "total": 25}
    record = {"title": "a run", "log": LOG, "before": scores, "after": scores}
    assert imread(draw(record, tmp_path)).std() > 0.05
    bare = [{"step": row["step"], "reward": row["reward"]} for row in LOG]
    assert draw({"title": "plain", "log": bare}, tmp_path).is_file()
    assert write_json(record, tmp_path).read_text().startswith("{")
