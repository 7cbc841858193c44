"""Starts `hrpo demo` and opens its page in Chromium; as a script, it takes the picture of docs/demo.md."""

import argparse
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


@contextmanager
def served(*words):
    """The address at which `hrpo demo` with these words serves its page."""
    command = [sys.executable, "-m", "hrpo_patches", "demo", *map(str, words), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("http://"), f"no address, but {line!r}"
        yield line.split()[0]
    finally:
        process.terminate()
        process.wait()


@contextmanager
def opened(address, profile, **size):
    """The page at `address` in a headless Chromium with a fresh `profile` folder, and the URLs that it asked for."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            str(profile), executable_path=CHROMIUM, headless=True, args=FLAGS, viewport=size or None
        )
        page, asked = browser.pages[0], []
        page.set_default_timeout(120_000)  # ms, for a machine that has much else to do
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        yield page, asked
        browser.close()


def ask(page, question, second="", thoughts=("live", "off")):
    """Fill in the page, click Ask, and wait for the answers."""
    page.get_by_label("Question", exact=True).fill(question)
    page.get_by_label("Second question").fill(second)
    for name in ("live", "off", "zeroed", "swapped"):
        page.get_by_role("checkbox", name=name, exact=True).set_checked(name in thoughts)
    page.get_by_role("button", name="Ask").click()


def picture(path, run, question, second, thoughts, longest):
    """Ask a run on its page, and save what the page then shows, with the tables open."""
    words = (run, "--max_new_tokens", longest)
    with (
        tempfile.TemporaryDirectory() as profile,
        served(*words) as address,
        opened(address, profile, width=1280, height=800) as (page, _),
    ):
        ask(page, question, second, thoughts)
        page.wait_for_selector(f'[data-thoughts="{thoughts[-1]}"]')
        for column in page.locator(".completion summary").all():
            column.click()
        page.screenshot(path=path, full_page=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path, help="the PNG")
    parser.add_argument("run", help="the run that is asked")
    parser.add_argument("--question", required=True)
    parser.add_argument("--second", default="", help="the second question, for swapped thoughts")
    parser.add_argument("--thoughts", nargs="+", default=["live", "off"], help="in the order of the page")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    given = parser.parse_args()
    picture(given.path, given.run, given.question, given.second, given.thoughts, given.max_new_tokens)
