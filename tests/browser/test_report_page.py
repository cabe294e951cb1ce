"""The report's page in a real browser, without a network: axe, narrow and wide, light and dark."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.test_report import prediction, run, write
from tests.test_report_page import built, workspace_page

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright")
axe_core = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=["results", "workspace"])
def address(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "results":
        built(folder)
        return (folder / "index.html").as_uri()
    return workspace_page(folder).as_uri()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("language", ["en-US", "zh-CN"])
def test_everybody_can_read_it(
    browser: Any, address: str, size: str, scheme: str, language: str
) -> None:
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        locale=language,
        offline=True,
    )
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)
    for details in page.locator("details").all():
        details.evaluate("element => { element.open = true; }")
    found = axe_core.Axe().run(page).response["violations"]
    context.close()
    assert not said
    serious = [rule for rule in found if rule["impact"] in ("serious", "critical")]
    assert [(rule["id"], rule["nodes"][0]["html"]) for rule in serious] == []


def test_nothing_but_tables_is_wider_than_a_phone(browser: Any, address: str) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 740})
    page.goto(address)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()


def test_what_goes_on_beyond_an_edge_fades_there(browser: Any, address: str) -> None:
    page = browser.new_page(viewport={"width": 240, "height": 740})
    page.goto(address)
    table = page.locator("#checkpoints .wide").first
    table.and_(page.locator(".more-right:not(.more-left)")).wait_for()
    table.evaluate("element => { element.scrollLeft = element.scrollWidth; }")
    table.and_(page.locator(".more-left:not(.more-right)")).wait_for()
    page.set_viewport_size({"width": 1280, "height": 740})
    table.and_(page.locator(":not(.more-left, .more-right)")).wait_for()
    page.close()


def test_words_without_an_end_are_broken(browser: Any, tmp_path: Path) -> None:
    long = "x_" * 300
    row = prediction(prompt=long, output=f"<think>{long}</think>{long}", answer=long)
    write(tmp_path, long[:60], [row])
    assert run(tmp_path, long[:60])[0] == 0
    page = browser.new_page(viewport={"width": 360, "height": 740})
    page.goto((tmp_path / "index.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()


def test_the_switches_and_filters_do_what_they_say(browser: Any, tmp_path: Path) -> None:
    built(tmp_path)
    page = browser.new_page(locale="en-US", color_scheme="light")
    page.goto((tmp_path / "index.html").as_uri())
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    assert page.locator("h1 .en").is_visible() and not page.locator("h1 .zh").is_visible()
    page.click("#language")
    page.click("#theme")
    page.reload()  # both are remembered
    assert page.locator("h1 .zh").is_visible() and not page.locator("h1 .en").is_visible()
    assert page.evaluate(ground) != light
    page.select_option("#prompt-language", "zh")
    page.select_option("#verdict", "wrong")
    assert page.inner_text("#shown") == "12 / 24"
    assert page.locator(".prompt li:visible").count() == 12  # sft's: all wrong
    page.close()


def test_all_of_it_is_printed(browser: Any, tmp_path: Path) -> None:
    built(tmp_path)
    page = browser.new_page(color_scheme="light")
    page.goto((tmp_path / "index.html").as_uri())
    page.click("#theme")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert not page.locator("header").is_visible()
    assert page.locator("details:not([open])").count() == 0
    assert page.pdf().startswith(b"%PDF")
    page.close()
