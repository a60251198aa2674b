"""The timeline of a chain: spans measured on the clock of the device that did the work."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from sidelane.errors import LaneError, LaneUnavailable
from sidelane.pipeline.streams import HostEvent, Stream, side_stream

MAX_SPANS = 1 << 16  # older ones are forgotten


@dataclass(frozen=True)
class Span:
    """One stage of one item.

    Attributes:
        stage: "kernel", "encode", "store", "load", "decode", "inverse", with a number on the second stream
            and further ones; or a name given to `Chain.span`.
        device: that did the work.
        item: number of the ticket, or how often the name was used before.
        begin, end: seconds since the trace began.
        nbytes: of the packet where it is moved, of the tensor elsewhere.
    """

    stage: str
    device: str
    item: int
    begin: float
    end: float
    nbytes: int


@dataclass(frozen=True)
class Trace:
    """Spans in the order in which they began."""

    spans: tuple[Span, ...]

    @property
    def rows(self) -> list[tuple[str, str]]:
        """(stage, device) in the order of their first spans."""
        return list(dict.fromkeys((span.stage, span.device) for span in self.spans))

    def busy(self, stage: str) -> float:
        """Seconds inside spans of `stage`, those of all workers added."""
        return sum(span.end - span.begin for span in self.spans if span.stage.split()[0] == stage)

    def chrome(self) -> dict[str, Any]:
        """The trace event format that chrome://tracing and ui.perfetto.dev open; times in microseconds."""
        rows = self.rows
        names: list[dict[str, Any]] = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": i, "args": {"name": f"{stage} {device}"}}
            for i, (stage, device) in enumerate(rows)
        ]
        events = [
            {
                "name": f"{span.stage} {span.item}",
                "cat": span.stage,
                "ph": "X",
                "pid": 0,
                "tid": rows.index((span.stage, span.device)),
                "ts": span.begin * 1e6,
                "dur": (span.end - span.begin) * 1e6,
                "args": {"item": span.item, "bytes": span.nbytes},
            }
            for span in self.spans
        ]
        return {"traceEvents": names + events, "displayTimeUnit": "ms"}

    def save(self, path: str | Path) -> None:
        """Write the timeline: Chrome JSON for a path that ends in .json, a picture for .png.

        Raises LaneError for another ending, LaneUnavailable for a picture without matplotlib, OSError.
        """
        path = Path(path)
        if path.suffix == ".json":
            path.write_text(json.dumps(self.chrome()))
        elif path.suffix == ".png":
            self._draw(path)
        else:
            raise LaneError(f"a trace is saved as .json or .png, not as '{path.name}'")

    def _draw(self, path: Path) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise LaneUnavailable(
                "a picture needs matplotlib: pip install matplotlib, or save .json"
            ) from error
        bars: dict[tuple[str, str], list[Span]] = defaultdict(list)
        for span in self.spans:
            bars[span.stage, span.device].append(span)
        drawing = Figure(figsize=(12, 1.2 + 0.45 * len(bars)), layout="constrained")
        axes = drawing.subplots()
        for i, spans in enumerate(bars.values()):
            axes.broken_barh(
                [(span.begin * 1e3, (span.end - span.begin) * 1e3) for span in spans],
                (i - 0.4, 0.8),
                facecolors=[f"C{span.item % 10}" for span in spans],
            )
        axes.set_yticks(range(len(bars)), [f"{stage} {device}" for stage, device in bars])
        axes.invert_yaxis()
        axes.set_xlabel("ms")
        drawing.savefig(path, dpi=130)


class Recorder:
    """Collects spans; events become numbers once they are reached. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._origin = HostEvent()
        self._zero: dict[torch.device, tuple[Any, float]] = {}  # an event and its time in seconds
        self._open: deque[tuple[str, torch.device, int, Any, Any, int]] = deque(maxlen=MAX_SPANS)
        self._spans: deque[Span] = deque(maxlen=MAX_SPANS)

    def mark(self, stream: Stream) -> Any:
        """An event with a time, recorded on `stream`. The first one of a device waits for it on the host."""
        if stream.device.type == "cpu":
            return HostEvent()
        with self._lock:
            if stream.device not in self._zero:
                zero = _timed(side_stream(stream.device, "clock"))
                zero.synchronize()
                self._zero[stream.device] = zero, self._now()
        return _timed(stream)

    def add(self, stage: str, device: torch.device, item: int, begin: Any, end: Any, nbytes: int) -> None:
        """A span between two marks of one stream."""
        with self._lock:
            self._open.append((stage, device, item, begin, end, nbytes))
            while self._open and self._open[0][4].query():
                self._close()

    def trace(self) -> Trace:
        """All spans so far; waits for those that are not over."""
        with self._lock:
            while self._open:
                self._open[0][4].synchronize()
                self._close()
            return Trace(tuple(sorted(self._spans, key=_begin)))

    def _close(self) -> None:
        stage, device, item, begin, end, nbytes = self._open.popleft()
        zero, seconds = self._zero.get(device, (self._origin, 0.0))
        times = [seconds + zero.elapsed_time(event) / 1e3 for event in (begin, end)]
        self._spans.append(Span(stage, str(device), item, times[0], times[1], nbytes))

    def _now(self) -> float:
        return self._origin.elapsed_time(HostEvent()) / 1e3


def _begin(span: Span) -> float:
    return span.begin


def _timed(stream: Stream) -> Any:
    return stream.record_event(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
