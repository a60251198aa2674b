"""Compiles the Triton kernels for compute capability 9.0 through their launchers, on a machine without a GPU.

Prints one JSON object per kernel: its name, what its PTX uses, and its size. Run as a
program of its own: the interpreter must be off.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from sidelane.kernels import _launch, bits, exact, groups, surface
from sidelane.kernels.reference import EXACT_FIELDS
from sidelane.layout import CHANNEL_TILES, NV12_SPLIT12, P010, TOKEN_ROWS, plan_surface


class NoDevice:
    """What Triton asks a driver for before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
    ptx = kernel.asm["ptx"]
    row = {
        "kernel": self.fn.__name__,
        "cubin": len(kernel.asm["cubin"]),
        "wgmma": "wgmma.mma_async" in ptx,
        "fma": "fma.rn" in ptx,
    }
    print(json.dumps(row))


driver.set_active(NoDevice())
run = JITFunction.run
JITFunction.run = compile_only

with _launch.interpret():  # CPU tensors go to the kernels
    x = torch.randn(8192)
    for dtype in (torch.bfloat16, torch.float32):
        flat = x.to(dtype)
        for symmetric, seed in ((False, None), (True, 1)):
            groups.group_quantize_pack(flat, 4, 64, symmetric=symmetric, seed=seed)
            codes = groups.empty_group_codes(flat, 4, 64, symmetric=symmetric)
            groups.group_unpack_dequantize_into(codes, flat)
    planes = bits.pack_bits(torch.zeros((256, 64), dtype=torch.int16), [4] * 64)
    bits.unpack_bits(planes, [4] * 64, 256)
    for dtype, fields in EXACT_FIELDS.items():
        flat = x.to(dtype)
        exact.survey_into(flat, torch.empty((4, 256 + fields.planes), dtype=torch.int32))
        exact_codes = exact.empty_exact_codes(fields, flat.numel(), 8, 0, torch.device("cpu"))
        exact.exact_encode_into(flat, torch.zeros(256, dtype=torch.uint8), exact_codes)
        exact.exact_decode_into(exact_codes, flat)
    rows = torch.randn(512, 512, dtype=torch.bfloat16)
    components = torch.randn(512, 256, dtype=torch.bfloat16)
    channel, bias = torch.ones(256), torch.ones(512)
    for layout_format, mapping in ((P010, TOKEN_ROWS), (NV12_SPLIT12, CHANNEL_TILES)):
        layout = plan_surface(layout_format, mapping, 512, 256)
        planes = torch.zeros(layout.shape, dtype=torch.uint8)
        surface.project_quantize_pack(rows, components, channel, channel, channel, planes, layout)
        surface.unpack_dequantize_project(planes, layout, components, channel, bias, torch.bfloat16)
