"""Image classification: the Bayes decision, where mistakes cost unequally, is the posterior policy as alpha goes to 0.

A clerk reads amounts. Paying one unit too much costs 10, since it is lost; paying one unit too little costs 1. The prior
p0(y | image) is a small convolutional network, trained on 200 of scikit-learn's digits. Read as a policy it declares each
digit as often as it believes in it. The reward of declaring a is minus the cost that the prior expects,

    r(a, image) = -sum_y p0(y | image) cost(a, y),        p*(a | image) = p0(a | image) exp(r(a, image) / alpha) / Z(image).

p* is a policy and no belief: the belief is still p0. At alpha = inf it copies the belief, for alpha -> 0 it takes the Bayes
decision argmax_a r(a, image), and between them it lowers the expected cost as far as its KL to the prior allows. A reward
that sees the label alone, r(a), is another problem with another answer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

import bayes_klrl as bk
from bayes_klrl.export.plot_style import BLACK, COLOURS, GREY, drawing, number_text
from bayes_klrl.gallery.data.digits import DIGITS, LEVELS, Images, parts_of_digits
from bayes_klrl.gallery.finding import Finding
from bayes_klrl.gallery.glance import Glance
from bayes_klrl.gallery.models.digits_lm import digits_lm
from bayes_klrl.gallery.models.label_lm import LabelLM, minimise
from bayes_klrl.typing import FloatArray, IntArray

GLANCE = Glance(
    job="Label images, where mistakes cost unequally",
    today="The likeliest label; RL on true labels",
    adds="The exact posterior, and decisions under it",
    verdict="partly",
    measured="An image costs {Bayes decision: cost:.2f} by the Bayes decision, {argmax of the prior: cost:.2f} by the "
    "likeliest label. Against RL on true labels it saves {Bayes decision saves against plain RL, no KL (cost):.2f} ± "
    "{standard error of the saving against plain RL, no KL:.2f}. A network tuned to the posterior costs "
    "{SVI, alpha 1: cost:.2f}, as the prior's belief is too sure; in {other seeds: Bayes decision costs less:.0f} of "
    "{other seeds:.0f} other runs the network costs more.",
    claims=(
        (
            "Bayes decision saves against argmax of the prior (cost)",
            0.0,
            "standard error of the saving against argmax of the prior",
        ),
        ("Bayes decision: cost", "Bayes decision: cost that the prior expects"),
        ("Bayes decision: cost", "SVI, alpha 1: cost"),
        ("other seeds: Bayes decision costs less", 1.0),
    ),
    picture="Cost of an image against KL to the prior, on unseen images, with standard errors. The blue line leads "
    "from the belief (large alpha) to the Bayes decision (small alpha); the grey line has a reward that does not see "
    "the image. Argmax of the prior is the likeliest digit, plain RL is RL on true labels, and SVI a network tuned to "
    "the posterior. The Bayes decision is the best only if the belief is right.",
    setting="Model: a convolutional network of 1,898 parameters. Data: 1,797 images of 8 x 8 pixels: 200 train the "
    "network, 100 calibrate it, 500 without labels tune the policy (SVI), 997 are unseen. RL on true labels has the "
    "labels of the first 300. To declare one unit too much costs 10, one too little costs 1.",
)

SIZES = {"training": 200, "calibration": 100, "tuning": 500}  # all other images are unseen
TOO_MUCH, TOO_LITTLE = 10.0, 1.0
ALPHA, ALPHAS = 1.0, (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0)
BELIEF, LIKELY, RL, BAYES = "draw from the prior", "argmax of the prior", "plain RL, no KL", "Bayes decision"
EXACT, TUNED = f"posterior, alpha {ALPHA:g}", f"SVI, alpha {ALPHA:g}"

DIFFERENCE = np.subtract.outer(np.arange(10), np.arange(10))
COST = TOO_MUCH * np.maximum(DIFFERENCE, 0) + TOO_LITTLE * np.maximum(-DIFFERENCE, 0)  # cost(a, y), (10, 10)


def problem(prior: LabelLM, images: Images, alpha: float = ALPHA) -> bk.Posterior:
    """Return the posterior over declared digits, whose reward is minus the cost that the prior expects."""
    worst = float(COST.max())

    def expected_cost(completions: list[str], expected: list[dict[str, float]]) -> list[float]:
        # a grey level is no answer, and has prior probability 0
        return [-costs.get(answer, worst) for answer, costs in zip(completions, expected, strict=True)]

    reward = bk.Reward(expected_cost, alpha=alpha, bounds=(-worst, 0.0), name="minus the expected cost")
    expected = [dict(zip(DIGITS, row, strict=True)) for row in (prior.label_probs(images.prompts) @ COST.T).tolist()]
    return bk.Posterior(prior, reward, prompts=images.prompts, max_new_tokens=1, expected=expected)


def exact_policy(posterior: bk.Posterior) -> FloatArray:
    """Return p*(a | image) of every digit by enumeration, (P, 10)."""
    return bk.Exact().run(posterior, seed=0).weights[:, len(LEVELS) :]


def decided(values: FloatArray) -> FloatArray:
    """Return the policy that always takes the action of the largest value, (P, 10)."""
    policy: FloatArray = np.eye(10)[values.argmax(axis=1)]
    return policy


def tilted(policy: FloatArray, log_factor: FloatArray) -> FloatArray:
    """Return the policy times exp(log_factor), normalised."""
    weights = policy * np.exp(log_factor - log_factor.max())
    normalised: FloatArray = weights / weights.sum(axis=1, keepdims=True)
    return normalised


def plain_rl(prior: LabelLM, images: Mapping[str, Images], *, steps: int) -> LabelLM:
    """Return the policy of least mean cost on all labelled images, by exact policy gradients without a KL."""
    lm = copy.deepcopy(prior)
    prompts = [*images["training"].prompts, *images["calibration"].prompts]
    labels = np.concatenate([images["training"].labels, images["calibration"].labels])
    paid = torch.as_tensor(COST[:, labels].T, dtype=torch.float32)  # (P, 10)
    minimise(lm, lambda: (lm.label_log_probs(prompts).exp() * paid).sum(dim=1).mean(), steps=steps)
    return lm


def divergence(policy: FloatArray, other: FloatArray) -> FloatArray:
    """Return KL(policy || other) of each image in nats, (P,)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(policy > 0, np.log(policy) - np.log(other), 0.0)
    found: FloatArray = (policy * ratio).sum(axis=1)
    return found


def judged(policy: FloatArray, prior: FloatArray, labels: IntArray) -> dict[str, float]:
    """Return what a policy costs on images with known digits, and how far it is from the prior's; means over images.

    "accuracy" is that of its most probable digit, "log loss" is -log q(true digit), and "KL" is KL(q || p0), in nats.
    """
    paid = (policy * COST[:, labels].T).sum(axis=1)
    with np.errstate(divide="ignore"):
        log_loss = -np.log(policy[np.arange(len(labels)), labels])
    return {
        "cost": float(paid.mean()),
        "error": float(paid.std(ddof=1) / len(labels) ** 0.5),
        "accuracy": float((policy.argmax(axis=1) == labels).mean()),
        "log loss": float(log_loss.mean()),
        "KL": float(divergence(policy, prior).mean()),
    }


def saving(policy: FloatArray, other: FloatArray, labels: IntArray) -> tuple[float, float]:
    """Return how much less a policy costs than another on the mean image, and the standard error of the paired difference."""
    difference = ((other - policy) * COST[:, labels].T).sum(axis=1)
    return float(difference.mean()), float(difference.std(ddof=1) / len(labels) ** 0.5)


def tuned(images: Mapping[str, Images], *, num_steps: int, seed: int) -> tuple[LabelLM, bk.Fit]:
    """Train the prior, and tune one policy for all images, which sees no label."""
    prior = digits_lm(images["training"], images["calibration"], seed=seed)
    recipe = bk.SVI(num_steps, 16, prompts_per_step=100, learning_rate=3e-3, max_step_kl=0.1)
    return prior, recipe.fit(problem(prior, images["tuning"]), seed=seed)


def costs_less(num_steps: int, seed: int) -> bool:
    """Return whether the Bayes decision costs less than the tuned policy, if everything is done with another seed."""
    images = parts_of_digits(SIZES, "unseen", seed=seed)
    prior, fit = tuned(images, num_steps=num_steps, seed=seed)
    unseen = images["unseen"]
    belief = prior.label_probs(unseen.prompts)
    policy = fit.guide.label_probs(unseen.prompts)  # type: ignore[attr-defined]
    return saving(decided(-belief @ COST.T), policy, unseen.labels)[0] > 0


def main(
    out: Path, *, seed: int = 0, num_steps: int = 400, num_certified: int = 200, num_other_seeds: int = 3
) -> Finding:
    """Train the prior, tune one policy for all images, and judge everything on images that nothing was trained on."""
    images = parts_of_digits(SIZES, "unseen", seed=seed)
    prior, fit = tuned(images, num_steps=num_steps, seed=seed)
    unseen = images["unseen"]
    rl = plain_rl(prior, images, steps=num_steps)
    posterior, belief = problem(prior, unseen), prior.label_probs(unseen.prompts)
    policies = {
        BELIEF: belief,
        LIKELY: decided(belief),
        RL: rl.label_probs(unseen.prompts),
        BAYES: decided(-belief @ COST.T),
        EXACT: exact_policy(posterior),
        # SVI trains a copy of the prior, so that the guide of a LabelLM is one
        TUNED: fit.guide.label_probs(unseen.prompts),  # type: ignore[attr-defined]
    }
    blind = -COST.mean(axis=1)  # a reward of the label alone: the mean cost if all digits are equally frequent
    paths = {
        "posterior": [exact_policy(posterior.at_alpha(alpha)) for alpha in ALPHAS],
        "reward of the label alone": [tilted(belief, blind / alpha) for alpha in ALPHAS],
    }
    rows = {name: judged(policy, belief, unseen.labels) for name, policy in policies.items()}
    lines = {name: [judged(policy, belief, unseen.labels) for policy in path] for name, path in paths.items()}
    some = posterior.select(range(min(num_certified, posterior.num_prompts)))
    methods: dict[str, bk.Algorithm] = {
        "exact": bk.Exact(),
        "prior IS": bk.ImportanceSampling(1000),
        "SVI, then IS": bk.ImportanceSampling(1000, proposal=fit.guide),
    }
    comparison = bk.compare(some.select(range(min(20, some.num_prompts))), methods, seed=seed)
    certificate = bk.certify(some, fit, seed=seed, num_draws=128)
    out.mkdir(parents=True, exist_ok=True)
    draw_frontier(lines, rows, out / "frontier.png")
    draw_rows(rows, out / "rows.png")
    draw_decisions(unseen, belief, policies[BAYES], out / "decisions.png")
    pictures = {
        GLANCE.picture: out / "frontier.png",
        "Cost of each policy on the unseen images, with standard errors.": out / "rows.png",
        "Unseen images where the Bayes decision expects to save most against the likeliest digit.": out
        / "decisions.png",
    }
    title = "Image classification where mistakes cost unequally"
    page = bk.report([comparison, certificate], out / "report.html", title=title, pictures=pictures, seed=seed)
    expected = {name: float((policies[name] * (belief @ COST.T)).sum(axis=1).mean()) for name in (BAYES, TUNED)}
    others = [costs_less(num_steps, seed + 1 + number) for number in range(num_other_seeds)]
    return finding(page, out / "frontier.png", policies, rows, unseen.labels, expected, others)


def finding(
    page: Path,
    picture: Path,
    policies: Mapping[str, FloatArray],
    rows: Mapping[str, Mapping[str, float]],
    labels: IntArray,
    expected: Mapping[str, float],
    others: list[bool],
) -> Finding:
    """Return what was measured, in words."""
    saved = {name: saving(policies[BAYES], policies[name], labels) for name in (LIKELY, RL, EXACT, TUNED)}
    saves = {name: f"{mean:.2f} ± {error:.2f}" for name, (mean, error) in saved.items()}
    fitted, started = (float(divergence(policies[name], policies[EXACT]).mean()) for name in (TUNED, BELIEF))
    lost = 100 * (rows[LIKELY]["accuracy"] - rows[BAYES]["accuracy"])
    return Finding(
        report=page,
        picture=picture,
        better=f"On {len(labels)} unseen images the Bayes decision costs {rows[BAYES]['cost']:.2f} an image, the "
        f"likeliest digit {rows[LIKELY]['cost']:.2f}: it saves {saves[LIKELY]}. The network that SVI tuned needs no "
        f"sum over digits, and is {fitted:.2f} nats from the exact posterior there; the prior is {started:.2f} nats "
        "from it.",
        worse=f"Against RL on true labels the Bayes decision saves {saves[RL]}, against the network that SVI tuned "
        f"{saves[TUNED]} (below 0: it costs more). By the prior's belief it would cost {expected[BAYES]:.2f} and the "
        f"network {expected[TUNED]:.2f}: the belief is wrong about some images. In {sum(others)} of {len(others)} "
        f"other seeds the Bayes decision costs less. It is right less often than the likeliest digit, by {lost:.1f} "
        "percentage points.",
        numbers={
            f"{name}: {what}": value for name, row in rows.items() for what, value in row.items() if np.isfinite(value)
        }
        | {f"Bayes decision saves against {name} (cost)": mean for name, (mean, _) in saved.items()}
        | {f"standard error of the saving against {name}": error for name, (_, error) in saved.items()}
        | {f"{name}: cost that the prior expects": value for name, value in expected.items()}
        | {"other seeds": len(others), "other seeds: Bayes decision costs less": sum(others)}
        | {"KL(SVI || posterior) (nats)": fitted, "KL(prior || posterior) (nats)": started, "images": len(labels)},
    )


def draw_frontier(
    lines: Mapping[str, list[dict[str, float]]], rows: Mapping[str, Mapping[str, float]], file: Path
) -> None:
    """Draw cost against KL to the prior, over alpha for both rewards, and for each policy."""
    with drawing(file, (6.4, 3.8)) as figure:
        axes = figure.subplots()
        for (name, line), colour in zip(lines.items(), (COLOURS[0], GREY), strict=True):
            axes.plot([row["KL"] for row in line], [row["cost"] for row in line], "o-", ms=3, color=colour, label=name)
        for alpha, point in zip(ALPHAS, lines["posterior"], strict=True):
            if alpha in (0.03, 0.3, 3.0, 10.0):
                axes.annotate(f"α = {alpha:g}", (point["KL"], point["cost"] - 0.05), fontsize=7, ha="center", va="top")
        for colour, marker, (name, row) in zip((*COLOURS[1:5], BLACK, COLOURS[5]), "osD^vP", rows.items(), strict=True):
            axes.errorbar(row["KL"], row["cost"], row["error"], fmt=marker, color=colour, ms=5, capsize=2, label=name)
        most = max(row["KL"] for row in rows.values())
        top = 1.6 * max(row["cost"] for row in rows.values())
        axes.set(
            xlabel="KL to the prior (nats)", ylabel="cost of an image", xlim=(-0.05 * most, 1.2 * most), ylim=(0, top)
        )
        axes.legend(frameon=False, fontsize=7, ncols=2, loc="upper right")


def draw_rows(rows: Mapping[str, Mapping[str, float]], file: Path) -> None:
    """Draw the cost of each policy as a bar, and write accuracy and log loss beside it."""
    costs, errors = ([row[what] for row in rows.values()] for what in ("cost", "error"))
    with drawing(file, (6.4, 2.4)) as figure:
        axes = figure.subplots()
        axes.barh(list(rows), costs, xerr=errors, color=COLOURS[0], ecolor=BLACK)
        for place, (row, cost, error) in enumerate(zip(rows.values(), costs, errors, strict=True)):
            words = f"accuracy {row['accuracy']:.3f}, log loss {number_text(row['log loss'], 2)}"
            axes.text(cost + error + 0.03, place, words, va="center", fontsize=7)
        axes.invert_yaxis()
        axes.set(xlabel="cost of an image", xlim=(0, 1.7 * max(costs)))


def draw_decisions(images: Images, belief: FloatArray, bayes: FloatArray, file: Path) -> None:
    """Draw the images where the Bayes decision saves most against the likeliest digit, as the prior expects it."""
    expected, rows = belief @ COST.T, np.arange(len(belief))
    chosen, likely = bayes.argmax(axis=1), belief.argmax(axis=1)
    order = np.argsort(expected[rows, chosen] - expected[rows, likely])[:7]
    with drawing(file, (6.4, 1.45)) as figure:
        for axes, index in zip(figure.subplots(1, len(order)), order, strict=True):
            axes.imshow(images.pixels[index].reshape(8, 8), cmap="gray_r")
            words = f"likeliest {likely[index]}: {belief[index, likely[index]]:.2f}\ndeclared {chosen[index]}"
            axes.set_title(f"{words}\nwritten {images.labels[index]}", fontsize=7)
            axes.set(xticks=[], yticks=[])


if __name__ == "__main__":
    print(main(Path("bayes-klrl-gallery/image_classification")))
