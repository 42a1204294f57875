"""Tiny real models, data and runs, made once a session; no network."""

import contextlib
import functools
import gc
import io
import os
import shutil
import sys
import zlib

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads would only wait for each other

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import filelock
import pytest

ROOT = Path(__file__).parent.parent
# The official release, or part of it; its photographs are not part of the repository.
FLOWERS = Path(os.environ.get("FLOWERS102", ROOT.parent / "shared" / "flowers102"))
QUESTION = "What flower is shown in this image?"
TOKEN = "hf_very_secret"  # of all runs of `train_once`
TINY = ["--preset", "tiny", "--max-steps", "6", "--save-steps", "6", "--num-workers", "0", "--logging-steps", "50"]

# Chat templates as on the hub, with their special tokens and their language model's config.
FAMILIES = {
    "mistral": (
        (
            "{% for m in messages %}{% if m.role == 'user' %}[INST] <image>\n{{ m.content[1].text }} [/INST]"
            "{% else %} {{ m.content[0].text }}<\\s> {% endif %}{% endfor %}"
        ),  # ends an answer in plain text
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        "MistralConfig",
    ),
    "vicuna": (
        (
            "{% for m in messages %}{{ m.role.upper() }}: {% if m.role == 'user' %}<image>\n{{ m.content[1].text }} "
            "{% else %}{{ m.content[0].text }} {% endif %}{% endfor %}"
            "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
        ),
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
        "LlamaConfig",
    ),
    "llama3": (
        (
            "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
            "{{ '\n\n' }}{% if m.role == 'user' %}<image>\n{{ m.content[1].text }}"
            "{% else %}{{ m.content[0].text }}{% endif %}<|eot_id|>{% endfor %}"
            "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
        ),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"},
        "LlamaConfig",
    ),
    "chatml": (
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'user' %}<image>\n{{ m.content[1].text }}"
            "{% else %}{{ m.content[0].text }}{% endif %}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "Qwen2Config",
    ),
    "granite": (
        (
            "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'user' %}<image>\n{{ m.content[1].text }}\n"
            "{% else %}{{ m.content[0].text }}<|end_of_text|>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
        ),
        {"eos_token": "<|end_of_text|>", "pad_token": "<|end_of_text|>"},
        "GraniteConfig",
    ),
}


def pytest_configure():
    gc.disable()  # nothing of what is imported is garbage


def pytest_collection_finish():
    freeze_modules()
    gc.enable()


def freeze_modules() -> None:
    """What is imported by now is no garbage; each training and each report would scan all of it, 0.3 s a time."""
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None  # those of a training


@pytest.fixture(scope="session", autouse=True)
def isolated_cache(tmp_path_factory):
    """Arrow files of the tests do not go into the user's cache."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def tiny():
    """What the tiny preset is made of; `rows(n)` are synthetic images, `model()` is a fresh one."""
    from config.training_config import PRESETS, TrainingConfig
    from data.collator import PlantCollator
    from data.synthetic import SPECIES, draw_split
    from models.builder import build_processor
    from models.tiny import build_tiny_model

    config = TrainingConfig(**PRESETS["tiny"])
    names = list(SPECIES)
    processor, prompt = build_processor(config, names)
    split = draw_split("test")[:40]
    return SimpleNamespace(
        config=config,
        processor=processor,
        prompt=prompt,
        names=names,
        collator=PlantCollator(processor, prompt, names, config.image_size),
        native=PlantCollator(processor, prompt, names, None),
        rows=lambda count: list(split[:count]),
        model=lambda seed=0: build_tiny_model(processor, seed),
    )


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], None]], Path]:
    """made_once(name, make): a folder that `make` fills, once for all processes that run tests."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent

    def once(name: str, make: Callable[[Path], None]) -> Path:
        folder, mark = place / name, place / f"{name}.made"
        with filelock.FileLock(place / f"{name}.lock"):
            if not mark.exists():
                folder.mkdir()
                make(folder)
                mark.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def checkpoint(made_once):
    """checkpoint(family) is a folder as from the hub: a tiny LLaVA-NeXT and its processor, of that family."""
    import transformers

    from data.oxford_flowers import CLASS_NAMES
    from data.synthetic import SPECIES
    from models.tiny import SIZES, build_tiny_model, build_tiny_processor

    def make(family: str, folder: Path) -> None:
        template, special, text_config = FAMILIES[family]
        processor = build_tiny_processor([*CLASS_NAMES, *SPECIES, QUESTION], SIZES["tiny"], template, special)
        model = build_tiny_model(processor, 0, SIZES["tiny"], getattr(transformers, text_config))
        if family == "granite":
            model = as_granite_vision(model, processor)
        processor.save_pretrained(folder)
        model.save_pretrained(folder)

    return lambda family="mistral": str(made_once(family, functools.partial(make, family)))


def as_granite_vision(model, processor):
    """The same in the layout of IBM's Granite Vision: 76 pixels are 5 patches and a rest, as its 384 are 27."""
    import torch
    from transformers import LlavaNextForConditionalGeneration, SiglipVisionConfig

    tile, config = 76, model.config
    pinpoints = [[tile * rows, tile * columns] for rows in range(1, 5) for columns in range(1, 5) if rows * columns < 5]
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    config.vision_config = SiglipVisionConfig(image_size=tile, patch_size=14, **shape)
    config.vision_feature_layer, config.vision_feature_select_strategy = [-4, -2, -1], "full"
    config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints = pinpoints
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    multipliers = dict(embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.05)
    config.text_config.update(multipliers | {"logits_scaling": 8.0})
    processor.vision_feature_select_strategy, processor.num_additional_image_tokens = "full", 0
    processor.image_processor.size = processor.image_processor.crop_size = {"height": tile, "width": tile}
    torch.manual_seed(0)
    granite = LlavaNextForConditionalGeneration(config)
    granite.generation_config = model.generation_config
    return granite


def use_small_splits(patch: pytest.MonkeyPatch) -> None:
    from data import dataset, synthetic
    from evaluation import evaluator

    for split, count in {"train": 48, "validation": 20, "test": 20}.items():
        patch.setitem(dataset.SPLIT_SIZES, split, count)
    patch.setattr(evaluator, "draw_ood_images", functools.partial(synthetic.draw_ood_images, 8))
    for name in ("report.MISTAKES", "report.SHOWN", "mistakes.MISTAKES"):
        patch.setattr(f"evaluation.{name}", 4)


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    for name in ("models.callbacks.plot_training", "evaluation.report.plot_report", "evaluation.report.plot_tiles",
                 "evaluation.mistakes.plot_confusions", "evaluation.mistakes.plot_tiles"):  # fmt: skip
        patch.setattr(name, lambda *_: None)


@pytest.fixture
def pictures():
    """For tests of tests/integration that look at the pictures of a run or a report; they take half of its time."""


@pytest.fixture
def small_splits(monkeypatch):
    """The synthetic source, and a report of it, in a fraction of a second."""
    use_small_splits(monkeypatch)


@pytest.fixture
def simulated_gpu(monkeypatch, tmp_path):
    """A machine whose process may have 4 GB more than it has now; a small model is fused too. No plan is remembered."""
    from runtime.device import memory_in_use

    monkeypatch.setattr("models.memory.available_gpu_memory", lambda device: memory_in_use(device) + 4e9)
    monkeypatch.setattr("models.fused_layers.MIN_ROWS", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return monkeypatch


@pytest.fixture
def image_folder(tmp_path):
    """image_folder({class: count}, split="") makes <tmp>/images[/<split>]/<class>/<n>.png and returns the root.

    No two images are the same, also of two splits.
    """
    from PIL import Image

    def make(counts: dict[str, int], split: str = "") -> Path:
        root, blue = tmp_path / "images", (90 + zlib.crc32(split.encode())) % 256
        for index, (name, count) in enumerate(counts.items()):
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for image in range(count):
                Image.new("RGB", (40 + image, 30), (40 * index, 10 * image, blue)).save(folder / f"{image}.png")
        return root

    return make


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Finished(NamedTuple):
    """A run of train.py that ended well; tests that read it copy its folder."""

    folder: Path
    output: str  # stdout and stderr


@pytest.fixture(scope="session")
def train_once(made_once) -> Callable[..., Finished]:
    """train_once(*flags): the tiny preset for six steps, in runs/tiny of an empty folder; each run is made once."""
    import train

    def make(flags: tuple[str, ...], has_pictures: bool, folder: Path) -> None:
        output = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, working_folder(folder):
            use_small_splits(patch)
            if not has_pictures:
                draw_nothing(patch)
            patch.setenv("HUGGINGFACE_TOKEN", TOKEN)
            patch.setenv("HF_TOKEN", "")  # the program sets it anew; this has it removed afterwards
            patch.delenv("HF_TOKEN")
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                assert train.main([*TINY, *flags]) == 0
        (folder / "output.txt").write_text(output.getvalue())

    def once(*flags: str, has_pictures: bool = False) -> Finished:
        name = f"run-{zlib.crc32(' '.join(flags).encode())}"
        folder = made_once(name, functools.partial(make, flags, has_pictures))
        return Finished(folder / "runs" / "tiny", (folder / "output.txt").read_text())

    return once


@contextlib.contextmanager
def working_folder(folder: Path) -> Iterator[Path]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


@pytest.fixture(scope="session")
def full_run(train_once) -> Finished:
    """All weights trained, with checkpoints of steps 4 and 6 and evaluations after steps 3 and 6."""
    return train_once("--save-steps", "2", "--eval-steps", "3", has_pictures=True)


@pytest.fixture(scope="session")
def lora_run(train_once, checkpoint) -> Finished:
    """LoRA and projector trained beside a 4-bit base."""
    flags = ["--model", checkpoint(), "--load-in-4bit", "true", "--trainable", "adapter+projector", "--lora-r", "4"]
    return train_once(*flags, "--learning-rate", "0.01", "--mixed-precision", "no")


@pytest.fixture(scope="session")
def demo_run(made_once) -> Path:
    """The tiny preset as `make demo` trains it: a minute on two idle cores, for slow tests."""
    import train

    def make(folder: Path) -> None:
        assert train.main(["--preset", "tiny", "--output-dir", str(folder / "run")]) == 0

    return made_once("demo", make) / "run"


@pytest.fixture(scope="session")
def run_on_val(train_once) -> Finished:
    """A run that was trained on val, too."""
    return train_once("--train-on-val", "true")


@pytest.fixture
def trained(here, small_splits, full_run) -> Path:
    """`one` in the working folder: a copy of `full_run`."""
    return shutil.copytree(full_run.folder, here / "one")


@pytest.fixture
def trained_lora(here, small_splits, lora_run) -> Path:
    """`two` in the working folder: a copy of `lora_run`."""
    return shutil.copytree(lora_run.folder, here / "two")


def run_main(main: Callable, capsys, *argv: str) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of a script's main."""
    capsys.readouterr()
    try:
        status = main(list(argv))
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()
    if isinstance(status, str):  # what Python itself would print
        return 1, printed.out, printed.err + status
    return status, printed.out, printed.err


def run_printed(main: Callable, capsys, *argv: str) -> tuple[int, str]:
    """(exit status, all that was printed)"""
    status, out, err = run_main(main, capsys, *argv)
    return status, out + err


@pytest.fixture(autouse=True)
def no_handler_is_left(monkeypatch):
    """A handler keeps the stream it was made with, and pytest closes that after each test."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    yield
    from utils.logging_utils import logger

    logger.handlers.clear()
