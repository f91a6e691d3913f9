"""Completions of the prior and of each answer, side by side, and what a guide changed in each token.

The colour of a token is log q(x_t | x_<t) - log p0(x_t | x_<t) in nats, how much more probable the guide makes it than the
prior. Summed over a completion and averaged over the guide's draws, that is KL(q || p0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np

from bayes_klrl.arrays import to_host
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BudgetError
from bayes_klrl.export.html import HtmlTable
from bayes_klrl.inference.sampling.importance import ImportanceSampling
from bayes_klrl.posterior import Posterior
from bayes_klrl.prompts.decoder import PromptDecoder
from bayes_klrl.prompts.words import shortened, visible
from bayes_klrl.randomness import generator
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray

__all__ = ["Sample", "samples_of", "side_by_side", "table_of"]

_STRONG = 3.0  # nats from which a token has the full colour
_MOST_OPAQUE = 0.45  # text stays readable on it in both themes


@dataclass(frozen=True, eq=False)
class Sample:
    """One completion.

    Parameters
    ----------
    method, prompt
        The name of the answer that it is of, and the words of its prompt.
    pieces
        The text of each token.
    log_prior, log_guide
        The log-prob of each token in nats under the prior, and under the guide; None without a guide.
    reward, weight
        Its reward, and its share of the answer's weight for this prompt.
    finished
        Whether it ended by itself.
    """

    method: str
    prompt: str
    pieces: Sequence[str]
    log_prior: FloatArray
    log_guide: FloatArray | None
    reward: float
    weight: float
    finished: bool

    @property
    def text(self) -> str:
        """The whole completion."""
        return "".join(self.pieces)

    def html(self) -> str:
        """Return the tokens, coloured where there is a guide, and the numbers of each in its tooltip."""
        spans = []
        for t, piece in enumerate(self.pieces):
            words, look = f"log prior {self.log_prior[t]:.2f}", ""
            if self.log_guide is not None:
                ratio = float(self.log_guide[t] - self.log_prior[t])
                words += f", log guide {self.log_guide[t]:.2f}: {ratio:+.2f} nats"
                depth = min(abs(ratio) / _STRONG, 1.0) * _MOST_OPAQUE
                look = f' class="{"more" if ratio > 0 else "less"}" style="--a:{depth:.2f}"'
            spans.append(f'<span{look} title="{words}">{escape(_shown(piece))}</span>')
        return "".join(spans)

    @property
    def numbers(self) -> str:
        """Reward, weight, log-probs and length in words."""
        guide = "" if self.log_guide is None else f", log guide {self.log_guide.sum():.1f}"
        end = "" if self.finished else ", cut"
        return (
            f"reward {self.reward:.3g}, weight {self.weight:.2g}, log prior {self.log_prior.sum():.1f}{guide} nats, "
            f"{len(self.pieces)} tokens{end}"
        )


def _shown(piece: str) -> str:
    """Return a token's text with its own spaces, and signs for characters that cannot be seen otherwise."""
    core = piece.strip(" ")
    return piece.replace(core, visible(core), 1) if core else piece


def samples_of(
    posterior: Posterior, answers: Mapping[str, Draws], num: int, num_prompts: int, seed: int
) -> list[Sample]:
    """Return `num` completions of the prior and of each answer, for each of the first prompts.

    Those of an answer are drawn by weight, each at most once. Answers without a possible completion are left out.
    """
    few = posterior.select(range(min(num_prompts, posterior.num_prompts)))
    found = _samples(few, "prior", equally_weighted(prior_draws(few, num, seed)), seed, num)
    for name, draws in answers.items():
        if np.isfinite(draws.log_weights).any(axis=1).all():
            found += _samples(few, name, draws, seed, num)
    return found


def prior_draws(posterior: Posterior, num: int, seed: int) -> Draws:
    """Return draws of the prior, whether or not any of them is possible."""
    try:
        return ImportanceSampling(num).run(posterior, seed=seed)
    except BudgetError as error:  # they are draws of the prior all the same
        if error.draws is None:
            raise
        return error.draws


def equally_weighted(draws: Draws) -> Draws:
    """Return the same draws with equal weights, as those of their proposal."""
    return replace(draws, log_weights=np.zeros_like(draws.log_weights))


def _samples(posterior: Posterior, name: str, draws: Draws, seed: int, num: int) -> list[Sample]:
    """Return completions of one answer to the prompts of a posterior, which are its first ones."""
    num_prompts, rng, weights = posterior.num_prompts, generator(seed), draws.weights
    most = min(num, int((weights[:num_prompts] > 0).sum(axis=1).min()))
    chosen = np.stack([rng.choice(draws.shape[1], most, replace=False, p=row) for row in weights[:num_prompts]])
    rows = np.arange(num_prompts)[:, None]
    sequences = Sequences(draws.tokens[rows, chosen], draws.lengths[rows, chosen])
    log_prior = np.asarray(to_host(posterior.prior.token_log_probs(posterior.prompt_ids, sequences)))
    log_guide = None
    if draws.guide is not None:
        log_guide = np.asarray(to_host(draws.guide.token_log_probs(posterior.prompt_ids, sequences)))
    words = draws.prompt_words()
    return [
        Sample(
            name,
            words[p],
            pieces_of(posterior, p, sequences.tokens[p, n, :length].tolist()),
            log_prior[p, n, :length],
            None if log_guide is None else log_guide[p, n, :length],
            float(draws.reward[p, chosen[p, n]]),
            float(weights[p, chosen[p, n]]),
            bool(draws.finished[p, chosen[p, n]]),
        )
        for p in range(num_prompts)
        for n, length in enumerate(sequences.lengths[p])
    ]


def pieces_of(posterior: Posterior, p: int, ids: list[int]) -> list[str]:
    """Return the text that each token adds to those before it; ids where there is no tokenizer.

    A character of several tokens stands at the last of them.
    """
    decoder = PromptDecoder.of(posterior.prior, posterior.prompt_ids)
    if decoder is None:
        return [f"{token} " for token in ids]
    texts = decoder.after(np.full(len(ids), p), [ids[: t + 1] for t in range(len(ids))])
    pieces, shown = [], ""
    for t, text in enumerate(texts):
        is_whole = text.startswith(shown) and (not text.endswith("\ufffd") or t == len(ids) - 1)
        pieces.append(text[len(shown) :] if is_whole else "")
        shown = text if is_whole else shown
    return pieces


def side_by_side(samples: Sequence[Sample], prompt: str) -> str:
    """Return the completions of one prompt, a column for each answer, the prior's first."""
    columns: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.prompt == prompt:
            columns.setdefault(sample.method, []).append(sample)
    sides = "".join(
        f'<div class="side"><h4>{escape(name)}</h4><ol>'
        + "".join(f'<li>{each.html()}<span class="numbers">{each.numbers}</span></li>' for each in column)
        + "</ol></div>"
        for name, column in columns.items()
    )
    return f'<h3>After the prompt: {escape(shortened(prompt, 200))}</h3><div class="sides">{sides}</div>'


def table_of(samples: Sequence[Sample]) -> HtmlTable:
    """Return all completions as one table, to be sorted and filtered."""
    rows = [
        [
            each.method,
            each.prompt,
            visible(each.text),
            f"{each.reward:.4g}",
            f"{each.weight:.3g}",
            f"{each.log_prior.sum():.2f}",
            "-" if each.log_guide is None else f"{each.log_guide.sum():.2f}",
            str(len(each.pieces)),
        ]
        for each in samples
    ]
    headings = ("method", "prompt", "completion", "reward", "weight", "log prior", "log guide", "tokens")
    return HtmlTable(headings, rows, words=(0, 1, 2))
