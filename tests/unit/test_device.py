"""Tests of device."""

from types import SimpleNamespace

import pytest
import torch

from runtime.device import available_gpu_memory, available_host_memory, choose_device, choose_precision, fit_workers
from utils.logging_utils import UserError


@pytest.mark.parametrize(
    ("capability", "precision"), [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16"), (None, "no")]
)
def test_auto_precision_is_what_the_gpu_computes_natively(capability, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda" if capability else "cpu")
    assert choose_precision("auto", device) == precision
    assert choose_precision("bf16", device) == "bf16"
    assert choose_precision("no", device) == "no"
    if capability:
        assert choose_precision("fp16", device) == "fp16"


def test_fp16_without_a_gpu_is_refused():
    with pytest.raises(UserError, match="--mixed-precision fp16: needs a CUDA GPU"):
        choose_precision("fp16", torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_small_models_run_on_the_cpu(tmp_path, monkeypatch):
    assert choose_device("tiny", 0.9).type in ("cpu", "mps")
    (tmp_path / "model.safetensors").write_bytes(b"small")
    assert choose_device(str(tmp_path), 0.9).type == "cpu"
    monkeypatch.setattr("runtime.device.CPU_LIMIT_BYTES", 3)
    with pytest.raises(UserError, match="needs a CUDA GPU and torch sees none; .*--preset tiny"):
        choose_device(str(tmp_path), 0.9)
    with pytest.raises(UserError, match="--model ./gone: no such folder"):
        choose_device("./gone", 0.9)
    with pytest.raises(UserError, match="--model llava-hf/some: needs a CUDA GPU"):
        choose_device("llava-hf/some", 0.9)


def test_the_gpu_memory_fraction_is_enforced(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: asked.append(given))
    assert choose_device("tiny", 0.7) == torch.device("cuda", 0)
    assert asked == [(0.7, torch.device("cuda", 0))]


def test_attention_is_never_cudnns(monkeypatch):
    """Its backward of grouped heads is wrong in torch 2.11 (docs/LOG.md)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: None)
    choose_device("tiny", 0.7)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_available_gpu_memory_is_the_fraction_and_never_more_than_is_free(monkeypatch):
    free = 10e9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80e9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5e9)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.9)
    assert available_gpu_memory(torch.device("cuda", 0)) == 15e9
    free = 79e9
    assert available_gpu_memory(torch.device("cuda", 0)) == 72e9
    assert available_gpu_memory(torch.device("cpu")) is None


def test_several_ranks_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="this program runs as a single process"):
        choose_device("tiny", 0.9)


def test_workers_whose_batches_do_not_fit_into_shared_memory_are_not_started(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("runtime.device.shutil.disk_usage", lambda path: SimpleNamespace(free=64e6))
    monkeypatch.setattr("runtime.device.logger.propagate", True)
    assert fit_workers(2, int(12e6), str(tmp_path)) == 2 and not caplog.records
    assert fit_workers(2, int(62e6), str(tmp_path)) == 0
    assert "has 64 MB free and 2 workers need 310 MB" in caplog.text
    caplog.clear()
    assert fit_workers(2, int(62e6), str(tmp_path)) == 0 and not caplog.records  # one warning for both phases
    assert fit_workers(0, int(62e6), str(tmp_path)) == 0


@pytest.mark.parametrize(
    ("limit", "expected"), [("3000000", 3e6 - 2e6 + 5e5), ("1000000", 0), ("max", 7e6), ("9" * 18, 7e6), (None, 7e6)]
)
def test_a_containers_limit_counts_less_its_inactive_page_cache(limit, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("runtime.device.CGROUP", tmp_path)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=7_000_000))
    if limit:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text("2000000\n")
        (tmp_path / "memory.stat").write_text("anon 1500000\ninactive_file 500000\n")
    assert available_host_memory() == expected
