"""Temperatures, clocks and the FPGA manager's state, as the kernel tells them."""

from __future__ import annotations

from pathlib import Path

import pytest
from gatelet.accelerators.fpga.sensors import Sensors, manager_state, sysfs_of, temperatures
from gatelet.agent.scoring.fabric_metrics import FabricMetrics
from gatelet.agent.scoring.prometheus import render
from gatelet.simulator.board.boards import simulated_board
from gatelet.simulator.board.sysfs import AMBIENT, SYSFS_VARIABLE, SimulatedSysfs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

RESOLUTION = {"pynq-z2": 0.07, "zcu104": 0.01}


@pytest.mark.parametrize(
    ("board", "names"),
    [("pynq-z2", {"xadc temp0"}), ("zcu104", {"ams temp0_ps_temp", "ams temp20_pl_temp"})],
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(degrees=st.floats(-40, 125))
def test_what_the_converter_measures_is_what_is_read(
    tmp_path: Path, board: str, names: set[str], degrees: float
) -> None:
    sysfs = SimulatedSysfs(tmp_path / "sys", simulated_board(board))
    sysfs.set_temperature(degrees)
    found = temperatures(sysfs.root)
    assert set(found) == names
    assert all(abs(value - degrees) <= RESOLUTION[board] for value in found.values())


def test_boards_with_sensors_of_their_own_and_shared_scales(tmp_path: Path) -> None:
    for path, text in {
        "class/hwmon/hwmon0/name": "ina226\n",
        "class/hwmon/hwmon0/temp1_input": "53125\n",
        "class/hwmon/hwmon0/temp1_label": "inlet\n",
        "class/hwmon/hwmon0/temp2_input": "garbage\n",
        "class/hwmon/hwmon0/temp1_max": "90000\n",
        "class/hwmon/hwmon1/temp1_input": "40000\n",
        "bus/iio/devices/iio:device0/name": "adc\n",
        "bus/iio/devices/iio:device0/in_temp_raw": "100\n",
        "bus/iio/devices/iio:device0/in_temp_scale": "250\n",
        "bus/iio/devices/iio:device0/in_temp_offset": "4\n",
        "bus/iio/devices/iio:device0/in_temp3_raw": "200\n",
        "bus/iio/devices/iio:device1/in_temp0_input": "31000\n",
        # Of no sensor there is: a converter that is switched off.
        "bus/iio/devices/iio:device2/in_temp0_raw": "99999999\n",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert temperatures(tmp_path) == {
        "adc temp": 26.0,
        "adc temp3": 51.0,
        "iio:device1 temp0": 31.0,
        "ina226 inlet": 53.12,
        "hwmon1 temp1": 40.0,
    }


def test_a_machine_that_tells_nothing_has_nothing(tmp_path: Path) -> None:
    assert temperatures(None) == temperatures(tmp_path / "none") == {}
    assert manager_state(None) is manager_state(tmp_path) is None
    (tmp_path / "class").mkdir()
    (tmp_path / "class/hwmon").write_text("no folder")
    assert temperatures(tmp_path) == {}


def test_a_real_device_is_read_below_sys_and_a_simulated_one_below_its_own(tmp_path: Path) -> None:
    class Own:
        sysfs = tmp_path

    assert sysfs_of(object()) == Path("/sys")
    assert sysfs_of(Own()) == tmp_path


def test_the_environment_gives_a_simulated_board_its_sysfs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board = simulated_board("kv260")
    monkeypatch.delenv(SYSFS_VARIABLE, raising=False)
    assert SimulatedSysfs.from_environment(board) is None
    monkeypatch.setenv(SYSFS_VARIABLE, str(tmp_path / "sys"))
    assert SimulatedSysfs.from_environment(board) is not None
    assert temperatures(tmp_path / "sys")["ams temp0_ps_temp"] == pytest.approx(AMBIENT, abs=0.01)
    assert manager_state(tmp_path / "sys") == "unknown"


def test_readings_are_told_again_for_a_moment(tmp_path: Path) -> None:
    now = [100.0]
    sysfs = SimulatedSysfs(tmp_path, simulated_board("zcu104"))
    sensors = Sensors(tmp_path, lambda: {"fclk0": 100.0}, lambda: now[0])
    first = sensors.read()
    assert (first.manager, first.clocks) == ("unknown", {"fclk0": 100.0})
    sysfs.set_temperature(80.0)
    assert sensors.read() is first
    now[0] += 1.0
    assert sensors.read().temperatures["ams temp20_pl_temp"] == pytest.approx(80, abs=0.01)


def test_metrics_of_a_fabric_that_tells_all_nothing_or_nonsense() -> None:
    told = {
        "board": "pynq-z2", "part": "xc7z020clg400-1", "loaded": None, "trouble": "hung",
        "busySeconds": 1.5, "reconfigurations": 3, "swapsAvoided": 7, "queued": 2,
        "temperatures": {"xadc temp0": 61.25}, "clocksMhz": {"fclk0": 142.857},
    }  # fmt: skip
    lines = render(FabricMetrics(lambda: told).metrics()).decode().splitlines()
    for line in (
        "gatelet_fabric_up 1",
        "gatelet_fabric_sick 1",
        'gatelet_fabric_info{board="pynq-z2",part="xc7z020clg400-1",loaded=""} 1',
        "gatelet_fabric_busy_seconds_total 1.5",
        "gatelet_fabric_reconfigurations_total 3",
        "gatelet_fabric_swaps_avoided_total 7",
        "gatelet_fabric_queued 2",
        'gatelet_fabric_temperature_celsius{sensor="xadc temp0"} 61.25',
        'gatelet_fabric_clock_hertz{clock="fclk0"} 142857000.0',
    ):
        assert line in lines
    assert (
        "gatelet_fabric_hangs_total" not in render(FabricMetrics(lambda: told).metrics()).decode()
    )
    assert render(FabricMetrics(lambda: None).metrics()).decode().splitlines()[2:] == [
        "gatelet_fabric_up 0"
    ]
    assert FabricMetrics(dict).metrics() == []
    assert FabricMetrics(dict).document() == b""
    assert FabricMetrics(lambda: None).document() == b'{"up": false}'
    odd = {"busySeconds": "much", "queued": True, "temperatures": [1], "clocksMhz": {"x": None}}
    assert b"much" not in render(FabricMetrics(lambda: odd).metrics())
