"""Starts `hrpo demo` and opens its page in Chromium; also a script that takes the picture of docs/demo.md."""

import os
import subprocess
import sys
from contextlib import contextmanager

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
