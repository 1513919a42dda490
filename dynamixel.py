"""The real hand: Dynamixel X330 motors behind a U2D2, driven so that it can be left alone overnight.

    with DynamixelHand("/dev/ttyUSB0") as hand: ...        # or open_hand() of hand.py

What it answers for: a reading is of this moment or there is none; a goal is inside the limits; torque goes off by every door,
also when this process is killed or frozen (`guard`); what can be mended (reboot, heat, unplugged adapter) `reconnect` mends.
"""
import errno
import glob
import inspect
import json
import os
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import numpy as np
from dynamixel_sdk import PortHandler, Protocol2PacketHandler
from serial.tools import list_ports

from hand import (CURRENT_LIMIT, D_GAIN, HAND, HIGH, JOINTS, LOW, MODELS, MOTOR_ID, P_GAIN, SIGN, ZERO, BusError, Hand, N,
                  Problem, Reading)

# Control table, units and shutdown behaviour: ROBOTIS e-manual, XL330-M288 and XC330-M288; Protocol 2.0.
BAUD = 4_000_000
COUNT = 2 * np.pi / 4096                         # rad, unit of position
RPM = 0.229 * 2 * np.pi / 60                     # rad/s, unit of velocity
EEPROM = {                                       # what a motor must remember: name -> address, bytes, value
    "return delay": (9, 1, 0), "drive mode": (10, 1, 0), "operating mode": (11, 1, 5), "secondary id": (12, 1, 255),
    "homing offset": (20, 4, 0), "temperature limit": (31, 1, 70), "PWM limit": (36, 2, 885), "startup": (60, 1, 0),
    "shutdown": (63, 1, 53)}                     # and current limit (38, 2), by model
RAM = {                                          # set at every start and after every reboot
    "bus watchdog": (98, 1, 0), "I gain": (82, 2, 0), "D gain": (80, 2, D_GAIN), "P gain": (84, 2, P_GAIN),
    "feedforward": (88, 4, 0), "goal PWM": (100, 2, 885), "acceleration": (108, 4, 0), "velocity": (112, 4, 0)}
ERRORS = {0: "input voltage", 2: "overheating", 3: "encoder", 4: "electrical shock", 5: "overload"}   # bits of address 70
FIRMWARE = 45                                    # older X330 firmware is untested
TRIES = 6                                        # of a packet, before BusError
ANSWER = 0.012                                   # s, until an answer counts as lost; the motors themselves take 1-2 ms
SILENCE = 0.15                                   # s without a sign of life until the guardian switches torque off
WATCHDOG = 10                                    # x 20 ms: the same in the motors, where their firmware does not ignore it
REST_ABOVE, REST_UNTIL = 65, 55                  # C; the motors shut down at 70
VOLTAGE = 4.0, 6.0                               # V, at the motors
SLACK = 0.2                                      # rad outside the limits that a joint may read before anything is wrong
MAX_FAULTS = 8, 300                              # stop after this many shutdowns of motors within so many seconds
BY_ID = "/dev/serial/by-id"
LATENCY = "/sys/bus/usb-serial/devices/{}/latency_timer"
CALIBRATION = Path(__file__).with_name("calibration.json")


def find_port():
    """The serial device of a U2D2 (FTDI FT232H), by its stable name where there is one; None without."""
    found = sorted({p.device for p in list_ports.comports() if (p.vid, p.pid) == (0x0403, 0x6014)})
    if len(found) > 1:
        raise Problem(f"{len(found)} adapters found ({', '.join(map(stable_name, found))}): choose one with --port")
    return stable_name(found[0]) if found else None


def stable_name(path):
    """/dev/serial/by-id/... of a device: ttyUSB0 may come back as ttyUSB1 after replugging."""
    real = os.path.realpath(path)
    return next((link for link in sorted(glob.glob(f"{BY_ID}/*")) if os.path.realpath(link) == real), path)


def load_calibration(path=CALIBRATION):
    """Zero offsets (16,) rad of this hand, as `hand.py --check` found them; zeros if it never ran."""
    advice = f"{path}: delete it and run `python hand.py --check`"
    try:
        data = json.loads(Path(path).read_text())
        offset = np.array([data["offset"][j.name] for j in JOINTS], float)
    except FileNotFoundError:
        return np.zeros(N)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Problem(f"broken calibration file ({type(error).__name__}: {error}) {advice}")
    if data.get("hand") != HAND:
        raise Problem(f"calibration is of another hand ({data.get('hand')}, not {HAND}) {advice}")
    if not np.isfinite(offset).all() or np.abs(offset).max() > SLACK:
        raise Problem(f"calibration has offsets beyond {SLACK} rad, so a horn is mounted wrongly {advice}")
    return offset


def guard(port, silence, off):
    """Body of the guardian, a process of its own: its stdin gets a byte with every packet of the driver. When that pipe
    closes (the driver let go, ended or was killed) or stays silent (it hangs or was frozen), torque off, ten times in
    case packets are lost. X330 firmware is known to report a bus watchdog and keep driving, so the motors' own is not enough."""
    import os, select, signal, time
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(s, signal.SIG_IGN)
    os.write(1, b"!")
    while select.select([0], [], [], silence)[0] and os.read(0, 65536):
        pass
    os.close(0)             # from here on the driver's next sign of life fails, and tells it
    for _ in range(10):
        try:
            os.write(port, off)
        except OSError:     # adapter unplugged
            pass
        time.sleep(0.008)


def motors(ids):
    """'motor 5 (mf_mcp)', for messages."""
    ids = list(ids)
    names = [f"{i} ({JOINTS[MOTOR_ID.index(i)].name})" for i in ids[:4]]
    return ("motor " if len(ids) == 1 else "motors ") + ", ".join(names) + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")


class DynamixelHand(Hand):
    """A LEAP Hand behind a U2D2: `port` is a device path, or "auto" to look for it. `log(text)` hears of every event.

    Opening checks everything from the cable to the joint angles and moves nothing. The first command switches torque on
    at the present pose and starts the guardian; torque goes off with rest(), close(), the end of the `with` block or of the process,
    whichever way it ends, with any BusError, and when the caller is silent for SILENCE s."""

    def __init__(self, port="auto", calibration=CALIBRATION, log=None, agree=lambda text: True, passed=lambda line: None):
        super().__init__()
        self.name, self.log = port, log
        self.offset = load_calibration(calibration)
        self.packet, self.port, self.guardian = Protocol2PacketHandler(), None, None
        self.fast, self.next_health, self.hot = False, 0.0, REST_ABOVE
        self.voltage, self.temperature = np.full(N, np.nan), np.full(N, np.nan)     # V, C: last health()
        edge = (ZERO + self.offset + SIGN * np.array([LOW, HIGH])) / COUNT
        self.lowest, self.highest = np.ceil(edge.min(0)), np.floor(edge.max(0))     # counts, the limits once more
        ids = bytes(byte for i in MOTOR_ID for byte in (i, 0))
        off = b"\xff\xff\xfd\x00\xfe" + (7 + len(ids)).to_bytes(2, "little") + b"\x83\x40\x00\x01\x00" + ids
        self.off = off + self.packet.updateCRC(0, off, len(off)).to_bytes(2, "little")     # sync write: torque off
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))                # so that `with` and `finally` run
        try:
            for line in self.bring_up(agree):
                passed(line)
        except BaseException:
            self.close()
            raise

    # ---- the bus
    def _open(self):
        """Open the port for this process alone, at BAUD."""
        self._close_port()
        self.path = find_port() if self.name == "auto" else stable_name(self.name)
        if self.path is None:
            raise Problem("no U2D2 found: plug it in, or name the device with --port")
        patience = time.monotonic() + 1.0                # a guardian of a killed run holds the port for a moment
        while True:
            try:
                self.port = PortHandler(self.path)
                self.port.setBaudRate(BAUD)
                self.port.ser.exclusive = True
                self.port.ser.timeout, self.port.ser.write_timeout = 0.001, 1.0     # wait for bytes, do not spin
                break
            except (OSError, termios.error, ValueError) as error:
                self._close_port()
                code = getattr(error, "errno", None)
                if code in (errno.EBUSY, errno.EAGAIN) and time.monotonic() < patience:
                    time.sleep(0.05)
                    continue
                raise Problem({
                    errno.ENOENT: f"no port {self.path}: is the U2D2 plugged in? Serial devices here: "
                                  f"{', '.join(sorted(glob.glob(f'{BY_ID}/*'))) or 'none'}",
                    errno.EACCES: f"no permission for {self.path}: `sudo usermod -aG dialout $USER`, then log in again",
                    errno.EBUSY: f"{self.path} is in use: close the other program (another run, Dynamixel Wizard)",
                    errno.EAGAIN: f"{self.path} is in use: close the other program (another run, Dynamixel Wizard)",
                }.get(code, f"{self.path} is not a working serial device: {error}"))
        try:
            self.port.ser.set_low_latency_mode(True)     # FTDI: latency timer 1 ms; not every device knows it
        except (OSError, ValueError, AttributeError):
            pass

    def _close_port(self):
        try:
            if self.port is not None and self.port.ser is not None:
                self.port.ser.close()
        except (OSError, termios.error):
            pass
        self.port = None

    def _sdk(self, call, *args):
        """One call of the SDK. A port that is gone becomes a BusError; the SDK's busy flag never stays behind."""
        if self.port is None:
            raise BusError(f"{self.name} is closed")
        try:
            return call(self.port, *args)
        except (OSError, termios.error) as error:        # pyserial's own errors are OSErrors
            self._fail("unplugged", f"{self.path} is gone ({error}): plug the adapter in again")
        finally:
            if self.port is not None:
                self.port.is_using = False

    def _beat(self):
        """A sign of life for the guardian, with every packet; so a loop that hangs is noticed as well as a dead process."""
        if self.guardian is not None:
            try:
                os.write(self.guardian.stdin.fileno(), b".")
            except OSError:
                self._fail("guardian", f"no sign of life for {SILENCE} s (paused, frozen or too slow), so the guardian switched "
                                       "torque off")

    def _tell(self, address, size, values, ids=MOTOR_ID):
        """Sync write, which no motor answers. values: integers, one or one per motor."""
        param = []
        for i, value in zip(ids, np.broadcast_to(values, len(ids))):
            param += [i, *(int(value) % (1 << 8 * size)).to_bytes(size, "little")]
        self._beat()
        self._sdk(self.packet.syncWriteTxOnly, address, size, param, len(param))

    def _ask(self, address, size, ids=MOTOR_ID):
        """Sync read: (len(ids), size) uint8, this moment's answer of every motor, or BusError.

        First one fast sync read for all; what it leaves open is asked for again by ordinary ones. Built on the SDK's packets, not
        its GroupSyncRead, which neither checks an answer's length nor hands on the alert bit."""
        answers, alert = {}, False
        for attempt in range(TRIES):
            missing = [i for i in ids if i not in answers]
            fast = self.fast and attempt == 0 and len(ids) > 1
            self._beat()
            self._sdk(self.packet.syncReadTx, address, size, missing, len(missing), fast)
            wire = len(missing) * ((size + 11) * 10 / BAUD + (0.0 if self.fast else 5e-4))     # 0.5 ms: factory return delay
            self.port.setPacketTimeoutMillis(1e3 * (ANSWER * 1.5 ** attempt + wire))     # more patience each time: 0.25 s in all
            if fast:                                     # one long packet: 8 bytes, then error, id, data, CRC of each motor
                raw, result = self._sdk(self.packet.rxPacket, True)
                if result == 0 and raw[4] == 0xFE and len(raw) == 8 + len(missing) * (size + 4):
                    pieces = np.array(raw[8:], np.uint8).reshape(len(missing), size + 4)
                    alert |= bool((pieces[:, 0] & 0x80).any())
                    answers = {int(p[1]): p[2:2 + size] for p in pieces}
            else:                                        # one packet each, in the order asked; out of order means an old answer
                turn = 0
                while turn < len(missing):
                    raw, result = self._sdk(self.packet.rxPacket, False)
                    if result == 0 and raw[4] in missing[turn:] and len(raw) == 11 + size:
                        answers[raw[4]] = np.array(raw[9:9 + size], np.uint8)
                        alert |= bool(raw[8] & 0x80)
                        turn = missing.index(raw[4]) + 1
                    elif result == 0 and raw[4] in answers and list(answers[raw[4]]) != raw[9:9 + size]:
                        answers = {}                     # two different answers of one motor: one of them is old, trust none
                        break
                    elif result == -3001 or self.port.isPacketTimeout():
                        break
            if set(ids) <= answers.keys() and (attempt == 0 or not self._drain()):
                if alert:
                    self.next_health = 0.0               # a motor is in error: look at once
                return np.stack([answers[i] for i in ids])
            if set(ids) <= answers.keys() or self._drain():
                answers = {}                             # there was more than was asked for, so some of it may be old
        lost = [i for i in ids if i not in answers]
        self._let_go()                                   # at once; then see who it is
        silent = [i for i in lost if self._ping(i, 3) is None] or lost
        self._fail("silent", f"{motors(silent)} {'do' if len(silent) > 1 else 'does'} not answer: check cables and supply")

    def _drain(self):
        """Drop what still comes in, for the next packet read must be the answer to the next question. Was there anything?"""
        until, dropped = time.monotonic() + 0.02, False
        while time.monotonic() < until and self._sdk(lambda port: port.ser.read(1024)):
            dropped = True
        return dropped

    def _set(self, address, size, values, ids=MOTOR_ID, name="a setting"):
        """Write and read back until it is so, or BusError."""
        want = np.broadcast_to(values, len(ids)).astype(np.int64) % (1 << 8 * size)
        for _ in range(TRIES):
            self._tell(address, size, values, ids)
            got = _integers(self._ask(address, size, ids), 0, size) % (1 << 8 * size)
            if (got == want).all():
                return
        wrong = int(np.argmax(got != want))
        self._fail("refused", f"{motors([ids[wrong]])} refuses {name} {want[wrong]} and keeps {got[wrong]}")

    def _ping(self, i, tries=TRIES):
        """Model number, 0 for garbled answers, None for none."""
        garbled = False
        for _ in range(tries):
            self._beat()
            model, result, error = self._sdk(self.packet.ping, i)
            if result == 0 and not error & 0x7F:         # 3: the motor got a broken packet, and the answer holds no model
                return model
            garbled |= result == -3002
        return 0 if garbled else None

    # ---- events and letting go
    def _note(self, kind, text):
        self.events.append((time.time(), kind, text))
        if self.log:
            self.log(f"{kind}: {text}")

    def _fail(self, kind, text):
        """Let go, note what happened, raise: BusError, or Problem when motors shut down again and again."""
        self._let_go()
        self._note(kind, text)
        recent = [k for t, k, _ in self.events if k in ERRORS.values() and time.time() - t < MAX_FAULTS[1]]
        if len(recent) >= MAX_FAULTS[0] and kind in ERRORS.values():
            counts = ", ".join(f"{recent.count(k)} x {k}" for k in sorted(set(recent)))
            raise Problem(f"stopped after {counts} within {MAX_FAULTS[1]} s; last: {text}. Let it cool, check load, supply and cables")
        raise BusError(f"{text}; the hand has let go")

    def _let_go(self):
        """Torque off, in whatever state we are: the guardian does it as soon as its pipe closes, and we once more after it."""
        self.target = None
        guardian, self.guardian = self.guardian, None
        if guardian is not None:
            guardian.stdin.close()
            try:
                guardian.wait(1.0)
            except subprocess.TimeoutExpired:
                guardian.kill()
            guardian.stdout.close()
        try:
            if self.port is not None:
                for _ in range(3):
                    self.port.ser.write(self.off)
        except (OSError, termios.error):
            pass

    def rest(self):
        self._let_go()
        if (self._ask(64, 1) != 0).any():
            self._set(64, 1, 0, name="torque")

    def close(self):
        try:
            self._let_go()
        finally:
            self._close_port()

    def reconnect(self, patience=600):
        """After a BusError: find the adapter again, reboot motors in error, restore their settings, wait until they are cool. Tries
        again after 0.2 s, doubling to 5 s; Problem when `patience` (s) ends."""
        self._let_go()
        wait, until = 0.2, time.monotonic() + patience
        while True:
            try:
                for _ in self.bring_up():
                    pass
                return self._note("ready", "connected again")
            except Problem as problem:
                if time.monotonic() + wait > until:
                    raise Problem(f"gave up after {patience:g} s: {problem}") from None
            time.sleep(wait)
            wait = min(2 * wait, 5.0)

    # ---- from the cable to a hand that can be moved
    def bring_up(self, agree=lambda text: True):
        """Yields a line for each check that passes; the first that fails raises Problem and says what to do. Moves nothing.
        `agree(text)` is asked before the motors' permanent settings are changed."""
        self._open()
        yield f"port         {self.path}"
        latency = Path(LATENCY.format(os.path.basename(os.path.realpath(self.path))))
        if latency.exists() and int(latency.read_text()) > 1:
            raise Problem(f"latency timer is {latency.read_text().strip()} ms, every read waits for it: `echo 1 | sudo tee {latency}`")
        yield "latency      1 ms" if latency.exists() else "latency      no timer on this device"
        self._tell(64, 1, 0)                             # let go, whoever drove before
        self._tell(68, 1, 2)                             # answer to everything
        models = self._find_motors()
        yield f"motors       16 of 16: {', '.join(f'{models.count(m)} x {name}' for m, name in MODELS.items() if m in models)}"
        self.fast = any(self._fast_works() for _ in range(TRIES))
        table = self._ask(0, 64)
        old = [(i, f) for i, f in zip(MOTOR_ID, table[:, 6]) if f < FIRMWARE]
        if old:
            raise Problem(f"{motors(i for i, _ in old)}: firmware {old[0][1]} is older than {FIRMWARE}: update it with "
                          "Dynamixel Wizard")
        yield f"firmware     {', '.join(map(str, sorted(set(table[:, 6]))))}; {'fast' if self.fast else 'ordinary'} sync read"
        self._reboot_if_in_error()
        milliamps = np.rint([1000 * CURRENT_LIMIT[m] for m in models]).astype(int)
        for name, (address, size, value) in (EEPROM | {"current limit": (38, 2, milliamps)}).items():
            now = _integers(table, address, size) % (1 << 8 * size)
            wrong = np.flatnonzero(now != value)
            if len(wrong):
                want = np.broadcast_to(value, N)[wrong[0]]
                text = f"{motors(MOTOR_ID[k] for k in wrong)}: {name} is {now[wrong[0]]}, must be {want}"
                if not agree(text):
                    raise Problem(f"{text}: answer yes to have it set")
                self._set(address, size, value, name=name)
                self._note("setting", text + ": set")
        for name, (address, size, value) in (RAM | {"goal current": (102, 2, milliamps)}).items():
            self._set(address, size, value, name=name)
        yield "settings     operating mode 5, return delay 0, gains and current limits of the table"
        self.health()
        yield (f"power        {self.voltage.min():.1f}-{self.voltage.max():.1f} V, {self.temperature.min():.0f}-"
               f"{self.temperature.max():.0f} C, no error flags")
        q = self.read().q
        outside = np.flatnonzero((q < LOW - SLACK) | (q > HIGH + SLACK))
        if len(outside):
            j = outside[0]
            raise Problem(f"{motors(MOTOR_ID[k] for k in outside)}: reads {np.rad2deg(q[j]):.0f} degrees, limits are "
                          f"{np.rad2deg(LOW[j]):.0f} to {np.rad2deg(HIGH[j]):.0f}: horn or motor mounted wrongly, or ids swapped; "
                          "a flat open hand must read 0")
        yield "joints       all within their limits"
        self.hot = REST_ABOVE

    def _find_motors(self):
        """Model numbers in joint order; Problem when any is missing, doubled or unknown."""
        models = [self._ping(i) for i in MOTOR_ID]
        silent = [i for i, m in zip(MOTOR_ID, models) if m is None]
        garbled = [i for i, m in zip(MOTOR_ID, models) if m == 0]
        if garbled:
            raise Problem(f"{motors(garbled)}: garbled answers, as when two motors share an id" + (
                f" (and {motors(silent)} missing)" if silent else "") + ": connect one at a time and set ids with Dynamixel Wizard")
        if len(silent) == N:
            for baud in (57_600, 1_000_000, 2_000_000, 3_000_000, 115_200):
                self._sdk(lambda port: port.setBaudRate(baud))
                if any(self._sdk(self.packet.ping, i)[1] == 0 for i in (*range(4), *range(4))):
                    raise Problem(f"the motors talk at {baud} baud: set them to {BAUD} (baud rate 6) with Dynamixel Wizard")
            raise Problem("no motor answers at any baud rate: is the 5 V supply on, and the cable in the U2D2's TTL socket?")
        if silent:
            strangers = [i for i in range(31) if i not in MOTOR_ID and self._sdk(self.packet.ping, i)[1] == 0]
            raise Problem(f"{motors(silent)} missing" + (f", but there is a motor with id {strangers[0]}: set its id" if strangers else
                          f": check the cable that leads to it, and its id") + " with Dynamixel Wizard")
        unknown = [i for i, m in zip(MOTOR_ID, models) if m not in MODELS]
        if unknown:
            raise Problem(f"{motors(unknown)}: model number {models[MOTOR_ID.index(unknown[0])]} is not an {' or '.join(MODELS.values())}")
        return models

    def _fast_works(self):
        self._sdk(self.packet.syncReadTx, 0, 2, MOTOR_ID, N, True)
        raw, result = self._sdk(self.packet.rxPacket, True)
        return result == 0 and len(raw) == 8 + N * 6

    def _reboot_if_in_error(self):
        """Only a reboot brings back a motor that has shut down. It forgets its RAM, which bring_up restores."""
        for attempt in range(3):
            flags = self._ask(70, 1)[:, 0]
            sick = [i for i, f in zip(MOTOR_ID, flags) if f]
            if not sick:
                return
            self._note("reboot", f"{motors(sick)}: {_error_names(flags)}")
            for i in sick:
                self._sdk(self.packet.reboot, i)
            until = time.monotonic() + 2.0
            while any(self._sdk(self.packet.ping, i)[1] for i in sick) and time.monotonic() < until:
                pass
        raise Problem(f"{motors(sick)} still {'report' if len(sick) > 1 else 'reports'} {_error_names(flags)} after three reboots: "
                      "check supply, load and cable, or replace it")

    # ---- moving
    def health(self):
        """Torque, error flags, voltage and temperature of every motor. read() asks once a second, and at once when a motor raises its
        alert bit. Lets go and raises when one is not well; reconnect() mends what can be mended."""
        self.next_health = time.monotonic() + 1.0
        status, power = self._ask(64, 7), self._ask(144, 3)
        flags = status[:, 6]
        self.voltage, self.temperature = 0.1 * _integers(power, 0, 2), power[:, 2].astype(float)
        sick = [i for i, f in zip(MOTOR_ID, flags) if f]
        if sick:
            self._fail(_error_names(flags).split(",")[0], f"{motors(sick)} shut down: {_error_names(flags)}")
        if self.temperature.max() >= self.hot:
            self.hot = REST_UNTIL
            hottest = int(self.temperature.argmax())
            self._fail("rest", f"{motors([MOTOR_ID[hottest]])} is at {self.temperature[hottest]:.0f} C: resting until it is below "
                               f"{REST_UNTIL} C")
        if self.guardian is not None and not status[:, 0].all():
            limp = [i for i, on in zip(MOTOR_ID, status[:, 0]) if not on]
            self._fail("torque", f"{motors(limp)} lost torque without an error, as after an interruption of the supply: check "
                                 "its plugs")
        if not VOLTAGE[0] <= self.voltage.min() <= self.voltage.max() <= VOLTAGE[1]:
            self._fail("input voltage", f"supply at the motors is {self.voltage.min():.1f}-{self.voltage.max():.1f} V, must be "
                                        f"{VOLTAGE[0]}-{VOLTAGE[1]} V: check supply and plugs")

    def read(self):
        if time.monotonic() >= self.next_health:
            self.health()
        before = time.monotonic()
        raw = self._ask(126, 10)                         # current, velocity, position
        after = time.monotonic()
        if self.next_health == 0.0:                      # alert bit: these motors have let go
            self.health()
        return Reading(SIGN * (_integers(raw, 6, 4) * COUNT - ZERO - self.offset), SIGN * _integers(raw, 2, 4) * RPM,
                       SIGN * _integers(raw, 0, 2) * 1e-3, (before + after) / 2)

    def _write(self, target):
        if self.guardian is None:
            self._engage()
        goal = np.rint((ZERO + self.offset + SIGN * target) / COUNT)
        self._tell(116, 4, np.clip(goal, self.lowest, self.highest))

    def _engage(self):
        """Torque on at the present pose, under guard. Raises with torque off if anything is not as it must be."""
        code = inspect.getsource(guard) + f"\nguard({self.port.ser.fileno()}, {SILENCE}, {self.off})"
        self.guardian = subprocess.Popen([sys.executable, "-ISc", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         bufsize=0, pass_fds=[self.port.ser.fileno()], start_new_session=True)
        os.set_blocking(self.guardian.stdin.fileno(), False)
        if not select.select([self.guardian.stdout], [], [], 5.0)[0] or self.guardian.stdout.read(1) != b"!":
            self._fail("guardian", "the guardian process did not start, and without it there is no torque")
        self._set(98, 1, 0, name="bus watchdog")         # one that has tripped refuses goals
        here = _integers(self._ask(132, 4), 0, 4)
        self._set(116, 4, np.clip(here, self.lowest, self.highest), name="goal position")
        self._set(98, 1, WATCHDOG, name="bus watchdog")
        self._set(64, 1, 1, name="torque")
        self._beat()                                     # frozen meanwhile? then the guardian is gone: let go again


def _integers(raw, start, size):
    """Little-endian signed integers (n,) int64 from the bytes start..start+size of each row."""
    return np.ascontiguousarray(raw[:, start:start + size]).view(f"<i{size}")[:, 0].astype(np.int64)


def _error_names(flags):
    """Hardware error bits (n,) in words."""
    every = int(np.bitwise_or.reduce(flags))
    return ", ".join(name for bit, name in ERRORS.items() if every >> bit & 1) or f"error {every}"
