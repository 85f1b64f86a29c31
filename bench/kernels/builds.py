"""What this package's launchers would have compiled, as a `Build` for each kernel, which `static` compiles and reads.

target names a GPU architecture of `static.TARGETS`; divisible as in `Build`; vector is how many numbers one access of
the kernel moves; resets says whether a reset mask is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .static import WARP, Build

if TYPE_CHECKING:  # triton need not be there to import this
    from ...kernels import (
        gamma_chunk,
        gamma_step,
        rgc_forward,
        rgc_persistent,
        rgc_step,
        rtrl_heads,
        rtrl_step,
    )


def _gamma_types(
    dtype: str, pointers: Sequence[str], integers: Sequence[str]
) -> dict[str, str | Sequence[str | None]]:
    return {
        "gamma0_ptr": f"*{dtype}",
        "gamma1_ptr": f"*{dtype}",
        **{f"{name}_ptr": "*fp32" for name in pointers},
        **dict.fromkeys(integers, "i32"),
    }


def _gamma_constants(
    config: gamma_step.Config | gamma_chunk.Config, states: int, absent: Sequence[str] = (), **more: Any
) -> dict[str, Any]:
    """The tile of a kernel of Γ, and None for the pointers that aren't given, of which Γ's second state may be one."""
    gone = [*absent, *(("gamma1_ptr",) if states == 1 else ())]
    tile = {"BLOCK_N": config.block_n, "BLOCK_M": config.block_m, "VECTOR": config.vector}
    return {**dict.fromkeys(gone), **tile, **more}


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
            **_gamma_types(dtype, ("m", "delta", "grad", "lr"), integers),
            **tuples,
            "rng_state_ptr": "*i64",
        },
        constants=_gamma_constants(config, states, absent, DIAGONAL=own),
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
        types=_gamma_types(dtype, ("credit", "grad"), integers),
        constants=_gamma_constants(config, states),
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
        types=_gamma_types(dtype, ("whole", "u", "y", "credit", "grad"), "CBKNM"),
        constants=_gamma_constants(config, states, BLOCK_C=config.block_c, VECTOR_U=of_u),
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
    tile = {"STATES": states, "BLOCK": config.block, "STAGES": config.stages, "VECTOR": vector}
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

    config = reverse_scan.pick_config(matrices, WARP[target])
    return Build(
        target,
        "rjepa_triton.kernels.reverse_scan:_suffix_kernel",
        types={
            **{f"{name}_ptr": "*fp32" for name in ("m", "phi", "suffix", "arriving", "whole")},
            **dict.fromkeys(["C", "BN", "N"], "i32"),
        },
        constants={
            **dict.fromkeys(["suffix_ptr"] if matrices else ["phi_ptr", "arriving_ptr"]),
            "STATES": states,
            "MATRICES": matrices,
            "BLOCK": config.block,
            "STAGES": config.stages,
            "VECTOR": vector,
        },
        divisible=divisible,
        options={"num_warps": 1},
    )


def rgc_small_build(
    target: str, config: rgc_forward.SmallConfig, *, resets: bool = True, gates: bool = True
) -> Build:
    """The forward pass of an RGC over all steps, with the weights in one multiprocessor."""
    absent = [name for name, given in (("resets_ptr", resets), ("gates_ptr", gates)) if not given]
    return Build(
        target,
        "rjepa_triton.kernels.rgc_forward:_rgc_small_kernel",
        types={
            **{f"{name}_ptr": "*fp32" for name in ("x", "weight", "states", "gates")},
            "resets_ptr": "*u8",
            **dict.fromkeys("TBN", "i32"),
        },
        constants={
            **dict.fromkeys(absent),
            "BLOCK": config.block,
            "LANES": WARP[target],
            "ALL_KEPT": config.all_kept,
        },
        options={"num_warps": config.num_warps},
    )


def rgc_persistent_build(
    target: str,
    config: rgc_persistent.Config,
    vector: int,
    *,
    resets: bool = True,
    divisible: Sequence[str] = (),
) -> Build:
    """The forward pass of an RGC over all steps, with the weights spread over many multiprocessors."""
    from ...kernels import rgc_persistent

    return Build(
        target,
        "rjepa_triton.kernels.rgc_persistent:_rgc_persistent_kernel",
        types={
            **{f"{name}_ptr": "*fp32" for name in ("x", "ss", "ms", "mm", "sm", "states", "gates")},
            "resets_ptr": "*u8",
            "arrived_ptr": "*i64",
            **dict.fromkeys(("T", "B", "N", "rows"), "i32"),
        },
        constants={
            **dict.fromkeys([] if resets else ["resets_ptr"]),
            "UNITS": config.units,
            "CHUNKS": config.chunks,
            "LANES": config.lanes,
            "ROWS": config.tile_rows,
            "ARRIVALS": rgc_persistent.arrivals(config.num_warps, amd=target.startswith("gfx")),
            "COUNTER_STRIDE": rgc_persistent.COUNTER_STRIDE,
            "VECTOR": vector,
        },
        divisible=divisible,
        options={"num_warps": config.num_warps, "launch_cooperative_grid": True},
    )


def rgc_step_build(
    target: str, config: rgc_step.Config, vector: int, *, resets: bool = True, divisible: Sequence[str] = ()
) -> Build:
    """One step of an RGC and its linearization."""
    absent = [] if resets else ["resets_ptr", "before_ptr"]
    arrays = ("u", "ss", "ms", "mm", "sm", "state", "before", "after", "partials")
    return Build(
        target,
        "rjepa_triton.kernels.rgc_step:_rgc_step_kernel",
        types={**{f"{name}_ptr": "*fp32" for name in arrays}, "resets_ptr": "*u8", "B": "i32", "N": "i32"},
        constants={
            **dict.fromkeys(absent),
            "UNITS": config.units,
            "COLUMNS": config.columns,
            "ROWS": config.rows,
            "VECTOR": vector,
        },
        divisible=divisible,
        options={"num_warps": config.num_warps},
    )


def rgc_pointwise_build(
    target: str, vector: int, *, resets: bool = True, divisible: Sequence[str] = ()
) -> Build:
    """The pointwise pass of an RGC's step, after its matrix products."""
    from ...kernels import rgc_forward

    config = rgc_forward.pick_pointwise_config(512, WARP[target])
    strides = [f"stride_{name}" for name in ("before", "after", "next")]
    absent = [] if resets else ["resets_ptr", "next_ptr"]
    return Build(
        target,
        "rjepa_triton.kernels.rgc_forward:_rgc_pointwise_kernel",
        types={
            **{f"{name}_ptr": "*fp32" for name in ("gates", "before", "u", "after", "next")},
            "resets_ptr": "*u8",
            **dict.fromkeys(["N", *strides], "i32"),
        },
        constants={**dict.fromkeys(absent), "BLOCK": config.block, "VECTOR": vector},
        divisible=divisible,
        options={"num_warps": 1},
    )


def rgc_backward_build(
    target: str, vector: int, last: bool = False, *, resets: bool = True, divisible: Sequence[str] = ()
) -> Build:
    """The pointwise pass of an RGC's step backward, beside its matrix product. last: the sequence's last step."""
    from ...kernels import rgc_backward

    config = rgc_backward.pick_config(512, WARP[target])
    arrays = ("gates", "before", "delta", "credit", "entering", "passed")
    absent = [] if resets else ["resets_ptr"]
    return Build(
        target,
        "rjepa_triton.kernels.rgc_backward:_rgc_backward_kernel",
        types={
            **{f"{name}_ptr": "*fp32" for name in (*arrays, "u")},
            "resets_ptr": "*u8",
            **dict.fromkeys(["N", *(f"stride_{name}" for name in arrays[1:])], "i32"),
        },
        constants={**dict.fromkeys(absent), "LAST": last, "BLOCK": config.block, "VECTOR": vector},
        divisible=divisible,
        options={"num_warps": 1},
    )


_OWN = ("ss", "ms", "mm", "sm")
_PARTIALS_TYPES = {
    **{f"{name}_ptr": "*fp32" for name in ("gates", "before", "u", *_OWN)},
    **dict.fromkeys(["T", "BN", "N", *(f"stride_{name}" for name in ("before", *_OWN))], "i32"),
}


def rgc_linearize_build(
    target: str, vector: int, *, resets: bool = True, divisible: Sequence[str] = ()
) -> Build:
    """The linearization of an RGC (partials and M) from its gates."""
    from ...kernels import rgc_partials

    return Build(
        target,
        "rjepa_triton.kernels.rgc_partials:_linearize_kernel",
        types={**_PARTIALS_TYPES, "out_ptr": "*fp32", "resets_ptr": "*u8", "steps": "i32"},
        constants={
            **dict.fromkeys([] if resets else ["resets_ptr"]),
            "BLOCK": rgc_partials.pick_config(1, 1, WARP[target], 1).block,
            "VECTOR": vector,
        },
        divisible=divisible,
        options={"num_warps": 1},
    )


def rgc_dual_build(
    target: str,
    vector: int,
    *,
    steps: int = 64,
    units: int = 1024,
    multiprocessors: int = 132,
    resets: bool = True,
    carry: bool = True,
    divisible: Sequence[str] = (),
) -> list[Build]:
    """RFP's dual form of an RGC over `steps` steps of `units` = B·N units.

    The result is one build; where blocks of time are scanned in parallel, two: the one that summarizes each block, and
    the scan.
    """
    from ...kernels import rgc_partials

    config = rgc_partials.pick_dual_config(steps, units, WARP[target], multiprocessors)
    module, options = "rjepa_triton.kernels.rgc_partials", {"num_warps": 1}
    pointers = ("delta", "product", "local", "carry", "entering", "for_input", "passed")
    types = {
        **_PARTIALS_TYPES,
        **{f"{name}_ptr": "*fp32" for name in pointers},
        "resets_ptr": "*i32",
        "block_steps": "i32",
    }
    shared = {
        **dict.fromkeys([] if resets else ["resets_ptr"]),
        "BLOCK": config.block,
        "STAGES": config.stages,
        "VECTOR": vector,
    }
    absent = [] if carry else ["carry_ptr"]
    if config.steps == steps:
        absent += ["product_ptr", "local_ptr"]
    scan = Build(
        target, f"{module}:_dual_kernel", types, {**dict.fromkeys(absent), **shared}, divisible, options
    )
    if config.steps == steps:
        return [scan]
    return [Build(target, f"{module}:_dual_summary_kernel", types, shared, divisible, options), scan]


def rtrl_build(
    target: str,
    kernel: str,
    config: rtrl_step.Config,
    *,
    resets: bool = True,
    divisible: Sequence[str] = (),
) -> Build:
    """A term of exact RTRL's step of a dense RGC. kernel: "jacobian" makes J, "immediate" adds φ yᵀ to γ."""
    phi = ("phi_ss", "phi_ms", "phi_mm", "phi_sm")
    pointers, strides = {
        "jacobian": (("own_s", "own_m", *phi, "ss", "ms", "mm", "sm", "jacobian"), ("own_s", "own_m")),
        "immediate": (("gamma", *phi, "before"), ("before",)),
    }[kernel]
    return Build(
        target,
        f"rjepa_triton.kernels.rtrl_step:_rtrl_{kernel}_kernel",
        types={
            **{f"{name}_ptr": "*fp32" for name in pointers},
            **({"resets_ptr": "*u8"} if kernel == "jacobian" else {}),
            **dict.fromkeys(["N", *(f"stride_{name}" for name in strides)], "i32"),
        },
        constants={
            **dict.fromkeys([] if resets else ["resets_ptr"]),
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


def cell_builds(
    target: str,
    cell: str,
    vector: int,
    *,
    steps: int = 64,
    units: int = 1024,
    multiprocessors: int = 132,
    resets: bool = True,
    divisible: Sequence[str] = (),
) -> dict[str, Build]:
    """The kernels for any cell, with the functions of one: the name of a class of `cells.builtin`.

    The dual form is that of `steps` steps of `units` = B·N units; where blocks of time are scanned in parallel, it
    comes with the summary of each block.
    """
    from ...backend import triton_cells
    from ...cells import builtin
    from ...kernels import cell_partials, rgc_forward, rgc_partials

    made = triton_cells.kernels_of(getattr(builtin, cell)())
    assert made is not None
    sizes, warp = made.functions, WARP[target]

    def function(name: str) -> dict[str, str]:
        return {"cell": cell, "function": name}

    letters = {"S": sizes.states, "J": sizes.inputs, "F": sizes.saves}
    absent = dict.fromkeys([] if resets else ["resets_ptr"])
    own = {"own_ptrs": ["*fp32"] * sizes.matrices, "own_strides": ["i32"] * sizes.matrices}
    trajectory = {
        **{f"{name}_ptr": "*fp32" for name in ("x", "saved", "before")},
        **own,
        **dict.fromkeys(["T", "BN", "N", "stride_before"], "i32"),
    }
    module, options = "rjepa_triton.kernels.cell_partials", {"num_warps": 1}
    found = {
        "pointwise": Build(
            target,
            "rjepa_triton.kernels.cell_forward:_pointwise_kernel",
            types={
                **{f"{name}_ptr": "*fp32" for name in ("products", "x", "before", "after", "saved", "next")},
                "resets_ptr": "*u8",
                **dict.fromkeys(
                    ["N", *(f"stride_{name}" for name in ("x", "before", "after", "next"))], "i32"
                ),
            },
            constants={
                **dict.fromkeys([] if resets else ["resets_ptr", "next_ptr"]),
                **letters,
                "K": sizes.matrices,
                "UPDATE": function("update"),
                "ENTERING": sizes.entering,
                "BLOCK": rgc_forward.pick_pointwise_config(512, warp).block,
                "VECTOR": vector,
            },
            divisible=divisible,
            options=options,
        ),
        "linearize": Build(
            target,
            f"{module}:_linearize_kernel",
            types={**trajectory, "out_ptr": "*fp32", "resets_ptr": "*u8", "steps": "i32"},
            constants={
                **absent,
                **letters,
                "PARTIALS": function("partials"),
                "FOUND": sizes.partials_found,
                "BLOCK": rgc_partials.pick_config(1, 1, warp, 1).block,
                "VECTOR": vector,
            },
            divisible=divisible,
            options=options,
        ),
    }
    read = 2 * sizes.states + sizes.inputs + sizes.saves
    config = cell_partials.pick_dual_config(steps, units, read, sizes.credits, warp, multiprocessors)
    shared = {**absent, **letters, "BLOCK": config.block, "STAGES": config.stages, "VECTOR": vector}
    types = {
        **trajectory,
        **{f"{name}_ptr": "*fp32" for name in ("product", "local", "carry", "passed")},
        "delta_ptrs": ["*fp32"] * sizes.states,
        "written_ptrs": ["*fp32"] * sizes.credits,
        "resets_ptr": "*i32",
        "block_steps": "i32",
    }
    one_block = config.steps == steps
    found["dual"] = Build(
        target,
        f"{module}:_dual_kernel",
        types,
        {
            **dict.fromkeys(["product_ptr", "local_ptr"] if one_block else []),
            **shared,
            "DUAL": function("dual"),
            "ROWS": [1] * sizes.credits,
        },
        divisible,
        options,
    )
    if not one_block:
        found["dual-summary"] = Build(
            target,
            f"{module}:_dual_summary_kernel",
            types,
            {**shared, "TRANSITION": function("transition")},
            divisible,
            options,
        )
    return found
