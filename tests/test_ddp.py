"""Several processes train and draw as one does, end together, and lose nothing. On a CPU."""

import os
import re
import signal
import socket

import numpy as np
import torch
from runs import UNET, again, ends, log, refuses, run, start
from runs import own_place, steps_of, told, wait_for  # noqa: F401


def start_two(*argv):
    """Two programs with the environment variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    return [start(*argv, RANK=rank, LOCAL_RANK=rank, **place) for rank in "01"]


def close(a, b):
    """Adam's averages of the gradients are. (Weights whose gradient is 0 but for rounding go either way.)"""
    states = (torch.load(f"{out}/checkpoint-000004.pt")["optimizer"]["state"].values() for out in (a, b))
    a, b = (torch.cat([moments["exp_avg"].flatten() for moments in state]) for state in states)
    return (a - b).norm() <= 1e-4 * b.norm() and log("two", "step") == [1, 2, 3, 4]


def test_two_processes_with_batch_two_are_one_with_batch_four_and_draw_what_it_draws():
    common = [*UNET, *"--class-cond --guidance 3 --videos 3 --sampler ddpm --grad-accum 2 --steps 4".split(),
              "--sample-every", 2, "--save-every", 2]  # fmt: skip
    ranks = start_two(*common, "--out", "two")
    run(*common, "--batch", 4, "--out", "one")
    assert [ends(rank) for rank in ranks] == [0, 0], told(0)
    assert str(told(0)).count("writes") == 1 and "writes" not in str(told(1))  # rank 0 alone speaks
    assert close("two", "one")
    for key in ("loss", "grad_norm"):
        assert np.allclose(log("two", key), log("one", key), rtol=1e-4)
    for k in (1, 2):  # 5 samples by 4 and by 2 at once
        again("sample", "one", "--videos", 5, "--batch", 2 * k, "--out", f"by-{k}")
    files = (f"{out}/samples/step-000004.npz" for out in ("one", "two")), ("by-1/fake.npz", "by-2/fake.npz")
    for one, two in ([np.load(file)["videos"].astype(int) for file in pair] for pair in files):
        assert one.shape == two.shape and abs(one - two).max() <= 1  # to a rounding

    # The same run goes on with one process, if the videos of a step stay.
    assert "was 8" in refuses("--resume", "two/checkpoint-000002.pt")
    again("--resume", "two/checkpoint-000002.pt", "--batch", 4)
    assert close("two", "one")


def test_a_signal_to_one_process_stops_all_after_the_same_step_and_a_dead_one_ends_the_run():
    endless = ["--batch", 1, "--steps", 10**9, "--save-every", 3, "--sample-every", 10**6, "--workers", 1]
    ranks = start_two(*UNET, *endless, "--out", "run")
    wait_for(lambda: steps_of("run"), ranks[0])
    os.kill(ranks[1].pid, signal.SIGTERM)
    assert [ends(rank) for rank in ranks] == [0, 0], told(0)
    stopped = int(re.search(r"stopped after step (\d+)", str(told(0)))[1])
    assert steps_of("run")[-1] == stopped and log("run", "step") == [*range(1, stopped + 1)]

    ranks = start_two("--resume", "run", "--device", "cpu")
    wait_for(lambda: steps_of("run")[-1] > stopped, ranks[0])
    ranks[1].kill()
    assert ends(ranks[0]) not in (None, 0)
    step = steps_of("run")[-1]
    again("--resume", "run", "--batch", 2, "--steps", step + 2)
    assert log("run", "step") == [*range(1, step + 3)]
