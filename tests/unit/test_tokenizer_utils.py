"""Tests of tokenizer utils."""

import pytest
from transformers import AutoProcessor

from tests.conftest import FAMILIES, QUESTION
from utils.logging_utils import UserError
from utils.tokenizer_utils import Prompt, build_prompt, tokenizer_probe

EXPECTED = {
    "mistral": ("[INST] <image>\n" + QUESTION + " [/INST]", " ", "</s>"),
    "vicuna": ("USER: <image>\n" + QUESTION + " ASSISTANT:", " ", "</s>"),
    "llama3": (
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\n" + QUESTION
        + "<|eot_id|><|start_header_id|>assistant<|end_header_id|>", "\n\n", "<|eot_id|>",
    ),
    "chatml": ("<|im_start|>user\n<image>\n" + QUESTION + "<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>"),
    "granite": ("<|user|>\n<image>\n" + QUESTION + "\n<|assistant|>\n", "", "<|end_of_text|>"),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_comes_from_the_template(family, checkpoint):
    processor = AutoProcessor.from_pretrained(checkpoint(family))
    tokenizer = processor.tokenizer
    prompt = build_prompt(processor, QUESTION, [tokenizer.eos_token_id])
    assert (prompt.prompt, prompt.response_prefix, prompt.eos) == EXPECTED[family]
    ids = tokenizer(prompt.text("oak")).input_ids
    assert ids[-1] == prompt.eos_id and (tokenizer.bos_token is None or ids.count(tokenizer.bos_token_id) == 1)


TEXT_ONLY = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [TEXT_ONLY, FAMILIES["mistral"][0]])
def test_a_template_of_the_tokenizer_serves_where_the_processor_has_none(template, checkpoint):
    """One for plain text, as language models have it, too."""
    processor = processor_with(None, checkpoint)
    processor.tokenizer.chat_template = template
    prompt = build_prompt(processor, QUESTION, [processor.tokenizer.eos_token_id])
    assert (prompt.prompt, prompt.response_prefix, prompt.eos) == EXPECTED["mistral"]


def processor_with(template, checkpoint):
    processor = AutoProcessor.from_pretrained(checkpoint("mistral"))
    processor.chat_template, processor.tokenizer.chat_template = template, None
    return processor


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "has no chat template"),
        ("{% for m in messages %}{% if m.role == 'user' %}<image> Q{% endif %}{% endfor %}", "does not continue its"),
        ("{% for m in messages %}{% if m.role == 'user' %}image{%else%}{{ m.content[0].text }}{% endif %}{% endfor %}",
         "puts 0 image tokens"),
        (("{% for m in messages %}{% if m.role == 'user' %}<image><image>{% else %} {{ m.content[0].text }}{% endif %}"
         "{% endfor %}"), "puts 2 image tokens"),
    ],
)  # fmt: skip
def test_a_template_that_cannot_be_used(template, words, checkpoint):
    with pytest.raises(UserError, match=words):
        build_prompt(processor_with(template, checkpoint), QUESTION, [1])


NESTED = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% if %}", "cannot be used .TemplateSyntaxError: Expected an expression"),
        ("{{ raise_exception('no images') }}", "cannot be used .TemplateError: no images"),
        ("{{ messages.user.text }}", "cannot be used .UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "cannot be used .SecurityError"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "cannot be used .RecursionError"),
        ("{{ 'a' * 10**10 }}", "cannot be used .MemoryError"),
        ("{{ 'a' * 10**6 }}", "makes a turn of 1,000,000 characters"),
        (NESTED, "does not end in 1 s"),
        (["<image>"], "cannot be used"),
    ],
)
def test_a_template_is_a_program_that_is_not_trusted(template, words, checkpoint, monkeypatch):
    monkeypatch.setattr("utils.tokenizer_utils.TEMPLATE_S", 1)
    with pytest.raises(UserError, match=f"the chat template {words}.*; use another checkpoint") as refused:
        build_prompt(processor_with(template, checkpoint), QUESTION, [1])
    assert len(str(refused.value)) < 500


def test_a_space_at_the_end_of_the_prompt_moves_to_the_response_prefix(checkpoint):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}<image> Q: {% else %}{{ m.content[0].text }}{% endif %}"
        "{% endfor %}"
    )
    prompt = build_prompt(processor_with(template, checkpoint), QUESTION, [1])
    assert (prompt.prompt, prompt.response_prefix) == ("<image> Q:", " ")


def test_eos_is_a_token_that_generation_stops_at(checkpoint):
    processor = AutoProcessor.from_pretrained(checkpoint("llama3"))
    other, end = 7, processor.tokenizer.eos_token_id
    assert build_prompt(processor, QUESTION, [other, end]).eos_id == end
    assert build_prompt(processor, QUESTION, [other]).eos_id == other
    with pytest.raises(UserError, match="has no eos_token_id"):
        build_prompt(processor, QUESTION, [])


def test_a_probe_survives_saving(checkpoint, tmp_path):
    processor = AutoProcessor.from_pretrained(checkpoint("mistral"))
    processor.save_pretrained(tmp_path)
    assert tokenizer_probe(AutoProcessor.from_pretrained(tmp_path).tokenizer) == tokenizer_probe(processor.tokenizer)


def test_training_text_is_its_parts_in_order():
    assert Prompt("p", " ", "</s>", 2).text("oak") == "p oak</s>"
