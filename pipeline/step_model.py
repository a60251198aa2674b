"""The model of a training step: what choices for its saved tensors make of its time and memory. Pure: no GPU,
no torch.

Note: [Model of a step]
The compute stream runs through the step; its clock is what computing alone takes plus all that was added so
far. To keep a tensor adds nothing and holds its bytes until its last use. To encode one adds the encode when
it is saved and the decode when it is used. What goes away is copied out in order of saving by one engine
and copied in by another, newest first; it holds memory until room is needed, and then the compute stream
waits for its copy. In backward it is fetched as soon as the budget has room, less and less of it the further
backward comes down. A recomputed block saves its inputs alone and adds its forward time again. `simulate`
follows the engine in `moves.py` step by step, so that what is predicted is what it does.
The host has a clock of its own, to which every tensor adds what its choice costs there. Where a step begins
with both clocks level, the device waits whenever the host comes later than it could go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

AHEAD = 256 << 20  # bytes that may always be fetched ahead
KEEP, DERIVED, HERE, AWAY = "keep", "derived", "here", "away"
UPPER = "upper halves"  # as the name of a lane, see `derive`
NO_HOST = 0.0, 0.0

_FREE, _SAVE, _USE, _AGAIN, _FREE_AT_ONCE = range(5)  # in this order where times are equal


def allowed_ahead(limit: float, gradients: float, again: float, left: float) -> float:
    """Bytes that may be held when something is fetched ahead and the share `left` of the saved tensors is not
    used yet: `gradients`, all there at the end, and the `again` bytes of a block that runs again take the
    room of activations."""
    return min(limit, max(limit - gradients * (1 - left) - again, AHEAD))


@dataclass(frozen=True)
class Code:
    """One way to encode a tensor: its bytes then, and the seconds that the compute stream spends on it. That
    of lane "derived" has none."""

    lane: str
    nbytes: int
    encode: float = 0.0
    decode: float = 0.0


@dataclass(frozen=True)
class Saved:
    """A tensor that is saved for backward.

    Attributes:
        nbytes: as it is.
        saved, used, freed: when it is saved, first used and no longer needed, in seconds of computing alone
            since the step began.
        codes: those that may be used; one of lane "raw" for sending it as it is.
        block: in which it is saved, -1 for none.
        boundary: an input of the block, saved only if that is recomputed; others of a block only if not.
        host_times: when the host comes to save and to use it, in seconds of the program alone since the step
            began.
        count: how many tensors this one stands for.
    """

    nbytes: int
    saved: float
    used: float
    freed: float
    codes: tuple[Code, ...] = ()
    block: int = -1
    boundary: bool = False
    host_times: tuple[float, float] = NO_HOST
    count: int = 1

    def is_saved(self, again: bool) -> bool:
        """Whether it is, where `again` says if its block runs again."""
        return self.block < 0 or again == self.boundary


@dataclass(frozen=True)
class Block:
    """Part of the forward pass that can run again.

    Attributes:
        seconds: of its forward pass.
        used, freed: when backward comes to it and leaves it.
        repeatable: running it again gives the same and changes nothing else.
        host_seconds: of the host for its forward pass.
    """

    seconds: float
    used: float
    freed: float
    repeatable: bool = True
    host_seconds: float = 0.0


@dataclass(frozen=True)
class Step:
    """A forward and backward pass.

    Attributes:
        saved: in order of saving.
        seconds: of computing alone, forward and backward.
        out, back: seconds over bytes of the wires off the device and back; None where there are none.
        gradients: bytes of gradients at the end of backward.
        host_cost: seconds of the host to save and to use a tensor with a choice; None where it is never late.
    """

    saved: tuple[Saved, ...]
    blocks: tuple[Block, ...]
    seconds: float
    out: Callable[[int], float] | None = None
    back: Callable[[int], float] | None = None
    gradients: int = 0
    host_cost: Callable[[Choice], tuple[float, float]] | None = None


class Choice(NamedTuple):
    """What to do with a tensor: "keep" it, make it again from others ("derived"), keep its code "here", or
    send its code "away"."""

    place: str
    lane: str = "raw"


KEPT = Choice(KEEP)
DERIVE = Choice(DERIVED, DERIVED)


@dataclass(frozen=True)
class Forecast:
    """What a simulation says.

    Attributes:
        seconds: of the step.
        held: most bytes of saved tensors on the device at once; `working`: with gradients, and what a block
            that runs again holds while its backward pass does.
        again_bytes: most that a block holds which runs again.
        away: bytes that leave.
        coding, again: seconds of codes and of recomputing.
        waited_out, waited_back: seconds in which computing waits for a copy out, or a copy back;
            waited_host: for the host.
    """

    seconds: float
    held: int
    working: int
    again_bytes: int
    away: int
    coding: float
    again: float
    waited_out: float
    waited_back: float
    waited_host: float = 0.0


class Option(NamedTuple):
    """A choice for one tensor, and what it costs there: bytes of its code, seconds of the compute stream to
    encode and decode it, seconds of the wires, and of the host to save and to use it."""

    choice: Choice
    nbytes: int
    encode: float
    decode: float
    out: float
    back: float
    host_costs: tuple[float, float]

    @property
    def resident(self) -> int:
        """Bytes that stay on the device."""
        return 0 if self.choice.place == AWAY else self.nbytes


class Simulator:
    """Simulates one step under many choices."""

    def __init__(self, step: Step, limit: float) -> None:
        self.step = step
        self.limit = limit
        options: dict[object, tuple[Option, ...]] = {}  # many tensors are alike
        for saved in step.saved:
            if (saved.nbytes, saved.codes, saved.count) not in options:
                options[saved.nbytes, saved.codes, saved.count] = tuple(_options(step, saved))
        self.options = tuple(options[saved.nbytes, saved.codes, saved.count] for saved in step.saved)
        events: list[tuple[float, int, int]] = []
        for i, saved in enumerate(step.saved):
            free = _FREE if saved.freed > saved.used else _FREE_AT_ONCE
            events += [(saved.saved, _SAVE, i), (saved.used, _USE, i), (saved.freed, free, i)]
        events += [(block.used, _AGAIN, b) for b, block in enumerate(step.blocks)]
        self._events = sorted(events)
        self._saved_when = [(s.block, (s.is_saved(False), s.is_saved(True))) for s in step.saved]
        self._host_times = [saved.host_times for saved in step.saved]
        self._block_bytes = [0] * len(step.blocks)
        for saved in step.saved:
            if saved.block >= 0 and not saved.boundary:
                self._block_bytes[saved.block] += saved.nbytes

    def run(self, picks: Sequence[int], recompute: Sequence[bool]) -> Forecast:
        """`picks`: of each saved tensor, which of its options."""
        step, limit, count = self.step, self.limit, len(self.step.saved)
        chosen = [mine[pick] for mine, pick in zip(self.options, picks, strict=True)]
        again_by_block = (*recompute, False)  # [-1] for no block
        is_saved = [when[again_by_block[block]] for block, when in self._saved_when]
        follow_host, host_times = step.host_cost is not None, self._host_times
        gradients, unused = step.gradients, 1.0  # bytes in the end; share of saved tensors not used yet
        largest = max((n for n, flag in zip(self._block_bytes, recompute, strict=True) if flag), default=0)
        delay = host_delay = 0.0  # of both clocks behind the program alone
        out_free = in_free = 0.0  # when the copy engines are
        coding = again = waited_out = waited_back = waited_host = 0.0
        held = peak = working = sent = 0
        copied, arrived = [0.0] * count, [-1.0] * count  # when the copies of each are done
        leaving: deque[int] = deque()  # on the device, copied out or about to be
        evicted = [False] * count
        fetchable: list[int] = []  # evicted, newest last
        for time, kind, i in self._events:
            if kind == _AGAIN:
                if recompute[i]:
                    delay += step.blocks[i].seconds
                    again += step.blocks[i].seconds
                    host_delay += step.blocks[i].host_seconds
                    grown = gradients * (1 - unused) + self._block_bytes[i]
                    working = max(working, held + int(grown))
                continue
            if not is_saved[i]:
                continue
            choice, nbytes, encode, decode, out, back, host_costs = chosen[i]
            if follow_host and kind in (_SAVE, _USE):
                # The device idles until the host has come here.
                waits = host_times[i][kind == _USE] + host_delay - time - delay
                if waits > 0:
                    delay += waits
                    waited_host += waits
                host_delay += host_costs[kind == _USE]
            if kind == _SAVE:
                delay += encode
                coding += encode
                while leaving and held + nbytes > limit:
                    # Make room: the oldest goes once it is copied out.
                    j = leaving.popleft()
                    if copied[j] > time + delay:
                        waited_out += copied[j] - time - delay
                        delay = copied[j] - time
                    held -= chosen[j].nbytes
                    evicted[j] = True
                    fetchable.append(j)
                if choice.place == AWAY:
                    copied[i] = out_free = max(out_free, time + delay) + out
                    sent += nbytes
                    if held + nbytes > limit:
                        waited_out += out_free - time - delay
                        delay = out_free - time
                        evicted[i] = True
                        fetchable.append(i)
                        continue
                    leaving.append(i)
                held += nbytes
                if held > peak:
                    peak = held
            elif kind == _USE:
                if evicted[i]:
                    now = time + delay
                    if arrived[i] < 0:
                        # Not fetched ahead.
                        fetchable.remove(i)
                        in_free = arrived[i] = max(now, in_free, copied[i]) + back
                        held += nbytes
                    if arrived[i] > now:
                        waited_back += arrived[i] - now
                        delay += arrived[i] - now
                delay += decode
                coding += decode
                unused = (i + 1) / count
                grown = held + gradients * (1 - unused)
                if grown > working:
                    working = int(grown)
                if fetchable:
                    # Fetch ahead, newest first, as far as there is room.
                    now, allowed = time + delay, allowed_ahead(limit, gradients, largest, unused)
                    while fetchable:
                        j = fetchable[-1]
                        option = chosen[j]
                        if held + option.nbytes > allowed:
                            break
                        fetchable.pop()
                        held += option.nbytes
                        in_free = arrived[j] = max(now, in_free, copied[j]) + option.back
            else:
                held -= nbytes
        return Forecast(
            seconds=step.seconds + delay,
            held=peak,
            working=max(peak, working),
            again_bytes=largest,
            away=sent,
            coding=coding,
            again=again,
            waited_out=waited_out,
            waited_back=waited_back,
            waited_host=waited_host,
        )


def simulate(step: Step, choices: Sequence[Choice], recompute: Sequence[bool], limit: float) -> Forecast:
    """What these choices make of the step. Raises ValueError for one that a tensor does not have."""
    simulator = Simulator(step, limit)
    picks = [
        next((n for n, option in enumerate(options) if option.choice == choice), None)
        for options, choice in zip(simulator.options, choices, strict=True)
    ]
    if None in picks:
        raise ValueError(f"{choices[picks.index(None)]} is not possible for tensor {picks.index(None)}")
    return simulator.run([pick for pick in picks if pick is not None], recompute)


def _options(step: Step, saved: Saved) -> Iterator[Option]:
    """First to keep it."""

    def host(choice: Choice) -> tuple[float, float]:
        save, use = (0.0, 0.0) if step.host_cost is None else step.host_cost(choice)
        return saved.count * save, saved.count * use

    yield Option(KEPT, saved.nbytes, 0.0, 0.0, 0.0, 0.0, host(KEPT))
    for code in saved.codes:
        if code.nbytes < saved.nbytes:
            here = DERIVE if code.lane == DERIVED else Choice(HERE, code.lane)
            yield Option(here, code.nbytes, code.encode, code.decode, 0.0, 0.0, host(here))
        if code.lane != DERIVED and step.out is not None and step.back is not None:
            away, wires = Choice(AWAY, code.lane), (step.out(code.nbytes), step.back(code.nbytes))
            yield Option(away, code.nbytes, code.encode, code.decode, *wires, host(away))
