"""How a posterior and draws show themselves in a notebook. Other results have theirs beside the tables that they print."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from bayes_klrl.draws import Draws
from bayes_klrl.export.html import HtmlTable, html_page
from bayes_klrl.export.printed import k_text
from bayes_klrl.posterior import Posterior
from bayes_klrl.prompts.decoder import PromptDecoder
from bayes_klrl.prompts.words import prompt_labels, shortened, visible

__all__ = ["draws_html", "posterior_html"]

_MOST_PROMPTS = 8
_MOST_COMPLETIONS = 5
_MOST_CHARACTERS = 300
_TRUSTED_ESS = 100  # as in a comparison


def posterior_html(posterior: Posterior) -> str:
    """Return what a posterior is made of, and its prompts."""
    decoder = PromptDecoder.of(posterior.prior, posterior.prompt_ids)
    labels = prompt_labels(posterior.prompts, decoder, most=_MOST_CHARACTERS)
    prior = posterior.prior
    parts = [
        ("prior", f"{type(prior).__name__}, {prior.vocab_size:,} tokens in its vocabulary"),
        ("reward", posterior.likelihood.label),
        ("alpha", f"{posterior.alpha:g} units of reward per nat"),
        ("completions", f"at most {posterior.max_new_tokens:,} tokens, EOS included"),
        ("columns", ", ".join(posterior.columns) or "none"),
    ]
    prompts = [
        [label, f"{len(ids):,}"] for label, ids in zip(labels[:_MOST_PROMPTS], posterior.prompt_ids, strict=False)
    ]
    return html_page(
        f"posterior = prior × exp(reward / alpha) / evidence, for {_count(posterior.num_prompts, 'prompt')}",
        HtmlTable((), parts, words=(0, 1)),
        HtmlTable(("prompt", "tokens"), prompts),
        *_more(posterior.num_prompts),
    )


def draws_html(draws: Draws) -> str:
    """Return the estimate of the evidence and how far to trust it, by prompt, and the completions of most weight."""
    rewards = (draws.weights * np.where(draws.weights > 0, draws.reward, 0.0)).sum(axis=1)
    columns = (draws.log_evidence, draws.log_evidence_se, draws.elbo, rewards)
    rows = [
        [
            label,
            *(_number(values[p], 3) for values in columns),
            _number(draws.ess[p], 0),
            k_text(float(draws.pareto_k[p])),
        ]
        for p, label in enumerate(draws.prompt_words()[:_MOST_PROMPTS])
    ]
    headings = ("prompt", "log evidence", "standard error", "ELBO", "E[r]", "ESS", "Pareto k")
    return html_page(
        _verdict(draws),
        HtmlTable(headings, rows),
        *_more(draws.shape[0]),
        _heaviest(draws),
        "log evidence and ELBO in nats",
    )


def _verdict(draws: Draws) -> str:
    """Return one sentence: the log evidence and how many draws of the posterior these are worth, or what they are instead."""
    num_prompts, num_draws = draws.shape
    of_mean = "" if num_prompts == 1 else f", mean over {num_prompts} prompts"
    drawn = f"{draws.method}: {_count(num_draws, 'draw')}{'' if num_prompts == 1 else ' per prompt'}"
    if not np.isfinite(draws.weights.sum()) or (draws.weights.sum(axis=1) == 0).any():
        return f"{drawn}, and no draw of some prompt is possible: they say nothing of its posterior"
    if np.isnan(draws.log_evidence).any():
        elbo = "" if np.isnan(draws.elbo).any() else f"; ELBO {draws.elbo.mean():.3f} nats{of_mean}"
        return f"{drawn} that weigh equally{elbo}"
    error = float(np.sqrt(np.square(draws.log_evidence_se).sum()) / num_prompts)
    plus_minus = f" ± {error:.3f}" if error > 0 else ""
    evidence = f"log evidence {draws.log_evidence.mean():.3f}{plus_minus} nats{of_mean}"
    ess = float(np.nanmin(draws.ess)) if np.isfinite(draws.ess).any() else np.nan
    if np.isnan(ess):
        return f"{drawn}; {evidence}"
    worst = "" if num_prompts == 1 else " in the worst prompt"
    doubt = f", below {_TRUSTED_ESS}: do not trust the error bars" if ess < _TRUSTED_ESS else ""
    return f"{drawn}; {evidence}; effective sample size {ess:,.0f}{worst}{doubt}"


def _heaviest(draws: Draws) -> HtmlTable:
    """Return the first prompt's completions of most weight, equal ones taken together."""
    kept = np.where(draws.sequences.mask[0], draws.tokens[0], -1)
    _, first, groups = np.unique(kept, axis=0, return_index=True, return_inverse=True)
    mass = np.bincount(groups.ravel(), draws.weights[0])
    order = np.lexsort((first, -mass.round(12)))[:_MOST_COMPLETIONS]
    chosen = first[order]
    some = replace(draws, tokens=draws.tokens[:1, chosen], lengths=draws.lengths[:1, chosen])
    if draws.decoder is None:
        texts = [" ".join(map(str, ids)) for ids in some.sequences.lists()]
    else:
        texts = [visible(text) for text in some.texts()[0]]
    rows = [
        [
            shortened(text, _MOST_CHARACTERS),
            f"{mass[group]:.3g}",
            _number(draws.reward[0, n], 3),
            str(draws.lengths[0, n]),
            "yes" if draws.finished[0, n] else "no",
        ]
        for text, group, n in zip(texts, order, chosen, strict=True)
    ]
    headings = ("completion" if draws.decoder is not None else "token ids", "weight", "reward", "tokens", "finished")
    return HtmlTable(headings, rows, caption=f"heaviest completions of the prompt: {draws.prompt_words()[0]}")


def _more(num_prompts: int) -> list[str]:
    """Return how many prompts a table leaves out."""
    return [f"... and {num_prompts - _MOST_PROMPTS:,} more prompts"] if num_prompts > _MOST_PROMPTS else []


def _count(number: int, noun: str) -> str:
    """Return "1 draw", "2 draws"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _number(value: float, digits: int) -> str:
    """Return a number, a dash where there is none."""
    return "-" if np.isnan(value) else f"{value:,.{digits}f}"
