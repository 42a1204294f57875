"""benchmark.py on tiny models."""

import functools
import gc
import json
import re
import weakref

import pytest
from bitsandbytes.optim import GlobalOptimManager
from PIL import Image

import models.builder
from benchmark import main
from tests.conftest import run_printed
from tests.unit.test_trainer import limit_memory

run = functools.partial(run_printed, main)


def test_a_table_with_the_stock_trainer_in_the_same_call(tmp_path, monkeypatch, checkpoint, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("benchmarks.generated.IMAGES", 4)
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
    monkeypatch.setattr("benchmarks.generated.IMAGES", 4)
    monkeypatch.setattr("models.search.MAX_SCORED", 100)
    few = ["--steps", "2", "--image", "84x60", "--num-workers", "0", "--names", "120"]
    few += ["--gradient-accumulation-steps", "1", "--per-device-eval-batch-size", "2"]
    status, output = run(capsys, "--preset", "tiny", *few)
    assert status == 0, output
    assert re.search(
        r"^top 5 of 120 names +\d.* batch 2, \d+\.\d forwards of each; median of an image: \d+ ", output, re.MULTILINE
    )


FEW = ["--preset", "tiny", "--steps", "2", "--image", "84x60", "--num-workers", "0"]
FEW += ["--gradient-accumulation-steps", "1", "--per-device-train-batch-size", "2", "--per-device-eval-batch-size", "1"]


@pytest.fixture
def limits(monkeypatch):
    """The limits that were set. On a CPU nothing can be limited: below 2 GiB all forwards run out of memory instead."""
    limits, made, build = [], [], models.builder.build_model

    def build_within_limit(*arguments):
        gc.collect()
        assert not any(part() for part in made)  # the GPU has room for one
        model = build(*arguments)
        embeddings = model.get_input_embeddings()
        made.extend([weakref.ref(model), weakref.ref(embeddings)])
        # As transformers does for an 8-bit optimizer, which needs a GPU.
        GlobalOptimManager.get_instance().register_module_override(embeddings, "weight", {"optim_bits": 32})
        if limits[-1] < 2:
            limit_memory(model, 0)
        return model

    monkeypatch.setattr("benchmarks.generated.IMAGES", 4)
    monkeypatch.setattr("benchmark.limit_memory", lambda limit, dist: limits.append(limit))
    monkeypatch.setattr("models.builder.build_model", build_within_limit)
    return limits


def test_limits_of_memory_are_measured_in_turn_and_one_too_small_is_a_row(limits, tmp_path, capsys):
    points = tmp_path / "points.jsonl"
    status, output = run(capsys, *FEW, "--memory-limits", "1.5,6", "--points", f"{points}")
    assert status == 0 and limits == [1.5, 6] and "scoring" not in output, output
    rows = re.findall(r"^this project +(\S+).* within (\S+) GiB: (.*)", output, re.MULTILINE)
    assert [(rate == "-", limit) for rate, limit, _ in rows] == [(True, "1.5"), (False, "6")]
    assert rows[0][2].startswith("step 1: out of memory with micro-batch 1; use --gradient-checkpointing")
    refused, *measured = [json.loads(line) for line in points.read_text().splitlines()]
    assert (refused["limit_gib"], refused["images_s"], refused["note"]) == (1.5, None, rows[0][2])
    assert [f"{point['images_s']:.2f}" for point in measured] == [rate for rate, _, _ in rows[1:]]
    assert all(point["images"] == "84x60" and point["gib"] > 0 and "torch" in point["machine"] for point in measured)


def test_where_no_limit_is_enough_the_benchmark_fails_with_the_reason(limits, capsys):
    status, output = run(capsys, *FEW, "--memory-limits", "1")
    assert status == 1 and limits == [1] and "error: step 1: out of memory with micro-batch 1" in output


def test_limits_of_memory_need_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.generated.IMAGES", 4)
    status, output = run(capsys, *FEW, "--memory-limits", "5")
    assert status == 1 and "--memory-limits: needs a CUDA GPU and one rank; leave it out" in output


def test_the_picture_shows_points_of_all_programs(tmp_path, capsys):
    lines = [{"system": "this project", "limit_gib": 4.0, "gib": None, "images_s": None, "note": "does not fit"}]
    lines += [{"system": "this project", "gib": 6.0, "images_s": 2.0}, {"system": "$other$", "gib": 70, "images_s": 1}]
    points, pictures = tmp_path / "points.jsonl", [tmp_path / "ours.png", tmp_path / "all.png"]
    for picture, shown in zip(pictures, (lines[:2], lines)):
        points.write_text("".join(json.dumps(line) + "\n" for line in shown))
        assert run(capsys, "--points", f"{points}", "--picture", f"{picture}") == (0, "")
    ours, both = (Image.open(picture).convert("RGB") for picture in pictures)
    assert ours.size == both.size and ours.tobytes() != both.tobytes() and pictures[1].stat().st_size < 150_000


BAD_POINTS = [
    ("", "holds no point that was measured; write lines such as"),
    ('{"system": "a", "gib": null, "images_s": null}\n', "holds no point that was measured"),
    ('{"system": "a", "gib": 1, "images_s": 2}\nnonsense\n', "line 2 is no point (JSONDecodeError"),
    ('{"system": "a", "images_s": 2}\n', "line 1 is no point (KeyError: 'gib'); write {\"system\""),
    ('{"system": "a", "gib": "much", "images_s": 2}\n', "line 1 is no point (ValueError"),
    ('{"system": "a", "gib": -1, "images_s": 2}\n', "line 1 is no point (ValueError: gib and images_s must be above 0"),
    ("[1]\n", "line 1 is no point (TypeError"),
]


@pytest.mark.parametrize("text, words", BAD_POINTS, ids=[words[:40] for _, words in BAD_POINTS])
def test_bad_points(text, words, capsys, tmp_path):
    (tmp_path / "points.jsonl").write_text(text)
    status, output = run(capsys, "--points", f"{tmp_path}/points.jsonl", "--picture", f"{tmp_path}/speed.png")
    assert status == 1 and f"points.jsonl: {words}" in output and "Traceback" not in output
    assert not (tmp_path / "speed.png").exists()


BAD_INPUT = [
    (["--memory-limits", "5,much"], "memory_limits=5,much: GiB are needed, such as 5.3,12"),
    (["--memory-limits", "0"], "memory_limits=0: GiB are needed"),
    (["--picture", "speed.png"], "picture=speed.png: needs --points FILE, which an earlier benchmark wrote"),
    (["--points", "gone.jsonl", "--picture", "speed.png"], "gone.jsonl: cannot be read (FileNotFoundError"),
    ([*FEW, "--points", "/dev/null/points"], "error: /dev/null/points: Not a directory; "),
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
    assert "model ready" not in output
