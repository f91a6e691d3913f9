"""The fields of an amortisation, apart from how it is shown, so that table and picture can read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from bayes_klrl.analysis.amortisation.judgement import Judgement
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.inference.svi.fit import Fit
from bayes_klrl.typing import LanguageModel

__all__ = ["AmortisationRecord"]


@dataclass(frozen=True, eq=False)
class AmortisationRecord:
    """The fields of an `Amortisation`, which explains each of them."""

    guide: LanguageModel = field(repr=False)
    training: Judgement = field(repr=False)
    unseen: Judgement = field(repr=False)
    draws: Mapping[str, Draws] = field(repr=False)
    fit: Fit | None = field(default=None, repr=False)

    @property
    def training_cost(self) -> Cost:
        """Tokens and seconds of the training; 0 for a guide that was given."""
        return Cost() if self.fit is None else self.fit.training
