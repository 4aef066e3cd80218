"""An adapter on disk: adapter_config.json beside adapter_model.safetensors (or .bin)."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from .config import PeftConfig
from .errors import Error
from .tensor_files import read_tensors, write_tensors

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"


def find_folder(name: str | os.PathLike[str], subfolder: str | None = None, **hub: object) -> Path:
    """The local folder of an adapter.

    A name that is no folder is taken for a repository of the Hugging Face Hub: only its adapter
    files are downloaded, never the base model that they name.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _download(str(name), **hub)
    folder = folder / subfolder if subfolder else folder
    if not (folder / CONFIG_NAME).is_file():
        raise Error(f"[from_pretrained] {folder} is no adapter: it has no {CONFIG_NAME}")
    return folder


def _download(name: str, **hub: object) -> Path:
    parts = name.split("/")
    if len(parts) > 2 or not all(parts) or name.startswith((".", "~")):
        raise Error(f"[from_pretrained] there is no folder {name!r}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise Error(
            f"[from_pretrained] there is no folder {name!r}, and looking it up on the Hugging Face "
            "Hub needs the package huggingface_hub"
        ) from None
    wanted = [CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME]
    patterns = [*wanted, *(f"*/{file}" for file in wanted)]
    return Path(snapshot_download(name, allow_patterns=patterns, **hub))


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of an adapter folder, on the CPU. The safetensors file is preferred."""
    if (folder / WEIGHTS_NAME).is_file():
        return read_tensors(folder / WEIGHTS_NAME)
    file = folder / PICKLE_NAME
    if not file.is_file():
        raise Error(f"[from_pretrained] {folder} has neither {WEIGHTS_NAME} nor {PICKLE_NAME}")
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise Error(
            f"[from_pretrained] {file} is no pickle of tensors alone; save it as safetensors where "
            f"it came from ({str(error).splitlines()[0]})"
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(t, torch.Tensor) for t in tensors.values()
    ):
        raise Error(f"[from_pretrained] {file} holds no dict of tensors")
    return tensors


def write_adapter(
    folder: Path,
    config: PeftConfig,
    tensors: Mapping[str, torch.Tensor],
    safetensors: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes an adapter so that a killed process leaves no half of one under its name.

    A new folder is written under a hidden name and renamed. In a folder that is there already,
    other files stay, and the config goes first and comes back last: without it there is no adapter.
    """
    folder = Path(os.path.abspath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    at = folder if folder.is_dir() else folder.parent
    hidden = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=at))
    try:
        weights = WEIGHTS_NAME if safetensors else PICKLE_NAME
        if safetensors:
            write_tensors(hidden / weights, tensors, metadata)
        else:
            torch.save(dict(tensors), hidden / weights)
        (hidden / CONFIG_NAME).write_text(config.to_json(), encoding="utf-8")
        for path in (hidden / weights, hidden / CONFIG_NAME, hidden):
            _sync(path)
        if at != folder:
            hidden.chmod(0o777 & ~_umask())
            os.rename(hidden, folder)
        else:
            for stale in (CONFIG_NAME, WEIGHTS_NAME if not safetensors else PICKLE_NAME):
                (folder / stale).unlink(missing_ok=True)
            os.rename(hidden / weights, folder / weights)
            os.rename(hidden / CONFIG_NAME, folder / CONFIG_NAME)
            _sync(folder)
        _sync(at.parent if at == folder else at)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
