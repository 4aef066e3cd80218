"""budwood merge"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from ..errors import Error
from .console import Output, size
from .opening import adapter_names, open_model

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def run(
    *,
    model: str,
    adapters: list[str],
    out: Path,
    dtype: str,
    max_shard_size: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    from .. import _C

    output = Output(as_json)
    shard = parse_size(max_shard_size)
    if out.exists():
        if not overwrite:
            raise Error(f"[merge] {out} exists; choose another folder or give --overwrite")
        for source in (model, *adapters):
            if (
                out.resolve() == Path(source).resolve()
                or out.resolve() in Path(source).resolve().parents
            ):
                raise Error(f"[merge] {out} holds {source}, which is read; choose another folder")
        if not out.is_dir() or not (out / "config.json").exists():
            raise Error(f"[merge] {out} is no model folder, so it is not replaced")
    begin = time.perf_counter()
    merged = open_model(model, dtype, adapters)
    _C.merge(merged, adapter_names(adapters))
    if out.exists():
        shutil.rmtree(out)
    _C.save_model(merged, str(out), dtype, model, shard)
    files = sorted(f for f in out.iterdir() if f.is_file())
    total = sum(f.stat().st_size for f in files)
    seconds = time.perf_counter() - begin
    output.figures(
        [
            ("model", model),
            ("adapters", ", ".join(adapters)),
            ("merged into", str(out)),
            ("files", ", ".join(f.name for f in files)),
            ("size", size(total)),
            ("time", f"{seconds:.1f} s"),
        ]
    )
    output.result(
        {
            "model": model,
            "adapters": adapters,
            "output": str(out),
            "files": [f.name for f in files],
            "bytes": total,
            "seconds": round(seconds, 3),
        }
    )


def parse_size(text: str) -> int:
    """'5GB' -> 5000000000."""
    upper = text.strip().upper()
    number, factor = upper, 1.0
    for unit, value in UNITS.items():
        if upper.endswith(unit):
            number, factor = upper.removesuffix(unit), value
    try:
        result = int(float(number) * factor)
    except ValueError:
        result = 0
    if result <= 0:
        raise Error(f"[merge] --max-shard-size is {text!r}, wanted a size such as 5GB or 500MB")
    return result
