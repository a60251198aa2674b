"""Contexts of saved-tensor hooks, which a thread enters and leaves whole whatever interrupts it.

What no Python context can help is an interrupt before the first instruction of its `__exit__`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from sidelane.errors import OffloadError

Self = TypeVar("Self", bound="HookContext")

_local = threading.local()


class Visit(NamedTuple):
    """What a context does when a thread enters, and when it leaves.

    `leave` may be called again, and after an `arrive` that did not come to its end. It is told whether it is
    an exception that leaves.
    """

    arrive: Callable[[], None]
    leave: Callable[[bool], None]


class HookContext:
    """Base of contexts that pack what autograd saves inside them; any thread may enter one, and again."""

    def _pack(self, tensor: Tensor) -> Any:
        raise NotImplementedError

    def _unpack(self, packed: Any) -> Tensor:
        raise NotImplementedError

    def _visit(self) -> Visit | None:
        """A thread is about to enter."""
        return None

    def __enter__(self: Self) -> Self:
        entry = _Entry(self)
        try:
            _entries().append(entry)
            entry.visit = self._visit()
            if entry.visit is not None:
                entry.visit.arrive()
            entry.hooks.__enter__()
            return self
        except BaseException:
            entry.recover()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        entry = None
        try:
            entry = _innermost(self)
            entry.hooks.__exit__()
            _entries().remove(entry)
            entry.take_leave(error is not None)
        except BaseException:
            (entry or _innermost(self)).recover()
            raise

    def hooks_apply(self) -> bool:
        """Autograd hands what the calling thread saves to this context: no hooks were installed since."""
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        hook = None if top is None else top[0]
        return isinstance(hook, partial) and getattr(hook.func, "__self__", None) is self

    @staticmethod
    def innermost() -> HookContext | None:
        """The context that the calling thread entered last and has not left."""
        entries = _entries()
        return entries[-1].context if entries else None


class _Entry:
    """One entering of a context by a thread."""

    def __init__(self, context: HookContext) -> None:
        self.context = context
        self.visit: Visit | None = None
        # Objects of this entry alone, so that it knows its own among the installed hooks.
        self.hooks = saved_tensors_hooks(partial(context._pack), partial(context._unpack))

    def recover(self) -> None:
        """Remove what there is of a half installed or half removed entry."""
        top = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if top is not None and top[0] is self.hooks.pack_hook:
            torch._C._autograd._pop_saved_tensors_default_hooks()
        if self in _entries():
            _entries().remove(self)
        self.take_leave(True)

    def take_leave(self, failed: bool) -> None:
        if self.visit is not None:
            self.visit.leave(failed)


def _entries() -> list[_Entry]:
    """Of the calling thread, innermost last."""
    found: list[_Entry] | None = getattr(_local, "entries", None)
    if found is None:
        found = _local.entries = []
    return found


def _innermost(context: HookContext) -> _Entry:
    for entry in reversed(_entries()):
        if entry.context is context:
            return entry
    raise OffloadError("this thread has not entered the context that it leaves: use `with`")
