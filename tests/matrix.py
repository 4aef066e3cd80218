"""The test matrix: every method on every model, form of base and side.

    python tests/matrix.py              all cells, as a table
    python tests/matrix.py --pairwise   so few that each pair of values occurs

A cell trains a fresh adapter for 20 steps of plain AdamW on random rows and checks that
- it starts as the base where the method promises that,
- a gradient is that of central differences,
- the loss falls,
- a saved adapter loads with the same result,
- merging gives the same result where there is a merge, and is refused by name where there is none.
A cell that cannot be has its reason.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers

import budwood
from budwood import _C

sys.path.insert(0, str(Path(__file__).parent / "python"))
from test_methods import tiny

warnings.filterwarnings("ignore")
transformers.utils.logging.disable_progress_bar()

TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "bert": ["query", "value", "output.dense"],
}


def lora(family, **more):
    return budwood.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[family], **more)


METHODS = {
    "lora": lambda f: lora(f),
    "rslora": lambda f: lora(f, use_rslora=True),
    "dora": lambda f: lora(f, use_dora=True),
    "qalora": lambda f: lora(f, use_qalora=True, qalora_group_size=8),
    "pissa": lambda f: lora(f, init_lora_weights="pissa"),
    "olora": lambda f: lora(f, init_lora_weights="olora"),
    "adalora": lambda f: budwood.AdaLoraConfig(
        init_r=4, target_r=2, total_step=20, tinit=2, tfinal=5, target_modules=TARGETS[f]
    ),
    "dylora": lambda f: budwood.DyLoraConfig(r=4, target_modules=TARGETS[f]),
    "vera": lambda f: budwood.VeraConfig(r=16, target_modules=TARGETS[f]),
    "ia3": lambda f: budwood.IA3Config(
        target_modules=TARGETS[f], feedforward_modules=[TARGETS[f][-1]]
    ),
    "peqa": lambda f: budwood.PeqaConfig(target_modules=TARGETS[f]),
    # A smooth activation, whose differences are those of a line.
    "houlsby": lambda f: budwood.BottleneckConfig.houlsby(non_linearity="gelu"),
    "pfeiffer": lambda f: budwood.BottleneckConfig(reduction_factor=4, non_linearity="gelu"),
    "parallel": lambda f: budwood.ParallelAdapterConfig(mh_adapter=True, non_linearity="gelu"),
    "compacter": lambda f: budwood.CompacterConfig(reduction_factor=4),
    "prefix": lambda f: budwood.PrefixTuningConfig(num_virtual_tokens=4),
    "prefix_mlp": lambda f: budwood.PrefixTuningConfig(
        num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16
    ),
    "prefix_gated": lambda f: budwood.PrefixTuningConfig(num_virtual_tokens=4, gating="shared"),
    "llama_adapter": lambda f: budwood.AdaptionPromptConfig(adapter_len=4, adapter_layers=2),
    "prompt": lambda f: budwood.PromptTuningConfig(num_virtual_tokens=4, placement="after_bos"),
    "p_tuning": lambda f: budwood.PromptEncoderConfig(num_virtual_tokens=4),
    "reft": lambda f: budwood.ReftConfig(r=4, suffix_positions=2),
}
IDENTITY = {
    "lora",
    "rslora",
    "dora",
    "pissa",
    "olora",
    "adalora",
    "dylora",
    "vera",
    "ia3",
    "qalora",
    "peqa",
    "houlsby",
    "pfeiffer",
    "parallel",
    "llama_adapter",
    "reft",
}
MERGES = {"lora", "rslora", "dora", "qalora", "pissa", "olora", "adalora", "dylora", "vera"}
MERGES |= {"ia3", "peqa"}
BASES = ["fp32", "bf16", "nf4", "int4", "gguf_q4_0"]
PACKED = ("nf4", "int4")
SIDES = ["C++", "Python"]
FAMILIES = ["llama", "gpt2", "bert"]


def _block(base: str) -> int:
    return 32 if base == "nf4" else 16


def reason_empty(method: str, family: str, base: str, side: str) -> str | None:
    """Why a cell cannot be, or None."""
    if base == "gguf_q4_0" and side == "Python":
        return "GGUF blocks are a C++ base: transformers decodes them"
    if base == "gguf_q4_0" and family != "llama":
        return "GGUF files of this architecture are not read"
    if method == "peqa" and base != "int4":
        return "PEQA trains the scales of integer weights"
    return None


class CppSide:
    """A model of models/ in C++."""

    def __init__(self, family: str, base: str, folder: Path) -> None:
        self.family = family
        model = tiny(family)
        model.to(torch.bfloat16 if base == "bf16" else torch.float32).save_pretrained(folder)
        path = str(folder)
        if base == "gguf_q4_0":
            path = str(folder / "model.gguf")
            _C.save_gguf(_C.load_model(str(folder)), path, type="q4_0", embedding_type="f32")
        options = {"quantize": base, "block_size": _block(base)} if base in PACKED else {}
        load = _C.load_bert if family == "bert" else _C.load_model
        self.model = load(path, **options)

    def inject(self, config) -> None:
        _C.inject(self.model, config, seed=3)

    def parameters(self):
        return [p for _, p in _C.trainable_parameters(self.model)]

    def train(self, on: bool) -> None:
        self.model.train(on)

    def loss(self, rows, labels) -> torch.Tensor:
        tokens = _C.TokenBatch.from_rows(rows)
        if self.family == "bert":
            return self.model.loss(tokens, labels)
        shifted = torch.full_like(rows, -100)
        shifted[:, :-1] = rows[:, 1:]
        found = self.model.loss(tokens, shifted.flatten())
        return found.sum / found.count

    def step(self, number: int, before: bool) -> None:
        (_C.before_step if before else _C.after_step)(self.model, number)

    def save(self, folder: Path) -> None:
        _C.save_adapter(self.model, str(folder))

    def reload(self, folder: Path) -> None:
        _C.detach(self.model, "default")
        _C.load_adapter(self.model, str(folder))

    def merge(self) -> None:
        _C.merge(self.model)


class PythonSide:
    """transformers' model with our slots."""

    def __init__(self, family: str, base: str, folder: Path) -> None:
        self.family, self.folder = family, folder
        self.base = tiny(family).to(torch.bfloat16 if base == "bf16" else torch.float32)
        if base in PACKED:
            skip = ["lm_head", "classifier"]
            budwood.quantize_model(self.base, base, block_size=_block(base), skip=skip)
        self.model = None

    def inject(self, config) -> None:
        self.model = budwood.get_peft_model(self.base, config)

    def parameters(self):
        return [p for p in self.model.parameters() if p.requires_grad]

    def train(self, on: bool) -> None:
        (self.model or self.base).train(on)

    def loss(self, rows, labels) -> torch.Tensor:
        model = self.model or self.base
        if self.family == "bert":
            logits = model(input_ids=rows).logits.float()
            return torch.nn.functional.cross_entropy(logits, labels)
        logits = model(input_ids=rows).logits.float()
        extra = logits.shape[1] - rows.shape[1]
        if extra:  # the virtual tokens stand behind the first: what follows it comes from the last
            logits = logits[:, extra:]
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()
        )

    def step(self, number: int, before: bool) -> None:
        if not before:
            self.model.update_and_allocate(number)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)

    def reload(self, folder: Path) -> None:
        self.base = self.model.unload()
        self.model = budwood.PeftModel.from_pretrained(self.base, folder, is_trainable=True)

    def merge(self) -> None:
        self.model.merge_adapter()


def check_cell(method: str, family: str, base: str, side: str) -> None:
    """Raises AssertionError with what a cell does not keep."""
    torch.manual_seed(0)
    rows = torch.randint(3, 61, (4, 12))
    labels = torch.tensor([0, 1, 2, 1])
    coarse = base == "bf16"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one = (CppSide if side == "C++" else PythonSide)(family, base, folder / "model")
        one.train(False)
        with torch.no_grad():
            bare = one.loss(rows, labels).item()
        one.inject(copy.copy(METHODS[method](family)))
        one.train(False)
        with torch.no_grad():
            fresh = one.loss(rows, labels).item()
        if method in IDENTITY:
            assert abs(fresh - bare) < (2e-2 if coarse else 1e-4), f"not the base: {fresh} {bare}"
        one.train(True)
        # Scales are small numbers.
        rate = 5e-4 if method == "peqa" else 5e-3
        optimizer = torch.optim.AdamW(one.parameters(), lr=rate, weight_decay=0)
        for step in range(20):
            one.step(step, before=True)
            optimizer.zero_grad()
            one.loss(rows, labels).backward()
            optimizer.step()
            one.step(step, before=False)
        one.train(False)
        with torch.no_grad():
            after = one.loss(rows, labels).item()
        assert after < fresh, f"the loss rose from {fresh} to {after}"
        if not coarse:
            check_gradient(one, rows, labels, method)
        one.save(folder / "adapter")
        one.reload(folder / "adapter")
        one.train(False)
        with torch.no_grad():
            again = one.loss(rows, labels).item()
        assert abs(again - after) < (2e-2 if coarse else 1e-4), f"loaded {again}, saved {after}"
        try:
            one.merge()
        except budwood.Error as error:
            if method in MERGES or "cannot be merged" not in str(error):
                raise
            return
        assert method in MERGES, "a merge that cannot be was not refused"
        with torch.no_grad():
            merged = one.loss(rows, labels).item()
        assert abs(merged - again) < (5e-2 if coarse else 1e-3), f"merged {merged}, before {again}"


def check_gradient(one, rows, labels, method: str) -> None:
    """The derivative along the gradient, by central differences of two widths."""
    parameters = one.parameters()
    if method == "dora":
        # Row norms are constants for DoRA's gradient, so that of A and B is no derivative.
        parameters = [p for p in parameters if p.dim() == 1]
    for p in parameters:
        p.grad = None
    loss = one.loss(rows, labels)
    loss.backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
    norm = sum(float(g.double().square().sum()) for g in grads) ** 0.5
    if norm < 1e-6:
        return

    def slope(h: float) -> float:
        values = []
        with torch.no_grad():
            for step in (h, -2 * h, h):
                for p, g in zip(parameters, grads, strict=True):
                    p.add_(g, alpha=step / norm)
                values.append(one.loss(rows, labels).item())
        return (values[0] - values[1]) / (2 * h)

    h = 4e-3
    found = (4 * slope(h / 2) - slope(h)) / 3
    rounding = 16 * torch.finfo(torch.float32).eps * abs(loss.item()) / h
    assert abs(found - norm) < 0.01 * norm + rounding, f"gradient {norm}, differences {found}"


def cells(pairwise: bool) -> Iterator[tuple[str, str, str, str]]:
    """All cells, or so few that each pair of values occurs where it can."""
    everything = list(itertools.product(METHODS, FAMILIES, BASES, SIDES))
    if not pairwise:
        yield from everything
        return
    missing = {
        (i, a, j, b)
        for cell in everything
        if not reason_empty(*cell)
        for (i, a), (j, b) in itertools.combinations(enumerate(cell), 2)
    }
    while missing:
        best = max(
            (c for c in everything if not reason_empty(*c)), key=lambda c: len(missing & _pairs(c))
        )
        missing -= _pairs(best)
        yield best


def _pairs(cell: tuple[str, ...]) -> set[tuple]:
    return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(enumerate(cell), 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairwise", action="store_true")
    parser.add_argument("--only", default="", help="a part of the cell's name")
    options = parser.parse_args()
    results, reasons = {}, {}
    for cell in cells(options.pairwise):
        if options.only not in " ".join(cell):
            continue
        reason = reason_empty(*cell)
        if reason:
            results[cell] = "-"
            reasons.setdefault(reason, []).append(cell)
            continue
        try:
            check_cell(*cell)
            results[cell] = "ok"
        except Exception as error:
            results[cell] = "FAIL"
            print(" ".join(cell), type(error).__name__, str(error)[:300], file=sys.stderr)
    columns = list(itertools.product(FAMILIES, SIDES))
    width = max(len(m) for m in METHODS) + 2
    for base in BASES:
        print(f"\n{base}\n" + " " * width + "".join(f"{f + ' ' + s:>14}" for f, s in columns))
        for method in METHODS:
            row = [results.get((method, f, base, s), "") for f, s in columns]
            if any(row):
                print(f"{method:<{width}}" + "".join(f"{value:>14}" for value in row))
    for reason, where in reasons.items():
        print(f"\n- {reason} ({len(where)} cells)")
    failed = sum(value == "FAIL" for value in results.values())
    print(f"\n{sum(v == 'ok' for v in results.values())} cells hold, {failed} do not")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
