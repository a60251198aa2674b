"""One rank of the processes that test_offload_distributed starts: runs every scenario, prints what failed.

Arguments: rank, number of ranks, file to meet at, "cpu" or "cuda".
"""

from __future__ import annotations

import json
import sys
import traceback
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from models import MIN_BYTES, Decoder, assert_same, build, loss_of, settled
from sidelane.pipeline.offload import offload

exact = partial(offload, min_bytes=MIN_BYTES, checker=True)


def data(device: torch.device) -> Tensor:
    """Tokens of this rank."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randint(0, 64, (2, 48), generator=generator).to(device)


def local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def step(
    model: nn.Module, tokens: Tensor, context=None, *, autocast=False, micro=1, scaler=None
) -> list[Tensor]:
    """Gradients on this rank, summed over `micro` forward and backward passes of which the last one syncs."""
    model.zero_grad()
    for i in range(micro):
        last = i == micro - 1
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = last
        elif hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(last)
        with (
            context or torch.enable_grad(),
            torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast),
        ):
            loss = loss_of(model, tokens) * (i + 1)
        (loss if scaler is None else scaler.scale(loss)).backward()
    return [local(p.grad).clone() for p in model.parameters()]


def compare(model: nn.Module, tokens: Tensor, **options) -> offload:
    """Bitwise equal gradients in two steps with offload, nothing left behind; the context."""
    expected = step(model, tokens, **options)
    context = exact()
    for _ in range(2):
        assert_same(step(model, tokens, context, **options), expected)
    assert settled(context)
    return context


def packed(context: offload) -> int:
    return context.report().total.count


def alone(device: torch.device, **options) -> int:
    """Tensors that the model packs in `compare` without any wrapper."""
    return packed(compare(build(device)[0], data(device), **options))


def with_checkpoint(device: torch.device) -> Decoder:
    def wrap(block, x, **kwargs):
        return checkpoint(block, x, use_reentrant=False, **kwargs)

    return build(device, wrap)[0]


def sharded(model: Decoder, **options) -> Decoder:
    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def ddp(device):
    model = DistributedDataParallel(build(device)[0])
    assert packed(compare(model, data(device))) == alone(device)


def ddp_autocast_accumulation_scaler(device):
    model = DistributedDataParallel(build(device)[0], gradient_as_bucket_view=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    assert packed(compare(model, data(device), autocast=True, micro=3, scaler=scaler)) > 0


def ddp_unused_parameters(device):
    model = build(device)[0]
    model.unused = nn.Linear(3, 3, device=device)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    expected = [p.grad for p in step_of_used(wrapped, data(device))]
    actual = [p.grad for p in step_of_used(wrapped, data(device), exact())]
    assert_same(actual, expected)


def step_of_used(model, tokens, context=None):
    model.zero_grad()
    with context or torch.enable_grad():
        loss = loss_of(model, tokens)
    loss.backward()
    used = [p for name, p in model.named_parameters() if "unused" not in name]
    for p in used:
        p.grad = p.grad.clone()
    return used


def ddp_checkpoint(device):
    model = DistributedDataParallel(with_checkpoint(device), static_graph=True)
    assert packed(compare(model, data(device))) > 0


def fsdp(device):
    for reshard in (True, False):
        context = compare(sharded(build(device)[0], reshard_after_forward=reshard), data(device))
        # As many as without sharding: no unsharded weight is among them.
        assert packed(context) == alone(device) and context.report().kept["weight"].count > 0


def fsdp_mixed_precision(device):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(build(device)[0], mp_policy=policy)
    context = compare(model, data(device), micro=2)
    weights = {tuple(p.shape) for p in build(device)[0].parameters()}
    shapes = {row.shape for row in context.report().classes}
    assert shapes and not shapes & (weights | {shape[::-1] for shape in weights})


def fsdp_autocast(device):
    model = sharded(build(device)[0])
    assert packed(compare(model, data(device), autocast=True)) == alone(device, autocast=True)


def fsdp_checkpoint(device):
    assert packed(compare(sharded(with_checkpoint(device)), data(device))) > 0


def fsdp_trains_as_without(device):
    """Three optimizer steps; sharded weights change under the context."""
    results = []
    for context in (None, exact()):
        model = sharded(build(device)[0])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
        for _ in range(3):
            step(model, data(device), context)
            optimizer.step()
        results.append([local(p.detach()).clone() for p in model.parameters()])
    assert_same(results[1], results[0])


def tensor_parallel(device):
    class Feed(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False)

        def forward(self, x):
            return self.down(torch.tanh(self.up(x)))

    torch.manual_seed(1)
    model = Feed().to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    plan = {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
    model = parallelize_module(model, mesh, plan)
    x = torch.randn(64, 32, device=device)

    def run(context=None):
        model.zero_grad()
        with context or torch.enable_grad():
            loss = model(x).square().sum()
        loss.backward()
        return [local(p.grad).clone() for p in model.parameters()]

    context = exact()
    assert_same(run(context), run())
    assert context.report().kept["not a plain tensor"].count > 0 and context.report().tickets == 0


SCENARIOS = {
    f.__name__: f
    for f in (
        ddp,
        ddp_autocast_accumulation_scaler,
        ddp_unused_parameters,
        ddp_checkpoint,
        fsdp,
        fsdp_mixed_precision,
        fsdp_autocast,
        fsdp_checkpoint,
        fsdp_trains_as_without,
        tensor_parallel,
    )
}


def main(rank: int, world: int, path: str, kind: str) -> None:
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", init_method=f"file://{path}", rank=rank, world_size=world
    )
    failures = {}
    with sdpa_kernel(SDPBackend.MATH):  # repeats bit for bit
        for name, scenario in SCENARIOS.items():
            try:
                scenario(device)
            except Exception:
                failures[name] = traceback.format_exc()
            dist.barrier()
    print(json.dumps(failures))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
