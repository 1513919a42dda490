"""The hand: one table of everything about it, and one small interface to it, real or virtual.

    python hand.py --check --port /dev/ttyUSB0     # walk from the cable to a working hand

    with open_hand("auto") as hand:                # or "sim", "sim:7", "/dev/ttyUSB0"
        q, dq, current, time = hand.read()         # rad, rad/s, A, s   (each array: (16,))
        hand.command(target)                       # rad, passes the joint limits and MAX_STEP

A fork for another hand replaces the table below and, if its motors are no Dynamixels, `DynamixelHand`.
"""
import argparse
import contextlib
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
from typing import NamedTuple

import numpy as np
from dynamixel_sdk import PortHandler, Protocol2PacketHandler
from serial.tools import list_ports

# ---------------------------------------------------------------------------------------------- the table
# Kinematics, masses and limits: LEAP Hand (right) as published with its URDF. SI units, quaternions w x y z,
# link frames relative to the parent's. Every joint turns about -z of its link; positive closes the finger.
# Collision shapes are our own: capsules ("capsule", from, to, radius), spheres ("sphere", centre, radius) and
# boxes ("box", centre, half sizes). Few and round, because a contact costs more than anything else in a step.


class Joint(NamedTuple):
    name: str
    motor_id: int
    low: float          # rad, mechanical limit
    high: float         # rad
    grasp: float        # rad, canonical grasp for rotation
    p_gain: int         # firmware position P gain (address 84)


class Link(NamedTuple):
    name: str
    parent: str | None
    pos: tuple          # m
    quat: tuple
    mass: float         # kg
    com: tuple          # m
    inertia_quat: tuple
    inertia: tuple      # kg m^2, principal
    joint: Joint | None
    shapes: tuple


def _finger(prefix, base, motor, grasp):
    """Four links of one of the three equal fingers: base bracket, proximal, medial, distal."""
    bs, px, md, ds = (f"{prefix}_{part}" for part in ("bs", "px", "md", "ds"))
    mcp, rot, pip, dip = grasp
    return (
        Link(bs, "palm", base, (0.500003, 0.5, 0.5, -0.499997),
             0.044, (-0.022516, 0.033882, 0.016359), (0.388092, 0.677951, -0.247713, 0.573067),
             (1.74972e-05, 1.61504e-05, 7.21342e-06), Joint(f"{prefix}_mcp", motor + 1, -0.314, 2.23, mcp, 800),
             (("capsule", (-0.0265, 0.028, 0.015), (-0.0265, 0.05, 0.015), 0.013),)),
        Link(px, bs, (-0.0122, 0.0381, 0.0145), (0.500003, -0.5, -0.499997, 0.5),
             0.032, (0.0075, -0.0002, -0.011), (0, 0.707107, 0, 0.707107),
             (4.8853e-06, 4.3733e-06, 3.0933e-06), Joint(f"{prefix}_rot", motor + 0, -1.047, 1.047, rot, 600),
             (("capsule", (-0.002, 0, -0.0115), (0.014, 0, -0.0115), 0.012),)),
        Link(md, px, (0.015, 0.0143, -0.013), (0.500003, 0.5, -0.5, 0.499997),
             0.037, (0.005422, -0.029148, 0.015), (0.687228, 0.687228, 0.166487, 0.166487),
             (8.28004e-06, 8.1598e-06, 5.39516e-06), Joint(f"{prefix}_pip", motor + 2, -0.506, 1.885, pip, 800),
             (("capsule", (0.003, -0.012, 0.015), (0.004, -0.036, 0.015), 0.0115),)),
        Link(ds, md, (0, -0.0361, 0.0002), (1, 0, 0, 0),
             0.016, (-0.000879, -0.027019, 0.014594), (0.702905, 0.710643, -0.021294, -0.02142),
             (3.71863e-06, 3.02396e-06, 1.6518e-06), Joint(f"{prefix}_dip", motor + 3, -0.366, 2.042, dip, 800),
             (("capsule", (0, -0.008, 0.0145), (-0.001, -0.024, 0.0145), 0.0095),
              ("sphere", (-0.0013, -0.0336, 0.0145), 0.0125))),
    )


HAND = "leap-right"                              # written into every file; a file of another hand is refused
LINKS = (
    Link("palm", None, (0, 0, 0), (0, 1, 0, 0),  # turned so that z of the world points out of the palm, x along the fingers
         0.237, (-0.049542, -0.042914, -0.010227), (0.565586, 0.427629, -0.574956, 0.408254),
         (0.000407345, 0.000304759, 0.000180736), None,
         (("box", (-0.040, -0.035, -0.0095), (0.020, 0.060, 0.024)),
          ("box", (-0.078, -0.040, -0.0115), (0.022, 0.040, 0.022)))),
    *_finger("if", (-0.007, 0.023, -0.0187), 0, (1.244, 0.082, 0.265, 0.298)),
    *_finger("mf", (-0.0071, -0.0224, -0.0187), 4, (1.096, 0.005, 0.080, 0.150)),
    *_finger("rf", (-0.00709, -0.0678, -0.0187), 8, (1.337, 0.029, 0.285, 0.317)),
    Link("th_mp", "palm", (-0.0693, -0.0012, -0.0216), (0.707109, 0, 0.707105, 0),
         0.032, (0.0075, -0.0002, -0.011), (0, 0.707107, 0, 0.707107),
         (4.8853e-06, 4.3733e-06, 3.0933e-06), Joint("th_cmc", 12, -0.349, 2.094, 1.163, 800), ()),
    Link("th_bs", "th_mp", (0, 0.0143, -0.013), (0.500003, 0.5, -0.5, 0.499997),
         0.003, (0, 0, -0.007081), (0.707107, 0.707107, 0, 0),
         (6.1932e-07, 5.351e-07, 2.1516e-07), Joint("th_axl", 13, -0.349, 2.094, 1.104, 800), ()),
    Link("th_px", "th_bs", (0, 0.0145, -0.017), (0.707109, -0.707105, 0, 0),
         0.038, (-0.002059, 0.015912, -0.013733), (0.698518, 0.697382, -0.104933, 0.121324),
         (9.87104e-06, 9.32653e-06, 4.36203e-06), Joint("th_mcp", 14, -0.47, 2.443, 0.953, 800),
         (("capsule", (0, 0.012, -0.0145), (0, 0.040, -0.0145), 0.0125),)),
    Link("th_ds", "th_px", (0, 0.0466, 0.0002), (1e-06, 0, 0, 1),
         0.049, (0.000962, -0.024203, -0.014419), (0.35287, 0.311272, -0.632839, 0.614904),
         (2.08591e-05, 2.0402e-05, 4.71335e-06), Joint("th_ipl", 15, -1.34, 1.88, -0.138, 800),
         (("capsule", (0, -0.008, -0.0145), (-0.001, -0.036, -0.0145), 0.0105),
          ("sphere", (-0.0013, -0.0456, -0.0145), 0.0125))),
)
TIPS = ("if_ds", "mf_ds", "rf_ds", "th_ds")      # the sphere of each of these is a fingertip

JOINTS = tuple(link.joint for link in LINKS if link.joint)        # order of every (16,) array: mcp rot pip dip per finger, thumb
N = len(JOINTS)
LOW = np.array([j.low for j in JOINTS])                            # rad
HIGH = np.array([j.high for j in JOINTS])
GRASP = np.array([j.grasp for j in JOINTS])
MOTOR_ID = [j.motor_id for j in JOINTS]
P_GAIN = np.array([j.p_gain for j in JOINTS])
D_GAIN = 200
SIGN = np.ones(N)                                # joint angle = SIGN * (motor angle - ZERO - calibrated offset)
ZERO = np.full(N, np.pi)                         # rad: a flat open hand reads 180 degrees on every motor
MODELS = {1200: "XL330-M288", 1240: "XC330-M288"}
CURRENT_LIMIT = {1200: 0.350, 1240: 0.550}       # A, by model number: the lite motors overheat above it
SUPPLY = 5.0                                     # V

CONTROL_HZ = 20
MAX_STEP = 0.12                                  # rad per command: 2.4 rad/s, far above a policy's 1/24 + correction
MOVE_SPEED = 1.0                                 # rad/s, of slow moves to a start pose
OPEN_FIRST = np.array([j.motor_id >= 12 or j.motor_id % 4 == 0 for j in JOINTS])    # thumb and side joints, see move_to

# What one motor does, in the textbook sense that the training simulator uses (XL330, identified by Rhoban's
# "Better Actuator Models", arXiv 2410.08650): duty per rad of error from the firmware's P gain, torque from duty.
KT = 0.366                                       # N m / A
RESISTANCE = 2.811                               # ohm
ARMATURE = 0.001808                              # kg m^2
DUTY_PER_RAD = P_GAIN * 4096 / (2 * np.pi) / (256 * 885)           # 1 / rad
STIFFNESS = DUTY_PER_RAD * KT * SUPPLY / RESISTANCE                # N m / rad: 1.50, side joints 1.12
DAMPING = KT ** 2 / RESISTANCE                                     # N m s / rad, back-EMF: 0.048
FRICTION = 0.012                                                   # N m: base 0.005 + Stribeck 0.005 + some load
TORQUE = KT * CURRENT_LIMIT[1200]                                  # N m: 0.128


# ---------------------------------------------------------------------------------------------- the interface
class Problem(Exception):
    """Something the user can mend. Printed as one line; exit status 2."""


def run(main):
    """Run a script's `main()`; a `Problem` and a disk that takes no more become one clear line and exit status 2, Ctrl-C status 130."""
    try:
        sys.exit(main())
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        print(f"error: {error.filename or 'a file'} cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def whole(path, mode="wb"):
    """A file to write to, under a temporary name and renamed at the end: `path` is whole or what it was before. `Problem` when it cannot be written,
    as on a full disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode) as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise Problem(f"cannot write {path}: {error.strerror or error}; what is already there is whole, so mend that and run it again")
    finally:
        temporary.unlink(missing_ok=True)


class BusError(Problem):
    """The hand did not do its part (lost answers, a motor's shutdown, an unplugged adapter). It has let go: torque is
    off. `reconnect()`, then `move_to()`, to go on; or let it end the script as any `Problem`."""


class Reading(NamedTuple):
    q: np.ndarray        # (16,) rad
    dq: np.ndarray       # (16,) rad/s
    current: np.ndarray  # (16,) A
    time: float          # s, when the motors answered


class Hand:
    """What both hands share: the only door through which a command passes."""
    realtime = True      # the caller keeps the time; False: a command takes one tick of its own
    target = None        # (16,) rad, last command; None while torque is off

    def __init__(self):
        self.events = []     # (time.time(), kind, text) of everything unusual

    def read(self) -> Reading:
        raise NotImplementedError

    def command(self, target):
        """Send joint targets (16,) rad, clipped to the joint limits and to MAX_STEP from the last command.

        Returns what was sent. Raises ValueError on NaN or a wrong shape, before anything moves."""
        target = np.asarray(target, float)
        if target.shape != (N,) or not np.isfinite(target).all():
            raise ValueError(f"a command is {N} finite joint angles in rad, not {target}")
        last = self.read().q if self.target is None else self.target
        self.target = np.clip(np.clip(target, last - MAX_STEP, last + MAX_STEP), LOW, HIGH)
        self._write(self.target)
        return self.target

    def move_to(self, q, seconds=0.0):
        """Go to q (16,) rad at MOVE_SPEED, or slower to take `seconds`, without the fingers catching each other. Returns q as read.

        First the thumb swings out from under the fingers and the fingers stop crossing (side joints to 0); then the fingers bend,
        which they do in parallel planes; then they spread; the thumb closes last. Of random moves around the grasp 19 %
        collide on the straight way and 8 % on this one, those at the very start or end, where poses nearly touch."""
        q = np.clip(np.asarray(q, float), LOW, HIGH)
        here = self.read().q if self.target is None else self.target
        thumb = np.arange(N) >= 12
        stages = [np.where(OPEN_FIRST, 0.0, here), np.where(OPEN_FIRST, 0.0, q), np.where(thumb, 0.0, q), q]
        if np.abs(q - here).max() < 0.2:                 # nearly there: no detour
            stages = [q]
        speed = MOVE_SPEED
        if seconds:
            speed = min(speed, sum(np.abs(b - a).max() for a, b in zip([here, *stages], stages)) / seconds)
        for goal in stages:
            steps = max(1, int(np.ceil(np.abs(goal - here).max() / max(speed, 1e-3) * CONTROL_HZ)))
            for i in range(1, steps + 1):
                self.command(here + (goal - here) * i / steps)
                reached = self.read().q
                self.tick()
            here = goal
        return reached

    def tick(self):
        """Wait for the next control tick (50 ms after the last). A virtual hand has already let the time pass."""
        if self.realtime:
            now = time.monotonic()
            due = getattr(self, "_due", now) + 1 / CONTROL_HZ
            self._due = max(due, now - 1 / CONTROL_HZ)       # after a long pause: go on from here, do not catch up
            time.sleep(max(0.0, self._due - now))

    def rest(self):
        """Torque off until the next command. For pauses: a hand that hears nothing for SILENCE s is switched off anyway."""
        self.target = None

    def reconnect(self, patience=600):
        """After a BusError: make the hand usable again, torque off."""

    def _write(self, target):
        raise NotImplementedError

    def close(self):
        """Let go and leave. May be called twice."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


# ---------------------------------------------------------------------------------------------- a real hand: Dynamixel motors
# It can be left alone overnight: a reading is of this moment or there is none; a goal is inside the limits; torque goes off by every
# door, also when this process is killed or frozen (`guard`); what can be mended (reboot, heat, unplugged adapter) `reconnect` mends.
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
                          ": check the cable that leads to it, and its id") + " with Dynamixel Wizard")
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


# ---------------------------------------------------------------------------------------------- a virtual hand
class VirtualHand(Hand):
    """The same hand in MuJoCo with motors as they are, not as the training simulator believes them to be.

    A seed draws the hidden parameters of every joint; nothing that trains may read them. Motor and friction model M4 of
    "Better Actuator Models" (arXiv 2410.08650), from `error` in rad to torque in N m:

        duty = clip(gain * DUTY_PER_RAD * error, -1, 1)      current = clip((duty V - kt w) / R, -limit, limit)
        |friction| <= base + load |tau_ext - tau| + exp(-|w / w_s|^0.76) (stribeck + load_s |tau_ext - tau|) + viscous |w|

    with play between motor and link, an encoder of 4096 counts with a zero that is off, and late commands and readings.
    load: "none", "balls" (the Chaos Box) or a `sim.Object` to hold. Time is simulated: every `command` lets 50 ms pass.
    """
    realtime = False

    def __init__(self, seed=0, wrist="palm_up", load="none", substeps=12):
        import mujoco                                        # here, because a real hand needs no simulator
        import sim
        super().__init__()
        self._mj, self.load, self.seed = mujoco, load, seed
        rng = np.random.default_rng([seed, 2510])
        draw = lambda low, high: rng.uniform(low, high, N)
        self._gain, self._volt = draw(0.85, 1.0), rng.uniform(4.6, 4.9)        # cables and load pull a 5 V supply down
        self._kt, self._R = KT * draw(0.95, 1.05), RESISTANCE * draw(0.97, 1.08)
        self._limit = CURRENT_LIMIT[1200] * draw(0.9, 1.0)
        self._base, self._stribeck = 0.0088 * draw(0.7, 1.3), 0.0047 * draw(0.7, 1.3)    # around the identified motor
        self._load, self._load_s = 0.068 * draw(0.7, 1.3), 0.0738 * draw(0.7, 1.3)
        self._zero = np.radians(draw(-0.6, 0.6))             # what a careful calibration leaves
        self._backlash = np.radians(draw(0.25, 0.5))
        self._command_delay, self._read_delay = rng.uniform(0.004, 0.012), rng.uniform(0.003, 0.008)
        self._rubber, contact_time = rng.uniform(0.85, 1.05), rng.uniform(0.012, 0.018)
        viscous, armature = 0.0046 * draw(0.7, 1.3), ARMATURE * draw(0.95, 1.1)

        spec = sim.build(load if isinstance(load, tuple) else None, box_of_balls=load == "balls", wrist=sim.WRISTS[wrist],
                         timestep=1 / (CONTROL_HZ * substeps), damping=viscous, armature=armature, backlash=self._backlash)
        self._model, self.substeps = spec.compile(), substeps
        # MuJoCo's constraints are soft by default: stiction crept at 10 mrad/s, and a fingertip leant 2 degrees into the stops of its play
        self._model.dof_solimp[:, :2] = self._model.jnt_solimp[:, :2] = 0.999
        if isinstance(load, tuple):
            self._model.geom_solref[self._model.geom_bodyid == self._model.body("object").id, 0] = contact_time
        self._data = mujoco.MjData(self._model)
        joints = [self._model.joint(j.name) for j in JOINTS]
        self._qadr, self._vadr = np.array([j.qposadr[0] for j in joints]), np.array([j.dofadr[0] for j in joints])
        self.place(GRASP)

    def place(self, q, target=None, object_qpos=None, mass=0.03, friction=1.0, stir=None):
        """Start over with joints at q (16,) rad and the object, if any, in the fingers (position m, quaternion).
        `stir` is a seed that throws the balls of the Chaos Box about."""
        import sim
        d = self._data
        self._mj.mj_resetData(self._model, d)
        d.qpos[self._qadr] = q
        if object_qpos is not None:
            sim.set_object(self._model, mass, friction * self._rubber)
            d.qpos[-7:] = object_qpos
        if self.load == "balls":
            balls = len(self._model.qpos0) - 2 * N
            d.qpos[-balls:] = np.random.default_rng([self.seed, stir or 0]).uniform(-0.02, 0.02, balls)
        self._tau, self._external = np.zeros(N), np.zeros(N)
        self.target = np.array(q if target is None else target, float)
        self._goal = self.target
        self._mj.mj_forward(self._model, d)
        self._reading = self._measure()
        if self.load == "balls":                             # let them settle around the fingers
            for _ in range(CONTROL_HZ):
                self._write(self.target)

    def _measure(self):
        d, count = self._data, 2 * np.pi / 4096
        return Reading(np.round((d.qpos[self._qadr] + self._zero) / count) * count, np.round(d.qvel[self._vadr] / 0.024) * 0.024,
                       np.round(self._tau / self._kt, 3), float(d.time))

    def _write(self, target):
        m, d, v = self._model, self._data, self._vadr
        count, dt = 2 * np.pi / 4096, m.opt.timestep
        late, read_at = round(self._command_delay / dt), self.substeps - round(self._read_delay / dt)
        for i in range(self.substeps):
            if i == late:
                self._goal = target
            w = d.qvel[v]
            error = self._goal - np.round((d.qpos[self._qadr] + self._zero) / count) * count
            duty = np.clip(self._gain * DUTY_PER_RAD * error, -1, 1)
            self._tau = self._kt * np.clip((duty * self._volt - self._kt * w) / self._R, -self._limit, self._limit)
            strain = np.abs(self._external - self._tau)
            m.dof_frictionloss[v] = (self._base + self._load * strain
                                     + np.exp(-np.abs(w / 2.558) ** 0.76) * (self._stribeck + self._load_s * strain))
            d.qfrc_applied[v] = self._tau
            self._mj.mj_step(m, d)
            # what bears on the gears from outside: contacts and limits (constraint forces without friction) and gravity
            friction = np.zeros(m.nv)
            rows = np.flatnonzero(d.efc_type[:d.nefc] == self._mj.mjtConstraint.mjCNSTR_FRICTION_DOF)
            friction[d.efc_id[rows]] = d.efc_force[rows]
            self._external = (d.qfrc_constraint - friction - d.qfrc_bias)[v]
            if i + 1 == read_at:
                self._reading = self._measure()

    def read(self):
        return self._reading

    def model(self):
        """The MjModel, to draw it."""
        return self._model

    def qpos(self):
        """The whole configuration, to draw it."""
        return self._data.qpos.copy()

    def object_qpos(self):
        """Position (m) and quaternion of the object, (7,): what an observer sees, not what the hand knows."""
        return self._data.qpos[-7:].copy()


# ---------------------------------------------------------------------------------------------- choosing a hand
def resolve_port(port):
    """"auto" becomes the port of the attached hand or, with a line that says so, "sim:0"; "sim" becomes "sim:0"."""
    if port == "auto":
        port = find_port()
        if port is None:
            print("no hand is attached: using the virtual hand sim:0", file=sys.stderr)
    port = "sim:0" if port in (None, "sim") else port
    if port.startswith("sim:") and not port[4:].isdigit():
        raise Problem(f"--port {port}: the seed of a virtual hand is a whole number, as in sim:7")
    return port


def open_hand(port="auto", **virtual):
    """The hand at `port`: "auto", "sim", "sim:SEED" or a serial device. `virtual` (wrist, load) only shapes a virtual hand.

    Raises `Problem` if the port is absent or answers wrongly."""
    port = resolve_port(port)
    if port.startswith("sim:"):
        return VirtualHand(int(port[4:]), **virtual)
    return DynamixelHand(port)


# -------------------------------------------------------------- from the cable to a working hand
# One line for each thing that is right. The first that is wrong ends the check with what to do
# about it and exit status 2. First what can be seen without moving (`DynamixelHand.bring_up`, the
# same checks that every script makes). Then, after a yes, each joint by itself goes a little back
# and then softly against a mechanical stop, which the table knows: that shows whether it moves,
# whether it moves alone, and where its zero is. Writes calibration.json, which the driver reads.
#
# Any mounting will do. Keep the space around the fingers free, also behind them: they bend back
# 20 degrees.
SOFT = 350       # mA, at most: 0.13 N m, a push of 1.3 N at a fingertip
NUDGE = 0.25     # rad, how far a joint goes back before it is pressed
BACK = 7         # ticks, for that
PRESS = 0.08     # rad per tick, how fast it then goes to its stop
FINE = 0.12      # rad: as far as a zero may be off; further away something is mounted wrongly
SIMILAR = 0.15   # rad: a stop this close to what another fault would give may be that fault
JAMMED = 0.1     # rad: a joint that moves less is jammed
ALONE = 0.02     # rad, how far the joints of other fingers may move

# The pose from which joints are pressed, for any direction of gravity. Curled, a finger is light
# enough to be lifted with SOFT (straight, 0.077 N m and friction are too much), and nothing is in
# its way: fingers are as wide as the gaps between them, so a side joint reaches its stop only when
# its finger is bent and its neighbours are not. A pip goes to its upper stop, for on its way to the
# lower one the links meet first.
CURL = {"pip": 1.5, "dip": 1.2}
THUMB_CURL = {"mcp": 0.4, "ipl": 1.6}
BENT = 1.2       # rad, of the base joint while a side joint is pressed
UP = ("pip",)    # these are pressed against their upper stop, all others against the lower

FINGER = [joint.name.split("_")[0] for joint in JOINTS]
ROLE = [joint.name.split("_")[1] for joint in JOINTS]
CURLED = np.array([(THUMB_CURL if finger == "th" else CURL).get(role, 0.0)
                   for finger, role in zip(FINGER, ROLE)])
TOWARD = np.array([1 if role in UP else -1 for role in ROLE])     # the sign of that
STOP = np.where(TOWARD > 0, HIGH, LOW)                            # rad
OTHER_STOP = np.where(TOWARD > 0, LOW, HIGH)


def check(argv=None):
    parser = argparse.ArgumentParser(
        prog="hand.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--check", action="store_true", required=True, help="walk from the cable to a working hand")
    add("--port", default="auto", help="serial device, or auto")
    add("--yes", action="store_true", help="answer every question with yes")
    add("--calibration", default=str(CALIBRATION), help="file for the zero offsets")
    args = parser.parse_args(argv)

    def agree(question):
        if args.yes:
            return True
        print(f"{question} [y/N] ", end="", flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def passed(line):
        print(f"ok  {line}", flush=True)

    folder = Path(args.calibration).absolute().parent
    if not os.access(folder, os.W_OK):                   # now, not after a minute of moving
        raise Problem(f"cannot write to {folder}, where the calibration goes")
    with DynamixelHand(args.port, args.calibration, passed=passed,
                       agree=lambda text: agree(f"{text}. Set it?")) as hand:
        if not agree("Each joint will now move, softly, for about a minute. "
                     "Is the space around the fingers free?"):
            print("not moved; everything that can be checked without moving is right")
            return 0
        limits = _integers(hand._ask(38, 2), 0, 2)
        hand._set(102, 2, np.minimum(limits, SOFT), name="goal current")
        stops, moved, others = press_each(hand)
        hand.rest()
    print_table(stops, moved, others)
    judge(stops, moved, others)
    passed("movement     every joint moves, and only that one")
    if not args.yes and not agree(
            "Did index, middle, ring and thumb move in this order, and in each finger first the "
            "base (back), then side (towards the thumb), middle (curling), tip (stretching)?"):
        raise Problem("joints move in the wrong order: motor ids are swapped, or a side motor is "
                      "mounted mirrored; the table of hand.py has the ids")
    passed(f"zeros        within {np.rad2deg(np.abs(stops - STOP).max()):.1f} degrees of the table")
    save_calibration(args.calibration, hand.offset + SIGN * (stops - STOP))
    print(f"zero offsets written to {args.calibration}")
    return 0


def press_each(hand):
    """Press every joint by itself. Three (16,) arrays in rad: where it came to rest (nan: never),
    how far it moved on the way, and the most that a joint of another finger moved meanwhile."""
    stops, moved, others = np.zeros((3, N))
    hand.move_to(CURLED)
    for j in range(N):
        pose = CURLED.copy()
        if ROLE[j] == "rot":
            pose[FINGER.index(FINGER[j])] = BENT
        ease(hand, pose)
        stops[j], travel = press(hand, j)
        moved[j] = travel[j]
        others[j] = max(travel[k] for k in range(N) if FINGER[k] != FINGER[j])
        ease(hand, pose)
    hand.move_to(np.zeros(N))
    return stops, moved, others


def ease(hand, pose):
    """Straight to a pose, and wait until the motors have taken up their load."""
    far = np.abs(pose - hand.target).max()
    for _ in range(int(far / PRESS) + 6):
        hand.command(hand.target + np.clip(pose - hand.target, -PRESS, PRESS))
        hand.tick()


def press(hand, j):
    """Joint j a little back and then against its stop, at most SOFT. Returns where it came to rest
    (rad, nan if it turns and turns) and how far every joint moved in all (16,)."""
    q = hand.read().q
    seen = [q]
    goal, side, start = hand.target.copy(), TOWARD[j], q[j]
    # far enough to see a joint that is mirrored or turned by 90 degrees
    end = 0.5 + max(side * STOP[j] + 1.75, -side * OTHER_STOP[j])
    still = 0                                            # ticks at rest, the goal being far away
    for tick in range(1, 200):
        if tick <= BACK:
            goal[j] = start - side * min(NUDGE, PRESS * tick)
        else:
            goal[j] = side * min(side * goal[j] + PRESS, side * q[j] + 0.3)
        # beyond the limits of the table: only here, and soft
        hand._tell(116, 4, np.rint((ZERO + hand.offset + SIGN * goal) / COUNT))
        hand.tick()
        last, q = q, hand.read().q
        seen.append(q)
        far = side * (goal[j] - q[j]) > 0.2
        still = still + 1 if far and abs(q[j] - last[j]) < 0.01 else 0
        if still == 4 or side * goal[j] > end:
            break
    hand.target = np.clip(q, LOW, HIGH)
    return (q[j] if still == 4 else np.nan), np.ptp(seen, axis=0)


def judge(stops, moved, others):
    """One clear line about what is wrong: first what nothing else can bring about, last what may
    be the consequence of another fault."""
    offset = stops - STOP
    wrong = np.flatnonzero(np.abs(offset) > FINE)
    jammed = np.flatnonzero(moved < JAMMED)
    drawn = np.flatnonzero(others > ALONE)
    beyond = [j for j in wrong if TOWARD[j] * offset[j] > 0]     # no obstacle takes a joint there
    alone = [j for j in wrong if j not in jammed and j not in drawn]
    for j in np.flatnonzero(np.isnan(stops)):
        raise Problem(f"{_motor(j)}: turns without end: the horn screw is missing, or the finger "
                      "is not attached to it")
    for j in beyond + [j for j in alone if causes(j, stops)]:
        raise Problem(stops_wrongly(j, stops, wrong))
    facts = []
    if len(jammed):
        facts.append(f"{_motor(*jammed)}: does not move when told to: jammed joint, something in "
                     "its way, or a horn screw too tight")
    if alone:
        facts.append(stops_wrongly(alone[0], stops, alone))
    if len(drawn):
        facts.append(f"{_motor(*drawn)}: moving it moves another finger's joint by "
                     f"{np.rad2deg(others[drawn[0]]):.0f} degrees: fingers tied together, "
                     "something between them, or a cable that pulls")
    if facts:
        raise Problem("; ".join(facts))


def causes(j, stops):
    """What in the way the hand is built would make joint j stop where it does, in words."""
    offset, found = stops[j] - STOP[j], []
    for k in range(N):
        mine = (HIGH if TOWARD[j] > 0 else LOW)[k]         # where j stops when it drives k's joint
        its = (HIGH if TOWARD[k] > 0 else LOW)[j]
        if (FINGER[k] == FINGER[j] and k != j and abs(stops[j] - mine) < SIMILAR
                and abs(stops[k] - its) < SIMILAR):
            found.append(f"its id is swapped with {_motor(k)}")
    if abs(abs(offset) - np.pi / 2) < SIMILAR:
        found.append("take the part off its horn and turn it by 90 degrees")
    if abs(stops[j] + OTHER_STOP[j]) < SIMILAR or (TOWARD[j] * offset > 0.5 and not found):
        found.append("it turns the wrong way (mounted mirrored, or SIGN in the table of hand.py) "
                     "or drives another joint (ids swapped)")
    return found


def stops_wrongly(j, stops, like):
    offset, why = stops[j] - STOP[j], causes(j, stops)
    if not why or abs(offset) < 0.5:
        why.append(f"horn mounted {np.rad2deg(offset):+.0f} degrees off (a tooth or more)")
    if TOWARD[j] * offset < 0:
        why.append("something blocks the joint")
    more = f" ({len(like) - 1} more like this)" if len(like) > 1 else ""
    return (f"{_motor(j)}: {'upper' if TOWARD[j] > 0 else 'lower'} stop at "
            f"{np.rad2deg(stops[j]):.0f} degrees, expected {np.rad2deg(STOP[j]):.0f}: "
            f"{', or '.join(why)}{more}")


def _motor(*joints):
    return motors(MOTOR_ID[j] for j in joints)


def print_table(stops, moved, others):
    print("\njoint    motor   moved  others move   stop  table  offset  (degrees)")
    for j, joint in enumerate(JOINTS):
        values = np.rad2deg([moved[j], others[j], stops[j], STOP[j], stops[j] - STOP[j]])
        print("{:8} {:5}  {:6.1f}  {:11.1f} {:6.1f} {:6.1f}  {:+6.1f}".format(
            joint.name, joint.motor_id, *values))
    print()


def save_calibration(path, offset):
    offsets = {joint.name: round(float(o), 5) for joint, o in zip(JOINTS, offset)}
    with whole(path, "w") as file:
        file.write(json.dumps({"hand": HAND, "offset": offsets}, indent=1) + "\n")


if __name__ == "__main__":
    run(check)
