"""Finding, binding and checking driver libraries, on machines that have none of them."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fake_nvdec import FakeDriver
from sidelane.codec import _driver
from sidelane.codec._abi import NVENC_VERSIONS, load
from sidelane.codec._driver import Library, Nvenc, check, hidden_gpus_hint, missing_remedy, nvenc_version
from sidelane.codec.probe import probe_nvenc
from sidelane.errors import DriverError, LaneUnavailable


def absent(soname: str) -> Any:
    raise OSError(f"{soname}: cannot open shared object file: No such file or directory")


def test_a_missing_library_is_a_value_until_it_is_called() -> None:
    library = Library(load("cuvid-13.0"), open=absent)
    assert library.missing is not None
    assert library.missing.startswith("libnvcuvid.so.1: cannot open shared object file")
    with pytest.raises(LaneUnavailable, match=r"^libnvcuvid\.so\.1: cannot open"):
        library.call("cuvidDestroyDecoder", None)


def test_remedies(tmp_path: Path) -> None:
    node = tmp_path / "nvidiactl"
    assert missing_remedy("libnvcuvid.so.1", {}, str(node)).startswith("install the NVIDIA driver")
    node.touch()
    assert missing_remedy("libcuda.so.1", {}, str(node)).startswith("install the NVIDIA driver")
    text = missing_remedy("libnvcuvid.so.1", {}, str(node))
    assert "set NVIDIA_DRIVER_CAPABILITIES to all or to compute,utility,video;" in text
    assert "install libnvidia-decode of the driver's version" in text
    text = missing_remedy(
        "libnvidia-encode.so.1", {"NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}, str(node)
    )
    assert "(it is 'compute,utility')" in text and "libnvidia-encode" in text


def test_hidden_gpus(tmp_path: Path) -> None:
    proc, dev = tmp_path / "gpus", tmp_path / "dev"
    dev.mkdir()
    assert hidden_gpus_hint(str(proc), str(dev)) == ""
    for name in ("0000:19:00.0", "0000:3b:00.0", "0000:4c:00.0"):
        (proc / name).mkdir(parents=True)
    for name in ("nvidia0", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (dev / name).touch()
    assert hidden_gpus_hint(str(proc), str(dev)).startswith("this container sees 2 of the host's 3 GPUs")
    (dev / "nvidia1").touch()
    assert hidden_gpus_hint(str(proc), str(dev)) == ""


def test_a_function_the_driver_lacks() -> None:
    library = Library(load("cuda"), open=lambda _: SimpleNamespace())
    with pytest.raises(LaneUnavailable, match=r"libcuda\.so\.1 has no cuInit: the driver is too old"):
        library.function("cuInit")


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    fake = FakeDriver()
    cuda = load("cuda")
    monkeypatch.setattr(_driver, "_libraries", {"cuda": Library(cuda, open=lambda s: fake.open(cuda, s))})
    monkeypatch.setattr(_driver, "_contexts", {})
    return fake


def test_a_failed_call_is_named(driver: FakeDriver) -> None:
    check("cuvidCreateDecoder", 0)
    with pytest.raises(DriverError) as caught:
        check("cuvidCreateDecoder", 2)
    assert str(caught.value).startswith("cuvidCreateDecoder -> 2 (CUDA_ERROR_2): free device memory")
    assert (caught.value.call, caught.value.status, caught.value.name) == (
        "cuvidCreateDecoder",
        2,
        "CUDA_ERROR_2",
    )


def test_no_device_blames_hidden_gpus(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DriverError, match=r"-> 100 \(CUDA_ERROR_100\): "):
        check("cuvidGetDecoderCaps", 100)
    monkeypatch.setattr(_driver, "hidden_gpus_hint", lambda: "some GPUs are hidden")
    with pytest.raises(DriverError, match="some GPUs are hidden"):
        check("cuvidGetDecoderCaps", 100)


class FakeNvenc:
    """libnvidia-encode of a driver that knows the API up to `code`; opening a session returns `status`."""

    def __init__(self, code: int, status: int) -> None:
        self.code, self.status = code, status
        self.opened: list[int] = []
        self.destroyed = 0
        self._keep: list[Any] = []

    def open(self, version: str) -> Library:
        abi = load(f"nvenc-{version}")

        def newest(out: Any) -> int:
            out[0] = self.code
            return 0

        def create(pointer: Any) -> int:
            word = pointer.contents.version
            major, minor = word & 0xFF, word >> 24 & 0xF
            if (major, minor) > (self.code >> 4, self.code & 15):
                return 15
            for name, work in (
                ("nvEncOpenEncodeSessionEx", open_session),
                ("nvEncDestroyEncoder", destroy),
                ("nvEncGetLastErrorString", lambda _: None),
            ):
                function = abi.prototype(name)(work)  # type: ignore[arg-type]
                self._keep.append(function)
                setattr(pointer.contents, name, ctypes.cast(function, ctypes.c_void_p))
            return 0

        def open_session(params: Any, encoder: Any) -> int:
            assert params.contents.version == abi.struct("NV_ENC_OPEN_ENCODE_SESSION_EX_PARAMS")().version
            assert (params.contents.deviceType, params.contents.device) == (1, 0xC0)
            self.opened.append(params.contents.apiVersion)
            encoder[0] = 77
            return self.status

        def destroy(encoder: int) -> int:
            self.destroyed += encoder == 77
            return 0

        exports = {"NvEncodeAPIGetMaxSupportedVersion": newest, "NvEncodeAPICreateInstance": create}
        functions = {n: abi.prototype(n)(work) for n, work in exports.items()}  # type: ignore[arg-type]
        return Library(abi, open=lambda _: SimpleNamespace(**functions))


def install(monkeypatch: pytest.MonkeyPatch, nvenc: FakeNvenc) -> None:
    for version in NVENC_VERSIONS:
        monkeypatch.setitem(_driver._libraries, f"nvenc-{version}", nvenc.open(version))


@pytest.mark.parametrize(
    ("code", "version"),
    [(0xB1, "11.1"), (0xC0, "11.1"), (0xC1, "12.1"), (0xC2, "12.1"), (0xD0, "13.0"), (0xD1, "13.0")],
)
def test_the_newest_table_the_driver_knows(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch, code: int, version: str
) -> None:
    install(monkeypatch, FakeNvenc(code, 0))
    assert nvenc_version() == version


def test_a_driver_older_than_every_table(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvenc(0xB0, 0))
    with pytest.raises(LaneUnavailable, match=r"knows NVENC 11\.0: update it"):
        nvenc_version()


def test_probing_a_gpu_without_nvenc(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    nvenc = FakeNvenc(0xD0, 2)
    install(monkeypatch, nvenc)
    monkeypatch.setattr(_driver, "hidden_gpus_hint", lambda: "")
    found = probe_nvenc("cuda:0")
    assert (found.available, found.driver_api) == (False, "13.0")
    assert found.reason == (
        "nvEncOpenEncodeSessionEx -> 2 (NV_ENC_ERR_UNSUPPORTED_DEVICE): "
        "this GPU has no NVENC (A100, H100, H200, B200 have none)"
    )
    assert [(a.api, a.status) for a in found.attempts] == [("13.0", 2), ("12.1", 2), ("11.1", 2)]
    assert nvenc.opened == [13, 12 | 1 << 24, 11 | 1 << 24]
    assert nvenc.destroyed == 3
    monkeypatch.setattr(_driver, "hidden_gpus_hint", lambda: "some GPUs are hidden")
    assert probe_nvenc("cuda:0").reason.endswith("; or some GPUs are hidden")


def test_probing_a_gpu_with_nvenc(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    nvenc = FakeNvenc(0xC1, 0)
    install(monkeypatch, nvenc)
    found = probe_nvenc("cuda:0")
    assert (found.available, found.reason, found.driver_api) == (True, "", "12.1")
    assert [(a.api, a.status) for a in found.attempts] == [("13.0", 15), ("12.1", 0), ("11.1", 0)]
    assert nvenc.destroyed == 2


def test_probing_without_the_library(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in NVENC_VERSIONS:
        monkeypatch.setitem(
            _driver._libraries, f"nvenc-{version}", Library(load(f"nvenc-{version}"), open=absent)
        )
    found = probe_nvenc("cuda:0")
    assert (found.available, found.driver_api, found.attempts) == (False, "", ())
    assert found.reason.startswith("libnvidia-encode.so.1: cannot open shared object file")


def test_an_nvenc_entry_the_driver_left_empty(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, FakeNvenc(0xD0, 0))
    with pytest.raises(LaneUnavailable, match="the driver has no nvEncEncodePicture: update it"):
        Nvenc("13.0").function("nvEncEncodePicture")
