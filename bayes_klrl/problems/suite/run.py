"""Methods against problems with known truth, at the same number of model tokens: `run_suite`.

Every method answers every problem `repeats` times; a number is a mean over repeats +- 1.96 sd / sqrt(repeats). A method that
fails gets a note in its cell, and the others keep their answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bayes_klrl.checks import check_count
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.export.html import html_page
from bayes_klrl.export.output_folder import naming_what_is_safe, prepare_output
from bayes_klrl.posterior import Posterior
from bayes_klrl.problems.record import Problem, Truth
from bayes_klrl.problems.suite.catalogue import SUITE, problem_names
from bayes_klrl.problems.suite.cell import SuiteCell
from bayes_klrl.problems.suite.methods import METHODS, Recipe, run_or_partial, tokens_per_completion
from bayes_klrl.problems.suite.table import SuiteTable, suite_table
from bayes_klrl.progress import progress_display, track
from bayes_klrl.randomness import check_seed, stream_seed
from bayes_klrl.runners.runner import Runner, Task, outcomes_of
from bayes_klrl.runners.serial import chosen_runner
from bayes_klrl.typing import Algorithm
from bayes_klrl.whole_files import whole_file

__all__ = ["DEFAULT_PROBLEMS", "SuiteResult", "run_suite"]

DEFAULT_PROBLEMS = ("P1", "P3", "P4", "P5", "P6", "P8", "P11", "P13")
"""The problems that are run if none are named: one size each, all on small tables, in a minute or two."""
_LEAST_COMPLETIONS = 64


@dataclass(frozen=True, eq=False)
class SuiteResult:
    """The answers of all methods to all problems, and the arguments of the run.

    Parameters
    ----------
    cells
        One answer for each problem, method and repeat, in that order.
    purposes
        The purpose of each problem, by its name.
    budget, repeats, seed
        The arguments of `run_suite`.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> result = bk.run_suite(["P1"], ["smc-exact-twist"], budget=2000, repeats=2)
    >>> [(cell.problem, cell.method, cell.repeat) for cell in result.cells]
    [('P1', 'smc-exact-twist', 0), ('P1', 'smc-exact-twist', 1)]
    >>> print(result.table().loc[("P1", "smc-exact-twist"), "answers"])
    2
    """

    cells: tuple[SuiteCell, ...]
    purposes: Mapping[str, str]
    budget: int
    repeats: int
    seed: int

    def table(self) -> SuiteTable:
        """Return a pandas DataFrame with one row per problem and method, which prints as a table.

        Columns: `log_evidence_error`, mean over repeats, with `..._ci`, 1.96 sd / sqrt(repeats), and `abs_log_evidence_error`;
        `kl_posterior` with its `_ci` and `kl_sign`; `reward_error` with `_ci`; the means of `ess`, `model_tokens`,
        `training_tokens` and `seconds`; `answers`, the number of repeats that gave an answer; `note`.
        """
        return suite_table(self.cells, self.purposes)

    def __str__(self) -> str:
        return f"{self._headline()}\n{self.table()}"

    def _repr_html_(self) -> str:
        return html_page(self._headline(), *self.table().html_parts())

    def _headline(self) -> str:
        return (
            f"{self.budget:,} model tokens per method, mean +- 1.96 sd / sqrt({self.repeats}), seed {self.seed}; nats"
        )

    def to_csv(self, file: str | Path) -> Path:
        """Write the table as CSV, whole or not at all, and return the file."""
        with whole_file(file) as unfinished:
            self.table().to_csv(unfinished)
        return Path(file)

    def plot(self, file: str | Path) -> Path:
        """Draw a panel for each problem, the error of log Z by method, into a PNG, and return the file."""
        from bayes_klrl.problems.suite.picture import plot_suite

        title = f"{self.budget:,} model tokens per method, {self.repeats} repeats"
        return plot_suite(self.cells, self.purposes, file, title=title)

    def save(self, folder: str | Path) -> Path:
        """Write table.csv and suite.png into a folder, and return it; refuses a folder that holds something else.

        Raises
        ------
        OutputError
            If the folder cannot be made, or a file cannot be written whole.
        """
        out = prepare_output(folder)
        with naming_what_is_safe(out):
            self.to_csv(out / "table.csv")
            self.plot(out / "suite.png")
        return out


def run_suite(
    names: Sequence[str] | str | None = None,
    methods: Sequence[str] | Mapping[str, Recipe] | None = None,
    *,
    budget: int = 100_000,
    seed: int = 0,
    repeats: int = 3,
    progress: bool = False,
    runner: Runner | None = None,
) -> SuiteResult:
    """Run methods on problems with known truth, each at the same number of model tokens.

    Parameters
    ----------
    names
        Names of problems in `bayes_klrl.problems.SUITE`, or "all"; None: `DEFAULT_PROBLEMS`.
    methods
        Names of methods in `problems.suite.methods.METHODS`; None: all of them. Or methods of your own: a mapping from names
        to functions `(posterior, size) -> Algorithm`, whose algorithm passes `size` completions per prompt through a model.
    budget
        Model tokens per answer, for all prompts together: drawing, scoring and training, as if no prefix were shared (see
        `problems.suite.methods`) and completions were as long as the prior's. The table shows the tokens that really went
        through the models, which are fewer where prefixes are shared.
    seed
        Seed for all random numbers; the stream of a cell depends on (seed, repeat, problem, method) only.
    repeats
        Runs of each method on each problem.
    progress
        Show a live display on standard error.
    runner
        Where the work is done: None, here; or a `ProcessRunner` or `RayRunner`, over whose workers problems and methods are
        spread. The answers are the same to the bit.

    Raises
    ------
    BayesKLRLError
        If a name is unknown, or the budget does not pay for 64 completions of some problem, before anything is run.

    Examples
    --------
    >>> result = run_suite(["P6"], ["prior-is", "smc-exact-twist"], budget=2000, repeats=2)
    >>> bool(abs(result.table().loc[("P6", "smc-exact-twist"), "log_evidence_error"]) < 1e-9)
    True
    """
    check_count("budget", budget)
    check_count("repeats", repeats)
    check_seed(seed)
    chosen = problem_names(tuple(SUITE) if names == "all" else names, DEFAULT_PROBLEMS)
    recipes = _recipes(methods)
    problems = [SUITE[name] for name in chosen]
    for problem in problems:
        _check_budget(problem, budget)
    runner = chosen_runner(runner)
    cells: list[SuiteCell] = []
    with progress_display(progress), track("suite", len(problems) * len(recipes), progress) as advance:
        tasks = []
        for problem in problems:
            advance(0, status=f"{problem.name}: {problem.purpose}")
            per_completion = tokens_per_completion(problem.posterior, seed)
            for method, recipe in recipes.items():
                arguments = (problem, method, recipe, budget, seed, repeats, per_completion)
                tasks.append(Task(f"{problem.name}: {method}", _answers, arguments))
        for task, outcome in zip(tasks, outcomes_of(runner, tasks, advance=advance), strict=True):
            if outcome.error is None:
                cells += outcome.value
            else:
                names = (task.arguments[0].name, task.arguments[1])
                cells += [SuiteCell(*names, repeat, note=_described(outcome.error)) for repeat in range(repeats)]
    return SuiteResult(tuple(cells), {each.name: each.purpose for each in problems}, budget, repeats, seed)


def _recipes(methods: Sequence[str] | Mapping[str, Recipe] | None) -> dict[str, Recipe]:
    """Return the methods to run; the error for an unknown one lists them all."""
    if methods is None:
        return dict(METHODS)
    if isinstance(methods, Mapping):
        recipes = dict(methods)
        for name, recipe in recipes.items():
            if not isinstance(name, str) or not callable(recipe):
                raise BayesKLRLError(
                    f"A method of your own must be a name with a function (posterior, size) -> Algorithm; got {name!r}: "
                    f"{recipe!r}."
                )
    else:
        asked = [methods] if isinstance(methods, str) else list(methods)
        for name in asked:
            if name not in METHODS:
                raise BayesKLRLError(f"There is no method {name!r} in the suite; choose from {', '.join(METHODS)}.")
        recipes = {name: METHODS[name] for name in asked}
    if not recipes:
        raise BayesKLRLError(f"methods is empty; choose from {', '.join(METHODS)}, or leave it out for all.")
    return recipes


def _check_budget(problem: Problem, budget: int) -> None:
    """Refuse a budget that is not worth running."""
    posterior = problem.posterior
    least = _LEAST_COMPLETIONS * posterior.num_prompts * posterior.max_new_tokens
    if budget < least:
        raise BayesKLRLError(
            f"A budget of {budget:,} model tokens is too small for {problem.name}, with {posterior.num_prompts} prompt(s) and "
            f"up to {posterior.max_new_tokens} tokens: give at least {least:,} ({_LEAST_COMPLETIONS} completions each), or "
            "leave the problem out."
        )


def _answers(
    problem: Problem,
    method: str,
    recipe: Recipe,
    budget: int,
    seed: int,
    repeats: int,
    per_completion: float,
    *,
    progress: bool,  # noqa: ARG001  (of tasks; these runs are short)
) -> list[SuiteCell]:
    """Return a method's cells for one problem; an error becomes a note, so that the other methods keep their answers."""
    posterior, stream = problem.posterior, f"{problem.name} {method}"
    try:
        algorithm = recipe(posterior, int(budget / per_completion))
    except Exception as error:  # the same for every repeat
        return [SuiteCell(problem.name, method, repeat, note=_described(error)) for repeat in range(repeats)]
    return [_cell(problem, method, repeat, algorithm, stream_seed(seed, repeat, stream)) for repeat in range(repeats)]


def _cell(problem: Problem, method: str, repeat: int, algorithm: Algorithm, seed: int) -> SuiteCell:
    """Return one answer, judged."""
    try:
        draws, note = run_or_partial(algorithm, problem.posterior, seed)
    except Exception as error:  # see `_answers`
        return SuiteCell(problem.name, method, repeat, note=_described(error))
    kl_sign, kl = _kl_posterior(draws, problem.truth)
    return SuiteCell(
        problem.name,
        method,
        repeat,
        log_evidence_error=evidence_error(draws, problem.truth),
        kl_posterior=kl,
        kl_sign=kl_sign,
        reward_error=_reward_error(draws, problem.posterior, problem.truth),
        ess=float(draws.ess.min()),
        model_tokens=float(draws.model_tokens),
        training_tokens=float(draws.training_tokens),
        seconds=float(draws.seconds + draws.training_seconds),
        note=note,
    )


def evidence_error(draws: Draws, truth: Truth) -> float:
    """Return log Z-hat minus the nearest value that the truth allows, for means over prompts."""
    estimate = float(draws.log_evidence.mean())
    return estimate - float(np.clip(estimate, *truth.mean_bounds)) if not np.isneginf(estimate) else -np.inf


def _kl_posterior(draws: Draws, truth: Truth) -> tuple[str, float]:
    """Return KL(answer || posterior), mean over prompts, and what kind of number it is.

    Rejection: 0. Weighted draws, one of them drawn by weight: at most log Z - E log Z-hat (theory.md 6.7), which the mean over
    repeats estimates. Best-of-n: KL(. || prior) - E[r] / alpha + log Z. Markov chains: unknown.
    """
    log_evidence = float(truth.mean_bounds[1])
    if draws.method == "RejectionSampling":
        return ("=", 0.0) if draws.shape[1] else ("", np.nan)
    if not np.isnan(draws.log_evidence).any():
        return "<=", log_evidence - float(draws.log_evidence.mean())
    if "kl_prior" in draws.info:
        return "~", float((draws.info["kl_prior"] - draws.mean(draws.log_likelihood)).mean()) + log_evidence
    return "", np.nan


def _reward_error(draws: Draws, posterior: Posterior, truth: Truth) -> float:
    """Return E[r] - its true value, mean over prompts; NaN for constraints, whose reward says nothing, and without draws."""
    alive = draws.shape[1] > 0 and bool(np.isfinite(draws.log_weights).any(axis=1).all())
    if posterior.likelihood.alpha is None or not alive:
        return np.nan
    return float((draws.mean(draws.reward) - truth.reward).mean())


def _described(error: Exception) -> str:
    """Return an error as a note."""
    return str(error) if isinstance(error, BayesKLRLError) else f"{type(error).__name__}: {error}"
