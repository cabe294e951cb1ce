"""`minimind web` in a real browser, narrow and wide, light and dark, in both languages."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minimind.talk.speaker import Speaker, open_speaker
from minimind.talk.web import page, serve
from tests.test_chat import checkpoint  # noqa: F401

pytest.importorskip("gradio", reason="no gradio")
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")


@pytest.fixture(scope="module")
def blocks(checkpoint: Path) -> Iterator[Any]:  # noqa: F811
    names = dict.fromkeys(("one", "two", "three", "four", "five"), checkpoint)
    blocks = page(
        [*names], 2, lambda name: open_speaker(str(names[name])), lambda name, is_chinese: ""
    )
    serve(blocks, "127.0.0.1", None, None, prevent_thread_lock=True)
    yield blocks
    blocks.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def slow_blocks(checkpoint: Path) -> Iterator[Any]:  # noqa: F811
    """Its two checkpoints take seconds for an answer."""

    def opened(_: str) -> Speaker:
        speaker = open_speaker(str(checkpoint))
        speaker.model.model.register_forward_pre_hook(
            lambda _, args: time.sleep(0.1 if len(args[0]) == 1 else 0.5)
        )
        return speaker

    blocks = page(["one", "two"], 2, opened, lambda name, is_chinese: "")
    serve(blocks, "127.0.0.1", None, None, prevent_thread_lock=True)
    yield blocks
    blocks.close()


@pytest.mark.parametrize("size", [(390, 844), (844, 390)])
def test_a_long_answer_leaves_room_on_a_phone(
    checkpoint: Path,  # noqa: F811
    browser: Any,
    size: tuple[int, int],
) -> None:
    class Rambler(Speaker):
        end_ids = ()  # type: ignore[assignment]

    def opened(_: str) -> Speaker:
        return Rambler(**vars(open_speaker(str(checkpoint))))

    width, height = size
    blocks = page(["one", "two"], 2, opened, lambda name, is_chinese: "")
    serve(blocks, "127.0.0.1", None, None, prevent_thread_lock=True)
    context = browser.new_context(viewport={"width": width, "height": height}, has_touch=True)
    window = context.new_page()
    window.goto(blocks.local_url)
    window.locator("button.label-wrap").first.click()
    ask(window, "1+1?")
    window.get_by_text("--max-new-tokens").or_(window.get_by_text("/reset")).first.wait_for()
    for part in (".chat", ".tokens"):
        assert window.locator(part).first.bounding_box()["height"] <= 0.6 * height
    # The last token's numbers are in sight, too.
    window.locator(".token").last.tap()
    shown = window.locator(".token").last.locator("span").bounding_box()
    assert 0 <= shown["y"] <= height - shown["height"]
    assert 0 <= shown["x"] <= width - shown["width"]
    context.close()
    blocks.close()


@pytest.fixture
def window(slow_blocks: Any, browser: Any) -> Iterator[Any]:
    context = browser.new_context(locale="en-US")
    window = context.new_page()
    window.goto(slow_blocks.local_url)
    yield window
    context.close()


def ask(window: Any, question: str) -> None:
    box = window.locator("textarea").first
    box.fill(question)
    box.press("Enter")


ENGLISH = (
    "New conversation",
    "Thought",
    "No stage of this project",
    "At most 4",
    "Choose a checkpoint",
)
CHINESE = "新对话", "思考", "不是本项目的任何阶段", "最多并排 4", "请先勾选检查点"


@pytest.mark.parametrize(
    ("size", "scheme", "language", "words"),
    [((1280, 900), "light", "en-US", ENGLISH), ((390, 844), "dark", "zh-CN", CHINESE)],
)
def test_talking(
    blocks: Any,
    browser: Any,
    size: tuple[int, int],
    scheme: str,
    language: str,
    words: tuple[str, ...],
) -> None:
    anew, thought, unknown, at_most, none = words
    width, height = size
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, locale=language
    )
    window = context.new_page()
    hosts, faults = set(), []
    window.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    window.on("pageerror", lambda error: faults.append(f"{error}"))
    window.goto(blocks.local_url)
    chats = window.locator(".chat")
    # Shown as it is, and never loaded.
    picture = 'a<br>b <b>x</b> &lt;  3*4*5 <img src="http://elsewhere.test/x.png">'
    ask(window, picture)
    chats.first.locator(".bot").first.wait_for()
    assert chats.first.locator(".user .md").inner_text() == picture
    window.get_by_role("button", name=anew).click()
    window.locator(".user").first.wait_for(state="hidden")
    ask(window, "1+1?")
    answers = chats.get_by_text("2", exact=True)
    answers.nth(1).wait_for()
    assert chats.get_by_text("1+1=2").count() == answers.count() == 2  # thought and answer apart
    fold = chats.first.get_by_text(thought, exact=True)
    fold.click()
    chats.first.get_by_text("1+1=2").wait_for(state="hidden")
    # Each token has what was likely instead.
    window.locator("button.label-wrap").first.click()
    window.locator(".token").first.hover()
    window.locator(".token > span").first.wait_for(state="visible")
    window.locator("button.label-wrap").nth(1).click()
    window.get_by_text(unknown).first.wait_for()
    # What leaves no room is said, and not lost.
    ask(window, "x" * 10_000)
    window.get_by_text("the model 256 positions").first.wait_for()
    window.wait_for_function("document.querySelector('textarea').value.length === 10000")
    assert answers.count() == 2
    # Of five, four are shown, and of none, none is asked.
    for name in ("three", "four", "five"):
        window.get_by_label(name).check()
    window.get_by_text(at_most).first.wait_for()
    window.get_by_label("five").and_(window.locator(":not(:checked)")).wait_for()
    for name in ("one", "two", "three", "four"):
        window.get_by_label(name).uncheck()
    ask(window, "1+1?")
    window.get_by_text(none).first.wait_for()
    assert window.locator("textarea").first.input_value() == "1+1?"
    for name in ("one", "two"):
        window.get_by_label(name).check()
    # A third beside them, and everything anew.
    window.get_by_label("three").check()
    window.get_by_role("button", name=anew).click()
    answers.first.wait_for(state="hidden")
    ask(window, "你好")
    chats.get_by_text("好😀！").nth(2).wait_for()
    others = {*ENGLISH, *CHINESE} - {*words}
    assert not [word for word in others if word in window.inner_text("body")]
    assert window.evaluate("document.documentElement.scrollWidth") <= width
    context.close()
    assert not faults
    assert {host.split(":")[0] for host in hosts if host} == {"127.0.0.1"}


@pytest.mark.parametrize("first", ["a question", "another reply"])
def test_a_question_during_an_answer_comes_after_it(window: Any, first: str) -> None:
    box, chats = window.locator("textarea").first, window.locator(".chat")
    ask(window, "1+1?")
    if first == "another reply":
        chats.get_by_text("2", exact=True).nth(1).wait_for()
        window.get_by_role("button", name="Another reply").click()
    window.wait_for_timeout(100)
    ask(window, "你好")
    for _ in range(60):  # who sees it still in the box sends it again
        if not box.input_value():
            break
        window.wait_for_timeout(500)
        box.press("Enter")
    asked = chats.first.locator(".user .md")
    asked.nth(1).wait_for()
    assert chats.get_by_text("2", exact=True).count() >= 2  # answered to the end before
    assert asked.all_inner_texts() == ["1+1?", "你好"]


@pytest.mark.parametrize("milliseconds", [300, 700, 1500])  # before, with, after first tokens
def test_a_new_conversation_ends_the_answer(window: Any, milliseconds: int) -> None:
    answers = window.locator(".chat").get_by_text("2", exact=True)
    ask(window, "1+1?")
    window.wait_for_timeout(milliseconds)
    window.get_by_role("button", name="New conversation").click()
    window.wait_for_timeout(3000)  # an answer that goes on would be there again
    assert window.locator(".user, .bot, .token").count() == 0
    ask(window, "1+1?")
    answers.nth(1).wait_for()
    assert window.locator(".user").count() == 2  # one in each column
