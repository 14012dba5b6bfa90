"""The report in a browser: it opens without a word, asks nobody for anything, filters, sorts and opens identities."""

import re
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest

from evaluation.report import write_report
from tests.evaluated_sets import evaluated, stripes, write_folders
from utils.images import write_image

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
IDENTITIES, IMAGES = 15, 10


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page's file, and the results that it shows; the second set has the first one's identities but no switch."""
    folder = tmp_path_factory.mktemp("report") / "with a space"
    faces = write_folders(folder / "real", 5, 5, "person")
    results = []
    for seed, name in enumerate(("two stage", "one stage")):
        files = write_folders(folder / name, IDENTITIES, IMAGES)
        training = (folder / "real", faces)
        results.append(evaluated(name, folder / name, files, seed=seed, training=training, two_stage=seed == 0))
    return write_report(results, folder / "reports" / "report.html"), results


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """open_page(file, **context) -> page; afterwards no page may have said or asked anything."""
    said, asked, pages = [], [], []

    def _open(file: Path, **options):
        page = browser.new_page(**options)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        pages.append(page)
        return page

    yield _open
    own = [page.url for page in pages]
    for page in pages:
        page.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("data:", "blob:")) and url not in own] == []


def names(page) -> list[str]:
    """The identities in the sheet, in order."""
    return page.eval_on_selector_all("#sheet .identity", "cards => cards.map(card => card.dataset.name)")


def ranked(result, values, count: int) -> list[str]:
    """Names by a figure, lowest first."""
    return list(result.identities.names[np.argsort(values, kind="stable")][:count])


def test_sorts(report, open_page):
    file, (first, _) = report
    page = open_page(file)
    found = first.identities
    assert names(page) == ranked(first, found.consistency, 12)
    page.select_option("#sort", "switchT")
    assert names(page) == ranked(first, found.switch_t, 12)
    page.select_option("#sort", "trainingCosine")
    assert names(page) == ranked(first, found.training_cosine, 12)
    page.click("#direction")
    assert names(page) == ranked(first, -found.training_cosine, 12)
    page.click("#more")
    assert names(page) == ranked(first, -found.training_cosine, IDENTITIES)


def test_filters(report, open_page):
    file, (first, second) = report
    page = open_page(file)
    page.fill("#query", "ID_00")
    assert len(names(page)) == 10 and page.inner_text("#count") == "10 of 15 identities"
    page.fill("#query", "")
    limits = np.sort(first.identities.consistency)[[4, 9]] + [-1e-3, 1e-3]
    for end, limit in zip(("from", "to"), limits, strict=True):
        page.fill(f"[data-key=consistency][data-end={end}]", f"{limit:.4f}")
    assert names(page) == ranked(first, first.identities.consistency, IDENTITIES)[4:10]
    page.click("#sets button >> nth=1")
    assert names(page) == ranked(second, second.identities.consistency, 12)
    assert page.locator("[data-key=switchT]").count() == 0  # the one-stage set has no switch


def test_shows_the_sets_beside_one_another(report, open_page):
    page = open_page(report[0])
    card = page.locator("#sheet .identity").first
    assert card.locator(".strip").count() == 2 and card.locator("img").count() == 16
    page.uncheck("#beside")
    assert card.locator(".strip").count() == 1


def test_opens_an_identity(report, open_page):
    file, (first, _) = report
    page = open_page(file)
    page.fill("#query", "id_000")
    page.click("#sheet .identity")
    page.wait_for_selector("dialog[open] .images figure")
    assert page.inner_text("#identity-name") == "id_000"
    tiles = page.locator("dialog .images figure")
    assert tiles.count() == IMAGES and page.locator("dialog .images img").count() == IMAGES
    row = 3
    text = tiles.nth(row).inner_text()
    assert f"#{first.images.index[row]}" in text and str(first.images.seed[row]) in text
    assert f"cos {first.images.centre_cosine[row]:.3f}" in text and f"t {first.images.switch_t[row]}" in text
    assert "copy of id_000/0.png" in tiles.nth(1).inner_text()
    assert page.locator("dialog .box").first.locator("img").count() == 4  # of the nearest training identity
    assert "person_000" in page.inner_text("dialog .box >> nth=0")
    address = tiles.nth(row).locator("a").evaluate("link => link.href")
    assert address == (Path(first.root) / first.images.files[row]).as_uri()
    page.select_option("dialog .order select", "cosine")
    order = page.eval_on_selector_all("dialog .images figure", "tiles => tiles.map(tile => Number(tile.dataset.place))")
    assert order == np.argsort(np.round(first.images.centre_cosine[:IMAGES], 3), kind="stable").tolist()
    page.click("dialog .link")
    page.locator("#identity-name", has_text="id_001").wait_for()
    page.click("#close")
    assert page.locator("dialog[open]").count() == 0
    page.click("#ends .identity >> nth=0")
    page.wait_for_selector("dialog[open]")
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0


def test_turns_identities_with_the_keyboard(report, open_page):
    """The focus stays in the dialog and on its button, whatever the button replaced."""
    file, (first, _) = report
    page = open_page(file)
    ranks = ranked(first, first.identities.consistency, 8)
    page.focus("#sheet .identity")
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open] .images figure")

    def turned(key: str, rank: int) -> None:
        page.keyboard.press(key)
        page.locator("#identity-name", has_text=ranks[rank]).wait_for()

    for rank in (1, 2, 3):
        turned("ArrowRight", rank)
    turned("ArrowLeft", 2)
    page.focus('[aria-label="next identity"]')
    for rank in (3, 4):
        turned("Enter", rank)
    page.focus("dialog .order select")
    page.keyboard.press("ArrowDown")
    assert page.inner_text("#identity-name") == ranks[4]  # the arrows are the list's there


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_fits_a_phone(report, open_page, scheme):
    page = open_page(report[0], viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(251, 250, 248)" if scheme == "light" else "rgb(20, 23, 26)")
    page.tap(".term >> nth=0")
    assert page.is_visible("#tip")


def test_long_and_hostile_names_stay_inside(open_page, tmp_path):
    """Names are folders of any kind: they break at any letter, are links that lead there, and run nothing."""
    people = ["a" * 120, "<script>document.title = 1<", "per cent %41#?", "quo'te\"", "名前"]
    root = tmp_path / "x" / ("set_" * 20)
    files = [f"{name}/{k}.png" for name in people for k in range(3)]
    for number, file in enumerate(files):
        write_image(root / file, stripes(number // 3, number % 3))
    result = evaluated("set_" * 20, root, files, seed=0, training=(root, files))
    page = open_page(write_report([result], tmp_path / "report.html"), viewport={"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.title() == f"{'set_' * 20}: evaluation"
    for card in range(len(people)):
        page.click(f"#sheet .identity >> nth={card}")
        page.wait_for_selector("dialog[open] .images figure")
        assert page.evaluate("(d => d.scrollWidth - d.clientWidth)(document.getElementById('identity'))") == 0
        address = page.locator("dialog .images a").first.evaluate("link => link.href")
        assert unquote(urlsplit(address).path) == str(root / page.inner_text("#identity-name") / "0.png")
        page.keyboard.press("Escape")


def test_defines_its_terms(report, open_page):
    page = open_page(report[0])
    term = page.locator(".board [data-term=eer]")
    term.hover()
    assert "false match rate of impostor pairs equals" in page.inner_text("#tip")
    page.mouse.move(0, 0)
    assert not page.is_visible("#tip")
    term.focus()
    assert page.is_visible("#tip")
    page.keyboard.press("Escape")
    assert not page.is_visible("#tip")


def test_shows_from_disk_what_the_page_does_not_hold(report, browser, tmp_path):
    whole, results = report
    held = re.search('id="data">(.*)</script>', whole.read_text())[1]
    small = write_report(results, tmp_path / "report.html", max_bytes=whole.stat().st_size - len(held) + 60_000)
    page = browser.new_page()
    page.goto(small.as_uri())
    page.click("#sheet .identity:has(.absent)")
    page.wait_for_selector("dialog[open] .absent")
    page.click("text=Show the other pictures from disk")
    # the page's policy forbids what page.wait_for_function does
    widths = "[...document.querySelectorAll('dialog .images img')].map(image => image.naturalWidth)"
    for _ in range(200):
        if 32 in page.evaluate(widths):
            break
        page.wait_for_timeout(50)
    assert 32 in page.evaluate(widths)
    page.close()
