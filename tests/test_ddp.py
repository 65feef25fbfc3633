"""Several processes train as one does, end together, and lose nothing. On a CPU, started by torchrun."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

import train

ROOT = pathlib.Path(__file__).parent.parent
TINY = ("--size 8 --frames 3 --dim 8 --dim-mults 1,2 --heads 1 --sample-steps 2 --sample-videos 3 --eta 1 --device cpu "
        "--temporal s6-glu").split()  # fmt: skip
KEEPS_WEIGHTS = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train

class Kept(train.AveragedModel):
    def __init__(self, model, **options):
        super().__init__(model, **options)
        everything.append((model, self))

everything, train.AveragedModel = [], Kept
train.main(sys.argv[1:])
model, average = everything[0]
torch.save([model.state_dict(), average.state_dict()], f"rank-{{os.environ['RANK']}}.pt")
"""


@pytest.fixture(autouse=True)
def quiet_signals_and_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)


def torchrun(*argv, script=ROOT / "train.py"):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, script, *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([str(a) for a in command], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def log(run):
    return [json.loads(line) for line in (pathlib.Path(run) / "log.jsonl").read_text().splitlines()]


def moments(run):
    """Adam's average of the gradient. (Weights whose gradient is 0 but for rounding would go either way.)"""
    state = train.load_checkpoint(run)["optimizer"]["state"]
    return torch.cat([s["exp_avg"].flatten() for s in state.values()])


def close(a, b):
    return (a - b).norm() <= 1e-4 * b.norm()


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.02)


def test_two_processes_with_batch_two_are_one_with_batch_four(tmp_path):
    (tmp_path / "script.py").write_text(KEEPS_WEIGHTS)
    process = torchrun(*TINY, "--batch", 2, "--grad-accum", 2, "--steps", 4, "--sample-every", 2, "--out", "two",
                       script="script.py")  # fmt: skip
    train.main([*TINY, "--batch", "4", "--grad-accum", "2", "--steps", "4", "--sample-every", "2", "--out", "one"])
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert output.count("wrote two") == 1  # rank 0 alone speaks

    (model_0, ema_0), (model_1, ema_1) = (torch.load(f"rank-{i}.pt", weights_only=True) for i in (0, 1))
    assert all(torch.equal(a[k], b[k]) for a, b in ((model_0, model_1), (ema_0, ema_1)) for k in a)
    assert close(moments("two"), moments("one"))
    assert [line["step"] for line in log("two")] == [1, 2, 3, 4]
    for a, b in zip(log("one"), log("two")):
        for key in ("loss", "grad_norm"):
            assert abs(a[key] - b[key]) < 1e-5 * a[key]
        assert [v is None for v in a["loss_by_noise"]] == [v is None for v in b["loss_by_noise"]]
    samples = [train.iio.imread(f"{run}/samples/step-000004.png").astype(int) for run in ("one", "two")]
    assert abs(samples[0] - samples[1]).max() <= 1  # three samples on two ranks, to a rounding

    # The same run goes on with one process, if the videos of a step stay.
    with pytest.raises(train.BadInput, match="takes 8 videos a step"):
        train.main(["--resume", "two/checkpoint-000002.pt"])
    train.main(["--resume", "two/checkpoint-000002.pt", "--batch", "4"])
    assert close(moments("two"), moments("one")) and len(log("two")) == 4


def test_a_signal_stops_all_processes_after_the_same_step_and_a_dead_one_ends_the_run(tmp_path):
    run = tmp_path / "run"
    endless = [*TINY, "--batch", 1, "--steps", 10**9, "--save-every", 3, "--sample-every", 10**6, "--workers", 1]
    process = torchrun(*endless, "--out", run)
    wait_for(lambda: train.checkpoints(run), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert "go on with: torchrun --nproc_per_node 2 train.py --resume" in output
    stopped = train.load_checkpoint(run)["step"]
    assert [line["step"] for line in log(run)] == list(range(1, stopped + 1))

    process = torchrun("--resume", run)
    wait_for(lambda: train.load_checkpoint(run)["step"] > stopped, process)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode != 0
    assert "train.py: another process of this run has ended" in errors and "[rank" not in errors  # torch's tracebacks
    step = train.load_checkpoint(run)["step"]
    train.main(["--resume", str(run), "--batch", "2", "--steps", str(step + 2)])
    assert [line["step"] for line in log(run)] == list(range(1, step + 3))


def test_a_share_covers_every_item_once_whatever_the_number_of_processes():
    def rank_of(size, rank):
        ranks = train.Ranks.__new__(train.Ranks)
        ranks.size, ranks.rank = size, rank
        return ranks

    for size in (1, 2, 3, 8):
        for count in (1, 2, 5, 8):
            shares = []
            for rank in range(size):
                ranks = rank_of(size, rank)
                ranks.gather = lambda x: shares.append(x) or x[None]
                ranks.share(count, lambda items: torch.tensor(items))
            assert torch.stack(shares).flatten()[:count].tolist() == list(range(count))


def test_a_stopped_run_on_several_machines_says_how_all_of_them_go_on(capsys):
    ranks = SimpleNamespace(size=16, here=8)
    train.Run.conclude(SimpleNamespace(ranks=ranks, step=3, out="run", bar=tqdm(disable=True), args=SimpleNamespace(steps=9)))
    command = "torchrun --nnodes 2 --rdzv_backend c10d --rdzv_endpoint HOST:29500 --nproc_per_node 8 train.py --resume run"
    assert capsys.readouterr().out == f"stopped after step 3; go on with: {command}\n"


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "0"}, {"RANK": "abc"}, {"LOCAL_RANK": ""}])
def test_variables_that_are_not_torchruns_are_told(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(train.BadInput, match="not by torchrun"):
        train.Ranks("cpu")


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_a_single_device_cannot_be_shared(monkeypatch, device):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(train.BadInput, match="give cuda or cpu"):
        train.Ranks(device)
