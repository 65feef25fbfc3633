"""What the papers claim, and what streams do, measured.    python assets/studies.py NAME [--run RUN]

    memory      a training step of the 14.1M U-Net against the number of frames: bytes and seconds
    quality     of temporal layers that fill the same memory, of one way and two, of blocks around the core:
                held-out loss and FD-random of runs of equal time, with clips of --frames frames
    distance    how long samples far longer than the clips of training keep the style of their walls
    streams     5,000 frames of a causal run, and 64 streams: drift, style, distance from real walks, time
    actions     how well streams of a run with --actions follow the turns they are told
    frames      pictures for the README: walks, samples of runs/maze, a stream of RUN

Each study writes assets/results/NAME.json, row by row: one that was stopped goes on where it was. Bytes are
counted from tensors, the same on every machine; seconds want a quiet one. figures.py draws the files."""

import argparse
import itertools
import json
import os
import platform
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
VARIANTS = ("attention-explicit", "attention", "linear-attention", "bi-s4d", "bi-mamba", "bi-s4d+recompute",
            "bi-mamba+recompute")  # fmt: skip


class Results(dict):
    """The rows of a study, written to its file after each."""

    def __init__(self, name):
        self.path = HERE / "results" / f"{name}.json"
        if self.path.exists():
            self.update(json.loads(self.path.read_text()))
        self["made with"] = dict(command=" ".join(["python", *sys.argv]), torch=torch.__version__,
                                 machine=f"{os.cpu_count()} cores, {platform.machine()}")  # fmt: skip

    def row(self, key, compute):
        if key not in self:
            self[key] = compute()
            print(key, self[key] if len(str(self[key])) < 200 else "...", flush=True)
            with train.whole(self.path) as file:
                file.write(json.dumps(self, indent=1).encode())
        return self[key]


# ---- Memory and time against frames


def memory(results, options):
    for f in FRAMES:
        for variant in VARIANTS:
            results.row(f"bytes {variant} {f}", lambda: bench.step_bytes(variant, f, fake=True))
    for variant in VARIANTS:  # counts without data are those with it
        results.row(f"bytes with data {variant} 16", lambda: bench.step_bytes(variant, 16))
    for f in FRAMES[:5]:  # up to 128, where attention takes half a minute
        calls = lambda: {variant: bench.training_step(variant, f) for variant in VARIANTS}
        rows = lambda: {v: float(np.median(r["seconds"])) for v, r in bench.time_in_turns(calls(), 3).items()}
        results.row(f"seconds {f}", rows)


# ---- What a picture of the maze tells


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


def walks(first, count, frames, size):
    """Real walks that no run has seen.    -> uint8 (count, frames, size, size, 3)"""
    seeds = (train.maze_seed("test", i) for i in range(first, first + count))
    return np.stack([train.maze_video(seed, frames, size) for seed in seeds])


def real_clips(first, count, frames, size=16):
    """The same as a network sees them.    -> (count, 3, frames, size, size) in [-1, 1]"""
    return torch.stack([train.to_model_range(video) for video in walks(first, count, frames, size)])


def drawn(run, count, frames, *flags, past=None, actions=None):
    """Videos as `train.py sample RUN` draws them, piece by piece.    -> yields uint8 (count, k, h, w, 3)"""
    args, checkpoint = train.parse(["sample", run, f"--frames={frames}", *flags])
    model = train.build(args)[2].requires_grad_(False).to(memory_format=torch.channels_last)
    model.load_state_dict(checkpoint["ema"])
    for x in train.pieces(model, args, torch.device("cpu"), range(count), past, actions):
        yield train.to_pixels(x).numpy()


def whole(*args, **options):
    """The same in one array."""
    return np.concatenate([*drawn(*args, **options)], axis=1)


# ---- Quality at equal memory

SECONDS = 240  # of one core, for each run
HELD_OUT, SCORED = {16: 64, 64: 32}, {16: 64, 64: 32}  # walks for the loss, videos for FD-random, by frames
LAYERS = "bi-mamba", "attention", "bi-s4d", "linear-attention", "mamba", "s4d"
BLOCKS = "bi-s4d-glu", "bi-s4d-mlp", "bi-s4d-gated", "bi-s4d-mamba", "bi-s6-glu", "bi-s6-mlp", "bi-s6-gated"


def network(layer, frames, dim, seed=0):
    """A run's arguments, and its network. A step of training sees 32 frames or one clip."""
    told = dict(temporal=layer, frames=frames, batch=max(1, 32 // frames), dim=dim, seed=seed)
    args = train.parse([f"--{key}={value}" for key, value in told.items()])[0]
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

    wanted, counts = count("bi-mamba", dim), {d: count(layer, d) for d in (16, 24, 32, 40)}
    best = min(counts, key=lambda d: abs(counts[d] - wanted))
    return best, counts[best], wanted


def learn(layer, frames, dim, seed):
    """Train for a fixed time at a constant rate.    -> the average of the weights, [[step, s, held-out loss]]"""
    args, net = network(layer, frames, dim, seed)
    mix = lambda old, new, k: train.get_ema_multi_avg_fn(min(args.ema, (1 + k) / (10 + k)))(old, new, k)
    average = train.AveragedModel(net, multi_avg_fn=mix)
    optimizer, data = torch.optim.Adam(net.parameters(), args.lr, fused=True), train.videos_of(args)
    diffusion, averaged = (vdm_ssm.GaussianDiffusion(m, args.diffusion_steps, "v") for m in (net, average.module))
    held = real_clips(0, HELD_OUT[frames], frames).split(args.batch)
    readings, spent, step = [], 0.0, 0
    while spent < SECONDS:
        began, step = time.process_time(), step + 1
        items = range((step - 1) * args.batch, step * args.batch)
        x0 = torch.stack([data[i][0] for i in items])
        t, eps, _ = train.draw(items, x0.shape[1:], args, "cpu")
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
                losses = [averaged.loss(x, torch.randint(args.diffusion_steps, (len(x), frames))) for x in held]
            readings.append([step, round(spent, 1), torch.stack(losses).mean().item()])
    return averaged, readings


def score(diffusion, features, frames):
    """FD-random of samples, of their last 16 frames.    features: of as many held-out walks"""
    torch.manual_seed(2)
    noise = torch.randn(len(features), 3, frames, 16, 16).split(max(1, 64 // frames))
    videos = torch.cat([diffusion.sample(x, 10, vdm_ssm.dpm_solver) for x in noise])
    clips = train.to_pixels(videos[:, :, -16:])
    return fvd.frechet_distance(features, fvd.video_features(clips, fvd.random_i3d()))


def quality(results, options):
    frames, count = options.frames, SCORED[options.frames]
    torch.set_num_threads(1)  # so that time on a core is time, whatever else runs
    features = lambda first: fvd.video_features(walks(first, count, frames, 16)[:, -16:], fvd.random_i3d())
    real = features(1000)
    results.row("FD-random of other walks", lambda: fvd.frechet_distance(real, features(2000)))
    layers = [*itertools.product((0, 1), LAYERS), *((0, block) for block in BLOCKS if frames == 16)]
    for seed, layer in layers:
        both = layer if layer in LAYERS[:4] else "bi-mamba"  # one way at the width of two: a few weights less
        dim, *mib = results.row(f"width {both}", lambda: width(both, frames))

        def run():
            diffusion, readings = learn(layer, frames, dim, seed)
            row = dict(dim=dim, readings=readings, weights=sum(p.numel() for p in diffusion.model.parameters()))
            return row | ({} if layer in BLOCKS else {"fd_random": score(diffusion, real, frames)})

        results.row(f"{layer} seed {seed}", run)


# ---- Long-range consistency
#
# The walls of a walk have one style. kept: share of videos whose walls at frame k have the style of frame 8.
# new: how far, in values of pixels, a frame is from the nearest of those at least 16 frames before it.

QUICK = "--sampler=dpm", "--sample-steps=10"
RUNS = {"bi-mamba, windows of 16": ("runs/maze", *QUICK), "attention, windows of 16": ("runs/attention", *QUICK),
        "mamba, a stream": ("runs/causal",)}  # fmt: skip


def consistency(videos):
    """uint8 (n, f, h, w, 3) -> kept, of each frame, and new, the mean over the second half"""
    style, x = style_of(videos), videos.astype(np.float32)
    half = range(x.shape[1] // 2, x.shape[1])
    nearest = [abs(x[:, : k - 15] - x[:, k : k + 1]).mean((2, 3, 4)).min(1) for k in half]
    return dict(kept=(style == style[:, 8:9]).mean(0).tolist(), new=float(np.mean(nearest)))


def distance(results, options, count=12, frames=128):
    real = walks(0, count, frames, 16)
    mixed = np.random.default_rng(0).permuted(np.repeat(np.arange(count)[:, None], frames, 1), axis=0)
    swapped = np.concatenate([real[:, : frames // 2], np.roll(real, 1, axis=0)[:, frames // 2 :]], axis=1)
    known = {"real": real, "frames of all mixed": real[mixed, np.arange(frames)], "another walk from the middle": swapped,
             "16 frames repeated": real[:, np.arange(frames) % 16]}  # fmt: skip
    for name, videos in known.items():
        results.row(name, lambda: consistency(videos))
    for name, (run, *flags) in RUNS.items():
        results.row(name, lambda: consistency(whole(run, count, frames, *flags)))


# ---- Streams


def one_long_stream(run, total=5000):
    """-> look of each 100 frames, styles, seconds and memory of a stream, beside a real walk's look"""
    frames, seconds, peaks = [], [], []
    began = time.perf_counter()
    for k, frame in enumerate(drawn(run, 1, total), 1):
        frames.append(frame[0, 0])
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        if k in (100, total):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - k * frame.nbytes / 2**20)
    frames = np.stack(frames)
    real = walks(0, 8, total // 8, frames.shape[1])
    return dict(look=[look(part) for part in np.split(frames, total // 100)], real=look(real),
                style=np.bincount(style_of(frames) + 1, minlength=4).tolist(),
                style_kept=float((style_of(frames) == style_of(frames[8])).mean()),
                seconds_first_500=float(np.mean(seconds[10:510])),
                seconds_last_500=float(np.mean(seconds[-500:])),
                mib_at_100=peaks[0], mib_at_end=peaks[1])  # fmt: skip


def many_streams(run, count=64, frames=96):
    """-> share of streams with the style of frame 8 at each later one, FD-random of first and last frames"""
    videos = whole(run, count, frames)
    real, style, net = walks(0, 2 * count, 16, videos.shape[2]), style_of(videos), fvd.random_i3d()
    sets = real[:count], real[count:], videos[:, :16], videos[:, -16:]
    features = [fvd.video_features(clips, net) for clips in sets]
    distance = [fvd.frechet_distance(features[0], other) for other in features[1:]]
    return dict(zip(("fd_real", "fd_first_16", "fd_last_16"), distance), count=count, frames=frames,
                style_kept=[float((style[:, k] == style[:, 8]).mean()) for k in range(frames)],
                look_first=look(sets[2]), look_last=look(sets[3]), look_real=look(real))  # fmt: skip


def streams(results, options):
    results.row("one stream of 5,000 frames", lambda: one_long_stream(options.run))
    results.row("64 streams", lambda: many_streams(options.run))


# ---- Actions


def pairs(first, count, frames=33):
    """Two frames of real walks and the turn between them.    -> (n, 6, 16, 16), (n)"""
    x, seeds = real_clips(first, count, frames).transpose(1, 2), range(first, first + count)
    turns = np.stack([train.maze_turns(train.maze_seed("test", i), frames)[1:] for i in seeds])
    return torch.cat([x[:, :-1], x[:, 1:]], dim=2).flatten(0, 1), torch.from_numpy(turns).flatten()


def regressor(steps=1500):
    """A network that reads the turn off two frames, trained on real walks.    -> module, its correlation"""
    torch.manual_seed(0)
    conv = lambda c, c_out: [torch.nn.Conv2d(c, c_out, 3, 2, 1), torch.nn.SiLU()]
    net = torch.nn.Sequential(*conv(6, 32), *conv(32, 64), torch.nn.Flatten(), torch.nn.Linear(1024, 128),
                              torch.nn.SiLU(), torch.nn.Linear(128, 1))  # fmt: skip
    x, turn = pairs(1000, 600)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for step in range(steps):
        part = torch.randint(len(x), (128,))
        (net(x[part])[:, 0] - turn[part]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    x, turn = pairs(2000, 50)
    return net, float(np.corrcoef(net(x)[:, 0].detach(), turn)[0, 1])


def follow(run, net, count=8, frames=200):
    """-> correlation of commanded and seen turns, of each stream and of all"""
    seeds = [train.maze_seed("test", 5000 + i) for i in range(count)]
    turns = torch.from_numpy(np.stack([train.maze_turns(seed, frames) for seed in seeds]))  # (count, frames)
    videos = whole(run, count, frames, actions=10 * turns[..., None])
    x = torch.from_numpy(videos).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    seen = net(torch.cat([x[:, :-1], x[:, 1:]], dim=2).flatten(0, 1)).detach().view(count, -1)
    told, correlation = turns[:, 1:], lambda a, b: float(np.corrcoef(a.flatten(), b.flatten())[0, 1])
    return dict(each=[correlation(*both) for both in zip(seen, told)], all=correlation(seen, told))


def actions(results, options):
    net, real = regressor()
    results.row("regressor on real walks", lambda: real)
    results.row("8 streams of 200 frames", lambda: follow(options.run, net))


# ---- Pictures


def frames(results, options, count=4, length=32):
    steps = lambda run: f"{train.load_checkpoint(run)['step']} steps"
    given = walks(100, count, 8, 16)
    after = whole("runs/maze", count, length - 8, past=real_clips(100, count, 8))
    np.savez_compressed(HERE / "results/frames.npz", data=walks(0, count, length, 16),
                        samples=whole("runs/maze", count, length, "--past=0"),
                        continued=np.concatenate([given, after], axis=1),
                        stream=whole(options.run, count, 100 + length)[:, 100:],
                        captions=["data", f"samples, {steps('runs/maze')}", "the first 8 are real",
                                  f"streams from frame 100, {steps(options.run)}"])  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", choices=("memory", "quality", "distance", "streams", "actions", "frames"))
    parser.add_argument("--run", default="runs/causal", help="a causal run")
    parser.add_argument("--frames", type=int, choices=(16, 64), default=16, help="of a clip, for quality")
    options = parser.parse_args()
    file = f"quality-{options.frames}" if options.name == "quality" else options.name
    globals()[options.name](Results(file), options)
