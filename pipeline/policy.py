"""Which saved tensors an offload context touches, and which of those may lose bits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import Parameter

from sidelane.codec.lane import Lane
from sidelane.codec.packet import DTYPES
from sidelane.kernels._launch import current_device
from sidelane.pipeline.extent import KINDS, View, geometry
from sidelane.pipeline.lanes import PackedLane
from sidelane.pipeline.packed import LOSSY_DTYPES

DEVICES = ("cuda", "cpu")
HEADS_BITS = 8
NOT_PLAIN = "not a plain tensor"
OTHER_DEVICE = "other device"
WEIGHT = "weight"

# Nodes whose output is the same elements as their input, or a cast of them.
_VIEWS = {
    "AliasBackward0",
    "AsStridedBackward0",
    "ChunkBackward0",
    "ExpandBackward0",
    "NarrowBackward0",
    "PermuteBackward0",
    "ReshapeAliasBackward0",
    "SelectBackward0",
    "SliceBackward0",
    "SplitBackward0",
    "SplitWithSizesBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "SqueezeBackward2",
    "TBackward0",
    "ToCopyBackward0",
    "TransposeBackward0",
    "TransposeBackward1",
    "UnbindBackward0",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
}
_DEPTH = 8  # nodes from a cast weight to its parameter
_PLAIN = (Tensor, Parameter)
Shape = tuple[torch.dtype, tuple[int, ...]]
_plain_keys: dict[int, bool] = {}  # by the dispatch keys of a tensor, whether it is plain
_kinds: dict[tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]], Kind] = {}
_dispatch_keys, _graph_task = torch._C._dispatch_keys, torch._C._current_graph_task_id
_capturing = torch.cuda.is_current_stream_capturing


@dataclass(frozen=True, eq=False, slots=True)
class Kind:
    """What is known of plain tensors of the same dtype, sizes, strides and dispatch keys, which tell devices,
    and tensors that are conjugated or negated. Made once.

    Attributes:
        view: of one at the start of its storage.
        shape: their dtype and sizes.
        nbytes: of the distinct elements.
        kept: why they are left alone whatever their size, or None.
        activation: their dtype, shape and layout are those of activations.
    """

    view: View
    shape: Shape
    nbytes: int
    kept: str | None
    activation: bool

    @classmethod
    def of(cls, tensor: Tensor) -> Kind:
        dtype, laid = tensor.dtype, geometry(tensor)
        kept = None if tensor.device.type in DEVICES else OTHER_DEVICE
        if kept is None and dtype not in DTYPES:
            kept = "other dtype"
        size, pairs = laid.size, laid.pairs
        activation = dtype in LOSSY_DTYPES and len(size) >= 2 and size[-1] > 1 and pairs is not None
        view = View(dtype, laid, 0, tensor.is_conj(), tensor.is_neg())
        return cls(view, (dtype, size), view.nbytes, kept, activation)

    def view_of(self, tensor: Tensor) -> View:
        """Of one of them."""
        offset = int(tensor.storage_offset())
        return self.view._replace(offset=offset) if offset else self.view


def plain_kind(tensor: Tensor) -> Kind | None:
    """The kind of a plain tensor; None of others."""
    if type(tensor) not in _PLAIN:
        return None
    keys = _dispatch_keys(tensor).raw_repr()
    plain = _plain_keys.get(keys)
    if plain is None:
        plain = _plain_keys[keys] = is_plain(tensor)
    if not plain:
        return None
    known = keys, tensor.dtype, tensor.shape, tensor.stride()
    kind = _kinds.get(known)
    if kind is None:
        if len(_kinds) >= KINDS:
            _kinds.clear()
        kind = _kinds[known] = Kind.of(tensor)
    return kind


def why_kept(tensor: Tensor, min_bytes: int, kind: Kind | None) -> str | None:
    """The reason to leave a saved tensor alone, or None. `kind`: what `plain_kind` says of it."""
    if kind is None:
        return NOT_PLAIN
    if kind.kept == OTHER_DEVICE:
        return kind.kept
    # What a backward pass saves (the recompute of a checkpoint, a graph for double backward) is used before
    # the pass ends: moving it out would only bring it straight back.
    if _graph_task() != -1:
        return "saved in backward"
    if is_weight(tensor):
        return WEIGHT
    if kind.nbytes < min_bytes or not kind.nbytes:
        return "below min_bytes"
    if kind.kept is not None:
        return kind.kept
    if tensor.is_cuda and is_capturing(tensor.device):
        return "graph capture"
    return None


def is_capturing(device: torch.device) -> bool:
    if device.index == current_device():
        return _capturing()
    with torch.cuda.device(device):
        return _capturing()


def is_plain(tensor: Tensor) -> bool:
    """False for subclasses (DTensor, fake, quantized), nested, sparse and functorch tensors, which have no
    strides or must not be taken apart."""
    return (
        type(tensor) in _PLAIN
        and tensor.layout == torch.strided
        and not tensor.is_meta
        and not tensor.is_nested
        and not tensor.is_quantized
        and not tensor.is_inference()
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
        and not torch._is_functional_tensor(tensor)
    )


def is_weight(tensor: Tensor) -> bool:
    """True for parameters and other leaves of the graph, their views, and casts of parameters.

    Copying them frees nothing: the graph holds every leaf that requires grad, autocast its casts. The cast of
    a frozen parameter looks like any other tensor and is not recognised.
    """
    base = tensor._base
    if base is None:
        base = tensor
    if base.is_leaf and (base.requires_grad or isinstance(base, Parameter)):
        return True
    node: Node | None = tensor.grad_fn
    for _ in range(_DEPTH + 1):
        if node is None or type(node).__name__ not in _VIEWS:
            break
        node = node.next_functions[0][0]
    leaf = type(node).__name__ == "AccumulateGrad"
    return leaf and isinstance(getattr(node, "variable", None), Parameter)


def may_lose_bits(tensor: Tensor, kind: Kind | None) -> bool:
    """True for activations: floats of two dimensions or more that gradients flow through.

    What requires no grad is data that other values are derived from (logsumexp, random states, masks,
    tables), a last dimension of 1 marks the statistics of a norm, and errors in the logarithm of a softmax
    are in an exponent: all three stay exact. So does what a compiled region saves inside: autograd does not
    tell the first two apart there. `kind`: what `plain_kind` says of it.
    """
    if not tensor.requires_grad or kind is None:
        return False
    return kind.activation and "Softmax" not in _name(tensor.grad_fn)


def _name(node: Node | None) -> str:
    """Of its class; nodes of C++ extensions share one class."""
    kind = type(node).__name__
    return kind if node is None or kind != "CppFunction" else node.name()


def for_heads(lane: Lane) -> Lane:
    """The lane for tensors of four dimensions: group codes of fewer than 8 bits become 8 bits.

    Backward of fused attention computes the softmax again from the saved queries and keys, so their errors
    are in its exponent: with 4 bits the gradient of a GPT lost its direction within 500 steps, in attention
    alone (benchmarks/log.md). Images [N, C, H, W] look the same and get 8 bits too.
    """
    if isinstance(lane, PackedLane) and lane.basis is None and lane.bits < HEADS_BITS:
        return replace(lane, bits=HEADS_BITS)
    return lane
