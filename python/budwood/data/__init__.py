"""From text to token rows: what is read, how it is tokenised, and which tokens the loss counts."""

from .encode import Encoded, Encoder
from .rows import FORMATS, Row, read_rows
from .token_file import Statistics, write_token_file

__all__ = [
    "FORMATS",
    "Encoded",
    "Encoder",
    "Row",
    "Statistics",
    "read_rows",
    "write_token_file",
]
