"""Owns how CPU kernels share their work: ranges handed to a pool of threads, which compiled code that frees the GIL can use.

Not Numba's own parallel loops: their compilation takes seconds a trellis, and their default scheduler may not be entered from
two Python threads at once.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numba


def thread_count() -> int:
    """Threads that CPU kernels use: NUMBA_NUM_THREADS, else the cores this process may run on."""
    return numba.get_num_threads()


def for_ranges(count: int, step: int, work: Callable[[int, int], None]) -> None:
    """Call work(start, stop) over range(count) in pieces of `step`, on every core; a single piece on the calling thread.

    Pieces are handed out one by one, so that a core that the machine slows down takes fewer. Which thread takes which piece is
    left open: `work` must write only what belongs to its range. Raises what `work` raises.
    """
    pieces = [(start, min(start + step, count)) for start in range(0, count, step)]
    if len(pieces) <= 1 or thread_count() == 1:
        for start, stop in pieces:
            work(start, stop)
        return
    for done in [_pool(os.getpid()).submit(work, start, stop) for start, stop in pieces]:
        done.result()


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    # One for each process: threads do not survive a fork.
    return ThreadPoolExecutor(thread_count(), thread_name_prefix=f"qtip-{process}")
