"""What --version prints."""

from __future__ import annotations


def version_lines() -> list[str]:
    """Versions of budwood and torch, and the instruction set in use."""
    import torch

    import budwood

    from .. import _C

    built = _C.built_with_torch
    return [
        f"budwood {budwood.__version__}",
        f"torch {torch.__version__} (built with {built})",
        f"instruction set {_C.instruction_set()}",
    ]
