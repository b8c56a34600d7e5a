"""Files of the Hugging Face hub, named ``hf:OWNER/REPO/FILE[@REVISION]``."""

from __future__ import annotations

import functools
import hashlib
import logging
import re
from pathlib import Path

from utils.errors import UserError
from utils.files import companion

PREFIX = "hf:"

_log = logging.getLogger(__name__)


@functools.cache
def local_file(path: Path) -> Path:
    """A path as it is, or the local copy of a file of the hub.

    The file is downloaded once into the cache of huggingface_hub, with what belongs to it in its folder: the
    manifest and the results (as ``runs.publish`` writes them), or a released checkpoint's second file.
    Without network the cache is used.

    Raises:
        UserError: the name is not of that form, there is no such file, or it cannot be downloaded.
    """
    named = str(path)
    if not named.startswith(PREFIX):
        return path
    file, _, revision = named.removeprefix(PREFIX).partition("@")
    repository, name = "/".join(file.split("/")[:2]), "/".join(file.split("/")[2:])
    if not name or named.endswith("@"):
        raise UserError(f"{named}: give {PREFIX}OWNER/REPO/FILE, or {PREFIX}OWNER/REPO/FILE@REVISION")
    try:
        local = download(repository, name, revision or None)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
    folder, manifest = name.rpartition("/")[0], local.with_suffix(".json")
    wanted = rf"{re.escape(manifest.name)}|{re.escape(companion(local).name)}|results_\d+\.json"
    beside = [
        other
        for other in (() if manifest.is_file() else _listed(repository, revision or None))
        if other.rpartition("/")[0] == folder and other != name and re.fullmatch(wanted, Path(other).name)
    ]
    # The manifest last: while it is missing, the others are asked for again.
    for other in sorted(beside, key=lambda other: Path(other).name == manifest.name):
        try:
            download(repository, other, revision or None)
        except FileNotFoundError as error:
            raise UserError(str(error)) from error
    return local


def download(repository: str, name: str, revision: str | None = None) -> Path:
    """The cached copy of a file of the hub, downloaded if it is not there.

    Raises:
        UserError: it cannot be downloaded, or its content is not the hub's.
        FileNotFoundError: the repository has no such file, or without network the cache has not.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"huggingface.co/{repository}"
    try:
        path = Path(hf_hub_download(repository, name, revision=revision))
    except RevisionNotFoundError as error:
        raise UserError(f"{where}: has no revision {revision}; check the name after @") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{where}: no such repository, or a private one; check its name, or log in with `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{where}: {name} cannot be downloaded (no network?) and is not in the cache; download it on a "
            "machine with network, and give the file's path"
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(f"{where}: has no file {name}; check its name") from error
    except Exception as error:  # requests' errors in huggingface_hub 0, httpx's in 1
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{where}: {name} cannot be downloaded ({reason}); try again later") from error
    _check_digest(path)
    return path


def _listed(repository: str, revision: str | None) -> list[str]:
    """Names of a repository's files; none without network, where those of the cache have to do."""
    from huggingface_hub import HfApi

    try:
        return list(HfApi().list_repo_files(repository, revision=revision))
    except Exception as error:  # requests' errors in huggingface_hub 0, httpx's in 1
        _log.info(
            "huggingface.co/%s: its list of files cannot be read (%s)", repository, type(error).__name__
        )
        return []


def _check_digest(path: Path) -> None:
    """Check the SHA-256 of a file in the hub's cache, which names large files by it."""
    expected = path.resolve().name
    if not re.fullmatch(r"[0-9a-f]{64}", expected):
        return
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        # The name is a link to it; without it the file is downloaded again.
        raise UserError(
            f"{path.resolve()}: wrong checksum, the download is damaged; delete this file and restart"
        )
