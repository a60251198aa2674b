"""The basis of the packed and video lanes: principal components, each with a code width and a clip range."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike, fspath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sidelane.errors import BasisError
from sidelane.kernels.reference import MAX_CODE_BITS
from sidelane.pipeline.streams import settle

FORMAT = "sidelane-basis-1"
_TENSORS = ("mean", "components", "std", "peak", "spectrum")

# End points, in standard deviations, of the uniform quantizer of 2^width levels with the least mean squared
# error for a Laplacian source: J. Max, "Quantizing for minimum distortion", IRE Trans. IT 6(1), 1960; solved
# numerically. The measured peak limits coefficients with lighter tails instead.
LOADING = (0.0, 0.71, 1.63, 2.56, 3.46, 4.34, 5.22, 6.10, 6.99, 7.89, 8.79, 9.71, 10.62)
PEAK_MARGIN = 1.25  # more data exceeds the peak of a sample


@dataclass(frozen=True, eq=False)
class Quantizer:
    """Operands of `project_quantize_ref` and `dequantize_project_ref` for x [T, D] and codes [T, K].

    Attributes:
        components: [D, K] float32, contiguous.
        offset, inv_scale, levels, scale: [K] float32; the mean is folded into `offset`.
        bias: [D] float32, the mean and the projected lower ends of the clip ranges.
        widths: bits of each code, 1..12; levels = 2^width - 1.
    """

    components: Tensor
    offset: Tensor
    inv_scale: Tensor
    levels: Tensor
    scale: Tensor
    bias: Tensor
    widths: list[int]


@dataclass(frozen=True, eq=False)
class Basis:
    """Principal components of rows [D] and how to quantize each coefficient z = (x - mean) @ components.

    Attributes:
        mean: [D].
        components: [D, K], orthonormal columns in order of falling eigenvalue.
        std: [K], root mean square of each coefficient over held-out rows.
        peak: [K], largest magnitude of each coefficient over held-out rows.
        spectrum: [D], eigenvalues of the covariance, falling.
        widths: bits of each coefficient, 0..12; 0 drops it.
        heldout_error: relative Frobenius error of coding held-out rows with `widths`.
        samples: rows the mean and the components were fitted to.
        dropped: rows left out because they held NaN or Inf.

    All tensors are float32 on one device. Operands that are made of it live as long as it does: on a GPU keep
    it until the streams that code with it are done. Raises BasisError when the fields do not fit each other.
    """

    mean: Tensor
    components: Tensor
    std: Tensor
    peak: Tensor
    spectrum: Tensor
    widths: tuple[int, ...]
    heldout_error: float
    samples: int
    dropped: int = 0

    def __post_init__(self) -> None:
        dim, rank = self.mean.numel(), len(self.widths)
        shapes = ((dim,), (dim, rank), (rank,), (rank,), (dim,))
        for (name, tensor), shape in zip(self._tensors.items(), shapes, strict=True):
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                found = f"{tensor.dtype} {list(tensor.shape)}"
                raise BasisError(f"basis field '{name}' is {found}, float32 {list(shape)} expected")
            if not tensor.isfinite().all():
                raise BasisError(f"basis field '{name}' holds NaN or Inf")
        if rank > dim:
            raise BasisError(f"basis has {rank} components for {dim} dimensions")
        if not any(self.widths) or not all(0 <= w <= MAX_CODE_BITS for w in self.widths):
            raise BasisError(f"basis field 'widths' needs integers 0..{MAX_CODE_BITS}, at least one above 0")

    @property
    def dim(self) -> int:
        """D, the length of the rows."""
        return self.mean.numel()

    @property
    def rank(self) -> int:
        """Coefficients with a width above 0."""
        return sum(w > 0 for w in self.widths)

    @property
    def bits(self) -> float:
        """Bits per element of x at the allocated widths."""
        return sum(self.widths) / self.dim

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors: what a receiver needs once, before the first packet."""
        return sum(t.nbytes for t in self._tensors.values())

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def effective_rank(self) -> float:
        """exp(entropy of the normalized spectrum): O. Roy and M. Vetterli, EUSIPCO 2007."""
        p = self.spectrum.double() / self.spectrum.double().sum()
        return float(torch.special.entr(p).sum().exp())

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over every field: name and shape with the little-endian bytes, or name and text."""
        sha = hashlib.sha256(FORMAT.encode())
        for name, tensor in self._tensors.items():
            sha.update(f"\n{name} {list(tensor.shape)} ".encode())
            sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        for name, text in self._numbers.items():
            sha.update(f"\n{name} {text}".encode())
        return sha.digest()

    def to(self, device: torch.device | str) -> Basis:
        """This basis on `device`, copied once for each device."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device == self.device:
            return self
        if device not in self._copies:
            moved: dict[str, Any] = {name: t.to(device) for name, t in self._tensors.items()}
            settle(device)
            self._copies[device] = replace(self, **moved)
        return self._copies[device]

    def quantizer(self, width: int | None = None) -> Quantizer:
        """Operands for the coefficients whose allocated width is above 0, made once for each `width`.

        Args:
            width: bits for all of them, 1..12; None takes the allocated widths.

        The clip range of a coefficient is `clip_range` to both sides of the mean.
        """
        if width is not None and not 1 <= width <= MAX_CODE_BITS:
            raise BasisError(f"code width {width} is outside 1..{MAX_CODE_BITS}")
        if width not in self._quantizers:
            made = self._make_quantizer(width)
            settle(self.device)
            self._quantizers[width] = made
        return self._quantizers[width]

    def _make_quantizer(self, width: int | None) -> Quantizer:
        used = [k for k, w in enumerate(self.widths) if w]
        widths = [self.widths[k] if width is None else width for k in used]
        components = self.components[:, used].contiguous()
        limit = clip_range(self.std[used].double(), self.peak[used].double(), widths)
        levels = torch.tensor([2**w - 1 for w in widths], dtype=torch.float64, device=self.device)
        limit = torch.where(2 * limit / levels > torch.finfo(torch.float32).tiny, limit, 0.0)
        scale = 2 * limit / levels
        wide = components.double()
        mean = self.mean.double()
        return Quantizer(
            components,
            offset=(mean @ wide - limit).float(),
            inv_scale=torch.where(scale > 0, 1 / scale, 0.0).float(),
            levels=levels.float(),
            scale=scale.float(),
            bias=(mean - wide @ limit).float(),
            widths=widths,
        )

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in _TENSORS}

    @property
    def _numbers(self) -> dict[str, str]:
        """The other fields as text that restores them exactly."""
        return {
            "widths": " ".join(map(str, self.widths)),
            "heldout_error": repr(self.heldout_error),
            "samples": str(self.samples),
            "dropped": str(self.dropped),
        }

    @property
    def _metadata(self) -> dict[str, str]:
        return {"format": FORMAT, "digest": self.digest.hex(), **self._numbers}

    @cached_property
    def _copies(self) -> dict[torch.device, Basis]:
        return {}

    @cached_property
    def _quantizers(self) -> dict[int | None, Quantizer]:
        return {}

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file with the numbers and the digest in its metadata."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in self._tensors.items()}
        save_file(tensors, fspath(path), self._metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Basis:
        """Read a file of `save`, on the CPU. Raises BasisError unless it is intact and of this format."""
        name = fspath(path)
        try:
            with safe_open(name, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise BasisError(f"{name} is not a basis file: write one with Basis.save")
                values: dict[str, Any] = {name: file.get_tensor(name) for name in _TENSORS}
            values["widths"] = tuple(int(w) for w in metadata["widths"].split())
            values["heldout_error"] = float(metadata["heldout_error"])
            values["samples"] = int(metadata["samples"])
            values["dropped"] = int(metadata["dropped"])
            basis = cls(**values)
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            if isinstance(error, BasisError):
                raise
            raise BasisError(f"{name} is not an intact basis file: {error}") from error
        if metadata != basis._metadata:
            raise BasisError(f"{name} is corrupted: its digest does not match")
        return basis


def clip_range(std: Tensor, peak: Tensor, widths: list[int]) -> Tensor:
    """Half width [K] of the clip ranges of `widths` bits: min(PEAK_MARGIN * peak, LOADING[width] * std)."""
    return torch.minimum(PEAK_MARGIN * peak, std.new_tensor([LOADING[w] for w in widths]) * std)
