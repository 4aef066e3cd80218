"""4-bit weights, Budwood beside bitsandbytes: quantise, dequantise, linear forward and backward.

Both run in one process, in alternation, on the same weights and inputs, once for each instruction
set that the machine has; bitsandbytes chooses its own and is not told. Ratios are of medians; above
1 Budwood is faster. Extra memory is the growth of the process's peak during one call.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

from machine import cpu_name, forget_peak, status_mb

SHAPES = [(576, 1536), (1536, 576), (2048, 2048), (4096, 11008)]
TOKENS = [1, 16, 64, 256, 1024]
FORMS = ["nf4", "fp4"]


def alternate(calls: dict, seconds: float) -> dict[str, float]:
    """Median seconds of each call; they take turns for that many seconds, at least 5 times."""
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    begin = time.perf_counter()
    while min(map(len, times.values())) < 5 or (
        time.perf_counter() - begin < seconds and len(times[next(iter(times))]) < 200
    ):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def extra_mb(call) -> float:
    before = status_mb("VmRSS")
    forget_peak()
    call()
    return max(0.0, status_mb("VmHWM") - before)


def measure(args) -> dict:
    import bitsandbytes.functional as functional
    import torch
    from bitsandbytes import matmul_4bit

    import budwood  # noqa: F401  registers the operators

    torch.set_num_threads(args.threads)
    ops, rows = torch.ops.budwood, []
    for out, cols in args.shapes:
        torch.manual_seed(0)
        weight = torch.randn(out, cols) / cols**0.5
        for form in FORMS if (out, cols) == args.shapes[0] else FORMS[:1]:
            codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type=form)
            ours, absmax = ops.quantize_4bit(weight, form, 64)
            assert torch.equal(codes.view(-1), ours.view(-1))
            assert torch.equal(state.absmax, absmax.view(-1))
            shape = [out, cols]

            def add(what, tokens, calls, work, unit, context=(shape, form)):
                seconds = alternate(calls, args.seconds)
                rows.append(
                    {
                        "what": what,
                        "shape": context[0],
                        "form": context[1],
                        "tokens": tokens,
                        "unit": unit,
                        **{f"{n}_rate": work / s / 1e9 for n, s in seconds.items()},
                        **{f"{n}_seconds": s for n, s in seconds.items()},
                        "ratio": seconds["bitsandbytes"] / seconds["budwood"],
                        **{f"{n}_extra_mb": extra_mb(call) for n, call in calls.items()},
                    }
                )

            calls = {
                "bitsandbytes": lambda w=weight, f=form: functional.quantize_4bit(
                    w, blocksize=64, quant_type=f
                ),
                "budwood": lambda w=weight, f=form: ops.quantize_4bit(w, f, 64),
            }
            add("quantise", 0, calls, weight.numel(), "Gweights/s")
            calls = {
                "bitsandbytes": lambda c=codes, s=state: functional.dequantize_4bit(c, s),
                "budwood": lambda c=ours, a=absmax, f=form, s=shape: ops.dequantize_4bit(
                    c, a, f, 64, s
                ),
            }
            # What is written; reading the codes is an eighth of it.
            add("dequantise", 0, calls, 4 * weight.numel(), "GB/s")
            if form != FORMS[0]:
                continue
            for tokens in args.tokens:
                x = torch.randn(tokens, cols, requires_grad=True)
                grad = torch.randn(tokens, out)
                forward = {
                    "bitsandbytes": lambda x=x, c=codes, s=state: matmul_4bit(x, c.t(), s),
                    "budwood": lambda x=x, c=ours, a=absmax, f=form, s=shape: ops.linear_4bit(
                        x, c, a, f, 64, s
                    ),
                }
                outputs = {name: call() for name, call in forward.items()}
                error = (outputs["bitsandbytes"] - outputs["budwood"]).norm()
                assert error < 1e-4 * outputs["budwood"].norm(), error
                backward = {
                    name: lambda y=y, x=x, g=grad: torch.autograd.grad(y, x, g, retain_graph=True)
                    for name, y in outputs.items()
                }
                work = 2 * tokens * weight.numel()
                add("forward", tokens, forward, work, "GFLOP/s")
                add("backward", tokens, backward, work, "GFLOP/s")
    return {"rows": rows, "torch": torch.__version__}


def show(result: dict) -> None:
    print(f"\nBUDWOOD_ISA={result['isa']}, {result['threads']} threads, {result['cpu']}")
    print(
        f"{'':11} {'shape':>12} {'form':>5} {'tokens':>6}  {'bitsandbytes':>13} {'Budwood':>9} "
        f"{'unit':<11} {'ratio':>7}  extra MB"
    )
    for row in result["rows"]:
        tokens = str(row["tokens"]) if row["tokens"] else ""
        shape = f"{row['shape'][0]}x{row['shape'][1]}"
        print(
            f"{row['what']:11} {shape:>12} {row['form']:>5} {tokens:>6}  "
            f"{row['bitsandbytes_rate']:13.2f} {row['budwood_rate']:9.2f} {row['unit']:<11} "
            f"{row['ratio']:6.2f}x  {row['bitsandbytes_extra_mb']:.1f} / "
            f"{row['budwood_extra_mb']:.1f}"
        )


def available_sets() -> list[str]:
    from pathlib import Path

    flags = Path("/proc/cpuinfo").read_text()
    return [s for s, flag in (("avx512", "avx512bw"), ("avx2", "avx2")) if flag in flags]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", nargs="*", help="default: all that the machine has")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=0.5, help="of each comparison")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--shapes", nargs="*", default=[f"{o}x{i}" for o, i in SHAPES])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
        print(json.dumps(measure(args)))
        return
    results = []
    for isa in args.isa or available_sets():
        command = [sys.executable, __file__, "--one", "--threads", str(args.threads)]
        command += ["--seconds", str(args.seconds), "--shapes", *args.shapes]
        command += ["--tokens", *map(str, args.tokens)]
        env = os.environ | {"BUDWOOD_ISA": isa, "OMP_NUM_THREADS": str(args.threads)}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{isa} failed:\n{done.stderr[-2000:]}")
        result = json.loads(done.stdout.splitlines()[-1])
        results.append(result | {"isa": isa, "threads": args.threads, "cpu": cpu_name()})
        if not args.json:
            show(results[-1])
    if args.json:
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
