import errno
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from PIL import Image
from safetensors.torch import load_file
from transformers import PreTrainedModel

import train
from evaluation import verify
from models import callbacks
from models.builder import PlantModel
from models.trainer import PlantTrainer
from runtime.checkpoint import verify_checkpoint
from runtime.run_files import read_metrics
from tests.conftest import FLOWERS, ROOT
from utils.logging_utils import UserError

TINY = ["--preset", "tiny", "--max-steps", "6", "--save-steps", "2", "--num-workers", "0"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Each test has an empty working folder, as if the program were new."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *argv) -> tuple[int, str]:
    """Exit status and all that was printed."""
    try:
        status = train.main(list(argv))
    except SystemExit as stop:
        status = stop.code
        if isinstance(status, str):
            status, told = 1, status
            return status, told
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def test_a_whole_run_writes_what_it_promises(here, small_splits, capsys):
    status, told = run(capsys, *TINY, "--eval-steps", "3", "--logging-steps", "2")
    assert status == 0
    folder = here / "runs" / "tiny"
    assert {path.name for path in folder.iterdir()} == {
        "training_config.json", "train.log", "metrics.jsonl", "loss.png", "best", "eval_val.json", "eval_val.png",
        "eval_val.md", "eval_val_images.png", "eval_val.scores.jsonl", "calibration.json",
        "checkpoint-4", "checkpoint-6", "run.lock", "examples",
    }  # fmt: skip
    assert {"config.json", "model.safetensors", "processor_config.json", "manifest.json"} <= set(
        os.listdir(folder / "best")
    )
    assert not [name for name in os.listdir(folder / "best") if name.endswith((".bin", ".pt", ".pth"))]
    report = json.loads((folder / "eval_val.json").read_text())
    assert report["split"] == "val" and report["n"] == 20 and 0 <= report["top1"] <= 1
    recorded = json.loads((folder / "training_config.json").read_text())["recorded"]
    assert recorded["image_processor"] == "LlavaNextImageProcessorPil" and len(recorded["class_names"]) == 10
    lines = read_metrics(folder)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6] and lines[-1]["completed"]
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]
    for word in ("run | runs/tiny", "data | synthetic flowers", "model | tiny", "plan | 6 steps | global batch size 16",
                 "step 2/6", "step 3 | val loss", "result | val | top-1"):  # fmt: skip
        assert word in told and word in (folder / "train.log").read_text()
    assert Image.open(folder / "eval_val_images.png").width == 960


class Killed(KeyboardInterrupt):
    pass


def losses(folder) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder) if "loss" in line]


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        (["--trainable", "adapter", "--lora-dropout", "0.2"], "adapter_model.safetensors"),
        (["--trainable", "everything"], "model.safetensors"),
    ],
)
def test_the_same_command_goes_on_and_ends_as_if_never_stopped(kind, weights, here, small_splits, capsys, monkeypatch):
    assert run(capsys, *TINY, *kind, "--output-dir", "undisturbed")[0] == 0
    real = callbacks.RunLog.on_step_end

    def stop(self, args, state, control, **kwargs):
        real(self, args, state, control, **kwargs)
        if state.global_step == 5:
            raise Killed

    with monkeypatch.context() as fault:
        fault.setattr(callbacks.RunLog, "on_step_end", stop)
        status, told = run(capsys, *TINY, *kind)
    assert status == 130 and "re-run the same command" in told
    status, told = run(capsys, *TINY, *kind)
    assert status == 0 and "resuming from runs/tiny/checkpoint-4" in told
    undisturbed, stopped = (load_file(here / folder / "best" / weights) for folder in ("undisturbed", "runs/tiny"))
    assert all((undisturbed[name] == stopped[name]).all() for name in undisturbed)
    assert losses(here / "undisturbed") == losses(here / "runs" / "tiny") and len(losses(here / "undisturbed")) == 6
    status, told = run(capsys, *TINY, *kind)
    assert status == 0 and "runs/tiny is finished" in told and (here / "runs" / "tiny-2" / "best").is_dir()


def test_a_run_stopped_after_its_last_step_is_only_finished(here, small_splits, capsys, monkeypatch):
    from evaluation import report

    with monkeypatch.context() as fault:
        fault.setattr(report, "measure_scores", lambda *args: (_ for _ in ()).throw(Killed))
        assert run(capsys, *TINY, "--output-dir", "mine")[0] == 130
    before = load_file(here / "mine" / "best" / "model.safetensors")
    assert run(capsys, *TINY, "--output-dir", "mine")[0] == 0
    assert read_metrics(here / "mine")[-1]["completed"] and len(losses(here / "mine")) == 6
    after = load_file(here / "mine" / "best" / "model.safetensors")
    assert all((before[name] == after[name]).all() for name in before)
    status, told = run(capsys, *TINY, "--output-dir", "mine")
    assert status == 0 and "mine is finished; name a new folder, or a larger --max-steps to go on" in told


def test_a_four_bit_run_on_your_own_plants(here, checkpoint, image_folder, capsys):
    root = image_folder({"oak": 6, "ash_tree": 6})
    few = ["--image-size", "70", "--max-steps", "2", "--num-workers", "0"]
    status, told = run(capsys, "--model", checkpoint(), "--dataset", str(root), *few)
    assert status == 0 and "4-bit, fp32 on cpu" in told and "8 train, 2 val, 2 test images of 2 classes" in told
    assert (here / "runs" / "default" / "best" / "adapter_model.safetensors").exists()


def test_a_run_that_learns_from_val_measures_nothing_on_it(here, small_splits, capsys):
    status, told = run(capsys, *TINY, "--train-on-val", "true", "--output-dir", "mine")
    assert status == 0 and "68 train, no val (it is in train)" in told
    assert not (here / "mine" / "eval_val.json").exists() and read_metrics(here / "mine")[-1]["completed"]
    assert not [line for line in read_metrics(here / "mine") if "eval_loss" in line]
    longer = [*TINY, "--train-on-val", "true", "--output-dir", "mine", "--max-steps", "8"]
    assert "mine/best holds the weights of step 8" in run(capsys, *longer)[1]


def test_a_token_is_never_written(here, small_splits, capsys, monkeypatch):
    monkeypatch.setenv("HUGGINGFACE_TOKEN", "hf_very_secret")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    _, told = run(capsys, *TINY, "--max-steps", "2")
    assert "hf_very_secret" not in told
    assert not [path for path in here.rglob("*") if path.is_file() and b"hf_very_secret" in path.read_bytes()]


# ---- bad input: one sentence each, exit status not 0, nothing lost


def hub_id(monkeypatch):
    monkeypatch.setattr("runtime.device.choose_device", lambda *_, **__: __import__("torch").device("cpu"))


def full_disk(monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr("runtime.checkpoint.shutil.disk_usage", lambda path: SimpleNamespace(free=1e6))


def nothing(monkeypatch):
    pass


BAD_INPUT = [
    (nothing, [], "needs a CUDA GPU and torch sees none; check nvidia-smi and the driver, or try"),
    (hub_id, ["--dataset", "{images}"], "llava-hf/llava-v1.6-mistral-7b-hf: its config cannot be loaded"),
    (nothing, ["--model", "{checkpoint}"], "data set Donghyun99/Oxford-Flower-102 at revision 7e43fe37"),
    (nothing, ["--model", "{checkpoint}", "--mixed-precision", "fp16"], "--mixed-precision fp16: needs a CUDA GPU"),
    (nothing, ["--preset", "tiny", "--dataset", "nowhere"], "--dataset nowhere: no such folder"),
    (nothing, ["--preset", "tiny", "--dataset", "{empty}"], "no images found"),
    (nothing, ["--preset", "tiny", "--dataset", "{one}"], "only one class ('oak')"),
    (nothing, ["--preset", "tiny", "--dataset", "{hollow}"], "class 'elm' has no image to train on"),
    (nothing, ["--preset", "tiny", "--dataset", "{broken}"], "cannot be opened, above max_unreadable_fraction=0.01"),
    (nothing, ["--preset", "tiny", "--dataset", "{zero}"], "cannot be opened, above max_unreadable_fraction=0.01"),
    (nothing, ["--preset", "tiny", "--dataset", "{zero}", "--max-unreadable-fraction", "1"], "none of its images can"),
    (nothing, ["--preset", "tiny", "--early-stopping-patience", "2"], "nothing is measured while training; use"),
    (nothing, ["--model", "{no_weights}", "--dataset", "{images}"], "holds no *.safetensors weights"),
    (nothing, ["--model", "./gone"], "--model ./gone: no such folder"),
    (full_disk, ["--preset", "tiny"], "GB free, the checkpoints need"),
    (nothing, ["--preset", "tiny", "--output-dir", "{file}"], "is a file; name a folder"),
    (nothing, ["--preset", "tiny", "--output-dir", "{images}"], "holds files but is not a run"),
    (nothing, ["--preset", "tiny", "--load-in-4bit", "true", "--trainable", "adapter"], "its weights are not loaded"),
    (nothing, ["--preset", "tiny", "--seed", "4294967296"], "seed=4294967296"),
    (nothing, ["--preset", "tiny", "--trainable", "adapter", "--sharding", "fsdp"], "a single process has nobody to"),
    (nothing, ["--preset", "tiny", "--optim", "sgdd"], "--optim sgdd: not known to transformers; use one of"),
    (nothing, ["--preset", "tiny", "--report-to", "paper"], "--report-to paper: paper not known to transformers"),
    (nothing, ["--preset", "tiny", "--report-to", "clearml"], "--report-to clearml: "),
    (nothing, ["--preset", "tiny", "--learning-rate", "fast"], "learning_rate=fast: a number is needed"),
    (nothing, ["--presett", "tiny"], "--presett: unknown flag; did you mean --preset?"),
]  # fmt: skip


@pytest.fixture
def places(here, image_folder, checkpoint):
    """Folders that the bad inputs name."""
    found = {"images": image_folder({"oak": 10, "ash": 10}), "checkpoint": checkpoint(), "file": here / "file"}
    for name in ("empty", "one", "hollow", "broken", "zero"):
        (here / name).mkdir()
        found[name] = here / name
    shutil.copytree(found["images"] / "oak", here / "one" / "oak")
    for name in ("hollow", "broken", "zero"):
        shutil.copytree(found["images"], here / name, dirs_exist_ok=True)
    (here / "hollow" / "elm").mkdir()
    (here / "broken" / "oak" / "3.png").write_bytes(b"\x89PNG but no more")
    (here / "broken" / "ash" / "4.png").write_bytes(b"")
    for image in (here / "zero").rglob("*.png"):
        image.write_bytes(b"")
    (here / "file").write_text("x")
    found["no_weights"] = shutil.copytree(checkpoint(), here / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return {name: str(path) for name, path in found.items()}


@pytest.mark.parametrize(("fault", "argv", "words"), BAD_INPUT, ids=[words[:40] for _, _, words in BAD_INPUT])
def test_bad_input(fault, argv, words, places, small_splits, capsys, monkeypatch, here):
    fault(monkeypatch)
    before = {path: path.stat().st_size for path in here.rglob("*") if path.is_file()}
    status, told = run(capsys, *[word.format(**places) for word in argv])
    assert status != 0 and words in told and "Traceback" not in told
    assert all(path.exists() and path.stat().st_size == size for path, size in before.items())


def test_a_checkpoint_begins_another_run_that_ends_alike(here, small_splits, capsys):
    assert run(capsys, *TINY, "--output-dir", "mine")[0] == 0
    before = {path: path.read_bytes() for path in (here / "mine").rglob("*") if path.is_file()}
    branch = [*TINY, "--resume", "mine/checkpoint-4", "--output-dir", "other"]
    status, told = run(capsys, *branch)
    assert status == 0 and "beginning other from mine/checkpoint-4" in told
    assert "resuming from other/checkpoint-4" in told and losses(here / "mine") == losses(here / "other")
    assert before == {path: path.read_bytes() for path in (here / "mine").rglob("*") if path.is_file()}
    one, other = (load_file(here / name / "best" / "model.safetensors") for name in ("mine", "other"))
    assert all((one[name] == other[name]).all() for name in one)
    status, told = run(capsys, *branch)
    assert status == 0 and "other is finished" in told


def test_photos_that_changed_are_refused_unless_that_is_allowed(here, image_folder, capsys, monkeypatch):
    root = image_folder({"oak": 10, "ash": 10})
    flags = [*TINY, "--dataset", str(root), "--output-dir", "mine", "--max-unreadable-fraction", "1"]
    assert run(capsys, *flags, "--max-steps", "2")[0] == 0
    shutil.copy(root / "oak" / "1.png", root / "oak" / "new.png")
    status, told = run(capsys, *flags)
    assert status == 1 and "the images of train and val changed since the run began; put back" in told
    status, told = run(capsys, *flags, "--allow-changed")
    assert status == 0 and "as --allow-changed says: the images of train and val" in told
    assert len(losses(here / "mine")) == 6


def test_a_second_training_in_the_same_folder_is_refused_and_loses_nothing(here, small_splits, capsys):
    from runtime.run_files import lock_folder

    with lock_folder("mine"):
        status, told = run(capsys, *TINY, "--output-dir", "mine")
        assert status == 1 and f"mine: another training, process {os.getpid()} on " in told and "Traceback" not in told
        assert [path.name for path in (here / "mine").iterdir()] == ["run.lock"]
    assert run(capsys, *TINY, "--output-dir", "mine")[0] == 0


def test_the_lock_of_a_killed_training_is_free(here):
    """The operating system gives it back; no file must be removed by hand."""
    code = "from runtime.run_files import lock_folder\nwith lock_folder('mine'):\n    print(flush=True)\n    input()"
    where = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
    from runtime.run_files import lock_folder

    with subprocess.Popen([sys.executable, "-c", code], **where) as other:
        other.stdout.readline()
        with pytest.raises(UserError, match=f"process {other.pid} on"), lock_folder("mine"):
            pass
        other.kill()
    with lock_folder("mine"):
        assert (here / "mine" / "run.lock").read_text().startswith(f"{os.getpid()} on ")


def test_an_explicit_folder_that_holds_another_config(small_splits, capsys, here):
    assert run(capsys, *TINY, "--output-dir", "mine")[0] == 0
    kept = (here / "mine" / "training_config.json").read_text()
    status, told = run(capsys, *TINY, "--output-dir", "mine", "--seed", "7")
    assert status == 1 and "holds a run with another config (seed: 42 -> 7)" in told
    assert (here / "mine" / "training_config.json").read_text() == kept


def test_a_folder_that_may_not_be_written(here, small_splits, monkeypatch, capsys):
    """The refusal is injected: the system refuses root nothing."""
    real = os.mkdir

    def mkdir(path, *args, **kwargs):
        if "closed" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        real(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    status, told = run(capsys, *TINY, "--output-dir", "closed/run")
    assert status == 1 and "closed/run: Permission denied; choose a place that you may write to (--output-dir" in told


@pytest.fixture
def hub(monkeypatch):
    """hub(status) is a hub on this machine that answers everything with this status."""
    servers = []

    def start(status: int, headers: dict[str, str]) -> str:
        class Answer(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_HEAD

            def log_message(self, *args):
                pass

        server = HTTPServer(("127.0.0.1", 0), Answer)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "headers"), [(401, {"X-Error-Code": "RepoNotFound"}), (403, {"X-Error-Code": "GatedRepo"}), (401, {})]
)
def test_a_token_that_may_not_read_the_model(status, headers, hub, places, capsys, monkeypatch):
    import huggingface_hub.constants as constants

    address = hub(status, headers)
    hub_id(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: False)
    code, told = run(capsys, "--dataset", places["images"])
    assert code == 1 and "check the name, and that HF_TOKEN may read it" in told and "hf_wrong" not in told


# ---- real photographs


@pytest.mark.skipif(not (FLOWERS / "setid.mat").exists(), reason=f"the official release is not in {FLOWERS}")
def test_real_photos_train(here, checkpoint, capsys):
    few = ["--allow-missing", "true", "--image-size", "70", "--max-steps", "2", "--sample-fraction", "0.1"]
    status, told = run(capsys, "--model", checkpoint(), "--dataset", str(FLOWERS), *few)
    assert status == 0 and "102 train, 102 val, 204 test images of 102 classes" in told


# ---- what was saved is what was measured


@pytest.mark.parametrize("kind", ["whole", "adapter"])
def test_a_run_ends_with_its_weights_loaded_afresh(kind, here, small_splits, checkpoint, capsys):
    flags = ["--model", checkpoint(), "--trainable", "adapter", "--load-in-4bit", "true"] if kind == "adapter" else []
    status, told = run(capsys, *TINY, *flags, "--learning-rate", "1e-3")
    assert status == 0 and re.search(
        r"best reloaded into a fresh base model \| scores of 4 images reproduced within", told
    )
    card = (here / "runs" / "tiny" / "best" / "README.md").read_text()
    assert "edible or poisonous" in card and "| val | 20 | 0." in card and "More Information Needed" not in card
    assert verify_checkpoint(here / "runs" / "tiny" / "best") is None


def test_weights_that_do_not_come_back_are_an_error(here, small_splits, monkeypatch, capsys):
    """An adapter whose keys match nothing loads without a word: here nothing is loaded at all."""
    with monkeypatch.context() as fault:
        fault.setattr(PlantModel, "load_weights", lambda plant, folder: None)
        status, told = run(capsys, *TINY)
    assert status == 1 and "error: runs/tiny/best: reloaded, its scores of 4 images differ by up to" in told
    status, told = run(capsys, *TINY)  # not finished: the same command tries again
    assert status == 0 and "resuming from runs/tiny/checkpoint-6" in told and "reloaded into a fresh base model" in told


def test_the_trained_model_is_gone_before_the_fresh_one_comes(here, small_splits, monkeypatch, capsys):
    """A GPU has room for one."""
    left = []

    def count(*args):
        gc.collect()
        left.extend(one for one in gc.get_objects() if isinstance(one, (PlantTrainer, PreTrainedModel)))

    monkeypatch.setattr(verify, "collect_memory", count)
    before = sum(isinstance(one, PreTrainedModel) for one in gc.get_objects())
    assert run(capsys, *TINY)[0] == 0
    assert len(left) <= before


def test_a_model_that_was_hardly_trained_is_reported(here, small_splits, checkpoint, capsys):
    flags = ["--model", checkpoint(), "--trainable", "adapter", "--max-steps", "1", "--learning-rate", "1e-30"]
    assert "its scores are those of the base model; it was hardly trained" in run(capsys, *TINY, *flags)[1]
