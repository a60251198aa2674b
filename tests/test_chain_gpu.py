"""The chain on a real device: races are provoked with sleeping kernels and latches, never waited for."""

from __future__ import annotations

import gc
import json
import threading
import warnings
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from latch import LIMIT, Latch
from races import garbage
from samples import bits_of
from sidelane.errors import OffloadError
from sidelane.pipeline.chain import Chain
from sidelane.pipeline.lanes import open_lane
from sidelane.pipeline.late import LatePacket, encode_exact
from sidelane.pipeline.tiers import PacketLayout

pytestmark = pytest.mark.gpu

SLEEP = 20_000_000  # cycles, 10 ms at 2 GHz
SHAPE = (513, 257)
LANES = {
    "raw": {},
    "exact": {},
    "packed": {"bits": 4},
}


class Slow:
    """A lane that sleeps on the device before each encode or decode. Exact codes are late, as in a chain."""

    def __init__(self, lane, encode: int = 0, decode: int = 0):
        self.name, self.exact = lane.name, lane.exact
        self._lane, self._sleep = lane, (encode, decode)
        self._encode = encode_exact if lane.name == "exact" else lane.encode

    def encode(self, tensor):
        torch.cuda._sleep(self._sleep[0])
        return self._encode(tensor)

    def decode(self, packet):
        torch.cuda._sleep(self._sleep[1])
        return self._lane.decode(packet)

    def finer(self):
        return self._lane.finer()


def tensors(device, count=12, shape=SHAPE):
    return [torch.randn(shape, device=device).bfloat16() for _ in range(count)]


def same(a, b) -> bool:
    return torch.equal(bits_of(a), bits_of(b))


@pytest.mark.parametrize("name", LANES)
@pytest.mark.parametrize(("depth", "workers"), [(1, 1), (3, 2), (2, 4), (2, 0)])
def test_the_lane_comes_through_unchanged(cuda, name, depth, workers):
    lane = open_lane(name, **LANES[name])
    sent = tensors(cuda)
    expected = [lane.decode(lane.encode(x)) for x in sent]
    with Chain(lane, depth=depth, workers=workers) as chain:
        got = list(chain.stream(sent))
        tickets = [chain.send(x) for x in sent]
        again = [chain.receive(ticket) for ticket in reversed(tickets)]
    for want, one, other in zip(expected, got, reversed(again), strict=True):
        assert same(want, one) and same(want, other)
        assert one.device == sent[0].device and one.stride() == want.stride()


@pytest.mark.parametrize("where", ["program", "kernel", "encode", "store", "load", "decode", "inverse"])
@pytest.mark.parametrize(("depth", "workers"), [(1, 1), (2, 0), (4, 3)])
def test_no_order_of_streams_changes_what_arrives(cuda, monkeypatch, where, depth, workers):
    """Sources are dropped and their memory overwritten at once; outputs are read late and dropped at once."""
    turns = iter(range(1 << 20))

    def nap(stage):
        if stage == where and next(turns) % 3 == 0:
            torch.cuda._sleep(SLEEP)

    def slow(stage, work):
        def run(*arguments):
            nap(stage)
            return work(*arguments)

        return run

    monkeypatch.setattr(PacketLayout, "write", slow("store", PacketLayout.write))
    monkeypatch.setattr(PacketLayout, "read", slow("load", PacketLayout.read))
    exact = open_lane("exact")
    lane = Slow(exact)
    lane.encode, lane.decode = slow("encode", encode_exact), slow("decode", exact.decode)
    with Chain(
        lane,
        depth=depth,
        workers=workers,
        kernel=slow("kernel", torch.neg),
        inverse=slow("inverse", torch.neg),
    ) as chain:
        sums, expected = [], []

        def source(i):
            nap("program")
            return torch.full(SHAPE, float(i), device=cuda, dtype=torch.bfloat16)

        def sources():
            for i in range(24):
                expected.append(i * SHAPE[0] * SHAPE[1])
                yield source(i)
                garbage(cuda)

        for out in chain.stream(sources()):
            nap("program")
            sums.append(out.double().sum())
            del out
            garbage(cuda)
        assert torch.stack(sums).tolist() == expected


def test_work_of_another_stream(cuda):
    sent = tensors(cuda)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with Chain("exact", depth=2) as chain:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLEEP)
            late = [x.neg() for x in sent]
            got = list(chain.stream(late))
        torch.cuda.current_stream().wait_stream(stream)
        assert all(same(x.neg(), y) for x, y in zip(sent, got, strict=True))


@pytest.mark.parametrize("name", LANES)
def test_send_does_not_wait_for_the_device(cuda, name):
    """Nor with a lane that does: its waiting is done on a thread of the chain."""
    (x,) = tensors(cuda, 1)
    with Chain(name, **LANES[name]) as chain:
        for seconds in (0, LIMIT):  # first, kernels are loaded and memory is pinned
            with Latch(seconds) as latch:
                y = x + 1
                ticket = chain.send(y)
                early = latch.holds
            assert torch.allclose(chain.receive(ticket).float(), y.float(), atol=0.5)
        assert early


def test_join_lets_the_program_change_what_it_sent(cuda):
    lane = Slow(open_lane("raw"), encode=SLEEP)
    with Chain(lane, depth=2) as chain:
        x = torch.zeros(SHAPE, device=cuda)
        tickets = []
        for i in range(6):
            x.fill_(i)
            tickets.append(chain.send(x))
            tickets[-1].join()
        x.fill_(torch.nan)
        for i, out in enumerate(chain.receive_all(tickets)):
            assert torch.equal(out, torch.full_like(out, i))


@pytest.mark.parametrize("name", ["raw", "exact"])
@pytest.mark.parametrize("slow", ["encode", "store"])
def test_device_memory_is_bounded_while_the_host_runs_ahead(cuda, monkeypatch, slow, name):
    write = PacketLayout.write

    def late(*arguments):
        torch.cuda._sleep(SLEEP // 20)
        write(*arguments)

    if slow == "store":
        monkeypatch.setattr(PacketLayout, "write", late)
    lane = Slow(open_lane(name), encode=SLEEP // 20 if slow == "encode" else 0)
    size, depth = 32 << 20, 2
    with Chain(lane, depth=depth, workers=1, streams=1) as chain:
        chain.receive(chain.send(torch.zeros(size // 2, dtype=torch.bfloat16, device=cuda)))
        chain.flush()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        for i in range(100):
            chain.send(torch.full((size // 2,), i, dtype=torch.bfloat16, device=cuda))
        grown = torch.cuda.max_memory_reserved() - before
    # Sources: depth, one being made, one being replaced. Packets: depth and one being made. An encoder works
    # on 33 more bytes for 256 elements.
    assert grown <= (depth + 2 + depth + 1) * (size + (2 << 20)) + (4 << 20)


@pytest.mark.parametrize(("depth", "workers"), [(1, 1), (2, 0), (4, 3)])
def test_sizes_that_the_host_learns_late(cuda, depth, workers):
    """Codes that are stored as they were written, and those that are copied first. Sources and packets are
    dropped, and their memory is written again, while others are on their way."""

    def made(i):
        generator = torch.Generator(cuda).manual_seed(i)
        x = torch.randn(1 << 16, device=cuda, generator=generator)
        noise = torch.randint(-(2**15), 2**15, (1 << 16,), device=cuda, generator=generator).short()
        kinds = x.bfloat16(), x.half(), x, x.bfloat16().float(), noise.view(torch.bfloat16)
        return kinds[i % 5]

    wire = []
    with Chain("exact", depth=depth, workers=workers) as chain:
        for i in range(5):
            before = chain.report().bytes_wire
            chain.receive(chain.send(made(i)))
            wire.append(chain.report().bytes_wire - before)
        tickets = []
        for i in range(40):
            tickets.append(chain.send(made(i)))
            garbage(cuda)
        for i, out in enumerate(chain.receive_all(tickets)):
            assert same(out, made(i)), i
            del out
            garbage(cuda)
    bf16, fp16, fp32, upcast, raw = wire
    assert max(bf16, fp16) < 1 << 17 <= raw and upcast < fp32 < 1 << 18


def test_encoders_go_on_while_sizes_are_unknown(cuda):
    """As many tensors as the ring has places are encoded by one thread before the device begins."""
    depth = 3
    begun = []

    class Counted(Slow):
        def encode(self, tensor):
            packet = super().encode(tensor)
            begun.append(type(packet))
            return packet

    sent = tensors(cuda, depth)
    with Chain(Counted(open_lane("exact")), depth=depth) as chain:
        for seconds in (0, LIMIT):  # first, kernels are loaded and memory is pinned
            begun.clear()
            with Latch(seconds) as latch:
                tickets = [chain.send(x) for x in sent]
                for ticket in tickets:
                    ticket.join()
                early, count, done = latch.holds, len(begun), [ticket.done() for ticket in tickets]
            assert all(same(x, y) for x, y in zip(sent, chain.receive_all(tickets), strict=True))
    assert early and count == depth and not any(done) and set(begun) == {LatePacket}


def test_received_memory_is_bounded_while_the_host_runs_ahead(cuda):
    size, depth = 32 << 20, 2
    with Chain("raw", depth=depth, workers=1) as chain:
        ticket = chain.send(torch.ones(size, dtype=torch.uint8, device=cuda))
        chain.receive(ticket)
        chain.flush()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        total = torch.zeros((), dtype=torch.int64, device=cuda)
        for out in chain.receive_all([ticket] * 60):
            torch.cuda._sleep(SLEEP // 20)
            total += out.sum()
            del out
        assert torch.cuda.max_memory_reserved() - before <= (5 * depth + 4) * (size + (2 << 20))
        assert total.item() == 60 * size


@pytest.mark.parametrize("target", ["cpu", "last"])
def test_tensors_arrive_on_the_asked_device(cuda, target):
    device = torch.device("cpu" if target == "cpu" else f"cuda:{torch.cuda.device_count() - 1}")
    sent = tensors(cuda)
    with Chain("exact", depth=2, device=device) as chain:
        got = list(chain.stream(sent))
    assert all(out.device == device and same(out.cpu(), x.cpu()) for x, out in zip(sent, got, strict=True))


def test_tensors_of_the_cpu_arrive_on_the_device(cuda):
    sent = tensors("cpu")
    with Chain("packed", bits=8, depth=2, device=cuda) as chain:
        got = list(chain.stream(sent))
    lane = open_lane("packed", bits=8)
    for x, out in zip(sent, got, strict=True):
        assert out.is_cuda and same(out.cpu(), lane.decode(lane.encode(x)))


def test_host_memory_returns_with_the_tickets(cuda):
    with Chain("exact") as chain:
        tickets = [chain.send(x) for x in tensors(cuda)]
        chain.flush()
        assert chain.report().host_bytes > 0 and all(ticket.done() for ticket in tickets)
        del tickets
        assert chain.report().host_bytes == 0


def test_a_failed_stage_leaves_the_chain_whole(cuda):
    class Broken(Slow):
        def encode(self, tensor):
            if tensor.shape[0] == 1:
                raise MemoryError("encode")
            return super().encode(tensor)

    def inverse(x):
        if x.shape[0] == 2:
            raise MemoryError("inverse")
        return x

    with Chain(Broken(open_lane("exact")), depth=2, inverse=inverse) as chain:
        for _ in range(3):
            tickets = [chain.send(x) for n in (1, 2, 3) for x in tensors(cuda, 3, (n, 1000))]
            for ticket in tickets[:6]:
                with pytest.raises(MemoryError):
                    chain.receive(ticket)
            for ticket in tickets[6:]:
                assert chain.receive(ticket).shape == (3, 1000)
        chain.flush()
        assert all(ring.free == 2 for ring in chain._stages.rings.values())
    assert all(ring.held == 0 for ring in chain._stages.rings.values())


def test_two_threads_share_a_chain(cuda):
    failures = []

    def work(seed):
        generator = torch.Generator(device=cuda).manual_seed(seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                x = torch.randn(SHAPE, device=cuda, generator=generator).bfloat16()
                keep = x.clone()
                ticket = chain.send(x)
                del x
                garbage(cuda)
                if not same(chain.receive(ticket), keep):
                    failures.append(seed)

    with Chain("exact", depth=2) as chain:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_capture_of_a_graph_is_refused(cuda):
    x = torch.ones(64, device=cuda)
    with Chain("raw") as chain:
        ticket = chain.send(x)
        chain.flush()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = x * 2
            for call in (lambda: chain.send(x), lambda: chain.receive(ticket)):
                with pytest.raises(OffloadError, match="CUDA graph"):
                    call()
        graph.replay()
        assert torch.equal(y, x * 2) and torch.equal(chain.receive(ticket), x)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_trace_shows_stages_that_overlap(cuda, tmp_path, workers):
    """Four of the tensors become ready at one time. A store of them takes far longer than an encode."""
    sent = tensors(cuda, 16, (2048, 4096))
    for seconds in (0, LIMIT):  # first, kernels are loaded and memory is pinned
        with Chain("raw", workers=workers, trace=True, kernel=torch.neg, inverse=torch.neg) as chain:
            tickets = [chain.send(sent[0])]
            chain.flush()
            with Latch(seconds) as latch:
                tickets += [chain.send(x) for x in sent[1:5]]
                for ticket in tickets:
                    ticket.join()  # it is enqueued
                early = latch.holds
            for out in chain.receive_all([*tickets, *map(chain.send, sent[5:])]):
                with chain.span("program"):
                    out.add_(1)
            trace = chain.trace()
    assert early
    trace.save(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    rows, stages = defaultdict(list), defaultdict(dict)
    for event in events:
        if event["ph"] == "X":
            begin, end = event["ts"], event["ts"] + event["dur"]
            rows[event["tid"]].append((begin, end))
            stages[event["cat"].split()[0]][event["args"]["item"]] = begin, end
    for row in rows.values():  # one stream each
        for (_, end), (begin, _) in pairwise(sorted(row)):
            assert end <= begin + 1  # microseconds, the resolution of the events
    order = ["kernel", "encode", "store", "load", "decode", "inverse"]
    assert set(stages) == {*order, "program"}
    for stage in stages.values():
        assert sorted(stage) == list(range(16))
    for item in range(16):
        assert all(stages[a][item][1] <= stages[b][item][0] + 1 for a, b in pairwise(order))
    assert any(stages["encode"][i + 1][0] < stages["store"][i][1] for i in range(1, 4))


@pytest.mark.parametrize("name", ["raw", "packed"])
def test_nothing_waits_on_the_hot_path(cuda, name):
    """PyTorch itself says so, of all threads."""
    lane = open_lane(name)
    sent = tensors(cuda)
    expected = [lane.decode(lane.encode(x)) for x in sent]
    with Chain(lane, depth=2) as chain, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = list(chain.stream(sent))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(same(x, y) for x, y in zip(expected, got, strict=True))


@pytest.fixture
def overlap(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "benchmarks")
    import overlap

    return overlap


def test_the_benchmark_refuses_wrong_results(cuda, overlap):
    sent = tensors(cuda, 3)
    products = overlap.Products(256)
    overlap.gate(open_lane("packed", bits=4), sent, products)
    liar = Slow(open_lane("packed", bits=4))
    liar.exact = True
    with pytest.raises(RuntimeError, match="no times"):
        overlap.gate(liar, sent, products)


@pytest.mark.parametrize("direction", ["store", "load", "both"])
def test_the_benchmark_measures_what_it_says(cuda, overlap, direction):
    sent = tensors(cuda, 3)
    products = overlap.Products(256)
    for setting in overlap.SETTINGS.values():
        with Chain("exact", **setting.options) as chain:
            transfer = overlap.Transfer(chain, sent, direction, 10 * sent[0].nbytes)
            quiet = overlap.Quiet(lambda: None)
            row = overlap.row("exact", direction, setting, transfer, products, 2, quiet)
            report = chain.report()
        assert row["tensors"] >= 10 and row["products"] >= 1
        assert row["wire_bytes"] == transfer.packet * row["tensors"] * (2 if direction == "both" else 1)
        moved = (report.sent - 3) + report.received
        runs = moved // (row["tensors"] * transfer.ways)
        rounds = 2 + row["left_out"]
        assert moved == runs * row["tensors"] * transfer.ways and runs == 1 + overlap.TRIES + 2 * rounds
        total = row["ms_products"] + row["ms_chain"] - row["ms_both"]
        least = min(row["ms_products"], row["ms_chain"])
        assert row["hidden"] * least == pytest.approx(total, rel=0.1, abs=0.02)
