"""The fused surface kernels against their reference.

Inputs on a dyadic grid (small integers times powers of two) make every float32 sum exact in any order, so
that codes, clamp counts and restored floats must be equal; on other inputs results stay within float32
error bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from guarded import SENTINEL, Guarded
from sidelane.errors import LaneError
from sidelane.kernels import reference
from sidelane.kernels._restore_hopper import runs_here
from sidelane.kernels.surface import (
    dequantize_project,
    project_quantize,
    project_quantize_pack,
    unpack_dequantize_project,
    weigh_components,
)
from sidelane.layout import (
    CHANNEL_ROWS,
    CHANNEL_TILES,
    FORMATS,
    MAPPINGS,
    NV12,
    NV12_SPLIT12,
    P010,
    TOKEN_ROWS,
    SurfaceFormat,
    SurfaceLayout,
    plan_surface,
)

ULP = 2.0**-23  # of a float32 sum, with the truncation that tensor cores may use
# T, D, K; without components where K is None
SHAPES = [(70, 33, 67), (65, 16, 1), (1, 20, 66), (5, 1, 3), (1, 1, 1), (67, 35, None)]


def small_layout(fmt: SurfaceFormat, mapping: str, tokens: int, channels: int) -> SurfaceLayout:
    """Rows that start anywhere, a margin beside the tiles, pitch padding, several frames, the last unused."""
    tile_w = 10 if mapping == CHANNEL_TILES else 0
    pitch = (46 + 7) * fmt.itemsize
    roomy = SurfaceLayout(fmt, mapping, tokens, channels, 46, 30, 10**6, pitch, tile_w)
    return replace(roomy, frames=-(-roomy.positions // (fmt.code_rows(30) * 46)) + 1)


def dyadic(shape: tuple[int, ...], unit: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randint(-8, 9, shape) * unit).to(dtype)


@dataclass
class Forward:
    """Arguments of a projection."""

    x: Tensor
    components: Tensor | None
    offset: Tensor
    inv_scale: Tensor
    levels: Tensor

    @classmethod
    def make(
        cls,
        tokens: int,
        depth: int,
        channels: int | None,
        bits: int,
        dtype: torch.dtype = torch.float32,
        components_dtype: torch.dtype = torch.float32,
    ) -> Forward:
        """Random, on the dyadic grid, without components if `channels` is None."""
        k = depth if channels is None else channels
        components = None if channels is None else dyadic((depth, channels), 1 / 8, components_dtype)
        inv_scale = 2.0 ** (bits - 4 + torch.randint(-1, 2, (k,)).float())
        levels = 2.0**bits - 1 - torch.randint(0, 2, (k,)).float()
        # In half of the channels zero clamps: it stands beyond the edges of x, where nothing must be counted.
        offset = dyadic((k,), 1 / 32) + torch.where(torch.arange(k) % 2 == 0, 0.5, -3.0)
        x = dyadic((tokens, depth), 1.0 if components is None else 1 / 4, dtype)
        return cls(x, components, offset, inv_scale, levels)

    def to(self, device: torch.device) -> tuple[Any, ...]:
        components = None if self.components is None else self.components.to(device)
        vectors = (v.to(device) for v in (self.offset, self.inv_scale, self.levels))
        return self.x.to(device), components, *vectors

    def scaled(self) -> Tensor:
        """(x @ components - offset) * inv_scale, float64 [T, K]."""
        z = self.x.double() if self.components is None else self.x.double() @ self.components.double()
        return (z - self.offset.double()) * self.inv_scale.double()

    def codes(self) -> tuple[Tensor, int]:
        """Codes and clamp count from exact arithmetic."""
        q = torch.floor(self.scaled() + 0.5)
        codes = torch.minimum(q.clamp_min(0), self.levels.double())
        return codes.to(torch.int16), int((codes != q).sum())


def check_pack(args: Forward, layout: SurfaceLayout, device: torch.device) -> None:
    guarded = Guarded(device)
    surface = guarded.empty(layout.shape, torch.uint8)
    clamped = project_quantize_pack(*args.to(device), surface, layout)
    codes, changed = args.codes()
    expected = torch.zeros(layout.shape, dtype=torch.uint8)
    reference.pack_surface_ref(codes, expected, layout)
    samples = layout.width * layout.format.itemsize
    assert torch.equal(surface[:, :samples].cpu(), expected[:, :samples])
    assert (surface[:, samples:] == SENTINEL).all()
    guarded.check()
    assert clamped.dtype == torch.int32 and clamped.tolist() == [changed]


@pytest.mark.kernel
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_pack(
    device: torch.device, fmt: SurfaceFormat, mapping: str, shape: tuple[int, int, int | None]
) -> None:
    tokens, depth, channels = shape
    layout = small_layout(fmt, mapping, tokens, channels or depth)
    check_pack(Forward.make(tokens, depth, channels, fmt.bits), layout, device)


@pytest.mark.kernel
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_pack_model_shape(device: torch.device, mapping: str) -> None:
    """Tokens and width of a small transformer, on a planned surface."""
    check_pack(
        Forward.make(256, 384, 96, 10, torch.bfloat16, torch.bfloat16),
        plan_surface(P010, mapping, 256, 96, pitch_alignment=512),
        device,
    )


@pytest.mark.kernel
@pytest.mark.parametrize("components_dtype", [torch.bfloat16, torch.float16, torch.float32, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_plain_codes(device: torch.device, dtype: torch.dtype, components_dtype: torch.dtype | None) -> None:
    channels = None if components_dtype is None else 67
    args = Forward.make(70, 45, channels, 8, dtype, components_dtype or torch.float32)
    codes, clamped = project_quantize(*args.to(device))
    expected, changed = args.codes()
    assert (expected == 0).any() and (expected.float() == args.levels).any()
    assert codes.dtype == torch.int16 and codes.is_contiguous()
    assert torch.equal(codes.cpu(), expected)
    assert clamped.tolist() == [changed] != [0]


@pytest.mark.kernel
@pytest.mark.parametrize(
    "spread",
    [
        lambda m: m.repeat_interleave(2, 0)[::2],
        lambda m: m.repeat_interleave(3, 1)[:, ::3],
        lambda m: m.t().contiguous().t(),
    ],
    ids=["rows", "columns", "transposed"],
)
def test_strided_inputs(device: torch.device, spread: Callable[[Tensor], Tensor]) -> None:
    args = Forward.make(70, 33, 5, 8)
    x, components, *vectors = args.to(device)
    codes, _ = project_quantize(spread(x), spread(components), *vectors)
    assert torch.equal(codes.cpu(), args.codes()[0])
    restored = dequantize_project(
        codes, spread(components), vectors[1], torch.zeros(33, device=device), x.dtype
    )
    exact = restore(args.codes()[0], args.components, args.inv_scale, torch.zeros(33))
    assert torch.equal(restored.cpu().double(), exact)


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("dtype", "components_dtype", "dropped"),
    [
        (torch.float32, torch.float32, 2.0**-15),
        (torch.bfloat16, torch.float32, 2.0**-15),
        (torch.bfloat16, torch.bfloat16, 0.0),
        (torch.float16, torch.float16, 0.0),
    ],
    ids=["fp32", "mixed", "bf16", "fp16"],
)
def test_pack_rounds_only_near_boundaries(
    device: torch.device, dtype: torch.dtype, components_dtype: torch.dtype, dropped: float
) -> None:
    """On general floats a code may differ from exact arithmetic by one step, and only where the exact value
    lies within the error of a rounding boundary.

    A sum of D products errs by at most D * ULP * sum |x c| (Higham, Accuracy and Stability of Numerical
    Algorithms, section 3.1); the subtraction, the product and the addition of 0.5 add an ULP each. Of float32
    operands two bfloat16 parts are multiplied, but not the lower ones with each other: that drops 2^-17 of
    each operand and 2^-16 of their product.
    """
    tokens, depth, channels = 70, 40, 67
    args = Forward(
        torch.randn(tokens, depth).to(dtype),
        (torch.randn(depth, channels) / depth**0.5).to(components_dtype),
        torch.rand(channels) - 3.5,
        torch.full((channels,), 37.3),
        torch.full((channels,), 255.0),
    )
    codes, clamped = project_quantize(*args.to(device))
    exact = args.scaled()
    products = args.x.double().abs() @ args.components.double().abs()
    bound = (ULP * depth + dropped) * products * args.inv_scale + 3 * ULP * (exact.abs() + 1)
    edge = exact + 0.5
    near = (edge - edge.round()).abs() <= bound
    assert near.float().mean() < 0.02
    expected, changed = args.codes()
    difference = (codes.cpu().int() - expected.int()).abs()
    assert difference.max() <= 1 and not difference[~near].any()
    assert abs(clamped.item() - changed) <= near.sum()


def restoration(depth: int, channels: int | None) -> tuple[Tensor | None, Tensor, Tensor]:
    """Components [D, K] or None, scale [K], bias [D] on the dyadic grid: 12-bit codes sum to 23 bits."""
    components = None if channels is None else dyadic((depth, channels), 1 / 8)
    return components, 2.0 ** -torch.randint(3, 5, (channels or depth,)).float(), dyadic((depth,), 1 / 2)


def restore(codes: Tensor, components: Tensor | None, scale: Tensor, bias: Tensor) -> Tensor:
    """(codes * scale) @ components^T + bias, float64."""
    z = codes.double() * scale.double()
    return (z if components is None else z @ components.double().t()) + bias.double()


@pytest.mark.kernel
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_unpack(
    device: torch.device, fmt: SurfaceFormat, mapping: str, shape: tuple[int, int, int | None]
) -> None:
    """From a surface of random bytes: unused samples, pitch padding and bits below the code hold noise."""
    tokens, depth, channels = shape
    layout = small_layout(fmt, mapping, tokens, channels or depth)
    surface = torch.randint(0, 256, layout.shape, dtype=torch.uint8)
    components, scale, bias = restoration(depth, channels)
    on = [t if t is None else t.to(device) for t in (components, scale, bias)]
    out = unpack_dequantize_project(surface.to(device), layout, *on, torch.float32)
    codes = reference.unpack_surface_ref(surface, layout)
    assert out.shape == (tokens, depth) and out.is_contiguous()
    assert torch.equal(out.cpu().double(), restore(codes, components, scale, bias))


@pytest.mark.kernel
@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_restored_dtype(device: torch.device, dtype: torch.dtype, project: bool) -> None:
    """Values of 8 bits, which every dtype holds: one signed code per row of components."""
    codes = torch.randint(0, 64, (70, 35), dtype=torch.int16)
    components, scale, bias = restoration(67, 35) if project else restoration(35, None)
    if components is not None:
        signs = torch.randint(0, 2, (67, 1)).float() * 2 - 1
        components = torch.zeros(67, 35).scatter_(1, torch.randint(0, 35, (67, 1)), signs)
    moved = None if components is None else components.to(device, dtype)
    out = dequantize_project(codes.to(device), moved, scale.to(device), bias.to(device), dtype)
    assert out.dtype == dtype
    assert torch.equal(out.cpu().double(), restore(codes, components, scale, bias))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_restored_dtype_rounds_to_nearest_even(cuda: torch.device, dtype: torch.dtype) -> None:
    """Not a `kernel` test: the interpreter truncates to bfloat16."""
    codes = torch.randint(0, 4096, (70, 45), dtype=torch.int16)
    components, scale, bias = restoration(67, 45)
    scale /= 16  # within the range of float16
    on = [t.to(cuda) for t in (codes, components, scale, bias)]
    exact = restore(codes, components, scale, bias)
    assert torch.equal(dequantize_project(*on, dtype).cpu(), exact.float().to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("mapping", [CHANNEL_ROWS, TOKEN_ROWS])
@pytest.mark.parametrize(("channels", "dtype"), [(200, torch.float16), (840, torch.bfloat16)])
@pytest.mark.parametrize("sms", [None, 7])
def test_many_tiles_of_halves(
    cuda: torch.device, sms: int | None, channels: int, dtype: torch.dtype, mapping: str
) -> None:
    """The product that has a role for every warp, which small ones do not reach, with ragged sides."""
    tokens, depth = 4100, 2184
    assert runs_here(torch.empty(tokens, depth, dtype=dtype, device=cuda), parts=1) == (
        torch.cuda.get_device_capability() == (9, 0)
    )
    layout = plan_surface(P010, mapping, tokens, channels)
    surface = torch.randint(0, 256, layout.shape, dtype=torch.uint8)
    components, scale, bias = restoration(depth, channels)
    scale /= 16  # within the range of float16
    on = [t.to(cuda) for t in (components, scale, bias)]
    out = unpack_dequantize_project(surface.to(cuda), layout, *on, dtype, sms=sms)
    codes = reference.unpack_surface_ref(surface, layout).to(cuda)
    assert torch.equal(out, restore(codes, *on).float().to(dtype))


@pytest.mark.kernel
@pytest.mark.parametrize("channels", [45, 130])
@pytest.mark.parametrize("components_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [3, 12])
def test_restored_floats_are_precise(
    device: torch.device, bits: int, components_dtype: torch.dtype, channels: int
) -> None:
    """float32 results drop at most 2^-22 of each product of a centered code and a weight; sums err as above.

    The middle of the codes is 2048 unless their levels are given; what it takes from the products comes back
    with the bias.
    """
    levels = torch.full((channels,), 2.0**bits - 1)
    codes = torch.randint(0, 2**bits, (70, channels), dtype=torch.int16)
    components, bias = torch.randn(67, channels).to(components_dtype), torch.randn(67)
    scale = torch.exp(torch.randn(channels))
    on = [t.to(device) for t in (codes, components, scale, bias)]
    exact = restore(codes, components, scale, bias)
    for given, middle in ((None, 2048), (levels, 2 ** (bits - 1))):
        out = dequantize_project(*on, torch.float32, levels=given if given is None else given.to(device))
        terms = restore((codes - middle).abs() + middle, components.abs(), scale, bias.abs())
        error = (out.cpu().double() - exact).abs()
        assert (error <= terms * (2.0**-22 + (2 * channels + 4) * ULP)).all()


@pytest.mark.kernel
@pytest.mark.parametrize("channels", [45, 130])
@pytest.mark.parametrize("fmt", [NV12, P010, NV12_SPLIT12], ids=lambda f: f.name)
def test_halves_are_restored_within_their_bound(
    device: torch.device, fmt: SurfaceFormat, channels: int
) -> None:
    """Weights of float16 results have 11 bits: 2^-11 of each product of a centered code and a weight.

    The result is rounded to 11 bits as well. Below 2^-14 float16 has a step of 2^-24.
    """
    layout = small_layout(fmt, CHANNEL_ROWS, 70, channels)
    surface = torch.randint(0, 256, layout.shape, dtype=torch.uint8)
    codes = reference.unpack_surface_ref(surface, layout)
    components, bias = torch.randn(67, channels) / 8, torch.randn(67)
    scale = torch.exp(torch.randn(channels)) / 2**fmt.bits
    on = [t.to(device) for t in (components, scale, bias)]
    out = unpack_dequantize_project(surface.to(device), layout, *on, torch.float16)
    exact = restore(codes, components, scale, bias)
    away = (codes - layout.fill).abs()
    dropped = 2.0**-11 * restore(away, components.abs(), scale, torch.zeros(67))
    terms = restore(away + layout.fill, components.abs(), scale, bias.abs())
    error = (out.cpu().double() - exact).abs()
    assert (error <= dropped + 2.0**-11 * exact.abs() + 2.0**-24 + terms * (2 * channels + 4) * ULP).all()
    assert error.max() > dropped.mean() / 32  # the weights, not the bound, set the error


@pytest.mark.kernel
@pytest.mark.parametrize("channels", [45, 130, None])
def test_few_multiprocessors_do_the_same(device: torch.device, channels: int | None) -> None:
    tokens, depth = 300, 70
    args = Forward.make(tokens, depth, channels, 8)
    layout = small_layout(NV12, CHANNEL_TILES, tokens, channels or depth)
    surface = torch.zeros(layout.shape, dtype=torch.uint8, device=device)
    x, components, *vectors = args.to(device)
    clamped = project_quantize_pack(x, components, *vectors, surface, layout, sms=1)
    codes, changed = args.codes()
    assert torch.equal(reference.unpack_surface_ref(surface.cpu(), layout), codes)
    assert clamped.tolist() == [changed]
    bias = torch.zeros(depth, device=device)
    out = unpack_dequantize_project(surface, layout, components, vectors[1], bias, torch.float32, sms=1)
    assert torch.equal(out.cpu().double(), restore(codes, args.components, args.inv_scale, bias.cpu()))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("channels", [45, 130, 1100])
@pytest.mark.parametrize("fmt", [NV12, P010], ids=lambda f: f.name)
def test_weights_made_before_give_the_same(
    device: torch.device, fmt: SurfaceFormat, channels: int, dtype: torch.dtype
) -> None:
    layout = small_layout(fmt, TOKEN_ROWS, 30, channels)
    surface = torch.randint(0, 256, layout.shape, dtype=torch.uint8).to(device)
    components, scale, bias = torch.randn(67, channels), torch.rand(channels) / 256, torch.randn(67)
    on = [t.to(device) for t in (components, scale, bias)]
    expected = unpack_dequantize_project(surface, layout, *on, dtype)
    weights = weigh_components(*on, fmt, dtype)
    assert weights is not None
    on[0] = torch.zeros_like(on[0])  # not read again
    assert torch.equal(unpack_dequantize_project(surface, layout, *on, dtype, weights=weights), expected)


@pytest.mark.kernel
def test_weights_of_other_operands_are_refused(device: torch.device) -> None:
    layout = small_layout(P010, TOKEN_ROWS, 30, 45)
    surface = torch.zeros(layout.shape, dtype=torch.uint8, device=device)
    components, levels = torch.randn(67, 45, device=device), torch.ones(45, device=device)
    vectors = levels, torch.zeros(67, device=device)
    weights = weigh_components(components, *vectors, P010, torch.float16)
    others = {
        "features": weigh_components(components[:66], levels, vectors[1][:66], P010, torch.float16),
        "channels": weigh_components(components[:, :44], levels[:44], vectors[1], P010, torch.float16),
        "format": weigh_components(components, *vectors, NV12, torch.float16),
        "dtype": weigh_components(components, *vectors, P010, torch.float32),
    }
    for other in others.values():
        with pytest.raises(LaneError, match="make them with weigh_components"):
            unpack_dequantize_project(surface, layout, components, *vectors, torch.float16, weights=other)
    for given, more in ((components, {"levels": levels}), (None, {})):
        with pytest.raises(LaneError, match="leave weights out"):
            vectors = levels, torch.zeros(67 if given is not None else 45, device=device)
            unpack_dequantize_project(
                surface, layout, given, *vectors, torch.float16, weights=weights, **more
            )
    assert weigh_components(None, levels, levels, P010, torch.float16) is None


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("sms", [1, None])
@pytest.mark.parametrize(("tokens", "depth"), [(70, 520), (450, 130)])
def test_few_channels_of_many_features_or_tokens(
    device: torch.device, tokens: int, depth: int, sms: int | None, dtype: torch.dtype
) -> None:
    """More blocks of features than programs on one multiprocessor, and programs that share their tokens."""
    codes = torch.randint(0, 16, (tokens, 19), dtype=torch.int16)
    components = torch.randint(-4, 5, (depth, 19)).float()  # sums of 11 bits at most
    levels, scale, bias = torch.full((19,), 15.0), torch.ones(19), dyadic((depth,), 1.0)
    on = [t.to(device) for t in (codes, components, scale, bias)]
    out = dequantize_project(*on, dtype, levels=levels.to(device), sms=sms)
    assert torch.equal(out.cpu().double(), restore(codes, components, scale, bias))


@pytest.mark.kernel
def test_more_channels_than_a_program_weighs_at_a_time(device: torch.device) -> None:
    channels = 1100
    codes = torch.randint(0, 4, (20, channels), dtype=torch.int16)
    components = torch.cat((torch.full((33, 1024), 0.25), dyadic((33, channels - 1024), 1.0)), 1)
    scale, bias = torch.full((channels,), 0.5), dyadic((33,), 1 / 2)
    on = [t.to(device) for t in (codes, components, scale, bias)]
    for levels in (None, torch.full((channels,), 3.0, device=device)):
        out = dequantize_project(*on, torch.float32, levels=levels)
        assert torch.equal(out.cpu().double(), restore(codes, components, scale, bias))


@pytest.mark.kernel
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_round_trip_error(device: torch.device, mapping: str) -> None:
    """With a full orthonormal basis and no clamping each coefficient errs by at most scale / 2, and so a
    token by the norm of that: |x - x'| <= |scale| / 2.
    """
    tokens, depth = 66, 40
    x = torch.randn(tokens, depth)
    basis = torch.linalg.qr(torch.randn(depth, depth, dtype=torch.float64))[0].float()
    z = x.double() @ basis.double()
    scale = ((z.amax(0) - z.amin(0)) / 1000).float()
    offset = z.amin(0).float() - scale
    levels = torch.full((depth,), 1023.0)
    layout = small_layout(P010, mapping, tokens, depth)
    surface = torch.zeros(layout.shape, dtype=torch.uint8, device=device)
    on = [t.to(device) for t in (x, basis, offset, 1 / scale, levels)]
    clamped = project_quantize_pack(*on, surface, layout)
    bias = (basis.double() @ offset.double()).float().to(device)
    out = unpack_dequantize_project(surface, layout, on[1], scale.to(device), bias, torch.float32).cpu()
    assert clamped.item() == 0
    float_error = 8 * depth * ULP * (x.norm(dim=1) + scale.norm() * 1023)
    error = (x - out).norm(dim=1)
    assert (error <= scale.norm() / 2 + float_error).all()
    assert error.max() > scale.norm() / 8  # the quantizer, not the bound, sets the error


@pytest.mark.gpu
def test_positions_beyond_32_bits(cuda: torch.device) -> None:
    """2.2e9 codes: offsets into the surface and the output need 64 bits."""
    tokens, channels = 2**21, 1050
    row = torch.arange(channels, device=cuda) % 251
    x = row.to(torch.bfloat16).expand(tokens, channels)
    one, zero = torch.ones(channels, device=cuda), torch.zeros(channels, device=cuda)
    layout = plan_surface(NV12, TOKEN_ROWS, tokens, channels, max_side=8192)
    assert layout.positions > 2**31
    surface = torch.full(layout.shape, SENTINEL, dtype=torch.uint8, device=cuda)
    clamped = project_quantize_pack(x, None, zero, one, one * 255, surface, layout)
    assert clamped.item() == 0
    samples = surface[:, : layout.width].reshape(-1)
    for first in (0, tokens // 2, tokens - 1000):
        codes = samples[first * channels : (first + 1000) * channels].view(1000, channels)
        assert torch.equal(codes, row.to(torch.uint8).expand(1000, channels))
    assert (samples[layout.positions :] == layout.fill).all()
    out = unpack_dequantize_project(surface, layout, None, one, zero, torch.bfloat16)
    for first in (0, tokens // 2, tokens - 1000):
        assert torch.equal(out[first : first + 1000], x[:1000])


def test_cpu_path_by_hand() -> None:
    """x - offset = [[1, -1], [2.5, 9]], times [2, 1], rounded half up, clamped to [0, 7]."""
    layout = SurfaceLayout(NV12, CHANNEL_ROWS, 2, 2, width=2, height=2, frames=1, pitch=3)
    surface = torch.full((3, 3), SENTINEL, dtype=torch.uint8)
    x = torch.tensor([[2.0, -3.0], [3.5, 7.0]])
    offset, inv_scale, levels = torch.tensor([1.0, -2.0]), torch.tensor([2.0, 1.0]), torch.tensor([7.0, 7.0])
    clamped = project_quantize_pack(x, None, offset, inv_scale, levels, surface, layout)
    assert clamped.tolist() == [2]
    assert surface.tolist() == [[2, 5, SENTINEL], [0, 7, SENTINEL], [128, 128, SENTINEL]]
    out = unpack_dequantize_project(surface, layout, None, 1 / inv_scale, offset, torch.float32)
    assert out.tolist() == [[2.0, -2.0], [3.5, 5.0]]
    codes, clamped = project_quantize(x, None, offset, inv_scale, levels)
    assert codes.tolist() == [[2, 0], [5, 7]] and clamped.tolist() == [2]
    assert dequantize_project(codes, None, 1 / inv_scale, offset, torch.float32).tolist() == out.tolist()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.zeros(3)}, "x has shape"),
        ({"x": torch.zeros(0, 4)}, "x has shape"),
        ({"x": torch.zeros(3, 4, dtype=torch.int32)}, "x has dtype torch.int32"),
        ({"x": torch.zeros(3, 5)}, "x has 5 features"),
        ({"components": torch.zeros(4, 0)}, "components has shape"),
        ({"components": torch.zeros(4, 2, device="meta")}, "components is on meta"),
        ({"offset": torch.zeros(3)}, r"offset is torch.float32 \[3\]"),
        ({"inv_scale": torch.zeros(2, dtype=torch.float64)}, "inv_scale is torch.float64"),
        ({"levels": torch.zeros(1).expand(2)}, "levels is"),
        ({"levels": torch.zeros(2, device="meta")}, "levels is on meta"),
        ({"x": torch.zeros(2, 4)}, "plan one for"),
        ({"surface": torch.zeros(6, 9, dtype=torch.uint8)}, "surface is"),
        ({"surface": torch.zeros(6, 8, dtype=torch.int8)}, "surface is torch.int8"),
        ({"surface": torch.zeros(8, 6, dtype=torch.uint8).t()}, "surface is"),
        ({"surface": torch.zeros(49, dtype=torch.uint8)[1:].view(6, 8)}, "odd address"),
        ({"surface": torch.zeros(6, 8, dtype=torch.uint8, device="meta")}, "surface is on meta"),
        ({"sms": 0}, "sms=0 is neither None nor"),
    ],
)
def test_pack_refuses(change: dict[str, Any], text: str) -> None:
    layout = SurfaceLayout(P010, TOKEN_ROWS, 3, 2, width=4, height=4, frames=1, pitch=8)
    good: dict[str, Any] = {
        "x": torch.zeros(3, 4),
        "components": torch.zeros(4, 2),
        "offset": torch.zeros(2),
        "inv_scale": torch.ones(2),
        "levels": torch.ones(2),
        "surface": torch.zeros(6, 8, dtype=torch.uint8),
    }
    with pytest.raises(LaneError, match=text):
        project_quantize_pack(**(good | change), layout=layout)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"codes": torch.zeros(3, 2)}, "codes has dtype"),
        ({"codes": torch.zeros(2, dtype=torch.int16)}, "codes has shape"),
        ({"codes": torch.zeros(2, 3, dtype=torch.int16).t()}, "not contiguous"),
        ({"components": torch.zeros(2, 4)}, "components have shape"),
        ({"scale": torch.zeros(4)}, r"scale is torch.float32 \[4\]"),
        ({"bias": torch.zeros(2)}, r"pass contiguous torch.float32 \[4\]"),
        ({"bias": torch.zeros(4, device="meta")}, "bias is on meta"),
        ({"dtype": torch.int32}, "cannot restore torch.int32"),
        ({"levels": torch.zeros(3)}, r"levels is torch.float32 \[3\]"),
        ({"sms": -1}, "sms=-1 is neither None nor"),
    ],
)
def test_dequantize_refuses(change: dict[str, Any], text: str) -> None:
    good: dict[str, Any] = {
        "codes": torch.zeros(3, 2, dtype=torch.int16),
        "components": torch.zeros(4, 2),
        "scale": torch.ones(2),
        "bias": torch.zeros(4),
        "dtype": torch.float32,
    }
    with pytest.raises(LaneError, match=text):
        dequantize_project(**(good | change))
