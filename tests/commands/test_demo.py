"""The page of `hrpo demo` shows what `hrpo think` shows, and nothing that it does leaves the machine."""

import json
import socket
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest
from browser import ask, opened, served
from runs import small_trainer
from tiny import byte_tokenizer, tiny_model

from hrpo_patches import extras
from hrpo_patches.commands.main import main
from hrpo_patches.evaluation.demo import PLAIN

QUESTION = "What is <b>{{value}}</b> ${value}?"
TASK = "Solve it.\n\n{question}\n"
# What the page's policy refuses, when a script asks another server.
ELSEWHERE = """new Promise(done => {
    document.addEventListener("securitypolicyviolation", event => done(event.blockedURI));
    fetch("http://127.0.0.1:9/").catch(() => setTimeout(() => done("nothing"), 500));
})"""
LENGTH = ["--max_new_tokens", "12"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folder of a trained run whose thoughts are felt, and that of its plain base."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("models")
    tiny_model("llama", thinking=False).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    felt = {"r_min": 0.1, "r_max": 0.5, "residual_scale": "embedding"}
    trainer = small_trainer(folder / "run", model=AutoModelForCausalLM.from_pretrained(folder / "base", thinking=felt))
    trainer.train()
    trainer.save_model()
    (folder / "run" / "report.json").write_text(json.dumps({"prompt": TASK}))
    return folder / "run", folder / "base"


def words(text):
    return " ".join(text.split())


def rows_of(page, run, thoughts):
    """The table of a completion on the page: token, a, share of the thought, words, entropy."""
    page.wait_for_selector(f'[data-run="{run}"][data-thoughts="{thoughts}"]')
    rows = page.locator(f'[data-run="{run}"][data-thoughts="{thoughts}"] tbody tr').all()
    return [[words(cell.text_content()) for cell in row.locator("td").all()] for row in rows]


def rows_of_think(capsys, run, question):
    """The table of `hrpo think`: token, a, words, entropy."""
    capsys.readouterr()
    assert main(["think", str(run), "--prompt", question, *LENGTH]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    return [[words(cell) for cell in line.strip("│").split("│")][:4] for line in lines]


@pytest.mark.chromium
def test_the_page_shows_what_think_shows_and_asks_no_other_machine(models, tmp_path, capsys):
    run, base = models
    thinks, second = rows_of_think(capsys, run, QUESTION), rows_of_think(capsys, run, "Bye")
    with served(run, base, *LENGTH) as address, opened(address, tmp_path / "profile") as (page, asked):
        for path, host in (("/gradio_api/upload", urlsplit(address).netloc), ("/", "evil.example")):
            with pytest.raises(HTTPError, match="403"):  # no files, and no other name of this machine
                urlopen(Request(address + path, data=b"" if "upload" in path else None, headers={"Host": host}))
        ask(page, QUESTION)
        plain = rows_of(page, base, "off")  # the last one to be answered
        live, off = rows_of(page, run, "live"), rows_of(page, run, "off")
        assert [[token, a, near, entropy] for token, a, _, near, entropy in live] == thinks
        for _, a, share, near, _ in live:
            assert float(share) == pytest.approx((1 - float(a) ** 2) ** 0.5, abs=2e-4) and near
        assert off[0][0] == live[0][0] and off[0][4] == live[0][4]  # no thought came before the first token
        assert [row[0] for row in off] != [row[0] for row in live]
        assert {tuple(row[1:4]) for row in off + plain} == {("off", "0.0000", "")}
        assert page.locator(f'[data-run="{base}"]').count() == 1  # off alone
        assert page.locator(".plain").all_text_contents() == [PLAIN] and "plain model" in PLAIN
        assert page.locator("pre").first.text_content() == TASK.replace("{question}", QUESTION)

        tokens = page.locator(f'[data-run="{run}"][data-thoughts="live"] .tokens span')
        assert tokens.count() == len(live)
        assert "entropy, nats: " + live[3][4] in tokens.nth(3).get_attribute("title")
        for token, row in zip(tokens.all(), live, strict=True):
            colour = token.evaluate("e => getComputedStyle(e).backgroundColor")
            assert float(colour.rstrip(")").split(",")[-1]) == pytest.approx(0.8 * float(row[2]), abs=5e-3)

        ask(page, QUESTION, thoughts=["swapped"])
        assert "must differ from the first" in page.locator(".problem").text_content()
        ask(page, QUESTION, "Bye", thoughts=["zeroed", "swapped"])
        swapped = rows_of(page, run, "swapped")
        assert page.locator('[data-thoughts="live"]').count() == 0
        assert swapped[0][0] == live[0][0] and swapped[0][3] == second[0][2] != live[0][3]
        assert {row[3] for row in rows_of(page, run, "zeroed")} == {""}
        here = urlsplit(address).netloc
        assert {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))} == {here}
        assert page.evaluate(ELSEWHERE) == "http://127.0.0.1:9/"


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (["--port", "70000"], "--host 127.0.0.1 --port 70000 cannot be used"),
        (["--device", "nowhere"], "--device nowhere cannot be used"),
        (["--max_new_tokens", "0", "--port", "0"], "must be 1 or more"),
    ],
)
def test_what_cannot_work_is_a_sentence_before_a_model_is_loaded(wrong, sentence, capsys):
    assert main(["demo", "no/such/run", "--port", "0", *wrong]) == 2
    assert sentence in capsys.readouterr().err


def test_a_port_in_use_is_a_sentence(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        assert main(["demo", "no/such/run", "--port", str(other.getsockname()[1])]) == 2
    assert "Address already in use; give another one" in capsys.readouterr().err


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    assert main(["demo", "no/such/run"]) == 2
    assert "hrpo demo needs gradio; run: pip install 'hrpo_patches[demo]'" in capsys.readouterr().err
