"""The order of the wings: a file imports from its own wing and from those below it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkout import ROOT

# From the ground up. A name that ends with a dot is a folder's; kernels import torch and triton alone.
WINGS = (
    (
        "_checks",
        "_device",
        "_autograd",
        "_files",
        "_processes",
        "_command",
        "_moved",
        "_interrupt",
        "kernels.",
    ),
    ("cells.",),
    ("rules.",),
    ("backend.",),
    ("planning.",),
    ("layers.", "compat"),
    ("online.",),
    ("bench.harness.",),
    ("bench.scaling.",),
    ("bench.kernels.", "bench.learning.", "bench.streams.", "bench.peers."),
    ("bench.planner.",),
    ("bench.report.",),
    ("bench.cli",),
)
# Beside the benchmarks: R-JEPA takes of them what they share.
RJEPA_MAY = ("rjepa.", "bench.harness.")


def files() -> dict[str, Path]:
    """The package's modules by their names below `rjepa_triton`; a package's own is its folder's, with a dot."""
    found = {}
    for top, prefix in (("rjepa_triton", ()), ("kernels", ("kernels",)), ("bench", ("bench",))):
        for path in (ROOT / top).rglob("*.py"):
            parts = (*prefix, *path.relative_to(ROOT / top).with_suffix("").parts)
            found[".".join(parts).removesuffix("__init__")] = path
    return found


FILES = files()


def imported(name: str, path: Path) -> Iterator[str]:
    """What a file imports of the package, by the names of `files`."""
    package = name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package[: len(package) - (node.level - 1)] + (node.module or "").split(".") * bool(node.module)
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            yield (
                whole
                if whole in FILES
                else next(
                    known
                    for known in (".".join(base), ".".join(base) + ".")
                    if known in FILES or known == "."
                )
            )


def floor(name: str) -> int:
    """Which of `WINGS` a module is in, or -1."""
    for at, wings in enumerate(WINGS):
        if any(name.startswith(wing) if wing.endswith(".") else name == wing for wing in wings):
            return at
    return -1


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_file_imports_from_a_wing_above(name: str) -> None:
    if name in ("", "cli", "__main__"):  # what joins the wings
        return
    rjepa = name.startswith("rjepa.")
    here = floor("online." if rjepa else name)
    assert here >= 0, f"{name} is in no wing: give it one in WINGS"
    for other in imported(name, FILES[name]):
        allowed = rjepa and other.startswith(RJEPA_MAY)
        assert allowed or 0 <= floor(other) <= here, f"{name} imports {other}, which is above it"


def test_no_wing_imports_from_another_on_its_floor() -> None:
    for name, path in FILES.items():
        if floor(name) == floor("bench.peers."):
            wing = ".".join(name.split(".")[:2]) + "."
            for other in imported(name, path):
                assert other.startswith(wing) or floor(other) < floor(name), f"{name} imports {other}"


def test_nothing_looks_for_none_among_tensors() -> None:
    """`None in tensors` compares each with None, which takes a tensor's exception; `is None` doesn't."""
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn):
                sought = node.left.value if isinstance(node.left, ast.Constant) else ...
                assert sought is not None, f"{name}, line {node.lineno}"


def test_torch_compile_may_look_into_every_file() -> None:
    """It skips files by parts of their paths, such as Triton's `triton/backends`, and ours lie below `rjepa_triton`."""
    from torch._dynamo.trace_rules import SKIP_DIRS

    for path in FILES.values():
        inside = "rjepa_triton/" + path.relative_to(ROOT).as_posix().removeprefix("rjepa_triton/")
        assert not any(part.strip("/") in inside for part in SKIP_DIRS if "/" in part), inside
