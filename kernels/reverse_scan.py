"""Scans backward in time, unit by unit: credits λ(t), suffix products R(t), and what φ makes of each."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import check_dims, check_runnable, check_tensor, vector_width


@triton.jit
def _load_transition(m_ptr, at, stride_from, stride_to, mask, STATES: tl.constexpr):
    """M of the units `at`: four entries by row, of which one state has the first alone."""
    m00 = tl.load(m_ptr + at, mask=mask, other=0.0)
    if STATES == 1:
        return m00, m00, m00, m00
    m01 = tl.load(m_ptr + stride_from + at, mask=mask, other=0.0)
    m10 = tl.load(m_ptr + stride_to + at, mask=mask, other=0.0)
    m11 = tl.load(m_ptr + stride_to + stride_from + at, mask=mask, other=0.0)
    return m00, m01, m10, m11


# T sets no layout, so it shall not compile the kernel anew when it is 1 or a multiple of 16.
@triton.jit(do_not_specialize=["T"])
def _reverse_scan_kernel(
    m_ptr,  # [S, S, T, B·N]
    delta_ptr,  # [S, T, B·N]
    carry_ptr,  # [S, B·N], or None for zero
    phi_ptr,  # [S, T, B, K, N], or None with entering_ptr
    credit_ptr,  # [S, T, B·N]
    passed_ptr,  # [S, B·N]
    entering_ptr,  # [T, B, K, N], or None
    T,
    BN,
    N,
    STATES: tl.constexpr,
    MATRICES: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    VECTOR: tl.constexpr,  # a divisor of BN, and of N if there is φ: numbers that one access moves
):
    # BN and N themselves, and the compiler sees what divides them.
    BN = BN // VECTOR * VECTOR
    if MATRICES > 0:
        N = N // VECTOR * VECTOR
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < BN
    # Where unit (b, n) of matrix 0 lies in a step of φ and E.
    in_matrix0 = (unit // N).to(tl.int64) * (MATRICES * N) + unit % N
    wide_bn = tl.cast(BN, tl.int64)
    plane = wide_bn * T  # numbers of one (T, B·N)

    arriving0 = tl.zeros((BLOCK,), tl.float32)
    arriving1 = tl.zeros((BLOCK,), tl.float32)
    if carry_ptr is not None:
        arriving0 = tl.load(carry_ptr + unit, mask=mask, other=0.0)
        if STATES == 2:
            arriving1 = tl.load(carry_ptr + wide_bn + unit, mask=mask, other=0.0)

    for step in tl.range(0, T, num_stages=STAGES):
        t = tl.cast(T - 1 - step, tl.int64)
        at = t * BN + unit
        m00, m01, m10, m11 = _load_transition(m_ptr, at, plane, STATES * plane, mask, STATES)
        credit0 = tl.load(delta_ptr + at, mask=mask, other=0.0) + arriving0
        tl.store(credit_ptr + at, credit0, mask=mask)
        arriving0 = m00 * credit0
        if STATES == 2:
            credit1 = tl.load(delta_ptr + plane + at, mask=mask, other=0.0) + arriving1
            tl.store(credit_ptr + plane + at, credit1, mask=mask)
            arriving0 += m10 * credit1
            arriving1 = m01 * credit0 + m11 * credit1
        if entering_ptr is not None:
            for k in tl.static_range(MATRICES):
                at_k = t * BN * MATRICES + in_matrix0 + k * N
                entering = tl.load(phi_ptr + at_k, mask=mask, other=0.0) * credit0
                if STATES == 2:
                    entering += tl.load(phi_ptr + plane * MATRICES + at_k, mask=mask, other=0.0) * credit1
                tl.store(entering_ptr + at_k, entering, mask=mask)

    tl.store(passed_ptr + unit, arriving0, mask=mask)
    if STATES == 2:
        tl.store(passed_ptr + wide_bn + unit, arriving1, mask=mask)


@triton.jit(do_not_specialize=["C"])
def _suffix_kernel(
    m_ptr,  # [S, S, C, B·N]
    phi_ptr,  # [S, C, B, K, N], or None with arriving_ptr
    suffix_ptr,  # [S, S, C, B·N], or None
    arriving_ptr,  # [S, C, B, K, N], or None
    whole_ptr,  # [S, S, B·N]
    C,
    BN,
    N,
    STATES: tl.constexpr,
    MATRICES: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    VECTOR: tl.constexpr,  # a divisor of BN, and of N if there is φ: numbers that one access moves
):
    # BN and N themselves, and the compiler sees what divides them.
    BN = BN // VECTOR * VECTOR
    if MATRICES > 0:
        N = N // VECTOR * VECTOR
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = unit < BN
    in_matrix0 = (unit // N).to(tl.int64) * (MATRICES * N) + unit % N
    wide_bn = tl.cast(BN, tl.int64)
    plane = wide_bn * C

    r00 = tl.full((BLOCK,), 1.0, tl.float32)
    r01 = tl.zeros((BLOCK,), tl.float32)
    r10 = tl.zeros((BLOCK,), tl.float32)
    r11 = tl.full((BLOCK,), 1.0, tl.float32)
    for step in tl.range(0, C, num_stages=STAGES):
        t = tl.cast(C - 1 - step, tl.int64)
        at = t * BN + unit
        if suffix_ptr is not None:
            tl.store(suffix_ptr + at, r00, mask=mask)
            if STATES == 2:
                tl.store(suffix_ptr + plane + at, r01, mask=mask)
                tl.store(suffix_ptr + 2 * plane + at, r10, mask=mask)
                tl.store(suffix_ptr + 3 * plane + at, r11, mask=mask)
        if arriving_ptr is not None:
            for k in tl.static_range(MATRICES):
                at_k = t * BN * MATRICES + in_matrix0 + k * N
                phi0 = tl.load(phi_ptr + at_k, mask=mask, other=0.0)
                if STATES == 1:
                    tl.store(arriving_ptr + at_k, r00 * phi0, mask=mask)
                else:
                    phi1 = tl.load(phi_ptr + plane * MATRICES + at_k, mask=mask, other=0.0)
                    tl.store(arriving_ptr + at_k, r00 * phi0 + r01 * phi1, mask=mask)
                    tl.store(arriving_ptr + plane * MATRICES + at_k, r10 * phi0 + r11 * phi1, mask=mask)
        m00, m01, m10, m11 = _load_transition(m_ptr, at, plane, STATES * plane, mask, STATES)
        if STATES == 1:
            r00 = r00 * m00
        else:
            r00, r01 = r00 * m00 + r01 * m10, r00 * m01 + r01 * m11
            r10, r11 = r10 * m00 + r11 * m10, r10 * m01 + r11 * m11

    tl.store(whole_ptr + unit, r00, mask=mask)
    if STATES == 2:
        tl.store(whole_ptr + wide_bn + unit, r01, mask=mask)
        tl.store(whole_ptr + 2 * wide_bn + unit, r10, mask=mask)
        tl.store(whole_ptr + 3 * wide_bn + unit, r11, mask=mask)


class Config(NamedTuple):
    """Units of one program, which is one warp, and how many steps' loads are under way at once."""

    block: int
    stages: int


def pick_config(K: int, warp_size: int) -> Config:
    """For φ of K matrices, 0 without φ. Pure.

    Four units a lane make 128-bit accesses, and one warp makes as many programs as there can be: they are
    few, and each waits for its own loads alone. Over eight matrices the loads of four steps would ask for
    too much shared memory, and have enough in one step.
    """
    return Config(block=4 * warp_size, stages=4 if K <= 8 else 1)


def _launch(kernel: triton.JITFunction, m: Tensor, phi: Tensor | None, *tensors: Tensor | None) -> None:
    """Run a scan over m (S, S, T, B, N): kernel(*tensors, T, B·N, N, S, K, …)."""
    states, _, steps, batch, units = m.shape
    matrices = 0 if phi is None else phi.shape[3]
    warp_size = torch.cuda.get_device_properties(m.device).warp_size if m.is_cuda else 32
    config = pick_config(matrices, warp_size)
    with torch.cuda.device_of(m):
        kernel[(triton.cdiv(batch * units, config.block),)](
            *tensors,
            steps,
            batch * units,
            units,
            STATES=states,
            MATRICES=matrices,
            BLOCK=config.block,
            STAGES=config.stages,
            VECTOR=vector_width(units if matrices else batch * units, torch.float32),
            num_warps=1,
        )


def _check_transitions(m: Tensor) -> tuple[int, int, int, int]:
    """(S, T, B, N) of m (S, S, T, B, N)."""
    states, columns, steps, batch, units = check_dims("m", m, "SSTBN")
    if states not in (1, 2) or columns != states:
        raise ValueError(f"m must have shape (S, S, T, B, N) with S of 1 or 2, got {tuple(m.shape)}")
    check_tensor("m", m, m.shape, m)
    return states, steps, batch, units


def _check_phi(m: Tensor, phi: Tensor) -> None:
    """phi (S, T, B, K, N) for m (S, S, T, B, N)."""
    states, _, steps, batch, units = m.shape
    matrices = check_dims("phi", phi, "STBKN")[3]
    check_tensor("phi", phi, (states, steps, batch, matrices, units), m)


def reverse_scan(m: Tensor, delta: Tensor, carry: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Credits of a sequence, and what they pass on to the state before its first step.

        λ(t) = δ(t) + M(t+1)ᵀ λ(t+1)         M(T+1)ᵀ λ(T+1) = carry, or zero

    Args:
        m: transitions M (S, S, T, B, N) float32, contiguous, first index the row; S of 1 or 2.
        delta: instantaneous credits δ (S, T, B, N) float32, contiguous.
        carry: credit that later steps pass to the last, (S, B, N) float32, contiguous, or None.

    Nothing is mutated. Fast where four divides B·N.

    Returns:
        λ (S, T, B, N) and M(1)ᵀ λ(1) (S, B, N), float32.

    Raises:
        TypeError: an argument that isn't a tensor, or isn't float32.
        ValueError: a wrong shape (a size of 0 among them), device or stride; tensors that aren't on a GPU,
            where kernels aren't interpreted.
    """
    credit, passed, _ = _scan(m, delta, carry, None)
    return credit, passed


def reverse_scan_entering(
    m: Tensor, delta: Tensor, phi: Tensor, carry: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`reverse_scan` and, in the same pass, the credit that enters each matrix.

        E^k(t) = Σ_ν λ^ν(t) φ^{ν,k}(t),        from which ∂E/∂W^k = Σ_{t,b} E^k(t) y^k(t)ᵀ: one GEMM a matrix

    Args:
        m, delta, carry: as for `reverse_scan`.
        phi: φ (S, T, B, K, N) float32, contiguous, zero where a matrix does not enter a state. Fast where
            four divides N.

    Returns:
        λ (S, T, B, N), M(1)ᵀ λ(1) (S, B, N) and E (T, B, K, N), float32.

    Raises: as `reverse_scan`.
    """
    _check_transitions(m)
    _check_phi(m, phi)
    credit, passed, entering = _scan(m, delta, carry, phi)
    assert entering is not None
    return credit, passed, entering


def _scan(
    m: Tensor, delta: Tensor, carry: Tensor | None, phi: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    states, steps, batch, units = _check_transitions(m)
    check_tensor("delta", delta, (states, steps, batch, units), m)
    if carry is not None:
        check_tensor("carry", carry, (states, batch, units), m)
    check_runnable(_reverse_scan_kernel, "m", m)
    credit = torch.empty_like(delta)
    passed = torch.empty_like(delta[:, 0])
    entering = None if phi is None else torch.empty_like(phi[0])
    _launch(_reverse_scan_kernel, m, phi, m, delta, carry, phi, credit, passed, entering)
    return credit, passed, entering


def suffix_products(m: Tensor) -> tuple[Tensor, Tensor]:
    """R(t) = M(C) … M(t+1) for t = 1 … C, R(C) the identity, and R(0) = M(C) … M(1).

    Args:
        m: (S, S, C, B, N) float32, contiguous, first index the row; S of 1 or 2. Not mutated.

    Returns:
        (S, S, C, B, N) and (S, S, B, N), float32.

    Raises: as `reverse_scan`.
    """
    _check_transitions(m)
    check_runnable(_suffix_kernel, "m", m)
    suffix, whole = torch.empty_like(m), torch.empty_like(m[:, :, 0])
    _launch(_suffix_kernel, m, None, m, None, suffix, None, whole)
    return suffix, whole


def arriving(m: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    """What each step of a chunk still adds to Γ at its end, and R(0); the products R(t) are never written.

        U^{ν,k}(t) = Σ_ν' R^{νν'}(t) φ^{ν',k}(t),        R(t) = M(C) … M(t+1)

    Args:
        m: (S, S, C, B, N) float32, contiguous, first index the row; S of 1 or 2. Not mutated.
        phi: (S, C, B, K, N) float32, contiguous, zero where a matrix does not enter a state. Not mutated.

    Returns:
        U (S, C, B, K, N) and R(0) (S, S, B, N), float32.

    Raises: as `reverse_scan`.
    """
    _check_transitions(m)
    _check_phi(m, phi)
    check_runnable(_suffix_kernel, "m", m)
    entering, whole = torch.empty_like(phi), torch.empty_like(m[:, :, 0])
    _launch(_suffix_kernel, m, phi, m, phi, None, entering, whole)
    return entering, whole
