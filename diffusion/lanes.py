"""Workers that compute on one CPU thread each, several side by side.

How a CPU kernel splits its work over threads changes the order of its sums, and so the last bits of its results, even
between the rows of one batch. On one thread every row of a batch of fixed size is computed alike, wherever it stands.
So instead of spreading one batch over all cores, each core gets batches of its own: results do not depend on the number
of cores, and nothing waits for the slowest thread of a kernel.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Lanes:
    """`count` workers on a CPU; on other devices, which order their own sums, the calling thread itself."""

    def __init__(self, device: torch.device | None, count: int | None = None) -> None:
        """device None: the calling thread, with all threads of its own, whatever the device.
        count None: as many as torch has threads (OMP_NUM_THREADS) on a CPU, 1 elsewhere."""
        is_cpu = device is not None and device.type == "cpu"
        self.count = count or (torch.get_num_threads() if is_cpu else 1)
        # torch keeps the number of threads for each calling thread: that of the others stays as it is
        self._pool = (
            ThreadPoolExecutor(self.count, "lane", initializer=torch.set_num_threads, initargs=(1,)) if is_cpu else None
        )

    def submit(self, function: Callable[..., T], *arguments: Any) -> "Future[T]":
        """Begin function(*arguments); `result()` of what is returned waits for it, and raises its exception."""
        if self._pool is not None:
            return self._pool.submit(function, *arguments)
        future: Future[T] = Future()
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)  # raised by `result()`, as in a lane
        return future
