"""Offload under DDP, FSDP2 and tensor parallelism: gradients of two processes, bit for bit.

The processes run all scenarios of `distributed_worker`, once for the whole file.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("distributed_worker.py")


def scenarios() -> list[str]:
    """Names in the worker's table, read without importing it."""
    for node in ast.parse(WORKER.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SCENARIOS":
            return [leaf.id for leaf in ast.walk(node.value.generators[0].iter) if isinstance(leaf, ast.Name)]
    raise AssertionError("the worker has no table of scenarios")


def run(world: int, kind: str, folder: Path) -> list[dict[str, str]]:
    """What failed on each rank."""
    paths = os.pathsep.join([str(WORKER.parent), os.environ.get("PYTHONPATH", "")])
    arguments = [str(world), str(folder / "meet"), kind]
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": paths},
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return run(2, "cpu", tmp_path_factory.mktemp("cpu"))


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    return run(min(torch.cuda.device_count(), 2), "cuda", tmp_path_factory.mktemp("gpu"))


def check(failures: list[dict[str, str]], name: str) -> None:
    for rank, failed in enumerate(failures):
        if name in failed:
            pytest.fail(f"rank {rank}: {failed[name]}", pytrace=False)


@pytest.mark.parametrize("name", scenarios())
def test_processes(on_cpu, name):
    check(on_cpu, name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", scenarios())
def test_processes_on_gpus(cuda, on_gpu, name):
    check(on_gpu, name)
