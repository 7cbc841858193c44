"""Do thoughts carry a computation, and who teaches them to? Words over the group A5, thought one product at a time.

The product of h elements of A5 cannot be had from a few layers at once, so a model of two layers needs a chain of h
states. Every arm continues one start, which writes all prefix products out. Then it is taught to think: either the
first c products are replaced by forced thoughts, c growing (--curriculum replace), or all are thoughts and a loss that
reads each prefix product out of the state before it fades away (readout). At last all are thoughts, and the product
after them is the only loss. A line of --out is one arm of one seed; what is there already is not done again.
"""

import argparse
import itertools
import json
import math
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import hrpo_patches  # noqa: F401 - before transformers

# isort: split
import torch
from latent_words import ELEMENTS, END, EQUALS, PAD, SLOTS, TASKS, lesson, prefix_products, words_of
from rich.progress import track
from safetensors.torch import load_model, save_model
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from hrpo_patches.commands.main import exit_status
from hrpo_patches.thinking.controls import CONTROLS, controlled
from hrpo_patches.thinking.replay import replay_forward

LONGEST = 16  # of the words whose products are thought in training; the start has written out SLOTS
CURVED = (8, 16, 24)  # lengths on a learning curve; of 24 elements, no blank is left between word and thoughts
TESTED = (8, 16, 20, 23, 24)


@dataclass(frozen=True)
class Arm:
    """What is different between the models that are compared.

    Attributes:
        steps: what stands between word and product: "none", "written", or "thoughts".
        residual: "projection", "embedding", or None for fillers that are blended with nothing.
        bptt: how many thoughts back the gradient of the loss flows.
        layers: of the model.
    """

    steps: str = "thoughts"
    residual: str | None = "projection"
    bptt: int | str = 0
    layers: int = 2


ARMS = {
    "written": Arm(steps="written", residual=None),
    "none": Arm(steps="none", residual=None),
    "fillers": Arm(residual=None),
    "fillers-5": Arm(residual=None, layers=5),
    "k1": Arm(bptt=0),
    "k4": Arm(bptt=3),
    "all": Arm(bptt="sequential"),
    "embedding-all": Arm(residual="embedding", bptt="sequential"),
    "exact": Arm(bptt="exact"),
}


def loss_of(
    model: LlamaForCausalLM,
    arm: Arm,
    words: torch.Tensor,
    table: torch.Tensor,
    c: int,
    readout: float = 0.0,
    observe: Callable[[dict[str, float]], None] | None = None,
) -> torch.Tensor:
    """Cross-entropy of the written products and the answer.

    `readout` is the weight of another one: of each prefix product, read out of the state before its place. `observe`
    is told what the gradient through the thoughts was.
    """
    tokens, labels = lesson(words, table, c, arm.steps != "none")
    inputs, width = tokens[:, :-1], tokens.shape[1] - 1 - SLOTS
    if arm.residual is None or c == 0:
        logits = model(inputs, use_cache=False, logits_to_keep=width + 1).logits
    else:
        mask = (torch.arange(width) < c).expand(len(inputs), width)
        logits = replay_forward(
            model, inputs, thinking_mask=mask, bptt=arm.bptt, observe=observe, logits_to_keep=width + 1
        ).logits
    loss = cross_entropy(logits.flatten(0, 1), labels[:, SLOTS:].flatten(), ignore_index=-100)
    if readout:
        products = prefix_products(words, table)
        loss = loss + readout * cross_entropy(logits[:, : words.shape[1]].flatten(0, 1), products.flatten())
    return loss


@torch.no_grad()
def accuracy(
    model: LlamaForCausalLM, arm: Arm, words: torch.Tensor, table: torch.Tensor, control: str = "live"
) -> float:
    """The share of words whose product is right, after h steps of the arm's kind."""
    n, h = words.shape
    products = prefix_products(words, table)
    tokens = lesson(words, table, h, arm.steps != "none")[0][:, :-1]
    if arm.steps == "written":
        tokens = tokens[:, :SLOTS]
        for _ in range(h):
            tokens = torch.cat([tokens, model(tokens, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)], 1)
        tokens = torch.cat([tokens, torch.full((n, 1), EQUALS)], 1)
    if arm.residual is None:
        logits = model(tokens, logits_to_keep=1).logits
    else:
        mask = (torch.arange(h + 1) < h).expand(n, h + 1)
        with controlled(model, control, products[:, -1].tolist()):
            logits = replay_forward(model, tokens, thinking_mask=mask, logits_to_keep=1).logits
    return (logits[:, -1].argmax(-1) == products[:, -1]).float().mean().item()


def tests(h: int, n: int) -> torch.Tensor:
    """Words of the tested part, the same ones for every arm and seed."""
    return words_of(n, h, True, torch.Generator().manual_seed(10_000 + h))


def make_model(arm: Arm, args: argparse.Namespace, seed: int) -> LlamaForCausalLM:
    """A small Llama; the plain weights of a seed are the same for all arms with as many layers."""
    torch.manual_seed(seed)
    scale = "embedding" if arm.residual == "projection" else "unit"
    thinking = {
        "residual": arm.residual,
        "residual_scale": scale,
        "answer_start": "=",
        "r_min": args.r_min,
        "r_max": args.r_max,
    }
    config = LlamaConfig(
        vocab_size=ELEMENTS + 5,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=arm.layers,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
        thinking=thinking if arm.residual else False,
    )
    return LlamaForCausalLM(config)


class Course:
    """The training of one arm on one seed: its optimizer, its batches and its learning curve.

    Attributes:
        most: how many products may be replaced. It grows by one when the mean loss of 25 steps is below `advance`: one
            rule for every arm, so that nobody is taught the next thought before it has the last.
    """

    def __init__(self, model: LlamaForCausalLM, arm: Arm, args: argparse.Namespace, seed: int, lr: float) -> None:
        self.model, self.arm, self.args, self.lr = model, arm, args, lr
        self.table = TASKS[args.task]()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
        self.generator = torch.Generator().manual_seed(seed)
        self.step, self.most, self.curve, self.seconds = 0, 1, [], 0.0
        self.measured: dict[str, list[float]] = {}  # of the gradient, since the last point of the curve

    def run(self, phase: str, steps: int, batch_size: int, title: str) -> None:
        """At most so many steps of a phase: "written", "taught" or "product", in which the product is the only loss.

        The first ends where every tested length is right to 99%, the second when all thoughts are taught. The learning
        rate rises for 50 steps, and in the last phase falls to a tenth, by a cosine.
        """
        losses: list[float] = []
        recent: list[float] = []
        for i in track(range(steps), description=title):
            started = time.perf_counter()
            fall = 0.1 + 0.45 * (1 + math.cos(math.pi * i / steps)) if phase == "product" else 1.0
            loss = self.advance(phase, i / steps, batch_size, min(1.0, (self.step + 1) / 50) * fall)
            losses.append(loss)
            recent.append(loss)
            self.step += 1
            self.seconds += time.perf_counter() - started
            all_taught = False
            if phase == "taught" and len(recent) >= 25 and sum(recent[-25:]) / 25 < self.args.advance:
                all_taught = self.most == LONGEST
                self.most = min(LONGEST, self.most + 1)
                recent.clear()
            if self.step % self.args.every == 0 or all_taught:
                row = {"step": self.step, "phase": phase, "most": self.most, "loss": sum(losses) / len(losses)}
                row |= {str(h): accuracy(self.model, self.arm, tests(h, 300), self.table) for h in CURVED}
                row |= {name: round(sum(values) / len(values), 4) for name, values in self.measured.items()}
                self.curve.append(row)
                losses.clear()
                self.measured.clear()
                print(title, {k: round(v, 3) if k != "phase" else v for k, v in row.items()}, flush=True)
                if all_taught or (phase == "written" and min(row[str(h)] for h in CURVED) >= 0.99):
                    break

    def observe(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.measured.setdefault(name, []).append(value)

    def advance(self, phase: str, share: float, batch_size: int, rate: float) -> float:
        """One step, when this share of the phase is over, at this share of the learning rate; its loss."""
        draw = torch.rand(3, generator=self.generator).tolist()
        longest = SLOTS if phase == "written" else LONGEST
        h = longest if draw[0] < 0.5 else 1 + int(draw[1] * longest)
        c, readout = h, 0.0
        if self.arm.steps != "thoughts":
            c = 0
        elif phase == "taught" and self.args.curriculum == "replace":
            c = min(h, self.most if draw[2] < 0.5 else int((2 * draw[2] - 1) * (self.most + 1)))
        elif phase == "taught":
            readout = 1 - share
        words = words_of(batch_size, h, False, self.generator)
        loss = loss_of(self.model, self.arm, words, self.table, c, readout, self.observe)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate
        self.optimizer.step()
        return loss.item()


def weights_of(name: str, args: argparse.Namespace, seed: int, options: dict) -> Path:
    """Where the weights of an arm are kept, or the start's; other options, another file."""
    digest = zlib.crc32(json.dumps(options, sort_keys=True).encode())
    return args.runs / f"{name}-{args.task}-{seed}-{digest:08x}.safetensors"


def start_of(args: argparse.Namespace, seed: int) -> Path:
    """Weights of two layers that write all products out, trained once for all arms of a seed."""
    shaping = ("width", "lr_start", "batch_size_start", "written")
    file = weights_of("start", args, seed, {name: options_of(args)[name] for name in shaping})
    if not file.is_file():
        arm = ARMS["written"]
        course = Course(make_model(arm, args, seed), arm, args, seed, args.lr_start)
        course.run("written", args.written, args.batch_size_start, f"start, seed {seed}")
        args.runs.mkdir(parents=True, exist_ok=True)
        save_model(course.model, str(file))
        file.with_suffix(".json").write_text(json.dumps({"curve": course.curve, "seconds": course.seconds}))
    return file


@torch.no_grad()
def fit_projection(model: LlamaForCausalLM, table: torch.Tensor, seed: int) -> None:
    """Start W where it maps a state to the embedding of the product that it predicts: least squares on 512 words."""
    words = words_of(512, SLOTS, False, torch.Generator().manual_seed(seed + 2000))
    tokens, _ = lesson(words, table, 0)
    hidden = model.model(tokens).last_hidden_state[:, SLOTS - 1 : -3].flatten(0, 1)
    wanted = model.get_input_embeddings()(prefix_products(words, table)).flatten(0, 1)
    model.model.thinking_projection.weight.copy_(torch.linalg.lstsq(hidden, wanted).solution.T)


def model_of(arm: Arm, args: argparse.Namespace, seed: int) -> LlamaForCausalLM:
    """The arm's model at the start; layers that it has more than the start add nothing yet."""
    model = make_model(arm, args, seed)
    load_model(model, str(start_of(args, seed)), strict=False)
    with torch.no_grad():
        for layer in model.model.layers[ARMS["written"].layers :]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        if arm.residual is not None:
            model.model.thinking_residual_gate_i.bias.fill_(args.gate)
    if arm.residual == "projection" and args.fit:
        fit_projection(model, TASKS[args.task](), seed)
    return model


def tests_of(model: LlamaForCausalLM, arm: Arm, args: argparse.Namespace) -> dict[str, float]:
    """Accuracy at every tested length."""
    table = TASKS[args.task]()
    return {str(h): accuracy(model, arm, tests(h, args.tests), table) for h in TESTED}


def trained(name: str, args: argparse.Namespace, seed: int) -> tuple[LlamaForCausalLM, dict]:
    """An arm's model after its training, and what was seen on the way; read from --runs if they are there."""
    arm, file = ARMS[name], weights_of(name, args, seed, options_of(args))
    model, record = model_of(arm, args, seed), file.with_suffix(".json")
    if file.is_file() and record.is_file():
        load_model(model, str(file))
        return model, json.loads(record.read_text())
    course = Course(model, arm, args, seed + 1000, args.lr)
    seen: dict = {"begun": tests_of(model, arm, args), "taught": None}
    if arm.steps == "thoughts":
        course.run("taught", args.taught, args.batch_size, f"{name}, seed {seed}, taught")
        seen["taught"] = tests_of(model, arm, args)
    if arm.steps != "written":
        course.run("product", args.product, args.batch_size, f"{name}, seed {seed}, product")
    seen |= {"curve": course.curve, "seconds": course.seconds}
    record.write_text(json.dumps(seen))
    save_model(model, str(file))
    return model, seen


def run_arm(name: str, args: argparse.Namespace, seed: int) -> dict:
    """One arm's row of results."""
    arm = ARMS[name]
    model, seen = trained(name, args, seed)
    row = {"arm": name, "task": args.task, "seed": seed, "options": options_of(args)} | asdict(arm)
    row["accuracy"] = tests_of(model, arm, args)
    if arm.residual is not None:
        words, table = tests(LONGEST, args.tests), TASKS[args.task]()
        row["controls"] = {control: accuracy(model, arm, words, table, control) for control in CONTROLS}
    return row | seen


def options_of(args: argparse.Namespace) -> dict:
    """What makes two runs the same one, beside arm, task and seed."""
    return {k: v for k, v in vars(args).items() if k not in ("arms", "seeds", "task", "out", "runs", "every", "tests")}


def parsed(flags: list[str] | None) -> argparse.Namespace:
    """The arguments of a command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="what is compared")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of weights and words")
    parser.add_argument("--task", default="a5", choices=TASKS, help="the word problem of A5, or the control")
    parser.add_argument("--curriculum", default="replace", choices=("replace", "readout"), help="of thinking")
    parser.add_argument("--width", type=int, default=128, help="the hidden size")
    parser.add_argument("--r_min", type=float, default=0.01, help="lower end of λ's start")
    parser.add_argument("--r_max", type=float, default=0.1, help="upper end of λ's start")
    parser.add_argument("--gate", type=float, default=2.0, help="start of the bias of the gate i")
    parser.add_argument("--fit", action=argparse.BooleanOptionalAction, default=True, help="start W on activations")
    parser.add_argument("--lr_start", type=float, default=3e-3, help="learning rate of the start")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of the arms")
    parser.add_argument("--batch_size_start", type=int, default=128, help="words in a step of the start")
    parser.add_argument("--batch_size", type=int, default=64, help="words in a step of the arms")
    parser.add_argument("--written", type=int, default=2500, help="steps of the start, at most")
    parser.add_argument("--taught", type=int, default=800, help="steps in which thinking is taught, at most")
    parser.add_argument("--advance", type=float, default=0.3, help="loss below which the next thought is taught")
    parser.add_argument("--product", type=int, default=800, help="steps in which the product is the only loss")
    parser.add_argument("--every", type=int, default=250, help="steps between two points of a learning curve")
    parser.add_argument("--tests", type=int, default=1000, help="words of each length in the final tests")
    parser.add_argument("--runs", type=Path, default=Path("runs/latent"), help="where weights are kept")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/latent.jsonl"), help="a line for each arm"
    )
    return parser.parse_args(flags)


def main(flags: list[str] | None = None) -> None:
    args = parsed(flags)
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.is_file() else []
    keys = [(row["arm"], row["task"], row["seed"], row["options"]) for row in done]
    for seed, name in itertools.product(args.seeds, args.arms):
        if (name, args.task, seed, options_of(args)) in keys:
            print(f"{name}, seed {seed}: done already")
            continue
        row = run_arm(name, args, seed)
        print({k: row.get(k) for k in ("arm", "seed", "accuracy", "controls", "seconds")}, flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(exit_status(main))
