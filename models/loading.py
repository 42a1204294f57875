"""A checkpoint: found or downloaded whole, its tensors compared with its config, and only then loaded.

transformers fills what the files lack with random weights, and takes any shape where it loads in 4 bit. So the model is
first built without memory from the headers of the files, and what does not fit is refused by name.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from huggingface_hub import constants, errors, snapshot_download, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers import (
    BitsAndBytesConfig,
    GenerationConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
)
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from config.training_config import TrainingConfig
from utils.hub_utils import explain_hub_error
from utils.logging_utils import UserError, first_line

PINNED = TrainingConfig.model_revision  # of the default model; as it is, of any other its current commit
SETTINGS = ["*.json", "*.jinja", "*.model", "*.txt"]  # files of config, processor and tokenizer
POINTER = b"version https://git-lfs"  # what git leaves in place of a large file
WAITS_S = (1, 3)  # before another try, of a download that may pass
MAX_TILES = 99  # more than any grid of an image has
STATE = ".weight.quant_state.bitsandbytes__nf4"  # JSON about a weight that was saved in 4 bit
TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # as safetensors spells them


# ---- on disk


def find_checkpoint(model: str, revision: str | None, with_weights: bool = False) -> Path:
    """The folder of a checkpoint: `model` itself, or that of its files in the cache, downloaded where they are not.

    Raises UserError if the hub does not give it or the cache cannot take it.
    """
    if Path(model).is_dir():
        return Path(model)
    folder = _download(model, resolve_revision(model, revision), SETTINGS)
    if with_weights:
        index = folder / SAFE_WEIGHTS_INDEX_NAME
        shards = read_index(index, f"--model {model}") if index.exists() else []
        # By the commit: a branch may have moved since.
        folder = _download(model, folder.name, [SAFE_WEIGHTS_NAME, *shards])
    return folder


def resolve_revision(model: str, revision: str | None) -> str | None:
    return None if revision == PINNED and model != TrainingConfig.model else revision


def is_cached(model: str, revision: str | None) -> bool:
    """Whether all weights of a checkpoint of the hub have been downloaded. Raises UserError for an index of no use."""
    revision = resolve_revision(model, revision)
    index = try_to_load_from_cache(model, SAFE_WEIGHTS_INDEX_NAME, revision=revision)
    files = read_index(Path(index), f"--model {model}") if isinstance(index, str) else [SAFE_WEIGHTS_NAME]
    return all(isinstance(try_to_load_from_cache(model, file, revision=revision), str) for file in files)


def _download(model: str, revision: str | None, patterns: list[str]) -> Path:
    is_offline = constants.is_offline_mode()
    how = {"revision": revision, "allow_patterns": patterns, "ignore_patterns": ["*/*"]}
    waits = iter(WAITS_S)
    while True:
        try:
            try:
                return Path(snapshot_download(model, local_files_only=is_offline, **how))
            except (httpx.TransportError, errors.HfHubHTTPError):
                with contextlib.suppress(errors.LocalEntryNotFoundError):  # all of it may be in the cache
                    return Path(snapshot_download(model, local_files_only=True, **how))
                raise
        except Exception as error:  # the hub, the network and the disk raise a dozen kinds
            move = "check the network, HF_TOKEN and HF_ENDPOINT, and run the same command again: it continues there"
            otherwise, wait = f"its download broke off ({first_line(error)}); {move}", next(waits, None)
            reason, may_pass = explain_hub_error(error, "--model", revision, otherwise)
            if not may_pass or wait is None:
                raise UserError(f"--model {model}: {reason}") from error
        time.sleep(wait)


def again(folder: Path) -> str:
    """The next move for a file that is not what it should be; what is in the cache is not downloaded again."""
    for path in sorted(folder.glob("*.*")):
        with contextlib.suppress(OSError), open(path, "rb") as file:  # folders, too
            if file.read(len(POINTER)) == POINTER:
                return f"{path.name} is a git-LFS pointer: run git lfs pull"
    is_cached = folder.parent.name == "snapshots"
    move = f"delete {folder.parents[1]} and run the same command again" if is_cached else "download or copy it again"
    return f"{move}, or use another checkpoint"


def read_index(path: Path, name: str) -> list[str]:
    """The names of a checkpoint's weights files, from its index. Raises UserError."""
    try:
        files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        if files and all(Path(file).name == file for file in files):
            return files
        reason = "it lists no files beside it"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = first_line(error)
    raise UserError(f"{name}: {path.name} is no index of weights ({reason}); {again(path.parent)}")


@dataclass
class SavedTensor:
    """A tensor of a safetensors file, read when `[...]` asks for it.

    A mapped file would stay resident while it is loaded, all 15 GB of a checkpoint.
    """

    name: str
    source: Any  # of get_slice
    shape: list[int]
    dtype: str  # as safetensors spells it: F16, BF16, ...
    place: tuple[Path, int] | None = None  # file and first byte
    buffer: torch.Tensor | None = None  # bytes that each read overwrites, where a GPU takes a copy at once
    limit: float | None = None  # of the type that it is quantized from; none: looked at once it is loaded
    problems: list[str] = field(default_factory=list)  # transformers hides what is raised while it reads

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index) -> torch.Tensor:
        if 0 in self.shape:  # the register tokens of a tower without any; safetensors cannot slice it
            return torch.empty(self.shape)
        try:
            tensor = (self.source if self.buffer is None else self._read())[index]
        except (OSError, SafetensorError) as error:
            self.problems.append(f"{self.name} cannot be read ({first_line(error)})")
            raise
        if self.limit is not None and self.dtype.startswith(("F", "BF")) and tensor.numel():
            low, high = (tensor.float() if tensor.itemsize == 1 else tensor).aminmax()
            if not (-self.limit <= low and high <= self.limit):  # NaN is in no range
                self.problems.append(f"{self.name} is not finite")
        return tensor

    def _read(self) -> torch.Tensor:
        """In the buffer: memory that is new for each tensor takes ten times as long to fill (docs/LOG.md)."""
        dtype = TORCH_DTYPES[self.dtype]
        found = self.buffer[: math.prod(self.shape) * dtype.itemsize]
        with open(self.place[0], "rb") as file:
            file.seek(self.place[1])
            if file.readinto(found.numpy()) < len(found):
                raise OSError("the file ends before the tensor does")
        return found.view(dtype).view(self.shape)


def read_tensors(folder: Path, name: str) -> dict[str, SavedTensor]:
    """The tensors of a checkpoint, of which only headers are read here. Raises UserError with the file."""
    whole, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
    if not whole.exists() and not index.exists():
        reason = f"holds no {whole.name} and no {index.name}, and weights of other kinds are not read"
        raise UserError(f"{name}: {reason}; download them (git lfs pull), or use another checkpoint")
    found: dict[str, SavedTensor] = {}
    for path in [whole] if whole.exists() else [folder / file for file in read_index(index, name)]:
        try:
            source = safe_open(path, "pt", backend="pread")
        except (OSError, SafetensorError) as error:
            reason = "is not there" if isinstance(error, FileNotFoundError) else f"is corrupted ({first_line(error)})"
            raise UserError(f"{name}: {path.name} {reason}; {again(folder)}") from error
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for key in source.keys():  # noqa: SIM118  it is no dict
            if key in found:
                raise UserError(f"{name}: {key} is in two of its files; {again(folder)}")
            part, start = source.get_slice(key), 8 + size + header[key]["data_offsets"][0]
            found[key] = SavedTensor(key, part, part.get_shape(), part.get_dtype(), (path, start))
    return found


def load_generation_config(folder: Path, config: LlavaNextConfig) -> GenerationConfig:
    """Token ids alone, of the optional file or else of the config; greedy, as a class name is not to be sampled."""
    has_file = (folder / GENERATION_CONFIG_NAME).exists()
    saved = GenerationConfig.from_pretrained(folder) if has_file else GenerationConfig.from_model_config(config)
    stops = config.text_config.eos_token_id if saved.eos_token_id is None else saved.eos_token_id
    ids = {"bos_token_id": saved.bos_token_id, "eos_token_id": stops, "pad_token_id": saved.pad_token_id}
    return GenerationConfig(**ids, do_sample=False)


# ---- in memory


@contextlib.contextmanager
def explain_errors(name: str, part: str, folder: Path) -> Iterator[None]:
    """Raise UserError, with the next move, for a part of a checkpoint that is broken or does not fit."""
    try:
        yield
    except UserError:
        raise
    except torch.OutOfMemoryError as error:
        move = "use --load-in-4bit true, a larger --gpu-memory-fraction, or a larger GPU"
        raise UserError(f"{name}: does not fit the GPU's memory; {move}") from error
    except Exception as error:  # transformers raises a dozen kinds for a file of another form
        raise UserError(f"{name}: its {part} cannot be loaded ({first_line(error)}); {again(folder)}") from error


def load_model(
    folder: Path,
    name: str,
    dtype: torch.dtype,
    placement: dict[str, Any],
    quantization: BitsAndBytesConfig | None = None,
    config: LlavaNextConfig | None = None,
) -> LlavaNextForConditionalGeneration:
    """The model of a checkpoint's folder, each of its weights from the files. `name` is what messages call it.

    With a `config` that of the folder, which anyone may have written, is not read.
    Raises UserError for weights that are missing, of another shape, without a place, not finite, or quantized already.
    """
    with explain_errors(name, "weights", folder):
        config = LlavaNextConfig.from_pretrained(folder) if config is None else config
        quantization = _check_quantization(config, name, quantization)
        tensors = read_tensors(folder, name)
        with explain_errors(name, "config", folder):
            wrong = list(_find_gaps(config, tensors, name))
        if wrong:
            reason = f"its weights are not those that its config.json describes: {'; '.join(wrong)}"
            raise UserError(f"{name}: {reason}; {again(folder)}")
        problems: list[str] = []
        if quantization and (places := placement["device_map"]) != "auto" and places[""].type == "cuda":
            share_buffer(tensors.values())
        for tensor in tensors.values():
            # 4 bit would hide NaN; without it tensors are read by threads, where a fork may have broken torch's pool.
            tensor.limit, tensor.problems = torch.finfo(dtype).max if quantization else None, problems
        how = {"dtype": dtype, "quantization_config": quantization, "attn_implementation": "sdpa", **placement}
        try:
            model = LlavaNextForConditionalGeneration.from_pretrained(None, config=config, state_dict=tensors, **how)
        except RuntimeError:
            if not problems:
                raise
        else:
            for key, parameter in model.named_parameters():
                if parameter.is_floating_point() and not parameter.is_meta:  # as offloaded ones: merge_into reads those
                    # Those beside weights that were quantized already are of the type they were saved in.
                    parameter.data = parameter.data.to(dtype)
                    # NaN passes through aminmax; on a CPU isfinite takes 40 times as long.
                    if parameter.numel() and not torch.stack(parameter.aminmax()).isfinite().all():
                        problems.append(f"{key} is not finite")
        if problems:
            move = again(folder) + (", or --mixed-precision bf16" if dtype == torch.float16 else "")
            raise UserError(f"{name}: {len(problems)} weights cannot be used in {dtype} ({problems[0]}); {move}")
        model.generation_config = load_generation_config(folder, config)
    return scale_logits(model)


def share_buffer(tensors: Iterable[SavedTensor]) -> None:
    """Let them be read into the same memory, each until the next is."""
    tensors = [tensor for tensor in tensors if tensor.dtype in TORCH_DTYPES]
    largest = max((math.prod(tensor.shape) * TORCH_DTYPES[tensor.dtype].itemsize for tensor in tensors), default=0)
    buffer = torch.empty(largest, dtype=torch.uint8)
    for tensor in tensors:
        tensor.buffer = buffer


def scale_logits(model: PreTrainedModel) -> PreTrainedModel:
    """The model, whose logits are from now on those of its language model's own class.

    Behind the head Granite divides them (by 8, say), Cohere multiplies and Gemma 2 caps them, which transformers' LLaVA
    leaves out. The weights stay as they are.
    """
    text = model.config.text_config
    factor = getattr(text, "logit_scale", 1.0) / getattr(text, "logits_scaling", 1.0)
    cap = getattr(text, "final_logit_softcapping", None)

    def scale(head: torch.nn.Module, given: tuple, logits: torch.Tensor) -> torch.Tensor:
        logits = logits * factor
        return cap * torch.tanh(logits / cap) if cap else logits

    if factor != 1.0 or cap:
        model.lm_head.register_forward_hook(scale)
    return model


def _check_quantization(
    config: LlavaNextConfig, name: str, quantization: BitsAndBytesConfig | None
) -> BitsAndBytesConfig | None:
    """What to quantize with; None, and in the config, for weights that are so already. Raises UserError for others."""
    saved = getattr(config, "quantization_config", None) or getattr(config.text_config, "quantization_config", None)
    if saved is None:
        return quantization
    method, is_nf4 = saved.get("quant_method"), saved.get("bnb_4bit_quant_type") == "nf4" and saved.get("load_in_4bit")
    if quantization is None or not is_nf4:
        move = "use the checkpoint that is not" + (", or --load-in-4bit true" if is_nf4 else "")
        raise UserError(
            f"{name}: is already quantized ({method}, {'4-bit nf4' if is_nf4 else 'not 4-bit nf4'}); {move}"
        )
    config.quantization_config = quantization.to_dict()
    return None


def _find_gaps(config: LlavaNextConfig, tensors: dict[str, SavedTensor], name: str) -> Iterator[str]:
    """What keeps the files from holding each weight of the config's model, in its shape, and no other.

    The model is built without memory, from the headers of the files, and its vision tower is run on one image.
    Raises UserError for a tower that does not give what LLaVA-NeXT takes.
    """
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    in_4bit = [key.removesuffix(STATE) + ".weight" for key in tensors if key.endswith(STATE)]
    for weight in in_4bit:
        state = json.loads(bytes(tensors[weight.removesuffix(".weight") + STATE][...].tolist()))
        shapes = {key: shape for key, shape in shapes.items() if not key.startswith(f"{weight}.")}
        shapes[weight] = state["shape"]
    if bool(in_4bit) != (getattr(config, "quantization_config", None) is not None):
        yield f"{len(in_4bit)} are in 4 bit"
    layers = config.text_config.num_hidden_layers + config.vision_config.num_hidden_layers
    if layers > len(shapes):
        yield f"{len(shapes)} of them for {layers} layers"
        return  # to build these would take long
    config = LlavaNextConfig.from_dict(config.to_dict() | {"quantization_config": None})
    how = {"device_map": {"": "meta"}, "ignore_mismatched_sizes": True, "output_loading_info": True}
    empty = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    with _quiet():
        model, info = LlavaNextForConditionalGeneration.from_pretrained(None, config=config, state_dict=empty, **how)
    no_numbers = [key for key in shapes if key.endswith((".weight", ".bias")) and key not in in_4bit]
    kinds = {
        "are missing": info["missing_keys"],
        "have another shape": [
            f"{key}: {[*has]} in place of {[*wanted]}" for key, has, wanted in info["mismatched_keys"]
        ],
        "have no place in the model": info["unexpected_keys"],
        "are no floating-point numbers": [key for key in no_numbers if not tensors[key].dtype.startswith(("F", "BF"))],
    }
    yield from (f"{len(keys)} {kind} ({', '.join(sorted(keys)[:2])})" for kind, keys in kinds.items() if keys)
    side = config.vision_config.image_size
    pixels = torch.empty(1, MAX_TILES, 3, side, side, device="meta")
    try:
        model.model.get_image_features(pixels, torch.tensor([[side, side]]))
    except Exception as error:  # whatever a value of the config leads to
        layer, tower = config.vision_feature_layer, config.vision_config
        reason = f"features of vision layer {layer} cannot be computed by its tower, {tower.model_type}"
        taken = f"{(side // tower.patch_size) ** 2} patches, and a CLS if vision_feature_select_strategy is default"
        raise UserError(
            f"{name}: {reason} ({first_line(error)}); use another checkpoint: a tile must be {taken}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and tables of transformers."""
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
