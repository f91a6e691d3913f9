"""Which number of a classifier's output is the reward: the log-probability of a label, or a logit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.typing import FloatArray

__all__ = ["OUTPUTS", "Head", "head_of"]

OUTPUTS = ("log_prob", "logit")


@dataclass(frozen=True)
class Head:
    """One number of K logits.

    Parameters
    ----------
    label
        The label's name; None: there is one logit only.
    index
        Its place among the K logits.
    output
        "log_softmax" (labels exclude each other), "log_sigmoid" (several labels may hold at once) or "logit".
    """

    label: str | None
    index: int
    output: str

    @property
    def is_log_prob(self) -> bool:
        """Whether the number is a log-probability, at most 0."""
        return self.output != "logit"

    def of_logits(self, logits: FloatArray) -> FloatArray:
        """Return the number of M rows of logits, (M, K) to (M,)."""
        own: FloatArray = logits[:, self.index]
        if self.output == "log_softmax":
            high = logits.max(axis=1)
            own = own - high - np.log(np.exp(logits - high[:, None]).sum(axis=1))
        elif self.output == "log_sigmoid":
            own = -np.logaddexp(0.0, -own)
        return own


def head_of(config: Any, label: str | int | None, output: str | None) -> Head:
    """Return the number that `label` and `output` mean for a model with this configuration; see `ClassifierReward`.

    Raises
    ------
    BayesKLRLError
        If there is no such label (the message lists those that exist), or the output does not fit the kind of model.
    """
    if output not in (None, *OUTPUTS):
        raise BayesKLRLError(f'output is "log_prob", "logit" or None; got {output!r}.')
    names = {int(index): str(name) for index, name in (getattr(config, "id2label", None) or {}).items()}
    num_labels, problem = int(config.num_labels), getattr(config, "problem_type", None)
    if label is None and num_labels > 1:
        raise BayesKLRLError(f"label says whose probability is the reward; this model has the labels {_listed(names)}.")
    index = 0 if label is None else _index_of(label, names, num_labels)
    is_regression = problem == "regression"
    if is_regression and output == "log_prob":
        raise BayesKLRLError(
            'This model was trained for regression (problem_type = "regression"): its numbers are no probabilities. Use '
            'output="logit".'
        )
    wanted = output or ("logit" if num_labels == 1 or is_regression else "log_prob")
    if wanted == "log_prob":
        wanted = "log_sigmoid" if num_labels == 1 or problem == "multi_label_classification" else "log_softmax"
    return Head(None if num_labels == 1 and label is None else names.get(index, str(index)), index, wanted)


def _index_of(label: str | int, names: dict[int, str], num_labels: int) -> int:
    """Return the index of a label that is given by name or index."""
    if isinstance(label, str):
        found = [index for index, name in names.items() if name == label]
        if len(found) > 1:
            raise BayesKLRLError(f"Several labels are called {label!r}; give one of the indices {found}.")
        if found:
            return found[0]
    elif not isinstance(label, bool) and isinstance(label, int | np.integer) and 0 <= label < num_labels:
        return int(label)
    raise BayesKLRLError(f"There is no label {label!r}. This model has the labels {_listed(names)}.")


def _listed(names: dict[int, str]) -> str:
    """Return the names of the labels, with their indices, for a message."""
    return ", ".join(f"{name!r} ({index})" for index, name in sorted(names.items()))
