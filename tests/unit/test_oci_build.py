from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile

import pytest
from gatelet.agent.cli.command import CommandError
from gatelet.agent.main import main
from gatelet.modules.errors import DigestMismatch, InvalidImage, InvalidModel
from gatelet.modules.oci.build import build_model_image
from gatelet.modules.oci.layout import open_layout, write_layout_tar
from gatelet.modules.oci.manifest import model_variants
from gatelet.modules.oci.tar import END, directory_header, file_header, padding, read_tar
from hypothesis import given
from hypothesis import strategies as st

MODEL = {
    "name": "digits",
    "version": "3",
    "framework": "onnx",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1]}],
    "variants": [
        {"kind": "onnx", "path": "onnx/model.onnx"},
        {"kind": "finn", "path": "overlays/pynq-z2", "board": "pynq-z2", "part": "xc7z020clg400-1"},
        {"kind": "stream", "path": "overlays/pynq-z2", "board": "pynq-z2"},
    ],
    "sample": "sample.json",
}
FILES = {
    "model.json": json.dumps(MODEL),
    "sample.json": json.dumps(
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]}
    ),
    "onnx/model.onnx": "weights" * 100,
    "overlays/pynq-z2/b.bit": "bits",
    "overlays/pynq-z2/a.hwh": "handoff",
    "overlays/pynq-z2/ä/" + "long-" * 30 + "name": "",
    "notes.txt": "not part of the model",
}
# What this folder hashes to everywhere: if it changes, every device pulls again.
DIGEST = "sha256:7d397eb1d008333ebf7b9952703838e6ab021544d7d19d57f91915884dcdbba0"


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", FILES)


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_one_layer_per_part_and_labels_that_say_which(folder, tmp_path):
    built = build_model_image(folder, tmp_path / "image")
    image = open_layout(tmp_path / "image")
    assert image.digest == built.digest
    assert image.config.labels["io.gatelet.model"] == "digits:3"
    variants = model_variants(image.config, "x", 3)
    assert [(entry.kind, entry.layer) for entry in variants] == [
        ("onnx", 0),
        ("finn", 1),
        ("stream", 1),
    ]
    names = []
    for layer in image.manifest.layers:
        with image.open_blob(layer.digest) as blob, tarfile.open(fileobj=blob, mode="r|") as tar:
            names.append([member.name for member in tar if member.isfile()])
    assert names[0] == ["model/onnx/model.onnx"]
    assert names[1] == [f"model/{name}" for name in sorted(FILES) if name.startswith("overlays")]
    assert names[2] == ["model/model.json", "model/sample.json"]


def test_the_digest_depends_on_names_and_contents_only(folder, tmp_path):
    digests = {build_model_image(folder, tmp_path / "one").digest}
    other = tmp_path / "elsewhere"
    before = os.umask(0o077)
    try:
        write(other, dict(reversed(FILES.items())))
        for path in other.rglob("*"):
            os.utime(path, (1, 1))
        (other / "onnx/model.onnx").chmod(0o755)
        digests.add(build_model_image(other, tmp_path / "two").digest)
    finally:
        os.umask(before)
    program = (
        "import sys; from pathlib import Path; from gatelet.modules.oci.build import *; "
        "print(build_model_image(Path(sys.argv[1]), Path(sys.argv[2])).digest)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C"}
    result = subprocess.run(
        [sys.executable, "-c", program, other, tmp_path / "three"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    digests.add(result.stdout.strip())
    assert digests == {DIGEST}
    write(other, {"onnx/model.onnx": "other"})
    assert build_model_image(other, tmp_path / "four").digest != DIGEST


def test_compressed_layers_hold_the_same_tar(folder, tmp_path):
    plain = build_model_image(folder, tmp_path / "plain")
    small = build_model_image(folder, tmp_path / "small", compress=True)
    assert small.size < plain.size
    assert (
        open_layout(tmp_path / "plain").config.rootfs
        == open_layout(tmp_path / "small").config.rootfs
    )


def test_a_layout_tar_is_reproducible_and_reads_back(folder, tmp_path):
    built = build_model_image(folder, tmp_path / "image")
    files = io.BytesIO(), io.BytesIO()
    for file in files:
        write_layout_tar(tmp_path / "image", file)
    assert files[0].getvalue() == files[1].getvalue()
    path = tmp_path / "image.tar"
    path.write_bytes(files[0].getvalue())
    assert open_layout(path).digest == built.digest
    layer = built.manifest.layers[1]
    with open_layout(path).open_blob(layer.digest) as blob:
        assert len(blob.read()) == layer.size


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda d: (d / "model.json").unlink(), InvalidModel, "cannot be read"),
        (lambda d: (d / "model.json").write_text("{}"), InvalidModel, "missing required"),
        (lambda d: (d / "onnx/model.onnx").unlink(), InvalidModel, "$.variants[0].path"),
        (lambda d: (d / "sample.json").unlink(), InvalidModel, "$.sample"),
        (lambda d: (d / "sample.json").write_text("{}"), InvalidModel, "sample.json"),
        (lambda d: (d / "overlays/pynq-z2/l").symlink_to("b.bit"), InvalidImage, "is a link"),
        (lambda d: os.mkfifo(d / "overlays/pynq-z2/p"), InvalidImage, "special file"),
        (lambda d: (d / "overlays/pynq-z2/e").mkdir(), InvalidImage, "is empty"),
    ],
)
def test_a_folder_that_is_no_model_is_refused(folder, tmp_path, change, error, said):
    change(folder)
    with pytest.raises(error) as caught:
        build_model_image(folder, tmp_path / "image")
    assert said in str(caught.value)


def test_a_damaged_or_incomplete_layout_is_refused(folder, tmp_path):
    built = build_model_image(folder, tmp_path / "image")
    config = tmp_path / "image/blobs/sha256" / built.manifest.config.digest[7:]
    raw = config.read_bytes()
    config.write_bytes(raw[:-2] + b" }")
    with pytest.raises(DigestMismatch, match="damaged"):
        open_layout(tmp_path / "image")
    config.unlink()
    with pytest.raises(InvalidImage, match="not a complete OCI image layout"):
        open_layout(tmp_path / "image")
    with pytest.raises(InvalidImage, match="cannot be read"):
        open_layout(tmp_path / "missing.tar")
    (tmp_path / "text.tar").write_text("x" * 2000)
    with pytest.raises(InvalidImage, match="not a tar archive"):
        open_layout(tmp_path / "text.tar")


text = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1)
entries = st.lists(
    st.tuples(st.lists(text, min_size=1, max_size=3).map("/".join), st.binary(max_size=1200)),
    max_size=4,
)


@given(entries)
def test_our_tar_and_pythons_agree(files):
    written = b"".join(
        file_header(name, len(data)) + data + padding(len(data)) for name, data in files
    )
    written += directory_header("end") + END
    with tarfile.open(fileobj=io.BytesIO(written)) as tar:
        theirs = [(m.name, tar.extractfile(m).read()) for m in tar if m.isfile()]
    assert theirs == [(name.rstrip("/"), data) for name, data in files]
    for layout in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        target = io.BytesIO()
        with tarfile.open(fileobj=target, mode="w", format=layout) as tar:
            for name, data in files:
                member = tarfile.TarInfo(name)
                member.size, member.mtime = len(data), 1.5
                tar.addfile(member, io.BytesIO(data))
        target.seek(0)
        read = [(entry.name, b"".join(data)) for entry, data in read_tar(target, "x", 100)]
        assert read == files


def test_sizes_beyond_octal_digits():
    header = file_header("big", 9 * 1024**3)
    entry, _ = next(read_tar(io.BytesIO(header), "x", 2))
    assert (entry.name, entry.size) == ("big", 9 * 1024**3)
    with tarfile.open(fileobj=io.BytesIO(header), mode="r|") as tar:
        assert tar.next().size == 9 * 1024**3


@given(st.binary(max_size=1500))
def test_noise_is_no_archive(noise):
    try:
        for _, contents in read_tar(io.BytesIO(noise), "x", 10):
            b"".join(contents)
    except InvalidImage:
        pass


# Command line


def test_build_and_inspect(folder, tmp_path, capsys):
    tar = tmp_path / "digits.tar"
    assert main(["image", "build", str(folder), "-o", str(tar), "--json"]) == 0
    built = json.loads(capsys.readouterr().out)
    assert built["digest"] == DIGEST
    assert built["model"] == "digits:3"
    for source in (tar, folder):
        assert main(["image", "inspect", str(source), "--json"]) == 0
        seen = json.loads(capsys.readouterr().out)
        assert (seen["digest"], len(seen["variants"])) == (DIGEST, 3)
    assert main(["image", "inspect", str(tar)]) == 0
    assert "finn for pynq-z2: overlays/pynq-z2" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits.tar", "model"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["build", "missing"], 2, "not a folder"),
        (["build", "."], 1, "model.json cannot be read"),
        (["build", "model", "-o", "missing/x.tar"], 1, "No such file"),
        (["push", "missing", "r.io/a"], 2, "does not exist"),
        (["push", "model", "r.io/A"], 2, "expected for example"),
        (["push", "model", "r.io/a@sha256:" + "0" * 64], 2, "push to a tag"),
        (["push", "model", "r.io/a", "--username", "me"], 2, "GATELET_REGISTRY_PASSWORD"),
        (["inspect", "./missing"], 2, "does not exist"),
        (["inspect", "127.0.0.1:1/a"], 1, "not reachable"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(folder, monkeypatch, capsys, words, code, said):
    monkeypatch.chdir(folder.parent)
    monkeypatch.delenv("GATELET_REGISTRY_PASSWORD", raising=False)
    try:
        found = main(["image", *words])
    except CommandError as error:
        found = error.code
    assert found == code
    output = capsys.readouterr()
    assert said in output.err
    assert "Traceback" not in output.err
