"""The command line. Nothing heavy is imported before a verb runs: --help answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `budwood VERB ...`; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from .app import run
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "yaml"):
            raise
        print(
            f"budwood: the command line needs {error.name}: pip install 'budwood[cli]'",
            file=sys.stderr,
        )
        return 1
    return run(arguments)
