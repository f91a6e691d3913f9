"""Explain: which tokens the posterior moved, in nats that add up.

The log-ratio of posterior to prior is a sum over tokens, by the chain rule:

    sum_t log p*(x_t | x_<t) / p0(x_t | x_<t)  =  log p*(x) / p0(x)  =  r(x) / alpha - log Z

So the colour of a token is a number with a meaning: by how much its reward and what it makes likely change the odds of having
been written. Where the posterior is solved by backward messages (a trigram model of the prior's own texts, a reward that is a
sum over tokens) the colours are exact. On the shipped model they are those of a guide tuned by SVI, and what a completion's
colours lack, sum_t log q / p0 - (r / alpha - log Z) = log q(x) / p*(x), is the integrand of the certificate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.patches import Rectangle

import bayes_klrl as bk
from bayes_klrl.analysis.report.samples import pieces_of
from bayes_klrl.arrays import to_host
from bayes_klrl.export.plot_style import COLOURS, GREY, drawing
from bayes_klrl.gallery.finding import Finding
from bayes_klrl.gallery.glance import Glance
from bayes_klrl.inference.exact.messages import backward_messages
from bayes_klrl.models.rewards import sentiment
from bayes_klrl.prompts.words import visible
from bayes_klrl.typing import FloatArray, LanguageModel

GLANCE = Glance(
    job="See what tuning changed",
    today="Attention maps, or a map of the reward",
    adds="Log-ratios per token, which add up to that of the completion",
    verdict="partly",
    measured="{share of nats on tokens without a reward of their own:.0%} of what the posterior moved is on tokens that a map "
    "of the reward leaves blank. Exact posteriors add up to {largest error of the exact sum (nats):.0e} nats; a guide's "
    "colours miss {guide's mean |log q/p*| over its draws (nats):.1f} nats a completion.",
    claims=(
        ("share of nats on tokens without a reward of their own", 0.1),
        (1e-6, "largest error of the exact sum (nats)"),
        ("guide's mean |log q/p*| over its draws (nats)", 1.0),
    ),
    picture="Draws of an exact posterior: blue tokens are more probable in it than in the prior, orange ones less. The "
    "numbers of a completion's tokens sum to its log-ratio of posterior to prior.",
    setting="Model: the shipped transformer of Jane Austen's novels, 2.1 million parameters, and a trigram model of "
    "3,000 of its completions, for which the posterior is exact. Data: one prompt, 1,000 completions of at most 24 "
    "tokens. A guide is the policy that SVI tuned, q; p* is the posterior.",
)

PROMPT, MAX_NEW_TOKENS = "It was a fine morning", 24
STRONG, COLUMNS = 3.0, 96  # nats of the full colour; characters per line of the pictures


def demo_posterior(prior: LanguageModel, max_new_tokens: int = MAX_NEW_TOKENS) -> bk.Posterior:
    """Return the posterior of the command line's demo: the sentiment of the whole completion, which no automaton computes."""
    reward = bk.Reward(sentiment, alpha=0.1, bounds=(-1, 1))
    return bk.Posterior(prior, reward, prompts=PROMPT, max_new_tokens=max_new_tokens)


def solved_posterior(posterior: bk.Posterior, num_draws: int, seed: int) -> bk.Posterior:
    """Return a like problem that messages solve: a trigram model of the prior's draws, and the sum of tokens' sentiments."""
    prior = posterior.prior
    sequences = bk.ImportanceSampling(num_draws).run(posterior, seed=seed).sequences
    rows = [[*posterior.prompt_ids[0][-2:], *ids] for ids in sequences.lists()]
    eos, size = prior.eos_token_ids, prior.vocab_size
    trigrams = bk.NgramLM.fit(rows, order=3, tokenizer=prior.tokenizer, eos_token_id=eos, vocab_size=size)
    one_state = bk.Automaton(np.zeros((1, size), dtype=int))
    reward = bk.AutomatonReward(one_state, token_rewards=token_sentiments(prior), alpha=0.4)
    return bk.Posterior(trigrams, reward, prompts=PROMPT, max_new_tokens=posterior.max_new_tokens)


def token_sentiments(prior: LanguageModel) -> FloatArray:
    """Return the sentiment of each token that begins a word, (V,), mostly 0; the lexicon has "ly" as an abbreviation."""
    texts = prior.decode([[token] for token in range(prior.vocab_size)])
    return np.array(sentiment([text if text.startswith(" ") else "" for text in texts]))


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a policy changed in N completions, token by token.

    Parameters
    ----------
    sequences
        The completions, (1, N, T).
    pieces
        The text of each token of each completion.
    ratios
        log q(x_t | x_<t) - log p0(x_t | x_<t), (N, T), 0 past a completion's length.
    kl
        KL(q || p0) of the next token after each prefix, (N, T), 0 past a completion's length.
    moved
        For each token, the sum over prefixes of q(a | x_<t) - p0(a | x_<t), mean over completions, (V,): how many more of it
        there are.
    gains
        r(x) / alpha, (N,).
    """

    sequences: bk.Sequences
    pieces: Sequence[Sequence[str]]
    ratios: FloatArray
    kl: FloatArray
    moved: FloatArray
    gains: FloatArray

    def missing(self, log_evidence: float) -> FloatArray:
        """Return sum_t log q / p0 - (r / alpha - log Z) = log q(x) / p*(x) of each completion, (N,); 0 for the posterior."""
        excess: FloatArray = self.ratios.sum(axis=1) - (self.gains - log_evidence)
        return excess


def explained(posterior: bk.Posterior, policy: LanguageModel, sequences: bk.Sequences) -> Explanation:
    """Walk along completions of the first prompt with policy and prior in step."""
    tokens, lengths = sequences.tokens[0], sequences.lengths[0]
    models = (policy, posterior.prior)
    states = [lm.select(lm.prefill(posterior.prompt_ids[:1]), np.zeros(len(tokens), dtype=int)) for lm in models]
    ratios, kl, moved = np.zeros(tokens.shape), np.zeros(tokens.shape), np.zeros(policy.vocab_size)
    for t in range(int(lengths.max())):
        inside = t < lengths
        log_q, log_p = (
            np.asarray(to_host(lm.next_log_probs(state)), dtype=np.float64)
            for lm, state in zip(models, states, strict=True)
        )
        change = np.where(np.isneginf(log_q), 0.0, log_q - log_p)
        ratios[inside, t] = change[inside, tokens[inside, t]]
        kl[inside, t] = (np.exp(log_q) * change).sum(axis=1)[inside]
        moved += (np.exp(log_q) - np.exp(log_p))[inside].sum(axis=0) / len(tokens)
        if t + 1 < tokens.shape[1]:
            states = [lm.append(state, tokens[:, t]) for lm, state in zip(models, states, strict=True)]
    pieces = [pieces_of(posterior, 0, ids) for ids in sequences.lists()]
    return Explanation(sequences, pieces, ratios, kl, moved, posterior.log_likelihood(sequences)[0])


def main(
    out: Path,
    *,
    seed: int = 0,
    num_steps: int = 120,
    num_draws: int = 1000,
    num_texts: int = 3000,
    max_new_tokens: int = MAX_NEW_TOKENS,
    num_runs: int = 24,
) -> Finding:
    """Colour both problems, and measure what the guide's colours lack."""
    posterior = demo_posterior(bk.TorchLM.from_pretrained("austen"), max_new_tokens)
    small = solved_posterior(posterior, num_texts, seed)
    solved = backward_messages(small)
    exact = explained(small, solved.policy(), solved.draw(num_draws, seed))
    error = float(np.abs(exact.missing(solved.log_evidence[0])).max())

    svi = bk.SVI(num_steps)
    corrected = bk.ImportanceSampling(num_draws, proposal=svi)
    rows: dict[str, Any] = {"prior IS": bk.ImportanceSampling(num_draws), "SVI": svi, "SVI, then IS": corrected}
    comparison = bk.compare(posterior, rows, seed=seed)
    guide, weighted = comparison["SVI"].guide, comparison["SVI, then IS"]
    assert guide is not None
    certificate = bk.certify(posterior, guide, seed=seed, num_draws=num_draws, num_runs=num_runs)
    log_evidence, its_error = float(weighted.log_evidence[0]), float(weighted.log_evidence_se[0])
    of_guide = explained(posterior, guide, comparison["SVI"].sequences)
    of_posterior = explained(posterior, guide, weighted.resample(num_draws, seed=seed).sequences)
    left, kept = of_guide.missing(log_evidence), of_posterior.missing(log_evidence)
    silent = share_of_silent(exact, token_sentiments(posterior.prior))

    out.mkdir(parents=True, exist_ok=True)
    draw_texts(exact, solved.log_evidence[0], out / "exact.png")
    draw_texts(of_posterior, log_evidence, out / "guide.png")
    draw_positions({"exact, trigram model": exact, "guide, shipped model": of_guide}, out / "positions.png")
    draw_moved({"exact, trigram model": exact, "guide, shipped model": of_guide}, posterior.prior, out / "moved.png")
    page = bk.report(
        [comparison, certificate],
        out / "report.html",
        title="Explain: which tokens the posterior moved",
        pictures={
            "Solved by messages. Blue tokens are more probable in the posterior than in the prior, orange ones less, in full "
            f"colour from {STRONG:g} nats on. The numbers of a completion sum to its log-ratio.": out / "exact.png",
            "The shipped model: draws of the posterior (SVI, then IS), coloured by the guide. What is missing to the "
            "posterior's log-ratio is log q/p*.": out / "guide.png",
            "Where along the completion the KL to the prior is spent.": out / "positions.png",
            "The ten tokens most raised and lowered: how many more of them there are in a completion.": out
            / "moved.png",
        },
        seed=seed,
    )
    return Finding(
        report=page,
        picture=out / "exact.png",
        better=f"{silent:.0%} of all nats moved stand on tokens whose own reward is 0, which a map of the reward leaves "
        f"blank. The colours are nats that add up, and attention maps have no unit: over {num_draws:,} exact draws the sum "
        f"misses r/alpha - log Z by at most {error:.0e} nats.",
        worse="On the shipped model the colours are the guide's: for its own draws they miss the posterior's log-ratio by "
        f"{np.abs(left).mean():.2f} nats on average, for draws of the posterior by {np.abs(kept).mean():.2f} (log Z "
        f"{log_evidence:.2f} ± {its_error:.2f}), where that log-ratio is {(of_posterior.gains - log_evidence).mean():.2f} "
        "on average.",
        numbers={
            "largest error of the exact sum (nats)": error,
            "exact KL to the prior (nats)": float(solved.moments().kl[0]),
            "share of nats on tokens without a reward of their own": silent,
            "guide's mean log q/p* over its draws, its KL to the posterior (nats)": float(left.mean()),
            "guide's mean |log q/p*| over its draws (nats)": float(np.abs(left).mean()),
            "guide's mean log p*/q over draws of the posterior (nats)": float(-kept.mean()),
            "guide's mean |log q/p*| over draws of the posterior (nats)": float(np.abs(kept).mean()),
            "log evidence of the shipped problem (nats)": log_evidence,
        },
    )


def share_of_silent(found: Explanation, token_rewards: FloatArray) -> float:
    """Return the share of sum |log-ratio| that stands on tokens whose own reward is 0."""
    size = np.abs(found.ratios)
    return float(size[token_rewards[found.sequences.tokens[0]] == 0].sum() / size.sum())


def draw_texts(found: Explanation, log_evidence: float, file: Path, num: int = 7) -> None:
    """Draw the first completions with the colours of their tokens, and what they sum to."""
    blocks = [_placed(found.pieces[n], found.ratios[n]) for n in range(min(num, len(found.pieces)))]
    heights = [1.0 + max(line for _, line, _, _ in block) + 1.6 for block in blocks]
    with drawing(file, (0.075 * COLUMNS + 0.2, 0.19 * sum(heights) + 0.1)) as figure:
        figure.set_layout_engine("none")
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set(xlim=(-1, COLUMNS + 2), ylim=(sum(heights), -0.4))
        axes.axis("off")
        font: dict[str, Any] = {"family": "monospace", "fontsize": 8.7, "va": "center"}
        for n, block in enumerate(blocks):
            top = sum(heights[:n]) + 0.5
            for start, line, piece, ratio in block:
                colour = COLOURS[0] if ratio > 0 else COLOURS[1]
                depth = 0.65 * min(abs(ratio) / STRONG, 1.0)
                axes.add_patch(
                    Rectangle((start, top + line - 0.5), len(piece), 1.0, facecolor=colour, alpha=depth, linewidth=0)
                )
                for k, character in enumerate(piece):
                    axes.text(start + k + 0.5, top + line, character, ha="center", **font)
            missing = found.missing(log_evidence)[n]
            words = f"sum {found.ratios[n].sum():+.2f}   r/alpha - log Z {found.gains[n] - log_evidence:+.2f}"
            words += f"   difference {0.0 if abs(missing) < 5e-10 else missing:+.2f}"
            axes.text(0, top + heights[n] - 1.5, words, color=GREY, **font)


def _placed(pieces: Sequence[str], ratios: FloatArray) -> list[tuple[int, int, str, float]]:
    """Return (column, line, text, ratio) of each token, the prompt before them; a line ends where no token fits."""
    placed, column, line = [(0, 0, PROMPT, 0.0)], len(PROMPT), 0
    for piece, ratio in zip(pieces, ratios, strict=False):
        shown = "".join(" " if character.isspace() else character for character in piece) or "■"  # the end has no text
        if column + len(shown) > COLUMNS:
            column, line = 0, line + 1
        placed.append((column, line, shown, float(ratio)))
        column += len(shown)
    return placed


def draw_positions(found: dict[str, Explanation], file: Path) -> None:
    """Draw the mean KL of the next token against its position; its sum is the KL of policy to prior."""
    with drawing(file, (6.0, 3.0)) as figure:
        axes = figure.subplots()
        for colour, (name, each) in zip(COLOURS, found.items(), strict=False):
            mean = each.kl.mean(axis=0)
            axes.plot(np.arange(1, len(mean) + 1), mean, color=colour, label=f"{name}, {mean.sum():.2f} nats in all")
        axes.set(xlabel="token of the completion", ylabel="KL(policy || prior), nats", ylim=(0, None))
        axes.legend(frameon=False)


def draw_moved(found: dict[str, Explanation], prior: LanguageModel, file: Path, num: int = 10) -> None:
    """Draw the tokens whose expected number of occurrences grew and fell most."""
    with drawing(file, (7.2, 4.2)) as figure:
        for axes, (name, each) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
            order = np.argsort(each.moved)
            shown = np.concatenate([order[:num], order[-num:]])
            words = [visible(text) if text else "the end" for text in prior.decode([[i] for i in shown.tolist()])]
            colours = np.where(each.moved[shown] > 0, COLOURS[0], COLOURS[1])
            axes.barh(range(len(shown)), each.moved[shown], color=colours)
            axes.set(yticks=range(len(shown)), xlabel="more of them per completion", title=name)
            axes.set_yticklabels(words)
            axes.axvline(0, color=GREY, linewidth=0.8)


if __name__ == "__main__":
    print(main(Path("bayes-klrl-gallery/explain")))
