"""eval_<split>_images.csv and _classes.csv: what they say is what the report says, and no cell is a formula."""

import csv

import numpy as np
import pytest

from evaluation.calibration import calibrate
from evaluation.hierarchy import measure_levels
from evaluation.metrics import SplitScores, measure_split
from evaluation.spreadsheet import write_tables
from tests.unit.test_hierarchy import TAXONOMY, draw, fit

NAMES = ["=HYPERLINK(1)", "+1 rose", "-2+3 daisy", "@SUM(A1)", 'lily "white", tall', "\u00e9pine\nnoire"]


def read(path):
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")  # without it Excel reads another encoding
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def tables(tmp_path):
    """(report, rows of the images, rows of the classes) of 400 images with a taxonomy."""
    val, test = draw(1000, 0), draw(400, 1)
    calibration = fit(val)
    report = {"split": "test"} | measure_split(test, calibration, NAMES) | {"tree": measure_levels(test, calibration)}
    write_tables(report, test._replace(ids=[f"={name}" for name in test.ids]), calibration, NAMES, tmp_path)
    return report, read(tmp_path / "eval_test_images.csv"), read(tmp_path / "eval_test_classes.csv")


def test_no_cell_is_a_formula_and_each_row_is_a_line(tables):
    _, images, classes = tables
    cells = [cell for row in (*images, *classes) for cell in row.values()]
    assert not [cell for cell in cells if cell.lstrip()[:1] in "=+-@\uff1d" and cell] and not any(
        "\n" in cell for cell in cells
    )
    assert [row["class"] for row in classes] == [
        "'=HYPERLINK(1)", "'+1 rose", "'-2+3 daisy", "'@SUM(A1)", 'lily "white", tall', "\u00e9pine noire",
    ]  # fmt: skip
    assert images[0]["image"] == "'=00000"


def test_they_say_what_the_report_says(tables):
    report, images, classes = tables
    assert len(images) == report["n"] == 400 and sum(int(row["images"]) for row in classes) == 400
    assert sum(row["right"] == "yes" for row in images) == round(report["top1"] * 400)
    unsure = [row for row in images if row["sure"] == "no"]
    of_none = [row for row in images if not row["genus"]]  # the likeliest class stands for itself
    assert of_none and {(row["genus confidence"], row["genus sure"]) for row in of_none} == {("", "")}
    assert len(unsure) == report["tree"]["rejected"] == round((1 - report["coverage"]) * 400)
    for row in images:
        assert (row["answer"] == row["likeliest class"]) == (row["sure"] == "yes")
        assert (row["likeliest class"] == row["true class"]) == (row["right"] == "yes")
        assert row["likeliest class"] in row["set"]
        assert bool(row["family"]) == bool(row["family confidence"]) == bool(row["family sure"])
    genera = [row for row in unsure if row["answer"].startswith("not sure; genus ")]
    assert len(genera) == report["tree"]["genus"]["accepted"] > 20
    truth = dict(zip((" ".join(name.split()) for name in NAMES), TAXONOMY["genus"]))
    right = [row for row in genera if row["genus"] == truth[row["true class"].removeprefix("'")]]
    assert len(right) == report["tree"]["genus"]["correct"]
    for row, found in zip(classes, report["per_class"].values()):
        assert float(row["F1"]) == pytest.approx(found["f1"], abs=1e-4)


def test_none_of_these_is_the_answer_where_predict_would_say_so(tmp_path):
    val, strange = draw(100, 3), np.arange(100) % 3 == 0
    calibration = fit(val)
    report = {"split": "val"} | measure_split(val, calibration, NAMES)
    write_tables(report, val, calibration, NAMES, tmp_path, strange)
    answers = [row["answer"] for row in read(tmp_path / "eval_val_images.csv")]
    assert [answer == "none of these" for answer in answers] == strange.tolist()


def test_without_calibration_or_taxonomy(tmp_path):
    split = draw(50, 2)
    plain = calibrate(split, 0.9)
    for calibration in (None, plain, plain._replace(conformal=None, threshold=None)):
        write_tables({"split": "val"} | measure_split(split, calibration, NAMES), split, calibration, NAMES, tmp_path)
        rows = read(tmp_path / "eval_val_images.csv")
        assert len(rows) == 50 and "genus" not in rows[0]
        assert all(row["set"] == "" for row in rows) == (calibration is not plain)
        if calibration is None:
            assert {row["sure"] for row in rows} == {"yes"}
    single = SplitScores(["a"], np.array([0]), np.array([[0.0, -1.0]]))
    write_tables({"split": "val"} | measure_split(single, None, ["x", "y"]), single, None, ["x", "y"], tmp_path)
    assert read(tmp_path / "eval_val_images.csv")[0]["confidence"] == "0.7311"
