"""What a program has made its default device does not matter: no tensor of ours ends up there unasked."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

import sidelane
from models import MIN_BYTES, assert_same, build, gradients, settled
from sidelane.codec.packet import Packet
from sidelane.codec.qp_map import variance_qp_map
from sidelane.layout import FORMATS, TOKEN_ROWS, plan_surface
from sidelane.pipeline.lanes import open_lane


@pytest.fixture
def x() -> Tensor:
    waves = torch.sin(torch.arange(512.0)[:, None] / torch.linspace(3, 40, 64))
    return (waves + 0.1 * torch.randn(512, 64)).bfloat16()


@pytest.fixture
def elsewhere(x: Tensor) -> Iterator[None]:
    """A default device on which nothing can be computed, once `x` is made."""
    with torch.device("meta"):
        yield


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("lane", "options"),
    [
        ("raw", {}),
        ("exact", {}),
        ("packed", {"bits": 4}),
        ("packed", {"bits": 8, "seed": 1}),
        ("video-cpu", {}),
    ],
)
def test_round_trips(x: Tensor, lane: str, options: dict[str, int]) -> None:
    if lane == "video-cpu":
        options = {"basis": sidelane.calibrate([x.float()], rank=16)}
    opened = open_lane(lane, **options)
    packet = Packet.from_bytes(opened.encode(x).to_bytes())
    restored = opened.decode(packet)
    assert restored.device == x.device and restored.dtype == x.dtype and restored.shape == x.shape
    assert (restored.float() - x.float()).norm() < 0.5 * x.float().norm()


@pytest.mark.usefixtures("elsewhere")
def test_a_basis(x: Tensor) -> None:
    basis = sidelane.calibrate([x.float()], rank=16)
    packet = open_lane("packed", basis=basis).encode(x)
    assert open_lane("packed", basis=basis).decode(packet).device == x.device
    layout = plan_surface(FORMATS["nv12"], TOKEN_ROWS, 512, 16)
    assert variance_qp_map(torch.ones(16, device="cpu"), layout, 20).device == x.device


@pytest.mark.parametrize(
    ("lane", "options"), [("exact", {}), ("packed", {"bits": 8}), ("auto", {}), ("exact", {"checker": True})]
)
def test_offload(lane: str, options: dict[str, object]) -> None:
    model, tokens = build()
    plain = partial(gradients, model, tokens)
    expected = plain()
    context = sidelane.offload(lane, gpu_budget=60_000, min_bytes=MIN_BYTES, **options)
    for _ in range(3):
        with torch.device("meta"):
            inside = plain(context)
        if lane != "packed":
            assert_same(inside, expected)
        assert settled(context)


def test_a_chain(x: Tensor) -> None:
    with torch.device("meta"), sidelane.Chain("exact") as chain:
        assert torch.equal(next(chain.stream([x])), x)
