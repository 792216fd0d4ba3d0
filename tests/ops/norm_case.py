"""What both of add_rms_norm's tests, on a CPU and on a card, ask of a norm of what is added."""

from __future__ import annotations

import torch
from torch import Tensor

from pyserve import ops
from pyserve.ops import reference
from tests.ops import oracle


def check_norm_of_what_is_added(
    x: Tensor, residual: Tensor, weight: Tensor, x_weight: Tensor
) -> None:
    """x, residual [..., hidden], weights [hidden], of one dtype and on one device."""
    twin_residual, plain, before = residual.clone(), torch.empty_like(x), residual.clone()
    reference.add_rms_norm(x, twin_residual, weight, 1e-5, plain, 1.0, x_weight)
    out = ops.add_rms_norm(x, residual, weight, 1e-5, offset=1.0, x_weight=x_weight)
    normed = oracle.rms_norm(x, x_weight, 1e-5, 1.0)
    rounded = torch.finfo(x.dtype).eps * normed.abs()  # before it is added
    oracle.assert_ratio(residual, twin_residual, before.double() + normed, sum_errors=rounded)
    reference.rms_norm(residual, weight, 1e-5, plain, 1.0)
    oracle.assert_ratio(out, plain, oracle.rms_norm(residual, weight, 1e-5, 1.0))
