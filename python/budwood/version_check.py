"""Refuses to load the extension under another torch than the one it was built against.

An extension of one torch release crashes or misreads memory under another, so the versions are
compared before anything of the extension is loaded.
"""

from __future__ import annotations

import importlib
from types import ModuleType


def check_torch_version(running: str, built: str) -> None:
    """Raises ImportError when two torch versions differ in major or minor number."""
    if running.split(".")[:2] != built.split(".")[:2]:
        wanted = ".".join(built.split(".")[:2])
        raise ImportError(
            f"budwood was built against torch {built}, but torch {running} is running: install "
            f"torch {wanted}.* or build budwood again with this torch"
        )


def load_extension() -> ModuleType:
    """Imports budwood._C, which registers the operators torch.ops.budwood.*, after the check."""
    import torch

    try:
        built = importlib.import_module("budwood._build_info").TORCH_VERSION
    except (ModuleNotFoundError, AttributeError):
        raise ImportError(
            "budwood/_build_info.py is missing or incomplete, so budwood was not built: run "
            "`pip install --no-build-isolation .` in its source folder"
        ) from None
    check_torch_version(torch.__version__, built)
    return importlib.import_module("budwood._C")
