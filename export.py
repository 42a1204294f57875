"""Hand a trained model on: the adapter merged into the 16-bit base, proven to be what was measured.

    python export.py runs/default flowers                    whole model in bf16, for plain transformers
    python export.py runs/default flowers --adapter-only     the adapter, processor and GPU, for PEFT
    python export.py runs/default flowers --push-to-hub me/flowers

The folder appears only once it was loaded afresh, gave the logits of the adapter beside its base on images of val, and
named val as well as what was validated. Needs a GPU for what does not fit the CPU, and disk for the merged weights.
"""

import contextlib
import json
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from config.cli import COMPUTE_OPTIONS, DATA_OPTIONS, RunCommand, parse_run_command
from config.training_config import RANDOM_MODELS, ConfigError, option
from runtime.run_dir import Run
from runtime.run_files import BEST, is_completed
from utils.logging_utils import UserError, logger, report_errors, set_environment, setup_logging

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
MARK = ".exporting"  # in a draft, locked while it is written
MARGIN_BYTES = 50e6  # processor and GPU


@dataclass(frozen=True)
class ExportOptions:
    dtype: str = option("bf16", "of the merged weights", choices=("bf16", "fp16", "fp32"))
    adapter_only: bool = option(False, "export the adapter, for the base model it was trained on")
    push_to_hub: str | None = option(None, "OWNER/NAME: upload the same files there; a new repository is private")
    limit: int | None = option(None, "val images that the exported model is scored on; none: all", low=1)


def main(argv: list[str] | None = None) -> int:
    use = parse_run_command(argv, __doc__, ExportOptions, (*COMPUTE_OPTIONS, *DATA_OPTIONS), Run.load, "OUT")
    set_environment()
    setup_logging()
    out, repository = Path(use.words[0]), use.options.push_to_hub
    with report_errors(ConfigError, when_interrupted="nothing was exported"):
        check_can_export(use, out)
        with staging_dir(out) as draft:
            (export_adapter if use.options.adapter_only else export_whole)(use, draft)
            for path in draft.iterdir():
                path.chmod(stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IROTH)  # safetensors writes 0600
        size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
        logger.info(f"result {out}: {size:,.1f} MB, see its README.md")
    if repository:
        again = f"{out} is complete, and goes there with: hf upload {repository} {out}"
        with report_errors(when_interrupted=again), report_hub_errors(repository, again):
            from huggingface_hub import HfApi

            found = HfApi().upload_folder(
                repo_id=repository, folder_path=out, commit_message="Exported by LLaVA Plants"
            )
            logger.info(f"result on the hub: {found.commit_url}")
    return 0


def check_can_export(use: RunCommand, out: Path) -> None:
    """What can be known before any weight is read. Raises UserError."""
    from runtime.checkpoint import describe_best
    from runtime.device import refuse_several_ranks

    refuse_several_ranks()  # before they meet over the same draft
    built, is_whole = use.run.config.model in RANDOM_MODELS, use.run.config.trainable == "everything"
    if use.run.recorded.get("base"):
        raise UserError(f"{use.run.folder}: is the untouched base, nothing was learned that could be exported")
    if out.name in ("", "..") or out.is_symlink() or out.is_mount():
        raise UserError(f"{out}: is a link, a disk or the folder itself; name a folder that is not there yet")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; name a new folder")
    describe_best(use.run.folder / BEST)
    if not is_completed(use.run.folder):
        logger.warning(f"{use.run.folder}: is not finished; exported is what named val best so far")
    if use.options.adapter_only and is_whole:
        raise UserError(f"{use.run.folder}: all weights learned, there is no adapter; leave out --adapter-only")
    if use.options.adapter_only and built:
        raise UserError(
            f"{use.run.folder}: its base is saved nowhere, an adapter alone is of no use; leave out --adapter-only"
        )
    if use.run.config.model == "full" and not is_whole:
        raise UserError(
            f"{use.run.folder}: its base has random weights that existed on a GPU alone; nothing can be exported"
        )
    if use.options.push_to_hub:
        with report_hub_errors(
            use.options.push_to_hub, "check the name, the network, and that HF_TOKEN may write there"
        ):
            from huggingface_hub import HfApi

            HfApi().create_repo(use.options.push_to_hub, private=True, exist_ok=True)  # fails now, not after an hour


@contextlib.contextmanager
def staging_dir(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` if nothing is raised, else goes. Raises UserError for one that is in the way."""
    import filelock

    draft = out.with_name(f"{out.name}.draft")
    mark = draft / MARK
    if draft.exists() and not mark.exists():
        raise UserError(f"{draft}: is in the way, and no draft of an export; move it, or name another OUT")
    draft.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(mark, timeout=0):
            try:
                for left in draft.iterdir():  # by an export that was killed
                    if left != mark:
                        left.unlink()
                yield draft
                mark.unlink()
                if out.exists():
                    out.rmdir()  # empty, or this fails
                draft.rename(out)
            finally:
                if draft.exists():
                    shutil.rmtree(draft)
    except filelock.Timeout as error:
        raise UserError(f"{draft}: another export writes there; wait for its end, or name another OUT") from error


# ---- the two kinds of export


def export_whole(use: RunCommand, draft: Path) -> None:
    """The merged model, its processor and GPU in `draft`, proven."""
    import torch
    from transformers import AutoProcessor

    from data.collator import PlantCollator
    from evaluation.model_card import build_model_card
    from evaluation.verify import (
        LOGIT_IMAGES,
        check_merge,
        compare_with_validated,
        first_readable,
        load_whole,
        logits_of,
        logits_with,
        relative_difference,
    )
    from models.builder import build_processor, check_same_base, weights_fingerprint
    from models.merging import merge_into, read_adapter, save_settings, weights_bytes
    from runtime.checkpoint import CARD
    from runtime.device import choose_device, collect_memory, fit_workers
    from utils.tokenizer_utils import tokenizer_probe

    folder, config, recorded, options = use.run.folder, use.run.config, use.run.recorded, use.options
    dtype, names = getattr(torch, DTYPES[options.dtype]), recorded["class_names"]
    device = choose_device(config.model, config.gpu_memory_fraction)
    rows, validated = load_validation_rows(use)
    processor, prompt = build_processor(config, names)
    files = None if config.model in RANDOM_MODELS else weights_fingerprint(config.model)
    found = {"tokenizer_probe": tokenizer_probe(processor.tokenizer), "model_files": files}
    check_same_base(found, use.run)
    collator = PlantCollator(processor, prompt, names, config.image_size)
    few = first_readable(collator, rows, LOGIT_IMAGES)
    adapter = None if config.trainable == "everything" else read_adapter(folder / BEST)
    with base_weights(use, processor) as base:
        check_disk(draft, weights_bytes(base, dtype))
        logger.info(f"merge  {folder / BEST} into {config.model}, {options.dtype}")
        save_settings(base, processor, prompt, dtype, draft)
        save_classes(use, prompt, draft)
        merge_into(base, adapter, draft, dtype)
        # What all learned in is fp32; an adapter is measured beside what it is merged into.
        reference = load_whole(base, torch.float32 if adapter is None else dtype, device, config.gpu_memory_fraction)
        expected, untouched = logits_with(adapter, reference, collator, few, dtype, device)
        del reference
        collect_memory(device)
    # As anyone loads it: its own weights, its own processor.
    model = load_whole(draft, dtype, device, config.gpu_memory_fraction)
    collator = PlantCollator(AutoProcessor.from_pretrained(draft), prompt, names, config.image_size)
    rounding = relative_difference(logits_of(model, collator, few, dtype, device), expected)
    metrics = None
    if validated is not None:
        workers = fit_workers(config.num_workers, collator.batch_bytes(config.per_device_eval_batch_size))
        metrics = compare_with_validated(
            validated, model, collator, rows, config.per_device_eval_batch_size, workers, dtype
        )
    told = check_merge(rounding, untouched, dtype, metrics, "" if dtype == torch.float32 else "; try --dtype fp32")
    if validated is None:
        told += "; its accuracy is not known, since the run learned from val"
    logger.info(f"result proven: {told}")
    # The run's own config: what was given here beside it is not what it was trained with.
    verification = f"Merged in {options.dtype} and loaded afresh: {told}."
    run = Run.load(folder)
    card = build_model_card(run.config, run.recorded, folder, prompt, verification, is_merged=True)
    (draft / CARD).write_text(card, encoding="utf-8")


def export_adapter(use: RunCommand, draft: Path) -> None:
    """The adapter, its processor and GPU in `draft`, proven beside a base that PEFT attached it to."""
    from peft import PeftModel

    from data.collator import PlantCollator
    from evaluation.model_card import base_name, build_model_card
    from evaluation.verify import LOGIT_IMAGES, check_merge, first_readable, logits_of, relative_difference
    from models.builder import DTYPES as DTYPE_OF
    from models.builder import PlantModel, build_base, build_processor
    from models.merging import save_processor
    from runtime.checkpoint import CARD
    from runtime.device import choose_device, choose_precision, collect_memory

    folder, config, recorded = use.run.folder, use.run.config, use.run.recorded
    device = choose_device(config.model, config.gpu_memory_fraction)
    precision = choose_precision(config.mixed_precision, device)
    dtype = DTYPE_OF[precision]
    rows, _ = load_validation_rows(use)
    processor, prompt = build_processor(config, recorded["class_names"])
    collator = PlantCollator(processor, prompt, recorded["class_names"], config.image_size)
    few = first_readable(collator, rows, LOGIT_IMAGES)
    shutil.copyfile(folder / BEST / "adapter_model.safetensors", draft / "adapter_model.safetensors")
    settings = json.loads((folder / BEST / "adapter_config.json").read_text(encoding="utf-8"))
    settings |= {"base_model_name_or_path": base_name(config.model), "revision": config.model_revision}
    (draft / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_processor(processor, draft)
    save_classes(use, prompt, draft)
    plant = PlantModel.from_run(use.run, device)
    expected = logits_of(plant.model, collator, few, dtype, device)
    del plant
    collect_memory(device)
    model = PeftModel.from_pretrained(build_base(config, processor, device, dtype), draft)
    with model.disable_adapter():
        untouched = relative_difference(logits_of(model, collator, few, dtype, device), expected)
    rounding = relative_difference(logits_of(model, collator, few, dtype, device), expected)
    logger.info(f"result proven: {check_merge(rounding, untouched, dtype)}")
    run = Run.load(folder)
    (draft / CARD).write_text(build_model_card(run.config, run.recorded, folder, prompt), encoding="utf-8")


# ---- what they share


def load_validation_rows(use: RunCommand) -> tuple:
    """(rows of val, {image: was it named right when validated}); of a run that learned from val: train rows, None."""
    from data.dataset import build_datasets, take
    from evaluate import check_data
    from evaluation.evaluator import read_correct

    data = build_datasets(use.run.config)
    check_data(data, use.run.recorded, use.run.config, use.run.folder)
    if data.validation is None:
        return take(data.train, 100), None  # some of them for the logits
    return take(data.validation, use.options.limit), read_correct(use.run.folder, "val")[1]


@contextlib.contextmanager
def base_weights(use: RunCommand, processor) -> Iterator[Path]:
    """The folder of what is merged into: the base's safetensors, or those of best/ where all weights learned."""
    import torch

    from models.builder import build_base

    config = use.run.config
    if config.trainable == "everything":
        yield use.run.folder / BEST
    elif config.model in RANDOM_MODELS:
        with tempfile.TemporaryDirectory() as made:
            build_base(config, processor, torch.device("cpu"), torch.float32).save_pretrained(made)
            yield Path(made)
    elif Path(config.model).is_dir():
        yield Path(config.model)
    else:
        from huggingface_hub import snapshot_download

        with report_hub_errors(config.model, "check the network, and that HF_TOKEN may read it"):
            kinds = ["*.safetensors", "*.json"]
            downloaded = snapshot_download(config.model, revision=config.model_revision, allow_patterns=kinds)
        yield Path(downloaded)


def save_classes(use: RunCommand, prompt, draft: Path) -> None:
    """class_names.json: all that is needed to name images as this project does."""
    from evaluation.evaluator import read_calibration
    from runtime.checkpoint import describe_best

    facts = {
        "class_names": use.run.recorded["class_names"],
        "question": use.run.config.question,
        "prompt": prompt.prompt,
    }
    facts |= {"response_prefix": prompt.response_prefix, "end": prompt.end, "image_size": use.run.config.image_size}
    calibration = read_calibration(use.run.folder, describe_best(use.run.folder / BEST))
    if calibration is not None:
        facts |= {"temperature": calibration.temperature, "threshold": calibration.threshold}
    (draft / "class_names.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def check_disk(draft: Path, needed: float) -> None:
    free = shutil.disk_usage(draft).free
    if free < needed + MARGIN_BYTES:
        raise UserError(
            f"{draft.parent}: {free / 1e9:.1f} GB free on its disk, the merged weights need {needed / 1e9:.1f} GB; "
            "make room, or name an OUT on another disk"
        )


@contextlib.contextmanager
def report_hub_errors(name: str, move: str) -> Iterator[None]:
    """What the hub refuses, or the network, in one sentence with the next move."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    kinds = HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, httpx.HTTPError, OSError, ValueError
    try:
        yield
    except kinds as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0][:200]
        raise UserError(f"{name}: the hub refuses ({type(error).__name__}: {reason}); {move}") from error


if __name__ == "__main__":
    sys.exit(main())
