"""Natural gradients of the ELBO in the space of the samples.

With J the matrix of the centred scores of K draws, F = J^T J / K the guide's Fisher matrix, and f the centred log-weights,
the damped natural gradient of the ELBO is the ridge regression of f on the scores,

    d = argmin 1/K |J d - f|^2 + lambda' |d - mu d_before|^2,      lambda' = lambda trace(F) / K,
      = mu d_before + J^T a / K,      (J J^T / K + lambda' I) a = f - mu J d_before,

so d is the score-function gradient with weights a in the place of f, and only a K x K system is solved ("minSR", Chen and Heyl
2024; with mu > 0 "SPRING", Goldshlager et al. 2024). The step is eta d with

    eta = min((1 - mu) gain, 1, sqrt(2 eps / (d^T F d))),      d^T F d = |J d|^2 / K,

so that the quadratic form of KL(q || q_new) is at most eps nats. At mu = 0 it is a Gauss-Newton step to the posterior, and f
goes to 0 with q -> p*. In directions that the present draws do not see, d_before is taken 1 / (1 - mu) times, and whole
steps with momentum diverge; hence the factor 1 - mu, and a mu that grows as t / (t + warm_up) over the steps t.

The draws need not come from the guide as it is: the same regression on earlier draws, scored again under the present guide, is
the one of the log-variance loss. On enumerable problems the draws of the last four steps together halve the error.

Equal draws are one row with their number as its weight, so no draw is in both halves when damping is chosen on held-out ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bayes_klrl.checks import check_positive
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.svi.pyro_backend.natural_gradient.per_sample import SampleScores

__all__ = ["NaturalGradient", "NaturalStep"]

_DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_FORGETTING = 0.7
_FEWEST = 8


@dataclass(frozen=True)
class NaturalStep:
    """What a step did.

    Parameters
    ----------
    kl
        The predicted KL by which it moved the guide, in nats: eta^2 d^T F d / 2.
    share
        eta, the share of d that was taken.
    damping
        lambda.
    explained
        Share of the variance of the log-weights that d predicts on its own draws, 1 - |f - J d|^2 / |f|^2.
    num_distinct
        Number of distinct draws.
    """

    kl: float
    share: float
    damping: float
    explained: float
    num_distinct: int


class NaturalGradient:
    """Steps along the natural gradient.

    Parameters
    ----------
    parameters
        The parameters of the guide, in the order of `PerSample.parameters`.
    momentum
        mu, at its largest: 0, or for instance 0.8 or 0.9 where the draws are few beside the directions that matter.
    damping
        lambda, relative to the mean eigenvalue trace(F) / K; "held_out": the value of a grid with which one half of the
        distinct draws predicts the log-weights of the other half best, tried every `tune_every` steps.
    max_kl
        eps, the most nats that a step moves the guide by.
    warm_up
        Number of steps after which mu would be 1/2.
    gain
        The largest share of d that is taken, over 1 - mu.
    tune_every
        Number of steps between two choices of damping.
    seed
        Seed of the halves.

    Raises
    ------
    BayesKLRLError
        If a number is out of its range.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        *,
        momentum: float = 0.0,
        damping: float | str = 0.03,
        max_kl: float = 0.2,
        warm_up: float = 4.0,
        gain: float = 1.0,
        tune_every: int = 5,
        seed: int = 0,
    ) -> None:
        if not 0 <= momentum < 1:
            raise BayesKLRLError(f"momentum is from 0 to below 1; got {momentum}.")
        if isinstance(damping, str) and damping != "held_out":
            raise BayesKLRLError(f"damping is a positive number or 'held_out'; got {damping!r}.")
        if not isinstance(damping, str):
            check_positive("damping", damping)
        check_positive("max_kl", max_kl)
        self.parameters = list(parameters)
        self.momentum, self.max_kl = float(momentum), float(max_kl)
        self.damping = 0.03 if isinstance(damping, str) else float(damping)
        self._warm_up, self._gain = warm_up, gain
        self._tune_every = tune_every if isinstance(damping, str) else 0
        self._generator = torch.Generator().manual_seed(seed)
        self._errors: Tensor | None = None
        self._before: list[Tensor] | None = None
        self._count = 0

    def step(
        self, scores: SampleScores, log_weights: Tensor, *, max_kl: float | None = None, shrink: float = 1.0
    ) -> NaturalStep:
        """Move the guide by a step that makes the ELBO larger.

        Parameters
        ----------
        scores
            The scores of the step's draws, at the present parameters.
        log_weights
            f (N, P): the log-weights in nats, or any other weights of the scores; they are centred here.
        max_kl
            eps of this step; None: the one of all steps.
        shrink
            Number that d is multiplied by before its length is limited, for a schedule.

        Returns
        -------
        What the step did. Each parameter's `grad` is d without the momentum term afterwards.
        """
        system = System.of(scores, log_weights)
        ahead = torch.zeros_like(system.target)
        momentum = min(self.momentum, self._count / max(self._count + self._warm_up, 1))
        shrink *= min(1.0, self._gain * (1 - momentum))
        if self._before is not None:
            ahead = momentum * (system.centring @ scores.along_rows(self._before))
        if self._tune_every and self._count % self._tune_every == 0:
            self._tune(system, system.target - ahead)
        self._count += 1
        weights = system.solve(system.target - ahead, self.damping)
        scores.write_rows(system.centring.T @ weights)
        predicted = ahead + system.gram @ weights
        length = float(system.share @ predicted.square()) * shrink**2
        limit = self.max_kl if max_kl is None else max_kl
        share = shrink * min(1.0, (2 * limit / length) ** 0.5 if length > 0 else 1.0)
        self._move(share, momentum)
        left, before = (float(system.share @ v.square()) for v in (system.target - predicted, system.target))
        return NaturalStep(
            kl=float(system.share @ predicted.square()) * share**2 / 2,
            share=share,
            damping=self.damping,
            explained=1 - left / before if before > 0 else 1.0,
            num_distinct=len(system.target),
        )

    def state(self) -> dict[str, Tensor]:
        """Return what later steps depend on, for a checkpoint."""
        found = {f"{i}.before": direction for i, direction in enumerate(self._before or [])}
        if self._errors is not None:
            found["errors"] = self._errors
        numbers = torch.tensor([self._count, self.damping], dtype=torch.float64, device="cpu")
        return found | {"numbers": numbers, "generator": self._generator.get_state()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        count, self.damping = state["numbers"].tolist()
        self._count, self._errors = int(count), state.get("errors")
        self._generator.set_state(state["generator"])
        kept = [state[f"{i}.before"].to(p) for i, p in enumerate(self.parameters) if f"{i}.before" in state]
        self._before = kept or None

    @torch.no_grad()
    def _move(self, share: float, momentum: float) -> None:
        directions = []
        for position, parameter in enumerate(self.parameters):
            assert parameter.grad is not None
            direction = parameter.grad
            if self.momentum:
                if self._before is not None:
                    direction = direction + momentum * self._before[position]
                directions.append(direction.clone())
            parameter.add_(direction, alpha=share)
        self._before = directions or None

    def _tune(self, system: System, target: Tensor) -> None:
        """Choose the damping with the smallest moving mean of the log of the held-out error."""
        if len(target) < 2 * _FEWEST:
            return
        errors = held_out_errors(system, target, _DAMPINGS, self._generator).log()
        if not bool(torch.isfinite(errors).all()):
            return
        self._errors = errors if self._errors is None else _FORGETTING * self._errors + (1 - _FORGETTING) * errors
        self.damping = _DAMPINGS[int(self._errors.argmin())]


@dataclass(frozen=True, eq=False)
class System:
    """The regression of centred log-weights on centred scores, one row per distinct draw.

    Parameters
    ----------
    gram
        The products of the centred scores, (R, R).
    target
        The centred log-weights, (R,).
    share
        The share of the draws that each row stands for, (R,).
    centring
        The matrix that subtracts from each row the mean of its prompt's draws, (R, R).
    num_draws
        K, the number of draws.
    """

    gram: Tensor
    target: Tensor
    share: Tensor
    centring: Tensor
    num_draws: int

    @classmethod
    def of(cls, scores: SampleScores, log_weights: Tensor) -> System:
        """Return the regression of all draws, each prompt's centred on its own."""
        index, counts = scores.index.flatten(), scores.counts.double()
        values = log_weights.detach().T.flatten().to(counts)
        if not bool(torch.isfinite(values).all()):
            raise BayesKLRLError("A natural gradient needs finite log-weights; a draw has one of -inf, +inf or NaN.")
        target = torch.zeros_like(counts).index_add_(0, index, values) / counts
        return cls.centred(scores.gram_of_rows, target, counts, scores.prompt)

    @classmethod
    def centred(cls, gram: Tensor, target: Tensor, counts: Tensor, prompt: Tensor) -> System:
        """Return the regression of rows with these products, log-weights and numbers of equal draws."""
        same = (prompt[:, None] == prompt).to(counts) * counts
        centring = torch.eye(len(counts), dtype=counts.dtype, device=counts.device) - same / same.sum(
            dim=1, keepdim=True
        )
        return cls(centring @ gram @ centring.T, centring @ target, counts / counts.sum(), centring, int(counts.sum()))

    def solve(self, target: Tensor, damping: float) -> Tensor:
        """Return c with d = sum_i c_i s_i (s_i centred), the damped regression of `target` on the scores."""
        root = self.share.sqrt()
        matrix = root[:, None] * self.gram * root
        scale = float(matrix.trace()) / self.num_draws
        matrix = matrix + max(damping * scale, 1e-12) * torch.eye(len(root), dtype=root.dtype, device=root.device)
        solved = torch.cholesky_solve((root * target)[:, None], torch.linalg.cholesky(matrix))[:, 0]
        return root * solved


def held_out_errors(system: System, target: Tensor, dampings: Sequence[float], generator: torch.Generator) -> Tensor:
    """Return for each damping the error with which half of the rows predicts the other, as a share of its variance.

    The two halves are exchanged, and the errors' mean is returned, (len(dampings),). Rows are distinct draws, so no draw is in
    both halves. Each half is centred on its own mean.
    """
    order = torch.randperm(len(target), generator=generator).to(target.device)
    middle = len(target) // 2
    errors = torch.zeros(len(dampings), dtype=target.dtype, device=target.device)
    for fitted, held in ((order[:middle], order[middle:]), (order[middle:], order[:middle])):
        root = (system.share[fitted] / system.share[fitted].sum()).sqrt()
        inner = system.gram[fitted[:, None], fitted]
        eigenvalues, vectors = torch.linalg.eigh(root[:, None] * inner * root)
        own = vectors.T @ (root * target[fitted])
        across = system.gram[held[:, None], fitted] * root @ vectors
        scale = eigenvalues.sum() / (system.num_draws / 2)
        share = system.share[held] / system.share[held].sum()
        seen = target[held] - share @ target[held]
        for place, damping in enumerate(dampings):
            predicted = across @ (own / (eigenvalues.clamp(min=0) + damping * scale))
            error = seen - (predicted - share @ predicted)
            errors[place] += share @ error.square() / (share @ seen.square()) / 2
    return errors
