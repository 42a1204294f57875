"""Each fault, injected into a whole run, costs no more than the steps since the last checkpoint.

`make faults` tries each many times, and writes the table of docs/faults.md.
"""

import os
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from runtime.checkpoint import MODEL_CARD
from tests.faults import injection
from tests.faults.injection import CORRUPTIONS, Outcome

TABLE = os.environ.get("FAULTS_TABLE")  # a page; given, each fault is tried many times
ROWS: dict[str, str] = {}


class Runs(NamedTuple):
    result: dict  # of the run without a fault
    seconds: float  # that it took
    interrupted: Path  # a run that died after step 8


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    result, seconds = injection.run_undisturbed(tmp_path_factory.mktemp("undisturbed"))
    interrupted = tmp_path_factory.mktemp("interrupted")
    injection.run_to_step_8(interrupted)
    return Runs(result, seconds, interrupted)


@pytest.fixture(scope="module")
def may_mount(tmp_path_factory):
    try:
        with injection.Mounted(tmp_path_factory.mktemp("disk")):
            pass
    except (subprocess.CalledProcessError, OSError):
        pytest.skip("no right to mount a small disk here")


def kill_at_random(folder: Path, runs: Runs, seed: int) -> Outcome:
    return injection.kill_at(folder, runs.result, random.Random(seed).uniform(0.3, runs.seconds))


def kill_in_save(folder: Path, runs: Runs, seed: int) -> Outcome:
    return injection.kill_in_save(folder, runs.result, random.Random(seed))


def terminate(folder: Path, runs: Runs, seed: int) -> Outcome:
    return injection.interrupt(folder, runs.result, signal.SIGTERM, random.Random(seed))


def interrupt(folder: Path, runs: Runs, seed: int) -> Outcome:
    return injection.interrupt(folder, runs.result, signal.SIGINT, random.Random(seed))


def corrupt(how: Callable[[Path], None]) -> Callable[[Path, Runs, int], Outcome]:
    """Of another file for each seed: the weights first."""

    def fault(folder: Path, runs: Runs, seed: int) -> Outcome:
        names = sorted(injection.checkpoint_files(runs.interrupted), key=lambda name: not name.startswith("adapter_m"))
        names.remove(MODEL_CARD)  # read by nobody, and in no manifest
        return injection.corrupt(folder, runs.interrupted, runs.result, names[seed % len(names)], how)

    return fault


class Fault(NamedTuple):
    label: str
    tries: int  # of `make faults`
    inject: Callable[[Path, Runs, int], Outcome]
    needs_mount: bool = False


FAULTS = [
    Fault("kill -9 at a random moment", 20, kill_at_random),
    Fault("kill -9 inside a save", 10, kill_in_save),
    Fault("SIGTERM: saved and ended", 5, terminate),
    Fault("SIGINT: saved and ended", 5, interrupt),
    Fault("second Ctrl-C while the save hangs", 1,
          lambda folder, runs, _: injection.interrupt_twice(folder, runs.result)),
    *(Fault(f"newest checkpoint, one file each: {how.__doc__}", 14, corrupt(how)) for how in CORRUPTIONS),
    Fault("out of memory in a step", 1, lambda folder, *_: injection.run_out_of_memory(folder, True)),
    Fault("out of memory in an evaluation", 1, lambda folder, *_: injection.run_out_of_memory(folder, False)),
    Fault("a loss that is not a number, `--max-skipped-steps 1`", 1,
          lambda folder, *_: injection.skip_non_finite_step(folder)),
    Fault("the same, stopping", 1, lambda folder, runs, _: injection.stop_at_non_finite_step(folder, runs.result)),
    Fault("a worker killed", 3, lambda folder, runs, _: injection.kill_worker(folder, runs.result)),
    Fault("disk full inside a save", 1, lambda folder, runs, _: injection.fill_disk(folder, runs.result), True),
    Fault("run folder read-only", 1,
          lambda folder, runs, _: injection.make_read_only(folder, runs.interrupted, runs.result), True),
    Fault("an image vanished", 1, lambda folder, *_: injection.remove_image(folder)),
    Fault("/dev/shm too small", 1, lambda folder, runs, _: injection.shrink_shared_memory(folder, runs.result), True),
    Fault("a second training in the folder", 1,
          lambda folder, runs, _: injection.run_second_training(folder, runs.result)),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.label)
def test_fault_loses_nothing(fault, runs, tmp_path, request):
    if fault.needs_mount:
        request.getfixturevalue("may_mount")
    tries = fault.tries if TABLE else 1
    outcomes = [fault.inject(tmp_path / str(number), runs, number) for number in range(tries)]
    compared = [outcome.same for outcome in outcomes if outcome.same is not None]
    lost = sum(outcome.lost for outcome in outcomes)
    repeated = max(outcome.repeated for outcome in outcomes)
    same = f"{compared.count(True)} of {len(compared)}" if compared else "not comparable"
    ROWS[fault.label] = f"| {fault.label} | {tries} | {lost} | {repeated} | {same} |"
    assert lost == 0, outcomes[0].output
    assert False not in compared and repeated < 2 * injection.SAVE_STEPS


def test_table_is_written():
    """Last: after all faults."""
    if not TABLE:
        pytest.skip("make faults writes it")
    rows = ["| fault | tries | runs lost | most steps repeated | end identical |", "|---|---|---|---|---|"]
    injection.write_table(Path(TABLE), "faults", [*rows, *(ROWS[fault.label] for fault in FAULTS)])


def test_page_lists_every_fault():
    page = (Path(__file__).parents[2] / "docs" / "faults.md").read_text(encoding="utf-8")
    assert [fault.label for fault in FAULTS if f"| {fault.label} |" not in page] == []


def test_nothing_leaks(tmp_path):
    """Neither memory nor files, processes, threads: 2,000 steps with `make faults`, else 400."""
    found = injection.measure_resources(tmp_path, *((2000, 100) if TABLE else (400, 20)))
    early, late = found[4], found[-1]
    assert len(found) == 20 and late["mb"] < early["mb"] + 30
    assert all(late[name] <= early[name] for name in ("files", "processes", "threads"))
