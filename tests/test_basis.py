"""Bases: what calibration finds, how bits are allocated, the quantizer convention, files."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sidelane.errors import BasisError
from sidelane.kernels.reference import dequantize_project_ref, project_quantize_ref
from sidelane.pipeline.basis import LOADING, Basis
from sidelane.pipeline.calibrate import allocate_bits, calibrate, coding_error

DIM = 24


def rotated(rows: int, std: Tensor, *, seed: int = 0, laplacian: bool = False) -> Tensor:
    """Rows [rows, D] with independent coefficients of `std` in a random orthonormal frame, mean 3."""
    rng = np.random.default_rng(seed)
    frame = np.linalg.qr(np.random.default_rng(99).standard_normal((len(std), len(std))))[0]
    z = rng.laplace(size=(rows, len(std))) / 2**0.5 if laplacian else rng.standard_normal((rows, len(std)))
    return torch.from_numpy((z * std.numpy()) @ frame.T + 3.0).float()


DECAY = torch.logspace(0, -2, DIM)


@pytest.fixture(scope="module")
def basis() -> Basis:
    return calibrate([rotated(4096, DECAY)], bits=4.0)


@pytest.fixture(scope="module")
def full() -> Basis:
    """A basis that keeps every component."""
    return calibrate([rotated(4096, DECAY)], bits=12.0)


def heldout_mask(rows: int) -> npt.NDArray[np.bool_]:
    return (np.arange(rows) // 16) * ((5**0.5 - 1) / 2) % 1 < 0.25


def code(basis: Basis, x: Tensor, width: int | None = None) -> tuple[Tensor, int]:
    q = basis.quantizer(width)
    codes, clamped = project_quantize_ref(x, q.components, q.offset, q.inv_scale, q.levels)
    return dequantize_project_ref(codes, q.components, q.scale, q.bias, torch.float32), int(clamped)


def test_components_match_eigh_of_the_full_covariance(full: Basis) -> None:
    x = rotated(4096, DECAY)
    fitted = x.double().numpy()[~heldout_mask(4096)]
    values, vectors = np.linalg.eigh(np.cov(fitted.T, bias=True))
    np.testing.assert_allclose(full.mean, fitted.mean(0), rtol=1e-6)
    np.testing.assert_allclose(full.spectrum, values[::-1], rtol=1e-6)
    cosines = np.abs((vectors[:, ::-1] * full.components.numpy()).sum(0))
    np.testing.assert_allclose(cosines, 1.0, atol=1e-6)
    assert full.samples == len(fitted)


def test_low_rank_data_gives_its_subspace() -> None:
    std = torch.zeros(DIM)
    std[:5] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    x = rotated(2048, std)
    basis = calibrate([x], bits=2.0)
    assert len(basis.widths) == 5
    outside = (x - basis.mean) - (x - basis.mean) @ basis.components @ basis.components.t()
    assert outside.norm() < 1e-5 * x.norm()
    p = (std**2 / (std**2).sum())[:5]
    assert basis.effective_rank == pytest.approx(float(torch.exp(-(p * p.log()).sum())), rel=0.02)


def test_a_large_mean_does_not_drown_the_covariance() -> None:
    x = rotated(4096, DECAY).double() + 1e6
    basis = calibrate([x], bits=8.0)
    values = np.linalg.eigvalsh(np.cov(x.numpy()[~heldout_mask(4096)].T, bias=True))
    np.testing.assert_allclose(basis.spectrum, values[::-1], rtol=1e-5)


def test_components_are_orthonormal_and_ordered(full: Basis) -> None:
    torch.testing.assert_close(full.components.t() @ full.components, torch.eye(DIM))
    assert (full.spectrum.diff() <= 0).all()


def test_std_and_peak_are_those_of_heldout_rows(full: Basis) -> None:
    """Both halves of the held-out rows have the same statistics to sampling error."""
    z = (rotated(4096, DECAY)[heldout_mask(4096)] - full.mean) @ full.components
    torch.testing.assert_close(full.std, z.square().mean(0).sqrt(), rtol=0.15, atol=0.0)
    assert (full.peak <= z.abs().amax(0) * (1 + 1e-5)).all()
    assert (full.peak > 2 * full.std).all()


@pytest.mark.parametrize("budget", [1, 17, 48, 96, 200, DIM * 12])
def test_allocation_is_reverse_water_filling(budget: int) -> None:
    variance = DECAY.double() ** 2
    errors = variance[:, None] / 4.0 ** torch.arange(13)
    low, high = 1e-30, float(variance.max())
    for _ in range(200):  # bisection for the water level of real-valued widths
        level = (low * high) ** 0.5
        ideal = (0.5 * torch.log2(variance / level)).clamp(0, 12)
        low, high = (level, high) if ideal.sum() > budget else (low, level)
    widths = torch.tensor(allocate_bits(errors, budget))
    assert widths.sum() == budget
    assert ((widths - ideal).abs() < 1).all()


def test_allocation_is_optimal_for_convex_errors() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        gains = -np.sort(-rng.random((4, 4)), axis=1)  # falling
        errors = np.concatenate((np.full((4, 1), 5.0), 5.0 - gains.cumsum(1)), axis=1)
        for budget in range(17):
            best = min(
                errors[range(4), w].sum()
                for w in map(list, itertools.product(range(5), repeat=4))
                if sum(w) <= budget
            )
            got = allocate_bits(torch.from_numpy(errors), budget)
            assert sum(got) <= budget
            assert errors[range(4), list(got)].sum() == pytest.approx(best)


def test_allocation_skips_widths_above_the_hull() -> None:
    """One bit is worse than none for component 0, two are good: it takes both or neither."""
    errors = torch.tensor([[4.0, 5.0, 0.0], [1.0, 0.5, 0.4]])
    assert [allocate_bits(errors, b) for b in range(5)] == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]


@pytest.mark.parametrize("bits", [0.25, 1.0, 2.5, 4.0, 8.0])
def test_widths_keep_the_budget(bits: float) -> None:
    basis = calibrate([rotated(1024, DECAY)], bits=bits)
    assert bits * DIM - 1 < sum(basis.widths) <= bits * DIM
    assert basis.bits <= bits
    assert basis.widths[-1] > 0


@pytest.mark.parametrize("laplacian", [False, True])
@pytest.mark.parametrize("bits", [2, 4])
def test_allocation_beats_truncation_and_uniform_widths(laplacian: bool, bits: int) -> None:
    x = rotated(8192, DECAY, laplacian=laplacian)
    fresh = rotated(4096, DECAY, seed=1, laplacian=laplacian)
    everything = calibrate([x], bits=12.0)
    ours = coding_error(calibrate([x], bits=float(bits)), fresh)
    uniform = coding_error(replace(everything, widths=(bits,) * DIM), fresh)
    assert ours < uniform
    for width in range(bits + 1, 13):
        kept = bits * DIM // width
        truncated = replace(everything, widths=(width,) * kept + (0,) * (DIM - kept))
        assert ours < coding_error(truncated, fresh)


def test_reported_error_predicts_fresh_rows() -> None:
    basis = calibrate([rotated(8192, DECAY)], bits=3.0)
    fresh = rotated(8192, DECAY, seed=1)
    restored, _ = code(basis, fresh)
    measured = float((restored - fresh).norm() / fresh.norm())
    assert basis.heldout_error == pytest.approx(measured, rel=0.1)


def test_rank_limits_the_components() -> None:
    basis = calibrate([rotated(1024, DECAY)], rank=3, bits=4.0)
    assert len(basis.widths) == 3
    assert tuple(basis.components.shape) == (DIM, 3)
    assert len(basis.spectrum) == DIM


@pytest.mark.parametrize("width", [None, 1, 5, 12])
def test_round_trip_error_is_bounded_by_the_scales(basis: Basis, width: int | None) -> None:
    """Half a step for each coefficient, and all of the dropped ones."""
    x = basis.mean + 0.1 * (rotated(512, DECAY, seed=2) - basis.mean)
    q = basis.quantizer(width)
    restored, clamped = code(basis, x, width)
    assert clamped == 0
    centred = (x - basis.mean).double()
    inside = centred @ q.components.double() @ q.components.double().t()
    bound = (q.scale.double() / 2).norm() + (centred - inside).norm(dim=1)
    rounding = 64 * torch.finfo(torch.float32).eps * float(x.norm(dim=1).max())
    assert ((restored - x).double().norm(dim=1) <= bound + rounding).all()


def test_quantizer_is_centred_on_the_mean(basis: Basis) -> None:
    for width in (None, 6):
        q = basis.quantizer(width)
        codes, _ = project_quantize_ref(basis.mean[None], q.components, q.offset, q.inv_scale, q.levels)
        assert ((codes - q.levels / 2).abs() <= 0.51).all()
        assert q.widths == [width or w for w in basis.widths if w]
        assert q.levels.tolist() == [2**w - 1 for w in q.widths]


def test_quantizer_drops_components_without_bits(basis: Basis) -> None:
    sparse = replace(basis, widths=(0, *basis.widths[1:]))
    q = sparse.quantizer(8)
    assert q.components.shape[1] == sparse.rank == basis.rank - 1
    torch.testing.assert_close(q.components[:, 0], basis.components[:, 1], rtol=0, atol=0)


def test_quantizer_of_a_silent_component_restores_the_mean(basis: Basis) -> None:
    silent = replace(basis, std=torch.zeros_like(basis.std))
    restored, _ = code(silent, rotated(8, DECAY))
    torch.testing.assert_close(restored, basis.mean.expand(8, -1))


def test_operands_are_made_once(basis: Basis) -> None:
    assert basis.quantizer(8) is basis.quantizer(8)
    assert basis.quantizer() is basis.quantizer(None)
    assert basis.to("cpu") is basis


@pytest.mark.parametrize("width", [0, 13, -1])
def test_quantizer_refuses_other_widths(basis: Basis, width: int) -> None:
    with pytest.raises(BasisError, match="outside 1..12"):
        basis.quantizer(width)


def test_loading_minimizes_the_error_of_a_laplacian_source() -> None:
    x = np.linspace(0, 40, 400_001)
    density = np.exp(-(2**0.5) * x) / 2**0.5

    def error(limit: float, width: int) -> float:
        step = 2 * limit / (2**width - 1)
        restored = np.clip(np.floor((x + limit) / step + 0.5), 0, 2**width - 1) * step - limit
        return float((density * (x - restored) ** 2).sum())

    for width in range(1, 13):
        best = error(LOADING[width], width)
        assert best < error(LOADING[width] * 0.97, width)
        assert best < error(LOADING[width] * 1.03, width)


def test_result_does_not_depend_on_the_batch_split() -> None:
    """40960 rows: more held-out rows than are kept."""
    x = rotated(40960, DECAY[:8])
    whole = calibrate([x])
    cuts = [1, 2, 15, 16, 1000, 9000, 40000]
    split = calibrate(piece for piece in torch.tensor_split(x, cuts))
    shaped = calibrate([x[:20480].view(4, 5120, 8), x[20480:].view(20480, 1, 8)])
    for other in (split, shaped):
        assert other.widths == whole.widths
        assert other.samples == whole.samples
        assert other.heldout_error == pytest.approx(whole.heldout_error, rel=1e-5)
        for name in ("mean", "components", "std", "peak", "spectrum"):
            torch.testing.assert_close(getattr(other, name), getattr(whole, name), rtol=1e-6, atol=1e-7)


def test_calibration_is_deterministic() -> None:
    x = rotated(40960, DECAY[:8])
    assert calibrate([x]).digest == calibrate([x]).digest


def test_rows_that_are_not_finite_are_dropped_and_counted() -> None:
    x = rotated(1024, DECAY)
    dirty = torch.cat((x[:500], torch.full((3, DIM), torch.nan), x[500:]))
    dirty[501, 0] = torch.inf
    clean = calibrate([x])
    got = calibrate([dirty])
    assert got.dropped == 3
    assert replace(got, dropped=0).digest == clean.digest


def test_samples_are_not_modified_and_may_need_grad() -> None:
    x = rotated(1024, DECAY).requires_grad_()
    before = x.detach().clone()
    calibrate([x])
    assert torch.equal(x.detach(), before)
    assert x.grad is None


def test_too_few_rows_name_how_many_are_needed() -> None:
    x = rotated(4096, DECAY)
    with pytest.raises(BasisError, match="100 finite rows are too few: calibrate with at least 134$"):
        calibrate([x[:100]])
    with pytest.raises(BasisError, match="at least 134$"):
        calibrate([x[:133]])
    assert calibrate([x[:134]]).samples == int((~heldout_mask(134)).sum())
    with pytest.raises(BasisError, match="0 finite rows"):
        calibrate([])


@pytest.mark.parametrize("heldout", [0.01, 0.1, 0.25, 0.5])
@pytest.mark.parametrize("dim", [3, 32, 33, 48, 100, 201])
def test_the_named_number_of_rows_is_enough(dim: int, heldout: float) -> None:
    x = torch.randn(1024, dim)
    with pytest.raises(BasisError, match="0 finite rows"):
        calibrate([x[:0]], heldout=heldout)
    with pytest.raises(BasisError, match="too few") as caught:
        calibrate([x[:1]], heldout=heldout)
    needed = int(str(caught.value).split()[-1])
    assert calibrate([x[:needed]], heldout=heldout).samples >= 2 * dim


@pytest.mark.parametrize("length", [64, 100, 256, 2048])
def test_held_out_rows_cover_every_position_of_a_sequence(length: int) -> None:
    """A token that only occurs at the start of sequences still sets the peak."""
    x = rotated(16384, DECAY)
    x[::length] += 100.0
    assert calibrate([x], bits=12.0).peak.max() > 90 * DIM**0.5


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ([torch.ones(200, 8), torch.ones(200, 9)], {}, "9 dimensions after 8"),
        ([torch.ones(200, 8, dtype=torch.int32)], {}, "int32"),
        ([torch.tensor(1.0)], {}, "float tensors"),
        ([torch.ones(200, 8)], {}, "do not vary"),
        ([torch.randn(200, 8)], {"bits": 0.0}, "bits 0.0"),
        ([torch.randn(200, 8)], {"bits": 12.5}, "bits 12.5"),
        ([torch.randn(200, 8)], {"bits": 0.1}, "raise bits"),
        ([torch.randn(200, 8)], {"rank": 9}, "rank 9 is outside 1..8, the width of the samples"),
        ([torch.randn(100, 8)], {"rank": 9}, "rank 9 is outside 1..8, the width of the samples"),
        ([torch.randn(200, 8)], {"rank": 2.5}, "rank 2.5 is no whole number"),
        (5, {}, "samples is a int: pass an iterable of tensors"),
        ([torch.randn(200, 8)], {"heldout": 0.0}, "heldout 0.0"),
        ([torch.randn(200, 8)], {"heldout": 0.6}, "heldout 0.6"),
    ],
)
def test_bad_arguments(samples: list[Tensor], options: dict[str, float], message: str) -> None:
    with pytest.raises(BasisError, match=message) as caught:
        calibrate(samples, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_file_round_trip_is_exact(basis: Basis, tmp_path: Path) -> None:
    path = tmp_path / "layer.basis"
    basis.save(path)
    loaded = Basis.load(path)
    assert loaded.digest == basis.digest
    for field in fields(Basis):
        was, now = getattr(basis, field.name), getattr(loaded, field.name)
        assert torch.equal(was, now) if isinstance(was, Tensor) else was == now


def test_every_damaged_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "b"
    calibrate([rotated(256, DECAY[:4])]).save(path)
    data = path.read_bytes()
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(BasisError) as caught:
            Basis.load(path)
        assert "\n" not in str(caught.value)


def test_truncated_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "b"
    calibrate([rotated(256, DECAY[:4])]).save(path)
    data = path.read_bytes()
    for size in (0, 1, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(BasisError, match="not an intact basis file"):
            Basis.load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(BasisError):
        Basis.load(path)
    save_file({"mean": torch.zeros(3)}, str(path))
    with pytest.raises(BasisError, match="not a basis file"):
        Basis.load(path)
    with pytest.raises(FileNotFoundError):
        Basis.load(tmp_path / "absent")


def test_fields_that_do_not_fit_each_other(basis: Basis) -> None:
    rank = len(basis.widths)
    for changes, message in [
        ({"std": basis.std[1:]}, "'std'"),
        ({"components": basis.components.double()}, "'components' is torch.float64"),
        ({"peak": basis.peak * torch.nan}, "'peak' holds NaN"),
        ({"widths": (13,) * rank}, "'widths'"),
        ({"widths": (0,) * rank}, "at least one above 0"),
    ]:
        with pytest.raises(BasisError, match=message):
            replace(basis, **changes)  # type: ignore[arg-type]


def test_digest_covers_every_field(basis: Basis) -> None:
    digests = {basis.digest}
    for field in fields(Basis):
        value = getattr(basis, field.name)
        changed: Any
        if isinstance(value, Tensor):
            changed = value.clone()
            changed.view(-1)[-1] = torch.nextafter(changed.view(-1)[-1], torch.tensor(9.0))
        elif isinstance(value, tuple):
            changed = (*value[:-1], value[-1] + 1)
        else:
            changed = value + 1
        digests.add(replace(basis, **{field.name: changed}).digest)
    assert len(digests) == 1 + len(fields(Basis))


@pytest.mark.gpu
def test_device_copies_are_made_once(basis: Basis, cuda: torch.device) -> None:
    on_gpu = basis.to(cuda)
    assert on_gpu is basis.to("cuda")
    assert on_gpu.digest == basis.digest
    assert on_gpu.quantizer().components.is_cuda


@pytest.mark.gpu
def test_calibration_on_the_gpu_matches_the_cpu(cuda: torch.device) -> None:
    x = rotated(4096, DECAY)
    here, there = calibrate([x]), calibrate([x.to(cuda)])
    assert there.widths == here.widths
    torch.testing.assert_close(there.spectrum, here.spectrum)
    torch.testing.assert_close(there.components, here.components, rtol=1e-4, atol=1e-5)
