"""compress and decompress: the bound on the error holds for every input, at the coarsest code that can."""

from __future__ import annotations

from math import inf, isnan, nan, sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sidelane
from samples import bits_of, hadamard_basis
from sidelane.codec.packet import Packet
from sidelane.errors import BasisError, LaneError, PacketError
from sidelane.pipeline.calibrate import calibrate
from sidelane.pipeline.compress import CHUNK, compress, decompress, relative_error
from sidelane.pipeline.lanes import ExactLane, PackedLane

LOSSY = (torch.float32, torch.float16, torch.bfloat16)
BOUNDS = (0.5, 0.1, 0.02, 1e-3, 1e-7, 0.0)
ROUNDING = 1 + 1e-12  # of sums in float64, which depend on their order


def with_special(x: Tensor, *special: float) -> Tensor:
    x = x.clone()
    for i, value in enumerate(special):
        x[i * 97 % x.numel() :: 701] = value
    return x


N = 6000
ADVERSARIAL = {
    "normal": lambda: torch.randn(N),
    "constant": lambda: torch.full((N,), 0.3),
    "zeros": lambda: torch.zeros(N),
    "minus_zero": lambda: torch.full((N,), -0.0),
    "denormal": lambda: torch.randn(N) * 1e-42,
    "denormal_half": lambda: torch.randn(N) * 1e-7,
    "outlier": lambda: with_special(torch.randn(N), 1e30),
    "huge_and_tiny": lambda: torch.cat((torch.tensor([3e38]), torch.randn(N) * 1e-30)),
    "huge": lambda: torch.sign(torch.randn(N)) * 3.4e38,
    "nan_inf": lambda: with_special(torch.randn(N), nan, inf, -inf),
    "nan_inf_huge": lambda: with_special(torch.randn(N) * 1e38, nan, inf, -inf),
    "all_nan": lambda: torch.full((N,), nan),
    "all_inf": lambda: torch.full((N,), -inf),
    "alternating": lambda: torch.tensor([1.0, -1.0]).repeat(N // 2),
    "offset": lambda: torch.randn(N) + 1e4,
    "wide_range": lambda: torch.exp(torch.randn(N) * 20),
    "one_element": lambda: torch.tensor([0.1]),
    "rows_in_basis": lambda: (torch.randn(N // 4, 3) @ hadamard_basis().components[:, :3].t()).view(-1, 4),
    "rows": lambda: torch.randn(N // 4, 4),
    "rows_nan": lambda: with_special(torch.randn(N), nan, inf).view(-1, 4),
}


def measured(x: Tensor, y: Tensor) -> float:
    """Relative Frobenius error over the finite elements of `x`, each term in float64."""
    finite = x.isfinite()
    reference, decoded = x[finite].double(), y[finite].double()
    norm = reference.norm().item()
    error = (decoded - reference).norm().item()
    return error / norm if norm else (0.0 if error == 0 else inf)


@pytest.mark.parametrize("basis", [None, hadamard_basis()], ids=["groups", "basis"])
@pytest.mark.parametrize("dtype", LOSSY, ids=str)
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_the_bound_holds(name, dtype, basis):
    x = ADVERSARIAL[name]().to(dtype)
    sizes = []
    for bound in BOUNDS:
        packet = Packet.from_bytes(compress(x, max_rel_error=bound, basis=basis).to_bytes())
        y = decompress(packet, basis=basis)
        assert measured(x, y) <= bound * ROUNDING
        assert packet.rel_error == pytest.approx(measured(x, y), rel=1e-9)
        special = ~x.isfinite()
        assert torch.equal(bits_of(y[special]), bits_of(x[special]))
        sizes.append(packet.nbytes)
    if basis is None and x.isfinite().all():
        assert sizes == sorted(sizes)


def test_a_lane_by_its_position():
    x = torch.randn(64, 64)
    assert compress(x, "packed", bits=4).to_bytes() == compress(x, lane="packed", bits=4).to_bytes()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_coarsest_code_is_taken(bits):
    x = torch.randn(N)
    error = measured(x, decompress(compress(x, lane="packed", bits=bits)))
    assert compress(x, max_rel_error=error * ROUNDING).bits == bits
    finer = compress(x, max_rel_error=error * 0.999)
    assert (finer.lane, finer.bits) == (("packed", bits * 2) if bits < 8 else ("exact", 0))


def test_given_bits_are_where_the_search_starts():
    x = torch.randn(N)
    assert compress(x, max_rel_error=0.9).bits == 2
    assert compress(x, max_rel_error=0.9, bits=4).bits == 4
    assert compress(x, max_rel_error=0.9, lane=PackedLane(bits=8)).bits == 8
    assert compress(x, max_rel_error=0.9, lane="exact").lane == "exact"
    assert compress(x, max_rel_error=0.9, lane="raw").lane == "raw"


def test_a_basis_is_used_while_it_holds():
    basis = hadamard_basis()
    inside = (torch.rand(2000, 3) * 2 - 1) * basis.peak[:3] @ basis.components[:, :3].t() + basis.mean
    packet = compress(inside, max_rel_error=0.2, basis=basis)
    assert (packet.digest, packet.bits) == (basis.digest, 0)
    packet = compress(inside, max_rel_error=0.01, basis=basis)
    assert (packet.digest, packet.bits) == (basis.digest, 7)
    outside = torch.randn(2000, 4)
    packet = compress(outside, max_rel_error=0.01, basis=basis)
    assert (packet.digest, packet.bits) == (bytes(32), 8)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=300),
    st.floats(0, 2),
    st.sampled_from(LOSSY),
    st.booleans(),
)
def test_the_bound_holds_for_any_floats(numbers, bound, dtype, symmetric):
    x = torch.tensor(numbers, dtype=torch.float32).to(dtype)
    packet = compress(x, lane="packed", max_rel_error=bound, symmetric=symmetric, group=32)
    y = decompress(packet)
    assert measured(x, y) <= bound * ROUNDING
    assert torch.equal(bits_of(y[~x.isfinite()]), bits_of(x[~x.isfinite()]))


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.float64, torch.complex64, torch.float8_e5m2]
)
def test_other_dtypes_are_exact_under_any_bound(dtype):
    x = (torch.randn(40, 10) * 50).to(dtype).t()
    packet = compress(x, max_rel_error=0.5)
    assert packet.rel_error == 0
    assert torch.equal(bits_of(decompress(packet)), bits_of(x))


def test_layouts_under_a_bound():
    base = torch.randn(20, 30, 8)
    for x in (base.transpose(0, 2), base[3:9, ::2], base[:, :1].expand(20, 30, 8), base[0, 0, 0], base[:0]):
        y = decompress(compress(x, max_rel_error=0.05))
        assert y.shape == x.shape
        assert measured(x, y) <= 0.05


@pytest.mark.parametrize("basis", [None, hadamard_basis()], ids=["channels", "basis"])
def test_the_bound_holds_for_video(basis):
    x = torch.randn(600, 4)
    x[5, 1] = nan
    for bound in (0.9, 0.05, 1e-5):
        packet = Packet.from_bytes(compress(x, lane="video-cpu", max_rel_error=bound, basis=basis).to_bytes())
        y = decompress(packet, basis=basis)
        assert measured(x, y) <= bound * ROUNDING
        assert torch.equal(bits_of(y[~x.isfinite()]), bits_of(x[~x.isfinite()]))


def test_defaults():
    x = torch.randn(N)
    packet = compress(x)
    assert (packet.lane, packet.rel_error) == ("exact", 0.0)
    assert torch.equal(decompress(packet), x)
    assert isnan(compress(x, lane="packed").rel_error)
    assert compress(x, lane="packed").bits == 8
    assert decompress(packet, device="cpu").device == torch.device("cpu")


def test_gradients_do_not_flow():
    x = torch.randn(N, requires_grad=True)
    assert not decompress(compress(x, max_rel_error=0.1)).requires_grad


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        (lambda x: compress(x, x), "a lane such as sidelane.PackedLane(bits=4)"),
        (lambda x: compress(x, max_rel_error=x), "is not a number from 0 up"),
        (lambda x: sidelane.checkpoint(x, x), "cannot be called: pass the function first"),
        (lambda x: sidelane.offload(x), "a lane such as sidelane.PackedLane(bits=4)"),
        (lambda x: sidelane.Chain(x), "a lane such as sidelane.PackedLane(bits=4)"),
        (lambda x: sidelane.Chain(trace=x), "is neither True nor False"),
        (lambda x: sidelane.DualWire(x), "DualLane"),
    ],
)
def test_a_tensor_in_the_wrong_place_is_told_in_one_line(call, advice):
    with pytest.raises(LaneError) as found:
        call(torch.randn(300, 300))
    message = str(found.value)
    assert "tensor([[" in message and advice in message and "\n" not in message and len(message) < 500


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_rel_error": -0.1}, "max_rel_error=-0.1 is not a number from 0 up"),
        ({"max_rel_error": nan}, "max_rel_error=nan is not a number from 0 up"),
        ({"max_rel_error": inf}, "max_rel_error=inf is not a number from 0 up"),
        ({"max_rel_error": "0.1"}, "max_rel_error='0.1' is not a number from 0 up"),
        ({"max_rel_error": True}, "max_rel_error=True is not a number from 0 up"),
        (
            {"lane": 5},
            "lane=5 is neither the name of a lane nor a lane such as sidelane.PackedLane(bits=4)",
        ),
        ({"lane": "packed", "bits": 4.0}, "bits=4.0 is not one of (2, 4, 8)"),
        ({"lane": "packed", "symmetric": "x"}, "symmetric='x' is neither True nor False"),
        ({"lane": "zip"}, "unknown lane 'zip': use one of raw, exact, packed, video-cpu, video, dual, auto"),
        ({"bits": 4}, "lane 'exact' has no option 'bits': it has no options; lane 'packed' has it"),
        (
            {"basis": hadamard_basis()},
            "lane 'exact' has no option 'basis': it has no options; lane 'packed' has it",
        ),
        (
            {"lane": PackedLane(), "bits": 4},
            "bits cannot be set on a lane that is open: pass its name instead",
        ),
    ],
)
def test_refusals(options, text):
    with pytest.raises(LaneError) as caught:
        compress(torch.randn(8), **options)
    assert str(caught.value) == text


@pytest.mark.parametrize("lane", ["raw", "exact", "packed", "auto"])
def test_what_is_no_dense_tensor_is_refused(lane):
    with pytest.raises(LaneError, match="list is not a plain tensor"):
        compress([1.0, 2.0], lane=lane)
    with pytest.raises(LaneError, match="meta device"):
        compress(torch.empty(8, device="meta"), lane=lane)


def test_autocast_and_default_dtype_change_nothing():
    x = torch.randn(512, 64) @ torch.randn(64, 64)
    basis = calibrate([x], bits=6)
    plain = compress(x, basis=basis, max_rel_error=0.01)
    restored, half = decompress(plain, basis=basis), compress(x.half())
    with torch.autocast("cpu", torch.bfloat16):
        assert calibrate([x], bits=6).digest == basis.digest
        assert compress(x, basis=basis, max_rel_error=0.01).to_bytes() == plain.to_bytes()
        assert torch.equal(decompress(plain, basis=basis), restored)
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert compress(x.half()).to_bytes() == half.to_bytes()
        assert torch.equal(decompress(plain, basis=basis), restored)
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_is_no_packet():
    data = compress(torch.randn(8)).to_bytes()
    with pytest.raises(PacketError, match="parse bytes with Packet.from_bytes"):
        decompress(data)
    with pytest.raises(PacketError, match="str cannot be read as contiguous bytes"):
        Packet.from_bytes("packet")


@pytest.mark.parametrize("device", ["bogus", "meta", "cuda:99", 7.5])
def test_a_device_that_is_not_here(device):
    with pytest.raises(LaneError, match="use 'cpu' or"):
        decompress(compress(torch.randn(8)), device=device)


def test_more_dimensions_than_a_packet_holds():
    with pytest.raises(LaneError, match="65 dimensions are more than 64"):
        compress(torch.zeros([1] * 65))


def test_a_missing_basis():
    packet = compress(torch.randn(400, 4), lane="packed", basis=hadamard_basis())
    with pytest.raises(BasisError, match=hadamard_basis().digest.hex()):
        decompress(packet)


# relative_error


def test_relative_error_of_known_vectors():
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == 0.1
    assert relative_error(torch.tensor([3e38, -3e38]), torch.tensor([-3e38, 3e38])) == pytest.approx(2)
    tiny = torch.tensor([1.0, 2.0, 2.0]) * 2.0**-149
    assert relative_error(tiny, tiny * 2) == 1
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_error(torch.zeros(3), torch.tensor([0.0, 0.0, 1e-45])) == inf


@pytest.mark.parametrize("dtype", LOSSY, ids=str)
def test_relative_error_sees_special_values(dtype):
    x = torch.tensor([1.0, nan, inf, -inf], dtype=dtype)
    assert relative_error(x, x) == 0
    for i, value in ((1, 0.0), (2, -inf), (3, 1.0), (0, nan), (0, inf)):
        y = x.clone()
        y[i] = value
        assert relative_error(x, y) == inf
    other_nan = x.clone()
    other_nan.view(torch.int32 if x.itemsize == 4 else torch.int16)[1] ^= 1
    assert relative_error(x, other_nan) == inf


def test_relative_error_over_chunks():
    x = torch.ones(CHUNK + 3)
    y = x.clone()
    y[0], y[-1] = 2, 3
    assert relative_error(x, y) == pytest.approx(sqrt(5 / (CHUNK + 3)), rel=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("basis", [None, hadamard_basis(16, widths=(8,) * 12)], ids=["groups", "basis"])
@pytest.mark.parametrize("dtype", LOSSY, ids=str)
def test_packets_of_a_gpu(cuda, dtype, basis):
    x = torch.randn(3000, 16).to(dtype)
    x[5, 3], x[2999, 0] = nan, inf
    for bound in (None, *BOUNDS):
        packet = compress(x.to(cuda), max_rel_error=bound, **({} if bound is None else {"basis": basis}))
        assert packet.device.type == "cuda"
        there = decompress(packet, basis=basis)
        assert there.device.type == "cuda"
        here = decompress(Packet.from_bytes(packet.to_bytes()), basis=basis)
        for y in (there.cpu(), here):
            assert measured(x, y) <= (bound or 0) * (1 + 1e-4)
            assert torch.equal(bits_of(y[~x.isfinite()]), bits_of(x[~x.isfinite()]))


@pytest.mark.gpu
def test_exact_packets_are_the_same_on_a_gpu(cuda):
    x = torch.randn(5000).bfloat16()
    assert compress(x.to(cuda)).to_bytes() == ExactLane().encode(x).to_bytes()


def test_a_lane_with_a_bound_of_its_own_is_measured_all_the_same():
    class Mine:
        name, exact, max_rel_error = "packed", False, 0.01

        def encode(self, tensor):
            return sidelane.PackedLane(bits=2).encode(tensor)

        def decode(self, packet):
            return sidelane.PackedLane(bits=2).decode(packet)

        def finer(self):
            return sidelane.PackedLane(bits=8)

    x = torch.randn(10_000)
    packet = sidelane.compress(x, Mine(), max_rel_error=0.01)
    assert packet.bits == 8 and packet.rel_error <= 0.01
