"""Operations: each a reference that is its definition, and faster implementations that agree with it."""

from __future__ import annotations

from everstate.core.op import OPS, anywhere, on, op, use
from everstate.ops.argmax import argmax
from everstate.ops.attention import AttentionState, Rope, attention, attention_step_
from everstate.ops.conv1d import causal_conv1d, causal_conv1d_step_
from everstate.ops.cross_entropy import linear_cross_entropy
from everstate.ops.delta import gated_delta_scan, gated_delta_step_
from everstate.ops.experts import experts, experts_add_rms_norm, route, topk_router
from everstate.ops.glu import gated, glu
from everstate.ops.linear import linear, linear_activate, linear_add_rms_norm, linear_conv_step_
from everstate.ops.linear_scan import linear_scan, linear_step_
from everstate.ops.lti_conv import lti_conv
from everstate.ops.lti_diagonal import lti_diagonal, lti_diagonal_step_, lti_kernel_diagonal
from everstate.ops.lti_dplr import lti_dplr, lti_dplr_step_, lti_kernel_dplr
from everstate.ops.mamba2 import mamba2_scan
from everstate.ops.mamba2.ends import Mamba2Layer, Mamba2State
from everstate.ops.mamba3 import mamba3_scan, mamba3_step_
from everstate.ops.mamba3.ends import Mamba3Layer
from everstate.ops.norm import add_rms_norm, gated_rms_norm, rms_norm
from everstate.ops.norm.normed import Normed
from everstate.ops.rotary import rotary, rotate
from everstate.ops.selective_scan import mamba1_step_, selective_scan, selective_step_
from everstate.ops.ssd import mamba2_step_, ssd_scan, ssd_step_
from everstate.ops.trapezoid import TrapezoidState, trapezoid_scan, trapezoid_step_

__all__ = [
    "OPS",
    "AttentionState",
    "Mamba2Layer",
    "Mamba2State",
    "Mamba3Layer",
    "Normed",
    "Rope",
    "TrapezoidState",
    "add_rms_norm",
    "anywhere",
    "argmax",
    "attention",
    "attention_step_",
    "causal_conv1d",
    "causal_conv1d_step_",
    "experts",
    "experts_add_rms_norm",
    "gated",
    "gated_delta_scan",
    "gated_delta_step_",
    "gated_rms_norm",
    "glu",
    "linear",
    "linear_activate",
    "linear_add_rms_norm",
    "linear_conv_step_",
    "linear_cross_entropy",
    "linear_scan",
    "linear_step_",
    "lti_conv",
    "lti_diagonal",
    "lti_diagonal_step_",
    "lti_dplr",
    "lti_dplr_step_",
    "lti_kernel_diagonal",
    "lti_kernel_dplr",
    "mamba1_step_",
    "mamba2_scan",
    "mamba2_step_",
    "mamba3_scan",
    "mamba3_step_",
    "on",
    "op",
    "rms_norm",
    "rotary",
    "rotate",
    "route",
    "selective_scan",
    "selective_step_",
    "ssd_scan",
    "ssd_step_",
    "topk_router",
    "trapezoid_scan",
    "trapezoid_step_",
    "use",
]
