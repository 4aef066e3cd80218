"""The settings of a training run: read from YAML or JSON, changed by key=value, checked."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from ..errors import Error

TOP = {
    "model": None,
    "tokenizer": None,
    "dtype": "auto",
    "weights": "auto",
    "quantize": None,
    "seed": 0,
    "output": None,
    "resume": False,
    "overwrite": False,
    "data": {},
    "adapter": {},
    "train": {},
}
# `quantize: nf4` is short for `quantize: {format: nf4}`.
QUANTIZE = {"format": None, "block_size": 64, "double_quant": False, "skip": None}
# `start: loftq` is short for `start: {method: loftq}`.
START = {"method": None, "iterations": 1, "original": None, "rows": 64}
DATA = {"train": None, "eval": None, "format": "auto", "bos": None, "eos": True}
# Options of the trainer that stand under `data`, because they say how rows become sequences.
SAMPLING = ("sequence_length", "packing", "long_rows", "shuffle")
# Options of the trainer that stand at the top.
SHARED = ("seed", "output", "resume", "overwrite", "adapter")
# Options of the adapter that config.yaml states also when they have their defaults. All of them
# stand in adapter_config.json.
SHOWN_ADAPTER = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "init_lora_weights")
#: What adapter.method may be, and the configuration that its other settings belong to.
METHODS = {
    "lora": "LoraConfig",
    "adalora": "AdaLoraConfig",
    "vera": "VeraConfig",
    "dylora": "DyLoraConfig",
    "ia3": "IA3Config",
    "peqa": "PeqaConfig",
    "bottleneck": "BottleneckConfig",
    "parallel": "ParallelAdapterConfig",
    "compacter": "CompacterConfig",
    "prefix": "PrefixTuningConfig",
    "prompt": "PromptTuningConfig",
    "p_tuning": "PromptEncoderConfig",
    "llama_adapter": "AdaptionPromptConfig",
    "reft": "ReftConfig",
}
KINDS = {str: "text", bool: "true or false", int: "a whole number", dict: "a mapping"}


@dataclass
class Settings:
    """A checked configuration. `resolved` holds every setting, defaults included."""

    model: str
    tokenizer: str
    dtype: str
    weights: str
    quantize: dict[str, Any] | None
    output: Path
    adapter_name: str
    adapter_kind: str  #: the class of its configuration
    adapter: dict[str, Any]
    start: dict[str, Any] | None  #: how the factors begin on a quantised base
    data: dict[str, Any]
    train: dict[str, Any]
    seed: int = 0
    resolved: dict[str, Any] = field(default_factory=dict)


def load_settings(path: Path, overrides: list[str], **flags: bool) -> Settings:
    """Reads a configuration file and applies `a.b=value` to it; flags are switches of the verb."""
    values = read_file(path)
    for text in overrides:
        _override(values, text)
    values.update({key: True for key, given in flags.items() if given})
    return check(values, str(path))


def read_file(path: Path) -> dict[str, Any]:
    """A YAML or JSON file as a mapping."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Error(f"[train] the configuration {path} does not exist") from None
    except UnicodeDecodeError as error:
        raise Error(f"[train] {path} is not UTF-8 (byte {error.start})") from None
    try:
        values = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise Error(f"[train] {path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise Error(f"[train] {path} is not a mapping of settings")
    return values


def check(values: dict[str, Any], source: str) -> Settings:
    """Checks names and types and fills in defaults. Values are checked where they are used."""
    from .. import _C

    trainer = _C.TrainOptions().to_dict()
    _known(values, TOP, "", source)
    top = {**TOP, **values}
    for name in ("data", "adapter", "train"):
        top[name] = {} if top[name] is None else top[name]
        _type(top[name], dict, name, source)
    for name in ("model", "output"):
        if top[name] is None:
            raise Error(f"[train] {source}: {name} is missing")
        _type(top[name], str, name, source)
    _type(top["seed"], int, "seed", source)
    _type(top["overwrite"], bool, "overwrite", source)
    for name in ("tokenizer", "dtype", "weights"):
        if top[name] is not None:
            _type(top[name], str, name, source)
    quantize = _quantize(top["quantize"], source)

    data_defaults = {**DATA, **{key: trainer[key] for key in SAMPLING}}
    _known(top["data"], data_defaults, "data.", source)
    data = {**data_defaults, **top["data"]}
    if data["train"] is None:
        raise Error(f"[train] {source}: data.train is missing")
    for name in ("train", "eval"):
        if data[name] is not None:
            _type(data[name], str, f"data.{name}", source)

    train_defaults = {k: v for k, v in trainer.items() if k not in SAMPLING + SHARED}
    _known(top["train"], train_defaults, "train.", source)
    train = {**train_defaults, **top["train"]}

    adapter = dict(top["adapter"])
    full = train["tune"] == "full"
    if full and adapter:
        raise Error(
            f"[train] {source}: train.tune is full, which trains the model itself: there is no "
            "adapter to be set"
        )
    method = adapter.pop("method", "lora")
    name = adapter.pop("name", "default")
    start = _start(adapter.pop("start", None), method, top, quantize, source)
    if method not in METHODS:
        raise Error(
            f"[train] {source}: adapter.method is {method!r}, wanted one of {', '.join(METHODS)}"
        )
    adapter_defaults = getattr(_C, METHODS[method]).defaults().to_dict()
    _type(name, str, "adapter.name", source)
    names = getattr(_C, METHODS[method]).defaults().option_names()
    _known(adapter, [*names, "method", "name", "start"], "adapter.", source)

    resume = top["resume"]
    if not isinstance(resume, (bool, str)):
        raise Error(f"[train] {source}: resume is true, false or a checkpoint folder")
    options = {
        **train,
        **{key: data[key] for key in SAMPLING},
        "seed": top["seed"],
        "output": top["output"],
        "resume": resume if isinstance(resume, str) else "auto" if resume else "",
        "overwrite": top["overwrite"],
        "adapter": name,
        "tokenizer_from": train["tokenizer_from"] or (top["model"] if full else ""),
    }
    shown = {key: adapter_defaults[key] for key in SHOWN_ADAPTER if key in adapter_defaults}
    adapter.setdefault("task_type", "CAUSAL_LM")
    adapter.setdefault("base_model_name_or_path", top["model"])
    return Settings(
        model=top["model"],
        tokenizer=top["tokenizer"] or top["model"],
        dtype=top["dtype"] or "auto",
        weights=top["weights"] or "auto",
        quantize=quantize,
        output=Path(top["output"]),
        adapter_name=name,
        adapter_kind=METHODS[method],
        adapter=adapter,
        start=start,
        data=data,
        train=options,
        seed=top["seed"],
        resolved={
            **{key: top[key] for key in ("model", "tokenizer", "dtype", "weights")},
            "quantize": quantize,
            **{key: top[key] for key in ("seed", "output")},
            "data": data,
            "adapter": {}
            if full
            else {"method": method, "name": name, "start": start, **shown, **adapter},
            "train": train,
        },
    )


def _quantize(value: Any, source: str) -> dict[str, Any] | None:
    """How the base is packed while it is loaded; None = as it lies in its files."""
    if value is None:
        return None
    given = {"format": value} if isinstance(value, str) else value
    _type(given, dict, "quantize", source)
    _known(given, QUANTIZE, "quantize.", source)
    values = {**QUANTIZE, **given}
    _type(values["format"], str, "quantize.format", source)
    _type(values["block_size"], int, "quantize.block_size", source)
    _type(values["double_quant"], bool, "quantize.double_quant", source)
    skip = values["skip"]
    if skip is not None and not (
        isinstance(skip, list) and all(isinstance(name, str) for name in skip)
    ):
        raise Error(f"[train] {source}: quantize.skip is {skip!r}, wanted a list of names")
    return values


def _start(
    value: Any, method: str, top: dict[str, Any], quantize: dict[str, Any] | None, source: str
) -> dict[str, Any] | None:
    """What the factors begin with on a quantised base; None = with 0."""
    if value is None:
        return None
    given = {"method": value} if isinstance(value, str) else value
    _type(given, dict, "adapter.start", source)
    _known(given, START, "adapter.start.", source)
    values = {**START, **given}
    if method != "lora":
        raise Error(f"[train] {source}: adapter.start is for the method lora, found {method!r}")
    if values["method"] not in ("loftq", "qpissa", "eora"):
        raise Error(
            f"[train] {source}: adapter.start.method is {values['method']!r}, wanted loftq, qpissa "
            "or eora"
        )
    for name in ("iterations", "rows"):
        _type(values[name], int, f"adapter.start.{name}", source)
    if values["original"] is None:
        if quantize is None:
            raise Error(
                f"[train] {source}: adapter.start.original is missing: the folder of the weights "
                "that the model was quantised from"
            )
        values["original"] = top["model"]
    _type(values["original"], str, "adapter.start.original", source)
    return values


def write_settings(settings: Settings, path: Path) -> None:
    """Writes the resolved configuration, which `budwood train` takes again."""
    text = yaml.safe_dump(settings.resolved, sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


class Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number and a key may stand only once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands there twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _override(values: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise Error(f"[train] wanted key=value, found {text!r}")
    place = values
    *outer, last = key.split(".")
    for name in outer:
        inner = place.setdefault(name, {})
        if inner is None:
            inner = place[name] = {}
        if not isinstance(inner, dict):
            raise Error(f"[train] {text!r}: {name} is not a group of settings")
        place = inner
    try:
        place[last] = yaml.load(value, Loader)
    except yaml.YAMLError as error:
        raise Error(f"[train] {text!r}: {' '.join(str(error).split())}") from None


def _known(values: dict[str, Any], known: Iterable[str], prefix: str, source: str) -> None:
    for key in values:
        if key in known:
            continue
        # A setting that stands elsewhere is the likeliest meaning of a name that is right.
        if prefix in ("", "train.") and key in (*SAMPLING, *DATA):
            hint = f"it stands under data: data.{key}"
        else:
            near = get_close_matches(str(key), list(known), 1, 0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(known)}"
        raise Error(f"[train] {source}: unknown setting {prefix}{key}; {hint}")


def _type(value: Any, wanted: type, name: str, source: str) -> None:
    right = isinstance(value, wanted) and not (wanted is int and isinstance(value, bool))
    if not right:
        raise Error(f"[train] {source}: {name} is {value!r}, wanted {KINDS[wanted]}")
