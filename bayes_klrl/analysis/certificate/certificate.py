"""Bounds on the distance of a policy to the posterior, in both directions: `certify`.

With [Lo, Up] around log Z, draws x of the policy and exact posterior draws x* (theory.md 4.1),

    KL(q || p*) = log Z - ELBO(q),    ELBO(q) = E_q[log w(x)],     w(x) = p0(x) exp(r(x) / alpha) / q(x)
    KL(p* || q) = EUBO(q) - log Z,    EUBO(q) = E_p*[log w(x*)]

Lo comes from SMC and from importance sampling, Up from their conditional forms, with the prior and the policy as proposals.
No bound assumes anything of its proposal: a good policy makes its own bounds narrow, and a policy that dropped a mode cannot
hide it. Where log Z is known exactly (enumeration, backward messages), Lo = Up.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bayes_klrl.analysis.certificate.alpha import enumerated_point, frontier_point
from bayes_klrl.analysis.certificate.coverage import Coverage, Feature, coverage, labels_of
from bayes_klrl.analysis.certificate.evidence import CALLERS, Evidence, Settings, by_enumeration, by_sampling
from bayes_klrl.analysis.certificate.groundwork import Groundwork
from bayes_klrl.analysis.certificate.intervals import difference
from bayes_klrl.analysis.certificate.open_ends import with_open_ends, without_contradiction
from bayes_klrl.analysis.certificate.record import CertificateRecord
from bayes_klrl.analysis.certificate.text import (
    certificate_html,
    certificate_table,
    certificate_text,
    verdict,
)
from bayes_klrl.analysis.certificate.training_runs.findings import findings
from bayes_klrl.analysis.certificate.training_runs.trainer_log import log_of
from bayes_klrl.checks import check_posterior_given
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.exact.message_lm import MessageLM
from bayes_klrl.inference.policies import PolicyDraws, as_policy, check_of, policy_folder
from bayes_klrl.inference.smc.conditional import retainable
from bayes_klrl.inference.smc.smc import SMC
from bayes_klrl.posterior import Posterior
from bayes_klrl.runners.blocks import run_in_blocks
from bayes_klrl.runners.runner import Runner
from bayes_klrl.runners.serial import chosen_runner
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import LanguageModel, Twist, TwistRecipe

__all__ = ["Certificate", "certify"]

_WORST_GAP = 1e-2  # nats per completion between decoding and scoring; with more, a bound is not about one distribution


@dataclass(frozen=True, eq=False)
class Certificate(CertificateRecord):
    """Bounds on a policy's distance to the posterior, in nats; `print` shows them on one screen, the verdict first.

    Parameters
    ----------
    elbo, log_evidence_bounds, reverse_kl, forward_kl, reverse_kl_on_support
        Intervals (low, high) for each prompt, shape (P, 2); see `Intervals`. Where the policy can draw what the posterior
        excludes, the upper end of `reverse_kl` is inf, and `reverse_kl_on_support` is of the policy without that.
    pooled
        The same intervals for the mean over prompts, shape (2,) each.
    prior_kl
        KL(prior || posterior), mean over prompts, (2,): the distance of a policy that has learned nothing.
    grade
        The kind of the bounds, which is no judgement of the policy. "A": two-sided, from exact posterior draws or the exact
        evidence. "B": one-sided, upper ends are inf. "C": the models' arithmetic is too coarse for a bound; read the numbers
        as estimates. Text and picture say "exact", "two-sided bounds", "lower bound only" or "estimates, no bounds".
    failure_probability
        The probability that some interval of a prompt (or of the mean) misses its value. Half of it is guaranteed, for
        `log_evidence_bounds`; the other half is nominal, for the Monte Carlo error of ELBO and EUBO. 0 if all completions
        were enumerated.
    implied_alpha, implied_alpha_interval
        The alpha whose posterior has the policy's mean reward, one for all prompts, and its 95 % interval. The interval ends
        at inf where the reward may be the prior's own; a reward below the prior's gives a negative alpha; NaN if undefined.
    frontier_gap, frontier_gap_se
        KL(q || p0) minus the least KL that gives this reward, in nats, mean over prompts, and its standard error.
    alpha
        The alpha of the posterior.
    reward, kl_prior
        E_q[r] and KL(q || p0), means over prompts.
    evidence_source
        The source of the bounds on log Z, in words.
    coverage
        The masses of the feature's cells under policy and posterior; None if no feature was given.
    notes
        Statements that could not be made, with the reason.
    findings
        What the policy's own KL to the prior, its adapter and its trainer's log say together: nothing was learned, this is not
        the prior that it was tuned from, or beta was 0. The verdict ends with them; empty if there is nothing to say.
    draws, exact_draws
        The policy's completions, and exact draws of the posterior (None if there are none).
    cost
        Seconds and model tokens of the whole certificate.
    prior_check, policy_check
        How the log-probs of prior and policy were checked, in words; empty for models without a self-check.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0, bounds=(1, 3))
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> certificate = bk.certify(posterior, posterior.prior, seed=0)
    >>> certificate.verdict.split(";")[0], certificate.grade
    ('0.36 nats from the posterior at alpha 1', 'A')
    >>> certificate.table().loc["mean", ["reverse_kl_low", "reverse_kl_high"]].round(3).tolist()
    [0.358, 0.358]
    """

    @property
    def verdict(self) -> str:
        """One sentence: the distance to the posterior, and whether the policy spent more KL than its reward needs."""
        return verdict(self)

    def __str__(self) -> str:
        return certificate_text(self)

    def _repr_html_(self) -> str:
        return certificate_html(self)

    def table(self) -> Any:
        """Return a pandas DataFrame with one row per prompt and one for the mean over prompts."""
        return certificate_table(self)

    def plot(self, file: str | Path) -> Path:
        """Draw the bounds on log Z with ELBO, both KLs, and the feature's cells into a PNG, and return the file."""
        from bayes_klrl.analysis.certificate.picture import plot_certificate

        return plot_certificate(self, file)


def certify(
    posterior: Posterior,
    policy: Any,
    *,
    seed: int,
    num_draws: int = 1024,
    num_particles: int = 64,
    num_runs: int = 24,
    failure_probability: float = 0.05,
    twist: Twist | TwistRecipe | float | None = None,
    exact: Sequences | Draws | None = None,
    feature: Feature | None = None,
    max_sequences: int = 200_000,
    max_proposals: int = 20_000,
    sampling_only: bool = False,
    progress: bool = False,
    runner: Runner | None = None,
) -> Certificate:
    """Return bounds on a policy's distance to the posterior, in both directions, and its gap to the reward-KL frontier.

    Parameters
    ----------
    posterior
        The prior, the likelihood and the prompts.
    policy
        A language model, an SVI `Fit`, or a folder (Hugging Face, PEFT adapter, TRL output); see `policies.as_policy`.
    seed
        Seed for all random numbers.
    num_draws
        N, the number of draws of the policy per prompt; as many draws of the prior are made for the frontier.
    num_particles, num_runs
        K particles in each of M independent SMC runs, and of M conditional runs, each with a fresh exact draw. Bounds lose at
        least log(16 / failure_probability) / M nats on either side, and more where weights vary.
    failure_probability
        The probability with which the intervals may miss; `Certificate` says for which of them it is guaranteed.
    twist
        The twist of the SMC runs, which use it to draw one token ahead if it offers that; see `SMC`. A better twist makes
        narrower bounds, and no twist makes them wrong.
    exact
        Independent exact posterior draws of your own, shape (P, N, T), for posteriors that the package cannot draw from
        exactly: for infilling, draw (x, suffix) from the prior and condition on that suffix. Draws that are not exact bound
        nothing: `Draws` of an inexact method or of another posterior are refused, and for `Sequences` you vouch yourself. If
        the two bounds on log Z then contradict each other, the draws are left out, and a note says so.
    feature
        A function whose labels tell modes apart, to find dropped ones: it takes a list of texts, or (tokens, lengths), and
        returns one label per completion.
    max_sequences, max_proposals
        The most completions to enumerate, and the most proposals for exact draws by rejection, per prompt.
    sampling_only
        Bound log Z by sampling even where it is known exactly: to test the bounds themselves.
    progress
        Show a live display on standard error.
    runner
        Where the work is done: None, here; or a `ProcessRunner` or `RayRunner`, over whose workers prompts and SMC runs are
        spread. The certificate is the same to the bit.

    Raises
    ------
    CheckpointError
        If the policy is no model, or not on the prior's vocabulary.
    SupportError
        If no completion has positive posterior probability.
    BayesKLRLError
        If a budget is too small for any statement, or another argument cannot be right.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0, bounds=(1, 3))
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> certificate = bk.certify(posterior, bk.NgramLM(np.log([0.8, 0.2]), eos_token_id=1), seed=0)
    >>> certificate.grade, certificate.reverse_kl.shape, bool(np.ptp(certificate.reverse_kl) < 1e-6)
    ('A', (1, 2), True)
    """
    ground = groundwork(
        posterior,
        Settings(
            seed=seed,
            num_draws=num_draws,
            num_particles=num_particles,
            num_runs=num_runs,
            failure_probability=failure_probability,
            max_sequences=max_sequences,
            max_proposals=max_proposals,
            sampling_only=sampling_only,
            progress=progress,
            runner=chosen_runner(runner),
        ),
        twist=twist,
        exact=exact,
    )
    return certified(ground, policy, feature)


def groundwork(
    posterior: Posterior,
    settings: Settings,
    *,
    twist: Twist | TwistRecipe | float | None,
    exact: Sequences | Draws | None,
) -> Groundwork:
    """Return the part of certificates that depends on the posterior alone, with what was given checked; see `certify`."""
    check_posterior_given(posterior)
    smc = SMC(settings.num_particles, twist=twist)
    if exact is not None:
        retainable(posterior, exact)
    return Groundwork(posterior, settings, smc, exact)


def certified(ground: Groundwork, policy: Any, feature: Feature | None) -> Certificate:
    """Return the certificate of one policy, on work that may be shared with other policies; see `certify`."""
    start = time.perf_counter()
    posterior, settings = ground.posterior, ground.settings
    folder = policy_folder(policy)  # once: a trainer may write another checkpoint in the meantime
    log = None if folder is None else log_of(folder)
    lm = as_policy(policy if folder is None else folder, posterior)
    ours = run_in_blocks(
        settings.runner,
        PolicyDraws(lm, settings.num_draws),
        posterior,
        seed=settings.stream("policy"),
        progress=settings.progress,
        name="policy draws",
        shared=(lm,),
    )
    if feature is not None:
        labels_of(feature, ours)  # a feature that does not work is refused before the long part
    evidence = _evidence(ground, lm, ours)
    has_alpha = posterior.likelihood.alpha is not None
    if evidence.log_policy is not None:
        point = enumerated_point(ground.everything, evidence.log_policy, has_alpha=has_alpha)
    else:
        point = frontier_point(ours, ground.prior_draws, has_alpha=has_alpha)
    cells, cell_notes = _coverage(feature, ours, evidence.draws, ground.prior_draws)
    return Certificate(
        elbo=evidence.intervals.elbo,
        log_evidence_bounds=evidence.intervals.log_evidence_bounds,
        reverse_kl=evidence.intervals.reverse_kl,
        forward_kl=evidence.intervals.forward_kl,
        reverse_kl_on_support=evidence.intervals.reverse_kl_on_support,
        pooled=evidence.pooled,
        prior_kl=difference(evidence.pooled.log_evidence_bounds, ground.prior_elbo()),
        grade=evidence.grade,
        failure_probability=evidence.failure_probability,
        implied_alpha=point.implied_alpha,
        implied_alpha_interval=point.implied_alpha_interval,
        frontier_gap=point.gap,
        frontier_gap_se=point.gap_se,
        alpha=posterior.alpha,
        reward=point.reward,
        kl_prior=point.kl_prior,
        evidence_source=evidence.source,
        coverage=cells,
        notes=(*evidence.notes, *point.notes, *cell_notes),
        findings=findings(posterior, lm, ours, folder, log),
        draws=ours,
        exact_draws=evidence.draws,
        cost=replace(ours.cost + evidence.cost + ground.prior_draws.cost, seconds=time.perf_counter() - start),
        prior_check=check_of(posterior.prior),
        policy_check=check_of(lm),
    )


def _coverage(
    feature: Feature | None, ours: Draws, exact: Draws | None, prior_draws: Draws
) -> tuple[Coverage | None, tuple[str, ...]]:
    """Return the feature's cells, the posterior's masses from exact draws or else weighted ones; why there are none."""
    if feature is None:
        return None, ()
    if exact is None and not np.isfinite(prior_draws.log_weights).any(axis=1).all():
        return None, ("no coverage of the feature: the prior's draws met nothing possible",)
    try:
        if exact is not None:
            return coverage(feature, ours, exact, "exact draws"), ()
        source = f"weighted prior draws, ESS {prior_draws.ess.min():.0f}"
        return coverage(feature, ours, prior_draws, source), ()
    except BayesKLRLError as error:  # the bounds are there, and are not lost to a feature that fails on the other draws
        return None, (f"no coverage of the feature: {error}",)


def _evidence(ground: Groundwork, policy: LanguageModel, ours: Draws) -> Evidence:
    """Return the intervals, by enumeration where that can be had, and what limits them."""
    posterior, settings = ground.posterior, ground.settings
    if ground.is_enumerated:
        return by_enumeration(posterior, policy, settings, ground.everything)
    exact = ground.exact
    runs = ground.runs if exact.log_evidence is None or settings.sampling_only else None
    found = without_contradiction(by_sampling(posterior, policy, ours, exact, runs, settings), exact.source == CALLERS)
    if not (
        isinstance(policy, MessageLM) and policy.posterior is posterior
    ):  # that one has the posterior's own support
        found = with_open_ends(found, posterior, policy, ours, ground.prior_draws, settings.failure_probability)
    gap = float(ours.info["scoring_gap"].max()) if "scoring_gap" in ours.info else 0.0
    if gap > _WORST_GAP:
        note = (
            f"estimates, no bounds: decoded and scored log-probs differ by up to {gap:.2g} nats per completion in this "
            "precision; load the models in float32 for bounds"
        )
        found = replace(found, grade="C", notes=(*found.notes, note))
    return found
