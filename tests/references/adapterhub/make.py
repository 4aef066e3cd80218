"""Reference folders of AdapterHub's library `adapters`, kept in tests/python/data/adapterhub.

It needs an environment of its own, since the library asks for an older transformers:

    python3 -m venv /tmp/hub && /tmp/hub/bin/pip install torch==2.13.0 adapters
    /tmp/hub/bin/python tests/references/adapterhub/make.py

Names of methods after it make those alone. For each family a tiny base model, and for each method a
folder as the library saves it, with the logits that it computes beside it (`expected.safetensors`).
"""

import shutil
import sys
from pathlib import Path

import adapters
import torch
import transformers
from adapters import BnConfig, CompacterConfig, LoRAConfig, PrefixTuningConfig, PromptTuningConfig
from adapters.configuration import DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from safetensors.torch import save_file

OUT = Path(__file__).parents[2] / "python" / "data" / "adapterhub"
IDS = torch.tensor([[3, 9, 14, 7, 21, 5], [8, 2, 30, 11, 4, 19]])

BASES = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=32,
            n_embd=16,
            n_layer=2,
            n_head=4,
            n_positions=32,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
    "bert": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=32,
            num_labels=3,
        )
    ),
}
METHODS = {
    "seq_bn": lambda: SeqBnConfig(reduction_factor=4),
    "double_seq_bn": lambda: DoubleSeqBnConfig(reduction_factor={"0": 4, "default": 8}),
    "par_bn": lambda: ParBnConfig(reduction_factor=2, mh_adapter=True),
    "options": lambda: BnConfig(
        mh_adapter=True,
        output_adapter=True,
        reduction_factor=4,
        non_linearity="gelu",
        ln_before=True,
        ln_after=True,
        use_gating=True,
        scaling="channel",
        original_ln_before=True,
        residual_before_ln=False,
    ),
    "learned": lambda: BnConfig(
        mh_adapter=True,
        output_adapter=True,
        reduction_factor=4,
        non_linearity="leakyrelu",
        scaling="learned",
        adapter_residual_before_ln=True,
        ln_after=True,
        leave_out=[1],
    ),
    "compacter": lambda: CompacterConfig(reduction_factor=4, phm_dim=2),
    "prefix_mlp": lambda: PrefixTuningConfig(prefix_length=3, bottleneck_size=5),
    "prefix_flat": lambda: PrefixTuningConfig(flat=True, prefix_length=3),
    "prefix_gated": lambda: PrefixTuningConfig(
        prefix_length=3, bottleneck_size=5, use_gating=True, shared_gating=False
    ),
    "prefix_gated_flat": lambda: PrefixTuningConfig(flat=True, prefix_length=3, use_gating=True),
    "prompt": lambda: PromptTuningConfig(prompt_length=3, combine="prefix_after_bos"),
    "lora": lambda: LoRAConfig(r=2, alpha=3),
    "lora_everywhere": lambda: LoRAConfig(
        r=3,
        alpha=6,
        attn_matrices=["q", "k", "v"],
        intermediate_lora=True,
        output_lora=True,
        leave_out=[1],
    ),
    "lora_dora": lambda: LoRAConfig(r=2, alpha=2, use_dora=True),
}
# What the library itself does not have.
ABSENT = {("prompt", "llama"), ("prompt", "gpt2"), ("lora_dora", "gpt2")}


def randomise(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            p.copy_(torch.randn_like(p) * (0.2 if p.dim() > 1 else 0.05) + float("orm" in name))


def main(only: list[str]) -> None:
    if not only:
        shutil.rmtree(OUT, ignore_errors=True)
    for family, make in BASES.items():
        base = make().eval()
        randomise(base)
        base.save_pretrained(OUT / family / "base")
        for method, config in METHODS.items():
            if (method, family) in ABSENT or (only and method not in only):
                continue
            model = make().eval()
            # With "sdpa" and no padding the library forgets the causal mask behind a prefix.
            model.set_attn_implementation("eager")
            model.load_state_dict(base.state_dict())
            adapters.init(model)
            model.add_adapter("shoot", config=config())
            model.set_active_adapters("shoot")
            torch.manual_seed(2)
            with torch.no_grad():
                for name, p in sorted(model.named_parameters()):
                    own = any(
                        part in name
                        for part in (
                            "adapters.",
                            "loras.",
                            "prefix_tuning",
                            "prompt_tuning",
                            "shared_par",
                        )
                    )
                    if own:
                        p.add_(torch.randn_like(p) * 0.2)
                logits = model.eval()(input_ids=IDS).logits
            folder = OUT / family / method
            model.save_adapter(str(folder), "shoot", with_head=False)
            save_file({"ids": IDS, "logits": logits.contiguous()}, folder / "expected.safetensors")
            print(family, method, tuple(logits.shape), file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
