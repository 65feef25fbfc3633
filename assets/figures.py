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
plt.rcParams |= {"font.size": 8, "axes.titlesize": 8, "legend.frameon": False, "savefig.dpi": 130,
                 "savefig.bbox": "tight", "axes.spines.top": False, "axes.spines.right": False}  # fmt: skip
LAYERS = "attention", "linear-attention", "bi-s4d", "bi-mamba", "s4d", "mamba"
COLOURS = dict(zip(LAYERS, plt.get_cmap("Paired").colors[1::2]))
results = lambda name: json.loads((HERE / "results" / f"{name}.json").read_text())
look = lambda name, line: dict(ls=line, color=COLOURS.get(re.split("[+,]", name)[0], "grey"), label=name)


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

    level = ["5  ResBlock, twice, step t\n(b c f h w) to c'", "5  attention over space\n(b f) (h w) c'",
             "4  temporal layer\n(b h w) f c'", "5  half height, width\n(b c' f h/2 w/2)"]  # fmt: skip
    for i, text in enumerate(level):
        box(1, 27 - 8 * i, text, "#f7e6c8" if i == 2 else "#e8eef7", width=22)
        if i:
            arrow((12, 35 - 8 * i), (12, 32.2 - 8 * i))
    axis.text(1, 33, "6  a level of the U-Net", weight="bold")
    axis.text(31, 33, "4  the temporal layer bi-mamba, of a pixel: x + layer(norm(x))", weight="bold")
    for x, y, text in ((40, 14.2, "u"), (39.5, 10, "z"), (73, 1, "numbers: sections of vdm_ssm.py")):
        axis.text(x, y, text, fontsize=7, color="#555")
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
    for name in (*LAYERS[:4], "bi-s4d+recompute", "bi-mamba+recompute"):
        points = [(int(f), row[name]) for f, row in found.items() if name in row]
        for axis, value in zip(axes, (lambda x: x["peak"] / 2**30, lambda x: np.median(x["seconds"]))):
            line = look(name, "-:"["+" in name])
            axis.loglog([f for f, _ in points], [value(x) for _, x in points], marker=".", **line)
    axes[0].axhline(139.8, color="black", lw=0.8, label="memory of the GPU")
    for axis, what in zip(axes, ("GiB, peak of a training step", "seconds of a training step")):
        axis.set(xlabel="frames", ylabel=what, xticks=[8, 32, 128, 512], xticklabels=[8, 32, 128, 512])
    axes[0].legend(loc="center left", bbox_to_anchor=(2.25, 0.5))
    figure.savefig(HERE / "memory.png")


def quality():
    """Held-out loss of runs of equal memory against steps and time, the mean of their seeds."""
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.6), sharey="row", layout="constrained")
    for frames, pair in zip((16, 64), axes.reshape(2, 2)):
        found = results(f"quality-{frames}")
        for name in (name for name in LAYERS if f"{name} seed 0" in found):
            readings = [row["readings"] for key, row in found.items() if key.startswith(f"{name} seed")]
            count = min(map(len, readings)) - 1  # the last one is where the time was over
            steps, seconds, loss = np.mean([[*r[:count], r[-1]] for r in readings], axis=0).T
            for axis, x, what in zip(pair, (steps, seconds), ("steps", "seconds of one core")):
                axis.plot(x, loss, marker=".", **look(name, "-" if "bi-" in name else "--"))
                axis.set(xlabel=what, title=f"{frames} frames")
    axes[0].set(ylabel="held-out loss")
    axes[0].legend()
    figure.savefig(HERE / "quality.png")


def long():
    """How long videos keep the style of their walls, and how a stream's pixels look, beside real walks."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 2.6), layout="constrained")
    windows = "attention, windows of 16", "bi-mamba, windows of 16"
    for name in ("real", "mamba, a stream", *windows, "frames of all mixed"):
        kept = np.array(results("distance")[name]["kept"][8:]).reshape(-1, 8).mean(1)
        axes[0].plot(12 + 8 * np.arange(len(kept)), kept, **look(name, "-" if "," in name else ":"))
    axes[0].set(xlabel="frame", ylabel="share with the style of frame 8", ylim=(0, 1.05))
    one = results("streams")["one stream of 5,000 frames"]
    real = np.mean(one["real"][np.argmax(one["style"][1:]) :: 3], axis=0)  # walks of its style
    looks = np.array(one["look"]) / real
    axes[1].plot(100 * np.arange(1, len(looks) + 1), looks, label=["mean", "spread", "contrast"])
    axes[1].set(xlabel="frame of a stream", ylabel="stream / real walks", ylim=(0.9, 1.15))
    for axis in axes:
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
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
