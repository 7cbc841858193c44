"""Tries every flag of `hrpo train` with values that may be wrong, one by one: none may end in a traceback.

    python tests/every_flag.py [FLAG ...]        # all: about 400 runs of two steps on a tiny model, some minutes

Prints a line for each and exits with 1 if there was a traceback. `tests/commands/test_every_flag.py` takes a sample.
"""

import json
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from io import StringIO
from pathlib import Path

import hrpo_patches  # noqa: F401  before transformers

# isort: split
from rich.progress import track
from tiny import byte_tokenizer, tiny_model

from hrpo_patches.commands.main import exit_status, train
from hrpo_patches.commands.train_flags import TrainingFlags

# They are of this script, take minutes (a compiler) or reach out (a login).
LEFT_OUT = {"output_dir", "resume_from_checkpoint", "thinking", "max_steps", "torch_compile", "torch_compile_backend",
            "torch_compile_mode"}  # fmt: skip
VALUES = {
    "dict": ("nojson", '{"nonsense": 1}', "[1]"),
    "list": ("nonsense", "-1"),
    "bool": ("true", "false"),
    "float": ("-1", "0", "0.5", "2"),
    "int": ("-1", "0", "3"),
}


def cases(names=()):
    """Each flag with each of the values for its type."""
    for one in fields(TrainingFlags):
        if one.init and not one.name.startswith("_") and one.name not in LEFT_OUT and (not names or one.name in names):
            kind = next((kind for kind in VALUES if kind in str(one.type)), None)
            for value in VALUES.get(kind, ("nonsense",)):
                if value != str(one.default).lower():
                    yield one.name, value


def base_run(folder):
    """A model and sums in `folder`, and the flags of a run on them, but for where it goes."""
    model = tiny_model("qwen2", thinking=False)
    model.config.thinking = None
    model.save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    rows = [{"question": f"{i}+{i}?", "answer": f"#### {2 * i}"} for i in range(30)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"model_name": folder / "base", "dataset": folder / "sums.jsonl", "prompt": "plain", "max_steps": 2}
    given |= {"max_completion_length": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    return [str(word) for name, value in (given | {"lora_rank": 4}).items() for word in (f"--{name}", value)]


def tried(command, folder, name, *values):
    """What became of one flag: (ok, refused or TRACEBACK, what was said)."""
    said_out, said_err = StringIO(), StringIO()
    try:
        with redirect_stdout(said_out), redirect_stderr(said_err):
            status = exit_status(train, [*command, "--output_dir", str(folder), f"--{name}", *values])
    except SystemExit as error:
        return "TRACEBACK", f"SystemExit: {error}"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return "TRACEBACK", f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    errors = [line for line in said_err.getvalue().splitlines() if line.startswith("error: ")]
    return ("refused", errors[-1]) if status else ("ok", "")


def main(names):
    counts = Counter()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        command = base_run(folder)
        for name, value in track(list(cases(names)), "Trying flags", disable=not sys.stderr.isatty()):
            result, what = tried(command, folder / "run", name, value)
            counts[result] += 1
            print(f"--{name} {value}: {result} {what}", flush=True)
    print(dict(counts))
    return int(counts["TRACEBACK"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
