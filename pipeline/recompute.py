"""Keys and values in host memory, some of which are computed again from the inputs of their layer (KVPR,
arXiv 2411.17089).

An input is half as large as keys and values together where every query head has its own, so it crosses the
wire in half the time; the product that makes keys and values of it runs while those of the other tokens are
in flight:

    copy stream     X[0:l] | K[l:], V[l:]
    compute stream         | K[0:l], V[0:l] = X W_k, X W_v

Here inputs cross in pieces, and the product of each piece runs while the next ones are in flight too. How
many tokens l that pays for is `planner.kv_split`. With grouped queries an input is larger than keys and
values, and l is 0.

Note: [Not the same bits]
A product of another shape may be summed in another order than the one that made the stored keys and values.
Recomputed ones are equal within the rounding of both: where sums are kept in float32, a difference is at most
eps |k| + 2 n u |x| |W|, with eps of the dtype, u = 2^-24 and n the width. What is loaded as it is, or through
an exact lane, keeps every bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import inf
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import Linear

from sidelane.codec.lane import Lane
from sidelane.errors import BudgetError, LaneError
from sidelane.pipeline.arena import Arena, shared
from sidelane.pipeline.budget import Budget
from sidelane.pipeline.compress import choose_lane
from sidelane.pipeline.lanes import plain
from sidelane.pipeline.planner import Split, kv_split
from sidelane.pipeline.streams import (
    MAX_DEPTH,
    Event,
    HostEvent,
    Ring,
    Slot,
    current_stream,
    on,
    side_stream,
)
from sidelane.pipeline.ticket import Stored

if TYPE_CHECKING:
    from sidelane.pipeline.machine import Machine

BLOCK = 64  # tokens in a packet, and of which the split is a multiple
PIECES = 8
PIECE_ROWS = 2048  # of a matrix that keeps a large GPU busy
DEPTH = 4  # packets on the device that wait for their decoder
Rotate = Callable[[Tensor, Tensor], Tensor]
Copy = Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class Rates:
    """Of the wire from host memory, in bytes per second, and of a product with the weights, in FLOP per
    second. Raises LaneError unless both are above 0."""

    wire: float
    compute: float

    def __post_init__(self) -> None:
        if not (self.wire > 0 and self.compute > 0):
            raise LaneError(f"{self}: both rates are numbers above 0")

    @classmethod
    def of(cls, machine: Machine, nbytes: int) -> Rates:
        """From a profile, for transfers of `nbytes`. Raises LaneError when it has no wire to a GPU."""
        if "h2d" not in machine.wires:
            raise LaneError("the profile has no wire 'h2d': measure one where there is a GPU, or pass Rates")
        return cls(machine.wires["h2d"].rate(nbytes), machine.gemm)


class StoredKV:
    """Keys and values of one layer in host memory, with its inputs.

        stored = StoredKV(x, kv, attention.k_proj, attention.v_proj, rotate=rotate)
        ...
        keys, values = stored.restore()

    Shapes have tokens first, so that any run of tokens is one piece of memory; a batch comes after them.
    Everything is read on the current stream of its device before the constructor returns control of it: the
    tensors may be changed or dropped at once.

    Args:
        x: [tokens, ..., width], the inputs that `keys` and `values` made `kv` of. This is not checked: with
            others, what is recomputed is not what was stored.
        kv: [2, tokens, ..., heads, dim], of the dtype of the weights, on any device.
        keys, values: the projections, [width, heads * dim] each. `restore` gives tensors on their device.
        rotate: keys [n, ..., heads, dim] and positions [n] of a piece to the keys that are stored: RoPE, a
            norm before it. None where keys are stored as projected.
        positions: [tokens], what `rotate` gets; default 0, 1, 2, ...
        lane, x_lane: for keys and values, for inputs, by name or a lane as for `compress`; packets of `block`
            tokens. Default: as they are.
        limit: inputs of so many tokens in front are kept, and no more are recomputed. Default: all, or none
            when they are no smaller than keys and values and `x_lane` is None.
        block: tokens.
        pieces: of the inputs, at most; each has whole blocks and `PIECE_ROWS` rows. 1: as KVPR does it.
            Default: 8, or 1 with a lane, whose decoder gets few turns between short products.
        rates: of this machine. Default: `measure` when first needed, which waits for the device.
        arena: the host memory of what has no lane; default: that of the process.
        copy: (to, from), enqueues a copy from host memory on the current stream, for what has no lane;
            another one may imitate another wire, but may not wait.

    Raises LaneError for types, shapes, dtypes and numbers that do not fit, LaneUnavailable for a lane that
    does not run here, BudgetError without room in host memory.
    """

    def __init__(
        self,
        x: Tensor,
        kv: Tensor,
        keys: Linear,
        values: Linear,
        *,
        rotate: Rotate | None = None,
        positions: Tensor | None = None,
        lane: str | Lane | None = None,
        x_lane: str | Lane | None = None,
        limit: int | None = None,
        block: int = BLOCK,
        pieces: int | None = None,
        rates: Rates | None = None,
        arena: Arena | None = None,
        copy: Copy | None = None,
    ) -> None:
        _check_types(x, kv, keys, values, rotate, positions)
        _check_shapes(x, kv, keys, values)
        if rates is not None and not isinstance(rates, Rates):
            raise LaneError(f"rates is a {type(rates).__name__}: pass Rates, or leave it out to measure them")
        x, kv = plain(x), plain(kv)
        lane, x_lane = _opened(lane), _opened(x_lane)
        self.tokens = kv.shape[1]
        self.device = keys.weight.device
        self.block = _whole("block", block, 1)
        self._divisible = lane is None and x_lane is None
        if pieces is None:
            pieces = PIECES if self._divisible else 1
        self._pieces = _whole("pieces", pieces, 1)
        if limit is not None:
            limit = min(_whole("limit", limit, 0), self.tokens)
        if positions is not None and positions.shape != (self.tokens,):
            raise LaneError(f"positions {tuple(positions.shape)} are not those of {self.tokens} tokens")
        self._rates = rates
        self._keys, self._values, self._rotate = keys, values, rotate
        self._positions = (
            torch.arange(self.tokens, device=self.device) if positions is None else positions.to(self.device)
        )
        self._shape, self._dtype = kv.shape, kv.dtype
        raw = partial(_RawRows, arena=arena or shared(), copy=copy or _copy)
        self._kv = [raw(rows) if lane is None else _LaneRows(rows, lane, block, self.device) for rows in kv]
        self._x_bytes = float(x[0].nbytes)  # of a token
        if limit is None:
            gains = x_lane is not None or self._x_bytes * self.tokens < self.kv_nbytes
            limit = self.tokens if gains else 0
        if not self._divisible and limit < self.tokens:
            limit -= limit % block
        self.limit = limit
        kept = x[:limit]
        self._x = raw(kept) if x_lane is None else _LaneRows(kept, x_lane, block, self.device)
        if limit:
            self._x_bytes = self._x.nbytes / limit
        self._x_shape = x.shape[1:]
        self.flops = 2 * x[0].numel() * (keys.out_features + values.out_features)  # of a token

    @property
    def nbytes(self) -> int:
        """What is held in host memory."""
        return self.kv_nbytes + self._x.nbytes

    @property
    def kv_nbytes(self) -> int:
        """Bytes of keys and values on the wire."""
        return sum(rows.nbytes for rows in self._kv)

    def split(self, rates: Rates | None = None) -> Split:
        """How many tokens `restore` recomputes by itself, and the seconds that is to take.

        Args:
            rates: to ask for another machine.
        """
        if rates is None:
            rates = self._rates = self._rates or self.measure()
        return kv_split(
            self.tokens,
            self._x_bytes,
            self.kv_nbytes / self.tokens,
            self.flops,
            rates.wire,
            rates.compute,
            self.limit,
            self.block,
            max(len(self._cut(self.limit)), 1),
        )

    def measure(self, repeats: int = 5) -> Rates:
        """Rates of `restore` at this shape: of keys and values that are all loaded, and of the products for
        as many tokens as `limit`. Waits for the device."""
        out = self.empty()
        wire = self.kv_nbytes / _seconds(lambda: self.restore(0, out=out), self.device, repeats)
        if not self.limit:
            return Rates(wire, inf)
        x = torch.empty(self.limit, *self._x_shape, dtype=self._dtype, device=self.device)
        stream = current_stream(self.device)
        stream.wait_event(self._x.load(0, self.limit, x, stream))

        def recompute() -> None:
            for part in self._cut(self.limit):
                self._recompute(part, x, out)

        compute = _seconds(recompute, self.device, repeats)
        return Rates(wire, self.limit * self.flops / compute)

    def empty(self) -> Tensor:
        """Memory for `restore`."""
        return torch.empty(self._shape, dtype=self._dtype, device=self.device)

    def restore(self, tokens: int | None = None, *, out: Tensor | None = None) -> Tensor:
        """Keys and values [2, tokens, ..., heads, dim], for work on the current stream. The host waits for
        nothing.

        Args:
            tokens: how many in front to recompute; default: `split`.
            out: where to put them, contiguous; see `empty`.

        Raises LaneError for numbers above `limit` and for memory of another kind.
        """
        front = self.split().tokens if tokens is None else _whole("tokens", tokens, 0)
        if front > self.limit:
            raise LaneError(f"tokens={front}: inputs of {self.limit} tokens are kept, set by limit")
        if front % self.block and front != self.tokens and not self._divisible:
            raise LaneError(f"tokens={front} is no multiple of the {self.block} tokens in a packet")
        out = self.empty() if out is None else out
        if not isinstance(out, Tensor):
            raise LaneError(f"out is a {type(out).__name__}: pass what empty() returns")
        kind = out.shape, out.dtype, out.device, out.is_contiguous()
        if kind != (self._shape, self._dtype, self.device, True):
            raise LaneError(f"out {tuple(out.shape)} is not like what empty() returns")
        x = torch.empty(front, *self._x_shape, dtype=self._dtype, device=self.device)
        stream, wire = current_stream(self.device), side_stream(self.device, "copy in")
        wire.wait_event(stream.record_event())  # whoever used this memory before
        pieces = self._cut(front)
        arrived: list[Event] = []
        try:
            for piece in pieces:
                arrived.append(self._x.load(piece.start, piece.stop, x[piece], wire))
            for rows, part in zip(self._kv, out, strict=True):
                arrived.append(rows.load(front, self.tokens, part[front:], wire))
            for piece, event in zip(pieces, arrived, strict=False):
                stream.wait_event(event)
                self._recompute(piece, x, out)
        finally:  # the memory may be dropped after this, also if `rotate` fails
            for event in arrived:
                stream.wait_event(event)
        return out

    def _cut(self, front: int) -> list[slice]:
        """The pieces in which the inputs of so many tokens cross."""
        rows = self._x_shape[:-1].numel()  # of a token
        step = max(-(-front // self._pieces), -(-PIECE_ROWS // rows))
        step = -(-step // self.block) * self.block
        return [slice(start, min(start + step, front)) for start in range(0, front, step)]

    @torch.no_grad()
    def _recompute(self, piece: slice, x: Tensor, out: Tensor) -> None:
        """Keys and values of a piece of `x` [l, ..., width] into `out` [2, tokens, ..., heads, dim]."""
        rows, made = x[piece].flatten(0, -2), out[:, piece]
        for linear, part in zip((self._keys, self._values), made, strict=True):
            to, weight = part.view(rows.shape[0], -1), linear.weight.t()
            if linear.bias is None:
                torch.mm(rows, weight, out=to)
            else:
                torch.addmm(linear.bias, rows, weight, out=to)
        if self._rotate is not None:
            rotated = self._rotate(made[0], self._positions[piece])
            if not isinstance(rotated, Tensor) or rotated.shape != made[0].shape:
                raise LaneError(
                    f"rotate returned no tensor {list(made[0].shape)}: it keeps the shape of keys"
                )
            made[0].copy_(rotated)


def restore_all(layers: Iterable[StoredKV], ahead: int = 1) -> Iterator[Tensor]:
    """Keys and values of layers in order, `ahead` of them restored before they are asked for, on a stream of
    their own. Each is for work on the current stream, enqueued before the next one is asked for: then its
    memory is used again.

    Raises LaneError when `ahead` is no whole number from 0 to 4095.
    """
    if _whole("ahead", ahead, 0) >= MAX_DEPTH:
        raise LaneError(f"ahead={ahead} is not a whole number from 0 to {MAX_DEPTH - 1}")
    ring: Ring[Tensor] = Ring(ahead + 1)
    waiting: deque[Slot[Tensor]] = deque()
    for layer in layers:
        stream = side_stream(layer.device, "recompute", -1)
        slot = ring.take(stream)
        with on(stream):
            slot.fill(layer.restore())
        waiting.append(slot)
        del slot
        if len(waiting) > ahead:
            yield from _hand(waiting.popleft())
    while waiting:
        yield from _hand(waiting.popleft())


class _Rows(Protocol):
    """A tensor [tokens, ...] in host memory, of `nbytes` there."""

    nbytes: int

    def load(self, start: int, stop: int, out: Tensor, wire: Any) -> Event:
        """Enqueue a copy of tokens `start` to `stop` to `out`, over the stream `wire`; when it is done."""
        ...


class _RawRows:
    """In one piece, as they are."""

    def __init__(self, tensor: Tensor, arena: Arena, copy: Copy) -> None:
        self.nbytes = tensor.nbytes
        slot = arena.take(self.nbytes)
        if slot is None:
            raise BudgetError(
                f"host memory: {self.nbytes} bytes of keys, values or inputs find no room; lower limit"
            )
        stream = current_stream(tensor.device)
        slot.wait(stream)
        self._host = slot.tensor.view(tensor.dtype).view(tensor.shape)
        self._host.copy_(tensor, non_blocking=True)
        slot.released = self._ready = stream.record_event()
        self._slot, self._copy = slot, copy

    def load(self, start: int, stop: int, out: Tensor, wire: Any) -> Event:
        wire.wait_event(self._ready)
        if start < stop:
            with on(wire):
                self._copy(out, self._host[start:stop])
        event = self._slot.released = wire.record_event()
        return event  # type: ignore[no-any-return]


class _LaneRows:
    """As packets of `block` tokens, the last of what is left. They are decoded on a stream of their own."""

    def __init__(self, tensor: Tensor, lane: Lane, block: int, device: torch.device) -> None:
        self._decode, self._block, self._device = lane.decode, block, device
        self._packets: list[Stored] = []
        self._ring: Ring[Any] = Ring(DEPTH)
        stream = current_stream(tensor.device)
        for start in range(0, len(tensor), block):
            part = tensor[start : start + block]
            stored = Stored(lane.encode(part), part.nbytes, device)
            stored.write(Budget(), stream)
            self._packets.append(stored)
        self.nbytes = sum(stored.nbytes for stored in self._packets)

    def load(self, start: int, stop: int, out: Tensor, wire: Any) -> Event:
        decoder = side_stream(self._device, "decode", -1)
        for i in range(start // self._block, -(-stop // self._block) if start < stop else 0):
            stored, slot = self._packets[i], self._ring.take(wire)
            wire.wait_event(stored.ready)
            with on(wire):
                slot.fill(stored.read(wire))
            at = i * self._block - start
            with on(decoder):
                out[at : at + self._block].copy_(self._decode(slot.open(decoder)))
            slot.give()
        return decoder.record_event()  # type: ignore[no-any-return]


def _hand(slot: Slot[Tensor]) -> Iterator[Tensor]:
    tensor = slot.peek()
    yield slot.open(current_stream(tensor.device))
    slot.give()


def _copy(to: Tensor, source: Tensor) -> None:
    to.copy_(source, non_blocking=True)


def _seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median time of `work` on the current stream, which is done once before."""
    work()
    stream = current_stream(device)
    times = []
    for _ in range(repeats):
        begin = _mark(stream)
        work()
        end = _mark(stream)
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return float(median(times))


def _mark(stream: Any) -> Any:
    if stream.device.type == "cpu":
        return HostEvent()
    return stream.record_event(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]


def _whole(name: str, value: Any, least: int) -> int:
    if type(value) is not int or value < least:
        raise LaneError(f"{name}={value!r} is not a whole number from {least} up")
    return value


def _opened(lane: str | Lane | None) -> Lane | None:
    return None if lane is None else choose_lane(lane, None, None, {})


def _check_types(x: Any, kv: Any, keys: Any, values: Any, rotate: Any, positions: Any) -> None:
    for name, value in (("x", x), ("kv", kv), ("positions", positions)):
        if not isinstance(value, Tensor) and (name != "positions" or value is not None):
            raise LaneError(f"{name} is a {type(value).__name__}, no tensor")
    for name, value in (("keys", keys), ("values", values)):
        if not isinstance(value, Linear):
            raise LaneError(f"{name} is a {type(value).__name__}, no torch.nn.Linear: pass the projection")
    if rotate is not None and not callable(rotate):
        raise LaneError(f"rotate={rotate!r} is no function of keys and positions")


def _check_shapes(x: Tensor, kv: Tensor, keys: Linear, values: Linear) -> None:
    if kv.ndim < 4 or kv.shape[0] != 2 or not kv.numel():
        raise LaneError(f"kv {tuple(kv.shape)} is not [2, tokens, ..., heads, dim] with at least one of each")
    if x.ndim < 2 or x.shape[:-1] != kv.shape[1:-2]:
        raise LaneError(
            f"x {tuple(x.shape)} and kv {tuple(kv.shape)} differ in tokens or batch: "
            "kv is [2, tokens, batch, heads, dim] and x [tokens, batch, width], tokens first"
        )
    for name, linear in (("keys", keys), ("values", values)):
        shape = kv.shape[-2] * kv.shape[-1], x.shape[-1]
        if linear.weight.shape != shape:
            raise LaneError(f"{name}: weights {tuple(linear.weight.shape)}, needed {shape} for these shapes")
        kinds = {x.dtype, kv.dtype, linear.weight.dtype}
        if len(kinds) > 1 or linear.weight.device != keys.weight.device:
            raise LaneError(f"{name}: x, kv and weights need one dtype, projections one device")
        if linear.weight.device.type not in ("cpu", "cuda"):
            raise LaneError(
                f"{name}: weights are on {linear.weight.device}: move them to a CPU or CUDA device"
            )
