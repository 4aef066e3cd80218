"""budwood quantize, and quantised bases in train, eval and generate."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import make_tiny
from safetensors.torch import load_file, save_file

import budwood
from budwood import _C
from budwood.cli import main

IDS = torch.tensor([[5, 17, 3, 96, 41, 8, 22, 60, 13, 2, 71, 33]])


def relative(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def run(capsys, *arguments):
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failure(capsys, *arguments):
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("budwood: ")
    return error


@pytest.mark.parametrize("family", ["llama", "qwen2", "llama-tied-bias"])
@pytest.mark.parametrize("format", ["nf4", "fp4", "int8", "int4"])
def test_a_quantised_folder_gives_the_logits_of_its_weights(
    tiny_folder, tmp_path, capsys, family, format
):
    out = tmp_path / "out"
    report = run(capsys, "quantize", "-m", tiny_folder(family), "-f", format, "-o", out)
    assert len(report["matrices"]) == 21
    model = _C.load_model(str(out))
    reference = make_tiny(family)
    errors = {}
    with torch.no_grad():
        for name, p in reference.named_parameters():
            if p.dim() == 2 and "lm_head" not in name and "embed" not in name:
                w = _C.dequantize(*_C.quantize(p, format))
                errors[name] = relative(w, p)
                p.copy_(w)
        assert relative(model(IDS), reference(IDS).logits) < 1e-5
    found = {m["name"]: m["error"] for m in report["matrices"]}
    assert found.keys() == errors.keys()
    for name, error in errors.items():
        assert abs(found[name] - error) < 1e-5
    _C.save_model(model, str(tmp_path / "again"), weights="packed")
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("format", ["q4_0", "q4_1", "q8_0", "f16", "bf16", "f32"])
def test_a_gguf_is_written_and_its_error_reported(smollm2_gguf, tmp_path, capsys, format):
    out = tmp_path / "model.gguf"
    report = run(capsys, "quantize", "-m", smollm2_gguf, "-f", format, "-o", out)
    assert len(report["matrices"]) == 210
    worst = {"q4_0": 0.1, "q4_1": 0, "q8_0": 1e-2, "f16": 1e-3, "bf16": 1e-2, "f32": 0}[format]
    assert report["error"] <= worst
    assert {part["form"] for part in _C.base_weights(_C.load_model(str(out)))}
    shutil.copy(out, tmp_path / "old.gguf")
    run(capsys, "quantize", "-m", tmp_path / "old.gguf", "-f", "q8_0", "-o", out, "--overwrite")


def test_the_quantised_model_keeps_its_tokeniser(smollm2_gguf, tmp_path, capsys):
    from budwood.tokenizer import load_tokenizer

    out = tmp_path / "out"
    run(capsys, "quantize", "-m", smollm2_gguf, "-f", "nf4", "--double-quant", "-o", out)
    text = "Whether 'tis nobler in the mind: to suffer\n\tno more 1234"
    wanted = load_tokenizer(str(smollm2_gguf))(text).input_ids
    assert load_tokenizer(str(out))(text).input_ids == wanted
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_use_double_quant"] is True


def test_outputs_and_options_that_do_not_fit_are_refused(tiny_folder, tmp_path, capsys):
    model, out = tiny_folder("llama"), tmp_path / "out"
    call = ("quantize", "-m", model, "-o", out)
    assert "unknown format 'nf5'; known: nf4" in failure(capsys, *call, "-f", "nf5")
    assert "unknown method 'magic'" in failure(capsys, *call, "--method", "magic")
    assert "power of two" in failure(capsys, *call, "-f", "nf4", "--block-size", "48")
    assert "double quantisation" in failure(capsys, *call, "-f", "int4", "--double-quant")
    assert "no matrix" in failure(capsys, *call, "--skip", "model", "--skip", "lm_head")
    assert "'atn' is in the name of no matrix" in failure(capsys, *call, "--skip", "atn")
    assert "does not exist" in failure(capsys, "quantize", "-m", tmp_path / "x", "-o", out)
    assert not out.exists()
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    assert "exists" in failure(capsys, *call)
    assert "not a model folder" in failure(capsys, *call, "--overwrite")
    assert "is read" in failure(capsys, "quantize", "-m", model, "-o", model, "--overwrite")
    assert (out / "precious.txt").read_text() == "mine"
    shutil.rmtree(out)
    run(capsys, *call)
    before = (out / "model.safetensors").read_bytes()
    run(capsys, *call, "-f", "fp4", "--overwrite")
    assert (out / "model.safetensors").read_bytes() != before
    assert "quantised already" in failure(capsys, "quantize", "-m", out, "-o", tmp_path / "twice")


def damaged(folder, target, change):
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


Q = "model.layers.0.self_attn.q_proj."
HURT = {
    "missing scales": (lambda t: t.pop(Q + "weight.scales"), "'weight.scales' is missing"),
    "short codes": (
        lambda t: t.update({Q + "weight.codes": t[Q + "weight.codes"][1:].clone()}),
        "1128 elements of Byte, wanted 1152",
    ),
    "group size": (lambda t: t[Q + "weight.group_size"].fill_(0), "group_size' is 0"),
    "other group size": (lambda t: t[Q + "weight.group_size"].fill_(7), "wanted 336"),
    "not finite": (lambda t: t[Q + "weight.scales"].fill_(float("inf")), "not finite"),
    "unknown part": (lambda t: t.update({Q + "weight.x": torch.zeros(1)}), "weight.x"),
}


@pytest.mark.parametrize("name", HURT)
def test_a_damaged_integer_folder_is_refused_by_name(tiny_folder, tmp_path, capsys, name):
    run(capsys, "quantize", "-m", tiny_folder("llama"), "-f", "int4", "-o", tmp_path / "out")
    change, message = HURT[name]
    folder = damaged(tmp_path / "out", tmp_path / "hurt", change)
    with pytest.raises(budwood.Error, match=message) as caught:
        _C.load_model(str(folder))
    assert "model.layers.0.self_attn.q_proj" in str(caught.value)


def test_a_later_version_of_integer_folders_is_refused(tiny_folder, tmp_path, capsys):
    run(capsys, "quantize", "-m", tiny_folder("llama"), "-f", "int4", "-o", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(budwood.Error, match="version 2, this program reads up to 1"):
        _C.load_model(str(tmp_path / "out"))


def test_a_killed_quantisation_leaves_nothing_or_the_old_model(tiny_folder, tmp_path):
    out = tmp_path / "out"
    _C.quantize_files(str(tiny_folder("llama")), str(out), "nf4")
    before = (out / "model.safetensors").read_bytes()
    code = (
        "from budwood import _C\n"
        f"for _ in range(10000): _C.quantize_files({str(tiny_folder('llama'))!r}, {str(out)!r}, "
        "'fp4', overwrite=True)"
    )
    seen = {before}
    for delay in (0.02, 0.05, 0.09, 0.14):
        process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"A": "1"})
        while (out / "model.safetensors").read_bytes() in (before,) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.add((out / "model.safetensors").read_bytes())
        _C.load_model(str(out))(IDS)
    assert len(seen) == 2


TRAIN = """
model: {model}
output: {output}
{base}
dtype: float32
data: {{train: {tokens}, sequence_length: 16}}
adapter: {{r: 4, target_modules: all-linear}}
train: {{steps: 4, batch_size: 2, learning_rate: 1e-2}}
"""


@pytest.mark.parametrize(
    ("base", "form"),
    [
        ("quantize: nf4", "nf4"),
        ("quantize: {format: fp4, block_size: 128, double_quant: true}", "fp4"),
        ("quantize: {format: int4, block_size: 32, skip: [lm_head, embed, o_proj]}", "affine4"),
        ("", "float32"),
    ],
)
def test_training_states_its_base_and_eval_measures_on_the_same(
    tiny_folder, tmp_path, capsys, base, form
):
    writer = _C.TokenFileWriter(str(tmp_path / "t.tokens"), 97)
    torch.manual_seed(0)
    for _ in range(8):
        writer.add(torch.randint(0, 97, (17,)).tolist())
    writer.commit()
    config = tmp_path / "run.yaml"
    config.write_text(
        TRAIN.format(
            model=tiny_folder("llama"),
            output=tmp_path / "run",
            base=base,
            tokens=tmp_path / "t.tokens",
        )
    )
    assert main(["train", str(config)]) == 0
    assert f"weights as {form} in" in capsys.readouterr().out
    call = ["eval", tmp_path / "t.tokens", "-m", tiny_folder("llama"), "-a", tmp_path / "run"]
    plain = run(capsys, *call)
    if form in ("nf4", "fp4"):
        packed = run(capsys, *call, "--quantize", form)
        assert packed["loss"] != plain["loss"]


def test_settings_of_the_base_are_checked(tiny_folder, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    writer = _C.TokenFileWriter(str(tmp_path / "t.tokens"), 97)
    writer.add([1, 2, 3])
    writer.commit()
    for base, message in (
        ("quantize: nf5", "unknown format 'nf5'"),
        ("quantize: {form: nf4}", "unknown setting quantize.form; did you mean quantize.format?"),
        ("quantize: {format: nf4, double_quant: 3}", "quantize.double_quant is 3"),
        ("quantize: {format: nf4, skip: lm_head}", "wanted a list of names"),
        ("weights: sparse", "'auto', 'dense' or 'packed', found 'sparse'"),
    ):
        config.write_text(
            TRAIN.format(
                model=tiny_folder("llama"),
                output=tmp_path / "run",
                base=base,
                tokens=tmp_path / "t.tokens",
            )
        )
        assert message in failure(capsys, "train", config)
