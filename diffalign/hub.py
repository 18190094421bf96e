"""An exported folder to the Hugging Face hub, by `diffalign export --push-to-hub`."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import RunError, UserError


def check_hub(repo: str) -> None:
    """Before any work: the repository's name, a token, and no offline mode.

    Raises UserError for what would fail for certain."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"'{repo}' is no name of a hub repository; write --push-to-hub USER/NAME") from error
    if "/" not in repo:
        raise UserError(f"'{repo}' lacks its owner; write --push-to-hub USER/{repo}")
    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it, or leave --push-to-hub out")
    if not get_token():
        raise UserError(
            "there is no hub token on this machine; run `hf auth login` or set HF_TOKEN (with write access)"
        )


def push(folder: Path, repo: str, private: bool) -> str:
    """Makes the repository where there is none and uploads the folder as one commit; returns its address.

    An existing repository keeps its visibility.

    Raises RunError when the hub refuses or is out of reach; the exported folder stays."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    api = HfApi(library_name="diffalign")
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload by diffalign export")
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reasons = {
            401: "the token is not valid; run `hf auth login`",
            403: f"the token may not write to it; make a token with write access to '{repo.partition('/')[0]}'",
            404: "there is no such owner, or the token cannot see it",
        }
        raise _failed(folder, repo, reasons.get(status, _line(error))) from error
    except (HTTPError, OSError, ValueError) as error:
        raise _failed(folder, repo, _line(error)) from error
    return str(address)


def _failed(folder: Path, repo: str, reason: str) -> RunError:
    """What was saved, and the command that goes on from there."""
    return RunError(f"exported to '{folder}', but not pushed: {reason}; then: hf upload {repo} {os.fspath(folder)}")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
