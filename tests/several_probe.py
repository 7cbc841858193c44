"""Run as a program by each of several processes: trains the cases of a job, and saves what became of them.

`python several_probe.py JOB.json`; see `Case` in training/test_distributed.py for what a case may say.
"""

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path

import hrpo_patches  # isort: skip - before transformers

import accelerate.state
import runs
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback

from hrpo_patches.commands.main import run as hrpo
from hrpo_patches.engines.base import Completions
from hrpo_patches.thinking import sequential
from hrpo_patches.thinking.shards import plain
from hrpo_patches.training import logprobs, termination
from hrpo_thinking.inputs import ThinkingInputs
from hrpo_thinking.modules import ThinkingModule

assert hrpo_patches.__version__
HANGS = 240  # seconds


def shard_on_a_cpu_too():
    """accelerate shards on GPUs alone; torch and DeepSpeed do not mind, so what follows is accelerate's own way."""
    stock = accelerate.state.AcceleratorState.__init__

    def init(self, *args, **kwargs):
        fresh = not accelerate.state.AcceleratorState._shared_state
        stock(self, *args, **kwargs)
        if not fresh or self.distributed_type != DistributedType.MULTI_CPU:
            return
        if (plugin := kwargs.get("fsdp_plugin")) is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
        if (plugin := kwargs.get("deepspeed_plugin")) is not None:
            self.distributed_type, self.deepspeed_plugins = DistributedType.DEEPSPEED, plugin
            plugin.set_mixed_precision(self._mixed_precision)
            plugin.select(_from_accelerator_state=True)
            self._mixed_precision = "no"
        accelerate.state.PartialState._shared_state["distributed_type"] = self.distributed_type

    accelerate.state.AcceleratorState.__init__ = init


def whole(tensor):
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return plain(tensor.detach()).clone().cpu().contiguous()


class KeepsGradients(TrainerCallback):
    """The gradients of each step, of all processes together, by step and name."""

    def __init__(self):
        self.gradients = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.gradients[f"{state.global_step + 1}.{name}"] = whole(parameter.grad)


class Recorded(runs.HRPOTrainer):
    """Takes each process's own rows of rollouts from `record`, or keeps those that it makes in `kept`."""

    record, kept = None, None

    def _complete(self, prompt_ids, *args, **kwargs):
        step = self.state.global_step
        if self.record is None:
            completions = super()._complete(prompt_ids, *args, **kwargs)
            tokens = pad_sequence([torch.tensor(ids) for ids in completions.tokens], True, -1)
            rollout = {
                "states": completions.thinking.states,
                "mask": completions.thinking.mask,
                "ratio": completions.ratio,
                "tokens": tokens,
            }
            if self.kept is not None:
                self.kept |= {f"{step}.{name}": value.contiguous() for name, value in rollout.items()}
            return completions
        first = len(prompt_ids) * self.accelerator.process_index
        own = {name: self.record[f"{step}.{name}"][first : first + len(prompt_ids)] for name in _ROLLOUT}
        tokens = [[token for token in row.tolist() if token >= 0] for row in own["tokens"]]
        width = max(map(len, tokens))
        states, mask, ratio = (own[name][:, :width] for name in ("states", "mask", "ratio"))
        return Completions(tokens, None, ThinkingInputs(states, mask, self.args.residual), ratio)


def watch(backbone):
    """The dtypes that the weights of some modules have while these compute, by name."""
    seen = {}

    def note(module, args):
        weight = next(module.parameters(recurse=False))
        seen[type(module).__name__.removeprefix("FSDP")] = str(weight.dtype)

    for module in (backbone.norm, *backbone.modules()):
        if module is backbone.norm or isinstance(module, ThinkingModule):
            module.register_forward_pre_hook(note)
    return seen


_ROLLOUT = ("states", "mask", "ratio", "tokens")


def run(case, out):
    name = case["name"]
    sequential.KEPT = case.get("kept_thoughts", 32)
    logprobs.LOGITS = case.get("logits", 2**24)
    thinking = {"r_min": 0.5, "r_max": 0.9} | case.get("thinking", {})
    shape = {"initializer_range": 0.1} | case.get("model", {})  # livelier ones amplify rounding through their thoughts
    model = tiny_model(case["family"], thinking=thinking, **shape)
    if case.get("named"):  # its reference is loaded by its name
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(out.parent / "named", thinking=thinking)
    options = {"num_generations": 8, "beta": 0.0, "max_grad_norm": 1e9, "disable_tqdm": True} | case["options"]
    runs.HRPOTrainer = Recorded
    trainer = runs.small_trainer(out / name, model=model, peft_config="lora" if case["lora"] else None, **options)
    trainer.record = load_file(case["record"]) if "record" in case else None
    trainer.kept = {} if "keep" in case else None
    keeps, trained = KeepsGradients(), [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    start = {f"start.{name}": trainer.model.get_parameter(name).detach().clone() for name in trained}
    trainer.add_callback(keeps)
    trainer.remove_callback(PrinterCallback)
    seen = watch(trainer._base_model().model)
    trainer.train(resume_from_checkpoint=case.get("resume"))
    if "best" in case:
        trainer.state.best_model_checkpoint = str(out / name / case["best"])
        trainer._load_best_model()
    model = trainer.accelerator.unwrap_model(trainer.model)
    weights = {f"weight.{name}": whole(model.get_parameter(name)) for name in trained}
    trainer.save_model()
    if trainer.accelerator.is_main_process:
        losses = {"losses": torch.tensor([row["loss"] for row in trainer.state.log_history if "loss" in row])}
        gradients = {f"gradient.{name}": value for name, value in keeps.gradients.items()}
        save_file(start | gradients | weights | losses, out / f"{name}.safetensors")
        (out / f"{name}.json").write_text(json.dumps({"log": trainer.state.log_history, "dtypes": seen}))
        if "keep" in case:
            save_file(trainer.kept, case["keep"])


def signalled(name, rank, step):
    """Let one of the processes get a signal in a step."""
    stock, sent = runs.HRPOTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step and self.accelerator.process_index == rank and not sent:
            sent.append(os.kill(os.getpid(), getattr(signal, name)))
        return stock(self, *args, **kwargs)

    runs.HRPOTrainer.training_step = training_step


def command(job):
    """`hrpo train`, with the arguments of a job; returns its exit status."""
    if "signal" in job:
        signalled(*job["signal"])
    sys.argv = ["hrpo", *job["train"]]
    try:
        return hrpo()
    except SystemExit as end:
        return end.code


def main(job):
    out = Path(job["out"])
    out.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    shard_on_a_cpu_too()
    if "DS_ACCELERATOR" in os.environ:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which it would compile; gloo does the same
    faulthandler.dump_traceback_later(HANGS, exit=True)
    status = command(job) if "train" in job else 0
    for case in job["cases"]:
        faulthandler.dump_traceback_later(HANGS, exit=True)
        run(case, out)
    if torch.distributed.is_initialized() and status in (0, None, termination.STATUS):
        torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    # What counts is saved, and a gloo thread that is still there now and then aborts an orderly exit.
    os._exit(status or 0)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
