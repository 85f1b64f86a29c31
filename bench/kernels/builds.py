"""What this package's launchers would have compiled, as a `Build` for each kernel, which `static` compiles and reads.

target names a GPU architecture of `static.TARGETS`; divisible as in `Build`; vector is how many numbers one access of
the kernel moves; resets says whether a reset mask is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from .static import WARP, Build

if TYPE_CHECKING:  # triton need not be there to import this
    from ...kernels import (
        gamma_chunk,
        gamma_step,
        rtrl_heads,
        rtrl_step,
    )


def _gamma_types(
    dtype: str, states: int, pointers: Sequence[str], integers: Sequence[str]
) -> dict[str, str | Sequence[str | None]]:
    return {
        "gamma_ptrs": [f"*{dtype}"] * states,
        **{f"{name}_ptr": "*fp32" for name in pointers},
        **dict.fromkeys(integers, "i32"),
    }


def _gamma_constants(
    config: gamma_step.Config | gamma_chunk.Config, absent: Sequence[str] = (), **more: Any
) -> dict[str, Any]:
    """The tile of a kernel of Γ, and None for the pointers that aren't given."""
    tile = {"BLOCK_N": config.block_n, "BLOCK_M": config.block_m, "VECTOR": config.vector}
    return {**dict.fromkeys(absent), **tile, **more}


def step_build(
    target: str,
    config: gamma_step.Config,
    dtype: str = "fp32",
    states: int = 2,
    mode: str = "gradient",
    divisible: Sequence[str] = (),
    rounding: str = "nearest",
    matrices: int = 4,
    own: bool = False,
    both: bool = False,
) -> Build:
    """Γ's step. mode: "advance" (Γ alone), "gradient" (dW as well), or "weight" (the step of the weights as well).

    Each matrix enters one state, as an RGC's do, or with `both` all states, as an LSTM's. own: each unit reads one
    number of its own, as with diagonal recurrent weights.
    """
    absent = {
        "advance": ["delta_ptr", "grad_ptr", "weight_ptrs", "lr_ptr"],
        "gradient": ["weight_ptrs", "lr_ptr"],
        "weight": ["grad_ptr"],
    }[mode]
    if rounding == "nearest":
        absent.append("rng_state_ptr")
    integers = (
        "ROWS",
        "N",
        "M",
        "stride_phi_b",
        "stride_y_b",
        "stride_m_to",
        "stride_m_from",
        "stride_delta",
    )
    entered = [k * states // matrices for k in range(matrices)]
    tuples: dict[str, Sequence[str | None]] = {
        "phi_ptrs": [
            "*fp32" if both or nu == entered[k] else None for nu in range(states) for k in range(matrices)
        ],
        "y_ptrs": ["*fp32"] * matrices,
        "weight_ptrs": ["*fp32"] * matrices,
    }
    return Build(
        target,
        "rjepa_triton.kernels.gamma_step:_gamma_step_kernel",
        types={
            **_gamma_types(dtype, states, ("m", "delta", "grad", "lr"), integers),
            **tuples,
            "rng_state_ptr": "*i64",
        },
        constants=_gamma_constants(config, absent, DIAGONAL=own),
        divisible=divisible,
        options={"num_warps": config.num_warps},
    )


def read_build(
    target: str,
    config: gamma_step.Config,
    dtype: str = "fp32",
    states: int = 2,
    divisible: Sequence[str] = (),
) -> Build:
    """The kernel by which a credit reads Γ, in the tiles of Γ's step."""
    integers = ("ROWS", "K", "N", "M", "stride_credit")
    return Build(
        target,
        "rjepa_triton.kernels.gamma_read:_gamma_read_kernel",
        types=_gamma_types(dtype, states, ("credit", "grad"), integers),
        constants=_gamma_constants(config),
        divisible=divisible,
        options={"num_warps": config.num_warps},
    )


def chunk_build(
    target: str,
    config: gamma_chunk.Config,
    dtype: str = "fp32",
    states: int = 2,
    divisible: Sequence[str] = (),
    vector_u: int | None = None,
) -> Build:
    """Γ's chunk, with credit. vector_u: numbers of U in one access; if None 4, or 1 where Γ's accesses have 1."""
    of_u = vector_u or (4 if config.vector > 1 else 1)
    return Build(
        target,
        "rjepa_triton.kernels.gamma_chunk:_gamma_chunk_kernel",
        types=_gamma_types(dtype, states, ("whole", "u", "y", "credit", "grad"), "CBKNM"),
        constants=_gamma_constants(config, BLOCK_C=config.block_c, VECTOR_U=of_u),
        divisible=divisible,
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
    )


def scan_build(
    target: str,
    states: int,
    partials: Sequence[Sequence[int]] = (),
    *,
    steps: int = 64,
    units: int = 1024,
    multiprocessors: int = 132,
    carry: bool = True,
    vector: int = 4,
    divisible: Sequence[str] = (),
) -> list[Build]:
    """The reverse scan over `steps` steps of `units` = B·N units. It writes λ, or one output for each of `partials`.

    partials: for each output, the states with whose partials λ is multiplied. The result is one build; where blocks of
    time are scanned in parallel, two: the one that summarizes each block, and the scan.
    """
    from ...kernels import reverse_scan

    count = sum(map(len, partials))
    written = len(partials) or states
    config = reverse_scan.pick_scan_config(
        steps, units, states, count, written, WARP[target], multiprocessors
    )
    tile = {"S": states, "BLOCK": config.block, "STAGES": config.stages, "VECTOR": vector}
    pointers = ("m", "delta", "carry", "product", "local", "credit", "passed")
    types: dict[str, str | Sequence[str | None]] = {
        **{f"{name}_ptr": "*fp32" for name in pointers},
        **dict.fromkeys(("T", "block_steps", "BN"), "i32"),
        "partial_ptrs": ["*fp32" if nu in of else None for of in partials for nu in range(states)],
        "output_ptrs": ["*fp32"] * len(partials),
    }
    absent = ["credit_ptr"] if partials else []
    if not carry:
        absent.append("carry_ptr")
    module, options = "rjepa_triton.kernels.reverse_scan", {"num_warps": 1}
    if config.steps == steps:
        absent += ["product_ptr", "local_ptr"]
    scan = Build(
        target, f"{module}:_reverse_scan_kernel", types, {**dict.fromkeys(absent), **tile}, divisible, options
    )
    if config.steps == steps:
        return [scan]
    return [Build(target, f"{module}:_block_summary_kernel", types, tile, divisible, options), scan]


def suffix_build(
    target: str, states: int, matrices: int, vector: int = 4, divisible: Sequence[str] = ()
) -> Build:
    """Suffix products R; with `matrices` > 0 the kernel writes U = R φ in their place."""
    from ...kernels import reverse_scan

    config = reverse_scan.pick_config(matrices, states, WARP[target])
    return Build(
        target,
        "rjepa_triton.kernels.reverse_scan:_suffix_kernel",
        types={
            **{f"{name}_ptr": "*fp32" for name in ("m", "phi", "suffix", "arriving", "whole")},
            **dict.fromkeys(["C", "BN", "N"], "i32"),
        },
        constants={
            **dict.fromkeys(["suffix_ptr"] if matrices else ["phi_ptr", "arriving_ptr"]),
            "S": states,
            "MATRICES": matrices,
            "BLOCK": config.block,
            "STAGES": config.stages,
            "VECTOR": vector,
        },
        divisible=divisible,
        options={"num_warps": 1},
    )


def rtrl_build(
    target: str,
    kernel: str,
    config: rtrl_step.Config,
    cell: str = "RGCCell",
    *,
    resets: bool = True,
    divisible: Sequence[str] = (),
) -> Build:
    """A term of exact RTRL's step of a cell with dense matrices. kernel: "jacobian" makes J, "immediate" adds φ yᵀ."""
    from ...backend import triton_cells
    from ...cells import builtin

    made = triton_cells.kernels_of(getattr(builtin, cell)())
    assert made is not None
    states, own, gates = made.functions.states, *made.entries[:2]
    phi = [
        "*fp32" if nu in dict(gates[gate]) else None for nu in range(states) for gate in made.functions.into
    ]
    types: dict[str, str | Sequence[str | None]] = {"phi_ptrs": phi, "N": "i32"}
    if kernel == "jacobian":
        types |= {
            "own_ptrs": ["*fp32" if nu in dict(of) else None for nu in range(states) for of in own],
            "own_strides": ["i32"] * states**2,
            "weight_ptrs": ["*fp32"] * made.functions.matrices,
            "resets_ptr": "*u8",
            "jacobian_ptr": "*fp32",
        }
    else:
        types |= {"gamma_ptr": "*fp32", "before_ptr": "*fp32", "stride_before": "i32"}
    return Build(
        target,
        f"rjepa_triton.kernels.rtrl_step:_rtrl_{kernel}_kernel",
        types=types,
        constants={
            **dict.fromkeys([] if resets or kernel == "immediate" else ["resets_ptr"]),
            "READS": made.functions.reads,
            "S": states,
            "BLOCK_N": config.block_n,
            "BLOCK_M": config.block_m,
            "VECTOR": config.vector,
        },
        divisible=divisible,
        options={"num_warps": config.num_warps},
    )


def heads_build(
    target: str, config: rtrl_heads.Config, precision: str = "ieee", *, gradient: bool = True, states: int = 2
) -> Build:
    """A step of exact RTRL by heads, where each head reads its own units. gradient: whether δ reads γ as well."""
    absent = [] if gradient else ["delta_ptr", "grad_ptr"]
    return Build(
        target,
        "rjepa_triton.kernels.rtrl_heads:_rtrl_heads_kernel",
        types={
            **{f"{name}_ptr": "*fp32" for name in ("gamma", "jacobian", "phi", "y", "delta", "grad")},
            **dict.fromkeys(("B", "H", "b", "K", "M", "stride_phi", "stride_delta"), "i32"),
        },
        constants={
            **dict.fromkeys(absent),
            "S": states,
            "PER_HEAD": True,
            "PRECISION": precision,
            "BLOCK_R": config.block_r,
            "BLOCK_P": config.block_p,
            "BLOCK_K": config.block_k,
            "VECTOR": config.vector,
            "VECTOR_J": config.vector_j,
        },
        options={
            "num_warps": config.num_warps,
            "num_stages": 1,
            **({} if target.startswith("gfx") else {"maxnreg": config.registers}),
        },
    )


def stream_build(
    target: str,
    cell: str,
    units: int,
    *,
    features: int | None = None,
    optimizer: str = "sgd",
    loss: str = "mse",
    resets: bool = False,
    multiprocessors: int = 132,
    **options: Any,
) -> Build | None:
    """A stream's kernel for a layer of a cell of `cells.builtin` with four outputs; None where no GPU holds it.

    features: F; None: the layer's input is the cell's own. options: of `Stream`.
    """
    from ...cells import builtin
    from ...kernels import stream_layout
    from ...layers.layer import TwoPointRNN
    from ...online import stream_given
    from ...online.stream_kernel import InKernel
    from ...online.streams import Stream
    from ...rules import rfp

    layer = TwoPointRNN(getattr(builtin, cell)(), units, input_size=features)
    readout = torch.nn.Linear(units, 4)
    stream = Stream(layer, readout, loss=loss, optimizer=optimizer, backend="torch", **options)  # type: ignore[arg-type]
    parts = stream_given.served_parts(stream, rfp.RULES)
    assert not isinstance(parts, str), parts
    problem = InKernel(stream, parts).problem()
    config = stream_layout.pick_config(problem, WARP[target], multiprocessors)
    if config is None:
        return None
    fixed = stream_layout.constants(problem, config, resets=resets, mask=False, hidden=False)
    functions = {name: {"cell": cell, "function": name.lower()} for name in ("UPDATE", "PARTIALS")}
    absent = dict.fromkeys(["exchange_ptr", "counter_ptr"] if config.team == 1 else [])
    return Build(
        target,
        "rjepa_triton.kernels.cell_stream:_stream_kernel",
        types={
            "table_ptr": "*i64",
            "rates_ptr": "*fp32",
            "exchange_ptr": "*fp32",
            "counter_ptr": "*i32",
            "settings": ["fp32"] * 8,
            **dict.fromkeys(("T", "position", "begins"), "i32"),
        },
        constants={**fixed, **functions, **absent},
        options={"num_warps": config.num_warps},
    )


def cell_builds(
    target: str,
    cell: str,
    vector: int,
    *,
    hidden: int = 64,
    batch: int = 16,
    steps: int = 64,
    multiprocessors: int = 132,
    resets: bool = True,
    save: bool = True,
    last: bool = False,
    carry: bool = True,
    divisible: Sequence[str] = (),
) -> dict[str, Build]:
    """The kernels for any cell, with the functions of one: the name of a class of `cells.builtin`.

    They are those for `hidden` units, `batch` rows and `steps` steps. Where the dual form scans blocks of time in
    parallel, it comes with the summary of each block. save: whether the loop in one launch saves what the backward pass
    needs; last: whether the step backward is a sequence's last; carry: whether the dual form takes later steps' credit.
    A cell without matrices has no step and no such loops.
    """
    from ...backend import triton_cells
    from ...cells import builtin
    from ...kernels import cell_forward, cell_on_chip, cell_partials, cell_step

    made = triton_cells.kernels_of(getattr(builtin, cell)())
    assert made is not None
    sizes, warp, total = made.functions, WARP[target], batch * hidden

    def function(name: str) -> dict[str, str]:
        return {"cell": cell, "function": name}

    def pointers(*names: str) -> dict[str, str]:
        return {f"{name}_ptr": "*fp32" for name in names}

    def integers(*names: str) -> dict[str, str]:
        return dict.fromkeys(names, "i32")

    letters = {"S": sizes.states, "J": sizes.inputs, "F": sizes.saves}
    absent = dict.fromkeys([] if resets else ["resets_ptr"])
    trajectory = {
        **pointers("x", "saved", "before"),
        "own_ptrs": ["*fp32"] * sizes.matrices,
        "own_strides": ["i32"] * sizes.matrices,
        **integers("T", "BN", "N", "stride_before"),
    }
    module, one_warp = "rjepa_triton.kernels", {"num_warps": 1}
    found: dict[str, Build] = {}

    def add(
        name: str,
        kernel: str,
        types: dict[str, Any],
        constants: dict[str, Any],
        options: dict[str, Any] = one_warp,
    ) -> None:
        known = [each for each in divisible if each in types]
        found[name] = Build(target, f"{module}.{kernel}_kernel", types, constants, known, options)

    block = cell_forward.pick_pointwise_config(hidden, warp).block
    strides = [f"stride_{name}" for name in ("x", "before", "after", "next")]
    add(
        "pointwise",
        "cell_forward:_pointwise",
        {
            **pointers("products", "x", "before", "after", "saved", "next"),
            "resets_ptr": "*u8",
            **integers("N", *strides),
        },
        {
            **dict.fromkeys([] if resets else ["resets_ptr", "next_ptr"]),
            **letters,
            "K": sizes.matrices,
            "UPDATE": function("update"),
            "ENTERING": sizes.entering,
            "BLOCK": block,
            "VECTOR": vector,
        },
    )
    add(
        "linearize",
        "cell_partials:_linearize",
        {**trajectory, "out_ptr": "*fp32", "resets_ptr": "*u8", "steps": "i32"},
        {
            **absent,
            **letters,
            "PARTIALS": function("partials"),
            "FOUND": sizes.partials_found,
            "BLOCK": cell_partials.pick_config(1, 1, warp, 1).block,
            "VECTOR": vector,
        },
    )
    read = 2 * sizes.states + sizes.inputs + sizes.saves
    scan = cell_partials.pick_dual_config(steps, total, read, sizes.credits, warp, multiprocessors)
    shared = {**absent, **letters, "BLOCK": scan.block, "STAGES": scan.stages, "VECTOR": vector}
    types = {
        **trajectory,
        **pointers("product", "local", "carry", "passed"),
        "delta_ptrs": ["*fp32"] * sizes.states,
        "written_ptrs": ["*fp32"] * sizes.credits,
        "resets_ptr": "*i32",
        "block_steps": "i32",
    }
    one_block = scan.steps == steps
    sample = torch.empty(
        sizes.inputs, 1, 2, 1, device="meta"
    )  # the credits of matrices and inputs may lie side by side
    rows = [each.stride(1) for each in made.planes.make(sample)[2]]
    add(
        "dual",
        "cell_partials:_dual",
        types,
        {
            **dict.fromkeys(["product_ptr", "local_ptr"] if one_block else []),
            **dict.fromkeys([] if carry else ["carry_ptr"]),
            **shared,
            "DUAL": function("dual"),
            "ROWS": rows,
        },
    )
    if not one_block:
        summary = {**shared, "TRANSITION": function("transition")}
        add("dual-summary", "cell_partials:_dual_summary", types, summary)
    if not sizes.matrices:
        return found

    weights = {"weight_ptrs": ["*fp32"] * sizes.matrices}
    step = cell_step.pick_config(hidden, batch, sizes.matrices, warp)
    add(
        "step",
        "cell_step:_step",
        {
            **pointers("x", "state", "before", "after", "out"),
            **weights,
            "resets_ptr": "*u8",
            **integers("B", "N"),
        },
        {
            **dict.fromkeys([] if resets else ["resets_ptr", "before_ptr"]),
            **letters,
            "K": sizes.matrices,
            "FOUND": sizes.partials_found,
            "WRITTEN": sizes.step_partials,
            "UPDATE": function("update"),
            "PARTIALS": function("partials"),
            "READS": sizes.reads,
            "ENTERING": sizes.into_gates,
            "UNITS": step.units,
            "COLUMNS": step.columns,
            "ROWS": step.rows,
            "VECTOR": vector,
        },
        {"num_warps": step.num_warps},
    )
    strides = [f"stride_{name}" for name in ("x", "before", "delta", "for_input", "passed")]
    add(
        "backward",
        "cell_backward:_backward",
        {
            **pointers("x", "saved", "before", "delta", "entering", "for_input", "passed"),
            "resets_ptr": "*u8",
            **integers("N", *strides),
        },
        {
            **absent,
            **letters,
            "EXACT": function("exact"),
            "INTO": [sizes.into[k] for k in sizes.order],
            "GATES": len(sizes.entering),
            "LAST": last,
            "BLOCK": block,
            "VECTOR": vector,
        },
    )
    if cell_on_chip.on_chip(hidden, 1, sizes.matrices, sizes.inputs, 1, warp):
        small = cell_on_chip.pick_config(hidden, sizes.matrices, warp)
        add(
            "on-chip",
            "cell_on_chip:_on_chip",
            {
                **pointers("x", "weight", "states", "saved"),
                "resets_ptr": "*u8",
                **integers("T", "B", "N"),
            },
            {
                **absent,
                **dict.fromkeys([] if save and sizes.saves else ["saved_ptr"]),
                **letters,
                "UPDATE": function("update"),
                "ENTERING": sizes.entering,
                "SOURCES": [sizes.reads[k] for k in sizes.order],
                "BLOCK": small.block,
                "LANES": warp,
                "HELD": small.held,
            },
            {"num_warps": small.num_warps},
        )
    return found
