"""What `test_second_device.py` runs in a process of its own: thinking on the second device and on the CPU, as JSON."""

import contextlib
import json
import os
import sys
import threading
import warnings
from pathlib import Path

if sys.argv[1:2] == ["second"]:
    os.environ["ACCELERATE_TORCH_DEVICE"] = "second"
warnings.simplefilter("ignore")

import hrpo_patches  # noqa: E402  before transformers

# isort: split
import second_device as second  # noqa: E402
import torch  # noqa: E402
from accelerate.hooks import AlignDevicesHook, add_hook_to_module  # noqa: E402
from runs import small_trainer  # noqa: E402
from tiny import byte_tokenizer, tiny_model  # noqa: E402

from hrpo_patches.engines.batches import Decoding, complete  # noqa: E402
from hrpo_patches.evaluation.think import think  # noqa: E402
from hrpo_patches.models.base import open_model  # noqa: E402
from hrpo_patches.models.merge import merge  # noqa: E402
from hrpo_patches.thinking.decoding import ThinkingDecoder  # noqa: E402
from hrpo_patches.training import logprobs  # noqa: E402
from hrpo_thinking.blend import Blend  # noqa: E402
from hrpo_thinking.parts import MODULES  # noqa: E402

FELT = {"r_min": 0.5, "r_max": 0.9}
TOKENIZER = byte_tokenizer()
PROMPT = TOKENIZER(["What is 3 + 4?", "Hi"], return_tensors="pt", padding=True)
_thread_run = threading.Thread.run


def _in_mode(self):
    with second.SecondMode():
        _thread_run(self)


threading.Thread.run = _in_mode  # continuous batching has a thread


def events():
    """What was counted since the last call, our own lines apart."""
    found = {f"{kind} in {where}": count for (kind, where), count in second.EVENTS.items()}
    second.EVENTS.clear()
    return found


def waits(found):
    return sum(count for name, count in found.items() if name.startswith("wait"))


def replays():
    """Per residual and bptt: the largest difference of a log-probability and of a gradient, and what was counted."""
    torch.manual_seed(0)
    ids, seen = torch.randint(3, 200, (2, 14)), torch.ones(2, 14, dtype=torch.long)
    seen[0, :3] = 0
    states, mask = torch.randn(2, 9, 32), torch.ones(2, 9, dtype=torch.bool)
    found = {}
    for residual in ("projection", "embedding"):
        for bptt in (0, 2, "exact", "sequential"):
            model = tiny_model("llama", thinking=FELT | {"residual": residual})
            both = []
            for device in ("cpu", "second"):
                with second.SecondMode() if device == "second" else contextlib.nullcontext():
                    model.to(device).zero_grad()
                    given = [one.to(device) for one in (ids, seen, states, mask)]
                    second.EVENTS.clear()
                    out = hrpo_patches.replay_forward(
                        model, *given[:2], thinking_states=given[2], thinking_mask=given[3], bptt=bptt
                    )
                    logits = out.logits[:, -9:].float().log_softmax(-1)
                    logits.square().mean().backward()
                    counted = events()
                    gradient = model.model.thinking_residual_gate_i.weight.grad
                    both.append([one.detach().cpu() for one in (logits, gradient)])
            off = [(one - other).abs().max().item() for one, other in zip(*both, strict=True)]
            found[f"{residual} {bptt}"] = {"off": off, "events": counted}
    return found


def generations():
    """Per way to decode: whether the tokens are the CPU's, and waits of the host per token, thinking and not."""
    found = {}
    ways = {"dynamic": {}, "static": {"cache_implementation": "static"}, "forced": {"thoughts": 3}}
    for residual in ("projection", "embedding"):
        model = tiny_model("qwen2", thinking=FELT | {"residual": residual})
        for name, way in ways.items():

            def generated(prompt, new, thinking=True, way=way, model=model):
                given = {"tokenizer": TOKENIZER, "do_sample": False, "max_new_tokens": new} | way
                given |= {"thinking": thinking, "return_dict_in_generate": True}
                if not thinking:
                    given.pop("thoughts", None)
                return model.generate(**prompt, **given)

            model.to("cpu")
            expected = generated(PROMPT, 12)
            with second.SecondMode():
                model.to("second")
                prompt = {key: value.to("second") for key, value in PROMPT.items()}
                counts = {}
                for thinking in (True, False):
                    each = []
                    for new in (6, 12):
                        second.EVENTS.clear()
                        out = generated(prompt, new, thinking)
                        each.append(waits(events()))
                    counts["thinking" if thinking else "stock"] = (each[1] - each[0]) / 6
                    if thinking:
                        same = torch.equal(out.sequences.cpu(), expected.sequences)
                        off = (out.thinking_states.cpu() - expected.thinking_states).abs().max().item()
            found[f"{residual} {name}"] = {"same": same, "off": off} | counts
    return found


CASES = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2, "num_iterations": 2},
    "continuous": {
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": {"num_blocks": 64, "max_batch_tokens": 128},
    },
    "reference": {"reference": "start", "thoughts": 2},
    "published": {"bptt": 0},
    "embedding": {"residual": "embedding"},
}


def trainings(folder, device):
    """Per kind of run: the log's numbers, and what was counted."""
    found = {}
    for name, options in CASES.items():
        with second.SecondMode() if device == "second" else contextlib.nullcontext():
            given = {"use_cpu": device == "cpu", "max_steps": 2, "dataloader_pin_memory": False}
            trainer = small_trainer(folder / name, **given | options)
            assert trainer.model.device.type == device
            second.EVENTS.clear()
            trainer.train()
            counted = events()
            rows = [row for row in trainer.state.log_history if "loss" in row]
            names = ("loss", "kl", "grad_norm", "embeds_ratio", "reward", "projection/grad_norm")
            found[name] = {"log": [[row[key] for key in names if key in row] for row in rows], "events": counted}
    return found


def uses(folder):
    """Whether the adapter in `folder` opens on the device, and thinks, is evaluated with controls and merged there."""
    with second.SecondMode():
        model, tokenizer = open_model(str(folder / "run"), str(folder / "base"))
        ids, texts = [tokenizer(text)["input_ids"] for text in ("What is 3?", "Hi", "abc")], ["1", "2", "3"]
        answers = {}
        for control in ("live", "zeroed", "off", "swapped", "mean", "token"):
            way = Decoding(6, True, batch_size=3, control=control)
            answers[control] = [row for _, rows in complete(model, tokenizer, ids, way, golds=texts) for row in rows]
        seen = len(think(model, tokenizer, "What is 3 + 4?", 5))
        merge(folder / "run", folder / "merged", str(folder / "base"))
        merged = open_model(str(folder / "merged"))[0]
        return {
            "devices": [model.device.type, merged.device.type],
            "thought": seen,
            "answers": {name: len(rows) for name, rows in answers.items()},
        }


def split():
    """Whether a model spread over two second devices thinks as on one, wherever its thinking modules are."""
    model, found = tiny_model("llama", thinking=FELT), {}
    given = {"tokenizer": TOKENIZER, "do_sample": False, "max_new_tokens": 8, "return_dict_in_generate": True}
    given["output_logits"] = True
    expected = model.generate(**PROMPT, **given, thinking=True)
    with second.SecondMode():
        first, other = torch.device("second", 0), torch.device("second", 1)
        for where in (first, other):
            spread = tiny_model("llama", thinking=FELT)
            places = {"model.embed_tokens": first, "model.rotary_emb": first, "model.layers.0": first}
            places |= {"model.layers.1": other, "model.norm": other, "lm_head": other}
            places |= {f"model.{name}": where for name in MODULES}
            for name, device in places.items():
                module = spread.get_submodule(name).to(device)
                add_hook_to_module(module, AlignDevicesHook(device, io_same_device=False, place_submodules=False))
            add_hook_to_module(spread, AlignDevicesHook(first, io_same_device=True))
            prompt = {key: value.to(first) for key, value in PROMPT.items()}
            with torch.no_grad():  # torch's engine of gradients knows one such device
                out = spread.generate(**prompt, **given, thinking=True)
                thoughts = {"thinking_states": out.thinking_states, "thinking_mask": out.thinking_mask}
                replay = hrpo_patches.replay_forward(spread, out.sequences, out.attention_mask, **thoughts)
            off = (replay.logits[:, -9:-1].cpu() - torch.stack(expected.logits, 1)).abs()
            found[str(where)] = [torch.equal(out.sequences.cpu(), expected.sequences), off.max().item()]
    return found


@contextlib.contextmanager
def a_wait_in_each_decoding_step():
    observe = ThinkingDecoder.observe

    def observed(self, outputs, *args):
        outputs.logits.sum().item()
        return observe(self, outputs, *args)

    ThinkingDecoder.observe = observed
    yield


@contextlib.contextmanager
def a_tensor_of_the_cpu_in_the_loss():
    plain = logprobs.selective_log_softmax
    logprobs.selective_log_softmax = lambda logits, tokens: plain(logits, tokens) * torch.ones(tokens.shape)
    yield


@contextlib.contextmanager
def states_left_on_the_host():
    projected = Blend.projected_residual
    Blend.projected_residual = lambda self, states: projected(self, states.cpu())
    yield


FAULTS = {
    "wait": a_wait_in_each_decoding_step,
    "cpu": a_tensor_of_the_cpu_in_the_loss,
    "states": states_left_on_the_host,
}


def main(device, what, folder, fault=""):
    parts = {"replays": replays, "generations": generations, "split": split}
    parts |= {"trainings": lambda: trainings(Path(folder), device), "uses": lambda: uses(Path(folder))}
    with FAULTS[fault]() if fault else contextlib.nullcontext():
        print(json.dumps(parts[what]()))


if __name__ == "__main__":
    main(*sys.argv[1:])
