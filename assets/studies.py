"""What the papers claim, and what streams do, measured.    python assets/studies.py NAME [--run RUN]

    memory      training steps of the 14.1M U-Net of 8 to 1,024 frames: bytes, and on a GPU seconds
    quality     of temporal layers that fill about the same memory: held-out loss and FD-random of runs of equal
                time; with clips of 16 frames also of layers of one way, and of blocks around the core (--frames)
    distance    how long samples of runs/maze, attention, causal, far longer than clips, keep a style of walls
    streams     5,000 frames of RUN, runs/causal, and 64 streams: drift, style, distance from real walks, time
    actions     how well streams of RUN, a run with --actions, follow the turns they are told
    frames      pictures for the README: walks, samples of runs/maze, streams of RUN

A row is written to assets/results as it is measured, and not measured again: delete the file for that."""

import argparse
import itertools
import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

import bench
import fvd
import train
import vdm_ssm

FRAMES = 8, 16, 32, 64, 128, 256, 512, 1024
LAYERS = "bi-mamba", "attention", "bi-s4d", "linear-attention", "mamba", "s4d"
VARIANTS = "attention-explicit", *LAYERS[:4], "bi-s4d+recompute", "bi-mamba+recompute"


class Results(dict):
    """The rows of a study, written to its file after each."""

    def __init__(self, name):
        self.path = HERE / "results" / f"{name}.json"
        self.update(json.loads(self.path.read_text()) if self.path.exists() else {})

    def row(self, key, compute):
        if key not in self:
            gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
            self["made with"] = dict(torch=torch.__version__, machine=f"{os.cpu_count()} cores, {gpu}",
                                     threads=torch.get_num_threads(), command=" ".join(["python", *sys.argv]))
            self[key] = compute()
            print(key, self[key] if len(str(self[key])) < 200 else "...", flush=True)
            with train.whole(self.path) as file:
                file.write(json.dumps(self, indent=1).encode())
        return self[key]


def memory(results, options):
    for f in FRAMES:
        if torch.cuda.is_available():
            calls = lambda: {variant: bench.training_step(variant, f, device="cuda") for variant in VARIANTS}
            results.row(f"{f}", lambda: bench.time_in_turns(calls(), 3 if f < 512 else 1, "cuda"))
        for variant in () if torch.cuda.is_available() else VARIANTS:
            results.row(f"bytes {variant} {f}", lambda: bench.step_bytes(variant, f, fake=True))


def style_of(frames):
    """The style of the walls in each frame, -1 for none.    uint8 (..., h, w, 3) -> int (...)"""
    hues = np.array([np.mean(tones, 0) for tones in train.TONES] + [train.SKY])
    hues = hues - hues.mean(1, keepdims=True)
    colour = frames - np.mean(frames, -1, keepdims=True, dtype=np.float32)  # without its grey
    score = colour @ (hues / np.linalg.norm(hues, axis=1, keepdims=True)).T.astype(np.float32)
    nearest = np.where(score.max(-1) > 15, score.argmax(-1), -1)
    share = np.stack([(nearest == style).mean((-2, -1)) for style in range(3)], -1)
    return np.where(share.max(-1) > 0.02, share.argmax(-1), -1)


def look(frames):
    """Mean, spread and contrast of neighbours of the pixels.    uint8 (..., h, w, 3) -> three floats"""
    x = np.asarray(frames, np.float32)
    edges = abs(np.diff(x, axis=-2)).mean() + abs(np.diff(x, axis=-3)).mean()
    return [round(float(value), 2) for value in (x.mean(), x.std(), edges / 2)]


# Real walks that no run has seen, uint8 (count, frames, 16, 16, 3), and their turns, (count, frames).
seeds = lambda first, count: [train.maze_seed("test", i) for i in range(first, first + count)]
walks = lambda first, count, f: np.stack([train.maze_video(seed, f, 16) for seed in seeds(first, count)])
turns = lambda first, count, f: np.stack([train.maze_turns(seed, f) for seed in seeds(first, count)])
clips = lambda videos: torch.stack([*map(train.to_model_range, videos)])  # as a network sees them


def drawn(run, count, frames, past=None, actions=None):
    """Videos as `train.py sample RUN` draws them, piece by piece.    -> yields uint8 (count, k, h, w, 3)"""
    args, checkpoint = train.parse(f"sample {run} --frames {frames} --device cpu".split())
    model = train.build(args)[2].requires_grad_(False).to(memory_format=torch.channels_last)
    model.load_state_dict(checkpoint["ema"])
    for x in train.pieces(model, args, range(count), past, actions):
        yield train.to_pixels(x).numpy()


at_once = lambda *args, **options: np.concatenate([*drawn(*args, **options)], axis=1)


SECONDS = 240  # of one core, for each run
COUNT = 256  # held-out walks for the loss, and videos for FD-random
BLOCKS = "bi-s4d-glu", "bi-s4d-mlp", "bi-s4d-gated", "bi-s4d-mamba", "bi-s6-glu", "bi-s6-mlp", "bi-s6-gated"


def network(layer, frames, dim, seed=0):
    """A run's arguments, and its network. A step of training sees 32 frames or one clip."""
    told = f"--temporal {layer} --frames {frames} --batch {max(1, 32 // frames)} --dim {dim} --seed {seed}"
    args, _ = train.parse([*told.split(), "--device", "cpu"])
    args.channels, args.classes, args.action_dim = 3, [], 0
    torch.manual_seed(seed)
    return args, train.build(args)[2]


def width(layer, frames, dim=32):
    """The width at which a step takes about as much memory as bi-mamba's.    -> dim, MiB, bi-mamba's MiB"""
    def count(layer, dim):
        with bench.FakeTensorMode():
            args, net = network(layer, frames, dim)
            x = torch.empty(args.batch, 3, frames, args.size, args.size)
            return bench.peak_bytes(lambda: vdm_ssm.GaussianDiffusion(net).loss(x).backward()) / 2**20

    wanted, counts = count("bi-mamba", dim), [(d, count(layer, d)) for d in (16, 24, 32, 40)]
    return *min(counts, key=lambda found: abs(found[1] - wanted)), wanted


def learn(layer, frames, dim, seed):
    """Train for a fixed time.    -> diffusion with the averaged weights, [[step, seconds, held-out loss]]"""
    args, net = network(layer, frames, dim, seed)
    mix = lambda old, new, k: train.get_ema_multi_avg_fn(min(args.ema, (1 + k) / (10 + k)))(old, new, k)
    average = train.AveragedModel(net, multi_avg_fn=mix)
    optimizer, data = torch.optim.Adam(net.parameters(), args.lr, fused=True), train.videos_of(args)
    diffusion, averaged = (vdm_ssm.GaussianDiffusion(m, target="v") for m in (net, average.module))
    held = clips(walks(0, COUNT, frames)).split(args.batch)
    readings, spent, step = [], 0.0, 0
    while spent < SECONDS:
        began, step = time.process_time(), step + 1
        items = range((step - 1) * args.batch, step * args.batch)
        x0 = torch.stack([data[i][0] for i in items])
        t, eps, _ = train.draw(items, x0.shape[1:], args)
        optimizer.param_groups[0]["lr"] = args.lr * min(1, step / args.warmup)
        diffusion.loss(x0, t, eps).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(net)
        spent += time.process_time() - began
        if step in (100, 200, 400, 800) or spent >= SECONDS:
            with torch.no_grad():
                torch.manual_seed(1)  # the same levels and noise for all
                losses = [averaged.loss(x, torch.randint(256, (len(x), frames))) for x in held]
            readings.append([step, round(spent, 1), torch.stack(losses).mean().item()])
    return averaged, readings


def quality(results, options):
    frames = options.frames
    torch.set_num_threads(1)  # so that time on a core is time, whatever else runs
    features = lambda videos: fvd.video_features(videos[:, -16:], fvd.random_i3d())  # of the last 16 frames
    real, others = (features(walks(first, COUNT, frames)) for first in (1000, 2000))
    results.row("FD-random of other walks", lambda: fvd.frechet_distance(real, others))
    layers, blocks = (LAYERS, BLOCKS) if frames == 16 else (LAYERS[:4], ())  # the four that go both ways
    for seed, layer in [*itertools.product((0, 1), layers), *((0, block) for block in blocks)]:
        like = layer if layer in LAYERS[:4] else f"bi-{layer}" if layer in LAYERS else "bi-mamba"
        dim, *mib = results.row(f"width {like}", lambda: width(like, frames))

        def run():
            diffusion, readings = learn(layer, frames, dim, seed)
            row = dict(dim=dim, readings=readings, weights=sum(p.numel() for p in diffusion.parameters()))
            if layer in LAYERS:
                torch.manual_seed(2)
                noise = torch.randn(COUNT, 3, frames, 16, 16).split(max(1, 64 // frames))
                videos = torch.cat([diffusion.sample(x, 10, vdm_ssm.dpm_solver) for x in noise])
                row["fd_random"] = fvd.frechet_distance(real, features(train.to_pixels(videos)))
            return row

        results.row(f"{layer} seed {seed}", run)


# ---- Long-range consistency
#
# The walls of a walk have one style. kept: share of videos whose walls at frame k have the style of frame 8.
# new: how far, in values of pixels, a frame is from the nearest of those at least 16 frames before it.

RUNS = {"bi-mamba, windows of 16": "runs/maze --sampler dpm --sample-steps 10",
        "attention, windows of 16": "runs/attention --sampler dpm --sample-steps 10",
        "mamba, a stream": "runs/causal"}  # fmt: skip


def consistency(videos):
    """uint8 (n, f, h, w, 3) -> kept, of each frame, and new, the mean over the second half"""
    style, x = style_of(videos), videos.astype(np.float32)
    half = range(x.shape[1] // 2, x.shape[1])
    nearest = [abs(x[:, : k - 15] - x[:, k : k + 1]).mean((2, 3, 4)).min(1) for k in half]
    kept = (style == style[:, 8:9]) & (style >= 0)
    return dict(kept=kept.mean(0).tolist(), new=float(np.mean(nearest)))


def distance(results, options, count=12, frames=128):
    real = walks(0, count, frames)
    mixed = np.random.default_rng(0).permuted(np.repeat(np.arange(count)[:, None], frames, 1), axis=0)
    swapped = np.concatenate([real[:, : frames // 2], np.roll(real, 1, axis=0)[:, frames // 2 :]], axis=1)
    known = {"real": real, "frames of all mixed": real[mixed, np.arange(frames)],
             "another walk from the middle": swapped, "16 frames repeated": real[:, np.arange(frames) % 16]}
    for name, videos in known.items():
        results.row(name, lambda: consistency(videos))
    for name, told in RUNS.items():
        results.row(name, lambda: consistency(at_once(told, count, frames)))


def one_long_stream(run, total=5000):
    """-> look of each 100 frames, styles, seconds and memory of a stream, beside a real walk's look"""
    frames, times, mib = np.empty((total, 16, 16, 3), np.uint8), [time.perf_counter()], []
    for k, frame in enumerate(drawn(run, 1, total)):
        frames[k] = frame[0, 0]
        times.append(time.perf_counter())
        mib.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    seconds = np.diff(times)
    return dict(look=[look(part) for part in np.split(frames, total // 100)],
                real=[look(walk) for walk in walks(0, 9, total // 9)],
                style=np.bincount(style_of(frames) + 1, minlength=4).tolist(),
                seconds_first_500=seconds[10:510].mean(), seconds_last_500=seconds[-500:].mean(),
                mib_at_100=mib[99], mib_at_end=mib[-1])  # fmt: skip


def many_streams(run, count=64, frames=96):
    """-> share of streams with the style of frame 8 at each later one, FD-random of first and last frames"""
    videos, real, net = at_once(run, count, frames), walks(0, 2 * count, 16), fvd.random_i3d()
    style, (first, *sets) = style_of(videos), (real[:count], real[count:], videos[:, :16], videos[:, -16:])
    features = fvd.video_features(first, net)
    distance = [fvd.frechet_distance(features, fvd.video_features(clips, net)) for clips in sets]
    return dict(zip(("fd_real", "fd_first_16", "fd_last_16"), distance), count=count, frames=frames,
                style_kept=(style == style[:, 8:9]).mean(0).tolist(),
                look_first=look(sets[1]), look_last=look(sets[2]), look_real=look(real))  # fmt: skip


def streams(results, options):
    results.row("one stream of 5,000 frames", lambda: one_long_stream(options.run))
    results.row("64 streams", lambda: many_streams(options.run))


def pairs(videos):
    """Frames and those before them.    uint8 (n, f, h, w, 3) -> (n (f - 1), 6, h, w) in [-1, 1]"""
    x = clips(videos).transpose(1, 2)
    return torch.cat([x[:, :-1], x[:, 1:]], dim=2).flatten(0, 1)


def regressor(steps=1500):
    """A network that reads the turn off two frames, trained on real walks.    -> module"""
    torch.manual_seed(0)
    conv = lambda c, c_out: [torch.nn.Conv2d(c, c_out, 3, 2, 1), torch.nn.SiLU()]
    net = torch.nn.Sequential(*conv(6, 32), *conv(32, 64), torch.nn.Flatten(), torch.nn.Linear(1024, 128),
                              torch.nn.SiLU(), torch.nn.Linear(128, 1), torch.nn.Flatten(0))  # fmt: skip
    x, turn = pairs(walks(1000, 600, 33)), torch.from_numpy(turns(1000, 600, 33)[:, 1:]).flatten()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for step in range(steps):
        part = torch.randint(len(x), (128,))
        (net(x[part]) - turn[part]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net.requires_grad_(False)


def actions(results, options):
    net = regressor()

    def follow(videos, told):
        """The correlation of the turns that are told and seen."""
        return float(np.corrcoef(net(pairs(videos)), told[:, 1:].flatten())[0, 1])

    real, led = (2000, 50, 33), (5000, 8, 200)
    results.row("50 real walks of 33 frames", lambda: follow(walks(*real), turns(*real)))
    streamed = at_once(options.run, *led[1:], actions=10 * turns(*led)[..., None])
    results.row("8 streams of 200 frames", lambda: follow(streamed, turns(*led)))
    for k in range(len(streamed)):
        results.row(f"stream {k}", lambda: follow(streamed[k : k + 1], turns(*led)[k : k + 1]))


def frames(results, options, count=4, length=32):
    steps = lambda run: f"{train.load_checkpoint(run)['step']} steps"
    after = at_once("runs/maze", count, length - 8, past=clips(walks(100, count, 8)))
    np.savez_compressed(HERE / "results/frames.npz", data=walks(0, count, length),
                        samples=at_once("runs/maze --past 0", count, length),
                        continued=np.concatenate([walks(100, count, 8), after], axis=1),
                        stream=at_once(options.run, count, 100 + length)[:, 100:],
                        captions=["data", f"samples, {steps('runs/maze')}", "8 real frames, then samples",
                                  f"streams after 100 frames, {steps(options.run)}"])  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(None, None, __doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("name", choices=("memory", "quality", "distance", "streams", "actions", "frames"))
    parser.add_argument("--run", help="a causal run, by default runs/causal, for actions runs/walk")
    parser.add_argument("--frames", type=int, choices=(16, 64), default=16, help="of a clip, for quality")
    options = parser.parse_args()
    options.run = options.run or ("runs/walk" if options.name == "actions" else "runs/causal")
    part = dict(quality=f"-{options.frames}", memory="-cuda" * torch.cuda.is_available())
    globals()[options.name](Results(options.name + part.get(options.name, "")), options)
