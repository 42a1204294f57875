import pytest
import torch
from transformers import AutoProcessor

from tests.conftest import FAMILIES, QUESTION
from utils.logging_utils import UserError
from utils.tokenizer_utils import Prompt, build_prompt, count_image_tokens, tokenizer_probe

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
EXPECTED = {
    "mistral": ("[INST] <image>\n" + QUESTION + " [/INST]", " ", "</s>"),
    "vicuna": ("USER: <image>\n" + QUESTION + " ASSISTANT:", " ", "</s>"),
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\n" + QUESTION
        + "<|eot_id|><|start_header_id|>assistant<|end_header_id|>", "\n\n", "<|eot_id|>",
    ),
    "chatml": ("<|im_start|>user\n<image>\n" + QUESTION + "<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>"),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_pieces_come_from_the_template(family, checkpoint):
    processor = AutoProcessor.from_pretrained(checkpoint(family))
    tokenizer = processor.tokenizer
    prompt = build_prompt(processor, QUESTION, [tokenizer.eos_token_id])
    assert (prompt.prompt, prompt.response_prefix, prompt.end) == EXPECTED[family]
    ids = tokenizer(prompt.text("oak")).input_ids
    assert ids[-1] == prompt.end_id and (tokenizer.bos_token is None or ids.count(tokenizer.bos_token_id) == 1)


def processor_with(template, checkpoint):
    processor = AutoProcessor.from_pretrained(checkpoint("mistral"))
    processor.chat_template = template
    return processor


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "has no chat template"),
        ("{% for m in messages %}{% if m.role == 'user' %}<image> Q{% endif %}{% endfor %}", "does not go on from its"),
        ("{% for m in messages %}{% if m.role == 'user' %}Q{% else %} {{ m.content[0].text }}{% endif %}{% endfor %}",
         "puts 0 image tokens"),
        ("{% for m in messages %}{% if m.role == 'user' %}<image><image>{% else %} {{ m.content[0].text }}{% endif %}"
         "{% endfor %}", "puts 2 image tokens"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_used(template, words, checkpoint):
    with pytest.raises(UserError, match=words):
        build_prompt(processor_with(template, checkpoint), QUESTION, [1])


def test_a_prompt_that_ends_in_a_space_gives_it_to_the_joiner(checkpoint):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<image> Q: {% else %}{{ m.content[0].text }}{% endif %}"
        "{% endfor %}"
    )
    prompt = build_prompt(processor_with(template, checkpoint), QUESTION, [1])
    assert (prompt.prompt, prompt.response_prefix) == ("<image> Q:", " ")


def test_the_end_is_a_token_generation_stops_at(checkpoint):
    processor = AutoProcessor.from_pretrained(checkpoint("llama3"))
    other, end = 7, processor.tokenizer.eos_token_id
    assert build_prompt(processor, QUESTION, [other, end]).end_id == end
    assert build_prompt(processor, QUESTION, [other]).end_id == other
    with pytest.raises(UserError, match="names no token that generation stops at"):
        build_prompt(processor, QUESTION, [])


def test_a_probe_survives_saving(checkpoint, tmp_path):
    processor = AutoProcessor.from_pretrained(checkpoint("mistral"))
    processor.save_pretrained(tmp_path)
    assert tokenizer_probe(AutoProcessor.from_pretrained(tmp_path).tokenizer) == tokenizer_probe(processor.tokenizer)


@pytest.mark.parametrize(
    ("size", "tokens", "tiles"),
    [((336, 336), 1176, 3), ((500, 667), 2340, 5), ((667, 500), 2352, 5), ((500, 500), 2928, 5), ((1, 1000), 576, 4)],
)
def test_image_tokens_of_known_sizes(size, tokens, tiles):
    assert count_image_tokens(size, PINPOINTS, 336, 14) == (tokens, tiles)


def test_our_arithmetic_agrees_with_the_model_and_the_processor(tiny):
    """Images of many shapes through the real processor and the model's own packing of features."""
    from PIL import Image

    model = tiny.model()
    for size in [(1, 300), (300, 1), (2, 2), (70, 70), (69, 71), (35, 140), (211, 97), (97, 211)]:
        image = Image.new("RGB", size[::-1])
        encoded = tiny.processor(images=[image], text=[tiny.prompt.prompt], return_tensors="pt")
        tokens, tiles = tiny.native.count_tokens(size)
        with torch.no_grad():
            features = model.get_image_features(encoded["pixel_values"], encoded["image_sizes"]).pooler_output
        assert (encoded["input_ids"] == tiny.processor.image_token_id).sum() == tokens == len(features[0])
        assert encoded["pixel_values"].shape[1] == tiles


def test_text_is_the_pieces_in_order():
    assert Prompt("p", " ", "</s>", 2).text("oak") == "p oak</s>"
