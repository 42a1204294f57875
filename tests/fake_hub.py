"""A hub in this process: the real code of huggingface_hub and `datasets` talks to it, over no network."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, unquote

import httpx
from huggingface_hub import set_client_factory
from huggingface_hub.utils._http import default_client_factory


class FakeHub:
    """Serves a folder as `repository`; `fail(request)` may answer in its place."""

    def __init__(self, folder: Path, repository: str = "owner/model", kind: str = "models"):
        self.folder, self.requests = folder, []
        self.commit = "c" * 40
        self.api = f"/api/{kind}/{repository}"
        self.page = f"/{repository}" if kind == "models" else f"/{kind}/{repository}"
        self.fail: Callable[[httpx.Request], httpx.Response | None] = lambda request: None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        path = unquote(request.url.path)
        self.requests.append(path)
        if (answer := self.fail(request)) is not None:
            return answer
        files = self.files()
        if path.startswith(f"{self.api}/tree/"):
            below = self.folder / path.removeprefix(f"{self.api}/tree/").partition("/")[2]
            found = below.rglob("*") if request.url.params.get("recursive") in ("true", "True") else below.glob("*")
            names = [found_path.relative_to(self.folder).as_posix() for found_path in sorted(found)]
            return httpx.Response(200, json=list(map(self.entry, names)))
        if path.startswith(f"{self.api}/paths-info/"):
            asked = request.content.decode()
            paths = json.loads(asked)["paths"] if asked.startswith("{") else parse_qs(asked).get("paths", [])
            return httpx.Response(200, json=[self.entry(name) for name in paths if (self.folder / name).exists()])
        if path.startswith(self.api):
            siblings = [{"rfilename": name} for name in files]
            return httpx.Response(
                200, json={"id": self.api.partition("s/")[2], "sha": self.commit, "siblings": siblings}
            )
        name = path.removeprefix(f"{self.page}/resolve/").partition("/")[2] if path.startswith(self.page) else ""
        if name not in files:
            return self.refuse(404, "EntryNotFound" if path.startswith(self.page) else "RepoNotFound")
        data = files[name]
        first, _, last = request.headers.get("Range", "").removeprefix("bytes=").partition("-")
        data = data[int(first or 0) : int(last or len(data)) + 1]
        head = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": self.commit, "Content-Length": str(len(data))}
        return httpx.Response(206 if last else 200, headers=head, content=b"" if request.method == "HEAD" else data)

    def files(self) -> dict[str, bytes]:
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in paths}

    def entry(self, name: str) -> dict:
        if (self.folder / name).is_dir():
            return {"type": "directory", "path": name, "oid": _oid(b"")}
        data = (self.folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(data), "oid": _oid(data)}

    def refuse(self, status: int, code: str = "") -> httpx.Response:
        return httpx.Response(status, headers={"X-Error-Code": code, "X-Error-Message": code}, json={"error": code})

    @contextlib.contextmanager
    def serving(self) -> Iterator["FakeHub"]:
        set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(self), follow_redirects=True))
        try:
            yield self
        finally:
            set_client_factory(default_client_factory)  # which refuses while offline; another would wait for a network


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
