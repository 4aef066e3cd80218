"""Fine-tunes a small language model on Shakespeare's plays and shows what changed.

    python examples/demo/run.py [--steps N] [--out FOLDER] [--check-peft]

The model and the texts come from installed packages; nothing is downloaded. Everything that is made
goes to demo-out.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from sources import find_model, find_plays

from budwood import _C
from budwood.cli import main as budwood
from budwood.cli.opening import weights_text
from budwood.data import write_token_file
from budwood.plot import plot_loss
from budwood.tokenizer import load_tokenizer

CONFIG = Path(__file__).parent / "train.yaml"
WINDOW = 256
HELD_OUT_FROM, HELD_OUT_TOKENS = 2000, 4096
PROMPTS = ("KING.\nWhat news", "[Enter two Murderers.]\n\n", "My noble lord,")
SAMPLING = {"max_new_tokens": 40, "temperature": 0.7, "top_p": 0.9, "seed": 1}

console = Console(highlight=False, soft_wrap=True)


def headline(number: int, text: str) -> None:
    console.print()
    console.print(f"[bold]{number}  {text}[/bold]")


def prepare(out: Path, texts: list[Path], held_out: Path, tokenizer, vocab_size: int) -> None:
    """Writes train.tokens, and hamlet.tokens with one row for each window to predict."""
    folder = out / "plays"
    folder.mkdir(parents=True)
    for text in texts:
        shutil.copy(text, folder / text.name)
    statistics = write_token_file(
        folder, out / "train.tokens", tokenizer, eos=False, vocab_size=vocab_size
    )
    console.print(f"   train on   {statistics.rows} texts, {statistics.tokens:,} tokens")
    ids = tokenizer(held_out.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    ids = ids[HELD_OUT_FROM : HELD_OUT_FROM + HELD_OUT_TOKENS]
    writer = _C.TokenFileWriter(str(out / "hamlet.tokens"), vocab_size)
    for begin in range(0, len(ids), WINDOW):
        writer.add(ids[begin : begin + WINDOW])
    writer.commit()
    console.print(f"   held out   Hamlet: {len(ids):,} tokens in windows of {WINDOW}")


def measure(model, out: Path) -> dict:
    """Loss and perplexity on the held-out windows."""
    data = _C.TokenFile.open(str(out / "hamlet.tokens"))
    return _C.evaluate(model, _C.Sampler(data, sequence_length=WINDOW, shuffle=False))


def continuations(model, tokenizer) -> list[str]:
    """What the model writes after each of the fixed prompts."""
    texts = []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        texts.append(
            tokenizer.decode(_C.generate(model, ids, **SAMPLING), skip_special_tokens=True)
        )
    return texts


def perplexity_text(figures: dict) -> str:
    return f"{figures['perplexity']:.1f} ± {figures['perplexity_error']:.1f}"


def train(model: Path, out: Path, steps: int | None) -> None:
    """Runs `budwood train`, as on a command line."""
    command = [
        "train",
        str(CONFIG),
        f"model={model}",
        f"output={out / 'adapter'}",
        f"data.train={out / 'train.tokens'}",
        f"data.eval={out / 'hamlet.tokens'}",
    ]
    if steps is not None:
        command += [f"train.steps={steps}", f"train.eval_every={max(1, steps // 3)}"]
        command += [f"train.warmup_steps={min(4, steps - 1)}"]
    console.print(f"   $ budwood {shlex.join(command)}", style="dim", soft_wrap=True)
    status = budwood(command)
    if status != 0:
        raise SystemExit(status)


@torch.no_grad()
def merge(model, out: Path, source: Path, probe: torch.Tensor) -> dict[str, float]:
    """Merges the adapter, saves the model, and measures how far logits moved on the way."""
    folder = out / "merged"
    attached = model(probe)
    _C.merge(model)
    merged = model(probe)
    _C.save_model(model, str(folder), "auto", str(source))
    reopened = _C.load_model(str(folder))
    return {
        "merged - adapter": float((merged - attached).abs().max()),
        "reopened - merged": float((reopened(probe) - merged).abs().max()),
        "largest logit": float(attached.abs().max()),
    }


def compare(before: list[str], after: list[str]) -> Padding:
    """Prompts with both continuations, side by side."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 1, 0), header_style="dim")
    for title, width in (("prompt", 2), ("before", 5), ("after", 5)):
        table.add_column(title, ratio=width)
    for texts in zip(PROMPTS, before, after):
        table.add_row(*(Text("\n".join(t.strip().splitlines())) for t in texts))
    return Padding(table, (0, 0, 0, 3))


def check_peft(out: Path, source: Path, probe: torch.Tensor, bound: float = 1e-4) -> None:
    """The adapter opens in HF PEFT, the merged folder in transformers, with the same logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    ours = _C.load_model(str(source), "float32")
    _C.save_model(ours, str(out / "base"), "auto", str(source))
    _C.load_adapter(ours, str(out / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, out / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32).eval()
    differences = {}
    with torch.no_grad():
        logits = ours(probe)
        differences["adapter in HF PEFT"] = float((theirs(probe).logits - logits).abs().max())
        _C.merge(ours)
        differences["merged in transformers"] = float(
            (merged(probe).logits - ours(probe)).abs().max()
        )
    for name, difference in differences.items():
        console.print(f"   {name:<24} largest difference of a logit {difference:.1e}")
        if not difference <= bound:
            raise SystemExit(f"{name}: logits differ by {difference:.1e}, more than {bound:.0e}")


def commands(source: Path, out: Path) -> list[str]:
    """What to try next."""
    program = shorter(Path(sys.executable).parent / "budwood")
    if shutil.which("budwood"):
        program = Path("budwood")
    data = f"data.train={out / 'train.tokens'} data.eval={out / 'hamlet.tokens'}"
    return [
        f"{program} generate -m {out / 'merged'} -p 'ROMEO.' --temperature 0.8 -n 80",
        f"{program} inspect {out / 'adapter'}",
        f"{program} train {shorter(CONFIG)} model={shorter(source)} {data} "
        f"output={out / 'rank32'} adapter.r=32",
    ]


def shorter(path: Path) -> Path:
    """The path from here, where that is shorter to type."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="training steps (default: 60)")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="output folder")
    parser.add_argument("--check-peft", action="store_true", help="compare with HF PEFT")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error("--steps is at least 1")
    begin = time.perf_counter()
    out = arguments.out
    if out.exists() and any(out.iterdir()) and not (out / "train.tokens").exists():
        raise SystemExit(f"{out} holds something else; choose another folder with --out")
    shutil.rmtree(out, ignore_errors=True)

    headline(1, "A model and texts")
    source = find_model()
    texts, held_out = find_plays()
    tokenizer = load_tokenizer(source)
    model = _C.load_model(str(source), "float32")
    console.print(f"   model      {source.name}")
    console.print(f"   weights    {weights_text(model)}, used as they lie in the file")
    prepare(out, texts, held_out, tokenizer, model.config["vocab_size"])

    headline(2, "Before training")
    before = measure(model, out)
    old = continuations(model, tokenizer)
    console.print(f"   perplexity on Hamlet {perplexity_text(before)}")
    del model

    headline(3, "Training on the 4-bit weights (weights=dense: on decoded ones)")
    train(source, out, arguments.steps)
    image = plot_loss(
        out / "adapter" / "metrics.jsonl",
        out / "loss.png",
        title="SmolLM2-135M-Instruct in 4 bits, LoRA, Shakespeare's plays",
        start=before,
    )

    headline(4, "After training")
    model = _C.load_model(str(source), "float32")
    _C.load_adapter(model, str(out / "adapter"))
    after = measure(model, out)
    new = continuations(model, tokenizer)
    console.print(
        f"   perplexity on Hamlet {perplexity_text(before)} -> "
        f"[bold]{perplexity_text(after)}[/bold]"
    )
    console.print(f"   loss curve {image}\n")
    console.print(compare(old, new), soft_wrap=False)

    headline(5, "Merging")
    data = _C.TokenFile.open(str(out / "hamlet.tokens"))
    probe = data.row(0)[0].to(torch.int64)[None]
    moved = merge(model, out, source, probe)
    console.print(f"   written to {out / 'merged'}, which transformers opens")
    console.print(
        "   largest difference of a logit: merged to unmerged "
        f"{moved['merged - adapter']:.1e}, reopened to merged {moved['reopened - merged']:.1e} "
        f"(logits reach {moved['largest logit']:.0f})"
    )
    if arguments.check_peft:
        headline(6, "Comparing with HF PEFT and transformers")
        check_peft(out, source, probe)

    figures = {"before": before, "after": after, "merge": moved}
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    console.print(f"\n[dim]{time.perf_counter() - begin:.0f} seconds. Try next:[/dim]")
    for command in commands(source, out):
        console.print(f"   {command}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
