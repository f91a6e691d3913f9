"""How much is decoded and scored at once: as much as the memory at hand holds, and prompts of like length together.

A model with caches says what a row takes (`row_bytes`, `prompt_bytes`) and what is free (`free_bytes`), as `TorchLM` does; for
other models nothing is bounded. Independent completions are then decoded in parts. Their random numbers belong to the draw and
not to the part, so a part has the draws that it has in the whole; only rounding may differ, as a matrix product's last bit may
with the number of its rows.

A prompt of 2,000 tokens beside prompts of 20 would have each of these padded to 2,000. So prompts whose lengths differ by more
than a factor of 2 (and 64 tokens) are not read in one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bayes_klrl.typing import IntArray

__all__ = ["Part", "free_memory", "length_groups", "parts", "prompt_blocks", "rows_that_fit"]

SHARE = 0.6
"""The share of the free memory that one pass may take; the rest is for logits, for the reward, and for others."""

_CONTROL_GROUP = Path("/sys/fs/cgroup")
_UNBOUNDED = 2**62


class Part(NamedTuple):
    """Some draws of some prompts, which are decoded at once."""

    prompts: IntArray
    """The indices of the prompts, ascending."""
    first: int
    last: int
    """The draws first, ..., last - 1 of each of them."""

    def size(self) -> int:
        """Return the number of completions."""
        return int(self.prompts.size) * (self.last - self.first)

    def of(self, index: IntArray) -> IntArray:
        """Return the rows of the part, where `index` (P, N) has those of all draws."""
        return index[self.prompts, self.first : self.last].ravel()

    def halves(self) -> list[Part]:
        """Return two parts of half of the prompts, or if there is one prompt, of half of its draws; none of one completion."""
        if self.prompts.size > 1:
            return [self._replace(prompts=prompts) for prompts in np.array_split(self.prompts, 2)]
        middle = (self.first + self.last) // 2
        return [] if self.size() <= 1 else [self._replace(last=middle), self._replace(first=middle)]


def free_memory() -> int | None:
    """Return the bytes of main memory that are available to this process; None if the system does not say.

    A container's limit counts, if there is one.
    """
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        limit, used = ((_CONTROL_GROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        inactive = (_CONTROL_GROUP / "memory.stat").read_text().split("\ninactive_file ")[1].split("\n")[0]
        found.append(int(limit) - int(used) + int(inactive))
    except (OSError, IndexError, ValueError):  # no such file, or "max": no limit
        pass
    return max(0, min(found)) if found else None


def length_groups(lengths: Sequence[int]) -> list[IntArray]:
    """Return the indices of prompts of like length together, each group ascending; one group if no length is far from others.

    Examples
    --------
    >>> [group.tolist() for group in length_groups([20, 2000, 10, 70, 1500])]
    [[1, 4], [0, 2, 3]]
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    groups: list[list[int]] = []
    for index in order.tolist():
        if not groups or lengths[groups[-1][0]] > 2 * lengths[index] + 64:
            groups.append([])
        groups[-1].append(index)
    return [np.sort(np.array(group, dtype=np.int64)) for group in groups]


def parts(
    models: Sequence[Any], lengths: Sequence[int], num_draws: int, max_new_tokens: int, budget: int | None = None
) -> list[Part]:
    """Return the parts in which N independent completions of each of P prompts are decoded; one part if all fits.

    Parameters
    ----------
    models
        The models that draw and score.
    lengths
        The number of tokens of each prompt.
    num_draws, max_new_tokens
        N and T.
    budget
        Bytes that one pass may take; None: a share of the free memory.
    """
    found = []
    for group in length_groups(lengths):
        longest = max(lengths[p] for p in group)
        per_prompt = sum(_said(model, "prompt_bytes", longest) for model in _distinct(models))
        per_row = _row_bytes(models, longest + max_new_tokens)
        bytes_ = _UNBOUNDED if not per_prompt + per_row else _budget(models) if budget is None else budget
        most = min([getattr(model, "particles_per_pass", None) or _UNBOUNDED for model in _distinct(models)])
        size = min(most // num_draws, bytes_ // max(1, per_prompt + num_draws * per_row))  # prompts at once
        if size >= 1:
            halves = np.array_split(group, -(-group.size // min(size, group.size)))
            found += [Part(prompts, 0, num_draws) for prompts in halves]
        else:
            size = max(1, min(most, (bytes_ - per_prompt) // max(1, per_row)))  # draws at once
            starts = range(0, num_draws, size)
            found += [
                Part(group[[p]], first, min(first + size, num_draws)) for p in range(group.size) for first in starts
            ]
    return found


def rows_that_fit(models: Sequence[Any], lengths: Sequence[int], max_new_tokens: int) -> int:
    """Return the number of completions, over all prompts, whose states fit into the free memory; at least 1."""
    per_row = _row_bytes(models, max(lengths) + max_new_tokens)
    return max(1, _budget(models) // per_row) if per_row else _UNBOUNDED


def prompt_blocks(
    models: Sequence[Any],
    lengths: Sequence[int],
    rows_per_prompt: int,
    max_new_tokens: int,
    most_rows: int,
    budget: int | None = None,
) -> list[IntArray]:
    """Return indices of prompts whose completions depend on each other, in blocks that are decoded at once.

    Prompts of like length are together, as many as give `most_rows` rows, fewer where memory or a model's
    `particles_per_pass` says so, and at least one. One block if no model says what a row takes.

    Parameters
    ----------
    models
        The models that draw and score.
    lengths
        The number of tokens of each of P prompts.
    rows_per_prompt, max_new_tokens
        Completions per prompt, and T.
    most_rows
        The most rows of a block of more than one prompt.
    budget
        Bytes that one pass may take; None: a share of the free memory.
    """
    per_row = _row_bytes(models, max(lengths) + max_new_tokens)
    if not per_row:
        return [np.arange(len(lengths))]
    fit = (_budget(models) if budget is None else budget) // per_row
    named = [getattr(model, "particles_per_pass", None) or _UNBOUNDED for model in _distinct(models)]
    size = max(1, min(most_rows, fit, *named) // rows_per_prompt)
    return [block for group in length_groups(lengths) for block in np.array_split(group, -(-group.size // size))]


def _budget(models: Sequence[Any]) -> int:
    """Return the bytes that one pass may take."""
    known = [_said(model, "free_bytes") for model in _distinct(models)]
    return min([int(SHARE * bytes_) for bytes_ in known if bytes_], default=_UNBOUNDED)


def _row_bytes(models: Sequence[Any], num_tokens: int) -> int:
    """Return the bytes of one row of so many tokens, over all models that say what they take; 0 if none does."""
    return sum(_said(model, "row_bytes", num_tokens) for model in _distinct(models))


def _said(model: Any, name: str, *arguments: int) -> int:
    """Return what a model's own method says, in bytes; 0 if it has none, or does not know."""
    method = getattr(type(model), name, None)
    return 0 if method is None else int(method(model, *arguments) or 0)


def _distinct(models: Sequence[Any]) -> list[Any]:
    """Return the models that hold states: each once, and those inside of a mixture or under a twist in their place."""
    found: dict[int, Any] = {}
    for model in models:
        inside = [model.base] if hasattr(model, "base") else list(getattr(model, "models", ()))
        found |= {id(each): each for each in (_distinct(inside) if inside else [model])}
    return list(found.values())
