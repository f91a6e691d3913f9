"""Bayesian values: an agent that does not know its reward explores by what it is unsure of.

The gridworld of `soft_values`, but nobody knows the reward r of the squares: a walk shows it with noise. A Gaussian last
layer (`bayes_klrl.gallery.models.beliefs`) has the exact posterior of r, and messages carry each draw of it on to values,

    r ~ p(r | walks),    V_t(s) = log mean_a exp(r(s') + V_{t+1}(s')),

so that log psi has a posterior, too. Seven rules choose the policy of the next walk. The regret of a walk is
KL(policy || posterior under the true reward), the nats that a policy loses because it does not know the reward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student_t

import bayes_klrl as bk
from bayes_klrl.export.plot_style import COLOURS, GREY, drawing
from bayes_klrl.gallery.finding import Finding
from bayes_klrl.gallery.glance import Glance
from bayes_klrl.gallery.means import mean_and_se
from bayes_klrl.gallery.models.beliefs import GaussianBelief
from bayes_klrl.gallery.models.worlds import Grid
from bayes_klrl.typing import FloatArray

GLANCE = Glance(
    job="Explore under an unknown reward, with values",
    today="The policy of the mean, epsilon-greedy",
    adds="Values that know how unsure they are: UCB, Thompson",
    verdict="partly",
    measured="With a goal that the prior does not expect, the regret of UCB (upper confidence bound) is "
    "{a goal that the prior does not expect, UCB: regret (nats):.0f} nats, that of the mean "
    "{a goal that the prior does not expect, mean (Boltzmann): regret (nats):.0f}, epsilon-greedy "
    "{a goal that the prior does not expect, mean, epsilon-greedy: regret (nats):.0f}. Where rewards are mild UCB saves "
    "{rewards of sd 0.5 nats, UCB: regret saved (nats):.0f} ± {rewards of sd 0.5 nats, UCB: regret saved, se:.0f}.",
    claims=(
        (
            "a goal that the prior does not expect, UCB: regret saved (nats)",
            0.0,
            "a goal that the prior does not expect, UCB: regret saved, se",
        ),
        (
            "a goal that the prior does not expect, mean, epsilon-greedy: regret (nats)",
            "a goal that the prior does not expect, UCB: regret (nats)",
        ),
    ),
    picture="Regret so far by the rule that explores, mean over 80 worlds with two standard errors; both axes are "
    "logarithmic. UCB (upper confidence bound) acts on the mean reward plus one standard deviation, Thompson on one "
    "draw of the reward (ensemble: one of ten), mean (Boltzmann) on the mean reward, twice as hot on half of it, and "
    "epsilon-greedy on the mean with a tenth of the steps at random. The prior's walks are all at random.",
    setting="Model: a Gaussian belief about the rewards of 25 squares of a 5 x 5 grid, linear in 25 features. Data: "
    "what the agent sees in 60 walks of 12 steps, with noise, in 80 worlds of each kind. The regret of a walk is "
    "KL(policy || posterior under the true reward), in nats.",
)

GRID = Grid(side=5, steps=12)
STRENGTHS = (0.5, 1.0, 2.0)  # sd of the reward of a square, and of the noise, in nats: 1 / alpha up to a factor
EPSILON, MEMBERS, MARKS = 0.1, 10, (5, 20, 60)
SQUARED = ((GRID.places[:, None] - GRID.places) ** 2).sum(axis=2)
FEATURES = np.linalg.cholesky(np.exp(-SQUARED / 2) + 1e-9 * np.eye(GRID.side**2))  # phi: neighbours are similar


def nothing_seen(strength: float, rng: np.random.Generator) -> GaussianBelief:
    """Return the belief before the first walk."""
    return GaussianBelief(FEATURES, strength, rng, MEMBERS)


def epsilon_greedy(belief: GaussianBelief) -> FloatArray:
    """Return the policy of the mean, of which a tenth of the steps are the prior's."""
    log_policy: FloatArray = np.logaddexp(np.log1p(-EPSILON) + GRID.log_policy(belief.mean()), np.log(EPSILON / 4))
    return log_policy


RULES: dict[str, Callable[[GaussianBelief], FloatArray]] = {
    "UCB": lambda belief: GRID.log_policy(belief.mean() + belief.sd()),
    "Thompson": lambda belief: GRID.log_policy(belief.draws(1)[0]),
    "Thompson, ensemble": lambda belief: GRID.log_policy(belief.ensemble()[belief.rng.integers(MEMBERS)]),
    "mean (Boltzmann)": lambda belief: GRID.log_policy(belief.mean()),
    "mean, epsilon-greedy": epsilon_greedy,
    "mean, twice as hot": lambda belief: GRID.log_policy(belief.mean() / 2),
    "the prior's walks": lambda _belief: GRID.log_policy(np.zeros(len(FEATURES))),
}
PLUG_IN = "mean (Boltzmann)"


def smooth_world(strength: float, rng: np.random.Generator) -> FloatArray:
    """Return rewards (S,) drawn from the agent's own prior."""
    rewards: FloatArray = strength * FEATURES @ rng.normal(size=len(FEATURES))
    return rewards


def goal_world(strength: float, rng: np.random.Generator) -> FloatArray:
    """Return rewards (S,) that the prior does not expect: a goal far away, a small decoy, four pits, else -0.1 strength."""
    far = GRID.places.sum(axis=1)
    goal, decoy = rng.choice(np.flatnonzero(far >= 5)), rng.choice(np.flatnonzero((far == 2) | (far == 3)))
    rewards = np.full(len(FEATURES), -0.1)
    rewards[rng.choice(np.setdiff1d(np.arange(1, len(FEATURES)), [goal, decoy]), size=4, replace=False)] = -3.0
    rewards[[goal, decoy]] = 3.0, 1.0
    return strength * rewards


@dataclass(frozen=True)
class Study:
    """What each rule did in D worlds: regret and E[r] of its N walks, (D, N), and the regret of its mean at the end, (D,).

    `coverage` is the share of squares and steps whose true value lies in the 90 % interval, (D, MARKS), by kind of posterior.
    """

    regret: dict[str, FloatArray]
    reward: dict[str, FloatArray]
    deployed: dict[str, FloatArray]
    coverage: dict[str, FloatArray]

    def gain(self, rule: str, over: str = PLUG_IN) -> tuple[float, float]:
        """Return how much regret in nats a rule saves over all walks, mean over the worlds and standard error."""
        return mean_and_se((self.regret[over] - self.regret[rule]).sum(axis=1))

    def told(self, rule: str) -> str:
        """Return the same in words."""
        mean, se = self.gain(rule)
        return f"{'saves' if mean >= 0 else 'costs'} {abs(mean):.0f} ± {se:.0f}"

    def lost(self, rule: str) -> float:
        """Return the share of worlds in which the policy of the mean is more than 1 nat away at the end."""
        return float((self.deployed[rule] > 1).mean())


def covered(belief: GaussianBelief, rewards: FloatArray) -> tuple[float, float]:
    """Return the share of V_t(s), t < T, in the 90 % intervals of 400 posterior draws, and in those of the ensemble."""
    truth, values = GRID.values(rewards)[:-1], GRID.values(belief.draws(400))[:, :-1]
    low, high = np.quantile(values, [0.05, 0.95], axis=0)
    members = GRID.values(belief.ensemble())[:, :-1]
    # of few members mean and sd are estimates, too: Student's quantile, widened by that of the mean
    wide = float(student_t.ppf(0.95, len(members) - 1)) * np.sqrt(1 + 1 / len(members))
    inside = np.abs(truth - members.mean(axis=0)) < wide * members.std(axis=0, ddof=1)
    return float(((low <= truth) & (truth <= high)).mean()), float(inside.mean())


def study(
    world: Callable[[float, np.random.Generator], FloatArray],
    strength: float,
    num_worlds: int,
    num_walks: int,
    seed: Sequence[int],
) -> Study:
    """Return what each rule does in the same worlds; coverage is measured on what Thompson saw."""
    regret, reward = ({name: np.empty((num_worlds, num_walks)) for name in RULES} for _ in range(2))
    deployed = {name: np.empty(num_worlds) for name in RULES}
    marks = [mark for mark in MARKS if mark <= num_walks]
    coverage = np.empty((num_worlds, len(marks), 2))
    for d in range(num_worlds):
        rewards = world(strength, np.random.default_rng([*seed, d]))
        log_evidence = float(GRID.values(rewards)[0, GRID.start])
        for number, (name, rule) in enumerate(RULES.items()):
            rng = np.random.default_rng([*seed, d, 1 + number])
            belief = nothing_seen(strength, rng)
            for n in range(num_walks):
                policy = rule(belief)
                regret[name][d, n] = log_evidence - GRID.elbo(policy, rewards)  # KL(policy || posterior)
                reward[name][d, n] = GRID.expected_reward(policy, rewards)
                squares = GRID.walk(policy, rng)
                belief.see(squares, rewards[squares] + strength * rng.normal(size=GRID.steps))
                if name == "Thompson" and n + 1 in marks:
                    coverage[d, marks.index(n + 1)] = covered(belief, rewards)
            deployed[name][d] = GRID.distance(GRID.log_policy(belief.mean()), rewards)
    kinds = {"Gaussian last layer": coverage[..., 0], f"ensemble of {MEMBERS}": coverage[..., 1]}
    return Study(regret, reward, deployed, kinds)


def main(out: Path, *, seed: int = 0, num_worlds: int = 80, num_walks: int = 60) -> Finding:
    """Explore by each rule in many worlds, look at one of them, and write the report."""
    studies = {
        f"rewards of sd {strength:g} nats": study(smooth_world, strength, num_worlds, num_walks, (seed, number))
        for number, strength in enumerate(STRENGTHS)
    }
    studies["a goal that the prior does not expect"] = study(goal_world, 2.0, num_worlds, num_walks, (seed, 9))
    out.mkdir(parents=True, exist_ok=True)
    draw_regret(studies, out / "regret.png")
    draw_coverage(studies, out / "coverage.png")
    comparison, certificate = one_world(seed, num_walks)
    pictures = {
        f"Regret so far in nats, mean over {num_worlds} worlds, by the rule that explores.": out / "regret.png",
        "How often the 90 % intervals of the values hold the exact value.": out / "coverage.png",
    }
    title = "Bayesian values: explore by what is unsure"
    page = bk.report([comparison, certificate], out / "report.html", title=title, pictures=pictures, seed=seed)
    return finding(page, out / "regret.png", studies, num_walks)


def one_world(seed: int, num_walks: int) -> tuple[bk.Comparison, bk.Certificate]:
    """Return SMC with the values that UCB has learned in one world as its twist, and the certificate of their policy."""
    rng = np.random.default_rng([seed, 100])
    rewards, belief = smooth_world(1.0, rng), nothing_seen(1.0, rng)
    for _ in range(num_walks):
        squares = GRID.walk(RULES["UCB"](belief), rng)
        belief.see(squares, rewards[squares] + rng.normal(size=GRID.steps))
    posterior, twist = GRID.posterior(rewards), GRID.twist(belief.mean())
    policy = bk.TwistedLM(posterior, twist)
    average = bk.MixtureLM([GRID.policy(each) for each in belief.draws(8)])
    rows: dict[str, Any] = {
        "exact": bk.Exact(num_draws=2000),
        "prior IS": bk.ImportanceSampling(500),
        "SMC, mean values": bk.SMC(500, twist=twist, proposal=policy),
        "8 drawn policies, then IS": bk.ImportanceSampling(500, proposal=average),
    }
    return bk.compare(posterior, rows, seed=seed), bk.certify(posterior, policy, seed=seed)


def finding(page: Path, picture: Path, studies: dict[str, Study], num_walks: int) -> Finding:
    """Return what was measured, in sentences."""
    numbers: dict[str, float] = {"walks": num_walks}
    for words, each in studies.items():
        for rule in RULES:
            mean, se = mean_and_se(each.regret[rule].sum(axis=1))
            numbers |= {f"{words}, {rule}: regret (nats)": mean, f"{words}, {rule}: its standard error": se}
            saved, error = each.gain(rule)
            numbers |= {f"{words}, {rule}: regret saved (nats)": saved, f"{words}, {rule}: regret saved, se": error}
            numbers[f"{words}, {rule}: E[r] of the last walk (nats)"] = float(each.reward[rule][:, -1].mean())
            numbers[f"{words}, {rule}: KL of its mean policy at the end (nats)"] = float(each.deployed[rule].mean())
            numbers[f"{words}, {rule}: share of worlds in which that is above 1 nat"] = each.lost(rule)
        for kind, values in each.coverage.items():
            for mark, (mean, se) in zip(MARKS, map(mean_and_se, values.T), strict=False):
                numbers |= {f"{words}, {kind}: coverage after {mark} walks": mean, f"{words}, {kind}, {mark}: se": se}
    mild, *_, strong, surprise = studies.values()
    layer, unexpected = (float(each.coverage["Gaussian last layer"][:, -1].mean()) for each in (strong, surprise))
    return Finding(
        report=page,
        picture=picture,
        better=f"With a goal that the prior does not expect, UCB {surprise.told('UCB')} nats of regret in {num_walks} walks "
        f"against the policy of the mean, and epsilon-greedy {surprise.told('mean, epsilon-greedy')}. Where rewards are "
        f"strong (sd {STRENGTHS[-1]:g} nats per square), exploring by the mean ends more than 1 nat from the posterior in "
        f"{strong.lost(PLUG_IN):.0%} of the worlds, by UCB in {strong.lost('UCB'):.0%}, by Thompson in "
        f"{strong.lost('Thompson'):.0%}.",
        worse=f"Where rewards are as the belief expects and strong, UCB {strong.told('UCB')} nats and Thompson "
        f"{strong.told('Thompson')}. Where they are mild (sd {STRENGTHS[0]:g}), UCB {mild.told('UCB')} nats and "
        f"Thompson {mild.told('Thompson')}: a KL-regularised policy explores by itself. The 90 % intervals of the "
        f"belief hold {layer:.0%} of the values where rewards are strong, but {unexpected:.0%} with an unexpected goal.",
        numbers=numbers,
    )


def draw_regret(studies: dict[str, Study], file: Path) -> None:
    """Draw the regret so far of each rule, with a band of two standard errors, a panel per study."""
    with drawing(file, (9.6, 6.0)) as figure:
        panels = figure.subplots(2, 2).ravel()
        for axes, (words, each) in zip(panels, studies.items(), strict=True):
            for colour, (name, regret) in zip((*COLOURS[:6], GREY), each.regret.items(), strict=True):
                so_far = regret.cumsum(axis=1)
                mean, half = so_far.mean(axis=0), 2 * so_far.std(axis=0, ddof=1) / np.sqrt(len(so_far))
                walks = np.arange(1, len(mean) + 1)
                axes.plot(walks, mean, color=colour, label=name)
                axes.fill_between(
                    walks, np.maximum(mean - half, 0.1), mean + half, color=colour, alpha=0.12, linewidth=0
                )
            axes.set(xscale="log", yscale="log", xlabel="walks", ylabel="regret so far (nats)")
            axes.set_title(words, loc="left")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)


def draw_coverage(studies: dict[str, Study], file: Path) -> None:
    """Draw coverage against the number of walks, with two standard errors."""
    with drawing(file, (9.6, 3.0)) as figure:
        panels = figure.subplots(1, len(studies), sharey=True)
        for axes, (words, each) in zip(panels, studies.items(), strict=True):
            for colour, (kind, values) in zip(COLOURS, each.coverage.items(), strict=False):
                mean, half = values.mean(axis=0), 2 * values.std(axis=0, ddof=1) / np.sqrt(len(values))
                axes.errorbar(MARKS[: len(mean)], mean, half, color=colour, marker="o", capsize=3, label=kind)
            axes.axhline(0.9, color=GREY, linewidth=0.8, zorder=-1)
            axes.set(xscale="log", xlabel="walks", ylim=(0.3, 1.02))
            axes.set_xticks(MARKS, [str(mark) for mark in MARKS])
            axes.minorticks_off()
            axes.set_title(words.replace(" that the", "\nthat the"), loc="left")
        panels[0].set_ylabel("coverage of V")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)


if __name__ == "__main__":
    print(main(Path("bayes-klrl-gallery/bayesian_value")))
