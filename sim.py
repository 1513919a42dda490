"""The world: the hand in MuJoCo, the objects it turns, the box of balls it learns in, stepped in batches.

Everything about the hand comes from the table in hand.py; everything about the world is here.

The frame of the world is the frame of the hand: z points out of the palm, x along the fingers, and the thumb of
the right hand is at -y. The wrist does not turn the hand, it turns gravity; so a policy, an axis and an observation mean the same
for every wrist.
"""
import copy
import ctypes.util
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

if ctypes.util.find_library("EGL"):                  # films are rendered without a screen; mujoco reads this at import, and
    os.environ.setdefault("MUJOCO_GL", "egl")        # cannot be imported at all if it says egl and there is none
import mujoco
import numpy as np
from mujoco import rollout

import hand as H

mujoco.set_mju_user_warning(lambda text: None)       # a blow-up is counted by `Rotation`, not logged to a file in the cwd
CONTROL_HZ = H.CONTROL_HZ
SUBSTEPS = 10                      # 200 Hz. At the paper's 120 Hz fingers that chatter rub less: a policy trained there turned 12 % less
#                                    at half the time step (16.7 rad -> 14.7; without joint friction 18.8 -> 18.3)
EPISODE = 400                      # control steps, 20 s
ALPHA = 1 / 24                     # rad: a_t = a_{t-1} + ALPHA * delta_t, |delta_t| <= 1
REACH = 0.45                       # rad: a policy's targets stay this near the canonical grasp; with the whole range it learns to twist
#                                    the object half a turn in one stroke and to drop it, with this it has to take a new hold
NEAR, FAR = np.maximum(H.LOW, H.GRASP - REACH), np.minimum(H.HIGH, H.GRASP + REACH)
W = 10                             # history length of the deployable observation and of the dynamics model
FALL = 0.06                        # m: an object further than this from where the grasp held it has fallen
IMPOSSIBLE = 200                    # rad/s or m/s: faster than this is not physics but a blow-up
CACHE = Path(os.environ.get("DEXNDM_CACHE", Path.home() / ".cache" / "dexndm"))

# Wrist orientations as the rotation (quaternion w x y z) that takes the palm-up hand to this wrist.
_S = 0.5 ** 0.5
WRISTS = {
    "palm_up": (1, 0, 0, 0), "palm_down": (0, 1, 0, 0),
    "thumb_up": (_S, -_S, 0, 0), "thumb_down": (_S, _S, 0, 0),
    "base_up": (_S, 0, _S, 0), "base_down": (_S, 0, -_S, 0),
}
AXES = {"+x": (1, 0, 0), "-x": (-1, 0, 0), "+y": (0, 1, 0), "-y": (0, -1, 0), "+z": (0, 0, 1), "-z": (0, 0, -1)}


def arguments():
    """The command line for argparse, which would take the axis -z for an option; with a blank before it, it does not."""
    return [f" {a}" if a in AXES else a for a in sys.argv[1:]]


def gravity(wrist):
    """Direction of gravity in the frame of the hand, unit vectors (n, 3), for wrist quaternions (n, 4)."""
    w = np.atleast_2d(np.asarray(wrist, float))
    return rotate(conjugate(w), np.broadcast_to([0.0, 0.0, -1.0], (len(w), 3)))


# ------------------------------------------------------------------------------------- quaternions, batched (n, 4)
def conjugate(a):
    return a * np.array([1.0, -1.0, -1.0, -1.0])


def multiply(a, b):
    w, x, y, z = np.moveaxis(a, -1, 0)
    W_, X, Y, Z = np.moveaxis(b, -1, 0)
    return np.stack([w * W_ - x * X - y * Y - z * Z, w * X + x * W_ + y * Z - z * Y,
                     w * Y - x * Z + y * W_ + z * X, w * Z + x * Y - y * X + z * W_], -1)


def rotate(a, v):
    """Rotate vectors v (n, 3) by quaternions a (n, 4): v + 2 u x (u x v + w v), u the vector part of a."""
    u = a[..., 1:]
    return v + 2 * np.cross(u, np.cross(u, v) + a[..., :1] * v)


def rotation_vector(a):
    """Axis times angle (n, 3) of quaternions (n, 4), angle in [0, pi]."""
    a = np.where(a[..., :1] < 0, -a, a)
    s = np.linalg.norm(a[..., 1:], axis=-1, keepdims=True)
    angle = 2 * np.arctan2(s, a[..., :1])
    return a[..., 1:] * np.where(s > 1e-9, angle / np.maximum(s, 1e-9), 2.0)


def from_axis_angle(axis, angle):
    axis, angle = np.asarray(axis, float), np.asarray(angle, float)[..., None]
    return np.concatenate([np.cos(angle / 2), np.sin(angle / 2) * axis], -1)


# ------------------------------------------------------------------------------------------------------- objects
class Object(NamedTuple):
    """A rigid body of primitives: parts = ((type, size, pos, quat), ...), sizes as MuJoCo takes them (half, m)."""
    name: str
    parts: tuple


def _object(name, kind, size):
    return Object(name, ((kind, tuple(round(float(s), 5) for s in size), (0, 0, 0), (1, 0, 0, 0)),))


def box(x, y, z):
    """A cuboid with full edge lengths x, y, z in m; z stands along the palm normal."""
    return _object(f"box {100 * x:.2g}x{100 * y:.2g}x{100 * z:.2g} cm", "box", (x / 2, y / 2, z / 2))


def cylinder(d, h):
    """A standing cylinder, diameter and height in m."""
    return _object(f"cylinder {100 * d:.2g}x{100 * h:.2g} cm", "cylinder", (d / 2, h / 2))


def capsule(d, h):
    return _object(f"capsule {100 * d:.2g}x{100 * h:.2g} cm", "capsule", (d / 2, (h - d) / 2))


def duck(s):
    """A composed shape about s m long: a body, a head and a beak."""
    one = (1, 0, 0, 0)
    return Object(f"duck {100 * s:.2g} cm", (
        ("ellipsoid", (0.5 * s, 0.36 * s, 0.32 * s), (0, 0, 0), one),
        ("sphere", (0.24 * s,), (0.24 * s, 0, 0.40 * s), one),
        ("capsule", (0.07 * s, 0.07 * s), (0.47 * s, 0, 0.37 * s), (_S, 0, _S, 0))))


def set_object(model, mass, friction):
    """Give the object of a compiled model a mass (kg) and a sliding friction; torsional friction is that of a soft contact
    patch of 5 mm."""
    body = model.body("object").id
    model.body_inertia[body] *= mass / model.body_mass[body]
    model.body_mass[body] = mass
    model.geom_friction[model.geom_bodyid == body, :2] = friction, 0.005 * friction


def _centre():
    """Where the object sits: the middle of the fingertips in the canonical grasp (m)."""
    model = build().compile()
    data = mujoco.MjData(model)
    data.qpos[:] = H.GRASP
    mujoco.mj_kinematics(model, data)
    return data.site_xpos.mean(0)


def _chaos_box(spec, bit, hand_bits, n=24, low=(-0.12, -0.07, 0.03), high=(0.09, 0.145, 0.19)):
    """The Chaos Box: a closed box (corners in m) full of soft foam balls that press on the fingers at random.
    A ball is three slides and no rotation, and rubs on nothing but the hand: it loads the joints just as well at half the
    degrees of freedom and a third of the constraints. MuJoCo's contacts are as stiff as the masses in them are heavy: without
    the armature, which has inertia and no weight, a finger would pass through a ball of 8 g, and be thrown out of it."""
    low, high = np.array(low), np.array(high)
    for axis in range(3):
        for sign, edge in ((1.0, low), (-1.0, high)):
            wall = spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_PLANE, size=(0.3, 0.3, 0.01), contype=0, conaffinity=bit, condim=1,
                                           pos=np.where(np.arange(3) == axis, edge, (low + high) / 2), rgba=(0.6, 0.7, 0.8, 0.1))
            wall.alt.type = mujoco.mjtOrientation.mjORIENTATION_ZAXIS
            wall.alt.zaxis = sign * np.eye(3)[axis]
    rng = np.random.default_rng(0)
    for i in range(n):
        body = spec.worldbody.add_body(name=f"ball{i}", pos=rng.uniform(low + 0.03, high - 0.03))
        for axis in np.eye(3):
            body.add_joint(type=mujoco.mjtJoint.mjJNT_SLIDE, axis=axis, damping=0.3, armature=0.03)
        body.add_geom(type=mujoco.mjtGeom.mjGEOM_SPHERE, size=(rng.uniform(0.022, 0.03), 0, 0), mass=0.008, contype=bit,
                      conaffinity=hand_bits | bit, condim=1, friction=(0.5, 0, 0), solref=(0.01, 1), rgba=(0.3, 0.55, 0.85, 1))


def build(obj=None, *, box_of_balls=False, wrist=(1, 0, 0, 0), timestep=1 / (CONTROL_HZ * SUBSTEPS),
          cone="elliptic", impratio=10, integrator="implicitfast", stiffness=H.STIFFNESS, damping=H.DAMPING,
          joint_friction=H.FRICTION, armature=H.ARMATURE, torque=H.TORQUE, backlash=None, looks=True):
    """The hand of the table as an `MjSpec`, with an object in its fingers, with balls around it, or
    free. Joint parameters in SI units, scalar or (16,); `backlash` (16,) rad adds a passive play joint
    after every motor and leaves the actuators out (the virtual hand drives its motors itself).

    The contact settings are chosen to be converged, see tests/benchmark.py: the elliptic cone with impratio 10 holds
    without slow slip (with the pyramidal cone and impratio 1 a policy learns to live off the creep), solref 20 ms is
    longer than three steps.
    """
    GEOM = {k: getattr(mujoco.mjtGeom, f"mjGEOM_{k.upper()}") for k in ("capsule", "sphere", "box", "cylinder", "ellipsoid")}
    PALM, NEAR, BALL, OBJECT, FINGER = 1, 2, 4, 8, 16        # collision bits; finger f has bit FINGER << f
    FINGERS = 15 * FINGER
    FOUND_AND_FORCE = (1 << int(mujoco.mjtConDataField.mjCONDATA_FOUND)) | (1 << int(mujoco.mjtConDataField.mjCONDATA_FORCE))
    NETFORCE = 3
    spec = mujoco.MjSpec()
    spec.compiler.degree = False
    opt = spec.option
    opt.timestep, opt.impratio = timestep, impratio
    opt.cone = getattr(mujoco.mjtCone, f"mjCONE_{cone.upper()}")
    opt.integrator = getattr(mujoco.mjtIntegrator, f"mjINT_{integrator.upper()}")
    opt.gravity = 9.81 * gravity(wrist)[0]
    opt.jacobian = mujoco.mjtJacobian.mjJAC_DENSE            # MuJoCo 4.0's sparse Newton solver now and then returns 1000 rad/s among balls
    opt.iterations, opt.tolerance = 20, 1e-7                 # measured: the same trajectories as 100, 1e-8 at 1.3 x the speed

    per_joint = lambda value: np.broadcast_to(np.asarray(value, float), (H.N,))
    kp, kv, loss, arm, limit = map(per_joint, (stiffness, damping, joint_friction, armature, torque))
    bodies, fingers = {None: spec.worldbody}, {}
    for link in H.LINKS:
        body = bodies[link.name] = bodies[link.parent].add_body(
            name=link.name, pos=link.pos, quat=link.quat, mass=link.mass, ipos=link.com, iquat=link.inertia_quat,
            inertia=link.inertia, explicitinertial=True)
        if link.joint:
            i = H.JOINTS.index(link.joint)
            body.add_joint(name=link.joint.name, axis=(0, 0, -1), range=(link.joint.low, link.joint.high), limited=1,
                           armature=arm[i], frictionloss=loss[i], damping=0 if backlash is None else kv[i])
            if backlash is not None:                         # light and barely damped: the link rattles between the teeth
                body.add_joint(name=f"{link.joint.name}_play", axis=(0, 0, -1), limited=1, damping=0.001, armature=1e-5,
                               range=(-backlash[i] / 2, backlash[i] / 2))
            else:
                act = spec.add_actuator(name=link.joint.name, target=link.joint.name, trntype=mujoco.mjtTrn.mjTRN_JOINT,
                                        forcelimited=1, forcerange=(-limit[i], limit[i]))
                act.set_to_position(kp=kp[i], kv=kv[i])
        finger = fingers.setdefault(link.name.split("_")[0], len(fingers) - 1)     # palm -1, then 0..3
        outer = link.name.endswith(("md", "ds")) or link.name == "th_px"
        bit = PALM if finger < 0 else FINGER << finger if outer else NEAR
        for kind, *place in link.shapes:
            if kind == "capsule":
                geom = body.add_geom(type=GEOM[kind], fromto=(*place[0], *place[1]), size=(place[2], 0, 0))
            else:
                geom = body.add_geom(type=GEOM[kind], pos=place[0], size=np.resize(place[1], 3))
                if kind == "sphere":
                    body.add_site(name=link.name, pos=place[0], group=5)
            geom.contype = bit
            geom.conaffinity = OBJECT | BALL | (FINGERS & ~bit if finger >= 0 and outer else 0)
            geom.rgba = (0.25, 0.25, 0.28, 1) if kind != "sphere" else (0.9, 0.9, 0.92, 1)
            if finger < 0:
                geom.conaffinity |= FINGERS

    for tip in H.TIPS:
        spec.add_sensor(name=f"{tip}_pos", type=mujoco.mjtSensor.mjSENS_FRAMEPOS, objtype=mujoco.mjtObj.mjOBJ_SITE, objname=tip)
    if obj is not None:
        body = spec.worldbody.add_body(name="object", pos=CENTRE)
        body.add_freejoint(name="object")
        for kind, size, pos, quat in obj.parts:
            body.add_geom(type=GEOM[kind], size=np.resize([*size, 0, 0], 3), pos=pos, quat=quat, density=1000, contype=OBJECT,
                          conaffinity=255 | FINGERS, condim=4, priority=1, friction=(1, 0.005, 1e-4),
                          rgba=(0.95, 0.6, 0.2, 1))
        for link in H.TIPS:                                  # found (0/1.. contacts) and net force on the fingertip link, world frame, N
            s = spec.add_sensor(name=f"{link}_contact", type=mujoco.mjtSensor.mjSENS_CONTACT, objtype=mujoco.mjtObj.mjOBJ_BODY,
                                objname="object", reftype=mujoco.mjtObj.mjOBJ_BODY, refname=link)
            s.intprm[:3] = FOUND_AND_FORCE, NETFORCE, 1
    if looks:
        spec.add_texture(name="sky", type=mujoco.mjtTexture.mjTEXTURE_SKYBOX, builtin=mujoco.mjtBuiltin.mjBUILTIN_GRADIENT,
                         rgb1=(0.9, 0.93, 0.96), rgb2=(0.7, 0.75, 0.8), width=64, height=64)
        spec.visual.headlight.ambient, spec.visual.headlight.diffuse = (0.45, 0.45, 0.45), (0.6, 0.6, 0.6)
    if box_of_balls:
        _chaos_box(spec, BALL, PALM | NEAR | FINGERS)
    return spec


CENTRE = (0.0, 0.0, 0.0)
CENTRE = _centre()


# ------------------------------------------------------------------------------------------------- stepping in batches
class Rotation:
    """n hands that each hold an object, stepped together on all cores (mujoco.rollout, one model per environment).

    objects: list of `Object`, dealt out in turn; wrists, axes: names or (4,) / (3,) arrays, drawn anew at every reset.
    `gravity_scale` (a float, or one for each of the wrists) is what a curriculum turns. With `randomize` the object's mass (10-50 g), friction
    (0.5-2.0) and pushes are drawn as in training; the same seed gives the same numbers on a CPU.
    After `step` these describe the control step just made (float64 arrays over environments):
        q, dq (n, 16)   target (n, 16)   pos (n, 3)   quat (n, 4)   vel (n, 6: linear, angular)   omega (n, 3) rad/s
        tips (n, 4, 3)  tip_vel (n, 4, 3)   contact (n, 4, 4: found, force xyz N)   fallen (n,) bool   steps (n,)
    """

    def __init__(self, n, objects, wrists=("palm_up",), axes=("+z",), seed=0, randomize=True, noise=0.005,
                 gravity_scale=1.0, threads=None, progress=True, **physics):
        self.n, self.rng = n, np.random.default_rng(seed)
        self.randomize, self.noise, self.gravity_scale = randomize, noise, gravity_scale
        self.objects = list(objects)
        self.which = np.arange(n) % len(self.objects)
        self.wrists = [np.asarray(WRISTS.get(w, w) if isinstance(w, str) else w, float) for w in wrists]
        self.axes = [np.asarray(AXES[a] if isinstance(a, str) else a, float) for a in axes]
        self.grasps = [grasp_cache(o, progress=progress) for o in self.objects]
        compiled = [build(o, **physics).compile() for o in self.objects]
        self.models = [copy.copy(compiled[i]) for i in self.which]
        m = compiled[0]
        self.substeps = round(1 / (CONTROL_HZ * m.opt.timestep))
        self.threads = threads or os.cpu_count()
        self.datas = [mujoco.MjData(m) for _ in range(self.threads)]
        self.pool = rollout.Rollout(nthread=self.threads)
        self.state = np.zeros((n, mujoco.mj_stateSize(m, mujoco.mjtState.mjSTATE_FULLPHYSICS)))
        self._ctrl = np.zeros((n, self.substeps, H.N))
        self._states = np.zeros((n, self.substeps, self.state.shape[1]))
        self._sensors = np.zeros((n, self.substeps, m.nsensordata))
        self._q, self._v = slice(1, 1 + m.nq), slice(1 + m.nq, 1 + m.nq + m.nv)
        self.target, self.home = np.zeros((n, H.N)), np.zeros((n, 3))
        self.wrist, self.axis, self.which_wrist = np.zeros((n, 4)), np.zeros((n, 3)), np.zeros(n, int)
        self.mass, self.friction, self.g = np.zeros(n), np.zeros(n), np.zeros(n)
        self.tips, self.tip_vel, self.contact = np.zeros((n, 4, 3)), np.zeros((n, 4, 3)), np.zeros((n, 4, 4))
        self.omega, self.fallen = np.zeros((n, 3)), np.zeros(n, bool)
        self.steps, self.blowups = np.zeros(n, int), 0
        self.history = np.zeros((n, W, 2, H.N))              # measured joint positions, previous targets
        self.reset(np.arange(n))

    q = property(lambda self: self.state[:, 1:1 + H.N])
    dq = property(lambda self: self.state[:, self._v][:, :H.N])
    pos = property(lambda self: self.state[:, 1 + H.N:4 + H.N])
    quat = property(lambda self: self.state[:, 4 + H.N:8 + H.N])
    vel = property(lambda self: self.state[:, self._v][:, H.N:])

    def reset(self, ids):
        """Start new episodes in environments `ids` from cached grasps, with a wrist, an axis and an object drawn anew."""
        for i in ids:
            kind, rng, model = self.which[i], self.rng, self.models[i]
            w = rng.integers(len(self.wrists))
            self.wrist[i], self.axis[i] = self.wrists[w], self.axes[rng.integers(len(self.axes))]
            mass, friction = (rng.uniform(0.01, 0.05), rng.uniform(0.5, 2.0)) if self.randomize else (0.03, 1.0)
            self.mass[i], self.friction[i] = mass, friction
            scale = self.gravity_scale[w] if np.ndim(self.gravity_scale) else self.gravity_scale
            self.g[i] = scale
            model.opt.gravity = 9.81 * scale * gravity(self.wrist[i])[0]
            self.which_wrist[i] = w
            set_object(model, mass, friction)
            grasps = self.grasps[kind]
            g = grasps[rng.integers(len(grasps))]
            self.state[i] = 0
            self.state[i, self._q], self.target[i] = g[:23], g[23:]
        ids = np.asarray(ids, int)
        self.home[ids], self.steps[ids], self.fallen[ids] = self.pos[ids], 0, False
        self.omega[ids], self.contact[ids], self.tip_vel[ids] = 0, 0, 0
        self.tips[ids] = CENTRE
        self.history[ids] = np.stack([self.q[ids], self.target[ids]], 1)[:, None]

    def step(self, target):
        """Advance one control step (50 ms) with joint targets (n, 16) rad, clipped to the reach of a policy."""
        self.target = np.clip(target, NEAR, FAR)
        self._ctrl[:] = self.target[:, None]
        before, tips = self.quat.copy(), self.tips.copy()
        if self.randomize:                                   # the paper's push: a force of scale 2 * mass for one step, p = 0.25
            kicked = self.rng.random(self.n) < 0.25
            start = self._v.start + H.N
            self.state[:, start:start + 3] += kicked[:, None] * self.rng.normal(0, 2 / CONTROL_HZ, (self.n, 3))
        self.pool.rollout(self.models, self.datas, self.state, nstep=self.substeps, control=self._ctrl,
                          state=self._states, sensordata=self._sensors)
        expected = self.state[:, 0] + 1 / CONTROL_HZ
        self.state[:] = self._states[:, -1]
        fastest = np.abs(self.state[:, self._v]).max(1)
        blown = ~(np.isfinite(self.state).all(1) & (np.abs(self.state[:, 0] - expected) < 1e-6) & (fastest < IMPOSSIBLE))
        if blown.any():
            self.blowups += int(blown.sum())
            self.state[blown] = 0
            self.state[blown, 4 + H.N] = 1
        sensors = self._sensors[:, -1]
        self.tips = sensors[:, :12].reshape(-1, 4, 3).copy()
        self.tip_vel = np.where((self.steps > 0)[:, None, None], (self.tips - tips) * CONTROL_HZ, 0)
        self.contact = sensors[:, 12:28].reshape(-1, 4, 4)
        self.omega = rotation_vector(multiply(self.quat, conjugate(before))) * CONTROL_HZ
        self.omega[blown] = 0
        self.steps += 1
        self.fallen = blown | (np.linalg.norm(self.pos - self.home, axis=1) > FALL)
        self.history[:, :-1] = self.history[:, 1:]
        self.history[:, -1, 0] = self.q + (self.rng.uniform(-self.noise, self.noise, (self.n, H.N)) if self.noise else 0)
        self.history[:, -1, 1] = self.target

    def observe(self):
        """The deployable observation, see `deployable`: float32 (n, 327)."""
        return deployable(self.history, self.wrist, self.axis)


def deployable(history, wrist, axis):
    """What a real hand knows: the last W = 10 (joint position, previous target) pairs, the wrist (4), the axis (3).

    history (n, W, 2, 16) rad, wrist (n, 4), axis (n, 3) -> float32 (n, 327). Positions are given relative to the
    canonical grasp and targets relative to the position: the same information, but the second number is then the load."""
    q = history[:, :, 0]
    x = [(q - H.GRASP).reshape(len(q), -1), 10 * (history[:, :, 1] - q).reshape(len(q), -1), wrist, axis]
    return np.concatenate(x, 1).astype(np.float32)


def run_episodes(env, act, record=None, title=None):
    """Let `act(env) -> targets (n, 16)` drive every environment of `env` for one 20 s episode.

    Returns a dict of (n,) arrays: RotR = sum over steps of omega . k (RotR / 20 is radians turned), TTF s until the object
    fell (20 if it never did), RotP = mean of |omega x k| while it was held. `record(env)`, if given, is called after every
    step. Nothing counts after a fall."""
    env.reset(np.arange(env.n))
    alive, RotR, held, RotP = np.ones(env.n, bool), np.zeros(env.n), np.zeros(env.n), np.zeros(env.n)
    bar = Progress(title, EPISODE) if title else None
    for t in range(EPISODE):
        env.step(act(env))
        alive &= ~env.fallen
        held += alive
        RotR += alive * (env.omega * env.axis).sum(1)
        RotP += alive * np.linalg.norm(np.cross(env.omega, env.axis), axis=1)
        if record:
            record(env)
        env.reset(np.flatnonzero(env.fallen))
        if bar:
            bar(t + 1, f"{RotR.mean() / CONTROL_HZ:.2f} rad, {100 * alive.mean():.0f} % held")
    return {"RotR": RotR, "TTF": held / CONTROL_HZ, "RotP": RotP / np.maximum(held, 1)}


def film(model, qpos, path, wrist="palm_up", every=2, size=(320, 320)):
    """Write a GIF of the configurations `qpos`, a list of (nq,), at half the control rate. The camera holds still in the
    room, so palm down hangs from above. Without a renderer (MUJOCO_GL=egl needs libegl1) one line says so, nothing fails."""
    from PIL import Image
    try:
        renderer = mujoco.Renderer(model, *size)
    except Exception as error:
        print(f"no film: MuJoCo cannot render here ({str(error)[:80]}); install libegl1 and set MUJOCO_GL=egl", file=sys.stderr)
        return
    camera = mujoco.MjvCamera()
    camera.lookat[:], camera.distance, camera.azimuth, camera.elevation = (-0.01, 0.035, 0.10), 0.38, 150, -25
    if wrist == "palm_down":
        camera.elevation = 25
    data, frames = mujoco.MjData(model), []
    for q in qpos[::every]:
        data.qpos[:] = q
        mujoco.mj_kinematics(model, data)
        mujoco.mj_camlight(model, data)
        renderer.update_scene(data, camera)
        image = renderer.render()
        frames.append(Image.fromarray(image[::-1, ::-1] if wrist == "palm_down" else image).quantize(64))
    with H.atomic_file(path) as file:
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=1000 * every // CONTROL_HZ, loop=0)


# ------------------------------------------------------------------------------------------------------------ grasps
def grasp_cache(obj, n=500, seed=0, progress=True):
    """Stable grasps of an object, (n, 39) = qpos (16 joints, object pos, object quat) and joint targets (16).

    Sampled around the canonical grasp (+-0.3 rad, object +-12 mm and any turn about z), held as a heavy and slippery object
    (50 g, friction 0.7) for 0.5 s under gravity along -z and again along +z, kept if three fingertips or more bear on the
    object, which stayed within 15 mm and came to rest. (With 30 g, friction 1 and no count of fingertips, half of the
    grasps drop the object within 10 s when nothing moves, and training starts from hopeless states.) Made once, then read
    from CACHE under a key of everything that it depends on."""
    spec = build(obj, looks=False)
    key = hashlib.sha256(json.dumps([spec.to_xml(), H.HAND, n, seed, 5]).encode()).hexdigest()[:16]
    path = CACHE / f"grasps-{key}.npz"
    if path.exists():
        return load_npz(path, "grasps")["grasps"]
    model = spec.compile()
    set_object(model, 0.05, 0.7)
    rng, found, tried = np.random.default_rng(seed), [], 0
    datas = [mujoco.MjData(model) for _ in range(os.cpu_count())]
    stages = [(wrist, round(seconds / model.opt.timestep)) for wrist in ("palm_up", "palm_down") for seconds in (0.1, 0.4)]
    bar = Progress(f"grasps {obj.name}", n) if progress else None
    with rollout.Rollout(nthread=len(datas)) as pool:
        while len(found) < n:
            if tried > 400 * n:
                raise H.Problem(f"{obj.name}: only {len(found)} of {tried} grasps hold; the object does not fit the hand's canonical grasp")
            batch = 512
            tried += batch
            target = np.clip(H.GRASP + rng.uniform(-0.3, 0.3, (batch, H.N)), H.LOW, H.HIGH)
            state = np.zeros((batch, 1 + model.nq + model.nv))
            state[:, 1:17] = target
            state[:, 17:20] = CENTRE + rng.uniform(-0.012, 0.012, (batch, 3))
            state[:, 20:24] = from_axis_angle([[0, 0, 1]] * batch, rng.uniform(-np.pi, np.pi, batch))
            start = state[:, 17:20].copy()
            for wrist, steps in stages:                      # most are lost in the first 0.1 s, and the others are stepped on
                model.opt.gravity = 9.81 * gravity(WRISTS[wrist])[0]
                states, sensors = pool.rollout(model, datas, state, target[:, None], nstep=steps)
                state, touched = states[:, -1].copy(), (sensors[:, -1, 12:28:4] > 0).sum(1)
                good = np.isfinite(state).all(1) & (np.linalg.norm(state[:, 17:20] - start, axis=1) < 0.015) & (touched >= 3)
                state, start, target = state[good], start[good], target[good]
                if not len(state):
                    break
            good = (np.abs(state[:, 24:]).max(1, initial=0) < 1.0) & (np.linalg.norm(state[:, -6:-3], axis=1) < 0.01)
            found += [np.concatenate([s[1:24], t]) for s, t in zip(state[good], target[good])]
            if bar:
                bar(min(len(found), n), f"{100 * len(found) / tried:.0f} % hold")
    grasps = np.array(found[:n])
    save_npz(path, grasps=grasps)
    return grasps


# --------------------------------------------------------------------------------------------------- files, progress
def save_npz(path, **arrays):
    """Write arrays to `path`, whole or not at all. Raises `Problem` on a full disk."""
    with H.atomic_file(path) as file:
        np.savez_compressed(file, **arrays)


def load_npz(path, *names):
    """Read `names` from an .npz that `save_npz` wrote. Raises `Problem` if it is missing, broken or holds NaN."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in (names or file.files)}
    except FileNotFoundError:
        raise H.Problem(f"{path} is not there")
    except KeyError as error:
        raise H.Problem(f"{path} has no {error.args[0]}; it was not written by this program or by another version of it")
    except Exception as error:
        raise H.Problem(f"{path} cannot be read ({error}); delete it and make it again")
    for name, a in arrays.items():
        if a.dtype.kind == "f" and not np.isfinite(a).all():
            raise H.Problem(f"{path}: {name} contains NaN or infinity; delete the file and collect it again")
    return arrays


class Progress:
    """One live line: done/total, rate, time left, and whatever numbers the caller adds."""

    def __init__(self, title, total, unit=""):
        self.title, self.total, self.unit, self.start, self.shown = title, total, unit, time.monotonic(), 0.0
        self.first = None

    def __call__(self, done, text=""):
        now = time.monotonic()
        if self.first is None:                               # what an earlier run had already done is not this run's rate
            self.first = done
        live = sys.stderr.isatty()
        if done < self.total and now - self.shown < (0.2 if live else 30):
            return
        self.shown = now
        rate = (done - self.first) / max(now - self.start, 1e-9)
        left = (self.total - done) / rate if rate > 0 else 0
        line = f"{self.title}: {done:,.0f}/{self.total:,.0f}{self.unit} {rate:,.1f}/s, {left // 60:.0f}:{left % 60:02.0f} left  {text}"
        print(f"\r{line}\x1b[K" if live else line, end="\n" if not live or done >= self.total else "", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- a virtual hand
class VirtualHand(H.Hand):
    """The same hand in MuJoCo with motors as they are, not as the training simulator believes them to be.

    A seed draws the hidden parameters of every joint; nothing that trains may read them. Motor and friction model M4 of
    "Better Actuator Models" (arXiv 2410.08650), from `error` in rad to torque in N m:

        duty = clip(gain * H.DUTY_PER_RAD * error, -1, 1)      current = clip((duty V - kt w) / R, -limit, limit)
        |friction| <= base + load |tau_ext - tau| + exp(-|w / w_s|^0.76) (stribeck + load_s |tau_ext - tau|) + viscous |w|

    with play between motor and link, an encoder of 4096 counts with a zero that is off, and late commands and readings.
    load: "none", "balls" (the Chaos Box) or an `Object` to hold. Time is simulated: every `command` lets 50 ms pass.
    """
    realtime = False

    def __init__(self, seed=0, wrist="palm_up", load="none", substeps=12):
        super().__init__()
        self._mj, self.load, self.seed = mujoco, load, seed
        rng = np.random.default_rng([seed, 2510])
        draw = lambda low, high: rng.uniform(low, high, H.N)
        self._gain, self._volt = draw(0.85, 1.0), rng.uniform(4.6, 4.9)        # cables and load pull a 5 V supply down
        self._kt, self._R = H.KT * draw(0.95, 1.05), H.RESISTANCE * draw(0.97, 1.08)
        self._limit = H.CURRENT_LIMIT[1200] * draw(0.9, 1.0)
        self._base, self._stribeck = 0.0088 * draw(0.7, 1.3), 0.0047 * draw(0.7, 1.3)    # around the identified motor
        self._load, self._load_s = 0.068 * draw(0.7, 1.3), 0.0738 * draw(0.7, 1.3)
        self._zero = np.radians(draw(-0.6, 0.6))             # what a careful calibration leaves
        self._backlash = np.radians(draw(0.25, 0.5))
        self._command_delay, self._read_delay = rng.uniform(0.004, 0.012), rng.uniform(0.003, 0.008)
        self._rubber, contact_time = rng.uniform(0.85, 1.05), rng.uniform(0.012, 0.018)
        viscous, armature = 0.0046 * draw(0.7, 1.3), H.ARMATURE * draw(0.95, 1.1)

        spec = build(load if isinstance(load, tuple) else None, box_of_balls=load == "balls", wrist=WRISTS[wrist],
                         timestep=1 / (CONTROL_HZ * substeps), damping=viscous, armature=armature, backlash=self._backlash)
        self._model, self.substeps = spec.compile(), substeps
        # MuJoCo's constraints are soft by default: stiction crept at 10 mrad/s, and a fingertip leant 2 degrees into the stops of its play
        self._model.dof_solimp[:, :2] = self._model.jnt_solimp[:, :2] = 0.999
        if isinstance(load, tuple):
            self._model.geom_solref[self._model.geom_bodyid == self._model.body("object").id, 0] = contact_time
        self._data = mujoco.MjData(self._model)
        joints = [self._model.joint(j.name) for j in H.JOINTS]
        self._qadr, self._vadr = np.array([j.qposadr[0] for j in joints]), np.array([j.dofadr[0] for j in joints])
        self.place(H.GRASP)

    def place(self, q, target=None, object_qpos=None, mass=0.03, friction=1.0, stir=None):
        """Start over with joints at q (16,) rad and the object, if any, in the fingers (position m, quaternion).
        `stir` is a seed that throws the balls of the Chaos Box about."""
        d = self._data
        self._mj.mj_resetData(self._model, d)
        d.qpos[self._qadr] = q
        if object_qpos is not None:
            set_object(self._model, mass, friction * self._rubber)
            d.qpos[-7:] = object_qpos
        if self.load == "balls":
            balls = len(self._model.qpos0) - 2 * H.N
            d.qpos[-balls:] = np.random.default_rng([self.seed, stir or 0]).uniform(-0.02, 0.02, balls)
        self._tau, self._external = np.zeros(H.N), np.zeros(H.N)
        self.target = np.array(q if target is None else target, float)
        self._goal = self.target
        self._mj.mj_forward(self._model, d)
        self._reading = self._measure()
        if self.load == "balls":                             # let them settle around the fingers
            for _ in range(CONTROL_HZ):
                self._write(self.target)

    def _measure(self):
        d, count = self._data, 2 * np.pi / 4096
        return H.Reading(np.round((d.qpos[self._qadr] + self._zero) / count) * count, np.round(d.qvel[self._vadr] / 0.024) * 0.024,
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
            duty = np.clip(self._gain * H.DUTY_PER_RAD * error, -1, 1)
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
        port = H.find_port()
        if port is None:
            print("no hand is attached: using the virtual hand sim:0", file=sys.stderr)
    port = "sim:0" if port in (None, "sim") else port
    if port.startswith("sim:") and not port[4:].isdigit():
        raise H.Problem(f"--port {port}: the seed of a virtual hand is a whole number, as in sim:7")
    return port


def open_hand(port="auto", **virtual):
    """The hand at `port`: "auto", "sim", "sim:SEED" or a serial device. `virtual` (wrist, load) only shapes a virtual hand.

    Raises `H.Problem` if the port is absent or answers wrongly."""
    port = resolve_port(port)
    if port.startswith("sim:"):
        return VirtualHand(int(port[4:]), **virtual)
    return H.DynamixelHand(port)
