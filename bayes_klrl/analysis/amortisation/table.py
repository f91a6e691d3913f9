"""The numbers of an amortisation as tables, and how they print."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_klrl.analysis.amortisation.judgement import Judgement
from bayes_klrl.analysis.amortisation.record import AmortisationRecord
from bayes_klrl.analysis.certificate.record import bounds_in_words
from bayes_klrl.analysis.comparison.table import count_text, method_row
from bayes_klrl.draws import Draws
from bayes_klrl.export.html import HtmlTable, html_page
from bayes_klrl.export.printed import printed
from bayes_klrl.prompts.words import prompt_texts
from bayes_klrl.typing import FloatArray

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["POLICIES", "amortisation_html", "amortisation_table", "amortisation_text", "prompt_table", "verdict"]

POLICIES = ("prior", "guide")
_TRUSTED_ESS = 100  # as in a comparison
_COLUMNS = (
    "kl_posterior",
    "kl_posterior_low",
    "kl_posterior_high",
    "reward",
    "kl_prior",
    "tokens_per_effective_draw",
    "ess",
    "model_tokens",
    "training_tokens",
    "seconds",
    "training_seconds",
)
_HEADINGS = (
    "prompts",
    "method",
    "KL to\nposterior",
    "bounds",
    "E\\[r]",
    "KL to\nprior",
    "tokens per\neffective draw",
    "ESS",
    "model\ntokens",
    "training\ntokens",
    "seconds",
    "training\nseconds",
)


def amortisation_table(amortisation: AmortisationRecord) -> pd.DataFrame:
    """Return one row per set of prompts and method, with the columns that `Amortisation.table` describes."""
    import pandas as pd

    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for prompts, judged in (("training", amortisation.training), ("unseen", amortisation.unseen)):
        for policy in POLICIES:
            rows[prompts, policy] = _policy_row(amortisation, judged, policy)
    for name, draws in amortisation.draws.items():
        rows["unseen", name] = _row(amortisation, draws, trained="guide" in name)
    table = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=list(_COLUMNS))
    table.index = pd.MultiIndex.from_tuples(list(rows), names=["prompts", "method"])
    return table


def prompt_table(amortisation: AmortisationRecord) -> pd.DataFrame:
    """Return one row per prompt: both KLs to the posterior with their bounds."""
    import pandas as pd

    parts = []
    for name, judged in (("training", amortisation.training), ("unseen", amortisation.unseen)):
        draws = judged.draws["prior"]
        columns: dict[str, Any] = {"prompts": name, "prompt": prompt_texts(draws.prompts, draws.decoder)}
        for policy in POLICIES:
            low, high = judged.bounds[policy].reverse_kl.T
            columns |= {f"{policy}_kl": judged.kl[policy], f"{policy}_kl_low": low, f"{policy}_kl_high": high}
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def verdict(amortisation: AmortisationRecord) -> str:
    """Return one sentence: how far guide and prior are from the posterior, on unseen prompts and on the others."""
    training, unseen = amortisation.training, amortisation.unseen
    return (
        f"On {unseen.posterior.num_prompts} unseen prompts the guide is {_distance(unseen.pooled['guide'].reverse_kl)} from "
        f"the posterior and the prior {_range(unseen.pooled['prior'].reverse_kl)}; on the guide's "
        f"{training.posterior.num_prompts} training prompts it is {_range(training.pooled['guide'].reverse_kl)}"
    )


def amortisation_text(amortisation: AmortisationRecord) -> str:
    """Return the verdict, the table, and what the bounds are worth."""
    from rich.table import Table

    view = Table(box=None, pad_edge=False)
    for number, heading in enumerate(_HEADINGS):
        view.add_column(heading, justify="left" if number < 2 else "right", vertical="bottom", no_wrap=True)
    for (prompts, method), row in amortisation_table(amortisation).iterrows():
        view.add_row(str(prompts), str(method), *_cells(row))
    bounds = [bounds_text(amortisation), f"  {amortisation.unseen.source}"]
    return "\n".join(
        [*verdict(amortisation).replace("; ", ";\n").splitlines(), "", printed(view), "", *bounds, *notes(amortisation)]
    )


def amortisation_html(amortisation: AmortisationRecord) -> str:
    """Return the verdict, the table, and what the bounds are worth, for a notebook."""
    headings = [heading.replace("\\[", "[") for heading in _HEADINGS]
    rows = [[*map(str, key), *_cells(row)] for key, row in amortisation_table(amortisation).iterrows()]
    table = HtmlTable(headings, rows, words=(0, 1))
    return html_page(
        verdict(amortisation), table, bounds_text(amortisation), amortisation.unseen.source, *notes(amortisation)
    )


def bounds_text(amortisation: AmortisationRecord) -> str:
    """Return what kind of bounds the numbers have, and how often such bounds fail."""
    unseen = amortisation.unseen
    kind = bounds_in_words(unseen.grade, unseen.failure_probability)
    return f"{kind}, failure probability {unseen.failure_probability:g}"


def notes(amortisation: AmortisationRecord) -> list[str]:
    """Return what to keep in mind when one reads the numbers."""
    fit, notes = amortisation.fit, []
    if any(draws.ess.min() < _TRUSTED_ESS for draws in amortisation.draws.values()):
        notes.append(
            f"note: effective sample sizes below {_TRUSTED_ESS} come out too large, and tokens per effective draw too few: "
            "draw more"
        )
    if fit is not None and fit.interrupted:
        notes.append(f"note: training was interrupted after {len(fit.history['elbo'])} steps")
    return notes


def _policy_row(amortisation: AmortisationRecord, judged: Judgement, policy: str) -> dict[str, Any]:
    """Return the columns of a policy, whose draws are its own and not the posterior's."""
    low, high = judged.pooled[policy].reverse_kl
    row = _row(amortisation, judged.draws[policy], trained=policy == "guide")
    return row | {"kl_posterior": judged.kl[policy].mean(), "kl_posterior_low": low, "kl_posterior_high": high}


def _row(amortisation: AmortisationRecord, draws: Draws, trained: bool) -> dict[str, Any]:
    """Return the columns that a method's draws give."""
    row = method_row(None, [draws], None)
    if trained:
        cost = amortisation.training_cost
        row |= {"training_tokens": cost.training_tokens, "training_seconds": cost.training_seconds}
    return row


def _cells(row: Any) -> list[str]:
    """Return one row's numbers as people read them."""
    low, high = row["kl_posterior_low"], row["kl_posterior_high"]
    return [
        ("~ " if np.isnan(low) and not np.isnan(row["kl_posterior"]) else "") + _number(row["kl_posterior"], 2),
        "-" if np.isnan(low) else _range(np.array([low, high])),
        _number(row["reward"], 3),
        _number(row["kl_prior"], 2),
        count_text(row["tokens_per_effective_draw"]),
        _number(row["ess"], 0),
        _number(row["model_tokens"], 0),
        _number(row["training_tokens"], 0),
        _number(row["seconds"], 1),
        _number(row["training_seconds"], 1),
    ]


def _distance(interval: FloatArray) -> str:
    """Return an interval of a KL in words, with its unit."""
    words = _range(interval)
    return words if np.isposinf(interval[0]) else f"{words} nats"


def _range(interval: FloatArray) -> str:
    """Return an interval in words."""
    low, high = float(interval[0]), float(interval[1])
    if np.isposinf(high):
        return "infinitely far" if np.isposinf(low) else f"at least {low:.2f}"
    return f"{(low + high) / 2:.2f}" if high - low < 5e-3 else f"{low:.2f} to {high:.2f}"


def _number(value: float, digits: int) -> str:
    """Return a number, a dash where there is none."""
    return "-" if np.isnan(value) else f"{value:,.{digits}f}"
