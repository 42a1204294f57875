"""benchmark.py on tiny models."""

import functools
import re

import pytest

from benchmark import main
from tests.conftest import run_printed

run = functools.partial(run_printed, main)


def test_a_table_with_the_stock_trainer_in_the_same_call(tmp_path, monkeypatch, checkpoint, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("benchmark.IMAGES", 4)
    few = ["--steps", "2", "--image", "84x60", "--image-size", "70", "--num-workers", "0"]
    small = ["--per-device-train-batch-size", "2", "--gradient-accumulation-steps", "2"]
    status, output = run(capsys, "--model", checkpoint(), *few, *small, "--against", "stock")
    assert status == 0, output
    assert "images 84x60 | image_size 70 | 55 image tokens" in output and "batch size 4 | 0 workers" in output
    for words in ("matmul ", "loader alone", "waiting for images", "first step after", "TFLOP/image"):
        assert words in output
    rows = dict(re.findall(r"^(this project|scoring 102 names|stock Trainer) +(\d+\.\d\d) \(", output, re.MULTILINE))
    assert len(rows) == 3 and all(float(rate) > 0 for rate in rows.values())
    assert re.search(r"^stock Trainer .* micro-batch 2$", output, re.MULTILINE)
    assert not list(tmp_path.iterdir())


def test_many_names_are_searched_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("benchmark.IMAGES", 4)
    monkeypatch.setattr("models.search.MAX_SCORED", 100)
    few = ["--steps", "2", "--image", "84x60", "--num-workers", "0", "--names", "120"]
    few += ["--gradient-accumulation-steps", "1", "--per-device-eval-batch-size", "2"]
    status, output = run(capsys, "--preset", "tiny", *few)
    assert status == 0, output
    assert re.search(
        r"^top 5 of 120 names +\d.* batch 2, \d+\.\d forwards of each; median of an image: \d+ ", output, re.MULTILINE
    )


BAD_INPUT = [
    (["--image", "big"], "image=big: width x height of 1 to 9999 pixels is needed, such as 500x667"),
    (["--image", "0x9"], "image=0x9: width x height of 1 to 9999 pixels is needed"),
    (["--dataset", "mine"], "--dataset mine: has no effect, images are generated; use --image WIDTHxHEIGHT"),
    (["--max-steps", "5"], "--max-steps 5: has no effect, a benchmark runs --steps optimizer steps"),
    (["--compile"], "error: --compile: a value is needed"),
    (["--steps", "1"], "steps=1: must be at least 2"),
    (["--names", "1"], "names=1: must be at least 2"),
    (["--against", "trl"], "against=trl: not one of none, stock"),
    (["--bench"], "--bench: unknown flag"),
    (["runs/default"], "runs/default: unexpected argument"),
    (["--model", "./gone"], "--model ./gone: no such folder"),
    (["--model", "full"], "--model full: needs a CUDA GPU and torch sees none"),
    (["--preset", "tiny", "--load-in-4bit", "true"], "its weights are not loaded; use --preset tiny"),
]


@pytest.mark.parametrize("argv, words", BAD_INPUT, ids=[words[:40] for _, words in BAD_INPUT])
def test_bad_input(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, output = run(capsys, *argv)
    assert status != 0 and words in output and "Traceback" not in output and not list(tmp_path.iterdir())
