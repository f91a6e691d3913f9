"""Generation: one prior and several rewards, among them a style classifier as Bayes' rule, and a text without the letter e.

The prior is `austen`, the shipped transformer of Jane Austen's novels. Each reward makes a posterior of its own:

    cheerful            VADER's sentiment at alpha = 0.1
    eight words         minus the number of words that there are too many or too few, at alpha = 2
    cheerful * eight    the product of the two likelihoods, which need not be tuned together
    speech              log P(speech | x) of a classifier trained on the novels (`gallery.models.style`), at alpha = 1: the
                        posterior is p0(x | speech), and the log evidence is log p0(speech), both by Bayes' rule
    no letter e         a regular expression, as an automaton over tokens: a hard constraint

Importance sampling and SMC estimate the same log evidence; how far they agree is the check of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

import bayes_klrl as bk
from bayes_klrl.export.plot_style import COLOURS, drawing, plain_text
from bayes_klrl.gallery.finding import Finding
from bayes_klrl.gallery.glance import Glance
from bayes_klrl.gallery.models.style import LEAST, StyleClassifier
from bayes_klrl.models.rewards import sentiment

GLANCE = Glance(
    job="Several rewards and hard constraints with one prior",
    today="Draw and filter",
    adds="SMC whose twist comes from a small exact model",
    verdict="partly",
    measured="Without the letter e, 1,000 tokens make {no letter e, SMC, twisted, the same with training:.2f} "
    "effective draws by SMC with a twist and {no letter e, prior IS, the same with training:.2f} by filtering. Of the "
    "product of two rewards SMC's effective sample size is {cheerful * eight, SMC, effective sample size:.0f}: too few.",
    claims=(
        ("no letter e, SMC, twisted, the same with training", "no letter e, prior IS, the same with training"),
        (100.0, "cheerful * eight, SMC, effective sample size"),
    ),
    picture="Completions of one prompt: by the prior, and by the posterior of each reward, with the method that has the most "
    "effective draws.",
    setting="Model: the shipped transformer of Jane Austen's novels, 2.1 million parameters; the style classifier has "
    "32,769 weights. Data: one prompt, completions of at most 24 tokens. A twist estimates what a prefix will be "
    "worth, and steers SMC; here it comes from an n-gram model that was fitted to draws of the prior (distilled). "
    "Effective draws are what weighted draws are worth.",
)

PROMPT, NUM_TOKENS = "It was a fine morning", 24
COLOUR_OF = dict(zip(("prior IS", "SMC", "SMC, twisted", "SVI, then IS"), COLOURS, strict=False))
PATTERN = "[^eE]{30,}[.!?]"  # Python's `re` reads it in the same way


def eight_words(completions: list[str]) -> list[float]:
    """Return minus the distance of the number of words to eight."""
    return [-float(abs(len(text.split()) - 8)) for text in completions]


def token_automaton(pattern: str, lm: Any) -> bk.Automaton:
    """Return the automaton over a model's tokens of a regular expression over characters.

    The automaton of the expression reads each token's characters one after the other. A token that is no whole text, a part
    of a character, or has a character that no token spells alone, ends in a state that nothing leaves.
    """
    pieces = lm.decode([[i] for i in range(lm.vocab_size)])
    alphabet = sorted({character for piece in pieces for character in piece} - {"\ufffd"})
    letters = bk.Automaton.regex(pattern, vocab_size=len(alphabet), alphabet="".join(alphabet))
    number, dead = {character: i for i, character in enumerate(alphabet)}, letters.num_states
    step = np.vstack([np.column_stack([letters.transitions, np.full(dead, dead)]), np.full(len(alphabet) + 1, dead)])
    transitions = np.empty((dead + 1, lm.vocab_size), dtype=np.int64)
    for token, piece in enumerate(pieces):
        state = np.arange(dead + 1)
        for character in "" if token in lm.eos_token_ids else piece:
            state = step[state, number.get(character, len(alphabet))]
        transitions[:, token] = state
    return bk.Automaton(transitions, letters.start, letters.accepting)


def likelihoods(prior: Any) -> dict[str, bk.Likelihood]:
    """Return the likelihoods by name."""
    cheerful = bk.Reward(sentiment, alpha=0.1, bounds=(-1, 1), name="cheerful")
    length = bk.Reward(eight_words, alpha=2.0, bounds=(-NUM_TOKENS, 0), name="eight words")
    speech = bk.Reward(StyleClassifier.shipped().log_probs, alpha=1.0, bounds=(float(np.log(LEAST)), 0), name="speech")
    return {
        "speech": speech,
        "cheerful": cheerful,
        "eight words": length,
        "cheerful * eight": cheerful * length,
        "no letter e": bk.AutomatonConstraint(token_automaton(PATTERN, prior), name="no letter e"),
    }


def methods(name: str, num_steps: int, scale: int) -> dict[str, Any]:
    """Return the methods for a likelihood; SVI has no gradient where the likelihood is 0, so the constraint goes without."""
    if name == "no letter e":  # which about one draw in a thousand fulfils
        return {
            "prior IS": bk.ImportanceSampling(16 * scale),
            "SMC": bk.SMC(scale),
            "SMC, twisted": bk.SMC(scale, twist=bk.DistilledTwist(), proposal="twisted"),
        }
    svi = bk.SVI(num_steps, 48, num_draws=2 * scale)
    return {
        "prior IS": bk.ImportanceSampling(4 * scale),
        "SMC": bk.SMC(scale),
        "best of 16": bk.BestOfN(16, max(scale // 8, 4)),
        "SVI": svi,
        "SVI, then IS": bk.ImportanceSampling(2 * scale, proposal=svi),
    }


def z_score(one: bk.Draws, other: bk.Draws) -> float:
    """Return the difference of two log evidences, in its standard errors."""
    error = np.hypot(one.log_evidence_se[0], other.log_evidence_se[0])
    return float((one.log_evidence[0] - other.log_evidence[0]) / error)


def per_thousand_tokens(draws: bk.Draws, *, training: bool = False) -> float:
    """Return the effective draws of a weighted method for a thousand tokens through a model, with its training or without."""
    tokens = draws.cost.model_tokens + draws.cost.training_tokens * training
    return float(1000 * draws.ess[0] / tokens)


def main(out: Path, *, seed: int = 0, num_steps: int = 35, scale: int = 256) -> Finding:
    """Answer each posterior with every method, certify the guide for speech, and write a page for each reward."""
    out.mkdir(parents=True, exist_ok=True)
    prior = bk.TorchLM.from_pretrained("austen")
    comparisons = {}
    for name, likelihood in likelihoods(prior).items():
        posterior = bk.Posterior(prior, likelihood, prompts=PROMPT, max_new_tokens=NUM_TOKENS)
        comparisons[name] = bk.compare(posterior, methods(name, num_steps, scale), seed=seed)
        if name != "speech":
            page = out / f"report-{name.replace(' * ', '-').replace(' ', '-')}.html"
            bk.report(comparisons[name], page, title=f"Generation: {name}", seed=seed)
    speech = comparisons["speech"]
    certificate = bk.certify(
        speech.posterior, speech.fits["SVI"], seed=seed, num_draws=2 * scale, num_runs=16, max_proposals=20 * scale
    )
    draw_evidence(comparisons, out / "evidence.png")
    draw_efficiency(comparisons, out / "efficiency.png")
    draw_texts(comparisons, out / "texts.png", seed)
    others = ", ".join(sorted(page.name for page in out.glob("report-*.html")))
    pictures = {
        f"Completions of {PROMPT!r} before and after. The pages of the other rewards lie beside this one: {others}.": out
        / "texts.png",
        "Log evidence of each posterior by independent methods, with two standard errors.": out / "evidence.png",
        "Effective draws for a thousand tokens through a model; white lines count the training of guide or twist, too.": out
        / "efficiency.png",
    }
    title = "Generation: one prior, several rewards, a classifier as Bayes' rule"
    page = bk.report([speech, certificate], out / "report.html", title=title, pictures=pictures, seed=seed)
    return finding(page, out / "texts.png", comparisons, certificate)


def finding(
    page: Path, picture: Path, comparisons: Mapping[str, bk.Comparison], certificate: bk.Certificate
) -> Finding:
    """Return what was found, in sentences made of the numbers."""
    numbers, scores = {}, {}
    for name, comparison in comparisons.items():
        answers = weighted(comparison)
        for method, draws in answers.items():
            row = f"{name}, {method}"
            numbers[f"{row}, log evidence (nats)"] = float(draws.log_evidence[0])
            numbers[f"{row}, its standard error (nats)"] = float(draws.log_evidence_se[0])
            numbers[f"{row}, effective sample size"] = float(draws.ess[0])
            numbers[f"{row}, effective draws per 1000 tokens"] = per_thousand_tokens(draws)
            numbers[f"{row}, the same with training"] = per_thousand_tokens(draws, training=True)
        last = "SMC, twisted" if "SMC, twisted" in answers else "SMC"
        if {"prior IS", last} <= answers.keys():
            scores[name] = z_score(answers["prior IS"], answers[last])
    low, high = map(float, certificate.pooled.reverse_kl)
    differ = [name for name, z in scores.items() if abs(z) >= 2]
    doubt = (
        f" Two estimates of the log evidence differ by two standard errors for {' and '.join(differ)}."
        if differ
        else ""
    )
    speech, lipogram = (weighted(comparisons[name]) for name in ("speech", "no letter e"))
    spoken, twisted = np.exp(speech["prior IS"].log_evidence[0]), lipogram["SMC, twisted"]
    prior = lipogram.get("prior IS")  # not there if none of its draws fulfils the constraint
    filtered = 0.0 if prior is None else per_thousand_tokens(prior)
    worst = min(weighted(comparisons["cheerful * eight"]).items(), key=lambda item: item[1].ess[0])
    return Finding(
        report=page,
        picture=picture,
        better=f"Without the letter e, twisted SMC makes {per_thousand_tokens(twisted, training=True):.2f} effective draws "
        f"for a thousand tokens, its training included; drawing and filtering makes {filtered:.2f}. A classifier's "
        f"probability is a likelihood as it is: by this classifier {spoken:.0%} of the prior's completions are speech, and "
        f"the log evidences of importance sampling and SMC are {abs(scores['speech']):.1f} standard errors apart.",
        worse=f"Of the product of two rewards, {worst[0]} has an effective sample size of {worst[1].ess[0]:.0f}; below 100 "
        f"error bars are not to be trusted.{doubt} After its training the policy for speech is certified to be {low:.2f} to "
        f"{high:.2f} nats from the posterior. Where a constraint fails, SVI has no gradient to follow.",
        numbers={
            **numbers,
            **{f"{name}, z of prior IS against SMC": z for name, z in scores.items()},
            "speech, KL of the policy to the posterior, lower bound (nats)": low,
            "speech, KL of the policy to the posterior, upper bound (nats)": high,
        },
    )


def weighted(comparison: bk.Comparison) -> dict[str, bk.Draws]:
    """Return the answers that estimate the log evidence."""
    return {name: draws for name, (draws, *_) in comparison.draws.items() if np.isfinite(draws.log_evidence[0])}


def draw_evidence(comparisons: Mapping[str, bk.Comparison], file: Path) -> None:
    """Draw the log evidences of each posterior, a panel each."""
    with drawing(file, (7.0, 0.5 + 0.85 * len(comparisons))) as figure:
        axes = np.ravel(figure.subplots(len(comparisons), 1))
        for panel, (name, comparison) in zip(axes, comparisons.items(), strict=True):
            answers = weighted(comparison)
            for row, (method, draws) in enumerate(answers.items()):
                error = 2 * draws.log_evidence_se[0]
                panel.errorbar(draws.log_evidence[0], -row, xerr=error, fmt="o", markersize=4, color=COLOUR_OF[method])
            panel.set_yticks(-np.arange(len(answers)), list(answers))
            panel.set(ylim=(0.5 - len(answers), 0.5))
            panel.set_title(name, loc="left")
        axes[-1].set_xlabel("log evidence (nats)")


def draw_efficiency(comparisons: Mapping[str, bk.Comparison], file: Path) -> None:
    """Draw the effective draws per thousand tokens; a white line lies lower in the bar by what the training costs."""
    with drawing(file, (7.0, 3.2)) as figure:
        axes = figure.subplots()
        for number, (method, colour) in enumerate(COLOUR_OF.items()):
            there = [(i, weighted(c)[method]) for i, c in enumerate(comparisons.values()) if method in weighted(c)]
            places = [i + 0.2 * (number - 1.5) for i, _ in there]
            axes.bar(places, [per_thousand_tokens(draws) for _, draws in there], 0.18, color=colour, label=method)
            trained = [
                (place, draws) for place, (_, draws) in zip(places, there, strict=True) if draws.cost.training_tokens
            ]
            whole = [per_thousand_tokens(draws, training=True) for _, draws in trained]
            axes.plot([place for place, _ in trained], whole, "_", color="white", markersize=9, markeredgewidth=1.5)
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.005)
        axes.set_xticks(range(len(comparisons)), list(comparisons))
        axes.set(ylabel="effective draws\nper 1000 model tokens")
        axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def draw_texts(comparisons: Mapping[str, bk.Comparison], file: Path, seed: int) -> None:
    """Draw two completions of the prior, and two of the posterior of each reward, side by side."""
    first = next(iter(comparisons.values()))
    before = bk.ImportanceSampling(2 * len(comparisons)).run(first.posterior, seed=seed).texts()[0]
    with drawing(file, (8.0, 0.4 + 0.62 * len(comparisons))) as figure:
        axes = figure.subplots()
        axes.set(xlim=(0, 1), ylim=(0, len(comparisons) + 0.3))
        axes.axis("off")
        axes.text(0.14, len(comparisons), "before: the prior", weight="bold", fontsize=8.5)
        axes.text(0.58, len(comparisons), "after: the posterior", weight="bold", fontsize=8.5)
        for row, (name, comparison) in enumerate(comparisons.items()):
            answers = weighted(comparison)
            best = max(answers, key=lambda method: float(answers[method].ess[0]))
            after = answers[best].resample(2, seed=seed).texts()[0]
            top = len(comparisons) - row - 0.1
            axes.text(0.0, top, f"{name}\n({best})", va="top", fontsize=7.5)
            for left, texts in ((0.14, before[2 * row : 2 * row + 2]), (0.58, after)):
                lines = "\n".join(fill(f"… {PROMPT.split()[-1]}{text}", 62) for text in texts)
                axes.text(left, top, plain_text(lines), va="top", fontsize=7, family="serif")


if __name__ == "__main__":
    print(main(Path("bayes-klrl-gallery/generation")))
