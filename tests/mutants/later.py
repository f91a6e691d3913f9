"""Mutants of the self-check, of saving and of training: traps that were found from outside (theory.md 9.6, 9.35, 2.14)."""

from __future__ import annotations

from tests.mutants.table import Mutant

__all__ = ["LATER"]

_CHECK = "tests/models/torch_lm/test_self_check.py"
_SAVING = "tests/models/torch_lm/test_saving.py"
_LOSSES = "tests/inference/svi/test_loss_objectives.py"
_STATE = "tests/inference/svi/test_training_state.py"

LATER: tuple[Mutant, ...] = (
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
        'posterior.prior if getattr(self.elbo, "from_prior", False) else None',
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
        "            self.model = pyro_model(posterior, self._prompts_per_step)\n            self.steps",
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
)
