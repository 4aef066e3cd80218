"""What packing a base costs: SmolLM2-135M on Shakespeare's plays, before and after LoRA.

    python benchmarks/quality.py [--steps 60] [--only nf4,nf4-gptq] [--json FILE]

Each row packs the same 16-bit model with `budwood quantize` and trains LoRA of rank 16 on it with
`budwood train`, the same rows in the same order, in processes of their own. Losses are those of
held-out text (Hamlet) before and after, gaps their distance from the 16-bit rows; the calibrated
methods read 16,384 tokens of the training text. Rows with loftq and eora begin with factors that
make up for a part of the error; their loss before is that of the base alone. The 16-bit model is
the package's Q4_1 file decoded, so integers with a zero point per 32 weights hold it exactly; nf4
and int4 in groups of 64 do not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import chosen, cpu_name

DEMO = Path(__file__).parents[1] / "examples" / "demo"
sys.path.insert(0, str(DEMO))

WINDOW, HELD_OUT_FROM, HELD_OUT_TOKENS = 256, 2000, 8192
DATA = ["--calibration", "{train}", "--calibration-tokens", "16384"]
#: Row -> options of `budwood quantize`; None = the 16-bit model itself.
FORMS: dict[str, list[str] | None] = {
    "16-bit": None,
    "nf4": ["-f", "nf4"],
    "nf4 twice": ["-f", "nf4", "--double-quant"],
    "nf4-gptq": ["-f", "nf4", "--method", "gptq", *DATA],
    "nf4-gptq twice": ["-f", "nf4", "--double-quant", "--method", "gptq", *DATA],
    "nf4-gptq 32": ["-f", "nf4", "--block-size", "32", "--method", "gptq", *DATA],
    "nf4 loftq": ["-f", "nf4"],
    "nf4-gptq loftq": ["-f", "nf4", "--method", "gptq", *DATA],
    "nf4-gptq eora": ["-f", "nf4", "--method", "gptq", *DATA],
    "int4": ["-f", "int4"],
    "int4-hqq": ["-f", "int4", "--method", "hqq"],
    "int4-awq": ["-f", "int4", "--method", "awq", *DATA],
    "int4-gptq": ["-f", "int4", "--method", "gptq", *DATA],
    "int8": ["-f", "int8"],
    "q4_0": ["-f", "q4_0"],
}


def budwood(*arguments: str | Path) -> dict:
    command = [sys.executable, "-m", "budwood.cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"budwood {' '.join(command[3:])}:\n{done.stderr}")
    return json.loads(done.stdout)


def prepare(folder: Path) -> dict[str, Path]:
    """The 16-bit model and both token files."""
    from sources import find_model, find_plays

    from budwood import _C
    from budwood.data import write_token_file
    from budwood.tokenizer import load_tokenizer

    source = find_model()
    texts, held_out = find_plays()
    files = {name: folder / name for name in ("base", "train.tokens", "held-out.tokens")}
    _C.save_model(
        _C.load_model(str(source), "bfloat16", weights="dense"),
        str(files["base"]),
        "bfloat16",
        str(source),
    )
    tokenizer = load_tokenizer(str(source))
    plays = folder / "plays"
    plays.mkdir()
    for text in texts:
        (plays / text.name).symlink_to(text)
    write_token_file(plays, files["train.tokens"], tokenizer, eos=False, vocab_size=49152)
    ids = tokenizer(held_out.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    ids = ids[HELD_OUT_FROM : HELD_OUT_FROM + HELD_OUT_TOKENS]
    writer = _C.TokenFileWriter(str(files["held-out.tokens"]), 49152)
    for begin in range(0, len(ids), WINDOW):
        writer.add(ids[begin : begin + WINDOW])
    writer.commit()
    return files


def starts(name: str, files: dict[str, Path]) -> list[str]:
    """Settings of rows whose factors begin with what packing took away."""
    method = name.rpartition(" ")[2]
    if method not in ("loftq", "eora"):
        return []
    return [f"adapter.start.method={method}", f"adapter.start.original={files['base']}"]


def measure(name: str, files: dict[str, Path], folder: Path, steps: int) -> dict[str, float]:
    from budwood import _C

    options = FORMS[name]
    model, begin = files["base"], time.perf_counter()
    if options is not None:
        model = folder / (name.replace(" ", "-") + (".gguf" if "q4" in name else ""))
        filled = [o.format(train=files["train.tokens"]) for o in options]
        budwood("quantize", "-m", files["base"], "-o", model, *filled)
    seconds = time.perf_counter() - begin if options is not None else 0.0
    data = _C.TokenFile.open(str(files["held-out.tokens"]))
    sampler = _C.Sampler(data, sequence_length=WINDOW, shuffle=False)
    before = _C.evaluate(_C.load_model(str(model), "float32"), sampler)["loss"]
    trained = budwood(
        "train",
        DEMO / "train.yaml",
        f"model={model}",
        f"output={folder / 'adapter'}",
        f"data.train={files['train.tokens']}",
        f"data.eval={files['held-out.tokens']}",
        f"weights={'auto' if model.is_dir() else 'packed'}",
        f"train.steps={steps}",
        f"train.warmup_steps={min(4, steps - 1)}",
        f"train.eval_every={steps}",
        *starts(name, files),
        "--overwrite",
    )
    size = sum(f.stat().st_size for f in model.rglob("*")) if model.is_dir() else 0
    return {
        "megabytes": (size or model.stat().st_size) / 1e6,
        "quantise_seconds": seconds,
        "before": before,
        "after": trained["evaluation"]["loss"],
        "train_seconds": trained["seconds"],
        "peak_rss_mb": trained["peak_rss_mb"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--only", default="", help="rows, separated by commas")
    parser.add_argument("--json", help="where the figures are written, too")
    options = parser.parse_args()
    names = ["16-bit", *(n for n in chosen(options.only, FORMS) if n != "16-bit")]
    print(f"{cpu_name()}, 2 threads; LoRA r 16, {options.steps} steps of 4 x {WINDOW} tokens\n")
    print(
        f"{'base':<15}{'MB':>7}{'packed in':>11}{'loss':>9}{'gap':>8}{'after LoRA':>12}{'gap':>8}"
        f"{'trained in':>12}{'peak MB':>9}"
    )
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        files = prepare(folder)
        for name in names:
            one = found[name] = measure(name, files, folder, options.steps)
            gaps = [100 * (one[k] / found["16-bit"][k] - 1) for k in ("before", "after")]
            print(
                f"{name:<15}{one['megabytes']:>7.0f}{one['quantise_seconds']:>9.1f} s"
                f"{one['before']:>9.4f}{gaps[0]:>6.2f} %{one['after']:>12.4f}{gaps[1]:>6.2f} %"
                f"{one['train_seconds']:>10.0f} s{one['peak_rss_mb']:>9,.0f}",
                flush=True,
            )
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
