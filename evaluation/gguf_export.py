"""An export in GGUF files, which llama.cpp itself has classified images with before they appear.

The runtimes known so far compute a CLIP tower wrongly (ggml-org/llama.cpp#25814): they put the CLS token behind the
patches but read position table and output as if it stood before them. A table rolled by one gives each patch its own
position again; the first patch stays lost, and the CLS token's feature stands behind the last. So the file holds the
table that the runtime at hand needs, which is found by computing images with it.

Shapes: N patches, H width of the language model, K supervised positions, V vocabulary.
"""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from transformers import LlavaNextConfig

from config.training_config import RANDOM_MODELS
from data.collator import Batch
from evaluation import verify
from evaluation.exporter import load_validation, save_merged, write_texts
from evaluation.llama_cpp import NO_FLASH, LlamaCpp, explain_runtime, import_llama, runtime_versions
from evaluation.metrics import mcnemar
from evaluation.report import render
from models.builder import PlantModel
from models.gguf_files import build_runtime_prompt, find_gguf_obstacle, write_language_model, write_vision
from models.loading import find_checkpoint
from models.merging import weights_bytes
from models.tiny import SIZES, build_config
from runtime.atomic import require_disk_space
from runtime.device import choose_device
from runtime.run_dir import Run
from utils.logging_utils import UserError, logger

LANGUAGE_MODEL, VISION, MERGED = "model.gguf", "mmproj.gguf", "merged"
FILE_TYPES = {"q8_0": 7, "q4_k_m": 15}  # of llama.cpp's enum llama_ftype
CONTEXT = 2048  # tokens, of which 576 are an image's at most so far
SHARES = {"f16": 1.0, "q8_0": 1.6, "q4_k_m": 1.4}  # of disk space beside the merged weights, the fp16 file included
# Relative difference from transformers that a right file may make (docs/LOG.md): of image embeddings, and of logits.
EMBEDDINGS, LOGITS = 0.02, {"f16": 0.02, "q8_0": 0.1, "q4_k_m": 0.5}


class Expected(NamedTuple):
    """What plain transformers computes; the first two for a right runtime, and for one with the defect."""

    features: dict[bool, list[torch.Tensor]]  # (N, H) of each image
    logits: dict[bool, list[torch.Tensor]]  # (K, V) at the true name of each image
    predictions: dict[str, tuple[int, int]]  # {id: (predicted, true class)} of all rows


def export_gguf(run: Run, draft: Path, quantize: str, limit: int | None) -> None:
    """Write language model, mmproj, Modelfile, class names and README to `draft`, verified. Raises UserError."""
    device = choose_device(run.config.model, run.config.gpu_memory_fraction)
    rows, _ = load_validation(run, limit)
    plant = PlantModel.from_config_unloaded(run.config, run.class_names, device, "fp16")
    _check_architecture(run.config.model, run.config.model_revision, plant.processor)
    logger.info(f"model | merging {run.best_folder} into {run.config.model} | gguf {quantize}")
    images = verify.first_readable(plant.collator, rows, verify.LOGIT_IMAGES)
    merged = draft / MERGED
    merged.mkdir()
    expected, base_difference = save_merged(run, plant, merged, images)
    found = verify.check_merge(verify.distance(plant, images, expected), base_difference, plant.dtype)
    batches = [plant.collator([image]) for image in images]
    reference = _measure_reference(plant, images, batches, rows)
    verify.release(plant)
    needed = SHARES[quantize] * weights_bytes(merged, plant.dtype)
    require_disk_space(draft, needed, "the GGUF files need", "use an OUT on another disk")
    prompt = build_runtime_prompt(plant.processor.tokenizer, plant.prompt.prompt)
    before, after = prompt.split(plant.processor.image_token)
    _write_language_model(merged, draft, quantize, _chat_template(before, after))
    runtime = LlamaCpp(draft / LANGUAGE_MODEL, plant.collator)
    is_rolled = _write_right_table(merged, draft, runtime, batches[0], reference)
    comparison = _compare(runtime, batches, reference, is_rolled, LOGITS[quantize])
    logger.info(f"result | verified: merged in fp16, {found}")
    agreement = _compare_classes(reference.predictions, verify.predict_classes(runtime, rows))
    runtime.close()
    versions = runtime_versions()
    verification = (
        f"llama.cpp {versions['llama.cpp']} (cyllama {versions['cyllama']}) on the CPU, no flash attention: "
        f"{comparison}; {agreement}"
    )
    logger.info(f"result | verified: {verification}")
    shutil.rmtree(merged)
    facts = {"quantize": quantize, "runtime": versions, "is_rolled": is_rolled, "before": before, "after": after}
    _save_texts(run, plant, draft, f"Merged in fp16: {found}. Classified by {verification}.", facts)


def _check_architecture(model: str, revision: str | None, processor) -> None:
    if model in RANDOM_MODELS:
        config = build_config(processor, SIZES[model])
    else:
        config = LlavaNextConfig.from_pretrained(find_checkpoint(model, revision))
    if obstacle := find_gguf_obstacle(config):
        raise UserError(f"--format gguf: llama.cpp computes another model than {model}: {obstacle}; leave it out")


# ---- what transformers computes


class InFp32(TorchFunctionMode):
    """Operations on fp16 tensors compute in fp32, one weight at a time.

    At full size, with random weights, fp16 moves transformers' own logits by 1.4 % (docs/LOG.md), and llama.cpp adds up
    in fp32. Weights that are offloaded remain fp32 on "meta" afterwards: nothing may follow that must compute in fp16.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(torch.Tensor, _widen, (args, kwargs or {}))
        return function(*args, **kwargs)


def _widen(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor


@torch.no_grad()
def _measure_reference(plant: PlantModel, images, batches: Sequence[Batch], rows) -> Expected:
    predictions = verify.predict_classes(plant, rows)
    with InFp32():
        return Expected(*_measure_images(dataclasses.replace(plant, precision="no"), images, batches), predictions)


def _measure_images(plant: PlantModel, images, batches: Sequence[Batch]) -> tuple[dict, dict]:
    model, layer = plant.model.model, plant.model.config.vision_feature_layer
    features: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    logits: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for image, batch in zip(images, batches, strict=True):
        pixels = batch["pixel_values"][:, 0].to(plant.device)
        hidden = model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer]
        whole = model.multi_modal_projector(hidden)[0].float()  # (1 + N, H), that of the CLS token first
        for has_defect, seen in ((False, whole[1:]), (True, torch.cat([whole[2:], whole[:1]]))):
            features[has_defect].append(seen.cpu())
            hook = model.multi_modal_projector.register_forward_hook(
                lambda _, given, out, seen=seen: seen[None].to(out)
            )
            with hook:
                logits[has_defect].append(verify.logits_of(plant, [image]))
    return features, logits


# ---- the files, and what llama.cpp computes with them


def _chat_template(before: str, after: str) -> str:
    """Jinja that makes a message, which is an image alone, the prompt."""
    before, after = (json.dumps(text, ensure_ascii=False) for text in (before, after))
    turn = f"{{{{ {before} }}}}{{{{ message['content'] }}}}{{{{ {after} }}}}"
    return "{% for message in messages %}{% if message['role'] == 'user' %}" + turn + "{% endif %}{% endfor %}"


def _write_language_model(merged: Path, draft: Path, quantize: str, chat_template: str) -> None:
    path = draft / LANGUAGE_MODEL
    if quantize == "f16":
        write_language_model(merged, path, chat_template)
        return
    whole = merged / LANGUAGE_MODEL
    write_language_model(merged, whole, chat_template)
    llama = import_llama()
    settings = llama.LlamaModelQuantizeParams()
    settings.ftype, settings.nthread = FILE_TYPES[quantize], torch.get_num_threads()
    with explain_runtime(whole):
        llama.model_quantize(str(whole), str(path), settings)
    whole.unlink()


def _write_right_table(merged: Path, draft: Path, runtime: LlamaCpp, batch: Batch, reference: Expected) -> bool:
    """Write mmproj.gguf with the position table with which the runtime sees; return whether it is rolled."""
    path, differences = draft / VISION, {}
    for is_rolled in (True, False):
        write_vision(merged, path, is_rolled)
        runtime.open_vision(path)
        differences[is_rolled] = _difference(runtime.embed(batch), reference.features[is_rolled][0])
    is_rolled = differences[True] < differences[False]
    if not differences[is_rolled] <= EMBEDDINGS:
        version = runtime_versions()["llama.cpp"]
        tables = f"with the position table as it is {differences[False]:.1%}, rolled by one {differences[True]:.1%}"
        reason = f"computes other image embeddings than transformers ({tables})"
        move = "nothing was exported, install the wheel of requirements-gguf.txt"
        raise UserError(f"llama.cpp {version} {reason}; {move}")
    if is_rolled:
        write_vision(merged, path, is_rolled)
        runtime.open_vision(path)
    return is_rolled


def _compare(
    runtime: LlamaCpp, batches: Sequence[Batch], reference: Expected, is_rolled: bool, tolerance: float
) -> str:
    """Compare token ids, image embeddings and logits of a few images; in words. Raises UserError for a difference."""
    embeddings, logits = [], []
    for batch, features in zip(batches, reference.features[is_rolled], strict=True):
        expected = batch["input_ids"][0, : batch.samples[0].prompt_length].tolist()
        if runtime.read_prompt(batch)[1] != expected:
            reason = "makes other tokens of the prompt than the run's tokenizer"
            raise UserError(f"llama.cpp {reason}; nothing was exported, leave out --format gguf")
        embeddings.append(_difference(runtime.embed(batch), features))
        logits.append(runtime.logits(batch))
    distance = verify.relative_difference(torch.cat(logits), torch.cat(reference.logits[is_rolled]))
    found = f"the same text tokens, image embeddings within {max(embeddings):.2%}, logits within {distance:.2%}"
    if not (max(embeddings) <= EMBEDDINGS and distance <= tolerance):
        limits = f"limits are {EMBEDDINGS:.0%} and {tolerance:.0%}"
        raise UserError(
            f"llama.cpp computes another model: {found} of those of transformers, where {limits}; "
            "nothing was exported, try --quantize f16"
        )
    return found


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm()) if found.shape == expected.shape else float("inf")


def _compare_classes(expected: dict[str, tuple[int, int]], found: dict[str, tuple[int, int]]) -> str:
    """McNemar's test of transformers and llama.cpp on the same images, in words. Raises UserError if it is worse."""
    same = sum(found[image][0] == expected[image][0] for image in expected)
    is_right = [found[image][0] == found[image][1] for image in expected]
    metrics = mcnemar([predicted == true for predicted, true in expected.values()], is_right)
    sentence = f"the same class as plain transformers for {same:,} of {metrics['n']:,} images, top-1 "
    sentence += f"{metrics['second']:.3f} and {metrics['first']:.3f} (p = {metrics['p']:.2g}, McNemar)"
    if verify.is_worse(metrics):
        raise UserError(f"llama.cpp classifies worse: {sentence}; nothing was exported, try --quantize f16")
    return sentence


# ---- for users


def _save_texts(run: Run, plant: PlantModel, draft: Path, verification: str, facts: dict) -> None:
    """README.md, Modelfile, and class_names.json, which has the facts too."""
    tile = plant.collator.processor.image_processor.crop_size["height"]
    sides = dict.fromkeys(side for side in (run.config.image_size, tile) if side)
    use = render("gguf_use.md.j2", **facts, eos_id=plant.prompt.eos_id, sides=sides, context=CONTEXT, no_flash=NO_FLASH)
    write_texts(run, plant.prompt, draft, facts, verification=verification, is_merged=True, use=use)
    (draft / "Modelfile").write_text(render("Modelfile.j2", **facts, eos=plant.prompt.eos), encoding="utf-8")
