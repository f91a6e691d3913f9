"""Every page's Python compiles and names what exists; `make docs` runs the notebooks, other tests the older pages."""

import ast
import re
from pathlib import Path

import pytest

from tests.docs import DOCS, ROOT
from tests.repository.test_readme import blocks, commands_of, options_exist, targets_of

PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
NAMES = set(re.findall(r" as (\w+)$", (ROOT / "bayes_klrl" / "__init__.pyi").read_text(encoding="utf-8"), re.MULTILINE))
EXAMPLES = {"AntitheticSampling"}  # what docs/extending.md adds to the package
USED = re.compile(r"\bbk\.([A-Za-z_]\w*)")
CELL = "{code-cell} python"
NOTEBOOK = "---\nfile_format: mystnb\nkernelspec:\n  name: python3\n"

# Pages with plain Python, which `make docs` does not run: the test that does, or the reason why nothing does.
OLDER = {
    "adapters.md": "fragments, whose posterior the reader has",
    "chat.md": "tests/prompts/test_chat_page.py",
    "extending.md": "tests/repository/test_extending.py",
    "files.md": "a fragment, which needs a full disk",
    "gpu.md": "for a card",
    "large_models.md": "a plan of a model with 7 billion parameters",
    "papers.md": "commands of seven minutes, whose code tests/benchmarks/test_papers.py runs",
    "policies.md": "tests/analysis/certificate/training_runs/test_policies_page.py",
    "ranks.md": "for several processes",
    "rewards.md": "tests/reward_functions/test_rewards_page.py",
    "runners.md": "for several processes",
}


def names(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


def unknown_names(text: str) -> list[str]:
    """The names after `bk.` that are not public; `__file__` and the like are Python's."""
    return sorted({name for name in USED.findall(text) if name not in NAMES | EXAMPLES and not name.startswith("__")})


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_python_compiles_and_names_what_exists(page: Path) -> None:
    for block in blocks(page):
        if block.info in {"python", "py", CELL}:
            source = re.sub(r"^:tags: .*\n", "", block.body)
            compile(source, f"{names(page)}:{block.line}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    assert unknown_names(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_what_is_called_a_notebook_is_run(page: Path) -> None:
    infos = [block.info for block in blocks(page)]
    assert (CELL in infos) == page.read_text(encoding="utf-8").startswith(NOTEBOOK)
    assert "python" not in infos or names(page) in OLDER, "write {code-cell} python, which make docs runs, or py"
    assert not [info for info in infos if info.startswith("{code-cell}") and info != CELL]


def test_the_tests_of_older_pages_exist() -> None:
    assert [test for test in OLDER.values() if test.startswith("tests/") and not (ROOT / test).is_file()] == []


@pytest.mark.parametrize(
    "page, words",
    [(page, words) for page in PAGES for words in commands_of("bayes-klrl", page)],
    ids=lambda value: names(value) if isinstance(value, Path) else " ".join(value),
)
def test_command_lines_parse(page: Path, words: list[str]) -> None:
    options_exist(words)


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of("make", page)], ids=names)
def test_make_targets_exist(page: Path) -> None:
    wanted = {word for words in commands_of("make", page) for word in words if "=" not in word and '"' not in word}
    assert wanted <= targets_of()


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_to_files_lead_somewhere(page: Path) -> None:
    """As on a code host; anchors are checked by `make docs`."""
    text = re.sub(r"^(`{3,}).*?^\1", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text) + re.findall(r"`[^`<]*<([^>`]+)>`", text)
    lost = [target for target in targets if "/" in target or "." in target]
    assert [target for target in lost if not (page.parent / target).exists()] == []


def test_the_finders_find() -> None:
    assert unknown_names("bk.SMC(2), bk.smc, bk.__file__ and bk.Nothing") == ["Nothing", "smc"]
    with pytest.raises(Exception, match="No such option"):
        options_exist(["compare", "--no-such-option"])
