"""A model in GGUF files as llama.cpp itself computes it, on the CPU: its tokens, image embeddings and class scores.

Shapes: T tokens of a prompt, N image tokens, H width of the language model, C class names, V vocabulary.
"""

import contextlib
import importlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.collator import Batch, PlantCollator, Sample
from models.gguf_files import build_runtime_prompt
from utils.logging_utils import UserError, first_line

NAMES_AT_ONCE = 32  # sequences beside the prompt's
NO_FLASH = 0  # of enum llama_flash_attn_type; on the CPU flash attention adds up in fp16 (docs/LOG.md)


def import_llama() -> Any:
    """The wheel's module, imported where it is used: few users have it."""
    return importlib.import_module("cyllama.llama.llama_cpp")


class LlamaCpp:
    """A language model, and the vision tower that `open_vision` gives it; one image at a time."""

    def __init__(self, path: Path, collator: PlantCollator):
        llama = import_llama()
        # The wheel's own context asks its model for n_vocab in vain.
        members = {"n_vocab": property(lambda model: model.get_vocab().n_vocab)}
        open_model = type("Model", (llama.LlamaModel,), members)
        self.collator = collator
        self.names = collator.name_ids
        longest = max(sum(map(len, group)) for group in self._groups())
        batch = collator([collator.largest_row([])])
        tokens = -(-(batch.samples[0].length + longest) // 256) * 256
        settings = llama.LlamaContextParams()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = tokens
        settings.n_seq_max, settings.kv_unified = NAMES_AT_ONCE + 1, True  # prompts are shared, not copied
        settings.flash_attn_type = NO_FLASH
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        on_cpu = llama.LlamaModelParams()
        on_cpu.n_gpu_layers = 0
        with explain_runtime(path):
            self.model = open_model(str(path), on_cpu)
            self.context = llama.LlamaContext(self.model, settings)

    def open_vision(self, path: Path) -> None:
        llama = import_llama()
        settings = llama.MtmdContextParams(use_gpu=False, warmup=False, n_threads=torch.get_num_threads())
        with explain_runtime(path):
            self.vision = llama.MtmdContext(str(path), self.model, settings)

    def close(self) -> None:
        with explain_runtime():
            for part in (self.vision, self.context, self.model):
                part.close()

    def read_prompt(self, batch: Batch) -> tuple[Any, list[int]]:
        """(What llama.cpp makes of an image and the prompt, its T token ids, image tokens as transformers has them)."""
        llama = import_llama()
        processor, (pixels,) = self.collator.processor, batch["pixel_values"][0]
        image = processor.image_processor
        mean, std = torch.tensor([image.image_mean, image.image_std])[..., None, None]
        pixels = ((pixels * std + mean) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()  # (H, W, 3)
        bitmap = llama.MtmdBitmap.create_image(pixels.shape[1], pixels.shape[0], pixels.numpy().tobytes())
        text = build_runtime_prompt(processor.tokenizer, self.collator.prompt.prompt)
        text = text.replace(processor.image_token, llama.get_default_media_marker())
        with explain_runtime():
            chunks = self.vision.tokenize(text, [bitmap], True, True)
        ids: list[int] = []
        for chunk in chunks:
            is_text = chunk.type == llama.MtmdInputChunkType.TEXT
            ids += chunk.get_text_tokens() if is_text else [processor.image_token_id] * chunk.n_tokens
        return chunks, ids

    def embed(self, batch: Batch) -> torch.Tensor:
        """(N, H) of the first image."""
        chunks, _ = self.read_prompt(batch)
        (chunk,) = [chunk for chunk in chunks if chunk.type == import_llama().MtmdInputChunkType.IMAGE]
        with explain_runtime():
            if self.vision.encode_chunk(chunk):
                raise RuntimeError("the vision tower failed")
            rows = self.vision.get_output_embeddings(chunk.n_tokens, self.model.n_embd)
        return torch.tensor(np.array(rows, dtype=np.float32)).reshape(chunk.n_tokens, -1)

    def logits(self, batch: Batch) -> torch.Tensor:
        """(K, V) at the positions of the true name of the first image."""
        name = self.names[batch.samples[0].label]
        return torch.tensor(np.concatenate(next(self._continue(batch, [[name]]))))

    def score(self, rows) -> Iterator[tuple[list[tuple[Sample, list[float]]], list[str]]]:
        """As PlantModel.score: for each row the log-probability of every class name, and the unreadable images."""
        for row in rows:
            batch = self.collator([row])
            found = []
            if batch.samples:
                logits = (of_name for group in self._continue(batch, self._groups()) for of_name in group)
                scores = [_log_probability(of_name, name) for of_name, name in zip(logits, self.names, strict=True)]
                found = [(batch.samples[0], scores)]
            yield found, batch.unreadable

    def _groups(self) -> list[list[list[int]]]:
        return [self.names[start : start + NAMES_AT_ONCE] for start in range(0, len(self.names), NAMES_AT_ONCE)]

    def _continue(self, batch: Batch, groups: Sequence[Sequence[list[int]]]) -> Iterator[list[np.ndarray]]:
        """For each group the logits (tokens, V) at each token of its names, after the first image and the prompt."""
        chunks, _ = self.read_prompt(batch)
        context = self.context
        with explain_runtime():
            context.kv_cache_clear()
            start = self.vision.eval_chunks(context, chunks, 0, 0, context.n_batch, True)
            first = np.array([context.get_logits_ith(-1)], dtype=np.float32)
            for group in groups:
                tokens = import_llama().LlamaBatch(n_tokens=sum(map(len, group)) + 1, embd=0, n_seq_max=1)
                for sequence, name in enumerate(group, 1):
                    context.memory_seq_cp(0, sequence, -1, -1)
                    for place, token in enumerate(name[:-1]):  # nothing is predicted after the last
                        tokens.add(token, start + place, [sequence], True)
                if tokens.n_tokens:
                    context.decode(tokens)
                rows = iter(range(tokens.n_tokens))
                found = [[context.get_logits_ith(next(rows)) for _ in name[:-1]] for name in group]
                yield [np.concatenate([first, np.array(row, np.float32).reshape(-1, first.shape[1])]) for row in found]
                context.memory_seq_keep(0)


def runtime_versions() -> dict[str, str]:
    """Those of the wheel and of llama.cpp in it."""
    from cyllama._internal import build_config

    return {"cyllama": version("cyllama"), "llama.cpp": build_config.versions()["llama_cpp_version"]}


def _log_probability(logits: np.ndarray, name: list[int]) -> float:
    chosen = torch.tensor(logits).log_softmax(dim=1)[range(len(name)), name]
    return float(chosen.sum())


@contextlib.contextmanager
def explain_runtime(name: str | Path = "llama.cpp") -> Iterator[None]:
    """What llama.cpp prints is kept off the screen; its errors become UserErrors."""
    before = os.dup(2)
    with tempfile.TemporaryFile() as printed:
        os.dup2(printed.fileno(), 2)
        try:
            yield
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"{name}: llama.cpp refuses ({first_line(error)}); leave out --format gguf") from error
        finally:
            os.dup2(before, 2)
            os.close(before)
