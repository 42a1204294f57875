"""The prompt, taken apart from the checkpoint's own chat template, and a probe of its tokenizer."""

import contextlib
import multiprocessing
import resource
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple

from utils.logging_utils import UserError, first_line

TEMPLATE_S, TEMPLATE_BYTES = 10, 2**30  # that a chat template may take: it is a program of whoever made the checkpoint
LONGEST = 20_000  # characters of a rendered turn
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
    Raises UserError if the template cannot be rendered, lacks a part, or its parts do not fit together.
    """
    tokenizer, answer = processor.tokenizer, "ANSWER"
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    prompt, dialog = _render(processor, [[user], [user, reply]])
    if not dialog.startswith(prompt) or answer not in dialog[len(prompt) :]:
        reason = f"{dialog[:200]!r} does not continue its prompt {prompt[:200]!r}"
        raise UserError(f"the chat template's {reason}; use another checkpoint")
    response_prefix, _, tail = dialog[len(prompt) :].partition(answer)
    stripped = prompt.rstrip(" ")  # a prompt that ends in a space is tokenized unlike the same text inside an answer
    response_prefix, prompt = prompt[len(stripped) :] + response_prefix, stripped
    if tokenizer.bos_token and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        prompt = prompt.removeprefix(tokenizer.bos_token)  # the tokenizer adds its own
    if (count := prompt.count(processor.image_token)) != 1:
        text = f"{prompt[:200]!r}, not 1 {processor.image_token}"
        raise UserError(f"the chat template puts {count} image tokens into {text}; use another checkpoint")
    if not stop_ids:
        raise UserError("the checkpoint has no eos_token_id, so no answer could end; set it in generation_config.json")
    if unknown := [stop for stop in stop_ids if stop not in range(len(tokenizer))]:
        reason = f"eos_token_id {unknown[0]} is none of the tokenizer's {len(tokenizer)} tokens"
        raise UserError(f"the checkpoint's {reason}; set it in generation_config.json")
    fallback = tokenizer.eos_token_id if tokenizer.eos_token_id in stop_ids else stop_ids[0]
    template_eos = (stop for stop in stop_ids if tail.lstrip().startswith(tokenizer.convert_ids_to_tokens(stop)))
    eos_id = next(template_eos, fallback)
    return Prompt(prompt, response_prefix, tokenizer.convert_ids_to_tokens(eos_id), eos_id)


def refuse_special_tokens(processor, question: str, class_names: Sequence[str]) -> None:
    """Raise UserError for text with a special token in it, such as <image> or </s>: it would be read as that."""
    tokens = {*processor.tokenizer.all_special_tokens, processor.image_token}
    for where, text in [("--question", question), *(("class name", name) for name in class_names)]:
        if found := next((token for token in tokens if token in text), None):
            raise UserError(f"{where} {text!r}: holds {found}, a special token of the model's tokenizer; leave it out")


def _render(processor, dialogs: list[list[dict]]) -> list[str]:
    """Each dialog by the chat template; all but the last with a generation prompt. Raises UserError.

    In a child process, which can be ended whatever the template does; transformers keeps it in Jinja's sandbox.
    """
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template  # the latter in early 2024
    if not processor.chat_template:
        raise UserError("the checkpoint has no chat template; use one whose processor has it, such as llava-hf's")
    if "image" not in str(processor.chat_template):  # for plain text, where the image token is one of all
        image = f"{processor.image_token}\n"
        dialogs = [
            [turn | {"content": "".join(part.get("text", image) for part in turn["content"])} for turn in dialog]
            for dialog in dialogs
        ]
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_answer, args=(sender, processor, dialogs), daemon=True)
    child.start()
    sender.close()
    problem, texts = f"does not end in {TEMPLATE_S} s, or takes too much memory", []
    try:
        with contextlib.suppress(EOFError):  # the child reached a limit
            if receiver.poll(TEMPLATE_S):
                problem, texts = receiver.recv()
    finally:
        child.kill()
        child.join()
    if problem:
        raise UserError(f"the chat template {problem}; use another checkpoint, or mend its chat_template.jinja")
    return texts


def _answer(sender: Connection, processor, dialogs: list[list[dict]]) -> None:
    """Send (what is wrong with the template, texts) to the parent, or end at a limit without a word."""
    resource.setrlimit(resource.RLIMIT_CPU, (TEMPLATE_S, TEMPLATE_S))  # where the parent is gone
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + TEMPLATE_BYTES, resource.RLIM_INFINITY))
    try:
        texts = [processor.apply_chat_template(dialog, add_generation_prompt=len(dialog) == 1) for dialog in dialogs]
        length = max(map(len, texts))
        sender.send(("", texts) if length <= LONGEST else (f"makes a turn of {length:,} characters", []))
    except Exception as error:
        sender.send((f"cannot be used ({first_line(error)})", []))


def tokenizer_probe(tokenizer) -> list[int]:
    """Token ids of a fixed text, recorded with a run and compared at load: saving can change a tokenizer silently."""
    return tokenizer(PROBE).input_ids
