"""A reset forgets: what came before it, NaN and infinities included, has no part in anything after it.

Each test runs twice: on numbers, and with the past of batch row 0 poisoned. What comes after the reset must be equal in
every bit.
"""

import math

import kernels_here
import pytest
import torch

from rjepa_triton import CTRNN, ELSTM, GRU, LRU, LSTM, RGC, RNN, OnlineLearner, TwoPointRNN
from rjepa_triton.backend import native_backend, operations
from rjepa_triton.cells.two_point import Linearization, Matrix, Partials
from rjepa_triton.layers import functional
from rjepa_triton.layers.conv import ConvRGC
from rjepa_triton.rules import rfp

STEPS, BATCH, INPUTS, UNITS, RESET = 8, 3, 4, 6, 4

LAYERS = {
    "LSTM": lambda dtype: LSTM(INPUTS, UNITS, dtype=dtype),
    "GRU heads": lambda dtype: GRU(INPUTS, UNITS, heads=2, dtype=dtype),
    "RGC": lambda dtype: RGC(UNITS, input_size=INPUTS, init="uniform", dtype=dtype),
    "RNN relu": lambda dtype: RNN(INPUTS, UNITS, "relu", dtype=dtype),
    "CTRNN": lambda dtype: CTRNN(INPUTS, UNITS, recurrence="diagonal", dtype=dtype),
    "LRU": lambda dtype: LRU(INPUTS, UNITS, dtype=dtype),
    "ELSTM": lambda dtype: ELSTM(INPUTS, UNITS, dtype=dtype),
}


def made(name: str, dtype: torch.dtype = torch.float32) -> TwoPointRNN:
    torch.manual_seed(0)
    return LAYERS[name](dtype)


def problem(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(STEPS, BATCH, k, dtype=dtype, generator=generator) for k in (INPUTS, UNITS))
    return x, weight


def grads(layer: torch.nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in layer.parameters() if p.grad is not None]


def assert_same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted) > 0
    for a, b in zip(found, wanted, strict=True):
        assert torch.isfinite(b).all()
        assert torch.equal(a, b)


FORMS = [
    {"form": "step"},
    {"form": "lazy", "rewrite_every": 3},
    {"form": "chunk", "update_every": 2},
    {"form": "chunk", "update_every": 2, "credit": "carry"},
    {"form": "chunk", "update_every": 2, "refine": 1},
    {"form": "history"},
    {"form": "step", "lag": 1},
    {"form": "lazy", "rewrite_every": 3, "lag": 1},
    {"form": "chunk", "update_every": 2, "lag": 1},
    {"form": "history", "lag": 1},
    {"form": "step", "gamma_dtype": torch.bfloat16},
    {"learning": "rtrl"},
    {"learning": "rtrl", "lag": 1},
    {"learning": "uoro"},
    {"learning": "uoro", "lag": 1},
    {"learning": "tbptt", "update_every": 2},
    {"learning": "eprop"},
    {"learning": "rflo", "form": "lazy", "rewrite_every": 3},
    {"learning": "snap0"},
]


def online(layer: TwoPointRNN, options: dict, how: str, poison: float | None) -> list[torch.Tensor]:
    """Outputs of the steps after the reset, the gradients of their losses, and the state at the end."""
    x, weight = problem()
    if poison is not None:
        x[RESET - 2, 0] = poison
    learner = OnlineLearner(layer, BATCH, **options)
    with torch.no_grad():
        for t in range(RESET):
            learner.step(x[t])
    rows = torch.tensor([True, False, False])
    kept = []
    every = learner.update_every
    if how == "reset(mask)":
        learner.reset(rows)
    for start in range(RESET, STEPS, every):
        part = slice(start, start + every)
        if how == "chunk(x, resets)":
            resets = torch.zeros(every, BATCH, dtype=torch.bool)
            resets[0] = rows if start == RESET else False
            output = learner.chunk(x[part], resets)
        else:
            output = torch.stack([learner.step(now) for now in x[part]])
        (output * weight[part]).sum().backward()
        kept.append(output.detach())
    return [*kept, *grads(layer), *learner.state]


@pytest.mark.parametrize("how", ["reset(mask)", "chunk(x, resets)"])
@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("name", ["LSTM", "GRU heads"])
def test_a_learners_reset_forgets_nan(name: str, options: dict, how: str) -> None:
    assert_same(online(made(name), options, how, math.nan), online(made(name), options, how, None))


@pytest.mark.parametrize("options", FORMS, ids=str)
def test_a_learners_reset_forgets_infinities(options: dict) -> None:
    found, wanted = (
        online(made("RNN relu"), options, "chunk(x, resets)", poison) for poison in (math.inf, None)
    )
    assert_same(found, wanted)


@pytest.mark.parametrize("backend", ["torch", "compile"])
@pytest.mark.parametrize(
    "options", [o for o in FORMS if "gamma_dtype" not in o and "learning" not in o], ids=str
)
def test_every_backend_forgets(backend: str, options: dict) -> None:
    if backend == "compile" and native_backend.cpp_compiler() is None:
        pytest.skip("no C++ compiler")
    options = {**options, "backend": backend}
    for name in ("LSTM", "RNN relu"):
        found, wanted = (
            online(made(name), options, "chunk(x, resets)", poison) for poison in (math.nan, None)
        )
        assert_same(found, wanted)


def test_a_reset_inside_a_chunk_forgets_the_chunks_own_steps() -> None:
    """Steps of the chunk before the reset are NaN, and no loss reaches them."""
    for name in ("LSTM", "RGC", "GRU heads"):
        for options in ({"form": "chunk", "update_every": STEPS}, {"form": "history"}, {"form": "lazy"}):
            found = []
            for poison in (math.nan, None):
                layer, (x, weight) = made(name), problem()
                resets = torch.zeros(STEPS, BATCH, dtype=torch.bool)
                resets[RESET, 0] = True
                x.requires_grad_()
                given = x.clone()
                if poison is not None:
                    given[1, 0] = poison
                learner = OnlineLearner(layer, BATCH, **options)
                output = learner.chunk(given, resets)
                weight[:RESET, 0] = 0
                (torch.where(weight == 0, 0, output) * weight).sum().backward()
                again = learner.chunk(x.detach()[:1])
                again.sum().backward()
                found.append([output[RESET:].detach(), output[:, 1:].detach(), again.detach(), *grads(layer)])
            assert_same(*found)


SEQUENCES = [
    *({"learning": rule} for rule in functional.LEARNING),
    {"refine": 1},
    {"refine": "exact"},
    {"recompute": True},
    {"forward": "parallel"},
]


def sequence(layer: TwoPointRNN, poison: float | None, where: str) -> list[torch.Tensor]:
    """Outputs and gradients of losses from the reset on; of the other rows, all. The past of row 0 is poisoned."""
    dtype = next(layer.parameters()).dtype
    x, weight = problem(dtype)
    x.requires_grad_()
    count = len(layer.cell.states)
    state = [torch.ones(BATCH, UNITS, dtype=dtype).requires_grad_() for _ in range(count)]
    start, given = [each.clone() for each in state], x.clone()
    resets = torch.zeros(STEPS, BATCH, dtype=torch.bool)
    resets[0, 1] = resets[RESET, 0] = resets[5, 2] = True
    if where == "state before the first step":
        resets[0, 0] = True
    else:
        weight[:RESET, 0] = 0
    if poison is not None:
        for target in start if where.startswith("state") else [given[1]]:
            target[0] = poison
    output, last = layer(given, tuple(start) if count > 1 else start[0], resets)
    (torch.where(weight == 0, 0, output) * weight).sum().backward()
    last = last if isinstance(last, tuple) else (last,)
    from_x = x.grad[1:] if where == "state" else x.grad
    after = [output[RESET:], output[:RESET, 1:], *last, from_x, *(s.grad for s in state)]
    return [*(a.detach() for a in after), *grads(layer)]


@pytest.mark.filterwarnings("ignore:.*sequential:UserWarning")
@pytest.mark.parametrize("where", ["state before the first step", "state", "input"])
@pytest.mark.parametrize("options", SEQUENCES, ids=str)
@pytest.mark.parametrize("name", ["LSTM", "GRU heads", "RGC"])
def test_a_layers_reset_forgets(name: str, options: dict, where: str) -> None:
    if options.get("forward") == "parallel" and where != "state before the first step":
        pytest.skip("a NaN that is read has the sequential loop run instead, whose last bits are others")
    dtype = torch.float32 if name == "LSTM" else torch.float64
    found = []
    for poison in (math.nan, None):
        layer = made(name, dtype)
        layer.learning, layer.refine = options.get("learning", "rfp"), options.get("refine", 0)
        layer.recompute = options.get("recompute", False)
        layer.forward_mode = options.get("forward", "auto")
        found.append(sequence(layer, poison, where))
    assert_same(*found)


@pytest.mark.parametrize("learning", ["rfp", "bptt"])
def test_a_maps_reset_forgets(learning: str) -> None:
    found = []
    for poison in (math.nan, None):
        torch.manual_seed(0)
        layer = ConvRGC(2, learning=learning)
        for weight in layer.weights():
            torch.nn.init.normal_(weight, std=0.1)
        x = torch.randn(STEPS, 2, 2, 3, 3).requires_grad_()
        start = [torch.ones(2, 2, 3, 3) for _ in range(2)]
        resets = torch.zeros(STEPS, 2, dtype=torch.bool)
        resets[0] = True
        if poison is not None:
            start[0][0] = poison
        output, _ = layer(x, tuple(start), resets)
        output.square().sum().backward()
        found.append([output.detach(), x.grad, *grads(layer)])
    assert_same(*found)


def running(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the test where that backend doesn't run, and have Triton scan blocks of three steps side by side."""
    if backend == "compile" and native_backend.cpp_compiler() is None:
        pytest.skip("no C++ compiler")
    if backend == "triton":
        kernels_here.go()
        from rjepa_triton.kernels import cell_partials, reverse_scan

        blocks = reverse_scan.ScanConfig(128, 1, 3)
        monkeypatch.setattr(reverse_scan, "pick_scan_config", lambda *_: blocks)
        monkeypatch.setattr(cell_partials, "pick_dual_config", lambda *_: blocks)


# refinement tells that it diverges, and gives BPTT's credit then
CREDITS = [*({"learning": rule} for rule in (*rfp.RULES, "bptt", "rtrl")), {"recompute": True}]


@pytest.mark.parametrize("backend", ["torch", "compile", "triton"])
@pytest.mark.parametrize("options", CREDITS, ids=str)
@pytest.mark.parametrize("name", ["LSTM", "RGC"])
def test_no_credit_passes_back_over_a_reset(
    name: str, options: dict, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The episode after the reset is NaN, and has a loss; the input's gradient before it stays as it is."""
    running(backend, monkeypatch)
    found = []
    for poison in (math.nan, None):
        cell = made(name).cell
        generator = torch.Generator().manual_seed(2)
        count = (len(cell.per_unit), len(cell.matrices), len(cell.states))
        x = torch.randn(count[0], STEPS, BATCH, UNITS, generator=generator).requires_grad_()
        weights = [torch.randn(UNITS, UNITS, generator=generator) / 4 for _ in range(count[1])]
        state = [torch.zeros(BATCH, UNITS) for _ in range(count[2])]
        given = x.clone()
        if poison is not None:
            given[:, RESET + 1, 0] = poison
        resets = torch.zeros(STEPS, BATCH, dtype=torch.bool)
        resets[RESET, 0] = True
        states = functional.two_point(
            cell,
            given,
            [w.requires_grad_() for w in weights],
            state,
            resets=resets,
            backend=backend,
            **options,
        )
        sum((s * (nu + 1)).sum() for nu, s in enumerate(states)).backward()
        found.append([x.grad[:, :RESET], x.grad[:, :, 1:]])
    assert_same(*found)


def test_steps_that_no_loss_reaches() -> None:
    """Against a loop backward in time over random resets, losses and carries."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int, part: float) -> torch.Tensor:
        return torch.rand(*shape, generator=generator) < part

    for case in range(200):
        steps, batch = 1 + case % 6, 2
        resets = some(steps, batch, part=0.3)
        delta, carry = some(2, steps, batch, 3, part=0.06).float(), some(2, batch, 3, part=0.1).float()
        given = carry if case % 2 else None
        wanted = torch.empty_like(resets)
        for b in range(batch):
            live = given is not None and bool(given[:, b].any())
            for t in reversed(range(steps)):
                live = live or bool(delta[:, t, b].any())
                wanted[t, b] = not live
                live = live and not resets[t, b]
        assert torch.equal(rfp.without_credit(resets, delta, given), wanted)
        later = torch.stack([resets[t + 1 :].any(0) for t in range(steps)])
        assert torch.equal(rfp.before_a_reset(resets), later)


def forgetful(states: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Γ (B, K, N, M) of each state with NaN in row 1 and infinities in row 2, the same with zeros there, and M (S, S, B,
    N), zero in these rows."""
    torch.manual_seed(0)
    clean = [torch.randn(4, 2, 5, 3).to(dtype) for _ in range(states)]
    m = torch.randn(states, states, 4, 5)
    m[:, :, 1:3] = 0
    poisoned = [gamma.clone() for gamma in clean]
    for gamma, other in zip(clean, poisoned, strict=True):
        gamma[1:3] = 0
        other[1], other[2] = math.nan, -math.inf
    return poisoned, clean, m


def one_step(states: int) -> tuple[list[Matrix], Linearization, torch.Tensor]:
    """Two matrices that read the layer's input, one step that resets rows 1 and 2, and that input (1, B, M)."""
    torch.manual_seed(3)  # no generator, which would have a device of its own
    matrices = [Matrix(str(k), ("input", k), "input") for k in range(2)]
    arrays = torch.randn(2, states, 1, 4, 5)
    partials = Partials((), (), [dict(enumerate(by_state)) for by_state in arrays])
    resets = torch.tensor([[False, True, True, False]])
    before = torch.zeros(states, 1, 4, 5)
    return matrices, Linearization(partials, before, resets), torch.randn(1, 4, 3)


@pytest.mark.parametrize("backend", ["torch", "compile", "triton"])
@pytest.mark.parametrize("states", [1, 2])
def test_gammas_operations_forget(states: int, backend: str) -> None:
    if backend == "compile" and native_backend.cpp_compiler() is None:
        pytest.skip("no C++ compiler")
    if backend == "triton":
        kernels_here.go()
    results = []
    for which in (0, 1):
        gammas, m = forgetful(states, torch.float32)[which], forgetful(states, torch.float32)[2]
        phi, y, credit = torch.randn(states, 6, 4, 2, 5), torch.randn(6, 4, 2, 3), m[0].clone()
        inside = torch.randn(states, states, 6, 4, 5)
        inside[:, :, 2, 1:3] = 0  # so that the product of all is zero as well
        read = operations.gamma_read(gammas, credit, backend=backend)
        stepped = operations.gamma_steps_(
            gammas, *one_step(states), m[:, :, None], credit[:, None], backend=backend
        )
        after = [gamma.clone() for gamma in gammas]
        gammas = forgetful(states, torch.float32)[which]
        chunk = operations.gamma_chunk_(gammas, inside, phi, y, credit, backend=backend)
        results.append([read, stepped, *after, chunk, *gammas])
    assert_same(*results)


@pytest.mark.parametrize("backend", ["torch", "compile", "triton"])
def test_a_bfloat16_gamma_forgets(backend: str) -> None:
    if backend == "triton":
        kernels_here.go()
    if backend == "compile":
        pytest.skip("compiled code takes Γ in the layer's own dtype")
    results = []
    for which in (0, 1):
        found = forgetful(2, torch.bfloat16)
        gammas, m = found[which], found[2]
        operations.gamma_steps_(gammas, *one_step(2), m[:, :, None], backend=backend)
        results.append(gammas)
    assert_same(*results)


@pytest.mark.parametrize("backend", ["torch", "compile", "triton"])
@pytest.mark.parametrize("states", [1, 2, 3])
def test_a_reverse_scan_lets_nothing_pass_a_reset(
    states: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    running(backend, monkeypatch)
    for start, nan in ((3, 4), (3, 3), (0, 0), (7, 7), (5, 7)):
        found = []
        for poison in (math.nan, None):
            torch.manual_seed(0)
            m, delta = torch.randn(states, states, 8, 3, 5), torch.randn(states, 8, 3, 5)
            carry, resets = torch.randn(states, 3, 5), torch.zeros(8, 3, dtype=torch.bool)
            m[:, :, start, 1] = 0
            resets[start, 1] = True
            if poison is not None:
                delta[:, nan, 1] = poison
                m[:, :, nan, 1] = m[:, :, nan, 1].masked_fill(m[:, :, nan, 1] != 0, poison)
            credit, first = operations.reverse_scan(m, delta, carry, resets, backend=backend)
            found.append([credit[:, :start], credit[:, :, 0], first])
        assert_same(*found)
