"""What was measured on several hands as one table: means, and how far they are to be trusted.

    python tests/tables.py --errors runs/ndm*/table.json           # of fit_ndm.py: dynamics models
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import hand as H

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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = parser.add_mutually_exclusive_group(required=True)
    tables.add_argument("--errors", nargs="+", type=Path, help="table.json files of fit_ndm.py")
    args = parser.parse_args()
    if args.errors:
        print(errors_table(args.errors))


if __name__ == "__main__":
    H.run(main)
