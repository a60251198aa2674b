"""The command line: round trips, one line for every kind of bad input, and output that is whole or absent."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from crc32c import crc32c
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sidelane
from sidelane import archive, cli
from sidelane.codec.packet import Packet
from sidelane.pipeline import choice

METADATA = {"format": "pt", "note": "räksmörgås"}


@pytest.fixture(autouse=True)
def no_profile(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whatever this machine has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    choice.present.cache_clear()
    yield
    choice.present.cache_clear()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A safetensors file with every dtype of DTYPES, NaN, Inf, an empty tensor and a scalar."""
    tensors = {
        "layer.weight": torch.randn(64, 96, dtype=torch.float32),
        "layer.half": torch.randn(33, 65).half(),
        "layer.bf16": torch.randn(1000).bfloat16(),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1.0] * 64),
        "empty": torch.empty(0, 7),
        "scalar": torch.tensor(3.5),
        "mask": torch.tensor([True, False, True]),
    }
    for code, dtype in archive.DTYPES.items():
        if code != "BOOL":
            tensors[f"all.{code}"] = torch.arange(48).reshape(6, 8).to(dtype)
    path = tmp_path / "in.safetensors"
    save_file(tensors, path, metadata=METADATA)
    return path


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must end with status 2 and one line on stderr; returns the line."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        status = cli.run([str(a) for a in arguments])
        printed = capsys.readouterr()
        assert status == 2
        assert printed.out == ""
        assert re.fullmatch(r"sidelane: [^\n]+\n", printed.err), printed.err
        return printed.err

    return run


def others(path: Path) -> list[str]:
    """Names of everything in the directory of `path` but `path`."""
    return sorted(p.name for p in path.parent.iterdir() if p != path)


def test_exact_round_trip_restores_the_file_byte_for_byte(weights: Path, tmp_path: Path) -> None:
    packed, restored = tmp_path / "packed", tmp_path / "restored.safetensors"
    assert cli.run(["compress", str(weights), str(packed)]) == 0
    assert cli.run(["decompress", str(packed), str(restored)]) == 0
    assert restored.read_bytes() == weights.read_bytes()


def test_lossy_round_trip_keeps_bound_dtypes_and_metadata(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, restored = tmp_path / "packed", tmp_path / "restored.safetensors"
    assert cli.run(["compress", str(weights), str(packed), "--max-rel-error", "0.02"]) == 0
    printed = capsys.readouterr().out
    assert cli.run(["decompress", str(packed), str(restored)]) == 0
    assert packed.stat().st_size < weights.stat().st_size
    before, after = load_file(weights), load_file(restored)
    assert list(before) == list(after)
    worst = 0.0
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and after[name].shape == tensor.shape
        if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel() and name != "special":
            error = (after[name].double() - tensor.double()).norm() / tensor.double().norm()
            worst = max(worst, float(error))
    assert 0 < worst <= 0.02
    assert f"{worst:.2e}" in printed
    torch.testing.assert_close(after["special"], before["special"], rtol=0.02, atol=0, equal_nan=True)
    with safe_open(restored, "pt") as file:
        assert file.metadata() == METADATA


def test_table_has_the_measured_sizes(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed"
    assert cli.run(["compress", str(weights), str(packed)]) == 0
    printed = capsys.readouterr().out
    before, after = weights.stat().st_size, packed.stat().st_size
    for text in (f"{len(load_file(weights))}", f"{before:,}", f"{after:,}", f"{before / after:.3f}", "exact"):
        assert text in printed


@pytest.mark.parametrize("options", [["--bits", "4"], ["--max-rel-error", "0.1"]])
def test_what_is_restored_has_the_error_that_was_measured(
    options: list[str], weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed = tmp_path / "packed"
    errors = []
    for arguments in (
        ["compress", str(weights), str(packed), "--lane", "packed", *options],
        ["decompress", str(packed), str(tmp_path / "back")],
    ):
        assert cli.run(arguments) == 0
        errors += re.findall(r"\d\.\d\de-\d\d", capsys.readouterr().out)
    assert len(errors) == 2 and errors[0] == errors[1]


def test_an_archive_without_errors_is_not_called_exact(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "packed"
    monkeypatch.setattr(archive, "_relative_error", lambda tensor, packet: packet.rel_error)
    assert cli.run(["compress", str(weights), str(packed), "--lane", "packed", "--bits", "4"]) == 0
    capsys.readouterr()
    assert cli.run(["decompress", str(packed), str(tmp_path / "back")]) == 0
    printed = capsys.readouterr().out
    assert "not in the archive" in printed and "exact" not in printed


def test_version_help_and_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"sidelane {sidelane.__version__}\n"
    for arguments in ([], ["--help"]):
        assert cli.run(arguments) == 0
        printed = capsys.readouterr().out
        assert all(command in printed for command in ("doctor", "demo", "compress", "decompress"))


def test_command_is_installed() -> None:
    result = subprocess.run(
        [Path(sys.executable).with_name("sidelane"), "compress", "nowhere", "out"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert result.stderr == "sidelane: nowhere: No such file or directory: check the path\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--unknown"], "--unknown"),
        (["frobnicate"], "frobnicate"),
        (["compress"], "IN.safetensors"),
        (["compress", "IN", "OUT", "--bits", "many"], "--bits"),
        (["compress", "IN", "OUT", "--bits", "3", "--lane", "packed"], "bits"),
        (["compress", "IN", "OUT", "--bits", "8", "--lane", "raw"], "bits"),
        (["compress", "IN", "OUT", "--lane", "fast"], "fast"),
        (["compress", "IN", "OUT", "--max-rel-error", "-1"], "max_rel_error"),
        (["compress", "IN", "OUT", "--max-rel-error", "nan"], "max_rel_error"),
        (["compress", "nowhere", "OUT"], "nowhere: No such file"),
        (["compress", "IN", "nowhere/OUT"], "nowhere/OUT: nowhere is no folder: make it first"),
        (["compress", ".", "OUT"], "directory"),
        (["compress", "IN", "OUT", "--qp", "20"], "lane 'video-cpu' has it"),
        (["demo", "--out", "IN"], "is a file: name a folder"),
        (["compress", "IN", "IN"], "is the input"),
        (["compress", "IN", "."], "is not a file"),
        (["demo", "--seed", "99999999999999999999999"], "--seed"),
        (["decompress", "IN", "OUT"], "sidelane compress"),
        (["decompress", "nowhere", "OUT"], "nowhere: No such file"),
        (["demo", "--device", "abacus"], "abacus"),
        (["demo", "--steps", "0"], "--steps"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_give_one_line(
    arguments: list[str],
    words: str,
    weights: Path,
    fails: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(weights.parent)
    assert words in fails(*(weights.name if a == "IN" else a for a in arguments))
    assert others(weights) == []


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def row(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


@pytest.mark.parametrize(
    "content",
    {
        "empty": b"",
        "short": b"\x01\x00",
        "text": b"this is not a tensor file at all",
        "header beyond file": safetensors({}, length=1 << 40),
        "header is no JSON": safetensors(b"{]"),
        "header is no UTF-8": safetensors(b'{"\xff": 1}'),
        "header is a list": safetensors([1, 2]),
        "header is deep": safetensors(b"[" * 100_000),
        "row is a number": safetensors({"a": 1}),
        "row lacks dtype": safetensors({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
        "unknown dtype": safetensors({"a": row(dtype="F4")}, bytes(8)),
        "dtype is a list": safetensors({"a": row(dtype=[])}, bytes(8)),
        "negative shape": safetensors({"a": row(shape=[-2, -1])}, bytes(8)),
        "fractional shape": safetensors({"a": row(shape=[2.0])}, bytes(8)),
        "shape beyond data": safetensors({"a": row(shape=[1 << 40])}, bytes(8)),
        "too many dimensions": safetensors({"a": row(shape=[1] * 80 + [2])}, bytes(8)),
        "huge empty shape": safetensors({"a": row(shape=[0, 1 << 61, 1 << 61], data_offsets=[0, 0])}),
        "gap": safetensors({"a": row(data_offsets=[8, 16])}, bytes(16)),
        "overlap": safetensors({"a": row(), "b": row()}, bytes(8)),
        "no BOOL": safetensors({"a": row(dtype="BOOL", data_offsets=[0, 2])}, b"\x01\x07"),
        "data cut off": safetensors({"a": row()}, bytes(7)),
        "data too long": safetensors({"a": row()}, bytes(9)),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_what_is_no_safetensors_file_is_refused(
    content: tuple[str, bytes], tmp_path: Path, fails: Callable[..., str]
) -> None:
    source = tmp_path / "bad.safetensors"
    source.write_bytes(content[1])
    fails("compress", source, tmp_path / "out")
    assert others(source) == []


def test_every_damaged_archive_is_refused(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flipped bit or a missing end: status 2, no output. Every byte of the frame, samples elsewhere."""
    small, packed, out = tmp_path / "small", tmp_path / "packed", tmp_path / "out"
    save_file({"a": torch.randn(40, 8), "b": torch.arange(5)}, small)
    assert cli.run(["compress", str(small), str(packed)]) == 0
    data = packed.read_bytes()
    flips = [*range(300), *range(300, len(data), 29)]
    capsys.readouterr()
    for at in flips:
        packed.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        assert cli.run(["decompress", str(packed), str(out)]) == 2, f"flip at {at}"
    for size in [*range(64), *range(64, len(data), 37), len(data) - 1]:
        packed.write_bytes(data[:size])
        assert cli.run(["decompress", str(packed), str(out)]) == 2, f"cut to {size}"
    packed.write_bytes(data + b"\0")
    assert cli.run(["decompress", str(packed), str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == len(flips) + 64 + len(range(64, len(data), 37)) + 2
    assert not out.exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_archive_whose_packets_belong_elsewhere_is_refused(tmp_path: Path, fails: Callable[..., str]) -> None:
    """Intact packets of another shape, and one that expands a single element to a terabyte."""
    source, packed = tmp_path / "in", tmp_path / "packed"
    save_file({"a": torch.zeros(2)}, source)
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 38], "data_offsets": [0, 1 << 40]}}).encode()
    prefix = struct.pack("<8sHHIQ", archive.MAGIC, archive.VERSION, 0, crc32c(header), len(header)) + header
    for tensor in (torch.zeros(3), torch.zeros(1).expand(1 << 38)):
        body = sidelane.compress(tensor, lane="raw").to_bytes()
        packed.write_bytes(prefix + struct.pack("<Q", len(body)) + body)
        assert "tensor 'a'" in fails("decompress", packed, tmp_path / "out")


def test_existing_output_is_replaced_only_with_force(
    weights: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"precious")
    assert "--force" in fails("compress", weights, out)
    assert out.read_bytes() == b"precious"
    assert cli.run(["compress", str(weights), str(out), "--force"]) == 0
    assert out.read_bytes().startswith(archive.MAGIC)
    assert "is the input" in fails("compress", weights, weights, "--force")


def test_output_has_the_usual_permissions(weights: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert cli.run(["compress", str(weights), str(tmp_path / "out")]) == 0
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("error", "status"), [(OSError(errno.ENOSPC, "No space left on device"), 2), (KeyboardInterrupt(), 130)]
)
def test_failure_halfway_leaves_nothing(
    existing: bool,
    error: BaseException,
    status: int,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    if existing:
        out.write_bytes(b"precious")
    encoded = []
    to_bytes = Packet.to_bytes

    def third_fails(packet: Packet) -> bytes:
        encoded.append(packet)
        if len(encoded) == 3:
            raise error
        return to_bytes(packet)

    monkeypatch.setattr(Packet, "to_bytes", third_fails)
    assert cli.run(["compress", str(weights), str(out), "--force"]) == status
    assert others(weights) == (["out"] if existing else [])
    assert not existing or out.read_bytes() == b"precious"


def test_write_error_names_the_output(weights: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    """A file size limit stands in for a full disk: the kernel refuses the write."""
    save_file({"a": torch.randn(1 << 16)}, weights)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        line = fails("compress", weights, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert line == f"sidelane: {tmp_path / 'out'}: File too large\n"
    assert others(weights) == []


def test_directory_that_takes_no_file_is_one_line(
    weights: Path, tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(prefix: str, dir: Path) -> tuple[int, str]:
        raise PermissionError(errno.EACCES, "Permission denied", str(dir / prefix))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert (
        fails("compress", weights, tmp_path / "out") == f"sidelane: {tmp_path / 'out'}: Permission denied\n"
    )


def test_memory_holds_one_tensor_not_the_file(tmp_path: Path) -> None:
    """32 tensors of 4 MiB pass through less memory than half the file beyond what the first one needs."""
    source = tmp_path / "many"
    save_file({f"t{i:02}": torch.randn(1 << 20) for i in range(32)}, source)
    code = (
        "import resource, sys; from pathlib import Path; from sidelane.archive import compress_file\n"
        "peaks = []\n"
        "def note(done, total): peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
        "compress_file(Path(sys.argv[1]), Path(sys.argv[2]), progress=note, lane='raw')\n"
        "print(peaks[-1] - peaks[0])"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    assert grown < 64 * 1024  # KiB


def test_doctor_reports_everything_and_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    from sidelane import doctor

    found = {finding.subject: finding for finding in doctor.findings()}
    for subject in ("Triton", "NVENC", "NVDEC", "nvCOMP", "host memory", "PCIe"):
        assert subject in found
    assert any(subject.startswith("CUDA device") for subject in found)
    assert any(subject.startswith("lane video-cpu") for subject in found)
    assert all(finding.remedy for finding in found.values() if finding.state == "no")
    assert all(finding.detail for finding in found.values())
    assert cli.run(["doctor"]) == 0
    assert "NVENC" in capsys.readouterr().out


def test_doctor_reads_both_kinds_of_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sidelane import doctor

    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "memory.max").write_text("4096\n")
    (tmp_path / "a" / "b" / "memory.max").write_text("max\n")
    assert doctor._smallest_limit(tmp_path / "a" / "b", "memory.max") == 4096
    assert doctor._smallest_limit(tmp_path / "other", "memory.max") is None


def test_the_lane_for_a_wire(
    weights: Path, tmp_path: Path, fails: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    for arguments in (("--lane", "auto"), ("--wire", "0.1"), ("--lane", "exact", "--wire", "0.1")):
        assert "--lane auto and --wire" in fails("compress", weights, target, *arguments)
    assert "'nan' is no rate" in fails("compress", weights, target, "--lane", "auto", "--wire", "nan")
    assert not target.exists()
    assert cli.run(["compress", str(weights), str(target), "--lane", "auto", "--wire", "0.001"]) == 0
    assert "until then everything goes raw" in capsys.readouterr().err
    restored = tmp_path / "restored.safetensors"
    assert cli.run(["decompress", str(target), str(restored)]) == 0
    assert restored.read_bytes() == weights.read_bytes()


def test_an_interrupted_process_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that measure may be in C++ still; what was printed is not lost."""
    ends: list[object] = []
    monkeypatch.setattr(cli, "run", lambda arguments: 130)
    monkeypatch.setattr(sys.stdout, "flush", lambda: ends.append("flushed"), raising=False)

    def leave(status: int) -> None:
        ends.append(status)
        raise SystemExit

    monkeypatch.setattr(cli.os, "_exit", leave)
    with pytest.raises(SystemExit):
        cli.main()
    assert ends == ["flushed", 130]


def test_a_full_standard_output_has_a_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cli, "app", full)
    assert cli.run(["doctor"]) == 2
    assert capsys.readouterr().err == "sidelane: standard output: No space left on device\n"


def test_a_cut_archive_is_named_with_what_to_do(
    weights: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    assert cli.run(["compress", str(weights), str(out)]) == 0
    out.write_bytes(out.read_bytes()[:-100])
    line = fails("decompress", out, tmp_path / "back")
    assert f"{out}: tensor '" in line and "damaged or cut, copy it again" in line
