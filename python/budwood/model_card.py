"""README.md of a saved adapter, with the header that the Hugging Face Hub reads."""

from __future__ import annotations

from pathlib import Path

from .config import PeftConfig, TaskType

_TEXT = """---
{header}
---

# {method} adapter{of}

{summary}

```python
import budwood
from transformers import AutoModel{kind}

base = AutoModel{kind}.from_pretrained("{base}")
model = budwood.PeftModel.from_pretrained(base, "PATH_OF_THIS_FOLDER")
```

The folder is in the layout of HF PEFT, which loads it too.

### Framework versions

- Budwood {version}
"""


_TITLES = {
    "LORA": "LoRA",
    "ADALORA": "AdaLoRA",
    "ADAPTION_PROMPT": "LLaMA-Adapter",
    "BOTTLENECK": "Bottleneck",
    "COMPACTER": "Compacter",
    "DYLORA": "DyLoRA",
    "PARALLEL_ADAPTER": "Parallel",
    "PREFIX_TUNING": "Prefix tuning",
    "PROMPT_TUNING": "Prompt tuning",
    "P_TUNING": "P-tuning",
    "REFT": "ReFT",
    "VERA": "VeRA",
}


def _summary(config: PeftConfig) -> str:
    facts = []
    for name, text in (
        ("r", "rank {}"),
        ("lora_alpha", "alpha {}"),
        ("num_virtual_tokens", "{} virtual tokens"),
        ("adapter_len", "{} prompts in a layer"),
        ("reduction_factor", "reduction factor {}"),
    ):
        value = getattr(config, name, None)
        if value is not None:
            facts.append(text.format(value))
    targets = getattr(config, "target_modules", None)
    if targets:
        names = ", ".join(sorted(targets)) if isinstance(targets, (list, set)) else targets
        facts.append(f"on {names}")
    text = ", ".join(facts) or "an adapter"
    return text[0].upper() + text[1:] + "."


def write_model_card(folder: Path, config: PeftConfig, version: str) -> None:
    """Writes README.md unless the folder has one, which is then somebody's own."""
    file = folder / "README.md"
    if file.exists():
        return
    base = config.base_model_name_or_path
    causal = config.task_type == TaskType.CAUSAL_LM
    header = ["library_name: peft"]
    if base:
        header.append(f"base_model: {base}")
    header.append("tags:")
    header += [f"- base_model:adapter:{base}"] if base else []
    header += [f"- {config.peft_type.lower()}", "- transformers"]
    if causal:
        header.append("pipeline_tag: text-generation")
    file.write_text(
        _TEXT.format(
            header="\n".join(header),
            of=f" of {base}" if base else "",
            method=_TITLES.get(config.peft_type, config.peft_type),
            summary=_summary(config),
            kind="ForCausalLM" if causal else "",
            base=base or "NAME_OF_THE_BASE_MODEL",
            version=version,
        ),
        encoding="utf-8",
    )
