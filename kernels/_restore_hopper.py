"""The GEMM of _restore.py for compute capability 9.0, with a role for every warp.

In Gluon, whose interface changes between versions of Triton: `_restore` names those this was written for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra import cuda
from triton.runtime.driver import driver

from sidelane.kernels._launch import cdiv
from sidelane.kernels._tiles import interpreted, programs, tile_of

TOKENS = gl.constexpr(256)  # of a tile
FEATURES = gl.constexpr(128)  # of a tile, half of them for each group of four warps
HALF = gl.constexpr(64)
STEP = gl.constexpr(32)  # channels of a stage
STAGES = gl.constexpr(6)
BAND = gl.constexpr(4)  # rows of tiles that go through the features together: of 4096, what 128 programs do
MIN_TILES = 256
TYPES = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16}


@gluon.jit  # type: ignore[untyped-decorator]
def _load(  # type: ignore[no-untyped-def]
    centered,
    weights,
    centered_buffers,
    weight_buffers,
    full,
    empty,
    tiles_t,
    tiles_d,
    steps,
    TOKEN_ROWS: gl.constexpr,
):
    """Fill the stages, each as soon as both groups have multiplied what it held."""
    cuda.gdc_wait()  # for the kernel that writes the operands
    turn = 0
    for tile in range(gl.program_id(0), tiles_t * tiles_d, gl.num_programs(0)):
        tile_t, tile_d = tile_of(tile, tiles_t, tiles_d, BAND)
        t0 = tile_t * TOKENS
        d0 = tile_d * FEATURES
        for step in range(steps):
            stage = turn % STAGES
            k0 = step * STEP
            ready = full.index(stage)
            mbarrier.wait(empty.index(stage), turn // STAGES & 1 ^ 1)
            mbarrier.expect(ready, (TOKENS + FEATURES) * STEP * 2)
            if TOKEN_ROWS:
                tma.async_copy_global_to_shared(centered, [t0, k0], ready, centered_buffers.index(stage))
            else:
                tma.async_copy_global_to_shared(centered, [k0, t0], ready, centered_buffers.index(stage))
            for half in gl.static_range(2):
                buffer = weight_buffers.index(2 * stage + half)
                tma.async_copy_global_to_shared(weights, [d0 + half * HALF, k0], ready, buffer)
            turn += 1


@gluon.jit  # type: ignore[untyped-decorator]
def _multiply(  # type: ignore[no-untyped-def]
    unit_ptr,
    constant_ptr,
    out,
    centered_buffers,
    weight_buffers,
    out_buffers,
    full,
    empty,
    stored,
    tiles_t,
    tiles_d,
    steps,
    depth,
    TOKEN_ROWS: gl.constexpr,
    WHICH: gl.constexpr,
):
    """Multiply and store half of the features of every tile.

    The groups store in turns, so that one multiplies meanwhile. Features are the rows of the product: what a
    thread holds belongs to two of them, whose unit and constant stay in registers.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TOKENS, 16])
    cuda.gdc_wait()
    turn = 0
    for tile in range(gl.program_id(0), tiles_t * tiles_d, gl.num_programs(0)):
        tile_t, tile_d = tile_of(tile, tiles_t, tiles_d, BAND)
        d0 = tile_d * FEATURES + WHICH * HALF
        d = d0 + gl.arange(0, HALF, gl.SliceLayout(1, layout))
        unit = gl.load(unit_ptr + d, mask=d < depth, other=0.0)
        constant = gl.load(constant_ptr + d, mask=d < depth, other=0.0)
        x = gl.zeros((HALF, TOKENS), gl.float32, layout)
        for step in range(steps):
            stage = turn % STAGES
            mbarrier.wait(full.index(stage), turn // STAGES & 1)
            codes = centered_buffers.index(stage)
            if TOKEN_ROWS:
                codes = codes.permute((1, 0))
            w = weight_buffers.index(2 * stage + WHICH)
            product = warpgroup_mma(w, codes, x, use_acc=step > 0, is_async=True)
            x = warpgroup_mma_wait(1, deps=[product])
            mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES), pred=step > 0)
            turn += 1
        x = warpgroup_mma_wait(0, deps=[x])
        mbarrier.arrive(empty.index((turn + STAGES - 1) % STAGES))
        # Wait until the other group has stored its half: of this tile, or of the one before.
        mbarrier.wait(stored.index(1 - WHICH), turn // steps - WHICH & 1)
        restored = gl.fma(x, unit[:, None], constant[:, None])
        tma.store_wait(0)
        buffer = out_buffers.index(WHICH)
        buffer.store(restored.to(out.dtype).permute((1, 0)))
        fence_async_shared()
        tma.async_copy_shared_to_global(out, [tile_t * TOKENS, d0], buffer)
        mbarrier.arrive(stored.index(WHICH))
    tma.store_wait(0)


@gluon.jit  # type: ignore[untyped-decorator]
def restore_hopper_kernel(  # type: ignore[no-untyped-def]
    centered,
    weights,
    unit_ptr,
    constant_ptr,
    out,
    tokens,
    depth,
    channels,
    TOKEN_ROWS: gl.constexpr,
):
    """`restore_kernel` with PARTS = 1: one warp loads, two groups of four multiply and store."""
    shape: gl.constexpr = centered.block_shape
    centered_buffers = gl.allocate_shared_memory(centered.dtype, [STAGES] + shape, centered.layout)
    weight_buffers = gl.allocate_shared_memory(weights.dtype, [2 * STAGES, HALF, STEP], weights.layout)
    out_buffers = gl.allocate_shared_memory(out.dtype, [2, TOKENS, HALF], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    stored = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    for half in gl.static_range(2):
        mbarrier.init(stored.index(half), count=1)
    fence_async_shared()
    tiles_t = gl.cdiv(tokens, TOKENS)
    tiles_d = gl.cdiv(depth, FEATURES)
    steps = gl.cdiv(channels, STEP)
    # fmt: off
    gl.warp_specialize([
        (_multiply, (unit_ptr, constant_ptr, out, centered_buffers, weight_buffers, out_buffers, full, empty,
                     stored, tiles_t, tiles_d, steps, depth, TOKEN_ROWS, 0)),
        (_multiply, (unit_ptr, constant_ptr, out, centered_buffers, weight_buffers, out_buffers, full, empty,
                     stored, tiles_t, tiles_d, steps, depth, TOKEN_ROWS, 1)),
        (_load, (centered, weights, centered_buffers, weight_buffers, full, empty, tiles_t, tiles_d, steps,
                 TOKEN_ROWS)),
    ], [4, 1], [216, 24])
    # fmt: on


def runs_here(out: Tensor, parts: int) -> bool:
    """Whether `restore_hopper` can do this product, and has enough tiles to be the faster one."""
    return (
        parts == 1
        and out.dtype in TYPES
        and out.shape[1] % 8 == 0
        and _tiles(out) >= MIN_TILES
        and not interpreted()
        and driver.active.get_current_target().arch == 90
    )


def restore_hopper(
    centered: Tensor, weights: Tensor, unit: Tensor, constant: Tensor, out: Tensor, sms: int | None
) -> None:
    tokens, depth = out.shape
    rows = centered.stride(1) == 1
    tiles = _tiles(out)
    rounds = cdiv(tiles, programs(tiles, 1, sms, out.device))
    restore_hopper_kernel[(cdiv(tiles, rounds),)](
        _descriptor(
            centered if rows else centered.t(),
            (TOKENS.value, STEP.value) if rows else (STEP.value, TOKENS.value),
        ),
        _descriptor(weights, (HALF.value, STEP.value)),
        unit,
        constant,
        _descriptor(out, (TOKENS.value, HALF.value)),
        tokens,
        depth,
        weights.shape[1],
        TOKEN_ROWS=rows,
        launch_pdl=True,
        num_warps=4,
    )


def _tiles(out: Tensor) -> int:
    return cdiv(out.shape[0], TOKENS.value) * cdiv(out.shape[1], FEATURES.value)


def _descriptor(matrix: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    layout = _layout(block, matrix.dtype)
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(block), layout)


@lru_cache
def _layout(block: tuple[int, int], dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for(list(block), TYPES[dtype])
