"""Hostile images through whole scripts: each is trained on or skipped with its reason, none ends a run."""

import json
import re
import shutil

import pytest
from PIL import Image

import evaluate
import train
from tests.faults.corpus import OPENS, write_corpus

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """(folder with train/, val/ and test/ of two classes, what opening each image of one class must come to)"""
    folder = tmp_path_factory.mktemp("hostile") / "images"
    for number_of_split, split in enumerate(SPLITS):
        expected = write_corpus(folder / split / "hostile")
        for file in (folder / split / "hostile").iterdir():
            if file.is_file() and not file.is_symlink() and file.stat().st_size:
                with file.open("ab") as end:
                    end.write(split.encode())  # copies in another split would not be used
        (folder / split / "kind").mkdir()
        for number in range(8):
            Image.new("RGB", (60, 40 + number), (9 * number, 80, 40 * number_of_split)).save(
                folder / split / "kind" / f"{number}.png"
            )
    return folder, expected


def skipped(output: str) -> list[str]:
    """Names of the images that the log lists as skipped."""
    return re.findall(r"warning: [^:]*: '?(?:\w+/)hostile/(.+?)'?: ", output)


def test_hostile_images_through_training_and_evaluation(images, tmp_path, monkeypatch, capsys):
    folder, expected = images
    del expected["folder.jpg"]  # is not taken for an image
    hostile = folder / "train" / "hostile"
    for name in list(expected):  # pipes, links to nowhere, empty files: counted by the survey
        if not (hostile / name).is_file() or not (hostile / name).stat().st_size:
            del expected[name]
    refused = sorted(name for name, words in expected.items() if words != OPENS)
    monkeypatch.chdir(tmp_path)
    tiny = ["--preset", "tiny", "--dataset", str(folder), "--max-bad-fraction", "1", "--output-dir", "run"]
    assert train.main([*tiny, "--max-steps", "10", "--eval-steps", "5", "--num-workers", "1"]) == 0
    output = capsys.readouterr().out
    for reason in ("devices or pipes", "links to nowhere", "empty image files (0 bytes)", "whose name is not UTF-8"):
        assert reason in output
    for split in ("train", "val"):
        lines = [line for line in output.splitlines() if f" of {split} so far): " in line]
        assert sorted(skipped("\n".join(lines))) == refused
    assert evaluate.main(["run", "--split", "test", "--num-workers", "1"]) == 0
    assert json.loads((tmp_path / "run" / "eval_test.json").read_text())["n"] == 8 + len(expected) - len(refused)
    assert set(skipped(capsys.readouterr().out)) >= set(refused)
    assert not list(folder.rglob("planted"))
    shutil.rmtree(tmp_path / "run")
