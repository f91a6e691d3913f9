"""The result of SVI: a trained guide q, the approximate posterior, with its history and draws from it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from bayes_klrl.checks import check_count
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.sampling.drawing import draw
from bayes_klrl.posterior import Posterior
from bayes_klrl.randomness import Streams
from bayes_klrl.typing import FloatArray, LanguageModel
from bayes_klrl.whole_files import check_folder

__all__ = ["Fit"]


@dataclass(frozen=True, eq=False)
class Fit:
    """A trained guide, as `SVI.fit` returns it.

    Parameters
    ----------
    guide
        The approximate posterior q, a language model.
    history
        Arrays of one value per step, means over prompts in nats: "elbo", "reward" (in its own units), "kl" (to the prior),
        "log_weight_sd", "ess" (the effective sample size of the step's N draws of a prompt, weighted by w = p0 exp(r / alpha)
        / q: from 1 to N, and N where the guide is the posterior), "gradient_norm", "learning_rate" (of Adam; the share of a
        natural step that was taken; NaN with "kl_sgd"), "step_kl" (how far the step moved the guide; NaN where it was not
        measured), "seconds".
    posterior
        The posterior that the guide approximates.
    training
        Seconds and tokens of the training.
    interrupted
        Whether Ctrl-C ended the training early.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> fit = bk.SVI(num_steps=30).fit(posterior, seed=0)
    >>> fit.history["elbo"].shape, bool(fit.history["elbo"][-1] > fit.history["elbo"][0])
    ((30,), True)
    >>> fit.run(100, seed=1)
    Draws(SVI: 100 draws x 1 prompts, log evidence [nan])
    """

    guide: LanguageModel
    history: Mapping[str, FloatArray] = field(repr=False)
    posterior: Posterior
    training: Cost
    interrupted: bool = False

    method: ClassVar[str] = "SVI"

    def _repr_html_(self) -> str:
        from bayes_klrl.export.html import HtmlTable, html_page

        steps = len(self.history["elbo"])
        first, last = (self.history["elbo"][end] for end in (0, -1)) if steps else (float("nan"), float("nan"))
        ended = "was interrupted" if self.interrupted else "ended"
        rows = [
            [name, *(f"{float(values[at]):,.4g}".replace("nan", "-") for at in (0, len(values) // 2, -1))]
            for name, values in self.history.items()
            if len(values)
        ]
        return html_page(
            f"The training {ended} after {steps} steps; its ELBO went from {first:.3f} to {last:.3f} nats",
            HtmlTable(("history", "first step", "middle", "last step"), rows),
            f"{type(self.guide).__name__}, {self.training_tokens:,} training tokens, {self.seconds:.1f} s",
        )

    @property
    def training_tokens(self) -> int:
        """Number of tokens that went through a model in training."""
        return self.training.training_tokens

    @property
    def seconds(self) -> float:
        """Wall time of the training."""
        return self.training.training_seconds

    def save(self, folder: str | Path, *, merged: bool = True, certificate: Any | None = None) -> Path:
        """Write the guide in the format that `from_pretrained` reads, with a model card, and return the folder.

        The card, README.md, says which posterior the guide approximates and how it was trained. A README.md that was not
        written by this package is kept: the card is then in BAYES_KLRL.md, and a warning says so.

        Parameters
        ----------
        folder
            The folder, which is made if it is not there.
        merged
            True: adapters are added to the weights, and the folder holds a whole model. False: the adapter stays an adapter,
            a few files that `peft` and trainers read, which name the prior's folder as their base.
        certificate
            A `Certificate` of the guide, to be quoted in the model card; on held-out prompts, too. Prior and guide score a few
            of its draws anew, so that one of another policy is refused.

        Raises
        ------
        OutputError
            If it cannot be written. A new folder is then not there; one that held a model is as it was.
        BayesKLRLError
            If the certificate is none, or is of another posterior or policy. Nothing was written then.
        """
        if certificate is not None:
            from bayes_klrl.analysis.certificate.quoted import check_is_of

            check_is_of(certificate, self.posterior, self.guide)
        check_folder(folder)
        from bayes_klrl.export.model_card import card_before, write_card

        before = card_before(Path(folder))
        self._save_guide(folder, merged)
        is_adapter = (Path(folder) / "adapter_config.json").is_file()
        write_card(Path(folder), self._card(is_adapter=is_adapter, certificate=certificate), before)
        return Path(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        merged: bool = True,
        certificate: Any | None = None,
        commit_message: str = "Upload a guide trained with bayes_klrl",
    ) -> str:
        """Write the guide as `save` does and upload it to the Hugging Face hub; return the address of the commit.

        Parameters
        ----------
        repo_id
            The repository, "owner/name", which is made if it is not there. A README.md in it that was not written by this
            package is kept.
        private
            Whether a new repository is private; None: what the owner's settings say.
        token
            A token with the right to write; None: the one of `hf auth login`.
        merged, certificate
            See `save`.
        commit_message
            The message of the commit.

        Raises
        ------
        BayesKLRLError
            If the name cannot be a repository's, if the hub refuses, or if an adapter's base is a folder of this machine.
        """
        from bayes_klrl.export.hub import check_repo_id, push_folder

        check_repo_id(repo_id)
        with TemporaryDirectory() as folder:
            self.save(Path(folder) / "guide", merged=merged, certificate=certificate)
            return push_folder(Path(folder) / "guide", repo_id, private=private, token=token, message=commit_message)

    def _card(self, *, is_adapter: bool, certificate: Any | None) -> str:
        """Return the text of the model card."""
        from bayes_klrl.export.model_card import model_card

        last = {name: float(values[-1]) for name, values in self.history.items() if len(values)}
        shown = {"elbo": "ELBO, nats", "reward": "mean reward", "kl": "KL to the prior, nats"}
        training = {
            "method": self.method,
            "steps": f"{len(self.history.get('elbo', ()))}{' (interrupted)' if self.interrupted else ''}",
            **{f"{label}, last step": f"{last[name]:.4g}" for name, label in shown.items() if name in last},
            "tokens through a model": f"{self.training_tokens:,}",
            "seconds": f"{self.seconds:.0f}",
        }
        return model_card(
            self.posterior,
            training=training,
            is_adapter=is_adapter,
            how_to_load=self._how_to_load(),
            certificate=certificate,
        )

    def _how_to_load(self) -> str:
        """Return the call that reads what `save` wrote."""
        return f"{type(self.guide).__name__}.from_pretrained(folder)"

    def _save_guide(self, folder: str | Path, merged: bool) -> None:
        """Write the guide alone; see `save`."""
        if not hasattr(self.guide, "save_pretrained"):
            raise BayesKLRLError(f"A {type(self.guide).__name__} has no save_pretrained, so it cannot be saved.")
        if merged:
            self.guide.save_pretrained(folder)
        elif hasattr(self.guide, "save_adapter"):
            self.guide.save_adapter(folder)
        else:
            raise BayesKLRLError(f"A {type(self.guide).__name__} has no adapter to save apart. Leave out merged=False.")

    def run(self, num_draws: int, seed: int, *, progress: bool = False) -> Draws:
        """Return equally weighted draws from the guide; their `elbo` is the mean of log p0(x) + r(x) / alpha - log q(x).

        `ImportanceSampling(num_draws, proposal=fit.guide)` corrects the draws for the difference of guide and posterior.
        """
        check_count("num_draws", num_draws)
        start, posterior = time.perf_counter(), self.posterior
        drawn = draw(
            (self.guide, posterior.prior),
            posterior,
            num_draws,
            Streams.of(seed),
            description="drawing from the guide",
            progress=progress,
        )
        log_guide, log_prior = drawn.log_probs
        draws = Draws.equally_weighted(
            posterior,
            drawn.sequences,
            method=self.method,
            reward=drawn.reward,
            log_prior=log_prior,
            log_proposal=log_guide,
            cost=Cost(time.perf_counter() - start, drawn.model_tokens, self.training_tokens, self.seconds),
        )
        elbo = (log_prior + draws.log_likelihood - log_guide).mean(axis=1)
        return replace(draws, elbo=elbo, guide=self.guide, info=drawn.info)
