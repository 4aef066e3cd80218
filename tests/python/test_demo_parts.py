"""The parts of the demo that can be checked without running all of it."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path

import pytest

from budwood.plot import plot_loss, read_metrics, smooth

DEMO = Path(__file__).parents[2] / "examples" / "demo"


@pytest.fixture
def demo(monkeypatch):
    monkeypatch.syspath_prepend(str(DEMO))
    spec = importlib.util.spec_from_file_location("demo_run", DEMO / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("sources", None)


def test_hamlet_is_held_out_of_every_text_that_is_trained_on(demo):
    try:
        texts, held_out = demo.find_plays()
    except SystemExit as missing:
        pytest.skip(str(missing))
    assert held_out.name == "hamlet_gut.txt"
    assert len(texts) > 30
    line = "To be, or not to be,--that is the question"
    assert line in held_out.read_text(encoding="utf-8")
    for text in texts:
        assert line not in text.read_text(encoding="utf-8")


def test_the_demos_configuration_has_known_settings_only(demo):
    from budwood.cli.settings import check, read_file

    values = read_file(demo.CONFIG)
    values.update(model="m", output="o")
    values["data"]["train"] = "t"
    checked = check(values, "train.yaml")
    assert checked.train["packing"] == "concat"
    assert checked.adapter["r"] == 16


def test_the_commands_to_try_next_are_commands_of_the_program(demo, capsys):
    from budwood.cli import main

    for command in demo.commands(Path("model.gguf"), Path("out")):
        name, verb, *_ = shlex.split(command)
        assert Path(name).name == "budwood"
        assert main([verb, "--help"]) == 0
        assert verb in capsys.readouterr().out


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant():
    assert smooth([3.0, 3.0, 3.0], 0.9) == pytest.approx([3.0, 3.0, 3.0])
    first, second = smooth([1.0, 2.0], 0.5)
    assert first == 1.0
    assert second == pytest.approx((0.25 * 1 + 0.5 * 2) / 0.75)


def test_the_loss_curve_is_an_image_and_a_cut_last_line_is_left_out(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": s, "loss": 4.0 / s}) for s in range(1, 21)]
    lines.insert(10, json.dumps({"step": 10, "eval_loss": 1.0, "eval_loss_error": float("nan")}))
    metrics.write_text("\n".join(lines) + '\n{"step": 21, "lo')
    train, evaluations = read_metrics(metrics)
    assert [m["step"] for m in train] == list(range(1, 21))
    assert [m["step"] for m in evaluations] == [10]
    start = {"loss": 5.0, "loss_error": 0.1}
    image = plot_loss(metrics, tmp_path / "loss.png", title="a run", start=start)
    assert image.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
