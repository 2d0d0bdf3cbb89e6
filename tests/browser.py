"""A real browser without a screen, for tests of pages: Debian's Chromium, driven by Selenium."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

_ARGUMENTS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
              "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
              "--hide-scrollbars", "--force-device-scale-factor=1")


@dataclass(frozen=True)
class Shown:
    """A page as a browser shows it.

    ``requests``: addresses that it asked for, but for those within itself. ``complaints``: of the browser's console.
    """

    driver: webdriver.Chrome
    requests: list[str]
    complaints: list[str]


@contextmanager
def shown(page: Path, profile: Path, width: int = 1240) -> Iterator[Shown]:
    """Open a file; skips the test where there is no browser."""
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("no chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = Options()
    options.binary_location = chromium
    for argument in (*_ARGUMENTS, f"--user-data-dir={profile}", f"--window-size={width},900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, Service(chromedriver))
    try:
        driver.get(page.as_uri())
        events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        # The log also has what the browser's own first page asked for.
        asked = [event["params"]["request"]["url"] for event in events
                 if event["method"] == "Network.requestWillBeSent" and event["params"]["documentURL"] == page.as_uri()]
        assert page.as_uri() in asked  # else the log would show nothing whatever the page did
        yield Shown(driver, [url for url in asked if url != page.as_uri() and not url.startswith("data:")],
                    [entry["message"] for entry in driver.get_log("browser")])
    finally:
        driver.quit()


def screenshot(page: Shown, path: Path) -> None:
    """The whole page, not only what fits the window."""
    height = page.driver.execute_script("return document.documentElement.scrollHeight")
    page.driver.set_window_size(page.driver.get_window_size()["width"], height + 100)
    page.driver.save_screenshot(str(path))
