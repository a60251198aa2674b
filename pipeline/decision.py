"""From predicted times to a lane: corrected by what was measured, raw unless the gain is sure, and not
changed for little. Nothing here touches torch or a device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp, inf, log, log2

from sidelane.errors import LaneError

RAW = "raw"
MIN_GAIN = 0.05  # predicted, below which raw is taken
SWITCH_GAIN = 0.08  # by which another lane must be better, so many times in a row:
SWITCH_AFTER = 3
EWMA = 0.2
FADE = 0.01
FAR = log(2.0)


@dataclass
class _Seen:
    """Of log(actual / predicted): the moving mean, what part of it its beginning still is, how many times
    count, and how far from the mean the last one was."""

    mean: float = 0.0
    begin: float = 1.0
    count: float = 0.0
    last: float = 0.0

    def add(self, value: float) -> None:
        off = value - self.mean
        most = max(FAR, min(abs(self.last), abs(off)) if self.last * off > 0 else 0.0)
        self.last = off
        off = min(max(off, -most), most)
        self.count += 1
        weight = max(EWMA, 1 / (self.count + 1))
        self.mean += weight * off
        self.begin *= 1 - weight


@dataclass
class Residuals:
    """What measured times were beside predicted ones, by name (of a lane or wire) and size class.

    The mean of log(actual / predicted), beginning as if one time had been as predicted, becomes a moving
    one. A time far from it counts as one that is off by `FAR` unless the one before was as far off, so that
    a hiccup does not decide.
    """

    _seen: dict[tuple[str, int], _Seen] = field(default_factory=dict)

    def factor(self, name: str, nbytes: float, begin: float = 1.0) -> float:
        """What a prediction for so many bytes is to be multiplied by: by what was observed at that size, else
        at sizes up to 16 times smaller or larger; `begin` where nothing was."""
        seen = self._near(name, nbytes)
        return exp(seen.mean + seen.begin * log(begin)) if seen else begin

    def known(self, name: str, nbytes: float) -> bool:
        """Whether a time of this name and size was observed."""
        return (name, _size_class(nbytes)) in self._seen

    def fade(self) -> None:
        """Forget a little of everything, so that a lane that was given up is tried again some time."""
        for seen in self._seen.values():
            seen.mean *= 1 - FADE
            seen.begin += FADE * (1 - seen.begin)
            seen.count *= 1 - FADE

    def observe(self, name: str, nbytes: float, predicted: float, actual: float) -> None:
        """Learn from a measured time. `predicted` is without `factor`; times that are not above 0 say
        nothing."""
        if predicted > 0 and actual > 0:
            seen = self._seen.setdefault((name, _size_class(nbytes)), _Seen())
            seen.add(log(actual / predicted))

    def _near(self, name: str, nbytes: float) -> _Seen | None:
        middle = _size_class(nbytes)
        for size in (middle, middle - 1, middle + 1, middle - 2, middle + 2):
            if (name, size) in self._seen:
                return self._seen[name, size]
        return None


def _size_class(nbytes: float) -> int:
    """Sizes within a factor of four share a class."""
    return int(log2(max(nbytes, 1.0)) / 2)


def best_lane(seconds: Mapping[str, float]) -> str:
    """The fastest of the lanes that save `MIN_GAIN` of the time of raw; raw if none does.

    Args:
        seconds: predicted, by lane.

    Raises LaneError without "raw" among the lanes.
    """
    if RAW not in seconds:
        raise LaneError("raw is not among the lanes: every choice is made beside it")
    enough = [lane for lane, time in seconds.items() if time <= (1 - MIN_GAIN) * seconds[RAW]]
    return min(enough, key=seconds.__getitem__, default=RAW)


@dataclass
class Hysteresis:
    """Keeps a choice until another lane is better by `SWITCH_GAIN`, `SWITCH_AFTER` times in a row.

    A lane that is no faster than raw is left at once.
    """

    lane: str | None = None
    _rival: str | None = None
    _times: int = 0

    @property
    def settled(self) -> bool:
        """Nothing better was seen the last time."""
        return self._rival is None

    def update(self, seconds: Mapping[str, float]) -> str:
        """The lane to take after these predictions, see `best_lane`. A lane that is no longer among them is
        left at once."""
        best = best_lane(seconds)
        current = self.lane
        if current is None or (current != RAW and seconds.get(current, inf) >= seconds[RAW]):
            current = best
        if best == current or seconds[best] > (1 - SWITCH_GAIN) * seconds[current]:
            self._rival, self._times = None, 0
        else:
            self._times = self._times + 1 if best == self._rival else 1
            self._rival = best
            if self._times >= SWITCH_AFTER:
                current, self._rival, self._times = best, None, 0
        self.lane = current
        return current
