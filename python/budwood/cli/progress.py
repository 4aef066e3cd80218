"""How a running training is shown: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from .console import Output, count, duration


class TrainingView:
    """Shows metrics as they come. Use it as a context around Trainer.run()."""

    def __init__(self, output: Output, step: int, total: int):
        self.output = output
        self.total = total
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        if output.terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[figures]}"),
                console=output.console,
            )
            self.task = self.bar.add_task("training", total=total, completed=step, figures="")

    def __enter__(self) -> TrainingView:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def logged(self, metrics: dict[str, Any]) -> None:
        """A logged step."""
        rate = f"{count(round(metrics['tokens_per_second']))} tokens/s"
        memory = f"{count(round(metrics['peak_rss_mb']))} MB"
        left = duration(metrics["eta_seconds"])
        if self.bar is not None and self.task is not None:
            figures = f"loss [bold]{metrics['loss']:.4f}[/bold]  {rate}  {memory}  {left} left"
            self.bar.update(self.task, completed=metrics["step"], figures=figures)
            return
        width = len(str(self.total))
        self.output.say(
            f"step {metrics['step']:>{width}}/{self.total}  loss {metrics['loss']:.4f}  "
            f"lr {metrics['learning_rate']:.2e}  norm {metrics['grad_norm']:.3f}  {rate}  "
            f"{memory}  {left} left"
        )

    def evaluated(self, step: int, evaluation: dict[str, Any]) -> None:
        """An evaluation."""
        self.output.say(f"step {step}: evaluation {evaluation_text(evaluation)}")


def evaluation_text(evaluation: dict[str, Any]) -> str:
    """'loss 3.1234 ± 0.0123, perplexity 22.72 ± 0.28'."""
    loss = f"{evaluation['loss']:.4f}{error_text(evaluation['loss_error'], 4)}"
    perplexity = f"{evaluation['perplexity']:.2f}{error_text(evaluation['perplexity_error'], 2)}"
    return f"loss {loss}, perplexity {perplexity}"


def error_text(error: float | None, digits: int) -> str:
    """' ± 0.01', or nothing when the error is not known."""
    known = error is not None and error == error
    return f" ± {error:.{digits}f}" if known else ""
