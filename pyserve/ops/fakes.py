"""Fake (shape-only) implementations of the ops, for FakeTensor tracing and `opcheck`.

All ops write into tensors that they are given and return nothing, so a fake only has to exist. The
`serves_` ops return a bool.
"""

from __future__ import annotations

import torch

OP_NAMES = (
    "rms_norm", "add_rms_norm", "rope_write_kv", "linear", "linear_add",
    "linear_silu_mul", "serves_linear", "linear_w4a16", "dequantise_w4a16",
    "serves_linear_w4a16", "try_linear_w4a16", "grouped_linear_w4a16", "linear_fp8",
    "dequantise_fp8", "serves_linear_fp8", "linear_w8a8", "serves_linear_w8a8", "try_linear_w8a8",
    "grouped_linear_fp8", "lora_shrink", "lora_expand", "lora_expand_silu_mul", "linear_lora",
    "serves_linear_lora", "silu_mul", "gelu_tanh_mul", "route", "grouped_linear",
    "grouped_linear_silu_mul", "combine_experts", "paged_attention", "rope_attention",
    "plan_attention", "rope_write_latent", "latent_attention", "batched_linear", "plan_step",
    "sample", "apply_bitmask", "logprobs", "all_reduce_add_norm",
    "all_reduce_one_shot", "all_reduce_two_shot", "gather_rows", "broadcast_tokens",
)  # fmt: skip


def register_fakes() -> None:
    """Register the fakes; the schemas must be defined. Called once, by build.load_native."""
    for name in OP_NAMES:
        result = True if name.startswith("serves_") else None
        torch.library.register_fake(f"pyserve::{name}", lambda *args, result=result: result)
