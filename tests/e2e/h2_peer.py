"""A client of HTTP/2 made of frames, for what no library would send."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import grpc
import numpy as np
from gatelet.agent.scoring import h2_frames as h2
from gatelet.agent.scoring.h2_headers import literals
from gatelet.protos import open_inference_pb2 as oip
from gatelet.protos.inference import InferenceStub

from ..bench.scoring_site import Site

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM = "/inference.GRPCInferenceService/ModelStreamInfer"
X = np.arange(4, dtype=np.float32).reshape(1, 4)


def request(model: str = "e", x: np.ndarray = X) -> oip.ModelInferRequest:
    made = oip.ModelInferRequest(model_name=model, raw_input_contents=[x.tobytes()])
    made.inputs.add(name="x", datatype="FP32", shape=x.shape)
    return made


def framed(message: bytes, flag: int = 0) -> bytes:
    return bytes((flag,)) + len(message).to_bytes(4, "big") + message


class Peer:
    """A client made of frames."""

    def __init__(self, site: Site, settings: dict[int, int] | None = None) -> None:
        host, _, port = site.address.rpartition(":")
        self.link = socket.create_connection((host, int(port)), timeout=15)
        self._buffer = b""
        self._held: list[bytes] | None = None
        self._got: dict[int, bytes] = {}
        self._over: set[int] = set()
        self.send(h2.PREFACE, h2.settings(settings or {}))

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.link.close()

    def send(self, *frames: bytes) -> None:
        if self._held is not None:
            self._held += frames
        else:
            self.link.sendall(b"".join(frames))

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is sent meanwhile goes out in one piece."""
        self._held = []
        yield
        frames, self._held = self._held, None
        self.send(*frames)

    def call(
        self, number: int, body: bytes, *more: tuple[bytes, bytes], path: str = INFER, end: int = 1
    ) -> None:
        fields = [
            *((b":method", b"POST"), (b":scheme", b"http"), (b":path", path.encode())),
            *((b"content-type", b"application/grpc"), (b"te", b"trailers"), *more),
        ]
        frames = [h2.frame(h2.HEADERS, 4, number, literals(fields))]
        for at in range(0, len(body), h2.MAX_FRAME):
            part = body[at : at + h2.MAX_FRAME]
            last = end if at + len(part) == len(body) else 0
            frames.append(h2.frame(h2.DATA, last, number, part))
        # In one piece: some servers here do not wait long for the rest.
        self.send(*frames)

    def frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        while True:
            while len(self._buffer) >= 9:
                first, flags, stream = h2.unpack_head(self._buffer, 0)
                end = 9 + (first >> 8)
                if len(self._buffer) < end:
                    break
                payload, self._buffer = self._buffer[9:end], self._buffer[end:]
                yield first & 255, flags, stream, payload
            try:
                data = self.link.recv(65536)
            except ConnectionResetError:
                return
            if not data:
                return
            self._buffer += data

    def ended(self, number: int) -> bytes:
        """All the payloads of a stream, once it has ended; what others get meanwhile is kept."""
        return self.all_ended([number])[number]

    def all_ended(self, numbers: Iterable[int]) -> dict[int, bytes]:
        """`ended` of each, in whatever order they end."""
        wanted = list(numbers)
        if not self._over.issuperset(wanted):
            for kind, flags, stream, payload in self.frames():
                if kind not in (h2.DATA, h2.HEADERS):
                    continue
                self._got[stream] = self._got.get(stream, b"") + payload
                if flags & h2.END_STREAM:
                    self._over.add(stream)
                    if self._over.issuperset(wanted):
                        break
            else:
                raise AssertionError(f"closed before the end of {wanted}: {self._got!r}")
        return {number: self._got[number] for number in wanted}

    def goodbye(self) -> int:
        """The code of GOAWAY, once the connection is closed."""
        codes = [int.from_bytes(f[3][4:8], "big") for f in self.frames() if f[0] == h2.GOAWAY]
        return codes[-1] if codes else -1


def status(answer: bytes) -> int:
    at = answer.index(b"grpc-status") + len(b"grpc-status")
    return int(answer[at + 1 : at + 1 + answer[at]])


def answered(site: Site) -> None:
    with grpc.insecure_channel(site.address) as channel:
        answer = InferenceStub(channel).model_infer(request(), 10)
    assert np.frombuffer(answer.raw_output_contents[0], np.float32).tolist() == [0, 2, 4, 6]


def send_anyway(peer: Peer, data: bytes) -> None:
    """Though the server may have closed."""
    try:
        peer.send(data)
    except OSError:
        pass
