"""The model card: what a model was made from and how far its answers can be trusted, from what the run recorded."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from config.training_config import RANDOM_MODELS, TrainingConfig
from evaluation.report import confusion_lines
from runtime.checkpoint import CARD, describe_best, read_best
from runtime.run_dir import BEST, read_metrics
from utils.tokenizer_utils import Prompt

WARNING = "Not for deciding whether a plant is edible or poisonous."
PROTOCOL = (
    "Each image is given the exact log-probability of every class name behind the question; the likeliest name is the "
    "answer, top-1 the share of images whose true name it is, its interval Wilson's at 95 %. The weights that "
    'were kept, the temperature of the confidence and the threshold of "not sure" were chosen on val: of that split '
    "the figures are somewhat too good, of test they are not."
)
CODE_OF_A_WHOLE_MODEL = """\
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

folder = "."  # this folder
processor = AutoProcessor.from_pretrained(folder)
model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype="auto", device_map="auto")"""
# What the sources of images say of their license.
OF_THE_DATA = {
    "synthetic": "The drawings were made by the program itself; nobody has rights in them.",
    "oxford_flowers102": (
        "The images of Oxford Flowers 102 were gathered from the web and taken by its authors (Nilsback and Zisserman "
        "2008). They remain their photographers'; ask before you pass any on. None is in this folder."
    ),
}
OF_OWN_DATA = "The images are those of a folder of the person who trained it, who has to state their license."


def build_model_card(
    config: TrainingConfig, recorded: dict, folder: str | Path, prompt: Prompt, code: str | None = None, proof: str = ""
) -> str:
    """The card of a run's weights.

    `code` loads `processor` and `model` in Python, None: those of best/; `proof` is a section of its own.
    """
    run, folder = dataclasses.asdict(config) | recorded, Path(folder)
    reports, names = read_reports(folder, describe_best(folder / BEST), config.dataset), run["class_names"]
    is_local = config.model in RANDOM_MODELS or Path(config.model).is_dir()
    license = _license_of(config.model)
    data = Path(config.dataset).name
    card = ModelCardData(
        language="en",
        license=license,
        base_model=None if is_local else config.model,
        library_name="peft" if code is None and config.trainable != "everything" else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["llava_next", "plants", "fine-grained-image-classification"],
        model_name=folder.resolve().name,
        eval_results=[
            EvalResult("image-classification", data, data, "accuracy", round(one["top1"], 4), dataset_split=split)
            for split, one in reports.items()
        ]
        or None,
    )
    lines = [
        f"# {folder.resolve().name}: {len(names)} plants by name",
        "",
        f"**{WARNING}** It knows {len(names)} classes and gives one of their names to any picture; what it does not "
        'know it may take for one of them, in spite of "not sure".',
        "",
        f"LLaVA-NeXT `{base_name(config.model)}`"
        + f" at commit `{run['model_commit']}`" * bool(run.get("model_commit"))
        + f', fine-tuned ({config.trainable}) to answer the question "{config.question}".',
        "",
        "## Use",
        "",
        f"Images {_size_words(config.image_size)}: the processor does not do that by itself.",
        "",
        *_code(code or _code_of_best(run), config.image_size, prompt),
        "",
        *([proof, ""] if proof else []),
        "## Data",
        "",
        f"`{data}`, {_split_words(run)}, seed {config.seed}. Classes: {', '.join(names)}.",
        "",
        *_accuracy(reports),
        *_training(run, folder),
        "## Licences",
        "",
        f"Base model: {_license_words(config.model, license)}",
        f"Images: {OF_THE_DATA.get(config.dataset, OF_OWN_DATA)}",
        "",
    ]
    return str(ModelCard(f"---\n{card.to_yaml()}\n---\n\n" + "\n".join(lines)))


def base_name(model: str) -> str:
    """The hub id, or the folder's own name."""
    return Path(model).name if Path(model).is_dir() else model  # where a folder lies is nobody's business


def read_reports(folder: Path, adapter: str | None, dataset: str) -> dict[str, dict]:
    """{split: report}, val before test, of what evaluate.py measured of these very weights on the run's own images."""
    found = {}
    for split in ("val", "test"):
        with contextlib.suppress(FileNotFoundError, ValueError):  # not measured, or torn by a kill
            report = json.loads((folder / f"eval_{split}.json").read_text(encoding="utf-8"))
            is_plain = not (report.get("per_token") or report.get("prior_calibration"))
            if is_plain and (report.get("adapter"), report.get("dataset")) == (adapter, dataset):
                found[split] = report
    return found


def _accuracy(reports: dict[str, dict]) -> Iterator[str]:
    yield from ("## Accuracy", "", PROTOCOL, "")
    if not reports:
        yield from ("It was not measured.", "")
        return
    yield from (
        "| split | images | top-1 (95 % interval) | top-5 | mean per class | calib. error | answered | right of them |",
        "|" + "---|" * 8,
    )
    for split, one in reports.items():
        low, high = one["top1_interval"]
        values = [one["ece"], one["coverage"], one.get("selective_accuracy")]
        told = " | ".join("-" if value is None else f"{value:.3f}" for value in values)
        yield (
            f"| {split} | {one['n']} | {one['top1']:.3f} ({low:.3f} to {high:.3f}) | {one['top5']:.3f} | "
            f"{one['mean_per_class']:.3f} | {told} |"
        )
    split, shown = list(reports.items())[-1]
    if shown["calibration"]:
        fitted = shown["calibration"]
        threshold = "never reached" if fitted["threshold"] is None else f"{fitted['threshold']:.3f}"
        yield from (
            "",
            f"Confidence is the softmax over the class names of log-probability / {fitted['temperature']:.3f}; below "
            f'{threshold} the answer is "not sure" (for a precision of {fitted["target_selective_accuracy"]:g} on '
            f"{fitted['images']} images of val).",
        )
    if shown.get("ood"):
        kinds = ", ".join(f"{kind} {own['abstention_rate']:.0%}" for kind, own in shown["ood"].items())
        yield from ("", f'Of pictures that show none of the classes came out "not sure": {kinds}.')
    yield from ("", f"On {split}:", *confusion_lines(shown), "")


def _training(run: dict, folder: Path) -> Iterator[str]:
    steps = [line for line in read_metrics(folder) if "loss" in line]
    kept = read_best(folder / BEST)["step"]
    seconds = sum(line["seconds"] for line in steps)
    peak = max((line["peak_gib"] for line in steps), default=0.0)
    adapter = "" if run["trainable"] == "everything" else f" LoRA rank {run['lora_r']}, alpha {run['lora_alpha']},"
    images = run["per_device_train_batch_size"] * run["gradient_accumulation_steps"]
    yield from (
        "## Training",
        "",
        f"The weights are those of step {kept:,}; {len(steps):,} steps of {images} images were taken,{adapter} "
        f"learning rate {run['learning_rate']:g} ({run['lr_scheduler_type']}), gradients clipped to "
        f"{run['max_grad_norm']:g}, precision "
        f"{'fp32' if run['precision'] == 'no' else run['precision']}{', base in 4 bit (nf4)' * run['load_in_4bit']}.",
        f"On {run.get('processes', 1)} x {run['device']}: {seconds / 60:,.1f} minutes of steps, peak {peak:.1f} GiB. "
        f"{', '.join(f'{name} {number}' for name, number in run['packages'].items())}.",
        "",
    )


def _split_words(run: dict) -> str:
    words = "in its own splits, or a share of each class held out for val and test"
    if run["train_on_val"]:
        words += ", train and val learned from"
    return words + f", {run['sample_fraction']:.0%} of train and val used" * (run["sample_fraction"] < 1)


def _size_words(image_size: int | None) -> str:
    if image_size is None:
        return "are taken at their own size, upright"
    return f"are resized to {image_size} x {image_size} pixels, upright, bicubic, their aspect not kept"


def _code(loading: str | None, image_size: int | None, prompt: Prompt) -> Iterator[str]:
    if loading is None:
        yield "Its base is built by the program itself and saved nowhere: `python predict.py RUN PHOTO`."
    else:
        yield from ("```python", loading, "", _code_of_an_image(image_size, prompt), "```", "")
        yield (
            'It prints what the model writes, which need not be one of the names. Confidence and "not sure" come from '
            "scoring all names, by predict.py and app.py of the program that trained it."
        )


def _code_of_best(run: dict) -> str | None:
    if run["trainable"] == "everything":
        return CODE_OF_A_WHOLE_MODEL
    if run["model"] in RANDOM_MODELS:
        return None
    base = repr(base_name(run["model"])) + f", revision={run['model_revision']!r}" * bool(run["model_revision"])
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoProcessor, LlavaNextForConditionalGeneration\n\n"
        'folder = "."  # this folder\n'
        "processor = AutoProcessor.from_pretrained(folder)\n"
        + "# The base model's folder, wherever it lies:\n"
        * Path(run["model"]).is_dir()
        + f'base = LlavaNextForConditionalGeneration.from_pretrained({base}, dtype="auto", device_map="auto")\n'
        "model = PeftModel.from_pretrained(base, folder)"
    )


def _code_of_an_image(image_size: int | None, prompt: Prompt) -> str:
    resize = f".resize(({image_size}, {image_size}), Image.Resampling.BICUBIC)" if image_size else ""
    return (
        "from PIL import Image, ImageOps\n\n"
        'files = ["photo.jpg"]\n'
        f'images = [ImageOps.exif_transpose(Image.open(file)).convert("RGB"){resize} for file in files]\n'
        f"prompts = [{prompt.prompt!r}] * len(images)\n"
        'inputs = processor(images=images, text=prompts, return_tensors="pt", padding=True)\n'
        "ids = model.generate(**inputs.to(model.device, model.dtype), max_new_tokens=20, do_sample=False)\n"
        'texts = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)\n'
        "print([text.strip() for text in texts])"
    )


def _license_of(model: str) -> str | None:
    """As the base model's own card states it; None where there is no card or the hub cannot be reached."""
    if model in RANDOM_MODELS:
        return None
    try:
        return ModelCard.load(Path(model) / CARD if Path(model).is_dir() else model).data.license
    except (OSError, ValueError, HfHubHTTPError, yaml.YAMLError):
        return None


def _license_words(model: str, license: str | None) -> str:
    if model in RANDOM_MODELS:
        return "random weights, made by the program; nobody has rights in them."
    if license is None:
        return "its license could not be read from its card; it holds for these weights too, look it up."
    return f"{license}, as its card states; it holds for these weights too, which are made from it."
