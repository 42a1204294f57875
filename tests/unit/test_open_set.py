"""Scores that set images of none of the classes apart, and the probe: on features whose truth is known."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.numpy import save_file

from config.cli import EvaluationOptions
from data.dataset import ROW, PlantData
from data.streaming import Stream
from evaluation.calibration import UNCALIBRATED, Calibration
from evaluation.evaluator import Evaluator
from evaluation.metrics import SplitScores, confidence
from evaluation.open_set import (
    KEPT,
    SCORES,
    Detector,
    Reference,
    build_space,
    by_blocks,
    combine,
    fit_open_set,
    leave_classes_out,
    measure_auroc,
    measure_fpr,
    measure_open_set,
    measure_strangeness,
    tabulate,
)
from evaluation.probe import compare, fit_linear, measure_probe, vote
from evaluation.reference import build_detector, find_reference, find_train_images, read_reference, sample_by_class
from evaluation.report import render
from models.builder import PlantModel
from models.features import Examined, scale_to_unit

CLASSES, WIDTH = 12, 40
CPU = torch.device("cpu")


def make_features(labels, spread=0.35, seed=0, place=0):
    """Clusters around a random center for each label; centers from `place` on are of other classes."""
    centers = np.random.default_rng(7).normal(size=(60, WIDTH))
    noise = np.random.default_rng(seed).normal(size=(len(labels), WIDTH))
    return scale_to_unit(centers[np.asarray(labels) + place] + spread * noise).astype("f4")


def make_split(images=240, seed=1, place=0, tower=0.35, state=3.0, margin=4.0):
    """Names lead by as much for other plants as for known ones; the tower's features differ, the state's do not."""
    labels = np.arange(images) % CLASSES
    scores = np.random.default_rng(seed).normal(size=(images, CLASSES))
    scores[np.arange(images), labels] += margin
    features = {
        "tower": make_features(labels, tower, seed, place),
        "state": make_features(labels, state, seed + 1, place),
    }
    return SplitScores([f"{seed}-{index}" for index in range(images)], labels, scores, features=features)


@pytest.fixture(scope="module")
def reference():
    train = make_split(360, seed=5)
    return Reference(train.features, dict.fromkeys(("tower", "state"), train.labels), {"identity": "x"})


@pytest.fixture(scope="module")
def spaces(reference):
    return reference.spaces


def make_reference(tower, labels, images=240, seconds=1.0):
    facts = {"images": images, "seconds": seconds, "tower_is_trained": False}
    return Reference({"tower": tower}, {"tower": labels}, facts)


def test_auroc_and_fpr_are_those_of_their_definition():
    known, strange = np.array([0.0, 1, 2, 3]), np.array([1.0, 5, 2.5])
    pairs = [(a > b) + 0.5 * (a == b) for a in strange for b in known]
    assert measure_auroc(known, strange) == pytest.approx(np.mean(pairs))
    known = np.arange(100.0)
    assert measure_fpr(known, np.array([94.5, 95.0, 95.5, 200])) == 0.5  # 95 % of known are at or below 95
    assert measure_auroc(known, known) == 0.5 and measure_auroc(known, known + 1000) == 1


def test_principal_directions_keep_what_differs():
    features = make_features(np.arange(300) % CLASSES)
    for some in (features, features[:30]):  # more images than directions, and fewer
        space = build_space(some, np.zeros(len(some), int))
        np.testing.assert_allclose(space.axes.T @ space.axes, np.eye(space.axes.shape[1]), atol=1e-6)
        np.testing.assert_allclose(space.points @ space.axes.T + space.center, some, atol=1e-5)
    wide = build_space(np.random.default_rng(0).normal(size=(300, 200)), np.zeros(300, int))
    assert wide.axes.shape == (200, 128) and np.all(np.diff(wide.points.var(axis=0)) <= 1e-9)


def test_relative_mahalanobis_is_that_of_the_formula(spaces):
    split, space = make_split(5), spaces["tower"]
    found = measure_strangeness(split, {"tower": space}, 1.0)["tower_mahalanobis"]

    def inverse(residuals):
        covariance = residuals.T @ residuals / len(residuals)
        size = len(covariance)
        return np.linalg.inv(0.9 * covariance + 0.1 * np.trace(covariance) / size * np.eye(size))

    means = {label: space.points[space.labels == label].mean(axis=0) for label in range(CLASSES)}
    by_class = inverse(space.points - np.stack([means[label] for label in space.labels]))
    by_all = inverse(space.points - space.points.mean(axis=0))
    for image, value in zip(split.features["tower"], found):
        point = (image - space.center) @ space.axes
        least = min((point - mean) @ by_class @ (point - mean) for mean in means.values())
        assert value == pytest.approx(least - point @ by_all @ point, rel=1e-6)


def test_other_plants_are_set_apart_by_the_features_that_differ(reference, spaces):
    val, test, others = make_split(), make_split(seed=3), make_split(seed=4, place=30)
    fitted = fit_open_set(val, reference, 1.0)
    assert "tower" in fitted["score"] and fitted["missing"] is None
    detector = Detector(UNCALIBRATED._replace(open_set=dict(fitted)), spaces)
    rows = {row["score"]: row for row in tabulate(detector.measure(test), {"others": detector.measure(others)})}
    assert rows["tower_mahalanobis"]["auroc"] > 0.95 and rows["tower_mahalanobis"]["fpr95"] < 0.2
    assert 0.4 < rows["confidence"]["auroc"] < 0.6 and rows["confidence"]["fpr95"] > 0.8
    assert {row["n"] for row in rows.values()} == {240} and rows[fitted["score"]]["auroc"] > 0.9
    known = detector.measure(val)[fitted["score"]]
    assert (known <= fitted["threshold"]).mean() == pytest.approx(KEPT, abs=2 / 240)
    kept = (detector.measure(test)[fitted["score"]] <= fitted["threshold"]).mean()
    assert kept == pytest.approx(KEPT, abs=0.04)


def test_a_name_is_given_to_what_is_sure_and_one_of_these(reference, spaces):
    test, fitted = make_split(seed=3, margin=1.5), dict(fit_open_set(make_split(), reference, 1.0))
    detector = Detector(Calibration(1.0, 0.4, 0.95, 240, open_set=fitted), spaces)
    answer = measure_open_set(detector, test, {"others": make_split(seed=4, place=30)})["none_of_these"]
    accepted, strange = confidence(test.scores, 1.0) >= 0.4, detector.find_strange(test)
    assert answer["rates"]["known"] == strange.mean() and answer["rates"]["others"] > 0.8
    assert answer["coverage"] == (accepted & ~strange).mean() < accepted.mean() < 0.9
    assert answer["selective_accuracy"] == test.correct[accepted & ~strange].mean()
    unsure = Detector(Calibration(1.0, None, 0.95, 240, open_set=fitted), spaces)
    answer = measure_open_set(unsure, test, {})["none_of_these"]
    assert (answer["coverage"], answer["selective_accuracy"]) == (0, None)


def test_what_a_name_that_is_taken_away_flatters_is_not_chosen(reference):
    """Here the features say nothing, and confidence would come first."""
    val = make_split(margin=2.5)
    val = val._replace(features={name: make_features(np.zeros(240, int), 9.0, 8) for name in ("tower", "state")})
    aurocs = leave_classes_out(val, reference)
    assert aurocs.keys() == {"tower_knn", "tower_mahalanobis", "state_knn", "state_mahalanobis"}
    assert fit_open_set(val, reference, 1.0)["score"] in aurocs and max(aurocs.values()) < 0.6
    known, unknown = val.labels < 9, val.labels >= 9
    highest = confidence(val.scores[:, :9], 1.0)
    assert measure_auroc(-highest[known], -highest[unknown]) > 0.7


def test_what_is_taken_away_leaves_no_neighbor_and_no_direction(reference):
    """Else the few directions that are kept would be those by which the classes taken away differ."""
    known = np.arange(6)
    changed, plain = {}, reference.of_classes(known).spaces
    for name, features in reference.features.items():
        is_known = np.isin(reference.labels[name], known)
        changed[name] = np.where(is_known[:, None], features, 100 * features)
        assert set(plain[name].labels) == set(known) and len(plain[name].points) == is_known.sum()
    for name, space in dataclasses.replace(reference, features=changed).of_classes(known).spaces.items():
        for found, expected in zip(space, plain[name], strict=True):
            np.testing.assert_array_equal(found, expected)
    val = make_split()
    taken = np.random.default_rng(0).permutation(CLASSES)
    aurocs = []
    for fold in range(5):
        is_known = ~np.isin(val.labels, taken[fold::5])
        spaces = reference.of_classes(np.setdiff1d(np.arange(CLASSES), taken[fold::5])).spaces
        values = measure_strangeness(val, spaces, 1.0)["tower_mahalanobis"]
        aurocs.append(measure_auroc(values[is_known], values[~is_known]))
    assert leave_classes_out(val, reference)["tower_mahalanobis"] == pytest.approx(np.mean(aurocs))


def test_a_sum_is_of_scores_in_standard_deviations_of_val():
    strangeness = {name: np.zeros(2) for name in SCORES} | {"confidence": np.array([-0.5, -0.9])}
    strangeness["tower_knn"] = np.array([3.0, 5.0])
    scale = {name: [0.0, 0.0] for name in SCORES} | {"confidence": [-0.7, 0.2], "tower_knn": [4.0, 4.0]}
    found = combine(strangeness, scale)
    assert found["confidence + tower_knn"].tolist() == pytest.approx([(1 - 0.25) / 2, (-1 + 0.25) / 2])
    assert found["confidence + state_knn"].tolist() == pytest.approx([1 / 2, -1 / 2])
    assert {name: found[name] for name in strangeness} == strangeness and len(found) == len(SCORES) + 5


def test_the_mass_of_all_names_is_a_score_where_it_is_known(spaces):
    split = make_split(5)
    known = split._replace(features={**split.features, "log_mass": np.arange(5.0)})
    found = measure_strangeness(known, spaces, 1.0)
    assert found.pop("log_mass").tolist() == [0, -1, -2, -3, -4]
    assert found.keys() == measure_strangeness(split, spaces, 1.0).keys()


@pytest.mark.parametrize(("images", "classes"), [(19, 12), (240, 3)])
def test_too_few_images_of_val_are_said(images, classes, reference, spaces):
    val = make_split(240)
    chosen = np.flatnonzero(val.labels < classes)[:images]
    few = val._replace(
        labels=val.labels[chosen],
        scores=val.scores[chosen],
        features={name: each[chosen] for name, each in val.features.items()},
    )
    fitted = fit_open_set(few, reference, 1.0)
    assert fitted["score"] is None and "in val are too few; 20 of 4 are needed" in fitted["missing"]
    detector = Detector(UNCALIBRATED._replace(open_set=dict(fitted)), spaces)
    found = measure_open_set(detector, few, {"others": few})
    assert (
        len(found["open_set"]) == 10 and found["none_of_these"]["missing"] == fitted["missing"]
    )  # a table all the same
    assert "rates" not in found["none_of_these"] and detector.find_strange(few) is None


def test_four_classes_of_many_are_enough(reference):
    val = make_split()
    four = np.flatnonzero(val.labels < 4)
    some = val._replace(labels=val.labels[four], scores=val.scores[four])
    some = some._replace(features={name: each[four] for name, each in val.features.items()})
    aurocs = leave_classes_out(some, reference)
    assert fit_open_set(some, reference, 1.0)["score"] in aurocs and np.isfinite([*aurocs.values()]).all()


def test_several_images_of_a_plant_are_decided_by_their_mean(reference, spaces):
    fitted = dict(fit_open_set(make_split(), reference, 1.0))
    detector = Detector(UNCALIBRATED._replace(open_set=fitted), spaces)

    def measure(place, count):
        split = make_split(count, seed=9, place=place)
        images = [
            Examined(list(split.scores[at]), split.features["tower"][at], split.features["state"][at])
            for at in range(count)
        ]
        return detector.find_excess(images), [detector.find_excess([image]) for image in images]

    together, alone = measure(30, 3)
    assert together == pytest.approx(np.mean(alone)) and together > 0
    assert measure(0, 3)[0] < 0


@pytest.mark.parametrize("features", [np.ones((24, WIDTH), "f4"), make_features(np.arange(24) % CLASSES)[:CLASSES]])
def test_alike_images_and_single_ones_of_a_class_give_numbers(features):
    labels = np.arange(len(features)) % CLASSES
    names = ("tower", "state")
    alike = Reference(dict.fromkeys(names, features), dict.fromkeys(names, labels), {"identity": "x"})
    found = measure_strangeness(make_split(24), alike.spaces, 1.0)
    assert all(np.isfinite(values).all() for values in found.values())
    assert np.isfinite(fit_open_set(make_split(), alike, 1.0)["threshold"])


# ---- features of train images


@pytest.fixture
def evaluator(tiny, tmp_path):
    plant = PlantModel(tiny.model(), tiny.processor, tiny.prompt, tiny.collator, "no", CPU)
    return Evaluator(plant, tmp_path, {"adapter": "step 1"})


def data_of(tiny, rows):
    return PlantData(Dataset.from_list(rows, features=ROW), None, None, tiny.names, "a set")


def test_features_of_train_images_are_computed_once_for_the_same_weights_and_images(tiny, evaluator, monkeypatch):
    rows = tiny.rows(40)
    first = find_reference(evaluator, data_of(tiny, rows))
    assert sorted(np.bincount(first.labels["tower"])) == [4] * 10 and first.facts["images"] == 40
    path, computed = evaluator.folder / "reference.safetensors", []
    distribute = Evaluator.distribute
    monkeypatch.setattr(Evaluator, "distribute", lambda *given: (computed.append(1), distribute(*given))[1])
    again = find_reference(evaluator, data_of(tiny, rows))
    assert not computed and again.facts == first.facts
    np.testing.assert_array_equal(again.features["tower"], first.features["tower"])
    for change in (lambda: path.write_bytes(path.read_bytes()[:-9]), lambda: evaluator.facts.update(adapter="step 2")):
        change()
        computed.clear()
        assert find_reference(evaluator, data_of(tiny, rows)).facts["images"] == 40 and computed
    assert find_reference(evaluator, data_of(tiny, rows[:30])).facts["images"] == 30


def test_the_images_of_a_reference_are_those_of_its_features(tiny, evaluator, monkeypatch):
    """Of seven images a class each second one for the tower, and one that cannot be opened."""
    monkeypatch.setattr("evaluation.reference.MANY", {"tower": 40, "state": 30})
    monkeypatch.setattr("evaluation.reference.FEW", {"tower": 1, "state": 1})
    rows = [row | {"label": at % 2} for at, row in enumerate(tiny.rows(14))]
    rows[4] |= {"image": {"bytes": b"", "path": "gone.jpg"}}
    data = data_of(tiny, rows)
    for _ in range(2):  # computed, and read
        reference = find_reference(evaluator, data)
        train = find_train_images(reference, data)
        assert {*train.rows["id"]} == {rows[at]["id"] for at in (0, 1, 5, 8, 9, 12, 13)}
        assert reference.facts["unreadable"] == [rows[4]["id"]]
        assert train.rows["label"][:] == reference.labels["tower"].tolist()
        for sample, tower in evaluator.distribute(evaluator.plant.embed, train.rows):
            np.testing.assert_allclose(train.features[train.rows["id"][:].index(sample.id)], tower, atol=1e-3)


def test_a_quick_look_leaves_the_features_that_the_calibration_refers_to(tiny, evaluator):
    data, path = data_of(tiny, tiny.rows(20)), evaluator.folder / "reference.safetensors"
    quick = dataclasses.replace(
        evaluator, facts={"adapter": "step 1", "precision": "fp16"}, options=EvaluationOptions(limit=2)
    )
    find_reference(quick, data)
    first = path.read_bytes()
    find_reference(evaluator, data)
    whole = path.read_bytes()
    assert first != whole and find_reference(quick, data).facts["images"] == 20 and path.read_bytes() == whole


def test_a_reference_that_does_not_say_what_was_unreadable_is_made_again(tiny, evaluator):
    data, path = data_of(tiny, tiny.rows(10)), evaluator.folder / "reference.safetensors"
    saved = find_reference(evaluator, data)
    tensors = {f"{space}.{part}": getattr(saved, part)[space] for space in ("tower", "state")
               for part in ("features", "labels")}  # fmt: skip
    older = {name: value for name, value in saved.facts.items() if name != "unreadable"}
    save_file(tensors, path, metadata={"facts": json.dumps(older)})
    assert read_reference(path).facts == older and find_reference(evaluator, data).facts["unreadable"] == []


def test_many_images_are_compared_some_at_a_time(spaces, monkeypatch):
    split, train = make_split(50), make_split(70, seed=5)
    inputs, start = np.insert(train.features["tower"], 0, 1, axis=1), np.zeros((WIDTH + 1, CLASSES))

    def compute():
        votes = vote(train.features["tower"], train.labels, split.features["tower"], CLASSES)
        weights = fit_linear(inputs, train.labels, start, 0.1, CPU)
        return [votes, weights, *measure_strangeness(split, spaces, 1.0).values()]

    sizes = []
    assert by_blocks(lambda rows: sizes.append(len(rows)) or rows, np.arange(50), 2**20).tolist() == list(range(50))
    assert len(sizes) == 4 and max(sizes) <= 13  # of 16 million numbers each
    whole = compute()
    for module in ("open_set", "probe"):
        monkeypatch.setattr(f"evaluation.{module}.BLOCK", 200)
    for expected, other in zip(whole, compute(), strict=True):
        np.testing.assert_allclose(expected, other, atol=2e-3)


@pytest.mark.parametrize(("split", "is_said"), [("val", True), ("test", False)])
def test_what_was_fitted_on_the_same_images_is_said(split, is_said, reference):
    val = make_split(240)
    fitted = fit_open_set(val, reference, 1.0)
    probe = measure_probe(make_reference(val.features["tower"], val.labels), val, val, CPU)
    answer = {**fitted, "rates": {"known": 0.05}, "coverage": 0.9, "selective_accuracy": 0.97}
    report = {"split": split, "probe": probe, "none_of_these": answer} | dict.fromkeys(("top1", "top5"), 0.9)
    text = render("trust_tables.md.j2", report=report | {"mean_per_class": 0.9})
    assert ("What is free in them was chosen on these same images." in text) is is_said
    assert ("keeps 95% of val, these same images" in text) is is_said and "\n\n\n" not in text
    assert f"of {split}. So 90% of {split} get a name, 97.0% of these the right one.\n" in text


def test_what_is_no_set_of_features_is_not_used(tmp_path):
    path, facts = (
        tmp_path / "reference.safetensors",
        {"images": 1, "seconds": 0.1, "tower_is_trained": True, "identity": "x"},
    )
    good = {f"{space}.{part}": value for space in ("tower", "state")
            for part, value in (("features", np.ones((3, 4), "f2")), ("labels", np.arange(3)))}  # fmt: skip
    save_file(good, path, metadata={"facts": json.dumps(facts)})
    assert read_reference(path).facts == facts
    bad = [
        (good | {"tower.labels": np.arange(2)}, facts),
        (good | {"state.features": np.full((3, 4), np.nan, "f2")}, facts),
        (good | {"state.labels": np.ones(3, "f4")}, facts),
        ({name: value for name, value in good.items() if name != "state.labels"}, facts),
        (good, facts | {"images": "many"}),
        (good, {}),
    ]
    for tensors, some in bad:
        save_file(tensors, path, metadata={"facts": json.dumps(some)})
        assert read_reference(path) is None
    path.unlink()
    assert read_reference(path) is None


def test_why_there_are_no_train_images_is_a_sentence_in_the_report(tiny, evaluator):
    broken = data_of(tiny, [row | {"image": {"bytes": b"", "path": "gone.jpg"}} for row in tiny.rows(4)])
    for data, reason in [
        (broken, "no train image can be opened"),
        (
            dataclasses.replace(broken, train=object.__new__(Stream)),
            "the train images are streamed, so none are at hand",
        ),
        (None, "no train images were given"),
    ]:
        assert find_reference(evaluator, data) == reason
        probe = measure_probe(reason, None, make_split(), CPU)
        report = {"probe": probe} | measure_open_set(build_detector(reason, None), make_split(), {})
        assert report["probe"]["linear_top1"] is None and report["none_of_these"]["missing"] == reason
        text = render("trust_tables.md.j2", report=report | {"split": "val"})
        assert (
            f"Would a much cheaper model do? Not measured: {reason}." in text
            and f'No "none of these": {reason}.' in text
        )


def test_without_val_there_is_a_probe_and_no_threshold(tiny, evaluator):
    reference = find_reference(evaluator, data_of(tiny, tiny.rows(20)))
    split = make_split(20)
    split = split._replace(
        scores=split.scores[:, :10], labels=split.labels % 10, features={"tower": np.ones((20, 192))}
    )
    report = measure_open_set(build_detector(reference, None), split, {})
    assert report["none_of_these"] == {"score": None, "missing": "the run was trained on val"}
    assert report["open_set"] == [] and 0 <= measure_probe(reference, None, split, CPU)["linear_top1"] <= 1


@pytest.mark.parametrize(("images", "classes", "found"), [(4000, 10, 100), (1020, 102, 10), (300, 3, 100)])
def test_a_sample_of_train_images_is_even(images, classes, found):
    rows = Dataset.from_dict({"label": [at % classes for at in range(images)], "id": list(map(str, range(images)))})
    assert set(np.bincount(sample_by_class(rows, classes, "tower")["label"])) == {found}
    few = np.bincount(sample_by_class(rows, classes, "state")["label"])
    assert set(few) <= set(range(1, 21)) and sum(few) <= 500


@pytest.mark.parametrize(("classes", "found"), [(40, 10), (100, 6), (2000, 1)])
def test_of_many_classes_no_more_images_are_taken_than_the_limit(classes, found, monkeypatch):
    monkeypatch.setattr("evaluation.reference.LIMIT", 600)
    monkeypatch.setattr("evaluation.reference.MANY", {"tower": 100, "state": 50})
    rows = Dataset.from_dict({"label": [at % classes for at in range(30 * classes)]})
    assert set(np.bincount(sample_by_class(rows, classes, "tower")["label"])) == {found}
    assert len(sample_by_class(rows, classes, "state")) == classes


# ---- the probe


def test_the_probe_learns_what_is_there_and_the_better_is_named():
    labels = np.arange(360) % CLASSES
    good, bad = make_features(labels, 0.6, 1), make_features(labels, 9.0, 2)
    train = make_reference(np.concatenate([bad, good], axis=1), labels, 720, 1.5)

    def split(seed, margin):
        made = make_split(240, seed, margin=margin)
        halves = [make_features(made.labels, 9.0, seed + 5), make_features(made.labels, 0.6, seed + 6)]
        return made._replace(features={"tower": np.concatenate(halves, axis=1)})

    found = measure_probe(train, split(11, 4), split(12, -2), CPU)
    assert found["linear_top1"] > 0.95 and found["knn_top1"] > 0.9 and found["features"] == "mean of patches"
    assert (
        found["advice"].startswith("use the probe, a plain image classifier, and not this model") and found["p"] < 1e-6
    )
    assert (found["train_images"], found["of_train_images"]) == (360, 720) and found["seconds"] >= 1.5
    assert "a linear probe on its vision tower, fitted on 360 of 720 train images, " in found["advice"]
    assert (
        "fitted on"
        not in measure_probe(dataclasses.replace(train, facts=train.facts | {"images": 360}), None, split(12, 9), CPU)[
            "advice"
        ]
    )
    assert found["linear_top5"] >= found["linear_top1"] and found["linear_mean_per_class"] > 0.9
    blind = measure_probe(train, None, split(12, 9), CPU)  # nothing chosen: the half that says nothing
    assert blind["features"] == "pooled" and blind["advice"].startswith("use the model") and blind["linear_top1"] < 0.5


def test_no_clear_difference_is_said():
    model = make_split(60, margin=9)
    assert compare(model, model)["advice"].startswith("no clear difference: the model has 100.0% of 60 images right")


def test_logistic_regression_is_at_its_minimum():
    features = np.insert(make_features(np.arange(60) % 3, 2.0), 0, 1, axis=1).astype("f8")
    labels, strength = np.arange(60) % 3, 0.01
    weights = fit_linear(features, labels, np.zeros((WIDTH + 1, 3)), strength, CPU)
    logits = features @ weights
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    gradient = features.T @ (shares - np.eye(3)[labels]) / 60 + strength * np.vstack([np.zeros(3), weights[1:]])
    assert np.abs(gradient).max() < 1e-3


def test_neighbors_vote_and_other_classes_follow_by_their_nearest():
    train = scale_to_unit(np.array([[1, 0], [1, 0.1], [1, 0.2], [1, -0.1], [0.9, 0.5], [0, 1], [-1, 0.1]]))
    votes = vote(train, np.array([0, 0, 1, 1, 1, 2, 3]), scale_to_unit(np.array([[1.0, 0.05]])), 5)
    assert votes.shape == (1, 5) and np.argsort(-votes[0]).tolist() == [1, 0, 2, 3, 4]
