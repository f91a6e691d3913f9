"""Text classification: a classifier is the prior, noisy annotators are the likelihood, and the posterior is exact.

Which of Jane Austen's six novels is a passage from? The prompt is the passage without its names, the completion one label.
The prior p0 was trained on thousands of other passages. Three annotators say what they think, and annotator a says s of
novel y with probability C_a[y, s] (Dawid and Skene 1979). They are simulated, from matrices that are known here. At alpha =
1 their log-likelihood is the reward,

    r(y) = sum_a log C_a[y, s_a],        p*(y | passage, votes) = p0(y | passage) exp(r(y)) / p(votes | passage),

so p* is exact, and so is the log evidence log p(votes | passage) of each passage. Then the same votes, on a few passages,
train a policy q(y | passage) that reads the passage alone: by `bk.SVI`, KL-regularised, which pulls it to p*, and by maximum
likelihood, which pulls it to the majority. Both are judged on passages of other chapters. What carries over to these is the
weights that passages share: the posterior of one passage knows nothing of the votes on another.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

import bayes_klrl as bk
from bayes_klrl.export.plot_style import BLACK, COLOURS, GREY, drawing
from bayes_klrl.gallery.data.novels import NOVELS, Passages, passages
from bayes_klrl.gallery.finding import Finding
from bayes_klrl.gallery.glance import Glance
from bayes_klrl.gallery.models.label_lm import LabelLM, minimise
from bayes_klrl.gallery.models.passages_lm import passages_lm
from bayes_klrl.typing import FloatArray, IntArray

GLANCE = Glance(
    job="Label texts, with noisy annotators",
    today="A majority vote",
    adds="The annotators as a likelihood, the classifier as the prior",
    verdict="partly",
    measured="The posterior is right on {posterior: accuracy:.0%}, the majority on {majority vote: accuracy:.0%}, the "
    "votes alone on {votes alone: accuracy:.0%}. Tuning on few labels gains "
    "{log loss, prior minus KL-regularised fit (nats):.2f} ± "
    "{standard error of prior minus KL-regularised fit (nats):.2f} nats of log loss over the prior (below 0: a loss).",
    claims=(
        ("posterior: accuracy", "majority vote: accuracy"),
        (
            "log loss, votes alone minus posterior (nats)",
            0.0,
            "standard error of votes alone minus posterior (nats)",
        ),
    ),
    picture="Log loss of each answer on unseen passages, with standard errors; less is better. Those in grey have not "
    "seen the votes on these passages. ECE is the expected calibration error.",
    setting="Model: a log-linear classifier of 12,294 weights, trained on 9,203 passages of six novels. Data: 240 "
    "passages of other chapters with three simulated votes each, and 48 passages with votes to tune on. Log loss is "
    "-log of the probability that the true label gets, in nats.",
)

K = len(NOVELS)
PRIOR, FIT, ML = "prior", "KL-regularised fit", "cross-entropy to the majority"
VOTES_ML, TRUE_ML = "cross-entropy to the votes", "cross-entropy to true labels"
MAJORITY, VOTES, EXACT, AFTER_FIT = "majority vote", "votes alone", "posterior", "posterior after the fit"
LEARNING_RATE, NUM_BINS = 1e-2, 10
NO_NOVEL = -50.0  # log-likelihood of a completion that is a character; its prior probability is 0


def confusion(right: float, *, favourite: int | None = None, share: float = 0.35) -> FloatArray:
    """Return C[y, s]: right with this probability, else any other novel, and a share of the time the favourite."""
    matrix = np.full((K, K), (1 - right) / (K - 1))
    np.fill_diagonal(matrix, right)
    if favourite is not None:
        matrix *= 1 - share
        matrix[:, favourite] += share
    return matrix


ANNOTATORS = np.stack([confusion(0.6), confusion(0.4), confusion(0.6, favourite=NOVELS.index("Pride and Prejudice"))])


def simulated_votes(labels: IntArray, rng: np.random.Generator) -> IntArray:
    """Return what each annotator says of passages with known labels, (P, A)."""
    return np.array([[rng.choice(K, p=matrix[label]) for matrix in ANNOTATORS] for label in labels])


def log_likelihood(votes: IntArray) -> FloatArray:
    """Return log p(votes | label) for every label, (P, K)."""
    found: FloatArray = sum(np.log(matrix[:, said]).T for matrix, said in zip(ANNOTATORS, votes.T, strict=True))
    return found


def problem(prior: bk.LanguageModel, some: Passages, votes: IntArray) -> bk.Posterior:
    """Return the posterior over the novel of each passage, given the votes."""

    def annotators(completions: list[str], said: list[dict[str, float]]) -> list[float]:
        return [values.get(novel, NO_NOVEL) for novel, values in zip(completions, said, strict=True)]

    said = [dict(zip(NOVELS, row, strict=True)) for row in log_likelihood(votes).tolist()]
    return bk.Posterior(prior, bk.Reward(annotators, alpha=1.0), prompts=some.prompts, max_new_tokens=1, said=said)


def label_posterior(exact: bk.Draws) -> FloatArray:
    """Return p*(label | passage, votes), (P, K), from an enumeration, which has the labels last."""
    return exact.weights[:, -K:]


def fitted(prior: LabelLM, some: Passages, votes: IntArray, steps: int, seed: int) -> bk.Fit:
    """Return the KL-regularised fit: KL(q || p*) over the passages, minimised from draws."""
    recipe = bk.SVI(steps, 32, learning_rate=LEARNING_RATE, max_step_kl=np.inf)
    return recipe.fit(problem(prior, some, votes), seed=seed)


def most_likely(prior: LabelLM, some: Passages, target: FloatArray, steps: int) -> LabelLM:
    """Return the fit by cross-entropy to target labels (P, K), from the prior's weights, with steps like those of SVI."""
    import torch

    lm, target_probs = copy.deepcopy(prior), torch.as_tensor(target, dtype=torch.float32)

    def cross_entropy() -> torch.Tensor:
        return -(target_probs * lm.label_log_probs(some.prompts)).sum(dim=1).mean()

    minimise(lm, cross_entropy, steps=steps, learning_rate=LEARNING_RATE)
    return lm


def vote_counts(votes: IntArray) -> FloatArray:
    """Return the number of votes for each label, (P, K)."""
    counts: FloatArray = np.stack([np.bincount(row, minlength=K) for row in votes]).astype(np.float64)
    return counts


def shared_by_ties(values: FloatArray) -> FloatArray:
    """Return 1 at the largest value of each row, shared equally by ties, (P, K)."""
    largest = values == values.max(axis=1, keepdims=True)
    shares: FloatArray = largest / largest.sum(axis=1, keepdims=True)
    return shares


def normalised(log_weights: FloatArray) -> FloatArray:
    """Return exp of log-weights, each row with sum 1."""
    weights = np.exp(log_weights - log_weights.max(axis=1, keepdims=True))
    found: FloatArray = weights / weights.sum(axis=1, keepdims=True)
    return found


def log_loss(probs: FloatArray, labels: IntArray) -> FloatArray:
    """Return -log q(true label) of each passage in nats, (P,)."""
    return -np.log(probs[np.arange(len(labels)), labels])


def reliability(probs: FloatArray, labels: IntArray) -> FloatArray:
    """Return of each bin of confidence: the number of passages, their mean confidence and their accuracy, (bins, 3).

    The confidence is the probability of the most probable label. Empty bins are left out.
    """
    confidence = probs.max(axis=1)
    right = shared_by_ties(probs)[np.arange(len(labels)), labels]
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    return np.array(
        [[(bins == b).sum(), confidence[bins == b].mean(), right[bins == b].mean()] for b in np.unique(bins)]
    )


def judged(probs: FloatArray, labels: IntArray, groups: IntArray) -> dict[str, float]:
    """Return accuracy, log loss with its standard error, and the expected calibration error of label probabilities."""
    losses, table = log_loss(probs, labels), reliability(probs, labels)
    return {
        "accuracy": float(shared_by_ties(probs)[np.arange(len(labels)), labels].mean()),
        "log loss (nats)": float(losses.mean()),
        "its standard error": clustered_se(losses, groups),
        "ECE": float((table[:, 0] * np.abs(table[:, 1] - table[:, 2])).sum() / len(labels)),
    }


def clustered_se(values: FloatArray, groups: IntArray) -> float:
    """Return the standard error of a mean over passages, of which those of one chapter (one group) are alike."""
    sums = np.bincount(groups, weights=values - values.mean())
    return float(np.sqrt(np.square(sums).sum() * len(sums) / (len(sums) - 1)) / len(values))


def few_labelled(per_novel: int, rng: np.random.Generator) -> Passages:
    """Return the passages that are voted on to train, the same number of each novel."""
    pool = passages("labelled")
    return pool.select(
        np.concatenate([rng.choice(np.flatnonzero(pool.labels == k), per_novel, replace=False) for k in range(K)])
    )


def main(
    out: Path, *, seed: int = 0, num_steps: int = 150, per_novel: int = 8, num_unseen: int = 240, num_draws: int = 1000
) -> Finding:
    """Simulate the votes, condition, fit, judge on passages of other chapters, and write the report."""
    rng = np.random.default_rng(seed)
    prior, few, pool = passages_lm(), few_labelled(per_novel, rng), passages("unseen")
    unseen = pool.select(np.linspace(0, len(pool.labels) - 1, num_unseen).astype(int))
    few_votes, votes = simulated_votes(few.labels, rng), simulated_votes(unseen.labels, rng)
    fit = fitted(prior, few, few_votes, num_steps, seed)
    policies: dict[str, LabelLM] = {
        PRIOR: prior,
        # SVI trains a copy of the prior, so that the guide of a LabelLM is one
        FIT: fit.guide,  # type: ignore[dict-item]
        ML: most_likely(prior, few, shared_by_ties(vote_counts(few_votes)), num_steps),
        VOTES_ML: most_likely(prior, few, normalised(log_likelihood(few_votes)), num_steps),
        TRUE_ML: most_likely(prior, few, np.eye(K)[few.labels], num_steps),
    }
    exact = {name: bk.Exact().run(problem(lm, unseen, votes), seed=seed) for name, lm in policies.items()}
    probs = {name: lm.label_probs(unseen.prompts) for name, lm in policies.items()}
    probs |= {
        MAJORITY: (vote_counts(votes) + 1) / (votes.shape[1] + K),  # counts have no probabilities of their own
        VOTES: normalised(log_likelihood(votes)),
        EXACT: label_posterior(exact[PRIOR]),
        AFTER_FIT: label_posterior(exact[FIT]),
    }
    evidence = {name: float(draws.log_evidence.mean()) for name, draws in exact.items()}
    methods: dict[str, bk.Algorithm] = {
        "exact": bk.Exact(),
        "prior IS": bk.ImportanceSampling(num_draws),
        "fit, then IS": bk.ImportanceSampling(num_draws, proposal=fit.guide),
    }
    shown = np.arange(0, num_unseen, max(1, num_unseen // 24))
    comparison = bk.compare(problem(prior, unseen.select(shown), votes[shown]), methods, seed=seed)
    certificate = bk.certify(problem(prior, few, few_votes), fit, seed=seed, num_draws=128)
    groups = np.unique(unseen.labels * 1000 + unseen.chapters, return_inverse=True)[1]
    rows = {name: judged(each, unseen.labels, groups) for name, each in probs.items()}
    out.mkdir(parents=True, exist_ok=True)
    draw_scores(rows, out / "scores.png")
    draw_reliability(probs, unseen.labels, out / "reliability.png")
    pictures = {
        f"Log loss of each answer on {len(unseen.labels)} unseen passages, with standard errors. Those in grey have not "
        f"seen the votes on these passages. {ranking(evidence, rows)}": out / "scores.png",
        "Reliability: accuracy against confidence, with the number of passages in each bin.": out / "reliability.png",
    }
    title = "Which novel? Text classification with noisy annotators"
    page = bk.report([comparison, certificate], out / "report.html", title=title, pictures=pictures, seed=seed)
    return finding(page, out / "scores.png", probs, rows, evidence, unseen.labels, groups, len(few.labels))


def ranking(evidence: Mapping[str, float], rows: Mapping[str, Mapping[str, float]]) -> str:
    """Return how the evidence of the votes, which needs no true label, ranks the policies."""
    best_first = sorted(evidence, key=evidence.__getitem__, reverse=True)
    agrees = best_first == sorted(evidence, key=lambda name: rows[name]["log loss (nats)"])
    order = f"{'as' if agrees else 'not quite as'} their log losses do: {', '.join(best_first)}"
    return f"The evidence of the votes, which needs no true label, ranks the policies {order}."


def finding(
    page: Path,
    picture: Path,
    probs: Mapping[str, FloatArray],
    rows: Mapping[str, Mapping[str, float]],
    evidence: Mapping[str, float],
    labels: IntArray,
    groups: IntArray,
    num_few: int,
) -> Finding:
    """Return what was measured, in words."""

    def gain(name: str, other: str) -> tuple[float, float]:
        difference = log_loss(probs[other], labels) - log_loss(probs[name], labels)
        return float(difference.mean()), clustered_se(difference, groups)

    pairs = [(EXACT, VOTES), (FIT, ML), (FIT, VOTES_ML), (FIT, TRUE_ML), (FIT, PRIOR), (AFTER_FIT, EXACT)]
    gains = {pair: gain(*pair) for pair in pairs}
    words = {pair: f"{mean:.2f} ± {error:.2f}" for pair, (mean, error) in gains.items()}
    right = {name: f"{100 * row['accuracy']:.0f} %" for name, row in rows.items()}
    return Finding(
        report=page,
        picture=picture,
        better=f"On {len(labels)} unseen passages with three votes each the posterior names the novel in {right[EXACT]} of "
        f"cases, the majority in {right[MAJORITY]}, the votes without the prior in {right[VOTES]} (their log loss is higher "
        f"by {words[EXACT, VOTES]} nats). Tuned to the votes on {num_few} passages, the KL-regularised policy has "
        f"{words[FIT, ML]} nats less log loss than cross-entropy to the majority.",
        worse=f"Tuning on {num_few} passages gains {words[FIT, PRIOR]} nats against the prior, which knows thousands, and "
        f"{words[FIT, VOTES_ML]} against cross-entropy to the votes' label probabilities (below 0: a loss): what helps is to "
        f"know the annotators' confusion matrices, which in earnest are estimated. The posterior's calibration error is "
        f"{rows[EXACT]['ECE']:.2f}, that of the votes alone {rows[VOTES]['ECE']:.2f}.",
        numbers={f"{name}: {what}": value for name, row in rows.items() for what, value in row.items()}
        | {f"log evidence of the votes, {name} (nats)": value for name, value in evidence.items()}
        | {f"log loss, {b} minus {a} (nats)": mean for (a, b), (mean, _) in gains.items()}
        | {f"standard error of {b} minus {a} (nats)": error for (a, b), (_, error) in gains.items()},
    )


def draw_scores(rows: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """Draw the log loss of each answer as a bar, and write accuracy and calibration error beside it."""
    losses, errors = ([row[what] for row in rows.values()] for what in ("log loss (nats)", "its standard error"))
    with drawing(file, (6.4, 2.8)) as figure:
        axes = figure.subplots()
        colours = [GREY if name in (PRIOR, FIT, ML, VOTES_ML, TRUE_ML) else COLOURS[0] for name in rows]
        axes.barh(list(rows), losses, xerr=errors, color=colours, ecolor=BLACK)
        for place, (row, loss, error) in enumerate(zip(rows.values(), losses, errors, strict=True)):
            words = f"accuracy {row['accuracy']:.2f}, ECE {row['ECE']:.2f}"
            axes.text(loss + error + 0.02, place, words, va="center", fontsize=7)
        axes.axvline(np.log(K), color=GREY, linewidth=0.7, linestyle=":", zorder=0)
        axes.invert_yaxis()
        axes.set(xlabel="log loss (nats; dotted: no information)", xlim=(0, 1.35 * max(*losses, np.log(K))))


def draw_reliability(probs: Mapping[str, FloatArray], labels: IntArray, file: Path) -> None:
    """Draw the accuracy of each bin of confidence for each answer, and write the number of passages beside it."""
    shown: Sequence[str] = (PRIOR, FIT, ML, MAJORITY, VOTES, EXACT)
    with drawing(file, (6.4, 4.2)) as figure:
        panels = figure.subplots(2, 3, sharex=True, sharey=True).ravel()
        for axes, name in zip(panels, shown, strict=True):
            counts, confidence, accuracy = reliability(probs[name], labels).T
            axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.7)
            axes.plot(confidence, accuracy, "o-", ms=3, color=COLOURS[0])
            for count, x, y in zip(counts, confidence, accuracy, strict=True):
                axes.annotate(f"{count:.0f}", (x, y), (0, 4), textcoords="offset points", fontsize=6.5, ha="center")
            axes.set(title=name, xlim=(0, 1.05), ylim=(0, 1.1))
        figure.supxlabel("confidence", fontsize=9)
        figure.supylabel("accuracy", fontsize=9)


if __name__ == "__main__":
    print(main(Path("bayes-klrl-gallery/classification")))
