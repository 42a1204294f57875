"""The page: what it says, without gradio; and all of it in a browser (make test-browser)."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import app
from config.training_config import TrainingConfig, save_config
from evaluation.model_card import WARNING
from evaluation.page import START, as_answer, as_footer, as_refusal
from evaluation.predictor import Prediction
from tests.conftest import ROOT
from tests.faults.corpus import OPENS, contents
from utils.logging_utils import UserError

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync"
CAMERA = "--use-fake-device-for-media-stream --use-fake-ui-for-media-stream"
LIKELIEST = [("oak", 0.6234), ("<b>ash</b>", 0.3), ("elm", 0.0764), ("fir", 0.0001), ("yew", 0.0001), ("box", 0.0)]
MEASURED = {"split": "test", "n": 1200, "top1": 0.9, "top1_interval": [0.88, 0.999]}
MEASURED |= {"coverage": 0.75, "selective_accuracy": 0.96, "per_token": False, "prior_calibration": False}


class FakeNamer:
    def __init__(self, found):
        self.found = found

    def name(self, photos):
        if isinstance(self.found, Exception):
            raise self.found
        yield self.found


def test_an_answer_is_a_name_and_five_bars_of_their_own_length():
    told = as_answer(Prediction(LIKELIEST, True))
    assert "<h2>oak</h2>" in told and "62% sure" in told
    assert re.findall("<b>(.*?)</b>", told) == ["62%", "30%", "8%", "&lt;1%", "&lt;1%"]
    assert re.findall("width:(.*?)%", told) == ["62.3", "30.0", "7.6", "0.0", "0.0"]


def test_names_of_strangers_are_escaped():
    name = "<img src=x onerror=alert(1)> ${1} 'q' \"&"
    for told in (as_answer(Prediction([(name, 1.0)], True)), as_refusal(name), as_footer(name, [name], None, True)):
        assert "&lt;img" in told and "<img" not in told and "&quot;&amp;" in told
    assert "&gt;99%" in as_answer(Prediction([(name, 1.0)], True))


def test_not_sure_is_the_headline_and_the_likeliest_a_hint():
    told = as_answer(Prediction(LIKELIEST, False))
    assert "<h2>Not sure</h2>" in told and "Perhaps oak, but 62% is not enough" in told and told.count("<li>") == 5


def test_a_refusal_tells_the_file_by_its_own_name(tmp_path):
    path = str(tmp_path / "up\nload.jpg")
    reason = f"{path!r}: cannot be decoded (see {path!r})"
    assert app.answer_to(FakeNamer(reason), (path, "mine.jpg")) == as_refusal(
        "mine.jpg: cannot be decoded (see mine.jpg)"
    )
    assert str(tmp_path) not in app.answer_to(FakeNamer(reason), (path, None))
    assert "'\\u202egpj.jpg'" in app.answer_to(FakeNamer(reason), (path, "\u202egpj.jpg")).replace("&#x27;", "'")


def test_no_photo_is_no_answer_and_a_failure_is_said():
    assert app.answer_to(FakeNamer(None), None) == START
    told = app.answer_to(FakeNamer(RuntimeError("CUDA error")), ("a.jpg", "a.jpg"))
    assert "could not be named: the program failed" in told and "CUDA" not in told


def test_the_footer_says_how_good_and_what_it_is_not_for():
    told = as_footer("mine", ["oak", "ash"], MEASURED, True)
    assert "The run mine was right on 90% of 1,200 photos of test (95% interval 88% to &gt;99%)." in told
    assert "It gave a name to 75% of them, and 96% of those were right." in told and "chose its weights" not in told
    assert "Any plant but these 2 it takes for one of them, or it is not sure." in told
    assert "oak, ash" in told and WARNING in told


@pytest.mark.parametrize(
    ("changes", "is_calibrated", "words"),
    [
        ({"split": "val"}, True, "photos of val (95% interval 88% to &gt;99%). It gave a name to 75% of them"),
        ({"split": "val"}, True, "These photos chose its weights too"),
        ({"coverage": 0.0, "selective_accuracy": None}, True, "It was sure of none of them."),
        ({"coverage": None}, False, "takes for one of them; how sure it is was not put to a test."),
        (None, True, "How often the run mine is right was not measured."),
    ],
)
def test_footers(changes, is_calibrated, words):
    told = as_footer("mine", ["oak"], None if changes is None else MEASURED | changes, is_calibrated)
    assert words in told and WARNING in told


def test_a_port_in_use_and_a_bad_host_are_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: the page cannot be shown there .* in use.*--port"):
            app.find_port("127.0.0.1", port)
    assert app.find_port("127.0.0.1", port) == port and app.find_port("127.0.0.1", 0) > 0
    for host in ("no.such.host.invalid", "a..b", "192.0.2.1", ""):
        with pytest.raises(UserError, match=f"--host {host} --port 0: the page cannot be shown there"):
            app.find_port(host, 0)


def test_without_gradio_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    save_config(TrainingConfig(), tmp_path, {})
    with pytest.raises(SystemExit) as stopped:
        app.main([str(tmp_path)])
    told = capsys.readouterr().out
    assert stopped.value.code == 1 and told.startswith("error: the page needs gradio (") and told.count("\n") == 1
    assert "pip install -r requirements-app.txt" in told


def test_uploads_go_to_a_folder_of_their_own(monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    with app.private_cache():
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert folder.stat().st_mode & 0o077 == 0
    assert not folder.exists()


# ---- in a browser


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """Address of the page of a run of six steps, app.py beside it as its own process."""
    pytest.importorskip("gradio", reason="the page needs gradio: make test-browser installs it")
    import train
    from data import dataset

    folder = tmp_path_factory.mktemp("app")
    with pytest.MonkeyPatch.context() as patch:
        for split, count in {"train": 48, "validation": 20, "test": 20}.items():
            patch.setitem(dataset.SPLIT_SIZES, split, count)
        tiny = ["--preset", "tiny", "--max-steps", "6", "--num-workers", "0", "--output-dir", str(folder / "run")]
        assert train.main(tiny) == 0
    temporary = folder / "temporary"
    temporary.mkdir()
    # a proxy that is not there: neither the page nor its start may need it
    environment = os.environ | {"TMPDIR": str(temporary), "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    with open(folder / "log", "w") as log:
        argv = [sys.executable, str(ROOT / "app.py"), str(folder / "run"), "--port", "0"]
        server = subprocess.Popen(argv, stdout=log, stderr=log, env=environment, cwd=folder)
    try:
        until = time.monotonic() + 120
        while not (found := re.search(r"page   (\S+)", (folder / "log").read_text())):
            assert server.poll() is None and time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.2)
        yield found[1]
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 130
        told = (folder / "log").read_text()
        assert "the page is closed" in told and "Traceback" not in told
        assert not list(temporary.glob("llava_plants_*")) and not list(ROOT.glob("*.pyi"))
    finally:
        server.kill()


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
        page.on("request", lambda one: one.url.startswith((shown, "data:", "blob:")) or wrong.append(one.url))
        page.on("console", lambda one: one.type == "error" and wrong.append(one.text))
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


@pytest.mark.browser
def test_an_uploaded_photo_gets_names_with_bars_of_their_shares(open_page, photo):
    page = open_page()
    choose(page, photo)
    answer(page)
    lines = page.query_selector_all("#answer li")
    assert len(lines) == 5
    for line in lines:
        told = line.query_selector("b").inner_text()
        whole, part = (one.bounding_box()["width"] for one in line.query_selector_all("span"))
        share = {"<1%": 0.0, ">99%": 1.0}.get(told) if told[0] in "<>" else int(told[:-1]) / 100
        assert abs(part / whole - share) < 0.011
    page.locator("#photo button[aria-label='Clear'], #photo button[aria-label='Remove Image']").click()
    page.wait_for_selector("#answer h2", state="detached")
    assert page.inner_text("#answer").strip() == "The name appears here."
    assert WARNING in page.inner_text("#foot") and "of 20 photos of val" in page.inner_text("#foot")


@pytest.mark.browser
def test_an_example_is_named(open_page):
    page = open_page()
    page.click(".gallery button >> nth=2")
    answer(page)
    assert page.locator("#answer li").count() == 5
    assert "/3%20" in page.get_attribute("#photo img", "src")


@pytest.mark.browser
@pytest.mark.parametrize("name", ["holiday.jpg", "letter.txt"])
def test_a_file_that_is_no_photo_gets_a_sentence(name, open_page, tmp_path):
    (tmp_path / name).write_text("no photo at all")
    page = open_page()
    choose(page, tmp_path / name)
    assert f"{name}: is not a photo in any of the formats JPEG, PNG" in answer(page)


@pytest.mark.browser
def test_dropped_and_pasted_anywhere(open_page):
    page = open_page()
    for place, kind, name, type in [
        ("#photo button", "drop", "one.pdf", "application/pdf"),
        ("#photo img", "drop", "two.txt", "text/plain"),
        ("#foot", "drop", "three.png", "image/png"),
        ("body", "paste", "four.png", "image/png"),
    ]:
        page.evaluate(DROP, [place, kind, name, type])
        page.wait_for_selector(f"#answer >> text={name}: is not a photo")


@pytest.mark.browser
def test_a_photo_is_taken_with_the_camera(open_page):
    page = open_page()
    page.click("[aria-label='Capture from camera']")
    page.click("text=Click to Access Webcam")
    page.wait_for_function("document.querySelector('#photo video')?.videoWidth > 0")
    page.wait_for_timeout(500)  # and then it shows its first frame
    page.click("[aria-label='capture photo']")
    answer(page)
    assert page.locator("#answer li").count() == 5


@pytest.mark.browser
def test_the_name_is_that_of_the_last_of_two_photos_in_a_hurry(open_page, tmp_path, photo):
    (tmp_path / "not.jpg").write_text("no photo")
    page = open_page()
    page.click(".gallery button >> nth=1")
    page.click(".gallery button >> nth=3")
    choose(page, photo)
    choose(page, tmp_path / "not.jpg")
    page.wait_for_selector("#answer >> text=not.jpg: is not a photo")
    page.wait_for_timeout(1000)
    assert "not.jpg: is not a photo" in page.inner_text("#answer")


@pytest.mark.browser
def test_a_phone_shows_the_answer_without_scrolling_sideways(open_page, photo):
    page = open_page(390, 844)
    choose(page, photo)
    answer(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    last = page.locator("#answer li").last.bounding_box()
    assert last["y"] + last["height"] <= 844 and last["x"] + last["width"] <= 390


@pytest.mark.browser
def test_two_at_once_both_get_answers(open_page, photo):
    pages = [open_page(), open_page()]
    for page in pages:
        choose(page, photo)
    assert answer(pages[0]) == answer(pages[1])


HOSTILE = ["half.jpg", "bomb.png", "16 bit.png", "page.jpg", "empty.jpg", "sideways.jpg", "pages.tiff", "text bomb.png"]
HOSTILE += ["-rf {0} %s $(x) 'q'.jpg", "\u202egpj.jpg", f"{'long' * 60}.jpg", "loop.tiff"]


@pytest.mark.browser
def test_hostile_files_get_names_or_a_sentence(open_page, tmp_path):
    for name in HOSTILE:
        data, words = contents()[name]
        (tmp_path / name).write_bytes(data)
        page = open_page()
        choose(page, tmp_path / name)
        told = answer(page)
        assert (page.locator("#answer li").count() == 5) if words == OPENS else (words in told), (name, told)
        assert "llava_plants_" not in told and page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.browser
def test_a_file_above_the_upload_limit_is_refused(shown, chromium, tmp_path):
    (tmp_path / "big.jpg").write_bytes(bytes(21_000_000))
    page = chromium.new_page()
    page.goto(shown)
    page.wait_for_selector("#photo input[type=file]", state="attached")
    choose(page, tmp_path / "big.jpg")
    page.wait_for_selector("text=exceed the maximum allowed size")
    page.close()
