"""Activation checkpointing whose saved inputs travel through a lane."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sidelane.codec.lane import Lane
from sidelane.errors import LaneError, OffloadError
from sidelane.pipeline.compress import check_bound
from sidelane.pipeline.extent import describe
from sidelane.pipeline.offload import offload

Out = TypeVar("Out")

_HOLE = object()  # stands for a tensor among the leaves of a pytree


def checkpoint(
    fn: Callable[..., Out],
    *args: Any,
    lane: str | Lane | None = None,
    max_rel_error: float | None = None,
    preserve_rng_state: bool = True,
    **kwargs: Any,
) -> Out:
    """`fn(*args, **kwargs)` that keeps only its inputs for backward, encoded, and runs again there.

    Tensors anywhere in `args` and `kwargs` (lists, tuples, dicts, registered pytrees) go through the lane
    under the rules of `offload`: parameters and small tensors are kept. Parameters and other leaves that `fn`
    uses get their gradients whether or not an input needs one. The result may be any pytree of tensors and
    other values; its floating tensors require grad.

    Args:
        lane, max_rel_error: as for `offload`, "auto" included. When neither is given the enclosing `offload`
            context takes the inputs, with its budgets and its report; without one the lane is exact.
        preserve_rng_state: run again with the random states of the first run (CPU, and the CUDA devices of
            the inputs).

    Options of a lane are given with it, as `lane=PackedLane(bits=4)`, or to an enclosing `offload`: here they
    would go to `fn`.

    Raises LaneError for a bad argument, OffloadError when `fn` changes an input in place; in backward for
    `torch.autograd.grad`, `inputs=` and double backward: use
    `torch.utils.checkpoint.checkpoint(use_reentrant=False)` inside `offload` there.
    """
    check_bound(max_rel_error)
    if not callable(fn):
        raise LaneError(f"fn={fn!r} cannot be called: pass the function first, then its arguments")
    if not torch.is_grad_enabled():
        return fn(*args, **kwargs)
    if "use_reentrant" in kwargs:
        raise LaneError("checkpoint has no use_reentrant: leave it out")
    leaves, spec = pytree.tree_flatten((args, kwargs))
    call, tensors = _Call.split(fn, leaves, spec, preserve_rng_state)
    with ExitStack() as stack:
        if lane is not None or max_rel_error is not None or offload.current() is None:
            stack.enter_context(_context(_hashable(lane), max_rel_error))
        # Outputs of a Function require grad only if an input does; with the anchor, parameters get theirs.
        anchor = torch.empty(0, device="cpu", requires_grad=True)
        outputs = OffloadedCheckpoint.apply(call, anchor, *tensors)  # type: ignore[no-untyped-call]
    return cast(Out, call.result(outputs))


class OffloadedCheckpoint(torch.autograd.Function):
    """Runs a call without recording it, saves its tensors through the active saved-tensor hooks, and runs it
    again in backward. Called by `checkpoint`."""

    @staticmethod
    def forward(ctx: Any, call: _Call, anchor: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        versions = [t._version for t in tensors]
        outputs = call.run(tensors)
        for i, (tensor, version) in enumerate(zip(tensors, versions, strict=True)):
            if tensor._version != version:
                raise OffloadError(
                    f"checkpointed function changes input {i}, {describe(tensor)}, in place: clone it inside"
                )
        # Nothing is recorded here, so an output that requires grad came from outside: a parameter, say. It
        # must not become the output of this node itself.
        outputs = tuple(
            t.detach() if t.requires_grad and all(t is not i for i in tensors) else t for t in outputs
        )
        ctx.call = call
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(*(t for t in outputs if not t.is_floating_point() and not t.is_complex()))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise OffloadError(
                "checkpoint cannot be differentiated twice: use torch.utils.checkpoint.checkpoint with "
                "use_reentrant=False inside offload()"
            )
        if not torch.autograd._is_checkpoint_valid():  # type: ignore[no-untyped-call]
            raise OffloadError(
                "checkpoint needs loss.backward() without inputs=: for torch.autograd.grad use "
                "torch.utils.checkpoint.checkpoint with use_reentrant=False inside offload()"
            )
        needs = ctx.needs_input_grad[2:]
        inputs = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needs, strict=True)]
        outputs = ctx.call.run_again(inputs)
        if len(outputs) != len(grads):
            raise OffloadError(
                f"the checkpointed function returned {len(grads)} tensors, and {len(outputs)} when it ran "
                "again: it has to do the same both times"
            )
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        if pairs:
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        return None, None, *(t.grad for t in inputs)


class _Call:
    """A function with its arguments but for their tensors, and the surroundings it ran in."""

    def __init__(
        self, fn: Callable[..., Any], leaves: list[Any], spec: pytree.TreeSpec, surroundings: _Surroundings
    ) -> None:
        self._fn = fn
        self._leaves = leaves
        self._spec = spec
        self._surroundings = surroundings
        self._result: tuple[list[Any], pytree.TreeSpec] | None = None

    @classmethod
    def split(
        cls, fn: Callable[..., Any], leaves: list[Any], spec: pytree.TreeSpec, preserve_rng_state: bool
    ) -> tuple[_Call, list[Tensor]]:
        """The call, and the tensors among `leaves`, which it does not hold."""
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = [_HOLE if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return cls(fn, others, spec, _Surroundings(tensors, preserve_rng_state)), tensors

    def run(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors among the results; the rest of the results waits for `result`."""
        args, kwargs = pytree.tree_unflatten(_fill(self._leaves, tensors), self._spec)
        leaves, spec = pytree.tree_flatten(self._fn(*args, **kwargs))
        self._result = [_HOLE if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def result(self, tensors: Sequence[Tensor]) -> Any:
        """What the function returned, around the tensors that autograd knows."""
        if self._result is None:
            raise OffloadError("the checkpointed function has not run")
        (leaves, spec), self._result = self._result, None
        return pytree.tree_unflatten(_fill(leaves, tensors), spec)

    def run_again(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """`run`, recorded by autograd, with the random states and autocast settings of the first time."""
        with self._surroundings.restored(), torch.enable_grad():
            outputs = self.run(tensors)
        self._result = None
        return outputs


class _Surroundings:
    """Random states and autocast settings when it is made."""

    def __init__(self, tensors: Sequence[Tensor], random: bool) -> None:
        self._random = torch.get_rng_state() if random else None
        devices = {t.device.index for t in tensors if t.is_cuda} if random else set()
        self._cuda = {index: torch.cuda.get_rng_state(index) for index in sorted(devices)}
        kinds = {"cpu"} | {t.device.type for t in tensors}
        self._autocast = [
            (
                kind,
                torch.get_autocast_dtype(kind),
                torch.is_autocast_enabled(kind),
                torch.is_autocast_cache_enabled(),
            )
            for kind in sorted(kinds)
            if torch.amp.is_autocast_available(kind)
        ]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, everything is as it was; afterwards as it is now."""
        with ExitStack() as stack:
            if self._random is not None:
                stack.enter_context(torch.random.fork_rng(devices=list(self._cuda)))
                torch.set_rng_state(self._random)
                for index, state in self._cuda.items():
                    torch.cuda.set_rng_state(state, index)
            for setting in self._autocast:
                stack.enter_context(torch.autocast(*setting))
            yield


def _hashable(lane: Any) -> Any:
    """`lane`, which every name and every lane is a key with. Raises LaneError."""
    try:
        hash(lane)
    except TypeError:
        raise LaneError(f"lane={lane!r} is no lane: give a name, or a lane as PackedLane(bits=4)") from None
    return lane


def _fill(leaves: Sequence[Any], tensors: Sequence[Tensor]) -> list[Any]:
    """`leaves` with the holes filled in order."""
    rest = iter(tensors)
    return [next(rest) if leaf is _HOLE else leaf for leaf in leaves]


@lru_cache(maxsize=16)
def _context(lane: Any, max_rel_error: float | None) -> offload:
    """One context for all checkpoints of a kind, so that they are fetched ahead of each other."""
    return offload(lane, max_rel_error=max_rel_error)
