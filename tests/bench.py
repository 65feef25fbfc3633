"""Time and memory of every part, against other ways to do the same.

    python tests/bench.py                              the selective scan beside its definition
    python tests/bench.py scan --peers                 beside mambapy, mamba_ssm (if installed) and naive loops
    python tests/bench.py scan --device cuda --dtype bfloat16
    python tests/bench.py s4d                          S4D both ways, against two FFT convolutions between flips
    python tests/bench.py layers --names attention attention-explicit bi-s4d bi-mamba --frames 16 64 256
    python tests/bench.py unet --with amp compile recompute    a training step, and what each option gives
    python tests/bench.py unet --official CLONE        beside the official attention models, from a clone of their code
    python tests/bench.py memory --device cuda         memory of the papers' training steps, counted: it takes no GPU
    python tests/bench.py memory --official CLONE      the same beside the official attention models
    python tests/bench.py dim                          a block of DiM and a transformer's, by the number of tokens
    python tests/bench.py data                         batches per second of the maze and of a folder's cache
    python tests/bench.py fvd                          features per second against the bare I3D
    ... --json FILE  --repeats N  --threads N  --quick (tiny sizes: is everything in order?)

Time. All variants of a case live in one process and take turns, in alternating order, so that a busy moment of the
machine hits them all. Each gets one call ahead (torch.compile compiles in it: the column "first call"), then
--repeats turns; one that has used PATIENCE seconds stops after two. Forward alone runs without autograd. Tables show
median (min-max); a ratio is the median of the ratios turn by turn, below 1 if the row is faster.

Memory. Bytes above what there is when inputs and weights exist: outputs and gradients count. `kept` is what is there
between forward and backward, the output included. On CUDA the allocator knows (max_memory_allocated). On a CPU each
variant runs in a fresh process, and is left out if it fails there: after one call ahead, writing 5 to
/proc/self/clear_refs resets the peak of the resident set, and the next call is watched through VmRSS and VmHWM of
/proc/self/status; malloc gives blocks of 16 KiB and more back when they are freed, so that old garbage hides nothing.
Without /proc (macOS) it is the growth of ru_maxrss over the first call, compilation included. E is the tensor a scan
should not hold, (b, l, d, n) in float32.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Callable, NamedTuple
from unittest.mock import MagicMock, patch

import numpy as np
import torch
from einops import rearrange
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vdm_ssm
from vdm_ssm import TEMPORAL_LAYERS, GaussianDiffusion, UNet3D, selective_scan, selective_scan_loop, temporal_layer

PATIENCE = 20  # seconds a variant may use beyond two turns
SHAPES = [(256, 16, 128, 16), (256, 64, 128, 16), (64, 256, 128, 16), (16, 1024, 128, 16), (64, 64, 512, 16)]
SHAPES_GPU = [(8192, 16, 128, 16), (8192, 64, 128, 16), (8192, 256, 128, 16)]  # 8 videos of 32x32 pixels
LAYERS = ("attention-explicit", *TEMPORAL_LAYERS)
OFFICIAL = ("official attention", "official linear-attention")
PAPERS = [  # temporal layer, dim, pixels, batch, frames of the commands in README, and of the largest model
    *(("bi-s4d", 64, size, 32, 16) for size in (32, 64)),
    *(("bi-s4d", 64, 32, 8, frames) for frames in (64, 150, 200, 400)),
    *(("bi-mamba", 32, 32, 8, frames) for frames in (16, 64, 256)),
    *(("bi-mamba", 112, 32, 1, frames) for frames in (16, 64, 256)),
]  # fmt: skip
BOTH = ("forward", "both")  # the passes of a scan that are timed


class Work(NamedTuple):
    """Something to measure: `forward` makes the output, `backward` takes it."""

    forward: Callable
    backward: Callable = lambda output: None
    held: int = 0  # bytes that exist before the measurement and belong to it all the same


# -----------------------------------------------------------------------------
# What is measured


def naive_scan(u, dt, A, B, C, D, frames=lambda x: [x[:, k] for k in range(x.shape[1])]):
    """The scan as most minimal code has it: all decays and inputs at once, (b, l, d, n), then a walk over time."""
    decays = torch.exp(dt[..., None] * A)  # (b, l, d, n)
    inputs = (dt * u)[..., None] * B[:, :, None]
    state, ys = torch.zeros_like(inputs[:, 0]), []
    for decay_k, input_k, C_k in zip(frames(decays), frames(inputs), frames(C)):
        state = decay_k * state + input_k
        ys.append((state @ C_k[..., None].to(state.dtype)).squeeze(-1))  # (b, d)
    return torch.stack(ys, dim=1) + D * u


def mambapy_scan(u, dt, A, B, C, D):
    """mambapy's parallel scan over time, with one (b, l, d, n) tensor less around it than its own block makes."""
    from mambapy.pscan import pscan

    states = pscan(torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, None].to(A.dtype))  # (b, l, d, n)
    return (states @ C[..., None].to(states.dtype)).squeeze(-1) + D * u


def mamba_ssm_scan(u, dt, A, B, C, D):
    """mamba_ssm's CUDA kernel.    u, dt (b, d, l), A (d, n), B, C (b, n, l), its own layout -> y (b, d, l)"""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(u, dt, A, B, C, D)


def installed(package):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


def scans(device="cpu"):
    """The peers, then the project's own.    -> two dicts of name -> f(u, dt, A, B, C, D)"""
    # An index has a gradient as large as what it indexes, so `naive` needs l^2 in backward; unbind has none of that.
    peers = {"naive": naive_scan, "naive, unbind": partial(naive_scan, frames=lambda x: x.unbind(1))}
    if installed("mambapy"):
        peers["mambapy"] = mambapy_scan
    if torch.device(device).type == "cuda" and installed("mamba_ssm"):
        peers["mamba_ssm"] = mamba_ssm_scan
    own = {"ours": selective_scan, "ours, compiled": torch.compile(selective_scan), "definition": selective_scan_loop}
    return peers, own


@lru_cache(maxsize=3)
def scan_inputs(shape, strong, dtype, device):
    """u, dt, A, B, C, D as leaves, and the gradient of y. dt as Mamba's initialisation has it, `strong` up to 10."""
    (b, l, d, n), generator = shape, torch.Generator().manual_seed(0)
    rand = partial(torch.rand, generator=generator)
    dt = 10 * rand(b, l, d) if strong else torch.exp(math.log(1e-3) + math.log(100) * rand(b, l, d))
    u, dy = torch.randn(2, b, l, d, generator=generator)
    B, C = torch.randn(2, b, l, n, generator=generator)
    A, D = -torch.arange(1.0, n + 1).repeat(d, 1), torch.ones(d)
    to = lambda x, dtype: x.to(device, dtype).requires_grad_()
    u, dt, B, C = (to(x, dtype) for x in (u, dt, B, C))
    return [u, dt, to(A, torch.float32), B, C, to(D, torch.float32)], dy.to(device)


def scan_work(variant, shape, device, dtype="float32", strong=False):
    peers, own = scans(device)
    inputs, dy = scan_inputs(tuple(shape), strong, getattr(torch, dtype), device)
    if variant == "mamba_ssm":  # a peer is not charged for our layout
        inputs = [x.mT.contiguous().detach().requires_grad_() if x.ndim == 3 else x for x in inputs]
        dy = dy.mT.contiguous()
    function = {**peers, **own}[variant]
    return Work(lambda: function(*inputs), lambda y: torch.autograd.grad(y, inputs, dy.to(y.dtype)))


class FlippedS4D(vdm_ssm.S4D):
    """S4D as most code has it: kernel by the direct formula, FFT by autograd, flips for reverse.    u (b, l, d) -> y"""

    def forward(self, u, reverse=False):
        u = u.flip(1).mT if reverse else u.mT  # (b, d, l)
        l, A = u.shape[-1], torch.complex(-self.log_A_real.exp(), self.A_imag)
        dt_A = self.log_dt.exp()[:, None] * A
        C = torch.view_as_complex(self.C) * (torch.exp(dt_A) - 1) / A
        K = 2 * torch.einsum("dm,dml->dl", C, torch.exp(dt_A[..., None] * torch.arange(l, device=u.device))).real
        y = torch.fft.irfft(torch.fft.rfft(u, n=2 * l) * torch.fft.rfft(K, n=2 * l), n=2 * l)[..., :l]
        y = (y + self.D[:, None] * u).mT
        return y.flip(1) if reverse else y


def s4d_work(variant, frames, device, rows=65536, d=64, n=64):
    """Two S4D, one each way, summed, on rows / frames sequences."""
    torch.manual_seed(0)
    core = vdm_ssm.S4D if variant == "ours" else FlippedS4D
    ahead, back = core(d, n).to(device), core(d, n).to(device)
    u = torch.randn(rows // frames, frames, d, device=device, requires_grad=True)
    leaves = [u, *ahead.parameters(), *back.parameters()]
    forward = lambda: ahead(u) + back(u, reverse=True)
    return Work(forward, lambda y: torch.autograd.grad(y, leaves, torch.ones_like(y)))


class ExplicitAttention(vdm_ssm.Attention):
    """The baseline as the papers ran it, with l x l scores in memory.    x (..., l, d) -> (..., l, d)"""

    def forward(self, x):
        q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        q, k, v = (rearrange(y, "... l (heads d) -> ... heads l d", heads=self.heads) for y in (q, k, v))
        q, k = self.rotary(q * q.shape[-1] ** -0.5), self.rotary(k)
        scores = q @ k.mT + self.bias(x.shape[-2])  # (..., heads, l, l)
        y = scores.softmax(dim=-1) @ v
        return self.to_out(rearrange(y, "... heads l d -> ... l (heads d)"))


def make_explicit(module):
    """Turn attention over time, known by its relative bias, into ExplicitAttention, in place."""
    for layer in module.modules():
        if isinstance(layer, vdm_ssm.Attention) and layer.bias is not None:
            layer.__class__ = ExplicitAttention
    return module


def layer_work(variant, frames, device, pixels=32, d=64):
    torch.manual_seed(0)
    layer = temporal_layer(variant.removesuffix("-explicit"))(d)
    layer = (make_explicit(layer) if variant.endswith("-explicit") else layer).to(device)
    x = torch.randn(pixels, frames, d, device=device, requires_grad=True)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return Work(lambda: layer(x), lambda y: torch.autograd.grad(y, leaves, torch.ones_like(y)))


def official_unet(clone, temporal, dim, heads):
    """The network of [1]'s own code, of which a clone is at hand; it wants einops-exts and rotary-embedding-torch."""
    package = "video_diffusion_pytorch"
    absent = ["wandb", "torchvision", "torchvision.datasets", "mamba_ssm", "mamba_ssm.ops",
              "mamba_ssm.ops.selective_scan_interface", "causal_conv1d",
              *(f"{package}.{part}" for part in ("text", "long_video_datasets", "t2v_datasets"))]  # fmt: skip
    parent = ModuleType(package)  # instead of its __init__, which imports everything
    parent.__path__ = [str(Path(clone, package))]
    with patch.dict(sys.modules, {package: parent} | {name: MagicMock() for name in absent}):
        module = importlib.import_module(f"{package}.wip_video_diffusion_pytorch")
    arch = {"attention": "attn", "linear-attention": "l-attn"}[temporal]
    return module.Unet3D(dim, attn_heads=heads, temporal_arch=arch)


def make_unet(temporal, clone=None, dim=32, heads=4, recompute=False):
    """UNet3D, or what it is compared with: "attention-explicit" and OFFICIAL."""
    if temporal in OFFICIAL:
        return official_unet(clone, temporal.removeprefix("official "), dim, heads)
    model = UNet3D(dim, heads=heads, temporal=temporal.removesuffix("-explicit"), recompute=recompute)
    return make_explicit(model) if temporal.endswith("-explicit") else model


def unet_work(variant, frames, device, size=32, clone=None):
    """A training step; variant is a temporal layer and options, "bi-mamba + amp"."""
    torch.manual_seed(0)
    temporal, *options = variant.split(" + ")
    model = make_unet(temporal, clone, recompute="recompute" in options).to(device)
    if temporal not in OFFICIAL:  # whose kernels are 3D
        model = model.to(memory_format=torch.channels_last)  # as train.py
    if "compile" in options:  # as train.py
        torch._dynamo.config.recompile_limit = 64
        model.compile(dynamic=False)
    diffusion = GaussianDiffusion(model).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    x = torch.rand(1, 3, frames, size, size, device=device) * 2 - 1

    def forward():
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled="amp" in options):
            return diffusion.loss(x)

    def backward(loss):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Work(forward, backward, held=3 * sum(p.nbytes for p in model.parameters()))  # Adam has two of each


def dim_work(variant, frames, device, size=32, patch=2, d=384, heads=6):
    """One block at the width of DiT-S, for a clip of `frames` frames; "DiM", or "transformer": attention and an MLP."""
    torch.manual_seed(0)
    if variant == "DiM":
        block, told = vdm_ssm.DiMBlock(d, d), [torch.randn(1, d, device=device)]
        torch.nn.init.normal_(block.to_modulation.weight, std=0.02)  # else the gates are closed
    else:
        block, told = torch.nn.TransformerEncoderLayer(d, heads, 4 * d, 0.0, batch_first=True, norm_first=True), []
    x = torch.randn(1, frames * (size // patch) ** 2, d, device=device, requires_grad=True)
    leaves = [x, *block.to(device).parameters()]
    return Work(lambda: block(x, *told), lambda y: torch.autograd.grad(y, leaves, torch.ones_like(y)))


MAKERS = {"scan": scan_work, "s4d": s4d_work, "layers": layer_work, "unet": unet_work, "dim": dim_work}


def make_work(case, args):
    """What a case describes; its result may be in it already.    dict -> Work"""
    return MAKERS[args.what](**{k: v for k, v in case.items() if k not in ("times", "memory")}, device=args.device)


# -----------------------------------------------------------------------------
# How it is measured


def seconds(function, device):
    """Wall time of one call, the device's work included."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def take_turns(works, args, passes):
    """Time works round-robin.    {name: Work} -> {name: {"first": s, pass: [s, ...]}}, without those out of memory

    passes: of "forward" (without autograd) and "both" (forward and backward).
    """
    calls = {name: {"forward": torch.no_grad()(w.forward), "both": lambda w=w: w.backward(w.forward())}
             for name, w in works.items()}  # fmt: skip
    times = {}
    for name in works:
        with contextlib.suppress(torch.OutOfMemoryError):
            times[name] = {"first": seconds(calls[name]["both"], args.device)} | {p: [] for p in passes}
            if "forward" in passes:
                calls[name]["forward"]()
    for turn in range(args.repeats):
        for name in list(times)[:: -1 if turn % 2 else 1]:
            if turn < 2 or sum(sum(times[name][p]) for p in passes) < PATIENCE:
                for p in passes:
                    times[name][p].append(seconds(calls[name][p], args.device))
    return times


def status(key):
    """A line of /proc/self/status.    -> bytes"""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


def memory(work, device):
    """-> bytes {"forward": peak without autograd, "both": peak with it, "kept": between forward and backward}"""
    clear_refs, cuda = Path("/proc/self/clear_refs"), torch.cuda
    if torch.device(device).type == "cuda":
        reset, now, peak = cuda.reset_peak_memory_stats, cuda.memory_allocated, cuda.max_memory_allocated
    elif os.access(clear_refs, os.W_OK):
        reset, now, peak = partial(clear_refs.write_text, "5"), partial(status, "VmRSS"), partial(status, "VmHWM")
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work.backward(work.forward())
        return {"both": unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) + work.held}
    found = {}

    def both(before):
        output = work.forward()
        found["kept"] = now() - before
        work.backward(output)

    both(0)
    for name, call in (("forward", torch.no_grad()(lambda before: work.forward())), ("both", both)):
        gc.collect()
        reset()
        before = now()
        call(before)
        found[name] = peak() - before + work.held
    return found


def memory_of(case, args):
    """`memory` of one case: here on CUDA, else in a process of its own. {} if there is too little."""
    if args.device.startswith("cuda"):
        with contextlib.suppress(torch.OutOfMemoryError):
            return memory(make_work(case, args), args.device)
        return {}
    command = [sys.executable, __file__, args.what, "--device", args.device, "--one-case", json.dumps(case)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "16384"}
    done = subprocess.run(command + ["--threads", str(torch.get_num_threads())], env=environment, capture_output=True)
    if done.returncode:
        print(f"left out, {case}: exit {done.returncode}, {done.stderr.decode()[-300:]}", file=sys.stderr)
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def measure(cases, args, passes=("both",), with_memory=True):
    """Memory and time of cases that take turns.    list of dict -> list of dict, "times" and "memory" added"""
    print(f"{args.what}: {len(cases)} x {cases[0]}", file=sys.stderr)
    if with_memory and not args.no_memory:
        cases = [case | {"memory": found} for case in cases if (found := memory_of(case, args))]
    works = {i: make_work(case, args) for i, case in enumerate(cases)}
    times = take_turns(works, args, passes)
    del works
    scan_inputs.cache_clear()
    return [{"memory": {}} | case | {"times": times[i]} for i, case in enumerate(cases) if i in times]


# -----------------------------------------------------------------------------
# How it is shown


def number(x):
    """Three digits, at most three of them decimals, never an exponent."""
    return f"{x:.{min(3, max(0, 2 - math.floor(math.log10(abs(x) or 1))))}f}"


def spread(values, unit=1.0):
    """median (min-max)"""
    return "{} ({}-{})".format(*(number(f(values) / unit) for f in (statistics.median, min, max)))


def ratio(record, other, key="both"):
    """The median of time over time, turn by turn."""
    return statistics.median(a / b for a, b in zip(record["times"][key], other["times"][key]))


def table(header, rows, left=1):
    """An aligned Markdown table, its first `left` columns text, the others numbers."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    pad = lambda row: [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    print("\n".join("| " + " | ".join(row) + " |" for row in (pad(header), rule, *map(pad, rows))) + "\n", flush=True)


def machine(args):
    """What the numbers depend on.    -> dict"""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    facts = {"cpu": (names or [platform.processor() or platform.machine()])[0], "cores": os.cpu_count(),
             "threads": torch.get_num_threads(), "torch": torch.__version__, "device": args.device,
             "load": round(os.getloadavg()[0], 1), "system": f"{platform.system()} {platform.release()}",
             "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")} or "plain"}  # fmt: skip
    if args.device.startswith("cuda") and args.what != "memory":
        facts["device"] = f"{torch.cuda.get_device_name(args.device)}, CUDA {torch.version.cuda}"
    return facts | {p: installed(p) for p in ("mambapy", "mamba_ssm") if args.peers and installed(p)}


# -----------------------------------------------------------------------------
# The benchmarks


def bench_scan(args):
    """Scans of several shapes; then growth with the number of frames, and what strong decay costs."""
    peers, own = scans(args.device)
    names = [*own, *(peers if args.peers else ())]
    shapes = SHAPES + (SHAPES_GPU if args.device.startswith("cuda") else [])
    shapes = [(max(1, b // 16), min(l, 64), d, n) for b, l, d, n in SHAPES] if args.quick else shapes
    references = [name for name in names if name in peers] or ["definition"]
    records, rows = [], []
    for shape in shapes:
        cases = [{"variant": name, "shape": shape, "dtype": args.dtype} for name in names]
        found = measure(cases, args, BOTH)
        elements = math.prod(shape)
        for record in found:
            others = {r["variant"]: {p: ratio(record, r, p) for p in BOTH}
                      for r in found if r["variant"] in references}  # fmt: skip
            record["ratios"] = others
            in_e = lambda key: number(record["memory"][key] / (4 * elements)) if key in record["memory"] else "-"
            rows.append([
                str(shape), record["variant"], *(spread(record["times"][p], elements / 1e9) for p in BOTH),
                *map(in_e, ("forward", "both", "kept")), number(record["times"]["first"]),
                *(number(others[name]["both"]) if name in others else "-" for name in references),
            ])  # fmt: skip
        records += found
    print(f"Selective scan, {args.dtype}: ns per element, peak memory in units of E, ratios of forward + backward\n")
    table(["(b, l, d, n)", "scan", "forward", "forward + backward", "peak forward", "peak fwd + bwd", "kept",
           "first call (s)", *(f"of {name}" for name in references)], rows, left=2)  # fmt: skip
    return records + bench_scan_robustness(args, [name for name in own if name != "definition"])


def bench_scan_robustness(args, names):
    """The same number of elements as few or many frames, and with weak or strong decay."""
    short, long = [(64, 16, 64, 16), (4, 256, 64, 16)] if args.quick else [(1024, 16, 128, 16), (16, 1024, 128, 16)]
    records, rows = [], []
    for name in names:
        common = {"variant": name, "dtype": args.dtype}
        cases = [{"shape": short}, {"shape": long}, {"shape": long, "strong": True}]
        found = measure([common | case for case in cases], args, BOTH, with_memory=False)
        for p, title in zip(BOTH, ("forward", "forward + backward")):
            cells = [spread(r["times"][p], math.prod(short) / 1e9) for r in found]
            ratios = [number(ratio(*pair, p)) for pair in (found[1::-1], found[:0:-1])]
            rows.append([name, title, *cells, *ratios])
        records += found
    print(f"{short} against {long}, and dt in 0..10 instead of 0.001..0.1: ns per element\n")
    frames = [f"{shape[1]} frames" for shape in (short, long)]
    table(["scan", "pass", *frames, "strong decay", "growth", "slowdown"], rows, left=2)
    return records


def bench_s4d(args):
    """The convolutions of a bidirectional S4D layer."""
    sizes = {"rows": 1024, "d": 8, "n": 8} if args.quick else {"rows": 65536, "d": 64, "n": 64}
    print("S4D both ways, width {d}, state size {n}, {rows} frames in all, float32, forward + backward".format(**sizes))
    return by_frames(args, ["two FFTs between flips", "ours"], [16, 64] if args.quick else [16, 64, 256, 1024], sizes)


def bench_layers(args):
    """Every temporal layer alone."""
    sizes = {"pixels": 4, "d": 32} if args.quick else {"pixels": 32, "d": 64}
    print("One temporal layer, {pixels} pixels, width {d}, 8 heads, float32, forward + backward".format(**sizes))
    return by_frames(args, args.names or LAYERS, [16, 64] if args.quick else [16, 64, 256, 1024], sizes)


def bench_unet(args):
    """Training steps with Adam. The peak is what a run needs: weights, gradients and Adam's averages count."""
    names = args.names or ["attention-explicit", "attention", "linear-attention", "bi-s4d", "bi-mamba"]
    names = [name + option for name in names for option in ("", *(f" + {o}" for o in args.options))]
    names = [*OFFICIAL, *names] if args.official else names
    sizes = {"size": 8 if args.quick else 32}
    print("UNet3D, dim 32, 4 heads, {size}x{size} pixels, batch 1, a training step".format(**sizes))
    return by_frames(args, names, [4, 8] if args.quick else [16, 64, 256], sizes | {"clone": args.official})


def bench_dim(args):
    """A clip as one sequence, to 65,536 tokens."""
    sizes = {"size": 8, "d": 32, "heads": 2} if args.quick else {"size": 32, "d": 384, "heads": 6}
    tokens = (sizes["size"] // 2) ** 2
    print("One block, width {d}, frames of {size}x{size} pixels, patch 2, ".format(**sizes), end="")
    print(f"{tokens} tokens a frame, batch 1, float32, forward + backward")
    return by_frames(args, ["transformer", "DiM"], [4, 16] if args.quick else [4, 16, 64, 256], sizes)


def by_frames(args, names, frames, sizes):
    """Variants in rows, numbers of frames in columns. Ratios are to the first of `names`."""
    groups, frames = {}, args.frames or frames
    for f in frames:
        found = measure([{"variant": name, "frames": f, **sizes} for name in names], args)
        first = next((record for record in found if record["variant"] == names[0]), None)  # it may be out of memory
        for record in found:
            record["ratio"] = ratio(record, first) if first else None
        groups[f] = {record["variant"]: record for record in found}

    def show(title, columns):
        cell = lambda record, column: "-" if record is None else column(record)
        rows = [[name, *(cell(groups[f].get(name), c) for f in frames for c in columns.values())] for name in names]
        print(f"{title}\n")
        table([args.what, *(f"{f} frames, {key}" for f in frames for key in columns)], rows)

    mib = lambda key: lambda record: number(record["memory"][key] / 2**20) if key in record["memory"] else "-"
    show(f"Time, and its ratio to {names[0]}", {
        "ms": lambda record: spread(record["times"]["both"], 1e-3),
        "ratio": lambda record: number(record["ratio"]) if record["ratio"] else "-",
    })  # fmt: skip
    show("Memory: the peak, and what is kept for backward", {"peak MiB": mib("both"), "kept MiB": mib("kept")})
    return [record for group in groups.values() for record in group.values()]


def rates(args, works, count, unit):
    """How much of `count` per second; ratios are of rates, to the last of `works`."""
    times, records, rows = take_turns(works, args, ("both",)), [], []
    for name in works:
        record, last = {"variant": name, "times": times[name], "count": count}, {"times": times[list(works)[-1]]}
        records.append(record | {"ratio": ratio(last, record)})
        rows.append([name, spread([count / s for s in times[name]["both"]]), number(records[-1]["ratio"])])
    table([args.what, unit, f"ratio to {name}"], rows)
    return records


def bench_data(args):
    """Passes over some batches of train.py's data, loader included (and the start of its processes, if any)."""
    import train

    size, frames, batch, count = (16, 8, 4, 3) if args.quick else (32, 16, 8, 20)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        videos = Path(folder, "videos")
        videos.mkdir()
        for i in range(4 if args.quick else 32):
            np.save(videos / f"{i}.npy", random.integers(0, 256, (4 * frames, 2 * size, 3 * size, 3), dtype=np.uint8))

        def loop(source):
            argv = ["--data", source, "--out", f"{folder}/run", "--size", str(size), "--frames", str(frames)]
            data = train.make_data(train.complete(train.training_parser().parse_args(argv)))
            loader = DataLoader(data, batch, sampler=range(batch * count), num_workers=args.workers)
            return Work(lambda: sum(len(videos) for videos, _ in loader))

        works = {"cache of a folder": loop(str(videos)), "maze": loop("maze")}
        print(f"Batches of {batch} videos, {frames} frames, {size}x{size} pixels, {args.workers} workers\n")
        return rates(args, works, count, "batches/s")


def bench_fvd(args):
    """Features of clips of 64x64 pixels, against the network alone on tensors that are ready."""
    import fvd

    n, batch = (2, 1) if args.quick else (256, 32) if args.device.startswith("cuda") else (8, 4)
    net = fvd.random_i3d().to(args.device)
    clips = np.random.default_rng(0).integers(0, 256, (n, 16, 64, 64, 3), dtype=np.uint8)
    ready = torch.randn(batch, 3, 16, 224, 224, device=args.device)

    def bare():
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # as video_features runs it
            return [net(ready).double().cpu() for _ in range(n // batch)]

    features = partial(fvd.video_features, clips, net, batch=batch, device=args.device)
    print(f"Clips of 16 frames, {batch} at a time\n")
    return rates(args, {"video_features": Work(features), "bare I3D": Work(bare)}, n, "features/s")


def convolution_backward_flop(dy, x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, mask,
                              **_):  # fmt: skip
    """torch's own formula forgets the groups, and counts a depthwise convolution by the square of its channels."""
    return sum(mask[:2]) * 2 * x[0] * math.prod((x if transposed else dy)[2:]) * math.prod(weight)


def counted(temporal, dim, size, batch, frames, recompute, device, clone):
    """Bytes and floating-point operations of a training step in float32, without taking it.    -> dict"""
    rows_in, device = vdm_ssm.rows_in, torch.device(device)
    with FakeTensorMode(), patch.object(vdm_ssm, "rows_in", lambda tile, row, _: rows_in(tile, row, device)):
        model = make_unet(temporal, clone, dim, dim // 8, recompute)
        x, t = torch.randn(batch, 3, frames, size, size), torch.zeros(batch, dtype=torch.long)
        diffusion = GaussianDiffusion(model)
        if temporal in OFFICIAL:  # a mask whose numbers it asks for, and which changes nothing
            type(model).forward.__globals__["prob_mask_like"] = lambda *args, **kwargs: None
        with vdm_ssm.PeakMemory() as memory:
            loss = diffusion.losses(x, t, x).mean()
            kept = memory.now
            loss.backward()
        formulas = {torch.ops.aten.convolution_backward: convolution_backward_flop}
        with FlopCounterMode(display=False, custom_mapping=formulas) as work:  # by itself, since it holds on to tensors
            diffusion.losses(x, t, x).mean().backward()
    weights = sum(p.nbytes for p in model.parameters())
    peak = memory.peak + 4 * weights  # Adam's averages and the EMA
    return {"weights": weights, "kept": kept, "peak": peak, "flop": work.get_total_flops()}


def bench_memory(args):
    """Training steps of the papers' models. The peak holds weights, gradients, Adam's averages, EMA and activations."""
    cases = [("bi-s4d", 8, 8, 2, 4), ("bi-mamba", 8, 8, 2, 4)] if args.quick else PAPERS
    if args.official:
        names = [*OFFICIAL, *(args.names or ("attention", "linear-attention", "bi-s4d", "bi-mamba"))]
        cases = [(name, 32, 32, 1, f) for f in args.frames or (128, 256) for name in names]
    records, rows = [], []
    for case, recompute in itertools.product(cases, (False, True)):
        if recompute and case[0] in OFFICIAL:
            continue
        record = dict(zip(("temporal", "dim", "size", "batch", "frames"), case), recompute=recompute)
        records.append(record | counted(**record, device=args.device, clone=args.official))
        gib = [number(records[-1][key] / 2**30) for key in ("weights", "kept", "peak")]
        tflop = number(records[-1]["flop"] / 1e12)
        rows.append([case[0] + recompute * " + recompute", *map(str, case[1:]), *gib, tflop])
        print(*rows[-1], file=sys.stderr)
    print(f"A training step of UNet3D on {args.device}, counted. GiB, workspaces and fragmentation come on top.")
    print("TFLOP: 10^12 floating-point operations of convolutions and matrix products\n")
    table(["unet", "dim", "pixels", "batch", "frames", "weights", "kept for backward", "peak", "TFLOP"], rows)
    return records


BENCHMARKS = {"scan": bench_scan, "s4d": bench_s4d, "layers": bench_layers, "unet": bench_unet, "dim": bench_dim,
              "memory": bench_memory, "data": bench_data, "fvd": bench_fvd}  # fmt: skip


def parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="scan", choices=BENCHMARKS)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 (default cpu)")
    parser.add_argument("--threads", type=int, help="threads of a CPU (default: torch's)")
    parser.add_argument("--repeats", type=int, help="measured turns per variant (default 7, with --quick 2)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs")
    parser.add_argument("--json", metavar="FILE", help="write the machine and every single time here")
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--peers", action="store_true", help="scan: naive loops; mambapy, mamba_ssm if installed")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="scan: of u, dt, B and C")
    parser.add_argument("--names", nargs="+", choices=LAYERS, metavar="NAME", help="layers, unet, memory: which layers")
    parser.add_argument("--frames", nargs="+", type=int, metavar="F", help="layers, unet, dim, memory: their numbers")
    parser.add_argument("--with", nargs="+", default=[], dest="options", choices=("amp", "compile", "recompute"),
                        metavar="OPTION", help="unet: also with each of amp, compile, recompute")  # fmt: skip
    parser.add_argument("--official", metavar="CLONE", help="clone of the official code, for unet and memory")
    parser.add_argument("--workers", type=int, default=0, help="data: processes that load (default 0)")
    parser.add_argument("--one-case", type=json.loads, help=argparse.SUPPRESS)
    return parser


def main(args):
    args.repeats = args.repeats or (2 if args.quick else 7)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device.startswith("cuda") and args.what != "memory":
        torch.cuda.set_device(args.device)  # whose memory is watched
    if args.one_case:
        return print(json.dumps(memory(make_work(args.one_case, args), args.device)))
    facts = machine(args)
    print(", ".join(f"{key} {value}" for key, value in facts.items()) + "\n", flush=True)
    records = BENCHMARKS[args.what](args)
    if args.json:
        Path(args.json).write_text(json.dumps({"benchmark": args.what, "machine": facts, "records": records}, indent=1))


if __name__ == "__main__":
    main(parser().parse_args())
