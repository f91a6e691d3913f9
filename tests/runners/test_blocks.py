"""How prompts are split: the draws are those of one run, whatever rewards, twists and errors ask a prompt's number for."""

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.prompts.part import PosteriorPart
from bayes_klrl.randomness import stream_seed
from bayes_klrl.runners.blocks import block_tasks, prompt_parts, run_in_blocks
from bayes_klrl.runners.serial import SerialRunner
from bayes_klrl.typing import FloatArray, IntArray
from tests.runners.posteriors import PROMPTS, differing, numbered_posterior

POSTERIOR = numbered_posterior()


def by_number(posterior: bk.Posterior, prompt_index: IntArray, prefixes: IntArray) -> FloatArray:
    """A twist that is told the prompt's number in the whole posterior, and the whole posterior."""
    assert posterior is POSTERIOR
    return 0.5 * (prefixes == prompt_index[:, None] % 5).sum(axis=1) + 0.1 * prompt_index


ROWS: dict[str, bk.Algorithm] = {
    "importance": bk.ImportanceSampling(200),
    "rejection": bk.RejectionSampling(150),
    "quasi-rejection": bk.QuasiRejection(150, bound=1.0),
    "best of n": bk.BestOfN(3, 60),
    "smc": bk.SMC(200),
    "smc, constant": bk.SMC(200, twist=1.5),
    "smc, a twist by number": bk.SMC(200, twist=by_number),
    "smc, a recipe": bk.SMC(200, twist=bk.PartialRewardTwist()),
    "smc, twisted": bk.SMC(200, proposal="twisted"),
    "smc, twisted by number": bk.SMC(200, proposal="twisted", twist=by_number),
    "islands": bk.SMC(70, num_islands=3),
    "chains": bk.SuffixMH(80, 3),
    "annealed": bk.AnnealedSMC(150, schedule=(0.5, 1.0)),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_draws_of_blocks_are_those_of_one_run(name: str) -> None:
    """To the bit, on a table. Quasi-rejection's estimates are from all proposals, whose number depends on the blocks."""
    algorithm, seed = ROWS[name], stream_seed(3, 0, name)
    whole = algorithm.run(POSTERIOR, seed=seed)
    assert len(block_tasks(name, algorithm, POSTERIOR, seed)) > 1
    split = bk.compare(POSTERIOR, {name: algorithm}, seed=3)[name]
    from_proposals = {"kl_prior", "acceptance_rate", "tvd_bound", "kl_bound", "log_evidence_estimate"}
    assert set(differing(whole, split)) <= (from_proposals if "reject" in name else set())
    assert (split.prompts, split.method, split.alpha) == (whole.prompts, whole.method, whole.alpha)
    assert split.training_tokens == whole.training_tokens


def test_algorithms_whose_prompts_wait_for_each_other_are_one_task() -> None:
    for algorithm in (bk.AnnealedSMC(150), bk.Exact(), bk.SVI(2, 8)):
        assert len(block_tasks("row", algorithm, POSTERIOR, 0)) == 1


def test_equal_prompts_stay_together_and_small_work_is_not_split() -> None:
    parts = prompt_parts(POSTERIOR.prompt_ids, 200)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(PROMPTS)))
    assert any({0, 3} <= set(part.tolist()) for part in parts)
    assert max(map(len, parts)) <= 2
    assert len(prompt_parts(POSTERIOR.prompt_ids, 64)) == 1
    assert [part.tolist() for part in prompt_parts([(0,)] * 5, 10_000)] == [[0, 1, 2, 3, 4]]


def test_a_budget_that_ends_in_one_block_leaves_what_one_run_leaves() -> None:
    algorithm = bk.RejectionSampling(150, max_proposals=1500)
    with pytest.raises(bk.BudgetError) as whole:
        algorithm.run(POSTERIOR, seed=0)
    with pytest.raises(bk.BudgetError) as split:
        run_in_blocks(SerialRunner(), algorithm, POSTERIOR, seed=0, progress=False, name="rejection")
    assert str(split.value) == str(whole.value)
    assert whole.value.draws is not None
    assert split.value.draws is not None
    assert split.value.draws.shape == whole.value.draws.shape
    assert np.array_equal(split.value.draws.tokens, whole.value.draws.tokens)


def test_an_error_names_the_prompt_by_its_number_in_the_whole() -> None:
    def never_six(tokens: IntArray, lengths: IntArray, prompt_index: IntArray) -> FloatArray:
        return np.where(prompt_index == 6, -np.inf, 0.0)

    lm = POSTERIOR.prior
    posterior = bk.Posterior(lm, bk.TokenReward(never_six, alpha=1.0), prompts=PROMPTS, max_new_tokens=3)
    for algorithm in (bk.ImportanceSampling(200), bk.SMC(200), bk.SuffixMH(80, 1)):
        result = bk.compare(posterior, {"row": algorithm, "exact": bk.BestOfN(1, 1)}, seed=0)
        assert "prompt 6 (ids 1 2)" in result.failures["row"]


def test_a_part_at_another_alpha_is_a_part_of_the_whole_there() -> None:
    indices = np.array([6, 7])
    part, x = PosteriorPart(POSTERIOR, indices).at_alpha(0.5), np.full((8, 1, 5), 1)
    whole = POSTERIOR.at_alpha(0.5).log_likelihood(bk.Sequences(x, np.full((8, 1), 5)))
    assert np.array_equal(part.log_likelihood(bk.Sequences(x[:2], np.full((2, 1), 5))), whole[indices])
    assert np.ptp(whole[indices]) > 1


@pytest.mark.slow
def test_a_guide_is_trained_once_and_billed_once() -> None:
    svi = bk.SVI(2, 8, num_draws=200)
    rows = {"SVI": svi, "then IS": bk.ImportanceSampling(200, proposal=bk.SVI(2, 8)), "few": bk.SVI(2, 8, num_draws=9)}
    result = bk.compare(POSTERIOR, rows, seed=0)
    assert set(result.fits) == {"SVI"}
    assert result["SVI"].training_tokens == result["then IS"].training_tokens == result["few"].training_tokens > 0
    fit = svi.fit(POSTERIOR, seed=stream_seed(0, 0, "SVI"))
    assert not differing(fit.run(200, stream_seed(0, 0, "SVI")), result["SVI"])
    again = bk.ImportanceSampling(200, proposal=fit.guide).run(POSTERIOR, seed=stream_seed(0, 0, "then IS"))
    assert not differing(again, result["then IS"])


def test_copies_of_a_prompt_with_columns_are_found_in_order() -> None:
    """All copies of a prompt name themselves; one of them alone does not."""
    twisted = bk.TwistedLM(POSTERIOR, by_number)
    both = twisted.prefill([(0,), (1, 2), (0,)])
    assert both.prompt_index.tolist() == [0, 6, 3]
    with pytest.raises(bk.BayesKLRLError, match="all copies"):
        twisted.prefill([(0,), (1, 2)])


def test_a_runner_that_is_none_is_refused_first() -> None:
    for wrong in ("processes", bk.ProcessRunner, 2):
        with pytest.raises(bk.BayesKLRLError, match=r"bk\.ProcessRunner\(2\)"):
            bk.compare(POSTERIOR, {"row": bk.SMC(8)}, seed=0, runner=wrong)  # type: ignore[arg-type]
