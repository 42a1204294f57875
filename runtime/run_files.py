"""The files of a run directory: their names and schemas, config and recorded facts, checkpoints, metrics.jsonl.

What a run holds may be torn, edited or untrusted: every JSON of it is read here, by its schema. Nothing heavy is
imported, so that every script can read a run before it imports torch.
"""

import contextlib
import dataclasses
import json
import os
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.training_config import CONFIG_FILE, ConfigError, TrainingConfig, config_from_dict
from runtime.atomic import write_file
from runtime.legacy import renamed
from utils.logging_utils import UserError

METRICS_FILE = "metrics.jsonl"
PREFIX = "checkpoint-"
BEST = "best"  # the weights with the best validation accuracy, or the last ones
LOCK_FILE = "run.lock"  # held by the training that writes to the folder


# ---- schemas


@dataclass(frozen=True)
class Kind:
    """What a value must be: in words, and the test."""

    words: str
    holds: Callable[[Any], bool]


def number(low: float = -1e300, high: float = 1e300) -> Kind:
    def holds(value: Any) -> bool:
        is_number = type(value) is float or (type(value) is int and abs(value) < 2**63)  # numpy takes no larger ones
        return is_number and low <= value <= high

    return Kind(f"a number from {low:g} to {high:g}", holds)


def integer(low: int = 0, high: int = 2**63) -> Kind:
    return Kind(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def list_of(kind: Kind, count: int) -> Kind:
    holds = lambda value: isinstance(value, list) and len(value) == count and all(map(kind.holds, value))  # noqa: E731
    return Kind(f"a list of {count}, each {kind.words}", holds)


def either(*schemas: Any) -> Kind:
    def holds(value: Any) -> bool:
        for schema in schemas:
            with contextlib.suppress(ValueError):
                validate(value, schema)
                return True
        return False

    return Kind(f"as one of {len(schemas)} forms", holds)


def _are_names(value: Any) -> bool:
    """Non-empty, no two alike, and text that can be written: JSON may spell half a character."""
    is_list = isinstance(value, list) and all(isinstance(name, str) and name.strip() for name in value)
    return is_list and 0 < len(value) == len({name for name in value if name.encode(errors="ignore").decode() == name})


# A schema is a Kind; (schema, None): that or null; [schema]: a list of such; or {key: schema}: an object, whose "key?"
# may be missing, and whose other keys are as the schema of `str` says, or dropped.
ANY = Kind("anything", lambda value: True)
TEXT = Kind("text", lambda value: isinstance(value, str))
NO_TEXT = Kind("text or null", lambda value: value is None or isinstance(value, str))
NULL = Kind("null", lambda value: value is None)
BOOL = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER, FRACTION, COUNT = number(), number(0, 1), integer()
# What Python's JSON writes of a loss that overflowed: NaN and infinities are numbers here and in no other Kind.
LOGGED = Kind("a number or null", lambda value: value is None or type(value) is float or NUMBER.holds(value))
NAMES = Kind("a list of different names", _are_names)
TAXONOMY = ({"genus": [TEXT], "family": [TEXT]}, None)  # of each class, "" where it is not known
CONFIG = {
    "config": {str: ANY},  # checked by config_from_dict
    "recorded": {
        "class_names?": NAMES,
        "taxonomy?": TAXONOMY,
        "precision?": Kind("bf16, fp16 or no", lambda value: value in ("bf16", "fp16", "no")),
        "ranks?": integer(1),
        "stream_workers?": (COUNT, None),
        "tokenizer_probe?": [COUNT],
        "data_commit?": list_of(NO_TEXT, 3),
        "packages?": {str: TEXT},
        "base?": BOOL,
        "images?": TEXT,  # data_fingerprint of runs before it had that name
        **dict.fromkeys(("run_id?", "image_processor?", "device?"), TEXT),
        **dict.fromkeys(("origin?", "data_fingerprint?", "model_commit?", "model_files?"), NO_TEXT),
    },
}
ACCURACIES = dict.fromkeys(("eval_top1?", "eval_top5?"), (FRACTION, None))
METRICS: dict = {"step": COUNT, "completed?": BOOL, "skipped?": TEXT, **ACCURACIES, str: ANY}
METRICS |= dict.fromkeys(("loss?", "grad_norm?", "learning_rate?", "seconds?", "peak_gib?", "eval_loss?"), LOGGED)
BEST_STEP = {"step": COUNT, **ACCURACIES, "eval_loss?": LOGGED}
STATE: dict = {  # what transformers computes with when it resumes
    "global_step": COUNT,
    "epoch": (NUMBER, None),
    "log_history": [METRICS],
    "total_flos": NUMBER,
    "train_batch_size": (integer(1), None),
    "stateful_callbacks": {"TrainerControl": ANY, str: ANY},
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), number(1e-9)),
    str: ANY,
}
MANIFEST = {str: {"bytes": COUNT, "sha256": TEXT}}
CALIBRATION = {"temperature": number(1e-3, 1e3), "threshold": (FRACTION, None), "target_selective_accuracy": FRACTION}
CALIBRATION |= {"images": integer(1)}
METHOD = Kind("lac or aps", lambda value: value in ("lac", "aps"))
CALIBRATION |= {"conformal?": ({"method": METHOD, "target": number(0, 0.999), "quantile": (FRACTION, None)}, None)}
CALIBRATION |= {"levels?": ({"genus": (FRACTION, None), "family": (FRACTION, None)}, None)}
OPEN_SET = {"score": NO_TEXT, "threshold": (NUMBER, None), "kept": FRACTION, "missing": NO_TEXT, "reference?": TEXT}
CALIBRATION |= {"open_set?": (OPEN_SET | {"scale": {str: list_of(NUMBER, 2)}}, None)}
CALIBRATION |= {"pairs?": (dict(CALIBRATION), None), "pairs_share?": NO_TEXT}
SETS = {"method": (METHOD, None), "target": FRACTION, "coverage_interval": (list_of(FRACTION, 2), None)}
SETS |= {"coverage": (FRACTION, None), "mean_size": (number(0), None)}
SETS |= {"mean_size_interval?": (list_of(NUMBER, 2), None)}
HIERARCHY: dict = dict.fromkeys(("rejected", "accepted", "correct"), COUNT) | {"share_correct": (FRACTION, None)}
HIERARCHY |= {"precision": (FRACTION, None)}
HIERARCHY |= dict.fromkeys(("share_interval", "precision_interval"), (list_of(FRACTION, 2), None))
HIERARCHY |= dict.fromkeys(("genus", "family"), dict.fromkeys(("taxa", "classes", "accepted", "correct"), COUNT))
PROBE: dict = {"advice": TEXT, "tower_is_trained?": BOOL, "seconds": number(0)}
PROBE |= {f"{name}_{key}": FRACTION for name in ("linear", "knn") for key in ("top1", "top5", "mean_per_class")}
PROBE |= dict.fromkeys(("train_images", "of_train_images"), COUNT)
NO_PROBE = {"advice": TEXT, "linear_top1": NULL}  # why it was not measured
NONE_OF_THESE: dict = {"score": TEXT, "threshold": NUMBER, "kept": FRACTION, "rates": {str: FRACTION}}
NONE_OF_THESE |= dict.fromkeys(("coverage?", "selective_accuracy?"), (FRACTION, None))
TOGETHER = {"pairs": integer(1), "single_coverage": FRACTION, "selective_accuracy": (FRACTION, None)}
TOGETHER |= dict.fromkeys(("single_top1", "pair_top1", "coverage"), FRACTION) | {"gain": number(-1, 1)}
TOGETHER |= {"pair_interval": list_of(FRACTION, 2), "gain_interval": (list_of(NUMBER, 2), None)}
SAVED_CALIBRATION = CALIBRATION | {"taxonomy?": TAXONOMY, "scored": {"adapter": NO_TEXT}}
REPORT = {
    "adapter": NO_TEXT,
    **dict.fromkeys(("per_token?", "prior_calibration?"), BOOL),
    "limit?": (integer(1), None),
    **dict.fromkeys(("split", "dataset"), TEXT),
    "n": integer(1),
    "top1_interval": list_of(FRACTION, 2),
    **dict.fromkeys(("top1", "top5", "mean_per_class", "ece"), FRACTION),
    **dict.fromkeys(("coverage", "selective_accuracy?"), (FRACTION, None)),
    "calibration": (CALIBRATION, None),
    "conformal?": (SETS, None),
    "hierarchy?": (HIERARCHY, None),
    "together?": ({str: TOGETHER}, None),
    "probe?": either(PROBE, NO_PROBE),
    "none_of_these?": either(NONE_OF_THESE, {"score": NULL, "missing": TEXT}),
    "open_set?": [{"source": TEXT, "score": TEXT, "n": COUNT, **dict.fromkeys(("auroc", "fpr95"), FRACTION)}],
    "ood?": {str: {"n": COUNT, "abstention_rate": FRACTION}},
    "confusions": [{"names": list_of(TEXT, 2), "confused": COUNT}],
    "per_class": {str: {"n": COUNT, "top1": FRACTION, **dict.fromkeys(("precision?", "f1?"), FRACTION)}},
}


def brief(value: Any) -> str:
    """For a sentence."""
    return reprlib.repr(value)[:60]


def validate(value: Any, schema: Any, where: str = "") -> Any:
    """`value` without the keys that its schema does not know. Raises ValueError with the place that does not fit."""
    kind, found = schema, value
    if isinstance(schema, tuple):
        return None if value is None else validate(value, schema[0], where)
    if isinstance(schema, list):
        kind = Kind("a list", lambda value: isinstance(value, list))
    elif isinstance(schema, dict):
        kind = Kind("an object", lambda value: isinstance(value, dict))
    if not kind.holds(value):
        raise ValueError(f"{where.lstrip('.') or 'it'} must be {kind.words}, not {brief(value)}")
    if isinstance(schema, list):
        found = [validate(item, schema[0], f"{where}[{index}]") for index, item in enumerate(value)]
    elif isinstance(schema, dict):
        missing = [key for key in schema if key is not str and not key.endswith("?") and key not in value]
        if missing:
            raise ValueError(f"{where.lstrip('.') or 'it'} lacks {missing[0]}")
        schemas = {key: schema.get(key, schema.get(f"{key}?", schema.get(str))) for key in value}
        found = {key: validate(value[key], schemas[key], f"{where}.{key}") for key in value if schemas[key] is not None}
    return found


def save_config(config: TrainingConfig, folder: str | Path, recorded: dict) -> None:
    """Write the resolved config beside the weights, with the recorded facts: commits, versions, class names."""
    text = json.dumps({"config": dataclasses.asdict(config), "recorded": recorded}, indent=2)
    write_file(Path(folder) / CONFIG_FILE, text + "\n")


def load_config(folder: str | Path) -> tuple[TrainingConfig, dict]:
    """The config and recorded facts of a run; ConfigError where they are missing, torn, or of another version."""
    path = Path(folder) / CONFIG_FILE
    try:
        saved = read_json(path, CONFIG)
        config, recorded = config_from_dict(saved["config"]), saved["recorded"]
    except (FileNotFoundError, NotADirectoryError):
        move = "Start one with: python train.py --preset tiny"
        raise ConfigError(f"{folder}: not a run, {CONFIG_FILE} is missing. {move}") from None
    except (OSError, ValueError, OverflowError) as error:
        move = "restore the file, or use another --output-dir"
        raise ConfigError(f"{path}: cannot be read as a run's config ({error}); {move}") from error
    if "images" in recorded:
        recorded["data_fingerprint"] = recorded.pop("images")
    return config, recorded


def checkpoints_in(folder: str | Path) -> list[Path]:
    """Folders that are named as checkpoints, the newest first."""
    paths = Path(folder).glob(f"{PREFIX}*")
    found = [path for path in paths if path.name.removeprefix(PREFIX).isdecimal() and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path | None) -> int:
    """Optimizer steps done at a checkpoint; 0 for None."""
    number = checkpoint.name.removeprefix(PREFIX) if checkpoint else ""
    return int(number) if number.isdecimal() else 0


def is_completed(folder: str | Path) -> bool:
    """True once the last line of a run stands in metrics.jsonl."""
    return any(line.get("completed") for line in read_metrics(folder))


def read_metrics(folder: str | Path) -> list[dict]:
    """The objects of metrics.jsonl, one on each line, without lines that are none or torn; [] without the file."""
    lines = _lines(Path(folder) / METRICS_FILE)
    return [entry for line in lines if (entry := _parse_line(line, METRICS)) is not None]


def append_metrics(folder: str | Path, entry: dict) -> None:
    """One more object on a line of its own, even behind a line that a kill tore."""
    with open(Path(folder) / METRICS_FILE, "a+b") as file:
        end = file.seek(0, 2)
        file.seek(max(end - 1, 0))
        torn = b"" if file.read(1) in (b"", b"\n") else b"\n"
        file.write(torn + json.dumps(entry).encode() + b"\n")


def truncate_metrics(source: str | Path, folder: str | Path, step: int, keep_eval: bool = True) -> None:
    """metrics.jsonl of `folder` becomes that of `source` up to a step, with or without the evaluation at that step."""
    kept = [line for line in read_metrics(source) if line["step"] <= step and not line.get("completed")]
    kept = [line for line in kept if keep_eval or line["step"] < step or "eval_loss" not in line]
    write_file(Path(folder) / METRICS_FILE, "".join(json.dumps(line) + "\n" for line in kept))


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """One training at a time writes to a run folder, until its process ends. Raises UserError with that process."""
    import filelock

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    try:
        with filelock.FileLock(path, timeout=0) as lock:
            if not hasattr(lock, "pid"):  # the disk has no locks: then the file is the lock, and filelock wrote it
                path.write_text(f"{os.getpid()} on {os.uname().nodename}", encoding="utf-8")
            yield
    except filelock.Timeout as error:
        words = path.read_text(encoding="utf-8", errors="replace").replace(" on ", " ").split()
        holder = " on ".join(words[:2]) or "that has just started"
        move = "wait for it to end, or use another --output-dir"
        raise UserError(f"{folder}: another training, process {holder}, writes to it; {move}") from error


# ---- readers


def read_json(path: Path, schema: dict) -> dict:
    """An object that a run wrote, under today's keys. Raises OSError, or ValueError with what is wrong with it."""
    return _parse(read_text(path), schema)


def read_text(path: Path) -> str:
    """Raises OSError, and ValueError for what is no file: reading a pipe would wait for ever, a device never end."""
    if os.path.lexists(path) and not path.is_file():
        raise ValueError("it is no file")
    return path.read_text(encoding="utf-8-sig")  # an editor may have put a mark before it


def read_entries(path: Path, schema: dict) -> tuple[dict | None, list[dict]]:
    """(header, entries) of a cache; (None, []) where there is none, or none that can be used."""
    header, *lines = _lines(path) or [""]
    facts, schema = _parse_line(header, {str: ANY}), {"id": TEXT, "image": ANY} | schema
    return facts, [entry for line in lines if facts is not None and (entry := _parse_line(line, schema)) is not None]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _parse_line(line: str, schema: dict) -> dict | None:
    with contextlib.suppress(ValueError):
        return _parse(line, schema)
    return None


def _parse(text: str, schema: dict) -> dict:
    try:
        return validate(json.loads(text, object_hook=renamed), schema)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
