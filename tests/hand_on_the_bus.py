"""The physics of a LEAP Hand behind the emulated motor bus, and a clock that nobody waits for.

    bus = PhysicalBus(Clock(), seed=3, wrist="palm_down")
    with in_process(bus):                  # hand.py now talks to this bus, in simulated time
        H.check(["--check", "--port", bus.path, ...])

Written from published figures alone; it shares nothing with what policies are trained in. Links are
as wide as the published collision boxes, so neighbours touch. The motor is the one identified as
model M4 in "Better Actuator Models" (arXiv 2410.08650), whose stiction may stop a finger that
gravity pulls. There is play in the gears, and zeros are up to two degrees off. A seed draws what
differs from hand to hand. Kinematics, masses, stops and boxes are those of the table in hand.py.
"""
import contextlib
import inspect
import math

import dynamixel_sdk
import mujoco
import numpy as np

import emulated_bus
import hand as H
from emulated_bus import COUNTS, EmulatedBus

# Which way gravity pulls, in the frame of the hand: z out of the palm, x along the fingers, thumb
# at -y.
GRAVITY = {"palm_up": (0, 0, -1), "palm_down": (0, 0, 1), "thumb_up": (0, 1, 0),
           "thumb_down": (0, -1, 0), "base_up": (1, 0, 0), "base_down": (-1, 0, 0)}

TIME_STEP = 0.004                                # s
STRIBECK_SPEED, STRIBECK_POWER = 2.558, 0.76     # rad/s, model M4


def shapes(link):
    """The published boxes of a link of the table, and its rubber tip or None."""
    return (link.boxes[:-1], link.boxes[-1]) if link.name in H.TIPS else (link.boxes, None)


def build(gravity, wider, play, viscous, armature, bound=None):
    """MjSpec of the hand. wider: m added to every width of a link, by link name; play (16,) rad.

    bound=("tape" or "string", link, link) holds two links together, or ties a string round both."""
    spec = mujoco.MjSpec()
    spec.compiler.degree = False
    spec.option.timestep = TIME_STEP
    spec.option.gravity = 9.81 * np.array(gravity)
    spec.option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    spec.option.jacobian = mujoco.mjtJacobian.mjJAC_DENSE
    bodies = {None: spec.worldbody}
    for link in H.LINKS:
        body = bodies[link.name] = bodies[link.parent].add_body(
            name=link.name, pos=link.pos, quat=link.quat, mass=link.mass, ipos=link.com,
            iquat=link.inertia_quat, inertia=link.inertia, explicitinertial=True)
        if link.joint:
            k = H.JOINTS.index(link.joint)
            body.add_joint(name=link.joint.name, axis=(0, 0, -1), armature=armature[k],
                           frictionloss=0.01, damping=viscous[k], solref_friction=(0.004, 1))
            body.add_joint(name=f"{link.joint.name}_play", axis=(0, 0, -1), limited=1,
                           damping=0.002, armature=2e-5, range=(-play[k] / 2, play[k] / 2))
        boxes, tip = shapes(link)
        for centre, half, *quat in boxes:
            body.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, pos=centre,
                          size=np.array(half) + wider[link.name] / 2,
                          quat=quat[0] if quat else (1, 0, 0, 0))
        if tip:
            body.add_geom(type=mujoco.mjtGeom.mjGEOM_ELLIPSOID, pos=tip[0], size=tip[1])
    for link in H.LINKS:                         # what overlaps by construction, as published
        part = link.name.partition("_")[2]
        if part in ("bs", "px", "md", "mp"):
            spec.add_exclude(bodyname1="palm", bodyname2=link.name)
    bases = ["if_bs", "mf_bs", "rf_bs", "th_mp"]
    for k, one in enumerate(bases):
        for other in bases[:k]:
            spec.add_exclude(bodyname1=one, bodyname2=other)
    for joint in H.JOINTS:                       # it is the link that meets a stop, behind the play
        stop = spec.add_tendon(name=f"{joint.name}_stop", limited=True,
                               range=(joint.low, joint.high))
        stop.wrap_joint(joint.name, 1)
        stop.wrap_joint(f"{joint.name}_play", 1)
    if bound:
        how, *links = bound
        for name in links:
            bodies[name].add_site(name=f"{name}_bound", pos=(0, -0.02, 0.015))
        if how == "tape":
            spec.add_equality(type=mujoco.mjtEq.mjEQ_WELD, objtype=mujoco.mjtObj.mjOBJ_BODY,
                              name1=links[0], name2=links[1])
        else:
            string = spec.add_tendon(name="string", limited=True, range=(0, 0.046))
            for name in links:
                string.wrap_site(f"{name}_bound")
    return spec


class Physics:
    """Moves the joints of an `EmulatedBus` up to any time: `bus.physics`.

    wrist is a name of GRAVITY, or three numbers. A seed draws play, friction (+-30 %), supply,
    motor constants, widths (+-1 mm), zeros, and where the limp fingers are at first."""

    def __init__(self, bus, seed=0, wrist="palm_up", bound=None):
        self.bus, self.time = bus, None
        rng = np.random.default_rng([seed, 1601])
        draw = lambda low, high: rng.uniform(low, high, H.N)
        self.volt, self.gain = rng.uniform(4.6, 5.0), draw(0.9, 1.0)
        self.kt, self.R = 0.386 * draw(0.95, 1.05), 3.403 * draw(0.97, 1.05)
        self.limit = draw(0.92, 1.0)             # of the goal current: what the motor takes for it
        self.base, self.stribeck = 0.00876 * draw(0.7, 1.3), 0.0047 * draw(0.7, 1.3)
        self.load, self.load_stribeck = 0.068 * draw(0.7, 1.3), 0.0738 * draw(0.7, 1.3)
        wider = {link.name: rng.uniform(-0.001, 0.001) for link in H.LINKS}
        spec = build(GRAVITY.get(wrist, wrist), wider, np.radians(draw(0.25, 0.5)),
                     0.00462 * draw(0.7, 1.3), 0.001895 * draw(0.9, 1.1), bound)
        self.model = spec.compile()
        # MuJoCo's constraints give way by default; stiction and stops of a hand do not
        self.model.dof_solimp[:, :2] = self.model.jnt_solimp[:, :2] = 0.999
        self.model.tendon_solimp_lim[:, :2] = 0.999
        self.model.tendon_solref_lim[:, 0] = self.model.jnt_solref[:, 0] = 2 * TIME_STEP
        self.data = mujoco.MjData(self.model)
        self.adr = np.array([self.model.joint(joint.name).qposadr[0] for joint in H.JOINTS])
        self.data.qpos[self.adr] = 0 if bound else draw(0.0, 0.3)
        # by motor id, as the bus has them, whoever swaps motors later
        self.joints = [bus.motors[i].joint for i in H.MOTOR_ID]
        for joint, q, zero in zip(self.joints, self.data.qpos[self.adr], draw(-2, 2)):
            joint.q, joint.zero_offset = q, round(math.radians(zero) * COUNTS)
        self.external, self.tau = np.zeros(H.N), np.zeros(H.N)
        self.loose = set()                       # joints whose finger is not on the horn

    def moves(self, motor):
        return H.MOTOR_ID[self.index(motor)] not in self.loose

    def index(self, motor):
        return next(k for k, joint in enumerate(self.joints) if joint is motor.joint)

    def step(self, now):
        """Torque, friction and motion up to `now` (s)."""
        if self.time is None or now - self.time > 1.0:
            self.time = now if self.time is None else now - 1.0
        steps = int((now - self.time) / TIME_STEP)
        if not steps:
            return
        self.time += steps * TIME_STEP
        on, goal, p, d, amps, flip, stuck, free = np.zeros((8, H.N))
        driven = {self.index(motor): motor for motor in self.bus.motors.values()}
        for k, m in driven.items():
            on[k], goal[k] = m.driving, m.angle_at(m["goal_position"])
            p[k], d[k] = m["position_p_gain"] / (256 * 885), m["position_d_gain"] / (16 * 885)
            amps[k] = abs(m["goal_current"]) / 1000
            flip[k], stuck[k] = m.joint.sign * m.direction, m.joint.stuck
            free[k] = not self.moves(m)
        on, amps = on * (1 - free), amps * self.limit
        p, d = p * self.gain * COUNTS, d * COUNTS / 1000
        model, data, adr = self.model, self.data, self.adr
        for _ in range(steps):
            w = data.qvel[adr]
            q = np.round(data.qpos[adr] * COUNTS) / COUNTS
            duty = np.clip(p * (goal - q) - d * w, -1, 1)
            current = on * np.clip((duty * self.volt - self.kt * w) / self.R, -amps, amps)
            self.tau = self.kt * current
            strain = np.abs(self.external - self.tau)
            friction = self.base + self.load * strain
            slow = np.exp(-np.abs(w / STRIBECK_SPEED) ** STRIBECK_POWER)
            friction += slow * (self.stribeck + self.load_stribeck * strain)
            model.dof_frictionloss[adr] = np.where(stuck, 9.0, np.where(free, 0.001, friction))
            data.qfrc_applied[adr] = self.tau
            mujoco.mj_step(model, data)
            # what bears on the gears from outside: all but the friction itself, whose rows come
            # right after those of equalities, one for each of these joints
            rubbing = data.efc_force[data.ne:data.ne + data.nf]
            self.external = (data.qfrc_constraint - data.qfrc_bias)[adr] - rubbing
        for k, m in driven.items():
            if free[k]:
                continue
            m.joint.q, m.joint.w = float(data.qpos[adr[k]]), float(data.qvel[adr[k]])
            m.current, m.duty = float(flip[k] * current[k]), float(flip[k] * duty[k])


class Clock:
    """Stands in for the module `time`: it only goes when somebody waits."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    time = perf_counter = monotonic

    def sleep(self, seconds):
        self.now += max(0.0, seconds)


class PhysicalBus(EmulatedBus):
    """An `EmulatedBus` in this thread, without pseudo-terminal: see `in_process`.

    With wrist=None its joints move as the emulated bus has them, without links and gravity."""

    def __init__(self, clock, seed=0, wrist="palm_up", bound=None, **options):
        self.clock, self.received = clock, b""
        with patched(emulated_bus, time=clock):
            super().__init__(path="/nonexistent/ttyHand", seed=seed, **options)
        if wrist:
            self.physics = Physics(self, seed, wrist, bound)

    def plug(self):
        self.master = -1

    def _host_baud(self):
        return self.host_baud

    def _send(self, data):
        self.received += data


class Port:
    """What the SDK's PortHandler is to the SDK and to the driver, and the serial port inside it."""

    def __init__(self, bus):
        self.bus, self.clock, self.ser, self.is_using, self.due = bus, bus.clock, self, False, 0.0
        self.null = None

    def setBaudRate(self, baud):
        self.bus.host_baud = baud
        return True

    def clearPort(self):
        self.bus.received = b""

    def writePort(self, data):
        return self.write(bytes(data))

    def readPort(self, length):
        if not self.bus.received:
            self.clock.sleep(0.001)
        data, self.bus.received = self.bus.received[:length], self.bus.received[length:]
        return data

    read, reset_input_buffer = readPort, clearPort

    def write(self, data):
        self.bus.buffer += bytes(data)
        self.bus.take(self.clock.now)
        return len(data)

    def setPacketTimeout(self, length):
        self.setPacketTimeoutMillis(length * 0.01 + 34)

    def setPacketTimeoutMillis(self, milliseconds):
        self.due = self.clock.now + milliseconds / 1000

    def isPacketTimeout(self):
        return self.clock.now > self.due

    def fileno(self):
        """For the guardian, which has nothing to guard here."""
        if self.null is None:
            self.null = open("/dev/null", "wb")
        return self.null.fileno()

    def set_low_latency_mode(self, on):
        pass

    def close(self):
        self.clearPort()
        if self.null is not None:
            self.null.close()


def guard(port, silence, off):
    """A guardian with nothing to guard: it waits for the driver to let go, and wakes up seldom."""
    import os, time
    os.write(1, b"!")
    while os.read(0, 65536):
        time.sleep(0.3)


@contextlib.contextmanager
def patched(module, **values):
    before = {name: getattr(module, name) for name in values}
    vars(module).update(values)
    try:
        yield
    finally:
        vars(module).update(before)


@contextlib.contextmanager
def in_process(bus):
    """hand.py talks to this bus, in this process, and both live by the clock of the bus."""
    with patched(emulated_bus, time=bus.clock), \
            patched(dynamixel_sdk, PortHandler=lambda path: Port(bus)), \
            patched(H, time=bus.clock, GUARD=inspect.getsource(guard)):
        yield
