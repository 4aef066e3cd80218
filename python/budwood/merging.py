"""Folding adapters into the files of a model, without loading it, and taking them out again."""

from __future__ import annotations

import os
from collections.abc import Sequence

from . import _C

PathLike = str | os.PathLike[str]


def merge_files(
    model: PathLike,
    adapters: PathLike | Sequence[PathLike],
    out: PathLike,
    *,
    weights: Sequence[float] | None = None,
    into: str = "dequantised",
    original: PathLike = "",
    dtype: str = "auto",
    max_shard_size: int = 5_000_000_000,
    jobs: int = 0,
    overwrite: bool = False,
    force: bool = False,
    resume: bool = False,
    backup: bool = False,
) -> _C.MergeFilesReport:
    """Writes `out`: the model with adapters (folders of HF PEFT's layout) in its weights.

    `model` is a Hugging Face folder, plain or quantised (bitsandbytes, GPTQ, AWQ, Budwood's own),
    or a GGUF file. `out` is a folder, or a GGUF file when its name ends in ".gguf". One panel of
    rows after another is read, changed in float64, rounded once and written, so the model may be
    larger than memory; the bytes do not depend on `jobs` (threads, 0 = one for each processor).
    `weights` multiply what the adapters change. The output appears whole or not at all.

    `into` says what becomes of a quantised model: "dequantised" adds the change to what the codes
    stand for and stores plain numbers; "requantised" makes codes of the same kind again, which
    loses most of a small change; "original16" adds it to the plain model `original`.

    `dtype` is "auto" (each tensor's own; what codes stand for in the dtype of the other weights, of
    a GGUF file in float32), "float32", "bfloat16" or "float16"; for a GGUF file also "q8_0", "q4_0"
    and "q4_1".

    `resume` goes on where a merge of the same inputs was killed, keeping its whole weight files.
    `backup` keeps what was changed in the folder, for unmerge_files.

    The report says of each weight what rounding left of the change; merge_report.json has the same.
    Raises budwood.Error for adapters that are no change of weights, tensors without a partner,
    shapes that do not fit, values that are not finite, and, unless `force`, where less than half of
    a change survives.
    """
    pairs = with_weights(adapters, weights)
    return _C.merge_files(
        model,
        pairs,
        out,
        into=into,
        original=original,
        dtype=dtype,
        max_shard_size=max_shard_size,
        jobs=jobs,
        overwrite=overwrite,
        force=force,
        resume=resume,
        backup=backup,
    )


def verify_files(
    model: PathLike,
    adapters: PathLike | Sequence[PathLike],
    merged: PathLike,
    *,
    weights: Sequence[float] | None = None,
) -> _C.VerifyFilesReport:
    """Compares `merged`, made by whatever tool, with what the model and the adapters make.

    Reads everything piece by piece. `report.passed(steps)` is whether every value is within so many
    steps of its dtype from the exact one (0.5 when it was rounded once; about 1 when a tool rounds
    the change before adding it) and all else is byte for byte the model's.
    """
    return _C.verify_files(model, with_weights(adapters, weights), merged)


def unmerge_files(
    model: PathLike,
    out: PathLike,
    *,
    adapters: PathLike | Sequence[PathLike] = (),
    weights: Sequence[float] | None = None,
    base: PathLike = "",
    max_shard_size: int = 5_000_000_000,
    jobs: int = 0,
    overwrite: bool = False,
) -> _C.UnmergeFilesReport:
    """Writes `out`: the folder `model` as it was before adapters were merged into it.

    Exact when the merge kept a backup in the folder, or when `base`, the folder it was merged into,
    is given with the adapters. Otherwise the change of the adapters is subtracted, and what two
    roundings did stays; adapters that do more than add to weights are then a budwood.Error.
    `report.source` says which of the three it was: "backup", "base" or "subtracted".
    """
    pairs = with_weights(adapters, weights)
    return _C.unmerge_files(model, pairs, base, out, max_shard_size, jobs, overwrite)


def extract(
    base: PathLike,
    tuned: PathLike,
    out: PathLike,
    *,
    rank: int = 0,
    energy: float = 0.0,
    targets: Sequence[str] = (),
    overwrite: bool = False,
) -> _C.ExtractReport:
    """Writes `out`: a LoRA adapter (HF PEFT's layout) of the difference of two model folders.

    Each projection's difference is decomposed, and the leading `rank` singular triplets are kept,
    or so many that they hold the part `energy` of its squared norm. `targets` are ends of module
    paths, by default all projections but the head. The report has, for each module, the rank and
    the energy kept, and what differs without being part of the adapter (norms, biases, tables).
    """
    return _C.extract(base, tuned, out, rank, energy, list(targets), overwrite)


def combine_files(
    adapters: Sequence[PathLike],
    out: PathLike,
    *,
    weights: Sequence[float] | None = None,
    mode: str = "cat",
    rank: int = 0,
    density: float = 0.5,
    seed: int = 0,
    overwrite: bool = False,
) -> _C.CombineReport:
    """Writes `out`: one LoRA adapter of several, D = sum of weight * scaling * B A at each module.

    mode "cat" is exact, its rank the sum of the ranks; "svd" is the best approximation of `rank`
    (default: the largest of the adapters'); "linear" sums factors of equal rank as HF PEFT does,
    with cross terms; "ties" (arXiv 2306.01708), "dare" (arXiv 2311.03099) and "dare_ties" trim the
    changes to the part `density` and cut the result to `rank`. The report has, for each module,
    the rank and the relative error ||D' - D|| / ||D||. What is not plain LoRA is refused by name.
    """
    pairs = with_weights(adapters, weights)
    return _C.combine(pairs, out, mode, rank, density, seed, overwrite)


def convert(
    adapter: PathLike,
    out: PathLike,
    *,
    to: str = "peft",
    model: PathLike = "",
    overwrite: bool = False,
) -> _C.ConvertReport:
    """Writes the LoRA adapter `adapter` as `out` in the files of another library.

    `adapter` is a folder of HF PEFT, AdapterHub or MLX or a GGUF file of llama.cpp, told apart by
    what is in it; `to` is "peft", "adapterhub", "mlx" or "gguf" (then `out` is a file). `model`,
    the base, is needed for "gguf" and "adapterhub", and to read GGUF adapters of Llama's family.

    Every module keeps its change of weights: scalings that a format has no place for (rsLoRA,
    alpha patterns) are multiplied into B, differing ranks are filled up with zeros, and rows are
    permuted as GGUF wants them. What a format cannot hold is a budwood.Error that lists it.
    """
    return _C.convert(adapter, out, to=to, model=model, overwrite=overwrite)


def with_weights(
    adapters: PathLike | Sequence[PathLike], weights: Sequence[float] | None
) -> list[tuple[PathLike, float]]:
    """Each adapter with its weight, 1 where none are given."""
    folders = [adapters] if isinstance(adapters, str | os.PathLike) else list(adapters)
    factors = [float(w) for w in weights or [1.0] * len(folders)]
    if len(factors) != len(folders):
        raise _C.Error(
            f"[merge_files] {len(folders)} adapters and {len(factors)} weights are given"
        )
    return list(zip(folders, factors, strict=True))
