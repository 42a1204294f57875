"""The prompt, taken apart from the checkpoint's own chat template, and a probe of its tokenizer."""

from typing import NamedTuple

from utils.logging_utils import UserError

# Tokenizers differ in what they make of the characters around <image>.
PROBE = "[INST] <image>\nWhat flower is shown in this image? [/INST] colt's foot"


class Prompt(NamedTuple):
    """prompt + response_prefix + answer + eos is one training text; generation starts from prompt alone."""

    prompt: str  # the user's turn, with one image token in it; ends without a space
    response_prefix: str  # what the chat template puts between its generation prompt and an answer
    eos: str  # the end-of-turn token, at which generation stops
    eos_id: int

    def text(self, answer: str) -> str:
        return self.prompt + self.response_prefix + answer + self.eos


def build_prompt(processor, question: str, stop_ids: list[int]) -> Prompt:
    """Take the chat template apart around a placeholder answer.

    `stop_ids` are the token ids at which generation stops. The template's own end-of-turn token is used if it is one
    of them, else the tokenizer's EOS token: some templates on the hub end an answer with plain text.
    Raises UserError if the template lacks a part, or its parts do not fit together.
    """
    tokenizer = processor.tokenizer
    answer = "ANSWER"
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    if not processor.chat_template:
        raise UserError("the checkpoint has no chat template; use one whose processor has it, such as llava-hf's")
    prompt = processor.apply_chat_template([user], add_generation_prompt=True)
    dialog = processor.apply_chat_template([user, reply])
    if not dialog.startswith(prompt) or answer not in dialog[len(prompt) :]:
        raise UserError(
            f"the chat template's {dialog!r} does not continue its prompt {prompt!r}; use another checkpoint"
        )
    response_prefix, _, tail = dialog[len(prompt) :].partition(answer)
    stripped = prompt.rstrip(" ")  # a prompt that ends in a space is tokenized unlike the same text inside an answer
    response_prefix, prompt = prompt[len(stripped) :] + response_prefix, stripped
    if tokenizer.bos_token and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        prompt = prompt.removeprefix(tokenizer.bos_token)  # the tokenizer adds its own
    if (count := prompt.count(processor.image_token)) != 1:
        raise UserError(f"the chat template puts {count} image tokens into {prompt!r}, not 1; use another checkpoint")
    if not stop_ids:
        raise UserError("the checkpoint has no eos_token_id, so no answer could end; set it in generation_config.json")
    fallback = tokenizer.eos_token_id if tokenizer.eos_token_id in stop_ids else stop_ids[0]
    template_eos = (stop for stop in stop_ids if tail.lstrip().startswith(tokenizer.convert_ids_to_tokens(stop)))
    eos_id = next(template_eos, fallback)
    return Prompt(prompt, response_prefix, tokenizer.convert_ids_to_tokens(eos_id), eos_id)


def tokenizer_probe(tokenizer) -> list[int]:
    """Token ids of a fixed text, recorded with a run and compared at load: saving can change a tokenizer silently."""
    return tokenizer(PROBE).input_ids
