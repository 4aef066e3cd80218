"""budwood quantize with the methods that calibrate: what it writes is what calibrating makes."""

import json

import pytest
import torch
import transformers
from conftest import make_tiny
from tiny_tokenizer import save_tiny_llama

from budwood import _C
from budwood.cli import main
from budwood.tokenizer import load_tokenizer

IDS = torch.tensor([[5, 17, 3, 96, 41, 8, 22, 60, 13, 2, 71, 33]])
TEXT = "The harbour was quiet when the first of the boats came in; two men were mending a net. " * 9
COMMON = ("--block-size", "16", "--calibration-tokens", "256", "--sequence-length", "64")


@pytest.fixture(scope="module")
def model_and_text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated")
    text = folder / "text.txt"
    text.write_text(TEXT)
    return save_tiny_llama(folder / "model"), text


def run(capsys, *arguments):
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failure(capsys, *arguments):
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 1
    return capsys.readouterr().err.strip()


@pytest.mark.parametrize("format", ["int4", "int8"])
@pytest.mark.parametrize("method", ["gptq", "awq", "hqq"])
def test_the_folder_holds_what_calibrating_in_memory_makes(
    model_and_text, tmp_path, capsys, method, format
):
    folder, text = model_and_text
    out, packed = tmp_path / "out", tmp_path / "packed"
    command = ["quantize", "-m", folder, "-f", format, "--method", method, "-o", out, *COMMON]
    data = [] if method == "hqq" else ["--calibration", text]
    report = run(capsys, *command, *data)
    assert len(report["matrices"]) == 14
    assert len(report["warnings"]) == 0
    if method != "hqq":
        assert all(m["rtn_error"] > 0 for m in report["matrices"])

    ids = load_tokenizer(str(folder))(TEXT)["input_ids"][:256]
    model = _C.load_model(str(folder))
    options = {"act_order": True, "static_groups": True} if method == "gptq" else {}
    _C.calibrate(
        model,
        [ids[i : i + 64] for i in range(0, 256, 64)] if data else [],
        method=method,
        bits=int(format[-1]),
        group_size=16,
        **options,
    )
    _C.save_model(model, str(packed), weights="packed")
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (packed / name).read_bytes()
    with torch.no_grad():
        assert torch.equal(_C.load_model(str(out))(IDS), model(IDS))


@pytest.mark.parametrize("form", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_transformers_opens_4_bits_that_gptq_made(model_and_text, tmp_path, capsys, form, double):
    _, text = model_and_text
    folder = save_tiny_llama(tmp_path / "model", intermediate=96)
    call = ["quantize", "-m", folder, "-f", form, "--block-size", "32", "--calibration-tokens"]
    call += ["512", *(["--double-quant"] if double else [])]
    out = tmp_path / "out"
    report = run(capsys, *call, "--method", "gptq", "--calibration", text, "-o", out)
    for matrix in report["matrices"]:
        assert matrix["error"] < matrix["rtn_error"], matrix["name"]
    assert report["error"] < 0.85 * sum(m["rtn_error"] for m in report["matrices"]) / 14
    # Its product for inference wants rows by 32; that for training takes all.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).train()
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    with torch.no_grad():
        found, wanted = _C.load_model(str(out))(IDS), theirs(IDS).logits
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_token_file_calibrates_like_its_text(model_and_text, tmp_path, capsys):
    folder, text = model_and_text
    tokens = tmp_path / "text.tokens"
    run(capsys, "tokenize", "-m", folder, text, "-o", tokens)
    call = ["quantize", "-m", folder, "-f", "int4", "--method", "gptq", *COMMON]
    run(capsys, *call, "--calibration", text, "-o", tmp_path / "a")
    run(capsys, *call, "--calibration", tokens, "-o", tmp_path / "b")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def test_a_short_text_is_told_and_what_does_not_fit_is_refused(model_and_text, tmp_path, capsys):
    folder, text = model_and_text
    out = tmp_path / "out"
    call = ["quantize", "-m", folder, "-o", out, "--block-size", "16"]
    gptq = [*call, "-f", "int4", "--method", "gptq"]
    assert "needs calibration text" in failure(capsys, *gptq)
    assert "makes int4 or int8, found format 'nf4'" in failure(
        capsys, *call, "-f", "nf4", "--method", "awq", "--calibration", text
    )
    assert "block size 16; wanted a power of two" in failure(
        capsys, *call, "-f", "nf4", "--method", "gptq", "--calibration", text
    )
    assert "blocks of 32 do not divide rows of 48" in failure(
        capsys,
        *call[:5],
        "-f",
        "nf4",
        "--block-size",
        "32",
        "--method",
        "gptq",
        "--calibration",
        text,
    )
    missing = failure(capsys, *gptq, "--calibration", tmp_path / "no.txt")
    assert "no.txt does not exist" in missing
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert "empty.txt" in failure(capsys, *gptq, "--calibration", empty)
    assert not out.exists()
    report = run(capsys, *gptq, "--calibration", text)
    assert "has 784 tokens, 8192 were asked for" in report["warnings"][0]
    again = failure(capsys, *gptq, "--calibration", text)
    assert "exists" in again


def test_the_error_told_is_that_of_the_layers(model_and_text, tmp_path, capsys):
    folder, text = model_and_text
    errors = {}
    for method in ("gptq", "awq"):
        out = tmp_path / method
        call = ["quantize", "-m", folder, "-f", "int4", "--method", method, *COMMON]
        report = run(capsys, *call, "--calibration", text, "-o", out)
        rtn = sum(m["rtn_error"] ** 2 for m in report["matrices"]) ** 0.5
        errors[method] = sum(m["error"] ** 2 for m in report["matrices"]) ** 0.5 / rtn
    assert errors["gptq"] < 0.9
    assert errors["awq"] < 1


def test_families_without_a_tokeniser_take_token_files(tiny_folder, tmp_path, capsys):
    out = tmp_path / "out"
    tokens = tmp_path / "ids.tokens"
    with _C.TokenFileWriter(tokens, 97) as writer:
        writer.add([i % 97 for i in range(200)])
    report = run(
        capsys,
        *("quantize", "-m", tiny_folder("qwen3"), "-f", "int8", "--method", "awq", "-o", out),
        *("--calibration", tokens, *COMMON[:2], "--calibration-tokens", "200"),
    )
    assert report["error"] < 0.02
    with torch.no_grad():
        found, wanted = _C.load_model(str(out))(IDS), make_tiny("qwen3")(IDS).logits
    assert ((found - wanted).norm() / wanted.norm()).item() < 0.05
