"""Tensors through a lane in overlapping stages: kernel, encode, store, load, decode, inverse kernel.

Note: [Where the host waits]
Every stage has streams of its own on its device, and stages are joined by events. Threads of the chain
enqueue the work, since lanes may wait for the device or run on the CPU. The program's own thread waits in
`Chain._wait` only: in `send` while `depth` tensors are in front of the encoder; in `receive` until its work
is enqueued, and until the program's stream has reached the `receive` that was `depth` calls earlier; in
`flush` and `close`. With a lane that never waits for the device, or with threads, `send` never does.

What is encoded is stored by the same thread at once, unless its size is not known yet (Note: [Late sizes] in
`late`). A thread of its own waits for those sizes and stores, so that the encoders are never without work:
it gets a packet when that is enqueued, in that order, and gives its slot. An encoder that waits for a slot
therefore waits for packets that this thread has got already, and both go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import RLock
from time import perf_counter
from traceback import clear_frames
from types import TracebackType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sidelane.codec.lane import Lane
from sidelane.codec.packet import Packet
from sidelane.errors import LaneError, OffloadError
from sidelane.pipeline.basis import Basis
from sidelane.pipeline.budget import Budget
from sidelane.pipeline.compress import choose_lane, compress, present_device
from sidelane.pipeline.extent import describe, distinct_bytes
from sidelane.pipeline.lanes import ExactLane, decode_packet, plain, undisturbed
from sidelane.pipeline.late import LatePacket, encode_exact
from sidelane.pipeline.stages import Stages
from sidelane.pipeline.streams import Event, Slot, current_stream
from sidelane.pipeline.tensor_auto import AutoLane, auto_lane
from sidelane.pipeline.ticket import ChainReport, Stored, Ticket
from sidelane.pipeline.trace import Recorder, Trace

AUTO_WIRES = ("d2h", "h2d")  # of the lane "auto"
MAX_ERRORS = 16  # remembered until somebody receives them
T = TypeVar("T")


class Chain:
    """Sends tensors through a lane to host memory and brings them back, to where they were or elsewhere.

    `send` starts kernel, encode and store; `receive`, or earlier `fetch`, starts load, decode and inverse.
    Each stage runs on its own streams of its device, so that consecutive tensors overlap; on the CPU they
    overlap on threads. A chain is a context manager, and its methods may be called from several threads.

        with sidelane.Chain("packed", bits=8) as chain:
            tickets = [chain.send(page) for page in pages]
            for page in chain.receive_all(tickets):
                ...

    A sent tensor is read later than `send` returns. Drop it when you like, but change it only after
    `Ticket.join`; a change that was made too early and is noticed is an error. The current stream of `send`
    waits for the encoder only when that is `depth` tensors behind.

    The calls in which the host waits are listed in Note: [Where the host waits]. An error in any stage is
    raised by `receive` of its ticket, else by `flush` or `close`; the chain goes on with the next tensor.

    Args:
        lane: name of a lane, or a lane, whose packets and tensors own their memory. Default: "exact",
            or "packed" when `max_rel_error` is given. "auto" takes for each tensor the lane that is predicted
            to be fastest, and learns from the times that the stages take; its options are those of
            `AutoLane`, `wire` from "d2h" out and "h2d" back.
        depth: tensors in each stage: those that wait for the encoder, encoded packets on the device, loaded
            packets, and fetched tensors are at most so many each.
        workers: threads for each direction. With 0 the stages are enqueued by `send` and `receive`
            themselves. One is enough for lanes that only launch kernels, and for the exact lane on a GPU,
            which has one more for the sizes of its packets; a lane that waits inside encode or that runs on
            the CPU wants several.
        streams: for each worker and each stage of kernels, used in turn, so that kernels of several tensors
            are ready when the program leaves the device free for a moment. CUDA has 8 queues unless
            CUDA_DEVICE_MAX_CONNECTIONS says otherwise: with more streams than that, they hold each other up.
        device: where tensors are received; default: where they were.
        kernel, inverse: tensor to tensor, before encode and after decode, on streams of their own.
        max_rel_error: bound on the relative Frobenius error of what is encoded (`compress`); waits for the
            device.
        host_budget: bytes of packets in host memory; None for no limit.
        priority: of the streams of kernels; -1 puts them before those of the program.
        trace: record the spans that `trace` returns.
        basis, lane_options: of the lane that is named.

    Raises LaneError for a bad argument.
    """

    def __init__(
        self,
        lane: str | Lane | None = None,
        *,
        depth: int = 4,
        workers: int = 1,
        streams: int = 4,
        device: torch.device | str | None = None,
        kernel: Callable[[Tensor], Tensor] | None = None,
        inverse: Callable[[Tensor], Tensor] | None = None,
        max_rel_error: float | None = None,
        host_budget: int | None = None,
        priority: int = -1,
        trace: bool = False,
        basis: Basis | None = None,
        **lane_options: Any,
    ) -> None:
        for name, value, least in (("depth", depth, 1), ("workers", workers, 0), ("streams", streams, 1)):
            if type(value) is not int or value < least:
                raise LaneError(f"{name}={value!r} is not a whole number from {least} up")
        for name, function in (("kernel", kernel), ("inverse", inverse)):
            if function is not None and not callable(function):
                raise LaneError(f"{name}={function!r} is no function of a tensor")
        if type(priority) is not int:
            raise LaneError(f"priority={priority!r} is not a whole number, such as -1 or 0")
        if lane == "auto":
            if basis is not None:
                lane_options["basis"] = basis
            around = {"wire": AUTO_WIRES, "together": depth, "max_rel_error": max_rel_error}
            self._lane: Lane = auto_lane(**around | lane_options)
        else:
            self._lane = choose_lane(lane, max_rel_error, basis, lane_options)
        self._encode: Callable[[Tensor], Packet | LatePacket] = self._lane.encode
        self._decode: Callable[[Any], Tensor] = self._lane.decode
        if type(self._lane) is ExactLane:
            self._encode = encode_exact
        if max_rel_error is not None and lane != "auto":  # which keeps the bound itself
            self._encode = partial(compress, lane=self._lane, max_rel_error=max_rel_error)
            self._decode = partial(decode_packet, basis=getattr(self._lane, "basis", None))
        if host_budget is not None and (type(host_budget) is not int or host_budget < 0):
            raise LaneError(f"host_budget={host_budget!r} is not a whole number from 0 up or None")
        if not isinstance(trace, bool):
            raise LaneError(f"trace={trace!r} is neither True nor False")
        self._depth = depth
        self._device = None if device is None else _with_index(present_device(device))
        self._kernel, self._inverse = kernel, inverse
        self._recorder = Recorder() if trace else None
        watch = self._lane.watch(self._recorder) if isinstance(self._lane, AutoLane) else self._recorder
        self._stages = Stages(depth, streams, priority, watch)
        self._host = Budget(host_budget)
        self._sender, self._receiver = (self._stages.pool(name, workers) for name in ("send", "receive"))
        self._settler = self._stages.pool("settle", min(workers, 1))
        self._pending: set[Future[Any]] = set()
        self._lock = RLock()  # with no workers, stages run inside `fetch`
        self._fetched: WeakKeyDictionary[Ticket, Future[tuple[Tensor, Event]]] = WeakKeyDictionary()
        self._handed: deque[Event] = deque()
        self._errors: deque[BaseException] = deque(maxlen=MAX_ERRORS)
        self._stores: set[torch.device] = set()  # copied from
        self._names: dict[str, int] = {}
        self._sent = self._received = self._failed = self._bytes_in = self._bytes_wire = 0
        self._seconds = 0.0
        self._closed = False

    def __enter__(self) -> Chain:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(quiet=error is not None)

    def send(self, tensor: Tensor) -> Ticket:
        """Start the way of `tensor` to host memory.

        Raises LaneError for a tensor that no lane takes and after `close`, OffloadError inside the capture of
        a CUDA graph.
        """
        tensor = plain(tensor)
        self._check(tensor.device)
        stream = current_stream(tensor.device)
        self._stages.sweep()
        slot = self._wait(partial(self._stages.rings["source"].take, stream))
        slot.fill(tensor)
        with self._lock:
            ticket = Ticket(self._sent, self._stages)
            self._sent += 1
        stored: Future[Stored] = Future()
        ticket._stored = stored
        arguments = ticket.number, slot, _version(tensor), ticket._read, stored
        self._submit(self._sender, self._code, *arguments, outcome=stored)
        return ticket

    def fetch(self, ticket: Ticket) -> bool:
        """Start load, decode and inverse ahead of `receive`. False, and nothing is started, when `depth`
        tensors are fetched already."""
        self._check_ticket(ticket)
        with self._lock:
            if ticket not in self._fetched:
                if len(self._fetched) >= self._depth:
                    return False
                self._fetched[ticket] = self._start(ticket)
        return True

    def receive(self, ticket: Ticket) -> Tensor:
        """The tensor of `ticket`, for work on the current stream; its shape, dtype and memory order are those
        that were sent, unless `inverse` changes them. Every call gives memory of its own.

        Raises what went wrong in a stage: BudgetError when host memory was full, OffloadError when the tensor
        was changed before it was read, errors of the lane and the kernels. Raises LaneError for a ticket of
        another chain and after `close`, OffloadError inside the capture of a CUDA graph.
        """
        self._check_ticket(ticket)
        self._stages.sweep()
        with self._lock:
            future = self._fetched.pop(ticket, None) or self._start(ticket)
        try:
            tensor, ready = self._wait(future.result)
        except BaseException as error:
            with self._lock:
                if error in self._errors:
                    self._errors.remove(error)
            raise
        finally:
            del future  # it holds the error, whose frames hold this one
        stream = current_stream(tensor.device)
        stream.wait_event(ready)
        if tensor.device.type == "cuda":
            tensor.record_stream(stream)
        with self._lock:
            self._received += 1
            self._handed.append(stream.record_event())
            earlier = self._handed.popleft() if len(self._handed) > self._depth else None
        if earlier is not None:
            self._wait(earlier.synchronize)
        return tensor

    def receive_all(self, tickets: Iterable[Ticket]) -> Iterator[Tensor]:
        """The tensors of `tickets` in order, fetched up to `depth` ahead."""
        ahead: deque[Ticket] = deque()
        for ticket in tickets:
            ahead.append(ticket)
            self.fetch(ticket)
            del ticket  # its memory goes back when it was received
            if len(ahead) == self._depth:
                yield self.receive(ahead.popleft())
        while ahead:
            yield self.receive(ahead.popleft())

    def stream(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """`tensors` sent and received in order, at most `depth` of them on their way."""
        return self.receive_all(map(self.send, tensors))

    def flush(self) -> None:
        """Wait until all that was sent is in host memory. Raises the first error that nobody received."""
        for _ in range(2):  # for what is encoded, then for the stores that this has led to
            self._wait(partial(wait, set(self._pending)))
        for device in set(self._stores):
            self._wait(self._stages.stream("store", device).record_event().synchronize)
        self._stages.sweep()
        with self._lock:
            error = self._errors[0] if self._errors else None
            self._errors.clear()
        if error is not None:
            raise error

    def close(self) -> None:
        """`flush`, then refuse further calls. Tensors that were received stay; tickets are void."""
        self._close(quiet=False)

    def report(self) -> ChainReport:
        """Numbers so far; waits for nothing."""
        with self._lock:
            return ChainReport(
                lane=self._lane.name,
                sent=self._sent,
                received=self._received,
                failed=self._failed,
                bytes_in=self._bytes_in,
                bytes_wire=self._bytes_wire,
                host_bytes=self._host.held,
                host_peak=self._host.peak,
                seconds_waited=self._seconds,
            )

    def explain(self) -> str:
        """What the lane "auto" takes for which tensors, and why. Raises LaneError for another lane."""
        if not isinstance(self._lane, AutoLane):
            raise LaneError(f"lane '{self._lane.name}' chooses nothing: make the chain with 'auto'")
        return self._lane.explain()

    def trace(self) -> Trace:
        """The timeline so far; waits for the device. Raises LaneError unless `trace` was set."""
        if self._recorder is None:
            raise LaneError("nothing was recorded: make the chain with trace=True")
        return self._recorder.trace()

    @contextmanager
    def span(self, name: str, device: torch.device | str | None = None, nbytes: int = 0) -> Iterator[None]:
        """Add what the current stream of `device` (default: of CUDA, where it is) does inside to the trace.
        Nothing without `trace`."""
        if self._recorder is None:
            yield
            return
        where = _with_index(present_device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
        begin = self._recorder.mark(current_stream(where))
        yield
        with self._lock:
            item = self._names[name] = self._names.get(name, -1) + 1
        self._recorder.add(name, where, item, begin, self._recorder.mark(current_stream(where)), nbytes)

    def _code(
        self,
        number: int,
        source: Slot[Tensor],
        version: int | None,
        read: Future[Event],
        stored: Future[Stored],
    ) -> None:
        """What the sender's thread does for one tensor, which was at `version` when it was sent."""
        tensor, stages = source.peek(), self._stages
        try:
            device, nbytes = tensor.device, distinct_bytes(tensor)
            stages.next()
            stream = stages.stream("encode", device)
        except BaseException as error:
            read.set_exception(error)
            raise
        with ExitStack() as slots, undisturbed(device):
            slots.callback(source.give)
            try:
                last = source
                if self._kernel is not None:
                    last = stages.fill(slots, "kernel", number, (source,), self._kernel, device, nbytes)
                inputs = (last,) if last is source else (last, source)  # what a kernel returns may be a view
                encoded: Slot[Packet | LatePacket] = stages.fill(
                    ExitStack(), "encode", number, inputs, self._encode, device, nbytes
                )  # `_store` gives it
                if _version(tensor) != version:
                    raise OffloadError(
                        f"{describe(tensor)} was changed in place before it was read: call Ticket.join first"
                    )
            finally:
                read.set_result(stream.record_event())
        if isinstance(encoded.peek(), LatePacket):
            self._submit(self._settler, self._store, number, encoded, nbytes, device, stored, outcome=stored)
        else:
            self._store(number, encoded, nbytes, device, stored)

    def _store(
        self,
        number: int,
        encoded: Slot[Packet | LatePacket],
        nbytes: int,
        device: torch.device,
        stored: Future[Stored],
    ) -> None:
        """Store what was encoded of a tensor of `device`, and give its slot."""
        stages = self._stages
        try:
            with undisturbed(device):
                packet = _settled(encoded)
                copy = Stored(packet, nbytes, self._device or device)
                out = stages.stream("store", packet.device)
                with stages.copying["store"]:
                    encoded.open(out)
                    stages.run("store", number, out, partial(copy.write, self._host, out), copy.nbytes)
                self._stores.add(packet.device)
        finally:
            encoded.give()
        with self._lock:
            self._bytes_in += nbytes
            self._bytes_wire += copy.nbytes
        stored.set_result(copy)

    def _load(self, number: int, sent: Future[Stored]) -> tuple[Tensor, Event]:
        """What the receiver's thread does for one tensor."""
        stored = sent.result()
        stages, device, nbytes = self._stages, stored.device, stored.raw_nbytes
        stages.next()
        with ExitStack() as slots, undisturbed(device):
            stream = stages.stream("load", device)
            loaded: Slot[Packet] = stages.rings["load"].take(stream)
            slots.callback(loaded.give)
            with stages.copying["load"]:
                stream.wait_event(stored.ready)
                loaded.fill(stages.run("load", number, stream, partial(stored.read, stream), stored.nbytes))
            last: Slot[Any] = loaded
            stage, work = "decode", self._decode
            if self._inverse is not None:
                last = stages.fill(slots, stage, number, (loaded,), work, device, nbytes)
                stage, work = "inverse", self._inverse
            stream = stages.stream(stage, device)
            tensor = stages.run(stage, number, stream, partial(work, last.open(stream)), nbytes)
            return tensor, stream.record_event()

    def _start(self, ticket: Ticket) -> Future[tuple[Tensor, Event]]:
        return self._submit(self._receiver, self._load, ticket.number, ticket._stored)

    def _submit(
        self, pool: Executor, work: Callable[..., T], *arguments: Any, outcome: Future[Any] | None = None
    ) -> Future[T]:
        """Do `work` on a thread of `pool`. An error is that of the future, and of `outcome`."""
        future = pool.submit(self._guard, outcome, work, *arguments)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        return future

    def _guard(self, outcome: Future[Any] | None, work: Callable[..., T], *arguments: Any) -> T:
        """Keep an error of `work` until it is raised, but not the tensors that its frames hold."""
        try:
            return work(*arguments)
        except BaseException as error:
            del arguments
            clear_frames(error.__traceback__)
            with self._lock:
                if error not in self._errors:
                    self._errors.append(error)
                    self._failed += work != self._load
            if outcome is not None and not outcome.done():
                outcome.set_exception(error)  # last: who waits for it looks into the books
            raise

    def _wait(self, work: Callable[[], T]) -> T:
        """The one point at which the program's threads wait."""
        begin = perf_counter()
        try:
            return work()
        finally:
            del work  # see `receive`
            with self._lock:
                self._seconds += perf_counter() - begin

    def _check(self, device: torch.device) -> None:
        if self._closed:
            raise LaneError("the chain is closed: make another one")
        if device.type not in ("cpu", "cuda"):
            raise LaneError(f"a chain has no streams for '{device.type}': use the CPU or CUDA")
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise OffloadError(
                "a chain cannot be captured in a CUDA graph: use it before or after the capture"
            )

    def _check_ticket(self, ticket: Ticket) -> None:
        if not isinstance(ticket, Ticket) or ticket._stages is not self._stages:
            raise LaneError("this is no ticket of this chain: pass what its send returned")
        self._check(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def _close(self, quiet: bool) -> None:
        if self._closed:
            return
        self._closed = True
        try:
            self.flush()
        except Exception:
            if not quiet:
                raise
        finally:
            for pool in (self._sender, self._settler, self._receiver):  # each gets work from those before
                pool.shutdown()
            self._fetched.clear()
            self._stages.clear()


def _settled(slot: Slot[Packet | LatePacket]) -> Packet:
    """The packet in `slot`; the host waits until its size is known."""
    late = slot.peek()
    if not isinstance(late, LatePacket):
        return late
    packet = late.uncut()
    if packet is None:
        packet = late.settle()
        slot.fill(packet)
    return packet


def _version(tensor: Tensor) -> int | None:
    """How often `tensor` was changed in place; None where nobody counts."""
    return None if tensor.is_inference() else tensor._version


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
