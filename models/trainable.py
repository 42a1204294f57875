"""What of a model is trained: LoRA on the language model, the projector, or everything that a feature depends on."""

import re

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, LlavaNextConfig, LlavaNextForConditionalGeneration, PreTrainedModel

from utils.logging_utils import UserError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Leaf names alone would match the vision tower too.
LORA_TARGETS = rf"model\.language_model\..*\.({'|'.join(PROJECTIONS)})"


def set_trainable(
    base: LlavaNextForConditionalGeneration, trainable: str, lora_r: int, lora_alpha: int, lora_dropout: float
) -> PreTrainedModel | PeftModel:
    """Freeze the base, then make trainable in fp32: adapter, adapter+projector, projector, or everything.

    `projector` attaches a LoRA adapter too, frozen at zero: PEFT and Trainer refuse a 4-bit base without one.
    """
    base.requires_grad_(trainable == "everything")
    if trainable == "everything":
        unused = find_unused(base.config)
        for name, parameter in base.model.vision_tower.named_parameters():
            if name in unused:  # DDP would wait for its gradient, weight decay would shrink it
                parameter.requires_grad_(False)
        return base
    check_projections(base)
    model = get_peft_model(base, lora_settings(trainable, lora_r, lora_alpha, lora_dropout))
    for name, parameter in model.named_parameters():
        if trainable == "projector" and "lora_" in name:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # the loss scaler cannot unscale fp16 gradients
    return model


def find_unused(config: LlavaNextConfig) -> set[str]:
    """Parameters of the vision tower on which no feature depends: layers behind the last feature layer, heads.

    Whatever the tower's class calls them: found by the gradients of a tower without memory.
    """
    layers, side = config.vision_feature_layer, config.vision_config.image_size
    first = int(config.vision_feature_select_strategy == "default")  # without CLS
    with torch.device("meta"), torch.enable_grad():
        tower = AutoModel.from_config(config.vision_config)
        hidden = tower(torch.empty(1, 3, side, side), output_hidden_states=True).hidden_states
        sum(hidden[layer][:, first:].sum() for layer in ([layers] if isinstance(layers, int) else layers)).backward()
    return {name for name, parameter in tower.named_parameters() if parameter.grad is None}


def check_projections(base: LlavaNextForConditionalGeneration) -> None:
    """Raise UserError unless each layer of the language model has the linears that LoRA is attached to."""
    text, modules = base.config.text_config, dict(base.named_modules())
    found = sum(bool(re.fullmatch(LORA_TARGETS, name)) for name in modules)
    if found != (wanted := len(PROJECTIONS) * text.num_hidden_layers):
        has = f"its language model ({text.model_type}) has {found} of the {wanted} linears that LoRA is attached to"
        move = "use a checkpoint with another one, or --trainable everything --load-in-4bit false"
        raise UserError(f"--model {base.name_or_path}: {has} ({', '.join(PROJECTIONS)}); {move}")


def lora_settings(trainable: str, lora_r: int, lora_alpha: int, lora_dropout: float) -> LoraConfig:
    return LoraConfig(
        r=lora_r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=LORA_TARGETS,
        task_type="CAUSAL_LM",
        modules_to_save=["multi_modal_projector"] if "projector" in trainable else None,
    )
