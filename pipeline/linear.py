"""Linear programs of a few variables, solved by looking at every vertex."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from sidelane.errors import LaneError

Array = NDArray[np.float64]
MAX_VERTICES = 200_000
TOLERANCE = 1e-9  # of a row whose largest coefficient is 1


def minimise(cost: Array, a: Array, b: Array, a_equal: Array, b_equal: Array) -> Array | None:
    """The x >= 0 [n] with the least cost @ x of those with a @ x <= b and a_equal @ x = b_equal.

    A bounded program has its minimum at a vertex, where n rows hold with equality: all of `a_equal` and some
    of the others. All such sets are solved at once; the problem must be bounded from below. None when no x
    fits.

    Args:
        cost [n]; a [m, n], b [m]; a_equal [k, n], b_equal [k] of full rank, k <= n.

    Raises LaneError when there are more than `MAX_VERTICES` sets.
    """
    n, k = len(cost), len(a_equal)
    rows, bounds = _scaled(np.concatenate((a, -np.eye(n))), np.concatenate((b, np.zeros(n))))
    chosen = _subsets(len(rows), n - k)
    same, ends = _scaled(a_equal, b_equal)
    systems = np.empty((len(chosen), n, n))
    values = np.empty((len(chosen), n))
    systems[:, :k], values[:, :k] = same, ends
    systems[:, k:], values[:, k:] = rows[chosen], bounds[chosen]
    regular = np.linalg.det(systems) != 0
    x = np.linalg.solve(systems[regular], values[regular][..., None])[..., 0]  # [vertices, n]
    # What rounding makes of a system that is all but singular fits only if it is a point of the program.
    fits = (x @ rows.T <= bounds + TOLERANCE).all(1) & (np.abs(x @ same.T - ends) <= TOLERANCE).all(1)
    x = x[fits]
    if not len(x):
        return None
    best: Array = np.maximum(x[np.argmin(x @ cost)], 0.0)
    return best


def _scaled(rows: Array, bounds: Array) -> tuple[Array, Array]:
    """The same rows with a largest coefficient of 1; rows of zeros stay."""
    largest = np.abs(rows).max(1, initial=0.0)
    largest[largest == 0] = 1.0
    return rows / largest[:, None], bounds / largest


def _subsets(count: int, size: int) -> NDArray[np.intp]:
    """All sets of `size` of `count` numbers [sets, size]."""
    total = comb(count, size)
    if total > MAX_VERTICES:
        raise LaneError(f"{count} limits on {size} unknowns are too many to try: leave out lanes")
    return np.array(list(combinations(range(count), size)), dtype=np.intp).reshape(total, size)
