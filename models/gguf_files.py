"""A LLaVA-1.5 as llama.cpp reads it: one GGUF file of the language model, one of vision tower and projector.

Tensors are copied one by one from safetensors, so that memory does not grow with the model. Names and metadata keys are
those of the `gguf` package, which is imported where it is used: few users have it.

Shapes: N patches, D width of the tower.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoProcessor, LlavaConfig, LlavaNextConfig

from models.loading import SavedTensor, read_tensors
from utils.logging_utils import UserError

PROJECTOR = {"linear_1": "mm.0", "linear_2": "mm.2"}
Convert = Callable[[str, torch.Tensor], torch.Tensor]  # of a name and its weight


def find_gguf_obstacle(config: LlavaConfig | LlavaNextConfig) -> str | None:
    """What of a model llama.cpp has no equal for, in words."""
    text, vision = config.text_config, config.vision_config
    expected = [
        ("language model", text.model_type, ("llama", "mistral")),  # llama.cpp's "llama"
        ("rotary embedding", text.rope_parameters["rope_type"], ("default",)),
        ("activation", text.hidden_act, ("silu",)),
        ("vision tower", vision.model_type, ("clip_vision_model",)),
        ("vision tower's activation", vision.hidden_act, ("quick_gelu", "gelu")),
        ("projector's activation", config.projector_hidden_act, ("gelu",)),
        ("number of feature layers", len(_feature_layers(config)), (1,)),
        ("vision_feature_select_strategy", config.vision_feature_select_strategy, ("default",)),
    ]
    wrong = (
        f"its {part} is {found}, not {' or '.join(map(str, can))}" for part, found, can in expected if found not in can
    )
    return next(wrong, None)


def _feature_layers(config: LlavaConfig | LlavaNextConfig) -> list[int]:
    """After how many layers of the vision tower each feature is taken."""
    layers = config.vision_feature_layer
    layers = [layers] if isinstance(layers, int) else layers
    return [layer if layer >= 0 else config.vision_config.num_hidden_layers + 1 + layer for layer in layers]


# ---- the language model


def write_language_model(folder: Path, path: Path, chat_template: str) -> None:
    """Matrices in fp16, as in `folder`; vectors in fp32. Raises UserError for a weight without a place."""
    import gguf

    config, (_, language_model) = LlavaConfig.from_pretrained(folder).text_config, split_tensors(folder)
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(path.stem)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    add_tokenizer(writer, folder, config.vocab_size)
    writer.add_chat_template(chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    places = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in language_model}
    interleaved = {"q_proj": heads, "k_proj": key_heads}

    def convert(name: str, weight: torch.Tensor) -> torch.Tensor:
        count = interleaved.get(name.split(".")[-2])
        return weight if count is None else interleave(weight, count)

    write_tensors(writer, language_model, places, convert)


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from halves (as transformers rotates them) to pairs (as llama.cpp does)."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def add_tokenizer(writer: Any, folder: Path, size: int) -> None:
    """Tokens, merges or scores, types, and ids of the special tokens; `size`: rows of the embeddings."""
    import gguf

    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in saved["model"]["merges"]]
    is_spm = saved["model"].get("byte_fallback", False)
    vocabulary = (gguf.LlamaHfVocab if is_spm else gguf.BpeVocab)(folder)
    tokens, scores, types = map(list, zip(*vocabulary.all_tokens()))
    tokens = [token.encode() if isinstance(token, str) else token for token in tokens]
    special = {token["id"]: token["special"] for token in saved["added_tokens"]}
    for index, is_special in special.items():
        types[index] = gguf.TokenType.CONTROL if is_special else gguf.TokenType.USER_DEFINED
    for index in range(len(tokens), size):  # rows that were added to the embeddings for speed
        tokens, scores, types = [*tokens, f"[PAD{index}]".encode()], [*scores, -1e4], [*types, gguf.TokenType.UNUSED]
    writer.add_tokenizer_model(vocabulary.tokenizer_model)
    if is_spm:
        # The gguf package gives no scores without a sentencepiece file; what is merged first has the highest.
        rank = {}
        for index, merge in enumerate(merges):
            rank.setdefault(merge.replace(" ", "").encode(), float(-index))
        scores = [rank.get(token, -1e6) for token in tokens]
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_prepend_scheme(tokenizer) == "always")
        writer.add_token_scores(scores)
    else:
        is_llama3 = saved["pre_tokenizer"]["type"] == "Sequence"
        writer.add_tokenizer_pre("llama-bpe" if is_llama3 else "gpt-2")
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "padding": tokenizer.pad_token_id}
    for name, index in ids.items():
        if index is not None:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    writer.add_add_bos_token(tokenizer("").input_ids[:1] == [tokenizer.bos_token_id])


def build_runtime_prompt(tokenizer, prompt: str) -> str:
    """`prompt` with the space written out that a tokenizer puts before the first text alone."""
    return " " + prompt if _prepend_scheme(tokenizer) == "first" else prompt


def _prepend_scheme(tokenizer) -> str:
    """Where a space is put before text between special tokens: always, first, never; llama.cpp has all or none."""
    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    if not saved["model"].get("byte_fallback", False):
        return "never"
    return (saved["pre_tokenizer"] or {}).get("prepend_scheme", "always")  # else its normalizer prepends


# ---- vision tower and projector


def write_vision(folder: Path, path: Path, rolled: bool) -> None:
    """Those layers of the vision tower that run, and the projector; matrices in fp16.

    `rolled` moves each row of the position table (N + 1, D) one up, the first to the end: for a runtime that puts the
    CLS token behind the patches and reads the table as if it stood before them (ggml-org/llama.cpp#25814).
    """
    import gguf

    config, (vision, _) = LlavaConfig.from_pretrained(folder), split_tensors(folder)
    tower, (layers,) = config.vision_config, _feature_layers(config)
    image = AutoProcessor.from_pretrained(folder).image_processor
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_name(path.stem)
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(tower.image_size)
    writer.add_vision_patch_size(tower.patch_size)
    writer.add_vision_embedding_length(tower.hidden_size)
    writer.add_vision_feed_forward_length(tower.intermediate_size)
    writer.add_vision_projection_dim(config.text_config.hidden_size)
    writer.add_vision_block_count(layers)
    writer.add_array("clip.vision.feature_layer", [layers])  # without it one layer less is computed (#25817)
    writer.add_vision_head_count(tower.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(tower.layer_norm_eps)
    writer.add_vision_use_gelu(tower.hidden_act == "gelu")
    writer.add_vision_image_mean(image.image_mean)
    writer.add_vision_image_std(image.image_std)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, tower.num_hidden_layers)
    places = {}
    for name in vision:
        parts = name.split(".")
        if parts[1] in PROJECTOR:
            places[name] = f"{PROJECTOR[parts[1]]}.{parts[2]}"
        elif parts[1] != "post_layernorm" and not ("layers" in parts and int(parts[3]) >= layers):
            known = name.replace("vision_tower.", "vision_tower.vision_model.")
            places[name] = names.get_name(known, try_suffixes=(".weight", ".bias"))

    def convert(name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight.roll(-1, dims=0) if rolled and name.endswith("position_embedding.weight") else weight

    write_tensors(writer, vision, places, convert)


# ---- both


def split_tensors(folder: Path) -> tuple[dict[str, SavedTensor], dict[str, SavedTensor]]:
    """(vision tower and projector, language model), by names without what differs between versions of transformers."""
    vision, language_model = {}, {}
    for name, tensor in read_tensors(folder, str(folder)).items():
        _, found, rest = name.partition("vision_tower.")
        if found or "multi_modal_projector." in name:
            vision[found + rest.removeprefix("vision_model.") or name[name.index("multi_modal_projector.") :]] = tensor
        else:
            rest = name.removeprefix("model.").removeprefix("language_model.").removeprefix("model.")
            language_model[rest if rest.startswith("lm_head") else f"model.{rest}"] = tensor
    return vision, language_model


def write_tensors(
    writer: Any, tensors: dict[str, SavedTensor], places: dict[str, str | None], convert: Convert
) -> None:
    """`places` are the names in the file. Raises UserError for a tensor without one."""
    if lost := [name for name, place in places.items() if place is None]:
        raise UserError(f"{len(lost)} weights have no place in a GGUF file ({lost[0]}); leave out --format gguf")
    is_vector = {name: len(tensors[name].shape) < 2 or name.endswith("position_embedding.weight") for name in places}
    for name, place in places.items():
        dtype = np.dtype(np.float32 if is_vector[name] else np.float16)
        shape = tensors[name].shape
        writer.add_tensor_info(place, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in places:
        weight = convert(name, tensors[name][...]).to(torch.float32 if is_vector[name] else torch.float16)
        writer.write_tensor_data(weight.contiguous().numpy())
    writer.close()
