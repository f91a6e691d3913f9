"""The result of SVI: a trained guide q, the approximate posterior, with its history and draws from it."""

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
    """A trained guide, as `SVI.fit` returns it.

    Parameters
    ----------
    guide
        The approximate posterior q, a language model.
    history
        Arrays of one value per step, means over prompts in nats: "elbo", "reward" (in its own units), "kl" (to the prior),
        "log_weight_sd", "ess" (the effective sample size of the step's N draws of a prompt, weighted by w = p0 exp(r / alpha)
        / q: from 1 to N, and N where the guide is the posterior), "gradient_norm", "learning_rate" (of Adam; the share of a
        natural step that was taken; NaN with "kl_sgd"), "step_kl" (how far the step moved the guide; NaN where it was not
        measured), "seconds".
    posterior
        The posterior that the guide approximates.
    training
        Seconds and tokens of the training.
    interrupted
        Whether Ctrl-C ended the training early.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> fit = bk.SVI(num_steps=30).fit(posterior, seed=0)
    >>> fit.history["elbo"].shape, bool(fit.history["elbo"][-1] > fit.history["elbo"][0])
    ((30,), True)
    >>> fit.run(100, seed=1)
    Draws(SVI: 100 draws x 1 prompts, log evidence [nan])
    """

    guide: LanguageModel
    history: Mapping[str, FloatArray] = field(repr=False)
    posterior: Posterior
    training: Cost
    interrupted: bool = False

    method: ClassVar[str] = "SVI"

    @property
    def training_tokens(self) -> int:
        """Number of tokens that went through a model in training."""
        return self.training.training_tokens

    @property
    def seconds(self) -> float:
        """Wall time of the training."""
        return self.training.training_seconds

    def save(self, folder: str | Path, *, merged: bool = True) -> Path:
        """Write the guide in the format that `from_pretrained` reads, and return the folder.

        Parameters
        ----------
        folder
            The folder, which is made if it is not there.
        merged
            True: adapters are added to the weights, and the folder holds a whole model. False: the adapter stays an adapter,
            a few files that `peft` and trainers read, which name the prior's folder as their base.
        """
        if not hasattr(self.guide, "save_pretrained"):
            raise BayesKLRLError(f"A {type(self.guide).__name__} has no save_pretrained, so it cannot be saved.")
        if merged:
            self.guide.save_pretrained(folder)
        elif hasattr(self.guide, "save_adapter"):
            self.guide.save_adapter(folder)
        else:
            raise BayesKLRLError(f"A {type(self.guide).__name__} has no adapter to save apart. Leave out merged=False.")
        return Path(folder)

    def run(self, num_draws: int, seed: int, *, progress: bool = False) -> Draws:
        """Return equally weighted draws from the guide; their `elbo` is the mean of log p0(x) + r(x) / alpha - log q(x).

        `ImportanceSampling(num_draws, proposal=fit.guide)` corrects the draws for the difference of guide and posterior.
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
