"""`--chat`: text prompts of a posterior file as messages, and `sample` showing turns."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import bayes_klrl as bk
from bayes_klrl.cli import app
from tests.helpers.chat import chat_lm

FILE = """
import bayes_klrl as bk

def many_a(completions):
    return [completion[0]["content"].count("a") for completion in completions]

prior = bk.TorchLM.from_pretrained("model", check=False)
posterior = bk.Posterior(prior, bk.Reward(many_a, alpha=1.0), prompts={prompts}, max_new_tokens=3)
"""


def sampled(folder: Path, prompts: object, *words: str) -> Result:
    chat_lm().save_pretrained(folder / "model")
    (folder / "chat.py").write_text(FILE.format(prompts=prompts))
    command = ["sample", "chat.py", "--method", "prior-is", "--num", "2", "--quiet", "--out", "out", *words]
    return CliRunner().invoke(app, command)


def test_texts_become_messages_of_the_user(tmp_cwd: Path) -> None:
    result = sampled(tmp_cwd, ["a b", "c"], "--chat")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert (lines[0], lines[3]) == ("user: a b", "user: c")
    assert all(line.startswith("assistant: ") for line in (*lines[1:3], *lines[4:6]))
    read = bk.Draws.load(tmp_cwd / "out" / "draws.nc")
    assert read.prompts[1] == ({"role": "user", "content": "c"},)


def test_messages_of_a_file_need_no_option(tmp_cwd: Path) -> None:
    turns = [
        {"role": "system", "content": "c"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    result = sampled(tmp_cwd, turns)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:2] == ["system: c", "user: a"]
    assert all(
        line.startswith("assistant: b") for line in lines[2:4]
    )  # the completion continues the turn that was begun


def test_ids_and_a_missing_template_are_refused(tmp_cwd: Path) -> None:
    result = sampled(tmp_cwd, [[6, 7]], "--chat")
    assert result.exit_code == 1
    assert "Prompt 0 is a list of token ids" in result.stderr
    shipped = CliRunner().invoke(app, ["sample", "--chat", "--quiet"])
    assert shipped.exit_code == 1
    assert "no chat template" in " ".join(shipped.stderr.split())


@pytest.mark.parametrize("command", ["compare", "sample", "tune", "certify", "frontier", "amortise"])
def test_every_command_with_a_posterior_file_takes_it(command: str) -> None:
    assert "--chat" in CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).stdout
