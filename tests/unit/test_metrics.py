"""Metrics on arrays made by hand."""

import numpy as np
import pytest

from evaluation.calibration import calibrate, choose_threshold, fit_temperature
from evaluation.metrics import (
    MAX_CONFUSIONS,
    SplitScores,
    accept,
    adjust_scores,
    calibration_bins,
    confidence,
    confusions,
    expected_calibration_error,
    mcnemar,
    measure_accuracy,
    measure_replies,
    measure_selective,
    measure_split,
    per_class,
)
from models.callbacks import resolvable_gain

LABELS = np.array([0, 0, 0, 1, 2])
SCORES = np.log(np.array([[6, 3, 1], [5, 4, 1], [2, 7, 1], [6, 3, 1], [1, 1, 8]]) / 10)  # right: 0, 1 and 4
CORRECT = np.array([True, True, False, False, True])


def test_compute_metrics_a_hand_made_case():
    found = measure_accuracy(SCORES, LABELS)
    assert (found["n"], found["top1"], found["top5"]) == (5, 0.6, 1.0)
    assert found["mean_per_class"] == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert found["top1_interval"] == pytest.approx([0.2307, 0.8824], abs=1e-4)  # Wilson, 3 of 5
    assert per_class(SCORES, LABELS, "abc") == {
        "a": {"n": 3, "top1": 2 / 3, "recall": 2 / 3, "precision": 2 / 3, "f1": pytest.approx(2 / 3)},
        "b": {"n": 1, "top1": 0, "recall": 0, "precision": 0, "f1": 0},
        "c": {"n": 1, "top1": 1, "recall": 1, "precision": 1, "f1": 1},
    }


def test_macro_means_are_of_the_classes_that_have_images():
    """a: 4 images, 3 predictions, 2 right; b: 1, 2, 1; c: 1 image, never predicted; d: none, predicted once."""
    predictions, labels = np.array([0, 0, 1, 3, 1, 0]), np.array([0, 0, 0, 0, 1, 2])
    found = measure_split(SplitScores([], labels, np.eye(4)[predictions]), None, "abcd")
    assert list(found["per_class"]) == ["a", "b", "c"]
    assert found["macro_precision"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert found["macro_recall"] == found["mean_per_class"] == pytest.approx((2 / 4 + 1 + 0) / 3)
    assert found["macro_f1"] == pytest.approx((4 / 7 + 2 / 3 + 0) / 3)  # not 0.4375, the F1 of the means


def test_top5_counts_what_stands_before_the_truth():
    scores = np.arange(7.0)[None].repeat(7, axis=0)
    assert measure_accuracy(scores, np.arange(7))["top5"] == pytest.approx(5 / 7)


def test_confusions_add_up_both_ways():
    assert confusions(SCORES, LABELS, "abc") == [{"names": ["a", "b"], "confused": 2}]
    assert confusions(SCORES[[0, 4]], LABELS[[0, 4]], "abc") == []  # both right
    every_pair = np.array([[a, b] for a in range(7) for b in range(7) if a < b]).T
    assert len(confusions(np.eye(7)[every_pair[0]], every_pair[1], "abcdefg")) == MAX_CONFUSIONS < every_pair.shape[1]


def test_replies_are_matched_exactly_and_as_substring():
    texts = ["Rose.", "a rose, or mallow", "tulip", ""]
    found = measure_replies(texts, [0, None, None, None], ["rose", "mallow"], [0, 0, 1, 1])
    assert found == {"replies": 4, "exact_match": 0.25, "substring_match": 0.5, "unparsed": 3}
    with pytest.raises(ValueError, match="longer|shorter"):
        measure_replies(["a"], [0], ["rose"], [0, 1])


def test_adjusted_scores():
    scores = np.array([[-4.0, -6.0]])
    assert adjust_scores(scores, lengths=[2, 6]).tolist() == [[-2.0, -1.0]]
    assert adjust_scores(scores, prior=[-1.0, -5.0]).tolist() == [[-3.0, -1.0]]
    assert adjust_scores(scores, [3, 1], [-1.0, -5.0]).tolist() == [[-1.0, -1.0]]


def test_the_temperature_undoes_what_made_scores_too_sure():
    rng = np.random.default_rng(0)
    honest = rng.normal(size=(4000, 10))
    chances = np.exp(honest) / np.exp(honest).sum(axis=1, keepdims=True)
    labels = np.array([rng.choice(10, p=row) for row in chances])
    assert fit_temperature(5 * honest, labels) == pytest.approx(5, rel=0.1)
    correct = honest.argmax(axis=1) == labels
    before, after = (expected_calibration_error(confidence(5 * honest, t), correct) for t in (1, 5))
    assert before > 0.3 and after < 0.03


def test_a_model_that_is_always_right_is_not_sure_without_limit():
    scores = np.log(np.tile([0.9, 0.05, 0.05], (50, 1)))
    assert 0.05 < fit_temperature(scores, np.zeros(50, int)) < 1


@pytest.mark.parametrize("images", [30, 102])
def test_a_calibrated_model_stays_calibrated_on_a_small_val(images):
    """102 names whose log-probabilities lie around -40 nats, labels drawn from the model's own probabilities."""
    rng = np.random.default_rng(1)
    fitted = []
    for _ in range(20):
        scores = rng.normal(-40, 3, (images, 102))
        chances = np.exp(scores - scores.max(axis=1, keepdims=True))
        labels = np.array([rng.choice(102, p=row / row.sum()) for row in chances])
        fitted.append(fit_temperature(scores, labels))
    assert np.median(fitted) == pytest.approx(1, abs=0.15)


def test_calibration_error_of_a_hand_made_case():
    confidences, right = np.array([0.9, 0.9, 0.9, 0.9, 0.3, 1.0]), np.array([1, 1, 1, 0, 0, 1], bool)
    assert expected_calibration_error(confidences, right) == pytest.approx((4 * 0.15 + 0.3 + 0) / 6)
    assert [count for *_, count in calibration_bins(confidences, right)] == [1, 4, 1]


def test_the_threshold_accepts_as_many_as_the_precision_allows():
    confidences, right = np.array([0.9, 0.8, 0.7, 0.7, 0.5]), np.array([1, 1, 0, 1, 1], bool)
    assert choose_threshold(confidences, right, 0.8) == 0.5
    assert choose_threshold(confidences, right, 0.9) == 0.8
    assert choose_threshold(confidences, ~right, 0.9) is None
    assert measure_selective(accept(confidences, 0.7), right) == {"coverage": 0.8, "selective_accuracy": 0.75}
    assert measure_selective(accept(confidences, None), right) == {"coverage": 0.0, "selective_accuracy": None}


def test_a_model_that_is_right_on_all_of_val_rejects_its_least_confident_images():
    scores = np.log(np.stack([np.linspace(0.6, 0.99, 100), 1 - np.linspace(0.6, 0.99, 100)], axis=1))
    val = SplitScores([""] * 100, np.zeros(100, int), scores)
    calibration = calibrate(val, 0.9)
    assert val.correct.all() and calibration.accept(scores).tolist() == [False] * 5 + [True] * 95
    wrong = calibrate(val._replace(labels=np.ones(100, int)), 0.9)
    assert wrong.threshold is None and not wrong.accept(scores).any()


def test_mcnemar_on_images_that_differ():
    found = mcnemar([True] * 6 + [False] * 4, [True] * 2 + [False] * 4 + [True] * 4)
    assert (found["only_first"], found["only_second"], found["p"]) == (4, 4, 1.0)
    assert mcnemar([True] * 10, [False] * 10)["p"] == pytest.approx(2 / 2**10)
    assert mcnemar([True, False], [True, False])["p"] == 1.0


def test_a_gain_is_at_least_one_image():
    assert resolvable_gain(0.5, 100) == pytest.approx(0.05)
    assert resolvable_gain(1.0, 100) == 0.01
