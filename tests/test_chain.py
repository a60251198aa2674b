"""The chain on the CPU: the same code, with threads in the place of streams."""

from __future__ import annotations

import gc
import json
import sys
import threading
import weakref
from collections import defaultdict
from concurrent.futures import Future
from contextlib import suppress
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sidelane
from samples import bits_of
from sidelane.errors import BudgetError, LaneError, LaneUnavailable, OffloadError
from sidelane.pipeline import chain as chain_module
from sidelane.pipeline import streams as streams_module
from sidelane.pipeline import ticket as ticket_module
from sidelane.pipeline.chain import Chain
from sidelane.pipeline.lanes import ExactLane, RawLane, open_lane
from sidelane.pipeline.late import LatePacket
from signals import Interrupt, interrupts

LANES = {
    "raw": {},
    "exact": {},
    "packed": {"bits": 4, "group": 32},
    "video-cpu": {"format": "nv12"},
}
PATIENCE = 30  # seconds after which a thread that should run is taken for stuck


class Gated(RawLane):
    """Raw, but encode of a tensor of `held` elements waits until `gate` is set."""

    def __init__(self, held: int = -1):
        object.__setattr__(self, "held", held)
        object.__setattr__(self, "gate", threading.Event())
        object.__setattr__(self, "entered", threading.Event())

    def encode(self, tensor):
        if tensor.numel() == self.held:
            self.entered.set()
            assert self.gate.wait(PATIENCE)
        return super().encode(tensor)


class Late(RawLane):
    """Raw, with a size that is known when `gate` is set. A tensor of one element is settled with a copy; the
    size of one of two elements is never known."""

    def __init__(self, known: bool = True):
        object.__setattr__(self, "gate", threading.Event())
        object.__setattr__(self, "encoded", [])
        object.__setattr__(self, "learned", [])
        if known:
            self.gate.set()

    def encode(self, tensor):
        self.encoded.append(tensor.numel())
        return LateRaw(self, super().encode(tensor))


class LateRaw(LatePacket):
    def __init__(self, lane, packet):
        self.lane, self.whole, self.numel = lane, packet, packet.flat_numel

    def uncut(self):
        assert self.lane.gate.wait(PATIENCE)
        self.lane.learned.append(self.numel)
        if self.numel == 2:
            raise MemoryError("size")
        return None if self.numel == 1 else self.whole

    def settle(self):
        sections = {name: part.clone() for name, part in self.whole.sections.items()}
        return self.whole.with_(sections=sections)


class Broken(RawLane):
    """Raw, but fails on tensors of one element (encode) and of two (decode)."""

    def encode(self, tensor):
        if tensor.numel() == 1:
            raise MemoryError("encode")
        return super().encode(tensor)

    def decode(self, packet):
        if packet.flat_numel == 2:
            raise MemoryError("decode")
        return super().decode(packet)


def same(a, b) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits_of(a), bits_of(b))


def error_of(call):
    """Type and text of what `call` raises; pytest.raises would keep its frames."""
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


def whole(chain) -> bool:
    return all(ring.free == chain._depth for ring in chain._stages.rings.values())


@pytest.mark.parametrize("name", LANES)
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_lane_comes_through_unchanged(name, workers):
    lane = open_lane(name, **LANES[name])
    sent = [torch.randn(40, 33).bfloat16() for _ in range(6)]
    expected = [lane.decode(lane.encode(x)) for x in sent]
    with Chain(lane, depth=2, workers=workers) as chain:
        got = list(chain.stream(sent))
    for want, out in zip(expected, got, strict=True):
        assert same(want, out) and want.stride() == out.stride()
    assert whole(chain) and all(ring.held == 0 for ring in chain._stages.rings.values())


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(5, 7).t(),
        torch.randn(9).expand(4, 9),
        torch.randn(10, 10)[::2, 3:],
        torch.tensor(3.5),
        torch.empty(0, 4),
        torch.arange(7),
        torch.tensor([True, False]),
        torch.randn(4, dtype=torch.complex64).conj(),
        torch.randn(6).requires_grad_(),
        torch.tensor([float("nan"), float("inf"), -0.0]),
    ],
    ids=["transposed", "expanded", "sliced", "scalar", "empty", "int", "bool", "conj", "grad", "special"],
)
def test_every_kind_of_tensor_arrives(tensor):
    with Chain() as chain:
        out = chain.receive(chain.send(tensor))
    assert same(out, tensor.detach()) and not out.requires_grad


def test_kernel_and_inverse_run_around_the_lane():
    with Chain("raw", kernel=lambda x: x.view(-1)[1:], inverse=lambda x: x * 2) as chain:
        assert chain.receive(chain.send(torch.arange(6.0).view(2, 3))).tolist() == [2, 4, 6, 8, 10]


def test_the_error_bound_holds():
    x = torch.randn(64, 64)
    with Chain(max_rel_error=0.02) as chain:
        out = chain.receive(chain.send(x))
        assert 0 < (out - x).norm() <= 0.02 * x.norm()
        assert chain.report().ratio > 1


def test_modes_of_the_program_do_not_reach_the_stages():
    x = torch.randn(8, 8)
    with Chain("exact", kernel=lambda t: t @ t) as chain:
        with torch.inference_mode():
            first = chain.receive(chain.send(x.clone()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            second = chain.receive(chain.send(x.requires_grad_()))
    assert same(first, (x @ x).detach()) and same(second, first)
    assert not first.is_inference() and not second.requires_grad


@settings(max_examples=60, deadline=None)
@given(
    depth=st.integers(1, 3),
    workers=st.integers(0, 3),
    actions=st.lists(st.sampled_from(["send", "fetch", "receive", "drop", "flush"]), max_size=25),
    rng=st.randoms(use_true_random=False),
)
def test_any_order_of_calls_gives_what_was_sent(depth, workers, actions, rng):
    with Chain("exact", depth=depth, workers=workers) as chain:
        tickets = []
        for i, action in enumerate(actions):
            if action == "send":
                tickets.append((chain.send(torch.full((i % 5, 3), float(i))), i))
            elif action == "flush":
                chain.flush()
                assert whole(chain) and all(ticket.done() for ticket, _ in tickets)
            elif tickets:
                at = rng.randrange(len(tickets))
                ticket, value = tickets[at]
                if action == "fetch":
                    assert chain.fetch(ticket) or len(chain._fetched) == depth
                elif action == "receive":
                    assert same(chain.receive(ticket), torch.full((value % 5, 3), float(value)))
                else:
                    del tickets[at]
                del ticket
        chain.flush()
        held = chain.report().host_bytes
        assert (held > 0) == bool(tickets)
        tickets.clear()
        assert chain.report().host_bytes == 0
    assert whole(chain)


def test_stages_of_different_tensors_run_at_once():
    """The encoder of the second tensor and the decoder of the first meet."""
    meeting = threading.Barrier(2, timeout=PATIENCE)

    class Meeting(RawLane):
        def encode(self, tensor):
            if tensor.numel() == 2:
                meeting.wait()
            return super().encode(tensor)

        def decode(self, packet):
            if packet.flat_numel == 1:
                meeting.wait()
            return super().decode(packet)

    with Chain(Meeting(), workers=1) as chain:
        assert [len(x) for x in chain.stream([torch.ones(1), torch.ones(2)])] == [1, 2]


def test_workers_encode_at_once():
    meeting = threading.Barrier(3, timeout=PATIENCE)

    class Meeting(RawLane):
        def encode(self, tensor):
            meeting.wait()
            return super().encode(tensor)

    with Chain(Meeting(), workers=3) as chain:
        tickets = [chain.send(torch.tensor(i)) for i in range(6)]
        assert [int(x) for x in chain.receive_all(tickets)] == list(range(6))


def test_send_waits_while_depth_tensors_are_in_front_of_the_encoder():
    lane = Gated(held=3)
    with Chain(lane, depth=2, workers=1) as chain:
        tickets = [chain.send(torch.zeros(3)), chain.send(torch.ones(4))]
        sent = threading.Event()

        def third():
            tickets.append(chain.send(torch.ones(5)))
            sent.set()

        thread = threading.Thread(target=third)
        thread.start()
        assert lane.entered.wait(PATIENCE)
        assert not sent.wait(0.2) and not tickets[0].done()
        lane.gate.set()
        assert sent.wait(PATIENCE)
        thread.join()
        assert [len(x) for x in chain.receive_all(tickets)] == [3, 4, 5]
        assert chain.report().seconds_waited >= 0.2


def test_fetched_tensors_are_at_most_depth():
    with Chain("raw", depth=2) as chain:
        tickets = [chain.send(torch.tensor(i)) for i in range(4)]
        assert [chain.fetch(ticket) for ticket in tickets] == [True, True, False, False]
        assert chain.fetch(tickets[0])  # already
        assert int(chain.receive(tickets[0])) == 0
        assert chain.fetch(tickets[2]) and not chain.fetch(tickets[3])
        chain.flush()
        del tickets[1]  # forgets what was fetched for it
        assert chain.fetch(tickets[2])


def test_a_ticket_can_be_received_again():
    x = torch.randn(10)
    with Chain("exact") as chain:
        ticket = chain.send(x)
        first, second = chain.receive(ticket), chain.receive(ticket)
        first.zero_()
        assert same(second, x) and same(chain.receive(ticket), x)


def test_an_early_change_is_an_error_and_join_prevents_it():
    lane = Gated(held=3)
    with Chain(lane, workers=1) as chain:
        chain.send(torch.zeros(3))
        assert lane.entered.wait(PATIENCE)
        x = torch.ones(5)
        ticket = chain.send(x)
        x.add_(1)
        lane.gate.set()
        with pytest.raises(OffloadError, match=r"float32 \[5\] was changed in place"):
            chain.receive(ticket)
        for value in range(50):
            x.fill_(value)
            ticket = chain.send(x)
            ticket.join()
            x.fill_(-1)
            assert chain.receive(ticket).tolist() == [value] * 5
    assert whole(chain) and chain.report().failed == 1


def test_encoders_go_on_while_a_size_is_unknown():
    """As far as the ring has places; then sizes are learned and packets stored in order."""
    lane = Late(known=False)
    with Chain(lane, depth=3, workers=1) as chain:
        tickets = [chain.send(torch.ones(n)) for n in (3, 1, 4, 5)]
        for ticket in tickets[:3]:
            ticket.join()
        joined = threading.Event()
        thread = threading.Thread(target=lambda: (tickets[3].join(), joined.set()))
        thread.start()
        assert not joined.wait(0.2)
        assert lane.encoded == [3, 1, 4] and not any(ticket.done() for ticket in tickets)
        lane.gate.set()
        assert [len(x) for x in chain.receive_all(tickets)] == [3, 1, 4, 5]
        assert joined.wait(PATIENCE)
        thread.join()
        assert lane.learned == lane.encoded == [3, 1, 4, 5]
    assert whole(chain) and all(ring.held == 0 for ring in chain._stages.rings.values())


def test_a_depth_beyond_reason_is_refused():
    with pytest.raises(LaneError, match=r"depth=1000000000 is not a whole number from 1 to \d+"):
        Chain("raw", depth=10**9)


@pytest.mark.parametrize("depth", [1, 2])
def test_many_encoders_share_few_places_for_packets_of_unknown_size(depth):
    """None waits for a place that only a later tensor gives."""
    with Chain(Late(), depth=depth, workers=4) as chain:
        for _ in range(20):
            assert [len(x) for x in chain.stream([torch.ones(n) for n in range(3, 13)])] == [*range(3, 13)]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_size_that_cannot_be_learned_is_an_error_of_its_tensor(workers):
    with Chain(Late(), depth=2, workers=workers) as chain:
        for _ in range(5):
            tickets = [chain.send(torch.ones(n)) for n in (2, 1, 3)]
            for _ in range(2):
                assert error_of(lambda ticket=tickets[0]: chain.receive(ticket)) == (MemoryError, "size")
            assert [chain.receive(ticket).tolist() for ticket in tickets[1:]] == [[1], [1, 1, 1]]
        chain.send(torch.ones(2))
        with pytest.raises(MemoryError, match="size"):
            chain.flush()
        del tickets
        if not workers:
            gc.collect()  # errors hold the frames of their callers
        assert whole(chain)
        report = chain.report()
    assert (report.sent, report.received, report.failed, report.host_bytes) == (16, 10, 6, 0)


@pytest.mark.parametrize("how", ["flush", "close"])
def test_nothing_is_left_behind_while_sizes_are_unknown(how):
    """`flush` and `close` wait for what is not stored yet, and for tensors whose tickets are gone."""
    lane = Late(known=False)
    chain = Chain(lane, depth=3, workers=2)
    tickets = [chain.send(torch.ones(n)) for n in (3, 4, 5)]
    tickets.pop(1)
    over = threading.Event()
    thread = threading.Thread(target=lambda: (getattr(chain, how)(), over.set()))
    thread.start()
    assert not over.wait(0.2) and not any(ticket.done() for ticket in tickets)
    lane.gate.set()
    assert over.wait(PATIENCE)
    thread.join()
    assert all(ticket.done() for ticket in tickets) and whole(chain)
    report = chain.report()
    assert 3 * report.host_bytes == 2 * report.bytes_wire
    chain.close()


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_of_unknown_size_arrive(device, dtype):
    """Stored as they were written, or copied first: those with zero planes, and what is raw in the end."""
    x, noise = torch.randn(32, 64), torch.randint(-(2**15), 2**15, (2048,), dtype=torch.int16)
    sent = [y.to(device) for y in (x.to(dtype), x.bfloat16().to(dtype), noise.view(torch.bfloat16))]
    with Chain("exact", depth=2, workers=0) as chain:  # the interpreter is for this thread alone
        assert isinstance(chain._encode(sent[0]), LatePacket)
        for x, out in zip(sent, chain.stream(sent), strict=True):
            assert same(out, x)
    assert whole(chain)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failed_stage_is_raised_by_receive_and_leaves_the_rings_whole(workers):
    with Chain(Broken(), depth=2, workers=workers) as chain:
        for _ in range(5):
            tickets = [chain.send(torch.ones(n)) for n in (1, 2, 3)]
            chain.fetch(tickets[1])
            for ticket, stage in zip(tickets, ("encode", "decode"), strict=False):
                for _ in range(2):
                    assert error_of(lambda ticket=ticket: chain.receive(ticket)) == (MemoryError, stage)
            assert tickets[0].done()
            assert chain.receive(tickets[2]).tolist() == [1, 1, 1]
        del tickets, ticket
        if not workers:
            gc.collect()  # errors hold the frames of their callers
        chain.flush()  # every error was received
        assert whole(chain)
        report = chain.report()
    assert (report.sent, report.received, report.failed, report.host_bytes) == (15, 5, 5, 0)


@pytest.mark.parametrize("stage", ["kernel", "inverse"])
def test_a_failed_kernel_is_raised_too(stage):
    def fail(x):
        raise ZeroDivisionError(stage)

    with Chain("raw", **{stage: fail}) as chain:
        with pytest.raises(ZeroDivisionError, match=stage):
            chain.receive(chain.send(torch.ones(3)))
        chain.flush()
        assert whole(chain)


def test_an_error_nobody_received_is_raised_at_the_end():
    chain = Chain(Broken())
    chain.send(torch.ones(1))
    with pytest.raises(MemoryError, match="encode"):
        chain.flush()
    chain.flush()  # once
    chain.send(torch.ones(1))
    with pytest.raises(MemoryError, match="encode"):
        chain.close()
    chain.close()  # more calls do nothing
    with pytest.raises(MemoryError, match="encode"), Chain(Broken()) as chain:
        chain.send(torch.ones(1))
    with pytest.raises(ValueError, match="of the program"), Chain(Broken()) as chain:
        chain.send(torch.ones(1))
        raise ValueError("of the program")


def test_an_error_is_in_the_books_before_anybody_hears_of_it(monkeypatch):
    class Told(Future):
        def set_exception(self, error):
            known.append(error in chain._errors)
            super().set_exception(error)

    known = []
    monkeypatch.setattr(chain_module, "Future", Told)
    chain = Chain(Broken())
    with pytest.raises(MemoryError, match="encode"):
        chain.receive(chain.send(torch.ones(1)))
    chain.close()
    assert known and all(known)


def test_an_error_holds_no_tensor():
    with Chain(Broken()) as chain:
        x = torch.ones(1)
        seen = weakref.ref(x.untyped_storage())
        ticket = chain.send(x)
        assert error_of(lambda: chain.receive(ticket)) == (MemoryError, "encode")
        del x
        gc.disable()
        try:
            chain.send(torch.ones(3))
            chain.flush()
            assert seen() is None
        finally:
            gc.enable()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [ExactLane, Late])
def test_nothing_leaks_without_gc(workers, make):
    gc.collect()
    gc.disable()
    try:
        chain = Chain(make(), workers=workers)
        ticket = chain.send(torch.randn(100))
        chain.receive(ticket)
        chain.fetch(ticket)
        chain.flush()
        dead = [weakref.ref(chain), weakref.ref(ticket), *map(weakref.ref, chain._stages.rings.values())]
        budget = chain._host
        assert budget.held > 0
        del chain, ticket
        assert not any(each() for each in dead) and budget.held == 0
    finally:
        gc.enable()


def test_host_memory_is_bounded():
    x = torch.zeros(1000, dtype=torch.uint8)
    size = open_lane("raw").encode(x).nbytes
    with Chain("raw", host_budget=2 * size) as chain:
        tickets = [chain.send(x) for _ in range(2)]
        chain.flush()
        with pytest.raises(BudgetError, match="raise host_budget"):
            chain.receive(chain.send(x))
        del tickets[0]
        assert same(chain.receive(chain.send(x)), x)
        assert same(chain.receive(tickets[0]), x)
        assert chain.report().host_peak == 2 * size
    assert whole(chain)


def test_a_stream_holds_depth_tensors_and_can_be_left():
    sent = 0

    def source():
        nonlocal sent
        for sent in range(1, 100):
            yield torch.full((3,), float(sent))

    with Chain("raw", depth=3) as chain:
        for i, out in enumerate(chain.stream(source()), 1):
            assert out.tolist() == [i] * 3 and sent <= i + 2
            if i == 10:
                break
        assert chain.report().sent == 12
        assert list(chain.stream([])) == []
        gc.collect()
        chain.flush()
        assert chain.report().host_bytes == 0


def test_threads_share_a_chain():
    failures = []

    def work(seed):
        for i in range(50):
            x = torch.full((seed + 1, 7), float(i))
            if not same(chain.receive(chain.send(x)), x):
                failures.append((seed, i))

    with Chain("exact", depth=2, workers=2) as chain:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures and chain.report().received == 200


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("make", [RawLane, Late])
def test_interrupts_lose_no_slot(workers, make):
    with Chain(make(), depth=2, workers=workers) as chain, suppress(Interrupt):
        x, hits = torch.ones(3), 0
        with interrupts(chain_module, streams_module, ticket_module) as armed:
            while hits < 15:
                ticket = None
                armed.on = True
                try:
                    ticket = chain.send(x)
                    chain.receive(ticket)
                except Interrupt:
                    hits += 1
                armed.on = False
        ticket = None
        chain.flush()
        assert whole(chain)
        assert same(chain.receive(chain.send(x)), x)
        assert chain.report().host_bytes == 0


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_trace_is_a_timeline(tmp_path, workers):
    xs = [torch.randn(200, 50) for _ in range(8)]
    with Chain("raw", trace=True, workers=workers, kernel=torch.neg, inverse=torch.neg) as chain:
        for out in chain.stream(xs):
            with chain.span("program", "cpu", nbytes=7):
                out.sum()
        trace = chain.trace()
        wire = chain.report().bytes_wire // 8
    trace.save(tmp_path / "trace.json")
    trace.save(tmp_path / "trace.png")
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    rows, stages, sizes = defaultdict(list), defaultdict(dict), defaultdict(set)
    for event in events:
        if event["ph"] == "X":
            begin, end = event["ts"], event["ts"] + event["dur"]
            assert 0 <= begin <= end and names[event["tid"]] == f"{event['cat']} cpu"
            rows[event["tid"]].append((begin, end))
            stage = event["cat"].split()[0]
            stages[stage][event["args"]["item"]] = begin, end
            sizes[stage].add(event["args"]["bytes"])
    for row in rows.values():  # one stream each
        assert all(end <= begin + 1e-3 for (_, end), (begin, _) in pairwise(sorted(row)))
    order = ["kernel", "encode", "store", "load", "decode", "inverse"]
    assert set(stages) == {*order, "program"} and all(sorted(s) == list(range(8)) for s in stages.values())
    for item in range(8):
        assert all(stages[a][item][1] <= stages[b][item][0] + 1e-3 for a, b in pairwise(order))
    raw = xs[0].nbytes
    assert sizes == {
        "kernel": {raw}, "encode": {raw}, "store": {wire}, "load": {wire}, "decode": {raw}, "inverse": {raw},
        "program": {7},
    }  # fmt: skip
    assert trace.busy("encode") == pytest.approx(sum(b - a for a, b in stages["encode"].values()) / 1e6)


def test_a_trace_must_be_asked_for(tmp_path, monkeypatch):
    with Chain() as chain:
        with chain.span("program"):
            pass
        with pytest.raises(LaneError, match="trace=True"):
            chain.trace()
    with Chain(trace=True) as chain:
        trace = chain.trace()
    with pytest.raises(LaneError, match=r"'trace\.txt'"):
        trace.save(tmp_path / "trace.txt")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(LaneUnavailable, match="pip install matplotlib"):
        trace.save(tmp_path / "trace.png")


def test_the_report_adds_up():
    xs = [torch.randn(64, 64).bfloat16() for _ in range(3)]
    with Chain("packed", bits=8) as chain:
        tickets = [chain.send(x) for x in xs]
        list(chain.receive_all(tickets))
        report = chain.report()
    packet = open_lane("packed", bits=8).encode(xs[0])
    assert (report.lane, report.sent, report.received, report.failed) == ("packed", 3, 3, 0)
    assert report.bytes_in == 3 * xs[0].nbytes and report.bytes_wire == 3 * packet.nbytes
    assert report.host_bytes == report.host_peak == report.bytes_wire
    assert report.ratio == pytest.approx(packet.ratio)
    assert str(report).startswith("packed: sent 3, received 3, failed 0; 0.0 MiB as")


def test_bad_arguments_are_refused():
    for options, text in (
        ({"lane": "nope"}, "unknown lane"),
        ({"bits": 3, "lane": "packed"}, "bits"),
        ({"depth": 0}, "depth"),
        ({"workers": -1}, "workers"),
        ({"streams": True}, "streams"),
        ({"host_budget": -1}, "host_budget"),
        ({"device": "nope"}, "device"),
        ({"max_rel_error": -1}, "max_rel_error"),
        ({"kernel": 5}, "kernel=5 is no function"),
        ({"inverse": "x"}, "inverse='x' is no function"),
        ({"priority": "x"}, "priority='x'"),
    ):
        with pytest.raises(LaneError, match=text):
            Chain(**options)
    with Chain() as chain, Chain() as other:
        ticket = chain.send(torch.ones(3))
        for bad in (ticket, None):
            with pytest.raises(LaneError, match="no ticket of this chain"):
                other.receive(bad)
        with pytest.raises(LaneError, match="not a plain tensor"):
            chain.send([1.0])
        with pytest.raises(LaneError, match="meta"):
            chain.send(torch.ones(3, device="meta"))
    for call in (lambda: chain.send(torch.ones(3)), lambda: chain.receive(ticket)):
        with pytest.raises(LaneError, match="closed"):
            call()


def test_the_face_shows_it():
    assert sidelane.Chain is Chain


def test_an_error_before_a_tensor_is_read_ends_the_wait_for_it(monkeypatch):
    from sidelane.pipeline.stages import Stages

    stream = Stages.stream

    def fail(self, stage, device):
        if stage == "encode":
            raise RuntimeError("no stream can be made")
        return stream(self, stage, device)

    monkeypatch.setattr(Stages, "stream", fail)
    chain = Chain("raw")
    ticket = chain.send(torch.ones(4))
    for wait in (ticket.join, lambda: chain.receive(ticket)):
        with pytest.raises(RuntimeError, match="no stream can be made"):
            wait()
    chain.close()
