"""Time and memory of every part, beside other ways to do the same.

    python tests/bench.py scan --peers             the selective scan beside mambapy, mamba_ssm, naive loops
    python tests/bench.py scan --peers --device cuda --dtype bfloat16
    python tests/bench.py layers --frames 16 64    every temporal layer alone
    python tests/bench.py unet                     a training step of the 14.1M U-Net
    python tests/bench.py unet --variants attention-explicit bi-mamba bi-mamba+recompute bi-mamba+amp+compile
    python tests/bench.py unet --official CLONE    beside attention by a clone of the official code
    python tests/bench.py unet --fake --frames 256 --batch 8     memory alone, of steps that need not fit
    python tests/bench.py data                     batches of the maze and of a folder's cache
    ... --device cuda  --threads N  --repeats N  --json FILE (options and every single time)

Time. Variants of a case live in one process and take turns, in alternating order: a busy moment hits all. One
call goes ahead, in which torch.compile compiles ("first call"); a variant that has used 20 seconds takes two
turns. Tables show median (min-max) of forward + backward, for the U-Net with Adam's step. "ratio" is the median
of the ratios to the first row's time, turn by turn: below 1 is faster.

Memory. "peak" is the most bytes alive during a call. Outputs and gradients count; inputs and a layer's weights
do not. To a U-Net's peak its weights and Adam's two averages are added (train.py has an average of the weights
besides). On CUDA torch.cuda.max_memory_allocated tells. On a CPU the bytes are those of the storages a call
makes: the same on every machine, without workspaces inside operators, fragmentation, and what compiled code
takes, which shows no number. --fake counts so on tensors without data. E is one float32 tensor (b, l, d, n),
which a scan should not hold.

Caveats. On a busy machine ratios move by 20 to 30 % from run to run. Peers that hold (b, l, d, n) wait for fresh
memory: MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184 in the environment is kind to them.
mambapy is called without what its block makes around the scan, mamba_ssm in its own layout. "naive" indexes its
tensors, as most minimal code does: l^2 in backward; unbind is linear. "attention-explicit" is torch's MATH
kernel, with l x l scores like the papers' baseline; a CPU uses it for "attention" too, which has a learned bias.
"""

import argparse
import contextlib
import gc
import importlib.util
import json
import math
import statistics
import sys
import tempfile
import time
import weakref
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Callable, NamedTuple
from unittest.mock import MagicMock, patch

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vdm_ssm
from vdm_ssm import TEMPORAL_LAYERS, selective_scan, selective_scan_loop

COMMON = dict(device="cpu", threads=torch.get_num_threads(), repeats=5, json="")
OPTIONS = {  # of each command
    "scan": dict(shapes=["256x16x128x16", "256x64x128x16", "64x256x128x16", "64x64x512x16", "16x1024x128x16"],
                 dtype="float32", peers=False),
    "layers": dict(variants=["attention-explicit", *TEMPORAL_LAYERS], frames=[16, 64, 256], pixels=32, dim=64),
    "unet": dict(variants=["attention-explicit", "attention", "bi-s4d", "bi-mamba", "bi-mamba+recompute"],
                 frames=[16, 64], size=32, batch=1, dim=32, heads=4, official="", fake=False),
    "data": dict(frames=16, size=32, batch=8, batches=20),
}  # fmt: skip
OFFICIAL = {"official-attention": "attn", "official-linear-attention": "l-attn"}  # our names, and that code's


class PeakMemory(TorchDispatchMode):
    """Counts bytes of the storages made in a `with` block: `now` those alive, `peak` the most there were."""

    def __enter__(self):
        self.now = self.peak = 0
        self.known = weakref.WeakSet()
        return super().__enter__()

    def free(self, size):
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        storages = lambda tree: [x.untyped_storage() for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
        self.known.update(storages((args, kwargs)))  # a view of what was there before is not new
        out = func(*args, **(kwargs or {}))
        for storage in storages(out):
            if storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out


class Work(NamedTuple):
    call: Callable
    parameters: int = 0
    held: int = 0  # bytes that exist before, and belong to the peak
    countable: bool = True  # on a CPU


def seconds(work, device):
    """Wall time of one call, the device's work included."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    work.call()
    wait()
    return time.perf_counter() - start


def memory(work, device="cpu"):
    """The peak of one call in bytes, from CUDA's allocator or by counting.    -> parts of a record"""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work.call()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with PeakMemory() as counter:
            work.call()
        peak = counter.peak
    return {"peak": peak + work.held, "parameters": work.parameters}


def measure(works, args):
    """Take turns.    {name: Work} -> {name: a record}, without those that are out of memory"""
    torch.compiler.reset()  # else a second shape is compiled for all shapes
    records = {}
    for name, work in works.items():
        try:
            records[name] = {"first": seconds(work, args.device), "seconds": []}
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory", file=sys.stderr)
    for turn in range(args.repeats):
        for name in list(records)[:: -1 if turn % 2 else 1]:
            if turn < 2 or sum(records[name]["seconds"]) < 20:
                records[name]["seconds"].append(seconds(works[name], args.device))
    for name, record in records.items():
        first = next(iter(records.values()))["seconds"]
        record["ratio"] = statistics.median(a / b for a, b in zip(record["seconds"], first))
        if args.device.startswith("cuda") or works[name].countable:
            record |= memory(works[name], args.device)
    return records


def show(args, title, records, unit="ms", of=lambda s: 1e3 * s, size="MiB", whole=2**20):
    """Print a table and keep it for --json.    of: seconds in `unit`; whole: bytes of one `size`"""
    number = lambda x: f"{x:.{3 if x < 1 else 2 if x < 10 else 1 if x < 100 else 0}f}"
    spread = lambda xs: "{} ({}-{})".format(*(number(f(map(of, xs))) for f in (statistics.median, min, max)))
    columns = {"parameters": ("parameters", "{:,}".format), "seconds": (unit, spread), "ratio": ("ratio", number),
               "first": ("first call, s", number), "peak": (f"peak, {size}", lambda n: number(n / whole))}
    rows = [["", *(header for header, _ in columns.values())], ["---", *("---:" for _ in columns)]]
    for name, record in records.items():
        rows.append([name, *(cell(record[key]) if record.get(key) else "-" for key, (_, cell) in columns.items())])
    widths = [max(map(len, column)) for column in zip(*rows)]
    print(f"\n{title}\n", *(" | ".join(map(str.ljust, row, widths)) for row in rows), sep="\n", flush=True)
    args.results.append({"title": title, "records": records})


def naive_scan(u, dt, A, B, C, D, frames=lambda x: [x[:, k] for k in range(x.shape[1])]):
    """As most minimal code has it: all decays and inputs at once, (b, l, d, n), then a walk over time."""
    decays, inputs = torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, None]
    state, ys = torch.zeros_like(inputs[:, 0]), []
    for decay_k, input_k, C_k in zip(frames(decays), frames(inputs), frames(C)):
        state = decay_k * state + input_k
        ys.append((state @ C_k[..., None].to(state.dtype)).squeeze(-1))  # (b, d)
    return torch.stack(ys, dim=1) + D * u


def mambapy_scan(u, dt, A, B, C, D):
    from mambapy.pscan import pscan

    states = pscan(torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, None].to(A.dtype))  # (b, l, d, n)
    return (states @ C[..., None].to(states.dtype)).squeeze(-1) + D * u


def scans(args):
    """The peers that are installed, then ours.    -> {name: f(u, dt, A, B, C, D)}"""
    peers = {"mambapy": mambapy_scan} if importlib.util.find_spec("mambapy") else {}
    peers |= {"naive": naive_scan, "naive, unbind": partial(naive_scan, frames=lambda x: x.unbind(1))}
    if args.device.startswith("cuda") and importlib.util.find_spec("mamba_ssm"):
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        peers["mamba_ssm"] = selective_scan_fn
    ours = {"ours": selective_scan, "ours, compiled": torch.compile(selective_scan), "definition": selective_scan_loop}
    return peers | ours if args.peers else ours


def scan_work(args, name, shape, longest=0.1):
    """dt as Mamba's initialisation has it: log-uniform, 0.001 to `longest`."""
    b, l, d, n = shape
    torch.manual_seed(0)
    with torch.device(args.device):
        (u, dy), (B, C) = torch.randn(2, b, l, d), torch.randn(2, b, l, n)
        dt = 1e-3 * torch.exp(math.log(1e3 * longest) * torch.rand(b, l, d))
        A, D = -torch.arange(1.0, n + 1).repeat(d, 1), torch.ones(d)
    u, dt, B, C, dy = (x.to(getattr(torch, args.dtype)) for x in (u, dt, B, C, dy))
    if name == "mamba_ssm":  # (b, d, l) and (b, n, l)
        u, dt, B, C, dy = (x.mT.contiguous() for x in (u, dt, B, C, dy))
    inputs = [x.requires_grad_() for x in (u, dt, A, B, C, D)]

    def call():
        y = scans(args)[name](*inputs)
        torch.autograd.grad(y, inputs, dy.to(y.dtype))

    return Work(call, countable="compiled" not in name)


def bench_scan(args):
    """Many pixels with few frames to few with many; then what length and strong decay cost, on the last shape."""
    shapes = [tuple(map(int, shape.split("x"))) for shape in args.shapes]
    b, l, d, n = shapes[-1]
    cases = {f"(b, l, d, n) = {shape}": {name: (name, shape) for name in scans(args)} for shape in shapes}
    for name in ("ours", "ours, compiled"):
        cases[name] = {f"{l} frames": (name, shapes[-1]), f"{l} frames, dt to 10": (name, shapes[-1], 10),
                       "16 frames": (name, (b * l // 16, 16, d, n))}  # fmt: skip
    for title, case in cases.items():
        records = measure({row: scan_work(args, *what) for row, what in case.items()}, args)
        elements = math.prod(next(iter(case.values()))[1])  # as many in all rows
        show(args, f"{title}, {args.dtype}", records, "ns per element", lambda s: 1e9 * s / elements, "E", 4 * elements)


def layer_work(name, frames, args):
    torch.manual_seed(0)
    with torch.device(args.device):
        layer = vdm_ssm.temporal_layer(name.removesuffix("-explicit"))(args.dim)
        x, dy = torch.randn(2, args.pixels, frames, args.dim)
    leaves = [x.requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]

    def call():
        with explicit(name):
            torch.autograd.grad(layer(x), leaves, dy)

    return Work(call, sum(p.numel() for p in layer.parameters()))


def explicit(name):
    """Attention by torch's MATH kernel, if the name asks for it."""
    return sdpa_kernel(SDPBackend.MATH) if "-explicit" in name else contextlib.nullcontext()


def bench_layers(args):
    for frames in args.frames:
        works = {name: layer_work(name, frames, args) for name in args.variants}
        show(args, f"A layer, {args.pixels} pixels, {frames} frames, width {args.dim}", measure(works, args))


def official_unet(clone, name, dim, heads):
    """The network of the official code; it wants einops-exts and rotary-embedding-torch."""
    package = "video_diffusion_pytorch"
    absent = ["wandb", "torchvision", "torchvision.datasets", f"{package}.text", f"{package}.long_video_datasets"]
    parent = ModuleType(package)  # instead of its __init__, which imports everything
    parent.__path__ = [str(Path(clone, package))]
    with patch.dict(sys.modules, {package: parent} | {module: MagicMock() for module in absent}):
        module = importlib.import_module(f"{package}.wip_video_diffusion_pytorch")
    module.prob_mask_like = lambda *args, **kwargs: None  # else it asks a mask of zeros for numbers: fakes have none
    return module.Unet3D(dim, attn_heads=heads, temporal_arch=OFFICIAL[name])


def unet_work(variant, frames, size=32, batch=1, dim=32, heads=4, device="cpu", official=""):
    """A training step.    variant: a temporal layer and options, "bi-mamba+amp+compile"; official: a clone"""
    name, *options = variant.split("+")
    if set(options) - {"amp", "compile", "recompute"}:
        raise ValueError(f"{variant}: the options are +amp, +compile and +recompute")
    torch.manual_seed(0)
    with torch.device(device):
        if name in OFFICIAL:
            model = official_unet(official, name, dim, heads)
        else:
            recompute, temporal = "recompute" in options, name.removesuffix("-explicit")
            model = vdm_ssm.UNet3D(dim, heads=heads, temporal=temporal, recompute=recompute)
        diffusion = vdm_ssm.GaussianDiffusion(model)
        x = torch.rand(batch, 3, frames, size, size) * 2 - 1
    weights = list(model.parameters())
    for p in weights:  # as train.py has them
        p.data = p.data.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else p.data
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.Adam(weights, lr=1e-4, fused=True)  # in place: it takes its averages alone
    optimizer.step()  # makes them
    optimizer.zero_grad()
    for block in model.modules() if "compile" in options else ():
        if isinstance(block, (vdm_ssm.ResBlock, vdm_ssm.OverSpace, vdm_ssm.OverTime)):
            block.compile(dynamic=False)

    def call():
        with explicit(name):
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled="amp" in options):
                loss = diffusion.loss(x)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    size = sum(p.numel() for p in weights)
    return Work(call, size, 3 * sum(p.nbytes for p in weights), "compile" not in options)


def count_step(variant, frames, fake=False, **sizes):
    """A training step on a CPU, see `unet_work`; fake: without data.    -> {"peak": bytes, "parameters": number}"""
    with FakeTensorMode() if fake else contextlib.nullcontext():
        work = unet_work(variant, frames, **sizes)
        if not work.countable:
            raise ValueError(f"{variant}: what compiled code takes is seen on CUDA only")
        return memory(work)


def bench_unet(args):
    sizes = {key: getattr(args, key) for key in ("size", "batch", "dim", "heads", "official")}
    names = [*(OFFICIAL if args.official else ()), *args.variants]
    for frames in args.frames:
        if args.fake:
            records = {name: count_step(name, frames, fake=True, **sizes) for name in names}
        else:
            works = {name: unet_work(name, frames, device=args.device, **sizes) for name in names}
            records = measure(works, args)
        show(args, f"UNet3D, dim {args.dim}, batch {args.batch}, {frames}x{args.size}x{args.size}", records)


def bench_data(args):
    import train

    frames, size = args.frames, args.size
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "videos").mkdir()
        for i in range(8):
            np.save(f"{folder}/videos/{i}", np.full((4 * frames, 2 * size, 3 * size, 3), i, dtype=np.uint8))
        sets = {"maze": train.MazeVideos("train", frames, size),
                "folder": train.FolderVideos(f"{folder}/videos", frames, size, Path(folder, "cache"), 0)}  # fmt: skip
        batch = lambda data, i: torch.utils.data.default_collate([data[i * args.batch + k] for k in range(args.batch)])
        load = lambda data: [batch(data, i) for i in range(args.batches)]
        works = {name: Work(partial(load, data), countable=False) for name, data in sets.items()}
        title = f"Batches of {args.batch} videos, {frames}x{size}x{size}, one process"
        show(args, title, measure(works, args), "batches/s", lambda s: args.batches / s)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    for what, options in OPTIONS.items():
        command = commands.add_parser(what)
        for key, default in (COMMON | options).items():
            many = {"nargs": "+", "type": type(default[0])} if isinstance(default, list) else {"type": type(default)}
            kind = {"action": "store_true"} if default is False else many
            command.add_argument(f"--{key}", default=default, help=f"default: {default}", **kind)
    args = parser.parse_args(argv)
    args.results = []
    torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 64  # each width has a graph of its own
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)  # whose memory is watched
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads")
    {"scan": bench_scan, "layers": bench_layers, "unet": bench_unet, "data": bench_data}[args.what](args)
    if args.json:
        Path(args.json).write_text(json.dumps(vars(args) | {"torch": torch.__version__}, indent=1))


if __name__ == "__main__":
    main()
