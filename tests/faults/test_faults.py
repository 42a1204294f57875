"""Faults of whole runs: a short case of some here; `make faults`: all, many times, and the table of docs/faults.md."""

import os
import random
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.faults import injection as faults

MARKS = ("<!-- faults: written by make faults -->", "<!-- end of faults -->")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What the run without a fault comes to."""
    return faults.undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    folder = tmp_path_factory.mktemp("half")
    faults.half_done(folder)
    return folder


@pytest.fixture(scope="module")
def may_mount(tmp_path_factory):
    try:
        with faults.Mounted(tmp_path_factory.mktemp("disk")):
            pass
    except (subprocess.CalledProcessError, OSError):
        pytest.skip("no right to mount a small disk here")


def test_a_kill_inside_a_save_loses_nothing(expected, tmp_path):
    end, _ = expected
    tries = (faults.kill_in_save(tmp_path / str(number), end, random.Random(number)) for number in range(9))
    outcome = next(found for found in tries if found is not None)
    assert not outcome.lost and outcome.same and outcome.steps <= faults.SAVES


def test_a_second_interrupt_ends_at_once(expected, tmp_path):
    outcome, seconds = faults.second_interrupt(tmp_path, expected[0])
    assert not outcome.lost and outcome.same and seconds < 1


def test_a_killed_worker_is_told_and_the_run_goes_on(expected, tmp_path):
    outcome = faults.worker_killed(tmp_path, expected[0])
    assert re.search(
        r"error: DataLoader worker \(pid.*most often by the system for lack of memory; re-run", outcome.told
    )
    assert "Traceback" not in outcome.told and outcome.same


def test_a_disk_that_fills_up_is_told_and_the_run_goes_on(expected, tmp_path, may_mount):
    outcome = faults.disk_full(tmp_path, expected[0])
    assert "free space and re-run the same command" in outcome.told and "Traceback" not in outcome.told
    assert outcome.same


@pytest.mark.slow
def test_every_fault(expected, half, tmp_path, may_mount):
    end, seconds = expected
    table = Table()
    draw = random.Random(0)
    table.add("kill -9 at a random moment", (faults.kill_at(tmp_path / f"kill{n}", end, draw.uniform(0.3, seconds))
                                             for n in range(20)))  # fmt: skip
    saves, number = [], 0
    while len(saves) < 10:
        saves.append(faults.kill_in_save(tmp_path / f"save{number}", end, random.Random(number)))
        saves, number = [found for found in saves if found is not None], number + 1
    table.add("kill -9 inside a save", saves)
    for signum in (signal.SIGTERM, signal.SIGINT):
        found = [faults.signal_at(tmp_path / f"{signum}-{n}", end, signum, random.Random(n)) for n in range(5)]
        slowest = max(seconds for _, seconds in found)
        table.add(f"{signum.name}: saved and ended within {slowest:.1f} s", [outcome for outcome, _ in found])
    outcome, took = faults.second_interrupt(tmp_path / "second", end)
    table.add(f"second Ctrl-C while the save hangs: ended after {took:.1f} s", [outcome])
    names = faults.checkpoint_files(half)
    for how in faults.DAMAGES:
        table.add(
            f"newest checkpoint, one file each: {how.__doc__}",
            (faults.damage(tmp_path / f"{how.__name__}-{name}", half, end, name, how) for name in names),
        )
    table.add("out of memory in a step", [faults.redone(tmp_path / "oom", faults.cramp_step)])
    table.add("out of memory in an evaluation", [faults.redone(tmp_path / "oom2", faults.cramp_evaluation)])
    table.add("a loss that is not a number, `--max-skipped-steps 1`", [faults.skipped(tmp_path / "skip")])
    table.add("the same, stopping", [faults.stopped(tmp_path / "stop", end)])
    table.add("a worker killed", [faults.worker_killed(tmp_path / f"worker{n}", end) for n in range(3)])
    table.add("disk full inside a save", [faults.disk_full(tmp_path / "full", end)])
    table.add("run folder read-only", [faults.read_only(tmp_path / "ro", half, end)])
    table.add("an image vanished", [faults.vanished(tmp_path / "vanished")])
    table.add("/dev/shm too small", [faults.cramped_shared_memory(tmp_path / "shm", end)])
    table.add("a second training in the folder", [faults.two_at_once(tmp_path / "two", end)])
    print(table)
    if os.environ.get("FAULTS_TABLE"):
        write_between(Path(os.environ["FAULTS_TABLE"]), str(table))
    assert table.lost == 0 and table.different == 0


@pytest.mark.slow
def test_nothing_leaks_in_2000_steps(tmp_path):
    found = faults.resources(tmp_path)
    for line in found:
        print(line)
    early, late = (found[4], found[-1])
    assert len(found) == 20 and late["mb"] < early["mb"] + 30
    assert all(late[name] <= early[name] for name in ("files", "processes", "threads"))


class Table:
    """One row a fault, in Markdown."""

    def __init__(self):
        self.rows = ["| fault | tries | runs lost | most steps repeated | end identical |", "|---|---|---|---|---|"]
        self.lost = self.different = 0

    def add(self, name: str, outcomes) -> None:
        outcomes = list(outcomes)
        lost = sum(one.lost for one in outcomes)
        compared = [one.same for one in outcomes if one.same is not None]
        self.lost += lost
        self.different += compared.count(False)
        same = f"{compared.count(True)} of {len(compared)}" if compared else "not comparable"
        self.rows.append(f"| {name} | {len(outcomes)} | {lost} | {max(one.steps for one in outcomes)} | {same} |")
        print(self.rows[-1], flush=True)

    def __str__(self):
        return "\n".join(self.rows)


def write_between(path: Path, text: str) -> None:
    before, _, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    path.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")
