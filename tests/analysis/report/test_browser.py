"""A report in a real browser: no error, no missing picture, tables that sort and filter, text that can be read.

Chromium and its driver come from the system's packages; without them these tests are skipped.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bayes_klrl as bk
from tests.analysis.report.pages import results

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Chromium and chromedriver are not installed"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

# The contrast of each visible text with what is behind it (WCAG 2.2, 1.4.3), blended over transparent backgrounds.
CONTRASTS = """
const rgba = (c) => { const n = c.match(/[\\d.]+/g).map(Number); return n.length === 3 ? [...n, 1] : n; };
const linear = (v) => v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => [r, g, b].map(linear)
  .reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
const behind = (e) => { const c = rgba(getComputedStyle(e).backgroundColor);
  return c[3] === 1 || !e.parentElement ? c : over(c, behind(e.parentElement)); };
return [...document.querySelectorAll("body *")].filter((e) => e.offsetParent !== null &&
  [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())).map((e) => {
    const back = behind(e), ink = over(rgba(getComputedStyle(e).color), back), [a, b] = [light(ink), light(back)];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName + "." + e.className, e.textContent.slice(0, 40)]; });
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bk.report(results(), tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--no-first-run",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


def theme(browser: Any, name: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": name}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def test_no_error_and_no_missing_picture(browser: Any, page: Path) -> None:
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
    broken = "return [...document.images].filter((i) => !i.complete || i.naturalWidth < 100).map((i) => i.alt)"
    assert browser.execute_script(broken) == []
    assert browser.title == "Report of bayes_klrl"  # a hostile completion did not change it


@pytest.mark.parametrize("name", ["light", "dark"])
def test_every_text_can_be_read(browser: Any, page: Path, name: str) -> None:
    theme(browser, name)
    browser.get(page.as_uri())
    dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (dark == "rgb(255, 255, 255)") == (name == "light")
    found = browser.execute_script(CONTRASTS)
    assert len(found) > 50
    assert [each for each in found if each[0] < 4.5] == []


def test_a_table_is_sorted_and_filtered(browser: Any, page: Path) -> None:
    browser.get(page.as_uri())
    rows = """
    const box = [...document.querySelectorAll(".interactive")].find((b) => b.dataset.label === "completions");
    const table = box.querySelector("table");
    return [...table.tBodies[0].rows].filter((r) => !r.hidden).map((r) => [...r.cells].map((c) => c.textContent));
    """
    click = """
    const box = [...document.querySelectorAll(".interactive")].find((b) => b.dataset.label === "completions");
    box.querySelectorAll("th button")[arguments[0]].click();
    """
    before = browser.execute_script(rows)
    browser.execute_script(click, 3)
    rewards = [float(row[3]) for row in browser.execute_script(rows)]
    assert rewards == sorted(float(row[3]) for row in before)
    browser.execute_script(click, 3)
    assert [float(row[3]) for row in browser.execute_script(rows)] == rewards[::-1]
    (field,) = [
        label.find_element("css selector", "input")
        for label in browser.find_elements("css selector", "label")
        if "completions" in label.text
    ]
    field.send_keys("svi")
    assert {row[0] for row in browser.execute_script(rows)} == {"SVI"}


def test_nothing_is_cut_off_on_a_phone(browser: Any, page: Path) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    )
    browser.get(page.as_uri())
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert wide <= 360


def test_it_can_be_printed(browser: Any, page: Path) -> None:
    browser.get(page.as_uri())
    printed = browser.execute_cdp_cmd("Page.printToPDF", {})
    assert len(printed["data"]) > 10_000
