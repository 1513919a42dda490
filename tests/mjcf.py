"""A hand's MuJoCo model as the links of the table in hand.py.

    python tests/mjcf.py HAND.xml                # prints LINKS and TIPS

Bodies, inertias, axes and limits are the model's. Shapes are what collides (or, if nothing of a
body does, what is seen): primitives as they are, meshes as the boxes that MuJoCo fits to them, and
the last one of every finger as a capsule, which the rubber tip is. A finger has the name of its
first link. Left to be filled in: motor ids, P gains, roles, grasp (the middle of the limits), and
everything in the table but the links.
"""
import argparse
import sys
import textwrap
from pathlib import Path

import mujoco
import numpy as np

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
import hand as H


def short(values):
    return tuple(float(f"{x:.6g}") for x in values)


def load(path, boxes):
    """The compiled model; with `boxes` its meshes are boxes."""
    try:
        spec = mujoco.MjSpec.from_file(path)
        for geom in spec.geoms if boxes else ():
            if geom.type == mujoco.mjtGeom.mjGEOM_MESH:
                geom.type = mujoco.mjtGeom.mjGEOM_BOX
        return spec.compile()
    except ValueError as error:
        raise H.Problem(f"{path}: {' '.join(str(error).split())}")


def joint_of(m, b):
    j, name = m.body_jntadr[b], m.body(b).name
    if j < 0:
        return None
    if m.body_jntnum[b] > 1 or m.jnt_type[j] != mujoco.mjtJoint.mjJNT_HINGE or m.jnt_pos[j].any():
        raise H.Problem(f"{name} does not turn about one axis through the origin of its frame")
    low, high = short(m.jnt_range[j])
    return H.Joint(m.joint(j).name, int(j), low, high, (low + high) / 2, 800, "",
                   short(m.jnt_axis[j]), rest=min(max(0.0, low), high))


def primitive(m, g):
    """A geom as a shape, as a box, and as a capsule along its longest side."""
    kind = mujoco.mjtGeom(m.geom_type[g]).name[len("mjGEOM_"):].lower()
    pos, quat, size = m.geom_pos[g], m.geom_quat[g], m.geom_size[g]
    r, h = size[:2]
    half = {"sphere": (r, r, r), "capsule": (r, r, h + r), "cylinder": (r, r, h)}.get(kind, size)
    longest, way = np.argmax(half), np.zeros(3)
    (r,) = short([np.delete(half, longest).mean()])
    mujoco.mju_rotVecQuat(way, max(half[longest] - r, 1e-3) * np.eye(3)[longest], quat)
    capsule = "capsule", short(pos - way), short(pos + way), r
    shape = capsule if kind == "capsule" else (kind, short(pos), short(size[size > 0]), short(quat))
    return shape, (short(pos), short(half), short(quat)), capsule


def table_of(path):
    """LINKS and TIPS as Python text. Raises `Problem` on what is no model of a hand."""
    m, boxed = load(path, boxes=False), load(path, boxes=True)       # inertias, shapes
    links, fingers, last = [], [None], {}
    for b in range(1, m.nbody):
        up, name, first = m.body_parentid[b], m.body(b).name, m.body_geomadr[b]
        joint = joint_of(m, b)
        fingers.append(fingers[up] or (name if joint else None))
        geoms = range(first, first + m.body_geomnum[b])
        solid = [g for g in geoms if m.geom_contype[g] or m.geom_conaffinity[g]] or geoms
        shapes, boxes = [], []
        for shape, box, capsule in (primitive(boxed, g) for g in solid):
            shapes.append(shape)
            boxes.append(box)
            last[fingers[b]] = len(links), name, box[0], capsule
        links.append(H.Link(
            name, m.body(up).name if up else None, fingers[b], short(m.body_pos[b]),
            short(m.body_quat[b]), *short([m.body_mass[b]]), short(m.body_ipos[b]),
            short(m.body_iquat[b]), short(m.body_inertia[b]), joint, shapes, boxes))
    last.pop(None, None)                                             # of the palm
    for k, _, _, capsule in last.values():
        links[k].shapes[-1] = capsule
    rows = [textwrap.fill(f"    Link({', '.join(map(repr, link))}),", 100,
                          subsequent_indent=9 * " ") for link in links]
    tips = {name: centre for _, name, centre, _ in sorted(last.values())}
    return "\n".join(["LINKS = (", *rows, ")", f"TIPS = {tips}"])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an MJCF or URDF file that MuJoCo can read")
    print(table_of(parser.parse_args().model))


if __name__ == "__main__":
    H.run(main)
