"""Frechet Video Distance in one file: reading videos, I3D, the distance, the command.

    python fvd.py REAL FAKE --download                     FVD and KVD of two sets of videos
    python fvd.py REAL FAKE --features random              without weights: FD-random, not FVD

REAL and FAKE are folders of videos, of arrays or of folders of images, or single files. As a library:

    net = load_i3d("i3d_pretrained_400.pt")                or random_i3d()
    frechet_distance(video_features(real, net), video_features(fake, net))

with real and fake uint8 (n, t, h, w, 3). Letters: n videos, t frames, h w height and width, c channels, d
features (400).

References
  [1] Unterthiner et al., FVD, arXiv 1812.01717    [2] Carreira and Zisserman, I3D, arXiv 1705.07750
  [3] Oshima et al., SSM Meets Video Diffusion Models, arXiv 2403.07711    [4] Binkowski et al., Demystifying
  MMD GANs, arXiv 1801.01401    [5] Naeem et al., Fidelity and Diversity Metrics, arXiv 2002.09797"""
import argparse
import contextlib
import gc
import hashlib
import json
import mmap
import os
import re
import sys
import zipfile
from collections import Counter, deque, namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from imageio.v3 import imopen
from tqdm import tqdm

# -----------------------------------------------------------------------------
# 1. Reading videos
#
# Every kind of file says in some way how long its video is, and read_frames
# yields just that, or raises UnreadableVideo. So a damaged video is named, and
# never passes as a shorter one. Frames are decoded once, one at a time.

VIDEO_SUFFIXES = (".gif", ".mp4", ".m4v", ".avi", ".webm", ".mov", ".mkv")
ARRAY_SUFFIXES = (".npy", ".npz", ".pt")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
REWRITE = "rewrite it with: ffmpeg -i IN -c copy OUT.mp4"

# One video, not decoded yet. name is printable: "samples.npz[3]" is the fourth of an array. decode() yields
# uint8 (h, w, 3), or raises. scale holds what is black and what is white, if the video is an array of floats.
Video = namedtuple("Video", "name decode scale", defaults=[()])


class UnreadableVideo(ValueError):
    """A source that holds no intact video. `name` says which, `reason` why, str() both."""

    def __init__(self, name, reason):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


@contextlib.contextmanager
def naming(name):
    """Within it, whatever a decoder raises becomes UnreadableVideo with this name."""
    try:
        yield
    except UnreadableVideo:
        raise
    except Exception as error:  # FFmpeg, Pillow, zip and pickle readers share no narrower class
        reason = re.split(r"\n|\. ", (getattr(error, "strerror", None) or str(error)).strip())[0]
        if type(error) is not ValueError:
            reason = f"it cannot be read; is it damaged, cut off, mere audio, or no video? ({reason})"
        raise UnreadableVideo(name, reason) from error


def printable(path):
    """The path with control characters and undecodable bytes escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))


def in_order(paths, suffixes=None):
    """The paths in natural order, frame_2 before frame_10; given suffixes, those that bear one openly."""
    natural = lambda path: [int(s) if s.isdecimal() else s for s in re.split("([0-9]+)", str(path))]
    wanted = lambda path: suffixes is None or path.suffix.lower() in suffixes and path.name[0] != "."
    return sorted(filter(wanted, paths), key=natural)


def head(path, size):
    """The first bytes of a file. Raises ValueError for what had better not be opened."""
    if not path.is_file():
        raise ValueError("this is a pipe, socket or device" if path.exists() else "this is a dangling link")
    with open(path, "rb") as raw:
        return raw.read(size)


def find_videos(root):
    """Sources of videos at or below `root`, in natural order.    path -> list of Path

    A source is a file with a suffix above, or a folder of several images without such a file, one per frame.
    Links are followed, each folder once. Raises UnreadableVideo if there is no source."""
    root, found, held, seen = Path(root), [], Counter(), set()
    if not os.path.lexists(root):
        raise UnreadableVideo(printable(root), "there is no such file or folder")
    if not root.is_dir():
        return [root]
    unlisted = lambda error: found.append(Path(error.filename))  # open_videos will say why
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=unlisted):
        again = os.path.realpath(folder) in seen
        seen.add(os.path.realpath(folder))
        subfolders[:] = sorted(name for name in subfolders if not again and name[0] != ".")
        paths = [] if again else [Path(folder, name) for name in files]
        several = len(in_order(paths, IMAGE_SUFFIXES)) > 1  # a single one is a preview
        found += in_order(paths, VIDEO_SUFFIXES + ARRAY_SUFFIXES) or [Path(folder)] * several
        held.update(path.suffix or path.name for path in paths)
    if not found:
        raise UnreadableVideo(printable(root), f"no video in it, but {dict(held.most_common(5))}; wanted are "
                              f"{' '.join(VIDEO_SUFFIXES + ARRAY_SUFFIXES)} or folders of images")
    return in_order(found)


def open_videos(path, scale=None):
    """The videos of one source, without decoding them.    path -> list of Video

    `scale` is (low, high), the values of black and white in float arrays; without it a file is (0, 1) if all
    of it is within, else (-1, 1). Raises UnreadableVideo; never opens a pipe or device."""
    path, name = Path(path), printable(path)
    with naming(name):
        if path.is_dir():
            return [Video(name, partial(folder_frames, path))]
        drawn = head(path, 4) == b"GIF8" or path.suffix.lower() in IMAGE_SUFFIXES
        if path.suffix.lower() in ARRAY_SUFFIXES:
            return array_videos(path, scale)
        return [Video(name, partial(pictures if drawn else film_frames, path))]


def read_frames(video):
    """Decode a video, lazily, and raise UnreadableVideo if any is lost.    Video -> yields uint8 (h, w, 3)"""
    with naming(video.name):
        shapes = set()
        for frame in video.decode():
            shapes.add(frame.shape)
            if len(shapes) > 1:
                raise ValueError("a frame has another size than the frames before it")
            yield frame
        if not shapes:
            raise ValueError("no frame in it")


def film_frames(path):
    """The film of an mp4, mov, mkv, webm or avi, by FFmpeg.    path -> yields uint8 (h, w, 3)"""
    with open(path, "rb") as raw, imopen(raw, "r", plugin="pyav", metadata_errors="ignore") as file:
        # imageio's handle on FFmpeg: its read() shows no packets, index or damage, which tell lost frames.
        ffmpeg, frames, packets = file._container, 0, 0
        film = ffmpeg.streams.best("video")
        if film is None or film.codec_context is None or "attached_pic" in str(film.disposition):
            raise ValueError("no video stream in it, only audio, data or a cover")
        film.codec_context.thread_count = 1  # it is the videos that are decoded in parallel
        for packet in ffmpeg.demux(film):
            packets += packet.size > 0
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise ValueError(f"frame {frames} is damaged")
                if frames == 0:  # once: a frame whose side data was seen lives until garbage is collected
                    matrix = frame.side_data.get("DISPLAYMATRIX")
                    turn = np.frombuffer(matrix, np.int32)[[0, 1, 3, 4]].tolist() if matrix else TURNS[1]
                frames += 1
                yield upright(frame.to_ndarray(format="rgb24"), *turn)
        kind, table = ffmpeg.format.name.split(",")[0], [entry for entry in film.index_entries if entry.size]
        if kind == "mov" and film.frames:  # an edit list marks frames that are not to be shown
            given, wanted = frames, sum(not entry.is_discard for entry in table)
        elif kind in ("matroska", "avi"):
            given, wanted = packets, matroska_blocks(path, film.index) if kind == "matroska" else len(table)
        else:
            raise ValueError(f"a lost end of this kind of file would go unseen; {REWRITE}")
        short = kind == "avi" and os.path.getsize(path) < 8 + int.from_bytes(head(path, 8)[4:], "little")
        if short or given != wanted:
            raise ValueError(f"{given} frames come out of the {wanted} it declares; it is damaged or cut off")


TURNS = {1: (1, 0, 0, 1), 2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1),  # EXIF's orientations
         5: (0, 1, 1, 0), 6: (0, 1, -1, 0), 7: (0, -1, -1, 0), 8: (0, -1, 1, 0)}


def upright(pixels, a, b, c, d):
    """What a camera stored lying: x' = a x + c y, y' = b x + d y.    (h, w, ...) -> (h', w', ...)"""
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[::-1 if d < 0 else 1, ::-1 if a < 0 else 1])


def matroska_blocks(path, stream):
    """Number of blocks (frames) of a stream of an mkv or webm, without decoding.    -> int

    The file is a tree of elements: name, size, content. Leading zeros tell how long a name or a size is."""
    with open(path, "rb") as raw, mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at, end, tracks, blocks, names = 0, len(data), [], Counter(), ()
        while at < min(end, len(data)):
            start = at + 9 - data[at].bit_length()
            name, at = data[at:start].hex(), start + 9 - data[start].bit_length()
            size = int.from_bytes(data[start:at], "big") - (1 << 7 * (at - start))  # without its mark
            if name == "18538067":  # the segment, in which all the others are
                end = at + size
            elif name == "1f43b675":  # a cluster of blocks, and what else it may hold
                names = "e7 a7 ab bf ec 5854 a3 a0 a1 9b fb fd fa a4 75a1 75a2".split()
            elif names and len(name) < 8 and name not in names:
                break
            elif name not in ("1654ae6b", "ae", "a0"):  # they hold tracks or a block
                if name == "d7":
                    tracks.append(data[at + size - 1])
                if name in ("a1", "a3"):  # a block, led by the number of its track
                    blocks[data[at] - 128] += 1
                at += size
        if at != end:
            raise ValueError(f"it is damaged, truncated, or declares no length; if it is whole, {REWRITE}")
        return blocks[tracks[stream]]


def pictures(path):
    """The pictures of a gif, or of any file of images, by Pillow.    path -> yields uint8 (h, w, 3)"""
    start = head(path, 4)
    with open(path, "rb") as raw, imopen(raw, "r", plugin="pillow") as file:
        jpeg = start[:2] == b"\xff\xd8"  # one picture, even if it is there for both eyes
        count = 1 if jpeg else file.properties(index=...).n_images
        if start == b"GIF8" and count != gif_count(path.read_bytes()):
            raise ValueError("pictures of the gif are missing; it is damaged")
        for k in range(count):
            mode = file.metadata(index=k)["mode"]
            if mode in ("I", "F"):
                raise ValueError(f"pixels of Pillow's mode {mode}; wanted are 8 or 16 bits")
            deep = mode.startswith("I;16")  # 65535 = 255 * 257
            pixels = file.read(index=k, mode=None if deep else "RGB")
            turn = file.metadata(index=k, exclude_applied=False).get("Orientation")
            yield rgb8(upright((pixels / 257).round() if deep else pixels, *TURNS.get(turn, TURNS[1])))


def gif_count(data):
    """Number of pictures in a gif, block by block, for Pillow takes a cut for the end.    bytes -> int

    A cut exactly between two pictures looks like a gif without its end mark, and no reader can tell it."""
    table = lambda flags: 3 << (flags & 7) + 1 if flags & 128 else 0  # bytes of a colour table
    at, count, last = 13 + table(data[10]), 0, b""
    while (kind := data[at:at + 1]) in (b"!", b","):  # an extension, a picture
        last, count = kind, count + (kind == b",")
        at += 11 + table(data[at + 9]) if kind == b"," else 2
        while data[at]:  # pieces of at most 255 bytes, each led by its length
            at += 1 + data[at]
        at += 1
    if not (re.fullmatch(rb";(\0*|.)", data[at:], re.DOTALL) or last == b"," and at == len(data)):
        raise ValueError("the gif has no end mark, or one too early; it is truncated or damaged")
    return count


def folder_frames(folder):
    """The images of a folder, in natural order.    path -> yields uint8 (h, w, 3)

    Numbers in their names tell if some are missing, by the digits that vary: not those of a camera or a size.
    Time stamps may have gaps: they are above 10^9, or have large steps, no multiples of the smallest."""
    paths = in_order(folder.iterdir(), IMAGE_SUFFIXES)
    columns = zip(*(re.findall("[0-9]+", path.stem) for path in paths))
    varying = (column for column in columns if len(set(column)) > 1)
    numbers = [int("".join(digits)) for digits in zip(*varying)]
    steps = [after - before for before, after in zip(numbers, numbers[1:])]
    usual = max(1, min(steps, default=1))
    stamps = numbers[:1] > [10**9] or usual > 9 and np.gcd.reduce(steps) != usual
    for step, before, after in zip(steps, paths, paths[1:]):
        if step < 1 or step != usual and not stamps:
            raise ValueError(printable(f"frames are missing or mixed: {after.name} follows {before.name}"))
    for path in paths:
        with naming(printable(path)):
            frame, *others = islice(pictures(path), 2)
            if others:
                raise ValueError("an animation among the frames of a folder; move it out")
            yield frame


def array_videos(path, scale):
    """The videos of an array file.    path, (low, high) or None -> list of Video"""
    array, name = channels_last(load_array(path)), printable(path)
    floats = array.dtype.kind == "f"
    if array.size == 0 or not floats and array.dtype != np.uint8:
        raise ValueError(f"{array.dtype} of shape {array.shape}; save uint8 in 0..255, or float")
    if floats and scale is None:
        finite = (video[np.isfinite(video)] for video in array)  # read_frames names those with NaN
        ends = [end for video in finite if video.size for end in (video.min(), video.max())]
        low, high = min(ends, default=0), max(ends, default=0)
        if low < -1.001 or high > 1.001:  # rounding may step over the ends by 0.001
            raise ValueError(f"floats from {low:.4g} to {high:.4g}, neither [0, 1] nor [-1, 1]; save uint8")
        scale = (0, 1) if low >= -0.001 else (-1, 1)
    shown, scale = (partial(rgb8, scale=scale), scale) if floats else (rgb8, ())
    return [Video(name if len(array) == 1 else f"{name}[{i}]", partial(map, shown, clip), scale)
            for i, clip in enumerate(array)]


def load_array(path):
    """The one array of videos in an .npy, .npz or .pt file; .npy and .pt are memory-mapped."""
    if path.suffix.lower() == ".pt":
        mapped = zipfile.is_zipfile(path) and path.name.isprintable()  # torch maps no other
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    else:
        content = np.load(path, mmap_mode="r", allow_pickle=False)
    arrays = content.values() if hasattr(content, "keys") else [content]
    arrays = [array for array in arrays if getattr(array, "ndim", 0) >= 3]
    if len(arrays) != 1:
        raise ValueError(f"it holds {len(arrays)} arrays that could be videos; keep exactly one")
    array, = arrays
    if isinstance(array, torch.Tensor):
        array = (array.float() if array.dtype == torch.bfloat16 else array).detach().numpy()
    foreign = array.dtype.itemsize > 8 or not array.dtype.isnative  # torch has neither
    return array.astype(np.float32) if array.dtype.kind == "f" and foreign else array


def channels_last(array):
    """A view of one video or many.    -> (n, t, h, w, c)

    Taken are (t, h, w) grey; (t, h, w, c), (c, t, h, w), (t, c, h, w); and (n, t, h, w, c), (n, c, t, h, w),
    (n, t, c, h, w). The last axis comes first, and among the others c = 3 before 1 before 4."""
    view = array[None] if array.ndim == 4 else array
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4):
        return array[None, ..., None]
    for axis, c in [(4, 3), (4, 1), (4, 4), (1, 3), (2, 3), (1, 1), (2, 1), (1, 4), (2, 4)]:
        if view.ndim == 5 and view.shape[axis] == c:
            return np.moveaxis(view, axis, -1)
    raise ValueError(f"shape {tuple(array.shape)} is no video's; save (t, h, w, c) or (n, t, h, w, c)")


def rgb8(frame, scale=()):
    """8-bit RGB of a frame of an array; alpha is dropped.    (h, w) or (h, w, 1..4) -> uint8 (h, w, 3)"""
    if scale:
        low, high = scale
        if not np.isfinite(frame).all():
            raise ValueError("it holds NaN or infinite values")
        frame = ((frame.astype(np.float32) - low) * (255 / (high - low))).round().clip(0, 255)
    frame = frame if frame.ndim == 3 else frame[..., None]
    return np.array(frame[..., :3] if frame.shape[-1] >= 3 else frame[..., [0, 0, 0]], dtype=np.uint8)


# -----------------------------------------------------------------------------
# 2. I3D
#
# FVD's features are the 400 logits of I3D [2], an Inception network inflated to
# three dimensions, averaged over time. Three details move the score: no softmax,
# BatchNorm's eps = 1e-3, and TensorFlow's SAME padding: just enough zeros for the
# last window, which begins at (size - 1) // s * s; of an odd number, more behind.

def same_pad(x, kernel, stride):
    """TensorFlow's SAME padding with zeros.    x (n, c, t, h, w) -> (n, c, t', h', w')"""
    pad = []
    for size, k, s in list(zip(x.shape[2:], kernel, stride))[::-1]:  # F.pad: the last axis first
        total = max((size - 1) // s * s + k - size, 0)
        pad += [total // 2, total - total // 2]
    return F.pad(x, pad)


class Unit3D(nn.Module):
    """Convolution, BatchNorm, ReLU.    x (n, c_in, t, h, w) -> (n, c_out, t/s, h/s, w/s). Needs: same_pad."""

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

    The names of the parameters are those of the published state dict. At least 9 frames: time is halved three
    times, and then two steps are pooled. Needs: same_pad, Unit3D."""

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
                "b0": Unit3D(c, b0), "b1a": Unit3D(c, b1a), "b1b": Unit3D(b1a, b1b, kernel=3),
                "b2a": Unit3D(c, b2a), "b2b": Unit3D(b2a, b2b, kernel=3), "b3b": Unit3D(c, b3b)}))
            c = b0 + b1b + b2b + b3b
        self.logits = nn.ModuleDict({"conv3d": nn.Conv3d(c, 400, 1)})
        self.eval().requires_grad_(False)

    def forward(self, x):
        if x.shape[1] != 3 or x.shape[2] < 9 or x.shape[3:] != (224, 224):
            raise ValueError(f"I3D wants (n, 3, t >= 9, 224, 224), not {tuple(x.shape)}")
        # Zeros are as good as -inf around x: it comes out of a ReLU.
        pool = lambda x, kernel, stride: F.max_pool3d(same_pad(x, kernel, stride), kernel, stride)
        x = pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))   # (n, 64, t/2, 56, 56)
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))           # (n, 192, t/2, 56, 56)
        x = pool(x, (1, 3, 3), (1, 2, 2))                       # (n, 192, t/2, 28, 28)
        for name in self.MIXED:
            if name == "Mixed_4b":
                x = pool(x, (3, 3, 3), (2, 2, 2))               # (n, 480, t/4, 14, 14)
            if name == "Mixed_5b":
                x = pool(x, (2, 2, 2), (2, 2, 2))               # (n, 832, t/8, 7, 7)
            b, around = self.get_submodule(name), pool(x, (3, 3, 3), (1, 1, 1))
            x = torch.cat([b["b0"](x), b["b1b"](b["b1a"](x)), b["b2b"](b["b2a"](x)), b["b3b"](around)], dim=1)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)                # (n, 1024, t/8 - 1, 1, 1)
        return self.logits["conv3d"](x).mean((2, 3, 4))         # (n, 400)


# -----------------------------------------------------------------------------
# 3. Weights
#
# Two published files hold this network: a state dict and a TorchScript program,
# which runs code when it is loaded. So a file is hashed before it is opened.

STATE_DICT = "i3d_pretrained_400.pt"
STATE_DICT_URL = "https://github.com/songweige/TATS/raw/main/tats/fvd/i3d_pretrained_400.pt"
STATE_DICT_GIT_SHA1 = "a867b87ac3a9097d200598b1d48a1b890d8ec744"  # git hash-object FILE
TORCHSCRIPT = "i3d_torchscript.pt"
TORCHSCRIPT_URL = "https://huggingface.co/flateon/FVD-I3D-torchscript/resolve/main/i3d_torchscript.pt"
TORCHSCRIPT_SHA256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
WEIGHTS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fvd", STATE_DICT)
BY_HAND = f"""Get one of these, pass it as --weights FILE, or let --download fetch the first to {WEIGHTS} :
  {STATE_DICT_URL}, `git hash-object` {STATE_DICT_GIT_SHA1}
  {TORCHSCRIPT_URL}, sha256 {TORCHSCRIPT_SHA256}
Or score without weights by --features random."""


def published(path):
    """The name of a published file, by its hash; of any other "unknown", and its hash.    path -> str"""
    data = Path(path).read_bytes()
    if hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == STATE_DICT_GIT_SHA1:
        return STATE_DICT
    sha256 = hashlib.sha256(data).hexdigest()
    return TORCHSCRIPT if sha256 == TORCHSCRIPT_SHA256 else f"unknown, sha256 {sha256}"


class TorchScriptI3D(nn.Sequential):
    """The program of the TorchScript file, called as I3D is.    x (n, 3, t, 224, 224) -> (n, 400)"""

    def forward(self, x):
        return self[0](x=x, rescale=False, resize=False, return_features=True)


def load_i3d(path, allow_unknown=False):
    """I3D with the weights of a published file, or else ValueError.    path -> nn.Module"""
    which = published(path) if os.path.isfile(path) else None
    if which is None or "unknown" in which and not allow_unknown:
        raise ValueError(f"{path}: this file is missing, truncated, or another one than the published ones, "
                         f"which --allow-unknown-weights takes all the same. {BY_HAND}")
    if zipfile.is_zipfile(path) and any("/code/" in k for k in zipfile.ZipFile(path).namelist()):
        return TorchScriptI3D(torch.jit.load(path, map_location="cpu").eval())
    net = I3D()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict({k: v for k, v in state.items() if "num_batches_tracked" not in k})
    except Exception as error:  # an unknown file may hold anything: pickle, zip, other tensors
        raise ValueError(f"{path}: this is no state dict of I3D. {BY_HAND}") from error
    return net


def random_i3d(seed=0):
    """I3D with random weights [5], the same on every machine: ranks videos, but is not FVD.    seed -> I3D"""
    net, random = I3D(), np.random.RandomState(seed)  # RandomState's stream never changes
    for name, value in sorted(net.state_dict().items()):
        he = 0.6 * (2 / value[0].numel()) ** 0.5  # He's scale, times 0.6 for the four branches summed
        std = he if name.endswith("conv3d.weight") else 0.1
        if name.endswith("running_var"):
            value.copy_(torch.from_numpy(random.uniform(0.05, 1.5, value.shape)))
        elif not name.endswith("bn.weight"):
            value.copy_(torch.from_numpy(random.standard_normal(value.shape) * std))
    return net


def download_weights(path=WEIGHTS, url=STATE_DICT_URL):
    """Fetch the state dict, verify it, move it to `path`, unless it is there already. Raises ValueError."""
    if os.path.exists(path) and published(path) == STATE_DICT:
        return
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(part))
        if published(part) != STATE_DICT:
            raise ValueError(f"what came is not {STATE_DICT}: cut off, or a proxy's page")
        os.replace(part, path)
    except Exception as error:  # of the disk, of the network or of HTTP
        raise ValueError(f"{url}: the download failed ({error}). {BY_HAND}") from error
    finally:
        part.unlink(missing_ok=True)


# -----------------------------------------------------------------------------
# 4. Clips to features
#
# Implementations of FVD disagree on range and resize, and both change the number:
#
#     source = destination * in / out                        (tf1)
#     source = (destination + 1/2) * in / out - 1/2          (half-pixel)
#
# `standard` is most PyTorch code, `original` the code of [1], and `paper` the
# code of [3], whose line 2 x - 1 is commented out.

RANGES = {"symmetric": (-1, 1), "unit": (0, 1)}
PROTOCOLS = {"standard": ("half-pixel", (-1, 1)), "original": ("tf1", (-1, 1)), "paper": ("tf1", (0, 1))}


def resize_tf1(x, size=224):
    """TensorFlow 1's bilinear resize, without half-pixel centres.    x (..., h, w) -> (..., s, s)"""
    for _ in range(2):  # along w, then along h
        length = x.shape[-1]
        scale = torch.tensor(length / size, dtype=torch.float32)  # TensorFlow rounds here, visibly
        source = (torch.arange(size) * scale).to(x.device)
        low = source.long()
        below, above = x[..., low], x[..., (low + 1).clamp(max=length - 1)]
        x = (below + (above - below) * (source - low)).transpose(-1, -2)
    return x


def preprocess(clip, resize="half-pixel", value_range=(-1, 1)):
    """Frames as I3D takes them.    uint8 (t, h, w, 3) -> float (3, t, 224, 224). Needs: resize_tf1."""
    clip = torch.as_tensor(clip)
    if clip.dtype != torch.uint8 or clip.ndim != 4:
        raise ValueError(f"a clip is uint8 (t, h, w, 3) in 0..255, not {clip.dtype} {tuple(clip.shape)}")
    x = clip.permute(0, 3, 1, 2).float()                        # (t, 3, h, w)
    x = resize_tf1(x) if resize == "tf1" else F.interpolate(x, (224, 224), mode="bilinear")
    low, high = value_range
    return (x * ((high - low) / 255) + low).transpose(0, 1)     # (3, t, 224, 224)


@torch.no_grad()
def video_features(clips, net, resize="half-pixel", value_range=(-1, 1), batch=8, device="cpu"):
    """Features of clips, batch by batch.    iterable of uint8 (t, h, w, 3) -> float64 (n, d)

    `net` is on `device`. Clips may differ in size, not in length; an iterator is taken as it goes, so memory
    does not grow with n. Float clips (3, t, 224, 224) have been preprocessed. Float32 throughout, even within
    an autocast. Needs: preprocess."""
    clips, features = iter(clips), [torch.empty(0)]
    exact = torch.autocast(torch.device(device).type, enabled=False)
    with exact, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 errs by 1e-3
        while group := [torch.as_tensor(clip) for _, clip in zip(range(batch), clips)]:
            x = [clip if clip.dtype == torch.float32 else preprocess(clip.to(device), resize, value_range)
                 for clip in group]
            features.append(net(torch.stack(x).to(device)).cpu().double())  # (batch, d)
    return torch.cat(features[1:] or features)


# -----------------------------------------------------------------------------
# 5. Distances
#
# FVD [1] is the Frechet distance of two Gaussians fitted to the features:
#
#     d^2 = |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))
#
# With S = A^T A, where A holds the centred features over sqrt(n - 1), the last
# trace is the sum of the singular values of A1 A2^T: real and exact, unlike a
# root of S1 S2. If n > d, the triangle of A = QR takes A's place.

def frechet_distance(a, b):
    """Frechet distance of two sets of features [1], in float64.    a (n, d), b (m, d) -> float

    The fewer they are, the higher it is for two samples of one distribution: compare equal n only."""
    means, roots = [], []
    for x in (torch.as_tensor(a).cpu().double(), torch.as_tensor(b).cpu().double()):
        if x.ndim != 2 or len(x) < 2:
            raise ValueError(f"a covariance needs features (n >= 2, d), not {tuple(x.shape)}")
        if rows := (~x.isfinite().all(1)).nonzero().flatten().tolist():
            raise ValueError(f"the features of clips {rows[:10]} are NaN or infinite")
        means.append(x.mean(0))
        root = (x - means[-1]) / (len(x) - 1) ** 0.5            # (n, d)
        roots.append(torch.linalg.qr(root).R if len(x) > x.shape[1] else root)
    traces = sum(root.square().sum() for root in roots)
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()   # tr((S1 S2)^(1/2))
    return max(0.0, ((means[0] - means[1]).square().sum() + traces - 2 * cross).item())


def kernel_distance(a, b):
    """Unbiased squared MMD, kernel (x.y / d + 1)^3 [1, 4]; of I3D, KVD.    a (n, d), b (m, d) -> float"""
    a, b = torch.as_tensor(a).cpu().double(), torch.as_tensor(b).cpu().double()
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3                       # (n, m)
    others = lambda k: (k.sum() - k.trace()) / (len(k) * (len(k) - 1))          # the mean off the diagonal
    return (others(kernel(a, a)) + others(kernel(b, b)) - 2 * kernel(a, b).mean()).item()


# -----------------------------------------------------------------------------
# 6. Scoring a set
#
# Two threads decode videos ahead of the network, and a bounded number waits.
# Frames are brought to 224 x 224 as they come. So memory is bounded.

def cut_clips(video, frames, clips, window, protocol, rng):
    """Windows of a video, decoded once.    -> list of float (3, t, 224, 224), "WxH". Raises UnreadableVideo

    The length is known at the end only. So window k takes one of the `clips` places with probability
    clips / (k + 1): at the end all windows were equally likely."""
    chosen, growing = {}, deque()
    for k, frame in enumerate(read_frames(video)):
        drawn = k if k < clips else int(rng.integers(k + 1))
        first = clips if k % frames else k // frames
        place = drawn if window == "random" else first
        if place < clips:
            growing.append((place, []))
        if growing:
            small = preprocess(frame[None], *PROTOCOLS[protocol])  # (3, 1, 224, 224)
            for _, parts in growing:
                parts.append(small)
            if len(growing[0][1]) == frames:
                place, parts = growing.popleft()
                chosen[place] = parts
    if not chosen:
        raise UnreadableVideo(video.name, f"shorter than --frames {frames}; 9 is the least that I3D takes")
    return [torch.cat(parts, dim=1) for parts in chosen.values()], "{1}x{0}".format(*frame.shape)


def measure(root, net, scale=None, batch=8, device="cpu", strict=False, seed=0, **cutting):
    """Features of a set of videos, and the facts about the set.    path -> (n, d), dict

    `cutting` are settings of cut_clips. Damaged and short videos are named on stderr and left out. Raises
    ValueError if too few are left, if any was left out and `strict`, or if floats seem to differ in range."""
    sources, left_out = find_videos(root), []
    facts = {"path": printable(root), "videos": 0, "clips": 0, "resolutions": Counter(), "values": Counter(),
             "compressed": 0}

    def attempt(function, *args, **options):
        try:
            return function(*args, **options)
        except UnreadableVideo as error:
            tqdm.write(f"left out: {error}", file=sys.stderr)
            left_out.append([error.name, error.reason])
            return []

    def cut():
        with ThreadPoolExecutor(2) as pool:
            submit = partial(pool.submit, attempt, cut_clips, **cutting)
            jobs = ((video, submit(video, rng=np.random.default_rng([seed, i, j])))
                    for i, source in enumerate(sources)
                    for j, video in enumerate(attempt(open_videos, source, scale)))
            jobs, waiting = iter(tqdm(jobs, facts["path"][-30:], unit=" videos")), deque()
            while waiting.extend(islice(jobs, batch + 1 - len(waiting))) or waiting:
                video, job = waiting.popleft()
                clips, size = job.result() or ([], None)
                if clips:
                    facts["videos"] += 1
                    facts["resolutions"][size] += 1
                    facts["values"][f"float in {list(video.scale)}" if video.scale else "uint8"] += 1
                    facts["compressed"] += video.name.lower().endswith(VIDEO_SUFFIXES)
                if len(facts["values"].keys() - {"uint8"}) > 1:
                    raise ValueError(f"{video.name}: floats seem to be in another range than those before; "
                                     "say what all are by --floats unit or --floats symmetric")
                yield from clips

    features = video_features(cut(), net, batch=batch, device=device)
    facts["clips"], facts["left_out"] = len(features), sorted(left_out)
    if strict and left_out or len(features) < 2:
        raise ValueError(f"{facts['path']}: {len(left_out)} videos were left out, which --strict forbids, or "
                         f"of which too few remain: a covariance needs 2 clips, not {len(features)}")
    return features, facts


def saved_features(path, settings):
    """What --save-features wrote, or None if this is another file.    -> (n, d), facts. Raises ValueError"""
    if Path(path).suffix == ".npz" and zipfile.is_zipfile(path):
        with np.load(path, allow_pickle=False) as file:
            if "settings" in file:
                if settings != (saved := json.loads(str(file["settings"]))):
                    raise ValueError(f"{path}: made with {saved}, not with {settings}")
                return torch.from_numpy(file["features"]), json.loads(str(file["facts"]))


# -----------------------------------------------------------------------------
# 7. The command

def parse(argv):
    parser = argparse.ArgumentParser(description="Frechet Video Distance of two sets of videos.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, flag = parser.add_argument, partial(parser.add_argument, action="store_true")
    add("real", help="folder or file of real videos, or what --save-features wrote")
    add("fake", help="folder or file of generated videos: films, arrays (n, t, h, w, c), folders of images")
    add("--protocol", choices=PROTOCOLS, default="standard", help="original: TF1's resize; paper: and [0, 1]")
    add("--floats", choices=RANGES, help="[-1, 1] or [0, 1] in all arrays; without it, each file tells")
    add("--frames", type=int, default=16, metavar="T", help="of a clip, at least 9 for I3D")
    add("--clips-per-video", type=int, default=1, metavar="K", help="at most", dest="clips")
    add("--window", choices=["random", "first"], default="random", help="which frames of a video")
    add("--seed", type=int, default=0, help="of the windows")
    add("--features", choices=["i3d", "random"], default="i3d", help="random: FD-random instead of FVD")
    add("--weights", metavar="FILE", default=WEIGHTS, type=Path, help=f"{STATE_DICT} or {TORCHSCRIPT}")
    flag("--allow-unknown-weights", help="take weights of unknown hash; a TorchScript file runs its code")
    flag("--download", help=f"fetch {STATE_DICT} to the place of --weights if it is missing")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of I3D")
    add("--batch", type=int, default=8, metavar="N", help="clips at a time")
    add("--save-features", metavar="FILE.npz", help="keep the features of REAL, to stand for it next time")
    add("--json", metavar="FILE", help="write the result here as well")
    flag("--strict", help="unreadable or short videos are an error")
    args = parser.parse_args(argv)
    if args.frames < 9 or args.clips < 1 or args.batch < 1:
        parser.error("--frames must be at least 9, and --clips-per-video and --batch at least 1")
    return args


def run(args):
    """Score FAKE against REAL.    parsed arguments -> dict, as --json writes it"""
    save, names = args.save_features, ("FVD", "KVD")
    for file in map(Path, filter(None, (args.json, save))):
        if file.is_dir() or not file.absolute().parent.is_dir():
            raise ValueError(f"{file}: this is a folder, or lies in a folder that does not exist")
    if save and (not save.endswith(".npz") or Path(args.real).resolve() in Path(save).resolve().parents):
        raise ValueError(f"--save-features {save} must end in .npz and lie outside of REAL")
    find_videos(args.real), find_videos(args.fake)  # a wrong name is found before weights are fetched
    if args.download and args.features == "i3d":
        download_weights(args.weights)
    if args.features == "i3d":
        net, network = load_i3d(args.weights, args.allow_unknown_weights), published(args.weights)
    else:
        net, network, names = random_i3d(), "I3D with random weights (seed 0)", ("FD-random", "KD-random")
    settings = {name: getattr(args, name) for name in ("protocol", "frames", "clips", "window", "seed")}
    score = partial(measure, net=net.to(args.device), scale=RANGES.get(args.floats), batch=args.batch,
                    device=args.device, strict=args.strict, **settings)
    settings = {"network": network, **settings}
    a, real = saved_features(args.real, settings) or score(args.real)
    if save:
        with open(f"{save}.part", "wb") as part:
            np.savez(part, features=a.numpy(), facts=json.dumps(real), settings=json.dumps(settings))
        os.replace(part.name, save)
    b, fake = score(args.fake)
    warnings = {
        "small sets score high: two samples of one Gaussian in 400 dimensions are 552 apart at N = 64, 81 at "
        "N = 1000; compare numbers of equal N only": True,
        "the weights are not a published file: the number may not be FVD": "unknown" in network,
        f"unequal numbers of clips, {real['clips']} and {fake['clips']}": real["clips"] != fake["clips"],
        "unequal resolutions: resizing alone raises the distance":
            real["resolutions"].keys() != fake["resolutions"].keys(),
        "FAKE is compressed video, which raises the distance; score arrays instead": fake["compressed"]}
    return {"metric": names[0], "value": frechet_distance(a, b), "kernel_metric": names[1],
            "kernel_value": kernel_distance(a, b), **settings, "resize": PROTOCOLS[args.protocol][0],
            "range": list(PROTOCOLS[args.protocol][1]), "real": real, "fake": fake,
            "warnings": [text for text, holds in warnings.items() if holds]}


def main(argv=None):
    args = parse(argv)
    try:
        result = run(args)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    except (ValueError, OSError, RuntimeError, AssertionError) as error:  # the last two are torch's
        hint = "" if isinstance(error, (ValueError, OSError)) else " (lower --batch, or try --device cpu)"
        print(f"fvd.py: {error}{hint}", file=sys.stderr)
        return 2
    print(f"{result['metric']} {result['value']:.6g}\n{result['kernel_metric']} {result['kernel_value']:.6g}")
    for name in ("network", "protocol", "resize", "range", "frames", "clips", "window", "seed"):
        print(f"  {name:9} {result[name]}")
    for name, facts in (("real", result["real"]), ("fake", result["fake"])):
        values = ", ".join([*facts["resolutions"], *facts["values"]])
        print(f"  {name:9} {facts['videos']} videos, {facts['clips']} clips, {values}: {facts['path']}")
    for warning in result["warnings"]:
        print(f"  warning   {warning}")
    return 0


if __name__ == "__main__":
    gc.freeze()  # imageio collects garbage after every film: without what was imported it takes no time
    sys.stdout.reconfigure(errors="backslashreplace")  # a console of Windows has no letter for many a path
    sys.exit(main())
