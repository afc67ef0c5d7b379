"""A real browser for tests: Chromium, headless, that notes whatever a page asks for, says or complains of."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Dialog, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="neither chromium nor google-chrome is installed")


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Chromium of this machine."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, path: Path, width: int = 1280, height: int = 800, **options: Any) -> Iterator[Page]:
    """A page from a file. Fails at the end where it asked for anything else, raised an error, or opened a dialog."""
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    page = context.new_page()
    noted: list[str] = []

    def refuse(dialog: Dialog) -> None:
        noted.append(f"dialog {dialog.message}")
        dialog.dismiss()

    page.on("request", lambda request: noted.append(f"request {request.url[:100]}"))
    page.on("console", lambda message: noted.append(f"console {message.text}"))
    page.on("pageerror", lambda error: noted.append(f"error {error}"))
    page.on("dialog", refuse)
    page.goto(path.resolve().as_uri())
    yield page
    own = f"request {path.resolve().as_uri()[:100]}"
    assert noted == [own]
    context.close()
