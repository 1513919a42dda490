"""The emulated motor bus against the plain dynamixel-sdk, so that driver tests can trust it."""
import json
import math
import os
import subprocess
import sys
import termios
import time

import dynamixel_sdk as dxl
import pytest
import serial
from dynamixel_sdk import COMM_RX_CORRUPT, COMM_RX_TIMEOUT, COMM_SUCCESS

import emulated_bus
from emulated_bus import ITEMS, EmulatedBus, crc16, packet

FAILED = (COMM_RX_TIMEOUT, COMM_RX_CORRUPT)


@pytest.fixture(autouse=True)
def patient_sdk(monkeypatch):
    """The SDK waits 34 ms for an answer; a busy test machine may need longer."""
    monkeypatch.setattr(dxl.port_handler, "LATENCY_TIMER", 80)


class Host(dxl.Protocol2PacketHandler):
    """The SDK with register names."""

    def __init__(self, bus, baud=4_000_000):
        super().__init__()
        self.port = dxl.PortHandler(bus.path)
        self.port.openPort()
        self.port.setBaudRate(baud)

    def get(self, id, name):
        """(value, communication result, status error)"""
        item = ITEMS[name]
        data, result, error = self.readTxRx(self.port, id, item.address, item.size)
        return int.from_bytes(bytes(data), "little", signed=item.low < 0), result, error

    def value(self, id, name):
        value, result, error = self.get(id, name)
        assert (result, error) == (COMM_SUCCESS, 0)
        return value

    def put(self, id, name, value):
        """Status error of a write that must get through."""
        item = ITEMS[name]
        data = list((value & (1 << 8 * item.size) - 1).to_bytes(item.size, "little"))
        result, error = self.writeTxRx(self.port, id, item.address, item.size, data)
        assert result == COMM_SUCCESS
        return error

    def alive(self, id):
        return self.ping(self.port, id)[1] == COMM_SUCCESS


def until(condition, seconds=4.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.fixture
def bus():
    with EmulatedBus() as bus:
        yield bus


@pytest.fixture
def host(bus):
    return Host(bus)


# ---- the protocol
@pytest.mark.parametrize("id, body, published", [      # examples of the ROBOTIS manual
    (1, "01", "FF FF FD 00 01 03 00 01 19 4E"),
    (1, "55 00 06 04 26", "FF FF FD 00 01 07 00 55 00 06 04 26 65 5D"),
    (254, "01", "FF FF FD 00 FE 03 00 01 31 42"),
    (1, "02 84 00 04 00", "FF FF FD 00 01 07 00 02 84 00 04 00 1D 15"),
    (1, "55 00 A6 00 00 00", "FF FF FD 00 01 08 00 55 00 A6 00 00 00 8C C0"),
    (1, "03 74 00 00 02 00 00", "FF FF FD 00 01 09 00 03 74 00 00 02 00 00 CA 89"),
    (1, "55 00", "FF FF FD 00 01 04 00 55 00 A1 0C"),
    (1, "08", "FF FF FD 00 01 03 00 08 2F 4E"),
    (254, "82 84 00 04 00 01 02", "FF FF FD 00 FE 09 00 82 84 00 04 00 01 02 CE FA"),
    (254, "83 74 00 04 00 01 96 00 00 00 02 AA 00 00 00",
     "FF FF FD 00 FE 11 00 83 74 00 04 00 01 96 00 00 00 02 AA 00 00 00 82 87"),
])
def test_published_packets(id, body, published):
    body = bytes.fromhex(body)
    assert packet(id, body[0], body[1:]) == bytes.fromhex(published)


def test_published_ping_over_the_wire():
    with EmulatedBus(ids=[1], models={1: 1030}) as bus, \
            serial.Serial(bus.path, 4_000_000, timeout=2) as port:
        bus.motors[1]["firmware_version"] = 38
        port.write(bytes.fromhex("FF FF FD 00 01 03 00 01 19 4E"))
        assert port.read(14) == bytes.fromhex("FF FF FD 00 01 07 00 55 00 06 04 26 65 5D")
        port.write(bytes.fromhex("FF FF FD 00 01 03 00 01 19 4F"))           # bad CRC: error 3
        assert port.read(11) == packet(1, 0x55, [3])
        # half a packet, then a whole one
        port.write(bytes.fromhex("FF FF FD 00 01 03"))
        time.sleep(0.1)
        # no such instruction: error 2
        port.write(b"noise" + packet(1, 0x77))
        assert port.read(11) == packet(1, 0x55, [2])


def test_byte_stuffing_on_the_wire(host, bus):
    assert packet(1, 3, b"\xff\xff\xfd\x01") [7:-2] == b"\x03\xff\xff\xfd\xfd\x01"
    # -131073: a legal extended position
    value = int.from_bytes(b"\xff\xff\xfd\xff", "little", signed=True)
    host.put(0, "operating_mode", 4)
    assert host.put(0, "goal_position", value) == 0
    assert bus.motors[0]["goal_position"] == value
    assert host.value(0, "goal_position") == value


def test_ping_and_broadcast_ping(host):
    assert host.ping(host.port, 3) == (1200, COMM_SUCCESS, 0)
    assert host.ping(host.port, 40)[1] == COMM_RX_TIMEOUT
    found, result = host.broadcastPing(host.port)
    assert result == COMM_SUCCESS and sorted(found) == list(range(16))
    assert {model for model, _ in found.values()} == {1200}


def test_read_and_write_every_size(host, bus):
    for name, value in [("led", 1), ("position_p_gain", 600), ("profile_velocity", 12345),
                        ("goal_velocity", -77)]:
        assert host.put(5, name, value) == 0
        assert host.value(5, name) == value == bus.motors[5][name]
    assert host.value(5, "present_position") == 2048
    assert host.value(5, "present_input_voltage") == 50
    data, result, error = host.readTxRx(host.port, 5, 64, 83)    # one block, unused bytes read 0
    assert result == COMM_SUCCESS and error == 0 and len(data) == 83
    assert data[116 - 64] == 0x00 and data[3] == 0


def test_defaults_of_both_models():
    with EmulatedBus(ids=[0, 1], models={0: 1200, 1: 1240}) as bus:
        host = Host(bus)
        for id, model, gain, limit in [(0, 1200, 400, 1750), (1, 1240, 1100, 2352)]:
            names = ("model_number", "position_p_gain", "current_limit", "goal_current")
            assert [host.value(id, name) for name in names] == [model, gain, limit, limit]


def test_clear_multi_turn(host, bus):
    host.put(0, "operating_mode", 4)
    bus.push(0, 7.0)
    turn = 2048 + round(7.0 * 4096 / math.tau)
    assert host.value(0, "present_position") == turn
    assert host.clearMultiTurn(host.port, 0) == (COMM_SUCCESS, 0)
    assert host.value(0, "present_position") == turn - 4096


def test_shadow_id_obeys_and_is_silent(host, bus):
    host.put(1, "secondary_id", 0)
    assert host.put(0, "led", 1) == 0 and bus.motors[1]["led"] == 1


def test_sync_and_fast_sync_read(host, bus):
    bus.push(3, 0.5)
    group = dxl.GroupSyncRead(host.port, host, 126, 10)
    for id in range(16):
        group.addParam(id)
    for read in (group.txRxPacket, group.fastSyncRead):
        assert read() == COMM_SUCCESS
        expected = [2048, 2048 + round(0.5 * 4096 / math.tau)]
        assert [group.getData(id, 132, 4) for id in (0, 3)] == expected


def test_fast_sync_read_has_a_running_crc(bus):
    with serial.Serial(bus.path, 4_000_000, timeout=2) as port:
        port.write(packet(254, 0x8A, bytes([146, 0, 1, 0, 4, 5])))
        raw = port.read(8 + 2 * 5)
    assert raw[:8] == b"\xff\xff\xfd\x00\xfe\x0b\x00\x55" and raw[8:11] == bytes([0, 4, 28])
    for end in (11, 16):
        assert int.from_bytes(raw[end:end + 2], "little") == crc16(raw[:end])


def test_sync_and_bulk_write_and_bulk_read(host, bus):
    sync = dxl.GroupSyncWrite(host.port, host, 116, 4)
    for id in range(16):
        sync.addParam(id, (2000 + id).to_bytes(4, "little"))
    assert sync.txPacket() == COMM_SUCCESS
    assert [host.value(id, "goal_position") for id in range(16)] == list(range(2000, 2016))
    bulk = dxl.GroupBulkWrite(host.port, host)
    bulk.addParam(1, 65, 1, [1])
    bulk.addParam(2, 84, 2, [88, 2])
    assert bulk.txPacket() == COMM_SUCCESS
    read = dxl.GroupBulkRead(host.port, host)
    read.addParam(1, 65, 1)
    read.addParam(2, 84, 2)
    for call in (read.txRxPacket, read.fastBulkRead):
        assert call() == COMM_SUCCESS
        assert (read.getData(1, 65, 1), read.getData(2, 84, 2)) == (1, 600)


def test_reg_write_and_action(host, bus):
    data = list((2100).to_bytes(4, "little"))
    assert host.regWriteTxRx(host.port, 2, 116, 4, data) == (COMM_SUCCESS, 0)
    assert host.value(2, "registered_instruction") == 1 and host.value(2, "goal_position") == 2048
    host.action(host.port, 254)
    assert host.value(2, "goal_position") == 2100 and host.value(2, "registered_instruction") == 0


def test_indirect_addresses(host):
    host.put(0, "indirect_address_1", 132)
    host.put(0, "indirect_address_2", 133)
    host.put(0, "indirect_address_3", 65)
    assert host.put(0, "indirect_data_3", 1) == 0
    data, _, _ = host.readTxRx(host.port, 0, 208, 3)
    assert bytes(data) == (2048).to_bytes(2, "little") + b"\x01" and host.value(0, "led") == 1


# ---- what the motor refuses
def test_errors(host, bus):
    def write(address, *data):
        return host.writeTxRx(host.port, 0, address, len(data), list(data))[1]

    assert write(65, 2) == 4 and write(11, 2) == 4 and write(98, 200) == 4      # Data Range
    # Data Length: half a goal
    assert write(116, 0, 8) == 5
    assert host.put(0, "current_limit", 300) == 0
    assert host.put(0, "goal_current", 350) == 6                               # Data Limit
    # one turn in position mode,
    assert host.put(0, "goal_position", 5000) == 6
    host.put(0, "operating_mode", 5)
    # many in current-based position mode
    assert host.put(0, "goal_position", 5000) == 0
    # Access: read only, undefined
    assert write(132, 0, 0, 0, 0) == 7 and write(14, 1) == 7
    assert host.readTxRx(host.port, 0, 300, 4)[2] == 7
    # mode change: goal back to the limit
    assert host.value(0, "goal_current") == 300


def test_eeprom_is_locked_under_torque(host):
    assert host.put(0, "torque_enable", 1) == 0
    assert host.put(0, "operating_mode", 5) == 7
    assert host.put(0, "torque_enable", 0) == 0 and host.put(0, "operating_mode", 5) == 0


def test_status_return_level(host, bus):
    bus.motors[0]["status_return_level"] = 1
    assert host.value(0, "led") == 0
    assert host.write1ByteTxRx(host.port, 0, 65, 1)[0] == COMM_RX_TIMEOUT
    assert bus.motors[0]["led"] == 1
    bus.motors[0]["status_return_level"] = 0
    assert host.get(0, "led")[1] == COMM_RX_TIMEOUT and host.alive(0)


def test_wrong_baud_is_silent(bus):
    assert not Host(bus, 1_000_000).alive(0)
    host = Host(bus)
    assert host.alive(0)
    host.put(0, "baud_rate", 3)
    assert not host.alive(0) and host.alive(1) and Host(bus, 1_000_000).alive(0)


def test_duplicate_ids_collide(host, bus):
    host.put(7, "id", 6)
    assert host.ping(host.port, 6)[1] in FAILED and host.ping(host.port, 7)[1] in FAILED
    assert host.alive(5)


def test_factory_reset(host, bus):
    host.put(4, "temperature_limit", 60)
    # all but id and baud
    assert host.factoryReset(host.port, 4, 0x02) == (COMM_SUCCESS, 0)
    assert until(lambda: host.alive(4)) and host.value(4, "temperature_limit") == 70
    host.factoryReset(host.port, 4, 0xFF)
    assert not host.alive(4) and until(lambda: Host(bus, 57600).alive(1))


# ---- moving
def test_position_moves_to_goal(host, bus):
    host.put(0, "operating_mode", 5)
    host.put(0, "goal_current", 350)
    host.put(0, "position_p_gain", 800)
    host.put(0, "torque_enable", 1)
    host.put(0, "goal_position", 2600)
    assert until(lambda: abs(host.value(0, "present_position") - 2600) < 12
                 and host.value(0, "present_velocity") == 0)     # not on its way through
    assert abs(bus.angles()[0] - 552 * math.tau / 4096) < 0.02
    assert bus.motors[1].position() == 2048 and bus.stats["max_step"][0] == 552


def test_jam_stop_sign_offset_swap(host, bus):
    bus.joints[1].stops = (-0.2, 0.2)
    bus.stuck(0)
    bus.sign(2, -1)
    bus.zero_offset(3, 1024)
    bus.swap(4, 5)
    assert host.value(3, "present_position") == 3072
    for id in range(5):
        host.put(id, "position_p_gain", 800)
        host.put(id, "torque_enable", 1)
        # +0.61 rad if all were well
        host.put(id, "goal_position", 2448)
    assert until(lambda: abs(bus.angles()[5] - 0.61) < 0.03 and abs(bus.angles()[3] + 0.95) < 0.03)
    assert bus.angles()[0] == 0
    assert abs(host.value(0, "present_current")) > 100           # pushes against the jam
    assert abs(bus.angles()[1] - 0.2) < 1e-6 and abs(bus.angles()[2] + 0.61) < 0.03
    assert bus.angles()[4] == 0


def test_current_limit_and_profile_velocity(host, bus):
    bus.stuck(0)
    for id in (0, 1):
        host.put(id, "operating_mode", 5)
        host.put(id, "goal_current", 150)
        host.put(id, "torque_enable", 1)
    host.put(1, "profile_velocity", 10)                                        # 0.24 rad/s
    host.put(0, "goal_position", 4000)
    host.put(1, "goal_position", 4000)
    time.sleep(0.3)
    assert 140 <= host.value(0, "present_current") <= 150
    assert 0 < host.value(1, "present_position") - 2048 < 1000


# ---- watchdog, shutdown, reboot
@pytest.mark.parametrize("faulty", [False, True])
def test_bus_watchdog(faulty):
    with EmulatedBus(faulty_watchdog=faulty) as bus:
        host = Host(bus)
        host.put(0, "bus_watchdog", 10)                                        # 200 ms
        time.sleep(0.3)
        # torque off: not counting
        assert host.value(0, "bus_watchdog") == 10
        host.put(0, "torque_enable", 1)
        assert until(lambda: bus.motors[0]["bus_watchdog"] == 255)
        assert host.value(0, "bus_watchdog") == 255 and bus.stats["watchdog_trips"] == 1
        assert bus.motors[0].driving == faulty and host.value(0, "torque_enable") == 1
        assert host.put(0, "goal_position", 2100) == 4
        assert host.put(0, "bus_watchdog", 0) == 0 and host.put(0, "goal_position", 2100) == 0
        assert bus.motors[0].driving and bus.stats["longest_silent_driving"] > 0.15


def test_overload_alert_and_reboot(host, bus):
    host.put(3, "torque_enable", 1)
    host.put(3, "position_p_gain", 700)
    bus.push(3, 0.4)
    bus.overload(3)
    assert host.get(3, "torque_enable") == (0, COMM_SUCCESS, 0x80)
    assert host.get(3, "hardware_error_status") == (32, COMM_SUCCESS, 0x80)
    assert host.ping(host.port, 3)[2] == 0x80
    assert host.put(3, "torque_enable", 1) == 0x81                             # not before a reboot
    assert until(lambda: bus.joints[3].w == 0)                                 # coasts to a stop
    position = host.get(3, "present_position")[0]
    assert host.reboot(host.port, 3)[0] == COMM_SUCCESS
    assert not host.alive(3) and host.alive(2)
    assert until(lambda: host.alive(3))
    assert host.value(3, "hardware_error_status") == 0 and host.value(3, "position_p_gain") == 400
    assert host.value(3, "present_position") == position and host.put(3, "torque_enable", 1) == 0


def test_overheat_and_voltage_dip(host, bus):
    bus.overheat(1)
    assert host.get(1, "hardware_error_status") == (4, COMM_SUCCESS, 0x80)
    # voltage is no reason for this one
    bus.motors[2]["shutdown"] = 52
    host.put(2, "torque_enable", 1)
    host.put(3, "torque_enable", 1)
    bus.dip(3.0, 0.3)
    assert host.get(0, "hardware_error_status")[2] == 0x80
    assert (bus.motors[2]["torque_enable"], bus.motors[3]["torque_enable"]) == (1, 0)
    assert until(lambda: bus.voltage == 5.0)
    assert until(lambda: host.get(2, "led")[2] == 0) and host.get(3, "led")[2] == 0x80


# ---- a bad line
def test_dropped_and_corrupted_packets(host, bus):
    bus.inject("drop")
    assert host.get(0, "led")[1] == COMM_RX_TIMEOUT
    bus.inject("drop_request")
    assert host.get(0, "led")[1] == COMM_RX_TIMEOUT
    bus.inject("corrupt", 1, 4)
    assert host.value(0, "led") == 0 and host.get(4, "led")[1] in FAILED
    bus.inject("corrupt_request")
    assert host.get(0, "led")[1:] != (COMM_SUCCESS, 0)
    assert host.value(0, "led") == 0
    assert bus.stats["faults"] == dict(drop=1, drop_request=1, corrupt=1, corrupt_request=1)
    bus.rate("drop", 1.0)
    assert not host.alive(0)
    # the bus survives its user
    for mistake in (lambda: bus.overload(99), lambda: bus.rate("drp", 1)):
        with pytest.raises((KeyError, ValueError)):
            mistake()
    bus.rate("drop", 0)
    assert host.alive(0)


def test_late_and_duplicate_replies(host, bus):
    bus.delay = 0.4
    bus.inject("delay")
    assert host.get(0, "present_position")[1] == COMM_RX_TIMEOUT
    # it came after all, and is stale
    assert until(lambda: host.port.getBytesAvailable() == 15)
    bus.inject("duplicate")
    assert host.value(0, "present_position") == 2048
    assert until(lambda: host.port.getBytesAvailable() == 15)


@pytest.mark.parametrize("chain", [True, False])
def test_a_silent_motor_in_a_sync_read(chain):
    with EmulatedBus(ids=range(3), sync_chain=chain) as bus, \
            serial.Serial(bus.path, 4_000_000, timeout=0.3) as port:
        bus.silence(1)
        port.write(packet(254, 0x82, bytes([65, 0, 1, 0, 0, 1, 2])))
        answers = port.read(100)
        assert answers == packet(0, 0x55, [0, 0]) + (b"" if chain else packet(2, 0x55, [0, 0]))


def test_unplug_and_plug(host, bus):
    host.put(0, "torque_enable", 1)
    bus.unplug()
    assert not os.path.exists(bus.path)
    # termios.error is no OSError: the SDK flushes its input before it writes
    with pytest.raises((OSError, termios.error)):
        host.alive(0)
    bus.plug()
    again = Host(bus)
    # the motors kept their power
    assert again.alive(0) and again.value(0, "torque_enable") == 1


def test_timing_at_a_slow_baud():
    with EmulatedBus(ids=[0], baud=9600) as bus:
        host = Host(bus, 9600)
        start = time.monotonic()
        host.value(0, "present_position")
        assert time.monotonic() - start > (14 + 15) * 10 / 9600


def test_goals_outside_the_joint_limits_are_counted():
    with EmulatedBus(limits=[(-0.3, 0.3)] * 16) as bus:
        host = Host(bus)
        host.put(0, "goal_position", 2048 + 190)
        assert bus.stats["goals_outside_limits"] == 0
        host.put(0, "goal_position", 2048 + 200)
        assert bus.stats["goals_outside_limits"] == 1 and bus.stats["goal_writes"] == 2


def test_as_a_process(tmp_path):
    link, report, control = (tmp_path / name for name in ("ttyLEAP", "report.json", "control"))
    process = subprocess.Popen([sys.executable, emulated_bus.__file__, "--link", link,
                                "--report", report, "--control", control])
    try:
        assert until(lambda: link.exists() and report.exists(), 10)
        bus = type("Bus", (), {"path": str(link)})
        host = Host(bus)
        host.put(3, "torque_enable", 1)
        assert until(lambda: json.loads(report.read_text())["torque"]["3"] == 1)
        with open(control, "w") as fifo:
            fifo.write("overload 3\nnonsense\n")
        assert until(lambda: json.loads(report.read_text())["hardware_error"]["3"] == 32)
        assert "nonsense" in json.loads(report.read_text())["bad_commands"][0]
        assert host.get(3, "torque_enable") == (0, COMM_SUCCESS, 0x80)
    finally:
        process.terminate()
        assert process.wait(5) == 0
    assert not link.exists() and json.loads(report.read_text())["packets"] >= 2
