"""budwood merge"""

from __future__ import annotations

import time
from pathlib import Path

from ..errors import Error
from .console import Output, size
from .opening import adapter_names, open_model
from .replacing import check_replaceable

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
    shard = parse_size("merge", max_shard_size)
    if out.exists():
        check_replaceable("merge", out, [model, *adapters], overwrite, "a model folder")
    begin = time.perf_counter()
    merged = open_model(model, dtype, adapters)
    _C.merge(merged, adapter_names(adapters))
    _C.save_model(merged, str(out), dtype, model, shard, overwrite=overwrite)
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


def parse_size(verb: str, text: str) -> int:
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
        raise Error(f"[{verb}] --max-shard-size is {text!r}, wanted a size such as 5GB or 500MB")
    return result
