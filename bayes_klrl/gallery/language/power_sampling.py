"""Power sampling: p0(x)^4 on small sums, which decoding at temperature 1/4 does not draw from.

SmolLM2-135M-Instruct is asked what 3 + 8 is. The posterior of `bk.Power(a)` is p0(x)^a as a whole; no reward knows the sums:

    p*(x) proportional to p0(x)^a
    local temperature: q(x) = prod_t p0(x_t | x_<t)^a / Z_t(x_<t),    Z_t(x_<t) = sum_v p0(v | x_<t)^a

so p0^a(x) / q(x) = prod_t Z_t(x_<t): q likes first words that are probable one by one, whatever may follow. These ratios are
the weights of SMC with the proposal q and the twist p0(x_1:t)^(a - 1) c_t (Karan and Du 2025; docs/theory.md 1.14).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import bayes_klrl as bk
from bayes_klrl.arrays import no_gradient, to_host
from bayes_klrl.export.plot_style import COLOURS, GREY, drawing
from bayes_klrl.gallery.finding import Finding
from bayes_klrl.gallery.glance import Glance
from bayes_klrl.gallery.means import mean_and_se
from bayes_klrl.inference.policies import PolicyDraws
from bayes_klrl.typing import FloatArray

GLANCE = Glance(
    job="Sharpen a model without a reward: sums",
    today="A low temperature, majority votes, the likeliest of several",
    adds="SMC for the power of whole completions",
    verdict="yes",
    measured="{SMC, p0^4, right:.0%} of the sums are right by SMC with {answers per sum:.0f} particles, "
    "{likeliest of local temperature's, right:.0%} by the likeliest of {answers per sum:.0f} answers at temperature "
    "1/4, {likeliest at SMC's tokens, right:.0%} by that of {answers for SMC's tokens:.0f} (as many tokens as SMC "
    "takes), {greedy, right:.0%} by greedy decoding. One reason: {SMC, answers cut:.0%} of SMC's answers are cut, "
    "{local temperature, answers cut:.0%} at temperature 1/4.",
    claims=(
        ("SMC, p0^4, right", "likeliest of local temperature's, right"),
        ("SMC, p0^4, right", "likeliest at SMC's tokens, right"),
        ("SMC, p0^4, right", "greedy, right"),
        ("SMC, p0^4, right", "majority of the prior's, right"),
        ("local temperature, answers cut", "SMC, answers cut"),
    ),
    picture="Left: right answers by method, with standard errors. Right: how far temperature 1/4 is from p0^4 on each "
    "question, estimated as log Z by SMC minus the ELBO; lines are the ELBO's standard errors. A KL cannot be below 0: "
    "a bar that is shows the error of its estimate.",
    setting="Model: SmolLM2-135M-Instruct, 135 million parameters. Data: 40 sums of two numbers from 2 to 9; of each "
    "question 8 answers of at most 10 tokens. p0^4 is the model's probability of a whole answer to the fourth power, "
    "normalised. Local temperature means each next-token distribution to the fourth power: decoding at temperature "
    "1/4. The likeliest answer is the one of largest p0; at SMC's tokens it is of more answers, as many as take the "
    "tokens of SMC.",
)

EXPONENT, TOKENS = 4.0, 10
SHOTS = "Q: 3 + 4?\nA: 3 + 4 = 7\nQ: 8 + 7?\nA: 8 + 7 = 15\n"  # of the certified prompts
OURS = "SMC, p0^4"

Sum = tuple[int, int]


def problems(num: int) -> list[Sum]:
    """Return sums of two numbers from 2 to 9, all different; the same ones at every seed of the example."""
    pairs = [(a, b) for a in range(2, 10) for b in range(2, 10)]
    return [pairs[index] for index in np.random.default_rng(2025).permutation(len(pairs))[:num]]


def asked(prior: bk.TorchLM, pairs: Sequence[Sum]) -> bk.Posterior:
    """Return the power posterior of the questions; a model without a chat template is asked in plain text."""
    questions: list[Any] = [f"What is {a} + {b}?" for a, b in pairs]
    if getattr(prior.tokenizer, "chat_template", None):
        questions = [[{"role": "user", "content": question}] for question in questions]
    return bk.Posterior(prior, bk.Power(EXPONENT), prompts=questions, max_new_tokens=TOKENS)


def shown(prior: bk.TorchLM, pairs: Sequence[Sum]) -> bk.Posterior:
    """Return the power posterior after two worked sums, where an answer is one line."""
    line = bk.TorchLM(prior.module, prior.tokenizer, eos_token_id=prior.encode(["\n"])[0][-1], check=False)
    prompts = [f"{SHOTS}Q: {a} + {b}?\nA:" for a, b in pairs]
    return bk.Posterior(line, bk.Power(EXPONENT), prompts=prompts, max_new_tokens=TOKENS)


def colder(prior: Any) -> bk.TorchLM:
    """Return local temperature: each next-token distribution to the power, normalised; it samples and scores so."""
    return bk.TorchLM(
        prior.module,
        prior.tokenizer,
        eos_token_id=prior.eos_token_ids,
        temperature=prior.temperature / EXPONENT,
        check=False,
    )


def greedy(posterior: bk.Posterior) -> list[list[int]]:
    """Return the most probable next token again and again, for each prompt, without EOS."""
    prior, found = posterior.prior, np.empty((posterior.num_prompts, 0), dtype=np.int64)
    with no_gradient():
        state = prior.prefill(posterior.prompt_ids)
        for _ in range(posterior.max_new_tokens):
            token = to_host(prior.next_log_probs(state)).argmax(axis=1)
            found, state = np.concatenate([found, token[:, None]], axis=1), prior.append(state, token)
    ended = np.cumsum(np.isin(found, list(prior.eos_token_ids)), axis=1) > 0
    return [row[~end].tolist() for row, end in zip(found, ended, strict=True)]


def answer_in(text: str) -> str:
    """Return the last number of a completion, empty if there is none."""
    return str(["", *re.findall(r"\d+", text)][-1])


def right(texts: Sequence[Sequence[str]], pairs: Sequence[Sum]) -> FloatArray:
    """Return 1 for each completion whose last number is the sum, shape (P, N)."""
    rows = zip(texts, pairs, strict=True)
    return np.array([[float(answer_in(text) == str(a + b)) for text in row] for row, (a, b) in rows])


def accuracies(
    comparison: bk.Comparison, matched: bk.Draws, best: Sequence[str], pairs: Sequence[Sum]
) -> dict[str, FloatArray]:
    """Return the probability of the right answer by method, (P,) each.

    `matched` are answers by local temperature for the tokens that SMC takes, and `best` the texts of greedy decoding.
    """
    prior, local, smc = (comparison[name] for name in ("prior IS", "local temperature", "SMC"))
    texts = prior.texts()
    votes = [Counter(filter(None, map(answer_in, row))).most_common(1) or [("", 0)] for row in texts]
    likeliest, coldest, more = (
        [[row[n]] for row, n in zip(draws.texts(), draws.log_prior.argmax(axis=1), strict=True)]
        for draws in (prior, local, matched)
    )
    return {
        "prior": right(texts, pairs).mean(axis=1),
        "majority of the prior's": right([[vote[0][0]] for vote in votes], pairs)[:, 0],
        "likeliest of the prior's": right(likeliest, pairs)[:, 0],
        "greedy": right([[text] for text in best], pairs)[:, 0],
        "local temperature": right(local.texts(), pairs).mean(axis=1),
        "likeliest of local temperature's": right(coldest, pairs)[:, 0],
        "likeliest at SMC's tokens": right(more, pairs)[:, 0],
        OURS: (smc.weights * right(smc.texts(), pairs)).sum(axis=1),
    }


def cut_off(draws: bk.Draws) -> float:
    """Return the share of answers, by weight, that were cut at the largest number of tokens."""
    return float((draws.weights * ~draws.finished).sum(axis=1).mean())


def sentences(
    scores: dict[str, FloatArray],
    gap: tuple[float, float],
    bounds: tuple[float, float],
    cut: dict[str, float],
    ended: float,
    tokens: dict[str, float],
) -> tuple[str, str]:
    """Return where SMC beat what people do, and where it did not: paired differences of more than two standard errors."""
    ahead: list[str] = []
    rest: list[str] = []
    for name in [name for name in scores if name != OURS]:
        gain, error = mean_and_se(scores[OURS] - scores[name])
        told = f"{name} ({100 * gain:+.0f} ± {100 * error:.0f})"
        (ahead if gain > 2 * error else rest).append(told)
    mean, error = mean_and_se(scores[OURS])
    better = (
        f"SMC for p0^{EXPONENT:g} is right on {100 * mean:.0f} ± {100 * error:.0f} % of the sums; in percentage points, more "
        f"than {', '.join(ahead) or 'no other method'}."
        f"{'' if rest else ' It is ahead of all by two standard errors.'}"
    )
    low, high = max(0.0, bounds[0]), bounds[1]
    span = f"between {low:.2f} and {high:.2f}" if np.isfinite(high) else f"at least {low:.2f}"
    shares = " and ".join(f"{100 * share:.0f} % of {name}'s answers" for name, share in cut.items())
    behind = f"It is not ahead of {', '.join(rest)} by two standard errors. " if rest else ""
    worse = (
        f"{behind}Part of it is that p0^{EXPONENT:g} prefers what ends early: {shares} are cut at {TOKENS} tokens. Of the "
        f"answers by local temperature that end, {100 * ended:.0f} % are right. SMC takes {tokens['SMC']:.0f} tokens a sum "
        f"with its pilot draws, local temperature {tokens['local temperature']:.0f}. Temperature 1/{EXPONENT:g} is "
        f"{gap[0]:.1f} ± {gap[1]:.1f} nats from p0^{EXPONENT:g} by estimate. After two worked sums it is {span} nats from "
        f"p0^{EXPONENT:g} (certified){': there SMC has little to correct' if high < 0.5 else ''}."
    )
    return better, worse


def main(
    out: Path,
    *,
    seed: int = 0,
    prior: bk.TorchLM | None = None,
    num_problems: int = 40,
    num_draws: int = 8,
    certified: int = 2,
    num_runs: int = 12,
    max_proposals: int = 1000,
) -> Finding:
    """Draw, count right answers, bound the local temperature's distance to the power posterior, and write the report."""
    lm, pairs = prior or bk.TorchLM.from_pretrained("smollm2"), problems(num_problems)
    posterior, cold = asked(lm, pairs), colder(lm)
    twist = bk.Power(EXPONENT).twist(num_pilot=num_draws, proposal=cold)
    rows: dict[str, Any] = {
        "prior IS": bk.ImportanceSampling(num_draws),
        "local temperature": PolicyDraws(cold, num_draws),
        "SMC": bk.SMC(num_draws, proposal=cold, twist=twist),
    }
    comparison = bk.compare(posterior, rows, seed=seed)
    local = comparison["local temperature"]
    costs = {name: draws[0].cost for name, draws in comparison.draws.items()}
    tokens = {name: (cost.model_tokens + cost.training_tokens) / len(pairs) for name, cost in costs.items()}
    as_many = max(1, round(num_draws * tokens["SMC"] / tokens["local temperature"]))
    matched = PolicyDraws(cold, as_many).run(posterior, seed=seed + 1)
    scores = accuracies(comparison, matched, lm.decode(greedy(posterior)), pairs)
    log_ratio = local.log_prior + local.log_likelihood - local.log_proposal
    gaps = comparison["SMC"].log_evidence - log_ratio.mean(axis=1)
    few = shown(lm, pairs[:certified])
    certificate = bk.certify(
        few, colder(few.prior), seed=seed, num_draws=64, num_particles=4, num_runs=num_runs, max_proposals=max_proposals
    )
    out.mkdir(parents=True, exist_ok=True)
    draw(scores, gaps, log_ratio.std(axis=1, ddof=1) / np.sqrt(num_draws), out / "accuracy.png")
    low, high = (float(end) for end in certificate.pooled.reverse_kl)
    cut = {name: cut_off(draws[0]) for name, draws in comparison.draws.items() if name != "prior IS"}
    ended = float(right(local.texts(), pairs)[local.finished].mean()) if local.finished.any() else 0.0
    better, worse = sentences(scores, mean_and_se(gaps), (low, high), cut, ended, tokens)
    page = bk.report(
        [comparison, certificate],
        out / "report.html",
        title="Power sampling: the prior to the fourth power, on small sums",
        pictures={
            f"{GLANCE.picture} The certificate below is of other prompts, the question after two worked sums.": out
            / "accuracy.png"
        },
        seed=seed,
        posterior=posterior,
    )
    numbers = {f"{name}, right": mean_and_se(values)[0] for name, values in scores.items()}
    numbers |= {f"{name}, standard error": mean_and_se(values)[1] for name, values in scores.items()}
    numbers |= {"sums": float(num_problems), "local temperature, KL to p0^4 (nats)": float(gaps.mean())}
    numbers |= {"after two worked sums, KL low (nats)": low, "after two worked sums, KL high (nats)": high}
    numbers |= {f"{name}, answers cut": share for name, share in cut.items()} | {"local, right if it ended": ended}
    numbers |= {f"{name}, tokens per sum": each for name, each in tokens.items()} | {
        "answers per sum": float(num_draws)
    }
    numbers["answers for SMC's tokens"] = float(as_many)
    return Finding(page, out / "accuracy.png", better, worse, numbers)


def draw(scores: dict[str, FloatArray], gaps: FloatArray, errors: FloatArray, file: Path) -> None:
    """Draw the right answers by method, and how far local temperature is from the power posterior on each question."""
    with drawing(file, (8.4, 3.2)) as figure:
        left, other = figure.subplots(1, 2, width_ratios=(3, 2))
        for row, (name, values) in enumerate(reversed(scores.items())):
            mean, error = mean_and_se(values)
            left.barh(row, mean, xerr=error, color=COLOURS[0] if name == OURS else COLOURS[5])
        left.set(yticks=range(len(scores)), yticklabels=[*reversed(scores)], xlim=(0, 1))
        left.set(xlabel="probability of the right answer")
        order = np.argsort(gaps)
        other.bar(range(len(gaps)), gaps[order], yerr=errors[order], color=COLOURS[1], ecolor=GREY)
        other.axhline(0, color=GREY, linewidth=0.8)
        other.set(xlabel="questions, in order", ylabel="KL to p0^4, estimate (nats)")


if __name__ == "__main__":
    print(main(Path("bayes-klrl-gallery/power_sampling")))
