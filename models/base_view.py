"""Images as their base view alone: one tile, the layout of LLaVA-1.5, on the weights of a LLaVA-NeXT.

LLaVA-NeXT ends an image of one tile in its newline embedding: P patches are P + 1 image tokens, which its own code
computes once its grid has no tiles. LLaVA-1.5 has P image tokens and no newline. So that an export of that layout
computes the same, the newline embedding becomes that of a token, which stands behind the image in the prompt: the token
of a byte that no text has. The vocabulary and its head stay as they are, so all logits are equal.
"""

import copy
import json
from pathlib import Path

from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaNextConfig, LlavaNextProcessor, LlavaProcessor

from models.loading import SavedTensor
from utils.image_utils import BASE_VIEW
from utils.logging_utils import UserError
from utils.tokenizer_utils import Prompt, build_prompt

NEWLINE = "<image_newline>"
# How vocabularies spell byte 0xFF, which UTF-8 has no use for; the latter is a letter in others.
UNUSED = ("<0xFF>", "\u00ff")
Processor = LlavaNextProcessor | LlavaProcessor  # the latter shows a model the base view alone


def select_views(processor: LlavaNextProcessor, views: str) -> Processor:
    """The same; for "base" one that makes an image's first tile alone, and image tokens for its patches and newline."""
    if views == "anyres":
        return processor
    settings, square = processor.image_processor.to_dict(), dict(processor.image_processor.crop_size)
    settings |= {"size": square, "do_center_crop": True, "do_pad": False, "image_grid_pinpoints": BASE_VIEW}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(**settings),
        tokenizer=processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        chat_template=processor.chat_template,
        image_token=processor.image_token,
        num_additional_image_tokens=processor.num_additional_image_tokens + 1,
    )


# ---- the same as a LLaVA-1.5


def build_llava_processor(processor, prompt: Prompt, question: str) -> tuple[LlavaProcessor, Prompt]:
    """(LLaVA-1.5's processor, its prompt with the newline token), from those of a model that sees base views.

    save_newline_token puts the token into the files. Raises UserError for a chat template that has no place for it.
    """
    llava, image_token = copy.deepcopy(processor), processor.image_token
    del llava.image_processor.image_grid_pinpoints
    llava.num_additional_image_tokens -= 1
    llava.chat_template = llava.chat_template.replace(image_token, image_token + NEWLINE)
    expected = prompt._replace(prompt=prompt.prompt.replace(image_token, image_token + NEWLINE))
    if build_prompt(llava, question, [prompt.eos_id]) != expected:
        reason = f"does not spell {image_token}, behind which {NEWLINE} has to stand"
        raise UserError(f"the chat template {reason}; use --adapter-only, or a template that spells it")
    return llava, expected


def find_unused_token(tokenizer) -> tuple[str, int]:
    """A token that no text contains, and its id. Raises UserError."""
    vocabulary = tokenizer.get_vocab()
    for token in UNUSED:
        if token in vocabulary and vocabulary[token] not in tokenizer(token).input_ids:
            return token, vocabulary[token]
    reason = f"has no token for byte 0xFF, whose place {NEWLINE} would take"
    raise UserError(f"the tokenizer {reason}; use --adapter-only, or a checkpoint with a byte-level tokenizer")


def save_newline_token(folder: Path, processor: LlavaProcessor) -> None:
    """Name the unused token of the tokenizer saved in `folder`; it takes in spaces as the image token does."""
    path, (unused, row) = folder / "tokenizer.json", find_unused_token(processor.tokenizer)
    saved = json.loads(path.read_text(encoding="utf-8"))
    saved["model"]["vocab"][NEWLINE] = saved["model"]["vocab"].pop(unused)
    like = next(token for token in saved["added_tokens"] if token["content"] == processor.image_token)
    saved["added_tokens"].append(like | {"id": row, "content": NEWLINE})
    saved["added_tokens"].sort(key=lambda token: token["id"])
    path.write_text(json.dumps(saved, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def build_llava_config(config: LlavaNextConfig) -> LlavaConfig:
    """Its head does not follow the embeddings, of which one is the newline's."""
    fields = config.to_dict() | {"model_type": "llava", "tie_word_embeddings": False}
    fields["image_seq_length"] = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    fields["text_config"]["tie_word_embeddings"] = False
    del fields["image_grid_pinpoints"]
    return LlavaConfig.from_dict(fields | {"architectures": ["LlavaForConditionalGeneration"]})


def convert_weights(sources: dict[str, SavedTensor], tokenizer) -> dict[str, SavedTensor]:
    """A LLaVA-NeXT's weights as a LLaVA-1.5's: the newline embedding is that of the unused token."""

    def find(ending: str) -> str:
        return next(name for name in sources if name.endswith(ending))

    found, name = dict(sources), find("embed_tokens.weight")
    if not any(key.endswith("lm_head.weight") for key in sources):  # it followed the embeddings
        is_old = name.startswith("language_model.")  # names as the hub's checkpoints have them
        found["language_model.lm_head.weight" if is_old else "lm_head.weight"] = sources[name]
    embedding, (_, row) = sources[name][...].clone(), find_unused_token(tokenizer)
    embedding[row] = found.pop(find("image_newline"))[...]
    found[name] = SavedTensor(name, embedding, sources[name].shape, sources[name].dtype)
    return found
