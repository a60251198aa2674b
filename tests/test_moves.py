"""Parcels and bundles of planned steps, on modelled streams that run their work in any legal order."""

from __future__ import annotations

import random
import weakref
from itertools import count

import pytest
import torch

from interrupt import interrupted
from sidelane.codec.packet import Packet, Sections
from sidelane.pipeline import bundle as bundle_module
from sidelane.pipeline import copies as copies_module
from sidelane.pipeline import moves as moves_module
from sidelane.pipeline import waits as waits_module
from sidelane.pipeline.budget import Budget
from sidelane.pipeline.bundle import Part
from sidelane.pipeline.moves import Moves, Parcel
from test_wire import GPU, POISON, Device, Event, Slots, on_modelled_streams

SIZE = 256  # bytes of a packet; a bundle has four
PACKET = Packet("packed", torch.uint8, (SIZE,), (1,))
RAW = Packet("raw", torch.uint8, (SIZE,), (1,))


class Source:
    _version = 0


class Block:
    """Memory of the stream that is current when it is made. Once dropped, the next work of that stream,
    behind those that it was recorded on, overwrites it; a copy into it after that is torn."""

    def __init__(self, device, nbytes=SIZE, value=None):
        self.device, self.model, self.nbytes = GPU, device, nbytes
        self.cell = cell = {"value": POISON, "freed": False}
        self.readers = readers = []
        owner = device.current
        # Until the stream gets here, the memory is written for those that had it before.
        owner.enqueue(lambda: cell.update(value=POISON if value is None else value))

        def free():
            for stream in readers:
                owner.wait_event(stream.record_event())
            owner.enqueue(lambda: cell.update(value=POISON, freed=True))

        weakref.finalize(self, free)

    def numel(self):
        return self.nbytes

    def record_stream(self, stream):
        self.readers.append(stream)

    def view(self, *_):
        return self

    def untyped_storage(self):
        return self

    def copy_(self, memory):
        cell, torn = self.cell, self.model.torn

        def work():
            if cell["freed"]:
                torn.append(memory[0])
            cell["value"] = memory[0]

        self.model.current.enqueue(work)
        return self

    def reader(self):
        """What to call when a stream gets there."""
        cell = self.cell
        return lambda: cell["value"]


class Piece:
    """A section of fetched memory."""

    device = GPU

    def __init__(self, block, name):
        self.block, self.name = block, name

    def numel(self):
        return SIZE

    def record_stream(self, stream):
        self.block.record_stream(stream)

    def view(self, *_):
        return self

    def untyped_storage(self):
        return self.block

    def reader(self):
        cell, name = self.block.cell, self.name
        return lambda: cell["value"][name] if isinstance(cell["value"], dict) else POISON


class Weak:
    """Stands for StorageWeakRef."""

    def __init__(self, block):
        self._block = weakref.ref(block)

    def expired(self):
        return self._block() is None


class Host:
    """Stands for PacketLayout: memory is a list of one dictionary, section to value."""

    def __init__(self, packet):
        self.single = isinstance(packet.sections, Sections)
        self.nbytes = SIZE * len(packet.sections)
        self.raw = packet.lane == "raw"
        self._names = list(packet.sections)
        self._packet = packet.with_(sections={})

    def write(self, packet, memory):
        parts = {"data": packet.sections.buffer} if self.single else packet.sections
        read = {name: part.reader() for name, part in parts.items()}
        device = next(iter(parts.values()))
        model = device.model if isinstance(device, Block) else device.block.model
        model.current.enqueue(lambda: memory.__setitem__(0, {name: get() for name, get in read.items()}))

    def read_to(self, block, memory):
        block.copy_(memory)
        pieces = {name: Piece(block, name) for name in self._names}
        if self.single:
            pieces = Sections(("data",), (0,), (SIZE,), pieces["data"])
        return self._packet.with_(sections=pieces)


class BundleSlots(Slots):
    """`count` slots of a bundle each, or of a packet each."""

    def __init__(self, count):
        super().__init__(count)
        self.budget = Budget(count * 4 * SIZE)
        self.free = [([POISON], None) for _ in range(4 * count)]


@pytest.fixture
def model(monkeypatch):
    """Makes a `Device` the one that the modules talk to."""

    def make(seed):
        device = Device(random.Random(seed))
        for module in (moves_module, bundle_module):
            monkeypatch.setattr(module, "current_stream", lambda _: device.current)
        monkeypatch.setattr(moves_module, "PacketLayout", Host)
        monkeypatch.setattr(moves_module, "StorageWeakRef", Weak)
        on_modelled_streams(monkeypatch, device, lambda nbytes, **_: Block(device, nbytes))
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing=False: Event())
        return device

    return make


def make_moves(limit, slots):
    budget, host = Budget(limit), BundleSlots(slots)
    moves = Moves(budget, host.take, host.budget.claim)
    moves.bundles._nbytes = 4 * SIZE
    return moves, budget, host


def coded(block):
    return PACKET.with_(sections=Sections(("data",), (0,), (SIZE,), block))


@pytest.mark.parametrize("limit", [4 * SIZE, 16 * SIZE, 36 * SIZE])
@pytest.mark.parametrize("slots", [24, 6, 1])
@pytest.mark.parametrize("streams", [1, 2])
def test_every_use_reads_what_was_sent_in_any_order_of_work(model, limit, slots, streams):
    parts = fetched = 0
    for seed in range(12):
        device = model(seed)
        rng = device.rng
        moves, budget, host = make_moves(limit, slots)
        reads, homes = [], {}

        def use(value, device=device, homes=homes, reads=reads):
            home = homes[value]
            device.current = device.compute[device.rng.randrange(streams)]
            if isinstance(home, Parcel) and device.rng.random() < 0.3:
                given = home.give()
                if given is not None:
                    get = given.reader()
                    device.current.enqueue(lambda: reads.append((value, get())))
                    del homes[value]
                    return
            with home.use() as packet:
                sections = packet.sections
                get = (sections.buffer if isinstance(sections, Sections) else sections["data"]).reader()
                device.current.enqueue(lambda: reads.append((value, get())))

        for step in range(3):
            for value in range(20 * step, 20 * step + 20):
                device.current = device.compute[rng.randrange(streams)]
                block = Block(device, SIZE, value)
                if rng.random() < 0.2:
                    home = moves.send(RAW.with_(sections={"data": block}), Source())
                else:
                    home = moves.bundles.send(coded(block))
                    parts += isinstance(home, Part)
                if home is not None:
                    homes[value] = home
                del block, home
                device.run(rng.randrange(8))
                if homes and rng.random() < 0.15:
                    use(rng.choice(list(homes)))
                if homes and rng.random() < 0.1:
                    del homes[rng.choice(list(homes))]
            order = sorted(homes, reverse=True)
            if rng.random() < 0.5:
                rng.shuffle(order)
            for value in order:
                for _ in range(rng.choice((0, 1, 1, 2))):
                    if value in homes:
                        use(value)
                    if rng.random() < 0.5:
                        moves.fetch_ahead(moves.count + 1, 0, 0, 1.0)
                    device.run(rng.randrange(12))
                if rng.random() < 0.8:
                    homes.pop(value, None)
        device.run()
        fetched += moves.fetched + moves.prefetched
        assert reads and all(sent == got for sent, got in reads), (seed, reads)
        assert not device.torn and budget.peak <= limit
        homes.clear()
        assert (budget.held, host.budget.held, len(host.free)) == (0, 0, 4 * slots)
    assert parts and (fetched or limit == 36 * SIZE or slots == 1)


def raw(device, value):
    return RAW.with_(sections={"data": Block(device, SIZE, value)})


def test_what_is_given_away_counts_until_its_node_has_run(model):
    device = model(0)
    moves, budget, _ = make_moves(4 * SIZE, 24)
    homes = [moves.send(raw(device, value), Source()) for value in range(12)]
    moves.room(4 * SIZE)  # all of them leave
    device.run()
    moves.fetch_ahead(moves.count + 1, 0, 0, 1.0)
    given = homes[-1].give()
    moves.fetch_ahead(moves.count + 1, 0, 0, 1.0)
    assert given is not None and budget.held == 4 * SIZE
    assert [home.here for home in homes] == [False] * 8 + [True] * 3 + [False]
    del homes[-1], given
    assert budget.held == 3 * SIZE


def test_what_nodes_have_done_with_counts_no_longer(model):
    """Though the graph is retained, and so the parcels are."""
    device = model(0)
    moves, budget, _ = make_moves(4 * SIZE, 24)
    homes = [moves.send(raw(device, value), Source()) for value in range(12)]
    moves.room(4 * SIZE)
    device.run()
    for home in reversed(homes):
        moves.fetch_ahead(home.number + 1, 0, 0, 1.0)
        assert home.give() is not None
        device.run()
        assert budget.held <= 4 * SIZE
    assert moves.room(4 * SIZE) is not None and moves.fetched < 2


def test_memory_is_given_away_while_it_is_copied_out(model):
    """A graph that is retained asks for it again."""
    for seed in range(60):
        device = model(seed)
        moves, _, _ = make_moves(8 * SIZE, 24)
        home = moves.send(raw(device, 7))
        reads = []
        for _ in range(2):
            given = home.give()
            get = given.reader()
            device.current.enqueue(lambda get=get, reads=reads: reads.append(get()))
            del given, get
            Block(device, SIZE, 99)
        device.run()
        assert reads == [7, 7], seed


@pytest.mark.parametrize("stream", [0, 1])
def test_an_interrupt_at_any_point_of_a_use_tears_nothing(model, stream):
    for at in count():
        device = model(at)
        moves, budget, _ = make_moves(4 * SIZE, 24)
        homes = [moves.bundles.send(coded(Block(device, SIZE, value))) for value in range(8)]
        moves.room(4 * SIZE)  # all of them leave
        moves.fetch_ahead(moves.count + 1, 0, 0, 1.0)
        device.current = device.compute[stream]
        reads = []

        def use(device=device, homes=homes, reads=reads):
            for value in (7, 0):
                with homes[value].use() as packet:
                    get = packet.sections.buffer.reader()
                    entry = [value]
                    device.current.enqueue(lambda get=get, entry=entry: entry.append(get()))
                reads.append(entry)  # what a node has read that was interrupted is lost

        hit = interrupted(use, at, moves_module, copies_module, waits_module)
        if at % 2:
            use()
        homes.clear()
        device.run()
        assert not device.torn and all(value == got for value, got in reads), (at, reads)
        assert budget.held == 0, at
        if not hit:
            break
    assert at > 40
