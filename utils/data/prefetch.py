"""Make the next batches while the current one is computed."""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetch(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """`items` in their order, made by a thread that runs at most `depth` of them ahead.

    What the thread raises is raised here, in its place. The thread ends with this iterator, or one item later.
    """
    waiting: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(depth)
    ended = threading.Event()

    def put(item: T | None, error: BaseException | None, last: bool) -> None:
        while not ended.is_set():
            try:
                return waiting.put((item, error, last), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item, None, False)
                if ended.is_set():
                    return
            put(None, None, True)
        except BaseException as error:
            put(None, error, True)

    threading.Thread(target=work, name="prefetch", daemon=True).start()
    try:
        while True:
            item, error, last = waiting.get()
            if error is not None:
                raise error
            if last:
                return
            yield item
    finally:
        ended.set()
