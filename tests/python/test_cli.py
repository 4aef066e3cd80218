"""The command line, on a tiny model: what it makes, what it prints, how it fails."""

from __future__ import annotations

import copy
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_tokenizer import save_tiny_llama

import budwood
from budwood import _C
from budwood.cli import main

# One thread: the models are tiny, and threads that wait for each other on a busy machine are slow.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

CONVERSATION = [
    {"role": "user", "content": "Say hi"},
    {"role": "assistant", "content": "Hi there"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [{"text": f"Row number {i} of the text."} for i in range(20)]
    lines += [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(20)]
    lines += [{"messages": CONVERSATION}] * 10
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def settings(model: Path, rows: Path, output: Path, **train) -> dict:
    return {
        "model": str(model),
        "output": str(output),
        "data": {"train": str(rows), "eval": str(rows), "sequence_length": 64},
        "adapter": {"method": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "train": {"steps": 6, "batch_size": 2, "log_every": 1, "learning_rate": 1e-2, **train},
    }


def write(path: Path, values: dict) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def trained(model, rows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    config = write(folder / "run.yaml", settings(model, rows, folder / "out"))
    assert main(["train", str(config)]) == 0
    return folder / "out"


def launch(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "budwood.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def figures(capsys, *arguments: str) -> dict:
    """The JSON object that a verb prints."""
    capsys.readouterr()
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def failure(capsys, *arguments: str) -> str:
    """The one line that a failing verb prints."""
    capsys.readouterr()
    assert main(list(arguments)) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("budwood: ")
    assert "Traceback" not in error
    return error


def test_training_writes_an_adapter_that_hf_peft_opens_with_the_same_logits(trained, model):
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, trained).eval()
    ours = _C.load_model(str(model))
    _C.load_adapter(ours, str(trained))
    ids = torch.arange(40, 72)[None]
    with torch.no_grad():
        wanted, without = theirs(ids).logits, _C.load_model(str(model))(ids)
        torch.testing.assert_close(ours(ids), wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - without).abs().max() > 1e-3  # it learned something


METHODS = {
    "adalora": {"init_r": 4, "target_r": 2, "total_step": 6, "target_modules": "all-linear"},
    "vera": {"r": 8, "target_modules": ["q_proj", "o_proj"]},
    "dylora": {"r": 4, "target_modules": "all-linear"},
    "ia3": {},
    "bottleneck": {"reduction_factor": 4},
    "parallel": {},
    "compacter": {"reduction_factor": 4},
    "prefix": {"num_virtual_tokens": 4},
    "prompt": {"num_virtual_tokens": 4, "placement": "after_bos"},
    "p_tuning": {"num_virtual_tokens": 4},
    "llama_adapter": {"adapter_len": 4, "adapter_layers": 1},
    "reft": {"r": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_trained_resumed_and_read_again(method, model, rows, tmp_path, capsys):
    values = settings(model, rows, tmp_path / "whole", save_every=3)
    values["adapter"] = {"method": method, **METHODS[method]}
    if method == "prompt":  # starts at random vectors and has few steps to leave them
        values["train"]["learning_rate"] = 0.3
    config = write(tmp_path / "run.yaml", values)
    assert main(["train", str(config)]) == 0
    cut = [f"output={tmp_path / 'cut'}", "train.schedule=constant"]
    whole = [f"output={tmp_path / 'constant'}", "train.schedule=constant"]
    assert main(["train", str(config), *whole]) == 0
    assert main(["train", str(config), *cut, "train.steps=3"]) == 0
    assert main(["train", str(config), *cut, "--resume"]) == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "constant" / name).read_bytes()
    plain = figures(capsys, "eval", "-m", str(model), str(rows))
    adapted = figures(capsys, "eval", "-m", str(model), "-a", str(tmp_path / "whole"), str(rows))
    assert adapted["loss"] < plain["loss"]
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    budwood.PeftModel.from_pretrained(base, tmp_path / "whole")


@pytest.mark.parametrize(
    "train",
    [
        {"optimizer": "adamw8bit", "learning_rate": 0.003},
        {"optimizer": "lomo", "learning_rate": 0.3},
        {"blocks": "lisa", "active_blocks": 1, "block_steps": 2, "learning_rate": 0.003},
        {"selected_tokens": 0.5, "learning_rate": 0.003},
    ],
)
def test_a_whole_model_is_trained_resumed_and_opened(train, model, rows, tmp_path, capsys):
    values = settings(model, rows, tmp_path / "whole", tune="full", schedule="constant", **train)
    values["adapter"] = {}
    config = write(tmp_path / "run.yaml", values)
    assert main(["train", str(config)]) == 0
    cut = [f"output={tmp_path / 'cut'}", "train.save_every=3"]
    assert main(["train", str(config), *cut, "train.steps=3"]) == 0
    assert main(["train", str(config), *cut, "--resume"]) == 0
    name = "model/model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    plain = figures(capsys, "eval", "-m", str(model), str(rows))
    tuned = figures(capsys, "eval", "-m", str(tmp_path / "whole" / "model"), str(rows))
    assert tuned["loss"] < plain["loss"]
    transformers.AutoTokenizer.from_pretrained(tmp_path / "whole" / "model")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    again = tmp_path / "again"
    written = tmp_path / "whole" / "config.yaml"
    assert main(["train", str(written), f"output={again}"]) == 0
    assert (again / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    values["adapter"] = {"r": 4}
    assert main(["train", str(write(tmp_path / "bad.yaml", values)), "--overwrite"]) == 1
    assert "there is no adapter to be set" in capsys.readouterr().err


@pytest.mark.parametrize("start", ["loftq", {"method": "loftq", "iterations": 2}, "qpissa", "eora"])
def test_factors_begin_with_what_quantising_took_away(start, model, rows, tmp_path, capsys):
    values = settings(model, rows, tmp_path / "run")
    values["quantize"] = "nf4"
    values["adapter"] |= {"start": start, "target_modules": ["q_proj", "down_proj"]}
    assert main(["train", str(write(tmp_path / "run.yaml", values))]) == 0
    out = capsys.readouterr()
    assert "the error of the" in out.out + out.err
    changed = start == "qpissa" or isinstance(start, dict)
    base = tmp_path / "run" / "base"
    assert base.exists() == changed
    if changed:
        tuned = figures(capsys, "eval", "-m", str(base), "-a", str(tmp_path / "run"), str(rows))
        assert math.isfinite(tuned["loss"])
    for wrong, message in (
        ({"start": "pissa"}, "wanted loftq, qpissa"),
        ({"start": {"method": "loftq", "turns": 2}}, "did you mean"),
        ({"start": "loftq", "method": "vera"}, "adapter.start is for the method lora"),
    ):
        bad = copy.deepcopy(values)
        bad["adapter"] |= wrong
        assert main(["train", str(write(tmp_path / "bad.yaml", bad)), "--overwrite"]) == 1
        error = capsys.readouterr().err
        assert message in error or "unknown setting adapter.start.turns" in error


def test_lora_fa_leaves_a_as_it_started(model, rows, tmp_path):
    values = settings(model, rows, tmp_path / "fa", optimizer="lora_fa", lora_plus_ratio=4.0)
    assert main(["train", str(write(tmp_path / "fa.yaml", values))]) == 0
    fresh = _C.load_model(str(model))
    _C.inject(fresh, _C.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), "default", 0)
    trained = load_file(tmp_path / "fa" / "adapter_model.safetensors")
    for key, tensor in _C.adapter_tensors(fresh, "default"):
        assert torch.equal(trained[key], tensor) == ("lora_A" in key), key


def test_the_output_folder_holds_the_settings_as_used_and_they_run_again(trained, tmp_path):
    values = yaml.safe_load((trained / "config.yaml").read_text())
    assert values["train"]["schedule"] == "cosine"  # a default
    assert values["train"]["learning_rate"] == 0.01
    assert values["adapter"]["lora_dropout"] == 0.0
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    assert sum("learning_rate" in line for line in lines) == 6
    again = tmp_path / "again"
    assert main(["train", str(trained / "config.yaml"), f"output={again}"]) == 0
    first, second = (f / "adapter_model.safetensors" for f in (trained, again))
    assert first.read_bytes() == second.read_bytes()


def test_training_on_a_token_file_equals_training_on_its_text(
    model, rows, trained, tmp_path, capsys
):
    tokens = tmp_path / "rows.tokens"
    made = figures(capsys, "tokenize", str(rows), "-m", str(model), "-o", str(tokens))
    assert made["rows"] == 50
    config = write(tmp_path / "run.json", settings(model, tokens, tmp_path / "out"))
    assert main(["train", str(config)]) == 0
    files = [f / "adapter_model.safetensors" for f in (trained, tmp_path / "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_token_file_of_another_tokeniser_is_refused(model, rows, tmp_path, capsys):
    file = tmp_path / "foreign.tokens"
    with _C.TokenFileWriter(str(file), 272, "another-tokeniser") as writer:
        writer.add([1, 2, 3])
    config = write(tmp_path / "run.yaml", settings(model, file, tmp_path / "out"))
    assert "made with another tokeniser" in failure(capsys, "train", str(config))


def test_an_interrupted_training_resumes_to_the_same_bytes(model, rows, tmp_path):
    long = {"steps": 60, "log_every": 1}
    whole = write(tmp_path / "a.yaml", settings(model, rows, tmp_path / "a", **long))
    assert main(["train", str(whole)]) == 0
    cut = write(tmp_path / "b.yaml", settings(model, rows, tmp_path / "b", **long))
    process = subprocess.Popen(
        [sys.executable, "-m", "budwood.cli", "train", str(cut)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(60) == 130, rest
    assert "--resume" in rest
    assert "Traceback" not in rest
    assert list((tmp_path / "b").glob("checkpoint-*"))
    assert main(["train", str(cut), "--resume"]) == 0
    files = [tmp_path / name / "adapter_model.safetensors" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_earlier_run_is_neither_replaced_nor_touched_unasked(
    trained, model, rows, tmp_path, capsys
):
    before = {f.name: f.read_bytes() for f in trained.iterdir() if f.is_file()}
    config = write(tmp_path / "run.yaml", settings(model, rows, trained))
    assert "holds an earlier run" in failure(capsys, "train", str(config))
    assert before == {f.name: f.read_bytes() for f in trained.iterdir() if f.is_file()}


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["modle=x"], "unknown setting modle; did you mean model?"),
        (
            ["train.learning_rat=1"],
            "unknown setting train.learning_rat; did you mean train.learning_rate?",
        ),
        (
            ["adapter.lora_alfa=1"],
            "unknown setting adapter.lora_alfa; did you mean adapter.lora_alpha?",
        ),
        (["data.sequence_len=8"], "did you mean data.sequence_length?"),
        (["sequence_length=8"], "it stands under data: data.sequence_length"),
        (["adapter.method=lore"], "adapter.method is 'lore', wanted one of lora"),
        (["train.steps=-1"], "steps is -1"),
        (["train.learning_rate=fast"], "learning_rate"),
        (["adapter.target_modules=[nothing]"], "nothing"),
        (["data.train=none.jsonl"], "data.train: none.jsonl does not exist"),
        (["model=none"], "model: none does not exist"),
        (["seed=one"], "seed is 'one', wanted a whole number"),
        (["output=null"], "output is missing"),
        (["steps"], "wanted key=value, found 'steps'"),
        (["model.x=1"], "model is not a group of settings"),
    ],
)
def test_a_wrong_setting_is_one_line_that_says_what_is_right(
    model, rows, tmp_path, capsys, overrides, what
):
    config = write(tmp_path / "run.yaml", settings(model, rows, tmp_path / "out"))
    assert what in failure(capsys, "train", str(config), *overrides)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("model: [", "run.yaml: while parsing"),
        ("- a", "is not a mapping"),
        ("model: a\nmodel: b", "'model' stands there twice"),
    ],
)
def test_a_broken_configuration_is_one_line(tmp_path, capsys, text, what):
    (tmp_path / "run.yaml").write_text(text)
    assert what in failure(capsys, "train", str(tmp_path / "run.yaml"))
    assert "does not exist" in failure(capsys, "train", str(tmp_path / "none.yaml"))


def test_exponents_without_a_point_are_numbers(tmp_path):
    from budwood.cli.settings import read_file

    (tmp_path / "run.yaml").write_text("a: 1e-3\nb: -2E4\nc: 1e\n")
    assert read_file(tmp_path / "run.yaml") == {"a": 1e-3, "b": -2e4, "c": "1e"}


def test_eval_gives_the_loss_of_transformers(trained, model, rows, capsys):
    got = figures(capsys, "eval", str(rows), "-m", str(model), "-a", str(trained))
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, trained).eval()
    from budwood.data import Encoder, read_rows
    from budwood.tokenizer import load_tokenizer

    encoder = Encoder(load_tokenizer(model))
    total = number = 0
    for row in read_rows(rows):
        encoded = encoder(row)
        ids = torch.tensor([encoded.ids])
        labels = torch.tensor([encoded.ids]).masked_fill(~torch.tensor([encoded.counted]), -100)
        with torch.no_grad():
            total += float(theirs(ids, labels=labels).loss) * encoded.targets
        number += encoded.targets
    assert got["tokens"] == number
    assert got["loss"] == pytest.approx(total / number, rel=1e-5)
    without = figures(capsys, "eval", str(rows), "-m", str(model))
    assert without["loss"] > got["loss"]
    assert without["loss_error"] > 0


def test_windows_of_eval_count_every_token_once(model, rows, capsys):
    whole = figures(capsys, "eval", str(rows), "-m", str(model))
    cut = figures(capsys, "eval", str(rows), "-m", str(model), "--sequence-length", "7")
    assert cut["tokens"] == whole["tokens"]
    assert cut["sequences"] > whole["sequences"]


def test_generate_gives_the_tokens_of_transformers(trained, model, capsys):
    got = figures(capsys, "generate", "-m", str(model), "-a", str(trained), "-p", "Row", "-n", "12")
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, trained).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = tokenizer("Row", return_tensors="pt").input_ids
    ends = [tokenizer.eos_token_id]
    wanted = theirs.generate(
        input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=ends, pad_token_id=257
    )
    text = tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)
    assert got["text"] == text
    assert main(["generate", "-m", str(model), "-a", str(trained), "-p", "Row", "-n", "12"]) == 0
    assert capsys.readouterr().out == text + "\n"


def test_generate_chat_asks_through_the_template(model, capsys):
    got = figures(capsys, "generate", "-m", str(model), "--chat", "-p", "Hi", "-n", "3")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert got["prompt_tokens"] == len(tokenizer(asked, add_special_tokens=False).input_ids)


def test_merge_gives_a_folder_with_tokeniser_that_transformers_opens(
    trained, model, tmp_path, capsys
):
    out = tmp_path / "merged"
    got = figures(capsys, "merge", "-m", str(model), "-a", str(trained), "-o", str(out))
    assert "tokenizer.json" in got["files"]
    assert got["bytes"] == sum(f.stat().st_size for f in out.iterdir())
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, trained).merge_and_unload()
    merged = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert transformers.AutoTokenizer.from_pretrained(out)("ab").input_ids
    ids = torch.arange(40, 72)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    arguments = ("merge", "-m", str(model), "-a", str(trained), "-o", str(out))
    assert "exists" in failure(capsys, *arguments)
    assert main([*arguments, "--overwrite"]) == 0
    assert "--max-shard-size is 'big'" in failure(
        capsys, *arguments[:-1], str(tmp_path / "x"), "--max-shard-size", "big"
    )


def test_merge_never_replaces_what_it_reads(trained, model, capsys):
    arguments = ("merge", "-m", str(model), "-a", str(trained), "--overwrite", "-o")
    assert "choose another name" in failure(capsys, *arguments, str(model))
    assert (model / "model.safetensors").exists()


def test_a_merge_is_verified_and_taken_apart_again(trained, model, tmp_path, capsys):
    out, again = tmp_path / "merged", tmp_path / "again"
    got = figures(capsys, "merge", "-m", str(model), "-a", str(trained), "-o", str(out))
    assert len(got["merged"]) == len(figures(capsys, "inspect", str(trained))["modules"])
    assert all(0.99 < tensor["survival"] < 1.01 for tensor in got["merged"])
    arguments = ("verify", "-m", str(model), "-a", str(trained), "--merged")
    checked = figures(capsys, *arguments, str(out))
    assert checked["passed"] is True
    assert all(tensor["equal"] for tensor in checked["tensors"])
    assert main([*arguments, str(out)]) == 0
    assert "within 1 steps" in capsys.readouterr().out
    # The model itself lacks the change.
    assert main([*arguments, str(model)]) == 1
    shown = capsys.readouterr().out
    assert "not within" in shown
    assert "q_proj" in shown

    made = figures(
        capsys, "extract", "-b", str(model), "-t", str(out), "-o", str(again), "--rank", "4"
    )
    assert min(module["energy"] for module in made["modules"]) > 0.999
    ids = torch.arange(40, 72)[None]
    logits = []
    for adapter in (trained, again):
        base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        with torch.no_grad():
            logits.append(peft.PeftModel.from_pretrained(base, adapter).eval()(ids).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    both = ("combine", "-a", str(trained), "-a", str(again), "-o", str(tmp_path / "both"))
    added = figures(capsys, *both, "-w", "1", "-w", "-1")
    assert {module["rank"] for module in added["modules"]} == {8}
    assert "exists" in failure(capsys, *both)
    wanted = "found rank 0 and energy 0"
    assert wanted in failure(
        capsys, "extract", "-b", str(model), "-t", str(out), "-o", str(tmp_path / "x")
    )


def test_the_native_program_makes_the_same_files(trained, model, tmp_path):
    program = Path(_C.__file__).parents[2] / "tools" / "budwood"
    if not program.exists():
        pytest.skip("the native program is not built")
    out = tmp_path / "merged"
    arguments = ["--model", model, "--adapter", trained]
    subprocess.run([program, "merge", *arguments, "--out", out, "--jobs", "3"], check=True)
    budwood.merge_files(model, trained, tmp_path / "python")
    for file in (tmp_path / "python").iterdir():
        if file.name != "merge_report.json":
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    verify = [program, "verify", *arguments, "--merged"]
    assert subprocess.run([*verify, out]).returncode == 0
    assert subprocess.run([*verify, model]).returncode == 1
    extract = [program, "extract", "--base", model, "--tuned", out, "--out", tmp_path / "a"]
    assert subprocess.run([*extract, "--rank", "4"]).returncode == 0
    assert (tmp_path / "a" / "adapter_config.json").exists()
    into = subprocess.run(
        [program, "merge", *arguments, "--out", model, "--overwrite"],
        capture_output=True,
        text=True,
    )
    assert into.returncode == 1
    assert "choose another name" in into.stderr
    assert (model / "model.safetensors").exists()


def test_a_model_larger_than_the_memory_of_its_process_is_merged(tmp_path):
    program = Path(_C.__file__).parents[2] / "tools" / "budwood"
    if not program.exists():
        pytest.skip("the native program is not built")
    # Beyond its libraries (gigabytes where torch has CUDA) the process gets a third of that.
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    libraries = {Path(part) for part in listed.split() if part.startswith("/")}
    size = 1_200_000_000
    limit = size // 3 + sum(library.stat().st_size for library in libraries)
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    model.mkdir()
    adapter.mkdir()
    small = torch.randn(16, 16)
    entries = {
        "proj.weight": {"dtype": "F32", "shape": [16, 16], "data_offsets": [0, 1024]},
        "rest": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [1024, 1024 + size]},
    }
    header = json.dumps(entries).encode()
    with (model / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header + small.numpy().tobytes())
        file.truncate(file.tell() + size)  # zeros that take no disk
    (model / "config.json").write_text("{}")
    a, b = torch.randn(2, 16), torch.randn(16, 2)
    prefix = "base_model.model.proj.lora_"
    save_file(
        {f"{prefix}A.weight": a, f"{prefix}B.weight": b}, adapter / "adapter_model.safetensors"
    )
    config = budwood.LoraConfig(r=2, lora_alpha=2, target_modules=["proj"])
    (adapter / "adapter_config.json").write_text(config.to_json())

    def lower():
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    out = tmp_path / "out"
    command = [program, "merge", "--model", model, "--adapter", adapter, "--out", out]
    done = subprocess.run(command, preexec_fn=lower, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with safe_open(out / "model.safetensors", "pt") as merged:
        found = merged.get_tensor("proj.weight")
    wanted = (small.double() + b.double() @ a.double()).float()
    assert torch.equal(found, wanted)
    assert (out / "model.safetensors").stat().st_size > size
    (out / "model.safetensors").unlink()


def test_inspect_says_what_things_are(trained, model, capsys):
    adapter = figures(capsys, "inspect", str(trained))
    assert adapter["kind"] == "adapter"
    assert adapter["parameters"] == sum(
        p.numel() for p in _load_safetensors(trained / "adapter_model.safetensors").values()
    )
    assert figures(capsys, "inspect", str(model))["kind"] == "model"
    file = figures(capsys, "inspect", str(model / "model.safetensors"), "--tensors")
    assert {t["name"] for t in file["tensors"]} == set(
        _load_safetensors(model / "model.safetensors")
    )
    for path in (trained, model, model / "model.safetensors"):
        assert main(["inspect", str(path), "--tensors"]) == 0
    shown = capsys.readouterr().out
    assert "q_proj" in shown
    assert "LORA" in shown
    assert "none.gguf" in failure(capsys, "inspect", "none.gguf")


def test_a_heat_map_of_an_adapter_is_drawn(trained, model, tmp_path, capsys):
    for name, start in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        assert main(["inspect", str(trained), "--plot", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(start)
    shown = capsys.readouterr().out
    assert "base weights" in shown
    assert "not recorded" not in shown
    assert "is to be a .png or .svg" in failure(
        capsys, "inspect", str(trained), "--plot", str(tmp_path / "a.txt")
    )
    assert "of an adapter" in failure(
        capsys, "inspect", str(model), "--plot", str(tmp_path / "b.png")
    )


def test_convert_and_unmerge_from_the_command_line(trained, model, tmp_path, capsys):
    done = figures(capsys, "convert", str(trained), "--to", "mlx", "-o", str(tmp_path / "mlx"))
    assert done["from"] == "peft"
    assert (tmp_path / "mlx" / "adapters.safetensors").is_file()
    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    merged = figures(capsys, "merge", "-m", str(model), "-a", str(trained), "-o", out, "--backup")
    assert merged["merged"]
    undone = figures(capsys, "unmerge", "-m", out, "-o", back)
    assert undone["source"] == "backup"
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        model / "model.safetensors"
    ).read_bytes()
    assert "exists" in failure(capsys, "unmerge", "-m", out, "-o", back)
    gguf = str(tmp_path / "out.gguf")
    done = figures(
        capsys, "merge", "-m", str(model), "-a", str(trained), "-o", gguf, "--dtype", "q8_0"
    )
    assert done["files"] == ["out.gguf"]
    assert main(["inspect", gguf]) == 0


def test_tokenize_marks_what_counts(model, rows, tmp_path, capsys):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": CONVERSATION}))
    assert main(["tokenize", str(file), "-m", str(model), "--show", "1"]) == 0
    shown = capsys.readouterr().out
    assert "assistant\n⟦Hi there<|eot|>⟧\n" in shown
    assert "targets" in shown
    assert list(tmp_path.iterdir()) == [file]  # without --out nothing is written
    file.write_text('{"text": "a"}\n{"text": }\n')
    assert "chat.jsonl:2: broken JSON" in failure(capsys, "tokenize", str(file), "-m", str(model))


def test_help_and_version_answer_and_usage_errors_do_not_succeed(capsys):
    verbs = "train eval generate merge unmerge verify extract combine convert quantize"
    verbs += " inspect tokenize"
    for verb in verbs.split():
        assert main([verb, "--help"]) == 0
        assert f"Usage: budwood {verb}" in capsys.readouterr().out
    assert main(["--version"]) == 0
    lines = capsys.readouterr().out
    assert torch.__version__ in lines
    assert "instruction set" in lines
    assert main(["trian"]) == 2
    assert main(["generate"]) == 2
    assert "--model" in capsys.readouterr().err


def test_the_program_reports_errors_without_a_traceback_unless_asked():
    failed = launch("inspect", "none")
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    assert failed.stdout == ""
    debugged = launch("--debug", "inspect", "none")
    assert debugged.returncode == 1
    assert "Traceback" in debugged.stderr


def test_generate_reads_its_prompt_from_a_pipe(model):
    done = launch("generate", "-m", str(model), "-n", "4", "--json", input="Row\n")
    assert json.loads(done.stdout)["prompt"] == "Row"


def test_help_comes_before_torch_is_imported():
    begin = time.perf_counter()
    code = (
        "import sys; from budwood.cli import main; main(['--help']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert time.perf_counter() - begin < 5


def _load_safetensors(path: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(path)
