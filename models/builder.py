"""Processor, base model, LoRA adapter, and the assertions that what was loaded is what was asked for."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils.data import ConcatDataset, DataLoader, Subset
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoProcessor,
    BitsAndBytesConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedModel,
    set_seed,
)

from config.training_config import RANDOM_MODELS, TrainingConfig
from data.collator import Batch, PlantCollator, Sample
from models.base_view import Processor, select_views
from models.checks import DTYPES, check_adapter, check_model, check_same_base, weights_fingerprint
from models.features import compute_tower_features, examine
from models.fused_layers import (
    FusedLayer,
    expect_logits,
    find_obstacle,
    fuse_layers,
    get_fused_layers,
    set_activation_checkpointing,
    unwrap,
)
from models.loading import explain_errors, find_checkpoint, load_generation_config, load_model
from models.memory import MicroBatcher, scoring_micro_batch
from models.scoring import score_batch
from models.search import Found, Goal, search_batch
from models.tiny import SIZES, build_config, build_random_model, build_tiny_model, build_tiny_processor
from models.trainable import set_trainable
from models.trie import MAX_NODES, tries_of
from runtime.device import choose_precision, describe_gpu, fit_workers
from runtime.distributed import Distributed, is_sharded, scoring_weights
from runtime.interrupt import StopRequest, worker_options
from runtime.launcher import get_local_world_size
from runtime.run_dir import Run
from utils.image_utils import BASE_VIEW
from utils.logging_utils import UserError, first_line, is_watched
from utils.tokenizer_utils import Prompt, build_prompt, refuse_special_tokens, tokenizer_probe

# The list replaces the default of transformers, so lm_head is in it.
IN_16_BIT = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "pillow")


@dataclass
class PlantModel:
    """A LLaVA-NeXT with everything that travels with it: processor, prompt, collator, precision and device."""

    model: Any  # PreTrainedModel or PeftModel; None before it is loaded and once it is released
    processor: Processor
    prompt: Prompt
    collator: PlantCollator
    precision: str  # bf16, fp16 or no
    device: torch.device
    eval_batch_size: int = 16  # images per forward pass of an evaluation, fewer where they do not fit
    num_workers: int = 0  # processes that decode images for an evaluation
    checks: list[str] = field(default_factory=list)  # what check_model found true
    stop: StopRequest = field(default_factory=StopRequest)  # of a training, whose validation it ends

    @classmethod
    def from_config(cls, config: TrainingConfig, class_names: Sequence[str], device: torch.device) -> "PlantModel":
        """The base model of a config, with a new adapter if it has one, checked. Raises UserError."""
        precision = choose_precision(config.mixed_precision, device)
        plant = cls.from_config_unloaded(config, class_names, device, precision)
        set_seed(config.seed)  # LoRA's A matrices are initialized at random
        plant.model = build_model(config, plant.processor, device, precision)
        plant.checks = check_model(
            plant.model, plant.processor, plant.prompt, config.load_in_4bit, config.trainable, precision
        )
        return plant

    @classmethod
    def from_config_unloaded(
        cls, config: TrainingConfig, class_names: Sequence[str], device: torch.device, precision: str
    ) -> "PlantModel":
        """All of it but the model, for weights from elsewhere."""
        processor, prompt = build_processor(config, class_names)
        collator = PlantCollator(processor, prompt, class_names, config.image_size)
        batch_bytes = collator.batch_bytes(config.per_device_eval_batch_size) * get_local_world_size()
        workers = fit_workers(config.num_workers, batch_bytes)
        return cls(None, processor, prompt, collator, precision, device, config.per_device_eval_batch_size, workers)

    @classmethod
    def from_run(cls, run: Run, device: torch.device) -> "PlantModel":
        """A run's best/ on the base it was trained on; a base model without its adapter. Raises UserError."""
        plant = cls.from_config(run.config, run.class_names, device)
        check_same_base(plant.facts(), run)
        if not run.is_base_model:
            load_weights(plant.model, run.best_folder)
        elif isinstance(plant.model, PeftModel):
            plant.model.disable_adapter_layers()
        return plant

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def class_names(self) -> Sequence[str]:
        return self.collator.class_names

    @property
    def base(self) -> LlavaNextForConditionalGeneration:
        return unwrap(self.model)

    @functools.cached_property
    def dummy_row(self) -> dict:
        """An image that is computed for other ranks' sake alone, where the weights are sharded."""
        return self.collator.largest_row(())

    @functools.cached_property
    def micro_batcher(self) -> MicroBatcher:
        """For scoring: as many images as fit, `eval_batch_size` at most. Sharded, all ranks compute it or none."""
        names = min(sum(map(len, self.collator.name_ids)), MAX_NODES)
        tokens = self.collator.most_prompt_tokens() + names
        batcher = MicroBatcher(scoring_micro_batch(self.base, self.device, tokens, self.eval_batch_size))
        if is_sharded(self.base):
            least = torch.tensor(batcher.size, device=self.device)
            torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
            batcher.size = batcher.smallest = int(least)
        return batcher

    @property
    def fused(self) -> list[FusedLayer]:
        """Its fused decoder layers; empty where the stock ones compute."""
        return get_fused_layers(self.base.model.language_model.layers)

    def facts(self) -> dict:
        """What a run records beside its config, so that other scripts can tell whether they loaded the same model."""
        return {
            "model_commit": getattr(self.base.config, "_commit_hash", None),
            "model_files": weights_fingerprint(self.base.config._name_or_path),
            "image_processor": type(self.processor.image_processor).__name__,
            "tokenizer_probe": tokenizer_probe(self.processor.tokenizer),
            "precision": self.precision,
            "device": describe_gpu(self.device),
            "packages": {name: version(name) for name in PACKAGES},
        }

    def describe(self, trainable: str, load_in_4bit: bool) -> str:
        """Size, trainable share and precision, for the log."""
        train, total = self.model.num_parameters(only_trainable=True), self.model.num_parameters()
        obstacle = next(filter(None, map(find_obstacle, self.base.model.language_model.layers)), "")
        return (
            f"{total:,} parameters | {train:,} trainable ({train / total:.2%}, {trainable}) | "
            f"{'4-bit nf4' if load_in_4bit else 'not quantized'} | {str(self.dtype).removeprefix('torch.')} | "
            f"{len(self.fused)} fused layers{obstacle and f' ({obstacle})'} | {len(self.checks)} checks passed"
        )

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def score(
        self, rows, with_features: bool = False, with_names: bool = True
    ) -> Iterator[tuple[list[tuple[Sample, Any]], list[str]]]:
        """For each batch of rows: the log-probability of every class name, or Examined, and the unreadable images."""
        tries = tries_of(self.collator) if with_names else []

        def score(batch: Batch) -> list:
            states: list = []
            scores = score_batch(self.model, batch, tries, self.micro_batcher, states).tolist()
            return examine(self.base, batch, scores, states) if with_features else scores

        return self._predict(rows, self.collator, score)

    def embed(self, rows) -> Iterator[tuple[list[tuple[Sample, Any]], list[str]]]:
        """For each batch of rows: features of the vision tower alone, and the unreadable images."""
        return self._predict(rows, self.collator, functools.partial(compute_tower_features, self.base))

    def search(self, rows, goal: Goal) -> Iterator[tuple[list[tuple[Sample, Found]], list[str]]]:
        """For each batch of rows: the likeliest class names among many, and the unreadable images."""
        (trie,) = tries_of(self.collator, math.inf)

        def search(batch: Batch) -> list[Found]:
            return search_batch(self.model, batch, trie, self.micro_batcher, goal)

        return self._predict(rows, self.collator, search)

    def generate(self, rows, max_new_tokens: int) -> Iterator[tuple[list[tuple[Sample, str]], list[str]]]:
        """For each batch of rows: greedy replies without special tokens, and the unreadable images."""
        tokenizer = self.processor.tokenizer
        options = {"do_sample": False, "use_cache": True, "pad_token_id": tokenizer.pad_token_id}

        def generate(batch: Batch) -> list[str]:
            ids = self.model.generate(**batch, **options, max_new_tokens=max_new_tokens)
            return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

        return self._predict(rows, self.collator.prompts, generate)

    def _predict(self, rows, collate: Callable, predict: Callable) -> Iterator[tuple[list, list[str]]]:
        """For each batch: (sample, prediction) in any order, and "id: reason" of each unreadable image."""
        self.model.eval()
        # One forward of a batch, so that ranks that share weights make as many whatever images cannot be read.
        size = self.micro_batcher.size
        workers = min(self.num_workers, len(rows) // size)  # to start one takes longer than to open a few images
        options = worker_options(workers)
        loader = DataLoader(rows, size, collate_fn=collate, num_workers=workers, **options)
        batches = tqdm(loader, desc="evaluating", disable=not is_watched(), leave=False)
        with scoring_weights(self.base):
            for batch in self.stop.iterate(batches):  # after a training, for its limit of a wait alone
                found = []
                if batch.samples:
                    self.check_length(batch.samples)
                    with self.autocast():
                        found = predict(batch.to(self.device))
                elif is_sharded(self.base):  # other ranks wait for its part of the weights
                    with self.autocast():
                        predict(collate([self.dummy_row]).to(self.device))
                yield list(zip(batch.samples, found, strict=True)), batch.unreadable

    def check_length(self, samples: Sequence[Sample]) -> None:
        """Raise UserError for more tokens than the language model has positions: it knows nothing of what is behind."""
        positions = getattr(self.base.config.text_config, "max_position_embeddings", None) or math.inf
        longest = max(samples, key=lambda sample: sample.prompt_length)
        length = longest.prompt_length + max(map(len, self.collator.name_ids))
        if length > positions:
            raise UserError(
                f"an image of {longest.size[1]} x {longest.size[0]} pixels, prompt and name are {length:,} tokens, and "
                f"the language model has {positions:,} positions (max_position_embeddings); use --views base, a "
                "shorter --question, or a checkpoint with more"
            )

    def distribute(self, predict: Callable, rows, dist: Distributed) -> Iterator[tuple[list, list[str]]]:
        """What `predict`, such as self.score, yields of the rows, computed across ranks: every rank gets all of it.

        A batch of each rank is yielded at once, since whoever takes it may have to ask all ranks what to do next.
        """
        mine = range(dist.rank, len(rows), dist.world_size)
        share: Any = Subset(rows, mine)
        if is_sharded(self.base) and len(mine) < math.ceil(len(rows) / dist.world_size):
            parts: list[Any] = [share, [self.dummy_row]]  # all ranks make the same forwards
            share = ConcatDataset(parts)
        batches = predict(share)
        while any(gathered := dist.gather_object([next(batches, None)])):
            found, unreadable = (list(itertools.chain(*parts)) for parts in zip(*filter(None, gathered)))
            yield [each for each in found if each[0].id != self.dummy_row["id"]], unreadable

    def compile(self) -> None:
        """Compile the elementwise kernels of the fused layers, each when it is first needed."""
        for layer in self.fused[:1]:  # they share their kernels
            layer.kernels.compile()

    def eager(self) -> None:
        """Eager kernels from now on: equal weights give equal numbers."""
        for layer in self.fused[:1]:
            layer.kernels.eager()


# ---- the processor


def build_processor(config: TrainingConfig, class_names: Sequence[str]) -> tuple[Processor, Prompt]:
    """The checkpoint's own processor on the PIL back end, and the prompt of the config's question. Raises UserError."""
    if config.model in RANDOM_MODELS:
        processor = build_tiny_processor([*class_names, config.question], SIZES[config.model])
        refuse_special_tokens(processor, config.question, class_names)
        prompt = build_prompt(processor, config.question, [processor.tokenizer.eos_token_id])
        return select_views(processor, config.views), prompt
    name, folder = f"--model {config.model}", find_checkpoint(config.model, config.model_revision)
    if (folder / CONFIG_NAME).exists():
        move = "give its base model, or a folder with merged weights (python export.py) and without that file"
        raise UserError(f"{name}: holds a LoRA adapter ({CONFIG_NAME}), which would not be loaded; {move}")
    with explain_errors(name, "config", folder):
        model_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not isinstance(model_config, LlavaNextConfig):
        raise UserError(f"{name}: is a {model_config.model_type} checkpoint; use a llava_next one")
    with explain_errors(name, "processor", folder):
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        # The torchvision back end, which transformers prefers, differs by up to 0.03 in normalized pixels.
        processor.image_processor = LlavaNextImageProcessorPil.from_pretrained(folder)
    if not isinstance(processor, LlavaNextProcessor):
        raise UserError(f"{name}: has a {type(processor).__name__}; use one with a LlavaNextProcessor")
    # Some revisions on the hub lack these, and then every image is one token off.
    processor.patch_size = getattr(model_config.vision_config, "patch_size", None)
    if not isinstance(processor.patch_size, int):
        tower = f"its vision tower ({model_config.vision_config.model_type}) has patches of {processor.patch_size}"
        raise UserError(f"{name}: {tower}, and LLaVA-NeXT needs square ones of one size; use another checkpoint")
    processor.vision_feature_select_strategy = model_config.vision_feature_select_strategy
    # CLIP's CLS, which "default" drops; a tower without one is used in full.
    processor.num_additional_image_tokens = int(model_config.vision_feature_select_strategy == "default")
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    refuse_special_tokens(processor, config.question, class_names)
    with explain_errors(name, "generation config", folder):
        stops = load_generation_config(folder, model_config).eos_token_id
    prompt = build_prompt(processor, config.question, [stops] if isinstance(stops, int) else list(stops or []))
    with explain_errors(name, "processor", folder):
        processor = select_views(processor, config.views)
        processor(images=[Image.new("RGB", (64, 64))], text=[prompt.prompt], return_tensors="pt", padding=True)
    return processor, prompt


# ---- the model


def build_model(
    config: TrainingConfig, processor: Processor, device: torch.device, precision: str
) -> PreTrainedModel | PeftModel:
    """The base model with its trainable parameters: 4-bit language model, LoRA in fp32, the rest frozen in 16 bit."""
    # Trainable parameters are fp32: a full fine-tune must not round the weights to 16 bit first.
    dtype = torch.float32 if config.trainable == "everything" else DTYPES[precision]
    base = build_base(config, processor, device, dtype)
    model = set_trainable(base, config.trainable, config.lora_r, config.lora_alpha, config.lora_dropout)
    checkpointing = config.gradient_checkpointing != "false"
    fused = fuse_layers(base.model.language_model.layers)
    if fused:
        base.register_forward_pre_hook(expect_logits, with_kwargs=True)
        offloaded = len(fused) if config.gradient_checkpointing == "offload" else 0
        set_activation_checkpointing(fused, 0 if checkpointing else len(fused), offloaded)
        if config.compile == "true":
            fused[0].kernels.compile()
    elif checkpointing:  # of the language model alone: a frozen vision tower keeps no activations
        base.model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        # Only reentrant checkpointing needs the embeddings to require a gradient.
        base.model.language_model.disable_input_require_grads()
    return model


def nf4(dtype: torch.dtype) -> BitsAndBytesConfig:
    """The language model in 4 bit, doubly quantized, computed in `dtype`."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=IN_16_BIT,
    )


def build_base(
    config: TrainingConfig, processor: Processor, device: torch.device, dtype: torch.dtype
) -> LlavaNextForConditionalGeneration:
    """The config's base model on the device: randomly initialized, or loaded from safetensors alone.

    Its language model is in nf4, doubly quantized, if the config asks for 4 bit. Raises UserError.
    """
    model, quantization = config.model, nf4(dtype) if config.load_in_4bit else None
    if model in RANDOM_MODELS:
        with explain_errors(f"--model {model}", "weights", Path()):
            if model == "full":
                return build_random_model(build_config(processor, SIZES[model]), device, dtype, quantization)
            return build_tiny_model(processor, config.seed, SIZES[model]).to(device, dtype)
    folder = find_checkpoint(model, config.model_revision, with_weights=True)
    # In 16 bit it may fit no GPU whole: sharding moves it there layer by layer.
    place = torch.device("cpu") if config.sharding == "fsdp" and quantization is None else device
    base = load_model(folder, f"--model {model}", dtype, {"device_map": {"": place}}, quantization)
    base.name_or_path = base.config.name_or_path = model
    base.config._commit_hash = None if Path(model).is_dir() else folder.name
    if config.views == "base":
        base.config.image_grid_pinpoints = BASE_VIEW
    keep_4bit_weights(base)
    return base


def keep_4bit_weights(model: PreTrainedModel) -> None:
    """On a CPU with AVX512-BF16 one evaluation would repack them in place; later gradients are lost."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def load_weights(model: PreTrainedModel | PeftModel, folder: str | Path) -> None:
    """Load the weights that save_pretrained wrote to `folder` into a model built alike.

    Raises UserError unless every saved tensor found its place and every trainable parameter was saved. The libraries
    load what matches by name and ignore the rest without a word.
    """
    is_adapter = isinstance(model, PeftModel)
    if is_adapter:
        check_adapter(Path(folder), model.peft_config["default"])
    try:
        if is_adapter:
            saved = load_file(Path(folder) / SAFETENSORS_WEIGHTS_NAME)
        else:
            saved = load_model(Path(folder), str(folder), model.dtype, {}, config=model.config).state_dict()
    except (OSError, SafetensorError) as error:
        reason = first_line(error)
        raise UserError(f"{folder}: its weights cannot be loaded ({reason}); only *.safetensors are read") from error
    try:
        result = set_peft_model_state_dict(model, saved) if is_adapter else model.load_state_dict(saved)
    except RuntimeError as error:  # names and sizes, line by line
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{folder}: its weights do not fit the model ({reason})") from error
    missing = [name for name in result.missing_keys if "lora_" in name or ".modules_to_save." in name]
    if missing or result.unexpected_keys:
        raise UserError(
            f"{folder}: the adapter does not fit the model: {len(missing)} weights are missing "
            f"({', '.join(missing[:2])}), {len(result.unexpected_keys)} have no place "
            f"({', '.join(result.unexpected_keys[:2])}); use the model and --trainable it was trained with"
        )
