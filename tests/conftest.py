"""Test tiers.

Unmarked tests need no GPU. `kernel` tests run compiled where there is a GPU and in the Triton interpreter
elsewhere. `gpu` tests need a GPU and fail without one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel module is first imported


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where kernel tests run: the GPU, or CPU tensors with launchers switched to the Triton interpreter."""
    if torch.cuda.is_available():
        yield torch.device("cuda")
        return
    from sidelane.kernels import _launch

    with _launch.interpret():
        yield torch.device("cpu")


@pytest.fixture
def cuda() -> torch.device:
    """The GPU of a `gpu` test; the test fails where there is none."""
    if not torch.cuda.is_available():
        pytest.fail("this test needs a CUDA device; leave it out with -m 'not gpu'")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
