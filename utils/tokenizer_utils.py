"""Prompt pieces from the checkpoint's own chat template, and our own arithmetic of image tokens.

H, W: height and width of an image in pixels. A tile is the square the vision tower sees, cut into patches.
"""

from typing import NamedTuple

from utils.logging_utils import UserError

# What stands around <image> tells tokenizers apart.
PROBE = "[INST] <image>\nWhat flower is shown in this image? [/INST] colt's foot"


class Prompt(NamedTuple):
    """prompt + response_prefix + answer + end is one training text; generation is given prompt alone."""

    prompt: str  # the user's turn, with one image token in it; ends without a space
    response_prefix: str  # what the chat template puts between its generation prompt and an answer
    end: str  # the token that generation stops at
    end_id: int

    def text(self, answer: str) -> str:
        return self.prompt + self.response_prefix + answer + self.end


def build_prompt(processor, question: str, stop_ids: list[int]) -> Prompt:
    """Take the chat template apart around a made-up answer.

    `stop_ids` are the ids that generation stops at. The template's own end of turn is used if it is one of them; hub
    templates exist that end an answer with plain text, so otherwise the tokenizer's end token is.
    Raises UserError where a piece is missing or the pieces do not fit together.
    """
    tokenizer = processor.tokenizer
    answer = "ANSWER"
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    if not processor.chat_template:
        raise UserError("the checkpoint has no chat template; use one whose processor has it, such as llava-hf's")
    prompt = processor.apply_chat_template([user], add_generation_prompt=True)
    whole = processor.apply_chat_template([user, reply])
    if not whole.startswith(prompt) or answer not in whole[len(prompt) :]:
        raise UserError(
            f"the chat template answers {whole!r}, which does not go on from its generation prompt {prompt!r}"
        )
    response_prefix, _, tail = whole[len(prompt) :].partition(answer)
    stripped = prompt.rstrip(" ")  # a prompt that ends in a space is tokenized unlike the same text inside an answer
    response_prefix, prompt = prompt[len(stripped) :] + response_prefix, stripped
    if (
        tokenizer.bos_token
        and prompt.startswith(tokenizer.bos_token)
        and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    ):
        prompt = prompt[len(tokenizer.bos_token) :]  # the tokenizer adds its own
    if prompt.count(processor.image_token) != 1:
        raise UserError(
            f"the chat template puts {prompt.count(processor.image_token)} image tokens into {prompt!r}; one is needed"
        )
    end_id = _end_of_turn(tokenizer, tail, stop_ids)
    return Prompt(prompt, response_prefix, tokenizer.convert_ids_to_tokens(end_id), end_id)


def _end_of_turn(tokenizer, tail: str, stop_ids: list[int]) -> int:
    if not stop_ids:
        raise UserError(
            "the checkpoint names no token that generation stops at (eos_token_id); nothing could be trained to end"
        )
    for stop_id in stop_ids:
        if tail.lstrip().startswith(tokenizer.convert_ids_to_tokens(stop_id)):
            return stop_id
    return tokenizer.eos_token_id if tokenizer.eos_token_id in stop_ids else stop_ids[0]


def count_image_tokens(size: tuple[int, int], pinpoints: list[list[int]], tile: int, patch: int) -> tuple[int, int]:
    """(image tokens, tiles) that LLaVA-NeXT makes of an image of this (H, W).

    One tile shows the whole image, (tile / patch)^2 tokens. The others show it at the pinpoint (H, W) that keeps most
    of its pixels and, among those, wastes least; rows and columns that only pad it are dropped, and each row that is
    left ends in a newline token. Uses neither the processor's code nor the model's: the three can be compared.
    """
    height, width = size
    best_height, best_width = max(pinpoints, key=lambda pinpoint: _kept_and_waste(size, pinpoint))
    side = tile // patch
    rows, columns = best_height // tile * side, best_width // tile * side
    if width * rows > height * columns:  # wider than the pinpoint: padded above and below
        rows -= (rows - int(round(height * columns / width, 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * rows / height, 7))) // 2 * 2
    return side * side + rows * (columns + 1), 1 + best_height // tile * (best_width // tile)


def _kept_and_waste(size: tuple[int, int], pinpoint: list[int]) -> tuple[int, int]:
    height, width = size
    scale = min(pinpoint[1] / width, pinpoint[0] / height)
    kept = min(int(width * scale) * int(height * scale), width * height)
    return kept, kept - pinpoint[0] * pinpoint[1]


def tokenizer_probe(tokenizer) -> list[int]:
    """Ids of a fixed text: kept with every run and compared at load, since saving can change a tokenizer silently."""
    return tokenizer(PROBE).input_ids
