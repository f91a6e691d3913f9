"""Whether a certificate is one of a guide and its posterior, so that the guide's model card may quote it."""

from __future__ import annotations

from typing import Any

import numpy as np

from bayes_klrl.analysis.certificate.certificate import Certificate
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.posterior import Posterior, encoded_prompts
from bayes_klrl.sequences import Sequences, completion_log_probs
from bayes_klrl.typing import FloatArray, LanguageModel

__all__ = ["check_is_of"]

_CURE = "Quote a certificate of this guide: bk.certify(fit.posterior, fit, seed=0)."
_PROMPTS, _DRAWS = 4, 8  # how many of the certificate's are scored anew
_OTHER_MODEL = 0.05  # nats per token that half precision does not explain


def check_is_of(certificate: Any, posterior: Posterior, guide: LanguageModel) -> None:
    """Refuse what is no certificate, or one of another posterior or another policy.

    alpha and max_new_tokens must be those of the posterior. The prompts may be others, such as those that `Posterior.split`
    holds out: a few of the certificate's own draws are scored anew, and prior and guide must give them the log-probs that
    stand there. The reward is not called.

    Parameters
    ----------
    certificate
        What should be a `Certificate`.
    posterior, guide
        The posterior and its guide.

    Raises
    ------
    BayesKLRLError
        If it is none, or of others; the message says of what.
    """
    if not isinstance(certificate, Certificate):
        raise BayesKLRLError(f"certificate must be a bk.Certificate, or None; got {certificate!r}. {_CURE}")
    theirs = {"alpha": certificate.alpha, "max_new_tokens": certificate.draws.tokens.shape[2]}
    ours = {"alpha": posterior.alpha, "max_new_tokens": posterior.max_new_tokens}
    for name, value in theirs.items():
        if not np.isclose(value, ours[name], rtol=1e-9, atol=0.0):
            raise BayesKLRLError(
                f"The certificate is of a posterior with {name} = {value:.6g}, and the guide's has {ours[name]:.6g}. {_CURE}"
            )
    draws = certificate.draws
    for name, lm, log_probs in (
        ("prior", posterior.prior, draws.log_prior),
        ("policy", guide, draws.log_proposal),
    ):
        gap = gap_per_token(lm, posterior.prior, draws, log_probs)
        if not gap <= _OTHER_MODEL:
            raise BayesKLRLError(
                f"The certificate is of another {name}: log-probs of its completions differ by {gap:.2g} nats per token. "
                f"{_CURE}"
            )


def gap_per_token(lm: LanguageModel, prior: LanguageModel, draws: Draws, log_probs: FloatArray) -> float:
    """Return by how much a model's log-probs of the first draws differ from given ones, in nats per token."""
    if lm.vocab_size != prior.vocab_size or int(draws.tokens.max()) >= lm.vocab_size:
        return float("inf")
    prompt_ids = encoded_prompts(draws.prompts[:_PROMPTS], prior)
    few = Sequences(draws.tokens[:_PROMPTS, :_DRAWS], draws.lengths[:_PROMPTS, :_DRAWS])
    found, given = completion_log_probs(lm, prompt_ids, few), log_probs[:_PROMPTS, :_DRAWS]
    with np.errstate(invalid="ignore"):
        apart = np.where(found == given, 0.0, np.abs(found - given))
    return float(apart.sum() / few.lengths.sum())
