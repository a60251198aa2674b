"""Byte budgets: claims that go back when they are collected. See Note: [Interrupts] in `pool`."""

from __future__ import annotations

import sys
from collections import deque
from threading import Lock
from weakref import getweakrefs, ref


class Claim:
    """Bytes taken from a budget; they go back when it is collected, on any thread."""

    __slots__ = ("__weakref__", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


class _Share(ref[Claim]):
    """The budget's side of a claim."""

    __slots__ = ("nbytes",)
    nbytes: int


class Holders:
    """How many hold one token. The interpreter counts, so that nothing has to be done when one lets go."""

    __slots__ = ("_idle", "_token")

    def __init__(self) -> None:
        self._token = object()
        self._idle = sys.getrefcount(self._token)

    @property
    def held(self) -> int:
        return sys.getrefcount(self._token) - self._idle

    def claim(self) -> object:
        """The token, to be held."""
        return self._token


class Budget:
    """Bytes in use, never above `limit` (None: no limit). Thread-safe."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.peak = 0
        self._held = 0
        self._lock = Lock()
        self._returned: deque[_Share] = deque()
        self._live: dict[int, _Share] = {}  # by id: a weak reference hashes like what it refers to
        self._torn = False

    @property
    def held(self) -> int:
        """Bytes of the claims that are alive."""
        with self._lock:
            self._begin()
            self._torn = False
            return self._held

    def claim(self, nbytes: int) -> Claim | None:
        """A claim on `nbytes`, or None when they do not fit."""
        with self._lock:
            self._begin()
            claim = None
            if self.limit is None or self._held + nbytes <= self.limit:
                claim = Claim(nbytes)
                share = _Share(claim, self._returned.append)
                share.nbytes = nbytes
                self._live[id(share)] = share
                self._held += nbytes
                if self._held > self.peak:
                    self.peak = self._held
            self._torn = False
        return claim

    def shrink(self, claim: Claim, nbytes: int) -> None:
        """Give back what `claim`, of this budget, has above `nbytes`."""
        with self._lock:
            self._begin()
            for share in getweakrefs(claim):
                if isinstance(share, _Share) and share.nbytes > nbytes:
                    claim.nbytes = nbytes  # first: what is torn is rebuilt from the claims
                    self._held -= share.nbytes - nbytes
                    share.nbytes = nbytes
            self._torn = False

    def _begin(self) -> None:
        if self._torn:
            alive = [(share, claim) for share in list(self._live.values()) if (claim := share()) is not None]
            self._live = {id(share): share for share, _ in alive}
            for share, claim in alive:
                share.nbytes = claim.nbytes
            self._held = sum(claim.nbytes for _, claim in alive)
        self._torn = True
        while self._returned:
            share = self._returned.popleft()
            if self._live.pop(id(share), None) is share:
                self._held -= share.nbytes
