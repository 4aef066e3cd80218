"""Adapters folded into quantised models and GGUF files, beside bitsandbytes, gguf and float64."""

import copy
import json
import resource
import subprocess
from pathlib import Path

import bitsandbytes
import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import make_tiny
from safetensors.torch import load_file, save_file
from test_checkpoint_folders import awq_parts, gptq_folder, write_folder
from test_merge_files import half_step
from test_methods import randomise
from test_save_gguf import config_of, interleaved, tensors_of

import budwood
from budwood import _C

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny(folder, dtype=torch.bfloat16, tied=False):
    torch.manual_seed(1)
    config = config_of("llama")
    config.tie_word_embeddings = tied
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    model.save_pretrained(folder)
    return model


def adapt(base, folder, scale=1.0, **options):
    """A saved adapter of HF PEFT, and {weight name: its change in fp64}."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ALL, "task_type": "CAUSAL_LM"} | options
    model = peft.get_peft_model(copy.deepcopy(base).float(), peft.LoraConfig(**settings))
    torch.manual_seed(5)
    randomise(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(scale)
    model.save_pretrained(folder)
    changes = {}
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            name = path.removeprefix("base_model.model.") + ".weight"
            changes[name] = (module.scaling["default"] * (b.double() @ a.double())).detach()
    return changes


def weights_of(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def bnb_values(folder, name):
    """What bitsandbytes says that a matrix of a folder is, in fp32."""
    stored = load_file(folder / "model.safetensors")
    if name.removesuffix("weight") + "SCB" in stored:
        scales = stored[name.removesuffix("weight") + "SCB"]
        return bitsandbytes.functional.int8_vectorwise_dequant(stored[name], scales)
    parts = {key: value for key, value in stored.items() if key.startswith(name + ".")}
    if not parts:
        return stored[name].float()
    packed = bitsandbytes.nn.Params4bit.from_prequantized(stored[name], parts, device="cpu")
    return plain_values(packed.data, packed.quant_state)


def plain_values(codes, state):
    """What bitsandbytes decodes to in fp32, in rows of whole blocks: where a processor has AVX-512
    with bf16, its loop is wrong about others."""
    shape = state.shape
    assert shape.numel() % state.blocksize == 0
    state.dtype = torch.float32
    state.shape = torch.Size([shape.numel() // state.blocksize, state.blocksize])
    values = bitsandbytes.functional.dequantize_4bit(codes, state)
    state.shape = shape
    return values.reshape(shape)


def quantised(model, out, format, **options):
    if out.suffix == ".gguf":
        _C.save_gguf(_C.load_model(str(model)), str(out), type=format)
    else:
        _C.quantize_files(str(model), str(out), format=format, **options)
    return out


def near(found, exact, kind):
    """Whether fp64 values were rounded once, to nearest, to F32, F16 or BF16."""
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    away = (found.double() - exact).abs()
    representable = torch.equal(found.to(dtype).float(), found.float())
    return representable and bool((away <= half_step(exact, dtype)).all())


FORMS = [
    ("nf4", {"double_quant": False}),
    ("nf4", {"double_quant": True}),
    ("fp4", {"double_quant": False}),
    ("int8", {}),
]


@pytest.mark.parametrize(("format", "options"), FORMS)
@pytest.mark.parametrize("written", ["auto", "float32"])
def test_codes_of_bitsandbytes_and_the_change_are_rounded_once(format, options, written, tmp_path):
    base = tiny(tmp_path / "plain")
    packed = quantised(tmp_path / "plain", tmp_path / "packed", format, **options)
    changes = adapt(base, tmp_path / "adapter")
    report = budwood.merge_files(packed, tmp_path / "adapter", tmp_path / "out", dtype=written)
    dtype = torch.bfloat16 if written == "auto" else torch.float32
    after = weights_of(tmp_path / "out")
    assert set(after) == set(weights_of(tmp_path / "plain"))
    for name, tensor in after.items():
        assert tensor.dtype == dtype
        wanted = bnb_values(packed, name).double() + changes.get(name, 0)
        assert near(tensor, wanted, "BF16" if written == "auto" else "F32"), name
    assert {t.name for t in report.merged} == set(changes)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    _, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert min(t.survival for t in report.merged) > 0.97


@pytest.mark.parametrize(("format", "options"), [*FORMS, ("int4", {}), ("q4_0", {})])
def test_the_bytes_are_those_of_merging_in_memory(format, options, tmp_path):
    base = tiny(tmp_path / "plain")
    name = "packed.gguf" if format.startswith("q") else "packed"
    packed = quantised(tmp_path / "plain", tmp_path / name, format, **options)
    adapt(base, tmp_path / "adapter")
    wanted = None
    for jobs in (1, 3):
        out = tmp_path / f"out{jobs}"
        budwood.merge_files(packed, tmp_path / "adapter", out, jobs=jobs, dtype="float32")
        found = (tmp_path / f"out{jobs}" / "model.safetensors").read_bytes()
        assert wanted is None or wanted == found
        wanted = found
    loaded = _C.load_model(str(packed), dtype="auto")
    _C.load_adapter(loaded, str(tmp_path / "adapter"))
    _C.merge(loaded, ["default"])
    _C.save_model(loaded, str(tmp_path / "memory"), "float32", "", 10**9)
    streamed, memory = weights_of(tmp_path / "out1"), weights_of(tmp_path / "memory")
    assert set(streamed) == set(memory)
    for key, tensor in memory.items():
        assert torch.equal(streamed[key], tensor), key


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_gptq_and_awq_folders(kind, tiny_folder, tmp_path):
    folder = tmp_path / "packed"
    if kind == "gptq":
        reference = gptq_folder(tiny_folder, folder, act_order=True)
    else:
        config = {"quant_method": "awq", "bits": 4, "group_size": 24, "version": "gemm"}
        config["zero_point"] = True
        reference = write_folder(tiny_folder("llama"), folder, "llama", config, awq_parts)
    changes = adapt(make_tiny("llama"), tmp_path / "adapter")
    budwood.merge_files(folder, tmp_path / "adapter", tmp_path / "out", dtype="float32")
    values = dict(reference.named_parameters())
    for name, tensor in weights_of(tmp_path / "out").items():
        wanted = values[name].detach().double() + changes.get(name, 0)
        assert torch.equal(tensor, wanted.float()), name
    with pytest.raises(budwood.Error, match=f"of {kind}, whose codes need calibration"):
        budwood.merge_files(folder, tmp_path / "adapter", tmp_path / "again", into="requantised")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(("format", "options"), [*FORMS, ("int4", {})])
def test_codes_are_made_anew_and_transformers_opens_them(format, options, tmp_path):
    base = tiny(tmp_path / "plain")
    packed = quantised(tmp_path / "plain", tmp_path / "packed", format, **options)
    changes = adapt(base, tmp_path / "adapter", scale=3.0, target_modules=["q_proj", "down_proj"])
    report = budwood.merge_files(packed, tmp_path / "adapter", tmp_path / "out", into="requantised")
    assert {t.name for t in report.merged} == set(changes)
    assert min(t.survival for t in report.merged) > 0.8
    before, after = weights_of(packed), weights_of(tmp_path / "out")
    assert set(before) == set(after)
    for name, tensor in before.items():
        touched = any(name.startswith(change.removesuffix("weight")) for change in changes)
        if not touched:
            assert torch.equal(tensor, after[name]), name
    _C.load_model(str(tmp_path / "out"))
    report = budwood.verify_files(packed, tmp_path / "adapter", tmp_path / "out")
    assert not report.faults
    assert report.passed(0.6), max(t.steps for t in report.tensors)
    assert not budwood.verify_files(packed, tmp_path / "adapter", packed).passed(1)
    if format == "int4":
        return
    dequantised = budwood.merge_files(
        packed, tmp_path / "adapter", tmp_path / "wide", dtype="float32"
    )
    assert dequantised.merged
    wide = weights_of(tmp_path / "wide")
    for name in changes:
        if format == "int8":
            codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(wide[name].half())
            wanted = bitsandbytes.functional.int8_vectorwise_dequant(codes, scales)
            assert (bnb_values(tmp_path / "out", name) - wanted).abs().max() < 2e-2
            continue
        codes, state = bitsandbytes.functional.quantize_4bit(
            wide[name],
            blocksize=64,
            quant_type=format,
            compress_statistics=options["double_quant"],
        )
        assert torch.equal(codes, after[name]), name
        wanted = plain_values(codes, state)
        found = bnb_values(tmp_path / "out", name)
        if options["double_quant"]:
            # Of scales between two codes either may be taken.
            assert (found - wanted).norm() < 2e-3 * wanted.norm()
        else:
            assert torch.equal(found, wanted), name
    # With gradients: without them, bitsandbytes has a path on AVX-512 that takes wide models only.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    theirs.enable_input_require_grads()
    assert theirs(torch.arange(12).reshape(1, 12)).logits.isfinite().all()


def test_a_change_that_the_grid_swallows_is_refused(tmp_path):
    base = tiny(tmp_path / "plain")
    packed = quantised(tmp_path / "plain", tmp_path / "packed", "nf4")
    adapt(base, tmp_path / "adapter", scale=1e-3)
    with pytest.raises(budwood.Error, match="undo more than half of the adapter in 21 of 21"):
        budwood.merge_files(packed, tmp_path / "adapter", tmp_path / "out", into="requantised")
    assert not (tmp_path / "out").exists()
    report = budwood.merge_files(
        packed, tmp_path / "adapter", tmp_path / "out", into="requantised", force=True
    )
    assert any("of the change survives" in warning for warning in report.warnings)
    # Nothing but the change is lost: the codes are those that were there.
    assert torch.equal(
        weights_of(packed)["model.layers.0.mlp.up_proj.weight"],
        weights_of(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"],
    )
    kept = budwood.merge_files(packed, tmp_path / "adapter", tmp_path / "kept")
    assert min(t.survival for t in kept.merged) > 0.9


def test_the_original_takes_the_change_and_the_distance_is_told(tmp_path):
    base = tiny(tmp_path / "plain")
    packed = quantised(tmp_path / "plain", tmp_path / "packed", "nf4")
    changes = adapt(base, tmp_path / "adapter")
    arguments = {"into": "original16", "original": tmp_path / "plain"}
    report = budwood.merge_files(packed, tmp_path / "adapter", tmp_path / "out", **arguments)
    budwood.merge_files(tmp_path / "plain", tmp_path / "adapter", tmp_path / "same")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "same" / "model.safetensors"
    ).read_bytes()
    after = weights_of(tmp_path / "out")
    for tensor in report.merged:
        trained = bnb_values(packed, tensor.name).double() + changes[tensor.name]
        away = (after[tensor.name].double() - trained).norm() / changes[tensor.name].norm()
        assert tensor.distance == pytest.approx(away.item(), rel=1e-5)
    written = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert written["into"] == "original16"
    assert all(t["distance"] > 0 for t in written["merged"])
    for wrong, message in (
        ({"into": "original16"}, "needs the plain model"),
        ({"original": tmp_path / "plain"}, "original is for into original16"),
        ({"into": "elsewhere"}, "into is dequantised, requantised, original16"),
        ({"into": "requantised", "dtype": "float16"}, "dtype is auto"),
    ):
        with pytest.raises(budwood.Error, match=message):
            budwood.merge_files(packed, tmp_path / "adapter", tmp_path / "no", **wrong)
    with pytest.raises(budwood.Error, match="is no quantised folder"):
        budwood.merge_files(
            tmp_path / "plain", tmp_path / "adapter", tmp_path / "no", into="requantised"
        )
    with pytest.raises(budwood.Error, match="is not quantised"):
        budwood.merge_files(
            tmp_path / "plain",
            tmp_path / "adapter",
            tmp_path / "no",
            into="original16",
            original=packed,
        )


def gguf_values(path):
    """{transformers' name: fp32 values} by the gguf package, rows in transformers' order."""
    reader = gguf.GGUFReader(path)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    theirs = {}
    model = transformers.AutoModelForCausalLM.from_config(config_of("llama"))
    heads = config_of("llama").num_attention_heads
    head_dim = config_of("llama").hidden_size // heads
    by_name = {t.name: t for t in reader.tensors}
    for name in model.state_dict():
        tensor = by_name.get(names.get_name(name, try_suffixes=(".weight", ".bias")))
        if tensor is None:
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        values = values.reshape(list(tensor.shape)[::-1])
        if ".q_proj." in name or ".k_proj." in name:
            order = interleaved(np.arange(len(values)), head_dim)
            back = np.empty_like(values)
            back[order] = values
            values = back
        theirs[name] = torch.tensor(values)
    return theirs


@pytest.mark.parametrize("type", ["q4_0", "q4_1", "q8_0", "f16", "bf16", "f32"])
def test_a_gguf_file_becomes_a_folder_or_a_gguf_file(type, tmp_path):
    base = tiny(tmp_path / "plain")
    packed = quantised(tmp_path / "plain", tmp_path / "model.gguf", type)
    changes = adapt(base, tmp_path / "adapter")
    values = gguf_values(packed)
    report = budwood.merge_files(packed, tmp_path / "adapter", tmp_path / "out.gguf")
    before, after = tensors_of(packed), tensors_of(tmp_path / "out.gguf")
    assert list(before) == list(after)
    found = gguf_values(tmp_path / "out.gguf")
    kinds = gguf.GGMLQuantizationType
    plain = {"f16": kinds.F16, "bf16": kinds.BF16, "f32": kinds.F32}
    for name, value in values.items():
        wanted = value.double() + changes.get(name, 0)
        if name in changes:
            kind = plain.get(type, kinds.F16)
            assert near(found[name], wanted, kind.name), name
        else:
            assert torch.equal(found[name], value), name
    assert {t.name for t in report.merged} == set(changes)
    saved = json.loads((tmp_path / "out.gguf.merge_report.json").read_text())
    assert len(saved["merged"]) == len(changes)
    report = budwood.verify_files(packed, tmp_path / "adapter", tmp_path / "out.gguf")
    assert report.passed(0.5)
    assert all(t.equal for t in report.tensors)
    assert {t.name for t in report.tensors if t.delta_norm > 0} == set(changes)
    assert not budwood.verify_files(packed, tmp_path / "adapter", packed).passed(1)

    if type != "f32":  # to a folder, in fp32: exact up to one rounding
        budwood.merge_files(packed, tmp_path / "adapter", tmp_path / "folder")
        for name, tensor in weights_of(tmp_path / "folder").items():
            wanted = values[name].double() + changes.get(name, 0)
            assert torch.equal(tensor, wanted.float()), name


def damage(path, to, name):
    """A copy of a GGUF file in which the first numbers of a tensor are twice as large."""
    copy = bytearray(path.read_bytes())
    tensor = tensors_of(path)[name]
    values = gguf.quants.dequantize(tensor.data[:1], tensor.tensor_type)
    twice = gguf.quants.quantize((2 * values).astype(np.float32), tensor.tensor_type).tobytes()
    copy[tensor.data_offset : tensor.data_offset + len(twice)] = twice
    to.write_bytes(copy)


@pytest.mark.parametrize("dtype", ["auto", "float16", "float32", "q8_0", "q4_0", "q4_1"])
def test_a_folder_becomes_a_gguf_file(dtype, tmp_path):
    base = tiny(tmp_path / "plain")
    changes = adapt(base, tmp_path / "adapter")
    out = tmp_path / "out.gguf"
    report = budwood.merge_files(tmp_path / "plain", tmp_path / "adapter", out, dtype=dtype)
    kind = {"auto": "BF16", "float16": "F16", "float32": "F32"}.get(dtype, dtype.upper())
    kind = gguf.GGMLQuantizationType[kind]
    stored = tensors_of(out)
    head_dim = config_of("llama").hidden_size // config_of("llama").num_attention_heads
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    for name, weight in base.state_dict().items():
        tensor = stored[names.get_name(name, try_suffixes=(".weight",))]
        values = (weight.double() + changes.get(name, 0)).numpy()
        if ".q_proj." in name or ".k_proj." in name:
            values = interleaved(values, head_dim)
        wanted = kind if weight.dim() == 2 else gguf.GGMLQuantizationType.F32
        if dtype.startswith("q4") and ("embed" in name or "lm_head" in name):
            wanted = gguf.GGMLQuantizationType.Q8_0
        assert tensor.tensor_type == wanted, name
        if wanted == gguf.GGMLQuantizationType.BF16:
            found = torch.tensor(gguf.quants.dequantize(tensor.data, wanted))
            assert near(found, torch.tensor(values), "BF16"), name
            continue
        if wanted == gguf.GGMLQuantizationType.F16:
            assert tensor.data.tobytes() == values.astype(np.float16).tobytes(), name
            continue
        reference = gguf.quants.quantize(values.astype(np.float32), wanted)
        assert tensor.data.tobytes() == reference.tobytes(), name
    assert min(t.survival for t in report.merged) > 0.5
    _C.load_model(str(out))
    report = budwood.verify_files(tmp_path / "plain", tmp_path / "adapter", out)
    assert report.passed(0.501), max(t.steps for t in report.tensors)
    assert all(t.equal for t in report.tensors)
    damage(out, tmp_path / "damaged.gguf", "blk.1.ffn_down.weight")
    report = budwood.verify_files(
        tmp_path / "plain", tmp_path / "adapter", tmp_path / "damaged.gguf"
    )
    assert [t.name for t in report.tensors if not t.equal] == [
        "model.layers.1.mlp.down_proj.weight"
    ]
    assert not report.passed(1)
    with pytest.raises(budwood.Error, match="exists already"):
        budwood.merge_files(tmp_path / "plain", tmp_path / "adapter", out)
    budwood.merge_files(tmp_path / "plain", tmp_path / "adapter", out, overwrite=True)


def test_blocks_of_gguf_are_made_anew_but_not_k_quants(tmp_path):
    base = tiny(tmp_path / "plain")
    packed = quantised(tmp_path / "plain", tmp_path / "model.gguf", "q8_0")
    changes = adapt(base, tmp_path / "adapter", target_modules=["up_proj"])
    out = tmp_path / "out.gguf"
    report = budwood.merge_files(packed, tmp_path / "adapter", out, into="requantised")
    before, after = tensors_of(packed), tensors_of(out)
    for name, tensor in before.items():
        assert after[name].tensor_type == tensor.tensor_type
        assert (after[name].data.tobytes() == tensor.data.tobytes()) == ("ffn_up" not in name)
    values = gguf_values(packed)
    for name, change in changes.items():
        exact = (values[name].double() + change).float().numpy()
        layer = name.split(".")[2]
        kind = gguf.GGMLQuantizationType.Q8_0
        reference = gguf.quants.quantize(exact, kind)
        assert after[f"blk.{layer}.ffn_up.weight"].data.tobytes() == reference.tobytes()
    assert min(t.survival for t in report.merged) > 0.9


def test_a_missing_part_of_a_packed_layer_is_named(tmp_path):
    base = tiny(tmp_path / "plain")
    packed = quantised(tmp_path / "plain", tmp_path / "packed", "nf4")
    adapt(base, tmp_path / "adapter")
    stored = weights_of(packed)
    for key, message in (
        ("model.layers.0.mlp.up_proj.weight.absmax", "up_proj.*absmax"),
        ("model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "settings"),
    ):
        save_file({k: v for k, v in stored.items() if k != key}, packed / "model.safetensors")
        with pytest.raises(budwood.Error, match=message):
            budwood.merge_files(packed, tmp_path / "adapter", tmp_path / "out")
        assert not (tmp_path / "out").exists()
    save_file(stored, packed / "model.safetensors")
    with (packed / "model.safetensors").open("r+b") as file:
        file.truncate((packed / "model.safetensors").stat().st_size - 10)
    with pytest.raises(budwood.Error, match=r"model\.safetensors"):
        budwood.merge_files(packed, tmp_path / "adapter", tmp_path / "out")


def test_a_gguf_file_larger_than_the_memory_of_its_process_is_merged(tmp_path):
    program = Path(_C.__file__).parents[2] / "tools" / "budwood"
    if not program.exists():
        pytest.skip("the native program is not built")
    limit, width, words = 900_000_000, 64, 4_700_000  # 1.2 GB in the token table
    packed = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(packed, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(words)
    names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    shapes = {f"blk.0.{name}.weight": (width, width) for name in names}
    shapes |= {f"blk.0.{name}.weight": (width,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {"output_norm.weight": (width,), "token_embd.weight": (words, width)}
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with packed.open("ab") as file:  # zeros that take no disk
        begin = -(-file.tell() // 32) * 32
        file.truncate(begin + sum(4 * int(np.prod(shape)) for shape in shapes.values()))
    assert packed.stat().st_size > limit

    key = "base_model.model.model.layers.0.self_attn.v_proj"
    a, b = torch.randn(2, width), torch.randn(width, 2)
    (tmp_path / "adapter").mkdir()
    save_file(
        {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    config = budwood.LoraConfig(r=2, lora_alpha=2, target_modules=["v_proj"])
    (tmp_path / "adapter" / "adapter_config.json").write_text(config.to_json())

    def lower():
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    out = tmp_path / "out.gguf"
    command = [program, "merge", "--model", packed, "--adapter", tmp_path / "adapter", "--out", out]
    done = subprocess.run(command, preexec_fn=lower, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = tensors_of(out)["blk.0.attn_v.weight"].data
    assert np.array_equal(found, (b.double() @ a.double()).float().numpy())
    out.unlink()


def test_smollm2_as_it_lies_in_its_gguf_file(smollm2_gguf, tmp_path):
    before = tensors_of(smollm2_gguf)
    rows, cols = 576, 576
    folder = tmp_path / "adapter"
    folder.mkdir()
    torch.manual_seed(0)
    key = "base_model.model.model.layers.3.self_attn.q_proj"
    a, b = 0.05 * torch.randn(4, cols), 0.05 * torch.randn(rows, 4)
    save_file(
        {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}, folder / "adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    settings["target_modules"] = ["model.layers.3.self_attn.q_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    report = budwood.merge_files(smollm2_gguf, folder, tmp_path / "out.gguf")
    after = tensors_of(tmp_path / "out.gguf")
    name = "blk.3.attn_q.weight"
    for other, tensor in before.items():
        if other != name:
            assert after[other].data.tobytes() == tensor.data.tobytes()
    values = gguf.quants.dequantize(before[name].data, before[name].tensor_type)
    change = interleaved((2.0 * b.double() @ a.double()).numpy(), 64)
    wanted = (values.astype(np.float64) + change).astype(np.float16)
    assert after[name].data.tobytes() == wanted.tobytes()
    assert len(report.merged) == 1
    _C.load_model(str(tmp_path / "out.gguf"))
