"""budwood train"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..errors import Error
from .console import Output, count, duration
from .opening import is_token_file, load_model, weights_text
from .progress import TrainingView, evaluation_text
from .settings import Settings, load_settings, write_settings

INTERRUPTED = 130


def run(
    config: Path,
    overrides: list[str],
    *,
    resume: bool,
    overwrite: bool,
    plot: bool,
    as_json: bool,
) -> int:
    from .. import _C

    output = Output(as_json)
    settings = load_settings(config, overrides, resume=resume, overwrite=overwrite)
    options = _C.TrainOptions.from_dict(settings.train)
    full = settings.train["tune"] == "full"
    adapter = None if full else getattr(_C, settings.adapter_kind)(**settings.adapter)
    check_inputs(settings)

    model = load_model(settings.model, settings.dtype, settings.weights, settings.quantize)
    output.say(f"base: {weights_text(model)}")
    settings.output.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokeniser(settings.tokenizer)
    train = open_rows(settings, "train", tokenizer, model, output)
    evaluation = open_rows(settings, "eval", tokenizer, model, output)
    if adapter is not None:
        report = _C.inject(model, adapter, settings.adapter_name, settings.seed)
        output.say(report["summary"].rstrip())
        for warning in report["warnings"]:
            output.warn(warning)
    new_base = settings.start is not None and start_factors(settings, model, train, output)

    trainer = _C.Trainer(model, train, evaluation, options)
    write_settings(settings, settings.output / "config.yaml")
    output.say(trainer.train_report["summary"].rstrip())
    plan = trainer.memory_plan
    output.say(plan_text(plan))
    if trainer.step:
        output.say(f"resumed at step {trainer.step} of {trainer.total_steps}")
    with TrainingView(output, trainer.step, trainer.total_steps) as view:
        result = trainer.run(view.logged, view.evaluated)

    for warning in result["warnings"]:
        output.warn(warning)
    if new_base and not result["interrupted"]:
        save_base(settings, model)
    plot = plot and not math.isnan(result["final_loss"])
    if plot:
        from ..plot import plot_loss

        plot_loss(settings.output / "metrics.jsonl", settings.output / "loss.png")
    show_result(output, config, settings, overrides, result, plot, plan)
    return INTERRUPTED if result["interrupted"] else 0


def start_factors(settings: Settings, model: Any, rows: Any, output: Output) -> bool:
    """Lets the factors begin with what quantising took away; whether the base is another now."""
    from .. import _C

    start = settings.start
    assert start is not None
    sequences = []
    if start["method"] == "eora":
        length = settings.train["sequence_length"]
        sequences = [
            rows.row(i)[0].long().tolist()[:length] for i in range(min(rows.rows, start["rows"]))
        ]
    report = _C.start_from_original(
        model,
        start["original"],
        settings.adapter_name,
        start["method"],
        start["iterations"],
        sequences,
    )
    places = report["places"]
    before = sum(place["before"] for place in places) / len(places)
    after = sum(place["after"] for place in places) / len(places)
    what = "outputs" if start["method"] == "eora" else "weights"
    output.say(
        f"{start['method']}: the error of the {what} falls from {before:.2%} to {after:.2%}, mean "
        f"of {len(places)} places"
    )
    return bool(report["base_changed"])


def save_base(settings: Settings, model: Any) -> None:
    """The quantised base that the factors began with: the adapter is of use only with it."""
    from .. import _C

    _C.detach(model, settings.adapter_name)
    _C.save_model(
        model,
        str(settings.output / "base"),
        weights="packed",
        tokenizer_from=settings.model,
        overwrite=True,
    )


def plan_text(plan: dict[str, int]) -> str:
    """One line: what the run will hold, by kind."""

    def mb(name: str) -> str:
        return f"{plan[name] / 2**20:,.0f}"

    shared = f" ({mb('mapped')} shared with the file)" if plan["mapped"] else ""
    return (
        f"memory plan: {mb('total')} MB = process {mb('process')} + frozen {mb('weights')}{shared}"
        f" + trained {mb('adapters')} + gradients {mb('gradients')} + optimiser {mb('optimizer')}"
        f" + activations {mb('activations')} + workspace {mb('workspace')}"
    )


def check_inputs(settings: Settings) -> None:
    """What can be refused before a model is loaded."""
    for name, path in (
        ("model", settings.model),
        ("tokenizer", settings.tokenizer),
        ("data.train", settings.data["train"]),
        ("data.eval", settings.data["eval"]),
    ):
        if path is not None and not Path(path).exists():
            raise Error(f"[train] {name}: {path} does not exist")
    if settings.train["resume"] or settings.train["overwrite"]:
        return
    runs = [settings.output / "training.json", *settings.output.glob("checkpoint-*")]
    earlier = [path.name for path in runs if path.exists()]
    if earlier:
        raise Error(
            f"[train] {settings.output} holds an earlier run ({earlier[0]}): go on with --resume, "
            "replace it with --overwrite, or choose another output"
        )


class Tokeniser:
    """The tokeniser of a run, loaded when the first text needs it."""

    def __init__(self, path: str):
        self.path = path
        self._loaded: Any = None

    def get(self) -> Any:
        if self._loaded is None:
            from ..tokenizer import load_tokenizer

            self._loaded = load_tokenizer(self.path)
        return self._loaded

    def check(self, file: Any) -> None:
        """Refuses a token file that another tokeniser made."""
        if not file.fingerprint:
            return
        from ..tokenizer import fingerprint

        try:
            tokenizer = self.get()
        except Error:
            return  # A model without a tokeniser can be trained on token files all the same.
        if fingerprint(tokenizer) != file.fingerprint:
            raise Error(
                f"[train] {file.path} was made with another tokeniser than that of {self.path}: "
                "tokenise the text again with this model"
            )


def open_rows(
    settings: Settings, which: str, tokenizer: Tokeniser, model: Any, output: Output
) -> Any:
    """The rows to train on or to evaluate on; text is tokenised into the output folder."""
    from .. import _C

    source = settings.data[which]
    if source is None:
        return None
    if is_token_file(Path(source)):
        file = _C.TokenFile.open(source)
        tokenizer.check(file)
        return file
    from ..data import write_token_file

    target = settings.output / f"{which}.tokens"
    statistics = write_token_file(
        source,
        target,
        tokenizer.get(),
        form=settings.data["format"],
        bos=settings.data["bos"],
        eos=settings.data["eos"],
        vocab_size=model.config["vocab_size"],
    )
    output.say(
        f"{which}: {count(statistics.rows)} rows, {count(statistics.tokens)} tokens, "
        f"{count(statistics.targets)} targets"
    )
    for warning in statistics.warnings:
        output.warn(warning)
    return _C.TokenFile.open(str(target))


def show_result(
    output: Output,
    config: Path,
    settings: Settings,
    overrides: list[str],
    result: dict[str, Any],
    plotted: bool,
    plan: dict[str, int],
) -> None:
    folder, loss = settings.output, result["final_loss"]
    pairs = [
        ("steps", count(result["steps"])),
        ("loss", "none logged" if math.isnan(loss) else f"{loss:.4f}"),
        ("tokens", f"{count(result['tokens'])}, {result['tokens_per_second']:.0f} a second"),
        ("time", duration(result["seconds"])),
        (
            "memory",
            f"{count(round(result['peak_rss_mb']))} MB at most, "
            f"{count(round(plan['total'] / 2**20))} MB planned",
        ),
    ]
    if result["evaluation"] is not None:
        pairs.insert(2, ("evaluation", evaluation_text(result["evaluation"])))
    if not result["interrupted"]:
        full = settings.train["tune"] == "full"
        pairs.append(("model", str(folder / "model")) if full else ("adapter", str(folder)))
        if (folder / "base").exists():
            pairs.append(("its base", str(folder / "base")))
    if plotted:
        pairs.append(("loss curve", str(folder / "loss.png")))
    output.figures(pairs)
    if result["interrupted"]:
        again = " ".join(["budwood train", str(config), *overrides, "--resume"])
        output.say(
            f"interrupted at step {result['steps']}, checkpoint written; go on with: {again}"
        )
    output.result({**result, "output": str(folder)})
