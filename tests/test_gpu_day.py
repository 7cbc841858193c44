"""The day with a GPU: a piece that breaks, hangs or lacks its package does not stop the rest; the table says so."""

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

STARTS = """
import subprocess, sys
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
Path("{mark}").write_text(str(child.pid))
child.wait()
"""
DAY = Path(__file__).parent / "gpu" / "day.py"


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_breaks_hangs_or_is_missing_is_in_the_table(tmp_path):
    day = runpy.run_path(str(DAY))
    piece, where = day["Piece"], day["Day"](tmp_path, True)
    pieces = [
        piece("broken", 20, lambda _: [sys.executable, "-c", "raise SystemExit('no kernel')"]),
        piece("hanging", 3, lambda _: [sys.executable, "-c", STARTS.format(mark=tmp_path / "child")]),
        piece("missing", 20, lambda _: [sys.executable, "-c", "pass"], needs="no_such_package"),
        piece("fine", 20, lambda _: [sys.executable, "-c", "print('│ a │ 1 │')"]),
    ]
    results = [day["run"](where, one, {}) for one in pieces]
    assert [one.became for one in results] == ["failed", "stopped", "skipped", "ok"]
    deadline = time.monotonic() + 20
    while runs(int((tmp_path / "child").read_text())):  # what a stopped piece has started is stopped, too
        assert time.monotonic() < deadline
        time.sleep(0.1)
    table = day["table_of"](results, "a machine")
    assert "| broken | failed |" in table and "| no kernel |" in table and "no_such_package is not installed" in table
    assert "| fine | ok |" in table and "| a , 1 |" in table


def test_the_days_checks_count_what_does_not_hold(tmp_path):
    day = runpy.run_path(str(DAY))
    correct = next(one for one in day["PIECES"] if one.name == "correct")
    rows = [{"check": "a", "value": 0.0, "holds": True}, {"check": "b", "value": 2.0, "holds": False}]
    said = day["numbers_of"](None, correct, "\n".join(map(json.dumps, rows)))
    assert said == ["1 of 2 checks hold", "b: 2.0"]


def test_without_a_gpu_the_day_is_refused_before_anything_is_written(tmp_path):
    done = subprocess.run([sys.executable, DAY, tmp_path / "out"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "torch sees no GPU here" in done.stderr and not (tmp_path / "out").exists()


def test_a_piece_that_reads_the_model_brings_it_along(tmp_path):
    day = runpy.run_path(str(DAY))
    where = day["Day"](tmp_path, True)
    assert [piece.name for piece in day["chosen"](where, ["decode"])] == ["model", "decode"]
    assert [piece.name for piece in day["chosen"](where, ["correct"])] == ["correct"]
    files = [words[words.index("--out") + 1] for piece in day["PIECES"] if "--out" in (words := piece.command(where))]
    assert len(set(files)) == len(files)
