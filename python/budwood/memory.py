"""Memory of CPU tensors that is handed out again instead of given back to the system."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from . import _C


@contextmanager
def memory_pool() -> Iterator[None]:
    """Inside, CPU tensors of the whole process that are larger than 64 KB come from a pool.

    A training step asks for the same sizes again and again; with the pool it faults in no new
    pages, and holds no more than the most that was in use at one time. `budwood train` uses it by
    itself; around a loop of your own, or HF's Trainer:

        with budwood.memory_pool():
            trainer.train()

    Tensors stay valid afterwards.
    """
    pool = _C.enter_memory_pool()
    try:
        yield
    finally:
        del pool
