"""The page in a real browser: with the keyboard, on the screen of a phone, and with hostile titles."""

import contextlib
import shutil

import pyarrow as pa
import pytest
import server_process
from fake_model import FakeModel, items_table, publish

from s2s_serve.server.catalogue import Catalogue
from s2s_serve.server.loading import Served

BROWSER = next(
    filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no browser; install Debian's chromium-headless-shell"
)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as play:
        started = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    directory = tmp_path_factory.mktemp("export")
    publish(directory, 1)
    with (
        server_process.app(directory) as app,
        server_process.in_thread(app.asgi) as address,
    ):
        yield address


@contextlib.contextmanager
def opened(browser, address, **options):
    """A page on which no error happens and which asks no other server."""
    context = browser.new_context(**options)
    context.set_default_timeout(20_000)
    page, errors, asked = context.new_page(), [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    # A status of 4xx is an error of the console, too.
    page.on("console", lambda m: errors.append(m.text) if "Content Security" in m.text else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.get_by_role("combobox").wait_for()
    yield page
    assert errors == []
    assert [url for url in asked if not url.startswith((address, "data:"))] == []
    context.close()


def titles(page, place):
    return page.locator(f"#{place} .title").all_inner_texts()


def test_a_history_is_picked_with_the_keyboard(browser, address):
    with opened(browser, address) as page:
        field = page.get_by_label("item_id")
        field.press_sequentially("movie 12")
        page.get_by_role("option").first.wait_for()
        assert field.get_attribute("aria-expanded") == "true"
        for _ in range(2):
            page.keyboard.press("ArrowDown")
        chosen = page.locator("[role=option][aria-selected=true]")
        assert chosen.inner_text() == "Movie 121 (121)"
        assert field.get_attribute("aria-activedescendant") == chosen.get_attribute("id")
        page.keyboard.press("Enter")
        assert field.input_value() == "121"
        assert field.get_attribute("aria-expanded") == "false"
        # The column of the item fills the field of its name.
        assert page.get_by_label("cate").input_value() == str(121 % 7)
        page.keyboard.press("Enter")
        page.locator("#answer li").first.wait_for()
        assert titles(page, "answer") == [f"Movie {i}" for i in range(122, 132)]
        assert page.locator("#answer .score").first.inner_text() == "1.5000"
        assert page.get_by_role("status").inner_text() == "10 items, ranked by the model."
        assert page.locator("#version").inner_text() == "version 1"


def test_nearest_items_unknown_events_and_the_card(browser, address):
    with opened(browser, address) as page:
        page.get_by_label("item_id").fill("7, 150")
        page.get_by_label("Items", exact=True).fill("3")
        page.get_by_role("button", name="Recommend").click()
        page.locator("#answer li").first.wait_for()
        said = page.get_by_role("status").inner_text()
        assert said == "3 items, ranked by the model. 1 event was unknown to the model."
        page.get_by_role("button", name="Nearest to Movie 152").click()
        page.locator("#near li").first.wait_for()
        assert titles(page, "near") == ["Movie 151", "Movie 153", "Movie 150"]
        assert page.evaluate("document.activeElement.id") == "nearest"
        page.get_by_role("button", name="Add Movie 153 to the history").last.click()
        page.get_by_label("Remove this event").nth(1).wait_for()
        page.get_by_text("Movie 154").wait_for()
        card = page.locator("#card > dl > dt, #card > dl > dd").all_inner_texts()
        assert card[:5] == ["items", "100", "item_feature", "item_id", "features"]
        features = "column kind op item_id whole numbers id cate whole numbers id"
        assert " ".join(card[5].split()) == features
        assert card[6:] == ["evaluation", "1 value"]
        page.get_by_text("1 value").click()
        assert page.locator("#card dl dl").inner_text().split() == ["eval/ndcg@10", "0.1235"]


def test_a_mistake_is_shown_and_an_empty_history_is_answered(browser, address):
    with opened(browser, address) as page:
        page.get_by_role("button", name="Recommend").click()
        page.get_by_text("10 items, ranked by popularity.").wait_for()
        page.get_by_label("item_id").fill("abc")
        page.get_by_role("button", name="Recommend").click()
        alert = page.get_by_role("alert")
        page.get_by_text("item_id holds abc").wait_for()
        assert alert.inner_text() == "histories: row 0: item_id holds abc, expected whole numbers"


def test_titles_are_text_and_never_markup(browser, address):
    with opened(browser, address) as page:
        hostile = items_table()["title"][0].as_py()
        page.get_by_label("item_id").fill("<img")
        option = page.get_by_role("option").first
        assert option.inner_text() == f"{hostile} (100)"
        option.click()
        page.get_by_label("item_id").fill("199")
        page.get_by_role("button", name="Recommend").click()
        page.locator("#answer li").first.wait_for()
        assert titles(page, "answer")[0] == hostile
        page.get_by_role("button", name="Nearest to <img").click()
        page.get_by_role("heading", name=f"Nearest to {hostile}").wait_for()
        assert page.locator("img").count() == 0
        assert page.title() == "What next?"


def test_it_fits_a_phone_light_and_dark(browser, address):
    grounds = set()
    for scheme in ("light", "dark"):
        options = {"viewport": {"width": 320, "height": 640}, "color_scheme": scheme}
        with opened(browser, address, **options) as page:
            page.get_by_label("item_id").fill("120")
            page.keyboard.press("Enter")
            page.locator("#answer li").first.wait_for()
            page.get_by_role("button", name="Nearest to").first.click()
            page.locator("#near li").first.wait_for()
            assert page.evaluate("document.documentElement.scrollWidth") <= 320
            style = "getComputedStyle(document.body)"
            grounds.add(page.evaluate(f"{style}.backgroundColor"))
            assert contrast(*page.evaluate(f"[{style}.color, {style}.backgroundColor]")) > 7
    assert len(grounds) == 2


def test_every_control_has_a_name(browser, address):
    with opened(browser, address) as page:
        page.get_by_label("item_id").fill("120")
        page.keyboard.press("Enter")
        page.locator("#answer li").first.wait_for()
        controls = page.locator("button:visible, input:visible")
        names = [
            page.evaluate("e => e.ariaLabel || e.labels?.[0]?.innerText || e.innerText", handle)
            for handle in controls.element_handles()
        ]
        assert len(names) > 20
        assert all(name and name != "✕" for name in names)


def test_ids_of_64_bits_are_not_rounded(browser, tmp_path):
    large = 2**62 + 1

    class Large(FakeModel):
        def recommend(self, histories, **rules):
            asked.append(histories[0]["item_id"])
            found = super().recommend(histories, **rules)
            return [each._replace(items=[large], scores=[0.5]) for each in found]

        def similar(self, item, k=10):
            asked.append(item)
            return super().similar(150, k)

    asked = []
    table = pa.table({"item": pa.array([large]), "count": [1], "title": ["Large"]})
    served = Served(Large(), Catalogue(table))
    publish(tmp_path, 1)
    with (
        server_process.app(tmp_path, load=lambda _: served) as app,
        server_process.in_thread(app.asgi) as address,
        opened(browser, address) as page,
    ):
        page.get_by_label("item_id").fill("lar")
        page.get_by_role("option").first.click()
        page.get_by_role("button", name="Recommend").click()
        page.get_by_role("button", name="Nearest to Large").click()
        page.locator("#near li").first.wait_for()
        assert titles(page, "answer") == ["Large"]
        assert asked == [[large], large]


def test_the_page_asks_for_the_token(browser, tmp_path):
    publish(tmp_path, 1)
    with (
        server_process.app(tmp_path, token="secret") as app,
        server_process.in_thread(app.asgi) as address,
    ):
        context = browser.new_context()
        page = context.new_page()
        page.goto(address)
        page.get_by_label("This server needs a token").fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_role("alert").get_by_text("expected Bearer TOKEN").wait_for()
        page.get_by_label("This server needs a token").fill("secret")
        page.keyboard.press("Enter")
        page.get_by_role("combobox").wait_for()
        assert not page.locator("#login").is_visible()
        context.close()


def contrast(*colours):
    """The contrast of two colours, as WCAG 2 defines it."""
    light = []
    for colour in colours:
        parts = [int(p) / 255 for p in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(light) + 0.05) / (min(light) + 0.05)
