"""Tune an LSTM towards a target sentence: edit distance as reward, and the exact answer for its n-gram distillation.

The prior is a recurrent network of our own (`bayes_klrl.gallery.models.lstm_lm`), which writes the characters of how Jane
Austen's sentences begin. The reward is minus the edit distance to a target; a Levenshtein automaton computes it, so the same
reward has an exact posterior under an n-gram model:

    p*(x) = p0(x) exp(-distance(x, target) / alpha) / Z

The n-gram model is fitted to draws of the LSTM and solved by backward messages. Its posterior is then a proposal, and its
messages a twist of SMC, for the LSTM: the effective sample sizes say how good the distillation is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import bayes_klrl as bk
from bayes_klrl.export.plot_style import BLACK, COLOURS, GREY, drawing
from bayes_klrl.gallery.finding import Finding
from bayes_klrl.gallery.glance import Glance
from bayes_klrl.gallery.models.lstm_lm import shipped_lstm
from bayes_klrl.gallery.packages import need
from bayes_klrl.inference.exact.messages import Messages, backward_messages
from bayes_klrl.typing import FloatArray, LanguageModel

GLANCE = Glance(
    job="Tune an LSTM towards a target sentence",
    today="Draw, and weight by the reward",
    adds="The exact answer of an n-gram model as SMC's twist",
    verdict="partly",
    measured="500 particles of SMC are worth {ESS, SMC, n-gram twist:.0f} draws of the posterior with the twist, "
    "{ESS, SMC:.0f} without; 2,000 weighted draws of the prior are worth {ESS, prior IS:.0f}. The exact answer is that "
    "of the n-gram, {KL of the n-gram's posterior to the LSTM's (nats):.1f} nats from the LSTM's posterior.",
    claims=(
        ("ESS, SMC, n-gram twist", "ESS, SMC"),
        ("KL of the n-gram's posterior to the LSTM's (nats)", 1.0),
    ),
    picture="Edit distance of the completions to the target, by method: how many characters have to be changed. "
    "Posterior: by SMC with the twist. The n-gram's posterior is the exact answer for the distillation; SVI is the "
    "policy that was tuned.",
    setting="Model: an LSTM of 340,260 parameters over 36 characters, trained on 28,495 sentences of Jane Austen. "
    "Data: one prompt and one target of 8 characters. Its distillation is an n-gram model of three characters, fitted "
    "to 8,000 of its draws, for which the posterior is exact. A twist is an estimate of what a prefix will be worth, "
    "which steers SMC.",
)

PROMPT, TARGET, ALPHA = "i am ", "so glad.", 0.6


def edit_reward(prior: LanguageModel, target: str, alpha: float) -> bk.AutomatonReward:
    """Return minus the edit distance to a target as a reward, by the automaton whose states are rows of the distance's table.

    A distance of more than the target's length counts as the target's length.
    """
    ids = prior.encode([target])[0]
    most = len(ids) - 1
    automaton = bk.Automaton.levenshtein(
        ids, max_distance=most, vocab_size=prior.vocab_size, eos_token_ids=prior.eos_token_ids
    )
    return bk.AutomatonReward(
        automaton, final_rewards=-automaton.state_values, alpha=alpha, bounds=(-most - 1.0, 0.0), name="edit distance"
    )


@dataclass(frozen=True, eq=False)
class Distilled:
    """The n-gram model of a prior's draws, with the same likelihood, solved.

    Parameters
    ----------
    posterior
        Its posterior.
    solved
        The same, solved by backward messages.
    """

    posterior: bk.Posterior
    solved: Messages

    @property
    def log_evidence(self) -> float:
        """The exact log Z of the n-gram model's posterior."""
        return float(self.solved.log_evidence[0])


def distilled(posterior: bk.Posterior, order: int, num_draws: int, seed: int) -> Distilled:
    """Fit an n-gram model to draws of the prior after its prompt, and solve its posterior."""
    prior, tail = posterior.prior, list(posterior.prompt_ids[0])[1 - order :]
    drawn = bk.ImportanceSampling(num_draws).run(posterior, seed=seed).sequences
    rows = [[*tail, *ids] for ids in drawn.lists()]
    eos, size = prior.eos_token_ids, prior.vocab_size
    ngram = bk.NgramLM.fit(rows, order=order, tokenizer=prior.tokenizer, eos_token_id=eos, vocab_size=size)
    prompt, most = list(posterior.prompt_ids[0]), posterior.max_new_tokens
    small = bk.Posterior(ngram, posterior.likelihood, prompts=[prompt], max_new_tokens=most)
    return Distilled(small, backward_messages(small))


def disagreement(texts: list[str], rewards: FloatArray, target: str) -> float:
    """Return the largest difference between the automaton's rewards and minus the distance that rapidfuzz computes."""
    from rapidfuzz.distance import Levenshtein

    others = [-min(float(Levenshtein.distance(text, target)), len(target)) for text in texts]
    return float(np.abs(np.array(others) - rewards).max())


def methods(exact: Distilled, num_draws: int, num_particles: int, num_steps: int) -> dict[str, Any]:
    """Return the rows of the table."""
    svi = bk.SVI(num_steps)
    return {
        "prior IS": bk.ImportanceSampling(num_draws),
        "best of 16": bk.BestOfN(16, num_draws // 8),
        "SMC": bk.SMC(num_particles),
        "SMC, reward so far": bk.SMC(num_particles, twist=bk.PartialRewardTwist()),
        "annealed SMC": bk.AnnealedSMC(num_particles),
        "SMC, n-gram twist": bk.SMC(num_particles, twist=exact.solved.twist(), proposal="twisted"),
        "n-gram, then IS": bk.ImportanceSampling(num_draws, proposal=exact.solved.policy()),
        "SVI": svi,
        "SVI, then IS": bk.ImportanceSampling(num_draws, proposal=svi),
    }


def main(
    out: Path,
    *,
    seed: int = 0,
    target: str = TARGET,
    num_draws: int = 2000,
    num_particles: int = 500,
    num_steps: int = 150,
    num_texts: int = 8000,
    order: int = 3,
    num_runs: int = 24,
) -> Finding:
    """Run all methods on the LSTM, solve its distillation, and write the report."""
    need("rapidfuzz")
    prior = shipped_lstm()
    reward = edit_reward(prior, target, ALPHA)
    posterior = bk.Posterior(prior, reward, prompts=PROMPT, max_new_tokens=len(target) + 3)
    exact = distilled(posterior, order, num_texts, seed)
    comparison = bk.compare(posterior, methods(exact, num_draws, num_particles, num_steps), seed=seed)
    beside = bk.compare(exact.posterior, {"n-gram's posterior": bk.Exact(num_draws=num_draws)}, seed=seed)
    guide, twisted = comparison["SVI"].guide, comparison["SMC, n-gram twist"]
    assert guide is not None
    certificate = bk.certify(
        posterior, guide, seed=seed, num_draws=num_draws, num_runs=num_runs, twist=bk.DistilledTwist(order=order)
    )
    texts = comparison["prior IS"].texts()[0]
    differs = disagreement(texts, comparison["prior IS"].reward[0], target)

    out.mkdir(parents=True, exist_ok=True)
    draw_evidence(comparison, exact.log_evidence, certificate.log_evidence_bounds[0], out / "evidence.png")
    draw_distances(
        {
            "prior": histogram(-comparison["prior IS"].reward[0], np.ones(num_draws)),
            "posterior": histogram(-twisted.reward[0], twisted.weights[0]),
            "n-gram's posterior": histogram(-beside["n-gram's posterior"].reward[0], np.ones(num_draws)),
            "SVI": histogram(-comparison["SVI"].reward[0], np.ones(comparison["SVI"].shape[1])),
            "best of 16": histogram(-comparison["best of 16"].reward[0], np.ones(comparison["best of 16"].shape[1])),
        },
        f"edit distance to {PROMPT + target!r}",
        out / "distances.png",
    )
    page = bk.report(
        [comparison, certificate, beside],
        out / "report.html",
        title="An LSTM, a target sentence, and the exact answer beside it",
        pictures={
            "Log evidence of the LSTM's posterior by each method with two standard errors, the certificate's finite bounds in "
            "grey, and the exact value of the n-gram distillation.": out / "evidence.png",
            "The edit distance of the completions.": out / "distances.png",
        },
        seed=seed,
    )
    found = {name: comparison[name] for name in ("prior IS", "SMC", "SMC, n-gram twist", "n-gram, then IS")}
    ess = {name: float(draws.ess[0]) for name, draws in found.items()}
    log_evidence, error = float(twisted.log_evidence[0]), float(twisted.log_evidence_se[0])
    to_posterior = log_evidence - float(comparison["n-gram, then IS"].elbo[0])
    plain = comparison["prior IS"]
    low, high = certificate.reverse_kl[0]
    distance = f"{low:.2f} to {high:.2f}" if np.isfinite(high) else f"at least {low:.2f}"
    return Finding(
        report=page,
        picture=out / "distances.png",
        better=f"With the n-gram's exact answer as a twist, {num_particles} particles of SMC are worth "
        f"{ess['SMC, n-gram twist']:.0f} (plain SMC: {ess['SMC']:.0f}), and find log Z = {log_evidence:.2f} ± {error:.2f}; "
        f"{num_draws:,} draws of the prior find {plain.log_evidence[0]:.2f} ± {plain.log_evidence_se[0]:.2f}, an error bar "
        "that knows nothing of completions that were not drawn.",
        worse=f"To fit the n-gram took {num_texts:,} draws of the prior, which the numbers of SMC do not count. The "
        f"exact answer is the n-gram's (log Z {exact.log_evidence:.2f}): its posterior is {to_posterior:.2f} nats from "
        f"the LSTM's, and {num_draws:,} of its draws, weighted, are worth {ess['n-gram, then IS']:.0f}. The policy "
        f"that SVI tuned in {num_steps} steps is {distance} nats from the posterior.",
        numbers={
            "log evidence of the n-gram distillation, exact (nats)": exact.log_evidence,
            "log evidence of the LSTM, SMC with the n-gram twist (nats)": log_evidence,
            "its standard error (nats)": error,
            "log evidence of the LSTM, draws of the prior (nats)": float(plain.log_evidence[0]),
            "standard error of that of the prior's draws (nats)": float(plain.log_evidence_se[0]),
            "KL of the n-gram's posterior to the LSTM's (nats)": to_posterior,
            "least KL of the SVI policy to the posterior (nats)": float(low),
            **({"largest KL of the SVI policy to the posterior (nats)": float(high)} if np.isfinite(high) else {}),
            "largest difference from rapidfuzz": differs,
            **{f"ESS, {name}": value for name, value in ess.items()},
        },
    )


def histogram(distances: FloatArray, weights: FloatArray) -> FloatArray:
    """Return the probability of each distance 0, 1, ..., by weighted draws."""
    shares: FloatArray = np.bincount(distances.round().astype(int), weights / weights.sum()).astype(np.float64)
    return shares


def draw_evidence(comparison: bk.Comparison, exact: float, bounds: FloatArray, file: Path) -> None:
    """Draw the estimates of log Z."""
    rows = {name: comparison[name] for name in comparison.draws}
    rows = {name: draws for name, draws in rows.items() if np.isfinite(draws.log_evidence[0])}
    with drawing(file, (6.4, 0.4 * len(rows) + 1.2)) as figure:
        axes = figure.subplots()
        for bound in bounds[np.isfinite(bounds)]:
            axes.axvline(bound, color=GREY, linewidth=1)
        axes.axvline(exact, color=BLACK, linestyle="--", linewidth=1, label="n-gram distillation, exact")
        for place, draws in enumerate(rows.values()):
            spread = 2 * draws.log_evidence_se[0]
            axes.errorbar(draws.log_evidence[0], place, xerr=spread, marker="o", color=COLOURS[0], capsize=3)
        axes.set(xlabel="log evidence (nats)", yticks=range(len(rows)), ylim=(len(rows) - 0.5, -0.5))
        axes.set_yticklabels(list(rows))
        axes.legend(frameon=False)


def draw_distances(shares: dict[str, FloatArray], label: str, file: Path) -> None:
    """Draw the distribution of the distance under each distribution over completions."""
    with drawing(file, (6.4, 3.4)) as figure:
        axes = figure.subplots()
        width = 0.8 / len(shares)
        for number, (colour, (name, each)) in enumerate(zip(COLOURS, shares.items(), strict=False)):
            places = np.arange(len(each)) + width * (number - (len(shares) - 1) / 2)
            axes.bar(places, each, width, color=colour, label=name)
        axes.set(xlabel=label, ylabel="probability")
        axes.legend(frameon=False)


if __name__ == "__main__":
    print(main(Path("bayes-klrl-gallery/generation_lstm")))
