import json

import bench
import pytest
import torch


@pytest.mark.parametrize("command", [
    "data --frames 2 --size 16 --batch 2",
    "unet --variants attention-explicit bi-mamba+recompute+amp --frames 2 --size 8 --dim 8 --heads 1",
])  # fmt: skip
def test_a_command_writes_as_many_times_as_it_was_told_to_take(command, tmp_path):
    bench.main([*command.split(), "--repeats", "2", "--json", str(tmp_path / "times.json")])
    (result,) = json.loads((tmp_path / "times.json").read_text())["results"]
    assert {len(record["seconds"]) for record in result["records"].values()} == {2}


def test_memory_counted_without_data_is_that_of_a_real_step():
    real, fake = (bench.step_bytes("bi-mamba", 2, size=8, dim=8, heads=1, fake=f) for f in (False, True))
    assert fake == pytest.approx(real, rel=0.02)


def test_peak_memory_counts_what_is_new_while_it_is_alive():
    old = torch.ones(1000)
    with bench.PeakMemory() as memory:
        x = old.view(10, 100) * 2  # the view is no memory, the product 4000 bytes
        y = (x + 1).T
        del x
    assert (memory.peak, memory.now, y.numel()) == (8000, 4000, 1000)
