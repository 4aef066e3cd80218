"""budwood tokenize"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

from rich.text import Text

from ..data import Encoded, Row, write_token_file
from ..tokenizer import load_tokenizer
from .console import Output, count

TARGET = "bold green"
SHOWN_TOKENS = 2000


def run(
    source: Path,
    *,
    model: str,
    out: Path | None,
    form: str,
    sequence_length: int | None,
    bos: bool | None,
    eos: bool,
    show: int,
    as_json: bool,
) -> None:
    output = Output(as_json)
    tokenizer = load_tokenizer(model)
    shown = 0

    def on_row(row: Row, encoded: Encoded) -> None:
        nonlocal shown
        if shown < show:
            shown += 1
            show_row(output, tokenizer, row, encoded)

    with tempfile.TemporaryDirectory(prefix="budwood-") as folder:
        target = out or Path(folder) / "counted.tokens"
        statistics = write_token_file(
            source,
            target,
            tokenizer,
            form=form,
            bos=bos,
            eos=eos,
            sequence_length=sequence_length,
            on_row=on_row,
        )
    pairs = [
        ("rows", count(statistics.rows)),
        ("tokens", count(statistics.tokens)),
        ("targets", f"{count(statistics.targets)} ({statistics.targets / statistics.tokens:.1%})"),
        ("longest row", count(statistics.longest)),
    ]
    if sequence_length is not None:
        pairs.append((f"longer than {sequence_length}", count(statistics.truncated)))
    output.figures(pairs)
    for warning in statistics.warnings:
        output.warn(warning)
    if out is not None:
        output.say(f"written to {out}")
    output.result({**statistics.as_dict(), "output": None if out is None else str(out)})


def show_row(output: Output, tokenizer: Any, row: Row, encoded: Encoded) -> None:
    """Prints a row; what the loss counts stands in colour, or between ⟦ and ⟧ without colours."""
    output.say(f"{row.place}  {len(encoded)} tokens, {encoded.targets} targets", style="dim")
    text = Text()
    marked = output.terminal and not output.console.no_color
    ids, counted = encoded.ids[:SHOWN_TOKENS], encoded.counted[:SHOWN_TOKENS]
    for begin, end in runs(counted):
        piece = tokenizer.decode(ids[begin:end], clean_up_tokenization_spaces=False)
        if not counted[begin]:
            text.append(piece, style="dim")
        else:
            text.append(piece if marked else f"⟦{piece}⟧", style=TARGET)
    if len(encoded) > SHOWN_TOKENS:
        text.append(f" ... {len(encoded) - SHOWN_TOKENS} more tokens", style="dim")
    output.console.print(text)
    output.say()


def runs(flags: list[bool]) -> list[tuple[int, int]]:
    """[begin, end) of each stretch of equal flags."""
    edges = [0, *(i for i in range(1, len(flags)) if flags[i] != flags[i - 1]), len(flags)]
    return list(itertools.pairwise(edges))
