"""Faults, injected into real runs of train.py: what is lost, and does the run end as it does without the fault?

Each run is a process of its own, forked from one that has imported everything. The run: the tiny model with dropout on
its adapter, 12 steps, a checkpoint every 3, an evaluation every 4, images decoded by a worker. A fault strikes at a
step, a file or an event of the run, never after a time that a test guessed.
"""

import functools
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from runtime.run_files import checkpoints_in, read_metrics, step_of
from tests.conftest import freeze_modules
from utils.signal_utils import SAME_S

STEPS, SAVE_STEPS = 12, 3
RUN = [
    *("--preset", "tiny", "--output-dir", "run", "--trainable", "adapter", "--lora-dropout", "0.2"),
    *("--max-steps", f"{STEPS}", "--save-steps", f"{SAVE_STEPS}", "--eval-steps", "4", "--num-workers", "1"),
]
ORDER = "order.jsonl"  # what the trainer was given: {"step", "ids"} a line
OUTPUT = "output.txt"
SAVING, WAITING, RELEASE = "saving", "waiting", "release"  # files by which a run and its test wait for each other
TIMEOUT_S = 240  # after which a run hangs
Fault = Callable[[], None]  # called in the run's process, before train.main


class Outcome(NamedTuple):
    """How a run that met a fault ended, after the same command was given again."""

    lost: bool  # it did not reach its last step
    repeated: int  # steps
    same: bool | None  # weights, optimizer, order of images and losses equal those without the fault; None: n/a
    output: str  # at the fault


# ---- runs


def context():
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(
        ["train", "predict", "evaluate", "models.trainer", "evaluation.predictor", "evaluation.report", "data.dataset"]
    )
    return found


def start(folder: Path, argv: Sequence[str] = RUN, fault: Fault | None = None, script: str = "train"):
    """A script, by its module's name, as a process in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    process = context().Process(target=_run, args=(str(folder), script, list(argv), fault))
    process.start()
    return process


def finish(process, timeout_s: float = TIMEOUT_S) -> int:
    process.join(timeout_s)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{process} did not end within {timeout_s} s")
    return process.exitcode


def run(folder: Path, fault: Fault | None = None, argv: Sequence[str] = RUN, timeout_s: float = TIMEOUT_S) -> int:
    """Exit status."""
    return finish(start(folder, argv, fault), timeout_s)


def _run(folder: str, script: str, argv: list[str], fault: Fault | None) -> None:
    import torch

    multiprocessing.set_start_method("fork", force=True)  # of loaders' workers, as if train.py had been run
    torch.set_num_threads(1)  # two runs at once would wait for each other's threads
    os.chdir(folder)
    with open(OUTPUT, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    from data import dataset
    from models.trainer import PlantTrainer

    dataset.SPLIT_SIZES.update(train=48, validation=20, test=20)
    freeze_modules()
    training_step = PlantTrainer.training_step

    def record(self, model, inputs, num_items_in_batch=None):
        if inputs.samples:
            with open(ORDER, "a") as file:
                ids = [sample.id for sample in inputs.samples]
                file.write(json.dumps({"step": self.state.global_step + 1, "ids": ids}) + "\n")
        return training_step(self, model, inputs, num_items_in_batch)

    PlantTrainer.training_step = record
    if fault is not None:
        fault()
    sys.exit(importlib.import_module(script).main(argv))


def at_step(step: int, action: Callable) -> None:
    """In the run's process: `action(trainer)` when this step begins."""
    from models.trainer import PlantTrainer

    real = PlantTrainer.training_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step + 1 == step:
            action(self)
        return real(self, model, inputs, num_items_in_batch)

    PlantTrainer.training_step = training_step


def wait_for_file(path: Path, process=None) -> None:
    """Until the file is there, or the process has ended."""
    began = time.monotonic()
    while not path.exists() and (process is None or process.exitcode is None):
        if time.monotonic() - began > TIMEOUT_S:
            raise TimeoutError(f"{path} was not written within {TIMEOUT_S} s")
        time.sleep(0.001)


# ---- results of a run


def result_of(folder: Path) -> dict:
    """What must be equal: bytes of weights, tensors of the optimizer, order of images, losses of each step."""
    import torch

    last = folder / "run" / f"checkpoint-{STEPS}"
    order = {entry["step"]: entry["ids"] for entry in map(json.loads, (folder / ORDER).read_text().splitlines())}
    moments = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    return {
        "weights": [(place / "adapter_model.safetensors").read_bytes() for place in (last, folder / "run" / "best")],
        "optimizer": {
            index: {name: value.tolist() for name, value in state.items()} for index, state in moments.items()
        },
        "order": order,
        "steps": [(line["step"], line.get("loss"), line.get("eval_loss")) for line in read_metrics(folder / "run")],
    }


def output_of(folder: Path) -> str:
    return (folder / OUTPUT).read_text(errors="replace") if (folder / OUTPUT).exists() else ""


def resume(folder: Path, expected: dict) -> Outcome:
    """The same command again, after a fault."""
    output = output_of(folder)
    done = max((line["step"] for line in read_metrics(folder / "run") if "loss" in line), default=0)
    was_completed = any(line.get("completed") for line in read_metrics(folder / "run"))
    status = run(folder)
    from_step = re.search(r"resuming from \S+checkpoint-(\d+)", output_of(folder))
    lost = status != 0 or not any(line.get("completed") for line in read_metrics(folder / "run"))
    repeated = 0 if was_completed else done - (int(from_step[1]) if from_step else 0)
    return Outcome(lost, max(repeated, 0), not lost and result_of(folder) == expected, output)


def run_undisturbed(folder: Path) -> tuple[dict, float]:
    """(result, seconds)"""
    began = time.perf_counter()
    assert run(folder) == 0, output_of(folder)
    return result_of(folder), time.perf_counter() - began


def run_to_step_8(folder: Path) -> None:
    """A run that died after step 8, with checkpoints of steps 3 and 6."""
    assert run(folder, functools.partial(at_step, 9, _die)) == 9, output_of(folder)


def _die(trainer) -> None:
    os._exit(9)


# ---- kills and signals


def kill_at(folder: Path, expected: dict, seconds: float) -> Outcome:
    process = start(folder)
    process.join(seconds)
    process.kill()
    process.join()
    return resume(folder, expected)


def kill_in_save(folder: Path, expected: dict, draw: random.Random) -> Outcome:
    """At a random file operation inside the folder of a checkpoint that is being written."""
    step = draw.randrange(SAVE_STEPS, STEPS + 1, SAVE_STEPS)
    # The 45 operations of a save: folder, run id, files of JSON, then each file's sync for the manifest.
    status = run(folder, functools.partial(_kill_in_folder, f"checkpoint-{step}", draw.randrange(1, 40)))
    assert status == -signal.SIGKILL and not (folder / f"run/checkpoint-{step}/manifest.json").exists()
    return resume(folder, expected)


def _kill_in_folder(name: str, count: int) -> None:
    pid, seen = os.getpid(), []

    def watch(event: str, arguments: tuple) -> None:
        if event in ("open", "os.mkdir", "os.rename") and os.getpid() == pid and name in str(arguments[0]):
            seen.append(event)
            if len(seen) == count:
                os.kill(pid, signal.SIGKILL)

    sys.addaudithook(watch)


def interrupt(folder: Path, expected: dict, number: int, draw: random.Random) -> Outcome:
    """A signal at a random step: a checkpoint is saved, and the run ends with the signal's exit status."""
    fault = functools.partial(at_step, draw.randrange(2, STEPS + 1), functools.partial(_signal_self, number))
    assert run(folder, fault) == 128 + number, output_of(folder)
    return resume(folder, expected)


def _signal_self(number: int, trainer) -> None:
    os.kill(os.getpid(), number)


def interrupt_twice(folder: Path, expected: dict) -> Outcome:
    """A second Ctrl-C ends the run at once, although the save that the first one asked for never ends."""
    process = start(folder, fault=functools.partial(at_step, 3, _interrupt_into_hanging_save))
    wait_for_file(folder / SAVING, process)
    assert process.exitcode is None, output_of(folder)
    time.sleep(SAME_S)  # within it, a second signal counts as the same
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 128 + signal.SIGINT
    return resume(folder, expected)


def _interrupt_into_hanging_save(trainer) -> None:
    def hang(handle: int) -> None:
        Path(SAVING).touch()
        while True:
            signal.pause()

    os.fsync = hang
    os.kill(os.getpid(), signal.SIGINT)


def kill_worker(folder: Path, expected: dict) -> Outcome:
    assert run(folder, functools.partial(at_step, 5, _kill_children)) == 1, output_of(folder)
    outcome = resume(folder, expected)
    assert re.search(r"error: DataLoader worker \(pid.* for lack of memory; re-run", outcome.output), outcome.output
    assert "Traceback" not in outcome.output
    return outcome


def _kill_children(trainer) -> None:
    for worker in psutil.Process().children():
        worker.kill()


def run_second_training(folder: Path, expected: dict) -> Outcome:
    """Another training is started in the same folder; the first must end as if it had been alone."""
    first = start(folder, fault=functools.partial(at_step, 2, _wait_for_release))
    wait_for_file(folder / WAITING, first)
    (folder / OUTPUT).rename(folder / "first.txt")
    assert run(folder) == 1
    (folder / RELEASE).touch()
    assert finish(first) == 0, (folder / "first.txt").read_text()
    return Outcome(False, 0, result_of(folder) == expected, output_of(folder))


def _wait_for_release(trainer) -> None:
    Path(WAITING).touch()
    wait_for_file(Path(RELEASE))


# ---- corrupted files


def truncate(path: Path) -> None:
    """cut in half"""
    os.truncate(path, path.stat().st_size // 2)


def zero(path: Path) -> None:
    """zeroed"""
    path.write_bytes(bytes(path.stat().st_size))


def flip_bit(path: Path) -> None:
    """one bit flipped"""
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 4
    path.write_bytes(contents)


def remove(path: Path) -> None:
    """missing"""
    path.unlink()


CORRUPTIONS = (truncate, zero, flip_bit, remove)


def corrupt(folder: Path, interrupted: Path, expected: dict, name: str, how: Callable[[Path], None]) -> Outcome:
    """One file of the newest checkpoint of an interrupted run is corrupted."""
    shutil.copytree(interrupted, folder)
    how(folder / "run" / "checkpoint-6" / name)
    outcome = resume(folder, expected)
    assert "resuming from run/checkpoint-3" in output_of(folder), output_of(folder)
    return outcome


def checkpoint_files(interrupted: Path) -> list[str]:
    newest = checkpoints_in(interrupted / "run")[0]
    assert step_of(newest) == 6
    return sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())


# ---- memory and numbers


def run_out_of_memory(folder: Path, is_training: bool) -> Outcome:
    """The run halves its micro-batch by itself. Dropout then draws other masks, so that the end is another."""
    status = run(folder, functools.partial(at_step, 1, functools.partial(_limit_images, is_training)))
    output = output_of(folder)
    return Outcome(status != 0 or "out of memory" not in output, 0, None, output)


def _limit_images(is_training: bool, trainer) -> None:
    import torch

    def refuse(module, args, inputs) -> None:
        images = inputs.get("pixel_values", ())
        if module.training == is_training and len(images) > (4 if is_training else 7):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

    trainer.model.get_base_model().model.register_forward_pre_hook(refuse, with_kwargs=True)


def skip_non_finite_step(folder: Path) -> Outcome:
    status = run(folder, functools.partial(at_step, 5, _poison), [*RUN, "--max-skipped-steps", "1"])
    output = output_of(folder)
    return Outcome(status != 0 or "1 of 12 steps were skipped (1 not finite)" not in output, 0, None, output)


def stop_at_non_finite_step(folder: Path, expected: dict) -> Outcome:
    """The run stops at step 7 with the ids of its samples; without the fault it resumes from step 6."""
    assert run(folder, _poison_steps_7_to_9) == 1
    outcome = resume(folder, expected)
    assert "step 7: loss nan" in outcome.output and "samples: train-" in outcome.output, outcome.output
    return outcome


def _poison_steps_7_to_9() -> None:
    for step in (7, 8, 9):
        at_step(step, _poison)


def _poison(trainer) -> None:
    head = trainer.model.get_base_model().lm_head
    hook = head.register_forward_hook(lambda *args: (hook.remove(), args[-1] * float("nan"))[1])


# ---- disks and files


class Mounted:
    """A small disk of its own under a folder's run/. Raises CalledProcessError where that is not permitted."""

    def __init__(self, folder: Path):
        self.run = folder / "run"
        self.run.mkdir(parents=True)
        self._mount("-t", "tmpfs", "-o", "size=300m", "tmpfs", str(self.run))

    @staticmethod
    def _mount(*words: str) -> None:
        subprocess.run(["mount", *words], check=True, capture_output=True)

    def remount(self, mode: str) -> None:
        self._mount("-o", f"remount,{mode}", str(self.run))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        subprocess.run(["umount", "-l", str(self.run)], check=True)


def fill_disk(folder: Path, expected: dict) -> Outcome:
    with Mounted(folder) as disk:
        assert run(folder, functools.partial(at_step, 5, _fill)) == 1, output_of(folder)
        (disk.run / "ballast").unlink()
        outcome = resume(folder, expected)
    assert "free space and re-run the same command" in outcome.output and "Traceback" not in outcome.output
    return outcome


def _fill(trainer) -> None:
    with open("run/ballast", "wb") as file:
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError:
            pass


def make_read_only(folder: Path, interrupted: Path, expected: dict) -> Outcome:
    with Mounted(folder) as disk:
        shutil.copytree(interrupted, folder, dirs_exist_ok=True)
        disk.remount("ro")
        assert run(folder) == 1, output_of(folder)
        disk.remount("rw")
        return resume(folder, expected)


def shrink_shared_memory(folder: Path, expected: dict) -> Outcome:
    status = run(folder, _mount_small_shared_memory)
    output = output_of(folder)
    is_reported = "images are decoded by the main process instead" in output
    return Outcome(status != 0 or not is_reported, 0, result_of(folder) == expected, output)


def _mount_small_shared_memory() -> None:
    """In the run's process alone: /dev/shm of 8 MB (Docker's 64 MB would do for this small model)."""
    import ctypes

    if ctypes.CDLL(None, use_errno=True).unshare(0x00020000):  # CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", "/dev/shm"], check=True)


def remove_image(folder: Path) -> Outcome:
    """An image of an image folder is deleted during the run: it is reported, and the run ends without it."""
    from PIL import Image

    for index, name in enumerate(("oak", "ash")):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(30):
            color = (90 * index, 4 * number, 90)
            Image.new("RGB", (40 + number, 30), color).save(folder / "images" / name / f"{number}.png")
    argv = [*RUN, "--dataset", "images", "--max-bad-fraction", "0.1"]
    status = run(folder, functools.partial(at_step, 5, _remove_image), argv)
    output = output_of(folder)
    is_reported = "image skipped (1 of train so far): oak/0.png" in output and "cannot be read (No such file" in output
    return Outcome(status != 0 or not is_reported, 0, None, output)


def _remove_image(trainer) -> None:
    Path("images/oak/0.png").unlink()


# ---- leaks

RESOURCES = "resources.jsonl"


def measure_resources(folder: Path, steps: int, every: int) -> list[dict]:
    """What a run holds every so many steps, each time with an evaluation and two checkpoints."""
    argv = [*RUN, "--max-steps", f"{steps}", "--save-steps", f"{every // 2}", "--eval-steps", f"{every}"]
    assert run(folder, functools.partial(_watch_resources, steps, every), argv, TIMEOUT_S + steps) == 0, output_of(
        folder
    )
    return [json.loads(line) for line in (folder / RESOURCES).read_text().splitlines()]


def _watch_resources(steps: int, every: int) -> None:
    for step in range(every, steps + 1, every):
        at_step(step, _note_resources)


def _note_resources(trainer) -> None:
    me = psutil.Process()
    found = {"step": trainer.state.global_step + 1, "mb": me.memory_info().rss / 1e6, "files": me.num_fds()}
    found |= {"processes": len(me.children(recursive=True)), "threads": me.num_threads()}
    with open(RESOURCES, "a") as file:
        file.write(json.dumps(found) + "\n")


# ---- docs/faults.md


def write_table(page: Path, name: str, rows: list[str]) -> None:
    """Between the marks of this name."""
    marks = f"<!-- {name}: written by make faults -->", f"<!-- end of {name} -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(marks[0])
    _, _, after = rest.partition(marks[1])
    page.write_text("\n".join([f"{before}{marks[0]}", *rows, f"{marks[1]}{after}"]), encoding="utf-8")
