"""Image signatures in registries: signed by the command, by hand, or not as a device wants it."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization as ser
from cryptography.hazmat.primitives.asymmetric import ec
from distribution_server import DistributionServer
from gatelet.agent.clock import SystemClock
from gatelet.agent.config import ConfigError, TrustConfig, TrustImagesConfig, TrustKeyConfig
from gatelet.agent.image_trust import ImageTrust
from gatelet.agent.images import RegistryImages
from gatelet.agent.main import main
from gatelet.agent.plan import Pull, Resolve
from gatelet.agent.seams import StepFailed
from gatelet.agent.steps import Executor
from gatelet.agent.store import StateStore
from gatelet.agent.trust import load_trust
from gatelet.modules.errors import ImageError
from gatelet.modules.oci.build import build_model_image
from gatelet.modules.oci.client import RegistryClient, RegistrySettings
from gatelet.modules.oci.layout import open_layout
from gatelet.modules.oci.manifest import Manifest, parse_manifest
from gatelet.modules.oci.pull import pull_model_image
from gatelet.modules.oci.push import push_image
from gatelet.modules.oci.reference import ImageRef
from gatelet.modules.oci.signatures import signature_tag
from gatelet.modules.oci.store import ContentStore
from gatelet.simulator.registry import Registry

MODEL = {
    "name": "digits",
    "version": "1",
    "framework": "onnx",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
    "variants": [{"kind": "onnx", "path": "model.onnx"}],
}


@dataclass
class Served:
    """`requests` is None where the registry does not tell."""

    address: str
    requests: list[tuple[str, str]] | None = None


@contextmanager
def simulated(folder: Path) -> Iterator[Served]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    registry = Registry(folder)

    def call(work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(20)

    call(registry.start())
    yield Served(registry.address, registry.requests)
    call(registry.stop())
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@contextmanager
def distribution(folder: Path) -> Iterator[Served]:
    server = DistributionServer(folder)
    try:
        yield Served(server.address)
    finally:
        server.stop()


KINDS = {"simulated": simulated, "distribution": distribution}


@pytest.fixture(scope="module", params=KINDS)
def registry(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with KINDS[request.param](tmp_path_factory.mktemp("registry")) as served:
        yield served


class Site:
    """A registry, two key pairs, and a device whose policy a test chooses."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.address = folder, address
        self.client = RegistryClient(RegistrySettings(address, attempts=1))
        self.store = StateStore(folder / "state.db", SystemClock())
        self.images = ContentStore(folder / "images")
        for name in ("release", "other"):
            key = ec.generate_private_key(ec.SECP256R1())
            form = ser.PrivateFormat.PKCS8
            plain = key.private_bytes(ser.Encoding.PEM, form, ser.NoEncryption())
            public = ser.PublicFormat.SubjectPublicKeyInfo
            (folder / f"{name}.key").write_bytes(plain)
            (folder / f"{name}.pub").write_bytes(
                key.public_key().public_bytes(ser.Encoding.PEM, public)
            )

    def close(self) -> None:
        self.store.close()
        self.client.close()

    def push(self, tag: str, weights: bytes = b"w", repository: str = "models/digits") -> ImageRef:
        folder, layout = self.folder / f"model-{tag}", self.folder / f"layout-{tag}"
        folder.mkdir(exist_ok=True)
        (folder / "model.json").write_text(json.dumps(MODEL))
        (folder / "model.onnx").write_bytes(weights)
        build_model_image(folder, layout)
        name = f"{self.address}/{repository}:{tag}"
        return push_image(self.client, ImageRef.parse(name), open_layout(layout))

    def sign(self, ref: ImageRef, key: str = "release", *options: str) -> None:
        name = f"{ref.registry}/{ref.repository}:{ref.tag}"
        path = str(self.folder / f"{key}.key")
        assert main(["image", "sign", name, "--key", path, *options]) == 0

    def trust(self, *rules: TrustImagesConfig, keys: tuple[str, ...] = ("release",)) -> ImageTrust:
        config = TrustConfig(
            keys=tuple(TrustKeyConfig(key, self.folder / f"{key}.pub") for key in keys),
            images=rules or (TrustImagesConfig(self.address),),
        )
        return ImageTrust(load_trust(config), self.store)

    def pull(self, ref: ImageRef, trust: ImageTrust) -> None:
        pull_model_image(
            self.client,
            self.images,
            ref,
            verify=lambda digest, _: trust.check(self.client, ref, digest) and None,
        )


@pytest.fixture
def site(tmp_path: Path, registry: Served) -> Iterator[Site]:
    site = Site(tmp_path, registry.address)
    yield site
    site.close()


def tampered(site: Site, ref: ImageRef) -> None:
    """The payload in the registry is another one than was signed."""
    tag = signature_tag(str(ref.digest))
    found = site.client.get_manifest(ref.repository, tag)
    image = parse_manifest(found.raw, tag)
    assert isinstance(image, Manifest)
    copied = site.push("donor", b"donor")
    site.sign(copied)
    other = site.client.get_manifest(copied.repository, signature_tag(str(copied.digest)))
    theirs = parse_manifest(other.raw, tag)
    assert isinstance(theirs, Manifest)
    mine = (image.layers[0].annotations or {})["dev.cosignproject.cosign/signature"]
    document = json.loads(other.raw)
    document["layers"][0]["annotations"] = {"dev.cosignproject.cosign/signature": mine}
    raw = json.dumps(document).encode()
    site.client.put_manifest(ref.repository, tag, found.media_type, raw)


def transplanted(site: Site, ref: ImageRef) -> None:
    """An authentic signature of another image."""
    donor = site.push("donor", b"donor")
    site.sign(donor)
    found = site.client.get_manifest(donor.repository, signature_tag(str(donor.digest)))
    tag = signature_tag(str(ref.digest))
    site.client.put_manifest(ref.repository, tag, found.media_type, found.raw)


TABLE: list[tuple[str, Callable[[Site, ImageRef], None], str, bool]] = [
    ("unsigned", lambda site, ref: None, "is not signed", True),
    ("wrong key", lambda site, ref: site.sign(ref, "other"), "not trusted here", False),
    ("tampered payload", tampered, "or changed afterwards", False),
    ("another image's signature", transplanted, "it is for another image", False),
]


@pytest.mark.parametrize(("name", "damage", "said", "retryable"), TABLE, ids=[t[0] for t in TABLE])
def test_refused_before_a_layer_is_here(
    site: Site, name: str, damage: Callable[[Site, ImageRef], None], said: str, retryable: bool
) -> None:
    ref = site.push(name.replace(" ", "-").replace("'", ""), name.encode())
    if damage is tampered:
        site.sign(ref)
    damage(site, ref)
    with pytest.raises(ImageError, match=said) as refused:
        site.pull(ref, site.trust())
    assert refused.value.retryable is retryable
    assert str(ref.digest) in str(refused.value)
    assert site.images.images() == ()
    assert len(list((site.folder / "images").rglob("sha256/*"))) <= 1  # the manifest at most


def test_a_signed_image_is_taken_and_known_from_then_on(site: Site, registry: Served) -> None:
    ref = site.push("v1", b"v1")
    site.sign(ref, "other")
    site.sign(ref)
    site.sign(ref, "release", "-a", "who=ci")
    trust = site.trust()
    site.pull(ref, trust)
    assert [image.digest for image in site.images.images()] == [ref.digest]
    asked = len(registry.requests or ())
    assert trust.check(site.client, ref, str(ref.digest)) is None
    trust.check_stored(ref, str(ref.digest))
    assert len(registry.requests or ()) == asked
    # A key that is withdrawn takes what it signed with it, except where another one signed too.
    again = site.trust(keys=("other",))
    with pytest.raises(ImageError, match="came here before signatures were asked for"):
        again.check_stored(ref, str(ref.digest))
    signer = again.check(site.client, ref, str(ref.digest))
    assert signer is not None
    assert signer.name == "other"


def test_an_older_generation_is_refused_unless_the_device_has_to_return_to_it(site: Site) -> None:
    old, new, none = site.push("g1", b"g1"), site.push("g2", b"g2"), site.push("g0", b"g0")
    site.sign(old, "release", "--generation", "1")
    site.sign(new, "release", "--generation", "2")
    site.sign(none)
    trust = site.trust()

    def deployed(ref: ImageRef, phase: str, source: str = "iothub") -> None:
        made = site.store.accept(source, 1, b"{}")
        site.store.pin(made.generation, "digits", str(ref.digest))
        site.store.set_phase(made.generation, phase)

    # What never became good keeps nothing away.
    site.pull(new, trust)
    deployed(new, "failed")
    site.pull(none, trust)
    site.pull(old, trust)
    deployed(old, "good")
    with pytest.raises(ImageError, match="generation 0 is older than 1"):
        site.pull(none, trust)
    deployed(new, "good")
    for one in (old, none):
        with pytest.raises(ImageError, match=r"generation [01] is older than 2, which was good"):
            site.pull(one, trust)
    site.pull(new, trust)
    # Somebody on the device returns to the older deployment.
    deployed(old, "applying", "rollback")
    site.pull(old, trust)
    deployed(new, "applying", "iothub")
    with pytest.raises(ImageError, match="older than 2"):
        site.pull(old, trust)
    # The last good deployment is exempt, whatever its generation.
    deployed(old, "good", "rollback")
    site.pull(old, trust)
    with pytest.raises(ImageError, match="older than 2"):
        site.pull(none, trust)
    # Another repository counts for itself.
    site.pull(copy := site.push("x", b"x", "models/others"), site.trust(TrustImagesConfig("a.b")))
    site.sign(copy, "release", "--generation", "1")
    site.pull(copy, trust)


async def test_what_is_here_already_is_asked_for_its_signature_too(site: Site) -> None:
    """Brought by a name that needs none, then named by one that needs one."""
    scratch = site.push("s1", b"same", "scratch/digits")
    same = site.push("s1", b"same", "models/digits")
    assert scratch.digest == same.digest
    trust = site.trust(TrustImagesConfig(f"{site.address}/models"))
    strict = site.trust(TrustImagesConfig(site.address))
    images = RegistryImages(site.folder / "images", (), None, None, trust)
    pinned: list[str] = []
    executor = Executor(
        images,
        None,  # type: ignore[arg-type]  # nothing is loaded here
        lambda generation, module, digest, kind, model: pinned.append(digest),
        verify=images.verify_image,
    )

    async def resolve(ref: ImageRef, only_local: bool = False) -> None:
        name = f"{ref.registry}/{ref.repository}:{ref.tag}"
        await executor.run(Resolve(1, "m", name, only_local), (), lambda progress: None)

    await resolve(scratch)
    pull = Pull("m", f"{scratch.registry}/{scratch.repository}:s1", str(same.digest), "model")
    await executor.run(pull, (), lambda progress: None)
    assert await images.stored() == {same.digest}
    with pytest.raises(StepFailed, match="is not signed"):
        await resolve(same)
    images = executor._images = RegistryImages(site.folder / "images", (), None, None, strict)
    executor._verify = images.verify_image
    with pytest.raises(StepFailed, match="came here before signatures were asked for"):
        await resolve(scratch, only_local=True)
    assert pinned == [scratch.digest]
    # An engine is not asked to pull it either.
    engine = Pull("m", f"{same.registry}/{same.repository}:s1", str(same.digest), "container")
    with pytest.raises(StepFailed, match="is not signed"):
        await executor.run(engine, (), lambda progress: None)
    site.sign(same)
    await resolve(same)
    with pytest.raises(StepFailed, match="no container engine"):
        await executor.run(engine, (), lambda progress: None)
    assert pinned == [scratch.digest, same.digest]


def test_the_rule_with_the_longest_prefix_counts(site: Site) -> None:
    rules = (
        TrustImagesConfig(""),
        TrustImagesConfig(f"{site.address}/models/", require=False),
        TrustImagesConfig(f"{site.address}/models/digits", keys=("release",)),
        TrustImagesConfig("docker.io"),
        TrustImagesConfig("library/nginx", require=False),
    )
    trust = load_trust(
        TrustConfig(keys=(TrustKeyConfig("release", site.folder / "release.pub"),), images=rules)
    )

    def required(name: str) -> bool:
        return trust.rule_for(ImageRef.parse(name)) is not None

    assert required(f"{site.address}/models/digits:v1")
    assert required(f"{site.address}/models/digits/sub")
    assert not required(f"{site.address}/models/digits-evil")
    assert required(f"{site.address}/models-evil/x")
    assert required("elsewhere.example/x")
    assert required("busybox")
    assert not required("nginx:1")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (TrustConfig("require"), "trust.keys is empty"),
        (TrustConfig(keys=(TrustKeyConfig("a", Path("/nowhere")),)), "cannot read /nowhere"),
        (TrustConfig(images=(TrustImagesConfig("a.b"),)), "needs a key"),
        (TrustConfig(images=(TrustImagesConfig("a.b", keys=("x",)),)), "no key 'x'"),
        (TrustConfig(images=(TrustImagesConfig("A B", require=False),)), "image name 'A B'"),
        (TrustConfig(images=(TrustImagesConfig("a.b/c:v1", False),)), "ends before the tag"),
        (
            TrustConfig(images=(TrustImagesConfig("a.b", False), TrustImagesConfig("a.b/", False))),
            "two rules",
        ),
    ],
)
def test_a_policy_that_cannot_work_is_refused_at_start(config: TrustConfig, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_trust(config)


def test_the_commands_say_who_signed(
    site: Site, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = site.push("cli", b"cli")
    name = f"{site.address}/models/digits:cli"
    verify = ["image", "verify", name, "--key", str(site.folder / "release.pub")]
    assert main(verify) == 1
    assert "is not signed" in capsys.readouterr().err
    site.sign(ref, "release", "--generation", "3", "--json")
    assert json.loads(capsys.readouterr().out)["tag"] == signature_tag(str(ref.digest))
    assert main([*verify, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["generation"] == 3
    assert main([*verify[:-1], str(site.folder / "other.pub")]) == 1
    assert "keys trusted: " in capsys.readouterr().err
    assert main([*verify[:-1], str(site.folder / "nothing.pub")]) == 1
    key = str(site.folder / "release.key")
    for options in (["-a", "x"], ["-a", "=x"]):
        assert main(["image", "sign", name, "--key", key, *options]) == 2
    with pytest.raises(SystemExit):
        main(["image", "sign", name, "--key", key, "--generation", "0"])
    assert main(["image", "sign", name, "--key", str(site.folder / "release.pub")]) == 1


def test_keys_of_openssl_do(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert shutil.which("openssl")
    key, public = site.folder / "o.key", site.folder / "o.pub"
    for words in (
        ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(key)],
        ["ec", "-in", str(key), "-pubout", "-out", str(public)],
    ):
        subprocess.run(["openssl", *words], check=True, capture_output=True)
    ref = site.push("openssl", b"openssl")
    site.sign(ref, "o")
    name = f"{site.address}/models/digits:openssl"
    assert main(["image", "verify", name, "--key", str(public)]) == 0
