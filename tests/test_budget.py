"""Budgets: the limit holds, and what is claimed goes back whatever happens."""

from __future__ import annotations

import gc
import threading
from itertools import count

import pytest

from interrupt import interrupted
from sidelane.pipeline import budget as budget_module
from sidelane.pipeline.budget import Budget, Holders


def test_the_limit_holds():
    budget = Budget(100)
    a, b = budget.claim(60), budget.claim(40)
    assert budget.claim(1) is None and budget.held == 100
    assert (a.nbytes, b.nbytes) == (60, 40)
    del a
    assert budget.held == 40
    assert budget.claim(61) is None
    assert budget.claim(0) is not None
    del b
    assert (budget.held, budget.peak) == (0, 100)


def test_without_a_limit():
    budget = Budget()
    claim = budget.claim(1 << 60)
    assert budget.held == budget.peak == 1 << 60
    del claim
    assert budget.held == 0


def test_a_claim_may_shrink():
    budget = Budget(100)
    a, b = budget.claim(60), budget.claim(40)
    budget.shrink(a, 25)
    assert (a.nbytes, budget.held, budget.peak) == (25, 65, 100)
    budget.shrink(b, 50)  # it does not grow
    assert (b.nbytes, budget.held) == (40, 65)
    c = budget.claim(35)
    assert c is not None and budget.claim(1) is None
    del a, b, c
    assert budget.held == 0


def test_holders_are_counted_while_they_hold():
    holders = Holders()
    assert holders.held == 0
    held = [holders.claim() for _ in range(3)]
    assert holders.held == 3
    held.pop()
    assert holders.held == 2
    held.append(holders.claim())
    del held
    assert holders.held == 0


def test_claims_of_a_budget_that_is_gone():
    claim = Budget(10).claim(5)
    gc.collect()
    assert claim.nbytes == 5


def test_claims_in_cycles_collected_in_the_middle_of_anything():
    budget = Budget(1000)
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(300):
            cycle = [budget.claim(10)]
            cycle.append(cycle)
            del cycle
    finally:
        gc.set_threshold(*before)
    gc.collect()
    assert budget.held == 0 and budget.peak < 1000


def test_threads():
    budget = Budget(1000)
    seen: list[int] = []

    def work():
        for n in range(300):
            claim = budget.claim(n % 400)
            seen.append(budget.held)
            del claim

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert budget.held == 0 and 0 < max(seen) <= budget.peak <= 1000


@pytest.mark.parametrize("full", [False, True])
def test_an_interrupt_at_any_point_breaks_nothing(full):
    for at in count():
        budget = Budget(100)
        kept, claims = budget.claim(40), [budget.claim(30)]

        def use(budget=budget, claims=claims):
            claims.append(budget.claim(50 if full else 20))
            budget.shrink(claims[0], 7)
            claims.clear()
            claims.append(budget.claim(60))

        hit = interrupted(use, at, budget_module)
        alive = sum(claim.nbytes for claim in [kept, *claims] if claim is not None)
        assert budget.held == alive <= 100, at
        claims.clear()
        assert budget.held == 40 and budget.claim(60) is not None and budget.claim(61) is None
        if not hit:
            break
    assert at > 10
