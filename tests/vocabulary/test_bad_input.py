"""Bad input: refused with a typed error that names the value, and before a model is run wherever that can be."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from tests.algorithms import EVERY_REWARD, named
from tests.helpers.user_models import RecurrentLM, TextLM


class Untouchable(TextLM):
    """A model that must not be run."""

    def prefill(self, prompts: Any) -> Any:
        raise AssertionError("The model was run.")


class WithoutSupport(RecurrentLM):
    full_support = False


ALGORITHMS = named(EVERY_REWARD, 8)


def longer(alpha: Any = 1.0) -> bk.TokenReward:
    return bk.TokenReward(lambda tokens, lengths: lengths, alpha=alpha)


def posterior(prior: Any = None, likelihood: Any = None, **options: Any) -> bk.Posterior:
    return bk.Posterior(
        prior or Untouchable(), likelihood or longer(), **{"prompts": "1", "max_new_tokens": 3} | options
    )


# ---- what is no posterior


@pytest.mark.parametrize("given", [3, None, "posterior", longer()], ids=["number", "None", "text", "likelihood"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_is_no_posterior_is_refused(name: str, given: Any) -> None:
    with pytest.raises(bk.BayesKLRLError, match=r"posterior must be a bk\.Posterior; got"):
        ALGORITHMS[name].run(given, seed=0)


def test_so_it_is_by_what_runs_algorithms() -> None:
    for use in (
        lambda: bk.compare(3, {"IS": bk.ImportanceSampling(8)}, seed=0),  # type: ignore[arg-type]
        lambda: bk.amortise(3, 4, Untouchable(), seed=0),  # type: ignore[arg-type]
        lambda: bk.frontier(3, num_draws=8, seed=0),  # type: ignore[arg-type]
        lambda: bk.certify(3, Untouchable(), seed=0),  # type: ignore[arg-type]
    ):
        with pytest.raises(bk.BayesKLRLError, match=r"must be a bk\.Posterior; got 3"):
            use()


# ---- alpha, bounds, functions


@pytest.mark.parametrize("alpha", [0, -1, -1e-9, np.nan, np.inf, -np.inf, None, "0.5", "small", [1.0], True, 1j])
@pytest.mark.parametrize("kind", [bk.Reward, bk.TokenReward])
def test_alpha_is_positive_and_finite(kind: Any, alpha: Any) -> None:
    with pytest.raises(bk.BayesKLRLError, match=r"alpha must be a positive finite number; got"):
        kind(lambda x, y: [], alpha=alpha)


def test_a_tensor_with_a_gradient_is_no_alpha() -> None:
    """It became a number, and whoever wanted to infer alpha got no gradient and no word."""
    torch = pytest.importorskip("torch")
    with pytest.raises(bk.BayesKLRLError, match=r"gradient would be lost.*pyro\.factor"):
        longer(torch.tensor(0.5, requires_grad=True))
    assert longer(torch.tensor(0.5)).alpha == 0.5


@pytest.mark.parametrize("gamma", [0, -2.0, np.nan, np.inf, None, "2"])
def test_so_is_an_exponent(gamma: Any) -> None:
    for likelihood in (longer(), longer() * longer(2.0), bk.Constraint(lambda completions: [])):
        with pytest.raises(bk.BayesKLRLError, match=r"gamma .* must be a positive finite number"):
            _ = likelihood**gamma


@pytest.mark.parametrize("bounds", [(1, 0), (np.nan, 1), (0, np.nan), 3, (1, 2, 3), "ab", (np.inf, np.inf), (None, 1)])
def test_bounds_are_a_pair_low_high(bounds: Any) -> None:
    with pytest.raises(bk.BayesKLRLError, match="bounds"):
        bk.Reward(lambda y: [], alpha=1.0, bounds=bounds)


@pytest.mark.parametrize("fn", [None, "reward", 3, [3], []])
@pytest.mark.parametrize("kind", [bk.Reward, bk.TokenReward])
def test_a_reward_is_a_function(kind: Any, fn: Any) -> None:
    with pytest.raises(bk.BayesKLRLError, match="is a function of completions; got"):
        kind(fn, alpha=1.0)
    with pytest.raises(bk.BayesKLRLError, match="is a function of completions; got"):
        bk.Constraint(fn)


# ---- what a reward returns


def nth_is(value: Any) -> Callable[..., Any]:
    """A reward that is right but for its second completion."""
    return lambda completions: [value if n == 1 else 0.0 for n in range(len(completions))]


def raising(completions: list[str]) -> list[float]:
    if any("2" in text for text in completions):
        raise KeyError("two")
    return [0.0] * len(completions)


XS = [[1, 3], [0, 2, 3], [3]]
SECOND = r"completion 1 '02' \(ids \[0, 2, 3\], prompt '1'\)"
OUTCOMES: dict[str, tuple[Callable[..., Any], str]] = {
    "None": (lambda completions: None, "returned None for 3 completions"),
    "one number": (lambda completions: 1.0, "returned 1.0 for 3 completions"),
    "a string": (lambda completions: "abc", "returned 'abc' for 3 completions"),
    "a generator": (lambda completions: (1.0 for _ in completions), "returned .*generator.* for 3 completions"),
    "too few": (lambda completions: [1.0], "returned 1 values for 3 completions"),
    "too many": (lambda completions: [1.0] * 4, "returned 4 values for 3 completions"),
    "a matrix": (lambda completions: np.ones((3, 1)), r"returned shape \(3, 1\) for 3 completions"),
    "a scalar array": (lambda completions: np.array(1.0), r"returned shape \(\) for 3 completions"),
    "NaN": (nth_is(np.nan), f"returned nan for {SECOND}"),
    "NaN in an array": (lambda completions: np.array([0, np.nan, 0]), f"returned nan for {SECOND}"),
    "+inf": (nth_is(np.inf), f"returned inf for {SECOND}"),
    "a string for one": (nth_is("1.0"), f"returned '1.0' for {SECOND}"),
    "a list for one": (nth_is([1.0]), rf"returned \[1.0\] for {SECOND}"),
    "too large a number": (nth_is(10**400), f"returned 10+ for {SECOND}"),
    "strings in an array": (lambda completions: np.array(["1", "2", "3"]), "returned .*'1'.* for completion 0"),
}


@pytest.mark.parametrize("case", OUTCOMES)
def test_a_reward_returns_one_number_a_completion(case: str) -> None:
    fn, says = OUTCOMES[case]
    with pytest.raises(bk.RewardError, match=f"'my reward' {says}"):
        posterior(likelihood=bk.Reward(fn, alpha=1.0, name="my reward")).reward(XS)


@pytest.mark.parametrize("value", [np.nan, 0.5, 2, -np.inf, None, "yes"])
def test_a_constraint_returns_yes_or_no(value: Any) -> None:
    with pytest.raises(bk.RewardError, match=SECOND):
        posterior(likelihood=bk.Constraint(nth_is(value))).reward(XS)


def test_a_reward_that_raises_shows_the_completion_and_the_original_error() -> None:
    with pytest.raises(bk.RewardError, match=f"'raising' raised KeyError: 'two' -- at {SECOND}") as caught:
        posterior(likelihood=bk.Reward(raising, alpha=1.0)).reward(XS)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_token_reward_that_raises_shows_the_completion_its_shape_and_the_original_error() -> None:
    def fn(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        return np.array([[0.0][int(n == 3)] for n in lengths])  # the second is the one of three tokens

    with pytest.raises(bk.RewardError, match=rf"raised IndexError: .* at {SECOND}.* shape \(3, 3\)") as caught:
        posterior(likelihood=bk.TokenReward(fn, alpha=1.0)).reward(XS)
    assert isinstance(caught.value.__cause__, IndexError)


def test_interrupts_pass_through_a_reward() -> None:
    def interrupted(completions: list[str]) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        posterior(likelihood=bk.Reward(interrupted, alpha=1.0)).reward(XS)


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("fn", [OUTCOMES["None"][0], lambda completions: np.full(len(completions), np.nan), raising])
def test_every_algorithm_passes_a_rewards_error_on(name: str, fn: Callable[..., Any]) -> None:
    with pytest.raises(bk.RewardError):
        ALGORITHMS[name].run(posterior(TextLM(), bk.Reward(fn, alpha=1.0)), seed=0)


# ---- no completion that is possible


NOTHING = {
    "a constraint": bk.Constraint(lambda completions: [False] * len(completions)),
    "a reward": bk.TokenReward(lambda tokens, lengths: np.full(len(lengths), -np.inf), alpha=0.5),
    "for one of the prompts": bk.Reward(lambda prompts: [-np.inf if c == "2" else 0.0 for c in prompts], alpha=0.5),
}


@pytest.mark.parametrize("case", NOTHING)
def test_there_is_no_posterior_where_nothing_is_possible(case: str) -> None:
    impossible = posterior(TextLM(), NOTHING[case], prompts=["1", "2"])
    says = "prompt 1" if case == "for one of the prompts" else "prompt 0"
    with pytest.raises(bk.SupportError, match=f"Every completion of {says}"):
        bk.Exact().run(impossible, seed=0)
    for algorithm in (
        bk.ImportanceSampling(20),
        bk.SMC(20),
        bk.SMC(20, twist=0.0, ess_threshold=1.0),
        bk.AnnealedSMC(20),
    ):
        with pytest.raises(bk.BudgetError, match=f"None of the 20 draws of {says}") as caught:
            algorithm.run(impossible, seed=0)
        draws = caught.value.draws
        assert draws is not None
        assert draws.shape == (2, 20)
        assert np.isneginf(draws.log_likelihood[1]).all()
        assert draws.log_evidence[1] == -np.inf
        with pytest.raises(bk.BayesKLRLError, match="All log-weights are -inf"):
            draws.mean(draws.reward)


def test_svi_names_the_completion_that_makes_its_loss_infinite() -> None:
    lm = bk.NgramLM(np.log([0.25, 0.75]), eos_token_id=1)
    with pytest.raises(bk.UnboundedLossError, match=r"ids \[.*\], whose likelihood is 0.*log\(eps\)"):
        bk.SVI(2, num_draws=4).run(bk.Posterior(lm, NOTHING["a reward"], max_new_tokens=2), seed=0)


# ---- the posterior's own arguments


POSTERIORS: dict[str, tuple[dict[str, Any], str]] = {
    "max_new_tokens 0": ({"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1; got 0"),
    "max_new_tokens negative": ({"max_new_tokens": -3}, "got -3"),
    "max_new_tokens a float": ({"max_new_tokens": 4.0}, "got 4.0"),
    "max_new_tokens a bool": ({"max_new_tokens": True}, "got True"),
    "max_new_tokens None": ({"max_new_tokens": None}, "got None"),
    "no prompts": ({"prompts": []}, "prompts is empty"),
    "prompts None": ({"prompts": None}, "prompts must be a text or a list; got None"),
    "prompts a number": ({"prompts": 1}, "got 1"),
    "texts and ids": ({"prompts": ["1", [1]]}, r"all of one kind; got \['1', \[1\]\]"),
    "ids and the empty text": ({"prompts": [[1], ""]}, "all of one kind"),
    "ids and one id": ({"prompts": [1, [1]]}, "all of one kind"),
    "ids that are floats": ({"prompts": [1.0, 2.0]}, "all of one kind"),
    "ids that are bools": ({"prompts": [True]}, "all of one kind"),
    "an id past the vocabulary": ({"prompts": [[1], [0, 4]]}, r"Prompt 1 has the token id 4, outside .* 0\.\.3"),
    "a negative id": ({"prompts": [-1]}, "Prompt 0 has the token id -1"),
    "empty and no BOS": ({"prompts": ["1", ""]}, "Prompt 1 is empty, and the model has no BOS"),
    "text and no tokenizer": ({"prior": RecurrentLM(), "prompts": "1"}, "'1' is text, but the prior has no tokenizer"),
    "a function as likelihood": ({"likelihood": len}, r"likelihood must be .*Wrap a function: bk.Reward"),
    "a name as prior": ({"prior": "gpt2"}, "prior must be a language model.* a str has no vocab_size"),
    "half a model": ({"prior": type("Half", (), {"vocab_size": 2})()}, "a Half has no eos_token_ids, full_support"),
}


@pytest.mark.parametrize("case", POSTERIORS)
def test_a_posterior_that_cannot_be_is_refused_when_it_is_made(case: str) -> None:
    options, says = POSTERIORS[case]
    with pytest.raises(bk.BayesKLRLError, match=says):
        posterior(**options)


# ---- options of algorithms


OPTIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "no such scheme": (lambda: bk.SMC(8, resampling="best"), "Unknown resampling scheme 'best'; choose one of"),
    "a scheme that is no name": (lambda: bk.SMC(8, resampling=["systematic"]), "Unknown resampling"),
    "threshold above 1": (lambda: bk.SMC(8, ess_threshold=1.5), "ess_threshold must be a number from 0 to 1; got 1.5"),
    "threshold NaN": (lambda: bk.SMC(8, ess_threshold=np.nan), "got nan"),
    "twist NaN": (lambda: bk.SMC(8, twist=np.nan), "twist .* got nan"),
    "twist a name": (lambda: bk.SMC(8, twist="optimal"), "twist .* got 'optimal'"),
    "bound NaN": (lambda: bk.QuasiRejection(8, bound=np.nan), "bound must be a finite number; got nan"),
    "bound inf": (lambda: bk.QuasiRejection(8, bound=np.inf), "got inf"),
    "a budget below the draws": (lambda: bk.RejectionSampling(8, max_proposals=7), "max_proposals = 7 .* is less than"),
    "learning rate 0": (lambda: bk.SVI(5, learning_rate=0), "learning_rate must be a positive finite number; got 0"),
    "learning rate NaN": (lambda: bk.SVI(5, learning_rate=np.nan), "got nan"),
    "learning rate inf": (lambda: bk.SVI(5, learning_rate=np.inf), "got inf"),
    "learning rate a string": (lambda: bk.SVI(5, learning_rate="fast"), "got 'fast'"),
    "one particle has no baseline": (lambda: bk.SVI(5, num_particles=1), "integer of at least 2; got 1"),
    "no such objective": (lambda: bk.SVI(5, objective="renyi"), "Unknown objective 'renyi'; choose one of"),
    "no such estimator": (lambda: bk.SVI(5, estimator="ppo"), "Unknown estimator 'ppo'; choose one of"),
    "no prompts a step": (lambda: bk.SVI(5, prompts_per_step=0), "prompts_per_step .* got 0"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_that_cannot_be_is_refused_when_the_algorithm_is_made(case: str) -> None:
    make, says = OPTIONS[case]
    with pytest.raises(bk.BayesKLRLError, match=says):
        make()


@pytest.mark.parametrize("count", [0, -1, 2.0, True, "3", np.nan])
@pytest.mark.parametrize(
    "make",
    [
        bk.ImportanceSampling,
        bk.SMC,
        lambda n: bk.BestOfN(n, 5),
        lambda n: bk.BestOfN(5, n),
        bk.AnnealedSMC,
        lambda n: bk.SuffixMH(n, 5),
        lambda n: bk.SuffixMH(5, n),
        bk.RejectionSampling,
        lambda n: bk.RejectionSampling(5, max_proposals=n),
        lambda n: bk.QuasiRejection(n, bound=1.0),
        lambda n: bk.Exact(num_draws=n),
        lambda n: bk.Exact(max_sequences=n),
        bk.SVI,
        lambda n: bk.SVI(5, num_particles=n),
        lambda n: bk.SVI(5, num_draws=n),
    ],
)
def test_counts_are_integers_of_at_least_1(make: Callable[[Any], Any], count: Any) -> None:
    with pytest.raises(bk.BayesKLRLError, match="must be an integer of at least"):
        make(count)


@pytest.mark.parametrize("count", [np.int64(5), np.int32(5)])
def test_counts_may_be_numpys(count: Any) -> None:
    assert bk.ImportanceSampling(count).run(posterior(TextLM()), seed=0).shape == (1, 5)


# ---- algorithms that do not fit the posterior


PROPOSALS: dict[str, tuple[Any, type[bk.BayesKLRLError], str]] = {
    "another vocabulary": (RecurrentLM(vocab_size=5), bk.CheckpointError, "proposal has 5 tokens .* the prior 4"),
    "another EOS": (RecurrentLM(eos_token_ids=(2,)), bk.CheckpointError, r"EOS \[2\], the prior 4 and \[3\]"),
    "one EOS more": (RecurrentLM(eos_token_ids=(2, 3)), bk.CheckpointError, r"EOS \[2, 3\]"),
    "no full support": (WithoutSupport(), bk.SupportError, "probability 0 to some tokens"),
    "a name": ("gpt2", bk.BayesKLRLError, "proposal must be a language model.* a str has no"),
    "another algorithm": (bk.SMC(8), bk.BayesKLRLError, "proposal must be a language model.* a SMC has no"),
}


@pytest.mark.parametrize(
    "algorithm",
    [bk.ImportanceSampling, bk.SMC, bk.AnnealedSMC, partial(bk.QuasiRejection, bound=1.0), partial(bk.SuffixMH, 2)],
)
@pytest.mark.parametrize("case", PROPOSALS)
def test_a_proposal_that_does_not_fit_the_prior(case: str, algorithm: Any) -> None:
    proposal, error, says = PROPOSALS[case]
    with pytest.raises(error, match=says):
        algorithm(8, proposal=proposal).run(posterior(), seed=0)
    assert getattr(proposal, "num_calls", 0) == 0


def test_a_proposal_needs_no_more_support_than_the_prior_has() -> None:
    bk.ImportanceSampling(8, proposal=RecurrentLM()).run(posterior(WithoutSupport(), prompts=[1]), seed=0)


def test_a_proposal_of_shorter_context() -> None:
    proposal = TextLM()
    proposal.context_length = 3  # type: ignore[attr-defined]
    with pytest.raises(bk.BayesKLRLError, match="context of 3"):
        bk.ImportanceSampling(8, proposal=proposal).run(posterior(prompts="1"), seed=0)


@pytest.mark.parametrize(
    "vocab_size, max_new_tokens, says", [(4, 12, r"about 10\^5\.\d"), (50_000, 400, r"about 10\^1879\.\d")]
)
def test_enumeration_refuses_what_is_too_much(vocab_size: int, max_new_tokens: int, says: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=f"{says} completions, more than max_sequences = 100,000"):
        bk.Exact(max_sequences=100_000).run(posterior(Untouchable(vocab_size), max_new_tokens=max_new_tokens), seed=0)


def test_svi_on_a_model_without_parameters() -> None:
    with pytest.raises(bk.BayesKLRLError, match=r"needs a prior with torch parameters.* got a Untouchable"):
        bk.SVI(5).run(posterior(), seed=0)


@pytest.mark.parametrize(
    "options, says",
    [({"adapter": "lora"}, "Adapters are for a bk.TorchLM"), ({"prompts_per_step": 2}, "posterior has 1 prompts")],
)
def test_svi_options_that_the_posterior_does_not_allow(options: dict[str, Any], says: str) -> None:
    lm = bk.NgramLM(np.log([0.25, 0.75]), eos_token_id=1)
    with pytest.raises(bk.BayesKLRLError, match=says):
        bk.SVI(5, **options).run(bk.Posterior(lm, longer(), max_new_tokens=2), seed=0)


@pytest.mark.parametrize("seed", [-1, 1.5, None, "0", True])
@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "Exact"])  # enumerated here, without a seed
def test_a_seed_is_a_non_negative_integer(name: str, seed: Any) -> None:
    with pytest.raises(bk.BayesKLRLError, match="seed must be an integer of at least 0"):
        ALGORITHMS[name].run(posterior(TextLM()), seed=seed)


def test_every_error_of_ours_is_one_family_and_a_value_error() -> None:
    for name in dir(bk):
        if name.endswith("Error"):
            assert issubclass(getattr(bk, name), bk.BayesKLRLError)
    assert issubclass(bk.BayesKLRLError, ValueError)
