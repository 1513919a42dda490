"""What was measured on several hands as one table: means, and how far they are to be trusted.

    python tests/tables.py --errors runs/ndm*/table.json           # of fit_ndm.py: dynamics models
    python tests/tables.py --gaps results/study/sim?.json      # of deploy.py --compare --json
    python tests/tables.py --steer --port sim:0          # what it costs to be steered
    python tests/tables.py --objects pictures/objects.png

--gaps also draws bars: gap.png beside the first file. --steer lets the hand turn objects about +z,
palm up, for 5 s; then axis, wrist or both change, as a person would change them with deploy.py
--live; what counts is what it turns in the next 5 s, against the same episode without a change.
--objects draws what the hand turns, a row for each family.
"""
import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import collect
import deploy
import hand as H
import sim
import mujoco

UNITS = {"RotR": H.CONTROL_HZ, "TTF": 1}     # what makes radians turned and s of a metric

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
     2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)


def interval(values):
    """Mean, standard deviation (with n - 1) and the half width of the 95 % interval of the mean,
    from one number for each hand (n,). Of one hand alone the last two are NaN."""
    values = np.asarray(values, float)
    n = len(values)
    if n < 2:
        return values.mean(), np.nan, np.nan
    std = values.std(ddof=1)
    t = T[n - 2] if n - 2 < len(T) else 1.96 + 2.5 / (n - 1)
    return values.mean(), std, t * std / n ** 0.5


def errors_table(files):
    """The table.json of several hands as one, mrad, averaged over joints. `against joint` is the
    difference to the joint-wise model of the same hand. Raises `Problem` on other files."""
    try:
        tables = [json.loads(Path(file).read_text()) for file in files]
        mean = {}
        for name, models in tables[0].items():
            for kind in models:
                for error in ("one", "open"):
                    mean[name, kind, error] = np.array(
                        [np.mean(table[name][kind][error]) for table in tables])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise H.Problem("not all of these are a table.json of the same comparison "
                        f"({type(error).__name__}: {error})")
    lines = [f"mrad, mean over joints; {len(files)} hands: mean, standard deviation over hands "
             "(sd), 95 % interval of the mean (+-)"]
    for error, title in (("one", "one step"), ("open", "0.5 s open loop")):
        for name, models in tables[0].items():
            lines += ["", f"{title}, {name}", " " * 48 + "against joint"]
            for kind in models:
                row = f"  {kind:<20}{_numbers(mean[name, kind, error])}"
                if kind != "joint" and "joint" in models:
                    difference = mean[name, kind, error] - mean[name, "joint", error]
                    row += f"   {_numbers(difference)}"
                lines.append(row)
    return "\n".join(lines)


def _numbers(values):
    mean, std, half = interval(values)
    return f"{mean:7.2f} sd {std:5.2f} +- {half:5.2f}"


# ------------------------------------------------------------------- --gaps: deploy.py --compare
KINDS = "ceiling", "base", "residual"
GAPS = (                         # heading, width, decimals
    ("ceiling", 8, 2), ("base", 7, 2), ("residual", 9, 2), ("gain", 7, 2),       # turned, rad
    ("ceiling", 10, 1), ("base", 6, 1), ("residual", 9, 1),                      # TTF, s
    ("lost", 9, 0), ("recovered", 11, 0),                                        # %
)


def read_gaps(files):
    """The reports in `files`. Raises `Problem` on anything that --compare --json did not write."""
    reports = []
    for file in files:
        try:
            report = json.loads(Path(file).read_text())
            gap_row(report)
            for part in report["wrists"].values():
                gap_row(part)
            report["port"]
        except (OSError, ValueError, KeyError, TypeError):
            raise H.Problem(f"{file} is not a file that deploy.py --compare --json wrote")
        reports.append(report)
    return reports


def gap_row(part):
    """A hand, or a wrist of it, as the numbers of GAPS; nan where nothing could be recovered."""
    turned = [part[kind]["RotR"]["mean"] / H.CONTROL_HZ for kind in KINDS]
    held = [part[kind]["TTF"]["mean"] for kind in KINDS]
    lost = 100 * (1 - turned[1] / turned[0]) if turned[0] > 0 else np.nan
    recovered = np.nan if part["recovered"] is None else 100 * part["recovered"]
    return np.array([*turned, turned[2] - turned[1], *held, lost, recovered])


def over_hands(rows):
    """Mean, standard deviation (n - 1) and half width of the 95 % interval of every column of rows
    (hands, columns), of the hands that have a number."""
    columns = [column[np.isfinite(column)] for column in np.transpose(rows)]
    return np.transpose([interval(c) if len(c) else (np.nan,) * 3 for c in columns])


def means(rows, form):
    """The numbers of a line: mean over hands and half width, put into `form`, of every column of
    rows (hands, columns)."""
    mean, _, half = over_hands(rows)
    return "".join(map(form.format, mean, half))


def gap_table(reports):
    """The lines of the table: a hand each, then over hands, then over hands for every wrist."""
    def line(name, row):
        cells = ("".rjust(width) if np.isnan(x) else f"{x:{width}.{decimals}f}"
                 for x, (_, width, decimals) in zip(row, GAPS))
        return f"{name:<13}" + "".join(cells)

    rows = np.array([gap_row(report) for report in reports])
    lines = [f"{'':13}{'turned, rad':>31}{'TTF, s':>25}{'%':>20}",
             f"{'hand':<13}" + "".join(name.rjust(width) for name, width, _ in GAPS)]
    lines += [line(report["port"], row) for report, row in zip(reports, rows)]
    for name, row in zip(("mean", "std", "95 % +-"), over_hands(rows)):
        lines.append(line(name, row))
    for wrist in dict.fromkeys(wrist for report in reports for wrist in report["wrists"]):
        parts = [report["wrists"][wrist] for report in reports if wrist in report["wrists"]]
        mean, _, half = over_hands(np.array([gap_row(part) for part in parts]))
        lines += [line(wrist, mean), line("  95 % +-", half)]
    return lines


def draw_gaps(reports, picture):
    """Bars of every hand, with the standard error over episodes."""
    figure, axes = sim.subplots(1, 2, figsize=(11, 3.6))
    labels = "training simulator", "hand, policy alone", "hand, policy + residual"
    panels = (("RotR", 1 / H.CONTROL_HZ, "radians turned in 20 s"), ("TTF", 1, "time to fall, s"))
    for axis, (metric, scale, title) in zip(axes, panels):
        for k, (kind, color) in enumerate(zip(KINDS, ("0.7", "tab:red", "tab:green"))):
            numbers = [report[kind][metric] for report in reports]
            axis.bar(np.arange(len(reports)) + 0.27 * (k - 1), [scale * x["mean"] for x in numbers],
                     0.25, yerr=[scale * x["sem"] for x in numbers], color=color, label=labels[k])
        axis.set_xticks(range(len(reports)), [report["port"] for report in reports])
        axis.set_ylabel(title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    sim.save_figure(figure, picture)


# ------------------------------------------------------------------- --steer: on a virtual hand
CHANGES = {"none": (), "axis": ("axis 0 0 -1",), "wrist": ("wrist 0 1 0 0",),
           "both": ("axis 0 0 -1", "wrist 0 1 0 0")}
BEFORE = 5 * H.CONTROL_HZ


def steered(job):
    """One trial, steered by `words` after 5 s, in a worker process: radians turned about the axis
    that was wanted in the 5 s after that, s until it fell (10: never); None if it fell before."""
    port, policy, residual, trial, words = job
    content = deploy.load_policy(policy)[1]
    policy, residual = deploy.networks(policy, residual)
    hand, controller, referee = deploy.begin(port, trial, policy, residual)
    steering, before = deploy.Steering(content, trial.wrist, trial.axis), []

    def act(q):
        hand.push(trial.pushes[steering.steps])
        for word in words if steering.steps == BEFORE else ():
            steering.obey(word)
        steering.steer(controller, residual)
        hand.turn(steering.turned)
        return controller(q)

    def watch(hand):
        held = deploy.still_held(hand, referee)
        if steering.steps == BEFORE:
            before.append(float(referee.RotR[0]))
        return not held

    H.drive(hand, act, 2 * BEFORE, watch)
    if not before or referee.held[0] < BEFORE:
        return None
    return (referee.RotR[0] - before[0]) / H.CONTROL_HZ, referee.held[0] / H.CONTROL_HZ


def steering_table(args):
    """The lines of the table: radians turned after each change, with and without the residual."""
    content = deploy.load_policy(args.policy)[1]
    trials = sim.trials(sim.objects_of("+".join(content["families"])), "palm_up", ["+z"],
                        args.episodes, args.seed)
    kinds = {"base": None, "residual": args.residual}
    jobs = [(args.port, args.policy, residual, trial, words) for residual in kinds.values()
            for words in CHANGES.values() for trial in trials]
    with collect.processes(args.workers) as pool:
        bar, results = sim.Progress("steer", len(jobs)), []
        for result in pool.map(steered, jobs):
            results.append(result or (np.nan, np.nan))
            bar(len(results))
    # (residual, change, trial, rad or s)
    results = np.array(results).reshape(len(kinds), len(CHANGES), len(trials), 2)
    lines = [f"{args.port}, {args.episodes} episodes; +-: 95 % interval of the mean",
             f"{'':9}{'change':<8}{'held at it':>10}{'rad in 5 s':>18}{'against none':>18}"
             f"{'held to the end':>17}"]
    for kind, parts in zip(kinds, results):
        for change, part in zip(CHANGES, parts):
            held = np.isfinite(part[:, 0])
            if not held.any():
                lines.append(f"{kind:<9}{change:<8}{0:>10}")
                continue
            mean, _, half = interval(part[held, 0])
            lost, _, around = interval(part[held, 0] - parts[0, held, 0])
            end = (part[held, 1] >= 2 * BEFORE / H.CONTROL_HZ).mean()
            lines.append(f"{kind:<9}{change:<8}{held.sum():>10}{mean:>10.2f} +- {half:4.2f}"
                         f"{lost:>10.2f} +- {around:4.2f}{100 * end:>15.0f} %")
    return lines


def draw_objects(path):
    """Every object of sim.py, drawn to the same scale in front of its family's name."""
    # of one name are sizes of the same shape
    families = {family: list({obj.name: obj for obj in objects}.values())
                for family, objects in sim.FAMILIES.items()}
    columns = max(map(len, families.values()))
    pictures = {family: np.array([portrait(obj) for obj in objects])
                for family, objects in families.items()}
    drawn = {family: (some < 250).any((0, 3)) for family, some in pictures.items()}
    left, right = reach(np.any(list(drawn.values()), 0).any(0))
    rows = {family: reach(seen.any(1)) for family, seen in drawn.items()}
    heights = [bottom - top for top, bottom in rows.values()]
    wide = 10 / (columns * (right - left))               # inches per pixel
    figure, axes = sim.subplots(
        len(families), columns, (10, wide * sum(heights)), layout=None, gridspec_kw=dict(
            wspace=0, hspace=0, left=0.05, right=1, top=1, bottom=0, height_ratios=heights))
    for axis in axes.flat:
        axis.axis("off")
    for row, (family, (top, bottom)) in zip(axes, rows.items()):
        row[0].axis("on")
        row[0].set(xticks=[], yticks=[])
        row[0].spines[:].set_visible(False)
        row[0].set_ylabel(family, fontsize=8)
        for axis, picture in zip(row, pictures[family]):
            axis.imshow(picture[top:bottom, left:right])
    sim.save_figure(figure, path)


def reach(seen, margin=8):
    """From where to where a (n,) bool is true, and a little further."""
    where = np.flatnonzero(seen)
    return max(where[0] - margin, 0), where[-1] + margin


def portrait(obj, size=320):
    """A picture (size, size, 3) of an object in the air."""
    spec = mujoco.MjSpec()
    spec.add_texture(
        name="sky", type=mujoco.mjtTexture.mjTEXTURE_SKYBOX, width=8, height=8,
        builtin=mujoco.mjtBuiltin.mjBUILTIN_FLAT, rgb1=(1, 1, 1), rgb2=(1, 1, 1))
    spec.visual.headlight.ambient = spec.visual.headlight.diffuse = (0.5, 0.5, 0.5)
    sim.add_parts(spec.worldbody, obj)
    model = spec.compile()
    data, camera = mujoco.MjData(model), mujoco.MjvCamera()
    camera.distance, camera.azimuth, camera.elevation = 0.25 * H.SCALE, 130, -25
    mujoco.mj_forward(model, data)
    with mujoco.Renderer(model, size, size) as renderer:
        renderer.update_scene(data, camera)
        renderer.scene.flags[mujoco.mjtRndFlag.mjRND_HAZE] = 0
        return renderer.render()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = parser.add_mutually_exclusive_group(required=True)
    tables.add_argument("--errors", nargs="+", type=Path, help="table.json files of fit_ndm.py")
    tables.add_argument("--gaps", nargs="+", type=Path, help="files of deploy.py --compare --json")
    tables.add_argument("--steer", action="store_true", help="change axis and wrist on the way")
    tables.add_argument("--objects", type=Path, help="a picture of all objects")
    parser.add_argument("--port", default="sim:0")
    parser.add_argument("--policy", type=Path, default=Path("checkpoints/policy.pt"))
    parser.add_argument("--residual", type=Path, default=Path("checkpoints/residual.pt"))
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    if args.objects:
        draw_objects(args.objects)
    if args.steer:
        print("\n".join(steering_table(args)))
    if args.errors:
        print(errors_table(args.errors))
    if args.gaps:
        reports, picture = read_gaps(args.gaps), args.gaps[0].with_name("gap.png")
        print("\n".join(gap_table(reports)))
        draw_gaps(reports, picture)
        print(f"bars in {picture}")


if __name__ == "__main__":
    H.run(main)
