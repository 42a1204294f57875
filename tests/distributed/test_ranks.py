"""Several ranks on this machine compute what a single one computes, and end together."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch.utils.data import BatchSampler, SequentialSampler

import evaluate
import export
import train
from config.cli import parse_config
from config.training_config import TrainingConfig
from data.dataset import build_datasets, take
from runtime import distributed
from runtime.distributed import ShardedBatchSampler, shard_by_length
from runtime.run_files import ANY, load_config, read_entries, read_metrics
from runtime.watchdog import Watchdog
from tests.conftest import ROOT
from tests.distributed.launch import (
    RUN,
    SPLIT_SIZES,
    TIMEOUT_S,
    Launch,
    at_step,
    copy_run,
    free_port,
    no_process_is_left,
    run,
    signal_at,
    wait_for_step,
)
from utils.logging_utils import UserError

REPRODUCED = "run/best reloaded into a fresh base model | scores of 4 images reproduced"


@pytest.fixture(autouse=True)
def processes_end():
    with no_process_is_left():
        yield


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The run of a single rank."""
    folder = tmp_path_factory.mktemp("single")
    assert run(folder, ranks=1)[0] == [0]
    return folder / "run"


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, checkpoint):
    """(arguments of a run with a 4-bit base and an adapter, the run of a single rank)."""
    folder = tmp_path_factory.mktemp("quantized")
    argv = [*RUN, "--model", checkpoint(), "--load-in-4bit", "true", "--trainable", "adapter"]
    assert run(folder, argv, ranks=1)[0] == [0]
    return argv, folder / "run"


@pytest.fixture
def scored(here, single):
    """The working folder with the run of a single rank in it."""
    copy_run(single, here)
    return here


def steps_of(run_folder) -> dict[int, dict]:
    return {line["step"]: line for line in read_metrics(run_folder) if "loss" in line}


def assert_same_run(run_folder, expected_folder) -> None:
    """Loss and gradient norm of every step equal to 1e-5, and the evaluations."""
    found, expected = steps_of(run_folder), steps_of(expected_folder)
    assert list(found) == list(expected) == list(range(1, 21))
    for step, line in expected.items():
        assert found[step]["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert found[step]["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-5)
        assert (found[step]["images"], found[step]["image_tokens"]) == (line["images"], line["image_tokens"])
    folders = (run_folder, expected_folder)
    pairs = [[line for line in read_metrics(folder) if "eval_loss" in line] for folder in folders]
    for line, expected_line in zip(*pairs, strict=True):
        assert line["eval_loss"] == pytest.approx(expected_line["eval_loss"], rel=1e-5)
        assert (line["eval_top1"], line["eval_top5"]) == (expected_line["eval_top1"], expected_line["eval_top5"])


# ---- started by torchrun

SMALL_TRAIN = f"""
import os, signal, sys
import train
from data import dataset
from models.trainer import PlantTrainer

dataset.SPLIT_SIZES.update({SPLIT_SIZES})
forward_backward = PlantTrainer.forward_backward

def stop_at(self, *args):
    if os.environ["RANK"] == "0" and self.state.global_step + 1 == int(os.environ["STOP_AT"]):
        os.kill(os.getppid(), signal.SIGTERM)  # the launcher, which passes it on
    return forward_backward(self, *args)

PlantTrainer.forward_backward = stop_at
sys.exit(train.main())
"""


def torchrun(folder: Path, *flags: str, stop_at: int = 0) -> subprocess.Popen:
    script = folder / "small_train.py"
    script.write_text(SMALL_TRAIN)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "STOP_AT": str(stop_at)}
    command = [sys.executable, "-m", "torch.distributed.run", *flags, str(script), *RUN]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **pipes)


def test_torchrun_stops_and_resumes_and_the_run_is_that_of_a_single_rank(here, single):
    flags = ("--standalone", "--nproc-per-node", "2")
    process = torchrun(here, *flags, stop_at=7)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode != 0 and "saved | run/checkpoint-" in output, output
    assert not re.search(r"^(critical|error): ", output, re.MULTILINE), output
    process = torchrun(here, *flags)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0 and "resuming from run/checkpoint-" in output, output
    assert_same_run(here / "run", single)
    log = (here / "run" / "train.log").read_text()
    assert log.count("| 2 x cpu") == 2 and log.count("step 20/20") == 1  # rank 0 alone writes it
    manifest = json.loads((here / "run" / "checkpoint-20" / "manifest.json").read_text())
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(manifest)
    assert load_config(here / "run")[1]["ranks"] == 2
    statuses, output = run(here, [*RUN, "--max-steps", "25"], ranks=1)
    assert statuses == [1] and "cannot resume, the number of ranks (2 -> 1) changed" in output


def test_torchrun_on_two_machines_ends_where_one_of_them_is_lost(here):
    """The first one, with its launcher and the store."""
    place = ("--master-addr", "127.0.0.1", "--master-port", str(free_port()), "--nnodes", "2", "--nproc-per-node", "1")
    nodes = [torchrun(here, *place, "--rdzv-conf", "timeout=60", "--node-rank", rank) for rank in "01"]
    wait_for_step(here / "run", 5)
    lost = psutil.Process(nodes[0].pid)
    for process in [lost, *lost.children(recursive=True)]:
        process.kill()
    nodes[0].communicate()
    output, _ = nodes[1].communicate(timeout=TIMEOUT_S)
    assert nodes[1].returncode != 0 and "critical" not in output, output
    assert "error: rank 1: the store that connects the ranks is gone" in output


# ---- training through faults


def test_killed_ranks_end_all_and_the_run_resumes(here, single):
    lost = "lost the connection to another rank: killed"
    for step, victim, message, options in (
        (7, 1, f"error: {lost}", {"has_launcher": True}),
        (12, 0, f"error: rank 1: {lost}", {"has_launcher": True, "machines": 2}),
        (17, 0, "error: rank 1: the store that connects the ranks is gone", {"machines": 2}),
    ):
        fault = functools.partial(signal_at, step, victim, signal.SIGKILL)
        statuses, output = run(here, fault=fault, **options)
        assert statuses[victim] == -signal.SIGKILL and statuses[1 - victim] == 1, output
        assert message in output and "critical" not in output, output
    statuses, output = run(here, machines=2)
    assert statuses == [0, 0] and "resuming from run/checkpoint-15" in output, output
    assert_same_run(here / "run", single)


def stop_in_an_evaluation(rank: int, saves_slowly: bool = False) -> None:
    """SIGTERM to rank 0 alone."""
    from models import builder, trainer

    write_manifest, score_batch = trainer.write_manifest, builder.score_batch

    def write_slowly(folder):
        time.sleep(2)
        write_manifest(folder)

    def stopped(*args):
        if rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return score_batch(*args)

    builder.score_batch = stopped
    if saves_slowly:
        trainer.write_manifest = write_slowly


def run_out_of_memory(rank: int) -> None:
    def raise_with_large_micro_batch(trainer, loss):  # its gradients are there already
        if rank == 1 and trainer.micro_batcher.size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return loss

    at_step(14, raise_with_large_micro_batch)


def test_a_stop_in_an_evaluation_and_out_of_memory_of_a_rank_change_nothing(here, single):
    """Ranks wait for a slow save; the interrupted evaluation is backfilled; a rank retries its micro-batches alone."""
    fault = functools.partial(stop_in_an_evaluation, saves_slowly=True)
    statuses, output = run(here, [*RUN, "--per-device-eval-batch-size", "2"], fault=fault)
    assert all(statuses) and "saved | run/checkpoint-10" in output and "critical" not in output, output
    assert (here / "run/checkpoint-10/manifest.json").exists()
    statuses, output = run(here, fault=run_out_of_memory)
    assert statuses == [0, 0] and "resuming from run/checkpoint-10" in output, output
    assert "warning: rank 1: step 14: out of memory; from here on retrying with" in output
    assert_same_run(here / "run", single)
    assert [line["step"] for line in read_metrics(here / "run") if "eval_loss" in line] == [10, 20]


def make_a_loss_nan(rank: int) -> None:
    at_step(3, lambda trainer, loss: loss * math.nan if rank == 1 else loss)


def test_all_ranks_decide_alike_on_what_a_single_one_meets(here, image_folder):
    """A loss that is NaN on a rank, unreadable images, an adapter, workers, early stopping."""
    root = image_folder({"oak": 30, "ash": 30})
    for number in range(4):
        (root / "ash" / f"{number}.png").write_bytes(b"broken")
    argv = ["--preset", "tiny", "--trainable", "adapter", "--dataset", str(root), "--max-bad-fraction", "0.5"]
    argv += ["--max-skipped-steps", "1", "--num-workers", "1", "--max-steps", "60", "--eval-steps", "3"]
    argv += ["--early-stopping-patience", "2", "--early-stopping-min-gain", "0.9", "--output-dir", "run"]
    statuses, output = run(here, argv, fault=make_a_loss_nan)
    steps = steps_of(here / "run")
    assert statuses == [0, 0] and "early stopping" in output and len(steps) == 9, output
    assert [step for step, line in steps.items() if line.get("skipped")] == [3]
    skipped = re.findall(r"warning: image skipped \(\d+ of (train|val) so far\): (\S+):", output)
    assert len(skipped) == len(set(skipped))  # each was logged once
    in_report = set(re.findall(r"warning: unreadable image skipped: (\S+):", output))
    data = build_datasets(parse_config(argv))
    read = {*data.train["id"], *data.validation["id"]}
    assert {image for _, image in skipped} | in_report == read & {f"ash/{number}.png" for number in range(4)} != set()


def fail_at_step_7(rank: int) -> None:
    def fail(trainer, loss):
        if rank == 1:
            raise UserError("step 7: broken on purpose")
        return loss

    at_step(7, fail)


def test_an_error_of_a_rank_ends_all_with_its_message(here):
    began = time.monotonic()
    statuses, output = run(here, fault=fail_at_step_7)
    assert all(statuses) and output.count("error: rank 1: step 7: broken on purpose") == 1, output
    assert "Connection closed" not in output and time.monotonic() - began < 90
    assert "rank 1: UserError: step 7: broken on purpose" in (here / "run" / "train.log").read_text()
    assert max(steps_of(here / "run")) == 6


def stall(rank: int, victim: int | None) -> None:
    from runtime import watchdog

    watchdog.STALLED_S = 2
    if victim is not None:
        signal_at(3, victim, signal.SIGSTOP, rank)


STALLS = [
    (1, "error: rank 1 sent no heartbeat for 2 s. Check its machine and the network"),
    (0, "error: rank 1: rank 0 sent no heartbeat for 2 s. Check its machine and the network"),
    (None, "the store that connects the ranks did not answer for 2 s. Check the first machine"),
]


@pytest.mark.parametrize(("victim", "message"), STALLS, ids=["rank 1", "rank 0", "launcher"])
def test_a_rank_or_launcher_that_stalls_ends_all(victim, message, here):
    """As when its machine or its network is lost: no connection is closed."""
    argv = [*RUN, "--max-steps", "2000", "--eval-steps", "none", "--save-steps", "1000"]
    launch = Launch(here, [argv] * 2, fault=functools.partial(stall, victim=victim), has_launcher=True)
    stalled = launch.launcher if victim is None else launch.ranks[victim]
    if victim is None:
        wait_for_step(here / "run", 2)
        os.kill(stalled.pid, signal.SIGSTOP)
    for process in launch.ranks:
        if process is not stalled:
            process.join(60)
            assert process.exitcode == 1, launch.output
    os.kill(stalled.pid, signal.SIGCONT)
    statuses, output = launch.end()
    assert all(statuses) and message in output, output


# ---- machines that differ


def test_machines_with_other_settings_are_an_error(here):
    statuses, output = Launch(here, [RUN, [*RUN, "--seed", "7", "--output-dir", "other"]], machines=2).end()
    assert all(statuses) and "rank 1: UserError: settings differ" in output, output
    assert "error: rank 1: settings differ from rank 0: output_dir=other, not run; seed=7, not 42" in output
    assert not (here / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("there", "is_same"),
    [("/disk/plants", True), ("plants", True), ("/here/others", False), ("oxford_flowers102", False)],
)
@pytest.mark.parametrize("name", ["dataset", "class_names", "taxonomy"])
def test_paths_may_differ_between_machines(name, there, is_same):
    config = TrainingConfig(**{name: "/here/plants"})
    dist = SimpleNamespace(broadcast_object=lambda mine: mine | {name: there}, gather_object=lambda items: items)
    with contextlib.nullcontext() if is_same else pytest.raises(UserError, match=f"{name}=/here/plants, not"):
        distributed.assert_same_across_ranks(dataclasses.asdict(config), dist)


def have_other_weights(rank: int) -> None:
    from runtime import checkpoint

    if rank == 1:
        checkpoint._describe_manifest = lambda folder: "manifest 0"


def test_a_machine_with_other_weights_is_an_error(scored):
    statuses, output = run(scored, ["run"], "evaluate", fault=have_other_weights)
    assert all(statuses), output
    assert "settings differ from rank 0: adapter=step 20, manifest 0, not step 20, manifest " in output


# ---- scoring


def score_singly(rank: int, unreadable: str, faulty: str = "") -> None:
    """One image of these ids cannot be read, and one ends the rank that scores it."""
    from models.builder import PlantModel

    score = PlantModel.score

    def score_one_at_a_time(self, rows, **options):
        for scores, skipped in score(dataclasses.replace(self, eval_batch_size=1, num_workers=0), rows, **options):
            (sample,) = [sample.id for sample, _ in scores]
            if sample == faulty:
                raise OSError("no such image")
            yield ([], [f"{sample}: torn"]) if sample == unreadable else (scores, skipped)

    PlantModel.score = score_one_at_a_time


def test_two_ranks_score_as_a_single_one_through_a_fault(scored, small_splits):
    """19 images, of which rank 1 cannot read one."""
    ids = take(build_datasets(load_config(scored / "run")[0]).test, 19)["id"]
    argv = ["run", "--split", "test", "--limit", "19", "--max-bad-fraction", "0.1"]
    fault = functools.partial(score_singly, unreadable=ids[3])
    statuses, output = run(scored, argv, "evaluate", fault=functools.partial(fault, faulty=ids[13]))
    assert all(statuses) and output.count("critical: rank 1: OSError: no such image") == 1, output
    file, report_file = scored / "run" / "eval_test.scores.jsonl", scored / "run" / "eval_test.json"
    before = [entry["id"] for entry in read_entries(file, {str: ANY})[1]]
    assert sorted(before) == sorted(ids[index] for index in (0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11))
    statuses, output = run(scored, argv, "evaluate", fault=fault)
    assert statuses == [0, 0] and "11 images were scored before" in output, output
    assert output.count("result | test | top-1") == 1
    report = json.loads(report_file.read_text())
    assert (report["n"], report["unreadable_images"], report["ranks"]) == (18, 1, 2)
    log = (scored / "run" / "evaluate.log").read_text()
    assert log.count(f"unreadable image skipped: {ids[3]}: torn") == 2
    found = {entry["id"]: entry for entry in read_entries(file, {str: ANY})[1]}
    file.unlink()
    statuses, output = run(scored, argv, "evaluate", ranks=1, fault=fault)
    assert statuses == [0], output
    expected = {entry["id"]: entry for entry in read_entries(file, {str: ANY})[1]}
    assert found.keys() == expected.keys()
    for image, entry in expected.items():
        assert found[image]["scores"] == pytest.approx(entry["scores"], abs=2e-4)
    for name in ("top1", "top5", "ece", "coverage", "per_class", "confusions", "ood"):
        assert json.loads(report_file.read_text())[name] == report[name]


@pytest.mark.parametrize(
    "argv",
    [
        ("run", "--split", "test", "--limit", "5", "--protocol", "both", "--prior-calibration", "true"),
        ("run", "--split", "test", "--limit", "1", "--protocol", "generation"),
        ("--preset", "tiny", "--limit", "1", "--output-dir", "base"),
    ],
    ids=["both", "generation", "base"],
)
def test_every_way_of_scoring_is_distributed_across_ranks(argv, scored):
    """Also where a rank has no image, and where nothing is left to do."""
    for _ in range(2):
        statuses, output = run(scored, argv, "evaluate")
        assert statuses == [0, 0] and "result | " in output and "rank 1" not in output, output
    assert "images were scored before" in output


def interrupt_scoring(rank: int) -> None:
    from models.builder import PlantModel

    score = PlantModel.score

    def interrupted(self, rows, **options):
        if rank == 1:
            raise KeyboardInterrupt
        yield from score(self, rows, **options)

    PlantModel.score = interrupted


def test_a_report_interrupted_on_a_machine_ends_on_all(scored):
    launch = Launch(scored, [["run", "--split", "test"]] * 2, "evaluate", fault=interrupt_scoring, machines=2)
    statuses, _ = launch.end()
    first, second = (output.read_text() for output in launch.outputs)
    assert statuses == [1, 130] and "warning: rank 1: interrupted" in second, first + second
    assert "error: rank 1: interrupted. Re-run the same command to resume." in first
    assert "rank 1: interrupted" in (scored / "run" / "evaluate.log").read_text()


# ---- the benchmark


def draw_few_images(rank: int) -> None:
    from benchmarks import generated

    generated.IMAGES, tempfile.tempdir = 4, os.getcwd()


def test_a_benchmark_of_several_ranks_prints_one_table_and_leaves_nothing(here):
    argv = ["--preset", "tiny", "--steps", "2", "--image", "84x60", "--num-workers", "0"]
    argv += ["--gradient-accumulation-steps", "2"]
    statuses, output = run(here, argv, "benchmark", fault=draw_few_images)
    assert statuses == [0, 0] and " | 2 ranks" in output and output.count("this project ") == 1, output
    assert not list(here.glob("tmp*"))


# ---- sharded weights


def test_sharded_weights_compute_what_whole_ones_do(here, quantized):
    """Through a stop in an evaluation, a resume with them whole, a kill, to the report and the reload at the end."""
    argv, expected = quantized
    argv = [*argv, "--per-device-train-batch-size", "1", "--gradient-accumulation-steps", "7"]
    sharded = [*argv, "--sharding", "fsdp"]
    statuses, output = run(here, [*sharded, "--per-device-eval-batch-size", "2"], fault=stop_in_an_evaluation)
    assert all(statuses) and "saved | run/checkpoint-10" in output, output
    assert "frozen weights sharded across 2 ranks: " in output and "micro-batch 1, as configured" in output
    statuses, output = run(here, argv, fault=functools.partial(signal_at, 17, 1, signal.SIGKILL))
    assert all(statuses) and "resuming from run/checkpoint-10" in output, output
    statuses, output = run(here, sharded)
    assert statuses == [0, 0] and "resuming from run/checkpoint-15" in output and REPRODUCED in output, output
    assert_same_run(here / "run", expected)


def test_sharded_weights_of_16_bit_never_need_to_be_whole(here, checkpoint):
    """Nor in the evaluations, the report and the reload; 20 images of val on three ranks: the last has one less."""
    argv = [*RUN, "--model", checkpoint(), "--load-in-4bit", "false", "--trainable", "adapter"]
    argv += ["--sharding", "fsdp", "--max-steps", "2", "--eval-steps", "1", "--save-steps", "2"]
    statuses, output = run(here, argv, ranks=3, fault=refuse_whole_weights)
    assert statuses == [0, 0, 0] and REPRODUCED in output, output
    assert json.loads((here / "run" / "eval_val.json").read_text())["n"] == 20


def refuse_whole_weights(rank: int) -> None:
    """Fail where more than two layers are whole at a time: the one that computes, and the one that is fetched."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    unshard, layers = FSDPParamGroup.unshard, set()

    def counted(self, *args, **kwargs):
        layers.add(self)
        unshard(self, *args, **kwargs)
        whole = [each for each in layers if each.is_unsharded and ".layers." in str(each._module_fqn)]
        assert len(whole) <= 2, [each._module_fqn for each in whole]

    FSDPParamGroup.unshard = counted


def test_the_report_is_made_with_whole_weights_where_best_is_written_at_the_end(here, quantized):
    """Without val best/ is the last step's, and writing it reshards weights that were unsharded."""
    argv = [*quantized[0], "--sharding", "fsdp", "--train-on-val", "true", "--eval-steps", "none", "--max-steps", "3"]
    statuses, output = run(here, argv)
    assert statuses == [0, 0] and REPRODUCED in output, output
    statuses, output = run(here, ["run", "--split", "test", "--limit", "5"], "evaluate")
    assert statuses == [0, 0] and "result | test | top-1" in output, output


def run_out_of_memory_when_sharded(rank: int) -> None:
    def fail(trainer, loss):
        if rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return loss

    at_step(3, fail)


def test_out_of_memory_of_a_rank_ends_all_that_share_its_weights(here, quantized):
    statuses, output = run(here, [*quantized[0], "--sharding", "fsdp"], fault=run_out_of_memory_when_sharded)
    message = "error: rank 1: step 3: out of memory with micro-batch 7, which is not planned with sharded weights"
    assert all(statuses) and message in output, output
    assert max(steps_of(here / "run")) == 2


def alter_sharded_weights(rank: int) -> None:
    from torch.distributed import fsdp

    fully_shard = fsdp.fully_shard

    def altered(module, **options):
        sharded = fully_shard(module, **options)
        if rank == 1 and hasattr(module, "self_attn") and hasattr(module.self_attn.k_proj, "get_base_layer"):
            module.self_attn.k_proj.get_base_layer().weight.to_local().view(torch.int32)[7] += 1
        return sharded

    fsdp.fully_shard = altered


def test_weights_that_sharding_alters_are_not_trained_with(here, quantized):
    statuses, output = run(here, [*quantized[0], "--sharding", "fsdp"], fault=alter_sharded_weights)
    assert all(statuses) and "memory: sharding alters the 4-bit weights; use --sharding none" in output, output
    assert not steps_of(here / "run")


# ---- streams


@pytest.fixture
def parquet(here):
    """150 synthetic images for training in four files, and 20 each of val and test."""
    from datasets import ClassLabel, Dataset, Features, Image

    from data.synthetic import SPECIES, draw_split

    folder = here / "parquet"
    folder.mkdir()
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=list(SPECIES))})
    for split, images, files in (("train", 150, 4), ("validation", 20, 1), ("test", 20, 1)):
        rows = [{"image": row["image"], "label": row["label"]} for row in draw_split(split)[:images]]
        for file in range(files):
            Dataset.from_list(rows[file::files], features=features).to_parquet(folder / f"{split}-{file}.parquet")
    return folder


def stop_at_7(rank: int) -> None:
    signal_at(7, 1, signal.SIGTERM, rank)


def test_a_stream_resumes_where_it_stopped(here, parquet, small_splits, capsys):
    """Two ranks with two workers each; 20 steps of 11 images are more than an epoch; dropout keeps its random state."""
    argv = [*RUN, "--dataset", str(parquet), "--streaming", "true", "--num-workers", "2"]
    argv += ["--per-device-train-batch-size", "11", "--learning-rate", "0.01"]
    argv += ["--trainable", "adapter", "--lora-r", "4", "--lora-dropout", "0.2"]
    statuses, output = run(here, [*argv, "--output-dir", "whole"])
    assert statuses == [0, 0] and "data | stream of 4 parquet files" in output, output
    assert "150 train, 20 val, 20 test images" in output
    statuses, output = run(here, argv, fault=stop_at_7)
    assert all(statuses) and "saved | run/checkpoint-" in output, output
    statuses, output = run(here, argv, fault=functools.partial(signal_at, 17, 1, signal.SIGKILL))  # in the second epoch
    assert all(statuses), output
    statuses, output = run(here, argv)
    assert statuses == [0, 0] and "resuming from run/checkpoint-15" in output, output
    assert_same_run(here / "run", here / "whole")
    with pytest.raises(SystemExit):
        evaluate.main(["run", "--dataset", "synthetic"])
    assert "only a folder of parquet files is streamed; use false" in capsys.readouterr().err
    assert evaluate.main(["run", "--dataset", "synthetic", "--streaming", "false"]) == 0
    assert json.loads((here / "run" / "eval_val.json").read_text())["dataset"] == "synthetic"


def fit_fewer_workers(rank: int) -> None:
    from models import training_arguments

    training_arguments.fit_workers = lambda num_workers, needed: num_workers - rank


def test_every_rank_of_a_stream_has_as_many_loader_workers(here, parquet):
    """The order of images depends on their number, and a machine may have room for fewer."""
    argv = ["--preset", "tiny", "--dataset", str(parquet), "--streaming", "true", "--max-steps", "1"]
    argv += ["--num-workers", "2", "--eval-steps", "none", "--output-dir", "run"]
    statuses, output = run(here, argv, fault=fit_fewer_workers)
    assert statuses == [0, 0], output
    assert "warning: num_workers lowered to 1: another machine has too little shared memory" in output
    assert load_config(here / "run")[1]["stream_workers"] == 1


# ---- without other ranks


@pytest.mark.parametrize(("images", "size", "ranks"), [(50, 7, 2), (49, 16, 3), (3, 16, 4), (32, 16, 2)])
@pytest.mark.parametrize("by_length", [False, True])
def test_shards_are_the_batches_of_a_single_rank(images, size, ranks, by_length):
    batches = BatchSampler(SequentialSampler(range(images)), size, drop_last=False)

    def shard(rank, batch):
        return shard_by_length(batch, [-index for index in batch], 3, rank, ranks) if by_length else batch[rank::ranks]

    parts = functools.partial(ShardedBatchSampler, range(images), size)
    shards = [list(parts(functools.partial(shard, rank))) for rank in range(ranks)]
    assert {len(shard) for shard in shards} == {len(batches)}
    for number, batch in enumerate(batches):
        parts = [shard[number] for shard in shards]
        assert sorted(itertools.chain(*parts)) == batch and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_shards_by_length_pad_little_and_take_equally_long():
    lengths = torch.randint(1800, 2950, (64,), generator=torch.Generator().manual_seed(0)).tolist()

    def slowest(shard):  # tokens of the rank that other ranks wait for, padding included
        parts = [sorted(lengths[index] for index in shard(list(range(64)), rank)) for rank in range(4)]
        return max(sum(max(part[at : at + 7]) * len(part[at : at + 7]) for at in range(0, 16, 7)) for part in parts)

    dealt = slowest(lambda batch, rank: shard_by_length(batch, lengths, 7, rank, 4))
    assert sum(lengths) / 4 < dealt < 1.04 * sum(lengths) / 4 < slowest(lambda batch, rank: batch[rank::4])


def test_rank_0_stays_until_the_other_ranks_are_done():
    """It may host the store: under Slurm, not under torchrun."""
    store = torch.distributed.HashStore()
    first, second = (Watchdog(store, rank, 2, shares_screen=True) for rank in (0, 1))
    for watchdog in (first, second):
        watchdog.heartbeat("")
        watchdog.__enter__()
    end = threading.Thread(target=first.__exit__, args=(None, None, None))
    end.start()
    end.join(1)
    assert end.is_alive()
    second.__exit__(None, None, None)
    end.join(10)
    assert not end.is_alive()


START = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{port}"}
BAD_STARTS = {
    "no world size": (
        {"RANK": "1", "LOCAL_RANK": "1"},
        "RANK=1 LOCAL_RANK=1: one of several ranks, but WORLD_SIZE is missing. Start",
    ),
    "slurm": (
        {"SLURM_STEP_NUM_TASKS": "2"},
        "SLURM_STEP_NUM_TASKS=2: one of several ranks, but WORLD_SIZE is missing. Start",
    ),
    "world size alone": (
        {"WORLD_SIZE": "2"},
        "WORLD_SIZE=2: RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing from the environment. Start",
    ),
    "no number": ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: is not a number. Start with torchrun, or unset it"),
    "missing rank": (
        START,
        "rendezvous at 127.0.0.1:{port} timed out after 2 s: 1 of 2 ranks joined. Start the missing rank",
    ),
    "no rank 0": (START | {"RANK": "1"}, "rendezvous at 127.0.0.1:{port} failed for rank 1 of 2: "),
    "unknown address": (
        START | {"RANK": "1", "MASTER_ADDR": "nowhere.invalid"},
        "rendezvous at nowhere.invalid:{port} failed for rank 1 of 2: gaierror: ",
    ),
    "too high a rank": (START | {"RANK": "2"}, "RANK=2: is not one of WORLD_SIZE=2 ranks, counted from 0. Start"),
    "other engine": (
        START | {"ACCELERATE_USE_FSDP": "true"},
        "ACCELERATE_USE_FSDP=true: the launcher asks for FSDP, which cannot be set up",
    ),
}


@pytest.mark.parametrize(("variables", "message"), BAD_STARTS.values(), ids=BAD_STARTS.keys())
def test_a_bad_start_is_an_error_and_does_not_hang(variables, message, here, monkeypatch, capsys):
    port = free_port()
    monkeypatch.setattr(distributed, "RENDEZVOUS_S", 2)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(port=port))
    began = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        train.main(RUN)
    output = capsys.readouterr().out
    assert stopped.value.code == 1 and "Traceback" not in output
    assert re.search(rf"^error: (rank 1: )?{re.escape(message.format(port=port))}", output, re.MULTILINE), output
    assert time.monotonic() - began < 30 and not (here / "runs").exists()


def test_a_rank_waits_for_the_name_of_a_machine_that_starts_later(monkeypatch):
    asked = []

    def look_up(host, port):
        asked.append(host)
        if len(asked) < 3:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(distributed.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(distributed.time, "sleep", lambda seconds: None)
    distributed._await_name("rank0.cluster")
    assert asked == ["rank0.cluster"] * 3


def test_sharding_needs_several_ranks(here, capsys):
    with pytest.raises(SystemExit):
        train.main([*RUN, "--trainable", "adapter", "--sharding", "fsdp"])
    assert "error: --sharding fsdp: needs several ranks to shard the weights across" in capsys.readouterr().out


def test_more_ranks_than_gpus_are_an_error(monkeypatch):
    from runtime.device import choose_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"LOCAL_RANK=2: torch sees 2 GPUs .*\(torchrun --nproc-per-node 2\)"):
        choose_device("tiny", 0.9, several_ranks=True)


def test_other_programs_run_as_a_single_process(scored, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        export.main(["run", "out"])
    assert "error: WORLD_SIZE=2: this program runs as a single process. Start it" in capsys.readouterr().out
