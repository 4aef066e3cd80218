"""Products with a frozen weight, forward and backward to x: GFLOP/s beside torch's dense product.

Both run on the same numbers in the same process; the best of many calls counts.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import gguf
import torch
from torch.nn.functional import linear

from budwood import _C

SHAPES = ((576, 1536), (1536, 576), (4096, 4096))
DENSE, GGUF_Q4_1 = 0, 19


def weights(out: int, cols: int) -> dict:
    torch.manual_seed(0)
    w = torch.randn(out, cols) * 0.02
    blocks = gguf.quantize(w.numpy(), gguf.GGMLQuantizationType.Q4_1)
    return {
        "fp32": ([w], DENSE),
        "bf16": ([w.bfloat16()], DENSE),
        "nf4": _C.quantize(w, "nf4")[:2],
        "nf4-dq": _C.quantize(w, "nf4", double_quant=True)[:2],
        "q4_1": ([torch.from_numpy(blocks)], GGUF_Q4_1),
    }


def seconds(work, budget: float) -> float:
    work()
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < budget:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 256, 1024])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--forms", nargs="+", default=["fp32", "bf16", "nf4", "nf4-dq", "q4_1"])
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="the first so many")
    parser.add_argument("--seconds", type=float, default=0.08, help="per product")
    args = parser.parse_args()
    ops = torch.ops.budwood
    print("GFLOP/s forward/backward; torch: dense, in the dtype of x")
    for threads in args.threads:
        torch.set_num_threads(threads)
        for out, cols in SHAPES[: args.shapes]:
            made = weights(out, cols)
            for dtype in (getattr(torch, name) for name in args.dtypes):
                plain = made["fp32"][0][0].to(dtype)
                rows = [("torch", None)] + [(f, made[f]) for f in args.forms if f in made]
                for name, weight in rows:
                    line = f"{threads} thread(s) {out}x{cols} {str(dtype)[6:]:8} {name:6}"
                    for tokens in args.tokens:
                        x = torch.randn(tokens, cols).to(dtype)
                        g = torch.randn(tokens, out).to(dtype)
                        if weight is None:
                            works = (partial(linear, x, plain), partial(torch.mm, g, plain))
                        else:
                            how = (*weight, [out, cols])
                            works = (
                                partial(ops.linear, x, *how),
                                partial(ops.linear_backward_input, g, *how),
                            )
                        flops = 2e-9 * tokens * out * cols
                        forward, backward = (flops / seconds(w, args.seconds) for w in works)
                        line += f"  M={tokens}: {forward:.0f}/{backward:.0f}"
                    print(line, flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
