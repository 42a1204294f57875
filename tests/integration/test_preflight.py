"""test_trainer.py on tiny models: each check passes, and fails with its reason."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import test_trainer
from config.training_config import TrainingConfig
from data.collator import PlantCollator
from models import callbacks
from models.builder import build_processor
from tests.conftest import ROOT


def run(capsys, *argv) -> tuple[int, dict[str, str]]:
    """Exit status, and each check's line by its name."""
    status = test_trainer.main(list(argv))
    output = capsys.readouterr().out
    return status, {
        name: line for line, name in re.findall(r"^((?:ok|FAIL|skip|stop)\s+([^:]+):.*)$", output, re.MULTILINE)
    }


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


TINY = ["--preset", "tiny", "--num-workers", "0"]


def test_every_check_passes_on_the_tiny_preset_and_nothing_is_left(small_splits, capsys, here):
    status, lines = run(capsys, *TINY)
    assert status == 0 and len(lines) == 17 and all(line.startswith("ok") for line in lines.values())
    assert "Number of image tokens: 1 (expanded to 55, as many as feature rows)" in lines["image tokens"]
    assert "25 patches of 14 x 14 + 1 CLS per tile" in lines["pixels"] and "(1, 2, 3, 70, 70)" in lines["pixels"]
    assert "supervised: ' amber starwort</s>'" in lines["sample"] and "as expected of random weights" in lines["steps"]
    assert re.search(r"about \d+\.\d s per epoch of 3 steps", lines["time"]) and "transformers 5" in lines["packages"]
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    "flags",
    [["--early-stopping-patience", "2", "--eval-steps", "100"], ["--sharding", "fsdp", "--trainable", "adapter"]],
    ids=["early stopping", "sharding"],
)
def test_the_trial_is_of_one_rank_and_without_evaluations(flags, small_splits, capsys):
    status, lines = run(capsys, *TINY, *flags)
    assert status == 0 and lines["steps"].startswith("ok")


def test_the_disk_of_the_run_is_looked_at(capsys, monkeypatch, tmp_path):
    (tmp_path / "full").mkdir()
    sizes = {"full": 5e8, tmp_path.name: 9e9}
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=sizes[Path(folder).name]))
    monkeypatch.setattr(test_trainer, "CHECKS", {"disk and memory": ""})
    _, lines = run(capsys, *TINY)
    assert lines["disk and memory"].startswith("ok    disk and memory: 9 GB of disk free for the run")
    _, lines = run(capsys, *TINY, "--output-dir", "full/new/mine")
    problem = "full: its disk has 0.5 GB free, a run needs at least 1.0 GB; free space, or use another --output-dir"
    assert lines["disk and memory"].startswith("FAIL") and lines["disk and memory"].endswith(problem)


def test_a_checkpoint_folder_with_images_at_their_own_size(checkpoint, image_folder, capsys):
    root = image_folder({"oak": 8, "ash": 8})
    for number, image in enumerate(sorted((root / "ash").iterdir())):
        Image.new("RGB", (90, 30), (0, 20 * number, 0)).save(image)
    status, lines = run(capsys, "--model", checkpoint(), "--dataset", str(root), "--image-size", "none")
    assert status == 0 and "18 assertions hold" in lines["model"]
    lowest, highest = re.search(r"lengths: ([\d,]+) to ([\d,]+) tokens", lines["lengths"]).groups()
    assert int(lowest) < int(highest)
    assert "90x30" in lines["lengths"]
    assert "of padding" in lines["padding"] and ", 0 to 0 of padding" not in lines["padding"]


def test_the_first_image_is_unreadable(image_folder, capsys):
    """One or two of a split stop nothing."""
    for split in ("train", "val", "test"):
        root = image_folder({"oak": 4, "ash": 4}, split)
    (root / "train" / "ash" / "0.png").write_bytes(b"\x89PNG\r\n but no more")
    _, lines = run(capsys, *TINY, "--dataset", str(root))
    assert "1 unreadable" in lines["lengths"] and "supervised" in lines["sample"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_tiny_preset_is_offered(capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=30e9))  # the 20 GB of a download fit
    status, lines = run(capsys)
    assert status == 1 and lines["device"].startswith("FAIL") and "--preset tiny" in lines["device"]
    assert lines["disk and memory"].startswith("ok") and lines["processor"].startswith("skip")


def test_without_a_gpu_images_are_checked_all_the_same(image_folder, capsys):
    status, lines = run(capsys, "--dataset", str(image_folder({"oak": 8, "ash": 8})))
    assert status == 1 and lines["data"].startswith("ok") and lines["class names"] == "ok    class names: 2: ash, oak"
    assert lines["processor"] == "skip  processor: needs the device above"


def test_a_missing_package_is_reported_and_the_rest_is_skipped(capsys, monkeypatch):
    real = test_trainer.version

    def lacking(name):
        if name == "bitsandbytes":
            raise test_trainer.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(test_trainer, "version", lacking)
    status, lines = run(capsys, *TINY)
    assert status == 1 and "bitsandbytes not installed; run: pip install -r requirements.txt" in lines["packages"]
    assert lines["device"].startswith("skip")


def test_untested_versions_are_reported(small_splits, capsys, monkeypatch):
    real = test_trainer.version
    monkeypatch.setattr(test_trainer, "version", lambda name: "2.11.0" if name == "torch" else real(name))
    monkeypatch.setattr(test_trainer, "CHECKS", {"packages": ""})
    _, lines = run(capsys, *TINY)
    assert (
        lines["packages"].startswith("ok")
        and "not the tested versions: torch 2.11.0 (==2.13.0 is pinned)" in lines["packages"]
    )


def test_a_long_epoch_is_in_minutes():
    found = test_trainer.PreFlight(TrainingConfig())
    found.data, found.device = SimpleNamespace(num_train=1600), torch.device("cpu")
    found.steps = [{"seconds": 1.8}] * 3
    assert found.check_time() == "8.89 images/s | about 3.0 minutes per epoch of 100 steps"


def test_a_leak_fails(small_splits, capsys, monkeypatch):
    grown = iter(range(0, 10**12, 10**8))
    monkeypatch.setattr(callbacks, "memory_in_use", lambda device: next(grown))
    status, lines = run(capsys, *TINY)
    assert status == 1 and lines["leak"].startswith("FAIL") and "memory grew over 4 steps" in lines["leak"]


def test_memory_that_goes_up_and_down_is_no_leak():
    memory = (1.34, 1.11, 1.22, 1.24, 1.13, 1.19)
    found = test_trainer.PreFlight(TrainingConfig())
    found.steps = [{"memory_gib": each, "peak_gib": 1.4} for each in memory]
    assert found.check_leak() == "1.34 GiB after the first step, 1.19 after the last | peak 1.40"


def test_a_tower_without_cls_is_described_without_it(checkpoint, tiny):
    processor, prompt = build_processor(TrainingConfig(model=checkpoint("granite")), tiny.names)
    found = test_trainer.PreFlight(TrainingConfig())
    found.collator = PlantCollator(processor, prompt, tiny.names, 70)
    found.batch = found.collator(tiny.rows(1))
    assert found.check_pixels().endswith("| 25 patches of 14 x 14 per tile")


def test_an_implausible_first_loss_fails(small_splits, capsys, monkeypatch):
    real = callbacks.append_metrics
    monkeypatch.setattr(callbacks, "append_metrics", lambda folder, entry: real(folder, entry | {"loss": 20.0}))
    status, lines = run(capsys, *TINY)
    assert status == 1 and "starts at 20.00; 0.5 to 2.0 is expected of a pretrained checkpoint" in lines["steps"]


def broken_images(root):
    for image in list((root / "oak").iterdir())[:6]:
        image.write_bytes(image.name.encode())


def all_broken(root):
    for image in root.rglob("*.*"):
        image.write_bytes(f"{image}".encode())


def no_folder(root):
    root.rename(root.with_name("elsewhere"))


BAD_INPUT = [
    (broken_images, [], "lengths", "images cannot be opened, above"),
    (all_broken, ["--max-bad-fraction", "1"], "lengths", "images can be opened: "),
    (no_folder, [], "data", "no such folder"),
    (None, ["--model", "nowhere/at-all"], "device", "needs a CUDA GPU"),
    (None, ["--mixed-precision", "fp16"], "device", "fp16: needs a CUDA GPU"),
]


@pytest.mark.parametrize(("corrupt", "argv", "check", "words"), BAD_INPUT)
def test_bad_input(corrupt, argv, check, words, image_folder, capsys):
    root = image_folder({"oak": 10, "ash": 10})
    if corrupt:
        corrupt(root)
    status, lines = run(capsys, *TINY, "--dataset", str(root), *argv)
    assert status == 1 and lines[check].startswith("FAIL") and words in lines[check]


def test_a_wrong_flag_stops_before_any_check(capsys):
    with pytest.raises(SystemExit) as stop:
        test_trainer.main(["--presett", "tiny"])
    assert stop.value.code == 2 and "did you mean --preset?" in capsys.readouterr().err


def test_no_room_for_a_checkpoint_that_is_still_to_be_downloaded(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "not" / "there" / "yet"))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=5e9))
    status, lines = run(capsys)
    output = lines["disk and memory"]
    assert status == 1 and output.startswith("FAIL") and "set HF_HOME to another disk" in output
    assert f"{tmp_path}: its disk has 5.0 GB free, llava-hf/llava-v1.6-mistral-7b-hf and the images need 20.0" in output
    monkeypatch.setattr("models.loading.is_cached", lambda model, revision: revision == TrainingConfig.model_revision)
    assert run(capsys)[1]["disk and memory"].startswith("ok")


def test_an_empty_environment_is_reported_with_the_command_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "packaging.requirements", None)
    status, lines = run(capsys, *TINY)
    assert status == 1 and "no packages in this environment; run: pip install -r" in lines["packages"]


def test_an_interrupt_is_one_line(capsys, monkeypatch):
    def check_data(found):
        raise KeyboardInterrupt

    monkeypatch.setattr(test_trainer.PreFlight, "check_data", check_data)
    status, lines = run(capsys, *TINY)
    assert status == 130 and lines["data"] == "stop  data: interrupted"


def test_of_several_ranks_one_reports(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(capsys, *TINY) == (0, {})
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(test_trainer, "CHECKS", {"device": ""})
    status, lines = run(capsys, *TINY)
    assert status == 1 and "WORLD_SIZE=2: this program runs as a single process" in lines["device"]


def test_a_reader_that_leaves_ends_it_quietly(small_splits):
    """As in `python test_trainer.py | head -1`: exit status 141, no traceback."""
    command = [sys.executable, ROOT / "test_trainer.py", *TINY]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("ok    config")
    process.stdout.close()
    assert process.wait(timeout=120) == 141 and "Traceback" not in process.stderr.read()
