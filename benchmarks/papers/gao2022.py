"""Gao, Schulman and Hilton (2022): the gold reward when a proxy is optimised, by best-of-n and by RL.

Problem P13 (theory.md 8.11): the gold reward is known, the proxy is fitted to n preferences between prior draws, and
all completions are enumerated. With d = sqrt(KL to the prior) their forms for the gold reward above the prior's are

    best-of-n   d (a - c d)            RL   d (a - c log d)

fitted here by least squares to the exact curves of best-of-n and of the posteriors p0 exp(b proxy), the optima of RL
with a KL penalty. Policies that `bk.SVI` trains with a strong penalty, a weak one and next to none show what the
penalty does to the curve of gold against KL, and how much KL a trained policy pays for a proxy reward that best-of-n
has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bayes_klrl.problems import Overoptimisation, overoptimisation
from bayes_klrl.typing import FloatArray
from benchmarks.papers.over_optimisation import (
    FORMS,
    LARGEST_KL,
    Curve,
    best_of_n_curve,
    fit,
    posterior_curve,
    training_curve,
)
from benchmarks.papers.record import Cell, Claim, Paper, Table, interval

__all__ = ["ALPHAS", "METHODS", "study"]

METHODS = ("best-of-n", "RL (posterior)")
ALPHAS = {"strong penalty (alpha 0.4)": 0.4, "weak penalty (alpha 0.1)": 0.1, "next to none (alpha 0.001)": 1e-3}
_KLS = (0.5, 1.0, 1.5, 2.0)
_Curves = dict[int, list[tuple[Curve, Curve]]]
_Paths = Mapping[str, Sequence[Curve]]


def study(*, num_seeds: int = 5, tiny: bool = False) -> Paper:
    """Return the study; a seed is a data set of preferences."""
    pairs = (20,) if tiny else (20, 60, 200)
    tokens = 5 if tiny else 8
    problems = {n: [overoptimisation(n, max_new_tokens=tokens, seed=seed) for seed in range(num_seeds)] for n in pairs}
    curves = {n: [(best_of_n_curve(each), posterior_curve(each)) for each in of] for n, of in problems.items()}
    shape, rises = _shape(curves)
    forms, r_squared = _forms(curves)
    exact = {method: [each[column] for each in curves[pairs[-1]]] for column, method in enumerate(METHODS)}
    paths = _trained(problems[pairs[-1]], 4 if tiny else 120) | exact
    return Paper(
        "gao2022",
        "Gao, Schulman and Hilton 2022, Scaling laws for reward model overoptimization",
        f"P13 with T = {tokens}, {problems[pairs[0]][0].gold.size:,} completions, proxies from {pairs} preferences, "
        f"{num_seeds} data sets each; exact but for the trained policies.",
        (*_claims(curves, rises, r_squared), *_about_the_penalty(paths), _about_best_of_n(paths)),
        (shape, forms, _at_equal_kl(paths)),
        num_seeds,
    )


def _shape(curves: _Curves) -> tuple[Table, dict[tuple[int, str], float]]:
    """Return where the gold reward peaks, and the share of data sets whose curve rises, peaks and falls."""
    rows: list[tuple[Cell, ...]] = []
    rises = {}
    for n, of in curves.items():
        for column, method in enumerate(METHODS):
            pieces = [each[column] for each in of]
            at = [int(piece.gold.argmax()) for piece in pieces]
            fell = [0 < i and p.gold[-1] < p.gold[i] - 1e-3 for i, p in zip(at, pieces, strict=True)]
            rises[n, method] = float(np.mean(fell))
            numbers = (
                [piece.gold[i] for i, piece in zip(at, pieces, strict=True)],
                [piece.kl[i] for i, piece in zip(at, pieces, strict=True)],
                [piece.gold[-1] for piece in pieces],
                [piece.proxy[-1] for piece in pieces],
            )
            rows.append((n, method, *(interval(values) for values in numbers), f"{sum(fell)} of {len(of)}"))
    columns = ("pairs", "method", "gold at the peak", "KL at the peak", "gold at the end", "proxy at the end", "falls")
    return Table("Rewards above the prior's along the optimisation of the proxy", columns, tuple(rows)), rises


def _forms(curves: _Curves) -> tuple[Table, dict[tuple[str, str], list[float]]]:
    """Return R^2 of both forms on both curves."""
    rows: list[tuple[Cell, ...]] = []
    pooled: dict[tuple[str, str], list[float]] = {(m, form): [] for m in METHODS for form in FORMS}
    for n, of in curves.items():
        for column, method in enumerate(METHODS):
            found = {form: [fit(each[column], form) for each in of] for form in FORMS}
            for form, fits in found.items():
                pooled[method, form] += [r2 for *_, r2 in fits]
            cells = (
                f"{np.median([r2 for *_, r2 in fits]):.3f} ({min(r2 for *_, r2 in fits):.3f})"
                for fits in found.values()
            )
            rows.append((n, method, *cells))
    caption = f"R^2 of the forms on gold rewards up to {LARGEST_KL:g} nats: the median data set (and the worst)"
    return Table(caption, ("pairs", "method", *FORMS), tuple(rows)), pooled


def _trained(problems: Sequence[Overoptimisation], steps: int) -> dict[str, list[Curve]]:
    """Return the curves of policies trained with and without a penalty, by label."""
    return {
        label: [training_curve(problem, alpha, steps, seed) for seed, problem in enumerate(problems)]
        for label, alpha in ALPHAS.items()
    }


def _at_equal_kl(paths: _Paths) -> Table:
    """Return gold and proxy rewards of every policy at equal KL, and the KL that its curve ends at."""
    rows = []
    for label, curves in paths.items():
        gold, proxy = _rewards(curves)
        end = interval([curve.kl[-1] for curve in curves])
        rows.append((label, *(_shown(gold[:, i]) for i in range(len(_KLS))), _shown(proxy[:, 1]), end))
    return Table(
        "At equal KL to the prior, rewards above the prior's; trained policies by SVI, largest data sets",
        ("policy", *(f"gold at {each} nats" for each in _KLS), f"proxy at {_KLS[1]} nat", "KL at the end"),
        tuple(rows),
    )


def _rewards(curves: Sequence[Curve]) -> tuple[FloatArray, FloatArray]:
    """Return gold and proxy of each data set at `_KLS`, shape (data sets, KLs); NaN past a curve's end."""
    at = [curve.at(np.array(_KLS)) for curve in curves]
    return np.stack([each.gold for each in at]), np.stack([each.proxy for each in at])


def _shown(values: FloatArray) -> Cell:
    """Return the interval over data sets, or "-" unless all of them get there."""
    return interval(values) if np.isfinite(values).all() else "-"


def _claims(
    curves: _Curves, rises: Mapping[tuple[int, str], float], r_squared: Mapping[tuple[str, str], list[float]]
) -> tuple[Claim, ...]:
    """Return the verdicts on the shape, on the functional forms and on the KL at the peak."""
    medians = {key: float(np.median(values)) for key, values in r_squared.items()}
    own = medians[METHODS[0], "d (a - c d)"], medians[METHODS[1], "d (a - c log d)"]
    other = medians[METHODS[0], "d (a - c log d)"], medians[METHODS[1], "d (a - c d)"]
    good, better = min(own) > 0.9, [a > b for a, b in zip(own, other, strict=True)]
    peaks = np.array([[piece.kl[piece.gold.argmax()] for piece in pair] for of in curves.values() for pair in of])
    later = interval(peaks[:, 1] - peaks[:, 0])
    return (
        Claim(
            "the gold reward rises, peaks and falls as the proxy is optimised",
            "reproduced" if min(rises.values()) == 1.0 else "partly" if max(rises.values()) > 0 else "not reproduced",
            f"it does in {np.mean(list(rises.values())):.0%} of the {peaks.size} exact curves",
        ),
        Claim(
            "gold follows d (a - c d) for best-of-n and d (a - c log d) for RL, d = sqrt(KL)",
            "reproduced" if good and all(better) else "partly" if good or any(better) else "not reproduced",
            f"median R^2: best-of-n {own[0]:.3f} by its form and {other[0]:.3f} by RL's; RL {own[1]:.3f} by its form and "
            f"{other[1]:.3f} by best-of-n's",
        ),
        Claim(
            "RL is slower than best-of-n at over-optimisation: its gold reward peaks at a larger KL",
            "reproduced" if later.mean > later.half_width else "not reproduced",
            f"KL at the peak of RL's optima minus that of best-of-n: {later} nats over {len(peaks)} data sets",
        ),
    )


def _about_the_penalty(paths: _Paths) -> tuple[Claim, Claim]:
    """Return the verdicts on what a penalty does to gold and to proxy: paired differences at equal KL, where all get there."""
    strong, weak, none = (_rewards(paths[label]) for label in ALPHAS)
    found: list[list[str]] = [[], []]
    moved: list[list[bool]] = [[], []]
    for name, with_penalty in (("strong", strong), ("weak", weak)):
        for i, away in enumerate(_KLS):
            for which in (0, 1):  # gold, proxy
                difference = with_penalty[which][:, i] - none[which][:, i]
                if np.isfinite(difference).all():
                    each = interval(difference)
                    found[which].append(f"{name} {each} at {away} nats")
                    far = 0.1 * abs(
                        float(none[0][:, i].mean())
                    )  # "not moved": the interval lies within a tenth of the gold
                    moved[which].append(
                        abs(each.mean) + each.half_width > far if which == 0 else each.mean > each.half_width
                    )
    still = not any(moved[0])
    return (
        Claim(
            "an explicit KL penalty does not move the curve of gold against KL",
            "not reproduced" if not moved[0] or all(moved[0]) else "reproduced" if still else "partly",
            f"gold with the penalty minus gold with next to none: {', '.join(found[0]) or '-'}",
        ),
        Claim(
            "the penalty raises the proxy reward at a given KL",
            "reproduced" if moved[1] and all(moved[1]) else "partly" if any(moved[1]) else "not reproduced",
            f"the same for the proxy: {', '.join(found[1]) or '-'}",
        ),
    )


def _about_best_of_n(paths: _Paths) -> Claim:
    """Return the verdict on the KL that RL and best-of-n pay for one proxy reward."""
    away = _KLS[1]
    wanted = [curve.at(np.array([away])).proxy for curve in paths[METHODS[0]]]
    paid = {
        label: np.array([curve.kl_of_proxy(proxy)[0] for curve, proxy in zip(paths[label], wanted, strict=True)])
        for label in (*ALPHAS, METHODS[1])
    }
    trained = [bool(paid[label].mean() > away) for label in ALPHAS if np.isfinite(paid[label]).all()]
    optimum = bool(paid[METHODS[1]].mean() > away)
    listed = ", ".join(f"{label} {_shown(values)}" for label, values in paid.items())
    return Claim(
        "RL pays far more KL than best-of-n for the same proxy reward",
        "reproduced"
        if optimum and trained and all(trained)
        else "partly"
        if optimum or any(trained)
        else "not reproduced",
        f"KL for the proxy reward that best-of-n has at {away} nat: {listed} (-: not all reach it). No policy can pay less "
        "than the posterior",
    )
