"""Floating-point operations of a training step, and the matmul rate of the device they are compared with.

Shapes: T text and image tokens of a sample, D width of the language model.
"""

import torch

from models.builder import unwrap


class FlopCounter:
    """FLOPs that a training step needs for a sample; recomputed activations do not count, so any plan compares alike.

    Each token and weight of the language model takes 2 in the forward and 2 in the backward pass (a frozen weight needs
    no gradient; a trainable one takes 2 more). Attention takes 4 T^2 D a layer forward and 2.5 times that backward,
    half of it masked. The vision tower runs forward only.
    """

    def __init__(self, model):
        base = unwrap(model)
        text, vision = base.config.text_config, base.config.vision_config
        layers = base.model.language_model.layers
        # PEFT's wrapper has the sizes of the layer it wraps, so it would count twice.
        weights = sum(
            module.in_features * module.out_features
            for name, module in layers.named_modules()
            if hasattr(module, "in_features") and not hasattr(module, "base_layer") and "lora_" not in name
        )
        tower = sum(parameter.numel() for parameter in base.model.vision_tower.parameters())
        self.per_token = 4 * weights + 2 * model.num_parameters(only_trainable=True)
        self.per_token_pair = 3.5 * 4 * text.hidden_size * text.num_hidden_layers / 2
        self.per_tile = 2 * tower * ((vision.image_size // vision.patch_size) ** 2 + 1)

    def __call__(self, tokens: int, tiles: int) -> float:
        return tokens * self.per_token + tokens**2 * self.per_token_pair + tiles * self.per_tile


def measure_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matmul, the median of 0.2 s or more of them. Draws from no random state."""
    from torch.utils.benchmark import Timer  # it prints a line where there is no GPU

    side = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)  # zeros would be faster: the GPU's power depends on the values
    a, b = (torch.randn(side, side, device=device, dtype=dtype, generator=generator) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * side**3 / timer.blocked_autorange().median
