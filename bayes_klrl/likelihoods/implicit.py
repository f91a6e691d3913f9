"""A tuned policy as the likelihood that it stands for: r(x) = beta (log policy(x) - log reference(x)).

Every policy is a posterior: of its reference as prior, with this reward at alpha = beta and evidence 1. So a model that was
tuned by DPO (Rafailov et al. 2023) or by any other trainer can be taken off its reference and put on another prior, made
stronger or weaker by alpha, and multiplied by further likelihoods (theory.md 1.14).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bayes_klrl.batch import Batch, Setting
from bayes_klrl.checks import check_positive
from bayes_klrl.errors import BayesKLRLError, CheckpointError, SupportError
from bayes_klrl.inference.policies import as_policy
from bayes_klrl.likelihood import Factor, check_alpha_and_bounds
from bayes_klrl.likelihoods.scoring import batch_log_probs, posterior_of
from bayes_klrl.posterior import Posterior
from bayes_klrl.typing import FloatArray, LanguageModel

__all__ = ["ImplicitReward"]


@dataclass(frozen=True, eq=False, repr=False)
class ImplicitReward(Factor):
    """The reward that a tuned policy stands for, as a factor of a `Posterior`'s likelihood.

        r(x, c) = beta (log policy(x | c) - log reference(x | c)),    likelihood (policy / reference)^(beta / alpha)

    If the reference is the prior and alpha = beta, then the posterior is the policy, and log Z = 0 for every prompt. If alpha
    is smaller the posterior goes further than the policy did, and if it is larger less far. If the prior is another, larger
    model, this is the sequence-level posterior whose next-token approximation is known as emulated fine-tuning or proxy
    tuning.

    Nothing is estimated: r is exact up to the rounding of the models. Each completion costs a forward pass of the policy and
    one of the reference, which `Draws.cost` does not count.

    Parameters
    ----------
    policy
        What `certify` takes: a language model, a `Fit`, or a folder (a Hugging Face model, a PEFT adapter, the output of a TRL
        trainer, a saved fit). It must have the vocabulary, the EOS ids and the tokens of the posterior's prior. A folder is
        loaded at the prior's temperature, once per prior.
    reference
        The model that the policy was tuned from, in one of the same forms; None: the posterior's prior.
    beta
        Units of reward per nat of the policy's training ("beta" in DPO and TRL); positive and finite.
    alpha
        Units of reward per nat of this likelihood; positive and finite.
    name
        Name in tables and error messages; None: "implicit reward".
    models
        Policy and reference as language models. `Posterior` sets it.

    Raises
    ------
    BayesKLRLError
        If beta or alpha is not positive and finite.
    CheckpointError
        When a posterior is made: if vocabulary, EOS ids or tokens differ from the prior's, or a folder holds no model.
    SupportError
        If the policy and the prior give positive probability to a completion that is impossible under the reference: its
        reward would be infinite.

    References
    ----------
    Rafailov et al. 2023, "Direct preference optimization", section 4; Mitchell et al. 2024, "An emulator for fine-tuning large
    language models using small language models"; Liu et al. 2024, "Tuning language models by proxy".

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> tuned = bk.NgramLM(np.log([0.9, 0.1]), eos_token_id=1)
    >>> posterior = bk.Posterior(coin, bk.ImplicitReward(tuned, beta=0.1, alpha=0.1), max_new_tokens=3)
    >>> exact = bk.Exact().run(posterior, seed=0)
    >>> bool(abs(exact.log_evidence[0]) < 1e-9)
    True
    >>> posterior.log_joint([[0, 1]]).round(4), float(np.log(0.9 * 0.1).round(4))
    (array([[-2.4079]]), -2.4079)
    """

    policy: Any
    reference: Any = None
    beta: float = field(kw_only=True)
    alpha: float = field(kw_only=True)
    name: str | None = field(default=None, kw_only=True)
    models: tuple[LanguageModel, LanguageModel] | None = field(default=None, kw_only=True)
    bounds: None = field(default=None, init=False)
    _loaded: dict[str, tuple[LanguageModel, LanguageModel]] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        check_alpha_and_bounds(self)
        check_positive("beta", self.beta)
        if self.policy is None:
            raise BayesKLRLError(
                "policy must be a language model, a fit or a folder; got None. Only the reference may be None, which is the "
                "posterior's prior."
            )

    def __repr__(self) -> str:
        return f"ImplicitReward({self.label!r}, beta={self.beta:.4g}, alpha={self.alpha:.4g})"

    @property
    def label(self) -> str:
        """The given name, or "implicit reward"."""
        return self.name or "implicit reward"

    def tempered(self, gamma: float) -> ImplicitReward:
        """Return the same reward at alpha / gamma."""
        return replace(self, alpha=self.alpha / gamma)

    def check_arguments(self, prior: LanguageModel, columns: frozenset[str]) -> None:
        """See `Likelihood.check`: it asks for no column."""

    def bind_with(self, setting: Setting, others: tuple[Factor, ...]) -> ImplicitReward:
        """Return the factor with policy and reference loaded, and checked against the prior and the prompts."""
        base = posterior_of(setting)
        policy = self._resolved("policy", self.policy, base)
        reference = setting.prior if self.reference is None else self._resolved("reference", self.reference, base)
        return replace(self, models=(policy, reference))

    def values(self, batch: Batch) -> FloatArray:
        """See `Factor.values`; -inf where the policy, or the prior, gives probability 0."""
        if self.models is None:
            raise BayesKLRLError(
                f"{self.label!r} depends on the prior and the prompts: put it into a bk.Posterior(prior, likelihood, ...) and "
                "use the posterior's `reward`."
            )
        policy, reference = self.models
        log_policy, log_reference = batch_log_probs(policy, batch), batch_log_probs(reference, batch)
        possible = ~np.isneginf(log_policy)
        unknown = np.flatnonzero(possible & np.isneginf(log_reference))
        if unknown.size and reference is not batch.prior:
            under_prior = ~np.isneginf(batch_log_probs(batch.prior, batch, unknown))
            if under_prior.any():
                raise SupportError(
                    f"The reference of {self.label!r} gives probability 0 to {batch.describe(int(unknown[under_prior][0]))}, "
                    "which policy and prior can draw: its reward would be infinite. Give the model that the policy was tuned "
                    "from as the reference."
                )
        possible[unknown] = False
        values = np.full(len(batch), -np.inf)
        values[possible] = self.beta * (log_policy[possible] - log_reference[possible])
        return self.checked(values, batch)

    def _resolved(self, role: str, given: Any, base: Posterior) -> LanguageModel:
        """Return a policy or reference as a language model; a folder is read once for each prior."""
        folder = f"{role} {given}" if isinstance(given, str | os.PathLike) else None
        prior, model = self._loaded.get(folder, (None, None)) if folder else (None, None)
        try:
            model = as_policy(model if prior is base.prior else given, base)
        except CheckpointError as error:
            raise CheckpointError(f"The {role} of {self.label!r}: {error}") from error
        if folder:
            self._loaded[folder] = (base.prior, model)
        return model
