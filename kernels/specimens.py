"""Every kernel in the variants that the engine asks for, as compiled.py compiles it, at Llama-3.1-8B's shapes."""

from __future__ import annotations

from typing import Any

import triton.language as tl

from . import (
    adamw,
    adamw_8bit,
    adamw_norms,
    adamw_plan,
    linear_cross_entropy,
    linear_cross_entropy_fp8,
    quantize_fp8,
    rms_norm,
    rotary,
    rotary_norm,
    swiglu,
)
from .compiled import Specimen

H, K, E, R = 32, 8, 128, 64


def _norms(floats: str, width: int) -> list[Specimen]:
    block_n, block_d, warps = rms_norm.LAUNCH.tile(width)
    tile = {"BLOCK_N": block_n, "BLOCK_D": block_d}
    pointers = {"rstd_ptr": "fp32", "d_gamma_parts_ptr": "fp32"}

    def norm(name: str, kernel: Any, *absent: str, **switches: bool) -> Specimen:
        # The pointer of what is absent or not wanted is None, as in the launcher: nothing is allocated for it.
        return Specimen(name, kernel, {**switches, **dict.fromkeys(absent), **tile}, warps, floats, pointers)

    forward, backward = rms_norm._rms_norm_forward_kernel, rms_norm._rms_norm_backward_kernel
    plain = {"HAS_GAMMA": True, "UNIT_OFFSET": False}
    both = {"NEED_D_X": True, "NEED_D_GAMMA": True}
    alone = {"HAS_UPDATE": False, "HAS_RESIDUAL": False}
    return [
        norm("rms_norm forward", forward, "update_ptr", "sum_ptr", "residual_ptr", **alone, **plain),
        norm(
            "rms_norm forward, residual add", forward, "residual_ptr", HAS_UPDATE=True, HAS_RESIDUAL=False, **plain,
        ),
        norm(
            "rms_norm forward, 1 + gamma, residual after it", forward, "update_ptr", "sum_ptr",
            HAS_UPDATE=False, HAS_RESIDUAL=True, HAS_GAMMA=True, UNIT_OFFSET=True,
        ),
        norm(
            "rms_norm forward, without gamma", forward, "update_ptr", "sum_ptr", "gamma_ptr", "residual_ptr",
            **alone, HAS_GAMMA=False, UNIT_OFFSET=False,
        ),
        norm("rms_norm backward", backward, "d_residual_ptr", HAS_RESIDUAL=False, **both, **plain),
        norm("rms_norm backward, residual add", backward, HAS_RESIDUAL=True, **both, **plain),
        norm("the same, 1 + gamma", backward, HAS_RESIDUAL=True, HAS_GAMMA=True, UNIT_OFFSET=True, **both),
        norm(
            "rms_norm backward, d_x only", backward, "d_gamma_parts_ptr", "d_residual_ptr",
            HAS_RESIDUAL=False, NEED_D_X=True, NEED_D_GAMMA=False, **plain,
        ),
    ]  # fmt: skip


def _gated(floats: str) -> list[Specimen]:
    block = {"BLOCK_F": swiglu.LAUNCH.block_f}

    def gated(name: str, kernel: Any, **constants: Any) -> Specimen:
        return Specimen(name, kernel, {**constants, **block}, swiglu.LAUNCH.num_warps, floats)

    forward, backward = swiglu._gated_forward_kernel, swiglu._gated_backward_kernel
    return [
        gated("swiglu forward", forward, ACTIVATION="silu"),
        gated("swiglu backward, product again", backward, ACTIVATION="silu", NEED_Y=True),
        gated("geglu forward", forward, ACTIVATION="gelu"),
        gated("geglu backward, product again", backward, ACTIVATION="gelu", NEED_Y=True),
    ]


def _rotary(floats: str) -> list[Specimen]:
    pointers = {"cos_ptr": "fp32", "sin_ptr": "fp32", "positions_ptr": "i64", "d_gamma_parts_ptr": "fp32"}
    blocks, warps = rotary.LAUNCH.tile(H + K, R, 0)
    turn = {"E": E, "R": R, "BLOCK_G": blocks["BLOCK_G"], "BLOCK_R": blocks["BLOCK_R"]}
    numbers, _, _ = rotary_norm._norm_tile(H, K, E, R)
    norm_warps = numbers.pop("num_warps")

    def normed(name: str, kernel: Any, **switches: Any) -> Specimen:
        return Specimen(
            name, kernel, {**numbers, "UNIT_OFFSET": False, **switches}, norm_warps, floats, pointers,
            ragged=("N", "P", "H", "K"),
        )  # fmt: skip

    return [
        Specimen(
            f"rotary {name}", rotary._rotary_kernel, {**turn, "INVERSE": inverse}, warps, floats, pointers,
            ragged=("N", "P", "HEADS"),
        )
        for name, inverse in (("forward", False), ("backward", True))
    ] + [
        normed("rotary with q/k norm, forward", rotary_norm._rotary_norm_forward_kernel),
        normed(
            "rotary with q/k norm, backward", rotary_norm._rotary_norm_backward_kernel, NEED_D_QKV=True,
            NEED_D_GAMMA=True,
        ),
    ]  # fmt: skip


def _loss(floats: str) -> list[Specimen]:
    launch = linear_cross_entropy.LAUNCH

    def loss(name: str, need_d_logits: bool, capped: bool) -> Specimen:
        constants = {
            "IGNORED": linear_cross_entropy.IGNORED_LABEL, "CAPPED": capped, "NEED_D_LOGITS": need_d_logits,
            "BLOCK_V": launch.block_v, "BLOCK_D": launch.block_d,
        }  # fmt: skip
        return Specimen(
            name, linear_cross_entropy._cross_entropy_forward_kernel, constants, launch.num_warps, floats,
            {"labels_ptr": "i64", "loss_ptr": "fp32"}, {"cap": "fp32"}, (),
        )  # fmt: skip

    return [
        loss("cross_entropy, loss and gradient", True, False),
        loss("cross_entropy, loss only", False, False),
        loss("cross_entropy, loss and gradient, soft-cap", True, True),
    ]


def _fp8(floats: str) -> list[Specimen]:
    """Ada and later: cards before it convert to no e4m3."""
    launch, loss = quantize_fp8.LAUNCH, linear_cross_entropy.LAUNCH
    pointers = {"q_ptr": "fp8e4nv", "transposed_ptr": "fp8e4nv", "scale_ptr": "fp32", "largest_ptr": "fp32"}
    pointers |= {"labels_ptr": "i64", "loss_ptr": "fp32", "weight_ptr": "fp32", "mean_ptr": "fp32"}
    pointers |= {"q_hidden_ptr": "fp8e4nv", "q_rows_ptr": "fp8e4nv", "hidden_scale_ptr": "fp32"}
    pointers |= {"rows_scale_ptr": "fp32", "outliers_ptr": "i64", "shift_ptr": "fp32"}
    pointers |= {"least_ptr": "fp32", "most_ptr": "fp32"}

    def fp8(name: str, kernel: Any, warps: int, *ragged: str, scalars: dict[str, str] | None = None,
            **constants: Any) -> Specimen:  # fmt: skip
        return Specimen(name, kernel, constants, warps, floats, pointers, scalars or {}, ragged, least=89)

    def both(name: str, **switches: Any) -> Specimen:
        return fp8(
            name, quantize_fp8._quantize_tensor_kernel, launch.num_warps, "N", EXPONENT=8, TILE_N=launch.tile_n,
            TILE_D=launch.tile_d, **switches,
        )  # fmt: skip

    rows: dict[str, Any] = {"IGNORED": linear_cross_entropy.IGNORED_LABEL, "BLOCK_D": loss.block_d}
    return [
        fp8("fp8 rows", quantize_fp8._quantize_rows_kernel, launch.num_warps, EXPONENT=8, BLOCK_D=launch.block_d,
            SHIFTED=False, LEFT=True, BLOCK_J=0, outliers_ptr=None, shift_ptr=None),
        fp8("fp8 rows, rests behind", quantize_fp8._quantize_rows_kernel, launch.num_warps, EXPONENT=8,
            BLOCK_D=launch.block_d, SHIFTED=False, LEFT=True, BLOCK_J=64, shift_ptr=None),
        fp8("fp8 rows of a head", quantize_fp8._quantize_rows_kernel, launch.num_warps, EXPONENT=8,
            BLOCK_D=launch.block_d, SHIFTED=True, LEFT=False, BLOCK_J=64),
        fp8("fp8 columns of a head", quantize_fp8._quantize_columns_kernel, launch.num_warps, "N", EXPONENT=8,
            TILE_N=launch.tile_n, TILE_D=launch.tile_d),
        both("fp8 matrix", PLAIN=True, TRANSPOSED=False, transposed_ptr=None),
        both("fp8 matrix, transposed", PLAIN=False, TRANSPOSED=True, q_ptr=None),
        both("fp8 matrix, both ways", PLAIN=True, TRANSPOSED=True),
        fp8(
            "fp8 cross_entropy, loss and gradient", linear_cross_entropy_fp8._cross_entropy_fp8_kernel, loss.num_warps,
            scalars={"cap": "fp32"}, CAPPED=False, NEED_D_LOGITS=True, BLOCK_V=loss.block_v, **rows,
        ),
        fp8(
            "fp8 cross_entropy, soft-cap", linear_cross_entropy_fp8._cross_entropy_fp8_kernel, loss.num_warps,
            scalars={"cap": "fp32"}, CAPPED=True, NEED_D_LOGITS=True, BLOCK_V=loss.block_v, **rows,
        ),
        fp8("fp8 cross_entropy, target's term", linear_cross_entropy_fp8._add_target_kernel, loss.num_warps, **rows),
    ]  # fmt: skip


def _adamw() -> list[Specimen]:
    launch = adamw_plan.LAUNCH
    pointers = {"table_ptr": "i64", "map_ptr": "i32", "sums_ptr": "fp32", "control_ptr": "fp32", "powers_ptr": "fp64"}
    pointers |= {"bounds_ptr": "i32", "norms_ptr": "fp64", "given_ptr": "i32"}
    host: dict[str, Any] = {"GIVEN": False, "given_ptr": None}
    given: dict[str, Any] = {"GIVEN": True}
    scalars = {"eps": "fp32", "decay": "fp32", "clip": "fp32", "lr": "fp32"}

    def step(name: str, kernel: Any, warps: int, *ragged: str, sums: str = "fp32", **constants: Any) -> Specimen:
        types = {**pointers, "sums_ptr": sums}
        return Specimen(name, kernel, constants, warps, pointers=types, scalars=scalars, ragged=ragged)

    return [
        step(
            "adamw sum of squares", adamw._sum_of_squares_kernel, launch.num_warps, "blocks", GRAD=tl.bfloat16,
            ALIGNED=True, TILES=launch.tiles_per_sum, TILE=launch.tile,
        ),
        step(
            "adamw norm, clip, powers", adamw._control_kernel, launch.fold_warps, "P", NORMS=False, CLIP=True,
            BLOCK_P=launch.sums_per_round, **host,
        ),
        step(
            "adamw norm, clip, powers, rate on the device", adamw._control_kernel, launch.fold_warps, "P",
            NORMS=False, CLIP=True, BLOCK_P=launch.sums_per_round, **given,
        ),
        step(
            "adamw norm of each tensor", adamw_norms._norms_kernel, launch.fold_warps,
            BLOCK_P=launch.sums_per_round,
        ),
        step(
            "adamw norm, clip, powers, of norms", adamw._control_kernel, launch.fold_warps, "P", sums="fp64",
            NORMS=True, CLIP=True, BLOCK_P=launch.sums_per_round, **host,
        ),
        step(
            "adamw, fp32 state, bf16 copy", adamw._update_fp32_kernel, launch.fp32_warps, GRAD=tl.bfloat16,
            HAS_LEAF=True, ALIGNED=True, TILE=launch.tile, **host,
        ),
        step(
            "adamw, fp32 state, bf16 copy, decay on the device", adamw._update_fp32_kernel, launch.fp32_warps,
            GRAD=tl.bfloat16, HAS_LEAF=True, ALIGNED=True, TILE=launch.tile, **given,
        ),
        step(
            "adamw, 8-bit state, bf16 weight", adamw_8bit._update_8bit_kernel, launch.num_warps, "key", "first",
            GRAD=tl.bfloat16, WEIGHT=tl.bfloat16, ROUNDED=True, ALIGNED=True, ROWS=launch.tile // adamw_plan.GROUP,
            **host,
        ),
        step(
            "adamw, 8-bit state, bf16 weight, decay and key on the device", adamw_8bit._update_8bit_kernel,
            launch.num_warps, "key", "first", GRAD=tl.bfloat16, WEIGHT=tl.bfloat16, ROUNDED=True, ALIGNED=True,
            ROWS=launch.tile // adamw_plan.GROUP, **given,
        ),
    ]  # fmt: skip


def specimens(floats: str = "bf16", width: int = 4096) -> list[Specimen]:
    """The variants that training asks for.

    Args:
        floats: "bf16" or "fp32", the type of activations.
        width: D of the RMSNorm.
    """
    return [*_norms(floats, width), *_rotary(floats), *_gated(floats), *_loss(floats), *_fp8(floats), *_adamw()]
