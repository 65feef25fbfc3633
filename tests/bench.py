"""Time and memory of every part, beside other ways to do the same.

    python tests/bench.py scan --peers             the scan beside mambapy, mamba_ssm and a naive loop
    python tests/bench.py scan --peers --device cuda --dtype bfloat16
    python tests/bench.py layers --frames 16 64    every temporal layer alone
    python tests/bench.py unet --official CLONE    training steps, beside a clone of the official code
    python tests/bench.py unet --variants attention-explicit bi-mamba bi-mamba+recompute bi-mamba+amp+compile
    python tests/bench.py unet --fake --frames 256 --batch 8     memory alone, of steps that need not fit
    python tests/bench.py data                     batches of the maze, and of a folder's cache

Time: forward + backward, in `unet` with Adam's step. After one call ahead ("first call": torch.compile
compiles) the rows of a table take turns in one process, in alternating order: a busy moment hits them all. A
row that has used 20 seconds takes two turns. Shown are median (min-max) and, as "ratio", the median of the
ratios to the first row's time, turn by turn. A busy machine moves it by 20 to 30 % from run to run.

Memory: "peak" is the most bytes alive in a call, above inputs and weights; outputs and gradients count. To it
`unet` adds weights and Adam's two averages, but not train.py's average of the weights. CUDA's allocator knows
it. On a CPU it is counted from the storages of tensors: the same on every machine, without workspaces inside
operators, fragmentation, and compiled code ("-"). --fake counts so without data, as on a CPU. E is one
float32 tensor (b, l, d, n), which a scan should not hold.

Peers that hold (b, l, d, n) wait for memory of the system; MALLOC_MMAP_THRESHOLD_=8589934592
MALLOC_TRIM_THRESHOLD_=17179869184 is kind to them. mambapy is called without what its block makes around the
scan, mamba_ssm in its own layout. "attention-explicit" is torch's MATH kernel: it holds l x l scores as the
papers' baseline does. A CPU takes it for "attention" too, whose bias is learned.
"""

import argparse
import contextlib
import importlib
import json
import math
import statistics
import sys
import tempfile
import time
import weakref
from pathlib import Path
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

explicit = sdpa_kernel(SDPBackend.MATH)  # a decorator: attention holds l x l scores
COMMON = dict(device="cpu", threads=torch.get_num_threads(), repeats=5, json="")
OPTIONS = {
    "scan": dict(shapes=["256x16x128x16", "256x64x128x16", "64x256x128x16", "64x64x512x16", "16x1024x128x16"],
                 dtype="float32", peers=False),
    "layers": dict(variants=["attention-explicit", *TEMPORAL_LAYERS], frames=[16, 64], pixels=32, dim=64),
    "unet": dict(variants=["attention-explicit", "attention", "bi-s4d", "bi-mamba", "bi-mamba+recompute"],
                 frames=[16, 64], size=32, batch=1, dim=32, heads=4, official="", fake=False),
    "data": dict(frames=16, size=32, batch=8),
}  # fmt: skip
OFFICIAL = {"official-attention": "attn", "official-linear-attention": "l-attn"}  # our names, and that code's


class PeakMemory(TorchDispatchMode):
    """Counts bytes of the storages made in a `with` block: `now` those alive, `peak` the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def add(self, size):
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        storages = lambda *tree: [x.untyped_storage() for x in tree_leaves(tree) if torch.is_tensor(x)]
        self.known.update(storages(args, kwargs))  # a view of what was there before is not new
        out = func(*args, **(kwargs or {}))
        for storage in storages(out):
            if storage not in self.known:
                self.known.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return out


def peak(call, device="cpu"):
    """The most bytes alive in a call, and those that it says to be `held` besides."""
    held = getattr(call, "held", 0)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before + held
    with PeakMemory() as memory:
        call()
    return memory.peak + held


def seconds(call, device):
    """Wall time of a call, the device's work included."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def measure(calls, args, count=True):
    """Take turns.    {name: call} -> {name: {"first", "seconds", "ratio", "peak"}} of those that can run"""
    torch.compiler.reset()  # else a second shape is compiled for all shapes
    records = {}
    for name, call in calls.items():
        try:
            records[name] = {"first": seconds(call, args.device), "seconds": []}
        except (torch.OutOfMemoryError, ImportError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    for turn in range(args.repeats):
        for name in list(records)[:: -1 if turn % 2 else 1]:
            if turn < 2 or sum(records[name]["seconds"]) < 20:
                records[name]["seconds"].append(seconds(calls[name], args.device))
    for name, record in records.items():
        pairs = zip(record["seconds"], next(iter(records.values()))["seconds"])
        record["ratio"] = statistics.median(a / b for a, b in pairs)
        if count and (args.device.startswith("cuda") or "compile" not in name):
            record["peak"] = peak(calls[name], args.device)
    return records


def show(title, records, unit="ms", of=lambda s: 1e3 * s, size="MiB", whole=2**20):
    """Print a table.    of: seconds in `unit`; whole: bytes of one `size`"""
    number = lambda x: f"{x:.{3 if x < 1 else 2 if x < 10 else 1 if x < 100 else 0}f}"
    spread = lambda xs: "{} ({}-{})".format(*(number(f(map(of, xs))) for f in (statistics.median, min, max)))
    cells = {"seconds": spread, "ratio": number, "first": number, "peak": lambda x: number(x / whole)}
    print(f"\n| {title} | {unit} | ratio | first call, s | peak, {size} |\n|---|---:|---:|---:|---:|")
    for name, record in records.items():
        row = [cell(record[key]) if key in record else "-" for key, cell in cells.items()]
        print("|", " | ".join([name, *row]), "|", flush=True)


def both(function, inputs, dy, weights=()):
    """Forward and backward, as a call."""

    def call():
        y = function(*inputs)
        torch.autograd.grad(y, [*inputs, *weights], dy.to(y.dtype))

    return call


def naive_scan(u, dt, A, B, C, D):
    """As most minimal code has it: all decays and inputs at once, then a walk over time."""
    decays, inputs = torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, None]  # (b, l, d, n)
    state, ys = torch.zeros_like(inputs[:, 0]), []
    # By unbind: the gradient of an index is as large as what it indexes, so indices take l^2 in backward.
    for decay_k, input_k, C_k in zip(*(x.unbind(1) for x in (decays, inputs, C))):
        state = decay_k * state + input_k
        ys.append((state @ C_k[..., None].to(state.dtype)).squeeze(-1))  # (b, d)
    return torch.stack(ys, dim=1) + D * u


def mambapy_scan(u, dt, A, B, C, D):
    from mambapy.pscan import pscan

    states = pscan(torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, None].to(A.dtype))
    return (states @ C[..., None].to(states.dtype)).squeeze(-1) + D * u


def mamba_ssm_scan(u, dt, A, B, C, D):  # u, dt (b, d, l), B, C (b, n, l)
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(u, dt, A, B, C, D)


PEERS = {"mambapy": mambapy_scan, "mamba_ssm": mamba_ssm_scan, "naive": naive_scan}
OURS = {"ours": selective_scan, "ours, compiled": torch.compile(selective_scan),
        "ours, dt to 10": selective_scan, "definition": selective_scan_loop}  # fmt: skip


def scan_call(args, name, b, l, d, n):
    torch.manual_seed(0)
    with torch.device(args.device):
        (u, dy), (B, C) = torch.randn(2, b, l, d), torch.randn(2, b, l, n)
        longest = 10 if "dt to 10" in name else 0.1  # dt is log-uniform from 0.001 to this; 0.1 is Mamba's
        dt = 1e-3 * torch.exp(math.log(1e3 * longest) * torch.rand(b, l, d))
        A, D = -torch.arange(1.0, n + 1).repeat(d, 1), torch.ones(d)
    series = [x.to(getattr(torch, args.dtype)) for x in (u, dt, B, C, dy)]
    u, dt, B, C, dy = [x.mT.contiguous() for x in series] if name == "mamba_ssm" else series
    return both((PEERS | OURS)[name], [x.requires_grad_() for x in (u, dt, A, B, C, D)], dy)


def bench_scan(args):
    for shape in args.shapes:
        shape = list(map(int, shape.split("x")))
        calls = {name: scan_call(args, name, *shape) for name in (PEERS | OURS if args.peers else OURS)}
        size = math.prod(shape)
        units = "ns per element", lambda s: 1e9 * s / size, "E", 4 * size
        yield f"(b, l, d, n) = {shape}", measure(calls, args), *units


def bench_layers(args):
    for frames in args.frames:
        calls = {}
        for name in args.variants:
            torch.manual_seed(0)
            with torch.device(args.device):
                layer = vdm_ssm.temporal_layer(name.removesuffix("-explicit"))(args.dim)
                x, dy = torch.randn(2, args.pixels, frames, args.dim)
            call = both(layer, [x.requires_grad_()], dy, [p for p in layer.parameters() if p.requires_grad])
            row = f"{name}, {sum(p.numel() for p in layer.parameters()):,} parameters"
            calls[row] = explicit(call) if "-explicit" in name else call
        yield f"{args.pixels} pixels, {frames} frames, width {args.dim}", measure(calls, args)


def official_unet(clone, name, dim, heads):
    """The network of the official code; it wants einops-exts and rotary-embedding-torch."""
    package = "video_diffusion_pytorch"  # whose __init__ would import everything
    absent = ["wandb", "torchvision", "torchvision.datasets"]
    absent += [f"{package}.text", f"{package}.long_video_datasets"]
    stubs = {package: MagicMock(__path__=[f"{clone}/{package}"], __spec__=None)}
    stubs |= {name: MagicMock() for name in absent}
    with patch.dict(sys.modules, stubs):
        module = importlib.import_module(f"{package}.wip_video_diffusion_pytorch")
    module.prob_mask_like = lambda *args, **kwargs: None  # instead of zeros, whose numbers it asks for
    return module.Unet3D(dim, attn_heads=heads, temporal_arch=OFFICIAL[name])


def unet_call(variant, frames, size=32, batch=1, dim=32, heads=4, device="cpu", official=""):
    """A training step.    variant: a temporal layer and options, "bi-mamba+amp+compile"; official: a clone"""
    name, *options = variant.split("+")
    if set(options) - {"amp", "compile", "recompute"}:
        raise ValueError(f"{variant}: the options are +amp, +compile and +recompute")
    torch.manual_seed(0)
    with torch.device(device):
        if name in OFFICIAL:
            model = official_unet(official, name, dim, heads)
        else:
            temporal, recompute = name.removesuffix("-explicit"), "recompute" in options
            model = vdm_ssm.UNet3D(dim, heads=heads, temporal=temporal, recompute=recompute)
        diffusion = vdm_ssm.GaussianDiffusion(model)
        x = torch.rand(batch, 3, frames, size, size) * 2 - 1
    for p in model.parameters():
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)  # as in train.py
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    optimizer.step()  # makes its averages; from now on it takes no memory
    optimizer.zero_grad()
    for block in model.modules() if "compile" in options else ():
        if isinstance(block, (vdm_ssm.ResBlock, vdm_ssm.OverSpace, vdm_ssm.OverTime)):
            block.compile(dynamic=False)

    def call():
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled="amp" in options):
            loss = diffusion.loss(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    call = explicit(call) if "-explicit" in name else call
    call.held = 3 * sum(p.nbytes for p in model.parameters())  # weights and averages
    return call


def count_step(variant, frames, fake=False, **sizes):
    """The peak of a training step on a CPU, in bytes; see `unet_call`. fake: without data."""
    if "compile" in variant:
        raise ValueError(f"{variant}: what compiled code takes is seen on CUDA only")
    with FakeTensorMode() if fake else contextlib.nullcontext():
        return peak(unet_call(variant, frames, **sizes))


def bench_unet(args):
    sizes = {key: getattr(args, key) for key in ("size", "batch", "dim", "heads", "official")}
    names = [*(OFFICIAL if args.official else ()), *args.variants]
    for frames in args.frames:
        title = f"{args.batch} x {frames} frames, {args.size}x{args.size} pixels"
        if args.fake:
            yield title, {name: {"peak": count_step(name, frames, fake=True, **sizes)} for name in names}
        else:
            calls = {name: unet_call(name, frames, device=args.device, **sizes) for name in names}
            yield title, measure(calls, args)


def bench_data(args):
    """Batches made by one process."""
    import train

    frames, size = args.frames, args.size
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "videos").mkdir()
        for i in range(8):
            np.save(f"{folder}/videos/{i}", np.full((4 * frames, 2 * size, 3 * size, 3), i, dtype=np.uint8))
        options = ["--frames", str(frames), "--size", str(size), "--out", f"{folder}/run"]
        data_of = lambda data: train.videos_of(train.parse([*options, "--data", data])[0])
        maze, cache = data_of("maze"), data_of(f"{folder}/videos")
        batch = lambda data: torch.utils.data.default_collate([data[i] for i in range(args.batch)])
        calls = {"maze": lambda: batch(maze), "folder's cache": lambda: batch(cache)}
        records = measure(calls, args, count=False)
        yield f"{args.batch} x {frames} frames, {size}x{size} pixels", records, "batches/s", lambda s: 1 / s


def main(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="what", required=True)
    for what, options in OPTIONS.items():
        command = commands.add_parser(what)
        for key, default in (COMMON | options).items():
            kind = {"type": type(default), "metavar": "X"}
            if isinstance(default, list):
                kind = {"type": type(default[0]), "nargs": "+", "metavar": "X"}
            elif default is False:
                kind = {"action": "store_true"}
            command.add_argument(f"--{key}", default=default, help="default: %(default)s", **kind)
    args = parser.parse_args(argv)
    args.results = []
    torch.set_num_threads(args.threads)
    torch._dynamo.config.recompile_limit = 64  # each width has a graph of its own
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)  # whose memory is watched
    print(f"torch {torch.__version__}, {args.device}, {args.threads} threads")
    bench = {"scan": bench_scan, "layers": bench_layers, "unet": bench_unet, "data": bench_data}[args.what]
    try:
        for title, records, *units in bench(args):
            show(title, records, *units)
            args.results.append({"title": title, "records": records})
    except (ValueError, ImportError) as error:
        sys.exit(f"bench.py: {error}")
    if args.json:
        Path(args.json).write_text(json.dumps(vars(args) | {"torch": torch.__version__}, indent=1))


if __name__ == "__main__":
    main()
