"""The part of the extension that the Python package calls."""

from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from typing_extensions import Self

__version__: str
built_with_torch: str

class Error(ValueError, RuntimeError): ...

class PeftConfig:
    peft_type: str
    task_type: str | None
    base_model_name_or_path: str | None
    revision: str | None
    auto_mapping: dict[str, str] | None
    inference_mode: bool
    modules_to_save: list[str] | None
    peft_version: str | None
    warnings: list[str]
    is_prompt_learning: bool
    def validate(self, strict: bool = True) -> None: ...
    def to_json(self) -> str: ...
    def to_dict(self) -> dict[str, Any]: ...
    def save_pretrained(self, save_directory: str | PathLike[str]) -> None: ...
    @staticmethod
    def from_json(text: str, strict: bool = True) -> PeftConfig: ...
    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str | PathLike[str], subfolder: str | None = None
    ) -> PeftConfig: ...

class LoraConfig(PeftConfig):
    r: int
    lora_alpha: float
    use_rslora: bool
    use_qalora: bool
    qalora_group_size: int
    qalora_pooling: str
    lora_dropout: float
    bias: str
    lora_bias: bool
    fan_in_fan_out: bool
    init_lora_weights: bool | str
    target_modules: set[str] | str | None
    exclude_modules: set[str] | str | None
    layers_to_transform: int | list[int] | None
    layers_pattern: str | list[str] | None
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    def __init__(self, **options: Any) -> None: ...
    def copy(self) -> Self: ...
    def rank(self, path: str) -> int: ...
    def alpha(self, path: str) -> float: ...
    def scaling(self, path: str) -> float: ...
    def pin_patterns(self, paths: list[str]) -> None: ...

def packed_devices() -> list[str]: ...
def task_heads(task_type: str | None) -> list[str]: ...
def known_peft_types() -> list[str]: ...
def match_targets(
    config: PeftConfig,
    modules: list[tuple[str, str, bool]],
    model_type: str = "",
    strict: bool = True,
) -> dict[str, Any]: ...

class MergedTensor:
    name: str
    weight_norm: float
    delta_norm: float
    survival: float
    error: float

class MergeFilesReport:
    merged: list[MergedTensor]
    replaced: list[str]
    warnings: list[str]
    files: list[str]
    bytes: int

def merge_files(
    model: str | PathLike[str],
    adapters: list[tuple[str | PathLike[str], float]],
    out: str | PathLike[str],
    dtype: str = "auto",
    max_shard_size: int = 5_000_000_000,
    jobs: int = 0,
    overwrite: bool = False,
) -> MergeFilesReport: ...

class VerifiedTensor:
    name: str
    equal: bool
    delta_norm: float
    survival: float
    error: float
    steps: float

class VerifyFilesReport:
    tensors: list[VerifiedTensor]
    faults: list[str]
    def passed(self, steps: float) -> bool: ...
    def to_json(self, steps: float) -> str: ...

def verify_files(
    model: str | PathLike[str],
    adapters: list[tuple[str | PathLike[str], float]],
    merged: str | PathLike[str],
) -> VerifyFilesReport: ...
def why_not_streamed(
    model: str | PathLike[str], adapters: list[tuple[str | PathLike[str], float]]
) -> str | None: ...

class ExtractedModule:
    path: str
    rank: int
    delta_norm: float
    energy: float

class LostTensor:
    name: str
    delta_norm: float

class ExtractReport:
    modules: list[ExtractedModule]
    identical: list[str]
    lost: list[LostTensor]
    parameters: int

def extract(
    base: str | PathLike[str],
    tuned: str | PathLike[str],
    out: str | PathLike[str],
    rank: int = 0,
    energy: float = 0.0,
    targets: list[str] = [],
    overwrite: bool = False,
) -> ExtractReport: ...

class CombinedModule:
    path: str
    rank: int
    delta_norm: float
    error: float

class CombineReport:
    modules: list[CombinedModule]
    warnings: list[str]

def combine(
    adapters: list[tuple[str | PathLike[str], float]],
    out: str | PathLike[str],
    mode: str = "cat",
    rank: int = 0,
    density: float = 0.5,
    seed: int = 0,
    overwrite: bool = False,
) -> CombineReport: ...

Named = list[tuple[str, torch.Tensor]]
State = dict[str, torch.Tensor]

class UpdateRule:
    def __init__(self, name: str, **options: float | bool) -> None: ...
    def fresh(self, p: torch.Tensor, path: str = "") -> State: ...
    def update(
        self, p: torch.Tensor, grad: torch.Tensor, state: State, rate: float, path: str = ""
    ) -> State: ...

def update_rules() -> list[str]: ...

class Optimizer:
    def __init__(self, parameters: Named, rule: str, **options: float | bool) -> None: ...
    def step(self, rate: float) -> None: ...
    def state(self) -> Named: ...
    def restore(self, state: Named) -> None: ...

class FusedBackward:
    loss_scale: float
    def __init__(
        self,
        parameters: Named,
        rule: str,
        *,
        clip_norm: float = 0.0,
        clip_value: float = 0.0,
        **options: float | bool,
    ) -> None: ...
    def backward(self, loss: torch.Tensor, rate: float) -> tuple[float, bool, int]: ...
    def state(self) -> Named: ...
    def restore(self, state: Named) -> None: ...

class MezoLog:
    projected: list[float]
    rates: list[float]
    names: list[str]
    eps: float
    seed: int
    @staticmethod
    def load(path: str | PathLike[str]) -> MezoLog: ...
    def save(self, path: str | PathLike[str]) -> None: ...

class Mezo:
    log: MezoLog
    def __init__(self, parameters: Named, eps: float, weight_decay: float, seed: int) -> None: ...
    def step(self, loss: Callable[[], float], rate: float) -> float: ...
    def state(self) -> Named: ...
    def restore(self, state: Named) -> None: ...

def mezo_replay(parameters: Named, log: MezoLog) -> None: ...

class BlockSchedule:
    blocks: list[str]
    never_trained: list[str]
    def __init__(
        self, parameters: Named, kind: str, active: int, every: int, order: str, seed: int
    ) -> None: ...
    def active(self, step: int) -> list[int]: ...
    def apply(self, optimizer: Optimizer, step: int) -> None: ...
    def thaw(self) -> None: ...

class OriginalWeights:
    def __init__(self, path: str | PathLike[str]) -> None: ...
    def matrix(self, path: str) -> torch.Tensor: ...

def residual_start(
    w: torch.Tensor,
    parts: list[torch.Tensor],
    format: int,
    shape: list[int],
    rank: int,
    scaling: float,
    method: str = "loftq",
    iterations: int = 1,
    covariance: torch.Tensor | None = None,
) -> dict[str, Any]: ...
def start_from_original(
    model: Any,
    original: str | PathLike[str],
    adapter: str = "default",
    method: str = "loftq",
    iterations: int = 1,
    sequences: list[list[int]] = ...,
) -> dict[str, Any]: ...
