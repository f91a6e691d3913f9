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
        The names of problem and method, and the number of the repeat.
    log_evidence_error
        log Z-hat - log Z, mean over prompts, in nats; where only bounds are known, the distance to the nearer bound, 0
        between them.
    kl_posterior
        KL of the answer's distribution to the posterior, in nats; `kl_sign` says what kind of number it is.
    kl_sign
        "=" the value; "<=" a bound that holds on average over repeats (log Z - E log Z-hat, by data processing); "~" an
        estimate.
    reward_error
        E[r] of the answer minus that of the posterior, in units of reward.
    ess
        Effective sample size of the worst prompt.
    model_tokens, training_tokens, seconds
        Tokens for drawing and scoring, tokens for training, and the seconds of both.
    note
        The reason why there is no answer, or only a part of one.
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
