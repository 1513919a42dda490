"""The virtual hand's motors against the equations, what is late, loose or off about them, and the door that commands pass."""
import ast
import math

import mujoco
import numpy as np
import pytest

import hand as H
import sim
from conftest import CUBE, ROOT

COUNT = 2 * math.pi / 4096


class Spy:
    """MuJoCo for one hand, noting the state before every step and what the motors do in it."""

    def __init__(self, hand):
        self.hand, self.rows, hand._mj = hand, [], self

    def __getattr__(self, name):
        return getattr(mujoco, name)

    def mj_step(self, m, d):
        h, v = self.hand, self.hand._vadr
        self.rows.append(dict(q=d.qpos[h._qadr].copy(), w=d.qvel[v].copy(), goal=np.array(h._goal), time=d.time, torque=d.qfrc_applied[v].copy(),
                              friction=m.dof_frictionloss[v].copy(), external=h._external.copy()))
        mujoco.mj_step(m, d)


def floating(seed=0, **options):
    """A hand without gravity, so that only the motors act."""
    hand = sim.VirtualHand(seed, **options)
    hand._model.opt.gravity[:] = 0
    hand.place(np.zeros(16))
    return hand


def ticks(hand, target, n):
    for _ in range(n):
        hand.command(target)
    return hand.read()


# -------------------------------------------------------------------------------------------------- motor and friction
def test_torque_and_friction_follow_the_published_equations_at_every_step():
    """Duty from encoder counts and P gain, voltage less back-EMF over resistance, current limit; friction model M4."""
    hand = sim.VirtualHand(5, "palm_down", CUBE[0])
    spy = Spy(hand)
    hand._data.qvel[hand._vadr] = np.linspace(-11.5, 11.5, 16)           # fast enough for the back-EMF to matter
    rng, limited, free = np.random.default_rng(0), 0, 0
    for _ in range(6):
        hand.command(H.GRASP + rng.uniform(-0.3, 0.3, 16))
    for row in spy.rows:
        for i in range(16):
            p_gain = 600 if H.MOTOR_ID[i] in (0, 4, 8) else 800
            counts = row["goal"][i] / COUNT - round((row["q"][i] + hand._zero[i]) / COUNT)
            duty = min(1, max(-1, hand._gain[i] * counts * p_gain / (256 * 885)))
            amps = (duty * hand._volt - hand._kt[i] * row["w"][i]) / hand._R[i]
            limited, free = limited + (abs(amps) > hand._limit[i]), free + (abs(amps) <= hand._limit[i])
            torque = hand._kt[i] * min(hand._limit[i], max(-hand._limit[i], amps))
            strain = abs(row["external"][i] - torque)
            friction = (hand._base[i] + hand._load[i] * strain
                        + math.exp(-(abs(row["w"][i]) / 2.558) ** 0.760) * (hand._stribeck[i] + hand._load_s[i] * strain))
            assert row["torque"][i] == pytest.approx(torque) and row["friction"][i] == pytest.approx(friction)
    assert limited > 50 and free > 50                                    # both sides of the current limit were seen


def test_hidden_parameters_are_those_of_a_small_servo():
    for hand in map(sim.VirtualHand, range(3)):
        stall = hand._kt * hand._limit
        assert (stall > 0.10).all() and (stall < 0.15).all()            # N m
        assert (hand._kt * hand._volt / hand._R * hand._gain * H.DUTY_PER_RAD > 0.6).all()          # N m / rad
        assert (np.degrees(hand._backlash) >= 0.25).all() and (np.degrees(hand._backlash) <= 0.5).all()
        assert (hand._base > 0.004).all() and (hand._base + hand._stribeck < 0.04).all() and hand._zero.std() > 0


def test_what_the_object_and_gravity_press_is_what_the_gears_feel():
    """A finger that holds still against gravity: external torque = -(motor torque + friction), and gravity alone bears on it."""
    hand = sim.VirtualHand(1, "palm_up")
    hand.place(np.where(np.arange(16) < 12, 0.6, 0.2))
    ticks(hand, hand.target, 40)
    data = hand._data
    assert np.abs(data.qvel).max() < 0.05
    model = hand._model
    gravity = np.zeros(model.nv)
    gravity[:] = data.qfrc_bias
    limits = data.qfrc_constraint.copy()
    rows = data.efc_type[:data.nefc] == mujoco.mjtConstraint.mjCNSTR_FRICTION_DOF
    friction = np.zeros(model.nv)
    friction[data.efc_id[:data.nefc][rows]] = data.efc_force[:data.nefc][rows]
    outside = (limits - friction - gravity)[hand._vadr]
    assert hand._external == pytest.approx(outside)
    assert hand._tau + friction[hand._vadr] + outside == pytest.approx(np.zeros(16), abs=2e-3)
    assert np.abs(outside).max() > 0.01


def test_static_friction_holds_below_its_threshold_and_yields_above():
    """At rest without gravity the gears see the motor's torque alone, so they slip at (base + Stribeck) / (1 - load - load Stribeck)."""
    hand = floating(2)
    threshold = (hand._base + hand._stribeck) / (1 - hand._load - hand._load_s)
    stiffness = hand._gain * H.P_GAIN / (256 * 885) / COUNT * hand._volt / hand._R * hand._kt
    for share, moves in ((0.7, False), (1.5, True)):
        hand.place(np.full(16, 0.1))
        start = hand._data.qpos[hand._qadr].copy()
        seen = np.round((start + hand._zero) / COUNT) * COUNT            # a command is in encoder angles
        ticks(hand, seen + share * threshold / stiffness, 20)
        moved = np.abs(hand._data.qpos[hand._qadr] - start)
        assert (moved > 0.3 * threshold / stiffness).all() if moves else (moved < 0.0003).all()


def test_the_link_has_exactly_the_play_of_its_gears_and_the_encoder_does_not_feel_it():
    hand = floating(4)
    play = np.array([hand._model.joint(f"{j.name}_play").dofadr[0] for j in H.JOINTS])
    where = np.array([hand._model.joint(f"{j.name}_play").qposadr[0] for j in H.JOINTS])
    link, seen = [], []
    here = hand.read().q                                                 # no error, no motor torque
    for push in (0.005, -0.005):                                         # N m on the link: less than what moves the motor
        hand._data.qfrc_applied[play] = push
        ticks(hand, here, 20)
        link.append(hand._data.qpos[where].copy())
        seen.append(hand.read().q)
    assert link[0] - link[1] == pytest.approx(hand._backlash, rel=0.05)
    assert np.abs(seen[0] - seen[1]).max() <= 1.01 * COUNT


# ------------------------------------------------------------------------------------------------- encoder and delays
def test_readings_are_encoder_steps_with_a_zero_that_is_off():
    hand = sim.VirtualHand(3)
    for q in (np.zeros(16), H.GRASP):
        hand.place(q)
        read = hand.read().q
        assert read / COUNT == pytest.approx(np.round(read / COUNT), abs=1e-6)
        assert np.abs(read - q - hand._zero).max() <= 0.51 * COUNT
    assert np.degrees(np.abs(hand._zero)).max() > 0.3


def test_commands_and_readings_are_late_by_the_hidden_delays():
    hand = floating(6)
    spy, dt = Spy(hand), hand._model.opt.timestep
    assert dt * hand.substeps == pytest.approx(0.05)
    new = np.full(16, 0.1)
    hand.command(new)
    arrived = [np.array_equal(row["goal"], new) for row in spy.rows]
    late = arrived.index(True)
    assert all(arrived[late:]) and abs(late * dt - hand._command_delay) <= dt / 2 and late >= 1
    assert all(np.abs(row["torque"]).max() < 0.02 for row in spy.rows[:late]) and np.abs(spy.rows[late]["torque"]).min() > 0.05
    first = hand.read()
    hand.command(new)
    second = hand.read()
    assert second.time - first.time == pytest.approx(0.05)
    age = hand._data.time - second.time
    assert age > 0 and abs(age - hand._read_delay) <= dt / 2 + 1e-9
    then = next(row for row in spy.rows if abs(row["time"] - second.time) < dt / 2)      # the state of that moment, not of now
    assert np.abs(then["q"] + hand._zero - second.q).max() <= 0.51 * COUNT
    assert np.abs(then["q"] - hand._data.qpos[hand._qadr]).max() > COUNT


def test_current_has_the_sign_of_the_push_and_its_limit():
    hand = floating(0)
    ticks(hand, np.zeros(16), 3)
    hand.command(np.full(16, 0.12))
    reading = hand.read()
    assert (np.abs(reading.current) <= hand._limit + 1e-3).all()
    hand._data.qpos[hand._qadr] = -0.2                                   # somebody bends the fingers back
    hand.command(np.full(16, 0.12))
    assert (hand.read().current > 0.1).all()


# --------------------------------------------------------------------------------------------------------------- seeds
def run(seed, **options):
    hand = sim.VirtualHand(seed, **options)
    hand.place(H.GRASP, stir=5)
    rng, rows = np.random.default_rng(0), []
    for _ in range(8):
        sent = hand.command(H.GRASP + rng.uniform(-0.1, 0.1, 16))
        rows.append(np.concatenate([sent, *hand.read()[:3], [hand.read().time]]))
    return np.array(rows)


@pytest.mark.parametrize("load", ["none", "balls"])
def test_a_seed_is_a_hand(load):
    a, b, c = run(7, load=load), run(7, load=load), run(8, load=load)
    assert np.array_equal(a, b) and np.isfinite(a).all()
    assert np.abs(a[:, 16:32] - c[:, 16:32]).max() > 0.01


def test_seeds_differ_in_every_hidden_parameter_and_place_forgets_the_past():
    a, b = sim.VirtualHand(1), sim.VirtualHand(2)
    hidden = [name for name, value in vars(a).items() if isinstance(value, (float, np.ndarray)) and name[0] == "_"
              and name not in ("_tau", "_external", "_goal", "_qadr", "_vadr")]
    assert len(hidden) >= 12
    for name in hidden:
        assert not np.any(np.asarray(getattr(a, name)) == np.asarray(getattr(b, name))), name
    fresh = run(1)
    a.place(np.zeros(16))
    ticks(a, np.full(16, 0.5), 10)
    a.place(H.GRASP, stir=5)
    rng = np.random.default_rng(0)
    again = [np.concatenate([a.command(H.GRASP + rng.uniform(-0.1, 0.1, 16)), a.read().q]) for _ in range(8)]
    assert np.array_equal(np.array(again), fresh[:, :32])


def test_the_balls_press_on_the_fingers_at_random():
    loads = []
    for stir in (1, 2):
        hand = sim.VirtualHand(0, load="balls")
        hand.place(H.GRASP, stir=stir)
        ticks(hand, H.GRASP, 4)
        touched = {tuple(sorted(hand._model.geom_bodyid[[c.geom1, c.geom2]])) for c in hand._data.contact}
        names = [[hand._model.body(b).name for b in pair] for pair in touched]
        assert sum(any(n.startswith("ball") for n in pair) and any(n[:3] in ("if_", "mf_", "rf_", "th_") for n in pair) for pair in names) >= 2
        loads.append(hand._external.copy())
    assert np.abs(loads[0] - loads[1]).max() > 0.003


@pytest.mark.parametrize("script", ["train_policy.py", "collect.py", "fit_ndm.py", "deploy.py"])
def test_nothing_that_learns_looks_behind_the_interface(script):
    """No private attribute but a script's own, by name or by getattr, and no door but `open_hand`."""
    hidden = {name for name in [*vars(sim.VirtualHand(0)), *vars(sim.VirtualHand)] if name[0] == "_" and not name.endswith("__")}
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if isinstance(node, ast.Attribute) and node.attr[0] == "_" and not node.attr.endswith("__"):
            assert isinstance(node.value, ast.Name) and node.value.id == "self" and node.attr not in hidden, f"{script}:{node.lineno} {node.attr}"
        if isinstance(node, ast.Constant):
            assert node.value not in hidden, f"{script}:{node.lineno} {node.value}"
        name = getattr(node, "id", getattr(node, "attr", None))
        assert name not in ("VirtualHand", "vars", "__dict__"), f"{script}:{node.lineno} {name}"


# ------------------------------------------------------------------------------------------------------------ commands
def test_no_command_leaves_the_limits_or_jumps():
    hand, rng = sim.VirtualHand(0), np.random.default_rng(0)
    last = hand.target
    for scale in (0.05, 0.5, 10, 1e6) * 10:
        sent = hand.command(H.GRASP + scale * rng.normal(size=16))
        assert (sent >= H.LOW).all() and (sent <= H.HIGH).all() and np.abs(sent - last).max() <= H.MAX_STEP + 1e-12
        assert np.array_equal(sent, hand.target)
        last = sent
    hand.rest()
    here = hand.read().q
    assert np.abs(hand.command(np.full(16, 1e9)) - np.clip(here, H.LOW, H.HIGH)).max() <= H.MAX_STEP + 1e-12


@pytest.mark.parametrize("target", [np.full(16, np.nan), np.r_[np.inf, np.zeros(15)], np.zeros(15), np.zeros((1, 16)), 0.0])
def test_a_command_that_is_none_moves_nothing(target):
    hand = sim.VirtualHand(0)
    before, goal = hand.read(), hand.target.copy()
    with pytest.raises(ValueError, match="16 finite"):
        hand.command(target)
    assert hand.read().time == before.time and np.array_equal(hand.target, goal)


def test_move_to_arrives_slowly_and_within_limits():
    with floating(3) as hand:
        sent, write = [], hand._write
        hand._write = lambda target: (sent.append(target), write(target))
        for goal in (np.zeros(16), H.GRASP, H.GRASP + 0.05):
            del sent[:]
            start = hand.target.copy()
            hand.move_to(goal)
            assert sent[-1] == pytest.approx(goal)
            steps = np.abs(np.diff([start, *sent], axis=0))
            assert steps.max() <= H.MOVE_SPEED / H.CONTROL_HZ + 1e-9
            assert np.abs(hand.read().q - goal).max() < 0.1
        speeds = []
        for seconds in (0.1, 3.0):
            hand.place(np.zeros(16))
            del sent[:]
            hand.move_to(np.full(16, 0.1), seconds)
            speeds.append(len(sent))
        assert speeds == [2, 60]
