"""Question answering: tuning on exact-match rewards, pass@1 and calibration on questions that were never tuned on.

The prior is a small transformer of our own (`shipped/questions`), whose corpus was often wrong, so that it is unsure. The
reward is 1 for the right answer, so the posterior is known exactly, with p = p0(right | question):

    p*(x | c) = p0(x | c) exp(1[x is right] / alpha) / Z(c),        log Z = log(1 + p (exp(1 / alpha) - 1))

It reads the answer, which no policy can do on a question that it was not tuned on: there it is an upper bound. A completion
is one word, so everything below is a sum over the vocabulary and has no sampling error. Three guides are tuned on the same
questions with the same steps: at two alphas, and on the reward alone (alpha = 0), as trainers do by default (`beta=0`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bayes_klrl as bk
from bayes_klrl.arrays import no_gradient, to_host
from bayes_klrl.export.plot_style import BLACK, COLOURS, drawing
from bayes_klrl.gallery.calibration import Score, draw_reliability, draw_scores, score
from bayes_klrl.gallery.data.questions import Question, all_questions, known_to, normalised, part_of
from bayes_klrl.gallery.finding import Finding
from bayes_klrl.gallery.glance import Glance
from bayes_klrl.typing import FloatArray

GLANCE = Glance(
    job="Answer questions that were not tuned on",
    today="RL on exact match, without a KL",
    adds="The KL as regularisation",
    verdict="no",
    measured="On new questions no tuning helps, and the KL only limits the damage. Before any tuning the calibration error is "
    "{prior, calibration_error:.2f} and pass@1 (the probability of a right answer) {prior, pass_1:.2f}; with the KL "
    "{SVI, alpha 0.5, calibration_error:.2f} and {SVI, alpha 0.5, pass_1:.2f}; without it "
    "{reward alone, calibration_error:.2f} and {reward alone, pass_1:.2f}.",
    claims=(
        ("reward alone, calibration_error", "SVI, alpha 0.5, calibration_error"),
        ("SVI, alpha 0.5, calibration_error", "prior, calibration_error"),
        ("prior, pass_1", "SVI, alpha 0.5, pass_1"),
        ("prior, pass_1", "reward alone, pass_1"),
    ),
    picture="Left: how often drawn answers are right, by their own probability, before and after tuning; calibrated "
    "answers lie on the diagonal. Right: the share of drawn answers with each probability. Reward alone: tuned without "
    "a KL.",
    setting="Model: a transformer of 284,544 parameters, made to be often wrong. Data: 546 questions with one-word "
    "answers to tune on, and 355 others: 249 sums of the calendar that were in no corpus, and 106 facts that the "
    "model's corpus had. pass@k is the probability that one of k drawn answers is right. The calibration error is the "
    "mean gap between an answer's probability and how often it is right.",
)

SHIPPED = Path(__file__).parents[1] / "shipped" / "questions"
ALPHAS = (0.5, 0.1)


def prior_lm() -> bk.TorchLM:
    """Return the shipped prior."""
    return bk.TorchLM.from_pretrained(SHIPPED)


def parts(prior: bk.TorchLM) -> dict[str, list[Question]]:
    """Return the questions that the prior's tokenizer has words for: "tuning", "heard" and "unheard", see `data.questions`."""
    found: dict[str, list[Question]] = {}
    tokenizer: Any = prior.tokenizer
    for question in known_to(all_questions(), tokenizer.get_vocab()):
        found.setdefault(part_of(question.text), []).append(question)
    return found


def exact_match(completions: Sequence[str], answer: Sequence[str]) -> list[float]:
    """Return 1 for each completion that is the answer after normalisation, and 0 for others."""
    return [float(normalised(c) == normalised(a)) for c, a in zip(completions, answer, strict=True)]


def problem(prior: bk.TorchLM, questions: Sequence[Question], alpha: float) -> bk.Posterior:
    """Return the posterior over answers, one word each."""
    reward = bk.Reward(exact_match, alpha=alpha, bounds=(0, 1), name="exact match")
    texts, answers = [q.text for q in questions], [q.answer for q in questions]
    return bk.Posterior(prior, reward, prompts=texts, max_new_tokens=1, answer=answers)


def reward_alone(batch: bk.LossInputs) -> torch.Tensor:
    """Return the REINFORCE loss of the reward with a leave-one-out baseline, and no KL."""
    return -batch.mean(batch.leave_one_out(batch.rewards) * batch.log_probs.sum(dim=1))


def answer_probs(lm: Any, posterior: bk.Posterior) -> FloatArray:
    """Return the probability of every word as the answer to every question, shape (P, V)."""
    with no_gradient():
        logs = to_host(lm.next_log_probs(lm.prefill(posterior.prompt_ids)))
    probs: FloatArray = np.exp(np.asarray(logs, dtype=np.float64))
    probs /= probs.sum(axis=1, keepdims=True)
    return probs


def right_answers(posterior: bk.Posterior) -> FloatArray:
    """Return 1 for every word that is the right answer to a question and 0 for others, shape (P, V)."""
    words = posterior.prior.decode([[i] for i in range(posterior.prior.vocab_size)])
    answers = [normalised(answer) for answer in posterior.columns["answer"]]
    return np.equal.outer(answers, [normalised(word) for word in words]).astype(float)


def exact_answers(prior: FloatArray, right: FloatArray, alpha: float) -> FloatArray:
    """Return the exact posterior's probability of every word, p0 exp(1[right] / alpha) / Z, shape (P, V)."""
    joint: FloatArray = prior * np.exp(right / alpha)
    joint /= joint.sum(axis=1, keepdims=True)
    return joint


def tuned(posterior: bk.Posterior, num_steps: int, seed: int) -> dict[str, Any]:
    """Return the three guides, tuned on the same questions with the same optimizer."""
    recipe = partial(bk.SVI, num_steps, 16, prompts_per_step=min(32, posterior.num_prompts), optimizer="adam")
    fits = {f"SVI, alpha {alpha:g}": recipe().fit(posterior.at_alpha(alpha), seed=seed) for alpha in ALPHAS}
    return {**fits, "reward alone": recipe(objective=reward_alone).fit(posterior, seed=seed)}


def judged(policies: dict[str, Any], posterior: bk.Posterior) -> dict[str, tuple[FloatArray, Score]]:
    """Return the answers and the score of the prior, the policies, and the exact posterior at each alpha."""
    prior, right = answer_probs(posterior.prior, posterior), right_answers(posterior)
    tables = {"prior": prior, **{name: answer_probs(lm, posterior) for name, lm in policies.items()}}
    tables |= {f"exact, alpha {alpha:g}": exact_answers(prior, right, alpha) for alpha in ALPHAS}
    return {name: (probs, score(probs, right, prior)) for name, probs in tables.items()}


def groups(split: dict[str, list[Question]]) -> dict[str, list[Question]]:
    """Return the questions that answers are judged on, by what prior and tuning have seen of them."""
    calendar = [q for q in split["unheard"] if q.topic == "calendar"]
    facts = [q for q in split["heard"] if q.topic != "calendar"]
    unknown = [q for q in split["unheard"] if q.topic != "calendar"]
    return {
        "sums never heard": calendar,
        "facts heard": facts,
        "facts never heard": unknown,
        "tuned on": split["tuning"],
    }


def main(out: Path, *, seed: int = 0, num_steps: int = 80, num_questions: int = 10_000) -> Finding:
    """Tune, judge on unseen questions, and write the report."""
    out.mkdir(parents=True, exist_ok=True)
    prior = prior_lm()
    asked = groups({name: found[:: -(-len(found) // num_questions)] for name, found in parts(prior).items()})
    fits = tuned(problem(prior, asked["tuned on"], ALPHAS[0]), num_steps, seed)
    guides = {name: fit.guide for name, fit in fits.items()}
    unseen = problem(prior, [*asked["sums never heard"], *asked["facts heard"]], ALPHAS[0])
    found = judged(guides, unseen)
    by_group = {name: judged(guides, problem(prior, questions, ALPHAS[0])) for name, questions in asked.items()}
    first = f"SVI, alpha {ALPHAS[0]:g}"
    methods: dict[str, Any] = {
        "exact": bk.Exact(),
        "prior IS": bk.ImportanceSampling(64),
        "best of 8": bk.BestOfN(8, 64),
        f"{first}, then IS": bk.ImportanceSampling(64, proposal=guides[first]),
    }
    comparison = bk.compare(unseen, methods, seed=seed)
    certificate = bk.certify(unseen, fits[first].guide, seed=seed, max_sequences=400_000)  # all are enumerated
    policies = {name: probs for name, (probs, _) in found.items() if not name.startswith("exact")}
    draw_scores({name: each for name, (_, each) in found.items()}, out / "scores.png")
    draw_reliability(policies, right_answers(unseen), out / "calibration.png")
    draw_pass_at_k(found, right_answers(unseen), out / "pass_at_k.png")
    draw_groups(by_group, out / "groups.png")
    pictures = {
        f"Scores on {unseen.num_prompts} questions that no guide was tuned on. Exact rows read the answer.": out
        / "scores.png",
        "How often drawn answers are right, by their own probability; calibrated answers lie on the diagonal.": out
        / "calibration.png",
        "The probability that one of k answers is right.": out / "pass_at_k.png",
        "pass@1 by what prior and tuning have seen of the questions.": out / "groups.png",
    }
    title = "Question answering: pass@1 and calibration on questions that were not tuned on"
    page = bk.report([comparison, certificate], out / "report.html", title=title, pictures=pictures, seed=seed)
    return finding(page, out / "calibration.png", found, by_group, float(certificate.pooled.reverse_kl[0]))


def finding(
    page: Path,
    picture: Path,
    found: dict[str, tuple[FloatArray, Score]],
    by_group: dict[str, dict[str, tuple[FloatArray, Score]]],
    distance: float,
) -> Finding:
    """Return what was found, in sentences made of the numbers."""
    scores = {name: each for name, (_, each) in found.items()}
    soft, sharp, alone = (scores[name] for name in (*(f"SVI, alpha {a:g}" for a in ALPHAS), "reward alone"))
    before, bound = scores["prior"], scores[f"exact, alpha {ALPHAS[0]:g}"]
    numbers = {
        f"{name}, {field.name}": getattr(each, field.name) for name, each in scores.items() for field in fields(each)
    }
    for group, judged_there in by_group.items():
        numbers |= {f"{name}, pass_1, {group}": each.pass_1 for name, (_, each) in judged_there.items()}
    learned = [numbers[f"{name}, alpha {ALPHAS[0]:g}, pass_1, tuned on"] for name in ("SVI", "exact")]
    never = max(numbers[f"{name}, pass_1, facts never heard"] for name in scores if not name.startswith("exact"))
    return Finding(
        report=page,
        picture=picture,
        better=f"On new questions the KL at alpha {ALPHAS[0]:g} limits what tuning does: calibration error "
        f"{soft.calibration_error:.2f}, log loss {soft.log_loss:.2f} and pass@8 {soft.pass_8:.2f}, against "
        f"{alone.calibration_error:.2f}, {alone.log_loss:.2f} and {alone.pass_8:.2f} after the same steps on the reward "
        f"alone. On the questions that it was tuned on, the guide has pass@1 {learned[0]:.3f}, and the exact posterior "
        f"{learned[1]:.3f}.",
        worse=f"On new questions pass@1 is {before.pass_1:.2f} for the prior, {soft.pass_1:.2f} and {sharp.pass_1:.2f} at "
        f"alpha {ALPHAS[0]:g} and {ALPHAS[1]:g}, {alone.pass_1:.2f} on the reward alone; the calibration error is "
        f"{before.calibration_error:.2f} for the prior and {sharp.calibration_error:.2f} at alpha {ALPHAS[1]:g}. The guide "
        f"is {distance:.2f} nats from the exact posterior, which reads the answers (pass@1 {bound.pass_1:.2f}). Facts that "
        f"were in no corpus stay unknown: pass@1 is {never:.0e} at most.",
        numbers={**numbers, "KL of the guide to the posterior on unseen questions (nats)": distance},
    )


def draw_pass_at_k(found: dict[str, tuple[FloatArray, Score]], right: FloatArray, file: Path) -> None:
    """Draw the probability that one of k draws is right."""
    k = np.unique(np.geomspace(1, 256, 25).astype(int))
    with drawing(file, (5.2, 3.4)) as figure:
        axes = figure.subplots()
        for colour, (name, (probs, _)) in zip((BLACK, *COLOURS), found.items(), strict=False):
            p = np.minimum((probs * right).sum(axis=1), 1.0)
            style = "--" if name.startswith("exact") else "-"
            axes.semilogx(k, (1 - (1 - p[:, None]) ** k).mean(axis=0), style, color=colour, label=name)
        axes.set(xlabel="k", ylabel="pass@k on unseen questions")
        axes.legend(frameon=False)


def draw_groups(by_group: dict[str, dict[str, tuple[FloatArray, Score]]], file: Path) -> None:
    """Draw pass@1 of each policy, by group of questions."""
    names = [name for name in by_group["tuned on"] if not name.startswith("exact")]
    with drawing(file, (6.4, 3.0)) as figure:
        axes = figure.subplots()
        for number, (colour, name) in enumerate(zip((BLACK, *COLOURS), names, strict=False)):
            heights = [scored[name][1].pass_1 for scored in by_group.values()]
            axes.bar(np.arange(len(heights)) + 0.2 * (number - 1.5), heights, 0.18, color=colour, label=name)
        axes.set_xticks(range(len(by_group)), list(by_group))
        axes.set(ylabel="pass@1")
        axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))


if __name__ == "__main__":
    print(main(Path("bayes-klrl-gallery/question_answering")))
