"""A certificate every n steps of a training: what selects the checkpoint is the distance to the posterior, not the reward."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bayes_klrl.analysis.certificate.certificate import Certificate, certify
from bayes_klrl.analysis.certificate.training_runs.curve import distance_to_posterior
from bayes_klrl.checks import check_count
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.svi.callbacks import StepRecord
from bayes_klrl.typing import LanguageModel
from bayes_klrl.whole_files import check_folder, write_whole

__all__ = ["CertifyEvery"]

_FILE = "best_certificate.json"


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
        The step whose certificate has the lowest upper end of KL(q || p*), or without upper ends the highest ELBO, or where
        that is -inf, as under constraints, the lowest KL(p* || q). Where alpha changes, certificates of the newest alpha alone
        are compared. With a folder, the best of before is known after a resume, too.

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
    _best: list[float] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_count("num_steps", self.num_steps)
        if self.folder is not None:
            check_folder(self.folder)
        allowed = set(inspect.signature(certify).parameters) - {"posterior", "policy", "seed"}
        unknown = sorted(set(self.options) - allowed)
        if unknown:
            raise BayesKLRLError(f"bk.certify has no option {unknown[0]!r} for CertifyEvery; it has {sorted(allowed)}.")

    def __call__(self, record: StepRecord, guide: LanguageModel) -> None:
        """Certify if it is time."""
        if self.folder is not None and not hasattr(guide, "save_pretrained"):
            raise BayesKLRLError(
                f"A {type(guide).__name__} has no save_pretrained, so leave out CertifyEvery(folder=...)."
            )
        if (record.step + 1) % self.num_steps and record.step + 1 != record.num_steps:
            return
        if self.certificates and record.step <= max(self.certificates):  # another training
            self.certificates, self.best_step, self._best = {}, None, None
        if not self.certificates and record.step >= self.num_steps:
            self._go_on()
        certificate = certify(record.posterior, guide, seed=self.seed, **self.options)
        self.certificates[record.step] = certificate
        distance = [record.posterior.alpha, *distance_to_posterior(certificate)]
        other = self._best is None or not np.isclose(self._best[0], distance[0], rtol=1e-9, atol=0.0)
        if other or self._best is None or distance[1:] <= self._best[1:]:
            self.best_step, self._best = record.step, distance
            if self.folder is not None:
                guide.save_pretrained(self.folder)  # type: ignore[attr-defined]  # checked above; the protocol has none
                write_whole(Path(self.folder) / _FILE, json.dumps({"step": record.step, "distance": distance}) + "\n")

    def _go_on(self) -> None:
        """Read what was best before the training was resumed, if it was saved."""
        file = None if self.folder is None else Path(self.folder) / _FILE
        if file is not None and file.is_file():
            known = json.loads(file.read_text())
            self.best_step, self._best = int(known["step"]), [float(value) for value in known["distance"]]
