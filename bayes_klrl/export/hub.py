"""Publishing a saved folder on the Hugging Face hub, without replacing what others wrote there."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.export.model_card import CARD, OTHER_CARD, is_ours

__all__ = ["check_repo_id", "hub_api", "push_folder"]


def hub_api(token: str | bool | None) -> Any:
    """Return the client of the hub."""
    from huggingface_hub import HfApi

    return HfApi(token=token)


def check_repo_id(repo_id: str) -> None:
    """Refuse a name that no repository of the hub can have, before anything is computed.

    Raises
    ------
    BayesKLRLError
        If it is no name of the form "owner/name" or "name".
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but in no __all__

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise BayesKLRLError(f"{repo_id!r} cannot be a repository of the hub. Give 'owner/name'. ({error})") from error


def check_base_is_public(folder: Path) -> None:
    """Refuse an adapter whose base is a folder of this machine: nobody who downloads it could load it."""
    file = folder / "adapter_config.json"
    name = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path") if file.is_file() else None
    if name and (Path(name).is_absolute() or Path(name).exists()):
        raise BayesKLRLError(
            f"This adapter names the folder {name!r} as its base, which nobody else has. Push the whole model (merged=True), "
            "or load the prior by its hub id and fit again."
        )


def push_folder(folder: Path, repo_id: str, *, private: bool | None, token: str | bool | None, message: str) -> str:
    """Upload a folder as a commit of a repository, which is made if it is not there; return the commit's address.

    A README.md in the repository that is not ours is kept, and the model card is uploaded as BAYES_KLRL.md.

    Raises
    ------
    BayesKLRLError
        If the hub cannot be reached or refuses; the message has its reason and the cure.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    check_base_is_public(folder)
    api = hub_api(token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if api.file_exists(repo_id, CARD) and not is_ours(Path(api.hf_hub_download(repo_id, CARD)).read_text("utf-8")):
            (folder / CARD).rename(folder / OTHER_CARD)
            warnings.warn(
                f"The {CARD} of {repo_id!r} was not written by bayes_klrl and stays as it was; the model card is in "
                f"{OTHER_CARD}.",
                stacklevel=3,
            )
        commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:  # OSError: no network
        raise BayesKLRLError(
            f"The guide was not pushed to {repo_id!r}: {error}. Log in with `hf auth login` or give token=..., or write it "
            "with fit.save(folder) and upload that."
        ) from error
    return str(getattr(commit, "commit_url", commit))
