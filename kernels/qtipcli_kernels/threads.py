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
    # Not numba.get_num_threads(): that starts Numba's own threads, and with them sets how many OpenMP gives torch.
    return numba.config.NUMBA_NUM_THREADS


def for_ranges(count: int, step: int, work: Callable[[int, int], None]) -> None:
    """Call work(start, stop) over range(count) in pieces of `step`, on every core; a single piece on the calling thread.

    Pieces are handed out one by one, so that a core that the machine slows down takes fewer. The calling thread takes its share
    and waits only for pieces that others have begun. Which thread takes which piece is left open: `work` must write only what
    belongs to its range. Raises what `work` raises.
    """
    pieces = iter(range(0, count, step))

    def take_pieces() -> None:
        # Threads share the iterator; stepping it is atomic under the GIL.
        for start in pieces:
            work(start, min(start + step, count))

    helpers = [_pool(os.getpid()).submit(take_pieces) for _ in range(min(thread_count(), -(-count // step)) - 1)]
    try:
        take_pieces()
    finally:
        # After an error nobody begins another piece; a helper that has not started by now has nothing left to do.
        for _ in pieces:
            pass
        begun = [helper for helper in helpers if not helper.cancel()]
        for helper in begun:
            helper.result()


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    # One for each process: threads do not survive a fork.
    return ThreadPoolExecutor(max(1, thread_count() - 1), thread_name_prefix=f"qtip-{process}")
