"""One guide for many prompts, judged on prompts that it never saw: `amortise`.

A guide q(x | c) reads its prompt c, so that one training serves every prompt like those of the training:

    maximise  mean over training prompts c of  E_q[r] / alpha - KL(q(. | c) || p0(. | c)).

Importance sampling and SMC start anew for each prompt; a guide's draw costs one completion, at the price of a distance
KL(q || p*), and importance weights take that distance away again. Both are shown, on the training prompts and on others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayes_klrl.analysis.amortisation.judgement import Judgement, judgement, weighted
from bayes_klrl.analysis.amortisation.record import AmortisationRecord
from bayes_klrl.analysis.amortisation.table import (
    amortisation_html,
    amortisation_table,
    amortisation_text,
    prompt_table,
    verdict,
)
from bayes_klrl.analysis.certificate.evidence import Settings
from bayes_klrl.checks import check_count, check_posterior_given
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError, BudgetError
from bayes_klrl.export.output_folder import naming_what_is_safe, prepare_output
from bayes_klrl.inference.policies import as_policy
from bayes_klrl.inference.smc.smc import SMC
from bayes_klrl.inference.svi.fit import Fit
from bayes_klrl.posterior import Posterior
from bayes_klrl.progress import progress_display, track
from bayes_klrl.prompts.words import prompt_words
from bayes_klrl.randomness import stream_seed
from bayes_klrl.typing import GuideRecipe
from bayes_klrl.whole_files import whole_file

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Amortisation", "amortise"]


@dataclass(frozen=True, eq=False)
class Amortisation(AmortisationRecord):
    """One guide on its training prompts and on prompts that it never saw; `print` shows the verdict and a table.

    Parameters
    ----------
    guide
        The guide, a language model.
    training, unseen
        The guide and the prior on the training prompts and on the unseen ones, each a `Judgement`: their draws, and bounds on
        KL(guide || posterior) and KL(prior || posterior) of each prompt and of the mean.
    draws
        The answers for the unseen prompts by the name of their row, weighted: importance sampling from the prior and from the
        guide (their weights are those of the draws in `unseen`), and SMC.
    fit
        The training, with its history; None for a guide that was given.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> letters = bk.NgramLM.fit(["a cat sat", "the cat ran", "a rat sat"], order=2)
    >>> vowels = bk.Reward(lambda completions: [sum(map(text.count, "aeiou")) for text in completions], alpha=1.0)
    >>> seen = bk.Posterior(letters, vowels, prompts=["a c", "the r"], max_new_tokens=3)
    >>> unseen = bk.Posterior(letters, vowels, prompts=["a r", "the c"], max_new_tokens=3)
    >>> result = bk.amortise(seen, unseen, bk.SVI(60), seed=0)
    >>> low, high = result.unseen.pooled["guide"].reverse_kl
    >>> bool(high < result.unseen.pooled["prior"].reverse_kl[0])  # the guide is nearer to the posterior than the prior is
    True
    """

    @property
    def verdict(self) -> str:
        """One sentence: how far guide and prior are from the posterior on unseen prompts, and the guide on its own."""
        return verdict(self)

    def __str__(self) -> str:
        return amortisation_text(self)

    def _repr_html_(self) -> str:
        return amortisation_html(self)

    def table(self) -> pd.DataFrame:
        """Return a pandas DataFrame with one row per set of prompts ("training", "unseen") and method.

        The columns are means over prompts, in nats: `kl_posterior`, the estimate of KL(answer || posterior), with its bounds
        `kl_posterior_low` and `kl_posterior_high` for the two policies, "prior" and "guide"; `reward` (E[r], in its own
        units); `kl_prior`; `tokens_per_effective_draw`, the model tokens of one effective draw (see `Comparison.table`; a
        guide's draw counts the guide that draws and the prior that scores); `ess`, the effective sample size of the worst
        prompt; `model_tokens`, `training_tokens`, `seconds`, `training_seconds`.
        """
        return amortisation_table(self)

    def prompt_table(self) -> pd.DataFrame:
        """Return a pandas DataFrame with one row per prompt: KL(guide || posterior) and KL(prior || posterior) with bounds."""
        return prompt_table(self)

    def plot(self, file: str | Path) -> Path:
        """Draw the distances on both sets of prompts, each prompt, and the cost of an effective draw; return the file."""
        from bayes_klrl.analysis.amortisation.picture import plot_amortisation

        return plot_amortisation(self, file)

    def save(self, folder: str | Path) -> Path:
        """Write table.csv, prompts.csv, amortisation.png, training.png and the guide into a folder, and return it.

        Raises
        ------
        BayesKLRLError
            If the folder exists and holds something that is not ours.
        OutputError
            If the folder cannot be made, or a file cannot be written whole; the error names the files that were written.
        """
        from bayes_klrl.export.pictures import plot_history

        out = prepare_output(folder)
        with naming_what_is_safe(out):
            for name, table in (("table.csv", self.table()), ("prompts.csv", self.prompt_table())):
                with whole_file(out / name) as unfinished:
                    table.to_csv(unfinished)
            self.plot(out / "amortisation.png")
            if self.fit is not None:
                plot_history(self.fit.history, out / "training.png", title="one guide for all prompts")
            if hasattr(self.guide, "save_pretrained"):
                self.guide.save_pretrained(out / "policy")
        return out


def amortise(
    posterior: Posterior,
    held_out: Posterior,
    guide: Any,
    *,
    seed: int,
    num_draws: int = 128,
    num_runs: int | None = None,
    failure_probability: float = 0.05,
    max_sequences: int = 200_000,
    max_proposals: int = 20_000,
    sampling_only: bool = False,
    progress: bool = False,
) -> Amortisation:
    """Train one guide on the prompts of a posterior, and judge it on other prompts beside methods that are not trained.

    Parameters
    ----------
    posterior
        The posterior with the training prompts.
    held_out
        The posterior of the unseen prompts, with the same prior and the same reward.
    guide
        The recipe of the training, such as `SVI(100, 8, prompts_per_step=8)`; or a guide that is already trained: a `Fit`, a
        language model, or a folder (see `certify`).
    seed
        Seed for all random numbers.
    num_draws
        N, the number of completions per prompt of each method, at least 32.
    num_runs
        M, the number of groups into which the draws of a policy are split to bound log Z, each with an exact posterior draw.
        Both bounds on the mean of log Z lose at least log(16 / failure_probability) / (P M) nats, and more where the weights
        of N / M draws vary. None: so many that P M is at least 32, as long as groups have 8 draws or more.
    failure_probability
        The probability with which the intervals of a row may miss; see `Certificate`.
    max_sequences, max_proposals
        The most completions to enumerate, over all prompts, and the most proposals for exact draws by rejection, per prompt.
        Rejection needs a reward that declares `bounds`; without exact draws upper ends are inf.
    sampling_only
        Bound log Z by sampling even where it is known exactly: to test the bounds themselves.
    progress
        Show a live display on standard error.

    Raises
    ------
    BayesKLRLError
        If the two posteriors have different priors, alphas or lengths, or a prompt in common; before anything is trained.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> letters = bk.NgramLM.fit(["a cat sat", "the cat ran", "a rat sat"], order=2)
    >>> vowels = bk.Reward(lambda completions: [sum(map(text.count, "aeiou")) for text in completions], alpha=1.0)
    >>> seen = bk.Posterior(letters, vowels, prompts=["a c", "the r"], max_new_tokens=3)
    >>> unseen = bk.Posterior(letters, vowels, prompts=["a r", "the c"], max_new_tokens=3)
    >>> table = bk.amortise(seen, unseen, bk.SVI(60), seed=0).table()
    >>> list(table.loc["unseen"].index)
    ['prior', 'guide', 'prior IS', 'SMC', 'guide, then IS']
    """
    _check_alike(posterior, held_out)
    check_count("num_draws", num_draws, least=32)
    if num_runs is not None:
        check_count("num_runs", num_runs)
        if num_runs > num_draws // 2:
            raise BayesKLRLError(
                f"num_runs = {num_runs} groups of two draws or more need num_draws = {2 * num_runs} or more; got {num_draws}."
            )
    settings = Settings(
        seed=stream_seed(seed, 0, "amortise"),
        num_draws=num_draws,
        num_particles=num_draws,
        num_runs=2,  # of a certificate by SMC, which is not used; the groups are chosen for each set of prompts
        failure_probability=failure_probability,
        max_sequences=max_sequences,
        max_proposals=max_proposals,
        sampling_only=sampling_only,
        progress=progress,
    )
    with progress_display(progress), track("amortisation", 4, progress) as advance:
        fit = guide.fit(posterior, seed=seed, progress=progress) if isinstance(guide, GuideRecipe) else guide
        lm = as_policy(fit, posterior)
        as_policy(fit, held_out)  # the unseen prompts must fit into its context, too
        advance(status="trained")
        training = judgement(posterior, lm, settings, num_runs)
        advance(status="judged on the training prompts")
        unseen = judgement(held_out, lm, settings, num_runs)
        advance(status="judged on the unseen prompts")
        draws = _answers(unseen, settings)
        advance(status="compared")
    return Amortisation(lm, training, unseen, draws, fit if isinstance(fit, Fit) else None)


def _answers(unseen: Judgement, settings: Settings) -> Mapping[str, Draws]:
    """Return the weighted answers for the unseen prompts by the name of their row."""
    smc = SMC(settings.num_particles)
    try:
        particles = smc.run(unseen.posterior, seed=settings.stream("SMC"), progress=settings.progress)
    except BudgetError as error:  # a prompt of which no particle is alive is an answer, too: its ESS is 0
        if error.draws is None:
            raise
        particles = error.draws
    return {
        "prior IS": weighted(unseen.posterior, unseen.draws["prior"]),
        "SMC": particles,
        "guide, then IS": weighted(unseen.posterior, unseen.draws["guide"]),
    }


def _check_alike(posterior: Posterior, held_out: Posterior) -> None:
    """Refuse posteriors that differ in more than their prompts, and prompts that are not unseen."""
    for name, given in (("posterior", posterior), ("held_out", held_out)):
        check_posterior_given(given, name)
    if held_out.prior is not posterior.prior:
        raise BayesKLRLError(
            "The two posteriors have different priors. Give both the same language model, loaded once."
        )
    for name in ("alpha", "max_new_tokens"):
        ours, theirs = getattr(posterior, name), getattr(held_out, name)
        if ours != theirs:
            raise BayesKLRLError(f"{name} is {ours:g} for the training prompts and {theirs:g} for the unseen ones.")
    seen = set(posterior.prompt_ids)
    common = [prompt for prompt, ids in zip(held_out.prompts, held_out.prompt_ids, strict=True) if ids in seen]
    if common:
        raise BayesKLRLError(
            f"{len(common)} of the {held_out.num_prompts} held-out prompts are training prompts, such as "
            f"{prompt_words(common[0])}. Take them out of one of the two."
        )
