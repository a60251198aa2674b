"""The plan of a training step: what to do with each saved tensor so that the step is short and fits. Pure: no
GPU, no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import inf, prod
from typing import NamedTuple

from sidelane.pipeline.step_model import (
    AWAY,
    HERE,
    KEEP,
    KEPT,
    Choice,
    Code,
    Forecast,
    Option,
    Saved,
    Simulator,
    Step,
    simulate,
)

PARTS = 64  # into which the bytes of a step are cut for the search, at least
TRIALS = 250  # simulations of each climb, about
WHOLE = 1000  # of a step that is tried whole, at most
REPAIRS = 3  # searches with less room, where that of single tensors did not suffice
SECONDS_PER_BYTE = 5e-14  # what a byte that leaves must save at least: host memory is not free
SECONDS_PER_WORKING_BYTE = 3e-13  # the same for a byte of `Forecast.working` above the limit


@dataclass(frozen=True)
class StepPlan:
    """Choices for a step.

    Attributes:
        choices: of each saved tensor, in order. recompute: of each block.
        forecast: of these choices. limit, host_limit: bytes they were made for.
        others: forecasts of plain policies, by name.
    """

    choices: tuple[Choice, ...]
    recompute: tuple[bool, ...]
    forecast: Forecast
    limit: float
    host_limit: float = inf
    others: dict[str, Forecast] = field(default_factory=dict)

    def for_step(self, step: Step) -> StepPlan:
        """The same choices, predicted for another step."""
        return replace(self, forecast=simulate(step, self.choices, self.recompute, self.limit))

    @property
    def fits(self) -> bool:
        return self.allows(self.forecast)

    def allows(self, forecast: Forecast) -> bool:
        """Within the limits."""
        return _over(forecast, self.limit, self.host_limit) == 0

    @property
    def idle(self) -> bool:
        """Nothing is done at all."""
        return not any(self.recompute) and all(choice.place == KEEP for choice in self.choices)

    def binding(self) -> str:
        """What keeps the step from being as short as without a limit."""
        if not self.fits:
            return "no plan fits into the budgets: this one comes nearest"
        if self.idle:
            return "nothing: all fits"
        f = self.forecast
        seconds, what = max(
            (f.waited_out, "the wire out"),
            (f.waited_back, "the wire back"),
            (f.coding, "codes"),
            (f.again, "recompute"),
        )
        return f"gpu_budget, paid by {what}" if seconds > 0 else "gpu_budget, all hidden"


def plan_step(step: Step, limit: float, host_limit: float = inf) -> StepPlan:
    """The shortest step found whose saved tensors hold at most `limit` bytes on the device, and `host_limit`
    off it; where there is none, what comes nearest."""
    fine = Simulator(step, limit)
    keep, none = [0] * len(step.saved), [False] * len(step.blocks)
    untouched = fine.run(keep, none)
    names = {"keep all": untouched}
    if untouched.held <= limit:
        return StepPlan((KEPT,) * len(keep), tuple(none), untouched, limit, host_limit, names)
    members, spare = _parts(step), 0.0
    for _ in range(REPAIRS):
        search = _Search(_merged(step, members), limit - spare, host_limit)
        found = [
            _judged(fine, _spread(members, picks), again, limit, host_limit)
            for _, picks, again in search.run()
        ]
        (over, _), picks, recompute = min(found, key=lambda state: state[0])
        if over == 0 or spare >= limit:
            break
        spare += over  # parts are saved as one: single tensors may need more room than that
    choices = tuple(options[pick].choice for options, pick in zip(fine.options, picks, strict=True))
    forecast = fine.run(picks, recompute)
    return StepPlan(choices, tuple(recompute), forecast, limit, host_limit, names | search.plain)


class _Search:
    """Prefixes of the step under plain policies, then one change after another while that helps."""

    def __init__(self, step: Step, limit: float, host_limit: float) -> None:
        self._simulator = Simulator(step, limit)
        self._step = step
        self._limits = limit, host_limit
        self._trials = 0
        # Blocks, and tensors outside of blocks one by one, in order of time: what a policy is applied to.
        inside: dict[int, list[int]] = {}
        for i, saved in enumerate(step.saved):
            inside.setdefault(saved.block if saved.block >= 0 else -1 - i, []).append(i)
        self._items = sorted(inside.items(), key=lambda item: step.saved[item[1][0]].saved)
        self.plain: dict[str, Forecast] = {}

    def run(self) -> list[_State]:
        """The best that were found, and what they began as; of a small step all there is."""
        blocks = [(False, True) if block.repeatable else (False,) for block in self._step.blocks]
        picks = [range(len(options)) for options in self._simulator.options]
        if prod(map(len, (*blocks, *picks))) <= WHOLE:
            return [self._judged([*p], [*r]) for p, r in product(product(*picks), product(*blocks))]
        starts = sorted(self._starts(), key=lambda start: start[0])
        if self._step.blocks:  # the best without recompute, with some, and with nothing else
            starts = list(
                {(any(again), all(again)): (c, p, again) for c, p, again in reversed(starts)}.values()
            )
        else:
            starts = starts[:2]
        return [*starts, *(self._climb(cost, list(p), list(r)) for cost, p, r in starts)]

    def _starts(self) -> Iterator[_State]:
        """For each policy the shortest prefix of the step that makes it fit."""
        for name, policy in _policies(self._step, self._simulator.options).items():
            low, high = 0, len(self._items)
            found = self._prefix(policy, high)
            if name in _PLAIN:
                self.plain[name] = self._simulator.run(found[1], found[2])
            if found[0][0] == 0:
                while low < high:
                    middle = (low + high) // 2
                    state = self._prefix(policy, middle)
                    if state[0][0] == 0:
                        high, found = middle, min(found, state, key=lambda s: s[0])
                    else:
                        low = middle + 1
            yield found

    def _prefix(self, policy: _Policy, length: int) -> _State:
        picks, recompute = self._none()
        for number, (block, members) in enumerate(self._items[:length]):
            again = block >= 0 and policy.again(number) and self._step.blocks[block].repeatable
            if again:
                recompute[block] = True
            for i in members:
                picks[i] = policy.pick(i, number)
        return self._judged(picks, recompute)

    def _climb(self, cost: _Cost, picks: list[int], recompute: list[bool]) -> _State:
        """Local search: alternatives of an item as a whole, of single tensors, and exchanges of two items."""
        better = True
        end = self._trials + TRIALS
        while better and self._trials < end:
            better = False
            for change in (self._whole_items, self._exchanges, self._single):
                for other_picks, other_recompute in change(picks, recompute):
                    if self._trials >= end:
                        break
                    state = self._judged(other_picks, other_recompute)
                    if state[0] < (cost[0], cost[1] * (1 - 1e-6)):
                        cost, picks[:], recompute[:] = state
                        better = True
        return cost, picks, recompute

    def _whole_items(self, picks: list[int], recompute: list[bool]) -> Iterator[tuple[list[int], list[bool]]]:
        policies = _policies(self._step, self._simulator.options).values()
        for number, (block, members) in enumerate(self._items):
            tried = set()
            for policy in policies:
                other, again = list(picks), list(recompute)
                if block >= 0:
                    again[block] = policy.again(number) and self._step.blocks[block].repeatable
                for i in members:
                    other[i] = policy.pick(i, number)
                what = (*(other[i] for i in members), block >= 0 and again[block])
                if (other != picks or again != recompute) and what not in tried:
                    tried.add(what)
                    yield other, again
            other, again = list(picks), list(recompute)
            for i in members:
                other[i] = 0
            if block >= 0:
                again[block] = False
            if other != picks or again != recompute:
                yield other, again

    def _single(self, picks: list[int], recompute: list[bool]) -> Iterator[tuple[list[int], list[bool]]]:
        for i, saved in enumerate(self._step.saved):
            if saved.block >= 0 and recompute[saved.block] != saved.boundary:
                continue
            for pick in range(len(self._simulator.options[i])):
                if pick != picks[i]:
                    yield [*picks[:i], pick, *picks[i + 1 :]], list(recompute)

    def _exchanges(self, picks: list[int], recompute: list[bool]) -> Iterator[tuple[list[int], list[bool]]]:
        blocks = [item for item in self._items if item[0] >= 0]
        for distance in (1, 2, 3):
            for (a, of_a), (b, of_b) in zip(blocks, blocks[distance:], strict=False):
                alike = len(of_a) == len(of_b) and self._repeatable(a) == self._repeatable(b)
                if not alike or any(
                    len(self._simulator.options[i]) != len(self._simulator.options[j])
                    for i, j in zip(of_a, of_b, strict=True)
                ):
                    continue
                other, again = list(picks), list(recompute)
                again[a], again[b] = again[b], again[a]
                for i, j in zip(of_a, of_b, strict=True):
                    other[i], other[j] = other[j], other[i]
                if other != picks or again != recompute:
                    yield other, again

    def _repeatable(self, block: int) -> bool:
        return self._step.blocks[block].repeatable

    def _none(self) -> tuple[list[int], list[bool]]:
        return [0] * len(self._step.saved), [False] * len(self._step.blocks)

    def _judged(self, picks: list[int], recompute: list[bool]) -> _State:
        self._trials += 1
        return _judged(self._simulator, picks, recompute, *self._limits)


_Cost = tuple[float, float]  # bytes too many, seconds
_State = tuple[_Cost, list[int], list[bool]]


class _Policy(NamedTuple):
    """Whether to recompute the block that is item `number`; which option tensor i takes."""

    again: Callable[[int], bool]
    pick: Callable[[int, int], int]


_PLAIN = ("raw away", "codes away", "codes here", "recompute", "recompute, inputs away")


def _policies(step: Step, options: Sequence[Sequence[Option]]) -> dict[str, _Policy]:
    def chosen(good: Callable[[Option], bool]) -> list[int]:
        out = []
        for mine in options:
            fitting = [n for n, option in enumerate(mine) if n and good(option)]
            out.append(min(fitting, key=lambda n: mine[n].nbytes, default=0))
        return out

    raw = chosen(lambda o: o.choice == Choice(AWAY, "raw"))
    away = chosen(lambda o: o.choice.place == AWAY)
    here = chosen(lambda o: o.choice.place == HERE)
    leave = [r or a or h for r, a, h in zip(raw, away, here, strict=True)]
    boundary = [saved.boundary for saved in step.saved]
    outside = [saved.block < 0 for saved in step.saved]
    policies = {
        "raw away": _Policy(lambda n: False, lambda i, n: raw[i]),
        "codes away": _Policy(lambda n: False, lambda i, n: away[i]),
        "codes here": _Policy(lambda n: False, lambda i, n: here[i]),
    }
    if any(block.repeatable for block in step.blocks):
        policies["recompute"] = _Policy(lambda n: True, lambda i, n: leave[i] if outside[i] else 0)
        policies["recompute, inputs away"] = _Policy(lambda n: True, lambda i, n: leave[i])
        for period in (2, 3, 4, 6):
            policies[f"raw away in one of {period}"] = _Policy(
                lambda n, period=period: n % period != 0,  # type: ignore[misc]
                lambda i, n, period=period: leave[i] if n % period == 0 or outside[i] else 0,  # type: ignore[misc]
            )
            policies[f"recompute in one of {period}"] = _Policy(
                lambda n, period=period: n % period == 0,  # type: ignore[misc]
                lambda i, n: 0 if boundary[i] else leave[i],
            )
            policies[f"recompute in one of {period}, codes away"] = _Policy(
                lambda n, period=period: n % period == 0,  # type: ignore[misc]
                lambda i, n: away[i],
            )
    return policies


def _judged(
    simulator: Simulator, picks: list[int], recompute: list[bool], limit: float, host_limit: float
) -> _State:
    forecast = simulator.run(picks, recompute)
    seconds = forecast.seconds + SECONDS_PER_BYTE * forecast.away
    seconds += SECONDS_PER_WORKING_BYTE * max(0.0, forecast.working - limit)
    return (_over(forecast, limit, host_limit), seconds), picks, recompute


def _over(forecast: Forecast, limit: float, host_limit: float) -> float:
    return max(0.0, forecast.held - limit) + max(0.0, forecast.away - host_limit)


def _parts(step: Step) -> list[list[int]]:
    """Neighbours that are alike, together: same block, same codes with about the same ratios."""
    cap = sum(saved.nbytes for saved in step.saved if not saved.boundary) / PARTS
    parts: list[list[int]] = []
    last: dict[tuple[object, ...], tuple[list[int], int]] = {}
    for i, saved in enumerate(step.saved):
        kinds = ((c.lane, c.nbytes < saved.nbytes, round(8 * saved.nbytes / c.nbytes)) for c in saved.codes)
        kind = saved.block, saved.boundary, *kinds
        part, nbytes = last.get(kind, ([], 0))
        if not part or nbytes + saved.nbytes > cap:
            part, nbytes = [], 0
            parts.append(part)
        part.append(i)
        last[kind] = part, nbytes + saved.nbytes
    return parts


def _spread(parts: Sequence[Sequence[int]], picks: Sequence[int]) -> list[int]:
    """What was picked for parts, for their members."""
    out = [0] * sum(map(len, parts))
    for part, pick in zip(parts, picks, strict=True):
        for i in part:
            out[i] = pick
    return out


def _merged(step: Step, parts: Sequence[Sequence[int]]) -> Step:
    saved = []
    for part in parts:
        members = [step.saved[i] for i in part]
        codes = tuple(
            Code(
                first.lane,
                sum(m.codes[n].nbytes for m in members),
                sum(m.codes[n].encode for m in members),
                sum(m.codes[n].decode for m in members),
            )
            for n, first in enumerate(members[0].codes)
        )
        saved.append(
            Saved(
                sum(m.nbytes for m in members),
                max(m.saved for m in members),
                min(m.used for m in members),
                max(m.freed for m in members),
                codes,
                members[0].block,
                members[0].boundary,
            )
        )
    return replace(step, saved=tuple(saved))
