"""hrpo_patches comes before unsloth, says so, and leaves TRL's trainers as unsloth leaves them."""

import subprocess
import sys

from programs import environment, python

REWRITTEN = """
import hrpo_patches, harness, os, trl
os.environ["UNSLOTH_ALLOW_CPU"] = "0"  # as on a GPU: unsloth generates its own TRL trainers
from unsloth.models.rl import PatchFastRL
PatchFastRL()
generated = {name: getattr(trl, name) for name in ("GRPOTrainer", "GRPOConfig", "SFTTrainer")}
assert all("Unsloth" in generated[name].__name__ for name in ("GRPOTrainer", "SFTTrainer")), generated
assert trl.GRPOConfig(output_dir="x", use_cpu=True).learning_rate != 1e-6  # unsloth's own default
from hrpo_patches import HRPOConfig, HRPOTrainer
assert not [kind for kind in HRPOTrainer.__mro__ + HRPOConfig.__mro__ if "Unsloth" in kind.__name__]
first = lambda kind: next(base for base in kind.__mro__ if not base.__module__.startswith("hrpo_patches")).__name__
assert first(HRPOTrainer) == "GRPOTrainer" and first(HRPOConfig) == "GRPOConfig"
assert HRPOConfig(output_dir="x", use_cpu=True).learning_rate == 1e-6  # TRL's
assert all(getattr(trl, name) is kind for name, kind in generated.items())
print("as left")
"""


def test_hrpo_patches_first_draws_no_warning():
    printed = python("-c", "import hrpo_patches, harness")
    assert "should be imported before" not in printed and "WARNING: Unsloth" not in printed


def test_unsloth_first_is_an_error_that_says_what_to_do():
    done = subprocess.run(
        [sys.executable, "-c", "import harness, hrpo_patches"],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert "unsloth.save was imported before hrpo_patches" in last
    assert "put `import hrpo_patches` before the first import of unsloth" in last


def test_trainers_that_are_not_ours_stay_as_unsloth_leaves_them_and_ours_derive_from_trls_own():
    assert "as left" in python("-c", REWRITTEN)


def test_status_lists_the_patches_of_unsloth_as_applied():
    program = (
        "import hrpo_patches, harness, sys; from hrpo_patches.commands.main import main; sys.exit(main(['status']))"
    )
    lines = [line for line in python("-c", program).splitlines() if " unsloth/" in line and ".patch" in line]
    assert len(lines) == 2 and all("applied" in line for line in lines)
