"""Several algorithms on one posterior, side by side: `compare` and the `Comparison` it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_klrl.analysis.comparison.rows import answers
from bayes_klrl.analysis.comparison.table import (
    ComparisonTable,
    comparison_verdict,
    method_row,
    reference_log_evidence,
    unseen_note,
)
from bayes_klrl.checks import check_count, check_posterior_given
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.export.html import HtmlTable, html_page
from bayes_klrl.export.output_folder import check_group_name, naming_what_is_safe, prepare_output
from bayes_klrl.inference.svi.fit import Fit
from bayes_klrl.models.decoding import check_proposal
from bayes_klrl.posterior import Posterior
from bayes_klrl.progress import progress_display
from bayes_klrl.prompts.words import visible
from bayes_klrl.randomness import stream_seed
from bayes_klrl.runners.runner import Runner
from bayes_klrl.runners.serial import chosen_runner
from bayes_klrl.typing import Algorithm, GuideRecipe, is_algorithm
from bayes_klrl.whole_files import whole_file

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """The answers of several algorithms to one posterior.

    Parameters
    ----------
    posterior
        The posterior that was answered.
    algorithms
        The algorithms, by the name of their row.
    draws
        The answers by row, one `Draws` per repeat.
    fits
        The trained guides, by the first row that used them.
    failures
        Error messages by row; such a row keeps the answers of the repeats that succeeded, if any.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> comparison = bk.compare(posterior, {"exact": bk.Exact(), "SMC": bk.SMC(64)}, seed=0)
    >>> comparison["exact"].log_evidence.round(3), comparison["SMC"].shape
    (array([2.108]), (1, 64))
    >>> print(comparison.table().loc["exact", "kl_posterior"])
    0.0
    """

    posterior: Posterior
    algorithms: Mapping[str, Algorithm]
    draws: Mapping[str, tuple[Draws, ...]]
    fits: Mapping[str, Fit] = field(default_factory=dict, repr=False)
    failures: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Draws:
        """The draws of one method in the first repeat."""
        return self.draws[name][0]

    def table(self) -> ComparisonTable:
        """Return a pandas DataFrame with one row per method, which prints as a table.

        The columns are means over prompts, in nats: `log_evidence` with `log_evidence_se`; `elbo`; `reward` (E[r], in its own
        units); `kl_prior`, KL(answer || prior); `kl_posterior`, KL(answer || posterior), and in `kl_posterior_sign` whether
        it is the value ("=", where the log evidence is exact) or an approximation ("~"); `tokens_per_effective_draw`, the
        model tokens of one effective draw; `ess` and `pareto_k`, those of the worst prompt; `distinct`, the number of
        distinct completions; `model_tokens`, `training_tokens`, `seconds`, `training_seconds`; `note`.

        An effective draw is one unit of the effective sample size, summed over prompts. Independent draws of equal weight
        count as one each: those of a guide or of best-of-n are draws of the guide or of best-of-n, not of the posterior, and
        `kl_posterior` says how far that is. Training is not in this number. It is NaN for an enumeration, which has no draws.
        """
        reference = reference_log_evidence(self.algorithms, self.draws)
        rows: dict[str, dict[str, Any]] = {}
        for name, algorithm in self.algorithms.items():
            rows[name] = method_row(algorithm, self.draws[name], reference) if name in self.draws else {"note": ""}
            unseen = unseen_note(name, self.algorithms, self.draws) if name in self.draws else ""
            notes = [rows[name]["note"], unseen, *self._notes(name)]
            rows[name]["note"] = "; ".join(note for note in notes if note)
        return ComparisonTable.of(rows)

    def _notes(self, name: str) -> list[str]:
        """Return the notes on a row that its numbers do not show: failures and interrupted training."""
        notes = [f"failed: {self.failures[name]}"] if name in self.failures else []
        fit = self.fits.get(name)
        if fit is not None and fit.interrupted:
            notes.append(f"training was interrupted after {len(fit.history['elbo'])} steps")
        return notes

    def _repr_html_(self) -> str:
        table, parts = self.table(), []
        if self.posterior.prior.tokenizer is not None:
            rows = [[name, visible(texts[0][0])] for name, texts in self.samples(1).items()]
            words = next(iter(self.draws.values()))[0].prompt_words(most=200)[0]
            parts.append(
                HtmlTable(("method", "one completion"), rows, words=(0, 1), caption=f"after the prompt: {words}")
            )
        return html_page(comparison_verdict(table), *table.html_parts(), *parts)

    def samples(self, num: int = 3, seed: int = 0) -> dict[str, list[list[str]]]:
        """Return `num` completions per prompt, drawn by weight, for each method that has positive weights for every prompt."""
        alive = {
            name: draws[0] for name, draws in self.draws.items() if np.isfinite(draws[0].log_weights).any(axis=1).all()
        }
        return {name: draws.resample(num, seed).texts() for name, draws in alive.items()}

    def to_arviz(self) -> xr.DataTree:
        """Return an xarray DataTree with one child per method (and repeat), whatever ArviZ is installed.

        ArviZ 1.x takes a child as it is, `az.summary(tree["SMC"])`, and several by name,
        `az.plot_forest({name: tree[name] for name in ("SMC", "SVI")})`. For ArviZ 0.x make an InferenceData of it,
        `az.InferenceData.from_datatree(tree["SMC"])`, or take `comparison["SMC"].to_arviz()`, which is the same.
        """
        from bayes_klrl.export.datatree import comparison_to_datatree

        return comparison_to_datatree(self._named_draws())

    def plot(self, file: str | Path) -> Path:
        """Draw evidence, reward against KL, effective sample sizes and rewards into one image."""
        from bayes_klrl.analysis.comparison.picture import plot_comparison

        table = self.table()
        kl = {name: float(table.loc[name, "kl_prior"]) for name in self.draws}
        return plot_comparison({name: draws[0] for name, draws in self.draws.items()}, file, kl=kl)

    def save(self, folder: str | Path) -> Path:
        """Write draws.nc, table.csv, PNG plots and every trained policy into a folder, and return it.

        Raises
        ------
        BayesKLRLError
            If the folder exists and holds something that is not ours.
        OutputError
            If the folder cannot be made, or a file cannot be written whole; the error names the files that were written.
        """
        from bayes_klrl.export.pictures import plot_history
        from bayes_klrl.export.sealed_files import write_sealed

        out = prepare_output(folder)
        with naming_what_is_safe(out):  # small files first
            with whole_file(out / "table.csv") as unfinished:
                self.table().to_csv(unfinished)
            self.plot(out / "comparison.png")
            write_sealed(self.to_arviz(), out / "draws.nc")
            for number, (name, fit) in enumerate(self.fits.items()):
                suffix = "" if number == 0 else f"-{number + 1}"
                plot_history(fit.history, out / f"training{suffix}.png", title=name)
                if hasattr(fit.guide, "save_pretrained"):
                    fit.save(out / f"policy{suffix}")
        return out

    def _named_draws(self) -> dict[str, Draws]:
        """Return the draws by method, numbered from the second repeat on."""
        return {
            _numbered(name, repeat): draws
            for name, repeats in self.draws.items()
            for repeat, draws in enumerate(repeats)
        }


def compare(
    posterior: Posterior,
    algorithms: Mapping[str, Algorithm],
    *,
    seed: int,
    repeats: int = 1,
    progress: bool = False,
    runner: Runner | None = None,
) -> Comparison:
    """Run several algorithms on one posterior and return their answers, side by side.

    SVIs that train alike, alone or as proposals, are fitted once per repeat and shared; their training tokens have a column of
    their own. The random stream of a row depends on (seed, repeat, name), not on the other rows or their order. A method that
    fails gets a note in its row, and the others keep their answers.

    Parameters
    ----------
    posterior
        The posterior to answer.
    algorithms
        The algorithms by the names of their rows, in the order of the table.
    seed
        Seed for all random numbers.
    repeats
        How often each method is run; the table then shows averages, evidences averaged on the natural scale.
    progress
        Show a live display on standard error.
    runner
        Where the work is done: None, here; `ProcessRunner(2)`, in two processes; or a `RayRunner`. Prompts, rows and repeats
        are spread over its workers, and the draws are the same to the bit. `Draws.seconds` is then the work of all workers.

    Raises
    ------
    BayesKLRLError
        If an argument or a proposal cannot be right, before anything is run; the first error, if every method failed.
        A `RunnerError` if something cannot be sent to the workers.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> rows = {"exact": bk.Exact(), "prior IS": bk.ImportanceSampling(1000)}
    >>> table = bk.compare(posterior, rows, seed=0).table()
    >>> print(table["kl_prior"].round(1).to_dict())
    {'exact': 0.3, 'prior IS': 0.3}
    """
    check_posterior_given(posterior)
    check_count("repeats", repeats)
    stream_seed(seed, 0, "")
    _check_algorithms(algorithms, posterior)
    _check_numbered(algorithms, repeats)
    runner = chosen_runner(runner)
    with progress_display(progress):
        found = answers(posterior, algorithms, seed=seed, repeats=repeats, runner=runner, progress=progress)
    if not found.draws:
        raise next(iter(found.failures.values()))
    return Comparison(
        posterior,
        dict(algorithms),
        {name: tuple(found.draws[name]) for name in algorithms if name in found.draws},
        found.fits,
        {name: str(error) for name, error in found.failures.items()},
    )


def _numbered(name: str, repeat: int) -> str:
    """Return the name under which the draws of a repeat are saved."""
    return name if repeat == 0 else f"{name} #{repeat + 1}"


def _check_numbered(algorithms: Mapping[str, Algorithm], repeats: int) -> None:
    """Refuse a row that has the name of another row's repeat: only one of the two would be saved."""
    for name in algorithms:
        for repeat in range(1, repeats):
            if _numbered(name, repeat) in algorithms:
                raise BayesKLRLError(
                    f"{_numbered(name, repeat)!r} is the name of repeat {repeat + 1} of {name!r}, and of a row of its own. "
                    "Rename the row."
                )


def _check_algorithms(algorithms: Mapping[str, Algorithm], posterior: Posterior) -> None:
    """Refuse arguments that cannot be right, before the first run starts."""
    if not isinstance(algorithms, Mapping) or not algorithms:
        raise BayesKLRLError('algorithms must be a non-empty mapping from names, such as {"SMC": bk.SMC(256)}.')
    for name, algorithm in algorithms.items():
        check_group_name(name)
        if isinstance(algorithm, type) or not is_algorithm(type(algorithm)):
            cure = (
                " Give bk.ImportanceSampling(1000, proposal=fit.guide), or the recipe."
                if isinstance(algorithm, Fit)
                else ""
            )
            raise BayesKLRLError(f"{name!r} is not an algorithm: {algorithm!r} has no run(posterior, seed=...).{cure}")
        proposal = getattr(algorithm, "proposal", None)
        is_twisted = isinstance(proposal, str) and proposal == "twisted"  # of SMC, which makes it itself
        if not (proposal is None or is_twisted or isinstance(proposal, GuideRecipe)):
            check_proposal(proposal, posterior.prior)
