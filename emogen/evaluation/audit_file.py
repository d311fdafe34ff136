"""What an audit says about the rows of a run, as a file of its folder: `emogen audit` writes it, reports show it."""

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from emogen import paths
from emogen.errors import InputError
from emogen.evaluation.run_folder import AUDIT, PREDICTIONS, read_text


class AuditedRow(BaseModel):
    """A row that something is said about.

    Attributes:
        suspected: each label that is probably wrong, with its probability.
        suggested: the labels with every suspected one turned round.
        twins: the ids of texts that are nearly the same and have other labels.
        reasons: all that is said, in words.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: str
    suspected: dict[str, float]
    suggested: tuple[str, ...]
    twins: tuple[str, ...]
    reasons: tuple[str, ...]


class AuditedRelation(BaseModel):
    """A rule about two labels that nearly all rows obey: in words, and the ids of the rows that break it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sentence: str
    exceptions: tuple[str, ...]


class AuditFile(BaseModel):
    """The whole file.

    Attributes:
        predictions: the sha256 of the predictions that were audited. Others make the file outdated.
        systems: the folders whose probabilities were used, as they were named.
        rows: the worst first.
        list_file: where the list to correct is, from the run folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    predictions: str
    systems: tuple[str, ...]
    rows: tuple[AuditedRow, ...]
    relations: tuple[AuditedRelation, ...]
    list_file: str = "audit.csv"

    def is_of(self, folder: Path) -> bool:
        """Whether the predictions of a folder are those that were audited."""
        return self.predictions == predictions_digest(folder)


def predictions_digest(folder: Path) -> str:
    """The sha256 of the predictions file of a folder."""
    with (folder / PREDICTIONS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_audit(folder: Path, audit: AuditFile) -> None:
    """Write the file into a run folder; an older one is replaced."""
    with paths.writing(folder / AUDIT) as file:
        file.write(audit.model_dump_json(indent=1) + "\n")


def read_audit(folder: Path) -> AuditFile | None:
    """Read the file of a run folder; None if nobody has audited it.

    Raises:
        InputError: the file is not what emogen writes.
    """
    text = read_text(folder / AUDIT)
    if text is None:
        return None
    try:
        return AuditFile.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{folder / AUDIT}: {place + ': ' if place else ''}{first['msg']}; was the file changed? emogen audit "
            "writes it again"
        ) from None
