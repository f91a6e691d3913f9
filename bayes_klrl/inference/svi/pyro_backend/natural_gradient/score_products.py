"""Scores of single draws in one parameter, as sums of outer products that are never formed for all draws at once.

`weighted` and `add_gram` are J^T a and J J^T of one parameter; see `per_sample`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayes_klrl.models.torch_lm.scoring import BUDGET

__all__ = ["Outer", "Terms", "Whole", "add_gram", "weighted"]

_BLOCK = BUDGET // 4


@dataclass(frozen=True, eq=False)
class Outer:
    """Scores sum_t left_nt right_nt^T in a parameter of shape (O, I).

    `left` is (B, S, O), or holds (B, S) indices of one-hot vectors.
    """

    rows: Tensor  # (B,)
    left: Tensor
    right: Tensor  # (B, S, I)

    @property
    def one_hot(self) -> bool:
        """Whether `left` holds indices."""
        return self.left.dim() == 2

    def part(self, first: int, last: int) -> Tensor:
        """Return the rows first to last of each draw's score, (B, last - first, I)."""
        if not self.one_hot:
            return torch.bmm(self.left[:, :, first:last].transpose(1, 2), self.right)
        num_rows, size = len(self.left), last - first
        block = self.right.new_zeros((num_rows * size, self.right.shape[2]))
        inside = (self.left >= first) & (self.left < last)
        place = (torch.arange(num_rows, device=self.left.device)[:, None] * size + self.left - first)[inside]
        return block.index_add_(0, place, self.right[inside]).view(num_rows, size, -1)

    def weighted(self, weights: Tensor, parameter: Tensor) -> Tensor:
        """Return the sum of the scores times weights (B,), in the shape of the parameter."""
        right = self.right * weights.to(self.right)[:, None, None]
        if self.one_hot:
            return torch.zeros_like(parameter).index_add_(0, self.left.flatten(), right.flatten(0, 1))
        return self.left.flatten(0, 1).T @ right.flatten(0, 1)

    def along(self, direction: Tensor) -> Tensor:
        """Return the derivatives along a direction, (B,)."""
        read = direction[self.left] if self.one_hot else self.left @ direction
        return (read * self.right).sum(dim=(1, 2))


@dataclass(frozen=True, eq=False)
class Whole:
    """Scores in a parameter, held as they are, (B, *shape)."""

    rows: Tensor  # (B,)
    values: Tensor

    def part(self, first: int, last: int) -> Tensor:
        """See `Outer.part`; a vector is a column."""
        return self.values.reshape(*self.values.shape[:2], -1)[:, first:last]

    def weighted(self, weights: Tensor, parameter: Tensor) -> Tensor:
        """See `Outer.weighted`."""
        total: Tensor = torch.tensordot(weights.to(self.values), self.values, 1)
        return total

    def along(self, direction: Tensor) -> Tensor:
        """See `Outer.along`."""
        return (self.values * direction).flatten(1).sum(dim=1)


Terms = dict[int, list[Outer | Whole]]
"""The terms of each parameter's scores, by the parameter's id."""


def weighted(terms: Sequence[Outer | Whole], weights: Tensor, parameter: Tensor) -> Tensor:
    """Return the sum of all rows' scores in a parameter times weights (R,)."""
    total = torch.zeros_like(parameter, requires_grad=False)
    for term in terms:
        total += term.weighted(weights[term.rows], total)
    return total


def add_gram(gram: Tensor, terms: Sequence[Outer | Whole], parameter: Tensor) -> None:
    """Add the products of the scores in one parameter to `gram`, in the way that takes fewer operations."""
    outers = [term for term in terms if isinstance(term, Outer)]
    num_out = len(parameter) if parameter.dim() else 1
    if outers and len(outers) == len(terms):
        if all(term.one_hot for term in outers):  # rows that no draw touches add nothing
            touched, places = torch.unique(torch.cat([term.left.flatten() for term in outers]), return_inverse=True)
            num_out, sizes = len(touched), [term.left.numel() for term in outers]
            outers = [
                Outer(term.rows, place.view_as(term.left), term.right)
                for term, place in zip(outers, places.split(sizes), strict=True)
            ]
            terms = outers
        if ghost_operations(outers) < block_operations(outers, num_out, len(gram)):
            add_ghost(gram, outers)
            return
    if terms:
        add_blocks(gram, terms, num_out, parameter.numel() // max(1, len(parameter) if parameter.dim() else 1))


def block_operations(terms: Sequence[Outer], num_out: int, num_rows: int) -> int:
    """Return the number of operations of `add_blocks`."""
    num_in = terms[0].right.shape[2]
    made = sum(term.right.numel() * (1 if term.one_hot else num_out) for term in terms)
    return made + num_rows**2 * num_out * num_in


def ghost_operations(terms: Sequence[Outer]) -> int:
    """Return the number of operations of `add_ghost`."""
    positions = [term.right.shape[0] * term.right.shape[1] for term in terms]
    widths = [term.right.shape[2] + (1 if term.one_hot else term.left.shape[2]) + 2 for term in terms]
    return sum(positions) * sum(number * width for number, width in zip(positions, widths, strict=True))


def add_blocks(gram: Tensor, terms: Sequence[Outer | Whole], num_out: int, num_in: int) -> None:
    """Add the products of scores that are made for some rows of the parameter at a time."""
    size = max(1, _BLOCK // (len(gram) * num_in))
    for first in range(0, num_out, size):
        last = min(first + size, num_out)
        block: Tensor | None = None
        for term in terms:
            part = term.part(first, last)
            if block is None:
                if len(terms) == 1:
                    flat = part.flatten(1)
                    gram[term.rows[:, None], term.rows] += (flat @ flat.T).double()
                    break
                block = part.new_zeros((len(gram), last - first, num_in))
            block.index_add_(0, term.rows, part)
        else:
            assert block is not None
            flat = block.flatten(1)
            gram += (flat @ flat.T).double()


def add_ghost(gram: Tensor, terms: Sequence[Outer]) -> None:
    """Add sum_{t,u} (left_nt . left_mu)(right_nt . right_mu), for some rows n at a time."""
    for own in terms:
        num_tokens = own.right.shape[1]
        for other in terms:
            size = max(1, _BLOCK // (num_tokens * other.right.shape[0] * other.right.shape[1]))
            for first in range(0, len(own.rows), size):
                chunk = slice(first, first + size)
                right = own.right[chunk].flatten(0, 1) @ other.right.flatten(0, 1).T
                product = left_products(own.left[chunk], other.left).to(right) * right
                shape = (-1, num_tokens, len(other.rows), other.right.shape[1])
                gram[own.rows[chunk, None], other.rows] += product.view(shape).sum(dim=(1, 3)).double()


def left_products(own: Tensor, other: Tensor) -> Tensor:
    """Return the products of all left vectors of one term with all of another, (B S, B' S')."""
    if own.dim() == 2 and other.dim() == 2:
        return own.flatten()[:, None] == other.flatten()
    if own.dim() == 2:
        return other.flatten(0, 1)[:, own.flatten()].T
    if other.dim() == 2:
        return own.flatten(0, 1)[:, other.flatten()]
    return own.flatten(0, 1) @ other.flatten(0, 1).T
