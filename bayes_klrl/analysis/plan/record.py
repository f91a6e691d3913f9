"""The record of a plan, and its table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd

from bayes_klrl.checks import check_positive
from bayes_klrl.errors import BayesKLRLError

__all__ = ["Plan", "gib"]


@dataclass(frozen=True)
class Plan:
    """What an algorithm would take on a posterior; made by `bk.plan`.

    Parameters
    ----------
    algorithm
        The algorithm in words.
    num_parameters, num_trained
        Parameters of the prior, and those that a training changes (0 if nothing is trained).
    model_tokens
        Tokens that go through a model until the draws are there: those of `Draws.cost.model_tokens` if no completion ends
        early and no two of a prompt begin alike, else more than these. None: the algorithm would refuse, see `refusal`.
    training_tokens
        Tokens of the training by the same rule, with the pilots of a critic, an optimizer and a twist, and the twist's steps.
    kept
        Bytes of what is in memory all the time, by its name: the parameters, and in a training gradients and optimizer.
    phases
        Bytes at the peak of each phase, by the phase and its items. Phases follow each other.
    particles_per_pass
        Completions, those of all prompts counted, that are decoded at once.
    gradient_rows
        Completions that are differentiated at once; None without a training. More are differentiated one part after the other.
    activation_bytes, checkpointed_bytes
        Bytes that all completions of a training step store for the backward pass, and those with `gradient_checkpointing`; the
        step keeps only those of `gradient_rows` completions at once. 0 without a training.
    available_bytes
        The memory that was at hand; None if it is not known.
    refusal
        Why the algorithm would refuse; None if it would not.
    notes
        What the numbers leave out, and what they rest on.
    is_bound
        Whether the tokens are upper bounds. False: they are expected, or something that reads tokens is not counted, as a note
        says.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> prior = bk.TorchLM.from_pretrained("austen", device="meta")
    >>> ones = bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1), alpha=1.0)
    >>> posterior = bk.Posterior(prior, ones, prompts="It was", max_new_tokens=24)
    >>> planned = bk.plan(posterior, bk.ImportanceSampling(1000))
    >>> f"{planned.num_parameters:,}", planned.fits(8 * 2**30), list(planned.phases)
    ('2,090,688', True, ['decoding'])
    """

    algorithm: str
    num_parameters: int
    num_trained: int
    model_tokens: int | None
    training_tokens: int
    kept: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]
    particles_per_pass: int
    gradient_rows: int | None
    activation_bytes: int
    checkpointed_bytes: int
    available_bytes: int | None
    refusal: str | None = None
    notes: tuple[str, ...] = field(default=())
    is_bound: bool = True

    @property
    def peak_bytes(self) -> int:
        """The largest memory at any time, in bytes: what is kept, and the largest phase."""
        return sum(self.kept.values()) + max((sum(items.values()) for items in self.phases.values()), default=0)

    def fits(self, memory: float | None = None) -> bool:
        """Return whether the peak fits into so many bytes of memory; None: into the memory that was at hand.

        Raises
        ------
        BayesKLRLError
            If the memory at hand is not known, or the number is not positive.
        """
        if memory is None and self.available_bytes is None:
            raise BayesKLRLError("The memory at hand is not known on this system. Give it in bytes: fits(24 * 2**30).")
        if memory is not None:
            check_positive("memory", memory)
        most = self.available_bytes if memory is None else memory
        return self.refusal is None and most is not None and self.peak_bytes <= most

    def table(self) -> pd.DataFrame:
        """Return a pandas DataFrame with one row per item: its phase ("always" for what is kept), and its bytes and GiB."""
        rows = [("always", item, size) for item, size in self.kept.items()]
        rows += [(phase, item, size) for phase, items in self.phases.items() for item, size in items.items()]
        found = pd.DataFrame(rows, columns=["phase", "item", "bytes"])
        found["GiB"] = found["bytes"] / 2**30
        return found

    def __str__(self) -> str:
        lines = [f"{self.algorithm}: {self.num_parameters:,} parameters, {self.num_trained:,} trained"]
        if self.refusal is not None:
            return "\n".join([*lines, f"  would refuse: {self.refusal}"])
        training = f", and {self.training_tokens:,} in training" if self.training_tokens else ""
        most, more = ("at most ", "") if self.is_bound else ("", " (no bound: see the notes)")
        lines.append(f"  {most}{self.model_tokens:,} model tokens{training}{more}")
        lines.append(f"  {self.particles_per_pass:,} completions are decoded at once")
        if self.gradient_rows is not None:
            lines.append(
                f"  {self.gradient_rows:,} completions are differentiated at once; all of a step would store "
                f"{gib(self.activation_bytes)} of activations, or {gib(self.checkpointed_bytes)} with gradient_checkpointing"
            )
        width = max((len(row.item) for row in self.table().itertuples()), default=0)
        lines += [f"  {row.phase:<10} {row.item:<{width}} {gib(row.bytes):>12}" for row in self.table().itertuples()]
        at_hand = "" if self.available_bytes is None else f" of {gib(self.available_bytes)} at hand"
        verdict = "" if self.available_bytes is None else ": it fits" if self.fits() else ": it does not fit"
        lines.append(f"  peak {gib(self.peak_bytes)}{at_hand}{verdict}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def gib(size: int) -> str:
    """Return a number of bytes in words: GiB, or MiB below a hundredth of one."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 / 100 else f"{size / 2**20:,.2f} MiB"
