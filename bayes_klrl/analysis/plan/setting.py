"""What a plan is made for, and the record of an algorithm's work.

    decoding   models (sum of prompt lengths, once per pass + P N (T - 1))   tokens

The last token of a completion is drawn and never read, hence T - 1. Prompts are read once for each pass, and completions of
one prompt that begin alike share what they have in common, so the numbers are upper bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bayes_klrl.inference.svi.svi import SVI
from bayes_klrl.models.decoding import ROWS_PER_BLOCK
from bayes_klrl.models.memory import Part, parts, prompt_blocks
from bayes_klrl.posterior import Posterior

__all__ = ["Setting", "Work"]


@dataclass(frozen=True)
class Setting:
    """What a plan is made for.

    Parameters
    ----------
    posterior
        The posterior.
    budget
        Bytes that one pass may take; None: no bound.
    log_evidence
        log Z, where the user knows it, in nats.
    """

    posterior: Posterior
    budget: int | None
    log_evidence: float | None

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each prompt."""
        return [len(ids) for ids in self.posterior.prompt_ids]

    def shared(self, num_draws: int) -> int:
        """Return the draws per prompt of a pilot whose draws the prompts share."""
        return max(2, -(-num_draws // len(self.lengths)))

    def pilot_tokens(self, num_draws: int) -> int:
        """Return the tokens of N prior draws per prompt that are drawn in one block."""
        return self.decoding(num_draws, blocks=False).tokens or 0

    def parts(self, lengths: Sequence[int], num_draws: int, num_models: int = 1) -> list[Part]:
        """Return the parts in which N completions per prompt are decoded."""
        budget = None if self.budget is None else self.budget // num_models
        return parts((self.posterior.prior,), lengths, num_draws, self.posterior.max_new_tokens, budget)

    def decoding(self, num_draws: int, *, num_models: int = 1, blocks: bool = True) -> Work:
        """Return the work of drawing N independent completions per prompt, in blocks and in parts."""
        posterior, lengths = self.posterior, self.lengths
        block = max(1, ROWS_PER_BLOCK // len(lengths)) if blocks else num_draws
        read = rows = 0
        for first in range(0, num_draws, block):
            for part in self.parts(lengths, min(block, num_draws - first), num_models):
                read += sum(lengths[p] for p in part.prompts)
                rows = max(rows, part.prompts.size * (part.last - part.first))
        tokens = read + len(lengths) * num_draws * (posterior.max_new_tokens - 1)
        return Work(num_models * tokens, rows=rows, num_models=num_models, num_draws=num_draws)

    def populations(self, num_particles: int, *, num_models: int) -> Work:
        """Return the work of drawing N particles per prompt that are resampled together, in blocks of prompts."""
        lengths, num_tokens = self.lengths, self.posterior.max_new_tokens
        budget = None if self.budget is None else self.budget // num_models
        blocks = prompt_blocks((self.posterior.prior,), lengths, num_particles, num_tokens, ROWS_PER_BLOCK, budget)
        rows = max(block.size for block in blocks) * num_particles
        tokens = sum(lengths) + len(lengths) * num_particles * (num_tokens - 1)
        return Work(num_models * tokens, rows=rows, num_models=num_models, num_draws=num_particles)

    def together(self, num_rows: int, *, num_models: int) -> Work:
        """Return the work of drawing N completions per prompt, all of them in one decoding."""
        tokens = sum(self.lengths) + len(self.lengths) * num_rows * (self.posterior.max_new_tokens - 1)
        return Work(num_models * tokens, rows=len(self.lengths) * num_rows, num_models=num_models, num_draws=num_rows)


@dataclass(frozen=True)
class Work:
    """The work of an algorithm.

    Parameters
    ----------
    tokens, training_tokens
        Tokens through models, and those of a training.
    rows
        Completions that are decoded at once.
    num_models
        Models that read each token.
    num_draws
        Completions per prompt that are decoded, for the arrays that are kept.
    step_rows
        Completions of one training step, and of those that are differentiated by one backward call; 0 without training.
    training
        The recipe of the training, if there is one.
    refusal, notes
        Why the algorithm would refuse, and what the numbers leave out.
    is_bound
        False: tokens are expected, or something that reads some is not counted, as a note says.
    """

    tokens: int | None
    training_tokens: int = 0
    rows: int = 0
    num_models: int = 1
    num_draws: int = 0
    step_rows: int = 0
    rows_per_backward: int = 0
    training: SVI | None = None
    refusal: str | None = None
    notes: tuple[str, ...] = ()
    is_bound: bool = True
