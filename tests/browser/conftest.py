"""The web demo as its own process, for the tests of its page and of its endpoint."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

# What gradio prints of a request for a file of the server.
REFUSED = re.compile(r"Traceback((?!Traceback).)*?\n\S*(InvalidPathError|ValidationError): ", re.DOTALL)


@pytest.fixture(scope="session")
def shown(tmp_path_factory):
    """Address of the web demo of a run of six steps, app.py beside it as its own process."""
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
        while not (found := re.search(r"page \| (\S+)", (folder / "log").read_text())):
            assert server.poll() is None and time.monotonic() < until, (folder / "log").read_text()
            time.sleep(0.2)
        yield found[1]
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 143
        text = REFUSED.sub("", (folder / "log").read_text())
        assert "the page is closed" in text and "Traceback" not in text
        assert not list(temporary.glob("llava_plants_*")) and not list(ROOT.glob("*.pyi"))
    finally:
        server.kill()
