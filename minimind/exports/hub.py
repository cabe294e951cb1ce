"""Exported folders to a hub of models, by the hub's own client."""

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from minimind.errors import UserError
from minimind.exports.receipt import RECEIPT, ggufs_of, read_receipt, require_whole


def files_to_publish(folder: Path) -> list[Path]:
    """What the receipt has, the receipt, and GGUF files with what belongs to them.

    Raises:
        UserError: there is no receipt, or the folder is not what it says.
    """
    require_whole(folder)
    names = [*read_receipt(folder).files, RECEIPT]
    gguf = ggufs_of(folder)
    beside = [file.with_suffix(".Modelfile") for file in gguf]
    return [*(folder / name for name in names), *gguf, *filter(Path.is_file, beside)]


def require_name(repository: str) -> None:
    """Raises UserError for what is no name of a repository on the hub."""
    try:
        validate_repo_id(repository)
        is_name = repository.count("/") == 1
    except HFValidationError:
        is_name = False
    if not is_name:
        raise UserError(
            f"{repository!r} is no repository's name; it is user/name, of letters, digits, -, _ "
            "and dots."
        )


def publish(folder: Path, repository: str, private: bool) -> str:
    """Send an exported folder; returns where it is.

    Raises:
        UserError: as :func:`files_to_publish` does; or the hub refuses, or cannot be reached.
    """
    files = files_to_publish(folder)
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(file.name, file) for file in files],
            commit_message=f"Upload {folder.resolve().name}",
        )
    except Exception as error:  # the client raises whatever its parts raise
        said = " ".join(str(error).split())
        raise UserError(
            f"{repository} was not published: {type(error).__name__}: {said}; `hf auth login` or "
            "HF_TOKEN says who you are."
        ) from None
    return str(commit.commit_url)
