"""budwood eval"""

from __future__ import annotations

from pathlib import Path

from .console import Output, count, duration
from .opening import open_data, open_model
from .progress import error_text


def run(
    data: Path,
    *,
    model: str,
    adapters: list[str],
    sequence_length: int,
    form: str,
    bos: bool | None,
    eos: bool,
    tokenizer: str | None,
    dtype: str,
    quantize: str | None,
    as_json: bool,
) -> None:
    from .. import _C

    output = Output(as_json)
    loaded = open_model(model, dtype, adapters, quantize)
    with open_data(data, tokenizer or model, loaded, form=form, bos=bos, eos=eos) as file:
        sampler = _C.Sampler(
            file,
            sequence_length=sequence_length,
            batch_size=1,
            packing="pack",
            long_rows="split",
            shuffle=False,
        )
        figures = _C.evaluate(loaded, sampler)
    output.figures(
        [
            ("loss", f"{figures['loss']:.4f}{error_text(figures['loss_error'], 4)}"),
            (
                "perplexity",
                f"{figures['perplexity']:.3f}{error_text(figures['perplexity_error'], 3)}",
            ),
            ("tokens", f"{count(figures['tokens'])} in {count(figures['sequences'])} windows"),
            ("time", duration(figures["seconds"])),
        ]
    )
    output.result({"model": model, "adapters": adapters, "data": str(data), **figures})
