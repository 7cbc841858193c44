"""Programs in processes of their own: forked from one that has imported the libraries, which takes seconds each time.

A process is still one: it can be killed, limited, or wait. What a fresh interpreter must import, or must not, is
started by `subprocess` instead.
"""

import multiprocessing
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

CONTEXT = multiprocessing.get_context("forkserver")
COMMANDS = [f"hrpo_patches.commands.{name}" for name in ("train", "sft", "eval")]
CONTEXT.set_forkserver_preload(
    ["hrpo_patches", *COMMANDS, "hrpo_patches.training.trainer", "hrpo_patches.training.sft"]
)


def start(program, *arguments, log, environment=None):
    """Call `program` with the arguments as texts; it writes to the files LOG.out and LOG.err. Returns the process."""
    given = (program, list(map(str, arguments)), str(log), dict(os.environ if environment is None else environment))
    process = CONTEXT.Process(target=_run, args=given)
    process.start()
    return process


def run(program, *arguments, environment=None):
    """As `subprocess.run` does: returncode, stdout, stderr."""
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = start(program, *arguments, log=log, environment=environment)
        process.join(600)
        process.kill()
        process.join()
        out, err = (log.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
    return SimpleNamespace(returncode=process.exitcode, stdout=out, stderr=err)


def _run(program, arguments, log, environment):
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(Path(log).with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1) for descriptor in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(program(*arguments))


# --- programs --------------------------------------------------------------------------------------------------------


def script(file, *words):
    """`python FILE WORDS`."""
    sys.argv = [file, *words]
    sys.path.insert(0, str(Path(file).parent))
    runpy.run_path(file, run_name="__main__")


def hrpo(*words):
    """`hrpo WORDS`."""
    from hrpo_patches.commands.main import main

    return main(list(words))


def _at_step(kind, method, step, act):
    """Let `act` run once, before a method of a trainer, in a step."""
    original, acted = getattr(kind, method), []

    def before(self, *arguments, **options):
        if self.state.global_step == int(step) and not acted:
            acted.append(act())
        return original(self, *arguments, **options)

    setattr(kind, method, before)


def signalled(name, kind, method, step, *words):
    """`hrpo WORDS`, which gets a signal before a method of a trainer, in a step."""
    import hrpo_patches

    _at_step(getattr(hrpo_patches, kind), method, step, lambda: os.kill(os.getpid(), getattr(signal, name)))
    return hrpo(*words)


def limited(step, room, *words):
    """`hrpo WORDS`, whose files can have so many bytes from a step on."""
    from hrpo_patches import HRPOTrainer

    size = (int(room), resource.RLIM_INFINITY)
    _at_step(HRPOTrainer, "training_step", step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, size))
    return hrpo(*words)


def waiting(began, go, *words):
    """`hrpo WORDS`, which makes the file `began` before its trainer, and waits for the file `go`."""
    from hrpo_patches.commands import train

    make_trainer = train.make_trainer

    def wait(run):
        Path(began).touch()
        while not Path(go).exists():
            time.sleep(0.05)
        return make_trainer(run)

    train.make_trainer = wait
    return hrpo(*words)


def killed_while_it_writes(*words):
    """`hrpo WORDS`, an evaluation that is killed in its third batch, in the middle of a line."""
    from hrpo_patches.commands import eval as evaluation

    add, seen = evaluation.Progressed.add, []

    def then_die(self, samples):
        add(self, samples)
        seen.append(samples)
        if len(seen) == 2:
            with open(self.path, "a") as file:
                file.write('[{"item": 3, "comp')  # as a power failure might leave it
            os.kill(os.getpid(), signal.SIGKILL)

    evaluation.Progressed.add = then_die
    return hrpo(*words)
