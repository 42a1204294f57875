"""The web demo in a real browser: make test-browser."""

import os
from pathlib import Path

import pillow_heif
import pytest
from PIL import Image

from evaluation.model_card import WARNING
from tests.faults.corpus import OPENS, contents

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync"
CAMERA = "--use-fake-device-for-media-stream --use-fake-ui-for-media-stream"


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="make test-browser installs Playwright")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM}: no such browser; name one in CHROMIUM")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=f"{QUIET} {CAMERA}".split())
        yield browser
        browser.close()


@pytest.fixture
def open_page(shown, chromium):
    """open_page(width, height) shows the page; at the end nothing has failed in it or been asked of another host."""
    contexts, wrong = [], []

    def show(width: int = 1100, height: int = 850):
        context = chromium.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        page = context.new_page()
        page.on(
            "request", lambda request: request.url.startswith((shown, "data:", "blob:")) or wrong.append(request.url)
        )
        page.on("console", lambda line: line.type == "error" and wrong.append(line.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.goto(shown)
        page.wait_for_selector("#photo input[type=file]", state="attached")
        page.wait_for_selector(".gallery button >> nth=5")
        return page

    yield show
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "plain.jpg"
    path.write_bytes(contents()["plain.jpg"][0])
    return path


def choose(page, path: Path) -> None:
    page.set_input_files("#photo input[type=file]", path)


def answer(page) -> str:
    page.wait_for_selector("#answer h2")
    return page.inner_text("#answer")


DROP = """([place, kind, name, type]) => {
    const files = new DataTransfer();
    files.items.add(new File(["no photo"], name, {type}));
    const more = {bubbles: true, cancelable: true, dataTransfer: files, clipboardData: files};
    const event = kind === "paste" ? new ClipboardEvent(kind, more) : new DragEvent(kind, more);
    document.querySelector(place).dispatchEvent(event);
}"""


def test_an_uploaded_photo_gets_names_with_bars_of_their_shares(open_page, photo):
    page = open_page()
    choose(page, photo)
    answer(page)
    lines = page.query_selector_all("#answer li")
    assert len(lines) == 5
    for line in lines:
        text = line.query_selector("b").inner_text()
        whole, part = (bar.bounding_box()["width"] for bar in line.query_selector_all("span"))
        share = {"<1%": 0.0, ">99%": 1.0}.get(text) if text[0] in "<>" else int(text[:-1]) / 100
        assert abs(part / whole - share) < 0.011
    page.locator("#photo button[aria-label='Clear'], #photo button[aria-label='Remove Image']").click()
    page.wait_for_selector("#answer h2", state="detached")
    assert page.inner_text("#answer").strip() == "The name appears here."
    assert WARNING in page.inner_text("#foot") and "of 20 photos of val" in page.inner_text("#foot")


def test_more_photos_of_a_plant_get_one_name_until_another_one_is_chosen(open_page, photo, tmp_path):
    (tmp_path / "letter.txt").write_text("no photo")
    Image.new("RGB", (60, 40), (20, 90, 200)).save(tmp_path / "b.png")
    page = open_page()
    assert not page.is_visible("#others") and not page.is_visible("#look")
    choose(page, photo)
    answer(page)
    page.set_input_files("#others input[type=file]", [tmp_path / "b.png", tmp_path / "letter.txt"])
    page.wait_for_selector("#answer >> text=From 2 photos of the plant together.")
    assert "Not used: letter.txt: is not an image" in page.inner_text("#answer")
    page.click("#others [aria-label='Remove this file'] >> nth=1")
    page.wait_for_selector("#answer >> text=Not used", state="detached")
    assert "From 2 photos" in page.inner_text("#answer")
    choose(page, tmp_path / "b.png")
    page.wait_for_selector("#answer >> text=together", state="detached")
    answer(page)
    assert "b.png" not in page.inner_text("#others")
    page.set_input_files("#others input[type=file]", [photo] * 5)
    page.wait_for_selector("#answer >> text=6 photos are too many; at most 5 of one plant")


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_the_map_is_shown_on_request_beside_the_photo(name, open_page, tmp_path):
    Image.new("RGB", (90, 60), (200, 30, 90)).save(tmp_path / name)
    page = open_page(390, 844)
    choose(page, tmp_path / name)
    answer(page)
    assert page.locator("#answer figure").count() == 0
    page.click("#look")
    page.wait_for_selector("#answer figure img")
    assert page.evaluate("document.querySelector('#answer figure img').naturalWidth") == 90
    assert page.evaluate("document.querySelector('#photo img').naturalWidth") == 90
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("suffix", [".heic", ".tif"])
def test_a_photo_that_the_browser_cannot_show_is_shown_as_the_program_reads_it(suffix, open_page, tmp_path):
    pillow_heif.register_heif_opener()
    Image.new("RGB", (600, 300), (200, 30, 90)).save(tmp_path / f"a{suffix}")
    page = open_page()
    choose(page, tmp_path / f"a{suffix}")
    answer(page)
    page.wait_for_function("document.querySelector('#photo img').naturalWidth === 600")


def test_an_example_is_named(open_page):
    page = open_page()
    page.click(".gallery button >> nth=2")
    answer(page)
    assert page.locator("#answer li").count() == 5
    assert "/3%20" in page.get_attribute("#photo img", "src")


@pytest.mark.parametrize("name", ["holiday.jpg", "letter.txt"])
def test_a_file_that_is_no_photo_gets_a_sentence(name, open_page, tmp_path):
    (tmp_path / name).write_text("no photo at all")
    page = open_page()
    choose(page, tmp_path / name)
    assert f"{name}: is not an image in any of the formats JPEG, PNG" in answer(page)


def test_dropped_and_pasted_anywhere(open_page):
    page = open_page()
    for place, kind, name, type in [
        ("#photo button", "drop", "one.pdf", "application/pdf"),
        ("#photo img", "drop", "two.txt", "text/plain"),
        ("#foot", "drop", "three.png", "image/png"),
        ("body", "paste", "four.png", "image/png"),
    ]:
        page.evaluate(DROP, [place, kind, name, type])
        page.wait_for_selector(f"#answer >> text={name}: is not an image")


def test_a_photo_is_taken_with_the_camera(open_page):
    page = open_page()
    page.click("[aria-label='Capture from camera']")
    page.click("text=Click to Access Webcam")
    page.wait_for_function("document.querySelector('#photo video')?.videoWidth > 0")
    page.wait_for_timeout(500)  # and then it shows its first frame
    page.click("[aria-label='capture photo']")
    answer(page)
    assert page.locator("#answer li").count() == 5


def test_the_name_is_that_of_the_last_of_two_photos_in_a_hurry(open_page, tmp_path, photo):
    (tmp_path / "not.jpg").write_text("no photo")
    page = open_page()
    page.click(".gallery button >> nth=1")
    page.click(".gallery button >> nth=3")
    choose(page, photo)
    choose(page, tmp_path / "not.jpg")
    page.wait_for_selector("#answer >> text=not.jpg: is not an image")
    page.wait_for_timeout(1000)
    assert "not.jpg: is not an image" in page.inner_text("#answer")


def test_a_phone_shows_the_answer_without_scrolling_sideways(open_page, photo):
    page = open_page(390, 844)
    choose(page, photo)
    answer(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    last = page.locator("#answer li").last.bounding_box()
    assert last["y"] + last["height"] <= 844 and last["x"] + last["width"] <= 390


def test_two_at_once_both_get_answers(open_page, photo):
    pages = [open_page(), open_page()]
    for page in pages:
        choose(page, photo)
    assert answer(pages[0]) == answer(pages[1])


HOSTILE = ["half.jpg", "bomb.png", "16 bit.png", "page.jpg", "empty.jpg", "sideways.jpg", "pages.tiff", "text bomb.png"]
HOSTILE += ["iphone.heic", "a heic.jpg"]
HOSTILE += ["-rf {0} %s $(x) 'q'.jpg", "\u202egpj.jpg", f"{'long' * 60}.jpg", "loop.tiff"]


def test_hostile_files_get_names_or_a_sentence(open_page, tmp_path):
    for name in HOSTILE:
        data, words = contents()[name]
        (tmp_path / name).write_bytes(data)
        page = open_page()
        choose(page, tmp_path / name)
        text = answer(page)
        assert (page.locator("#answer li").count() == 5) if words == OPENS else (words in text), (name, text)
        assert "llava_plants_" not in text and page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_file_above_the_upload_limit_is_refused(shown, chromium, tmp_path):
    (tmp_path / "big.jpg").write_bytes(bytes(21_000_000))
    page = chromium.new_page()
    page.goto(shown)
    page.wait_for_selector("#photo input[type=file]", state="attached")
    choose(page, tmp_path / "big.jpg")
    page.wait_for_selector("text=exceed the maximum allowed size")
    page.close()
