"""The command line: what it writes, and that every bad call ends in one readable line and a non-zero code."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import bayes_klrl as bk
from bayes_klrl.cli import app

SMALL = """
import numpy as np
import bayes_klrl as bk

letters = bk.NgramLM.fit(["a cat sat", "the cat ran", "a rat sat"], order=3)
vowels = bk.Reward(lambda completions: [sum(map(text.count, "aeiou")) for text in completions], alpha=1.0)
posterior = bk.Posterior(letters, vowels, prompts=["the c", "a r"], max_new_tokens=3)
"""


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def small(tmp_cwd: Path) -> Path:
    file = tmp_cwd / "small.py"
    file.write_text(SMALL)
    return file


@pytest.mark.slow
def test_compare_writes_its_folder(small: Path, tmp_cwd: Path) -> None:
    result = run("compare", small, "--method", "prior-is", "--method", "exact", "--out", tmp_cwd / "out", "--quiet")
    assert result.exit_code == 0, result.output
    assert "log evidence" in result.output
    assert {"draws.nc", "table.csv", "comparison.png"} <= {path.name for path in (tmp_cwd / "out").iterdir()}


@pytest.mark.slow
def test_a_file_may_bring_its_own_algorithms_and_import_its_neighbours(small: Path, tmp_cwd: Path) -> None:
    (tmp_cwd / "sizes.py").write_text("num_draws = 50\n")
    small.write_text(SMALL + "import sizes\nalgorithms = {'mine': bk.ImportanceSampling(sizes.num_draws)}\n")
    result = run("compare", small, "--out", tmp_cwd / "out", "--quiet")
    assert result.exit_code == 0, result.output
    assert "mine" in result.output


def test_sample_prints_completions_and_saves_draws(small: Path, tmp_cwd: Path) -> None:
    result = run("sample", small, "--method", "exact", "--num", 4, "--out", tmp_cwd / "out", "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 2 * (1 + 4)  # a prompt and four lines, twice
    assert bk.Draws.load(tmp_cwd / "out" / "draws.nc").shape[0] == 2


def test_sample_shows_one_completion_per_line_with_the_whitespace_that_matters(tmp_cwd: Path) -> None:
    file = tmp_cwd / "spaces.py"
    file.write_text(
        "import bayes_klrl as bk\n"
        "letters = bk.NgramLM.fit([' a\\n', 'b '], order=2)\n"
        "only = bk.Constraint(lambda completions: [text == ' a\\n' for text in completions])\n"
        "posterior = bk.Posterior(letters, only, prompts=['b ', 'a'], max_new_tokens=4)\n"
    )
    result = run("sample", file, "--method", "exact", "--num", 2, "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == ["b␣", "␣a↵", "␣a↵", "a", "␣a↵", "␣a↵"]


@pytest.mark.slow
def test_certify_says_how_far_a_policy_is_and_writes_it_down(small: Path, tmp_cwd: Path) -> None:
    small.write_text(SMALL + "feature = lambda texts: ['a' in text for text in texts]\n")
    tuned = run("tune", small, "--steps", 3, "--particles", 8, "--out", tmp_cwd / "tuned", "--quiet")
    assert tuned.exit_code == 0, tuned.output
    policy = tmp_cwd / "tuned" / "policy"
    result = run("certify", small, "--policy", policy, "--draws", 64, "--out", tmp_cwd / "out", "--quiet")
    assert result.exit_code == 0, result.output
    assert "nats from the posterior" in result.output
    assert "exact (means over 2 prompts), nats" in result.output
    assert "feature" in result.output
    assert {"certificate.txt", "certificate.csv", "certificate.png"} <= {p.name for p in (tmp_cwd / "out").iterdir()}
    itself = run("certify", small, "--draws", 64, "--out", tmp_cwd / "out", "--quiet")  # no policy: the prior
    assert "the prior" in itself.output


@pytest.mark.slow
def test_amortise_trains_on_some_prompts_and_judges_on_others(small: Path, tmp_cwd: Path) -> None:
    words = ["amortise", small, "--draws", 32, "--out", tmp_cwd / "out", "--quiet"]
    alone = run(*words)
    assert alone.exit_code == 1
    assert "must also define `held_out`" in alone.output
    small.write_text(SMALL + "held_out = bk.Posterior(letters, vowels, prompts=['the r', 'a c'], max_new_tokens=3)\n")
    result = run(*words, "--steps", 3, "--prompts-per-step", 1)
    assert result.exit_code == 0, result.output
    assert "On 2 unseen prompts the guide is" in result.output
    names = {path.name for path in (tmp_cwd / "out").iterdir()}
    assert {"table.csv", "prompts.csv", "amortisation.png", "training.png", "policy"} <= names
    policy = tmp_cwd / "out" / "policy"
    assert run(*words, "--policy", policy).exit_code == 1  # it would be overwritten
    again = run(*words[:4], "--policy", policy, "--out", tmp_cwd / "other", "--quiet")
    assert again.exit_code == 0, again.output
    assert not (tmp_cwd / "other" / "training.png").exists()
    small.write_text(small.read_text() + "svi = bk.SVI(2, 4)\n")  # a training of the file's own
    assert run(*words).exit_code == 0


@pytest.mark.slow
def test_frontier_shows_the_curve_and_answers_for_alpha(small: Path, tmp_cwd: Path) -> None:
    words = ["frontier", small, "--num-draws", 500, "--kl", 0.2, "--out", tmp_cwd / "out", "--quiet"]
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "alpha =" in result.output
    assert {"frontier.csv", "frontier.png"} <= {path.name for path in (tmp_cwd / "out").iterdir()}
    beyond = run(*words[:4], "--kl", 50, "--out", tmp_cwd / "out", "--quiet")
    assert beyond.exit_code == 1
    assert run("frontier", small, "--kl", "nan", "--out", tmp_cwd / "other").exit_code == 1
    assert not (tmp_cwd / "other").exists()
    assert (tmp_cwd / "out" / "frontier.png").exists()  # the curve is written before the question fails


def test_help_lists_the_commands_in_the_order_of_the_work() -> None:
    shown = run("--help").output
    places = [shown.index(f"  {command} ") for command in ("compare", "amortise", "sample", "tune", "certify")]
    assert places == sorted(places)


@pytest.mark.slow
def test_tune_writes_a_policy(small: Path, tmp_cwd: Path) -> None:
    result = run("tune", small, "--steps", 3, "--particles", 8, "--out", tmp_cwd / "out", "--quiet")
    assert result.exit_code == 0, result.output
    assert bk.NgramLM.from_pretrained(tmp_cwd / "out" / "policy").order == 3


@pytest.mark.slow
def test_tune_keeps_what_was_learned_before_an_interrupt(small: Path, tmp_cwd: Path) -> None:
    small.write_text(
        SMALL.replace("sum(map(text.count", "interrupting() or sum(map(text.count").replace("letters =", CALLS)
    )
    result = run("tune", small, "--steps", 50, "--particles", 8, "--out", tmp_cwd / "out", "--quiet")
    assert result.exit_code == 0, result.output
    assert "Interrupted after" in result.output
    assert (tmp_cwd / "out" / "policy" / "config.json").exists()


def test_tune_keeps_what_was_learned_before_an_error(small: Path, tmp_cwd: Path) -> None:
    failing = CALLS.replace("raise KeyboardInterrupt", "raise OSError('the judge is gone')")
    small.write_text(
        SMALL.replace("sum(map(text.count", "interrupting() or sum(map(text.count").replace("letters =", failing)
    )
    result = run("tune", small, "--steps", 50, "--particles", 8, "--out", tmp_cwd / "out", "--quiet")
    assert result.exit_code == 1
    assert "the judge is gone" in result.output
    assert (tmp_cwd / "out" / "policy" / "config.json").exists()


CALLS = """
calls = []
def interrupting():
    calls.append(1)
    if len(calls) == 200:
        raise KeyboardInterrupt

letters ="""


@pytest.mark.parametrize(
    "words, code, message",
    [
        (
            ["compare", "--method", "magic"],
            2,
            "cannot use 'magic': it is neither a short name (prior-is, best-of-n, smc, svi, svi-is, exact) nor a call",
        ),
        (["compare", "--methods", "smc"], 2, "No such option"),
        (["compare", "nowhere.py"], 1, "There is no file 'nowhere.py'"),
        (["compare", "empty.py"], 1, "must define `posterior`"),
        (["compare", "broken.py"], 1, "raised ZeroDivisionError"),
        (["compare", "small.py", "--out", "theirs"], 1, "not written by bayes-klrl"),
        (["compare", "small.py", "--out", "small.py"], 1, "is a file"),
        (["compare", "small.py", "--policy", "theirs"], 1, "is not a model"),
        (["tune", "small.py", "--out", "theirs"], 1, "not written by bayes-klrl"),
        (["tune", "--adapter", "dora"], 2, 'must be "lora"'),
        (["tune", "small.py", "--adapter", "lora"], 1, "Adapters are for a bk.TorchLM"),
        (["tune", "small.py", "--learning-rate", "-1"], 1, "learning_rate must be a positive finite number"),
        (["sample", "small.py", "--num", "0"], 2, "Invalid value"),
        (["compare", "small.py", "--seed", "-1"], 2, "Invalid value"),
    ],
)
def test_bad_calls_end_in_a_line_and_a_code(
    words: list[str], code: int, message: str, small: Path, tmp_cwd: Path
) -> None:
    (tmp_cwd / "empty.py").write_text("x = 1\n")
    (tmp_cwd / "broken.py").write_text("1 / 0\n")
    (tmp_cwd / "theirs").mkdir()
    (tmp_cwd / "theirs" / "thesis.tex").write_text("x")
    result = run(*words, "--quiet")
    assert result.exit_code == code, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert sorted(path.name for path in (tmp_cwd / "theirs").iterdir()) == ["thesis.tex"]


def test_a_policy_in_the_output_folder_is_not_overwritten(small: Path, tmp_cwd: Path) -> None:
    result = run("compare", small, "--policy", tmp_cwd / "out" / "policy", "--out", tmp_cwd / "out", "--quiet")
    assert result.exit_code == 1
    assert "would be overwritten" in " ".join(result.output.split())


@pytest.mark.slow
def test_tune_goes_on_where_it_was_stopped(small: Path, tmp_cwd: Path) -> None:
    """The policy is that of a run that was not stopped, to the bit."""
    whole = run("tune", small, "--steps", 14, "--particles", 8, "--out", tmp_cwd / "whole", "--quiet")
    assert whole.exit_code == 0, whole.output
    command = ("tune", small, "--steps", 14, "--particles", 8, "--out", tmp_cwd / "parts", "--quiet")
    with pytest.MonkeyPatch.context() as patch:
        steps: list[int] = []

        def stopped(record: Any) -> bool:
            steps.append(1)
            if len(steps) == 12:
                raise RuntimeError("killed")
            return False

        patch.setattr("bayes_klrl.inference.svi.loop.call_all", lambda callbacks, record, guide: stopped(record))
        assert run(*command).exit_code != 0
    assert (tmp_cwd / "parts" / "training").is_dir()
    again = run(*command, "--resume")
    assert again.exit_code == 0, again.output
    assert not (tmp_cwd / "parts" / "training").exists()
    first, second = (
        {f.name: f.read_bytes() for f in (tmp_cwd / name / "policy").iterdir()} for name in ("whole", "parts")
    )
    assert first == second
    nothing = run("tune", small, "--out", tmp_cwd / "new", "--resume", "--quiet")
    assert nothing.exit_code != 0
    assert "holds none" in nothing.output
