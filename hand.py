"""The hand: one table of everything about it, and one small interface to it, real or virtual.

    python hand.py --check --port /dev/ttyUSB0     # walk from the cable to a working hand

    with open_hand("auto") as hand:                # or "sim", "sim:7", "/dev/ttyUSB0"
        q, dq, current, time = hand.read()         # rad, rad/s, A, s   (each array: (16,))
        hand.command(target)                       # rad, passes the joint limits and MAX_STEP

A fork for another hand replaces the table below and, if its motors are no Dynamixels, `DynamixelHand`.
"""
import sys
import time
from typing import NamedTuple

import numpy as np

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
    """Run a script's `main()`; a `Problem` becomes one clear line and exit status 2, Ctrl-C status 130."""
    try:
        sys.exit(main())
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


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


def resolve_port(port):
    """"auto" becomes the port of the attached hand or, with a line that says so, "sim:0"; "sim" becomes "sim:0"."""
    if port == "auto":
        from dynamixel import find_port
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
    from dynamixel import DynamixelHand                      # here, because it builds on this module
    return DynamixelHand(port)



if __name__ == "__main__":
    import bringup
    from hand import run as run_script                       # the module that bringup knows, not this __main__
    run_script(bringup.main)
