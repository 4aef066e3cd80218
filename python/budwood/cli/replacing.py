"""What may be replaced by a verb's output."""

from __future__ import annotations

from pathlib import Path

from ..errors import Error


def check_replaceable(
    verb: str, out: Path, sources: list[str | Path | None], overwrite: bool, kind: str
) -> None:
    """Refuses an output that exists unless it may go: with --overwrite, and only if it is a model
    that is not read from."""
    if not overwrite:
        raise Error(f"[{verb}] {out} exists; choose another name or give --overwrite")
    for source in sources:
        if source is None:
            continue
        path = Path(source).resolve()
        if out.resolve() == path or out.resolve() in path.parents:
            raise Error(f"[{verb}] {out} holds {source}, which is read; choose another name")
    if kind == "a GGUF file":
        known = out.is_file() and out.open("rb").read(4) == b"GGUF"
    else:
        known = out.is_dir() and (out / "config.json").exists()
    if not known:
        raise Error(f"[{verb}] {out} is not {kind}, so it is not replaced")
