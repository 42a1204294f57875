"""Faults, injected into real runs of train.py: what is lost, and is the end the same as of a run without the fault?

    make faults        all of them, many times; writes the table of docs/faults.md

Each run is a process of its own, forked from one that has imported everything. The run: the tiny model with dropout on
its adapter, 12 steps, a checkpoint every 3, an evaluation every 4, images decoded by a worker.
"""

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

ROOT = Path(__file__).parents[2]
STEPS, SAVES = 12, 3
RUN = [
    *("--preset", "tiny", "--output-dir", "run", "--trainable", "adapter", "--lora-dropout", "0.2"),
    *("--max-steps", f"{STEPS}", "--save-steps", f"{SAVES}", "--eval-steps", "4", "--num-workers", "1"),
]
ORDER = "order.jsonl"  # what the trainer was given: {"step", "ids"} a line
SCREEN = "screen.txt"
PATIENCE = 240  # seconds after which a run hangs


class Outcome(NamedTuple):
    """How a run that met a fault ended, after the same command was given again."""

    lost: bool  # it did not come to its end
    steps: int  # that had to be done once more
    same: bool | None  # weights, optimizer, order of images and losses are those of the run without fault; None: n/a
    told: str  # on the screen, at the fault


# ---- runs


def context():
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["train", "models.trainer", "models.builder", "evaluation.evaluator", "data.dataset"])
    return found


def start(folder: Path, argv: Sequence[str] = RUN, fault: Callable[[], None] | None = None):
    """train.py as a process in `folder`; `fault` is called in it before."""
    folder.mkdir(parents=True, exist_ok=True)
    process = context().Process(target=_train, args=(str(folder), list(argv), fault))
    process.start()
    return process


def finish(process) -> int:
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{process} did not end within {PATIENCE} s")
    return process.exitcode


def _train(folder: str, argv: list[str], fault: Callable[[], None] | None) -> None:
    import torch

    multiprocessing.set_start_method("fork", force=True)  # of loaders' workers, as if train.py had been run
    torch.set_num_threads(1)  # two runs at once would wait for each other's threads
    os.chdir(folder)
    with open(SCREEN, "w") as screen:
        os.dup2(screen.fileno(), 1)
        os.dup2(screen.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    from data import dataset
    from models.trainer import PlantTrainer
    from train import main

    for split, count in {"train": 48, "validation": 20, "test": 20}.items():
        dataset.SPLIT_SIZES[split] = count
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
    sys.exit(main(argv))


def at_step(step: int, action: Callable) -> None:
    """In the run's process: `action(trainer)` when this step begins."""
    from models.trainer import PlantTrainer

    real = PlantTrainer.training_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step + 1 == step:
            action(self)
        return real(self, model, inputs, num_items_in_batch)

    PlantTrainer.training_step = training_step


# ---- what a run came to


def end_of(folder: Path) -> dict:
    """Whatever must be equal: bytes of weights, tensors of the optimizer, order of images, losses of each step."""
    import torch

    run = folder / "run"
    last = run / f"checkpoint-{STEPS}"
    lines = [(line["step"], line.get("loss"), line.get("eval_loss")) for line in read_metrics(run)]
    order = {entry["step"]: entry["ids"] for entry in map(json.loads, (folder / ORDER).read_text().splitlines())}
    moments = torch.load(last / "optimizer.pt", weights_only=True)["state"]
    return {
        "weights": [(place / "adapter_model.safetensors").read_bytes() for place in (last, run / "best")],
        "optimizer": {key: {name: value.tolist() for name, value in one.items()} for key, one in moments.items()},
        "order": order,
        "steps": lines,
    }


def steps_done(folder: Path) -> int:
    return max((line["step"] for line in read_metrics(folder / "run") if "loss" in line), default=0)


def screen_of(folder: Path) -> str:
    return (folder / SCREEN).read_text(errors="replace") if (folder / SCREEN).exists() else ""


def go_on(folder: Path, expected: dict | None, argv: Sequence[str] = RUN) -> Outcome:
    """The same command again, after a fault."""
    told, done = screen_of(folder), steps_done(folder)
    status = finish(start(folder, argv))
    found = re.search(r"resuming from \S+checkpoint-(\d+)", screen_of(folder))
    lost = status != 0 or not any(line.get("completed") for line in read_metrics(folder / "run"))
    again = 0 if "is finished" in screen_of(folder) else max(done - (int(found[1]) if found else 0), 0)
    return Outcome(lost, again, None if expected is None or lost else end_of(folder) == expected, told)


def undisturbed(folder: Path, argv: Sequence[str] = RUN) -> tuple[dict, float]:
    """(its end, seconds it took)"""
    began = time.perf_counter()
    assert finish(start(folder, argv)) == 0, screen_of(folder)
    return end_of(folder), time.perf_counter() - began


def wait_for(process, condition: Callable[[], bool]) -> bool:
    """Until then, or the end of the process; whether it came."""
    while process.exitcode is None:
        if condition():
            return True
        time.sleep(0.001)
    return False


# ---- faults: each takes an empty folder and what is expected, and returns an Outcome


def kill_at(folder: Path, expected: dict, seconds: float) -> Outcome:
    process = start(folder)
    process.join(seconds)
    process.kill()
    process.join()
    return go_on(folder, expected)


def kill_in_save(folder: Path, expected: dict, draw: random.Random) -> Outcome | None:
    """None if the save was over before the kill came."""
    target = folder / "run" / f"checkpoint-{draw.choice(range(SAVES, STEPS + 1, SAVES))}"
    process = start(folder)
    wait_for(process, target.exists)
    time.sleep(draw.uniform(0, 0.06))
    process.kill()
    process.join()
    return None if (target / "manifest.json").exists() else go_on(folder, expected)


def signal_at(folder: Path, expected: dict, number: int, draw: random.Random) -> tuple[Outcome, float]:
    """(outcome, seconds until the process ended) of a signal at a random step."""
    step = draw.randrange(1, STEPS)
    process = start(folder)
    wait_for(process, lambda: steps_done(folder) >= step)
    time.sleep(draw.uniform(0, 0.1))
    began = time.perf_counter()
    os.kill(process.pid, number)
    status = finish(process)
    seconds = time.perf_counter() - began
    assert status == 128 + number, (status, screen_of(folder))
    return go_on(folder, expected), seconds


def slow_save() -> None:
    """In the run's process: a save that takes longer than anyone waits."""
    from runtime import checkpoint

    checkpoint.write_manifest.__globals__["sync"] = lambda path: time.sleep(60)


def second_interrupt(folder: Path, expected: dict) -> tuple[Outcome, float]:
    """(outcome, seconds until the end after the second Ctrl-C, which comes while the first one's save hangs)"""
    process = start(folder, fault=slow_save)
    wait_for(process, lambda: steps_done(folder) >= 2)
    os.kill(process.pid, signal.SIGINT)
    wait_for(process, lambda: "stopping after this forward pass" in screen_of(folder))
    time.sleep(1)
    assert process.exitcode is None
    began = time.perf_counter()
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == -signal.SIGINT
    seconds = time.perf_counter() - began
    return go_on(folder, expected), seconds


def die_at_8() -> None:
    at_step(9, lambda trainer: os._exit(9))


def half_done(folder: Path) -> None:
    """A run that died after step 8, with checkpoints of steps 3 and 6."""
    assert finish(start(folder, fault=die_at_8)) == 9, screen_of(folder)


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


DAMAGES = (truncate, zero, flip_bit, remove)


def damage(folder: Path, half: Path, expected: dict, name: str, how: Callable[[Path], None]) -> Outcome:
    """The newest checkpoint of a half-done run is damaged in one file."""
    shutil.copytree(half, folder)
    how(folder / "run" / "checkpoint-6" / name)
    outcome = go_on(folder, expected)
    assert "resuming from run/checkpoint-3" in screen_of(folder), screen_of(folder)
    return outcome


def cramp_step() -> None:
    from tests.unit.test_trainer import Cramped

    at_step(5, lambda trainer: Cramped(trainer.model.get_base_model(), room=4))


def cramp_evaluation() -> None:
    import torch

    from models import scoring

    real = scoring._score_images

    def score(base, input_ids, *args):
        if len(input_ids) > 7:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(base, input_ids, *args)

    scoring._score_images = score


def poison(steps: Sequence[int]) -> None:
    for step in steps:
        at_step(step, _poison_once)


def _poison_once(trainer) -> None:
    head = trainer.model.get_base_model().lm_head
    hook = head.register_forward_hook(lambda *args: (hook.remove(), args[-1] * float("nan"))[1])


def poison_one() -> None:
    poison([5])


def poison_three() -> None:
    poison([7, 8, 9])


def worker_killed(folder: Path, expected: dict) -> Outcome:
    process = start(folder)
    wait_for(process, lambda: steps_done(folder) >= 4)
    for worker in psutil.Process(process.pid).children():
        worker.kill()
    assert finish(process) == 1, screen_of(folder)
    return go_on(folder, expected)


def fill_disk() -> None:
    at_step(5, _fill)


def _fill(trainer) -> None:
    with open("run/ballast", "wb") as file:
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError:
            pass


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


def disk_full(folder: Path, expected: dict) -> Outcome:
    with Mounted(folder) as disk:
        assert finish(start(folder, fault=fill_disk)) == 1, screen_of(folder)
        (disk.run / "ballast").unlink()
        return go_on(folder, expected)


def read_only(folder: Path, half: Path, expected: dict) -> Outcome:
    with Mounted(folder) as disk:
        shutil.copytree(half, folder, dirs_exist_ok=True)
        disk.remount("ro")
        assert finish(start(folder)) == 1, screen_of(folder)
        disk.remount("rw")
        return go_on(folder, expected)


def small_shared_memory() -> None:
    """In the run's process alone: /dev/shm of 8 MB (Docker's 64 MB would do for this small model)."""
    import ctypes

    if ctypes.CDLL(None, use_errno=True).unshare(0x00020000):  # CLONE_NEWNS
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", "/dev/shm"], check=True)


def two_at_once(folder: Path, expected: dict) -> Outcome:
    """Another training is begun in the folder meanwhile; the first must end as if it had been alone."""
    first = start(folder)
    wait_for(first, lambda: steps_done(folder) >= 1)
    (folder / SCREEN).rename(folder / "first.txt")
    second = start(folder)
    assert finish(second) == 1
    told = screen_of(folder)
    assert finish(first) == 0, (folder / "first.txt").read_text()
    return Outcome(False, 0, end_of(folder) == expected, told)


def own_images(folder: Path) -> list[str]:
    """A folder of images, and the command that trains on them."""
    from PIL import Image

    for index, name in enumerate(("oak", "ash")):
        (folder / "images" / name).mkdir(parents=True)
        for image in range(30):
            color = (90 * index, 4 * image, 90)
            Image.new("RGB", (40 + image, 30), color).save(folder / "images" / name / f"{image}.png")
    return [*RUN, "--dataset", "images", "--max-unreadable-fraction", "0.1"]


def vanish() -> None:
    at_step(5, lambda trainer: Path("photos/oak/0.png").unlink())


def vanished(folder: Path) -> Outcome:
    """An image of an image folder is deleted while the run goes on: it is named, and the run ends without it."""
    argv = own_images(folder)
    status = finish(start(folder, argv, vanish))
    told = screen_of(folder)
    is_named = "image skipped (1 of train so far): oak/0.png" in told and "cannot be read (No such file" in told
    return Outcome(status != 0 or not is_named, 0, None, told)


def cramped_shared_memory(folder: Path, expected: dict) -> Outcome:
    status = finish(start(folder, fault=small_shared_memory))
    told = screen_of(folder)
    is_told = "images are decoded by the training process instead" in told
    return Outcome(status != 0 or not is_told, 0, end_of(folder) == expected, told)


def redone(folder: Path, fault: Callable[[], None]) -> Outcome:
    """Out of memory: the run steps down by itself. In other pieces dropout draws other masks, so the end is another."""
    status = finish(start(folder, fault=fault))
    told = screen_of(folder)
    return Outcome(status != 0 or "out of memory" not in told, 0, None, told)


def skipped(folder: Path) -> Outcome:
    status = finish(start(folder, [*RUN, "--max-skipped-steps", "1"], poison_one))
    told = screen_of(folder)
    return Outcome(status != 0 or "1 of 12 steps were skipped (1 not finite)" not in told, 0, None, told)


def stopped(folder: Path, expected: dict) -> Outcome:
    """The run stops at step 7 with its samples named, and without the fault goes on from step 6."""
    assert finish(start(folder, fault=poison_three)) == 1
    told = screen_of(folder)
    assert "step 7: loss nan" in told and "samples: train-" in told, told
    return go_on(folder, expected)


LEAKS = "leaks.jsonl"


def watch_resources() -> None:
    """In the run's process: what it holds, every 100 steps."""
    for step in range(100, 2001, 100):
        at_step(step, _note_resources)


def _note_resources(trainer) -> None:
    me = psutil.Process()
    found = {"step": trainer.state.global_step + 1, "mb": me.memory_info().rss / 1e6, "files": me.num_fds()}
    found |= {"processes": len(me.children(recursive=True)), "threads": me.num_threads()}
    with open(LEAKS, "a") as file:
        file.write(json.dumps(found) + "\n")


def resources(folder: Path) -> list[dict]:
    """Of a run of 2,000 steps with an evaluation every 100 and a checkpoint every 50."""
    argv = [*RUN, "--max-steps", "2000", "--save-steps", "50", "--eval-steps", "100"]
    process = start(folder, argv, watch_resources)
    process.join()
    assert process.exitcode == 0, screen_of(folder)
    return [json.loads(line) for line in (folder / LEAKS).read_text().splitlines()]


def checkpoint_files(half: Path) -> list[str]:
    newest = checkpoints_in(half / "run")[0]
    assert step_of(newest) == 6
    return sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())
