"""A trained guide: the approximate posterior q that SVI ends with, its history, and draws from it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from bayes_klrl.checks import check_count
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.sampling.drawing import draw
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import Streams
from bayes_klrl.typing import FloatArray, LanguageModel

__all__ = ["Fit"]


@dataclass(frozen=True, eq=False)
class Fit:
    """A trained guide.

    Parameters
    ----------
    guide
        The approximate posterior q.
    history
        Of every step, means over prompts in nats: "elbo", "reward" (in its own units), "kl" (to the prior),
        "log_weight_sd", "gradient_norm", "learning_rate", "step_kl" (as taken; NaN where it was not looked at), "seconds".
    posterior
        What it approximates.
    training
        Seconds and tokens of the training.
    interrupted
        Whether Ctrl-C ended it early.
    """

    guide: LanguageModel
    history: Mapping[str, FloatArray] = field(repr=False)
    posterior: Posterior
    training: Cost
    interrupted: bool = False

    method: ClassVar[str] = "SVI"

    @property
    def training_tokens(self) -> int:
        """Tokens that went through a model in training."""
        return self.training.training_tokens

    @property
    def seconds(self) -> float:
        """Wall time of the training."""
        return self.training.training_seconds

    def save(self, folder: str | Path) -> Path:
        """Write the guide as `from_pretrained` reads it, adapters merged, and return the folder."""
        if not hasattr(self.guide, "save_pretrained"):
            raise BayesKLRLError(f"A {type(self.guide).__name__} has no save_pretrained, so it cannot be saved.")
        self.guide.save_pretrained(folder)
        return Path(folder)

    def run(self, num_draws: int, seed: int, *, progress: bool = False) -> Draws:
        """Return draws from the guide, weighing equally; `elbo` is their mean log-weight, the log-weights are not used.

        To correct them for what the guide got wrong, `ImportanceSampling(num_draws, proposal=fit.guide)`.
        """
        check_count("num_draws", num_draws)
        start, posterior = time.perf_counter(), self.posterior
        drawn = draw(
            (self.guide, posterior.prior),
            posterior,
            num_draws,
            Streams.of(seed),
            description="drawing from the guide",
            progress=progress,
        )
        log_guide, log_prior = drawn.log_probs
        draws = Draws.equally_weighted(
            posterior,
            drawn.sequences,
            method=self.method,
            reward=drawn.reward,
            log_prior=log_prior,
            log_proposal=log_guide,
            cost=Cost(time.perf_counter() - start, drawn.model_tokens, self.training_tokens, self.seconds),
        )
        elbo = (log_prior + draws.log_likelihood - log_guide).mean(axis=1)
        return replace(draws, elbo=elbo, guide=self.guide, info=drawn.info)
