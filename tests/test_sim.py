"""The world against published figures, hand-worked cases, and itself at other time steps and thread counts."""
import os
import subprocess
import sys
from types import SimpleNamespace

import mujoco
import numpy as np
import pytest

import deploy
import hand as H
import sim
import train_policy as T
from conftest import CUBE, ROOT

pytestmark = pytest.mark.usefixtures("grasps")

# LEAP Hand (right) as its URDF publishes it, copied by hand: position and quaternion of each link in its parent, joint about
# -z of the link; the last entry is the centre of the fingertip.
ACROSS, DOWN, BACK = (0.500003, 0.5, 0.5, -0.499997), (0.500003, -0.5, -0.499997, 0.5), (0.500003, 0.5, -0.5, 0.499997)
PUBLISHED = {
    "if": ((-0.007, 0.023, -0.0187), 0.0361), "mf": ((-0.0071, -0.0224, -0.0187), 0.0361), "rf": ((-0.00709, -0.0678, -0.0187), 0.03609)}
PUBLISHED = {finger: ((base, ACROSS), ((-0.0122, 0.0381, 0.0145), DOWN), ((0.015, 0.0143, -0.013), BACK),
                      ((0, -length, 0.0002), (1, 0, 0, 0)), (-0.0013, -0.0336, 0.0145)) for finger, (base, length) in PUBLISHED.items()}
PUBLISHED["th"] = (((-0.0693, -0.0012, -0.0216), (0.707109, 0, 0.707105, 0)), ((0, 0.0143, -0.013), BACK),
                   ((0, 0.0145, -0.017), (0.707109, -0.707105, 0, 0)), ((0, 0.0466, 0.0002), (1e-06, 0, 0, 1)), (-0.0013, -0.0456, -0.0145))
LIMITS = {"mcp": (-0.314, 2.23), "rot": (-1.047, 1.047), "pip": (-0.506, 1.885), "dip": (-0.366, 2.042)}
THUMB = {"cmc": (-0.349, 2.094), "axl": (-0.349, 2.094), "mcp": (-0.47, 2.443), "ipl": (-1.34, 1.88)}
MOTORS = [1, 0, 2, 3, 5, 4, 6, 7, 9, 8, 10, 11, 12, 13, 14, 15]


def matrix(q):
    w, x, y, z = np.array(q) / np.linalg.norm(q)
    return np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                     [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                     [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])


def fingertip(finger, q):
    """Forward kinematics of the published chain: centre of the fingertip in the frame of the palm."""
    *links, tip = PUBLISHED[finger]
    position, rotation = np.zeros(3), np.eye(3)
    for (pos, quat), angle in zip(links, q):
        c, s = np.cos(angle), np.sin(angle)
        position = position + rotation @ pos
        rotation = rotation @ matrix(quat) @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    return position + rotation @ tip


def still(n=4, **options):
    return sim.Rotation(n, CUBE[1:2], randomize=False, noise=0, progress=False, **options)


# ------------------------------------------------------------------------------------------------------ the hand
def test_fingertips_are_where_the_published_chain_puts_them():
    model = sim.build().compile()
    data, rng = mujoco.MjData(model), np.random.default_rng(0)
    for q in [np.zeros(16), H.GRASP, *rng.uniform(H.LOW, H.HIGH, (20, 16))]:
        data.qpos[:] = q
        mujoco.mj_kinematics(model, data)
        palm, turn = data.body("palm").xpos, data.body("palm").xmat.reshape(3, 3)
        for f, finger in enumerate(PUBLISHED):
            assert data.site(H.TIPS[f]).xpos == pytest.approx(palm + turn @ fingertip(finger, q[4 * f:4 * f + 4]), abs=2e-5)


def test_joints_limits_motors_and_mass_are_the_published_ones():
    names = [f"{finger}_{joint}" for finger in ("if", "mf", "rf") for joint in LIMITS] + [f"th_{joint}" for joint in THUMB]
    limits = [*LIMITS.values()] * 3 + [*THUMB.values()]
    assert [j.name for j in H.JOINTS] == names and H.MOTOR_ID == MOTORS
    for model in (sim.build().compile(), sim.build(CUBE[0]).compile()):
        assert [model.joint(i).name for i in range(16)] == names == [model.actuator(i).name for i in range(16)]
        assert model.jnt_range[:16] == pytest.approx(np.array(limits))
        assert model.body("palm").subtreemass[0] == pytest.approx(0.237 + 3 * (0.044 + 0.032 + 0.037 + 0.016) + 0.032 + 0.003 + 0.038 + 0.049)
    assert (H.GRASP > H.LOW).all() and (H.GRASP < H.HIGH).all()


def test_positive_angles_close_the_fingers():
    """Every finger joint but the side ones brings the fingertip nearer to the palm side (z of the world points out of it)."""
    model = sim.build().compile()
    data = mujoco.MjData(model)
    for joint in (0, 2, 3, 4, 6, 7, 8, 10, 11):
        data.qpos[:] = 0
        data.qpos[joint] = 0.5
        mujoco.mj_kinematics(model, data)
        closed = data.site_xpos[joint // 4].copy()
        data.qpos[:] = 0
        mujoco.mj_kinematics(model, data)
        assert closed[2] > data.site_xpos[joint // 4][2] + 0.01


# ------------------------------------------------------------------------------------------- rotation arithmetic
def test_quaternions_by_hand():
    one, i, j, k = np.eye(4)
    assert sim.multiply(i, j) == pytest.approx(k) and sim.multiply(j, i) == pytest.approx(-k) and sim.multiply(i, i) == pytest.approx(-one)
    quarter = sim.from_axis_angle([0, 0, 1], np.pi / 2)
    assert quarter == pytest.approx([0.5 ** 0.5, 0, 0, 0.5 ** 0.5])
    assert sim.rotate(quarter, np.array([1.0, 0, 0])) == pytest.approx([0, 1, 0])
    assert sim.rotate(sim.conjugate(quarter), np.array([[1.0, 0, 0], [0, 1, 5]])) == pytest.approx(np.array([[0, -1, 0], [1, 0, 5]]))
    # first a quarter about x, then one about z, takes z to x
    both = sim.multiply(quarter, sim.from_axis_angle([1, 0, 0], np.pi / 2))
    assert sim.rotate(both, np.array([0.0, 0, 1])) == pytest.approx([1, 0, 0])


def test_rotation_vector_takes_the_short_way_round():
    axis = np.array([2, -1, 2]) / 3
    for angle in (0.0, 1e-7, 0.3, 3.0):
        a = sim.from_axis_angle(axis, angle)
        assert sim.rotation_vector(a) == pytest.approx(angle * axis, rel=1e-6, abs=1e-12)
        assert sim.rotation_vector(-a) == pytest.approx(angle * axis, rel=1e-6, abs=1e-12)
    assert sim.rotation_vector(sim.from_axis_angle(axis, 4.0)) == pytest.approx((4.0 - 2 * np.pi) * axis)


@pytest.mark.parametrize("wrist, down", [("palm_up", (0, 0, -1)), ("palm_down", (0, 0, 1)), ("thumb_up", (0, 1, 0)), ("thumb_down", (0, -1, 0)),
                                         ("base_up", (1, 0, 0)), ("base_down", (-1, 0, 0))])
def test_gravity_of_each_wrist(wrist, down):
    """In the frame of the hand: z out of the palm, x along the fingers, thumb at -y."""
    assert sim.gravity(sim.WRISTS[wrist])[0] == pytest.approx(down)
    for model in (still(1, wrists=[wrist]).models[0], sim.build(wrist=sim.WRISTS[wrist]).compile()):
        assert model.opt.gravity == pytest.approx(9.81 * np.array(down))


# ---------------------------------------------------------------------------------------------- metrics and reward
def test_omega_of_an_object_spun_by_hand_is_in_the_frame_of_the_hand():
    env = still(2, gravity_scale=0.0)
    omega = np.array([[0.0, 0, 3.0], [1.0, -2.0, 0.5]])
    tilt = sim.from_axis_angle(np.array([[0, 0, 1.0], [1, 0, 0]]), np.array([0.4, 1.2]))
    env.state[:, 1 + 16:4 + 16] = env.home[:] = 0.3, 0, 0.5            # away from the fingers
    env.state[:, 4 + 16:8 + 16] = tilt
    env.state[:, -3:] = sim.rotate(sim.conjugate(tilt), omega)          # MuJoCo wants it in the frame of the object
    for _ in range(3):
        env.step(env.target)
        assert env.omega == pytest.approx(omega, rel=1e-3) and not env.fallen.any()


class Spun:
    """In the place of `sim.Rotation`: two objects that turn at a constant omega; the second falls in its 101st step."""
    n, axis, omega = 2, np.array([[0, 0, 1.0], [0, 0, -1.0]]), np.array([[0.3, 0.4, 0.5], [0, 0.1, -1.0]])
    fallen = np.zeros(2, bool)
    t = 0

    def reset(self, ids):
        self.fallen[ids] = False

    def step(self, target):
        self.t += 1
        self.fallen = np.array([False, self.t == 101])


def test_metrics_by_hand():
    seen = []
    r = sim.run_episodes(Spun(), lambda env: None, seen.append)
    assert len(seen) == 400
    assert r["RotR"] == pytest.approx([400 * 0.5, 100 * 1.0]) and r["TTF"] == pytest.approx([20, 5]) and r["RotP"] == pytest.approx([0.5, 0.1])


def test_referee_of_the_virtual_hand_measures_the_same():
    omega, k = np.array([0.3, 0.4, -0.5]), "-z"
    poses = [np.array([0, 0, 0.1 if t <= 60 else 0.03, *sim.from_axis_angle(omega / np.linalg.norm(omega), np.linalg.norm(omega) * t / 20)])
             for t in range(80)]
    hand = SimpleNamespace(object_qpos=lambda: poses[0])
    referee = deploy.Referee(hand, k)
    steps = 0
    for pose in poses[1:]:
        hand.object_qpos = lambda: pose
        if referee(hand):
            break
        steps += 1
    assert steps == 60
    assert referee.result() == pytest.approx({"RotR": 60 * 0.5, "TTF": 3.0, "RotP": 0.5})


def stage(**changes):
    """An object at rest at the canonical grasp, seen by `Task`, with one thing changed."""
    env = SimpleNamespace(n=1, q=H.GRASP[None].copy(), dq=np.zeros((1, 16)), target=H.GRASP[None].copy(), omega=np.zeros((1, 3)),
                          axis=np.array([[0, 0, 1.0]]), quat=np.array([[1.0, 0, 0, 0]]), vel=np.zeros((1, 6)), pos=np.zeros((1, 3)),
                          home=np.zeros((1, 3)), contact=np.zeros((1, 4, 4)), fallen=np.zeros(1, bool), objects=CUBE[:1], which=np.zeros(1, int), wrists=[0],
                          which_wrist=np.zeros(1, int))
    task = T.Task(env)
    task.episodes = 100
    vars(env).update({name: np.array([value]) for name, value in changes.items()})
    return task


def test_reward_terms_by_hand():
    gained = lambda **changes: (stage(**changes).reward() - stage().reward())[0]
    assert gained(omega=(0, 0, 0.3)) == pytest.approx(T.A_ROT * 0.3) and gained(omega=(0, 0, -0.3)) == pytest.approx(-T.A_ROT * 0.3)
    assert gained(omega=(0, 0, 9.0)) == pytest.approx(T.A_ROT * T.C_ROT)
    assert gained(omega=(0.2, -0.1, 0)) == pytest.approx(-T.A_ROTP * 0.3)          # |omega x k|_1
    assert gained(vel=(0.1, 0, 0.2, 7, 7, 7)) == pytest.approx(-T.A_LIN * 0.05)
    moved = H.GRASP + 0.1 * np.eye(16)[3]
    assert gained(q=moved, target=moved) == pytest.approx(-T.A_POSE * 0.01)
    dq = 0.5 * np.eye(16)[2]
    tau = 0.5 * 0.366 ** 2 / 2.811                                                  # back-EMF alone
    assert gained(dq=dq) == pytest.approx(-T.A_WORK * tau * 0.5 - T.A_TORQUE * tau ** 2)
    assert gained(target=H.GRASP + np.eye(16)[1]) == pytest.approx(-T.A_TORQUE * (0.366 * 0.350) ** 2)   # 1 rad off: current limit
    touching = np.zeros((4, 4))
    touching[:2, 0] = 1, 3
    assert gained(contact=touching) == pytest.approx(2 * T.A_CONTACT)
    assert gained(contact=np.ones((4, 4))) == pytest.approx(3 * T.A_CONTACT)
    assert gained(pos=(0.003, 0, -0.004)) == pytest.approx(-T.A_POS * 0.005)
    assert gained(fallen=True) == pytest.approx(-T.FALL_PENALTY)
    still, turning = stage(), stage(omega=(0, 0, 0.3))
    still.holds[:] = turning.holds[:] = False                                       # before it can hold, turning is worth half
    assert turning.reward()[0] - still.reward()[0] == pytest.approx(0.5 * T.A_ROT * 0.3)


def test_a_glitch_costs_no_more_than_a_fall():
    wild = stage(vel=np.full(6, 1e5), omega=np.full(3, 1e5), dq=np.full(16, 1e5))
    assert wild.reward()[0] == -T.FALL_PENALTY
    assert stage(vel=np.full(6, 1e5), fallen=True).reward()[0] == -2 * T.FALL_PENALTY


def test_wobble_costs_nothing_at_first():
    costs = []
    for episodes in (10, 55, 100, 1000):
        still_, wobbly = stage(), stage(omega=(0.5, 0, 0))
        still_.episodes = wobbly.episodes = episodes
        costs.append((still_.reward() - wobbly.reward())[0])
    assert costs == pytest.approx([0, 0.25 * T.A_ROTP, 0.5 * T.A_ROTP, 0.5 * T.A_ROTP])


def test_guiding_goal_is_a_quarter_turn_ahead_and_moves_on():
    task = stage()
    start = task.reward()[0]
    assert task.goal[0] == pytest.approx(sim.from_axis_angle([0, 0, 1], np.pi / 2))
    task.env.quat = sim.from_axis_angle([0, 0, 1.0], np.array([np.radians(60)]))
    nearer = task.reward()[0]                                            # 30 degrees away: closer, not there
    assert nearer > start and task.goal[0] == pytest.approx(sim.from_axis_angle([0, 0, 1], np.pi / 2))
    task.env.quat = sim.from_axis_angle([0, 0, 1.0], np.array([np.radians(80)]))
    there = task.reward()[0]
    assert there > nearer + 0.5 * T.GOAL_BONUS
    assert task.goal[0] == pytest.approx(sim.from_axis_angle([0, 0, 1], np.radians(170)))


# ------------------------------------------------------------------------------------------------------ the physics
def driven(steps=12, seed=3, **options):
    env = sim.Rotation(5, CUBE[:2], ["palm_up", "palm_down"], ["+z", "-x"], seed=seed, progress=False, **options)
    rng, frames = np.random.default_rng(1), []
    for _ in range(steps):
        env.step(env.target + 0.02 * rng.normal(size=(5, 16)))
        frames.append(np.concatenate([env.state, env.observe(), env.tips.reshape(5, -1), env.contact.reshape(5, -1), env.omega], 1))
    return np.array(frames), env


def test_the_same_seed_gives_the_same_trajectory_whatever_the_threads():
    (a, env), (b, _), (c, _) = driven(threads=1), driven(threads=3), driven(threads=1, seed=4)
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    assert np.isfinite(a).all() and env.blowups == 0


def test_randomisation_stays_in_its_ranges_and_reaches_the_model():
    env = sim.Rotation(40, CUBE[:1], ["palm_up", "palm_down"], ["+z", "-z"], progress=False)
    assert 0.01 <= env.mass.min() < 0.02 and 0.04 < env.mass.max() <= 0.05
    for i in range(40):
        body = env.models[i].body("object")
        assert body.mass[0] == pytest.approx(env.mass[i])
        assert body.inertia == pytest.approx(np.full(3, env.mass[i] * 0.0525 ** 2 / 6), rel=1e-3)     # a solid cube: m s^2 / 6
        assert env.models[i].geom_friction[env.models[i].geom_bodyid == body.id][0, 0] == pytest.approx(env.friction[i])
    assert len(np.unique(env.wrist, axis=0)) == 2 and len(np.unique(env.axis, axis=0)) == 2


STEP = 1 / (sim.CONTROL_HZ * sim.SUBSTEPS)


@pytest.mark.parametrize("physics", [{"timestep": STEP / 2}, {"timestep": STEP / 5, "integrator": "implicit"}])
def test_a_grasp_is_the_same_at_a_smaller_time_step_and_with_another_integrator(physics):
    """Held still, nothing differs by a milliradian or so; swaying, now and then one finger slips a little earlier."""
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


@pytest.mark.parametrize("speed", [1e12, 1000])                           # MuJoCo resets the first state, and goes on with the second
def test_a_blow_up_is_counted_and_ends_the_episode(speed):
    env = still(3)
    env.state[1, env._v] = speed
    env.step(env.target)
    assert env.blowups == 1 and env.fallen.tolist() == [False, True, False] and np.isfinite(env.observe()).all()
    env.reset([1])
    env.step(env.target)
    assert env.blowups == 1 and not env.fallen.any()


def test_the_observation_is_the_last_ten_pairs_then_wrist_and_axis():
    env = still(2, wrists=["thumb_up"], axes=["-y"])
    rng, q, before = np.random.default_rng(0), [], []
    for _ in range(10):
        env.step(env.target + 0.02 * rng.normal(size=(2, 16)))
        q.append(env.q.copy())
        before.append(env.target.copy())
    obs = env.observe()
    assert obs.shape == (2, 327) and obs.dtype == np.float32
    positions = obs[1, :160].reshape(10, 16)
    assert positions + H.GRASP == pytest.approx(np.array(q)[:, 1], abs=1e-6)
    assert positions + H.GRASP + obs[1, 160:320].reshape(10, 16) / 10 == pytest.approx(np.array(before)[:, 1], abs=1e-6)
    assert obs[1, 320:] == pytest.approx([*sim.WRISTS["thumb_up"], 0, -1, 0])


# ------------------------------------------------------------------------------------------------------------- files
def test_grasps_are_made_once_for_each_object_and_hold(monkeypatch):
    obj = sim.box(0.054, 0.054, 0.054)
    before = set(sim.CACHE.iterdir())
    first = sim.grasp_cache(obj, n=6, progress=False)
    made = set(sim.CACHE.iterdir()) - before
    assert len(made) == 1 and first.shape == (6, 39)
    with monkeypatch.context() as patch:
        patch.setattr(sim.rollout, "Rollout", None)                     # sampling again would fail
        assert np.array_equal(sim.grasp_cache(obj, n=6, progress=False), first)
        for other in (sim.box(0.0541, 0.054, 0.054), sim.cylinder(0.054, 0.054)):
            with pytest.raises(TypeError):
                sim.grasp_cache(other, n=6, progress=False)
    made.pop().unlink()
    assert np.array_equal(sim.grasp_cache(obj, n=6, progress=False), first)


def test_an_object_that_no_hand_can_hold_is_a_problem(monkeypatch):
    with pytest.raises(H.Problem, match="does not fit"):
        sim.grasp_cache(sim.box(0.004, 0.004, 0.004), n=2, progress=False)


def test_a_kill_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.npz"
    sim.save_npz(path, a=np.arange(3))
    code = ("import os, pathlib, sys, numpy as np, sim\n"
            "pathlib.Path.replace = os.replace = lambda *_: os.kill(os.getpid(), 9)\n"
            f"sim.save_npz(sys.argv[1], a=np.zeros(1000))")
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
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "film.gif"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "no film" in done.stderr and "libegl1" in done.stderr, done.stderr
    assert not (tmp_path / "film.gif").exists()
