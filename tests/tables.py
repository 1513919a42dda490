"""What is measured over many hands, as one table with the spread between hands.

    python tests/tables.py --gaps results/sim*.json       # of deploy.py --compare --json

--gaps prints how far every hand turns the object and how much of what is lost the residual
recovers, and draws bars (gap.png beside the first file).
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import hand as H
import sim

# Student's t, 97.5 %, for 1, 2, ... degrees of freedom
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23,
     2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09, 2.09)


def interval(values):
    """Mean and half width of the 95 % t interval of values (n,); nan with fewer than two."""
    values = np.asarray(values, float)
    n = len(values)
    if n < 2:
        return values.mean() if n else np.nan, np.nan
    t = T[n - 2] if n - 2 < len(T) else 2.0
    return values.mean(), t * values.std(ddof=1) / n ** 0.5


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
    mean, half = np.transpose([interval(column) for column in columns])
    return mean, [c.std(ddof=1) if len(c) > 1 else np.nan for c in columns], half


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
    plt = sim.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
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


def gaps(files):
    reports = read_gaps(files)
    print("\n".join(gap_table(reports)))
    picture = Path(files[0]).with_name("gap.png")
    draw_gaps(reports, picture)
    print(f"bars in {picture}")


# ----------------------------------------------------------------------------------- command line
def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gaps", nargs="+", type=Path, required=True,
                        help="files of deploy.py --compare --json, a hand each")
    args = parser.parse_args()
    gaps(args.gaps)


if __name__ == "__main__":
    H.run(main)
