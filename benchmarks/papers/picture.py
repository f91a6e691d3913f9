"""Draw over-optimisation: `python -m benchmarks.papers.picture docs/papers/gao2022.png`.

The gold reward above the prior's against d = sqrt(KL to the prior) on P13 with 60 preferences, for best-of-n by the
proxy and for the proxy's posteriors, five data sets and their mean, from n = 2 on; dotted, the form of Gao et al.
(2022) fitted to the mean.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from bayes_klrl.export.plot_style import COLOURS, GREY, drawing
from bayes_klrl.inference.sampling.order_statistics import best_of_n_kl_bound
from bayes_klrl.problems import overoptimisation
from benchmarks.papers.over_optimisation import FORMS, LARGEST_KL, Curve, best_of_n_curve, fit, posterior_curve

__all__ = ["draw"]


def draw(file: str | Path, *, num_pairs: int = 60, num_seeds: int = 5, max_new_tokens: int = 8) -> Path:
    """Draw the picture and return its file."""
    problems = [overoptimisation(num_pairs, max_new_tokens=max_new_tokens, seed=seed) for seed in range(num_seeds)]
    curves = {"best-of-n": best_of_n_curve, "RL with a KL penalty: the posterior": posterior_curve}
    d = np.linspace(np.sqrt(best_of_n_kl_bound(2)), np.sqrt(LARGEST_KL), 60)
    with drawing(file, (4.8, 2.9)) as figure:
        axes = figure.subplots()
        axes.set(xlabel="d = √KL to the prior (KL in nats)", ylabel="gold reward above the prior's")
        axes.axhline(0.0, color=GREY, linewidth=0.8)
        for (label, curve_of), form, colour in zip(curves.items(), FORMS, COLOURS, strict=False):
            each = np.stack([curve_of(problem).at(d**2).gold for problem in problems])
            mean = each.mean(axis=0)
            a, c, _ = fit(Curve(d**2, d, mean), form)
            axes.plot(d, each.T, color=colour, linewidth=0.6, alpha=0.45)
            axes.plot(d, mean, color=colour, linewidth=2.0, label=label)
            axes.plot(d, a * d - c * FORMS[form](d), color=colour, linestyle=":", label=f"{form}, fitted")
        axes.legend(frameon=False, fontsize=7)
    with Image.open(file) as drawn:
        few_colours = drawn.convert("P", palette=Image.Palette.ADAPTIVE, colors=32)
    few_colours.save(file, optimize=True)
    return Path(file)


if __name__ == "__main__":
    Path(sys.argv[1]).parent.mkdir(parents=True, exist_ok=True)
    print(draw(sys.argv[1]))
