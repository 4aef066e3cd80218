"""LoRA on a Hugging Face model in a plain loop: train, save, reload, merge.

    python hf_lora.py [MODEL_FOLDER]

Without a folder it takes a small random Llama, and rows of ascending numbers to learn.
"""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import budwood


def load_base(folder):
    torch.manual_seed(0)
    if folder:
        return AutoModelForCausalLM.from_pretrained(folder)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def batches(steps, vocabulary=64):
    for _ in range(steps):
        yield (torch.randint(0, vocabulary, (16, 1)) + torch.arange(24)) % vocabulary


folder = sys.argv[1] if len(sys.argv) > 1 else None
config = budwood.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = budwood.get_peft_model(load_base(folder), config)
model.print_trainable_parameters()

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
model.train()
for step, ids in enumerate(batches(steps=60)):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(f"step {step:3d}  loss {loss.item():.3f}")
print(f"last loss {loss.item():.3f}")

model.eval()
with tempfile.TemporaryDirectory() as out, torch.no_grad():
    model.save_pretrained(out)  # adapter_config.json and adapter_model.safetensors
    again = budwood.PeftModel.from_pretrained(load_base(folder), out)
    ids = next(batches(1))
    assert torch.equal(again(ids).logits, model(ids).logits)

    merged = again.merge_and_unload()  # a plain transformers model
    difference = (merged(ids).logits - model(ids).logits).abs().max().item()
    print(f"merged into a {type(merged).__name__}, logits differ by at most {difference:.1e}")
