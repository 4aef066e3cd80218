"""README.md of a saved adapter, with the header that the Hugging Face Hub reads."""

from __future__ import annotations

from pathlib import Path

from .config import LoraConfig, TaskType

_TEXT = """---
{header}
---

# LoRA adapter{of}

Rank {r}, alpha {alpha}, on {targets}.

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


def write_model_card(folder: Path, config: LoraConfig, version: str) -> None:
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
    header += ["- lora", "- transformers"]
    if causal:
        header.append("pipeline_tag: text-generation")
    targets = config.target_modules
    file.write_text(
        _TEXT.format(
            header="\n".join(header),
            of=f" of {base}" if base else "",
            r=config.r,
            alpha=config.lora_alpha,
            targets=", ".join(sorted(targets)) if isinstance(targets, (list, set)) else targets,
            kind="ForCausalLM" if causal else "",
            base=base or "NAME_OF_THE_BASE_MODEL",
            version=version,
        ),
        encoding="utf-8",
    )
