"""A certificate of each checkpoint of a training, beside what its trainer logged: `certify_checkpoints`.

The logged reward says that a policy became better at its reward, and never how far it is from the posterior, which alone says
when to stop. All certificates share the part that depends on the posterior alone (`groundwork`) and one stream of random
numbers for the policy's draws. So the certificate of a checkpoint is the one that `certify` gives with the same seed, and the
differences between checkpoints are less noisy than those of independent certificates.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_klrl.analysis.certificate.certificate import Certificate, certified, groundwork
from bayes_klrl.analysis.certificate.coverage import Feature
from bayes_klrl.analysis.certificate.evidence import Settings
from bayes_klrl.analysis.certificate.text import interval_text, number
from bayes_klrl.analysis.certificate.training_runs.checkpoints import checkpoints_in
from bayes_klrl.analysis.certificate.training_runs.trainer_log import TrainerLog, log_of
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.errors import CheckpointError
from bayes_klrl.export.html import HtmlTable, html_page
from bayes_klrl.export.output_folder import naming_what_is_safe, prepare_output
from bayes_klrl.posterior import Posterior
from bayes_klrl.runners.runner import Runner
from bayes_klrl.runners.serial import chosen_runner
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import IntArray, Twist, TwistRecipe
from bayes_klrl.whole_files import whole_file, write_whole

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["CertificateCurve", "certify_checkpoints", "distance_to_posterior"]

_INTERVALS = ("reverse_kl", "forward_kl", "elbo", "log_evidence_bounds")


@dataclass(frozen=True, eq=False)
class CertificateCurve:
    """Certificates of the checkpoints of one training; `print` shows them as one table, the verdict first.

    Parameters
    ----------
    folder
        The run's folder.
    certificates
        A `Certificate` by step, ascending. Each is the one that `certify` gives for this checkpoint with the same seed.
    log
        What the trainer logged; None if there is no trainer_state.json.
    skipped
        Checkpoints that are not whole, with the reason, by the name of their folder.
    failure_probability
        The probability that some interval of the whole curve misses its value: at most the sum of those of the certificates.
    cost
        Seconds and model tokens, with the shared part once.
    names
        The name of a checkpoint's folder by step, where it is not `checkpoint-N` with N the step, as checkpoint-03.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0, bounds=(1, 3))
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> guides = {10: bk.NgramLM(np.log([0.6, 0.4]), eos_token_id=1), 20: bk.NgramLM(np.log([0.8, 0.2]), eos_token_id=1)}
    >>> curve = bk.CertificateCurve("run", {step: bk.certify(posterior, guide, seed=0) for step, guide in guides.items()})
    >>> curve.best_step, curve.table()["reverse_kl_high"].round(2).tolist()
    (20, [0.19, 0.14])
    """

    folder: str
    certificates: Mapping[int, Certificate]
    log: TrainerLog | None = field(default=None, repr=False)
    skipped: Mapping[str, str] = field(default_factory=dict)
    failure_probability: float = 0.0
    cost: Cost = field(default_factory=Cost)
    names: Mapping[int, str] = field(default_factory=dict)

    @property
    def steps(self) -> IntArray:
        """The steps of the checkpoints, ascending, shape (C,)."""
        return np.array(list(self.certificates), dtype=np.int64)

    @property
    def best_step(self) -> int:
        """The checkpoint with the lowest upper end of KL(policy || posterior); without upper ends that of the highest ELBO."""
        return min(self.certificates, key=lambda step: distance_to_posterior(self.certificates[step]))

    @property
    def verdict(self) -> str:
        """One sentence: which checkpoint is nearest, and where the last one is."""
        best, last = self.best_step, int(self.steps[-1])
        where = f"{self._name(best)} is nearest to the posterior, at {self._distance(best)} nats"
        others = "" if best == last else f"; the last, {self._name(last)}, is at {self._distance(last)}"
        found = "; ".join(f"{self._name(step)}: {text}" for text, step in self._findings().items())
        return f"{where}{others}" + (f"; {found}" if found else "")

    def __str__(self) -> str:
        shown = self._columns()
        rows = [[name, *values] for name, values in shown.items()]
        widths = [max(len(cell) for cell in column) for column in rows]
        lines = [self.verdict, "", self._heading()]
        for cells in zip(*rows, strict=True):
            line = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
            lines.append("  " + "  ".join(line))
        return "\n".join([*lines, *self._remarks()])

    def _repr_html_(self) -> str:
        shown = self._columns()
        table = HtmlTable(tuple(shown), list(zip(*shown.values(), strict=True)), words=(), caption=self._heading())
        return html_page(self.verdict, table, *self._remarks())

    def _heading(self) -> str:
        """Return what stands above the table."""
        return f"checkpoints of {self.folder}, nats (logged columns as the trainer has them)"

    def _columns(self) -> dict[str, list[str]]:
        """Return the cells of the table by column."""
        table = self.table()
        shown = {
            "step": map(str, self.steps),
            "KL(policy || posterior)": [interval_text(each.pooled.reverse_kl) for each in self.certificates.values()],
            "KL(posterior || policy)": [interval_text(each.pooled.forward_kl) for each in self.certificates.values()],
            "E[r]": table["reward"].map(number),
            "KL to prior": table["kl_prior"].map(number),
            "above frontier": table["frontier_gap"].map(number),
        }
        shown |= {f"logged {name}": table[f"logged_{name}"].map(number) for name in self._main_columns()}
        return {name: list(cells) for name, cells in shown.items()}

    def _remarks(self) -> list[str]:
        """Return what stands below the table: the failure probability, what was skipped, and notes."""
        counted = self.failure_probability == 0
        failure = f"failure probability: {self.failure_probability:g} for all checkpoints together"
        skipped = [f"skipped {name}: {reason}" for name, reason in self.skipped.items()]
        notes = {f"note: {note}": None for each in self.certificates.values() for note in each.notes}
        return ["all completions were counted" if counted else failure, *skipped, *notes]

    def table(self) -> pd.DataFrame:
        """Return a pandas DataFrame with one row per checkpoint: intervals in two columns each, and what was logged last.

        The logged columns are as the trainer has them: `logged_kl` of RLOO and GRPO is per token, `kl_prior` per completion.
        """
        import pandas as pd

        rows = []
        for step, each in self.certificates.items():
            row: dict[str, Any] = {}
            for name in _INTERVALS:
                row[f"{name}_low"], row[f"{name}_high"] = each.pooled[name]
            row |= {"reward": each.reward, "kl_prior": each.kl_prior, "implied_alpha": each.implied_alpha}
            row |= {"frontier_gap": each.frontier_gap, "frontier_gap_se": each.frontier_gap_se, "grade": each.grade}
            row |= {f"logged_{name}": self.log.at(name, step) for name in self._logged() if self.log is not None}
            row["findings"] = "; ".join(each.findings)
            rows.append(row)
        return pd.DataFrame(rows, index=pd.Index(self.steps, name="step"))

    def plot(self, file: str | Path) -> Path:
        """Draw KL(policy || posterior) over steps, beside the logged reward and KL, into a PNG, and return the file."""
        from bayes_klrl.analysis.certificate.training_runs.picture import plot_curve

        return plot_curve(self, file)

    def save(self, folder: str | Path) -> Path:
        """Write certificates.txt, table.csv and certificates.png into a folder, and return it.

        Raises
        ------
        BayesKLRLError
            If the folder holds something and was not written by this package, or cannot be written into.
        """
        out = prepare_output(folder)
        with naming_what_is_safe(out):
            write_whole(out / "certificates.txt", f"{self}\n")
            with whole_file(out / "table.csv") as unfinished:
                self.table().to_csv(unfinished)
            self.plot(out / "certificates.png")
        return out

    def _name(self, step: int) -> str:
        """Return the name of a checkpoint's folder."""
        return self.names.get(step, f"checkpoint-{step}")

    def _distance(self, step: int) -> str:
        """Return KL(policy || posterior) of a checkpoint in words."""
        low, high = self.certificates[step].pooled.reverse_kl
        if np.isposinf(high):
            on_support = self.certificates[step].pooled.reverse_kl_on_support
            if np.isfinite(on_support).all():
                return f"{interval_text(on_support)} (not counting what the posterior excludes)"
            return f"at least {number(low)}"
        return number((low + high) / 2) if high - low < 0.02 else f"{number(low)} to {number(high)}"

    def _findings(self) -> dict[str, int]:
        """Return what was found, each kind of it with the last checkpoint that it was found of."""
        kinds = {
            text.partition(":")[0]: (text, step) for step, each in self.certificates.items() for text in each.findings
        }
        return dict(kinds.values())

    def _main_columns(self) -> list[str]:
        """Return the names of what was logged as reward (or stands for it) and as KL."""
        return [] if self.log is None else self.log.main_names

    def _logged(self) -> list[str]:
        """Return the names of the logged columns: reward, KL and loss."""
        has_loss = self.log is not None and "loss" in self.log.values
        return list(dict.fromkeys([*self._main_columns(), *["loss"] * has_loss]))


def distance_to_posterior(certificate: Certificate) -> list[float]:
    """Return what is compared, in this order: the upper end of KL(q || p*), minus the ELBO's middle, KL(p* || q)."""
    pooled = certificate.pooled
    high, elbo = float(pooled.reverse_kl[1]), float(np.mean(pooled.elbo))
    forward = float(np.mean(pooled.forward_kl)) if np.isfinite(pooled.forward_kl).all() else np.inf
    return [high, -elbo, forward]


def certify_checkpoints(
    posterior: Posterior,
    folder: str | os.PathLike[str],
    *,
    seed: int,
    num_draws: int = 1024,
    num_particles: int = 64,
    num_runs: int = 24,
    failure_probability: float = 0.05,
    twist: Twist | TwistRecipe | float | None = None,
    exact: Sequences | Draws | None = None,
    feature: Feature | None = None,
    max_sequences: int = 200_000,
    max_proposals: int = 20_000,
    sampling_only: bool = False,
    progress: bool = False,
    runner: Runner | None = None,
) -> CertificateCurve:
    """Return a certificate of each `checkpoint-N` in a trainer's folder, beside what the trainer logged.

    Models and PEFT adapters of any trainer are read, those of TRL and transformers with their log (trainer_state.json). Files
    of optimizers and arguments are pickles, and are not opened.

    Parameters
    ----------
    posterior
        The prior, the likelihood and the prompts.
    folder
        The folder with the checkpoints, such as the `output_dir` of a TRL trainer. A checkpoint that is not whole, because it
        is being written, is skipped and named in `CertificateCurve.skipped`.
    seed
        Seed for all random numbers. Every certificate has the same streams, as if `certify` were called for each checkpoint
        with this seed; what depends on the posterior alone is computed once.
    failure_probability
        Of each certificate by itself, as for `certify`.
    num_draws, num_particles, num_runs, twist, exact, feature, max_sequences, max_proposals, sampling_only, progress, runner
        See `certify`.

    Raises
    ------
    CheckpointError
        If there is no whole checkpoint, or one that is not on the prior's vocabulary, or whose log is no trainer's; the
        message names it.
    BayesKLRLError
        As for `certify`.

    Examples
    --------
    >>> import tempfile, bayes_klrl as bk
    >>> prior = bk.TorchLM.from_pretrained("austen")
    >>> excited = bk.Reward(lambda completions: [c.count("!") for c in completions], alpha=1.0, bounds=(0, 3))
    >>> posterior = bk.Posterior(prior, excited, prompts="It was a fine morning", max_new_tokens=3)
    >>> with tempfile.TemporaryDirectory() as run:
    ...     prior.save_pretrained(f"{run}/checkpoint-10")  # in the place of a trainer
    ...     curve = bk.certify_checkpoints(posterior, run, seed=0, num_draws=64)
    >>> curve.steps.tolist(), "nothing was learned" in curve.verdict
    ([10], True)
    """
    start = time.perf_counter()
    if not isinstance(folder, str | os.PathLike):
        raise CheckpointError(
            f"folder is the path of a folder with checkpoints, a text or a pathlib.Path; got {folder!r}."
        )
    settings = Settings(
        seed=seed,
        num_draws=num_draws,
        num_particles=num_particles,
        num_runs=num_runs,
        failure_probability=failure_probability,
        max_sequences=max_sequences,
        max_proposals=max_proposals,
        sampling_only=sampling_only,
        progress=progress,
        runner=chosen_runner(runner),
    )
    ground = groundwork(posterior, settings, twist=twist, exact=exact)
    found = checkpoints_in(Path(folder))
    certificates = {}
    log = None
    for path in found.whole.values():  # a log that is no trainer's is refused before the first certificate
        with naming(path):
            log = log_of(path)  # the last one stays
    for step, path in found.whole.items():
        with naming(path):
            certificates[step] = certified(ground, path, feature)
    total = sum(each.failure_probability for each in certificates.values())
    # each certificate counts what it rests on, and all rest on the same
    tokens = sum(each.cost.model_tokens for each in certificates.values())
    shared = (len(certificates) - 1) * ground.cost.model_tokens
    cost = replace(ground.cost, seconds=time.perf_counter() - start, model_tokens=tokens - shared)
    return CertificateCurve(
        folder=str(folder),
        certificates=certificates,
        log=log,
        skipped=found.skipped,
        failure_probability=min(1.0, total),
        cost=cost,
        names={step: path.name for step, path in found.whole.items() if path.name != f"checkpoint-{step}"},
    )


@contextmanager
def naming(checkpoint: Path) -> Iterator[None]:
    """Put the name of a checkpoint before what is wrong with it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.name}: {error}") from error
