"""`--method`: short names and calls of any public algorithm, read without running them; refusals that name the cure."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer
from typer.testing import CliRunner, Result

import bayes_klrl as bk
from bayes_klrl.cli import app
from bayes_klrl.cli.methods import DEFAULT_METHODS, SHORT_NAMES, algorithms_of

SMALL = """
import numpy as np
import bayes_klrl as bk

coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0, bounds=(1, 3))
posterior = bk.Posterior(coin, longer, prompts=[()], max_new_tokens=3)
"""


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def small(tmp_cwd: Path) -> Path:
    file = tmp_cwd / "small.py"
    file.write_text(SMALL)
    return file


@pytest.mark.parametrize(
    "text, algorithm",
    [
        ("AnnealedSMC(256)", bk.AnnealedSMC(256)),
        (" SMC( 8, ess_threshold = 0.25 ) ", bk.SMC(8, ess_threshold=0.25)),
        ("ImportanceSampling(1000, proposal=SVI(60))", bk.ImportanceSampling(1000, proposal=bk.SVI(60))),
        ("QuasiRejection(10, bound=-1.5)", bk.QuasiRejection(10, bound=-1.5)),
        ("SVI(5, max_step_kl=1e999, adapter=None)", bk.SVI(5, max_step_kl=np.inf)),
        ("SMC(8, twist=DistilledTwist(order=2), proposal='twisted')", None),
    ],
)
def test_a_call_makes_what_it_says(text: str, algorithm: bk.Algorithm | None) -> None:
    ((row, made),) = algorithms_of([text], 120).items()
    assert row == text.strip()
    if algorithm is None:
        algorithm = bk.SMC(8, twist=bk.DistilledTwist(order=2), proposal="twisted")
    assert made == algorithm


def test_short_names_are_calls_with_the_steps_filled_in() -> None:
    rows = algorithms_of(list(SHORT_NAMES), 7)
    assert list(rows) == ["prior IS", "best of 16", "SMC", "SVI", "SVI, then IS", "exact"]
    assert rows["SVI"] == bk.SVI(7)
    assert rows["SVI, then IS"] == bk.ImportanceSampling(1000, proposal=bk.SVI(7))
    assert rows["exact"] == bk.Exact()
    assert set(DEFAULT_METHODS) == set(SHORT_NAMES) - {"exact"}


def test_a_name_of_a_row_never_holds_a_slash() -> None:
    """A slash would separate groups in draws.nc."""
    assert list(algorithms_of(["SMC(8, resampling='systematic') # 1/2"], 1)) == [
        "SMC(8, resampling='systematic') # 1 2"
    ]


@pytest.mark.slow
def test_an_algorithm_of_a_new_file_is_reachable_without_a_change_here(
    monkeypatch: pytest.MonkeyPatch, small: Path, tmp_cwd: Path
) -> None:
    @dataclasses.dataclass(frozen=True)
    class Halving:
        """Importance sampling with half of the draws."""

        num_draws: int

        def run(self, posterior: bk.Posterior, *, seed: int, progress: bool = False) -> bk.Draws:
            return bk.ImportanceSampling(self.num_draws // 2).run(posterior, seed=seed)

    monkeypatch.setattr(bk, "Halving", Halving, raising=False)
    monkeypatch.setattr(bk, "__all__", [*bk.__all__, "Halving"])
    result = run("compare", small, "--method", "Halving(60)", "--method", "exact", "--out", "out", "--quiet")
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_cwd / "out" / "table.csv", index_col="method")
    assert list(table.index) == ["Halving(60)", "exact"]
    draws = bk.compare(bk.Posterior(*_parts(), max_new_tokens=3), {"Halving(60)": bk.ImportanceSampling(30)}, seed=0)
    assert table.loc["Halving(60)", "log_evidence"] == pytest.approx(draws["Halving(60)"].log_evidence[0])
    assert run("sample", small, "--method", "Halving(60)", "--num", 3, "--quiet").stdout.count("\n") == 3


def _parts() -> tuple[bk.NgramLM, bk.TokenReward]:
    longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0, bounds=(1, 3))
    return bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1), longer


@pytest.mark.parametrize(
    "text, message",
    [
        ("magic", "'magic': it is neither a short name (prior-is,"),
        ("SMC", "Write SMC(...) with its arguments"),
        ("SMC(", "nor a call in Python's syntax"),
        ("", "nor a call in Python's syntax"),
        ("SMC(8); Exact()", "nor a call in Python's syntax"),
        ("SCM(8)", "no public name 'SCM'. Did you mean SMC?"),
        ("bk.SMC(8)", "no public name 'bk.SMC'. Did you mean SMC?"),
        ("__import__('os').system('touch hacked')", "no public name"),
        ("SMC(__import__('os').system('touch hacked'))", "no public name"),
        ("SMC(8, twist=open('hacked', 'w'))", "no public name 'open'"),
        ("SMC([open('hacked', 'w')])", "is neither a literal nor a call of a public class"),
        ("SMC(num)", "the argument num is neither a literal"),
        ("SMC(8 * 8)", "the argument 8 * 8 is neither a literal"),
        ("SMC(*[8])", "the argument *[8] is neither a literal"),
        ("SMC(**{'num_particles': 8})", "it has **"),
        ("SMC(8, twist=1.0, twist=2.0)", "it has twist= twice"),
        ("SMC()", "SMC does not accept these arguments"),
        ("SMC(0)", "num_particles must be"),
        ("SMC(8, speed=3)", "unexpected keyword argument 'speed'"),
        ("ImportanceSampling(8, proposal=SVI(0))", "SVI does not accept these arguments: num_steps must be"),
        ("NgramLM([0.0])", "NgramLM is not an algorithm"),
        ("ConditionalSMC(SMC(8))", "ConditionalSMC is not an algorithm"),
        ("Fit(1, 2)", "Fit is not an algorithm"),
        ("Algorithm()", "Algorithm does not accept these arguments"),
        ("run_suite('all')", "run_suite is a function"),
        ("SMC(8, twist=run_suite('all'))", "run_suite is a function"),
        ("(" * 5000 + ")" * 5000, "nor a call in Python's syntax"),
    ],
)
def test_refusals_name_the_value_the_rule_and_the_cure(text: str, message: str, tmp_cwd: Path) -> None:
    with pytest.raises(typer.BadParameter) as refused:
        algorithms_of([text], 120)
    assert message in str(refused.value)
    assert text.strip() in str(refused.value)
    assert refused.value.param_hint == "--method"
    assert not list(tmp_cwd.iterdir())


def test_a_refusal_ends_in_a_line_and_a_code_before_the_file_is_read(tmp_cwd: Path) -> None:
    (tmp_cwd / "broken.py").write_text("1 / 0\n")
    for command in ("compare", "sample"):
        result = run(command, "broken.py", "--method", "SCM(8)")
        assert result.exit_code == 2
        assert "Did you mean SMC?" in " ".join(result.output.split())
        assert "Traceback" not in result.output
    assert [path.name for path in tmp_cwd.iterdir()] == ["broken.py"]


def test_refusals_and_numpy_algorithms_load_no_torch(tmp_cwd: Path) -> None:
    code = (
        "import sys, typer\n"
        "from bayes_klrl.cli.methods import algorithms_of\n"
        "algorithms_of(['smc', 'AnnealedSMC(8)', 'ImportanceSampling(8, proposal=SVI(3))'], 5)\n"
        "try:\n    algorithms_of(['SCM(8)'], 5)\nexcept typer.BadParameter:\n    pass\n"
        "print({'torch', 'jax', 'transformers', 'pandas', 'matplotlib'} & set(sys.modules))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


def test_algorithms_of_a_file_must_be_a_dict(small: Path, tmp_cwd: Path) -> None:
    small.write_text(SMALL + "algorithms = [bk.SMC(8)]\n")
    result = run("compare", small, "--out", "out", "--quiet")
    assert result.exit_code == 1
    assert "must be a dict from names to algorithms" in " ".join(result.output.split())
