"""Whether images of plants that were never learned are noticed: a run trained again without some of its classes.

Each of DRAWS takes classes away by its seed, of few classes perhaps the same as another, and is a run of its own below
the run's directory: trained as the run was, evaluated, and left there, so that the same command resumes.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from config.training_config import format_value
from data.splits import check_holdout
from runtime.atomic import write_file
from runtime.launcher import refuse_several_ranks
from runtime.run_dir import Run
from utils.logging_utils import UserError, logger
from utils.signal_utils import handling

DRAWS = 5
SOURCE = "held-out classes"
TRAIN = Path(__file__).parent.parent / "train.py"
NOT_PASSED = ("output_dir", "resume", "allow_changed", "seed", "holdout_classes")


def evaluate_holdouts(run: Run, classes: int, split: str, evaluate: Callable[[Run], None]) -> None:
    """Train and evaluate the draws, log the means over them, and write open_set_<split>.json. Raises UserError."""
    refuse_several_ranks()
    check_holdout(classes, len(run.class_names), str(run.folder))
    logger.info(f"draws | {run.folder} is trained {DRAWS} times anew, each time without {classes} of its classes")
    tables = []
    for seed in range(DRAWS):
        folder = run.folder / f"holdout-{classes}" / f"draw-{seed}"
        options = dataclasses.asdict(run.data_config).items()
        flags = [f"--{name}={format_value(value)}" for name, value in options if name not in NOT_PASSED]
        flags += [f"--seed={seed}", f"--holdout-classes={classes}", f"--output-dir={folder}"]
        logger.info(f"draws | {seed + 1} of {DRAWS} | {folder}")
        training = subprocess.Popen([sys.executable, str(TRAIN), *flags])
        try:
            while training.poll() is None:
                time.sleep(0.1)
        except KeyboardInterrupt:  # subprocess.run would kill it before it has saved
            training.terminate()  # at once: with a Ctrl-C, which it got too, that is a single signal to it (SAME_S)
            with handling(lambda number, frame: None):  # however long it takes
                training.wait()
            raise
        if training.returncode:
            reason = "its training did not end well, the lines above say why"
            raise UserError(f"{folder}: {reason}; mend that and re-run to resume")
        evaluate(Run.load(folder))
        report = json.loads((folder / f"eval_{split}.json").read_text(encoding="utf-8"))
        tables.append([row for row in report["open_set"] if row["source"] == SOURCE])
        if not tables[-1]:
            raise UserError(f"{folder}: no open-set table: {report['none_of_these']['missing']}")
    means = summarize(tables)
    write_file(run.folder / f"open_set_{split}.json", json.dumps(means, indent=2) + "\n")
    for row in means:
        low, high = min(row["aurocs"]), max(row["aurocs"])
        values = f"AUROC {row['auroc']:.3f} ({low:.3f} to {high:.3f}), {row['fpr95']:.0%} pass where 95% of known do"
        logger.info(f"result | {split} | {SOURCE} | {row['score']}: {values}")


def summarize(tables: Sequence[Sequence[dict]]) -> list[dict]:
    """The means over draws, best first: rows {"source", "score", "auroc", "fpr95", "n", "aurocs": of each draw}."""
    found = []
    for rows in zip(*tables, strict=True):
        means = {name: float(np.mean([row[name] for row in rows])) for name in ("auroc", "fpr95")}
        counts = {"n": sum(row["n"] for row in rows), "aurocs": [row["auroc"] for row in rows]}
        found.append({"source": SOURCE, "score": rows[0]["score"], **means, **counts})
    return sorted(found, key=lambda row: -row["auroc"])
