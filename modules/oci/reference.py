"""Image names as Docker reads them: `[registry/]repository[:tag][@sha256:...]`.

Source: the distribution project's reference grammar and Docker's rule for the registry part.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ..errors import InvalidReference

DEFAULT_REGISTRY = "docker.io"
DEFAULT_TAG = "latest"

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]{{1,5}})?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def is_digest(text: str) -> bool:
    """Whether `text` is `sha256:` and 64 lower-case hexadecimal digits."""
    return _DIGEST.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class ImageRef:
    """A parsed image name. `digest`, when there is one, decides; the tag is then for people.

    `str()` gives the full name, which parses to an equal reference. Build with `parse`.
    """

    registry: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> ImageRef:
        """Raises InvalidReference."""
        name, at, digest = text.partition("@")
        if at and not is_digest(digest):
            raise _invalid(text, "after '@' comes sha256: and 64 lower-case hexadecimal digits")
        first, slash, rest = name.partition("/")
        if slash and ("." in first or ":" in first or first == "localhost"):
            registry, path = first, rest
        else:
            registry, path = DEFAULT_REGISTRY, name
        if not _REGISTRY.fullmatch(registry):
            raise _invalid(text, f"{registry!r} is not HOST or HOST:PORT")
        repository, colon, tag = path.partition(":")
        if colon and not _TAG.fullmatch(tag):
            raise _invalid(
                text, "a tag is 1 to 128 letters, digits, '_', '.' or '-', not starting with . or -"
            )
        if registry == DEFAULT_REGISTRY and "/" not in repository:
            repository = f"library/{repository}"
        # The length first: the pattern backtracks.
        if len(repository) > 255 or not _REPOSITORY.fullmatch(repository):
            raise _invalid(
                text,
                "a repository is lower-case letters and digits, separated by '/', '.', '_' or '-', "
                "255 at most",
            )
        return cls(
            registry, repository, tag if colon else None if at else DEFAULT_TAG, digest or None
        )

    @property
    def target(self) -> str:
        """What to ask the registry for: the digest, or else the tag."""
        return self.digest or self.tag or DEFAULT_TAG

    def pinned(self, digest: str) -> ImageRef:
        """The same image, by digest. Raises InvalidReference."""
        if not is_digest(digest):
            raise _invalid(digest, "a digest is sha256: and 64 lower-case hexadecimal digits")
        return replace(self, digest=digest)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.registry}/{self.repository}{tag}{digest}"


def _invalid(text: str, rule: str) -> InvalidReference:
    return InvalidReference(
        f"image name {text[:300]!r}: {rule}; expected for example "
        "registry.example:5000/models/digits:v1"
    )
