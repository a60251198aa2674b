"""The benchmarks of offload and of training at tiny sizes: what they measure is what they say."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import ceil, inf
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
GIB = 1 << 30
CPU = torch.device("cpu")

Script = Callable[[str], ModuleType]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Imports a module of the benchmarks by its name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These tensors are too small for more. What training sets for its process goes back to what it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_the_chunked_head_gives_the_loss_and_gradients_of_one_piece(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = script("llama")
    monkeypatch.setattr(llama, "CHUNK", 24)
    shape = llama.SHAPES["tiny"]  # 64 tokens: two chunks and a part of one
    model, tokens = llama.Llama(shape, CPU, head=True), llama.batch(shape, CPU)
    loss = llama.train_step(model, tokens)
    chunked = llama.gradients(model)
    hidden = model.backbone(input_ids=tokens[:, :-1]).last_hidden_state
    whole = F.cross_entropy(model.head(hidden).flatten(0, 1).float(), tokens[:, 1:].flatten())
    whole.backward()
    torch.testing.assert_close(loss, whole.detach())
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            chunked[name], p.grad, rtol=0.05, atol=1e-4
        )  # bfloat16 sums in other orders


def test_no_setting_sees_what_the_head_saves(script: Script) -> None:
    llama = script("llama")
    shape = llama.SHAPES["tiny"]
    model, tokens = llama.Llama(shape, CPU, head=True), llama.batch(shape, CPU)
    seen: list[Tensor] = []
    llama.train_step(model, tokens, lambda: saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t))
    assert len(seen) > 20
    assert not any(
        shape.vocab in t.shape and t.shape != model.backbone.embed_tokens.weight.shape for t in seen
    )


def test_a_row_of_each_kind(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, peers, shape = script("measure"), script("peers"), script("llama").SHAPES["tiny"]
    monkeypatch.setattr(measure, "WARM", 2)
    monkeypatch.setattr(measure, "TIMED", 3)
    shape = replace(shape, layers=1)
    small = {"min_bytes": 256}
    exact = peers.Setting(peers.ours, options={"lane": "exact"} | small)
    lossy = peers.Setting(peers.ours, exact=False, options={"lane": "packed", "bits": 4} | small)
    budget = replace(peers.SETTINGS["sidelane 8-bit"], options={"lane": "packed", "bits": 8} | small)
    rows = [
        measure.measure(setting, shape, True) for setting in (peers.SETTINGS["none"], exact, lossy, budget)
    ]
    assert [row["gradients"] for row in rows] == ["bitwise", "bitwise", "lossy", "lossy"]
    assert 0.5 < rows[2]["cosine"] < rows[3]["cosine"] < 1
    assert len({tuple(row) for row in rows}) == 1
    assert [bool(row["gpu_budget_gib"]) for row in rows] == [False, False, False, True]
    for row in rows:
        assert 0 < row["ms_q1"] <= row["ms"] <= row["ms_q3"]


@pytest.mark.parametrize("name", ["checkpoint", "save_on_cpu", "sidelane checkpoint raw"])
def test_settings_without_packages_of_their_own_pass_the_gate(script: Script, name: str) -> None:
    measure, peers, shape = script("measure"), script("peers"), script("llama").SHAPES["tiny"]
    row = measure.measure(peers.SETTINGS[name], shape, False)
    assert row["gradients"] == "bitwise"


@pytest.mark.parametrize(
    ("loops", "numbers", "left_out", "slowed"),
    [  # after every move a step is not timed
        ("m 10 10 11 10", [2, 3, 4], 0, 1.1),
        ("m 10 10 20 m 10 10 10", [2, 5, 6], 1, 1.0),  # the second is disturbed
        ("m 20 20 10 10 m 10 10 10", [4, 6, 7], 2, 1.0),  # what was the quietest at first was not quiet
        ("m 10 20 m 20 20 m 20 20 m 20 20 m 20 20 m 20 20", [2, 4, 6], 3, 2.0),  # it ends
    ],
)
def test_disturbed_steps_are_left_out(
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
    loops: str,
    numbers: list[int],
    left_out: int,
    slowed: float,
) -> None:
    """`loops`: what they take, m for a move before them. The time of a step is its number."""
    measure, coming, count = script("measure"), loops.split(), iter(range(1, 100))
    monkeypatch.setattr(measure, "MOST", 2)
    steps: list[int] = []
    monkeypatch.setattr(measure, "loop_us", lambda: float(coming.pop(0)))
    monkeypatch.setattr(measure, "_now", lambda: len(steps))
    monkeypatch.setattr(measure, "_ms", lambda begin, end: float(end))
    moves: list[str] = []
    found = measure.quiet_timings(lambda: steps.append(next(count)), 3, lambda: moves.append(coming.pop(0)))
    assert not coming and set(moves) == {"m"}
    assert (found.ms, found.left_out, found.slowed) == (numbers, left_out, slowed)
    assert found.run == len(steps)


def test_no_time_without_the_gradients(script: Script) -> None:
    """A lossy lane that claims to be exact stops the benchmark."""
    measure, peers, shape = script("measure"), script("peers"), script("llama").SHAPES["tiny"]
    liar = peers.Setting(peers.ours, options={"lane": "packed", "bits": 2, "min_bytes": 256})
    with pytest.raises(RuntimeError, match="gradients differ"):
        measure.measure(liar, shape, True)


def test_cosines_of_known_gradients(script: Script) -> None:
    compare = script("measure").compare
    a = {"x": torch.tensor([3.0, 4.0]), "y": torch.tensor([0.0, 5.0])}
    assert compare(a, {k: v.clone() for k, v in a.items()})["gradients"] == "bitwise"
    found = compare(a, {"x": torch.tensor([3.0, 4.0]), "y": torch.tensor([5.0, 0.0])})
    assert found == {"gradients": "lossy", "cosine": 0.5, "worst_cosine": 0.0}
    assert compare(a, {k: 0 * v for k, v in a.items()})["cosine"] == 0
    with pytest.raises(RuntimeError, match="other parameters"):
        compare(a, {"x": a["x"]})


def test_copies_beside_kernels(script: Script) -> None:
    measure = script("measure")
    spans = [
        measure.Span("kernel", 0, 400, 0),
        measure.Span("kernel", 600, 1000, 0),
        measure.Span("DtoH", 100, 300, GIB),
        measure.Span("DtoH", 200, 500, GIB),  # 100 of it beside no kernel
        measure.Span("HtoD", 700, 800, 3 * GIB),
        measure.Span("other", 1000, 1100, 7 * GIB),
    ]
    assert measure.copied(spans) == {
        "out_gib": 2.0,
        "in_gib": 3.0,
        "idle_ms": 0.3,
        "copy_ms": 0.5,
        "overlapped": 0.8,
    }
    assert measure.copied([])["overlapped"] == ""


@pytest.mark.parametrize(("ms", "hidden"), [(100, 1), (150, 0.5), (200, 0), (220, -0.2)])
def test_hidden_fraction(script: Script, ms: float, hidden: float) -> None:
    """100 ms of computing and 100 ms of copies: 50 out, 50 in."""
    moved = 0.05e9 * 50 / GIB
    row = {"ms": ms, "out_gib": moved, "in_gib": moved, "d2h_gb_s": 50.0, "h2d_gb_s": 50.0}
    assert script("offload").hidden_fraction(row, 100) == pytest.approx(hidden)


def test_anchors_of_the_comparison(script: Script, tmp_path: Path) -> None:
    """Recomputing settings are compared with checkpoint for what their copies cost, and all with none."""
    offload = script("offload")
    speed = {"d2h_gb_s": 50.0, "h2d_gb_s": 50.0, "peak_gib": 1.0, "package": "torch 2"}
    moved = {"out_gib": 0.05e9 * 50 / GIB, "in_gib": 0.05e9 * 50 / GIB}  # 100 ms
    still = {"out_gib": 0.0, "in_gib": 0.0}
    rows = [
        {"setting": "none", "ms": 100.0, **still, **speed},
        {"setting": "checkpoint", "ms": 200.0, **still, **speed},
        {"setting": "trl", "ms": 150.0, **moved, **speed},
        {"setting": "deepspeed", "ms": 200.0, **moved, **speed},
    ]
    found = []
    for row in rows:
        found.append(offload.compared(found, row))
    assert [row["times_none"] for row in found] == [1.0, 2.0, 1.5, 2.0]
    assert [row["hidden_fraction"] for row in found] == ["", "", 0.5, 1.0]
    offload.draw(tmp_path / "f.png", found, "title")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("floor", "growth", "target", "expected"),
    [
        (2.0, 1.0, 3.6, 1.6),  # the peak grows with the budget
        (2.0, 0.5, 3.6, 3.2),
        (3.5, 1.0, 3.6, 0.25),  # the least budget is too much already
    ],
)
def test_the_largest_budget_below_a_peak(
    script: Script, floor: float, growth: float, target: float, expected: float
) -> None:
    def peak(budget: int) -> int:
        return int(floor * GIB + growth * budget)

    found = script("measure").largest_budget(peak, int(target * GIB))
    assert found / GIB == pytest.approx(expected, abs=0.25)
    assert peak(found) <= target * GIB or found == script("measure").LEAST_BUDGET


@pytest.mark.parametrize(
    ("device", "host", "expected", "limit"),
    [
        (80 * GIB, 0, 76_000, "gpu"),
        (80 * GIB, GIB // 1000, 76_000, "gpu"),
        (80 * GIB, GIB // 500, 50_000, "host"),
        (800 * GIB, 0, 96 << 10, "tried"),
    ],
)
def test_the_longest_sequence(script: Script, device: int, host: int, expected: int, limit: str) -> None:
    """Of a model that takes 4 GiB and 1 GiB per 1000 tokens, `host` bytes per token on 100 GiB of host."""
    longest = script("longest")

    def attempt(tokens: int):
        peak = 4 * GIB + tokens * GIB // 1000
        return longest.Trial(tokens, peak <= device, peak, tokens * host, 1.0)

    trials, found = longest.search(attempt, device, 100 * GIB)
    best = max(trial.tokens for trial in trials if trial.fits)
    assert found == limit
    assert expected / longest.STRIDE - longest.GRAIN <= best <= expected
    assert len(trials) <= len(longest.PROBES) + longest.TRIALS
    assert all(trial.host <= 100 * GIB for trial in trials)
    assert longest.crossing((1, 5), (2, 5), 7) == inf


def test_the_row_of_the_longest_sequence(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step allocates 1 MiB a token of 100; from 90 on there is no memory."""
    longest, llama, peers = script("longest"), script("llama"), script("peers")
    tried: list[int] = []

    def batch(shape: Any, place: torch.device) -> torch.Tensor:
        tried.append(shape.tokens)
        if shape.tokens > 90:
            raise torch.OutOfMemoryError("of the test")
        return llama.batch(shape, place)

    memory = SimpleNamespace(total_memory=ceil((100 << 20) / longest.SHARE))
    for name, value in {"PROBES": (32, 64), "GRAIN": 16, "batch": batch, "host_used": lambda: 5}.items():
        monkeypatch.setattr(longest, name, value)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: memory)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: tried[-1] << 20)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    row = longest.longest(peers.SETTINGS["none"], llama.SHAPES["tiny"], True)
    assert (row["tokens"], row["limit"], row["trials"]) == (80, "gpu", "32 64 96! 80")
    assert row["ms"] > 0 and row["peak_gib"] == round(80 / 1024, 2) and row["host_gib"] == 0


def test_the_longest_sequence_needs_a_short_one(script: Script) -> None:
    longest = script("longest")
    with pytest.raises(RuntimeError, match="do not fit"):
        longest.search(lambda tokens: longest.Trial(tokens, False, 0, 0, 0.0), GIB, GIB)


def test_one_file_of_torchtune_loads_alone(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "torchtune" / "training"
    folder.mkdir(parents=True)
    (tmp_path / "torchtune" / "__init__.py").write_text("raise ImportError('needs torchao')")
    (folder / "_activation_offloading.py").write_text(
        "import torchao\n"
        "from torchao.dtypes.nf4tensor import NF4Tensor\n"
        "from torchtune.modules import TiedLinear\n"
        "from torchtune.utils import get_logger\n"
        "log = get_logger('DEBUG')\n"
        "class OffloadActivations: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    module = script("peers").torchtune_module()
    assert module.OffloadActivations.__module__ == "torchtune.training._activation_offloading"
    assert not {name for name in set(sys.modules) - before if name.startswith(("torchtune", "torchao"))}


def test_training_runs_and_their_rows(script: Script, tmp_path: Path) -> None:
    training = script("training")
    settings = ("none", "exact", "8-bit", "4-bit", "auto 4-bit", "4-bit layers")
    runs = [training.train(training.Job(name, seed, "tiny", 3)) for name in settings for seed in (0, 1)]
    rows = training.summary(runs, ["exact"])
    assert [row["bitwise"] for row in rows] == 4 * [True] + 8 * [False]
    by_name = {(row["setting"], row["seed"]): row for row in rows}
    assert by_name["none", 0]["held_out_loss"] != by_name["none", 1]["held_out_loss"]
    assert by_name["4-bit", 0]["cosine"] < by_name["8-bit", 0]["cosine"] < 1
    ratios = [by_name[name, 0]["ratio"] for name in ("4-bit", "8-bit", "exact", "none")]
    assert ratios == sorted(ratios, reverse=True) and len(set(ratios)) == 4
    assert len({row["spread"] for row in rows}) == 1
    parts = {part for _, part, _ in runs[-1].cosines}
    assert parts == {"all", "embed", "layer 0", "layer 1", "norm", "head", *script("regions").REGIONS}
    training.draw(tmp_path / "f.png", runs)
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    changed = replace(runs[2], losses=[loss + 1e-6 for loss in runs[2].losses])  # an exact run
    with pytest.raises(RuntimeError, match="differ"):
        training.summary([changed, *runs[:2]], ["exact"])
    with pytest.raises(TimeoutError, match="step 0"):
        training.train(training.Job("none", 0, "tiny", 3, until=0))


def test_regions_part_what_a_model_saves(script: Script) -> None:
    """Every saved activation belongs to one region, and the embedding's to none."""
    training, regions = script("training"), script("regions")
    shape = training.SHAPES["tiny"]
    model = training.GPT(shape, 0)
    tokens = training.texts()[0].batch(shape, 0, 0)

    def saved(region: str | None) -> list[tuple[int, ...]]:
        found: list[tuple[int, ...]] = []
        hooks = saved_tensors_hooks(lambda t: found.append(tuple(t.shape)) or t, lambda t: t)
        if region is None:
            with hooks:
                model(tokens)
        else:
            with regions.lane_in(model, region, hooks):
                model(tokens)
        return found

    parts = {region: saved(region) for region in regions.REGIONS}
    logits = (shape.batch * shape.context, 256)
    assert logits in parts["head and loss"]
    assert not any(logits in parts[region] for region in regions.REGIONS if region != "head and loss")
    assert any(len(s) == 4 for s in parts["attention"])
    assert all(parts.values())
    # Beyond them: the indices of the embedding, and of its loss what the last norm saves, in "norms".
    assert sum(map(len, parts.values())) == len(saved(None)) - 1


def test_the_learning_rate(script: Script) -> None:
    rate = script("training").rate
    assert rate(0, 1000) == pytest.approx(0.01)
    assert rate(99, 1000) == rate(100, 1000) == 1
    assert rate(1000, 1000) == pytest.approx(0.1)
