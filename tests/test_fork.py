"""Another hand: the six files with another table run the whole loop, and no other line differs."""
import concurrent.futures
import json
import re
import shutil

import mujoco
import numpy as np
import pytest
import torch

from conftest import ROOT, finish, run, start

FILES = "hand.py", "sim.py", "train_policy.py", "collect.py", "fit_ndm.py", "deploy.py"
SECTION = r"(?m)(^# -+ (?:the table|what follows from it)\n)"

ALLEGRO = '''
# Allegro Hand (right): kinematics, limits and collision shapes as in MuJoCo Menagerie, solid links
# of 800 kg/m3; motors of 12 V, made up. Thumb first, other names, each joint about an axis of its
# own.
def _box(centre, half):
    """Mass, centre of mass, inertia quaternion, inertia and box of a solid box."""
    mass = 800 * 8 * np.prod(half)
    x, y, z = np.square(half) * mass / 3
    return mass, centre, (1, 0, 0, 0), (y + z, x + z, x + y), ((centre, half),)


def _link(name, parent, finger, pos, quat, joint, half, centre=None, tip=None):
    mass, com, turn, inertia, boxes = _box(centre or (0, 0, half[2]), half)
    shapes = (("box", *boxes[0]),)
    if tip:
        low, high = tip
        shapes += (("capsule", (0, 0, low), (0, 0, high), 0.012),)
        boxes += (((0, 0, (low + high) / 2), (0.012, 0.012, (high - low) / 2 + 0.012)),)
    return Link(name, parent, finger, pos, quat, mass, com, turn, inertia, joint, shapes, boxes)


def _finger(name, number, pos, quat, grasp):
    names = [f"{name}_{part}" for part in ("base", "proximal", "medial", "distal")]
    joint = [Joint(f"{name}j{i}", 4 * number + i, low, high, angle, 800, role, axis=axis, zero=0.0)
             for i, (low, high, angle, role, axis) in enumerate((
                 (-0.47, 0.47, grasp[0], "side", (0, 0, 1)),
                 (-0.196, 1.61, grasp[1], "base", (0, 1, 0)),
                 (-0.174, 1.709, grasp[2], "medial", (0, 1, 0)),
                 (-0.227, 1.618, grasp[3], "distal", (0, 1, 0))))]
    straight = (1, 0, 0, 0)
    return (
        _link(names[0], "palm", name, pos, quat, joint[0], (0.0098, 0.01375, 0.0082)),
        _link(names[1], names[0], name, (0, 0, 0.0164), straight, joint[1],
              (0.0098, 0.01375, 0.027)),
        _link(names[2], names[1], name, (0, 0, 0.054), straight, joint[2],
              (0.0098, 0.01375, 0.0192)),
        _link(names[3], names[2], name, (0, 0, 0.0384), straight, joint[3],
              (0.0098, 0.01375, 0.008), tip=(0.009, 0.029)),
    )


HAND = "allegro-right"
_TILT = 0.0436194
LINKS = (
    _link("palm", None, None, (0, 0, 0), (0, 0.5 ** 0.5, 0, 0.5 ** 0.5), None,
          (0.0204, 0.0565, 0.0475), (-0.0093, 0, -0.0475)),
    _link("th_base", "palm", "th", (-0.0182, 0.019333, -0.045987),
          (0.477714, -0.521334, -0.521334, -0.477714),
          Joint("thj0", 12, 0.263, 1.396, 0.94, 800, "opposing", axis=(-1, 0, 0), rest=0.3),
          (0.0179, 0.017, 0.02275), (-0.0179, 0.009, 0.0145)),
    _link("th_proximal", "th_base", "th", (-0.027, 0.005, 0.0399), (1, 0, 0, 0),
          Joint("thj1", 13, -0.105, 1.163, 0.79, 800, "turning", axis=(0, 0, 1)),
          (0.0098, 0.01375, 0.00885)),
    _link("th_medial", "th_proximal", "th", (0, 0, 0.0177), (1, 0, 0, 0),
          Joint("thj2", 14, -0.189, 1.644, 0.98, 800, "medial", axis=(0, 1, 0)),
          (0.0098, 0.01375, 0.0257)),
    _link("th_distal", "th_medial", "th", (0, 0, 0.0514), (1, 0, 0, 0),
          Joint("thj3", 15, -0.162, 1.719, 0.6, 800, "distal", axis=(0, 1, 0)),
          (0.0098, 0.01375, 0.0157), tip=(0.027, 0.043)),
    *_finger("rf", 2, (0, -0.0435, -0.001542), (0.999048, _TILT, 0, 0), (0.09, 0.73, 1.12, 0.4)),
    *_finger("mf", 1, (0, 0, 0.0007), (1, 0, 0, 0), (0.1, 0.74, 0.17, 0.79)),
    *_finger("ff", 0, (0, 0.0435, -0.001542), (0.999048, -_TILT, 0, 0), (0.12, 0.82, 0.79, 0.87)),
)
TIPS = {
    "th_distal": (0, 0, 0.043),
    "rf_distal": (0, 0, 0.029),
    "mf_distal": (0, 0, 0.029),
    "ff_distal": (0, 0, 0.029),
}
MAX_STEP = 0.12
MOVE_SPEED = 1.0
D_GAIN = 200
MODELS = {1: "made up"}
CURRENT_LIMIT = {1: 0.6}
CURRENT = 0.6
SUPPLY, SAG = 12.0, (0.2, 0.8)
VOLTAGE = 10.0, 13.0
COUNT = 2 * np.pi / 65536
RPM = 0.01
FULL_DUTY = 3.3e6
KT = 0.7
RESISTANCE = 10.0
ARMATURE = 0.0025
FRICTION = 0.02
RUB, RUB_STRIBECK = 0.015, 0.005
LOAD, LOAD_STRIBECK = 0.05, 0.05
VISCOUS = 0.01
STRIBECK_SPEED, STRIBECK_EXPONENT = 2.0, 1.0
BACKLASH = 0.1, 0.3
REACH = 0.4
SCALE = 1.1
BOX = (-0.13, -0.12, 0.0), (0.17, 0.12, 0.17)
BALLS = 12
CAMERA = {"lookat": (0.03, 0, 0.05), "distance": 0.5, "azimuth": 150, "elevation": -25}
WATCH = "thumb, ring, middle and index move in this order"


def stages(here, goal):
    """The thumb out of the way, the fingers, the thumb."""
    away = lambda pose: np.where(np.array(FINGER) == "th", REST, pose)
    return [away(here), away(goal), goal]
'''

THREE = '''
# A made-up hand: three fingers of 3, 4 and 5 joints around a round palm. No joint's 0 is where it
# rests, most turn about y, and motors are numbered backwards.
HAND = "three"


def _finger(name, motor, turn, joints):
    """joints: (role, length of its link (m), low, high, grasp); the last has the tip."""
    at = (0.072 * np.cos(turn), 0.072 * np.sin(turn), 0.012)
    quat, parent, links = (np.cos(turn / 2), 0, 0, np.sin(turn / 2)), "mount", ()
    for k, (role, length, low, high, grasp) in enumerate(joints):
        half, mass = (0.008, 0.009, length / 2), 0.03
        x, y, z = np.square(half) * mass / 3
        joint = Joint(f"{name}.{k}", motor - k, low, high, grasp, 900, role, rest=low + 0.1,
                      axis=(1, 0, 0) if role == "side" else (0, -1, 0), sign=-1)
        shapes = (("capsule", (0, 0, 0.004), (0, 0, length - 0.004), 0.008),)
        boxes = (((0, 0, length / 2), half),)
        if k == len(joints) - 1:
            shapes += (("capsule", (0, 0, length - 0.004), (0, 0, length + 0.004), 0.012),)
            boxes += (((0, 0, length), (0.012, 0.012, 0.016)),)
        links += (Link(f"{name}{k}", parent, name, at, quat, mass, (0, 0, length / 2),
                       (1, 0, 0, 0), (y + z, x + z, x + y), joint, shapes, boxes),)
        at, quat, parent = (0, 0, length), (1, 0, 0, 0), f"{name}{k}"
    return links


LINKS = (
    Link("palm", None, None, (0, 0, 0), (1, 0, 0, 0), 0.3, (0, 0, 0), (1, 0, 0, 0),
         (2e-4, 2e-4, 4e-4), None, (("cylinder", (0, 0, 0), (0.07, 0.01)),),
         (((0, 0, 0), (0.06, 0.06, 0.01)),)),
    Link("mount", "palm", None, (0, 0, 0), (1, 0, 0, 0), 0.01, (0, 0, 0), (1, 0, 0, 0),
         (1e-6, 1e-6, 1e-6), None, (), ()),
    *_finger("a", 112, 0.0, (
        ("base", 0.045, -0.6, 1.2, -0.14),
        ("middle", 0.035, 0.05, 1.6, 0.61),
        ("distal", 0.022, 0.05, 1.6, 1.23))),
    *_finger("b", 109, 2 * np.pi / 3, (
        ("side", 0.01, -0.5, 0.5, 0.0),
        ("base", 0.04, -0.6, 1.2, -0.28),
        ("middle", 0.033, 0.05, 1.6, 0.94),
        ("distal", 0.022, 0.05, 1.6, 0.98))),
    *_finger("c", 105, -2 * np.pi / 3, (
        ("side", 0.01, -0.5, 0.5, 0.0),
        ("base", 0.03, -0.6, 1.2, -0.14),
        ("middle", 0.025, -0.4, 1.6, 0.07),
        ("knee", 0.022, 0.05, 1.6, 1.02),
        ("distal", 0.02, 0.05, 1.6, 0.86))),
)
TIPS = {
    "a2": (0, 0, 0.022),
    "b3": (0, 0, 0.022),
    "c4": (0, 0, 0.02),
}
MAX_STEP = 0.12
MOVE_SPEED = 1.0
D_GAIN = 0
MODELS = {}
CURRENT_LIMIT = {}
CURRENT = 0.5
SUPPLY, SAG = 7.4, (0.1, 0.3)
VOLTAGE = 6.5, 8.0
COUNT = 2 * np.pi / 8192
RPM = 0.02
FULL_DUTY = 6e5
KT = 0.4
RESISTANCE = 4.0
ARMATURE = 0.002
FRICTION = 0.012
RUB, RUB_STRIBECK = 0.008, 0.004
LOAD, LOAD_STRIBECK = 0.05, 0.05
VISCOUS = 0.004
STRIBECK_SPEED, STRIBECK_EXPONENT = 2.0, 1.0
BACKLASH = 0.1, 0.4
REACH = 0.4
SCALE = 0.9
BOX = (-0.11, -0.11, 0.02), (0.11, 0.11, 0.16)
BALLS = 10
CAMERA = {"lookat": (0, 0, 0.06), "distance": 0.4, "azimuth": 90, "elevation": -30}
WATCH = "the fingers a, b and c move in this order"


def stages(here, goal):
    return [goal]
'''
HANDS = {"allegro-right": (ALLEGRO, 16, 4), "three": (THREE, 12, 3)}


def forked(folder, table):
    """The six files in `folder`, with another table."""
    folder.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    before, begin, _, end, rest = re.split(SECTION, (ROOT / "hand.py").read_text())
    (folder / "hand.py").write_text(before + begin + table + end + rest)
    return folder


# A script with fewer objects, grasps, gradient steps, episodes and frames, training in episodes of
# 5 s; the files stay as they are.
TOY = """
import sys
import hand, sim
if sys.argv[1] == "train_policy":
    sim.EPISODE = 100
import train_policy, collect, fit_ndm, deploy
del sim.FAMILIES["cube"][1:]
sample = sim._sample_grasps
sim._sample_grasps = lambda model, name, test, progress: sample(
    model, name, test | {"count": 16}, progress)
film = sim.film
sim.film = lambda model, qpos, path, wrist: film(model, qpos[:8], path, wrist)
train_policy.GRADIENT_STEPS, train_policy.evaluate.__defaults__ = 2, (4,)
collect.BLOCK, fit_ndm.BOXES = 12, 1
script = sys.argv.pop(1)
sys.argv[0] = script
hand.run(sys.modules[script].main)
"""

# What a fork can get silently wrong.
FACTS = """
import json, mujoco, numpy as np, hand as H, sim
model, virtual = sim.build(balls=sim.Balls()).compile(), sim.VirtualHand(3)
hand_geoms = [g for g in range(model.ngeom) if model.geom_priority[g] == 1]
finger = [H.LINKS[[l.name for l in H.LINKS].index(model.body(model.geom_bodyid[g]).name)].finger
          for g in hand_geoms]
pairs = {tuple(sorted((finger[i], finger[k])))
         for i, a in enumerate(hand_geoms) for k, b in enumerate(hand_geoms)
         if finger[i] and finger[k] and finger[i] != finger[k]
         and (model.geom_contype[a] & model.geom_conaffinity[b])}
rng = np.random.default_rng(0)
reached = []
for _ in range(3):
    reached.append(np.abs(virtual.move_to(goal := rng.uniform(sim.NEAR, sim.FAR)) - goal).max())
    virtual.place(H.GRASP)
boxed = sim.VirtualHand(3, load="balls", differs=("motor",))
boxed.place(H.GRASP, stir=1)
balls = boxed._data.qpos[H.N * 2:].reshape(-1, 3) + [
    boxed._model.body(f"ball{i}").pos for i in range(H.BALLS)]
print(json.dumps(dict(
    joints=[j.name for j in H.JOINTS], qpos=[model.joint(i).name for i in range(H.N)],
    sites=[model.site(i).name for i in range(model.nsite)], tips=list(H.TIPS),
    pairs=sorted(pairs), volt=virtual._volt, limit=[virtual._limit.min(), virtual._limit.max()],
    axes=[model.jnt_axis[i].tolist() for i in range(H.N)],
    grid=float(np.abs(np.remainder(virtual.read().q / H.COUNT + 0.5, 1) - 0.5).max()),
    reached=max(reached), observed=sim.OBSERVED,
    balls=[balls.min(0).tolist(), balls.max(0).tolist()], box=H.BOX,
    cube=2 * sim.FAMILIES["cube"][0].parts[0][1][0],
    fall=sim.FALL, low=H.LOW.tolist())))
"""


def run_in(folder, *command):
    return run(*command, cwd=folder)


def whole_loop(folder, table):
    forked(folder, table)
    facts = json.loads(run_in(folder, "-c", FACTS))
    here = "--wrist", "palm_up"
    run_in(folder, "-c", TOY, "train_policy", *here, "--family", "cube", "--axis", "z+",
           "--envs", 6, "--steps", 192, "--rounds", 1, "--fine-tune", 96, "--out", "policy")
    content = torch.load(folder / "policy/policy.pt", weights_only=True)
    for name in ("out.weight", "out.bias"):              # nobody learns to hold in two updates
        content["weights"][name].zero_()
    torch.save(content, folder / "still.pt")
    policy = "--policy", "still.pt"
    run_in(folder, "-c", TOY, "collect", "--port", "sim:0", *here, *policy, "--hours", 10 / 180,
           "--load", "none", "--workers", 1, "--out", "data")
    run_in(folder, "-c", TOY, "fit_ndm", "--data", "data", *policy, "--out", "ndm",
           "--models", "joint", "finger", "whole", "--steps", 20, "--residual-steps", 2,
           "--episodes", 12)
    run_in(folder, "-c", TOY, "deploy", "--compare", "--episodes", 2, "--port", "sim:0", *here,
           "--axis", "z+", *policy, "--residual", "ndm/residual.pt", "--json", "numbers.json",
           "--workers", 1)
    return facts


@pytest.fixture(scope="module")
def loops(tmp_path_factory):
    """{hand: (folder, facts)}, both at the same time."""
    folders = {name: tmp_path_factory.mktemp("fork") / name for name in HANDS}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        facts = pool.map(lambda name: whole_loop(folders[name], HANDS[name][0]), HANDS)
        return dict(zip(HANDS, zip(folders.values(), facts)))


@pytest.mark.parametrize("name", HANDS)
def test_another_table_runs_the_whole_loop(loops, name):
    folder, (_, n, _) = loops[name][0], HANDS[name]
    content = torch.load(folder / "policy/policy.pt", weights_only=True)
    assert content["hand"] == name and len(content["joints"]) == n
    oracle = torch.load(folder / "policy/oracle-cube.pt", weights_only=True)
    assert oracle["weights"]["log_std"].shape == (n,) and oracle["steps"] == 192
    shards = sorted((folder / "data").glob("[0-9]*.npz"))
    assert len(shards) == 10
    for shard in shards:
        with np.load(shard) as data:
            assert str(data["hand"]) == name and data["q"].shape == (400, n)
            assert 1e-4 < np.abs(data["q"] - data["target"]).mean() < 0.2
            assert np.abs(np.diff(data["target"], axis=0)).max() < 0.13
    (table,) = json.loads((folder / "ndm/table.json").read_text()).values()
    for kind in ("joint", "finger", "whole"):
        assert len(table[kind]["one"]) == n and np.isfinite(table[kind]["open"]).all()
    assert (folder / "ndm/prediction.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((folder / "numbers.json").read_text())
    assert report["ceiling"]["TTF"]["mean"] == 20.0, "who holds still holds"
    assert report["base"]["TTF"]["mean"] > 5 and np.isfinite(report["residual"]["RotP"]["mean"])


@pytest.mark.parametrize("name", HANDS)
def test_nothing_of_the_first_hand_is_left(loops, name):
    facts, (_, n, fingers) = loops[name][1], HANDS[name]
    assert facts["joints"] == facts["qpos"], "joints in MuJoCo's order"
    assert facts["sites"] == facts["tips"] and len(facts["tips"]) == fingers
    assert len(facts["pairs"]) == fingers * (fingers - 1) / 2, "every finger meets every other"
    assert facts["observed"] == 20 * n + 7
    assert facts["reached"] < 0.15, "commands arrive at the joint they are for"
    assert facts["grid"] < 1e-6, "its own encoder"
    scale = {"allegro-right": 1.1, "three": 0.9}[name]
    assert facts["cube"] == pytest.approx(0.0525 * scale, abs=2e-5)
    assert facts["fall"] == pytest.approx(0.06 * scale)
    low, high = {"allegro-right": (11.2, 11.8), "three": (7.1, 7.3)}[name]
    assert low < facts["volt"] < high, "its own supply"
    least, most = {"allegro-right": (0.54, 0.6), "three": (0.45, 0.5)}[name]
    assert least <= facts["limit"][0] <= facts["limit"][1] <= most
    axes = {"allegro-right": [-1, 0, 0], "three": [0, -1, 0]}[name]
    assert facts["axes"][0] == axes
    (low, high), (least, most) = facts["box"], facts["balls"]
    assert np.all(np.greater(least, low)) and np.all(np.less(most, high)), "its own box"
    assert max(facts["low"]) > 0, "0 rad is outside of a joint's limits"


def test_files_of_another_hand_are_refused(loops):
    folder = loops["allegro-right"][0]
    for policy in (ROOT / "checkpoints/policy.pt", loops["three"][0] / "still.pt"):
        status, _, err = finish(start("deploy.py", "--base", "--port", "sim:0", "--policy", policy,
                                      "--episodes", 1, cwd=folder))
        assert status == 2 and "is for the hand" in err and "Traceback" not in err


# ------------------------------------------------------------------------------- broken tables
def changed(link, **to):
    """Code that changes fields of a link."""
    return f"LINKS = tuple(l._replace(**{to!r}) if l.name == {link!r} else l for l in LINKS)"


def joint(link, **to):
    return (f"LINKS = tuple(l._replace(joint=l.joint._replace(**{to!r})) if l.name == {link!r} "
            "else l for l in LINKS)")


BROKEN = [                     # what is appended to a good table, and what is said about it
    ("LINKS = LINKS[1:]", "link mount is the first, but"),
    (changed("b1", parent="b9"), "link b1 hangs on b9: unknown"),
    ("LINKS = (*LINKS[:2], *LINKS[3:], LINKS[2])", "link a1 hangs on a0"),
    ("LINKS = (*LINKS[:4], *LINKS[5:], LINKS[4])", "link a2 is not next to others on a1"),
    (changed("a1", finger="b"), "link a1 of finger b hangs on finger a"),
    (changed("b0", finger="a"), "link b0 begins finger a again"),
    (changed("b0", finger=None), "link b0 has a joint, but no finger"),
    (changed("a1", boxes=()), "link a1 has shapes, but no boxes"),
    (changed("a2", shapes=(("sphere", (0, 0, 0.022), (0.012,)),)), "link a2 is a fingertip, but"),
    (joint("a1", low=1.7), "link a1 has no proper limits"),
    (joint("a1", grasp=1.61), "link a1 has its grasp outside"),
    (joint("a1", rest=0.0), "link a1 has its rest outside"),
    (joint("a1", grasp=None), "cannot be read"),
    (joint("a1", motor_id=112), "two joints have the same motor_id"),
    ("del TIPS['b3']", "TIPS must name one link of each of the fingers"),
    ("TIPS['b2'] = (0, 0, 0)", "TIPS must name one link of each of the fingers"),
    ("TIPS['b9'] = (0, 0, 0)", "TIPS must name one link of each of the fingers"),
    ("TIPS = dict(reversed(TIPS.items()))", "['a', 'b', 'c'], in this order"),
    ("LINKS, TIPS = LINKS[:5], {'a2': TIPS['a2']}", "no two fingers can touch"),
    ("del KT", "it has no KT"),
    ("del stages", "it has no stages"),
    ("KT = 0", "KT is 0, which is not a positive number"),
    ("RESISTANCE = (1.0, 2.0)", "RESISTANCE is (1.0, 2.0), which is not a positive"),
    ("CURRENT = 5.0", "7.4 V less (0.1, 0.3) V cannot drive 5.0 A"),
    ("BOX = BOX[::-1]", "is not a lower and an upper corner"),
    ("stages = lambda here, goal: [goal, here]", "stages() leaves the limits, or does not end"),
    ("stages = lambda here, goal: [goal - 9, goal]", "stages() leaves the limits"),
]


UNFIT = [                      # the same, of what needs the model
    ("BOX = (0.2, -0.1, 0), (0.4, 0.1, 0.2)", "fingertips at the grasp are outside of BOX"),
    ("LINKS = (LINKS[0]._replace(quat=(0, 1, 0, 0)), *LINKS[1:])", "z of the world does not point"),
    (changed("a1", mass=0), "MuJoCo cannot build it: Error: mass and inertia"),
    (changed("a1", inertia=(1e-6, 1e-6, 1e-5)), "MuJoCo cannot build it: Error: inertia must"),
    (changed("a1", shapes=(("cone", (0, 0, 0), (1, 1, 1)),)), "MuJoCo cannot build it: 'cone'"),
    (changed("a1", boxes=(((0, 0, 0), (0.01, 0, 0.01)),)), "MuJoCo cannot build it: Error: size"),
    (joint("a1", axis=(0, 0, 0)), "MuJoCo cannot build it: Error: axis"),
    (joint("a1", name="a.0"), "MuJoCo cannot build it: Error: repeated name 'a.0' in joint"),
]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """{code: (exit status, stdout, stderr)} of a good table with `code` appended to it."""
    folder = tmp_path_factory.mktemp("broken")

    def attempt(number, code, *command):
        copy = forked(folder / str(number), f"{THREE}{code}\n")
        return code, finish(start(*command, cwd=copy))

    jobs = [(code, "hand.py", "--help") for code, _ in BROKEN]
    jobs += [(code, "-c", "import sim") for code, _ in UNFIT]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(pool.map(lambda job: attempt(job[0], *job[1]), enumerate(jobs)))


@pytest.mark.parametrize("code, said", BROKEN + UNFIT)
def test_a_broken_table_is_refused_in_one_line(refusals, code, said):
    status, out, err = refusals[code]
    assert status == 2 and out == "" and len(err.splitlines()) == 1, (status, out, err)
    assert err.startswith("error: the table of hand.py: ") and said in err


def test_the_good_table_is_not_refused(tmp_path):
    status, _, err = finish(start("hand.py", "--help", cwd=forked(tmp_path / "good", THREE)))
    assert (status, err) == (0, "")


# --------------------------------------------------------------------------- a table of an MJCF
GRIPPER = """
<mujoco>
  <compiler angle="radian"/>
  <asset><mesh name="wedge" vertex="0 0 0  .02 0 0  0 .02 0  .02 .02 0  0 0 .06  .02 0 .06
                                    0 .02 .06  .02 .02 .06"/></asset>
  <default><geom density="900"/>
    <default class="seen"><geom contype="0" conaffinity="0"/></default></default>
  <worldbody><body name="palm">
    <geom type="box" size=".06 .03 .01"/>
    {fingers}
  </body></worldbody>
</mujoco>"""
TWO_LINKS = """
    <body name="{0}" pos="{1} 0 .01" euler="0 0 {2}">
      <joint name="{0}j" axis="0 -1 0" range="-.5 1"/>
      <geom type="mesh" mesh="wedge" pos="-.01 -.01 0"/>
      <body name="{0}far" pos="0 0 .06"><joint name="{0}farj" axis="0 -2 0" range=".1 .9"/>
        <geom type="cylinder" size=".008 .02" pos="0 0 .02"/>
        <geom class="seen" type="box" size=".1 .1 .1"/>
        <body name="{0}tip" pos="0 0 .04"><geom type="box" size=".01 .01 .015"/></body>
      </body>
    </body>"""


def test_an_mjcf_becomes_a_table(tmp_path):
    fingers = TWO_LINKS.format("l", -0.05, 3.14159265) + TWO_LINKS.format("r", 0.05, 0)
    path = tmp_path / "gripper.xml"
    path.write_text(GRIPPER.format(fingers=fingers))
    printed = run("tests/mjcf.py", path)
    rest = THREE[THREE.index("MAX_STEP"):]
    folder = forked(tmp_path / "fork", 'HAND = "gripper"\n' + printed + rest)
    built = run_in(folder, "-c", "import sim; s = sim.build(); s.compile(); print(s.to_xml())")
    ours, theirs = (mujoco.MjModel.from_xml_string(xml) for xml in (built, path.read_text()))
    assert ours.nbody == theirs.nbody == 8 and ours.njnt == 4
    for name in ("body_mass", "body_ipos", "body_inertia", "body_pos", "body_quat"):
        kept = getattr(ours, name)[1:]
        assert kept == pytest.approx(getattr(theirs, name)[1:], rel=1e-4, abs=1e-6), name
    for name in ("jnt_range", "jnt_axis"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=1e-5)
    space = {}
    exec("from hand import Link, Joint\n" + printed, space)
    links = {link.name: link for link in space["LINKS"]}
    ((kind, centre, half, *_),) = links["r"].shapes                  # the mesh is a box
    assert kind == "box" and sorted(half) == pytest.approx([0.01, 0.01, 0.03], rel=0.02)
    assert centre == pytest.approx([0, 0, 0.03], abs=1e-4)
    ((kind, _, size, *_),) = links["rfar"].shapes                    # what is only seen is left out
    assert kind == "cylinder" and size == (0.008, 0.02)
    assert links["rfar"].boxes[0][1] == (0.008, 0.008, 0.02)
    ((kind, low, high, radius),) = links["rtip"].shapes              # a tip is round
    assert (kind, radius) == ("capsule", 0.01)
    assert sorted((low[2], high[2])) == pytest.approx([-0.005, 0.005])
    assert [link.finger for link in space["LINKS"]] == [None, *["l"] * 3, *["r"] * 3]
    assert list(space["TIPS"]) == ["ltip", "rtip"]


@pytest.mark.parametrize("xml, said", [
    (None, "Error opening file"),
    ("<mujoco", "XML"),
    ('<mujoco><worldbody><body name="a"><freejoint/><geom size="1"/></body></worldbody></mujoco>',
     "a does not turn about one axis"),
])
def test_an_mjcf_that_is_no_hand_is_refused(tmp_path, xml, said):
    path = tmp_path / "hand.xml"
    if xml:
        path.write_text(xml)
    status, out, err = finish(start("tests/mjcf.py", path))
    assert status == 2 and out == "" and said in err and len(err.splitlines()) == 1
