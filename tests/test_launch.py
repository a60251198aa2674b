"""Launches that go to a kept kernel are those that Triton would give the same kernel."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from triton import knobs
from triton.backends.compiler import BaseBackend
from triton.runtime.jit import JITFunction, create_function_from_signature

from sidelane.kernels import _launch
from sidelane.kernels._launch import Part, cut, launch, span


class Kernel:
    """Stands for a JITFunction: says when it is asked to find a kernel, and what is launched."""

    def __init__(self):
        self.found, self.launched = [], []
        self.past_hooks = 0

    def __getitem__(self, grid):
        def run(*args, **options):
            self.found.append((grid, args, options))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel
        self.function, self.packed_metadata = "function", "metadata"

    def __getitem__(self, grid):
        return lambda *args: self.kernel.launched.append((grid, args))

    def run(self, x, y, z, stream, function, metadata, told, enter, leave, *args):
        assert (stream, function, metadata) == ("stream", "function", "metadata")
        assert told is enter is leave is None
        self.kernel.launched.append(((x, y, z), args))
        self.kernel.past_hooks += 1


def tensor(address=1024, dtype=torch.float32, cuda=True):
    return SimpleNamespace(
        data_ptr=lambda: address, dtype=dtype, is_cuda=cuda, device=SimpleNamespace(index=0)
    )


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(_launch, "_compiled", {})
    monkeypatch.setattr(_launch, "current_device", lambda: 0)
    monkeypatch.setattr(_launch, "_stream", lambda device: "stream")
    return Kernel()


def test_the_second_launch_of_a_kind_goes_straight_to_the_kernel(kernel):
    x, y = tensor(), tensor(2048, torch.uint8)
    launch(kernel, 3, (x, y), (48, 7), (4, True), num_warps=1)
    assert kernel.found == [((3,), (x, y, 48, 7, 4, True), {"num_warps": 1})] and not kernel.launched
    launch(kernel, 9, (tensor(4096), y), (160, 8), (4, True), num_warps=1)
    assert len(kernel.found) == 1
    assert kernel.launched == [((9, 1, 1), (4096, 2048, 160, 8, 4, True))]


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("how", ["added", "in place of the chain"])
def test_hooks_of_triton_are_told_of_launches(kernel, monkeypatch, hook, how):
    def tell(metadata):
        """Stands for a profiler."""

    launch(kernel, 3, (tensor(),), (), ())
    again = launch(kernel, 3, (tensor(),), (), ())
    assert kernel.past_hooks == 1
    if how == "added":
        getattr(knobs.runtime, hook).add(tell)
    else:
        monkeypatch.setattr(knobs.runtime, hook, tell)
    try:
        again(1024)
        assert kernel.launched == 2 * [((3, 1, 1), (1024,))] and kernel.past_hooks == 1
    finally:
        if how == "added":
            getattr(knobs.runtime, hook).remove(tell)


def test_parts_of_a_buffer_stand_for_tensors(kernel):
    x, buffer = tensor(), torch.arange(64, dtype=torch.uint8)
    launch(kernel, 1, (x, Part(buffer, 16)), (), ())
    (_, (first, part), _) = kernel.found[0]
    assert first is x and torch.equal(part, buffer[16:])
    launch(kernel, 1, (tensor(4096), Part(buffer, 32)), (), ())
    assert len(kernel.found) == 1 and kernel.launched == [((1, 1, 1), (4096, buffer.data_ptr() + 32))]


@pytest.mark.parametrize(
    "other",
    [
        {"x": tensor(dtype=torch.float16)},
        {"n": 1},
        {"n": 33},
        {"n": 2**31},
        {"constants": (5,)},
        {"warps": 2},
    ],
)
def test_what_triton_specializes_on_is_another_kind(kernel, other):
    for what in ({}, other, {}, other):
        what = {"x": tensor(), "n": 32, "constants": (4,), "warps": 1} | what
        launch(kernel, 1, (what["x"],), (what["n"],), what["constants"], num_warps=what["warps"])
    assert len(kernel.found) == 2 and len(kernel.launched) == 2


def plain(x_ptr, n):
    """A kernel that is never compiled."""


def specialization(*args):
    """What Triton compiles for."""
    function = JITFunction(plain)
    return create_function_from_signature(function.signature, function.params, BaseBackend)(*args)[1]


NUMBERS = [0, 1, -1, 2, 15, 16, 17, -16, 160, 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1]


def test_numbers_share_a_kernel_only_where_triton_would_let_them(kernel):
    x = torch.zeros(1)
    for a, b in product([*NUMBERS, -(2**31) - 16, 2**35, 2**35 + 1, 2**63 - 1], repeat=2):
        _launch._compiled.clear()
        kernel.launched.clear()
        for n in (a, b):
            launch(kernel, 1, (tensor(),), (n,), ())
        if kernel.launched:
            assert specialization(x, a) == specialization(x, b), (a, b)


def test_tensors_share_a_kernel_only_where_triton_would_let_them(kernel):
    dtypes = (
        torch.uint8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bfloat16,
        torch.float16,
        torch.float32,
    )
    memory = torch.zeros(64, dtype=torch.uint8)
    memory = memory[-memory.data_ptr() % 16 :]
    tensors = [memory[at : at + 16].view(dtype) for at in (0, 8, 16, 24) for dtype in dtypes]
    for a, b in product([*tensors, memory[8:8]], repeat=2):
        _launch._compiled.clear()
        kernel.launched.clear()
        for x in (a, b):
            launch(kernel, 1, (tensor(x.data_ptr(), x.dtype),), (7,), ())
        if kernel.launched:
            assert specialization(a, 7) == specialization(b, 7), (a, b)


@pytest.mark.parametrize("x", [tensor(1032), tensor(cuda=False)])
def test_odd_addresses_and_other_devices_are_left_to_triton(kernel, x):
    for _ in range(2):
        launch(kernel, 1, (tensor(cuda=x.is_cuda), x), (32,), ())
    assert len(kernel.found) == 2 and not kernel.launched


@pytest.mark.parametrize("sizes", [(5,), (256, 0, 3), (0, 0), (1, 512, 255)])
def test_cut_leaves_out_what_lies_between(sizes):
    buffer = torch.arange(span(sizes) + 9, dtype=torch.int16).to(torch.uint8)
    parts = cut(buffer, sizes)
    assert [part.numel() for part in parts] == list(sizes)
    assert all(part.storage_offset() % 256 == 0 for part in parts)
    assert span(sizes) == sum(-(-size // 256) * 256 for size in sizes)
