"""Checks that what was saved is what was measured: the reload test of a run, and the checks of an export.

Shapes: n images, C names, K supervised positions, V vocabulary.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from data.collator import PlantCollator
from data.dataset import PlantData
from evaluation.metrics import mcnemar
from evaluation.model_card import write_model_card
from models.builder import PlantModel, keep_4bit_weights, load_weights, nf4
from models.loading import load_model, scale_logits
from models.merging import Adapter
from runtime.device import available_gpu_memory, collect_memory
from runtime.distributed import is_sharded, shard_frozen_parameters
from runtime.run_dir import Run
from utils.logging_utils import UserError, logger

RELOAD_IMAGES = 4  # scored before and after a reload
LOGIT_IMAGES = 8  # of an export, whose logits are compared
TOLERANCE = 1e-3  # nats between scores of the same weights
# Relative difference of logits that rounding the merged weights to a dtype may make (docs/LOG.md); 1.4: unrelated.
ROUNDING: dict[torch.dtype | str, float] = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05, "nf4": 1.0}
SCORING_BYTES = 3e9  # of a GPU, kept free for an image beside 16-bit weights
SIGNIFICANCE = 0.01  # p below which an exported model is worse


def first_readable(collator: PlantCollator, rows, count: int) -> list[dict]:
    """The first rows whose images are readable. Raises UserError if none is."""
    found = list(itertools.islice((row for row in rows if collator([row]).samples), count))
    if not found:
        raise UserError("no image can be opened, so nothing can be verified; repair or put back the images")
    return found


def check_same_data(data: PlantData, run: Run) -> str:
    """The name that scores of the data set go by: where the run's own lies elsewhere now, that of its training.

    Raises UserError unless the classes are those of the run, and its own data set is split as it was.
    """
    trained_on, fingerprint = Run.load(run.folder).config.dataset, run.recorded.get("data_fingerprint")
    data.assert_matches(run.class_names, fingerprint if run.config.dataset == trained_on else None, run.folder)
    return trained_on if data.fingerprint() == fingerprint and not Path(trained_on).exists() else run.config.dataset


# ---- the reload test


def scores_of(plant: PlantModel, rows: Sequence[dict]) -> torch.Tensor:
    """(n, C) in nats, by eager kernels, image by image: equal weights give equal numbers."""
    plant.eager()
    one_by_one = dataclasses.replace(plant, eval_batch_size=1, num_workers=0)
    return torch.tensor([values for scores, _ in one_by_one.score(rows) for _, values in scores])


def verify_reload(run: Run, plant: PlantModel, data: PlantData) -> None:
    """Load best/ into a fresh base model, which must reproduce the scores of the trained one; write its model card.

    The trained model is released first: the GPU has room for one. Ranks other than 0 return at once, unless the weights
    are sharded across them. Raises UserError.
    """
    sharded = is_sharded(plant.base)
    if not run.is_main_process and not sharded:
        return
    rows = first_readable(plant.collator, data.train if data.validation is None else data.validation, RELOAD_IMAGES)
    expected = scores_of(plant, rows)
    release(plant)
    config = dataclasses.replace(run.config, compile="false")
    fresh = PlantModel.from_config(config, plant.class_names, plant.device)
    if sharded:
        shard_frozen_parameters(fresh.base, fresh.device)
        logits_of(fresh, rows[:1])  # FSDP sets itself up in a forward of the whole model
    base_difference = (scores_of(fresh, rows) - expected).abs().max()
    load_weights(fresh.model, run.best_folder)
    difference = (scores_of(fresh, rows) - expected).abs().max()
    if not difference <= TOLERANCE:  # NaN verifies nothing either
        reason = f"its scores of {len(rows)} images differ by up to {difference:.3g} nats from the trained model's"
        move = "do not use it. Run the same command again, and report it if it happens again"
        raise UserError(f"{run.best_folder}: reloaded, {reason}; {move}")
    if not run.is_main_process:
        return
    logger.info(
        f"result | {run.best_folder} reloaded into a fresh base model | scores of {len(rows)} images reproduced within "
        f"{max(float(difference), 1e-6):.1g} nats | the base model alone differs by {base_difference:.2g}"
    )
    if base_difference <= TOLERANCE:
        logger.warning(f"{run.best_folder}: its scores are those of the base model; it was hardly trained")
    write_model_card(run, plant.prompt)


# ---- merged weights


def logits_of(plant: PlantModel, rows: Sequence[dict]) -> torch.Tensor:
    """(K, V) in fp32 at the positions of the true names, image by image."""
    plant.model.eval()
    found = []
    for row in rows:
        (micro_batch,) = plant.collator([row]).to(plant.device).split(1)
        inputs = {name: value for name, value in micro_batch.items() if "labels" not in name}
        with torch.no_grad(), plant.autocast():
            found.append(plant.model(**inputs).logits[0].float().cpu())
    return torch.cat(found)


def relative_difference(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square of the difference over that of the reference about each position's mean."""
    spread = reference - reference.mean(dim=1, keepdim=True)
    return float((logits - reference).square().mean().sqrt() / spread.square().mean().sqrt())


def distance(plant: PlantModel, rows: Sequence[dict], expected: torch.Tensor) -> float:
    """The relative difference of a model's logits from the expected ones."""
    return relative_difference(logits_of(plant, rows), expected)


def release(plant: PlantModel) -> None:
    """The GPU has room for one model."""
    plant.model = None
    collect_memory(plant.device)


def reload(plant: PlantModel, folder: Path, in_4bit: bool = False) -> None:
    """A saved model as anyone loads it takes the place of the plant's."""
    release(plant)
    plant.model = load_whole(folder, plant.dtype, plant.device, in_4bit)


def load_whole(folder: str | Path, dtype: torch.dtype, device: torch.device, in_4bit: bool = False) -> PreTrainedModel:
    """A saved model as anyone loads it; what a GPU has no room for is offloaded to the host's memory."""
    room = available_gpu_memory(device)
    placement: dict = {"device_map": {"": device}}
    if room is not None:
        placement = {"device_map": "auto", "max_memory": {device.index: int(room - SCORING_BYTES), "cpu": "1000GB"}}
    config, quantization = AutoConfig.from_pretrained(folder), nf4(dtype) if in_4bit else None
    if isinstance(config, LlavaConfig):
        is_quantized = getattr(config, "quantization_config", None) is not None  # then it says how itself
        how = {"dtype": dtype, "quantization_config": None if is_quantized else quantization, **placement}
        model: PreTrainedModel = LlavaForConditionalGeneration.from_pretrained(folder, **how)
        model.model.register_forward_pre_hook(_show_only_tile, with_kwargs=True)
        scale_logits(model)
    else:
        model = load_model(Path(folder), str(folder), dtype, placement, quantization)
    keep_4bit_weights(model)
    return model


def _show_only_tile(model: nn.Module, given: tuple, inputs: dict) -> tuple[tuple, dict]:
    """LLaVA-1.5 takes images (B, 3, H, W) without sizes, where a batch has them as tiles."""
    pixels = inputs.get("pixel_values")
    return given, inputs | {"pixel_values": None if pixels is None else pixels[:, 0], "image_sizes": None}


@contextlib.contextmanager
def attach_adapter(base: nn.Module, adapter: Adapter, device: torch.device) -> Iterator[None]:
    """Add an adapter by forward hooks: PEFT cannot attach it to a model of which a part is offloaded."""

    def low_rank(down, up):
        return lambda _, given, output: output + (adapter.scale * linear(linear(given[0].float(), down), up)).to(output)

    def whole(weight, bias):
        return lambda _, given, output: linear(given[0].float(), weight, bias).to(output)

    def fp32(name: str) -> torch.Tensor | None:
        return adapter.whole[name].to(device).float() if name in adapter.whole else None

    hooks = {name: low_rank(a.to(device).float(), b.to(device).float()) for name, (a, b) in adapter.low_rank.items()}
    for module in {name.rpartition(".")[0] for name in adapter.whole}:
        hooks[module] = whole(fp32(f"{module}.weight"), fp32(f"{module}.bias"))
    with contextlib.ExitStack() as attached:
        for name, hook in hooks.items():
            attached.enter_context(base.get_submodule(name).register_forward_hook(hook))
        yield


def predict_classes(model, rows) -> dict[str, tuple[int, int]]:
    """{id: (predicted, true class)} of the rows whose images are readable, by a PlantModel or LlamaCpp."""
    scored = (found for scores, _ in model.score(rows) for found in scores)
    return {sample.id: (int(np.argmax(values)), sample.label) for sample, values in scored}


def compare_with_validated(validated: dict[str, bool], plant: PlantModel, rows: Sequence[dict]) -> dict[str, float]:
    """McNemar's test of the validated model, first, and of this one on the same images. Raises UserError for none."""
    found = {image: classes for image, classes in predict_classes(plant, rows).items() if image in validated}
    if not found:
        raise UserError("none of these images of val was validated; score them first: python evaluate.py RUN")
    return mcnemar([validated[image] for image in found], [predicted == true for predicted, true in found.values()])


def is_worse(metrics: dict[str, float]) -> bool:
    """Of McNemar's test of two models: the second."""
    return metrics["second"] < metrics["first"] and metrics["p"] < SIGNIFICANCE


def check_merge(
    rounding: float,
    base_difference: float | None,
    dtype: torch.dtype | str,
    metrics: dict | None = None,
    advice: str = "",
) -> str:
    """The verification in a sentence. Raises UserError unless the saved model is the measured one.

    `rounding` and `base_difference` are relative differences of logits from those of the run: of what was saved, and of
    the base model without its adapter. `metrics` are those of compare_with_validated.
    """
    sentence = f"its logits differ by {rounding:.2%} from those of the run's weights"
    if not rounding <= ROUNDING[dtype]:
        sentence += f", where rounding to {dtype} makes {ROUNDING[dtype]:.2%} at most"
        raise UserError(f"what was saved is not what was trained: {sentence}; nothing was exported{advice}")
    if base_difference is not None:
        sentence += f" (the base model without the adapter: {base_difference:.2%})"
    if metrics is not None:
        sentence += f"; top-1 {metrics['second']:.3f} on {metrics['n']:,} images of val, "
        sentence += f"{metrics['first']:.3f} was validated (p = {metrics['p']:.2g}, McNemar)"
        if is_worse(metrics):
            raise UserError(f"the merged model is worse than what was validated: {sentence}; nothing was exported")
    return sentence
