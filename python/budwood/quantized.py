"""Linear layers whose frozen weight is packed in 4 or 8 bits, and the making of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from . import _C
from .errors import Error
from .weights import is_conv1d, is_linear, is_packed

FORMATS = ("nf4", "fp4", "int8", "int4", "affine8")


class QuantizedLinear(nn.Module):
    """y = x Wᵀ + b with a packed W [out, in] that is decoded panel by panel and never held whole.

    x [..., in] -> y [..., out] in the dtype of x; with `compute_dtype` x is cast to it and y back.
    Codes and scales are frozen parameters and buffers that no cast of a module touches. The weight
    is saved in bitsandbytes' layout (nf4, fp4, int8) or Budwood's own (int4, affine8).

    `storage` is the dtype under which codes and scales lie in their parameters, the same bytes: for
    FSDP2 take the param_dtype of its mixed precision policy, else uint8.
    """

    def __init__(
        self,
        parts: list[torch.Tensor],
        format: int,
        shape: list[int],
        bias: torch.Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        storage: torch.dtype = torch.uint8,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        #: dtype of the values that the codes stand for: what a merge gives and a file states.
        self.dtype = dtype
        self.compute_dtype = compute_dtype
        self.storage = storage
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._set(parts, format)

    def _set(self, parts: list[torch.Tensor], format: int) -> None:
        self.format = format
        self._dtypes = [part.dtype for part in parts]
        self._names = ["weight", *(f"weight_{i}" for i in range(1, len(parts)))]
        for i, (name, part) in enumerate(zip(self._names, parts)):
            # Codes, scales and zero points: a slice of rows is a slice of the matrix. What is
            # small, or has no rows of whole elements, is no parameter, so nothing shards it.
            by_rows = part.numel() % self.out_features == 0 and i < 3 and part.dtype != torch.int64
            row_bytes = part.nbytes // self.out_features
            if by_rows and row_bytes % self.storage.itemsize == 0:
                rows = _view(part.reshape(self.out_features, -1), self.storage)
                self.register_parameter(name, nn.Parameter(rows, requires_grad=False))
            else:
                self.register_buffer(name, part, persistent=False)

    def parts(self) -> list[torch.Tensor]:
        """The parts as operators take them."""
        return [_view(getattr(self, name), dtype) for name, dtype in zip(self._names, self._dtypes)]

    def replace_parts(self, parts: list[torch.Tensor]) -> None:
        """Puts another matrix of the same form in the place of this one."""
        for own, new in zip(self.parts(), parts, strict=True):
            own.copy_(new.reshape(own.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype
        if self.compute_dtype is not None:
            x = x.to(self.compute_dtype)
        shape = [self.out_features, self.in_features]
        return torch.ops.budwood.linear(x, self.parts(), self.format, shape, self.bias).to(dtype)

    def dequantize(self) -> torch.Tensor:
        """The matrix [out, in] that the codes stand for, in `dtype`."""
        return _C.dequantize(self.parts(), self.format, self._shape(), _name(self.dtype))

    def _shape(self) -> list[int]:
        return [self.out_features, self.in_features]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedLinear:
        parameters, buffers = dict(self._parameters), dict(self._buffers)
        for name in self._names:
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
        super()._apply(fn, recurse)

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            # Bytes are moved, but no cast of a module touches them.
            return fn(tensor.view(torch.uint8)).view(tensor.dtype)

        for name in self._names:
            if name in parameters:
                parameters[name].data = moved(parameters[name].data)
            else:
                buffers[name] = moved(buffers[name])
        self._parameters.update(parameters | self._parameters)
        self._buffers.update(buffers)
        return self

    def stored(self) -> dict[str, torch.Tensor]:
        """The tensors of a file that hold the weight, by their names below this layer's path."""
        return _C.stored_parts(self.parts(), self.format, self._shape(), _name(self.dtype))

    def quantization_config(self, plain: list[str]) -> dict[str, Any]:
        """What config.json says of a model with such layers; `plain` lists those without."""
        text = _C.quantization_config(
            self.parts(), self.format, self._shape(), _name(self.dtype), plain
        )
        return json.loads(text)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, tensor in self.stored().items():
            destination[prefix + name] = tensor
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, torch.Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found = {
            key.removeprefix(prefix): tensor
            for key, tensor in state_dict.items()
            if key.startswith(prefix) and key != prefix + "bias"
        }
        if self.bias is not None:
            if prefix + "bias" in state_dict:
                with torch.no_grad():
                    self.bias.copy_(state_dict[prefix + "bias"])
            elif strict:
                missing_keys.append(prefix + "bias")
        if not found:
            if strict:
                missing_keys.extend(prefix + name for name in self.stored())
            return
        config = json.dumps(self.quantization_config([]))
        try:
            parts, format, _ = _C.weight_from_stored(
                found, config, self.out_features, self.in_features
            )
        except Error as error:
            error_msgs.append(f"{prefix.rstrip('.')}: {error}")
            return
        device = self.weight.device
        for name in self._names:
            delattr(self, name)
        self._set([part.to(device) for part in parts], format)

    def extra_repr(self) -> str:
        bits = 8 * sum(part.nbytes for part in self.parts())
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, bits={bits / self.out_features / self.in_features:.2f}"
        )


def quantize_linear(
    layer: nn.Module,
    format: str = "nf4",
    *,
    block_size: int = 64,
    double_quant: bool = False,
    compute_dtype: torch.dtype | None = None,
    storage: torch.dtype = torch.uint8,
) -> QuantizedLinear:
    """A torch.nn.Linear or transformers Conv1D as a packed layer; the layer itself is not changed.

    NaN and infinity are errors that name row and column.
    """
    weight = layer.weight.detach()
    if is_conv1d(layer):
        weight = weight.t()
    parts, number, shape = _C.quantize(weight, format, block_size, double_quant)
    packed = QuantizedLinear(
        parts,
        number,
        shape,
        layer.bias,
        dtype=weight.dtype,
        compute_dtype=compute_dtype,
        storage=storage,
    )
    return packed.train(layer.training)


@torch.no_grad()
def quantize_model(
    model: nn.Module,
    format: str = "nf4",
    *,
    block_size: int = 64,
    double_quant: bool = False,
    skip: Iterable[str] | None = None,
    compute_dtype: torch.dtype | None = None,
    storage: torch.dtype = torch.uint8,
) -> nn.Module:
    """Packs the linear layers of any torch model, in place and one after the other; returns it.

    `format`: "nf4", "fp4" (bitsandbytes' 4 bits, `double_quant` packs their scales too), "int8"
    (one scale per row), "int4", "affine8" (scale and zero point per group of a row). `block_size`
    elements share a scale. Layers whose path is, or contains between dots, an entry of `skip` stay
    as they are; by default the output layer does, and so does a layer that shares its weight. All
    parameters are frozen, since packed ones cannot be trained: train an adapter on them.

        model = budwood.quantize_model(model, "nf4", double_quant=True)
        model = budwood.get_peft_model(model, budwood.LoraConfig(target_modules="all-linear"))

    A Hugging Face model's config says afterwards how it is packed: what save_pretrained writes for
    nf4, fp4 and int8 loads in transformers with bitsandbytes.
    """
    if format not in FORMATS:
        raise Error(f"[quantize_model] unknown format {format!r}; known: {', '.join(FORMATS)}")
    names = None if skip is None else list(skip)
    chosen, skipped = [], set()
    for path, layer in model.named_modules(remove_duplicate=False):
        if not path or not is_plain_linear(layer):
            continue
        hit = [entry for entry in names or () if f".{entry}." in f".{path}."]
        skipped.update(hit)
        if hit or (names is None and layer is _output_layer(model)) or _is_shared(model, layer):
            continue
        chosen.append((path, layer))
    for entry in names or ():
        if entry not in skipped:
            warnings.warn(f"[quantize_model] skip entry {entry!r} matches no layer", stacklevel=2)
    if not chosen:
        raise Error("[quantize_model] the model has no linear layer to quantise")
    model.requires_grad_(False)
    done: dict[nn.Module, QuantizedLinear] = {}
    while chosen:
        path, layer = chosen.pop(0)
        if layer not in done:
            try:
                done[layer] = quantize_linear(
                    layer,
                    format,
                    block_size=block_size,
                    double_quant=double_quant,
                    compute_dtype=compute_dtype,
                    storage=storage,
                )
            except Error as error:
                raise Error(f"[quantize_model] {path}: {error}") from None
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, done[layer])
        if not any(layer is other for _, other in chosen):
            # The dense weight goes before the next one is packed.
            done.pop(layer)
    describe_quantization(model)
    return model


def describe_quantization(model: nn.Module) -> None:
    """Makes a Hugging Face model's config say which of its layers are packed, and how."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return
    packed = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    if packed:
        plain = [path for path, m in model.named_modules() if path and is_plain_linear(m)]
        config.quantization_config = packed[0].quantization_config(plain)
    elif not any(True for _ in packed_layers(model)):
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
        # What transformers notes on a model that it has quantised with bitsandbytes.
        for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_quantized"):
            model.__dict__.pop(name, None)
        model.__dict__.pop("is_loaded_in_8bit", None)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a layer is linear and holds its weight as it is."""
    return is_linear(module) and not is_packed(module)


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    *,
    upcast: bool = True,
) -> nn.Module:
    """Freezes a quantised model and readies it for training an adapter, as HF PEFT's does.

    Parameters in 16 bits that are not packed (norms, embeddings, the output layer) become fp32;
    with `upcast=False` they stay, which saves memory and is enough where adapters are fp32 anyway.
    With gradient checkpointing the input embeddings give outputs that require grad.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if upcast:
        packed = {id(p) for module in packed_layers(model) for p in module.parameters()}
        for parameter in model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16) and id(parameter) not in packed:
                parameter.data = parameter.data.float()
    if use_gradient_checkpointing:
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        elif hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().register_forward_hook(
                lambda _module, _inputs, output: output.requires_grad_(True)
            )
        if hasattr(model, "gradient_checkpointing_enable"):
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs=gradient_checkpointing_kwargs or {}
            )
    return model


def packed_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of a model whose weight is packed, ours and bitsandbytes'."""
    for module in model.modules():
        if is_packed(module):
            yield module


def _output_layer(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _is_shared(model: nn.Module, layer: nn.Module) -> bool:
    return any(
        module is not layer and parameter is layer.weight
        for module in model.modules()
        for parameter in module._parameters.values()
    )


def _view(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
