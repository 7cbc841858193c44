"""Programs in processes of their own: forked from one that has imported the libraries, which takes seconds each time.

A process is still one: it can be killed, limited, or wait. What a fresh interpreter must import, or must not, is
started by `subprocess` instead.
"""

import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

CONTEXT = multiprocessing.get_context("forkserver")
COMMANDS = [f"hrpo_patches.commands.{name}" for name in ("train", "sft", "eval")]
CONTEXT.set_forkserver_preload(
    ["hrpo_patches", *COMMANDS, *(f"hrpo_patches.training.{name}" for name in ("trainer", "sft"))]
)


def start(program, *arguments, out, err=None, environment=None):
    """Call `program` with the arguments as texts, and a file or pipe for what it prints; returns the process."""
    given = (program, list(map(str, arguments)), out, err or out, dict(environment or os.environ))
    process = CONTEXT.Process(target=_run, args=given)
    process.start()
    return process


def wait(processes):
    """The exit statuses of processes, none of which outlives this call."""
    try:
        for process in processes:
            process.join(600)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def run(program, *arguments):
    """As `subprocess.run` does: returncode, stdout, stderr; `program` may be the text of one."""
    with TemporaryDirectory() as folder, ThreadPoolExecutor() as readers:
        if isinstance(program, str):
            file = Path(folder, "program.py")
            file.write_text(program)
            program, arguments = script, (file, *arguments)
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(2)]  # not files, whose size a test may limit
        process = start(program, *arguments, out=pipes[0][1], err=pipes[1][1])
        read = [readers.submit(os.fdopen(os.dup(receive.fileno())).read) for receive, _ in pipes]
        for _, send in pipes:
            send.close()
        (status,) = wait([process])
        out, err = (text.result() for text in read)
    return SimpleNamespace(returncode=status, stdout=out, stderr=err)


def each_rank(program, *arguments, folder, name, environment=None):
    """Two processes that know each other by torch's environment variables; returns their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    shared = dict(environment or os.environ) | shared | {"LOCAL_WORLD_SIZE": "2"}
    started = []
    for rank in "01":
        own = {"out": folder / f"{name}.{rank}.log", "environment": shared | {"RANK": rank, "LOCAL_RANK": rank}}
        started.append(start(program, *arguments, **own))
    return wait(started)


def _run(program, arguments, out, err, environment):
    for descriptor, to in ((1, out), (2, err)):
        os.dup2(
            os.open(to, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if isinstance(to, Path) else to.fileno(), descriptor
        )
    for one in {out, err}:
        if not isinstance(one, Path):
            one.close()
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


def module(flag, package, *words):
    """`python -m hrpo_patches WORDS`."""
    assert (flag, package) == ("-m", "hrpo_patches")
    return hrpo(*words)


def fresh(file, *words):
    """The same in an interpreter that has imported nothing."""
    os.execv(sys.executable, [sys.executable, file, *words])


def inside(folder, program, *words):
    """One of the two above and below, in a folder whose modules can be imported."""
    os.chdir(folder)
    sys.path.insert(0, folder)
    return {"script": script, "hrpo": hrpo}[program](*words)


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
