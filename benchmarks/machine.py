"""What the benchmarks say of the machine they ran on, and how they measure memory."""

from __future__ import annotations

import platform
import resource
from pathlib import Path


def cpu_name() -> str:
    """The processor's name and the widest vector instructions it has."""
    name, flags = platform.processor(), ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() == "flags":
            flags = value
    vectors = [f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in flags.split()]
    return f"{name} ({vectors[0] if vectors else 'no AVX2'})"


def chosen(only: str, known: dict) -> list[str]:
    """The names of a table's rows that are asked for, separated by commas; nothing = all."""
    names = [name for name in only.split(",") if name] or list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def status_mb(field: str) -> float:
    """VmHWM (peak) or VmRSS of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget_peak() -> None:
    """Sets the peak of this process to what it holds now."""
    Path("/proc/self/clear_refs").write_text("5")
