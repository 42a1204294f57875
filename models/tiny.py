"""LLaVA-NeXTs of random weights with their processors, built from config: no download.

`tiny` has 0.7 million weights, for synthetic images on two CPU cores; `scratch` 27 million, for real images on a GPU;
`full` 7.6 billion, to measure a GPU before 15 GB are downloaded.

The same classes as a full-size checkpoint, so that everything from the collator to the scores runs unchanged.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from bitsandbytes.nn import Params4bit
from tokenizers import ByteLevelBPETokenizer, Tokenizer, processors
from transformers import (
    BitsAndBytesConfig,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights
from transformers.integrations import replace_with_bnb_linear

PATCH = 14


class Shape(NamedTuple):
    """The numbers of a LLaVA-NeXT."""

    tile: int  # pixels
    pinpoints: list[list[int]]  # (height, width) of the tilings
    text: dict[str, Any]  # settings of the language model
    vision: dict[str, Any]  # settings of the vision tower
    feature_layer: int = -2  # of the vision tower


class Size(Shape):
    """Those of a small one, whose language model and tower are as wide; a square image is two tiles.

    transformers' initializer_range of 0.02 suits widths in the thousands; narrow models hardly learn with it.
    """

    def __new__(cls, tile: int, width: int, heads: int, vision_layers: int, layers: int, initializer_range: float):
        shape = {"hidden_size": width, "num_attention_heads": heads}
        text = {"num_key_value_heads": heads, "num_hidden_layers": layers, "intermediate_size": 3 * width}
        text |= {"max_position_embeddings": 4096, "initializer_range": initializer_range}
        vision = {"projection_dim": width, "num_hidden_layers": vision_layers, "intermediate_size": 4 * width}
        return super().__new__(cls, tile, [[tile, tile]], shape | text, shape | vision, -1)


SIZES: dict[str, Shape] = {
    "tiny": Size(tile=70, width=96, heads=8, vision_layers=2, layers=3, initializer_range=0.1),  # 55 image tokens
    "scratch": Size(tile=112, width=384, heads=6, vision_layers=8, layers=6, initializer_range=0.05),  # 136
    # The shape of llava-v1.6-mistral-7b, to measure a GPU with: 7.57 billion weights, 1,176 to 2,928 image tokens.
    "full": Shape(
        tile=336,
        pinpoints=[[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        text=dict(vocab_size=32064, max_position_embeddings=32768, rope_theta=1e6),  # all else as MistralConfig has it
        vision=dict(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, projection_dim=768
        ),
    ),
}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
IMAGE_TOKEN = "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} [/INST]"
    "{% else %} {{ message['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
)


def build_tiny_processor(
    texts: Iterable[str],
    size: Shape = SIZES["tiny"],
    chat_template: str = CHAT_TEMPLATE,
    special_tokens: dict[str, str] = SPECIAL_TOKENS,
) -> LlavaNextProcessor:
    """A processor over a byte-level BPE tokenizer whose words are those of `texts` (class names, the question)."""
    trained = ByteLevelBPETokenizer()
    # Names follow the response_prefix's space in training, so the words are learned with it.
    texts = [f"[INST] {text} [/INST]" for text in texts]
    special = [*special_tokens.values(), IMAGE_TOKEN]
    trained.train_from_iterator(texts, vocab_size=4096, min_frequency=0, show_progress=False, special_tokens=special)
    tokenizer = Tokenizer.from_str(trained.to_str())
    bos = special_tokens.get("bos_token")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": size.tile},
            crop_size={"height": size.tile, "width": size.tile},
            image_grid_pinpoints=size.pinpoints,
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            padding_side="left",
            extra_special_tokens={"image_token": IMAGE_TOKEN},
            **special_tokens,
        ),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=chat_template,
    )


def build_config(processor: LlavaNextProcessor, size: Shape, text_config: type = MistralConfig) -> LlavaNextConfig:
    """For a processor of build_tiny_processor."""
    ids = {name: getattr(processor.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = text_config(**{"vocab_size": len(processor.tokenizer)} | size.text | ids)
    if hasattr(text, "sliding_window"):
        text.sliding_window = None
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(image_size=size.tile, patch_size=PATCH, **size.vision),
        text_config=text,
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
        vision_feature_layer=size.feature_layer,
        **ids,
    )


def build_tiny_model(
    processor: LlavaNextProcessor, seed: int, size: Shape = SIZES["tiny"], text_config: type = MistralConfig
) -> LlavaNextForConditionalGeneration:
    """Random weights for a processor of build_tiny_processor; float32, on the CPU."""
    config = build_config(processor, size, text_config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaNextForConditionalGeneration(config).float()
    model.generation_config = GenerationConfig.from_model_config(config)
    return model


def build_random_model(
    config: LlavaNextConfig, device: torch.device, dtype: torch.dtype, quantization: BitsAndBytesConfig | None
) -> LlavaNextForConditionalGeneration:
    """Random weights of any shape, made on the device one by one: no more memory is used than the model takes."""
    config._attn_implementation = "sdpa"
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = LlavaNextForConditionalGeneration(config)
    if quantization is not None:
        model = replace_with_bnb_linear(model, quantization.llm_int8_skip_modules, quantization)
        model.is_loaded_in_4bit = True  # PEFT asks for it
    for module in model.modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            weight = torch.ones(empty.shape, dtype=dtype, device=device)
            if empty.dim() > 1:
                weight.normal_(std=config.text_config.initializer_range)
            elif name == "bias":
                weight.zero_()
            if isinstance(empty, Params4bit):
                how = {"compress_statistics": empty.compress_statistics, "quant_type": empty.quant_type}
                setattr(module, name, Params4bit(weight, module=module, **how).to(device))  # quantizes
            else:
                setattr(module, name, torch.nn.Parameter(weight))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))
    model.generation_config = GenerationConfig.from_model_config(config)
    return model
