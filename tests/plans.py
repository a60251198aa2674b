"""Plans that tests make up, in place of those of the search."""

from __future__ import annotations

import random
from dataclasses import replace
from math import inf

from sidelane.pipeline import step_auto
from sidelane.pipeline.step_model import Choice, Simulator
from sidelane.pipeline.step_plan import StepPlan


def force(monkeypatch, prefer: str | None = None, recompute: float = 0.0, seed: int = 0) -> list[StepPlan]:
    """From here on, plans of contexts take the choice `prefer` ("away exact", "keep raw", ...) wherever a
    tensor has it, or any at random; and recompute blocks with a probability. Plans in which no tensor has it
    take forever. Returns the plans made."""
    rng, made = random.Random(seed), []

    def plan(step, limit, host_limit):
        simulator = Simulator(step, limit)
        picks = []
        for options in simulator.options:
            names = [f"{o.choice.place} {o.choice.lane}" for o in options]
            wanted = names.index(prefer) if prefer in names else 0
            picks.append(rng.randrange(len(options)) if prefer is None else wanted)
        again = tuple(b.repeatable and rng.random() < recompute for b in step.blocks)
        choices: tuple[Choice, ...] = tuple(
            o[p].choice for o, p in zip(simulator.options, picks, strict=True)
        )
        forecast = simulator.run(picks, again)
        if prefer is not None and all(f"{choice.place} {choice.lane}" != prefer for choice in choices):
            forecast = replace(forecast, seconds=inf)
        made.append(StepPlan(choices, again, forecast, limit, host_limit))
        return made[-1]

    monkeypatch.setattr(step_auto, "plan_step", plan)
    return made


def places(plan: StepPlan) -> set[str]:
    return {choice.place for choice in plan.choices}
