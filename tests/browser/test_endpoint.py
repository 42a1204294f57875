"""The endpoint by HTTP, as docs/endpoint.md shows it: make test-browser."""

import asyncio
import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from evaluation.endpoint import Endpoint
from tests.faults.corpus import OPENS, contents

httpx = pytest.importorskip("httpx", reason="comes with gradio: make test-browser installs it")
KEYS = {"image", "name", "confidence", "likeliest", "level", "set", "run", "weights", "model"}


@pytest.fixture(scope="module")
def image() -> bytes:
    return contents()["plain.jpg"][0]


def post(shown: str, *files: tuple[str, bytes], **more):
    return httpx.post(f"{shown}predict", files=[("image", file) for file in files], timeout=60, **more)


def test_an_image_gets_json_and_health_says_who_answers(shown, image):
    found = post(shown, ("my plant.jpg", image))
    health = httpx.get(f"{shown}health").json()
    assert found.status_code == 200 and set(found.json()) >= KEYS and found.json()["image"] == "my plant.jpg"
    assert health.pop("ready") is True and health == {name: found.json()[name] for name in ("run", "weights", "model")}
    assert health["run"] == "run" and health["weights"].startswith("step 6, manifest ")
    together = post(shown, ("a.jpg", image), ("b.jpg", image)).json()
    assert together["images"] == ["a.jpg", "b.jpg"] and together["run"] == "run"


def test_a_bad_request_gets_a_sentence_and_no_500(shown, image):
    refused = [
        (httpx.get(f"{shown}predict"), 405, "GET is of no use here"),
        (httpx.options(f"{shown}predict"), 405, "OPTIONS is of no use here"),
        (httpx.put(f"{shown}predict", files={"image": image}), 405, "PUT is of no use here"),
        (post(shown), 415, "only multipart/form-data is read here"),
        (httpx.post(f"{shown}predict", json={"image": "x"}), 415, "only multipart/form-data is read here"),
        (httpx.post(f"{shown}predict", files={"picture": b"x"}), 400, "0 images: send 1 to 5 images of one plant"),
        (httpx.post(f"{shown}predict", files={"image": (None, "x")}), 400, "`image` is text, not a file"),
        (post(shown, ("a.jpg", b"no image")), 422, "a.jpg: is not an image in any of the formats"),
        (post(shown, ("a.jpg", b"")), 422, "a.jpg: is empty (0 bytes)"),
        (post(shown, *[("a.jpg", image)] * 6), 400, "6 images: send 1 to 5"),
        (post(shown, *[("a.jpg", b"x")] * 51), 400, "the form cannot be read (Too many files"),
        (post(shown, ("a.jpg", bytes(20_000_001))), 413, "a.jpg: is above the limit of 20,000,000 bytes"),
        (post(shown, *[("a.jpg", bytes(20_000_000))] * 6), 413, "above the limit of 100,100,000"),
    ]
    chunks = httpx.post(f"{shown}predict", content=iter([b"xxx"]), headers={"content-type": "multipart/form-data"})
    refused.append((chunks, 411, "does not say its length"))
    for type in ("multipart/form-data", "multipart/form-data; boundary=x"):
        found = httpx.post(f"{shown}predict", content=b"xxx", headers={"content-type": type})
        refused.append((found, 400, "the form cannot be read"))
    for found, status, words in refused:
        assert found.status_code == status and words in found.json()["error"] and len(found.json()) == 1, found.text
    assert httpx.post(f"{shown}gradio_api/call/predict", content=b"{bad").status_code == 422
    assert httpx.get(f"{shown}health", headers={"host": "evil.example"}).status_code == 400


def test_hostile_files_get_an_answer_or_a_sentence(shown):
    for name, (data, words) in contents().items():
        found = post(shown, (name, data))
        if words == OPENS:
            assert found.status_code == 200 and found.json()["confidence"] > 0, (name, found.text)
        else:
            assert found.status_code == 422 and words in found.json()["error"], (name, found.text)
        assert "llava_plants_" not in found.text


def test_of_many_requests_none_is_lost(shown, image):
    """8 clients, 40 requests, one in eight of them bad; docs/LOG.md has 200 and their memory."""
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda n: post(shown, (f"{n}.jpg", image if n % 8 else b"x")), range(40)))
    assert [each.status_code for each in found] == [200 if n % 8 else 422 for n in range(40)]
    for n, each in enumerate(found):
        assert each.json()["image"] == f"{n}.jpg" if n % 8 else each.json()["error"].startswith(f"{n}.jpg: ")
    assert len({json.dumps(each.json()["likeliest"]) for n, each in enumerate(found) if n % 8}) == 1


def test_who_sends_nothing_or_leaves_keeps_no_place(shown, image, monkeypatch):
    """Of 20 places: 30 senders leave in the middle of their image, then one never begins."""
    host, port = shown.removeprefix("http://").rstrip("/").split(":")
    head = "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000\r\nContent-Type: multipart/form-data; "
    for _ in range(30):
        with socket.create_connection((host, int(port))) as sender:
            sender.sendall(f'{head}boundary=x\r\n\r\n--x\r\nContent-Disposition: form-data; name="image"'.encode())
    assert post(shown, ("a.jpg", image)).status_code == 200

    class Silent:
        method, headers = "POST", {"content-type": "multipart/form-data", "content-length": "9"}

        async def form(self, **limits):
            await asyncio.sleep(60)

    monkeypatch.setattr("evaluation.endpoint.UPLOAD_S", 0.01)
    endpoint = object.__new__(Endpoint)
    endpoint.waiting = 0
    found = asyncio.run(endpoint._post(Silent()))
    assert found.status_code == 408 and b"had not arrived after 0.01 s" in found.body and endpoint.waiting == 0


def test_gradio_client_gets_the_same(shown, image, tmp_path):
    from gradio_client import Client, handle_file

    path = Path(tmp_path / "plant.jpg")
    path.write_bytes(image)
    client = Client(shown, verbose=False, download_files=False)
    assert client.predict([handle_file(path)], api_name="/predict") == post(shown, ("plant.jpg", image)).json()
    path.write_bytes(b"no image")
    for files, words in (
        ([path], "plant.jpg: is not an image"),
        ([path] * 6, "6 images: send"),
        ([], "0 images: send"),
    ):
        with pytest.raises(Exception, match=words):
            client.predict([handle_file(file) for file in files], api_name="/predict")


def test_a_file_of_the_server_is_not_read(shown, image, tmp_path):
    """gradio_client would upload it first; a request alone only names it."""
    (tmp_path / "plant.jpg").write_bytes(image)
    for more in ({"meta": {"_type": "gradio.FileData"}}, {}):
        data = {"data": [[{"path": str(tmp_path / "plant.jpg"), **more}]]}
        event = httpx.post(f"{shown}gradio_api/call/predict", json=data).json()["event_id"]
        found = httpx.get(f"{shown}gradio_api/call/predict/{event}", timeout=60).text
        assert "event: error" in found and "confidence" not in found
