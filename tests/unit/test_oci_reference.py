from __future__ import annotations

import pytest
from gatelet.modules.errors import InvalidReference
from gatelet.modules.oci.reference import ImageRef
from hypothesis import given
from hypothesis import strategies as st

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("nginx", ImageRef("docker.io", "library/nginx", "latest")),
        ("me/app:1", ImageRef("docker.io", "me/app", "1")),
        ("localhost/app", ImageRef("localhost", "app", "latest")),
        ("localhost:5000/app", ImageRef("localhost:5000", "app", "latest")),
        (
            "127.0.0.1:5000/models/digits:v1",
            ImageRef("127.0.0.1:5000", "models/digits", "v1"),
        ),
        ("[::1]:5000/a/b", ImageRef("[::1]:5000", "a/b", "latest")),
        ("x.azurecr.io/a__b/c-d.e:V_1.2", ImageRef("x.azurecr.io", "a__b/c-d.e", "V_1.2")),
        (f"r.io/a@sha256:{HEX}", ImageRef("r.io", "a", None, f"sha256:{HEX}")),
        (f"r.io/a:t@sha256:{HEX}", ImageRef("r.io", "a", "t", f"sha256:{HEX}")),
    ],
)
def test_names_read_as_docker_reads_them(text, parsed):
    assert ImageRef.parse(text) == parsed
    assert parsed.target == (parsed.digest or parsed.tag)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A",
        "r.io/",
        "r.io/A",
        "r.io//a",
        "r.io/a/",
        "r.io/../a",
        "r.io/a_-b",
        "r.io/a:",
        "r.io/a:-x",
        "r.io/a:" + "t" * 129,
        "r.io/a@",
        "r.io/a@sha256:12",
        f"r.io/a@sha256:{HEX.upper()}",
        f"r.io/a@sha512:{HEX}",
        "r.io:port/a",
        "-r.io/a",
        "r.io/a b",
        "r.io/a\n",
        "r.io/" + "a" * 256,
        "r.io/" + "a-" * 3000,
        "https://r.io/a",
        "user@r.io/a",
    ],
)
def test_anything_else_is_refused_with_an_example(text):
    with pytest.raises(InvalidReference, match=r"expected for example"):
        ImageRef.parse(text)


component = st.from_regex(r"[a-z0-9]{1,5}((\.|_|__|-{1,3})[a-z0-9]{1,3}){0,2}", fullmatch=True)
references = st.builds(
    ImageRef,
    st.sampled_from(["docker.io", "localhost", "r.io", "127.0.0.1:5000", "[::1]:80", "host:1"]),
    st.lists(component, min_size=2, max_size=4).map("/".join),
    st.none() | st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,10}", fullmatch=True),
    st.none() | st.just(f"sha256:{HEX}"),
).filter(lambda ref: ref.tag or ref.digest)


@given(references)
def test_text_and_reference_are_the_same_thing(ref):
    assert ImageRef.parse(str(ref)) == ref


@given(st.text(max_size=60))
def test_noise_is_refused_or_has_a_stable_name(text):
    try:
        ref = ImageRef.parse(text)
    except InvalidReference:
        return
    assert ImageRef.parse(str(ref)) == ref


def test_pinning_keeps_the_tag_for_people():
    pinned = ImageRef.parse("r.io/a:v1").pinned(f"sha256:{HEX}")
    assert str(pinned) == f"r.io/a:v1@sha256:{HEX}"
    with pytest.raises(InvalidReference):
        pinned.pinned("latest")
