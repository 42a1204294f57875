"""train.py as a whole: what it writes, how it resumes, what it refuses."""

import errno
import fcntl
import functools
import gc
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from safetensors.torch import load_file
from transformers import PreTrainedModel

import train
from config.cli import parse_config
from evaluation import verify
from models import callbacks
from models.trainer import PlantTrainer
from runtime.checkpoint import describe_best, verify_checkpoint
from runtime.run_files import lock_folder, read_metrics, save_config
from tests.conftest import FLOWERS, TOKEN, run_printed
from utils.logging_utils import UserError

TINY = ["--preset", "tiny", "--max-steps", "6", "--save-steps", "2", "--num-workers", "0"]
SHAPE = ["--eval-steps", "3", "--logging-steps", "50"]  # the rest of `full_run`'s command


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Each test has an empty working folder, as if the program were new."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


run = functools.partial(run_printed, train.main)


def weights_of(folder: Path) -> dict:
    (file,) = (folder / "best").glob("*model.safetensors")
    return load_file(file)


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder) if "loss" in line]


@pytest.fixture
def completed(full_run, here) -> Path:
    """`full_run` where its command would find it, runs/tiny."""
    return shutil.copytree(full_run.folder, here / "runs" / "tiny")


@pytest.fixture
def not_completed(completed) -> Path:
    """The same run, killed after its last step: before it was evaluated, verified and complete."""
    for path in completed.glob("eval_val*"):
        path.unlink()
    metrics = completed / "metrics.jsonl"
    metrics.write_text("".join(line for line in metrics.read_text().splitlines(True) if '"completed"' not in line))
    return completed


# ---- a whole run


def test_a_run_writes_what_it_promises(full_run):
    assert {path.name for path in full_run.folder.iterdir()} == {
        "training_config.json", "train.log", "metrics.jsonl", "loss.png", "best", "eval_val.json", "eval_val.png",
        "eval_val.md", "eval_val_images.png", "eval_val_confusions.png", "eval_val.scores.jsonl", "calibration.json",
        "eval_val_mistakes.png", "reference.safetensors",
        "checkpoint-4", "checkpoint-6", "run.lock", "examples",
    }  # fmt: skip
    best = {path.name for path in (full_run.folder / "best").iterdir()}
    assert {"config.json", "model.safetensors", "processor_config.json", "manifest.json"} <= best
    assert not [name for name in best if name.endswith((".bin", ".pt", ".pth"))]
    assert verify_checkpoint(full_run.folder / "best") is None
    assert Image.open(full_run.folder / "eval_val_images.png").width == 960


def test_a_run_records_its_metrics_and_what_it_trained_on(full_run):
    report = json.loads((full_run.folder / "eval_val.json").read_text())
    assert report["split"] == "val" and report["n"] == 20 and 0 <= report["top1"] <= 1
    recorded = json.loads((full_run.folder / "training_config.json").read_text())["recorded"]
    assert recorded["image_processor"] == "LlavaNextImageProcessorPil" and len(recorded["class_names"]) == 10
    lines = read_metrics(full_run.folder)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6] and lines[-1]["completed"]
    log = (full_run.folder / "train.log").read_text()
    phases = ["load", "plan", "first step", "steps", "evaluations", "report", "reload"]
    assert re.search(r"time \| " + r" \| ".join(rf"{phase} \d+ s" for phase in phases) + r" \| \d+ s in all\n", log)
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]


def test_a_run_logs_what_it_is_its_steps_and_its_result(full_run):
    log = (full_run.folder / "train.log").read_text()
    for words in ("run | runs/tiny", "data | synthetic flowers", "model | tiny", "plan | 6 steps",
                  "step 3 | val loss", "result | val | top-1", "best reloaded into a fresh base model"):  # fmt: skip
        assert words in full_run.output and words in log


def test_the_model_card_warns_and_gives_the_accuracy(full_run):
    model_card = (full_run.folder / "best" / "README.md").read_text()
    assert "edible or poisonous" in model_card and "| val | 20 | 0." in model_card
    assert "More Information Needed" not in model_card


def test_a_token_is_never_written(full_run):
    files = [path for path in full_run.folder.rglob("*") if path.is_file()]
    assert len(files) > 20 and TOKEN not in full_run.output
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_a_4bit_run_on_own_images(here, checkpoint, image_folder, capsys):
    root = image_folder({"oak": 6, "ash_tree": 6})
    few = ["--image-size", "70", "--max-steps", "2", "--learning-rate", "1e-3", "--num-workers", "0"]
    status, output = run(capsys, "--model", checkpoint(), "--dataset", str(root), *few)
    assert status == 0 and "4-bit" in output and "8 train, 2 val, 2 test images of 2 classes" in output
    assert (here / "runs" / "default" / "best" / "adapter_model.safetensors").exists()
    assert re.search(r"best reloaded into a fresh base model \| scores of 2 images reproduced within", output)


def test_a_run_that_trains_on_val_does_not_evaluate_on_it(here, small_splits, run_on_val, capsys):
    mine = shutil.copytree(run_on_val.folder, here / "mine")
    assert "68 train, no val (it is in train)" in run_on_val.output
    assert not (mine / "eval_val.json").exists() and read_metrics(mine)[-1]["completed"]
    assert not [line for line in read_metrics(mine) if "eval_loss" in line]
    longer = [*TINY, "--train-on-val", "true", "--output-dir", "mine", "--max-steps", "7"]
    assert "weights of step 7" in run(capsys, *longer)[1]


@pytest.mark.skipif(not (FLOWERS / "setid.mat").exists(), reason=f"the official release is not in {FLOWERS}")
def test_the_official_release_trains(here, capsys):
    few = ["--allow-missing", "true", "--sample-fraction", "0.1", "--train-on-val", "true", "--max-steps", "1"]
    status, output = run(capsys, "--preset", "tiny", "--dataset", str(FLOWERS), *few)
    assert status == 0 and "204 train, no val (it is in train), 204 test images of 102 classes" in output


# ---- resume


def kill_at(patch: pytest.MonkeyPatch, step: int) -> None:
    real = callbacks.RunLog.on_step_end

    def stop(self, args, state, control, **kwargs):
        real(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise KeyboardInterrupt

    patch.setattr(callbacks.RunLog, "on_step_end", stop)


@pytest.mark.parametrize(
    "settings",
    [
        [
            *("--trainable", "adapter", "--lora-dropout", "0.2", "--augmentation", "light", "--class-balance", "true"),
            *("--train-on-val", "true"),  # without evaluations and reports, which the other has
        ],
        SHAPE,  # the command of `full_run`
    ],
    ids=["lora and sampling", "full"],
)
def test_an_interrupted_run_resumes_and_ends_bit_identical(settings, here, small_splits, full_run, capsys, monkeypatch):
    if settings != SHAPE:
        assert run(capsys, *TINY, *settings, "--output-dir", "undisturbed")[0] == 0
    with monkeypatch.context() as fault:
        kill_at(fault, 5)
        status, output = run(capsys, *TINY, *settings)
    assert status == 130 and "re-run the same command" in output
    status, output = run(capsys, *TINY, *settings)
    assert status == 0 and "resuming from runs/tiny/checkpoint-4" in output
    undisturbed = full_run.folder if settings == SHAPE else here / "undisturbed"
    resumed = here / "runs" / "tiny"
    assert same(weights_of(undisturbed), weights_of(resumed))
    assert losses(undisturbed) == losses(resumed) and len(losses(resumed)) == 6


def test_a_completed_run_is_kept_and_the_next_has_a_new_folder(completed, small_splits, capsys, monkeypatch):
    before = (completed / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as fault:
        kill_at(fault, 2)
        status, output = run(capsys, *TINY, *SHAPE, "--max-steps", "6")
    assert status == 130 and "runs/tiny is complete; using runs/tiny-2" in output.replace("\nrun | ", "; ")
    assert len(losses(completed.parent / "tiny-2")) == 2 and (completed / "metrics.jsonl").read_bytes() == before
    status, output = run(capsys, *TINY, *SHAPE, "--output-dir", "runs/tiny")
    assert status == 0 and "runs/tiny is complete; give a new folder, or a larger --max-steps to continue" in output


def test_a_run_killed_after_its_last_step_is_only_completed(not_completed, full_run, small_splits, capsys):
    status, output = run(capsys, *TINY, *SHAPE)
    assert status == 0 and "resuming from runs/tiny/checkpoint-6" in output
    assert read_metrics(not_completed)[-1]["completed"] and losses(not_completed) == losses(full_run.folder)
    assert same(weights_of(not_completed), weights_of(full_run.folder))
    reports = [json.loads((folder / "eval_val.json").read_text()) for folder in (not_completed, full_run.folder)]
    assert reports[0]["top1"] == reports[1]["top1"] and reports[0]["n"] == reports[1]["n"]
    # One report is of scores computed for it, the other of those of the evaluation that chose best/.
    scores = [(folder / "eval_val.scores.jsonl").read_text() for folder in (not_completed, full_run.folder)]
    assert scores[0] == scores[1] and "images were scored before" not in output
    assert f"{reports[1]['n']} images were scored before" in (full_run.folder / "train.log").read_text()


def test_a_run_forked_from_a_checkpoint_ends_bit_identical(full_run, small_splits, capsys, here):
    original = shutil.copytree(full_run.folder, here / "mine")
    before = {path: path.read_bytes() for path in original.rglob("*") if path.is_file()}
    fork = [*TINY, *SHAPE, "--resume", "mine/checkpoint-4", "--output-dir", "other"]
    status, output = run(capsys, *fork)
    assert status == 0 and "starting other from mine/checkpoint-4" in output
    assert "resuming from other/checkpoint-4" in output and losses(here / "other") == losses(original)
    assert before == {path: path.read_bytes() for path in original.rglob("*") if path.is_file()}
    assert same(weights_of(original), weights_of(here / "other"))
    status, output = run(capsys, *fork)
    assert status == 0 and "other is complete" in output


def test_changed_images_are_refused_unless_allowed(here, image_folder, capsys):
    root = image_folder({"oak": 10, "ash": 10})
    flags = [*TINY, "--dataset", str(root), "--output-dir", "mine", "--max-bad-fraction", "1"]
    assert run(capsys, *flags, "--max-steps", "2")[0] == 0
    shutil.copy(root / "oak" / "1.png", root / "oak" / "new.png")
    status, output = run(capsys, *flags)
    assert status == 1 and "the images of train and val changed since the run started; restore" in output
    status, output = run(capsys, *flags, "--allow-changed", "--max-steps", "4")
    assert status == 0 and "--allow-changed" in output and "the images of train and val" in output
    assert len(losses(here / "mine")) == 4


def test_a_folder_with_another_config_is_refused(completed, small_splits, capsys):
    before = (completed / "training_config.json").read_text()
    status, output = run(capsys, *TINY, *SHAPE, "--output-dir", "runs/tiny", "--seed", "7")
    assert status == 1 and "holds a run with another config (seed: 42 -> 7)" in output
    assert (completed / "training_config.json").read_text() == before


def test_a_second_training_in_the_same_folder_is_refused_and_loses_nothing(here, small_splits, capsys, monkeypatch):
    with lock_folder(Path("mine")):
        status, output = run(capsys, *TINY, "--output-dir", "mine")
        assert status == 1 and f"mine: another training, process {os.getpid()} on " in output
        assert "Traceback" not in output
        assert [path.name for path in (here / "mine").iterdir()] == ["run.lock"]
    with monkeypatch.context() as fault:
        kill_at(fault, 1)
        assert run(capsys, *TINY, "--output-dir", "mine")[0] == 130 and len(losses(here / "mine")) == 1


@pytest.mark.parametrize("has_flock", [True, False])
def test_the_lock_of_a_killed_training_is_released(has_flock, here, monkeypatch):
    """By the operating system, or by its process's absence from a disk without locks; no file is removed by hand."""
    if not has_flock:
        monkeypatch.setattr(fcntl, "flock", refuse_locks)
    context = multiprocessing.get_context("fork")
    is_locked = context.Event()
    other = context.Process(target=hold_lock, args=(is_locked,))
    other.start()
    assert is_locked.wait(60)
    with pytest.raises(UserError, match=f"process {other.pid} on"), lock_folder(Path("mine")):
        pass
    other.kill()
    other.join()
    with lock_folder(Path("mine")):
        words = f"{os.getpid()} on " if has_flock else f"{os.getpid()}\n"
        assert (here / "mine" / "run.lock").read_text().startswith(words)


def refuse_locks(*args) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def hold_lock(is_locked) -> None:
    with lock_folder(Path("mine")):
        is_locked.set()
        signal.pause()


# ---- bad input: one sentence each, exit status not 0, nothing lost


def hub_id(monkeypatch):
    monkeypatch.setattr("runtime.distributed.choose_device", lambda *_, **__: __import__("torch").device("cpu"))


def full_disk(monkeypatch):
    monkeypatch.setattr("runtime.checkpoint.shutil.disk_usage", lambda path: SimpleNamespace(free=1e6))


def nothing(monkeypatch):
    pass


BAD_INPUT = [
    (nothing, [], "needs a CUDA GPU and torch sees none; check nvidia-smi and the driver, or try"),
    (hub_id, ["--dataset", "{images}"], "llava-v1.6-mistral-7b-hf: at 52320fb52229c8d942b1"),
    (nothing, ["--model", "{checkpoint}"], "Donghyun99/Oxford-Flower-102: at 7e43fe37eeb9278138ab"),
    (nothing, ["--preset", "tiny", "--mixed-precision", "fp16"], "--mixed-precision fp16: needs a CUDA GPU"),
    (nothing, ["--preset", "tiny", "--dataset", "nowhere"], "--dataset nowhere: no such folder"),
    (nothing, ["--preset", "tiny", "--dataset", "{empty}"], "no images found"),
    (nothing, ["--preset", "tiny", "--dataset", "{one}"], "only one class ('oak')"),
    (nothing, ["--preset", "tiny", "--dataset", "{broken}"], "cannot be opened, above max_bad_fraction=0.01"),
    (nothing, ["--preset", "tiny", "--dataset", "{zero}"], "not used: empty image files (0 bytes): 20"),
    (nothing, ["--preset", "tiny", "--dataset", "{garbled}"], "cannot be opened, above max_bad_fraction=0.01"),
    (nothing, ["--preset", "tiny", "--dataset", "{garbled}", "--max-bad-fraction", "1"], "none of its images"),
    (nothing, ["--preset", "tiny", "--early-stopping-patience", "2"], "nothing is measured during training; use"),
    (nothing, ["--model", "{no_weights}", "--dataset", "{images}"], "holds no model.safetensors and no"),
    (nothing, ["--model", "./gone"], "--model ./gone: no such folder"),
    (full_disk, ["--preset", "tiny"], "GB free, the checkpoints need"),
    (nothing, ["--preset", "tiny", "--output-dir", "{file}"], "is a file; give a folder"),
    (nothing, ["--preset", "tiny", "--output-dir", "{images}"], "holds files but is not a run"),
    (nothing, ["--preset", "tiny", "--load-in-4bit", "true", "--trainable", "adapter"], "its weights are not loaded"),
    (nothing, ["--preset", "tiny", "--seed", "4294967296"], "seed=4294967296"),
    (nothing, ["--preset", "tiny", "--trainable", "adapter", "--sharding", "fsdp"], "needs several ranks to shard"),
    (nothing, ["--preset", "tiny", "--optim", "sgdd"], "--optim sgdd: not known to transformers; use one of"),
    (nothing, ["--preset", "tiny", "--report-to", "paper"], "--report-to paper: ValueError: paper is not suppor"),
    (nothing, ["--preset", "tiny", "--report-to", "clearml"], "--report-to clearml: "),
    (
        nothing, ["--preset", "tiny", "--max-steps", "-1", "--num-train-epochs", "1", "--warmup-steps", "700"],
        "warmup_steps=700: as long as the run of",
    ),
    (nothing, ["--preset", "tiny", "--learning-rate", "fast"], "learning_rate=fast: a number is needed"),
    (nothing, ["--presett", "tiny"], "--presett: unknown flag; did you mean --preset?"),
]  # fmt: skip


@pytest.fixture
def places(here, image_folder, checkpoint):
    """Folders that the bad inputs name."""
    found = {"images": image_folder({"oak": 10, "ash": 10}), "checkpoint": checkpoint(), "file": here / "file"}
    for name in ("empty", "one", "garbled", "broken", "zero"):
        (here / name).mkdir()
        found[name] = here / name
    shutil.copytree(found["images"] / "oak", here / "one" / "oak")
    for name in ("garbled", "broken", "zero"):
        shutil.copytree(found["images"], here / name, dirs_exist_ok=True)
    (here / "broken" / "oak" / "3.png").write_bytes(b"\x89PNG but no more")
    for name in ("4.png", "5.png", "6.png", "7.png"):
        (here / "broken" / "ash" / name).write_bytes(b"\x89PNG but no more")
    for image in (here / "zero").rglob("*.png"):
        image.write_bytes(b"")
    for image in (here / "garbled").rglob("*.png"):
        image.write_bytes(f"{image}".encode())
    (here / "file").write_text("x")
    found["no_weights"] = shutil.copytree(checkpoint(), here / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    return {name: str(path) for name, path in found.items()}


@pytest.mark.usefixtures("small_splits")
@pytest.mark.parametrize(("fault", "argv", "words"), BAD_INPUT, ids=[words[:40] for _, _, words in BAD_INPUT])
def test_bad_input(fault, argv, words, places, capsys, monkeypatch):
    fault(monkeypatch)
    before = {path: path.stat().st_size for path in Path.cwd().rglob("*") if path.is_file()}
    status, output = run(capsys, *[word.format(**places) for word in argv])
    assert status != 0 and words in output and "Traceback" not in output
    assert all(path.exists() and path.stat().st_size == size for path, size in before.items())


def test_a_folder_that_may_not_be_written(here, small_splits, monkeypatch, capsys):
    """The refusal is injected: the system refuses root nothing."""
    real = os.mkdir

    def mkdir(path, *args, **kwargs):
        if "closed" in str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        real(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    status, output = run(capsys, *TINY, "--output-dir", "closed/run")
    assert (
        status == 1
        and "closed/run: Permission denied; choose a place that you may read and write (--output-dir" in output
    )


@pytest.fixture
def hub(monkeypatch):
    """hub(status, headers) is the address of a server on this machine that answers everything with this status."""
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
    ("answer", "headers"), [(401, {"X-Error-Code": "RepoNotFound"}), (403, {"X-Error-Code": "GatedRepo"}), (401, {})]
)
def test_a_token_that_may_not_read_the_model(answer, headers, hub, places, capsys, monkeypatch):
    import huggingface_hub.constants as constants

    address = hub(answer, headers)
    hub_id(monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: False)
    status, output = run(capsys, "--dataset", places["images"])
    assert status == 1 and "that HF_TOKEN may read it" in output and "hf_wrong" not in output


# ---- what was saved is what was measured


def test_weights_that_do_not_come_back_are_an_error(not_completed, small_splits, monkeypatch, capsys):
    """An adapter whose keys match nothing loads without a word: here nothing is loaded at all."""
    with monkeypatch.context() as fault:
        fault.setattr(verify, "load_weights", lambda model, folder: None)
        status, output = run(capsys, *TINY, *SHAPE)
    assert status == 1 and "error: runs/tiny/best: reloaded, its scores of 4 images differ" in output
    status, output = run(capsys, *TINY, *SHAPE)  # not complete: the same command tries again
    assert status == 0 and "best reloaded into a fresh base model" in output


def test_the_trained_model_is_freed_before_the_fresh_one_is_loaded(not_completed, small_splits, monkeypatch, capsys):
    """A GPU has room for one."""

    def count() -> int:
        gc.collect()
        return sum(isinstance(found, (PlantTrainer, PreTrainedModel)) for found in gc.get_objects())

    before, counts = count(), []
    monkeypatch.setattr(verify, "collect_memory", lambda device: counts.append(count()))
    assert run(capsys, *TINY, *SHAPE)[0] == 0
    assert counts and max(counts) <= before


def test_a_model_that_was_hardly_trained_is_reported(here, small_splits, checkpoint, capsys):
    flags = ["--model", checkpoint(), "--trainable", "adapter", "--max-steps", "1", "--learning-rate", "1e-30"]
    assert "its scores are those of the base model; it was hardly trained" in run(capsys, *TINY, *flags)[1]


def test_trackers_are_checked_before_anything_is_loaded(small_splits, capsys):
    status, output = run(capsys, *TINY, "--report-to", "wandb")
    assert status == 1 and len(output.splitlines()) == 1 and not Path("runs").exists()
    assert output.startswith("error: --report-to wandb: ") and "use none or one of those installed: " in output


# ---- best/ again, and longer runs


def flip_a_bit(best: Path) -> None:
    file = best / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("corrupt", [flip_a_bit, shutil.rmtree])
def test_the_command_of_a_run_makes_best_again_from_a_checkpoint(corrupt, completed, full_run, small_splits, capsys):
    corrupt(completed / "best")
    with pytest.raises(
        UserError, match=r"holds no complete weights \(.*; its train.py command, with --output-dir .* makes"
    ):
        describe_best(completed / "best")
    status, output = run(capsys, *TINY, *SHAPE)
    assert status == 0 and "runs/tiny/best is missing or corrupted; it is made again from a checkpoint" in output
    assert verify_checkpoint(completed / "best") is None and losses(completed) == losses(full_run.folder)
    is_lost = json.loads((full_run.folder / "best" / "best.json").read_text())["step"] == 3  # not a checkpoint's
    assert ("the weights of step 3, the best on val, are lost; those of step 6 are used" in output) == is_lost
    assert same(weights_of(completed), load_file(full_run.folder / "checkpoint-6" / "model.safetensors"))
    assert run(capsys, *TINY, *SHAPE, "--output-dir", "runs/tiny")[1].startswith("run | runs/tiny is complete")


def test_a_run_without_weights_stays_complete(completed, small_splits, capsys):
    for folder in (completed / "best", *completed.glob("checkpoint-*")):
        shutil.rmtree(folder)
    with pytest.raises(UserError, match="no checkpoint is left to make them from; train again, in another folder"):
        describe_best(completed / "best")
    assert "is complete" in run(capsys, *TINY, *SHAPE, "--output-dir", "runs/tiny")[1]


def test_a_longer_run_begins_at_its_own_learning_rate(completed, small_splits, capsys):
    status, output = run(capsys, *TINY, *SHAPE, "--max-steps", "9", "--output-dir", "runs/tiny")
    assert status == 0 and "longer than it began (max_steps: 6 -> 9): the learning rate schedule is stretched" in output
    assert "keep the result" not in output
    rates = [line["learning_rate"] for line in read_metrics(completed) if line["step"] > 6 and "loss" in line]
    assert len(rates) == 3 and 0 < rates[2] < rates[1] < rates[0]


def test_what_stands_in_the_way_of_pictures_is_no_end(small_splits, pictures, capsys):
    for name in ("loss.png", "eval_val.png", "eval_val_images.png", "eval_val.md"):
        Path("runs/tiny", name).mkdir(parents=True)
    Path("runs/tiny/examples").write_text("no folder")
    save_config(parse_config([*TINY, "--output-dir", "runs/tiny"]), "runs/tiny", {})
    status, output = run(capsys, *TINY, "--max-steps", "1", "--output-dir", "runs/tiny", "--allow-changed")
    assert status == 0 and output.count(": skipped, since it cannot be made (") == 5 and "Traceback" not in output
    assert read_metrics(Path("runs/tiny"))[-1]["completed"]
