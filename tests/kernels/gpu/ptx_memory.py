"""Owns the memory that the PTX emulator (ptx.py) gives a kernel: global arrays and shared memory, every access of both checked.

What raises MemoryAccessError: an address outside of every array (or of the CTA's shared memory); one that is no multiple of the
access's size; different values written to one place by one instruction; shared memory that is read before it was written, and
shared memory that two warps touch, one of them writing, without a barrier between them.
"""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray

GLOBAL_BASE = 1 << 40
"""Address of the first global array; shared addresses and null pointers lie far below."""

ALIGNMENT = 512
"""Of every global array, as torch's allocator gives it; as many bytes lie unmapped between two arrays at least."""

SHARED_LIMIT = 228 * 1024
"""Bytes of shared memory that one CTA has at most (sm_90), with what the system keeps of it."""

WARP = 32


class MemoryAccessError(RuntimeError):
    """A memory access that a GPU would refuse, or whose result would not be defined."""


@dataclass
class Traffic:
    """What the memory was asked for, if `wanted`: requests are a warp's; wavefronts above the least are bank conflicts."""

    wanted: bool = False
    global_requests: int = 0
    global_sectors: int = 0
    shared_requests: int = 0
    shared_wavefronts: int = 0
    shared_wavefronts_least: int = 0


def _where(fault: Array) -> str:
    thread = int(np.flatnonzero(fault)[0])
    return f"thread {thread} of the batch (lane {thread % WARP}), {int(fault.sum())} in all"


class GlobalMemory:
    """The arrays that a kernel was given, copied in, and back at the end."""

    def __init__(self, arrays: list[Array], traffic: Traffic) -> None:
        self._traffic = traffic
        self._arrays, self._bytes, self.addresses = arrays, [], []
        address = GLOBAL_BASE
        for array in arrays:
            size = -(-array.nbytes // 16) * 16
            content = np.zeros(size, dtype=np.uint8)
            content[: array.nbytes] = array.reshape(-1).view(np.uint8)
            self._bytes.append(content)
            self.addresses.append(address)
            address += (-(-size // ALIGNMENT) + 1) * ALIGNMENT
        self._bases = np.array([*self.addresses, address], dtype=np.uint64)

    def copy_back(self) -> None:
        for array, content in zip(self._arrays, self._bytes, strict=True):
            array.reshape(-1).view(np.uint8)[:] = content[: array.nbytes]

    def read(self, addresses: Array, dtype: type, count: int, lanes: Array) -> list[Array]:
        """`count` consecutive elements from each lane's address (uint64); zero for a lane that does not take part."""
        results = [np.zeros(lanes.shape, dtype=dtype) for _ in range(count)]
        for which, chosen, position in self._places(addresses, np.dtype(dtype).itemsize, count, lanes):
            content = self._bytes[which].view(dtype)
            for element, result in enumerate(results):
                result[chosen] = content[position + element]
        return results

    def write(self, addresses: Array, values: list[Array], lanes: Array) -> None:
        size = values[0].dtype.itemsize
        for which, chosen, position in self._places(addresses, size, len(values), lanes):
            content = self._bytes[which].view(values[0].dtype)
            for element, value in enumerate(values):
                content[position + element] = value[chosen]
            for element, value in enumerate(values):
                if np.any(content[position + element] != value[chosen]):
                    raise MemoryAccessError(f"one instruction writes different values to one place of argument array {which}")

    def _places(self, addresses: Array, size: int, count: int, lanes: Array):
        """For each array that is touched: its number, the lanes (index array) and their element positions."""
        active = np.flatnonzero(lanes)
        if len(active) == 0:
            return
        at = addresses[active]
        if np.any(at % np.uint64(size * count)):
            raise MemoryAccessError(
                f"an access of {size * count} bytes is misaligned: address {int(at[0]):#x}, {_where(lanes)}"
            )
        self._count(active, at, size * count)
        array = np.searchsorted(self._bases, at, side="right") - 1
        for which in np.unique(array):
            chosen = active[array == which]
            offset = addresses[chosen].astype(np.int64) - (self.addresses[which] if 0 <= which < len(self._arrays) else 0)
            inside = 0 <= which < len(self._arrays) and np.all(offset + size * count <= self._arrays[which].nbytes)
            if not inside:
                raise MemoryAccessError(self._outside(which, offset, size * count, chosen))
            yield which, chosen, offset // size

    def _outside(self, which: int, offset: Array, size: int, chosen: Array) -> str:
        if not 0 <= which < len(self._arrays):
            return f"an access of {size} bytes at address {int(offset[0]):#x} lies in no array"
        beyond = offset + size > self._arrays[which].nbytes
        return (
            f"an access of {size} bytes at byte {int(offset[beyond][0])} of argument array {which}, "
            f"which has {self._arrays[which].nbytes}: thread {int(chosen[beyond][0])} of the batch"
        )

    def _count(self, active: Array, addresses: Array, size: int) -> None:
        if not self._traffic.wanted:
            return
        warps = active // WARP
        self._traffic.global_requests += len(np.unique(warps))
        sectors = (addresses // np.uint64(32)).astype(np.int64)
        last = (addresses + np.uint64(size - 1)) // np.uint64(32)
        both = np.concatenate([warps * (1 << 44) + sectors, warps * (1 << 44) + last.astype(np.int64)])
        self._traffic.global_sectors += len(np.unique(both))


class SharedMemory:
    """Shared memory of some CTAs, `size` bytes each, and who touched each byte since the CTA's last barrier."""

    def __init__(self, ctas: int, size: int, threads: int, traffic: Traffic) -> None:
        if size > SHARED_LIMIT:
            raise MemoryAccessError(f"a CTA has at most {SHARED_LIMIT} bytes of shared memory, this kernel wants {size}")
        self._size, self._traffic = size, traffic
        self._stride = -(-max(size, 1) // 16) * 16
        self._cta = np.repeat(np.arange(ctas), threads)
        self._warp = np.arange(ctas * threads) // WARP  # unique over the CTAs
        self._bytes = np.zeros(ctas * self._stride, dtype=np.uint8)
        self._epoch = np.zeros(ctas, dtype=np.int32)
        self._written = np.full(self._bytes.shape, -1, dtype=np.int32)  # epoch of the last write, and its warp
        self._writer = np.full(self._bytes.shape, -1, dtype=np.int32)
        self._read = np.full(self._bytes.shape, -1, dtype=np.int32)  # epoch of the last read; its warp, or -1 for several
        self._reader = np.full(self._bytes.shape, -1, dtype=np.int32)

    def barrier(self, ctas: Array) -> None:
        """What was done before lies behind a barrier for these CTAs."""
        self._epoch[ctas] += 1

    def read(self, addresses: Array, dtype: type, count: int, lanes: Array) -> list[Array]:
        """`count` consecutive elements from each lane's address; zero for a lane that does not take part."""
        active, start = self._start(addresses, np.dtype(dtype).itemsize * count, lanes)
        size = np.dtype(dtype).itemsize
        results = [np.zeros(lanes.shape, dtype=dtype) for _ in range(count)]
        for element, result in enumerate(results):
            touched = start[:, None] + element * size + np.arange(size)
            self._check_read(active, touched)
            result[active] = self._bytes[touched].reshape(-1).view(dtype)
        return results

    def write(self, addresses: Array, values: list[Array], lanes: Array) -> None:
        size = values[0].dtype.itemsize
        active, start = self._start(addresses, size * len(values), lanes)
        for element, value in enumerate(values):
            touched = start[:, None] + element * size + np.arange(size)
            content = np.ascontiguousarray(value[active]).view(np.uint8).reshape(-1, size)
            self.check_write(active, touched, content)
            self._put(active, touched, content)

    def write_rows(self, start: Array, rows: Array, threads: Array) -> None:
        """Rows of bytes to addresses by threads, as an asynchronous copy does when it ends."""
        touched = self.place(start, rows.shape[1], threads)[:, None] + np.arange(rows.shape[1])
        self._put(threads, touched, rows)

    def place(self, start: Array, size: int, threads: Array) -> Array:
        """Position in this memory of the threads' shared addresses, checked for size and alignment."""
        if np.any(start % np.uint64(size)):
            raise MemoryAccessError(
                f"a shared access of {size} bytes is misaligned: address {int(start[start % size != 0][0]):#x}"
            )
        if np.any(start + np.uint64(size) > self._size):
            beyond = int(start[start + np.uint64(size) > self._size][0])
            raise MemoryAccessError(f"a shared access of {size} bytes at {beyond:#x}: the CTA has {self._size} bytes")
        return start.astype(np.int64) + self._cta[threads] * self._stride

    def _start(self, addresses: Array, size: int, lanes: Array) -> tuple[Array, Array]:
        active = np.flatnonzero(lanes)
        start = self.place(addresses[active], size, active)
        self._count(active, start, size)
        return active, start

    def _check_read(self, active: Array, touched: Array) -> None:
        epoch, warp = self._epoch[self._cta[active]][:, None], self._warp[active][:, None]
        written = self._written[touched]
        if np.any(written < 0):
            raise MemoryAccessError(
                f"shared memory is read before it is written: address {self._address(touched[written < 0])}"
            )
        foreign = (written == epoch) & (self._writer[touched] != warp)
        if np.any(foreign):
            raise MemoryAccessError(
                f"no barrier between a write and another warp's read of shared {self._address(touched[foreign])}"
            )
        again = (self._read[touched] == epoch) & (self._reader[touched] != warp)
        self._read[touched] = epoch
        self._reader[touched] = np.where(again, -1, warp)
        shared_now = self._reader[touched] != warp  # another warp of this instruction has overwritten the mark
        self._reader[touched[shared_now]] = -1

    def check_write(self, active: Array, touched: Array, content: Array) -> None:
        """Raises MemoryAccessError where another warp's access since the last barrier conflicts with a write."""
        epoch, warp = self._epoch[self._cta[active]][:, None], self._warp[active][:, None]
        read = (self._read[touched] == epoch) & (self._reader[touched] != warp)
        if np.any(read):
            raise MemoryAccessError(
                f"no barrier between a read and another warp's write of shared {self._address(touched[read])}"
            )
        written = (self._written[touched] == epoch) & (self._writer[touched] != warp) & (self._bytes[touched] != content)
        if np.any(written):
            raise MemoryAccessError(f"two warps write shared {self._address(touched[written])} without a barrier")

    def _put(self, active: Array, touched: Array, content: Array) -> None:
        self._bytes[touched] = content
        if np.any(self._bytes[touched] != content):
            raise MemoryAccessError("one instruction writes different values to one place of shared memory")
        self._written[touched] = self._epoch[self._cta[active]][:, None]
        self._writer[touched] = self._warp[active][:, None]

    def _address(self, touched: Array) -> str:
        return f"{int(touched.flat[0]) % self._stride:#x}"

    def _count(self, active: Array, start: Array, size: int) -> None:
        """Wavefronts: 32 banks of four bytes; 8 and 16 bytes a lane go by halves and quarters of a warp."""
        if not self._traffic.wanted:
            return
        parts = max(size // 4, 1)
        group = np.repeat(active * parts // WARP, parts)
        word = (start % self._stride)[:, None] // 4 + np.arange(parts)
        distinct = np.unique(group << 20 | word.reshape(-1))
        depth = np.bincount((distinct >> 20) * 32 + (distinct & 31)).astype(np.int64)
        depth = np.pad(depth, (0, -len(depth) % 32)).reshape(-1, 32).max(axis=1)
        self._traffic.shared_requests += len(np.unique(active // WARP))
        self._traffic.shared_wavefronts += int(depth.sum())
        self._traffic.shared_wavefronts_least += int((depth > 0).sum())


class AsyncCopies:
    """cp.async from global to shared memory: what is copied arrives when its group is waited for, and not before."""

    def __init__(self, memory: GlobalMemory, shared: SharedMemory, threads: int) -> None:
        self._memory, self._shared = memory, shared
        self._group = np.zeros(threads, dtype=np.int64)  # each thread's open group
        self._pending: list[tuple[Array, Array, Array, Array]] = []  # threads, groups, shared addresses, rows of bytes

    def start(self, target: Array, source: Array, size: int, taken: Array, lanes: Array) -> None:
        """Copies `size` bytes between these addresses, or zeros for lanes that have `taken` 0 instead of `size`."""
        words = self._memory.read(source, np.uint32, size // 4, lanes & (taken == size))
        threads = np.flatnonzero(lanes)
        rows = np.ascontiguousarray(np.stack(words, axis=1)[threads]).view(np.uint8)
        place = self._shared.place(target[threads], size, threads)
        self._shared.check_write(threads, place[:, None] + np.arange(size), rows)
        self._pending.append((threads, self._group[threads].copy(), target[threads], rows))

    def commit(self, lanes: Array) -> None:
        self._group[lanes] += 1

    def wait(self, allowed: int | None, lanes: Array) -> None:
        """Until at most `allowed` groups of these threads are pending; None: until nothing is, committed or not."""
        kept = []
        for threads, groups, target, rows in self._pending:
            done = lanes[threads] & (allowed is None or groups < self._group[threads] - (allowed or 0))
            if done.any():
                self._shared.write_rows(target[done], rows[done], threads[done])
            if not done.all():
                kept.append((threads[~done], groups[~done], target[~done], rows[~done]))
        self._pending = kept
