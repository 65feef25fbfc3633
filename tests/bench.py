"""Time and memory, beside other ways to do the same.

    python tests/bench.py scan --peers             the scan beside mambapy and mamba_ssm
    python tests/bench.py unet --official CLONE    training steps, beside a clone of the official code
    python tests/bench.py unet --device cuda --variants attention-explicit bi-mamba bi-mamba+amp+compile
    python tests/bench.py unet --fake --frames 256 --batch 8     memory alone, of steps that need not fit
    python tests/bench.py data --sources maze FOLDER             batches of videos

Time: forward + backward, in `unet` with Adam's step. After a first call the rows of a table take turns, so
that a busy moment hits them all. "ratio" is the median of the ratios to the first row's time, turn by turn.
Memory: "peak" is the most bytes alive in a call, above inputs; in `unet` with weights and Adam's averages.
CUDA's allocator knows it. On a CPU it is counted from the storages of tensors: the same on every machine,
without workspaces inside operators and compiled code ("-"). E is one float32 tensor (b, l, d, n).
"attention-explicit" is torch's MATH kernel, which holds l x l scores as the papers' baseline does. A CPU
takes it for "attention" too, whose bias is learned.
"""

import argparse
import json
import sys
import tempfile
import time
import weakref
from contextlib import nullcontext
from inspect import signature
from pathlib import Path
from statistics import median
from unittest.mock import MagicMock, patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import vdm_ssm


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


def peak_bytes(call, device="cpu"):
    """The most bytes alive in a call, above those alive before it, and those in `call.held`."""
    if device == "cpu":
        with PeakMemory() as memory:
            call()
        return memory.peak + getattr(call, "held", 0)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before + getattr(call, "held", 0)


def time_in_turns(calls, repeats=5, device="cpu"):
    """Measure the rows of a table.    {name: call} -> {name: {"first", "seconds", "ratio", "peak"}}

    Every second turn goes from the last row to the first. A row that cannot run is left out."""
    torch.compiler.reset()  # else a second shape is compiled for all shapes
    wait, times = torch.get_device_module(torch.device(device)).synchronize, {name: [] for name in calls}
    for turn in range(1 + repeats):  # turn 0 are the first calls
        for name in list(times)[:: -1 if turn % 2 else 1]:
            try:
                wait()
                start = time.perf_counter()
                calls[name]()
                wait()
                times[name].append(time.perf_counter() - start)
            except (torch.OutOfMemoryError, ImportError) as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                del times[name]
    records, (_, *base) = {}, next(iter(times.values()))
    for name, (first, *seconds) in times.items():
        ratio = median(a / b for a, b in zip(seconds, base))
        records[name] = record = {"first": first, "seconds": seconds, "ratio": ratio}
        if device != "cpu" or "compile" not in name:  # whose memory a CPU does not show
            record["peak"] = peak_bytes(calls[name], device)
    return records


def show(title, records, unit="ms", second=1e3, size="MiB", whole=2**20):
    """Print a table with median (min-max) of times.    second: in `unit`; whole: bytes of one `size`"""
    number = lambda x: f"{x:.{3 if x < 1 else 2 if x < 10 else 1 if x < 100 else 0}f}"
    spread = lambda xs: "{} ({}-{})".format(*(number(second * f(xs)) for f in (median, min, max)))
    cells = {"seconds": spread, "ratio": number, "first": number, "peak": lambda x: number(x / whole)}
    print(f"\n| {title} | {unit} | ratio | first call, s | peak, {size} |\n|---|---:|---:|---:|---:|")
    for name, record in records.items():
        row = [cell(record[key]) if key in record else "-" for key, cell in cells.items()]
        print("|", " | ".join([name, *row]), "|", flush=True)


def mambapy_scan(u, dt, A, B, C, D):
    from mambapy.pscan import pscan
    states = pscan(torch.exp(dt[..., None] * A), (dt * u)[..., None] * B[:, :, None].to(A.dtype))
    return (states @ C[..., None].to(states.dtype)).squeeze(-1) + D * u


def mamba_ssm_scan(*inputs):  # in its own layout: u, dt (b, d, l), A, B, C (b, n, l), D
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    return selective_scan_fn(*inputs)


PEERS = {"mambapy": mambapy_scan, "mamba_ssm": mamba_ssm_scan}
OURS = {"ours": vdm_ssm.selective_scan, "ours, compiled": torch.compile(vdm_ssm.selective_scan),
        "ours, dt to 10": vdm_ssm.selective_scan, "definition": vdm_ssm.selective_scan_loop}  # fmt: skip
SHAPES = "256x16x128x16", "256x64x128x16", "64x256x128x16", "64x64x512x16", "16x1024x128x16"


def bench_scan(shapes=SHAPES, dtype="float32", peers=False, repeats=5, device="cpu"):
    for b, l, d, n in (map(int, shape.split("x")) for shape in shapes):
        calls, size = {}, b * l * d * n
        for name, scan in (PEERS | OURS if peers else OURS).items():
            torch.manual_seed(0)
            with torch.device(device):
                (u, dy), (B, C) = torch.randn(2, b, l, d), torch.randn(2, b, l, n)
                longest = 10 if "dt to 10" in name else 0.1  # dt is log-uniform from 0.001; Mamba's is to 0.1
                dt = 1e-3 * (1e3 * longest) ** torch.rand(b, l, d)
                A, D = -torch.arange(1.0, n + 1).repeat(d, 1), torch.ones(d)
            series = [x.to(getattr(torch, dtype)) for x in (u, dt, B, C, dy)]
            u, dt, B, C, dy = [x.mT.contiguous() for x in series] if name == "mamba_ssm" else series
            inputs = [x.requires_grad_() for x in (u, dt, A, B, C, D)]
            calls[name] = lambda f=scan, xs=inputs, dy=dy: torch.autograd.grad(f(*xs), xs, dy)
        units = "ns per element", 1e9 / size, "E", 4 * size
        yield f"(b, l, d, n) = {[b, l, d, n]}", time_in_turns(calls, repeats, device), *units


VARIANTS = "attention-explicit", "attention", "bi-s4d", "bi-mamba", "bi-mamba+recompute"
OFFICIAL = {"official-attention": "attn", "official-linear-attention": "l-attn"}  # our names, and that code's


def official_unet(clone, name, dim, heads):
    """The network of the official code; it wants einops-exts and rotary-embedding-torch."""
    code = "video_diffusion_pytorch"
    absent = "wandb", "torchvision", "torchvision.datasets", f"{code}.text", f"{code}.long_video_datasets"
    stubs = patch.dict(sys.modules, {module: MagicMock() for module in absent})  # its training loop's
    with stubs, patch.object(sys, "path", [clone, *sys.path]):
        from video_diffusion_pytorch.wip_video_diffusion_pytorch import Unet3D
    return Unet3D(dim, attn_heads=heads, temporal_arch=OFFICIAL[name])


def training_step(variant, frames, size=32, batch=1, dim=32, heads=4, device="cpu", official=""):
    """A training step of a U-Net, as a call; its `held` are the bytes of weights and Adam's averages.
    variant: a temporal layer, "attention-explicit", or one of OFFICIAL of the clone `official`; then options:
    "bi-mamba+amp+compile+recompute"."""
    name, *options = variant.split("+")
    assert {*options} <= {"amp", "compile", "recompute"}, f"{variant}: options are +amp +compile +recompute"
    torch.manual_seed(0)
    with torch.device(device):
        model = official_unet(official, name, dim, heads) if name in OFFICIAL else vdm_ssm.UNet3D(
            dim, heads=heads, temporal=name.removesuffix("-explicit"), recompute="recompute" in options
        )
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

    def step():
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled="amp" in options):
            loss = diffusion.loss(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step = sdpa_kernel(SDPBackend.MATH)(step) if "-explicit" in name else step
    step.held = 3 * sum(p.nbytes for p in model.parameters())
    return step


def step_bytes(variant, frames, size=32, batch=1, dim=32, heads=4, fake=False):
    """The peak of a `training_step`, counted on a CPU. fake: without data, so that it need not fit."""
    assert "compile" not in variant, f"{variant}: the memory of compiled code is seen on CUDA only"
    with FakeTensorMode() if fake else nullcontext():
        return peak_bytes(training_step(variant, frames, size, batch, dim, heads))


def bench_unet(variants=VARIANTS, frames=(16, 64), size=32, batch=1, dim=32, heads=4, official="", fake=False,
               repeats=5, device="cpu"):  # fmt: skip
    variants = [*(OFFICIAL if official else ()), *variants]
    for sizes in ((f, size, batch, dim, heads) for f in frames):
        counts = lambda: {name: {"peak": step_bytes(name, *sizes, fake=True)} for name in variants}
        calls = lambda: {name: training_step(name, *sizes, device, official) for name in variants}
        rows = counts() if fake else time_in_turns(calls(), repeats, device)
        yield f"{batch} x {sizes[0]} frames, {size}x{size} pixels", rows


def bench_data(sources=("maze",), frames=16, size=32, batch=8, repeats=5):
    import train
    with tempfile.TemporaryDirectory() as out:
        calls, options = {}, ["--frames", str(frames), "--size", str(size), "--out", f"{out}/run"]
        for source in sources:
            data = train.videos_of(train.parse([*options, "--data", source])[0])
            calls[source] = lambda data=data: [data[i] for i in range(batch)]
        yield f"{batch} x {frames} frames, {size}x{size} pixels", time_in_turns(calls, repeats)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True)
    for bench in bench_scan, bench_unet, bench_data:  # their arguments are the options
        command = commands.add_parser(bench.__name__.removeprefix("bench_"))
        command.set_defaults(bench=bench)
        command.add_argument("--json", help="file for times in seconds and peaks in bytes")
        for key, default in ((p.name, p.default) for p in signature(bench).parameters.values()):
            one, nargs = (default[0], "+") if isinstance(default, tuple) else (default, None)
            kind = {"action": "store_true"} if one is False else {"type": type(one), "nargs": nargs}
            command.add_argument(f"--{key}", default=default, help="default: %(default)s", **kind)
    options, tables = vars(parser.parse_args(argv)), []
    bench, file = options.pop("bench"), options.pop("json")
    print(about := options | {"torch": torch.__version__, "threads": torch.get_num_threads()})
    torch._dynamo.config.recompile_limit = 64  # each width has a graph of its own
    for title, records, *units in bench(**options):
        show(title, records, *units)
        tables.append({"title": title, "records": records})
    if file:
        Path(file).write_text(json.dumps(about | {"results": tables}, indent=1))


if __name__ == "__main__":
    main()
