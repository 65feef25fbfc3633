"""Train a video diffusion model, and sample from it.

    python train.py                            walks through a maze, on whatever device there is
    python train.py --data FOLDER              your own videos: mp4, gif, npy, folders of images, ...
    python train.py --causal                   a network that sees the past alone: its samples are streams
    python train.py --resume runs/maze         go on where a run stopped
    python train.py sample runs/maze --videos 64 --real 64
    torchrun --nproc_per_node 8 train.py ...   one process per GPU

A run writes into its folder checkpoint-STEP.pt, log.jsonl, a line per step, and into samples/ some of its
data and what it draws, as .npz, .mp4, .gif and .png. Decoded videos are kept beside it, in cache/.

Map: 1. The maze   2. Videos   3. Files   4. Processes   5. The loop   6. Sampling   7. The command line"""

import argparse
import gc
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import vdm_ssm
from fvd import RANGES, UnreadableVideo, find_videos, load_array, naming, open_videos, read_frames
from vdm_ssm import TEMPORAL_LAYERS, GaussianDiffusion, ddim, dpm_solver, stream

# -----------------------------------------------------------------------------
# 1. The maze: endless first-person videos, each from a seed
#
# An agent walks through a random maze on a grid of unit cells and looks along the unit vector g; p is the
# unit vector to its right. Point (xi, eta) of the image plane, at distance 1, sees the first wall on the ray
# position + z (g + xi p), which fills |eta| < WALL / 2z. Here z is the distance along g: that along the ray,
# longer at the sides, would bend straight walls. A ray sees one colour, of the sky, the floor or a wall; a
# pixel is the mean of SAMPLES rays. Source: ray casting, known from the game Wolfenstein 3D (1992).

ROOMS = 6  # rooms a side, 2 cells apart: 1,024 frames (205 cells) come back to places seen before
SPEED = 0.2  # cells a frame, 10 frames from room to room: 7 of 10 clips of 16 frames take a turn
LOOK = 0.8  # cells ahead on the path where the agent looks: it turns its head before a bend
VIEW = 0.75  # tangent of half the field of view, 74 degrees: both walls of a corridor are in sight
SAMPLES = 8  # rays a pixel: smooth edges, no flicker in walls far away
FOG = 0.08  # haze replaces the share FOG z / (1 + FOG z) of the light from z cells away
WALL = 0.75  # height in cells, the eye at its middle: it fills at most 0.77 of the picture, as z > 0.65
ROWS, TEXELS = 8, 12  # of the pattern on a cell of wall
SKY, HAZE, FLOOR = (100, 160, 245), (190, 205, 225), ((102, 93, 98), (72, 65, 69))  # RGB
# Light and dark tone of bricks, boards and checks, far in hue from one another, the sky and the floor
TONES = ((222, 84, 54), (140, 40, 30)), ((250, 210, 80), (200, 136, 30)), ((80, 190, 92), (22, 108, 64))


def maze_seed(split, index):
    """Seed of video `index` of a split: "train" has the even seeds, "test" the odd ones."""
    return 2 * index + ("train", "test").index(split)


def maze_style(seed):
    """Wall style of a seed's maze, 0, 1 or 2: the video's class, as frequent in both splits."""
    return seed // 2 % len(TONES)


def maze_walk(seed, frames):
    """A maze and a walk in it.    -> wall (g, g) bool, position (f, 2) in cells, gaze (f, 2) of length 1

    Rooms are the cells with two odd coordinates, pillars those with two even ones. Walls from pillar to
    pillar rise in random order, but none that would close a ring, and so cut rooms off, or leave a room
    with a single exit: every room stays in reach, and no walk has to turn back. The path is the quadratic
    B-spline of the visited cells' centres: smooth in turns, always half a cell or more from any wall."""
    rng = np.random.default_rng(seed)
    wall = np.pad(np.zeros((2 * ROOMS - 1, 2 * ROOMS - 1), bool), 1, constant_values=True)
    joined = np.arange(wall.size).reshape(wall.shape) * ~wall  # equal for joined pillars; 0: border
    wall[2:-2:2, 2:-2:2] = True
    walls = lambda i, j: wall[i - 1 : i + 2, j - 1 : j + 2].sum() - 4  # around a room, but its 4 pillars
    gaps = np.argwhere(~wall)
    for i, j in rng.permutation(gaps[gaps.sum(1) % 2 == 1]):  # between two pillars, and between two rooms
        a, b = i % 2, j % 2  # direction from pillar to pillar
        one, other = joined[i - a, j - b], joined[i + a, j + b]
        if one != other and max(walls(i - b, j - a), walls(i + b, j + a)) < 2:
            wall[i, j] = True
            joined[joined == other] = one

    s = 1 + 2 * rng.random() + SPEED * np.arange(frames) + np.array([[0], [LOOK]])  # (2, f) of agent and aim
    (i, j), a, b, cells = 1 + 2 * rng.integers(ROOMS, size=2), 0, 0, []
    while len(cells) < s.max() + 2:
        steps = [(0, 1), (1, 0), (0, -1), (-1, 0)]
        ways = [(x, y) for x, y in steps if not wall[i + x, j + y] and (x, y) != (-a, -b)]  # not back
        a, b = ways[rng.integers(len(ways))]
        cells += [(i, j), (i + a, j + b)]
        i, j = i + 2 * a, j + 2 * b
    k, q, cells = s.astype(int), (s % 1)[..., None], np.array(cells) + 0.5
    before, here, after = cells[k - 1], cells[k], cells[k + 1]  # (2, f, 2)
    position, ahead = here + 0.5 * ((1 - q) ** 2 * (before - here) + q**2 * (after - here))
    gaze = ahead - position
    return wall, position, gaze / np.linalg.norm(gaze, axis=1, keepdims=True)


def maze_turns(seed, frames):
    """Radians turned to the left to reach each frame, 0 for the first.    -> (frames,) float32"""
    angle = np.unwrap(np.angle(maze_walk(seed, frames)[2] @ [1, 1j]))  # of the gaze
    return np.diff(angle, prepend=angle[:1]).astype(np.float32)


def maze_render(wall, position, gaze, style, size):
    """Views of a maze.    wall (g, g), position, gaze (f, 2) -> (f, size, size, 3) uint8 RGB"""
    # The palette has all that a ray can see: rows of sky, wall and floor, the right half in shade.
    y, x = np.indices((ROWS, TEXELS))
    bricks, boards, checks = (y % 3 < 2) & ((x + y // 3 * 3) % 6 < 5), x < 6, (x < 6) == (y < 4)
    pattern = np.where((bricks, boards, checks)[style][..., None], *TONES[style])
    palette = np.empty((1 + ROWS + 1, 2 * TEXELS, 3), np.float32)
    palette[0], palette[1:-1] = SKY, np.concatenate([pattern, 0.8 * pattern], axis=1)
    palette[-1, ::2], palette[-1, 1::2] = FLOOR  # tiles
    # The n rays of a pixel share no row and no column: an edge of any slope has n shades.
    inside = (np.outer((1, 3), np.arange(SAMPLES))[..., None] % SAMPLES + 0.5) / SAMPLES  # (2, n, 1)
    xi, eta = np.float32(VIEW * (2 * (np.arange(size) + inside) / size - 1))  # (n, size), right and down
    xi, eta = xi[:, None, None], eta[:, None, :, None]  # (n, 1, 1, w), (n, 1, h, 1)
    position, gaze = np.float32((position.T, gaze.T))[:, :, None, :, None, None]  # (2, 1, f, 1, 1)
    ray = gaze + xi * np.stack([gaze[1], -gaze[0]])  # (2, n, f, 1, w)
    ray[ray == 0] = 1e-6  # along a grid line, which is then met far away and not at 0 / 0
    # A ray enters a cell only where it crosses a grid line: all lines across an axis are tried at once.
    line, first = np.arange(len(wall)).reshape(-1, 1, 1, 1, 1), []
    for axis, cells in enumerate((wall, wall.T)):
        z = (np.float32(line) - position[axis]) / ray[axis]  # (g, n, f, 1, w)
        # Beyond the border the index would leave the grid, but there the border has stopped the ray before.
        along = np.clip(position[1 - axis] + z * ray[1 - axis], 0, len(wall) - 1).astype(np.int32)
        first.append(np.where(cells[line - (ray[axis] < 0), along] & (z > 0), z, np.inf).min(0))
    z = np.minimum(*first)  # (n, f, 1, w)
    # On a grid line one coordinate is whole: x + y counts along the wall. Walls across axis 1 are in shade.
    column = (TEXELS * (position + z * ray).sum(0)).astype(np.int32) % TEXELS + TEXELS * (first[1] < first[0])
    row = np.clip(1 + ROWS * (0.5 + z * eta / WALL), 0, ROWS + 1).astype(np.int32)  # (n, f, h, w)
    depth = np.minimum(z, WALL / 2 / np.abs(eta))
    x, y = (2 * (position + depth * ray)).astype(np.int32)  # floor tiles are half a cell wide
    seen = 2 * TEXELS * row + np.where(row > ROWS, (x ^ y) & 1, column)  # index in the palette
    clear, colours = 1 / (1 + FOG * depth), zip(np.moveaxis(palette, -1, 0), HAZE)  # the rest is haze
    video = np.stack([haze + (clear * (rgb - haze).take(seen)).mean(0) for rgb, haze in colours], -1)
    return (video + 0.5).astype(np.uint8)  # the cast rounds down


def maze_video(seed, frames, size):
    """The first frames of a walk through a maze of its own.    seed >= 0 -> (frames, size, size, 3) uint8"""
    (wall, *walk), n = maze_walk(seed, frames), max(1, 2**12 // size**2)  # n frames at once: 16 of 16 x 16
    look = lambda k: maze_render(wall, *(x[k : k + n] for x in walk), maze_style(seed), size)
    drawn = itertools.chain.from_iterable(look(k) for k in range(0, frames, n))
    return np.fromiter(drawn, (np.uint8, (size, size, 3)), frames)


# -----------------------------------------------------------------------------
# 2. Videos
#
# Decoding anew in each epoch takes too long. So every source, a file or a folder of images, is decoded once,
# brought to size and kept as a memory-mapped file, under a KEY made of all that its frames depend on:
#
#     source --read_source--> frames --decode--> cache/KEY.npy, (videos, frames, size, size, channels)

SPLIT_LISTS = "video_{}.csv", "ucfTrainTestlist/{}list01.txt"  # of CARLA Town01 and UCF101
CORES = min(8, os.cpu_count() or 1)


def find_splits(path):
    """Sources of videos at or below a path.    -> {"all": list of Path, maybe "train": ..., "test": ...}

    A folder has splits if it holds train/ and test/ (MineRL Navigate, GQN-Mazes), or if lists of its videos
    lie in it, beside it or one level below (CARLA, UCF101). Of a listed path the last part counts, whatever
    the case of its letters. Raises UnreadableVideo."""
    path, parts = Path(path), ("train", "test")
    sources = [source for source in find_videos(path) if source.name != "actions.npz"]
    if all((path / part).is_dir() for part in parts):
        return {"all": sources} | {part: [s for s in sources if path / part in s.parents] for part in parts}
    here = {source.name.lower(): source for source in sources}
    for folder, lists in itertools.product([path, path.parent, *sorted(path.glob("*/"))], SPLIT_LISTS):
        files = [folder / lists.format(part) for part in parts]
        if all(file.is_file() for file in files):
            listed = lambda file: re.findall(r"[^/\\,\s]+\.(?:pt|avi)\b", file.read_text(errors="replace"))
            splits = [[here.get(name.lower(), path / name) for name in listed(file)] for file in files]
            if {*sum(splits, [])} & {*sources}:  # or else they are lists of something else
                return {"all": sources} | dict(zip(parts, splits))
    return {"all": sources}


def resize(frame, size, antialias=True):
    """Short side to `size`, bilinear, then centre crop.    uint8 (h, w, 3) -> uint8 (size, size, 3)"""
    shape = [size * side // min(frame.shape[:2]) for side in frame.shape[:2]]
    planes = torch.from_numpy(frame).permute(2, 0, 1)[:, None, None]  # one by one: floats take 4 bytes
    tiny = [F.interpolate(x.float(), shape, mode="bilinear", antialias=antialias) for x in planes]
    top, left = (round((side - size) / 2) for side in shape)  # torchvision's rounding: 2.5 to 2, 5.5 to 6
    return torch.cat(tiny)[:, 0, top : top + size, left : left + size].round().byte().permute(1, 2, 0).numpy()


def read_source(source, args):
    """The videos of a source, decoded lazily.    -> yields iterators over frames. Raises UnreadableVideo"""
    for video in () if args.latents else open_videos(source, RANGES.get(args.floats)):
        yield (resize(frame, args.size, args.antialias) for frame in read_frames(video))
    if args.latents:
        with naming(source):
            array, side = load_array(source), args.size
            x, fits = array.astype(np.float32), array.dtype.kind == "f" and array.shape[1:-1] == (side, side)
            if not (fits and x.size and np.isfinite(x).all()):
                raise ValueError(f"{array.dtype} {x.shape} is not finite float (f, --size {side}, {side}, c)")
            yield x


def decode(job, args):
    """Put the frames of a source into the cache.    job: source, file -> None, or a reason to skip it"""
    source, path = job
    try:
        with whole(path) as file, tempfile.TemporaryFile(dir=args.cache) as raw:
            for n, video in enumerate(read_source(source, args), 1):
                for frame in video:
                    raw.write(np.ascontiguousarray(frame))
            raw.flush()  # only its end tells how many frames there are
            np.save(file, np.memmap(raw, frame.dtype, "r").reshape(n, -1, *frame.shape))
    except UnreadableVideo as error:
        return str(error)


def cached(sources, args):
    """Decode what is missing, in several processes.    -> {source: its file}, {source: why it is skipped}"""
    paths = {}
    for source in sources:
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns)
                 for file in sorted(source.glob("*")) or [source] if file.is_file()]
        key = repr((str(source.resolve()), stats, args.size, args.antialias, args.latents, args.floats))
        paths[source] = Path(args.cache, hashlib.sha256(os.fsencode(key)).hexdigest()[:16] + ".npy")
    missing = [(source, path) for source, path in paths.items() if not path.exists()]
    workers = (args.workers or CORES) if len(missing) > 1 else 0
    loader = DataLoader(missing, None, num_workers=workers, collate_fn=partial(decode, args=args))
    reasons = zip(missing, tqdm(loader, desc="decoding", unit="file", disable=not missing))
    skipped = {source: why for (source, _), why in reasons if why}
    return {source: str(path) for source, path in paths.items() if source not in skipped}, skipped


class MazeVideos(Dataset):
    """Walk `i` of the endless maze.    [i] -> (3, frames, size, size) in [-1, 1], index of its style, actions

    Actions (frames, 1) are the turns to the left that lead to the frames, in tenths of a radian."""

    channels, action_dim, classes, identity = 3, 1, ["bricks", "boards", "checks"], []

    def __init__(self, args, held_out=False):
        self.args, self.split = args, "test" if held_out else "train"
        self.about = f"endless walks through mazes, the {self.split} seeds"

    def __len__(self):
        return 2**32

    def __getitem__(self, i):
        args, seed = self.args, maze_seed(self.split, self.args.seed * 2**32 + i)
        video = maze_video(seed, args.stride * (args.frames - 1) + 1, args.size)[:: args.stride]
        turns = 10 * maze_turns(seed, args.frames)[:, None] if args.actions else np.zeros((args.frames, 0))
        return to_model_range(video), maze_style(seed), turns


class FolderVideos(Dataset):
    """Random windows of videos.    [i] -> (c, frames, size, size), index of its class, actions (frames, k)

    An epoch shows a window of every video, in [-1, 1]; its class is the name of its folder. held_out: of the
    test split instead of train. Actions are an array (files, frames, n) in actions.npz beside the files."""

    def __init__(self, args, held_out=False):
        splits, self.args, self.span = find_splits(args.data), args, args.stride * (args.frames - 1) + 1
        split = args.split or ("train" if "train" in splits else "all")
        split = "test" if held_out and split == "train" else split
        if split not in splits:
            raise ValueError(f"--split {split}: {args.data} has neither train/ and test/ nor lists of them")
        files, self.skipped = cached(splits[split], args)
        actions, self.videos, self.identity = {}, [], []
        for folder, group in itertools.groupby(splits[split] if args.actions else (), lambda s: s.parent):
            with naming(folder / "actions.npz"):
                group, array = [*group], np.load(folder / "actions.npz", allow_pickle=False)["actions"]
                if np.float32(array).ndim != 3 or len(array) != len(group):
                    raise ValueError(f"{array.shape} is not ({len(group)} files, frames, n)")
            actions.update(zip(group, array))
        self.classes = sorted({source.parent.name for source in splits[split]})
        for source, path in files.items():
            videos, frames, *size = np.load(path, mmap_mode="r").shape
            # Names and shapes, not times: a copy of the data is the same data.
            self.identity.append([os.path.relpath(source, args.data), videos, frames, *size])
            led = actions.get(source, np.zeros((frames, 0)))
            if len(led) >= frames >= self.span:
                self.videos += [(path, k, self.classes.index(source.parent.name), led) for k in range(videos)]
        n = sum(row[1] for row in self.identity)
        self.about = f"{len(self)} of {n} videos in {args.data}, split {split}, have {self.span} frames"
        if not self.videos:
            raise ValueError(f"{self.about}: {next(iter(self.skipped.values()), 'see --frames, --stride')}")
        self.about += "".join(f"\nskipped {why}" for why in self.skipped.values())
        self.channels, self.action_dim = self.identity[0][-1], self.videos[0][-1].shape[-1]

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, i):
        epoch, k = divmod(i, len(self))
        order = np.random.default_rng([self.args.seed, epoch]).permutation(len(self))
        path, video, label, actions = self.videos[order[k]]
        frames = np.load(path, mmap_mode="r")[video]
        start = np.random.default_rng([self.args.seed, epoch, k]).integers(len(frames) - self.span + 1)
        part = slice(start, start + self.span, self.args.stride)
        return to_model_range(frames[part]), label, np.float32(actions[part])


def videos_of(args, held_out=False):
    """The data set of a run; held_out: the test part instead of the train part, if it is divided."""
    return (MazeVideos if args.data == "maze" else FolderVideos)(args, held_out)


# -----------------------------------------------------------------------------
# 3. Files
#
# A file is written under another name and then renamed, which a file system does at once or not at all: a
# killed run leaves the old file or the new one, never half of one.

@contextmanager
def whole(path):
    """An open file that becomes `path` when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.urandom(4).hex()}.part")  # two processes may write one path
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # first the content, then the name: a power cut leaves no empty file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def to_model_range(video):
    """uint8 (f, h, w, c) in 0..255 -> float (c, f, h, w) in [-1, 1]; latents, which are floats, stay"""
    x = rearrange(torch.from_numpy(np.array(video)), "f h w c -> c f h w")
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x


def to_pixels(x, latents=False):
    """(b, c, f, h, w) in [-1, 1] -> uint8 (b, f, h, w, c) in 0..255; of latents their values, float32"""
    x = rearrange(x.float().cpu(), "b c f h w -> b f h w c")
    return x if latents else ((x + 1) * 127.5).round().clamp(0, 255).byte()


def page(videos):
    """Videos below each other, time to the right.    uint8 (b, f, h, w, 3) -> (H, W, 3), even, for H.264"""
    scale, gap = max(1, 64 // videos.shape[3]), ((0, 0), (0, 0), (0, 4), (0, 4), (0, 0))
    cells = np.pad(videos.repeat(scale, axis=2).repeat(scale, axis=3), gap, constant_values=255)
    picture = rearrange(cells, "b f h w c -> (b h) (f w) c")[:-4, :-4]
    return np.pad(picture, [(0, side % 2) for side in picture.shape[:2]] + [(0, 0)])


@contextmanager
def film(path, fps):
    """An MP4 that grows, a GIF and a sheet, .png.    -> function that appends uint8 videos (b, f, h, w, 3)

    MP4 and GIF show the videos side by side; the sheet has a row for each, time from left to right. Of more
    than 32 frames, GIF and sheet show every second, every fourth, ... one: the GIF runs faster."""
    shown, count = {}, itertools.count()

    def append(videos):
        for pictures, k in zip(videos.swapaxes(0, 1), count):
            mp4.write_frame(page(pictures[None]))  # side by side, where a sheet has time
            shown[k], step = pictures, 2 ** (k // 32).bit_length()  # 1 before frame 32, 2 before 64, ...
            for i in [i for i in shown if i % step]:
                del shown[i]

    with whole(path) as file, iio.imopen(file, "w", extension=".mp4", plugin="pyav", container="mp4") as mp4:
        mp4.init_video_stream("libx264", fps=fps)
        yield append
        if not shown:
            raise ValueError(f"{path}: no frame has been drawn")
    pages, sheet = [page(x[None]) for x in shown.values()], page(np.stack([*shown.values()], axis=1))
    with whole(path.with_suffix(".gif")) as gif, whole(path.with_suffix(".png")) as png:
        iio.imwrite(gif, pages, extension=".gif", duration=1000 / fps, loop=0)  # equal frames merge
        iio.imwrite(png, sheet, extension=".png")


def show(path, videos, args):
    """Write videos as an array, PATH.npz, and the first 16 as films, if they are no latents."""
    with whole(path.with_suffix(".npz")) as file:
        np.savez_compressed(file, videos=videos)
    if not args.latents:
        with film(path.with_suffix(".mp4"), args.fps) as append:
            append(videos[:16])


def checkpoints(folder):
    """The checkpoints in a folder, by their steps.    -> list of Path, the newest last"""
    paths = (path for path in Path(folder).glob("checkpoint-*.pt") if path.stem[11:].isdecimal())
    return sorted(paths, key=lambda path: int(path.stem[11:]))


def load_checkpoint(run):
    """A run's folder, or one of its checkpoints, -> dict. Raises ValueError."""
    path = (checkpoints(run) or [Path(run)])[-1]
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return dict(checkpoint, args=dict(checkpoint["args"]), folder=path.parent)
    except Exception as error:  # zip, pickle and torch share no narrower class
        raise ValueError(f"{path} is damaged, or no checkpoint ({type(error).__name__})") from error


def rewind(out, step):
    """Undo what a run did after a step: later checkpoints become .old, the log is shortened."""
    for path in (path for path in checkpoints(out) if int(path.stem[11:]) > step):
        os.replace(path, f"{path}.old")
    for path in out.rglob("*.part"):  # of a killed run
        path.unlink()
    log = out / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True) if log.exists() else []  # one for each step
    with whole(log) as file:
        file.writelines(lines[:step])


# -----------------------------------------------------------------------------
# 4. Processes
#
# `torchrun` starts this file once per GPU. The processes, ranks, hold the same weights, each takes its share
# of every batch, and DistributedDataParallel averages their gradients. Rank 0 alone writes and prints.

def join(device):
    """Become one of torchrun's processes, or the only one.    -> rank, number of ranks"""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
    if ranks > 1 and device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if ranks > 1:
        nccl = device == "cuda" and dist.is_nccl_available()  # not on Windows
        # A rank that dies is noticed at once; the timeout is for a rank 0 that decodes videos for hours.
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=timedelta(days=1))
    return rank, ranks


def total(number):
    """The sum of a number over all ranks. They wait here for each other."""
    number = torch.tensor(number, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(number)
    return number.item()


def on_signal(action, *_):
    """Set what Ctrl-C and SIGTERM do to this process. (A loader adds its number.)"""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, action)


# -----------------------------------------------------------------------------
# 5. The loop
#
# No random generator outlives an item: (seed, item) determines video, window, diffusion step, noise and
# hidden class of every item, whichever process draws them. So N ranks train as one does with N times the
# batch, and weights, their average, the optimiser and the step are all that a run needs to go on exactly.

def generators(seed, items, device="cpu"):
    """A random generator for each item: its numbers do not depend on what is drawn together with it."""
    seeds = [int(np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)[0]) for i in items]
    return [torch.Generator(device).manual_seed(s) for s in seeds]


def draw(items, shape, args):
    """What items draw besides videos.    -> t (b, f) or (b), noise (b, *shape), keep (b): tell conditions?"""
    device, rngs = args.device, generators(args.seed, items, args.device)
    levels = shape[1:2] if args.frame_noise else ()  # one for each frame: Diffusion Forcing, 2407.01392
    t = [torch.randint(args.diffusion_steps, levels, generator=rng, device=device) for rng in rngs]
    eps = [torch.randn(shape, generator=rng, device=device) for rng in rngs]
    keep = [torch.rand((), generator=rng, device=device) >= args.cond_drop for rng in rngs]
    return torch.stack(t), torch.stack(eps), torch.stack(keep)


def conditions(labels, actions, args):
    """What the network is told.    labels (b), actions (b, f, k) -> (b, f, classes + k), None for nothing"""
    label = torch.as_tensor(labels)[:, None, None] == torch.arange(len(args.classes))  # (b, 1, classes)
    cond = torch.cat([label.expand(-1, actions.shape[1], -1), actions], dim=2)
    return cond.float().to(args.device) if cond.shape[2] else None


def build(args):
    """The network of a run, on the CPU.    -> name of its class, arguments, itself. Raises ValueError."""
    if args.backbone == "dim":
        name, own = "DiM", dict(depth=args.depth, d=args.width, patch=args.patch)
    else:
        name, own = "UNet3D", dict(dim=args.dim, dim_mults=tuple(args.dim_mults), heads=args.heads,
                                   temporal=args.temporal, causal=args.causal)
    own |= dict(channels=args.channels, cond_dim=len(args.classes) + args.action_dim or None,
                add_cond=args.action_dim > 0, recompute=args.recompute)
    model = getattr(vdm_ssm, name)(**own)
    if args.size % model.factor:
        raise ValueError(f"--size {args.size} must be a multiple of {model.factor}, see --patch, --dim-mults")
    if args.label is not None and args.label not in args.classes:
        raise ValueError(f"--class {args.label} is none of {args.classes}, the classes of this run")
    return name, own, model


def train(args, checkpoint=None):
    """The training loop, from the start or from a checkpoint."""
    rank, ranks = join(args.device)
    data = videos_of(args) if rank == 0 else None  # the others find what it has decoded
    total(0)
    data = videos_of(args) if rank > 0 else data
    args.channels, args.classes = data.channels, data.classes if args.class_cond else []
    args.action_dim = data.action_dim if args.actions else 0
    torch.manual_seed(args.seed)
    network, network_args, model = build(args)
    model.to(args.device, memory_format=torch.channels_last)  # as activations lie: 5 % faster
    decay = lambda k: min(args.ema, (1 + float(k)) / (10 + float(k)))  # a shorter average at first
    ema = AveragedModel(model, multi_avg_fn=lambda a, b, k: get_ema_multi_avg_fn(decay(k))(a, b, k))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    begin, per_step = 0, args.batch * args.grad_accum * ranks
    if checkpoint:
        begin, was = checkpoint["step"], checkpoint["per_step"]
        if checkpoint["data"] != data.identity:
            raise ValueError(f"{args.data} no longer holds the videos of this run: restore them")
        if was != per_step:
            raise ValueError(f"--batch x --grad-accum x processes was {was} and must stay, but is {per_step}")
        model.load_state_dict(checkpoint["model"])
        ema.module.load_state_dict(checkpoint["ema"])
        ema.n_averaged.fill_(begin)
        optimizer.load_state_dict(checkpoint["optimizer"])
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # every block has a shape of its own
        for block in model.modules():
            if isinstance(block, (vdm_ssm.ResBlock, vdm_ssm.OverSpace, vdm_ssm.OverTime, vdm_ssm.DiMBlock)):
                block.compile(dynamic=False)
    net = DistributedDataParallel(model, gradient_as_bucket_view=True) if ranks > 1 else model
    diffusion_args = dict(steps=args.diffusion_steps, target=args.target, clip=not args.latents)
    diffusion = GaussianDiffusion(net, **diffusion_args).to(args.device)
    # This rank's share of all batches. Loaders ignore a signal to the whole group: the run will end them.
    first = begin * per_step + rank * args.batch
    shares = lambda: (range(i, i + args.batch) for i in itertools.count(first, ranks * args.batch))
    loader = DataLoader(data, batch_sampler=shares(), num_workers=args.workers,
                        worker_init_fn=partial(on_signal, signal.SIG_IGN), pin_memory=args.device == "cuda")
    batches, out, stop, step = zip(shares(), loader), Path(args.out), [], begin
    if rank == 0:
        out.mkdir(parents=True, exist_ok=begin > 0)  # of two runs begun together one is refused
        rewind(out, begin)
        if not begin:
            some = torch.stack([data[i][0] for i in range(args.sample_videos)])
            show(out / "samples/data", to_pixels(some, args.latents).numpy(), args)
        size = sum(p.numel() for p in model.parameters())
        print(f"{network}, {size:,} weights, {ranks} x {args.device}\n{data.about}\nwrites {out}", flush=True)
    on_signal(lambda *_: (stop.append(True), on_signal(signal.SIG_DFL)))  # a second signal ends it at once
    bar = tqdm(total=args.steps, initial=step, disable=rank > 0)

    while True:
        # Save and draw what is due. A signal to one rank stops all after the same step.
        due = lambda interval: step > 0 and (step >= args.steps or step % interval == 0)
        stopped = total(len(stop)) > 0
        if rank == 0 and step > begin and (due(args.save_every) or stopped):
            now = dict(args=vars(args), step=step, per_step=per_step, data=data.identity, network=network,
                       network_args=network_args, diffusion_args=diffusion_args, model=model.state_dict(),
                       ema=ema.module.state_dict(), optimizer=optimizer.state_dict())
            with whole(out / f"checkpoint-{step:06d}.pt") as file:
                torch.save(now, file)
            for old in checkpoints(out)[: -args.keep]:
                old.unlink()
        if rank == 0 and due(args.sample_every):
            show(out / f"samples/step-{step:06d}", sample_videos(ema.module, args), args)
        if step >= args.steps or stopped:
            break

        # One step.
        step, began, losses = step + 1, time.time(), []
        for k in range(args.grad_accum):
            items, (x0, labels, actions) = next(batches)
            x0 = x0.to(args.device, non_blocking=args.device == "cuda")
            cond = conditions(labels, actions, args)
            t, eps, keep = draw(items, x0.shape[1:], args)
            net.require_backward_grad_sync = k == args.grad_accum - 1  # ranks meet once a step
            with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
                losses.append(diffusion.loss(x0, t, eps, cond, keep) / args.grad_accum)
            losses[-1].backward()
        loss = total(sum(losses).item()) / ranks
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf).item()
        if not math.isfinite(loss + norm):
            raise ValueError(f"step {step}: loss {loss}, gradient norm {norm}; lower --lr, or give --no-amp")
        fall = max(1, round(args.cooldown * args.steps))
        lr = args.lr * min(1, step / max(1, args.warmup), (args.steps + 1 - step) / fall)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
        bar.update()
        bar.set_postfix_str(f"loss {loss:.4f}")
        if rank == 0:
            speed = per_step / (time.time() - began)
            line = dict(step=step, loss=loss, grad_norm=norm, lr=lr, videos_per_second=speed)
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(line) + "\n")

    bar.close()
    if rank == 0:
        print(f"stopped after step {step}, --resume {out}" if step < args.steps else f"see {out}/samples")
    del net, diffusion  # DistributedDataParallel, freed after its processes have parted, may wait for ever
    if ranks > 1:
        dist.destroy_process_group()


# -----------------------------------------------------------------------------
# 6. Sampling
#
# A video longer than a clip comes window by window or, from a causal network, frame by frame.

def pieces(model, args, numbers, past=None, actions=None):
    """Videos as they are drawn, piece by piece.    -> yields (b, c, f, size, size), --frames in all

    past: frames (b, c, k, size, size) to go on from. actions: of all frames, (frames, k) or (b, frames, k).
    A seed and a number make the same video, whatever is drawn beside it."""
    rngs, shape = generators(args.seed, numbers), lambda f: (args.channels, f, args.size, args.size)
    noise = lambda f: torch.stack([torch.randn(shape(f), generator=rng) for rng in rngs]).to(args.device)
    ddpm = partial(ddim, eta=1, randn_like=lambda x: noise(x.shape[2]))
    sampler = dict(ddim=ddim, ddpm=ddpm, dpm=dpm_solver)[args.sampler]
    how = dict(sampler=sampler, guidance=args.guidance, steps=args.sample_steps)
    labels = [args.classes.index(args.label) if args.label else i % (len(args.classes) or 1) for i in numbers]
    led, told = torch.zeros(1, args.action_dim) if actions is None else torch.as_tensor(actions), None
    # Without actions a network that learned to do without is told nothing, unless it needs a class: then 0.
    if actions is not None or args.classes or not (args.action_dim and args.cond_drop):
        told = conditions(labels, led.expand(len(rngs), -1, -1), args)
    net = torch.autocast(args.device, torch.bfloat16, enabled=args.amp)(model.forward)
    diffusion = GaussianDiffusion(net, args.diffusion_steps, args.target, not args.latents).to(args.device)
    if args.causal:
        each = told if actions is None else told.split(1, dim=1)
        yield from itertools.islice(stream(diffusion, partial(noise, 1), past, each, **how), args.frames)
        return
    window, left, level = args.window if args.past else args.frames, args.frames, diffusion.steps // 8
    t = torch.full((len(rngs),), level, device=args.device)
    while left > 0:
        f = min(left, window - (0 if past is None else past.shape[2]))
        # The past gets a little noise, as in `stream`: shown as clean, it hands on errors, and colours drift.
        seen = None if past is None else diffusion.add_noise(past, t, noise(past.shape[2]))
        x = diffusion.sample(noise(f), cond=told, past=seen, level=level, **how)
        yield x
        left, past = left - f, torch.cat([x] if past is None else [past, x], dim=2)[:, :, -args.past :]


def sample_videos(model, args, progress=iter):
    """--videos videos, --batch at once.    -> (n, frames, size, size, c) uint8, of latents float32"""
    numbers, parts = range(args.sample_videos), []
    for i in progress(numbers[:: args.batch]):
        drawn = torch.cat([*pieces(model, args, numbers[i : i + args.batch])], dim=2)
        parts.append(to_pixels(drawn, args.latents))
    return torch.cat(parts).numpy()


def sample_film(model, args):
    """Videos of any length into film.mp4, as they are drawn, after --after, under --actions, until Ctrl-C."""
    if args.latents or args.real:
        raise ValueError("long films are drawn in pixels, without --real")
    past = actions = None
    if args.after:
        last = [*next(read_source(find_videos(args.after)[0], args))][:: -args.stride][: args.past][::-1]
        past = to_model_range(last).to(args.device).expand(args.sample_videos, -1, -1, -1, -1)
    if isinstance(args.actions, str):
        actions = np.load(args.actions, allow_pickle=False)
        if np.ndim(actions) != 2 or actions.dtype.kind not in "fiu" or actions.shape[1] != args.action_dim:
            raise ValueError(f"--actions {args.actions}: no .npy of numbers (frames, {args.action_dim})")
        args.frames = len(actions)
    print(f"writes {args.out}/film.mp4, and frames of it as .gif and .png")
    drawn = pieces(model, args, range(args.sample_videos), past, actions)
    bar = tqdm(total=args.frames + (0 if past is None else past.shape[2]), unit=" frames")
    with film(Path(args.out, "film.mp4"), args.fps) as append, suppress(KeyboardInterrupt):
        for x in itertools.chain([] if past is None else [past], drawn):
            append(to_pixels(x).numpy())
            bar.update(x.shape[2])


def sample(args, checkpoint):
    """Draw videos from a checkpoint, without its data. --real writes videos of its data, too."""
    model, out = build(args)[2].to(args.device).requires_grad_(False), Path(args.out)
    model.load_state_dict(checkpoint["ema"])
    if args.after or isinstance(args.actions, str) or args.frames > args.window and args.past:
        return sample_film(model, args)
    if args.real:
        data = videos_of(args, held_out=True)
        if args.real > len(data):
            raise ValueError(f"--real {args.real} is more than there are: {len(data)} videos")
        real = torch.stack([data[i][0] for i in range(args.real)])
        show(out / "real", to_pixels(real, args.latents).numpy(), args)
        print(f"real.npz: {data.about}\nscore: python fvd.py {out}/real.npz {out}/fake.npz --features random")
    show(out / "fake", sample_videos(model, args, tqdm), args)
    print(f"wrote {out}/fake.npz")


# -----------------------------------------------------------------------------
# 7. The command line
#
# A run that goes on, and samples of a run, take the arguments of its checkpoint as defaults, except --out,
# --device, --workers. What is learned stays; samples may have a size, length, seed and actions of their own.

GPU = torch.cuda.is_available()


def within(kind, low, high=math.inf):
    """A reader of numbers, int or float, from low to high."""
    def number(text):
        if not low <= kind(text) <= high:  # nan, too
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)
    return number


COUNT, NATURAL, POSITIVE, SHARE = within(int, 1), within(int, 0), within(float, 0), within(float, 0, 1)
COUNTS, SWITCH = lambda text: [COUNT(part) for part in text.split(",")], argparse.BooleanOptionalAction


def add_learned(parser):
    """Options of what is learned, by which network and how: they stay."""
    add = parser.add_argument_group("learned: stays, but --size, --frames, --seed in samples").add_argument
    add("--split", choices=("train", "test", "all"), help="of a divided data set, train if not given")
    add("--size", type=COUNT, default=32 if GPU else 16, help="height and width in pixels")
    add("--antialias", action=SWITCH, default=True, help="in scaling down; the papers do without")
    add("--frames", type=COUNT, default=16, help="frames per video")
    add("--stride", type=COUNT, default=1, metavar="K", help="take every K-th frame of a video")
    add("--floats", choices=RANGES, help="what float pixels mean: unit, 0 to 1; symmetric, -1 to 1")
    add("--latents", action=SWITCH, default=False, help="train on float arrays (f, h, w, c) as they are")
    add("--class-cond", action=SWITCH, default=False, help="tell classes: a video's folder, the maze's style")
    add("--cond-drop", type=SHARE, default=0.1, help="share of hidden classes (for --guidance) or actions")
    add("--actions", nargs="?", const=True, metavar="FILE", help="tell turns or actions.npz; sample: an .npy")
    add("--backbone", choices=("unet", "dim"), default="unet", help="network")
    add("--target", choices=("eps", "v", "x0"), default="v", help="what it predicts")
    add("--diffusion-steps", type=COUNT, default=256, help="steps of the schedule")
    add("--frame-noise", action=SWITCH, default=True, help="a level for each frame; --causal implies it")
    add("--causal", action=SWITCH, default=False, help="unet: no frame sees later ones; see --causal --help")
    add("--temporal", choices=TEMPORAL_LAYERS, default="bi-mamba", help="unet: temporal layer")
    add("--dim", type=COUNT, default=64 if GPU else 32, help="unet: width of level 1, a multiple of 8")
    add("--dim-mults", type=COUNTS, default="1,2,4,8" if GPU else "1,2,4", help="unet: level widths / dim")
    add("--heads", type=COUNT, default=8 if GPU else 4, help="unet: attention heads")
    add("--depth", type=COUNT, default=12 if GPU else 6, help="dim: blocks")
    add("--width", type=COUNT, default=384 if GPU else 192, help="dim: numbers per token, 16, 24, ...")
    add("--patch", type=COUNT, default=2 if GPU else 4, help="dim: side of a token in pixels")
    add("--lr", type=POSITIVE, default=3e-4 if GPU else 1e-3, help="learning rate of Adam")
    add("--warmup", type=NATURAL, default=50, help="steps in which it rises to --lr")
    add("--cooldown", type=SHARE, default=0.2, help="last share of the steps, in which it falls to 0")
    add("--clip", type=POSITIVE, default=1.0, help="largest norm of the gradient, 0 for no limit")
    add("--ema", type=SHARE, default=0.9995 if GPU else 0.995, help="decay of the averaged weights, per step")
    add("--seed", type=within(int, 0, 2**31 - 1), default=0, help="of weights, data order and noise")


def add_free(parser, sampling):
    """Options that may change when a run goes on, and those of one command."""
    add = parser.add_argument_group("the rest; an existing run has its own defaults").add_argument
    add("--data", default="maze", help="'maze', or a file or folder of videos, arrays and image sequences")
    add("--batch", type=COUNT, default=16 if GPU else 2, help="videos per process and pass, or drawn at once")
    add("--amp", action=SWITCH, default=GPU and torch.cuda.is_bf16_supported(False), help="use bfloat16")
    add("--recompute", action=SWITCH, default=False, help="compute activations twice: less memory, more time")
    add("--videos", "--sample-videos", dest="sample_videos", type=COUNT, default=8, metavar="N", help="drawn")
    add("--sampler", choices=("ddim", "ddpm", "dpm"), default="dpm", help="dpm: DPM-Solver++, second order")
    add("--sample-steps", type=COUNT, default=20, help="denoising steps, at most --diffusion-steps")
    add("--guidance", type=within(float, -100, 100), default=1.0, help="weight of class or actions, 0: none")
    add("--class", dest="label", metavar="NAME", help="draw this class alone instead of all in turn")
    add("--past", type=NATURAL, metavar="K", help="frames that the next window sees, half of it if not given")
    add("--fps", type=within(float, 0.1, 1000), default=8.0, help="frames per second of GIFs and MP4s")
    if sampling:
        add("run", metavar="RUN", help="folder of a run, or a checkpoint in it")
        add("--real", type=COUNT, help="write real videos, too: of the test part, unless it was trained on")
        add("--after", metavar="FILE", help="go on from the end of this video")
    else:
        add("--steps", type=COUNT, default=20_000 if GPU else 600, help="optimiser steps in all")
        add("--grad-accum", type=COUNT, default=1, help="backward passes per step")
        add("--compile", action=SWITCH, default=False, help="minutes at first, then faster steps")
        add("--save-every", type=COUNT, default=1000 if GPU else 100, help="steps between checkpoints")
        add("--keep", type=COUNT, default=2, help="checkpoints kept, the newest ones")
        add("--sample-every", type=COUNT, default=2000 if GPU else 600, help="steps from sample to sample")
        add("--resume", dest="run", metavar="RUN", help="go on with this run, or from a checkpoint in it")
    add("--out", help="folder to write to, by default runs/DATA or RUN/sampled, numbered if taken")
    here = ["cuda"] * GPU + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    add("--device", choices=here, default=here[0], help="where to compute")
    add("--workers", type=NATURAL, default=CORES if GPU else 0, help="processes that load; 0: this one")


def parse(argv):
    """Arguments and, if a run is named, its checkpoint. Raises ValueError."""
    sampling = argv[:1] == ["sample"]
    usage = "python train.py [options], or python train.py sample RUN [options]; --help tells which"
    form = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("train.py", usage, allow_abbrev=False, formatter_class=form)
    add_learned(parser)
    learned = vars(parser.parse_args([])).keys()
    add_free(parser, sampling)
    if "--causal" in argv:
        steps, drop = (1500, 0.0) if "--actions" in argv else (720, 0.1)
        # Few steps a frame, for streams, and longer clips one at a time: a network learns to remember.
        longer = {} if GPU else dict(batch=1, frames=32, steps=steps, sample_every=1000, sample_videos=1)
        parser.set_defaults(temporal="mamba", sampler="ddim", sample_steps=5, cond_drop=drop, **longer)
    args, checkpoint = parser.parse_args(argv[sampling:]), None
    args.window = args.frames  # of training; samples may have more
    if args.run:
        checkpoint = load_checkpoint(args.run)
        saved = {k: v for k, v in checkpoint["args"].items() if k not in ("run", "out", "device", "workers")}
        args = parser.parse_args(argv[sampling:], argparse.Namespace(**saved))
        free = {"size", "frames", "seed", "floats", saved["actions"] and "actions"} if sampling else set()
        for name in (learned - free) & saved.keys():
            if getattr(args, name) != saved[name]:
                raise ValueError(f"--{name.replace('_', '-')} was {saved[name]} and stays: leave it out")
    args.frame_noise |= args.causal
    args.past = args.window // 2 * args.frame_noise if args.past is None else args.past
    args.data = args.data if args.data == "maze" else str(Path(args.data).resolve())
    folder = checkpoint["folder"] if checkpoint else Path(args.out or Path("runs", Path(args.data).stem))
    base = folder / "sampled" if sampling else folder
    new = (path for k in itertools.count(1) if not (path := Path(f"{base}-{k}" if k > 1 else base)).exists())
    out = folder if args.run and not sampling else Path(args.out or next(new))
    after = sampling and args.after
    for wrong, told in [
        (args.run and args.out and not sampling, "--out is for new runs: --resume writes into its own"),
        (args.out and out.exists(), f"--out {out} exists: choose another; a run goes on by --resume {out}"),
        (Path(args.data) in (out / "samples").resolve().parents, f"--out {out} lies in --data"),
        ((after or args.past) and not args.frame_noise, "--after and --past need a run with --frame-noise"),
        (args.past >= args.window and not args.causal or after and not args.past,
         f"--past {args.past} is not from 1 to {args.window - 1}, less than a window as in training"),
        (args.actions and not args.causal or args.causal and args.backbone == "dim",
         "--actions need --causal, and that needs --backbone unet"),
        (args.actions and args.stride > 1, "--actions lead from frame to frame: leave out --stride"),
        (isinstance(args.actions, str) and not sampling, "--actions takes a FILE only for sample: drop it"),
        (sampling and "RANK" in os.environ, "samples are drawn by one process: leave out torchrun"),
        (args.sample_steps > args.diffusion_steps, "--sample-steps are at most --diffusion-steps"),
        (args.guidance != 1 and not ((args.class_cond or args.actions) and args.cond_drop),
         f"--guidance {args.guidance} needs a run with --class-cond or --actions, and --cond-drop above 0")]:
        if wrong:
            raise ValueError(told)
    args.out, args.cache = str(out), str(folder.resolve().parent / "cache")
    return args, checkpoint


if __name__ == "__main__":
    gc.freeze()  # imageio collects garbage after every film: without what was imported it takes no time
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no half-written file stays
    sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold letters that the terminal does not
    try:
        (sample if sys.argv[1:2] == ["sample"] else train)(*parse(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)  # what a shell expects of Ctrl-C
    except Exception as error:
        told = str(error).strip().rpartition("\n")[2]  # after the traceback of a loader's process
        if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):
            told = "not enough memory: give --recompute, or lower --batch, --frames, --size, --dim or --width"
        elif not isinstance(error, (ValueError, OSError)):
            sys.excepthook(type(error), error, error.__traceback__)
        print(f"train.py: {told}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)  # sys.exit would wait for ever for processes that load, which ignore its SIGTERM
