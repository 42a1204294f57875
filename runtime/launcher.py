"""What the launcher (torchrun, accelerate launch, Slurm) says by environment variables: which rank this process is."""

import os

from utils.logging_utils import UserError, left_aside

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
OTHER_ENGINES = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
HOW_TO_START = "Start with torchrun, or under Slurm as the README shows."


def get_world_size() -> int:
    """Number of ranks, by the launcher's variables; 1 without a launcher."""
    return launch_number("WORLD_SIZE", 1)


def get_local_world_size() -> int:
    """Number of ranks on this machine."""
    return launch_number("LOCAL_WORLD_SIZE", 1)


def launch_number(name: str, default: int) -> int:
    """A variable that the launcher sets, such as LOCAL_RANK: this rank's index, and its GPU's, on its machine."""
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise UserError(f"{name}={text}: is not a number. Start with torchrun, or unset it.")
    return int(text)


def read_ranks() -> tuple[int, int]:
    """(rank, number of ranks). Raises UserError for variables that contradict each other."""
    world_size = get_world_size()
    if "WORLD_SIZE" not in os.environ:
        names = [name for name in ("RANK", "LOCAL_RANK") if name in os.environ]
        names += ["SLURM_STEP_NUM_TASKS"] if launch_number("SLURM_STEP_NUM_TASKS", 1) > 1 else []
        if found := " ".join(f"{name}={os.environ[name]}" for name in names):
            raise UserError(f"{found}: one of several ranks, but WORLD_SIZE is missing. {HOW_TO_START}")
    if world_size == 1:
        return 0, 1
    if missing := [name for name in VARIABLES if not os.environ.get(name)]:
        raise UserError(f"WORLD_SIZE={world_size}: {', '.join(missing)} missing from the environment. {HOW_TO_START}")
    for name, engine in OTHER_ENGINES.items():
        if left_aside.get(name, "false").lower() == "true":
            problem = f"{name}=true: the launcher asks for {engine}, which cannot be set up from outside"
            raise UserError(f"{problem}. Use torchrun, or accelerate launch --multi_gpu, and --sharding fsdp.")
    if (rank := launch_number("RANK", 0)) >= world_size:
        raise UserError(f"RANK={rank}: is not one of WORLD_SIZE={world_size} ranks, counted from 0. {HOW_TO_START}")
    return rank, world_size


def refuse_several_ranks() -> None:
    """Raise UserError in one of several ranks."""
    world_size = get_world_size()
    if world_size > 1:
        raise UserError(f"WORLD_SIZE={world_size}: this program runs as a single process. Start it without torchrun.")
