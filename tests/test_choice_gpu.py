"""The lane "auto" on a GPU: a profile that is measured here, a chain that learns from events."""

from __future__ import annotations

import pytest
import torch

from sidelane.pipeline.chain import Chain
from sidelane.pipeline.choice import choose
from sidelane.pipeline.machine import Machine
from sidelane.pipeline.probe import measure
from sidelane.pipeline.samples import SAMPLE, probe

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def machine() -> Machine:
    return measure(budget=15.0)


def test_a_chain_learns_from_events(machine: Machine) -> None:
    tensors = [torch.randn(4096, 1024, device="cuda").bfloat16() for _ in range(4)]
    with Chain("auto", machine=machine, depth=8) as chain:
        for i, back in enumerate(chain.stream(tensors[i % 4] for i in range(120))):
            assert torch.equal(back, tensors[i % 4])
        text = chain.explain()
    taken = text.splitlines()[0].rpartition(": ")[2]
    row = next(line for line in text.splitlines()[2:] if line.startswith(taken))
    assert row.split()[4] != "-"  # measured


def test_slow_wires_are_worth_a_kernel(machine: Machine) -> None:
    x = torch.randn(4096, 1024, device="cuda").bfloat16()
    assert choose(x, 1e9, machine).lane == "exact"
    assert choose(x, 1e9, machine, max_rel_error=0.2).lane == "packed:4"
    assert choose(x, 1e13, machine, max_rel_error=0.2).lane == "raw"


@pytest.mark.parametrize("lane", ["raw", "exact", "packed:4"])
def test_samples_are_timed_as_tables_are(machine: Machine, lane: str) -> None:
    """Far apart only if one of them counts something else, as waiting for what was enqueued before."""
    x = torch.randn(4096, 1024, device="cuda").bfloat16()
    for _ in range(20):
        x @ x.T
    found, speed = probe(lane, x), machine.lanes[f"{lane}|bfloat16|idle"]
    assert found.nbytes == pytest.approx(SAMPLE, rel=0.1)
    assert speed.encode(found.nbytes) / 5 < found.encode < 5 * speed.encode(found.nbytes)
    assert speed.decode(found.nbytes) / 5 < found.decode < 5 * speed.decode(found.nbytes)
