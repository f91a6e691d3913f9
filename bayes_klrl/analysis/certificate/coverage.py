"""Dropped modes: the mass that policy and posterior put on the cells of a user's feature.

A policy that lost half of the posterior is 0.69 nats away in KL(q || p*), and its own draws show nothing of it: log-weights
are constant where it looks. A feature that tells the modes apart does show it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.reward_functions.signatures import parameters
from bayes_klrl.typing import FloatArray
from bayes_klrl.weights import normalised

__all__ = ["Coverage", "Feature", "coverage"]

Feature = Callable[..., Sequence[Any]]
_MOST_CELLS = 50
_DROPPED = 0.1
_QUANTILE = 1.96


@dataclass(frozen=True, eq=False)
class Coverage:
    """Masses of the C cells of a feature under policy and posterior, means over prompts.

    Parameters
    ----------
    cells
        The values of the feature, those of largest posterior mass first.
    policy, posterior
        Masses, shape (C,).
    policy_se, posterior_se
        Standard errors of these masses, shape (C,).
    source
        The draws that the posterior's masses come from, in words.
    """

    cells: tuple[Any, ...]
    policy: FloatArray
    posterior: FloatArray
    policy_se: FloatArray
    posterior_se: FloatArray
    source: str

    @property
    def dropped(self) -> tuple[Any, ...]:
        """Cells to which the policy surely gives less than a tenth of their posterior mass, at 95 % each."""
        least = self.posterior - _QUANTILE * self.posterior_se
        most = self.policy + _QUANTILE * self.policy_se
        return tuple(cell for cell, is_dropped in zip(self.cells, most < _DROPPED * least, strict=True) if is_dropped)


def coverage(feature: Feature, policy_draws: Draws, posterior_draws: Draws, source: str) -> Coverage:
    """Return the masses of a feature's cells.

    Parameters
    ----------
    feature
        A function that takes a list of texts, or with two parameters (tokens (N, T), lengths (N,)), and returns one label per
        completion.
    policy_draws
        Equally weighted draws of the policy.
    posterior_draws
        Exact or weighted draws of the posterior.
    source
        The name of `posterior_draws` in the certificate.

    Raises
    ------
    BayesKLRLError
        If the feature raises, returns another number of labels, or more than 50 different ones.
    """
    ours, theirs = labels_of(feature, policy_draws), labels_of(feature, posterior_draws)
    cells = distinct([*ours.ravel(), *theirs.ravel()])
    equal = np.full(ours.shape, 1.0 / ours.shape[1])
    policy, policy_se = masses(ours, equal, cells)
    posterior, posterior_se = masses(theirs, normalised(posterior_draws.log_weights), cells)
    order = np.argsort(-posterior, kind="stable")
    return Coverage(
        tuple(cells[i] for i in order), policy[order], posterior[order], policy_se[order], posterior_se[order], source
    )


def labels_of(feature: Feature, draws: Draws) -> np.ndarray:
    """Return the feature of every draw, shape (P, N), as Python objects."""
    if not callable(feature):
        raise BayesKLRLError(f"A feature is a function of a list of texts, or of (tokens, lengths); got {feature!r}.")
    reads_tokens = len(parameters(feature)[0]) == 2
    read: tuple[Any, ...] = (draws.tokens.reshape(-1, draws.tokens.shape[2]), draws.lengths.ravel())
    if not reads_tokens:
        read = ([text for texts in draws.texts() for text in texts],)
    try:
        values = feature(*read)
        listed = values.tolist() if hasattr(values, "tolist") else list(values)
    except Exception as error:  # whatever a user's function raises, or returns that is no list
        raise BayesKLRLError(
            f"The feature must take {'(tokens, lengths)' if reads_tokens else 'a list of texts'} and return one label each; "
            f"it failed with {type(error).__name__}: {error}."
        ) from error
    if len(listed) != draws.lengths.size:
        raise BayesKLRLError(f"The feature returned {len(listed)} labels for {draws.lengths.size} completions.")
    distinct(listed)
    labels = np.empty(len(listed), dtype=object)
    labels[:] = listed
    return labels.reshape(draws.shape)


def distinct(labels: Sequence[Any]) -> list[Any]:
    """Return the different labels, refusing what is no partition into a few cells."""
    strange = next((label for label in labels if not isinstance(label, Hashable) or label != label), None)
    if strange is not None:
        raise BayesKLRLError(
            f"The feature returned the label {strange!r}; a label is a number, a text or a tuple, and equal to itself."
        )
    cells = sorted(set(labels), key=str)
    if len(cells) > _MOST_CELLS:
        raise BayesKLRLError(
            f"The feature has {len(cells)} different values, {cells[:3]} and so on; a partition into at most {_MOST_CELLS} "
            "cells is needed. Round it, or put it into bins."
        )
    return cells


def masses(labels: np.ndarray, weights: FloatArray, cells: Sequence[Any]) -> tuple[FloatArray, FloatArray]:
    """Return each cell's mass, mean over prompts, and its standard error: sum_n W_n^2 (1[cell] - mass)^2 of each prompt.

    A cell that was not seen may still have 3 / ESS (the rule of three), not 0.
    """
    mass, error = np.empty(len(cells)), np.empty(len(cells))
    floor = 3 / _QUANTILE * np.square(weights).sum(axis=1)
    for i, cell in enumerate(cells):
        inside = np.array([[bool(label == cell) for label in row] for row in labels])
        of_prompt = (weights * inside).sum(axis=1)
        variance = (np.square(weights) * np.square(inside - of_prompt[:, None])).sum(axis=1)
        mass[i] = of_prompt.mean()
        error[i] = np.sqrt(np.maximum(variance, np.square(floor)).sum()) / len(labels)
    return mass, error
