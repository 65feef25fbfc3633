"""Train a video diffusion model, and sample from it.

    python train.py                            walks through a maze, on whatever device there is
    python train.py --data FOLDER              your own videos: mp4, gif, npy, folders of images, ...
    python train.py --temporal attention       another temporal layer, to compare
    python train.py --backbone dim             another network, DiM
    python train.py --class-cond               told the class of each video
    python train.py --resume runs/maze         go on where a run stopped
    python train.py sample runs/maze --videos 16 --frames 64
    python train.py plot runs/maze runs/maze-2
    torchrun --nproc_per_node 8 train.py ...   one process per GPU

A run writes into its own folder (--out): checkpoint-STEP.pt (the newest ones), log.jsonl (one line per step), and
samples/ with a GIF and a contact sheet (a PNG: one row per video, time from left to right) for every --sample-every
steps. Decoded videos are kept beside it, in cache/.

Map
    1. The maze       endless videos, drawn by numpy
    2. Folders        videos decoded once into a cache, random windows of them
    3. Pictures       GIFs, contact sheets, arrays for scoring, curves of the log
    4. Checkpoints    all of a run's state in one file, replaced in one go, and the folders of runs
    5. The loop       `train`; `Ranks` are its processes, `Run` its state, `Score` rates samples by fvd.py
    6. Sampling       with any number of frames, without the data
    7. The command line, its options as tables

Differs from the papers: the network predicts v, samples take 50 steps of DDIM, the average of the weights (EMA) and the
learning rate warm up, gradients are clipped, and sizes fit the device at hand. All but the EMA's warm-up are options.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shlex
import signal
import sys
import time
import traceback
import zipfile
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fvd import (UnreadableVideo, find_videos, frechet_distance, load_array, load_i3d, naming, open_videos, printable,
                 random_i3d, read_frames, video_features)  # fmt: skip
from vdm_ssm import DIM_SIZES, TEMPORAL_LAYERS, DiM, GaussianDiffusion, UNet3D, ddim, dpm_solver

try:
    import resource
except ImportError:  # Windows: the log does without the peak of memory
    resource = None


class BadInput(Exception):
    """Something the user can mend. The message says what and how; the command prints it and exits with code 2."""


def listed(names, joint=", ", most=10):
    """["a", "b"] -> "a, b", cut if there are many."""
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return joint.join([*names[:most], *more])


# -----------------------------------------------------------------------------
# 1. The maze: endless first-person videos, each from a seed
#
# An agent walks through a random maze on a grid of unit cells and looks along the
# unit vector g; p is the unit vector to its right. Point (xi, eta) of the image plane,
# at distance 1, sees the first wall on the ray position + z (g + xi p), and that wall
#
#     fills |eta| < WALL / 2z,     z = distance along g, since g and p are perpendicular.
#
# (The distance along the ray, longer at the sides, would bend straight walls: fisheye.)
# A ray sees one colour, of the sky, the floor or a wall; a pixel is the mean of SAMPLES rays.
# Source: ray casting on a grid, known from the game Wolfenstein 3D (1992).

ROOMS = 6  # rooms a side, 2 cells apart: 1,024 frames (205 cells) come back to places seen before
SPEED = 0.2  # cells a frame, 10 frames from room to room: 7 of 10 clips of 16 frames take a turn
LOOK = 0.8  # cells ahead on the path where the agent looks: it turns its head before a bend
VIEW = 0.75  # tangent of half the field of view, 74 degrees: both walls of a corridor are in sight
SAMPLES = 8  # rays a pixel: smooth edges, no flicker in walls far away
FOG = 0.08  # share of a wall's light that haze replaces, per cell of distance

# A cell of wall in the three styles, bricks, boards and checks, in light (#) and dark texels
TEXTURES = """
    #####.#####.   ######......   ######......
    #####.#####.   ######......   ######......
    ............   ######......   ######......
    ##.#####.###   ######......   ######......
    ##.#####.###   ######......   ......######
    ............   ######......   ......######
    #####.#####.   ######......   ......######
    #####.#####.   ######......   ......######
"""
TEXTURES = np.array([[list(tile) for tile in row.split()] for row in TEXTURES.split("\n")[1:-1]]) == "#"
ROWS, STYLES, TEXELS = TEXTURES.shape  # 8, 3, 12
WALL = 0.75  # height in cells, the eye at its middle: it fills at most 0.77 of the picture, as z > 0.65
SKY, HAZE, FLOOR = (100, 160, 245), (190, 205, 225), ((102, 93, 98), (72, 65, 69))  # RGB
# Light and dark tone of each style, far in hue from one another, the sky and the floor
TONES = ((222, 84, 54), (140, 40, 30)), ((250, 210, 80), (200, 136, 30)), ((80, 190, 92), (22, 108, 64))


def maze_seed(split, index):
    """Seed of video `index` of a split: "train" has the even seeds, "test" the odd ones."""
    return 2 * index + ("train", "test").index(split)


def maze_style(seed):
    """Wall style of a seed's maze, 0, 1 or 2: the video's class, as frequent in both splits."""
    return seed // 2 % STYLES


def maze_grid(rng):
    """Random maze without dead ends.    -> (g, g) bool, True in walls, g = 2 ROOMS + 1

    Rooms are the cells with two odd coordinates, pillars those with two even ones. Walls from pillar to
    pillar rise in random order. One that would close a ring, and so cut rooms off, or that would leave
    a room with a single exit is left out: every room stays in reach, and no walk has to turn back.
    """
    wall = np.pad(np.zeros((2 * ROOMS - 1, 2 * ROOMS - 1), bool), 1, constant_values=True)
    joined = np.arange(wall.size).reshape(wall.shape) * ~wall  # equal for pillars that walls join
    sides = 2 - (abs(np.arange(len(wall)) - ROOMS) == ROOMS - 1)  # one less beside the border
    exits = sides[:, None] + sides
    wall[2:-2:2, 2:-2:2] = True
    gaps = np.argwhere(~wall)
    for i, j in rng.permutation(gaps[gaps.sum(1) % 2 == 1]):  # between two pillars, and between two rooms
        a, b = i % 2, j % 2  # direction from pillar to pillar
        rooms = (i - b, i + b), (j - a, j + a)
        one, other = joined[i - a, j - b], joined[i + a, j + b]
        if one != other and exits[rooms].min() > 2:
            wall[i, j] = True
            exits[rooms] -= 1
            joined[joined == other] = one
    return wall


def maze_walk(seed, frames):
    """A maze and a walk in it.    -> wall (g, g), position (f, 2) in cells, gaze (f, 2) of length 1

    The path is the uniform quadratic B-spline of the visited cells' centres: straight in corridors, a
    smooth bend in turns, and always half a cell or more from any wall.
    """
    rng = np.random.default_rng(seed)
    wall = maze_grid(rng)
    s = 1 + 2 * rng.random() + SPEED * np.arange(frames) + np.array([[0], [LOOK]])  # (2, f) places on it
    i, j = 1 + 2 * rng.integers(ROOMS, size=2)
    a, b, cells = 0, 0, []
    while len(cells) < s.max() + 2:
        steps = (0, 1), (1, 0), (0, -1), (-1, 0)
        ways = [way for way in steps if not wall[i + way[0], j + way[1]] and way != (-a, -b)]
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
    x, y = maze_walk(seed, frames)[2].T
    angle = np.unwrap(np.arctan2(y, x))
    return np.diff(angle, prepend=angle[:1]).astype(np.float32)


def maze_cast(wall, position, ray):
    """First wall across axis 0.    position (2, 1, f, 1, 1), ray (2, n, f, 1, w) -> its z (n, f, 1, w)

    A ray enters a cell only where it crosses a grid line: all lines of the axis are tried at once.
    """
    line = np.arange(len(wall)).reshape(-1, 1, 1, 1, 1)
    z = (np.float32(line) - position[0]) / ray[0]  # (g, n, f, 1, w)
    # Beyond the border the index would leave the grid, but there the border has stopped the ray before.
    along = np.clip(position[1] + z * ray[1], 0, len(wall) - 1).astype(np.int32)
    return np.where(wall[line - (ray[0] < 0), along] & (z > 0), z, np.inf).min(0)


def maze_palette(style):
    """What a ray can see, row by row: sky, wall, floor.    -> (3, 10, 24) RGB; the right half is in shade"""
    palette = np.empty((1 + ROWS + 1, 2 * TEXELS, 3), np.float32)
    wall = np.where(TEXTURES[:, style, :, None], *TONES[style])
    palette[0], palette[1:-1] = SKY, np.concatenate([wall, 0.8 * wall], axis=1)
    palette[-1, ::2], palette[-1, 1::2] = FLOOR  # tiles
    return np.moveaxis(palette, -1, 0)


def maze_render(wall, position, gaze, style, size):
    """Views of a maze.    wall (g, g), position, gaze (f, 2) -> (f, size, size, 3) uint8 RGB"""
    # The n samples of a pixel share no row and no column: an edge of any slope has n shades.
    inside = (np.outer((1, 3), np.arange(SAMPLES))[..., None] % SAMPLES + 0.5) / SAMPLES  # (2, n, 1)
    xi, eta = np.float32(VIEW * (2 * (np.arange(size) + inside) / size - 1))  # (n, size), right and down
    xi, eta = xi[:, None, None], eta[:, None, :, None]  # (n, 1, 1, w), (n, 1, h, 1)
    position, gaze = np.float32((position.T, gaze.T))[:, :, None, :, None, None]  # (2, 1, f, 1, 1)
    ray = gaze + xi * np.stack([gaze[1], -gaze[0]])  # (2, n, f, 1, w)
    ray[ray == 0] = 1e-6  # along a grid line, which is then met far away and not at 0 / 0
    z0, z1 = maze_cast(wall, position, ray), maze_cast(wall.T, position[::-1], ray[::-1])
    z = np.minimum(z0, z1)
    # Walls lie on grid lines: x + y counts along them. Those across axis 1 are in shade: corners show.
    column = (TEXELS * (position + z * ray).sum(0)).astype(np.int32) % TEXELS + TEXELS * (z1 < z0)
    row = np.clip(1 + ROWS * (0.5 + z * eta / WALL), 0, ROWS + 1).astype(np.int32)  # (n, f, h, w)
    depth = np.minimum(z, WALL / 2 / np.abs(eta))
    x, y = (2 * (position + depth * ray)).astype(np.int32)  # floor tiles are half a cell wide
    seen = 2 * TEXELS * row + np.where(row > ROWS, (x ^ y) & 1, column)  # index in the palette
    clear, colours = 1 / (1 + FOG * depth), zip(maze_palette(style), HAZE)  # the rest of the light is haze
    video = np.stack([haze + (clear * (rgb - haze).take(seen)).mean(0) for rgb, haze in colours], -1)
    return (video + 0.5).astype(np.uint8)  # the cast rounds down


def maze_video(seed, frames, size):
    """Walk through a maze of its own.    seed >= 0 -> (frames, size, size, 3) uint8 RGB

    More frames of a seed continue the same walk; time is linear in them and memory is the result's.
    """
    wall, position, gaze = maze_walk(seed, frames)
    video = np.empty((frames, size, size, 3), np.uint8)
    chunk = max(1, 2**12 // size**2)  # frames at once: their samples stay in the cache
    for part in (slice(k, k + chunk) for k in range(0, frames, chunk)):
        video[part] = maze_render(wall, position[part], gaze[part], maze_style(seed), size)
    return video


class MazeVideos(Dataset):
    """Walk `i` of the endless maze.    [i] -> (3, frames, size, size) in [-1, 1], index in `classes`: its wall style"""

    fingerprint, skipped, classes = "maze", [], ("bricks", "boards", "checks")

    def __init__(self, split, frames, size, seed=0):
        self.split, self.frames, self.size, self.first = split, frames, size, seed * 2**32

    def __getitem__(self, i):
        seed = maze_seed(self.split, self.first + i)
        return to_model_range(maze_video(seed, self.frames, self.size)), maze_style(seed)

    def __str__(self):
        return f"endless walks through mazes, drawn as they are needed ({self.split} seeds)"


# -----------------------------------------------------------------------------
# 2. Folders
#
# Decoding takes longer than training. So every file is decoded once, brought to size (short side to `size`, centre
# crop) and kept as a flat file of uint8 frames, a memory map: larger sets than memory train. Windows of consecutive
# frames are drawn at random, every video once per epoch.
#
#     file --decode--> KEY.u8, the frames of its videos, then KEY.json, which describes them
#
# The key is made of all that the frames depend on, and each file appears whole, by a rename. So a killed build goes on
# with what is missing, and processes and runs build one cache together: two may decode a file, to equal frames.

SPLIT_LISTS = "video_{}.csv", "ucfTrainTestlist/{}list01.txt"  # of CARLA Town01 and UCF101


def find_splits(path):
    """Sources of videos at or below a path, by split.    -> {"all": list of Path, maybe "train": ..., "test": ...}

    A folder has splits if it holds folders train/ and test/ (MineRL Navigate, GQN-Mazes), or if lists of its videos'
    names lie in it, beside it or one level below (CARLA, UCF101). Of a listed path only the last part counts, in any
    case of letters; what is listed but missing stays in the split, to be skipped by its name. Raises UnreadableVideo.
    """
    path, parts = Path(path), ("train", "test")
    splits = {"all": find_videos(path)}
    if all((path / part).is_dir() for part in parts):
        return splits | {p: [s for s in splits["all"] if s.relative_to(path).parts[:1] == (p,)] for p in parts}
    here = {source.name.lower(): source for source in splits["all"]}
    folders = [path, path.parent, *sorted(path.glob("*/"))] if path.is_dir() else []
    for folder, pattern in itertools.product(folders, SPLIT_LISTS):
        lists = [folder / pattern.format(part) for part in parts]
        if all(file.is_file() for file in lists):
            names = [re.findall(r"[^/\\,\s]+\.(?:pt|avi)\b", file.read_text(errors="replace")) for file in lists]
            if any(name.lower() in here for name in sum(names, [])):
                return splits | {p: [here.get(n.lower(), path / n) for n in ns] for p, ns in zip(parts, names)}
    return splits


def to_model_range(video):
    """uint8 (f, h, w, c) in 0..255 -> float (c, f, h, w) in [-1, 1]; floats, which are latents, keep their values"""
    x = rearrange(torch.from_numpy(np.array(video)), "f h w c -> c f h w")
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float()


def resize(frames, size, antialias=True):
    """Short side to `size`, bilinear, then centre crop.    uint8 (f, h, w, 3) -> uint8 (f, size, size, 3)

    The papers do it without antialias. Their float pixels are rounded here: 0.5 / 255 is lost at most.
    """
    h, w = frames.shape[1:3]
    if (h, w) == (size, size):
        return frames
    x = rearrange(torch.from_numpy(frames), "f h w c -> f c h w").float()
    x = F.interpolate(x, (size * h // min(h, w), size * w // min(h, w)), mode="bilinear", antialias=antialias)
    frames = rearrange(x.round().clamp(0, 255).byte(), "f c h w -> f h w c").numpy()
    top, left = (round((side - size) / 2) for side in frames.shape[1:3])  # torchvision's rounding: 2.5 to 2, 5.5 to 6
    return frames[:, top : top + size, left : left + size]


def resized_frames(video, size, antialias, batch=64):
    """Decode a video a few frames at a time.    -> yields uint8 (<= batch, size, size, 3)"""
    frames = read_frames(video)
    while chunk := list(itertools.islice(frames, batch)):
        yield resize(np.stack(chunk), size, antialias)


class VideoCache(Dataset):
    """Frames of every source, decoded once.    [i] -> description of source i, or a BadInput

    A description is {"videos": [frames, ...], "skipped": [[name, reason], ...], "bytes": size of the file of frames,
    "content": digest of the frames}. A source without a usable video leaves none, and is tried again by the next run.
    """

    def __init__(self, folder, sources, size, antialias=True):
        self.folder, self.sources, self.size, self.antialias = folder, sources, size, antialias
        self.keys = [folder / digest(size, antialias, str(source.resolve()), state(source)) for source in sources]
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob("*.part"):  # by a process that was killed
            with contextlib.suppress(FileNotFoundError):  # or by one that renames it just now
                if time.time() - left.stat().st_mtime > 24 * 3600:
                    left.unlink()

    def file(self, i):
        """Where the frames of source i are."""
        return self.keys[i].with_suffix(".u8")

    def frames(self, i):
        """All frames of source i, one video after another, memory-mapped.    -> uint8 (n, size, size, 3)"""
        path = str(self.file(i))  # a Path would be resolved, which takes longer than reading a window
        return np.memmap(path, dtype=np.uint8, mode="r").reshape(-1, self.size, self.size, 3)

    def decode(self, i):
        """Write the frames of source i.    -> description. Raises UnreadableVideo, BadInput"""
        videos, skipped = [], []

        def write(path):
            with open(path, "wb") as out:
                for video in open_videos(self.sources[i]):
                    start = out.tell()
                    try:
                        for frames in resized_frames(video, self.size, self.antialias):
                            out.write(frames.tobytes())
                        videos.append((out.tell() - start) // (self.size**2 * 3))
                    except UnreadableVideo as error:
                        skipped.append([error.name, error.reason])
                        out.seek(start)
                        out.truncate()
            if not videos:
                raise UnreadableVideo(*skipped[0])

        write_whole(self.file(i), write)
        return {"videos": videos, "skipped": skipped, "bytes": self.file(i).stat().st_size}

    def known(self, i):
        """The description of source i if its frames are intact, else None."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            description = json.loads(self.keys[i].with_suffix(".json").read_text())
            if self.file(i).stat().st_size == description["bytes"] and description["content"]:
                return description

    def __getitem__(self, i):
        try:
            if known := self.known(i):  # by now, perhaps: another process may build the same cache
                return known
            description = self.decode(i) | {"content": digest_of_frames(self.frames(i))}
            write_whole(self.keys[i].with_suffix(".json"), lambda path: path.write_text(json.dumps(description)))
            return description
        except UnreadableVideo as error:
            return {"videos": [], "skipped": [[error.name, error.reason]]}
        except BadInput as error:  # returned, since a loader's process would wrap it in a traceback
            return error

    def build(self, workers):
        """Decode what is missing, in several processes.    -> the descriptions of all sources"""
        found = [self.known(i) for i in range(len(self.sources))]
        missing = [i for i, description in enumerate(found) if description is None]
        np.random.default_rng().shuffle(missing)  # so that processes that build one cache share the work
        loader = DataLoader(self, batch_size=None, sampler=missing, num_workers=workers if len(missing) > 1 else 0,
                            generator=torch.Generator())  # fmt: skip
        for description, i in zip(tqdm(loader, desc="decoding", unit="file", disable=not missing), missing):
            if isinstance(description, BadInput):
                raise description
            found[i] = description
        return found


class LatentFiles(VideoCache):
    """Float arrays (f, size, size, channels) as they are: all that is cached is that they were checked."""

    def __init__(self, folder, sources, size, channels):
        super().__init__(folder, sources, size)
        self.channels = channels

    def file(self, i):
        return self.sources[i]

    def frames(self, i):
        return open_latents(self.sources[i])

    def decode(self, i):
        """Read source i, to be sure of its values.    -> description. Raises UnreadableVideo"""
        array = open_latents(self.sources[i])
        with naming(printable(self.sources[i])):
            if array.shape[2:] != (self.size, self.channels):
                raise ValueError(f"shape {array.shape} is not (frames, {self.size}, {self.size}, {self.channels})")
            if not all((np.abs(frame) <= np.finfo(np.float32).max).all() for frame in array):
                raise ValueError("it holds NaN or infinite values")
        return {"videos": [len(array)], "skipped": [], "bytes": self.file(i).stat().st_size}


def open_latents(source):
    """Latents of a video, memory-mapped if the file is .npy.    -> float (f, s, s, c). Raises UnreadableVideo"""
    with naming(printable(source)):
        array = load_array(source)
        if array.dtype.kind != "f" or array.ndim != 4 or array.shape[1] != array.shape[2] or 0 in array.shape:
            raise ValueError(f"{array.dtype} of shape {array.shape}; latents are float (frames, size, size, channels)")
        return array


def latent_shape(path):
    """Size and channels of the latents at or below a path, by the first that can be read. Raises BadInput."""

    def readable(source):
        with contextlib.suppress(UnreadableVideo):
            return open_latents(source) is not None

    try:
        sources = find_videos(path)
        return open_latents(next(filter(readable, sources), sources[0])).shape[2:]
    except UnreadableVideo as error:
        raise BadInput(f"--data {error}") from error


def state(source):
    """Changes when a file, or a file of a folder of images, is replaced or touched.    -> list"""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def digest(*facts):
    """Short name of anything that JSON can hold.    -> 16 hex digits"""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def digest_of_frames(frames):
    """The same for the same numbers, wherever they are stored.    (n, ...) -> 64 hex digits"""
    content = hashlib.sha256()
    for frame in frames:
        content.update(np.ascontiguousarray(frame))
    return content.hexdigest()


@lru_cache(maxsize=2)
def epoch_order(seed, epoch, n):
    """The order of n videos in an epoch.    -> (n)"""
    return np.random.default_rng([seed, epoch]).permutation(n)


class FolderVideos(Dataset):
    """Random windows of the videos below a path.    [i] -> (c, frames, size, size), index of its class

    Window i is the same in every run with the same seed. A video's class is the name of its folder. Pixels are in
    [-1, 1]; `channels` tells that the files hold latents, which keep their values. split: "train", "test" or "all", by
    default "train" if there is one (`find_splits`). test: not the videos to train on, but those to compare with: the
    data set's test split if "train" is trained on, else `held_out` videos, drawn by the seed. Raises BadInput if no
    video is long enough, or too few are.
    """

    def __init__(self, path, frames, size, cache, seed, split=None, test=False, held_out=0, antialias=True,
                 channels=None, workers=0):  # fmt: skip
        self.path, self.frames, self.seed = path, frames, seed
        try:
            splits = find_splits(path)
        except UnreadableVideo as error:
            raise BadInput(f"--data {error}") from error
        split = split or ("train" if "train" in splits else "all")
        if split not in splits:
            raise BadInput(f"--split {split}: {path} has neither folders train/ and test/ nor the lists of CARLA or "
                           "UCF101: leave --split out, to take all videos")  # fmt: skip
        if split == "train":  # then the data set has a test split to compare with
            split, test, held_out = "test" if test else "train", False, 0
        sources = splits[split]
        folder = cache / f"{re.sub('[^A-Za-z0-9_-]', '_', Path(path).stem)[:64]}-{size}px"
        kind, detail = (LatentFiles, channels) if channels else (VideoCache, antialias)
        self.cache = kind(folder, sources, size, detail)
        descriptions = self.cache.build(workers)
        self.skipped = [skipped for description in descriptions for skipped in description["skipped"]]
        contents = [[os.path.relpath(s, path), d.get("content")] for s, d in zip(sources, descriptions)]
        self.fingerprint = digest(size, antialias, contents)
        self.classes = tuple(sorted({source.parent.name for source in sources}))
        videos = self.usable([description["videos"] for description in descriptions])
        if len(videos) <= held_out:
            raise BadInput(f"--eval-videos {held_out} leaves none of the {len(videos)} usable videos for training")
        order = np.random.default_rng(seed).permutation(len(videos))
        self.videos = videos[np.sort(order[:held_out] if test else order[held_out:])]

    def usable(self, lengths):
        """Videos that are long enough, of each source's lengths.    -> (n, 4): source, first frame, frames, class"""
        sources = self.cache.sources
        videos = np.array([
            (i, start, length, self.classes.index(sources[i].parent.name))
            for i, parts in enumerate(lengths) for start, length in zip(np.cumsum([0, *parts]), parts)
        ])  # fmt: skip
        if len(videos) == 0:
            why = self.why_skipped()
            raise BadInput(f"--data {self.path}: none of its {len(sources)} files is a usable video{why}")
        longest, enough = videos[:, 2].max(), videos[:, 2] >= self.frames
        if longest < self.frames:
            raise BadInput(f"--frames {self.frames} is more than any video of {self.path} has: at most {longest}")
        self.too_short = int((~enough).sum())
        return videos[enough]

    def why_skipped(self):
        """One line per file that could not be read, each after a line break."""
        return listed(["", *(f"{name}: {reason}" for name, reason in self.skipped)], "\n    ")

    def __getitem__(self, i):
        epoch, k = divmod(i, len(self.videos))
        source, start, length, label = self.videos[epoch_order(self.seed, epoch, len(self.videos))[k]].tolist()
        start += np.random.default_rng([self.seed, epoch, k]).integers(length - self.frames + 1)
        try:
            return to_model_range(self.cache.frames(source)[start : start + self.frames]), label
        except (OSError, ValueError) as error:
            raise BadInput(f"{self.cache.file(source)} was changed or removed: go on with --resume") from error

    def __str__(self):
        short = f", {self.too_short} shorter than {self.frames} frames left out" if self.too_short else ""
        skipped = f", {len(self.skipped)} unreadable (named at the end)" if self.skipped else ""
        kept = f"{len(self.videos)} videos, {self.videos[:, 2].sum():,} frames, of {self.path}"
        return f"{kept}{short}{skipped}, cached in {self.cache.folder}"


# -----------------------------------------------------------------------------
# 3. Pictures


def to_numpy(videos, latents=False):
    """(b, c, f, h, w) in [-1, 1] -> uint8 (b, f, h, w, c) in 0..255; of latents their values, float32"""
    x = rearrange(videos.float(), "b c f h w -> b f h w c")
    return (x if latents else ((x + 1) * 127.5).round().clamp(0, 255).byte()).cpu().numpy()


def enlarge(picture, target):
    """Repeat pixels until a frame is about `target` wide.    (..., h, w, c) -> (..., s h, s w, c)"""
    s = max(1, target // picture.shape[-2])
    return picture.repeat(s, axis=-2).repeat(s, axis=-3)


def write_sheet(path, videos, columns=16):
    """Contact sheet: a row per video, time from left to right.    uint8 (b, f, h, w, 3)"""
    shown = np.linspace(0, videos.shape[1] - 1, min(columns, videos.shape[1])).round().astype(int)
    cells = np.pad(enlarge(videos[:, shown], 64), ((0, 0), (0, 0), (0, 4), (0, 4), (0, 0)), constant_values=255)
    picture = rearrange(cells, "b f h w c -> (b h) (f w) c")
    write_whole(path, lambda temporary: iio.imwrite(temporary, picture, extension=".png"))


def write_gif(path, videos, fps):
    """All videos side by side.    uint8 (b, f, h, w, 3), fps frames a second"""
    rows = math.ceil(math.sqrt(len(videos)))
    blank = np.zeros_like(videos[:1]).repeat(-len(videos) % rows, axis=0)
    grid = np.concatenate([enlarge(videos, 96), enlarge(blank, 96)])
    picture = rearrange(grid, "(r s) f h w c -> f (r h) (s w) c", r=rows)
    write = partial(iio.imwrite, image=picture, extension=".gif", duration=1000 / fps, loop=0)
    write_whole(path, write)


def write_npz(path, videos):
    """Array of videos."""
    with open(path, "wb") as file:  # given a name, NumPy would change it
        np.savez_compressed(file, videos=videos)


def read_log(run):
    """Lines of a run's log, but for what a kill cut off.    -> list of dict. Raises BadInput"""
    lines = []
    try:
        for text in Path(run, "log.jsonl").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):  # half, foreign
                line = json.loads(text)
                lines.append(line | {"step": int(line["step"])})
    except OSError as error:
        raise BadInput(f"{run} has no log.jsonl that can be read: give the folder of a run ({error})") from error
    return lines


def curve(lines, key):
    """What lines of a log say under a name.    -> steps (n), values (n) or (n, m), nan where there is none"""
    lines = [line for line in lines if key in line]
    return np.array([line["step"] for line in lines]), np.array([line[key] for line in lines], dtype=float)


def smooth(values, width):
    """Running mean over `width` values, fewer at the ends, that leaves out nan.    (n) -> (n)"""
    total, count = (np.convolve(x, np.ones(width))[width // 2 :][: len(x)]  # "same" would stretch short runs
                    for x in (np.nan_to_num(values), np.isfinite(values)))  # fmt: skip
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def plot(args):
    """Draw curves of runs side by side: loss, loss by noise level, gradient norm, and scores or else speed."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise BadInput("plot draws with matplotlib: pip install matplotlib") from error
    pyplot.switch_backend("agg")  # no window
    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8), layout="constrained")
    logs = [read_log(run) for run in args.runs]
    for run, log in zip(args.runs, logs):
        if not any("loss" in line for line in log):
            raise BadInput(f"{run} has logged no step yet: wait for it, or leave it out")
    scores = [name for name in ("FVD", "FD-random") if any(name in line for log in logs for line in log)]
    titles = "loss", "loss by noise level", "norm of the gradient", " and ".join(scores) or "videos per second"
    for axis, title in zip(axes.flat, titles):
        axis.set(title=title, xlabel="step", yscale="linear" if axis is axes[1, 1] else "log")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    for i, (run, log) in enumerate(zip(args.runs, logs)):
        color, width = f"C{i}", max(1, len(log) // 50)
        for axis, key in ((axes[0, 0], "loss"), (axes[1, 0], "grad_norm")):
            steps, values = curve(log, key)
            axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.7)
            axis.plot(steps, smooth(values, width), color=color, label=run)
        steps, levels = curve(log, "loss_by_noise")
        quarters = "least noise", "second quarter", "third quarter", "most noise"
        for k, (values, quarter) in enumerate(zip(levels.T, quarters)):
            axes[0, 1].plot(steps, smooth(values, 2 * width), ("-", "--", "-.", ":")[k], color=color, alpha=1 - 0.2 * k,
                            label=None if i else quarter)  # fmt: skip
        for name in scores:
            axes[1, 1].plot(*curve(log, name), "o-", color=color, fillstyle="full" if name == "FVD" else "none",
                            label=f"{run}, {name}")  # fmt: skip
        if not scores:
            axes[1, 1].plot(*curve(log, "videos_per_second"), color=color, label=run)
    for axis in axes.flat:
        axis.legend(frameon=False)
    out = Path(args.out or Path(args.runs[0], "curves.png"))
    figure.savefig(out, dpi=120, format="png")
    pyplot.close(figure)
    print(f"wrote {out}")


# -----------------------------------------------------------------------------
# 4. Checkpoints
#
# A run that stops must go on as if it had not: weights, their average, the optimiser and the step are stored together.
# The state of a random generator is not, since there is none that outlives an item: (seed, item) determines video,
# window, diffusion step, noise and hidden class of every item, whichever process draws them. The file is written under
# another name and then renamed, which a file system does at once or not at all: a killed run leaves the old checkpoints
# or a new one more, never half of one.


def write_whole(path, write):
    """Call write(temporary path), then, once it is on the disk, rename it to `path`. Raises BadInput if that fails."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # a pid may be another machine's, too
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        why = error if isinstance(error, OSError) else f"is the disk full? {error}"
        raise BadInput(f"{path} cannot be written ({why}); what it held before is intact") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def step_in(path):
    """The step in the name of a checkpoint or of samples; -1 for other files."""
    found = re.fullmatch(r"(?:checkpoint|step)-(\d+)\.(?:pt|gif|png|npz)", path.name)
    return int(found[1]) if found else -1


def checkpoints(run):
    """Paths of a run's checkpoints, the newest first."""
    return sorted((path for path in Path(run).glob("*.pt") if step_in(path) >= 0), key=step_in, reverse=True)


def out_folder(args):
    """Where a run is written, if it has no number."""
    return Path(args.out or Path("runs", Path(args.data).stem or "videos"))


def numbered(base):
    """base, base-2, base-3, ..."""
    return (base if i == 1 else base.with_name(f"{base.name}-{i}") for i in itertools.count(1))


def check_out(out, data):
    """Raise BadInput if what is written to a folder would become data."""
    if data != "maze" and Path(data) in Path(out, "inside").resolve().parents:
        raise BadInput(f"--out {out} lies in --data, and its samples would become data: choose another folder")


def claim(args):
    """Make the run's folder and in it the log, which marks it as taken: no two runs share one.    -> Path"""
    for out in numbered(out_folder(args)):
        (out / "samples").mkdir(parents=True, exist_ok=True)
        try:
            open(out / "log.jsonl", "x").close()
            return out
        except FileExistsError:
            if args.out:  # another run has taken it since `complete` looked
                raise


def run_folder(path):
    """The run that a folder or a checkpoint in it belongs to."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def load_checkpoint(run):
    """A run's folder or one of its checkpoints -> dict on the CPU. Raises BadInput, naming the checkpoint before it."""
    path = next(iter(checkpoints(run)), None) if Path(run).is_dir() else Path(run)
    if not (path and path.exists() or path in checkpoints(run_folder(run))):  # a link in a run may lead nowhere
        what = "holds no checkpoint" if Path(run).is_dir() else "does not exist"
        raise BadInput(f"{run} {what}: give the folder of a run that has written one")
    try:
        with zipfile.ZipFile(path) as file:  # torch.load compares no checksums
            if broken := file.testzip():
                raise ValueError(broken)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        kinds = dict(args=dict, step=int, per_step=int, data=str, torch=str, model=dict, ema=dict, optimizer=dict)
        if wrong := [key for key, kind in kinds.items() if not isinstance(checkpoint[key], kind)]:
            raise TypeError(wrong)
        return {"path": path} | {key: checkpoint[key] for key in kinds}
    except Exception as error:  # zip, pickle and torch share no narrower class
        raise damaged(path, f"is not a checkpoint of train.py, or is damaged ({type(error).__name__})") from error


def damaged(path, what):
    """A BadInput that names a checkpoint, says what is wrong with it and offers the one before it."""
    before = [p for p in checkpoints(path.parent) if step_in(p) < step_in(path)]
    mend = f"; go on from the one before it: --resume {shlex.quote(str(before[0]))}" if before else ""
    return BadInput(f"{path} {what}{mend}")


def restore(checkpoint, **parts):
    """Load the states of modules and optimisers, given by their names in the checkpoint. Raises BadInput."""
    for name, thing in parts.items():
        try:
            thing.load_state_dict(checkpoint[name])
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged(checkpoint["path"], f"holds a {name} that does not fit its arguments") from error


def rewind(out, step):
    """Take back what a run wrote after a step, now to be written again.    -> steps that have a score

    Later checkpoints are set aside as .old; later samples, lines of the log and half-written files are removed.
    """
    (out / "samples").mkdir(exist_ok=True)
    for path in checkpoints(out):
        if step_in(path) > step:
            path.rename(path.with_suffix(".old"))
    for path in [*out.glob("samples/*"), *out.glob("*.part")]:
        if step_in(path) > step or path.suffix == ".part":
            path.unlink()
    kept = [line for line in read_log(out) if line["step"] <= step] if (out / "log.jsonl").exists() else []
    text = "".join(json.dumps(line) + "\n" for line in kept)
    write_whole(out / "log.jsonl", lambda temporary: temporary.write_text(text))
    return {line["step"] for line in kept if "loss" not in line}


# -----------------------------------------------------------------------------
# 5. The loop
#
# `torchrun` starts this file once per GPU. The processes, ranks, hold the same weights, each takes its share of every
# batch, and DistributedDataParallel averages their gradients. Since no random number depends on who draws it, N ranks
# train as one does with N times the batch.


CORES = min(8, os.cpu_count() or 1)  # processes that prepare data


class Ranks:
    """The processes of a run, of which this is one: number `rank` of `size`, computing on `device`.

    Rank 0 is `main`: it alone writes and prints. `here` ranks are on this machine. Without torchrun there is one rank.
    Raises BadInput if the device cannot be shared out.
    """

    def __init__(self, device):
        variables = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)  # set by torchrun
        foreign = BadInput(f"{', '.join(name for name, _ in variables)}: some are set, but not by torchrun: unset them")
        try:
            self.rank, self.size, local, self.here = (int(os.environ.get(*variable)) for variable in variables)
        except ValueError as error:
            raise foreign from error
        self.main, self.device = self.rank == 0, torch.device(device)
        if self.size == 1:
            return
        if device not in ("cpu", "cuda"):
            raise BadInput(f"--device {device} cannot be shared by {self.size} processes: give cuda or cpu")
        if device == "cuda":
            if local >= torch.cuda.device_count():
                raise BadInput(f"there are {torch.cuda.device_count()} GPUs: give torchrun no more --nproc_per_node")
            self.device = torch.device("cuda", local)
            torch.cuda.set_device(self.device)
        # A rank that dies is noticed at once; the timeout is for a rank 0 that decodes videos for hours.
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=timedelta(days=1))
        except ValueError as error:  # other variables are missing
            raise foreign from error
        if not self.main:
            sys.stdout = open(os.devnull, "w")

    def wrap(self, model):
        """The model, with gradients that are means over all ranks."""
        return DistributedDataParallel(model, gradient_as_bucket_view=True) if self.size > 1 else model

    def gather(self, x):
        """The tensors of all ranks, on the CPU.    (...) -> (ranks, ...)"""
        x = x.cpu().contiguous()
        xs = [x] if self.size == 1 else [torch.empty_like(x) for _ in range(self.size)]
        if self.size > 1:
            dist.all_gather(xs, x)
        return torch.stack(xs)

    def any(self, flag):
        """Whether the flag of any rank is set. All ranks wait here for each other."""
        return self.gather(torch.tensor(int(bool(flag)))).any().item()

    def share(self, count, compute):
        """compute(items) -> a row per item, for items 0 ... count - 1 shared out.    -> (count, ...) in every rank"""
        each = math.ceil(count / self.size)
        # Every rank has as many, though some items come twice: tensors of one shape can be gathered.
        items = [i % count for i in range(self.rank * each, (self.rank + 1) * each)]
        return self.gather(torch.as_tensor(compute(items))).flatten(0, 1)[:count]

    def main_first(self, make):
        """make() in rank 0, then in the others, which find what it has put on the disk."""
        made = make() if self.main else None
        self.any(False)
        return made if self.main else make()

    def from_main(self, make):
        """What make() returns in rank 0, the only one to call it."""
        made = [make() if self.main else None]
        if self.size > 1:
            dist.broadcast_object_list(made, device=torch.device("cpu"))
        return made[0]

    def close(self):
        """End of the run, for all ranks at once."""
        if self.size > 1:
            dist.destroy_process_group()


def generators(seed, items, device="cpu"):
    """A random generator for each item, so that its numbers do not depend on what is drawn together with it."""
    seeds = [int(np.random.SeedSequence([seed, i]).generate_state(1, np.uint64)[0]) for i in items]
    return [torch.Generator(device).manual_seed(s) for s in seeds]


def randn(shape, rngs):
    """Normal noise, each row by its own generator.    -> (len(rngs), *shape)"""
    return torch.stack([torch.randn(shape, generator=rng, device=rng.device) for rng in rngs])


def randint(high, rngs):
    """Whole numbers below `high`, each by its own generator.    -> (len(rngs))"""
    return torch.stack([torch.randint(high, (), generator=rng, device=rng.device) for rng in rngs])


def peak_memory(device):
    """The most memory this process has held, in MiB: the GPU's if it computes there. None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss
    return resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def make_model(args):
    """The network that a run's arguments describe."""
    common = dict(channels=args.channels, cond_dim=len(args.classes) or None, recompute=args.recompute)
    if args.backbone == "dim":
        return DiM(args.patch, args.width, args.depth, **common)
    return UNet3D(args.dim, tuple(args.dim_mults), args.heads, temporal=args.temporal, **common)


def compile_network(model):
    """torch.compile in place: names of weights stay. With --recompute, block by block inside their checkpoints."""
    blocks = [block for block in model.modules() if "forward" in vars(block)]  # what `recompute` has wrapped
    for block in blocks:
        wrapped = block.forward
        block.forward = partial(wrapped.func, torch.compile(wrapped.args[0], dynamic=False), **wrapped.keywords)
    if not blocks:
        model.compile(dynamic=False)


def make_data(args, test=False):
    """The data set that a run's arguments describe; `test`: the videos that its samples are compared with."""
    if args.data == "maze":
        return MazeVideos("test" if test else "train", args.frames, args.size, args.seed)
    held_out = args.eval_videos if args.eval_every else 0
    workers = CORES if args.workers is None else args.workers
    cache = out_folder(args).parent / "cache"
    return FolderVideos(args.data, args.frames, args.size, cache, args.seed, args.split, test, held_out, args.antialias,
                        args.channels if args.latents else None, workers)  # fmt: skip


def one_hot(args, labels, device):
    """Classes as the network takes them, None if it takes none.    labels (b) integers -> (b, classes)"""
    return F.one_hot(torch.as_tensor(labels), len(args.classes)).float().to(device) if args.classes else None


def average_weights(decay):
    """EMA that is a plain average at first: step k keeps min(decay, (1 + k) / (10 + k)) of the average."""

    def update(averages, weights, k):
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + float(k)) / (10 + float(k))))

    return update


def stop_on_signal():
    """Let Ctrl-C and SIGTERM end the run after the current step, a second one at once.    -> list, empty until then"""
    stop = []

    def interrupt(number, _):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)
        print("stopping after this step; once more stops at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    return stop


def ignore_signals(worker):
    """Let a loader's process live through what a terminal or torchrun sends to all: the run ends it after its step."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def train(args, checkpoint=None):
    """The training loop, from the start or from a checkpoint."""
    run = Run(args, checkpoint)
    device, model, optimizer = run.ranks.device, run.model, run.optimizer
    wrapped = run.ranks.wrap(model)
    diffusion = GaussianDiffusion(wrapped, steps=args.diffusion_steps, target=args.target).to(device)
    batches, stop = run.batches(), stop_on_signal()
    if checkpoint:
        run.show()
    began, start = run.step, time.time()
    while run.step < args.steps and not run.ranks.any(stop):
        for k in range(args.grad_accum):
            items, (x0, labels) = next(batches)
            x0, rngs = x0.to(device, non_blocking=True), generators(args.seed, items, device)
            t, eps = randint(args.diffusion_steps, rngs), randn(x0.shape[1:], rngs)
            cond, keep = one_hot(args, labels, device), randint(10**6, rngs) >= 10**6 * args.cond_drop
            wrapped.require_backward_grad_sync = k == args.grad_accum - 1  # ranks meet once a step
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                loss = diffusion.losses(x0, t, eps, cond, keep)  # (b)
            (loss.mean() / args.grad_accum).backward()
            run.losses.append(torch.stack([t, loss.detach()]))
        run.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf))
        run.step += 1
        for group in optimizer.param_groups:
            group["lr"] = run.rate(run.step)
        optimizer.step()
        optimizer.zero_grad()
        run.ema.update_parameters(model)
        run.bar.update()
        if run.step % 10 == 0 or run.step == began + 10:
            run.flush()
        if run.step == began + 10:  # flush has waited for the device
            minutes = (args.steps - run.step) * (time.time() - start) / 10 / 60
            run.bar.write(f"time        about {minutes:.1f} more minutes, and the samples")
        if any(map(run.due, (args.save_every, args.sample_every, args.eval_every))):
            run.save()
            run.show()
    if run.step < args.steps:
        run.save()
    run.conclude()
    del wrapped, diffusion  # DistributedDataParallel, freed after its processes have parted, may wait for ever
    run.ranks.close()


class Run:
    """A training run: its state, and what it writes. `train` is its loop. Raises BadInput."""

    def __init__(self, args, checkpoint=None):
        self.args, self.ranks, self.step = args, Ranks(args.device), 0
        self.per_step = args.batch * args.grad_accum * self.ranks.size  # videos
        torch.manual_seed(args.seed)
        self.data = self.ranks.main_first(lambda: make_data(args))
        args.classes = list(self.data.classes) if args.class_cond else []
        if len(args.classes) == 1:
            raise BadInput(f"--class-cond needs two classes or more, a folder each: all are in {args.classes[0]}")
        # Kernels lie as activations do: 5 % faster, and their gradients fit the buckets of DistributedDataParallel.
        self.model = make_model(args).to(self.ranks.device, memory_format=torch.channels_last)
        self.ema = AveragedModel(self.model, multi_avg_fn=average_weights(args.ema))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=args.lr, fused=True)  # 3.5x faster on a CPU
        self.score = Score(args, self.ranks) if args.eval_every else None
        if checkpoint:
            self.go_on(checkpoint)
        self.out = Path(args.out) if checkpoint else self.ranks.from_main(lambda: claim(args))
        args.out = str(self.out)
        self.scored = self.ranks.from_main(lambda: rewind(self.out, self.step))
        self.log = open(self.out / "log.jsonl" if self.ranks.main else os.devnull, "a", buffering=1)  # line by line
        self.announce()
        if args.compile:
            torch._dynamo.config.recompile_limit = 64  # every block has a shape of its own
            compile_network(self.model)
        self.bar = tqdm(total=args.steps, initial=self.step, unit="step", smoothing=0.05, disable=not self.ranks.main)
        self.losses, self.norms, self.clock = [], [], time.time()  # since the last flush

    def go_on(self, checkpoint):
        """Take over the state in a checkpoint, unless data or ranks would make it another run."""
        args = self.args
        if (checkpoint["data"], checkpoint["args"]["classes"]) != (self.data.fingerprint, args.classes):
            raise BadInput(f"{args.data} no longer holds the videos of this run: restore them, or start a new run")
        if checkpoint["per_step"] != self.per_step:
            product = f"--batch {args.batch} x --grad-accum {args.grad_accum} x processes is {self.per_step}"
            raise BadInput(f"this run takes {checkpoint['per_step']} videos a step; {product}: change one of the three")
        if checkpoint["torch"] != torch.__version__:
            print(f"note        the run began with torch {checkpoint['torch']}, this is {torch.__version__}")
        self.step = checkpoint["step"]
        restore(checkpoint, model=self.model, ema=self.ema, optimizer=self.optimizer)

    def announce(self):
        """Print what the run will do."""
        args, size = self.args, self.ranks.size
        threads = f", {torch.get_num_threads()} threads" if self.ranks.device.type == "cpu" else ""
        how = ["bfloat16" if args.amp else "float32"]
        how += [name for name in ("compile", "recompute") if getattr(args, name)]
        dim = f"DiM, {args.depth} blocks of width {args.width}, patches of {args.patch}x{args.patch}"
        name = dim if args.backbone == "dim" else f"U-Net, {args.temporal}"
        print(f"device      {size} x {args.device}{threads}, {', '.join(how)}")
        print(f"model       {name}, {sum(p.numel() for p in self.model.parameters()):,} parameters")
        print(f"data        {self.data}")
        if args.classes:
            print(f"classes     {listed(args.classes)}")
        per_step = f"{args.batch} x {args.grad_accum} x {size} per step"
        print(f"videos      {args.frames} frames of {args.size}x{args.size}, {per_step}")
        print(f"writes      {self.out}: checkpoints, log.jsonl, samples/ every {args.sample_every} steps", flush=True)

    def batches(self):
        """This rank's items of the run, and their videos and classes.    -> yields items, (x0, labels)

        Item i is always the same video with the same noise: a resumed run sees what an uninterrupted one would have
        seen, on any number of ranks, to which batch after batch of items is dealt out.
        """
        args, ranks, kind = self.args, self.ranks, self.ranks.device.type
        begin, end = self.step * self.per_step, args.steps * self.per_step
        firsts = range(begin + ranks.rank * args.batch, end, ranks.size * args.batch)
        mine = lambda: (range(i, i + args.batch) for i in firsts)
        workers = args.workers if args.workers is not None else 0 if kind == "cpu" else CORES
        return zip(mine(), DataLoader(self.data, batch_sampler=mine(), num_workers=workers, pin_memory=kind == "cuda",
                                      generator=torch.Generator(), worker_init_fn=ignore_signals))  # fmt: skip

    def rate(self, step):
        """Learning rate of a step, counted from 1."""
        return self.args.lr * min(1, step / max(1, self.args.warmup))

    def due(self, every):
        """Whether something is done now that is done every so many steps, and at the end."""
        return every and self.step % every == 0 or self.step == self.args.steps

    def flush(self):
        """Log the steps since the last call; their losses must be finite."""
        # Reading numbers waits for the device, so it is not done at every step.
        n = len(self.norms)
        if not n:
            return
        t, loss = rearrange(self.ranks.gather(torch.stack(self.losses)), "r (n a) two b -> two n (r a b)", n=n)
        levels = (4 * t / self.args.diffusion_steps).long()  # quarters of the schedule, from little noise to much
        speed = n * self.per_step / (time.time() - self.clock)
        for k, norm in enumerate(torch.stack(self.norms).tolist()):
            mean, step = loss[k].mean().item(), self.step - n + 1 + k
            if not (math.isfinite(mean) and math.isfinite(norm)):
                amp = "--no-amp, " if self.args.amp else ""
                clip = "a lower --clip" if self.args.clip else "a --clip"
                raise BadInput(f"step {step} had loss {mean} and gradient norm {norm}, and was not saved: try {amp}a "
                               f"lower --lr, {clip} or a longer --warmup in a new run")  # fmt: skip
            parts = [loss[k][levels[k] == i] for i in range(4)]
            by_noise = [part.mean().item() if len(part) else None for part in parts]
            self.write(step=step, loss=mean, loss_by_noise=by_noise, grad_norm=norm, lr=self.rate(step),
                       videos_per_second=round(speed, 3), memory_mib=peak_memory(self.ranks.device))  # fmt: skip
        self.bar.set_postfix_str(f"loss {loss.mean():.4f}, {speed:.1f} videos/s")
        self.losses, self.norms, self.clock = [], [], time.time()

    def write(self, **line):
        """Add a line to the log."""
        self.log.write(json.dumps(line) + "\n")

    def save(self):
        """Write a checkpoint, and remove the oldest."""
        self.flush()
        # A loss is computed before its step: it may be finite while the step has ruined the weights.
        if not all(p.isfinite().all() for p in self.model.parameters()):
            raise BadInput(f"the weights are not finite after step {self.step}, and were not saved: try a lower --lr")
        states = {name: getattr(self, name).state_dict() for name in ("model", "ema", "optimizer")}
        state = {"args": vars(self.args), "step": self.step, "per_step": self.per_step, "data": self.data.fingerprint,
                 "torch": str(torch.__version__), **states}  # fmt: skip
        if self.ranks.main:
            write_whole(self.out / f"checkpoint-{self.step:06d}.pt", partial(torch.save, state))
            for old in checkpoints(self.out)[self.args.keep :]:
                old.unlink()

    def show(self):
        """Write samples and score that are due, unless they were written before the run was killed."""
        args, path = self.args, self.out / "samples" / f"step-{self.step:06d}"
        last = path.with_suffix(".npz" if args.latents else ".png")  # of a step's files
        if self.due(args.sample_every) and self.ranks.any(self.ranks.main and not last.exists()):
            draw = partial(sample_videos, self.ema.module, args, self.ranks.device)
            videos = self.ranks.share(args.sample_videos, draw).numpy()
            if self.ranks.main and args.latents:
                write_whole(last, partial(write_npz, videos=videos))
            elif self.ranks.main:
                write_gif(path.with_suffix(".gif"), videos, args.fps)
                write_sheet(last, np.concatenate([to_numpy(self.data[0][0][None]), videos]))
        if self.score and self.due(args.eval_every) and self.step not in self.scored:
            value = self.score(self.ema.module)
            self.write(**{"step": self.step, self.score.name: value, "videos": args.eval_videos})
            self.bar.write(f"step {self.step}: {self.score.name} {value:.4g} with {args.eval_videos} videos")
        self.clock = time.time()

    def conclude(self):
        """Print what the run has written, or how to go on."""
        self.bar.close()
        args, quoted, samples = self.args, shlex.quote(str(self.out)), f"{self.out}/samples/step-{self.step:06d}"
        if self.step < args.steps:
            size, here = self.ranks.size, self.ranks.here
            nodes = f"--nnodes {size // here} --rdzv_backend c10d --rdzv_endpoint HOST:29500 " if size > here else ""
            python = f"torchrun {nodes}--nproc_per_node {here}" if size > 1 else "python"
            return print(f"stopped after step {self.step}; go on with: {python} train.py --resume {quoted}")
        print(f"\nwrote {checkpoints(self.out)[0]}")
        print(f"      {self.out}/log.jsonl    (draw it: python train.py plot {quoted})")
        if args.latents:
            print(f"      {samples}.npz    (float32: n, frames, size, size, channels)")
        else:
            print(f"      {samples}.gif\n      {samples}.png    (top row: data; below: samples)")
        if self.data.skipped:
            print(f"skipped {len(self.data.skipped)} unreadable videos:{self.data.why_skipped()}")
        print(f"more: python train.py sample {quoted} --videos 16 --frames {2 * args.frames}")


class Score:
    """Frechet distance of samples to held-out videos; `name` is FVD with the weights of I3D, else FD-random."""

    def __init__(self, args, ranks):
        self.name, self.args, self.ranks = "FVD" if args.i3d else "FD-random", args, ranks
        try:
            self.net = (load_i3d(args.i3d) if args.i3d else random_i3d()).to(ranks.device)
        except ValueError as error:
            raise BadInput(f"--i3d {error}") from error
        data = ranks.main_first(lambda: make_data(args, test=True))
        if args.data != "maze" and len(data.videos) < args.eval_videos:
            raise BadInput(f"--eval-videos {args.eval_videos} are more than the {len(data.videos)} held-out videos")
        self.real = self.features(lambda items: (to_numpy(data[i][0][None])[0] for i in items))

    def features(self, videos):
        """Features of videos(items), computed by all ranks.    -> (--eval-videos, 400)"""

        def compute(items):
            clips = tqdm(videos(items), desc="I3D", unit="video", leave=False, disable=not self.ranks.main)
            return video_features(clips, self.net, device=self.ranks.device)

        return self.ranks.share(self.args.eval_videos, compute)

    def __call__(self, model):
        """Score of a network -> float"""
        return frechet_distance(self.real, self.features(partial(sample_videos, model, self.args, self.ranks.device)))


# -----------------------------------------------------------------------------
# 6. Sampling


def sample_videos(model, args, device, items, progress=iter):
    """Videos of a network.    -> (len(items), frames, size, size, c), uint8, latents float32

    The same seed and item is the same video, whatever is drawn beside it. Items take the classes in turn.
    """
    diffusion = GaussianDiffusion(model, args.diffusion_steps, args.target, clip=not args.latents).to(device)
    videos = []
    for i in range(0, len(items), args.batch):
        part = items[i : i + args.batch]
        rngs = generators(args.seed, part)
        noise = lambda x: randn(x.shape[1:], rngs).to(device)
        sampler = dpm_solver if args.sampler == "dpm" else partial(ddim, eta=args.eta, randn_like=noise)
        turn = [k % max(1, len(args.classes)) if args.label is None else args.label for k in part]
        cond = one_hot(args, turn, device)
        x = randn((args.channels, args.frames, args.size, args.size), rngs).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            x = diffusion.sample(x, args.sample_steps, sampler, cond, args.guidance, progress)
        videos.append(to_numpy(x, args.latents))
    return np.concatenate(videos)


def sample(args):
    """Draw videos from a checkpoint, without its data."""
    checkpoint = load_checkpoint(args.run)
    given = {name: value for name, value in vars(args).items() if value is not None}
    if checkpoint["args"]["latents"] and "fps" in given:
        raise BadInput("--fps is of GIFs, and latents are not drawn: leave it out")
    args = argparse.Namespace(**checkpoint["args"] | {"eval_every": 0, "compile": False, "out": None} | given)
    args.amp &= computes_bfloat16(args.device)
    args.label = None if args.label is None else class_number(args.label, args.classes)
    check(args)
    check_out(args.out or run_folder(args.run), args.data)
    if args.out and Path(args.out, "videos.npz").exists():
        raise BadInput(f"--out {args.out} holds samples already: choose another folder")
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)  # now: if it fails, nothing is drawn in vain
    ranks, model = Ranks(args.device), AveragedModel(make_model(args))
    restore(checkpoint, ema=model)
    shape = f"{args.frames} frames of {args.size}x{args.size}"
    print(f"{args.videos} x {shape}, {args.sample_steps} steps each, on {args.device}")
    progress = partial(tqdm, disable=not ranks.main)
    draw = partial(sample_videos, model.module.to(ranks.device), args, ranks.device, progress=progress)
    videos = ranks.share(args.videos, draw).numpy()
    if ranks.main:
        write_samples(args, videos)
    ranks.close()


def class_number(name, classes):
    """A class by its name or its number in text -> number. Raises BadInput."""
    if not classes:
        raise BadInput(f"--class {name} needs a model that knows classes: train one with --class-cond")
    if name not in classes and not (name.isdecimal() and int(name) < len(classes)):
        raise BadInput(f"--class {name} is none of the {len(classes)} classes of this run: {listed(classes)}")
    return classes.index(name) if name in classes else int(name)


def write_samples(args, videos):
    """Write an array, and of pictures a sheet and GIFs, and say where."""
    free = (path for path in numbered(run_folder(args.run) / "sampled") if not path.exists())
    out = Path(args.out or next(free))
    (out if args.latents else out / "gif").mkdir(parents=True, exist_ok=True)
    write_whole(out / "videos.npz", partial(write_npz, videos=videos))
    if args.latents:
        return print(f"wrote {out}/videos.npz    (float32 {videos.shape}: n, frames, size, size, channels)")
    write_sheet(out / "sheet.png", videos[:16])
    for i, video in enumerate(videos):
        write_gif(out / "gif" / f"{i:04d}.gif", video[None], args.fps)
    print(f"wrote {out}/videos.npz    (uint8 {videos.shape}: n, frames, height, width, RGB; score it with fvd.py)")
    print(f"      {out}/sheet.png\n      {out}/gif/")


# -----------------------------------------------------------------------------
# 7. The command line

BEST_DEVICE = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def computes_bfloat16(device):
    """Whether bfloat16 is fast there, and not only possible."""
    gpu = device.startswith("cuda") and torch.cuda.is_available()
    return gpu and torch.cuda.is_bf16_supported(including_emulation=False)


class Parser(argparse.ArgumentParser):
    """Complains in one sentence, by BadInput. Options are written in full."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise BadInput(f"{message}; python {self.prog} --help lists all options")


def within(kind, low, high):
    """A reader of numbers, int or float, from low to high."""

    def read(text):
        with contextlib.suppress(ValueError, OverflowError):
            if low <= kind(text) <= high:  # false for nan
                return kind(text)
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {low} to {high}")

    return read


def filled(text):
    """A text that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty")
    return text


COUNT, COUNT_OR_0, SEED = within(int, 1, 10**9), within(int, 0, 10**9), within(int, 0, 2**31 - 1)
SIDE = within(int, 1, 2**15)
SHARE, ON, ON_OFF = within(float, 0, 1), dict(action="store_true"), dict(action=argparse.BooleanOptionalAction)


def multiples(text):
    """"1,2,4" -> [1, 2, 4]"""
    return [COUNT(part) for part in text.split(",")]


# Options, a row each: flag, how argparse reads it, default, help. `complete` chooses from a pair of defaults, for a GPU
# and for a CPU: a CPU run ends in minutes, a GPU run is worth its device.

SIZES = ", ".join(f"{name} {size['depth']} x {size['d']}" for name, size in DIM_SIZES.items())
UNET = (
    ("--temporal", dict(metavar="NAME"), ("bi-mamba", "bi-mamba"), f"temporal layer: {', '.join(TEMPORAL_LAYERS)}"),
    ("--dim", COUNT, (64, 32), "width of the first level, a multiple of 8"),
    ("--dim-mults", multiples, ([1, 2, 4, 8], [1, 2, 4]), "levels' widths in units of dim"),
    ("--heads", COUNT, (8, 4), "attention heads"),
)
DIM = (
    ("--dim-size", dict(choices=DIM_SIZES), None, f"depth x width of DiT: {SIZES} (default: those below)"),
    ("--depth", COUNT, (12, 6), "blocks, if not those of --dim-size"),
    ("--width", COUNT, (384, 192), "numbers per token, a multiple of 8, if not those of --dim-size"),
    ("--patch", COUNT, (2, 4), "side of a token in pixels"),
)
BACKBONES = {"unet": UNET, "dim": DIM}
DRAWING = (
    ("--sampler", dict(choices=("ddim", "dpm")), "ddim", "ddim, or dpm, DPM-Solver++ of second order"),
    ("--sample-steps", COUNT, 50, "denoising steps per sample"),
    ("--eta", SHARE, 0.0, "noise in ddim: 0 DDIM, 1 DDPM"),
    ("--guidance", within(float, -100, 100), 1.0, "weight of the class: 0 ignores it, more than 1 exaggerates it"),
    ("--fps", within(float, 0.1, 100), (8.0, 8.0), "frames per second of the GIFs"),
)
DEVICE = ("--device", filled, BEST_DEVICE, "cuda, cuda:1, mps or cpu: the best there is")
TRAINING = {
    "data": (
        ("--data", filled, "maze", "'maze', or a file or a folder (at any depth) of videos, arrays or image sequences"),
        ("--split", dict(choices=("train", "test", "all")), None, "part of a data set that has folders train/ and "
         "test/, or lists as CARLA and UCF101 (default train; the papers train on all); others are taken whole"),
        ("--antialias", ON_OFF, True, "in reducing videos to --size (default yes; the papers: no)"),
        ("--latents", ON, False, "files in --data are float arrays (frames, size, size, channels) of any values, "
         "such as a VAE's latents, which are trained on as they are (default off)"),
        ("--size", SIDE, (32, 16), "height and width in pixels"),
        ("--frames", COUNT, (16, 8), "frames per video"),
        ("--workers", within(int, 0, 1024), None, "processes that decode files (default: up to 8) and load batches "
         "(default: none on a CPU, else up to 8)"),
        ("--class-cond", ON, False, "tell the network each video's class: its folder, or the maze's style of walls "
         "(default off)"),
        ("--cond-drop", SHARE, (0.1, 0.1), "share of videos whose class is hidden in training, for --guidance"),
    ),
    "model": (
        ("--backbone", dict(choices=BACKBONES), "unet", "network"),
        ("--target", dict(choices=("eps", "v", "x0")), "v", "what it predicts"),
        ("--diffusion-steps", within(int, 1, 10**6), 256, "steps of the schedule"),
    ),
    "U-Net (--backbone unet)": UNET,
    "DiM (--backbone dim)": DIM,
    "training": (
        ("--steps", COUNT, (20_000, 500), "optimiser steps in all"),
        ("--batch", COUNT, (16, 4), "videos per backward pass and process"),
        ("--grad-accum", COUNT, 1, "backward passes per step"),
        ("--lr", within(float, 1e-12, 10), (3e-4, 1e-3), "Adam's learning rate"),
        ("--warmup", COUNT_OR_0, (50, 50), "steps in which it rises to --lr"),
        ("--clip", within(float, 0, 10**9), 1.0, "largest norm of the gradient, 0 for no limit"),
        ("--ema", SHARE, (0.9995, 0.995), "decay of the averaged weights"),
        ("--seed", SEED, 0, "of weights, data order and noise"),
    ),
    "speed and memory": (
        DEVICE,
        ("--amp", ON_OFF, None, "matrix products and convolutions in bfloat16 (default: on a GPU that has it)"),
        ("--compile", ON_OFF, False, "torch.compile: minutes at first, then faster steps (default off)"),
        ("--recompute", ON_OFF, False, "compute activations twice: less memory, more time (default off)"),
    ),
    "run": (
        ("--out", filled, None, "folder of the run (default runs/ and the data's name, numbered if taken)"),
        ("--resume", dict(metavar="RUN", type=filled), None, "go on with the run in this folder, or from a checkpoint "
         "in it, with its arguments, but on the best device; only steps, samples, data's place, speed and memory may "
         "change, and batch, grad-accum and processes if their product stays"),
        ("--save-every", COUNT, None, "steps from checkpoint to checkpoint (default: only with samples and scores)"),
        ("--keep", COUNT, 2, "checkpoints kept, the newest ones"),
        ("--sample-every", COUNT, (2000, 500), "steps from sample to sample"),
        ("--sample-videos", COUNT, 8, "videos drawn each time"),
        ("--eval-every", COUNT_OR_0, 0, "steps from score to score, 0 for no scores"),
        ("--eval-videos", within(int, 2, 10**9), (64, 64), "samples and held-out videos of a score; few score high, "
         "compare equal numbers only"),
        ("--i3d", dict(metavar="FILE", type=filled), None, "I3D's weights, see fvd.py; without them it is FD-random, "
         "not FVD"),
        *DRAWING,
    ),
}  # fmt: skip
SAMPLING = {
    "videos": (
        ("--videos", COUNT, 8, "how many"),
        ("--frames", COUNT, None, "frames per video, any number (default: as trained)"),
        ("--size", SIDE, None, "height and width in pixels (default: as trained)"),
        ("--class", dict(dest="label", metavar="CLASS"), None, "name or number of the class (default: all in turn)"),
        ("--seed", SEED, 0, "of the noise"),
    ),
    "sampler": tuple((flag, how, None, f"{text} (default: that of the run)") for flag, how, _, text in DRAWING),
    "run": (
        ("--batch", COUNT, 8, "videos drawn at a time"),
        DEVICE,
        ("--out", filled, None, "folder to write to (default RUN/sampled, numbered if taken)"),
    ),
}


def add_options(parser, title, rows):
    """Add a table's options to a parser, as a group."""
    group = parser.add_argument_group(title)
    for flag, how, default, text in rows:
        option = group.add_argument(flag, **how if isinstance(how, dict) else {"type": how})
        option.default = None if isinstance(default, tuple) else default
        if default is not None and not isinstance(default, bool):
            pair = default if isinstance(default, tuple) else (default,)
            typed = dict.fromkeys(str(value).strip("[]").replace(" ", "") for value in pair)  # one, if they are equal
            text += f" (default {' on a GPU, else '.join(typed)})"
        option.help = text


def training_parser():
    """Options of training."""
    parser = Parser(
        prog="train.py", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__.split("\n\n")[0],
        epilog="python train.py sample --help    tells how to draw videos from a checkpoint\n"
               "python train.py plot --help      how to draw the curves of runs\n"
               "torchrun --nproc_per_node N train.py ...    trains on N GPUs (or, with --device cpu, N processes)",
    )  # fmt: skip
    for title, rows in TRAINING.items():
        add_options(parser, title, rows)
    return parser


def sampling_parser():
    """Options of sampling."""
    parser = Parser(prog="train.py sample", description="Draw videos from a checkpoint.")
    parser.add_argument("run", type=filled, help="folder of a run, or a checkpoint in it")
    for title, rows in SAMPLING.items():
        add_options(parser, title, rows)
    return parser


def plotting_parser():
    """Options of curves."""
    parser = Parser(prog="train.py plot", description="Draw the curves of runs, side by side.")
    parser.add_argument("runs", nargs="+", metavar="RUN", type=filled, help="folder of a run")
    parser.add_argument("--out", type=filled, help="PNG to write (default curves.png in the first run)")
    return parser


def absolute(data):
    """"maze", or the path of data that is right in any working folder."""
    return data if data == "maze" else str(Path(data).resolve())


def dest(flag):
    """"--dim-mults" -> "dim_mults\""""
    return flag.lstrip("-").replace("-", "_")


NEEDS = {"--cond-drop": "--class-cond", "--i3d": "--eval-every", "--eval-videos": "--eval-every"}  # to have an effect


def check_needs(given, args):
    """Raise BadInput if a flag that is given has no effect."""
    for flag, needed in NEEDS.items():
        if getattr(given, dest(flag)) is not None and not getattr(args, dest(needed)):
            raise BadInput(f"{flag} has no effect without {needed}: give both or neither")


def complete(args):
    """Fill in what depends on other arguments, unless they contradict each other (BadInput)."""
    given = lambda *flags: [flag for flag in flags if getattr(args, dest(flag)) is not None]
    if args.data == "maze" and (args.split or args.latents or not args.antialias):
        raise BadInput("--split, --latents and --no-antialias are for --data FOLDER, not for the maze: leave them out")
    if args.latents and (args.size or args.eval_every or args.fps or not args.antialias):
        raise BadInput("--latents are not resized, scored or drawn: leave out --size, --no-antialias, --eval-every "
                       "and --fps")  # fmt: skip
    check_needs(args, args)
    args.data, args.i3d = absolute(args.data), args.i3d and absolute(args.i3d)
    other = "dim" if args.backbone == "unet" else "unet"
    if alien := given(*(flag for flag, *_ in BACKBONES[other])):
        raise BadInput(f"{', '.join(alien)} of --backbone {other}: leave it out, or give --backbone {other}")
    if args.out and Path(args.out, "log.jsonl").exists():
        go_on = f"go on with --resume {shlex.quote(args.out)}"
        mend = go_on if checkpoints(args.out) else "it saved nothing, remove it"
        raise BadInput(f"--out {args.out} holds a run: {mend}, or choose another")
    check_out(out_folder(args), args.data)
    if args.dim_size and args.depth and args.width:
        raise BadInput(f"--dim-size {args.dim_size} has no effect beside --depth and --width: leave it out")
    if args.dim_size:
        args.depth = args.depth or DIM_SIZES[args.dim_size]["depth"]
        args.width = args.width or DIM_SIZES[args.dim_size]["d"]
    args.size, args.channels = latent_shape(args.data) if args.latents else (args.size, 3)
    args.classes, args.label = [], None  # until the data is known, until one is asked for
    asked = args.warmup or 0
    for flag, _, default, _ in (row for rows in TRAINING.values() if rows is not BACKBONES[other] for row in rows):
        if isinstance(default, tuple) and not given(flag):
            setattr(args, dest(flag), default[0 if args.device.startswith("cuda") else 1])
    if asked > args.steps:
        raise BadInput(f"--warmup {asked} is longer than the run of --steps {args.steps}")
    args.amp = computes_bfloat16(args.device) if args.amp is None else args.amp
    return args


# What a resumed run may change; anything else would make it another run.
FREE = {"data", "steps", "batch", "grad_accum", "workers", "device", "amp", "compile", "recompute", "out", "resume",
        "save_every", "keep", "sample_every", "sample_videos", "sampler", "sample_steps", "eta",
        "guidance", "fps", "i3d"}  # fmt: skip


def resumed(parser, argv, given):
    """Arguments and checkpoint of the run that --resume names, with what else the command line says."""
    run = run_folder(given.resume)
    if given.out:
        raise BadInput(f"--resume writes into the run's own folder: leave out --out {given.out}, or copy the run first")
    if not run.is_dir():
        raise BadInput(f"--resume {given.resume}: give the folder of a run, or a checkpoint in it")
    checkpoint = load_checkpoint(given.resume)
    saved = checkpoint["args"] | {"device": BEST_DEVICE, "out": str(run)}
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    check_needs(given, args)
    args.data, args.i3d = absolute(args.data), args.i3d and absolute(args.i3d)
    changed = [name for name in saved if name not in FREE and getattr(args, name) != saved[name]]
    if changed:
        were = ", ".join(f"--{name.replace('_', '-')} (was {saved[name]})" for name in changed)
        raise BadInput(f"--resume cannot change {were}: leave it out, or start a new run with --out")
    if args.steps < checkpoint["step"]:
        raise BadInput(f"--steps {args.steps} is less than the {checkpoint['step']} that {run} has done: give more")
    return args, checkpoint


def check(args):
    """Raise BadInput for what would otherwise fail later, before anything is written."""
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        why = re.split("[.] |[.]?\n", str(error))[0]  # the first sentence
        raise BadInput(f"--device {args.device} cannot be used here: {why}") from error
    if args.amp and args.device.startswith("cuda") and not computes_bfloat16(args.device):
        raise BadInput(f"--amp needs bfloat16, which {args.device} does not have: give --no-amp")
    if args.compile:
        try:
            torch.compile(torch.sin)(torch.zeros(1, device=args.device))
        except Exception as error:  # of Triton or a C++ compiler
            raise BadInput(f"--compile fails here, leave it out: {str(error).strip().splitlines()[0]}") from error
    if args.eval_every and args.i3d and not Path(args.i3d).is_file():
        raise BadInput(f"--i3d {args.i3d} does not exist: python fvd.py --help tells where the weights come from; "
                       "without --i3d the score is FD-random")  # fmt: skip
    if args.eval_every and args.frames < 9:
        raise BadInput(f"--eval-every needs --frames 9 or more, the least that I3D takes, not {args.frames}")
    if args.sampler == "dpm" and args.eta:
        raise BadInput(f"--sampler dpm adds no noise, --eta {args.eta} does: give --eta 0, or --sampler ddim")
    if args.guidance != 1 and not args.class_cond:
        raise BadInput(f"--guidance {args.guidance} needs a model that knows classes: train one with --class-cond")
    if args.guidance != 1 and not args.cond_drop:
        raise BadInput(f"--guidance {args.guidance} needs a model that knows no class, too: train with --cond-drop 0.1")
    if not 1 <= args.sample_steps <= args.diffusion_steps:
        raise BadInput(f"--sample-steps {args.sample_steps} must be 1 to --diffusion-steps, {args.diffusion_steps}")
    try:
        with torch.device("meta"):
            factor = make_model(args).factor
    except (ValueError, RuntimeError) as error:  # of sizes that overflow
        raise BadInput(str(error)) from error
    if args.size % factor:
        why = f"--patch {args.patch}" if args.backbone == "dim" else f"--dim-mults {','.join(map(str, args.dim_mults))}"
        raise BadInput(f"--size {args.size} must be a multiple of {factor}, what {why} divides it by")


def main(argv):
    """The command: train, or sample or plot with that word first."""
    if argv[:1] == ["sample"]:
        return sample(sampling_parser().parse_args(argv[1:]))
    if argv[:1] == ["plot"]:
        return plot(plotting_parser().parse_args(argv[1:]))
    parser, checkpoint = training_parser(), None
    args = parser.parse_args(argv)
    if args.resume is None:
        complete(args)
    else:
        args, checkpoint = resumed(parser, argv, args)
    check(args)
    train(args, checkpoint)


def explain(error):
    """What to tell the user of an error; None if it is a bug, whose traceback is wanted."""
    text = str(error).strip()
    if isinstance(error, BadInput):
        return text.rpartition("BadInput: ")[2]  # of a loader's process it comes with a traceback
    if isinstance(error, OSError):
        return f"{error.filename or 'a file'}: {error.strerror or text}; what was written before is intact"
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", text):
        return "not enough memory: give --recompute, or lower --batch, --frames, --size, --dim or --width"
    if re.search("DataLoader worker .* (killed|exited)", text):
        return "a process that loads data was killed, perhaps for want of memory: go on with --resume, fewer --workers"
    if re.search("(closed|reset) by peer|remote process exited", text):  # what gloo and NCCL say
        return "another process of this run has ended, and so does this one; what was written before is intact"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that no half-written file stays
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)  # what a shell expects of Ctrl-C
    except Exception as error:
        message = explain(error)
        print(f"train.py: {message}" if message else traceback.format_exc(), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2 if message else 1)  # sys.exit might wait for ever for loaders' processes, which ignore its SIGTERM
