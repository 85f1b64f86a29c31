"""The compiled code for the CPU, built with AddressSanitizer and UndefinedBehaviorSanitizer, in a process of its own.

As a program, `sanitized.py CASES SEED THREADS CELLS` runs so many drawn problems through every compiled function: odd
sizes, layouts that aren't contiguous, resets, float32 and float64. CELLS says which libraries of cells they build:
"few" or "all". As a plugin of pytest, `-p sanitized`, it has the tests run on sanitized libraries. `run` starts either.
A fault ends the process with the sanitizer's report.
"""

from __future__ import annotations

import functools
import os
import platform
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# AddressSanitizer doesn't see what AVX-512's masked loads and stores touch, so they are left out.
NARROW = ("-mno-avx512f",) if platform.machine() in ("x86_64", "AMD64") else ()
SANITIZE = (
    "-Og",  # a cell's streams take five times as long to build with -O1
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-g1",
)
RULES = ("rfp", "rfp", "bptt", "eprop")
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
    """Have this process build and load sanitized libraries. Where one can't be, that is an error."""
    from rjepa_triton.backend.native import library

    warnings.filterwarnings("error", message=".*can't be built")

    built = library._built

    def with_sanitizers(found: str, flags: Sequence[str], *rest: Any) -> Any:
        return built(found, (*flags, *NARROW), *rest)  # after -march=native

    library._built = with_sanitizers
    library.FLAGS = (*library.FLAGS, *SANITIZE)
    assert library.library() is not None, "the sanitized library can't be built or loaded"


def pytest_configure() -> None:
    use()


def main(cases: int, seed: int, threads: int, cells: str) -> None:
    """Run drawn problems. threads: torch's. cells: "few" or "all"."""
    import torch

    use()
    torch.set_num_threads(threads)
    draw = random.Random(seed)
    for case in range(cases):
        torch.manual_seed(seed * 1_000_003 + case)
        one(draw, cells)
    print(f"{cases} cases")


def one(draw: random.Random, cells: str) -> None:
    """One problem: a layer over a sequence, a learner, a stream, or an operation on arrays of any layout."""
    problem = draw.choice([layer, layer, learner, learner, stream, stream, arrays])
    problem(draw, *[cells][: problem is not arrays])


SIZES = (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 127, 130)
# Of each cell that "few" names, layers run its loops; streams run those of RNN alone. "all" is every cell for both.
FEW = {"layers": ("RGC", "RNN", "GRU"), "streams": ("RNN",)}


def some_layer(draw: random.Random, cells: str, use: str = "layers", rules: Sequence[str] = RULES) -> object:
    """A layer of a cell, size, shape and dtype by chance."""
    import torch

    from rjepa_triton import CTRNN, ELSTM, GRU, LRU, LSTM, RGC, RNN, TimeDecay

    units, inputs = draw.choice(SIZES), draw.choice(SIZES[:12])
    kinds = {
        "RGC": lambda **o: RGC(
            units, init="uniform", **({"input_size": inputs} if draw.random() < 0.5 else {}), **o
        ),
        "RNN": lambda **o: RNN(
            inputs, units, "tanh" if cells == "few" else draw.choice(["tanh", "relu"]), **o
        ),
        "CTRNN": lambda **o: CTRNN(inputs, units, **o),
        "LSTM": lambda **o: LSTM(inputs, units, bias=draw.random() < 0.8, **o),
        "GRU": lambda **o: GRU(inputs, units, bias=draw.random() < 0.8, **o),
        "ELSTM": lambda **o: ELSTM(inputs, units, **o),
        "LRU": lambda **o: LRU(inputs, units, **o),
        "TimeDecay": lambda **o: TimeDecay(inputs, units, **o),
    }
    kind = draw.choice(FEW[use] if cells == "few" else list(kinds))
    options: dict[str, Any] = {"dtype": draw.choice([torch.float32, torch.float32, torch.float64])}
    if kind not in ("ELSTM", "LRU", "TimeDecay"):
        options["learning"] = draw.choice(rules)
        shape = draw.random()
        if shape < 0.2:
            options["recurrence"] = "diagonal"
        elif shape < 0.4:
            options["heads"] = draw.choice([h for h in (1, 2, 3, 4, 8, units) if units % h == 0])
    return kinds[kind](**options)  # type: ignore[no-untyped-call]


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


def layer(draw: random.Random, cells: str) -> None:
    import torch

    made = some_layer(draw, cells)
    steps, batch = draw.choice([1, 2, 3, 5, 8, 17, 33]), draw.choice([1, 2, 3, 5, 8])
    dtype = next(made.parameters()).dtype  # type: ignore[attr-defined]
    x = laid_out(draw, torch.randn(steps, batch, made.fan_in, dtype=dtype))  # type: ignore[attr-defined]
    x = x.detach().requires_grad_(draw.random() < 0.5)  # type: ignore[attr-defined]
    resets = torch.rand(steps, batch) < 0.2 if draw.random() < 0.5 else None
    output, _ = made(x, None, resets)  # type: ignore[operator]
    (output * torch.randn_like(output)).sum().backward()


def learner(draw: random.Random, cells: str) -> None:
    import torch

    from rjepa_triton import OnlineLearner

    made = some_layer(draw, cells)
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


def stream(draw: random.Random, cells: str) -> None:
    """Streams in parts, by `run` and by `step` and `learn`."""
    import torch
    from torch import nn

    from rjepa_triton import Stream

    made = some_layer(draw, cells, "streams", ("rfp", "rfp", "eprop", "rflo", "snap0"))
    dtype = next(made.parameters()).dtype  # type: ignore[attr-defined]
    batch, outputs = draw.choice([1, 1, 3]), draw.choice([1, 2, 7, 16, 17])
    readout = nn.Linear(made.hidden_size, outputs, bias=draw.random() < 0.8, dtype=dtype)  # type: ignore[attr-defined]
    for parameter in (*made.parameters(), *readout.parameters()):  # type: ignore[attr-defined]
        parameter.requires_grad_(draw.random() < 0.9)
    loss: Any = draw.choice(["mse", "cross_entropy", "huber", "cosine", "delta"])
    optimizer: Any = draw.choice(["sgd", "sgd", "adam", "adamw", "rmsprop"])
    options: dict[str, Any] = {"weight_decay": 0.01} if draw.random() < 0.3 else {}
    if optimizer == "sgd" and draw.random() < 0.5:
        options |= {"momentum": 0.9, "nesterov": draw.random() < 0.5}
    runs = Stream(
        made,  # type: ignore[arg-type]
        readout,
        batch,
        loss=loss,
        optimizer=optimizer,
        optimizer_options=options,
        update_every=draw.choice([1, 1, 2, 5]),
        clip_norm=draw.choice([None, None, 1.0]),
        huber_delta=draw.choice([0.5, 1.0]),
        backend="auto" if type(made).__name__ in ("ELSTM", "LRU") else "compile",
    )

    def target(steps: int) -> torch.Tensor:
        if loss == "cross_entropy":
            return torch.randint(outputs, (steps, batch))
        found = laid_out(draw, torch.randn(steps, batch, outputs, dtype=dtype))
        assert isinstance(found, torch.Tensor)
        return found

    def some(chance: float, *shape: int) -> torch.Tensor | None:
        return torch.rand(shape) < chance if draw.random() < 0.5 else None

    for _ in range(draw.randrange(1, 5)):
        steps = draw.choice([1, 2, 7, 8, 9, 20])  # one batch row runs on panels from 8 on, and half the units
        x = laid_out(draw, torch.randn(steps, batch, made.fan_in, dtype=dtype))  # type: ignore[attr-defined]
        assert isinstance(x, torch.Tensor)
        if draw.random() < 0.7:
            rates = torch.rand(steps) / 100 if draw.random() < 0.3 else None
            runs.run(x, target(steps), some(0.2, steps, batch), some(0.7, steps, batch), rates)
        else:
            for row in x:
                runs.step(row)
                runs.learn(target(1)[0], some(0.7, batch))
        if draw.random() < 0.3:
            runs.reset(some(0.5, batch))


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
    count, first, processors = map(int, sys.argv[1:4])
    main(count, first, processors, sys.argv[4])
