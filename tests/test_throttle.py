"""The token bucket under a clock that only sleeping moves, and copies through it."""

from __future__ import annotations

import threading
from math import inf, nan

import pytest
import torch

from sidelane.errors import LaneError
from sidelane.pipeline import throttle
from sidelane.pipeline.throttle import CHUNKS, SLACK, TokenBucket

MB = 1_000_000
RATES = [125e6, 1.25e9, 3e9, 7e9, 12.5e9, 25e9]  # bytes per second


class Clock:
    """Time that passes while somebody sleeps, `late` seconds longer than asked, or asks for it."""

    def __init__(self, late: float = 0.0) -> None:
        self.now = 100.0
        self.late = late
        self.longest = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-7
        return self.now

    def sleep(self, seconds: float) -> None:
        self.longest = max(self.longest, seconds)
        self.now += seconds + (self.late if seconds else 1e-6)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(late=60e-6)
    monkeypatch.setattr(throttle, "perf_counter", clock.perf_counter)
    monkeypatch.setattr(throttle, "sleep", clock.sleep)
    return clock


@pytest.mark.parametrize("rate", RATES)
def test_one_piece_takes_its_time_on_the_wire(clock: Clock, rate: float) -> None:
    wire = TokenBucket(rate, burst=0)
    begin = clock.now
    end = wire.take(64 * MB)
    assert end - begin == pytest.approx(64 * MB / rate, rel=1e-3)
    assert 0 <= clock.now - end < 3e-6


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("late", [60e-6, 900e-6])
def test_pieces_in_a_row_keep_the_rate_however_late_the_thread_wakes(clock: Clock, rate, late) -> None:
    clock.late = late
    wire = TokenBucket(rate)
    begin, sent = clock.now, None
    for _ in range(500):
        sent = wire.take(int(rate * 5e-4), sent)
    assert sent - begin == pytest.approx(0.25, rel=1e-3)
    assert clock.now - begin == pytest.approx(0.25, abs=late + SLACK + 5e-6)


def test_bytes_that_came_late_are_not_sent_before_they_came(clock: Clock) -> None:
    wire = TokenBucket(1e9, burst=0)
    first = wire.take(MB)
    clock.now += 1.0
    assert wire.take(MB) == pytest.approx(first + 1.0 + 1e-3, abs=1e-5)


def test_a_pause_saves_up_the_burst_and_no_more(clock: Clock) -> None:
    wire = TokenBucket(1e9, burst=MB)
    clock.now += 10.0
    begin = clock.now
    wire.take(MB)
    assert clock.now - begin < 1e-6
    wire.take(MB)
    assert clock.now - begin == pytest.approx(1e-3, rel=1e-2)
    assert TokenBucket(1e9).burst == pytest.approx(1e9 * SLACK)


def test_a_grant_waits_for_nothing(clock: Clock) -> None:
    wire, begin = TokenBucket(1e9, burst=0), clock.now
    ends = [wire.grant(MB) for _ in range(3)]
    assert clock.now - begin < 1e-5
    assert ends == pytest.approx([begin + (i + 1) * 1e-3 for i in range(3)], abs=1e-5)


def test_nothing_takes_no_time(clock: Clock) -> None:
    begin = clock.now
    TokenBucket(1e3, burst=0).take(0)
    assert clock.now - begin < 1e-6


def test_two_threads_share_one_wire() -> None:
    """Real time: together they are never faster than the wire, and the wire never stands still for long."""
    wire = TokenBucket(1e9, burst=0)
    ends: list[float] = []
    lock = threading.Lock()

    def send() -> None:
        sent = None
        for _ in range(40):
            sent = wire.take(500_000, sent)
            with lock:
                ends.append(sent)

    threads = [threading.Thread(target=send) for _ in range(2)]
    begin = throttle.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ends.sort()
    assert ends[-1] - begin >= 80 * 500_000 / 1e9
    for one, other in zip(ends, ends[1:], strict=False):
        assert other - one >= 500_000 / 1e9 * 0.999


@pytest.mark.parametrize("rate", [0, -1.0, inf, nan, "7", None, True])
def test_bad_rates(rate) -> None:
    with pytest.raises(LaneError, match="rate="):
        TokenBucket(rate)


@pytest.mark.parametrize("burst", [-1, inf, nan, "1", False])
def test_bad_bursts(burst) -> None:
    with pytest.raises(LaneError, match="burst="):
        TokenBucket(1e9, burst)


@pytest.mark.parametrize("nbytes", [-1, 1.5, None])
def test_bad_sizes(nbytes) -> None:
    for call in (TokenBucket(1e9).take, TokenBucket(1e9).grant):
        with pytest.raises(LaneError, match="nbytes="):
            call(nbytes)


@pytest.mark.parametrize("chunk", [None, 1000, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.complex64, torch.uint8])
def test_a_copy_arrives_in_full(clock: Clock, chunk, dtype) -> None:
    source = torch.randint(0, 2, (301, 7)).to(dtype)
    target = torch.zeros_like(source)
    TokenBucket(1e9).copy(source, target, chunk=chunk).synchronize()
    assert torch.equal(source, target)


@pytest.mark.parametrize("rate", RATES)
def test_a_copy_takes_its_time_and_sleeps_between_chunks(clock: Clock, rate) -> None:
    nbytes = int(rate * 0.02)
    source = torch.zeros(nbytes, dtype=torch.uint8)
    begin = clock.now
    TokenBucket(rate, burst=0).copy(source, torch.empty_like(source))
    assert clock.now - begin == pytest.approx(0.02, rel=0.01)
    assert clock.longest <= CHUNKS[0] / rate + throttle.PACE


def test_an_empty_copy() -> None:
    TokenBucket(1e9).copy(torch.empty(0), torch.empty(0))


@pytest.mark.parametrize(
    ("source", "target", "text"),
    [
        (torch.zeros(4, 4).t()[:2], torch.zeros(8), "contiguous"),
        (torch.zeros(4), torch.zeros(5), "16 bytes do not fit into 20"),
        (torch.zeros(4), torch.zeros(4, device="meta"), "CPU or CUDA"),
    ],
)
def test_copies_that_cannot_be(source, target, text) -> None:
    with pytest.raises(LaneError, match=text):
        TokenBucket(1e9).copy(source, target)
    with pytest.raises(LaneError, match="chunk="):
        TokenBucket(1e9).copy(torch.zeros(4), torch.zeros(4), chunk=0)
