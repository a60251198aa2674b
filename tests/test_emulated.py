"""The emulated driver is strict, in every API version, and the same compiled by NVIDIA's header (11.1)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import emulated_layout
from emulated import (
    EmulatedDriver,
    build,
    canned,
    canned_stream,
    host_view,
    installed,
    one_frame,
    random_surface,
)
from sidelane.codec import _driver
from sidelane.codec._abi import NVENC_VERSIONS, load
from sidelane.codec._driver import Nvenc
from sidelane.codec._nvenc import Memory, Session
from sidelane.codec._nvenc_config import Coding
from sidelane.codec._nvenc_memory import DevicePlace
from sidelane.codec.nvenc import Encoder
from sidelane.errors import DriverError, LaneUnavailable
from sidelane.layout import NV12, YUV444_10

PUBLIC = Path("/usr/include/ffnvcodec/nvEncodeAPI.h")
LAYOUT = one_frame(NV12, 160, 48)
SOURCE = random_surface(LAYOUT)
CODING = Coding(NV12, 160, 48, 30)
CHECKED = (  # structures that a session of an encoder hands to the driver
    *("NV_ENC_CAPS_PARAM", "NV_ENC_PRESET_CONFIG", "NV_ENC_INITIALIZE_PARAMS", "NV_ENC_RECONFIGURE_PARAMS"),
    *("NV_ENC_CREATE_BITSTREAM_BUFFER", "NV_ENC_REGISTER_RESOURCE", "NV_ENC_MAP_INPUT_RESOURCE"),
    *("NV_ENC_PIC_PARAMS", "NV_ENC_LOCK_BITSTREAM", "NV_ENC_SEQUENCE_PARAM_PAYLOAD"),
)


@pytest.fixture
def driver() -> Iterator[EmulatedDriver]:
    with installed(build()) as emulated:
        yield emulated


def use() -> None:
    with Encoder(LAYOUT, qp=30, device="cuda:0") as encoder:
        encoder.set_qp(20)
        encoder.encode(SOURCE)


@pytest.mark.parametrize("api", NVENC_VERSIONS)
@pytest.mark.parametrize("struct", CHECKED)
@pytest.mark.parametrize("part", ["version", "reserved"])
def test_a_wrong_bit_in_a_structure_is_refused(
    driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch, api: str, struct: str, part: str
) -> None:
    driver.speak(api)
    use()
    built = load(f"nvenc-{api}").struct(struct)
    reserved = emulated_layout.reserved(load(f"nvenc-{api}")._table, struct)
    at = 2 if part == "version" else max(i for i, bits in enumerate(reserved) if bits)
    wrong = bytearray(built._template_)
    wrong[at] ^= 1 if part == "version" else reserved[at]
    monkeypatch.setattr(built, "_template_", bytes(wrong))
    problem = (
        f"-> 15 .*version word of {struct}" if part == "version" else f"-> 8 .*reserved bits of {struct}"
    )
    if (part, struct) == ("reserved", "NV_ENC_CAPS_PARAM"):
        problem = "160x48 is outside 0x0..0x0"  # 8 is how drivers answer a question they do not know
    with pytest.raises((DriverError, LaneUnavailable), match=problem):
        use()
    driver.forgive()  # a picture that cannot be locked never comes out


def test_every_reserved_bit_counts(driver: EmulatedDriver) -> None:
    """Bits 11-13 of the HEVC configuration are the bit depth up to 12.1 and reserved after."""
    masks = {
        api: emulated_layout.reserved(load(f"nvenc-{api}")._table, "NV_ENC_CONFIG_HEVC")[16:20]
        for api in NVENC_VERSIONS
    }
    words = {api: int.from_bytes(mask, "little") for api, mask in masks.items()}
    assert words == {"13.0": 0xFE003800, "12.1": 0xFFF00000, "11.1": 0xFFFC0000}


@pytest.mark.parametrize("api", NVENC_VERSIONS[1:])
def test_functions_of_two_versions_are_not_mixed(driver: EmulatedDriver, api: str) -> None:
    ours, newest = Nvenc(api), Nvenc(NVENC_VERSIONS[0])
    count = ctypes.c_uint32()
    with _driver.bound(0):
        session = ours.open_session(_driver.primary_context(0))
        ours.call("nvEncGetEncodeGUIDCount", session, ctypes.byref(count))
        with pytest.raises(DriverError, match="-> 15 .*the session has another API version"):
            newest.call("nvEncGetEncodeGUIDCount", session, ctypes.byref(count))
        ours.call("nvEncDestroyEncoder", session)
    assert driver.violation() == "a session is used with the functions of another API version"
    driver.forgive()


class Opened:
    """A raw session with one input of the size of LAYOUT."""

    def __init__(self, coding: Coding = CODING) -> None:
        self.session = Session(0)
        self.session.initialize(coding)
        self.memory = Memory(0, 3 * 256 * 144)
        self.input = self.session.register(self.memory, 0, 256)

    def submit(self, target: int, stamp: int) -> None:
        mapped = self.session._maps[self.input] or self.session.map(self.input)
        self.session.encode(mapped, 256, target, stamp)


def broken(driver: EmulatedDriver, opened: Opened, rule: str) -> None:
    """That `rule` was broken, on purpose."""
    assert driver.violation() == rule
    opened.session.close()
    driver.forgive()


@pytest.mark.parametrize("api", NVENC_VERSIONS)
def test_an_output_is_the_encoders_until_it_is_unmapped(driver: EmulatedDriver, api: str) -> None:
    driver.speak(api)
    opened = Opened(replace(CODING, on_device=True))
    session, memory = opened.session, Memory(0, 5000)
    place = session.place()
    assert isinstance(place, DevicePlace)
    output = session.register_output(memory)
    opened.submit(session.map(output), 0)
    head = session.abi.struct("NV_ENC_ENCODE_OUT_PARAMS")()
    assert (host_view(memory.address, 5000) == 0xEE).all()  # nothing is there yet
    place.download(head, memory.address)
    assert driver.violation() == "an output was read before it was unmapped"
    session.unmap(output)
    place.download(head, memory.address)
    picture = canned(torch.zeros(72, 256, dtype=torch.uint8) + 0xDD, LAYOUT, 30)[0]
    assert head.bitstreamSizeInBytes == len(picture)
    assert host_view(memory.address + 256, len(picture)).numpy().tobytes() == picture
    broken(driver, opened, "an output was read before it was unmapped")


def test_inputs_stay_mapped_until_their_picture_is_collected(driver: EmulatedDriver) -> None:
    opened = Opened()
    opened.submit(opened.session.create_output(), 0)
    opened.session.unmap(opened.input)
    broken(driver, opened, "an input was unmapped before its picture was collected")


def test_inputs_stay_as_they_are_until_their_picture_is_collected(driver: EmulatedDriver) -> None:
    opened = Opened()
    output = opened.session.create_output()
    opened.submit(output, 0)
    host_view(opened.memory.address, 1)[0] += 1
    opened.session.collect(output, 0, ctypes.string_at)
    broken(driver, opened, "an input changed before its picture was collected")


def test_pictures_are_collected_in_order(driver: EmulatedDriver) -> None:
    opened = Opened()
    outputs = [opened.session.create_output() for _ in range(2)]
    for number, output in enumerate(outputs):
        opened.submit(output, number)
    opened.session.collect(outputs[1], 1, ctypes.string_at)
    broken(driver, opened, "pictures were not collected in the order of submission")


def test_the_size_changes_between_pictures(driver: EmulatedDriver) -> None:
    opened = Opened(replace(CODING, max_width=320, max_height=144))
    opened.submit(opened.session.create_output(), 0)
    opened.session.reconfigure(replace(opened.session.coding, width=320))
    broken(driver, opened, "the frame size was changed while pictures were in flight")


@pytest.mark.parametrize("api", NVENC_VERSIONS)
def test_the_size_changes_within_limits(driver: EmulatedDriver, api: str) -> None:
    driver.speak(api)
    opened = Opened(replace(CODING, max_width=320, max_height=144))
    session, coding = opened.session, opened.session.coding
    with pytest.raises(DriverError, match="the frame is too large"):
        session.reconfigure(replace(coding, width=322, max_width=0))
    with pytest.raises(DriverError, match="the frame is too small"):
        session.reconfigure(replace(coding, width=128))
    session._params.maxEncodeWidth = 640
    with pytest.raises(DriverError, match="cannot be changed without a new session"):
        session.reconfigure(coding)
    session._params.maxEncodeWidth = 320
    session.reconfigure(replace(coding, width=320, height=144))
    mapped, output = session.map(opened.input), session.create_output()
    with pytest.raises(DriverError, match="registered in another size"):
        session.encode(mapped, 256, output, 0)
    driver.set(resize=0)
    with pytest.raises(DriverError, match="the frame size cannot change"):
        session.reconfigure(coding)
    session.unmap(opened.input)
    session.close()


@pytest.mark.parametrize("api", NVENC_VERSIONS)
def test_outputs_are_registered_as_documented(driver: EmulatedDriver, api: str) -> None:
    driver.speak(api)
    for coding, nbytes, problem in (
        (CODING, 5000, "bitstreams go to host memory"),
        (replace(CODING, on_device=True), 256, "no room behind the output parameters"),
    ):
        opened = Opened(coding)
        with pytest.raises(DriverError, match=problem):
            opened.session.register_output(Memory(0, nbytes))
        opened.session.close()
    opened = Opened(replace(CODING, on_device=True))
    with pytest.raises(DriverError, match="bitstreams go to device memory"):
        opened.session.create_output()
    with pytest.raises(DriverError, match="no bitstream buffer"):
        opened.submit(0xBAD, 0)
    with pytest.raises(DriverError, match="registered twice"):
        opened.session.register_output(opened.memory)
    opened.session.close()


def test_split_frames_do_not_go_to_device_memory(driver: EmulatedDriver) -> None:
    for api in ("12.1", "13.0"):
        driver.speak(api)
        abi = load(f"nvenc-{api}")
        session = Session(0)
        number = abi.number
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(abi, "number", lambda name, number=number: 0 if "SPLIT" in name else number(name))
            with pytest.raises(DriverError, match="-> 8 .*split frames do not go to device memory"):
                session.initialize(replace(CODING, on_device=True))
        session.close()


@pytest.mark.abi_probe
def test_the_driver_compiled_by_the_public_header() -> None:
    if not PUBLIC.exists():
        pytest.fail("this test needs libffmpeg-nvenc-dev; leave it out with -m 'not abi_probe'")
    with installed(build(public_header=True)) as driver:
        driver.speak("11.1")
        layout = one_frame(YUV444_10, 160, 48, frames=2)
        source = random_surface(layout)
        for on_device in (False, True):
            with Encoder(layout, qp=30, device="cuda:0", max_size=(320, 144), on_device=on_device) as encoder:
                encoder.set_qp(20)
                stream = encoder.encode_stream(source)
                assert stream.numpy().tobytes() == canned_stream(source, layout, 20)
                encoder.reconfigure(one_frame(YUV444_10, 320, 48))
