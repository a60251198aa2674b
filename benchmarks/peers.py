"""How each method of the offload benchmark is switched on: sidelane, and its peers at their defaults."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from llama import Llama
from torch import nn
from torch.autograd.graph import save_on_cpu

import sidelane
from sidelane.pipeline.report import Report


@dataclass(frozen=True)
class Method:
    """What is around one training step.

    Attributes:
        package: whose code it is; its version goes into the rows.
        around_forward, around_step: make the context of a forward pass, or of forward and backward.
        report: of sidelane, what the context counted so far.
    """

    package: str
    around_forward: Callable[[], AbstractContextManager[Any]] = nullcontext
    around_step: Callable[[], AbstractContextManager[Any]] = nullcontext
    report: Callable[[], Report] | None = None

    @property
    def version(self) -> str:
        return f"{self.package} {version(self.package)}"


@dataclass(frozen=True)
class Setting:
    """A row of the benchmark.

    Attributes:
        open: makes the method for a model; switches checkpointing on in it where the method needs that.
            Takes `gpu_budget` in bytes when `peak` is given.
        exact: its gradients must equal those without offload bit for bit.
        recompute: compared with "checkpoint" rather than "none" for the time that copies add.
        settle: steps before the gate, in which the method makes up its mind.
        peak: GiB; the largest GPU budget is taken with which a step stays below it.
    """

    open: Callable[..., Method]
    exact: bool = True
    recompute: bool = False
    settle: int = 0
    peak: float | None = None
    options: dict[str, Any] = field(default_factory=dict)


def none(model: nn.Module) -> Method:
    return Method("torch")


def checkpointed(model: Llama) -> Method:
    """Non-reentrant torch checkpoint of every layer."""
    _enable_checkpointing(model)
    return Method("torch")


def cpu_saved(model: nn.Module) -> Method:
    pinned = torch.cuda.is_available()
    return Method("torch", around_forward=lambda: save_on_cpu(pin_memory=pinned))


def hugging_face(model: Llama) -> Method:
    """`gradient_checkpointing_enable(offload=True)`: layers are recomputed, their inputs kept on the host."""
    model.backbone.gradient_checkpointing_enable(offload=True)
    return Method("transformers")


def trl(model: nn.Module, stash: int = 5) -> Method:
    """Around forward and backward, as its trainer has it. The head is left out by the model itself."""
    from trl.models.activation_offloading import OffloadActivations

    context = OffloadActivations(max_fwd_stash_size=stash)
    context.update_model_params(model)
    return Method("trl", around_step=lambda: context)


def torchtune(model: nn.Module, stash: int = 5) -> Method:
    """Around forward, as its recipes have it."""
    context = torchtune_module().OffloadActivations(max_fwd_stash_size=stash)
    return Method("torchtune", around_forward=lambda: context)


def deepspeed(model: Llama) -> Method:
    """Its context for Hugging Face checkpointing, around forward and backward as it demands."""
    from deepspeed.runtime.activation_checkpointing.offload_activations import CheckpointHiddenStatesOffload

    _enable_checkpointing(model)
    context = CheckpointHiddenStatesOffload()
    return Method("deepspeed", around_step=lambda: context)


def ours(model: Llama, lane: str, recompute: bool = False, **options: Any) -> Method:
    """sidelane.offload around forward; `recompute`: with torch checkpoint of every layer inside."""
    if recompute:
        _enable_checkpointing(model)
    context = sidelane.offload(lane, **options)
    return Method("sidelane", around_forward=lambda: context, report=context.report)


# A saved tensor costs the host up to 0.1 ms, in which the wire carries 5 MB.
_LARGE: dict[str, Any] = {"min_bytes": 4 << 20}
_BOUNDARIES = {"recompute": True, "gpu_budget": 256 << 20}

SETTINGS = {
    "none": Setting(none),
    "checkpoint": Setting(checkpointed, recompute=True),
    "sidelane 4-bit": Setting(ours, exact=False, peak=3.6, options=_LARGE | {"lane": "packed", "bits": 4}),
    "sidelane 8-bit": Setting(
        ours, exact=False, peak=3.6, options=_LARGE | {"lane": "packed", "bits": 8, "group": 256}
    ),
    "sidelane exact": Setting(ours, peak=3.6, options=_LARGE | {"lane": "exact"}),
    "sidelane exact 10.8 GiB": Setting(ours, peak=10.8, options=_LARGE | {"lane": "exact"}),
    "sidelane raw": Setting(ours, peak=3.6, options=_LARGE | {"lane": "raw"}),
    "sidelane checkpoint exact": Setting(ours, recompute=True, options=_BOUNDARIES | {"lane": "exact"}),
    "sidelane checkpoint raw": Setting(ours, recompute=True, options=_BOUNDARIES | {"lane": "raw"}),
    "transformers offload": Setting(hugging_face, recompute=True),
    "deepspeed": Setting(deepspeed, recompute=True),
    "trl": Setting(trl),
    "trl stash 1": Setting(trl, options={"stash": 1}),
    "torchtune": Setting(torchtune),
    "torchtune stash 1": Setting(torchtune, options={"stash": 1}),
    "save_on_cpu": Setting(cpu_saved),
}


def torchtune_module() -> ModuleType:
    """torchtune/training/_activation_offloading.py by itself.

    The package imports torchao, torchdata and datasets; this file needs four names of them, of which three
    only for tests of type.
    """
    name = "torchtune.training._activation_offloading"
    found = PathFinder.find_spec("torchtune")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'torchtune'", name="torchtune")
    path = Path(found.submodule_search_locations[0]) / "training" / "_activation_offloading.py"
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"{path} cannot be loaded", name="torchtune")
    module = module_from_spec(spec)
    stubs: dict[str, dict[str, Any]] = {
        "torchao": {},
        "torchao.dtypes": {},
        "torchao.dtypes.nf4tensor": {"NF4Tensor": type("NF4Tensor", (), {})},
        "torchtune": {},
        "torchtune.modules": {"TiedLinear": type("TiedLinear", (), {})},
        "torchtune.utils": {"get_logger": lambda level: logging.getLogger("torchtune")},
    }
    modules = {stub: ModuleType(stub) for stub in stubs}
    for stub, names in stubs.items():
        vars(modules[stub]).update(names)
    with patch.dict(sys.modules, modules):
        spec.loader.exec_module(module)
    return module


def _enable_checkpointing(model: Llama) -> None:
    model.backbone.gradient_checkpointing_enable()
