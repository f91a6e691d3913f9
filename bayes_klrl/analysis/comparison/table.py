"""The numbers of a comparison's table, and how they print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from bayes_klrl.draws import Draws
from bayes_klrl.export.html import HtmlTable, html_page
from bayes_klrl.export.printed import k_text, printed
from bayes_klrl.inference.exact.exact import Exact
from bayes_klrl.inference.sampling.rejection import RejectionSampling
from bayes_klrl.typing import Algorithm, FloatArray
from bayes_klrl.weights import logmeanexp

__all__ = [
    "ComparisonTable",
    "Reference",
    "comparison_verdict",
    "count_text",
    "effective_draws",
    "method_row",
    "reference_log_evidence",
    "tokens_per_effective_draw",
    "unseen_note",
]

_TRUSTED_ESS = 100  # below it, intervals of importance sampling cover too rarely (theory.md 7.1)
_USABLE_K = 0.7  # Vehtari et al. (2024)
_MIXED_R_HAT = 1.01  # Vehtari et al. (2021)
_FAR = 5  # standard errors that an estimate may lie below the reference before its row says so
_UNSEEN = 0.05  # of the posterior, by another row, at rewards that no draw of this row reaches
_COLUMNS = (
    "log_evidence",
    "log_evidence_se",
    "elbo",
    "reward",
    "kl_prior",
    "kl_posterior_sign",
    "kl_posterior",
    "tokens_per_effective_draw",
    "ess",
    "pareto_k",
    "distinct",
    "model_tokens",
    "training_tokens",
    "seconds",
    "training_seconds",
    "note",
)
_HEADINGS = (
    "log evidence",
    "ELBO",
    "E\\[r]",
    "KL to\nprior",
    "KL to\nposterior",
    "tokens per\neffective draw",
    "ESS",
    "Pareto\nk",
    "distinct",
    "model\ntokens",
    "training\ntokens",
    "seconds",
    "training\nseconds",
)


@dataclass(frozen=True, eq=False)
class Reference:
    """The best value of log Z that the compared methods have, for each prompt (P,), and whether it is exact."""

    log_evidence: FloatArray
    is_exact: bool


def reference_log_evidence(
    algorithms: Mapping[str, Algorithm], draws: Mapping[str, Sequence[Draws]]
) -> Reference | None:
    """Return the exact log evidence if a method has it, else the highest estimate worth trusting.

    An estimate that missed a mode is too low and looks certain, so among those with an ESS of 100 or more (of all, if none
    has) the highest counts, and no ELBO lies above log Z.
    """
    for name, repeats in draws.items():
        if isinstance(algorithms[name], Exact):
            return Reference(repeats[0].log_evidence, is_exact=True)
    estimates = [repeat for repeats in draws.values() for repeat in repeats if np.isfinite(repeat.log_evidence).all()]
    if not estimates:
        return None
    trusted = [each for each in estimates if each.ess.min() >= _TRUSTED_ESS] or estimates
    highest = max(trusted, key=lambda each: float(each.log_evidence.mean())).log_evidence
    bounds = [each.elbo for repeats in draws.values() for each in repeats]
    return Reference(np.fmax.reduce([highest, *bounds]), is_exact=False)


def unseen_note(name: str, algorithms: Mapping[str, Algorithm], draws: Mapping[str, Sequence[Draws]]) -> str:
    """Return the warning that no draw of a row has rewards as high as those that another row found to matter; "" if none.

    Draws that all missed a mode have even weights: a large effective sample size and small error bars, around too low a
    value. Only another row can tell. Rows of a small effective sample size have their own warning and get none here.
    """
    mine = draws[name]
    if not all(np.isfinite(each.log_weights).any(axis=1).all() and not each.ess.min() < _TRUSTED_ESS for each in mine):
        return ""
    highest = np.max([np.where(each.weights > 0, each.reward, -np.inf).max(axis=1) for each in mine], axis=0)[:, None]
    found = {
        other: float(np.mean([(each.weights * (each.reward > highest + 1e-9)).sum(axis=1).mean() for each in repeats]))
        for other, repeats in draws.items()
        if other != name and all(_is_of_the_posterior(algorithms[other], each) for each in repeats)
    }
    other = max(found, key=lambda each: found[each], default=name)
    if found.get(other, 0.0) < _UNSEEN:
        return ""
    return (
        f"no draw of it has a reward as high as those that hold {found[other]:.0%} of the posterior by {other!r}: it may have "
        "missed them, and its error bars do not know"
    )


def _is_of_the_posterior(algorithm: Algorithm, draws: Draws) -> bool:
    """Return whether the weighted draws of a method stand for the posterior, for every prompt."""
    exact = isinstance(algorithm, Exact | RejectionSampling)
    alive = bool(np.isfinite(draws.log_weights).any(axis=1).all())
    return alive and (exact or bool(np.isfinite(draws.log_evidence).all()))


def method_row(algorithm: Algorithm | None, repeats: Sequence[Draws], reference: Reference | None) -> dict[str, Any]:
    """Return the table's columns for one method: means over prompts and repeats, with Z-hat averaged, not its log."""
    log_evidence = logmeanexp(np.stack([_or_dead(draws.log_evidence) for draws in repeats], axis=1))
    defined = not any(np.isnan(draws.log_evidence).any() for draws in repeats)
    variance = np.mean([draws.log_evidence_se**2 for draws in repeats], axis=0) / len(repeats)
    alive = not any(np.isneginf(draws.log_weights + draws.log_likelihood).all(axis=1).any() for draws in repeats)
    kl_prior = float(np.mean([_kl_prior(draws, reference).mean() for draws in repeats])) if alive else np.nan
    sign, kl_posterior = _kl_posterior(algorithm, repeats, reference) if alive else ("", np.nan)
    ess = float(np.min([draws.ess.min() for draws in repeats]))
    return {
        "log_evidence": float(log_evidence.mean()) if defined else np.nan,
        "log_evidence_se": float(np.sqrt(variance.sum()) / variance.size),
        "elbo": float(np.mean([draws.elbo.mean() for draws in repeats])),
        "reward": float(np.mean([draws.mean(draws.reward).mean() for draws in repeats])) if alive else np.nan,
        "kl_prior": kl_prior,
        "kl_posterior_sign": sign,
        "kl_posterior": kl_posterior,
        "tokens_per_effective_draw": tokens_per_effective_draw(repeats) if alive else np.nan,
        "ess": ess,
        "pareto_k": float(np.max([draws.pareto_k.max() for draws in repeats])),
        "distinct": int(np.mean([_num_distinct(draws) for draws in repeats])),
        "model_tokens": int(np.mean([draws.model_tokens for draws in repeats])),
        "training_tokens": int(np.mean([draws.training_tokens for draws in repeats])),
        "seconds": float(np.mean([draws.seconds for draws in repeats])),
        "training_seconds": float(np.mean([draws.training_seconds for draws in repeats])),
        "note": _note(repeats, ess, alive, reference),
    }


class ComparisonTable(pd.DataFrame):
    """A DataFrame with one row per method, which prints as a table for people."""

    _constructor: type[pd.DataFrame] = pd.DataFrame  # what slices of it are

    @classmethod
    def of(cls, rows: Mapping[str, Mapping[str, Any]]) -> ComparisonTable:
        """Return the table of some rows; missing columns are NaN, or "" where they hold text."""
        table = cls.from_dict(dict(rows), orient="index").reindex(columns=list(_COLUMNS))
        table.index.name = "method"
        texts = {"kl_posterior_sign": "", "note": ""}
        return cls(table.fillna(texts))

    def __rich__(self) -> Any:
        """Return the table as rich draws it."""
        from rich.table import Table

        view = Table(box=None, pad_edge=False, header_style="bold")
        view.add_column("method", vertical="bottom")
        for heading in _HEADINGS:
            view.add_column(heading, justify="right", vertical="bottom", no_wrap=True)
        for name, row in self.iterrows():
            view.add_row(str(name), *_cells(row))
        return view

    def __str__(self) -> str:
        return printed(self, (f"{name}: {row['note']}" for name, row in self.iterrows() if row["note"]))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return html_page(comparison_verdict(self), *self.html_parts())

    def html_parts(self) -> list[HtmlTable | str]:
        """Return the table and the notes, as parts of a page for a notebook."""
        headings = ("method", *(heading.replace("\\[", "[") for heading in _HEADINGS))
        rows = [[str(name), *_cells(row)] for name, row in self.iterrows()]
        notes = [f"{name}: {row['note']}" for name, row in self.iterrows() if row["note"]]
        return [HtmlTable(headings, rows), *notes]


def comparison_verdict(table: pd.DataFrame) -> str:
    """Return one sentence: the log evidence by the method to trust most, the exact one or else that of the largest ESS."""
    rows = table[np.isfinite(table["log_evidence"].astype(float))]
    if not len(rows):
        return "log evidence unknown: no method estimates it"
    exact = rows[(rows["log_evidence_se"] == 0) & (rows["kl_posterior_sign"] == "=")]
    name = exact.index[0] if len(exact) else rows["ess"].astype(float).fillna(0.0).idxmax()
    row = rows.loc[name]
    if len(exact):
        return f"log evidence {row['log_evidence']:.3f} nats, exactly ({name})"
    doubt = f", below {_TRUSTED_ESS}: do not trust the error bars" if row["ess"] < _TRUSTED_ESS else ""
    evidence = f"log evidence {row['log_evidence']:.3f} ± {row['log_evidence_se']:.3f} nats"
    return f"{evidence} ({name}, which has the largest effective sample size, {row['ess']:,.0f}{doubt})"


def _cells(row: Any) -> list[str]:
    """Return one row's numbers as people read them."""
    evidence = _number(row["log_evidence"])
    if np.isfinite(row["log_evidence_se"]) and row["log_evidence_se"] > 0:
        evidence += f" ± {row['log_evidence_se']:.3f}"
    sign = {"=": "", ">=": "≥ ", "<=": "≤ ", "~": "~ "}.get(row["kl_posterior_sign"], "")
    return [
        evidence,
        _number(row["elbo"]),
        _number(row["reward"]),
        _number(row["kl_prior"]),
        sign + _number(row["kl_posterior"]),
        count_text(row["tokens_per_effective_draw"]),
        _number(row["ess"], 0),
        k_text(float(row["pareto_k"])),
        *(_number(row[name], 0) for name in ("distinct", "model_tokens", "training_tokens")),
        *(_number(row[name], 1) for name in ("seconds", "training_seconds")),
    ]


def count_text(tokens: float) -> str:
    """Return a number of tokens per draw: a whole number from 10 on, of tables that share their work one decimal below."""
    return _number(tokens, 0 if tokens >= 10 else 1)


def _number(value: float, digits: int = 3) -> str:
    """Return a number, a dash where there is none."""
    return "-" if np.isnan(value) else f"{value:,.{digits}f}"


def _or_dead(log_evidence: FloatArray) -> FloatArray:
    """Return log evidences with -inf for undefined ones, so that they can be averaged."""
    return np.where(np.isnan(log_evidence), -np.inf, log_evidence)


def _kl_prior(draws: Draws, reference: Reference | None) -> FloatArray:
    """Return KL(answer || prior) of each prompt, (P,).

    The algorithm's own estimate, if it reports one (best-of-n does, by order statistics). For weighted draws, that of the
    posterior, E[r] / alpha - log Z; the same for equally weighted posterior draws, with the reference as log Z. For a guide,
    E_q[log q - log p0].
    """
    if "kl_prior" in draws.info:
        return draws.info["kl_prior"]
    log_evidence = draws.log_evidence
    if np.isnan(log_evidence).any():
        if reference is None or not np.isnan(draws.log_proposal).all():
            guide: FloatArray = (draws.log_proposal - draws.log_prior).mean(axis=1)
            return guide
        log_evidence = reference.log_evidence
    kl: FloatArray = draws.mean(draws.log_likelihood) - log_evidence
    return kl


def _kl_posterior(
    algorithm: Algorithm | None, repeats: Sequence[Draws], reference: Reference | None
) -> tuple[str, float]:
    """Return KL(answer || posterior), a mean over prompts, and whether it is a value, a bound or an approximation.

    Exact draws: 0. A guide: log Z - ELBO. Best-of-n: KL(. || prior) - E[r] / alpha + log Z, the first term estimated by order
    statistics. Weighted draws, resampled: at most log Z - E[log Z-hat], about half the squared standard error (theory.md 6.7);
    unknown where that is not to be trusted. Quasi-rejection: at most log(Z / Z_B), estimated. Markov chains: unknown, see
    their R-hat.
    """
    if isinstance(algorithm, Exact | RejectionSampling):
        return "=", 0.0
    if "kl_bound" in repeats[0].info:
        return "~", float(np.mean([draws.info["kl_bound"].mean() for draws in repeats]))
    weighted = not np.isnan(repeats[0].log_evidence).any()
    if weighted:
        if min(float(draws.ess.min()) for draws in repeats) < _TRUSTED_ESS:
            return "", np.nan  # the standard error that it is made of means nothing
        return "~", float(np.mean([(draws.log_evidence_se**2 / 2).mean() for draws in repeats]))
    if reference is None:
        return "", np.nan
    if "kl_prior" in repeats[0].info:
        values = [
            (draws.info["kl_prior"] - draws.mean(draws.log_likelihood) + reference.log_evidence).mean()
            for draws in repeats
        ]
        return "~", float(np.mean(values))
    gaps = [(reference.log_evidence - draws.elbo).mean() for draws in repeats]
    if np.isnan(gaps).any():
        return "", np.nan
    return "=" if reference.is_exact else "~", float(np.mean(gaps))


def tokens_per_effective_draw(repeats: Sequence[Draws]) -> float:
    """Return the model tokens of some runs over the effective draws that they gave, all prompts together.

    NaN if the number of effective draws is unknown; inf if there is none.
    """
    effective = float(np.sum([effective_draws(draws) for draws in repeats]))
    tokens = float(np.sum([draws.model_tokens for draws in repeats]))
    return tokens / effective if effective != 0 else np.inf


def effective_draws(draws: Draws) -> FloatArray:
    """Return how many independent draws of its answer a method gave for each prompt, (P,).

    The effective sample size where there is one; N for independent draws of equal weight, whatever they are draws of; NaN
    for an enumeration, which has no draws, and for chains of which nothing varies.
    """
    num_draws = draws.shape[1]
    independent = (draws.log_weights == 0).all(axis=1) & ("chain" not in draws.info)
    return np.where(np.isnan(draws.ess) & independent, float(num_draws), draws.ess)


def _num_distinct(draws: Draws) -> int:
    """Return the number of distinct completions of positive weight, over all prompts."""
    kept = np.where(draws.sequences.mask, draws.tokens, -1)
    alive = np.isfinite(draws.log_weights)
    return sum(len(np.unique(rows[mask], axis=0)) for rows, mask in zip(kept, alive, strict=True))


def _note(repeats: Sequence[Draws], ess: float, alive: bool, reference: Reference | None) -> str:
    """Return the warnings that belong to a row: no possible draw, small ESS, unmixed chains, evidence too low."""
    if not alive:
        return "no draw has positive likelihood"
    notes = []
    if not np.isnan(ess) and ess < _TRUSTED_ESS:
        notes.append(f"effective sample size {ess:.0f} < {_TRUSTED_ESS}: do not trust its error bars")
    elif (k := float(np.max([draws.pareto_k.max() for draws in repeats]))) > _USABLE_K:
        notes.append(f"Pareto k {k:.2f} > {_USABLE_K}: few draws decide, and its error bars are too short; draw more")
    first = repeats[0]
    r_hats = [np.max(values) for name, values in first.info.items() if name.startswith("r_hat_")]
    if r_hats and np.fmax.reduce(r_hats) > _MIXED_R_HAT:
        notes.append(f"R-hat {np.fmax.reduce(r_hats):.3f} > {_MIXED_R_HAT}: the chains disagree or are too short")
    if reference is not None and not np.isnan(first.log_evidence).any():
        missing = float((reference.log_evidence - first.log_evidence).mean())
        if missing > max(_FAR * float(np.sqrt(np.square(first.log_evidence_se).mean())), 0.1):
            notes.append(f"its log evidence is {missing:.2f} nats too low: it missed part of the posterior")
    return "; ".join(notes)
