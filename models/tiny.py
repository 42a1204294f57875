"""A LLaVA-NeXT of about half a million random weights with its processor, built from config: no download.

The same classes as a full-size checkpoint, so that everything from the collator to the scores runs unchanged.
"""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
)

TILE = 70  # pixels; 5 x 5 patches, so that a photo of this size takes 55 image tokens
PATCH = 14
# One pinpoint, so that a square photo is two tiles and not three of which one is half empty.
PINPOINTS = [[TILE, TILE]]
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
IMAGE_TOKEN = "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} [/INST]"
    "{% else %} {{ message['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
)


def build_tiny_processor(
    texts: Iterable[str], chat_template: str = CHAT_TEMPLATE, special_tokens: dict[str, str] = SPECIAL_TOKENS
) -> LlavaNextProcessor:
    """A processor over a byte-level BPE tokenizer whose words are those of `texts` (class names, the question)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        show_progress=False,
        special_tokens=[*special_tokens.values(), IMAGE_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    # Names follow the joiner's space in training, so the words are learned with it.
    tokenizer.train_from_iterator([f"[INST] {text} [/INST]" for text in texts], trainer)
    bos = special_tokens.get("bos_token")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, image_grid_pinpoints=PINPOINTS
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


def build_tiny_model(
    processor: LlavaNextProcessor, seed: int, text_config: type = MistralConfig
) -> LlavaNextForConditionalGeneration:
    """Random weights for a processor of build_tiny_processor; float32, on the CPU."""
    tokenizer = processor.tokenizer
    # transformers' initializer_range of 0.02 suits widths in the thousands; at width 96 learning barely starts with it.
    text = text_config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if hasattr(text, "sliding_window"):
        text.sliding_window = None
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=8,
        image_size=TILE,
        patch_size=PATCH,
        projection_dim=96,
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaNextForConditionalGeneration(config).float()
    model.generation_config = GenerationConfig.from_model_config(config)
    return model
