"""Compiles the Triton kernels for compute capability 9.0 through their launchers, on a machine without a GPU.

Prints one JSON object per kernel: its name, what its PTX uses, and its size. Run as a
program of its own: the interpreter must be off.
"""

from __future__ import annotations

import json
import re
import subprocess
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from sidelane.kernels import _launch, bits, exact, groups, surface
from sidelane.kernels.multiply import multiply
from sidelane.kernels.reference import EXACT_FIELDS, ExactCodes, exact_sizes
from sidelane.layout import (
    CHANNEL_ROWS,
    CHANNEL_TILES,
    NV12,
    NV12_SPLIT12,
    P010,
    TOKEN_ROWS,
    SurfaceLayout,
    plan_surface,
)


class NoDevice:
    """What Triton asks a driver for before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def stack_bytes(cubin: bytes) -> int:
    """Local memory of a thread: registers that the compiler spilled."""
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(n) for n in re.findall(r"STACK:(\d+)", usage))


def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    ptx = kernel.asm["ptx"]
    row = {
        "kernel": self.fn.__name__,
        "ragged": ragged,
        "cubin": len(kernel.asm["cubin"]),
        "wgmma": "wgmma.mma_async" in ptx,
        "fma": "fma.rn" in ptx,
        "wide": "ld.global.v4.b32" in ptx and ("st.global.v4.b32" in ptx or "st.global.v2.b32" in ptx),
        "descriptors": "cp.async.bulk.tensor" in ptx,
        "shared": kernel.metadata.shared,
        "stack": stack_bytes(kernel.asm["cubin"]),
    }
    print(json.dumps(row))


driver.set_active(NoDevice())
run = JITFunction.run
JITFunction.run = compile_only
ragged = False

with _launch.interpret():  # CPU tensors go to the kernels
    x = torch.randn(8192)
    for dtype in (torch.bfloat16, torch.float32):
        flat = x.to(dtype)
        for symmetric, seed in ((False, None), (True, 1)):
            codes = groups.group_quantize_pack(flat, 4, 64, symmetric=symmetric, seed=seed)
            groups.group_unpack_dequantize_into(codes, flat)
    rows, weight = torch.randn(8, 2048), torch.randn(2048)
    multiply(rows, rows[:, :1].contiguous(), torch.bfloat16)
    multiply(rows.bfloat16(), weight.bfloat16(), torch.bfloat16)
    planes = bits.pack_bits(torch.zeros((256, 64), dtype=torch.int16), [4] * 64)
    bits.unpack_bits(planes, [4] * 64, 256)
    for dtype in EXACT_FIELDS:
        flat = x.to(dtype)
        sizes = exact_sizes(dtype, flat.numel(), 0, 8)
        buffer = torch.empty(_launch.span(sizes), dtype=torch.uint8)
        exact.exact_encode_into(flat, buffer, 8)
        exact.exact_encode_late(flat, torch.zeros(2, dtype=torch.int32))
        exact.exact_decode_into(ExactCodes.of(_launch.cut(buffer, sizes), 0, flat.numel()), flat)
    # Rows of an odd pitch that begin anywhere: no two samples can be moved together.
    odd = SurfaceLayout(NV12_SPLIT12, TOKEN_ROWS, 70, 72, width=46, height=30, frames=8, pitch=53)
    bf16, fp32 = torch.bfloat16, torch.float32
    for layout, dtype, components_dtype in (
        (odd, bf16, bf16),
        (plan_surface(P010, TOKEN_ROWS, 16384, 1024), bf16, bf16),
        (plan_surface(P010, CHANNEL_ROWS, 16384, 512), bf16, bf16),
        (plan_surface(NV12_SPLIT12, CHANNEL_TILES, 16384, 512), bf16, bf16),
        (plan_surface(NV12, CHANNEL_ROWS, 16384, 64), bf16, bf16),
        (plan_surface(NV12, CHANNEL_ROWS, 512, 256), bf16, bf16),
        (plan_surface(P010, CHANNEL_ROWS, 16384, 512), bf16, fp32),
        (plan_surface(P010, CHANNEL_ROWS, 16384, 512), fp32, fp32),
        (plan_surface(P010, TOKEN_ROWS, 16384, 64), fp32, fp32),
    ):
        ragged = layout is odd
        planes = torch.zeros(layout.shape, dtype=torch.uint8)
        rows = torch.zeros((layout.tokens, 512), dtype=dtype)
        components = torch.zeros((512, layout.channels), dtype=components_dtype)
        channel, bias = torch.ones(layout.channels), torch.ones(512)
        for basis in (components, None) if layout.channels == 512 else (components,):
            surface.project_quantize_pack(rows, basis, channel, channel, channel, planes, layout)
            surface.unpack_dequantize_project(planes, layout, basis, channel, bias, dtype)
        surface.weigh_components(components, channel, bias, layout.format, dtype)
