"""The web demo without gradio: its texts, its port, its uploads. In a browser: tests/browser/."""

import asyncio
import base64
import io
import os
import re
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from PIL import Image

import app
from config.training_config import TrainingConfig
from evaluation.model_card import WARNING
from evaluation.predictor import Prediction, Taxon
from runtime.run_files import save_config
from tests.conftest import run_printed
from utils.logging_utils import UserError

LIKELIEST = [("oak", 0.6234), ("<b>ash</b>", 0.3), ("elm", 0.0764), ("fir", 0.0001), ("yew", 0.0001), ("box", 0.0)]
MEASURED = {"split": "test", "n": 1200, "top1": 0.9, "top1_interval": [0.88, 0.999]}
MEASURED |= {"coverage": 0.75, "selective_accuracy": 0.96, "per_token": False, "prior_calibration": False}


TEXTS = app.load_texts()


class Upload(NamedTuple):
    path: str
    orig_name: str | None


class FakeEndpoint:
    def __init__(self, found):
        self.found = found

    def predict(self, images):
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    def explain(self, image, found):
        return Image.new("RGB", (30, 20)), image["path"] == "flat.jpg"


def photo_of(path):
    return {"bytes": path.read_bytes(), "path": path.name}


def footer(names, report, is_calibrated, run="mine"):
    return " ".join(TEXTS.footer(run, names, report, is_calibrated, WARNING).split())


def test_an_answer_is_a_name_and_five_bars_of_their_own_length():
    html = TEXTS.answer(Prediction(LIKELIEST, True), 5)
    assert "<h2>oak</h2>" in html and "62% sure" in html
    assert re.findall("<b>(.*?)</b>", html) == ["62%", "30%", "8%", "&lt;1%", "&lt;1%"]
    assert re.findall("width:(.*?)%", html) == ["62.3", "30.0", "7.6", "0.0", "0.0"]


def test_an_answer_brings_the_photo_in_a_form_that_browsers_show(tmp_path):
    Image.new("RGB", (1200, 300), (200, 30, 90)).save(tmp_path / "a.tif")  # as HEIC: most show neither
    html = app.answer_to(FakeEndpoint(Prediction(LIKELIEST, True)), TEXTS, photo_of(tmp_path / "a.tif"))
    small = Image.open(io.BytesIO(base64.b64decode(re.search('src="data:image/jpeg;base64,(.*?)"', html)[1])))
    assert small.format == "JPEG" and small.size == (640, 160) and "<h2>oak</h2>" in html


def test_a_photo_that_browsers_show_is_not_decoded_a_second_time(tmp_path):
    Image.new("RGB", (1200, 300), (200, 30, 90)).save(tmp_path / "a.heic", "JPEG")  # the contents decide
    html = app.answer_to(FakeEndpoint(Prediction(LIKELIEST, True)), TEXTS, photo_of(tmp_path / "a.heic"))
    assert "<h2>oak</h2>" in html and "data:image" not in html


def test_names_of_folders_are_escaped():
    name = "<img src=x onerror=alert(1)> ${1} {{ 7 }} 'q' \"&"
    certain = Prediction([(name, 1.0)], True)
    for html in (TEXTS.answer(certain, 5), TEXTS.refusal(name), footer([name], None, True, run=name)):
        assert "&lt;img" in html and "<img" not in html and "&#34;&amp;" in html and "{{ 7 }}" in html
    assert "&gt;99%" in TEXTS.answer(certain, 5)


def test_not_sure_is_the_headline_and_the_likeliest_a_hint():
    html = TEXTS.answer(Prediction(LIKELIEST, False), 5)
    assert "<h2>Not sure</h2>" in html and "Perhaps oak, but 62% is not enough" in html and html.count("<li>") == 5


def test_the_set_is_shown_where_it_is_not_sure_between_several():
    names = [name for name, _ in LIKELIEST]
    html = TEXTS.answer(Prediction(LIKELIEST, False, None, names), 3)
    assert "Probably one of: oak, &lt;b&gt;ash&lt;/b&gt;, elm or 3 more." in html
    for certain, chosen in ((True, names), (False, names[:1]), (False, None)):
        assert "one of" not in TEXTS.answer(Prediction(LIKELIEST, certain, None, chosen), 3)


def test_the_genus_or_family_is_the_headline_where_the_plant_is_not_sure():
    taxa = {"genus": Taxon("<i>Quercus</i>", 0.93, True), "family": Taxon("Fagaceae", 0.97, True)}
    names = [name for name, _ in LIKELIEST]
    html = TEXTS.answer(Prediction(LIKELIEST, False, None, names[:3], taxa=taxa), 5)
    assert "<h2>A plant of the genus &lt;i&gt;Quercus&lt;/i&gt;</h2>" in html and "Not sure" not in html
    assert "93% sure of the genus, not of the plant: perhaps oak (62%)." in html
    assert "Probably one of: oak, &lt;b&gt;ash&lt;/b&gt;, elm." in html
    taxa["genus"] = taxa["genus"]._replace(is_confident=False)
    html = TEXTS.answer(Prediction(LIKELIEST, False, taxa=taxa), 5)
    assert "<h2>A plant of the family Fagaceae</h2>" in html and "97% sure of the family" in html
    assert "<h2>oak</h2>" in TEXTS.answer(Prediction(LIKELIEST, True, taxa=taxa), 5)


def test_a_plant_that_it_does_not_know_is_none_of_these_and_no_genus_of_them():
    taxa, names = {"genus": Taxon("Quercus", 0.93, True)}, [name for name, _ in LIKELIEST]
    html = TEXTS.answer(Prediction(LIKELIEST, True, None, names, 0.3, taxa=taxa), 5)
    assert "<h2>None of these plants</h2>" in html and html.count("<li>") == 5
    assert "Quercus" not in html and "one of:" not in html and "% sure" not in html
    assert "<h2>oak</h2>" in TEXTS.answer(Prediction(LIKELIEST, True, None, names, -0.3), 5)
    foot = TEXTS.footer("mine", ["oak"], None, True, WARNING, True)
    assert 'named as one of them, or gets "none of these" or "not sure".' in " ".join(foot.split())


def test_several_photos_are_said_with_those_that_were_not_used():
    html = TEXTS.answer(Prediction(LIKELIEST, True, unreadable=["<b>.jpg: is empty"]), 5, "", 4)
    assert "From 3 photos of the plant together." in html and "Not used: &lt;b&gt;.jpg: is empty." in html
    assert "together" not in TEXTS.answer(Prediction(LIKELIEST, True), 5)
    assert "together" not in TEXTS.answer(Prediction(LIKELIEST, True, unreadable=["b.jpg: is empty"]), 5, "", 2)


def test_a_first_photo_that_cannot_be_opened_does_not_fail_the_rest(tmp_path):
    """The map is of the first one that can be opened."""
    looked_at = []
    endpoint = FakeEndpoint(Prediction(LIKELIEST, True, unreadable=["a.jpg: is empty"]))
    endpoint.explain = lambda photo, found: (looked_at.append(photo["path"]), (Image.new("RGB", (30, 20)), False))[1]
    Image.new("RGB", (30, 20)).save(tmp_path / "b.tif")
    photos = {"bytes": b"", "path": "a.jpg"}, [photo_of(tmp_path / "b.tif")]
    for with_map in (False, True):
        html = app.answer_to(endpoint, TEXTS, *photos, with_map=with_map)
        assert "<h2>oak</h2>" in html and "Not used: a.jpg: is empty." in html and "<img hidden" not in html
        assert ("Bright parts speak for oak" in html) == with_map
    assert looked_at == ["b.tif"]


def test_the_map_is_shown_when_asked_for(tmp_path):
    endpoint = FakeEndpoint(Prediction(LIKELIEST, True))
    for name, words in (("a.jpg", "Bright parts speak for oak"), ("flat.jpg", "no single part decides")):
        Image.new("RGB", (30, 20)).save(tmp_path / name)
        html = app.answer_to(endpoint, TEXTS, photo_of(tmp_path / name), with_map=True)
        assert words in html and "<h2>oak</h2>" in html
        picture = re.search('alt="where it looked in the photo" src="data:image/jpeg;base64,(.*?)"', html)[1]
        assert Image.open(io.BytesIO(base64.b64decode(picture))).size == (30, 20)
        assert "figure" not in app.answer_to(endpoint, TEXTS, photo_of(tmp_path / name))


def test_a_photo_goes_by_the_name_of_its_sender(tmp_path):
    """Its path here is private: it is in no answer."""
    path = tmp_path / "up.jpg"
    path.write_bytes(b"no photo")
    assert app.read_upload(Upload(str(path), "mine.jpg")) == {"bytes": b"no photo", "path": "mine.jpg"}
    assert app.read_upload(Upload(str(path), None))["path"] == "up.jpg"


def test_a_photo_that_was_deleted_by_now_is_asked_for_again(monkeypatch, tmp_path):
    """As gradio does an hour after it came, while the page still shows it."""
    gradio = ModuleType("gradio")
    gradio.Error = lambda text, print_exception: UserError(text)
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    with pytest.raises(UserError, match="This photo was deleted an hour after it came; choose it again"):
        app.read_upload(Upload(str(tmp_path / "gone.jpg"), "mine.jpg"))


def test_no_photo_is_no_answer_and_a_failure_is_said():
    assert app.answer_to(FakeEndpoint(None), TEXTS, None) == TEXTS.start()
    photo = {"bytes": b"", "path": "a.jpg"}
    html = app.answer_to(FakeEndpoint(RuntimeError("CUDA error")), TEXTS, photo)
    assert "There is no name for this photo, since the program failed" in html and "CUDA" not in html
    assert app.answer_to(FakeEndpoint("a.jpg: is <empty>"), TEXTS, photo) == TEXTS.refusal("a.jpg: is <empty>")
    six = app.answer_to(FakeEndpoint(Prediction(LIKELIEST, True)), TEXTS, photo, [photo] * 5)
    assert "6 photos are too many; at most 5 of one plant are used." in six and "oak" not in six


def test_the_footer_says_how_good_it_is_and_what_it_is_not_for():
    html = footer(["oak", "ash"], MEASURED, True)
    assert "The run mine was right on 90% of 1,200 photos of test (95% interval 88% to &gt;99%)." in html
    assert "It gave a name to 75% of them, and 96% of those were right." in html and "weights were chosen" not in html
    assert 'only these 2 plants: any other plant is named as one of them, or gets "not sure".' in html
    assert "oak, ash" in html and WARNING in html
    report = MEASURED | {"none_of_these": {"coverage": 0.7, "selective_accuracy": 0.98}}
    for detects, words in (
        (True, "gave a name to 70% of them, and 98%"),
        (False, "gave a name to 75% of them, and 96%"),
    ):
        assert words in TEXTS.footer("mine", ["oak"], report, True, WARNING, detects)
    older = MEASURED | {"none_of_these": {"coverage": 0.7}}
    assert "gave a name to 75% of them" in TEXTS.footer("mine", ["oak"], older, True, WARNING, True)
    del older["selective_accuracy"]
    html = TEXTS.footer("mine", ["oak"], older, True, WARNING, True)
    assert "gave a name to" not in html and "sure of none" not in html and "was right on 90%" in html


@pytest.mark.parametrize(
    ("changes", "is_calibrated", "words"),
    [
        ({"split": "val"}, True, "photos of val (95% interval 88% to &gt;99%). It gave a name to 75% of them"),
        ({"split": "val"}, True, "Its weights were chosen on these photos"),
        ({"coverage": 0.0, "selective_accuracy": None}, True, "It was sure of none of them."),
        ({"coverage": None}, False, "is named as one of them; its confidence was not tested."),
        (None, True, "How often the run mine is right was not measured."),
    ],
)
def test_footers(changes, is_calibrated, words):
    html = footer(["oak"], None if changes is None else MEASURED | changes, is_calibrated)
    assert words in html and WARNING in html


def test_a_port_in_use_and_a_bad_host_are_reported():
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
    printed = capsys.readouterr().out
    assert stopped.value.code == 1 and printed.startswith("error: the page needs gradio (") and printed.count("\n") == 1
    assert "pip install -r requirements-app.txt" in printed


def test_uploads_go_to_a_folder_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")
    folders, shown = [], []

    def serve(blocks, endpoint, options):
        folders.append(Path(os.environ["GRADIO_TEMP_DIR"]))
        assert folders[-1].stat().st_mode & 0o077 == 0

    monkeypatch.setattr("evaluation.predictor.load_predictor", lambda run: None)
    monkeypatch.setattr("evaluation.endpoint.Endpoint", lambda predictor, run: None)
    monkeypatch.setattr(app, "build_blocks", lambda endpoint, run: shown.append(run))
    monkeypatch.setattr(app, "serve", serve)
    save_config(TrainingConfig(), tmp_path, {})
    assert app.main([str(tmp_path), "--port", "0"]) == 0
    assert not folders[0].exists() and shown[0].folder == tmp_path
    assert app.main([str(tmp_path), "--port", "0", "--no-page"]) == 0 and shown[1] is None


def test_a_page_that_is_not_served_cannot_be_opened(tmp_path, capsys):
    save_config(TrainingConfig(), tmp_path, {})
    status, printed = run_printed(app.main, capsys, str(tmp_path), "--no-page", "--open")
    assert status == 2 and "open=true with no_page=true: there is no page to open; leave one out" in printed


@pytest.mark.parametrize(
    "name", ["localhost:7860", "LOCALHOST", "127.0.0.1:1", "[::1]:7860", "[::1]", "192.168.1.7:80", "plants.local:7860"]
)
def test_the_page_is_served_under_its_own_names_and_addresses(name):
    assert app.KnownHosts(None, "plants.local").is_known(name.lower())


@pytest.mark.parametrize(
    "name", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost.evil", "", "["]
)
def test_a_page_of_another_name_gets_nothing(name):
    pytest.importorskip("starlette", reason="comes with gradio: make test-browser installs it and runs this file")
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "headers": [(b"host", name.encode())]}
    asyncio.run(app.KnownHosts(None, "127.0.0.1")(scope, None, send))
    assert sent[0]["status"] == 400 and b"start it with --host NAME" in sent[1]["body"]


def test_examples_are_files_of_the_run_itself(tmp_path):
    """gradio would serve what a link points at."""
    folder = tmp_path / "run" / "examples"
    folder.mkdir(parents=True)
    for path in (tmp_path / "secret.jpg", folder / "0 oak.jpg"):
        path.write_bytes(b"x")
    (folder / "1 link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "2 folder.jpg").mkdir()
    os.mkfifo(folder / "3 pipe.jpg")
    (folder / "4 loop.jpg").symlink_to(folder / "4 loop.jpg")
    assert app.find_examples(folder) == [str(folder / "0 oak.jpg")]
    (tmp_path / "other").symlink_to(folder)
    assert app.find_examples(tmp_path / "other") == []
