"""Two ranks in network namespaces of their own, whose one link is cut and restored: as two machines with a cable."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import elastic_run
import pytest
import torch
from checkout import ROOT

TIMEOUT = 10  # seconds, of the process group
SCRIPT = f"""
import os, sys, time
sys.path[:0] = [{str(Path(__file__).parents[1] / "support")!r}]
import elastic_run as t
import torch
from datetime import timedelta
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from rjepa_triton.online import elastic

torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.distributed.init_process_group(
    "gloo", "tcp://10.77.0.1:29517", rank=rank, world_size=2, timeout=timedelta(seconds={TIMEOUT})
)
mesh = init_device_mesh("cpu", (2,))
parts = t.made(mesh)
step = elastic.load(folder / "checkpoints", parts) or 0
for first in range(step, t.STEPS, 3):
    if first == 6 and step == 0:
        (folder / f"here{{rank}}").touch()
        while not (folder / "cut").exists():
            time.sleep(0.01)
    begun = time.monotonic()
    try:
        t.run(parts, first, first + 3)
    except RuntimeError as error:
        print(f"{{time.monotonic() - begun:.1f}}", error, flush=True)
        os._exit(3)
    elastic.save(folder / "checkpoints", first + 3, parts)
torch.save([step, t.result(parts)], folder / f"found{{rank}}.pt")
torch.distributed.destroy_process_group()
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def spaces() -> Iterator[list[str]]:
    """The names of two namespaces, which an Ethernet link joins."""
    names = [f"rjepa-{os.getpid()}-{rank}" for rank in range(2)]
    if shutil.which("ip") is None:
        pytest.skip("needs the program ip (iproute2)")
    try:
        ip("netns", "add", names[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"needs the right to make network namespaces: {error.stderr.strip()}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "rj0", "netns", names[0], "type", "veth", "peer", "name", "rj1", "netns", names[1])
        for rank, name in enumerate(names):
            ip("-n", name, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", f"rj{rank}")
            ip("-n", name, "link", "set", f"rj{rank}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def started(spaces: list[str], folder: Path) -> list[subprocess.Popen[str]]:
    script = folder / "train.py"
    script.write_text(SCRIPT)
    found = []
    for rank, name in enumerate(spaces):
        given = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": f"rj{rank}"}
        command = ["ip", "netns", "exec", name, sys.executable, str(script), str(rank), str(folder)]
        found.append(
            subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    return found


def test_a_link_that_is_cut_is_told_and_the_run_goes_on_when_it_is_restored(
    spaces: list[str], tmp_path: Path
) -> None:
    processes = started(spaces, tmp_path)
    try:
        end = time.monotonic() + 120
        while not all((tmp_path / f"here{rank}").exists() for rank in range(2)):
            assert all(process.poll() is None for process in processes), processes[0].communicate()[0]
            assert time.monotonic() < end
            time.sleep(0.05)
        ip("-n", spaces[0], "link", "set", "rj0", "down")
        (tmp_path / "cut").touch()
        for rank, process in enumerate(processes):
            said = process.communicate(timeout=TIMEOUT + 60)[0]
            assert process.returncode == 3, said
            last = said.strip().splitlines()[-1]
            waited, text = last.split(" ", 1)
            assert float(waited) < TIMEOUT + 5
            assert text.startswith(f"mesh: rank {rank} of 2 got no answer from another rank"), text
            assert text.endswith("Start all ranks again from the last checkpoint"), text
        ip("-n", spaces[0], "link", "set", "rj0", "up")
        processes = started(spaces, tmp_path)
        for process in processes:
            said = process.communicate(timeout=120)[0]
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()
    whole = elastic_run.made(None)
    elastic_run.run(whole, 0, elastic_run.STEPS)
    for rank in range(2):
        step, found = torch.load(tmp_path / f"found{rank}.pt")
        assert step == 6
        torch.testing.assert_close(found, elastic_run.result(whole), rtol=1e-12, atol=1e-12)
