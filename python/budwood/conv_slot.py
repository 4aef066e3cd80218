"""LoRA on convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .errors import Error
from .slots import LoraSlot


def is_conv(layer: nn.Module) -> bool:
    """Whether a layer is a convolution that LoRA attaches to."""
    return isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and layer.weight.is_floating_point()


def check_rank(layer: nn.Module, r: int) -> None:
    """Raises for a rank that a convolution's groups do not divide."""
    if r % layer.groups != 0:
        raise Error(
            f"[inject] LoRA on a convolution with groups={layer.groups} wants a rank that is a "
            f"multiple of it, found r={r}"
        )


class ConvSlot(LoraSlot):
    """A torch.nn.Conv1d, Conv2d or Conv3d with LoRA adapters: y = conv(x) + Σ s B(A(D(x))).

    A is a convolution of all channels to r with the base's kernel, stride, padding and dilation, B
    one of kernel 1 with the base's groups, as in HF PEFT. With groups A reads channels that the
    base's kernel does not, so such an adapter is not merged.
    """

    def __init__(self, base_layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        super().__init__(base_layer)
        self._unmerged: tuple[nn.Parameter, nn.Parameter | None] | None = None

    def make_factors(self, r: int, lora_bias: bool) -> tuple[nn.Module, nn.Module]:
        base = self.base_layer
        check_rank(base, r)
        a = type(base)(
            base.in_channels,
            r,
            base.kernel_size,
            base.stride,
            base.padding,
            base.dilation,
            bias=False,
            padding_mode=base.padding_mode,
        )
        b = type(base)(r, base.out_channels, 1, groups=base.groups, bias=lora_bias)
        return a, b

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.adapters_enabled:
            return self.base_layer(x, *args, **kwargs)
        if self.row_groups is not None:
            return self.row_groups.apply(
                x, lambda name, rows: self._forward_running(rows, [name] * (name in self.lora_A))
            )
        running = [n for n in self.active_adapters if n not in self.merged_adapters]
        return self._forward_running(x, running, *args, **kwargs)

    def _forward_running(
        self, x: torch.Tensor, running: list[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        y = self.base_layer(x, *args, **kwargs)
        dtype = y.dtype
        for name in running:
            a, b = self.lora_A[name], self.lora_B[name]
            u = a(self.lora_dropout[name](x.to(a.weight.dtype)))
            y = y + b(u) * self.scaling[name]
        return y.to(dtype)

    @torch.no_grad()
    def delta(self, name: str) -> torch.Tensor:
        """s B A of one adapter in fp64, shaped as the kernel [out, in, ...]."""
        a, b = self.lora_A[name].weight.double(), self.lora_B[name].weight.double()
        return self.scaling[name] * torch.einsum("or,ri...->oi...", b.flatten(1), a)

    @torch.no_grad()
    def merge(self, names: list[str] | None = None) -> None:
        """As LinearSlot's: products and sum in fp64, one rounding, exact unmerge."""
        names = self.active_adapters if names is None else names
        added = [n for n in names if n in self.lora_A and n not in self.merged_adapters]
        if not added:
            return
        if self.base_layer.groups != 1:
            raise Error(
                f"[merge] {added} cannot be merged into a convolution with groups="
                f"{self.base_layer.groups}: LoRA's product is not a grouped kernel"
            )
        old, old_bias = self._unmerged or (self.base_layer.weight, self.base_layer.bias)
        merged = [*self.merged_adapters, *added]
        weight, bias = old.double(), old_bias
        for name in merged:
            weight = weight + self.delta(name)
            own = self.lora_B[name].bias
            if own is not None and old_bias is None:
                raise Error(
                    f"[merge] adapter {name!r} has a bias (lora_bias=True), but the base layer has "
                    "none to fold it into"
                )
            if own is not None:
                bias = bias.double() + self.scaling[name] * own.double()
        weight = weight.to(old.dtype)
        if not torch.isfinite(weight).all():
            raise Error(f"[merge] the kernel with {merged} folded in is not finite")
        self._unmerged, self.merged_adapters = (old, old_bias), merged
        self.base_layer.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
        if bias is not old_bias:
            self.base_layer.bias = nn.Parameter(
                bias.to(old_bias.dtype), requires_grad=old_bias.requires_grad
            )

    def unmerge(self) -> None:
        self._merge_again = []
        if self._unmerged is not None:
            self.base_layer.weight, bias = self._unmerged
            if bias is not None:
                self.base_layer.bias = bias
            self._unmerged, self.merged_adapters = None, []

    def base_before_merge(self) -> nn.Parameter | None:
        """The kernel that a merge has set aside."""
        return self._unmerged[0] if self._unmerged else None
