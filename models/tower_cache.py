"""The frozen vision tower's features of images seen before, kept in the CPU's memory across epochs and evaluations.

Shapes: L feature layers, P tiles of an image, N patches of a tile, D width of the tower.

The tower takes 54 of the 1,156 ms of a training step (docs/LOG.md) and computes the same for the same image each time.
From the second time on its features are copied to the GPU instead: 3.5 MB of an image of 3 tiles.
"""

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from data.collator import Sample
from models.fused_layers import unwrap
from runtime.device import GIB, available_host_memory, is_out_of_memory
from runtime.launcher import get_local_world_size
from utils.logging_utils import logger

# Towers that compute the same in training, without dropout; BEiT drops paths, and DINOv3 rescales positions.
DETERMINISTIC = ("clip_vision_model", "siglip_vision_model")


class TowerCache:
    """The forward of a vision tower, put in place of the stock one.

    It knows the images of a forward if `expect_images` named them just before and `split` says which of two images of
    one id is meant; otherwise the stock forward computes. Images are kept until they take `capacity` bytes.
    """

    def __init__(self, base: Any, capacity: float):
        tower, layers = base.model.vision_tower, base.config.vision_feature_layer
        self.stock, tower.forward = tower.forward, self
        self.layers = [layers] if isinstance(layers, int) else list(layers)
        self.capacity = capacity
        self.split: str | None = None
        self.kept: dict[tuple, torch.Tensor] = {}  # (split, id, fingerprint): (L, P, N, D) on the CPU
        self.expected: Sequence[Sample] = ()

    def __call__(self, pixel_values: torch.Tensor, **kwargs) -> Any:
        """`pixel_values` (sum of P, 3, H, W): the tiles of the images that are expected, in order."""
        samples, self.expected = self.expected, ()
        tiles = [sample.tiles for sample in samples]
        if not samples or sum(tiles) != len(pixel_values):
            return self.stock(pixel_values, **kwargs)
        keys = [(str(self.split), sample.id, sample.image) for sample in samples]
        missing = [index for index, key in enumerate(keys) if key not in self.kept]
        found = {}
        if missing:
            images, sizes = pixel_values.split(tiles), [tiles[index] for index in missing]
            computed = self._compute(torch.cat([images[index] for index in missing]), kwargs)
            found = dict(zip(missing, computed.split(sizes, dim=1)))
            if (host := self._copy_to_host(computed)) is not None:
                self.kept.update(zip([keys[index] for index in missing], host.split(sizes, dim=1)))
        for index, key in enumerate(keys):
            if index not in found:
                found[index] = self.kept[key].to(pixel_values.device, non_blocking=True)
        features = torch.cat([found[index] for index in range(len(keys))], dim=1)
        return SimpleNamespace(hidden_states=dict(zip(self.layers, features)))

    @torch.no_grad()
    def _compute(self, pixel_values: torch.Tensor, kwargs: dict) -> torch.Tensor:
        """(L, sum of P, N, D), rounded as the projector would round them."""
        states = self.stock(pixel_values, **kwargs).hidden_states
        features = torch.stack([states[layer] for layer in self.layers])
        device = features.device.type
        return features.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else features

    def _copy_to_host(self, features: torch.Tensor) -> torch.Tensor | None:
        """None once the capacity is used up, or the system locks no more pages."""
        size = 1 << (features.nbytes - 1).bit_length()  # so the allocator of page-locked memory rounds up
        if size > self.capacity:
            return None
        self.capacity -= size
        try:
            host = torch.empty(features.shape, dtype=features.dtype, pin_memory=features.is_cuda)
        except RuntimeError as error:  # no smaller micro-batch would help
            if not is_out_of_memory(error):
                raise
            self.capacity = 0
            return None
        return host.copy_(features, non_blocking=True)  # a later copy back is behind it on the same stream


def find_cache(model: Any) -> TowerCache | None:
    forward = unwrap(model).model.vision_tower.forward
    return forward if isinstance(forward, TowerCache) else None


def expect_images(model: Any, samples: Sequence[Sample]) -> None:
    """The next forward is of these samples; they are looked up if a split is given."""
    cache = find_cache(model)
    if cache is not None and cache.split is not None:
        cache.expected = samples


@contextlib.contextmanager
def keeping_features(model: Any, split: str) -> Iterator[None]:
    """Inside, forwards are of images of this split, with the same pixels for the same file each time."""
    cache = find_cache(model)
    if cache is None:
        yield
        return
    cache.split = split
    try:
        yield
    finally:
        cache.split, cache.expected = None, ()


def build_cache(trainer: Any) -> None:
    """Keep features where images come again, unchanged, and a GPU would compute them: a quarter of the free memory."""
    base, rows = trainer.plant.base, trainer.train_dataset
    is_fixed = not trainer.streams and not trainer.is_augmented
    is_frozen = not any(parameter.requires_grad for parameter in base.model.vision_tower.parameters())
    config = base.config.vision_config
    is_random = config.model_type not in DETERMINISTIC or config.attention_dropout > 0
    if not is_fixed or not is_frozen or is_random or trainer.memory_options.sharding != "none":
        return
    if trainer.args.device.type == "cuda" and trainer.planned_steps() * trainer.total_batch_size > len(rows):
        capacity = available_host_memory() / (4 * get_local_world_size())
        TowerCache(base, capacity)
        logger.info("memory | the vision tower's features are kept, in %.1f GiB of the CPU's memory", capacity / GIB)
