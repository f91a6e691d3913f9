"""Runs of a prepared `SMC`, plain or conditional: which particles are decoded together, and by which random numbers.

All particles of a prompt are resampled together, so they are in memory together. Prompts need not be: they are decoded in
blocks of as many particles as sampling takes at once. A run's random numbers belong to the prompt and to the number of the
run, so that blocks change nothing but the last bit of log-probs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from bayes_klrl.draws import Cost
from bayes_klrl.errors import SupportError
from bayes_klrl.inference.smc.outcome import Outcome, in_prompt_order
from bayes_klrl.inference.smc.population import Population
from bayes_klrl.models.decoding import ROWS_PER_BLOCK, Decoding, scoring_gap
from bayes_klrl.models.memory import prompt_blocks, rows_that_fit
from bayes_klrl.models.out_of_memory import by_halves
from bayes_klrl.posterior import Posterior
from bayes_klrl.progress import track
from bayes_klrl.prompts.part import named_prompt
from bayes_klrl.randomness import Streams, prompt_keys
from bayes_klrl.resampling import conditional_multinomial, resampling_scheme
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel

__all__ = ["RESAMPLING_STREAM", "EvidenceRuns", "Grown", "evidence_runs", "grown"]

RESAMPLING_STREAM = 3
"""Number of the streams used for resampling; tokens use the same streams as in importance sampling."""

_MAX_ROWS = 8192  # most particles decoded together, if runs can be split, and fewer where memory asks for it


class Prepared(Protocol):
    """The options of a run with proposal and twist fitted; `SMC.prepared` returns one."""

    @property
    def num_particles(self) -> int:
        """Number of particles per prompt and run, N."""

    @property
    def proposal(self) -> Any:
        """The language model that proposes tokens."""

    @property
    def twist(self) -> Any:
        """A `Twist`, log psi of unfinished prefixes; None: the constant at which the weights are most even."""

    @property
    def ess_threshold(self) -> float:
        """Resample when ESS < ess_threshold * N."""

    @property
    def resampling(self) -> str:
        """Name of the resampling scheme."""


@dataclass(frozen=True, eq=False)
class EvidenceRuns:
    """Estimates of the log evidence of P prompts by M independent runs.

    Parameters
    ----------
    log_evidence
        log Z-hat of each run, (P, M); -inf if all particles of a run have weight 0.
    cost
        The cost of all runs together.
    """

    log_evidence: FloatArray
    cost: Cost


@dataclass(frozen=True, eq=False)
class Grown:
    """Finished particles of all prompts, and what they took.

    Parameters
    ----------
    outcome
        The particles.
    model_tokens
        Number of tokens that went through a model.
    info
        `scoring_gap` (P,) for models in half precision, else nothing; see `Drawn`.
    """

    outcome: Outcome
    model_tokens: int
    info: dict[str, FloatArray]


class Piece(NamedTuple):
    """Runs first, ..., last - 1 of some prompts, whose particles are in memory together."""

    prompts: IntArray
    first: int
    last: int

    @property
    def num_runs(self) -> int:
        """The number of runs of each prompt."""
        return self.last - self.first

    @property
    def num_populations(self) -> int:
        """The number of populations."""
        return int(self.prompts.size) * self.num_runs

    def of(self, num_runs: int) -> IntArray:
        """Return the numbers of the populations, where each prompt has so many runs in all."""
        return (self.prompts[:, None] * num_runs + np.arange(self.first, self.last)).ravel()

    def halves(self) -> list[Piece]:
        """Return two pieces of half of the prompts, or if there is one prompt, of half of its runs; none of one population."""
        if self.prompts.size > 1:
            return [self._replace(prompts=prompts) for prompts in np.array_split(self.prompts, 2)]
        middle = (self.first + self.last) // 2
        return [] if self.num_runs <= 1 else [self._replace(last=middle), self._replace(first=middle)]


def grown(
    ready: Prepared,
    posterior: Posterior,
    num_runs: int,
    retained: Sequences | None,
    streams: Streams,
    progress: bool,
    *,
    first_run: int = 0,
    most_rows: int | None = None,
) -> Grown:
    """Return the finished particles of M runs of a prepared `SMC`.

    With `retained` (P, M, T), particle 0 of every run follows these tokens, and resampling is conditional multinomial.
    `first_run` is the number of the first run, which selects its random numbers; `most_rows` is how many particles are
    decoded at once, if there are several prompts; None: as many as sampling decodes at once.
    """
    assert ready.twist is None or callable(ready.twist), "this SMC is not prepared"
    models = (cast("LanguageModel", ready.proposal), posterior.prior)
    scheme = resampling_scheme(ready.resampling) if retained is None else conditional_multinomial
    num_rows, width, keys = num_runs * ready.num_particles, posterior.max_new_tokens, prompt_keys(posterior.prompt_ids)
    most = ROWS_PER_BLOCK if most_rows is None else most_rows
    blocks = prompt_blocks(models, list(map(len, posterior.prompt_ids)), num_rows, width, most)
    read_before = getattr(ready.twist, "model_tokens", 0)
    in_half_precision = any(getattr(model, "half_precision", False) for model in models)

    def finished(piece: Piece) -> tuple[Outcome, int, FloatArray | None]:
        """Return the particles of some runs of some prompts, the tokens they took, and their scoring gap (P,)."""
        ids, start, num = [posterior.prompt_ids[p] for p in piece.prompts], first_run + piece.first, piece.num_runs
        num_draws = num * ready.num_particles
        uniforms = streams.uniforms([keys[p] for p in piece.prompts], start * ready.num_particles, num_draws, width)
        rngs = [
            streams.beside(RESAMPLING_STREAM).generator(keys[p], run)
            for p in piece.prompts
            for run in range(start, start + num)
        ]
        decoding = Decoding(models, ids, num_draws, width)
        forced = None if retained is None else retained.tokens[piece.prompts, piece.first : piece.last]
        population = Population(posterior, piece.prompts, decoding, ready.twist, num, forced)
        population.grow(uniforms, ready.ess_threshold, scheme, rngs, advance)
        gap = scoring_gap(decoding, models, ids) if in_half_precision else None
        return population.outcome(), decoding.model_tokens, gap

    with track("SMC", width * len(blocks), progress) as advance:
        pieces = [Piece(prompts, 0, num_runs) for prompts in blocks]
        done = list(
            by_halves(
                finished,
                pieces,
                lambda piece: piece.num_populations * ready.num_particles,
                Piece.halves,
                doing="grown",
                models=models,
                num_tokens=width,
                cure=_too_many(ready.num_particles),
            )
        )
    outcome = in_prompt_order([found[0] for _, found in done], [piece.of(num_runs) for piece, _ in done])
    model_tokens = sum(found[1] for _, found in done)
    gaps = np.zeros(posterior.num_prompts)
    for piece, (_, _, gap) in done:
        if gap is not None:
            gaps[piece.prompts] = np.maximum(gaps[piece.prompts], gap)
    if retained is not None:
        _require_alive(outcome.log_weights[:, 0].reshape(-1, num_runs), posterior)
    info = {"scoring_gap": gaps} if in_half_precision else {}
    return Grown(outcome, model_tokens + getattr(ready.twist, "model_tokens", 0) - read_before, info)


def evidence_runs(
    ready: Prepared,
    posterior: Posterior,
    num_runs: int,
    retained: Sequences | None,
    streams: Streams,
    training: Cost,
    progress: bool,
    *,
    first_run: int = 0,
) -> EvidenceRuns:
    """Return log Z-hat of M runs of a prepared `SMC`, run in blocks; conditional on `retained` (P, M, T) if given.

    The runs have the numbers `first_run`, `first_run` + 1, ..., which select their random numbers.
    """
    start, tokens, first = time.perf_counter(), 0, 0
    blocks = []
    lengths = [len(ids) for ids in posterior.prompt_ids]
    most = min(_MAX_ROWS, rows_that_fit((ready.proposal, posterior.prior), lengths, posterior.max_new_tokens))
    for num in _runs_per_block(num_runs, posterior.num_prompts * ready.num_particles, most):
        runs = slice(first, first + num)
        part = None if retained is None else Sequences(retained.tokens[:, runs], retained.lengths[:, runs])
        found = grown(ready, posterior, num, part, streams, progress, first_run=first_run + first, most_rows=most)
        blocks.append(found.outcome.log_evidences(num))
        tokens, first = tokens + found.model_tokens, first + num
    cost = replace(
        training, seconds=training.seconds + time.perf_counter() - start, model_tokens=training.model_tokens + tokens
    )
    return EvidenceRuns(np.concatenate(blocks, axis=1), cost)


def _too_many(num_particles: int) -> str:
    """Return what to do about a population that does not fit into memory."""
    fewer = max(1, num_particles // 2)
    return (
        f"All {num_particles} particles of a population are resampled together, so they are in memory together. Take "
        f"bk.SMC({fewer}), or bk.SMC({fewer}, num_islands=2) for as many particles in populations that never meet."
    )


def _require_alive(log_weights: FloatArray, posterior: Posterior) -> None:
    """Raise a `SupportError` if a retained completion has weight 0 under posterior, proposal or twist."""
    if np.isneginf(log_weights).any():
        p, run = np.argwhere(np.isneginf(log_weights))[0]
        raise SupportError(
            f"Retained completion {run} of {named_prompt(posterior, p)} has weight 0: its likelihood "
            "or prior is 0, so it is not a posterior draw, or the twist is -inf on one of its prefixes. Retain an exact "
            "draw, for example from bk.RejectionSampling."
        )


def _runs_per_block(num_runs: int, num_rows: int, most_rows: int) -> list[int]:
    """Return the number of runs in each block of at most so many rows; one run has `num_rows` particles over all prompts."""
    most = max(1, most_rows // num_rows)
    return [min(most, num_runs - start) for start in range(0, num_runs, most)]
