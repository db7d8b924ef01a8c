"""`gatelet image`: build a model image, push it to a registry, look into one, sign it."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import trust
from .command import CommandError, add_json_option, print_json, wrong_use

if TYPE_CHECKING:
    from ...modules.oci.client import RegistryClient
    from ...modules.oci.layout import ImageLayout
    from ...modules.oci.manifest import ImageConfig, Manifest
    from ...modules.oci.push import PushProgress
    from ...modules.oci.reference import ImageRef

_PASSWORD = "GATELET_REGISTRY_PASSWORD"


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `image` and its own commands."""
    parser = commands.add_parser(
        "image",
        help="build, push, inspect and sign model images",
        description="Model images: OCI images that carry a model and its variants.",
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    build = actions.add_parser(
        "build",
        help="make an image of a model folder",
        description="Make an image of the folder that holds model.json. Equal folders give equal "
        "digests, whatever the machine.",
    )
    build.add_argument("folder", metavar="DIR", type=Path, help="folder with model.json")
    build.add_argument(
        "-o", "--output", metavar="FILE.tar", type=Path, help="write the image as an OCI layout"
    )
    _add_build_options(build)
    add_json_option(build)
    build.set_defaults(run=_run(_build))

    push = actions.add_parser(
        "push",
        help="send an image to a registry",
        description="Send a model folder, or an image that `build -o` made, to a registry.",
    )
    push.add_argument("source", metavar="DIR_OR_TAR", type=Path)
    push.add_argument("reference", metavar="REF", help="such as registry.example/models/digits:v1")
    _add_build_options(push)
    _add_registry_options(push)
    add_json_option(push)
    push.set_defaults(run=_run(_push))

    inspect = actions.add_parser(
        "inspect",
        help="say what an image holds",
        description="Say which model an image holds, its variants, and the layer of each.",
    )
    inspect.add_argument("source", metavar="REF_OR_DIR_OR_TAR")
    _add_registry_options(inspect)
    add_json_option(inspect)
    inspect.set_defaults(run=_run(_inspect))

    sign = actions.add_parser(
        "sign",
        help="sign an image in a registry",
        description="Add a signature in cosign's key format to an image in a registry.",
    )
    verify = actions.add_parser("verify", help="check the signature of an image in a registry")
    trust.add_image_options(sign, verify)
    for one, action in ((sign, trust.sign_image), (verify, trust.verify_image)):
        _add_registry_options(one)
        add_json_option(one)
        one.set_defaults(run=_run(partial(_in_registry, action)))


def _add_build_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gzip",
        action="store_true",
        help="compress layers, for slow links; the digest then depends on this machine's zlib",
    )
    parser.add_argument(
        "--architecture",
        default="amd64",
        metavar="ARCH",
        help="architecture to state in the image; models run anywhere (default: %(default)s)",
    )


def _add_registry_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--username", help=f"for the registry; the password comes from ${_PASSWORD}"
    )
    parser.add_argument("--ca-file", type=Path, metavar="PEM", help="trust these authorities too")
    parser.add_argument(
        "--insecure", action="store_true", help="plain HTTP (loopback addresses need no permission)"
    )


def _run(action: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        from ...modules.errors import ImageError, InvalidReference

        try:
            action(arguments)
        except InvalidReference as error:
            raise CommandError(str(error), 2) from error
        except ImageError as error:
            raise CommandError(str(error)) from error
        except OSError as error:
            raise CommandError(
                f"{error.filename or 'output'}: {error.strerror or error}"
            ) from error
        return 0

    return run


def _build(arguments: argparse.Namespace) -> None:
    from ...modules.oci.layout import write_layout_tar

    if not arguments.folder.is_dir():
        wrong_use(f"{arguments.folder} is not a folder; name the one that holds model.json")
    with _folder() as work:
        built = _make(arguments, arguments.folder, work)
        output: Path | None = arguments.output
        if output is not None:
            # Beside its final place, so that a failure never leaves half a file there.
            partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
            try:
                with partial.open("xb") as file:
                    write_layout_tar(work, file)
                partial.replace(output)
            finally:
                partial.unlink(missing_ok=True)
    if arguments.json:
        print_json(
            {
                "digest": built.digest,
                "model": f"{built.model.name}:{built.model.version}",
                "size": built.size,
                "layers": len(built.manifest.layers),
                "output": None if output is None else str(output),
            }
        )
        return
    print(f"{built.digest}  {built.model.name}:{built.model.version}, {_bytes(built.size)}")
    if output is None:
        print("checked only: -o FILE.tar keeps the image, `gatelet image push` sends it")
    else:
        print(f"written to {output}")


def _push(arguments: argparse.Namespace) -> None:
    from ...modules.oci.push import push_image
    from ...modules.oci.reference import ImageRef

    reference = ImageRef.parse(arguments.reference)
    if reference.digest is not None:
        wrong_use(f"{reference}: push to a tag; the image has a digest of its own")
    with (
        _local(arguments, arguments.source) as image,
        _client(arguments, reference) as client,
        _bar(str(reference), arguments.json) as progress,
    ):
        pushed = push_image(client, reference, image, progress=progress)
    if arguments.json:
        print_json({"reference": str(pushed), "digest": pushed.digest})
    else:
        print(pushed)


def _inspect(arguments: argparse.Namespace) -> None:
    from ...modules.oci.manifest import MAX_CONFIG_BYTES, Index, choose_platform, parse_config
    from ...modules.oci.manifest import parse_manifest as parse
    from ...modules.oci.reference import ImageRef

    path = Path(arguments.source)
    if path.exists():
        arguments.gzip, arguments.architecture = False, "amd64"
        with _local(arguments, path) as image:
            _describe(arguments, image.digest, image.manifest, image.config)
        return
    if arguments.source.startswith((".", "/")):
        wrong_use(f"{path} does not exist")
    reference = ImageRef.parse(arguments.source)
    with _client(arguments, reference) as client:
        found = client.get_manifest(reference.repository, reference.target)
        manifest = parse(found.raw, str(reference))
        if isinstance(manifest, Index):
            chosen = choose_platform(manifest, "amd64", str(reference))
            manifest = parse(
                client.get_manifest(reference.repository, chosen.digest).raw, str(reference)
            )
        if isinstance(manifest, Index):
            raise CommandError(f"{reference}: an index inside an index; push an image")
        raw = client.read_blob(reference.repository, manifest.config, MAX_CONFIG_BYTES)
    config = parse_config(raw, str(reference), len(manifest.layers))
    _describe(arguments, found.digest, manifest, config)


def _in_registry(action: Callable[..., None], arguments: argparse.Namespace) -> None:
    from ...modules.oci.reference import ImageRef

    reference = ImageRef.parse(arguments.reference)
    with _client(arguments, reference) as client:
        action(arguments, client, reference)


def _describe(
    arguments: argparse.Namespace, digest: str, manifest: Manifest, config: ImageConfig
) -> None:
    from ...modules.oci.manifest import MODEL_LABEL, model_variants

    variants = model_variants(config, arguments.source, len(manifest.layers))
    size = sum(layer.size for layer in manifest.layers)
    if arguments.json:
        print_json(
            {
                "digest": digest,
                "model": config.labels[MODEL_LABEL],
                "architecture": config.architecture,
                "size": size,
                "labels": config.labels,
                "layers": manifest.layers,
                "variants": variants,
            }
        )
        return
    print(f"model   {config.labels[MODEL_LABEL]}")
    print(f"digest  {digest}")
    print(f"size    {_bytes(size)} in {len(manifest.layers)} layers")
    if variants is None:
        print("variants are listed in model.json inside the image only")
    for entry in variants or ():
        where = entry.board or entry.part or "any CPU"
        layer = manifest.layers[entry.layer]
        print(f"        {entry.kind} for {where}: {entry.path}, {_bytes(layer.size)}")


@contextlib.contextmanager
def _local(arguments: argparse.Namespace, path: Path) -> Iterator[ImageLayout]:
    """The image in a tar or layout folder, or that of a model folder, built on the way."""
    from ...modules.oci.layout import LAYOUT_FILE, open_layout

    if not path.exists():
        wrong_use(f"{path} does not exist; name a model folder or an image file")
    if path.is_dir() and not (path / LAYOUT_FILE).exists():
        with _folder() as work:
            _make(arguments, path, work)
            yield open_layout(work)
    else:
        yield open_layout(path)


def _make(arguments: argparse.Namespace, folder: Path, work: Path) -> Any:
    from ...modules.oci.build import build_model_image

    return build_model_image(
        folder, work, architecture=arguments.architecture, compress=arguments.gzip
    )


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gatelet-image-") as folder:
        yield Path(folder)


def _client(arguments: argparse.Namespace, reference: ImageRef) -> RegistryClient:
    from ...modules.oci.client import RegistryClient, RegistrySettings

    password = os.environ.get(_PASSWORD)
    if arguments.username is not None and password is None:
        wrong_use(f"--username needs the password in the environment variable {_PASSWORD}")
    return RegistryClient(
        RegistrySettings(
            reference.registry, arguments.username, password, arguments.ca_file, arguments.insecure
        )
    )


@contextlib.contextmanager
def _bar(title: str, quiet: bool) -> Iterator[Callable[[PushProgress], None]]:
    """A progress bar on a terminal, nothing elsewhere."""
    if quiet or not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(f"push {title}")
        yield lambda progress: bars.update(
            task, total=progress.total, completed=progress.sent + progress.present
        )


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
