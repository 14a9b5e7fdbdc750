"""Owns what a launcher (torchrun, accelerate launch, mpirun) says to a process through its environment, and leaves unsaid.

No torch here: the command line asks this file before anything heavy is imported.
"""

from __future__ import annotations

import os
import time

from qtipcli.errors import SettingsError

WORLD_VARIABLES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where the number of processes stands (accelerate.state): torchrun and accelerate; MPICH and Intel MPI; Open MPI; MVAPICH."""

SHARED = ("calibrate", "quantize", "finetune")
"""The commands that several processes can share."""

FIRST_SPEAKS_S = 5.0
"""How long others leave the word to the first process: torchrun looks every 0.1 s whether one has failed, then ends all."""

_has_joined = False  # of this process; it can join more than once, but then the first words were said long before


def world() -> int:
    """Processes that were started together; 1 without a launcher."""
    return max(1, *(_number(name, 1) for name in WORLD_VARIABLES))


def rank() -> int:
    """This process's number among them, from 0."""
    return _number("RANK", 0)


def local_rank() -> int:
    """Its number among those on this machine, from 0: by convention that of its GPU."""
    return _number("LOCAL_RANK", 0)


def let_first_speak() -> None:
    """Call before a failure is put into words: what fails before the processes have joined mostly fails in all of them.

    Returns at once in the first process and after a while in the others, which the launcher ends as soon as the first has
    failed: so it is said once. What fails in another process alone is said late, but it is said.
    """
    if rank() > 0 and not _has_joined:
        time.sleep(FIRST_SPEAKS_S)


def note_joined() -> None:
    """Remember that the processes have joined: from here on they agree by themselves on who speaks."""
    global _has_joined
    _has_joined = True


def refuse_several(command: str) -> None:
    """Raise SettingsError where `command` was started as one of several processes."""
    if world() > 1:
        raise SettingsError(
            f"qtip {command} was started as {world()} processes: only {', '.join(SHARED)} run on several",
            f"start qtip {command} without torchrun or accelerate launch (in the environment: WORLD_SIZE unset)",
        )


def refuse_lone() -> None:
    """Raise SettingsError where accelerate was asked for several processes and started one.

    `accelerate launch --cpu --num_processes 2` does so, and with fewer than two GPUs the same without --cpu, unless it is told
    --multi_gpu. It leaves a trace: an address to meet at, set for more than one process only
    (accelerate.utils.launch.prepare_simple_launcher_cmd_env), and no number of processes. An MPI gives that number itself.
    """
    is_by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if is_by_accelerate and "MASTER_PORT" in os.environ and not any(name in os.environ for name in WORLD_VARIABLES):
        raise SettingsError(
            "accelerate launch was asked for several processes and started one, as it does with --cpu or without GPUs",
            "torchrun --nproc_per_node N -m qtipcli ..., or accelerate launch --num_processes 1",
        )


def _number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        return default
