"""The problems of the suite: those of theory.md 8, at sizes that are solved quickly, each with its truth and purpose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.posterior import Posterior
from bayes_klrl.problems.constraints import constraint_text, rare_feature
from bayes_klrl.problems.gold import gold_constraint, gold_counter, gold_dense, gold_hidden, gold_posterior
from bayes_klrl.problems.infilling import Infilling, infilling, infilling_truth
from bayes_klrl.problems.modes import two_modes, two_modes_truth
from bayes_klrl.problems.preferences import overoptimisation
from bayes_klrl.problems.record import Problem, Truth, by_enumeration, by_messages

__all__ = ["SUITE", "problem_names"]


def _problems() -> tuple[Problem, ...]:
    """Return the problems in the order of theory.md 8; "-" and a word mark the harder sizes."""
    return (
        Problem("P1", "small enough to enumerate: all must pass", gold_posterior, by_enumeration),
        Problem("P1-sharp", "the same at a small alpha", lambda: gold_posterior(alpha=1 / 4), by_enumeration),
        Problem("P2", "ends early: length is harmless", lambda: gold_posterior(max_new_tokens=50), by_messages),
        Problem("P2-long", "the same at 200 tokens", lambda: gold_posterior(max_new_tokens=200), by_messages),
        Problem("P3", "a dense reward: the prior dies, steps do not", gold_dense, by_messages),
        Problem("P3-long", "the same at 40 tokens", lambda: gold_dense(max_new_tokens=40), by_messages),
        Problem("P4", "a hard constraint, rare with length", gold_constraint, by_messages),
        Problem("P4-long", "the same at 80 tokens", lambda: gold_constraint(80), by_messages),
        Problem("P5", "reward at the very end only", gold_counter, by_messages),
        Problem("P5-rare", "the same, hit once in 160,000", lambda: gold_counter(17), by_messages),
        Problem("P6", "two modes: is one dropped?", two_modes, lambda _: two_modes_truth()),
        Problem(
            "P6-rare",
            "the same at 16 tokens, hit once in 33,000",
            lambda: two_modes(16, alpha=1 / 16),
            lambda _: two_modes_truth(16, alpha=1 / 16),
        ),
        Problem("P7", "a hidden state to be filtered", gold_hidden, by_messages),
        Problem("P8", "a mean to be met", lambda: rare_feature().posterior, by_messages),
        Problem("P8-most", "the same, 99 of 100", lambda: rare_feature(0.99).posterior, by_messages),
        Problem("P9", "infilling, a real model: 2 tokens, 1 after", _short_gap, _short_gap_truth),
        Problem("P9-long", "infilling, a real model: 15 tokens, 10 after", _long_gap, _long_gap_truth),
        Problem("P11", "text under rules, by characters", lambda: constraint_text(20, forbidden=""), by_messages),
        Problem("P11-tight", "the same, more rules and longer", constraint_text, by_messages),
        Problem("P13", "a proxy of 200 preferences", lambda: overoptimisation().posterior, by_messages),
        Problem("P13-few", "a proxy of 20", lambda: overoptimisation(20).posterior, by_messages),
    )


@cache
def _gap(num_tokens: int, num_suffix: int) -> Infilling:
    """Return problem P9 at a size, made once: its truth needs the exact draws that its posterior came with."""
    return infilling(num_tokens, num_suffix)


def _short_gap() -> Posterior:
    return _gap(2, 1).posterior


def _short_gap_truth(_: Posterior) -> Truth:
    return infilling_truth(_gap(2, 1), num_particles=512)


def _long_gap() -> Posterior:
    return _gap(15, 10).posterior


def _long_gap_truth(_: Posterior) -> Truth:
    return infilling_truth(_gap(15, 10), num_particles=256)


SUITE: Mapping[str, Problem] = MappingProxyType({problem.name: problem for problem in _problems()})
"""The problems by name; nothing of them is made before it is asked for."""


def problem_names(names: Sequence[str] | str | None, default: Sequence[str]) -> tuple[str, ...]:
    """Return the names of problems as `SUITE` has them, whatever their case.

    Raises
    ------
    BayesKLRLError
        If there is no such problem, or one is named twice.

    Examples
    --------
    >>> problem_names(["p1", "P3-long"], ())
    ('P1', 'P3-long')
    """
    if names is None:
        return tuple(default)
    known = {name.lower(): name for name in SUITE}
    asked = [names] if isinstance(names, str) else list(names)
    for name in asked:
        if not isinstance(name, str) or name.lower() not in known:
            raise BayesKLRLError(f"There is no problem {name!r} in the suite; choose from {', '.join(SUITE)}.")
    found = tuple(known[name.lower()] for name in asked)
    if not found or len(set(found)) < len(found):
        raise BayesKLRLError(f"Name each problem once, and at least one; got {asked!r}.")
    return found
