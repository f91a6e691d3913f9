"""Dialogue: kind replies without insults, by SMC while decoding or by a trained adapter, to customers that were never seen.

The prior is SmolLM2-135M-Instruct. A conversation has two turns and a third one of the customer, often a rude one; the reply
is the completion. Its likelihood is exp(VADER's sentiment / alpha) times the constraint that no word of a short list is in it.

Inference while decoding starts anew for every conversation. The adapter that is shipped (LoRA, `examples/train_dialogue.py`)
was trained by SVI on 16 other conversations: it replies at the price of one completion, and as the proposal of importance
sampling it is corrected towards the posterior. All numbers here are of the 8 conversations that it was not trained on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import bayes_klrl as bk
from bayes_klrl.errors import needs
from bayes_klrl.export.plot_style import COLOURS, drawing
from bayes_klrl.gallery.data.conversations import INSULT, SORRY, UNSEEN, Turns, messages
from bayes_klrl.gallery.finding import Finding
from bayes_klrl.gallery.glance import Glance
from bayes_klrl.gallery.means import mean_and_se
from bayes_klrl.inference.policies import PolicyDraws, as_policy
from bayes_klrl.typing import FloatArray

GLANCE = Glance(
    job="Kind replies without insults, to customers that were never seen",
    today="Best of n",
    adds="SMC while decoding; an adapter that is tuned once",
    verdict="partly",
    measured="Weighted draws of the prior are cheapest: sentiment (by the lexicon VADER) {prior IS, sentiment:.2f} at "
    "{prior IS, CPU seconds per effective draw:.1f} CPU seconds per effective draw. Best of 8 has "
    "{best of 8, sentiment:.2f} at {best of 8, CPU seconds per effective draw:.1f}, SMC {SMC, sentiment:.2f} at "
    "{SMC, CPU seconds per effective draw:.1f}. The adapter, one completion a reply, has {adapter, sentiment:.2f}, "
    "less than best of 8 at the same KL to the prior.",
    claims=(
        ("adapter, sentiment", "prior, sentiment", "adapter minus prior, sentiment, se"),
        ("best of 8, sentiment", "adapter, sentiment"),
        ("best of 8, CPU seconds per effective draw", "prior IS, CPU seconds per effective draw"),
        ("SMC, CPU seconds per effective draw", "prior IS, CPU seconds per effective draw"),
    ),
    picture="Left: VADER's sentiment of the replies by each method, with standard errors, and the KL to the prior in nats. "
    "Right: the CPU seconds that an effective draw takes; the training of the adapter is not in them.",
    setting="Model: SmolLM2-135M-Instruct, 135 million parameters, and an adapter (LoRA) of 0.44 million, tuned on 16 "
    "conversations. Data: 8 other conversations, and 16 replies to each of at most 20 tokens. VADER is a lexicon that "
    "scores the sentiment of a text from -1 to 1. Prior IS is importance sampling from the prior: its own draws, "
    "weighted.",
)

ALPHA, TOKENS = 0.125, 20  # by a frontier of 16 x 12 draws: about 2.4 nats from the prior
SHIPPED = Path(__file__).parents[1] / "shipped" / "dialogue"


@cache
def analyzer() -> Any:
    """Return VADER, a lexicon of words with their sentiment and rules for negation and emphasis."""
    with needs("The example", "gallery", "vaderSentiment"):
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    return SentimentIntensityAnalyzer()


def said(completion: Any) -> str:
    """Return the text of a reply, given as messages or as text."""
    return completion if isinstance(completion, str) else str(completion[0]["content"])


def sentiment(completions: list[Any]) -> list[float]:
    """Return VADER's compound score of each reply, from -1 to 1."""
    return [float(analyzer().polarity_scores(said(completion))["compound"]) for completion in completions]


def clean(completions: list[Any]) -> list[bool]:
    """Return whether each reply has no word of the list."""
    return [INSULT.search(said(completion)) is None for completion in completions]


def relaxed(completions: list[Any]) -> list[float]:
    """Return the reward of the training, where an insult costs 1, which is 8 nats: SVI refuses a likelihood of 0."""
    scores, allowed = sentiment(completions), clean(completions)
    return [score - (not fine) for score, fine in zip(scores, allowed, strict=True)]


def posterior_of(prior: bk.LanguageModel, conversations: Sequence[Turns], *, hard: bool = True) -> bk.Posterior:
    """Return the posterior of conversations, with the constraint, or with an insult's price of 8 nats in its place."""
    likelihood: bk.Likelihood = bk.Reward(relaxed, alpha=ALPHA, bounds=(-2, 1), name="sentiment, insults at 8 nats")
    if hard:
        kind = bk.Reward(sentiment, alpha=ALPHA, bounds=(-1, 1), name="sentiment")
        likelihood = kind * bk.Constraint(clean, name="no insult")
    prompts = [messages(turns) for turns in conversations]
    return bk.Posterior(prior, likelihood, prompts=prompts, max_new_tokens=TOKENS)


def methods(adapter: bk.LanguageModel, num: int) -> dict[str, Any]:
    """Return the rows: the prior's draws weighted, best of 8, SMC, the adapter, and the adapter corrected."""
    return {
        "prior IS": bk.ImportanceSampling(num),
        "best of 8": bk.BestOfN(8, num_draws=max(1, num // 8)),
        "SMC": bk.SMC(num, twist=bk.PartialRewardTwist(num_pilot=num // 2)),
        "adapter": PolicyDraws(adapter, num),
        "adapter, then IS": bk.ImportanceSampling(num, proposal=adapter),
    }


@dataclass(eq=False)
class Timed:
    """An algorithm that notes the CPU seconds of its run: a wall clock also counts what others do on the machine."""

    algorithm: Any
    seconds: float = 0.0

    def run(self, posterior: bk.Posterior, *, seed: int, progress: bool = False) -> bk.Draws:
        """See `Algorithm.run`."""
        start = time.process_time()
        draws: bk.Draws = self.algorithm.run(posterior, seed=seed, progress=progress)
        self.seconds = time.process_time() - start
        return draws


@dataclass(frozen=True)
class Answer:
    """What one method answered: arrays of one value per conversation, (P,), and its costs.

    Parameters
    ----------
    sentiment, insulted, sorry
        Mean of VADER's score, and the shares of replies with a word of the list and with an apology.
    effective
        Effective draws in all: the sum of the ESS, or the number of draws where all weigh the same.
    tokens, seconds
        Model tokens and CPU seconds per effective draw; training is not in them.
    """

    sentiment: FloatArray
    insulted: FloatArray
    sorry: FloatArray
    effective: float
    tokens: float
    seconds: float


def answer_of(draws: bk.Draws, seconds: float, *, weighted: bool = True) -> Answer:
    """Return what the draws of a method answer; without weights, what its proposal alone does."""
    weights = draws.weights if weighted else np.full(draws.shape, 1 / draws.shape[1])
    texts = draws.texts()
    features = (
        [sentiment(row) for row in texts],
        [[not fine for fine in clean(row)] for row in texts],
        [[SORRY.search(text) is not None for text in row] for row in texts],
    )
    means = [(weights * np.array(values, dtype=np.float64)).sum(axis=1) for values in features]
    is_plain = not weighted or bool(np.isnan(draws.log_evidence).any())
    effective = float(draws.tokens.shape[0] * draws.tokens.shape[1] if is_plain else draws.ess.sum())
    return Answer(means[0], means[1], means[2], effective, draws.cost.model_tokens / effective, seconds / effective)


def distance(draws: bk.Draws, log_evidence: FloatArray) -> FloatArray:
    """Return log Z minus the ELBO in nats, (P,), of draws of the adapter, an insult at 8 nats: else the ELBO may be -inf."""
    log_likelihood = np.array([relaxed(row) for row in draws.texts()]) / ALPHA
    gaps: FloatArray = log_evidence - (draws.log_prior + log_likelihood - draws.log_proposal).mean(axis=1)
    return gaps


def sentences(
    answers: dict[str, Answer], gap: float, bounds: tuple[float, float], kls: dict[str, float]
) -> tuple[str, str]:
    """Return where the inference beat what people do today, and where it did not."""
    means = {name: mean_and_se(answer.sentiment) for name, answer in answers.items()}
    told = {name: f"{mean:.2f} ± {error:.2f}" for name, (mean, error) in means.items()}
    gain, error = mean_and_se(answers["adapter"].sentiment - answers["prior"].sentiment)
    ranked = sorted(("prior IS", "best of 8", "SMC", "adapter, then IS"), key=lambda name: answers[name].seconds)
    prices = ", ".join(f"{name} {answers[name].seconds:.1f}" for name in ranked)
    insulted = 100 * answers["adapter"].insulted.mean()
    low, high = max(0.0, bounds[0]), bounds[1]
    span = f"between {low:.1f} and {high:.1f}" if np.isfinite(high) else f"at least {low:.1f}"
    better = (
        f"On conversations that it never saw the adapter lifts the sentiment from {told['prior']} to {told['adapter']} "
        f"(paired {gain:+.2f} ± {error:.2f}) at one completion a reply. The posterior's sentiment, estimated from few "
        f"effective draws, is {told['prior IS']} by weighting the prior's draws, {told['SMC']} by SMC, and "
        f"{told['adapter, then IS']} by weighting the adapter's. Best of 8 has {told['best of 8']}."
    )
    ahead, spread = mean_and_se(answers["best of 8"].sentiment - answers["adapter"].sentiment)
    beaten = (
        f"With 8 completions a reply, best of 8 beats the adapter by {ahead:.2f} ± {spread:.2f}, at "
        f"{kls['best of 8']:.1f} and {kls['adapter']:.1f} nats from the prior. "
    )
    worse = (
        f"{beaten if ahead > 0 else ''}CPU seconds per effective draw, or reply: {prices}. The adapter is about "
        f"{gap:.1f} nats from the posterior (an insult at 8 nats; certified: {span}), and {insulted:.1f} % of its "
        "replies insult."
    )
    return better, worse


def main(
    out: Path,
    *,
    seed: int = 0,
    prior: bk.LanguageModel | None = None,
    adapter: Any = SHIPPED,
    num_draws: int = 16,
    num_conversations: int = len(UNSEEN),
    certified: int = 1,
    num_runs: int = 16,
) -> Finding:
    """Answer the customers by each method, certify the adapter, and write the report."""
    lm, unseen = prior or bk.TorchLM.from_pretrained("smollm2"), UNSEEN[:num_conversations]
    posterior = posterior_of(lm, unseen)
    guide = as_policy(adapter, posterior)
    rows = {name: Timed(algorithm) for name, algorithm in methods(guide, num_draws).items()}
    comparison = bk.compare(posterior, rows, seed=seed)
    answers = {"prior": answer_of(comparison["prior IS"], rows["prior IS"].seconds, weighted=False)}
    answers |= {name: answer_of(draws[0], rows[name].seconds) for name, draws in comparison.draws.items()}
    # no adapter rules a word out, so that its KL to the hard posterior is infinite; an exact draw of the relaxed one takes
    # hundreds of proposals, so that few if any are found, and the certificate's upper end is loose or inf
    certificate = bk.certify(
        posterior_of(lm, unseen[:certified], hard=False),
        guide,
        seed=seed,
        num_draws=8 * num_runs,
        num_particles=8,
        num_runs=num_runs,
        max_proposals=num_runs,
        failure_probability=0.1,
        twist=bk.PartialRewardTwist(num_pilot=8),
    )
    out.mkdir(parents=True, exist_ok=True)
    table = comparison.table()
    draw(answers, table, out / "replies.png")
    found = [comparison[name].log_evidence for name in ("SMC", "adapter, then IS")]
    evidence = np.logaddexp(*found) - np.log(2)  # the mean of two unbiased estimates of Z
    gap = float(distance(comparison["adapter"], evidence).mean())
    low, high = (float(end) for end in certificate.pooled.reverse_kl)
    kls = {name: float(table.loc[name, "kl_prior"]) for name in table.index}
    better, worse = sentences(answers, gap, (low, high), kls)
    page = bk.report(
        [comparison, certificate],
        out / "report.html",
        title="Dialogue: kind replies to customers that were never seen",
        pictures={
            "Sentiment, mean over unseen conversations with its standard error, and the price. The certificate below is of "
            f"the first {certified} of them, where an insult costs 8 nats, as in the training; the estimate of the adapter's "
            "distance on the index page is of all, and rather too low.": out / "replies.png"
        },
        seed=seed,
        posterior=posterior,
    )
    numbers = {"conversations": float(num_conversations), "adapter, KL to posterior, estimate (nats)": gap}
    numbers |= {"adapter, KL to posterior, low (nats)": low, "adapter, KL to posterior, high (nats)": high}
    gain, error = mean_and_se(answers["adapter"].sentiment - answers["prior"].sentiment)
    numbers |= {"adapter minus prior, sentiment": gain, "adapter minus prior, sentiment, se": error}
    for name, answer in answers.items():
        numbers |= {
            f"{name}, sentiment": float(answer.sentiment.mean()),
            f"{name}, insults": float(answer.insulted.mean()),
            f"{name}, apologies": float(answer.sorry.mean()),
        }
        numbers |= {f"{name}, effective draws": answer.effective, f"{name}, tokens per effective draw": answer.tokens}
        numbers[f"{name}, CPU seconds per effective draw"] = answer.seconds
        if name in kls:
            numbers[f"{name}, KL to the prior (nats)"] = kls[name]
    return Finding(page, out / "replies.png", better, worse, numbers)


def draw(answers: dict[str, Answer], table: Any, file: Path) -> None:
    """Draw the sentiment of each method against its KL to the prior, and what an effective draw costs."""
    with drawing(file, (8.4, 3.4)) as figure:
        left, right = figure.subplots(1, 2, sharey=True)
        for row, (name, answer) in enumerate(reversed(answers.items())):
            mean, error = mean_and_se(answer.sentiment)
            left.errorbar(mean, row, xerr=error, marker="o", color=COLOURS[0])
            spent = f"  KL to the prior {table.loc[name, 'kl_prior']:.1f}" if name in table.index else ""
            left.annotate(spent, (mean, row), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=7)
            right.barh(row, answer.seconds, color=COLOURS[1])
        left.set(yticks=range(len(answers)), yticklabels=[*reversed(answers)], xlabel="VADER's sentiment of the reply")
        right.set(xlabel="CPU seconds per effective draw", xscale="log")


if __name__ == "__main__":
    print(main(Path("bayes-klrl-gallery/dialogue")))
