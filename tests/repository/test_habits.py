"""What surrounds the code: pre-commit, citation, templates and hosted CI say what is true."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # comes with transformers

import bayes_klrl

ROOT = Path(__file__).parents[2]


def loaded(name: str) -> Any:
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"{name} is not part of this distribution")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def make_target(name: str) -> str:
    """The commands of a target of the Makefile."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    found = re.search(rf"^{name}:.*\n((?:\t.*\n)*)", text, re.M)
    assert found, f"no target {name}"
    return found.group(1)


def test_pre_commit_runs_what_make_lint_runs() -> None:
    """By the tools of .venv, so that their versions are those of constraints.txt."""
    hooks = [hook for repo in loaded(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    lint = make_target("lint")
    for hook in hooks:
        assert hook["language"] == "system"
        assert hook["entry"].startswith(".venv/bin/")
        words = hook["entry"].removeprefix(".venv/bin/").split()
        assert "$(BIN)/" + " ".join(words[:2] if words[0] == "ruff" else words) in lint
    assert len({hook["entry"] for hook in hooks}) == len(lint.strip().splitlines())


def test_the_citation_is_of_this_version() -> None:
    citation = loaded("CITATION.cff")
    assert citation["version"] == bayes_klrl.__version__
    assert citation["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_hosted_ci_runs_what_ci_runs() -> None:
    workflow = loaded(".github/workflows/ci.yml")
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    (step,) = [step for step in steps if step.get("run") == "bash .ci/run"]
    assert step["env"]["PYTHON"] == "python"  # else the Makefile may find another one than the matrix says
    versions = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert all(isinstance(version, str) for version in versions)  # 3.10 as a number would be 3.1
    assert "3.11" in versions  # the floor


@pytest.mark.parametrize("name", ["bug_report", "feature_request"])
def test_issue_forms_have_what_the_platform_needs(name: str) -> None:
    form = loaded(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= form.keys()
    assert all({"type", "id", "attributes"} <= part.keys() and part["attributes"]["label"] for part in form["body"])


def test_the_chooser_of_issue_forms_is_configured() -> None:
    assert loaded(".github/ISSUE_TEMPLATE/config.yml").keys() <= {"blank_issues_enabled", "contact_links"}


def test_a_report_of_a_wrong_number_says_how_to_repeat_it() -> None:
    form = loaded(".github/ISSUE_TEMPLATE/bug_report.yml")
    asked = " ".join(f"{part['attributes']['label']} {part['attributes']['description']}" for part in form["body"])
    assert all(word in asked for word in ("enumerate", "seed", "truth", "Versions"))


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *(
        f"docs/{name}.md"
        for name in ("theory", "extending", "training", "chat", "rewards", "policies", "adapters", "peers", "gpu")
    ),
]


@pytest.mark.parametrize("name", PAGES)
def test_links_within_the_repository_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{name}: {target}"


def test_what_security_promises() -> None:
    """No pickle and no code of a checkpoint: the words that would switch them on stand nowhere."""
    for path in (ROOT / "bayes_klrl").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in text, path
        assert "allow_pickle=True" not in text, path
        if path != ROOT / "bayes_klrl/runners/transport.py":  # between processes of one run
            assert not re.search(r"\btorch\.load\(|^import pickle|\bpickle\.load", text, re.M), path


@pytest.mark.slow
def test_transformers_is_always_told_to_trust_no_code() -> None:
    """Left out, it would ask the user, who may say yes."""
    loads = {}
    for path in (ROOT / "bayes_klrl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and re.fullmatch(
                r"(Auto\w+|factory)\.from_pretrained", ast.unparse(node.func)
            ):
                told = [ast.unparse(word.value) for word in node.keywords if word.arg == "trust_remote_code"]
                loads[f"{path}:{node.lineno}"] = told == ["False"]
    assert loads
    assert all(loads.values()), [place for place, told in loads.items() if not told]
