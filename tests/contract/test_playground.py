"""The playground in a real browser against a real server with the bundled models."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect, sync_playwright

from tests.support.serving import Launch, Served

pytestmark = pytest.mark.slow

NO_BROWSER = "no browser: `make browser` gets one, and so does Debian's `apt-get install chromium`"
PROMPT = """It's "good" for $5 \\ 100%: write a short review of a hotel – né?"""
METHODS = ("entrgi", "bon")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Playwright's own Chromium, or the one that the machine has."""
    with sync_playwright() as playwright:
        places = (
            playwright.chromium.executable_path,
            *map(shutil.which, ("chromium", "chromium-browser", "google-chrome")),
        )
        path = next((each for each in places if each and Path(each).exists()), None)
        if path is None:
            pytest.skip(NO_BROWSER)
        started = playwright.chromium.launch(executable_path=path)
        yield started
        started.close()


@pytest.fixture(scope="module")
def bundled(launch: Launch) -> Served:
    server = launch(model=None)
    server.wait_ready()
    return server


@pytest.fixture
def page(browser: Browser, bundled: Served) -> Iterator[Page]:
    """The page, with its columns; it may speak to its server alone, and nothing on it may fail."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    opened = context.new_page()
    failures: list[object] = []
    asked: list[str] = []

    def told(message: ConsoleMessage) -> None:
        if "Security Policy" in message.text:
            failures.append(message.text)

    opened.on("console", told)
    opened.on("pageerror", lambda error: failures.append(error))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(bundled.url)
    expect(opened.locator("fieldset.column")).to_have_count(2)
    yield opened
    assert failures == []
    assert {url for url in asked if url.startswith("http") and not url.startswith(bundled.url)} == set()
    context.close()


def generate(page: Page, **fields: str) -> list[str]:
    """The texts of all columns after a run."""
    for name, value in fields.items():
        page.fill(f"#{name}", value)
    page.click("#go")
    expect(page.locator("#message")).to_contain_text("reward", timeout=60_000)
    return page.locator(".text").all_text_contents()


def masked(page: Page) -> int:
    return page.locator(".tokens .masked").count()


def copied(page: Page, column: int, what: str) -> str:
    page.get_by_role("button", name=f"Copy as {what}").nth(column).click()
    page.click("#copy")
    expect(page.locator("#copied")).to_have_text("Copied.")
    page.get_by_role("button", name="Close").click()
    text: str = page.evaluate("navigator.clipboard.readText()")
    return text


def last_step(page: Page) -> int:
    return int(page.get_attribute("#step", "max") or 0)


def test_two_methods_on_one_seed_and_the_requests_that_give_the_same(page: Page, bundled: Served) -> None:
    texts = generate(page, prompt=PROMPT, seed="7")
    given = {"messages": [{"role": "user", "content": PROMPT}], "seed": 7}
    for column, method in enumerate(METHODS):
        answer = bundled.post("/v1/chat/completions", {**given, "guidance": method, "best_of": 4}).json()
        text = answer["choices"][0]["message"]["content"].strip()
        shown = page.locator("#results section").nth(column)
        assert texts[column] == text
        expect(shown.locator(".facts")).to_contain_text(f"{answer['choices'][0]['reward']:.3f}".lstrip("-"))
        rewards = shown.locator(".canvas h3 span span").all_text_contents()
        assert [float(each.replace("−", "-")) for each in rewards] == [
            round(each, 2) for each in answer["guidance"]["rewards"][0]
        ]
        done = subprocess.run(copied(page, column, "curl"), shell=True, capture_output=True, timeout=120)
        assert json.loads(done.stdout)["choices"][0]["message"]["content"].strip() == text
        script = copied(page, column, "Python")
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
        assert done.stdout.decode().strip() == text, done.stderr
    expect(page.locator("#chart .thick")).to_have_count(2)  # bon's rewards are read for the curve alone


def test_steps_and_tokens_by_keyboard(page: Page) -> None:
    generate(page, seed="7")
    steps, slider, places = last_step(page), page.locator("#step"), 8 * 48
    expect(page.locator("#where")).to_have_text(f"after step {steps} of {steps}")
    assert masked(page) == 0
    slider.focus()
    page.keyboard.press("Home")
    assert masked(page) == places
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    revealed = [int(words.split(" of ")[0]) for words in page.locator(".about").all_text_contents()]
    assert 0 < sum(revealed) == places - masked(page) < places
    page.click("#forward")
    page.click("#back")
    expect(page.locator("#where")).to_have_text(f"after step 5 of {steps}")
    assert page.locator(".tokens .new").count() == 8
    tokens = page.get_by_role("listbox", name="Tokens of trajectory 1").first
    tokens.focus()
    page.keyboard.press("End")
    about = tokens.locator("xpath=../p")
    assert_active(tokens, about, 48)
    page.keyboard.press("ArrowLeft")
    assert_active(tokens, about, 47)
    tokens.locator(".new").hover()
    expect(about).to_contain_text("revealed in step 5, entropy")
    page.click("#play")
    expect(page.locator("#where")).to_have_text(f"after step {steps} of {steps}", timeout=30_000)
    expect(page.locator("#play")).to_have_text("Play")


def assert_active(tokens: Locator, about: Locator, position: int) -> None:
    """A screen reader is told of this position what the page shows of it."""
    expect(about).to_contain_text(f"Position {position}: ")
    active = tokens.page.locator(f"#{tokens.get_attribute('aria-activedescendant')}")
    expect(active).to_have_attribute("aria-label", about.text_content() or "")
    expect(active).to_have_attribute("aria-selected", "true")


def test_a_link_brings_the_settings_back(page: Page) -> None:
    page.click("#add")
    column = page.locator("fieldset.column").nth(2)
    column.locator("[name=method]").select_option("aps")
    column.locator("[name=eta]").fill("1.5")
    column.locator("[name=best_of]").fill("2")
    page.get_by_role("button", name="Remove column B").click()
    texts = generate(page, prompt=PROMPT)  # on a seed that the page draws
    link, seed = page.url, page.locator(".facts").first.text_content() or ""
    page.goto("about:blank")
    page.goto(link)
    expect(page.locator("fieldset.column")).to_have_count(2)
    assert page.input_value("#prompt") == PROMPT
    assert f"seed {page.input_value('#seed')} " in seed
    assert page.locator("[name=eta]").nth(1).input_value() == "1.5"
    assert generate(page) == texts
    page.goto("about:blank")
    page.goto(link[: len(link) // 2])
    expect(page.locator("#message")).to_contain_text("link cannot be read")


def test_a_copy_says_whose_it_is(page: Page, bundled: Served) -> None:
    column = page.locator("fieldset.column").nth(1)
    column.locator("[name=resample]").select_option("reward")
    column.locator("summary").click()
    column.locator("[name=strength]").fill("20")
    texts = generate(page, prompt=PROMPT, seed="7")
    guidance = {"method": "bon", "resample": {"by": "reward", "strength": 20}}
    asked = {"messages": [{"role": "user", "content": PROMPT}], "seed": 7, "best_of": 4, "guidance": guidance}
    answer = bundled.post("/v1/chat/completions", asked).json()
    assert texts[1] == answer["choices"][0]["message"]["content"].strip()
    (meetings,) = answer["guidance"]["resampled"]
    copies = [""] * 4
    for _, ancestors in meetings:
        for trajectory, ancestor in enumerate(ancestors):
            if ancestor != trajectory:
                copies[trajectory] = f"copy of {ancestor + 1}"
    shown = page.locator("#results section")
    told = shown.nth(1).locator(".copied").all_text_contents()
    assert [each.partition(" since")[0] for each in told] == copies
    lineage = shown.nth(1).locator(".lineage")
    expect(shown.nth(0).locator(".lineage")).to_be_hidden()
    label = lineage.get_attribute("aria-label") or ""
    assert len(label.split("; ")) == len(meetings)
    page.click("#first")
    expect(lineage).to_be_hidden()
    assert shown.nth(1).locator(".copied").all_text_contents() == [""] * 4


def test_a_phone_shows_it_without_scrolling_sideways(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    generate(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_refusal_and_a_stop_say_what_happened(page: Page) -> None:
    page.locator("[name=max_tokens]").first.fill("100000")
    page.click("#go")
    expect(page.locator(".failed")).to_contain_text("max_tokens")
    expect(page.locator("#go")).to_be_enabled(timeout=60_000)
    page.route("**/v1/chat/completions", lambda route: None)  # there will be no answer
    page.click("#go")
    page.click("#stop")
    expect(page.locator("#message")).to_contain_text("the server works on it no more")
