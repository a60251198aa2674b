"""The blocks of a model: found, watched while a context is active, run under a checkpoint when told to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, wraps
from threading import RLock
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint

from sidelane.errors import LaneError

Around = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_VALUES = (Tensor, bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def find_blocks(module: nn.Module) -> tuple[nn.Module, ...]:
    """The modules of the longest `nn.ModuleList` in `module` whose members, two or more, are of one class; of
    equally long ones that with the most parameters. Empty if there is none."""

    def size(blocks: nn.ModuleList) -> tuple[int, int]:
        return len(blocks), sum(p.numel() for p in blocks.parameters())

    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    alike = [m for m in lists if len(m) > 1 and len({type(block) for block in m}) == 1]
    return tuple(sorted(alike, key=size)[-1]) if alike else ()


class Blocks:
    """Modules whose forward passes go through `around` while they are installed.

    Args:
        around: called as around(module, forward, args, kwargs) in place of forward(*args, **kwargs).

    Raises LaneError when one of them is no module.
    """

    def __init__(self, modules: Iterable[nn.Module], around: Around) -> None:
        if not isinstance(modules, Iterable):
            raise LaneError(f"blocks={modules!r} is no list of modules: pass model.layers, say")
        self._modules = tuple(dict.fromkeys(modules))
        for module in self._modules:
            if not isinstance(module, nn.Module):
                raise LaneError(
                    f"blocks: {type(module).__name__} is no torch.nn.Module: pass modules, as model.layers"
                )
        self._around = around
        self._lock = RLock()
        self._users: set[object] = set()
        self._before: list[tuple[nn.Module, Any, Any]] = []  # module, its own forward or None, ours

    @property
    def training(self) -> tuple[bool, ...]:
        """Which of them are in training mode."""
        return tuple(module.training for module in self._modules)

    def install(self, user: object) -> None:
        """Until all of those who called this have called `remove`."""
        with self._lock:
            self._users.add(user)
            for module in self._modules[len(self._before) :]:
                own = vars(module).get("forward")
                ours = _replacement(module, self._around)
                self._before.append((module, own, ours))
                module.forward = ours

    def remove(self, user: object) -> None:
        """May be called again, and after an `install` that did not come to its end."""
        with self._lock:
            self._users.discard(user)
            while self._before and not self._users:
                module, own, ours = self._before[-1]
                if vars(module).get("forward") is not ours:
                    pass  # replaced again by somebody else, who calls ours
                elif own is None:
                    del module.forward
                else:
                    module.forward = own
                self._before.pop()


def _replacement(module: nn.Module, around: Around) -> Any:
    inner: Any = module.forward
    if getattr(inner, "__self__", None) is not module:

        @wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return inner(*args, **kwargs)
            return around(module, inner, args, kwargs)

        return forward
    function = inner.__func__

    # A method again, not a closure over `inner`, or a copy of the module would run this one.
    @wraps(function)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return function(self, *args, **kwargs)
        return around(self, partial(function, self), args, kwargs)

    return MethodType(method, module)


def run_again_later(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`forward(*args, **kwargs)` that saves the tensors of its arguments alone, and runs again in backward.

    Lists and dicts then hold what they hold at this call.
    """
    leaves, spec = tree_flatten((args, kwargs))
    first = [(args, kwargs)]

    def run(*leaves: Any) -> Any:
        args, kwargs = first.pop() if first else tree_unflatten(leaves, spec)
        return forward(*args, **kwargs)

    return checkpoint(run, *leaves, use_reentrant=False)


def is_plain(leaves: Iterable[Any]) -> bool:
    """Tensors, numbers and the like alone: nothing that a forward pass changes by the way."""
    return all(isinstance(leaf, _VALUES) for leaf in leaves)


def modes(module: nn.Module) -> tuple[bool, ...]:
    """Which parts of `module` are in training mode."""
    return tuple(part.training for part in module.modules())


def fingerprint(module: nn.Module, values: Any) -> list[tuple[int, int]]:
    """What a change of the buffers of `module`, or of the tensors, lists and dicts in `values`, changes."""
    parts = [*module.buffers(), *tree_leaves(values)]
    return [(id(part), _version(part)) for part in parts]


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0
