"""Checkpoints that go on on another number of ranks, and survive kills."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from elastic_run import STEPS, made, result, run
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from rjepa_triton import _processes
from rjepa_triton.online import elastic


def begun(mesh: DeviceMesh, folder: str) -> list[str]:
    """Saves after 6 steps in both forms; what bad calls say."""
    for form in ("chunk", "step"):
        parts = made(mesh, form)
        run(parts, 0, 6)
        elastic.save(Path(folder) / form, 6, parts)
    first = mesh.get_local_rank() == 0
    chunk = Path(folder) / "chunk"
    parts["learner"].lend()
    calls = [
        lambda: elastic.save(chunk, 6, parts),
        lambda: elastic.save(chunk, 7 if first else 8, parts),
        lambda: elastic.save(chunk, 7 if first else -1, parts),
        lambda: elastic.load(chunk, made(mesh, size=11)),
        lambda: elastic.load(chunk, made(mesh), step=5),
        lambda: elastic.load(chunk, {"layer": parts["layer"]}),
        lambda: elastic.load(chunk, made(mesh, "step")),
    ]
    said = []
    for call in calls:
        try:
            call()
        except ValueError as error:
            said.append(str(error))
        else:
            said.append("nothing")
    assert elastic.load(Path(folder) / "none", parts) is None
    assert elastic.steps(chunk) == [6]
    return said


def gone_on(mesh: DeviceMesh, folder: str) -> list[list[Tensor]]:
    found = []
    for form in ("chunk", "step"):
        parts = made(mesh, form)
        assert elastic.load(Path(folder) / form, parts) == 6
        run(parts, 6, STEPS)
        found.append(result(parts))
    return found


def test_saved_on_four_ranks_resumed_on_two_and_on_one(tmp_path: Path) -> None:
    folder, want = tmp_path / "checkpoints", []
    for form in ("chunk", "step"):
        whole = made(None, form)
        run(whole, 0, STEPS)
        want.append(result(whole))
    says = [
        f"step must be later than the last checkpoint's in {folder / 'chunk'}, 6, got 6",
        "step must be the same on all 4 ranks of the checkpoint, got 7 on rank 0 and 8 on rank 1, 2, 3",
        "step must be",
        "must have the shape and dtype of parts, (11, 11) torch.float64, got (10, 10) torch.float64",
        f"step must be one of a checkpoint in {folder / 'chunk'}, [6], got 5",
        "parts must be those of",
        "state's form must be the learner's, 'step', got 'chunk'",
    ]
    for said in ranks.on_ranks(begun, 4, tmp_path / "four", str(folder)):
        for text, wanted in zip(said, says, strict=True):
            assert wanted in text, text
    alone = []
    for form in ("chunk", "step"):
        parts = made(None, form)
        assert elastic.load(folder / form, parts) == 6
        run(parts, 6, STEPS)
        alone.append(result(parts))
    for found in [*ranks.on_ranks(gone_on, 2, tmp_path / "two", str(folder)), alone]:
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


def test_a_save_that_is_killed_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """A child saves checkpoint after checkpoint, and is killed at moments that differ."""
    folder = tmp_path / "checkpoints"
    parts = made(None, "step")
    run(parts, 0, 3)
    elastic.save(folder, 1, parts)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        before = elastic.steps(folder)[-1]
        child = os.fork()
        if not child:
            try:
                for step in range(before + 1, before + 10**6):
                    with torch.no_grad():
                        parts["layer"].weight_ss.fill_(step)
                        parts["head"].weight.fill_(step)
                    elastic.save(folder, step, parts)
            finally:
                os._exit(1)
        time.sleep(0.05 + 0.6 * float(torch.rand(1, generator=generator)))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        last = elastic.load(folder, parts)
        assert last is not None
        assert last >= before
        if last > 1:
            assert bool((parts["layer"].weight_ss == last).all() and (parts["head"].weight == last).all())
    assert elastic.steps(folder)[-1] > 1
    elastic.save(folder, 10**7, parts, keep=1)
    assert [entry.name for entry in folder.iterdir()] == ["step-000010000000"]  # nothing else is left


def test_a_damaged_or_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = made(None, "step")
    elastic.save(tmp_path, 1, parts)
    (data,) = tmp_path.glob("step-*/*.distcp")
    whole, kept = data.read_bytes(), parts["layer"].weight_ss.detach().clone()
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="step-000000000001 is damaged"):
        elastic.load(tmp_path, parts)
    assert torch.equal(parts["layer"].weight_ss, kept)
    data.write_bytes(whole)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"can't be written.*No space left on device"):
            elastic.save(tmp_path, 2, parts)
    assert elastic.steps(tmp_path) == [1]
    assert elastic.load(tmp_path, parts) == 1


SCRIPT = """
import os, signal, sys
sys.path[:0] = [{support!r}]
import elastic_run as t
import torch
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from rjepa_triton.online import elastic

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
mesh, folder = init_device_mesh("cpu", (2,)), Path(sys.argv[1])
parts = t.made(mesh)
step = elastic.load(folder / "checkpoints", parts) or 0
if mesh.get_rank() == 0:
    with (folder / "begun").open("a") as begun:
        begun.write(f"{{step}} ")
for first in range(step, t.STEPS, 3):
    if first == 6 and step == 0 and mesh.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    t.run(parts, first, first + 3)
    elastic.save(folder / "checkpoints", first + 3, parts)
found = t.result(parts)
if mesh.get_rank() == 0:
    torch.save(found, folder / "found.pt")
torch.distributed.destroy_process_group()
"""


def test_a_rank_killed_under_torchrun_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    support = Path(__file__).parents[1] / "support"
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(support=str(support)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # a restarted gloo rank must not find the addresses that the ranks before it left in the launcher's store
    given = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = _processes.run(
        [*command, "--max-restarts", "1", str(script), str(tmp_path)], timeout=300, env=given
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "begun").read_text().split() == ["0", "6"]
    whole = made(None)
    run(whole, 0, STEPS)
    torch.testing.assert_close(torch.load(tmp_path / "found.pt"), result(whole), rtol=1e-12, atol=1e-12)
