"""The assertions on a loaded model: that it is what was asked for, walked module by module."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import LlavaNextForConditionalGeneration, LlavaNextProcessor

from models.fused_layers import unwrap
from models.trainable import LORA_TARGETS, PROJECTIONS
from runtime.run_dir import Run
from runtime.run_files import ANY, brief, read_json
from utils.image_utils import BASE_VIEW
from utils.logging_utils import UserError
from utils.tokenizer_utils import Prompt

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
# Fields of adapter_config.json that say where and by what it was saved.
OF_ITS_PLACE = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")
SAMPLES, SAMPLE_BYTES = 64, 4096  # read of each weights file for its fingerprint


def check_model(
    model: nn.Module, processor: LlavaNextProcessor, prompt: Prompt, load_in_4bit: bool, trainable: str, precision: str
) -> list[str]:
    """Walk the loaded model; returns a sentence for each assertion. Raises UserError with all that do not hold."""
    found = [
        *_check_processor(unwrap(model), processor, prompt),
        *_check_weights(model, load_in_4bit, trainable, DTYPES[precision]),
    ]
    wrong = [sentence for holds, sentence in found if not holds]
    if wrong:
        reason = f"the loaded model is not what was asked for; these do not hold: {'; '.join(wrong)}"
        raise UserError(f"{reason}; use another checkpoint, or another --model-revision")
    return [sentence for _, sentence in found]


def _check_processor(base: LlavaNextForConditionalGeneration, processor, prompt: Prompt) -> Iterable[tuple[bool, str]]:
    config, image_processor = base.config, processor.image_processor
    tile, patch = config.vision_config.image_size, config.vision_config.patch_size
    patches, sizes = (tile // patch) ** 2, (image_processor.size, image_processor.crop_size)
    sides = {side for size in sizes for side in vars(size).values() if side is not None}
    tower = base.model.vision_tower
    positions = [part.shape[-2] for name, part in tower.named_parameters() if "position_embedding" in name]
    pinpoints = [list(map(list, owner.image_grid_pinpoints)) for owner in (image_processor, config)]
    newlines = int(pinpoints[0] == BASE_VIEW)
    cls = processor.num_additional_image_tokens - newlines
    strategy = processor.vision_feature_select_strategy, cls
    tokens, embeddings = len(processor.tokenizer), base.get_input_embeddings().num_embeddings
    stop_ids = base.generation_config.eos_token_id
    stop_ids = [stop_ids] if isinstance(stop_ids, int) else stop_ids or []
    token_id = processor.image_token_id
    kind = type(image_processor).__name__
    yield kind.endswith("Pil"), f"image processor is the PIL back end ({kind})"
    yield token_id == config.image_token_id, f"image token {token_id} is the model's {config.image_token_id}"
    yield sides == {tile}, f"tiles of {sorted(sides)} pixels are the vision tower's {tile}"
    yield processor.patch_size == patch, f"patches of {processor.patch_size} pixels are the vision tower's {patch}"
    # Towers without a table of positions: loading.py has run each.
    fits = positions in ([], [patches + cls])
    yield fits, f"a tile is {patches} patches + {cls} CLS, the vision tower has {positions or 'no table of positions'}"
    yield pinpoints[0] == pinpoints[1], "pinpoints are the model's"
    yield strategy in (("default", 1), ("full", 0)), "CLS, where there is one, is counted and dropped"
    yield tokens <= embeddings, f"all {tokens} tokens have an embedding of the model's {embeddings}"
    yield prompt.eos_id in stop_ids, f"generation stops at {prompt.eos!r}"


def _check_weights(model, load_in_4bit: bool, trainable: str, dtype: torch.dtype) -> Iterable[tuple[bool, str]]:
    base, is_full = unwrap(model), trainable == "everything"
    modules = dict(base.named_modules())
    linears = {name for name in modules if re.fullmatch(LORA_TARGETS, name)}
    expected = len(PROJECTIONS) * base.config.text_config.num_hidden_layers
    is_whole = is_full or len(linears) == expected
    yield is_whole, f"{len(linears)} language-model projections (7 in each of {expected // 7} layers)"
    quantized = {
        name.removesuffix(".base_layer"): part for name, part in modules.items() if isinstance(part, Linear4bit)
    }
    in_4bit = linears if load_in_4bit else set()
    yield set(quantized) == in_4bit, f"{len(quantized)} linears in 4 bit, only in the language model"
    states = [module.weight.quant_state for module in quantized.values()]
    is_nested_nf4 = all(state.quant_type == "nf4" and state.nested for state in states)
    yield is_nested_nf4, "4-bit weights are nf4 with double quantization"
    wanted = torch.float32 if is_full else dtype
    for part in (base.model.vision_tower, base.model.multi_modal_projector, base.lm_head):
        kept = {parameter.dtype for parameter in part.parameters() if not parameter.requires_grad}
        yield kept <= {wanted}, f"{type(part).__name__} is kept in {wanted}"
    adapted = {name for name, module in modules.items() if isinstance(module, LoraLayer)}
    in_adapter = set() if is_full else linears
    yield adapted == in_adapter, f"LoRA sits on {len(adapted)} language-model projections, nowhere else"
    train = {name: parameter for name, parameter in base.named_parameters() if parameter.requires_grad}
    is_fp32 = bool(train) and all(parameter.dtype == torch.float32 for parameter in train.values())
    yield is_fp32, "trainable parameters are fp32"
    unexpected = [name for name in train if _part_of(name) not in trainable and not is_full]
    count = sum(map(torch.numel, train.values()))
    others = f"others too: {unexpected[:3]}" if unexpected else "no others"
    yield not unexpected, f"{count:,} parameters are trainable ({trainable}), {others}"


def _part_of(name: str) -> str:
    """The word of --trainable that covers a parameter."""
    if ".language_model." in name and ".lora_" in name:
        return "adapter"
    return "projector" if ".multi_modal_projector.modules_to_save." in name else "everything"


# ---- that it is the model a run was trained on


def weights_fingerprint(model: str) -> str | None:
    """Hash of a few KB of each weights file of a folder: other weights differ everywhere. None for a hub model.

    A model of the hub has its commit; its cached files have other names on every machine.
    """
    files = sorted(Path(model).glob("*.safetensors")) if model and Path(model).is_dir() else []
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for sample in range(SAMPLES):
                file.seek(sample * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest() if files else None


def check_adapter(folder: Path, settings: LoraConfig) -> None:
    """Raise UserError unless the folder's adapter_config.json, which anyone may have written, says what the run does.

    Only its tensors are used: adapters are built from the run's own config.
    """
    expected = json.loads(json.dumps(settings.to_dict(), default=sorted))
    try:
        found = read_json(folder / "adapter_config.json", {str: ANY})
        wrong = [
            name for name in expected if name not in OF_ITS_PLACE and found.get(name, expected[name]) != expected[name]
        ]
        reason = "; ".join(f"{name}: {brief(found[name])}, not {expected[name]}" for name in wrong[:3])
    except (OSError, ValueError) as error:
        reason = f"{error}"
    if reason:
        problem = f"its adapter_config.json is not that of the run's adapter ({reason})"
        raise UserError(f"{folder}: {problem}; put the run's own files back, or train again in another folder")


def check_same_base(found: dict, run: Run) -> None:
    """Raise UserError unless tokenizer, commit and weights, as far as they were found, are those the run recorded."""
    names = [name for name in ("tokenizer_probe", "model_commit", "model_files") if name in found]
    changed = [name for name in names if name in run.recorded and found[name] != run.recorded[name]]
    if changed:
        raise UserError(
            f"--model {run.config.model}: is not what {run.folder} was trained on ({', '.join(changed)} differ); put "
            "that checkpoint back"
        )
