"""Bayesian policies: an average over policies, one drawn for each walk, against the policy of the mean reward.

A goal lies on one of 15 squares, and walks show noisy rewards. Bayes' rule gives each world its probability P(w | walks),
and each world has its posterior p*_w over walks. What policy follows from that?

    plug-in        prop. to p0(x) exp(E_w r_w(x))       least E_w KL(q || p*_w): the best single walk, in nats
    mixture        sum_w P(w | walks) p*_w(x)           least E_w KL(p*_w || q): the cut posterior, a `bk.MixtureLM`
    joint          prop. to p0(x) E_w exp(r_w(x))       optimistic: as if good luck were evidence
    per token      policies averaged at every token     may change its mind in the middle of a walk

Thompson sampling, which draws one world for each walk and follows its policy, *is* the mixture: the draws are the same in law.
All 4**6 walks are enumerated, so that every distance is exact. At the end a Gaussian over policies (`bk.BayesianSVI`,
experimental) is held against the exact distribution over policies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import bayes_klrl as bk
from bayes_klrl.export.plot_style import COLOURS, drawing
from bayes_klrl.gallery.finding import Finding
from bayes_klrl.gallery.glance import Glance
from bayes_klrl.gallery.means import mean_and_se
from bayes_klrl.gallery.models.beliefs import DrawnWorlds, FiniteBelief
from bayes_klrl.gallery.models.policies import StatelessPolicies
from bayes_klrl.gallery.models.worlds import Grid
from bayes_klrl.typing import FloatArray, IntArray
from bayes_klrl.weights import logsumexp

GLANCE = Glance(
    job="Explore under an unknown reward, with a policy",
    today="The mean reward's policy, epsilon-greedy",
    adds="An average over policies, which is Thompson sampling",
    verdict="partly",
    measured="It earns {goal of 4 nats, mixture (Thompson): E[r] of all walks (nats):.0f} nats of reward, the mean "
    "reward's policy {goal of 4 nats, plug-in: E[r] of all walks (nats):.0f}, epsilon-greedy "
    "{goal of 4 nats, plug-in, epsilon-greedy: E[r] of all walks (nats):.0f}. But its walks spend "
    "{goal of 4, mixture minus plug-in: KL to the prior of all walks (nats):.0f} nats more KL to the prior than those "
    "of the mean reward's policy, so that its regret, which counts both, is higher by "
    "{goal of 4, mixture minus plug-in: regret (nats):.0f} ± {goal of 4, mixture minus plug-in: regret, se:.0f}.",
    claims=(
        (
            "goal of 4, mixture minus plug-in: E[r] of all walks (nats)",
            0.0,
            "goal of 4, mixture minus plug-in: E[r] of all walks, se",
        ),
        ("goal of 4, mixture minus plug-in: regret (nats)", 0.0),
    ),
    picture="Regret so far (above) and reward of each walk (below) of agents that act by each policy, with two "
    "standard errors. The mean reward's policy (plug-in) is optimal for the average reward of the worlds. The mixture "
    "follows a world that is drawn for each walk. Joint weighs the worlds by what the walk would earn in them. "
    "Averaged per token: the worlds' policies are averaged at every step.",
    setting="No network: all 4,096 walks of six steps on a 4 x 4 grid are enumerated. A goal is on one of 15 squares. "
    "150 agents take 30 walks each, and see rewards with noise. The regret of a walk is KL(policy || posterior under "
    "the true reward): how much its reward less its KL to the prior is below the best. A policy that earns more reward "
    "and pays still more KL for it has more of both. Reverse KL is KL(q || p*), forward KL is KL(p* || q).",
)

GRID = Grid(side=4, steps=6)
STRENGTHS = (2.0, 4.0)  # reward of the goal each time it is entered, and sd of the noise, in nats
SQUARES = GRID.squares_of(GRID.all_actions)  # of every walk, (M, T)
BEFORE = np.column_stack([np.full(len(SQUARES), GRID.start), SQUARES[:, :-1]])
LOG_PRIOR = -GRID.steps * np.log(4)
MARKS = (0, 1, 2, 4, 8, 16)


class Worlds:
    """The worlds of one strength, enumerated: rewards (W, S), r_w(x) and log p*_w(x) of every walk, (W, M)."""

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.rewards = strength * np.delete(np.eye(GRID.side**2), GRID.start, axis=0)
        self.of_walks = self.rewards[:, SQUARES].sum(axis=2)
        self.log_posterior = normal(LOG_PRIOR + self.of_walks)
        self.tables = np.exp(GRID.log_policy(self.rewards))  # (W, T, S, 4)

    def plug_in(self, weights: FloatArray) -> FloatArray:
        """Return log q(x) of every walk, (M,), for the posterior of the mean reward."""
        return normal(LOG_PRIOR + weights @ self.of_walks)

    def mixture(self, weights: FloatArray) -> FloatArray:
        """Return that of the average of the worlds' posteriors."""
        return logsumexp((log(weights)[:, None] + self.log_posterior).T)

    def joint(self, weights: FloatArray) -> FloatArray:
        """Return that of the posterior of walk and world together."""
        return normal(LOG_PRIOR + logsumexp((log(weights)[:, None] + self.of_walks).T))

    def per_token(self, weights: FloatArray) -> FloatArray:
        """Return that of the policy which averages the worlds' policies at every token, with constant weights."""
        table = np.tensordot(weights, self.tables, axes=1)
        log_q: FloatArray = np.log(table[np.arange(GRID.steps), BEFORE, GRID.all_actions]).sum(axis=1)
        return log_q

    def epsilon_greedy(self, weights: FloatArray) -> FloatArray:
        """Return that of the plug-in policy, of which a tenth of the walks are the prior's."""
        log_q: FloatArray = np.logaddexp(np.log(0.9) + self.plug_in(weights), np.log(0.1) + LOG_PRIOR)
        return log_q


POLICIES: dict[str, Callable[[Worlds, FloatArray], FloatArray]] = {
    "plug-in": Worlds.plug_in,
    "mixture (Thompson)": Worlds.mixture,
    "joint": Worlds.joint,
    "per token": Worlds.per_token,
    "plug-in, epsilon-greedy": Worlds.epsilon_greedy,
}
PLUG_IN, MIXTURE = "plug-in", "mixture (Thompson)"
SHOWN = {
    PLUG_IN: "mean reward's policy",
    "per token": "averaged per token",
    "plug-in, epsilon-greedy": "mean reward's, epsilon-greedy",
}  # names in the pictures, where they are other ones


def log(weights: FloatArray) -> FloatArray:
    """Return the log of probabilities, of which some may be 0."""
    return np.log(np.maximum(weights, 1e-300))


def normal(log_joint: FloatArray) -> FloatArray:
    """Return log-probabilities over the last axis."""
    log_q: FloatArray = log_joint - logsumexp(log_joint)[..., None]
    return log_q


def judged(log_q: FloatArray, worlds: Worlds, true: int) -> tuple[float, float, float]:
    """Return KL(q || p*), KL(p* || q) and E_q[r] of a policy in the true world, in nats."""
    q, log_p = np.exp(log_q), worlds.log_posterior[true]
    return float(q @ (log_q - log_p)), float(np.exp(log_p) @ (log_p - log_q)), float(q @ worlds.of_walks[true])


def look(belief: FiniteBelief, walk: IntArray, true: int, rng: np.random.Generator) -> None:
    """Let the belief see the noisy rewards of a walk (T,) in the true world."""
    belief.see(walk, belief.worlds[true, walk] + belief.noise * rng.normal(size=len(walk)))


def few_walks(worlds: Worlds, num_agents: int, seed: Sequence[int]) -> dict[str, FloatArray]:
    """Return what `judged` says of each policy after some walks of the prior, shape (agents, MARKS, 3)."""
    found = {name: np.empty((num_agents, len(MARKS), 3)) for name in POLICIES}
    for d in range(num_agents):
        rng = np.random.default_rng([*seed, d])
        true, belief = int(rng.integers(len(worlds.rewards))), FiniteBelief(worlds.rewards, worlds.strength)
        for n in range(MARKS[-1] + 1):
            if n in MARKS:
                for name, policy in POLICIES.items():
                    found[name][d, MARKS.index(n)] = judged(policy(worlds, belief.weights), worlds, true)
            look(belief, SQUARES[rng.integers(len(SQUARES))], true, rng)
    return found


def exploring(worlds: Worlds, num_agents: int, num_walks: int, seed: Sequence[int]) -> dict[str, FloatArray]:
    """Return what `judged` says of each walk of agents that act by each policy themselves, shape (agents, walks, 3)."""
    found = {name: np.empty((num_agents, num_walks, 3)) for name in POLICIES}
    for d in range(num_agents):
        true = int(np.random.default_rng([*seed, d]).integers(len(worlds.rewards)))
        for number, (name, policy) in enumerate(POLICIES.items()):
            rng, belief = np.random.default_rng([*seed, d, 1 + number]), FiniteBelief(worlds.rewards, worlds.strength)
            for n in range(num_walks):
                log_q = policy(worlds, belief.weights)
                found[name][d, n] = judged(log_q, worlds, true)
                drawn = min(int(np.searchsorted(np.exp(log_q).cumsum(), rng.random())), len(log_q) - 1)
                look(belief, SQUARES[drawn], true, rng)
    return found


def uncertain_world(seed: int, num_walks: int = 4, num_draws: int = 60) -> tuple[FiniteBelief, DrawnWorlds]:
    """Return the belief after a few walks of the prior in one world, and draws of it."""
    worlds, rng = Worlds(STRENGTHS[0]), np.random.default_rng([seed, 100])
    belief, true = FiniteBelief(worlds.rewards, worlds.strength), int(rng.integers(len(worlds.rewards)))
    for _ in range(num_walks):
        look(belief, SQUARES[rng.integers(len(SQUARES))], true, rng)
    return belief, DrawnWorlds.of(GRID, belief, num_draws, seed)


def gaussian_policies(rewards: FloatArray, num_steps: int, seed: int) -> dict[str, float]:
    """Return the exact distribution over policies that do not see where they are, and `BayesianSVI`'s Gaussian beside it."""
    recipe = bk.BayesianSVI(num_steps, parameters="all", prior_scale=1.0)
    fit = recipe.fit(GRID.posterior(rewards), seed=seed)
    exact = StatelessPolicies(GRID, rewards, weight=float(len(fit.mu)), prior_scale=recipe.prior_scale)
    told = fit.uncertainty(seed=seed)
    return {
        **{f"policies, exact: {name}": value for name, value in exact.truth().items()},
        **{f"policies, Gaussian: {name}": value for name, value in exact.of_gaussian(fit.mu, fit.sigma, seed).items()},
        "policies, 16 drawn: I(policy; walk) (nats)": float(told.mutual_information[0]),
    }


def main(out: Path, *, seed: int = 0, num_agents: int = 150, num_walks: int = 30, num_steps: int = 300) -> Finding:
    """Judge the policies after few walks, let them explore, fit a Gaussian over policies, and write the report."""
    few = few_walks(Worlds(STRENGTHS[0]), num_agents, (seed, 0))
    explored = {s: exploring(Worlds(s), num_agents, num_walks, (seed, 1 + i)) for i, s in enumerate(STRENGTHS)}
    belief, drawn = uncertain_world(seed)
    policies = gaussian_policies(belief.weights @ belief.worlds, num_steps, seed)
    out.mkdir(parents=True, exist_ok=True)
    draw_few(few, out / "few_walks.png")
    draw_explored(explored, out / "exploring.png")
    posterior = bk.Posterior(
        GRID.prior(), bk.EnsembleReward(drawn, alpha=1.0, num_thetas=60), max_new_tokens=GRID.steps
    )
    mixture, plug_in = drawn.mixture(), GRID.policy(drawn.rewards.mean(axis=0))
    rows: dict[str, Any] = {
        "exact": bk.Exact(),
        "prior IS": bk.ImportanceSampling(1000),
        "mixture, then IS": bk.ImportanceSampling(1000, proposal=mixture),
        "plug-in, then IS": bk.ImportanceSampling(1000, proposal=plug_in),
    }
    results = [
        bk.compare(posterior, rows, seed=seed),
        *(bk.certify(posterior, q, seed=seed) for q in (mixture, plug_in)),
    ]
    pictures = {
        f"After a few walks of the prior: distance to the true world's posterior, {num_agents} agents.": out
        / "few_walks.png",
        GLANCE.picture: out / "exploring.png",
    }
    title = "Bayesian policies: the average, one drawn, or the policy of the mean"
    page = bk.report(results, out / "report.html", title=title, pictures=pictures, seed=seed)
    return finding(page, out / "exploring.png", few, explored, policies)


def finding(
    page: Path,
    picture: Path,
    few: dict[str, FloatArray],
    explored: dict[float, dict[str, FloatArray]],
    policies: dict[str, float],
) -> Finding:
    """Return what was measured, in sentences."""
    numbers, se = dict(policies), np.sqrt(len(few[PLUG_IN]))
    for name, values in few.items():
        for mark, (reverse, forward, reward) in zip(MARKS, values.mean(axis=0), strict=True):
            numbers |= {f"{name}, {mark} walks: KL(q || p*) (nats)": reverse, f"{name}, {mark}: KL(p* || q)": forward}
            numbers[f"{name}, {mark}: E[r] (nats)"] = reward
    earned: dict[float, str] = {}
    regret: dict[float, str] = {}
    num_walks = next(iter(explored.values()))[PLUG_IN].shape[1]
    for strength, found in explored.items():
        for name, values in found.items():
            total = values.sum(axis=1)
            for column, what in ((0, "regret"), (2, "E[r] of all walks")):
                numbers[f"goal of {strength:g} nats, {name}: {what} (nats)"] = float(total[:, column].mean())
                numbers[f"goal of {strength:g}, {name}: {what}, se"] = float(total[:, column].std(ddof=1) / se)
        more = found[MIXTURE] - found[PLUG_IN]
        paired = {"regret": more[..., 0].sum(axis=1), "E[r] of all walks": more[..., 2].sum(axis=1)}
        # regret is log Z less E[r] - KL to the prior, and log Z is that of the world
        paired["KL to the prior of all walks"] = paired["regret"] + paired["E[r] of all walks"]
        paired["regret of the last walk"] = more[:, -1, 0]
        for what, values in paired.items():
            mean, error = mean_and_se(values)
            numbers |= {f"goal of {strength:g}, mixture minus plug-in: {what} (nats)": mean}
            numbers |= {f"goal of {strength:g}, mixture minus plug-in: {what}, se": error}
        last = {name: float(values[:, -1, 0].mean()) for name, values in found.items()}
        numbers |= {
            f"goal of {strength:g}, {name}: regret of the last walk (nats)": each for name, each in last.items()
        }
        earned[strength] = f"{signed(paired['E[r] of all walks'])} for a goal of {strength:g}"
        regret[strength] = f"{signed(paired['regret'])} for a goal of {strength:g}"
    four = MARKS.index(4)
    at = {name: few[name][:, four].mean(axis=0) for name in (PLUG_IN, MIXTURE)}
    mild, strong = STRENGTHS
    per_token, plug_in = (
        {what: numbers[f"goal of {strong:g} nats, {name}: {what} (nats)"] for what in ("regret", "E[r] of all walks")}
        for name in ("per token", PLUG_IN)
    )
    return Finding(
        report=page,
        picture=picture,
        better=f"In {num_walks} walks Thompson sampling, which is the mixture, earns more than the mean reward's "
        f"policy, in nats: {earned[strong]}, {earned[mild]}. It keeps every world that may be true: after 4 prior "
        f"walks its forward KL is {at[MIXTURE][1]:.2f} nats, that policy's {at[PLUG_IN][1]:.2f}. The average per token "
        f"earns {per_token['E[r] of all walks']:.0f} against {plug_in['E[r] of all walks']:.0f} at a regret of "
        f"{per_token['regret']:.0f} against {plug_in['regret']:.0f}.",
        worse=f"The mixture's regret, less that of the mean reward's policy, is {regret[strong]} and {regret[mild]}: it "
        "pays more KL to the prior for its reward. For a single walk the mean reward's policy has the least expected "
        f"reverse KL: {at[PLUG_IN][0]:.2f} nats after 4 walks against {at[MIXTURE][0]:.2f}. The Gaussian over policies "
        f"is {policies['policies, Gaussian: KL to the exact distribution (nats)']:.2f} nats from the exact one.",
        numbers=numbers,
    )


def signed(values: FloatArray) -> str:
    """Return a mean with its sign and its standard error in words."""
    return "{:+.1f} ± {:.1f}".format(*mean_and_se(values))


def band(axes: Any, x: FloatArray, values: FloatArray, colour: str, name: str) -> None:
    """Draw the mean over agents, of values (agents, X), with two standard errors."""
    mean, half = values.mean(axis=0), 2 * values.std(axis=0, ddof=1) / np.sqrt(len(values))
    axes.plot(x, mean, color=colour, label=SHOWN.get(name, name))
    axes.fill_between(x, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)


def draw_few(few: dict[str, FloatArray], file: Path) -> None:
    """Draw both KLs and E[r] after few walks."""
    with drawing(file, (9.6, 3.4)) as figure:
        panels = figure.subplots(1, 3)
        for column, (axes, what) in enumerate(zip(panels, ("KL(q || p*)", "KL(p* || q)", "E[r]"), strict=True)):
            for colour, (name, values) in zip(COLOURS, list(few.items())[:4], strict=False):
                band(axes, np.array(MARKS), values[..., column], colour, name)
            axes.set(xlabel="walks of the prior that were seen", ylabel=f"{what} (nats)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)


def draw_explored(explored: dict[float, dict[str, FloatArray]], file: Path) -> None:
    """Draw regret so far and the reward of each walk, a column per strength."""
    with drawing(file, (9.6, 6.0)) as figure:
        panels = figure.subplots(2, len(explored))
        for (upper, lower), (strength, found) in zip(panels.T, explored.items(), strict=True):
            for colour, (name, values) in zip(COLOURS, found.items(), strict=False):
                walks = np.arange(1, values.shape[1] + 1)
                band(upper, walks, values[..., 0].cumsum(axis=1), colour, name)
                band(lower, walks, values[..., 2], colour, name)
            upper.set_ylabel("regret so far (nats)")
            upper.set_title(f"a goal of {strength:g} nats", loc="left")
            lower.set(xlabel="walks", ylabel="E[r] of the walk (nats)")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)


if __name__ == "__main__":
    print(main(Path("bayes-klrl-gallery/bayesian_policy")))
