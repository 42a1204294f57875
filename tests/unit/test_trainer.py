import contextlib
import itertools
import math
import multiprocessing
import os
import re
import signal
import subprocess
import time

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback, set_seed

from config.training_config import PRESETS, TrainingConfig
from data.collator import PlantCollator
from data.dataset import ROW, PlantData
from data.streaming import Stream
from models.builder import PlantModel, set_trainable
from models.fused_layers import FusedLayer, fuse_layers, set_activation_checkpointing
from models.memory import MicroBatcher
from models.scoring import score_batch
from models.trainer import build_arguments, build_trainer
from runtime.checkpoint import last_checkpoint, read_best
from runtime.interrupt import SIGNALS, Interrupted, StopRequest
from runtime.run_dir import Run
from runtime.run_files import read_metrics
from tests.unit.test_collator import SIZES, rows_of
from utils.image_utils import ImageError
from utils.logging_utils import UserError, setup_logging

CPU = torch.device("cpu")


def rows(tiny, count=32):
    return Dataset.from_list(tiny.rows(count), features=ROW)


def make_trainer(tiny, folder, train_set=None, model=None, **settings):
    """The trainer of the tiny preset with a few steps."""
    values = (
        PRESETS["tiny"] | {"output_dir": str(folder), "max_steps": 4, "save_steps": 50, "num_workers": 0} | settings
    )
    config = TrainingConfig(**values)
    set_seed(config.seed)
    train_set = rows(tiny) if train_set is None else train_set
    collator = PlantCollator(tiny.processor, tiny.prompt, tiny.names, config.image_size)
    plant = PlantModel(model or tiny.model(), tiny.processor, tiny.prompt, collator, "no", CPU)
    data = PlantData(train_set, rows(tiny, 10), rows(tiny, 10), tiny.names, "synthetic")
    return build_trainer(Run(config), plant, data)


def make_fused(tiny, folder, **settings):
    set_seed(0)
    model = set_trainable(tiny.model(), "adapter", 4, 8, 0.0)
    fuse_layers(model.get_base_model().model.language_model.layers)
    return make_trainer(tiny, folder, model=model, **{"trainable": "adapter"} | settings)


def steps_of(folder) -> list[dict]:
    return [line for line in read_metrics(folder) if "loss" in line]


def weights(trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def same(one, other, tolerance=0.0) -> bool:
    return all(torch.allclose(a, b, rtol=0, atol=tolerance) for a, b in zip(one, other, strict=True))


# ---- micro-batches


def test_loss_and_gradients_are_equal_for_micro_batches_of_16_4_and_1(tiny, tmp_path):
    batch = tiny.native(rows_of(tiny, SIZES * 4))
    tokens = (batch["labels"] != -100).sum()
    found = {}
    for size in (16, 4, 1):
        trainer = make_trainer(tiny, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=16 // size)
        trainer.create_optimizer()
        loss = trainer.training_step(trainer.model, batch, tokens)
        found[size] = loss.item(), [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
    whole = tiny.model()(**batch.split(16)[0])
    assert found[16][0] == pytest.approx(whole.loss.item(), abs=1e-6)
    for size in (4, 1):
        assert found[size][0] == pytest.approx(found[16][0], abs=1e-5)
        assert same(found[size][1], found[16][1], 1e-5)


def test_weights_after_a_run_do_not_depend_on_the_micro_batch(tiny, tmp_path):
    ends = []
    for size in (16, 2):
        trainer = make_trainer(
            tiny, tmp_path / str(size), per_device_train_batch_size=size, gradient_accumulation_steps=16 // size
        )
        trainer.train()
        ends.append([step["loss"] for step in steps_of(tmp_path / str(size))])
    assert ends[0] == pytest.approx(ends[1], abs=1e-4)


def test_to_transformers_a_batch_is_the_whole_step():
    config = TrainingConfig(output_dir="runs/x")
    arguments = build_arguments(config, "no", CPU, 0)
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (16, 1)
    assert arguments.logging_nan_inf_filter is False and arguments.remove_unused_columns is False


def test_every_setting_of_the_optimizer_reaches_it(tmp_path):
    config = TrainingConfig(
        output_dir=str(tmp_path), lr_scheduler_type="linear", warmup_steps=7, weight_decay=0.3, max_grad_norm=0.25,
        optim="sgd", learning_rate=3e-4, seed=9, save_steps=11, save_total_limit=3, logging_steps=4, eval_steps=6,
    )  # fmt: skip
    arguments = build_arguments(config, "bf16", CPU, 0)
    names = ("warmup_steps", "weight_decay", "max_grad_norm", "learning_rate", "seed", "save_steps")
    assert [getattr(arguments, name) for name in names] == [getattr(config, name) for name in names]
    assert (arguments.lr_scheduler_type, arguments.optim, arguments.bf16, arguments.fp16) == (
        "linear",
        "sgd",
        True,
        False,
    )
    assert (arguments.logging_steps, arguments.eval_steps) == (4, 6)


def test_as_many_checkpoints_are_kept_as_configured(tiny, tmp_path):
    make_trainer(tiny, tmp_path, save_steps=1, save_total_limit=3).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (2, 3, 4)]


def test_several_cards_in_sight_change_nothing(tmp_path, monkeypatch):
    two_cards = property(lambda self: setattr(self, "_n_gpu", 2) or CPU)
    monkeypatch.setattr("transformers.TrainingArguments._setup_devices", two_cards)
    arguments = build_arguments(TrainingConfig(output_dir=str(tmp_path)), "no", CPU, 0)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == 16


def test_more_processes_than_photos_of_a_step(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "17")
    with pytest.raises(UserError, match="global batch size 16: fewer images than the 17 ranks"):
        build_arguments(TrainingConfig(output_dir="runs/x"), "no", CPU, 0)


def test_photos_of_a_stream_reach_the_device(tiny, tmp_path):
    """As those of other sources, which accelerate takes there. The device meta stands for a card."""
    file = tmp_path / "train.parquet"
    rows(tiny).to_parquet(file)
    trainer = make_trainer(tiny, tmp_path / "run", train_set=Stream([file], seed=1), streaming=True)
    trainer.args.__dict__["_setup_devices"] = torch.device("meta")
    batch = next(iter(trainer.get_train_dataloader()))
    assert {value.device.type for value in batch.values() if isinstance(value, torch.Tensor)} == {"meta"}


# ---- what stops a step


class Break(TrainerCallback):
    """Does something at the beginning of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.action(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_value_that_is_not_finite_stops_before_the_weights_move(value, tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path)
    seen = {}

    def poison(model):
        with torch.no_grad():
            model.lm_head.weight[5] = value
        seen["before"] = weights(trainer)

    trainer.add_callback(Break(3, poison))
    with pytest.raises(
        UserError, match=r"step 3: loss (nan|inf).*the weights were not updated in this step.*samples: test-000\d\d"
    ) as stopped:
        trainer.train()
    assert len(re.findall(r"test-000\d\d", str(stopped.value))) == 16
    assert all(
        torch.equal(a, b)
        for a, b in zip(map(torch.nan_to_num, seen["before"]), map(torch.nan_to_num, weights(trainer)))
    )
    assert [step["step"] for step in steps_of(tmp_path)] == [1, 2]


def test_a_gradient_that_is_not_finite_stops_too(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path)
    hook = {}

    def poison(model):
        hook["of"] = model.lm_head.weight.register_hook(lambda gradient: gradient * float("nan"))

    trainer.add_callback(Break(2, poison))
    with pytest.raises(UserError, match=r"step 2: loss \d.*, gradient norm nan"):
        trainer.train()


def test_with_a_loss_scaler_an_overflow_is_a_skipped_step_until_no_scale_helps(tiny, tmp_path, capsys):
    setup_logging()
    trainer = make_trainer(tiny, tmp_path)
    trainer.step_metrics = {"step": 7}

    class Scaler:
        scale = 65536.0

        def get_scale(self):
            return self.scale

    trainer.accelerator.scaler = Scaler()
    trainer.handle_non_finite_step(2.0, math.inf, "a, b")
    assert trainer.step_metrics["skipped"] == "overflow"
    assert (
        "warning: step 7: gradient overflow at loss scale 65536; the loss scaler skips the step"
        in capsys.readouterr().out
    )
    Scaler.scale = 1.0
    with pytest.raises(UserError, match="step 7"):
        trainer.handle_non_finite_step(2.0, math.inf, "a, b")
    Scaler.scale = 65536.0
    with pytest.raises(UserError, match="loss nan"):
        trainer.handle_non_finite_step(math.nan, 1.0, "a, b")


class Poison(TrainerCallback):
    """The loss of these steps is not a number, and then the model is as it was."""

    def __init__(self, model, steps):
        self.steps, self.now = steps, False
        model.lm_head.register_forward_hook(lambda *args: args[-1] * float("nan") if self.now else None)

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step + 1 in self.steps


def test_a_poisoned_step_is_skipped_counted_and_leaves_no_trace(tiny, tmp_path, capsys):
    setup_logging()
    trainer = make_trainer(tiny, tmp_path, max_skipped_steps=1, weight_decay=0.1, max_steps=6, logging_steps=1)
    seen = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            moments = [value.clone() for one in trainer.optimizer.state.values() for value in one.values()]
            seen[state.global_step] = weights(trainer) + moments

    trainer.add_callback(Poison(trainer.model, {3, 5}))
    trainer.add_callback(Watch())
    trainer.train()
    assert same(seen[2], seen[3]) and same(seen[4], seen[5])
    assert not same(seen[1], seen[2]) and not same(seen[3], seen[4]) and not same(seen[5], seen[6])
    lines = steps_of(tmp_path)
    assert [line["step"] for line in lines if line.get("skipped") == "not finite"] == [3, 5] and len(lines) == 6
    assert all((line["loss"] is None) == ("skipped" in line) for line in lines)
    told = capsys.readouterr().out
    assert "step 3: loss nan, gradient norm nan; the step is skipped (samples: test-000" in told
    assert "step 3/6 | loss skipped |" in told and "2 of 6 steps were skipped (2 not finite)" in told
    assert math.isfinite(trainer.state.log_history[-2]["train_loss"])


def test_poisoned_steps_in_a_row_stop_the_run_with_all_their_samples(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, max_skipped_steps=2, save_steps=2, max_steps=8)
    trainer.add_callback(Poison(trainer.model, {1, 3, 4, 5}))
    with pytest.raises(
        UserError, match="step 5: loss nan.*the weights were not updated in the last 3 steps"
    ) as stopped:
        trainer.train()
    assert len(re.findall(r"test-000\d\d", str(stopped.value))) == 48
    assert last_checkpoint(tmp_path).name == "checkpoint-4"  # its weights are those of step 2


# ---- signals


class Signal(TrainerCallback):
    """A signal to this process at one event of one step; it is noted, and the run goes on to the next safe place."""

    def __init__(self, event, step, number=signal.SIGINT):
        self.step, self.number = step, number
        setattr(self, event, self.send)

    def send(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), self.number)


def interrupted(tiny, folder, caller, **settings):
    """A trainer that was interrupted, and the one that goes on from what it saved to the end."""
    handlers = [signal.getsignal(number) for number in SIGNALS]
    trainer = make_trainer(tiny, folder, model=with_dropout(tiny), **settings)
    caller(trainer)
    with pytest.raises(Interrupted):
        trainer.train()
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
    again = make_trainer(tiny, folder, model=with_dropout(tiny), **settings)
    again.train(last_checkpoint(folder))
    return trainer, again


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("event", "step", "saved"),
    [("on_step_begin", 1, 1), ("on_step_begin", 2, 2), ("on_step_end", 2, 2), ("on_step_end", 3, 3)],
)
def test_a_signal_saves_the_last_whole_step_and_the_run_ends_as_if_undisturbed(
    number, event, step, saved, tiny, tmp_path
):
    settings = {"max_steps": 5, "eval_steps": 3, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    undisturbed = make_trainer(tiny, tmp_path / "a", model=with_dropout(tiny), **settings)
    undisturbed.train()
    trainer, again = interrupted(
        tiny, tmp_path / "b", lambda trainer: trainer.add_callback(Signal(event, step, number)), **settings
    )
    assert trainer.state.global_step == saved and again.state.global_step == 5
    assert same(weights(undisturbed), weights(again))
    one, other = [
        [(line["step"], line.get("loss"), line.get("eval_loss")) for line in read_metrics(tmp_path / name)]
        for name in "ab"
    ]
    assert one == other and len(one) == 7


def test_a_signal_inside_a_step_between_two_forward_passes(tiny, tmp_path):
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    undisturbed = make_trainer(tiny, tmp_path / "a", model=with_dropout(tiny), **settings)
    undisturbed.train()

    def call(trainer):
        counted = itertools.count()
        trainer.model.register_forward_hook(
            lambda *args: os.kill(os.getpid(), signal.SIGTERM) if next(counted) == 9 else None
        )

    trainer, again = interrupted(tiny, tmp_path / "b", call, **settings)
    assert trainer.state.global_step == 2 and same(weights(undisturbed), weights(again))


def test_a_signal_before_the_first_step_is_done_leaves_nothing_to_save(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path)
    trainer.add_callback(Signal("on_step_begin", 0))
    with pytest.raises(Interrupted):
        trainer.train()
    assert last_checkpoint(tmp_path) is None


@pytest.mark.parametrize("every", [None, 2])
def test_a_signal_in_an_evaluation_that_is_interrupted_again_leaves_one_line_of_it(every, tiny, tmp_path, monkeypatch):
    """Stopped between step 4 and its evaluation, twice; then the run ends, with each evaluation once."""
    settings = {"max_steps": 4, "eval_steps": every, "save_steps": 2}
    trainer = make_trainer(tiny, tmp_path, **settings)
    trainer.add_callback(Signal("on_step_end", 4 if every is None else 2))
    with pytest.raises(Interrupted):
        trainer.train()
        trainer.evaluate_if_needed()
    checkpoint = last_checkpoint(tmp_path)
    before = (checkpoint / "trainer_state.json").read_bytes()
    for last in (False, True):
        again = make_trainer(tiny, tmp_path, **settings)
        if not last:
            again.add_callback(Signal("on_evaluate", again.state.global_step or (4 if every is None else 2)))
            with contextlib.suppress(Interrupted, KeyboardInterrupt):
                again.train(checkpoint)
                again.evaluate_if_needed()
            assert (checkpoint / "trainer_state.json").read_bytes() == before  # a good checkpoint is not written to
            continue
        again.train(checkpoint)
        again.evaluate_if_needed()
    evaluated = [line["step"] for line in read_metrics(tmp_path) if "eval_loss" in line]
    assert evaluated == ([4] if every is None else [2, 4])
    assert [entry["step"] for entry in again.state.log_history if "eval_loss" in entry] == evaluated


def test_a_signal_after_the_last_step_ends_the_run_too(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, eval_steps=None)
    trainer.add_callback(Signal("on_save", 4))
    with pytest.raises(Interrupted):
        trainer.train()
    assert last_checkpoint(tmp_path).name == "checkpoint-4"


def test_a_signal_is_noted_though_nobody_reads_and_its_double_is_no_second_one(monkeypatch):
    def closed(*args):
        raise BrokenPipeError

    monkeypatch.setattr("runtime.interrupt.os.write", closed)
    stop = StopRequest()
    with stop.listening():
        for _ in range(2):  # to the process, and to its group
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            stop.check()


def test_workers_let_their_parent_decide(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, num_workers=1, per_device_train_batch_size=2)
    batches = iter(trainer.get_train_dataloader())
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in SIGNALS:
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)  # not its parent
    time.sleep(0.3)
    assert worker.is_alive() and len(next(batches).samples) == 2
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0


def test_a_batch_that_lost_image_tokens_on_its_way_stops_before_the_weights_move(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path)
    before = weights(trainer)
    collate = trainer.data_collator

    def lose_one(some):
        batch = collate(some)
        batch["image_tokens"][3] -= 1
        return batch

    trainer.data_collator = lose_one
    with pytest.raises(UserError, match=r"step 1: the number of image tokens of 1 samples changed.*not updated"):
        trainer.train()
    assert same(before, weights(trainer))


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
def test_a_batch_of_another_shape_is_refused_at_the_door(name, change, tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path)
    batch = tiny.collator(tiny.rows(4))
    batch[name] = change(batch[name])
    with pytest.raises(UserError, match=name):
        trainer.training_step(trainer.model, batch, 12)


def test_bad_photos_are_counted_named_and_above_a_share_an_error(tiny, tmp_path, capsys):
    setup_logging()
    drawn = [row | {"image": {"bytes": b"not an image", "path": f"{row['id']}.jpg"}} if index in (3, 9) else row
             for index, row in enumerate(tiny.rows(32))]  # fmt: skip
    train_set = Dataset.from_list(drawn, features=ROW)
    trainer = make_trainer(tiny, tmp_path / "few", train_set, max_unreadable_fraction=0.1)
    trainer.train()
    told = capsys.readouterr().out
    assert told.count("image skipped") == 2 and "(2 of train so far)" in told and "00003.jpg: is not an image" in told
    assert sum(step["images"] for step in steps_of(tmp_path / "few")) == 60
    with pytest.raises(ImageError, match=r"\d of 32 images cannot be opened, above max_unreadable_fraction=0.01"):
        make_trainer(tiny, tmp_path / "many", train_set).train()


# ---- out of memory


class Cramped(TrainerCallback):
    """Forwards of more than `room` images run out of memory after drawing random numbers; the first `spared` do not."""

    def __init__(self, model, room, spared=0):
        self.calls = 0

        def refuse(module, args, kwargs):
            self.calls += 1
            if len(kwargs["input_ids"]) > room and self.calls > spared:
                torch.rand(7)
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")

        model.register_forward_pre_hook(refuse, with_kwargs=True)


def with_dropout(tiny):
    model = tiny.model()
    model.model.vision_tower.encoder.layers[0].self_attn.dropout = 0.2
    return model


def test_out_of_memory_redoes_the_same_step_in_smaller_pieces(tiny, tmp_path, capsys):
    setup_logging()
    undisturbed = make_trainer(
        tiny, tmp_path / "a", model=with_dropout(tiny), per_device_train_batch_size=4, gradient_accumulation_steps=4
    )
    undisturbed.train()
    model = with_dropout(tiny)
    cramped = make_trainer(
        tiny, tmp_path / "b", model=model, per_device_train_batch_size=8, gradient_accumulation_steps=2
    )
    Cramped(model, room=5, spared=1)  # the first of two pieces has left its gradients
    cramped.train()
    assert "step 1: out of memory; from here on retrying with micro-batch 4" in capsys.readouterr().out
    assert cramped.micro_batch_size == 4 and cramped.state.global_step == 4
    assert same(weights(undisturbed), weights(cramped))


def test_out_of_memory_with_one_photo_is_told(tiny, tmp_path):
    model = tiny.model()
    trainer = make_trainer(tiny, tmp_path, model=model)
    Cramped(model, room=0)
    with pytest.raises(UserError, match="step 1: out of memory with micro-batch 1; use --gradient"):
        trainer.train()


def test_other_errors_of_the_forward_are_not_taken_for_it(tiny, tmp_path):
    model = tiny.model()
    model.register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(RuntimeError("shapes differ")))
    with pytest.raises(RuntimeError, match="shapes differ"):
        make_trainer(tiny, tmp_path, model=model).train()


def test_with_one_photo_layers_stop_keeping_before_the_run_stops(tiny, tmp_path, capsys, on_a_gpu):
    setup_logging()
    trainer = make_fused(tiny, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=16)
    set_activation_checkpointing(trainer.fused, 3)
    real = FusedLayer.run

    def refuse(self, *args, keep=True, needs_output=True, **kwargs):
        if keep and needs_output:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return real(self, *args, keep=keep, needs_output=needs_output, **kwargs)

    on_a_gpu.setattr(FusedLayer, "run", refuse)
    trainer.train()
    told = "retrying with micro-batch 1, activation checkpointing in all layers, offloaded to the CPU"
    assert told in capsys.readouterr().out
    assert trainer.state.global_step == 4 and all(one.offload for one in trainer.fused)


def test_with_one_photo_that_is_recomputed_its_inputs_leave_the_card_next(tiny, tmp_path, on_a_gpu):
    trainer = make_fused(tiny, tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=16)
    set_activation_checkpointing(trainer.fused, 0)
    full = torch.OutOfMemoryError("CUDA out of memory.")
    trainer.halve_micro_batch(full)
    assert trainer.micro_batch_size == 1 and all(one.offload for one in trainer.fused)
    with pytest.raises(UserError, match="use --gradient-checkpointing offload, --load-in-4bit true"):
        trainer.halve_micro_batch(full)


def test_out_of_memory_in_an_evaluation_goes_on_in_smaller_pieces(tiny, tmp_path, capsys):
    setup_logging()
    expected = make_trainer(tiny, tmp_path / "a", per_device_eval_batch_size=10).evaluate()
    model = tiny.model()
    trainer = make_trainer(tiny, tmp_path / "b", model=model, per_device_eval_batch_size=10)
    Cramped(model.model, room=3)
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)
    assert trainer.eval_micro_batch.size == 2
    assert "out of memory while scoring; retrying with micro-batch 2" in capsys.readouterr().out


# ---- evaluation


def test_eval_loss_is_the_exact_token_mean_whatever_the_batch_size(tiny, tmp_path):
    losses = [
        make_trainer(tiny, tmp_path, per_device_eval_batch_size=size).evaluate()["eval_loss"] for size in (1, 4, 10)
    ]
    piece = tiny.collator(tiny.rows(10)).split(10)[0]
    with torch.no_grad():
        expected = tiny.model().eval()(**piece).loss.item()
    assert losses == pytest.approx([expected] * 3, abs=1e-5)


def test_evaluating_does_not_change_the_training(tiny, tmp_path):
    ends = []
    for name, every in (("without", None), ("with", 1)):
        trainer = make_trainer(tiny, tmp_path / name, model=with_dropout(tiny), eval_steps=every, num_workers=1)
        trainer.train()
        ends.append(weights(trainer))
    assert same(*ends)
    assert sum("eval_loss" in line for line in read_metrics(tmp_path / "with")) == 4


# ---- optimizer and steps


def test_a_paged_state_that_was_read_back_is_not_taken_for_paged(tiny, tmp_path):
    """bitsandbytes' mark is written with the tensor, and is true only of memory that it allocated itself."""
    trainer = make_trainer(tiny, tmp_path, max_steps=2, save_steps=1)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    saved = torch.load(checkpoint / "optimizer.pt")
    for state in saved["state"].values():
        state["exp_avg"].is_paged = True
    torch.save(saved, checkpoint / "optimizer.pt")
    assert torch.load(checkpoint / "optimizer.pt")["state"][0]["exp_avg"].is_paged  # the mark is read back
    trainer._load_optimizer_and_scheduler(str(checkpoint))
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


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"max_steps": 7}, 7), ({"max_steps": -1, "num_train_epochs": 1.5}, 3), ({"max_steps": -1}, 6)],
)
def test_planned_steps_are_the_steps_done(settings, steps, tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path, **settings)
    assert trainer.planned_steps() == steps
    trainer.train()
    assert trainer.state.global_step == steps


def test_reports_go_where_they_were_asked_to(tmp_path):
    config = TrainingConfig(output_dir=str(tmp_path), report_to="tensorboard,wandb")
    assert build_arguments(config, "no", CPU, 0).report_to == ["tensorboard", "wandb"]


# ---- the best checkpoint, and stopping early


def fake_scores(monkeypatch, top1: list[float], losses: list[float] | None = None):
    """Evaluations come out as told, whatever the weights are."""
    told = iter(zip(top1, losses or [1.0] * len(top1)))

    def measured(self, eval_dataset=None):
        name, loss = next(told)
        return {"loss": loss, "top1": name, "top5": 1.0, "unreadable_images": 0}

    monkeypatch.setattr("models.trainer.PlantTrainer.score_validation", measured)


@pytest.mark.parametrize(
    ("top1", "losses", "best"),
    [([0.5, 0.7, 0.6], [3, 2, 1], 2), ([0.7, 0.7, 0.7], [3, 1, 2], 2), ([0.2, 0.1, 0.2], [1, 1, 1], 1)],
)
def test_best_is_what_names_best_and_among_equals_loses_least(tiny, tmp_path, monkeypatch, top1, losses, best):
    fake_scores(monkeypatch, top1, losses)
    trainer = make_trainer(tiny, tmp_path, max_steps=3, eval_steps=1)
    kept = {}

    class Keep(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            kept[state.global_step] = weights(trainer)

    trainer.add_callback(Keep())
    trainer.train()
    trainer.load_best()
    assert read_best(tmp_path / "best")["step"] == best
    assert same(weights(trainer), kept[best]) and not same(kept[1], kept[3])


@pytest.mark.parametrize(
    ("patience", "gain", "top1", "stops"),
    [
        (2, 0.05, [0.5, 0.6, 0.62, 0.64, 0.7], 4),  # each rise is measured against the last one that counted
        (2, 0.05, [0.5, 0.6, 0.6, 0.7, 0.7, 0.7], 6),
        (1, None, [0.5, 0.6], 2),  # ten images resolve no less than 0.158 at 0.5
        (1, None, [0.5, 0.7, 0.7], 3),
        (2, 0.0, [0.5] * 6, 3),  # no gain is no gain
    ],
)
def test_early_stopping(tiny, tmp_path, monkeypatch, patience, gain, top1, stops):
    fake_scores(monkeypatch, top1)
    settings = {"early_stopping_patience": patience, "early_stopping_min_gain": gain}
    trainer = make_trainer(tiny, tmp_path, max_steps=6, eval_steps=1, **settings)
    trainer.train()
    assert trainer.state.global_step == stops


def test_early_stopping_survives_a_resume(tiny, tmp_path, monkeypatch):
    settings = {"max_steps": 8, "eval_steps": 1, "save_steps": 1, "early_stopping_patience": 4}
    fake_scores(monkeypatch, [0.9, 0.1, 0.1])
    trainer = make_trainer(tiny, tmp_path, **settings)

    class Kill(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    trainer.add_callback(Kill())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    fake_scores(monkeypatch, [0.1] * 9)
    again = make_trainer(tiny, tmp_path, **settings)
    again.train(last_checkpoint(tmp_path))
    assert again.state.global_step == 5  # two evaluations waited before the kill and two after it
    assert read_best(tmp_path / "best")["step"] == 1


def test_a_run_that_was_killed_after_it_stopped_is_over(tiny, tmp_path, monkeypatch):
    settings = {"max_steps": 6, "eval_steps": 1, "save_steps": 1, "early_stopping_patience": 2}
    fake_scores(monkeypatch, [0.9, 0.1, 0.1])
    make_trainer(tiny, tmp_path, **settings).train()
    again = make_trainer(tiny, tmp_path, **settings)
    again.train(last_checkpoint(tmp_path))  # a fourth evaluation would have nothing to tell
    again.evaluate_if_needed()
    assert again.state.global_step == 3 and len([x for x in read_metrics(tmp_path) if "eval_top1" in x]) == 3


def test_top1_of_the_training_is_that_of_the_scores(tiny, tmp_path):
    trainer = make_trainer(tiny, tmp_path)
    metrics = trainer.evaluate()
    scores = score_batch(tiny.model().eval(), tiny.collator(tiny.rows(10)), trainer.tries, MicroBatcher(10))
    truth = [sample.label for sample in tiny.collator(tiny.rows(10)).samples]
    assert metrics["eval_top1"] == sum(a == b for a, b in zip(scores.argmax(dim=1).tolist(), truth)) / 10


def test_bad_photos_of_val_are_named_and_capped(tiny, tmp_path, capsys):
    setup_logging()
    drawn = tiny.rows(10)
    drawn[9] = drawn[9] | {"image": {"bytes": b"", "path": "gone.jpg"}}
    some = Dataset.from_list(drawn, features=ROW)
    trainer = make_trainer(tiny, tmp_path, max_unreadable_fraction=0.2, per_device_eval_batch_size=1)
    trainer.eval_dataset = some
    assert trainer.evaluate()["eval_unreadable_images"] == 1
    assert "image skipped (1 of val so far): test-00009: gone.jpg: is empty" in capsys.readouterr().out
    capped = make_trainer(tiny, tmp_path, max_unreadable_fraction=0.05)
    capped.eval_dataset = some
    with pytest.raises(
        ImageError, match="1 of 10 images cannot be opened, above max_unreadable_fraction=0.05 .test-00009"
    ):
        capped.evaluate()


def test_the_logged_rate_is_that_of_what_learns(tiny, tmp_path):
    model = set_trainable(tiny.model(), "projector", 2, 4, 0.0)
    settings = {"trainable": "projector", "projector_learning_rate": 1e-3, "warmup_steps": 0.0, "eval_steps": None}
    trainer = make_trainer(tiny, tmp_path, model=model, lr_scheduler_type="constant_with_warmup", **settings)
    trainer.train()
    assert {line["learning_rate"] for line in read_metrics(tmp_path) if "loss" in line} == {1e-3}
