"""Several processes train as one does, end together, and lose nothing. On a CPU, started by torchrun."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import train

ROOT = pathlib.Path(__file__).parent.parent
COMMON = "--size 8 --frames 3 --sample-steps 2 --videos 3 --eta 1 --device cpu".split()
UNET = "--dim 8 --dim-mults 1,2 --heads 1 --temporal s6-glu".split()
DIM = "--backbone dim --patch 4 --width 16 --depth 1 --class-cond --guidance 3".split()


@pytest.fixture(autouse=True)
def quiet_signals_and_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)


def torchrun(*argv):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, ROOT / "train.py", *argv]
    return subprocess.Popen([*map(str, command)], env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def run(*argv):
    train.main([*map(str, argv)])


def log(out, key):
    return [json.loads(line)[key] for line in pathlib.Path(out, "log.jsonl").read_text().splitlines()]


def moments(path):
    """Adam's average of the gradient. (Weights whose gradient is 0 but for rounding would go either way.)"""
    state = torch.load(path, weights_only=True)["optimizer"]["state"]
    return torch.cat([s["exp_avg"].flatten() for s in state.values()])


def close(a, b, name="checkpoint-000004.pt"):
    a, b = moments(f"{a}/{name}"), moments(f"{b}/{name}")
    return (a - b).norm() <= 1e-4 * b.norm()


def steps_of(out):
    """Steps of the checkpoints that a run holds."""
    return sorted(int(path.stem[-6:]) for path in pathlib.Path(out).glob("*.pt"))


def children(process):
    """The ranks that torchrun has started."""
    return [*map(int, pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())]


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.02)


@pytest.mark.parametrize("network", [UNET, DIM], ids=["unet", "dim with classes"])
def test_two_processes_with_batch_two_are_one_with_batch_four(network):
    common = [*COMMON, *network, "--grad-accum", 2, "--steps", 4, "--sample-every", 2, "--save-every", 2]
    process = torchrun(*common, "--batch", 2, "--out", "two")
    run(*common, "--batch", 4, "--out", "one")
    output, errors = process.communicate()
    assert process.returncode == 0 and output.count("writes") == 1, errors  # rank 0 alone speaks
    assert close("two", "one") and log("two", "step") == [1, 2, 3, 4]
    for key in ("loss", "grad_norm"):
        assert np.allclose(log("two", key), log("one", key), rtol=1e-4)
    sheets = [iio.imread(f"{out}/samples/step-000004.png").astype(int) for out in ("one", "two")]
    assert abs(sheets[0] - sheets[1]).max() <= 1  # three samples on two ranks, to a rounding

    # The same run goes on with one process, if the videos of a step stay.
    with pytest.raises(ValueError, match="was 8"):
        run("--resume", "two/checkpoint-000002.pt", "--device", "cpu")
    run("--resume", "two/checkpoint-000002.pt", "--batch", 4, "--device", "cpu")
    assert close("two", "one") and log("two", "step") == [1, 2, 3, 4]


def test_a_signal_to_one_process_stops_all_after_the_same_step_and_a_dead_one_ends_the_run(tmp_path):
    process = torchrun(*COMMON, *UNET, "--batch", 1, "--steps", 10**9, "--save-every", 3, "--sample-every", 10**6,
                       "--workers", 1, "--out", "run")  # fmt: skip
    wait_for(lambda: steps_of("run"), process)
    os.kill(children(process)[-1], signal.SIGTERM)
    output, errors = process.communicate(timeout=100)
    stopped = int(re.search(r"stopped after step (\d+)", output)[1])
    assert steps_of("run")[-1] == stopped and log("run", "step") == [*range(1, stopped + 1)]

    process = torchrun("--resume", "run", "--device", "cpu")
    wait_for(lambda: steps_of("run")[-1] > stopped, process)
    os.kill(children(process)[-1], signal.SIGKILL)
    process.communicate(timeout=100)
    assert process.returncode != 0
    step = steps_of("run")[-1]
    run("--resume", "run", "--batch", 2, "--steps", step + 2, "--device", "cpu")
    assert log("run", "step") == [*range(1, step + 3)]


def test_several_processes_draw_the_samples_that_one_draws():
    run(*COMMON, *UNET, "--steps", 1, "--out", "run")
    process = torchrun("sample", "run", "--videos", 5, "--out", "two", "--device", "cpu")
    run("sample", "run", "--videos", 5, "--out", "one", "--device", "cpu")
    assert process.wait() == 0, process.communicate()[1]
    one, two = (np.load(f"{out}/fake.npz")["videos"].astype(int) for out in ("one", "two"))
    assert one.shape == two.shape and abs(one - two).max() <= 1


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_a_single_device_cannot_be_shared(monkeypatch, device):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="give cuda or cpu"):
        run("--device", device)
