"""Scores of splits: their cache, their reports, and generation."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from scipy.special import softmax

import evaluation.evaluator
from config.cli import EvaluationOptions
from config.training_config import TrainingConfig
from data.dataset import ROW
from data.sources import load_ood_images
from evaluation.calibration import Calibration, calibrate
from evaluation.conformal import find_sets
from evaluation.evaluator import Evaluator
from evaluation.metrics import SplitScores, confidence
from evaluation.report import result_lines
from evaluation.results import read_calibration, read_correct
from models.builder import PlantModel
from runtime.atomic import replace_dir
from runtime.checkpoint import write_manifest
from runtime.legacy import RENAMED, renamed
from runtime.run_dir import Run
from runtime.run_files import ANY, read_entries
from tests.conftest import draw_nothing
from tests.unit.test_trainer import FEW, make_trainer
from utils.logging_utils import UserError, setup_logging

OLD_KEYS = {new: old for old, new in RENAMED.items()}


def rows(tiny, count):
    return Dataset.from_list(tiny.rows(count), features=ROW)


def make(tiny, folder, **options):
    plant = PlantModel(tiny.model(), tiny.processor, tiny.prompt, tiny.collator, "no", torch.device("cpu"))
    return Evaluator(
        plant, folder, {"model": "m", "adapter": None, "question": "q"}, options=EvaluationOptions(**options)
    )


def score_with_cache(rows, compute, path, header, max_bad_fraction=1.0):
    evaluator = Evaluator(None, path.parent, {}, max_bad_fraction=max_bad_fraction)
    return evaluator.score_with_cache(rows, compute, path.name, header, {str: ANY})


def under_old_keys(text):
    old = json.loads(text, object_hook=lambda entry: {OLD_KEYS.get(key, key): value for key, value in entry.items()})
    return json.dumps(old)


@pytest.fixture
def plain_reports(monkeypatch):
    """Without pictures and images of the program's own, which take seconds."""
    draw_nothing(monkeypatch)
    monkeypatch.setattr("evaluation.evaluator.draw_ood_images", dict)


def test_a_report_holds_what_is_promised(tiny, tmp_path, monkeypatch, capsys):
    setup_logging()
    monkeypatch.setattr(evaluation.evaluator, "known_duplicates", lambda ids: ["a = b"])
    samples = tiny.rows(12)
    samples[2] = samples[2] | {"image": {"bytes": b"", "path": "gone.jpg"}}
    some = Dataset.from_list(samples, features=ROW)
    evaluator = make(tiny, tmp_path)
    evaluator.generate_report(some, "val", 5)
    report = evaluator.report(some, "val", ood_rows=[*tiny.rows(3), samples[2]])
    assert report == json.loads((tmp_path / "eval_val.json").read_text())
    assert {
        "split", "n", "top1", "top1_interval", "top5", "mean_per_class", "exact_match", "substring_match", "coverage",
        "ece", "ece_uncalibrated", "images_per_s", "model", "adapter", "per_class", "confusions", "duplicates",
    } <= set(report)  # fmt: skip
    assert (report["n"], report["unreadable_images"], report["replies"]) == (11, 1, 11)
    assert report["ood"]["your images"]["n"] == 3 and 0 <= report["ood"]["your images"]["abstention_rate"] <= 1
    assert {kind: found["n"] for kind, found in report["ood"].items() if kind != "your images"} == {
        "noise": 40, "plain": 40, "stripes": 40,
    }  # fmt: skip
    assert sum(found["n"] for found in report["per_class"].values()) == 11
    log = capsys.readouterr().out
    assert "unreadable image skipped: test-00002: gone.jpg: is empty" in log and "result | val | top-1" in log
    text = (tmp_path / "eval_val.md").read_text()
    assert f"top-1 {report['top1']:.3f}" in text and "| your images | 3 |" in text and "a = b" in text
    for name in ("eval_val.png", "eval_val_images.png"):
        assert Image.open(tmp_path / name).width > 900
    saved = json.loads((tmp_path / "calibration.json").read_text())
    assert saved["temperature"] == report["calibration"]["temperature"] and saved["scored"] == evaluator.facts


@pytest.mark.parametrize("right, color", [(True, "green"), (False, "red")])
def test_the_picture_is_green_where_the_model_is_right(tiny, tmp_path, right, color):
    scores = make(tiny, tmp_path).score(rows(tiny, 4), "val")[0].scores
    answers = scores.argmax(axis=1)
    labels = answers if right else scores.argmin(axis=1)
    other = tmp_path / "other"
    other.mkdir()
    relabeled = [row | {"label": int(label)} for row, label in zip(tiny.rows(4), labels)]
    make(tiny, other).report(Dataset.from_list(relabeled, features=ROW), "test")
    title = np.asarray(Image.open(other / "eval_test_images.png").convert("RGB"))[:15].reshape(-1, 3).astype(int)
    redder = title[:, 0] - title[:, 1]
    assert (redder.max() > 50, redder.min() < -50) == (color == "red", color == "green")


def test_without_calibration_it_says_why(tiny, tmp_path, plain_reports):
    report = make(tiny, tmp_path).report(rows(tiny, 4), "test")
    assert (report["coverage"], report["ood"]) == (None, {}) and report[
        "not_calibrated"
    ] == "the run was trained on val"
    assert "Not calibrated: the run was trained on val." in (tmp_path / "eval_test.md").read_text()


def test_without_rows_there_is_nothing_to_report(tiny, tmp_path):
    assert make(tiny, tmp_path).report(None, "val") == {} and not list(tmp_path.iterdir())


def test_test_images_are_calibrated_on_val(tiny, tmp_path, plain_reports):
    report = make(tiny, tmp_path).report(rows(tiny, 4), "test", validation=rows(tiny, 7))
    assert (report["n"], report["calibration"]["images"]) == (4, 7)


def test_prediction_sets_are_fitted_on_val_and_measured_on_test(tiny, tmp_path, plain_reports):
    evaluator = make(tiny, tmp_path, coverage=0.75)
    on_val = evaluator.report(rows(tiny, 9), "val")
    blank = dict.fromkeys(("coverage", "coverage_interval", "mean_size", "mean_size_interval"))
    assert on_val["conformal"] == {"method": on_val["calibration"]["conformal"]["method"], "target": 0.75, **blank}
    assert "fitted on these same images" in (tmp_path / "eval_val.md").read_text()
    report = evaluator.report(rows(tiny, 5), "test", validation=rows(tiny, 9))
    calibration = read_calibration(tmp_path, None)
    assert calibration.conformal == report["calibration"]["conformal"] == on_val["calibration"]["conformal"]
    probabilities = softmax(evaluator.score(rows(tiny, 5), "test")[0].scores / calibration.temperature, axis=1)
    sets, labels = find_sets(probabilities, calibration.conformal), np.array(rows(tiny, 5)["label"])
    found = report["conformal"]
    assert found["mean_size"] == sets.sum(axis=1).mean() and found["coverage"] == sets[range(5), labels].mean()
    assert found["coverage_interval"][0] < found["coverage"] + 1e-9 and found["target"] == 0.75
    text = (tmp_path / "eval_test.md").read_text()
    assert (
        f"| set_coverage | {found['coverage']:.4f} |" in text and f"| set_mean_size | {found['mean_size']:.4f}" in text
    )
    assert f"| {found['mean_size']:.2f} names on average" in "".join(result_lines(report))


def test_too_few_images_for_prediction_sets_are_reported(tiny, tmp_path, plain_reports):
    report = make(tiny, tmp_path).report(rows(tiny, 4), "test", validation=rows(tiny, 7))
    assert report["conformal"]["method"] is None and report["conformal"]["target"] == 0.9
    reason = "o prediction sets: 7 images of val are too few for a coverage of 0.9, which needs 9"
    assert f"N{reason}." in (tmp_path / "eval_test.md").read_text() and f"n{reason}" in list(result_lines(report))
    path = tmp_path / "calibration.json"
    older = json.loads(path.read_text())
    del older["conformal"]
    path.write_text(json.dumps(older))
    assert read_calibration(tmp_path, None).conformal is None
    for bad in ({"method": "raps", "target": 0.9, "quantile": 0.5}, {"method": "lac", "target": 0.9, "quantile": 1.5}):
        path.write_text(json.dumps(older | {"conformal": bad}))
        with pytest.raises(UserError, match="calibration.json: cannot be used .conformal.*make it again"):
            read_calibration(tmp_path, None)


def test_an_interrupted_evaluation_resumes(tiny, tmp_path, monkeypatch):
    path = tmp_path / "eval_val.scores.jsonl"
    whole = make(tiny, tmp_path).score(rows(tiny, 10), "val")[0]
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:6]) + "\n" + lines[6][:40])  # five images and a torn line
    scored = []
    evaluator = make(tiny, tmp_path)
    compute = evaluator.compute_scores
    monkeypatch.setattr(evaluator, "compute_scores", lambda left: (scored.append(len(left)), compute(left))[1])
    again = evaluator.score(rows(tiny, 10), "val")[0]
    assert scored == [5] and again.ids == whole.ids
    np.testing.assert_allclose(again.scores, whole.scores, atol=2e-4)
    assert len(read_entries(path, {str: ANY})[1]) == 10


def test_scores_of_runs_without_features_are_computed_again(tiny, tmp_path):
    path = tmp_path / "eval_val.scores.jsonl"
    scores = make(tiny, tmp_path).score(rows(tiny, 3), "val")[0]
    header, *entries = map(json.loads, path.read_text().splitlines())
    older = [{key: value for key, value in entry.items() if key not in ("tower", "state")} for entry in entries]
    path.write_text("".join(json.dumps(line) + "\n" for line in [header, *older]))
    again, speed = make(tiny, tmp_path).score(rows(tiny, 3), "val")
    assert speed is not None and again.features["tower"].shape == (3, 192)
    np.testing.assert_allclose(again.scores, scores.scores, atol=2e-4)


def test_scores_of_another_model_are_not_used(tiny, tmp_path):
    path = tmp_path / "kept.jsonl"

    def compute(left):
        yield from ({"id": image, "value": len(left)} for image in left["id"])

    assert [entry["value"] for entry in score_with_cache(rows(tiny, 3), compute, path, {"model": "a"})[0]] == [3, 3, 3]
    assert [entry["value"] for entry in score_with_cache(rows(tiny, 5), compute, path, {"model": "a"})[0]] == [
        3,
        3,
        3,
        2,
        2,
    ]
    assert [entry["value"] for entry in score_with_cache(rows(tiny, 2), compute, path, {"model": "b"})[0]] == [2, 2]
    with pytest.raises(UserError, match="no image could be opened"):
        score_with_cache(rows(tiny, 2), lambda left: [], path, {"model": "c"})
    with pytest.raises(UserError, match="2 of 2 images cannot be opened, above max_bad_fraction=0.4"):
        score_with_cache(rows(tiny, 2), lambda left: [], path, {"model": "c"}, 0.4)


def test_an_image_that_was_replaced_is_scored_again_and_a_label_is_the_rows(tiny, tmp_path):
    path = tmp_path / "kept.jsonl"

    def compute(left):
        yield from ({"id": image, "label": 9, "value": len(left)} for image in left["id"])

    samples = tiny.rows(3)
    score_with_cache(Dataset.from_list(samples, features=ROW), compute, path, {})
    samples[1] = samples[1] | {"image": samples[2]["image"]}
    samples[2] = samples[2] | {"label": 7}
    entries, _ = score_with_cache(Dataset.from_list(samples, features=ROW), compute, path, {})
    assert [(entry["value"], entry["label"]) for entry in entries] == [(3, 0), (1, 1), (3, 7)]
    kept = {entry["id"]: entry["label"] for entry in read_entries(path, {str: ANY})[1]}
    assert kept == {entry["id"]: entry["label"] for entry in entries}  # what two runs are compared by


def test_an_image_that_was_replaced_after_a_training_saw_it_is_scored_again(image_folder, tiny, tmp_path):
    root = image_folder({"oak": 3})
    val = [row | {"label": 0} for row in load_ood_images(root)]
    trainer = make_trainer(tiny, tmp_path / "run", tiny.rows(4), val, max_steps=1, **FEW)
    trainer.train()
    trainer.load_best()
    Image.new("RGB", (90, 90), "red").save(root / "oak" / "1.png")
    (tmp_path / "anew").mkdir()
    kept, anew = (Evaluator(trainer.plant, tmp_path / folder, {}) for folder in ("run", "anew"))
    kept.keep("val", trainer.examined)
    found, expected = (each.score(trainer.eval_dataset, "val")[0] for each in (kept, anew))
    assert found.ids == expected.ids and np.allclose(found.scores, expected.scores, atol=1e-3)


def test_an_image_on_disk_is_known_by_size_and_time(image_folder, tmp_path):
    rows = load_ood_images(image_folder({"oak": 2}))
    seen = []

    def compute(left):
        seen.append(len(left))
        yield from ({"id": image} for image in left["id"])

    for _ in range(2):
        score_with_cache(rows, compute, tmp_path / "kept.jsonl", {})
    Image.new("RGB", (9, 9)).save(rows[0]["image"]["path"])
    score_with_cache(rows, compute, tmp_path / "kept.jsonl", {})
    assert seen == [2, 1]


def test_an_image_that_is_gone_is_unreadable(image_folder, tiny, tmp_path, capsys):
    setup_logging()
    some = load_ood_images(image_folder({"oak": 3}))
    Path(some[1]["image"]["path"]).unlink()
    report = make(tiny, tmp_path).report(some, "test")
    assert (report["n"], report["unreadable_images"]) == (2, 1)
    assert "cannot be read (No such file" in capsys.readouterr().out


def test_cached_scores_survive_a_kill_while_they_are_written_anew(tiny, tmp_path, monkeypatch):
    path = tmp_path / "eval_val.scores.jsonl"
    make(tiny, tmp_path).score(rows(tiny, 3), "val")
    kept = path.read_text()
    with monkeypatch.context() as fault:
        fault.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            make(tiny, tmp_path).score(rows(tiny, 3), "val")
    assert path.read_text() == kept


def test_what_scores_were_changed_by_is_recorded(tiny, tmp_path, plain_reports):
    evaluator = make(tiny, tmp_path, per_token=True, limit=4)
    report = evaluator.report(rows(tiny, 4), "val")
    assert (report["per_token"], report["prior_calibration"], report["limit"]) == (True, False, 4)
    text = (tmp_path / "eval_val.md").read_text()
    assert "divided by each name's number of tokens" in text and "a random sample of the split" in text
    assert not (tmp_path / "calibration.json").exists()


def test_replies_stay_in_the_report_of_later_scores(tiny, tmp_path, plain_reports, capsys):
    setup_logging()
    metrics = make(tiny, tmp_path).generate_report(rows(tiny, 4), "test", 5)
    assert "result | test | generation: exact match" in capsys.readouterr().out
    report = make(tiny, tmp_path).report(rows(tiny, 4), "test")
    assert report["exact_match"] == metrics["exact_match"] and report["replies"] == 4
    assert make(tiny, tmp_path).report(rows(tiny, 3), "test")["replies"] == 3  # of the images that are reported
    assert make(tiny, tmp_path).report(rows(tiny, 5), "test")["exact_match"] is None
    header, *entries = (tmp_path / "eval_test.replies.jsonl").read_text().splitlines()
    for lines in ([header, *entries[1:]], [header.replace('"q"', '"other"'), *entries]):
        (tmp_path / "eval_test.replies.jsonl").write_text("\n".join(lines))
        assert make(tiny, tmp_path).report(rows(tiny, 4), "test")["exact_match"] is None
    (tmp_path / "eval_test.replies.jsonl").write_text("\n".join([header, *entries]))
    images = [row["image"] for row in rows(tiny, 8)][4:]
    replaced = Dataset.from_list([row | {"image": image} for row, image in zip(rows(tiny, 4), images)], features=ROW)
    assert make(tiny, tmp_path).report(replaced, "test")["exact_match"] is None


def test_unreadable_ood_images(tiny, tmp_path, plain_reports):
    broken = [{"image": {"bytes": b"", "path": "gone.jpg"}, "label": 0, "id": "gone"}]
    with pytest.raises(UserError, match="--ood: none of its images can be opened"):
        make(tiny, tmp_path).report(rows(tiny, 4), "val", ood_rows=broken)


def test_files_of_older_runs_are_read_under_their_new_keys(tiny, tmp_path, plain_reports, monkeypatch):
    report = make(tiny, tmp_path).report(rows(tiny, 4), "val")
    make(tiny, tmp_path).generate_report(rows(tiny, 4), "val", 5)
    path = tmp_path / "calibration.json"
    path.write_text(under_old_keys(path.read_text()))
    for name in ("eval_val.scores.jsonl", "eval_val.replies.jsonl"):
        lines = (tmp_path / name).read_text().splitlines()
        (tmp_path / name).write_text("".join(f"{under_old_keys(line)}\n" for line in lines))
        assert f'"{OLD_KEYS["image"]}"' in (tmp_path / name).read_text()
    evaluator = make(tiny, tmp_path)
    for name in ("compute_scores", "compute_replies"):
        monkeypatch.setattr(evaluator, name, lambda *_, **__: 1 / 0)
    assert read_calibration(tmp_path, None) == Calibration(**report["calibration"])
    assert evaluator.report(rows(tiny, 4), "val")["top1"] == report["top1"]
    assert evaluator.generate_report(rows(tiny, 4), "val", 5)["replies"] == 4


def test_names_of_classes_are_no_keys():
    per_class = {old: {"n": 1, "top1": 0.5} for old in RENAMED}
    assert renamed(per_class) == per_class and renamed({OLD_KEYS["ood"]: {}, "n": 1}) == {"ood": {}, "n": 1}


def test_a_corrupted_cache_is_scored_again(tiny, tmp_path):
    path = tmp_path / "eval_val.scores.jsonl"
    whole = make(tiny, tmp_path).score(rows(tiny, 4), "val")[0]
    lines = path.read_bytes().splitlines()
    for corrupted in (b"", b"\x00\xff" * 9, b"\n".join([lines[0], b"{}", b"[1]", b"7", lines[1][:30], *lines[2:]])):
        path.write_bytes(corrupted)
        assert make(tiny, tmp_path).score(rows(tiny, 4), "val")[0].ids == whole.ids
        assert len(read_entries(path, {str: ANY})[1]) == 4


def test_score_kinds(tiny, tmp_path):
    some = rows(tiny, 3)
    plain = make(tiny, tmp_path).score(some, "val")[0].scores
    lengths = np.array([len(ids) for ids in tiny.collator.name_ids])
    np.testing.assert_allclose(make(tiny, tmp_path, per_token=True).score(some, "val")[0].scores, plain / lengths)
    prior = make(tiny, tmp_path, prior_calibration=True)
    np.testing.assert_allclose(prior.score(some, "val")[0].scores, plain - np.array(prior.prior))
    assert len(set(prior.prior)) > 1


def test_a_threshold_that_nothing_reaches_rejects_every_image(tiny, tmp_path, plain_reports, monkeypatch):
    monkeypatch.setattr(evaluation.evaluator, "calibrate", lambda *_: Calibration(1.0, None, 0.95, 4))
    report = make(tiny, tmp_path).report(rows(tiny, 4), "val", ood_rows=tiny.rows(2))
    assert (report["coverage"], report["selective_accuracy"]) == (0.0, None)
    assert report["ood"]["your images"] == {"n": 2, "abstention_rate": 1.0}


def test_the_least_confident_are_rejected_even_where_all_are_right():
    scores = np.log(np.linspace(0.6, 0.99, 100))[:, None] * np.array([1.0, 0.0])
    scores[:, 1] = np.log(1 - np.exp(scores[:, 0]))
    scored = SplitScores([f"p{index}" for index in range(100)], np.zeros(100, int), scores)
    calibration = calibrate(scored, 0.95)
    accepted = confidence(scores, calibration.temperature) >= calibration.threshold
    assert accepted.tolist() == [False] * 5 + [True] * 95
    assert calibrate(scored._replace(labels=np.ones(100, int)), 0.95).threshold is None


def test_correct_images_of_a_run(tiny, tmp_path):
    run = Run(TrainingConfig(output_dir=str(tmp_path)), {"class_names": tiny.names, "base": True})
    with pytest.raises(UserError, match="no scores yet; make them first: python evaluate.py"):
        read_correct(run, "val")
    scored = make(tiny, tmp_path).score(rows(tiny, 6), "val")[0]
    right = scored.scores.argmax(axis=1) == scored.labels
    facts, correct = read_correct(run, "val")
    assert list(correct.values()) == right.tolist() and facts["model"] == "m"
    path = tmp_path / "eval_val.scores.jsonl"
    path.write_text(path.read_text().replace('"adapter": null', '"adapter": "step 3, manifest abc"'))
    with replace_dir(tmp_path / "best") as draft:
        (draft / "best.json").write_text('{"step": 3}')
        write_manifest(draft)
    for run.recorded["base"] in (True, False):
        with pytest.raises(UserError, match="the scores are of other weights than .*score them again"):
            read_correct(run, "val")


def test_ood_images_that_are_named_as_confidently_as_plants_are_reported(tiny, tmp_path, plain_reports):
    report = make(tiny, tmp_path).report(rows(tiny, 6), "val") | {"coverage": 0.5}
    for rate, is_doubted in ((0.9, False), (0.2, True)):
        report["ood"] = {"noise": {"n": 5, "abstention_rate": rate}}
        assert ("do not rely on it" in list(result_lines(report))[-1]) == is_doubted
