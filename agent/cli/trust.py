"""`gatelet image sign|verify` and `gatelet manifest sign|verify`: what devices ask for."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command import CommandError, add_json_option, print_json, wrong_use

if TYPE_CHECKING:
    from ...modules.signing import PrivateKey, PublicKey

PASSWORDS = ("GATELET_KEY_PASSWORD", "COSIGN_PASSWORD")
_CHUNK_CHARACTERS = 1024
"""Of a manifest inside a twin: at most 4 KB in UTF-8, whatever is written."""


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `manifest` and its commands."""
    parser = commands.add_parser(
        "manifest",
        help="sign and verify deployment manifests",
        description="Signatures over deployment manifests, in cosign's key format.",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    sign = actions.add_parser(
        "sign",
        help="sign a manifest, and print the document to deploy",
        description="Prints the document to deploy in place of the manifest: with --url a "
        "reference to it, otherwise the manifest with its signature.",
    )
    sign.add_argument("file", metavar="FILE", type=Path, help="the manifest")
    _add_private_key(sign)
    sign.add_argument("--key-id", metavar="ID", default="", help="what devices call the key")
    sign.add_argument(
        "--generation",
        type=_generation,
        metavar="N",
        help="write this generation into the manifest; devices refuse lower ones from then on",
    )
    sign.add_argument("--url", help="where devices are to fetch the manifest")
    sign.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="the manifest as signed, for the server"
    )
    sign.set_defaults(run=_sign_manifest)

    verify = actions.add_parser("verify", help="check what `manifest sign` printed")
    verify.add_argument("document", metavar="DOCUMENT", type=Path)
    verify.add_argument(
        "--manifest", metavar="FILE", type=Path, help="the manifest that it refers to"
    )
    _add_public_keys(verify)
    add_json_option(verify)
    verify.set_defaults(run=_verify_manifest)


def _add_private_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--key",
        type=Path,
        required=True,
        metavar="KEY",
        help=f"private key (PEM, P-256, or cosign.key); its password comes from ${PASSWORDS[0]} "
        f"or ${PASSWORDS[1]}",
    )


def _add_public_keys(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--key",
        type=Path,
        required=True,
        action="append",
        metavar="PUB",
        help="public key such as cosign.pub (again for more: any of them)",
    )


def add_image_options(sign: argparse.ArgumentParser, verify: argparse.ArgumentParser) -> None:
    """The options of `image sign` and `image verify`."""
    for parser in (sign, verify):
        parser.add_argument("reference", metavar="REF", help="an image in a registry")
    _add_private_key(sign)
    sign.add_argument(
        "--generation",
        type=_generation,
        metavar="N",
        help="devices that took a generation of this repository refuse lower ones",
    )
    sign.add_argument(
        "-a",
        "--annotation",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a further annotation of the signature",
    )
    _add_public_keys(verify)


def sign_image(arguments: argparse.Namespace, client: Any, reference: Any) -> None:
    """Sign the image that `reference` names now. Raises CommandError, ImageError."""
    from ...modules.oci.pull import resolve
    from ...modules.oci.signatures import GENERATION, sign_image

    annotations = {}
    for text in arguments.annotation:
        name, equals, value = text.partition("=")
        if not equals or not name:
            wrong_use(f"-a {text}: expected NAME=VALUE")
        annotations[name] = value
    if arguments.generation is not None:
        annotations[GENERATION] = str(arguments.generation)
    key = _private_key(arguments.key)
    digest = resolve(client, reference)
    tag = sign_image(client, reference, digest, key, annotations)
    signed = str(reference.pinned(digest))
    if arguments.json:
        print_json({"reference": signed, "digest": digest, "tag": tag})
    else:
        print(f"{signed} signed: {tag}")


def verify_image(arguments: argparse.Namespace, client: Any, reference: Any) -> None:
    """Check the signatures of `reference`. Raises CommandError, ImageError."""
    from ...modules.oci.pull import resolve
    from ...modules.oci.signatures import fetch_signatures, trusted_signer

    keys = {str(path): _public_key(path) for path in arguments.key}
    digest = resolve(client, reference)
    what = str(reference.pinned(digest))
    signer = trusted_signer(digest, fetch_signatures(client, reference, digest), keys, what)
    if arguments.json:
        print_json({"reference": what, "key": signer.name, "generation": signer.generation})
    else:
        print(f"{what} is signed with {signer.name}, generation {signer.generation}")


def _sign_manifest(arguments: argparse.Namespace) -> int:
    from ..document import ManifestError
    from ..manifest import parse_manifest
    from ..manifest_reference import find_reference, signed_generation
    from ..twin_fit import twin_misfits

    body = _read(arguments.file)
    if arguments.generation is not None:
        if arguments.url and arguments.output is None:
            wrong_use("--generation changes the manifest: name with -o where to write it")
        body = _with_generation(body, arguments.generation, arguments.file)
    try:
        parse_manifest(body)
        generation = signed_generation(body)
    except ManifestError as error:
        hint = "; give it one with --generation" if error.path == "signed" else ""
        raise CommandError(f"{arguments.file}: {error}{hint}") from error
    inside: dict[str, Any]
    if arguments.url:
        inside = {"url": arguments.url, "sha256": hashlib.sha256(body).hexdigest()}
    else:
        text = body.decode()
        steps = range(0, len(text), _CHUNK_CHARACTERS)
        inside = {"body": [text[start : start + _CHUNK_CHARACTERS] for start in steps]}
    inside["signature"] = _private_key(arguments.key).sign(body)
    if arguments.key_id:
        inside["keyId"] = arguments.key_id
    document = json.dumps({"manifest": inside}, indent=2, ensure_ascii=False)
    try:
        # A device decides about plain HTTP by its own configuration.
        find_reference(document.encode(), (_host(arguments.url),))
        misfits = twin_misfits(document.encode())
    except ManifestError as error:
        raise CommandError(f"{error}", 2) from error
    if arguments.output is not None:
        try:
            arguments.output.write_bytes(body)
        except OSError as error:
            raise CommandError(f"cannot write {arguments.output}: {error.strerror}") from error
    for misfit in misfits:
        print(f"gatelet: IoT Hub would not take this: {misfit}", file=sys.stderr)
    print(document)
    print(f"gatelet: signed as generation {generation}", file=sys.stderr)
    return 0


def _verify_manifest(arguments: argparse.Namespace) -> int:
    from ..document import ManifestError
    from ..manifest_reference import check_hash, find_reference, signed_generation

    document = _read(arguments.document)
    keys = {str(path): _public_key(path) for path in arguments.key}
    try:
        reference = find_reference(document, _hosts(document))
        if reference is None:
            raise CommandError(f"{arguments.document}: holds no reference and no signature")
        if reference.url and arguments.manifest is None:
            wrong_use(f"name the file that {reference.place} gives with --manifest")
        body = _read(arguments.manifest) if reference.url else reference.body
        check_hash(body, reference)
        name = next((n for n, k in keys.items() if k.verifies(reference.signature, body)), None)
        if name is None:
            raise CommandError(f"{arguments.document}: not signed with {' or '.join(keys)}")
        generation = signed_generation(body)
    except ManifestError as error:
        raise CommandError(f"{arguments.document}: {error}") from error
    if arguments.json:
        print_json({"key": name, "generation": generation, "sha256": reference.sha256})
    else:
        print(f"signed with {name}, generation {generation}")
    return 0


def _with_generation(body: bytes, generation: int, file: Path) -> bytes:
    from ..document import ManifestError, Node, decoded, parse_json
    from ..manifest_reference import SIGNED

    try:
        members = Node(parse_json(decoded(body), "")).members()
    except ManifestError as error:
        raise CommandError(f"{file}: {error}") from error
    document = {SIGNED: {"generation": generation}}
    document |= {name: node.value for name, node in members.items() if name != SIGNED}
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _generation(text: str) -> int:
    from ..manifest_reference import MAX_GENERATION

    if not text.isdecimal() or not 0 < int(text) <= MAX_GENERATION:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1")
    return int(text)


def _host(url: str | None) -> str:
    from urllib.parse import urlsplit

    return urlsplit(url or "").netloc


def _hosts(document: bytes) -> tuple[str, ...]:
    """Whatever host it names: nothing is fetched here."""
    try:
        return (_host(json.loads(document)["manifest"]["url"]),)
    except (ValueError, LookupError, TypeError, RecursionError):
        return ()


def _private_key(path: Path) -> PrivateKey:
    from ...modules.signing import KeyUnusable, read_private_key

    password = next((os.environ[name] for name in PASSWORDS if os.environ.get(name)), None)
    pem = _read(path)
    try:
        # A password that is not needed is none of our business.
        if password is not None and b"ENCRYPTED" not in pem:
            password = None
        return read_private_key(pem, None if password is None else password.encode(), str(path))
    except KeyUnusable as error:
        raise CommandError(str(error)) from error


def _public_key(path: Path) -> PublicKey:
    from ...modules.signing import KeyUnusable, read_public_key

    try:
        return read_public_key(_read(path), str(path))
    except KeyUnusable as error:
        raise CommandError(str(error)) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from error
