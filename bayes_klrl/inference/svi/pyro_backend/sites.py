"""The terms of a particle's log-weight, site by site, in a joint Pyro model of completions and other latents.

    log w = sum over the model's sites of log p(site | parents) - sum over the guide's sites of log q(site | parents)

`x` is the sequence site, which has no pathwise gradient. Every other latent z (weights of a reward, an unknown alpha) must
be reparametrised, z = g(noise, parents), whichever of x and z is drawn first. Terms inside the plate of x belong to their own
prompt, as a plate promises; those outside belong to the particle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.svi.refusals import check_same_latents, completion_text, no_density
from bayes_klrl.models.programs.pyro_program import SequenceDistribution, to_sequences

__all__ = ["SiteTerms", "check_bounded", "random_sites", "site_terms"]

SEQUENCE_SITE = "x"


@dataclass(frozen=True)
class SiteTerms:
    """The parts of the log-weights of N particles for P prompts, in nats, each divided by the scale of x."""

    log_prior: Tensor
    """log p(x), (N, P)."""
    log_guide: Tensor
    """log q(x), (N, P), with its graph."""
    inside: Tensor
    """The sum of log p - log q of the other sites inside the plate of x, (N, P), with its graph."""
    outside: Tensor
    """The sum of log p - log q of the sites outside the plate of x, (N,), with its graph."""
    raw_log_guide: Tensor
    """log q(x) neither scaled nor masked, (N, P); its gradient is the score."""
    whole: bool
    """Whether a latent outside the plate may depend on x, so that the draw of one prompt affects all terms."""
    joint: bool
    """Whether there is any site besides x and the factors inside its plate."""
    scale: Any
    """The scale of x: P / prompts_per_step where prompts are subsampled."""


def random_sites(trace: Any) -> Iterator[tuple[str, Any]]:
    """Yield the sample sites that have a density: no subsampling, no deterministic values."""
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or isinstance(site["fn"], _Subsample) or site["infer"].get("_deterministic"):
            continue
        yield name, site


def site_terms(model_trace: Any, guide_trace: Any, particle_dim: int) -> SiteTerms:
    """Return all terms of log w; the model was replayed on the guide's draws, with its particles in dimension `particle_dim`.

    Raises
    ------
    BayesKLRLError
        If guide and model do not have the same latents, or one of them beside x has no reparametrisation.
    UnboundedLossError
        If a term is -inf; the message names the completion.
    """
    model, guide = dict(random_sites(model_trace)), dict(random_sites(guide_trace))
    check_sites(model, guide)
    x = guide[SEQUENCE_SITE]
    layout = Layout.of(x, particle_dim)
    scale = model[SEQUENCE_SITE]["scale"]
    inside = outside = None
    whole, after_x = False, False
    for sign, sites in ((1.0, model), (-1.0, guide)):
        for name, site in sites.items():
            if name == SEQUENCE_SITE:
                after_x = sign < 0
                continue
            log_prob = sign * layout.placed(name, site, site["fn"].log_prob(site["value"]), scale)
            if sign > 0:
                check_bounded(name, log_prob, x)
            if log_prob.dim() == 2:
                inside = log_prob if inside is None else inside + log_prob
            else:
                outside = log_prob if outside is None else outside + log_prob
                whole |= after_x
    raw = x["fn"].log_prob(x["value"])
    log_prior = layout.placed("x", model["x"], model["x"]["fn"].log_prob(x["value"]), scale)
    check_bounded("x", log_prior, x)
    log_guide = layout.placed("x", x, raw, scale)
    return SiteTerms(
        log_prior=log_prior,
        log_guide=log_guide,
        inside=torch.zeros_like(log_prior) if inside is None else inside,
        outside=log_prior.new_zeros(len(log_prior)) if outside is None else outside,
        raw_log_guide=layout.placed("x", {**x, "scale": 1.0}, raw, 1.0),
        whole=whole,
        joint=len(guide) > 1 or outside is not None,
        scale=scale,
    )


def check_sites(model: dict[str, Any], guide: dict[str, Any]) -> None:
    """Refuse programs for which this estimator would drop a term or a gradient."""
    for what, sites in (("guide", guide), ("model", model)):
        if SEQUENCE_SITE not in sites or (what == "model" and sites[SEQUENCE_SITE]["is_observed"]):
            raise BayesKLRLError(
                f"The {what} draws no sequence site 'x' (sites: {sorted(sites)}), and this loss is the score-function "
                "gradient of that site. Without one, use pyro.infer.Trace_ELBO."
            )
    for name, site in guide.items():
        if name != SEQUENCE_SITE and not site["fn"].has_rsample:
            raise BayesKLRLError(
                f"The guide's site {name!r} ({type(site['fn']).__name__}) has no reparametrisation, and this loss takes only "
                "one score-function site, 'x'. Use pyro.infer.TraceGraph_ELBO."
            )
    check_same_latents(model, guide)


@dataclass(frozen=True)
class Layout:
    """The meaning of each dimension of a log-prob.

    Parameters
    ----------
    num_particles
        N, the number of particles.
    particle_dim
        The dimension of the particles, counted from the right: -2 where plates are not nested.
    prompt_dims, prompt_plates
        The dimensions of the plates that x stands in, and their names.
    """

    num_particles: int
    particle_dim: int
    prompt_dims: tuple[int, ...]
    prompt_plates: frozenset[str]

    @classmethod
    def of(cls, x: Any, particle_dim: int) -> Layout:
        """Return the layout that the sequence site has."""
        plates = {frame.dim: frame for frame in x["cond_indep_stack"] if frame.vectorized}
        num_particles = plates.pop(particle_dim).size
        return cls(
            num_particles, particle_dim, tuple(sorted(plates)), frozenset(frame.name for frame in plates.values())
        )

    def placed(self, name: str, site: Any, log_prob: Tensor, unit: Any) -> Tensor:
        """Return a site's scaled and masked log-prob over `unit`: (N, P) inside the plates of x, (N,) outside."""
        log_prob = scale_and_mask(log_prob, scale=site["scale"] / unit, mask=site["mask"])
        num_dims = -self.particle_dim
        if log_prob.dim() > num_dims:
            raise BayesKLRLError(
                f"The log-prob of site {name!r} has the shape {tuple(log_prob.shape)}, more dimensions than plates: declare "
                "what belongs to one draw with .to_event(...), or set max_plate_nesting= to the depth of the plates."
            )
        plates = {frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized}
        shape = [1] * (num_dims - log_prob.dim()) + list(log_prob.shape)
        shape[0] = self.num_particles
        for dim, frame in plates.items():
            shape[dim] = frame.size
        full = log_prob.expand(shape)
        inside = self.prompt_plates and self.prompt_plates <= {frame.name for frame in plates.values()}
        is_x = name == SEQUENCE_SITE
        kept = self.prompt_dims if inside else ()
        summed = [dim for dim in range(-num_dims + 1, 0) if dim not in kept]
        total = full.sum(dim=summed) if summed else full
        # x outside of any plate is one event of the particle, prompts and all
        return total.reshape(self.num_particles, -1) if inside or is_x else total


def check_bounded(name: str, log_prob: Tensor, x: Any) -> None:
    """Refuse a log-prob of -inf or NaN; the error names the completion."""
    if torch.isfinite(log_prob).all():
        return
    first = torch.nonzero(~torch.isfinite(log_prob))[0].tolist()
    n, p = (first[0], first[1] if len(first) > 1 else 0)
    raise no_density(name, float(log_prob[tuple(first)]), completion_of(x, n, p))


def completion_of(x: Any, n: int, p: int) -> str:
    """Return the words by which an error names the completion of a particle and prompt: its text, if any, and its ids."""
    if not isinstance(x["fn"], SequenceDistribution):
        return f"{x['value'][n].tolist()}"
    lm = x["fn"].lm
    sequences = to_sequences(x["value"], lm)
    return completion_text(lm, sequences.tokens[p, n, : sequences.lengths[p, n]].tolist(), x["fn"].prompt_ids[p])
