"""Random faults: no traceback, no hang, nothing wrong in silence, and the run's end is identical.

FAULTS_SECONDS: how long, 30 by default; FAULTS_SEED: where to begin; a failure prints the seed that repeats it.
"""

import os
import random
import shutil
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.injection import write_table
from tests.faults.random_faults import COMPLETED, IDENTICAL, KINDS, REFUSED, Failure, make_base

SECONDS = float(os.environ.get("FAULTS_SECONDS", 30))
SEED = int(os.environ.get("FAULTS_SEED", 0))
AT_ONCE = 2
TABLE = os.environ.get("FAULTS_TABLE")  # a page, given by make faults


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


def test_random_faults(base, tmp_path):
    """Kinds in turn, each try with a seed of its own; a second process runs the next one meanwhile."""
    ends = time.monotonic() + SECONDS
    outcomes: dict[str, Counter] = {kind.label: Counter() for kind in KINDS}
    failures = []

    def attempt(seed: int) -> None:
        if time.monotonic() > ends and seed >= SEED + AT_ONCE:
            return
        kind, folder = KINDS[seed % len(KINDS)], tmp_path / str(seed)
        try:
            outcomes[kind.label][kind.inject(folder, base, random.Random(seed))] += 1
        except (AssertionError, TimeoutError) as error:
            outcomes[kind.label]["failed"] += 1
            failures.append(f"FAULTS_SEED={seed} ({kind.label}): {error}")
            print(failures[-1], flush=True)
        shutil.rmtree(folder, ignore_errors=True)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(attempt, range(SEED, SEED + max(int(SECONDS * 2), AT_ONCE))))
    for label, found in outcomes.items():
        print(f"{label}: {dict(found)}")
    if TABLE:
        write_table(Path(TABLE), "random faults", table(outcomes))
    assert not failures, "\n\n".join(failures)


def table(outcomes: dict[str, Counter]) -> list[str]:
    columns = (IDENTICAL, COMPLETED, REFUSED, "failed")
    rows = [f"| kind | tries | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for label, found in outcomes.items():
        rows.append(f"| {label} | {sum(found.values())} | {' | '.join(str(found[column]) for column in columns)} |")
    return rows


def test_page_lists_every_kind():
    page = (Path(__file__).parents[2] / "docs" / "faults.md").read_text(encoding="utf-8")
    assert [kind.label for kind in KINDS if f"| {kind.label} |" not in page] == []


def test_a_failure_is_one():
    """The harness itself: a traceback on the screen is found."""
    from tests.faults import random_faults

    folder = Path("unused")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Failure, match="traceback"):
        patch.setattr(random_faults, "output_of", lambda folder: "Traceback (most recent call last)\n  ...")
        random_faults.screen_of(folder, 1, "something")
