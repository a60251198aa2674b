"""Packets in host memory and on disk. Plain memory stands for pinned memory."""

from __future__ import annotations

import os

import pytest
import torch

from sidelane.codec.packet import Packet
from sidelane.pipeline.budget import Budget
from sidelane.pipeline.disk import Disk
from sidelane.pipeline.tiers import OnDisk, PacketLayout, Pinned, Spilled

SIZES = {"a": 3, "empty": 0, "b": 70_017, "c": 1000}
STARTS = {"a": 0, "empty": 256, "b": 256, "c": 70_400}
CPU = torch.device("cpu")


def random_packet(one_block: bool) -> Packet:
    block = torch.randint(0, 256, (71_424,), dtype=torch.uint8)
    sections = {name: block[STARTS[name] : STARTS[name] + n] for name, n in SIZES.items()}
    if not one_block:
        sections = {name: part.clone() for name, part in sections.items()}
    return Packet("raw", torch.uint8, (8,), (1,), sections)


def assert_same(back: Packet, packet: Packet) -> None:
    assert back.sections.keys() == packet.sections.keys()
    for name, part in packet.sections.items():
        assert torch.equal(back.sections[name], part)
        assert back.sections[name].storage_offset() % 256 == 0
    assert (back.lane, back.dtype, back.shape) == (packet.lane, packet.dtype, packet.shape)


@pytest.mark.parametrize("one_block", [True, False])
def test_sections_come_back_from_pinned_memory(one_block):
    packet, budget = random_packet(one_block), Budget()
    host = PacketLayout(packet)
    assert sum(SIZES.values()) <= host.nbytes < sum(SIZES.values()) + 4 * 256
    assert not one_block or host.nbytes == 71_424  # one copy, padding and all
    memory = Pinned.take(budget, host.nbytes)
    host.write(packet, memory.begin().tensor)
    memory.written(None)
    assert_same(host.read(memory.open(None).tensor, CPU), packet)
    assert budget.held >= host.nbytes
    del memory
    assert budget.held == 0


def test_a_section_of_an_expanded_tensor_is_read_no_further_than_its_memory():
    part = torch.arange(1000).to(torch.uint8)
    packet = Packet("raw", torch.uint8, (1000,), (1,), {"a": part.expand(4, 1000).data[0]})
    host = PacketLayout(packet)
    memory = torch.empty(host.nbytes, dtype=torch.uint8)
    host.write(packet, memory)
    assert_same(host.read(memory, CPU), packet)


@pytest.mark.parametrize("one_block", [True, False])
def test_sections_come_back_from_disk(one_block, tmp_path):
    packet, disk = random_packet(one_block), Disk(str(tmp_path), in_flight=1 << 20)
    host = PacketLayout(packet)
    home = Spilled(packet, host, OnDisk.take(disk, host.nbytes))
    for _ in range(2):
        with home.use() as back:
            assert_same(back, packet)
    assert disk.held > 0
    del home
    disk.close()  # a write may be under way
    assert disk.held == 0 and not os.listdir(tmp_path)


def test_a_promise_is_of_all_that_the_memory_takes():
    budget = Budget(8192)
    promise = Pinned.promise(budget, 5000)
    assert promise is not None and budget.held == 8192
    del promise
    memory = Pinned.take(budget, 5000)
    assert memory is not None and budget.held == 8192


def test_a_budget_or_a_disk_without_room_gives_no_memory(tmp_path):
    assert Pinned.take(Budget(4095), 4096) is None
    assert Pinned.promise(Budget(4095), 1) is None
    assert OnDisk.take(Disk(str(tmp_path), limit=0), 4096) is None
