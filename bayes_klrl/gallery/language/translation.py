"""Translation: a policy tuned to chrF, against minimum Bayes risk, on verses that neither has seen.

The prior is a small encoder-decoder of our own, from the English of 1611 to that of today. The reward r(x, y) is the chrF of
a translation x against the reference y: an overlap of character n-grams, in points from 0 to 100. A policy is tuned on verses
with references, and has none at test. Then there is only the prior's own belief about y, and

    U(x | c) = E_{y ~ p0(. | c)} r(x, y),        p*(x | c) = p0(x | c) exp(U(x | c) / alpha) / Z(c)

is the posterior of the expected reward. Its most rewarded completion is the answer of minimum Bayes risk (MBR), the limit
alpha -> 0, and a policy that has learnt the reward on many verses approximates it without drawing at test. The true posterior
below, which the certificates are about, knows the reference: no policy without it can be at distance 0. Exact draws of it, by
rejection, can be had where the prior itself says the reference now and then; so the first certificate, of held-out verses at
random, may have no upper end, and the second is of verses that are easy in this sense.

At `ALPHA` the true posterior of training verses is 2.5 nats from the prior (`bk.frontier`, 256 draws for each of 16 verses; an
extrapolation, and so rather low). Best of 32 is at most log 32 - 31/32 = 2.5 nats from it, too: the policy is asked for about
what MBR spends on a verse, and no more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np

import bayes_klrl as bk
from bayes_klrl.export.plot_style import COLOURS, GREY, drawing
from bayes_klrl.gallery.data.verses import Verse, read_verses
from bayes_klrl.gallery.finding import Finding
from bayes_klrl.gallery.glance import Glance
from bayes_klrl.gallery.means import mean_and_se
from bayes_klrl.gallery.packages import need
from bayes_klrl.typing import FloatArray, IntArray

GLANCE = Glance(
    job="Translate verses of 1611",
    today="Beam search, minimum Bayes risk (MBR)",
    adds="A policy tuned to chrF, without references at test",
    verdict="partly",
    measured="With beam search the policy gains {policy, beam search minus prior, beam search, chrF per verse:.1f} ± "
    "{policy, beam search minus prior, beam search, se:.1f} points of chrF (the overlap of letters with the reference, "
    "0 to 100) over the prior, with MBR {policy, MBR of 32 minus prior, MBR of 32, chrF per verse:.1f} ± "
    "{policy, MBR of 32 minus prior, MBR of 32, se:.1f}. Single draws gain more, {policy, a draw, chrF:.1f} against "
    "{prior, a draw, chrF:.1f}, but copying the old verse has {no translation, chrF:.1f}.",
    claims=(
        ("policy, a draw minus prior, a draw, chrF per verse", 0.0, "policy, a draw minus prior, a draw, se"),
        (
            "policy, MBR of 32 minus prior, MBR of 32, chrF per verse",
            0.0,
            "policy, MBR of 32 minus prior, MBR of 32, se",
        ),
        ("no translation, chrF", "prior, a draw, chrF"),
        (1.0, "policy, beam search minus prior, beam search, chrF per verse"),
    ),
    picture="chrF of each method less that of the prior's greedy search, on held-out verses, with two standard errors "
    "to either side. No translation: the old verse is copied. Posterior of U: one of 32 draws, chosen at random by its "
    "expected chrF against the other draws. Reference known: the choice among the prior's draws reads the reference, "
    "which no translator has.",
    setting="Model: an encoder-decoder of 2.1 million parameters, trained on 17,900 verses. Data: 192 verses with "
    "references to tune the policy, 300 verses of other chapters to measure. chrF compares runs of 1 to 6 letters with "
    "the reference, from 0 to 100. MBR (minimum Bayes risk) takes the draw of 32 that is most like the others.",
)

SHIPPED = Path(__file__).parents[1] / "shipped" / "verses"
ALPHA, MAX_NEW_TOKENS, MOST_CHARACTERS = 2.0, 32, 90
ORDERS, RECALL_WEIGHT = 6, 2  # of chrF2: n-grams of 1 to 6 characters; recall counts twice as much as precision


@dataclass(frozen=True)
class Score:
    """chrF and BLEU of the corpus as sacrebleu has them, and the chrF of each verse (P,)."""

    chrf: float
    bleu: float
    by_verse: FloatArray


Scores = Mapping[str, Score]


@lru_cache(maxsize=1024)
def n_grams(text: str) -> tuple[Counter[str], ...]:
    """Return how often each n-gram of characters is in a text without its blanks, for n = 1, ..., 6."""
    letters = "".join(text.split())
    return tuple(Counter(letters[i : i + n] for i in range(len(letters) - n + 1)) for n in range(1, ORDERS + 1))


def chrf(text: str, reference: str) -> float:
    """Return chrF, 0 to 100: the F score of the precision and the recall of n-grams, each averaged over n."""
    precision, recall = [], []
    for found, wanted in zip(n_grams(text), n_grams(reference), strict=True):
        if found and wanted:
            matches = sum(min(count, wanted[gram]) for gram, count in found.items() if gram in wanted)
            precision.append(matches / found.total())
            recall.append(matches / wanted.total())
    if not sum(precision):
        return 0.0
    p, r, factor = float(np.mean(precision)), float(np.mean(recall)), RECALL_WEIGHT**2
    return 100 * (1 + factor) * p * r / (factor * p + r)


def against_reference(completions: Sequence[str], reference: Sequence[str]) -> list[float]:
    """Return the chrF of each completion: the reward."""
    return [chrf(text, wanted) for text, wanted in zip(completions, reference, strict=True)]


def expected_chrf(texts: Sequence[str]) -> FloatArray:
    """Return U (N,): the mean chrF of each text against all N, of which each may be the reference."""
    different = Counter(texts)
    utility = {x: sum(times * chrf(x, y) for y, times in different.items()) / len(texts) for x in different}
    return np.array([utility[x] for x in texts])


def problem(prior: bk.TorchLM, verses: Sequence[Verse], alpha: float = ALPHA) -> bk.Posterior:
    """Return the posterior over translations of verses whose references the reward reads."""
    reward = bk.Reward(against_reference, alpha=alpha, bounds=(0, 100), name="chrF")
    rows = [{"prompt": verse.old, "reference": verse.modern} for verse in verses]
    return bk.Posterior.from_rows(prior, reward, rows, max_new_tokens=MAX_NEW_TOKENS)


def some_verses(prior: bk.TorchLM, split: str, number: int, seed: int) -> list[Verse]:
    """Return verses of a part at random, all short enough that a translation fits into `MAX_NEW_TOKENS`."""
    short = [v for v in read_verses()[split] if len(v.old) <= MOST_CHARACTERS and len(v.modern) <= MOST_CHARACTERS]
    chosen = np.random.default_rng(seed).permutation(len(short))
    fits = [short[i] for i in chosen if len(prior.encode([short[i].modern])[0]) <= MAX_NEW_TOKENS]
    return fits[:number]


def searched(lm: bk.TorchLM, posterior: bk.Posterior, num_beams: int) -> list[str]:
    """Return the translation of each prompt by greedy search (one beam) or beam search, as `generate` does it."""
    import torch

    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in posterior.prompt_ids], batch_first=True)
    lengths = torch.tensor([len(ids) for ids in posterior.prompt_ids])
    mask = (torch.arange(rows.shape[1]) < lengths[:, None]).long()
    options: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "num_beams": num_beams, "do_sample": False}
    module: Any = lm.module
    ids = module.generate(input_ids=rows, attention_mask=mask, **options)
    return list(lm.decode(ids.tolist()))


def translations(lm: bk.TorchLM, posterior: bk.Posterior, draws: bk.Draws, seed: int) -> dict[str, list[list[str]]]:
    """Return what each method that reads no reference says: one or several lists of P translations each."""
    texts, number, rng = draws.texts(), draws.shape[1], np.random.default_rng(seed)
    utility = np.stack([expected_chrf(row) for row in texts])
    weights = np.exp((utility - utility.max(axis=1, keepdims=True)) / ALPHA)
    drawn = np.stack([rng.choice(number, size=4, p=row / row.sum()) for row in weights])
    return {
        "a draw": [_chosen(texts, np.full(len(texts), i)) for i in range(min(4, number))],
        f"most probable of {number}": [_chosen(texts, draws.log_proposal.argmax(axis=1))],
        "greedy": [searched(lm, posterior, 1)],
        "beam search": [searched(lm, posterior, 4)],
        "posterior of U": [_chosen(texts, column) for column in drawn.T],
        f"MBR of {number}": [_chosen(texts, utility.argmax(axis=1))],
    }


def with_reference(draws: bk.Draws, seed: int) -> dict[str, list[list[str]]]:
    """Return what somebody who knows the reference can choose from draws of the prior: no rival of the others."""
    true = draws.resample(4, seed=seed).texts()
    return {
        "reference known, posterior draw": [_chosen(true, np.full(len(true), i)) for i in range(4)],
        f"reference known, best of {draws.shape[1]}": [_chosen(draws.texts(), draws.reward.argmax(axis=1))],
    }


def _chosen(texts: Sequence[Sequence[str]], indices: IntArray) -> list[str]:
    """Return one text of each prompt, by its index."""
    return [row[int(i)] for row, i in zip(texts, indices, strict=True)]


def measured(said: list[list[str]], references: list[str]) -> Score:
    """Return how good translations are; of a method that says something else each time, the average over several."""
    import sacrebleu

    return Score(
        chrf=float(np.mean([sacrebleu.corpus_chrf(texts, [references]).score for texts in said])),
        bleu=float(np.mean([sacrebleu.corpus_bleu(texts, [references]).score for texts in said])),
        by_verse=np.mean([against_reference(texts, references) for texts in said], axis=0),
    )


def main(
    out: Path,
    *,
    seed: int = 0,
    num_tuned: int = 192,
    num_steps: int = 100,
    num_held_out: int = 300,
    num_draws: int = 32,
    num_certified: int = 3,
    size: int = 512,
    folder: Path = SHIPPED,
) -> Finding:
    """Tune, translate verses of chapters that nobody was trained on, measure, and write the report."""
    need("sacrebleu")
    prior = bk.TorchLM.from_pretrained(folder)
    tuned_on = problem(prior, some_verses(prior, "train", num_tuned, seed))
    verses = some_verses(prior, "test", num_held_out, seed)
    held_out, references = problem(prior, verses), [verse.modern for verse in verses]
    fit = bk.SVI(num_steps, 8, prompts_per_step=min(8, num_tuned)).fit(tuned_on, seed=seed)
    lms = {"prior": prior, "policy": cast("bk.TorchLM", fit.guide)}
    said = {"no translation": [[verse.old for verse in verses]]}
    draws = {who: bk.ImportanceSampling(num_draws, lm).run(held_out, seed=seed) for who, lm in lms.items()}
    for who, lm in lms.items():
        found = translations(lm, held_out, draws[who], seed)
        said |= {f"{who}, {method}": texts for method, texts in found.items()}
    said |= with_reference(draws["prior"], seed)
    scores = {method: measured(texts, references) for method, texts in said.items()}
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "chrf.png"
    draw_scores(scores, picture)
    known = np.flatnonzero((draws["prior"].reward > 99.9).any(axis=1))[:num_certified]
    shown = held_out.select(range(num_certified))
    rows: dict[str, Any] = {
        "prior IS": bk.ImportanceSampling(size),
        "SMC": bk.SMC(size // 4),
        f"best of {num_draws}": bk.BestOfN(num_draws, num_draws=size // 32),
        "policy, then IS": bk.ImportanceSampling(size, proposal=fit.guide),
    }
    comparison = bk.compare(shown, rows, seed=seed)
    certificates = [
        bk.certify(some, fit.guide, seed=seed, num_draws=size // 2, num_particles=size // 16, max_proposals=8 * size)
        for some in (shown, *([held_out.select(known)] if len(known) else []))
    ]
    words = f"{GLANCE.picture} Means over {len(verses)} verses."
    title = "Translation: a policy tuned to chrF, and minimum Bayes risk"
    page = bk.report(
        [comparison, *certificates, fit], out / "report.html", title=title, pictures={words: picture}, seed=seed
    )
    better, worse, gaps = told(scores, num_draws, len(verses))
    few = held_out.select(range(max(1, min(len(verses), 512 // num_draws))))  # all draws of a verse are one block
    per_verse = bk.ImportanceSampling(num_draws).run(few, seed=seed).model_tokens / few.num_prompts
    tuning = fit.training.training_tokens
    worse += (
        f" Tuning took {tuning:,} tokens, each with a backward pass; MBR of {num_draws} takes {per_verse:.0f} tokens a "
        f"verse, so that it could translate {tuning / per_verse:,.0f} verses with as many."
    )
    numbers = {f"{method}, chrF": score.chrf for method, score in scores.items()}
    numbers |= {f"{method}, BLEU": score.bleu for method, score in scores.items()}
    for which, certificate in zip(("verses at random", "easy verses"), certificates, strict=False):
        ends = zip(("at least", "at most"), certificate.reverse_kl.mean(axis=0), strict=True)
        numbers |= {f"KL to the true posterior, {which}, {end} (nats)": kl for end, kl in ends if np.isfinite(kl)}
    numbers |= gaps | {"tuning (tokens)": tuning, "MBR (tokens per verse)": per_verse}
    return Finding(report=page, picture=picture, better=better, worse=worse, numbers=numbers)


def told(scores: Scores, num_draws: int, num_verses: int) -> tuple[str, str, dict[str, float]]:
    """Return where inference beat search and where it did not, in sentences, and the differences that they are made of."""
    today = max(("prior, greedy", "prior, beam search"), key=lambda method: scores[method].by_verse.mean())
    mbr = f"MBR of {num_draws}"
    pairs = [(f"policy, {method}", f"prior, {method}") for method in ("a draw", "greedy", "beam search", mbr)]
    pairs += [("policy, greedy", f"prior, {mbr}"), ("policy, greedy", today), ("policy, a draw", f"prior, {mbr}")]
    unsaid = {(f"policy, {mbr}", today), (f"prior, {mbr}", today), ("policy, greedy", f"prior, {mbr}")}
    copied = "no translation"
    unsaid |= {(f"{who}, {method}", copied) for who in ("prior", "policy") for method in ("a draw", "beam search")}
    numbers: dict[str, float] = {}
    won: list[str] = []
    lost: list[str] = []
    even: list[str] = []
    for first, second in dict.fromkeys([*pairs, *sorted(unsaid)]):
        mean, error = mean_and_se(scores[first].by_verse - scores[second].by_verse)
        numbers |= {f"{first} minus {second}, chrF per verse": mean, f"{first} minus {second}, se": error}
        if (first, second) in unsaid:
            continue
        found = won if mean > 2 * error else lost if mean < -2 * error else even
        (who, method), (other, its) = first.split(", "), second.split(", ")
        against = "" if method == its else f" against the {other}'s {its}"
        found.append(f"{method if method == its else f'{who} {method}'} {mean:+.1f} ± {error:.1f}{against}")

    def over_copying(method: str) -> str:
        which = f"{method} minus {copied}"
        return f"{numbers[f'{which}, chrF per verse']:+.1f} ± {numbers[f'{which}, se']:.1f}"

    return (
        f"In points of chrF per verse, over {num_verses} held-out verses, the tuned policy less the prior: "
        f"{', '.join(won) or 'nothing was clearly better'}.",
        f"In the same points: {', '.join(lost) or 'nothing was clearly worse'}. Within two standard errors: "
        f"{', '.join(even) or 'nothing'}. Against copying the old verse: the prior's draw "
        f"{over_copying('prior, a draw')}, the policy's {over_copying('policy, a draw')}, beam search "
        f"{over_copying('prior, beam search')} and {over_copying('policy, beam search')}.",
        numbers,
    )


def draw_scores(scores: Scores, file: Path) -> None:
    """Draw each method's chrF per verse less that of the prior's greedy search, with two standard errors to either side."""
    kinds = list(dict.fromkeys(method.split(",")[0] for method in scores))
    with drawing(file, (6.4, 0.27 * len(scores) + 0.8)) as figure:
        axes = figure.subplots()
        axes.axvline(0, color=GREY, linewidth=1)
        for place, (method, score) in enumerate(scores.items()):
            gaps = score.by_verse - scores["prior, greedy"].by_verse
            error = gaps.std(ddof=1) / len(gaps) ** 0.5
            colour = COLOURS[kinds.index(method.split(",")[0])]
            axes.errorbar(gaps.mean(), -place, xerr=2 * error, fmt="o", color=colour)
        axes.set_yticks(-np.arange(len(scores)), list(scores))
        axes.set_xlabel("chrF against greedy search with the prior (points)")


if __name__ == "__main__":
    print(main(Path("bayes-klrl-gallery/translation")))
