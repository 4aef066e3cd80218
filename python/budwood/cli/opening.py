"""Opens what several verbs take: a model with its adapters, and data in any form."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import Error


def open_model(path: str, dtype: str, adapters: list[str]) -> Any:
    """A C++ model with adapters attached, all of them active."""
    from .. import _C

    if not Path(path).exists():
        raise Error(f"[load_model] {path} does not exist")
    for folder in adapters:
        if not Path(folder).exists():
            raise Error(f"[load_adapter] {folder} does not exist")
    model = _C.load_model(path, dtype)
    names = adapter_names(adapters)
    for name, folder in zip(names, adapters):
        _C.load_adapter(model, folder, name)
    if names:
        _C.set_active(model, names)
    model.eval()
    return model


def adapter_names(adapters: list[str]) -> list[str]:
    """Names under which adapter folders are attached."""
    return ["default", *(f"adapter{i}" for i in range(2, len(adapters) + 1))][: len(adapters)]


def is_token_file(path: Path) -> bool:
    """Whether a file begins as token files do."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(8) == b"BUDWTOKS"


@contextmanager
def open_data(
    source: Path, tokenizer: str, model: Any, *, form: str, bos: bool | None, eos: bool
) -> Iterator[Any]:
    """A token file as it is, or text tokenised into a temporary one."""
    from .. import _C

    if not source.exists():
        raise Error(f"[data] {source} does not exist")
    if is_token_file(source):
        yield _C.TokenFile.open(str(source))
        return
    from ..data import write_token_file
    from ..tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory(prefix="budwood-") as folder:
        file = Path(folder) / "data.tokens"
        write_token_file(
            source,
            file,
            load_tokenizer(tokenizer),
            form=form,
            bos=bos,
            eos=eos,
            vocab_size=model.config["vocab_size"],
        )
        yield _C.TokenFile.open(str(file))
