"""An adapter merged into the 16-bit weights of its base, file by file: no more than one file is in memory.

Merging into the 4-bit base would round the sum and so change the model's output (0.05 and more in the logits of a tiny
model). The adapter was trained on rounded weights and is added to those that were not.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from transformers import LlavaNextConfig, LlavaProcessor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from models.base_view import build_llava_config, convert_weights, save_newline_token
from models.checks import check_adapter
from models.loading import load_generation_config, read_tensors
from utils.logging_utils import UserError
from utils.tokenizer_utils import Prompt

SHARD_BYTES = 2_000_000_000  # of each file written, and so of host memory
PARTS = ("language_model.", "multi_modal_projector.")  # the parts of the model that an adapter may hold


class Adapter(NamedTuple):
    """What PEFT saved: for each module its A (r, in) and B (out, r), and whole weights of modules_to_save."""

    low_rank: dict[str, tuple[torch.Tensor, torch.Tensor]]
    whole: dict[str, torch.Tensor]
    scale: float  # alpha / r


def read_adapter(folder: Path, settings: LoraConfig) -> Adapter:
    """Names are those of the model without PEFT, such as model.language_model.layers.0.self_attn.q_proj.

    Raises UserError for files that are not of an adapter with these settings.
    """
    check_adapter(folder, settings)
    weights = load_file(folder / SAFETENSORS_WEIGHTS_NAME)
    saved = {name.removeprefix("base_model.model."): weight for name, weight in weights.items()}
    all_b = {name.removesuffix(".lora_B.weight"): b for name, b in saved.items() if name.endswith(".lora_B.weight")}
    low_rank = {name: (saved[a], b) for name, b in all_b.items() if (a := f"{name}.lora_A.weight") in saved}
    whole = {name: weight for name, weight in saved.items() if ".lora_" not in name}
    ranks = {settings.r, *(a.shape[0] for a, _ in low_rank.values()), *(b.shape[1] for _, b in low_rank.values())}
    if 2 * len(low_rank) + len(whole) != len(saved) or len(ranks) > 1:
        reason = f"holds weights that are of no LoRA adapter of rank {settings.r}"
        raise UserError(f"{folder}: {reason}; export a run that train.py made")
    return Adapter(low_rank, whole, settings.lora_alpha / settings.r)


def merge_into(base: Path, adapter: Adapter | None, out: Path, dtype: torch.dtype, processor=None) -> None:
    """Write the safetensors of `base`, a folder, with the adapter in them, to `out`. None: in another dtype only.

    In the layout of LLaVA-1.5, if the `processor` saved beside them is its.
    Raises UserError for a base in 4 bit, for an adapter weight without a place, and for numbers that fp16 cannot hold.
    """
    sources = read_tensors(base, str(base))
    if isinstance(processor, LlavaProcessor):
        sources = convert_weights(sources, processor.tokenizer)
    low_rank = {_place(f"{name}.weight"): pair for name, pair in adapter.low_rank.items()} if adapter else {}
    whole = {_place(name): weight for name, weight in adapter.whole.items()} if adapter else {}
    unused = {*low_rank, *whole}
    empty = {
        name: torch.empty(source.shape, dtype=dtype if "F" in source.dtype else torch.int64, device="meta")
        for name, source in sources.items()
    }
    shards = split_torch_state_dict_into_shards(empty, max_shard_size=SHARD_BYTES)
    for file, in_shard in shards.filename_to_tensors.items():
        merged = {}
        for name in in_shard:
            place = _place(name)
            weight = sources[name][...]
            if place in low_rank:
                if not weight.is_floating_point():
                    raise UserError(
                        f"{base}: {name} is not in 16 bit ({weight.dtype}), and merging into 4 bit would change "
                        "answers; put the checkpoint there that is not quantized"
                    )
                a, b = low_rank[place]
                weight = weight.float() + adapter.scale * (b.float() @ a.float())
            elif place in whole:
                weight = whole[place]
            unused.discard(place)
            merged[name] = weight.to(dtype) if weight.is_floating_point() else weight
            if not torch.isfinite(merged[name]).all():
                raise UserError(f"{name}: is too large for {dtype}; use --dtype bf16")
        save_file(merged, out / file, metadata={"format": "pt"})
    if unused:
        place = f"{len(unused)} weights of the adapter have no place in it ({', '.join(sorted(unused)[:2])})"
        raise UserError(f"{base}: {place}; give the base that it was trained on")
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (out / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_settings(base: Path, processor, prompt: Prompt, dtype: torch.dtype, out: Path) -> None:
    """Processor, config and generation config: it stops where training ended an answer."""
    settings = LlavaNextConfig.from_pretrained(base)
    settings.architectures = ["LlavaNextForConditionalGeneration"]
    if isinstance(processor, LlavaProcessor):
        settings = build_llava_config(settings)
    settings.dtype = dtype
    settings.save_pretrained(out)
    generation = load_generation_config(base, settings)
    stops = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    generation.eos_token_id = sorted({stop for stop in stops if stop is not None} | {prompt.eos_id})
    generation.pad_token_id = processor.tokenizer.pad_token_id
    generation.save_pretrained(out)
    save_processor(processor, out)
    if isinstance(processor, LlavaProcessor):
        save_newline_token(out, processor)


def save_processor(processor, out: Path) -> None:
    """Padded on the left, as generation needs it; the collator passes its side explicitly."""
    processor.tokenizer.padding_side = "left"
    processor.save_pretrained(out)


def weights_bytes(base: Path, dtype: torch.dtype) -> int:
    """Of the floating-point weights in a folder, once they are of this dtype."""
    return sum(math.prod(source.shape) for source in read_tensors(base, str(base)).values()) * dtype.itemsize


def _place(name: str) -> str:
    """Where a weight sits: the same for its name in a file on the hub and in the model in memory."""
    for part in PARTS:
        _, found, rest = name.partition(part)
        if found:
            return part + rest.removeprefix("model.")
    return name
