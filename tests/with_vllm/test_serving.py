"""`hrpo serve` and `vllm serve`, started on loopback and asked as an OpenAI client does."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from engines import generated, trained
from openai import BadRequestError, OpenAI
from runs import small_trainer
from transformers import AutoModelForCausalLM

from hrpo_patches.commands.serve import main as serve
from hrpo_patches.models.base import open_model
from hrpo_patches.models.merge import merge
from hrpo_thinking.errors import InputError

TEXTS = ["Hi", "What is 3 + 4?", "Say #### once, please", "The sea", "12 + 13 =", "Why?"]
NEW = 24
HRPO = [sys.executable, "-m", "hrpo_patches", "serve"]
VLLM = [sys.executable, str(Path(__file__).with_name("vllm_cli.py")), "serve"]
OPTIONS = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--max-num-seqs", "8"]


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A base model, an adapter trained on it, and the two merged."""
    folder = tmp_path_factory.mktemp("serving")
    trained(folder, tokenizer)
    merge(folder / "adapter", folder / "merged")
    return folder


@contextmanager
def server(command, cache, *more):
    """A client of a server that is up; afterwards the server and its processes have ended, upon SIGTERM."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    more = [*more, *OPTIONS, "--host", "127.0.0.1", "--port", str(port), "--gpu-memory-utilization", "0.1"]
    log = (cache / "log").open("w+")
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "HRPO_CACHE": str(cache)}
    process = subprocess.Popen([*command, *more], stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, (cache / "log").read_text()[-3000:]
                time.sleep(0.5)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        assert children and not psutil.wait_procs(children, timeout=20)[1]
    finally:
        process.kill()
        log.close()


def ask(client, prompt, stream=False, **extra):
    """The greedy tokens of one completion; `extra` says how it thinks."""
    more = {"return_token_ids": True, "ignore_eos": True} | ({"vllm_xargs": extra} if extra else {})
    model = client.models.list().data[0].id
    out = client.completions.create(
        model=model, prompt=prompt, max_tokens=NEW, temperature=0, stream=stream, extra_body=more
    )
    if not stream:
        return out.choices[0].token_ids
    pieces = [piece.choices[0].token_ids for piece in out if piece.choices]
    assert len(pieces) > 3
    return [token for piece in pieces for token in piece or []]


def test_hrpo_serve_merges_an_adapter_and_answers_as_generate_does(folder, tokenizer, tmp_path):
    model, _ = open_model(str(folder / "adapter"))
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    ways = [{}, {"thinking": False}, {"thoughts": 2}]
    expected = {
        (i, way): generated(model, tokenizer, prompt, new=NEW, **ways[way])[0]
        for i, prompt in enumerate(prompts)
        for way in range(len(ways))
    }
    assert len({tuple(tokens) for tokens in expected.values()}) == len(expected)
    with server([*HRPO, str(folder / "adapter")], tmp_path) as client:
        assert client.models.list().data[0].id == str(folder / "adapter")
        for (i, way), tokens in expected.items():
            assert ask(client, prompts[i], stream=i % 2 == 0, **ways[way]) == tokens
        with ThreadPoolExecutor(2) as clients:
            jobs = {key: clients.submit(ask, client, prompts[key[0]], False, **ways[key[1]]) for key in expected}
            assert {key: job.result() for key, job in jobs.items()} == expected
        for extra, why in (
            ({"thinking": "no"}, "must be true or false"),
            ({"thoughts": NEW}, "must be smaller than the smaller of max_tokens"),
            ({"thinking_key": ["one"]}, "must be a text"),
        ):
            with pytest.raises(BadRequestError, match=why):
                ask(client, prompts[0], **extra)
        with pytest.raises(BadRequestError, match="beam search cannot think"):
            client.completions.create(
                model=client.models.list().data[0].id, prompt="Hi", n=2, extra_body={"use_beam_search": True}
            )
        assert ask(client, prompts[0]) == expected[0, 0]
    (kept,) = (tmp_path / "served").iterdir()
    made = (kept / "config.json").stat().st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:  # the second time it is there already
        patch.setenv("HRPO_CACHE", str(tmp_path))
        started = []
        patch.setattr(os, "execv", lambda program, words: started.append(words))
        serve([str(folder / "adapter"), "--port", "1"])
    assert str(kept) in started[0] and (kept / "config.json").stat().st_mtime_ns == made


def test_vllms_own_command_serves_a_merged_model_that_thinks_from_several_processes(
    folder, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")  # as beside a GPU
    model, _ = open_model(str(folder / "merged"))
    with server([*VLLM, str(folder / "merged")], tmp_path, "--api-server-count", "2") as client:
        for text in TEXTS[:2]:
            prompt = tokenizer(text)["input_ids"]
            for thinking in (True, False):
                expected = generated(model, tokenizer, prompt, new=NEW, thinking=thinking)[0]
                assert ask(client, prompt, thinking=thinking) == expected
            assert ask(client, prompt) != expected
        for _ in range(6):  # each server has a guard
            with pytest.raises(BadRequestError, match="must be smaller than the smaller of max_tokens"):
                ask(client, prompt, thoughts=NEW)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["base"], "was not trained to think: its config.json names no thinking weights"),
        (["merged", "--base", "base"], "is not an adapter, so it has no base model"),
        (["nowhere"], "does not exist"),
        (["embedding"], "hands over no distribution"),
        (
            ["adapter", '--speculative-config={"method": "ngram"}'],
            "speculative decoding is not supported",
        ),
        (
            ["adapter", "--speculative_config.method=ngram"],
            "speculative decoding is not supported for thinking models",
        ),
        (["adapter", "--pipeline-parallel-size=2"], "pipeline parallelism is not supported for thinking models"),
        (["adapter", "--enable-prompt-embeds"], "prompts given as embeddings is not supported for thinking models"),
    ],
    ids=str,
)
def test_what_cannot_be_served_is_refused_before_anything_starts(folder, monkeypatch, words, says):
    if words == ["embedding"] and not (folder / "embedding").is_dir():
        model = AutoModelForCausalLM.from_pretrained(folder / "base", thinking={"residual": "embedding"})
        small_trainer(folder / "embedding", model=model, residual="embedding").save_model()
    monkeypatch.setattr(os, "execv", None)
    with pytest.raises(InputError, match=says):
        serve([str(folder / word) if not word.startswith("--") else word for word in words])
