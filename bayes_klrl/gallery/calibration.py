"""How good and how calibrated answers are, exactly, where every answer and its probability is known.

    calibration error = sum over bins of mass |confidence - accuracy|

An answer is drawn with its own probability q(x | c), which is its confidence. Answers are calibrated if of those drawn with
confidence u a share u is right (Guo et al. 2017, who take the most probable answer instead of a drawn one).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from bayes_klrl.export.plot_style import BLACK, COLOURS, GREY, drawing
from bayes_klrl.typing import FloatArray

__all__ = ["NUM_BINS", "Score", "draw_reliability", "draw_scores", "reliability", "score"]

NUM_BINS = 10


@dataclass(frozen=True)
class Score:
    """How good answers are, means over questions.

    Parameters
    ----------
    pass_1, pass_8
        The probability that one draw is right, and that one of eight is.
    log_loss
        Minus the log-probability of the right answer, in nats.
    calibration_error
        The expected calibration error of a drawn answer: its probability against how often such answers are right.
    entropy, kl_prior
        In nats.
    """

    pass_1: float
    pass_8: float
    log_loss: float
    calibration_error: float
    entropy: float
    kl_prior: float


def score(probs: FloatArray, right: FloatArray, prior: FloatArray) -> Score:
    """Return the score of answers `probs` (P, V), where `right` (P, V) is 1 for right answers and 0 for others."""
    p = (probs * right).sum(axis=1)
    logs = np.log(np.maximum(probs, 1e-300))
    ratios = logs - np.log(np.maximum(prior, 1e-300))
    confidence, accuracy, mass = reliability(probs, right)
    return Score(
        pass_1=float(p.mean()),
        pass_8=float((1 - (1 - p) ** 8).mean()),
        log_loss=float(-np.log(np.maximum(p, 1e-300)).mean()),
        calibration_error=float((mass * np.abs(confidence - accuracy)).sum()),
        entropy=float(-(probs * logs).sum(axis=1).mean()),
        kl_prior=float((probs * ratios).sum(axis=1).mean()),
    )


def reliability(probs: FloatArray, right: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return confidence, accuracy and mass of drawn answers, by bins of equal width of their probability, (NUM_BINS,) each.

    An answer counts as often as it is drawn, with its own probability; empty bins have mass 0 and the rest is 0 as well.
    """
    weights = (probs / len(probs)).ravel()
    which = np.minimum((probs.ravel() * NUM_BINS).astype(int), NUM_BINS - 1)
    mass, confidence, accuracy = (
        np.bincount(which, weights * values, NUM_BINS).astype(float) for values in (1.0, probs.ravel(), right.ravel())
    )
    filled = np.maximum(mass, 1e-300)
    return confidence / filled, accuracy / filled, mass


def draw_scores(scores: Mapping[str, Score], file: Path) -> None:
    """Draw the scores as a table."""
    heads = ("pass@1", "pass@8", "log loss", "calibration error", "entropy", "KL to the prior")
    cells = [[f"{getattr(each, field.name):.3f}" for field in fields(each)] for each in scores.values()]
    with drawing(file, (7.4, 0.6 + 0.3 * len(scores))) as figure:
        axes = figure.subplots()
        axes.axis("off")
        table = axes.table(
            cells, rowLabels=list(scores), colLabels=heads, loc="center", cellLoc="right", edges="horizontal"
        )
        table.auto_set_font_size(False)
        table.set_fontsize(8)
        table.scale(1, 1.3)


def draw_reliability(answers: Mapping[str, FloatArray], right: FloatArray, file: Path) -> None:
    """Draw accuracy against confidence, and how much is drawn with each confidence."""
    with drawing(file, (7.2, 3.4)) as figure:
        left, side = figure.subplots(1, 2)
        left.plot([0, 1], [0, 1], color=GREY, linestyle=":")
        for colour, (name, probs) in zip((BLACK, *COLOURS), answers.items(), strict=False):
            confidence, accuracy, mass = reliability(probs, right)
            kept = mass > 0.005
            left.plot(confidence[kept], accuracy[kept], "o-", markersize=3, color=colour, label=name)
            side.step((np.arange(NUM_BINS) + 0.5) / NUM_BINS, mass, where="mid", color=colour)
        left.set(
            xlabel="probability of the drawn answer", ylabel="share of them that is right", xlim=(0, 1), ylim=(0, 1)
        )
        left.legend(frameon=False, loc="upper left")
        side.set(xlabel="probability of the drawn answer", ylabel="share of all drawn answers", xlim=(0, 1))
