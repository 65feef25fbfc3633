"""Walk through the maze that a causal network dreams, in a terminal.

    python train.py --causal --actions --out runs/walk
    python assets/walk.py runs/walk            arrow keys turn left and right, q leaves

Frames are drawn as they are needed, in 24-bit colours. walk.mp4 stays beside the checkpoint."""

import argparse
import os
import select
import shutil
import sys
import termios
import time
import tty
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
import vdm_ssm

TURN, HOLD = 0.25, 0.4  # radians a frame, as in a bend; seconds that a key counts as held: it repeats


def turns(keys, turn=0.0, until=0.0):
    """What the keyboard says, until q.    -> yields (1, 1), the turn to the left in tenths of a radian"""
    while True:
        while select.select([keys], [], [], 0)[0]:
            pressed = os.read(keys, 64)
            if b"q" in pressed or not pressed:
                return
            turn, until = -TURN if b"\x1b[C" in pressed else TURN, time.time() + HOLD
        yield torch.tensor([[10 * turn if time.time() < until else 0.0]])


def half_blocks(picture):
    """A picture as text: a character is two pixels, one above the other.    uint8 (h, w, 3) -> str"""
    columns, rows = shutil.get_terminal_size()
    scale = max(1, min(columns // picture.shape[1], 2 * (rows - 1) // picture.shape[0]))
    picture = picture.repeat(scale, axis=0).repeat(scale, axis=1).tolist()
    colour = lambda place, rgb: "\x1b[{};2;{};{};{}m".format(place, *rgb)
    cell = lambda top, low: colour(38, top) + colour(48, low) + "\u2580"
    pairs = zip(picture[::2], picture[1::2])
    return "\x1b[H" + "".join("".join(map(cell, *pair)) + "\x1b[0m\n" for pair in pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="folder of a run of train.py --causal --actions, or a checkpoint in it")
    checkpoint = train.load_checkpoint(parser.parse_args().run)
    if checkpoint["args"]["data"] != "maze" or not checkpoint["args"]["actions"] or not sys.stdin.isatty():
        parser.error("wanted are a terminal and a run of python train.py --causal --actions")
    net = getattr(vdm_ssm, checkpoint["network"])(**checkpoint["network_args"]).requires_grad_(False)
    net.load_state_dict(checkpoint["ema"])
    diffusion = vdm_ssm.GaussianDiffusion(net, **checkpoint["diffusion_args"])
    size, path, keys = checkpoint["args"]["size"], checkpoint["folder"] / "walk.mp4", sys.stdin.fileno()
    walk = vdm_ssm.stream(diffusion, partial(torch.randn, 1, 3, 1, size, size), None, turns(keys))
    before, began, frames = termios.tcgetattr(keys), time.time(), 0
    with train.film(path, fps=8) as append, suppress(KeyboardInterrupt):
        try:
            tty.setcbreak(keys)
            print("\x1b[2J\x1b[?25l", end="")
            for frames, x in enumerate(walk, 1):
                picture = train.to_pixels(x).numpy()
                append(picture)
                print(f"{half_blocks(picture[0, 0])}{frames / (time.time() - began):.1f} frames/s, q leaves")
        finally:
            termios.tcsetattr(keys, termios.TCSADRAIN, before)
            print("\x1b[?25h\x1b[2J\x1b[H", end="")
    print(f"{frames} frames are in {path}")


if __name__ == "__main__":
    main()
