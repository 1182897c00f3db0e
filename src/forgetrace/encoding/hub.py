"""Models of the Hugging Face hub: a folder, else the hub's cache, else a download into it."""

from collections.abc import Callable, Sequence
from pathlib import Path

from forgetrace.artifacts import UserError


def local_copy(
    name: str, choices: Sequence[list[str]], lacking: Callable[[Path], str | None], what: str, instead: str
) -> Path:
    """The folder of a model.

    What is cached comes first, so that the queries of a running experiment meet the model its training images met.

    Args:
        name: a folder, or a model of the hub as ``owner/model`` or ``owner/model@revision``.
        choices: patterns of the files wanted, in order of preference.
        lacking: names a file that a folder lacks, None where it is complete.
        what: what to call the model in messages.
        instead: what else a user without network can do, the end of a sentence.

    Raises:
        UserError: there is no such model, or no network to fetch it over.
    """
    from huggingface_hub import constants, snapshot_download

    if Path(name).is_dir():
        if absent := lacking(Path(name)):
            raise UserError(f"The {what} {name} lacks {absent}: save or download the whole model there.")
        return Path(name)
    repository, _, revision = name.partition("@")
    for cached in (True, False):
        for patterns in choices:
            try:
                folder = Path(
                    snapshot_download(
                        repository, revision=revision or None, allow_patterns=patterns, local_files_only=cached
                    )
                )
            except Exception as error:  # no network, no such name, no permission: every layer has its own
                reason = str(error).split("\n")[0].rstrip(".:")
                continue
            if not (absent := lacking(folder)):
                return folder
            reason = f"it lacks {absent}"
    download = f"hf download {repository}" + (f" --revision {revision}" if revision else "")
    raise UserError(
        f"The {what} '{name}' is no folder, not in the cache {constants.HF_HUB_CACHE} and could not be "
        f"downloaded ({reason}): run `{download}` where there is a network and copy "
        f"models--{repository.replace('/', '--')} from its cache to this one (with HF_HUB_OFFLINE=1 no job tries the "
        f"network), or {instead}."
    )
