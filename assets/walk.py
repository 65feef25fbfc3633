"""Walk through the maze that a causal network dreams, in a terminal.

    python train.py --causal --actions         a few minutes on a laptop's CPU
    python assets/walk.py runs/maze            arrow keys turn left and right, q leaves

Every frame is drawn when it is needed, under the turn of the key that is down. Standard library and the run
alone; the terminal needs 24-bit colours. An .mp4 of the walk stays beside the checkpoint.
"""

import argparse
import os
import select
import shutil
import sys
import termios
import time
import tty
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
import vdm_ssm

TURN, HOLD = 0.3, 0.35  # radians a frame, as in a bend of the maze; seconds a key counts as held: it repeats


def turns(keys):
    """What the keyboard says, frame after frame, until q.    -> yields (1, 1), the turn to the left times 10"""
    turn, until = 0.0, 0.0
    while True:
        while select.select([keys], [], [], 0)[0]:
            pressed = os.read(keys, 64)
            if b"q" in pressed or b"\x03" in pressed or not pressed:
                return
            for code, way in ((b"\x1b[D", TURN), (b"\x1b[C", -TURN), (b"\x1b[A", 0.0)):
                if code in pressed:
                    turn, until = way, time.time() + HOLD
        yield torch.tensor([[10 * turn if time.time() < until else 0.0]])


def half_blocks(picture):
    """A picture as text: a character shows two pixels, one above the other.    uint8 (h, w, 3) -> str"""
    columns, rows = shutil.get_terminal_size()
    scale = max(1, min(columns // picture.shape[1], 2 * (rows - 1) // picture.shape[0]))
    picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    colour = lambda place, rgb: "\x1b[{};2;{};{};{}m".format(place, *rgb)
    lines = ("".join(colour(38, top) + colour(48, low) + "\u2580" for top, low in zip(*pair)) + "\x1b[0m"
             for pair in zip(picture[::2], picture[1::2]))  # fmt: skip
    return "\x1b[H" + "\r\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description="Walk through a maze that a causal network dreams.")
    parser.add_argument("run", help="folder of a run of train.py --causal --actions, or a checkpoint")
    parser.add_argument("--steps", type=int, default=5, help="denoising steps of a frame")
    options = parser.parse_args()
    checkpoint = train.load_checkpoint(options.run)
    if not checkpoint["args"].get("actions") or checkpoint["args"]["data"] != "maze":
        parser.error(f"{options.run} knows no turns: train one by python train.py --causal --actions")
    net = getattr(vdm_ssm, checkpoint["network"])(**checkpoint["network_args"]).requires_grad_(False)
    net.load_state_dict(checkpoint["ema"])
    diffusion, size = vdm_ssm.GaussianDiffusion(net, **checkpoint["diffusion_args"]), checkpoint["args"]["size"]
    draw = lambda: torch.randn(1, 3, 1, size, size)
    keys, path = sys.stdin.fileno(), checkpoint["folder"] / "walk.mp4"
    before, began, frames = termios.tcgetattr(keys), time.time(), 0
    with train.film(path, fps=8) as write:
        try:
            tty.setcbreak(keys)
            print("\x1b[2J\x1b[?25l", end="")
            for x in vdm_ssm.stream(diffusion, draw, cond=turns(keys), steps=options.steps):
                picture, frames = train.to_pixels(x)[0, 0].numpy(), frames + 1
                write(picture[None])
                print(half_blocks(picture), f"\r\n{frames / (time.time() - began):.1f} frames/s, q leaves",
                      end="", flush=True)  # fmt: skip
        finally:
            termios.tcsetattr(keys, termios.TCSADRAIN, before)
            print("\x1b[?25h\x1b[2J\x1b[H", end="")
    print(f"{frames} frames are in {path}")


if __name__ == "__main__":
    main()
