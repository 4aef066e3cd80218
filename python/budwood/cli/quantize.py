"""budwood quantize"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import Error
from .console import Output, count, size
from .opening import is_token_file
from .replacing import check_replaceable

GGUF_FORMATS = ("q4_0", "q4_1", "q8_0", "f16", "bf16", "f32")
CALIBRATED = ("gptq", "awq")


def run(
    *,
    model: str,
    out: Path,
    format: str,
    method: str,
    calibration: Path | None,
    options: dict[str, Any],
    tokenizer: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    from .. import _C

    output = Output(as_json)
    if not Path(model).exists():
        raise Error(f"[quantize] {model} does not exist")
    if calibration is not None and not calibration.exists():
        raise Error(f"[quantize] {calibration} does not exist")
    if out.exists():
        kind = "a GGUF file" if format in GGUF_FORMATS else "a model folder"
        check_replaceable("quantize", out, [model, calibration], overwrite, kind)
    begin = time.perf_counter()
    with _calibration_tokens(calibration, tokenizer or model, model) as tokens:
        report = _C.quantize_files(
            model,
            str(out),
            format=format,
            method=method,
            calibration=str(tokens or ""),
            overwrite=overwrite,
            progress=_Progress(output),
            **options,
        )
    seconds = time.perf_counter() - begin
    show(output, report, model, out, format, method, seconds)


def show(
    output: Output,
    report: dict[str, Any],
    model: str,
    out: Path,
    format: str,
    method: str,
    seconds: float,
) -> None:
    """What became of the model, and how far its matrices moved."""
    total = _bytes(out)
    for warning in report["warnings"]:
        output.warn(warning)
    pairs = [
        ("model", f"{model}, {size(_bytes(Path(model)))}"),
        ("written to", f"{out}, {size(total)}"),
        ("format", format if method == "rtn" else f"{format}, {method}"),
    ]
    if report["weights"]:
        bits = 8 * report["bytes"] / report["weights"]
        pairs.append(
            (
                "packed",
                f"{count(len(report['matrices']))} matrices, {report['weights'] / 1e6:.1f} M "
                f"weights, {bits:.2f} bits each",
            )
        )
        pairs.append(("error", _error_text(report, method)))
    pairs.append(("time", f"{seconds:.1f} s"))
    output.figures(pairs)
    output.result(
        {
            "model": model,
            "output": str(out),
            "format": format,
            "method": method,
            "bytes": total,
            "seconds": round(seconds, 3),
            **report,
        }
    )


def _error_text(report: dict[str, Any], method: str) -> str:
    worst = max(report["matrices"], key=lambda matrix: matrix["error"])
    what = "layer outputs on the calibration text" if method in CALIBRATED else "weights"
    text = f"{100 * report['error']:.2f} % of {what}"
    rtn = [m["rtn_error"] for m in report["matrices"] if "rtn_error" in m]
    if rtn:
        mean = (sum(e * e for e in rtn) / len(rtn)) ** 0.5
        text += f", rounding to nearest {100 * mean:.2f} %"
    return f"{text}; most in {worst['name']}, {100 * worst['error']:.2f} %"


class _Progress:
    """Names matrices, or blocks of a model that is calibrated, as they are done, now and then."""

    def __init__(self, output: Output) -> None:
        self.output, self.done, self.said = output, 0, time.perf_counter()

    def __call__(self, name: str) -> None:
        self.done += 1
        if time.perf_counter() - self.said > 5:
            self.said = time.perf_counter()
            self.output.note(f"{name} done, {count(self.done)} so far")


@contextmanager
def _calibration_tokens(
    source: Path | None, tokenizer: str, model: str
) -> Iterator[str | Path | None]:
    """The calibration text as a token file: as it is, or tokenised into a temporary one."""
    if source is None or is_token_file(source):
        yield source
        return
    from .. import _C
    from ..data import write_token_file
    from ..tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory(prefix="budwood-") as folder:
        file = Path(folder) / "calibration.tokens"
        write_token_file(
            source,
            file,
            load_tokenizer(tokenizer),
            vocab_size=_C.read_config(model)["vocab_size"],
        )
        yield file


def _bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.iterdir()
    return sum(file.stat().st_size for file in files if file.is_file())
