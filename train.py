"""Train a video diffusion model, and sample from it.

    python train.py                            walks through a maze, on whatever device there is
    python train.py --data FOLDER              your own videos: mp4, gif, npy, folders of images, ...
    python train.py --temporal attention       another temporal layer, to compare
    python train.py --resume runs/maze         go on where a run stopped
    python train.py sample runs/maze --videos 16 --frames 64

A run writes into its own folder (--out): checkpoint.pt, log.jsonl (one line per step), and samples/ with a GIF and a
contact sheet (a PNG: one row per video, time from left to right) for every --sample-every steps. Decoded videos are
kept beside it, in cache/.

Map
    1. The maze       endless videos, drawn by numpy
    2. Folders        videos decoded once into a cache, random windows of them
    3. Pictures       GIFs, contact sheets, arrays for scoring
    4. Checkpoints    all of a run's state in one file, replaced in one go
    5. The loop           and the score of samples by fvd.py, during training
    6. Sampling
    7. The command line

Differs from the papers: the network predicts v, samples take 50 steps of DDIM, the average of the weights (EMA) warms
up, and sizes fit the device at hand. All but the warm-up are options.
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
from functools import lru_cache, partial
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fvd import (UnreadableVideo, find_videos, frechet_distance, load_array, load_i3d, naming, open_videos, printable,
                 random_i3d, read_frames, video_features)  # fmt: skip
from vdm_ssm import TEMPORAL_LAYERS, GaussianDiffusion, UNet3D, ddim


class BadInput(Exception):
    """Something the user can mend. The message says what and how; the command prints it and exits with code 2."""


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
# Source: ray casting on a grid, known from the game Wolfenstein 3D (1992).

ROOMS = 6  # rooms a side, 2 cells apart: 1,024 frames (205 cells) come back to places seen before
LOOPS = 0.2  # share of the rooms that open a wall beyond the search tree: more than one way round
SPEED = 0.2  # cells a frame, 10 frames from room to room: three clips of 16 frames in four take a turn
LOOK = 0.8  # cells ahead on the path where the agent looks: it turns its head before a bend
VIEW = 0.75  # tangent of half the field of view, 74 degrees: both walls of a corridor are in sight
WALL = 0.75  # height in cells, the eye at its middle; no wall in view is nearer than z = 0.65, so
#              walls fill at most 0.77 of the picture: the top is sky and the bottom is floor
RAYS = 2  # rays in a pixel's column, averaged: soft vertical edges

SKY, FLOOR = (135, 190, 250), (88, 80, 84)  # RGB
WALLS = (  # light and dark tone of each style, far in hue from one another, the sky and the floor
    ((222, 88, 58), (140, 40, 30)),  # 0: bricks
    ((250, 212, 90), (200, 136, 30)),  # 1: boards
    ((84, 190, 96), (22, 108, 64)),  # 2: checks
)


def maze_seed(split, index):
    """Seed of video `index` of a split: "train" has the even seeds, "test" the odd ones."""
    return 2 * index + ("train", "test").index(split)


def maze_style(seed):
    """Wall style of a seed's maze, 0, 1 or 2: the video's class, as frequent in both splits."""
    return seed // 2 % len(WALLS)


def maze_exits(i, j):
    """Unit steps from room (i, j) towards the rooms beside it, whether open or walled."""
    steps = (0, 1), (1, 0), (0, -1), (-1, 0)
    return [(a, b) for a, b in steps if 0 < i + 2 * a < 2 * ROOMS and 0 < j + 2 * b < 2 * ROOMS]


def maze_grid(rng):
    """Random maze without dead ends.    -> (g, g) bool, True in walls, g = 2 ROOMS + 1

    Rooms are the cells with two odd coordinates. Depth-first search joins all of them in a tree;
    then some walls open at random, and one more in each dead end: no walk has to turn back.
    """
    wall = np.ones((2 * ROOMS + 1, 2 * ROOMS + 1), bool)
    wall[1::2, 1::2] = False
    path, seen = [(1, 1)], {(1, 1): True}  # a dict, because the order of a set is no promise
    while path:
        i, j = path[-1]
        new = [(a, b) for a, b in maze_exits(i, j) if (i + 2 * a, j + 2 * b) not in seen]
        if new:
            a, b = new[rng.integers(len(new))]
            wall[i + a, j + b] = False
            path.append((i + 2 * a, j + 2 * b))
            seen[path[-1]] = True
        else:
            path.pop()
    for i, j in seen:
        closed = [(a, b) for a, b in maze_exits(i, j) if wall[i + a, j + b]]
        dead_end = len(maze_exits(i, j)) - len(closed) == 1
        if closed and (dead_end or rng.random() < LOOPS):
            a, b = closed[rng.integers(len(closed))]
            wall[i + a, j + b] = False
    return wall


def maze_spline(points, s):
    """Uniform quadratic B-spline.    points (m, 2), s (f) in [1, m - 1) -> (f, 2)"""
    k, q = s.astype(int), (s % 1)[:, None]
    before, here, after = points[k - 1], points[k], points[k + 1]
    return here + 0.5 * ((1 - q) ** 2 * (before - here) + q**2 * (after - here))


def maze_walk(wall, rng, frames):
    """Random walk.    wall (g, g) -> position (f, 2) in cells, gaze (f, 2) of length 1

    The path is the B-spline of the visited cells' centres: straight in corridors, a smooth bend in
    turns, and always half a cell or more from any wall.
    """
    s = 1 + 2 * rng.random() + SPEED * np.arange(frames)  # (f) place on the path, in cells
    i, j = 1 + 2 * rng.integers(ROOMS, size=2)
    a, b, cells = 0, 0, []
    while len(cells) < s[-1] + LOOK + 2:
        ways = [w for w in maze_exits(i, j) if not wall[i + w[0], j + w[1]] and w != (-a, -b)]
        a, b = ways[rng.integers(len(ways))]
        cells += [(i, j), (i + a, j + b)]
        i, j = i + 2 * a, j + 2 * b
    position, ahead = (maze_spline(np.array(cells) + 0.5, s + look) for look in (0, LOOK))
    gaze = ahead - position
    return position, gaze / np.sqrt((gaze**2).sum(1, keepdims=True))


def maze_cast(wall, position, ray, axis):
    """First wall across an axis.    wall (g, g), position (2, f, 1), ray (2, f, r) -> z, u (f, r)

    The wall is met after z rays, at u along it. A ray enters a cell only where it crosses a grid
    line: all crossings of the axis are tried at once, and the nearest one into a wall is kept.
    """
    p, d = position[axis], ray[axis]
    ahead = np.arange(len(wall) - 1, dtype=p.dtype)[:, None, None]
    line = np.floor(p) + (d > 0) + np.sign(d) * ahead  # (g - 1, f, r)
    z = (line - p) / d
    across = np.floor(position[1 - axis] + z * ray[1 - axis])
    # Beyond the border the indices leave the grid, but there the border has stopped the ray before.
    i, j = (np.clip(c, 0, len(wall) - 1).astype(np.intp) for c in (line - (d < 0), across))
    z = np.where(wall[i, j] if axis == 0 else wall[j, i], z, np.inf).min(0)
    return z, position[1 - axis] + z * ray[1 - axis]


def maze_stripe(x, width, share=0.5):
    """Mean over [x - width / 2, x + width / 2] of stripes of period 1: 1 on a share, else 0.

    A pixel's width gives antialiasing, and far stripes fade to their mean. x, width (...) -> (...)
    """
    ends = x + width / 2, x - width / 2
    high, low = (np.floor(end) * share + np.minimum(end % 1, share) for end in ends)  # integrals
    return (high - low) / width


def maze_checks(a, b):
    """Chequered pattern of two crossing stripes in [0, 1]."""
    return a * b + (1 - a) * (1 - b)


def maze_texture(style, u, v, du, dv):
    """Tone of a wall, 0 dark to 1 light, at u along and v up it in pixels (du, dv), in cells."""
    v, dv = v / WALL, dv / WALL
    if style == 0:  # three courses of bricks, half a cell long, each half a brick ahead
        shift = np.floor(3 * v) % 2 / 2
        return maze_stripe(2 * u + shift, 2 * du, 0.85) * maze_stripe(3 * v, 3 * dv, 0.75)
    boards = maze_stripe(u, du)
    return boards + 0 * v if style == 1 else maze_checks(boards, maze_stripe(v, dv))


def maze_walls(wall, position, ray, eta, pixel, style):
    """Walls in view.    position (2, f, 1), ray (2, f, r), eta (h, 1) -> 3 times (f, h, r)

    Shares of a ray's pixel: the light and the dark tone, times the light on them, and no wall.
    """
    (z0, u0), (z1, u1) = maze_cast(wall, position, ray, 0), maze_cast(wall, position, ray, 1)
    across = z0 < z1  # (f, r), the axis that the wall faces
    pairs = (z0, z1), (u0, u1), np.abs(ray), np.float32((0.8, 1))
    z, u, slant, side = (np.where(across, a, b)[:, None] for a, b in pairs)  # (f, 1, r)
    # One pixel to the right, u grows by pixel z / slant: the wall's foreshortening.
    tone = maze_texture(style, u, z * eta + WALL / 2, pixel * z / slant, pixel * z)
    cover = np.clip((WALL / 2 / z - np.abs(eta)) / pixel + 0.5, 0, 1)
    light = cover * side / (1 + 0.06 * z)  # the side in half shade shows the corners; far is darker
    return light * tone, light * (1 - tone), 1 - cover


def maze_background(position, ray, eta, pixel):
    """Light on sky and floor.    position (2, f, 1), ray (2, f, s), eta (h, 1) -> (f, h, s)"""
    below = eta[:, 0] < 0
    z = WALL / 2 / -eta[below]
    dz = pixel * z / -eta[below]  # the depth of floor in a pixel, more than its width
    x, y = (maze_stripe(p[:, None] + z * d[:, None], dz) for p, d in zip(position, ray))
    # The sky is deeper above, the floor has tiles.
    light = np.broadcast_to(1 - 0.15 * eta, (ray.shape[1], len(eta), ray.shape[2])).copy()
    light[:, below] = 0.85 + 0.3 * maze_checks(x, y)
    return light


def maze_render(wall, position, gaze, style, size):
    """Views of a maze.    wall (g, g), position, gaze (f, 2) -> (f, size, size, 3) uint8 RGB"""
    pixel = 2 * VIEW / size  # on the image plane
    eta = VIEW - pixel * (np.arange(size, dtype=np.float32)[:, None] + 0.5)  # (h, 1), up
    xi = pixel / RAYS * (np.arange(RAYS * size, dtype=np.float32) + 0.5) - VIEW  # (r), right
    position, gaze = np.float32((position.T, gaze.T))[..., None]  # (2, f, 1)
    ray = gaze + xi * np.stack([gaze[1], -gaze[0]])  # (2, f, r)
    ray[ray == 0] = 1e-6  # along a grid line, which is then met far away and not at 0 / 0
    tones = np.stack(maze_walls(wall, position, ray, eta, pixel, style))
    bright, dark, free = tones.reshape(*tones.shape[:3], size, RAYS).mean(-1)  # (f, h, w)
    light = free * maze_background(position, ray.reshape(2, -1, size, RAYS).mean(-1), eta, pixel)
    video = np.empty((*light.shape, 3), np.uint8)
    for c, (sky, floor, high, low) in enumerate(zip(SKY, FLOOR, *WALLS[style])):
        back = light * np.where(eta < 0, np.float32(floor), np.float32(sky))
        video[..., c] = back + bright * high + dark * low + 0.5  # the cast to uint8 rounds down
    return video


def maze_video(seed, frames, size):
    """Walk through a maze of its own.    seed >= 0 -> (frames, size, size, 3) uint8 RGB

    More frames of a seed continue the same walk; time is linear in them and memory is the result's.
    """
    rng = np.random.default_rng(seed)
    wall = maze_grid(rng)
    position, gaze = maze_walk(wall, rng, frames)
    video = np.empty((frames, size, size, 3), np.uint8)
    chunk = max(1, 2**14 // size**2)  # frames at once: arrays of 64 kB stay in the cache
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
# Decoding a video takes far longer than a training step needs a window of it. So every file is decoded once, brought to
# size (short side to `size`, centre crop) and kept as a flat file of uint8 frames, which is then a memory map: larger
# sets than memory train. Windows of consecutive frames are drawn at random, every video once per epoch.
#
#     file --decode--> KEY.u8, the frames of its videos, then KEY.json, which describes them
#
# The key is made of all that the frames depend on, and each file appears whole, by a rename. So a build that was killed
# goes on with what is missing, and any number of processes and runs build one cache together: at worst two of them
# decode the same file, and the second replaces the first's frames by equal ones.

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
    frames = []
    for frame in read_frames(video):
        frames.append(frame)
        if len(frames) == batch:
            yield resize(np.stack(frames), size, antialias)
            frames = []
    if frames:
        yield resize(np.stack(frames), size, antialias)


class VideoCache(Dataset):
    """Frames of every source, decoded once.    [i] -> description of source i, or a BadInput

    A description is {"videos": [frames, ...], "skipped": [[name, reason], ...], "bytes": size of the file of frames}.
    A source without a usable video leaves none, and is tried again by the next run.
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
            if self.file(i).stat().st_size == description["bytes"]:
                return description

    def __getitem__(self, i):
        try:
            description = self.known(i)  # by now, perhaps: another process may build the same cache
            if description is None:
                description = self.decode(i)
                text = json.dumps(description)
                write_whole(self.keys[i].with_suffix(".json"), lambda path: path.write_text(text))
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
    """Size and channels of the latents at or below a path, by its first file. Raises BadInput."""
    try:
        return open_latents(find_videos(path)[0]).shape[2:]
    except UnreadableVideo as error:
        raise BadInput(f"--data {error}") from error


def state(source):
    """Changes when a file, or a file of a folder of images, is replaced or touched.    -> list"""
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def digest(*facts):
    """Short name of anything that JSON can hold.    -> 16 hex digits"""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


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
        self.fingerprint = digest(size, antialias, [[os.path.relpath(s, path), state(s)] for s in sources])
        self.classes = tuple(sorted({source.parent.name for source in splits["all"]}))
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

    def why_skipped(self, most=10):
        """One line per file that could not be read."""
        lines = [f"\n    {name}: {reason}" for name, reason in self.skipped[:most]]
        more = len(self.skipped) - most
        return "".join(lines) + (f"\n    and {more} more" if more > 0 else "")

    def __getitem__(self, i):
        epoch, k = divmod(i, len(self.videos))
        source, start, length, label = self.videos[epoch_order(self.seed, epoch, len(self.videos))[k]].tolist()
        start += np.random.default_rng([self.seed, epoch, k]).integers(length - self.frames + 1)
        return to_model_range(self.cache.frames(source)[start : start + self.frames]), label

    def __str__(self):
        total = int(self.videos[:, 2].sum())
        short = f", {self.too_short} shorter than {self.frames} frames left out" if self.too_short else ""
        skipped = f", {len(self.skipped)} unreadable (named at the end)" if self.skipped else ""
        kept = f"{len(self.videos)} videos, {total:,} frames, of {self.path}"
        return f"{kept}{short}{skipped}, cached in {self.cache.folder}"


# -----------------------------------------------------------------------------
# 3. Pictures


def to_uint8(videos):
    """(b, c, f, h, w) in [-1, 1] -> uint8 (b, f, h, w, c) in 0..255"""
    pixels = ((videos.float() + 1) * 127.5).round().clamp(0, 255).byte()
    return rearrange(pixels, "b c f h w -> b f h w c").cpu().numpy()


def latents_to_numpy(latents):
    """(b, c, f, h, w) -> float32 (b, f, h, w, c)"""
    return rearrange(latents.float(), "b c f h w -> b f h w c").cpu().numpy()


def enlarge(picture, target):
    """Repeat pixels until a frame is about `target` wide.    (..., h, w, c) -> (..., s h, s w, c)"""
    s = max(1, target // picture.shape[-2])
    return picture.repeat(s, axis=-2).repeat(s, axis=-3)


def write_sheet(path, videos, columns=16):
    """Contact sheet: a row per video, time from left to right.    uint8 (b, f, h, w, 3)"""
    shown = np.linspace(0, videos.shape[1] - 1, min(columns, videos.shape[1])).round().astype(int)
    cells = np.pad(enlarge(videos[:, shown], 64), ((0, 0), (0, 0), (0, 4), (0, 4), (0, 0)), constant_values=255)
    iio.imwrite(path, rearrange(cells, "b f h w c -> (b h) (f w) c"))


def write_gif(path, videos, fps):
    """All videos side by side.    uint8 (b, f, h, w, 3), fps frames a second"""
    rows = math.ceil(math.sqrt(len(videos)))
    blank = np.zeros_like(videos[:1]).repeat(-len(videos) % rows, axis=0)
    grid = np.concatenate([enlarge(videos, 96), enlarge(blank, 96)])
    iio.imwrite(path, rearrange(grid, "(r s) f h w c -> f (r h) (s w) c", r=rows), duration=1000 / fps, loop=0)


def write_npz(path, videos):
    with open(path, "wb") as file:  # given a name, NumPy would change it
        np.savez_compressed(file, videos=videos)


# -----------------------------------------------------------------------------
# 4. Checkpoints
#
# A run that stops must go on as if it had not: weights, their average, the optimiser, the step and the state of the
# random generators are stored together. The file is written under another name and then renamed, which a file system
# does at once or not at all: a killed run leaves the old checkpoint or the new one, never half of one.


def write_whole(path, write):
    """Call write(temporary path), then rename it to `path`. Raises BadInput if that fails."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # a pid may be another machine's, too
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise BadInput(f"{path} cannot be written ({error}); what it held before is intact") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def load_checkpoint(run):
    """A run's folder or its checkpoint file -> dict on the CPU. Raises BadInput."""
    path = Path(run) / "checkpoint.pt" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise BadInput(f"{path} does not exist: give the folder of a run that has written a checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return {key: checkpoint[key] for key in ("args", "step", "data", "model", "ema", "optimizer", "rng")}
    except Exception as error:  # zip, pickle and torch share no narrower class
        raise BadInput(f"{path} is not a checkpoint of train.py, or is damaged ({type(error).__name__})") from error


def restore(run, **parts):
    """Load states into modules and optimisers, given as name=(object, state). Raises BadInput."""
    for name, (thing, state) in parts.items():
        try:
            thing.load_state_dict(state)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"the {name} in the checkpoint of {run} does not fit its arguments: damaged?") from error


def rng_state(device):
    """States of the random generators that the loop uses.    -> dict of tensors"""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if device.type == "cuda" else None}


def set_rng_state(state, device):
    """Put the generators where `rng_state` found them."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


# -----------------------------------------------------------------------------
# 5. The loop


def make_model(args):
    """The network that a run's arguments describe."""
    return UNet3D(dim=args.dim, dim_mults=tuple(args.dim_mults), heads=args.heads, temporal=args.temporal,
                  channels=args.channels)  # fmt: skip


def make_data(args, test=False):
    """The data set that a run's arguments describe; `test`: the videos that its samples are compared with."""
    if args.data == "maze":
        return MazeVideos("test" if test else "train", args.frames, args.size, args.seed)
    held_out = args.eval_videos if args.eval_every else 0
    cache = Path(args.out or default_out(args)).parent / "cache"
    workers = min(8, os.cpu_count() or 1) if args.workers is None else args.workers
    return FolderVideos(args.data, args.frames, args.size, cache, args.seed, args.split, test, held_out, args.antialias,
                        args.channels if args.latents else None, workers)  # fmt: skip


def average_weights(decay):
    """EMA that is a plain average at first: step k keeps min(decay, (1 + k) / (10 + k)) of the average."""

    def update(averages, weights, k):
        keep = min(decay, (1 + float(k)) / (10 + float(k)))
        torch._foreach_lerp_(averages, weights, 1 - keep)

    return update


def claim(args):
    """Make the run's folder and in it the log, which marks it as taken: no two runs share one.    -> Path"""
    base = Path(args.out or default_out(args))
    numbered = (base if i == 1 else base.with_name(f"{base.name}-{i}") for i in itertools.count(1))
    for out in [base] if args.out else numbered:
        (out / "samples").mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            open(out / "log.jsonl", "x").close()
            return out
    raise BadInput(f"--out {base} holds a run: go on with --resume {shlex.quote(str(base))}, or choose another folder")


def open_log(path, step):
    """The log without lines after `step`, opened for more.    -> file, steps that have a score"""

    def step_of(line):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # half a line, or not ours
            return int(json.loads(line)["step"])
        return math.inf

    kept = [line for line in path.read_text(errors="replace").splitlines() if step_of(line) <= step]
    write_whole(path, lambda temporary: temporary.write_text("".join(line + "\n" for line in kept)))
    return open(path, "a"), {step_of(line) for line in kept if '"loss"' not in line}


def announce(args, out, model, data):
    """Print what a run will do."""
    print(f"device      {args.device}" + (f", {torch.get_num_threads()} threads" if args.device == "cpu" else ""))
    print(f"model       {args.temporal}, {sum(p.numel() for p in model.parameters()):,} parameters")
    print(f"data        {data}")
    print(f"videos      {args.frames} frames of {args.size}x{args.size}, {args.batch} x {args.grad_accum} per step")
    print(f"writes      {out}/checkpoint.pt, log.jsonl, samples/ every {args.sample_every} steps", flush=True)


def conclude(args, out, step, data):
    """Print what a run has written, or how to go on."""
    quoted = shlex.quote(str(out))
    if step < args.steps:
        print(f"stopped after step {step}; go on with: python train.py --resume {quoted}")
        return
    print(f"\nwrote {out}/checkpoint.pt")
    print(f"      {out}/log.jsonl")
    if args.latents:
        print(f"      {out}/samples/step-{step:06d}.npz    (float32: n, frames, size, size, channels)")
    else:
        print(f"      {out}/samples/step-{step:06d}.gif")
        print(f"      {out}/samples/step-{step:06d}.png    (top row: data; below: samples)")
    if data.skipped:
        print(f"skipped {len(data.skipped)} unreadable videos:{data.why_skipped()}")
    print(f"more: python train.py sample {quoted} --videos 16 --frames {2 * args.frames}")


def train(args, checkpoint=None):
    """Run the training loop, from the start or from a checkpoint."""
    device, step = torch.device(args.device), 0
    torch.manual_seed(args.seed)
    data = make_data(args)
    model = make_model(args).to(device)
    ema = AveragedModel(model, multi_avg_fn=average_weights(args.ema))
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    diffusion = GaussianDiffusion(model, steps=args.diffusion_steps, target=args.target).to(device)
    score = Score(args, device) if args.eval_every else None
    if checkpoint:
        if checkpoint["data"] != data.fingerprint:
            raise BadInput(f"{args.data} no longer holds the videos of this run: restore them, or start a new run")
        step = checkpoint["step"]
        restore(args.out, model=(model, checkpoint["model"]), ema=(ema, checkpoint["ema"]),
                optimizer=(optimizer, checkpoint["optimizer"]))  # fmt: skip
        set_rng_state(checkpoint["rng"], device)  # last: making networks draws numbers
    out = Path(args.out) if checkpoint else claim(args)
    args.out = str(out)
    log, scored = open_log(out / "log.jsonl", step)
    announce(args, out, model, data)

    # Item i of the run is always the same video, so a resumed run sees what an uninterrupted one would have seen.
    per_step = args.batch * args.grad_accum
    workers = args.workers if args.workers is not None else 0 if args.device == "cpu" else min(8, os.cpu_count())
    batches = iter(DataLoader(
        data, args.batch, sampler=range(step * per_step, args.steps * per_step), num_workers=workers,
        pin_memory=device.type == "cuda", generator=torch.Generator(),
    ))  # fmt: skip
    bar = tqdm(total=args.steps, initial=step, unit="step", smoothing=0.05)
    losses, clock = [], time.time()  # since the last flush

    # Ctrl-C ends the run after the current step; a second one at once.
    stop = []

    def interrupt(number, _):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)
        bar.write("stopping after this step; once more stops at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)

    def flush():
        """Write the losses since the last call; they must be finite."""
        nonlocal clock
        # Reading the losses waits for the device, so it is not done at every step.
        values = torch.stack(losses).view(-1, args.grad_accum).mean(1).tolist() if losses else []
        losses.clear()
        if not all(map(math.isfinite, values)):
            raise BadInput(f"the loss became {values[-1]} by step {step}, and was not saved: try a lower --lr")
        rate = len(values) * per_step / (time.time() - clock)
        for k, value in enumerate(values, start=step - len(values) + 1):
            log.write(json.dumps({"step": k, "loss": value, "videos_per_second": round(rate, 3)}) + "\n")
        log.flush()
        if values:
            bar.set_postfix_str(f"loss {sum(values) / len(values):.4f}, {rate:.1f} videos/s")
        clock = time.time()

    def save():
        flush()
        # A loss is computed before its step: it may be finite while the step has ruined the weights.
        if not all(p.isfinite().all() for p in model.parameters()):
            raise BadInput(f"the weights are not finite after step {step}, and were not saved: try a lower --lr")
        state = {"args": vars(args), "step": step, "data": data.fingerprint, "model": model.state_dict(),
                 "ema": ema.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng_state(device)}  # fmt: skip
        write_whole(out / "checkpoint.pt", partial(torch.save, state))

    def due(every):
        return step % every == 0 or step == args.steps

    def show():
        """Samples and score that are due, unless they were written before the run was killed."""
        nonlocal clock
        sheet = out / "samples" / f"step-{step:06d}.{'npz' if args.latents else 'png'}"  # written last
        if due(args.sample_every) and not sheet.exists():
            sample_during_training(args, ema.module, data, sheet, device)
        if score and due(args.eval_every) and step not in scored:
            value = score(sample_videos(ema.module, args, args.eval_videos, args.frames, device, args.seed, args.batch))
            log.write(json.dumps({"step": step, score.name: value, "videos": args.eval_videos}) + "\n")
            log.flush()
            bar.write(f"step {step}: {score.name} {value:.4g} with {args.eval_videos} videos")
        clock = time.time()

    if checkpoint:
        show()
    first, start = step, time.time()
    while step < args.steps and not stop:
        for _ in range(args.grad_accum):
            videos, _ = next(batches)
            loss = diffusion.loss(videos.to(device, non_blocking=True))
            (loss / args.grad_accum).backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
        step += 1
        bar.update()
        if step % 10 == 0:
            flush()
        if step == first + 10:  # flush has waited for the device
            minutes = (args.steps - step) * (time.time() - start) / 10 / 60
            bar.write(f"time        about {minutes:.1f} more minutes, and the samples")
        if due(args.sample_every) or (score and due(args.eval_every)):
            save()
            show()

    if stop:
        save()
    bar.close()
    conclude(args, out, step, data)


class Score:
    """Frechet distance of samples to held-out videos; `name` is FVD with the weights of I3D, else FD-random."""

    def __init__(self, args, device):
        self.name = "FVD" if args.i3d else "FD-random"
        try:
            self.net = (load_i3d(args.i3d) if args.i3d else random_i3d()).to(device)
        except ValueError as error:
            raise BadInput(f"--i3d {error}") from error
        self.device, data = device, make_data(args, test=True)
        self.real = self.features(to_uint8(data[i][0][None])[0] for i in range(args.eval_videos))

    def features(self, videos):
        clips = tqdm(videos, desc="I3D", unit="video", leave=False)
        return video_features(clips, self.net, device=self.device)  # (n, 400)

    def __call__(self, videos):
        """uint8 (n, f, h, w, 3) -> float"""
        return frechet_distance(self.real, self.features(videos))


# -----------------------------------------------------------------------------
# 6. Sampling


def sample_videos(model, args, count, frames, device, seed, batch, progress=iter):
    """Videos of a network, the same for the same seed.    -> (count, frames, size, size, c) uint8, latents float32"""
    diffusion = GaussianDiffusion(model, args.diffusion_steps, args.target, clip=not args.latents).to(device)
    finish = latents_to_numpy if args.latents else to_uint8
    videos = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for n in [min(batch, count - i) for i in range(0, count, batch)]:
            noise = torch.randn(n, args.channels, frames, args.size, args.size).to(device)
            videos.append(finish(diffusion.sample(noise, args.sample_steps, partial(ddim, eta=args.eta), progress=progress)))
    return np.concatenate(videos)


def sample_during_training(args, model, data, path, device):
    """Write a GIF of samples, and a sheet of samples below one row of data; of latents, an array."""
    videos = sample_videos(model, args, args.sample_videos, args.frames, device, args.seed, args.batch)
    if args.latents:
        return write_whole(path, partial(write_npz, videos=videos))
    real = to_uint8(data[0][0][None])
    write_gif(path.with_suffix(".gif"), videos, args.fps)
    write_sheet(path.with_suffix(".png"), np.concatenate([real, videos]))


def sample(args):
    """Draw videos from a checkpoint, without its data."""
    checkpoint = load_checkpoint(args.run)
    run = argparse.Namespace(**checkpoint["args"])
    run.device, run.frames, run.eval_every = args.device, args.frames or run.frames, 0
    for name in ("size", "sample_steps", "eta", "fps"):
        if getattr(args, name) is not None:
            setattr(run, name, getattr(args, name))
    check(run)
    device = torch.device(args.device)
    model = AveragedModel(make_model(run))
    restore(args.run, ema=(model, checkpoint["ema"]))
    base = Path(args.run) / "sampled" if Path(args.run).is_dir() else Path(args.run).parent / "sampled"
    numbered = (base if i == 1 else base.with_name(f"sampled-{i}") for i in itertools.count(1))
    out = Path(args.out) if args.out else next(path for path in numbered if not path.exists())
    if (out / "videos.npz").exists():
        raise BadInput(f"--out {out} holds samples already: choose another folder")
    (out if run.latents else out / "gif").mkdir(parents=True, exist_ok=True)
    print(f"{args.videos} x {run.frames} frames of {run.size}x{run.size}, {run.sample_steps} steps each, on {device}")
    videos = sample_videos(model.module.to(device), run, args.videos, run.frames, device, args.seed, args.batch, tqdm)
    write_whole(out / "videos.npz", partial(write_npz, videos=videos))
    if run.latents:
        return print(f"wrote {out}/videos.npz    (float32 {videos.shape}: n, frames, size, size, channels)")
    write_sheet(out / "sheet.png", videos[:16])
    for i, video in enumerate(videos):
        write_gif(out / "gif" / f"{i:04d}.gif", video[None], run.fps)
    print(f"wrote {out}/videos.npz    (uint8 {videos.shape}: n, frames, height, width, RGB; score it with fvd.py)")
    print(f"      {out}/sheet.png")
    print(f"      {out}/gif/")


# -----------------------------------------------------------------------------
# 7. The command line

# What fits: a CPU run ends in minutes, a GPU run is worth its device. --help prints these.
SIZED = {
    "cpu": dict(size=16, frames=8, dim=32, dim_mults=[1, 2, 4], heads=4, batch=4, steps=500, lr=1e-3, ema=0.995,
                sample_every=500),
    "cuda": dict(size=32, frames=16, dim=64, dim_mults=[1, 2, 4, 8], heads=8, batch=16, steps=20_000, lr=3e-4,
                 ema=0.9995, sample_every=2000),
}  # fmt: skip


def default_device():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


class Parser(argparse.ArgumentParser):
    """Complains in one sentence, by BadInput."""

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


positive = within(int, 1, 10**9)


def multiples(text):
    """"1,2,4" -> [1, 2, 4]"""
    try:
        return [positive(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers like 1,2,4") from None


def add_sampling_arguments(group, steps, eta, fps):
    """Options of every sampler, with what to say of their defaults."""
    group.add_argument("--sample-steps", type=positive, help=f"denoising steps per sample (default {steps})")
    group.add_argument("--eta", type=within(float, 0, 1), help=f"noise in sampling: 0 DDIM, 1 DDPM (default {eta})")
    group.add_argument("--fps", type=within(float, 0.1, 100), help=f"frames per second of the GIFs (default {fps})")


def training_parser():
    """Options of training; what depends on the device has no default yet."""

    def sized(name):
        gpu, cpu = (str(SIZED[kind][name]).strip("[]").replace(", ", ",") for kind in ("cuda", "cpu"))
        return f"default {gpu} on a GPU, else {cpu}"

    parser = Parser(
        prog="train.py", formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__.split("\n\n")[0],
        epilog="python train.py sample --help    tells how to draw videos from a checkpoint",
    )  # fmt: skip
    data = parser.add_argument_group("data")
    data.add_argument("--data", default="maze", help="'maze', or a folder (searched recursively) or file of videos, "
                      "arrays or image sequences (default maze)")  # fmt: skip
    data.add_argument("--split", choices=("train", "test", "all"), help="part of a data set that has folders train/ "
                      "and test/, or the lists of CARLA or UCF101 (default train; the papers train on all); a folder "
                      "without these is taken whole")  # fmt: skip
    data.add_argument("--antialias", action=argparse.BooleanOptionalAction, default=True,
                      help="in reducing videos to --size (default yes; the papers: no)")  # fmt: skip
    data.add_argument("--latents", action="store_true", help="files in --data are float arrays (frames, size, size, "
                      "channels) of any values, such as a VAE's latents, which are trained on as they are")  # fmt: skip
    data.add_argument("--size", type=positive, help=f"height and width in pixels ({sized('size')})")
    data.add_argument("--frames", type=positive, help=f"frames per video ({sized('frames')})")
    data.add_argument("--workers", type=within(int, 0, 1024),
                      help="processes that prepare data: decode files, up to 8 by default, and load batches, by "
                      "default none on a CPU, else up to 8")  # fmt: skip
    model = parser.add_argument_group("model")
    model.add_argument("--temporal", default="bi-mamba", metavar="NAME",
                       help=f"temporal layer: {', '.join(TEMPORAL_LAYERS)} (default bi-mamba)")  # fmt: skip
    model.add_argument("--dim", type=positive, help=f"width of the first level, a multiple of 8 ({sized('dim')})")
    model.add_argument("--dim-mults", type=multiples, help=f"levels' widths in units of dim ({sized('dim_mults')})")
    model.add_argument("--heads", type=positive, help=f"attention heads ({sized('heads')})")
    model.add_argument("--target", default="v", choices=("eps", "v", "x0"), help="what it predicts (default v)")
    model.add_argument("--diffusion-steps", type=positive, default=256, help="steps of the schedule (default 256)")
    loop = parser.add_argument_group("training")
    loop.add_argument("--steps", type=positive, help=f"optimiser steps in all ({sized('steps')})")
    loop.add_argument("--batch", type=positive, help=f"videos per backward pass ({sized('batch')})")
    loop.add_argument("--grad-accum", type=positive, default=1, help="backward passes per step (default 1)")
    loop.add_argument("--lr", type=within(float, 1e-12, 10), help=f"Adam's learning rate ({sized('lr')})")
    loop.add_argument("--ema", type=within(float, 0, 1), help=f"decay of the averaged weights ({sized('ema')})")
    loop.add_argument("--seed", type=within(int, 0, 2**31 - 1), default=0,
                      help="of weights, data order and noise (default 0)")  # fmt: skip
    loop.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the best there is)")
    run = parser.add_argument_group("run")
    run.add_argument("--out", help="folder of the run (default runs/ and the data's name, numbered if taken)")
    run.add_argument("--resume", metavar="RUN", help="go on with the run in this folder, with its arguments; only "
                     "steps, workers, device, data's place and samples may change")  # fmt: skip
    run.add_argument("--sample-every", type=positive, help=f"steps from sample to sample ({sized('sample_every')})")
    run.add_argument("--sample-videos", type=positive, default=8, help="videos drawn each time (default 8)")
    run.add_argument("--eval-every", type=within(int, 0, 10**9), default=0,
                     help="steps from score to score (default 0: never)")  # fmt: skip
    run.add_argument("--eval-videos", type=positive, default=64, help="samples and held-out videos of a score "
                     "(default 64); few videos score high, compare equal numbers only")  # fmt: skip
    run.add_argument("--i3d", metavar="FILE", help="I3D's weights, see fvd.py; without them it is FD-random, not FVD")
    add_sampling_arguments(run, 50, 0, 8)
    return parser


def sampling_parser():
    """Options of sampling."""
    parser = Parser(prog="train.py sample", description="Draw videos from a checkpoint.")
    parser.add_argument("run", help="folder of a run, or its checkpoint.pt")
    parser.add_argument("--videos", type=positive, default=8, help="how many (default 8)")
    parser.add_argument("--frames", type=positive, help="frames per video, any number (default: as trained)")
    parser.add_argument("--size", type=positive, help="height and width in pixels (default: as trained)")
    parser.add_argument("--batch", type=positive, default=8, help="videos drawn at a time (default 8)")
    parser.add_argument("--seed", type=within(int, 0, 2**31 - 1), default=0, help="of the noise (default 0)")
    parser.add_argument("--device", default=default_device(), help="cuda, cuda:1, mps or cpu (default: the best)")
    parser.add_argument("--out", help="folder to write to (default RUN/sampled, numbered if taken)")
    add_sampling_arguments(parser, *["that of the run"] * 3)
    return parser


def default_out(args):
    return Path("runs") / (Path(args.data).stem or "videos")


def complete(args):
    """Fill in what depends on the device."""
    args.device, args.channels = args.device or default_device(), 3
    if args.data == "maze" and (args.split or args.latents or not args.antialias):
        raise BadInput("--split, --latents and --no-antialias are for --data FOLDER, not for the maze: leave them out")
    if args.latents and (args.size or args.eval_every or not args.antialias):
        raise BadInput("--latents are neither resized nor scored: leave out --size, --no-antialias and --eval-every")
    if args.latents:
        args.size, args.channels = latent_shape(args.data)
    sized = SIZED["cuda" if args.device.startswith("cuda") else "cpu"]
    for name, value in {**sized, "sample_steps": 50, "eta": 0.0, "fps": 8.0}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.data != "maze":
        args.data = str(Path(args.data).resolve())
    if args.out and (Path(args.out) / "log.jsonl").exists():
        raise BadInput(f"--out {args.out} holds a run: go on with --resume {shlex.quote(args.out)}, or choose another")
    return args


# What a resumed run may change; anything else would make it another run.
FREE = {"data", "steps", "workers", "device", "out", "resume",
        "sample_every", "sample_videos", "sample_steps", "eta", "fps"}  # fmt: skip


def resumed(parser, argv):
    """Arguments and checkpoint of the run that --resume names, with what else the command line says."""
    given = parser.parse_args(argv)
    run = Path(given.resume)
    run = run.parent if run.name == "checkpoint.pt" else run
    if given.out:
        raise BadInput(f"--resume writes into the run's own folder: leave out --out {given.out}, or copy the run first")
    if not run.is_dir():
        raise BadInput(f"--resume {run}: give the folder of a run, with a checkpoint.pt in it")
    checkpoint = load_checkpoint(run)
    saved = checkpoint["args"] | {"device": None, "out": str(run)}
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    args.device = args.device or default_device()
    args.data = args.data if args.data == "maze" else str(Path(args.data).resolve())
    changed = [name for name in saved if name not in FREE and getattr(args, name) != saved[name]]
    if changed:
        flags = ", ".join(f"--{name.replace('_', '-')} (was {saved[name]})" for name in changed)
        raise BadInput(f"--resume cannot change {flags}: leave it out, or start a new run with --out")
    if args.steps < checkpoint["step"]:
        raise BadInput(f"--steps {args.steps} is less than the {checkpoint['step']} that {run} has done: give more")
    return args, checkpoint


def check(args):
    """Raise BadInput for what would otherwise fail later, before anything is written."""
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {args.device} cannot be used here: {str(error).splitlines()[0]}") from error
    if args.data != "maze" and args.out and Path(args.data) in Path(args.out, "inside").resolve().parents:
        raise BadInput(f"--out {args.out} lies in --data, and its samples would become data: choose another folder")
    if args.eval_every and args.frames < 9:
        raise BadInput(f"--eval-every needs --frames 9 or more, the least that I3D takes, not {args.frames}")
    if not 1 <= args.sample_steps <= args.diffusion_steps:
        raise BadInput(f"--sample-steps {args.sample_steps} must be 1 to --diffusion-steps, {args.diffusion_steps}")
    try:
        with torch.device("meta"):
            factor = make_model(args).factor
    except ValueError as error:
        raise BadInput(str(error)) from error
    if args.size % factor:
        mults = ",".join(map(str, args.dim_mults))
        raise BadInput(f"--size {args.size} must be a multiple of {factor}, what --dim-mults {mults} divides it by")


def main(argv):
    """The command: train, or sample with that word first."""
    if argv[:1] == ["sample"]:
        return sample(sampling_parser().parse_args(argv[1:]))
    parser = training_parser()
    if parser.parse_args(argv).resume is not None:
        args, checkpoint = resumed(parser, argv)
    else:
        args, checkpoint = complete(parser.parse_args(argv)), None
    check(args)
    train(args, checkpoint)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that no half-written file stays
    try:
        main(sys.argv[1:])
    except BadInput as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or 'a file'}: {error.strerror or error}; what was written before is intact"
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        message = "not enough memory: lower --batch, --dim, --size or --frames"
    except KeyboardInterrupt:
        sys.exit(130)  # what a shell expects of Ctrl-C
    else:
        sys.exit(0)
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(2)
