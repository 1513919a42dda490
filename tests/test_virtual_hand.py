"""The virtual hand: its motors against the equations, what is late, loose or off about them, what
else differs from the simulator that trains, and the door that commands pass."""
import ast
import math

import mujoco
import numpy as np
import pytest

import hand as H
import sim
from conftest import CUBE, ROOT
from sim import VirtualHand

pytestmark = pytest.mark.usefixtures("grasps")
COUNT = 2 * math.pi / 4096


@pytest.fixture
def spy(monkeypatch):
    """spy(hand) -> rows of what was so before every MuJoCo step, and what the motors do in it."""
    step = mujoco.mj_step

    def watch(hand):
        rows, v = [], hand._vadr

        def noted(m, d):
            rows.append(dict(
                q=d.qpos[hand._qadr].copy(), w=d.qvel[v].copy(), goal=np.array(hand._goal),
                time=d.time, torque=d.qfrc_applied[v].copy(),
                friction=m.dof_frictionloss[v].copy(), external=hand._external.copy()))
            step(m, d)

        monkeypatch.setattr(mujoco, "mj_step", noted)
        return rows

    return watch


def floating(seed=0):
    """A hand with motors as they are, without gravity, so that only they act."""
    hand = VirtualHand(seed, differs=("motor",))
    hand._model.opt.gravity[:] = 0
    hand.place(np.zeros(16))
    return hand


def ticks(hand, target, n):
    for _ in range(n):
        hand.command(target)
    return hand.read()


def friction_forces(data, nv):
    forces = np.zeros(nv)
    rows = data.efc_type[:data.nefc] == mujoco.mjtConstraint.mjCNSTR_FRICTION_DOF
    forces[data.efc_id[:data.nefc][rows]] = data.efc_force[:data.nefc][rows]
    return forces


# ----------------------------------------------------------------------------- motor and friction
def test_torque_and_friction_follow_the_published_equations_at_every_step(spy):
    """Duty from encoder counts and P gain, voltage less back-EMF over resistance, current limit;
    friction model M4."""
    hand = VirtualHand(5, "palm_down", CUBE[0])
    rows = spy(hand)
    # fast enough for the back-EMF to matter
    hand._data.qvel[hand._vadr] = np.linspace(-11.5, 11.5, 16)
    rng, limited, free = np.random.default_rng(0), 0, 0
    for _ in range(6):
        hand.command(H.GRASP + rng.uniform(-0.3, 0.3, 16))
    for row in rows:
        for i in range(16):
            p_gain = 600 if H.MOTOR_ID[i] in (0, 4, 8) else 800
            counts = row["goal"][i] / COUNT - round((row["q"][i] + hand._zero[i]) / COUNT)
            duty = min(1, max(-1, hand._gain[i] * counts * p_gain / (256 * 885)))
            amps = (duty * hand._volt - hand._kt[i] * row["w"][i]) / hand._R[i]
            limited += abs(amps) > hand._limit[i]
            free += abs(amps) <= hand._limit[i]
            torque = hand._kt[i] * min(hand._limit[i], max(-hand._limit[i], amps))
            strain = abs(row["external"][i] - torque)
            stribeck = math.exp(-(abs(row["w"][i]) / 2.558) ** 0.760)
            friction = (hand._base[i] + hand._load[i] * strain
                        + stribeck * (hand._stribeck[i] + hand._load_s[i] * strain))
            assert row["torque"][i] == pytest.approx(torque)
            assert row["friction"][i] == pytest.approx(friction)
    assert limited > 50 and free > 50                # both sides of the current limit were seen


def test_hidden_parameters_are_those_of_a_small_servo():
    for hand in map(VirtualHand, range(3)):
        stall = hand._kt * hand._limit
        assert (stall > 0.10).all() and (stall < 0.15).all()                    # N m
        stiffness = hand._kt * hand._volt / hand._R * hand._gain * H.DUTY_PER_RAD
        assert (stiffness > 0.6).all()                                          # N m / rad
        play = np.degrees(hand._backlash)
        assert (play >= 0.25).all() and (play <= 0.5).all()
        assert (hand._base > 0.004).all() and (hand._base + hand._stribeck < 0.04).all()
        assert hand._zero.std() > 0


def test_what_the_object_and_gravity_press_is_what_the_gears_feel():
    """A finger that holds still against gravity: external torque = -(motor torque + friction), and
    gravity alone bears on it."""
    hand = VirtualHand(1, "palm_up")
    hand.place(np.where(np.arange(16) < 12, 0.6, 0.2))
    ticks(hand, hand.target, 40)
    data = hand._data
    assert np.abs(data.qvel).max() < 0.05
    friction = friction_forces(data, hand._model.nv)
    outside = (data.qfrc_constraint - friction - data.qfrc_bias)[hand._vadr]
    assert hand._external == pytest.approx(outside)
    rest = hand._tau + friction[hand._vadr] + outside
    assert rest == pytest.approx(np.zeros(16), abs=2e-3)
    assert np.abs(outside).max() > 0.01


def test_static_friction_holds_below_its_threshold_and_yields_above():
    """At rest without gravity the gears see the motor's torque alone, so they slip at
    (base + Stribeck) / (1 - load - load Stribeck)."""
    hand = floating(2)
    threshold = (hand._base + hand._stribeck) / (1 - hand._load - hand._load_s)
    stiffness = hand._gain * H.P_GAIN / (256 * 885) / COUNT * hand._volt / hand._R * hand._kt
    for share, moves in ((0.7, False), (1.5, True)):
        hand.place(np.full(16, 0.1))
        start = hand._data.qpos[hand._qadr].copy()
        # a command is in encoder angles
        seen = np.round((start + hand._zero) / COUNT) * COUNT
        ticks(hand, seen + share * threshold / stiffness, 20)
        moved = np.abs(hand._data.qpos[hand._qadr] - start)
        far = moved > 0.3 * threshold / stiffness
        assert far.all() if moves else (moved < 0.0003).all()


def test_the_link_has_exactly_the_play_of_its_gears_and_the_encoder_does_not_feel_it():
    hand = floating(4)
    play = [hand._model.joint(f"{joint.name}_play") for joint in H.JOINTS]
    link, seen = [], []
    here = hand.read().q                             # no error, no motor torque
    for push in (0.005, -0.005):                     # N m: less than what moves the motor
        hand._data.qfrc_applied[[joint.dofadr[0] for joint in play]] = push
        ticks(hand, here, 20)
        link.append(hand._data.qpos[[joint.qposadr[0] for joint in play]].copy())
        seen.append(hand.read().q)
    assert link[0] - link[1] == pytest.approx(hand._backlash, rel=0.05)
    assert np.abs(seen[0] - seen[1]).max() <= 1.01 * COUNT


# ---------------------------------------------------------------------------- encoder and delays
def test_readings_are_encoder_steps_with_a_zero_that_is_off():
    hand = VirtualHand(3)
    for q in (np.zeros(16), H.GRASP):
        hand.place(q)
        read = hand.read().q
        assert read / COUNT == pytest.approx(np.round(read / COUNT), abs=1e-6)
        assert np.abs(read - q - hand._zero).max() <= 0.51 * COUNT
    assert np.degrees(np.abs(hand._zero)).max() > 0.3


def test_commands_and_readings_are_late_by_the_hidden_delays(spy):
    hand = floating(6)
    rows, dt = spy(hand), hand._model.opt.timestep
    assert dt * hand.SUBSTEPS == pytest.approx(0.05)
    new = np.full(16, 0.1)
    hand.command(new)
    arrived = [np.array_equal(row["goal"], new) for row in rows]
    late = arrived.index(True)
    assert all(arrived[late:]) and abs(late * dt - hand._command_delay) <= dt / 2 and late >= 1
    assert all(np.abs(row["torque"]).max() < 0.02 for row in rows[:late])
    assert np.abs(rows[late]["torque"]).min() > 0.05
    first = hand.read()
    hand.command(new)
    second = hand.read()
    assert second.time - first.time == pytest.approx(0.05)
    age = hand._data.time - second.time
    assert age > 0 and abs(age - hand._read_delay) <= dt / 2 + 1e-9
    # the state of that moment, not of now
    then = next(row for row in rows if abs(row["time"] - second.time) < dt / 2)
    assert np.abs(then["q"] + hand._zero - second.q).max() <= 0.51 * COUNT
    assert np.abs(then["q"] - hand._data.qpos[hand._qadr]).max() > COUNT


def test_current_has_the_sign_of_the_push_and_its_limit():
    hand = floating(0)
    ticks(hand, np.zeros(16), 3)
    hand.command(np.full(16, 0.12))
    reading = hand.read()
    assert (np.abs(reading.current) <= hand._limit + 1e-3).all()
    hand._data.qpos[hand._qadr] = -0.2               # somebody bends the fingers back
    hand.command(np.full(16, 0.12))
    assert (hand.read().current > 0.1).all()


# ------------------------------------------------------------------------------------------ seeds
def run(seed, **options):
    hand = VirtualHand(seed, **options)
    hand.place(H.GRASP, stir=5)
    rng, rows = np.random.default_rng(0), []
    for _ in range(8):
        sent = hand.command(H.GRASP + rng.uniform(-0.1, 0.1, 16))
        rows.append(np.concatenate([sent, *hand.read()[:3], [hand.read().time]]))
    return np.array(rows)


@pytest.mark.parametrize("load", ["none", "balls", CUBE[0]])
def test_a_seed_is_a_hand(load):
    a, b, c = run(7, load=load), run(7, load=load), run(8, load=load)
    assert np.array_equal(a, b) and np.isfinite(a).all()
    assert np.abs(a[:, 16:32] - c[:, 16:32]).max() > 0.01


def test_seeds_differ_in_every_hidden_parameter_and_place_forgets_the_past():
    a, b = VirtualHand(1), VirtualHand(2)
    state = ("_tau", "_external", "_goal", "_qadr", "_vadr")
    hidden = [name for name, value in vars(a).items()
              if isinstance(value, (float, np.ndarray)) and name[0] == "_" and name not in state]
    assert len(hidden) >= 18
    for name in hidden:
        assert not np.any(np.asarray(getattr(a, name)) == np.asarray(getattr(b, name))), name
    fresh = run(1)
    a.place(np.zeros(16))
    ticks(a, np.full(16, 0.5), 10)
    a.place(H.GRASP, stir=5)
    rng = np.random.default_rng(0)
    again = [np.concatenate([a.command(H.GRASP + rng.uniform(-0.1, 0.1, 16)), a.read().q])
             for _ in range(8)]
    assert np.array_equal(np.array(again), fresh[:, :32])


def test_an_object_forgets_the_last_episodes_mass_friction_and_centre():
    hand = VirtualHand(4, load=CUBE[1])
    now = []
    for mass, friction in ((0.02, 0.6), (0.05, 2.0), (0.02, 0.6)):
        hand.place(H.GRASP, mass=mass, friction=friction)
        model = hand.model()
        body = model.body("object")
        assert body.mass[0] == mass
        now.append(np.hstack([body.inertia, body.ipos, *model.geom_friction,
                              *model.body_invweight0, *model.opt.gravity, *model.dof_damping]))
    first, second, third = now
    assert third == pytest.approx(first, rel=1e-12) and not np.allclose(second, first)


# -------------------------------------------------------------------------- what else is different
def fields(hand):
    """{name of a field of MjModel: its values}, without what MuJoCo derives from the others."""
    model = hand.model()
    derived = ("invweight0", "_M0", "subtreemass", "acc0", "length", "aabb", "rbound", "sameframe",
               "bvh", "body_tree", "paths", "names", "light", "cam_", "tex_")
    names = [name for name in dir(model) if isinstance(getattr(model, name), np.ndarray)]
    found = {name: np.array(getattr(model, name)) for name in names
             if not any(part in name for part in derived)}
    return found | {"gravity": np.array(model.opt.gravity)}


def changed(a, b):
    """Names of the fields in which two hands differ."""
    before, after = fields(a), fields(b)
    return {name for name in before if before[name].shape != after[name].shape
            or not np.allclose(before[name], after[name], rtol=1e-12, atol=0)}


def held(hand):
    model = hand.model()
    return model.geom_bodyid == model.body("object").id


CHANGES = {
    "contact": {"geom_friction", "geom_solref"},
    "object": {"geom_size", "body_ipos", "body_inertia"},
    "wrist": {"gravity"},
    "box": set(),                                    # without balls
}
MOTORS_MAKE = ("_gain", "_volt", "_kt", "_R", "_limit", "_base", "_stribeck", "_load", "_load_s",
               "_backlash")


@pytest.mark.parametrize("kind", CHANGES)
def test_each_difference_changes_what_it_says_and_nothing_else(kind):
    plain, other = (VirtualHand(9, load=CUBE[1], differs=d) for d in ((), (kind,)))
    assert changed(plain, other) == CHANGES[kind]
    assert other._zero.any() == other._command_delay == other._read_delay == 0
    a, b, own = plain.model(), other.model(), held(plain)
    if kind == "object":
        assert np.array_equal(a.geom_size[~own], b.geom_size[~own])
        assert not np.abs(b.body_ipos - a.body_ipos)[:-1].any()
        sizes, centres = [], []
        for seed in range(10):
            m = VirtualHand(seed, load=CUBE[1], differs=("object",)).model()
            share = m.geom_size[own] / a.geom_size[own]
            assert np.ptp(share) < 1e-9
            sizes.append(abs(share[0, 0] - 1))
            centres.append(np.abs(m.body("object").ipos).max())
        assert 0.015 < max(sizes) <= 0.03 and 0.0015 < max(centres) <= 0.003
    if kind == "contact":
        tips = np.array([b.geom(g).name.endswith("_tip") for g in range(b.ngeom)])
        links = ~own & ~tips
        assert tips.sum() == 4 and np.array_equal(a.geom_friction[own], b.geom_friction[own])
        assert 0.85 <= b.geom_friction[tips, 0].min() == b.geom_friction[tips, 0].max() <= 1.1
        assert 0.3 <= b.geom_friction[links, 0].min() == b.geom_friction[links, 0].max() <= 0.6
        patch = b.geom_friction[tips, 1] / b.geom_friction[tips, 0]
        assert 0.003 <= patch.min() and patch.max() <= 0.008
        softness, bounce = b.geom_solref[~own].T
        assert 0.012 <= softness[0] <= 0.028 and not np.ptp(softness)
        assert 0.7 <= bounce[0] <= 1.2 and bounce[0] != 1 and not np.ptp(bounce)
    if kind == "wrist":
        angles = []
        for seed in range(20):
            pulls = [sim.VirtualHand(seed, wrist, differs=("wrist",)).model().opt.gravity
                     for wrist in ("palm_up", "thumb_up")]
            for pull, wrist in zip(pulls, ("palm_up", "thumb_up")):
                assert np.linalg.norm(pull) == pytest.approx(9.81)
                cosine = pull @ sim.gravity(sim.WRISTS[wrist])[0] / 9.81
                angles.append(np.degrees(np.arccos(min(1, cosine))))
        assert max(angles) <= 5 and max(angles) > 2


def test_motors_differ_in_gears_and_electronics_alone():
    plain, other = (VirtualHand(9, load=CUBE[1], differs=d) for d in ((), ("motor",)))
    a, b = plain.model(), other.model()
    for name in ("geom_type", "geom_size", "geom_pos", "geom_quat", "geom_condim", "geom_priority",
                 "geom_friction", "geom_solref", "body_pos", "body_quat", "body_mass", "body_ipos"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert np.array_equal(a.opt.gravity, b.opt.gravity)
    assert a.nu == 16 and b.nu == 0 and b.njnt == a.njnt + 16
    assert (np.abs(other._zero) <= np.radians(0.6)).all() and other._zero.all()
    assert 0.004 <= other._command_delay <= 0.012 and 0.003 <= other._read_delay <= 0.008


def test_a_hand_is_made_of_the_published_boxes_a_little_off():
    plain, other = (VirtualHand(9, load=CUBE[1], differs=d) for d in ((), ("shape",)))
    kinds = {"geom_type", "geom_size", "geom_pos", "geom_quat", "body_pos", "body_quat"}
    assert plain.model().ngeom != other.model().ngeom
    a, b = plain.model(), other.model()
    for name in ("body_mass", "body_inertia", "body_ipos", "dof_damping", "jnt_range",
                 "dof_armature", "actuator_gainprm", "site_pos"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    for name in ("geom_size", "geom_pos", "geom_condim", "geom_friction", "geom_solref"):
        assert np.array_equal(getattr(a, name)[held(plain)], getattr(b, name)[held(other)]), name
    assert kinds < changed(plain, other)
    assert not {"gravity", "qpos0"} & changed(plain, other)
    widths = []
    for link in H.LINKS:
        body = b.body(link.name).id
        geoms = np.flatnonzero(b.geom_bodyid == body)
        assert len(geoms) == len(link.boxes), link.name
        for k, (g, (centre, half, *quat)) in enumerate(zip(geoms, link.boxes)):
            tip = link.name in H.TIPS and k == len(link.boxes) - 1
            assert b.geom_type[g] == sim.GEOM_TYPE["ellipsoid" if tip else "box"]
            assert b.geom(g).name == (f"{link.name}_tip" if tip else "")
            assert b.geom_pos[g] == pytest.approx(np.array(centre))
            turn = np.array(quat[0] if quat else (1, 0, 0, 0), float)
            assert abs(b.geom_quat[g] @ turn) == pytest.approx(1, abs=1e-5)
            off = b.geom_size[g] - half
            assert np.abs(off).max() <= 0.0005 + 1e-9
            widths.extend(off)
    assert np.std(widths) > 0.0002 and len(set(np.round(widths, 9))) > 0.9 * len(widths)


def test_links_and_joint_axes_are_a_little_off_and_the_palm_is_not():
    tilts, lengths = [], []
    for seed in range(4):
        model = VirtualHand(seed, differs=("shape",)).model()
        straight = sim.build().compile()
        for link in H.LINKS:
            body, meant = model.body(link.name), straight.body(link.name)
            off = np.abs(body.pos - meant.pos)
            axis, where = (sim.rotate(b.quat, np.array([0, 0, -1.0])) for b in (body, meant))
            angle = np.degrees(np.arccos(min(1, axis @ where)))
            turn = np.linalg.norm(sim.rotation_between(meant.quat, body.quat))
            if link.joint is None:
                assert not off.any() and angle < 1e-5
                continue
            assert off.max() <= 0.0005 and np.degrees(turn) <= 1 + 1e-6
            tilts.append(angle)
            lengths.append(off.max())
    assert 0.5 < max(tilts) <= 1 + 1e-6 and min(lengths) > 0


def balls(hand):
    """What a Chaos Box is like: walls, radii, masses, softness, friction, degrees of freedom."""
    model = hand.model()
    names = [model.body(b).name for b in range(model.nbody)]
    geoms = [g for g in range(model.ngeom) if names[model.geom_bodyid[g]].startswith("ball")]
    walls = model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE
    return dict(walls=model.geom_pos[walls], radius=model.geom_size[geoms, 0],
                mass=model.body_mass[model.geom_bodyid[geoms]], soft=model.geom_solref[geoms, 0],
                friction=model.geom_friction[geoms, 0], nv=model.nv)


def test_every_hand_has_a_box_of_its_own_and_none_has_the_simulated_one():
    simulated = balls(VirtualHand(3, load="balls", differs=("shape", "wrist")))
    usual = sim.Balls()
    assert len(simulated["radius"]) == usual.count and (simulated["mass"] == usual.mass).all()
    assert (simulated["soft"] == usual.softness).all() and not simulated["friction"].any()
    corners = sorted({*usual.low, *usual.high})
    for corner in corners:
        assert np.isclose(simulated["walls"], corner).any()
    boxes = [balls(VirtualHand(seed, load="balls", differs=("box",))) for seed in range(6)]
    for box in boxes:
        volume = (4 / 3 * np.pi * box["radius"] ** 3).sum()
        assert 0.12 < volume / (0.21 * 0.215 * 0.16) < 0.40                # and sides +-1.5 cm
        assert 0.019 <= box["radius"].min() and box["radius"].max() <= 0.035
        assert 0.005 <= box["mass"][0] <= 0.015 and 0.007 <= box["soft"][0] <= 0.018
        assert 0.2 <= box["friction"][0] <= 0.8
        for name in ("walls", "mass", "soft"):
            assert not np.isclose(np.resize(box[name], simulated[name].shape), simulated[name],
                                  rtol=1e-6).all(), name
        off = np.abs(box["walls"] - simulated["walls"])
        assert 0 < off.max() <= 0.015
    assert len({len(box["radius"]) for box in boxes}) > 2
    assert len({box["nv"] > 16 + 3 * len(box["radius"]) for box in boxes}) == 2     # some roll
    # the same hand without and with its box: nothing but the balls
    a, b = (VirtualHand(5, load="balls", differs=d) for d in ((), ("box",)))
    own = [g for g in range(a.model().ngeom) if a.model().geom_bodyid[g] in range(1, 18)]
    for name in ("geom_size", "geom_pos", "geom_condim", "geom_solref"):
        assert np.array_equal(getattr(a.model(), name)[own], getattr(b.model(), name)[own]), name
    assert np.array_equal(a.model().opt.gravity, b.model().opt.gravity)


@pytest.mark.parametrize("kind", sim.DIFFERS)
def test_what_one_kind_draws_does_not_hang_on_the_others(kind):
    """Or a hand that differs in less could not be compared with the whole one."""
    whole, part = (VirtualHand(9, load=CUBE[1], differs=d) for d in (sim.DIFFERS, (kind,)))
    a, b = whole.model(), part.model()
    names = {"shape": ("body_pos", "body_quat"), "object": ("body_ipos", "body_inertia")}
    for name in names.get(kind, ()):
        assert np.array_equal(getattr(a, name), getattr(b, name))
    if kind == "wrist":
        assert np.array_equal(a.opt.gravity, b.opt.gravity)
    if kind == "contact":
        assert a.geom_solref[0] == pytest.approx(b.geom_solref[0])
        assert {*np.unique(a.geom_friction[~held(whole), 0])} == {
            *np.unique(b.geom_friction[~held(part), 0])}
    if kind == "motor":
        for name in (*MOTORS_MAKE, "_zero", "_command_delay", "_read_delay"):
            assert np.array_equal(getattr(whole, name), getattr(part, name)), name
    if kind == "box":
        same = [balls(VirtualHand(9, load="balls", differs=d)) for d in (sim.DIFFERS, (kind,))]
        for name in ("walls", "radius", "mass", "soft", "friction"):
            assert np.array_equal(same[0][name], same[1][name]), name


def test_a_port_names_a_seed_and_what_differs():
    assert sim.open_hand("sim:7").differs == frozenset(sim.DIFFERS)
    assert sim.open_hand("sim:7").seed == 7 and sim.open_hand("sim").seed == 0
    hand = sim.open_hand("sim:7:motor+shape", wrist="palm_down", load="balls")
    assert hand.differs == {"motor", "shape"} and (hand.seed, hand.load) == (7, "balls")
    assert hand.model().opt.gravity == pytest.approx([0, 0, 9.81])
    for wrong in ("sim:", "sim:x", "sim:-1", "sim:1.5", "sim:\u00b2", "sim:7:", "sim:7:motors",
                  "sim:7:motor,shape", "sim:7:motor:shape"):
        with pytest.raises(H.Problem, match="--port"):
            sim.resolve_port(wrong)


def test_the_balls_press_on_the_fingers_at_random():
    loads = []
    for stir in (1, 2):
        hand = VirtualHand(0, load="balls")
        hand.place(H.GRASP, stir=stir)
        ticks(hand, H.GRASP, 4)
        touched = set()
        for contact in hand._data.contact:
            bodies = hand._model.geom_bodyid[[contact.geom1, contact.geom2]]
            touched.add(tuple(sorted(hand._model.body(b).name[:4] for b in bodies)))
        fingers = {pair for pair in touched if pair[0] == "ball" and pair[1][2:3] == "_"}
        assert len(fingers) >= 2, touched
        loads.append(hand._external.copy())
    assert np.abs(loads[0] - loads[1]).max() > 0.003


def test_an_object_rests_in_closed_fingers_when_an_episode_begins():
    for seed, wrist in ((0, "palm_up"), (1, "palm_down")):
        trial, = sim.trials(CUBE[1:2], wrist, ["+z"], 1, seed)
        hand = VirtualHand(seed, wrist, trial.obj)
        hand.begin(trial)
        assert np.linalg.norm(hand._data.qvel[-6:]) < 0.05
        assert np.linalg.norm(hand.object_qpos()[:3] - trial.grasp[16:19]) < 0.02
        assert np.linalg.norm(hand.model().opt.gravity) == pytest.approx(9.81)
        assert not hand.model().dof_damping[-6:].any()


# --------------------------------------------------------------------------- nothing looks behind
@pytest.mark.parametrize("script", ["train_policy.py", "collect.py", "fit_ndm.py", "deploy.py"])
def test_nothing_that_learns_looks_behind_the_interface(script):
    """No private attribute but a script's own, by name or by getattr, and no door but
    `open_hand`. (A NamedTuple's `_replace` is public in spite of its name.)"""
    hidden = {name for name in [*vars(VirtualHand(0)), *vars(VirtualHand)]
              if name[0] == "_" and not name.endswith("__")}
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        where = f"{script}:{getattr(node, 'lineno', 0)}"
        private = isinstance(node, ast.Attribute) and node.attr[0] == "_"
        if private and node.attr[-2:] != "__" and node.attr != "_replace":
            assert isinstance(node.value, ast.Name) and node.value.id == "self", where
            assert node.attr not in hidden, where
        if isinstance(node, ast.Constant):
            assert node.value not in hidden, where
        name = getattr(node, "id", getattr(node, "attr", None))
        assert name not in ("VirtualHand", "vars", "__dict__"), where


# --------------------------------------------------------------------------------------- commands
def test_no_command_leaves_the_limits_or_jumps():
    hand, rng = VirtualHand(0), np.random.default_rng(0)
    last = hand.target
    for scale in (0.05, 0.5, 10, 1e6) * 10:
        sent = hand.command(H.GRASP + scale * rng.normal(size=16))
        assert (sent >= H.LOW).all() and (sent <= H.HIGH).all()
        assert np.abs(sent - last).max() <= H.MAX_STEP + 1e-12
        assert np.array_equal(sent, hand.target)
        last = sent
    hand.rest()
    here = np.clip(hand.read().q, H.LOW, H.HIGH)
    assert np.abs(hand.command(np.full(16, 1e9)) - here).max() <= H.MAX_STEP + 1e-12


@pytest.mark.parametrize("target", [
    np.full(16, np.nan), np.r_[np.inf, np.zeros(15)], np.zeros(15), np.zeros((1, 16)), 0.0])
def test_a_command_that_is_none_moves_nothing(target):
    hand = VirtualHand(0)
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


def test_balls_that_are_taken_out_touch_nothing_until_they_are_back():
    hand = sim.VirtualHand(3, load="balls")
    balls = [i for i in range(hand._model.ngeom) if hand._model.geom_contype[i] == sim.BALL]

    def touching():
        hand.command(H.GRASP)
        pairs = hand._data.contact.geom[:hand._data.ncon]
        return set(pairs.flatten().tolist()) & set(balls)

    hand.place(H.GRASP, stir=1)
    assert touching() & set(balls[-4:])
    hand.place(H.GRASP, stir=1, out=4)
    assert touching() and not touching() & set(balls[-4:])
    hand.place(H.GRASP, stir=1)
    assert touching() & set(balls[-4:])
