"""GPTQ and AWQ folders, packed here by the written rules, give the logits of their weights."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import make_tiny
from safetensors.torch import load_file, save_file

import budwood
from budwood import _C

IDS = torch.tensor([[5, 17, 3, 96, 41, 8, 22, 60, 13, 2, 71, 33]])
GROUP = 24
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(fields, bits, order=range(8)):
    """[n, m] codes to int32 words [n * bits / 32, m]; field order[i] of a word is in place i."""
    per_word = 32 // bits
    packed = np.zeros((fields.shape[0] // per_word, fields.shape[1]), np.uint32)
    for i, field in zip(range(per_word), order, strict=False):
        packed |= fields[field::per_word].astype(np.uint32) << np.uint32(bits * i)
    return torch.from_numpy(packed.view(np.int32).copy())


def rounded(weight, bits, groups_of_columns):
    """Codes [in, out], zero points and scales [groups, out], and the matrix they stand for."""
    columns = weight.T.double().numpy()
    groups = int(groups_of_columns.max()) + 1
    scales = np.zeros((groups, columns.shape[1]), np.float16)
    zeros = np.zeros(scales.shape, np.int64)
    for g in range(groups):
        part = columns[groups_of_columns == g]
        low, high = np.minimum(part.min(0), 0), np.maximum(part.max(0), 0)
        scales[g] = ((high - low) / (2**bits - 1)).astype(np.float16)
        zeros[g] = np.clip(np.round(-low / scales[g].astype(np.float64)), 1, 2**bits - 1)
    s, z = scales.astype(np.float64)[groups_of_columns], zeros[groups_of_columns]
    codes = np.clip(np.round(columns / s) + z, 0, 2**bits - 1).astype(np.int64)
    values = torch.from_numpy((s * (codes - z)).T.copy()).float()
    return codes, zeros, torch.from_numpy(scales), values


def is_projection(name):
    return name.endswith("proj.weight")


def gptq_parts(weight, bits, v2, act_order):
    index = np.arange(weight.shape[1]) // GROUP
    if act_order:
        np.random.default_rng(weight.shape[1]).shuffle(index)
    codes, zeros, scales, values = rounded(weight, bits, index)
    return {
        "qweight": words(codes, bits),
        "qzeros": words((zeros if v2 else zeros - 1).T, bits).T.contiguous(),
        "scales": scales,
        "g_idx": torch.from_numpy(index.astype(np.int32)),
    }, values


def awq_parts(weight):
    codes, zeros, scales, values = rounded(weight, 4, np.arange(weight.shape[1]) // GROUP)
    return {
        "qweight": words(codes.T, 4, AWQ_ORDER).T.contiguous(),
        "qzeros": words(zeros.T, 4, AWQ_ORDER).T.contiguous(),
        "scales": scales,
    }, values


def write_folder(source, folder, family, quantization, pack):
    """A quantised copy of a tiny model; returns the plain model of the same values."""
    shutil.copytree(source, folder)
    reference, stored = make_tiny(family), {}
    parameters = dict(reference.named_parameters())
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not is_projection(name):
            stored[name] = tensor
            continue
        parts, values = pack(tensor)
        stored |= {name.removesuffix("weight") + part: t for part, t in parts.items()}
        with torch.no_grad():
            parameters[name].copy_(values)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    return reference


def relative(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def gptq_folder(tiny_folder, folder, family="llama", bits=4, v2=False, act_order=False):
    quantization = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GROUP,
        "desc_act": act_order,
        "sym": False,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
    }
    return write_folder(
        tiny_folder(family),
        folder,
        family,
        quantization,
        lambda w: gptq_parts(w, bits, v2, act_order),
    )


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_gptq_folder_is_read_exactly(tiny_folder, tmp_path, bits, v2, act_order):
    folder = tmp_path / "gptq"
    reference = gptq_folder(tiny_folder, folder, "qwen2", bits, v2, act_order)
    model = _C.load_model(str(folder))
    assert {part["form"] for part in _C.base_weights(model)} >= {f"affine{bits}"}
    with torch.no_grad():
        assert relative(model(IDS), reference(IDS).logits) < 1e-5


def test_an_awq_folder_is_read_exactly(tiny_folder, tmp_path):
    quantization = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": GROUP,
        "zero_point": True,
        "version": "gemm",
    }
    folder = tmp_path / "awq"
    reference = write_folder(tiny_folder("llama"), folder, "llama", quantization, awq_parts)
    with torch.no_grad():
        found = _C.load_model(str(folder))(IDS)
    assert relative(found, reference(IDS).logits) < 1e-5


def test_a_gptq_folder_takes_lora_and_is_saved_as_integers(tiny_folder, tmp_path):
    folder, again = tmp_path / "gptq", tmp_path / "again"
    reference = gptq_folder(tiny_folder, folder, act_order=True)
    model = _C.load_model(str(folder))
    _C.save_model(model, str(again), weights="packed")
    with torch.no_grad():
        assert torch.equal(_C.load_model(str(again))(IDS), model(IDS))
    _C.inject(model, budwood.LoraConfig(r=4, target_modules="all-linear"))
    loss = model(IDS).square().mean()
    loss.backward()
    assert all(p.grad is not None for _, p in model.named_parameters() if p.requires_grad)
    assert relative(loss, reference(IDS).logits.square().mean()) < 1e-5


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("qweight", lambda t: t[:-1].contiguous(), r"qweight .*\[5, 48\].*; wanted Int \[6, 48\]"),
        ("qzeros", lambda t: None, "qzeros"),
        ("scales", lambda t: t * float("nan"), "scales"),
        ("g_idx", lambda t: t + 7, "g_idx"),
    ],
)
def test_a_damaged_gptq_folder_is_refused_by_name(tiny_folder, tmp_path, part, change, message):
    folder = tmp_path / "gptq"
    gptq_folder(tiny_folder, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.1.self_attn.q_proj.{part}"
    changed = change(tensors.pop(name))
    if changed is not None:
        tensors[name] = changed
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(budwood.Error, match=message) as error:
        _C.load_model(str(folder))
    assert "model.layers.1.self_attn.q_proj" in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bits", 3, "bits is 3; Budwood reads 4 and 8"),
        ("checkpoint_format", "marlin", "checkpoint_format is 'marlin'"),
        ("quant_method", "aqlm", "'aqlm'.*awq, bitsandbytes, budwood, gptq"),
    ],
)
def test_settings_that_are_not_read_are_named(tiny_folder, tmp_path, key, value, message):
    folder = tmp_path / "gptq"
    gptq_folder(tiny_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(budwood.Error, match=message):
        _C.load_model(str(folder))
