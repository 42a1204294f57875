import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from data.dataset import ROW
from data.labels import parse_reply
from models.generation import generate_replies, report_replies
from utils.logging_utils import setup_logging


def rows(tiny, count):
    return Dataset.from_list(tiny.rows(count), features=ROW)


def replies(tiny, model, some, batch_size):
    return list(generate_replies(model, tiny.collator, some, batch_size, 0, torch.float32))


def test_replies_do_not_depend_on_the_batch(tiny):
    model = tiny.model()
    some = rows(tiny, 7)
    assert replies(tiny, model, some, 1) == replies(tiny, model, some, 4)
    assert [reply.id for reply in replies(tiny, model, some, 3)] == some["id"]


def test_a_report_counts_what_it_left_out(tiny, tmp_path, capsys):
    setup_logging()
    drawn = tiny.rows(6)
    drawn[2] = drawn[2] | {"image": {"bytes": b"", "path": "gone.jpg"}}
    some = Dataset.from_list(drawn, features=ROW)
    report = report_replies(tiny.model(), tiny.collator, some, "val", parse_reply, tmp_path, 4, 0, torch.float32)
    assert report == json.loads((tmp_path / "eval_val.json").read_text())
    assert {"split", "n", "top1", "mean_per_class"} <= set(report) and (report["n"], report["bad_photos"]) == (5, 1)
    assert Image.open(tmp_path / "eval_val.png").size[0] == 960
    told = capsys.readouterr().out
    assert "photo left out: test-00002: gone.jpg: is empty" in told and "result val: top-1" in told


@pytest.mark.parametrize("parsed, colour", [(0, "green"), (1, "red")])
def test_the_picture_is_green_where_the_reply_names_the_class(tiny, tmp_path, parsed, colour):
    some = Dataset.from_list([row | {"label": 0} for row in tiny.rows(2)], features=ROW)
    report_replies(tiny.model(), tiny.collator, some, "val", lambda *reply: parsed, tmp_path, 2, 0, torch.float32)
    title = np.asarray(Image.open(tmp_path / "eval_val.png").convert("RGB"))[:15].reshape(-1, 3).astype(int)
    redder = title[:, 0] - title[:, 1]
    assert (redder.max() > 50, redder.min() < -50) == (colour == "red", colour == "green")
