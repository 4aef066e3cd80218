"""In a build with CUDA, every operator of Budwood has its kernels for CUDA. Needs no GPU."""

import sys

import torch

import budwood
from budwood import _C

WANTED = {
    "CPU": (
        "linear",
        "linear_backward_input",
        "linear_backward_weight",
        "quantize_4bit",
        "dequantize_4bit",
        "lora_linear",
    ),
    "AutocastCUDA": ("linear", "lora_linear"),
}
WANTED["CUDA"] = WANTED["CPU"]

missing = 0
for key, names in WANTED.items():
    for name in names:
        has = torch._C._dispatch_has_kernel_for_dispatch_key(f"budwood::{name}", key)
        missing += not has
        print(f"budwood::{name:24} {key:13} {'registered' if has else 'MISSING'}")
packed = _C.packed_devices()
print(f"packed weights work on: {', '.join(packed)}")
print(f"budwood {budwood.__version__}, torch {torch.__version__}, CUDA {torch.version.cuda}")
if not torch.cuda.is_available():
    print("No GPU here: the CUDA kernels are compiled, linked and registered; none was run.")
sys.exit(1 if missing or "cuda" not in packed else 0)
