"""`hrpo demo`: a page on this machine that shows runs thinking; what it shows is made by `evaluation/demo.py`."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hrpo_patches.commands.flags import Written, plain_parser
from hrpo_patches.extras import require_package
from hrpo_thinking.errors import InputError

if TYPE_CHECKING:
    from argparse import Namespace

    from gradio import Blocks
    from starlette.types import Message, Receive, Scope, Send

    from hrpo_patches.evaluation.demo import Run

# The browser itself refuses whatever the page would load from, or send to, another machine.
POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


def main(argv: Written) -> None:
    """Serve the page until it is interrupted.

    Raises:
        InputError: before any model is loaded, if gradio is missing or the address cannot be used; or a model cannot
            be loaded.
    """
    parser = plain_parser("hrpo demo", "Show runs thinking, on a page in the browser: tokens, thoughts and controls.")
    text = "an adapter's folder or hub id, a merged model, any base, or smollm2-135m; several are shown side by side"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=text)
    parser.add_argument("--question", default="", help="the question, at first")
    text = "where the page listens; with 0.0.0.0 everybody who reaches this machine can ask"
    parser.add_argument("--host", default="127.0.0.1", help=text)
    parser.add_argument("--port", type=int, default=7860, help="0: one that is free")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="where a completion is cut, at first")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the sampling, at first; 0 is greedy")
    parser.add_argument("--seed", type=int, default=42, help="of the sampling, at first")
    parser.add_argument("--top", type=int, default=3, help="words for each residual")
    parser.add_argument("--base", help="the base model, if not the one that the adapters name")
    parser.add_argument("--device", help="such as cpu or cuda:1; by default the accelerator, if there is one")
    given = parser.parse_args(argv)
    require_package("gradio", "hrpo demo")
    listening = _listen(given.host, given.port)
    from hrpo_patches.evaluation.demo import LONGEST, Run
    from hrpo_patches.evaluation.think import check_numbers
    from hrpo_patches.models.base import open_model
    from hrpo_patches.thinking.backbone import is_untrained

    check_numbers(given.max_new_tokens, given.temperature, given.top, given.seed)
    if given.max_new_tokens > LONGEST:
        raise InputError(f"--max_new_tokens must be at most {LONGEST}, not {given.max_new_tokens}.")
    place = _device(given.device)
    runs = []
    for name in dict.fromkeys(given.runs):
        with Console(stderr=True).status(f"loading {name}"):
            model, tokenizer = open_model(name, given.base)
            runs.append(Run(name, model if place is None else model.to(place), tokenizer, not is_untrained(model)))
    _serve(_page(runs, given), listening)


def _listen(host: str, port: int) -> socket.socket:
    """A socket on which the page is served, taken before the models are loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        why = str(getattr(error, "strerror", None) or error).partition(" (")[0]
        raise InputError(f"--host {host} --port {port} cannot be used: {why}; give another one.") from None


def _device(name: str | None) -> Any:
    """The device of this name, which must work."""
    import torch

    try:
        return None if name is None else torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"--device {name} cannot be used: {why} Use cpu or cuda:0, or omit --device.") from None


def _page(runs: list[Run], given: Namespace) -> Blocks:
    """The page, a Gradio app."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr

    from hrpo_patches.evaluation.demo import CONDITIONS, LONGEST, Asking, answers

    def ask(
        question: str, second: str, names: list[str], chosen: list[str], longest: int, temperature: float, seed: int
    ) -> Iterator[str]:
        conditions = [name for name in CONDITIONS if name in chosen]
        asking = Asking(question, second, conditions, longest, temperature, seed, given.top)
        yield from answers([run for run in runs if run.name in names], asking)

    with gr.Blocks(title="hrpo demo", analytics_enabled=False) as page:
        with gr.Row():
            question = gr.Textbox(given.question, label="Question", lines=2, scale=2)
            second = gr.Textbox(label="Second question, whose thoughts are used by swapped", lines=2)
        with gr.Row():
            names = [run.name for run in runs]
            chosen = gr.CheckboxGroup(names, value=names, label="Runs", visible=len(runs) > 1)
            conditions = gr.CheckboxGroup(list(CONDITIONS), value=["live", "off"], label="Thoughts")
            longest = gr.Number(
                given.max_new_tokens, label="max_new_tokens", precision=0, maximum=LONGEST, min_width=80
            )
            temperature = gr.Number(given.temperature, label="temperature", min_width=80)
            seed = gr.Number(given.seed, label="seed", precision=0, min_width=80)
            button = gr.Button("Ask", variant="primary", min_width=80)
        shown = gr.HTML()
        inputs = [question, second, chosen, conditions, longest, temperature, seed]
        # One at a time, since a control changes the model while it answers.
        gr.on([button.click, question.submit], ask, inputs, shown, concurrency_limit=1, api_visibility="private")
    return page


def _serve(page: Blocks, listening: socket.socket) -> None:
    """Serve the page; without `launch`, which could share it and asks the network."""
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI, Response

    from hrpo_patches.evaluation.demo import CSS

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    app = gr.mount_gradio_app(
        FastAPI(), page, "/", footer_links=[], run_history=False, ssr_mode=False, pwa=False, theme=theme, css=CSS
    )

    host, port = listening.getsockname()[:2]
    names = {f"{one}:{port}".encode() for one in ("127.0.0.1", "localhost", "[::1]")}

    async def closed(scope: Scope, receive: Receive, send: Send) -> None:
        # The page takes no files, and on this machine alone answers to its names alone (no DNS rebinding).
        strange = host in ("127.0.0.1", "::1") and dict(scope.get("headers", ())).get(b"host") not in names
        if scope["type"] in ("http", "websocket") and (strange or scope["path"].endswith("/upload")):
            await Response("forbidden", 403)(scope, receive, send)
            return

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY)]
            await send(message)

        await app(scope, receive, with_policy)

    print(f"http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl+C ends it)", flush=True)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(closed, log_level="warning")).run(sockets=[listening])
