"""The natural gradient at work in a training: draws of the loss, scores of single draws, replay of the last steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayes_klrl.inference.svi.optimizers import Natural
from bayes_klrl.inference.svi.pyro_backend.natural_gradient.per_sample import PerSample
from bayes_klrl.inference.svi.pyro_backend.natural_gradient.regression import NaturalGradient
from bayes_klrl.models.programs.pyro_program import to_sequences
from bayes_klrl.sequences import Sequences

__all__ = ["NaturalSteps"]


class NaturalSteps:
    """See `optimizers.Steps`. It makes its own gradient, so a step's loss needs none.

    Parameters
    ----------
    recipe
        The recipe.
    guide, elbo
        The guide, and the loss that draws: its newest draws and their log-weights are the step's.
    same_prompts
        Whether every step has the same prompts; draws of earlier steps are used again only then.
    """

    needs_gradient = False

    def __init__(self, recipe: Natural, guide: Any, elbo: Any, *, same_prompts: bool) -> None:
        self._per_sample, self._elbo = PerSample(guide), elbo
        self._natural = NaturalGradient(
            self._per_sample.parameters, momentum=recipe.momentum, damping=recipe.damping, max_kl=recipe.step_kl
        )
        self._replay = recipe.replay if same_prompts else 0
        self._kept: list[tuple[Sequences, Tensor]] = []

    def step(self, log_weights: Tensor) -> Mapping[str, float]:
        """See `Steps.step`."""
        site, terms = self._elbo.last_site, self._elbo.last
        sequences = to_sequences(site["value"], site["fn"].lm)
        joint = (log_weights + terms.log_guide).cpu()
        self._kept = [(sequences, joint), *self._kept][: self._replay + 1]
        tokens = np.concatenate([each.tokens for each, _ in self._kept], axis=1)
        lengths = np.concatenate([each.lengths for each, _ in self._kept], axis=1)
        scores = self._per_sample.scores(site["fn"].prompt_ids, Sequences(tokens, lengths))
        log_joint = torch.cat([each for _, each in self._kept]).to(scores.log_probs)
        taken = self._natural.step(scores, log_joint - scores.log_probs)
        squared = sum(float(p.grad.square().sum()) for p in self._per_sample.parameters if p.grad is not None)
        return {"gradient_norm": squared**0.5, "learning_rate": taken.share, "step_kl": taken.kl}

    def forget_draws(self) -> None:
        """See `Steps.forget_draws`."""
        self._kept = []

    def state(self) -> dict[str, Tensor]:
        """See `Steps.state`."""
        found = {f"natural.{name}": value for name, value in self._natural.state().items()}
        for i, (sequences, joint) in enumerate(self._kept):
            found |= {
                f"kept.{i}.tokens": torch.as_tensor(sequences.tokens),
                f"kept.{i}.lengths": torch.as_tensor(sequences.lengths),
                f"kept.{i}.joint": joint.clone(),
            }
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Steps.load_state`."""
        prefix = "natural."
        self._natural.load_state({n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)})
        self._kept, i = [], 0
        while f"kept.{i}.tokens" in state:
            parts = (state[f"kept.{i}.{name}"] for name in ("tokens", "lengths", "joint"))
            tokens, lengths, joint = parts
            self._kept.append((Sequences(tokens.numpy(), lengths.numpy()), joint))
            i += 1
