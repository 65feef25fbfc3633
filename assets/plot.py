"""Curves of runs side by side: loss, norm of the gradient, learning rate, and speed.

    python assets/plot.py runs/maze runs/maze-2 --out curves.png

They are read from each run's log.jsonl. Needs matplotlib: pip install matplotlib
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import numpy as np

try:
    from matplotlib import pyplot
except ImportError:
    sys.exit("plot.py draws with matplotlib: pip install matplotlib")


def read_log(run):
    """Lines of a run's log, but for one that a kill left half-written.    -> list of dict"""
    lines = []
    for line in Path(run, "log.jsonl").read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines or sys.exit(f"plot.py: {run} has logged no step yet: wait for it, or leave it out")


def smooth(values, width):
    """Running mean over `width` values, fewer at the ends, that leaves out nan.    (n) -> (n)"""
    total, count = (np.convolve(x, np.ones(width))[width // 2 :][: len(x)]
                    for x in (np.nan_to_num(values), np.isfinite(values)))  # fmt: skip
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", metavar="FILE", help="picture to write (default RUN/curves.png)")
    args = parser.parse_args()
    logs = [read_log(run) for run in args.runs]
    pyplot.switch_backend("agg")  # no window
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    for axis, key in zip(axes.flat, ("loss", "grad_norm", "lr", "videos_per_second")):
        for i, (run, log) in enumerate(zip(args.runs, logs)):
            steps, values = [line["step"] for line in log], np.array([line[key] for line in log], float)
            axis.plot(steps, values, color=f"C{i}", alpha=0.25, linewidth=0.7)
            axis.plot(steps, smooth(values, 1 + len(log) // 50), color=f"C{i}", label=run)
        axis.set(title=key, xlabel="step", yscale="log" if key in ("loss", "grad_norm") else "linear")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    out = args.out or Path(args.runs[0], "curves.png")
    figure.savefig(out, dpi=120)
    print(f"wrote {out}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"plot.py: {error.filename}: {error.strerror}; give folders that exist")
