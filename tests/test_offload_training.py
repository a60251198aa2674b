"""Whole training steps: gradients under offload against the same step without it, bit for bit."""

from __future__ import annotations

import gc
import threading
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from models import MIN_BYTES, assert_same, build, gradients, loss_of, settled
from sidelane.errors import OffloadError
from sidelane.pipeline.compress import compress, decompress
from sidelane.pipeline.lanes import open_lane
from sidelane.pipeline.offload import offload
from sidelane.pipeline.policy import may_lose_bits, plain_kind, why_kept

pytestmark = pytest.mark.usefixtures("each_device")


def exact(lane="exact"):
    """A context that checks what it restores and has room on a device for little of it."""
    return offload(lane, gpu_budget=60_000, min_bytes=MIN_BYTES, checker=True)


@pytest.mark.parametrize("lane", ["raw", "exact"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_exact_lanes_leave_gradients_bitwise_unchanged(lane, autocast, backward_inside):
    model, tokens = build()
    expected = gradients(model, tokens, autocast=autocast)
    context = exact(lane)
    actual = gradients(model, tokens, context, autocast=autocast, backward_inside=backward_inside)
    assert_same(actual, expected)
    assert context.report().total.count > 20 and settled(context)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_hugging_face_gradient_checkpointing(use_reentrant):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.1,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    tokens = torch.randint(64, (2, 48))

    def step(context):
        model.zero_grad()
        torch.manual_seed(1)
        with context:
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    context = exact()
    assert_same(step(context), step(nullcontext()))
    assert context.report().total.count >= config.num_hidden_layers and settled(context)


def test_gradient_accumulation_over_several_contexts():
    model, tokens = build()
    context = exact()

    def accumulate(forward):
        model.zero_grad()
        for scale in (1.0, 0.5, 2.0):
            with forward:
                loss = loss_of(model, tokens) * scale
            loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    assert_same(accumulate(context), accumulate(nullcontext()))


def test_grad_scaler_step():
    model, tokens = build()
    scaler = torch.amp.GradScaler(tokens.device.type, init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(forward):
        optimizer.zero_grad()
        with forward:
            loss = loss_of(model, tokens)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        return [p.grad.clone() for p in model.parameters()]

    expected = step(nullcontext())
    scaler.update(1024.0)
    assert_same(step(exact()), expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_torch_checkpoint_inside(reentrant, autocast):
    def wrap(block, x, cos, sin):
        if reentrant:
            return checkpoint(lambda x, c, s: block(x, cos=c, sin=s), x, cos, sin, use_reentrant=True)
        return checkpoint(block, x, cos=cos, sin=sin, use_reentrant=False)

    model, tokens = build(wrap=wrap)
    expected = gradients(build()[0], tokens, autocast=autocast)
    context = exact()
    assert_same(gradients(model, tokens, context, autocast=autocast, backward_inside=True), expected)
    report = context.report()
    # The input of each block and what the loss saves travel; what the recompute saves does not.
    assert 0 < report.total.count < 10 and settled(context)
    if reentrant:
        assert report.kept["saved in backward"].count > 20


def test_nested_checkpoint_inside():
    def inner(block, x, **kwargs):
        return checkpoint(block, x, use_reentrant=False, **kwargs)

    def wrap(block, x, **kwargs):
        return checkpoint(inner, block, x, use_reentrant=False, **kwargs)

    model, tokens = build(wrap=wrap)
    assert_same(gradients(model, tokens, exact()), gradients(build()[0], tokens))


@pytest.mark.parametrize("offload_inside", [False, True])
def test_selective_checkpoint(offload_inside):
    def policy(ctx, op, *args, **kwargs):
        keep = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    context = exact()

    def run(block, x, **kwargs):
        with context if offload_inside else nullcontext():
            return block(x, **kwargs)

    def wrap(block, x, **kwargs):
        contexts = partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(run, block, x, use_reentrant=False, context_fn=contexts, **kwargs)

    model, tokens = build(wrap=wrap)
    outer = nullcontext() if offload_inside else context
    assert_same(gradients(model, tokens, outer), gradients(build()[0], tokens))
    assert context.report().total.count > 0


# Dynamo looks for .grad on the inputs of a block and filters the warning only under default filters. Modules
# of torch 2.11 that Inductor imports use what torch deprecates, and on a GPU it recommends TF32.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_blocks_compiled_one_by_one(backend):
    compiles = []

    def counting(graph, inputs):
        compiles.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    model, tokens = build()
    for block in model.blocks:
        block.drop.p = 0.0
    expected = gradients(model, tokens)
    for block in model.blocks:
        block.compile(backend=counting)
    plain = gradients(model, tokens)
    context = exact()
    first = gradients(model, tokens, context)
    after_first = len(compiles)
    assert_same(first, plain)
    assert_same(gradients(model, tokens, context), plain)
    assert len(compiles) == after_first, "recompiled in the second step"
    for a, e in zip(plain, expected, strict=True):
        torch.testing.assert_close(a, e)
    assert context.report().total.count > 10 and settled(context)


def test_retain_graph_and_partial_backward():
    model, tokens = build()
    weights = [model.embed.weight, model.blocks[0].up.weight]
    expected = torch.autograd.grad(loss_of(model, tokens), weights)
    context = exact()
    with context:
        loss = loss_of(model, tokens)
    for subset in (weights[:1], weights[1:], weights):
        got = torch.autograd.grad(loss, subset, retain_graph=True)
        assert_same(
            list(got), [e for w, e in zip(weights, expected, strict=True) if any(w is s for s in subset)]
        )
    assert context.report().tickets > 0
    model.zero_grad()
    loss.backward()
    assert settled(context)


def smooth(x: Tensor, w: Tensor) -> Tensor:
    h = torch.tanh(x @ w)
    return F.softmax(h @ h.transpose(-1, -2), dim=-1).square() @ h.exp()


def test_double_backward_matches_numerical_derivatives():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    context = offload(min_bytes=0, checker=True)

    def fn(x, w):
        with context:
            return smooth(x, w)

    assert gradcheck(fn, (x, w)) and gradgradcheck(fn, (x, w))
    assert context.report().unpacks > 100


def test_two_graphs_in_flight():
    model, tokens = build()
    expected = gradients(model, tokens)
    context = exact()
    with context:
        a = loss_of(model, tokens)
        b = loss_of(model, tokens) * 2
    model.zero_grad()
    a.backward()
    assert_same([p.grad for p in model.parameters()], expected)
    model.zero_grad()
    b.backward()
    assert_same([p.grad for p in model.parameters()], [2 * e for e in expected])
    assert settled(context)


def test_threads_share_a_context():
    expected = gradients(*build())
    context = exact()
    models = [build() for _ in range(3)]
    results: dict[int, list[Tensor]] = {}
    lock = threading.Lock()  # of the global generator that dropout draws from
    barrier = threading.Barrier(len(models))

    def work(i):
        model, tokens = models[i]
        with context:
            with lock:
                loss = loss_of(model, tokens)
            barrier.wait()
            loss.backward()
        results[i] = [p.grad.clone() for p in model.parameters()]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(models))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i in range(len(models)):
        assert_same(results[i], expected)
    assert settled(context) and offload.current() is None


def test_unused_branches_and_any_order():
    experts = [torch.nn.Linear(32, 32) for _ in range(4)]
    x = torch.randn(64, 32, requires_grad=True)
    context = exact()

    def branches():
        return [e(torch.tanh(x)).square().sum() for e in experts]

    expected = torch.autograd.grad(branches()[2], x)
    with context:
        outputs = branches()
    for i in (2, 0, 3):  # branch 1 is never used
        got = torch.autograd.grad(outputs[i], x)
        if i == 2:
            assert_same(list(got), list(expected))
    del outputs
    assert settled(context)


def test_memory_is_flat_without_gc():
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8))
    x = torch.randn(64, 32)
    context = offload(min_bytes=MIN_BYTES)
    gc.collect()
    gc.disable()
    try:
        for step in range(200):
            with context:
                loss = model(x).square().sum()
            if step % 3 == 0:
                loss.backward()
            elif step % 3 == 1:
                with torch.no_grad(), context:
                    model(x)
            del loss  # every third graph is dropped without a backward
            report = context.report()
            assert (report.host_bytes, report.tickets, len(context._store._index)) == (0, 0, 0), step
        assert report.total.count == 200 * 3
    finally:
        gc.enable()


def test_lossy_gradients_equal_the_codec_applied_in_place():
    """No streams, no stash: the same lane as a synchronous round trip in plain hooks. Views of what is stored
    without loss stay without."""
    model, tokens = build()
    options = {"max_rel_error": 0.05, "bits": 4, "group": 32}
    lane = open_lane("packed", bits=4, group=32)
    without_loss = set()  # storages, which live as long as what autograd holds

    def pack(tensor):
        kind, storage = plain_kind(tensor), tensor.untyped_storage().data_ptr()
        kept = why_kept(tensor, MIN_BYTES, kind)
        if not kept and not may_lose_bits(tensor, kind):
            without_loss.add(storage)
        if kept or storage in without_loss:
            return tensor.detach()
        return decompress(compress(tensor, lane=lane, max_rel_error=0.05))

    expected = gradients(model, tokens, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t))
    exactly = gradients(model, tokens)
    context = offload("packed", min_bytes=MIN_BYTES, checker=True, **options)
    actual = gradients(model, tokens, context)
    assert_same(actual, expected)
    assert any(not torch.equal(a, e) for a, e in zip(actual, exactly, strict=True))
    total = context.report().total
    assert 0 < total.worst_error <= 0.05 and total.ratio > 1.8
    again = gradients(model, tokens, offload("packed", min_bytes=MIN_BYTES, **options))
    assert_same(again, actual)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_a_failed_step_leaves_nothing_behind(where, kind):
    model, tokens = build()
    expected = gradients(model, tokens)
    context = exact()

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if where == "forward":
                raise kind("stop")
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise kind("stop")

    plain = model.wrap
    model.wrap = lambda block, x, **kw: Fails.apply(plain(block, x, **kw))
    with pytest.raises(kind), context:
        loss_of(model, tokens).backward()
    assert offload.current() is None and settled(context)
    model.wrap = plain
    before = context.report().total.count
    gradients(model, tokens)
    assert context.report().total.count == before, "a hook is still installed"
    assert_same(gradients(model, tokens, context), expected)


def test_in_place_change_of_a_kept_tensor_is_an_error():
    w = torch.randn(8, 8, requires_grad=True)
    with offload(min_bytes=1 << 20):
        h = torch.tanh(w)
        out = h.square().sum()
    with torch.no_grad():
        h.mul_(2)
    with pytest.raises(OffloadError, match=r"float32 \[8, 8\] is at version 1, it was saved at 0"):
        out.backward()


@pytest.mark.parametrize("spared", [True, False])
def test_heads_of_attention_take_eight_bits_since_their_errors_are_in_an_exponent(spared):
    def gradient(context):
        torch.manual_seed(1)
        layer, x = torch.nn.Linear(128, 384), torch.randn(2, 64, 128)
        with torch.no_grad():
            layer.weight.mul_(8)  # logits as large as those of a trained model
        with context, sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
            heads = layer(x).view(2, 64, 12, 32).transpose(1, 2).split(4, 1)
            q, k, v = (t.contiguous() for t in heads)
            loss = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).square().sum()
        loss.backward()
        return layer.weight.grad.flatten().double()

    context = offload("packed", bits=4, min_bytes=0)
    if not spared:
        context._store._coarse_heads = context._store._coarse
    got, want = gradient(context), gradient(nullcontext())
    cosine = torch.nn.functional.cosine_similarity(got, want, dim=0)
    assert cosine > 0.95 if spared else cosine < 0.5


def test_the_logarithm_of_a_softmax_stays_exact():
    logits = torch.randn(64, 50, requires_grad=True) * 2
    context = offload("packed", bits=4, min_bytes=0)
    with context:
        torch.nn.functional.cross_entropy(logits, torch.zeros(64, dtype=torch.long))
    assert {row.lane for row in context.report().classes} <= {"exact", "raw"}
