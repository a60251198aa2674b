"""What an offload context does with single saved tensors: what it takes, what it
gives back."""

from __future__ import annotations

import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from saving import activation, assert_identical, save
from sidelane.errors import LaneError, OffloadError
from sidelane.pipeline import policy
from sidelane.pipeline.extent import without_flags
from sidelane.pipeline.lanes import PackedLane
from sidelane.pipeline.offload import offload
from sidelane.pipeline.policy import for_heads

KIB = 1 << 10


# What comes back

LAYOUTS = {
    "contiguous": lambda: torch.randn(8, 16),
    "transposed": lambda: torch.randn(8, 16).t(),
    "channels_last": lambda: torch.randn(2, 8, 4, 4).to(memory_format=torch.channels_last),
    "offset": lambda: torch.randn(9, 16)[1:],
    "half_of_the_columns": lambda: torch.randn(8, 16)[:, 5:13],
    "few_columns": lambda: torch.randn(8, 64)[:, 3:9],
    "few_columns_expanded": lambda: torch.randn(1, 8, 64)[:, :, 3:9].expand(5, 8, 6),
    "few_columns_transposed": lambda: torch.randn(4, 8, 64)[:, 1:3, 3:9].permute(2, 0, 1),
    "every_third": lambda: torch.randn(999)[1::3],
    "expanded": lambda: torch.randn(8, 1, 16).expand(8, 4, 16),
    "overlapping": lambda: torch.randn(64).unfold(0, 8, 1),
    "overlapping_part": lambda: torch.randn(4096)[7:71].unfold(0, 8, 1),
    "zero_dim": lambda: torch.randn(()),
    "one_of_many": lambda: torch.randn(100)[17],
    "empty": lambda: torch.randn(0, 4),
    "size_one": lambda: torch.randn(8, 1, 16)[:, :, ::2],
    "complex": lambda: torch.randn(8, 8, dtype=torch.complex64),
    "conjugate": lambda: torch.randn(8, 8, dtype=torch.complex64).t().conj(),
    "negative": lambda: torch.randn(8, 8, dtype=torch.complex64).conj().imag,
    "bfloat16": lambda: torch.randn(8, 16).bfloat16(),
    "float16": lambda: torch.randn(8, 16).half(),
    "float64": lambda: torch.randn(8, 16).double(),
    "float8": lambda: torch.randn(8, 16).to(torch.float8_e4m3fn),
    "bool": lambda: torch.rand(8, 16) > 0.5,
    "int64": lambda: torch.randint(-9, 9, (8, 16)),
    "not_finite": lambda: torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45]).repeat(8, 4),
}


@pytest.mark.parametrize("lane", ["raw", "exact", "packed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_comes_back(layout, lane):
    x = LAYOUTS[layout]()
    context = offload(lane, min_bytes=0, checker=True)  # x requires no grad: exact in every lane
    node = save(context, x)
    assert context.report().total.count == (0 if layout == "empty" else 1)
    for _ in range(2):
        assert_identical(node.saved_tensors[0], x)


def test_views_of_one_storage_share_one_packet():
    base = torch.randn(16, 32)
    views = [
        base,
        base.t(),
        base[2:10],
        base[5:16],
        base[3:9, 4:8],
        base.view(torch.int32),
        base.view(torch.int16)[:, 1:9],
        base[:1].expand(7, 32),
        base.view(4, 4, 32).permute(2, 0, 1),
    ]
    context = offload(min_bytes=0, checker=True)
    node = save(context, *views)
    assert context.report().total.count == 1
    assert context.report().deduplicated.count == len(views) - 1
    got = node.saved_tensors
    for view, back in zip(views, got, strict=True):
        assert_identical(back, view)
        assert back.storage_offset() == view.storage_offset()
    report = context.report()
    assert report.checked == report.unpacks == len(views)
    assert f"unpacked {len(views)} ({len(views)} checked), " in str(report)


def test_slices_of_a_fused_projection_share_one_packet():
    q, k, v = torch.randn(4, 8, 96).chunk(3, dim=-1)
    context = offload(min_bytes=0)
    node = save(context, *(t.view(4, 8, 4, 8).transpose(1, 2) for t in (q, k, v)))
    assert context.report().total.count == 1
    for t, back in zip((q, k, v), node.saved_tensors, strict=True):
        assert_identical(back, t.view(4, 8, 4, 8).transpose(1, 2))


def test_a_small_part_of_a_storage_is_stored_alone():
    base = torch.randn(64, 64)
    context = offload(min_bytes=0)
    part = base[:, :8]
    views = (part, part.t(), part.unflatten(1, (2, 4)))
    node = save(context, *views)
    total = context.report().total
    assert (total.count, total.bytes_in) == (1, part.numel() * 4)
    for view, back in zip(views, node.saved_tensors, strict=True):
        assert_identical(back, view)


def test_a_node_decodes_once_what_it_saved_twice():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x, x.view(16, 16))
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            a, b = ctx.saved_tensors
            assert a.data_ptr() == b.data_ptr()
            alive.append(weakref.ref(a))
            return grad * a

    alive = []
    x = torch.randn(256, requires_grad=True) * 1
    context = offload(min_bytes=0)
    with context:
        y = Twice.apply(x)
    y.backward(retain_graph=True)
    assert context.report().decodes == 1 and alive[0]() is None
    y.backward()
    assert context.report().decodes == 2


class ReturnsWhatItSaved(torch.autograd.Function):
    """The gradient of the first input is the saved second one itself, which `.grad` then aliases."""

    @staticmethod
    def forward(ctx, w, x):
        ctx.save_for_backward(x)
        return (w * x).sum()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return x, None


@pytest.mark.parametrize("between", [lambda w: None, lambda w: w.grad.zero_(), lambda w: w.grad.mul_(7)])
def test_a_gradient_that_is_saved_memory_may_be_overwritten(between):
    def run(context):
        w, v = (torch.ones(64, requires_grad=True) for _ in range(2))
        x = torch.full((64,), 2.0, requires_grad=True) * 1
        with context:
            first = ReturnsWhatItSaved.apply(w, x)
            second = (x.detach() * v).sum() + ReturnsWhatItSaved.apply(w, x.detach())
        first.backward()
        between(w)
        second.backward()
        return w.grad, v.grad

    expected = run(
        torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t.clone())
    )
    for got, want in zip(run(offload(min_bytes=0)), expected, strict=True):
        assert torch.equal(got, want)


def test_layers_that_save_the_same_input_decode_it_once():
    layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(3))
    data = torch.randn(8, 16, requires_grad=True)

    def run(context):
        layers.zero_grad()
        x = data * 1
        with context:
            loss = sum(layer(x).sin().sum() for layer in layers)
        loss.backward()
        return [p.grad.clone() for p in layers.parameters()]

    context = offload(min_bytes=0)
    for got, want in zip(run(context), run(nullcontext()), strict=True):
        assert torch.equal(got, want)
    report = context.report()
    assert (report.unpacks, report.deduplicated.count, report.decodes) == (6, 2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
def test_recurrent_layers_whose_cells_write_into_chunks_of_one_storage(kind, dtype):
    module = getattr(torch.nn, kind)(32, 32).to(dtype)
    x = torch.randn(8, 64, 32, dtype=dtype)

    def run(context):
        module.zero_grad()
        with context:
            loss = module(x)[0].float().square().sum()
        loss.backward()
        return [p.grad.clone() for p in module.parameters()]

    for got, want in zip(run(offload(min_bytes=0)), run(nullcontext()), strict=True):
        assert torch.equal(got, want)


def test_leaving_a_context_that_was_not_entered_is_refused():
    with pytest.raises(OffloadError, match="has not entered the context"):
        offload().__exit__(None, None, None)


def test_a_spill_folder_that_cannot_be_made_is_refused():
    with pytest.raises(LaneError, match="spill_dir: folder='/does/not/exist' takes no file"):
        offload(on_full="spill", spill_dir="/does/not/exist")


def test_new_data_at_an_old_address_is_not_the_old_data():
    memory = bytearray(4096)
    first = torch.frombuffer(memory, dtype=torch.float32).fill_(1)
    context = offload(min_bytes=0)
    kept = save(context, first)
    address = first.data_ptr()
    del first
    second = torch.frombuffer(memory, dtype=torch.float32)
    assert second.data_ptr() == address
    second.numpy()[:] = 2  # not seen by the version counter
    node = save(context, second)
    assert context.report().total.count == 2
    assert node.saved_tensors[0].eq(2).all() and kept.saved_tensors[0].eq(1).all()


def test_a_change_in_place_between_saves_makes_a_second_packet():
    x = torch.ones(64)
    context = offload(min_bytes=0)
    first = save(context, x)
    x.add_(1)
    second = save(context, x)
    x.add_(1)
    assert first.saved_tensors[0].eq(1).all() and second.saved_tensors[0].eq(2).all()
    assert context.report().total.count == 2


LOSSY_LAYOUTS = {
    "contiguous": lambda: activation(64, 64),
    "bfloat16": lambda: activation(64, 64, dtype=torch.bfloat16),
    "an offset": lambda: activation(65, 64)[1:],
    "an odd address": lambda: activation(64 * 64 + 1)[1:].view(64, 64),
    "transposed": lambda: activation(64, 48).t(),
    "gaps": lambda: activation(64, 128)[:, ::2],
    "negated": lambda: torch._neg_view(activation(64, 64)),
    "expanded": lambda: activation(64, 1, 64).expand(64, 3, 64),
    "one row": lambda: activation(1, 4096),
    "heads": lambda: activation(2, 4, 8, 64),
    "transposed heads": lambda: activation(2, 8, 4, 64).transpose(1, 2),
    "channels_last": lambda: activation(2, 8, 16, 16).to(memory_format=torch.channels_last),
    "too small": lambda: activation(2, 4),
}


@pytest.mark.parametrize("layout", LOSSY_LAYOUTS)
def test_every_tensor_of_a_kind_is_packed_as_the_lane_packs_it(layout):
    lane = PackedLane(bits=4, seed=3)
    context = offload(lane, min_bytes=0)
    for _ in range(2):
        x = LOSSY_LAYOUTS[layout]()
        (back,) = save(context, x).saved_tensors
        expected = for_heads(lane) if x.ndim == 4 else lane
        memory, found = without_flags(x), without_flags(back)
        assert torch.equal(found, expected.decode(expected.encode(memory))) and back.stride() == x.stride()


def test_a_lane_of_ones_own_encodes_every_tensor():
    class Counted(PackedLane):
        calls = 0

        def encode(self, tensor):
            Counted.calls += 1
            return super().encode(tensor)

    context = offload(Counted(bits=8), min_bytes=0)
    for _ in range(2):
        save(context, activation(64, 64))
    assert Counted.calls == 2


def test_tensors_of_one_shape_are_a_line_of_the_report():
    context = offload("packed", bits=8, min_bytes=0)
    for x in (activation(64, 64), activation(64, 64).t(), torch._neg_view(activation(64, 64))):
        save(context, x)
    (line,) = context.report().classes
    assert (line.shape, line.count) == ((64, 64), 3)


def test_unpacked_tensors_do_not_alias_the_packet():
    context = offload("raw", min_bytes=0)
    node = save(context, torch.ones(64))
    node.saved_tensors[0].fill_(5)
    assert node.saved_tensors[0].eq(1).all()


@pytest.mark.parametrize("min_bytes", [0, 1 << 20])
@pytest.mark.parametrize("name", ["relu_", "sigmoid_", "tanh_", "exp_"])
def test_operators_that_save_what_they_changed_in_place(name, min_bytes):
    x = torch.randn(8, 8, requires_grad=True)
    grads = []
    for context in (torch.enable_grad(), offload(min_bytes=min_bytes, checker=True)):
        with context:
            y = getattr(x * 2, name)().square().sum()
        grads.append(torch.autograd.grad(y, x)[0])
    assert torch.equal(*grads)


def test_a_change_after_packing_does_not_reach_the_gradient():
    x = torch.randn(8, 8, requires_grad=True)
    with offload(min_bytes=0):
        h = x * 1
        y = (h * h).sum()
    with torch.no_grad():
        h.zero_()
    assert torch.equal(torch.autograd.grad(y, x)[0], 2 * x)


def test_an_unpack_under_inference_mode_does_not_spoil_later_ones():
    x = torch.randn(64)
    node = save(offload(min_bytes=0), x)
    with torch.inference_mode():
        held = node.saved_tensors[0]
    assert not held.is_inference()
    again = node.saved_tensors[0]
    assert not again.is_inference() and torch.equal(again.add_(0), x)


# What is left alone


def kept_reasons(*tensors: Tensor, min_bytes: int = 0) -> list[str]:
    context = offload(min_bytes=min_bytes)
    node = save(context, *tensors)
    for t, back in zip(tensors, node.saved_tensors, strict=True):
        assert back.device == t.device and back.data_ptr() == t.data_ptr()
    assert context.report().total.count == 0
    return list(context.report().kept)


def test_weights_and_leaves_stay():
    weight = nn.Parameter(torch.randn(32, 32))
    frozen = nn.Parameter(torch.randn(32, 32), requires_grad=False)
    leaf = torch.randn(32, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        cast = weight.to(torch.bfloat16)
    views = [w for p in (weight, frozen, leaf) for w in (p, p.t(), p[3:], p.view(-1).expand(2, -1))]
    assert kept_reasons(*views, cast, cast.t(), weight.t()[:4].bfloat16().t()) == ["weight"]


def test_small_tensors_stay():
    tensors = (torch.randn(15), torch.rand(63) > 0.5, torch.arange(7))
    assert kept_reasons(*tensors, min_bytes=64) == ["below min_bytes"]


def test_dtypes_without_a_place_in_packets_stay():
    assert kept_reasons(torch.empty(64, dtype=torch.bits8)) == ["other dtype"]


class Doubled(Tensor):
    """A wrapper subclass: a plain tensor in its place would change what operators do."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(func)


def test_subclasses_come_back_as_themselves():
    x = Doubled(torch.randn(64))
    context = offload(min_bytes=0)
    (back,) = save(context, x).saved_tensors
    assert type(back) is Doubled and back.inner is x.inner
    assert list(context.report().kept) == ["not a plain tensor"]


class Named(Tensor):
    """A subclass that dispatches as plain tensors do."""


@pytest.mark.parametrize("first", [Tensor, Named])
def test_subclasses_are_told_from_plain_tensors_that_dispatch_alike(monkeypatch, first):
    monkeypatch.setattr(policy, "_plain_keys", {})
    for kind in (first, Tensor, Named):
        context = offload(min_bytes=0)
        (back,) = save(context, torch.randn(64).as_subclass(kind)).saved_tensors
        assert type(back) is kind
        assert list(context.report().kept) == ([] if kind is Tensor else ["not a plain tensor"])


def test_dtensor_gradients():
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        grads = []
        for context in (torch.enable_grad(), offload(min_bytes=0)):
            torch.manual_seed(0)
            x = distribute_tensor(torch.randn(8, 8), mesh, [Shard(0)]).requires_grad_()
            with context:
                y = torch.tanh(x * 2).square().sum()
            y.backward()
            assert isinstance(x.grad, DTensor)
            grads.append(x.grad.to_local())
        assert torch.equal(*grads)
    finally:
        destroy_process_group()


def test_sparse_nested_meta_and_fake_tensors_pass_through():
    from torch._subclasses.fake_tensor import FakeTensorMode

    sparse = torch.eye(8).to_sparse()
    nested = torch.nested.nested_tensor([torch.randn(3, 2), torch.randn(5, 2)], layout=torch.jagged)
    meta = torch.empty(64, device="meta")
    context = offload(min_bytes=0)
    backs = save(context, sparse, nested, meta).saved_tensors
    assert [type(b) for b in backs] == [type(t) for t in (sparse, nested, meta)]
    assert torch.equal(backs[0].to_dense(), torch.eye(8)) and backs[2].is_meta
    with FakeTensorMode() as mode, context:
        x = mode.from_tensor(torch.randn(64)).requires_grad_()
        assert torch.tanh(x * 2).sum().grad_fn is not None
    assert list(context.report().kept) == ["not a plain tensor"]


def test_gradients_through_vmap():
    w, x = torch.randn(8, 8, requires_grad=True), torch.randn(5, 8)
    grads = []
    for context in (torch.enable_grad(), offload(min_bytes=0, checker=True)):
        with context:
            y = torch.vmap(lambda row: torch.tanh(row @ w).exp().sum())(x).sum()
        grads.append(torch.autograd.grad(y, w)[0])
    assert torch.equal(*grads)


def test_no_bytes_of_weights_are_copied():
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(64, 128, 3),
            "embed": nn.Embedding(300, 128),
            "linear": nn.Linear(128, 512),
            "back": nn.Linear(512, 128, bias=False),
        }
    ).requires_grad_()
    model["conv"].weight.data.normal_()

    def forward():
        h = model["conv"](torch.randn(1, 64, 3, 3)).flatten(1) + model["embed"](torch.tensor([7]))
        h = model["back"](F.gelu(model["linear"](h)))
        return (h @ model["embed"].weight.t()).square().sum()  # tied

    # All activations together are below the floor, every weight is above it.
    for precision in (None, torch.bfloat16):
        context = offload(min_bytes=32 * KIB)
        with context, torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            loss = forward()
        loss.backward()
        report = context.report()
        assert report.total.bytes_wire == 0, str(report)
        assert report.kept["weight"].count >= 4


def test_nothing_is_packed_without_grad():
    context = offload(min_bytes=0)
    layer = nn.Linear(16, 16)
    with context, torch.no_grad():
        torch.tanh(layer(torch.randn(4, 16)))
    with context, torch.inference_mode():
        torch.tanh(layer(torch.randn(4, 16)))
    report = context.report()
    assert (report.total.count, report.kept) == (0, {})


def test_dispatch_modes_see_the_program_alone():
    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    logs = []
    for context in (torch.enable_grad(), offload(min_bytes=0)):
        seen.clear()
        with context, Log():
            y = torch.tanh(torch.randn(8, 8, requires_grad=True) * 2).square().sum()
        y.backward()
        logs.append([name for name in seen if "detach" not in name])
    assert logs[0] == logs[1] != []


# Lossy lanes


def test_only_activations_lose_bits():
    graph = activation(64, 64)
    mask, index = torch.rand(64, 64) > 0.5, torch.randint(0, 9, (64, 64))
    table = torch.randn(64, 64)  # needs no grad
    statistics = activation(4096, 1)
    flat = activation(4096)
    context = offload("packed", bits=2, min_bytes=0, checker=True)
    tensors = (graph, mask, index, table, statistics, flat, graph.view(torch.int32), graph.view(-1))
    backs = save(context, *tensors).saved_tensors
    assert not torch.equal(backs[0], graph)
    for t, back in zip(tensors[1:], backs[1:], strict=True):
        assert_identical(back, t)
    lanes = {(row.dtype, row.shape): row.lane for row in context.report().classes}
    assert lanes[torch.float32, (64, 64)] in ("packed", "exact") and lanes[torch.bool, (64, 64)] == "raw"


def test_a_report_tells_how_many_bits_a_tensor_has():
    """Those of four dimensions have 8 at least."""
    rows, heads = activation(64, 64), activation(4, 4, 16, 16)
    context = offload("packed", bits=4, min_bytes=0)
    saved = save(context, rows, heads)
    report = context.report()
    assert {(row.shape, row.bits) for row in report.classes} == {((64, 64), 4), ((4, 4, 16, 16), 8)}
    assert "packed, 4 bits" in str(report) and "packed, 8 bits" in str(report)
    del saved


@pytest.mark.parametrize("bound", [0.3, 0.05, 1e-3, 1e-6, 0.0])
def test_every_saved_tensor_keeps_the_bound(bound):
    x = activation(64, 64)
    hard = torch.randn(64, 64)
    hard[::7] *= 1e4
    hard[3, 3], hard[5, 5] = float("nan"), float("inf")
    tensors = {
        "gaussian": x,
        "quiet rows of a loud tensor": (x * torch.tensor([1e4] + [1e-2] * 63)[:, None])[1:],
        "outliers, NaN and Inf": hard * x.detach().sign() + 0 * x,
        "constant": torch.full((64, 64), 3.3) + 0 * x,
        "denormal": 1e-41 * x,
        "zero": 0 * x,
    }
    context = offload(max_rel_error=bound, min_bytes=0, checker=True)
    node = save(context, *tensors.values())
    for (name, t), back in zip(tensors.items(), node.saved_tensors, strict=True):
        t = t.detach()
        finite = t.isfinite()
        assert torch.equal(back[~finite].view(torch.int32), t[~finite].view(torch.int32)), name
        error = (back - t)[finite].double().norm()
        assert error <= bound * t[finite].double().norm(), name
    assert context.report().total.worst_error <= bound


def test_a_part_of_a_lossy_tensor_has_its_own_bound():
    x = activation(64, 64) * torch.tensor([1e4] + [1.0] * 63)  # one loud column
    quiet = x[:, 1:]
    context = offload(max_rel_error=0.1, min_bytes=0)
    whole, part = save(context, x, quiet, x.t(), quiet.t()).saved_tensors[:2]
    assert (part - quiet).norm() <= 0.1 * quiet.norm()
    assert (whole[:, 1:] - quiet).norm() > 0.1 * quiet.norm()  # as a part of the whole it may be worse
    assert context.report().total.count == 2 and context.report().deduplicated.count == 2
