"""The frontier's plot: labels that can be told apart."""

from __future__ import annotations

from itertools import combinations

from matplotlib import pyplot as plt
from matplotlib.text import Text

from rjepa_triton.bench.learning import frontier
from rjepa_triton.bench.learning.frontier import Mark


def texts(marks: list[Mark]) -> list[plt.Text]:
    figure, axes = plt.subplots(figsize=(6, 5))
    try:
        frontier._panel(axes, marks, "time")
        return [text for text in axes.texts if not text.get_text().startswith("exact")]
    finally:
        plt.close(figure)


def test_labels_of_near_marks_do_not_overlap() -> None:
    marks = [Mark(100 * 1.05**i, 0.5 * 1.1**-i, f"C={i}", "carry" if i % 2 else "TBPTT") for i in range(8)]
    found = texts([*marks, Mark(1e4, 0.0, "BPTT", "exact")])
    assert [text.get_text() for text in found] == [f"C={i}" for i in range(8)] + ["BPTT"]
    boxes = [Text.get_window_extent(text) for text in found]  # without the line to the mark
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_marks_that_lie_on_each_other_share_a_label() -> None:
    one = [
        Mark(100, 0.5, "SnAp-0", "parts of M"),
        Mark(100.1, 0.5, "RFLO", "parts of M"),
        Mark(100, 0.5, "RFP", "RFP"),
    ]
    found = texts([*one, Mark(1e4, 1e-3, "RTRL", "exact")])
    assert [text.get_text() for text in found] == ["SnAp-0 · RFLO", "RFP", "RTRL"]
