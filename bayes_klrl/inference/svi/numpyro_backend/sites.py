"""Which NumPyro programs our ELBOs take, and what is wrong with a draw of which the log-weight is no number.

The twin of `elbo_sites`, in the same words. A compiled program cannot raise, so what it draws is looked at where a loss is
computed outside of `jax.jit`; `numpyro.infer.SVI.evaluate(state)` does that, with the draws of the step that follows `state`.
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
    """Refuse observed sites in a guide; NumPyro marks factors as auxiliary, and takes them for part of log q."""
    for name, site in sample_sites(guide_trace).items():
        if site["is_observed"] and not site["infer"].get("is_auxiliary"):
            raise BayesKLRLError(
                f"The guide observes {name!r}. What is observed belongs into the model: move it there, or mark it with "
                "infer={'is_auxiliary': True}."
            )


def sample_sites(trace: Any) -> dict[str, Any]:
    """Return the sample sites of a trace by name, factors and observations included."""
    return {name: site for name, site in trace.items() if site["type"] == "sample"}


def is_concrete(array: Array) -> bool:
    """Return whether an array's values are there to be looked at."""
    return not isinstance(array, jax.core.Tracer)


class SiteLogProbs:
    """Reads the log-probs of the model's sites from executions, and names the first that is no log-density.

    Its `read` may run under `jax.vmap`: what it returns has the particles in front, and goes to `check`.
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
        """Refuse a log-prob of -inf, NaN or inf, naming site and completion; the sequence's own comes last.

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
        """Return how to call the completions of a particle: that of the prompt, where the site is within its plate."""
        if "tokens" not in found:
            return f"number {index[0]}"
        tokens = np.asarray(found["tokens"]).astype(np.int64)
        own = (
            tokens[tuple(index)] if len(index) == tokens.ndim - 1 else tokens[index[0]].reshape(-1, tokens.shape[-1])[0]
        )
        length = int(completion_lengths(own[None], self._lm.eos_token_ids)[0])
        return completion_text(self._lm, own[:length].tolist())
