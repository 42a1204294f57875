"""Where a run computes, how precisely, and its memory. Little but torch is imported, for quick errors."""

import contextlib
import gc
import resource
import shutil
import sys
from pathlib import Path

import psutil
import torch

from config.training_config import CPU_MODELS
from runtime.launcher import get_world_size, launch_number, refuse_several_ranks
from utils.logging_utils import UserError, logger

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")  # of a container, which sees its own group there
CPU_LIMIT_BYTES = 4e9  # of weights on disk; a larger model would take minutes a step without a GPU
warned_of: set[str] = set()  # folders of shared memory: a run asks for its training and for its evaluation
BF16_CAPABILITY = (8, 0)  # Ampere; older GPUs only emulate it, and torch counts that as support


def choose_device(model: str, gpu_memory_fraction: float, several_ranks: bool = False) -> torch.device:
    """CUDA, limited to its share of the GPU; else the CPU for small models, or Apple's MPS for one of CPU_MODELS.

    Raises UserError where the model needs a GPU or a rank has none, and for several ranks unless the caller takes them.
    """
    if not several_ranks:
        refuse_several_ranks()
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        move = "use one with config.json and *.safetensors, or a Hugging Face Hub id"
        raise UserError(f"--model {model}: no such folder; {move}")
    if torch.cuda.is_available():
        num_gpus, index = torch.cuda.device_count(), launch_number("LOCAL_RANK", 0)
        if index >= num_gpus:
            move = f"Start one rank per GPU (torchrun --nproc-per-node {num_gpus}), or check CUDA_VISIBLE_DEVICES."
            raise UserError(f"LOCAL_RANK={index}: torch sees {num_gpus} GPUs on this machine. {move}")
        device = torch.device("cuda", index)
        torch.cuda.set_device(device)
        torch.cuda.set_per_process_memory_fraction(gpu_memory_fraction, device)
        # cuDNN's attention (torch 2.11, H100) made gradients of the stock layers 1,300 times too large (docs/LOG.md).
        torch.backends.cuda.enable_cudnn_sdp(False)
        return device
    if model in CPU_MODELS:
        return torch.device("mps" if torch.backends.mps.is_available() and get_world_size() == 1 else "cpu")
    weights = sum(file.stat().st_size for file in Path(model).glob("*.safetensors"))
    if Path(model).is_dir() and weights < CPU_LIMIT_BYTES:
        return torch.device("cpu")
    move = "check nvidia-smi and the driver, or try --preset tiny, which runs on the CPU"
    raise UserError(f"--model {model}: needs a CUDA GPU and torch sees none; {move}")


def choose_precision(requested: str, device: torch.device) -> str:
    """bf16, fp16 or no. Raises UserError for fp16 without CUDA, where nothing would scale the loss."""
    if requested == "fp16" and device.type != "cuda":
        raise UserError("--mixed-precision fp16: needs a CUDA GPU, elsewhere nothing scales the loss; use no or auto")
    if requested != "auto":
        return requested
    if device.type != "cuda":
        return "no"
    return "bf16" if torch.cuda.get_device_capability(device) >= BF16_CAPABILITY else "fp16"


def fit_workers(num_workers: int, batch_bytes: int, shared_memory: str = "/dev/shm") -> int:
    """`num_workers` if their batches fit into shared memory, else 0 and a warning: they would wait for ever.

    Two batches per worker are prefetched, and one is in use. Docker gives a container 64 MiB.
    """
    if num_workers == 0 or not Path(shared_memory).is_dir():
        return num_workers
    free, needed = shutil.disk_usage(shared_memory).free, (2 * num_workers + 1) * batch_bytes
    if free >= needed:
        return num_workers
    if shared_memory not in warned_of:
        warned_of.add(shared_memory)
        problem = f"has {free / 1e6:.0f} MB free and {num_workers} workers need {needed / 1e6:.0f} MB"
        move = "images are decoded by the main process instead (docker run --shm-size=1g, or fewer --num-workers)"
        logger.warning(f"{shared_memory} {problem}; {move}")
    return 0


def describe_gpu(device: torch.device) -> str:
    """The name of a CUDA GPU, else the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# ---- memory


def collect_memory(device: torch.device) -> None:
    gc.collect()
    torch.cuda.empty_cache()  # nothing to do without CUDA


def memory_in_use(device: torch.device) -> int:
    """Bytes that torch has allocated on a CUDA GPU now, else the process's resident size."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch had allocated on a CUDA GPU, else the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device) -> None:
    """peak_memory starts again from now, on a CUDA GPU; the largest resident size of a process cannot be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def available_gpu_memory(device: torch.device) -> float | None:
    """Bytes that this process may use on a CUDA GPU, including what it holds; None elsewhere."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return min(torch.cuda.get_per_process_memory_fraction(device) * total, free + torch.cuda.memory_reserved(device))


def available_host_memory() -> int:
    """Bytes of the CPU's memory that this process may take, by what is free and by a container's limit (cgroup v2).

    The limit counts cached files, of which the kernel gives up what is inactive.
    """
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no limit ("max"), or no cgroup v2
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(stat["inactive_file"]))
    return max(free, 0)


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA GPU has done all work launched on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch, cuBLAS, Triton or the driver (asked for page-locked memory) says so."""
    from accelerate.utils.memory import should_reduce_batch_size

    message = str(error).lower()
    says_so = isinstance(error, RuntimeError) and ("out of memory" in message or "alloc_failed" in message)
    return says_so or isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
