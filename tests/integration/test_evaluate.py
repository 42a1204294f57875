"""evaluate.py on runs and base models, whole: from the command line to the files it writes."""

import functools
import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

import evaluate
import export
import train
from config.cli import parse_config
from runtime.run_dir import Run, changed_fields
from runtime.run_files import ANY, read_entries
from tests.conftest import TINY, run_printed

FAST = ["--num-workers", "0"]


run = functools.partial(run_printed, evaluate.main)


def test_a_run_is_scored_as_its_training_said(trained, capsys):
    at_training = json.loads((trained / "eval_val.json").read_text())
    assert at_training["probe"].pop("seconds") > 0
    (trained / "eval_val.scores.jsonl").unlink()
    status, log = run(capsys, "one", *FAST)
    report = json.loads((trained / "eval_val.json").read_text())
    assert status == 0 and "result | val | top-1" in log and "20 images of val" in log
    assert report["probe"].pop("seconds") > 0
    same = set(report) - {"images_per_s"}
    assert {name: report[name] for name in same} == {name: at_training[name] for name in same}
    assert report["adapter"].startswith("step 6, manifest ") and report["commit"] is None


def test_test_split_is_calibrated_on_val_alone(trained, here, image_folder, pictures, capsys):
    before = json.loads((trained / "calibration.json").read_text())
    status, log = run(capsys, "one", "--split", "test", "--protocol", "both", "--limit", "8", *FAST)
    report = json.loads((trained / "eval_test.json").read_text())
    assert status == 0 and report["n"] == 8 and report["replies"] == 8
    assert report["calibration"]["images"] == 8 and before["images"] == 20  # val is limited too
    assert 0 <= report["exact_match"] <= report["substring_match"] <= 1
    assert len(read_entries(trained / "eval_test.replies.jsonl", {str: ANY})[1]) == 8
    assert Image.open(trained / "eval_test.png").width > 900 and "% of 8, plain " in log
    root = image_folder({"cat": 3})
    assert "% of 3" in run(capsys, "one", "--limit", "4", "--ood", str(root), *FAST)[1]


def test_a_base_model_and_a_comparison(trained, here, small_splits, checkpoint, capsys):
    base = ["--preset", "tiny", "--model", checkpoint(), "--output-dir", "base"]
    status, log = run(capsys, *base, *FAST)
    assert status == 0 and f"run | base | {checkpoint()}" in log
    report = json.loads((here / "base" / "eval_val.json").read_text())
    assert report["adapter"] is None and report["question"] == "What type of object is in this photo?"
    assert run(capsys, "base", *FAST)[0] == 0  # the folder of a base model can be given again
    status, log = run(capsys, "base", "one")
    assert status == 0 and "result | val | 20 images | base " in log and "(McNemar's exact test)" in log
    assert not (here / "base" / "best").exists()


def test_a_four_bit_base_is_scored_without_its_adapter(here, checkpoint, image_folder, capsys):
    root = image_folder({"oak": 10, "ash": 10})
    argv = ["--model", checkpoint(), "--dataset", str(root), "--image-size", "70", "--output-dir", "base", *FAST]
    argv += ["--sharding", "fsdp"]  # which here, too, has no effect
    status, log = run(capsys, *argv, "--prior-calibration", "true", "--per-token", "true")
    assert status == 0 and "result | val | top-1" in log
    assert json.loads((here / "base" / "training_config.json").read_text())["config"]["sharding"] == "none"


def test_a_run_that_was_trained_on_val_is_not_calibrated(here, small_splits, run_on_val, capsys):
    shutil.copytree(run_on_val.folder, here / "one")
    status, log = run(capsys, "one", *FAST)
    assert status == 1 and "was trained on val, which measures nothing then; use --split test" in log
    status, log = run(capsys, "one", "--split", "test", *FAST)
    assert status == 0 and "a linear probe on its vision tower" in log
    report = json.loads((here / "one" / "eval_test.json").read_text())
    assert report["not_calibrated"] == "the run was trained on val" and report["coverage"] is None


def test_images_that_changed_since_the_training_are_not_scored(here, image_folder, capsys):
    root = image_folder({"oak": 10, "ash": 10})
    assert train.main([*TINY, "--dataset", str(root), "--output-dir", "mine", "--max-steps", "1"]) == 0
    assert run(capsys, "mine", *FAST)[0] == 0
    moved = shutil.copytree(root, here / "moved")
    status, log = run(capsys, "mine", "--dataset", str(moved), *FAST)  # while its own is there, any other is another
    assert status == 0 and f"{moved}: not the data set of mine" in log
    image_folder({"oak": 12, "ash": 10})
    status, log = run(capsys, "mine", "--split", "test", *FAST)
    assert status == 1 and "its images changed since mine was trained" in log
    other = root.rename(here / "other")
    kept = [here / "mine" / name for name in ("calibration.json", "reference.safetensors")]
    before = [path.read_bytes() for path in kept]
    status, log = run(capsys, "mine", "--dataset", str(other), *FAST)
    assert status == 0 and [path.read_bytes() for path in kept] == before
    assert f"{other}: not the data set of mine, whose calibration and features stay as they are" in log
    assert json.loads((here / "mine" / "eval_val.json").read_text())["dataset"] == str(other)
    status, log = run_printed(export.main, capsys, "mine", "out", "--dataset", str(moved))
    assert status == 1 and f"scores.jsonl: the scores are of {other}, not of {root}; make them again: python" in log
    assert f"--dataset {moved}" in log
    (here / "mine" / "calibration.json").unlink()
    status, log = run(capsys, "mine", "--dataset", str(moved), *FAST)  # the run's own, which lies elsewhere now
    assert status == 0 and kept[0].read_bytes() == before[0] and "top-1" in (here / "mine/best/README.md").read_text()
    assert json.loads((here / "mine" / "eval_val.json").read_text())["dataset"] == str(root)
    assert run_printed(export.main, capsys, "mine", "out", "--dataset", str(moved))[0] == 0


def test_replies_alone_are_reported(trained, capsys):
    status, log = run(capsys, "one", "--protocol", "generation", "--limit", "4", *FAST)
    assert status == 0 and "result | val | generation: exact match" in log


def test_a_base_model_on_other_images_takes_no_folder_of_another(here, small_splits, image_folder, capsys):
    assert run(capsys, "--preset", "tiny", "--limit", "4", *FAST)[0] == 0
    root = image_folder({"oak": 10, "ash": 10})
    status, log = run(capsys, "--preset", "tiny", "--dataset", str(root), *FAST)
    assert status == 2 and "runs/base-tiny: holds dataset: synthetic -> " in log and "use another --output-dir" in log


def ended(status):
    return SimpleNamespace(poll=lambda: status, returncode=status)


def test_a_signal_lets_the_training_of_a_draw_save(trained, here, capsys, monkeypatch):
    """Half a second, here; the signal comes once it has started."""
    script = here / "slow.py"
    script.write_text(
        "import pathlib, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), pathlib.Path('saved').touch(), exit(143)))\n"
        "pathlib.Path('started').touch()\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr("evaluation.holdout.TRAIN", script)

    def interrupt():
        while not (here / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    status, log = run(capsys, "one", "--holdout-classes", "3", *FAST)
    assert status == 143 and "interrupted; re-run the same command" in log and (here / "saved").exists()


def test_a_run_is_trained_again_without_some_classes(trained, here, train_once, capsys, monkeypatch):
    """Each draw by a process with the run's options, whose place a run made before takes; then the means."""
    held, started, evaluated = train_once("--holdout-classes", "3").folder, [], []

    def start(command):
        started.append(parse_config(command[2:]))
        shutil.copytree(held, started[-1].output_dir)
        return ended(0)

    monkeypatch.setattr("evaluation.holdout.DRAWS", 2)
    monkeypatch.setattr(evaluate, "evaluate_run", lambda run, options: evaluated.append(run.folder))  # training did
    monkeypatch.setattr("evaluation.holdout.subprocess.Popen", start)
    status, log = run(capsys, "one", "--holdout-classes", "3", *FAST)
    assert status == 0 and "trained 2 times anew, each time without 3 of its classes" in log
    config = Run.load(trained).config
    for seed, draw in enumerate(started):
        folder = f"one/holdout-3/draw-{seed}"
        assert changed_fields(draw, replace(config, seed=seed, holdout_classes=3)) == [] and draw.output_dir == folder
        assert draw.preset == config.preset == "tiny"
        report = json.loads((here / folder / "eval_val.json").read_text())
        assert str(evaluated[seed]) == folder and report["ood"]["held-out classes"]["n"] in range(
            24, 30
        )  # 88 images of ten classes
        assert {row["source"] for row in report["open_set"]} == {"noise", "plain", "stripes", "held-out classes"}
        assert report["none_of_these"]["missing"].startswith("14 images of 7 classes in val are too few")
    means = json.loads((here / "one" / "open_set_val.json").read_text())
    assert {"confidence", "log_mass", "tower_knn", "state_mahalanobis"} <= {row["score"] for row in means}
    assert [row["auroc"] for row in means] == sorted((row["auroc"] for row in means), reverse=True)
    assert all(row["auroc"] == pytest.approx(sum(row["aurocs"]) / 2) for row in means)
    status, log = run(capsys, "one/holdout-3/draw-0", "--holdout-classes", "2", *FAST)
    assert status == 1 and "was trained without 3 classes already; evaluate it without --holdout-classes" in log
    monkeypatch.setattr("evaluation.holdout.subprocess.Popen", lambda command: ended(1))
    status, log = run(capsys, "one", "--holdout-classes", "4", *FAST)
    assert (
        status == 1 and "one/holdout-4/draw-0: its training did not end well, the lines above say why; mend that" in log
    )
    status, log = run(capsys, "one", "--holdout-classes", "9", *FAST)
    assert status == 1 and "--holdout-classes 9: one has 10 classes, and two or more have to be learned; use 8" in log
    monkeypatch.setattr("evaluation.holdout.subprocess.Popen", None)  # before anything is trained
    status, log = run(capsys, "one", "--holdout-classes", "3", "--protocol", "generation", *FAST)
    assert status == 1 and "--protocol generation: replies have no scores; use scoring or both" in log
    saved = json.loads((here / "one" / "training_config.json").read_text())
    saved["config"] |= {"train_on_val": True, "eval_steps": None}
    (here / "one" / "training_config.json").write_text(json.dumps(saved))
    status, log = run(capsys, "one", "--holdout-classes", "3", "--split", "test", *FAST)
    assert status == 1 and "one: was trained on val, and what tells other plants is fitted there; give" in log


def other_weights(folder):
    with open(folder / "best" / "model.safetensors", "r+b") as file:
        file.seek(5000)
        file.write(b"\0\1\2\3")


def no_weights(folder):
    shutil.rmtree(folder / "best")


def other_tokenizer(folder):
    path = folder / "training_config.json"
    saved = json.loads(path.read_text())
    saved["recorded"]["tokenizer_probe"][0] += 1
    path.write_text(json.dumps(saved))


def no_config(folder):
    (folder / "training_config.json").unlink()


def nothing(folder):
    pass


BAD_INPUT = [
    (nothing, [], "RUN is missing; or evaluate a base model: --model ID_OR_FOLDER. Runs here: runs/one"),
    (nothing, ["two"], "two: not a run, training_config.json is missing"),
    (no_config, ["one"], "one: not a run"),
    (no_weights, ["one"], "one/best: holds no complete weights (manifest.json is missing"),
    (other_tokenizer, ["one"], "--model tiny: is not what one was trained on (tokenizer_probe differ); put that"),
    (other_weights, ["one"], "model.safetensors differs from its manifest"),
    (nothing, ["one", "two", "three"], "one two three: pass one run, or two to compare"),
    (nothing, ["one", "--learning-rate", "1"], "--learning-rate 1: is fixed by the run; options here: --allow"),
    (nothing, ["one", "one", "--limit", "3"], "--limit 3: has no effect when runs are compared; options here: --split"),
    (nothing, ["--preset", "tiny", "--output-dir", "one"], "one: holds a run; use another --output-dir"),
    (nothing, ["one", "--split", "train"], "split=train: not one of val, test"),
    (nothing, ["one", "--limit", "0"], "limit=0: "),
    (nothing, ["one", "--target-selective-accuracy", "1.5"], "target_selective_accuracy=1.5: "),
    (nothing, ["one", "--protocoll", "both"], "--protocoll: unknown flag; did you mean --protocol?"),
    (nothing, ["one", "--dataset", "{images}"], "its 2 classes are not the 10 that one learned (ash, oak)"),
    (nothing, ["one", "--ood", "{empty}"], "--ood {empty}: no images found there"),
    (nothing, ["one", "one", "--split", "test"], "eval_test.scores.jsonl: no scores yet; make them first: python"),
    (nothing, ["--model", "./gone"], "--model ./gone: no such folder"),
]


@pytest.mark.parametrize(("corrupt", "argv", "words"), BAD_INPUT, ids=[words[:40] for _, _, words in BAD_INPUT])
def test_bad_input(corrupt, argv, words, trained, here, image_folder, capsys):
    (here / "empty").mkdir()
    shutil.move(trained, here / "runs" / "one") if not argv else None
    places = {"images": str(image_folder({"oak": 10, "ash": 10})), "empty": str(here / "empty")}
    if argv:
        corrupt(trained)
    status, log = run(capsys, *[word.format(**places) for word in argv])
    assert status != 0 and words.format(**places) in log and "Traceback" not in log


@pytest.mark.slow
def test_the_demo_classifies_images_it_never_saw(here, demo_run, capsys):
    shutil.copytree(demo_run, here / "demo")
    assert run(capsys, "demo", "--split", "test", "--protocol", "both")[0] == 0
    report = json.loads((here / "demo" / "eval_test.json").read_text())
    assert report["n"] == 300 and report["top1"] >= 0.97 and report["top5"] == 1.0
    assert report["top1"] >= report["exact_match"]
    shown = 1 - report["coverage"]
    assert all(found["abstention_rate"] > shown for found in report["ood"].values())


def test_a_taxonomy_and_tables_for_spreadsheets(trained, here, pictures, capsys):
    """Given at evaluation, kept with the calibration, measured on test, beside pairs; a bad file is one sentence."""
    species = json.loads((trained / "training_config.json").read_text())["recorded"]["class_names"]
    table = here / "kinds.csv"
    rows = [f"{name},{name.split()[0].title()},{'' if name[0] == 'a' else 'Floraceae'}" for name in species]
    table.write_text("\n".join(["name;genus;family".replace(";", ","), *rows]))
    status, log = run(capsys, "one", "--split", "test", "--csv", "--taxonomy", str(table), *FAST)
    assert status == 0 and "genus of 10 and family of 7 of 10 classes by kinds.csv" in log
    saved = json.loads((trained / "calibration.json").read_text())
    assert saved["taxonomy"]["genus"] == [name.split()[0].title() for name in species]
    assert set(saved["levels"]) == {"genus", "family"} == set(saved["pairs"]["levels"])
    report = json.loads((trained / "eval_test.json").read_text())
    assert report["hierarchy"]["rejected"] == round(20 * (1 - report["coverage"])) and "taxonomy" not in report
    assert report["together"]["class"]["pairs"] == 10 and report["calibration"]["taxonomy"] is None
    text, readme = ((trained / name).read_text() for name in ("eval_test.md", "best/README.md"))
    assert "| one class | 10 |" in text and "and the genus or family that they get" in text
    assert "Two images of one class, of different plants, fused: top-1" in readme
    answers = (trained / "eval_test_images.csv").read_text().count(",none of these,")
    assert answers == round(20 * report["none_of_these"]["rates"]["known"])
    assert "| a name for " in log and report["none_of_these"]["coverage"] <= report["coverage"]
    for name in ("eval_test_images.csv", "eval_test_classes.csv", "eval_test_confusions.png", "eval_test_mistakes.png"):
        assert (trained / name).stat().st_size > 100
    table.write_text("name,genus\namber starwort,Amber\n")
    status, log = run(capsys, "one", "--taxonomy", str(table), *FAST)
    assert status == 1 and f"error: --taxonomy {table}: has no column family" in log and "Traceback" not in log
