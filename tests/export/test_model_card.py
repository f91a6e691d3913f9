"""The model card of a saved guide, and its way to the hub, with a client that only remembers what it was asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml  # comes with transformers

import bayes_klrl as bk
from bayes_klrl.export.model_card import base_model_name, cell, fenced
from tests.helpers.tiny_models import tiny_gpt2, tiny_tokenizer

COIN = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
LENGTH = bk.TokenReward(lambda tokens, lengths: lengths, alpha=0.25, bounds=(1, 3), name="length | of <it>")
POSTERIOR = bk.Posterior(COIN, LENGTH, prompts=[[], [0]], max_new_tokens=3)
FIT = bk.SVI(2).fit(POSTERIOR, seed=0)
THEIRS = "# Somebody's own words\n"


@pytest.fixture(scope="module")
def adapter_fit(tmp_path_factory: pytest.TempPathFactory) -> bk.Fit:
    """A LoRA guide of a prior that lies in a folder, at a temperature of its own."""
    folder = tmp_path_factory.mktemp("model") / "tiny-prior"
    bk.TorchLM(tiny_gpt2(tie_word_embeddings=False), tiny_tokenizer()).save_pretrained(folder)
    prior = bk.TorchLM.from_pretrained(folder, temperature=0.8)
    posterior = bk.Posterior(prior, LENGTH, prompts="a b", max_new_tokens=2)
    return bk.SVI(1, 4, adapter="lora").fit(posterior, seed=0)


def front_matter(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    return dict(yaml.safe_load(front))


def test_the_card_says_which_posterior_and_how_near(tmp_path: Path) -> None:
    certificate = bk.certify(POSTERIOR, FIT.guide, seed=0, num_draws=32)
    FIT.save(tmp_path, certificate=certificate)
    card = (tmp_path / "README.md").read_text()
    assert front_matter(card) == {
        "library_name": "bayes_klrl",
        "tags": ["bayes_klrl", "kl-regularised-rl", "variational-inference"],
    }
    assert "| alpha (the KL coefficient) | 0.25 |" in card
    assert r"| likelihood (the reward) | length \| of &lt;it> |" in card
    assert "| prompts | 2 |" in card
    assert "| max_new_tokens | 3 |" in card
    assert "| steps | 2 |" in card
    assert f"```text\n{certificate}\n```" in card
    assert "NgramLM.from_pretrained(folder)" in card
    assert bk.NgramLM.from_pretrained(tmp_path).vocab_size == 2


OTHER = bk.NgramLM(np.log([0.9, 0.1]), eos_token_id=1)
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no certificate": (lambda: "A", r"must be a bk\.Certificate, or None; got 'A'"),
    "another alpha": (
        lambda: bk.certify(POSTERIOR.at_alpha(0.5), FIT, seed=0, num_draws=32),
        "a posterior with alpha = 0.5, and the guide's has 0.25",
    ),
    "another length": (
        lambda: bk.certify(bk.Posterior(COIN, LENGTH, prompts=[[], [0]], max_new_tokens=2), FIT, seed=0, num_draws=32),
        "max_new_tokens = 2, and the guide's has 3",
    ),
    "another prior": (
        lambda: bk.certify(bk.Posterior(OTHER, LENGTH, prompts=[[0]], max_new_tokens=3), FIT, seed=0, num_draws=32),
        "another prior: log-probs of its completions differ by 0",
    ),
    "another policy": (lambda: bk.certify(POSTERIOR, OTHER, seed=0, num_draws=32), "another policy: log-probs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_certificate_of_something_else_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    make, why = REFUSED[name]
    with pytest.raises(bk.BayesKLRLError, match=why):
        FIT.save(tmp_path / "guide", certificate=make())
    assert not list(tmp_path.iterdir())


def test_a_certificate_on_held_out_prompts_is_quoted(tmp_path: Path) -> None:
    held_out = bk.Posterior(COIN, LENGTH, prompts=[[0, 0]], max_new_tokens=3)
    certificate = bk.certify(held_out, FIT, seed=0, num_draws=32)
    assert str(certificate) in (FIT.save(tmp_path, certificate=certificate) / "README.md").read_text()


def test_the_card_of_a_model_and_of_an_adapter(adapter_fit: bk.Fit, tmp_path: Path) -> None:
    """The base is named as one may publish it, not by a path of this machine; peft's own card gives way to ours."""
    for merged, library in ((True, "transformers"), (False, "peft")):
        folder = adapter_fit.save(tmp_path / library, merged=merged)
        card = (folder / "README.md").read_text()
        front = front_matter(card)
        assert (front["base_model"], front["library_name"]) == ("tiny-prior", library)
        assert "None was made." in card
        assert "| temperature of prior and guide | 0.8 |" in card
        assert str(tmp_path) not in card
        bk.certify(adapter_fit.posterior, folder, seed=0, num_draws=32)


def test_a_card_of_ours_is_replaced_and_one_of_others_is_kept(adapter_fit: bk.Fit, tmp_path: Path) -> None:
    for fit, options in ((FIT, {}), (adapter_fit, {"merged": False})):
        folder = tmp_path / type(fit.guide).__name__
        fit.save(folder, **options)
        fit.save(folder, **options)  # without a warning, which would be an error
        (folder / "README.md").write_text(THEIRS)
        with pytest.warns(UserWarning, match="was not written by bayes_klrl and stays as it was") as warned:
            fit.save(folder, **options)
        assert [each.filename for each in warned] == [__file__]
        assert (folder / "README.md").read_text() == THEIRS
        assert "An approximate posterior" in (folder / "BAYES_KLRL.md").read_text()


def test_names_that_may_be_published() -> None:
    class Prior:
        def __init__(self, name: str | None) -> None:
            self.module = type("Module", (), {"name_or_path": name})

    names = {
        "owner/name": "owner/name",
        "/data/models/base": "base",
        "./base": "base",
        "a/b/c": "c",
        "": None,
        None: None,
    }
    assert {name: base_model_name(Prior(name)) for name in names} == names
    assert base_model_name(COIN) is None


def test_no_text_breaks_out_of_its_place() -> None:
    assert cell("a\n|b\\") == r"a \|b\\"
    assert len(cell("x" * 1000)) == 120
    assert fenced("```").startswith("````text\n")


class FakeHub:
    """A client of the hub that keeps what it was given."""

    def __init__(self, readme: Path | None = None, error: Exception | None = None) -> None:
        self.readme, self.error = readme, error
        self.created: list[Any] = []
        self.uploaded: dict[str, str] = {}

    def create_repo(self, repo_id: str, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        self.created.append((repo_id, options))

    def file_exists(self, repo_id: str, filename: str) -> bool:
        return self.readme is not None and filename == "README.md"

    def hf_hub_download(self, repo_id: str, filename: str) -> str:
        return str(self.readme)

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> str:
        files = (path for path in Path(folder_path).iterdir() if path.is_file())
        self.uploaded = {path.name: path.read_text(errors="replace") for path in files}
        return f"commit of {repo_id}: {commit_message}"


def connect(monkeypatch: pytest.MonkeyPatch, hub: FakeHub) -> list[Any]:
    tokens: list[Any] = []
    monkeypatch.setattr("bayes_klrl.export.hub.hub_api", lambda token: tokens.append(token) or hub)
    return tokens


def test_a_guide_is_pushed_as_it_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub()
    tokens = connect(monkeypatch, hub)
    address = FIT.push_to_hub("me/guide", private=True, token="secret", commit_message="first")
    assert address == "commit of me/guide: first"
    assert tokens == ["secret"]
    assert hub.created == [("me/guide", {"private": True, "exist_ok": True})]
    assert {"README.md", "ngram.npz"} <= hub.uploaded.keys()
    assert "None was made." in hub.uploaded["README.md"]
    assert not any("secret" in text for text in hub.uploaded.values())


def test_a_readme_of_others_on_the_hub_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(THEIRS)
    hub = FakeHub(tmp_path / "README.md")
    connect(monkeypatch, hub)
    with pytest.warns(UserWarning, match="'me/guide' was not written by bayes_klrl and stays as it was"):
        FIT.push_to_hub("me/guide")
    assert "BAYES_KLRL.md" in hub.uploaded
    assert "README.md" not in hub.uploaded
    (tmp_path / "README.md").write_text(hub.uploaded["BAYES_KLRL.md"])  # ours is replaced
    FIT.push_to_hub("me/guide")
    assert "README.md" in hub.uploaded


def test_an_adapter_of_a_local_base_is_not_pushed(adapter_fit: bk.Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub()
    connect(monkeypatch, hub)
    with pytest.raises(
        bk.BayesKLRLError, match=r"names the folder .* as its base, which nobody else has\. Push the whole"
    ):
        adapter_fit.push_to_hub("me/guide", merged=False)
    assert not hub.created
    adapter_fit.push_to_hub("me/guide")
    assert json.loads(hub.uploaded["config.json"])["model_type"] == "gpt2"


@pytest.mark.parametrize("name", ["", "a b", "a/b/c", "-a", "a..b"])
def test_a_name_that_no_repository_can_have_is_refused_first(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = FakeHub()
    connect(monkeypatch, hub)
    with pytest.raises(bk.BayesKLRLError, match="cannot be a repository of the hub"):
        FIT.push_to_hub(name)
    assert not hub.created


def test_without_network_or_token_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    connect(monkeypatch, FakeHub(error=ConnectionError("no route to host")))
    with pytest.raises(bk.BayesKLRLError, match=r"not pushed to 'me/guide': no route to host\. Log in with"):
        FIT.push_to_hub("me/guide")
