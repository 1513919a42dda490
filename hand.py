"""The hand: one table of everything about it, and one small interface to it.

    python hand.py --check --port /dev/ttyUSB0     # from the cable to a working hand

    with sim.open_hand("auto") as hand:            # or "sim", "sim:7", "/dev/ttyUSB0"
        q, dq, current, time = hand.read()         # rad, rad/s, A, s   (arrays: (N,))
        hand.command(target)                       # rad; within the joint limits and MAX_STEP

A fork for another hand replaces the table below and, if its motors are no Dynamixels,
`DynamixelHand`. `python tests/mjcf.py HAND.xml` prints the links of a MuJoCo model as such a table.
The virtual hand is in sim.py.
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
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np


# ------------------------------------------------------------------- what a table is made of
# SI units, quaternions w x y z, link frames relative to the parent's; positive closes the finger.
class Joint(NamedTuple):
    name: str
    motor_id: int
    low: float          # rad, mechanical limit
    high: float         # rad
    grasp: float        # rad, canonical grasp for rotation
    p_gain: int         # firmware position P gain
    role: str           # "side" spreads the fingers, "base" closes a whole one; others are free
    axis: tuple = (0, 0, -1)    # in the link's frame
    rest: float = 0.0   # rad, where it is out of the way
    sign: int = 1       # motor angle = zero + calibrated offset + sign * joint angle
    zero: float = np.pi
    curl: float = 0.0   # rad, while joints are pressed by --check, see there
    stop: int = -1      # it is pressed against its lower stop (-1) or its upper one (+1)


class Link(NamedTuple):
    name: str
    parent: str | None
    finger: str | None  # None: of the palm
    pos: tuple          # m
    quat: tuple
    mass: float         # kg
    com: tuple          # m
    inertia_quat: tuple
    inertia: tuple      # kg m^2, principal
    joint: Joint | None
    shapes: tuple
    boxes: tuple        # centre (m), half sizes (m) and, where it is turned, quaternion


# ----------------------------------------------------------------------------------- the table
# LEAP Hand (right): kinematics, masses, limits and collision boxes as published with its URDF and
# its MuJoCo model. `boxes` are what objects meet, and the virtual hand is made of them alone.
# `shapes` are as wide (a knuckle as its fork, the part between knuckles as its motor) and reach as
# far, but few and thick: fingers meet each other, the palm and balls with them in the training
# simulator, because thin boxes of neighbouring fingers that pass into each other make MuJoCo 4.0.0
# end the process. They are capsules ("capsule", from, to, radius) and boxes ("box", centre, half
# sizes). The last shape of a fingertip link, a capsule, is its rubber tip, for objects too, and its
# last box is the tip's extent.
def _finger(prefix, base, motor, grasp):
    """Four links of one of the three equal fingers: base bracket, proximal, medial, distal."""
    bs, px, md, ds = (f"{prefix}_{part}" for part in ("bs", "px", "md", "ds"))
    mcp, rot, pip, dip = grasp
    return (
        Link(bs, "palm", prefix, base, (0.500003, 0.5, 0.5, -0.499997),
             0.044, (-0.022516, 0.033882, 0.016359),
             (0.388092, 0.677951, -0.247713, 0.573067), (1.74972e-05, 1.61504e-05, 7.21342e-06),
             Joint(f"{prefix}_mcp", motor + 1, -0.314, 2.23, mcp, 800, "base"),
             (("capsule", (-0.027, 0.032, 0.015), (-0.027, 0.050, 0.015), 0.013),),
             (((0, 0.018, 0.0147), (0.010, 0.003, 0.017)),
              ((-0.027, 0.042, 0.015), (0.014, 0.020, 0.010)),
              ((-0.0262, 0.020, 0.0146), (0.017, 0.003, 0.010)),
              ((-0.0295, 0.035, 0.029), (0.010, 0.012, 0.004)),
              ((0, 0.005, 0.030), (0.007, 0.010, 0.002)),
              ((0, 0.005, -0.001), (0.007, 0.010, 0.002)))),
        Link(px, bs, prefix, (-0.0122, 0.0381, 0.0145), (0.500003, -0.5, -0.499997, 0.5),
             0.032, (0.0075, -0.0002, -0.011),
             (0, 0.707107, 0, 0.707107), (4.8853e-06, 4.3733e-06, 3.0933e-06),
             Joint(f"{prefix}_rot", motor + 0, -1.047, 1.047, rot, 600, "side"),
             (("capsule", (0.002, 0, -0.011), (0.013, 0, -0.011), 0.012),),
             (((0.0075, -0.0002, -0.011), (0.017, 0.013, 0.011)),)),
        Link(md, px, prefix, (0.015, 0.0143, -0.013), (0.500003, 0.5, -0.5, 0.499997),
             0.037, (0.005422, -0.029148, 0.015),
             (0.687228, 0.687228, 0.166487, 0.166487), (8.28004e-06, 8.1598e-06, 5.39516e-06),
             Joint(f"{prefix}_pip", motor + 2, -0.506, 1.885, pip, 800, "pip", curl=1.5, stop=1),
             (("box", (0, -0.0065, 0.015), (0.009, 0.012, 0.017)),
              ("box", (0.0075, -0.0345, 0.015), (0.017, 0.0115, 0.013))),
             (((0, -0.020, 0.015), (0.008, 0.003, 0.013)),
              ((0, -0.016, 0.015), (0.010, 0.002, 0.017)),
              ((0, -0.0045, 0.030), (0.007, 0.010, 0.002)),
              ((0, -0.0045, 0), (0.007, 0.010, 0.002)),
              ((0.0075, -0.035, 0.015), (0.017, 0.011, 0.013)))),
        Link(ds, md, prefix, (0, -0.0361, 0.0002), (1, 0, 0, 0),
             0.016, (-0.000879, -0.027019, 0.014594),
             (0.702905, 0.710643, -0.021294, -0.02142), (3.71863e-06, 3.02396e-06, 1.6518e-06),
             Joint(f"{prefix}_dip", motor + 3, -0.366, 2.042, dip, 800, "dip", curl=1.2),
             (("box", (0, -0.0075, 0.0145), (0.009, 0.0125, 0.0175)),
              ("capsule", (-0.0008, -0.0311, 0.0146), (-0.0008, -0.0385, 0.0146), 0.0115)),
             (((0, -0.017, 0.015), (0.010, 0.003, 0.015)),
              ((0, -0.006, 0.030), (0.007, 0.011, 0.002)),
              ((0, -0.006, -0.001), (0.007, 0.011, 0.002)),
              ((-0.00085, -0.0348, 0.01455), (0.01045, 0.0152, 0.01215)))),
    )


HAND = "leap-right"              # written into every file; a file of another hand is refused
LINKS = (
    # turned so that z of the world points out of the palm, x along the fingers
    Link("palm", None, None, (0, 0, 0), (0, 1, 0, 0),
         0.237, (-0.049542, -0.042914, -0.010227),
         (0.565586, 0.427629, -0.574956, 0.408254), (0.000407345, 0.000304759, 0.000180736),
         None,
         (("box", (-0.029, -0.037, -0.011), (0.031, 0.058, 0.023)),
          ("box", (-0.078, -0.040, -0.0115), (0.022, 0.040, 0.023))),
         (((-0.009, 0.008, -0.011), (0.011, 0.013, 0.017)),
          ((-0.009, -0.037, -0.011), (0.011, 0.013, 0.017)),
          ((-0.009, -0.082, -0.011), (0.011, 0.013, 0.017)),
          ((-0.066, -0.078, -0.0115), (0.029, 0.010, 0.023), (0.989016, 0, 0, -0.147806)),
          ((-0.030, -0.035, -0.003), (0.010, 0.060, 0.015)),
          ((-0.032, -0.035, -0.024), (0.005, 0.060, 0.010), (0.923956, 0, 0.382499, 0)),
          ((-0.048, -0.033, -0.0115), (0.012, 0.058, 0.023)),
          ((-0.078, -0.053, -0.0115), (0.022, 0.026, 0.023)),
          ((-0.098, -0.009, -0.006), (0.002, 0.018, 0.017)),
          ((-0.078, -0.003, 0.010), (0.022, 0.028, 0.002)))),
    *_finger("if", (-0.007, 0.023, -0.0187), 0, (1.244, 0.082, 0.265, 0.298)),
    *_finger("mf", (-0.0071, -0.0224, -0.0187), 4, (1.096, 0.005, 0.080, 0.150)),
    *_finger("rf", (-0.00709, -0.0678, -0.0187), 8, (1.337, 0.029, 0.285, 0.317)),
    Link("th_mp", "palm", "th", (-0.0693, -0.0012, -0.0216), (0.707109, 0, 0.707105, 0),
         0.032, (0.0075, -0.0002, -0.011),
         (0, 0.707107, 0, 0.707107), (4.8853e-06, 4.3733e-06, 3.0933e-06),
         Joint("th_cmc", 12, -0.349, 2.094, 1.163, 800, "cmc"),
         (), (((-0.0075, -0.0002, -0.011), (0.017, 0.013, 0.011)),)),
    Link("th_bs", "th_mp", "th", (0, 0.0143, -0.013), (0.500003, 0.5, -0.5, 0.499997),
         0.003, (0, 0, -0.007081),
         (0.707107, 0.707107, 0, 0), (6.1932e-07, 5.351e-07, 2.1516e-07),
         Joint("th_axl", 13, -0.349, 2.094, 1.104, 800, "axl"),
         (),
         (((0, 0, -0.0015), (0.009, 0.0165, 0.002)),
          ((0, -0.015, -0.013), (0.007, 0.002, 0.010)),
          ((0, 0.015, -0.013), (0.007, 0.002, 0.010)))),
    Link("th_px", "th_bs", "th", (0, 0.0145, -0.017), (0.707109, -0.707105, 0, 0),
         0.038, (-0.002059, 0.015912, -0.013733),
         (0.698518, 0.697382, -0.104933, 0.121324), (9.87104e-06, 9.32653e-06, 4.36203e-06),
         Joint("th_mcp", 14, -0.47, 2.443, 0.953, 800, "mcp", curl=0.4),
         (("box", (-0.002, 0.0105, -0.014), (0.012, 0.020, 0.012)),
          ("box", (0, 0.0405, -0.014), (0.009, 0.0115, 0.017))),
         (((0, 0.0105, -0.014), (0.010, 0.020, 0.012)),
          ((0, 0.031, -0.015), (0.010, 0.002, 0.016)),
          ((0, 0.042, 0.001), (0.007, 0.010, 0.002)),
          ((0, 0.042, -0.029), (0.007, 0.010, 0.002)),
          ((-0.0135, 0.0175, -0.011656), (0.005, 0.012, 0.009)))),
    Link("th_ds", "th_px", "th", (0, 0.0466, 0.0002), (1e-06, 0, 0, 1),
         0.049, (0.000962, -0.024203, -0.014419),
         (0.35287, 0.311272, -0.632839, 0.614904), (2.08591e-05, 2.0402e-05, 4.71335e-06),
         Joint("th_ipl", 15, -1.34, 1.88, -0.138, 800, "ipl", curl=1.6),
         (("box", (0, -0.0105, -0.0145), (0.010, 0.0205, 0.0125)),
          ("box", (0.0145, -0.0175, -0.0115), (0.0045, 0.012, 0.009)),
          ("capsule", (-0.0008, -0.043, -0.0144), (-0.0008, -0.0506, -0.0144), 0.0115)),
         (((0, -0.0085, -0.015), (0.010, 0.018, 0.012)),
          ((0, -0.029, -0.014), (0.010, 0.002, 0.015)),
          ((0.015, -0.0175, -0.0115), (0.004, 0.012, 0.009)),
          ((-0.00085, -0.0468, -0.01445), (0.01045, 0.0153, 0.01215)))),
)
TIPS = {                         # fingertip link: centre of the tip (m) in its frame
    **dict.fromkeys(("if_ds", "mf_ds", "rf_ds"), (-0.0013, -0.0336, 0.0145)),
    "th_ds": (-0.0013, -0.0456, -0.0145),
}

# Control, and the motors: what one does, XL330, identified in "Better Actuator Models"
# (arXiv 2410.08650); numbers, or one for each joint. duty = P gain * error in counts / FULL_DUTY.
MAX_STEP = 0.12                  # rad per command: far above a policy's 1/24 and its correction
MOVE_SPEED = 1.0                 # rad/s, of slow moves to a start pose
D_GAIN = 200
MODELS = {1200: "XL330-M288", 1240: "XC330-M288"}
CURRENT_LIMIT = {1200: 0.350, 1240: 0.550}       # A: the lite motors overheat above it
CURRENT = CURRENT_LIMIT[1200]    # A, of the simulated motor
SUPPLY, SAG = 5.0, (0.1, 0.4)    # V, and what cables and load take of it
VOLTAGE = 4.0, 6.0               # V, at the motors: outside, the hand lets go
COUNT = 2 * np.pi / 4096         # rad, unit of position
RPM = 0.229 * 2 * np.pi / 60     # rad/s, unit of velocity
FULL_DUTY = 256 * 885
KT = 0.366                       # N m / A
RESISTANCE = 2.811               # ohm
ARMATURE = 0.001808              # kg m^2
FRICTION = 0.012                 # N m, training: base 0.005 + Stribeck 0.005 + some load
# friction of the virtual hand's gears, see `VirtualHand`
RUB, RUB_STRIBECK = 0.0088, 0.0047               # N m
LOAD, LOAD_STRIBECK = 0.068, 0.0738              # N m per N m of load
VISCOUS = 0.0046                 # N m s / rad
STRIBECK_SPEED, STRIBECK_EXPONENT = 2.558, 0.76              # rad/s
BACKLASH = 0.25, 0.5             # degrees, smallest and largest

# The task and the world, of this hand's size
REACH = 0.45                     # rad from the grasp, of a policy's targets
SCALE = 1.0                      # objects, balls and how far an object falls, over this hand's
BOX = (-0.12, -0.07, 0.03), (0.09, 0.145, 0.19)  # m, corners of the box of balls
BALLS = 24
CAMERA = {"lookat": (-0.01, 0.035, 0.10), "distance": 0.38, "azimuth": 150, "elevation": -25}
WATCH = ("index, middle, ring and thumb move in this order, and in each finger first the "
         "base (back), then side (towards the thumb), middle (curling), tip (stretching)")
OPEN = 0.6                       # rad, how far the fingers bend back for a move


def stages(here, goal):
    """Poses (N,) by way of which the hand goes, each joint at the same time, so that fingers do not
    meet; the last is the goal. They bend back together and stop crossing, everything moves in
    parallel planes, then they close and spread. Of 1000 moves between random poses within 0.45 rad
    of the grasp, fingers as wide as published touch in 0.7 %; straight 22 % (1 % below 0.2 rad)."""
    def opened(pose):          # all by the same angle: their base axes are one line
        back = np.clip(pose[BASE].min(), 0, OPEN)
        return np.where(SIDE, REST, pose) - back * BASE

    return [opened(here), opened(goal), goal] if np.abs(goal - here).max() >= 0.2 else [goal]


# ------------------------------------------------------------------------- what follows from it
JOINTS = tuple(link.joint for link in LINKS if link.joint)         # the order of every (N,) array
N = len(JOINTS)
LOW, HIGH, GRASP, REST, P_GAIN, SIGN, ZERO = (
    np.array([getattr(joint, field) for joint in JOINTS])
    for field in ("low", "high", "grasp", "rest", "p_gain", "sign", "zero"))
MOTOR_ID = [joint.motor_id for joint in JOINTS]
SIDE, BASE = (np.array([joint.role == role for joint in JOINTS]) for role in ("side", "base"))
FINGER = [link.finger for link in LINKS if link.joint]
FINGERS = list(dict.fromkeys(FINGER))
# links that meet other fingers: those that the last two joints of a finger move, never its first
_moved, OUTER = {}, set()
for link in LINKS:
    _moved[link.name] = _moved.get(link.parent, 0) + (link.joint is not None)
    if link.finger and _moved[link.name] > max(1, FINGER.count(link.finger) - 2):
        OUTER.add(link.name)
OTHERS = ("HAND WATCH stages D_GAIN MODELS CURRENT_LIMIT VOLTAGE SAG RUB RUB_STRIBECK LOAD "
          "LOAD_STRIBECK VISCOUS STRIBECK_EXPONENT BACKLASH BOX CAMERA").split()
POSITIVE = ("MAX_STEP MOVE_SPEED CURRENT SUPPLY COUNT RPM FULL_DUTY KT RESISTANCE "
            "ARMATURE FRICTION STRIBECK_SPEED REACH SCALE BALLS").split()


def refuse(line):
    print(f"error: the table of hand.py: {line}", file=sys.stderr)
    sys.exit(2)


def check_the_table():
    """Refuse what would otherwise be wrong without a word."""
    known, above = {}, []                        # above: the last link and what it hangs on
    for link in LINKS:
        parent, finger, j = known.get(link.parent), link.finger, link.joint
        its, begun = parent and parent.finger, {other.finger for other in known.values()}
        for bad, text in (
                (not known and (link.parent or finger or j), "is the first, but not a bare palm"),
                (known and not parent, f"hangs on {link.parent}: unknown, or later"),
                (parent and link.parent not in above, f"is not next to others on {link.parent}"),
                (its not in (None, finger), f"of finger {finger} hangs on finger {its}"),
                (finger != its and finger in begun, f"begins finger {finger} again"),
                (j and not finger, "has a joint, but no finger"),
                (link.shapes and not link.boxes, "has shapes, but no boxes for the virtual hand"),
                (link.name in TIPS and (not link.shapes or link.shapes[-1][0] != "capsule"),
                 "is a fingertip, but its last shape is no capsule"),
                (j and not -30 < j.low < j.high < 30, f"has no proper limits: {j}"),
                (j and not j.low <= j.grasp <= j.high, f"has its grasp outside its limits: {j}"),
                (j and not j.low <= j.rest <= j.high, f"has its rest outside its limits: {j}")):
            if bad:
                refuse(f"link {link.name} {text}")
        above = [*above[:above.index(link.parent) + 1 if parent else 0], link.name]
        known[link.name] = link
    if len(set(MOTOR_ID)) < N:
        refuse("two joints have the same motor_id")
    if [name in known and known[name].finger for name in TIPS] != FINGERS:
        refuse(f"TIPS must name one link of each of the fingers {FINGERS}, in this order")
    if len({known[name].finger for name in OUTER if known[name].shapes}) < 2:
        refuse("no two fingers can touch: their last two links have no shapes")
    for name in POSITIVE + OTHERS:
        value = globals().get(name)
        if value is None:
            refuse(f"it has no {name}")
        elif name in POSITIVE and not (np.all(np.greater(value, 0)) and np.size(value) in (1, N)):
            refuse(f"{name} is {value}, which is not a positive number, or {N} of them")
    if np.any(CURRENT > (SUPPLY - SAG[1]) / RESISTANCE):
        refuse(f"{SUPPLY} V less {SAG} V cannot drive {CURRENT} A through {RESISTANCE} ohm")
    if np.shape(BOX) != (2, 3) or np.any(np.subtract(*BOX) >= 0):
        refuse(f"BOX {BOX} is not a lower and an upper corner")
    for here, goal in ((REST, GRASP), (GRASP, REST)):
        way = np.array(stages(here, goal))
        if way.shape[1:] != (N,) or np.any(way[-1] != goal) or np.any((way < LOW) | (way > HIGH)):
            refuse("stages() leaves the limits, or does not end at its goal")


try:
    check_the_table()
except Exception as error:
    refuse(f"it cannot be read ({error})")
# the motor in the textbook sense of the training simulator: torque from duty from error
DUTY_PER_RAD = P_GAIN / COUNT / FULL_DUTY
STIFFNESS = DUTY_PER_RAD * KT * SUPPLY / RESISTANCE                # N m / rad: 1.50, sides 1.12
DAMPING = KT ** 2 / RESISTANCE                   # N m s / rad, back-EMF: 0.048
TORQUE = KT * CURRENT                            # N m: 0.128


# ------------------------------------------------------------------------------- the interface
CONTROL_HZ = 20                  # of every hand: the method's, as its episodes of 400 steps


class Problem(Exception):
    """Something the user can mend. Printed as one line; exit status 2."""


class BusError(Problem):
    """The hand did not do its part (lost answers, a motor's shutdown, an unplugged adapter) and has
    let go: torque is off wherever that can be said. To go on: `reconnect()`, then `move_to()`."""


def run(main):
    """Run a script's `main()`. A `Problem`, or a file that cannot be read or written, ends it with
    one line and exit status 2, Ctrl-C with status 130."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))          # so that `with` ends
    try:
        sys.exit(main())
    except (Problem, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def atomic_file(path, mode="wb"):
    """A file to write to that becomes `path` when all is written; so `path` is always whole.
    Raises `Problem` when it cannot be written, as on a full disk."""
    path = Path(path)
    if not path.name:
        raise Problem(f"'{path}' is not the name of a file")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, mode) as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        raise Problem(f"cannot write {path}: {error.strerror or error}; "
                      "what is already there is whole, so mend that and run it again")
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_json(path, content):
    """Write `content` as JSON, all or nothing, see `atomic_file`."""
    with atomic_file(path, "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")


class Reading(NamedTuple):
    q: np.ndarray              # (N,) rad
    dq: np.ndarray             # (N,) rad/s
    current: np.ndarray        # (N,) A
    time: float                # s, when the motors answered


class Hand:
    """What every hand has in common: the only door through which a command passes, but for `press`
    of --check. A hand of its own kind adds `read()`, which returns a `Reading`, and
    `_write(target)`."""
    realtime = True            # the caller keeps the time; False: a command takes one tick
    target = None              # (N,) rad, last command; None while torque is off

    def __init__(self):
        self.events = []       # (time.time(), kind, text) of everything unusual

    def command(self, target):
        """Send joint targets (N,) rad, clipped to the joint limits and then to MAX_STEP from the
        last command (torque off: from the joints), so a joint outside comes back step by step.
        Returns what was sent. ValueError on NaN or a wrong shape, before anything moves."""
        target = np.asarray(target, float)
        if target.shape != (N,) or not np.isfinite(target).all():
            raise ValueError(f"a command is {N} finite joint angles in rad, not {target}")
        if self.target is None:
            self._engage()
        last = self.read().q if self.target is None else self.target
        target = np.clip(target, LOW, HIGH)
        self.target = np.clip(target, last - MAX_STEP, last + MAX_STEP)
        self._write(self.target)
        return self.target

    def move_to(self, q):
        """Go to q (N,) rad by the `stages` of the table at MOVE_SPEED; returns q as read."""
        q = np.clip(np.asarray(q, float), LOW, HIGH)
        here = self.read().q if self.target is None else self.target
        for goal in stages(here, q):
            seconds = np.abs(goal - here).max() / MOVE_SPEED
            steps = max(1, int(np.ceil(seconds * CONTROL_HZ)))
            way = iter(np.linspace(here, goal, steps + 1)[1:])
            drive(self, lambda q: next(way), steps)
            here = goal
        return self.read().q

    def tick(self):
        """Wait for the next control tick, 50 ms after the last. A virtual hand need not."""
        if self.realtime:
            now = time.monotonic()
            due = getattr(self, "_due", now) + 1 / CONTROL_HZ
            self._due = max(due, now - 1 / CONTROL_HZ)       # after a pause: do not catch up
            time.sleep(max(0.0, self._due - now))

    def rest(self):
        """Torque off until the next command: for pauses longer than SILENCE."""
        self.target = None

    def _engage(self):
        """Torque on at the present pose, before the first command."""

    def close(self):
        """Let go and leave. May be called twice."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def drive(hand, act, steps, watch=None):
    """The control loop, `steps` times: read, command act(q), wait for the tick.

    act(q (N,) rad) -> target (N,) rad; `watch(hand)`, if given, is called after each step and
    ends the loop by returning True. Returns what was read and sent as a dict of arrays: q, dq,
    target, current (steps, N) float32 in rad, rad/s, rad, A, and time (steps,) float64 in s."""
    rows = []
    for _ in range(steps):
        q, dq, current, when = hand.read()
        rows.append((q, dq, hand.command(act(q)), current, when))
        hand.tick()
        if watch and watch(hand):
            break
    columns = dict(zip(("q", "dq", "target", "current", "time"), zip(*rows)))
    return {name: np.array(column, float if name == "time" else np.float32)
            for name, column in columns.items()}


# ------------------------------------------------------------ a real hand: Dynamixel motors
# Control table, units, shutdown: ROBOTIS e-manual, XL330-M288 and XC330-M288, Protocol 2.0.
BAUD = 4_000_000
SETTINGS = {                   # address, bytes, value; what is below 64 a motor remembers
    "return delay": (9, 1, 0), "drive mode": (10, 1, 0), "operating mode": (11, 1, 5),
    "secondary id": (12, 1, 255), "homing offset": (20, 4, 0), "temperature limit": (31, 1, 70),
    "PWM limit": (36, 2, 885), "startup": (60, 1, 0), "shutdown": (63, 1, 53),
    "bus watchdog": (98, 1, 0), "I gain": (82, 2, 0), "D gain": (80, 2, D_GAIN),
    "P gain": (84, 2, P_GAIN), "feedforward": (88, 4, 0), "goal PWM": (100, 2, 885),
    "acceleration": (108, 4, 0), "velocity": (112, 4, 0),
}                              # and by model: current limit (38, 2), goal current (102, 2)
TORQUE_OFF = bytes.fromhex("fffffd00fe060003400000 2e16")    # write 0 to address 64, to all
ERRORS = {0: "input voltage", 2: "overheating", 3: "encoder",
          4: "electrical shock", 5: "overload"}              # bits of address 70
FIRMWARE = 45                  # older X330 firmware is untested
TRIES = 6                      # of a packet, before BusError
ANSWER = 0.012                 # s, until an answer counts as lost; motors take 1-2 ms
SILENCE = 0.15                 # s without a sign of life until the guardian acts
WATCHDOG = 10                  # x 20 ms: the same in the motors, if their firmware heeds it
REST_ABOVE, REST_UNTIL = 65, 55                              # C; the motors shut down at 70
SLACK = 0.2                    # rad that a joint may read outside its limits
MAX_FAULTS = 8, 300            # stop after so many shutdowns within so many seconds
BY_ID = "/dev/serial/by-id"
CALIBRATION = Path(__file__).with_name("calibration.json")
BUSY = "is in use: close the other program (another run, Dynamixel Wizard)"
NO_PORT = {
    errno.ENOENT: f"is not there: is the U2D2 plugged in? Look in {BY_ID}",
    errno.EACCES: "is not for you: `sudo usermod -aG dialout $USER`, then log in again",
    errno.EBUSY: BUSY,
    errno.EAGAIN: BUSY,
}


def find_port():
    """The serial device of a U2D2 (FTDI FT232H), by its stable name; None without."""
    try:
        from serial.tools.list_ports import comports
    except ImportError:          # it comes with dynamixel-sdk
        return None
    found = [stable_name(p.device) for p in comports() if (p.vid, p.pid) == (0x0403, 0x6014)]
    if len(found) > 1:
        raise Problem(f"{len(found)} adapters found ({', '.join(found)}): choose one with --port")
    return found[0] if found else None


def stable_name(path):
    """/dev/serial/by-id/... of a device: ttyUSB0 may be ttyUSB1 when it is plugged in again."""
    real = os.path.realpath(path)
    links = sorted(glob.glob(f"{BY_ID}/*"))
    return next((link for link in links if os.path.realpath(link) == real), path)


def load_calibration(path=CALIBRATION):
    """Offsets (N,) rad of the motors' zeros, as `hand.py --check` found them; 0 without."""
    try:
        data = json.loads(Path(path).read_text())
        offset = np.array([data["offset"][j.name] for j in JOINTS], float)
        if data["hand"] != HAND:
            raise ValueError(f"calibration is of another hand, {data['hand']}")
        if not (np.abs(offset) <= SLACK).all():
            raise ValueError(f"offsets beyond {SLACK} rad: a horn is mounted wrongly")
        return offset
    except FileNotFoundError:
        return np.zeros(N)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Problem(f"broken calibration file ({type(error).__name__}: {error}) "
                      f"{path}: delete it and run `python hand.py --check`")


def guard(port, silence, off):
    """Body of the guardian, a process of its own: its stdin gets a byte with every packet.

    When that pipe closes (the driver let go, ended or was killed) or stays silent (it hangs or
    was frozen): torque off, ten times in case packets are lost. X330 firmware is known to report
    a bus watchdog and to keep driving, so the motors' own is not enough."""
    import os, select, signal, time
    for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(s, signal.SIG_IGN)
    os.write(1, b"!")
    while select.select([0], [], [], silence)[0] and os.read(0, 65536):
        pass
    os.close(0)                # now the driver's next sign of life fails, and tells it
    for _ in range(10):
        try:
            os.write(port, off)
        except OSError:        # adapter unplugged
            pass
        time.sleep(0.008)


GUARD = inspect.getsource(guard)       # this is what runs: somebody may edit the file meanwhile


def motors(which):
    """'motor 5 (mf_mcp)', for messages, of joints: a number, a list of numbers or a mask (N,)."""
    joints = [JOINTS[j] for j in np.atleast_1d(np.arange(N)[which])]
    names = ", ".join(f"{joint.motor_id} ({joint.name})" for joint in joints[:4])
    more = f" and {len(joints) - 4} more" if len(joints) > 4 else ""
    return f"motor{'s' * (len(joints) > 1)} {names}{more}"


class DynamixelHand(Hand):
    """A LEAP Hand behind a U2D2. `port` is a device path, or "auto" to look for it.

    Opening checks everything from the cable to the joint angles and moves nothing. The first
    command switches torque on at the present pose, under guard. Torque goes off with rest(),
    close(), the end of the process, whichever way it ends, with any BusError, and when the caller
    is silent for SILENCE s. `passed(line)` hears of every check that passed; `agree(text)` is
    asked before permanent settings are changed."""
    packet = port = guardian = None

    def __init__(self, port="auto", calibration=CALIBRATION, agree=lambda text: True,
                 passed=lambda line: None):
        super().__init__()
        try:
            import termios
            from dynamixel_sdk import Protocol2PacketHandler
        except ImportError as error:
            raise Problem(f"a real hand needs Linux or macOS, and dynamixel-sdk ({error}); "
                          "the virtual hand needs neither: --port sim:0")
        self.packet = Protocol2PacketHandler()
        self.path = find_port() if port == "auto" else stable_name(port)
        if self.path is None:
            raise Problem("no U2D2 found: plug it in, or name the device with --port")
        self.gone = OSError, termios.error       # what a port raises when it is unplugged
        self.next_health, self.hot = 0.0, REST_ABOVE
        self.offset = load_calibration(calibration)
        self.agree, self.passed = agree, passed
        try:
            self.bring_up()
        except BaseException:
            self.close()
            raise

    def _counts(self, q):
        """Motor positions in encoder counts (..., N) of joint angles q (..., N) rad."""
        return np.rint((ZERO + self.offset + SIGN * q) / COUNT)

    # ---- the bus
    def _open(self):
        """Open the port for this process alone, at BAUD."""
        from dynamixel_sdk import PortHandler
        patience = time.monotonic() + 1.0        # a killed run's guardian holds it for a moment
        while self.port is None:
            try:
                self.port = PortHandler(self.path)
                self.port.setBaudRate(BAUD)
                self.port.ser.exclusive = True
                self.port.ser.timeout = 0.001    # wait for bytes, do not spin
                self.port.ser.write_timeout = 1.0
            except (*self.gone, ValueError) as error:
                self._close_port()
                other = f"is not a working serial device: {error}"
                why = NO_PORT.get(getattr(error, "errno", None), other)
                if why != BUSY or time.monotonic() > patience:
                    raise Problem(f"port {self.path!r} {why}")
                time.sleep(0.05)
        with contextlib.suppress(OSError, ValueError, AttributeError, NotImplementedError):
            self.port.ser.set_low_latency_mode(True)         # FTDI on Linux: 1 ms, not 16

    def _close_port(self):
        port, self.port = self.port, None
        if port is not None and port.ser is not None:
            with contextlib.suppress(*self.gone):
                port.ser.close()

    def _sdk(self, call, *args):
        """One call of the SDK, after a sign of life to the guardian; a loop that hangs gives none.
        A port that is gone becomes a BusError."""
        if self.port is None:
            raise BusError(f"{self.path} is closed")
        try:
            if self.guardian is not None:
                os.write(self.guardian.stdin.fileno(), b".")
        except OSError:
            self._fail("guardian", f"no sign of life for {SILENCE} s (paused, frozen or too slow), "
                                   "so the guardian switched torque off")
        try:
            return call(self.port, *args)
        except self.gone as error:
            self._fail("unplugged", f"{self.path} is gone ({error}): plug the adapter in again")
        finally:
            self.port.is_using = False           # the SDK's busy flag stays behind after errors

    def _tell(self, address, size, values):
        """Sync write, which no motor answers. values: integers, one or one per motor."""
        data = np.broadcast_to(values, N).astype(f"<i{size}")[:, None].view(np.uint8)
        param = np.column_stack([MOTOR_ID, data]).ravel().tolist()
        self._sdk(self.packet.syncWriteTxOnly, address, size, param, len(param))

    def _ask(self, address, size):
        """Sync read: (N, size) uint8, this moment's answer of every motor, or BusError.

        What is missing is asked for again. Built on the SDK's packets, because its GroupSyncRead
        neither checks an answer's length nor hands on the alert bit."""
        answers = {}
        for attempt in range(TRIES):
            missing = [i for i in MOTOR_ID if i not in answers]
            self._sdk(self.packet.syncReadTx, address, size, missing, len(missing), False)
            wire = len(missing) * ((size + 11) * 10 / BAUD + 5e-4)       # factory return delay
            self.port.setPacketTimeoutMillis(1e3 * (ANSWER * 1.5 ** attempt + wire))
            while missing:
                raw, result = self._sdk(self.packet.rxPacket, False)
                # by its length field: the SDK unstuffs a packet in place and leaves its tail
                if result == 0 and raw[4] in missing and raw[5] + 256 * raw[6] == size + 4:
                    answers[raw[4]] = np.array(raw[9:9 + size], np.uint8)
                    if raw[8] & 0x80:
                        self.next_health = 0.0           # a motor is in error: look at once
                    missing = missing[missing.index(raw[4]) + 1:]        # they answer in order
                elif result == 0 and raw[4] in answers and [*answers[raw[4]]] != raw[9:9 + size]:
                    answers = {}                 # one of the two is old: trust none
                    break
                elif result == -3001 or self.port.isPacketTimeout():
                    break
            if attempt or len(answers) < N:      # more than was asked for: some of it is old
                late = [self._sdk(lambda port: port.ser.read(1024)) for _ in range(3)]       # 3 ms
                answers = {} if any(late) else answers
            if len(answers) == N:
                return np.stack([answers[i] for i in MOTOR_ID])
        self._let_go()                           # at once; then see who it is
        self._blame([j for j in range(N) if MOTOR_ID[j] not in answers])

    def _blame(self, lost):
        """BusError that says which of the joints `lost` do not answer, and why that may be."""
        heard = {j: [self._sdk(self.packet.ping, MOTOR_ID[j])[1] for _ in range(3)] for j in lost}
        silent = [j for j in lost if 0 not in heard[j]]
        garbled = [j for j in silent if -3002 in heard[j]]
        if garbled:
            text = (f"{motors(garbled)}: garbled answers, as when two motors share an id: connect "
                    "one at a time and set ids with Dynamixel Wizard")
        elif len(silent) == N:
            text = (f"no motor answers: is the 5 V supply on, the cable in the U2D2's TTL socket, "
                    f"and are they set to {BAUD} baud (rate 6, with Dynamixel Wizard)?")
        else:
            text = f"{motors(silent or lost)}: no answer: check its cable, the supply and its id"
        self._fail("silent", text)

    def _set(self, address, size, values, name):
        """Write to all motors and read back until it is so, or BusError."""
        want = np.broadcast_to(values, N).astype(np.int64) % (1 << 8 * size)
        for _ in range(TRIES):
            self._tell(address, size, values)
            got = _integers(self._ask(address, size), 0, size) % (1 << 8 * size)
            if (got == want).all():
                return
        j = np.argmax(got != want)
        self._fail("refused", f"{motors(j)} refuses {name} {want[j]} and keeps {got[j]}")

    # ---- events and letting go
    def _fail(self, kind, text):
        """Let go and raise BusError, or Problem when motors shut down again and again."""
        self._let_go()
        self._note(kind, text)
        most, seconds = MAX_FAULTS
        recent = [other for when, other, _ in self.events
                  if other in ERRORS.values() and when > time.time() - seconds]
        if kind in recent and len(recent) >= most:
            raise Problem(f"{len(recent)} shutdowns within {seconds} s: let the hand cool, check "
                          f"load, supply and cables; last: {text}")
        state = "the hand has let go"
        if kind in ("unplugged", "silent"):
            state = "torque may still be on there: use the supply's switch"
        raise BusError(f"{text}; {state}")

    def _note(self, kind, text):
        self.events.append((time.time(), kind, text))

    def _let_go(self):
        """Torque off, in whatever state we are: the guardian does it, and we once more."""
        self.target = None
        guardian, self.guardian = self.guardian, None
        if guardian is not None:
            guardian.stdin.close()
            try:
                guardian.wait(1.0)
            except subprocess.TimeoutExpired:
                guardian.kill()
            guardian.stdout.close()
        if self.port is not None:
            with contextlib.suppress(*self.gone):
                self.port.ser.write(3 * TORQUE_OFF)

    def rest(self):
        self._let_go()
        self._set(64, 1, 0, "torque")

    def close(self):
        self._let_go()
        self._close_port()

    def reconnect(self, patience=600):
        """After a BusError: find the adapter, reboot motors in error, wait until they are cool.
        Problem when `patience` (s) ends."""
        until, before = time.monotonic() + patience, len(self.events)
        while True:
            self.close()
            try:
                self.bring_up()
                return self._note("ready", "connected again")
            except Problem as problem:
                # a try that fails is no new fault, but may have changed something
                done = [e for e in self.events[before:] if e[1] in ("reboot", "setting")]
                self.events[before:] = done
                if time.monotonic() > until:
                    raise Problem(f"gave up after {patience:g} s: {problem}") from None
            time.sleep(2.0)

    # ---- from the cable to a hand that can be moved
    def bring_up(self):
        """Check everything without moving; the first thing that is wrong raises Problem."""
        self._open()
        self.passed(f"port         {self.path}")
        self._tell(64, 1, 0)                     # let go, whoever drove before
        self._tell(68, 1, 2)                     # answer to everything...
        self._set(64, 1, 0, "torque")            # ...also to this
        table = self._ask(0, 64)
        models, firmware = _integers(table, 0, 2), table[:, 6]
        unknown, old = ~np.isin(models, list(MODELS)), firmware < FIRMWARE
        if unknown.any():
            raise Problem(f"{motors(unknown)}: model number {models[unknown][0]}, not in {MODELS}")
        if old.any():
            raise Problem(f"{motors(old)}: firmware {firmware.min()} is older than {FIRMWARE}: "
                          "update it with Dynamixel Wizard")
        self.passed(f"motors       {N} of {N}, firmware {', '.join(map(str, np.unique(firmware)))}")
        self._reboot_if_in_error()
        self._settings(models, table)
        self.passed("settings     operating mode 5, return delay 0, gains and limits of the table")
        self.passed(f"power        {self.health()}, no error flags")
        q = self.read().q
        outside = (q < LOW - SLACK) | (q > HIGH + SLACK)
        if outside.any():
            angle, low, high = np.rad2deg([q, LOW, HIGH])[:, outside.argmax()]
            raise Problem(f"{motors(outside)}: reads {angle:.0f} degrees, limits are {low:.0f} to "
                          f"{high:.0f} (a flat open hand reads 0): horn or motor mounted wrongly, "
                          "or ids swapped")
        self.passed("joints       all within their limits")
        self.hot = REST_ABOVE

    def _settings(self, models, remembered):
        """Give every motor the settings of the table. `remembered` (N, 64): what it has of them."""
        limit = np.rint([1000 * CURRENT_LIMIT[m] for m in models]).astype(int)       # mA
        by_model = {"current limit": (38, 2, limit), "goal current": (102, 2, limit)}
        for name, (address, size, value) in (SETTINGS | by_model).items():
            if address < 64:
                now = _integers(remembered, address, size) % (1 << 8 * size)
                wrong = now != value
                if not wrong.any():
                    continue
                must = np.broadcast_to(value, N)[wrong][0]
                text = f"{motors(wrong)}: {name} is {now[wrong][0]}, must be {must}"
                if not self.agree(f"{text}. Set it?"):
                    raise Problem(f"{text}: answer yes to have it set")
                self._note("setting", text)
            self._set(address, size, value, name)

    def _reboot_if_in_error(self):
        """Only a reboot brings back a motor that has shut down. It forgets its RAM."""
        for _ in range(3):
            flags = self._ask(70, 1)[:, 0]
            if not flags.any():
                return
            text = f"{motors(flags > 0)}: {_error_names(flags)}"
            self._note("reboot", text)
            sick = [i for i, flag in zip(MOTOR_ID, flags) if flag]
            for i in sick:
                self._sdk(self.packet.reboot, i)
            until = time.monotonic() + 2.0
            while time.monotonic() < until and any(self._sdk(self.packet.ping, i)[1] for i in sick):
                pass
        raise Problem(f"{text} after three reboots: check supply, load and cable, or replace it")

    # ---- moving
    def health(self):
        """Torque, error flags, voltage and temperature of every motor, asked for once a second.
        Returns the ranges as text. Lets go and raises when a motor is not well."""
        self.next_health = time.monotonic() + 1.0
        status, power = self._ask(64, 35), self._ask(144, 3)
        flags, degrees = status[:, 6], power[:, 2]
        limp = (status[:, 0] == 0) | (status[:, 34] == 255)  # torque off, or watchdog tripped
        volts = 0.1 * _integers(power, 0, 2)
        if flags.any():
            names = _error_names(flags)
            self._fail(names.split(",")[0], f"{motors(flags > 0)} shut down: {names}")
        if degrees.max() >= self.hot:
            self.hot = REST_UNTIL
            self._fail("rest", f"{motors(degrees.argmax())} is at {degrees.max()} C: resting until "
                               f"below {REST_UNTIL} C")
        if self.guardian is not None and limp.any():
            self._fail("torque", f"{motors(limp)} lost torque without an error, "
                                 "as after an interruption of supply or data: check its plugs")
        text = f"{volts.min():.1f}-{volts.max():.1f} V"
        if volts.min() < VOLTAGE[0] or volts.max() > VOLTAGE[1]:
            self._fail("input voltage", f"supply at the motors is {text}, must be "
                                        f"{VOLTAGE[0]}-{VOLTAGE[1]} V: check supply and plugs")
        return f"{text}, {degrees.min()}-{degrees.max()} C"

    def read(self):
        if time.monotonic() >= self.next_health:
            self.health()
        before = time.monotonic()
        raw = self._ask(126, 10)                 # current, velocity, position
        after = time.monotonic()
        if self.next_health == 0.0:              # alert bit: these motors have let go
            self.health()
        q = SIGN * (_integers(raw, 6, 4) * COUNT - ZERO - self.offset)
        dq = SIGN * _integers(raw, 2, 4) * RPM
        current = SIGN * _integers(raw, 0, 2) * 1e-3
        return Reading(q, dq, current, (before + after) / 2)

    def _write(self, target):
        self._tell(116, 4, self._counts(target))

    def _engage(self):
        """Torque on at the present pose, under guard, or off again and BusError."""
        if self.port is None:
            raise BusError(f"{self.path} is closed")
        port = self.port.ser.fileno()
        code = GUARD + f"\nguard({port}, {SILENCE}, {TORQUE_OFF})"
        self.guardian = subprocess.Popen(
            [sys.executable, "-ISc", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            bufsize=0, pass_fds=[port], start_new_session=True)
        os.set_blocking(self.guardian.stdin.fileno(), False)
        out = self.guardian.stdout
        if not select.select([out], [], [], 5.0)[0] or out.read(1) != b"!":
            self._fail("guardian", "the guardian did not start, and without it there is no torque")
        self._set(98, 1, 0, "bus watchdog")      # one that has tripped refuses goals
        self._set(116, 4, _integers(self._ask(132, 4), 0, 4), "goal position")
        self._set(98, 1, WATCHDOG, "bus watchdog")
        self._set(64, 1, 1, "torque")


def _integers(raw, start, size):
    """Little-endian signed integers (n,) from the bytes start..start+size of each row."""
    part = np.ascontiguousarray(raw[:, start:start + size])
    return part.view(f"<i{size}")[:, 0].astype(np.int64)


def _error_names(flags):
    """Hardware error bits (n,) in words."""
    return ", ".join(name for bit, name in ERRORS.items() if (flags >> bit & 1).any())


# -------------------------------------------------------------- from the cable to a working hand
# First what can be seen without moving (`DynamixelHand.bring_up`, as in every script). Then each
# joint by itself goes a little back and then softly against a stop, which the table knows: that
# shows whether it moves, whether it moves alone, and where its zero is.
SOFT = 350       # mA: 0.13 N m, a push of 1.3 N at a fingertip
NUDGE = 0.25     # rad, how far a joint goes back before it is pressed
PRESS = 0.08     # rad per tick, how fast it then goes to its stop
FINE = 0.12      # rad: as far as a zero may be off; further away something is mounted wrongly
END = 4.2        # rad: further than any joint goes, also mirrored or turned by 90 degrees
JAMMED = 0.1     # rad: a joint that moves less is jammed
ALONE = 0.02     # rad, how far the joints of other fingers may move
BENT = 1.2       # rad, of the base joint while a side joint is pressed

# The pose from which joints are pressed, for any direction of gravity. Curled, a finger is light
# enough to be lifted with SOFT (straight, 0.077 N m and friction are too much), and nothing is in
# its way: fingers are as wide as the gaps between them, so a side joint reaches its stop only when
# its finger is bent and its neighbours are not. A pip goes to its upper stop, for on its way to the
# lower one the links meet first.
CURLED = np.clip([joint.curl for joint in JOINTS], LOW, HIGH)
TOWARD = np.array([joint.stop for joint in JOINTS])               # upper stop +1, lower -1
STOP = np.where(TOWARD > 0, HIGH, LOW)                            # rad


def check(argv=None):
    parser = argparse.ArgumentParser(
        prog="hand.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--check", action="store_true", required=True, help="walk from the cable to a working hand")
    add("--port", default="auto", help="serial device, or auto")
    add("--calibration", default=CALIBRATION, help="file for the zero offsets")
    args = parser.parse_args(argv)

    def agree(question):
        print(f"{question} [y/N] ", end="", flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def passed(line):
        print(f"ok  {line}", flush=True)

    with DynamixelHand(args.port, args.calibration, agree, passed) as hand:
        if not agree("Each joint will now move, softly, for about a minute. "
                     "Is the space around the fingers free?"):
            print("not moved; everything that can be checked without moving is right")
            return
        hand._set(102, 2, SOFT, "goal current")
        stops, moved, others = press_each(hand)
        hand.rest()
    judge(stops, moved, others)
    passed("movement     every joint moves, and only that one")
    if not agree(f"Did {WATCH}?"):
        raise Problem("joints move in the wrong order: motor ids are swapped, or a side motor is "
                      "mounted mirrored; the table of hand.py has the ids")
    passed(f"zeros        within {np.rad2deg(np.abs(stops - STOP).max()):.1f} degrees of the table")
    offset = hand.offset + SIGN * (stops - STOP)
    far = np.abs(offset) > SLACK                 # by and by
    if far.any():
        raise Problem(f"{motors(far)}: its zero has gone by more than {np.rad2deg(SLACK):.0f} "
                      "degrees in all: its horn slips, or is mounted wrongly")
    save_calibration(args.calibration, offset)
    print(f"zero offsets written to {args.calibration}")


def press_each(hand):
    """Press every joint by itself, and print how it did. Three (N,) arrays in rad: where it came to
    rest (nan: never), how far it moved, and the most that a joint of another finger moved."""
    stops, moved, others = np.zeros((3, N))
    print("\njoint      moved  others    stop  offset  (degrees)")
    for j, joint in enumerate(JOINTS):
        hand.move_to(CURLED)
        pose = CURLED.copy()
        if SIDE[j]:
            pose[BASE & (np.array(FINGER) == FINGER[j])] = BENT
        hand.move_to(pose)
        stops[j], travel = press(hand, j)
        moved[j] = travel[j]
        others[j] = max(travel[k] for k in range(N) if FINGER[k] != FINGER[j])
        degrees = np.rad2deg([moved[j], others[j], stops[j], stops[j] - STOP[j]])
        print(f"{joint.name:8}", *(f"{angle:7.1f}" for angle in degrees), flush=True)
    hand.move_to(REST)
    return stops, moved, others


def press(hand, j):
    """Joint j a little back and then softly against its stop. Returns where it came to rest (rad,
    nan if it turns and turns) and how far every joint moved (N,)."""
    side, back = TOWARD[j], hand.target.copy()
    back[j] = hand.read().q[j] - side * NUDGE
    drive(hand, lambda q: back, 20)                      # until motors have taken up their load
    goal, seen = hand.target.copy(), [hand.read().q]
    still = 0                                            # ticks at rest, the goal being far away
    for _ in range(200):
        before = seen[-1][j]
        goal[j] = side * min(side * goal[j] + PRESS, side * before + 0.3)
        hand._tell(116, 4, hand._counts(goal))           # beyond the limits: only here, and soft
        hand.tick()
        seen.append(hand.read().q)
        now = seen[-1][j]
        far = side * (goal[j] - now) > 0.2
        still = still + 1 if far and abs(now - before) < 0.01 else 0
        if still == 4 or side * goal[j] > END:
            break
    hand.target = np.clip(seen[-1], LOW, HIGH)
    return (now if still == 4 else np.nan), np.ptp(seen, axis=0)


def judge(stops, moved, others):
    """One clear line about what is wrong: what nothing else can bring about, or else all that is
    seen, since one may be the consequence of another."""
    beyond = TOWARD * (stops - STOP)             # rad; negative: before its stop of the table
    jammed, drawn = moved < JAMMED, others > ALONE
    short = (beyond < -FINE) & ~jammed & ~drawn
    short &= beyond <= beyond[short].min(initial=0.0)    # the worst: others may run into it
    mounting = ("the part on its horn must be turned by a tooth (14 degrees) or by 90 degrees, it "
                "turns the wrong way (mounted mirrored, or SIGN in the table of hand.py), or its "
                "id is swapped with another one of its finger")
    certain = (
        (np.isnan(stops), "turns without end: no horn screw, or the finger is not on its horn"),
        (beyond > FINE, f"goes further than it can, see its offset above: {mounting}"))
    likely = (
        (jammed, "does not move: jammed, something in its way, or its horn screw is too tight"),
        (short, f"stops early, see its offset above: something blocks the joint, or {mounting}"),
        (drawn, "moves another finger's joint as well: tied together, wedged, or a cable pulls"))
    for findings in certain, likely:
        lines = [f"{motors(which)}: {text}" for which, text in findings if which.any()]
        if lines:
            raise Problem("; ".join(lines))


def save_calibration(path, offset):
    offsets = {joint.name: round(float(o), 5) for joint, o in zip(JOINTS, offset)}
    save_json(path, {"hand": HAND, "offset": offsets})


if __name__ == "__main__":
    run(check)
