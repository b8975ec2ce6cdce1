"""Pages in a real browser. What they say on the console and ask of the network is kept, so that tests can hold both to nothing."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SIZES = {"desktop": (1280, 800), "phone": (360, 740)}  # CSS pixels
PATIENCE = 180_000  # milliseconds until a page counts as hung: a busy machine takes long to load and to draw


@dataclass
class Seen:
    """What a page did besides being shown."""

    console: list[str] = field(default_factory=list)  # messages and errors that nobody caught
    requests: list[str] = field(default_factory=list)  # addresses, without data: and blob: ones


@contextmanager
def open_page(size: str = "desktop", scheme: str = "light", scripts: bool = True) -> Iterator[tuple]:
    """A fresh page of a headless Chromium, and what it did: yields (playwright's Page, Seen). Skips where no browser is installed.

    Args:
        size: "desktop" or "phone"; the phone has a touch screen.
        scheme: "light" or "dark", what the reader's system prefers.
        scripts: False for a reader who allows none.
    """
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    width, height = SIZES[size]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, java_script_enabled=scripts, has_touch=size == "phone"
        )
        context.set_default_timeout(PATIENCE)
        page, seen = context.new_page(), Seen()
        page.on("console", lambda message: seen.console.append(message.text))
        page.on("pageerror", lambda error: seen.console.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("data:", "blob:")) or seen.requests.append(request.url))
        try:
            yield page, seen
        finally:
            browser.close()
