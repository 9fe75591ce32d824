"""The page in headless Chromium, by clicks, against a real server. Screenshots go to the folder SCREENSHOTS."""

import os
import re
import shutil
from itertools import accumulate
from pathlib import Path

import pytest
from PIL import Image
from serving import Server

pytestmark = pytest.mark.browser
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT = 240_000  # milliseconds; only what is broken takes so long


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("serve") / "data") as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    if not shutil.which(path):
        pytest.skip(f"no {path}")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def context(browser, server):
    """A browser context whose pages must neither log an error nor ask another host for anything."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(WAIT)
    problems = []
    context.on("weberror", lambda error: problems.append(str(error.error)))
    own = (server.url, "blob:", "data:")
    context.on("request", lambda request: request.url.startswith(own) or problems.append(request.url))
    context.on("console", lambda message: "Content Security Policy" in message.text and problems.append(message.text))
    yield context
    context.close()
    assert not problems


@pytest.fixture
def page(context, server):
    page = context.new_page()
    page.goto(server.url)
    return page


def shot(page, name):
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def submit(page, size="256", iterations="10"):
    """Take the samples and paint them; the card of the new job."""
    page.get_by_role("button", name="Use the samples").click()
    page.get_by_label("Size").select_option(size)
    if not page.get_by_label("Iterations").is_visible():
        page.get_by_text("More options").click()
    page.get_by_label("Iterations").fill(iterations)
    before = page.locator("article.job").count()
    page.get_by_role("button", name="Paint", exact=True).click()
    page.locator("article.job").nth(before).wait_for()
    return page.locator(f"article.job[data-id='{page.locator('article.job').first.get_attribute('data-id')}']")


def test_from_two_pictures_to_a_download(page):
    shot(page, "empty")
    assert page.get_by_role("button", name="Paint", exact=True).is_disabled()
    card = submit(page, iterations="60")
    card.locator("img.after:not([hidden])").wait_for()
    card.locator("polyline[points*=' ']").wait_for(state="attached")
    assert re.search(r"iteration \d+ of \d+", card.locator(".detail").inner_text())
    assert "left" in card.locator(".state").inner_text()
    shot(page, "running")
    page.get_by_text(re.compile("^Done in")).wait_for()
    slider = card.get_by_label("Compare")
    slider.focus()
    for _ in range(50):
        page.keyboard.press("ArrowRight")
    assert slider.input_value() == "50"
    shot(page, "done")
    with page.expect_download() as download:
        card.get_by_role("button", name="Download").click()
    assert Path(download.value.path()).read_bytes()[:4] == b"\x89PNG"


def test_cancel_keeps_the_picture_and_a_reload_keeps_the_history(page):
    card = submit(page, iterations="5000")
    card.locator("img.after:not([hidden])").wait_for()
    page.reload()  # the running job is picked up again
    card = page.locator("article.job")
    card.locator("img.after:not([hidden])").wait_for()
    assert card.locator("img.before").is_visible()
    card.get_by_role("button", name="Cancel").click()
    card.get_by_text(re.compile("^Cancelled")).wait_for()
    page.reload()
    page.get_by_text(re.compile("^Cancelled")).wait_for()
    card.get_by_role("button", name="Remove from the list").click()
    assert page.locator("article.job").count() == 0
    page.reload()
    assert page.get_by_text("will appear here").is_visible()


def test_wrong_files_and_refusals_are_told(page, tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    content = page.locator(".drop[data-name=content] input")
    content.set_input_files(tmp_path / "notes.txt")
    assert "notes.txt is not a picture" in page.get_by_role("alert").inner_text()
    page.get_by_role("button", name="Use the samples").click()
    page.get_by_role("button", name="Paint", exact=True).and_(page.locator(":enabled")).wait_for()
    content.set_input_files(tmp_path / "broken.png")
    page.get_by_role("button", name="Paint", exact=True).click()
    page.get_by_role("alert").filter(has_text=re.compile("content is (not a picture|damaged)")).wait_for()
    assert page.locator(".drop[data-name=content] img").is_hidden()  # as the browser cannot show it
    shot(page, "error")
    assert page.locator("article.job").count() == 0


def test_a_number_that_is_wrong_is_shown_though_it_was_hidden(page):
    page.get_by_role("button", name="Use the samples").click()
    page.get_by_text("More options").click()
    page.get_by_label("Iterations").fill("0")
    page.get_by_text("More options").click()
    assert page.get_by_label("Iterations").is_hidden()
    page.get_by_role("button", name="Paint", exact=True).click()
    assert page.get_by_label("Iterations").is_visible()
    assert page.get_by_label("Iterations").evaluate("input => input === document.activeElement")
    assert page.locator("article.job").count() == 0


def test_a_file_that_was_replaced_can_be_chosen_again(page, tmp_path):
    drop, path = page.locator(".drop[data-name=content]"), tmp_path / "a.png"
    for size in ((40, 30), (50, 30)):
        Image.new("RGB", size).save(path)
        drop.locator("input").set_input_files(path)
        assert drop.locator("input").input_value() == ""  # else the browser sees no change the next time
        drop.locator("img[src^=blob]").evaluate("image => image.decode()")
        assert drop.locator("img").evaluate("image => image.naturalWidth") == size[0]


def test_what_had_no_answer_is_sent_again_with_its_key_and_its_pictures(page):
    page.get_by_role("button", name="Use the samples").click()
    page.get_by_label("Size").select_option("256")
    page.get_by_text("More options").click()
    page.get_by_label("Iterations").fill("1")
    keys, paint = [], page.get_by_role("button", name="Paint", exact=True)

    def lose(route):
        keys.append(route.request.headers["idempotency-key"])
        if len(keys) < 3:
            return route.abort()
        page.get_by_role("button", name="Swap").click()  # under way: what is sent does not change any more
        assert paint.is_disabled()
        return route.continue_()

    page.route("**/v1/jobs", lose)
    paint.click()
    page.get_by_role("alert").filter(has_text="cannot be reached").wait_for()
    paint.click()
    page.get_by_text(re.compile("^Done in")).wait_for()
    assert paint.is_enabled()
    assert len(keys) == 3
    assert len(set(keys)) == 1
    before = page.locator("img.before").evaluate("image => image.naturalWidth / image.naturalHeight")
    style = page.locator(".drop[data-name=style] img").evaluate("image => image.naturalWidth / image.naturalHeight")
    assert before == pytest.approx(style, abs=0.01)  # the content of then is the style of now
    end = """async ([id]) => {
      const card = new Card({ id });
      await card.end({ ...(await (await ask(`/v1/jobs/${id}`)).json()), preview: 0 });
      return !card.after.hidden;
    }"""
    ids = page.locator("article.job").evaluate_all("cards => cards.map((card) => card.dataset.id)")
    assert page.evaluate(end, ids)  # a picture whose disk had no room for previews is shown in the end


def test_by_keyboard_on_a_dark_phone(browser, server):
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark", has_touch=True)
    context.set_default_timeout(WAIT)
    page = context.new_page()
    page.goto(server.url)
    page.get_by_role("button", name="Use the samples").focus()
    page.keyboard.press("Enter")
    page.locator("button.main:enabled").wait_for()
    page.get_by_label("Size").select_option("256")
    page.locator("button.main").focus()
    page.keyboard.press("Enter")
    page.locator("article.job img.after:not([hidden])").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    shot(page, "phone")
    page.get_by_role("button", name="Cancel").press("Enter")
    page.get_by_text(re.compile("^Cancelled")).wait_for()
    context.close()


def test_a_server_that_is_killed_and_comes_back_loses_no_picture(page, server):
    cards = [submit(page, iterations="8"), submit(page, iterations="3")]  # two at once
    cards[0].locator("img.after:not([hidden])").wait_for()
    server.kill()
    page.get_by_text("cannot be reached").wait_for()
    shot(page, "lost")
    server.start(ready=False)
    for card in cards:
        card.get_by_text(re.compile("^Done in")).wait_for()
    assert page.get_by_text("cannot be reached").count() == 0


def test_a_last_picture_that_is_lost_is_asked_for_again(page, server):
    page.route("**/image?*", lambda route: route.abort())
    card = submit(page, iterations="3")
    page.get_by_text("cannot be reached").wait_for()  # it ended: a preview that is lost is not worth a word
    assert server.get(f"/v1/jobs/{card.get_attribute('data-id')}")["state"] == "succeeded"
    page.unroute("**/image?*")
    card.get_by_text(re.compile("^Done in")).wait_for()
    assert card.locator("img.after").is_visible()
    assert page.get_by_text("cannot be reached").count() == 0


def test_many_jobs_leave_connections_for_the_rest(browser, tmp_path):
    with Server(tmp_path / "data", "--workers", "3") as server:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(WAIT)
        streams = []  # 1 for each that was opened, -1 for each that is over
        for event, change in (("request", 1), ("requestfinished", -1), ("requestfailed", -1)):
            page.on(event, lambda request, by=change: request.url.endswith("/events") and streams.append(by))
        page.goto(server.url)
        cards = [submit(page, iterations="5000") for _ in range(8)]
        for card in cards[:3]:  # they run at once
            card.locator("img.after:not([hidden])").wait_for()
            card.get_by_text(re.compile("^Painting")).wait_for()
        assert page.get_by_text(re.compile("^Waiting")).count() == 5
        assert max(accumulate(streams)) == 2
        shot(page, "many")
        with page.expect_event("requestfailed", lambda request: sum(streams) == 0):  # none while nobody looks
            page.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
        page.evaluate("delete document.hidden")
        for card in reversed(cards):
            card.get_by_role("button", name="Cancel").click()
            card.get_by_text(re.compile("^Cancelled")).wait_for()
        submit(page, iterations="3").get_by_text(re.compile("^Done in")).wait_for()
        page.close()
