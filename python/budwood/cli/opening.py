"""Opens what several verbs take: a model with its adapters, and data in any form."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import Error
from .console import size


def load_model(
    path: str, dtype: str, weights: str = "auto", quantize: dict[str, Any] | None = None
) -> Any:
    """A C++ model, packed while it is loaded when `quantize` says how."""
    from .. import _C

    options: dict[str, Any] = {}
    if quantize is not None:
        options = {
            "quantize": quantize["format"],
            "block_size": quantize.get("block_size", 64),
            "double_quant": quantize.get("double_quant", False),
        }
        if quantize.get("skip") is not None:
            options["quantize_skip"] = quantize["skip"]
    return _C.load_model(path, dtype, weights, **options)


def open_model(path: str, dtype: str, adapters: list[str], quantize: str | None = None) -> Any:
    """A C++ model with adapters attached, all of them active."""
    from .. import _C

    if not Path(path).exists():
        raise Error(f"[load_model] {path} does not exist")
    for folder in adapters:
        if not Path(folder).exists():
            raise Error(f"[load_adapter] {folder} does not exist")
    model = load_model(path, dtype, quantize=None if quantize is None else {"format": quantize})
    names = adapter_names(adapters)
    for name, folder in zip(names, adapters):
        _C.load_adapter(model, folder, name)
    if names:
        _C.set_active(model, names)
    model.eval()
    return model


def weights_text(model: Any) -> str:
    """What a model's matrices are and take: "106.2 M weights as GGUF Q4_1 in 66.4 MB"."""
    from .. import _C

    return ", ".join(
        f"{part['weights'] / 1e6:.1f} M weights as {part['form']} in {size(part['bytes'])}"
        for part in _C.base_weights(model)
    )


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
