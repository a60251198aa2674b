"""Packets whose size the host learns later: the same packets, and notices that no two kernels write."""

from __future__ import annotations

from collections import deque
from copy import copy
from itertools import count

import pytest
import torch

from faults import Event
from interrupt import interrupted
from latch import LIMIT, Latch
from sidelane.kernels import exact as exact_module
from sidelane.kernels.exact import exact_encode_late
from sidelane.pipeline import late as late_module
from sidelane.pipeline.lanes import ExactLane, decode_packet
from sidelane.pipeline.late import NOTICES, LatePacket, Notice, encode_exact, encode_late
from sidelane.pipeline.tiers import PacketLayout


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).cpu()


@pytest.fixture
def notices(monkeypatch):
    """The notices that are free, none at first."""
    free = deque()
    monkeypatch.setattr(late_module, "_free", free)
    return free


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("upcast", [False, True])
def test_a_late_packet_is_the_packet_of_the_lane(device, dtype, upcast):
    x = torch.randn(64, 160)
    x = (x.bfloat16() if upcast else x).to(dtype).to(device).t()
    x[3, ::5] = 2.0**-14
    late, want = encode_late(x), ExactLane().encode(x)
    assert isinstance(late, LatePacket) and late.nbytes >= want.nbytes and late.device == x.device
    packet = late.settle()
    assert late.settle() is packet
    assert (packet.lane, packet.dtype, packet.shape, packet.strides, packet.params) == (
        *("exact", dtype, (160, 64), (1, 160)),
        want.params,
    )
    for name, part in want.sections.items():
        assert torch.equal(packet.sections[name], part), name
    assert torch.equal(bits(decode_packet(packet)), bits(x))


@pytest.mark.kernel
def test_what_does_not_become_smaller_comes_back_raw(device):
    x = torch.randint(-(2**15), 2**15, (90, 91), dtype=torch.int16).view(torch.bfloat16).to(device)
    late = encode_late(x)
    want = bits(x).clone()
    x.view(torch.int16).zero_()  # the source may change at once
    packet = late.settle()
    assert packet.lane == "raw" and torch.equal(bits(decode_packet(packet)), want)


@pytest.mark.kernel
@pytest.mark.parametrize("kind", ["exact", "zero planes", "raw"])
def test_a_packet_can_be_settled_again_after_an_interrupt_at_any_point(device, kind):
    x = torch.randn(4096).bfloat16()
    if kind == "zero planes":
        x = x.float()
    elif kind == "raw":
        x = torch.randint(-(2**15), 2**15, (4096,), dtype=torch.int16).view(torch.bfloat16)
    x = x.to(device)
    late = encode_late(x)
    for at in count():
        other = copy(late)
        hit = interrupted(other.settle, at, late_module, exact_module)
        assert torch.equal(bits(decode_packet(other.settle())), bits(x)), at
        if not hit:
            break
    assert at > 10


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_uncut_packet_lies_where_it_was_encoded(device, dtype):
    x = torch.randn(64, 160, device=device).to(dtype)
    x[3, ::5] = 2.0**-14
    late, want = encode_late(x), ExactLane().encode(x)
    packet = late.uncut()
    assert (packet.lane, packet.dtype, packet.shape, packet.params) == ("exact", dtype, x.shape, (0,))
    for name, part in want.sections.items():
        assert torch.equal(packet.sections[name], part), name
    storages = {part.untyped_storage().data_ptr() for part in packet.sections.values()}
    assert storages == {part.untyped_storage().data_ptr() for part in late.uncut().sections.values()}
    host = PacketLayout(packet)
    memory = torch.zeros(host.nbytes, dtype=torch.uint8)
    host.write(packet, memory)
    assert torch.equal(bits(decode_packet(host.read(memory, device))), bits(x))
    assert torch.equal(bits(decode_packet(late.settle())), bits(x)) and late.uncut() is None


@pytest.mark.kernel
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(4096).bfloat16().float(),
        torch.randint(-(2**15), 2**15, (4096,), dtype=torch.int16).view(torch.bfloat16),
    ],
    ids=["zero planes", "raw"],
)
def test_what_has_to_be_cut_is_not_given_uncut(device, x):
    late = encode_late(x.to(device))
    assert late.uncut() is None and torch.equal(bits(decode_packet(late.settle())), bits(x))


@pytest.mark.kernel
def test_the_exact_code_is_late_where_it_can_be(device):
    assert isinstance(encode_exact(torch.randn(5000, device=device)), LatePacket)
    assert encode_exact(torch.arange(5000, device=device)).lane == "raw"


@pytest.mark.kernel
def test_sizes_may_be_learned_in_inference_mode(device):
    late = encode_late(torch.randn(8192).bfloat16().to(device))
    with torch.inference_mode():
        packet = late.settle()
    assert not any(part.is_inference() for part in packet.sections.values())


@pytest.mark.kernel
@pytest.mark.parametrize("x", [torch.zeros(5000, dtype=torch.int32), torch.zeros(0), torch.ones(9)])
def test_other_tensors_have_no_late_packet(device, notices, x):
    assert encode_late(x.to(device)) is None
    assert len(notices) in (0, NOTICES)  # none is lost


@pytest.mark.kernel
def test_a_late_packet_takes_no_more_once_its_size_is_known(device):
    """bf16 [8200]: 16400 bytes, 14336 of them for the parts but the escapes, which take 2060."""
    x = torch.ones(8200, dtype=torch.bfloat16)
    x[torch.arange(1030) * 4] = 2.0**-20
    late = encode_late(x.to(device))
    packet = late.settle()
    assert packet.lane == "exact" and packet.sections["escapes"].numel() == 2060
    assert PacketLayout(packet).nbytes <= late.nbytes


def test_a_notice_is_lent_again_when_its_writer_is_done(notices):
    first, event = Notice(), Event()
    place = first.numbers.data_ptr()
    first.written(event)
    del first
    assert len(notices) == NOTICES
    others = [Notice() for _ in range(NOTICES)]  # the last finds the one that is being written
    assert place not in {other.numbers.data_ptr() for other in others}
    event.reached = True
    more = [Notice() for _ in range(NOTICES)]
    assert place in {other.numbers.data_ptr() for other in more}
    assert len({other.numbers.data_ptr() for other in others + more}) == 2 * NOTICES


def test_a_notice_whose_writer_nobody_knows_is_not_lent_again(notices):
    place = Notice().numbers.data_ptr()
    assert place not in {Notice().numbers.data_ptr() for _ in range(2 * NOTICES)}


def test_notices_that_are_being_written_are_passed_over_for_those_that_are_free(notices):
    """However many are: an allocation serves as many notices as it has."""
    first = [Notice() for _ in range(NOTICES)]
    for notice in first:
        notice.written(Event())
    del first, notice
    assert len({Notice().numbers.data_ptr() for _ in range(NOTICES)}) == NOTICES
    assert len(notices) == NOTICES


@pytest.mark.gpu
def test_notices_are_pinned_whoever_asks_first(cuda, notices):
    assert encode_late(torch.randn(5000)) is None
    assert Notice().numbers.is_pinned() and all(numbers.is_pinned() for numbers, _ in notices)


@pytest.mark.gpu
def test_sizes_come_from_a_device_that_runs_late(cuda):
    """The sources are dropped and overwritten before anything is encoded."""
    for seconds in (0, LIMIT):  # first, kernels are loaded
        with Latch(seconds) as latch:
            xs = [torch.randn(1 << 20, device=cuda).bfloat16() for _ in range(4)]
            xs += [
                torch.randn(1 << 20, device=cuda).bfloat16().float(),
                torch.randn(1 << 20, device=cuda).half(),
                torch.randint(-(2**15), 2**15, (1 << 20,), dtype=torch.int16, device=cuda).view(
                    torch.bfloat16
                ),
            ]
            kept = [x.clone() for x in xs]
            packets = [encode_late(x) for x in xs]
            while xs:
                xs.pop().view(torch.uint8).fill_(0x5A)
            late = latch.holds
        for packet, x in zip(packets, kept, strict=True):
            assert torch.equal(bits(decode_packet(packet.settle())), bits(x))
        assert [packet.settle().lane for packet in packets] == ["exact"] * 6 + ["raw"]
    assert late


@pytest.mark.gpu
def test_late_packets_of_threads_and_streams_do_not_share_notices(cuda):
    x = torch.randn(1 << 18, device=cuda).bfloat16()
    dense = torch.randint(-(2**15), 2**15, (1 << 18,), dtype=torch.int16, device=cuda).view(torch.bfloat16)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    for i in range(60):
        with torch.cuda.stream(streams[i % 3]):
            if i % 7 == 0:
                torch.cuda._sleep(2_000_000)
            encode_late(dense)  # dies unsettled
            late = encode_late(x)
            assert late.settle().lane == "exact" and torch.equal(decode_packet(late.settle()), x)


def test_the_kernels_are_not_for_tensors_on_a_cpu():
    assert exact_encode_late(torch.randn(5000), torch.zeros(2, dtype=torch.int32)) is None
