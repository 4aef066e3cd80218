"""budwood merge"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..errors import Error
from ..merging import with_weights
from .console import Output, size
from .opening import adapter_names, open_model
from .replacing import check_replaceable

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def run(
    *,
    model: str,
    adapters: list[str],
    weights: list[float],
    out: Path,
    into: str,
    original: Path | None,
    dtype: str,
    max_shard_size: str,
    jobs: int,
    overwrite: bool,
    force: bool,
    resume: bool,
    backup: bool,
    as_json: bool,
) -> None:
    from .. import _C

    output = Output(as_json)
    shard = parse_size("merge", max_shard_size)
    if out.exists():
        kind = "a GGUF file" if out.suffix == ".gguf" else "a model folder"
        check_replaceable("merge", out, [model, *adapters], overwrite, kind)
    pairs = with_weights(adapters, weights)
    begin = time.perf_counter()
    whole = _C.why_not_streamed(model, pairs)
    report = None
    if whole is None:
        report = _C.merge_files(
            model,
            pairs,
            out,
            into=into,
            original=original or "",
            dtype=dtype,
            max_shard_size=shard,
            jobs=jobs,
            overwrite=overwrite,
            force=force,
            resume=resume,
            backup=backup,
        )
        for warning in report.warnings:
            output.warn(warning)
    elif any(weight != 1.0 for _, weight in pairs):
        raise Error(f"[merge] --weight is for models that are merged piece by piece; {whole}")
    elif into != "dequantised" or out.suffix == ".gguf":
        raise Error(f"[merge] a folder of plain weights can be made, no other output; {whole}")
    else:
        merged = open_model(model, dtype, adapters)
        _C.merge(merged, adapter_names(adapters))
        _C.save_model(merged, str(out), dtype, model, shard, overwrite=overwrite)
    files = sorted(f for f in out.iterdir() if f.is_file()) if out.is_dir() else [out]
    total = sum(f.stat().st_size for f in files)
    seconds = time.perf_counter() - begin
    figures = [
        ("model", model),
        ("adapters", ", ".join(adapters)),
        ("merged into", str(out)),
        ("files", ", ".join(f.name for f in files)),
        ("size", size(total)),
        ("time", f"{seconds:.1f} s"),
    ]
    result = {
        "model": model,
        "adapters": adapters,
        "output": str(out),
        "files": [f.name for f in files],
        "bytes": total,
        "seconds": round(seconds, 3),
        "merged": None,
    }
    if report is not None:
        worst = max(report.merged, key=lambda tensor: tensor.error, default=None)
        figures.insert(3, ("weights", f"{len(report.merged)} changed, {len(report.replaced)} new"))
        if worst is not None:
            figures.insert(4, ("rounding", f"up to {worst.error:.2%} of a change ({worst.name})"))
            least = min(report.merged, key=lambda tensor: tensor.survival)
            figures.insert(5, ("survives", f"at least {least.survival:.2%} ({least.name})"))
            far = max((t for t in report.merged if t.distance), key=_distance, default=None)
            if far is not None:
                text = f"what was trained is up to {far.distance:.3g} changes away ({far.name})"
                figures.insert(6, ("distance", text))
        result["merged"] = [
            {
                key: getattr(tensor, key)
                for key in ("name", "weight_norm", "delta_norm", "survival", "error", "distance")
            }
            for tensor in report.merged
        ]
    output.figures(figures)
    output.result(result)


def _distance(tensor: Any) -> float:
    return tensor.distance or 0.0


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
