"""The first example of the README runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_first_example(capsys: pytest.CaptureFixture[str]) -> None:
    found = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1], names)
    assert "exact" in capsys.readouterr().out
    x, model = names["x"], names["model"]
    assert (names["restored"] - x).norm() <= 0.01 * x.norm()
    del model.forward
    gradients = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    model(x).square().mean().backward()
    assert all(torch.equal(a, b.grad) for a, b in zip(gradients, model.parameters(), strict=True))
