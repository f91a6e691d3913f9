"""The mutants: one mistake each that people make, with the tests that must find it out (`tests.mutants` runs them).

The first part is theory.md 9.1; the others are traps met while the package was built. Tests named here take a second
or two, and are the sharpest there are for the mistake, not the only ones.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["MUTANTS", "Mutant"]


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Parameters
    ----------
    name
        What is wrong, in a few words.
    file
        Below bayes_klrl/.
    text, replacement
        What stands there, exactly once, and what is put in its place.
    killers
        The tests that must fail by an assertion.
    """

    name: str
    file: str
    text: str
    replacement: str
    killers: tuple[str, ...]


MUTANTS: tuple[Mutant, ...] = (
    # --- theory.md 9.1
    Mutant(
        "EOS dropped from log p(x)",
        "sequences.py",
        "return positions < self.lengths[..., None]",
        "return positions < self.lengths[..., None] - 1",
        (
            "tests/models/ngram_lm/test_lm.py::test_all_completions_together_have_mass_one[two EOS-4]",
            "tests/inference/exact/test_exact.py::test_gold_numbers[ngram-1.5]",
        ),
    ),
    Mutant(
        "EOS dropped by a transformer's scores",
        "models/torch_lm/scoring.py",
        "torch.arange(num_tokens, device=lengths.device) < lengths[:, None]",
        "torch.arange(num_tokens, device=lengths.device) < lengths[:, None] - 1",
        ("tests/models/torch_lm/test_scoring.py::test_all_completions_together_have_mass_one[1.0]",),
    ),
    Mutant(
        "full-mean baseline, divided by the standard deviation",
        "inference/svi/estimators.py",
        "return (values - values.mean(0)) * (num / (num - 1))",
        "return (values - values.mean(0)) / values.std(0)",
        (
            "tests/inference/svi/test_elbo.py::test_gradients_are_unbiased[pyro-LeaveOneOutELBO-8]",
            "tests/inference/svi/test_elbo.py::test_leave_one_out_is_minus_the_gradient_of_half_the_variance_of_log_weights[pyro-16]",
        ),
    ),
    Mutant(
        "|x| / |x'| omitted from the acceptance",
        "inference/mcmc/suffix_moves.py",
        "log_ratio = log_ratio + np.log(lengths) - np.log(new_lengths)",
        "log_ratio = log_ratio + 0.0",
        ("tests/inference/mcmc/test_suffix_mh.py::test_the_kernel_leaves_its_target_invariant[own_length-True-0.3]",),
    ),
    Mutant(
        "the default twist of SMC as the mean likelihood of those who finished",
        "inference/smc/level.py",
        "logsumexp(2 * ended) - logsumexp(ended)",
        "logsumexp(ended) - logsumexp(np.where(finished, log_ratio, -np.inf))",
        ("tests/inference/smc/test_smc.py::test_the_default_constant_makes_weights_most_even_and_has_no_pilot",),
    ),
    Mutant(
        "psi forgotten in the weights after resampling",
        "inference/smc/population.py",
        "self.log_ratio.reshape(self._shape)[chosen] = -self.log_psi.reshape(self._shape)[chosen]",
        "self.log_ratio.reshape(self._shape)[chosen] = 0.0",
        ("tests/inference/smc/test_smc.py::test_evidence_is_unbiased[ngram-lopsided-systematic-0.5]",),
    ),
    Mutant(
        "log Z as the average of log-weights",
        "draws.py",
        "log_evidence=logmeanexp(log_weights),",
        "log_evidence=log_weights.mean(axis=1),",
        (
            "tests/inference/sampling/test_sampling.py::test_importance_sampling_is_unbiased_from_any_proposal[ngram-50]",
        ),
    ),
    Mutant(
        "log Z of a resampling as the average of log-weights",
        "inference/smc/population.py",
        "self.log_evidence[p] += logmeanexp(log_weights[p])",
        "self.log_evidence[p] += log_weights[p].mean()",
        ("tests/inference/smc/test_smc.py::test_evidence_is_unbiased[ngram-lopsided-systematic-1.0]",),
    ),
    Mutant(
        "conditional SMC takes weighted and SMC draws",
        "inference/smc/conditional.py",
        "(retained.method not in _EXACT_METHODS or np.ptp(retained.log_weights) > 0)",
        "retained.method in ()",
        ("tests/inference/smc/test_conditional.py::test_what_cannot_be_retained",),
    ),
    Mutant(
        "conditional SMC retains the output of SMC",
        "inference/exact/exact_draws.py",
        "draws = Exact(num_draws, max_sequences=max(max_sequences, 1)).run(posterior, seed=seed, progress=progress)",
        "from dataclasses import replace\n"
        "        from bayes_klrl.inference.smc.smc import SMC\n\n"
        "        exact = Exact(num_draws, max_sequences=max(max_sequences, 1)).run(posterior, seed=seed, progress=progress)\n"
        "        smc = SMC(64).run(posterior, seed=seed).resample(num_draws, seed=seed)\n"
        "        draws = replace(smc, method=exact.method, log_evidence=exact.log_evidence)",
        (
            "tests/analysis/certificate/test_certificate.py::test_what_is_called_exact_draws_follows_the_posterior[ngram-enumeration]",
        ),
    ),
    Mutant(
        "k3 against the unnormalised posterior",
        "inference/svi/losses.py",
        '"k3": _k3(total)}',
        '"k3": _k3(total - batch.rewards / batch.alpha)}',
        ("tests/analysis/audit/test_audit.py::test_expected_gradients_are_those_of_the_table[random-k3 in reward]",),
    ),
    Mutant(
        "temperature left out of scoring",
        "models/torch_lm/scoring.py",
        "log_probs = tempered(network.logits(features[first:last]), temperature).log_softmax(1)",
        "log_probs = network.logits(features[first:last]).log_softmax(1)",
        ("tests/models/torch_lm/test_scoring.py::test_scores_are_log_softmax_of_logits_over_temperature[0.6]",),
    ),
    Mutant(
        "temperature left out of decoding",
        "models/torch_lm/lm.py",
        "return tempered(state.network.logits(state.features), self.temperature).log_softmax(-1)",
        "return state.network.logits(state.features).log_softmax(-1)",
        ("tests/models/torch_lm/test_lm.py::test_temperature_divides_the_logits_everywhere[gpt2, pad is eos]",),
    ),
    # --- completions and likelihoods
    Mutant(
        "EOS at the last position counted twice",
        "inference/exact/enumeration.py",
        "last_tokens = np.arange(vocab_size) if length == max_new_tokens else eos",
        "last_tokens = np.append(np.arange(vocab_size), eos) if length == max_new_tokens else eos",
        (
            "tests/inference/exact/test_exact.py::test_all_sequences_against_the_definition[3-eos0-4]",
            "tests/inference/exact/test_exact.py::test_gold_numbers[ngram-1.5]",
        ),
    ),
    Mutant(
        "alpha multiplies the reward",
        "likelihood.py",
        "return reward / (self.alpha or 1.0)",
        "return reward * (self.alpha or 1.0)",
        ("tests/inference/exact/test_exact.py::test_gold_numbers[ngram-0.5]",),
    ),
    # --- gradients
    Mutant(
        "one baseline for all prompts",
        "inference/svi/estimators.py",
        "return (values - values.mean(0)) * (num / (num - 1))",
        "return (values - values.mean()) * (num / (num - 1))",
        ("tests/inference/svi/test_elbo.py::test_baselines_are_of_each_prompt_alone[pyro-LeaveOneOutELBO]",),
    ),
    Mutant(
        "the KL's effect on later KLs left out",
        "inference/svi/pyro_backend/elbo.py",
        "surrogate = credit - (kl.sum(dim=2) + score_term).T",
        "surrogate = credit - (kl.sum(dim=2) + 0 * score_term).T",
        ("tests/inference/svi/test_elbo.py::test_rao_blackwell_makes_a_token_pay_for_the_kl_that_it_leads_to[pyro]",),
    ),
    # --- sequential Monte Carlo
    Mutant(
        "weights kept after resampling",
        "inference/smc/population.py",
        "        self.log_ratio.reshape(self._shape)[chosen] = -self.log_psi.reshape(self._shape)[chosen]\n",
        "",
        ("tests/inference/smc/test_smc.py::test_smc_is_the_plain_loop[0-0.9]",),
    ),
    Mutant(
        "resampled at the end",
        "inference/smc/population.py",
        "            if not self._decoding.done:\n                self.resample_where_degenerate(threshold, scheme, rngs)",
        "            done = self._decoding.done\n"
        "            if done:\n"
        "                self._decoding.finished[:] = False\n"
        "            self.resample_where_degenerate(threshold, scheme, rngs)\n"
        "            if done:\n"
        "                self._decoding.finished[:] = True",
        ("tests/inference/smc/test_smc.py::test_never_resampled_at_the_end[ngram-systematic]",),
    ),
    Mutant(
        "a prompt resampled after all of its particles ended",
        "inference/smc/population.py",
        "chosen = np.flatnonzero(unfinished & (ess <",
        "chosen = np.flatnonzero((ess == ess) & (ess <",
        ("tests/inference/smc/test_smc.py::test_a_prompt_that_has_ended_rests_while_another_goes_on",),
    ),
    Mutant(
        "conditional SMC with systematic resampling",
        "resampling.py",
        "_inverse_cdf(weights, np.sort(rng.random(weights.size - 1)))])",
        "_inverse_cdf(weights, (np.arange(weights.size - 1) + rng.random()) / max(weights.size - 1, 1))])",
        (
            "tests/inference/smc/test_conditional.py::test_conditional_multinomial_keeps_particle_0_and_draws_the_others",
        ),
    ),
    Mutant(
        "conditional SMC without the retained particle's ancestry",
        "inference/smc/runs.py",
        "scheme = resampling_scheme(ready.resampling) if retained is None else conditional_multinomial",
        "scheme = resampling_scheme(ready.resampling)",
        (
            "tests/inference/smc/test_conditional.py::test_particle_0_is_the_retained_completion_with_the_weight_it_should_have[ngram]",
        ),
    ),
    Mutant(
        "conditional SMC that draws particle 0, too",
        "inference/smc/population.py",
        "forced[:, 0] = self._retained[:, :, self._decoding.step_count].ravel()",
        "forced[:, 0] = -1",
        ("tests/inference/smc/test_conditional.py::test_the_inverse_evidence_is_unbiased[ngram-own constant-2]",),
    ),
    Mutant(
        "annealing's increment taken after the move",
        "inference/smc/annealing.py",
        "                swarm.temper(power)\n"
        "                if step < num_steps:\n"
        "                    swarm.resample_where_degenerate(self.ess_threshold, scheme, rngs)\n"
        "                swarm.move(self.num_moves, self.cut, rngs)\n",
        "                before, swarm.power = swarm.power, power\n"
        "                swarm.move(self.num_moves, self.cut, rngs)\n"
        "                swarm.power = before\n"
        "                swarm.temper(power)\n"
        "                if step < num_steps:\n"
        "                    swarm.resample_where_degenerate(self.ess_threshold, scheme, rngs)\n",
        ("tests/inference/smc/test_annealing.py::test_evidence_is_unbiased[ngram-never resampled]",),
    ),
    # --- backward messages
    Mutant(
        "messages without the final reward of what ends",
        "inference/exact/backward_pass.py",
        "self.log_paid[self.ends] += potential.final[self.next_columns[self.ends]]",
        "self.log_paid[self.ends] += 0.0",
        ("tests/inference/exact/test_messages.py::test_evidence_and_log_posterior[dense 2 {} 0]",),
    ),
    Mutant(
        "token reward of the state that a token leads to",
        "inference/exact/backward_pass.py",
        "self.log_paid: FloatArray = potential.token.T[tokens]",
        "self.log_paid: FloatArray = potential.token[self.next_columns, tokens[:, None]]",
        ("tests/inference/exact/test_messages.py::test_evidence_and_log_posterior[dense 2 {} 0]",),
    ),
    # --- rejection and best of n
    Mutant(
        "quasi-rejection without min(1, w / B)",
        "inference/sampling/accept_reject.py",
        "log_acceptance = np.minimum(log_w - log_bound, 0.0)",
        "log_acceptance = log_w - log_bound",
        (
            "tests/inference/sampling/test_rejection.py::test_quasi_rejection_follows_its_own_law_and_knows_how_far_off_it_is[ngram-6.0-prior]",
        ),
    ),
    Mutant(
        "KL of best-of-n as if rewards never tied",
        "inference/sampling/order_statistics.py",
        "np.where(tied, atoms, integral(upper) - integral(lower))",
        "np.where(tied, integral(upper) - integral(lower), integral(upper) - integral(lower))",
        ("tests/inference/sampling/test_rejection.py::test_the_law_of_best_of_n[7]",),
    ),
    # --- frontier and certificates
    Mutant(
        "KL of the frontier without log Z",
        "analysis/frontier/path.py",
        '"kl": b * r - log_z,',
        '"kl": b * r,',
        ("tests/analysis/frontier/test_path.py::test_a_pool_of_every_outcome_is_exact[law0]",),
    ),
    Mutant(
        "bounds with the sign of log(1 / delta) wrong",
        "inference/smc/evidence_bounds.py",
        "_crossings(estimates[alive], math.log(1 / delta))",
        "_crossings(estimates[alive], -math.log(1 / delta))",
        ("tests/analysis/certificate/test_certificate.py::test_the_bounds_fail_no_more_often_than_said_and_bite[1.0]",),
    ),
    Mutant(
        "bound on the mean with the sign of log(2 / delta) wrong",
        "inference/smc/evidence_bounds.py",
        "product = float(estimates.mean()) - math.log(2 / delta) / estimates.size",
        "product = float(estimates.mean()) + math.log(2 / delta) / estimates.size",
        ("tests/analysis/certificate/test_certificate.py::test_the_bound_on_the_mean_gains_from_prompts",),
    ),
    Mutant(
        "upper bound that takes the lower one's side",
        "inference/smc/evidence_bounds.py",
        "return -evidence_lower_bound(-np.asarray(log_estimates, dtype=np.float64), delta)",
        "return evidence_lower_bound(np.asarray(log_estimates, dtype=np.float64), delta)",
        ("tests/analysis/certificate/test_certificate.py::test_the_bounds_fail_no_more_often_than_said_and_bite[1.0]",),
    ),
    Mutant(
        "coverage with unweighted posterior draws",
        "analysis/certificate/coverage.py",
        "masses(theirs, normalised(posterior_draws.log_weights), cells)",
        "masses(theirs, normalised(0 * posterior_draws.log_weights), cells)",
        ("tests/analysis/certificate/test_certificate.py::test_coverage_weighs_the_posteriors_draws",),
    ),
    # --- joint programs, mixtures, Bayesian policies
    Mutant(
        "other latents left out of the pathwise gradient",
        "inference/svi/pyro_backend/elbo.py",
        "surrogate=pathwise + score",
        "surrogate=pathwise.detach() + score",
        (
            "tests/inference/svi/test_joint.py::"
            "test_value_and_gradient_are_those_of_enumeration_times_quadrature[pyro-independent-1]",
        ),
    ),
    Mutant(
        "x credited with its own prompt's terms although theta is drawn after all x",
        "inference/svi/pyro_backend/elbo.py",
        "cost = weights if sites.whole else",
        "cost = weights if False else",
        (
            "tests/inference/svi/test_joint.py::"
            "test_value_and_gradient_are_those_of_enumeration_times_quadrature[pyro-x, then theta-2]",
        ),
    ),
    Mutant(
        "features that have forgotten where they come from",
        "models/programs/pyro_program.py",
        "on_device = torch.as_tensor(found, device=tokens.device).reshape(*tokens.shape[:-1], *found.shape[1:])",
        "return torch.as_tensor(found, device=tokens.device).reshape(*tokens.shape[:-1], *found.shape[1:])",
        ("tests/inference/svi/test_joint.py::test_trace_graph_elbo_agrees_on_the_same_program[pyro-independent]",),
    ),
    Mutant(
        "on JAX, x credited with its own prompt's terms although theta is drawn after all x",
        "inference/svi/numpyro_backend/elbo.py",
        "or _any_outside_after(scored[0], own, guide_trace)",
        "or False",
        (
            "tests/inference/svi/test_joint.py::"
            "test_value_and_gradient_are_those_of_enumeration_times_quadrature[numpyro-x, then theta-2]",
        ),
    ),
    Mutant(
        "on JAX, a masked draw without a score",
        "inference/svi/numpyro_backend/elbo.py",
        'if not isinstance(site["fn"], MaskedDistribution):',
        "if True:",
        ("tests/inference/svi/test_joint_numpyro_only.py::test_masked_completions_still_have_a_score",),
    ),
    Mutant(
        "a mixture that averages next-token distributions with its prior weights",
        "models/mixture.py",
        "log_weights = np.where(impossible, state.log_weights, joint - np.where(impossible, 0.0, total))",
        "log_weights = state.log_weights",
        ("tests/models/test_mixture.py::test_every_prefix_has_the_mixtures_own_next_token",),
    ),
    Mutant(
        "a policy's score not pulled back to mu and sigma",
        "models/torch_lm/offsets.py",
        "parts = torch.split(phi,",
        "parts = torch.split(phi.detach(),",
        (
            "tests/inference/svi/bayesian/test_bayesian.py::test_the_gradient_is_that_of_enumeration_times_quadrature[one prompt]",
        ),
    ),
    Mutant(
        "the evidence of N completions counted N times",
        "inference/svi/bayesian/programs.py",
        "scale=(plan.evidence_weight or family.size) / plan.num_particles",
        "scale=(plan.evidence_weight or family.size)",
        ("tests/inference/svi/bayesian/test_bayesian.py::test_the_value_is_the_elbo",),
    ),
    # --- uncertain rewards
    Mutant(
        "the cut posterior not divided by Z_theta",
        "reward_models/ensemble.py",
        "logmeanexp(rewards.T / self.alpha - log_z)",
        "logmeanexp(rewards.T / self.alpha - 0 * log_z)",
        ("tests/reward_models/test_ensemble.py::test_cut_is_the_mixture_of_the_posteriors_of_each_theta",),
    ),
    Mutant(
        "Z_theta without the other factors",
        "reward_models/anchors.py",
        "log_prior[p] + others[p] + rewards / alpha",
        "log_prior[p] + rewards / alpha",
        ("tests/reward_models/test_ensemble.py::test_other_factors_belong_to_the_base_measure",),
    ),
    Mutant(
        "draws of the cut posterior reweighted as if they were the prior's",
        "reward_models/uncertainty.py",
        " - own[:, None]",
        "",
        ("tests/reward_models/test_ensemble.py::test_variances_are_those_of_enumeration",),
    ),
    # --- streams of random numbers
    Mutant(
        "equal prompts get equal draws",
        "randomness.py",
        "keys.append((seen[content], *content))",
        "keys.append((0, *content))",
        ("tests/inference/test_seeds.py::test_a_prompts_draws_do_not_depend_on_the_others[ImportanceSampling]",),
    ),
    Mutant(
        "a prompt named by its place",
        "randomness.py",
        "keys.append((seen[content], *content))",
        "keys.append((len(keys), *content))",
        ("tests/inference/test_seeds.py::test_a_prompts_draws_do_not_depend_on_the_others[SMC]",),
    ),
    Mutant(
        "every block has the same numbers",
        "randomness.py",
        "[len(self.entropy), *self.entropy, block, *key]",
        "[len(self.entropy), *self.entropy, 0, *key]",
        ("tests/inference/test_seeds.py::test_streams_are_uniform_and_independent",),
    ),
    Mutant(
        "rejection that proposes the same completions again",
        "inference/sampling/accept_reject.py",
        "first = int(accepted.num_drawn[prompts[0]])",
        "first = 0",
        ("tests/inference/test_seeds.py::test_many_draws_begin_with_few[RejectionSampling]",),
    ),
    # --- ranks
    Mutant(
        "gradients of ranks that are not summed",
        "inference/svi/ranks/group.py",
        "total = self.summed(_cat(own))",
        "total = _cat(own)",
        (
            "tests/inference/svi/ranks/test_group.py::test_gradients_are_summed_and_none_stays_none",
            "tests/inference/svi/ranks/test_rows.py::test_the_baseline_is_of_all_completions_of_a_prompt[2]",
        ),
    ),
    Mutant(
        "padding of a rank with fewer rows, taken for rows",
        "inference/svi/ranks/group.py",
        "found[longest * k : longest * k + share.stop - share.start]",
        "found[longest * k : longest * (k + 1)]",
        ("tests/inference/svi/ranks/test_group.py::test_nothing_is_dropped_where_shares_differ[7]",),
    ),
)
