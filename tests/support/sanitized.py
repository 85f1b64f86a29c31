"""The compiled code for the CPU, built with AddressSanitizer and UndefinedBehaviorSanitizer, in a process of its own.

As a program, `sanitized.py CASES SEED THREADS` runs so many drawn problems through every compiled function: odd sizes,
layouts that aren't contiguous, resets, float32 and float64. As a plugin of pytest, `-p sanitized`, it has the tests run
on the sanitized library. `command` says how to start either. A fault ends the process with the sanitizer's report.
"""

from __future__ import annotations

import functools
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# AddressSanitizer doesn't see what AVX-512's masked loads and stores touch, so they are left out.
NARROW = ("-mno-avx512f",) if platform.machine() in ("x86_64", "AMD64") else ()
SANITIZE = (
    "-O1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-g1",
)
REPORTS = ("ERROR: AddressSanitizer", "runtime error:")
HERE = Path(__file__).parent


@functools.cache
def missing() -> str | None:
    """Why the sanitizers can't be used, or None."""
    from rjepa_triton.backend.native import library

    compiler = library.compiler()
    if compiler is None:
        return "no C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cpp"
        source.write_text('extern "C" int f() { return 0; }\n', encoding="utf-8")
        made = subprocess.run(
            [compiler, "-shared", "-fPIC", *SANITIZE, "-o", str(source.with_suffix(".so")), str(source)],
            capture_output=True, text=True,
        )  # fmt: skip
    if made.returncode:
        return f"{compiler} has no sanitizers: {made.stderr.strip()[-200:]}"
    absent = [name for name, path in preloads(compiler).items() if not path.is_file()]
    return f"{compiler} has no {', '.join(absent)}" if absent else None


def preloads(compiler: str) -> dict[str, Path]:
    """The libraries that must be loaded before python: the sanitizer's, and that of C++, whose functions it takes over."""
    return {
        name: Path(
            subprocess.run(
                [compiler, f"-print-file-name={name}"], capture_output=True, text=True
            ).stdout.strip()
        ).resolve()
        for name in ("libasan.so", "libstdc++.so.6")
    }


def environment(cache: Path) -> dict[str, str]:
    """Of a process that loads a sanitized library. cache: where that is kept. Python's own leaks are not looked for."""
    from rjepa_triton.backend.native import library

    compiler = library.compiler()
    assert compiler is not None
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(map(str, preloads(compiler).values())),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1:exitcode=99",
        "XDG_CACHE_HOME": str(cache),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
    }


def use() -> None:
    """Have this process build and load the sanitized library."""
    from rjepa_triton.backend.native import library

    built = library._built

    def with_sanitizers(found: str, flags: Sequence[str], *rest: Any) -> Any:
        return built(found, (*flags, *NARROW), *rest)  # after -march=native

    library._built = with_sanitizers
    library.FLAGS = (*library.FLAGS, *SANITIZE)
    assert library.library() is not None, "the sanitized library can't be built or loaded"


def pytest_configure() -> None:
    use()


def main(cases: int, seed: int, threads: int) -> None:
    """Run drawn problems. threads: torch's."""
    import torch

    use()
    torch.set_num_threads(threads)
    draw = random.Random(seed)
    for case in range(cases):
        torch.manual_seed(seed * 1_000_003 + case)
        one(draw)
    print(f"{cases} cases")


def one(draw: random.Random) -> None:
    """One problem: a layer over a sequence, a learner, or an operation on arrays of any layout."""
    draw.choice([layer, layer, learner, learner, arrays])(draw)


SIZES = (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 127, 130)


def some_layer(draw: random.Random) -> object:
    import torch

    from rjepa_triton import CTRNN, ELSTM, GRU, LRU, LSTM, RGC, RNN, TimeDecay

    units, inputs = draw.choice(SIZES), draw.choice(SIZES[:12])
    dtype = draw.choice([torch.float32, torch.float32, torch.float64])
    kinds = [
        lambda **o: RGC(units, init="uniform", **o),
        lambda **o: RGC(units, init="uniform", input_size=inputs, **o),
        lambda **o: RNN(inputs, units, draw.choice(["tanh", "relu"]), **o),
        lambda **o: CTRNN(inputs, units, **o),
        lambda **o: LSTM(inputs, units, bias=draw.random() < 0.8, **o),
        lambda **o: GRU(inputs, units, bias=draw.random() < 0.8, **o),
    ]
    alone = [
        lambda **o: ELSTM(inputs, units, **o),
        lambda **o: LRU(inputs, units, **o),
        lambda **o: TimeDecay(inputs, units, **o),
    ]
    if draw.random() < 0.2:
        return draw.choice(alone)(dtype=dtype)
    options = {"dtype": dtype, "learning": draw.choice(["rfp", "rfp", "bptt", "eprop"])}
    shape = draw.random()
    if shape < 0.2:
        options["recurrence"] = "diagonal"
    elif shape < 0.4:
        options["heads"] = draw.choice([h for h in (1, 2, 3, 4, 8) if units % h == 0])
    return draw.choice(kinds)(**options)


def laid_out(draw: random.Random, array: object) -> object:
    """The same numbers in another layout."""
    import torch

    assert isinstance(array, torch.Tensor)
    kind = draw.randrange(5)
    if kind == 1 and array.dim() > 1:
        return array.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 2:
        return torch.stack([array, array], -1)[..., 0]
    if kind == 3 and array.dim() > 2:
        return array.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == 4:  # at an odd place of a larger memory, to its very end
        memory = array.new_zeros(array.numel() + 3)
        memory[3:] = array.reshape(-1)
        return memory[3:].view(array.shape)
    return array


def layer(draw: random.Random) -> None:
    import torch

    made = some_layer(draw)
    steps, batch = draw.choice([1, 2, 3, 5, 8, 17, 33]), draw.choice([1, 2, 3, 5, 8])
    dtype = next(made.parameters()).dtype  # type: ignore[attr-defined]
    x = laid_out(draw, torch.randn(steps, batch, made.fan_in, dtype=dtype))  # type: ignore[attr-defined]
    x = x.detach().requires_grad_(draw.random() < 0.5)  # type: ignore[attr-defined]
    resets = torch.rand(steps, batch) < 0.2 if draw.random() < 0.5 else None
    output, _ = made(x, None, resets)  # type: ignore[operator]
    (output * torch.randn_like(output)).sum().backward()


def learner(draw: random.Random) -> None:
    import torch

    from rjepa_triton import OnlineLearner

    made = some_layer(draw)
    made.learning = "rfp"  # type: ignore[attr-defined]
    batch, form = draw.choice([1, 2, 3, 5]), draw.choice(["step", "lazy", "chunk", "history"])
    options = {
        "form": form,
        "backend": "compile",
        "update_every": draw.choice([2, 3, 9]) if form == "chunk" else 1,
    }
    if form == "lazy":
        options["rewrite_every"] = draw.choice([1, 2, 5])
    if form == "step" and draw.random() < 0.5:
        options["lr"] = 0.01
    if form == "chunk" and draw.random() < 0.4:
        options["credit"] = "carry"
    if form == "step" and "lr" not in options and draw.random() < 0.3 and made.hidden_size < 20:  # type: ignore[attr-defined]
        options = {"learning": draw.choice(["rtrl", "uoro"])}
    dtype = next(made.parameters()).dtype  # type: ignore[attr-defined]
    runs = OnlineLearner(made, batch, **options)  # type: ignore[arg-type]
    for _ in range(draw.randrange(1, 5)):
        steps = draw.choice([1, 2, 3, 9, 20])
        x = laid_out(draw, torch.randn(steps, batch, made.fan_in, dtype=dtype))  # type: ignore[attr-defined]
        resets = torch.rand(steps, batch) < 0.2 if draw.random() < 0.5 else None
        if draw.random() < 0.5:
            runs.chunk(x, resets).sum().backward()  # type: ignore[arg-type]
        else:
            for row in x:  # type: ignore[attr-defined]
                output = runs.step(row)
                if draw.random() < 0.7:
                    output.sum().backward()
        if draw.random() < 0.3:
            runs.reset(torch.rand(batch) < 0.5)


def arrays(draw: random.Random) -> None:
    """The operations of Γ and the scan on arrays as they come."""
    import torch

    from rjepa_triton.backend import operations

    states, batch, units = draw.choice([1, 2]), draw.choice([1, 2, 3, 5]), draw.choice(SIZES)
    fan_in, count, steps = (
        draw.choice([units, 1, 3, 17, 64]),
        draw.choice([1, 2, 3]),
        draw.choice([1, 2, 9, 65]),
    )
    dtype = draw.choice([torch.float32, torch.float64])

    def some(*shape: int) -> torch.Tensor:
        made = laid_out(draw, torch.randn(*shape, dtype=dtype))
        assert isinstance(made, torch.Tensor)
        return made

    gammas = [torch.randn(batch, count, units, fan_in, dtype=dtype) for _ in range(states)]
    credit = some(states, batch, units)
    operations.gamma_read(gammas, credit, backend="compile")
    m, phi = some(states, states, steps, batch, units), some(states, steps, batch, count, units)
    operations.gamma_chunk_(
        gammas,
        m,
        phi,
        some(steps, batch, count, fan_in),
        credit if draw.random() < 0.5 else None,
        backend="compile",
    )
    if dtype == torch.float32:
        carry = some(states, batch, units) if draw.random() < 0.5 else None
        operations.reverse_scan(m, some(states, steps, batch, units), carry, backend="compile")


def run(arguments: list[str], cache: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run python with arguments on the sanitized library."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment(cache),
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=seconds,
        cwd=HERE.parents[1],
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
