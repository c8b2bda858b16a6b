"""The tables of a sweep's page in Chromium: sorted by mouse and keyboard, whole without script."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from rlhf_exp.report.sweep.page import render_sweep
from tests.report.sweep.lab import swept
from tests.report.sweep.test_gather import gathered

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

ROWS = "[...document.querySelectorAll('#runs tbody tr')].map(row => row.cells[{}].textContent)"


def opened(browser: Browser, path: Path, **options: object) -> Page:
    page = browser.new_context(**options).new_page()  # type: ignore[arg-type]
    page.goto(path.as_uri())
    return page


def test_tables_sort_and_are_whole_without_a_script(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(render_sweep(gathered(swept(tmp_path / "outputs"))), encoding="utf-8")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = opened(browser, path)
        heads = page.locator("#runs thead th")
        titles = [text.strip() for text in heads.all_inner_texts()]
        objective, rate = titles.index("Objective"), titles.index("lr")
        heads.nth(objective).get_by_role("button").click()
        found = page.evaluate(ROWS.format(objective))
        assert found == ["6", "5", "4", "2", "1", "–"]
        assert heads.nth(objective).get_attribute("aria-sort") == "descending"
        page.keyboard.press("Enter")  # the button has the focus
        found = page.evaluate(ROWS.format(objective))
        assert found == ["1", "2", "4", "5", "6", "–"]  # what is missing stays last
        heads.nth(rate).get_by_role("button").click()
        assert page.evaluate(ROWS.format(rate)) == ["0.0001"] * 3 + ["0.001"] * 3
        assert page.locator("#runs [aria-sort]").count() == 1
        plain = opened(browser, path, java_script_enabled=False)
        assert plain.locator("#runs tbody tr").count() == 6
        assert plain.locator("button").count() == 0
        narrow = opened(browser, path, viewport={"width": 390, "height": 844})
        assert narrow.evaluate("document.documentElement.scrollWidth") == 390
        browser.close()
