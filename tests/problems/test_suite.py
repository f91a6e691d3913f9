"""The suite end to end: matched budgets, judged answers, notes instead of exceptions, table, picture, command line."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import bayes_klrl as bk
from bayes_klrl.cli import app
from bayes_klrl.problems import SUITE, Problem, by_enumeration, by_messages, constraint_text, gold_posterior
from bayes_klrl.problems.suite import run as suite_module
from bayes_klrl.problems.suite.cell import SuiteCell
from bayes_klrl.problems.suite.methods import METHODS, tokens_per_completion
from bayes_klrl.problems.suite.run import run_suite
from bayes_klrl.problems.suite.table import suite_table


@pytest.fixture(scope="module")
def result() -> bk.SuiteResult:
    methods = ["prior-is", "best-of-n", "rejection", "suffix-mh", "annealed-smc", "smc", "smc-exact-twist"]
    return run_suite(["P1", "P6"], methods, budget=6000, repeats=10, seed=1)


@pytest.mark.slow
def test_answers_are_judged_by_the_truth(result: bk.SuiteResult) -> None:
    table = result.table()
    assert table.index.names == ["problem", "method"]
    assert (table["answers"] == 10).all()
    for problem in ("P1", "P6"):
        exact = table.loc[(problem, "smc-exact-twist")]
        assert abs(exact["log_evidence_error"]) < 1e-10
        assert exact["kl_posterior"] < 1e-10
        assert table.loc[(problem, "rejection"), ["kl_sign", "kl_posterior"]].tolist() == ["=", 0.0]
        assert np.isnan(table.loc[(problem, "suffix-mh"), "log_evidence_error"])
        assert table.loc[(problem, "best-of-n"), "kl_posterior"] > 0.1  # it is another distribution
        for method in ("prior-is", "annealed-smc", "smc", "rejection"):
            row = table.loc[(problem, method)]
            assert abs(row["log_evidence_error"]) < 5 * row["log_evidence_error_ci"] / 1.96
            assert abs(row["reward_error"]) < 5 * row["reward_error_ci"] / 1.96


def test_a_cell_by_hand() -> None:
    result = run_suite(["P1"], ["prior-is"], budget=3000, repeats=1)
    (cell,) = result.cells
    posterior, truth = SUITE["P1"].posterior, SUITE["P1"].truth
    size = int(3000 / tokens_per_completion(posterior, 0))
    seed = bk.randomness.stream_seed(0, 0, "P1 prior-is")
    draws = bk.ImportanceSampling(size).run(posterior, seed=seed)
    assert cell.log_evidence_error == pytest.approx(draws.log_evidence[0] - truth.log_evidence[0], abs=1e-12)
    assert cell.kl_posterior == pytest.approx(-cell.log_evidence_error)
    assert cell.reward_error == pytest.approx(draws.mean(draws.reward)[0] - truth.reward[0], abs=1e-12)
    assert cell.ess == draws.ess[0]


def test_a_cell_depends_on_its_own_name_only() -> None:
    alone = run_suite(["P6"], ["smc"], budget=3000, repeats=2, seed=7)
    among = run_suite(["P1", "P6"], ["prior-is", "smc"], budget=3000, repeats=2, seed=7)
    found = [cell for cell in among.cells if (cell.problem, cell.method) == ("P6", "smc")]
    assert [cell.log_evidence_error for cell in alone.cells] == [cell.log_evidence_error for cell in found]


@pytest.mark.slow
def test_budgets_are_matched_where_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a larger vocabulary hardly a prefix is shared, so that the tokens counted are the tokens asked for."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((300, 300)) * 0.3
    prior = bk.NgramLM(table - np.log(np.exp(table).sum(axis=1, keepdims=True)), eos_token_id=None)
    reward = bk.AutomatonReward(
        bk.Automaton(np.zeros((1, 300), dtype=int)),
        token_rewards=0.2 * rng.standard_normal(300),
        alpha=1.0,
        bounds=(-9, 9),
    )
    problem = Problem("X", "a test", lambda: bk.Posterior(prior, reward, max_new_tokens=12), by_messages)
    monkeypatch.setitem(suite_module.__dict__, "SUITE", {"X": problem})
    monkeypatch.setitem(suite_module.__dict__, "problem_names", lambda names, default: tuple(names))
    result = run_suite(["X"], [name for name in METHODS if name != "rejection"], budget=40_000, repeats=1)
    for cell in result.cells:
        spent = cell.model_tokens + cell.training_tokens
        assert cell.note == "", cell
        assert 0.8 * 40_000 < spent < 1.15 * 40_000, cell


def test_bounds_leave_no_error_between_them() -> None:
    class Answer:
        def __init__(self, value: float) -> None:
            self.log_evidence = np.array([value, value])

    from bayes_klrl.problems import Truth
    from bayes_klrl.problems.suite.run import evidence_error

    truth = Truth.between(np.array([[-3.0, -1.0], [-3.0, -1.0]]), np.array([-2.5, -1.5]), "bounds")
    errors = [evidence_error(Answer(value), truth) for value in (-2.0, -2.6, -1.0, -np.inf)]  # type: ignore[arg-type]
    assert errors == pytest.approx([0.0, -0.1, 0.5, -np.inf])


def test_what_fails_is_a_note() -> None:
    def broken(posterior: bk.Posterior, size: int) -> bk.Algorithm:
        raise RuntimeError("out of memory")

    own = {"mine": lambda posterior, size: bk.ImportanceSampling(size), "broken": broken, "svi-is": METHODS["svi-is"]}
    result = run_suite(["P4", "P6"], own, budget=4000, repeats=2)
    table = result.table()
    assert table.loc[("P6", "broken"), "note"] == "RuntimeError: out of memory"
    assert table.loc[("P6", "broken"), "answers"] == 0
    assert "gradient steps" in table.loc[("P4", "svi-is"), "note"]
    assert table.loc[("P6", "mine"), "answers"] == 2
    assert "P6, broken: RuntimeError" in str(result)


def test_a_method_that_dies_has_no_evidence() -> None:
    table = run_suite(["P4-long"], ["smc", "rejection", "smc-exact-twist"], budget=12_000, repeats=2).table()
    assert table.loc[("P4-long", "smc"), "log_evidence_error"] == -np.inf
    assert "0 of" in table.loc[("P4-long", "rejection"), "note"]
    assert abs(table.loc[("P4-long", "smc-exact-twist"), "log_evidence_error"]) < 1e-9


@pytest.mark.slow
def test_svi_drops_a_mode_and_its_evidence_says_so() -> None:
    row = run_suite(["P6"], ["svi-is"], budget=100_000, repeats=2).table().loc[("P6", "svi-is")]
    assert row["log_evidence_error"] == pytest.approx(-np.log(2), abs=0.05)
    assert abs(row["reward_error"]) < 0.05  # which its reward does not show
    assert row["training_tokens"] > row["model_tokens"]


def test_means_and_intervals_of_a_table() -> None:
    cells = [
        SuiteCell("X", "m", i, log_evidence_error=e, kl_posterior=-e, kl_sign="<=", model_tokens=10.0)
        for i, e in enumerate((-0.1, 0.3))
    ]
    row = suite_table([*cells, SuiteCell("X", "m", 2, note="broke")], {"X": "a test"}).loc[("X", "m")]
    assert row["log_evidence_error"] == pytest.approx(0.1)
    assert row["log_evidence_error_ci"] == pytest.approx(1.96 * np.sqrt(0.08) / np.sqrt(2))
    assert row["abs_log_evidence_error"] == pytest.approx(0.2)
    assert row["kl_posterior"] == 0  # a bound of -0.1, by chance
    assert (row["answers"], row["note"]) == (2, "broke")


def test_bad_requests_name_what_there_is() -> None:
    with pytest.raises(bk.BayesKLRLError, match=r"no problem 'P10'.*P1, P1-sharp"):
        run_suite(["P10"], budget=1000)
    with pytest.raises(bk.BayesKLRLError, match=r"no method 'ppo'.*prior-is, best-of-n"):
        run_suite(["P1"], ["ppo"], budget=1000)
    with pytest.raises(bk.BayesKLRLError, match=r"too small for P1.*at least 384"):
        run_suite(["P1"], budget=100)
    with pytest.raises(bk.BayesKLRLError, match="methods is empty"):
        run_suite(["P1"], [])
    with pytest.raises(bk.BayesKLRLError, match="repeats must be"):
        run_suite(["P1"], repeats=0)
    with pytest.raises(bk.BayesKLRLError, match="name with a function"):
        run_suite(["P1"], {"x": 3})  # type: ignore[dict-item]


@pytest.mark.slow
def test_saved_results(result: bk.SuiteResult, tmp_path: Path) -> None:
    folder = result.save(tmp_path / "out")
    again = pd.read_csv(folder / "table.csv", index_col=["problem", "method"])
    pd.testing.assert_series_equal(again["log_evidence_error"], pd.Series(result.table()["log_evidence_error"]))
    assert (folder / "suite.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "suite.png").stat().st_size > 20_000
    result.save(folder)  # ours may be overwritten


def test_command_line(tmp_cwd: Path) -> None:
    runner = CliRunner()
    done = runner.invoke(
        app, ["suite", "p6", "--method", "smc", "--budget", "2000", "--repeats", "2", "--quiet", "--out", "o"]
    )
    assert done.exit_code == 0, done.output
    assert "two modes" in done.output
    assert sorted(p.name for p in Path("o").iterdir()) == [".bayes-klrl", "suite.png", "table.csv"]
    refused = runner.invoke(app, ["suite", "p6", "--method", "ppo", "--out", "q"])
    assert refused.exit_code == 1
    assert "choose from prior-is" in refused.output
    assert not Path("q").exists()


def test_problems_of_any_kind_can_be_judged() -> None:
    assert by_enumeration(gold_posterior(max_new_tokens=3)).is_exact
    assert by_messages(constraint_text(12)).source == "messages"
