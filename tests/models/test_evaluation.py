import pytest

from models.evaluation import measure


def test_figures_of_a_hand_made_case():
    found = dict(measure([0, 0, None, 1, 1], [0, 0, 0, 0, 1]))
    assert found == {"n": 5, "top1": 3 / 5, "mean_per_class": pytest.approx((2 / 4 + 1) / 2), "unparsed": 1}


def test_predictions_and_labels_of_unequal_number_are_an_error():
    with pytest.raises(ValueError, match="longer"):
        dict(measure([0], [0, 1]))
