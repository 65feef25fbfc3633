"""Runs on the maze side by side: loss on held-out walks of several lengths, scores by steps of sampling, and samples.

    python assets/compare.py runs/bi-mamba runs/bi-s4d runs/attention runs/linear-attention --frames 16 32 128
    python assets/compare.py runs/dim --steps 10 20 50 256

The loss is that of the averaged weights on 16 walks of the test seeds, each at a noise level of its own; walks and
noise are the same for all runs. A score is FD-random (see fvd.py) of --videos samples against as many walks. The sheet
has two rows per run, of the last length, with 16 frames evenly spaced in time.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from vdm_ssm import GaussianDiffusion

WALKS = 16


def network(run, **changes):
    """-> arguments of a run, some of them changed, and its network with the averaged weights"""
    checkpoint = train.load_checkpoint(run)
    args = argparse.Namespace(**checkpoint["args"] | changes)
    model = AveragedModel(train.make_model(args))
    model.load_state_dict(checkpoint["ema"])
    return args, model.module.eval()


@torch.no_grad()
def held_out_loss(args, model, frames):
    """Mean squared error of what the network predicts, on walks of some length -> float"""
    diffusion, losses = GaussianDiffusion(model, args.diffusion_steps, args.target), []
    for i in range(WALKS):
        x0 = train.to_model_range(train.maze_video(train.maze_seed("test", i), frames, args.size))[None]
        t = torch.tensor([(2 * i + 1) * args.diffusion_steps // (2 * WALKS)])
        losses.append(diffusion.losses(x0, t, train.randn(x0.shape[1:], train.generators(1, [i]))))
    return torch.cat(losses).mean().item()


def scores(args, model, samplers, steps):
    """-> yields sampler, number of steps, score; its real walks are those of the test seeds"""
    score = train.Score(args, train.Ranks("cpu"))
    for args.sampler in samplers:
        for args.sample_steps in steps:
            yield args.sampler, args.sample_steps, score(model)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--frames", nargs="+", type=int, help="lengths of the losses (default: as trained)")
    parser.add_argument("--steps", nargs="*", type=int, default=[], help="numbers of steps to score")
    parser.add_argument("--samplers", nargs="+", default=["ddim", "dpm"], help="samplers to score")
    parser.add_argument("--videos", type=int, default=64, help="samples of a score")
    parser.add_argument("--out", default="compare.png", help="sheet to write")
    options, rows = parser.parse_args(), []
    for run in options.runs:
        args, model = network(run, batch=2, sampler="dpm", sample_steps=20, eval_videos=options.videos)
        for frames in options.frames or [args.frames]:
            print(f"{run}: loss {held_out_loss(args, model, frames):.4f} at {frames} frames", flush=True)
        scored = scores(argparse.Namespace(**vars(args)), model, options.samplers, options.steps)
        for sampler, steps, value in scored if options.steps else ():
            print(f"{run}: FD-random {value:.4g} with {sampler}, {steps} steps, {options.videos} videos", flush=True)
        args.frames = (options.frames or [args.frames])[-1]
        rows.append(train.sample_videos(model, args, torch.device("cpu"), range(2)))
    train.write_sheet(Path(options.out), np.concatenate(rows))


if __name__ == "__main__":
    main()
