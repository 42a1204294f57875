"""PlantTrainer: micro-batches, what stops a step, signals and resume, out-of-memory, evaluation, best/."""

import itertools
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import TrainerCallback, set_seed

from config.training_config import PRESETS, TrainingConfig
from data.collator import PlantCollator
from data.dataset import ROW, PlantData
from data.streaming import Stream
from models.builder import PlantModel, set_trainable
from models.callbacks import EarlyStopping
from models.fused_layers import FusedLayer, fuse_layers, set_activation_checkpointing
from models.memory import MicroBatcher
from models.scoring import score_batch
from models.trainer import build_trainer
from models.training_arguments import build_arguments
from models.trie import build_tries
from runtime.checkpoint import last_checkpoint, read_best
from runtime.interrupt import Interrupted, StopRequest
from runtime.run_dir import Run
from runtime.run_files import append_metrics, read_metrics
from tests.conftest import draw_nothing
from tests.unit.test_collator import SIZES, rows_of
from utils.image_utils import ImageError, augment_image
from utils.logging_utils import UserError, setup_logging
from utils.signal_utils import SIGNALS, end_children

CPU = torch.device("cpu")
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 20 GiB."


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """test_callbacks.py draws them; here they would take half of the time."""
    draw_nothing(monkeypatch)


def make_trainer(tiny, folder, train_rows=None, val_rows=None, model=None, **settings):
    """The trainer of the tiny preset, for four steps of 16 images."""
    defaults = {"output_dir": str(folder), "max_steps": 4, "save_steps": 50, "num_workers": 0}
    config = TrainingConfig(**PRESETS["tiny"] | defaults | settings)
    set_seed(config.seed)
    collator = PlantCollator(tiny.processor, tiny.prompt, tiny.names, config.image_size)
    plant = PlantModel(
        model or tiny.model(),
        tiny.processor,
        tiny.prompt,
        collator,
        "no",
        CPU,
        config.per_device_eval_batch_size,
        config.num_workers,
    )
    val = Dataset.from_list(val_rows or tiny.rows(10), features=ROW)
    train = train_rows or tiny.rows(32)
    train = train if isinstance(train, Stream) else Dataset.from_list(train, features=ROW)
    return build_trainer(Run(config), plant, PlantData(train, val, val, tiny.names, "synthetic"))


def make_fused(tiny, folder, **settings):
    set_seed(0)
    model = set_trainable(tiny.model(), "adapter", 4, 8, 0.0)
    fuse_layers(model.get_base_model().model.language_model.layers)
    return make_trainer(tiny, folder, model=model, **{"trainable": "adapter"} | settings)


def with_dropout(tiny):
    model = tiny.model()
    model.model.vision_tower.encoder.layers[0].self_attn.dropout = 0.2
    return model


FEW = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}  # images in a step


def split_into(size: int) -> dict:
    """Settings of 16 images per step in micro-batches of `size`."""
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": 16 // size}


def test_more_tokens_than_the_language_model_has_positions_are_refused(tiny, tmp_path):
    """At the start, as far as the largest row is known, and in a step, in a score and in a reply."""
    trainer = make_trainer(tiny, tmp_path)
    plant = trainer.plant
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.config.text_config.max_position_embeddings = max(sample.length for sample in batch.samples) - 1
    rows = tiny.rows(10)
    for start in (
        trainer.plan_memory,
        lambda: trainer.training_step(trainer.model, batch),
        lambda: list(plant.score(rows)),
        lambda: list(plant.generate(rows, 1)),
    ):
        with pytest.raises(
            UserError, match=r"pixels, prompt and name are \d+ tokens, .* \d+ positions .*; use --views"
        ):
            start()


@pytest.mark.parametrize("streaming", [False, True])
def test_memory_is_planned_for_the_largest_crop_of_augmented_images(streaming, tiny, tmp_path, monkeypatch):
    rows, planned = rows_of(tiny, [(150, 200)] * 16), []
    if streaming:
        Dataset.from_list(rows, features=ROW).to_parquet(tmp_path / "train.parquet")
        rows = Stream([tmp_path / "train.parquet"], seed=1)
    settings = {"image_size": None, "augmentation": "light", "streaming": streaming}
    trainer = make_trainer(tiny, tmp_path / "run", rows, **settings)
    monkeypatch.setattr("models.trainer.plan_memory", lambda trainer, row, steps_left: planned.append(row))
    trainer.plan_memory(1)
    (sample,), image = trainer.data_collator(planned).samples, Image.new("RGB", (200, 150))
    crops = [augment_image(image, seed) for seed in range(30)]
    tokens = [trainer.data_collator.count_tokens((crop.height, crop.width))[0] for crop in crops]
    assert trainer.data_collator.count_tokens((150, 200))[0] < max(tokens) <= sample.image_tokens


def steps_of(folder) -> list[dict]:
    return [line for line in read_metrics(folder) if "loss" in line]


def evaluated_steps(folder) -> list[int]:
    return [line["step"] for line in read_metrics(folder) if "eval_loss" in line]


def weights(trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def equal(tensors, others, tolerance=0.0) -> bool:
    pairs = zip(tensors, others, strict=True)
    return all(torch.allclose(a, b, rtol=0, atol=tolerance, equal_nan=True) for a, b in pairs)


class At(TrainerCallback):
    """Runs `action(trainer state)` at an event, of one step or of all."""

    def __init__(self, event, action, step=None):
        self.action, self.step = action, step
        setattr(self, event, self.run)

    def run(self, args, state, control, **kwargs):
        if self.step is None or state.global_step == self.step:
            self.action(state)


# ---- micro-batches


def test_loss_and_gradients_do_not_depend_on_the_micro_batch(tiny, tmp_path):
    batch = tiny.native(rows_of(tiny, SIZES * 4))
    tokens = (batch["labels"] != -100).sum()
    losses, gradients = [], []
    for size in (16, 4, 1):
        trainer = make_trainer(tiny, tmp_path, **split_into(size))
        trainer.create_optimizer()
        losses.append(trainer.training_step(trainer.model, batch, tokens).item())
        gradients.append([p.grad.clone() for p in trainer.model.parameters() if p.grad is not None])
    assert losses[0] == pytest.approx(tiny.model()(**batch.split(16)[0]).loss.item(), abs=1e-6)
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)
    assert equal(gradients[0], gradients[1], 1e-5) and equal(gradients[0], gradients[2], 1e-5)


def test_losses_of_a_run_do_not_depend_on_the_micro_batch(tiny, tmp_path):
    losses = []
    for size in (16, 2):
        make_trainer(tiny, tmp_path / str(size), max_steps=2, **split_into(size)).train()
        losses.append([step["loss"] for step in steps_of(tmp_path / str(size))])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


# ---- transformers' arguments


def test_settings_reach_transformers_where_a_batch_is_the_whole_step(tmp_path):
    config = TrainingConfig(
        output_dir=str(tmp_path), lr_scheduler_type="linear", warmup_steps=7, weight_decay=0.3, max_grad_norm=0.25,
        optim="sgd", learning_rate=3e-4, seed=9, save_steps=11, logging_steps=4, eval_steps=6, num_train_epochs=5.0,
        per_device_eval_batch_size=3, report_to="tensorboard,wandb",
    )  # fmt: skip
    arguments = build_arguments(config, "bf16", CPU, 0)
    same = "warmup_steps weight_decay max_grad_norm lr_scheduler_type optim learning_rate seed save_steps logging_steps"
    for name in [*same.split(), "eval_steps", "num_train_epochs", "per_device_eval_batch_size", "output_dir"]:
        assert getattr(arguments, name) == getattr(config, name), name
    assert (arguments.bf16, arguments.fp16, arguments.report_to) == (True, False, ["tensorboard", "wandb"])
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (16, 1)
    assert arguments.logging_nan_inf_filter is False and arguments.remove_unused_columns is False


def test_several_visible_gpus_change_nothing(tmp_path, monkeypatch):
    two_gpus = property(lambda self: setattr(self, "_n_gpu", 2) or CPU)
    monkeypatch.setattr("transformers.TrainingArguments._setup_devices", two_gpus)
    arguments = build_arguments(TrainingConfig(output_dir=str(tmp_path)), "no", CPU, 0)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 16


def test_more_ranks_than_images_in_a_step(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "17")
    with pytest.raises(UserError, match="global batch size 16: fewer images than the 17 ranks"):
        build_arguments(TrainingConfig(output_dir="runs/x"), "no", CPU, 0)


def test_as_many_checkpoints_are_kept_as_configured(tiny, tmp_path):
    make_trainer(tiny, tmp_path, save_steps=1, save_total_limit=3, **FEW).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (2, 3, 4)]


def test_images_of_a_stream_reach_the_device(tiny, tmp_path):
    """As those of other sources, which accelerate moves there. The device "meta" stands for a GPU."""
    Dataset.from_list(tiny.rows(32), features=ROW).to_parquet(tmp_path / "train.parquet")
    trainer = make_trainer(tiny, tmp_path / "run", Stream([tmp_path / "train.parquet"], seed=1), streaming=True)
    trainer.args.__dict__["_setup_devices"] = torch.device("meta")
    batch = next(iter(trainer.get_train_dataloader()))
    assert {value.device.type for value in batch.values() if isinstance(value, torch.Tensor)} == {"meta"}


# ---- what stops or skips a step


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_loss_stops_before_the_weights_are_updated(value, tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path)
    before = []

    def poison(state):
        trainer.model.lm_head.weight.data[5] = value
        before.extend(weights(trainer))

    trainer.add_callback(At("on_step_begin", poison, step=2))
    message = r"step 3: loss (nan|inf).*the weights were not updated in this step.*samples: test-000\d\d"
    with pytest.raises(UserError, match=message) as stopped:
        trainer.train()
    assert len(re.findall(r"test-000\d\d", str(stopped.value))) == 16
    assert equal(before, weights(trainer)) and [step["step"] for step in steps_of(tmp_path)] == [1, 2]


def test_a_non_finite_gradient_stops_too(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path)
    weight = trainer.model.lm_head.weight
    poison = lambda state: weight.register_hook(lambda gradient: gradient * math.nan)  # noqa: E731
    trainer.add_callback(At("on_step_begin", poison, step=1))
    with pytest.raises(UserError, match=r"step 2: loss \d.*, gradient norm nan"):
        trainer.train()


def test_the_loss_scaler_skips_an_overflow_until_its_scale_is_1(tiny, tmp_path, capsys):
    setup_logging()
    trainer = make_trainer(tiny, tmp_path)
    trainer.step_checks.metrics = {"step": 7}
    scale = [65536.0]
    trainer.accelerator.scaler = SimpleNamespace(get_scale=lambda: scale[0])
    trainer.step_checks.handle_non_finite_step(2.0, math.inf, "a, b")
    assert trainer.step_checks.metrics["skipped"] == "overflow"
    expected = "warning: step 7: gradient overflow at loss scale 65536; the loss scaler skips the step"
    assert expected in capsys.readouterr().out
    with pytest.raises(UserError, match="step 7: loss nan"):
        trainer.step_checks.handle_non_finite_step(math.nan, 1.0, "a, b")
    scale[0] = 1.0
    with pytest.raises(UserError, match="step 7: loss 2.0, gradient norm inf"):
        trainer.step_checks.handle_non_finite_step(2.0, math.inf, "a, b")


def poison_steps(trainer, steps: set[int]) -> None:
    """The loss of these steps is NaN; the model is then as it was."""
    current = [0]
    trainer.model.lm_head.register_forward_hook(lambda *args: args[-1] * math.nan if current[0] in steps else None)
    trainer.add_callback(At("on_step_begin", lambda state: current.__setitem__(0, state.global_step + 1)))


def test_a_skipped_step_is_counted_and_leaves_no_trace(tiny, tmp_path, capsys):
    setup_logging()
    trainer = make_trainer(tiny, tmp_path, max_skipped_steps=1, weight_decay=0.1, max_steps=6, logging_steps=1)
    states = {}

    def snapshot(state):
        moments = [tensor.clone() for moments in trainer.optimizer.state.values() for tensor in moments.values()]
        states[state.global_step] = weights(trainer) + moments

    poison_steps(trainer, {3, 5})
    trainer.add_callback(At("on_step_end", snapshot))
    trainer.train()
    assert [step for step in range(2, 7) if equal(states[step - 1], states[step])] == [3, 5]
    lines = steps_of(tmp_path)
    assert [line["step"] for line in lines if line.get("skipped") == "not finite"] == [3, 5] and len(lines) == 6
    assert all((line["loss"] is None) == ("skipped" in line) for line in lines)
    output = capsys.readouterr().out
    assert "step 3: loss nan, gradient norm nan; the step is skipped (samples: test-000" in output
    assert "step 3/6 | loss skipped |" in output and "2 of 6 steps were skipped (2 not finite)" in output
    assert all(math.isfinite(entry["train_loss"]) for entry in trainer.state.log_history if "train_loss" in entry)


def test_too_many_skipped_steps_in_a_row_stop_the_run_with_all_their_samples(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, max_skipped_steps=2, save_steps=2, max_steps=8)
    poison_steps(trainer, {1, 3, 4, 5})
    with pytest.raises(UserError, match="step 5: loss nan.*not updated in the last 3 steps") as stopped:
        trainer.train()
    assert len(re.findall(r"test-000\d\d", str(stopped.value))) == 48
    assert last_checkpoint(tmp_path).name == "checkpoint-4"  # with the weights of step 2


def test_a_batch_that_lost_image_tokens_stops_before_the_weights_are_updated(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path)
    before, collate = weights(trainer), trainer.data_collator

    def lose_a_token(samples):
        batch = collate(samples)
        batch["image_tokens"][3] -= 1
        return batch

    trainer.data_collator = lose_a_token
    with pytest.raises(UserError, match=r"step 1: the number of image tokens of 1 samples changed.*not updated"):
        trainer.train()
    assert equal(before, weights(trainer))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("input_ids", lambda tensor: tensor[:, 0]),
        ("pixel_values", lambda tensor: tensor.double()),
        ("pixel_values", lambda tensor: tensor[:, :, :, :50]),
        ("shift_labels", lambda tensor: tensor[:, :1]),
        ("image_sizes", lambda tensor: tensor[:2]),
        ("logits_to_keep", lambda tensor: tensor[None]),
    ],
)
def test_a_batch_of_another_shape_is_refused_before_the_forward(name, change, tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path)
    batch = tiny.collator(tiny.rows(4))
    batch[name] = change(batch[name])
    with pytest.raises(UserError, match=name):
        trainer.training_step(trainer.model, batch, 12)


def unreadable(tiny, count: int, *indices: int) -> list[dict]:
    """Synthetic rows; the images at `indices` cannot be read."""
    samples = tiny.rows(count)
    for index in indices:
        path = f"{samples[index]['id']}.jpg"
        samples[index] = samples[index] | {"image": {"bytes": b"not an image", "path": path}}
    return samples


def test_unreadable_training_images_are_logged_once_up_to_a_fraction(tiny, tmp_path, capsys):
    setup_logging()
    samples = unreadable(tiny, 32, 3, 9)
    make_trainer(tiny, tmp_path / "few", samples, max_bad_fraction=0.1).train()
    output = capsys.readouterr().out
    assert output.count("image skipped") == 2 and "(2 of train so far)" in output
    assert "test-00003.jpg: is not an image" in output
    assert sum(step["images"] for step in steps_of(tmp_path / "few")) == 60
    samples = unreadable(tiny, 32, 3, 9, 12, 15)
    with pytest.raises(ImageError, match=r"\d of 32 images cannot be opened, above max_bad_fraction=0.01"):
        make_trainer(tiny, tmp_path / "many", samples).train()


def test_a_step_without_a_readable_image_is_an_error(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, unreadable(tiny, 32, *range(32)), max_bad_fraction=1.0)
    with pytest.raises(UserError, match=r"step 1: none of its images can be read.*\(test-000\d\d: test-000"):
        trainer.train()


def test_unreadable_validation_images_are_logged_up_to_a_fraction(tiny, tmp_path, capsys):
    setup_logging()
    samples = unreadable(tiny, 10, 7, 8, 9)
    settings = {"val_rows": samples, "per_device_eval_batch_size": 1}
    assert make_trainer(tiny, tmp_path, max_bad_fraction=0.3, **settings).evaluate()["eval_unreadable_images"] == 3
    assert "image skipped (3 of val so far): test-00009: test-00009.jpg: is not an image" in capsys.readouterr().out
    with pytest.raises(ImageError, match="3 of 10 images cannot be opened, above max_bad_fraction=0.05 .test-"):
        make_trainer(tiny, tmp_path, max_bad_fraction=0.05, **settings).evaluate()
    with pytest.raises(UserError, match="val: none of its 3 images can be read; fix or remove them"):
        make_trainer(tiny, tmp_path, val_rows=samples[7:], max_bad_fraction=1.0).evaluate()


# ---- signals


def send(number=signal.SIGINT):
    """A signal to this process, which is noted; the run continues to the next place where it can stop."""
    return lambda *args: os.kill(os.getpid(), number)


def interrupt_and_resume(tiny, folder, interrupt, **settings):
    """A trainer that `interrupt(trainer)` stops, and a trainer that resumes what it saved."""
    handlers = [signal.getsignal(number) for number in SIGNALS]
    trainer = make_trainer(tiny, folder, model=with_dropout(tiny), **settings)
    interrupt(trainer)
    with pytest.raises(Interrupted):
        trainer.train()
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    resumed = make_trainer(tiny, folder, model=with_dropout(tiny), **settings)
    resumed.train(last_checkpoint(folder))
    return trainer, resumed


INTERRUPTED = {"max_steps": 5, "eval_steps": 3} | split_into(8)


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    trainer = make_trainer(tiny, tmp_path_factory.mktemp("undisturbed"), model=with_dropout(tiny), **INTERRUPTED)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("number", "event", "step"),
    [
        (signal.SIGINT, "on_step_begin", 1),
        (signal.SIGTERM, "on_step_begin", 2),
        (signal.SIGTERM, "on_step_end", 2),
        (signal.SIGINT, "on_step_end", 3),
    ],
)
def test_a_signal_saves_the_last_complete_step_and_a_resume_changes_nothing(
    number, event, step, tiny, tmp_path, undisturbed
):
    trainer, resumed = interrupt_and_resume(
        tiny, tmp_path, lambda trainer: trainer.add_callback(At(event, send(number), step)), **INTERRUPTED
    )
    assert (trainer.state.global_step, resumed.state.global_step) == (step, 5)
    assert equal(weights(undisturbed), weights(resumed))
    lines, others = (
        [(line["step"], line.get("loss"), line.get("eval_loss")) for line in read_metrics(folder)]
        for folder in (undisturbed.run.folder, tmp_path)
    )
    assert lines == others and len(lines) == 7


def test_a_signal_between_two_forward_passes_of_a_step(tiny, tmp_path):
    undisturbed = make_trainer(tiny, tmp_path / "a", model=with_dropout(tiny), **split_into(4))
    undisturbed.train()
    passes = itertools.count()

    def interrupt(trainer):
        trainer.model.register_forward_hook(lambda *args: send(signal.SIGTERM)() if next(passes) == 9 else None)

    trainer, resumed = interrupt_and_resume(tiny, tmp_path / "b", interrupt, **split_into(4))
    assert trainer.state.global_step == 2 and equal(weights(undisturbed), weights(resumed))


def test_a_signal_before_the_first_step_is_complete_saves_nothing(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path)
    trainer.add_callback(At("on_step_begin", send(), step=0))
    with pytest.raises(Interrupted):
        trainer.train()
    assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize("eval_steps", [None, 2])
def test_an_evaluation_that_was_interrupted_twice_is_logged_once(eval_steps, tiny, tmp_path):
    """Stopped between a step and its evaluation, then after the evaluation that makes up for it."""
    settings = FEW | {"max_steps": 4, "eval_steps": eval_steps, "save_steps": 2}
    trainer = make_trainer(tiny, tmp_path, **settings)
    trainer.add_callback(At("on_step_end", send(), step=eval_steps or 4))
    with pytest.raises(Interrupted):
        trainer.train()
    checkpoint = last_checkpoint(tmp_path)
    before = (checkpoint / "trainer_state.json").read_bytes()
    trainer = make_trainer(tiny, tmp_path, **settings)
    trainer.add_callback(At("on_evaluate", send()))
    with pytest.raises(Interrupted):
        trainer.train(checkpoint)
    assert (checkpoint / "trainer_state.json").read_bytes() == before  # a valid checkpoint is not written to
    trainer = make_trainer(tiny, tmp_path, **settings)
    trainer.train(checkpoint)
    expected = [4] if eval_steps is None else [2, 4]
    assert evaluated_steps(tmp_path) == expected
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == expected


def test_a_signal_after_the_last_step_ends_the_run_too(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, eval_steps=None)
    trainer.add_callback(At("on_save", send(), step=4))
    with pytest.raises(Interrupted):
        trainer.train()
    assert last_checkpoint(tmp_path).name == "checkpoint-4" and evaluated_steps(tmp_path) == []


def test_metrics_after_the_checkpoint_are_dropped_on_resume(tiny, tmp_path):
    settings = FEW | {"save_steps": 2}
    make_trainer(tiny, tmp_path, **settings).train()
    lines = read_metrics(tmp_path)
    for entry in ({"step": 5, "loss": 0.5}, {"step": 4, "completed": True}):
        append_metrics(tmp_path, entry)
    make_trainer(tiny, tmp_path, **settings).train(tmp_path / "checkpoint-4")
    assert read_metrics(tmp_path) == lines
    # a run that was killed before its first checkpoint
    make_trainer(tiny, tmp_path, max_steps=2, **FEW).train()
    assert [step["step"] for step in steps_of(tmp_path)] == [1, 2]


@pytest.mark.parametrize("eval_steps", [None, 2])
def test_a_resumed_run_evaluates_and_saves_as_often_as_its_flags_say_now(eval_steps, tiny, tmp_path, monkeypatch):
    fake_scores(monkeypatch, [0.5] * 9)
    settings = FEW | {"max_steps": 4, "save_total_limit": 9}
    make_trainer(tiny, tmp_path, eval_steps=eval_steps, save_steps=2, **settings).train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    make_trainer(tiny, tmp_path, eval_steps=1, save_steps=1, **settings).train(tmp_path / "checkpoint-2")
    assert evaluated_steps(tmp_path) == [2, 3, 4] and (tmp_path / "checkpoint-3").exists()


def test_a_signal_is_noted_with_stderr_closed_and_its_double_does_not_kill(monkeypatch):
    def closed(*args):
        raise BrokenPipeError

    monkeypatch.setattr("runtime.interrupt.os.write", closed)
    stop = StopRequest()
    with stop.listening():
        for _ in range(2):  # to the process, and to its group
            send(signal.SIGTERM)()
        with pytest.raises(Interrupted):
            stop.check()


def test_loader_workers_ignore_signals_that_are_not_from_their_parent(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, num_workers=1, per_device_train_batch_size=2)
    batches = iter(trainer.get_train_dataloader())
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in SIGNALS:
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)  # not its parent
    after = [len(next(batches).samples) for _ in range(14)]  # of 15; more than were prefetched before the signals
    assert after == [2] * 14 and worker.is_alive()
    worker.terminate()
    worker.join(60)  # returns as soon as it has ended
    assert worker.exitcode == 0


def stop_workers(state):
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGSTOP)


def long_temporary_folder(state):
    """Of the workers: too long for the path of a socket, through which they send tensors."""
    multiprocessing.current_process()._config["tempdir"] = "/tmp/" + 120 * "t"


def too_few_files(state):
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 2, HARD_LIMIT))


HARD_LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[1]


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        (stop_workers, RuntimeError, "DataLoader timed out after [24] seconds"),
        (
            long_temporary_folder,
            UserError,
            r"cannot send its batch \(OSError: AF_UNIX path too long\): a TMPDIR too long",
        ),
        (too_few_files, (RuntimeError, OSError, UserError), "(?i)too many open files|ancdata|open files"),
    ],
)
def test_a_wait_for_loader_workers_ends(fault, error, words, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("models.trainer.LOADER_S", 2)
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    trainer = make_trainer(tiny, tmp_path, num_workers=1, per_device_train_batch_size=2)
    trainer.add_callback(At("on_train_begin" if fault is not stop_workers else "on_step_begin", fault))
    try:
        with pytest.raises(error, match=words):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
        end_children()


def test_a_signal_during_a_wait_for_a_stopped_worker_saves(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, num_workers=1, per_device_train_batch_size=2)
    trainer.add_callback(At("on_step_begin", stop_workers, step=1))
    timer = threading.Timer(2, send())
    timer.start()
    with pytest.raises(Interrupted):
        trainer.train()
    assert last_checkpoint(tmp_path).name in ("checkpoint-1", "checkpoint-2", "checkpoint-3")
    end_children()


# ---- out of memory


def limit_memory(model, most_images: int, spared: int = 0) -> None:
    """After `spared` forward passes, those of more images use random numbers and run out of memory."""
    passes = itertools.count()

    def refuse(module, args, kwargs):
        if next(passes) >= spared and len(kwargs["input_ids"]) > most_images:
            torch.rand(7)
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    model.register_forward_pre_hook(refuse, with_kwargs=True)


def test_after_out_of_memory_the_same_step_is_retried_with_half_the_micro_batch(tiny, tmp_path, capsys):
    setup_logging()
    undisturbed = make_trainer(tiny, tmp_path / "a", model=with_dropout(tiny), **split_into(4))
    undisturbed.train()
    trainer = make_trainer(tiny, tmp_path / "b", model=with_dropout(tiny), **split_into(8))
    limit_memory(trainer.model, 5, spared=1)  # the first of two micro-batches has left its gradients
    trainer.train()
    assert "step 1: out of memory; from here on retrying with micro-batch 4" in capsys.readouterr().out
    assert trainer.micro_batcher.size == 4 and trainer.state.global_step == 4
    assert equal(weights(undisturbed), weights(trainer))


def test_out_of_memory_with_micro_batch_1_is_an_error(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path)
    limit_memory(trainer.model, 0)
    with pytest.raises(UserError, match="step 1: out of memory with micro-batch 1; use --gradient"):
        trainer.train()


def test_other_errors_of_a_forward_are_raised_as_they_are(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path)
    trainer.model.register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        trainer.train()


def test_with_micro_batch_1_activations_are_checkpointed_and_offloaded_first(tiny, tmp_path, capsys, simulated_gpu):
    setup_logging()
    trainer = make_fused(tiny, tmp_path, **split_into(1))
    set_activation_checkpointing(trainer.fused, 3)
    forward = FusedLayer.forward

    def refuse(self, *args, keep=True, needs_output=True, **kwargs):
        if keep and needs_output:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        return forward(self, *args, keep=keep, needs_output=needs_output, **kwargs)

    simulated_gpu.setattr(FusedLayer, "forward", refuse)
    trainer.train()
    expected = "retrying with micro-batch 1, activation checkpointing in all layers, offloaded to the CPU"
    assert expected in capsys.readouterr().out
    assert trainer.state.global_step == 4 and all(layer.offload for layer in trainer.fused)
    with pytest.raises(UserError, match="use --gradient-checkpointing offload, --load-in-4bit true"):
        trainer.halve_micro_batch(torch.OutOfMemoryError(OUT_OF_MEMORY))


def test_with_micro_batch_1_checkpointed_activations_are_offloaded_next(tiny, tmp_path, simulated_gpu):
    trainer = make_fused(tiny, tmp_path, **split_into(1))
    set_activation_checkpointing(trainer.fused, 0)
    trainer.halve_micro_batch(torch.OutOfMemoryError(OUT_OF_MEMORY))
    assert trainer.micro_batcher.size == 1 and all(layer.offload for layer in trainer.fused)


def test_an_evaluation_out_of_memory_is_retried_with_half_the_micro_batch(tiny, tmp_path, capsys):
    setup_logging()
    expected = make_trainer(tiny, tmp_path / "a", per_device_eval_batch_size=10).evaluate()
    trainer = make_trainer(tiny, tmp_path / "b", per_device_eval_batch_size=10)
    limit_memory(trainer.model.model, 3)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)
    assert trainer.plant.micro_batcher.size == 2
    assert "out of memory while scoring; retrying with micro-batch 2" in capsys.readouterr().out


# ---- evaluation


def test_evaluation_loss_is_the_exact_token_mean_for_any_batch_size(tiny, tmp_path):
    losses = [
        make_trainer(tiny, tmp_path, per_device_eval_batch_size=size).evaluate()["eval_loss"] for size in (1, 4, 10)
    ]
    (batch,) = tiny.collator(tiny.rows(10)).split(10)
    with torch.no_grad():
        expected = tiny.model().eval()(**batch).loss.item()
    assert losses == pytest.approx([expected] * 3, abs=1e-5)


def test_evaluation_accuracy_is_that_of_the_scores(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path)
    batch = tiny.collator(tiny.rows(10))
    scores = score_batch(tiny.model().eval(), batch, build_tries(tiny.collator.name_ids), MicroBatcher(10))
    labels = torch.tensor([sample.label for sample in batch.samples])
    assert trainer.evaluate()["eval_top1"] == pytest.approx((scores.argmax(dim=1) == labels).float().mean().item())


def test_evaluating_does_not_change_the_training(tiny, tmp_path):
    ends, settings = [], {"num_workers": 1, "per_device_eval_batch_size": 10}
    for name, interval in (("without", None), ("with", 1)):
        trainer = make_trainer(tiny, tmp_path / name, model=with_dropout(tiny), eval_steps=interval, **settings)
        trainer.train()
        ends.append(weights(trainer))
    assert equal(*ends)
    assert (evaluated_steps(tmp_path / "without"), evaluated_steps(tmp_path / "with")) == ([4], [1, 2, 3, 4])


# ---- optimizer and steps


def test_optimizer_state_read_from_a_checkpoint_is_not_marked_as_paged(tiny, tmp_path):
    """bitsandbytes' mark is saved with the tensor, and is true only of memory that it allocated itself."""
    trainer = make_trainer(tiny, tmp_path, max_steps=2, save_steps=1)
    trainer.train()
    path = tmp_path / "checkpoint-1" / "optimizer.pt"
    saved = torch.load(path)
    for state in saved["state"].values():
        state["exp_avg"].is_paged = True
    torch.save(saved, path)
    assert torch.load(path)["state"][0]["exp_avg"].is_paged  # the mark is read back
    trainer._load_optimizer_and_scheduler(str(path.parent))
    states = list(trainer.optimizer.state.values())
    assert states and not any(hasattr(state["exp_avg"], "is_paged") for state in states)


def test_the_projector_has_its_own_learning_rate(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, projector_learning_rate=1e-2, learning_rate=1e-3, weight_decay=0.1)
    trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == (1e-2 if "multi_modal_projector" in name else 1e-3)
    trainer.train()
    assert trainer.lr_scheduler.base_lrs.count(1e-2) == 2


def test_the_logged_learning_rate_is_that_of_the_trainable_parameters(tiny, tmp_path):
    model = set_trainable(tiny.model(), "projector", 2, 4, 0.0)
    settings = {"trainable": "projector", "projector_learning_rate": 1e-3, "warmup_steps": 0.0, "eval_steps": None}
    make_trainer(tiny, tmp_path, model=model, lr_scheduler_type="constant_with_warmup", **settings).train()
    assert {step["learning_rate"] for step in steps_of(tmp_path)} == {1e-3}


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"max_steps": 7}, 7), ({"max_steps": -1, "num_train_epochs": 1.5}, 3), ({"max_steps": -1}, 6)],
)
def test_planned_steps_are_the_steps_done(settings, steps, tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, tiny.rows(8), **settings, **FEW)
    assert trainer.planned_steps() == steps
    trainer.train()
    assert trainer.state.global_step == steps


# ---- the best checkpoint, and early stopping


def fake_scores(monkeypatch, top1: list[float], losses: list[float] | None = None):
    """Evaluations have these results, whatever the weights are."""
    results = iter(zip(top1, losses or itertools.repeat(1.0)))

    def score_validation(self, eval_dataset=None):
        accuracy, loss = next(results)
        return {"loss": loss, "top1": accuracy, "top5": 1.0, "unreadable_images": 0}, []

    monkeypatch.setattr("models.trainer.PlantTrainer.score_validation", score_validation)


@pytest.mark.parametrize(
    ("top1", "losses", "best"),
    [([0.5, 0.7, 0.6], [3, 2, 1], 2), ([0.7, 0.7, 0.7], [3, 1, 2], 2), ([0.2, 0.1, 0.2], [1, 1, 1], 1)],
)
def test_best_has_the_highest_accuracy_and_then_the_lowest_loss(tiny, tmp_path, monkeypatch, top1, losses, best):
    fake_scores(monkeypatch, top1, losses)
    trainer = make_trainer(tiny, tmp_path, max_steps=3, eval_steps=1, **FEW)
    kept = {}
    trainer.add_callback(At("on_evaluate", lambda state: kept.update({state.global_step: weights(trainer)})))
    trainer.train()
    trainer.load_best()
    assert read_best(tmp_path / "best")["step"] == best
    assert equal(weights(trainer), kept[best]) and not equal(kept[1], kept[3])


def test_after_a_kill_the_model_has_the_weights_of_best_and_not_others_of_the_same_step(tiny, tmp_path, monkeypatch):
    """A GPU does not repeat a step bit by bit, so that what a resumed run arrives at is a little different."""
    killed = make_trainer(tiny, tmp_path, max_steps=1, eval_steps=1, save_steps=50, **FEW)
    resumed = make_trainer(tiny, tmp_path, model=tiny.model(1), max_steps=1, eval_steps=1, save_steps=50, **FEW)
    for trainer, top1 in ((killed, 0.9), (resumed, 0.8)):
        fake_scores(monkeypatch, [top1])
        trainer.train()
    assert not equal(weights(resumed), weights(killed))
    resumed.load_best()
    assert equal(weights(resumed), weights(killed))


@pytest.mark.parametrize("save_steps, step, is_kept", [(1, 1, True), (50, 2, False)])
def test_what_was_examined_with_lost_weights_is_forgotten(save_steps, step, is_kept, tiny, tmp_path, monkeypatch):
    fake_scores(monkeypatch, [0.9, 0.1])
    trainer = make_trainer(tiny, tmp_path, max_steps=2, eval_steps=1, save_steps=save_steps, **FEW)
    trainer.train()
    trainer.examined = examined = ["an image"]
    shutil.rmtree(tmp_path / "best")
    trainer.load_best()
    assert read_best(tmp_path / "best")["step"] == step and trainer.examined == (examined if is_kept else [])


@pytest.mark.parametrize(
    ("patience", "gain", "top1", "stops"),
    [
        (2, 0.05, [0.5, 0.6, 0.62, 0.64, 0.7], 4),  # each gain is measured from the last sufficient one
        (2, 0.05, [0.5, 0.6, 0.6, 0.7, 0.7, 0.7], 6),
        (1, None, [0.5, 0.6], 2),  # ten images resolve no less than 0.158 at 0.5
        (1, None, [0.5, 0.7, 0.7], 3),
        (2, 0.0, [0.5] * 6, 3),  # no gain is no gain
    ],
)
def test_early_stopping(patience, gain, top1, stops):
    stopping, history = EarlyStopping(patience, gain, num_images=10), [{"eval_top1": accuracy} for accuracy in top1]
    assert [stopping.is_over(history[:count]) for count in range(1, 1 + len(top1))].index(True) + 1 == stops


def test_early_stopping_counts_the_evaluations_before_a_resume(tiny, tmp_path, monkeypatch):
    settings = FEW | {"max_steps": 8, "eval_steps": 1, "save_steps": 1, "early_stopping_patience": 4}
    fake_scores(monkeypatch, [0.9, 0.1, 0.1])
    trainer = make_trainer(tiny, tmp_path, **settings)
    trainer.add_callback(At("on_save", lambda state: (_ for _ in ()).throw(KeyboardInterrupt), step=3))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    fake_scores(monkeypatch, [0.1] * 9)
    resumed = make_trainer(tiny, tmp_path, **settings)
    resumed.train(last_checkpoint(tmp_path))
    assert resumed.state.global_step == 5  # two evaluations without a gain before the kill, two after it
    assert read_best(tmp_path / "best")["step"] == 1


def test_a_run_that_stopped_early_does_no_step_on_resume(tiny, tmp_path, monkeypatch):
    settings = FEW | {"max_steps": 6, "eval_steps": 1, "save_steps": 1, "early_stopping_patience": 2}
    settings["early_stopping_min_gain"] = 0.05
    fake_scores(monkeypatch, [0.5, 0.6, 0.1, 0.1])  # a fifth evaluation would fail
    make_trainer(tiny, tmp_path, **settings).train()
    resumed = make_trainer(tiny, tmp_path, **settings)
    resumed.train(last_checkpoint(tmp_path))
    assert resumed.state.global_step == 4 and evaluated_steps(tmp_path) == [1, 2, 3, 4]


def test_a_wait_that_torch_does_not_limit_ends_too():
    """As in the middle of a batch from a worker that was stopped meanwhile."""
    reader, _ = os.pipe()
    with pytest.raises(RuntimeError, match="DataLoader timed out after 0.1 sec"), StopRequest().waiting(0.1):
        os.read(reader, 1)
    with StopRequest().waiting(1):
        pass
    assert signal.alarm(0) == 0


def test_a_signal_just_after_a_wait_arms_no_timer(monkeypatch):
    """Its handler is gone by then, and the alarm would kill the rank in the middle of a step."""
    stop, set_handler, handlers = StopRequest(stops_alone=False), signal.signal, []

    def set_late(number, handler):
        handlers.append(handler)
        if len(handlers) == 2:  # the one from before is put back
            stop._note(signal.SIGTERM, None)
        return set_handler(number, handler)

    monkeypatch.setattr(signal, "signal", set_late)
    with stop.waiting(60):
        pass
    assert len(handlers) == 2 and stop.signal == signal.SIGTERM
    assert signal.setitimer(signal.ITIMER_REAL, 0) == (0, 0)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_signal_ends_the_wait_of_one_of_several_ranks_a_little_later(when, monkeypatch):
    """Others wait for it in a collective, so it cannot save with them; a batch that comes in time still counts."""
    monkeypatch.setattr("runtime.interrupt.STOP_S", 0.2)
    reader, _ = os.pipe()
    stop = StopRequest(stops_alone=False)
    with stop.listening(), pytest.raises(KeyboardInterrupt) as raised:
        if when == "before":
            send(signal.SIGTERM)()
        with stop.waiting(60):
            if when == "meanwhile":
                send(signal.SIGTERM)()
            time.sleep(0.1)
            os.read(reader, 1)
    assert type(raised.value) is KeyboardInterrupt and raised.value.args == (signal.SIGTERM,)
