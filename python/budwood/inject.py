"""Attaching adapters to the modules of any torch model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from . import _C
from .biases import TrainedBiases
from .config import LoraConfig, PeftConfig, as_config, check_adapter_name, is_plain_lora
from .conv_slot import ConvSlot, check_rank, is_conv
from .errors import Error
from .saved_modules import SavedModule
from .slots import EmbeddingSlot, LinearSlot, LoraSlot
from .switches import adapters_of, biases_of, replace, set_adapter, set_biases, slots
from .targets import Match, Target, adaptable_modules, match_targets
from .weights import count_parameters, is_conv1d, is_linear


@dataclass
class Injected:
    """One place that an injection touched."""

    path: str
    kind: str  #: "lora" or another method's name, "copy" (modules_to_save) or "bias"
    rank: int
    parameters: int  #: trainable numbers here


@dataclass
class InjectReport:
    """What an injection did: every path touched, and the counts of the whole model afterwards."""

    places: list[Injected] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    trainable: int = 0
    total: int = 0

    def add(self, path: str, kind: str, rank: int, parameters: Iterable[torch.Tensor]) -> None:
        self.places.append(Injected(path, kind, rank, sum(p.numel() for p in parameters)))

    def __str__(self) -> str:
        lines = [f"{p.path}  {p.kind}  r={p.rank}  {p.parameters:,d}" for p in self.places]
        return "\n".join([*lines, f"trainable {self.trainable:,d} of {self.total:,d}"])


def inject(
    model: nn.Module,
    config: PeftConfig,
    adapter_name: str = "default",
    *,
    loading: bool = False,
    autocast_adapter_dtype: bool = True,
) -> InjectReport:
    """Attaches a new adapter to the modules that a config targets.

    The first adapter of a model freezes the model and becomes active; a later one is attached
    inactive and frozen. When anything is refused, the model is as it was. With `loading`, a pattern
    without a hit is a warning instead of an error. The config is kept in `model.peft_config`.
    """
    check_adapter_name(adapter_name)
    if adapter_name in adapters_of(model):
        raise Error(f"[inject] an adapter named {adapter_name!r} is already attached")
    first = not any(True for _ in slots(model))
    if not isinstance(config, LoraConfig):
        return _inject_method(model, config, adapter_name, first, loading)
    match = match_targets(config, model, strict=not loading)
    tables = any(_is_embedding(model.get_submodule(t.path)) for t in match.targets)
    if tables or not is_plain_lora(config):
        _refuse_convolutions(model, match.targets, config)
        return _inject_method(model, config, adapter_name, first, loading)
    targets, report = match.targets, InjectReport(warnings=match.warnings)
    layers = _target_layers(model, targets)
    copies = _modules_to_copy(model, config, targets, loading, report)
    _check_biases(model, config.bias, adapter_name)

    if first:
        model.requires_grad_(False)
    for target, layer in zip(targets, layers, strict=True):
        slot = layer
        if not isinstance(layer, LoraSlot):
            kind = ConvSlot if is_conv(layer) else LinearSlot
            slot = kind(layer).train(layer.training)
            replace(model, layer, slot)
        slot.attach(
            adapter_name,
            r=target.r,
            lora_alpha=target.lora_alpha,
            scaling=target.scaling,
            dropout=config.lora_dropout,
            init=config.init_lora_weights,
            lora_bias=config.lora_bias,
            keep_dtype=not autocast_adapter_dtype,
        )
        report.add(target.path, "lora", target.r, slot.adapter_parameters(adapter_name))
    _attach_copies(model, copies, adapter_name, report)
    if config.bias != "none":
        _attach_biases(model, adapter_name, config.bias, first, report)
    if first:
        set_adapter(model, [adapter_name], trainable=not config.inference_mode)
    _record(model, adapter_name, config, match)
    report.trainable, report.total = count_parameters(model)
    for note in report.warnings:
        warnings.warn(note, stacklevel=3)
    return report


def _inject_method(
    model: nn.Module, config: PeftConfig, name: str, first: bool, loading: bool
) -> InjectReport:
    """The same for a method that lives in C++."""
    from .methods.inject import attach_method, method_config

    report = InjectReport()
    copies = _modules_to_copy(model, config, [], loading, report)
    bias = getattr(config, "bias", "none")
    _check_biases(model, bias, name)
    if first:
        model.requires_grad_(False)
    config = prepared_config(model, config)
    places, found = attach_method(model, config, name, loading)
    report.warnings += found
    kind = config.peft_type.lower()
    for place in places:
        report.places.append(Injected(place["path"], kind, place["rank"], place["parameters"]))
    _attach_copies(model, copies, name, report)
    if bias != "none":
        _attach_biases(model, name, "lora_only" if bias.endswith("_only") else bias, first, report)
    if first:
        set_adapter(model, [name], trainable=not config.inference_mode)
    saved = method_config(model, name)
    saved.modules_to_save = config.modules_to_save
    saved.inference_mode = config.inference_mode
    if saved.base_model_name_or_path is None:
        saved.base_model_name_or_path = model.__dict__.get("name_or_path") or None
    model.__dict__.setdefault("peft_config", {})[name] = saved
    report.trainable, report.total = count_parameters(model)
    for note in report.warnings:
        warnings.warn(note, stacklevel=4)
    return report


def prepared_config(model: nn.Module, config: PeftConfig) -> PeftConfig:
    """What C++ cannot do itself: an initial text of prompt tuning becomes token ids."""
    if config.peft_type != "PROMPT_TUNING" or config.prompt_tuning_init != "TEXT":
        return config
    if config.init_token_ids or config.inference_mode:
        config = config.copy()
        if not config.init_token_ids:
            config.prompt_tuning_init = "RANDOM"  # a file brings the values
        return config
    if not config.prompt_tuning_init_text or not config.tokenizer_name_or_path:
        raise Error(
            "[inject] prompt_tuning_init is TEXT: give prompt_tuning_init_text with "
            "tokenizer_name_or_path (a local folder), or init_token_ids"
        )
    from transformers import AutoTokenizer

    options = dict(config.tokenizer_kwargs or {})
    tokenizer = AutoTokenizer.from_pretrained(
        config.tokenizer_name_or_path, local_files_only=True, **options
    )
    config = config.copy()
    config.init_token_ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    return config


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, EmbeddingSlot))


def _attach_copies(model: nn.Module, paths: list[str], name: str, report: InjectReport) -> None:
    for path in paths:
        slot = module = model.get_submodule(path)
        if not isinstance(module, SavedModule):
            slot = SavedModule(module).train(module.training)
            replace(model, module, slot)
        slot.attach(name)
        report.add(path, "copy", 0, slot.adapter_parameters(name))


def _attach_biases(
    model: nn.Module, name: str, bias: str, first: bool, report: InjectReport
) -> None:
    biases = TrainedBiases(model, name, bias)
    set_biases(model, biases)
    biases.set_active(model, first, first)
    for path, value in biases.values(model).items():
        report.add(path, "bias", 0, [value])


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
) -> nn.Module:
    """Attaches an adapter to a model in place and returns the same model, without a wrapper.

    The configs stand in `model.peft_config` by name; the modules keep their paths, so the
    parameters have no `base_model.model.` prefix.
    """
    inject(model, as_config(peft_config), adapter_name)
    return model


def _record(model: nn.Module, adapter_name: str, config: PeftConfig, match: Match) -> None:
    """Keeps a copy of a config as it is to be saved: what the model decided is written down."""
    config = config.copy()
    paths = [target.path for target in match.targets]
    config.target_modules = match.target_modules
    config.pin_patterns(paths)
    layers = [model.get_submodule(path).base_layer for path in paths]
    config.fan_in_fan_out = all(is_conv1d(layer) for layer in layers)
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = model.__dict__.get("name_or_path") or None
    model.__dict__.setdefault("peft_config", {})[adapter_name] = config


def _refuse_convolutions(model: nn.Module, targets: list[Target], config: PeftConfig) -> None:
    held = [t.path for t in targets if is_conv(_base(model.get_submodule(t.path)))]
    if not held:
        return
    plain = {"use_dora": (False,), "use_qalora": (False,), "trainable_token_indices": (None,)}
    plain["init_lora_weights"] = (True, False, "gaussian")
    reasons = [
        f"{option}={getattr(config, option)!r}"
        for option, values in plain.items()
        if getattr(config, option) not in values
    ]
    raise Error(
        f"[inject] {', '.join(held)}: a convolution takes plain LoRA, in a configuration without "
        f"token tables; here is {', '.join(reasons) or 'a token table among the targets'}"
    )


def _base(layer: nn.Module) -> nn.Module:
    return layer.base_layer if isinstance(layer, LoraSlot) else layer


def _target_layers(model: nn.Module, targets: list[Target]) -> list[nn.Module]:
    layers = [model.get_submodule(t.path) for t in targets]
    wrong = []
    for target, layer in zip(targets, layers, strict=True):
        base = _base(layer)
        if is_conv(base):
            check_rank(base, target.r)
        elif not is_linear(base):
            wrong.append(f"{target.path} ({type(base).__module__}.{type(base).__qualname__})")
    if wrong:
        raise Error(
            "[inject] LoRA attaches to torch.nn.Linear, Conv1d, Conv2d, Conv3d and transformers' "
            "Conv1D with floating point weights and to packed layers, but target_modules also "
            "matches: " + ", ".join(wrong)
        )
    return layers


def _modules_to_copy(
    model: nn.Module,
    config: PeftConfig,
    targets: list[Target],
    loading: bool,
    report: InjectReport,
) -> list[str]:
    paths: list[str] = []
    wanted = list(dict.fromkeys(config.modules_to_save or ()))
    optional = _C.task_heads(config.task_type)
    for path, _ in adaptable_modules(model):
        inside = any(path.startswith(outer + ".") for outer in paths)
        if not inside and any(path == m or path.endswith("." + m) for m in wanted):
            paths.append(path)
    for name in wanted:
        # Heads that a task type adds to the list are there in some models only.
        if name in optional or any(p == name or p.endswith("." + name) for p in paths):
            continue
        fact = f"modules_to_save entry {name!r} matches no module of the model"
        if not loading:
            raise Error(f"[inject] {fact}")
        report.warnings.append(fact)
    for path in paths:
        for target in targets:
            if target.path == path or target.path.startswith(path + "."):
                raise Error(
                    f"[inject] {target.path} is in target_modules, and {path} in modules_to_save"
                )
    return paths


def _check_biases(model: nn.Module, bias: str, name: str) -> None:
    biases = biases_of(model)
    if biases is not None and bias != "none":
        raise Error(
            f"[inject] adapter {biases.adapter!r} trains base biases already, and one adapter of a "
            f"model can: give {name!r} bias='none'"
        )
