"""Whose manifests and images this device takes: `[trust]` of agent.toml, its keys read once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ..modules.errors import InvalidReference
from ..modules.oci.reference import ImageRef
from ..modules.signing import MAX_KEY_BYTES, KeyUnusable, PublicKey, read_public_key
from .config import ConfigError, TrustConfig
from .store_types import Proof


@dataclass(frozen=True, slots=True)
class ImageRule:
    """For images at or below `prefix` ("registry[/path]", "" for all)."""

    prefix: str
    require: bool
    keys: Mapping[str, PublicKey]


@dataclass(frozen=True, slots=True)
class Trust:
    """`keys` by their id in agent.toml. The default trusts everything, as without a policy."""

    manifests_required: bool = False
    keys: Mapping[str, PublicKey] = field(default_factory=dict)
    images: tuple[ImageRule, ...] = ()

    def rule_for(self, ref: ImageRef) -> ImageRule | None:
        """The rule with the longest prefix; None where no signature is asked for."""
        name = f"{ref.registry}/{ref.repository}"
        fitting = [
            rule
            for rule in self.images
            if not rule.prefix or name == rule.prefix or name.startswith(f"{rule.prefix}/")
        ]
        rule = max(fitting, key=lambda one: len(one.prefix), default=None)
        return rule if rule is not None and rule.require else None


def load_trust(config: TrustConfig) -> Trust:
    """Read the keys that `config` names. Raises ConfigError."""
    keys: dict[str, PublicKey] = {}
    for one in config.keys:
        if not one.id or one.id in keys:
            raise ConfigError(f"trust.keys: the id {one.id!r} is empty or given twice")
        try:
            with one.file.open("rb") as file:
                keys[one.id] = read_public_key(file.read(MAX_KEY_BYTES), str(one.file))
        except OSError as error:
            raise ConfigError(f"trust.keys: cannot read {one.file}: {error.strerror}") from error
        except KeyUnusable as error:
            raise ConfigError(f"trust.keys: {error}") from error
    if config.manifests == "require" and not keys:
        raise ConfigError(
            "trust.manifests is require and trust.keys is empty: no manifest could ever be taken"
        )
    rules: list[ImageRule] = []
    for rule in config.images:
        unknown = sorted(set(rule.keys) - set(keys))
        if unknown:
            raise ConfigError(f"trust.images: no key {unknown[0]!r} among trust.keys")
        chosen = {name: keys[name] for name in rule.keys} or keys
        if rule.require and not chosen:
            raise ConfigError(f"trust.images: {rule.prefix!r} needs a key in trust.keys")
        prefix = _prefix(rule.prefix)
        if prefix in (other.prefix for other in rules):
            raise ConfigError(f"trust.images: two rules for {rule.prefix!r}")
        rules.append(ImageRule(prefix, rule.require, chosen))
    return Trust(config.manifests == "require", keys, tuple(rules))


def older_than_accepted(
    generation: int, sha256: str, accepted: Iterable[Proof], trusted: Iterable[PublicKey]
) -> Proof | None:
    """What was accepted before and is newer, or as new and something else; None if nothing is.

    Only proofs of keys that are still trusted count: whoever had a key that was withdrawn cannot
    have locked the device at a generation of their choice.
    """
    known = {key.fingerprint for key in trusted}
    highest = [proof for proof in accepted if proof.key in known and proof.generation >= generation]
    if any(proof.generation == generation and proof.sha256 == sha256 for proof in highest):
        highest = [proof for proof in highest if proof.generation > generation]
    return max(highest, key=lambda proof: proof.generation, default=None)


def _prefix(text: str) -> str:
    prefix = text.rstrip("/")
    if not prefix:
        return ""
    # As images are named in full: "digits" alone would be a repository of docker.io.
    first, _, rest = prefix.partition("/")
    if not rest and ("." in first or ":" in first or first == "localhost"):
        return first
    try:
        ref = ImageRef.parse(prefix)
    except InvalidReference as error:
        raise ConfigError(f"trust.images: {error}") from error
    if ":" in prefix.rpartition("/")[2] or ref.digest:
        raise ConfigError(f"trust.images: {text!r}: a prefix ends before the tag")
    return f"{ref.registry}/{ref.repository}" if rest else f"{ref.registry}/{first}"
