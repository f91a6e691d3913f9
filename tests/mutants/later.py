"""Mutants of the self-check, of saving, of training and of files: traps found from outside (theory.md 9.6, 9.35, 2.14)."""

from __future__ import annotations

from tests.mutants.table import Mutant

__all__ = ["LATER"]

_CHECK = "tests/models/torch_lm/test_self_check.py"
_SAVING = "tests/models/torch_lm/test_saving.py"
_LOSSES = "tests/inference/svi/test_loss_objectives.py"
_STATE = "tests/inference/svi/test_training_state.py"
_CLASSIFIER = "tests/likelihoods/classifiers/test_reward.py"
_FINDINGS = "tests/analysis/certificate/training_runs/test_findings.py"
_TRL = "tests/reward_functions/test_trl_conventions.py"
_TIGHT = "tests/models/torch_lm/tight"

LATER: tuple[Mutant, ...] = (
    Mutant(
        "a cache writes over what another one has written",
        "models/torch_lm/tight/cache.py",
        "if self.buffer.filled == recent:",
        "if self.buffer.filled >= recent:",
        (
            f"{_TIGHT}/test_cache.py::test_steps_selections_and_branches_equal_reading_at_once[blocks of 4-gpt2-padded]",
            f"{_TIGHT}/test_cache.py::test_steps_selections_and_branches_equal_reading_at_once[one buffer-llama-one]",
        ),
    ),
    Mutant(
        "every block is weighted as the first one",
        "models/torch_lm/tight/attention.py",
        "        first = last\n",
        "        first = 0\n",
        (f"{_TIGHT}/test_cache.py::test_long_completions_are_scored_as_they_were_drawn",),
    ),
    Mutant(
        "the gradient of a weight comes out transposed",
        "models/torch_lm/tight/products.py",
        "found = multiplied(first, second, None) if narrower",
        "found = multiplied(second, first, None).view(gradient.shape[1], -1) if narrower",
        (f"{_TIGHT}/test_products.py::test_values_and_gradients_are_those_in_double_precision[more inputs]",),
    ),
    Mutant(
        "memory is lent again while a view of it is left",
        "models/torch_lm/tight/pool.py",
        "weakref.finalize(lent, give_back, slab).atexit = False",
        "give_back(slab)",
        (f"{_TIGHT}/test_pool.py::test_memory_is_used_again_once_no_view_of_it_is_left",),
    ),
    Mutant(
        "the self-check looks at one path only",
        "models/torch_lm/self_check.py",
        "return max(found, key=lambda one: one.nats)",
        "return found[1]",
        (f"{_CHECK}::test_what_sees_later_tokens_is_refused[roformer]",),
    ),
    Mutant(
        "virtual tokens do not count in the context",
        "models/torch_lm/network.py",
        "return max(1, min(limits) - num_virtual_tokens(module)) if limits else None",
        "return min(limits) if limits else None",
        (f"{_CHECK}::test_virtual_tokens_count_in_the_context[default]",),
    ),
    Mutant(
        "EOS ids of the configuration alone",
        "models/checkpoint_files.py",
        "for entry in known for token in entry)",
        "for entry in known[:1] for token in entry)",
        (f"{_CHECK}::test_eos_ids_of_both_configurations[TorchLM]",),
    ),
    Mutant(
        "adapters with biases share the prior's weights",
        "models/torch_lm/adapters.py",
        'getattr(config, "bias", "none") == "none"',
        "True",
        (f"{_SAVING}::test_an_adapter_never_changes_the_prior[biases]",),
    ),
    Mutant(
        "the advantage forgets the token's own log-ratio",
        "inference/svi/objectives/critics.py",
        "after) - values - log_ratio, 0.0)",
        "after) - values, 0.0)",
        (
            "tests/inference/svi/test_objectives.py::test_advantages_are_sums_of_temporal_differences",
            "tests/inference/svi/test_objectives.py::"
            "test_with_lambda_1_the_gradient_is_the_elbos_whatever_the_critic[any twist]",
        ),
    ),
    Mutant(
        "a checkpoint without the random state",
        "inference/svi/pyro_backend/training.py",
        'torch.set_rng_state(arrays["random"].cpu())',
        "pass",
        (f"{_STATE}::test_a_training_that_goes_on_ends_as_if_nothing_had_happened[adam-table]",),
    ),
    Mutant(
        "a checkpoint without the critic",
        "inference/svi/pyro_backend/training.py",
        'for owner, name in ((self.critic, "critic."), (self.elbo, "loss.")):',
        'for owner, name in ((self.elbo, "loss."),):',
        (f"{_STATE}::test_a_training_that_goes_on_ends_as_if_nothing_had_happened[kl_sgd and critic-table]",),
    ),
    Mutant(
        "a loss of the prior's draws gets the guide's",
        "inference/svi/pyro_backend/training.py",
        'self._target.prior if getattr(self.elbo, "from_prior", False) else None',
        "None",
        (f"{_LOSSES}::test_a_loss_has_its_enumerated_gradient[DPO, drawn from the prior-1]",),
    ),
    Mutant(
        "a sampler's draws all weigh the same",
        "inference/svi/pyro_backend/sampled.py",
        "torch.as_tensor(normalised(draws.log_weights)).to(log_q)",
        "torch.full_like(log_q, 1 / log_q.shape[1]).detach()",
        (f"{_LOSSES}::test_all_completions_have_it_exactly",),
    ),
    Mutant(
        "a step at another alpha keeps the old posterior",
        "inference/svi/pyro_backend/training.py",
        "            self.model = pyro_model(self._target, self._prompts_per_step)\n            self.steps",
        "            self.steps",
        ("tests/inference/svi/test_alphas.py::test_each_step_aims_at_its_own_alpha",),
    ),
    Mutant(
        "alpha is moved the wrong way",
        "analysis/callbacks/adaptive_alpha.py",
        "self.gain / num_steps * error",
        "-self.gain / num_steps * error",
        (
            "tests/inference/svi/test_alphas.py::test_the_target_is_held_and_the_posterior_is_the_one_that_is_said"
            "[{'kl': 1.2}-adam]",
        ),
    ),
    Mutant(
        "earlier draws keep the log-likelihood of an earlier alpha",
        "inference/svi/pyro_backend/scores.py",
        "prior + reward / self.alpha()",
        "prior + reward",
        ("tests/inference/svi/test_objectives.py::test_rewards_of_earlier_draws_count_at_the_present_alpha",),
    ),
    Mutant(
        "every epoch has the order of the first",
        "inference/svi/steps/minibatches.py",
        "generator(seed, _STREAM, epoch)",
        "generator(seed, _STREAM)",
        ("tests/inference/svi/test_minibatches.py::test_a_step_depends_on_seed_and_number_alone",),
    ),
    Mutant(
        "a file is written in its place, not beside it",
        "whole_files.py",
        "unfinished = place.with_name(_new_name(place))",
        "unfinished = place",
        (
            "tests/vocabulary/test_whole_files.py::test_what_was_there_stays_when_the_writing_stops[Stop]",
            "tests/vocabulary/test_whole_files.py::test_a_file_is_on_the_disk_before_it_has_its_name",
        ),
    ),
    Mutant(
        "the checksum of a file of draws is there, and nobody compares it",
        "export/sealed_files.py",
        "_checksum(opened, size - _LENGTH) == end.removeprefix(_HEAD)[:-1]",
        "True",
        ("tests/export/test_sealed_files.py::test_a_damaged_file_is_refused_or_has_the_same_numbers",),
    ),
    Mutant(
        "a classifier is read at the padding",
        "likelihoods/classifiers/network.py",
        "places = [(row, self._last(sequences[index])) for row, index in wanted]",
        "places = [(row, max(map(len, rows)) - 1) for row, index in wanted]",
        (f"{_CLASSIFIER}::test_the_reward_is_that_of_each_text_alone[gpt2-right-4]",),
    ),
    Mutant(
        "the weight of a function counts where it returned None, as in a mean",
        "reward_functions/sums.py",
        "total += np.zeros(len(batch)) if weight == 0 else weight * values",
        "total += np.zeros(len(batch)) if weight == 0 else weight * values / np.maximum(given.mean(), 0.5)",
        (f"{_TRL}::test_none_does_not_apply_so_its_factor_is_1_and_that_is_said_once",),
    ),
    Mutant(
        "a KL that was logged per token taken for that of a completion",
        "analysis/certificate/training_runs/findings.py",
        'lengths = draws.lengths.astype(float) if log.kl_name == "kl" else np.ones(draws.shape)',
        "lengths = np.ones(draws.shape)",
        (f"{_FINDINGS}::test_a_kl_per_token_is_compared_per_token",),
    ),
    Mutant(
        "an adapter's reference left out of account",
        "analysis/certificate/training_runs/findings.py",
        "        module.set_adapter(_REFERENCE)\n",
        "",
        (f"{_FINDINGS}::test_an_adapter_that_went_on_from_another_was_not_tuned_from_the_base",),
    ),
    Mutant(
        "a frontier gap estimated from draws where everything is enumerated",
        "analysis/certificate/certificate.py",
        "    if evidence.log_policy is not None:\n",
        "    if False:\n",
        (
            "tests/analysis/certificate/test_certificate.py::"
            "test_by_enumeration_the_frontier_gap_is_exact_and_no_more_than_the_distance[0]",
        ),
    ),
    Mutant(
        "a row that missed a mode is judged by its own rewards",
        "analysis/comparison/table.py",
        "        if other != name and all(_is_of_the_posterior",
        "        if other == name and all(_is_of_the_posterior",
        ("tests/analysis/comparison/test_comparison.py::test_a_row_that_missed_a_mode_is_told_by_another",),
    ),
)
