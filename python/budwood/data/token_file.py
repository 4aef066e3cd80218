"""Writes token files and says what is in them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..tokenizer import fingerprint, vocabulary_size
from .encode import Encoded, Encoder
from .rows import Row, read_rows


@dataclass
class Statistics:
    """What a token file holds. `truncated`: rows longer than `sequence_length` inputs, which
    training cuts unless it packs by "concat" or splits long rows; `without_targets`: rows of which
    then nothing is left to learn from. `lost`: bytes of text that the tokeniser has no token
    for, and unknown tokens; `first_lost`: the first row that has some."""

    rows: int = 0
    tokens: int = 0
    targets: int = 0
    longest: int = 0
    sequence_length: int | None = None
    truncated: int = 0
    without_targets: int = 0
    lost: int = 0
    first_lost: str | None = None

    def add(self, row: Encoded, place: str) -> None:
        self.rows += 1
        self.tokens += len(row)
        self.targets += row.targets
        self.longest = max(self.longest, len(row))
        self.lost += row.lost
        if row.lost and self.first_lost is None:
            self.first_lost = place
        if self.sequence_length is not None:
            end = self.sequence_length + 1
            self.truncated += len(row) > end
            self.without_targets += not any(row.counted[1:end])

    @property
    def warnings(self) -> list[str]:
        """What a person should know before training."""
        found = []
        if self.lost:
            found.append(
                f"the tokeniser knows no token for {self.lost:,} pieces of the text, which are "
                f"lost; the first are in {self.first_lost}"
            )
        if self.without_targets:
            found.append(
                f"{self.without_targets:,} of {self.rows:,} rows have no target within "
                f"{self.sequence_length} tokens: training leaves them out unless it splits long "
                "rows"
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def write_token_file(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    tokenizer: Any,
    *,
    form: str = "auto",
    bos: bool | None = None,
    eos: bool = True,
    sequence_length: int | None = None,
    vocab_size: int | None = None,
    on_row: Callable[[Row, Encoded], None] | None = None,
) -> Statistics:
    """Tokenises a text file, a folder or JSON lines into a token file.

    The file appears whole or not at all. vocab_size: of the model, when it is larger than the
    tokeniser's. on_row is called with each row as it is done.
    """
    from .. import _C

    encoder = Encoder(tokenizer, bos=bos, eos=eos)
    size = max(vocabulary_size(tokenizer), vocab_size or 0)
    writer = _C.TokenFileWriter(str(Path(output)), size, fingerprint(tokenizer))
    statistics = Statistics(sequence_length=sequence_length)
    for row in read_rows(source, form):
        encoded = encoder(row)
        writer.add(encoded.ids, encoded.counted)
        statistics.add(encoded, row.place)
        if on_row is not None:
            on_row(row, encoded)
    writer.commit()
    return statistics
