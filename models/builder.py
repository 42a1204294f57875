"""Processor, base model, adapter, and the assertions that what was loaded is what was asked for."""

import contextlib
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    BitsAndBytesConfig,
    GenerationConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    PreTrainedModel,
    modeling_utils,
)

from config.training_config import RANDOM_MODELS, TrainingConfig
from models.fused_layers import can_fuse, fuse_layers, get_fused_layers, set_activation_checkpointing
from models.tiny import SIZES, build_random_model, build_tiny_model, build_tiny_processor, full_config
from runtime.run_dir import BEST
from utils.logging_utils import UserError
from utils.tokenizer_utils import Prompt, build_prompt, tokenizer_probe

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_TARGETS = (
    rf"model\.language_model\..*\.({'|'.join(PROJECTIONS)})"  # leaf names alone would match the vision tower too
)
IN_16_BIT = [
    "model.vision_tower",
    "model.multi_modal_projector",
    "lm_head",
]  # the list replaces the default, so lm_head is in it
SAMPLES, SAMPLE_BYTES = 64, 4096  # of each file of weights, for its weights_fingerprint


# ---- the processor


def build_processor(config: TrainingConfig, class_names: Sequence[str]) -> tuple[LlavaNextProcessor, Prompt]:
    """The checkpoint's own processor on the PIL back end, and its prompt pieces for the config's question."""
    if config.model in RANDOM_MODELS:
        processor = build_tiny_processor([*class_names, config.question], SIZES[config.model])
        return processor, build_prompt(processor, config.question, [processor.tokenizer.eos_token_id])
    model_config = load_model_config(config.model, config.model_revision)
    try:
        processor = AutoProcessor.from_pretrained(config.model, revision=config.model_revision, trust_remote_code=False)
        # The torchvision back end, which transformers prefers, differs by up to 0.03 in normalized pixels.
        processor.image_processor = LlavaNextImageProcessorPil.from_pretrained(
            config.model, revision=config.model_revision
        )
    except Exception as error:
        raise UserError(_loading_failed(config.model, "processor", error)) from error
    if not isinstance(processor, LlavaNextProcessor):
        raise UserError(
            f"--model {config.model}: its processor is a {type(processor).__name__}; a LlavaNextProcessor is needed"
        )
    # Some revisions on the hub lack these, and then every image is one token off.
    processor.patch_size = model_config.vision_config.patch_size
    processor.vision_feature_select_strategy = model_config.vision_feature_select_strategy
    processor.num_additional_image_tokens = 1  # CLIP's CLS
    return processor, build_prompt(
        processor, config.question, load_stop_ids(config.model, config.model_revision, model_config)
    )


def load_model_config(model: str, revision: str | None) -> LlavaNextConfig:
    """Raises UserError for what is not there, cannot be reached, or is another kind of model."""
    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except Exception as error:
        raise UserError(_loading_failed(model, "config", error)) from error
    if not isinstance(config, LlavaNextConfig):
        raise UserError(
            f"--model {model}: is a {config.model_type} checkpoint; this program fine-tunes llava_next ones"
        )
    return config


def load_stop_ids(model: str, revision: str | None, model_config: LlavaNextConfig) -> list[int]:
    """Ids that generation stops at: the generation config's, or the language model's where it has none."""
    try:
        stop_ids = GenerationConfig.from_pretrained(model, revision=revision).eos_token_id
    except OSError:  # the file is optional
        stop_ids = None
    stop_ids = model_config.text_config.eos_token_id if stop_ids is None else stop_ids
    return [stop_ids] if isinstance(stop_ids, int) else list(stop_ids or [])


def weights_fingerprint(model: str) -> str | None:
    """Of the weights in a folder, from a few KB of each file: other weights differ everywhere. None: no folder.

    A model of the hub has its commit; it is in the cache, in files of other names on every machine.
    """
    files = sorted(Path(model).glob("*.safetensors")) if model and Path(model).is_dir() else []
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for piece in range(SAMPLES):
                file.seek(piece * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest() if files else None


def _loading_failed(model: str, part: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    chain = {type(link).__name__ for link in _causes(error)}
    refused = any(getattr(getattr(link, "response", None), "status_code", 0) in (401, 403) for link in _causes(error))
    if refused or chain & {"GatedRepoError", "RepositoryNotFoundError"}:
        move = "check the name, and that HF_TOKEN may read it (gated models: accept their terms on the hub)"
    elif chain & {
        "LocalEntryNotFoundError",
        "OfflineModeIsEnabled",
        "ConnectError",
        "ConnectTimeout",
        "ConnectionError",
    }:
        move = "the hub cannot be reached: check the network, or name a folder that holds the model"
    else:
        move = "check the name and --model-revision, or name a folder that holds the model"
    return f"--model {model}: its {part} cannot be loaded ({reason[:200]}); {move}"


def _causes(error: BaseException | None) -> Iterable[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# ---- the model


def build_model(
    config: TrainingConfig, processor: LlavaNextProcessor, device: torch.device, precision: str
) -> PreTrainedModel | PeftModel:
    """Base model with what learns attached: language model in 4 bit, adapter in fp32, the rest frozen in 16 bit."""
    # What learns is fp32: a whole model must not be rounded to 16 bit on its way there.
    dtype = torch.float32 if config.trainable == "everything" else DTYPES[precision]
    base = build_base(config, processor, device, dtype)
    model = set_trainable(base, config.trainable, config.lora_r, config.lora_alpha, config.lora_dropout)
    layers = base.model.language_model.layers
    recompute = config.gradient_checkpointing != "false"
    if can_fuse(layers):
        offload = config.gradient_checkpointing == "offload"
        fused = fuse_layers(layers)
        set_activation_checkpointing(fused, 0 if recompute else len(layers), offload)
        if config.compile == "true":
            compile_layers(model)
    elif recompute:
        recompute_activations(model)
    return model


def build_trained(
    config: TrainingConfig,
    recorded: dict,
    folder: str | Path,
    processor: LlavaNextProcessor,
    prompt: Prompt,
    device: torch.device,
    precision: str,
) -> PreTrainedModel | PeftModel:
    """The model of a run with the weights of its best/, on the base that was trained on. Raises UserError."""
    model = build_model(config, processor, device, precision)
    check_model(model, processor, prompt, config.load_in_4bit, config.trainable, precision)
    check_same_base(describe_model(model, processor, precision, device), recorded, config.model, folder)
    if not recorded.get("base"):
        load_weights(model, Path(folder) / BEST)
    return model


def check_same_base(found: dict, recorded: dict, model: str, folder: str | Path) -> None:
    """Raise UserError unless tokenizer, commit and files, as far as they were found, are those a run recorded."""
    names = [name for name in ("tokenizer_probe", "model_commit", "model_files") if name in found and name in recorded]
    moved = [name for name in names if found[name] != recorded[name]]
    if moved:
        raise UserError(
            f"--model {model}: is not what {folder} was trained on ({', '.join(moved)} differ); put back that "
            "checkpoint"
        )


def build_base(
    config: TrainingConfig, processor: LlavaNextProcessor, device: torch.device, dtype: torch.dtype
) -> LlavaNextForConditionalGeneration:
    """The config's base model on the device: loaded, or made with random weights. Raises UserError."""
    try:
        if config.model == "full":
            return build_random_model(full_config(processor), device, dtype, _quantization(config.load_in_4bit, dtype))
        if config.model in RANDOM_MODELS:
            return build_tiny_model(processor, config.seed, SIZES[config.model]).to(device, dtype)
        return load_base(config.model, config.model_revision, config.load_in_4bit, dtype, device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--model {config.model}: does not fit the GPU's memory; use --load-in-4bit true, a larger "
            "--gpu-memory-fraction, or a larger GPU"
        ) from error


def load_base(
    model: str, revision: str | None, load_in_4bit: bool, dtype: torch.dtype, device: torch.device
) -> LlavaNextForConditionalGeneration:
    """The checkpoint on the device, from safetensors alone; its language model in nf4, doubly quantized, if asked."""
    if Path(model).is_dir() and not any(Path(model).glob("*.safetensors")):
        raise UserError(
            f"--model {model}: holds no *.safetensors weights; download them (git lfs pull), or name another folder"
        )
    try:
        with read_not_mapped():
            base = LlavaNextForConditionalGeneration.from_pretrained(
                model,
                revision=revision,
                dtype=dtype,
                device_map={"": device},
                quantization_config=_quantization(load_in_4bit, dtype),
                attn_implementation="sdpa",
                use_safetensors=True,
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UserError(_loading_failed(model, "weights", error)) from error
    for module in base.modules():
        if type(module).__name__ == "Linear4bit":
            # On a CPU with AVX512-BF16 one evaluation would repack the weights in place; later gradients are lost.
            module.support_avx512bf16_for_cpu = False
    return base


def _quantization(load_in_4bit: bool, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if not load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=IN_16_BIT,
    )


@contextlib.contextmanager
def read_not_mapped() -> Iterator[None]:
    """Weights are read one by one and let go: in mapped files they stay resident, all 15 GB of a checkpoint."""
    mapped = modeling_utils.safe_open
    modeling_utils.safe_open = lambda *args, **kwargs: mapped(*args, **kwargs | {"backend": "pread"})
    try:
        yield
    finally:
        modeling_utils.safe_open = mapped


def set_trainable(
    base: LlavaNextForConditionalGeneration, trainable: str, lora_r: int, lora_alpha: int, lora_dropout: float
) -> PreTrainedModel | PeftModel:
    """Freeze the base, then let learn in fp32 what `trainable` says: adapter, adapter+projector, projector, everything.

    `projector` attaches an adapter too, frozen at zero: PEFT and Trainer refuse a 4-bit base without one.
    """
    base.requires_grad_(trainable == "everything")
    if trainable == "everything":
        _freeze_unused(base)
        return base
    model = get_peft_model(
        base,
        LoraConfig(
            r=lora_r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=LORA_TARGETS,
            task_type="CAUSAL_LM",
            modules_to_save=["multi_modal_projector"] if "projector" in trainable else None,
        ),
    )
    for name, parameter in model.named_parameters():
        if trainable == "projector" and "lora_" in name:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # fp16 gradients could not be unscaled
    return model


def _freeze_unused(base: LlavaNextForConditionalGeneration) -> None:
    """Vision weights behind the feature layer get no gradient: DDP would wait for one, decay would shrink them."""
    vision = base.model.vision_tower
    layer = base.config.vision_feature_layer
    if isinstance(layer, int) and layer < 0:
        encoder = getattr(vision, "vision_model", vision)
        encoder.post_layernorm.requires_grad_(False)
        for unused in list(encoder.encoder.layers)[len(encoder.encoder.layers) + 1 + layer :]:
            unused.requires_grad_(False)


def load_weights(model: PreTrainedModel | PeftModel, folder: str | Path) -> None:
    """Put the weights that save_pretrained left in `folder` into a model built alike.

    Raises UserError unless every saved weight found its place and all that learns was saved. The libraries load what
    fits by name and go on without a word: a whole model, saved under the hub's names, by PEFT's and by Trainer's ways.
    """
    try:
        if isinstance(model, PeftModel):
            saved = load_file(Path(folder) / SAFETENSORS_WEIGHTS_NAME)
        else:
            saved = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True).state_dict()
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: its weights cannot be loaded ({str(error).strip().splitlines()[0]}); only *.safetensors are "
            "read"
        ) from error
    if not isinstance(model, PeftModel):
        try:
            model.load_state_dict(saved)
        except RuntimeError as error:  # names and sizes, line by line
            raise UserError(
                f"{folder}: its weights do not fit the model ({str(error).splitlines()[-1].strip()})"
            ) from error
        return
    result = set_peft_model_state_dict(model, saved)
    missing = [name for name in result.missing_keys if "lora_" in name or ".modules_to_save." in name]
    if missing or result.unexpected_keys:
        raise UserError(
            f"{folder}: the adapter does not fit the model: {len(missing)} weights are missing "
            f"({', '.join(missing[:2])}), {len(result.unexpected_keys)} have no place "
            f"({', '.join(result.unexpected_keys[:2])}); use the model and --trainable it was trained with"
        )


def recompute_activations(model: PreTrainedModel | PeftModel) -> None:
    """Gradient checkpointing of the language model; a frozen tower keeps nothing to recompute."""
    language_model = unwrap(model).model.language_model
    language_model.gradient_checkpointing_enable({"use_reentrant": False})
    # Only reentrant checkpointing needs the embeddings to require a gradient.
    language_model.disable_input_require_grads()


def compile_layers(model: PreTrainedModel | PeftModel) -> None:
    """One kernel for what stands between two products of a fused layer, each compiled when it is first needed."""
    for one in get_fused_layers(unwrap(model).model.language_model.layers)[:1]:  # they share their kernels
        one.kernels.compile()


def unwrap(model: PreTrainedModel | PeftModel) -> LlavaNextForConditionalGeneration:
    return model.get_base_model() if isinstance(model, PeftModel) else model


# ---- the assertions


def check_model(
    model: PreTrainedModel | PeftModel,
    processor: LlavaNextProcessor,
    prompt: Prompt,
    load_in_4bit: bool,
    trainable: str,
    precision: str,
) -> list[str]:
    """Walk the loaded model. Returns what was found true, a sentence each; raises UserError with all that was not."""
    found = [
        *_check_processor(unwrap(model), processor, prompt),
        *_check_weights(model, load_in_4bit, trainable, DTYPES[precision]),
    ]
    wrong = [sentence for holds, sentence in found if not holds]
    if wrong:
        raise UserError(f"the loaded model is not what was asked for; these do not hold: {'; '.join(wrong)}")
    return [sentence for _, sentence in found]


def _check_processor(base: LlavaNextForConditionalGeneration, processor, prompt: Prompt) -> Iterable[tuple[bool, str]]:
    config, image_processor = base.config, processor.image_processor
    tile, patch = config.vision_config.image_size, config.vision_config.patch_size
    patches = (tile // patch) ** 2
    positions = [
        module.num_embeddings
        for name, module in base.model.vision_tower.named_modules()
        if name.endswith("position_embedding")
    ]
    stop_ids = base.generation_config.eos_token_id
    yield (
        type(image_processor).__name__.endswith("Pil"),
        f"image processor is the PIL back end ({type(image_processor).__name__})",
    )
    yield (
        processor.image_token_id == config.image_token_id,
        f"image token {processor.image_token_id} is the model's {config.image_token_id}",
    )
    yield (
        image_processor.crop_size["height"] == tile,
        f"tiles of {image_processor.crop_size['height']} pixels are the vision tower's {tile}",
    )
    yield processor.patch_size == patch, f"patches of {processor.patch_size} pixels are the vision tower's {patch}"
    yield positions == [patches + 1], f"a tile is {patches} patches + 1 CLS, the vision tower has {positions} positions"
    yield (
        list(map(list, image_processor.image_grid_pinpoints)) == list(map(list, config.image_grid_pinpoints)),
        "pinpoints are the model's",
    )
    yield (
        (processor.vision_feature_select_strategy, processor.num_additional_image_tokens) == ("default", 1),
        "CLS is counted and dropped",
    )
    rows = base.get_input_embeddings().num_embeddings
    yield len(processor.tokenizer) <= rows, f"all {len(processor.tokenizer)} tokens have one of {rows} embeddings"
    yield (
        prompt.end_id in ([stop_ids] if isinstance(stop_ids, int) else stop_ids or []),
        f"generation stops at {prompt.end!r}",
    )


def _check_weights(model, load_in_4bit: bool, trainable: str, dtype: torch.dtype) -> Iterable[tuple[bool, str]]:
    base = unwrap(model)
    linears = {
        name
        for name, module in base.named_modules()
        if re.fullmatch(LORA_TARGETS, name) and isinstance(module, (nn.Linear, LoraLayer))
    }
    expected = len(PROJECTIONS) * base.config.text_config.num_hidden_layers
    yield len(linears) == expected, f"{len(linears)} language-model projections (7 in each of {expected // 7} layers)"
    quantized = {
        name.removesuffix(".base_layer"): module
        for name, module in base.named_modules()
        if type(module).__name__ == "Linear4bit" and not isinstance(module, LoraLayer)
    }
    yield (
        set(quantized) == (linears if load_in_4bit else set()),
        f"{len(quantized)} linears in 4 bit, the language model's alone",
    )
    states = [module.weight.quant_state for module in quantized.values()]
    yield (
        all(state.quant_type == "nf4" and state.nested for state in states),
        "4-bit weights are nf4 with double quantization",
    )
    for part in (base.model.vision_tower, base.model.multi_modal_projector, base.lm_head):
        kept = {parameter.dtype for parameter in part.parameters() if not parameter.requires_grad}
        wanted = torch.float32 if trainable == "everything" else dtype
        yield kept <= {wanted}, f"{type(part).__name__} is kept in {wanted}"
    adapted = {name for name, module in base.named_modules() if isinstance(module, LoraLayer)}
    yield (
        adapted == (set() if trainable == "everything" else linears),
        f"the adapter sits on {len(adapted)} language-model projections, nowhere else",
    )
    learning = {name: parameter for name, parameter in base.named_parameters() if parameter.requires_grad}
    yield (
        bool(learning) and all(parameter.dtype == torch.float32 for parameter in learning.values()),
        "what learns is in fp32",
    )
    unexpected = [name for name in learning if not _may_learn(name, trainable)]
    yield (
        not unexpected,
        f"{sum(map(torch.numel, learning.values())):,} weights learn ({trainable}), no others"
        + f": {unexpected[:3]}" * bool(unexpected),
    )


def _may_learn(name: str, trainable: str) -> bool:
    in_projector = ".multi_modal_projector.modules_to_save." in name
    in_adapter = ".language_model." in name and ".lora_" in name
    return (
        trainable == "everything"
        or ("adapter" in trainable and in_adapter)
        or ("projector" in trainable and in_projector)
    )


def describe_model(model, processor: LlavaNextProcessor, precision: str, device: torch.device) -> dict:
    """What a run records beside its config, so that other scripts can load it back and see that they got the same."""
    return {
        "model_commit": getattr(unwrap(model).config, "_commit_hash", None),
        "model_files": weights_fingerprint(unwrap(model).config._name_or_path),
        "image_processor": type(processor.image_processor).__name__,
        "tokenizer_probe": tokenizer_probe(processor.tokenizer),
        "precision": precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "packages": {
            name: version(name)
            for name in ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "pillow")
        },
    }
