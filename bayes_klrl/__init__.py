"""KL-regularised reinforcement learning of language models, as the Bayesian inference that it is.

    posterior(x) = prior(x) exp(reward(x) / alpha) / evidence

`Posterior` is the model. `Exact`, `ImportanceSampling`, `RejectionSampling`, `SMC`, `SuffixMH` and `SVI` are algorithms that
answer it, `compare` runs several of them side by side, `certify` bounds how far a tuned policy is from it, and `frontier`
shows what each alpha costs before any training.

The public names are listed once, in `__init__.pyi`. A name is loaded when it is first used, so that importing the package
loads neither torch nor jax nor arviz.
"""

import lazy_loader

__version__ = "0.1.0"

_load, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = sorted(_names)  # noqa: PLE0605  (a list all the same)


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'bayes_klrl' has no attribute {name!r}")
    from bayes_klrl.errors import needs_jax

    with needs_jax(f"bk.{name}"):
        value = _load(name)
    globals()[name] = value
    return value
