"""Frechet Video Distance in one file: reading videos, I3D, the distance, the command.

    python fvd.py REAL FAKE --download                     FVD and KVD of two sets of videos
    python fvd.py REAL FAKE --features random              without weights: FD-random, not FVD

REAL and FAKE are folders of videos, of arrays or of folders of images, or single files. As a library, with
real and fake uint8 (n, t, h, w, 3):

    net = load_i3d("i3d_pretrained_400.pt")                or random_i3d()
    frechet_distance(video_features(real, net), video_features(fake, net))

Letters: n videos, t frames, h w height and width, c channels, d features (400).

References
  [1] Unterthiner et al., FVD, arXiv 1812.01717    [2] Carreira and Zisserman, I3D, arXiv 1705.07750
  [3] Oshima et al., SSM Meets Video Diffusion Models, arXiv 2403.07711    [4] Binkowski et al., Demystifying
  MMD GANs, arXiv 1801.01401    [5] Naeem et al., Fidelity and Diversity Metrics, arXiv 2002.09797"""
import argparse
import contextlib
import gc
import hashlib
import json
import os
import re
import sys
import zipfile
from collections import deque, namedtuple
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
# A film says in some way how long it is, and read_frames yields just that, or
# raises UnreadableVideo: a damaged one is named, and never passes as a shorter
# one. Of a folder of images the names tell. Frames are decoded one at a time.

VIDEO_SUFFIXES = (".gif", ".mp4", ".m4v", ".avi", ".webm", ".mov", ".mkv")
ARRAY_SUFFIXES = (".npy", ".npz", ".pt")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
TURNS = {1: (1, 0, 0, 1), 2: (-1, 0, 0, 1), 3: (-1, 0, 0, -1), 4: (1, 0, 0, -1),  # EXIF's orientations
         5: (0, 1, 1, 0), 6: (0, 1, -1, 0), 7: (0, -1, -1, 0), 8: (0, -1, 1, 0)}
Video = namedtuple("Video", "name decode")  # one video, not decoded yet; decode() yields uint8 (h, w, 3)


class UnreadableVideo(ValueError):
    """A source that holds no intact video. `name` says which, `reason` why, str() both, printably."""

    def __init__(self, name, reason):
        escaped = lambda text: "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
        self.name, self.reason = escaped(name), escaped(reason)
        super().__init__(f"{self.name}: {self.reason}")


@contextlib.contextmanager
def naming(name):
    """Within it, whatever a decoder raises becomes UnreadableVideo with this name."""
    try:
        yield
    except UnreadableVideo:
        raise
    except Exception as error:  # FFmpeg, Pillow, zip and pickle readers share no narrower class
        reason = re.split(r"\n|\. ", (getattr(error, "strerror", None) or str(error)).strip())[0]
        if type(error) not in (ValueError, FileNotFoundError):
            reason = f"it cannot be read; is it damaged, cut off, mere audio, or no video? ({reason})"
        raise UnreadableVideo(name, reason) from error


def in_order(paths, suffixes=None):
    """The paths in natural order, frame_2 before frame_10; given suffixes, those that bear one openly."""
    natural = lambda path: [int(s) if s.isdecimal() else s for s in re.split("([0-9]+)", str(path))]
    wanted = lambda path: suffixes is None or path.suffix.lower() in suffixes and path.name[0] != "."
    return sorted(filter(wanted, paths), key=natural)


def head(path):
    """The first 8 bytes of a file. Raises ValueError for what had better not be opened."""
    if not path.is_file():
        raise ValueError("this is a pipe, a socket, a device or a dangling link")
    with open(path, "rb") as raw:
        return raw.read(8)


def find_videos(root):
    """Sources of videos at or below `root`, in natural order.    path -> list of Path

    A source is a file with a suffix above, or a folder of several images without such a file, one per frame.
    Links are followed, each folder once. Raises UnreadableVideo if there is no source."""
    root, found, seen = Path(root), [], set()
    if not os.path.lexists(root):
        raise UnreadableVideo(root, "there is no such file or folder")
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
    if not found:
        raise UnreadableVideo(root, "no video in it: no film, array, or folder of images")
    return in_order(found)


def open_videos(path, scale=None):
    """The videos of one source, without decoding them.    path -> list of Video. Raises UnreadableVideo

    `scale` is (low, high), the values of black and white in arrays of floats. Nothing in them tells it."""
    path = Path(path)
    with naming(path):
        if path.is_dir():
            return [Video(path, partial(folder_frames, path))]
        drawn = head(path).startswith(b"GIF8") or path.suffix.lower() in IMAGE_SUFFIXES
        if path.suffix.lower() not in ARRAY_SUFFIXES:
            return [Video(path, partial(pictures if drawn else film_frames, path))]
        array = channels_last(load_array(path))
        if array.size == 0 or array.dtype != np.uint8 and not (array.dtype.kind == "f" and scale):
            raise ValueError(f"{array.dtype} of shape {array.shape}; save uint8 in 0..255, or floats and "
                             "give --floats unit (black is 0, white 1) or --floats symmetric (-1, 1)")
        shown = partial(rgb8, scale=scale)
        return [Video(f"{path}[{i}]", partial(map, shown, video)) for i, video in enumerate(array)]


def read_frames(video):
    """Decode a video, lazily, and raise UnreadableVideo if any is lost.    Video -> yields uint8 (h, w, 3)"""
    with naming(video.name):
        shapes = set()
        for frame in video.decode():
            shapes.add(frame.shape)
            if len(shapes) > 1:
                raise ValueError("a frame has another size than the frames before it")
            yield frame


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
        kind, given, wanted, rate = ffmpeg.format.name.split(",")[0], frames, 0, film.average_rate or 0
        table = [entry for entry in film.index_entries if entry.size]
        if kind == "mov" and film.frames:  # an edit list marks frames that are not to be shown
            wanted = sum(not entry.is_discard for entry in table)
        elif kind == "matroska":  # it tells its end in time and a constant rate; B-frames may begin late
            clock = film.metadata.get("DURATION") or f"0:0:{(ffmpeg.duration or 0) / 1e6}"
            hours, minutes, seconds = map(float, clock.split(":"))
            late = min(4, (film.start_time or 0) * film.time_base * rate) * film.codec_context.has_b_frames
            wanted = round((3600 * hours + 60 * minutes + seconds) * rate - late)
        elif kind == "avi" and os.path.getsize(path) >= 8 + int.from_bytes(head(path)[4:], "little"):
            given, wanted = packets, len(table)
        if not given == wanted > 0:
            raise ValueError(f"{given} frames come out, and it declares {wanted or 'no number'}; it is "
                             "damaged or cut off; if it is whole, rewrite it by ffmpeg -i IN -c copy OUT.mp4")


def upright(pixels, a, b, c, d):
    """What a camera stored lying: x' = a x + c y, y' = b x + d y.    (h, w, ...) -> (h', w', ...)"""
    if abs(b) > abs(a):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[::-1 if d < 0 else 1, ::-1 if a < 0 else 1])


def pictures(path):
    """The pictures of a gif, or of any file of images, by Pillow.    path -> yields uint8 (h, w, 3)"""
    start = head(path)
    with open(path, "rb") as raw, imopen(raw, "r", plugin="pillow") as file:
        jpeg = start.startswith(b"\xff\xd8")  # one picture, even if it is there for both eyes
        count = 1 if jpeg else file.properties(index=...).n_images
        if start.startswith(b"GIF8") and count != gif_count(path.read_bytes()):
            raise ValueError("pictures of the gif are missing; it is damaged")
        for k in range(count):
            mode = file.metadata(index=k)["mode"]
            if mode in ("I", "F"):
                raise ValueError(f"pixels of Pillow's mode {mode}; wanted are 8 or 16 bits")
            pixels = file.read(index=k, mode=None if mode.startswith("I;16") else "RGB")
            turn = file.metadata(index=k, exclude_applied=False).get("Orientation")  # Pillow obeys a tiff's
            yield rgb8(upright(pixels, *TURNS.get(turn, TURNS[1])), scale=(0, 65535))


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
    A gap is a multiple of the smallest step. Time stamps may have gaps: they are above 10^9."""
    paths = in_order(folder.iterdir(), IMAGE_SUFFIXES)
    columns = zip(*(re.findall("[0-9]+", path.stem) for path in paths))
    numbers = [int("".join(digits)) for digits in zip(*(c for c in columns if len(set(c)) > 1))]
    steps = [after - before for before, after in zip(numbers, numbers[1:])]
    usual = max(1, min(steps, default=1))
    for step, before, after in zip(steps, paths, paths[1:]):
        if step < 1 or step != usual and step % usual == 0 and numbers[0] < 10**9:
            raise ValueError(f"frames are missing or mixed: {after.name} follows {before.name}")
    for path in paths:
        with naming(path):
            frame, *others = islice(pictures(path), 2)
            if others:
                raise ValueError("an animation among the frames of a folder; move it out")
            yield frame


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
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4):
        return array[None, ..., None]
    view = array[None] if array.ndim == 4 else array
    for axis, c in [(4, 3), (4, 1), (4, 4), (1, 3), (2, 3), (1, 1), (2, 1), (1, 4), (2, 4)]:
        if view.ndim == 5 and view.shape[axis] == c:
            return np.moveaxis(view, axis, -1)
    raise ValueError(f"shape {tuple(array.shape)} is no video's; save (t, h, w, c) or (n, t, h, w, c)")


def rgb8(frame, scale=None):
    """8-bit RGB of a frame of an array; alpha is dropped.    (h, w) or (h, w, 1..4) -> uint8 (h, w, 3)"""
    if frame.dtype != np.uint8:
        low, high = scale
        if not (frame.min() >= low - 0.001 and frame.max() <= high + 0.001):  # rounding steps over the ends
            raise ValueError(f"it holds values outside of {low}..{high}, as --floats has it, or NaN")
        frame = ((frame.astype(np.float32) - low) * (255 / (high - low))).round().clip(0, 255)
    frame = np.atleast_3d(frame)[..., :3]
    return np.array(frame if frame.shape[-1] == 3 else frame[..., [0, 0, 0]], dtype=np.uint8)


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
BY_HAND = f"""Get one of these as --weights FILE, or the first by --download, or do with --features random:
  {STATE_DICT_URL}, `git hash-object` {STATE_DICT_GIT_SHA1}
  {TORCHSCRIPT_URL}, sha256 {TORCHSCRIPT_SHA256}"""


def published(path):
    """The name of a published file, by its hash; of any other "unknown", and its hash.    path -> str"""
    data = Path(path).read_bytes()
    if hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == STATE_DICT_GIT_SHA1:
        return STATE_DICT
    sha256 = hashlib.sha256(data).hexdigest()
    return TORCHSCRIPT if sha256 == TORCHSCRIPT_SHA256 else f"unknown, sha256 {sha256}"


def load_i3d(path, allow_unknown=False):
    """I3D with the weights of a published file, or else ValueError.    path -> nn.Module"""
    if not os.path.isfile(path) or "unknown" in published(path) and not allow_unknown:
        raise ValueError(f"{path}: missing, truncated or unknown (see --allow-unknown-weights). {BY_HAND}")
    if zipfile.is_zipfile(path) and any("/code/" in k for k in zipfile.ZipFile(path).namelist()):
        net = nn.Sequential(torch.jit.load(path, map_location="cpu").eval())
        net.forward = lambda x: net[0](x=x, rescale=False, resize=False, return_features=True)
        return net
    net = I3D()
    with naming(path):
        state = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict({k: v for k, v in state.items() if "num_batches_tracked" not in k})
    return net


def random_i3d(seed=0):
    """I3D with random weights [5], the same on every machine: ranks videos, but is not FVD.    seed -> I3D"""
    net, random = I3D(), np.random.RandomState(seed)  # RandomState's stream never changes
    for name, value in sorted(net.state_dict().items()):
        std = 0.6 * (2 / value[0].numel()) ** 0.5 if name.endswith("conv3d.weight") else 0.1  # 0.6 of He's
        if name.endswith("running_var"):
            value.copy_(torch.from_numpy(random.uniform(0.05, 1.5, value.shape)))
        elif not name.endswith("bn.weight"):
            value.copy_(torch.from_numpy(random.standard_normal(value.shape) * std))
    return net


def download_weights(path=WEIGHTS, url=STATE_DICT_URL):
    """Fetch the state dict, unless it is at `path` already; load_i3d verifies it. Raises ValueError."""
    if not (os.path.exists(path) and published(path) == STATE_DICT):
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))  # under another name until all of it is there
        except Exception as error:  # of the disk, of the network or of HTTP
            raise ValueError(f"{url}: the download failed ({error}). {BY_HAND}") from error


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
SETTINGS = ("protocol", "floats", "frames", "clips", "window", "seed")  # that a number depends on
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
    clips, features = iter(clips), [torch.empty(0)]  # there may be no clips
    exact = torch.autocast(torch.device(device).type, enabled=False)
    with exact, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 errs by 1e-3
        while group := [torch.as_tensor(clip) for _, clip in zip(range(batch), clips)]:
            x = [clip if clip.dtype == torch.float32 else preprocess(clip.to(device), resize, value_range)
                 for clip in group]
            features.append(net(torch.stack(x).to(device)).cpu().double())  # (batch, d)
    return torch.cat(features)


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
        if x.ndim != 2 or len(x) < 2 or not x.isfinite().all():
            raise ValueError(f"a covariance needs finite features (n >= 2, d), not {tuple(x.shape)} or NaN")
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
# 6. The command
#
# A group of videos is decoded in parallel, then the network sees their clips.
# Frames are brought to 224 x 224 as they come. So memory is bounded.

def cut_clips(video, seed, args):
    """Windows of a video, at most args.clips.    -> list of float (3, t, 224, 224). Raises UnreadableVideo

    The length is known at the end only. So random window k takes one of the places with probability
    clips / (k + 1): at the end all windows were equally likely."""
    latest, chosen, rng = deque(maxlen=args.frames), {}, np.random.default_rng(seed)
    for k, frame in enumerate(read_frames(video), 1 - args.frames):  # the last frame of window k
        latest.append(preprocess(frame[None], *PROTOCOLS[args.protocol]))  # (3, 1, 224, 224)
        if args.window == "first":
            place = args.clips if k % args.frames else k // args.frames
        else:
            place = k if k < args.clips else rng.integers(k + 1)
        if 0 <= k and place < args.clips:
            chosen[place] = torch.cat([*latest], dim=1)
    if not chosen:
        raise UnreadableVideo(video.name, f"shorter than --frames {args.frames}; I3D takes at least 9")
    return [*chosen.values()]


def measure(root, net, args, settings):
    """Features of a set, and facts about it; --save-features may have kept them.    path -> (n, d), dict

    Damaged and short videos are named on stderr and left out, or raise UnreadableVideo if args.strict."""
    if os.path.isfile(root) and zipfile.is_zipfile(root):
        with naming(root), np.load(root, allow_pickle=False) as saved:
            if {*saved} == {"features", "facts", "settings"}:
                if json.loads(str(saved["settings"])) != settings:
                    raise ValueError(f"made with {saved['settings']}, not with {json.dumps(settings)}")
                return torch.from_numpy(saved["features"]), json.loads(str(saved["facts"]))
    sources, facts = find_videos(root), {"path": root, "videos": 0, "clips": 0}

    def attempt(function, *inputs):
        try:
            return function(*inputs)
        except UnreadableVideo as error:
            if args.strict:
                raise
            tqdm.write(f"left out: {error}", file=sys.stderr)
            return []

    def clips():
        videos = ((video, [args.seed, i, j], args) for i, source in enumerate(sources)
                  for j, video in enumerate(attempt(open_videos, source, RANGES.get(args.floats))))
        videos = iter(tqdm(videos, root[-30:], unit=" videos"))
        with ThreadPoolExecutor(4) as pool:
            while group := list(islice(videos, args.batch)):
                for some in pool.map(partial(attempt, cut_clips), *zip(*group)):
                    facts["videos"] += len(some) > 0
                    facts["clips"] += len(some)
                    yield from some

    features = video_features(clips(), net, batch=args.batch, device=args.device)
    if len(features) < 2:
        raise UnreadableVideo(root, f"a covariance needs 2 clips, not {len(features)}; was any left out?")
    return features, facts


def run(args):
    """Score FAKE against REAL.    parsed arguments -> dict, as --json writes it"""
    find_videos(args.real), find_videos(args.fake)  # a wrong name is found before the work
    inputs = {Path(args.real).resolve(), Path(args.fake).resolve()}
    for file in (Path(name).resolve() for name in (args.json, args.save_features) if name):
        if file.is_dir() or not file.parent.is_dir() or inputs & {file, *file.parents}:
            raise ValueError(f"{file} is a folder, or in one that does not exist, or in REAL or FAKE")
    known = args.features == "i3d"
    if known and args.download:
        download_weights(args.weights)
    net = (load_i3d(args.weights, args.allow_unknown_weights) if known else random_i3d()).to(args.device)
    network = published(args.weights) if known else "I3D with random weights (seed 0)"
    settings = {"network": network, **{name: getattr(args, name) for name in SETTINGS}}
    a, real = measure(args.real, net, args, settings)
    if args.save_features:
        with open(args.save_features, "wb") as file:  # under this very name
            np.savez(file, features=a, facts=json.dumps(real), settings=json.dumps(settings))
    b, fake = measure(args.fake, net, args, settings)
    warnings = ["small sets score high: compare numbers of equal N only"]
    warnings += ["the weights are not a published file: the number may not be FVD"] * ("unknown" in network)
    warnings += ["the numbers of clips are unequal"] * (real["clips"] != fake["clips"])
    return {"metric": "FVD" if known else "FD-random", "value": frechet_distance(a, b),
            "kernel_metric": "KVD" if known else "KD-random", "kernel_value": kernel_distance(a, b),
            **settings, "real": real, "fake": fake, "warnings": warnings}


def main(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add, flag = parser.add_argument, partial(parser.add_argument, action="store_true")
    add("real", help="folder or file of real videos, or what --save-features wrote")
    add("fake", help="folder or file of generated videos: films, arrays (n, t, h, w, c), folders of images")
    add("--protocol", choices=PROTOCOLS, default="standard", help="original: TF1's resize; paper: and [0, 1]")
    add("--floats", choices=RANGES, help="what floats in arrays mean: unit, 0 to 1; symmetric, -1 to 1")
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
    try:
        result = run(args)
        if args.json:
            Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    except (ValueError, OSError, zipfile.BadZipFile, RuntimeError, AssertionError) as error:
        print(f"fvd.py: {error}", file=sys.stderr)
        return 2
    print(f"{result['metric']} {result['value']:.6g}\n{result['kernel_metric']} {result['kernel_value']:.6g}")
    for name in ("network", *SETTINGS):
        print(f"  {name:9} {result[name]}")
    for name in ("real", "fake"):
        print("  {:9} {videos} videos, {clips} clips: {path}".format(name, **result[name]))
    print(*(f"  warning   {warning}" for warning in result["warnings"]), sep="\n")
    return 0


if __name__ == "__main__":
    gc.freeze()  # imageio collects garbage after every film: without what was imported it takes no time
    sys.stdout.reconfigure(errors="backslashreplace")  # a console of Windows has no letter for many a path
    sys.exit(main())
