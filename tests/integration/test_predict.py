"""predict.py, from the command line to what it prints."""

import fcntl
import functools
import json
import multiprocessing
import os
import shutil
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
import export
import predict
import train
from data.synthetic import draw_split
from models import builder
from runtime import checkpoint
from runtime.checkpoint import write_manifest
from tests.conftest import TINY, run_main
from tests.faults.corpus import OPENS, write_corpus

FAST = ["--num-workers", "0"]


run = functools.partial(run_main, predict.main)


@pytest.fixture
def images(here):
    """Twelve synthetic images in two folders."""
    for number, row in enumerate(draw_split("test")[:12]):
        folder = here / "images" / ("deep" if number > 8 else "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:02d}.png").write_bytes(row["image"]["bytes"])
    return here / "images"


def test_files_folders_and_patterns_in_their_order(trained, images, capsys):
    status, out, err = run(capsys, "one", "images/08.png", "images/deep", "images/*[0-3].png", "**/09.png", *FAST)
    names = [line.partition(": ")[0] for line in out.splitlines()]
    assert status == 0 and "run | one | 9 images to classify" in err
    deep = [f"images/deep/{number}.png" for number in ("09", "10", "11")]
    assert names == ["images/08.png", *deep, *[f"images/0{number}.png" for number in range(4)], "images/deep/09.png"]


def test_a_pattern_is_what_a_shell_makes_of_it(images):
    (images / ".hidden.png").write_bytes(b"x")
    assert predict.expand("images/*") == sorted(f"images/{name}" for name in os.listdir(images) if name[0] != ".")
    assert predict.group_images(["images/0[89]*", "images/d*"], False) == [
        (image, {image: None})
        for image in ("images/08.png", *(f"images/deep/{name}.png" for name in ("09", "10", "11")))
    ]


def test_links_that_lead_back_do_not_lead_a_pattern_astray(here, images):
    for name in "ab":
        (images / name).symlink_to(".")
    (images / ".hidden").mkdir()
    (images / ".hidden" / "00.png").write_bytes(b"x")
    for pattern in ("**/0[01].png", f"{here}/**/0[01].png"):
        assert [path.removeprefix(f"{here}/") for path in predict.expand(pattern)] == ["images/00.png", "images/01.png"]


@pytest.mark.parametrize("pattern", ["deep/*.png", "**/1*.png"])
def test_a_link_to_nowhere_among_the_matches_of_a_pattern_is_not_passed_over(pattern, images, monkeypatch):
    monkeypatch.chdir(images)
    (images / "deep" / "12.png").symlink_to("gone.png")
    assert "deep/12.png" in predict.expand(pattern)


def test_files_of_a_folder_that_are_no_images_are_counted_also_raw_ones(here, images, caplog):
    (images / "deep/IMG_1.DNG").write_bytes(b"II*\0")
    assert len(predict.find_images("images")) == 12
    assert "images: not used: .dng files: 1 (deep/IMG_1.DNG)" in caplog.text
    for path in images.rglob("*.png"):
        path.unlink()
    ((word, reason),) = predict.find_images("images").items()
    assert word == "images" and reason == "images: holds no images; not used: .dng files: 1 (deep/IMG_1.DNG)"


def test_scores_are_those_of_the_evaluation(trained, images, capsys):
    """Confidence is what the report's scores give at the run's temperature, whatever stands beside the image."""
    import numpy as np
    from scipy.special import softmax

    from data.synthetic import SPECIES
    from runtime.run_files import ANY, read_entries

    entry = read_entries(trained / "eval_val.scores.jsonl", {str: ANY})[1][7]
    calibration = json.loads((trained / "calibration.json").read_text())
    row = next(row for row in draw_split("validation") if row["id"] == entry["id"])
    (images / "00.png").write_bytes(row["image"]["bytes"])
    expected = softmax(np.array(entry["scores"]) / calibration["temperature"])
    for batch in ("1", "5"):
        status, out, _ = run(
            capsys, "one", "images", "--json", "--top", "10", "--per-device-eval-batch-size", batch, *FAST
        )
        found = json.loads(out.splitlines()[0])
        assert status == 0 and found["image"] == "images/00.png"
        for entry in found["likeliest"]:
            assert entry["confidence"] == pytest.approx(expected[list(SPECIES).index(entry["name"])], abs=1e-3)
        is_confident = calibration["threshold"] is not None and found["confidence"] >= calibration["threshold"]
        assert found["name"] == (found["likeliest"][0]["name"] if is_confident else None)


def test_among_many_names_the_likeliest_are_searched_for(trained, images, capsys, monkeypatch):
    """The same names, "not sure" for the same images, confidences that are at most 0.01 too low, and by how much."""
    set_threshold(trained, 0.15)
    scored = run(capsys, "one", "images", "--json", "--top", "10", *FAST)[1].splitlines()
    monkeypatch.setattr("evaluation.predictor.MAX_SCORED", 9)
    monkeypatch.setattr("models.builder.PlantModel.score", None)
    status, out, _ = run(capsys, "one", "images", "--json", "--top", "3", *FAST)
    assert status == 0 and len(out.splitlines()) == len(scored) > 3
    for line, expected in zip(map(json.loads, out.splitlines()), map(json.loads, scored)):
        assert "confidence_at_most" not in expected and (line["image"], line["name"]) == (
            expected["image"],
            expected["name"],
        )
        for found, true in zip(line["likeliest"], expected["likeliest"][:3], strict=True):
            assert found["name"] == true["name"] and -1e-5 <= true["confidence"] - found["confidence"] <= 0.01
        assert line["confidence"] <= expected["confidence"] + 1e-5 <= line["confidence_at_most"] + 2e-5
    out = run(capsys, "one", "images/00.png", "--top", "2", *FAST)[1]
    assert out.count("%") == 2


def set_threshold(folder, threshold, **changed):
    saved = json.loads((folder / "calibration.json").read_text())
    (folder / "calibration.json").write_text(json.dumps(saved | {"threshold": threshold} | changed))


def test_the_set_of_names_where_it_is_not_sure(trained, images, capsys, monkeypatch):
    """Of LAC: each name of at least probability 1 - quantile, and the likeliest."""
    sets = {"method": "lac", "target": 0.9, "quantile": 0.9}
    set_threshold(trained, 1.0, conformal=sets)
    found = [json.loads(line) for line in run(capsys, "one", "images", "--json", "--top", "10", *FAST)[1].splitlines()]
    for line in found:
        others = [entry["name"] for entry in line["likeliest"][1:] if entry["confidence"] >= 0.1]
        assert line["set"] == [line["likeliest"][0]["name"], *others]
    sizes = [len(line["set"]) for line in found]
    out = run(capsys, "one", "images", "--top", "2", *FAST)[1].splitlines()
    assert len(out) == len(sizes) > 3 and max(sizes) > 2
    for text, line in zip(out, found, strict=True):
        _, _, end = text.partition("%); one of: ")
        extra = f" or {len(line['set']) - 2} more" if len(line["set"]) > 2 else ""
        assert end == (", ".join(line["set"][:2]) + extra if len(line["set"]) > 1 else "")
    set_threshold(trained, 0.0)
    status, out, err = run(capsys, "one", "images/00.png", *FAST)
    assert status == 0 and "one of" not in out and "prediction sets" not in err
    for changed, reason in (
        ({}, "above 9 names not all"),
        ({"conformal": sets | {"quantile": None}}, "20 images of val"),
    ):
        monkeypatch.setattr("evaluation.predictor.MAX_SCORED", 9 if not changed else 1000)
        set_threshold(trained, 1.0, **changed)
        _, out, err = run(capsys, "one", "images/00.png", "--json", *FAST)
        assert '"set"' not in out and f"one: no prediction sets: {reason}" in err


def test_a_run_made_before_there_were_sets_predicts_as_before(trained, images, capsys):
    set_threshold(trained, 1.0, conformal=None)
    status, out, err = run(capsys, "one", "images/00.png", *FAST)
    assert status == 0 and "not sure (" in out and "one of" not in out and "prediction sets" not in err
    assert '"set"' not in run(capsys, "one", "images/00.png", "--json", *FAST)[1]


def test_confident_and_not_sure(trained, images, capsys):
    set_threshold(trained, 0.0)
    line = run(capsys, "one", "images/00.png", "--top", "3", *FAST)[1]
    assert line.count("%") == 3 and "not sure" not in line
    set_threshold(trained, 1.0)
    assert run(capsys, "one", "images/00.png", "--top", "1", *FAST)[1].startswith("images/00.png: not sure (")
    set_threshold(trained, None)
    path = trained / "calibration.json"
    err = run(capsys, "one", "images", *FAST)[2]
    assert '"not sure" was calibrated on only 20 images of val; do not rely on it' in err
    path.write_text(path.read_text().replace('"images": 20', '"images": 300'))
    _, out, err = run(capsys, "one", "images/00.png", *FAST)
    assert ": not sure (" in out
    assert 'no confidence reached a selective accuracy of 0.95 on val, so every image is "not sure"' in err


def no_calibration(path):
    path.unlink()


def calibration_of_others(path):
    path.write_text(path.read_text().replace("step 6", "step 5"))


@pytest.mark.parametrize("corrupt", [no_calibration, calibration_of_others])
def test_a_calibration_that_is_not_of_these_weights_is_not_used(corrupt, trained, images, capsys):
    corrupt(trained / "calibration.json")
    status, out, err = run(capsys, "one", "images/00.png", *FAST)
    assert status == 0 and "not sure" not in out and "has no calibration for its weights" in err


def test_an_unreadable_file_is_a_line_and_the_rest_is_classified(trained, images, capsys):
    (images / "03.png").write_bytes(b"broken")
    (images.parent / "empty").mkdir()
    words = ["images", "gone.png", "none/*.jpg", "empty", "a" * 300]
    (images / "notes.mov").write_bytes(b"x")
    (images / "zero.png").write_bytes(b"")
    (images / ".hidden").mkdir()
    (images / ".hidden" / "a.png").write_bytes(b"x")
    status, out, err = run(capsys, "one", *words, "--per-device-eval-batch-size", "5", *FAST)
    lines = out.splitlines()
    assert status == 1 and len(lines) == 16 and "5 of 16 could not be classified" in err
    assert lines[3].startswith("images/03.png: is not an image in any of the formats JPEG, PNG")
    assert lines[12:] == [
        "gone.png: cannot be read (No such file or directory)",
        "none/*.jpg: no file matches this pattern; ** stands for folders below folders",
        "empty: holds no images",
        f"{'a' * 300}: cannot be read (File name too long)",
    ]
    assert "warning: images: not used: .mov files: 1 (notes.mov)" in err
    assert "warning: images: not used: empty image files (0 bytes): 1 (zero.png)" in err
    _, out, _ = run(capsys, "one", "--json", "gone.png", "images/00.png", *FAST)
    assert json.loads(out.splitlines()[0]) == {"image": "gone.png", "error": lines[12]}
    assert set(json.loads(out.splitlines()[1])) == {
        "image",
        "name",
        "confidence",
        "likeliest",
        "level",
        "set",
        "genus",
        "family",
        "none_of_these",
        "strangeness",
    }


def test_a_picture_of_where_it_looked(trained, images, capsys):
    """Beside the line that predict.py prints without it: of a wide image, where it is not sure."""
    Image.new("RGB", (3000, 90), (200, 30, 90)).save(images / "wide.jpg")
    set_threshold(trained, 1.0, open_set=None)
    plain = run(capsys, "one", "images/wide.jpg", "--top", "1", *FAST)[1]
    status, out, err = run(capsys, "one", "images/wide.jpg", "--top", "1", "--explain", "images/map.PNG", *FAST)
    assert status == 0 and out == plain and ": not sure (" in out and "saved | images/map.PNG" in err
    with Image.open(images / "map.PNG") as picture:
        assert picture.format == "PNG" and picture.size == (700, 600)
        assert len(picture.convert("RGB").getcolors(10**6)) > 99
    assert not list(images.glob("*.draft"))
    status, out, err = run(capsys, "one", "gone.png", "--explain", "map.png", *FAST)
    assert status == 1 and "gone.png: cannot be read" in out and "Traceback" not in err
    assert not (images.parent / "map.png").exists()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["images/00.png", "--explain", "map.jpg"], "explain=map.jpg: is no name of a .png file; give a new name"),
        (["images/00.png", "--explain", "images"], "explain=images: is no name of a .png file"),
        (["images/00.png", "--explain", "images/00.png"], "explain=images/00.png: already exists"),
        (["images/00.png", "--explain", "none/a.png"], "explain=none/a.png: none is no folder that can be written to"),
        (["images/00.png", "--explain", "images/00.png/a.png"], "images/00.png is no folder that can be written to"),
        (["images/00.png", "--explain", "/proc/a.png"], "/proc/a.png.draft: No such file or directory; "),
        (["images/00.png", "--explain"], "--explain: a value is needed"),
        (["images", "--explain", "a.png"], "--explain a.png: is of one image, and these are 12; name one"),
        (["images/00.png", "images/01.png", "--together", "--explain", "a.png"], "is of one image, and these are 2"),
    ],
)
def test_a_picture_that_cannot_be_made_is_one_sentence(words, problem, trained, images, capsys):
    before = (images / "00.png").read_bytes()
    status, _, err = run(capsys, "one", *words, *FAST)
    assert status != 0 and problem in err and "Traceback" not in err
    assert (images / "00.png").read_bytes() == before and not (images.parent / "a.png").exists()


def test_wide_images_and_hostile_ones(trained, capsys, here):
    """Each of the corpus is named or refused in its own words, in one line."""
    Image.new("RGB", (10_000, 300), (200, 30, 90)).save(here / "wide.png")
    expected = write_corpus(here / "corpus")
    names = sorted(expected)
    status, out, _ = run(
        capsys, "one", "wide.png", *[f"corpus/{name}" for name in names if name != "folder.jpg"], *FAST
    )
    lines = dict(zip(["wide.png", *[name for name in names if name != "folder.jpg"]], out.splitlines(), strict=True))
    assert status == 1 and "%" in lines.pop("wide.png")
    for name, line in lines.items():
        assert ("%" in line) if expected[name] == OPENS else (expected[name] in line and "%" not in line), line


def test_lines_come_while_it_works_and_head_is_content(trained, images, here):
    """In a process of its own, with a worker, into a pipe that is closed after two lines."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)  # holds fewer than all lines
    process = multiprocessing.get_context("fork").Process(target=predict_into, args=(reader, writer))
    process.start()
    os.close(writer)
    with os.fdopen(reader, "rb", buffering=0) as lines:
        assert [json.loads(lines.readline())["image"] for _ in range(2)] == ["images/00.png", "images/01.png"]
    process.join(120)
    process.kill()
    errors = (here / "errors.txt").read_text()
    assert process.exitcode == 141 and "Traceback" not in errors and "Exception" not in errors, errors


def predict_into(reader: int, writer: int) -> None:
    torch.set_num_threads(1)
    os.close(reader)
    os.dup2(writer, 1)
    os.dup2(os.open("errors.txt", os.O_WRONLY | os.O_CREAT), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    long_lines = ["--json", "--top", "10"]
    sys.exit(predict.main(["one", "images", *long_lines, "--per-device-eval-batch-size", "2", "--num-workers", "1"]))


def test_a_base_model_predicts_too(here, small_splits, images, checkpoint, capsys):
    import evaluate

    argv = ["--preset", "tiny", "--model", checkpoint(), "--output-dir", "base", "--limit", "4", *FAST]
    assert evaluate.main(argv) == 0
    status, out, _ = run(capsys, "base", "images/00.png", *FAST)
    assert status == 0 and "%" in out


def nothing(folder):
    pass


def gone(folder):
    shutil.rmtree(folder)


def incomplete(folder):
    shutil.rmtree(folder / "best")


def still_training(folder):
    incomplete(folder)
    (folder / "metrics.jsonl").unlink()


def coverage_of_one(folder):
    set_threshold(folder, 0.0, conformal={"method": "lac", "target": 1, "quantile": None})


def torn_calibration(folder):
    (folder / "calibration.json").write_text("{")


BAD_INPUT = [
    (nothing, [], "error: RUN is missing; usage: RUN IMAGE .... Runs here: none yet"),
    (nothing, ["one"], "error: one: IMAGE ... is missing after it; usage: RUN IMAGE ..."),
    (nothing, ["images/00.png", "x.png"], "error: images/00.png: not a run, training_config.json is missing"),
    (gone, ["one", "x.png"], "error: one: not a run, training_config.json is missing"),
    (nothing, ["one", "x.png", "--top", "0"], "error: top=0: must be at least 1"),
    (nothing, ["one", "x.png", "--topp", "3"], "error: --topp: unknown flag; did you mean --top?"),
    (nothing, ["one", "--load-in-4bit", "no", "x.png"], "error: load_in_4bit=no: true or false is needed"),
    (nothing, ["one", "x.png", "--question", "What?"], "error: --question What?: is fixed by the run"),
    (nothing, ["one", "x.png", "--load-in-4bit", "true"], "error: trainable=everything with load_in_4bit=true"),
    (incomplete, ["one", "images"], "error: one/best: holds no complete weights (manifest.json is missing"),
    (
        still_training,
        ["one", "images"],
        "error: one/best: is not there yet; the first evaluation of the run writes it; if",
    ),
    (torn_calibration, ["one", "images"], "error: one/calibration.json: cannot be used (Expecting"),
    (coverage_of_one, ["one", "images"], "conformal.target must be a number from 0 to 0.999, not 1); delete it, and"),
]


@pytest.mark.parametrize(("corrupt", "argv", "words"), BAD_INPUT, ids=[words[7:47] for *_, words in BAD_INPUT])
def test_bad_input(corrupt, argv, words, trained, images, capsys):
    corrupt(trained)
    status, out, err = run(capsys, *argv, *FAST)
    assert status != 0 and words in err and out == "" and "Traceback" not in err


def test_an_adapter_whose_keys_match_nothing_is_refused(trained_lora, images, capsys):
    """PEFT would load it without a word."""
    path = trained_lora / "best" / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "r_proj"): weight for name, weight in load_file(path).items()}, path)
    write_manifest(trained_lora / "best")
    status, out, err = run(capsys, "two", "images/00.png", *FAST)
    assert status == 1 and out == "" and "error: two/best: the adapter does not fit the model: " in err


def test_a_base_whose_files_changed_is_refused(trained_lora, images, checkpoint, capsys):
    config = trained_lora / "training_config.json"
    other = shutil.copytree(checkpoint(), trained_lora.parent / "base")
    config.write_text(config.read_text().replace(checkpoint(), str(other)))
    assert run(capsys, "two", "images/00.png", *FAST)[0] == 0
    weights = load_file(other / "model.safetensors")
    save_file({name: 1.01 * weight for name, weight in weights.items()}, other / "model.safetensors", {"format": "pt"})
    status, out, err = run(capsys, "two", "images/00.png", *FAST)
    assert status == 1 and out == "" and "is not what two was trained on (model_files differ); put that check" in err


def test_weights_are_read_once_to_check_them(trained, images, monkeypatch, capsys):
    """Those of a whole model take half a minute."""
    original, read = checkpoint._sha256, []
    monkeypatch.setattr(checkpoint, "_sha256", lambda path: read.append(path.name) or original(path))
    status, _, _ = run_main(predict.main, capsys, "one", "images/00.png", *FAST)
    assert status == 0 and sum(name.endswith(".safetensors") for name in read) == 1


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (predict.main, ["one", "images/00.png"]),
        (evaluate.main, ["one"]),
        (export.main, ["one", "out", "--dtype", "fp32"]),
    ],
)
def test_weights_that_a_running_training_replaces_meanwhile_are_not_taken_for_others(
    main, argv, trained, images, monkeypatch, capsys
):
    """Else scores and calibration of one step would count for another."""
    original = builder.build_processor

    def build(*given):
        (trained / "best" / "note.txt").write_text("a later step")
        write_manifest(trained / "best")
        return original(*given)

    monkeypatch.setattr(builder, "build_processor", build)
    status, out, err = run_main(main, capsys, *argv, *FAST)
    assert status == 1 and "one/best: a training that is running replaced these weights in the meantime" in out + err
    assert "saved |" not in out and "00.png:" not in out and not (images.parent / "out").exists()


def test_a_base_that_moved_on_the_hub_is_taken_at_its_commit(
    here, small_splits, images, checkpoint, monkeypatch, capsys
):
    """A cache as the hub's library keeps it: main moves to other weights, then the old ones go."""
    old, new = "a" * 40, "b" * 40
    cache = here / "cache" / "models--me--plants"
    shutil.copytree(checkpoint(), cache / "snapshots" / old)
    shutil.copytree(checkpoint("vicuna"), cache / "snapshots" / new)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(old)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "cache"))
    for module in ("runtime.distributed", "evaluation.predictor"):  # the model's size is not known
        monkeypatch.setattr(f"{module}.choose_device", lambda *_, **__: torch.device("cpu"))
    argv = [*TINY, "--model", "me/plants", "--trainable", "adapter", "--output-dir", "run"]
    argv += ["--train-on-val", "true", "--max-steps", "1"]
    assert train.main(argv) == 0
    first = run(capsys, "run", "images", *FAST)[1]
    (cache / "refs" / "main").write_text(new)
    assert run(capsys, "run", "images", *FAST)[1] == first
    shutil.rmtree(cache / "snapshots" / old)
    status, out, err = run(capsys, "run", "images", *FAST)
    assert (
        status == 1
        and out == ""
        and "error: --model me/plants: at aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa is not whole in the cache" in err
    )


def test_images_of_one_plant_get_one_answer(trained, images, capsys):
    """The mean of their scores, at the temperature for so many; one that cannot be opened is said, the rest fused."""
    import numpy as np
    from scipy.special import log_softmax, softmax

    pairs = json.loads((trained / "calibration.json").read_text())
    pairs |= {"temperature": 2.0, "pairs": pairs | {"temperature": 1.0, "threshold": 0.0, "images": 40}}
    (trained / "calibration.json").write_text(json.dumps(pairs))
    several = ["images/00.png", "images/03.png", "images/04.png"]
    out = run(capsys, "one", *several, "--json", "--top", "10", *FAST)[1]
    singles = [
        {each["name"]: each["confidence"] for each in json.loads(line)["likeliest"]} for line in out.splitlines()
    ]
    names = sorted(singles[0])
    logs = 2.0 * log_softmax(np.log([[single[name] for name in names] for single in singles]), axis=1)
    for count in (2, 3):
        status, out, err = run(capsys, "one", "--together", *several[:count], "--json", "--top", "10", *FAST)
        found = json.loads(out)
        expected = dict(zip(names, softmax(logs[:count].mean(axis=0) * count / 2.0)))
        assert status == 0 and found["images"] == several[:count] and "averaged" not in err
        assert {each["name"]: each["confidence"] for each in found["likeliest"]} == pytest.approx(expected, abs=2e-3)
        assert found["name"] == found["likeliest"][0]["name"]
    (images / "copy.png").write_bytes((images / "00.png").read_bytes())
    status, again, err = run(capsys, "one", "--together", *several, "images/copy.png", "--json", "--top", "10", *FAST)
    assert status == 0 and json.loads(again)["likeliest"] == found["likeliest"]
    assert "images/copy.png: a copy of images/00.png, which counts once" in err
    (images / "03.png").write_bytes(b"broken")
    (images / "huge.png").touch()
    os.truncate(images / "huge.png", 10**12)  # more than any memory: it is not read to be compared
    several.append("images/huge.png")
    status, out, _ = run(capsys, "one", *several, "images/deep", "gone/*.png", "--together", "--json", *FAST)
    found, deep = map(json.loads, out.splitlines())
    assert status == 1 and len(found["unreadable"]) == 3 and found["images"] == [*several, "gone/*.png"]
    assert found["unreadable"][0].startswith("images/03.png: is not an image")
    assert found["unreadable"][1].startswith("images/huge.png: 1,000,000,000,000 bytes are above the limit")
    assert deep["images"] == [f"images/deep/{number}.png" for number in ("09", "10", "11")]
    line = run(capsys, "one", *several, "--together", *FAST)[1]
    assert line.startswith(f"{', '.join(several)}: ") and line.count("%") >= 5
    assert "; not used: images/03.png: is not an image" in line


def test_plants_without_a_readable_image_and_folders_of_plants(trained, images, here, capsys):
    (here / "gone").mkdir()
    (here / "bad").mkdir()
    for number in (1, 2):
        (here / f"bad/{number}.png").write_bytes(b"broken %d" % number)
    status, out, err = run(capsys, "one", "--together", "gone", "bad", "images", *FAST)
    first, second, third = out.splitlines()
    assert status == 1 and first == "gone: holds no images" and "3 of 15 could not be classified" in err
    assert second.startswith("bad/1.png: is not an image") and "; bad/2.png: is not an image" in second
    assert (
        third.startswith("images: ")
        and err.count("the images of 2 folders count as one plant; if each is a plant") == 1
    )
    (here / "images/00.png").rename(here / "bad/3.png")
    lines = run(capsys, "one", "--together", "ba*", "images/deep", "ba*", "images/deep", *FAST)[1].splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["bad", "images/deep"] and lines[0].count(
        "not used: bad/"
    ) == 2
    (here / "bad/3.png").rename(here / "images/00.png")
    assert "calibrated on only 9 pairs of val" in err or "calibrated on only 10 pairs of val" in err
    set_threshold(trained, 0.5, pairs=None)
    _, _, err = run(capsys, "one", "--together", "images/00.png", "images/01.png", *FAST)
    assert "the scores of several images are averaged" in err


def test_the_genus_is_named_where_the_class_is_not_sure(trained, images, capsys):
    """Of the invented species: "amber starwort" is a starwort. The calibration has all that is needed."""
    saved = json.loads((trained / "calibration.json").read_text())
    assert saved["taxonomy"]["genus"][:3] == ["Starwort", "Moonwort", "Wheelbloom"] and not any(
        saved["taxonomy"]["family"]
    )
    set_threshold(trained, 1.0, levels={"genus": 0.0, "family": 0.0})
    line = json.loads(run(capsys, "one", "images/00.png", "--json", "--top", "10", *FAST)[1])
    sums = {}
    for each in line["likeliest"]:
        genus = each["name"].split()[-1].capitalize()
        sums[genus] = sums.get(genus, 0) + each["confidence"]
    best = max(sums, key=sums.get)
    assert line["genus"] == {"name": best, "confidence": pytest.approx(sums[best], abs=1e-5)}
    assert (line["level"], line["name"], line["family"]) == ("genus", None, None)
    out = run(capsys, "one", "images/00.png", "--top", "2", *FAST)[1]
    assert out.startswith(f"images/00.png: not sure which; genus {best} {sums[best]:.0%} (") and out.count("%") == 3
    set_threshold(trained, 1.0, levels={"genus": None, "family": None})
    assert json.loads(run(capsys, "one", "images/00.png", "--json", *FAST)[1])["level"] is None
    assert run(capsys, "one", "images/00.png", *FAST)[1].startswith("images/00.png: not sure (")
    set_threshold(trained, 0.0, levels={"genus": 0.0, "family": None})
    assert json.loads(run(capsys, "one", "images/00.png", "--json", *FAST)[1])["level"] == "name"
    for taxonomy in ({"genus": ["x"], "family": ["y"]}, {"genus": [""] * 10, "family": ["y"]}):
        set_threshold(trained, 0.0, taxonomy=taxonomy)
        status, _, err = run(capsys, "one", "images/00.png", *FAST)
        assert status == 1 and "its taxonomy is not of the run's classes; make it again: python evaluate.py one" in err


def test_none_of_these_is_kept_apart_from_not_sure(trained, images, capsys):
    """And it lasts as long as the features of the train images that it was fitted with."""
    path = trained / "calibration.json"
    saved = json.loads(path.read_text())

    def answer(threshold, *flags):
        path.write_text(json.dumps(saved | {"open_set": saved["open_set"] | {"threshold": threshold}}))
        status, out, err = run(capsys, "one", "images/00.png", "images/01.png", *flags, *FAST)
        assert status == 0
        return out.splitlines(), err

    nearest, _ = answer(-1e9)
    assert all(": none of these (nearest: " in line for line in nearest)
    found = json.loads(answer(-1e9, "--json")[0][0])
    assert (found["none_of_these"], found["name"], found["level"]) == (True, None, None) and found["strangeness"] > 0
    assert "none of these (nearest: " in answer(-1e9, "--together")[0][0]
    lines, err = answer(1e9)
    assert not any("none of these" in line for line in lines + [err])
    assert json.loads(answer(1e9, "--json")[0][0])["none_of_these"] is False
    scores = saved["open_set"] | {"score": "knn"}
    path.write_text(json.dumps(saved | {"open_set": scores}))
    status, _, err = run(capsys, "one", "images/00.png", *FAST)
    assert status == 1 and "calibration.json: 'knn' is no open-set score; make it again: python evaluate.py one" in err
    needed = saved["open_set"]["score"].split(" + ")
    spare = next(name for name in saved["open_set"]["scale"] if name.endswith("knn") and name not in needed)
    del saved["open_set"]["scale"][spare]  # of a score that it does not use
    assert answer(-1e9)[0] == nearest
    (trained / "reference.safetensors").write_bytes(b"torn")
    lines, err = answer(-1e9)
    assert 'no "none of these": reference.safetensors is missing, corrupted or another one; make it again' in err
    assert not any("none of these" in line for line in lines)
    path.write_text(json.dumps({key: value for key, value in saved.items() if key != "open_set"}))
    _, out, err = run(capsys, "one", "images/00.png", "--json", *FAST)
    assert "none_of_these" not in json.loads(out) and "none of these" not in err  # a run of an earlier version
