"""Frechet Video Distance in one file: reading videos, I3D, the distance, the command.

    python fvd.py REAL FAKE --weights i3d_pretrained_400.pt     FVD and KVD of two sets of videos
    python fvd.py REAL FAKE --download                          the same, fetching the weights once
    python fvd.py REAL FAKE --features random                   no weights at hand: FD-random, not FVD
    python fvd.py REAL FAKE --protocol paper --json out.json    the numbers as [3] computed them

REAL and FAKE are folders of videos, of arrays or of folders of images, or single files. As a library:

    net = load_i3d("i3d_pretrained_400.pt")                 or random_i3d()
    frechet_distance(video_features(real, net), video_features(fake, net))

with real and fake uint8 (n, t, h, w, 3). This file needs torch, numpy, tqdm and imageio[pyav], and
nothing else of the project it comes from.

References
  [1] Unterthiner et al., Towards Accurate Generative Models of Video (FVD), arXiv 1812.01717
  [2] Carreira and Zisserman, Quo Vadis, Action Recognition? (I3D), arXiv 1705.07750
  [3] Oshima et al., SSM Meets Video Diffusion Models, arXiv 2403.07711
  [4] Binkowski et al., Demystifying MMD GANs (the kernel distance), arXiv 1801.01401
  [5] Naeem et al., Reliable Fidelity and Diversity Metrics (random embeddings), arXiv 2002.09797

Map
  1. Reading videos      find_videos, open_videos, read_frames
  2. I3D                 same_pad, Unit3D, I3D
  3. Weights             load_i3d, random_i3d, download_weights
  4. Clips to features   resize_tf1, preprocess, video_features, windows
  5. Distances           frechet_distance, kernel_distance, bootstrap_std
  6. Scoring a set       decode_ahead, measure, cached
  7. The command

Letters: n videos, t frames (every axis of time in this file), h w height and width, c channels,
d features (400).
"""
import argparse
import contextlib
import functools
import gc
import hashlib
import http.client
import json
import os
import pickle
import re
import sys
import urllib.request
import zipfile
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# -----------------------------------------------------------------------------
# 1. Reading videos
#
# Folders of videos hold surprises: half-copied files, audio, pipes, links in
# circles. One rule covers them: a video declares how many frames it has, and
# read_frames yields exactly that many or raises UnreadableVideo, so a damaged
# file is named and never scored as a shorter video.
#
#     source (file or folder) --open_videos--> Video, ... --read_frames--> frames

VIDEO_SUFFIXES = (".gif", ".mp4", ".avi", ".webm", ".mov", ".mkv")
ARRAY_SUFFIXES = (".npy", ".npz", ".pt")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


class UnreadableVideo(ValueError):
    """A source that holds no intact video. `name` says which, `reason` why, str() both."""

    def __init__(self, name, reason):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


class Video(NamedTuple):
    """One video, not decoded yet."""
    name: str         # printable path; "samples.npz[3]" is the fourth video of an array
    count: Callable   # () -> the number of frames it declares
    decode: Callable  # () -> iterator over the frames as they are stored
    scale: tuple      # (low, high): the values of black and white if its frames are floats


def printable(path):
    """The path with control characters and undecodable bytes escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))


def natural(path):
    """Sort key under which frame_2 comes before frame_10."""
    return [int(part) if part.isdecimal() else part for part in re.split("([0-9]+)", str(path))]


@contextlib.contextmanager
def naming(name):
    """Within it, whatever a decoder raises becomes UnreadableVideo with this name."""
    try:
        yield
    except UnreadableVideo:
        raise
    except pickle.UnpicklingError as error:
        raise UnreadableVideo(name, "it is damaged, or holds other objects than plain tensors") from error
    except Exception as error:  # FFmpeg, Pillow, zip and pickle readers share no narrower class
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UnreadableVideo(name, re.split(r"\n|\. ", reason.strip())[0]) from error


def find_videos(root):
    """Sources of videos at or below `root`, in natural order.    path -> list of Path

    A source is a file with a suffix above, or a folder with several images and none of those files
    in it (one video, an image per frame). Links are followed, each folder once; names that begin with a
    dot are skipped. Nothing is opened. Raises UnreadableVideo if there is no source."""
    root = Path(root)
    if not os.path.lexists(root):
        raise UnreadableVideo(printable(root), "there is no such file or folder")
    if not root.is_dir():
        return [root]
    found, others, seen = [], Counter(), set()
    unlisted = lambda error: found.append(Path(error.filename))  # open_videos will say why
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=unlisted):
        if os.path.realpath(folder) in seen:
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths = [Path(folder, name) for name in files if not name.startswith(".")]
        videos = [path for path in paths if path.suffix.lower() in VIDEO_SUFFIXES + ARRAY_SUFFIXES]
        images = sum(path.suffix.lower() in IMAGE_SUFFIXES for path in paths)
        found += videos or ([Path(folder)] if images > 1 else [])  # a single one is a preview
        others.update(path.suffix or "suffixless" for path in paths)
    if not found:
        held = ", ".join(f"{k} {suffix}" for suffix, k in others.most_common(5)) or "nothing"
        raise UnreadableVideo(printable(root), f"no video in it (found {held}); wanted are "
                              f"{' '.join(VIDEO_SUFFIXES + ARRAY_SUFFIXES)} or folders of images")
    return sorted(found, key=natural)


def open_videos(path, scale=None):
    """The videos of one source, without decoding them.    path -> list of Video

    `scale` is (low, high), the values of black and white in float arrays; None decides by
    `float_scale`. Raises UnreadableVideo; never opens a pipe, socket or device."""
    path = Path(path)
    name = printable(path)
    with naming(name):
        if path.is_dir():
            images = frame_paths(path)
            return [Video(name, images.__len__, partial(map, read_image, images), None)]
        require_file(path)
        if path.suffix.lower() in ARRAY_SUFFIXES:
            return array_videos(path, name, scale)
        if head(path, 4) == b"GIF8":
            count, decode = gif_count, partial(stored_frames, path, "pillow", mode="RGB")
        else:  # one thread each: it is the videos that are decoded in parallel
            count, decode = container_count, partial(stored_frames, path, "pyav", thread_count=1)
        return [Video(name, functools.cache(partial(count, path)), decode, None)]


def read_frames(video):
    """Decode one video, lazily.    Video -> yields uint8 RGB (h, w, 3)

    Raises UnreadableVideo, possibly after some frames: they count only if the iterator ends."""
    with naming(video.name):
        declared, given, shape = video.count(), 0, None
        for frame in video.decode():
            frame = rgb8(frame, video.scale)
            if shape not in (None, frame.shape):
                raise ValueError(f"frame {given} has another size than the frames before it")
            given, shape = given + 1, frame.shape
            yield frame
        if given != declared or given == 0:
            raise ValueError(f"{given} frames come out of the {declared} it declares; it is damaged")


def head(path, size):
    with open(path, "rb") as raw:
        return raw.read(size)


def require_file(path):
    if not path.is_file():
        what = "a pipe, socket or device; it was not opened" if path.exists() else "a dangling link"
        raise ValueError(what if os.path.lexists(path) else "there is no such file")


def rgb8(frame, scale=None):
    """8-bit RGB of any frame; alpha is dropped.    (h, w) or (h, w, 1..4) -> uint8 (h, w, 3)"""
    if frame.dtype == bool:
        frame = frame * np.uint8(255)
    elif frame.dtype == np.uint16:
        frame = (frame / 257).round()  # 65535 = 255 * 257
    elif frame.dtype.kind == "f":
        if not np.isfinite(frame).all():
            raise ValueError("it holds NaN or infinite values")
        low, high = scale
        frame = ((frame.astype(np.float32) - low) * (255 / (high - low))).round().clip(0, 255)
    elif frame.dtype != np.uint8:
        raise ValueError(f"pixels of type {frame.dtype}; wanted is uint8 in 0..255 or float")
    frame = frame if frame.ndim == 3 else frame[..., None]
    frame = frame[..., :3] if frame.shape[-1] >= 3 else frame[..., :1].repeat(3, axis=-1)
    return np.array(frame, dtype=np.uint8)


@contextlib.contextmanager
def decoder(path, plugin):
    if not gc.get_freeze_count():
        gc.freeze()  # imageio collects garbage at each close: 0.1 s, if torch's modules took part
    # A file, not a path: imageio takes some paths for addresses or for zips.
    with open(path, "rb") as raw, iio.imopen(raw, "r", plugin=plugin) as file:
        yield file


def stored_frames(path, plugin, **options):
    with decoder(path, plugin) as file:
        yield from file.iter(**options)


def container_count(path):
    """Number of frames of an mp4, mov, avi, mkv or webm.

    mp4 and mov keep an exact table. The others do not (avi also counts frames it dropped): there
    the frames are counted, and the last must end where the container says that the video ends."""
    try:
        with decoder(path, "pyav") as file:
            declared, exact = file.properties().n_images, head(path, 4) != b"RIFF"
            return declared if declared and exact else count_to_the_end(file, declared)
    except OSError as error:
        silent = isinstance(error.__cause__, IndexError)
        raise ValueError("no video stream in it, only audio or data" if silent else
                         "no decoder knows it; it is truncated, or not a video") from error


def count_to_the_end(file, declared):
    about, times = file.metadata(), []
    with contextlib.suppress(StopIteration):
        while True:  # metadata() decodes the next frame, and leaves out the conversion to RGB
            times.append(file.metadata(index=len(times), constant_framerate=False)["time"])
    ends = [about.get("duration", 0), declared / about["fps"]]  # seconds
    for clock in (value for key, value in about.items() if key.startswith("DURATION")):
        hours, minutes, seconds = clock.split(":")
        ends.append(3600 * int(hours) + 60 * int(minutes) + float(seconds))
    if max(ends) == 0:
        raise ValueError("it declares neither frames nor duration, so a lost end would go unseen; "
                         "rewrite it with: ffmpeg -i IN -c copy OUT.mp4")
    longest = max(np.diff(times), default=1 / about["fps"])  # seconds that a frame stays
    if not times or max(ends) - times[-1] > 1.5 * longest:
        raise ValueError(f"it ends after {len(times)} frames, before the {max(ends):.2f} seconds "
                         "that it declares; it is truncated or damaged")
    return len(times)


def gif_count(path):
    with open(path, "rb") as raw:  # a complete gif ends with an empty block and a semicolon
        raw.seek(-min(1024, path.stat().st_size), os.SEEK_END)
        if not raw.read().rstrip(b"\0").endswith(b"\0;"):
            raise ValueError("the gif has no end mark; it is truncated")
    with decoder(path, "pillow") as file:
        return file.properties(index=...).n_images


def read_image(path):
    require_file(path)
    with naming(printable(path)), decoder(path, "pillow") as file:
        return file.read()


def frame_paths(folder):
    """Images of a folder in natural order; numbers in their names must have one step."""
    paths = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES]
    paths = sorted((path for path in paths if not path.name.startswith(".")), key=natural)
    steps = np.diff([int(k[-1]) for path in paths if (k := re.findall("[0-9]+", path.stem))])
    if len(steps) == len(paths) - 1 > 0:
        for step, before, after in zip(steps, paths, paths[1:]):
            if step != max(steps.min(), 1):
                raise ValueError(f"frames are missing or mixed: {printable(after.name)} follows "
                                 f"{printable(before.name)}")
    return paths


def array_videos(path, name, scale):
    array = channels_last(load_array(path))
    if array.size == 0:
        raise ValueError(f"an empty array of shape {array.shape}")
    if array.dtype.kind != "f" and array.dtype != np.uint8:
        raise ValueError(f"an array of {array.dtype}; save uint8 in 0..255, or float")
    scale = (scale or float_scale(array)) if array.dtype.kind == "f" else None
    names = [name] if len(array) == 1 else [f"{name}[{i}]" for i in range(len(array))]
    return [Video(name, clip.__len__, clip.__iter__, scale) for name, clip in zip(names, array)]


def load_array(path):
    """The one array of videos in an .npy, .npz or .pt file; .npy and .pt are memory-mapped."""
    zipped = head(path, 2) == b"PK"
    if path.suffix.lower() == ".pt":
        content = torch.load(path, map_location="cpu", weights_only=True,
                             mmap=zipped and path.name.isprintable())  # torch maps no odd names
    elif zipped or head(path, 6) == b"\x93NUMPY":
        content = np.load(path, mmap_mode="r", allow_pickle=False)
    else:
        raise ValueError("this is no NumPy file")
    arrays = dict(content).values() if hasattr(content, "keys") else [content]
    arrays = [array for array in arrays if getattr(array, "ndim", 0) >= 3]
    if len(arrays) != 1:
        raise ValueError(f"it holds {len(arrays)} arrays that could be videos; keep exactly one")
    array = arrays[0]
    if isinstance(array, torch.Tensor):
        array = (array.float() if array.dtype == torch.bfloat16 else array).detach().numpy()
    return array


def channels_last(array):
    """A view of one video or many.    -> (n, t, h, w, c)

    Taken are (t, h, w) grey; (t, h, w, c), (c, t, h, w), (t, c, h, w); and (n, t, h, w, c),
    (n, c, t, h, w), (n, t, c, h, w), with c = 1, 3 or 4, tried in this order."""
    shape = tuple(array.shape)
    if array.ndim == 3 and shape[-1] not in (1, 3, 4):
        return array[None, ..., None]
    array = array[None] if array.ndim == 4 else array
    for axis in (4, 1, 2) if array.ndim == 5 else ():
        if array.shape[axis] in (1, 3, 4):
            return np.moveaxis(array, axis, -1)
    raise ValueError(f"an array of shape {shape} is no video; save (t, h, w, c) or (n, t, h, w, c)")


def float_scale(videos):
    """What float pixels mean, by one rule for the whole file.    -> (0, 1) or (-1, 1)

    All within [0, 1]: that is the scale. Else all within [-1, 1]: that one. Anything else is
    refused. Rounding may step over the ends by 0.001, and is clipped."""
    finite = (video[np.isfinite(video)] for video in videos)  # read_frames names those with NaN
    ends = [end for video in finite if video.size for end in (video.min(), video.max())]
    low, high = min(ends, default=0), max(ends, default=0)
    if low < -1.001 or high > 1.001:
        raise ValueError(f"floats from {low:.4g} to {high:.4g} fit neither [0, 1] nor [-1, 1]; "
                         "save 0..255 as uint8")
    return (0, 1) if low >= -0.001 else (-1, 1)


# -----------------------------------------------------------------------------
# 2. I3D
#
# FVD's features are the 400 logits of I3D [2], an Inception network inflated to
# three dimensions and trained on Kinetics-400 alone, averaged over time. Three
# details move the score: no softmax, BatchNorm's eps = 1e-3, and TensorFlow's
# SAME padding, which depends on the size of the input and may be lopsided:
#
#     total = max(k - s, 0) if size % s == 0 else max(k - size % s, 0)
#     front = total // 2,    back = total - front


def same_pad(x, kernel, stride):
    """TensorFlow's SAME padding with zeros.    x (n, c, t, h, w) -> (n, c, t', h', w')"""
    pad = []
    for size, k, s in list(zip(x.shape[2:], kernel, stride))[::-1]:  # F.pad: the last axis first
        total = max(k - s, 0) if size % s == 0 else max(k - size % s, 0)
        pad += [total // 2, total - total // 2]
    return F.pad(x, pad) if any(pad) else x


class Unit3D(nn.Module):
    """Convolution, BatchNorm, ReLU.    x (n, c_in, t, h, w) -> (n, c_out, t/s, h/s, w/s)

    Needs: same_pad."""

    def __init__(self, c_in, c_out, kernel=1, stride=1):
        super().__init__()
        self.conv3d = nn.Conv3d(c_in, c_out, kernel, stride, bias=False)
        # Frozen statistics, without the counter that the published files do not have either.
        self.bn = nn.BatchNorm3d(c_out, eps=1e-3, track_running_stats=False)
        self.bn.running_mean, self.bn.running_var = torch.zeros(c_out), torch.ones(c_out)

    def forward(self, x):
        x = same_pad(x, self.conv3d.kernel_size, self.conv3d.stride)
        return F.relu(self.bn(self.conv3d(x)))


class I3D(nn.Module):
    """FVD's network [2].    x (n, 3, t, 224, 224) in [-1, 1] -> logits (n, 400)

    The names of the parameters are those of the published state dict. At least 9 frames.
    Needs: same_pad, Unit3D."""

    MIXED = {  # widths of the branches b0, b1a, b1b, b2a, b2b, b3b
        "Mixed_3b": (64, 96, 128, 16, 32, 32), "Mixed_3c": (128, 128, 192, 32, 96, 64),
        "Mixed_4b": (192, 96, 208, 16, 48, 64), "Mixed_4c": (160, 112, 224, 24, 64, 64),
        "Mixed_4d": (128, 128, 256, 24, 64, 64), "Mixed_4e": (112, 144, 288, 32, 64, 64),
        "Mixed_4f": (256, 160, 320, 32, 128, 128), "Mixed_5b": (256, 160, 320, 32, 128, 128),
        "Mixed_5c": (384, 192, 384, 48, 128, 128)}

    def __init__(self):
        super().__init__()
        self.Conv3d_1a_7x7 = Unit3D(3, 64, kernel=7, stride=2)
        self.Conv3d_2b_1x1 = Unit3D(64, 64)
        self.Conv3d_2c_3x3 = Unit3D(64, 192, kernel=3)
        c = 192
        for name, (b0, b1a, b1b, b2a, b2b, b3b) in self.MIXED.items():
            self.add_module(name, nn.ModuleDict({
                "b0": Unit3D(c, b0),
                "b1a": Unit3D(c, b1a), "b1b": Unit3D(b1a, b1b, kernel=3),
                "b2a": Unit3D(c, b2a), "b2b": Unit3D(b2a, b2b, kernel=3),
                "b3b": Unit3D(c, b3b)}))
            c = b0 + b1b + b2b + b3b
        self.logits = nn.ModuleDict({"conv3d": nn.Conv3d(c, 400, 1)})
        self.eval().requires_grad_(False)

    def pool(self, x, kernel, stride):
        # Zeros are as good as -inf around x: it comes out of a ReLU.
        return F.max_pool3d(same_pad(x, kernel, stride), kernel, stride)

    def mixed(self, x, name):
        b = self.get_submodule(name)
        return torch.cat([b["b0"](x), b["b1b"](b["b1a"](x)), b["b2b"](b["b2a"](x)),
                          b["b3b"](self.pool(x, (3, 3, 3), (1, 1, 1)))], dim=1)

    def forward(self, x):
        if x.shape[1] != 3 or x.shape[2] < 9 or x.shape[3:] != (224, 224):
            raise ValueError(f"I3D wants (n, 3, t >= 9, 224, 224), not {tuple(x.shape)}")
        x = self.Conv3d_1a_7x7(x)                               # (n, 64, t/2, 112, 112)
        x = self.pool(x, (1, 3, 3), (1, 2, 2))                  # (n, 64, t/2, 56, 56)
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))           # (n, 192, t/2, 56, 56)
        x = self.pool(x, (1, 3, 3), (1, 2, 2))                  # (n, 192, t/2, 28, 28)
        for name in ("Mixed_3b", "Mixed_3c"):
            x = self.mixed(x, name)                             # (n, 480, t/2, 28, 28)
        x = self.pool(x, (3, 3, 3), (2, 2, 2))                  # (n, 480, t/4, 14, 14)
        for name in ("Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f"):
            x = self.mixed(x, name)                             # (n, 832, t/4, 14, 14)
        x = self.pool(x, (2, 2, 2), (2, 2, 2))                  # (n, 832, t/8, 7, 7)
        for name in ("Mixed_5b", "Mixed_5c"):
            x = self.mixed(x, name)                             # (n, 1024, t/8, 7, 7)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)                # (n, 1024, t/8 - 1, 1, 1)
        return self.logits["conv3d"](x).mean((2, 3, 4))         # (n, 400)


# -----------------------------------------------------------------------------
# 3. Weights
#
# Two published files hold this network: a plain state dict and a TorchScript
# program. TorchScript runs code when it is loaded, and half a download loads as
# nothing at all, so a file is hashed before it is opened. Nothing is fetched
# without --download. Other I3D files found in the wild (rgb_imagenet.pt,
# model_rgb.pth) are another network, and their distances are not FVD.

STATE_DICT = "i3d_pretrained_400.pt"
STATE_DICT_URL = "https://github.com/songweige/TATS/raw/main/tats/fvd/i3d_pretrained_400.pt"
STATE_DICT_GIT_SHA1 = "a867b87ac3a9097d200598b1d48a1b890d8ec744"  # git hash-object FILE
TORCHSCRIPT = "i3d_torchscript.pt"
TORCHSCRIPT_URL = "https://huggingface.co/flateon/FVD-I3D-torchscript/resolve/main/i3d_torchscript.pt"
TORCHSCRIPT_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
TORCHSCRIPT_BYTES = 51235320
WEIGHTS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fvd", STATE_DICT)

BY_HAND = f"""Get one of these two files and pass it as --weights FILE, or put the first one at {WEIGHTS} :
  {STATE_DICT}, about 49 MB, from {STATE_DICT_URL}
    `git hash-object FILE` must print {STATE_DICT_GIT_SHA1}
  {TORCHSCRIPT}, {TORCHSCRIPT_BYTES} bytes, from {TORCHSCRIPT_URL}
    its sha256 must be {TORCHSCRIPT_SHA256}
Or let --download fetch the first, or score without weights by --features random."""


def digest(path, algorithm="sha256", prefix=b""):
    total = hashlib.new(algorithm, prefix)
    with open(path, "rb") as raw:
        while block := raw.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def published(path):
    """Which published file this is, by size and hash: STATE_DICT, TORCHSCRIPT or None."""
    size = os.path.getsize(path)
    if size == TORCHSCRIPT_BYTES and digest(path) == TORCHSCRIPT_SHA256:
        return TORCHSCRIPT
    if digest(path, "sha1", prefix=b"blob %d\0" % size) == STATE_DICT_GIT_SHA1:
        return STATE_DICT
    return None


class TorchScriptI3D(nn.Module):
    """The TorchScript file with I3D's interface.    x (n, 3, t, 224, 224) -> (n, 400)"""

    def __init__(self, path):
        super().__init__()
        self.net = torch.jit.load(path, map_location="cpu").eval()

    def forward(self, x):
        return self.net(x=x, rescale=False, resize=False, return_features=True)


def load_i3d(path, allow_unknown=False):
    """I3D with the weights of a published file.    path -> nn.Module

    Raises ValueError if the file is missing, or is none of the two and `allow_unknown` is False."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: there is no such file of weights. {BY_HAND}")
    if published(path) is None and not allow_unknown:
        raise ValueError(f"{path}: its {os.path.getsize(path)} bytes have the hash of neither "
                         f"published file, so it is truncated or another network; "
                         f"--allow-unknown-weights takes it all the same. {BY_HAND}")
    if zipfile.is_zipfile(path) and any("/code/" in k for k in zipfile.ZipFile(path).namelist()):
        return TorchScriptI3D(path)
    net = I3D()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict({k: v for k, v in state.items() if "num_batches_tracked" not in k})
    except Exception as error:  # an unknown file may hold anything: pickle, zip, other tensors
        raise ValueError(f"{path}: this is no state dict of I3D. {BY_HAND}") from error
    return net


def random_i3d(seed=0):
    """I3D with random weights [5], the same on every machine.    seed -> I3D

    Its distances rank videos unlike natural images usefully, but they are not FVD."""
    net, random = I3D(), np.random.RandomState(seed)  # RandomState's stream never changes
    for name, value in sorted(net.state_dict().items()):
        if name.endswith("conv3d.weight"):  # He's scale, times 0.6 for the four branches summed
            std = 0.6 * (2 / value[0].numel()) ** 0.5
            value.copy_(torch.from_numpy(random.standard_normal(value.shape) * std))
        elif name.endswith("running_var"):
            value.copy_(torch.from_numpy(random.uniform(0.05, 1.5, value.shape)))
        elif not name.endswith("bn.weight"):
            value.copy_(torch.from_numpy(random.standard_normal(value.shape) * 0.1))
    return net


def download_weights(path=WEIGHTS, url=STATE_DICT_URL):
    """Fetch the state dict beside `path`, verify it, move it there.    -> path

    An intact file that is there already is left alone. Raises ValueError."""
    path = Path(path)
    if path.exists() and published(path) == STATE_DICT:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=60) as reply, open(part, "wb") as out:
            total = int(reply.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := reply.read(1 << 16):
                    bar.update(out.write(block))
        if published(part) != STATE_DICT:
            raise ValueError(f"{url}: what came is not {STATE_DICT}: cut off, or a proxy's page. {BY_HAND}")
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"{url}: the download failed ({error}). {BY_HAND}") from error
    finally:
        part.unlink(missing_ok=True)
    return path


# -----------------------------------------------------------------------------
# 4. Clips to features
#
# Implementations of FVD disagree on how frames reach 224 x 224 and on their
# range, and both change the number. TensorFlow 1 samples at
#
#     source = destination * in / out                        (tf1)
#     source = (destination + 1/2) * in / out - 1/2          (half-pixel)
#
# `standard` is half-pixel and [-1, 1]. `paper` is what the code of [3] does:
# tf1, and [0, 1], because its line 2 x - 1 is commented out.

PROTOCOLS = {"standard": ("half-pixel", (-1, 1)), "paper": ("tf1", (0, 1))}


def resize_tf1(x, size=224):
    """TensorFlow 1's bilinear resize, without half-pixel centres.    x (..., h, w) -> (..., s, s)"""
    for axis in (-1, -2):
        length = x.shape[axis]
        scale = torch.tensor(length / size, dtype=torch.float32)  # TensorFlow rounds here, visibly
        source = torch.arange(size, dtype=torch.float32).mul(scale).to(x.device)
        low = source.floor().long()
        high = (low + 1).clamp(max=length - 1)
        weight = (source - low).unflatten(0, (size, 1) if axis == -2 else (size,))
        below, above = x.index_select(axis, low), x.index_select(axis, high)
        x = below + (above - below) * weight
    return x


def preprocess(clip, resize="half-pixel", value_range=(-1, 1)):
    """Frames as I3D takes them.    clip uint8 (t, h, w, 3) -> float (3, t, 224, 224)

    Needs: resize_tf1."""
    x = clip.permute(0, 3, 1, 2).float()                        # (t, 3, h, w)
    if resize == "tf1":
        x = resize_tf1(x)
    else:
        x = F.interpolate(x, (224, 224), mode="bilinear", align_corners=False)
    low, high = value_range
    return (x * ((high - low) / 255) + low).transpose(0, 1)     # (3, t, 224, 224)


@torch.no_grad()
def video_features(clips, net, resize="half-pixel", value_range=(-1, 1), batch=8, device="cpu", bfloat16=False):
    """Features of clips, batch by batch.    iterable of uint8 (t, h, w, 3) -> float64 (n, d)

    `net` is on `device`. Clips may differ in size, not in length; an iterator is taken as it goes,
    so memory does not grow with n. Float32 throughout, even within an autocast, unless `bfloat16`.
    Needs: preprocess, resize_tf1."""
    clips, features = iter(clips), []
    precision = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bfloat16)
    with precision, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 errs by 1e-3
        while group := [torch.as_tensor(clip) for _, clip in zip(range(batch), clips)]:
            if any(clip.dtype != torch.uint8 or clip.ndim != 4 for clip in group):
                raise ValueError("a clip is uint8 (t, h, w, 3) in 0..255")
            x = [preprocess(clip.to(device), resize, value_range) for clip in group]
            features.append(net(torch.stack(x)).double().cpu())  # (batch, d)
    return torch.cat(features) if features else torch.empty(0, 400, dtype=torch.float64)


def windows(length, frames, clips=1, window="random", rng=None):
    """Starts of at most `clips` different windows, none if the video is too short.    -> list"""
    if window == "first":
        return list(range(0, length - frames + 1, frames))[:clips]
    starts = max(length - frames + 1, 0)
    return sorted(rng.choice(starts, min(clips, starts), replace=False).tolist())


# -----------------------------------------------------------------------------
# 5. Distances
#
# FVD [1] is the Frechet distance of two Gaussians fitted to the features:
#
#     d^2 = |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))
#
# A matrix square root of S1 S2 is fragile, for the product is neither symmetric
# nor of full rank. With S = A^T A, where A holds the centred features over
# sqrt(n - 1), the last trace is the nuclear norm (the sum of the singular
# values) of A1 A2^T: real, exact, and S itself is never formed. If n > d, the
# triangle of A = QR takes A's place, because R^T R = A^T A too.

def frechet_distance(a, b):
    """Frechet distance of two sets of features [1], in float64.    a (n, d), b (m, d) -> float

    Tensors or arrays; n and m at least 2. The fewer there are, the higher the distance of two
    samples of one distribution: compare numbers of equal n only."""
    means, roots = [], []
    for x in (torch.as_tensor(a).double().cpu(), torch.as_tensor(b).double().cpu()):
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(f"a covariance needs features (n >= 2, d), not {tuple(x.shape)}")
        if not x.isfinite().all():
            rows = (~x.isfinite().all(1)).nonzero().flatten().tolist()
            raise ValueError(f"the features of videos {rows[:10]} are NaN or infinite")
        means.append(x.mean(0))
        root = (x - means[-1]) / (len(x) - 1) ** 0.5            # (n, d)
        roots.append(torch.linalg.qr(root).R if len(x) > x.shape[1] else root)
    traces = sum(root.square().sum() for root in roots)
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()   # tr((S1 S2)^(1/2))
    return max(0.0, ((means[0] - means[1]).square().sum() + traces - 2 * cross).item())


def kernel_distance(a, b):
    """Unbiased squared MMD, kernel (x.y / d + 1)^3 [1, 4].    a (n, d), b (m, d) -> float

    KVD, if the features are I3D's. Its mean is 0 for two samples of one distribution, at any n."""
    a, b = torch.as_tensor(a).double().cpu(), torch.as_tensor(b).double().cpu()
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3       # (n, m)
    def within(x):  # mean over pairs of different videos
        k = kernel(x, x)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))
    return (within(a) + within(b) - 2 * kernel(a, b).mean()).item()


def bootstrap_std(a, b, rounds, seed=0):
    """Spread of frechet_distance over resamples with replacement.    a (n, d), b (m, d) -> float

    Needs: frechet_distance."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda x: x[torch.randint(len(x), (len(x),), generator=generator)]
    values = [frechet_distance(draw(a), draw(b)) for _ in tqdm(range(rounds), desc="bootstrap")]
    return torch.tensor(values).std().item()


# -----------------------------------------------------------------------------
# 6. Scoring a set
#
# Videos are decoded by two threads ahead of the network (decoders release the
# GIL), in order, and a bounded number of them waits: memory is constant in the
# number of videos. Damaged and short videos are set aside with their reasons.

def decode_ahead(jobs, waiting, workers=2):
    """Results of callables run in threads, in order, at most `waiting` of them ahead."""
    with ThreadPoolExecutor(workers) as pool:
        queue = deque()
        for job in jobs:
            queue.append(pool.submit(job))
            if len(queue) > waiting:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()


def cut_clips(video, frames, clips, window, rng):
    """Decode one video whole, keep its windows.    -> (video, list of (t, h, w, 3), problem)"""
    try:
        with naming(video.name):
            starts = windows(video.count(), frames, clips, window, rng)
        cut = [[] for _ in starts]
        for k, frame in enumerate(read_frames(video) if starts else ()):
            for start, clip in zip(starts, cut):
                if start <= k < start + frames:
                    clip.append(frame)
        return video, [np.stack(clip) for clip in cut], None
    except UnreadableVideo as error:
        return video, [], error


def clip_jobs(root, seed, scale, progress, **cutting):
    """cut_clips as a callable for each video below `root`; opening happens on the way."""
    index = 0
    for source in find_videos(root):
        try:
            videos = open_videos(source, scale)
        except UnreadableVideo as error:
            yield lambda error=error: (None, [], error)
            continue
        progress.total += len(videos) - 1
        for video in videos:
            rng, index = np.random.default_rng([seed, index]), index + 1
            yield partial(cut_clips, video, rng=rng, **cutting)


def measure(root, net, frames=16, clips=1, window="random", seed=0, scale=None, batch=8, **options):
    """Features of a set of videos, and the facts about the set.    path -> (n, d), dict

    `options` are the other arguments of video_features. Raises ValueError; single videos that are
    damaged or short do not raise, they are listed in the facts."""
    facts = {"path": printable(root), "videos": 0, "clips": 0, "resolutions": Counter(),
             "values": Counter(), "compressed": 0, "too_short": [], "unreadable": []}
    names = []

    def usable_clips(jobs, progress):
        for video, cut, problem in decode_ahead(jobs, waiting=batch):
            progress.update()
            if problem:
                facts["unreadable"].append([problem.name, problem.reason])
            elif not cut:
                facts["too_short"].append(video.name)
            else:
                facts["videos"] += 1
                facts["values"][f"float in {list(video.scale)}" if video.scale else "uint8"] += 1
                facts["resolutions"]["{2}x{1}".format(*cut[0].shape)] += 1
                facts["compressed"] += video.name.lower().endswith(VIDEO_SUFFIXES)
            for clip in cut:
                names.append(video.name)
                yield clip

    with tqdm(total=len(find_videos(root)), desc=facts["path"][-30:], unit="video") as progress:
        jobs = clip_jobs(root, seed, scale, progress, frames=frames, clips=clips, window=window)
        features = video_features(usable_clips(jobs, progress), net, batch=batch, **options)
    facts["clips"] = len(features)
    wrong = {name for name, row in zip(names, features) if not row.isfinite().all()}
    if wrong:
        raise ValueError(f"the features of {', '.join(sorted(wrong)[:5])} are NaN or infinite; "
                         "are the weights intact?")
    if sum(values != "uint8" for values in facts["values"]) > 1:
        raise ValueError(f"{facts['path']}: some of its float arrays look like [0, 1] and some like "
                         "[-1, 1]; say which it is by --floats")
    return features, facts


def fingerprint(root, settings):
    """Hash of the settings and of the names and bytes of a set of videos.    -> hex"""
    total = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for source in find_videos(root):
        files = sorted(source.iterdir()) if source.is_dir() else [source]
        for file in filter(Path.is_file, files):
            total.update(f"{printable(os.path.relpath(file, root))} {digest(file)}\n".encode())
    return total.hexdigest()


def cached(path, root, settings, compute):
    """compute(), or what it returned when `path` was written for the same data and settings."""
    key = fingerprint(root, settings)
    if os.path.exists(path):
        try:
            with np.load(path, allow_pickle=False) as file:
                found, facts = str(file["fingerprint"]), json.loads(str(file["facts"]))
                features = torch.from_numpy(file["features"])
        except Exception as error:  # whatever a file that is no cache makes numpy raise
            raise ValueError(f"{path}: this is no cache of features; name another") from error
        if found != key:
            raise ValueError(f"{path}: this cache is of other videos, settings or weights; "
                             "delete it or name another")
        return features, facts
    features, facts = compute()
    part = f"{path}.{os.getpid()}.part"
    with open(part, "wb") as out:
        np.savez(out, fingerprint=key, facts=json.dumps(facts), features=features.numpy())
    os.replace(part, path)
    return features, facts


# -----------------------------------------------------------------------------
# 7. The command

RANGES = {"symmetric": (-1, 1), "unit": (0, 1)}


def parse(argv):
    def at_least(low, why=""):
        def number(text):
            if not text.isdecimal() or int(text) < low:
                raise argparse.ArgumentTypeError(f"must be a whole number of at least {low}{why}")
            return int(text)
        return number

    parser = argparse.ArgumentParser(
        description="Frechet Video Distance of two sets of videos: folders of videos, arrays "
                    "(n, t, h, w, c) or (n, c, t, h, w), or folders of images.")
    add = parser.add_argument
    add("real", help="folder or file of real videos")
    add("fake", help="folder or file of generated videos")
    add("--protocol", choices=PROTOCOLS, default="standard", help="standard: half-pixel resize, "
        "[-1, 1]; paper: TF1 resize, [0, 1], as SSM Meets Video Diffusion Models (%(default)s)")
    add("--resize", choices=["half-pixel", "tf1"], help="override the protocol's resize to 224x224")
    add("--range", choices=RANGES, help="override the protocol's range into I3D: [-1, 1] or [0, 1]")
    add("--floats", choices=RANGES, help="what float arrays hold: [-1, 1] or [0, 1] (by default: "
        "[0, 1] if all the file's values are within it, else [-1, 1], else refused)")
    add("--frames", type=at_least(9, ": I3D halves time three times and then pools two steps, so "
        "8 frames leave nothing"), default=16, metavar="T", help="of a clip, 9 or more (%(default)s)")
    add("--clips-per-video", type=at_least(1), default=1, metavar="K", help="(%(default)s)")
    add("--window", choices=["random", "first"], default="random", help="(%(default)s)")
    add("--seed", type=at_least(0), default=0, help="of windows and bootstrap (%(default)s)")
    add("--features", choices=["i3d", "random"], default="i3d", help="random: I3D with random "
        "weights, for FD-random instead of FVD (%(default)s)")
    add("--weights", metavar="FILE", help=f"{STATE_DICT} or {TORCHSCRIPT} ({WEIGHTS} if it exists)")
    add("--allow-unknown-weights", action="store_true", help="take weights of unknown hash; a "
        "TorchScript file runs its code")
    add("--download", action="store_true", help=f"fetch {STATE_DICT} to {WEIGHTS} if missing")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)")
    add("--batch", type=at_least(1), default=8, metavar="N", help="clips at a time (%(default)s)")
    add("--bfloat16", action="store_true", help="run I3D in bfloat16 (float32)")
    add("--cache", metavar="FILE", help="keep the features of REAL in this .npz")
    add("--bootstrap", type=at_least(2), metavar="K", help="spread over K resamples")
    add("--json", metavar="FILE", help="write the result here as well")
    add("--strict", action="store_true", help="unreadable or short videos are an error")
    return parser.parse_args(argv)


def choose_network(args):
    """I3D as the arguments want it.    -> module, its description, its hash, warnings"""
    if args.features == "random":
        if args.weights or args.download:
            raise ValueError("--features random uses no weights: leave out --weights and --download")
        return random_i3d(), "I3D with random weights (seed 0)", "random 0", []
    path = args.weights or (download_weights() if args.download else WEIGHTS)
    net = load_i3d(path, args.allow_unknown_weights)
    known = published(path)
    return net, f"I3D, {known or path}", digest(path), [] if known else [
        f"the weights {path} are not a published file: the number may not be FVD"]


def compare(real, fake):
    """Warnings about two sets that are not on equal terms.    facts, facts -> list of str"""
    warnings = []
    if real["clips"] != fake["clips"]:
        warnings.append(f"unequal numbers of clips, {real['clips']} and {fake['clips']}: the bias of "
                        "a small set does not cancel; compare only numbers of the same two sizes")
    if set(real["resolutions"]) != set(fake["resolutions"]):
        warnings.append("unequal resolutions: resizing alone raises the distance")
    if fake["compressed"]:
        warnings.append("FAKE is compressed video, which raises the distance; score arrays instead")
    return warnings


def run(args):
    """Score FAKE against REAL.    parsed arguments -> dict, as --json writes it"""
    for file in map(Path, filter(None, (args.json, args.cache))):
        if file.is_dir() or not file.absolute().parent.is_dir():
            raise ValueError(f"{file}: this is a folder, or lies in a folder that does not exist")
    if args.cache and Path(args.real).resolve() in Path(args.cache).resolve().parents:
        raise ValueError(f"--cache {args.cache} lies in REAL and would be taken for a video")
    for root in (args.real, args.fake):
        find_videos(root)
    resize, value_range = PROTOCOLS[args.protocol]
    resize = args.resize or resize
    value_range = RANGES[args.range] if args.range else value_range
    named = (resize, value_range) == PROTOCOLS[args.protocol]
    net, network, weights, warnings = choose_network(args)
    try:
        torch.zeros(1, device=args.device)
        net.to(args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} cannot be used here; try --device cpu") from error
    settings = {"frames": args.frames, "clips": args.clips_per_video, "window": args.window,
                "seed": args.seed, "scale": RANGES.get(args.floats), "resize": resize,
                "value_range": value_range, "bfloat16": args.bfloat16}
    options = dict(settings, batch=args.batch, device=args.device)
    compute = partial(measure, args.real, net, **options)
    stamp = {**settings, "weights": weights}
    a, real = cached(args.cache, args.real, stamp, compute) if args.cache else compute()
    report_left_out(real, args)
    b, fake = measure(args.fake, net, **options)
    report_left_out(fake, args)
    fvd, kvd = ("FVD", "KVD") if args.features == "i3d" else ("FD-random", "KD-random")
    result = {"metric": fvd, "value": frechet_distance(a, b), "kernel_metric": kvd,
              "kernel_value": kernel_distance(a, b), "network": network,
              "protocol": args.protocol if named else "custom", "resize": resize,
              "range": value_range, "frames": args.frames, "window": args.window,
              "seed": args.seed, "real": real, "fake": fake,
              "warnings": warnings + compare(real, fake)}
    if args.bootstrap:
        result["bootstrap_std"] = bootstrap_std(a, b, args.bootstrap, args.seed)
    return result


def report_left_out(facts, args):
    short = facts["too_short"]
    for name, reason in facts["unreadable"]:
        print(f"left out: {name}: {reason}", file=sys.stderr)
    if short:
        print(f"left out: {len(short)} videos shorter than --frames {args.frames} (9 is the least "
              f"that I3D takes), such as {short[0]}", file=sys.stderr)
    if args.strict and (short or facts["unreadable"]):
        raise ValueError(f"{facts['path']}: videos were left out, and --strict forbids it")
    if facts["clips"] < 2:
        raise ValueError(f"{facts['path']}: {facts['clips']} usable clips, and a covariance needs 2 or "
                         f"more ({len(facts['unreadable'])} unreadable, {len(short)} short videos)")


def show(result):
    spread = f" +- {result['bootstrap_std']:.4g} (bootstrap)" if "bootstrap_std" in result else ""
    print(f"{result['metric']} {result['value']:.6g}{spread}")
    print(f"{result['kernel_metric']} {result['kernel_value']:.6g}")
    print(f"  protocol  {result['protocol']}: {result['resize']} resize to 224x224, range "
          f"{list(result['range'])}, {result['window']} windows of {result['frames']} frames, "
          f"seed {result['seed']}")
    print(f"  network   {result['network']}")
    for side in ("real", "fake"):
        facts = result[side]
        print(f"  {side}      {facts['videos']} videos, {facts['clips']} clips, "
              f"{', '.join(facts['resolutions'])}, {', '.join(facts['values'])}: {facts['path']}")
    print("  bias      small sets score high: two samples of one unit Gaussian in 400 dimensions are\n"
          "            552 apart at N = 64, 81 at N = 1000; compare numbers of equal N only")
    for warning in result["warnings"]:
        print(f"  warning   {warning}")


def main(argv=None):
    args = parse(argv)
    try:
        result = run(args)
        show(result)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    except (ValueError, OSError) as error:
        print(f"fvd.py: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # torch's: out of memory, or unknown weights of another kind
        print(f"fvd.py: {str(error).splitlines()[0]} (for memory, lower --batch)", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
