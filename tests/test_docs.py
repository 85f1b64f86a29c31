"""The documentation's numbers are those of the committed records. Its examples: `docs/test_examples.py`."""

from __future__ import annotations

import json
import re

import torch
from checkout import RESULTS, ROOT

from rjepa_triton import RGC, OnlineLearner
from rjepa_triton.bench.harness import record
from rjepa_triton.bench.harness.tables import markdown
from rjepa_triton.bench.learning import fidelity, learn, pays
from rjepa_triton.bench.learning.probes import PROBES
from rjepa_triton.bench.planner import plan
from rjepa_triton.bench.report import page as report
from rjepa_triton.bench.scaling import forward
from rjepa_triton.bench.scaling import tables as scaling_tables
from rjepa_triton.cells.builtin import RGCCell
from rjepa_triton.rjepa import figures, theory_runs
from rjepa_triton.rules import rtrl


def test_bytes_of_learning_state() -> None:
    batch, units = 3, 16
    learner = OnlineLearner(RGC(units), batch, form="step")
    assert learner.nbytes == 32 * batch * units**2 + 8 * batch * units
    weights = [torch.zeros(units, units) for _ in range(4)]
    assert rtrl.ExactSensitivity(RGCCell().matrices, weights, 2, batch).nbytes == 32 * batch * units**3


def test_the_report_is_that_of_the_records() -> None:
    page = (ROOT / "docs" / "report" / report.NOTES).read_text()
    found = report.sections(record.files_of(RESULTS))
    assert {section.name for section in found} >= {
        "scaling",
        "peers",
        "kernels",
        "online",
        "memory",
        "learn",
        "forward",
        "forward-predicted",
        "selfcheck",
    }
    for section in found:
        assert (section.device in page.split("\n## ")[0]) is not section.predicted
        for table in section.view.tables(section.records):
            assert markdown(table) in page
            assert (table.caption or "") in page
    html = (ROOT / "docs" / "report" / report.PAGE).read_text()
    assert all(f'id="{section.stem}"' in html for section in found)


def test_the_tables_of_fidelity_are_those_of_the_record() -> None:
    page = (ROOT / "docs" / "exactness.md").read_text()
    told = fidelity.all_rows(record.load(RESULTS / "fidelity-cpu.jsonl"))
    assert len(told) == 6
    for rows in told:
        assert fidelity.markdown(rows) in page


def test_the_plans_table_is_what_the_model_says_of_the_records() -> None:
    """To three points of a hundred: another torch may make a few calls more."""
    page = (ROOT / "docs" / "report" / report.NOTES).read_text().splitlines()
    want = markdown(plan.check_table(plan.against(record.load_all(RESULTS)))).splitlines()
    start = page.index(want[0])
    for told, line in zip(page[start : start + len(want)], want, strict=True):
        told_cells, cells = ([cell.strip() for cell in text.split("|")] for text in (told, line))
        assert told_cells[:3] == cells[:3]
        for a, b in zip(told_cells[3:], cells[3:], strict=True):
            if "%" in b and "median" not in b:
                assert abs(float(a.partition("%")[0]) - float(b.partition("%")[0])) <= 3, line


def test_what_benchmarks_found_is_what_the_records_say() -> None:
    """The tables are in the report; the page has the figures that they come to, in at most 300 lines."""
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    assert text.count("\n") <= 300
    page = " ".join(text.split())
    learnt = record.load(RESULTS / "learn-cpu.jsonl")
    seconds = sum(r.payload["cpu_seconds"] for r in learnt)
    assert f"{len(learnt)} runs took {seconds:.0f} s of processor time" in page
    recall = learn.tables(learnt)[0]
    final = dict(zip(*(map(str, recall.columns[i].cells) for i in (0, 3)), strict=True))
    from_to = (float(final[name].split()[0]) for name in ("chance", "rfp"))
    assert "RFP brings the loss from {:.2f} to {:.2f}".format(*from_to) in page

    for name, before in (("stream-cpu", "found "), ("stream-avx512-cpu", "without, and ")):
        streams = record.load(RESULTS / f"{name}.jsonl")
        medians = {(r.algorithm, r.params["N"]): r.timing.median for r in streams if r.timing}
        faster = [f"{medians['jax-stream', n] / medians['stream', n]:.2f}" for n in (32, 64, 128, 256, 512)]
        assert f"{before}{', '.join(faster[:-1])} and {faster[-1]}" in page

    timed = [r for r in record.load(RESULTS / "forward-cpu.jsonl") if r.benchmark == "forward"]
    taken = {
        (tuple(r.params[name] for name in ("cell", "N", "B", "T")), r.algorithm): r.timing.median
        for r in timed
        if r.timing
    }
    for cell, told in (
        ("rgc", "The rounds take {:.0f} to {:.0f} times"),
        ("lru", "bytes, and {:.0f} to {:.0f} times"),
    ):
        longer = [
            taken[at, "parallel"] / taken[at, "sequential"]
            for at, mode in taken
            if at[0] == cell and mode == "parallel"
        ]
        assert told.format(min(longer), max(longer)) in page
    predicted = record.load(RESULTS / "forward-cpu.jsonl")[-1]
    bptt, *_, launch, rounds = (row[-2:] for row in forward.predicted_rows(predicted) if row[1] == "all")
    told = " ".join((ROOT / "docs" / "backends.md").read_text().split())
    assert f"Rounds and the dual form take {rounds[0]}." in told
    assert f"take {launch[1]} times as long" in told
    assert f"in a CUDA graph, {bptt[1]} times" in told


def test_what_pays_is_what_the_record_says() -> None:
    """The figures of "choosing a rule", and of the claims of others."""
    by = pays.groups(record.load(RESULTS / "pays-cpu.jsonl"))

    def share(cell: str, task: str, rule: str) -> str:
        told = pays.verdicts(by[task, cell, 32, "adam"])[rule].share
        assert told is not None
        return f"{told[0]:.0%}".replace("%", " %").replace("-0 ", "0 ")

    page, claims = (
        " ".join((ROOT / "docs" / name).read_text().split())
        for name in ("tutorials/choosing.md", "claims.md")
    )
    assert f"gets {share('RNN', 'lag-1', 'rfp')} of exact RTRL's gain" in page
    told = [share("GRU", task, "rfp") for task in ("chain", "digits", "lag-4")]
    assert "RFP gets {} of exact RTRL's gain there, {} for digits and {} for".format(*told) in page
    blocks = {
        (cell, task): share(cell, task, "block")
        for cell in ("RNN", "GRU")
        for task in ("lag-4", "digits", "chain")
    }
    assert blocks["RNN", "chain"] == "0 %"
    told = [blocks["GRU", task] for task in ("chain", "digits", "lag-4")] + [share("RNN", "lag-1", "block")]
    told += [blocks["RNN", task] for task in ("lag-4", "digits")]
    assert (
        "get {} for the bit, {} for digits and {} at lag 4 (GRU); {} at lag 1, {} at lag 4, {} for".format(
            *told
        )
        in page
    )
    told = [blocks[cell, task] for task in ("lag-4", "digits") for cell in ("RNN", "GRU")] + [
        blocks["GRU", "chain"]
    ]
    assert "{} and {} at lag 4 (RNN, GRU), {} and {} for digits, none and {} for".format(*told) in claims
    for (task, _, _, _), of in by.items():
        ends = [
            sum(r.payload["finals"]) / len(r.payload["finals"]) / PROBES[task].chance for r in of.values()
        ]
        assert max(ends) - min(ends) < {"drift": 0.002, "lorenz": 0.01}.get(task, 9)
    for cell, tasks in {"RNN": ("lag-4", "lag-8", "adding", "digits", "chain")}.items():
        assert all(
            pays.verdicts(by[task, cell, 32, "adam"])["rfp"].word in ("open", "alike") for task in tasks
        )
    mean = {r: sum(of.payload["finals"]) / 10 for r, of in by["chain", "GRU", 32, "adam"].items()}
    told = [f"{mean[rule]:.2f}" for rule in ("snap0", "rfp", "eprop")]
    assert "({} nats, chance 0.69); with RFP it does ({}), and with e-prop better ({})".format(*told) in page


def test_the_tables_of_the_theory_are_those_of_the_record() -> None:
    page = (ROOT / "docs" / "theory.md").read_text()
    for table in theory_runs.tables(record.load(RESULTS / "theory.jsonl")):
        assert markdown(table) in page


def test_the_tables_of_rjepa_are_those_of_its_records() -> None:
    page = (ROOT / "docs" / "rjepa.md").read_text()
    step = markdown(scaling_tables.tables(record.load(RESULTS / "rjepa-step-cpu.jsonl"))[0])
    assert step.split("\n\n", 1)[1] in page
    lines = (RESULTS / "rjepa-demo-cpu.jsonl").read_text().splitlines()
    for row in figures.summary(figures.by_rule([("record", json.loads(line)) for line in lines])):
        assert "| " + " | ".join(row) + " |" in page
    tried = [json.loads(line) for line in (RESULTS / "rjepa-tried-cpu.jsonl").read_text().splitlines()]
    assert f"{len(tried)} runs" in page
    for row in figures.compared([("record", one) for one in tried], tried[0]["config"]):
        by_name = dict(zip(figures.COMPARED, row, strict=True))
        assert "| " + " | ".join(by_name[name] for name in figures.BRIEF) + " |" in page


def test_the_tests_that_hold_each_promise_exist() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page)
    assert len(named) > 15
    for file, test in named:
        text = (ROOT / file).read_text()
        assert f"\ndef {test or 'test_'}" in text, (file, test)
