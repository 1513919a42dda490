"""The world: the hand in MuJoCo, the objects it turns, the box of balls it learns in, and the
virtual hand, which differs from the simulator that trains where a real hand would.

    env = Rotation(512, objects_of("cuboid+cylinder"), ["palm_up", "palm_down"], ["+z", "-z"])
    env.step(next_target(env.target, delta))           # 512 hands, one control step of 50 ms

    with open_hand("sim:7", wrist="palm_down") as hand:            # or "auto", "/dev/ttyUSB0"
        reading = hand.read()

Everything about the hand comes from the table in hand.py; everything about the world is here.

The frame of the world is the frame of the hand: z points out of the palm, x along the fingers, and
the thumb of the right hand is at -y. The wrist does not turn the hand, it turns gravity; so a
policy, an axis and an observation mean the same for every wrist.
"""
import atexit
import copy
import ctypes.util
import hashlib
import itertools
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

# Films are rendered without a screen. MuJoCo reads this variable when it is imported, and cannot be
# imported at all if it says egl and there is none.
if sys.platform == "linux" and ctypes.util.find_library("EGL"):
    os.environ.setdefault("MUJOCO_GL", "egl")
# Threads that spin while they wait take the cores from a second script. OpenMP reads this when
# torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import mujoco
import numpy as np
import torch
from mujoco import rollout

import hand as H

# a blow-up is counted by `Rotation`, not logged to a file in the working directory
mujoco.set_mju_user_warning(lambda text: None)

CONTROL_HZ = H.CONTROL_HZ
SUBSTEPS = 6                     # 120 Hz, as the paper
EPISODE = 400                    # control steps, 20 s
ALPHA = 1 / 24                   # rad, the largest move of a target in one control step
# A policy's targets stay this near the canonical grasp (rad): with the whole range it learns to
# twist the object half a turn in one stroke and to drop it; so it has to take a new hold.
NEAR = np.maximum(H.LOW, H.GRASP - H.REACH)
FAR = np.minimum(H.HIGH, H.GRASP + H.REACH)
W = 10                           # control steps in a history
FALL = 0.06 * H.SCALE            # m from where the grasp held it: further, an object has fallen
IMPOSSIBLE = 200                 # rad/s or m/s: faster than this is not physics but a blow-up
CACHE = Path(os.environ.get("DEXNDM_CACHE", Path.home() / ".cache" / "dexndm"))

# Wrist orientations: the rotation (quaternion w x y z) that takes the palm-up hand to this wrist.
_S = 0.5 ** 0.5
WRISTS = {
    "palm_up": (1, 0, 0, 0),
    "palm_down": (0, 1, 0, 0),
    "thumb_up": (_S, -_S, 0, 0),
    "thumb_down": (_S, _S, 0, 0),
    "base_up": (_S, 0, _S, 0),
    "base_down": (_S, 0, -_S, 0),
}
AXES = {
    "+x": (1, 0, 0), "-x": (-1, 0, 0),
    "+y": (0, 1, 0), "-y": (0, -1, 0),
    "+z": (0, 0, 1), "-z": (0, 0, -1),
}


ANY = "any"                      # drawn anew for every episode


def wrist_of(name, rng=None):
    """The quaternion (4,) of a wrist: one of WRISTS, "any" (drawn from `rng`), or four numbers as
    text. Raises ValueError, of which argparse makes one line."""
    return _named_or_drawn(name, WRISTS, 4, rng)


def axis_of(name, rng=None):
    """The direction (3,) of a rotation axis: one of AXES, "any" or three numbers, as `wrist_of`."""
    return _named_or_drawn(name, AXES, 3, rng)


def _named_or_drawn(name, known, n, rng):
    if name == ANY and rng:
        return unit(rng.normal(size=n))
    values = known[name] if name in known else [float(word) for word in name.split()]
    if len(values) != n or not 0 < np.dot(values, values) < np.inf:
        raise ValueError(name)
    return unit(values)


def unit(v):
    return np.asarray(v, float) / np.linalg.norm(v)


def choice(name, of, rng):
    """`name`, or numbers as text in place of "any"; `of` is `wrist_of` or `axis_of`."""
    return " ".join(f"{x:.4f}" for x in of(name, rng)) if name == ANY else name


def wrist_name(text):
    """A wrist on the command line."""
    if text != ANY:
        wrist_of(text)
    return text


def axis_name(text):
    """An axis on the command line: a name, three numbers, or +z as z+ (argparse takes a word that
    begins with a minus for an option)."""
    text = text[::-1] if text[::-1] in AXES else text
    if text != ANY:
        axis_of(text)
    return text


def gravity(wrist):
    """Direction of gravity in the frame of the hand, unit vectors (n, 3), for wrists (n, 4)."""
    return rotate(conjugate(np.atleast_2d(wrist)), np.array([0.0, 0.0, -1.0]))


# ---------------------------------------------------------------- quaternions, batched (n, 4)
def conjugate(a):
    return a * np.array([1.0, -1.0, -1.0, -1.0])


def multiply(a, b):
    w, x, y, z = np.moveaxis(a, -1, 0)
    W_, X, Y, Z = np.moveaxis(b, -1, 0)
    return np.stack([
        w * W_ - x * X - y * Y - z * Z,
        w * X + x * W_ + y * Z - z * Y,
        w * Y - x * Z + y * W_ + z * X,
        w * Z + x * Y - y * X + z * W_,
    ], -1)


def rotate(a, v):
    """Rotate vectors v (n, 3) by quaternions a (n, 4): v + 2 u x (u x v + w v), u = vector part."""
    u = a[..., 1:]
    return v + 2 * np.cross(u, np.cross(u, v) + a[..., :1] * v)


def rotation_between(before, after):
    """Axis times angle (n, 3) rad, at most pi, of the turn from orientation `before` to `after`
    (n, 4)."""
    a = multiply(after, conjugate(before))
    a = np.where(a[..., :1] < 0, -a, a)
    s = np.linalg.norm(a[..., 1:], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(s, a[..., :1])
    return a[..., 1:] * np.where(s > 1e-9, angle / np.maximum(s, 1e-9), 2.0)


def from_axis_angle(axis, angle):
    axis, angle = np.asarray(axis, float), np.asarray(angle, float)[..., None]
    return np.concatenate([np.cos(angle / 2), np.sin(angle / 2) * axis], -1)


# ---------------------------------------------------------------------------------- objects
class Object(NamedTuple):
    """A rigid body of primitives: parts = ((type, size, pos, quat), ...), sizes as MuJoCo takes
    them (half, m)."""
    name: str
    parts: tuple
    family: str = ""


def solid(name, *parts, scale=0.01):
    """An object of several primitives, parts = (type, half sizes, centre[, quaternion]) in cm."""
    parts = [(kind, size, pos, turn[0] if turn else (1, 0, 0, 0))
             for kind, size, pos, *turn in parts]
    return scaled(Object(name, tuple(parts)), scale * H.SCALE)


def box(x, y, z):
    """A cuboid with full edge lengths x, y, z in m on a hand of SCALE 1; z stands along the palm
    normal."""
    size = " x ".join(f"{100 * H.SCALE * edge:.2g}" for edge in (x, y, z))
    return solid(f"box {size} cm", ("box", (x / 2, y / 2, z / 2), (0, 0, 0)), scale=1)


def cylinder(d, h):
    """A standing cylinder, diameter and height in m on a hand of SCALE 1."""
    size = " x ".join(f"{100 * H.SCALE * edge:.2g}" for edge in (d, h))
    return solid(f"cylinder {size} cm", ("cylinder", (d / 2, h / 2), (0, 0, 0)), scale=1)


def scaled(obj, factor):
    """The same object, `factor` times as large."""
    parts = [(kind, tuple(round(float(factor * s), 5) for s in size),
              tuple(float(factor * p) for p in pos), quat)
             for kind, size, pos, quat in obj.parts]
    return obj._replace(parts=tuple(parts))


def about(axis, degrees):
    """A quaternion, as a tuple."""
    return tuple(from_axis_angle(AXES[axis], np.radians(degrees)).tolist())


ROUND = [
    solid("duck", ("ellipsoid", (3.2, 2.2, 2.0), (0, 0, -1)), ("sphere", (1.5,), (1.9, 0, 1.7)),
          ("ellipsoid", (0.9, 0.8, 0.4), (3.5, 0, 1.5))),
    solid("bunny", ("ellipsoid", (2.6, 2.0, 2.2), (0, 0, -1)), ("sphere", (1.5,), (1.7, 0, 1.2)),
          ("ellipsoid", (0.5, 0.5, 1.5), (1.4, 0.8, 3)),
          ("ellipsoid", (0.5, 0.5, 1.5), (1.4, -0.8, 3))),
    solid("bear", ("ellipsoid", (2.0, 2.2, 2.4), (0, 0, -1)), ("sphere", (1.7,), (0.3, 0, 2)),
          ("sphere", (0.6,), (0, 1.3, 3.2)), ("sphere", (0.6,), (0, -1.3, 3.2))),
    solid("elephant", ("ellipsoid", (2.7, 2.0, 2.0), (-0.8, 0, 0.6)),
          ("sphere", (1.5,), (1.9, 0, 1.2)), ("capsule", (0.5, 1.2), (3.2, 0, -0.6)),
          ("box", (1.9, 1.5, 0.9), (-0.8, 0, -2))),
    solid("teapot", ("ellipsoid", (2.4, 2.4, 2.0), (0, 0, 0)), ("sphere", (0.6,), (0, 0, 2.3)),
          ("capsule", (0.5, 1.0), (2.7, 0, 0.4), about("+y", 50)),
          ("box", (0.4, 0.4, 1.1), (-2.7, 0, 0))),
]
ANGULAR = [
    solid("cow", ("box", (2.6, 1.5, 1.3), (-0.6, 0, 0.6)), ("box", (0.9, 0.9, 0.9), (2.8, 0, 1.4)),
          ("box", (0.5, 1.4, 1.2), (1.3, 0, -1.8)), ("box", (0.5, 1.4, 1.2), (-2.5, 0, -1.8))),
    solid("hammer", ("cylinder", (0.9, 2.6), (0, 0, -0.9)), ("box", (2.0, 1.1, 1.1), (0, 0, 2.5))),
    solid("T", ("box", (3.0, 1.2, 1.0), (0, 0, 1.8)), ("box", (1.1, 1.2, 1.9), (0, 0, -1))),
    solid("L", ("box", (1.1, 1.3, 3.0), (-1.5, 0, 0)), ("box", (1.5, 1.3, 1.1), (1, 0, -1.9))),
    solid("cross", ("box", (3.0, 1.1, 1.1), (0, 0, 0)), ("box", (1.1, 3.0, 1.1), (0, 0, 0))),
    solid("star", *(("box", (3.0, 0.9, 1.2), (0, 0, 0), about("+z", turn))
                    for turn in (0, 60, 120))),
]
# Families and aspect ratios as in the paper: normal cylinders 1.6-2.4 (height over radius), normal
# cuboids up to 1.5 (longest over shortest edge), long cuboids 2.5-6.67, small cylinders 1.92-2.56,
# complex shapes in two families, because round ones learn far sooner, and the cube that everyone
# asks about. Nothing is ever trained with what is in "held_out".
FAMILIES = {
    "cube": [box(s, s, s) for s in (0.0525, 0.055, 0.0575)],
    "cuboid": [
        *(box(s, s, s * ratio) for s in (0.0525, 0.0575) for ratio in (1.0, 1.25)),
        box(0.055, 0.055 / 1.25, 0.055),
        box(0.05, 0.05, 0.075),
    ],
    "cylinder": [cylinder(d, d / 2 * ratio) for d in (0.0525, 0.055, 0.0575)
                 for ratio in (1.6, 2.0, 2.4)],
    "long": [
        box(0.035, 0.035, 0.0875), box(0.03, 0.03, 0.1), box(0.03, 0.04, 0.12),
        box(0.035, 0.035, 0.14), box(0.027, 0.027, 0.144), box(0.024, 0.024, 0.16),
    ],
    "small": [cylinder(d, d / 2 * ratio) for d in (0.025, 0.03, 0.035)
              for ratio in (1.92, 2.24, 2.56)],
    "round": [scaled(obj, size) for obj in ROUND for size in (0.9, 1.05)],
    "angular": [scaled(obj, size) for obj in ANGULAR for size in (0.9, 1.05)],
    "held_out": [
        cylinder(0.048, 0.042), cylinder(0.054, 0.075), cylinder(0.028, 0.05),
        box(0.048, 0.056, 0.064), box(0.026, 0.032, 0.08), box(0.032, 0.032, 0.128),
        box(0.015, 0.015, 0.175),
        solid("egg", ("ellipsoid", (2.4, 2.4, 3.2), (0, 0, 0))),
        solid("cat", ("ellipsoid", (2.6, 1.7, 1.8), (0, 0, -1)), ("sphere", (1.4,), (2, 0, 1.3)),
              ("capsule", (0.4, 1.3), (-2.4, 0, 1))),
        solid("mug", ("cylinder", (2.4, 2.8), (0, 0, 0)), ("box", (0.6, 0.4, 1.6), (2.8, 0, 0))),
        solid("jack", ("box", (3, 0.9, 0.9), (0, 0, 0)), ("box", (0.9, 3, 0.9), (0, 0, 0)),
              ("box", (0.9, 0.9, 3), (0, 0, 0))),
        solid("H", ("box", (0.9, 1.3, 2.8), (1.9, 0, 0)), ("box", (0.9, 1.3, 2.8), (-1.9, 0, 0)),
              ("box", (1.9, 1.3, 0.8), (0, 0, 0))),
    ],
}
FAMILIES = {family: [obj._replace(family=family) for obj in objects]
            for family, objects in FAMILIES.items()}


def objects_of(names):
    """The objects of a family, those of a name, or of several of these joined by "+". Raises
    `Problem` on unknown ones."""
    objects = list(itertools.chain(*FAMILIES.values()))
    found = [(name, FAMILIES.get(name) or [obj for obj in objects if obj.name == name])
             for name in names.split("+")]
    strange = [name for name, some in found if not some]
    if strange:
        raise H.Problem(f"no family or object is called {', '.join(strange)}; there are the "
                        f"families {', '.join(FAMILIES)}, and objects such as hammer")
    return [obj for _, some in found for obj in some]


# ------------------------------------------------------------------------------ the Chaos Box
class Balls(NamedTuple):
    """The Chaos Box: a closed box full of soft foam balls that press on the fingers at random.

    Nobody's box is the simulated one, so the simulator draws several (`Balls.drawn`) and every
    virtual hand has one of its own."""
    count: int = H.BALLS
    low: tuple = H.BOX[0]                    # m, corners of the box
    high: tuple = H.BOX[1]
    radius: tuple = (0.022 * H.SCALE, 0.030 * H.SCALE)       # m, smallest and largest
    mass: float = 0.008                      # kg
    softness: float = 0.01                   # s, time constant of a contact
    friction: float = 0.0                    # against fingers and balls
    rolls: bool = False
    seed: int = 0

    @classmethod
    def drawn(cls, rng):
        """Another box: +-1.5 cm on every side, balls of other size, mass and softness, as many as
        leave room for the fingers (a quarter of the usual box is balls)."""
        usual, smallest = cls(), H.SCALE * rng.uniform(0.019, 0.025)
        low = np.array(usual.low) + H.SCALE * rng.uniform(-0.015, 0.015, 3)
        high = np.array(usual.high) + H.SCALE * rng.uniform(-0.015, 0.015, 3)
        largest = smallest + H.SCALE * rng.uniform(0.003, 0.010)
        ball = 4 / 3 * np.pi * (0.5 * (smallest + largest)) ** 3
        return cls(
            count=min(28, round(rng.uniform(0.15, 0.25) * np.prod(high - low) / ball)),
            low=tuple(low),
            high=tuple(high),
            radius=(smallest, largest),
            mass=rng.uniform(0.005, 0.015),
            softness=rng.uniform(0.007, 0.018),
            friction=rng.uniform(0.2, 0.8),
            rolls=bool(rng.random() < 0.5),
            seed=int(rng.integers(1 << 30)))


def _add_balls(spec, balls):
    """Walls (planes) and balls. MuJoCo's contacts are as stiff as the masses in them are heavy:
    without the armature, which has inertia and no weight, a finger would pass through a ball of
    8 g and be thrown out of it. Balls that do not roll load the joints as well at half the degrees
    of freedom."""
    low, high = np.array(balls.low), np.array(balls.high)
    for axis in range(3):
        for sign, edge in ((1.0, low), (-1.0, high)):
            spec.worldbody.add_geom(
                type=mujoco.mjtGeom.mjGEOM_PLANE, size=(0.3, 0.3, 0.01), contype=0,
                conaffinity=BALL, condim=1, rgba=(0.6, 0.7, 0.8, 0.1),
                pos=np.where(np.arange(3) == axis, edge, (low + high) / 2),
                zaxis=sign * np.eye(3)[axis])
    rng = np.random.default_rng(balls.seed)
    for i in range(balls.count):
        radius = rng.uniform(*balls.radius)
        inside = low + 0.03 * H.SCALE, high - 0.03 * H.SCALE
        body = spec.worldbody.add_body(name=f"ball{i}", pos=rng.uniform(*inside))
        for axis in np.eye(3):
            body.add_joint(type=mujoco.mjtJoint.mjJNT_SLIDE, axis=axis, damping=0.3, armature=0.03)
        if balls.rolls:
            body.add_joint(type=mujoco.mjtJoint.mjJNT_BALL, damping=1e-5,
                           armature=0.03 * radius ** 2)
        body.add_geom(
            type=mujoco.mjtGeom.mjGEOM_SPHERE, size=(radius, 0, 0), mass=balls.mass, contype=BALL,
            conaffinity=MEETS_BALLS, condim=3 if balls.friction else 1, priority=2,
            friction=(balls.friction, 0, 0), solref=(balls.softness, 1), rgba=(0.3, 0.55, 0.85, 1))


HELD = 5.0                       # N m s / rad, of fingers that somebody holds while balls settle


def stirred(model, rng):
    """A configuration (nq,) of a model of the Chaos Box: its rest, with the balls thrown about."""
    qpos = model.qpos0.copy()
    slides = model.jnt_qposadr[model.jnt_type == mujoco.mjtJoint.mjJNT_SLIDE]
    qpos[slides] += rng.uniform(-0.02, 0.02, len(slides))
    return qpos


# ------------------------------------------------------------------------------------ the model
GEOM_TYPE = {kind: getattr(mujoco.mjtGeom, f"mjGEOM_{kind.upper()}")
             for kind in ("capsule", "sphere", "box", "cylinder", "ellipsoid")}
# A rubber tip resists sliding and, with a soft contact patch, twisting; a printed link is smoother.
# A contact between a geom of the hand (priority 1) and an object (0) is as the hand's geom says.
TIP_CONDIM, LINK_CONDIM = 4, 3
PATCH = 0.005                    # m, torsional over sliding friction
PLASTIC = 0.45                   # friction of a link over that of a tip
# Collision bits. Links of different fingers collide from the middle link on, where they can meet.
PALM, INNER, BALL, OBJECT, FINGER = 1, 2, 4, 8, 16          # finger f has the bit FINGER << f
FINGERS = ((1 << len(H.FINGERS)) - 1) * FINGER
MEETS_BALLS = PALM | INNER | BALL | FINGERS


def build(obj=None, *, links=H.LINKS, balls=None, wrist=(1, 0, 0, 0), cone="elliptic", impratio=10,
          timestep=1 / (CONTROL_HZ * SUBSTEPS), integrator="implicitfast", damping=H.DAMPING,
          armature=H.ARMATURE, backlash=None):
    """The hand as an `MjSpec`, with an object in its fingers, with `balls` around it, or free.

    links: the table, or one that differs from it. damping, armature: SI units, scalar or (N,).
    `backlash` (N,) rad adds a passive play joint after every motor and leaves the actuators out
    (the virtual hand drives its motors itself).

    The contact settings are converged, see `tests/benchmark.py --only physics`: the elliptic cone
    with impratio 10 holds without slow slip (with the pyramidal cone and impratio 1 a policy learns
    to live off the creep), and a contact's time constant of 20 ms is longer than two steps.
    """
    spec = mujoco.MjSpec()
    spec.compiler.degree = False
    option = spec.option
    option.timestep, option.impratio = timestep, impratio
    option.cone = getattr(mujoco.mjtCone, f"mjCONE_{cone.upper()}")
    option.integrator = getattr(mujoco.mjtIntegrator, f"mjINT_{integrator.upper()}")
    option.gravity = 9.81 * gravity(wrist)[0]
    # The sparse Newton solver of MuJoCo 4.0.0 now and then returns 1000 rad/s among balls
    # (google-deepmind/mujoco #3767, mended in 4.0.1); the dense one does not.
    option.jacobian = mujoco.mjtJacobian.mjJAC_DENSE
    # the same trajectories as with 100 iterations and 1e-8, faster
    option.iterations, option.tolerance = 20, 1e-7
    # a tree of boxes for each link costs more than it saves where a link has a few shapes
    option.disableflags |= mujoco.mjtDisableBit.mjDSBL_MIDPHASE

    _add_hand(spec, links, damping, armature, backlash)
    if obj is not None:
        _add_object(spec, obj)
    if balls is not None:
        _add_balls(spec, balls)
    spec.add_texture(
        name="sky", type=mujoco.mjtTexture.mjTEXTURE_SKYBOX, width=64, height=64,
        builtin=mujoco.mjtBuiltin.mjBUILTIN_GRADIENT, rgb1=(0.9, 0.93, 0.96), rgb2=(0.7, 0.75, 0.8))
    spec.visual.headlight.ambient = (0.45, 0.45, 0.45)
    spec.visual.headlight.diffuse = (0.6, 0.6, 0.6)
    return spec


def _add_hand(spec, links, damping, armature, backlash):
    damping, armature, stiffness, friction, torque = (
        np.broadcast_to(np.asarray(values, float), (H.N,))
        for values in (damping, armature, H.STIFFNESS, H.FRICTION, H.TORQUE))
    bodies = {None: spec.worldbody}
    for link in links:
        body = bodies[link.name] = bodies[link.parent].add_body(
            name=link.name, pos=link.pos, quat=link.quat, mass=link.mass, ipos=link.com,
            iquat=link.inertia_quat, inertia=link.inertia, explicitinertial=True)
        if link.joint:
            i, name = H.JOINTS.index(link.joint), link.joint.name
            body.add_joint(
                name=name, axis=link.joint.axis, range=(link.joint.low, link.joint.high), limited=1,
                armature=armature[i], frictionloss=friction[i],
                damping=0 if backlash is None else damping[i])
            if backlash is None:
                motor = spec.add_actuator(
                    name=name, target=name, trntype=mujoco.mjtTrn.mjTRN_JOINT, forcelimited=1,
                    forcerange=(-torque[i], torque[i]))
                motor.set_to_position(kp=stiffness[i], kv=damping[i])
            else:                           # light, hardly damped: it rattles between the teeth
                body.add_joint(
                    name=f"{name}_play", axis=link.joint.axis, limited=1, damping=0.001,
                    armature=1e-5, range=(-backlash[i] / 2, backlash[i] / 2))
        if link.name in H.TIPS:
            body.add_site(name=link.name, pos=H.TIPS[link.name], group=5)
            spec.add_sensor(
                name=f"{link.name}_pos", type=mujoco.mjtSensor.mjSENS_FRAMEPOS,
                objtype=mujoco.mjtObj.mjOBJ_SITE, objname=link.name)
        bit = PALM if not link.finger else INNER
        if link.name in H.OUTER:
            bit = FINGER << H.FINGERS.index(link.finger)
        others = 0 if bit == INNER else FINGERS & ~bit
        for k, shape in enumerate(link.shapes):
            is_tip = link.name in H.TIPS and k == len(link.shapes) - 1
            meets = OBJECT if is_tip or not link.boxes else 0
            _add_shape(body, shape, f"{link.name}_tip" if is_tip else "",
                       contype=bit, conaffinity=BALL | others | meets)
        for box in link.boxes:
            if box != link.boxes[-1] or link.name not in H.TIPS:
                _add_shape(body, ("box", *box), contype=0, conaffinity=OBJECT)


def _add_shape(body, shape, tip="", **collides):
    kind, *place = shape
    if kind == "capsule":
        start, end, radius = place
        where = dict(fromto=(*start, *end), size=(radius, 0, 0))
    else:
        centre, size, *quat = place
        where = dict(pos=centre, size=np.resize([*size, 0, 0], 3))
        where |= dict(quat=quat[0]) if quat else {}
    body.add_geom(
        name=tip, type=GEOM_TYPE[kind], priority=1, **where, **collides,
        condim=TIP_CONDIM if tip else LINK_CONDIM,
        friction=(1, PATCH, 1e-4) if tip else (PLASTIC, 0, 0),
        rgba=(0.9, 0.9, 0.92, 1) if tip else (0.25, 0.25, 0.28, 1))


def add_parts(body, obj):
    """The geoms of an object, to a body of an `MjSpec`."""
    for kind, size, pos, quat in obj.parts:
        body.add_geom(
            type=GEOM_TYPE[kind], size=np.resize([*size, 0, 0], 3), pos=pos, quat=quat,
            density=1000, contype=OBJECT, conaffinity=0, rgba=(0.95, 0.6, 0.2, 1))


def _add_object(spec, obj):
    # not "simple": its centre of mass may be moved
    body = spec.worldbody.add_body(name="object", pos=CENTRE, simple=0)
    body.add_freejoint(name="object")
    add_parts(body, obj)
    found = 1 << int(mujoco.mjtConDataField.mjCONDATA_FOUND)
    force = 1 << int(mujoco.mjtConDataField.mjCONDATA_FORCE)
    net_force = 3
    for link in H.TIPS:                      # (found, force xyz in N, world frame) per fingertip
        sensor = spec.add_sensor(
            name=f"{link}_contact", type=mujoco.mjtSensor.mjSENS_CONTACT,
            objtype=mujoco.mjtObj.mjOBJ_BODY, objname="object",
            reftype=mujoco.mjtObj.mjOBJ_BODY, refname=link)
        sensor.intprm[:3] = found | force, net_force, 1


def set_object(model, data, mass, friction, centre, rubber=1.0, plastic=PLASTIC, patch=PATCH):
    """Give the object of a compiled model a mass (kg), a centre of mass (m, in its frame) and a
    sliding friction against rubber tips; it slides more easily on the links. What MuJoCo derives
    from masses is derived again, or contacts would be regularised for another object. Overwrites
    `data`."""
    body = model.body("object").id
    model.body_inertia[body] *= mass / model.body_mass[body]
    model.body_mass[body] = mass
    model.body_ipos[body] = centre
    hand = model.geom_priority == 1
    tips = hand & (model.geom_condim == TIP_CONDIM)
    model.geom_friction[hand, 0] = friction * plastic
    model.geom_friction[tips, :2] = friction * rubber, friction * rubber * patch
    mujoco.mj_setConst(model, data)


def _fingertips(q):
    """Fingertips (tips, 3) m at joint positions q (N,) of the table's hand."""
    model = build().compile()
    data = mujoco.MjData(model)
    data.qpos[:] = q
    mujoco.mj_kinematics(model, data)
    return data.site_xpos.copy()


try:
    _TIPS = _fingertips(H.GRASP)
except Exception as error:
    H.refuse(" ".join(f"MuJoCo cannot build it: {error}".split()))
CENTRE = _TIPS.mean(0)                       # m: where the object sits
if CENTRE[2] <= H.LINKS[0].pos[2]:
    H.refuse("z of the world does not point out of the palm: turn the first link")
if np.any(_TIPS < H.BOX[0]) or np.any(_TIPS > H.BOX[1]):
    H.refuse(f"fingertips at the grasp are outside of BOX: {_TIPS.round(3).tolist()}")


# ------------------------------------------------------------- what a policy does and what it sees
def next_target(target, delta):
    """a_t = a_{t-1} + ALPHA delta_t with |delta| <= 1, within the reach of a policy. (n, N) rad."""
    return np.clip(target + ALPHA * np.clip(delta, -1, 1), NEAR, FAR)


def begin_history(q, target):
    """A history (n, W, 2, N) float32 as if joints had always been at q with this target (n, N)."""
    pair = torch.stack([torch.as_tensor(q), torch.as_tensor(target)], 1).float()
    return pair[:, None].repeat(1, W, 1, 1)


def push_history(history, q, target):
    """The history one control step later: oldest first, the last pair is (q, target)."""
    pair = torch.stack([torch.as_tensor(q), torch.as_tensor(target)], 1).float()
    return torch.cat([history[:, 1:], pair[:, None]], 1)


OBSERVED = 2 * W * H.N + 4 + 3               # numbers in an observation
_GRASP = torch.tensor(H.GRASP, dtype=torch.float32)


def observation(history, wrist, axis):
    """What a real hand knows: the last W pairs of (measured position q_t, previous target a_{t-1}),
    the wrist (4), the axis (3). history (n, W, 2, N) rad -> float32 (n, OBSERVED).

    Positions are given relative to the canonical grasp and targets relative to the position: the
    same information, but the second number is then the load."""
    q, target = history[:, :, 0], history[:, :, 1]
    return torch.cat([
        (q - _GRASP).flatten(1),
        10 * (target - q).flatten(1),
        torch.as_tensor(wrist, dtype=torch.float32),
        torch.as_tensor(axis, dtype=torch.float32),
    ], 1)


# ------------------------------------------------------------------------- stepping in batches
# A state is time, qpos (joints; position and quaternion of the object), qvel (joints, object).
Q, POS, QUAT = slice(1, 1 + H.N), slice(1 + H.N, 4 + H.N), slice(4 + H.N, 8 + H.N)
QPOS, DQ, VEL = slice(1, 8 + H.N), slice(8 + H.N, 8 + 2 * H.N), slice(8 + 2 * H.N, None)
# What a designer cannot know. The first three are the paper's.
PAPER = ("mass", "friction", "push")
EVERYTHING = (*PAPER, "shape", "size", "centre", "wrist", "contact", "motor", "delay")
MASS = 0.01, 0.05                # kg
FRICTION = 0.5, 2.0              # of the object's surface
PUSH = 2 / CONTROL_HZ            # m/s: the paper's force of 2 * mass for one control step...
PUSH_PROBABILITY = 0.25          # ...in a quarter of them
TIP = 0.0015                     # +- m, radius and reach of a fingertip
WIDTH = 0.0007                   # +- m, half the width of a part of a link
SIZE = 0.03                      # +- share of the object's size
OFF_CENTRE = 0.003               # +- m, centre of mass
WRIST_ERROR = np.radians(5)      # how wrong a wrist is held, at most
CONTACT_TIME = 0.017, 0.030      # s, time constant of a contact with the object
STIFFNESS = 0.70, 1.05           # share of the table's
DRY_FRICTION = 0.7, 2.5          # share of the table's
LOAD_FRICTION = 0.0, 0.4         # N m of friction per N m of a hand's motors; XL330: about 0.25
UNEVEN = 0.7, 1.3                # share of it, from joint to joint
ZERO_ERROR = np.radians(0.7)     # +- rad, of an encoder
DELAY = 0.0, 0.015               # s, of a command, and of a reading


def random_pushes(rng, *shape):
    """Changes of the object's velocity (*shape, 3) m/s before a control step."""
    kicked = rng.random(shape) < PUSH_PROBABILITY
    return kicked[..., None] * rng.normal(0, PUSH, (*shape, 3))


def tilted(wrist, rng, largest):
    """The wrist (4,) turned by up to `largest` rad about a random axis."""
    error = from_axis_angle(axis_of(ANY, rng), rng.uniform(0, largest))
    return multiply(error, np.asarray(wrist, float))


def _varied_links(rng):
    """The table's links as somebody might make them: every part a little wider or narrower, tips a
    little longer or shorter and, on half of the hands, ellipsoids."""
    def varied(half):
        return tuple(half + rng.uniform(-WIDTH, WIDTH, 3))

    links, egg = [], rng.random() < 0.5
    for link in H.LINKS:
        is_tip = link.name in H.TIPS
        boxes = tuple((centre, varied(half), *quat) for centre, half, *quat in link.boxes)
        shapes = [(kind, centre, varied(place) if kind == "box" else place, *rest)
                  for kind, centre, place, *rest in link.shapes]
        if is_tip and egg:
            shapes[-1] = ("ellipsoid", *boxes[-1])
        elif is_tip:
            _, start, end, radius = shapes[-1]
            end = tuple(end + unit(np.subtract(end, start)) * rng.uniform(-TIP, TIP))
            shapes[-1] = ("capsule", start, end, radius + rng.uniform(-TIP, TIP))
        links.append(link._replace(shapes=tuple(shapes), boxes=boxes))
    return tuple(links)


class Trial(NamedTuple):
    """Everything that happens to one episode but what the hand does, so that two hands can be
    measured on the same."""
    obj: Object
    grasp: np.ndarray            # (2 N + 7,): joints, object position and quaternion, targets
    wrist: str
    axis: str
    mass: float
    friction: float
    pushes: np.ndarray           # (EPISODE, 3) m/s


def trials(objects, wrist, axes, n, seed):
    """n trials with the objects in turn; each depends on `seed` and its number alone. `wrist` and
    `axes` are names, also "any"."""
    grasps = {obj: grasp_cache(obj) for obj in objects}
    drawn = []
    for number in range(n):
        rng = np.random.default_rng([seed, number, 4])
        obj = objects[number % len(objects)]
        drawn.append(Trial(
            obj, rng.choice(grasps[obj]), choice(wrist, wrist_of, rng),
            choice(axes[rng.integers(len(axes))], axis_of, rng),
            rng.uniform(*MASS), rng.uniform(*FRICTION), random_pushes(rng, EPISODE)))
    return drawn


class Rotation:
    """n hands that each hold an object, stepped together on all cores (mujoco.rollout with a model
    for each environment).

    objects: list of `Object`, dealt out in turn; wrists, axes: names, drawn anew at every reset.
    `randomize` names what differs from episode to episode (of EVERYTHING); the same seed gives the
    same numbers. `cells` are all of (wrist, axis, family of objects), `cell` (n,) says which one an
    environment is in. `level`, an array over cells in 0..1, is what a curriculum turns: it scales
    gravity from `weakest` to 1 g and, with it, the spread of centre, wrist, contact and motor.
    After `step` these describe the control step just made (float64 arrays over environments):
        q, dq (n, N)   measured (n, N): late, with noise and encoder zero   target (n, N)
        pos (n, 3)   quat (n, 4)   vel (n, 6: linear; angular, in the object's own frame)
        omega (n, 3) rad/s, over the step, in the frame of the hand
        tips, tip_vel (n, tips, 3)   contact (n, tips, 4: found, force xyz N)
        fallen (n,) bool   steps (n,)
    """
    VARIANTS = 128               # differently shaped hands; an environment keeps its own

    def __init__(self, n, objects, wrists=("palm_up",), axes=("+z",), seed=0, randomize=PAPER,
                 noise=0.005, weakest=0.2, threads=None, progress=True, **physics):
        self.n, self.rng = n, np.random.default_rng(seed)
        self.randomize, self.noise, self.weakest = frozenset(randomize), noise, weakest
        self.objects, self.which = list(objects), np.arange(n) % len(objects)
        self.wrists, self.axes = list(wrists), list(axes)
        families = dict.fromkeys(obj.family for obj in self.objects)
        self.cells = list(itertools.product(self.wrists, self.axes, families))
        self.level, self.cell = np.ones(len(self.cells)), np.zeros(n, int)
        self.grasps = [grasp_cache(obj, progress=progress) for obj in self.objects]
        self.models = self._compile(physics)
        m = self.models[0]
        self.substeps = round(1 / (CONTROL_HZ * m.opt.timestep))
        self.threads = threads or os.cpu_count()
        # models differ in the number of geoms; there is room for the largest
        largest = max(self.models, key=lambda model: model.ngeom)
        self.datas = [mujoco.MjData(largest) for _ in range(self.threads)]
        self.pool = rollout.Rollout(nthread=self.threads)

        self.state = np.zeros((n, 1 + m.nq + m.nv))
        self.target, self.measured = np.zeros((n, H.N)), np.zeros((n, H.N))
        self.stiffness = np.zeros((n, H.N)) + H.STIFFNESS    # N m / rad
        self.dry = np.zeros((n, H.N)) + H.FRICTION           # N m
        self.rub = np.zeros((n, H.N))                        # friction per torque of a motor
        self.zero = np.zeros((n, H.N))                       # rad, error of the encoders
        self.command_delay = np.zeros(n, int)                # substeps
        self.reading_delay = np.zeros(n, int)
        self.home, self.omega, self.axis = (np.zeros((n, 3)) for _ in range(3))
        self.wrist = np.zeros((n, 4))
        self.mass, self.friction, self.g = np.zeros(n), np.zeros(n), np.zeros(n)
        self.tips, self.tip_vel = (np.zeros((n, len(H.TIPS), 3)) for _ in range(2))
        self.contact, self.fallen = np.zeros((n, len(H.TIPS), 4)), np.zeros(n, bool)
        self.steps, self.blowups, self.pushes = np.zeros(n, int), 0, None
        self.history = begin_history(self.measured, self.target)
        self.reset(np.arange(n))

    q = property(lambda self: self.state[:, Q])
    dq = property(lambda self: self.state[:, DQ])
    pos = property(lambda self: self.state[:, POS])
    quat = property(lambda self: self.state[:, QUAT])
    vel = property(lambda self: self.state[:, VEL])

    def _compile(self, physics):
        """A model for each environment."""
        count = len(self.objects)
        if self.randomize & {"shape", "size"}:
            count = min(self.n, -(-self.VARIANTS // count) * count)
        compiled = []
        for k in range(count):
            obj, links = self.objects[k % len(self.objects)], H.LINKS
            if "shape" in self.randomize:
                links = _varied_links(self.rng)
            if "size" in self.randomize:
                obj = scaled(obj, 1 + self.rng.uniform(-SIZE, SIZE))
            compiled.append(build(obj, links=links, **physics).compile())
        self._ipos = [m.body("object").ipos.copy() for m in compiled]
        return [copy.copy(compiled[i % count]) for i in range(self.n)]

    def reset(self, ids):
        """Start new episodes in environments `ids` from cached grasps, with a wrist, an axis and
        whatever is randomized drawn anew."""
        rng = self.rng
        for i in ids:
            grasps = self.grasps[self.which[i]]
            grasp = grasps[rng.integers(len(grasps))]
            self._start(
                i, grasp, *self._drawn_task(i),
                rng.uniform(*MASS) if "mass" in self.randomize else 0.03,
                rng.uniform(*FRICTION) if "friction" in self.randomize else 1.0)
        self._begin(np.asarray(ids, int))

    def redirect(self, ids):
        """New episodes in environments `ids` with another wrist and another axis, which begin
        where the last ones ended: the same hands go on holding the same objects."""
        for i in ids:
            self._hang(i, *self._drawn_task(i))
        self.steps[ids] = 0

    def _drawn_task(self, i):
        """A wrist (4,) and an axis (3,) for environment i."""
        wrist, axis = (names[self.rng.integers(len(names))] for names in (self.wrists, self.axes))
        self.cell[i] = self.cells.index((wrist, axis, self.objects[self.which[i]].family))
        return wrist_of(wrist, self.rng), axis_of(axis, self.rng)

    def _hang(self, i, wrist, axis):
        """Gravity as the wrist has it, and as the level has it; about which axis to turn."""
        self.wrist[i], self.axis[i], level = wrist, axis, self.level[self.cell[i]]
        self.g[i] = self.weakest + (1 - self.weakest) * level
        if "wrist" in self.randomize:
            wrist = tilted(wrist, self.rng, level * WRIST_ERROR)
        self.models[i].opt.gravity = 9.81 * self.g[i] * gravity(wrist)[0]

    def begin(self, trials):
        """Start every environment with its own of n trials; their objects are `objects` in turn."""
        self.pushes = np.stack([trial.pushes for trial in trials])
        for i, t in enumerate(trials):
            assert t.obj == self.objects[self.which[i]]
            self._start(i, t.grasp, wrist_of(t.wrist), axis_of(t.axis), t.mass, t.friction)
        self._begin(np.arange(self.n))

    def _start(self, i, grasp, wrist, axis, mass, friction):
        model, rng = self.models[i], self.rng
        level = self.level[self.cell[i]]
        self._hang(i, wrist, axis)
        self.mass[i], self.friction[i] = mass, friction
        self.state[i] = 0
        self.state[i, QPOS], self.target[i] = grasp[:H.N + 7], grasp[H.N + 7:]

        centre = self._ipos[i % len(self._ipos)]
        if "centre" in self.randomize:
            centre = centre + level * rng.uniform(-OFF_CENTRE, OFF_CENTRE, 3)
        set_object(model, self.datas[0], mass, friction, centre)
        if "contact" in self.randomize:
            softness = 0.02 + level * (rng.uniform(*CONTACT_TIME) - 0.02)
            model.geom_solref[model.geom_priority == 1, 0] = softness
        if "motor" in self.randomize:
            # some hands are almost as the table says, or a policy loses the touch for these
            far = level * rng.random()
            share = 1 + far * (rng.uniform(*STIFFNESS, H.N) - 1)
            dry = 1 + far * (rng.uniform(*DRY_FRICTION, H.N) - 1)
            self.stiffness[i] = share * H.STIFFNESS
            model.actuator_gainprm[:, 0] = self.stiffness[i]
            model.actuator_biasprm[:, 1] = -self.stiffness[i]
            self.dry[i] = dry * H.FRICTION
            self.rub[i] = level * rng.uniform(*LOAD_FRICTION) * rng.uniform(*UNEVEN, H.N)
            self.zero[i] = far * rng.uniform(-ZERO_ERROR, ZERO_ERROR, H.N)
        if "delay" in self.randomize:
            late = np.rint(rng.uniform(*DELAY, 2) * CONTROL_HZ * self.substeps).astype(int)
            self.command_delay[i], self.reading_delay[i] = late
        scratch = self.datas[0]
        scratch.qpos[:] = self.state[i, QPOS]
        mujoco.mj_kinematics(model, scratch)
        self.tips[i] = scratch.site_xpos

    def _begin(self, ids):
        self.target[ids] += self.zero[ids]                   # what the hand would report
        self.home[ids], self.steps[ids], self.fallen[ids] = self.pos[ids], 0, False
        self.omega[ids], self.contact[ids], self.tip_vel[ids] = 0, 0, 0
        self.measured[ids] = self.q[ids] + self.zero[ids]
        self.history[ids] = begin_history(self.measured[ids], self.target[ids])

    def step(self, target):
        """Advance one control step (50 ms) with joint targets (n, N) rad, see `next_target`."""
        late = np.arange(self.substeps) < self.command_delay[:, None]          # (n, substeps)
        sent = np.where(late[:, :, None], self.target[:, None], target[:, None])
        self.target = np.array(target)                       # ours: a reset writes into it
        if self.pushes is not None:
            self.vel[:, :3] += self.pushes[np.arange(self.n), self.steps]
        elif "push" in self.randomize:
            self.vel[:, :3] += random_pushes(self.rng, self.n)
        if "motor" in self.randomize:
            self._set_friction()
        before, tips = self.quat.copy(), self.tips

        states, sensors = self.pool.rollout(
            self.models, self.datas, self.state, sent - self.zero[:, None], nstep=self.substeps)
        expected = self.state[:, 0] + 1 / CONTROL_HZ
        self.state[:] = states[:, -1]
        fastest = np.abs(self.state[:, DQ.start:]).max(1)
        blown = ~(np.isfinite(self.state).all(1) & (np.abs(self.state[:, 0] - expected) < 1e-6)
                  & (fastest < IMPOSSIBLE))
        if blown.any():
            self.blowups += int(blown.sum())
            self.state[blown] = 0
            self.quat[blown, 0] = 1

        self.tips, self.contact = fingertip_sensors(sensors[:, -1])
        self.tip_vel = (self.tips - tips) * CONTROL_HZ
        self.omega = rotation_between(before, self.quat) * CONTROL_HZ
        self.omega[blown] = 0
        self.steps += 1
        self.fallen = blown | has_fallen(self.pos, self.home)
        seen = states[np.arange(self.n), self.substeps - 1 - self.reading_delay, Q]
        self.measured = np.where(blown[:, None], self.q, seen) + self.zero
        if self.noise:
            self.measured += self.rng.uniform(-self.noise, self.noise, (self.n, H.N))
        self.history = push_history(self.history, self.measured, self.target)

    def _set_friction(self):
        torque = self.stiffness * np.abs(self.target - self.zero - self.q)
        friction = self.dry + self.rub * np.minimum(torque, H.TORQUE)
        for model, row in zip(self.models, friction):
            model.dof_frictionloss[:H.N] = row

    # what `reset` changes in the model of an environment, beside the direction of gravity
    CHANGED = ("body_mass", "body_inertia", "body_ipos", "geom_friction", "geom_solref",
               "actuator_gainprm", "actuator_biasprm", "dof_frictionloss")

    def snapshot(self):
        """Everything that `restore` needs to go on exactly from here, as tensors and text."""
        arrays = {name: torch.as_tensor(value).clone() for name, value in vars(self).items()
                  if isinstance(value, (np.ndarray, torch.Tensor))}
        # flat: composed objects differ in how many primitives they have
        models = {field: torch.as_tensor(np.concatenate(
            [getattr(m, field).ravel() for m in self.models])) for field in self.CHANGED}
        models["gravity"] = torch.as_tensor(np.stack([m.opt.gravity for m in self.models]))
        return {"arrays": arrays, "models": models, "blowups": self.blowups,
                "rng": json.dumps(self.rng.bit_generator.state)}

    def restore(self, saved):
        """Go on from a `snapshot` of an environment that was made with the same arguments."""
        for name, value in saved["arrays"].items():
            getattr(self, name)[:] = value
        for field in self.CHANGED:
            ends = np.cumsum([getattr(m, field).size for m in self.models])
            parts = np.split(saved["models"][field].numpy().ravel(), ends[:-1])
            for model, part in zip(self.models, parts):
                getattr(model, field).flat = part
        for model, down in zip(self.models, saved["models"]["gravity"].numpy()):
            model.opt.gravity = down
            mujoco.mj_setConst(model, self.datas[0])
        self.blowups = saved["blowups"]
        self.rng.bit_generator.state = json.loads(saved["rng"])

    def observe(self):
        """The deployable observation, see `observation`: float32 tensor (n, OBSERVED)."""
        return observation(self.history, self.wrist, self.axis)


def fingertip_sensors(sensors):
    """Sensor rows (n, 7 tips) of a model with an object -> tips (n, tips, 3) m, contact
    (n, tips, 4: found, net force xyz N)."""
    t = len(H.TIPS)
    return sensors[:, :3 * t].reshape(-1, t, 3), sensors[:, 3 * t:].reshape(-1, t, 4)


def has_fallen(pos, home):
    return np.linalg.norm(pos - home, axis=-1) > FALL


class Referee:
    """Keeps the metrics of n episodes, in the training simulator or on a virtual hand.

    RotR = sum over steps of omega . k (RotR / 20 is radians turned), TTF = s until the object fell,
    RotP = mean of |omega x k| while it was held. Nothing counts after a fall. `axis` (n, 3) is not
    copied: whoever changes it is measured about the new one."""

    def __init__(self, axis, pos, quat):
        self.axis, self.home, self.quat = axis, pos.copy(), quat.copy()
        self.alive = np.ones(len(pos), bool)
        self.RotR, self.RotP, self.held = (np.zeros(len(pos)) for _ in range(3))

    def __call__(self, pos, quat, lost=False):
        """One control step later; returns which episodes still hold their object (n,)."""
        self.alive &= ~(lost | has_fallen(pos, self.home))
        omega = rotation_between(self.quat, quat) * CONTROL_HZ           # rad/s, (n, 3)
        self.RotR += self.alive * (omega * self.axis).sum(1)
        self.RotP += self.alive * np.linalg.norm(np.cross(omega, self.axis), axis=1)
        self.held += self.alive
        self.quat = quat.copy()
        return self.alive

    def result(self):
        return {"RotR": self.RotR, "TTF": self.held / CONTROL_HZ,
                "RotP": self.RotP / np.maximum(self.held, 1)}


def run_episodes(env, act, record=None, title=None, trials=None):
    """Let `act(env) -> targets (n, N)` drive every environment of `env` for one 20 s episode, of
    `trials` if given. Returns the dict of `Referee`. `record(env)` is called after every step."""
    if trials:
        env.begin(trials)
    else:
        env.pushes = None
        env.reset(np.arange(env.n))
    referee = Referee(env.axis, env.pos, env.quat)
    bar = Progress(title, EPISODE) if title else None
    for t in range(EPISODE):
        env.step(act(env))
        alive = referee(env.pos, env.quat, lost=env.fallen)
        if record:
            record(env)
        env.reset(np.flatnonzero(env.fallen))
        if bar:
            turned = referee.RotR.mean() / CONTROL_HZ
            bar(t + 1, f"{turned:.2f} rad, {100 * alive.mean():.0f} % held")
    return referee.result()


# --------------------------------------------------------------------------------------- grasps
# The fingers close on an object that somebody holds, from OPEN rad outside of a random pose near
# the canonical grasp to CLOSE rad inside of it. Then it is let go, heavy and slippery: half of the
# grasps that hold 30 g with friction 1 drop it within 10 s, and training would start from hopeless
# states. Everything here is part of the key under which grasps are cached.
GRASP_TEST = {
    "count": 200, "open": 0.3, "close": 0.15, "near": 0.25, "shift": 0.012 * H.SCALE,
    "closing": 0.3, "squeeze": 0.15, "mass": 0.05, "friction": 0.5,
    "fingertips": min(3, len(H.TIPS)), "drift": 0.015 * H.SCALE, "seed": 0,
    "stages": (("palm_up", 0.1), ("palm_up", 0.4), ("palm_down", 0.1), ("palm_down", 0.4)),
}
# On what is no handful they close by up to this; a share of these objects lies any way round.
UPRIGHT, CLOSEST, TUMBLED = ("cube", "cuboid", "cylinder"), 0.5, 0.5


def grasp_cache(obj, progress=True, **changes):
    """Stable grasps of an object, (count, 2 N + 7) = qpos (joints, object position, quaternion) and
    joint targets. Made once, then read from CACHE under a key of everything that it depends on.
    Raises `Problem` if the object does not fit the hand."""
    spec, test = build(obj), GRASP_TEST | changes
    if obj.family and obj.family not in UPRIGHT:
        test |= {"closest": CLOSEST, "tumbled": TUMBLED}
    key = json.dumps([spec.to_xml(), H.HAND, H.GRASP.tolist(), H.REACH, test])
    path = CACHE / f"grasps-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if path.exists():
        return load_npz(path, "grasps")["grasps"]
    grasps = _sample_grasps(spec.compile(), obj.name, test, progress)
    save_npz(path, grasps=grasps)
    return grasps


def _opening():
    """Joint angles (N,), one unit per finger, along which fingertips leave the object fastest."""
    def distances(q):
        return np.linalg.norm(_fingertips(q) - CENTRE, axis=1)

    step = 1e-3
    slope = np.array([distances(H.GRASP + step * joint) for joint in np.eye(H.N)])
    slope = (slope - distances(H.GRASP)) / step          # (N, tips): a joint moves its own
    return (slope / np.linalg.norm(slope, axis=0)).sum(1)


def _sample_grasps(model, name, test, progress):
    rng, found, tried, batch = np.random.default_rng(test["seed"]), [], 0, 128
    datas = [mujoco.MjData(model) for _ in range(os.cpu_count())]
    set_object(model, datas[0], test["mass"], test["friction"], model.body("object").ipos.copy())
    held = copy.copy(model)                              # by somebody
    held.opt.gravity[:], held.dof_damping[-6:] = 0, (30, 30, 30, 0.05, 0.05, 0.05)
    ramp = np.linspace(0, 1, round(test["closing"] / model.opt.timestep))[:, None]
    opening, bar = _opening(), Progress(f"grasps {name}", test["count"]) if progress else None
    with rollout.Rollout(nthread=len(datas)) as pool:
        while len(found) < test["count"]:
            if tried > 20 * test["count"] + 1000 and len(found) < tried / 100:
                raise H.Problem(f"{name}: only {len(found)} of {tried} grasps hold; the object "
                                "does not fit the hand's canonical grasp")
            tried += batch
            pose = H.GRASP + rng.uniform(-test["near"], test["near"], (batch, H.N))
            state = np.zeros((batch, 1 + model.nq + model.nv))
            state[:, POS] = CENTRE + rng.uniform(-test["shift"], test["shift"], (batch, 3))
            turn = rng.uniform(-np.pi, np.pi, batch)
            state[:, QUAT] = from_axis_angle([[0, 0, 1]] * batch, turn)
            close = test["close"]
            if "tumbled" in test:
                close = rng.uniform(close, test["closest"], (batch, 1))
                tumbled, turn = rng.random(batch) < test["tumbled"], rng.normal(size=(batch, 4))
                turn /= np.linalg.norm(turn, axis=1, keepdims=True)
                state[tumbled, QUAT] = turn[tumbled]
            start = state[:, Q] = np.clip(pose + test["open"] * opening, H.LOW, H.HIGH)
            end = np.clip(pose - close * opening, NEAR, FAR)
            closing = start[:, None] + ramp * (end - start)[:, None]
            closed = pool.rollout(held, datas, state, closing, nstep=len(ramp))[0][:, -1]
            state[:, QPOS], q = closed[:, QPOS], closed[:, Q]
            target = q + np.clip(end - q, -test["squeeze"], test["squeeze"])
            good = _that_hold(model, datas, pool, state, target, test)
            found += list(good)
            if bar:
                bar(min(len(found), test["count"]), f"{100 * len(found) / tried:.0f} % hold")
    return np.array(found[:test["count"]])


def _that_hold(model, datas, pool, state, target, test):
    """Of states and joint targets those, as grasps, in which three fingertips or more bear on the
    object, and it stays where it is under gravity one way and the other."""
    begin = state[:, POS].copy()
    for wrist, seconds in test["stages"]:
        model.opt.gravity = 9.81 * gravity(WRISTS[wrist])[0]
        states, sensors = pool.rollout(
            model, datas, state, target[:, None], nstep=round(seconds / model.opt.timestep))
        state = states[:, -1].copy()
        touching = (fingertip_sensors(sensors[:, -1])[1][:, :, 0] > 0).sum(1)
        drift = np.linalg.norm(state[:, POS] - begin, axis=1)
        good = (np.isfinite(state).all(1) & (drift < test["drift"])
                & (touching >= test["fingertips"]))
        state, begin, target = state[good], begin[good], target[good]
        if not len(state):
            return []
    still = ((np.abs(state[:, DQ.start:]).max(1, initial=0) < 1.0)
             & (np.linalg.norm(state[:, VEL][:, :3], axis=1) < 0.01))
    return np.concatenate([state[:, QPOS], target], 1)[still]


# -------------------------------------------------------------------------------- a virtual hand
DIFFERS = ("motor", "shape", "contact", "object", "wrist", "box")


class VirtualHand(H.Hand):
    """The same hand as it would be made and mounted, not as the training simulator believes.

    A seed draws everything hidden; nothing that trains may read it. `differs` names what is not as
    in training (all of DIFFERS, or fewer to see what each costs); README.md has the table.
    The motor is model M6 of "Better Actuator Models" (arXiv 2410.08650), friction M4; its viscous
    friction is the joints' damping.
    load: "none", "balls" (the Chaos Box) or an `Object` to hold. Time is simulated: every `command`
    lets 50 ms pass.
    """
    realtime = False
    SUBSTEPS = 12                # 240 Hz

    def __init__(self, seed=0, wrist="palm_up", load="none", differs=DIFFERS):
        super().__init__()
        self.seed, self.load, self.differs = seed, load, frozenset(differs)
        self._draw_motors(np.random.default_rng([seed, 2510]))
        rng = np.random.default_rng([seed, 8556])
        other_links, other_balls = _made_differently(rng), Balls.drawn(rng)
        self._wrist_error = tilted((1, 0, 0, 0), rng, WRIST_ERROR)
        size, self._centre = 1 + rng.uniform(-0.03, 0.03), rng.uniform(-0.003, 0.003, 3)
        # of rubber and of printed links, over the object's; softness in s
        self._rubber, self._plastic = rng.uniform(0.85, 1.1), rng.uniform(0.3, 0.6)
        self._patch = rng.uniform(0.003, 0.008)              # m, radius that resists twisting
        self._softness, self._bounce = rng.uniform(0.012, 0.028), rng.uniform(0.7, 1.2)
        obj = load if isinstance(load, tuple) else None
        if obj and "object" in self.differs:
            obj = scaled(obj, size)
        self._holds_object = obj is not None
        self._model = build(
            obj, links=other_links if "shape" in self.differs else H.LINKS,
            balls=None if load != "balls" else other_balls if "box" in self.differs else Balls(),
            timestep=1 / (CONTROL_HZ * self.SUBSTEPS), **self._joints).compile()
        self._data = mujoco.MjData(self._model)
        self._balls = np.flatnonzero(self._model.geom_contype == BALL)
        self.turn(wrist_of(wrist))
        self._ipos = self._model.body("object").ipos.copy() if obj else None
        joints = [self._model.joint(joint.name) for joint in H.JOINTS]
        self._qadr = np.array([joint.qposadr[0] for joint in joints])
        self._vadr = np.array([joint.dofadr[0] for joint in joints])
        if "motor" in self.differs:
            # MuJoCo's constraints are soft by default: stiction crept at 10 mrad/s, and a fingertip
            # leant 2 degrees into the stops of its play
            self._model.dof_solimp[:, :2] = self._model.jnt_solimp[:, :2] = 0.999
        self.place(H.GRASP)

    def _draw_motors(self, rng):
        def each(low, high):
            return rng.uniform(low, high, H.N)

        self._gain = each(0.85, 1.0)
        # cables and load pull the supply down
        self._volt = rng.uniform(H.SUPPLY - H.SAG[1], H.SUPPLY - H.SAG[0])
        self._kt, self._R = H.KT * each(0.95, 1.05), H.RESISTANCE * each(0.97, 1.08)
        self._limit = H.CURRENT * each(0.9, 1.0)
        # N m, around the identified motor
        self._base, self._stribeck = H.RUB * each(0.7, 1.3), H.RUB_STRIBECK * each(0.7, 1.3)
        self._load, self._load_s = H.LOAD * each(0.7, 1.3), H.LOAD_STRIBECK * each(0.7, 1.3)
        self._zero = np.radians(each(-0.6, 0.6))             # what a careful calibration leaves
        self._backlash = np.radians(each(*H.BACKLASH))
        self._command_delay, self._read_delay = rng.uniform(0.004, 0.012), rng.uniform(0.003, 0.008)
        viscous, armature = H.VISCOUS * each(0.7, 1.3), H.ARMATURE * each(0.95, 1.1)
        self._joints = dict(damping=viscous, armature=armature, backlash=self._backlash)
        if "motor" not in self.differs:
            self._joints = {}
            self._zero = np.zeros(H.N)
            self._command_delay = self._read_delay = 0.0

    # ---- placing
    def place(self, q, target=None, object_qpos=None, mass=0.03, friction=1.0, stir=0, out=0):
        """Start over with joints at q (N,) rad and the object, if any, in the fingers (position m,
        quaternion): somebody holds it until they have closed on it. `stir` is a seed that throws
        the balls of the Chaos Box about; somebody has taken `out` of them out."""
        m, d = self._model, self._data
        if self._holds_object:
            self._set_contacts(mass, friction)
        mujoco.mj_resetData(m, d)
        if self.load == "balls":
            d.qpos[:] = stirred(m, np.random.default_rng([self.seed, stir]))
            taken = np.arange(len(self._balls)) >= len(self._balls) - out
            m.geom_contype[self._balls] = np.where(taken, 0, BALL)
            m.geom_conaffinity[self._balls] = np.where(taken, 0, MEETS_BALLS)
        d.qpos[self._qadr] = q
        if self._holds_object and object_qpos is not None:
            d.qpos[-7:] = object_qpos
        self._tau, self._external = np.zeros(H.N), np.zeros(H.N)
        self.target = np.array(q if target is None else target, float)
        self._goal = self.target
        mujoco.mj_forward(m, d)
        self._reading = self._measure()
        if self._holds_object:               # until the fingers have closed on it
            m.opt.gravity[:] = 0
            self._settle(slice(-6, None), (5, 5, 5, 0.01, 0.01, 0.01), 0.5)
            m.opt.gravity[:], d.qvel[-6:] = self._gravity, 0
        elif self.load == "balls":           # those that push limp fingers open jam them for good
            self._settle(self._vadr, HELD, 1.0)

    def _settle(self, held, damping, seconds):
        """Somebody holds what moves along the degrees of freedom `held`, while the rest settles."""
        usual = self._model.dof_damping[held].copy()
        self._model.dof_damping[held] = damping
        for _ in range(round(seconds * CONTROL_HZ)):
            self._write(self.target)
        self._model.dof_damping[held] = usual

    def begin(self, trial):
        """Start a `Trial` with its object."""
        q, object_qpos = trial.grasp[:H.N], trial.grasp[H.N:H.N + 7]
        self.place(q, trial.grasp[H.N + 7:], object_qpos, trial.mass, trial.friction)

    def turn(self, wrist):
        """An arm turns the hand to the wrist (4,), slowly: nothing pulls but gravity."""
        if "wrist" in self.differs:
            wrist = multiply(self._wrist_error, np.asarray(wrist, float))
        self._gravity = 9.81 * gravity(wrist)[0]
        self._model.opt.gravity = self._gravity

    def push(self, velocity):
        """Change the velocity of the object by (3,) m/s, as something that bumps into it."""
        self._data.qvel[-6:-3] += velocity

    def _set_contacts(self, mass, friction):
        m = self._model
        centre = self._ipos + ("object" in self.differs) * self._centre
        surfaces = {}
        if "contact" in self.differs:
            m.geom_solref[m.geom_priority == 1] = self._softness, self._bounce
            surfaces = dict(rubber=self._rubber, plastic=self._plastic, patch=self._patch)
        set_object(m, self._data, mass, friction, centre, **surfaces)

    # ---- one control step
    def _write(self, target):
        command_late, reading_late = (
            round(delay / self._model.opt.timestep)
            for delay in (self._command_delay, self._read_delay))
        for step in range(self.SUBSTEPS):
            if step == command_late:
                self._goal = target
            if "motor" in self.differs:
                self._drive_motors()
                self._set_friction()
            else:
                self._data.ctrl[:] = self._goal
            mujoco.mj_step(self._model, self._data)
            if "motor" in self.differs:
                self._feel_load()
            if step + 1 == self.SUBSTEPS - reading_late:
                self._reading = self._measure()
        if self._data.warning.number.any():              # MuJoCo has started over
            raise H.Problem("the simulation of the virtual hand has blown up; run this again with "
                            "another --seed")

    def _drive_motors(self):
        """Torque (N m) from the error (rad), by way of duty and current (A)."""
        w = self._data.qvel[self._vadr]
        duty = np.clip(self._gain * H.DUTY_PER_RAD * (self._goal - self._encoder()), -1, 1)
        current = (duty * self._volt - self._kt * w) / self._R
        self._tau = self._kt * np.clip(current, -self._limit, self._limit)
        self._data.qfrc_applied[self._vadr] = self._tau

    def _set_friction(self):
        """The most that gears rub (N m) at this speed under this load."""
        speed = np.abs(self._data.qvel[self._vadr]) / H.STRIBECK_SPEED
        strain = np.abs(self._external - self._tau)
        self._model.dof_frictionloss[self._vadr] = (
            self._base + self._load * strain
            + np.exp(-speed ** H.STRIBECK_EXPONENT) * (self._stribeck + self._load_s * strain))

    def _feel_load(self):
        """What bears on the gears from outside: contacts and limits (the forces of all constraints
        without those of friction) and gravity."""
        d = self._data
        friction, rows = np.zeros(self._model.nv), slice(d.ne, d.ne + d.nf)
        friction[d.efc_id[rows]] = d.efc_force[rows]
        self._external = (d.qfrc_constraint - friction - d.qfrc_bias)[self._vadr]

    def _encoder(self):
        q = self._data.qpos[self._qadr] + self._zero
        return np.round(q / H.COUNT) * H.COUNT if "motor" in self.differs else q

    def _measure(self):
        d = self._data
        dq = np.round(d.qvel[self._vadr] / H.RPM) * H.RPM
        torque = self._tau if "motor" in self.differs else d.qfrc_actuator[self._vadr]
        return H.Reading(self._encoder(), dq, np.round(torque / self._kt, 3), float(d.time))

    def read(self):
        return self._reading

    # ---- what an observer sees, and not the hand
    def model(self):
        """The MjModel, to draw it."""
        return self._model

    def qpos(self):
        """The whole configuration, to draw it."""
        return self._data.qpos.copy()

    def object_qpos(self):
        """Position (m) and quaternion of the object, (7,)."""
        return self._data.qpos[-7:].copy()


def _made_differently(rng):
    """The links as somebody made them: published boxes and ellipsoid tips, each a little off."""
    links = []
    for link in H.LINKS:
        shapes = []
        for k, (centre, half, *quat) in enumerate(link.boxes):
            is_tip = link.name in H.TIPS and k == len(link.boxes) - 1
            half = half + rng.uniform(-0.0005, 0.0005, 3)                # +-1 mm in width
            kind = "ellipsoid" if is_tip else "box"
            shapes.append((kind, centre, tuple(half), *quat))
        pos, quat = np.array(link.pos, float), np.array(link.quat, float)
        if link.joint:
            pos = pos + rng.uniform(-0.0005, 0.0005, 3)
            quat = multiply(quat, tilted((1, 0, 0, 0), rng, np.radians(1)))
        links.append(link._replace(
            pos=tuple(pos), quat=tuple(quat), shapes=tuple(shapes), boxes=()))
    return tuple(links)


# ----------------------------------------------------------------------------- choosing a hand
def resolve_port(port):
    """"auto" becomes the port of the attached hand or, with a line that says so, "sim:0"; "sim"
    becomes "sim:0". Raises `Problem` on a virtual hand that cannot be."""
    if port == "auto":
        port = H.find_port()
        if port is None:
            print("no hand is attached: using the virtual hand sim:0", file=sys.stderr)
    port = "sim:0" if port in (None, "sim") else port
    if port.startswith("sim:"):
        _parse_virtual(port)
        return port
    return H.stable_name(port)               # a hand has one name, however it was plugged in


def _parse_virtual(port):
    """"sim:7" -> (7, DIFFERS); "sim:7:motor+shape" -> (7, ("motor", "shape"))."""
    _, seed, *differs = port.split(":", 2)
    differs = tuple(differs[0].split("+")) if differs else DIFFERS
    if not seed.isdecimal():
        raise H.Problem(f"--port {port}: the seed of a virtual hand is a whole number, as in sim:7")
    if not set(differs) <= set(DIFFERS):
        raise H.Problem(f"--port {port}: a virtual hand differs in {', '.join(DIFFERS)}, "
                        "as in sim:7:motor+shape")
    return int(seed), differs


def open_hand(port="auto", **virtual):
    """The hand at `port`: "auto", "sim", "sim:SEED", "sim:SEED:motor+shape" (which differs only in
    these) or a serial device. `virtual` (wrist, load) only shapes a virtual hand.

    Raises `Problem` if the port is absent or answers wrongly."""
    port = resolve_port(port)
    if port.startswith("sim:"):
        seed, differs = _parse_virtual(port)
        return VirtualHand(seed, differs=differs, **virtual)
    return H.DynamixelHand(port)


# --------------------------------------------------------------------- films, files, progress
def film(model, qpos, path, wrist=(1, 0, 0, 0)):
    """Write a GIF of the configurations `qpos`, a list of (nq,), at a wrist (4,). Without a
    renderer one line says so and nothing fails."""
    save_gif(frames(model, qpos, [wrist] * len(qpos)), path)


def frames(model, qpos, wrists, axes=None):
    """Pictures of the configurations `qpos`, a list of (nq,), at half the control rate; none, and a
    line that says so, without a renderer. The hand turns with `wrists`, a list of (4,), and the
    camera looks into its palm, from above or below. `axes`, a list of (3,), are drawn as arrows."""
    from PIL import Image
    try:
        renderer = mujoco.Renderer(model, 320, 320)
    except Exception as error:
        print(f"no film: MuJoCo cannot render here ({str(error)[:80]}); on Linux install libegl1",
              file=sys.stderr)
        return []
    camera = mujoco.MjvCamera()
    look(camera)
    data, scene, images = mujoco.MjData(model), renderer.scene, []
    for i in range(0, len(qpos), 2):
        data.qpos[:] = qpos[i]
        mujoco.mj_kinematics(model, data)
        mujoco.mj_camlight(model, data)
        camera.elevation = -H.CAMERA["elevation"] * gravity(wrists[i])[0, 2]
        renderer.update_scene(data, camera)
        scene.enabletransform, scene.scale = 1, 1
        scene.rotate[:] = wrists[i]                          # about what the camera looks at
        scene.translate[:] = camera.lookat - rotate(scene.rotate, camera.lookat)
        add_stripes(scene, model, data)
        if axes:
            add_arrow(scene, axes[i], (0.1, 0.4, 0.9, 1))
        images.append(Image.fromarray(renderer.render()).quantize(64))
    renderer.close()
    return images


def look(camera):
    camera.lookat[:], camera.distance = H.CAMERA["lookat"], H.CAMERA["distance"]
    camera.azimuth, camera.elevation = H.CAMERA["azimuth"], H.CAMERA["elevation"]


def add_arrow(scene, direction, rgba):
    """Draw an arrow through the object, along `direction` (3,), into an MjvScene: its end is seen
    where the hand hides its head."""
    geom, kind = scene.geoms[scene.ngeom], mujoco.mjtGeom.mjGEOM_ARROW
    scene.ngeom += 1
    mujoco.mjv_initGeom(geom, kind, np.zeros(3), np.zeros(3), np.eye(3).ravel(),
                        np.array(rgba, np.float32))
    ends = CENTRE + np.outer((-0.07, 0.26), direction)   # it is drawn half as long
    mujoco.mjv_connector(geom, kind, 0.004, *ends)


def add_stripes(scene, model, data):
    """Draw a dark stripe around the object into an MjvScene, so that one sees a cylinder turn: a
    thin plate that looks out of it by 1 %."""
    for g in np.flatnonzero(model.geom_contype == OBJECT):
        geom = scene.geoms[scene.ngeom]
        scene.ngeom += 1
        half = 1.01 * model.geom_aabb[g, 3:]
        half[1] = 0.003
        mujoco.mjv_initGeom(geom, mujoco.mjtGeom.mjGEOM_BOX, half, data.geom_xpos[g],
                            data.geom_xmat[g], np.array((0.25, 0.1, 0, 1), np.float32))


def save_gif(images, path):
    """A film of pictures at half the control rate, see `frames`; without any there is none."""
    if images:
        with H.atomic_file(path) as file:
            images[0].save(file, "GIF", save_all=True, append_images=images[1:],
                           duration=2000 // CONTROL_HZ, loop=0)


def open_window(hand, viewer=None):
    """MuJoCo's viewer on a virtual hand, or the one that is open; None, and a line that says why,
    where there cannot be one."""
    if viewer:
        viewer._sim().load(hand._model, hand._data, "")      # nothing public changes the model
        return viewer
    try:
        import glfw
        import mujoco.viewer
        if sys.platform != "darwin":         # where it fails the viewer would wait for it forever
            glfw.ERROR_REPORTING = False
            glfw.init()
            glfw.window_hint(glfw.VISIBLE, False)
            window = glfw.create_window(64, 64, "", None, None)
            glfw.default_window_hints()
            if not window:
                raise RuntimeError("there is no display")
            glfw.destroy_window(window)
        before = set(threading.enumerate())
        viewer = mujoco.viewer.launch_passive(
            hand._model, hand._data, show_left_ui=False, show_right_ui=False)
    except (ImportError, RuntimeError) as error:
        hint = "; use mjpython" if sys.platform == "darwin" else ""
        print(f"no window, going on as text: {error}{hint}", file=sys.stderr)
        return None
    atexit.register(close_window, viewer, set(threading.enumerate()) - before)
    look(viewer.cam)
    return viewer


def close_window(viewer, threads):
    """Not without those that draw: else the end of the script may crash them."""
    viewer.close()
    for thread in threads:
        thread.join(10)


def show(viewer, rows, target, q, arrows):
    """What the hand does, in its window: `rows` {name: text}, bars of joint targets and joints (N,)
    rad, arrows (axis, gravity)."""
    figure = mujoco.MjvFigure()
    figure.title, figure.linewidth = "target (red) and joint, rad from the grasp", 5
    reach = (FAR - H.GRASP).max()
    figure.range[:] = (-1, H.N), (-reach, reach)
    for k, angles in enumerate((target, q)):             # a line from 0 and back for each joint
        bars = np.outer(np.asarray(angles) - H.GRASP, (0, 1, 0))
        figure.linepnt[k], figure.linergb[k] = bars.size, ((1, 0.3, 0.3), (0.3, 1, 0.3))[k]
        figure.linedata[k, 0:2 * bars.size:2] = np.repeat(np.arange(H.N) + 0.35 * k, 3)
        figure.linedata[k, 1:2 * bars.size:2] = bars.ravel()
    with viewer.lock():
        viewer.user_scn.ngeom = 0
        for arrow, rgba in zip(arrows, ((0.1, 0.4, 0.9, 1), (0.5, 0.5, 0.5, 0.5))):
            add_arrow(viewer.user_scn, arrow, rgba)
    if viewer.viewport:
        size = viewer.viewport.width // 2, viewer.viewport.height // 3
        viewer.set_figures((mujoco.MjrRect(0, 0, *size), figure))
    viewer.set_texts((None, None, "\n".join(rows), "\n".join(rows.values())))
    viewer.sync()


def subplots(rows, columns, figsize, layout="constrained", **options):
    """A figure that is drawn to a file, without a screen, and its axes."""
    from matplotlib.figure import Figure
    figure = Figure(figsize, layout=layout)
    return figure, figure.subplots(rows, columns, **options)


def save_figure(figure, path):
    with H.atomic_file(path) as file:
        figure.savefig(file, dpi=90)


def save_npz(path, **arrays):
    """Write arrays to `path`, all or nothing. Raises `Problem` on a full disk."""
    with H.atomic_file(path) as file:
        np.savez_compressed(file, **arrays)


def load_npz(path, *names):
    """Read `names` from an .npz that `save_npz` wrote. Raises `Problem` if it is missing, broken or
    holds NaN."""
    try:
        with np.load(path, allow_pickle=False) as file:
            lacking = set(names) - set(file.files)
            arrays = {name: file[name] for name in names or file.files if name not in lacking}
    except FileNotFoundError:
        raise H.Problem(f"{path} is not there")
    except Exception as error:
        raise H.Problem(f"{path} cannot be read ({error}); delete it and make it again")
    if lacking:
        raise H.Problem(f"{path} has no {', '.join(sorted(lacking))}; it was not written by this "
                        "program or by another version of it")
    for name, a in arrays.items():
        if a.dtype.kind == "f" and not np.isfinite(a).all():
            raise H.Problem(f"{path}: {name} contains NaN or infinity; delete the file and collect "
                            "it again")
    return arrays


def say(text, end="\n"):
    """A line on stderr, in place of the live one; one that stays live (end "") is cut to fit."""
    terminal = sys.stderr.isatty()
    if terminal and not end:
        text = text[:os.get_terminal_size(sys.stderr.fileno()).columns - 1]
    print(f"\r{text}\x1b[K" if terminal else text, end=end, file=sys.stderr, flush=True)


class Progress:
    """One live line: done/total, rate, time left, and whatever numbers the caller adds."""

    def __init__(self, title, total, unit=""):
        self.title, self.total, self.unit = title, total, unit
        self.start, self.shown, self.first = time.monotonic(), 0.0, None

    def __call__(self, done, text="", last=False):
        """`last`: it ends here, if not at the total."""
        now, live = time.monotonic(), sys.stderr.isatty()
        last |= done >= self.total
        if self.first is None:               # what an earlier run had done is not this run's rate
            self.first = done
        if not last and now - self.shown < (0.2 if live else 30):
            return
        self.shown = now
        line = f"{self.title}: {done:,.0f}/{self.total:,.0f}{self.unit}"
        if done > self.first:
            rate = (done - self.first) / max(now - self.start, 1e-9)
            left = (self.total - done) / rate
            pace = f"{rate:,.1f}/s" if rate >= 1 else f"{60 * rate:,.1f}/min"
            line += f" {pace}, {left // 60:.0f}:{left % 60:02.0f} left"
        say(f"{line}  {text}", end="\n" if last or not live else "")
