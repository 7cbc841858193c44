"""Completions a second of a GRPO batch by engine, stock and thinking: several prompts, several completions of each.

Prompts have about 200 tokens, completions from 16 to 256, most of them short. `generate` decodes one padded batch to
the longest completion; the others give each request its own length. Each measurement has a process of its own;
engines alternate from round to round, and ratios are taken within a round. vLLM is measured where it is installed.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

import hrpo_patches  # noqa: F401 - before transformers

ENGINES = ("generate", "continuous", *(["vllm"] if find_spec("vllm") else []))
KINDS = [kind for engine in ENGINES for kind in (engine, f"{engine}, thinking")]


def batch(prompts, completions, vocabulary, seed=0):
    """(token ids of each completion's prompt, its length): lengths have a Pareto tail from 16, cut at 256."""
    draw = random.Random(seed)
    rows = [[draw.randrange(100, vocabulary - 100) for _ in range(draw.randrange(170, 231))] for _ in range(prompts)]
    lengths = [int(min(256, 16 * (1 - draw.random()) ** -0.8)) for _ in range(prompts * completions)]
    return [row for row in rows for _ in range(completions)], lengths


def by_generate(model, tokenizer, rows, lengths, thinking):
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=model.device)
    seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    model.generation_config.eos_token_id = None
    extra = {"thinking": True, "tokenizer": tokenizer, "return_dict_in_generate": True} if thinking else {}
    sampling = {"do_sample": True, "top_k": 0, "temperature": 1.0, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=seen, max_new_tokens=max(lengths), **sampling, **extra)
    assert (out.sequences if thinking else out).shape[1] == width + max(lengths)
    assert not thinking or out.thinking_mask.any()


def by_continuous_batching(model, tokenizer, rows, lengths, thinking):
    from transformers import ContinuousBatchingConfig, GenerationConfig

    from hrpo_patches.thinking.continuous import thinking_batches

    generation = GenerationConfig(
        max_new_tokens=max(lengths), do_sample=True, top_k=0, eos_token_id=-1, pad_token_id=0
    )
    generation.thinking = thinking or None
    page = next(one.name for one in fields(ContinuousBatchingConfig) if one.name in ("page_size", "block_size"))
    config = ContinuousBatchingConfig(num_blocks=1024, max_batch_tokens=1024, **{page: 32})
    with (
        thinking_batches(model, tokenizer),
        model.continuous_batching_context_manager(generation, continuous_batching_config=config) as manager,
    ):
        for row, length in zip(rows, lengths, strict=True):
            manager.add_request(row, max_new_tokens=length)
        done = []
        while len(done) < len(rows):
            output = manager.get_result(timeout=1)
            if output is not None and output.is_finished():
                assert output.error is None and hasattr(output, "thinking_mask") == thinking
                done.append(len(output.generated_tokens))
    assert sorted(done) == sorted(lengths)


def by_vllm(engine, rows, lengths, thinking):
    """With the states of a thinking batch, which training fetches."""
    from vllm import SamplingParams

    from hrpo_vllm import take_thoughts

    keys = [str(i) for i in range(len(rows))]
    each = [
        SamplingParams(
            max_tokens=length,
            ignore_eos=True,
            temperature=1.0,
            logprobs=0,
            extra_args={"thinking_key": key} if thinking else None,
        )
        for length, key in zip(lengths, keys, strict=True)
    ]
    outputs = engine.llm.generate([{"prompt_token_ids": row} for row in rows], each, use_tqdm=False)
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    if thinking:
        states = take_thoughts(engine.llm, keys)
        assert all(len(states[key]) >= length for key, length in zip(keys, lengths, strict=True))


@contextmanager
def started(engine, model, tokenizer, longest, count):
    """What answers a batch: a function of its prompts, its lengths, and whether it thinks."""
    if engine != "vllm":
        yield partial(by_generate if engine == "generate" else by_continuous_batching, model, tokenizer)
        return
    from hrpo_patches.engines.vllm import running_engine

    with running_engine(model, tokenizer, longest, count) as running:
        yield partial(by_vllm, running)


def measure(kind, arguments):
    """Seconds of one engine's batch, and the process's peak memory in GiB."""
    import torch
    from measuring import device, device_name, peak, timed

    from hrpo_patches.models.base import load_model
    from hrpo_thinking.config import ThinkingConfig

    engine, thinking = kind.partition(",")[0], kind.endswith("thinking")
    own = ThinkingConfig() if thinking or engine != "vllm" else None  # vLLM's own model, if it is not to think
    model, tokenizer = load_model(arguments.model_name, own, dtype=torch.float32)
    model = model.eval().to(device())
    rows, lengths = batch(arguments.prompts, arguments.completions, model.config.vocab_size)
    longest = max(map(len, rows)) + max(lengths)
    with torch.no_grad(), started(engine, model, tokenizer, longest, len(rows)) as answer:
        answer(rows[-2:], [3, 3], thinking)  # a warm engine, and the marker's table
        seconds = timed(lambda: answer(rows, lengths, thinking))
    return {"seconds": seconds, "peak_gib": peak(), "device": device_name()}


def floors(arguments):
    """Seconds that no engine can do without here: the weights read once a step, and the products of all tokens."""
    import torch
    from measuring import device, timed

    from hrpo_patches.models.base import load_model

    model, _ = load_model(arguments.model_name, None, dtype=torch.float32)
    rows, lengths = batch(arguments.prompts, arguments.completions, model.config.vocab_size)
    weights = sum(weight.numel() for weight in model.parameters())
    tokens = sum(map(len, rows[:: arguments.completions])) + sum(lengths)  # each prompt once
    read, square = torch.ones(2**28, device=device()), torch.ones(4096, 4096, device=device())

    def fastest(work):
        return min(timed(work) for _ in range(5))

    bandwidth = read.numel() * 4 / fastest(read.sum)
    products = 2 * 4096**3 / fastest(lambda: square @ square)
    return (
        f"{max(lengths)} steps of {weights * 4 / 1e6:.0f} MB at {bandwidth / 1e9:.1f} GB/s: "
        f"{max(lengths) * weights * 4 / bandwidth:.1f} s. {tokens} tokens of {2 * weights / 1e6:.0f} MFLOP at "
        f"{products / 1e9:.0f} GFLOP/s: {tokens * 2 * weights / products:.1f} s."
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model_name", default="smollm2-135m", help="hub id, folder, or smollm2-135m")
    parser.add_argument("--prompts", type=int, default=8, help="different prompts")
    parser.add_argument("--completions", type=int, default=8, help="completions of each")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, each with every kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what is measured")
    parser.add_argument("--floor", action="store_true", help="only say what no engine can do without here")
    parser.add_argument("--one", choices=KINDS, help="measure this one here, and print a JSON object")
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    arguments = parser.parse_args(argv)
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments)))
        return
    if arguments.floor:
        print(floors(arguments))
        return
    same = [f"--{name}={getattr(arguments, name)}" for name in ("model_name", "prompts", "completions")]
    kinds, rounds = list(arguments.kinds), []
    for n in track(range(arguments.rounds), "Measuring"):
        row = {}
        for kind in kinds[n % len(kinds) :] + kinds[: n % len(kinds)]:
            command = [sys.executable, __file__, "--one", kind, *same]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr[-2000:]
            row[kind] = json.loads(done.stdout.splitlines()[-1])
        rounds.append(row)
    count = arguments.prompts * arguments.completions
    table = Table(title=f"{arguments.model_name}, float32, {count} completions, {arguments.rounds} rounds")
    for column in (
        "engine",
        "seconds (median)",
        "completions/s",
        f"times {kinds[0]}",
        "of its stock self",
        "peak GiB",
    ):
        table.add_column(column)
    for kind in kinds:
        seconds = statistics.median(row[kind]["seconds"] for row in rounds)
        times = statistics.median(row[kinds[0]]["seconds"] / row[kind]["seconds"] for row in rounds)
        stock = kind.removesuffix(", thinking")
        own = [row[stock]["seconds"] / row[kind]["seconds"] for row in rounds if stock in row]
        spread = f"{statistics.median(own):.2f} ({min(own):.2f} to {max(own):.2f})" if own and stock != kind else ""
        most = max(row[kind]["peak_gib"] for row in rounds)
        table.add_row(kind, f"{seconds:.1f}", f"{count / seconds:.3f}", f"{times:.2f}", spread, f"{most:.1f}")
    Console(width=120).print(table)
    if arguments.out:
        record = {"title": table.title, "rounds": rounds, "environment": {"device": rounds[0][kinds[0]]["device"]}}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
