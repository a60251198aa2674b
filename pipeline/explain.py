"""The plan of a context, told to people."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import isinf

from sidelane.pipeline.lesson import Script
from sidelane.pipeline.rates import source
from sidelane.pipeline.step_model import AWAY, DERIVED, HERE, KEEP, Choice, Forecast

MIB = 1 << 20


@dataclass(frozen=True)
class Plan:
    """What an offload context does with its step.

    Attributes:
        script: the step and the choices.
        measured: seconds from the first save to the end of backward, median of the last steps; None before.
    """

    script: Script
    measured: float | None

    @property
    def predicted(self) -> float:
        """Seconds of what `measured` measures, as forecast when the plan was made."""
        return self.script.plan.forecast.seconds

    @property
    def recompute(self) -> tuple[bool, ...]:
        """Of each call of a block."""
        return self.script.plan.recompute

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Of each saved tensor, in order; those of a block are for when it is not recomputed, those of its
        inputs for when it is."""
        return self.script.plan.choices

    @property
    def binding(self) -> str:
        """What keeps the step from being as short as without a limit."""
        return self.script.plan.binding()

    def explain(self) -> str:
        """Times, the limit that binds, where rates come from, what is done in each block, and plain policies
        instead.

        "cannot" stands by blocks that must not run twice: they changed a buffer or an argument, or had an
        argument that is not built of tensors, numbers, tuples, lists and dicts.
        """
        plan, measured = self.script.plan, self.measured
        real = "not measured yet" if measured is None else f"measured {measured * 1e3:.1f} ms"
        lines = [
            f"plan: predicted {self.predicted * 1e3:.1f} ms, {real}; "
            f"held {_mib(plan.forecast.held)} MiB of {_mib(plan.limit)}; bound by {self.binding}",
            f"rates: {source(self.script.lesson.device)}",
        ]
        lines += _rows(self._table())
        others = (self._other(name, forecast) for name, forecast in plan.others.items())
        mine = self._other("this plan", plan.forecast)
        lines += _rows([("policy", "ms", "MiB held", "MiB away", "fits"), mine, *others])
        return "\n".join(lines)

    def _other(self, name: str, forecast: Forecast) -> tuple[str, ...]:
        ms = f"{forecast.seconds * 1e3:.1f}"
        fits = "yes" if self.script.plan.allows(forecast) else "no"
        return name, ms, _mib(forecast.held), _mib(forecast.away), fits

    def _table(self) -> list[tuple[str, ...]]:
        plan, lesson = self.script.plan, self.script.lesson
        table: list[tuple[str, ...]] = [
            ("block", "decision", "MiB", "kept", "derived", "coded here", "away", "away as", "recompute ms")
        ]
        step_blocks = lesson.step().blocks
        for b in range(-1, len(plan.recompute)):
            again = b >= 0 and plan.recompute[b]
            sums: Counter[str] = Counter()
            lanes = set()
            for entry, choice in zip(lesson.entries, plan.choices, strict=True):
                if entry.block != b:
                    continue
                sums["all"] += 0 if entry.boundary else entry.weight
                if b >= 0 and entry.boundary != again:
                    continue
                sums[choice.place] += entry.weight
                if choice.place == AWAY:
                    lanes.add(choice.lane)
            if not sums:
                continue
            places = [place for place in (KEEP, DERIVED, HERE, AWAY) if sums[place]]
            seconds = f"{step_blocks[b].seconds * 1e3:.2f}" if again else ""
            if b >= 0 and not step_blocks[b].repeatable:
                seconds = "cannot"
            decision = "recompute" if again else ", ".join(places) or "nothing saved"
            table.append(
                (
                    "outside" if b < 0 else str(b),
                    decision,
                    *(_mib(sums[name]) for name in ("all", KEEP, DERIVED, HERE, AWAY)),
                    ", ".join(sorted(lanes)),
                    seconds,
                )
            )
        return table


def _mib(nbytes: float) -> str:
    return "no limit" if isinf(nbytes) else f"{nbytes / MIB:.1f}"


def _rows(table: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
