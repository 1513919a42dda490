"""The world against published figures, hand-worked cases, and itself at other time steps and thread
counts."""
import argparse
import ast
import os
import subprocess
import sys
from types import SimpleNamespace

import mujoco
import numpy as np
import pytest
import torch

import hand as H
import sim
import train_policy as T
from conftest import CUBE, ROOT, small_cache

pytestmark = pytest.mark.usefixtures("grasps")

# LEAP Hand (right) as its URDF publishes it, copied by hand: position and quaternion of each link
# in its parent, joint about -z of the link; the last entry is the centre of the fingertip.
ACROSS, DOWN = (0.500003, 0.5, 0.5, -0.499997), (0.500003, -0.5, -0.499997, 0.5)
BACK = (0.500003, 0.5, -0.5, 0.499997)


def published_finger(base, length):
    return ((base, ACROSS), ((-0.0122, 0.0381, 0.0145), DOWN), ((0.015, 0.0143, -0.013), BACK),
            ((0, -length, 0.0002), (1, 0, 0, 0)), (-0.0013, -0.0336, 0.0145))


PUBLISHED = {
    "if": published_finger((-0.007, 0.023, -0.0187), 0.0361),
    "mf": published_finger((-0.0071, -0.0224, -0.0187), 0.0361),
    "rf": published_finger((-0.00709, -0.0678, -0.0187), 0.03609),
    "th": (((-0.0693, -0.0012, -0.0216), (0.707109, 0, 0.707105, 0)),
           ((0, 0.0143, -0.013), BACK),
           ((0, 0.0145, -0.017), (0.707109, -0.707105, 0, 0)),
           ((0, 0.0466, 0.0002), (1e-06, 0, 0, 1)), (-0.0013, -0.0456, -0.0145)),
}
LIMITS = {"mcp": (-0.314, 2.23), "rot": (-1.047, 1.047), "pip": (-0.506, 1.885),
          "dip": (-0.366, 2.042)}
THUMB = {"cmc": (-0.349, 2.094), "axl": (-0.349, 2.094), "mcp": (-0.47, 2.443),
         "ipl": (-1.34, 1.88)}
MOTORS = [1, 0, 2, 3, 5, 4, 6, 7, 9, 8, 10, 11, 12, 13, 14, 15]
STEP = 1 / (sim.CONTROL_HZ * sim.SUBSTEPS)


def matrix(q):
    w, x, y, z = np.array(q) / np.linalg.norm(q)
    return np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                     [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                     [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])


def fingertip(finger, q):
    """Forward kinematics of the published chain: centre of a fingertip in the frame of the palm."""
    *links, tip = PUBLISHED[finger]
    position, rotation = np.zeros(3), np.eye(3)
    for (pos, quat), angle in zip(links, q):
        c, s = np.cos(angle), np.sin(angle)
        position = position + rotation @ pos
        rotation = rotation @ matrix(quat) @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    return position + rotation @ tip


def fingertips(q):
    """All four (4, 3) in the world: the palm is turned by half a turn about x."""
    return np.array([[1, -1, -1] * fingertip(finger, q[4 * f:4 * f + 4])
                     for f, finger in enumerate(PUBLISHED)])


def still(n=4, **options):
    """Nothing but the grasps differs from hand to hand."""
    options = dict(randomize=(), noise=0) | options
    return sim.Rotation(n, CUBE[1:2], progress=False, **options)


# --------------------------------------------------------------------------------------- the hand
def test_fingertips_are_where_the_published_chain_puts_them():
    model = sim.build().compile()
    data, rng = mujoco.MjData(model), np.random.default_rng(0)
    for q in [np.zeros(16), H.GRASP, *rng.uniform(H.LOW, H.HIGH, (20, 16))]:
        data.qpos[:] = q
        mujoco.mj_kinematics(model, data)
        seen = np.array([data.site(tip).xpos for tip in H.TIPS])
        assert seen == pytest.approx(fingertips(q), abs=2e-5)


def test_joints_limits_motors_and_mass_are_the_published_ones():
    names = [f"{finger}_{joint}" for finger in ("if", "mf", "rf") for joint in LIMITS]
    names += [f"th_{joint}" for joint in THUMB]
    limits = [*LIMITS.values()] * 3 + [*THUMB.values()]
    mass = 0.237 + 3 * (0.044 + 0.032 + 0.037 + 0.016) + 0.032 + 0.003 + 0.038 + 0.049
    assert [j.name for j in H.JOINTS] == names and H.MOTOR_ID == MOTORS
    for model in (sim.build().compile(), sim.build(CUBE[0]).compile()):
        assert [model.joint(i).name for i in range(16)] == names
        assert [model.actuator(i).name for i in range(16)] == names
        assert model.jnt_range[:16] == pytest.approx(np.array(limits))
        assert model.body("palm").subtreemass[0] == pytest.approx(mass)
    assert (H.GRASP > H.LOW).all() and (H.GRASP < H.HIGH).all()


def test_positive_angles_close_the_fingers():
    """Every finger joint but the side ones brings the fingertip nearer to the palm side (z of the
    world points out of it)."""
    for joint in (0, 2, 3, 4, 6, 7, 8, 10, 11):
        bent = 0.5 * np.eye(16)[joint]
        model = sim.build().compile()
        data = mujoco.MjData(model)
        data.qpos[:] = bent
        mujoco.mj_kinematics(model, data)
        assert data.site_xpos[joint // 4][2] > fingertips(np.zeros(16))[joint // 4][2] + 0.01


def corners(shapes):
    """Lowest and highest corner (2, 3) m of a link's shapes or published boxes, in its frame."""
    low, high = [], []
    for kind, centre, end, *rest in shapes:
        if kind == "capsule":
            ends, spread = np.array([centre, end]), rest[0]
        else:
            ends = np.array([centre])
            spread = np.abs(matrix(rest[0]) if rest else np.eye(3)) @ end
        low.append(ends.min(0) - spread)
        high.append(ends.max(0) + spread)
    return np.array([np.min(low, 0), np.max(high, 0)])


def boxes(link, without=()):
    return [("box", *box) for k, box in enumerate(link.boxes) if k not in without]


# the bulge of a motor on the outer side of the thumb, where nothing comes
BULGES = {"th_px": [4]}
# m, how far a shape may end beside the published boxes
ACROSS_FINGER, ACROSS_THUMB, REACH = 0.0016, 0.0040, 0.0011


def test_the_shapes_are_as_wide_and_as_long_as_the_published_boxes():
    """x is a finger's thickness, y its length, z (along the joint's axis) its width. The last two
    links of a finger meet neighbours and objects; a base's brackets and forks do not."""
    links = {link.name: link for link in H.LINKS}
    for name, link in links.items():
        if name[-2:] not in ("md", "ds", "px") or name in ("if_px", "mf_px", "rf_px"):
            continue
        off = corners(link.shapes) - corners(boxes(link, BULGES.get(name, [])))
        across = ACROSS_THUMB if name.startswith("th") else ACROSS_FINGER
        assert np.abs(off[:, [0, 2]]).max() <= across, (name, off)
    for name, end in (("if_md", 0), ("if_ds", 0), ("th_ds", 0), ("mf_ds", 0), ("rf_ds", 0)):
        off = corners(links[name].shapes) - corners(boxes(links[name]))
        assert np.abs(off[end, 1]) <= REACH, (name, off)
    for finger in ("if", "mf", "rf"):                        # a knuckle is as wide as its motor
        off = corners(links[f"{finger}_px"].shapes) - corners(boxes(links[f"{finger}_px"]))
        assert np.abs(off).max() <= ACROSS_FINGER, off
    palm = links["palm"]
    assert np.abs(corners(palm.shapes) - corners(boxes(palm))).max() <= 0.0041


def meets_objects(model):
    """Which geoms of a model meet the object, and of these which also meet fingers, (ngeom,)."""
    bit = model.geom_contype[model.geom_bodyid == model.body("object").id][0]
    meets = (model.geom_conaffinity & bit) > 0
    return meets & (model.geom_contype == 0), meets & (model.geom_contype > 0)


def test_objects_meet_the_published_boxes_and_fingers_each_others_shapes():
    model = sim.build(CUBE[0]).compile()
    boxes, both = meets_objects(model)
    assert {model.geom(g).name for g in np.flatnonzero(both)} == {f"{tip}_tip" for tip in H.TIPS}
    for link in H.LINKS:
        body = model.body(link.name).id
        mine = np.flatnonzero(boxes & (model.geom_bodyid == body))
        published = link.boxes[:-1] if link.name in H.TIPS else link.boxes
        assert len(mine) == len(published)
        for g, (centre, half, *_) in zip(mine, published):
            assert model.geom_type[g] == mujoco.mjtGeom.mjGEOM_BOX
            assert model.geom_pos[g] == pytest.approx(centre)
            assert model.geom_size[g] == pytest.approx(half)
    # thin boxes that pass into each other make MuJoCo end the process: fingers have none
    fingers = (model.geom_contype > 0) & (model.geom_type == mujoco.mjtGeom.mjGEOM_BOX)
    fingers &= model.geom_bodyid != model.body("object").id
    assert model.geom_size[fingers].min() > 0.004


def test_a_link_without_published_boxes_meets_objects_with_its_shapes():
    links = tuple(link._replace(boxes=()) for link in H.LINKS)
    model = sim.build(CUBE[0], links=links).compile()
    boxes, both = meets_objects(model)
    assert not boxes.any() and both.sum() == sum(len(link.shapes) for link in H.LINKS)


# ---------------------------------------------------------------------------- rotation arithmetic
def test_quaternions_by_hand():
    one, i, j, k = np.eye(4)
    assert sim.multiply(i, j) == pytest.approx(k) and sim.multiply(j, i) == pytest.approx(-k)
    assert sim.multiply(i, i) == pytest.approx(-one)
    quarter = sim.from_axis_angle([0, 0, 1], np.pi / 2)
    assert quarter == pytest.approx([0.5 ** 0.5, 0, 0, 0.5 ** 0.5])
    assert sim.rotate(quarter, np.array([1.0, 0, 0])) == pytest.approx([0, 1, 0])
    back = sim.rotate(sim.conjugate(quarter), np.array([[1.0, 0, 0], [0, 1, 5]]))
    assert back == pytest.approx(np.array([[0, -1, 0], [1, 0, 5]]))
    # first a quarter about x, then one about z, takes z to x
    both = sim.multiply(quarter, sim.from_axis_angle([1, 0, 0], np.pi / 2))
    assert sim.rotate(both, np.array([0.0, 0, 1])) == pytest.approx([1, 0, 0])


ONE = np.eye(4)[0]


def test_a_rotation_takes_the_short_way_round():
    axis = np.array([2, -1, 2]) / 3
    for angle in (0.0, 1e-7, 0.3, 3.0):
        a = sim.from_axis_angle(axis, angle)
        assert sim.rotation_between(ONE, a) == pytest.approx(angle * axis, rel=1e-6, abs=1e-12)
        assert sim.rotation_between(ONE, -a) == pytest.approx(angle * axis, rel=1e-6, abs=1e-12)
    long = sim.rotation_between(ONE, sim.from_axis_angle(axis, 4.0))
    assert long == pytest.approx((4.0 - 2 * np.pi) * axis)


@pytest.mark.parametrize("wrist, down", [
    ("palm_up", (0, 0, -1)), ("palm_down", (0, 0, 1)), ("thumb_up", (0, 1, 0)),
    ("thumb_down", (0, -1, 0)), ("base_up", (1, 0, 0)), ("base_down", (-1, 0, 0))])
def test_gravity_of_each_wrist(wrist, down):
    """In the frame of the hand: z out of the palm, x along the fingers, thumb at -y."""
    assert sim.gravity(sim.WRISTS[wrist])[0] == pytest.approx(down)
    env = still(1, wrists=[wrist])
    for model in (env.models[0], sim.build(wrist=sim.WRISTS[wrist]).compile()):
        assert model.opt.gravity == pytest.approx(9.81 * np.array(down))


def test_an_axis_may_be_written_either_way_round():
    """argparse takes "-z" for an option and lets "z-" pass."""
    assert set(sim.AXES) == {s + a for s in "+-" for a in "xyz"}
    for name in sim.AXES:
        assert sim.axis_name(name) == sim.axis_name(name[::-1]) == name
    for wrong in ("z", "", "+w", "+-z", "++", "--z"):
        with pytest.raises(ValueError):
            sim.axis_name(wrong)
    parser = argparse.ArgumentParser()
    parser.add_argument("--axis", nargs="+", type=sim.axis_name)
    assert parser.parse_args(["--axis", "z-", "+z", "x+"]).axis == ["-z", "+z", "+x"]


# ----------------------------------------------------------------------------- metrics and reward
def test_omega_of_an_object_spun_by_hand_is_in_the_frame_of_the_hand():
    env = still(2, weakest=0.0)
    env.level[:] = 0
    env.reset([0, 1])
    omega = np.array([[0.0, 0, 3.0], [1.0, -2.0, 0.5]])
    tilt = sim.from_axis_angle(np.array([[0, 0, 1.0], [1, 0, 0]]), np.array([0.4, 1.2]))
    env.pos[:] = env.home[:] = 0.3, 0, 0.5                  # away from the fingers
    env.quat[:] = tilt
    # MuJoCo wants it in the frame of the object
    env.state[:, -3:] = sim.rotate(sim.conjugate(tilt), omega)
    for _ in range(3):
        env.step(env.target)
        assert env.omega == pytest.approx(omega, rel=1e-3) and not env.fallen.any()


def spinning(omega, steps):
    """Orientations (steps + 1, 4) of something that turns at omega (3,) rad/s."""
    omega = np.array(omega)
    speed = np.linalg.norm(omega)
    return np.array([sim.from_axis_angle(omega / speed, speed * t / 20) for t in range(steps + 1)])


class Spun:
    """In the place of `sim.Rotation`: two objects that turn at a constant omega; the second falls
    in its 101st step. `reset` then puts it back, as it does with a real one."""
    n = 2
    axis = np.array([[0, 0, 1.0], [0, 0, -1.0]])
    turns = np.stack([spinning((0.3, 0.4, 0.5), 400), spinning((0, 0.1, -1.0), 400)], 1)
    fallen, pos, quat, t, begun = np.zeros(2, bool), np.zeros((2, 3)), turns[0], 0, None

    def begin(self, trials):
        self.begun = trials

    def reset(self, ids):
        self.fallen[ids] = False

    def step(self, target):
        self.t += 1
        self.quat = self.turns[self.t]
        self.fallen = np.array([False, self.t == 101])


@pytest.mark.parametrize("trials", [None, ["one", "two"]])
def test_metrics_by_hand(trials):
    seen, env = [], Spun()
    r = sim.run_episodes(env, lambda env: None, seen.append, trials=trials)
    assert len(seen) == 400 and env.begun == trials
    assert r["RotR"] == pytest.approx([400 * 0.5, 100 * 1.0])
    assert r["TTF"] == pytest.approx([20, 5])
    assert r["RotP"] == pytest.approx([0.5, 0.1])


def test_the_referee_measures_what_a_plain_loop_does_and_nothing_after_a_fall():
    rng, n, steps = np.random.default_rng(0), 5, 60
    axis = np.array([sim.AXES[a] for a in ("+z", "-z", "+x", "-y", "+z")], float)
    home = rng.normal(size=(n, 3))
    pos = home + rng.uniform(-0.02, 0.02, (steps + 1, n, 3))
    pos[0] = home
    quat = [np.array([sim.from_axis_angle([0.6, 0, 0.8], 0.2)] * n)]
    for t in range(steps):
        axes = rng.normal(size=(n, 3))
        axes /= np.linalg.norm(axes, axis=1, keepdims=True)
        quat.append(sim.multiply(sim.from_axis_angle(axes, rng.uniform(0, 0.3, n)), quat[-1]))
    pos[30, 1] = home[1] + [0, 0, -0.061]                    # falls, and comes back
    lost = np.zeros((steps + 1, n), bool)
    lost[12, 3] = True
    pos[1, 4] = home[4] + 1                                  # in the first step

    referee, alive = sim.Referee(axis, pos[0], quat[0]), []
    for t in range(1, steps + 1):
        alive.append(referee(pos[t], quat[t], lost=lost[t]).copy())
    result = referee.result()

    for i, held in enumerate((60, 29, 60, 11, 0)):
        forward, sideways = 0.0, []
        for t in range(1, held + 1):
            a, b = quat[t - 1][i], quat[t][i]
            w, *u = sim.multiply(b, sim.conjugate(a))
            angle = 2 * np.arccos(min(1, abs(w)))
            omega = 20 * angle * np.array(u) / np.linalg.norm(u) * np.sign(w)
            forward += omega @ axis[i]
            sideways.append(np.linalg.norm(np.cross(omega, axis[i])))
        assert result["RotR"][i] == pytest.approx(forward)
        assert result["TTF"][i] == pytest.approx(held / 20)
        assert result["RotP"][i] == pytest.approx(np.mean(sideways) if held else 0)
        assert sum(a[i] for a in alive) == held


def test_the_referee_measures_about_the_axis_of_the_moment():
    axis, pos, still = np.array([[0.0, 0, 1]]), np.zeros((1, 3)), np.array([[1.0, 0, 0, 0]])
    referee, turned = sim.Referee(axis, pos, still), sim.from_axis_angle([[0, 0, 1]], [0.1])
    referee(pos, turned)
    axis[:] = 0, 0, -1
    referee(pos, sim.multiply(turned, turned))
    assert referee.result()["RotR"] == pytest.approx([0], abs=1e-9)


def stage(**changes):
    """An object at rest at the canonical grasp, seen by `Task`, with one thing changed."""
    env = SimpleNamespace(
        n=1, q=H.GRASP[None].copy(), measured=H.GRASP[None].copy(), dq=np.zeros((1, 16)),
        target=H.GRASP[None].copy(),
        omega=np.zeros((1, 3)), axis=np.array([[0, 0, 1.0]]), quat=np.array([[1.0, 0, 0, 0]]),
        vel=np.zeros((1, 6)), pos=np.zeros((1, 3)), home=np.zeros((1, 3)),
        contact=np.zeros((1, 4, 4)), fallen=np.zeros(1, bool), objects=CUBE[:1],
        which=np.zeros(1, int), wrists=[0], cell=np.zeros(1, int), cells=[0], level=np.ones(1),
        zero=np.zeros((1, 16)))
    task = T.Task(env)
    vars(env).update({name: np.array([value]) for name, value in changes.items()})
    return task


def gained(**changes):
    return (stage(**changes).advance() - stage().advance())[0]


def test_reward_terms_by_hand():
    assert gained(omega=(0, 0, 0.3)) == pytest.approx(T.A_ROT * 0.3)
    assert gained(omega=(0, 0, -0.3)) == pytest.approx(-T.A_ROT * 0.3)
    assert gained(omega=(0, 0, 9.0)) == pytest.approx(T.A_ROT * T.C_ROT)
    assert gained(omega=(0.2, -0.1, 0)) == pytest.approx(-T.A_ROTP[1] * 0.3)     # |omega x k|_1
    assert gained(vel=(0.1, 0, 0.2, 7, 7, 7)) == pytest.approx(-T.A_LIN * 0.05)
    moved = H.GRASP + 0.1 * np.eye(16)[3]
    assert gained(q=moved, measured=moved, target=moved) == pytest.approx(-T.A_POSE * 0.01)
    dq = 0.5 * np.eye(16)[2]
    tau = 0.5 * 0.366 ** 2 / 2.811                           # back-EMF alone
    assert gained(dq=dq) == pytest.approx(-T.A_WORK * tau * 0.5 - T.A_TORQUE * tau ** 2)
    far = H.GRASP + np.eye(16)[1]                            # 1 rad off: current limit
    assert gained(target=far) == pytest.approx(-T.A_TORQUE * (0.366 * 0.350) ** 2)
    touching = np.zeros((4, 4))
    touching[:2, 0] = 1, 3
    assert gained(contact=touching) == pytest.approx(2 * T.A_CONTACT)
    assert gained(contact=np.ones((4, 4))) == pytest.approx(3 * T.A_CONTACT)
    assert gained(pos=(0.003, 0, -0.004)) == pytest.approx(-T.A_POS * 0.005)
    assert gained(fallen=True) == pytest.approx(-T.FALL_PENALTY[1])
    rest, turning = stage(), stage(omega=(0, 0, 0.3))
    rest.holds[:] = turning.holds[:] = False                 # before it can hold: worth half
    assert turning.advance()[0] - rest.advance()[0] == pytest.approx(0.5 * T.A_ROT * 0.3)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_holding_and_the_axis_gain_weight_with_the_level(level):
    still, fast, wobbly, fallen = (stage(level=level, **changes) for changes in (
        {}, {"omega": (0, 0, 9)}, {"omega": (0.5, 0, 0)}, {"fallen": True}))
    reward = still.advance()[0]
    a_rotp, penalty = ((1 - level) * low + level * high
                       for low, high in (T.A_ROTP, T.FALL_PENALTY))
    assert wobbly.advance()[0] - reward == pytest.approx(-a_rotp * 0.5)
    assert fast.advance()[0] - reward == pytest.approx(T.A_ROT * T.C_ROT)
    assert fallen.advance()[0] - reward == pytest.approx(-penalty)


def test_a_glitch_costs_no_more_than_a_fall():
    wild = stage(vel=np.full(6, 1e5), omega=np.full(3, 1e5), dq=np.full(16, 1e5))
    assert wild.advance()[0] == -T.FALL_PENALTY[1]
    assert stage(vel=np.full(6, 1e5), fallen=True).advance()[0] == -2 * T.FALL_PENALTY[1]


def test_guiding_goal_is_a_quarter_turn_ahead_and_moves_on():
    def turn(degrees):
        return sim.from_axis_angle([0, 0, 1.0], np.radians(degrees))

    task = stage()
    start = task.advance()[0]
    assert task.goal[0] == pytest.approx(turn(90))
    task.env.quat = turn(60)[None]                           # 30 degrees away: closer, not there
    nearer = task.advance()[0]
    assert nearer > start and task.goal[0] == pytest.approx(turn(90))
    task.env.quat = turn(80)[None]
    there = task.advance()[0]
    assert there > nearer + 0.5 * T.GOAL_BONUS
    assert task.goal[0] == pytest.approx(turn(170))


# ------------------------------------------------------------------ what a policy sees and commands
def test_a_history_is_what_a_plain_loop_would_keep():
    rng, n = np.random.default_rng(0), 3
    q, target = rng.normal(size=(2, 14, n, 16))
    history = sim.begin_history(q[0], target[0])
    assert history.shape == (n, sim.W, 2, 16) and history.dtype == torch.float32
    kept = [(q[0], target[0])] * sim.W
    for t in range(14):
        if t:
            before = history.clone()
            after = sim.push_history(history, q[t], target[t])
            assert torch.equal(history, before)              # the old one is left alone
            kept, history = [*kept[1:], (q[t], target[t])], after
        for w, (its_q, its_target) in enumerate(kept):
            assert np.array_equal(history[:, w, 0], its_q.astype(np.float32))
            assert np.array_equal(history[:, w, 1], its_target.astype(np.float32))


def test_the_observation_is_positions_then_loads_then_wrist_and_axis():
    rng = np.random.default_rng(0)
    history = torch.tensor(rng.normal(size=(2, sim.W, 2, 16)), dtype=torch.float32)
    wrist, axis = rng.normal(size=(2, 4)), rng.normal(size=(2, 3))
    seen = sim.observation(history, wrist, axis)
    assert seen.shape == (2, 327) == (2, sim.OBSERVED) and seen.dtype == torch.float32
    for i in range(2):
        for w in range(10):
            for j in range(16):
                q, target = history[i, w, :, j].tolist()
                assert seen[i, 16 * w + j].item() == pytest.approx(q - H.GRASP[j], abs=1e-6)
                assert seen[i, 160 + 16 * w + j].item() == pytest.approx(10 * (target - q),
                                                                         abs=1e-5)
        assert seen[i, 320:].tolist() == pytest.approx([*wrist[i], *axis[i]])


def test_what_an_environment_observes_are_its_last_ten_pairs():
    """Measured positions and the targets that were commanded when they were measured."""
    env = still(2, wrists=["thumb_up"], axes=["-y"], noise=0.005)
    rng, pairs = np.random.default_rng(0), []
    for _ in range(10):
        env.step(env.target + 0.02 * rng.normal(size=(2, 16)))
        pairs.append((env.measured.copy(), env.target.copy()))
        assert 0 < np.abs(env.measured - env.q).max() <= 0.005
    history = torch.tensor(np.swapaxes(pairs, 1, 2).swapaxes(0, 1).copy()).float()
    expected = sim.observation(history, np.array([sim.WRISTS["thumb_up"]] * 2),
                               np.array([[0, -1, 0]] * 2))
    assert env.observe().numpy() == pytest.approx(expected.numpy(), abs=1e-6)


def test_a_target_moves_by_alpha_at_most_and_stays_within_reach():
    target = np.stack([H.GRASP, sim.NEAR, sim.FAR])
    delta = np.stack([np.linspace(-2, 2, 16), np.full(16, -1.0), np.full(16, 0.5)])
    after = sim.next_target(target, delta)
    for j in range(16):
        step = min(1, max(-1, delta[0, j])) / 24
        assert after[0, j] == pytest.approx(H.GRASP[j] + step)
    assert np.array_equal(after[1], sim.NEAR) and np.array_equal(after[2], sim.FAR)
    assert (sim.NEAR >= H.LOW).all() and (sim.FAR <= H.HIGH).all()
    assert (np.abs([sim.NEAR - H.GRASP, sim.FAR - H.GRASP]) <= H.REACH + 1e-12).all()


# ------------------------------------------------------------------------------------- the physics
def driven(steps=12, seed=3, randomize=sim.EVERYTHING, **options):
    env = sim.Rotation(5, CUBE[:2], ["palm_up", "palm_down"], ["+z", "-x"], seed=seed,
                       randomize=randomize, progress=False, **options)
    rng, frames = np.random.default_rng(1), []
    for _ in range(steps):
        env.step(env.target + 0.02 * rng.normal(size=(5, 16)))
        frames.append(np.concatenate([
            env.state, env.observe().numpy(), env.tips.reshape(5, -1),
            env.contact.reshape(5, -1), env.omega], 1))
    return np.array(frames), env


@pytest.mark.parametrize("randomize", [sim.PAPER, sim.EVERYTHING])
def test_the_same_seed_gives_the_same_trajectory_whatever_the_threads(randomize):
    (a, env), (b, _), (c, _) = (driven(threads=threads, seed=seed, randomize=randomize)
                                for threads, seed in ((1, 3), (3, 3), (1, 4)))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    assert np.isfinite(a).all() and env.blowups == 0


def test_fingertips_after_a_reset_are_those_of_the_grasp():
    env = still(3)
    for i in range(3):
        assert env.tips[i] == pytest.approx(fingertips(env.q[i]), abs=2e-5)
    for _ in range(3):
        env.step(env.target)
    before = env.tips.copy()
    env.reset([1])
    assert env.tips[1] == pytest.approx(fingertips(env.q[1]), abs=2e-5)
    assert np.array_equal(env.tips[[0, 2]], before[[0, 2]])
    env.step(env.target)                                     # so its first speed is none
    assert np.abs(env.tip_vel[1]).max() < 0.1 and not env.fallen.any()


def surfaces(model):
    """Indices of the geoms that are rubber tips, and of those that are links."""
    names = [model.geom(g).name for g in range(model.ngeom)]
    links = [g for g in range(model.ngeom) if model.geom_bodyid[g] in range(1, 18)]
    tips = [g for g in links if names[g].endswith("_tip")]
    return tips, [g for g in links if g not in tips]


def test_the_hand_not_the_object_decides_what_a_contact_is_like():
    """Rubber tips resist twisting, links are smoother; in a contact of two geoms MuJoCo asks the
    one of higher priority."""
    model = sim.build(CUBE[0]).compile()
    tips, links = surfaces(model)
    own = model.geom_bodyid == model.body("object").id
    assert len(tips) == 4 and len(links) > 12
    assert (model.geom_priority[own] == 0).all()
    assert (model.geom_priority[tips + links] == 1).all()
    assert (model.geom_condim[tips] == 4).all() and (model.geom_condim[links] == 3).all()
    assert np.flatnonzero(model.geom_priority == 1).tolist() == sorted(tips + links)


@pytest.mark.parametrize("centre", [(0, 0, 0), (0.003, -0.002, 0.001)])
@pytest.mark.parametrize("obj", [CUBE[0], sim.cylinder(0.055, 0.055), sim.box(0.05, 0.05, 0.075)])
def test_what_mujoco_derives_from_masses_is_that_of_the_objects_own(obj, centre):
    model = sim.build(obj).compile()
    usual = model.body_invweight0.copy()
    sim.set_object(model, mujoco.MjData(model), 0.021, 1.3, np.array(centre))
    spec = sim.build(obj)
    body, at = spec.body("object"), model.body("object")
    body.explicitinertial, body.mass, body.ipos = True, 0.021, centre
    body.inertia = 0.021 / 1000 * box_inertia(obj)
    meant = spec.compile()
    assert at.mass[0] == 0.021 and at.ipos == pytest.approx(np.array(centre))
    for name in ("body_mass", "body_inertia", "body_ipos", "body_subtreemass", "body_invweight0",
                 "dof_invweight0", "dof_M0"):
        assert getattr(model, name) == pytest.approx(getattr(meant, name), rel=1e-6), name
    assert not np.allclose(model.body_invweight0[at.id], usual[at.id], rtol=0.5)
    tips, links = surfaces(model)
    assert model.geom_friction[tips, :2] == pytest.approx(np.array([[1.3, 0.0065]] * 4))
    assert model.geom_friction[links, 0] == pytest.approx(1.3 * sim.PLASTIC)
    # and it is where MuJoCo computes with it
    for m in (model, meant):
        data = mujoco.MjData(m)
        mujoco.mj_forward(m, data)
        assert data.xipos[at.id] - data.xpos[at.id] == pytest.approx(np.array(centre), abs=1e-12)


def box_inertia(obj):
    """Inertia (3,) of a solid primitive of 1000 kg about its centre."""
    kind, size = obj.parts[0][:2]
    if kind == "box":
        x, y, z = (4 * s * s for s in size)
        return 1000 / 12 * np.array([y + z, x + z, x + y])
    r, h = size[0], 2 * size[1]
    return 1000 * np.array([(3 * r * r + h * h) / 12] * 2 + [r * r / 2])


def test_randomisation_stays_in_its_ranges_and_reaches_the_model():
    env = sim.Rotation(40, CUBE[:1], ["palm_up", "palm_down"], ["+z", "-z"], progress=False)
    assert 0.01 <= env.mass.min() < 0.02 and 0.04 < env.mass.max() <= 0.05
    assert 0.5 <= env.friction.min() < 0.8 and 1.7 < env.friction.max() <= 2.0
    for i, model in enumerate(env.models):
        body = model.body("object")
        assert body.mass[0] == pytest.approx(env.mass[i])
        # a solid cube: m s^2 / 6
        assert body.inertia == pytest.approx(np.full(3, env.mass[i] * 0.0525 ** 2 / 6), rel=1e-3)
        tips, links = surfaces(model)
        assert model.geom_friction[tips, 0] == pytest.approx(env.friction[i])
        assert model.geom_friction[links, 0] == pytest.approx(sim.PLASTIC * env.friction[i])
    assert len(np.unique(env.wrist, axis=0)) == 2 and len(np.unique(env.axis, axis=0)) == 2
    plain = still(3)
    assert (plain.mass == 0.03).all() and (plain.friction == 1).all()


def fields(models):
    """{name of a field of MjModel: its values in all of these}, what MuJoCo derives left out."""
    derived = ("invweight0", "_M0", "subtreemass", "acc0", "length", "aabb", "rbound", "sameframe",
               "bvh", "body_tree", "paths", "names", "light", "cam_", "tex_")
    names = [name for name in dir(models[0]) if isinstance(getattr(models[0], name), np.ndarray)]
    found = {name: np.array([getattr(m, name) for m in models])
             for name in names if not any(part in name for part in derived)}
    return found | {"gravity": np.array([m.opt.gravity for m in models])}


def changed(before, after):
    return {name for name in before
            if not np.allclose(before[name], after[name], rtol=1e-12, atol=0)}


def varied(*kinds, level=1.0, n=6, seed=0):
    """Environments in which these kinds differ, at the start of the same trials."""
    env = sim.Rotation(n, CUBE[:2], randomize=kinds, noise=0, seed=seed, progress=False)
    env.level[:] = level
    env.begin(sim.trials(CUBE[:2], "palm_up", ["+z"], n, 0))
    return env


# what each kind changes in a model, and on the side of the motors' electronics
CHANGES = {
    "mass": (set(), set()),                                  # trials have their own
    "friction": (set(), set()),
    "push": (set(), set()),
    "shape": ({"geom_size", "geom_pos", "geom_type", "geom_quat"}, set()),
    "size": ({"geom_size", "body_inertia"}, set()),
    "centre": ({"body_ipos"}, set()),
    "wrist": ({"gravity"}, set()),
    "contact": ({"geom_solref"}, set()),
    "motor": ({"actuator_gainprm", "actuator_biasprm"},
              {"zero", "measured", "target", "stiffness", "dry", "rub"}),
    "delay": (set(), {"command_delay", "reading_delay"}),
}


@pytest.mark.parametrize("kind", sim.EVERYTHING)
def test_each_kind_of_randomisation_changes_what_it_says_and_nothing_else(kind):
    assert set(CHANGES) == set(sim.EVERYTHING)
    base, env = varied(), varied(kind)
    model, outside = CHANGES[kind]
    assert changed(fields(base.models), fields(env.models)) == model
    names = ("q", "pos", "quat", "vel", "target", "measured", "mass", "friction", "g", "wrist",
             "axis", "zero", "command_delay", "reading_delay", "pushes", "home", "stiffness", "dry",
             "rub")
    assert {name for name in names
            if not np.array_equal(getattr(base, name), getattr(env, name))} == outside
    if model:                                                # each environment has its own
        own = fields(env.models)
        assert env.n == max(len(np.unique(own[name].reshape(env.n, -1), axis=0)) for name in model)
    held = np.array([m.geom_bodyid == m.body("object").id for m in env.models])[0]
    a, b, kinds = base.models, env.models, set()
    for i in range(env.n):
        if kind == "size":
            assert np.array_equal(a[i].geom_size[~held], b[i].geom_size[~held])
            share = b[i].geom_size[held] / a[i].geom_size[held]
            assert share == pytest.approx(np.full((1, 3), share[0, 0]))
            assert 0.97 <= share[0, 0] <= 1.03
        if kind == "shape":
            assert np.array_equal(a[i].geom_size[held], b[i].geom_size[held])
            boxes = (a[i].geom_type == mujoco.mjtGeom.mjGEOM_BOX) & ~held
            tips = meets_objects(a[i])[1] & ~held
            off = np.abs(b[i].geom_size - a[i].geom_size)
            assert 0.0003 < off[boxes].max() <= 0.0007 and not off[~boxes & ~tips].any()
            egg = b[i].geom_type[tips][0] == mujoco.mjtGeom.mjGEOM_ELLIPSOID
            kinds.add(egg)
            if egg:
                half = [link.boxes[-1][1] for link in H.LINKS if link.name in H.TIPS]
                assert np.abs(b[i].geom_size[tips] - half).max() <= 0.0007
            else:
                assert off[tips].max() <= 0.0015
                assert np.abs(b[i].geom_pos - a[i].geom_pos)[tips].max() <= 0.0015 / 2 + 1e-9
        if kind == "centre":
            off = np.abs(b[i].body_ipos - a[i].body_ipos)
            assert 0 < off[-1].max() <= 0.003 and off[:-1].max() == 0
        if kind == "wrist":
            cosine = a[i].opt.gravity @ b[i].opt.gravity / 9.81 ** 2
            assert np.linalg.norm(b[i].opt.gravity) == pytest.approx(9.81)
            assert 0 < np.degrees(np.arccos(cosine)) <= 5
        if kind == "contact":
            tips, links = surfaces(a[i])
            softness = b[i].geom_solref[tips + links]
            assert 0.01 <= softness[0, 0] <= 0.03 and not np.ptp(softness, 0).any()
            assert np.array_equal(a[i].geom_solref[held], b[i].geom_solref[held])
        if kind == "motor":
            share = b[i].actuator_gainprm[:, 0] / a[i].actuator_gainprm[:, 0]
            assert 0.70 <= share.min() < share.max() <= 1.05
            assert np.array_equal(b[i].actuator_biasprm[:, 1], -b[i].actuator_gainprm[:, 0])
            assert np.array_equal(b[i].actuator_biasprm[:, 2], a[i].actuator_biasprm[:, 2])
            assert np.array_equal(b[i].actuator_gainprm[:, 0], env.stiffness[i])
    if kind == "shape":
        assert kinds == {False, True}                        # round tips and egg-shaped ones
    if kind == "motor":
        dry = env.dry / base.dry
        assert 0.7 <= dry.min() < dry.max() <= 2.5
        assert 0 <= env.rub.min() < 0.1 < 0.25 < env.rub.max() <= 0.4 * 1.3
        assert (env.rub.max(1) <= env.rub.min(1) * 1.3 / 0.7).all()          # gears of one kind
        assert 0 < np.degrees(np.abs(env.zero)).max() <= 0.7
    if kind == "delay":                                      # to the nearest physics step
        for late in (env.command_delay, env.reading_delay):
            assert late.min() >= 0 and 0 < late.max() * STEP <= 0.015 + STEP / 2
        assert not np.array_equal(env.command_delay, env.reading_delay)


def test_gears_rub_more_under_load():
    """Friction of a step: dry + rub times what the motor is asked for, at most its limit."""
    base, env = varied(), varied("motor")
    for target in (env.target.copy(), env.target + 0.02, env.target + 3.0):
        torque = env.stiffness * np.abs(target - env.zero - env.q)
        expected = env.dry + env.rub * np.minimum(torque, H.TORQUE)
        for e in (base, env):
            e.step(target)
        friction = np.array([m.dof_frictionloss for m in env.models])
        assert friction[:, :16] == pytest.approx(expected) and not friction[:, 16:].any()
        assert (np.array([m.dof_frictionloss[:16] for m in base.models]) == H.FRICTION).all()
    assert (expected > 1.2 * env.dry).mean() > 0.5


def test_mass_friction_and_pushes_are_drawn_only_if_they_are_named():
    for kinds in ((), ("mass",), ("friction",)):
        env = sim.Rotation(8, CUBE[:1], randomize=kinds, progress=False)
        assert (len(set(env.mass)) > 1) == ("mass" in kinds)
        assert (len(set(env.friction)) > 1) == ("friction" in kinds)
    speeds = []
    for kinds in ((), ("push",)):
        env = sim.Rotation(32, CUBE[:1], randomize=kinds, weakest=0.0, progress=False)
        env.level[:] = 0
        env.reset(np.arange(32))
        env.pos[:] = env.home[:] = 0.3, 0, 0.5               # away from the fingers
        env.step(env.target)
        speeds.append(np.linalg.norm(env.vel[:, :3], axis=1))
    assert (speeds[0] < 1e-9).all()
    assert 2 <= (speeds[1] > 1e-9).sum() <= 16               # a quarter of 32


def test_at_level_zero_the_curriculum_leaves_everything_nominal_but_gravity():
    kinds = ("centre", "wrist", "contact", "motor")
    base, env = varied(), varied(*kinds, level=0.0)
    assert changed(fields(base.models), fields(env.models)) == {"gravity"}
    for model in env.models:
        assert model.opt.gravity == pytest.approx([0, 0, -9.81 * 0.2])
    assert (env.zero == 0).all() and (env.g == 0.2).all() and (base.g == 1).all()
    half = varied(*kinds, level=0.5)
    for model in half.models:
        share = model.actuator_gainprm[:, 0] / base.models[0].actuator_gainprm[:, 0]
        assert 0.85 <= share.min() and share.max() <= 1.025
        assert np.linalg.norm(model.opt.gravity) == pytest.approx(9.81 * 0.6)


def test_a_level_belongs_to_its_wrist():
    env = still(12, wrists=["palm_up", "palm_down"])
    env.level[:] = 0.0, 1.0
    env.reset(np.arange(12))
    assert set(env.cell) == {0, 1}
    assert env.g == pytest.approx(np.where(env.cell == 0, 0.2, 1.0))


def test_a_new_wrist_and_axis_leave_hand_and_object_as_they_are():
    env = still(12, wrists=["palm_up", "palm_down"], axes=["+z", "-x"])
    for _ in range(5):
        env.step(env.target + 0.01)
    before, some, others = env.snapshot()["arrays"], np.arange(6), np.arange(6, 12)
    env.redirect(some)
    after = env.snapshot()["arrays"]
    for name in ("state", "target", "history", "measured", "home", "mass", "friction"):
        assert torch.equal(before[name], after[name]), name
    for name in ("wrist", "axis", "steps"):
        assert torch.equal(before[name][others], after[name][others])
        assert not torch.equal(before[name][some], after[name][some])
    assert not env.steps[some].any()
    for i, model in enumerate(env.models):
        wrist, axis, _ = env.cells[env.cell[i]]
        assert model.opt.gravity == pytest.approx(9.81 * sim.gravity(sim.wrist_of(wrist))[0])
        assert env.axis[i] == pytest.approx(sim.axis_of(axis))


@pytest.mark.parametrize("command_late, reading_late", [(0, 0), (3, 0), (0, 2), (2, 3)])
def test_delays_delay_commands_and_readings(command_late, reading_late):
    """Against a plain loop of MuJoCo steps."""
    env = still(2)
    env.command_delay[0], env.reading_delay[0] = command_late, reading_late
    data, rng = mujoco.MjData(env.models[0]), np.random.default_rng(0)
    data.qpos[:] = env.state[0, sim.QPOS]
    for _ in range(3):
        before, new = env.target[0].copy(), env.target + 0.1 * rng.choice([-1, 1], (2, 16))
        env.step(new)
        q = []
        for step in range(sim.SUBSTEPS):
            data.ctrl[:] = before if step < command_late else new[0]
            mujoco.mj_step(env.models[0], data)
            q.append(data.qpos[:16].copy())
        assert env.q[0] == pytest.approx(q[-1], abs=1e-5)
        assert env.measured[0] == pytest.approx(q[-1 - reading_late], abs=1e-5)
        assert np.array_equal(env.measured[1], env.q[1])
        assert np.array_equal(env.history[0, -1, 1], env.target[0].astype(np.float32))


def test_the_zero_of_an_encoder_is_seen_and_commanded_and_moves_nothing():
    plain, off = still(2), still(2)
    start = sim.trials(CUBE[1:2], "palm_up", ["+z"], 2, 0)
    off.zero[:] = np.linspace(-0.01, 0.01, 32).reshape(2, 16)
    plain.begin(start)
    off.begin(start)
    assert off.history[:, 0, 0].numpy() == pytest.approx(off.q + off.zero, abs=1e-6)
    for t in range(5):
        move = 0.03 * np.sin(t + np.arange(16))
        plain.step(plain.target + move)
        off.step(off.target + move)
        assert off.q == pytest.approx(plain.q, abs=1e-6)
        assert off.measured == pytest.approx(plain.measured + off.zero, abs=1e-6)


def test_variants_keep_to_their_object():
    """Also when shapes are drawn for fewer hands than there are environments."""
    env = sim.Rotation(9, CUBE, randomize=("shape", "size"), progress=False)
    sim.Rotation.VARIANTS, usual = 4, sim.Rotation.VARIANTS
    try:
        few = sim.Rotation(9, CUBE, randomize=("shape", "size"), progress=False)
    finally:
        sim.Rotation.VARIANTS = usual
    for some, different in ((env, 9), (few, 6)):
        sizes = np.array([m.geom_size[m.geom_bodyid == m.body("object").id][0]
                          for m in some.models])
        assert len(np.unique(sizes, axis=0)) == different
        for i, size in enumerate(sizes):
            assert 0.97 <= size[0] / some.objects[some.which[i]].parts[0][1][0] <= 1.03


# ---------------------------------------------------------------------------- trials for two hands
def test_a_trial_depends_on_its_seed_and_number_alone():
    many = sim.trials(CUBE[:2], "palm_up", ["+z", "-z"], 6, 3)
    few = sim.trials(CUBE[:2], "palm_down", ["+z", "-z"], 4, 3)
    other = sim.trials(CUBE[:2], "palm_up", ["+z", "-z"], 6, 4)
    assert [t.obj for t in many] == CUBE[:2] * 3
    assert {t.axis for t in many} == {"+z", "-z"}
    for a, b in zip(many, few):
        assert (a.obj, a.axis, a.mass, a.friction) == (b.obj, b.axis, b.mass, b.friction)
        assert np.array_equal(a.grasp, b.grasp) and np.array_equal(a.pushes, b.pushes)
        assert (a.wrist, b.wrist) == ("palm_up", "palm_down")
    for t, o in zip(many, other):
        assert t.mass != o.mass and not np.array_equal(t.pushes, o.pushes)
        assert 0.01 <= t.mass <= 0.05 and 0.5 <= t.friction <= 2 and t.pushes.shape == (400, 3)
        assert any(np.array_equal(t.grasp, g) for g in sim.grasp_cache(t.obj))
    pushed = np.array([t.pushes.any(1) for t in many])
    assert 0.2 < pushed.mean() < 0.3
    assert np.concatenate([t.pushes[t.pushes.any(1)] for t in many]).std() == pytest.approx(
        0.1, rel=0.1)


def test_ceiling_and_virtual_hand_get_the_same_trials():
    trials = sim.trials(CUBE[:2], "palm_down", ["+z", "-z"], 4, 1)
    env = sim.Rotation(4, CUBE[:2], ["palm_up", "palm_down"], ["+z", "-z"], noise=0, seed=8,
                       progress=False)
    env.begin(trials)
    for i, t in enumerate(trials):
        model = env.models[i]
        hand = sim.VirtualHand(i, t.wrist, t.obj, differs=())
        hand.begin(t)
        for where in (model, hand.model()):
            body = where.body("object")
            assert body.mass[0] == t.mass
            assert (where.geom_friction[surfaces(where)[0], 0] == t.friction).all()
            held = where.geom_size[where.geom_bodyid == body.id][0]
            assert held == pytest.approx(np.resize([*t.obj.parts[0][1]], 3))
            assert where.opt.gravity == pytest.approx([0, 0, 9.81])
        assert np.array_equal(env.q[i], t.grasp[:16])
        assert np.array_equal(env.state[i, sim.QPOS], t.grasp[:23])
        assert np.array_equal(env.target[i], t.grasp[23:])
        assert np.array_equal(hand.target, t.grasp[23:])
        assert np.abs(hand.object_qpos() - t.grasp[16:23]).max() < 0.02
        assert tuple(env.axis[i]) == sim.AXES[t.axis]


def test_both_hands_are_pushed_alike():
    speeds = 0.1 * np.arange(1, 401)[:, None]                # harder every step
    trials = [t._replace(pushes=speeds * np.eye(3)[k])
              for k, t in enumerate(sim.trials(CUBE[1:2], "palm_up", ["+z"], 3, 1))]
    env = still(3, weakest=0.0)
    env.level[:] = 0
    env.begin(trials)
    env.pos[:] = env.home[:] = 0.3, 0, 0.5                  # away from the fingers
    for speed in (0.1, 0.3, 0.6):
        env.step(env.target)
        assert env.vel[:, :3] == pytest.approx(speed * np.eye(3), abs=1e-6)
    assert env.vel[:, 3:] == pytest.approx(np.zeros((3, 3)), abs=1e-6)
    for k, trial in enumerate(trials):
        hand = sim.VirtualHand(0, load=trial.obj, differs=())
        hand.begin(trial)
        before = hand._data.qvel[-6:].copy()
        hand.push(trial.pushes[0])
        assert hand._data.qvel[-6:] - before == pytest.approx([*0.1 * np.eye(3)[k], 0, 0, 0])


def distances(trials, differs):
    """How far joints (rad) and object (m) of a virtual hand end from those of the simulator after
    the same second: means over trials of the largest."""
    env = still(len(trials))
    env.begin(trials)
    swing = [0.02 * np.sin(t / 3 + np.arange(16)) for t in range(20)]
    for move in swing:
        env.step(np.stack([t.grasp[23:] for t in trials]) + move)
    joints, places = [], []
    for i, trial in enumerate(trials):
        hand = sim.VirtualHand(3, load=trial.obj, differs=differs)
        hand.begin(trial)
        for move, push in zip(swing, trial.pushes):
            hand.push(push)
            hand.command(trial.grasp[23:] + move)
        joints.append(np.abs(hand.read().q - env.q[i]).max())
        places.append(np.abs(hand.object_qpos()[:3] - env.pos[i]).max())
    return np.mean(joints), np.mean(places)


def test_a_virtual_hand_that_differs_in_nothing_does_what_the_simulator_does():
    """Nearly: it runs at 240 Hz instead of 120 and lets the fingers close first. One that differs
    is several times as far."""
    trials = sim.trials(CUBE[1:2], "palm_up", ["+z"], 12, 5)
    trials = [t._replace(pushes=0.2 * t.pushes) for t in trials]
    near, far = distances(trials, ()), distances(trials, sim.DIFFERS)
    assert near[0] < 0.006 and near[1] < 0.0006
    assert far[0] > 4 * near[0] and far[1] > 3 * near[1]


def test_an_environment_goes_on_exactly_from_a_snapshot():
    objects = [CUBE[0], sim.objects_of("hammer")[0]]
    small_cache(objects[1], 8)

    def environment():
        return sim.Rotation(4, objects, ["palm_up", "palm_down"], randomize=sim.EVERYTHING, seed=2,
                            progress=False)

    def run(env):
        rng, frames = np.random.default_rng(0), []
        for t in range(6):
            env.step(env.target + 0.02 * rng.normal(size=(4, 16)))
            frames.append([env.state.copy(), env.observe().numpy(), env.contact.copy()])
            if t == 3:
                env.reset([1, 2])
        return frames

    env, other = environment(), environment()
    env.level[:] = 0.3, 0.8, 0.5, 0.1
    env.reset([0, 1, 3])
    run(env)
    saved = env.snapshot()
    expected = run(env)
    other.restore(saved)
    for a, b in zip(run(other), expected):
        assert all(np.array_equal(x, y) for x, y in zip(a, b))


# -------------------------------------------------------------------------------- true to nature
@pytest.mark.parametrize("physics", [
    {"timestep": STEP / 2}, {"timestep": STEP / 5, "integrator": "implicit"}])
def test_a_grasp_is_the_same_at_a_smaller_time_step_and_with_another_integrator(physics):
    """Held still, nothing differs by a milliradian or so; swaying, now and then one finger slips a
    little earlier."""
    for sway in (0, 0.01):
        results = []
        for options in ({}, physics):
            env = still(16, seed=2, **options)
            for t in range(20):
                env.step(env.target + sway * np.sin(t / 3))
            assert env.blowups == 0 and not env.fallen.any()
            results.append((env.q.copy(), env.pos.copy()))
        q, pos = (np.abs(a - b).max(1) for a, b in zip(*results))
        measure = np.median if sway else np.max
        assert measure(q) < 0.002 and measure(pos) < 0.0003


# MuJoCo resets the first state, and goes on with the second
@pytest.mark.parametrize("speed", [1e12, 1000])
def test_a_blow_up_is_counted_and_ends_the_episode(speed):
    env = still(3)
    env.dq[1] = speed
    env.step(env.target)
    assert env.blowups == 1 and env.fallen.tolist() == [False, True, False]
    assert torch.isfinite(env.observe()).all()
    env.reset([1])
    env.step(env.target)
    assert env.blowups == 1 and not env.fallen.any()


# ------------------------------------------------------------------------------------------- files
def test_grasps_are_made_once_for_each_object_and_hold(monkeypatch):
    obj = sim.box(0.054, 0.054, 0.054)
    before = set(sim.CACHE.iterdir())
    first = sim.grasp_cache(obj, count=6, progress=False)
    made = set(sim.CACHE.iterdir()) - before
    assert len(made) == 1 and first.shape == (6, 39)
    with monkeypatch.context() as patch:
        patch.setattr(sim.rollout, "Rollout", None)          # sampling again would fail
        assert np.array_equal(sim.grasp_cache(obj, count=6, progress=False), first)
        for other in (sim.box(0.0541, 0.054, 0.054), sim.cylinder(0.054, 0.054)):
            with pytest.raises(TypeError):
                sim.grasp_cache(other, count=6, progress=False)
        for name in ("GRASP", "REACH"):                      # of a hand that is being forked
            with monkeypatch.context() as change:
                change.setattr(H, name, getattr(H, name) * 1.01)
                with pytest.raises(TypeError):
                    sim.grasp_cache(obj, count=6, progress=False)
    made.pop().unlink()
    assert np.array_equal(sim.grasp_cache(obj, count=6, progress=False), first)


def test_a_grasp_holds_its_object_palm_up_and_palm_down():
    env = still(16, wrists=["palm_up", "palm_down"])
    for _ in range(40):
        env.step(env.target)
        assert not env.fallen.any()
    assert np.linalg.norm(env.pos - env.home, axis=1).max() < 0.02


def test_an_object_that_no_hand_can_hold_is_a_problem():
    with pytest.raises(H.Problem, match="does not fit"):
        sim.grasp_cache(sim.box(0.004, 0.004, 0.004), count=2, progress=False)


def test_families_and_objects_are_joined_by_plus_and_strange_ones_are_problems():
    assert sim.objects_of("cube+cylinder") == sim.FAMILIES["cube"] + sim.FAMILIES["cylinder"]
    assert [obj.name for obj in sim.objects_of("mug+hammer")] == ["mug", "hammer", "hammer"]
    assert sim.objects_of("box 3 x 3 x 10 cm") == sim.FAMILIES["long"][1:2]
    for wrong in ("cubes", "cube+", "", "cube,cuboid", "box 3 x 3 x 11 cm"):
        with pytest.raises(H.Problem, match="no family"):
            sim.objects_of(wrong)


def edges(obj):
    """Full edge lengths (3,) of a single cuboid or cylinder, m."""
    (kind, size, _, _), = obj.parts
    return 2 * np.array(size if kind == "box" else (size[0], size[0], size[1]))


@pytest.mark.parametrize("family, least, most", [
    ("cuboid", 1.0, 1.5), ("long", 2.5, 6.67), ("cylinder", 1.6, 2.4), ("small", 1.92, 2.56)])
def test_families_have_the_papers_aspect_ratios(family, least, most):
    for obj in sim.FAMILIES[family]:
        x, _, z = edges(obj)
        ratio = max(edges(obj)) / min(edges(obj)) if obj.parts[0][0] == "box" else 2 * z / x
        assert 0.99 * least < ratio < 1.01 * most, obj.name
        assert obj.family == family


def test_nothing_is_trained_with_what_is_held_out():
    trained = {obj.parts for family, objects in sim.FAMILIES.items() if family != "held_out"
               for obj in objects}
    assert not trained & {obj.parts for obj in sim.FAMILIES["held_out"]}
    complex_ones = {obj.name for obj in sim.objects_of("round+angular")}
    assert not complex_ones & {obj.name for obj in sim.FAMILIES["held_out"]}


def test_parts_of_an_object_hang_together():
    """From every part one comes to every other by parts that overlap."""
    for obj in sim.objects_of("round+angular+held_out"):
        model = sim.build(obj).compile()
        data, of = mujoco.MjData(model), np.flatnonzero(model.geom_contype == sim.OBJECT)
        mujoco.mj_forward(model, data)
        reached = {of[0]}
        for _ in of:
            reached |= {b for a in reached for b in of if a == b or mujoco.mj_geomDistance(
                model, data, a, b, 1.0, None) <= 0}
        assert reached == set(of), obj.name


def test_objects_of_many_parts_and_few_are_stepped_together():
    """As each by itself, although their models are of different size."""
    duck = sim.FAMILIES["round"][0]
    small_cache(duck, 8)
    pushes = np.random.default_rng(0).normal(size=(30, 2, H.N))

    def states(objects):
        env = sim.Rotation(len(objects), objects, randomize=(), noise=0, progress=False)
        env.begin([sim.trials([obj], "palm_up", ["+z"], 1, 3)[0] for obj in objects])
        for step in pushes:
            env.step(sim.next_target(env.target, step[:len(objects)]))
        return env.state.copy()

    assert sim.objects_of("angular")[0].family == "angular"
    both = states([CUBE[0], duck])
    assert np.array_equal(both[0], states([CUBE[0]])[0])
    pushes = pushes[:, ::-1]
    assert np.array_equal(both[1], states([duck])[0])


def test_axes_and_wrists_are_names_numbers_or_any():
    rng = np.random.default_rng(0)
    assert sim.axis_of("0 0 -2").tolist() == [0, 0, -1] and sim.axis_of("-x").tolist() == [-1, 0, 0]
    assert sim.wrist_of("0 3 0 0").tolist() == [0, 1, 0, 0]
    for of, text, size in ((sim.axis_of, sim.axis_name, 3), (sim.wrist_of, sim.wrist_name, 4)):
        drawn = np.array([of("any", rng) for _ in range(200)])
        assert np.linalg.norm(drawn, axis=1) == pytest.approx(np.ones(200))
        assert np.abs(drawn.mean(0)).max() < 0.2 and drawn.shape == (200, size)
        assert text("any") == "any"
        for wrong in ("up", "", "0 0", "0 " * size, "nan " * size, "inf " * size):
            with pytest.raises(ValueError):
                text(wrong)
    trials = sim.trials(CUBE, "any", ["any", "+z"], 12, 0)
    assert len({t.wrist for t in trials}) == 12 and "+z" in {t.axis for t in trials}
    env = sim.Rotation(12, CUBE, ["any"], ["any", "+z"], progress=False)
    env.begin(trials)
    assert env.wrist == pytest.approx(np.array([sim.wrist_of(t.wrist) for t in trials]))
    assert env.axis == pytest.approx(np.array([sim.axis_of(t.axis) for t in trials]))


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.npz"
    sim.save_npz(path, a=np.arange(3))
    code = ("import os, pathlib, sys, numpy as np, sim\n"
            "pathlib.Path.replace = os.replace = lambda *_: os.kill(os.getpid(), 9)\n"
            "sim.save_npz(sys.argv[1], a=np.zeros(1000))")
    for victim in (path, tmp_path / "new.npz"):
        assert subprocess.run([sys.executable, "-c", code, victim], cwd=ROOT).returncode == -9
    assert np.array_equal(sim.load_npz(path)["a"], np.arange(3))
    assert [p.name for p in tmp_path.glob("[!.]*")] == ["x.npz"]


def test_bad_files_are_problems(tmp_path):
    sim.save_npz(tmp_path / "good.npz", a=np.arange(1000.0))
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "torn.npz").write_bytes(whole[:-100])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    (tmp_path / "flipped.npz").write_bytes(flipped)
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").touch()
    np.savez(tmp_path / "nan.npz", a=np.array([0, np.nan]))
    np.savez(tmp_path / "pickled.npz", a=np.array([{"code": print}], object))
    for name in ("torn", "flipped", "text", "empty", "nan", "pickled", "absent"):
        with pytest.raises(H.Problem, match=name):
            sim.load_npz(tmp_path / f"{name}.npz", "a")
    with pytest.raises(H.Problem, match="has no b"):
        sim.load_npz(tmp_path / "good.npz", "b")


def test_without_a_renderer_everything_runs_but_the_film(tmp_path):
    """As on a machine without libEGL, which MuJoCo finds through ctypes."""
    code = ("import ctypes.util, sys\n"
            "find = ctypes.util.find_library\n"
            "ctypes.util.find_library = lambda name: None if 'GL' in name else find(name)\n"
            "load = ctypes.CDLL.__init__\n"
            "def init(self, name, *a, **k):\n"
            "    if 'GL' in str(name): raise OSError(name)\n"
            "    load(self, name, *a, **k)\n"
            "ctypes.CDLL.__init__ = init\n"
            "import sim\n"
            "model = sim.build().compile()\n"
            "sim.film(model, [model.qpos0] * 4, sys.argv[1])")
    environment = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "DISPLAY")}
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "film.gif"], cwd=ROOT,
                          capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "no film" in done.stderr, done.stderr
    assert "libegl1" in done.stderr and not (tmp_path / "film.gif").exists()


def test_progress_says_nothing_about_a_rate_until_one_is_known(monkeypatch, capsys):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(sim.time, "monotonic", lambda: clock.now)
    bar, lines = sim.Progress("oracle", 100, " s"), []
    for seconds, done in ((5, 60), (35, 70), (1, 71), (49, 100)):
        clock.now += seconds
        bar(done, "all is well")
        lines.append(capsys.readouterr().err)
    # an earlier run had come to 60: not this one's work; and two lines a minute are enough
    assert lines[0] == "oracle: 60/100 s  all is well\n"
    assert lines[1] == "oracle: 70/100 s 15.0/min, 2:00 left  all is well\n"
    assert lines[2] == "" and lines[3] == "oracle: 100/100 s 26.7/min, 0:00 left  all is well\n"


def test_a_live_line_fits_its_terminal_and_ends_where_the_work_does(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2, raising=False)
    monkeypatch.setattr(sim.os, "get_terminal_size", lambda fd: os.terminal_size((40, 24)))
    bar = sim.Progress("oracle", 100)
    bar(1, "x" * 100)
    assert capsys.readouterr().err == "\r" + ("oracle: 1/100  " + "x" * 100)[:39] + "\x1b[K"
    bar(30, "stopped earlier", last=True)
    said = capsys.readouterr().err
    assert said.startswith("\roracle: 30/100 ") and said.endswith("stopped earlier\x1b[K\n")


# --------------------------------------------------------------------------------- the six files
FILES = ("hand", "sim", "train_policy", "collect", "fit_ndm", "deploy")


def parsed(name):
    return ast.parse((ROOT / f"{name}.py").read_text())


def imported(name):
    """Which of our files a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(parsed(name)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names & set(FILES)


def test_no_file_imports_one_that_imports_it():
    assert imported("hand") == set() and imported("sim") == {"hand"}
    below = {name: imported(name) for name in FILES}
    for _ in FILES:                                          # and what those import
        below = {name: files.union(*(below[f] for f in files)) for name, files in below.items()}
    for name, files in below.items():
        assert name not in files, f"{name} imports itself by way of {files}"


@pytest.mark.parametrize("name", FILES)
def test_no_line_is_over_100_characters(name):
    for number, line in enumerate((ROOT / f"{name}.py").read_text().splitlines(), 1):
        assert len(line) <= 100, f"{name}.py:{number}"


@pytest.mark.parametrize("name", FILES)
def test_no_function_is_over_90_lines(name):
    for node in ast.walk(parsed(name)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 90, f"{name}.py:{node.lineno} {node.name}"
