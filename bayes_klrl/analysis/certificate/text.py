"""A certificate in words: one screen, verdict first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_klrl.analysis.certificate.record import CertificateRecord, bounds_in_words
from bayes_klrl.export.html import HtmlTable, html_page
from bayes_klrl.prompts.words import prompt_texts, shortened, visible
from bayes_klrl.typing import FloatArray

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "bounds_text",
    "cell_text",
    "certificate_html",
    "certificate_table",
    "certificate_text",
    "farthest",
    "verdict",
]

_NAMES = {
    "log_evidence_bounds": "log evidence",
    "elbo": "ELBO",
    "reverse_kl": "KL(policy || posterior)",
    "forward_kl": "KL(posterior || policy)",
}
_MOST_PROMPTS = 8
_MOST_CELLS = 8


def verdict(certificate: CertificateRecord) -> str:
    """Return one sentence: the distance to the posterior, and whether the policy spent more KL than its reward needs."""
    low, high = certificate.pooled.reverse_kl
    on_support = certificate.pooled.reverse_kl_on_support
    where = f"from the posterior at alpha {certificate.alpha:.3g}"
    if np.isposinf(low):
        distance = f"infinitely far {where}: the policy draws what has posterior probability 0"
        if np.isfinite(on_support).all():
            distance += f" (without that, {nats_text(on_support)} nats)"
    elif np.isposinf(high) and np.isfinite(on_support).all():
        distance = f"{nats_text(on_support)} nats {where}, not counting what the posterior excludes"
    elif np.isposinf(high):
        distance = f"at least {low:.2f} nats {where}; no upper end"
    else:
        distance = f"{nats_text(certificate.pooled.reverse_kl)} nats {where}"
    high = min(high, float(on_support[1]))
    missed = float(certificate.pooled.forward_kl[0])
    if missed > max(2 * high, 1.0) or np.isposinf(missed):  # it looks near from where it looks, and lost a mode
        distance += f", but misses what the posterior has ({_NAMES['forward_kl']} at least {number(missed)})"
    if np.isnan(certificate.frontier_gap):
        return "; ".join([distance, *certificate.findings])
    gap, margin = certificate.frontier_gap, 1.96 * certificate.frontier_gap_se
    if margin == 0:  # by enumeration
        spent = f"{gap:.2f} nats more KL than the reward needs" if gap >= 0.005 else "no more KL than the reward needs"
    elif gap < margin:
        spent = "no more KL than the reward needs, within its error"
    else:
        spent = f"{gap:.2f} nats more KL than the reward needs"
    return "; ".join([f"{distance}; spends {spent}", *certificate.findings])


def nats_text(interval: FloatArray) -> str:
    """Return a finite interval for a sentence: one number where it is narrow, else "low to high"."""
    low, high = interval
    return f"{(low + high) / 2:.2f}" if high - low < 0.02 else f"{low:.2f} to {high:.2f}"


def certificate_text(certificate: CertificateRecord) -> str:
    """Return the whole certificate, for a terminal 100 characters wide."""
    lines = [verdict(certificate), "", bounds_text(certificate)]
    lines += [f"  {label:26}{value}" for label, value in quantities(certificate)]
    if len(certificate.reverse_kl) > 1:
        lines += ["", f"  {prompts_heading(certificate)}"]
        rows = prompt_rows(certificate)
        width = max(38, 2 + max(len(prompt) for prompt, _, _ in rows))
        lines += [f"    {prompt:{width}}{reverse:24}forward {forward}" for prompt, reverse, forward in rows]
    if certificate.coverage is not None:
        lines += ["", *coverage_lines(certificate)]
    lines += [f"note: {note}" for note in certificate.notes]
    return "\n".join(lines)


def certificate_html(certificate: CertificateRecord) -> str:
    """Return the whole certificate for a notebook."""
    parts: list[HtmlTable | str] = [
        HtmlTable((), quantities(certificate), words=(0, 1), caption=bounds_text(certificate))
    ]
    if len(certificate.reverse_kl) > 1:
        headings = ("prompt", "KL(policy || posterior)", "KL(posterior || policy)")
        parts.append(HtmlTable(headings, prompt_rows(certificate), caption=prompts_heading(certificate)))
    if certificate.coverage is not None:
        source, columns = certificate.coverage.source, ("feature", "policy", "posterior", "")
        rows = [
            [name, f"{policy:.3f}", f"{posterior:.3f}", mark] for name, policy, posterior, mark in cells(certificate)
        ]
        parts.append(HtmlTable(columns, rows, words=(0, 3), caption=f"coverage ({source})"))
    return html_page(verdict(certificate), *parts, *(f"note: {note}" for note in certificate.notes))


def bounds_text(certificate: CertificateRecord) -> str:
    """Return what kind of bounds the numbers are, what they are means of, and their unit."""
    num_prompts = len(certificate.reverse_kl)
    of_mean = "" if num_prompts == 1 else f" (means over {num_prompts} prompts)"
    return f"{bounds_in_words(certificate.grade, certificate.failure_probability)}{of_mean}, nats"


def quantities(certificate: CertificateRecord) -> list[tuple[str, str]]:
    """Return the numbers of the mean over prompts, each with its name."""
    checks = {"prior": certificate.prior_check, "policy": certificate.policy_check}
    names = dict(_NAMES)
    if not np.array_equal(certificate.pooled.reverse_kl, certificate.pooled.reverse_kl_on_support):
        names |= {"reverse_kl_on_support": "  on posterior's support"}
        names["forward_kl"] = names.pop("forward_kl")  # below both
    return [
        *((label, interval_text(certificate.pooled[name])) for name, label in names.items()),
        ("KL(prior || posterior)", f"{interval_text(certificate.prior_kl)}, of a policy that has learned nothing"),
        ("E[r] of the policy", f"{certificate.reward:.4g}, at KL(policy || prior) {certificate.kl_prior:.3f}"),
        ("implied alpha", f"{alpha_text(certificate)}, frontier gap {gap_text(certificate)}"),
        ("bounds on log Z", certificate.evidence_source),
        ("failure probability", failure_text(certificate)),
        *((f"numbers of the {name}", check) for name, check in checks.items() if check),
    ]


def failure_text(certificate: CertificateRecord) -> str:
    """Return the failure probability, and for which intervals it is guaranteed."""
    delta = certificate.failure_probability
    if delta == 0:
        return "0: all completions were counted"
    return f"{delta:g}: guaranteed for log Z (half of it), nominal for the Monte Carlo error of ELBO and EUBO"


def farthest(certificate: CertificateRecord, most: int) -> list[int]:
    """Return the numbers of at most so many prompts, those farthest from the posterior, the farthest first."""
    return [int(p) for p in np.argsort(-certificate.reverse_kl[:, 0], kind="stable")[:most]]


def prompts_heading(certificate: CertificateRecord) -> str:
    """Return the heading of the prompts' rows."""
    num_prompts = len(certificate.reverse_kl)
    return "by prompt" + ("" if num_prompts <= _MOST_PROMPTS else f", the {_MOST_PROMPTS} farthest")


def prompt_rows(certificate: CertificateRecord) -> list[tuple[str, str, str]]:
    """Return the words of a prompt and both KLs of its policy, of the farthest prompts if there are many."""
    words = certificate.draws.prompt_words(most=36)
    return [
        (words[p], reverse_text(certificate, p), interval_text(certificate.forward_kl[p]))
        for p in farthest(certificate, _MOST_PROMPTS)
    ]


def reverse_text(certificate: CertificateRecord, prompt: int) -> str:
    """Return KL(policy || posterior) of a prompt; where its upper end is open, that on the posterior's support, "or inf"."""
    found, on_support = certificate.reverse_kl[prompt], certificate.reverse_kl_on_support[prompt]
    if np.isfinite(found[0]) and np.isposinf(found[1]) and np.isfinite(on_support).all():
        return f"{interval_text(on_support)} or inf"
    return interval_text(found)


def coverage_lines(certificate: CertificateRecord) -> list[str]:
    """Return the masses of the feature's cells, largest posterior mass first."""
    assert certificate.coverage is not None
    lines = [f"  {'feature':24}{'policy':>10}{'posterior':>12}   ({certificate.coverage.source})"]
    lines += [
        f"  {name:24}{policy:10.3f}{posterior:12.3f}{mark and f'   {mark}'}"
        for name, policy, posterior, mark in cells(certificate)
    ]
    more = len(certificate.coverage.cells) - _MOST_CELLS
    return lines + ([f"  ... and {more} cells of less posterior mass"] if more > 0 else [])


def cells(certificate: CertificateRecord) -> list[tuple[str, float, float, str]]:
    """Return a feature's cells: the name, the masses under policy and posterior, and "dropped" or ""."""
    found = certificate.coverage
    assert found is not None
    dropped = set(found.dropped)
    return [
        (cell_text(cell), float(policy), float(posterior), "dropped" if cell in dropped else "")
        for cell, policy, posterior in zip(found.cells[:_MOST_CELLS], found.policy, found.posterior, strict=False)
    ]


def cell_text(cell: Any) -> str:
    """Return a cell's name on one line."""
    return shortened(visible(cell if isinstance(cell, str) else repr(cell)), 22)


def certificate_table(certificate: CertificateRecord) -> pd.DataFrame:
    """Return one row per prompt and a last row "mean", the mean over prompts; two columns per interval."""
    import pandas as pd

    rows: dict[str, Any] = {}
    for name in (*_NAMES, "reverse_kl_on_support"):
        stacked = np.vstack([getattr(certificate, name), certificate.pooled[name]])
        rows[f"{name}_low"], rows[f"{name}_high"] = stacked.T
    index = [*prompt_texts(certificate.draws.prompts, certificate.draws.decoder), "mean"]
    return pd.DataFrame(rows, index=pd.Index(index, name="prompt"))


def interval_text(interval: FloatArray) -> str:
    """Return [low, high], or one number where they are the same to three digits."""
    low, high = float(interval[0]), float(interval[1])
    if np.isfinite(low) and np.isfinite(high) and high - low < 5e-4:
        return f"{(low + high) / 2:.3f}"
    return f"[{number(low)}, {number(high)}]"


def alpha_text(certificate: CertificateRecord) -> str:
    """Return the implied alpha with its interval; where the prior's own reward is in it, only what it exceeds."""
    low, high = certificate.implied_alpha_interval
    if np.isnan(low):
        return "-"
    if np.isinf(high):
        return f"above {low:.3g}: the reward may be the prior's own"
    interval = "" if low == high else f" ({low:.3g} to {high:.3g})"
    return f"{certificate.implied_alpha:.3g}{interval}"


def gap_text(certificate: CertificateRecord) -> str:
    """Return the frontier gap with its standard error."""
    if np.isnan(certificate.frontier_gap):
        return "-"
    error = f" ± {certificate.frontier_gap_se:.3f}" if certificate.frontier_gap_se > 0 else ""
    return f"{certificate.frontier_gap:.3f}{error}"


def number(value: float) -> str:
    """Return a number to three decimals, four digits if it is large, "-" for none."""
    if np.isnan(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 1000 or np.isinf(value) else f"{value:.4g}"
