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
        "_exact_finish_kernel",
        "_exact_list_kernel",
        "_exact_decode_kernel",
        "_multiply_kernel",
        "project_quantize_kernel",
        "quantize_kernel",
        "split_kernel",
        "center_kernel",
        "weigh_kernel",
        "restore_kernel",
        "restore_narrow_kernel",
        "restore_hopper_kernel",
        "dequantize_kernel",
    }
    assert all(row["cubin"] for row in compiled)


def test_group_kernels_round_after_every_operation(compiled: list[dict[str, object]]) -> None:
    groups = [row for row in compiled if str(row["kernel"]).startswith("_group")]
    assert groups
    assert not any(row["fma"] for row in groups)


def test_products_with_a_factor_move_several_numbers_at_a_time(compiled: list[dict[str, object]]) -> None:
    rows = [row for row in compiled if row["kernel"] == "_multiply_kernel"]
    assert len(rows) == 2 and all(row["wide"] for row in rows)


PRODUCTS = ("project_quantize_kernel", "restore_kernel", "restore_narrow_kernel", "restore_hopper_kernel")
PASSES = ("quantize_kernel", "split_kernel", "center_kernel", "dequantize_kernel")


def test_projections_use_tensor_cores_and_descriptors(compiled: list[dict[str, object]]) -> None:
    rows = [row for row in compiled if row["kernel"] in PRODUCTS]
    assert len(rows) == 18
    assert all(row["wgmma"] and row["descriptors"] for row in rows)


def test_surface_kernels_fit_a_multiprocessor(compiled: list[dict[str, object]]) -> None:
    """Compute capability 9.0 has 227 KiB of shared memory for a block (CUDA C++ Programming Guide, technical
    specifications). A spilled register costs local memory: a few outside the loop of a product do no harm.
    """
    rows = [row for row in compiled if row["kernel"] in PRODUCTS + PASSES]
    assert all(row["shared"] <= 227 * 1024 for row in rows)
    assert all(row["stack"] <= (32 if row["kernel"] in PRODUCTS else 0) for row in rows if not row["ragged"])
