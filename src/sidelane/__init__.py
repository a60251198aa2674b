"""sidelane: move tensors over narrow wires by making them smaller on the way.

Names are loaded on first use: `import sidelane` alone touches neither torch, Triton nor CUDA.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from sidelane.errors import (
    AbiError,
    BasisError,
    BudgetError,
    DriverError,
    LaneError,
    LaneUnavailable,
    OffloadError,
    PacketError,
    ProfileError,
    SidelaneError,
    SpaceError,
)

if TYPE_CHECKING:
    from sidelane.codec.packet import Packet
    from sidelane.pipeline.basis import Basis
    from sidelane.pipeline.calibrate import calibrate
    from sidelane.pipeline.chain import Chain
    from sidelane.pipeline.checkpoint import OffloadedCheckpoint, checkpoint
    from sidelane.pipeline.compress import compress, decompress
    from sidelane.pipeline.dual import DualLane, dual_share
    from sidelane.pipeline.dual_wire import DualWire
    from sidelane.pipeline.gradients import compare_gradients
    from sidelane.pipeline.lanes import PackedLane
    from sidelane.pipeline.machine import Machine
    from sidelane.pipeline.offload import offload
    from sidelane.pipeline.recompute import StoredKV
    from sidelane.pipeline.wrap import wrap

__version__ = "0.1.0"

__all__ = [
    "AbiError",
    "Basis",
    "BasisError",
    "BudgetError",
    "Chain",
    "DriverError",
    "DualLane",
    "DualWire",
    "LaneError",
    "LaneUnavailable",
    "Machine",
    "OffloadError",
    "OffloadedCheckpoint",
    "PackedLane",
    "Packet",
    "PacketError",
    "ProfileError",
    "SidelaneError",
    "SpaceError",
    "StoredKV",
    "__version__",
    "calibrate",
    "checkpoint",
    "compare_gradients",
    "compress",
    "decompress",
    "dual_share",
    "offload",
    "wrap",
]

_LAZY = {
    "Basis": "sidelane.pipeline.basis",
    "Chain": "sidelane.pipeline.chain",
    "DualLane": "sidelane.pipeline.dual",
    "DualWire": "sidelane.pipeline.dual_wire",
    "Machine": "sidelane.pipeline.machine",
    "OffloadedCheckpoint": "sidelane.pipeline.checkpoint",
    "PackedLane": "sidelane.pipeline.lanes",
    "Packet": "sidelane.codec.packet",
    "StoredKV": "sidelane.pipeline.recompute",
    "calibrate": "sidelane.pipeline.calibrate",
    "checkpoint": "sidelane.pipeline.checkpoint",
    "compare_gradients": "sidelane.pipeline.gradients",
    "compress": "sidelane.pipeline.compress",
    "decompress": "sidelane.pipeline.compress",
    "dual_share": "sidelane.pipeline.dual",
    "offload": "sidelane.pipeline.offload",
    "wrap": "sidelane.pipeline.wrap",
}


def __getattr__(name: str) -> object:
    """PEP 562: import the module that defines `name`."""
    if name not in _LAZY:
        raise AttributeError(f"module 'sidelane' has no attribute '{name}'")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
