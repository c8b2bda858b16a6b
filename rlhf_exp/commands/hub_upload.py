"""Uploads of exported models to the Hugging Face hub: `rlhf-exp export RUN DIR --push ORG/NAME`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlhf_exp.errors import UserError


def create_repository(repository: str, private: bool) -> None:
    """Create a repository of the hub, unless it exists.

    Args:
        repository: Its hub id, `ORG/NAME`.
        private: Whether only its owners see it, if it is new.

    Raises:
        UserError: No token is set, or the hub does not let it write there, or does not answer.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UserError(
            f"--push {repository}: no token of the Hugging Face hub; log in with `hf auth login`, "
            "or set HF_TOKEN to one that may write"
        )
    with _as_user_errors(repository):
        HfApi().create_repo(repository, private=private, exist_ok=True)


def upload(repository: str, folder: Path, content: str) -> str:
    """Upload a folder as one commit; return the commit's address.

    Files of the repository that the folder lacks stay: its history is the user's.

    Args:
        repository: Its hub id.
        folder: The exported model.
        content: What it is, for the commit's message.

    Raises:
        UserError: The hub refuses, or does not answer.
    """
    from huggingface_hub import HfApi

    with _as_user_errors(repository):
        commit = HfApi().upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"rlhf_exp: {content}"
        )
    return str(commit.commit_url)


@contextmanager
def _as_user_errors(repository: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library, and those below it, raise many unrelated classes
        lines = (str(error) or type(error).__name__).strip().splitlines()
        raise UserError(
            f"--push {repository}: the hub did not take it ({lines[0]}). What was exported stays "
            "in its folder; check the token's rights (`hf auth whoami`) and the name, and upload "
            f"it with `hf upload {repository} FOLDER`"
        ) from error
