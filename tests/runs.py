"""What the tests of train.py share: small videos, and small runs, in this process or as programs."""

import gc
import json
import multiprocessing
import os
import pathlib
import re
import runpy
import sys
import time
import unittest.mock

import numpy as np
import pytest

import train

ROOT = pathlib.Path(__file__).parent.parent
SMALL = "--size 8 --frames 3 --batch 2 --sample-steps 2 --videos 2 --no-frame-noise"
COMMON = [*SMALL.split(), "--no-amp", "--device", "cpu"]  # the defaults of a GPU would be others
UNET = [*COMMON, *"--dim 8 --dim-mults 1,2 --heads 1 --temporal s6-glu".split()]
DIM = [*COMMON, *"--backbone dim --patch 4 --width 16 --depth 1".split()]
SERVER = multiprocessing.get_context("forkserver")  # whose programs need not import torch, for seconds
SERVER.set_forkserver_preload(["torch._dynamo", "torch.optim.swa_utils", "imageio.v3", "tqdm"])


@pytest.fixture(autouse=True)
def own_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    for process in multiprocessing.active_children():
        process.kill()


def write_videos(folder, count=3, frames=6, size=(12, 10)):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        np.save(folder / f"{i}.npy", rng.integers(0, 256, (frames, *size, 3), dtype=np.uint8))
    return folder


def run(*argv):
    """A command in this process, whose signals it leaves alone."""
    with unittest.mock.patch("signal.signal"):
        command = train.sample if argv[0] == "sample" else train.train
        command(*train.parse([str(arg) for arg in argv]))


def again(*argv):
    """A command that takes its arguments from a run."""
    run(*argv, "--device", "cpu")


def refuses(*argv):
    """What a command that must fail says, in one sentence."""
    with pytest.raises((ValueError, OSError)) as error:
        again(*argv)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


def program(argv, variables, pipe):
    gc.freeze()
    multiprocessing.set_start_method("fork", force=True)  # of its loaders, as in a program of one's own
    os.setsid()  # a process group, too
    os.environ |= variables
    output = os.open(f"output{variables.get('RANK', '')}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.argv = ["train.py", *argv]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def start(*argv, **variables):
    """A command as a program, whose output goes to a file. Its pipe ends when its last process does."""
    reader, writer = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=program, args=([str(arg) for arg in argv], variables, writer))
    process.start()
    process.pipe = reader
    writer.close()
    return process


def wait_for(condition, process):
    while not condition():
        assert process.is_alive(), told()
        time.sleep(0.005)


def ends(process, timeout=60):
    """The exit code of a program that must end by itself."""
    process.join(timeout)
    return process.exitcode


def lines(path):
    """Whole lines of a file, none if there is no file."""
    return re.findall(".*\n", open(path).read()) if os.path.exists(path) else []


def told(rank=""):
    """What a program has printed."""
    return lines(f"output{rank}")


def log(out, key="loss"):
    return [json.loads(line)[key] for line in lines(f"{out}/log.jsonl")]


def steps_of(out):
    """Steps of the checkpoints that a run holds."""
    return sorted(int(path.stem[-6:]) for path in pathlib.Path(out).glob("*.pt"))
