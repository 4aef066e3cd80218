"""safetensors files as dicts of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch

from .errors import Error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a file by name, on the CPU; Error for a malformed file."""
    library = _library()
    try:
        return library.load(path.read_bytes())
    except Exception as error:
        raise Error(f"[read_tensors] {path}: {error}") from None


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors; shared and strided ones are stored each on its own."""
    plain: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        copy = tensor.detach().cpu().contiguous()
        storage = copy.untyped_storage().data_ptr()
        plain[name] = copy.clone() if storage in seen else copy
        seen.add(storage)
    path.write_bytes(_library().save(plain, metadata={"format": "pt", **(metadata or {})}))


def _library() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError:
        raise Error(
            "[tensor files] adapters are stored as safetensors: install the package safetensors"
        ) from None
    return safetensors.torch
