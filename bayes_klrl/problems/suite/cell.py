"""One answer of the suite, judged by the truth: a method, a problem, a repeat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["SuiteCell"]


@dataclass(frozen=True)
class SuiteCell:
    """One method's answer to one problem in one repeat; NaN where there is no such number.

    Parameters
    ----------
    problem, method, repeat
        Which.
    log_evidence_error
        log Z-hat - log Z, mean over prompts, in nats; to the nearer bound where there are only bounds, 0 between them.
    kl_posterior
        Of the law of what it returns to the posterior, see `kl_sign`.
    kl_sign
        "=" the value, "<=" a bound that holds on average over repeats (log Z - E log Z-hat, by data processing), "~" an
        estimate.
    reward_error
        E[r] as answered less the posterior's, in units of reward.
    ess
        Effective sample size, of the worst prompt.
    model_tokens, training_tokens, seconds
        What it cost; training apart, its seconds included.
    note
        What went wrong.
    """

    problem: str
    method: str
    repeat: int
    log_evidence_error: float = np.nan
    kl_posterior: float = np.nan
    kl_sign: str = ""
    reward_error: float = np.nan
    ess: float = np.nan
    model_tokens: float = np.nan
    training_tokens: float = np.nan
    seconds: float = np.nan
    note: str = ""
