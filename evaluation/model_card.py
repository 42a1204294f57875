"""The model card: what a model was made from and how far its answers can be trusted, from what the run recorded."""

import dataclasses
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from config.training_config import RANDOM_MODELS
from evaluation.report import render
from runtime.atomic import write_file
from runtime.checkpoint import MODEL_CARD, read_best
from runtime.run_dir import Run
from runtime.run_files import REPORT, read_json, read_metrics
from utils.logging_utils import logger, skip_failure
from utils.tokenizer_utils import Prompt

WARNING = "Not for deciding whether a plant is edible or poisonous."


def write_model_card(run: Run, prompt: Prompt) -> None:
    """README.md of best/."""
    with skip_failure(run.best_folder / MODEL_CARD):
        write_file(run.best_folder / MODEL_CARD, build_model_card(Run.load(run.folder), prompt))


def build_model_card(
    run: Run,
    prompt: Prompt,
    verification: str = "",
    is_merged: bool = False,
    is_4bit: bool = False,
    use: str | None = None,
) -> str:
    """README.md of best/, or of an export: then `verification` says how it was checked, and it may be `is_merged`.

    Its weights may be in 4 bit. `use` says how to use GGUF files, in place of plain transformers.

    `run` is as it was trained, whatever options it is used with.
    """
    config, folder = run.config, run.folder
    dataset = Path(config.dataset).name
    is_adapter = config.trainable != "everything" and not is_merged
    reports = read_reports(folder, run.describe_weights(), config.dataset)
    facts = {"model_commit": None, "ranks": 1} | run.recorded | dataclasses.asdict(config)
    facts["class_names"] = run.class_names  # and not the option, a file of names
    layout = "llava" if is_merged and config.views == "base" else "llava_next"
    library = "peft" if is_adapter else "gguf" if use else "transformers"
    is_random, is_local = config.model in RANDOM_MODELS, Path(config.model).is_dir()
    results = [
        EvalResult("image-classification", dataset, dataset, "accuracy", round(report["top1"], 4), dataset_split=split)
        for split, report in reports.items()
    ]
    front_matter = ModelCardData(  # what the hub finds a model by
        language="en",
        license=None if is_random else read_license(config.model),
        base_model=None if is_random or is_local else config.model,
        library_name=library,
        pipeline_tag="image-text-to-text",
        tags=[layout, "plants", "fine-grained-image-classification"],
        model_name=folder.resolve().name,
        eval_results=results or None,
    )
    # Not ModelCard.from_template: its environment has neither filters nor includes, and takes a typo for empty text.
    text = render(
        "model_card.md.j2",
        card=front_matter,
        warning=WARNING,
        run=facts,
        base=base_name(config.model),
        layout=layout,
        use=use,
        is_adapter=is_adapter,
        is_4bit=is_4bit,
        is_random_base=is_random,
        is_local_base=is_local,
        prompt=prompt.prompt,
        dataset=dataset,
        reports=reports,
        report=next(reversed(reports.values()), None),  # of test, if that was measured
        steps=[entry for entry in read_metrics(folder) if entry.keys() >= {"loss", "seconds", "peak_gib"}],
        best_step=(read_best(run.best_folder) or {}).get("step"),
        batch_size=config.effective_batch_size,
        verification=verification,
    )
    return str(ModelCard(text))  # raises ValueError unless the front matter is that of a model card


def base_name(model: str) -> str:
    """The hub id, or the folder's own name: where a folder is on this machine is private."""
    return Path(model).name if Path(model).is_dir() else model


def read_reports(folder: Path, weights: str | None, dataset: str) -> dict[str, dict]:
    """{split: report}, val before test, of these weights on this data set, from plain scores of the whole split."""
    reports = {}
    for split in ("val", "test"):
        path = folder / f"eval_{split}.json"
        try:
            report = read_json(path, REPORT)
        except FileNotFoundError:
            continue
        except ValueError as error:  # torn by a kill, or edited
            move = f"make it again: python evaluate.py {folder} --split {split}"
            logger.warning(f"{path}: is not quoted ({error}); {move}")
            continue
        is_plain = not any(report.get(key) for key in ("per_token", "prior_calibration", "limit"))
        if is_plain and (report["adapter"], report["dataset"]) == (weights, dataset):
            reports[split] = report
    return reports


def read_license(model: str) -> str | None:
    """As the base model's own card states it; None where there is no card or the hub cannot be reached."""
    try:
        return ModelCard.load(Path(model) / MODEL_CARD if Path(model).is_dir() else model).data.license
    except (OSError, ValueError, HfHubHTTPError, yaml.YAMLError):
        return None
