"""The real driver and the real SDK against the emulated bus: readings, limits, faults, and every
door out with torque off."""
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Callable, NamedTuple

import numpy as np
import pytest
import serial.tools.list_ports
import torch

import deploy
import fit_ndm
import hand as H
import train_policy
from conftest import LIMITS, ROOT, WINDOWS, driving, finish, start
from emulated_bus import EmulatedBus
from hand import DynamixelHand
from hand_on_the_bus import Clock, PhysicalBus, in_process

NO_FILE = "/nonexistent/calibration.json"


def new_bus(**options):
    return EmulatedBus(**{"limits": LIMITS, "stops": LIMITS} | options)


@pytest.fixture
def bus():
    with new_bus() as bus:
        yield bus


@pytest.fixture
def hand(bus):
    with DynamixelHand(bus.path, NO_FILE) as hand:
        yield hand


def pose(bus, q):
    """Somebody puts the fingers at q (16,) rad, in joint order."""
    for motor, angle in zip(H.MOTOR_ID, q):
        bus.push(motor, angle)


def hold(hand, target, ticks):
    for _ in range(ticks):
        reading = hand.read()
        hand.command(target)
        time.sleep(0.02)
    return reading


# ----------------------------------------------------------------------------------------- readings
def test_reads_joint_angles_in_joint_order_and_si_units(bus, hand):
    q = np.linspace(-0.2, 0.25, 16)
    pose(bus, q)
    reading = hand.read()
    assert np.abs(reading.q - q).max() < H.COUNT
    assert not reading.dq.any() and not reading.current.any()


def test_velocity_and_current_are_those_of_the_motors(bus, hand):
    target, seen = np.full(16, 0.8), []
    for _ in range(14):
        before = {i: (m.joint.w, m.current) for i, m in bus.motors.items()}
        r = hand.read()
        after = {i: (m.joint.w, m.current) for i, m in bus.motors.items()}
        hand.command(target)
        time.sleep(0.02)
        seen.append(np.abs(r.dq).max())
        for j, i in enumerate(H.MOTOR_ID):     # between the values before and after, within a unit
            for k, value, unit in ((0, r.dq[j], H.RPM), (1, r.current[j], 1e-3)):
                low, high = sorted((before[i][k], after[i][k]))
                assert low - 0.4 * abs(low) - 5 * unit <= value <= high + 0.4 * abs(high) + 5 * unit
    assert max(seen) > 0.5


def test_time_is_of_the_reading_and_rises(hand):
    before = time.monotonic()
    times = [hand.read().time for _ in range(50)]
    assert before < times[0] and times[-1] < time.monotonic() and (np.diff(times) > 0).all()


def test_calibration_shifts_readings_and_goals_alike(bus, tmp_path):
    offset = np.linspace(-0.05, 0.05, 16)
    H.save_calibration(tmp_path / "c.json", offset)
    for i, o in zip(H.MOTOR_ID, offset):
        bus.zero_offset(i, round(o / H.COUNT))
    with DynamixelHand(bus.path, tmp_path / "c.json") as hand:
        assert np.abs(hand.read().q).max() < 2 * H.COUNT
        hold(hand, np.full(16, 0.3), 60)
        assert np.abs(np.array(bus.angles())[H.MOTOR_ID] - 0.3).max() < 0.06


@pytest.fixture
def mirrored(monkeypatch):
    """A hand whose motor 2 was mounted the other way round, and a table that says so."""
    signs = H.SIGN.copy()
    signs[H.MOTOR_ID.index(2)] = -1
    monkeypatch.setattr(H, "SIGN", signs)
    with new_bus() as bus:
        bus.sign(2, -1)
        bus.zero_offset(2, 40)
        yield bus


def test_a_mirrored_motor_with_an_offset_is_read_driven_and_limited(mirrored, tmp_path):
    j = H.MOTOR_ID.index(2)
    offset = np.zeros(16)
    offset[j] = 40 * H.COUNT                             # of the motor's angle
    H.save_calibration(tmp_path / "c.json", offset)
    with DynamixelHand(mirrored.path, tmp_path / "c.json") as hand:
        pose(mirrored, H.GRASP)
        assert np.abs(hand.read().q - H.GRASP).max() < H.COUNT
        before, seen = hand.read().q[j], []
        for _ in range(30):
            reading = hand.read()
            seen.append((reading.dq[j], reading.current[j]))
            hand.command(H.HIGH)
            time.sleep(0.02)
        assert np.max(seen, 0)[0] > 0.5 and np.max(seen, 0)[1] > 0.05          # towards the palm
        assert hand.read().q[j] - before > 0.5
        for end in (H.HIGH, H.LOW):                      # as far as it goes, and no further
            hand.move_to(end)
            assert np.abs(hand.target - end).max() < 1e-9
        hand.read()                                      # by now the motors have heard
        assert mirrored.stats["goals_outside_limits"] == 0
        goal = mirrored.motors[2].angle_at(mirrored.motors[2]["goal_position"])
        assert abs(goal - H.LOW[j]) <= H.COUNT


def test_a_disturbed_bus_gives_true_readings_or_none():
    """Every reading must be of the pose that the fingers have now, never of the one before."""
    with new_bus(delay=0.05, seed=3) as bus, DynamixelHand(bus.path, NO_FILE) as hand:
        rates = dict(drop=0.01, corrupt=0.01, duplicate=0.02, delay=0.005, drop_request=0.02)
        for kind, p in rates.items():
            bus.rate(kind, p)
        good = lost = 0
        rng = np.random.default_rng(0)
        for _ in range(60):
            q = rng.uniform(H.LOW, H.HIGH)
            pose(bus, q)
            try:
                reading = hand.read()
                assert np.abs(reading.q - q).max() < 2 * H.COUNT
                good += 1
            except H.BusError:
                lost += 1
        assert good > 50 and good + lost == 60


def test_a_bus_that_fails_raises_and_ends(bus, hand):
    bus.rate("drop", 1.0)
    start = time.monotonic()
    with pytest.raises(H.BusError, match="no motor answers"):
        hand.read()
    assert time.monotonic() - start < 30
    bus.rate("drop", 0.0)
    hand.reconnect()
    hand.read()


def test_a_few_lost_packets_are_asked_for_again(bus, hand):
    for kind in ("drop", "corrupt", "drop_request", "corrupt_request"):
        bus.inject(kind, 2)
        hand.read()
        hand.command(np.zeros(16))
    assert not [e for e in hand.events if e[1] != "setting"]


def test_an_answer_whose_bytes_are_stuffed_is_taken_at_once(bus, hand, monkeypatch):
    """A velocity of -1 and then a position that begins with 0xFD look like a header."""
    motor = bus.motors[5]
    monkeypatch.setattr(motor, "read", lambda address, length, read=motor.read: (
        (0, bytes.fromhex("0000 ffffffff fd070000")) if address == 126 else read(address, length)))
    asked = []
    monkeypatch.setattr(hand.packet, "syncReadTx", lambda *args, send=hand.packet.syncReadTx: (
        asked.append(args[1]), send(*args))[1])
    j = H.MOTOR_ID.index(5)
    reading = hand.read()
    assert reading.q[j] == pytest.approx(0x7FD * H.COUNT - np.pi) and asked.count(126) == 1
    assert reading.dq[j] == pytest.approx(-H.RPM)


def test_one_silent_motor_is_named(bus, hand):
    hold(hand, np.zeros(16), 3)
    bus.silence(6)
    with pytest.raises(H.BusError, match=r"motor 6 \(mf_pip\): no answer"):
        hold(hand, np.zeros(16), 10)
    assert not any(m.driving for i, m in bus.motors.items() if i != 6)
    bus.silence(6, False)
    hand.reconnect()
    assert not driving(bus)


# ----------------------------------------------------------------------------------------- commands
def test_no_goal_leaves_the_limits_and_no_step_is_large(bus, hand):
    rng = np.random.default_rng(0)
    for _ in range(80):
        hand.read()
        hand.command(rng.uniform(-10, 10, 16))
    assert bus.stats["goal_writes"] > 1000 and bus.stats["goals_outside_limits"] == 0
    assert max(bus.stats["max_step"].values()) <= H.MAX_STEP / H.COUNT + 1


@pytest.mark.parametrize("outside", [H.LOW - 0.15, H.HIGH + 0.15], ids=["below", "above"])
def test_a_joint_outside_its_limits_comes_back_step_by_step(outside):
    """Also when torque comes on, and whatever is commanded: further out is never an answer."""
    with new_bus(stops=None) as bus, DynamixelHand(bus.path, NO_FILE) as hand:
        pose(bus, outside)
        last = hand.read().q
        for target in (outside, outside + np.sign(outside) * 5, H.GRASP, outside, H.GRASP):
            sent = hand.command(target)
            assert np.abs(sent - last).max() <= H.MAX_STEP + 1e-9
            beyond = np.maximum(H.LOW - sent, sent - H.HIGH).max()
            assert beyond <= max(0, np.maximum(H.LOW - last, last - H.HIGH).max()) + 1e-9
            hand.read()                                  # by now the motors have heard
            goals = [bus.motors[i].angle_at(bus.motors[i]["goal_position"]) for i in H.MOTOR_ID]
            assert np.abs(goals - sent).max() <= H.COUNT         # what the motors were told
            last = sent
        assert beyond <= 0
        assert max(bus.stats["max_step"].values()) <= H.MAX_STEP / H.COUNT + 1
        bus.reset_stats()
        hold(hand, H.GRASP, 10)
        assert bus.stats["goals_outside_limits"] == 0


class Paper(H.Hand):
    """A hand of no substance: it is where it was last told to be."""
    realtime = False

    def __init__(self, q):
        super().__init__()
        self.sent, self.target = [], np.array(q, float)

    def read(self):
        return H.Reading(self.target, np.zeros(16), np.zeros(16), 0.05 * len(self.sent))

    def _write(self, target):
        self.sent.append(target)


def test_a_move_bends_the_fingers_back_and_crosses_none_while_they_close():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = np.clip(H.GRASP + rng.uniform(-0.45, 0.45, (2, 16)), H.LOW, H.HIGH)
        hand = Paper(a)
        assert np.allclose(hand.move_to(b), b)
        way = np.array([a, *hand.sent])
        assert (way >= H.LOW).all() and (way <= H.HIGH).all()
        assert np.abs(np.diff(way, axis=0)).max() <= H.MOVE_SPEED / H.CONTROL_HZ + 1e-9
        moves = np.abs(np.diff(way, axis=0))[:, ~(H.SIDE | H.BASE)].max(1) > 1e-9
        assert np.abs(way[1:][moves][:, H.SIDE]).max() < 1e-9      # fingers in parallel planes,
        back = max(a[H.BASE].min(), b[H.BASE].min())
        assert way[1:][moves][:, H.BASE].min() <= max(0, back - H.OPEN) + 1e-9       # bent back


def test_drive_is_read_command_tick():
    hand, seen = Paper(H.GRASP), []
    ticks = []
    hand.tick = lambda: ticks.append(len(hand.sent))
    act = lambda q: (seen.append(q), q + 0.01)[1]
    data = H.drive(hand, act, 7)
    assert {name: (x.shape, x.dtype.str[1:]) for name, x in data.items()} == {
        **{name: ((7, 16), "f4") for name in ("q", "dq", "target", "current")},
        "time": ((7,), "f8")}
    assert np.allclose(data["target"], np.array(seen) + 0.01) and np.allclose(data["q"], seen)
    assert ticks == [1, 2, 3, 4, 5, 6, 7] and np.allclose(np.diff(data["time"]), 0.05)
    assert len(H.drive(hand, act, 7, lambda hand: len(hand.sent) == 10)["time"]) == 3


@pytest.mark.parametrize("bad", [
    np.full(16, np.nan), np.zeros(15), np.full(16, np.inf), [[0.0] * 16]])
def test_a_broken_command_moves_nothing(bus, hand, bad):
    with pytest.raises(ValueError):
        hand.command(bad)
    assert bus.stats["goal_writes"] == 0 and not driving(bus)


def test_opening_and_reading_move_nothing(bus, hand):
    pose(bus, H.GRASP)
    hand.read()
    assert not driving(bus)


def test_torque_comes_on_at_the_present_pose(bus, hand):
    pose(bus, H.GRASP)
    hand.command(H.GRASP)
    assert driving(bus) and max(bus.stats["max_step"].values()) <= 2
    assert np.abs(np.array(bus.angles())[H.MOTOR_ID] - H.GRASP).max() < 0.02


def test_settings_of_the_table_reach_the_motors(bus, hand):
    hand.command(np.zeros(16))
    for j, i in enumerate(H.MOTOR_ID):
        m = bus.motors[i]
        assert (m["operating_mode"], m["return_delay_time"]) == (5, 0)
        assert m["current_limit"] == m["goal_current"] == 350
        assert (m["position_p_gain"], m["position_d_gain"]) == (H.P_GAIN[j], H.D_GAIN)
        assert m["position_i_gain"] == 0
        assert m["bus_watchdog"] == H.WATCHDOG


def test_current_limit_follows_the_model():
    with new_bus(models=1240) as bus, DynamixelHand(bus.path, NO_FILE):
        assert {m["goal_current"] for m in bus.motors.values()} == {550}


def test_move_to_is_slow_and_arrives(bus, hand):
    hand.move_to(H.GRASP)
    assert np.abs(hold(hand, H.GRASP, 10).q - H.GRASP).max() < 0.06
    largest = max(bus.stats["max_step"].values()) * H.COUNT
    assert largest <= H.MOVE_SPEED / H.CONTROL_HZ + 2 * H.COUNT


# ------------------------------------------------------------------------------- any laptop
ON_WINDOWS = WINDOWS + """
sys.path.insert(0, {root!r})
import numpy as np
import hand as H
import sim, train_policy, collect, fit_ndm, deploy
with sim.open_hand("sim:0") as hand:
    data = H.drive(hand, lambda q: H.GRASP, 5)
assert data["q"].shape == (5, 16) and np.isfinite(data["q"]).all()
H.run(lambda: H.DynamixelHand("COM3"))
""".format(root=str(ROOT))


def test_everything_but_a_real_hand_runs_without_posix():
    done = subprocess.run([sys.executable, "-c", ON_WINDOWS], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: a real hand needs Linux or macOS"), done.stderr
    assert done.stderr.count("\n") == 1


# -------------------------------------------------------------------------------------------- doors
CHILD = """
import sys, time
sys.path.insert(0, {root!r})
import hand as H
from hand import DynamixelHand

def main():
    with DynamixelHand(sys.argv[1], {no_file!r}) as hand:
        for i in range(400):
            hand.read()
            hand.command(H.GRASP)
            if i == 5:
                print("moving", flush=True)
            if i == 8 and sys.argv[2] == "return":
                return
            if i == 8 and sys.argv[2] == "exception":
                1 / 0
            if i == 8 and sys.argv[2] == "hang":
                while True:
                    pass
            time.sleep(0.05)

H.run(main)
""".format(root=str(ROOT), no_file=NO_FILE)


def child(bus, how="", **options):
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, bus.path, how], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, **options)
    assert process.stdout.readline() == "moving\n", process.stderr.read()
    return process


def wait_for_torque_off(bus, patience=3.0):
    """Seconds by the bus's own clock; also of a machine that is busy, so compare generously."""
    start = time.monotonic()
    while driving(bus) and time.monotonic() - start < patience:
        time.sleep(0.001)
    assert not driving(bus)
    return time.monotonic() - start


@pytest.mark.parametrize("faulty_watchdog", [False, True])
@pytest.mark.parametrize("how, status", [
    ("return", 0), ("exception", 1), ("hang", None), ("SIGINT", 130), ("SIGTERM", 143),
    ("SIGHUP", -1), ("SIGKILL", -9), ("SIGSTOP", 2)])
def test_torque_goes_off_by_every_door(how, status, faulty_watchdog):
    with new_bus(faulty_watchdog=faulty_watchdog) as bus:
        process = child(bus, how)
        if how.startswith("SIG"):
            time.sleep(0.12)
            process.send_signal(getattr(signal, how))
            took = wait_for_torque_off(bus)
        else:
            time.sleep(0.3)
            took = wait_for_torque_off(bus)
        assert took < 1.0                      # <= 0.3 s on a free machine, see tests/soak.py
        if how == "SIGSTOP":
            time.sleep(0.3)
            # thawed, it must not go on as if nothing had been
            process.send_signal(signal.SIGCONT)
            for _ in range(100):
                assert not driving(bus)
                time.sleep(0.005)
        if how == "hang":
            process.kill()
        _, errors = process.communicate(timeout=20)
        assert status is None or process.returncode == status
        if how == "SIGSTOP":
            assert "guardian" in errors


def test_frozen_at_any_moment_it_does_not_come_back_driving():
    """Also in the middle of switching torque on."""
    with new_bus(faulty_watchdog=True) as bus:
        for k in range(10):
            process = subprocess.Popen([sys.executable, "-c", CHILD, bus.path, ""],
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            until = time.monotonic() + 20
            packets = bus.stats["packets"] + 24 + 4 * k      # opening takes about 30, torque on 10
            while bus.stats["packets"] < packets and time.monotonic() < until:
                time.sleep(0.0002)
            process.send_signal(signal.SIGSTOP)
            wait_for_torque_off(bus)
            time.sleep(0.35)
            process.send_signal(signal.SIGCONT)
            time.sleep(0.02)
            process.send_signal(signal.SIGSTOP)
            wait_for_torque_off(bus)
            process.kill()
            process.communicate()


def test_a_killed_run_can_be_started_again_at_once(bus):
    process = child(bus)
    process.kill()
    with DynamixelHand(bus.path, NO_FILE) as hand:
        assert not driving(bus)
        hold(hand, np.zeros(16), 5)
        assert driving(bus)
    process.communicate()


def test_a_silent_caller_loses_torque_and_hears_of_it(bus, hand):
    hold(hand, np.zeros(16), 3)
    time.sleep(0.4)
    assert not driving(bus)
    with pytest.raises(H.BusError, match="no sign of life"):
        hand.read()
    hand.move_to(np.zeros(16))                           # and may start again
    assert driving(bus)


def test_rest_lets_go_and_silence_is_then_allowed(bus, hand):
    hold(hand, np.zeros(16), 3)
    hand.rest()
    assert not driving(bus)
    time.sleep(0.4)
    hold(hand, np.zeros(16), 3)
    assert driving(bus)


def test_without_its_guardian_the_hand_lets_go(bus, hand):
    hold(hand, np.zeros(16), 3)
    hand.guardian.kill()
    hand.guardian.wait()
    with pytest.raises(H.BusError):
        hold(hand, np.zeros(16), 3)
    wait_for_torque_off(bus)


def test_close_may_be_called_twice_and_on_a_dead_port(bus):
    hand = DynamixelHand(bus.path, NO_FILE)
    hold(hand, np.zeros(16), 3)
    bus.unplug()
    hand.close()
    hand.close()
    with pytest.raises(H.BusError):
        hand.read()


# ------------------------------------------------------------------------------------------- faults
@pytest.mark.parametrize("bit, kind", [
    (32, "overload"), (4, "overheating"), (1, "input voltage"), (16, "electrical shock"),
    (8, "encoder")])
def test_a_motor_that_shuts_down_is_rebooted_and_the_hand_goes_on(bus, hand, bit, kind):
    hold(hand, np.zeros(16), 3)
    bus.hardware_error(6, bit)
    with pytest.raises(H.BusError, match=rf"motor 6 \(mf_pip\) shut down: {kind}"):
        hold(hand, np.zeros(16), 5)
    assert not driving(bus)
    hand.reconnect()
    m = bus.motors[6]
    assert (m["position_p_gain"], m["goal_current"]) == (800, 350)
    assert (m["operating_mode"], m["hardware_error_status"]) == (5, 0)
    hand.move_to(np.zeros(16))
    assert all(m.driving for m in bus.motors.values())
    expected = [kind, "reboot", "ready"]
    assert [k for _, k, _ in hand.events if k in expected] == expected


def test_a_dip_of_the_supply(bus, hand):
    hold(hand, np.zeros(16), 3)
    bus.dip(3.0, 0.2)
    with pytest.raises(H.BusError, match="voltage"):
        hold(hand, np.zeros(16), 10)
    hand.reconnect()
    hold(hand, np.zeros(16), 3)
    assert driving(bus)


def test_a_motor_that_lost_its_power_is_noticed(bus, hand):
    hold(hand, np.zeros(16), 3)
    bus.motors[6].boot()                                 # back so fast that no read failed
    with pytest.raises(H.BusError, match=r"motor 6 \(mf_pip\) lost torque"):
        hold(hand, np.zeros(16), 60)
    hand.reconnect()
    assert bus.motors[6]["position_p_gain"] == 800


def test_a_motor_whose_watchdog_tripped_is_noticed(bus, hand):
    """It reports torque on, and refuses every goal."""
    hold(hand, np.zeros(16), 3)
    bus.motors[6]["bus_watchdog"], bus.motors[6].tripped = 255, True
    with pytest.raises(H.BusError, match=r"motor 6 \(mf_pip\) lost torque"):
        hold(hand, np.zeros(16), 60)
    hand.reconnect()
    hold(hand, np.zeros(16), 3)
    assert bus.motors[6].driving


def test_a_hot_motor_rests_until_it_is_cool(bus, hand):
    hold(hand, np.zeros(16), 3)
    bus.motors[3].temperature = 66.0
    with pytest.raises(H.BusError, match=r"motor 3 \(if_dip\) is at 66 C"):
        hold(hand, np.zeros(16), 60)
    assert not driving(bus)
    bus.motors[3].temperature = 60.0                     # below the alarm, not yet cool
    with pytest.raises(H.Problem, match="gave up"):
        hand.reconnect(patience=0.5)
    bus.motors[3].temperature = 50.0
    hand.reconnect()
    hold(hand, np.zeros(16), 3)


def test_repeated_faults_end_with_a_report(bus, hand):
    bus.reboot_time = 0.02
    for k in range(H.MAX_FAULTS[0] - 1):
        bus.overload(6)
        with pytest.raises(H.BusError):
            hold(hand, np.zeros(16), 3)
        hand.reconnect()
    bus.overload(6)
    with pytest.raises(H.Problem, match=f"{H.MAX_FAULTS[0]} shutdowns within") as error:
        hold(hand, np.zeros(16), 3)
    assert not isinstance(error.value, H.BusError) and not driving(bus)


def test_tries_to_reconnect_that_fail_are_no_new_faults(bus, hand):
    hold(hand, np.zeros(16), 3)
    bus.voltage = 3.8
    with pytest.raises(H.BusError, match="supply at the motors is 3.8"):
        hold(hand, np.zeros(16), 60)
    before = list(hand.events)
    with pytest.raises(H.Problem, match="gave up"):
        hand.reconnect(patience=0.5)
    assert hand.events == before
    bus.reboot_time = 0.02
    bus.overload(6)                                      # which a try mends, and then it fails
    with pytest.raises(H.Problem, match="gave up"):
        hand.reconnect(patience=0.5)
    assert [kind for _, kind, _ in hand.events[len(before):]] == ["reboot"]
    bus.voltage = 5.0
    hand.reconnect()
    hold(hand, np.zeros(16), 3)


def test_unplugged_and_plugged_in_again(bus, hand):
    hold(hand, np.zeros(16), 3)
    bus.unplug()
    with pytest.raises(H.BusError, match="is gone.*may still be on"):
        hold(hand, np.zeros(16), 3)
    with pytest.raises(H.Problem, match="gave up after 0.5 s: port .* is not there"):
        hand.reconnect(patience=0.5)
    bus.plug()
    hand.reconnect()
    assert not driving(bus)                    # the motors had kept their power and their torque
    hold(hand, np.zeros(16), 3)


# --------------------------------------------------------------------------- python hand.py --check
def check(bus_or_path, tmp_path, answers="y\n" * 20):
    """(exit status, stdout, stderr) of `python hand.py --check`, and what it is answered."""
    path = getattr(bus_or_path, "path", bus_or_path)
    command = [sys.executable, ROOT / "hand.py", "--check", "--port", path,
               "--calibration", tmp_path / "calibration.json"]
    done = subprocess.run(command, input=answers, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_check_of_a_good_hand_finds_its_zeros(tmp_path):
    with new_bus() as bus:
        offsets = np.random.default_rng(0).integers(-40, 41, 16)
        for i, counts in zip(H.MOTOR_ID, offsets):
            bus.zero_offset(i, int(counts))
        status, out, errors = check(bus, tmp_path)
        assert (status, errors) == (0, ""), (out, errors)
        assert out.count("ok  ") == 7
        found = H.load_calibration(tmp_path / "calibration.json")
        assert np.abs(found - offsets * H.COUNT).max() < np.deg2rad(0.5)
        assert not driving(bus)
        with DynamixelHand(bus.path, tmp_path / "calibration.json") as hand:
            missed = hand.read().q - np.array(bus.angles())[H.MOTOR_ID]
            assert np.abs(missed).max() < np.deg2rad(0.5)


def test_check_without_a_yes_moves_nothing(bus, tmp_path):
    status, out, errors = check(bus, tmp_path, "y\ny\ny\nn\n")
    assert (status, errors) == (0, "") and "not moved" in out and bus.stats["goal_writes"] == 0


def broken(**registers):
    """A set-up in which motor 3 came with these registers."""
    def spoil(bus):
        for name, value in registers.items():
            bus.motors[3][name] = value
    return spoil


def every(**registers):
    def spoil(bus):
        for motor in bus.motors.values():
            for name, value in registers.items():
                motor[name] = value
    return spoil


def stays(bit):
    """An error that no reboot clears."""
    def spoil(bus):
        m = bus.motors[3]
        m.boot = lambda boot=m.boot: (boot(), m.fail(bit))
        m.fail(bit)
    return spoil


def refuses(bus):
    motor, check = bus.motors[3], bus.motors[3].check
    motor.check = lambda address, data: (7, {}) if address == 11 else check(address, data)


def late(fault, packets=150):
    """Something that happens in the middle of the movements."""
    def spoil(bus):
        step = bus.step

        def stepping():
            step()
            if bus.stats["packets"] > packets:
                bus.step = step
                fault(bus)
        bus.step = stepping
    return spoil


def calibration(text):
    def write(tmp_path):
        (tmp_path / "calibration.json").write_text(text)
    return write


def offsets(value=0.0, hand=H.HAND, drop=0):
    offset = {joint.name: value for joint in H.JOINTS[drop:]}
    return calibration(json.dumps({"hand": hand, "offset": offset}))


def heated(degrees):
    return lambda bus: setattr(bus.motors[3], "temperature", degrees)


class Broken(NamedTuple):
    words: str                       # of the one line
    spoil: Callable | None = None    # what is done to the bus, or to the folder of a calibration
    options: dict = {}               # of the bus
    answers: str = "y\n" * 20        # lines of stdin


def remembers(words, spoil):
    """Motors with a permanent setting that somebody does not want to be changed."""
    return Broken(words, spoil, dict(return_delay=0), "n\n")


BROKEN = {
    "no power": Broken("no motor answers: is the 5 V supply on", options=dict(ids=())),
    "factory baud": Broken("set to 4000000 baud", options=dict(baud=57_600)),
    "one motor at another baud": Broken("motor 3 (if_dip): no answer", broken(baud_rate=3)),
    "one id missing": Broken(
        "motor 7 (mf_dip): no answer", options=dict(ids=[i for i in range(16) if i != 7])),
    "a finger missing": Broken(
        "motors 12 (th_cmc), 13 (th_axl), 14 (th_mcp), 15 (th_ipl): no answer",
        options=dict(ids=range(12))),
    "two motors with one id": Broken("two motors share an id", broken(id=5)),
    "factory id": Broken("motor 1 (if_mcp): garbled", broken(id=1)),
    "unknown id": Broken("motor 3 (if_dip): no answer", broken(id=23)),
    "dead motor": Broken("motor 9 (rf_mcp): no answer", lambda bus: bus.silence(9)),
    "wrong model": Broken("model number 1060", broken(model_number=1060)),
    "old firmware": Broken("firmware 40 is older", broken(firmware_version=40)),
    "position mode": remembers(
        "operating mode is 3, must be 5", every(operating_mode=3, current_limit=350)),
    "velocity mode": remembers(
        "operating mode is 1, must be 5", every(operating_mode=1, current_limit=350)),
    "return delay": Broken("return delay is 250, must be 0", answers="n\n"),
    "reversed": remembers("drive mode is 1, must be 0", broken(drive_mode=1)),
    "homing offset": remembers(
        "homing offset is 100, must be 0", every(homing_offset=100, operating_mode=5)),
    "current limit": remembers(
        "current limit is 900, must be 350", every(operating_mode=5, current_limit=900)),
    "shutdown disabled": remembers(
        "shutdown is 0, must be 53", every(operating_mode=5, shutdown=0)),
    "temperature limit": remembers(
        "temperature limit is 100", every(operating_mode=5, temperature_limit=100)),
    "torque at power-on": remembers(
        "startup is 1, must be 0", every(operating_mode=5, startup_configuration=1)),
    "shadow id": remembers(
        "secondary id is 40, must be 255", every(operating_mode=5, secondary_id=40)),
    "PWM limit": remembers(
        "PWM limit is 300, must be 885", every(operating_mode=5, pwm_limit=300)),
    "refused setting": Broken("motor 3 (if_dip) refuses operating mode 5 and keeps 3", refuses),
    "low voltage": Broken("supply at the motors is 3.8-3.8 V", options=dict(voltage=3.8)),
    "hardly any voltage": Broken(
        "input voltage after three reboots", options=dict(voltage=3.2)),
    "12 V supply": Broken("supply at the motors is 6.8-6.8 V", options=dict(voltage=6.8)),
    "hot": Broken("motor 3 (if_dip) is at 67 C", heated(67.0)),
    "too hot for the motor": Broken("overheating after three reboots", heated(90.0)),
    "broken encoder": Broken("encoder after three reboots", stays(8)),
    "electrical shock": Broken("electrical shock after three reboots", stays(16)),
    "lasting overload": Broken("overload after three reboots", stays(32)),
    "half of all packets lost": Broken("", lambda bus: bus.rate("drop", 0.5)),
    "joint beyond its limits": Broken(
        "motor 1 (if_mcp): reads -52 degrees", lambda bus: bus.push(1, -0.9), dict(stops=None)),
    "thumb turned by -90 degrees": Broken(
        "motor 12 (th_cmc): reads -90 degrees", lambda bus: bus.zero_offset(12, -1024)),
    "calibration is no JSON": Broken("broken calibration file", calibration("{offset")),
    "calibration is empty": Broken("broken calibration file", calibration("")),
    "calibration without offsets": Broken("broken calibration file", calibration("{}")),
    "calibration is a list": Broken("broken calibration file", calibration("[1, 2]")),
    "calibration lacks a joint": Broken(
        "broken calibration file (KeyError: 'if_mcp')", offsets(drop=1)),
    "calibration with words": Broken("broken calibration file", offsets("zero")),
    "calibration of another hand": Broken(
        "calibration is of another hand, leap-left", offsets(hand="leap-left")),
    "calibration with NaN": Broken("offsets beyond 0.2 rad", offsets(float("nan"))),
    "calibration far off": Broken("offsets beyond 0.2 rad", offsets(1.6)),
    "calibration is a folder": Broken(
        "broken calibration file", lambda tmp_path: (tmp_path / "calibration.json").mkdir()),
    # in the middle of the movements; what only they show is in test_check.py
    "overload while moving": Broken(
        "motor 4 (mf_rot) shut down: overload", late(lambda bus: bus.overload(4))),
    "cable comes loose": Broken(
        "motor 4 (mf_rot): no answer", late(lambda bus: bus.silence(4))),
    "unplugged while moving": Broken("is gone", late(lambda bus: bus.unplug(), 190)),
}


def run_broken(name, folder):
    case, of_a_file = BROKEN[name], name.startswith("calibration")
    folder.mkdir()
    with new_bus(**case.options) as bus:
        if case.spoil:
            case.spoil(folder if of_a_file else bus)
        result = check(bus, folder, case.answers)
        wrote = not of_a_file and (folder / "calibration.json").is_file()
        return *result, driving(bus), wrote


@pytest.fixture(scope="module")
def broken_results(tmp_path_factory):
    """All of them, a few at a time (they mostly wait for fingers to move), each bus in a process of
    its own."""
    folder = tmp_path_factory.mktemp("broken")
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("fork")) as pool:
        results = {name: pool.submit(run_broken, name, folder / str(k))
                   for k, name in enumerate(BROKEN)}
        return {name: future.result() for name, future in results.items()}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_setup_gives_one_clear_line_and_exit_2(name, broken_results):
    status, out, errors, still_driving, wrote = broken_results[name]
    assert status == 2, (out, errors)
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert BROKEN[name].words in errors
    assert not wrote
    assert not still_driving or name in ("unplugged while moving", "cable comes loose")


@pytest.mark.parametrize("path, words", [
    ("/dev/ttyUSB-none", "is the U2D2 plugged in"), ("/dev/null", "not a working serial device"),
    ("/tmp", "not a working serial device"), (__file__, "not a working serial device"),
    ("auto", "no U2D2 found"), ("", "is not there")])
def test_a_broken_port_gives_one_clear_line_and_exit_2(path, words, tmp_path):
    status, _, errors = check(path, tmp_path)
    assert status == 2 and words in errors and errors.count("\n") == 1, errors


def test_a_port_in_use(bus, hand, tmp_path):
    status, _, errors = check(bus, tmp_path)
    assert status == 2 and "in use" in errors and errors.count("\n") == 1


def test_a_port_without_permission(bus):
    lines = f"""if True:
        import os, sys
        sys.path.insert(0, {str(ROOT)!r})
        import dynamixel_sdk, termios                    # while the interpreter may be read
        import hand
        os.chmod({os.path.realpath(bus.path)!r}, 0)
        if os.geteuid() == 0:                            # root may open everything
            os.setgroups([]), os.setgid(65534), os.setuid(65534)
        hand.run(lambda: hand.DynamixelHand({os.path.realpath(bus.path)!r}))"""
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert done.returncode == 2 and "dialout" in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


def test_two_adapters_and_a_stable_name(monkeypatch, tmp_path):
    class Port:
        vid, pid = 0x0403, 0x6014

        def __init__(self, device):
            self.device = device
    ports = [Port(str(tmp_path / "ttyUSB0")), Port(str(tmp_path / "ttyUSB1"))]
    (tmp_path / "by-id").mkdir()
    (tmp_path / "ttyUSB0").touch()
    (tmp_path / "by-id/usb-FTDI_one").symlink_to(tmp_path / "ttyUSB0")
    monkeypatch.setattr(H, "BY_ID", str(tmp_path / "by-id"))
    monkeypatch.setattr(serial.tools.list_ports, "comports", lambda: ports)
    with pytest.raises(H.Problem, match="2 adapters found"):
        H.find_port()
    del ports[1]
    assert H.find_port().endswith("by-id/usb-FTDI_one")
    del ports[0]
    assert H.find_port() is None


def test_plugged_in_again_under_another_name(bus, monkeypatch, tmp_path):
    """ttyUSB0 came back as ttyUSB1; /dev/serial/by-id still knows it."""
    (tmp_path / "usb-FTDI").symlink_to(bus.path)
    monkeypatch.setattr(H, "BY_ID", str(tmp_path))
    first = os.path.realpath(bus.path)
    with DynamixelHand(first, NO_FILE) as hand:
        bus.unplug()
        with pytest.raises(H.BusError, match="is gone"):
            hand.read()
        other = os.openpty()                             # somebody else takes the old name
        bus.plug()
        assert os.path.realpath(bus.path) != first
        hand.reconnect(patience=5)
        hand.read()
        for end in other:
            os.close(end)


# ---------------------------------------------------------------------------- the stages on the bus
def whole_and_safe(path, bus):
    """A trajectory of 20 s at 20 Hz that the fingers followed within the limits, and a hand that
    has let go."""
    with np.load(path) as shard:
        q, target, times = shard["q"], shard["target"], shard["time"]
    assert q.shape == target.shape == (400, 16) and np.isfinite(q).all()
    assert abs(np.median(np.diff(times)) - 0.05) < 0.005 and np.diff(times).min() > 0
    assert np.median(np.abs(target - q)) < 0.1
    assert (target >= H.LOW - 1e-6).all() and (target <= H.HIGH + 1e-6).all()
    assert bus.stats["goals_outside_limits"] == 0
    assert not driving(bus)


def test_collect_goes_on_when_the_adapter_is_unplugged(bus, toy_policy, tmp_path):
    process = start("collect.py", "--hours", 1 / 180, "--port", bus.path, "--source", "waves",
                    "--policy", toy_policy, "--out", tmp_path)
    begin = time.monotonic()
    while bus.stats["goal_writes"] < 60 and time.monotonic() - begin < 60:
        time.sleep(0.05)
    bus.unplug()
    time.sleep(1.0)
    bus.plug()
    status, out, errors = finish(process)
    assert status == 0 and "1 trajectories" in out, (out, errors)
    log = (tmp_path / "log.txt").read_text()
    for words in ("trajectory 0 lost", "is gone", "connected again", "end: 1 trajectories"):
        assert words in log
    whole_and_safe(tmp_path / "00000.npz", bus)


def test_deploy_drives_the_hand_with_policy_and_residual(bus, toy_policy, tmp_path):
    torch.manual_seed(0)
    residual = fit_ndm.Residual()
    torch.nn.init.normal_(residual.net[-1].weight, std=0.05)
    train_policy.save_checkpoint(tmp_path / "residual.pt", "residual", config=residual.config,
                                 weights=residual.state_dict())
    status, out, errors = finish(start(
        "deploy.py", "--port", bus.path, "--policy", toy_policy,
        "--residual", tmp_path / "residual.pt", "--wrist", "palm_up", "--axis=+z",
        "--episodes", 1, "--record", tmp_path))
    assert status == 0 and "episode 1: 400 steps" in out, (out, errors)
    whole_and_safe(tmp_path / "00000.npz", bus)
    # the policy holds still: what moves is the correction, within its bound
    with np.load(tmp_path / "00000.npz") as shard:
        assert 0.001 < np.abs(shard["target"] - H.GRASP).max() <= fit_ndm.BOUND + 1e-6


@pytest.mark.parametrize("goes_on", [True, False])
def test_deploy_lets_go_at_a_fault_and_offers_to_go_on(goes_on, toy_policy, monkeypatch, capsys):
    """In the middle of an episode, in simulated time: `prompts` has what was asked, and whether
    there was torque then."""
    bus = PhysicalBus(Clock(), wrist=None, limits=LIMITS, stops=LIMITS)
    prompts, calls, answers = [], [], ["", "", ""] if goes_on else ["", "q"]

    def act(controller, q, act=deploy.Controller.__call__):
        calls.append(driving(bus))
        if len(calls) == 100:
            bus.overload(6)
        return act(controller, q)

    def answer(prompt):
        prompts.append((prompt.split(":")[0], driving(bus)))
        return answers.pop(0)

    monkeypatch.setattr(deploy.Controller, "__call__", act)
    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "argv", [
        "deploy.py", "--base", "--port", bus.path, "--policy", str(toy_policy),
        "--wrist", "palm_up", "--axis=+z", "--episodes", "1"])
    with in_process(bus):
        deploy.main()
    out = capsys.readouterr().out
    lost = "episode 1 is lost: motor 6 (mf_pip) shut down: overload; the hand has let go\n"
    assert lost in out and ("episode 1: 400 steps" in out) == goes_on
    asked = [("episode 1/1", False), ("mend that, then Enter; q to stop", False)]
    assert prompts == asked + asked[:goes_on] and not answers
    assert all(calls[:99]) and not driving(bus) and bus.stats["goals_outside_limits"] == 0
