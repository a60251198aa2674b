"""Products with a factor for each row or column: the bits of PyTorch, or nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sidelane.kernels import multiply as multiply_module
from sidelane.kernels.multiply import FLOATS, multiply

FACTORS = {
    "of columns": lambda shape: (shape[-1],),
    "of columns, with dimensions of one": lambda shape: (*(1 for _ in shape[:-1]), shape[-1]),
    "of rows": lambda shape: (*shape[:-1], 1),
}
SHAPES = [(3, 7, 40), (5, 1030), (3, 4100), (2100, 2), (1, 1), (2, 1), (1, 3)]


def numbers(shape: tuple[int, ...], dtype: torch.dtype, seed: int, reach: float) -> Tensor:
    """Up to and down to 10^reach, with zeros of both signs, the least of them and infinities among them."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=random) * 10 ** ((torch.rand(shape, generator=random) * 2 - 1) * reach)
    special = torch.tensor([0.0, -0.0, 10**-reach, float("inf"), 1.0])
    where = torch.randint(0, 40, shape, generator=random)
    return torch.where(where < 5, special[where % 5], x).to(dtype)


def bits(x: Tensor) -> Tensor:
    """With one NaN for all."""
    return torch.where(x.isnan(), float("nan"), x).cpu().view(torch.uint8)


@pytest.mark.kernel
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # of NumPy, which interprets kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("by", FACTORS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bits_of_a_product(device: torch.device, monkeypatch, shape, by, dtype) -> None:
    launches = []
    kept = multiply_module.launch
    monkeypatch.setattr(multiply_module, "launch", lambda *a, **k: launches.append(a) or kept(*a, **k))
    reach = 42.0 if device.type == "cuda" else 18.0  # a CPU rounds subnormal bfloat16 to zero
    x = numbers(shape, dtype, 1, reach).to(device)
    factor = numbers(FACTORS[by](shape), dtype, 2, reach).to(device)
    for out in FLOATS:
        for a, b in ((x, factor), (factor, x)):
            got, want = multiply(a, b, out), torch.mul(a, b).to(out)
            assert got.shape == want.shape and got.dtype == out and got.is_contiguous()
            assert torch.equal(bits(got), bits(want))
    assert len(launches) == 6


OTHERS = {
    "not contiguous": lambda on: (torch.rand(4, 6, **on).t(), torch.rand(4, **on)),
    "a factor with gaps": lambda on: (torch.rand(6, 4, **on), torch.rand(8, **on)[::2]),
    "of equal shape": lambda on: (torch.rand(6, 4, **on), torch.rand(6, 4, **on)),
    "float64": lambda on: (torch.rand(6, 4, **on).double(), torch.rand(4, **on).double()),
    "of two dtypes": lambda on: (torch.rand(6, 4, **on), torch.rand(4, **on).bfloat16()),
    "integers": lambda on: (torch.arange(24, **on).view(6, 4), torch.arange(4, **on)),
    "an outer product": lambda on: (torch.rand(4, **on), torch.rand(3, 1, **on)),
    "without dimensions": lambda on: (torch.rand((), **on), torch.rand((), **on)),
    "of one dimension": lambda on: (torch.rand(4, **on), torch.rand(4, **on)),
    "negated": lambda on: (torch._neg_view(torch.rand(6, 4, **on)), torch.rand(4, **on)),
    "a negated factor": lambda on: (torch.rand(6, 4, **on), torch._neg_view(torch.rand(4, **on))),
    "empty": lambda on: (torch.rand(0, 4, **on), torch.rand(4, **on)),
}


@pytest.mark.kernel
@pytest.mark.parametrize("case", OTHERS)
def test_other_products_are_those_of_torch(device: torch.device, monkeypatch, case) -> None:
    a, b = OTHERS[case]({"device": device})
    monkeypatch.setattr(multiply_module, "launch", None)
    assert multiply(a, b, torch.float32) is None


def test_other_results_and_devices_are_left_to_torch() -> None:
    x, factor = torch.rand(6, 4), torch.rand(4)
    assert multiply(x, factor, torch.float64) is multiply(x, factor, torch.int32) is None
    assert multiply(x, factor, torch.float32) is None  # on a CPU, without the interpreter
