#!/bin/sh
# The hub's SDK tests with another release of azure-iot-device (and the paho-mqtt it asks for), in a
# folder that goes away again:
#   tests/compat/azure_iot_device.sh [VERSION]      default: 2.15.0rc1, the first with paho-mqtt 2
# PYTHON names the interpreter of the test environment (default: python3).
set -eu
version="${1:-2.15.0rc1}"
python="${PYTHON:-python3}"
cd "$(dirname "$0")/../.."
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"$python" -m pip install --quiet --pre --target "$folder" "azure-iot-device==$version"
PYTHONPATH="$folder" "$python" -c '
from importlib.metadata import version
print("azure-iot-device", version("azure-iot-device"), "paho-mqtt", version("paho-mqtt"))'
PYTHONPATH="$folder" "$python" -m pytest -q -p no:cacheprovider --timeout 60 -W "ignore:Callback API version 1:DeprecationWarning" \
    tests/contract/test_iothub_matrix.py tests/contract/test_iothub_workload.py \
    tests/contract/test_iothub_dps.py tests/contract/test_iothub_c2d.py
