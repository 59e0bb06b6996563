"""The recommender's page in a real browser, on a real server, with a collection of its own."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image

from simsearch import configs
from simsearch.commands.serve import bind
from simsearch.data.rendered.collection import render_collection
from simsearch.images import encode_thumbnail, read_image
from simsearch.index.faiss_index import FaissIndex
from simsearch.search.calibration_file import write_calibration
from simsearch.search.describe import encode
from simsearch.search.item_tables import item_table
from simsearch.search.writing import write_catalog
from simsearch.serving.app import create_app
from simsearch.serving.library import Library, Source
from simsearch.serving.limits import Limits

try:
    from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
except ImportError:
    sync_playwright = None
BROWSER = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(sync_playwright is None, reason="playwright is not installed: the page is NOT TESTED"),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH: the page is NOT TESTED"),
]

SHAPES = ((96, 96), (96, 64), (60, 96), (96, 24))  # width, height
FREE = Limits(rate=None)


def frozen(pooling: dict) -> dict:
    backbone = {"_target_": "simsearch.models.backbones.timm_backbone", "name": "test_resnet", "weights": "random"}
    target = "simsearch.models.frozen.FrozenRetriever"
    return {"_target_": target, "backbone": {**backbone, "size": 64, "runtime": "torch"}, "pooling": pooling}


REGIONS = frozen({"_target_": "simsearch.models.pooling.RMAC", "levels": 2})
PLAIN = frozen({"_target_": "simsearch.models.pooling.GeM"})
COLOUR = {
    "_target_": "simsearch.models.frozen.FrozenRetriever",
    "backbone": {"_target_": "simsearch.models.colour.colour_backbone", "size": 64, "levels": [1]},
    "pooling": {"_target_": "simsearch.models.pooling.Average"},
}
PARTS = {
    "_target_": "simsearch.models.parts.PartsRetriever",
    "weights": {"content": 0.7, "colour": 0.3},
    "encoders": {"content": REGIONS, "colour": COLOUR},
}


def built(config: dict) -> torch.nn.Module:
    torch.manual_seed(1)
    return configs.build(config["model"]).eval()


def make_catalog(folder: Path, root: Path, model: dict, columns: dict[str, list]) -> Path:
    encoder = built({"model": model})
    index = FaissIndex("Flat")
    index.add(encode(encoder, torch.stack([read_image(root / path, size=64) for path in columns["path"]])))
    thumbnails = [encode_thumbnail(read_image(root / path), 48) for path in columns["path"]]
    items = item_table(columns, thumbnails)
    write_catalog(folder, index=index, items=items, encoder=encoder, config={"model": model}, about={})
    return folder


# Ids and values in which something is a sign in an address, a filter's grammar or a list.
ODD = {
    "a, b": "oil; canvas", "50%": "ink | paper", "~x": '"oil"', "007": "a=b", "7": "1..2", "0007": "*",
    "c/d e.jpg": "!= no", "é#&?=": "it's", "position:1": "{x}", "..": "[y, z]", "a/../b": "\\", "z": " spaced",
}  # fmt: skip


def make_odd(folder: Path, root: Path, order: Iterable[int]) -> Path:
    """A catalog of the odd items in some order, without those that it leaves out; item i shows image i."""
    names, mediums, order = [*ODD], [*ODD.values()], list(order)
    columns = {
        "id": [names[i] for i in order],
        "path": [f"{i}.png" for i in order],
        "title": [f"Odd {i}" for i in order],
        "medium": [mediums[i] for i in order],
    }
    return make_catalog(folder, root, PLAIN, columns)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("page") / "images"


@pytest.fixture(scope="module")
def address(tmp_path_factory, root) -> Iterator[str]:
    """A server of two catalogs: `art`, of two parts, which explains, and `plain`, of one, to which all are strange."""
    root.mkdir()
    collection = render_collection(styles=4, artists=2, works=5, photographs=2)
    columns: dict[str, list] = {name: [] for name in ("id", "path", "title", "artist", "style", "year", "work")}
    for i, (image, labels) in enumerate(zip(collection.images, collection.labels.tolist(), strict=True)):
        width, height = SHAPES[i % len(SHAPES)]
        Image.fromarray(image[:, :height, :width].permute(1, 2, 0).numpy()).save(root / f"{i}.png")
        known = {a: collection.classes[j][labels[j]] for j, a in enumerate(collection.attributes)}
        row = {"id": str(i), "path": f"{i}.png", "title": f"Plate {i}", "year": str(1800 + i), **known}
        for name, values in columns.items():
            values.append(row[name])
    folder = tmp_path_factory.mktemp("catalogs")
    sources = {
        "art": Source(make_catalog(folder / "art", root, PARTS, columns), root),
        "plain": Source(make_catalog(folder / "plain", root, PLAIN, columns), root),
        "odd": Source(make_odd(root.parent / "odd", root, range(len(ODD))), root),
    }
    counts, rate = {"same_work": 100, "similar": 100}, {"same_work": 0.01, "similar": 0.01}
    weights = {"content": 0.7, "colour": 0.3}
    write_calibration(
        folder / "art",
        {
            "rate": rate,
            "same_work": [3],
            "similar": [-3],
            "floor": -2,
            "neighbours": 1,
            "weights": weights,
            "units": counts,
        },
    )
    strict = {
        "rate": rate,
        "same_work": [3],
        "similar": [2],
        "floor": 0,
        "neighbours": 1,
        "weights": {"content": 1.0},
        "units": counts,
    }
    write_calibration(folder / "plain", strict)
    library = Library(sources, device=torch.device("cpu"), limits=FREE)
    app = create_app(library, FREE)
    bound = bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.02)
    yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


Opened = Callable[..., Page]


@pytest.fixture
def opened(browser, address) -> Iterator[Opened]:
    """Opens the page at an address' hash; afterwards: nothing was asked of others, and nothing complained."""
    complaints: list[str] = []
    strangers: list[str] = []
    with contextlib.ExitStack() as stack:

        def opened(hash: str = "", **context) -> Page:
            context = {"viewport": {"width": 1280, "height": 850}, "reduced_motion": "reduce"} | context
            page = stack.enter_context(contextlib.closing(browser.new_context(**context))).new_page()
            page.set_default_timeout(15_000)
            own = urlsplit(address).netloc

            def asked(request) -> None:
                url = urlsplit(request.url)
                if url.scheme not in ("blob", "data") and url.netloc != own:
                    strangers.append(request.url)

            page.on("request", asked)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
            page.goto(f"{address}/{hash}")
            page.wait_for_selector(".work:not(.skeleton), .none:not([hidden]), .note")
            return page

        opened.complaints = complaints  # type: ignore[attr-defined]
        yield opened
    assert strangers == [], "the page must work with no internet"
    assert complaints == [], "errors in the browser's console"


def ids(page: Page) -> list[int]:
    return page.eval_on_selector_all(".work:not(.skeleton)", "cards => cards.map((card) => Number(card.dataset.id))")


def said(page: Page, name: str) -> str | None:
    """What the page's address says of something."""
    found = re.search(rf"[#&]{name}=([^&]*)", page.url)
    return unquote(found[1]) if found else None


def results(page: Page) -> Locator:
    return page.locator(".result")


def picture(page: Page, root: Path, number: int, name: str = "mine.png"):
    """A handle on a DataTransfer that holds the collection's image of this number as a file."""
    data = list((root / f"{number}.png").read_bytes())
    return page.evaluate_handle(
        """([data, name]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(data)], name, { type: "image/png" }));
            return transfer;
        }""",
        [data, name],
    )


def drop(page: Page, transfer, to: str = "new") -> None:
    page.dispatch_event("body", "dragenter", {"dataTransfer": transfer})
    page.dispatch_event(f"[data-to={to}]", "dragover", {"dataTransfer": transfer})
    page.dispatch_event(f"[data-to={to}]", "drop", {"dataTransfer": transfer})


def tune(page: Page, part: str, value: int) -> None:
    page.locator(f"input[data-part={part}], #{part}").first.evaluate(
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input', { bubbles: true })); }", value
    )


def settled(page: Page) -> None:
    expect(page.locator("#works")).not_to_have_attribute("aria-busy", "true")


def answers_to(page: Page, act: Callable[[], object], path: str = "/search") -> dict:
    with page.expect_response(lambda r: urlsplit(r.url).path.endswith(path) and r.ok) as waiting:
        act()
    return waiting.value.json()


# ------------------------------------------------------------------------------- the wall


def test_a_wall_of_works_at_their_own_shapes(opened):
    page = opened()
    expect(page.locator("#zone")).to_be_visible()
    expect(page.locator("#status")).to_have_text("80 works")
    assert len(ids(page)) == 60
    shapes = page.eval_on_selector_all(
        ".wall",
        """cards => cards.map((card) => {
            const [image, frame] = [card.querySelector("img"), card.querySelector(".frame").getBoundingClientRect()];
            return [image.getAttribute("width") / image.getAttribute("height"), frame.width / frame.height,
                    image.loading, image.decoding, getComputedStyle(image).objectFit];
        })""",
    )
    assert {round(own, 1) for own, *_ in shapes} == {round(w / h, 1) for w, h in SHAPES}
    for own, shown, loading, decoding, fit in shapes:
        assert shown == pytest.approx(own, rel=0.03) or (own > 2.6 and fit == "contain"), "a work was cropped"
        assert (loading, decoding) == ("lazy", "async")
    page.mouse.wheel(0, 20_000)
    expect(page.locator(".wall")).to_have_count(80, timeout=15_000)
    assert sorted(ids(page)) == list(range(80))


def test_on_a_large_screen_the_wall_goes_on_without_scrolling(opened):
    page = opened("#catalog=art", viewport={"width": 2560, "height": 3000})
    expect(page.locator(".wall")).to_have_count(80)


def test_the_skip_link_leads_to_the_works_and_keeps_the_address(opened):
    page = opened("#catalog=art&like=3")
    before = page.url
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "works"
    assert page.url == before
    page.wait_for_timeout(200)
    expect(results(page)).to_have_count(24)


def test_a_picture_that_was_refused_is_asked_for_once_more(opened):
    refused: list[str] = []

    def refuse(route) -> None:
        if route.request.url in refused:
            return route.continue_()
        refused.append(route.request.url)
        route.fulfill(status=429, json={"error": "too many requests"})

    page = opened("#catalog=art&like=3")
    page.route("**/image?*", refuse)
    page.evaluate("location.hash = '#catalog=odd'")
    expect(page.locator(".wall")).to_have_count(len(ODD))
    page.wait_for_function("() => [...document.querySelectorAll('.wall img')].every((i) => i.src.includes('/image?'))")
    assert len(refused) == len(set(refused)) >= len(ODD)
    assert all("429" in text for text in opened.complaints), opened.complaints
    opened.complaints.clear()


def test_works_of_two_collections_with_the_same_ids_are_not_mixed(opened):
    page = opened("#catalog=art&like=3")
    page.evaluate("location.hash = '#catalog=plain&like=3'")
    page.click("#anyway")
    expect(results(page)).to_have_count(24)
    page.go_back()  # to an answer that is known
    expect(page.locator("#status")).to_contain_text("The 24 nearest of")
    expect(page.locator("#none")).to_be_hidden()
    assert ids(page)
    shown = page.eval_on_selector_all(".result img", "images => images.map((image) => image.src)")
    assert [address for address in shown if "catalogs/art/" not in address] == []

    page.evaluate("location.hash = '#catalog=art&open=7'")
    expect(page.locator("#large-title")).to_have_text("Plate 7")
    page.evaluate("location.hash = '#catalog=odd&like=7&open=7'")
    expect(page.locator("#large-title")).to_have_text("Odd 4")
    expect(page.locator("#primary figcaption")).to_have_text("Odd 4")


def test_words_and_another_order(opened):
    page = opened()
    first = ids(page)
    answers_to(page, lambda: page.click("#surprise"), "/items")
    page.wait_for_function("first => document.querySelector('.work')?.dataset.id != first", arg=str(first[0]))
    assert ids(page) != first
    page.keyboard.press("/")
    page.keyboard.type("plate 7")
    expect(page.locator("#status")).to_contain_text("with “plate 7”")
    expect(page.locator(".wall")).to_have_count(17)  # all with a 7 in it
    page.fill("#text", "nothing of that name")
    expect(page.locator("#none")).to_contain_text("No work matches")


# ------------------------------------------------------------------------------- queries


def test_a_work_of_the_wall_becomes_the_query_and_back_leads_back(opened):
    page = opened()
    wall = ids(page)
    page.locator(".wall .frame").nth(3).click()
    expect(results(page)).to_have_count(24)
    assert said(page, "like") == str(wall[3])
    assert wall[3] not in ids(page)
    first = ids(page)
    expect(page.locator("#status")).to_contain_text("The 24 nearest of")
    assert "Plate" in results(page).first.locator(".caption").inner_text()
    scores = [float(text) for text in page.locator(".result .number").all_inner_texts()]
    assert scores == sorted(scores, reverse=True)

    results(page).nth(1).hover()
    page.locator(".result").nth(1).locator("[data-act=more]").click()
    page.wait_for_function("id => location.hash.includes(`like=${id}`)", arg=first[1])
    page.wait_for_function("first => document.querySelector('.result')?.dataset.id != first", arg=str(first[0]))
    page.go_back()
    page.wait_for_function("first => document.querySelector('.result')?.dataset.id == first", arg=str(first[0]))
    assert ids(page) == first
    again = opened(f"#{urlsplit(page.url).fragment}")
    assert ids(again) == first, "the address alone brings the same answers"
    page.go_back()
    page.wait_for_selector(".wall")
    assert ids(page)[:60] == wall[:60]
    page.go_forward()
    expect(results(page)).to_have_count(24)


@pytest.mark.parametrize("way", ["drop", "paste", "choose"])
def test_an_own_image(opened, root, way):
    page = opened("#catalog=art")

    def give() -> None:
        if way == "drop":
            transfer = picture(page, root, 5)
            page.dispatch_event("body", "dragenter", {"dataTransfer": transfer})
            expect(page.locator("#drop [data-to=new]")).to_be_visible()
            expect(page.locator("#drop [data-to=unlike]")).to_be_hidden()
            drop(page, transfer)
            expect(page.locator("#drop")).to_be_hidden()
        elif way == "paste":
            transfer = picture(page, root, 5)
            page.evaluate("data => document.dispatchEvent(new ClipboardEvent('paste', "
                          "{ clipboardData: data, bubbles: true }))", transfer)  # fmt: skip
        else:
            with page.expect_file_chooser() as chooser:
                page.click("#zone")
            chooser.value.set_files(root / "5.png")

    answers_to(page, give)
    expect(results(page).first).to_have_attribute("data-id", "5")
    assert float(results(page).first.locator(".number").inner_text()) >= 0.98
    expect(page.locator("#primary figcaption")).to_contain_text("5.png" if way == "choose" else "mine.png")
    assert page.locator("#primary img").evaluate("image => image.naturalWidth") == SHAPES[5 % 4][0]


def test_several_images_for_and_against(opened, root):
    page = opened("#catalog=art&like=3")
    one = ids(page)
    body = answers_to(page, lambda: drop(page, picture(page, root, 40), "like"))
    expect(page.locator("#like .tile:not(.add)")).to_have_count(2)
    assert [int(r["id"]) for r in body["results"]] != one
    settled(page)
    results(page).first.hover()
    worst = ids(page)[0]
    asked: list[dict] = []
    page.on("request", lambda r: asked.append(r.post_data_json) if urlsplit(r.url).path.endswith("/search") else None)
    answers_to(page, lambda: results(page).first.locator("[data-act=unlike]").click())
    expect(page.locator("#unlike .tile")).to_have_count(1)
    assert asked[-1]["unlike"] == [{"id": str(worst)}]
    assert [kind for example in asked[-1]["like"] for kind in example] == ["id", "upload"]
    page.wait_for_function("id => !document.querySelector(`.result[data-id='${id}']`)", arg=worst)
    page.locator("#unlike .remove").click()  # known: nothing is asked again
    page.wait_for_function("id => document.querySelector(`.result[data-id='${id}']`)", arg=worst)
    page.locator("#like .remove").first.click()
    expect(page.locator("#like .tile:not(.add)")).to_have_count(0)  # the one that is left stands large
    assert said(page, "like").startswith("~")


def test_works_are_dragged(opened):
    page = opened("#catalog=art&like=3")
    dragged = ids(page)[2]
    transfer = page.evaluate_handle("() => new DataTransfer()")
    page.dispatch_event(f".result[data-id='{dragged}'] img", "dragstart", {"dataTransfer": transfer})
    answers_to(page, lambda: drop(page, transfer, "like"))
    assert said(page, "like") == f"3,{dragged}"


def test_an_upload_that_expired_is_sent_again(opened, root):
    page = opened("#catalog=art")
    answers_to(page, lambda: drop(page, picture(page, root, 8)))
    expect(results(page)).to_have_count(24)
    token = said(page, "like")[1:]
    renewed: list[str] = []

    def answer(route) -> None:  # what the server says once it has forgotten this token
        request = route.request
        old = token in request.url or token in (request.post_data or "")
        if request.url.endswith("/uploads"):
            renewed.append(request.url)
        about = {"error": "no such upload", "missing": [{"upload": token}]}
        route.fulfill(status=404, json=about) if old else route.continue_()

    page.route("**/api/**", answer)
    tune(page, "diversity", 50)
    page.wait_for_function("() => location.hash.includes('diversity')")
    settled(page)
    assert len(renewed) == 1
    expect(results(page)).to_have_count(24)
    expect(page.locator(".note")).to_have_count(0)
    opened.complaints[:] = [text for text in opened.complaints if "404" not in text]

    lost = opened(f"#catalog=art&like=~{'0' * 20}")
    expect(lost.locator(".note")).to_contain_text("no longer on the server")
    expect(lost.locator(".wall").first).to_be_visible()
    where = quote(json.dumps([{"attribute": "year", "low": "1810", "high": ""}]))
    link = f"#catalog=art&like=~{'0' * 20},3,nothing&unlike=~{'1' * 20},5&diversity=0.3&where={where}"
    some = opened(link)
    for note in ("2 images of this search are no longer on the server: drop them again.", "“nothing” is not in"):
        expect(some.locator("#notes")).to_contain_text(note)  # one note, or two where an item's 404 is here first
    expect(results(some)).to_have_count(24)
    assert (said(some, "like"), said(some, "unlike"), said(some, "diversity")) == ("3", "5", "0.3")
    expect(some.locator("#chips .chip")).to_have_text(["year 1810–…"])
    opened.complaints[:] = [text for text in opened.complaints if "404" not in text]


# ------------------------------------------------------------------------------- tuning and filters


def test_sliders_change_the_order_and_the_bars(opened):
    page = opened("#catalog=art&like=3")
    before = ids(page)
    expect(page.locator("#weights input")).to_have_count(2)
    body = answers_to(page, lambda: tune(page, "content", 0))
    expect(page.locator("#weights output").first).to_have_text("0 %")
    assert said(page, "weights") == "content:0,colour:1"
    page.wait_for_function(
        "first => document.querySelector('.result').dataset.id == first", arg=str(body["results"][0]["id"])
    )
    assert ids(page) != before
    assert all(r["parts"]["content"] == 0 for r in body["results"])
    settled(page)
    results(page).first.locator(".score").hover()
    shown = results(page).first.locator(".parts")
    expect(shown).to_be_visible()
    numbers = [float(text) for text in shown.locator("b").all_text_contents()]
    assert sum(numbers) == pytest.approx(body["results"][0]["score"], abs=0.011)
    page.click("#weights-reset")
    page.wait_for_function("first => document.querySelector('.result').dataset.id == first", arg=str(before[0]))
    assert ids(page) == before
    assert said(page, "weights") is None
    assert answers_to(page, lambda: tune(page, "diversity", 80))["results"]
    assert said(page, "diversity") == "0.8"
    settled(page)
    seen = answers_to(page, lambda: page.uncheck("#collapse"))
    assert len({r["attributes"]["work"] for r in seen["results"]}) < len(seen["results"])
    page.locator(".advanced summary").click()
    answers_to(page, lambda: page.check("#hubness"))
    assert said(page, "hubness") == "1"


def test_only_the_latest_answer_is_shown(opened):
    page = opened("#catalog=art&like=3")
    held: list = []

    def hold(route) -> None:
        held.append(route) if not held else route.continue_()

    page.route("**/search?*", hold)
    tune(page, "content", 10)
    page.wait_for_function("() => location.hash.includes('content:')")
    page.wait_for_timeout(200)
    body = answers_to(page, lambda: tune(page, "content", 95))
    with contextlib.suppress(Exception):  # it was given up by the page
        held[0].continue_()
    page.wait_for_timeout(300)
    assert ids(page) == [int(r["id"]) for r in body["results"]]


def test_filters(opened):
    page = opened("#catalog=art&like=3")
    page.click("#filter-open")
    facet = page.locator("#facets details", has=page.locator("summary", has_text="style"))
    value = facet.locator(".values label span").first.inner_text()
    body = answers_to(page, lambda: facet.locator(".values input").first.check())
    assert {r["attributes"]["style"] for r in body["results"]} == {value}
    assert json.loads(said(page, "where")) == [{"attribute": "style", "values": [value]}]
    expect(page.locator("#chips .chip")).to_have_text([value])
    expect(page.locator("#filter-count")).to_have_text("1")
    body = answers_to(page, lambda: facet.get_by_role("button", name=f"Not {value}", exact=True).click())
    assert value not in {r["attributes"]["style"] for r in body["results"]}
    assert json.loads(said(page, "where")) == [{"attribute": "style", "values": [value], "negate": True}]
    years = page.locator("#facets .range input")
    assert years.nth(0).get_attribute("placeholder") == "1800"
    body = answers_to(page, lambda: years.nth(0).fill("1850"))
    assert min(int(r["attributes"]["year"]) for r in body["results"]) >= 1850
    expect(page.locator("#chips .chip")).to_have_text([f"not {value}", "year 1850–…"])
    page.locator("#chips .chip button").first.click()
    expect(page.locator("#chips .chip")).to_have_text(["year 1850–…"])
    artists = page.locator("#facets details", has=page.locator("summary", has_text="artist"))
    artists.locator("input[type=search]").or_(artists.locator(".values input")).first.wait_for()
    page.click("#filter-clear")
    expect(page.locator("#chips .chip")).to_have_count(0)
    page.go_back()
    expect(page.locator("#chips .chip")).to_have_text(["year 1850–…"])
    page.keyboard.press("Escape")
    expect(page.locator("#filters")).to_be_hidden()
    chip = results(page).locator(".because .chip").first
    name, text = chip.get_attribute("data-attribute"), chip.get_attribute("data-value")
    chip.click()
    expect(page.locator("#chips .chip")).to_have_count(2)
    assert {"attribute": name, "values": [text]} in json.loads(said(page, "where"))
    where = quote(json.dumps([{"attribute": "year", "low": "1700", "high": "1701"}]))
    nothing = opened(f"#catalog=art&like=3&where={where}")
    expect(nothing.locator("#none")).to_contain_text("No work passes these filters")
    nothing.locator("#none button").click()
    expect(results(nothing)).to_have_count(24)


def test_values_that_could_not_be_fetched_are_not_said_to_be_none(opened):
    page = opened("#catalog=art&like=3")
    page.route("**/values?*", lambda route: route.fulfill(status=500, json={"error": "the server failed"}))
    page.click("#filter-open")
    values = page.locator("#facets details", has=page.locator("summary", has_text="style")).locator(".values")
    expect(values).to_have_text("the server failed")
    page.unroute("**/values?*")
    page.click("#filter-close")
    renewed: list[str] = []
    page.on("request", lambda r: renewed.append(r.url) if r.url.endswith("/api/catalogs") else None)
    stale = {"error": "the catalog art was replaced", "version": "0", "items": {}}
    page.route("**/values?*", lambda route: route.continue_() if renewed else route.fulfill(status=409, json=stale))
    page.click("#filter-open")
    expect(page.locator(".note")).to_contain_text("The collection was replaced")
    assert all("500" in text or "409" in text for text in opened.complaints), opened.complaints
    opened.complaints.clear()


def test_values_of_all_kinds_are_filters(opened):
    page = opened("#catalog=odd")
    expect(page.locator(".wall")).to_have_count(len(ODD))
    page.click("#filter-open")
    values = page.locator("#facets details", has=page.locator("summary", has_text="medium")).locator(".values")
    expect(values.locator("label span")).to_have_count(len(ODD))
    for i, medium in enumerate(ODD.values()):
        box = values.locator("li", has=page.locator("label span", has_text=re.compile(f"^{re.escape(medium)}$")))
        body = answers_to(page, lambda box=box: box.locator("input").check(), "/items")
        assert [item["attributes"]["medium"] for item in body["items"]] == [medium]
        expect(page.locator(".wall")).to_have_count(1)
        again = opened(f"#{urlsplit(page.url).fragment}")  # the address alone
        assert again.locator(".wall img").first.get_attribute("width") == page.locator(".wall img").get_attribute(
            "width"
        )
        expect(again.locator(".wall")).to_have_count(1)
        again.close()
        body = answers_to(page, lambda box=box: box.locator("button").click(), "/items")
        assert medium not in [item["attributes"]["medium"] for item in body["items"]]
        assert body["total"] == len(ODD) - 1, i
        page.click("#filter-clear")
        expect(page.locator(".wall")).to_have_count(len(ODD))


def test_conditions_of_all_kinds_are_in_the_address(opened):
    page = opened("#catalog=art")

    def look(condition: dict) -> None:
        page.evaluate("hash => { location.hash = hash; }", f"#catalog=art&where={quote(json.dumps([condition]))}")

    for condition, words, total in (
        ({"attribute": "year", "values": ["1810", "1811"]}, ["1810", "1811"], 2),
        ({"attribute": "year", "low": 1810, "high": 1812, "negate": True}, ["not year 1810–1812"], 77),
        ({"attribute": "year", "values": []}, ["year known"], 80),
        ({"attribute": "year", "values": ["", "1810"], "negate": True}, ["not year unknown", "not 1810"], 79),
        ({"attribute": "year", "low": "1810", "high": ""}, ["year 1810–…"], 70),  # as older pages wrote it
    ):
        look(condition)
        expect(page.locator("#chips .chip")).to_have_text(words)
        expect(page.locator("#status")).to_have_text(f"{total} works")
    for condition, words in (
        ({"attribute": "year", "negate": True}, "year unknown"),
        ({"attribute": "year", "values": [" "]}, "year unknown"),
    ):
        look(condition)
        expect(page.locator("#chips .chip")).to_have_text([words])
        expect(page.locator("#none")).to_contain_text("No work passes these filters")
    look({"attribute": "year", "low": "x"})
    expect(page.locator(".note")).to_contain_text("filters.0.low: Input should be a valid number")
    assert all("422" in text for text in opened.complaints), opened.complaints
    opened.complaints.clear()
    page.locator("#chips button").click()
    expect(page.locator("#status")).to_have_text("80 works")


def test_words_that_are_typed_do_not_end_a_search_that_begins_meanwhile(opened):
    page = opened("#catalog=art")
    expect(page.locator(".wall").first).to_be_visible()
    answers_to(
        page,
        lambda: page.evaluate(
            """() => {
            const text = document.querySelector("#text");
            text.value = "plate 7";
            text.dispatchEvent(new Event("input", { bubbles: true }));
            document.querySelector(".wall .frame").click();
        }"""
        ),
    )
    page.wait_for_timeout(600)
    assert said(page, "like") is not None
    assert said(page, "text") is None


def test_ids_of_all_kinds_are_in_the_address(opened):
    page = opened("#catalog=odd")
    for i, name in enumerate(ODD):
        page.evaluate("location.hash = '#catalog=odd'")
        expect(page.locator(".wall")).to_have_count(len(ODD))
        card = page.locator(".wall", has=page.locator(".label", has_text=re.compile(f"^Odd {i}$")))
        body = answers_to(page, lambda card=card: card.locator(".frame").click())
        assert name not in [r["id"] for r in body["results"]]
        assert len(body["results"]) == len(ODD) - 1
        expect(page.locator("#primary figcaption")).to_have_text(f"Odd {i}")
        assert opened(f"#{urlsplit(page.url).fragment}").locator("#primary figcaption").inner_text() == f"Odd {i}"


def test_an_exchanged_collection_shows_the_same_works(opened, root):
    """The page and a bookmark of a search with `007` and `z`, then with one that goes."""
    page = opened("#catalog=odd&like=007,c/d e.jpg&unlike=z")
    page.locator("#anyway").or_(results(page).first).first.wait_for()
    bookmark = urlsplit(page.url).fragment
    make_odd(
        root.parent / "odd", root, [11, 9, 8, 7, 5, 4, 3, 2, 1, 0]
    )  # without "a/../b" and, at place 6, "c/d e.jpg"
    deadline = time.monotonic() + 30
    while page.evaluate("fetch('api/catalogs').then((a) => a.json()).then((a) => a[2].items)") != 10:
        assert time.monotonic() < deadline, "the server did not notice"
        page.wait_for_timeout(300)
    tune(page, "diversity", 40)
    expect(page.locator(".note", has_text="replaced")).to_be_visible()
    expect(page.locator(".note", has_text="“c/d e.jpg” is not in this collection.")).to_be_visible()
    expect(page.locator("#primary figcaption")).to_have_text("Odd 3")
    assert (said(page, "like"), said(page, "unlike"), said(page, "diversity")) == ("007", "z", "0.4")
    later = opened(f"#{bookmark}")
    expect(later.locator(".note", has_text="“c/d e.jpg” is not in this collection.")).to_be_visible()
    expect(later.locator("#primary figcaption")).to_have_text("Odd 3")
    later.wait_for_timeout(1700)  # pictures that are gone are asked for once more
    assert all("409" in text or "404" in text for text in opened.complaints), opened.complaints
    opened.complaints.clear()
    make_odd(root.parent / "odd", root, range(len(ODD)))


def test_it_says_no(opened):
    page = opened("#catalog=plain&like=3")
    expect(page.locator("#none h2")).to_have_text("No similar work in this collection")
    expect(results(page)).to_have_count(0)
    expect(page.locator("#weights-box")).to_be_hidden()
    page.click("#anyway")
    expect(results(page)).to_have_count(24)
    page.select_option("#catalog", "art")
    page.wait_for_selector(".wall")
    assert said(page, "catalog") == "art"


# ------------------------------------------------------------------------------- heat maps, large view, keys


def painted(canvas: Locator) -> int:
    """How many shades a canvas shows."""
    return canvas.evaluate(
        """canvas => {
            const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
            return new Set(Array.from({ length: data.length / 4 }, (_, i) => data.slice(4 * i, 4 * i + 4).join())).size;
        }"""
    )


def test_heat_maps_on_hover(opened):
    page = opened("#catalog=art&like=3")
    body = answers_to(page, lambda: results(page).nth(1).locator(".frame").hover(), "/heatmap")
    card = results(page).nth(1)
    expect(card).to_have_class(re.compile("hot"))
    expect(page.locator("#primary")).to_have_class(re.compile("hot"))
    assert painted(card.locator("canvas")) > 20
    assert painted(page.locator("#primary canvas")) > 20
    places = sum(map(sum, body["item"]["values"]))
    assert places + body["rest"] == pytest.approx(body["score"], abs=1e-3)
    expect(page.locator("#legend")).to_contain_text(f"{body['score']:.2f}")
    expect(page.locator("#legend")).to_contain_text(f"{body['rest']:.2f}")
    page.mouse.move(640, 20)
    expect(card).not_to_have_class(re.compile("hot"))
    page.uncheck("#hover")
    results(page).nth(2).locator(".frame").hover()
    page.wait_for_timeout(600)
    expect(results(page).nth(2)).not_to_have_class(re.compile("hot"))
    plain = opened("#catalog=plain&like=3")
    plain.click("#anyway")
    expect(plain.locator("[data-act=heat]")).to_have_count(0)


def test_the_heat_maps_sentence_is_of_the_card(opened):
    page = opened("#catalog=art&like=3,9&unlike=12&weights=content:0.6,colour:0.4")
    card = results(page).nth(1)
    body = answers_to(page, lambda: card.locator(".frame").hover(), "/heatmap")
    legend = page.locator("#legend")
    score = card.locator(".number").inner_text()
    expect(legend).to_contain_text(f"to its score of {score}")
    places, total, rest = (float(n) for n in re.findall(r"-?\d\.\d\d", legend.inner_text()))
    assert places + rest == pytest.approx(total, abs=0.011)
    assert np.sum(body["item"]["values"]) == pytest.approx(places, abs=0.02)  # of thumbnails' neighbours, rounded


@pytest.mark.parametrize(("width", "height", "sent"), [(2400, 1200, (1600, 800)), (500, 400, (500, 400))])
def test_an_image_is_sent_no_larger_than_needed(opened, address, width, height, sent):
    page = opened("#catalog=art")
    transfer = page.evaluate_handle(
        """async ([width, height]) => {
            const canvas = new OffscreenCanvas(width, height);
            canvas.getContext("2d");
            const blob = await canvas.convertToBlob();  // PNG, all of it transparent
            const transfer = new DataTransfer();
            transfer.items.add(new File([blob], "clear.png", { type: "image/png" }));
            return transfer;
        }""",
        [width, height],
    )
    about = answers_to(page, lambda: drop(page, transfer), "/uploads")
    assert (about["width"], about["height"]) == sent
    shown = page.request.get(f"{address}/api/uploads/{about['upload']}/image")
    with Image.open(io.BytesIO(shown.body())) as image:
        assert image.size == sent
        assert min(image.convert("L").getextrema()) >= 254, "what is transparent lies on white"


def test_the_large_view(opened):
    page = opened("#catalog=art&like=3")
    shown = ids(page)
    results(page).nth(1).locator(".frame").click()
    large = page.locator("#large")
    expect(large).to_be_visible()
    expect(large.locator("#large-title")).to_have_text(f"Plate {shown[1]}")
    page.keyboard.press("ArrowRight")
    expect(large.locator("#large-title")).to_have_text(f"Plate {shown[2]}")
    assert said(page, "open") == str(shown[2])
    page.keyboard.press("ArrowLeft")
    answers_to(page, lambda: page.keyboard.press("h"), "/heatmap")
    expect(large.locator("#large-work")).to_have_class(re.compile("hot"))
    assert painted(large.locator("#large-work canvas")) > 20
    expect(large.locator(".large-legend")).to_contain_text("to its score")
    page.keyboard.press("Escape")
    expect(large).to_be_hidden()
    assert said(page, "open") is None
    assert page.evaluate("document.activeElement.closest('.work').dataset.id") == str(shown[1])
    page.keyboard.press("Space")
    expect(large).to_be_visible()
    page.go_back()
    expect(large).to_be_hidden()
    assert ids(page) == shown
    page.keyboard.press("Space")
    style = large.locator("dd", has=page.locator(".not")).filter(has_text="-").first.locator(".value")
    value = style.inner_text()
    answers_to(page, style.click)
    expect(large).to_be_hidden()
    expect(page.locator("#chips .chip")).to_have_text([value])


def test_keys(opened):
    page = opened("#catalog=art&like=3")
    shown = ids(page)
    focused = "document.activeElement.closest('.work')?.dataset.id"
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == str(shown[0])
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == str(shown[1])
    page.keyboard.press("ArrowDown")
    below = page.evaluate(focused)
    assert shown.index(int(below)) > 1
    page.keyboard.press("ArrowUp")
    assert page.evaluate(focused) in (str(i) for i in shown[: shown.index(int(below))])
    page.keyboard.press("Home")
    answers_to(page, lambda: page.keyboard.press("h"), "/heatmap")
    expect(results(page).first).to_have_class(re.compile("hot"))
    page.keyboard.press("Escape")
    expect(results(page).first).not_to_have_class(re.compile("hot"))
    answers_to(page, lambda: page.keyboard.press("n"))
    assert said(page, "unlike") == str(shown[0])
    settled(page)
    page.keyboard.press("ArrowRight")
    now = page.evaluate(focused)
    answers_to(page, lambda: page.keyboard.press("Shift+Enter"))
    assert said(page, "like") == f"3,{now}"
    page.keyboard.press("ArrowRight")
    now = page.evaluate(focused)
    answers_to(page, lambda: page.keyboard.press("Enter"))
    assert said(page, "like") == now
    page.keyboard.press("?")
    expect(page.locator("#help")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()


# ------------------------------------------------------------------------------- messages, narrow, dark


def test_messages_in_words_and_one_retry(opened, root):
    page = opened("#catalog=art")
    busy = {"status": 503, "json": {"error": "too many requests are waiting"}, "headers": {"Retry-After": "1"}}
    turned_away: list[str] = []

    def once(route) -> None:
        if turned_away:
            return route.continue_()
        turned_away.append(route.request.url)
        route.fulfill(**busy)

    page.route("**/search?*", once)
    page.locator(".wall .frame").first.click()
    expect(page.locator("#status")).to_contain_text("The server is busy. Trying again in 1 s.")
    expect(results(page)).to_have_count(24)
    page.unroute("**/search?*")
    page.route("**/search?*", lambda route: route.fulfill(**busy))
    page.locator(".result .frame").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator(".note")).to_contain_text("too many requests are waiting")
    page.unroute("**/search?*")
    page.locator(".note button").click()
    expect(page.locator(".note")).to_have_count(0)
    transfer = page.evaluate_handle(
        """() => {
            const transfer = new DataTransfer();
            transfer.items.add(new File(["no image at all"], "letter.png", { type: "image/png" }));
            return transfer;
        }"""
    )
    drop(page, transfer)
    expect(page.locator(".note")).to_be_visible()
    assert len(page.locator(".note span").inner_text()) > 10
    assert all(re.search(r"\b(503|415|422)\b", text) for text in opened.complaints), opened.complaints
    opened.complaints.clear()


def test_what_failed_can_be_asked_again(opened):
    page = opened("#catalog=art")
    for path, selector, count in (("**/search?*", ".result", 24), ("**/items?*", ".wall", 60)):
        page.route(path, lambda route: route.fulfill(status=500, json={"error": "the server failed"}))
        page.evaluate(
            "address => { location.hash = address; }", f"#catalog=art&{'like=3' if count == 24 else 'seed=9'}"
        )
        expect(page.locator("#none h2")).to_have_text("The works could not be fetched")
        expect(page.locator("#more-button")).to_be_hidden()
        page.locator("#again").click()
        expect(page.locator(".note")).to_contain_text("the server failed")
        page.unroute(path)
        page.locator("#again").click()
        expect(page.locator(selector)).to_have_count(count)
        expect(page.locator("#none")).to_be_hidden()

    page.route("**/items?*", lambda route: route.fulfill(status=500, json={"error": "the server failed"}))
    page.mouse.wheel(0, 20_000)
    expect(page.locator("#more-button")).to_be_visible()
    page.unroute("**/items?*")
    page.click("#more-button")
    expect(page.locator(".wall")).to_have_count(80)
    expect(page.locator("#more-button")).to_be_hidden()

    page.route("**/api/catalogs", lambda route: route.fulfill(status=500, json={"error": "the server failed"}))
    page.reload()
    page.locator("#again").wait_for()
    page.unroute("**/api/catalogs")
    page.click("#again")
    expect(page.locator(".wall").first).to_be_visible()
    assert all("500" in text for text in opened.complaints), opened.complaints
    opened.complaints.clear()


def test_narrow_screens(opened):
    phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    page = opened("#catalog=art&like=3", **phone)
    expect(results(page)).to_have_count(24)
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wide) <= 0, "the page must not scroll sideways"
    tops = page.eval_on_selector_all(".result", "cards => cards.slice(0, 4).map((c) => c.getBoundingClientRect().left)")
    assert tops[0] == tops[2] < tops[1] == tops[3], "two columns, in order"
    expect(page.locator("#tuning")).to_be_hidden()
    page.tap("#tune-open")
    expect(page.locator("#weights input").first).to_be_visible()
    answers_to(page, lambda: tune(page, "content", 5))
    page.tap("#tune-close")
    answers_to(page, lambda: page.tap(".result [data-act=heat]"), "/heatmap")
    expect(results(page).first).to_have_class(re.compile("hot"))
    page.tap(".result .frame >> nth=1")
    expect(page.locator("#large .large-acts")).to_be_visible()
    page.tap("#large-close")
    page.tap("#filter-open")
    expect(page.locator("#facets")).to_be_visible()
    assert page.evaluate(wide) <= 0
    start = opened("", **phone)
    assert start.evaluate(wide) <= 0


def test_dark_and_named(opened):
    back = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
    light, dark = (opened("#catalog=art&like=3", color_scheme=scheme) for scheme in ("light", "dark"))
    assert light.evaluate(back) > 650 > 150 > dark.evaluate(back)
    unnamed = light.evaluate(
        """() => [...document.querySelectorAll("button, input:not([type=file]), select")].filter((e) =>
            !(e.ariaLabel || e.textContent.trim() || e.labels?.length || e.title)).map((e) => e.outerHTML)"""
    )
    assert unnamed == [], "every control has a name"
    expect(light.get_by_role("heading", level=1)).to_have_text("simsearch")
    assert light.locator("#status").get_attribute("aria-live") == "polite"
    # One work at a time is reached by Tab, then what may be done with it.
    assert light.locator(".work .frame[tabindex='0']").count() == 1


# ------------------------------------------------------------------------------- a part of the image


Place = tuple[float, float, float, float]


def wall_of(root: Path, numbers: tuple[int, ...], gap: int = 20) -> tuple[bytes, list[Place]]:
    """A photograph of a wall with some images, and where each hangs, in fractions."""
    pictures = [Image.open(root / f"{i}.png").convert("RGB") for i in numbers]
    width = sum(p.width for p in pictures) + gap * (len(pictures) + 1)
    height = max(p.height for p in pictures) + 2 * gap
    wall, places, x = Image.new("RGB", (width, height), (90, 160, 70)), [], gap
    for one in pictures:
        wall.paste(one, (x, gap))
        places.append((x / width, gap / height, one.width / width, one.height / height))
        x += one.width + gap
    buffer = io.BytesIO()
    wall.save(buffer, "PNG")
    return buffer.getvalue(), places


def dropped(page: Page, data: bytes, name: str = "wall.png"):
    return page.evaluate_handle(
        """([data, name]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(data)], name, { type: "image/png" }));
            return transfer;
        }""",
        [list(data), name],
    )


def draw(page: Page, frame: Locator, place: Place) -> None:
    """Draws a rectangle by the mouse, from its lower right corner to its upper left one."""
    frame.scroll_into_view_if_needed()
    box, (x, y, w, h) = frame.bounding_box(), place
    page.mouse.move(box["x"] + (x + w) * box["width"], box["y"] + (y + h) * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + (x + w / 2) * box["width"], box["y"] + (y + h / 2) * box["height"])
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
    page.mouse.up()


def region_of(page: Page) -> list[float]:
    return [float(number) for number in said(page, "like").split("@")[1].split(":")]


def test_a_rectangle_drawn_on_the_image_is_searched_alone(opened, root):
    page = opened("#catalog=art")
    data, places = wall_of(root, (5, 40))
    whole = answers_to(page, lambda: drop(page, dropped(page, data)))
    expect(results(page)).to_have_count(24)
    for number, place in zip((5, 40), places, strict=True):
        frame = page.locator("#primary .frame")
        body = answers_to(page, lambda frame=frame, place=place: draw(page, frame, place))
        assert region_of(page) == pytest.approx(place, abs=0.02)
        assert body["results"][0]["id"] == str(number)
        assert body["results"][0]["score"] > max(0.9, next(r["score"] for r in whole["results"][:1]))
        shown = page.locator("#primary .region").evaluate("e => [e.style.left, e.style.width].map(parseFloat)")
        assert shown == pytest.approx([100 * place[0], 100 * place[2]], abs=2)
    again = opened(f"#{urlsplit(page.url).fragment}")  # the address alone
    expect(results(again).first).to_have_attribute("data-id", "40")
    heat = answers_to(page, lambda: results(page).first.locator(".frame").hover(), "/heatmap")
    assert heat["score"] == pytest.approx(body["results"][0]["score"], abs=1e-3)
    lies = page.evaluate(
        """() => { const [map, part] = ["canvas", ".region"].map((name) =>
            document.querySelector(`#primary ${name}`).getBoundingClientRect());
            return [map.left - part.left, map.width - part.width]; }"""
    )
    assert np.abs(lies).max() < 4, "the map covers the part"
    answers_to(page, lambda: tune(page, "diversity", 30))
    page.click("#part-whole")
    page.wait_for_function("() => !location.hash.includes('@')")
    expect(page.locator("#primary .region")).to_have_count(0)
    page.go_back()
    expect(page.locator("#primary .region")).to_have_count(1)
    before = page.url
    frame = page.locator("#primary .frame").bounding_box()
    page.mouse.click(frame["x"] + 30, frame["y"] + 30)  # a click draws nothing
    assert page.url == before


def test_a_part_by_keys_and_numbers(opened):
    page = opened("#catalog=art&like=12")
    page.locator("#part-open").focus()
    page.keyboard.press("Enter")
    part = page.locator("#part .region")
    expect(part).to_be_focused()
    names = ("left", "top", "width", "height")
    numbers = lambda: [float(page.locator(f"#part-{name}").input_value()) for name in names]  # noqa: E731
    assert numbers() == [25, 25, 50, 50]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Shift+ArrowRight")
    page.keyboard.press("Shift+ArrowDown")
    page.keyboard.press("Shift+ArrowDown")
    assert numbers() == [27, 23, 52, 54]
    assert "27 to 79 % across, 23 to 77 % down" in part.get_attribute("aria-label")
    page.fill("#part-left", "10")
    page.fill("#part-width", "200")  # more than there is
    page.locator("#part-width").blur()
    assert numbers() == [0, 23, 100, 54]
    page.fill("#part-width", "40")
    body = answers_to(page, lambda: page.locator("#part-search").press("Enter"))
    assert region_of(page) == [0, 0.23, 0.4, 0.54]
    assert body["results"]
    expect(page.locator("#part")).to_be_hidden()
    assert said(page, "like").startswith("12@")
    page.click("#part-open")
    expect(page.locator("#part-left")).to_have_value("0")
    page.keyboard.press("Escape")
    expect(page.locator("#part")).to_be_hidden()
    assert region_of(page) == [0, 0.23, 0.4, 0.54]
    odd = opened(f"#catalog=odd&like={quote('position:1@0.1:0.2:0.5:0.5,é#&?=', safe='')}")
    expect(odd.locator("#like .tile:not(.add)")).to_have_count(2)


def test_a_finger_draws_in_the_dialog(opened):
    page = opened("#catalog=art&like=4", viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page.tap("#part-open")
    frame = page.locator("#part-stage .frame")
    box = frame.bounding_box()
    finger = page.context.new_cdp_session(page)
    at = lambda x, y: [{"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}]  # noqa: E731
    finger.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": at(0.1, 0.2)})
    finger.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": at(0.4, 0.4)})
    finger.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": at(0.7, 0.9)})
    finger.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    body = answers_to(page, lambda: page.click("#part-search"))
    assert region_of(page) == pytest.approx([0.1, 0.2, 0.6, 0.7], abs=0.02)
    assert body["results"]


# ------------------------------------------------------------------------------- looking closely


def scale_of(page: Page, pane: str) -> float:
    return page.locator(f"{pane} .frame").evaluate("e => new DOMMatrix(getComputedStyle(e).transform).a")


def becomes(page: Page, pane: str, scale: float) -> None:
    page.wait_for_function(
        """([pane, scale]) => Math.abs(new DOMMatrix(getComputedStyle(
            document.querySelector(`${pane} .frame`)).transform).a - scale) < 0.02 * scale""",
        arg=[pane, scale],
    )


def test_a_picture_is_looked_at_closely(opened):
    page = opened("#catalog=art&like=3")
    results(page).nth(1).locator(".frame").click()
    pane = page.locator("#large-work .zoomed")
    expect(pane).to_be_visible()
    box = pane.bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(middle[0] + 60, middle[1] + 40)
    under = """([x, y]) => { const r = document.querySelector('#large-work .frame').getBoundingClientRect();
        return [(x - r.left) / r.width, (y - r.top) / r.height]; }"""
    spot = [middle[0] + 60, middle[1] + 40]
    before = page.evaluate(under, spot)
    page.mouse.wheel(0, -600)
    becomes(page, "#large-work", float(np.exp(600 * 0.0018)))
    assert page.evaluate(under, spot) == pytest.approx(before, abs=0.01), "what is under the pointer stays there"
    becomes(page, "#large-query", 1)
    page.mouse.down()
    page.mouse.move(spot[0] - 50, spot[1] - 30, steps=4)
    page.mouse.up()
    assert page.evaluate(under, [spot[0] - 50, spot[1] - 30]) == pytest.approx(before, abs=0.02), "a drag moves it"
    expect(page.locator("#large")).to_be_visible()
    page.mouse.dblclick(*spot)
    becomes(page, "#large-work", 1)
    page.mouse.dblclick(*spot)
    becomes(page, "#large-work", 3)
    page.keyboard.press("0")
    becomes(page, "#large-work", 1)
    page.keyboard.press("+")
    page.click("#zoom-in")
    for pane in ("#large-work", "#large-query"):
        becomes(page, pane, 2.25)
    expect(page.locator("#zoom-value")).to_have_text("225 %")
    page.keyboard.press("-")
    page.click("#zoom-out")
    page.click("#zoom-value")
    expect(page.locator("#zoom-out")).to_be_disabled()
    page.keyboard.press("+")
    page.keyboard.press("ArrowRight")  # another work begins whole
    becomes(page, "#large-work", 1)
    page.mouse.click(box["x"] - 20, box["y"] + 20)  # beside the pictures
    expect(page.locator("#large")).to_be_hidden()


def test_close_up_the_original_is_fetched(opened, root):
    page = opened("#catalog=art&like=3", device_scale_factor=2)
    results(page).first.locator(".frame").click()
    expect(page.locator("#large-work img")).to_be_visible()
    page.wait_for_function("() => document.querySelector('#large-work img').naturalWidth > 0")
    own = page.locator(".result").first.get_attribute("data-id")  # the query beside it fetches its original too
    with page.expect_response(lambda r: "side=6000" in r.url and f"id={own}&" in r.url and r.ok) as waiting:
        page.click("#zoom-in")
    with Image.open(io.BytesIO(waiting.value.body())) as image:
        assert image.size == SHAPES[int(own) % 4]


def test_two_fingers_bring_it_closer(opened):
    page = opened("#catalog=art&like=3", viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    page.tap(".result .frame >> nth=0")
    box = page.locator("#large-work .zoomed").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    fingers = page.context.new_cdp_session(page)
    at = lambda d: [{"x": x - d, "y": y, "id": 1}, {"x": x + d, "y": y, "id": 2}]  # noqa: E731
    fingers.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": at(20)})
    for apart in (25, 40, 60):
        fingers.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": at(apart)})
    fingers.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    page.wait_for_function("() => document.querySelector('#zoom-value').textContent != '100 %'")
    assert 1.8 < scale_of(page, "#large-work") < 3.2
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wide) <= 0


def test_query_and_work_side_by_side_at_one_size(opened):
    page = opened("#catalog=art&like=4")
    results(page).first.locator(".frame").click()
    sizes = """() => ["#large-query", "#large-work"].map((pane) => {
        const box = document.querySelector(`${pane} .zoomed`).getBoundingClientRect();
        return [box.width, box.height]; })"""
    query, work = page.evaluate(sizes)
    assert query == pytest.approx(work, abs=1)
    assert min(query) > 300
    page.keyboard.press("c")
    query, work = page.evaluate(sizes)
    assert query[0] < work[0] / 2
    expect(page.locator("#beside")).to_have_attribute("aria-pressed", "false")
    page.reload()
    page.wait_for_selector("#large-work img")
    query, work = page.evaluate(sizes)
    assert query[0] < work[0] / 2, "it is remembered"
    page.click("#beside")
    query, work = page.evaluate(sizes)
    assert query == pytest.approx(work, abs=1)


# ------------------------------------------------------------------------------- a selection


def test_a_selection_is_kept_shared_and_exported(opened, tmp_path):
    page = opened("#catalog=art&like=3", permissions=["clipboard-read", "clipboard-write"])
    expect(page.locator("#selection-open")).to_be_hidden()
    chosen = [ids(page)[i] for i in (0, 2, 5)]
    results(page).nth(0).hover()
    results(page).nth(0).locator("[data-act=keep]").click()
    results(page).nth(2).locator(".frame").focus()
    page.keyboard.press("k")
    results(page).nth(5).locator(".frame").click()
    page.locator("#large [data-act=keep]").click()
    page.keyboard.press("Escape")
    expect(page.locator("#selection-count")).to_have_text("3")
    expect(page.locator(".result [data-act=keep][aria-pressed=true]")).to_have_count(3)
    page.reload()
    page.wait_for_selector(".result")
    expect(page.locator("#selection-count")).to_have_text("3")
    page.click("#selection-open")
    expect(page.locator(".wall")).to_have_count(3)
    assert ids(page) == chosen
    assert said(page, "selection") == ",".join(map(str, chosen))
    expect(page.locator("#selection h2")).to_have_text("Your selection")

    with page.expect_download() as waiting:
        page.get_by_role("button", name="Save as CSV").click()
    waiting.value.save_as(tmp_path / "s.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "s.csv").read_text("utf-8-sig"))))
    assert [row["id"] for row in rows] == [str(i) for i in chosen]
    assert [row["title"] for row in rows] == [f"Plate {i}" for i in chosen]
    one = opened(f"#{urlsplit(rows[1]['link']).fragment}")
    expect(one.locator("#large-title")).to_have_text(f"Plate {chosen[1]}")
    page.get_by_role("button", name="Copy the works' links").click()
    expect(page.locator(".note")).to_contain_text("3 links")
    assert page.evaluate("navigator.clipboard.readText()").split("\n") == [row["link"] for row in rows]
    page.get_by_role("button", name="Copy a link to it").click()
    page.wait_for_function("async () => !(await navigator.clipboard.readText()).includes('\\n')")
    link = page.evaluate("navigator.clipboard.readText()")

    other = opened(f"#{urlsplit(link).fragment}&")  # another browser, whose selection is empty
    expect(other.locator("#selection h2")).to_have_text("A selection that was shared with you")
    assert ids(other) == chosen
    expect(other.locator("#selection-open")).to_be_hidden()
    other.get_by_role("button", name="Keep these works").click()
    expect(other.locator("#selection-count")).to_have_text("3")
    expect(other.locator("#selection h2")).to_have_text("Your selection")
    gone = opened(f"#catalog=art&selection={chosen[0]},nothing")
    expect(gone.locator(".note")).to_contain_text("1 work of this selection is not in this collection.")

    answers_to(page, lambda: page.get_by_role("button", name="Search with these").click())
    assert said(page, "like") == ",".join(map(str, chosen))
    page.go_back()
    page.locator(".wall").first.hover()
    page.locator(".wall [data-act=keep]").first.click()
    expect(page.locator(".wall")).to_have_count(2)
    page.get_by_role("button", name="Empty it").click()
    expect(page.locator("#selection")).to_be_hidden()
    expect(page.locator("#selection-open")).to_be_hidden()


def test_a_work_that_is_removed_in_the_large_view_stays_removed(opened):
    page = opened("#catalog=art")
    for card in range(3):
        page.locator(".wall .frame").nth(card).focus()
        page.keyboard.press("k")
    page.click("#selection-open")
    expect(page.locator(".wall")).to_have_count(3)
    chosen = ids(page)
    page.locator(".wall").nth(1).hover()
    page.locator(".wall [data-act=open]").nth(1).click()
    expect(page.locator("#large")).to_be_visible()
    page.keyboard.press("k")
    page.keyboard.press("Escape")
    expect(page.locator("#large")).to_be_hidden()
    page.wait_for_timeout(200)
    expect(page.locator(".wall")).to_have_count(2)
    assert ids(page) == [chosen[0], chosen[2]]
    expect(page.locator("#selection h2")).to_have_text("Your selection")


def test_odd_ids_and_formulas_are_kept_and_exported(opened, tmp_path):
    page = opened("#catalog=odd")
    for card in range(len(ODD)):
        page.locator(".wall .frame").nth(card).focus()
        page.keyboard.press("k")
    page.click("#selection-open")
    expect(page.locator(".wall")).to_have_count(len(ODD))
    again = opened(f"#{urlsplit(page.url).fragment}")
    expect(again.locator(".wall")).to_have_count(len(ODD))
    with page.expect_download() as waiting:
        page.get_by_role("button", name="Save as CSV").click()
    waiting.value.save_as(tmp_path / "s.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "s.csv").read_text("utf-8-sig"), newline="")))
    assert {row["id"]: row["medium"] for row in rows} == ODD
    cell = "csv => csv.split('\\r\\n')[1]"
    made = page.evaluate(
        """async (cut) => { const { csvOf } = await import("./static/kept.js");
            return eval(cut)(csvOf([{ id: "=1+1", attributes: { title: '@x, "y"' , year: "-5" } }])); }""".replace(
            "eval(cut)(", "((csv) => csv.split('\\r\\n')[1])("
        ),
        cell,
    )
    assert next(csv.reader([made]))[0] == "'=1+1"
    assert next(csv.reader([made]))[2:] == ['\'@x, "y"', "-5"]


# ------------------------------------------------------------------------------- several searches


def test_several_images_as_a_search_each(opened, root):
    page = opened("#catalog=art")
    together = answers_to(page, lambda: page.set_input_files("#file", [root / f"{i}.png" for i in (5, 40, 22)]))
    expect(page.locator("#like .tile:not(.add)")).to_have_count(3)
    tokens = said(page, "like").split(",")
    assert together["results"]
    body = answers_to(page, lambda: page.click("#each"))
    assert body["results"][0]["id"] == "5"
    assert said(page, "searches").split(",") == tokens
    assert said(page, "like") == tokens[0]
    tiles = page.locator("#searches .tile")
    expect(tiles).to_have_count(3)
    for i, number in ((1, 40), (2, 22)):
        assert answers_to(page, lambda i=i: tiles.nth(i).click())["results"][0]["id"] == str(number)
        expect(tiles.nth(i)).to_have_attribute("aria-pressed", "true")
    settled(page)
    results(page).nth(3).hover()
    answers_to(page, lambda: results(page).nth(3).locator("[data-act=more]").click())
    expect(page.locator("#searches")).to_be_visible()  # the way back to the others
    expect(page.locator("#searches [aria-pressed=true]")).to_have_count(0)
    again = opened(f"#{urlsplit(page.url).fragment}")
    expect(again.locator("#searches .tile")).to_have_count(3)
    page.get_by_role("button", name="Search with all together").click()
    page.wait_for_function("() => !location.hash.includes('searches')")
    assert said(page, "like").split(",") == tokens
    expect(page.locator("#searches")).to_be_hidden()

    transfer = page.evaluate_handle(
        """(all) => {
            const transfer = new DataTransfer();
            const type = { type: "image/png" };
            for (const data of all) transfer.items.add(new File([new Uint8Array(data)], "a.png", type));
            return transfer;
        }""",
        [list((root / f"{i}.png").read_bytes()) for i in (9, 31)],
    )
    page.dispatch_event("body", "dragenter", {"dataTransfer": transfer})
    expect(page.locator("#drop [data-to=each]")).to_be_visible()
    body = answers_to(page, lambda: drop(page, transfer, "each"))
    assert body["results"][0]["id"] == "9"
    expect(page.locator("#searches .tile")).to_have_count(2)
    page.get_by_role("button", name="Close the searches").click()
    expect(page.locator("#searches")).to_be_hidden()
    expect(results(page).first).to_have_attribute("data-id", "9")


# ------------------------------------------------------------------------------- verified works


def verifying(page: Page, outlines: list[list[list[float]]]) -> None:
    """Has the server's answers say that their first works were verified, there in the photograph."""

    def answer(route) -> None:
        response = route.fetch()
        body = response.json()
        for i, (result, outline) in enumerate(zip(body["results"], outlines, strict=False)):
            result |= {"verdict": "same work", "inliers": 40 - i, "outline": outline}
            result["points"] = [[0.1 * (j + 1), 0.5, 0.2 * (j + 1), 0.25] for j in range(4)]
        route.fulfill(response=response, json={**body, "verdict": "same work"})

    page.route("**/search?*", answer)


def polygons(frame: Locator) -> list[list[float]]:
    """The boxes of the outlines drawn over a frame, as fractions of it: left, top, width, height."""
    return frame.evaluate(
        """frame => { const all = frame.getBoundingClientRect();
            return [...frame.querySelectorAll(".outlines polygon")].map((one) => {
                const box = one.getBBox(), scale = frame.querySelector(".outlines").getBoundingClientRect();
                return [(scale.left - all.left) / all.width + box.x * scale.width / all.width,
                        (scale.top - all.top) / all.height + box.y * scale.height / all.height,
                        box.width * scale.width / all.width, box.height * scale.height / all.height]; }); }"""
    )


def test_verified_works_are_outlined_and_their_points_shown(opened, root):
    page = opened("#catalog=art")
    left = [[0.1, 0.2], [0.4, 0.25], [0.4, 0.8], [0.1, 0.75]]
    right = [[0.6, 0.2], [0.9, 0.2], [0.9, 0.8], [0.6, 0.8]]
    again = [[x + 0.02, y] for x, y in left]  # another picture of the first work, in the same place
    verifying(page, [left, right, again])
    data, _ = wall_of(root, (5, 40))
    body = answers_to(page, lambda: drop(page, dropped(page, data)))
    settled(page)
    found = [r["id"] for r in body["results"][:3]]
    expect(results(page).first.locator(".badge")).to_have_text("The same work")
    assert results(page).first.locator(".badge").get_attribute("title").startswith("40 points")
    expect(page.locator("#found h2")).to_have_text("2 works in this photograph")
    expect(page.locator("#found .chip")).to_have_count(2)
    boxes = polygons(page.locator("#primary .frame"))
    assert np.array(boxes) == pytest.approx(np.array([[0.1, 0.2, 0.3, 0.6], [0.6, 0.2, 0.3, 0.6]]), abs=0.01)
    page.locator("#found li").nth(1).hover()
    expect(page.locator("#primary polygon.here")).to_have_attribute("data-id", found[1])

    page.locator("#found .chip").nth(1).click()
    expect(page.locator("#large .badge")).to_have_text("The same work")
    expect(page.locator("#large-query polygon.here")).to_have_attribute("data-id", found[1])
    expect(page.locator("#large-query .points path")).to_have_count(0)
    page.click("#points")
    for pane, x in (("#large-query", 0.1), ("#large-work", 0.2)):
        expect(page.locator(f"{pane} .points path")).to_have_count(4)
        assert page.locator(f"{pane} .points path").first.get_attribute("d").startswith(f"M{x:.5f} ")
    colours = [page.locator(f"{pane} .points path").evaluate_all("all => all.map((dot) => dot.style.stroke)")
               for pane in ("#large-query", "#large-work")]  # fmt: skip
    assert colours[0] == colours[1]
    assert len(set(colours[0])) == 4
    page.click("#points")
    expect(page.locator("#large .points")).to_have_count(0)
    page.keyboard.press("Escape")

    answers_to(page, lambda: page.locator("#found li").nth(1).locator(".round").click())
    assert region_of(page) == pytest.approx([0.58, 0.18, 0.34, 0.64], abs=1e-3)
    settled(page)
    assert polygons(page.locator("#primary .frame"))[0] == pytest.approx(
        [0.58 + 0.34 * 0.1, 0.18 + 0.64 * 0.2, 0.34 * 0.3, 0.64 * 0.6], abs=0.01
    ), "an outline in a part lies in the whole image"
    answers_to(page, lambda: drop(page, picture(page, root, 9), "like"))
    settled(page)
    expect(page.locator("#primary polygon")).to_have_count(0)  # of two images nobody knows in which one
    expect(page.locator("#found")).to_be_hidden()
