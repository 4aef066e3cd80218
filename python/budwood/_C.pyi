"""The part of the extension that the Python package calls."""

from os import PathLike
from typing import Any

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
