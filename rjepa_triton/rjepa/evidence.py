"""The evidence for memory: R² of the next and of the present patch by time step, from h, from x, and from a ceiling.

A falling loss proves nothing, for a representation can become easier to predict and say less. What h(t) tells of the
next patch beyond what x(t) tells is memory. It is 0 in the first step, where h = x. The ceiling tells how much there is
for a linear map to find: it sees x(t) and running averages of x up to t.

Probes are ridge regressions (scikit-learn), fitted on the training sequences and tested on sources that are held out
from training. The ridge is chosen on the training sequences alone, by cross-validation in which whole sources are left
out, as they are from the test: left out by sequence, it would be too small for other sources. A probe is fitted for
each window of steps, since h changes its statistics while memory fills. h's probe has the ridge that is chosen for x's:
where h is x, in the first step, there is no gap.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LATE = 20  # the first step, counted from 0, that "late" means: by then h holds as much of the past as it will
WINDOWS = (
    0,
    1,
    2,
    4,
    8,
    16,
    32,
    64,
)  # the first step, counted from 0, of each window in which a probe is fitted
RIDGES = (1.0, 10.0, 100.0, 1000.0, 10000.0)
CLIP = 4.0  # standard deviations: one row unlike all of training doesn't decide R²
CHOOSING = 6000  # at most so many rows, of whole sequences, choose the ridge
DECAYS = (0.5, 0.8)  # of the exponential averages that the ceiling sees, beside the mean of all steps so far


@dataclass(frozen=True)
class Explained:
    """R² by step.

    next     (T - 1,) of the next patch, from step t = 1 … T - 1
    present  (T - 1,) of the present patch, from the same steps
    late_next, late_present   of all steps from `LATE` on together
    ridge    the penalty
    """

    next: list[float]
    present: list[float]
    late_next: float
    late_present: float
    ridge: float


def with_averages(x: Tensor) -> Tensor:
    """What the ceiling sees of x (T, n, N): x(t), the mean of x(1) … x(t), and exponential averages, (T, n, 4·N)."""
    counts = torch.arange(1, len(x) + 1, dtype=x.dtype, device=x.device)[:, None, None]
    seen = [x, x.cumsum(0) / counts]
    for decay in DECAYS:
        average = torch.empty_like(x)
        now = torch.zeros_like(x[0])
        for t, value in enumerate(x):
            now = decay * now + (1 - decay) * value
            average[t] = now / (1 - decay ** (t + 1))
        seen.append(average)
    return torch.cat(seen, dim=-1)


def explained(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    late_only: bool = False,
    ridge: float | None = None,
    sources: np.ndarray | None = None,
) -> Explained:
    """R² on test sequences of maps from inputs (T, n, P) to targets (T, n, Q), fitted on the training sequences.

    R² is 1 - residual/total, over all targets of a step, with the total about the mean of the test side's targets.
    late_only: the two numbers alone, and no curves. ridge: the penalty; None: chosen on the training sequences.
    sources: (n,) the source of each training sequence; None: each sequence is one.
    """
    from sklearn.linear_model import Ridge

    (a, y), (b, z) = ((_numbers(inputs), _numbers(targets)) for inputs, targets in (train, test))
    steps = len(a) - 1
    late = min(LATE, steps - 1)
    ridge = (
        _chosen(a[late:], y, late, np.arange(a.shape[1]) if sources is None else sources)
        if ridge is None
        else ridge
    )
    centre = z.reshape(-1, z.shape[-1]).mean(0)
    residual, total = np.zeros((2, steps)), np.zeros((2, steps))
    bounds = [late, steps] if late_only else [*(w for w in WINDOWS if w < steps), steps]
    for start, stop in itertools.pairwise(bounds):
        rows = _rows(a[start:stop])
        mean, std = rows.mean(0), np.maximum(rows.std(0), 1e-8)
        fitted = Ridge(ridge, solver="cholesky").fit(standardised(rows, mean, std), _pairs(y, start, stop))
        seen = standardised(_rows(b[start:stop]), mean, std)
        wanted = _pairs(z, start, stop)
        for kind, columns in enumerate(np.split(np.arange(wanted.shape[1]), 2)):
            missed = (wanted - fitted.predict(seen))[:, columns]
            about = wanted[:, columns] - centre
            for into, values in ((residual, missed), (total, about)):
                into[kind, start:stop] = np.square(values).reshape(stop - start, -1).sum(1)
    floor = np.finfo(float).tiny
    curves = [] if late_only else (1 - residual / np.maximum(total, floor)).tolist()
    ends = 1 - residual[:, late:].sum(1) / np.maximum(total[:, late:].sum(1), floor)
    if late_only:
        return Explained([], [], float(ends[0]), float(ends[1]), ridge)
    return Explained(curves[0], curves[1], float(ends[0]), float(ends[1]), ridge)


def _chosen(late: np.ndarray, y: np.ndarray, start: int, sources: np.ndarray) -> float:
    """The ridge that does best in cross-validation of up to five folds over sources, on late steps.

    Of fewer than two sources, sequences are left out; of fewer than five of these, the ridge is 100.
    """
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV, GroupKFold

    steps, count = len(late) - 1, late.shape[1]
    if len(np.unique(sources)) < 2:
        sources = np.arange(count)
        if count < 5:
            return 100.0
    some = np.linspace(0, count - 1, min(count, max(5, CHOOSING // max(steps, 1)))).astype(int)
    rows = _rows(late[:-1, some])
    std = np.maximum(rows.std(0), 1e-8)
    search = GridSearchCV(
        Ridge(solver="cholesky"),
        {"alpha": list(RIDGES)},
        cv=GroupKFold(min(5, len(np.unique(sources[some])))),
        scoring="neg_mean_squared_error",
        refit=False,
    )
    search.fit(
        standardised(rows, rows.mean(0), std),
        _pairs(y[:, some], start, start + steps),
        groups=np.tile(sources[some], steps),
    )
    return float(search.best_params_["alpha"])


def _numbers(values: Tensor) -> np.ndarray:
    return values.detach().cpu().double().numpy()


def _rows(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, values.shape[-1])


def standardised(rows: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Rows (n, P) in standard deviations from a mean, clipped at ±`CLIP`."""
    return np.clip((rows - mean) / std, -CLIP, CLIP)


def _pairs(targets: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Targets of the next patch and of the present one, side by side, for the steps from `start` to before `stop`."""
    return np.concatenate([_rows(targets[start + 1 : stop + 1]), _rows(targets[start:stop])], axis=1)


def curves(found: Mapping[str, Explained]) -> dict[str, list[float] | float]:
    """The evidence as entries of a record: next_from_h and so on, and the same by step."""
    out: dict[str, list[float] | float] = {}
    for name, one in found.items():
        out[f"next_from_{name}"], out[f"current_from_{name}"] = one.late_next, one.late_present
        if one.next:
            out[f"next_from_{name}_by_step"], out[f"current_from_{name}_by_step"] = one.next, one.present
    return out


def late(curve: Sequence[float]) -> float:
    """The mean of a curve's late part."""
    return float(np.mean(curve[min(LATE, len(curve) - 1) :]))
