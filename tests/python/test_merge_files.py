"""Adapters folded into a model's files, beside HF PEFT, float64 and the merge in memory."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
import warnings

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_methods import batch, peft_config, randomise, real, tiny

import budwood

warnings.filterwarnings("ignore", category=UserWarning, module="peft")

METHODS = ["lora", "dora", "lora_embedding", "dora_embedding", "trained_tokens", "saved_modules"]
METHODS += ["ia3", "adalora", "vera"]
FAMILIES = ["llama", "gpt2", "bert"]
CLASSES = {
    "llama": transformers.LlamaForCausalLM,
    "gpt2": transformers.GPT2LMHeadModel,
    "bert": transformers.BertForSequenceClassification,
}


def weights_of(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def make(folder, family, config, dtype=torch.float32, name="adapter"):
    """A saved model and a saved adapter of HF PEFT on it, with the adapted model."""
    base = tiny(family).to(dtype)
    base.save_pretrained(folder / "model")
    torch.manual_seed(3)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    randomise(model)
    model.save_pretrained(folder / name)
    return base, model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_transformers_opens_the_result_with_the_logits_of_hf_peft(method, family, tmp_path):
    base, theirs = make(tmp_path, family, peft_config(method, family))
    report = budwood.merge_files(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    merged, info = CLASSES[family].from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    rows = batch(family)
    del rows["labels"]
    with torch.no_grad():
        a, b = real(theirs(**rows).logits, rows), real(merged.eval()(**rows).logits, rows)
        assert not torch.allclose(a, real(base(**rows).logits, rows), atol=1e-3)
    assert torch.allclose(a, b, rtol=1e-4, atol=2e-5)
    changed = {tensor.name for tensor in report.merged} | set(report.replaced)
    before, after = weights_of(tmp_path / "model"), weights_of(tmp_path / "out")
    for name, tensor in before.items():
        if method != "trained_tokens" and name not in changed:
            assert torch.equal(after[name], tensor), name
    written = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert [t["name"] for t in written["merged"]] == [t.name for t in report.merged]


def half_step(values, dtype):
    """Half the distance between neighbours of a dtype at each of these fp64 values."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp(min=info.tiny))
    return torch.ldexp(torch.tensor(info.eps / 4, dtype=torch.float64), exponent)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("written", ["auto", "float32", "bfloat16", "float16"])
def test_every_weight_is_the_float64_sum_rounded_once(stored, written, tmp_path):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules="all-linear",
        rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.1.mlp.up_proj": 3},
        task_type="CAUSAL_LM",
    )
    _, theirs = make(tmp_path, "llama", config, stored)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    budwood.merge_files(tmp_path / "model", tmp_path / "adapter", tmp_path / "out", dtype=written)
    dtype = stored if written == "auto" else getattr(torch, written)
    before, after = weights_of(tmp_path / "model"), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    folded = 0
    for name, tensor in before.items():
        exact = tensor.double()
        path = name.removesuffix(".weight")
        key = f"base_model.model.{path}.lora_A.weight"
        if key in adapter:
            scaling = theirs.get_submodule(f"base_model.model.{path}").scaling["default"]
            b = adapter[key.replace("lora_A", "lora_B")]
            exact = exact + scaling * (b.double() @ adapter[key].double())
            folded += 1
        assert after[name].dtype == dtype
        distance = (after[name].double() - exact).abs()
        assert (distance <= half_step(exact, dtype) * (1 + 1e-12) + 1e-30).all(), name
    assert folded == 21
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("method", ["lora", "dora", "lora_embedding", "ia3", "adalora", "vera"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_are_those_of_merging_in_memory(method, dtype, tmp_path):
    make(tmp_path, "llama", peft_config(method, "llama"), dtype)
    budwood.merge_files(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    streamed = weights_of(tmp_path / "out")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    model = budwood.PeftModel.from_pretrained(base, tmp_path / "adapter")
    for name, tensor in model.merge_and_unload().state_dict().items():
        assert torch.equal(streamed[name], tensor), name
    loaded = budwood._C.load_model(str(tmp_path / "model"), weights="dense", dtype="auto")
    budwood._C.load_adapter(loaded, str(tmp_path / "adapter"))
    budwood._C.merge(loaded, ["default"])
    budwood._C.save_model(loaded, str(tmp_path / "cpp"), "auto", "", 10**9)
    for name, tensor in weights_of(tmp_path / "cpp").items():
        assert torch.equal(streamed[name], tensor), name


def test_jobs_and_shards_change_no_bit(tmp_path):
    make(tmp_path, "gpt2", peft_config("lora", "gpt2"), torch.bfloat16)
    wanted = None
    for jobs, shard in ((1, 10**9), (2, 10**9), (7, 20_000), (1, 20_000)):
        out = tmp_path / f"{jobs}-{shard}"
        report = budwood.merge_files(
            tmp_path / "model", tmp_path / "adapter", out, jobs=jobs, max_shard_size=shard
        )
        assert len(report.files) == len(list(out.glob("*.safetensors")))
        assert (len(report.files) > 1) == (shard == 20_000)
        found = weights_of(out)
        wanted = wanted or found
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        transformers.GPT2LMHeadModel.from_pretrained(out)


def test_several_adapters_each_with_its_weight(tmp_path):
    base, _ = make(tmp_path, "llama", peft_config("lora", "llama"), name="one")
    other = peft.LoraConfig(r=2, target_modules=["v_proj", "o_proj"], task_type="CAUSAL_LM")
    make(tmp_path, "llama", other, name="two")
    budwood.merge_files(
        tmp_path / "model",
        [tmp_path / "one", tmp_path / "two"],
        tmp_path / "out",
        weights=[0.5, -1.5],
    )
    model = peft.PeftModel.from_pretrained(base, tmp_path / "one", adapter_name="one")
    model.load_adapter(tmp_path / "two", "two")
    model.add_weighted_adapter(["one", "two"], [0.5, -1.5], "both", combination_type="cat")
    wanted = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            delta = sum(
                w * module.get_delta_weight(a)
                for a, w in (("one", 0.5), ("two", -1.5))
                if a in module.lora_A
            )
            path = name.removeprefix("base_model.model.") + ".weight"
            wanted[path] = module.get_base_layer().weight + delta
    found = weights_of(tmp_path / "out")
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=1e-5, atol=1e-6), name


def tied(folder, targets, **extra):
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config).eval()
    base.save_pretrained(folder / "model")
    assert "lm_head.weight" not in weights_of(folder / "model")
    model = budwood.get_peft_model(
        copy.deepcopy(base), budwood.LoraConfig(r=2, target_modules=targets, **extra)
    )
    randomise(model)
    model.eval().save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize(
    ("targets", "extra", "unties"),
    [
        (["q_proj"], {}, False),
        (["lm_head"], {}, True),
        (["embed_tokens"], {}, True),
        (["embed_tokens", "lm_head"], {}, True),
        (["q_proj"], {"trainable_token_indices": [3, 40]}, False),
        (["q_proj"], {"modules_to_save": ["lm_head"]}, True),
    ],
)
def test_a_tied_head_is_untied_only_when_one_side_changes(targets, extra, unties, tmp_path):
    ours = tied(tmp_path, targets, **extra)
    budwood.merge_files(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    assert ("lm_head.weight" in weights_of(tmp_path / "out")) == unties
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.tie_word_embeddings is not unties
    ids = torch.arange(50).unsqueeze(0)
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-5)


def test_files_of_a_body_alone_and_of_other_names(tmp_path):
    """A folder saved from the bare model lacks the prefix that the adapter's paths have."""
    base, theirs = make(tmp_path, "gpt2", peft_config("lora", "gpt2"))
    base.transformer.save_pretrained(tmp_path / "body")
    budwood.merge_files(tmp_path / "body", tmp_path / "adapter", tmp_path / "out")
    whole = theirs.merge_and_unload().transformer.state_dict()
    for name, tensor in weights_of(tmp_path / "out").items():
        assert torch.allclose(tensor, whole[name], rtol=1e-5, atol=1e-6), name


def test_biases_that_were_trained_along(tmp_path):
    for bias, lora_bias in (("all", False), ("lora_only", False), ("none", True)):
        folder = tmp_path / f"{bias}{lora_bias}"
        config = peft.LoraConfig(
            r=2, target_modules=["c_attn", "mlp.c_proj"], bias=bias, lora_bias=lora_bias,
            fan_in_fan_out=True, task_type="CAUSAL_LM",
        )  # fmt: skip
        _, theirs = make(folder, "gpt2", config)
        budwood.merge_files(folder / "model", folder / "adapter", folder / "out")
        merged = transformers.GPT2LMHeadModel.from_pretrained(folder / "out").eval()
        rows = batch("gpt2")
        with torch.no_grad():
            a, b = theirs(**rows).logits, merged(**rows).logits
        assert torch.allclose(real(a, rows), real(b, rows), rtol=1e-4, atol=2e-5), bias


def test_everything_else_comes_along(tmp_path):
    make(tmp_path, "llama", peft_config("lora", "llama"))
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "chat_template.jinja").write_text("x")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"old")
    budwood.merge_files(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "config.json", "merge_report.json"} <= names
    assert "pytorch_model.bin" not in names


def change(folder, edit):
    """Rewrites the adapter's tensors."""
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def lost(tensors):
    for part in ("A", "B"):
        del tensors[KEY.replace("lora_A", f"lora_{part}")]


def astray(tensors):
    for part in ("A", "B"):
        for layer in (8, 9):
            name = KEY.replace("lora_A", f"lora_{part}").replace("layers.0", f"layers.{layer}")
            tensors[name] = tensors[KEY.replace("lora_A", f"lora_{part}")].clone()


def narrow(tensors):
    tensors[KEY] = tensors[KEY][:, :5].contiguous()


def not_a_number(tensors):
    tensors[KEY][0, 0] = float("nan")


def half_gone(tensors):
    del tensors[KEY]


def integers(tensors):
    tensors[KEY] = tensors[KEY].to(torch.int32)


def large(tensors):
    tensors[KEY] *= 1e7


@pytest.mark.parametrize(
    ("edit", "wanted"),
    [
        (lost, r"layers\.0\.self_attn\.q_proj is one of the targets.*holds nothing for it"),
        (astray, r"(?s)layers\.8\.self_attn\.q_proj.*no weight.*layers\.9\.self_attn\.q_proj"),
        (narrow, r"q_proj: factors \[4, 5\] and \[32, 4\] do not make \[32, 32\]"),
        (not_a_number, r"q_proj\.lora_A\.weight' holds NaN or infinity"),
        (half_gone, r"lacks base_model\.model\..*q_proj\.lora_A\.weight"),
        (integers, r"holds I32; F32, BF16 or F16 is wanted"),
        (large, r"q_proj\.weight.*rows 0 to 32.*not finite in F16; nothing was written"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(edit, wanted, tmp_path):
    make(tmp_path, "llama", peft_config("lora", "llama"), torch.float16)
    change(tmp_path, edit)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(budwood.Error, match=wanted):
        budwood.merge_files(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_other_refusals(tmp_path):
    make(tmp_path, "llama", peft_config("prefix", "llama"), name="prefix")
    make(tmp_path, "llama", peft_config("lora", "llama"))
    model, adapter, out = (tmp_path / n for n in ("model", "adapter", "out"))
    with pytest.raises(budwood.Error, match="PREFIX_TUNING and cannot be merged"):
        budwood.merge_files(model, tmp_path / "prefix", out)
    make(tmp_path, "llama", peft_config("dora", "llama"), name="dora")
    for folders, weights in (([adapter, tmp_path / "dora"], None), ([tmp_path / "dora"], [0.5])):
        with pytest.raises(budwood.Error, match="DoRA is merged alone, and at weight 1"):
            budwood.merge_files(model, folders, out, weights=weights)
    with pytest.raises(budwood.Error, match="no adapter"):
        budwood.merge_files(model, [], out)
    with pytest.raises(budwood.Error, match="1 adapters and 2 weights"):
        budwood.merge_files(model, adapter, out, weights=[1, 2])
    with pytest.raises(budwood.Error, match="float8"):
        budwood.merge_files(model, adapter, out, dtype="float8")
    with pytest.raises(budwood.Error, match=r"adapter_config\.json"):
        budwood.merge_files(model, tmp_path / "nothing", out)
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(budwood.Error, match="out"):
        budwood.merge_files(model, adapter, out)
    assert (out / "mine.txt").read_text() == "kept"
    budwood.merge_files(model, adapter, out, overwrite=True)
    assert not (out / "mine.txt").exists()


def test_a_shard_that_is_missing_is_named(tmp_path):
    base, _ = make(tmp_path, "llama", peft_config("lora", "llama"))
    base.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(budwood.Error, match=shards[1].name):
        budwood.merge_files(tmp_path / "sharded", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


WIDE = """
import sys, budwood
budwood.merge_files(sys.argv[1], sys.argv[2], sys.argv[3], jobs=2)
"""


def wide_model(folder):
    """150 MB, so that a merge takes a moment."""
    config = transformers.LlamaConfig(
        vocab_size=8000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4,
        num_attention_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    base.save_pretrained(folder / "model", max_shard_size="30MB")
    model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules="all-linear"))
    randomise(model)
    model.save_pretrained(folder / "adapter")


def test_a_killed_merge_leaves_no_folder_and_the_next_one_succeeds(tmp_path):
    wide_model(tmp_path)
    names = [str(tmp_path / n) for n in ("model", "adapter", "out")]
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "model").iterdir()}
    for delay in (0.02, 0.1, 0.3):
        child = subprocess.Popen([sys.executable, "-c", WIDE, *names])
        while child.poll() is None and not any(tmp_path.glob(".*")):
            time.sleep(0.005)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        if child.wait() != 0:
            assert not (tmp_path / "out").exists()
    budwood.merge_files(*names, overwrite=True)
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "model").iterdir()} == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter", "model", "out"]
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_memory_is_bounded_by_panels_and_a_full_disk_leaves_nothing(tmp_path):
    wide_model(tmp_path)
    code = """
import resource, sys, budwood
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model, adapter, out, limit = sys.argv[1:]
if limit != "none":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    import signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
budwood.merge_files(model, adapter, out, jobs=2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    names = [str(tmp_path / n) for n in ("model", "adapter", "out")]
    full = subprocess.run(
        [sys.executable, "-c", code, *names, "1000000"], capture_output=True, text=True
    )
    assert full.returncode != 0
    assert "File too large" in full.stderr
    assert not (tmp_path / "out").exists()
    done = subprocess.run(
        [sys.executable, "-c", code, *names, "none"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # The model has 150 MB; torch's own pages come on top of what the merge takes.
    assert int(done.stdout) < 120_000
    assert os.path.exists(tmp_path / "out")


def test_verify_tells_a_right_merge_from_a_wrong_one(tmp_path):
    make(tmp_path, "llama", peft_config("lora", "llama"), torch.bfloat16)
    model, adapter, out = (tmp_path / n for n in ("model", "adapter", "out"))
    budwood.merge_files(model, adapter, out)
    report = budwood.verify_files(model, adapter, out)
    assert report.passed(0.5)
    assert all(tensor.equal for tensor in report.tensors)
    # HF PEFT adds in fp32 here; another tool may round the change before it adds it.
    base = transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    theirs = peft.PeftModel.from_pretrained(base, adapter)
    tensors = weights_of(model)
    for path, module in theirs.named_modules():
        if hasattr(module, "lora_A"):
            key = path.removeprefix("base_model.model.") + ".weight"
            tensors[key] = tensors[key] + module.get_delta_weight("default").bfloat16()
    theirs.merge_and_unload().save_pretrained(tmp_path / "theirs")
    assert budwood.verify_files(model, adapter, tmp_path / "theirs").passed(0.501)
    (tmp_path / "rough").mkdir()
    save_file(tensors, tmp_path / "rough" / "model.safetensors", {"format": "pt"})
    report = budwood.verify_files(model, adapter, tmp_path / "rough")
    assert report.passed(1.01)
    assert not report.passed(0.6)

    name = "model.layers.1.self_attn.q_proj.weight"
    norm = "model.layers.1.input_layernorm.weight"
    for edit, fault in (
        (lambda t: t.__setitem__(name, t[name] * 1.1), None),
        (lambda t: t.__setitem__(norm, t[norm] + 1), None),
        (lambda t: t.pop(norm), "layernorm.weight is missing"),
        (lambda t: t.__setitem__("extra", torch.zeros(2)), "extra is not of this merge"),
        (lambda t: t.__setitem__(name, t[name][:3].clone()), r"q_proj.weight is \[3, 32\]"),
    ):
        tensors = load_file(out / "model.safetensors")
        edit(tensors)
        (tmp_path / "wrong").mkdir(exist_ok=True)
        save_file(tensors, tmp_path / "wrong" / "model.safetensors", {"format": "pt"})
        report = budwood.verify_files(model, adapter, tmp_path / "wrong")
        assert not report.passed(1)
        assert (fault is None) == (not report.faults)
    # The adapter forgotten altogether.
    report = budwood.verify_files(model, adapter, model)
    assert not report.passed(1)
    assert max(abs(t.survival) for t in report.tensors if t.delta_norm > 0) == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_extracting_from_a_merged_model_gives_the_change_back(family, tmp_path):
    _, theirs = make(tmp_path, family, peft_config("lora", family))
    model, adapter, out, again = (tmp_path / n for n in ("model", "adapter", "out", "again"))
    budwood.merge_files(model, adapter, out)
    report = budwood.extract(model, out, again, rank=4)
    assert not report.lost
    assert {m.path for m in report.modules} == {
        name.removeprefix("base_model.model.")
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A")
    }
    assert all(m.energy > 1 - 1e-9 for m in report.modules)
    classes = CLASSES[family]
    loaded = peft.PeftModel.from_pretrained(classes.from_pretrained(model), again).eval()
    for module in report.modules:
        path = f"base_model.model.{module.path}"
        wanted = theirs.get_submodule(path).get_delta_weight("default")
        found = loaded.get_submodule(path).get_delta_weight("default")
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()
        assert module.delta_norm == pytest.approx(wanted.norm().item(), rel=1e-5)
    rows = batch(family)
    with torch.no_grad():
        a, b = theirs(**rows).logits, loaded(**rows).logits
    assert torch.allclose(real(a, rows), real(b, rows), rtol=1e-4, atol=2e-5)
    budwood.merge_files(model, again, tmp_path / "remerged")
    again = budwood.verify_files(model, adapter, tmp_path / "remerged")
    assert not again.faults
    assert max(tensor.error for tensor in again.tensors) < 1e-5


def test_an_energy_chooses_the_ranks(tmp_path):
    base = tiny("llama")
    base.save_pretrained(tmp_path / "model")
    torch.manual_seed(1)
    wanted = {}
    with torch.no_grad():
        for i, rank in ((0, 1), (1, 3), (2, 7)):
            weight = base.model.layers[i].mlp.up_proj.weight
            delta = torch.randn(48, rank) @ torch.randn(rank, 32) * 0.1
            weight += delta
            wanted[f"model.layers.{i}.mlp.up_proj"] = rank
        base.model.norm.weight += 0.5
    base.save_pretrained(tmp_path / "tuned")
    report = budwood.extract(
        tmp_path / "model", tmp_path / "tuned", tmp_path / "a", energy=1 - 1e-9
    )
    assert {m.path: m.rank for m in report.modules} == wanted
    assert [t.name for t in report.lost] == ["model.norm.weight"]
    config = peft.PeftConfig.from_pretrained(tmp_path / "a")
    assert config.target_modules == {"up_proj"}
    less = budwood.extract(tmp_path / "model", tmp_path / "tuned", tmp_path / "b", energy=0.6)
    for small, whole in zip(less.modules, report.modules, strict=True):
        assert small.rank <= whole.rank
        delta = torch.linalg.svdvals(
            base.get_submodule(whole.path).weight.detach().double()
            - load_file(tmp_path / "model" / "model.safetensors")[f"{whole.path}.weight"].double()
        )
        kept = delta.square().cumsum(0) / delta.square().sum()
        assert small.energy == pytest.approx(kept[small.rank - 1].item(), rel=1e-6)
        assert small.rank == int((kept < 0.6).sum()) + 1


def test_what_cannot_be_extracted_is_named(tmp_path):
    make(tmp_path, "llama", peft_config("lora", "llama"))
    make(tmp_path / "other", "gpt2", peft_config("lora", "gpt2"))
    model, out = tmp_path / "model", tmp_path / "a"
    budwood.merge_files(model, tmp_path / "adapter", tmp_path / "tuned")
    tuned = tmp_path / "tuned"
    for arguments, wanted in (
        ((model, model, out, {"rank": 2}), "nothing to extract"),
        (
            (model, tmp_path / "other" / "model", out, {"rank": 2}),
            r"(?s)no models of one kind.*wte",
        ),
        ((model, tuned, out, {}), "found rank 0 and energy 0"),
        ((model, tuned, out, {"rank": 2, "energy": 0.5}), "found rank 2 and energy 0.5"),
        ((model, tuned, out, {"energy": 1.5}), "found 1.5"),
        ((model, tuned, out, {"rank": 2, "targets": ["q_prj"]}), "ends in q_prj"),
        ((model, tuned, tuned, {"rank": 2}), "tuned"),
    ):
        *paths, options = arguments
        with pytest.raises(budwood.Error, match=wanted):
            budwood.extract(*paths, **options)
    assert not out.exists()


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_resized_vocabulary_comes_with_the_adapter(is_tied, tmp_path):
    base = tiny("llama")
    base.config.tie_word_embeddings = is_tied
    base.tie_weights()
    base.save_pretrained(tmp_path / "model")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model")
    model.resize_token_embeddings(67)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(model, config)
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    budwood.merge_files(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["vocab_size"] == 67
    assert written["tie_word_embeddings"] == is_tied
    assert ("lm_head.weight" in weights_of(tmp_path / "out")) != is_tied
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[3, 66, 61, 5]])
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, theirs.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    # Only the table: what the head would read is not known.
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    adapter.pop("base_model.model.lm_head.weight", None)
    save_file(adapter, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(budwood.Error, match=r"to 67 rows, and nothing to lm_head\.weight"):
        budwood.merge_files(tmp_path / "model", tmp_path / "adapter", tmp_path / "no")


def mixture(family):
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
    }
    if family == "mixtral":
        return transformers.MixtralConfig(num_local_experts=4, **sizes)
    if family == "qwen3_moe":
        return transformers.Qwen3MoeConfig(
            num_experts=4, moe_intermediate_size=24, head_dim=8, **sizes
        )
    if family == "square":  # [experts, in, out] with in = out
        sizes["intermediate_size"] = 32
    layers = ["full_attention"] * 2
    return transformers.GptOssConfig(num_local_experts=4, head_dim=8, layer_types=layers, **sizes)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "square"])
@pytest.mark.parametrize(
    "parameters",
    [["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], ["mlp.experts.down_proj"]],
)
def test_stacks_of_experts(family, parameters, tmp_path):
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(mixture(family)).eval()
    base.save_pretrained(tmp_path / "model")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=parameters, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    report = budwood.merge_files(tmp_path / "model", tmp_path / "adapter", tmp_path / "out")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        wanted = theirs(ids).logits
        assert not torch.allclose(base(ids).logits, wanted, atol=1e-3)
        assert torch.allclose(merged(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    assert len(report.merged) > 2
    assert budwood.verify_files(tmp_path / "model", tmp_path / "adapter", tmp_path / "out").passed(
        0.5
    )
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    stored[key] = torch.zeros(8, 7)
    save_file(stored, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(budwood.Error, match="no parameter of the model has the sizes"):
        budwood.merge_files(tmp_path / "model", tmp_path / "adapter", tmp_path / "no")
