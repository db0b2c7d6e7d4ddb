"""Preparing items in threads, a few ahead of the one that is worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

EACH = 2  # how many items are ahead, for each thread: one ready, one in the making

Item = TypeVar("Item")


def ahead(
    items: Iterable[Item], prepare: Callable[[Item], Any], threads: int
) -> Generator[tuple[Item, Callable[[], Any]], None, None]:
    """Each item, and a call that waits for what `prepare` makes of it, or raises what it raised.

    Close it when you stop early: it then waits for what is being made, and begins nothing more.

    Args:
        items: the items, in the order in which they are wanted.
        prepare: what is done ahead.
        threads: how many items are prepared at once, twice as many being ahead; 0 to prepare each
            when it is its turn.
    """
    if threads == 0:
        yield from ((item, partial(prepare, item)) for item in items)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prepare")
    try:
        coming = deque[tuple[Item, Callable[[], Any]]]()
        for item in items:
            coming.append((item, pool.submit(prepare, item).result))
            if len(coming) > EACH * threads:
                yield coming.popleft()
        while coming:
            yield coming.popleft()
    finally:
        pool.shutdown(cancel_futures=True)
