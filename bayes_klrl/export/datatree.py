"""Draws as labelled arrays: for ArviZ, and as netCDF files that hold everything.

Everything ArviZ is here, for 0.2x (`InferenceData`) and 1.x (`xarray.DataTree`) alike. The groups of a tree of draws:

    posterior       reward, length, log_prior, log_likelihood: equally weighted, (chain, draw, prompt)
    log_likelihood  r / alpha of the same draws; log_prior: log p0 of them (what power-scaling reads)
    sample_stats    log_proposal of the same draws
    weighted        the draws as they are: tokens, lengths, texts, log-weights, (prompt, draw[, position])
    evidence        log evidence, its standard error, ELBO, ESS, Pareto k, (prompt,)
    constant_data   prompts, alpha, max_new_tokens, method
    info            what the algorithm reports beside its draws, for SMC its ancestors

The coordinate of `prompt` is the prompts' words, shortened and unique, in every group; `sel(prompt="...")` takes them,
`isel(prompt=0)` the number. The prompts as they were given are in `constant_data`.

ArviZ has no weighted draws, so `posterior` is made for it: draws that weigh equally are taken as they are, weighted
ones resampled. Token ids are not in it: their mean and R-hat say nothing. Systematic resampling keeps the order, so
copies of a draw stand side by side and ArviZ's effective sample size, which sees them as autocorrelation, comes out
near Kish's 1 / sum(W^2); shuffled, it would claim N. Such draws are no Markov chain: R-hat says nothing of them, and the
numbers to judge by are in `evidence`. A prompt whose weights are all 0 has no posterior: NaN. Draws of Markov chains, which
say so in `info["chain"]`, keep their chains, and R-hat its meaning.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

import bayes_klrl
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.errors import BayesKLRLError, CheckpointError
from bayes_klrl.export.installed_arviz import installed_arviz
from bayes_klrl.export.output_folder import check_group_name
from bayes_klrl.export.sealed_files import check_sealed, write_sealed
from bayes_klrl.prompts.chat import is_messages, rendering_of, stored_conversation
from bayes_klrl.resampling import systematic
from bayes_klrl.typing import FloatArray, IntArray
from bayes_klrl.weights import normalised

__all__ = [
    "as_installed",
    "comparison_to_datatree",
    "draws_to_arviz",
    "draws_to_datatree",
    "load_comparison",
    "load_draws",
    "numbered",
    "save_draws",
]

_FORMAT = "bayes_klrl.Draws/1"
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)  # of a file that is not ours
_SEED = 0
_ENUMERATED_ROWS = 4000  # of an enumeration of fewer completions: ArviZ knows no weights
_PER_DRAW = ("reward", "log_prior", "log_likelihood", "log_proposal", "log_weights")
_PER_PROMPT = ("log_evidence", "log_evidence_se", "elbo", "ess", "pareto_k")
_INFO_DIMS = {"ancestors": ("prompt", "position", "draw"), "step_ess": ("prompt", "position"), "chain": ("draw",)}
_INFO_DIMS |= dict.fromkeys(
    ("schedule", "path_log_evidence", "path_reward", "path_kl", "path_ess"), ("prompt", "temperature")
)
_NO_HDF5_STRING = re.compile("[\x00\ud800-\udfff]")  # HDF5 ends strings at NUL, and UTF-8 has no lone surrogates


def draws_to_arviz(draws: Draws) -> Any:
    """Return what the installed ArviZ summarises: an InferenceData in 0.x, a DataTree in 1.x.

    `az.summary(draws.to_arviz())` then gives posterior means and their Monte Carlo errors; its R-hat says nothing about
    draws that are no Markov chain (`kind="stats"` leaves it out); those of `SuffixMH` are.
    """
    return as_installed(draws_to_datatree(draws))


def as_installed(tree: xr.DataTree) -> Any:
    """Return a tree as what the installed ArviZ takes: an InferenceData in 0.x, itself in 1.x."""
    arviz = installed_arviz()
    if not arviz.__version__.startswith("0."):
        return tree
    with warnings.catch_warnings():  # groups of our own are legal
        warnings.filterwarnings("ignore", ".*not defined in the InferenceData scheme", UserWarning)
        return arviz.InferenceData.from_datatree(tree)


def draws_to_datatree(draws: Draws) -> xr.DataTree:
    """Return the draws as an xarray DataTree with the groups that this file describes.

    The resample is of a fixed seed: the same draws give the same tree.
    """
    equal = _equally_weighted(draws)
    scalars = {name: equal[name] for name in ("reward", "length", "log_prior", "log_likelihood")}
    num_chains = int(np.max(draws.info["chain"])) + 1 if "chain" in draws.info else 1
    groups = {
        "/": xr.Dataset(attrs=_root_attrs(draws)),
        "/posterior": _chains(scalars, num_chains),
        "/log_likelihood": _chains({"likelihood": equal["log_likelihood"]}, num_chains),
        "/log_prior": _chains({"x": equal["log_prior"]}, num_chains),
        "/sample_stats": _chains({"log_proposal": equal["log_proposal"]}, num_chains),
        "/weighted": _weighted(draws),
        "/evidence": xr.Dataset({name: ("prompt", getattr(draws, name)) for name in _PER_PROMPT}),
        "/constant_data": _constant_data(draws),
    }
    if draws.info:
        groups["/info"] = xr.Dataset({name: _info_array(name, draws) for name in draws.info})
    prompts = _prompt_coordinate(draws)
    return xr.DataTree.from_dict({name: _labelled(group, prompts) for name, group in groups.items()})


def comparison_to_datatree(results: Mapping[str, Draws]) -> xr.DataTree:
    """Return one tree with the draws of each method as a child, whatever ArviZ is installed.

    A child has the method's name, with "-" for "/", which separates groups; its attribute `name` is the name as given.

    Raises
    ------
    BayesKLRLError
        If two names are the same after that.
    """
    children: dict[str, xr.DataTree] = {}
    for name, draws in results.items():
        child = name.replace("/", "-")
        check_group_name(child)
        if child in children:
            raise BayesKLRLError(f"Two methods would be stored as {child!r} ('/' becomes '-'); rename {name!r}.")
        children[child] = draws_to_datatree(draws)
        children[child].attrs["name"] = name
    common = {"convention": "absorb", "units": "nats", "bayes_klrl_version": bayes_klrl.__version__}
    return xr.DataTree(xr.Dataset(attrs=common), children=children)


def save_draws(draws: Draws, path: Path) -> Path:
    """Write the draws to a netCDF file and return its path; everything but the guide, bit by bit.

    ArviZ and xarray open the file too: it is `draws_to_datatree`.
    """
    small = {"zlib": True, "complevel": 1, "shuffle": True}
    encoding = {"/weighted": {"tokens": small, "lengths": small}}
    return write_sealed(draws_to_datatree(draws), path, encoding)


def load_draws(file: str | Path) -> Draws:
    """Read what `save_draws` wrote. Texts come from the file, without the model.

    A file without a checksum, of an earlier version, is read with a warning, after a process of its own has read it.

    Raises
    ------
    CheckpointError
        If there is no such file, it is damaged, or it is not one of ours.
    """
    if not isinstance(file, str | os.PathLike):
        raise CheckpointError(f"The file of draws must be a text or a pathlib.Path; got {file!r}.")
    path = Path(file)
    if path.is_dir():
        inside = path / "draws.nc"
        cure = f"Its draws are in {str(inside)!r}." if inside.is_file() else "Give the file that Draws.save wrote."
        raise CheckpointError(f"{str(path)!r} is a folder. {cure}")
    if not path.is_file():
        raise CheckpointError(f"There is no file {str(path)!r}.")
    sealed = check_sealed(path)
    try:
        with xr.open_datatree(path, engine="h5netcdf") as tree:
            # read in here: DataTree.load() forgets variables that are called as a group is
            draws = _draws_of(tree) if tree.attrs.get("format") == _FORMAT else None
            holds = f"a comparison of {sorted(tree.children)}" if _holds_methods(tree) else "of another origin"
    except _UNREADABLE as error:
        raise CheckpointError(f"{str(path)!r} is no file of draws, as Draws.save writes it: {error}") from error
    if draws is None:
        raise CheckpointError(f"{str(path)!r} is no file of draws, as Draws.save writes it: it is {holds}.")
    if not sealed:
        warnings.warn(
            f"{str(path)!r} has no checksum: an earlier version of bayes_klrl wrote it, or another program. It can be read, "
            "but whether its numbers have changed cannot be known. Save the draws again to add one.",
            stacklevel=3,
        )
    return draws


def load_comparison(file: str | Path) -> dict[str, Draws]:
    """Read the draws.nc of a comparison, as `Comparison.save` wrote it: the draws by method. Other draws have one name.

    Raises
    ------
    CheckpointError
        If there is no such file, it is damaged, or it is not one of ours.
    """
    path = Path(file)
    if not path.is_file():
        raise CheckpointError(f"There is no file {str(path)!r}.")
    check_sealed(path)
    try:
        with xr.open_datatree(path, engine="h5netcdf") as tree:
            if _holds_methods(tree):
                return {str(name): _draws_of(child) for name, child in tree.children.items()}
    except _UNREADABLE as error:
        raise CheckpointError(f"{str(path)!r} is no file of draws, as Comparison.save writes it: {error}") from error
    draws = load_draws(path)
    return {draws.method: draws}


@dataclass(frozen=True, eq=False)
class StoredTexts:
    """The decoder of draws read from a file: knows the texts of their own completions, and no other."""

    texts: Mapping[tuple[int, tuple[int, ...]], str]
    """The texts by the index of the prompt, and the completion's ids."""

    def __call__(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each completion; of one that follows several prompts, that after the first of them."""
        alone: dict[tuple[int, ...], str] = {}
        for (_, completion), text in self.texts.items():
            alone.setdefault(completion, text)
        return self._found(alone, map(tuple, ids))

    def after(self, prompt_index: IntArray, ids: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each completion as it follows the prompt of its index."""
        return self._found(self.texts, zip(prompt_index.tolist(), map(tuple, ids), strict=True))

    @staticmethod
    def _found(texts: Mapping[Any, str], keys: Iterable[Any]) -> list[str]:
        """Return the texts of some keys: completions, or completions of prompts."""
        try:
            return [texts[key] for key in keys]
        except KeyError as error:
            key = error.args[0]
            completion = key[1] if len(key) == 2 and isinstance(key[1], tuple) else key
            raise BayesKLRLError(
                f"The completion {list(completion)} is not among these draws, which were read from a file and know "
                "only their own texts. Decode it with the model."
            ) from error


def _equally_weighted(draws: Draws) -> dict[str, FloatArray]:
    """Return arrays (P, N) of draws that weigh equally; NaN for prompts whose weights are all 0.

    An enumeration is no sample. Independent draws are made from it, at least `_ENUMERATED_ROWS`, so that their means are near
    the exact ones however few completions there are.
    """
    values = {"length": draws.lengths} | {name: getattr(draws, name) for name in _PER_DRAW if name != "log_weights"}
    alive = np.asarray(np.isfinite(draws.log_weights).any(axis=1))
    num_prompts, num_draws = draws.shape
    weights = {int(p): normalised(draws.log_weights[p]) for p in np.flatnonzero(alive)}
    is_enumeration = any(np.isnan(draws.ess[p]) and np.ptp(each) > 0 for p, each in weights.items())
    rows = max(num_draws, _ENUMERATED_ROWS) if is_enumeration else num_draws
    chosen = np.tile(np.arange(rows) % num_draws, (num_prompts, 1))
    rng = np.random.default_rng(_SEED)
    for p, each in weights.items():
        chosen[p] = rng.choice(num_draws, size=rows, p=each) if is_enumeration else systematic(each, rng)
    taken = {name: np.take_along_axis(array, chosen, axis=1) for name, array in values.items()}
    if alive.all():
        return taken
    return {name: np.where(alive[:, None], array, np.nan) for name, array in taken.items()}


def _chains(arrays: Mapping[str, np.ndarray], num_chains: int) -> xr.Dataset:
    """Return arrays (P, N), chain by chain, as (chains, N / chains, P), which is how ArviZ wants them."""
    variables = {
        name: (("chain", "draw", "prompt"), array.T.reshape(num_chains, -1, len(array)))
        for name, array in arrays.items()
    }
    return xr.Dataset(variables)


def numbered(dataset: xr.Dataset) -> xr.Dataset:
    """Return the dataset with 0, 1, ... as the coordinate of every dimension."""
    return dataset.assign_coords({str(name): np.arange(size) for name, size in dataset.sizes.items()})


def _labelled(dataset: xr.Dataset, prompts: np.ndarray) -> xr.Dataset:
    """Return the dataset with the prompts' words as the coordinate of prompts, and 0, 1, ... as that of other dimensions."""
    return numbered(dataset).assign_coords({"prompt": prompts} if "prompt" in dataset.dims else {})


def _prompt_coordinate(draws: Draws) -> np.ndarray:
    """Return the prompts' words, (P,). Two dollar signs would be mathematics in a label of ArviZ's plots: they are escaped."""
    words = [name.replace("$", r"\$") if name.count("$") > 1 else name for name in draws.prompt_words()]
    return np.array(words, dtype=object)


def _weighted(draws: Draws) -> xr.Dataset:
    """Return the draws as they are."""
    variables: dict[str, Any] = {name: (("prompt", "draw"), getattr(draws, name)) for name in _PER_DRAW}
    variables["lengths"] = (("prompt", "draw"), draws.lengths)
    variables["tokens"] = (("prompt", "draw", "position"), draws.tokens)
    if draws.decoder is not None:
        variables["text"] = _text_variable(draws.texts())
    return xr.Dataset(variables)


def _text_variable(texts: Sequence[Sequence[str]]) -> tuple[Any, ...]:
    """Return texts as they are, or all of them as JSON if a file cannot hold one of them as it is."""
    plain = not any(_NO_HDF5_STRING.search(text) for row in texts for text in row)
    stored = [list(row) if plain else [json.dumps(text) for text in row] for row in texts]
    return ("prompt", "draw"), np.array(stored, dtype=object), {"stored_as": "text" if plain else "json"}


def _constant_data(draws: Draws) -> xr.Dataset:
    """Return what was given: each prompt as JSON, a text, a list of ids, or a list of messages with its rendering."""
    prompts = np.array([json.dumps(prompt) for prompt in draws.prompts], dtype=object)
    renderings = np.array([json.dumps(rendering_of(prompt)) for prompt in draws.prompts], dtype=object)
    rendered = {"renderings": ("prompt", renderings)} if any(map(is_messages, draws.prompts)) else {}
    return xr.Dataset(
        {
            "prompts": ("prompt", prompts),
            **rendered,
            "alpha": ((), draws.alpha),
            "max_new_tokens": ((), draws.tokens.shape[2]),
            "method": ((), draws.method),
        }
    )


def _info_array(name: str, draws: Draws) -> tuple[tuple[str, ...], np.ndarray]:
    """Return one array of `Draws.info` with its dimensions named: those of an array that is not listed by its shape."""
    array = np.asarray(draws.info[name])
    shapes = {np.shape(draws.info[key]): _INFO_DIMS[key] for key in _INFO_DIMS if key in draws.info}
    by_shape = {**shapes, draws.shape[:1]: ("prompt",)}
    unknown = tuple(f"{name}_dim_{axis}" for axis in range(array.ndim))
    return _INFO_DIMS.get(name, by_shape.get(array.shape, unknown)), array


def _root_attrs(draws: Draws) -> dict[str, Any]:
    """Return what holds for the tree as a whole."""
    return {
        "format": _FORMAT,
        "convention": "absorb",
        "units": "nats",
        "method": draws.method,
        "seconds": draws.seconds,
        "model_tokens": draws.model_tokens,
        "training_tokens": draws.training_tokens,
        "training_seconds": draws.training_seconds,
        "eos_token_ids": json.dumps(sorted(draws.eos_token_ids)),
        "bayes_klrl_version": bayes_klrl.__version__,
    }


def _holds_methods(tree: xr.DataTree) -> bool:
    """Return whether the children are draws."""
    return any(child.attrs.get("format") == _FORMAT for child in tree.children.values())


def _draws_of(tree: xr.DataTree) -> Draws:
    """Return the draws behind a tree."""
    weighted, evidence, constant = (tree[name].to_dataset() for name in ("weighted", "evidence", "constant_data"))
    prompts = [json.loads(prompt) for prompt in constant["prompts"].values]
    if "renderings" in constant:
        renderings = [json.loads(rendering) for rendering in constant["renderings"].values]
        prompts = [stored_conversation(*both) for both in zip(prompts, renderings, strict=True)]
    draws = Draws(
        tokens=weighted["tokens"].values,
        lengths=weighted["lengths"].values,
        **{name: weighted[name].values for name in _PER_DRAW},
        **{name: evidence[name].values for name in _PER_PROMPT},
        prompts=tuple(tuple(prompt) if type(prompt) is list else prompt for prompt in prompts),
        method=str(constant["method"].item()),
        alpha=float(constant["alpha"]),
        cost=Cost(
            float(tree.attrs["seconds"]),
            int(tree.attrs["model_tokens"]),
            int(tree.attrs["training_tokens"]),
            float(tree.attrs["training_seconds"]),
        ),
        info={name: array.values for name, array in tree["info"].data_vars.items()} if "info" in tree else {},
        eos_token_ids=_eos_token_ids(tree),
    )
    if "text" not in weighted:
        return draws
    return _with_texts(draws, weighted["text"])


def _eos_token_ids(tree: xr.DataTree) -> frozenset[int]:
    """Return the ids that end completions; of a file that does not say, the last ids of those shorter than T."""
    if "eos_token_ids" in tree.attrs:
        return frozenset(json.loads(tree.attrs["eos_token_ids"]))
    tokens, lengths = tree["weighted/tokens"].values, tree["weighted/lengths"].values
    shorter = lengths < tokens.shape[2]
    return frozenset(tokens[shorter, lengths[shorter] - 1].tolist())


def _with_texts(draws: Draws, text: xr.DataArray) -> Draws:
    """Return the draws with a decoder that knows their texts."""
    stored = text.values.ravel().tolist()
    texts = [json.loads(each) for each in stored] if text.attrs["stored_as"] == "json" else stored
    index = np.repeat(np.arange(draws.shape[0]), draws.shape[1]).tolist()
    known = dict(zip(zip(index, map(tuple, draws.sequences.lists()), strict=True), texts, strict=True))
    return replace(draws, decoder=StoredTexts(known))
