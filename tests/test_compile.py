"""The kernels compile for a GPU. The interpreter accepts programs that the compiler does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_for_gpu.py")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run([sys.executable, SCRIPT], env=env, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(done.stderr[-3000:])
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_hopper(compiled: list[dict[str, object]]) -> None:
    assert {row["kernel"] for row in compiled} == {
        "_group_quantize_pack_kernel",
        "_group_unpack_dequantize_kernel",
        "_pack_bits_kernel",
        "_unpack_bits_kernel",
        "_exact_survey_kernel",
        "_exact_encode_kernel",
        "_exact_escapes_kernel",
        "_exact_decode_kernel",
        "project_quantize_kernel",
        "dequantize_project_kernel",
    }
    assert all(row["cubin"] for row in compiled)


def test_group_kernels_round_after_every_operation(compiled: list[dict[str, object]]) -> None:
    groups = [row for row in compiled if str(row["kernel"]).startswith("_group")]
    assert groups
    assert not any(row["fma"] for row in groups)


def test_bf16_projection_uses_tensor_cores(compiled: list[dict[str, object]]) -> None:
    rows = [row for row in compiled if row["kernel"] == "project_quantize_kernel"]
    assert rows
    assert all(row["wgmma"] for row in rows)
