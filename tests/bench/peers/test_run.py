"""Peers: what they are asked, their references, the workers' protocol with fake ones, the command; real ones, tiny."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from typer.testing import CliRunner

from rjepa_triton import nn
from rjepa_triton.bench.cli import bench
from rjepa_triton.bench.harness import record
from rjepa_triton.bench.harness.tables import markdown, place
from rjepa_triton.bench.harness.worker import held_to
from rjepa_triton.bench.peers import plot, registry, run, streams, tasks
from rjepa_triton.bench.peers.registry import PEERS, Peer
from rjepa_triton.bench.peers.run import Point, Settings, Worker
from rjepa_triton.bench.peers.tasks import TASKS
from rjepa_triton.bench.scaling import cases

UNITS, STEPS = 4, 3


def arrays(task: str, units: int = UNITS, batch: int = 2, steps: int = STEPS) -> dict[str, np.ndarray]:
    return tasks.problem(task, units, batch, steps, kind="noise", scale=0.5, seed=0)


# --- what is asked, and the references ---------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
def test_rgc_s_references_are_the_scaling_benchmark_s(exact: bool) -> None:
    given = arrays("rgc-sequence")
    s, m = (torch.from_numpy(given[name]) for name in tasks.STATE)
    weights = [torch.from_numpy(given[name]) for name in tasks.NETWORKS["rgc"].parameters]
    problem = cases.Problem(
        torch.from_numpy(given["x"]), torch.from_numpy(given["delta"]), (s, m), weights, 1, "auto"
    )
    got = tasks.oracle("rgc-sequence", given, "bptt" if exact else "rfp")
    for name, want in zip(got, cases.oracle(problem, exact), strict=True):
        np.testing.assert_allclose(got[name], want.numpy(), rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("network", ["lstm", "gru"])
def test_exact_references_are_torch_nn_s(network: str) -> None:
    task = f"{network}-sequence"
    given = arrays(task)
    layer = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[network](UNITS, UNITS).double()
    names = tasks.NETWORKS[network].parameters
    layer.load_state_dict({f"{name}_l0": torch.from_numpy(given[name]) for name in names})
    weights = [layer.get_parameter(f"{name}_l0") for name in names]
    out = layer(torch.from_numpy(given["x"]).double())[0]
    found = torch.autograd.grad(out, weights, torch.from_numpy(given["delta"]).double())
    want = {name: g.numpy() for name, g in zip(names, found, strict=True)}
    assert tasks.difference(tasks.oracle(task, given, "bptt"), want)[0] < 1e-12


@pytest.mark.parametrize("rule", ["rfp", "eprop"])
def test_an_rgc_s_inexact_references_are_the_layer_s_rules(rule: str) -> None:
    given = arrays("rgc-online")
    layer = nn.RGC(UNITS, learning=rule).double()
    names = tasks.NETWORKS["rgc"].parameters
    layer.load_state_dict({name: torch.from_numpy(given[name]) for name in names})
    out = layer(torch.from_numpy(given["x"]).double())[0]
    out.backward(torch.from_numpy(given["delta"]).double())
    want = {}
    for name in names:
        gradient = layer.get_parameter(name).grad
        assert gradient is not None
        want[name] = gradient.numpy()
    got = tasks.oracle("rgc-online", given, rule)
    assert tasks.difference(got, want)[0] < 1e-12
    nothing = not got["weight_mm"].any() and not got["weight_sm"].any()
    assert nothing == (rule == "eprop")  # m reaches s through matrices alone


def test_the_rules_differ_where_they_are_told_apart() -> None:
    for task in (name for name, task in TASKS.items() if not task.learns):
        exact, rfp, eprop = (tasks.oracle(task, arrays(task), rule) for rule in ("bptt", "rfp", "eprop"))
        of_diagonal = tasks.NETWORKS[TASKS[task].network].diagonal
        for a, b in ((exact, rfp), (rfp, eprop), (exact, eprop)):
            if a is exact and b is rfp and of_diagonal:
                assert tasks.difference(a, b)[0] < 1e-12, task
            else:
                assert tasks.difference(a, b)[0] > 0.01, task


def test_difference_tells_the_worst_and_what_is_missing() -> None:
    want = {"a": np.array([3.0, 4.0]), "zero": np.zeros(2)}
    assert tasks.difference({"a": np.array([3.0, 4.5]), "zero": np.zeros(2)}, want) == (
        pytest.approx(0.1),
        "a",
    )
    assert tasks.difference({"a": want["a"], "zero": np.ones(2)}, want) == (pytest.approx(2**0.5 / 5), "zero")
    for value in (np.nan, np.inf):
        got = tasks.difference({"a": np.full(2, value), "zero": np.zeros(2)}, want)
        assert got == (np.inf, "a")
    with pytest.raises(ValueError, match="gradients must be of a, zero, got a"):
        tasks.difference({"a": want["a"]}, want)
    with pytest.raises(ValueError, match=r"gradient of a must have shape \(2,\), got \(3,\)"):
        tasks.difference({"a": np.ones(3), "zero": np.zeros(2)}, want)


# --- the protocol, with fake workers -----------------------------------------------------------------------

FAKE = """
import json, os, subprocess, sys, time
import numpy as np

job = json.loads(sys.stdin.readline())
kind, folder = job["runner"], os.environ["FAKE_FOLDER"]

def say(reply):
    print(json.dumps(reply), flush=True)

if kind == "Dying":
    print("Traceback, then", file=sys.stderr)
    print("OSError: out of luck", file=sys.stderr)
    sys.exit(3)
if kind == "Hanging":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print(child.pid, file=sys.stderr, flush=True)
    time.sleep(60)
if kind == "Garbage":
    print("Hello!", flush=True)
if kind == "Raising":
    say({"error": "TypeError: no such thing", "oom": False})
if kind == "Large":
    say({"error": "RuntimeError: out of memory", "oom": True})
found = dict(np.load(os.path.join(folder, "answers.npz")))
if kind == "Wrong":
    found["weight_ss"] = 2 * found["weight_ss"]
np.savez(job["gradients"], **found)
say({"first_seconds": 0.5, "covers": job["threads"] and 3, "note": "fake", "torch_threads": 1, "cpus": [0]})
turn = 0
for line in sys.stdin:
    asked = json.loads(line)
    if "warm" in asked:
        say({"calls": 7})
        continue
    assert asked["calls"] == 7
    turn += 1
    if kind == "Late" and turn == 2:
        sys.exit(1)
    with open(os.path.join(folder, "turns"), "a") as file:
        file.write(kind + " ")
    say({"seconds": turn * {"Slow": 3e-3}.get(kind, 1e-3)})
"""
TINY = Settings(
    ("rgc-sequence",), hidden=(UNITS,), batches=(2,), steps=STEPS, input="noise", rounds=4, limit=20
)
Measure = Callable[..., dict[str, dict[str, object]]]


def fake(runner: str, gradient: str = "rfp", **options: object) -> Peer:
    return Peer("fake", runner, {"rgc-sequence": gradient}, ("numpy",), **options)  # type: ignore[arg-type]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A worker's command whose peers behave as their names say."""
    monkeypatch.setenv("FAKE_FOLDER", str(tmp_path))
    given = tasks.problem("rgc-sequence", UNITS, 2, STEPS, kind="noise", scale=TINY.scale, seed=0)
    found = tasks.oracle("rgc-sequence", given, "rfp")
    np.savez(tmp_path / "answers.npz", **found)  # type: ignore[arg-type]
    (tmp_path / "fake.py").write_text(FAKE)
    return (sys.executable, str(tmp_path / "fake.py"))


def measure(
    tmp_path: Path, command: tuple[str, str], peers: Mapping[str, Peer], settings: Settings = TINY
) -> dict[str, dict[str, object]]:
    folder = tmp_path / "point"
    folder.mkdir()
    return Point(settings, "rgc-sequence", UNITS, 2, peers, folder).measure(command)


def test_samples_are_taken_in_turn_and_ratios_have_intervals(
    tmp_path: Path, command: tuple[str, str]
) -> None:
    found = measure(
        tmp_path,
        command,
        {"rfp-dual": fake("Fast"), "slow": fake("Slow", compiles=True), "late": fake("Late")},
    )
    turns = (tmp_path / "turns").read_text().split()
    assert turns == ["Fast", "Slow", "Late", "Slow", "Fast", "Fast", "Slow", "Slow", "Fast"]
    slow, late = found["slow"], found["late"]
    assert late["status"] == "error"
    assert late["message"] == "its process ended with exit code 1"
    payload = slow["payload"]
    assert isinstance(payload, dict)
    # samples are 1, 2, 3, 4 ms and three times that: the ratio is the same in every draw of rounds
    assert payload["ratios"]["rfp-dual"] == pytest.approx([3, 3, 3])
    assert payload["samples"] == pytest.approx([3e-3, 6e-3, 9e-3, 12e-3])
    assert payload["step_seconds"] == pytest.approx(7.5e-3 / 3)
    assert payload["error"] < 1e-6
    assert (slow["compile_seconds"], "compile_seconds" in found["rfp-dual"]) == (0.5, False)
    assert found["rfp-dual"]["payload"]["ratios"] == {}  # type: ignore[index]


@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [
        ("Dying", "error", "its process ended with exit code 3; last said: OSError: out of luck"),
        ("Garbage", "error", "not an answer: 'Hello!'"),
        ("Raising", "error", "TypeError: no such thing"),
        ("Large", "oom", "RuntimeError: out of memory"),
        (
            "Wrong",
            "error",
            "gradient of weight_ss differs from rfp's in float64 by 1.0e+00 relative (tolerance 1e-03)",
        ),
    ],
)
def test_what_fails_has_its_message(
    tmp_path: Path, command: tuple[str, str], kind: str, status: str, message: str
) -> None:
    found = measure(tmp_path, command, {"rfp-dual": fake("Fast"), "bad": fake(kind)})
    assert (found["bad"]["status"], found["bad"]["message"]) == (status, message)
    assert found["rfp-dual"]["status"] == "ok"
    assert "bad" not in found["rfp-dual"]["payload"]["ratios"]  # type: ignore[index]


def gone(pid: int) -> bool:
    """Whether a process has ended, even if nobody has waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")
def test_one_that_hangs_is_ended_with_what_it_started(tmp_path: Path, command: tuple[str, str]) -> None:
    settings = Settings(**{**TINY.__dict__, "limit": 2.0})
    found = measure(tmp_path, command, {"bad": fake("Hanging")}, settings)
    message = str(found["bad"]["message"])
    assert message.startswith("no answer within 2 s; last said: ")
    child = int(message.rpartition(" ")[2])
    until = time.monotonic() + 5
    while not gone(child) and time.monotonic() < until:
        time.sleep(0.01)
    assert gone(child)


def test_an_interrupt_ends_every_worker(
    tmp_path: Path, command: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Worker] = []
    ask = Worker.ask

    def interrupted(self: Worker, message: Mapping[str, object], limit: float) -> dict[str, object]:
        started.append(self)
        if "calls" in message:
            raise KeyboardInterrupt
        return ask(self, message, limit)

    monkeypatch.setattr(Worker, "ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, command, {"rfp-dual": fake("Fast"), "slow": fake("Slow")})
    assert all(worker.process.returncode is not None for worker in started)


def test_a_worker_ends_when_its_parent_s_end_of_the_pipe_does(
    tmp_path: Path, command: tuple[str, str]
) -> None:
    folder = tmp_path / "point"
    folder.mkdir()
    point = Point(TINY, "rgc-sequence", UNITS, 2, {"rfp-dual": fake("Fast")}, folder)
    worker = Worker(command, os.environ, (), tmp_path / "log")
    try:
        point.prepare("rfp-dual", worker)
        assert worker.process.poll() is None
        assert worker.process.stdin is not None
        worker.process.stdin.close()
        assert worker.process.wait(timeout=10) == 0
    finally:
        worker.close()


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="the system can't hold processes to processors"
)
def test_workers_are_held_to_processors_and_this_process_is_not() -> None:
    before = os.sched_getaffinity(0)
    with held_to(run.pinned(1)):
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before
    given = run.environment(3, "cpu")
    assert {given[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC")} == {"3"}


# --- the file of records -----------------------------------------------------------------------------------


def test_rows_for_all_and_what_is_measured_is_kept(tmp_path: Path, command: tuple[str, str]) -> None:
    def nothing(**options: object) -> Peer:
        return Peer("fake", "Fast", {"rgc-sequence": "bptt"}, **options)  # type: ignore[arg-type]

    peers = {
        "rfp-dual": fake("Fast"),
        "bptt": fake("Wrong"),
        "jax-scan": fake("Slow"),
        "flashrnn": nothing(packages=("no_such_package",)),
        "torchrl": nothing(packages=("no_such_package",), cuda=True),
    }
    settings = Settings(**{**TINY.__dict__, "peers": tuple(peers)})
    file = tmp_path / "peers.jsonl"
    rows = run.run(settings, file, peers=peers, command=command)
    assert [(r.algorithm, r.status) for r in rows] == [
        ("rfp-dual", "ok"), ("bptt", "error"), ("jax-scan", "ok"), ("flashrnn", "missing"), ("torchrl", "missing"),
    ]  # fmt: skip
    by = {r.algorithm: r for r in rows}
    assert by["flashrnn"].message == "no_such_package isn't installed: pip install 'rjepa-triton[peers]'"
    assert by["torchrl"].message == "needs a CUDA device"
    assert by["jax-scan"].timing is not None
    assert by["jax-scan"].timing.median == pytest.approx(7.5e-3)
    assert by["jax-scan"].params["task"] == "rgc-sequence"
    assert place(by["jax-scan"]) == f"jax-scan task=rgc-sequence N={UNITS} B=2 T={STEPS}"
    assert record.load(file) == rows

    # a second run tries again what failed, with our own rule beside it, and keeps the rest
    (tmp_path / "turns").unlink()
    peers["bptt"] = fake("Slow")
    rows = run.run(settings, file, peers=peers, command=command)
    assert [r.status for r in rows] == ["ok", "ok", "ok", "missing", "missing"]
    assert (tmp_path / "turns").read_text().split().count("Slow") == settings.rounds
    assert len(record.load(file)) == 5 + 2
    rows = run.run(settings, file, peers=peers, command=command)
    assert len(record.load(file)) == 5 + 2

    # another version of a peer's package is another measurement
    peers["jax-scan"] = Peer("fake", "Slow", {"rgc-sequence": "rfp"}, ("pytest",))
    run.run(settings, file, peers=peers, command=command)
    assert [r.algorithm for r in record.load(file)[7:]] == ["rfp-dual", "bptt", "jax-scan"]

    (table,) = run.tables(rows)
    shown = markdown(table)
    assert "3.00 (3.00–3.00)" in shown
    assert "pip install 'rjepa-triton[peers]'" in shown
    assert str(table.title).startswith("rgc-sequence: RGC, a training step over T steps; T = 3, cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peers": ("jux",)}, "peers must be one of 'rfp-dual', 'bptt', .*got 'jux'"),
        ({"tasks": ("sort",)}, "tasks must be one of 'rgc-sequence', .*got 'sort'"),
        ({"peers": ()}, "peers must name at least one of rfp-dual"),
        (
            {"peers": ("torch-nn",)},
            "peers must serve a task of rgc-sequence; torch-nn serve lstm-sequence, gru-sequence",
        ),
        ({"hidden": ()}, "hidden must name at least one size"),
        ({"steps": 1}, "steps must be at least 2, got 1"),
        ({"limit": 0.0}, "limit must be above 0, got 0.0"),
        ({"device": "tpu"}, "device must be 'cpu', 'cuda' or 'cuda:<index>', got 'tpu'"),
    ],
)
def test_settings_say_what_was_wanted(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**{**TINY.__dict__, **changes})


def test_the_command_says_what_peers_there_are() -> None:
    result = CliRunner().invoke(bench, ["peers", "--peers", "jux"])
    assert result.exit_code == 2
    assert "peers must be one of 'rfp-dual'" in result.output
    assert "got 'jux'" in result.output


def test_every_peer_is_of_known_tasks_and_gradients_and_its_runner_is_there() -> None:
    for name, peer in PEERS.items():
        assert set(peer.tasks) <= set(TASKS), name
        known = tasks.OPTIMIZERS if "rgc-stream" in peer.tasks else tasks.GRADIENTS
        assert set(peer.tasks.values()) <= set(known), name
        source = Path(registry.__file__).with_name(peer.module.rpartition(".")[2] + ".py").read_text()
        assert f"\nclass {peer.runner}(" in source, name
    for task in TASKS.values():
        assert set(task.ours) <= set(PEERS)


def test_records_of_other_lengths_or_threads_have_tables_of_their_own() -> None:
    def made(steps: int, threads: int) -> record.Record:
        params = {
            "task": "rgc-stream",
            "N": 8,
            "B": 1,
            "T": steps,
            "threads": threads,
            "device": "cpu",
            "scale": 0.1,
        }
        return record.Record("peers", "stream", params, "missing", "a machine", {}, None, "", "")

    tables = run.tables([made(5, 1), made(9, 1), made(5, 2), made(5, 1)])
    found = [
        (str(table.title).partition("; T = ")[2].partition(", W")[0], table.row_count) for table in tables
    ]
    assert found == [("5, cpu, threads: 1", 2), ("9, cpu, threads: 1", 1), ("5, cpu, threads: 2", 1)]


# --- real peers --------------------------------------------------------------------------------------------

HERE = [
    (name, task) for name, peer in PEERS.items() for task in peer.tasks
    if not peer.cuda and not peer.compiles and not TASKS[task].learns
]  # fmt: skip
# one of each kind, since each takes a compilation
COMPILING = [
    ("torch-compile", "rgc-sequence"), ("torch-compile-step", "rgc-sequence"), ("torch-scan", "rgc-sequence"),
    ("jax-scan", "rgc-sequence"), ("jax-scan", "lstm-sequence"), ("jax-scan", "gru-sequence"),
    ("jax-scan", "gru-diagonal-sequence"),
    ("braintrace-snap1", "rgc-online"), ("braintrace-snap1", "lstm-sequence"),
    ("braintrace-d-rtrl", "rgc-sequence"), ("braintrace-d-rtrl", "gru-sequence"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "task"), HERE + COMPILING)
def test_a_peer_gives_the_gradient_that_it_is_said_to(
    name: str, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # traced as one graph, but not put through a C++ compiler, which takes its time
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    peer = PEERS[name]
    for package in peer.packages:
        pytest.importorskip(package)
    given = arrays(task)
    runner = getattr(importlib.import_module(peer.module), peer.runner)(task, given, "cpu")
    error, where = tasks.difference(runner.gradients(), tasks.oracle(task, given, peer.tasks[task]))
    assert error < 1e-5, where
    assert runner.covers == (1 if TASKS[task].online else STEPS)
    if not TASKS[task].online:  # a sequence starts from the same state each time
        assert (
            tasks.difference(runner.named(runner.run()), tasks.oracle(task, given, peer.tasks[task]))[0]
            < 1e-5
        )


# --- streams that are learned from -------------------------------------------------------------------------

LEARNING = [name for name, peer in PEERS.items() if "rgc-stream" in peer.tasks]


def stream(steps: int = 12) -> dict[str, np.ndarray]:
    """The task's arrays in float64."""
    given = arrays("rgc-stream", steps=steps)
    return {name: array.astype(np.float64) for name, array in given.items()}


@pytest.mark.parametrize("gradient", tasks.OPTIMIZERS)
def test_a_stream_s_reference_is_autograd_of_all_steps_so_far(gradient: str) -> None:
    given = {name: torch.from_numpy(array) for name, array in stream().items()}
    names = [*tasks.NETWORKS["rgc"].parameters, *tasks.READOUT]
    weights = {name: given[name].clone().requires_grad_() for name in names}
    optimizer = tasks.OPTIMIZERS[gradient](list(weights.values()), lr=tasks.RATE)
    s, m, product = given["state_0"], given["state_1"], cases.own_path_only
    losses = []
    for x, target in zip(given["x"], given["target"], strict=True):
        # copies, which stay what this step has read; all steps' gradients add up in the weights
        ss, ms, mm, sm, *readout = (weight.clone() for weight in weights.values())
        s, m = (
            (1 - product(ms, m).tanh()) * x + product(ss, s).tanh() * s,
            (1 - product(sm, s).tanh()) * x + product(mm, m).tanh() * m,
        )
        loss = torch.nn.functional.mse_loss(torch.nn.functional.linear(s, *readout), target)
        found = torch.autograd.grad(loss, list(weights.values()), retain_graph=True, materialize_grads=True)
        for weight, part in zip(weights.values(), found, strict=True):
            weight.grad = part
        with torch.no_grad():
            optimizer.step()
        losses.append(float(loss.detach()))
    want = {name: weights[name].detach().numpy() - given[name].numpy() for name in names}
    want["losses"] = np.array(losses)
    assert tasks.difference(tasks.oracle("rgc-stream", stream(), gradient), want)[0] < 1e-10


@pytest.mark.parametrize("name", LEARNING)
def test_a_stream_changes_the_weights_as_the_reference_does(name: str) -> None:
    """In float64, and again from the start."""
    peer, double = PEERS[name], contextlib.nullcontext()
    for package in peer.packages:
        pytest.importorskip(package)
    if "jax" in peer.packages:
        double = importlib.import_module("jax").enable_x64(True)
    threads, given = torch.get_num_threads(), stream()
    want = tasks.oracle("rgc-stream", given, peer.tasks["rgc-stream"])
    try:
        with double:
            runner = getattr(importlib.import_module(peer.module), peer.runner)("rgc-stream", given, "cpu")
            for found in (runner.gradients(), runner.named(runner.run())):
                error, where = tasks.difference(found, want)
                assert error < 1e-9, where
        assert runner.covers == 12 * getattr(runner, "count", 1)
    finally:
        torch.set_num_threads(threads)


def test_networks_of_a_population_that_differ_are_told() -> None:
    runner = streams.Two("rgc-stream", stream(), "cpu")
    assert runner.stream.members is not None
    runner.stream.members[1].optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(ArithmeticError, match="networks of a population differ"):
        runner.gradients()


def test_peers_that_must_be_asked_for_are_no_default() -> None:
    assert {"stream", "jax-stream"} <= set(Settings().peers)
    assert not {"stream-8", "stream-one-thread"} & set(Settings().peers)


def test_by_the_command(tmp_path: Path) -> None:
    """Real workers run this package's own rules; a second run keeps every record of the first."""
    options = [
        "peers", "--hidden", "4", "--steps", "3", "--tasks", "rgc-sequence", "--peers", "rfp-dual,bptt",
        "--rounds", "2", "--sample", "0.001", "--threads", "1", "--device", "cpu", "--out", str(tmp_path),
    ]  # fmt: skip
    first = CliRunner().invoke(bench, options)
    assert first.exit_code == 0, first.output
    made = record.load(tmp_path / "peers.jsonl")
    assert [(r.algorithm, r.status, r.message) for r in made] == [("rfp-dual", "ok", ""), ("bptt", "ok", "")]
    for r in made:
        assert r.timing is not None
        assert r.payload["covers"] == 3
        assert r.payload["packages"] == {"torch": importlib.metadata.version("torch")}
        assert r.payload["torch_threads"] == 1
        json.dumps(r.payload, allow_nan=False)
    again = CliRunner().invoke(bench, [*options, "--markdown"])
    assert again.exit_code == 0, again.output
    assert "| rfp-dual | rfp |" in again.output
    assert len(record.load(tmp_path / "peers.jsonl")) == 2


def test_a_panel_of_what_was_not_timed_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(task: str, units: int) -> record.Record:
        params = {"task": task, "N": units, "B": 1, "T": 5, "threads": 1, "device": "cpu"}
        timing = record.Timing(1e-3, 0.9e-3, 1.1e-3, 9)
        return record.Record(
            "peers", TASKS[task].ours[0], params, "ok", "a machine", {}, None, "", "", timing=timing
        )

    figures: list[Figure] = []
    monkeypatch.setattr(plot, "save", lambda figure, path: figures.append(figure) or [])
    plot.draw([made("rgc-sequence", 8), made("rgc-sequence", 16), made("rgc-online", 8)], tmp_path / "a")
    assert [axes.axison for axes in figures[0].axes] == [True, True, True, False]
