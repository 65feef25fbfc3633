"""Draws the README's figures from assets/results, with matplotlib.    python assets/figures.py [NAME ...]"""

import json
import re
import sys
from pathlib import Path

import imageio.v3 as iio
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).resolve().parent
plt.rcParams |= {"font.size": 9, "axes.titlesize": 8, "legend.fontsize": 7, "legend.frameon": False,
                 "savefig.dpi": 130, "savefig.bbox": "tight", "axes.spines.top": False, "axes.spines.right": False}
OUTSIDE = dict(loc="center left", bbox_to_anchor=(1, 0.5))


def results(name):
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def method():
    """A level of the U-Net, and the Mamba block in its temporal layer."""
    figure, axis = plt.subplots(figsize=(9.5, 3.4))
    axis.set(xlim=(0, 96), ylim=(1, 34))
    axis.axis("off")

    def box(x, y, text, colour="#e8eef7", width=15, height=5):
        axis.add_patch(plt.Rectangle((x, y), width, height, facecolor=colour, edgecolor="#345"))
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8)

    def arrow(*points):
        for a, b in zip(points, points[1:-1]):
            axis.plot(*zip(a, b), color="#345", linewidth=0.9)
        axis.annotate("", points[-1], points[-2], arrowprops=dict(arrowstyle="->", color="#345"))

    level = ["5  ResBlock, twice\n(b c f h w), step t", "5  attention over space\n(b f) (h w) c",
             "4  temporal layer\n(b h w) f c", "5  half height, width\n(b c' f h/2 w/2)"]  # fmt: skip
    for i, text in enumerate(level):
        box(1, 27 - 8 * i, text, "#f7e6c8" if i == 2 else "#e8eef7", width=22)
        if i:
            arrow((12, 35 - 8 * i), (12, 32.2 - 8 * i))
    axis.text(1, 33, "6  a level of the U-Net", weight="bold")
    axis.text(31, 33, "4  the temporal layer bi-mamba: a pixel's frames, both ways", weight="bold")
    arrow((23, 13.5), (31, 13.5))
    box(31, 11, "in_proj", width=8)
    for y, way in ((21, "frame by frame, forward"), (11, "the same on reversed frames")):
        box(46, y, "convolution, SiLU", width=15)
        box(65, y, "2  S6", "#f7e6c8", width=8)
        arrow((39, 13.5), (42.5, 13.5), (42.5, y + 2.5), (46, y + 2.5))
        arrow((61, y + 2.5), (65, y + 2.5))
        axis.text(46, y + 5.6, way, fontsize=7, color="#555")
        arrow((73, y + 2.5), (78.5, y + 2.5), (78.5, 19 if y > 15 else 17.4))
    axis.text(78.5, 18.1, "+", ha="center", va="center", fontsize=14)
    box(46, 3, "SiLU(z)", width=15)
    arrow((39, 12.5), (41, 12.5), (41, 5.5), (46, 5.5))
    arrow((61, 5.5), (84, 5.5), (84, 16.6))
    arrow((79.8, 18.1), (82.6, 18.1))
    axis.text(84, 18.1, "x", ha="center", va="center", fontsize=12)
    arrow((85.2, 18.1), (87, 18.1))
    box(87, 15.6, "out_proj", width=8)
    figure.savefig(HERE / "method.png")


def memory():
    """Bytes and seconds of a training step on a GPU against the number of frames."""
    found = results("memory-cuda")
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.2))
    for name, colour in zip(found["8"], plt.get_cmap("tab10").colors):
        points = [(int(f), row[name]) for f, row in found.items() if name in row]
        style = dict(color=colour, marker="o", linestyle="--" if "+" in name else "-", ms=3, label=name)
        axes[0].loglog(*zip(*((f, row["peak"] / 2**30) for f, row in points)), **style)
        axes[1].loglog(*zip(*((f, np.median(row["seconds"])) for f, row in points)), **style)
    axes[0].axhline(139.8, color="grey", linewidth=0.7, linestyle=":")  # what the GPU has
    axes[0].set(xlabel="frames", ylabel="GiB, peak of a training step")
    axes[1].set(xlabel="frames", ylabel="seconds of a training step")
    axes[1].legend(**OUTSIDE)
    figure.savefig(HERE / "memory.png")


def quality():
    """Held-out loss of runs of equal memory against steps and time, the mean of their seeds."""
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.6), sharey="row", layout="constrained")
    for frames, pair in zip((16, 64), axes.reshape(2, 2)):
        runs = {}
        for key, row in results(f"quality-{frames}").items():
            if " seed " in key and "fd_random" in row:
                runs.setdefault(key.split()[0], []).append(np.array(row["readings"]))
        for name, readings in runs.items():
            count = min(map(len, readings)) - 1  # the last one is where the time was over
            steps, seconds, loss = np.mean([[*r[:count], r[-1]] for r in readings], axis=0).T
            for axis, x, what in zip(pair, (steps, seconds), ("steps", "seconds of one core")):
                axis.plot(x, loss, "o-" if "bi-" in name else "o--", ms=3, label=name)
                axis.set(xlabel=what, title=f"{frames} frames")
    axes[0].set(ylabel="held-out loss")
    axes[0].legend()
    figure.savefig(HERE / "quality.png")


def long():
    """How long videos keep the style of their walls, and how a stream's pixels look, beside real walks."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 2.6), layout="constrained")
    for name, row in results("distance").items():
        if name != "made with":
            kept = np.array(row["kept"][8:]).reshape(-1, 8).mean(1)
            axes[0].plot(12 + 8 * np.arange(len(kept)), kept, "-" if "," in name else ":", label=name)
    axes[0].set(xlabel="frame", ylabel="share with the style of frame 8", ylim=(0, 1.05))
    one = results("streams")["one stream of 5,000 frames"]
    real = np.mean(one["real"][np.argmax(one["style"][1:]) :: 3], axis=0)  # walks of its style
    lines = axes[1].plot(100 * np.arange(1, len(one["look"]) + 1), np.array(one["look"]) / real)
    axes[1].set(xlabel="frame of a stream", ylabel="stream / real walks", ylim=(0.8, 1.1))
    axes[0].legend(**OUTSIDE)
    axes[1].legend(lines, ("mean", "spread", "contrast"), **OUTSIDE)
    figure.savefig(HERE / "long.png")


def walk():
    """What walk.py showed in a terminal, of two pixels a character, while the left arrow was held."""
    screens = (HERE / "results/walk.txt").read_text().split("\x1b[H")[1:]
    figure, axes = plt.subplots(1, len(screens), figsize=(9.5, 2.1))
    for axis, screen in zip(axes, screens):
        pixels = re.findall(r";2;(\d+);(\d+);(\d+)m", screen)  # upper, lower, upper, ...
        picture = np.array(pixels, np.uint8).reshape(screen.count("\u2580\x1b[0m\n"), -1, 2, 3)
        axis.imshow(picture.swapaxes(1, 2).reshape(2 * len(picture), -1, 3), interpolation="nearest")
        axis.set(xticks=[], yticks=[], xlabel=screen.splitlines()[-1])
    figure.savefig(HERE / "walk.png")


def maze():
    """A moving picture: walks of the data, samples and a stream, with captions."""
    found, pictures = np.load(HERE / "results/frames.npz"), []
    columns = [found[name] for name in ("data", "samples", "continued", "stream")]  # (4, f, h, w, 3) each
    for k in range(columns[0].shape[1]):
        figure, axes = plt.subplots(1, len(columns), figsize=(8.4, 2.5), layout="tight")
        for axis, column, caption in zip(axes, columns, found["captions"]):
            rows = [np.concatenate([*column[i : i + 2, k]], 1) for i in (0, 2)]
            axis.imshow(np.concatenate(rows, 0), interpolation="nearest")
            axis.set(title=caption, xlabel=f"frame {k}", xticks=[], yticks=[])
        figure.canvas.draw()
        pictures.append(np.asarray(figure.canvas.buffer_rgba())[..., :3].copy())
        plt.close(figure)
    iio.imwrite(HERE / "maze.gif", np.stack(pictures), duration=125, loop=0)


if __name__ == "__main__":
    for name in sys.argv[1:] or ("method", "memory", "quality", "long", "walk", "maze"):
        globals()[name]()
