"""10,000 damaged packets: each decodes or is refused as a bad packet, and allocates within bounds."""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from crc32c import crc32c
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from samples import bits_of, hadamard_basis
from sidelane.codec.packet import DTYPES, Packet
from sidelane.errors import BasisError, PacketError
from sidelane.pipeline.lanes import ExactLane, PackedLane, RawLane, decode_packet

MUTANTS = 1000  # of each seed and kind
SLACK = 4096  # bytes
NUMBERS = [*range(20), 63, 64, 127, 128, 255, 256, 1023, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40]
NUMBERS += [2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
FIELDS, DIGEST = 24, slice(72, 104)  # offsets in the header

BASIS = hadamard_basis()


def _seeds() -> dict[str, bytes]:
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(1))
    special = x.clone()
    special[17, 1], special[200, 3] = float("nan"), float("inf")
    packets = {
        "raw": RawLane().encode(x.t()),
        "exact": ExactLane().encode(torch.exp(2 * x)),
        "groups": PackedLane(bits=4).encode(special),
        "symmetric": PackedLane(bits=8, group=32, symmetric=True).encode(x.bfloat16().expand(3, -1, -1)),
        "basis": PackedLane(basis=BASIS).encode(special.view(3, 100, 4)),
    }
    return {name: packet.to_bytes() for name, packet in packets.items()}


SEEDS = _seeds()


class Allocations(TorchDispatchMode):
    """Bytes of every storage that operators inside the context return and did not get."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.largest = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if storage.data_ptr() not in given:
                self.total += storage.nbytes()
                self.largest = max(self.largest, storage.nbytes())
        return out


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


# Damage that checksums see


def flip(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def truncate(rng: random.Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def extend(rng: random.Random, data: bytearray) -> None:
    data += bytes(rng.choice((1, 64, 1000)))


def lie(rng: random.Random, data: bytearray) -> None:
    """A number anywhere in the header: lengths, offsets, sizes."""
    at = 4 * rng.randrange(2, struct.unpack_from("<I", data, 12)[0] // 4 - 1)
    struct.pack_into("<Q", data, at, rng.choice(NUMBERS))


def splice(rng: random.Random, data: bytearray) -> None:
    start, length, at = rng.randrange(len(data)), rng.randrange(1, 65), rng.randrange(len(data))
    data[at : at + length] = data[start : start + length]


# Damage with checksums made right again, so that it reaches the lanes


def repair(data: bytearray) -> None:
    """Write the checksums that sections in the table and the header have now."""
    size, ndim, count = struct.unpack_from("<I", data, 12)[0], data[30], data[31]
    for at in range(104 + 16 * ndim, min(104 + 16 * ndim + 32 * count, size - 39), 32):
        start, length = struct.unpack_from("<QQ", data, at + 16)
        struct.pack_into("<I", data, at + 12, crc32c(memoryview(data)[start : start + length]))
    struct.pack_into("<I", data, size - 8, crc32c(memoryview(data)[: size - 8]))


def patch_fields(rng: random.Random, data: bytearray) -> None:
    """One number of the fields, the shape or the strides."""
    width, end = rng.choice(((1, 40), (4, 72), (8, 104 + 16 * data[30])))
    at = rng.randrange(FIELDS if width == 1 else 32 if width == 4 else 104, end, width)
    data[at : at + width] = (rng.choice(NUMBERS) % 256**width).to_bytes(width, "little")
    repair(data)


def patch_header(rng: random.Random, data: bytearray) -> None:
    size = struct.unpack_from("<I", data, 12)[0]
    for _ in range(rng.choice((1, 2, 5))):
        data[rng.randrange(FIELDS, size - 8)] ^= 1 << rng.randrange(8)
    repair(data)


def patch_sections(rng: random.Random, data: bytearray) -> None:
    size = struct.unpack_from("<I", data, 12)[0]
    for _ in range(rng.choice((1, 3, 100))):
        data[rng.randrange(size, len(data))] = rng.choice((0, 1, 0x7C, 0x7F, 0xFF, rng.randrange(256)))
    repair(data)


def rebuild(rng: random.Random, data: bytearray) -> None:
    """A well-formed packet with one thing of the parsed one changed."""
    packet = Packet.from_bytes(data)
    name = rng.choice(list(packet.sections))
    part = packet.sections[name]
    d = rng.randrange(len(packet.shape))
    shape = list(packet.shape)
    shape[d] = max(0, shape[d] + rng.choice((-shape[d], -1, 1, 8, shape[d], 2**40)))
    step, strides = 1, []
    for n in reversed(shape):
        strides.insert(0, step)
        step *= max(n, 1)
    sections = dict(packet.sections)
    other = rng.choice(list(sections))
    sections[name], sections[other] = sections[other], sections[name]
    changes: list[dict[str, Any]] = [
        {"sections": packet.sections | {name: part[: rng.randrange(part.numel() + 1)]}},
        {"sections": packet.sections | {name: torch.cat((part, part[: rng.choice((1, 2, 4, 64, 256))]))}},
        {"sections": {k: v for k, v in packet.sections.items() if k != name}},
        {"sections": packet.sections | {"more": part}},
        {"sections": sections},
        {"shape": tuple(shape), "strides": tuple(strides)},
        {"dtype": rng.choice(list(DTYPES))},
        {"bits": rng.randrange(16)},
        {"params": tuple(rng.choice((0, 1, 2, 4, 32, 64, 128, 256, 2**31)) for _ in range(rng.randrange(3)))},
        {"lane": rng.choice(("raw", "exact", "packed", "video"))},
        {"digest": rng.choice((bytes(32), BASIS.digest, bytes(range(32))))},
    ]
    data[:] = packet.with_(**rng.choice(changes)).to_bytes()


def outcome(data: bytearray, seed: bytes) -> tuple[str, Tensor | None, Allocations]:
    allocations = Allocations()
    try:
        packet = Packet.from_bytes(data)
        assert sum(section.numel() for section in packet.sections.values()) <= len(data)
        with allocations:
            y = decode_packet(packet, BASIS)
    except PacketError as error:
        assert "\n" not in str(error)
        return "refused", None, allocations
    except BasisError:
        assert data[DIGEST] != seed[DIGEST]
        return "another basis", None, allocations
    assert (y.shape, y.dtype, y.stride()) == (packet.shape, packet.dtype, packet.strides)
    return "decoded", y, allocations


@pytest.mark.parametrize("name", SEEDS)
def test_damage_is_found(name):
    seed, rng = SEEDS[name], random.Random(name)
    right = decode_packet(Packet.from_bytes(seed), BASIS)
    for _ in range(MUTANTS):
        data = bytearray(seed)
        rng.choice((flip, truncate, extend, lie, splice))(rng, data)
        found, y, _ = outcome(data, seed)
        assert found == ("decoded" if data == seed else "refused")
        if y is not None:
            assert torch.equal(bits_of(y), bits_of(right))


@pytest.mark.parametrize("name", SEEDS)
def test_lies_with_right_checksums(name):
    seed, rng = SEEDS[name], random.Random(name)
    found, right, honest = outcome(bytearray(seed), seed)
    assert found == "decoded" and right is not None
    size = Packet.from_bytes(seed).raw_nbytes
    counts: Counter[str] = Counter()
    for _ in range(MUTANTS):
        data = bytearray(seed)
        rng.choice((patch_fields, patch_header, patch_sections, rebuild))(rng, data)
        found, _, allocations = outcome(data, seed)
        assert allocations.total <= 2 * honest.total + SLACK
        assert allocations.largest <= 2 * size + SLACK
        counts[found] += 1
    assert min(counts["refused"], counts["decoded"]) > MUTANTS // 50, counts
    assert counts["another basis"] > 0


def test_allocations_are_counted():
    with Allocations() as allocations:
        x = torch.zeros(1000)
        x.view(10, 100).t()
        x.double()
    assert (allocations.total, allocations.largest) == (12000, 8000)
