"""A certificate in words: one screen, verdict first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_klrl.analysis.certificate.record import CertificateRecord
from bayes_klrl.typing import FloatArray

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["certificate_table", "certificate_text", "verdict"]

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
    where = f"from the posterior at alpha {certificate.alpha:.3g}"
    if np.isposinf(low):
        distance = f"infinitely far {where}: the policy draws what has posterior probability 0"
    elif np.isposinf(high):
        distance = f"at least {low:.2f} nats {where}; no upper end"
    elif high - low < 0.02:
        distance = f"{(low + high) / 2:.2f} nats {where}"
    else:
        distance = f"{low:.2f} to {high:.2f} nats {where}"
    missed = float(certificate.pooled.forward_kl[0])
    if missed > max(2 * high, 1.0) or np.isposinf(missed):  # it looks near from where it looks, and lost a mode
        distance += f", but misses what the posterior has ({_NAMES['forward_kl']} at least {number(missed)})"
    if np.isnan(certificate.frontier_gap):
        return distance
    gap, margin = certificate.frontier_gap, 1.96 * certificate.frontier_gap_se
    spent = (
        "no more KL than the reward needs, within its error"
        if gap < margin
        else f"{gap:.2f} nats more KL than the reward needs"
    )
    return f"{distance}; spends {spent}"


def certificate_text(certificate: CertificateRecord) -> str:
    """Return the whole certificate, for a terminal 100 characters wide."""
    num_prompts = len(certificate.reverse_kl)
    of_mean = "" if num_prompts == 1 else f" (means over {num_prompts} prompts)"
    lines = [verdict(certificate), "", f"grade {certificate.grade}{of_mean}, nats"]
    for name, label in _NAMES.items():
        lines.append(f"  {label:26}{interval_text(certificate.pooled[name])}")
    lines += [
        f"  {'E[r] of the policy':26}{certificate.reward:.4g}, at KL(policy || prior) {certificate.kl_prior:.3f}",
        f"  {'implied alpha':26}{alpha_text(certificate)}, frontier gap {gap_text(certificate)}",
        f"  {'bounds on log Z':26}{certificate.evidence_source}",
        f"  {'failure probability':26}{failure_text(certificate)}",
    ]
    checks = {"prior": certificate.prior_check, "policy": certificate.policy_check}
    lines += [f"  {f'numbers of the {name}':26}{check}" for name, check in checks.items() if check]
    if num_prompts > 1:
        lines += ["", *prompt_lines(certificate)]
    if certificate.coverage is not None:
        lines += ["", *coverage_lines(certificate)]
    lines += [f"note: {note}" for note in certificate.notes]
    return "\n".join(lines)


def failure_text(certificate: CertificateRecord) -> str:
    """Return the failure probability, and for which intervals it is guaranteed."""
    delta = certificate.failure_probability
    if delta == 0:
        return "0: all completions were counted"
    return f"{delta:g}: guaranteed for log Z (half of it), nominal for the Monte Carlo error of ELBO and EUBO"


def prompt_lines(certificate: CertificateRecord) -> list[str]:
    """Return both KLs of each prompt, of the farthest ones if there are many."""
    order = np.argsort(-certificate.reverse_kl[:, 0], kind="stable")[:_MOST_PROMPTS]
    lines = ["  by prompt" + ("" if len(order) == len(certificate.reverse_kl) else f", the {len(order)} farthest")]
    for p in order:
        prompt = repr(certificate.draws.prompts[p])
        shown = prompt if len(prompt) <= 36 else prompt[:33] + "..."
        reverse, forward = certificate.reverse_kl[p], certificate.forward_kl[p]
        lines.append(f"    {shown:38}{interval_text(reverse):22}forward {interval_text(forward)}")
    return lines


def coverage_lines(certificate: CertificateRecord) -> list[str]:
    """Return the masses of the feature's cells, largest posterior mass first."""
    cells = certificate.coverage
    assert cells is not None
    lines = [f"  {'feature':24}{'policy':>10}{'posterior':>12}   ({cells.source})"]
    dropped = set(cells.dropped)
    for i, cell in enumerate(cells.cells[:_MOST_CELLS]):
        mark = "   dropped" if cell in dropped else ""
        lines.append(f"  {cell_text(cell):24}{cells.policy[i]:10.3f}{cells.posterior[i]:12.3f}{mark}")
    if len(cells.cells) > _MOST_CELLS:
        lines.append(f"  ... and {len(cells.cells) - _MOST_CELLS} cells of less posterior mass")
    return lines


def cell_text(cell: Any) -> str:
    """Return a cell's name, an empty text as one can see it."""
    return (cell if isinstance(cell, str) and cell.strip() else repr(cell))[:22]


def certificate_table(certificate: CertificateRecord) -> pd.DataFrame:
    """Return one row per prompt and a last row "mean", the mean over prompts; two columns per interval."""
    import pandas as pd

    rows: dict[str, Any] = {}
    for name in _NAMES:
        stacked = np.vstack([getattr(certificate, name), certificate.pooled[name]])
        rows[f"{name}_low"], rows[f"{name}_high"] = stacked.T
    index = [*map(str, certificate.draws.prompts), "mean"]
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
    return f"{certificate.implied_alpha:.3g} ({low:.3g} to {high:.3g})"


def gap_text(certificate: CertificateRecord) -> str:
    """Return the frontier gap with its standard error."""
    if np.isnan(certificate.frontier_gap):
        return "-"
    return f"{certificate.frontier_gap:.3f} ± {certificate.frontier_gap_se:.3f}"


def number(value: float) -> str:
    """Return a number to three decimals, four digits if it is large, "-" for none."""
    if np.isnan(value):
        return "-"
    return f"{value:.3f}" if abs(value) < 1000 or np.isinf(value) else f"{value:.4g}"
