"""Reward hacking: a proxy from 30 preferences, and which number warns before the gold reward is looked at.

Along b = 1 / alpha the posterior of a learned reward r promises more and more, while the gold reward g moves by
dE[g]/db = Cov(g, r) (theory.md 1.6) and turns over where the covariance changes its sign. NUTS gives a posterior of the
reward, theta ~ p(theta | preferences), and the plug-in target uses its mean r only. Each alarm reads that posterior, never g:

    certificate     KL(plug-in || cut posterior), what `bk.certify` says of a plug-in policy          above log 2 nats
    share           part of Var r that comes from theta, `bk.reward_uncertainty`                      above 1/2
    information     mean KL(p*_theta || cut posterior), what posteriors of draws disagree about        above log 2 nats
    turn-over       P(Cov(r_theta, r) < 0 | preferences), the chance that going on loses reward        above 1/10
    ESS             of the frontier's 4,000 draws of the prior                                        below 100

They stop the plug-in policy. The bar is a KL budget that is the best on all other data sets, which needs their gold rewards.
Problem P13 of the package: all completions are enumerated, and those of equal features and gold are one class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import bayes_klrl as bk
from bayes_klrl.export.plot_style import COLOURS, GREY, drawing
from bayes_klrl.gallery.finding import Finding
from bayes_klrl.gallery.glance import Glance
from bayes_klrl.gallery.means import mean_and_se
from bayes_klrl.gallery.models.proxies import GRID, TARGETS, Proxy, divergence, gold_features, learned
from bayes_klrl.problems.preferences import Overoptimisation, overoptimisation, token_counts
from bayes_klrl.typing import FloatArray, IntArray

GLANCE = Glance(
    job="Stop before a learned reward is hacked",
    today="Stop at a KL budget",
    adds="An uncertain reward: a conservative target, and alarms",
    verdict="partly",
    measured="Gain in gold, the true reward: conservative target "
    "{features can express gold, conservative at the end: gold gain:+.2f}, best KL budget "
    "{features can express gold, best KL of the others: gold gain:+.2f}, alarms from "
    "{features can express gold, certificate: gold gain:+.2f} (the certificate) to "
    "{features can express gold, ESS: gold gain:+.2f}, no stop {features can express gold, no alarm: gold gain:+.2f}. "
    "Where the features cannot express gold: conservative {features cannot, conservative at the end: gold gain:+.2f}, "
    "budget {features cannot, best KL of the others: gold gain:+.2f}, alarms "
    "{features cannot, certificate: gold gain:+.2f} to {features cannot, information: gold gain:+.2f}.",
    claims=(
        (
            "features can express gold, conservative minus best KL of the others: gold gain",
            0.0,
            "features can express gold, conservative minus best KL of the others: its se",
        ),
        ("features cannot, best KL of the others: gold gain", "features cannot, conservative at the end: gold gain"),
        ("features can express gold, share: gold gain", "features can express gold, certificate: gold gain"),
        ("features can express gold, ESS: gold gain", "features can express gold, share: gold gain"),
        ("features cannot, turn-over: gold gain", "features cannot, certificate: gold gain"),
        ("features cannot, information: gold gain", "features cannot, share: gold gain"),
    ),
    picture="Gain in gold reward over the prior where each rule stops, with two standard errors, and how often that is "
    "before gold falls. Blue rules read gold: the peak stops where gold is largest; the KL budget is the best one of "
    "all other data sets. Orange alarms read the learned reward only. Certificate: its policy is more than 0.69 nats "
    "from the posterior under an uncertain reward. Share: more than half of the reward's variance is doubt about the "
    "reward. Information: its draws disagree by more than 0.69 nats. Turn-over: going on loses reward with probability "
    "above 0.1. ESS: below 100.",
    setting="No network: texts of at most 8 words from a vocabulary of 3 are enumerated. The reward is linear in "
    "features of a text, and learned from 30 preferences; 40 data sets of each kind. Gold is the true reward, in its "
    "own units; targets and alarms do not read it. The plug-in policy takes the mean of the learned reward for true. "
    "The conservative target takes the mean less the standard deviation. b is 1 / alpha: the larger, the further from "
    "the prior.",
)

BITS = float(np.log(2))
LIMITS = {"certificate": BITS, "share": 0.5, "information": BITS, "turn-over": 0.1, "ESS": float(np.log(4000 / 100))}
BUDGET = "best KL of the others"
ALPHA = 0.25  # of the comparison and the certificate in the report


FEATURES: dict[str, Callable[[IntArray, IntArray], FloatArray]] = {
    "can express gold": gold_features,
    "cannot": token_counts,
}


def stops(proxy: Proxy) -> dict[str, int]:
    """Return where on the grid each alarm goes off first; the end of the grid if it never does."""
    alarms = proxy.alarms().items()
    return {name: int(np.argmax(np.append(values[:-1] >= LIMITS[name], True))) for name, values in alarms}


def gain_at_kl(proxies: Sequence[Proxy], kls: FloatArray) -> FloatArray:
    """Return the gold gain of each plug-in policy at given KLs, (D, K), linear between the b's; at the end past the end."""
    return np.stack([np.interp(kls, proxy.kl, proxy.gain) for proxy in proxies])


@dataclass(frozen=True)
class Judgement:
    """What stopping there is worth, for D data sets: gold gain and whether it is before the turn-over, (D,) each."""

    gain: dict[str, FloatArray]
    before: dict[str, FloatArray]
    turns: np.ndarray  # whether the gold reward turns over at all
    reading: dict[str, FloatArray]  # of each alarm where it does

    @classmethod
    def of(cls, proxies: Sequence[Proxy]) -> Judgement:
        """Judge every alarm, the best KL budget of the other data sets, and no alarm at all, on the plug-in policies."""
        peaks = np.array([proxy.gain.argmax() for proxy in proxies])
        where = {name: np.array([stops(proxy)[name] for proxy in proxies]) for name in LIMITS}
        where |= {"the peak": peaks, "no alarm": np.full(len(proxies), len(GRID) - 1)}
        gain = {
            name: np.array([proxy.gain[i] for proxy, i in zip(proxies, at, strict=True)]) for name, at in where.items()
        }
        before = {name: (at <= peaks).astype(float) for name, at in where.items()}
        kls = np.linspace(0.0, 5.0, 101)
        table = gain_at_kl(proxies, kls)
        best = ((table.sum(axis=0) - table) / (len(proxies) - 1)).argmax(axis=1)  # on the others
        gain[BUDGET] = table[np.arange(len(proxies)), best]
        before[BUDGET] = (kls[best] <= [proxy.kl[i] for proxy, i in zip(proxies, peaks, strict=True)]).astype(float)
        alarms = [proxy.alarms() for proxy in proxies]
        reading = {name: np.array([each[name][i] for each, i in zip(alarms, peaks, strict=True)]) for name in LIMITS}
        return cls(gain, before, peaks < len(GRID) - 1, reading)

    def in_time(self, name: str) -> float:
        """Return how often it stops before the turn-over, where there is one."""
        return float(self.before[name][self.turns].mean()) if self.turns.any() else float("nan")

    def better_than(self, name: str, other: str) -> str:
        """Return how much more gold one has than another, in words, mean and standard error."""
        return "{:+.2f} ± {:.2f}".format(*mean_and_se(self.gain[name] - self.gain[other]))


def main(out: Path, *, seed: int = 0, num_sets: int = 40, num_pairs: int = 30) -> Finding:
    """Learn proxies, follow them past the turn-over, judge the alarms, and write the report."""
    problem = overoptimisation()
    proxies: dict[str, list[Proxy]] = {name: [] for name in FEATURES}
    fits: dict[str, bk.RewardPosterior] = {}
    unconverged = 0
    for name, features in FEATURES.items():
        for number in range(num_sets):
            fit = learned(problem, features, num_pairs, seed * num_sets + number)
            unconverged += bool(fit.diagnostics.problems)
            fits.setdefault(name, fit)
            proxies[name].append(Proxy.of(problem, fit, features))
    judged = {name: Judgement.of(each) for name, each in proxies.items()}
    out.mkdir(parents=True, exist_ok=True)
    draw_frontiers(proxies, out / "frontier.png")
    draw_alarms(judged, out / "alarms.png")
    pictures = {
        f"Gold reward along the frontier, mean of {num_sets} data sets, and what the proxy promises.": out
        / "frontier.png",
        GLANCE.picture: out / "alarms.png",
    }
    results = certified(problem, fits["can express gold"], seed)
    title = "Reward hacking: what warns before the gold reward is looked at"
    page = bk.report(results, out / "report.html", title=title, pictures=pictures, seed=seed)
    numbers = {"data sets": float(num_sets), "fits that did not converge": float(unconverged)}
    return finding(page, out / "alarms.png", proxies, judged, numbers)


def certified(problem: Overoptimisation, fit: bk.RewardPosterior, seed: int) -> list[Any]:
    """Return, for one data set, the cut posterior's comparison, its certificate of the plug-in policy, and the frontier."""
    prior, tokens = problem.posterior.prior, problem.posterior.max_new_tokens
    cut, plug_in = (
        bk.Posterior(prior, fit.reward(ALPHA, target=target), max_new_tokens=tokens) for target in ("cut", "plug-in")
    )
    policy = bk.posterior_policy(plug_in).language_model()
    rows: dict[str, Any] = {
        "exact": bk.Exact(),
        "prior IS": bk.ImportanceSampling(2000),
        "plug-in policy, then IS": bk.ImportanceSampling(2000, proposal=policy),
    }
    return [
        bk.compare(cut, rows, seed=seed),
        bk.certify(cut, policy, seed=seed),
        bk.frontier(plug_in, num_draws=4000, seed=seed),
    ]


def finding(
    page: Path,
    picture: Path,
    proxies: dict[str, list[Proxy]],
    judged: dict[str, Judgement],
    numbers: dict[str, float],
) -> Finding:
    """Return what was measured, in sentences."""
    for words, each in judged.items():
        numbers[f"features {words}: share of data sets that turn over"] = float(each.turns.mean())
        for name, gain in each.gain.items():
            mean, se = mean_and_se(gain)
            numbers |= {f"features {words}, {name}: gold gain": mean, f"features {words}, {name}: its se": se}
        if each.turns.any():
            numbers |= {f"features {words}, {name}: stops in time": each.in_time(name) for name in each.gain}
            for name, values in each.reading.items():
                numbers[f"features {words}, {name}: median where gold turns over"] = float(
                    np.median(values[each.turns])
                )
        for target in TARGETS:
            gold = np.array([(proxy.target(target) @ proxy.gold)[[0, -1]] for proxy in proxies[words]])
            end = gold[:, 1] - gold[:, 0]
            for of, values in {
                f"{target} at the end": end,
                f"{target} minus {BUDGET}": end - each.gain[BUDGET],
            }.items():
                mean, se = mean_and_se(values)
                numbers |= {f"features {words}, {of}: gold gain": mean, f"features {words}, {of}: its se": se}
        for name in LIMITS:
            mean, se = mean_and_se(each.gain[name] - each.gain[BUDGET])
            numbers |= {f"features {words}, {name} minus {BUDGET}: gold gain": mean}
            numbers |= {f"features {words}, {name} minus {BUDGET}: its se": se}
    rich, poor = judged.values()

    def stopped(each: Judgement, name: str) -> str:
        return f"{name} {each.better_than(name, BUDGET)}"

    def gold_of(words: str, of: str) -> str:
        return (
            f"{numbers[f'features {words}, {of}: gold gain']:+.2f} ± {numbers[f'features {words}, {of}: its se']:.2f}"
        )

    known, unknown = judged
    worst, best = (pick(LIMITS, key=lambda name: poor.gain[name].mean()) for pick in (min, max))
    return Finding(
        report=page,
        picture=picture,
        better=f"Gold reward over the prior's at b = {GRID[-1]:g}, where the features can express it: the conservative "
        f"target {gold_of(known, 'conservative at the end')} without any alarm, the plug-in policy "
        f"{gold_of(known, 'plug-in at the end')}, and {gold_of(known, BUDGET)} stopped at the KL budget that is best on the "
        f"other data sets' gold. The alarm by the share of variance that is doubt reads no gold, and has "
        f"{rich.better_than('share', BUDGET)} compared with that budget.",
        worse="Gold reward where each alarm stops, less that of the budget: "
        f"{', '.join(stopped(rich, name) for name in LIMITS)}. Where the features cannot express gold, no draw of the reward "
        f"knows what is wrong: from {stopped(poor, worst)} to {stopped(poor, best)}. The conservative target ends at "
        f"{gold_of(unknown, 'conservative at the end')}, the budget at {gold_of(unknown, BUDGET)}.",
        numbers=numbers,
    )


def draw_frontiers(proxies: dict[str, list[Proxy]], file: Path) -> None:
    """Draw E[g] of each target, and the plug-in policy's promise, against KL: means with two standard errors."""
    with drawing(file, (9.6, 3.8)) as figure:
        panels = figure.subplots(1, len(proxies), sharey=True)
        for axes, (words, each) in zip(panels, proxies.items(), strict=True):
            for colour, target in zip(COLOURS, TARGETS, strict=False):
                probs = np.stack(
                    [np.stack([proxy.target(target) @ v for v in (proxy.gold, proxy.mean)]) for proxy in each]
                )
                kl = np.mean([divergence(proxy.target(target), np.exp(proxy.log_prior)) for proxy in each], axis=0)
                (mean, promise), half = probs.mean(axis=0), 2 * probs[:, 0].std(axis=0, ddof=1) / np.sqrt(len(each))
                axes.plot(kl, mean, color=colour, label=f"gold, {target}")
                axes.fill_between(kl, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
                if target == "plug-in":
                    axes.plot(kl, mean[0] + promise, color=GREY, linestyle=":", label="promised by the proxy (plug-in)")
            axes.set(xlabel=f"KL to the prior (nats), b from 0 to {GRID[-1]:g}", ylim=(-4.5, 4.0))
            axes.set_title(f"features {words}", loc="left")
        panels[0].set_ylabel("expected reward")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)


def draw_alarms(judged: dict[str, Judgement], file: Path) -> None:
    """Draw the gold gain where each alarm stops, with two standard errors, and how often that is in time."""
    names = ["the peak", BUDGET, *LIMITS]
    with drawing(file, (9.6, 3.4)) as figure:
        panels = figure.subplots(1, len(judged), sharey=True)
        for axes, (words, each) in zip(panels, judged.items(), strict=True):
            for row, name in enumerate(names):
                mean, se = mean_and_se(each.gain[name])
                axes.errorbar(
                    mean, row, xerr=2 * se, fmt="o", color=COLOURS[1] if name in LIMITS else COLOURS[0], capsize=3
                )
                axes.text(1.02, row, f"{each.in_time(name):.0%}", transform=axes.get_yaxis_transform(), va="center")
            axes.set(
                yticks=range(len(names)), yticklabels=names, xlabel="gold gain over the prior; right: stops in time"
            )
            axes.set_title(f"features {words}", loc="left")
        panels[0].invert_yaxis()


if __name__ == "__main__":
    print(main(Path("bayes-klrl-gallery/reward_hacking")))
