"""Rules every launcher shares: where a call runs, how its output is laid out in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache, reduce
from itertools import accumulate
from operator import itemgetter, or_
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from sidelane.errors import LaneError

ALIGNMENT = 256  # bytes; of the parts of one encoding
_compiled: dict[tuple[object, ...], Any] = {}
_interpret: ContextVar[bool] = ContextVar("interpret", default=False)
_HERE: AbstractContextManager[Any] = nullcontext()
_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # of a device; none without CUDA
# torch.cuda.current_device without a look whether CUDA is initialized, which it is where there are tensors.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


@contextmanager
def interpret() -> Iterator[None]:
    """Run kernels on CPU tensors through the Triton interpreter.

    TRITON_INTERPRET=1 must be set before a kernel module is first imported.
    """
    token = _interpret.set(True)
    try:
        yield
    finally:
        _interpret.reset(token)


def use_triton(tensor: Tensor) -> bool:
    """True where the Triton kernel runs; elsewhere the launcher calls the reference."""
    return tensor.is_cuda or _interpret.get()


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of `tensor` current, which costs nothing where it is already."""
    if not tensor.is_cuda or tensor.device.index == current_device():
        return _HERE
    return torch.cuda.device(tensor.device)


class Part:
    """The bytes of the uint8 vector `buffer` from `start` on, for `launch`, which needs no tensor of them."""

    __slots__ = ("buffer", "start")
    dtype = torch.uint8

    def __init__(self, buffer: Tensor, start: int) -> None:
        self.buffer = buffer
        self.start = start

    def data_ptr(self) -> int:
        return self.buffer.data_ptr() + self.start

    def tensor(self) -> Tensor:
        return self.buffer[self.start :]


def launch(
    kernel: Any,
    count: int,
    tensors: tuple[Any, ...],
    numbers: tuple[int, ...],
    constants: tuple[object, ...],
    **options: object,
) -> Callable[..., object] | None:
    """`kernel[(count,)](*tensors, *numbers, *constants, **options)` on the device of the first tensor.

    `tensors` after the first may be `Part`s. Returns what launches the same again, called with addresses at
    multiples of 16 in the place of tensors while that device is current; None where that is not known.

    Triton takes longer to find the compiled kernel of a call than to launch it, so those of tensors that
    begin at multiples of 16 are kept here by what it specializes on: dtypes, constants, and of each number
    whether it is 1, a multiple of 16, or beyond int32.
    """
    first: Tensor = tensors[0]
    with device_of(first):
        addresses = [tensor.data_ptr() for tensor in tensors]
        key: tuple[object, ...] | None = None
        if first.is_cuda and not reduce(or_, addresses) % 16:
            kinds = [(n == 1, n % 16 == 0, -(2**31) <= n < 2**31) for n in numbers]
            dtypes = [tensor.dtype for tensor in tensors]
            key = (id(kernel), first.device.index, *dtypes, *kinds, *constants, *options.values())
            if (compiled := _compiled.get(key)) is not None:
                again = _again(compiled, count)
                again(*addresses, *numbers, *constants)
                return again
        whole = [tensor.tensor() if isinstance(tensor, Part) else tensor for tensor in tensors]
        compiled = kernel[(count,)](*whole, *numbers, *constants, **options)
        if key is not None:
            _compiled[key] = compiled
        return None


def _again(compiled: Any, count: int) -> Callable[..., object]:
    """`compiled[count, 1, 1]`, without the calls of hooks that it makes where there are none, too."""
    with_hooks = compiled[count, 1, 1]
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata

    def again(*args: object) -> object:
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        if _stream is None or getattr(enter, "calls", True) or getattr(leave, "calls", True):
            return with_hooks(*args)
        stream = _stream(current_device())
        return run(count, 1, 1, stream, function, metadata, None, None, None, *args)

    return again


def carve(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """uint8 vectors of `sizes` bytes in order in one new allocation, each at a multiple of ALIGNMENT.

    The allocation is a multiple of ALIGNMENT long.
    """
    return cut(torch.empty(span(sizes), dtype=torch.uint8, device=device), sizes)


def cut(buffer: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Views of the uint8 vector `buffer` as `carve` lays them out."""
    cuts, parts = _cuts(sizes, buffer.numel())
    return parts(buffer.split_with_sizes(cuts))[:-1]  # type: ignore[no-any-return]


@lru_cache(maxsize=4096)
def span(sizes: tuple[int, ...]) -> int:
    """Bytes that `carve` takes for `sizes`."""
    return sum(size + -size % ALIGNMENT for size in sizes)


@lru_cache(maxsize=4096)
def starts(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Where `carve` puts the parts of `sizes`."""
    return tuple(accumulate((size + -size % ALIGNMENT for size in sizes[:-1]), initial=0))[: len(sizes)]


@lru_cache(maxsize=4096)
def _cuts(sizes: tuple[int, ...], total: int) -> tuple[tuple[int, ...], itemgetter[Any]]:
    """How to cut `total` bytes: each of `sizes`, and the padding behind it where there is any; and what takes
    those of `sizes` from the pieces, and one more."""
    cuts: list[int] = []
    places = []
    for size in sizes:
        places.append(len(cuts))
        cuts += [size, -size % ALIGNMENT] if size % ALIGNMENT else [size]
    return (*cuts, total - span(sizes)), itemgetter(*places, -1)


def check_parts(parts: dict[str, Tensor], sizes: tuple[int, ...]) -> None:
    """Raise LaneError unless `parts` are vectors of `sizes` bytes on one device that kernels can read."""
    device = next(iter(parts.values())).device
    for (name, part), size in zip(parts.items(), sizes, strict=True):
        if part.numel() != size or part.dtype != torch.uint8 or part.ndim != 1 or not part.is_contiguous():
            raise LaneError(f"{name} is {part.dtype} {tuple(part.shape)}, not contiguous uint8 [{size}]")
        if part.device != device:
            raise LaneError(f"{name} is on {part.device}, other parts on {device}: move them together")
        if part.data_ptr() % 16:
            raise LaneError(f"{name} does not begin at a multiple of 16 bytes: pass a copy")


def aligned(part: Tensor) -> Tensor:
    """The contiguous `part`, copied if its address is no multiple of 16."""
    return part.clone() if part.data_ptr() % 16 else part


def programs(tiles: int, most: int | None) -> int:
    """Programs for `tiles`, `most` of them at most: each takes several tiles then, and the rest of the GPU
    stays free for others. Raises LaneError for less than one."""
    if most is not None and most < 1:
        raise LaneError(f"max_programs={most}: at least one program has to run")
    return tiles if most is None else min(tiles, most)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; two of a CPU, so that tests have programs that share work."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
