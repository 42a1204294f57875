"""Pictures of mistakes: the order of the classes, the bound of their number, and the nearest train images."""

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from data.dataset import ROW
from evaluation import mistakes, report
from evaluation.metrics import SplitScores, confusions, measure_split
from evaluation.mistakes import count_confusions, find_nearest, write_mistakes
from evaluation.reference import TrainImages


def make_split(pairs: dict[tuple[int, int], int], classes: int) -> SplitScores:
    """{(true class, predicted class): images}"""
    labels, predicted = np.repeat(np.array(list(pairs)), list(pairs.values()), axis=0).T
    return SplitScores([f"i{index}" for index in range(len(labels))], labels, np.eye(classes)[predicted])


def test_what_is_confused_stands_beside_each_other():
    pairs = {(label, label): 5 for label in range(6)} | {(0, 4): 3, (4, 0): 2, (1, 5): 4, (2, 3): 1}
    found = count_confusions(make_split(pairs, 6), None, list("abcdef"))
    place = {int(label): index for index, label in enumerate(found.labels)}
    assert sorted(place) == list(range(6)) and found.order == "confusion" and found.elsewhere == 0
    assert all(abs(place[first] - place[second]) == 1 for first, second in ((0, 4), (1, 5), (2, 3)))
    for (truth, predicted), count in pairs.items():
        assert found.counts[place[truth], place[predicted]] == count
    assert found.counts.sum() == sum(pairs.values())


def test_a_taxonomy_orders_by_family_then_genus():
    taxonomy = {"genus": ["B", "A", "B", "", "C"], "family": ["Y", "X", "Y", "", "X"]}
    split = make_split({(label, label): 1 for label in range(5)}, 5)
    found = count_confusions(split, taxonomy, ["z", "y", "x", "w", "v"])
    assert found.labels.tolist() == [1, 4, 2, 0, 3] and found.groups == ["X", "X", "Y", "Y", ""]
    assert found.order == "family (framed) and name"
    found = count_confusions(split, {**taxonomy, "family": [""] * 5}, ["z", "y", "x", "w", "v"])
    assert found.groups == ["A", "B", "B", "C", ""] and found.order.startswith("genus")
    found = count_confusions(split, {**taxonomy, "genus": [""] * 5}, ["z", "y", "x", "w", "v"])
    assert found.groups == ["X", "X", "Y", "Y", ""] and found.labels.tolist() == [4, 1, 2, 0, 3]
    unknown = count_confusions(split, dict.fromkeys(taxonomy, ("",) * 5), ["z", "y", "x", "w", "v"])
    assert unknown.order == "confusion" and not any(unknown.groups)


def test_of_many_classes_the_most_confused_are_shown_and_the_rest_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(mistakes, "MAX_CLASSES", 6)
    pairs = {(label, label): 9 for label in range(40)} | {(30, 31): 7, (5, 6): 5, (31, 32): 4, (10, 20): 1, (11, 21): 1}
    titles = []
    monkeypatch.setattr(mistakes, "plot_confusions", lambda counts, names, groups, title, path: titles.append(title))
    found = count_confusions(make_split(pairs, 40), None, [f"{label}" for label in range(40)])
    assert {5, 6, 10, 30, 31, 32} == {*found.labels.tolist()} and found.elsewhere == 2
    write_mistakes(make_split(pairs, 40), None, None, [f"{label}" for label in range(40)], tmp_path / "x", None)
    assert titles[0].endswith("; the 6 most confused of 40 classes, which 2 mistakes are not among")
    perfect = count_confusions(make_split({(label, label): 1 for label in range(40)}, 40), None, [""] * 40)
    assert len(perfect.labels) == 6 and perfect.elsewhere == 0


def test_nearest_is_by_direction():
    train = np.array([[1.0, 0.0], [0.0, 3.0], [2.0, 2.1], [-1.0, 0.0]], dtype=np.float16)
    assert find_nearest(np.array([[5.0, 0.1], [0.1, 0.12]]), train, 2).tolist() == [[0, 2], [2, 1]]


def color_at(picture: Image.Image, row: int, column: int, rows: int) -> tuple[int, ...]:
    """Of the middle of an image of the sheet."""
    return picture.getpixel((int((column + 0.5) * picture.width / 4), int((row + 0.58) * picture.height / rows)))[:3]


def test_no_caption_says_that_the_model_is_certain(tmp_path, monkeypatch):
    plotted = []
    monkeypatch.setattr(report, "plot_report", lambda *given: plotted.append(given))
    split = SplitScores(["a", "b"], np.array([0, 1]), np.array([[0.0, 30.0], [0.0, 30.0]]))
    facts = {"split": "test", "calibration": None} | measure_split(split, None, ["rose", "daisy"])
    report.draw_metrics(facts, split, lambda index: None, ["rose", "daisy"], tmp_path / "eval.png")
    ((_, _, _, mistakes, _, _),) = plotted
    assert [tile.caption for tile in mistakes] == ["is: rose\ndaisy >99%\nrose <1%"]
    shares = (0.0, 1 / 200, 0.006, 0.994, 199 / 200, 1.0)
    assert [report.percent(share) for share in shares] == ["<1%", "<1%", "1%", "99%", ">99%", ">99%"]


def test_memory_does_not_grow_with_the_square_of_the_classes():
    """A table of 300,000 by 300,000 would take 720 GB."""
    scores = np.zeros((3, 300_000))
    scores[[0, 1, 2], [7, 7, 299_999]] = 1
    split = SplitScores(list("abc"), np.array([7, 5, 5]), scores)
    assert confusions(scores, split.labels, range(300_000)) == [
        {"names": [5, 299_999], "confused": 1},
        {"names": [5, 7], "confused": 1},
    ]
    found = count_confusions(split, None, [])
    assert {*found.labels.tolist()} == {5, 7, 299_999} and found.counts.sum() == 3 and found.elsewhere == 0


def test_the_contact_sheet_has_each_mistake_beside_its_nearest_train_images(tmp_path):
    colors = [(200, 30, 30), (30, 160, 30), (30, 30, 200), (220, 200, 40)]
    row = lambda color, label, name: {  # noqa: E731
        "image": {"bytes": None, "path": str(tmp_path / f"{name}.png")}, "label": label, "id": name,
    }  # fmt: skip
    for number, color in enumerate(colors):
        Image.new("RGB", (64, 64), color).save(tmp_path / f"t{number}.png")
        Image.new("RGB", (64, 64), tuple(255 - value for value in color)).save(tmp_path / f"i{number}.png")
    train = Dataset.from_list(
        [row(color, number % 2, f"t{number}") for number, color in enumerate(colors)], features=ROW
    )
    rows = Dataset.from_list([row(color, 0, f"i{number}") for number, color in enumerate(colors)], features=ROW)
    scores = np.log([[0.4, 0.6], [0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    features = np.array([[3, 2, 1, 0], [0, 0, 0, 1], [0, 1, 3, 2], [0, 0, 0, 1]])  # how near each train image is
    split = SplitScores([f"i{number}" for number in range(4)], np.zeros(4, int), scores, features={"tower": features})
    write_mistakes(
        split, rows, None, ["rose", "$daisy$"], tmp_path / "eval", TrainImages(train, np.eye(4, dtype=np.float16))
    )
    sheet = Image.open(tmp_path / "eval_mistakes.png").convert("RGB")
    for row_number, (image, neighbors) in enumerate([(2, [2, 3, 1]), (0, [0, 1, 2])]):  # the most confident first
        expected = [tuple(255 - value for value in colors[image]), *(colors[neighbor] for neighbor in neighbors)]
        for column, color in enumerate(expected):
            assert color_at(sheet, row_number, column, 2) == pytest.approx(color, abs=8)
    assert Image.open(tmp_path / "eval_confusions.png").width > 400
    write_mistakes(split, rows, None, ["rose", "daisy"], tmp_path / "eval", None)
    assert not (tmp_path / "eval_mistakes.png").exists()  # that of before would be taken for this one
    right = split._replace(labels=np.array([1, 0, 1, 0]))
    write_mistakes(
        right, rows, None, ["rose", "daisy"], tmp_path / "eval", TrainImages(train, np.eye(4, dtype=np.float16))
    )
    assert not (tmp_path / "eval_mistakes.png").exists()
