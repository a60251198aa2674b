"""The video lane: error bounds, exact rows, packets that decode anywhere, refusal of packets that lie."""

from __future__ import annotations

import gc
import resource
import subprocess
import sys
from collections.abc import Callable
from math import isnan, nan
from pathlib import Path
from typing import Any
from weakref import ref

import imageio_ffmpeg
import pytest
import torch
from torch import Tensor

from latch import Latch
from samples import bits_of, hadamard_basis
from sidelane.codec.packet import NO_DIGEST, Packet
from sidelane.errors import BasisError, LaneError, LaneUnavailable, PacketError
from sidelane.kernels.reference import dequantize_project_ref, project_quantize_ref
from sidelane.kernels.surface import weigh_components
from sidelane.layout import FORMATS, MAPPINGS, NV12, P010, plan_surface
from sidelane.pipeline import video
from sidelane.pipeline.basis import Basis, clip_range
from sidelane.pipeline.calibrate import calibrate
from sidelane.pipeline.compress import compress
from sidelane.pipeline.lanes import ExactLane, decode_packet, open_lane
from sidelane.pipeline.video import FLAT_ROW, VideoLane, basis_quantizer

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def smooth(tokens: int, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows that change slowly, channels with offsets and ranges from 1 to 100."""
    t, k = torch.arange(tokens)[:, None], torch.arange(channels)[None]
    wave = torch.sin(t / 37 + k / 5) + 0.01 * torch.randn(tokens, channels)
    return (wave * 100 ** (k % 7 / 6) + k % 11 - 5).to(dtype)


def fitted_basis(x: Tensor, rank: int) -> Basis:
    """Principal components of x [T, D]; the first `rank` get codes."""
    mean = x.mean(0)
    _, s, v = torch.linalg.svd(x - mean, full_matrices=False)
    z = (x - mean) @ v.t()
    return Basis(
        mean,
        v.t().contiguous(),
        z.square().mean(0).sqrt(),
        z.abs().amax(0),
        s.square() / len(x),
        (8,) * rank + (0,) * (len(s) - rank),
        0.0,
        len(x),
    )


def through_bytes(lane: VideoLane, x: Tensor) -> tuple[Packet, Tensor]:
    """The packet after a journey as bytes, and what a lane with no options but the basis makes of it."""
    packet = Packet.from_bytes(lane.encode(x).to_bytes())
    decoded = VideoLane(basis=lane.basis).decode(packet)
    assert (decoded.shape, decoded.dtype) == (x.shape, x.dtype)
    return packet, decoded


def relative(decoded: Tensor, x: Tensor) -> float:
    return float((decoded.double() - x.double()).norm() / x.double().norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("name", FORMATS)
def test_lossless_codes_are_within_half_a_step(name: str, mapping: str, dtype: torch.dtype) -> None:
    x = smooth(301, 33, dtype)
    packet, decoded = through_bytes(VideoLane(format=name, mapping=mapping), x)
    fmt = FORMATS[name]
    assert (packet.lane, packet.surface, packet.mapping, packet.bits) == ("video", name, mapping, fmt.bits)
    assert isnan(packet.rel_error)
    scale = packet.section("scale", torch.float32, 33)
    # Geometric mean of the channel's reach and the largest, over the codes on one side of the middle.
    reach = (x.float() - x.float().mean(0)).abs().amax(0)
    step = (reach * reach.amax()).sqrt() / (2 ** (fmt.bits - 1) - 1)
    assert torch.allclose(scale, step, rtol=1e-3)
    # Half a step; float32 arithmetic around the bias; half a unit in the last place of the dtype.
    rounding = x.double().abs() * torch.finfo(dtype).eps + 200 * 2.0**-22
    assert ((decoded.double() - x.double()).abs() <= scale.double() / 2 + rounding).all()


def test_few_rows_share_one_scale() -> None:
    x = smooth(40, 96)
    packet, decoded = through_bytes(VideoLane(format="p010"), x)
    scale = packet.section("scale", torch.float32, 1)
    assert ((decoded - x).abs() <= scale / 2 + 1e-4).all()


def test_several_frames() -> None:
    x = smooth(700, 64)
    packet, decoded = through_bytes(VideoLane(max_side=144), x)
    assert packet.numbers(4)[1:] == (144, 2, 144)
    one, expected = through_bytes(VideoLane(), x)
    assert one.numbers(4)[2] == 1
    assert torch.equal(decoded, expected)


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("name", ["nv12", "nv12_split12", "yuv444_10"])
def test_with_a_basis_the_reference_codes_arrive(name: str, mapping: str) -> None:
    x = smooth(300, 48)
    basis = fitted_basis(x, rank=7)
    lane = VideoLane(basis, format=name, mapping=mapping)
    packet, decoded = through_bytes(lane, x)
    assert packet.digest == basis.digest and "scale" not in packet.sections
    q = basis_quantizer(basis, lane.bits)
    levels = torch.full_like(q.scale, 2**lane.bits - 1)
    codes, _ = project_quantize_ref(x, q.components, q.offset, q.inv_scale, levels)
    assert torch.equal(decoded, dequantize_project_ref(codes, q.components, q.scale, q.bias, x.dtype))


def test_the_operands_of_a_basis_are_made_once() -> None:
    basis = fitted_basis(smooth(300, 48), rank=7)
    assert basis_quantizer(basis, 8) is basis_quantizer(basis, 8)
    assert basis_quantizer(basis, 8) is not basis_quantizer(basis, 10)
    other = fitted_basis(smooth(300, 48), rank=7)
    assert basis_quantizer(basis, 8) is not basis_quantizer(other, 8)


@pytest.mark.gpu
def test_operands_made_on_a_late_stream_serve_others(cuda: torch.device) -> None:
    basis = fitted_basis(smooth(300, 48), rank=7).to(cuda)
    other = basis_quantizer(fitted_basis(smooth(300, 48), rank=7).to(cuda), 10)
    other.weights(P010, torch.bfloat16)  # compiles
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()), Latch(0.5):
        q = basis_quantizer(basis, 10)
        with torch.cuda.stream(torch.cuda.default_stream()):
            bias = q.bias.clone()
    with torch.cuda.stream(torch.cuda.Stream()), Latch(0.5):
        weights = q.weights(P010, torch.bfloat16)
        with torch.cuda.stream(torch.cuda.default_stream()):
            constant = weights.constant.clone()
    torch.cuda.synchronize()
    assert torch.equal(bias, q.bias) and torch.equal(constant, weights.constant)


def test_one_step_serves_all_coefficients_and_the_mean_is_the_middle() -> None:
    x = smooth(300, 48)
    basis = fitted_basis(x, rank=7)
    q = basis_quantizer(basis, 8)
    levels = torch.full_like(q.scale, 255)
    assert (q.scale == q.scale[0]).all()
    at_mean, _ = project_quantize_ref(basis.mean[None], q.components, q.offset, q.inv_scale, levels)
    assert (at_mean == 128).all()
    codes, clamped = project_quantize_ref(x, q.components, q.offset, q.inv_scale, levels)
    widest = clip_range(basis.std[:7], basis.peak[:7], [8] * 7).amax()
    assert torch.isclose(127 * q.scale[0], widest) and clamped.item() == 0
    # Orthonormal components: the error in the kept subspace is that of the coefficients, half a step each.
    restored = dequantize_project_ref(codes, q.components, q.scale, q.bias, torch.float32)
    error = (restored - x) @ basis.components[:, :7]
    assert (error.abs() <= q.scale * 0.5 + 1e-3).all()


def test_rows_of_another_length_do_without_the_basis() -> None:
    x = smooth(300, 64)
    packet, decoded = through_bytes(VideoLane(hadamard_basis()), x)
    assert packet.digest == NO_DIGEST
    assert torch.equal(decoded, VideoLane().decode(VideoLane().encode(x)))


@pytest.mark.parametrize("use_basis", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_with_nan_inf_or_huge_values_are_exact(dtype: torch.dtype, use_basis: bool) -> None:
    clean = smooth(300, 48)
    x = clean.to(dtype, copy=True)
    largest = torch.finfo(dtype).max
    rows = [0, 17, 18, 150, 299]
    for row, value in zip(rows, (nan, torch.inf, -torch.inf, largest, -largest), strict=True):
        x[row, row % 48] = value
    basis = fitted_basis(clean, 10) if use_basis else None
    packet, decoded = through_bytes(VideoLane(basis), x)
    assert packet.section("rows", torch.int32).tolist() == rows
    assert torch.equal(bits_of(decoded[rows]), bits_of(x[rows]))
    others = torch.ones(300, dtype=torch.bool)
    others[rows] = False
    assert relative(decoded[others], x[others]) < 0.2 and decoded[others].isfinite().all()


def test_a_tensor_of_nan_is_exact() -> None:
    x = torch.full((300, 64), nan)
    assert torch.equal(bits_of(VideoLane().decode(VideoLane().encode(x))), bits_of(x))


def test_constant_and_subnormal_tensors() -> None:
    for x in (torch.full((300, 64), 3.25), torch.zeros(300, 64), torch.full((300, 64), 1e-42)):
        assert torch.equal(through_bytes(VideoLane(), x)[1], x)


@pytest.mark.parametrize("use_basis", [False, True])
@pytest.mark.parametrize("make", [torch.randn, smooth])
def test_numbers_too_small_for_a_step_become_their_mean(
    make: Callable[[int, int], torch.Tensor], use_basis: bool
) -> None:
    x = 1e-38 * make(600, 64)
    basis = calibrate([x], bits=4) if use_basis else None
    restored = VideoLane(basis).decode(VideoLane(basis).encode(x))
    assert (restored - x).double().norm() < 1.01 * (x - x.mean(0)).double().norm()
    if basis is not None:
        packed = open_lane("packed", basis=basis)
        off = packed.decode(packed.encode(x)) - x
        assert off.double().norm() < 1.01 * (x - x.mean(0)).double().norm()


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "vector": lambda: smooth(1, 5001).view(-1),
    "transposed": lambda: smooth(300, 64).t(),
    "permuted": lambda: smooth(280, 64).view(4, 70, 64).permute(0, 2, 1),
    "expanded": lambda: smooth(90, 64).view(90, 1, 64).expand(90, 5, 64),
    "sliced": lambda: smooth(300, 90)[:, 7:71],
    "short rows": lambda: smooth(3000, 3),
    "long rows": lambda: smooth(2, 9001),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_keeps_its_elements_in_place(layout: str) -> None:
    x = LAYOUTS[layout]()
    before = x.clone()
    packet, decoded = through_bytes(VideoLane(format="nv12_split12"), x)
    assert packet.lane == "video" and torch.equal(x, before)
    assert relative(decoded, x) < 2.0**-9
    assert decoded.stride() == packet.strides


def test_vectors_are_cut_into_rows() -> None:
    x = smooth(1, 5001).view(-1)
    x[-1] = nan  # the row filled up behind it is escaped whole
    packet, decoded = through_bytes(VideoLane(), x)
    assert packet.section("rows", torch.int32).tolist() == [5001 // FLAT_ROW]
    tail = 5001 // FLAT_ROW * FLAT_ROW
    assert torch.equal(bits_of(decoded[tail:]), bits_of(x[tail:]))


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(3000).view(50, 60),
        torch.rand(300, 64) > 0.5,
        torch.rand(300, 64, dtype=torch.float64),
        torch.randn(300, 64, dtype=torch.complex64),
        torch.randn(300, 64).to(torch.float8_e4m3fn),
        torch.empty(0, 64),
        torch.tensor(2.5),
        torch.randn(4, 5),
    ],
    ids=lambda x: f"{x.dtype} {list(x.shape)}",
)
def test_what_is_no_float_or_does_not_shrink_is_exact(x: Tensor) -> None:
    packet, decoded = through_bytes(VideoLane(qp=30), x)
    assert packet.lane in ("raw", "exact") and packet.rel_error == 0
    assert torch.equal(bits_of(decoded), bits_of(x))


@pytest.mark.parametrize("x", [torch.tensor(2.5), torch.ones(4, 5), torch.full((300, 64), nan)], ids=str)
def test_what_cannot_shrink_is_not_encoded_at_all(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a surface was written")

    monkeypatch.setattr(video, "project_quantize_pack", refuse)
    packet = VideoLane().encode(x)
    assert packet.lane == "raw"
    assert torch.equal(bits_of(decode_packet(packet)), bits_of(x))


def test_very_long_rows_are_no_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    x = smooth(400, 300)
    assert VideoLane().encode(x).section("scale").numel() == 4 * 300
    monkeypatch.setattr(video, "MAX_CHANNELS", 299)
    packet, decoded = through_bytes(VideoLane(format="nv12_split12"), x)
    assert packet.section("scale").numel() == 4 * FLAT_ROW
    assert relative(decoded, x) < 2.0**-9


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_parameters_and_tensors_of_inference_mode(context: Callable[[], Any]) -> None:
    x = smooth(300, 64)
    want = VideoLane().encode(x).to_bytes()
    with context():
        source = torch.nn.Parameter(x.clone())
        packet = VideoLane().encode(source)
        assert packet.to_bytes() == want
        assert not VideoLane().decode(packet).requires_grad
    assert torch.equal(source, x)


def test_many_tensors_are_encoded_as_one_by_one() -> None:
    tensors = [smooth(300, 64), torch.arange(5), smooth(700, 64), torch.empty(0), smooth(300, 33).half()]
    lane = VideoLane(max_side=144)
    packets = [packet.to_bytes() for packet in lane.encode_many(x for x in tensors)]
    assert packets == [lane.encode(x).to_bytes() for x in tensors]


def test_few_tensors_are_taken_ahead_of_their_packets() -> None:
    taken: list[int] = []
    tensors = (taken.append(i) or torch.arange(5) for i in range(99))  # type: ignore[func-returns-value]
    for number, _ in enumerate(VideoLane().encode_many(tensors)):
        assert number < len(taken) <= number + 1 + video.FRAMES_AHEAD
    assert (len(taken), number) == (99, 98)


def test_error_grows_with_qp_and_bytes_fall() -> None:
    x = smooth(400, 64)
    basis = fitted_basis(x, 12)
    for lane in (VideoLane(), VideoLane(basis), VideoLane(basis, format="p010")):
        errors, sizes = [], []
        for qp in (None, 10, 22, 34, 46):
            packet, decoded = through_bytes(VideoLane(lane.basis, lane.format, qp=qp), x)
            errors.append(relative(decoded, x))
            sizes.append(packet.nbytes)
        assert errors == sorted(errors) and sizes == sorted(sizes, reverse=True)
        assert errors[-1] > 2 * errors[0] and sizes[-1] < sizes[0] / 2


def test_encoding_is_deterministic() -> None:
    x = smooth(300, 64)
    for lane in (VideoLane(), VideoLane(fitted_basis(x, 9), qp=28)):
        assert lane.encode(x).to_bytes() == lane.encode(x.clone()).to_bytes()


def test_the_payload_is_a_video_file(tmp_path: Path) -> None:
    x = smooth(400, 96)
    packet = VideoLane(format="p010", qp=24).encode(x)
    path = tmp_path / "tensor.hevc"
    path.write_bytes(packet.section("bitstream").numpy().tobytes())
    assert path.read_bytes().startswith(b"\x00\x00\x00\x01\x40\x01")  # start code, VPS
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-i", str(path)]
    info = subprocess.run(command, capture_output=True, timeout=60, check=False).stderr.decode()
    width, height, _, _ = packet.numbers(4)
    assert f"Video: hevc (Main 10), yuv420p10le(pc), {width}x{height}" in info


def test_finer_ends_with_exact() -> None:
    lane: object = VideoLane(format="nv12", qp=17)
    chain = []
    while isinstance(lane, VideoLane):
        chain.append((lane.format, lane.qp))
        lane = lane.finer()
    steps = [("nv12", 17), ("nv12", 11), ("nv12", 5), ("nv12", None), ("p010", None), ("nv12_split12", None)]
    assert chain == steps and lane == ExactLane()
    assert VideoLane(format="yuv444").finer() == VideoLane(format="yuv444_10")
    assert VideoLane(format="yuv444_10").finer() == VideoLane(format="nv12_split12")
    assert VideoLane(format="p012").finer() == ExactLane()
    assert VideoLane(qp=0).finer() == VideoLane()


@pytest.mark.parametrize("bound", [0.05, 0.003, 1e-7])
def test_compress_keeps_a_bound_with_finer_lanes(bound: float) -> None:
    x = smooth(400, 64)
    packet = compress(x, lane="video-cpu", qp=40, max_rel_error=bound)
    assert packet.rel_error <= bound
    assert relative(decode_packet(packet), x) <= bound
    assert (packet.lane == "video") == (bound > 1e-4)


def test_any_lane_table_decodes_it() -> None:
    x = smooth(300, 64)
    basis = fitted_basis(x, 9)
    packet = open_lane("video-cpu", basis=basis, qp=20).encode(x)
    assert torch.equal(decode_packet(packet, basis), VideoLane(basis).decode(packet))


@pytest.mark.parametrize(
    "options",
    [
        {"format": "nv21"},
        {"mapping": "diagonal"},
        {"qp": 52},
        {"qp": 3.5},
        {"format": "nv12_split12", "qp": 20},
        {"max_side": 100},
        {"max_side": 10000},
        {"basis": "basis.safetensors"},
        {"rank": 3},
    ],
    ids=str,
)
def test_options_outside_their_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(LaneError, match="|".join(options)):
        open_lane("video-cpu", **options)


def test_without_pyav_the_lane_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(LaneUnavailable, match="pip install av"):
        open_lane("video-cpu")


def test_another_basis_is_refused() -> None:
    x = smooth(300, 64)
    packet = VideoLane(fitted_basis(x, 9)).encode(x)
    for lane in (VideoLane(), VideoLane(fitted_basis(x, 8))):
        with pytest.raises(BasisError, match=packet.digest.hex()):
            lane.decode(packet)


def test_a_packet_of_another_lane_is_refused() -> None:
    with pytest.raises(PacketError, match="'lane'"):
        VideoLane().decode(open_lane("packed").encode(smooth(300, 64)))


def plain_packet() -> Packet:
    x = smooth(300, 64)
    x[[3, 9]] = nan
    return VideoLane().encode(x)


def replaced(packet: Packet, name: str, data: Tensor) -> Packet:
    return packet.with_(sections=packet.sections | {name: data.view(torch.uint8)})


LIES: dict[str, Callable[[Packet], Packet]] = {
    "dtype": lambda p: p.with_(dtype=torch.int32),
    "shape": lambda p: p.with_(shape=(0, 64), strides=(64, 1)),
    "surface": lambda p: p.with_(surface=""),
    "mapping": lambda p: p.with_(mapping=""),
    "bits": lambda p: p.with_(bits=10),
    "params": lambda p: p.with_(params=(*p.params[:3], 100)),
    "params of another tensor": lambda p: p.with_(shape=(400, 64)),
    "params of another mapping": lambda p: p.with_(mapping="token_rows"),
    "bitstream of another format": lambda p: p.with_(surface="yuv444"),
    "params with a frame more": lambda p: p.with_(params=(*p.params[:2], 2, p.params[3])),
    "params beyond the fourth": lambda p: p.with_(params=(*p.params[:4], 1)),
    "bitstream": lambda p: replaced(p, "bitstream", p.section("bitstream")[:-1]),
    "bitstream without bytes": lambda p: replaced(p, "bitstream", torch.empty(0, dtype=torch.uint8)),
    "sections": lambda p: p.with_(sections={k: v for k, v in p.sections.items() if k != "rows"}),
    "escapes": lambda p: replaced(p, "escapes", p.section("escapes")[:-4]),
    "rows too few": lambda p: replaced(p, "rows", torch.tensor([3], dtype=torch.int32)),
    "rows out of range": lambda p: replaced(p, "rows", torch.tensor([3, 300], dtype=torch.int32)),
    "rows below zero": lambda p: replaced(p, "rows", torch.tensor([-1, 3], dtype=torch.int32)),
    "rows twice": lambda p: replaced(p, "rows", torch.tensor([3, 3], dtype=torch.int32)),
    "scale": lambda p: replaced(p, "scale", torch.ones(2)),
    "scale with nan": lambda p: replaced(p, "scale", torch.full((64,), nan)),
    "bias": lambda p: replaced(p, "bias", torch.ones(1)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_packet_whose_parts_do_not_fit_is_refused(lie: str) -> None:
    with pytest.raises(PacketError) as caught:
        VideoLane().decode(LIES[lie](plain_packet()))
    assert caught.value.field == lie.split()[0]


def test_a_basis_packet_of_another_shape_is_refused() -> None:
    x = smooth(300, 64)
    basis = fitted_basis(x, 9)
    packet = VideoLane(basis).encode(x).with_(shape=(600, 32), strides=(32, 1))
    with pytest.raises(PacketError, match="'shape'"):
        VideoLane(basis).decode(packet)


@pytest.mark.parametrize("shape", [(2**40, 64), (2**20, 64), (64, 2**40), (2, 2**30)], ids=str)
def test_a_lying_shape_takes_no_memory(shape: tuple[int, int]) -> None:
    packet = plain_packet().with_(shape=shape, strides=(shape[1], 1))
    layout = plan_surface(NV12, packet.mapping, *shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for params in (packet.params, (layout.width, layout.height, layout.frames, 4096)):
        with pytest.raises(PacketError):
            VideoLane().decode(packet.with_(params=params))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16  # KiB


@pytest.mark.kernel
@pytest.mark.parametrize("name", ["nv12", "nv12_split12", "yuv444_10"])
def test_kernels_write_the_same_packet(name: str, device: torch.device) -> None:
    x = smooth(300, 40)
    lane = VideoLane(format=name)
    packet = lane.encode(x.to(device))
    assert packet.device.type == device.type
    assert relative(lane.decode(packet).cpu(), x) < 2.0**-5
    restored = decode_packet(packet.to("cpu"))
    assert torch.allclose(lane.decode(packet).cpu(), restored, rtol=1e-5, atol=1e-4)


@pytest.mark.kernel
def test_kernels_restore_what_the_cpu_encoded(device: torch.device) -> None:
    """Also from the second packet on, for which nothing is made again of the basis."""
    x = smooth(300, 64)
    basis = fitted_basis(x, 16)
    lane = VideoLane(basis, format="p010")
    packet = lane.encode(x)
    q = basis_quantizer(basis, lane.bits)
    levels = torch.full_like(q.scale, 2**lane.bits - 1)
    codes, _ = project_quantize_ref(x, q.components, q.offset, q.inv_scale, levels)
    expected = dequantize_project_ref(codes, q.components, q.scale, q.bias, x.dtype)
    there = packet.to(device)
    for _ in range(2):
        assert relative(lane.decode(there).cpu(), expected) < 2.0**-16  # weights have 22 bits


@pytest.mark.kernel
def test_weights_are_made_once_for_all_packets(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    x = smooth(300, 64)
    basis = fitted_basis(x, 16)
    packets = [VideoLane(basis, format=name).encode(x).to(device) for name in ("p010", "p010", "nv12")]
    made: dict[str, Any] = {}
    used = []
    unpack = video.unpack_dequantize_project

    def weigh(*args: Any) -> Any:
        assert args[3].name not in made
        made[args[3].name] = weigh_components(*args)
        return made[args[3].name]

    def watched(*args: Any, weights: Any) -> Tensor:
        used.append(weights)
        return unpack(*args, weights=weights)

    monkeypatch.setattr(video, "weigh_components", weigh)
    monkeypatch.setattr(video, "unpack_dequantize_project", watched)
    for packet in packets:
        VideoLane(basis).decode(packet)
    expected = [made["p010"], made["p010"], made["nv12"]]
    assert all(found is weights is not None for found, weights in zip(used, expected, strict=True))


def test_operands_go_with_their_basis() -> None:
    gc.collect()  # of other tests
    basis = fitted_basis(smooth(300, 48), rank=7)
    basis_quantizer(basis, 8)
    gone, before = ref(basis), len(video._QUANTIZERS)
    del basis
    gc.collect()
    assert gone() is None and len(video._QUANTIZERS) == before - 1


@pytest.mark.parametrize("surface, bits", [("nv12", 8), ("nv12_split12", 12)])
@pytest.mark.parametrize("numel", [2**60, 2**61])
def test_shapes_that_no_frames_hold_are_refused(surface: str, bits: int, numel: int) -> None:
    sections = {name: torch.zeros(4, dtype=torch.uint8) for name in ("bitstream", "scale", "bias")}
    sections |= {name: torch.zeros(0, dtype=torch.uint8) for name in ("rows", "escapes")}
    packet = Packet(
        "video",
        torch.float16,
        (numel,),
        (1,),
        sections={name: sections[name] for name in ("bitstream", "rows", "escapes", "scale", "bias")},
        params=(144, 144, 1, 144),
        bits=bits,
        surface=surface,
        mapping="channel_rows",
        rel_error=float("nan"),
    )
    with pytest.raises(PacketError):
        decode_packet(Packet.from_bytes(packet.to_bytes()))


@pytest.mark.parametrize("options", [{"max_side": 2048.0}, {"qp": True}, {"qp": 20.0}], ids=str)
def test_numbers_of_another_kind_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(LaneError, match=next(iter(options))):
        open_lane("video-cpu", **options)
