"""Random faults of many kinds, each with its own check of what came of it.

A try is a function of (folder, base, draw): it breaks something in a run of its own, runs the program, and gives the
words of its outcome. It raises Failure for a traceback on the screen, a hang, or something wrong without a word.
"""

import errno
import functools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from runtime.run_files import checkpoints_in, is_completed
from tests.faults import injection
from tests.faults.corpus import contents
from tests.faults.injection import RUN, STEPS, at_step, finish, output_of, start

IDENTICAL = "ended bit-identical"  # to a run without the fault, or: gave the same answers
COMPLETED = "ended well"  # where nothing can be compared
REFUSED = "refused in a sentence"
PREDICT = ("run", "image.png", "--json")
STOP_S = 20  # seconds after which a stop that was asked for is a hang


class Failure(AssertionError):
    """A try that ended in a traceback, a hang or something wrong without a word."""


class Base(NamedTuple):
    """Runs that a try may copy."""

    completed: Path  # folder of a completed run, with image.png
    interrupted: Path  # of one that died after step 8
    result: dict  # of the completed run
    seconds: float  # that it took
    answer: str  # of predict.py on image.png


def make_base(folder: Path) -> Base:
    completed, interrupted = folder / "completed", folder / "interrupted"
    result, seconds = injection.run_undisturbed(completed)
    injection.run_to_step_8(interrupted)
    Image.linear_gradient("L").convert("RGB").save(completed / "image.png")
    return Base(completed, interrupted, result, seconds, predict(completed)[1])


# ---- what is wrong whatever was broken


def screen_of(folder: Path, status: int, fault: str) -> str:
    """All that a script printed; Failure for a traceback, or an error without a sentence."""
    output = output_of(folder)
    for sign in ("Traceback (most recent call last)", "--- Logging error", "Exception ignored", "Fatal Python error"):
        if sign in output:
            raise Failure(f"traceback after {fault}:\n{output[-3000:]}")
    if status > 0 and "error: " not in output and "interrupted" not in output:
        raise Failure(f"exit status {status} without a sentence after {fault}:\n{output[-3000:]}")
    return output


def script(folder: Path, name: str, argv, fault: str, inject: Callable | None = None) -> tuple[int, str]:
    """(exit status, screen)"""
    try:
        status = finish(start(folder, argv, inject, name))
    except TimeoutError as error:
        raise Failure(f"hang after {fault}: {error}\n{output_of(folder)[-3000:]}") from error
    return status, screen_of(folder, status, fault)


def predict(folder: Path, fault: str = "nothing") -> tuple[int, str]:
    """(exit status, the answer or the screen where there is none)"""
    status, screen = script(folder, "predict", PREDICT, fault)
    answers = [line for line in screen.splitlines() if line.startswith("{")]
    return status, answers[0] if answers else screen


def resumed(folder: Path, base: Base, fault: str) -> str:
    """The same command again ends as the run without a fault did."""
    status, screen = script(folder, "train", RUN, f"{fault}, then the same command")
    if status or not is_completed(folder / "run"):
        raise Failure(f"lost: {fault}, and the same command ends with {status}:\n{screen[-3000:]}")
    if injection.result_of(folder) != base.result:
        raise Failure(f"silent: {fault}, and the run ends with other weights, order or losses")
    return IDENTICAL


# ---- kinds: the run is disturbed


def stop_at_random(folder: Path, base: Base, draw: random.Random) -> str:
    number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    after = draw.uniform(0.05, base.seconds)
    fault = f"{number.name} after {after:.2f} s"
    process = start(folder)
    process.join(after)
    if process.exitcode is None:
        os.kill(process.pid, number)
    try:
        status = finish(process, STOP_S)
    except TimeoutError as error:
        raise Failure(f"hang: {fault}: not ended {STOP_S} s later\n{output_of(folder)[-3000:]}") from error
    if status not in (0, 128 + number, -number):
        raise Failure(f"exit status {status} after {fault}:\n{output_of(folder)[-3000:]}")
    screen_of(folder, 0, fault)
    return resumed(folder, base, fault)


def kill_in_save(folder: Path, base: Base, draw: random.Random) -> str:
    if injection.kill_in_save(folder, base.result, draw).same is not True:
        raise Failure("silent: kill -9 inside a save, and the run ends otherwise")
    return IDENTICAL


ERRORS = ("EIO", "ESTALE", "ENOSPC", "EDQUOT", "EFBIG", "ENOTCONN", "EROFS", "EACCES", "EMFILE", "ENFILE", "ETIMEDOUT")


def fail_at_a_file(folder: Path, base: Base, draw: random.Random) -> str:
    """The system refuses one operation on a file or folder of the run, or all from then on."""
    name, count, lasts = draw.choice(ERRORS), draw.randrange(1, 160), draw.random() < 0.5
    fault = f"{name} at operation {count} in the run folder{' and all later ones' if lasts else ''}"
    status, screen = script(folder, "train", RUN, fault, functools.partial(_refuse_files, name, count, lasts))
    if status not in (0, 1):
        raise Failure(f"exit status {status} after {fault}:\n{screen[-3000:]}")
    return resumed(folder, base, fault)


def _refuse_files(name: str, count: int, lasts: bool) -> None:
    number, pid, seen = getattr(errno, name), os.getpid(), []

    def watch(event: str, arguments: tuple) -> None:
        if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.scandir", "os.truncate", "os.listdir"):
            return
        path = str(arguments[0])
        if os.getpid() == pid and (path.startswith("run") or "/run/" in path):
            seen.append(event)
            if len(seen) == count or (lasts and len(seen) > count):
                raise OSError(number, os.strerror(number), path)

    sys.addaudithook(watch)


def hurt_worker(folder: Path, base: Base, draw: random.Random) -> str:
    """The loader's worker is killed; or suspended, and the run is asked to stop."""
    step, is_killed = draw.randrange(2, STEPS), draw.random() < 0.5
    fault = f"worker {'killed' if is_killed else 'suspended'} at step {step}"
    number = signal.SIGKILL if is_killed else signal.SIGSTOP
    process = start(folder, fault=functools.partial(at_step, step, functools.partial(_signal_children, number)))
    if is_killed:
        finish(process)
    else:
        injection.wait_for_file(folder / injection.WAITING, process)
        time.sleep(draw.uniform(0, 1))
        os.kill(process.pid, signal.SIGTERM)
        try:
            finish(process, STOP_S)
        except TimeoutError as error:
            raise Failure(f"hang: {fault}, then SIGTERM\n{output_of(folder)[-3000:]}") from error
    screen_of(folder, process.exitcode, fault)
    return resumed(folder, base, fault)


def _signal_children(number: int, trainer) -> None:
    import psutil

    for worker in psutil.Process().children():
        worker.send_signal(number)
    Path(injection.WAITING).touch()


def move_run_folder(folder: Path, base: Base, draw: random.Random) -> str:
    step, how = draw.randrange(1, STEPS + 1), draw.choice(["moved", "replaced by a file"])
    fault = f"run folder {how} at step {step}"
    status, screen = script(
        folder, "train", RUN, fault, functools.partial(at_step, step, functools.partial(_move, how))
    )
    if status == 0 and not is_completed(folder / "run"):
        raise Failure(f"silent: {fault}, and exit status 0:\n{screen[-3000:]}")
    if (folder / "moved").exists():
        if (folder / "run").is_dir():
            shutil.rmtree(folder / "run")
        (folder / "run").unlink(missing_ok=True)
        (folder / "moved").rename(folder / "run")
    return resumed(folder, base, fault)


def _move(how: str, trainer) -> None:
    os.rename("run", "moved")
    if how != "moved":
        Path("run").write_text("no folder")


SURROUNDINGS = {
    "MPLBACKEND": ["TkAgg", "module://nothing", "x", ""],
    "ACCELERATE_USE_DEEPSPEED": ["true"],
    "ACCELERATE_USE_FSDP": ["true"],
    "ACCELERATE_MIXED_PRECISION": ["bf16", "fp8", "x"],
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ["4", "x"],
    "ACCELERATE_DYNAMO_BACKEND": ["INDUCTOR", "x"],
    "ACCELERATE_USE_CPU": ["false", "x"],
    "WORLD_SIZE": ["1", "4", "x", ""],
    "RANK": ["0", "3", "x"],
    "LOCAL_RANK": ["0", "2", "x"],
    "MASTER_PORT": ["x"],
    "HOME": ["/nowhere", "", "/proc"],
    "HF_HOME": ["/nowhere", "/proc", "relative"],
    "TMPDIR": ["/nowhere", "/proc"],
    "XDG_CACHE_HOME": ["/proc"],
    "MPLCONFIGDIR": ["/proc"],
    "CUDA_VISIBLE_DEVICES": ["", "-1", "99", "x"],
    "OMP_NUM_THREADS": ["x", "0", "-1"],
    "TOKENIZERS_PARALLELISM": ["x"],
    "TRANSFORMERS_VERBOSITY": ["debug", "x"],
    "LC_ALL": ["C", "POSIX", "xx_XX"],
    "PYTHONWARNINGS": ["default"],
    "COLUMNS": ["x", "0"],
    "TERM": ["", "dumb"],
    "WANDB_MODE": ["x"],
}


def change_surroundings(folder: Path, base: Base, draw: random.Random) -> str:
    """A fresh process, since libraries read most of it while they are imported."""
    import subprocess

    names = draw.sample(sorted(SURROUNDINGS), draw.randrange(1, 3))
    changed = {name: draw.choice(SURROUNDINGS[name]) for name in names}
    folder.mkdir()
    code = "import sys; from tests.faults.injection import _run; _run('.', 'train', sys.argv[1:], None)"
    root = str(Path(__file__).parents[2])
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": root} | changed
    command = [sys.executable, "-c", code, *RUN]
    try:
        status = subprocess.run(command, cwd=folder, env=environment, timeout=injection.TIMEOUT_S).returncode
    except subprocess.TimeoutExpired as error:
        raise Failure(f"hang with {changed}\n{output_of(folder)[-3000:]}") from error
    screen_of(folder, status, f"{changed}")
    if status:
        return REFUSED
    if injection.result_of(folder) != base.result:
        raise Failure(f"silent: {changed}, and the run ends with other weights, order or losses")
    return IDENTICAL


# ---- kinds: files of a run are corrupted


def corrupt(path: Path, draw: random.Random) -> str:
    """What was done to the file."""
    data = bytearray(path.read_bytes())
    how = draw.choice(
        ["cut", "zeroed page", "bit flipped", "bytes inserted", "emptied", "removed", "a folder", "a link"]
    )
    place = draw.randrange(len(data)) if data else 0
    if how == "cut":
        path.write_bytes(data[:place])
    elif how == "zeroed page":
        data[place : place + 4096] = bytes(len(data[place : place + 4096]))
        path.write_bytes(data)
    elif how == "bit flipped" and data:
        data[place] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
    elif how == "bytes inserted":
        path.write_bytes(data[:place] + draw.randbytes(draw.randrange(1, 9)) + data[place:])
    elif how == "emptied":
        path.write_bytes(b"")
    else:
        path.unlink()
        if how == "a folder":
            path.mkdir()
        elif how == "a link":
            path.symlink_to("/etc/hostname")
    return f"{path.relative_to(path.parents[1])} {how}"


def corrupt_checkpoint(folder: Path, base: Base, draw: random.Random) -> str:
    shutil.copytree(base.interrupted, folder)
    newest = checkpoints_in(folder / "run")[0]
    return resumed(folder, base, corrupt(draw.choice(files_below(newest)), draw))


def corrupt_best(folder: Path, base: Base, draw: random.Random) -> str:
    """predict.py gives the same answer or refuses; the same command mends it."""
    shutil.copytree(base.completed, folder)
    fault = corrupt(draw.choice(files_below(folder / "run" / "best")), draw)
    status, answer = predict(folder, fault)
    if status == 0 and answer != base.answer:
        raise Failure(f"silent: {fault}, and another answer: {answer} for {base.answer}")
    status, screen = script(folder, "train", RUN, f"{fault}, then the same command")
    if status:
        raise Failure(f"lost: {fault}, and the same command ends with {status}:\n{screen[-3000:]}")
    status, answer = predict(folder, f"{fault}, then the same command")
    if status or answer != base.answer:
        raise Failure(f"lost: {fault}, and the same command does not mend it: {answer}")
    return IDENTICAL


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


ODD_VALUES = (None, True, -1, 0, 1e400, -0.5, "", "x", [], {}, [None], {"a": None}, 10**30, "\x00", ["x", "x"])


def change_json(path: Path, draw: random.Random) -> str:
    """A value somewhere in a JSON or JSONL file becomes an odd one, or the text itself is not what it should be."""
    text = path.read_text()
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    index = draw.randrange(len(lines))
    if draw.random() < 0.25:
        deep = 200_000
        odd = {
            "nested": "[" * deep + "]" * deep,
            "utf-16": None,
            "list": "[]",
            "null": "null",
            "torn": text[: len(text) // 2],
        }
        how = draw.choice(sorted(odd))
        path.write_bytes(text.encode("utf-16") if how == "utf-16" else odd[how].encode())
        return f"{path.name} {how}"
    value = json.loads(lines[index])
    places = list(_places(value))
    holder, key = draw.choice(places)
    old, new = holder[key], draw.choice(ODD_VALUES)
    if draw.random() < 0.2 and isinstance(holder, dict):
        del holder[key]
        new = "missing"
    else:
        holder[key] = new
    lines[index] = json.dumps(value)
    path.write_text("\n".join(lines) + "\n")
    return f"{path.name}, {key}: {new!r} in place of {str(old)[:40]!r}"


def _places(value):
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from _places(inner)


READ_BY_SCRIPTS = ("training_config.json", "eval_val.json", "metrics.jsonl", "eval_val.scores.jsonl", "best/best.json")


def change_state(folder: Path, base: Base, draw: random.Random) -> str:
    """A JSON file of a completed run is odd: predict.py, evaluate.py or the same command says so, or is as before."""
    shutil.copytree(base.completed, folder)
    found = [path for path in files_below(folder / "run") if path.suffix in (".json", ".jsonl")]
    known = [
        path for path in found if str(path.relative_to(folder / "run")) in READ_BY_SCRIPTS or path.parent.name == "run"
    ]
    fault = change_json(draw.choice(known), draw)
    outcome = REFUSED
    status, answer = predict(folder, fault)
    if status == 0:
        outcome = IDENTICAL
        if answer != base.answer and "warning: " not in output_of(folder):
            raise Failure(f"silent: {fault}, and another answer: {answer} for {base.answer}")
    for name, argv in (("evaluate", ["run", "--num-workers", "0"]), ("train", RUN)):
        if draw.random() < 0.5:
            script(folder, name, argv, fault)
    return outcome


# ---- kinds: data


ODD_NAMES = (
    "Ba$$in", "rose $^$ x", "oak | white", "<b>bold</b>", "# head", "a\tb", "*star*", "[x](y)", "{{ x }}", "{% if %}",
    "\u9e22\u5c3e", "\u0627\u0644\u0648\u0631\u062f", "\U0001f33b", "na\u0131ve \u00e9t\u00e9", "x" * 200, "---",
    "- list", ": colon", "'quote\"", "%s %d", "null", "true", "1e5", "CON", "&amp;", "`tick`", "\\back\\slash", "$",
    "_", "~", "@home", "!bang", "\u200bzero", "a  b",
)  # fmt: skip


def name_classes_oddly(folder: Path, base: Base, draw: random.Random) -> str:
    names = draw.sample(ODD_NAMES, draw.randrange(2, 5))
    make_images(folder, names, draw)
    return trained(folder, f"classes {names}")


def garble_images(folder: Path, base: Base, draw: random.Random) -> str:
    """Some images are of kinds that cannot be read: with --max-bad-fraction 1 the run ends without them."""
    made = make_images(folder, ["ash", "oak"], draw)
    odd = [data for data, _ in contents().values()]
    count = draw.randrange(1, 5)
    for path in draw.sample(made, count):
        path.write_bytes(draw.choice(odd) if draw.random() < 0.7 else path.read_bytes()[: draw.randrange(200)])
    return trained(folder, f"{count} odd images", "--max-bad-fraction", "1")


def make_images(folder: Path, names: list[str], draw: random.Random) -> list[Path]:
    made = []
    for index, name in enumerate(names):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(10):
            path = folder / "images" / name / f"{number}.png"
            Image.new("RGB", (40 + number, 30 + index), (60 * index, 20 * number, draw.randrange(256))).save(path)
            made.append(path)
    return made


def trained(folder: Path, fault: str, *more: str) -> str:
    argv = [*RUN, "--dataset", "images", "--max-steps", "2", "--eval-steps", "none", *more]
    status, _ = script(folder, "train", argv, fault)
    if status == 0 and not (is_completed(folder / "run") and (folder / "run" / "eval_val.md").exists()):
        raise Failure(f"silent: {fault}: exit status 0 without a report")
    return REFUSED if status else COMPLETED


ODD_LABELS = (-1, 7, None, 0.5, "oak", [1], 2**40, True)


def change_table(folder: Path, base: Base, draw: random.Random) -> str:
    """Odd labels or images in a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = make_images(folder, ["ash", "oak"], draw)
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
    labels: list = [index // 10 for index in range(20)]
    shutil.rmtree(folder / "images")
    what = draw.choice(["label", "image"])
    if what == "label":
        odd = draw.choice(ODD_LABELS)
        if (isinstance(odd, int | float) and not isinstance(odd, bool)) or odd is None:
            labels[draw.randrange(20)] = odd
        else:
            labels = [odd for _ in labels]
    else:
        odd = draw.choice(
            [
                None,
                {"bytes": None, "path": "/etc/hostname"},
                {"bytes": b"", "path": None},
                {"bytes": b"x" * 99, "path": "../x"},
            ]
        )
        images[draw.randrange(20)] = odd
    (folder / "images").mkdir()
    table = pa.table(
        {
            "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "label": pa.array(labels),
        }
    )
    pq.write_table(table, folder / "images" / "train-00000-of-00001.parquet")
    outcome = trained(folder, f"{what} {odd}", "--max-bad-fraction", "1")
    if outcome == COMPLETED and what == "label" and odd == -1 and not re.search("label", output_of(folder)):
        raise Failure("silent: label -1 is learned")
    return outcome


class Kind(NamedTuple):
    label: str
    inject: Callable[[Path, Base, random.Random], str]


KINDS = [
    Kind("kill -9, SIGTERM, SIGINT, SIGHUP at a random moment", stop_at_random),
    Kind("kill -9 inside a save", kill_in_save),
    Kind("the system refuses a file operation", fail_at_a_file),
    Kind("a loader's worker killed or suspended", hurt_worker),
    Kind("run folder moved away", move_run_folder),
    Kind("odd environment variables", change_surroundings),
    Kind("a file of the newest checkpoint corrupted", corrupt_checkpoint),
    Kind("a file of best/ corrupted", corrupt_best),
    Kind("a JSON file of a run corrupted or edited", change_state),
    Kind("odd class names", name_classes_oddly),
    Kind("unreadable images", garble_images),
    Kind("odd labels or images in a table", change_table),
]
