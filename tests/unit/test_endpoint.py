"""The endpoint without a server: answers, limits and refusals. By HTTP: tests/browser/test_endpoint.py."""

import functools
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import predict
from evaluation.endpoint import MAX_BODY, MAX_QUEUE, Endpoint, Refusal, check_request
from evaluation.predictor import Prediction, Predictor, load_predictor
from runtime.run_dir import Run
from tests.conftest import run_main
from tests.unit.test_trainer import limit_memory, make_trainer
from utils.logging_utils import setup_logging

FORM = {"content-type": "multipart/form-data; boundary=x", "content-length": "100"}


@pytest.fixture(scope="module")
def folder(full_run, tmp_path_factory):
    return shutil.copytree(full_run.folder, tmp_path_factory.mktemp("endpoint") / "garden")


@pytest.fixture(scope="module")
def endpoint(folder):
    run = Run.load(folder)
    return Endpoint(load_predictor(run), run)


def uploads(folder, *indices):
    paths = sorted((folder / "examples").glob("*.jpg"))
    return [{"bytes": paths[index].read_bytes(), "path": str(paths[index])} for index in indices]


def test_an_answer_is_what_predict_prints_and_which_run_said_it(endpoint, folder, capsys):
    images = uploads(folder, 2, 0, 3)
    argv = [str(folder), *[image["path"] for image in images], "--json", "--together", "--num-workers", "0"]
    printed = json.loads(run_main(predict.main, capsys, *argv)[1])
    identity = {"run": "garden", "weights": Run.load(folder).describe_weights(), "model": "tiny"}
    assert endpoint.answer(images) == printed | identity and len(printed["images"]) == 3
    answer = endpoint.answer(images[:1])
    assert answer["image"] == images[0]["path"] and set(answer) - {"image"} == set(printed | identity) - {"images"}


def test_what_cannot_be_opened_is_named_as_its_sender_does(endpoint, folder):
    broken = {"bytes": b"no image", "path": "mine.jpg"}
    with pytest.raises(Refusal, match="^mine.jpg: is not an image in any of the formats") as refused:
        endpoint.answer([broken])
    assert refused.value.status == 422
    with pytest.raises(Refusal, match="^mine.jpg: is not an image.*; nothing.jpg: is empty"):
        endpoint.answer([broken, {"bytes": b"", "path": "nothing.jpg"}])
    answer = endpoint.answer([broken, *uploads(folder, 1)])
    assert answer["unreadable"][0].startswith("mine.jpg: is not an image") and answer["confidence"] > 0


@pytest.mark.parametrize("count", [0, 6])
def test_one_to_five_images_are_taken(count, endpoint, folder):
    with pytest.raises(Refusal, match=f"^{count} images: send 1 to 5 images of one plant: curl") as refused:
        endpoint.answer(uploads(folder, *[1] * count))
    assert refused.value.status == 400
    assert len(endpoint.answer(uploads(folder, *[1] * 5))["images"]) == 5


@pytest.mark.parametrize(
    ("status", "method", "headers", "waiting", "words"),
    [
        (405, "GET", FORM, 1, "GET is of no use here; send 1 to 5 images"),
        (415, "POST", FORM | {"content-type": "application/json"}, 1, "only multipart/form-data is read here"),
        (415, "POST", {}, 1, "only multipart/form-data is read here"),
        (415, "POST", FORM | {"content-type": "multipart/form-datax; boundary=x"}, 1, "only multipart/form-data is"),
        (411, "POST", {"content-type": FORM["content-type"]}, 1, "does not say its length"),
        (411, "POST", FORM | {"content-length": "9" * 5000}, 1, "does not say its length"),
        (411, "POST", FORM | {"content-length": "-1"}, 1, "does not say its length"),
        (413, "POST", FORM | {"content-length": str(MAX_BODY + 1)}, 1, "above the limit of 100,100,000"),
        (429, "POST", FORM, MAX_QUEUE + 1, "20 requests are waiting; send this one again later"),
    ],
)
def test_a_request_is_refused_before_its_body_is_read(status, method, headers, waiting, words):
    with pytest.raises(Refusal, match=words) as refused:
        check_request(method, headers, waiting)
    assert refused.value.status == status


def test_a_request_within_the_limits_is_read():
    check_request("POST", FORM | {"content-length": str(MAX_BODY)}, MAX_QUEUE)
    check_request("POST", FORM | {"content-type": "Multipart/Form-Data; boundary=x", "content-length": "9"}, 1)


def test_images_that_do_not_fit_together_are_not_tried_together_again(tiny, tmp_path, monkeypatch, capsys):
    setup_logging()
    monkeypatch.setattr("models.scoring.collect_memory", lambda device: None)  # seconds, and a CPU has none to free
    plant = make_trainer(tiny, tmp_path).plant
    limit_memory(plant.model.model, 1)
    for _ in range(2):
        assert len(list(Predictor(plant, None).predict([row["image"] for row in tiny.rows(2)]))) == 2
    assert capsys.readouterr().out.count("retrying with micro-batch 1\n") == 1


def test_the_model_is_asked_by_one_thread_at_a_time(endpoint, folder, monkeypatch):
    asked, most = [], []

    def ask(images, top=5):
        asked.append(1)
        most.append(len(asked))
        time.sleep(0.01)
        asked.pop()
        return iter([Prediction([("oak", 1.0)], True)])

    monkeypatch.setattr(endpoint.predictor, "predict", ask)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(functools.partial(endpoint.predict), [uploads(folder, 1)] * 16))
    assert len(answers) == 16 and max(most) == 1
