"""Checks of NumPyro programs for our ELBOs, and of draws whose log-weight is not finite.

It does for NumPyro what `pyro_backend.sites` does for Pyro. A compiled program cannot raise, so its draws are checked where a
loss is computed outside of `jax.jit`; `numpyro.infer.SVI.evaluate(state)` does that, with the draws of the step that follows
`state`.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.svi.refusals import completion_text, no_density
from bayes_klrl.models.programs.numpyro_distribution import SequenceDistribution
from bayes_klrl.sequences import completion_lengths
from bayes_klrl.typing import Array

__all__ = ["SiteLogProbs", "check_guide", "is_concrete", "sample_sites"]

SEQUENCE_SITE = "x"


def check_guide(guide_trace: Any) -> None:
    """Refuse observed sites in a guide; factors, which NumPyro marks as auxiliary and counts as part of log q, are allowed."""
    for name, site in sample_sites(guide_trace).items():
        if site["is_observed"] and not site["infer"].get("is_auxiliary"):
            raise BayesKLRLError(
                f"The guide observes {name!r}. Observed sites belong in the model: move it there, or mark it with "
                "infer={'is_auxiliary': True}."
            )


def sample_sites(trace: Any) -> dict[str, Any]:
    """Return the sample sites of a trace by name, factors and observations included."""
    return {name: site for name, site in trace.items() if site["type"] == "sample"}


def is_concrete(array: Array) -> bool:
    """Return whether an array has values, and is not a tracer."""
    return not isinstance(array, jax.core.Tracer)


class SiteLogProbs:
    """Reads the log-probs of the model's sites from executions, and names the first that is not finite.

    Its `read` may run under `jax.vmap`: the arrays that it returns, which go to `check`, then have the particles first.
    """

    def __init__(self) -> None:
        self._lm: Any = None

    def read(self, model_trace: Any, guide_trace: Any) -> dict[str, Any]:
        """Return the log-probs by site, and the completions if there are any."""
        sites = sample_sites(model_trace)
        found = {"log_probs": {name: site["fn"].log_prob(site["value"]) for name, site in sites.items()}}
        x = guide_trace.get(SEQUENCE_SITE)
        if x is not None and isinstance(x["fn"], SequenceDistribution):
            self._lm = x["fn"].lm
            found["tokens"] = x["value"]
        return found

    def check(self, found: dict[str, Any]) -> None:
        """Refuse a log-prob of -inf, NaN or inf; the error names site and completion. The sequence site is checked last.

        Raises
        ------
        UnboundedLossError
            If it is -inf.
        BayesKLRLError
            If it is NaN or inf.
        """
        names = sorted(found["log_probs"], key=lambda name: bool(name == SEQUENCE_SITE))
        for name in names:
            log_prob = np.asarray(found["log_probs"][name])
            wrong = np.argwhere(~np.isfinite(log_prob))
            if len(wrong):
                raise no_density(name, float(log_prob[tuple(wrong[0])]), self._completion(found, wrong[0]))

    def _completion(self, found: dict[str, Any], index: np.ndarray) -> str:
        """Return the words for the completion of a particle: that of the prompt, if the site is inside the prompts' plate."""
        if "tokens" not in found:
            return f"number {index[0]}"
        tokens = np.asarray(found["tokens"]).astype(np.int64)
        own = (
            tokens[tuple(index)] if len(index) == tokens.ndim - 1 else tokens[index[0]].reshape(-1, tokens.shape[-1])[0]
        )
        length = int(completion_lengths(own[None], self._lm.eos_token_ids)[0])
        return completion_text(self._lm, own[:length].tolist())
