"""Test tiers.

Unmarked tests need no GPU. `kernel` tests run compiled where there is a GPU and in the Triton interpreter
elsewhere. `gpu` tests need a GPU and fail without one.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from torch.nn.attention import SDPBackend, sdpa_kernel

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel module is first imported

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start

settings.register_profile("any speed", deadline=None)
settings.load_profile("any speed")


def pytest_collection_finish() -> None:
    """What is imported by now stays: no collection of garbage has to look at it again."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture
def math_attention() -> Iterator[None]:
    """The one attention on a GPU whose backward repeats bit for bit."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def each_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """The default device is the CPU, and, as a `gpu` test, the GPU."""
    if request.param == "cpu":
        yield
        return
    with request.getfixturevalue("cuda"), sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    torch.manual_seed(0)
