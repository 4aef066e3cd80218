"""Memory of CPU tensors that is handed out again, and activations that take half of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import _C
from .errors import Error


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


@contextmanager
def activation_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside, Budwood's operators keep fp32 activations for the backward in that dtype.

    With torch.bfloat16 a fp32 model keeps about half the bytes of each token. Losses are the same
    to the bit; gradients have bf16's rounding in what they read of the forward (but not of
    attention). It acts on forwards of this thread, of models that run on Budwood's operators:
    those of `budwood.optimize`, and slots of adapters. `train.activation_dtype` in a run's
    configuration.

        with budwood.activation_dtype(torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise Error(
            f"[activation_dtype] activations are kept in float32 or bfloat16, found {dtype}"
        )
    before = _C.kept_in_bfloat16()
    _C.keep_in_bfloat16(dtype == torch.bfloat16)
    try:
        yield
    finally:
        _C.keep_in_bfloat16(before)
