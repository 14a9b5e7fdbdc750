"""Owns the processes that work on one job together: which of them this one is, what they add up, and how they end together.

Every method is collective, all processes call it in the same order, but for the properties, `poll`, and `send` with its
`receive`. Tensors on GPUs travel by NCCL; everything on CPUs by gloo, which notices at once when a process is gone.

with together() as processes:
    ...
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qtipcli.errors import PeerError, QtipError, SettingsError
from qtipcli.job import interrupt, launcher

TIMEOUT = datetime.timedelta(minutes=30)
"""After this a process that waits for another gives up. A process that dies is noticed at once; this is for one that hangs, and
is longer than the first process takes for what it does alone: download a model, write it."""

BUCKET_ELEMENTS = 1 << 24
"""Small tensors are summed together, up to 64 MiB of float32: a message costs some 100 microseconds whatever its size."""

BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""torch.distributed's name of what carries messages, by the kind of device that computes."""

_TOLD = "qtip/told"  # the store counts here who has said why the job ends
_ASKED = "qtip/asked"  # and keeps here the signal by which a process was asked to stop


class Processes:
    """This process among `world` ones: its number `rank`, from 0. One alone needs no group, and nothing is sent."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    @property
    def is_alone(self) -> bool:
        """Whether there is no other."""
        return self.world == 1

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor, in place, by its sum over all processes; the same bits in each of them.

        tensors: contiguous, of the same shapes and dtypes in every process. Raises QtipError where a process is gone.
        """
        if self.is_alone:
            return
        for bucket in _buckets(tensors):
            flat = bucket[0].view(-1) if len(bucket) == 1 else torch.cat([tensor.view(-1) for tensor in bucket])
            with _peers():
                dist.all_reduce(flat)
            if len(bucket) > 1:
                for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                    tensor.copy_(part.view_as(tensor))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of `parameters`; a process that had nothing to do has none and adds zeros."""
        if self.is_alone:
            return
        known = list(parameters)
        for parameter in known:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
        self.sum_(parameter.grad for parameter in known)

    def sum_numbers(self, *numbers: float) -> list[float]:
        """Each number's sum over all processes, in float64."""
        total = torch.tensor(numbers, dtype=torch.float64)
        self.sum_([total])
        return total.tolist()

    def broadcast(self, value: Any = None) -> Any:
        """What the first process gave, pickled on the way."""
        if self.is_alone:
            return value
        holder = [value]
        with _peers():
            dist.broadcast_object_list(holder, src=0, device=torch.device("cpu"))
        return holder[0]

    def broadcast_(self, tensor: Tensor, source: int) -> None:
        """Make `tensor`, contiguous, in place what it is in the process `source`."""
        if not self.is_alone:
            with _peers():
                dist.broadcast(tensor, source)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors, of one shape and dtype, of all processes in their order."""
        if self.is_alone:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.world)]
        with _peers():
            dist.all_gather(found, tensor)
        return found

    def collect(self, value: Any) -> list[Any]:
        """What each process gave, in their order, pickled on the way."""
        if self.is_alone:
            return [value]
        found: list[Any] = [None] * self.world
        with _peers():
            dist.all_gather_object(found, value)
        return found

    def send(self, tensor: Tensor, to: int) -> Sent:
        """Start to send a contiguous tensor to the process `to`, which calls `receive`; until it arrives it must not change."""
        with _peers():
            return Sent(dist.isend(tensor, to), tensor)

    def receive(self, tensor: Tensor, source: int) -> None:
        """Fill `tensor`, contiguous, with what the process `source` sends next."""
        with _peers():
            dist.recv(tensor, source)

    def barrier(self) -> None:
        """Return when all have come here."""
        self.sum_numbers(0.0)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The first process goes through the body before the others do: what it downloads or caches they find."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def checkpoint(self) -> None:
        """A safe point, as `interrupt.checkpoint`: if a process was asked to stop, all raise StoppedError at the same one."""
        if self.is_alone:
            interrupt.checkpoint()
            return
        asked = torch.tensor(interrupt.requested())
        with _peers():
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        if asked:
            raise interrupt.stopped(int(asked))

    def poll(self) -> None:
        """A safe point that only this process need pass: raises StoppedError once any process was asked to stop."""
        if self.is_alone:
            interrupt.checkpoint()
            return
        with _peers():
            if number := interrupt.requested():
                _store().set(_ASKED, str(number))
            number = _asked()
        if number:
            raise interrupt.stopped(number)


class Sent:
    """A tensor on its way to another process."""

    def __init__(self, work: Any, tensor: Tensor) -> None:
        self._work, self._tensor = work, tensor  # held until it has arrived

    def wait(self) -> None:
        """Return when it has arrived. Raises QtipError where the other process is gone."""
        with _peers():
            self._work.wait()


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in their order, as many in a bucket as are of one dtype and small enough together."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or size + tensor.numel() > BUCKET_ELEMENTS):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


ALONE = Processes()
"""What a stage is given where nobody else works on its job."""


@contextlib.contextmanager
def together(timeout: datetime.timedelta = TIMEOUT) -> Iterator[Processes]:
    """Join the processes that a launcher started with this one; without a launcher, ALONE.

    An exception ends the group, which ends the others. It goes on in the process that it came to first; in the others, which
    fail because of it or for the same reason, it becomes a PeerError, so that one of them speaks.
    timeout: how long one waits for another. Raises SettingsError where the launcher did something else than what it was asked
    for, QtipError where the processes do not find one another.
    """
    launcher.refuse_lone()
    if launcher.world() == 1:
        yield ALONE
        return
    is_ours = not dist.is_initialized()
    processes = _join(timeout)
    try:
        yield processes
    except PeerError:
        raise
    except BaseException as error:
        if _is_first_to_tell():
            raise
        code = error.exit_code if isinstance(error, QtipError) else 130 if isinstance(error, KeyboardInterrupt) else 1
        raise PeerError("another process of this job says why it ends", exit_code=code) from error
    finally:
        if is_ours:
            _leave()


def _join(timeout: datetime.timedelta) -> Processes:
    from accelerate import PartialState

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    world, gpus = launcher.world(), torch.cuda.device_count()
    if kind == "cuda" and launcher.local_rank() >= gpus:
        raise SettingsError(
            f"process {launcher.local_rank() + 1} of this machine sees {gpus} GPUs, and each process needs its own",
            "start as many processes as there are GPUs; with CUDA_VISIBLE_DEVICES= they work on the CPU",
        )
    if "OMP_NUM_THREADS" not in os.environ:
        # accelerate would give each process every core, or fail where the machine does not say how many it has.
        os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    try:
        state = PartialState(cpu=kind == "cpu", backend=BACKENDS[kind], timeout=timeout)
    except (RuntimeError, ValueError, KeyError) as error:
        fact = str(error).strip().split("\n")[0]
        raise QtipError(
            f"the {world} processes do not find one another: {fact}", "start them with torchrun or accelerate launch"
        ) from error
    if state.num_processes != world:
        raise SettingsError(
            f"{world} processes were started, but accelerate's state has {state.num_processes}: each would do all the work",
            "torchrun --nproc_per_node N -m qtipcli ..., on a machine without a GPU with ACCELERATE_USE_CPU=true",
        )
    launcher.note_joined()
    return Processes(state.process_index, state.num_processes)


def _leave() -> None:
    from accelerate import PartialState

    if dist.is_initialized():
        dist.destroy_process_group()
    PartialState._reset_state()  # or the next job of this process would find this one's group


def _is_first_to_tell() -> bool:
    """Whether no other process has said yet why the job ends; also where that cannot be found out."""
    try:
        return _store().add(_TOLD, 1) == 1
    except (RuntimeError, ValueError):
        return True


def _store() -> Any:
    """What the processes met at; small texts that stay readable where messages do not arrive any more."""
    return dist.distributed_c10d._get_default_store()


def _asked() -> int:
    """The signal by which a process was asked to stop, 0 for none."""
    return int(_store().get(_ASKED)) if _store().check([_ASKED]) else 0


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    """What torch says of a message that did not arrive, in words. Nothing but sending and receiving goes in here."""
    try:
        yield
    except RuntimeError as error:
        with contextlib.suppress(RuntimeError, ValueError):
            if number := _asked():  # the other one has stopped, as it was asked to
                raise interrupt.stopped(number) from error
        # Gloo puts its source file before the fact, and advice behind it.
        fact = re.sub(r"^\[[^]]*\] *|\. .*", "", str(error).strip().split("\n")[0])
        raise QtipError(
            f"another process of this job has ended or does not answer: so does this one ({fact})",
            "give the same command again: it goes on from the last saved state, on any number of processes",
        ) from error
