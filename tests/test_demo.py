"""The demo at its smallest: its figures are there, fit each other, and the exact lanes change nothing."""

from __future__ import annotations

import io
import json
import struct
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from sidelane import cli, demo_train
from sidelane.demo import QUICK_STEPS
from sidelane.demo_model import GPT, QUICK, Corpus
from sidelane.demo_train import SETTINGS, Trainer

Run = dict[str, Any]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Directory and standard output of one quick run."""
    out, printed = tmp_path_factory.mktemp("demo") / "results", io.StringIO()
    with redirect_stdout(printed):
        status = cli.run(["demo", "--quick", "--out", str(out), "--device", "cpu", "--seed", "3"])
    assert status == 0, printed.getvalue()
    return out, printed.getvalue()


@pytest.fixture(scope="module")
def record(output: tuple[Path, str]) -> dict[str, Any]:
    return dict(json.loads((output[0] / "results.json").read_text()))


@pytest.fixture(scope="module")
def runs(record: dict[str, Any]) -> dict[str, Run]:
    return {run["name"]: run for run in record["runs"]}


def test_every_setting_has_a_row_in_the_table(output: tuple[Path, str], runs: dict[str, Run]) -> None:
    assert list(runs) == [setting.name for setting in SETTINGS]
    lines = output[1].splitlines()
    for name, run in runs.items():
        (row,) = [line for line in lines if line.startswith(f"{name} ") and "after" not in line]
        for text in (f"{run['ratio']:.2f}", f"{run['cosine']:.5f}", f"{run['losses'][-1]:.4f}"):
            assert text in row
        assert row.rstrip().endswith("bitwise equal" if run["bitwise"] else "differs")
    assert max(map(len, lines)) <= 80


def test_exact_lanes_are_bitwise_equal_and_lossy_ones_are_not(runs: dict[str, Run]) -> None:
    plain = runs["no offload"]
    for name, run in runs.items():
        exact = name in ("no offload", "raw", "exact", "checkpoint, exact")
        assert run["bitwise"] is run["exact"] is exact
        assert (run["losses"] == plain["losses"]) is exact
        assert (run["worst_error"] == 0) is exact
        assert run["cosine"] == pytest.approx(1, abs=1e-12) if exact else 0.5 < run["cosine"] < 1


def test_fewer_bits_are_smaller_and_less_accurate(runs: dict[str, Run]) -> None:
    ladder = [runs[name] for name in ("exact", "packed, 8 bits", "packed, 4 bits", "packed, 2 bits")]
    for finer, coarser in zip(ladder, ladder[1:], strict=False):
        assert finer["ratio"] < coarser["ratio"]
        assert finer["held_bytes"] > coarser["held_bytes"]
        assert finer["worst_error"] < coarser["worst_error"]
        assert finer["cosine"] > coarser["cosine"]


def test_the_error_bound_holds(runs: dict[str, Run]) -> None:
    assert 0 < runs["packed, error <= 5%"]["worst_error"] <= 0.05


def test_held_bytes_follow_from_the_ratio(runs: dict[str, Run]) -> None:
    """Without recomputing, what is held is what was saved, made smaller by the ratio."""
    plain = runs["no offload"]["held_bytes"]
    for setting in SETTINGS:
        run = runs[setting.name]
        if not setting.recompute:
            assert run["held_bytes"] * run["ratio"] == pytest.approx(plain, rel=0.05)
        else:
            assert run["held_bytes"] < plain


def test_losses_fall_and_times_are_positive(runs: dict[str, Run]) -> None:
    for run in runs.values():
        assert len(run["losses"]) == QUICK_STEPS
        assert run["losses"][-1] < run["losses"][0] < 8
        assert run["seconds"] > 0


def test_record_says_where_and_how(record: dict[str, Any]) -> None:
    assert record["environment"]["torch"] == torch.__version__
    assert record["environment"]["device"] == "cpu"
    assert record["settings"]["seed"] == 3
    assert record["settings"]["width"] == QUICK.width
    assert record["corpus"]["files"] > 100


def test_figure_is_a_png_of_readable_size(output: tuple[Path, str]) -> None:
    data = (output[0] / "results.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">2I", data[16:24])
    assert width >= 1500 and height >= 500


def test_an_exact_lane_that_is_not_exact_fails_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    context = demo_train.Setting.context

    def wrong(setting: demo_train.Setting, **extra: Any) -> Any:
        if setting.name == "exact":
            return demo_train.offload("packed", min_bytes=demo_train.MIN_BYTES, bits=8)
        return context(setting, **extra)

    monkeypatch.setattr(demo_train.Setting, "context", wrong)
    assert cli.run(["demo", "--quick", "--steps", "2", "--out", str(tmp_path)]) == 1
    assert "Not bitwise equal to no offload: exact\n" in capsys.readouterr().out


def test_output_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert cli.run(["demo", "--quick", "--out", str(tmp_path / "file" / "results")]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("sidelane: ") and printed.err.count("\n") == 1


def test_training_depends_on_the_seed_alone() -> None:
    corpus = Corpus()
    assert corpus.batch(QUICK, 0, 5).equal(corpus.batch(QUICK, 0, 5))
    assert not corpus.batch(QUICK, 0, 5).equal(corpus.batch(QUICK, 1, 5))
    torch.manual_seed(1)
    first = Trainer(QUICK, corpus, torch.device("cpu"), 0).train(SETTINGS[0], 2, lambda: None)[1]
    torch.manual_seed(2)
    second = Trainer(QUICK, corpus, torch.device("cpu"), 0).train(SETTINGS[0], 2, lambda: None)[1]
    assert first.losses == second.losses


def test_model_sees_no_future_bytes() -> None:
    layer = GPT(QUICK, 0).layers[0]
    x = torch.randn(2, QUICK.context, QUICK.width)
    changed = x.clone()
    changed[:, 20:] = 7.0
    torch.testing.assert_close(layer(x)[:, :20], layer(changed)[:, :20])
    assert not torch.allclose(layer(x)[:, 20:], layer(changed)[:, 20:])
