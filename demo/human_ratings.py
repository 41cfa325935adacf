"""Human ratings of review snippets, from the source distribution of vaderSentiment 0.5 on PyPI.

It carries the data of Hutto and Gilbert (ICWSM 2014): 10,604 sentences of film reviews and 3,707 of product reviews,
each with the mean rating of about twenty people in [-4, 4]. The texts are third-party excerpts: they are downloaded
for training and never stored in this repository.
"""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

REQUIREMENT = "vaderSentiment==0.5"
ARCHIVE = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
FILES = {
    "film": "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
    "product": "hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
}
DOWNLOAD_TIMEOUT_SECONDS = 180

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RatedSnippet:
    """A sentence about a "film" or a "product" and its mean human rating in [-4, 4]."""

    about: str
    text: str
    rating: float


class RatingsUnavailable(Exception):
    """The package could not be had; the message says why."""


def download(folder: Path) -> Path:
    """Fetch the source distribution with pip into `folder`; an archive that is there already is used."""
    found = sorted(folder.glob("vaderSentiment-0.5.*"))
    if found:
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    try:
        done = subprocess.run(
            [*command, "--dest", str(folder), REQUIREMENT],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RatingsUnavailable(f"pip download {REQUIREMENT} took over {error.timeout} s") from error
    found = sorted(folder.glob("vaderSentiment-0.5.*"))
    if done.returncode != 0 or not found:
        reason = done.stderr.strip().splitlines()[-1:] or ["no archive"]
        raise RatingsUnavailable(f"pip download {REQUIREMENT} failed: {reason[0]}")
    return found[0]


def read(archive: Path) -> list[RatedSnippet]:
    """All snippets of the archive in the order of its files. Raises RatingsUnavailable for a foreign archive."""
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as outer:
                inner = outer.read(ARCHIVE)
        else:
            with tarfile.open(archive) as outer_tar:
                member = outer_tar.extractfile(ARCHIVE)
                if member is None:
                    raise RatingsUnavailable(f"{ARCHIVE} is not a file in the archive")
                inner = member.read()
    except KeyError as error:
        raise RatingsUnavailable(f"{ARCHIVE} is not in the archive") from error
    snippets: list[RatedSnippet] = []
    with tarfile.open(fileobj=io.BytesIO(inner)) as ratings:
        for about, name in FILES.items():
            table = ratings.extractfile(name)
            if table is None:
                raise RatingsUnavailable(f"{name} is not a file in the archive")
            for line in table.read().decode("utf-8", errors="replace").splitlines():
                fields = line.split("\t")
                if len(fields) == 3:
                    snippets.append(RatedSnippet(about, fields[2].replace("''", '"').strip(), float(fields[1])))
    return snippets


def load(folder: Path | None = None) -> list[RatedSnippet]:
    """Download (into `folder`, or a temporary one) and read. Raises RatingsUnavailable."""
    if folder is not None:
        return read(download(folder))
    with tempfile.TemporaryDirectory() as temporary:
        return read(download(Path(temporary)))


def load_or_warn(folder: Path | None = None) -> list[RatedSnippet]:
    """`load`, or an empty list and a warning that says what the model will lack."""
    try:
        return load(folder)
    except RatingsUnavailable as error:
        log.warning("Training goes on WITHOUT the human-rated snippets: %s", error)
        log.warning("The sentiment model then knows only the grammar's own grades.")
        return []
