"""What the benchmark measures, in a file with a line of JSON for each. Lines about other programs are read alike."""

import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

from utils.logging_utils import UserError, first_line

GIB = 2**30
EXAMPLE = '{"system": "its name", "gib": 9.3, "images_s": 8.6}'


class Result(NamedTuple):
    """A row of the benchmark's table."""

    system: str
    rates: list[float]  # images/s of each timed step; none where it did not fit
    peak: float  # bytes that torch had allocated
    reserved: float  # bytes
    note: str
    limit: float | None = None  # GiB

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def append_result(path: str, result: Result, images: str, machine: str) -> None:
    point = {"system": result.system, "limit_gib": result.limit, "gib": None, "images_s": None, "note": result.note}
    if result.rates:
        point |= {"gib": result.peak / GIB, "images_s": result.rate, "steps_images_s": result.rates}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(point | {"images": images, "machine": machine}) + "\n")


def read_points(path: str) -> list[tuple[str, float, float]]:
    """(system, GiB, images/s) of each line, but of what did not fit. Raises UserError."""
    found = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason, move = first_line(error), "give the file that an earlier benchmark wrote"
        raise UserError(f"--points {path}: cannot be read ({reason}); {move}") from error
    for number, line in enumerate(lines, 1):
        try:
            point = json.loads(line)
            if point["images_s"] is not None:
                gib, rate = float(point["gib"]), float(point["images_s"])
                if not (0 < gib < math.inf and 0 < rate < math.inf):
                    raise ValueError("gib and images_s must be above 0")
                found.append((str(point["system"]), gib, rate))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: line {number} is no point ({first_line(error)}); write {EXAMPLE}") from error
    if not found:
        raise UserError(f"{path}: holds no point that was measured; write lines such as {EXAMPLE}")
    return found
