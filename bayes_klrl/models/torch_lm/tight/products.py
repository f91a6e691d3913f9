"""Products of hidden states and weights on a CPU, in half the time of torch's own where these are slow.

In float32 torch multiplies by Intel's MKL, which does not use the widest vectors of other makers' processors. oneDNN, which
is part of torch as well, does: on an AMD EPYC of 2024 it takes 0.4 to 0.6 of the time for 16 rows and more, and on processors
without such vectors about the same time as MKL. Few rows and small weights stay with torch, since a call of oneDNN costs
ten microseconds. Which of the two multiplies depends on shapes alone, so seeded results can be repeated.

oneDNN compiles a kernel for every shape, which takes 0.2 milliseconds and 0.2 MB, and the number of rows changes from step to
step where completions end. So it is given numbers of rows from a short list, eight from each power of 2 to the next: others
are filled up, or the rows above are left to torch.

The two libraries add in another order, so results differ by rounding, as they do between two machines. With
`torch.backends.mkldnn.flags(enabled=False)` torch's own products are used everywhere.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayes_klrl.models.torch_lm.tight.activation import tanh_gelu

__all__ = ["gelu_linear", "linear"]

LEAST_ROWS = 4
"""Number of rows from which oneDNN multiplies."""

LEAST_WORK = 2**21
"""Number of multiplications from which oneDNN multiplies."""

_available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch's own lack of annotations
_product: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if _available else None


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return inputs weight' + bias, differentiable, the same as `torch.nn.functional.linear` to rounding.

    Parameters
    ----------
    inputs, weight, bias
        Of shape (..., K), (N, K) and (N,).

    Returns
    -------
    Products of shape (..., N).

    Examples
    --------
    >>> inputs, weight = torch.randn(64, 128), torch.randn(512, 128)
    >>> torch.testing.assert_close(linear(inputs, weight), inputs @ weight.t(), rtol=0, atol=1e-4)
    """
    if not suits_onednn(inputs, weight, bias):
        return F.linear(inputs, weight, bias)
    if inputs.dim() != 2:
        return linear(inputs.flatten(0, -2), weight, bias).view(*inputs.shape[:-1], weight.shape[0])
    if not wants_gradient(inputs, weight, bias):
        return product(inputs, weight, bias)
    found: Tensor = _Linear.apply(inputs, weight, bias)  # type: ignore[no-untyped-call]  # torch's own lack of annotations
    return found


def gelu_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `tanh_gelu(linear(inputs, weight, bias))` of inputs (M, K); in one kernel where no gradient is wanted."""
    if wants_gradient(inputs, weight, bias) or not suits_onednn(inputs, weight, bias):
        return tanh_gelu(linear(inputs, weight, bias))
    return product(inputs, weight, bias, "gelu", "tanh")


def wants_gradient(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether the product has to be differentiable."""
    wanted = inputs.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    return wanted and torch.is_grad_enabled()


def suits_onednn(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether oneDNN can compute this product, and takes no longer than torch."""
    num_outputs, num_inputs = weight.shape
    work = inputs.numel() * num_outputs
    return (
        work >= max(LEAST_WORK, LEAST_ROWS * num_inputs * num_outputs)
        and plain(inputs)
        and plain(weight)
        and (bias is None or plain(bias))
        and _product is not None
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


def plain(tensor: Tensor) -> bool:
    """Return whether this is an ordinary tensor of float32 on the CPU, not one that is spread over processes or traced."""
    return (
        tensor.dtype is torch.float32
        and tensor.is_cpu
        and type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
    )


def product(rows: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", form: str = "") -> Tensor:
    """Return rows weight' + bias by oneDNN, without a gradient, or an activation of it; rows (M, K), weight (N, K)."""
    (num_rows, num_inputs), num_outputs = rows.shape, weight.shape[0]
    step = row_step(num_rows)
    above = num_rows % step
    if not above:
        return multiplied(rows, weight, bias, activation, form)
    if num_inputs > num_outputs and activation == "none":  # copy the narrower side
        found = rows.new_empty((num_rows, num_outputs))
        found[:-above] = multiplied(rows[:-above], weight, bias)
        found[-above:] = F.linear(rows[-above:], weight, bias)
        return found
    filled = rows.new_zeros((num_rows + step - above, num_inputs))
    filled[:num_rows] = rows
    # shortened in place: a slice is a view, which autograd does not let anybody write to
    return multiplied(filled, weight, bias, activation, form).resize_(num_rows, num_outputs)


def row_step(num_rows: int) -> int:
    """Return the number of which oneDNN is given multiples, at most an eighth of the number of rows.

    Examples
    --------
    >>> [row_step(num_rows) for num_rows in (5, 16, 17, 64, 100, 1000)]
    [1, 1, 2, 4, 8, 64]
    """
    return 1 << max(0, (num_rows - 1).bit_length() - 4)


def multiplied(rows: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none", form: str = "") -> Tensor:
    """Return what oneDNN computes from these very shapes."""
    found: Tensor = _product(in_order(rows), in_order(weight), bias, activation, [], form)
    return found


def in_order(matrix: Tensor) -> Tensor:
    """Return a matrix that is stored row by row or column by column, without gaps: this one, or a copy."""
    (num_rows, num_columns), (down, right) = matrix.shape, matrix.stride()
    together = (right == 1 and down == num_columns) or (down == 1 and right == num_rows)
    return matrix if together else matrix.contiguous()


class _Linear(torch.autograd.Function):
    """The product with its gradient; each gradient is a product too, and has a gradient of its own."""

    @staticmethod
    def forward(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(rows, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        rows, weight, _ = inputs
        ctx.save_for_backward(rows, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (rows, weight), (gradient,) = ctx.saved_tensors, gradients
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        return (
            linear(gradient, weight.t()) if of_rows else None,
            weight_gradient(gradient, rows) if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )


def weight_gradient(gradient: Tensor, rows: Tensor) -> Tensor:
    """Return gradient' rows (N, K), of (M, N) and (M, K): the smaller of N and K is the number of rows that oneDNN sees."""
    num_rows, narrower = len(rows), gradient.shape[1] <= rows.shape[1]
    if wants_gradient(gradient, rows, None) or not suits_onednn(rows, gradient.t(), None):
        return gradient.t() @ rows
    whole = num_rows - num_rows % row_step(num_rows)
    first, second = gradient[:whole].t(), rows[:whole].t()
    found = multiplied(first, second, None) if narrower else multiplied(second, first, None).t()
    return found if whole == num_rows else found.addmm_(gradient[whole:].t(), rows[whole:])
