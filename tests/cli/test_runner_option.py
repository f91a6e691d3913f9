"""`--runner`: the same table from two processes, for a file that imports its neighbour; what cannot be meant is refused."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bayes_klrl.cli import app

FILE = """
import bayes_klrl as bk
from paying import pays

prior = bk.NgramLM.fit(["1+2=3.", "2+2=4.", "3+2=5."], order=2)
right = bk.Reward(pays, alpha=0.5, bounds=(0, 1))
posterior = bk.Posterior(prior, right, prompts=["1+2=", "2+2=", "3+2="], answer=["3", "4", "5"], max_new_tokens=4)
algorithms = {"SMC": bk.SMC(300)}
"""
NEIGHBOUR = "def pays(completions, answer):\n    return [float(a in c) for c, a in zip(completions, answer)]\n"


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


@pytest.mark.slow
def test_a_file_and_its_neighbour_run_in_processes(tmp_cwd: Path) -> None:
    Path("mine.py").write_text(FILE)
    Path("paying.py").write_text(NEIGHBOUR)
    tables = []
    for number, runner in enumerate(("serial", "processes:1")):
        out = f"out{number}"
        result = run("compare", "mine.py", "--runner", runner, "--quiet", "--out", out)
        assert result.exit_code == 0, result.output
        tables.append([line.split(",")[1:9] for line in Path(out, "table.csv").read_text().splitlines()])
    assert tables[0] == tables[1]


@pytest.mark.parametrize("value", ["processes:0", "processes:two", "serial:2", "ray:", "threads"])
def test_what_is_no_runner_is_refused_with_the_values_that_are(value: str) -> None:
    result = run("frontier", "--runner", value)
    assert result.exit_code == 2
    assert f"cannot use {value!r}. Write serial, processes" in result.output


@pytest.mark.parametrize("command", ["compare", "certify", "frontier", "suite"])
def test_every_command_that_can_be_spread_takes_it(command: str) -> None:
    assert "--runner" in run(command, "--help").output
