"""An export: written to a staging directory, verified there, and only then where it was asked for."""

import contextlib
import copy
import importlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import httpx
import torch
from huggingface_hub import HfApi
from peft import PeftModel
from transformers import AutoProcessor

from config.training_config import RANDOM_MODELS
from data.collator import PlantCollator
from data.dataset import build_datasets, take
from evaluation import verify
from evaluation.model_card import base_name, build_model_card
from evaluation.results import read_calibration, read_correct
from models import merging
from models.base_view import build_llava_processor
from models.builder import PlantModel, build_base, check_same_base, weights_fingerprint
from models.loading import find_checkpoint
from models.tiny import SIZES, build_config
from models.trainable import lora_settings
from runtime.atomic import beside, require_disk_space
from runtime.checkpoint import MODEL_CARD
from runtime.device import choose_device
from runtime.launcher import refuse_several_ranks
from runtime.run_dir import Run
from utils.logging_utils import UserError, first_line, logger
from utils.tokenizer_utils import Prompt, tokenizer_probe

MARGIN_BYTES = 50e6  # processor and model card
PUBLIC_MODE = 0o644  # safetensors writes 0600


def check_can_export(run: Run, out: Path, adapter_only: bool, repository: str | None, is_gguf: bool = False) -> None:
    """What can be checked before any weight is read. Raises UserError."""
    refuse_several_ranks()  # before they contend for the staging directory
    folder, is_whole = run.folder, run.config.trainable == "everything"
    if run.is_base_model:
        raise UserError(f"{folder}: is a base model, nothing was trained; export a run of train.py")
    if out.name in ("", "..") or out.is_symlink() or out.is_mount():
        raise UserError(f"{out}: is a link, a disk or the working directory; use a folder that does not exist yet")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; use a new folder")
    run.describe_weights()  # raises for corrupted ones
    if not run.completed:
        logger.warning(f"{folder}: is not completed; its best weights so far are exported")
    if adapter_only and is_whole:
        raise UserError(f"{folder}: all weights were trained, there is no adapter; leave out --adapter-only")
    if adapter_only and run.config.model in RANDOM_MODELS:
        raise UserError(f"{folder}: an adapter is of no use without its random base model; leave out --adapter-only")
    if run.config.model == "full" and not is_whole:
        raise UserError(f"{folder}: its randomly initialized base model existed on a GPU only; nothing can be exported")
    if is_gguf:
        check_can_write_gguf(run)
    if repository:
        with open_hub(repository, "check the name, the network, and that HF_TOKEN may write there") as hub:
            hub.create_repo(repository, private=True, exist_ok=True)  # fails now, not after an hour


def check_can_write_gguf(run: Run) -> None:
    """Raises UserError."""
    if run.config.views != "base":
        reason = "llama.cpp makes other tiles of an image, without LLaVA-NeXT's newlines and cropping"
        move = "train with --views base"
        raise UserError(f"{run.folder}: was trained with --views {run.config.views}, and {reason}; {move}")
    try:
        importlib.import_module("gguf")
        importlib.import_module("cyllama.llama.llama_cpp")
    except ImportError as error:
        move = "run: pip install -r requirements-gguf.txt"
        raise UserError(f"--format gguf needs the packages gguf and cyllama ({first_line(error)}); {move}") from error


@contextlib.contextmanager
def staging_dir(out: Path) -> Iterator[Path]:
    """A directory that becomes `out`, or is removed if anything is raised. Raises UserError if one is in the way."""
    draft, lock = beside(out)[0], out.with_name(f"{out.name}.lock")
    is_foreign = lock.exists() and lock.stat().st_size > 0
    if is_foreign or (draft.exists() and not lock.exists()):
        raise UserError(f"{lock if is_foreign else draft}: exists and is not of an export; move it, or use another OUT")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(lock, timeout=0), contextlib.ExitStack() as stack:
            stack.callback(lock.unlink)
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()
            stack.callback(shutil.rmtree, draft, ignore_errors=True)
            yield draft
            for path in draft.iterdir():
                path.chmod(PUBLIC_MODE)
            draft.rename(out)  # in place of an empty folder, of no other
    except filelock.Timeout as error:
        raise UserError(f"{draft}: another export writes to it; wait for its end, or use another OUT") from error


def export_run(run: Run, draft: Path, dtype: str, adapter_only: bool, limit: int | None) -> None:
    """Write model, processor, class names and model card to `draft`, and verify the model. Raises UserError."""
    device = choose_device(run.config.model, run.config.gpu_memory_fraction)
    rows, validated = load_validation(run, limit, with_scores=not adapter_only)
    if adapter_only:
        plant, save = PlantModel.from_run(run, device), save_adapter
    else:
        logger.info(f"model | merging {run.best_folder} into {run.config.model} | {dtype}")
        precision = {"fp32": "no", "nf4": "bf16"}.get(dtype, dtype)
        plant = PlantModel.from_config_unloaded(run.config, run.class_names, device, precision)
        save = save_merged
    images = verify.first_readable(plant.collator, rows, verify.LOGIT_IMAGES)
    expected, base_difference = save(run, plant, draft, images)
    rounding = verify.distance(plant, images, expected)
    is_merged, is_4bit = not adapter_only, dtype == "nf4"
    if is_4bit:
        verify.check_merge(rounding, base_difference, plant.dtype)
        save_quantized(plant, draft, images)
        rounding = verify.distance(plant, images, expected)
    metrics = None if validated is None else verify.compare_with_validated(validated, plant, rows)
    advice = "; try --dtype fp32" if is_merged and dtype != "fp32" else ""
    found = verify.check_merge(rounding, base_difference, dtype if is_4bit else plant.dtype, metrics, advice)
    if is_merged and metrics is None:
        found += "; its accuracy is unknown, since the run was trained on val"
    verification = f"Merged in {dtype} and loaded afresh: {found}." if is_merged else ""
    logger.info(f"result | verified: {found}")
    write_texts(run, plant.prompt, draft, verification=verification, is_merged=is_merged, is_4bit=is_4bit)


def save_merged(run: Run, plant: PlantModel, draft: Path, images) -> tuple[torch.Tensor, float | None]:
    """Save the merged model, and load it afresh into `plant`.

    Returns (logits of the run's weights, how far those of the base model differ; None: all weights were trained).
    """
    config = run.config
    files = None if config.model in RANDOM_MODELS else weights_fingerprint(config.model)
    check_same_base({"tokenizer_probe": tokenizer_probe(plant.processor.tokenizer), "model_files": files}, run)
    adapter = None
    if config.trainable != "everything":
        settings = lora_settings(config.trainable, config.lora_r, config.lora_alpha, config.lora_dropout)
        adapter = merging.read_adapter(run.best_folder, settings)
    with tempfile.TemporaryDirectory() as scratch:
        base = find_base(run, plant.processor, Path(scratch))
        needed = merging.weights_bytes(base, plant.dtype) + MARGIN_BYTES
        require_disk_space(draft, needed, "the merged weights need", "use an OUT on another disk")
        processor: Any = plant.processor
        prompt = plant.prompt
        if config.views == "base":
            processor, prompt = build_llava_processor(processor, prompt, config.question)
        merging.save_settings(base, processor, prompt, plant.dtype, draft)
        merging.merge_into(base, adapter, draft, plant.dtype, processor)
        # The reference of a full fine-tune is fp32, as it was trained; an adapter's is the base it is merged into.
        plant.model = verify.load_whole(base, plant.dtype if adapter else torch.float32, plant.device)
        plant.model.config.image_grid_pinpoints = plant.collator.pinpoints
        expected, base_difference = verify.logits_of(plant, images), None
        if adapter:
            without = expected
            with verify.attach_adapter(plant.model, adapter, plant.device):
                expected = verify.logits_of(plant, images)
            base_difference = verify.relative_difference(without, expected)
    verify.reload(plant, draft)
    plant.prompt, saved_processor = prompt, AutoProcessor.from_pretrained(draft)
    plant.collator = PlantCollator(saved_processor, prompt, plant.class_names, config.image_size)
    return expected, base_difference


def save_quantized(plant: PlantModel, draft: Path, images) -> None:
    """Write the merged model in `draft` anew with its language model in nf4, and load that afresh into `plant`.

    Raises UserError unless what was loaded computes what was saved.
    """
    verify.reload(plant, draft, in_4bit=True)
    for path in draft.glob("*.safetensors*"):
        path.unlink()
    # Saved before it computes: on some CPUs a forward repacks 4-bit weights in place.
    plant.model.save_pretrained(draft, max_shard_size=merging.SHARD_BYTES)
    expected = verify.logits_of(plant, images)
    verify.reload(plant, draft, in_4bit=True)
    difference = verify.distance(plant, images, expected)
    if not difference <= verify.ROUNDING[plant.dtype]:
        reason = f"its logits differ by {difference:.2%} once it is loaded afresh"
        raise UserError(f"what was saved in 4 bit is not what was quantized: {reason}; use --dtype bf16")


def save_adapter(run: Run, plant: PlantModel, draft: Path, images) -> tuple[torch.Tensor, float | None]:
    """The same of the adapter, which PEFT attaches to a fresh base model."""
    config = run.config
    shutil.copyfile(run.best_folder / "adapter_model.safetensors", draft / "adapter_model.safetensors")
    settings = copy.copy(plant.model.peft_config["default"])
    settings.base_model_name_or_path, settings.revision = base_name(config.model), run.recorded.get("model_commit")
    settings.inference_mode = True
    settings.save_pretrained(draft)
    merging.save_processor(plant.processor, draft)
    expected = verify.logits_of(plant, images)
    verify.release(plant)
    plant.model = PeftModel.from_pretrained(build_base(config, plant.processor, plant.device, plant.dtype), draft)
    with plant.model.disable_adapter():
        return expected, verify.distance(plant, images, expected)


def load_validation(run: Run, limit: int | None, with_scores: bool = False) -> tuple[Any, dict[str, bool] | None]:
    """(rows of val, or of train if val was trained on; by image whether the validated prediction was correct)."""
    data = build_datasets(run.data_config)
    dataset = verify.check_same_data(data, run)
    if data.validation is None:
        return take(data.train, 100), None
    return take(data.validation, limit), read_correct(run, "val", dataset)[1] if with_scores else None


def find_base(run: Run, processor, scratch: Path) -> Path:
    """The folder that is merged into: the base model, or best/'s weights of a full fine-tune with the base's config."""
    config = run.config
    if config.trainable == "everything":
        if config.model in RANDOM_MODELS:
            build_config(processor, SIZES[config.model]).save_pretrained(scratch)
        else:
            for path in find_checkpoint(config.model, config.model_revision).glob("*config.json"):
                shutil.copyfile(path, scratch / path.name)
        for path in run.best_folder.glob("*.safetensors*"):
            (scratch / path.name).symlink_to(path.resolve())
        return scratch
    if config.model in RANDOM_MODELS:
        build_base(config, processor, torch.device("cpu"), torch.float32).save_pretrained(scratch)
        return scratch
    return find_checkpoint(config.model, config.model_revision, with_weights=True)


def write_texts(run: Run, prompt: Prompt, draft: Path, added: dict | None = None, **model_card) -> None:
    """README.md, and class_names.json: all that is needed to predict as this project does, and what is `added`."""
    facts = {"class_names": run.class_names, "question": run.config.question, **prompt._asdict()}
    facts["image_size"] = run.config.image_size
    calibration = read_calibration(run.folder, run.describe_weights())
    if calibration is not None:
        facts |= {"temperature": calibration.temperature, "threshold": calibration.threshold}
        facts |= {"conformal": calibration.conformal} if calibration.conformal else {}
    (draft / "class_names.json").write_text(json.dumps(facts | (added or {}), indent=2) + "\n", encoding="utf-8")
    trained = Run.load(run.folder)  # the flags of an export are not what the run was trained with
    (draft / MODEL_CARD).write_text(build_model_card(trained, prompt, **model_card), encoding="utf-8")


@contextlib.contextmanager
def open_hub(name: str, next_move: str) -> Iterator[HfApi]:
    """The hub's HfApi; what it refuses, or a failure of the network, becomes a UserError."""
    try:
        yield HfApi()
    except (httpx.HTTPError, OSError, ValueError) as error:  # the hub's own errors are among these
        raise UserError(f"{name}: the hub refuses ({first_line(error)}); {next_move}") from error
