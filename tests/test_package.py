"""How the package is laid out and imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from checkout import ROOT

import rjepa_triton

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest itself needs it there
    import tomli as tomllib


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_packages_are_the_folders_on_disk() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    on_disk = {"rjepa_triton", "rjepa_triton.kernels", "rjepa_triton.bench"}
    for top, name in (("rjepa_triton", ""), ("kernels", "rjepa_triton."), ("bench", "rjepa_triton.")):
        for folder in (ROOT / top).rglob("*"):
            if folder.is_dir() and any(folder.glob("*.py")):
                on_disk.add(name + ".".join(folder.relative_to(ROOT).parts))
    assert set(declared) == on_disk


def test_what_is_built_has_every_file_that_the_package_reads(tmp_path: Path) -> None:
    """Templates, C++ and tables as well as Python; records and pages stay in the checkout."""
    setup = "import setuptools; setuptools.setup()"
    words = ["egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path / "lib"]
    subprocess.run([sys.executable, "-c", setup, *words], cwd=ROOT, check=True, capture_output=True)
    built = {file.relative_to(tmp_path / "lib") for file in (tmp_path / "lib").rglob("*") if file.is_file()}
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "rjepa_triton", "kernels", "bench"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    inside = {
        Path("rjepa_triton", *Path(name).parts[name.startswith("rjepa_triton/") :])
        for name in tracked.stdout.decode().split()
    }
    records = Path("rjepa_triton/bench/results")
    assert built == {file for file in inside if records not in file.parents}


def test_importing_layers_pulls_in_no_triton_plotting_or_command_line() -> None:
    loaded = python(
        "import sys, rjepa_triton; print([m for m in ('triton', 'matplotlib', 'typer', 'rich', 'scipy', 'jinja2') if m in sys.modules])"
    )
    assert loaded.strip() == "[]"


def test_it_works_with_no_triton_installed() -> None:
    python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, rjepa_triton\n"
        "layer = rjepa_triton.RGC(4)\n"
        "rjepa_triton.OnlineLearner(layer, 2).step(torch.ones(2, 4)).sum().backward()\n"
        "layer(torch.ones(3, 2, 4))[0].sum().backward()"
    )


def test_bench_and_kernels_are_found_in_a_checkout() -> None:
    python("import rjepa_triton.bench.record")


def test_what_is_exported() -> None:
    assert all(hasattr(rjepa_triton, name) for name in rjepa_triton.__all__)
    assert set(rjepa_triton.nn.__all__) <= set(rjepa_triton.__all__)
    assert (Path(rjepa_triton.__file__).parent / "py.typed").exists()
