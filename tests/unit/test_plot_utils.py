"""Pictures of a run show what users wrote as it is, and are never why a run fails."""

import warnings

import matplotlib
import numpy as np
import pytest
from PIL import Image

from utils.logging_utils import UserError, setup_logging, skip_failure
from utils.plot_utils import Tile, plot_map, plot_report, plot_tiles

NAMES = ["Ba$$in rose", "rose $^$", r"\frac{1}", "a_b^c", "100 %", "<b>"]


@pytest.mark.parametrize("usetex", [False, True])
def test_names_are_no_mathematics(usetex, tmp_path, capsys):
    setup_logging()
    tiles = [Tile(None, name, "black") for name in NAMES]
    with matplotlib.rc_context({"text.usetex": usetex}), warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_tiles(tiles, tmp_path / "tiles.png")
        plot_report(dict.fromkeys(NAMES, 0.5), [(0.5, 0.5, 3)], tiles[:2], tiles[2:], "val", tmp_path / "report.png")
    assert (tmp_path / "tiles.png").stat().st_size > 1000 and (tmp_path / "report.png").stat().st_size > 1000
    assert capsys.readouterr().out == ""


def test_characters_that_no_font_has_are_reported_in_one_sentence(tmp_path, capsys):
    setup_logging()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_tiles([Tile(None, "\U0001f339\U0001f33b\ue000", "black")], tmp_path / "tiles.png")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: ") and "tiles.png: shows boxes for characters that no installed font has" in line


def test_what_is_only_to_be_looked_at_is_skipped(capsys):
    setup_logging()
    with skip_failure("a.png"):
        raise ZeroDivisionError("of a library")
    line = (
        "warning: a.png: skipped, since it cannot be made (ZeroDivisionError: of a library); everything else continues"
    )
    assert capsys.readouterr().out == f"{line}\n"
    with pytest.raises(OSError, match="full"), skip_failure("a.png"):
        raise OSError(28, "the disk is full")  # the user's to mend, and everything else needs the disk too
    with pytest.raises(KeyboardInterrupt), skip_failure("a.png"):
        raise KeyboardInterrupt
    with skip_failure("a.png"):
        raise UserError("no image can be opened")


@pytest.mark.parametrize("size", [(1, 640), (640, 1), (90, 640)])
def test_the_caption_of_a_map_is_whole_above_a_narrow_image(size, tmp_path):
    path = tmp_path / "map.png"
    plot_map(Image.new("RGB", size), np.ones((7, 7)), "not sure: greater bird's-foot trefoil 99%\nhiding", path)
    with Image.open(path) as picture:
        border = np.asarray(picture.convert("L"))[:60]  # where the caption stands
    assert (border < 128).any() and not (border[:, :2] < 128).any() and not (border[:, -2:] < 128).any()
