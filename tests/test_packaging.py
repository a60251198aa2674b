"""What is installed, what imports what, and that the repository root is a safe place to start Python in."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import sidelane

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "sidelane": ROOT / "src" / "sidelane",
    "sidelane.kernels": ROOT / "kernels",
    "sidelane.codec": ROOT / "codec",
    "sidelane.pipeline": ROOT / "pipeline",
}
# Each part may import itself and the parts named here; the face may import everything.
ARROWS = {
    "base": set(),
    "kernels": {"base"},
    "codec": {"base"},
    "pipeline": {"base", "kernels", "codec"},
    "face": {"base", "kernels", "codec", "pipeline"},
}
BASE = {"sidelane.errors", "sidelane.layout"}


def sources() -> dict[str, Path]:
    """Module name -> file of everything that is installed."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.glob("*.py")):
            found[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return found


def part(module: str) -> str:
    if module in BASE:
        return "base"
    names = module.split(".")
    return names[1] if len(names) > 1 and names[1] in ARROWS else "face"


def imports(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports anywhere; relative imports appear with their dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            # `from a.b import c` imports the module a.b.c where there is one, else a name of a.b.
            found |= {
                f"{prefix}.{a.name}" if f"{prefix}.{a.name}" in sources() else prefix for a in node.names
            }
    return found


def python(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter without PYTHONSAFEPATH unless `environment` sets it."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"} | environment
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=240
    )


@pytest.mark.parametrize("module", sources())
def test_imports_follow_the_arrows(module: str) -> None:
    own = part(module)
    for name in imports(sources()[module]):
        assert not name.startswith("."), f"{module} has a relative import {name}"
        assert name.split(".")[0] not in ("kernels", "codec", "pipeline", "tests", "benchmarks"), name
        if name.split(".")[0] == "sidelane":
            assert part(name) in ARROWS[own] | {own}, f"{module} imports {name}"


def test_arrows_are_checked_against_real_imports() -> None:
    """The parser above sees imports in every form that is used, also those inside functions."""
    assert "sidelane.errors" in imports(ROOT / "src/sidelane/cli.py")
    assert "sidelane.doctor" in imports(ROOT / "src/sidelane/cli.py")
    assert part("sidelane.errors") == "base"
    assert part("sidelane.codec.packet") == "codec"
    assert part("sidelane") == part("sidelane.cli") == "face"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    directory = tmp_path_factory.mktemp("wheel")
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    copy = directory / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "src", "kernels", "codec", "pipeline"):
        if (ROOT / name).exists():
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, copy / name)
    result = python("-W", "ignore", "-c", build, str(directory), cwd=copy)
    assert result.returncode == 0, result.stderr
    return zipfile.ZipFile(directory / result.stdout.splitlines()[-1])


def test_wheel_holds_exactly_the_tree(wheel: zipfile.ZipFile) -> None:
    expected = {
        "/".join((*package.split("."), path.relative_to(folder).as_posix()))
        for package, folder in FOLDERS.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == expected
    assert "sidelane/py.typed" in packed


def test_wheel_owns_one_top_level_name(wheel: zipfile.ZipFile) -> None:
    info = f"sidelane-{sidelane.__version__}.dist-info"
    assert wheel.read(f"{info}/top_level.txt").decode().split() == ["sidelane"]
    assert "sidelane = sidelane.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_every_dependency_that_make_installs_is_pinned() -> None:
    requirements = metadata.requires("sidelane") or []
    wanted = {_name(line) for line in requirements if "nvcomp" not in line}
    lines = [line.split("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pinned = {_name(line) for line in lines if "==" in line}
    assert wanted <= pinned


def _name(requirement: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else " " for c in requirement).split()[0]


def test_every_public_name_resolves_and_is_listed() -> None:
    for name in sidelane.__all__:
        assert getattr(sidelane, name) is not None
    assert set(sidelane.__all__) <= set(dir(sidelane))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        sidelane.nothing  # noqa: B018


def test_modules_do_not_hide_the_functions_of_the_face() -> None:
    import sidelane.pipeline.checkpoint
    import sidelane.pipeline.compress
    import sidelane.pipeline.offload

    for name in ("checkpoint", "compress", "offload", "calibrate"):
        assert callable(getattr(sidelane, name)), name


def test_import_is_lean() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import sidelane; "
        "spent = time.perf_counter() - start; "
        "heavy = {'torch', 'triton', 'cuda', 'av', 'numpy', 'typer'} & set(sys.modules); print(spent, heavy)"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    spent, heavy = result.stdout.split(maxsplit=1)
    assert heavy.strip() == "set()"
    assert float(spent) < 0.3


TRANSFORMERS = (
    "import transformers.activations, kernels; kernels.get_kernel; "
    "from sidelane.kernels import reference; print(kernels.__file__, reference.__file__)"
)


@pytest.mark.parametrize("safe_path", ["", "1"])
def test_transformers_imports_in_the_repository_root(safe_path: str) -> None:
    """transformers imports the Hugging Face package `kernels`; a folder of that name is in the way here."""
    result = python("-c", TRANSFORMERS, PYTHONSAFEPATH=safe_path)
    assert result.returncode == 0, result.stderr
    theirs, ours = map(Path, result.stdout.split()[-2:])
    assert ours == ROOT / "kernels" / "reference.py"
    assert "site-packages" in theirs.parts


def test_folder_is_an_empty_package_without_the_hugging_face_one() -> None:
    """Where nothing else is called `kernels`, importing the folder by that name does no harm."""
    result = python("-S", "-c", "import kernels; print(kernels.__file__)")
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()) == ROOT / "kernels" / "__init__.py"
