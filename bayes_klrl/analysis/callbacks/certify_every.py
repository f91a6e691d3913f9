"""A certificate every n steps of a training: what selects the checkpoint is the distance to the posterior, not the reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bayes_klrl.analysis.certificate.certificate import Certificate, certify
from bayes_klrl.checks import check_count
from bayes_klrl.inference.svi.callbacks import StepRecord
from bayes_klrl.typing import LanguageModel

__all__ = ["CertifyEvery"]


@dataclass
class CertifyEvery:
    """Certify the guide every n steps, and keep the best one: the certificate, not the reward, selects the checkpoint.

    Parameters
    ----------
    num_steps
        n.
    folder
        The folder that the best guide is saved into; None: it is not saved.
    seed
        Seed of each certificate.
    options
        Options of `bk.certify`, such as `num_draws`.

    Attributes
    ----------
    certificates
        The certificates by step.
    best_step
        The step whose certificate has the lowest upper end of KL(q || p*), or without upper ends the highest ELBO.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> every = bk.CertifyEvery(10, options={"num_draws": 64})
    >>> fit = bk.SVI(30).fit(posterior, seed=0, callbacks=[every])
    >>> sorted(every.certificates), every.best_step in every.certificates
    ([9, 19, 29], True)
    """

    num_steps: int
    folder: str | Path | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    certificates: dict[int, Certificate] = field(default_factory=dict, init=False, repr=False)
    best_step: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        check_count("num_steps", self.num_steps)

    def __call__(self, record: StepRecord, guide: LanguageModel) -> None:
        """Certify if it is time."""
        if (record.step + 1) % self.num_steps and record.step + 1 != record.num_steps:
            return
        self.certificates[record.step] = certify(record.posterior, guide, seed=self.seed, **self.options)
        best = min(self.certificates, key=self._distance)
        if best == record.step:
            self.best_step = best
            if self.folder is not None:
                guide.save_pretrained(self.folder)  # type: ignore[attr-defined]

    def _distance(self, step: int) -> float:
        """Return what is compared: the upper end of KL(q || p*), else minus the ELBO's middle."""
        pooled = self.certificates[step].pooled
        high = float(pooled.reverse_kl[1])
        return high if np.isfinite(high) else -float(np.mean(pooled.elbo))
