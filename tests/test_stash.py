"""Bookkeeping of the offload engine: geometry of views, byte budgets, ownership."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sidelane.codec.packet import flatten
from sidelane.errors import OffloadError
from sidelane.pipeline.extent import element_set, whole_storage, without_flags
from sidelane.pipeline.policy import Kind
from sidelane.pipeline.stash import Index, Kept, Key, Stash, _Entry, data_key


@st.composite
def strided(draw) -> Tensor:
    """A random view, by slicing, permuting and expanding, of a storage that counts up."""
    dims = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    x = torch.arange(torch.Size(dims).numel(), dtype=torch.int32).view(dims)
    for d, n in enumerate(dims):
        start = draw(st.integers(0, n - 1))
        part = slice(start, start + draw(st.integers(1, n - start)), draw(st.integers(1, 2)))
        x = x[(slice(None),) * d + (part,)]
    x = x.permute(draw(st.permutations(range(x.ndim))))
    if draw(st.booleans()):
        x = x.unsqueeze(0).expand(3, *x.shape)
    return x


def occupied(x: Tensor) -> list[int]:
    """Offsets of the distinct elements, from the first: the values count up with the address."""
    values = x.reshape(-1).unique()
    return (values - values[0]).tolist()


@given(strided())
@settings(max_examples=200, deadline=None)
def test_views_are_laid_over_both_kinds_of_storage(x):
    view = Kind.of(x).view_of(x)
    assert view.nbytes == 4 * x.reshape(-1).unique().numel()
    whole = whole_storage(x).clone()
    elements = flatten(x).clone()
    for got in (view.over(whole), view.over_elements(elements)):
        assert torch.equal(got, x) and got.stride() == x.stride()


@given(strided(), strided())
@settings(max_examples=300, deadline=None)
def test_element_sets_are_equal_exactly_for_equal_elements(a, b):
    same = occupied(a) == occupied(b)
    assert (Kind.of(a).view.geometry.pairs == Kind.of(b).view.geometry.pairs) == same


@pytest.mark.parametrize(
    "size, stride, pairs",
    [
        ((4, 8), (8, 1), ((1, 32),)),
        ((8, 4), (1, 8), ((1, 32),)),
        ((4, 8), (16, 1), ((1, 8), (16, 4))),
        ((4, 2, 4), (16, 4, 1), ((1, 8), (16, 4))),
        ((3, 4, 8), (0, 8, 1), ((1, 32),)),
        ((5, 1), (1, 77), ((1, 5),)),
        ((), (), ()),
        ((4, 3), (1, 1), None),
        ((4, 4), (2, 1), None),
    ],
)
def test_element_set_merges_dimensions(size, stride, pairs):
    assert element_set(size, stride) == pairs


def test_without_flags_shows_memory():
    z = torch.tensor([1 + 2j, 3 - 4j])
    assert without_flags(z.conj()).tolist() == z.tolist()
    imag = z.conj().imag
    assert imag.is_neg() and without_flags(imag).tolist() == [2, -4]


def stash_of(x: Tensor) -> Stash:
    return Stash(x, home=None, whole=True, truth=None)  # type: ignore[arg-type]


def test_an_entry_that_an_interrupt_left_without_a_key_harms_no_other():
    x, index = torch.randn(4), Index()
    key = Key(data_key(x), "whole")
    stash = stash_of(x)
    index._dead.append(_Entry(stash))  # as it is between its making and its key
    index.add(key, stash)
    assert index.find(key) is stash and not index._dead


def test_index_forgets_a_stash_with_its_last_ticket():
    x = torch.randn(4)
    index = Index()
    key = Key(data_key(x), "whole")
    stash = stash_of(x)
    index.add(key, stash)
    assert index.find(key._replace(kind="lossy")) is index.find(key) is stash and len(index) == 1
    gc.disable()
    try:
        del stash
        assert index.find(key) is None and len(index) == 0
    finally:
        gc.enable()


def test_keys_name_storage_and_version():
    x = torch.randn(4, 4)
    assert data_key(x) == data_key(x.t()) == data_key(x[1:]) == data_key(x.view(torch.int32))
    before = data_key(x)
    x.add_(1)
    assert data_key(x) != before
    assert data_key(x.clone()) != data_key(x)


def test_the_address_of_a_storage_object_is_not_reused_while_its_stash_lives():
    stashes, keys = [], set()
    for _ in range(50):
        x = torch.randn(4)
        keys.add(data_key(x)[0])
        stashes.append(stash_of(x))
        del x
    assert len(keys) == 50


def test_tensors_with_counters_of_their_own_in_one_storage_differ():
    first, second = torch.unsafe_chunk(torch.randn(4, 4) * 1, 2)
    first.add_(1)
    second.add_(1)
    assert first._version == second._version and data_key(first) != data_key(second)


class Calls(torch.autograd.Function):
    """Calls a function in backward, as a node that unpacks would."""

    @staticmethod
    def forward(ctx, x, function):
        ctx.function = function
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.function()
        return grad, None


def backward_through(*functions):
    """A backward pass that calls `functions` in nodes of their own, the last one first."""
    x = torch.randn(3, requires_grad=True)
    for function in functions:
        x = Calls.apply(x, function)
    x.sum().backward()


def test_decoded_elements_are_shared_by_the_node_that_holds_them():
    stash, held, at_start = stash_of(torch.randn(4)), [], []

    def unpack():
        at_start.append(stash.alive())  # what another node decoded
        decoded = torch.randn(4)
        stash.remember(decoded)
        held.append(decoded[1:])
        del decoded
        assert stash.alive().data_ptr() == held[-1].untyped_storage().data_ptr()

    backward_through(unpack, unpack)
    assert len(held) == 2 and at_start == [None, None] and stash.alive() is None


def test_decoded_elements_die_with_their_last_view():
    stash, found = stash_of(torch.randn(4)), []

    def unpack():
        stash.remember(torch.randn(4))
        found.append(stash.alive())

    backward_through(unpack)
    assert found == [None]


kept: list[object] = []
keep = kept.append


@pytest.mark.parametrize(
    "meanwhile, shared",
    [
        (lambda view: None, True),
        (keep, False),  # as a gradient that the program goes on to use
        (lambda view: keep(view[1:]), False),
        (lambda view: view.add_(1), False),
    ],
)
def test_the_next_node_shares_what_nobody_else_holds_or_changed(meanwhile, shared):
    view, stash, found = Kind.of(torch.randn(4)).view, stash_of(torch.randn(4)), []
    tickets = [stash.users.claim() for _ in range(2)]
    kept.clear()

    def first():
        flat = torch.randn(4)
        stash.remember(flat)
        meanwhile(view.over(flat))

    backward_through(lambda: found.append(stash.alive()), first)
    assert (found[0] is not None) == shared and len(tickets) == stash.users.held


def test_nodes_of_another_pass_and_forgotten_elements_share_nothing():
    stash, found = stash_of(torch.randn(4)), []
    tickets = [stash.users.claim() for _ in range(2)]
    backward_through(lambda: stash.remember(torch.randn(4)))
    backward_through(lambda: found.append(stash.alive()))
    backward_through(
        lambda: found.append(stash.alive()),
        stash.forget,
        lambda: stash.remember(torch.randn(4)),
    )
    assert found == [None, None] and len(tickets) == stash.users.held


def test_kept_tensors_are_checked_for_changes():
    x = torch.ones(3)
    kept = Kept(x)
    assert kept.open() is x
    x[0] = 2
    with pytest.raises(OffloadError, match=r"float32 \[3\] is at version 1, it was saved at 0; clone it"):
        kept.open()


def test_kept_tensors_carry_no_graph_but_leaves_are_themselves():
    leaf = torch.ones(3, requires_grad=True)
    assert Kept(leaf).open() is leaf
    inner = leaf * 2
    back = Kept(inner).open()
    assert back.grad_fn is None and back.data_ptr() == inner.data_ptr()
    leaf.data = torch.zeros(3)  # as wrappers do that gather a parameter before backward
    kept = Kept(leaf)
    leaf.data = torch.full((3,), 7.0)
    assert kept.open().tolist() == [7, 7, 7]
