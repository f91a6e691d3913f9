"""Posteriors of tables: rows of every kind, prompts and columns from any sequence, and parts of a posterior's prompts."""

from __future__ import annotations

import copy
import sys
from collections import UserDict, deque
from collections.abc import Callable, Iterator
from itertools import count
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl.reward_models.features import FeatureMap

LM = bk.NgramLM.fit(["ab", "ba", "aab", "bba", "b"], order=2)
PROMPTS = ["a", "b", "ab", "ba", "aab"]
ANSWERS = ["b", "a", "bb", "aa", "ab"]
BONUS = [0.0, 1.5, -2.0, 0.25, 3.0]
ROWS = [{"prompt": p, "answer": a, "bonus": b} for p, a, b in zip(PROMPTS, ANSWERS, BONUS, strict=True)]


def like_the_answer(completions: list[str], answer: list[str], bonus: list[float]) -> list[float]:
    return [c.count(a[0]) + b * len(c) / 4 for c, a, b in zip(completions, answer, bonus, strict=True)]


REWARD = bk.Reward(like_the_answer, alpha=0.5)
BY_HAND = bk.Posterior(LM, REWARD, prompts=PROMPTS, max_new_tokens=3, answer=ANSWERS, bonus=BONUS)


class Column:
    """A column as `datasets` hands it out since version 4: read when it is iterated over."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)

    def __getitem__(self, index: int) -> Any:
        return self.values[index]


class Dataset:
    """The interface of a `datasets.Dataset`, which cannot be told from a real one without importing it."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.data = columns

    @property
    def column_names(self) -> list[str]:
        return list(self.data)

    @property
    def features(self) -> dict[str, Any]:
        return {name: type(values[0]) for name, values in self.data.items()}

    def __len__(self) -> int:
        return len(next(iter(self.data.values())))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        raise AssertionError("Row by row is slow.")

    def __getitem__(self, key: Any) -> Any:
        return Column(self.data[key]) if isinstance(key, str) else {name: v[key] for name, v in self.data.items()}


class Streamed:
    """The interface of a `datasets.IterableDataset`."""

    column_names = ["prompt", "answer", "bonus"]  # noqa: RUF012

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(ROWS)


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def from_rows(rows: Any, likelihood: bk.Likelihood = REWARD, **options: Any) -> bk.Posterior:
    return bk.Posterior.from_rows(LM, likelihood, rows, **{"max_new_tokens": 3} | options)


def assert_same(one: bk.Posterior, other: bk.Posterior) -> None:
    """The same prompts, columns, alpha, draws and rewards."""
    assert (one.prompts, one.prompt_ids, one.columns, one.alpha, one.max_new_tokens) == (
        other.prompts,
        other.prompt_ids,
        other.columns,
        other.alpha,
        other.max_new_tokens,
    )
    ours, theirs = (bk.ImportanceSampling(20).run(each, seed=3) for each in (one, other))
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.log_weights, theirs.log_weights)
    np.testing.assert_array_equal(one.reward(theirs), other.reward(theirs))


# --- tables -----------------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[], Any]] = {
    "a list": lambda: ROWS,
    "a tuple": lambda: tuple(ROWS),
    "a deque": lambda: deque(ROWS),
    "a generator": lambda: (row for row in ROWS),
    "a map": lambda: map(dict, ROWS),
    "keys in another order": lambda: [ROWS[0], *({k: row[k] for k in reversed(list(row))} for row in ROWS[1:])],
    "other mappings": lambda: [UserDict(ROWS[0]), MappingProxyType(ROWS[1]), *ROWS[2:]],
    "a Dataset": lambda: Dataset(columns_of(ROWS)),
    "a streamed Dataset": Streamed,
    "a DataFrame": lambda: pd.DataFrame(ROWS),
    "a DataFrame with an index": lambda: pd.DataFrame(ROWS, index=[3, 1, 4, 1, 5]),
    "an array of rows": lambda: np.array(ROWS, dtype=object),
}


@pytest.mark.parametrize("kind", TABLES)
def test_every_kind_of_table_is_the_posterior_made_by_hand(kind: str) -> None:
    assert_same(from_rows(TABLES[kind]()), BY_HAND)


def test_the_prompts_may_be_in_any_column() -> None:
    rows = [{"question": p, "prompt": "not this", "answer": a} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    made = from_rows(rows, bk.Reward(lambda completions, prompt: [0.0] * len(prompt), alpha=1.0), prompt="question")
    assert made.prompts == tuple(PROMPTS)
    assert made.columns == {"prompt": ("not this",) * 5, "answer": tuple(ANSWERS)}


def test_prompts_of_rows_may_be_token_ids() -> None:
    coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    for prompts in ([[0], [0, 0]], [np.array([0]), np.array([0, 0])], [torch.tensor([0]), (0, 0)]):
        rows = [{"prompt": prompt} for prompt in prompts]
        assert bk.Posterior.from_rows(coin, longer, rows, max_new_tokens=2).prompt_ids == ((0,), (0, 0))


VALUES: list[Any] = [{"a": 1}, [1, [2]], np.arange(3), None, float("nan"), "text", 7, (1, 2), torch.ones(2), b"bytes"]


@pytest.mark.parametrize("kind", ["a list", "a Dataset", "a DataFrame"])
def test_values_of_any_type_reach_the_reward_unchanged_and_one_per_completion(kind: str) -> None:
    seen: list[Any] = []

    def reward(completions: list[str], prompts: list[str], value: list[Any]) -> list[float]:
        assert len(completions) == len(prompts) == len(value)
        seen.extend(zip(prompts, value, strict=True))
        return [0.0] * len(completions)

    prompts = ["a" * n for n in range(1, 11)]
    columns: dict[str, list[Any]] = {"prompt": prompts, "value": VALUES}
    rows = [{"prompt": prompt, "value": value} for prompt, value in zip(prompts, VALUES, strict=True)]
    made = {"a list": rows, "a Dataset": Dataset(columns), "a DataFrame": pd.DataFrame(columns)}[kind]
    posterior = from_rows(made, bk.Reward(reward, alpha=1.0))
    bk.ImportanceSampling(3).run(posterior.select([9, *range(9)]), seed=0)
    assert len(seen) >= 30
    for prompt, value in seen:
        assert value is VALUES[len(prompt) - 1]


def test_datasets_need_not_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert_same(from_rows(Dataset(columns_of(ROWS))), BY_HAND)


# --- names, as TRL's data sets have them -------------------------------------------------------------------------


def test_a_reference_completion_reaches_the_rewards_that_ask_for_it() -> None:
    """TRL's prompt-completion format. A reward function that TRL would call works the same."""
    rows = [{"prompt": p, "completion": a} for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    as_in_trl = bk.Reward(lambda completions, **kwargs: [float(len(c)) for c in completions], alpha=1.0)
    alone = bk.Reward(lambda completions: [float(len(c)) for c in completions], alpha=1.0)
    asks = bk.Reward(
        lambda completions, completion: [float(c == r) for c, r in zip(completions, completion, strict=True)], alpha=1.0
    )
    draws = bk.ImportanceSampling(30).run(from_rows(rows, alone), seed=0)
    texts = draws.texts()
    expected = [[len(text) for text in row] for row in texts]
    np.testing.assert_array_equal(from_rows(rows, as_in_trl).reward(draws), expected)
    np.testing.assert_array_equal(from_rows(rows, alone).reward(draws), expected)
    equal = [[text == answer for text in row] for row, answer in zip(texts, ANSWERS, strict=True)]
    np.testing.assert_array_equal(from_rows(rows, asks).reward(draws), equal)
    assert np.any(equal)


@pytest.mark.parametrize("name", ["completion", "text", "answer"])
def test_a_function_that_would_read_a_column_instead_of_the_completions_is_refused(name: str) -> None:
    rows = [{"prompt": "a", name: "b"}]
    namespace: dict[str, Any] = {}
    exec(f"def one({name}): return [0.0]\ndef two({name}, completions=()): return [0.0]", namespace)
    with pytest.raises(bk.RewardError, match=f"'one' asks for '{name}' alone.*`completions`"):
        from_rows(rows, bk.Reward(namespace["one"], alpha=1.0))
    from_rows(rows, bk.Reward(namespace["two"], alpha=1.0))
    from_rows([{"prompt": "a", "other": "b"}], bk.Reward(namespace["one"], alpha=1.0))


@pytest.mark.parametrize("name", ["completions", "completion_ids", "prompts", "finished", "prior", "self", "lengths"])
@pytest.mark.parametrize("table", [lambda rows: rows, lambda rows: Dataset(columns_of(rows)), pd.DataFrame])
def test_reserved_names_are_refused_with_the_cure(name: str, table: Callable[[Any], Any]) -> None:
    rows = [{"prompt": "a", name: "b"}]
    with pytest.raises(bk.BayesKLRLError, match=f"a column '{name}': the name is reserved.*Rename or drop"):
        from_rows(table(rows))
    assert from_rows([{name: "ab"}], bk.Reward(len_of, alpha=1.0), prompt=name).prompts == ("ab",)


def len_of(completions: list[str]) -> list[float]:
    return [float(len(c)) for c in completions]


# --- rows that are none -----------------------------------------------------------------------------------------

NO_ROWS: dict[str, tuple[Callable[[], Any], str]] = {
    "an empty list": (list, "a list, has no rows"),
    "an empty generator": (lambda: (row for row in ()), "a generator, has no rows"),
    "an empty DataFrame": (lambda: pd.DataFrame({"prompt": []}), "a DataFrame, has no rows"),
    "an empty Dataset": (lambda: Dataset({"prompt": []}), "a Dataset, has no rows"),
    "a row that lacks a key": (lambda: [*ROWS[:3], {"prompt": "a", "answer": "b"}], "Row 3 has no key 'bonus'"),
    "a row with one key more": (lambda: [ROWS[0], ROWS[1] | {"label": 1}], "Row 1 has a key 'label', which row 0"),
    "a row without prompt": (lambda: [ROWS[0], {"answer": "a", "bonus": 1.0}], "Row 1 has no key 'prompt'"),
    "no prompts at all": (
        lambda: [{"question": "a"}],
        r"no column 'prompt'; their columns are \['question'\].*prompt=",
    ),
    "an empty row": (lambda: [{}], "no column 'prompt'"),
    "texts": (lambda: ["a", "b"], "Row 0 is a str, not a dictionary.*'a'"),
    "a text among rows": (lambda: [ROWS[0], "b"], "Row 1 is a str"),
    "a text": (lambda: "rows.csv", "rows must be .* got 'rows.csv'"),
    "None": (lambda: None, "rows must be .* got None"),
    "a number": (lambda: 3, "rows must be .* got 3"),
    "one row": (lambda: ROWS[0], r"rows is a dict with the keys \['prompt'.*rows\['prompt'\]"),
    "a DatasetDict": (
        lambda: type("DatasetDict", (dict,), {"column_names": {"train": ["prompt"]}})(train=Dataset({"prompt": ["a"]})),
        r"rows is a DatasetDict with the keys \['train'\].*rows\['train'\]",
    ),
    "a column twice": (lambda: pd.DataFrame([["a", 1, 2]], columns=["prompt", "x", "x"]), "has 2 columns 'x'"),
    "a column without name": (lambda: pd.DataFrame({"prompt": ["a"], 0: [1]}), "name of a column is a text; got 0"),
    "a prompt that is a number": (lambda: [{"prompt": "a"}, {"prompt": 5}], "In row 1 'prompt' is the number 5"),
    "prompts that are numbers": (lambda: [{"prompt": 0}, {"prompt": 1}], "In row 0 'prompt' is the number 0"),
    "numbers in a DataFrame": (lambda: pd.DataFrame({"prompt": [0, 1]}), "In row 0 'prompt' is the number 0"),
    "a prompt that is missing": (lambda: [{"prompt": "a"}, {"prompt": None}], "all of one kind"),
    "conversations without a template": (
        lambda: [{"prompt": [{"role": "user", "content": "a"}]}],
        "conversations, but the prior's tokenizer has no chat template",
    ),
    "a reserved name": (
        lambda: [{"prompt": "a", "chat_template_kwargs": {"enable_thinking": False}}],
        "a column 'chat_template_kwargs': the name is reserved",
    ),
}


@pytest.mark.parametrize("case", NO_ROWS)
def test_what_is_no_table_is_refused_by_name(case: str) -> None:
    make, says = NO_ROWS[case]
    with pytest.raises(bk.BayesKLRLError, match=says):
        from_rows(make(), bk.Reward(len_of, alpha=1.0))


@pytest.mark.parametrize("prompt", [None, 0, ["prompt"]])
def test_a_column_of_prompts_is_named_by_a_text(prompt: Any) -> None:
    with pytest.raises(bk.BayesKLRLError, match="no column"):
        from_rows(ROWS, prompt=prompt)


def test_an_error_of_the_users_own_generator_passes_through() -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield ROWS[0]
        raise KeyError("file")

    with pytest.raises(KeyError, match="file"):
        from_rows(rows())


# --- prompts and columns in any sequence --------------------------------------------------------------------------

SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {
    "a generator": lambda values: (value for value in values),
    "an iterator": iter,
    "a map": lambda values: map(values.__getitem__, range(len(values))),
    "a tuple": tuple,
    "an array": np.array,
    "an array of objects": lambda values: np.array(values, dtype=object),
    "a Series": pd.Series,
    "a Series with another index": lambda values: pd.Series(values, index=[4, 3, 2, 1, 0]),
    "a column of a Dataset": Column,
    "values of a dictionary": lambda values: dict(enumerate(values)).values(),
    "a deque": deque,
}


@pytest.mark.parametrize("kind", SEQUENCES)
def test_prompts_and_columns_may_be_in_any_sequence(kind: str) -> None:
    of = SEQUENCES[kind]
    made = bk.Posterior(LM, REWARD, prompts=of(PROMPTS), max_new_tokens=3, answer=of(ANSWERS), bonus=of(BONUS))
    assert_same(made, BY_HAND)


def test_ids_may_come_from_generators() -> None:
    coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    for prompts, expected in (
        ((ids for ids in ([0], [0, 0])), ((0,), (0, 0))),
        ((np.zeros(n, int) for n in (1, 2)), ((0,), (0, 0))),
        (iter([0, 0]), ((0, 0),)),
    ):
        assert bk.Posterior(coin, longer, prompts=prompts, max_new_tokens=2).prompt_ids == expected
    pairs = bk.Preferences((ids for ids in ([0], [0, 0])), [[1], [0]], [[0], [1]])
    assert pairs.prompts == ((0,), (0, 0))


def test_an_iterator_is_read_once_and_a_column_no_further_than_needed() -> None:
    read: list[int] = []

    def numbers() -> Iterator[int]:
        for n in count():
            read.append(n)
            yield n

    with pytest.raises(bk.BayesKLRLError, match=r"'bonus' needs one value per prompt.* 5; got a generator of more"):
        bk.Posterior(LM, REWARD, prompts=iter(PROMPTS), max_new_tokens=3, answer=ANSWERS, bonus=numbers())
    assert read == list(range(6))


def test_an_empty_iterator_has_no_prompts() -> None:
    with pytest.raises(bk.BayesKLRLError, match="prompts is empty"):
        bk.Posterior(LM, REWARD, prompts=iter([]), max_new_tokens=3)


NO_COLUMNS: dict[str, Callable[[], Any]] = {
    "a text as long as the prompts": lambda: "abcde",
    "bytes as long as the prompts": lambda: b"abcde",
    "a number": lambda: 1.0,
    "None": lambda: None,
    "a NumPy number": lambda: np.float64(1.0),
    "an array without axes": lambda: np.array(1.0),
    "a tensor without axes": lambda: torch.tensor(1.0),
    "too few": lambda: [1.0] * 4,
    "too many": lambda: np.ones(6),
    "a generator of too few": lambda: (1.0 for _ in range(4)),
    "a generator of too many": lambda: (1.0 for _ in range(6)),
    "a dictionary": lambda: dict.fromkeys(range(5)),
    "a set": lambda: set(range(5)),
    "a table": lambda: pd.DataFrame(np.ones((5, 5))),
    "a type": lambda: list,
    "a function": lambda: len,
}


@pytest.mark.parametrize("case", NO_COLUMNS)
def test_what_is_no_column_is_refused(case: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match="Column 'bonus' needs one value per prompt, a list of length 5; got"):
        bk.Posterior(LM, REWARD, prompts=PROMPTS, max_new_tokens=3, answer=ANSWERS, bonus=NO_COLUMNS[case]())


# --- select -----------------------------------------------------------------------------------------------------


def by_hand(chosen: list[int], likelihood: bk.Likelihood = REWARD) -> bk.Posterior:
    return bk.Posterior(
        LM,
        likelihood,
        prompts=[PROMPTS[p] for p in chosen],
        max_new_tokens=3,
        answer=[ANSWERS[p] for p in chosen],
        bonus=[BONUS[p] for p in chosen],
    )


def named(value: object) -> str:
    """The value's text, without addresses, which differ between workers."""
    return str(value) if " at 0x" not in str(value) else type(value).__name__


@pytest.mark.parametrize(
    "indices, chosen",
    [
        ([4, 0], [4, 0]),
        ([1, 1], [1, 1]),
        ((-1, 0), [4, 0]),
        (range(1, 4), [1, 2, 3]),
        (np.array([2, 1], dtype=np.uint8), [2, 1]),
        (torch.tensor([3, 0]), [3, 0]),
        ([torch.tensor(3), np.int64(0)], [3, 0]),
        (pd.Series([3, 0]), [3, 0]),
        ((p for p in (3, 0)), [3, 0]),
        (slice(2), [0, 1]),
        (slice(None, None, -2), [4, 2, 0]),
        (slice(-2, None), [3, 4]),
        (slice(3, 99), [3, 4]),
        ([True, False, False, True, False], [0, 3]),
        (np.array(BONUS) > 1, [1, 4]),
        (torch.tensor(BONUS) > 1, [1, 4]),
        (pd.Series(BONUS) > 1, [1, 4]),
        ([False] * 4 + [np.bool_(True)], [4]),
    ],
    ids=named,
)
def test_prompts_are_selected_by_indices_slices_and_masks(indices: Any, chosen: list[int]) -> None:
    assert_same(BY_HAND.select(indices), by_hand(chosen))


@pytest.mark.parametrize(
    "indices, says",
    [
        ([], "from 0 to 4, at least one of them; got none"),
        (slice(5, None), "got none"),
        ([False] * 5, "got none"),
        (np.array([]), "got none"),
        ([0, 5], r"got \[5\]"),
        ([-6], r"got \[-6\]"),
        ([0, 1.0], r"got \[1.0\]"),
        (np.array([0.5]), r"got \[0.5\]"),
        (["0"], r"got \['0'\]"),
        ([None], r"got \[None\]"),
        ([True, 2], r"got \[True\]"),
        ([True, False], "one bool per prompt, so it has length 5 here; got one of length 2"),
        (np.ones(6, bool), "length 5 here; got one of length 6"),
        (slice("a"), "by a slice.*got slice"),
        (slice(0, 5, 0), "by a slice.*got slice"),
        (0, "list or array of indices.*got 0"),
        (None, "got None"),
        ("01", "got '01'"),
        ({0, 1}, r"got \{0, 1\}"),
        ({0: 1}, r"got \{0: 1\}"),
        (np.array(1), r"got array\(1\)"),
        (np.ones((5, 1), bool), "got array"),
    ],
    ids=str,
)
def test_what_chooses_no_prompts_is_refused(indices: Any, says: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=says):
        BY_HAND.select(indices)


# --- split ------------------------------------------------------------------------------------------------------


def many(num: int) -> bk.Posterior:
    """Prompts that are told apart by their column."""
    return bk.Posterior(LM, bk.Reward(len_of, alpha=1.0), prompts=["a"] * num, max_new_tokens=2, number=range(num))


@pytest.mark.parametrize(
    "num, fraction, first", [(10, 0.8, 8), (10, 0.25, 2), (7, 0.5, 4), (2, 0.5, 1), (100, 0.29, 29)]
)
def test_a_split_has_every_prompt_once_in_the_old_order(num: int, fraction: float, first: int) -> None:
    for seed in range(5):
        numbers = [part.columns["number"] for part in many(num).split(fraction, seed)]
        assert len(numbers[0]) == first
        assert sorted([*numbers[0], *numbers[1]]) == list(range(num))
        assert all(list(part) == sorted(part) for part in numbers)


def test_a_split_is_a_function_of_the_seed_and_uniform() -> None:
    """Each prompt is in the first part with probability 3/10: counts of 400 splits, each within 4.5 standard errors."""
    whole = many(10)
    times = np.zeros(10)
    for seed in range(400):
        times[list(whole.split(0.3, seed)[0].columns["number"])] += 1
    assert np.abs((times - 120) / np.sqrt(400 * 0.3 * 0.7)).max() < 4.5
    again = [part.columns for part in whole.split(0.3, seed=7)]
    assert again == [part.columns for part in whole.split(np.float64(0.3), seed=np.int64(7))]
    assert again != [part.columns for part in whole.split(0.3, seed=8)]


@pytest.mark.parametrize(
    "fraction, says",
    [
        (0.0, "into 0 and 5; each part needs at least one"),
        (1.0, "into 5 and 0"),
        (0.05, "into 0 and 5"),
        (0.95, "into 5 and 0"),
        (-0.1, "fraction must be a number from 0 to 1"),
        (4, "fraction must be a number from 0 to 1; got 4"),
        (np.nan, "got nan"),
        ("half", "got 'half'"),
        (None, "got None"),
        (True, "got True"),
    ],
)
def test_parts_without_prompts_are_refused(fraction: Any, says: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=says):
        BY_HAND.split(fraction, seed=0)


def test_one_prompt_cannot_be_split_and_a_seed_is_a_number() -> None:
    with pytest.raises(bk.BayesKLRLError, match="each part needs at least one"):
        many(1).split(0.5, seed=0)
    with pytest.raises(bk.BayesKLRLError, match="seed must be an integer"):
        BY_HAND.split(0.5, seed="now")  # type: ignore[arg-type]


# --- parts of posteriors whose likelihood belongs to them ---------------------------------------------------------


class TwoRewards:
    """Two draws of theta for the feature "length", and a mean that the prompts change."""

    features = FeatureMap(bk.TokenFeatures(lambda tokens, lengths: lengths), np.zeros(1), None, np.ones(1))
    from_preferences = True

    def thetas(self, num: int | None = None) -> np.ndarray:
        return np.array([[0.5], [1.5]])


def ensemble(target: Any, alpha: float = 0.5) -> bk.Likelihood:
    anchor: Any = None if target in ("cut", "plug-in") else "mean"
    return bk.EnsembleReward(TwoRewards(), alpha=alpha, num_thetas=2, target=target, anchor=anchor)


@pytest.mark.parametrize("target", ["cut", "joint", "plug-in", "conservative"])
def test_an_ensemble_is_measured_on_the_prompts_of_the_part(target: Any) -> None:
    whole = by_hand([0, 1, 2, 3, 4], ensemble(target))
    assert_same(whole.select([3, 1]), by_hand([3, 1], ensemble(target)))
    everything = bk.Exact().run(whole, seed=0)
    for part in whole.split(0.4, seed=2):
        chosen = [PROMPTS.index(prompt) for prompt in part.prompts]
        np.testing.assert_allclose(
            bk.Exact().run(part, seed=0).log_evidence, everything.log_evidence[chosen], rtol=1e-12
        )


class Shared(bk.TokenReward):
    """A reward that the prompts share: it is bound once, and then no longer knows of others."""

    def bind_with(self, setting: Any, others: Any) -> bk.TokenReward:
        return bk.TokenReward(lambda tokens, lengths: lengths / len(setting.prompts), alpha=self.alpha)


def test_the_likelihood_of_a_part_is_bound_to_the_part() -> None:
    shared = Shared(lambda tokens, lengths: lengths, alpha=1.0)
    assert_same(by_hand([0, 1, 2, 3, 4], shared).select([3, 1]), by_hand([3, 1], shared))


@pytest.mark.parametrize("target", ["plug-in", "conservative"])
def test_so_it_is_at_another_alpha(target: Any) -> None:
    """Its anchors are measured anew, under the other factors at that alpha."""
    before, after = (ensemble(target, alpha) * bk.Reward(like_the_answer, alpha=alpha) for alpha in (0.5, 0.25))
    there = by_hand([0, 1, 2, 3, 4], before).at_alpha(0.25)
    assert_same(there, by_hand([0, 1, 2, 3, 4], after))
    assert_same(there.select([4, 2]), by_hand([4, 2], after))


@pytest.mark.parametrize("target", ["cut", "joint", "plug-in", "conservative"])
def test_a_power_of_an_ensemble_in_a_posterior_stays_there_and_is_measured_anew(target: Any) -> None:
    before, after = (ensemble(target, alpha) * bk.Reward(like_the_answer, alpha=alpha) for alpha in (0.5, 0.25))
    whole, expected = by_hand([0, 3], before), by_hand([0, 3], after)
    powered = copy.copy(whole)
    powered.likelihood = whole.likelihood**2
    draws = bk.ImportanceSampling(20).run(whole, seed=0)
    np.testing.assert_allclose(powered.log_likelihood(draws), expected.log_likelihood(draws), rtol=1e-12)


def test_parts_of_a_posterior_at_another_alpha_have_that_alpha() -> None:
    there = BY_HAND.at_alpha(0.2)
    assert_same(there.select([2, 0]), by_hand([2, 0], bk.Reward(like_the_answer, alpha=0.2)))
    assert_same(there.select([2, 0]), BY_HAND.select([2, 0]).at_alpha(0.2))
    first, second = there.split(0.6, seed=1)
    assert first.alpha == second.alpha == 0.2
    assert_same(first.select([0]), there.select([PROMPTS.index(first.prompts[0])]))


# --- whole runs -------------------------------------------------------------------------------------------------


def parts() -> dict[str, tuple[bk.Posterior, bk.Posterior]]:
    """Parts of a posterior of rows, and the same made by hand."""
    whole = from_rows(pd.DataFrame(ROWS))
    training, held_out = whole.split(0.6, seed=0)
    return {
        "selected": (whole.select([4, 1]), by_hand([4, 1])),
        "split": (training, by_hand([PROMPTS.index(prompt) for prompt in training.prompts])),
        "held out": (held_out, by_hand([PROMPTS.index(prompt) for prompt in held_out.prompts])),
    }


@pytest.mark.parametrize("case", ["selected", "split", "held out"])
def test_whole_runs_on_a_part_give_the_numbers_of_the_posterior_made_by_hand(case: str) -> None:
    part, made = parts()[case]
    svi = bk.SVI(6, 8, prompts_per_step=1)
    results = []
    for posterior in (part, made):
        draws = bk.ImportanceSampling(200).run(posterior, seed=1)
        fit = svi.fit(posterior, seed=1)
        certificate = bk.certify(posterior, fit.guide, seed=1, num_draws=64)
        bounds = (certificate.elbo, certificate.log_evidence_bounds, certificate.reverse_kl, certificate.forward_kl)
        results.append([draws.log_evidence, draws.log_weights, fit.history["elbo"], *bounds])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert np.isfinite(ours).all()


def test_draws_of_a_part_are_those_of_the_whole() -> None:
    """A prompt keeps its draws and rewards, whichever other prompts there are: so columns stay with their prompts."""
    whole = bk.ImportanceSampling(100).run(BY_HAND, seed=5)
    for part in (BY_HAND.select([4, 1]), *BY_HAND.split(0.5, seed=3)):
        rows = [PROMPTS.index(prompt) for prompt in part.prompts]
        draws = bk.ImportanceSampling(100).run(part, seed=5)
        np.testing.assert_array_equal(draws.tokens, whole.tokens[rows])
        np.testing.assert_allclose(draws.log_weights, whole.log_weights[rows], rtol=1e-12)
