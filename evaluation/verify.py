"""That what was saved is what was measured: the reload test of a run, and the proof of merged weights.

Shapes: n images, C names, K supervised positions, V vocabulary.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import LlavaNextForConditionalGeneration

from evaluation.metrics import compare
from models.builder import load_weights, read_without_mmap, unwrap
from models.fused_layers import get_fused_layers
from models.merging import Adapter
from models.scoring import score_rows
from runtime.device import available_gpu_memory
from utils.logging_utils import UserError, logger

FEW = 4  # images of the reload test
LOGIT_IMAGES = 8  # of an export, whose logits are compared
SAME = 1e-3  # nats between scores of the same weights
# Relative difference of logits that rounding the merged weights to a dtype may make (docs/LOG.md).
ROUNDING = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
SCORING_BYTES = 3e9  # of a GPU, kept free for an image beside 16-bit weights
CHANCE = 0.01  # p below which the exported model names worse


def first_readable(collator, rows, count: int) -> list[dict]:
    """The first rows whose images open. Raises UserError if none does."""
    found = list(itertools.islice((row for row in rows if collator([row]).samples), count))
    if not found:
        raise UserError("no image can be opened, so nothing can be proven; mend or put back the images")
    return found


# ---- the reload test


def scores_of(model, collator, rows, dtype: torch.dtype) -> torch.Tensor:
    """(n, C) in nats, computed by plain kernels one image at a time: equal weights give equal numbers."""
    for one in get_fused_layers(unwrap(model).model.language_model.layers)[:1]:  # they share their kernels
        one.kernels.eager()
    return torch.tensor([one.values for one in score_rows(model, collator, rows, 1, 0, dtype)])


def verify_reload(build: Callable, folder: Path, expected: torch.Tensor, collator, rows, dtype: torch.dtype) -> None:
    """Load `folder` into the fresh model that `build()` returns; its scores of `rows` must be `expected`.

    Raises UserError if they are not.
    """
    model = build()
    untouched = (scores_of(model, collator, rows, dtype) - expected).abs().max()
    load_weights(model, folder)
    apart = (scores_of(model, collator, rows, dtype) - expected).abs().max()
    if not apart <= SAME:  # a NaN is no proof either
        raise UserError(
            f"{folder}: does not give back what was trained: the scores of {len(rows)} images differ by up to "
            f"{apart:.3g} nats; do not use it, run the same command again, and report it if it comes again"
        )
    logger.info(
        "result %s, loaded into a fresh base, scores %d images as before (within %.1g nats; the base alone is off by "
        "%.2g)",
        *(folder, len(rows), max(float(apart), 1e-6), untouched),
    )
    if untouched <= SAME:
        logger.warning("%s: learned too little to be told from the untouched model by its scores", folder)


# ---- merged weights


def logits_of(model, collator, rows, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(K, V) in fp32 at the positions of the true names, image by image."""
    model.eval()
    found = []
    for row in rows:
        (micro_batch,) = collator([row]).to(device).split(1)
        inputs = {name: value for name, value in micro_batch.items() if "labels" not in name}
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            found.append(model(**inputs).logits[0].float().cpu())
    return torch.cat(found)


def relative_difference(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Root mean square of the difference over that of the reference about each position's mean."""
    spread = reference - reference.mean(dim=1, keepdim=True)
    return float((logits - reference).square().mean().sqrt() / spread.square().mean().sqrt())


def load_whole(
    folder: str | Path, dtype: torch.dtype, device: torch.device, gpu_memory_fraction: float
) -> LlavaNextForConditionalGeneration:
    """A saved model as anyone loads it; what a GPU has no room for waits in the host's memory."""
    room = available_gpu_memory(device, gpu_memory_fraction)
    place = {"device_map": {"": device}}
    if room is not None:
        place = {"device_map": "auto", "max_memory": {device.index: int(room - SCORING_BYTES), "cpu": "1000GB"}}
    with read_without_mmap():
        return LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=dtype, use_safetensors=True, **place)


@contextlib.contextmanager
def adapter_beside(base: nn.Module, adapter: Adapter, device: torch.device) -> Iterator[None]:
    """The adapter's products added to those of the base's own linears, by hooks.

    Not by PEFT, which cannot attach to a model of which a part waits in the host's memory.
    """
    hooks = []

    def low_rank(down, up):
        return lambda _, given, product: (
            product + (adapter.scale * linear(linear(given[0].float(), down), up)).to(product)
        )

    def whole(weight, bias):
        return lambda _, given, product: linear(given[0].float(), weight, bias).to(product)

    for name, pair in adapter.low_rank.items():
        hook = low_rank(*(one.to(device).float() for one in pair))
        hooks.append(base.get_submodule(name).register_forward_hook(hook))
    for name, weight in adapter.whole.items():
        if name.endswith(".weight"):
            module = name.removesuffix(".weight")
            bias = adapter.whole.get(f"{module}.bias")
            hook = whole(weight.to(device).float(), None if bias is None else bias.to(device).float())
            hooks.append(base.get_submodule(module).register_forward_hook(hook))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def logits_with(
    adapter: Adapter | None, base: nn.Module, collator, rows, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, float | None]:
    """(logits of the base with the adapter beside it; how far those without it are off, None: there is no adapter)."""
    without = logits_of(base, collator, rows, dtype, device)
    if adapter is None:
        return without, None
    with adapter_beside(base, adapter, device):
        found = logits_of(base, collator, rows, dtype, device)
    return found, relative_difference(without, found)


def check_merge(
    rounding: float, untouched: float | None, dtype: torch.dtype, metrics: dict | None = None, advice: str = ""
) -> str:
    """The proof in a sentence. Raises UserError unless the saved model is the one that was measured.

    `rounding` and `untouched` are relative differences of logits from those of the run: of what was saved, and of the
    base without its adapter. `metrics` are of evaluation.metrics.compare, the validated model first.
    """
    told = f"its logits are {rounding:.2%} off those of the run's weights"
    if not rounding <= ROUNDING[dtype]:
        raise UserError(
            f"what was saved is not what was trained: {told}, where rounding to {dtype} makes {ROUNDING[dtype]:.2%} at "
            f"most; nothing was exported{advice}"
        )
    if untouched is not None:
        told += f" (the base without the adapter: {untouched:.2%})"
    if metrics is None:
        return told
    told += (
        f"; top-1 {metrics['second']:.3f} on {metrics['n']:,} images of val, {metrics['first']:.3f} was validated "
        f"(p = {metrics['p']:.2g}, McNemar)"
    )
    if metrics["second"] < metrics["first"] and metrics["p"] < CHANCE:
        raise UserError(f"the merged model names worse than what was validated: {told}; nothing was exported")
    return told


def compare_with_validated(validated: dict[str, bool], model, collator, rows: Sequence[dict], *options) -> dict:
    """evaluation.metrics.compare of what was validated, first, and of this model on the same images.

    Raises UserError if none of the images was validated.
    """
    scored = score_rows(model, collator, rows, *options)
    correct = {one.id: int(np.argmax(one.values)) == one.label for one in scored}
    both = [image for image in correct if image in validated]
    if not both:
        raise UserError("none of these images of val was validated; score them first: python evaluate.py RUN")
    return dict(compare([validated[image] for image in both], [correct[image] for image in both]))
