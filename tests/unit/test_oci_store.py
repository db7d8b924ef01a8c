from __future__ import annotations

import errno
import gzip
import io
import json
import shutil
import tarfile
import threading
from collections import namedtuple

import pytest
from gatelet.modules.errors import (
    DigestMismatch,
    ImageNotFound,
    InvalidImage,
    StorageFailed,
    StorageFull,
)
from gatelet.modules.oci.manifest import Descriptor, digest_of
from gatelet.modules.oci.store import ContentStore, ImageContents, Layer
from gatelet.modules.oci.tar import END, directory_header, file_header, padding
from gatelet.modules.oci.unpack import UnpackLimits

MODEL = json.dumps(
    {
        "name": "digits",
        "version": "3",
        "framework": "onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1]}],
        "variants": [{"kind": "onnx", "path": "model.onnx"}],
    }
).encode()
TOP = digest_of(b"manifest")


def archive(files):
    parts = [directory_header("model")]
    for name, data in files.items():
        parts += [file_header(name, len(data)), data, padding(len(data))]
    return b"".join(parts) + END


def layer(data, plain=None):
    blob = Descriptor("application/vnd.oci.image.layer.v1.tar", digest_of(data), len(data))
    return Layer(blob, digest_of(plain if plain is not None else data))


BASE = archive({"model/model.json": MODEL})
WEIGHTS = archive({"model/model.onnx": bytes(range(256)) * 8})
LAYERS = (BASE, WEIGHTS)


def ingest(store, data, digest=None, size=None):
    with store.ingest(digest or digest_of(data), len(data) if size is None else size) as ingest:
        if ingest is not None:
            for start in range(ingest.offset, len(data), 700):
                ingest.write(data[start : start + 700])
            ingest.commit()


def install(store, layers=LAYERS, top=b"manifest"):
    store.put_blob(top)
    for data in layers:
        ingest(store, data)
    contents = ImageContents(
        digest_of(top), "r.io/digits:v1", (digest_of(top),), tuple(map(layer, layers))
    )
    return store.commit(contents)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_image_is_visible_whole_and_stays(tmp_path):
    store = ContentStore(tmp_path)
    assert store.images() == ()
    image = install(store)
    assert (image.model_dir / "model.onnx").read_bytes() == bytes(range(256)) * 8
    assert image.model.name == "digits"
    assert image.size == 2048 + len(MODEL)
    for again in (store, ContentStore(tmp_path)):
        assert again.images() == (image,)
        assert again.get(TOP) == image
        again.check(TOP)
    mode = (image.model_dir / "model.onnx").stat().st_mode & 0o777, image.model_dir.stat().st_mode
    assert (mode[0], mode[1] & 0o777) == (0o444, 0o755)


def test_removal_keeps_what_others_use(tmp_path):
    store = ContentStore(tmp_path)
    install(store)
    other = install(store, (BASE, archive({"model/model.onnx": b"2"})), b"manifest 2")
    store.remove(TOP)
    store.remove(TOP)
    assert store.images() == (other,)
    assert store.has_blob(digest_of(BASE))
    assert not store.has_blob(digest_of(WEIGHTS))
    with store.lease([digest_of(BASE)]):
        store.remove(other.digest)
        assert store.has_blob(digest_of(BASE))
        assert store.collect() == 0
    assert store.collect(keep=[digest_of(BASE)]) == 0
    assert store.collect() == len(BASE)
    assert names(tmp_path / "blobs/sha256") == names(tmp_path / "images") == []


def test_more_layers_of_an_image_replace_it_without_a_gap(tmp_path):
    store = ContentStore(tmp_path)
    first = install(store, (BASE,))
    second = install(store)
    assert first.model_dir != second.model_dir
    assert store.images() == ContentStore(tmp_path).images() == (second,)
    assert names(tmp_path / "images") == [second.model_dir.parent.name, f"{TOP[7:]}.json"]
    assert install(store) == install(store, (BASE,)) == second


def test_a_download_continues_after_a_restart(tmp_path):
    with ContentStore(tmp_path).ingest(digest_of(WEIGHTS), len(WEIGHTS)) as first:
        first.write(WEIGHTS[:1000])
    store = ContentStore(tmp_path)
    assert not store.has_blob(digest_of(WEIGHTS))
    assert store.ingested(digest_of(WEIGHTS)) == 1000
    with store.ingest(digest_of(WEIGHTS), len(WEIGHTS)) as second:
        assert second.offset == second.resumed == 1000
        second.write(WEIGHTS[1000:])
        second.commit()
    assert store.read_blob(digest_of(WEIGHTS), 10_000) == WEIGHTS
    with store.ingest(digest_of(WEIGHTS), len(WEIGHTS)) as third:
        assert third is None


def test_one_flipped_byte_anywhere_is_never_kept(tmp_path):
    store = ContentStore(tmp_path)
    digest = digest_of(WEIGHTS)
    for index in range(0, len(WEIGHTS), 7):
        bad = bytearray(WEIGHTS)
        bad[index] ^= 1 << index % 8
        with pytest.raises(DigestMismatch, match="nothing of it was kept"):
            ingest(store, bytes(bad), digest)
        assert not store.has_blob(digest)
        assert store.ingested(digest) == 0


@pytest.mark.parametrize("kept", [1, 700, len(WEIGHTS) - 1, len(WEIGHTS)])
def test_a_flipped_byte_in_what_an_earlier_attempt_left(tmp_path, kept):
    store = ContentStore(tmp_path)
    digest = digest_of(WEIGHTS)
    partial = tmp_path / "ingest" / f"{digest[7:]}.partial"
    partial.write_bytes(bytes([WEIGHTS[0] ^ 4]) + WEIGHTS[1:kept])
    with pytest.raises(DigestMismatch):
        ingest(store, WEIGHTS)
    ingest(store, WEIGHTS)
    assert store.has_blob(digest)


@pytest.mark.parametrize("data", [WEIGHTS[:-1], WEIGHTS + b"\0", b""])
def test_too_few_or_too_many_bytes(tmp_path, data):
    store = ContentStore(tmp_path)
    with pytest.raises(DigestMismatch):
        ingest(store, data, digest_of(WEIGHTS), len(WEIGHTS))
    assert names(tmp_path / "ingest") == names(tmp_path / "blobs/sha256") == []
    (tmp_path / "ingest" / f"{digest_of(WEIGHTS)[7:]}.partial").write_bytes(WEIGHTS * 2)
    ingest(store, WEIGHTS)


def test_two_pulls_of_one_blob_take_turns(tmp_path):
    store = ContentStore(tmp_path)
    digest = digest_of(WEIGHTS)
    seen = []

    def second():
        with store.ingest(digest, len(WEIGHTS)) as blob:
            seen.append(blob)

    with store.ingest(digest, len(WEIGHTS)) as blob:
        thread = threading.Thread(target=second)
        thread.start()
        blob.write(WEIGHTS)
        blob.commit()
    thread.join(10)
    assert seen == [None]


def test_check_reads_every_byte(tmp_path):
    store = ContentStore(tmp_path)
    image = install(store)
    for name in ("model.json", "model.onnx"):
        path = image.model_dir / name
        good = path.read_bytes()
        for index in range(0, len(good), 97):
            path.chmod(0o644)
            path.write_bytes(good[:index] + bytes([good[index] ^ 1]) + good[index + 1 :])
            with pytest.raises(DigestMismatch, match=name):
                store.check(TOP)
        path.write_bytes(good)
    store.check(TOP)
    (image.model_dir / "extra").touch()
    with pytest.raises(DigestMismatch, match="extra"):
        store.check(TOP)
    (image.model_dir / "extra").unlink()
    blob = tmp_path / "blobs/sha256" / digest_of(WEIGHTS)[7:]
    blob.chmod(0o644)
    blob.write_bytes(WEIGHTS[:-1] + b"x")
    with pytest.raises(DigestMismatch, match=blob.name):
        store.check(TOP)
    assert not blob.exists()
    store.remove(TOP)
    with pytest.raises(ImageNotFound):
        store.check(TOP)
    install(store)
    store.check(TOP)


def test_a_blob_that_rots_before_it_is_unpacked_is_dropped(tmp_path):
    store = ContentStore(tmp_path)
    ingest(store, WEIGHTS)
    blob = tmp_path / "blobs/sha256" / digest_of(WEIGHTS)[7:]
    for index in range(0, len(WEIGHTS), 61):
        blob.chmod(0o644)
        blob.write_bytes(WEIGHTS[:index] + bytes([WEIGHTS[index] ^ 1]) + WEIGHTS[index + 1 :])
        with pytest.raises(DigestMismatch):
            install(store)
        assert not blob.exists()
        assert store.images() == ()
        ingest(store, WEIGHTS)
    install(store)


def member(name, kind=tarfile.REGTYPE, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def hostile(*members, form=tarfile.PAX_FORMAT):
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form) as tar:
        for info, data in (member("model/model.json", data=MODEL), *members):
            tar.addfile(info, io.BytesIO(data))
    return target.getvalue()


def pax_size(value):
    return hostile(member("model/a", pax_headers={"size": value}))


ATTACKS = {
    "absolute": (hostile(member("/model/a")), "leads out"),
    "parent": (hostile(member("model/../../a")), "leads out"),
    "parent first": (hostile(member("../model/a")), "leads out"),
    "parent last": (hostile(member("model/..")), "leads out"),
    "parent by pax": (hostile(member("model/" + "x" * 100 + "/../../../a")), "leads out"),
    "parent by gnu": (
        hostile(member("model/" + "x" * 100 + "/../../../a"), form=tarfile.GNU_FORMAT),
        "leads out",
    ),
    "dot": (hostile(member("model/./a")), "not a plain path"),
    "double slash": (hostile(member("model//a")), "not a plain path"),
    "deep": (hostile(member("model/" + "d/" * 40 + "a")), "not a plain path"),
    "long": (hostile(member("model/" + "d" * 256)), "too long"),
    "symbolic link": (
        hostile(member("model/a", tarfile.SYMTYPE, linkname="/etc/passwd")),
        "is a symbolic link",
    ),
    "inner link": (
        hostile(member("model/a", tarfile.SYMTYPE, linkname="model.json")),
        "is a symbolic link",
    ),
    "long link": (
        hostile(member("model/a", tarfile.SYMTYPE, linkname="/x" * 80), form=tarfile.GNU_FORMAT),
        "is a symbolic link",
    ),
    "link as folder": (
        hostile(
            member("model/a", tarfile.SYMTYPE, linkname="/tmp"), member("model/a/b", data=b"x")
        ),
        "is a symbolic link",
    ),
    "model is a link": (hostile(member("model", tarfile.SYMTYPE, linkname="/tmp")), "symbolic"),
    "hard link": (hostile(member("model/a", tarfile.LNKTYPE, linkname="/etc/passwd")), "hard link"),
    "device": (hostile(member("model/a", tarfile.CHRTYPE)), "character device"),
    "block device": (hostile(member("model/a", tarfile.BLKTYPE)), "block device"),
    "fifo": (hostile(member("model/a", tarfile.FIFOTYPE)), "FIFO"),
    "sparse": (hostile(member("model/a", tarfile.GNUTYPE_SPARSE)), "sparse"),
    "sparse by pax": (
        hostile(member("model/a", pax_headers={"GNU.sparse.major": "1"})),
        "sparse",
    ),
    "whiteout": (hostile(member("model/.wh.model.json")), "deletes a file"),
    "file over folder": (
        hostile(member("model/d/a", data=b"1"), member("model/d", data=b"2")),
        "a folder and a file",
    ),
    "folder over file": (
        hostile(member("model/model.json/a", data=b"1")),
        "a file and a folder",
    ),
    "the model is a file": (archive({"model/model.json": MODEL, "model": b"x"}), "folder and"),
    "size by pax": (pax_size("9" * 17), "ends early"),
    "negative size": (pax_size("-1024"), "a size of"),
    "endless pax": (
        file_header("x", 2**32).replace(b"ustar", b"ustar"),
        "ends early",
    ),
    "huge pax header": (hostile(member("model/a", pax_headers={"x": "y" * 70_000})), "extended"),
    "wrong checksum": (BASE[:20] + b"!" + BASE[21:], "checksum"),
    "cut": (BASE[:700], "ends early"),
    "no archive": (b"text " * 300, "not a tar archive"),
    "empty": (b"", "ends early"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(600), "zstd"),
    "not a name": (hostile(member("model/a\udcff")), "not UTF-8"),
    "many": (hostile(*(member(f"model/{i}") for i in range(60))), "more than 50 entries"),
    "no model.json": (archive({"model/x": b""}), "model.json cannot be read"),
    "bad model.json": (archive({"model/model.json": b"{}"}), "missing required"),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_hostile_layers_are_refused_and_leave_nothing(tmp_path, name, packed):
    plain, said = ATTACKS[name]
    data = gzip.compress(plain, mtime=0) if packed and name != "zstd" else plain
    root = tmp_path / "store"
    store = ContentStore(root, limits=UnpackLimits(entries=50))
    ingest(store, data)
    contents = ImageContents(TOP, "r.io/a:1", (), (layer(data, plain),))
    before = names(tmp_path)
    with pytest.raises(InvalidImage) as caught:
        store.commit(contents)
    assert said in str(caught.value)
    assert names(root / "images") == []
    assert names(tmp_path) == before
    assert store.images() == ()


def bomb(size):
    target = io.BytesIO()
    with gzip.GzipFile("", "wb", 9, target, 0) as file:
        file.write(file_header("model/zeros", size))
        for _ in range(size // 2**20):
            file.write(bytes(2**20))
        file.write(END)
    return target.getvalue()


@pytest.mark.parametrize("limits", [UnpackLimits(), UnpackLimits(bytes=2**20)])
def test_a_small_layer_cannot_fill_the_disk(tmp_path, limits):
    data = bomb(100 * 2**20)
    store = ContentStore(tmp_path, limits=limits)
    ingest(store, data)
    with pytest.raises(InvalidImage, match="expands to more than"):
        store.commit(ImageContents(TOP, "r.io/a:1", (), (layer(data, b"any"),)))
    assert names(tmp_path / "images") == []


def test_zeros_behind_the_archive_count_too(tmp_path):
    data = gzip.compress(BASE + bytes(2**21), mtime=0)
    store = ContentStore(tmp_path, limits=UnpackLimits(bytes=2**20))
    ingest(store, data)
    with pytest.raises(InvalidImage, match="expands to more than"):
        store.commit(ImageContents(TOP, "r.io/a:1", (), (layer(data, b"any"),)))


def test_the_uncompressed_form_must_be_what_the_config_says(tmp_path):
    store = ContentStore(tmp_path)
    ingest(store, BASE)
    with pytest.raises(InvalidImage, match="config says"):
        store.commit(ImageContents(TOP, "r.io/a:1", (), (layer(BASE, b"other"),)))


def test_an_ordinary_image_below_the_model_is_skipped(tmp_path):
    plain = hostile(
        member("bin", tarfile.SYMTYPE, linkname="usr/bin"),
        member("dev/null", tarfile.CHRTYPE),
        member("modelling/a", data=b"no"),
        member("./model/model.onnx", data=b"yes"),
    )
    data = gzip.compress(plain, mtime=0)
    store = ContentStore(tmp_path)
    ingest(store, data)
    image = store.commit(ImageContents(TOP, "r.io/a:1", (), (layer(data, plain),)))
    assert names(image.model_dir) == ["model.json", "model.onnx"]
    assert names(image.model_dir.parent) == ["model"]


def test_what_the_caller_does_not_accept_never_shows(tmp_path):
    def refuse(model, model_dir):
        assert (model_dir / "model.json").exists()
        raise InvalidImage("no")

    store = ContentStore(tmp_path)
    ingest(store, BASE)
    with pytest.raises(InvalidImage):
        store.commit(ImageContents(TOP, "r.io/a:1", (), (layer(BASE),)), refuse)
    assert names(tmp_path / "images") == []


# Crashes


class Snapshots:
    """At each fault point, what a kill there would leave on the disk."""

    def __init__(self, root, folder):
        self.root, self.folder, self.points = root, folder, []

    def __call__(self, point):
        copy = self.folder / f"{len(self.points)}"
        shutil.copytree(self.root, copy)
        self.points.append((point, copy))


def script(store):
    """Install, replace and remove: each step with the images that may be seen after a crash."""
    install(store, (BASE,))
    install(store)
    install(store, (BASE, archive({"model/model.onnx": b"2"})), b"manifest 2")
    store.remove(TOP)


def test_after_a_kill_at_any_step_the_store_opens_whole_and_the_rest_can_be_done(tmp_path):
    root = tmp_path / "store"
    taken = Snapshots(root, tmp_path / "snapshots")
    script(ContentStore(root, fault=taken))
    seen = {point for point, _ in taken.points}
    assert {"ingest.write", "ingest.sync", "ingest.rename", "ingest.done"} <= seen
    assert {"unpack.file", "unpack.done", "commit.rename", "record.write"} <= seen
    assert {"record.rename", "commit.old", "commit.done"} <= seen
    assert {"remove.record", "remove.folder", "remove.blob"} <= seen
    installed = False
    for point, copy in taken.points:
        store = ContentStore(copy)
        found = store.images()
        # Once there is an image there is always one.
        installed = installed or point == "commit.done"
        assert bool(found) >= installed, point
        for image in found:
            store.check(image.digest)
            store.get(image.digest)
        known = {image.model_dir.parent.name for image in found}
        known |= {f"{image.digest[7:]}.json" for image in found}
        assert set(names(copy / "images")) == known, point
        for path in (copy / "blobs/sha256").iterdir():
            assert digest_of(path.read_bytes()) == f"sha256:{path.name}", point
        script(store)
        store.collect()
        (left,) = store.images()
        store.check(left.digest)
        assert left.digest == digest_of(b"manifest 2")
        assert len(names(copy / "blobs/sha256")) == 3
        assert names(copy / "ingest") == []
        shutil.rmtree(copy)


def points(tmp_path):
    root = tmp_path / "counted"
    found = []
    store = ContentStore(root, fault=found.append)
    install(store)
    return len(found)


@pytest.mark.parametrize(
    ("code", "error"), [(errno.ENOSPC, StorageFull), (errno.EIO, StorageFailed)]
)
@pytest.mark.parametrize("old", [b"old", b"manifest"], ids=["another", "the same"])
def test_a_disk_that_refuses_at_any_step_leaves_the_old_and_recovers(tmp_path, code, error, old):
    for stop in range(points(tmp_path)):
        left = [stop]

        def fault(point, left=left):
            left[0] -= 1
            if left[0] == -1:
                raise OSError(code, "told to fail")

        root = tmp_path / str(stop)
        install(ContentStore(root), (BASE,), old)
        shutil.rmtree(root / "blobs/sha256")
        store = ContentStore(root, fault=fault)
        with pytest.raises(error, match=r"remove images|check the disk"):
            install(store)
        assert (store.get(digest_of(old)).model_dir / "model.json").exists()
        install(store)
        store.check(TOP)
        assert ContentStore(root).images() == store.images()


def test_room_is_asked_for_before(tmp_path, monkeypatch):
    store = ContentStore(tmp_path)
    usage = namedtuple("usage", "free")(100 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    store.require_space(80 * 2**20)
    with pytest.raises(StorageFull, match="bytes are needed"):
        store.require_space(90 * 2**20)


def test_a_damaged_record_costs_a_download_at_most(tmp_path, caplog):
    image = install(ContentStore(tmp_path))
    record = tmp_path / "images" / f"{TOP[7:]}.json"
    for raw in (b"", b"{", b"[" * 10_000, record.read_bytes().replace(TOP.encode(), b"sha256:")):
        record.write_bytes(raw)
        store = ContentStore(tmp_path)
        assert store.images() == ()
        assert names(tmp_path / "images") == []
        assert install(store) == image
    assert "pull the image again" in caplog.text


def test_a_folder_that_cannot_be_used_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageFailed, match="check the disk and who owns the folder"):
        ContentStore(tmp_path / "file" / "store")
    store = ContentStore(tmp_path / "store")
    with pytest.raises(ImageNotFound):
        store.read_blob(TOP, 10)
