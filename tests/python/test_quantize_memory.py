"""Packing while loading holds the packed model and little else at any time."""

import json
import subprocess
import sys

import pytest
import torch
import transformers

CHILD = """
import json, sys
from budwood import _C

def status(field):
    line = next(l for l in open("/proc/self/status") if l.startswith(field + ":"))
    return int(line.split()[1]) / 1024

before = status("VmRSS")
model = _C.load_model(sys.argv[1], dtype="float32", quantize=sys.argv[2])
packed = sum(part["bytes"] for part in _C.base_weights(model)) / 2**20
print(json.dumps({
    "peak": status("VmHWM") - before, "after": status("VmRSS") - before, "packed": packed
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=8,
    )
    path = tmp_path_factory.mktemp("quantize") / "model"
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize("format", ["nf4", "int8", "int4"])
def test_a_16_bit_folder_is_packed_tensor_by_tensor(folder, format):
    done = subprocess.run(
        [sys.executable, "-c", CHILD, folder, format], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    plain = 12 * (4 * 512 * 512 + 3 * 512 * 2048) * 4 / 2**20
    assert plain > 190
    # Between two trims of the heap 32 MB of plain matrices pass, in two copies.
    assert found["after"] < found["packed"] + 40, found
    assert found["peak"] < found["packed"] + 90, found
