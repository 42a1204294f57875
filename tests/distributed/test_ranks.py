"""Several processes, started by torchrun on this machine: they compute what one does, and end together."""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch.utils.data import BatchSampler, SequentialSampler

import evaluate
import export
import train
from config.training_config import TrainingConfig
from data.dataset import build_datasets, take
from runtime import distributed
from runtime.distributed import ShardedBatchSampler
from runtime.run_files import load_config, read_entries, read_metrics
from tests.conftest import ROOT
from utils.logging_utils import UserError

# 50 images in steps of 7: of the last one of every pass a single image is left, and one process has none.
RUN = [
    *(
        "--preset",
        "tiny",
        "--max-steps",
        "20",
        "--eval-steps",
        "10",
        "--save-steps",
        "5",
        "--sample-fraction",
        "0.0125",
    ),
    *("--per-device-train-batch-size", "7", "--num-workers", "0", "--logging-steps", "5"),
]
PATIENCE = 240  # seconds after which a run hangs


def launch(folder, argv=RUN, flags=("--standalone", "--nproc-per-node", "2"), program=ROOT / "train.py", **variables):
    """torchrun in `folder`, each process with one thread."""
    environment = os.environ | variables | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"ACCELERATE_MIXED_PRECISION": "bf16"}  # by accelerate launch: the run's own precision holds
    command = [sys.executable, "-m", "torch.distributed.run", *flags, str(program), *argv]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def end_of(process) -> tuple[int, str]:
    told, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, told


def with_fault(folder, code: str):
    """train.py with `code` run first; `at(step)` is true in that step."""
    script = folder / "faulty.py"
    script.write_text(
        textwrap.dedent("""
        import os, sys
        import torch
        import train
        from models import trainer
        rank = int(os.environ["RANK"])
        real = trainer.PlantTrainer.forward_backward
        """)
        + textwrap.dedent(code)
        + "\nsys.exit(train.main())\n"
    )
    return script


def rank_of(launcher, rank: str) -> psutil.Process:
    return next(child for child in psutil.Process(launcher.pid).children() if child.environ().get("RANK") == rank)


def wait_for_step(folder, step: int) -> None:
    since = time.monotonic()
    while not any(line["step"] >= step for line in read_metrics(folder)):
        assert time.monotonic() - since < PATIENCE
        time.sleep(0.05)


def steps_of(folder) -> dict[int, dict]:
    return {line["step"]: line for line in read_metrics(folder) if "loss" in line}


def assert_as_one(folder, one) -> None:
    """Losses and gradients of every step to 1e-5, and the evaluations, are those of one process."""
    found, expected = steps_of(folder), steps_of(one)
    assert list(found) == list(expected) == list(range(1, 21))
    for step, line in expected.items():
        assert found[step]["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert found[step]["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-5)
        assert (found[step]["images"], found[step]["image_tokens"]) == (line["images"], line["image_tokens"])
    pairs = [[line for line in read_metrics(run) if "eval_loss" in line] for run in (folder, one)]
    for mine, its in zip(*pairs, strict=True):
        assert mine["eval_loss"] == pytest.approx(its["eval_loss"], rel=1e-5)
        assert (mine["eval_top1"], mine["eval_top5"]) == (its["eval_top1"], its["eval_top5"])


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same run by one process."""
    folder = tmp_path_factory.mktemp("one") / "one"
    assert train.main([*RUN, "--output-dir", str(folder)]) == 0
    return folder


def test_two_compute_what_one_does_through_a_stop_and_a_resume(here, one):
    argv = [*RUN, "--output-dir", "run"]
    process = launch(here, argv)
    wait_for_step(here / "run", 7)
    process.send_signal(signal.SIGTERM)
    status, told = end_of(process)
    assert (
        status != 0 and "saved | run/checkpoint-" in told and not re.search(r"^(critical|error): ", told, re.MULTILINE)
    ), told
    status, told = end_of(launch(here, argv))
    assert status == 0 and "resuming from run/checkpoint-" in told, told
    assert_as_one(here / "run", one)
    log = (here / "run" / "train.log").read_text()
    assert log.count("fp32 on 2 x cpu") == 2 and log.count("step 20/20") == 1  # one log
    checkpoint = here / "run" / "checkpoint-20"
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(json.loads((checkpoint / "manifest.json").read_text()))
    assert json.loads((here / "run" / "training_config.json").read_text())["recorded"]["processes"] == 2
    status, told = end_of(subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *argv, "--max-steps", "25"], cwd=here, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT))  # fmt: skip
    assert status == 1 and "cannot go on, the number of processes (2 -> 1) changed" in told


def test_two_score_what_one_does_through_a_fault(here, one):
    """Of 19 images one, of the other process, does not open."""
    shutil.copytree(one, here / "run")
    ids = take(build_datasets(load_config(one)[0]).test, 19)["id"]
    script = here / "faulty.py"
    script.write_text(
        textwrap.dedent("""
        import os, sys
        import evaluate
        from evaluation import evaluator
        from models.builder import PlantModel
        evaluator.SAMPLES_PER_GATHER = 2
        real = PlantModel.score
        def score(self, rows):
            for scores, unreadable in real(self, rows, 1, 0):
                (sample,) = [score.id for score in scores]
                if sample == os.environ["FAULT"]:
                    raise OSError("no such image")
                yield ([], [f"{sample}: torn"]) if sample == os.environ["BAD"] else (scores, unreadable)
        PlantModel.score = score
        sys.exit(evaluate.main())
        """)
    )
    argv = ["run", "--split", "test", "--limit", "19", "--max-unreadable-fraction", "0.1"]
    status, told = end_of(launch(here, argv, program=script, BAD=ids[3], FAULT=ids[13]))
    assert status != 0 and told.count("critical: rank 1: OSError: no such image") == 1, told
    scores = here / "run" / "eval_test.scores.jsonl"
    before = read_entries(scores)[1]
    assert sorted(entry["id"] for entry in before) == sorted(
        ids[image] for image in (0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11)
    )
    status, told = end_of(launch(here, argv, program=script, BAD=ids[3], FAULT=""))
    assert status == 0 and "11 images were scored before" in told and told.count("result | test | top-1") == 1, told
    report = json.loads((here / "run" / "eval_test.json").read_text())
    assert (report["n"], report["unreadable_images"], report["ranks"]) == (18, 1, 2)
    assert (here / "run" / "evaluate.log").read_text().count(f"unreadable image skipped: {ids[3]}: torn") == 2
    found = {entry["id"]: entry for entry in read_entries(scores)[1]}
    scores.unlink()
    status, told = end_of(launch(here, argv, (), script, BAD=ids[3], FAULT=""))
    assert status == 0, told
    expected = {entry["id"]: entry for entry in read_entries(scores)[1]}
    assert found.keys() == expected.keys()
    for image, entry in expected.items():
        assert found[image]["scores"] == pytest.approx(entry["scores"], abs=2e-4)
    for name in ("top1", "top5", "ece", "coverage", "per_class", "confusions", "ood"):
        assert json.loads((here / "run" / "eval_test.json").read_text())[name] == report[name]


@pytest.mark.parametrize(
    "argv",
    [
        ("run", "--split", "test", "--limit", "5", "--protocol", "both", "--prior-calibration", "true"),
        ("run", "--split", "test", "--limit", "1", "--protocol", "generation"),
        ("--preset", "tiny", "--limit", "1", "--output-dir", "base"),
    ],
    ids=["both", "replies", "base"],
)
def test_every_way_of_scoring_is_shared_out(argv, here, one):
    """Also where a process has no image, and where nothing is left to do."""
    shutil.copytree(one, here / "run")
    for _ in range(2):
        status, told = end_of(launch(here, argv, program=ROOT / "evaluate.py"))
        assert status == 0 and told.count("result | ") >= 1 and "rank 1" not in told, told
    assert "images were scored before" in told


def test_a_report_that_is_interrupted_on_one_machine_ends_on_the_other(here, one):
    shutil.copytree(one, here / "run")
    script = here / "faulty.py"
    script.write_text(
        textwrap.dedent("""
        import os, sys
        import evaluate
        from models.builder import PlantModel
        def score(self, rows):
            if os.environ["RANK"] == "1":
                raise KeyboardInterrupt
            yield from real(self, rows)
        real, PlantModel.score = PlantModel.score, score
        sys.exit(evaluate.main())
        """)
    )
    nodes = [launch(here, ["run", "--split", "test"], place, script) for place in two_places()]
    ends = [end_of(node) for node in nodes]
    assert all(status != 0 for status, _ in ends) and "warning: rank 1: interrupted" in ends[1][1], ends
    assert "error: rank 1: interrupted. Re-run the same command to resume." in ends[0][1]
    assert "rank 1: interrupted" in (here / "run" / "evaluate.log").read_text()


def test_a_machine_with_other_weights_is_told(here, one):
    shutil.copytree(one, here / "run")
    script = here / "faulty.py"
    script.write_text(
        textwrap.dedent("""
        import os, sys
        import evaluate
        from runtime import checkpoint
        if os.environ["RANK"] == "1":
            checkpoint.describe_best = lambda folder: "step 7, manifest 0"
        sys.exit(evaluate.main())
        """)
    )
    status, told = end_of(launch(here, ["run"], program=script))
    assert status != 0 and "settings differ from rank 0: adapter=step 7, manifest 0, not step 20" in told


def test_out_of_memory_of_one_is_its_own_affair(here, one):
    script = with_fault(here, """
        def once(self, *args):
            loss = real(self, *args)  # its gradients are there already
            if rank == 1 and self.state.global_step == 3 and self.micro_batcher.size > 2:
                open("met", "w").close()
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")
            return loss
        trainer.PlantTrainer.forward_backward = once
    """)  # fmt: skip
    status, told = end_of(launch(here, [*RUN, "--output-dir", "run"], program=script))
    assert status == 0 and (here / "met").exists(), told
    assert "warning: rank 1: step 4: out of memory; from here on retrying with" in told
    assert_as_one(here / "run", one)


def test_the_fault_of_one_ends_all_with_its_message(here):
    script = with_fault(here, """
        def fails(self, *args):
            if rank == 1 and self.state.global_step == 6:
                raise trainer.UserError("step 7: broken on purpose")
            return real(self, *args)
        trainer.PlantTrainer.forward_backward = fails
    """)  # fmt: skip
    began = time.monotonic()
    status, told = end_of(launch(here, [*RUN, "--output-dir", "run"], program=script))
    assert status != 0 and "error: rank 1: step 7: broken on purpose" in told
    assert "Connection closed" not in told and time.monotonic() - began < 90
    assert "rank 1: UserError: step 7: broken on purpose" in (here / "run" / "train.log").read_text()
    assert max(steps_of(here / "run")) == 6


def test_a_stop_in_an_evaluation_waits_for_a_slow_save(here, one):
    """The evaluation that was left out is made up for, once; the others do not leave before the manifest stands."""
    script = with_fault(here, """
        import signal, time
        from models import callbacks
        manifest, score = callbacks.write_manifest, trainer.score_batch
        def slow(folder):
            time.sleep(2)
            manifest(folder)
        def stopped(*args):
            if rank == 0 and not os.path.exists("stopped"):
                open("stopped", "w").close()
                os.kill(os.getppid(), signal.SIGTERM)
                time.sleep(1)
            return score(*args)
        callbacks.write_manifest, trainer.score_batch = slow, stopped
    """)  # fmt: skip
    argv = [*RUN, "--output-dir", "run", "--per-device-eval-batch-size", "2"]
    status, told = end_of(launch(here, argv, program=script))
    assert status != 0 and "saved | run/checkpoint-10" in told and (here / "run/checkpoint-10/manifest.json").exists()
    status, told = end_of(launch(here, argv))
    assert status == 0 and "resuming from run/checkpoint-10" in told, told
    assert_as_one(here / "run", one)
    assert [line["step"] for line in read_metrics(here / "run") if "eval_loss" in line] == [10, 20]


def test_what_one_meets_in_a_step_all_decide_alike(here, image_folder):
    """A loss that is no number in one process, images that do not open, an adapter, workers, an early stop."""
    root = image_folder({"oak": 30, "ash": 30})
    for number in range(4):
        (root / "ash" / f"{number}.png").write_bytes(b"broken")
    script = with_fault(here, """
        def poisoned(self, *args):
            loss = real(self, *args)
            return loss * float("nan") if rank == 1 and self.state.global_step == 2 else loss
        trainer.PlantTrainer.forward_backward = poisoned
    """)  # fmt: skip
    argv = ["--preset", "tiny", "--trainable", "adapter", "--dataset", str(root), "--max-unreadable-fraction", "0.5"]
    argv += ["--max-skipped-steps", "1", "--num-workers", "1", "--max-steps", "60", "--eval-steps", "3"]
    argv += ["--early-stopping-patience", "2", "--early-stopping-min-gain", "0.9", "--output-dir", "run"]
    status, told = end_of(launch(here, argv, program=script))
    steps = steps_of(here / "run")
    assert status == 0 and "early stopping" in told and len(steps) == 9, told
    assert [step for step, line in steps.items() if line.get("skipped")] == [3]
    assert sum(len(images) for images in told_bad(told).values()) == 4


def told_bad(told: str) -> dict[str, set[str]]:
    """{split: images that were told to be left out}; each but once for training."""
    found = {
        split: re.findall(rf"warning: image skipped \(\d+ of {split} so far\): (\S+):", told)
        for split in ("train", "val")
    }
    assert len(found["train"]) == len(set(found["train"]))
    left = re.findall(r"warning: image left out: (\S+):", told)
    return {split: set(images) for split, images in found.items()} | {"test": set(left) - set(found["val"])}


def test_a_process_that_is_killed_ends_all_and_the_run_goes_on(here, one):
    argv = [*RUN, "--output-dir", "run"]
    process = launch(here, argv)
    wait_for_step(here / "run", 6)
    rank_of(process, "1").kill()
    status, told = end_of(process)
    assert status != 0 and "error: another process is gone: killed" in told and "critical" not in told, told
    process = launch(here, argv)
    wait_for_step(here / "run", 12)
    rank_of(process, "0").kill()
    status, told = end_of(process)
    assert status != 0 and "error: rank 1: lost the connection to another rank: killed" in told, told
    status, told = end_of(launch(here, argv))
    assert status == 0 and "resuming from run/checkpoint-10" in told, told
    assert_as_one(here / "run", one)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, checkpoint):
    """(arguments of a run with a 4-bit base and an adapter, the folder of what one process made of it)."""
    folder = tmp_path_factory.mktemp("quantized") / "one"
    argv = [*RUN, "--model", checkpoint(), "--load-in-4bit", "true", "--trainable", "adapter"]
    assert train.main([*argv, "--output-dir", str(folder)]) == 0
    return argv, folder


def test_weights_that_are_spread_compute_what_whole_ones_do(here, quantized):
    """Through a stop in an evaluation, a resume with them whole, a kill of one, to the report and reload at the end."""
    argv, one = quantized
    argv = [*argv, "--output-dir", "run", "--per-device-train-batch-size", "1", "--gradient-accumulation-steps", "7"]
    script = with_fault(here, """
        import signal, time
        score = trainer.score_batch
        def stopped(*args):
            if rank == 0:
                os.kill(os.getppid(), signal.SIGTERM)
                time.sleep(1)
            return score(*args)
        trainer.score_batch = stopped
    """)  # fmt: skip
    status, told = end_of(
        launch(here, [*argv, "--sharding", "fsdp", "--per-device-eval-batch-size", "2"], program=script)
    )
    assert status != 0 and "saved | run/checkpoint-10" in told, told
    assert "frozen weights are spread over 2 processes" in told and "1 images at a time, as configured" in told
    process = launch(here, argv)  # whole in each
    wait_for_step(here / "run", 13)
    rank_of(process, "1").kill()
    assert end_of(process)[0] != 0
    status, told = end_of(launch(here, [*argv, "--sharding", "fsdp"]))
    assert status == 0 and "resuming from run/checkpoint-" in told, told
    assert_as_one(here / "run", one)
    assert "run/best reloaded into a fresh base model | scores of 4 images reproduced" in told


def test_a_process_without_memory_ends_all_that_share_its_weights(here, quantized):
    argv, _ = quantized
    script = with_fault(here, """
        def once(self, *args):
            if rank == 1 and self.state.global_step == 2:
                raise torch.OutOfMemoryError("CUDA out of memory (injected)")
            return real(self, *args)
        trainer.PlantTrainer.forward_backward = once
    """)  # fmt: skip
    status, told = end_of(launch(here, [*argv, "--sharding", "fsdp", "--output-dir", "run"], program=script))
    assert status != 0 and "error: rank 1: step 3: out of memory with 7 images at a time, and weights that are" in told
    assert max(steps_of(here / "run")) == 2


def test_the_report_is_made_with_whole_weights_where_best_is_written_at_the_end(here, quantized):
    """Without val best/ is the last step's, and writing it lets gathered weights go."""
    argv, _ = quantized
    argv = [*argv, "--sharding", "fsdp", "--train-on-val", "true", "--eval-steps", "none", "--max-steps", "3"]
    status, told = end_of(launch(here, [*argv, "--output-dir", "run"]))
    assert status == 0 and "run/best reloaded into a fresh base model | scores of 4 images reproduced" in told, told
    status, told = end_of(launch(here, ["run", "--split", "test", "--limit", "5"], program=ROOT / "evaluate.py"))
    assert status == 0 and "result | test | top-1" in told, told


def test_weights_that_come_back_altered_are_not_trained_with(here, quantized):
    argv, _ = quantized
    script = with_fault(here, """
        from models import memory
        real_shard = memory.shard_frozen_parameters
        def altered(base):
            parts = real_shard(base)
            if rank == 1:
                weight = base.model.language_model.layers[1].self_attn.k_proj.get_base_layer().weight
                weight.to_local().view(torch.int32)[7] += 1
            return parts
        memory.shard_frozen_parameters = altered
    """)  # fmt: skip
    status, told = end_of(launch(here, [*argv, "--sharding", "fsdp", "--output-dir", "run"], program=script))
    assert status != 0 and "plan: 4-bit weights come back altered from the other processes; use --sharding none" in told
    assert not steps_of(here / "run")


@pytest.mark.parametrize(
    ("who", "words"),
    [
        ("1", "error: rank 1 sent no heartbeat for 3 s. Check its machine and the network"),
        ("0", "error: rank 1: rank 0 sent no heartbeat for 3 s. Check its machine and the network"),
        ("the launcher", "the store that connects the ranks did not answer for 3 s. Check the first machine"),
    ],
)
def test_one_that_gives_no_sign_ends_all(who, words, here):
    """As when its machine or its network is gone: nothing tells the others."""
    script = with_fault(here, """
        import signal
        from runtime import watchdog
        watchdog.STALLED_S = 3
        def stands_still(self, *args):
            if str(rank) == os.environ["STOPS"] and self.state.global_step == 2:
                os.kill(os.getpid(), signal.SIGSTOP)
            return real(self, *args)
        trainer.PlantTrainer.forward_backward = stands_still
    """)  # fmt: skip
    process = launch(here, [*RUN, "--max-steps", "2000", "--output-dir", "run"], program=script, STOPS=who)
    wait_for_step(here / "run", 2)
    ranks = {rank: rank_of(process, rank) for rank in "01"}
    stopped = ranks.get(who, process)
    if stopped is process:
        process.send_signal(signal.SIGSTOP)
    others = [one for one in ranks.values() if one is not stopped]
    until = time.monotonic() + 60
    while any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in others):
        assert time.monotonic() < until
        time.sleep(0.1)
    stopped.send_signal(signal.SIGCONT)
    status, told = end_of(process)
    assert status != 0 and words in told, told


@pytest.fixture
def drawn_parquet(here):
    """150 drawings to learn from in four files, and 20 each of val and test."""
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


def test_a_stream_goes_on_where_it_was_left(here, drawn_parquet, small_splits, capsys):
    """Two processes with two workers each; 20 steps of 11 are more than a pass. Dropout draws as it would have."""
    argv = [*RUN, "--sample-fraction", "1", "--dataset", str(drawn_parquet), "--streaming", "true"]
    argv += ["--num-workers", "2", "--per-device-train-batch-size", "11"]
    argv += ["--trainable", "adapter", "--lora-r", "4", "--lora-dropout", "0.2", "--learning-rate", "0.01"]
    status, told = end_of(launch(here, [*argv, "--output-dir", "whole"]))
    assert status == 0 and "data   stream of 4 parquet files" in told and "150 train, 20 val, 20 test images" in told
    process = launch(here, [*argv, "--output-dir", "run"])
    wait_for_step(here / "run", 6)
    process.send_signal(signal.SIGTERM)
    status, told = end_of(process)
    assert status != 0 and "saved | run/checkpoint-" in told, told
    process = launch(here, [*argv, "--output-dir", "run"])
    wait_for_step(here / "run", 16)  # in the second pass
    rank_of(process, "1").kill()
    assert end_of(process)[0] != 0
    status, told = end_of(launch(here, [*argv, "--output-dir", "run"]))
    assert status == 0 and "resuming from run/checkpoint-1" in told, told
    assert_as_one(here / "run", here / "whole")
    with pytest.raises(SystemExit):
        evaluate.main(["run", "--dataset", "synthetic"])
    assert "only a folder of parquet files is streamed; use false" in capsys.readouterr().err
    assert evaluate.main(["run", "--dataset", "synthetic", "--streaming", "false"]) == 0
    assert json.loads((here / "run" / "eval_val.json").read_text())["dataset"] == "synthetic"


def test_loader_workers_of_a_stream_are_as_many_in_all(here, drawn_parquet):
    """On them depends which images come after which, and a machine may have room for fewer."""
    script = with_fault(here, "trainer.fit_workers = lambda wanted, needed: wanted - rank")
    argv = ["--preset", "tiny", "--dataset", str(drawn_parquet), "--streaming", "true", "--max-steps", "1"]
    argv += ["--num-workers", "2", "--eval-steps", "none", "--output-dir", "run"]
    status, told = end_of(launch(here, argv, program=script))
    assert status == 0 and "warning: another machine has room for 1 loader workers; all take as many" in told, told
    assert json.loads((here / "run" / "training_config.json").read_text())["recorded"]["stream_workers"] == 1


def a_free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def two_places() -> list[tuple[str, ...]]:
    """Flags of torchrun on the first of two machines, and on the second."""
    place = ("--master-addr", "127.0.0.1", "--master-port", a_free_port(), "--nnodes", "2", "--nproc-per-node", "1")
    return [(*place, "--rdzv-conf", "timeout=60", "--node-rank", rank) for rank in "01"]


def test_machines_with_other_settings_are_told(here):
    first, second = two_places()
    processes = [launch(here, [*RUN, "--output-dir", "run"], first), launch(here, [*RUN, "--seed", "7"], second)]
    (status, there), (other, told) = [end_of(process) for process in processes]
    assert status != 0 and other != 0 and "rank 1: UserError: settings differ" in there
    assert "error: rank 1: settings differ from rank 0: output_dir=None, not run; seed=7, not 42" in told
    assert not (here / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("there", "is_same"),
    [("/disk/plants", True), ("plants", True), ("/here/others", False), ("oxford_flowers102", False)],
)
def test_folders_may_lie_elsewhere_on_another_machine(there, is_same):
    config = TrainingConfig(dataset="/here/plants")
    others = SimpleNamespace(broadcast_object=lambda mine: mine | {"dataset": there})
    with contextlib.nullcontext() if is_same else pytest.raises(UserError, match="dataset=/here/plants, not"):
        distributed.assert_same_across_ranks(dataclasses.asdict(config), others)


def test_two_nodes_over_loopback(here, one):
    """As two machines that share a disk: the same result as one; one node killed ends the other, and all goes on."""
    argv = [*RUN, "--output-dir", "run"]

    def nodes():
        return [launch(here, argv, flags) for flags in two_places()]

    for gone, step, words in (
        (1, 6, "lost the connection to another rank"),
        (0, 12, "the store that connects the ranks is gone"),
    ):
        started = nodes()
        wait_for_step(here / "run", step)
        node = psutil.Process(started[gone].pid)
        for process in [node, *node.children(recursive=True)]:
            process.kill()
        started[gone].communicate()
        status, told = end_of(started[1 - gone])
        assert status != 0 and words in told and "critical" not in told, told
    ends = [end_of(node) for node in nodes()]
    assert [status for status, _ in ends] == [0, 0], ends
    assert "resuming from run/checkpoint-10" in ends[0][1]
    assert_as_one(here / "run", one)


# ---- the pieces


@pytest.mark.parametrize(("images", "size", "processes"), [(50, 7, 2), (49, 16, 3), (3, 16, 4), (32, 16, 2)])
def test_shares_are_the_batches_of_one(images, size, processes):
    batches = BatchSampler(SequentialSampler(range(images)), size, drop_last=False)
    shares = [list(ShardedBatchSampler(batches, process, processes)) for process in range(processes)]
    assert {len(share) for share in shares} == {len(batches)} == {len(ShardedBatchSampler(batches, 0, processes))}
    for number, batch in enumerate(batches):
        parts = [share[number] for share in shares]
        assert sorted(itertools.chain(*parts)) == batch and max(map(len, parts)) - min(map(len, parts)) <= 1


HERE = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{port}"}
BAD_STARTS = [
    ({"RANK": "1", "LOCAL_RANK": "1"}, "RANK=1 LOCAL_RANK=1: one of several ranks, but WORLD_SIZE is missing. Start"),
    ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_STEP_NUM_TASKS=2: one of several ranks, but WORLD_SIZE is missing. Start"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2: RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing from the environ"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: is not a number. Start with torchrun, or unset it"),
    (HERE, "rendezvous at 127.0.0.1:{port} timed out after 2 s: 1 of 2 ranks joined. Start the missing rank"),
    (
        HERE | {"ACCELERATE_USE_FSDP": "true"},
        "ACCELERATE_USE_FSDP=true: the launcher asks for FSDP, which cannot be set up",
    ),
]


@pytest.mark.parametrize(
    ("variables", "words"), BAD_STARTS, ids=["no world", "slurm", "alone", "word", "nobody comes", "fsdp"]
)
def test_a_bad_start_is_told_and_does_not_hang(variables, words, here, monkeypatch, capsys):
    port = a_free_port()
    monkeypatch.setattr(distributed, "RENDEZVOUS_S", 2)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(port=port))
    began = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        train.main(RUN)
    told = capsys.readouterr().out
    assert stopped.value.code == 1 and f"error: {words.format(port=port)}" in told and "Traceback" not in told
    assert time.monotonic() - began < 30 and not (here / "runs").exists()


def test_a_card_too_many_is_told(monkeypatch):
    from runtime.device import UserError, choose_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"LOCAL_RANK=2: torch sees 2 GPUs .*\(torchrun --nproc-per-node 2\)"):
        choose_device("tiny", 0.9, several_ranks=True)


def test_other_programs_are_one_process(trained, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        export.main(["one", "out"])
    assert (
        "error: WORLD_SIZE=2: this program runs as a single process. Start it without torchrun"
        in capsys.readouterr().out
    )
