"""The page in Chromium: people at their keyboards, killed tabs, a killed server, hostile texts."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Error, Page, async_playwright

from rlhf_exp.annotation.campaign import Campaign, read_pairs
from rlhf_exp.safe_text import visible
from tests.annotation.serving import Served
from tests.lab import jsonl

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]

PROMPTS = 100
WAIT_MS = 60_000
LAPTOP, PHONE = {"width": 1366, "height": 768}, {"width": 390, "height": 844}
HOSTILE = (
    '<script>document.title = "owned"; document.body.innerHTML = "owned"</script>',
    "<img src=x onerror=\"document.title = 'owned'\"><svg onload=\"document.title='owned'\">",
    '</div></form></main><form action="//evil"><button name="choice" value="A">A</button>',
    "right-to-left \u202egnp.exe\u202c, isolates \u2066hidden\u2069, \u200bzero width",
    "control \x00 \x1b[31m red \x07",
    "x" * 100_000,
    "word " * 20_000,
    "\n" * 500 + "far below",
    "مرحبا بالعالم",
    "",
)


@asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    """Start the system's Chromium, or Playwright's own."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    async with async_playwright() as playwright:
        # Containers often run as root, where Chromium's sandbox cannot start.
        started = await playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        await started.close()


async def new_page(found: Browser, size: dict[str, int] | None = None, **options: Any) -> Page:
    context = await found.new_context(viewport=size or LAPTOP, **options)  # type: ignore[arg-type]
    page = await context.new_page()
    page.set_default_timeout(WAIT_MS)
    return page


async def keys_work(page: Page) -> None:
    await page.wait_for_selector('body[data-keys="on"]')


async def press(page: Page, key: str) -> None:
    """Press a key and wait for the page that follows."""
    await keys_work(page)
    before = page.url
    await page.keyboard.press(key)
    await page.wait_for_url(lambda url: url != before, wait_until="domcontentloaded")


def pairs(folder: Path) -> Path:
    rows = [
        {
            "prompt": f"\n\nHuman: Question {n}, please?\n\nAssistant:",
            "answer_a": f"first model's answer {n}",
            "answer_b": f"second model's answer {n}",
        }
        for n in range(PROMPTS)
    ]
    return jsonl(folder / "pairs.jsonl", rows)


# What everybody prefers is a rule on the text, so that each winner is known beforehand.
WINNERS = ("a", "tie", "b")


async def key_for(page: Page) -> str:
    """Return the key of the answer that the rule prefers, read from the page."""
    text = await page.inner_text(".answer >> nth=0")
    number = int(re.findall(r"answer (\d+)", text)[0])
    winner = WINNERS[number % 3]
    if winner == "tie":
        return "2"
    return "1" if ("first" in text) == (winner == "a") else "3"


async def judge(page: Page, link: str, until: Callable[[int], Awaitable[bool]]) -> None:
    """Answer by keyboard alone, from the link to the end, or until told to leave at once."""
    await page.goto(link)
    await page.keyboard.press("Tab")  # to the skip link
    await page.keyboard.press("Tab")  # to the button
    await page.keyboard.press("Enter")
    await page.wait_for_url(re.compile(r"/\d+$"))
    for count in range(PROMPTS + 1):
        if not (await page.title()).startswith("Question"):
            break
        await keys_work(page)
        key = await key_for(page)
        if await until(count):
            await page.keyboard.press(key)
            return
        await press(page, key)
    assert await page.inner_text("h1") == "Thank you"


def test_three_people_at_once_killed_tabs_and_a_killed_server(tmp_path: Path) -> None:
    file = pairs(tmp_path)
    options = ("--annotators", "anna,ben,carla", "--study", str(tmp_path / "votes.sqlite"))

    async def whole(_: int) -> bool:
        return False

    async def anna(found: Browser, server: Served) -> None:
        async def half(count: int) -> bool:
            if count == PROMPTS // 2:
                server.kill()
                # Everybody's next answers meet a dead server, and wait for it.
                asyncio.get_running_loop().call_later(2.0, server.start)
            return False

        await judge(await new_page(found), server.links[0], half)

    async def ben(found: Browser, server: Served) -> None:
        async def third(count: int) -> bool:
            return count == PROMPTS // 3

        page = await new_page(found)
        await judge(page, server.links[1], third)
        await page.close()  # with an answer under way
        await judge(await new_page(found), server.links[1], whole)

    async def carla(found: Browser, server: Served) -> None:
        async def later(count: int) -> bool:
            return count == PROMPTS * 2 // 3

        page = await new_page(found)
        await judge(page, server.links[2], later)
        session = await page.context.new_cdp_session(page)
        with suppress(Error, TimeoutError):
            await asyncio.wait_for(session.send("Page.crash"), 1)
        await judge(await new_page(found), server.links[2], whole)

    async def everybody(server: Served) -> None:
        async with browser() as found:
            await asyncio.gather(*(work(found, server) for work in (anna, ben, carla)))

    with Served(tmp_path, str(file), *options) as server:
        asyncio.run(everybody(server))

    campaign = Campaign(tmp_path / "votes.sqlite")
    votes = campaign.votes()
    numbers = {item.id: int(item.prompt.split()[2].strip(",")) for item in campaign.items}
    assert len(votes) == 3 * PROMPTS
    assert len({(vote.item, vote.annotator) for vote in votes}) == 3 * PROMPTS
    assert {vote.revision for vote in votes} == {1}
    assert all(vote.winner == WINNERS[numbers[vote.item] % 3] for vote in votes)
    sides = [vote.side for vote in votes]
    assert 0.4 < sum(sides) / len(sides) < 0.6


def test_an_answer_waits_for_the_server(tmp_path: Path) -> None:
    async def work(server: Served) -> None:
        async with browser() as found:
            page = await new_page(found)
            await page.goto(f"{server.links[0]}/1")
            await keys_work(page)
            server.kill()
            await page.keyboard.press("3")
            await page.get_by_text("Not saved yet").wait_for()
            await page.keyboard.press("1")  # too late: the first answer is on its way
            server.start()
            await page.wait_for_url("**/2")
            await page.goto(f"{server.links[0]}/1")
            pressed = page.locator('button[aria-pressed="true"]')
            assert await pressed.get_attribute("value") == "B"

    with Served(tmp_path, str(pairs(tmp_path))) as server:
        asyncio.run(work(server))


def test_changing_an_answer_and_moving_about(tmp_path: Path) -> None:
    async def work(link: str) -> None:
        async with browser() as found:
            page = await new_page(found)
            await page.goto(f"{link}/1")
            await page.get_by_role("button", name="Answer B").click()
            await page.wait_for_url("**/2")
            await press(page, "2")
            await press(page, "ArrowLeft")
            assert page.url == f"{link}/2"
            await press(page, "ArrowLeft")
            assert page.url == f"{link}/1"
            other = await page.context.new_page()
            await other.goto(f"{link}/1")
            # Changed in one window: the other one is out of date, says so and stores nothing.
            await press(page, "1")
            assert page.url == f"{link}/3"
            await keys_work(other)
            await other.keyboard.press("2")
            await other.get_by_text("changed in another window").wait_for()
            await other.reload()
            pressed = other.locator('button[aria-pressed="true"]')
            assert await pressed.get_attribute("value") == "A"
            # Back shows what is stored, not what was.
            await page.go_back()
            await page.go_back()
            assert await page.locator('button[aria-pressed="true"]').count() == 1
            # Keys can be turned off.
            await page.goto(f"{link}/3")
            await keys_work(page)
            await page.get_by_label("Answer by the keys").uncheck()
            await page.keyboard.press("1")
            await page.wait_for_timeout(500)
            assert page.url == f"{link}/3"
            # Held down, a key answers one question.
            await page.get_by_label("Answer by the keys").check()
            sent: list[str] = []
            page.on("request", lambda one: sent.append(one.url) if one.method == "POST" else None)
            await page.keyboard.down("1")
            await page.wait_for_url("**/4")
            await keys_work(page)
            await page.keyboard.down("1")
            await page.wait_for_timeout(1000)
            assert sent == [f"{link}/3"]

    with Served(tmp_path, str(pairs(tmp_path))) as server:
        asyncio.run(work(server.links[0]))


@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_hostile_text_is_shown_as_text(tmp_path: Path, size: dict[str, int]) -> None:
    rows = [
        {"prompt": f"\n\nHuman: {text}\n\nAssistant:", "answer_a": text, "answer_b": f"plain {n}"}
        for n, text in enumerate(HOSTILE)
    ]
    file = jsonl(tmp_path / "pairs.jsonl", rows)
    expected = {item.answer_b: item.answer_a.strip() for item in read_pairs(file)}

    async def work(link: str) -> None:
        async with browser() as found:
            page = await new_page(found, size)
            said: list[str] = []
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("dialog", lambda dialog: said.append(dialog.message))
            page.on("request", lambda request: said.append(request.url))
            for number in range(1, len(HOSTILE) + 1):
                await page.goto(f"{link}/{number}")
                await keys_work(page)
                assert await page.title() == f"Question {number} of {len(HOSTILE)}"
                shown = await page.locator(".answer .text").evaluate_all(
                    "all => all.map(one => one.textContent)"
                )
                (plain,) = (text for text in shown if text.startswith("plain"))
                (hostile,) = (text for text in shown if text != plain)
                wanted = visible(expected[plain])
                assert hostile == (wanted or "This answer is empty.")
                assert await page.locator("form button").count() == 3
                assert await page.locator("main img, main svg, main script").count() == 0
                wide = await page.evaluate("document.documentElement.scrollWidth")
                assert wide <= size["width"]
                assert await page.locator("form button >> nth=1").is_visible()
            # Nothing was said, and nothing fetched but from the server itself.
            base = link.partition("/a/")[0]
            assert all(line.startswith((f"{base}/a/", f"{base}/static/")) for line in said), said

    with Served(tmp_path, str(file)) as server:
        asyncio.run(work(server.links[0]))


def test_what_a_screen_reader_is_told(tmp_path: Path) -> None:
    async def work(link: str) -> None:
        async with browser() as found:
            page = await new_page(found, PHONE, has_touch=True)
            await page.goto(f"{link}/1")
            await keys_work(page)
            told = await page.locator("body").aria_snapshot()
            for line in (
                'heading "Question 1 of 100" [level=1]',
                'heading "Conversation" [level=2]',
                'heading "Person" [level=3]',
                'heading "Answer A" [level=2]',
                'heading "Answer B" [level=2]',
                'group "Which answer is better overall?"',
                'button "Answer A"',
                'button "Tie"',
                'button "Answer B"',
                'progressbar "0 of 100 answered"',
                'link "Question after"',
            ):
                assert line in told, told
            assert "status" in told
            assert await page.evaluate("document.activeElement.id") == "title"
            for button in await page.locator("button").all():
                box = await button.bounding_box()
                assert box is not None
                assert box["height"] >= 44  # a finger's width
            await page.get_by_role("button", name="Tie").tap()
            await page.wait_for_url("**/2")
            await page.goto(f"{link}/1")
            assert 'button "Tie" [pressed]' in await page.locator("body").aria_snapshot()

    with Served(tmp_path, str(pairs(tmp_path))) as server:
        asyncio.run(work(server.links[0]))


def test_without_scripts(tmp_path: Path) -> None:
    async def work(link: str) -> None:
        async with browser() as found:
            page = await new_page(found, java_script_enabled=False)
            await page.goto(f"{link}/1")
            await page.get_by_role("button", name="Answer A").click()
            await page.wait_for_url("**/2")
            assert "1 of 100 answered" in await page.inner_text("header")

    with Served(tmp_path, str(pairs(tmp_path))) as server:
        asyncio.run(work(server.links[0]))


@pytest.mark.parametrize("width", [390, 360])
def test_a_thumb_finds_what_it_saw(tmp_path: Path, width: int) -> None:
    """A phone has no keys to tell of, and a choice moves none of the buttons below it."""

    async def work(link: str) -> None:
        async with browser() as found:
            size = {"width": width, "height": 844}
            page = await new_page(found, size, is_mobile=True, has_touch=True)
            await page.goto(f"{link}/1")
            await keys_work(page)
            assert not await page.locator("kbd").first.is_visible()
            assert not await page.get_by_label("Answer by the keys").is_visible()
            first, second = page.locator("form").nth(0), page.locator("form").nth(1)
            # Within the page: the next question may be scrolled to.
            place = "one => one.getBoundingClientRect().top + scrollY"
            before = await second.evaluate(place)
            await first.get_by_role("button", name="Answer A").tap()
            await first.locator('button[aria-pressed="true"]').wait_for()
            assert await second.evaluate(place) == before
            assert await page.evaluate("document.documentElement.scrollWidth") == width

    with Served(tmp_path, str(pairs(tmp_path)), "--criteria", "overall,harmless") as server:
        asyncio.run(work(server.links[0]))
