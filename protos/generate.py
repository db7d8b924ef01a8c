"""Writes the *_pb2 modules from the .proto files: `python -m gatelet.protos.generate`.

Needs grpcio-tools 1.64 (protoc 26): its output runs on every protobuf from 5.26 on, while that of
newer ones refuses older runtimes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

SOURCES = ("control.proto", "health.proto", "open_inference.proto")

_HERE = Path(__file__).resolve().parent
_DEFAULT_POOL = "_descriptor_pool.Default()"
_OWN_POOL = "_descriptor_pool.DescriptorPool()"
_STUB_HEADER = '# mypy: disable-error-code="type-arg"\n'


def generate(out: Path) -> list[Path]:
    """Write the module and the type stub of every source into `out`; the paths written.

    Raises RuntimeError when protoc is not there or fails.
    """
    written = []
    for source in SOURCES:
        compile_one = [f"-I{_HERE}", f"--python_out={out}", f"--pyi_out={out}", source]
        run = subprocess.run(
            [sys.executable, "-m", "grpc_tools.protoc", *compile_one],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if run.returncode != 0:
            raise RuntimeError(
                f"{source}: {run.stderr.strip()} (needs: pip install grpcio-tools==1.64.0)"
            )
        module = out / source.replace(".proto", "_pb2.py")
        text = module.read_text()
        if text.count(_DEFAULT_POOL) != 1:
            raise RuntimeError(
                f"{module}: expected {_DEFAULT_POOL} once; this protoc writes another form, "
                "install grpcio-tools 1.64"
            )
        # Other OIP clients (tritonclient) register the same full names in the default pool, and
        # the second registration in a process fails.
        module.write_text(text.replace(_DEFAULT_POOL, _OWN_POOL))
        stub = module.with_suffix(".pyi")
        stub.write_text(_STUB_HEADER + stub.read_text())
        written += [module, stub]
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="write the *_pb2 modules")
    parser.add_argument("--out", type=Path, default=_HERE, help="folder to write to")
    out: Path = parser.parse_args(arguments).out
    try:
        for path in generate(out):
            print(path)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
