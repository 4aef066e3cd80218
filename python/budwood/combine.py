"""Several LoRA adapters into one: Δ = Σ w_i s_i B_i A_i, as one pair of factors with scale 1."""

from __future__ import annotations

import math

import torch

from .errors import Error
from .slots import LinearSlot

COMBINATIONS = ("linear", "cat", "svd")

Pair = tuple[torch.Tensor, torch.Tensor]


def check_combination(kind: str) -> None:
    """Raises for a combination type that is not implemented."""
    if kind not in COMBINATIONS:
        raise Error(
            f"[add_weighted_adapter] combination_type {kind!r} is not implemented; "
            f"there are {', '.join(COMBINATIONS)}"
        )


def combined_rank(
    slots: dict[str, LinearSlot], adapters: list[str], kind: str, svd_rank: int | None
) -> int:
    """Rank of the combined adapter at every place; smaller factors are padded with zeros."""
    ranks = {p: [slot.r[n] for n in adapters if n in slot.r] for p, slot in slots.items()}
    if kind == "cat":
        return max(sum(r) for r in ranks.values())
    if kind == "svd":
        if svd_rank is not None and svd_rank < 1:
            raise Error(f"[add_weighted_adapter] svd_rank is a positive integer, found {svd_rank}")
        return svd_rank or max(max(r) for r in ranks.values())
    for path, r in ranks.items():
        if len(set(r)) > 1:
            raise Error(
                f"[add_weighted_adapter] linear combines adapters of equal rank, found {r} at "
                f"{path}: use cat or svd"
            )
    return max(r[0] for r in ranks.values())


@torch.no_grad()
def combine(
    slot: LinearSlot,
    adapters: list[str],
    weights: list[float],
    kind: str,
    rank: int,
    svd_clamp: float | None = None,
) -> Pair:
    """(A [rank, in], B [out, rank]) in fp64 of the adapters that a slot has.

    cat is exact; svd is the best approximation of its rank; linear mixes the factors and adds the
    cross terms B_i A_j.
    """
    have = [(n, w) for n, w in zip(adapters, weights, strict=True) if n in slot.lora_A]
    scales = [w * slot.scaling[n] for n, w in have]
    factors_a = [slot.lora_A[n].weight.double() for n, _ in have]
    factors_b = [slot.lora_B[n].weight.double() for n, _ in have]
    if kind == "linear":
        # The sign goes to one side, or two negative roots would cancel.
        roots = [math.sqrt(abs(s)) for s in scales]
        signed = zip(roots, scales, factors_a, strict=True)
        a = sum(math.copysign(root, scale) * f for root, scale, f in signed)
        b = sum(root * f for root, f in zip(roots, factors_b, strict=True))
    else:
        a = torch.cat([s * f for s, f in zip(scales, factors_a, strict=True)])
        b = torch.cat(factors_b, dim=1)
        if kind == "svd":
            a, b = _truncated(a, b, rank, svd_clamp)
    return _padded(a, b, rank)


def _truncated(a: torch.Tensor, b: torch.Tensor, rank: int, clamp: float | None) -> Pair:
    """Best rank-`rank` factors of B A through the SVD of a small matrix, never of B A itself."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.t())
    u, s, vh = torch.linalg.svd(r_b @ r_a.t(), full_matrices=False)
    b = (q_b @ u[:, :rank]) * s[:rank]
    a = vh[:rank] @ q_a.t()
    if clamp is not None:
        bound = torch.quantile(torch.cat([b.flatten(), a.flatten()]), clamp)
        a, b = a.clamp(-bound, bound), b.clamp(-bound, bound)
    return a, b


def _padded(a: torch.Tensor, b: torch.Tensor, rank: int) -> Pair:
    missing = rank - a.shape[0]
    if missing > 0:
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)
    return a, b
