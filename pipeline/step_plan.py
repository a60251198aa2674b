"""The plan of a training step: what to do with each saved tensor so that the step is short and fits. Pure: no
GPU, no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from math import inf, prod
from typing import NamedTuple

from sidelane.pipeline.spread import GOLDEN
from sidelane.pipeline.step_model import (
    AWAY,
    DERIVE,
    DERIVED,
    HERE,
    KEEP,
    KEPT,
    UPPER,
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
EVENTS = 16_000  # of all simulations of a search, about: what it may take
STARTS = 20  # mixtures that are simulated
ALIKE = 2  # of the same policies among these: estimates are too rough to try more of one kind
CLIMBS = 2  # of these that are changed
SPACINGS = (1, 2, 3, 4)  # of items under the first policy of a mixture
WHOLE = 1000  # simulations of a step of which everything is tried, at most
REPAIRS = 3  # searches with less room, where that of single tensors did not suffice
SMALL = 0.03  # share of the bytes of a step that its smallest tensors have
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
    def cost(self) -> tuple[float, float]:
        """Bytes too many, and the seconds of the step with a price on what leaves: the least is the best."""
        return _cost(self.forecast, self.limit, self.host_limit)

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
            (f.coding, "storing and restoring"),
            (f.again, "recompute"),
            (f.waited_host, "the host"),
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


_Cost = tuple[float, float]  # bytes too many, seconds
_State = tuple[_Cost, list[int], list[bool]]


class _Policy(NamedTuple):
    """Whether blocks are recomputed that can be; the option of each tensor."""

    again: bool
    picks: Sequence[int]


class _Way(NamedTuple):
    """A policy applied to an item: options of its tensors, bytes that stay on the device, seconds of copies
    out and back, and seconds that it adds to computing on the way up and down."""

    picks: list[int]
    again: bool
    held: float
    out: float
    back: float
    up: float
    down: float


class _Item(NamedTuple):
    """What a policy is applied to: a block, or a tensor outside of all; `ways[0]` keeps it."""

    block: int
    members: list[int]
    ways: list[_Way]


class _Search:
    """Mixtures of plain policies over prefixes of the step, the best of them by a rough estimate simulated,
    and a few of those changed item by item as long as that helps."""

    def __init__(self, step: Step, limit: float, host_limit: float) -> None:
        self._simulator = Simulator(step, limit)
        self._step = step
        self._limits = limit, host_limit
        self._left = EVENTS // max(1, 3 * len(step.saved))  # simulations
        self._policies = _policies(step, self._simulator.options, limit)
        inside: dict[int, list[int]] = {}
        for i, saved in enumerate(step.saved):
            inside.setdefault(saved.block if saved.block >= 0 else -1 - i, []).append(i)
        # In the order of a prefix: first what is needed last.
        items = sorted(inside.items(), key=lambda item: -min(step.saved[i].used for i in item[1]))
        self._items = [self._item(block, members) for block, members in items]
        self.plain: dict[str, Forecast] = {}

    def run(self) -> list[_State]:
        """The best that were found; of a small step all there is."""
        blocks = [(False, True) if block.repeatable else (False,) for block in self._step.blocks]
        picks = [range(len(options)) for options in self._simulator.options]
        if prod(map(len, (*blocks, *picks))) <= WHOLE:
            return [self._judged([*p], [*r]) for p, r in product(product(*picks), product(*blocks))]
        starts = sorted(self._starts(), key=lambda state: state[0])[:CLIMBS]
        share = max(0, self._left // len(starts))
        return [state for start in starts for state in (start, self._climb(*start, share))]

    def _item(self, block: int, members: list[int]) -> _Item:
        step, ways = self._step, []
        for policy in (_Policy(False, [0] * len(step.saved)), *self._policies.values()):
            again = policy.again and block >= 0 and step.blocks[block].repeatable
            picks = [policy.picks[i] for i in members]
            held = out = back = up = 0.0
            down = step.blocks[block].seconds if again else 0.0
            for i, pick in zip(members, picks, strict=True):
                saved, option = step.saved[i], self._simulator.options[i][pick]
                if saved.is_saved(again):
                    held += option.resident
                    out, back = out + option.out, back + option.back
                    up, down = up + option.encode, down + option.decode
            ways.append(_Way(picks, again, held, out, back, up, down))
        return _Item(block, members, ways)

    def _starts(self) -> Iterator[_State]:
        """Plain policies, and mixtures of two with as few items as need be, the others kept or derived."""
        for label, name in enumerate(self._policies, 1):
            state = self._laid([label] * len(self._items))
            self.plain[name] = self._simulator.run(state[1], state[2])
            yield state
        found: dict[tuple[int, ...], tuple[float, list[int]]] = {}
        rests = [0, *(label for label, name in enumerate(self._policies, 1) if name == DERIVED)]
        for mixture in self._mixtures():
            for rest in rests:
                length, seconds = self._estimate(mixture, rest)
                found.setdefault((rest, *mixture[:length]), (seconds, mixture))
        alike: Counter[tuple[int, frozenset[int]]] = Counter()
        for (rest, *prefix), (_, mixture) in sorted(found.items(), key=lambda item: item[1][0]):
            kind = rest, frozenset(prefix)
            alike[kind] += 1
            if alike[kind] > ALIKE or alike.total() > STARTS:
                alike[kind] -= 1
                continue
            for length in range(len(prefix), min(len(prefix) + 3, len(mixture)) + 1):
                state = self._laid([*mixture[:length], *[rest] * (len(mixture) - length)])
                yield state
                if state[0][0] == 0:
                    break

    def _mixtures(self) -> Iterator[list[int]]:
        """One policy for all, or one that sends for every so many items, for about as many as the wire takes
        in forward and for all, and another one for the others."""
        count, labels = len(self._items), range(1, len(self._policies) + 1)
        for b in labels:
            yield [b] * count
            for a in labels:
                out = sum(item.ways[a].out for item in self._items) / count
                up = sum(item.ways[a].up for item in self._items) / count
                if a == b or not out:
                    continue
                fitting = min(count, int(self._turn / max(out - up, 0.1 * out)))
                for spacing, most in product(SPACINGS, {*range(fitting - 1, fitting + 3), count}):
                    yield [a if n % spacing == 0 and n < most * spacing else b for n in range(count)]

    def _estimate(self, labels: Sequence[int], rest: int) -> tuple[int, float]:
        """How many items need these policies, and not `rest`, until all fits, and about the seconds that it
        takes."""
        held, out, back, up, down = self._sums[rest]
        length = 0
        for label, item in zip(labels, self._items, strict=True):
            if held <= self._limits[0]:
                break
            way, old = item.ways[label], item.ways[rest]
            held += way.held - old.held
            out, back = out + way.out - old.out, back + way.back - old.back
            up, down = up + way.up - old.up, down + way.down - old.down
            length += 1
        forward, backward = self._turn + up, self._step.seconds - self._turn + down
        seconds = max(forward, out) + max(backward, back)
        return length, inf if held > self._limits[0] else seconds

    @cached_property
    def _sums(self) -> list[tuple[float, ...]]:
        """Of all items under each policy."""
        ways = zip(*(item.ways for item in self._items), strict=True)
        return [tuple(map(sum, zip(*(way[2:] for way in mine), strict=True))) for mine in ways]

    @cached_property
    def _turn(self) -> float:
        """When forward ends."""
        return max((saved.saved for saved in self._step.saved), default=0.0)

    def _laid(self, labels: Sequence[int]) -> _State:
        """Items under these policies."""
        picks, recompute = [0] * len(self._step.saved), [False] * len(self._step.blocks)
        for label, item in zip(labels, self._items, strict=True):
            self._put(item, item.ways[label], picks, recompute)
        return self._judged(picks, recompute)

    def _put(self, item: _Item, way: _Way, picks: list[int], recompute: list[bool]) -> None:
        if item.block >= 0:
            recompute[item.block] = way.again
        for i, pick in zip(item.members, way.picks, strict=True):
            picks[i] = pick

    def _climb(self, cost: _Cost, picks: list[int], recompute: list[bool], trials: int) -> _State:
        """Local search, an item after the other in an order that spreads them."""
        count, better = len(self._items), True
        edge = max(
            (n for n, item in enumerate(self._items) if self._changed(item, picks, recompute)), default=0
        )
        order = [(edge + round(n * GOLDEN * count)) % count for n in range(count)]
        while better:
            better = False
            for item in (self._items[n] for n in dict.fromkeys((*order, *range(count)))):
                for other_picks, other_recompute in self._changes(item, picks, recompute):
                    if not trials:
                        return cost, picks, recompute
                    trials -= 1
                    state = self._judged(other_picks, other_recompute)
                    if state[0] < (cost[0], cost[1] * (1 - 1e-6)):
                        cost, picks, recompute = state
                        better = True
        return cost, picks, recompute

    def _changed(self, item: _Item, picks: list[int], recompute: list[bool]) -> bool:
        return (item.block >= 0 and recompute[item.block]) or any(picks[i] for i in item.members)

    def _changes(
        self, item: _Item, picks: list[int], recompute: list[bool]
    ) -> Iterator[tuple[list[int], list[bool]]]:
        """An item in each way, with and without what there is room to keep, and its tensors one by one."""
        tried = [([picks[i] for i in item.members], item.block >= 0 and recompute[item.block])]
        room = self._limits[0] - sum(
            self._held(i, picks[i], recompute) for i in range(len(picks)) if i not in item.members
        )
        for way in item.ways:
            for filled in (self._filled(item, way, room), way):
                if (filled.picks, filled.again) not in tried:
                    tried.append((filled.picks, filled.again))
                    other, again = list(picks), list(recompute)
                    self._put(item, filled, other, again)
                    yield other, again
        for i in sorted(item.members, key=lambda i: -self._step.saved[i].nbytes):
            saved = self._step.saved[i]
            if saved.is_saved(saved.block >= 0 and recompute[saved.block]):
                for pick in range(len(self._simulator.options[i])):
                    if pick != picks[i]:
                        yield [*picks[:i], pick, *picks[i + 1 :]], list(recompute)

    def _filled(self, item: _Item, way: _Way, room: float) -> _Way:
        """A way that keeps what there is room for, the largest first."""
        picks, left = list(way.picks), room - way.held
        for n, i in sorted(enumerate(item.members), key=lambda pair: -self._step.saved[pair[1]].nbytes):
            saved, option = self._step.saved[i], self._simulator.options[i][picks[n]]
            more = saved.nbytes - option.resident
            if saved.is_saved(way.again) and picks[n] and more <= left:
                picks[n] = 0
                left -= more
        return way._replace(picks=picks)

    def _held(self, i: int, pick: int, recompute: Sequence[bool]) -> float:
        saved, option = self._step.saved[i], self._simulator.options[i][pick]
        return option.resident if saved.is_saved(saved.block >= 0 and recompute[saved.block]) else 0

    def _judged(self, picks: list[int], recompute: list[bool]) -> _State:
        self._left -= 1
        return _judged(self._simulator, picks, recompute, *self._limits)


def _policies(step: Step, options: Sequence[Sequence[Option]], limit: float) -> dict[str, _Policy]:
    """With codes, what can be derived is; what is small is kept where there is room for it."""
    small = _small(step.saved)
    if 4 * sum(step.saved[i].nbytes for i in small) > limit:
        small = set()

    def chosen(good: Callable[[Option], bool], derive: bool = True) -> list[int]:
        out = []
        for i, mine in enumerate(options):
            derived = [n for n, option in enumerate(mine) if derive and option.choice == DERIVE]
            fitting = derived or [n for n, option in enumerate(mine) if n and good(option) and i not in small]
            out.append(min(fitting, key=lambda n: mine[n].nbytes, default=0))
        return out

    derived = chosen(lambda o: o.choice == Choice(HERE, UPPER))
    raw = chosen(lambda o: o.choice == Choice(AWAY, "raw"), derive=False)
    rest = chosen(lambda o: o.choice in (Choice(AWAY, "raw"), Choice(AWAY, UPPER)))
    away = chosen(lambda o: o.choice.place == AWAY)
    here = chosen(lambda o: o.choice.place == HERE)
    leave = [r or a or h for r, a, h in zip(raw, away, here, strict=True)]
    policies = {"raw away": raw, DERIVED: derived, "derived, raw away": rest}
    if rest == raw:
        policies = {"raw away": raw}
    policies |= {"codes away": away, "codes here": here}
    found = {name: _Policy(False, picks) for name, picks in policies.items() if any(picks)}
    if any(block.repeatable for block in step.blocks):
        stay = [0 if saved.block >= 0 else pick for saved, pick in zip(step.saved, leave, strict=True)]
        found["recompute"] = _Policy(True, stay)
        found["recompute, inputs away"] = _Policy(True, leave)
    return found


def _judged(
    simulator: Simulator, picks: list[int], recompute: list[bool], limit: float, host_limit: float
) -> _State:
    return _cost(simulator.run(picks, recompute), limit, host_limit), picks, recompute


def _cost(forecast: Forecast, limit: float, host_limit: float) -> _Cost:
    seconds = forecast.seconds + SECONDS_PER_BYTE * forecast.away
    seconds += SECONDS_PER_WORKING_BYTE * max(0.0, forecast.working - limit)
    return _over(forecast, limit, host_limit), seconds


def _over(forecast: Forecast, limit: float, host_limit: float) -> float:
    return max(0.0, forecast.held - limit) + max(0.0, forecast.away - host_limit)


def _parts(step: Step) -> list[list[int]]:
    """Neighbours that are alike, together: same block, same codes with about the same ratios."""
    cap = sum(saved.nbytes for saved in step.saved if not saved.boundary) / PARTS
    small = _small(step.saved)
    parts: list[list[int]] = []
    last: dict[tuple[object, ...], tuple[list[int], int]] = {}
    for i, saved in enumerate(step.saved):
        kinds = ((c.lane, c.nbytes < saved.nbytes, _ratio(saved, c)) for c in saved.codes)
        kind = saved.block, saved.boundary, i in small, *kinds
        part, nbytes = last.get(kind, ([], 0))
        if not part or nbytes + saved.nbytes > cap:
            part, nbytes = [], 0
            parts.append(part)
        part.append(i)
        last[kind] = part, nbytes + saved.nbytes
    return parts


def _ratio(saved: Saved, code: Code) -> int:
    """In eighths; 0 for a code of no bytes."""
    return round(8 * saved.nbytes / code.nbytes) if code.nbytes else 0


def _small(saved: Sequence[Saved]) -> set[int]:
    """Those up to a size, which are `SMALL` of all bytes together at most: to keep them costs little, and to
    send them as much of the host as large ones."""
    inner = [s.nbytes for s in saved if not s.boundary]
    most, size = SMALL * sum(inner), -1
    for nbytes, count in sorted(Counter(inner).items()):
        most -= nbytes * count
        if most < 0:
            break
        size = nbytes
    return {i for i, s in enumerate(saved) if s.nbytes <= size and not s.boundary}


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
                (max(m.host_times[0] for m in members), min(m.host_times[1] for m in members)),
                len(members),
            )
        )
    return replace(step, saved=tuple(saved))
