"""Offload in loops that somebody else writes: a wrapped module, and the Trainer of Hugging Face."""

from __future__ import annotations

import copy
import inspect
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

from models import MIN_BYTES, assert_same, build, gradients, loss_of, settled
from sidelane.errors import LaneError
from sidelane.pipeline.offload import offload
from sidelane.pipeline.wrap import wrap

exact = partial(offload, min_bytes=MIN_BYTES, checker=True)


# A wrapped module


def test_a_wrapped_module_packs_what_the_context_would():
    model, tokens = build()
    expected = gradients(model, tokens)
    inside, wrapped = exact(), exact()
    with inside:
        logits = model(tokens[:, :-1])
    del logits
    assert wrap(model, wrapped) is model
    assert_same(gradients(model, tokens), expected)
    assert wrapped.report().total.count == inside.report().total.count > 20 and settled(wrapped)
    del model.forward
    assert_same(gradients(model, tokens), expected)
    assert wrapped.report().total.count == inside.report().total.count, "it is undone"


def test_blocks_wrapped_one_by_one():
    model, tokens = build()
    expected = gradients(model, tokens)
    context = exact()
    for block in model.blocks:
        wrap(block, context)
    assert_same(gradients(model, tokens), expected)
    assert context.report().total.count > 10 and settled(context)


def test_signature_state_and_copies_are_as_before():
    model, tokens = build()
    signature, names = inspect.signature(model.forward), list(model.state_dict())
    context = exact()
    wrap(model, context)
    assert inspect.signature(model.forward) == signature and list(model.state_dict()) == names
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.embed.weight.zero_()
    assert not twin(tokens).any() and model(tokens).any()
    loss_of(twin, tokens).backward()
    assert all(p.grad is None for p in model.parameters()) and twin.embed.weight.grad is not None
    assert context.report().total.count > 0 and settled(context)


def test_a_forward_that_was_replaced_before():
    model = nn.Linear(32, 32)
    x = torch.randn(64, 32, requires_grad=True)
    model.forward = lambda x, scale=2.0: torch.tanh(x * scale)
    context = exact()
    wrap(model, context)
    assert list(inspect.signature(model.forward).parameters) == ["x", "scale"]
    model(x, scale=3.0).sum().backward()
    assert context.report().total.count == 1


def test_nothing_stays_installed_after_a_failure():
    model, tokens = build()
    context = exact()
    wrap(model, context)
    for error in (RuntimeError, KeyboardInterrupt):

        def fail(block, x, error=error, **kwargs):
            block(x, **kwargs)
            raise error("stop")

        plain, model.wrap = model.wrap, fail
        with pytest.raises(error):
            model(tokens)
        model.wrap = plain
        assert offload.current() is None and settled(context)


def test_only_modules_are_wrapped():
    with pytest.raises(LaneError, match="function is no torch.nn.Module"):
        wrap(lambda x: x, exact())


def test_a_module_has_one_offload():
    model = wrap(torch.nn.Linear(2, 2), exact())
    for again in (model, copy.deepcopy(model)):
        with pytest.raises(LaneError, match="has an offload already"):
            wrap(again, exact())
    wrap(model, torch.no_grad())  # other contexts may be around it
    with pytest.raises(LaneError, match="has an offload already"):
        wrap(model, exact())
    del model.forward
    context = exact()
    wrap(wrap(model, context), context)


@pytest.mark.parametrize("context", [None, "auto", offload])
def test_only_contexts_are_wrapped_around(context):
    with pytest.raises(LaneError, match="is no context: pass offload"):
        wrap(torch.nn.Linear(2, 2), context)


# Dynamo looks for .grad on the inputs of a block and filters the warning only under default filters.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("wrapped_first", [True, False])
def test_compiled_blocks(wrapped_first):
    torch._dynamo.reset()
    model, tokens = build()
    for block in model.blocks:
        block.drop.p = 0.0
    context = exact()
    expected = gradients(model, tokens)
    for block in model.blocks:
        if wrapped_first:
            wrap(block, context)
        block.compile(backend="aot_eager")
        if not wrapped_first:
            wrap(block, context)
    for _ in range(2):
        for a, e in zip(gradients(model, tokens), expected, strict=True):
            torch.testing.assert_close(a, e)
    assert context.report().total.count > 10 and settled(context)


# The Trainer


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_dropout=0.1,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        tokens = torch.randint(64, (48,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens, "labels": tokens}


def train(folder, context=None, on_gpu=False, **options):
    """Weights and the log of losses after a short training."""
    from transformers import Trainer, TrainingArguments

    model = llama()
    if context is not None:
        wrap(model, context)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        use_cpu=not on_gpu,
        dataloader_pin_memory=False,
        seed=1,
        full_determinism=False,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=Tokens(), eval_dataset=Tokens())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    weights = [p.detach().cpu().clone() for p in trainer.model.parameters()]
    return weights, losses, trainer.evaluate()["eval_loss"]


OPTIONS = {
    "plain": {},
    "bf16": {"bf16": True, "gradient_accumulation_steps": 2},
    "checkpoint": {"gradient_checkpointing": True},
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
}


def check_training(folder, options, on_gpu=False, **settings):
    context = exact(**settings)
    weights, losses, evaluated = train(folder, on_gpu=on_gpu, **options)
    actual, actual_losses, actual_evaluated = train(folder, context, on_gpu=on_gpu, **options)
    assert_same(actual, weights)
    assert (actual_losses, actual_evaluated) == (losses, evaluated) and len(losses) == 3
    assert context.report().total.count >= 3 * 2 and settled(context)


@pytest.mark.parametrize("name", OPTIONS)
def test_trainer(tmp_path, name):
    check_training(tmp_path, OPTIONS[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_trainer_on_a_gpu(cuda, tmp_path, name):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):  # repeats bit for bit
        check_training(tmp_path, OPTIONS[name], on_gpu=True, gpu_budget=1 << 20)


def test_training_goes_on_after_an_interrupt(tmp_path):
    """Ctrl-C in the middle of a step; then the same model trains to the same weights as one that never saw
    the context."""
    model, tokens = build()
    context = exact()
    wrap(model, context)

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise KeyboardInterrupt

    plain = model.wrap
    model.wrap = lambda block, x, **kw: Stop.apply(plain(block, x, **kw))
    with pytest.raises(KeyboardInterrupt):
        gradients(model, tokens)
    model.wrap = plain
    assert settled(context)
    assert_same(gradients(model, tokens), gradients(build()[0], tokens, nullcontext()))
