"""README.md does what it says, on one screen and a half.

Its python blocks run in order, sharing their names, in an empty folder; where the next block is fenced
"```text output", that is what the block printed. Commands in bash blocks are parsed: `bayes-klrl` by its own parser,
`make` by its targets. `tests/docs` does the same for the pages of the site.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: its info string, its text and the line on which the text starts."""

    info: str
    body: str
    line: int


def blocks(page: Path = README) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(match["info"].strip(), match["body"], text.count("\n", 0, match.start("body")) + 1)
        for match in FENCE.finditer(text)
    ]


def commands(page: Path = README) -> list[list[str]]:
    """The words of every command in the bash blocks, comments and prompts removed, continued lines joined."""
    lines = [
        line.strip().removeprefix("$ ")
        for block in blocks(page)
        if block.info in {"bash", "sh"}
        for line in block.body.replace("\\\n", " ").splitlines()
    ]
    parts = [part for line in lines for part in re.split(r"&&|;|\|", line)]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def commands_of(program: str, page: Path = README) -> list[list[str]]:
    return [words[1:] for words in commands(page) if Path(words[0]).name == program]


def targets_of() -> set[str]:
    """The targets of the Makefile."""
    return set(re.findall(r"^([a-z0-9]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def options_exist(words: list[str]) -> None:
    """The subcommand of `bayes-klrl` exists and has these options; nothing is run, no file is opened."""
    from typer.main import get_command

    from bayes_klrl.cli import app

    command, name, rest = get_command(app), "bayes-klrl", list(words)
    while rest and rest[0] in getattr(command, "commands", {}):
        name = rest.pop(0)
        command = command.commands[name]
    assert not hasattr(command, "commands") or "--help" in rest, f"{words}: no such subcommand"
    context = command.make_context(name, [], resilient_parsing=True)
    context.resilient_parsing = False
    command.make_parser(context).parse_args(rest)


def test_readme_has_its_parts() -> None:
    infos = [block.info for block in blocks()]
    assert "python" in infos
    assert set(infos) <= {"python", "bash", "text", "text output"}
    assert commands_of("bayes-klrl")


@pytest.mark.slow
def test_python_blocks_run_and_print_what_they_say(tmp_cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"__name__": "readme"}
    printed = ""
    for block in blocks():
        if block.info == "python":
            source = "\n" * (block.line - 1) + block.body  # so that a traceback names the line in README.md
            capsys.readouterr()
            exec(compile(source, str(README), "exec"), names)
            printed = capsys.readouterr().out
        elif block.info == "text output":
            assert printed.splitlines() == block.body.splitlines(), f"README.md:{block.line}"


@pytest.mark.parametrize("words", commands_of("bayes-klrl"), ids=" ".join)
def test_command_lines_parse(words: list[str]) -> None:
    options_exist(words)


@pytest.mark.parametrize("words", commands_of("make"), ids=" ".join)
def test_make_targets_exist(words: list[str]) -> None:
    assert {word for word in words if "=" not in word} <= targets_of()


def test_readme_is_a_screen_and_a_half_and_leads_to_the_site() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 110
    assert {"docs/start.md", "docs/reference/glossary.md", "docs/gallery.md"} <= set(
        re.findall(r"\]\(([^)#]+)\)", text)
    )
