"""Backbones: what they give, and files that aren't what they should be."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from rjepa_triton.rjepa import backbone


@pytest.fixture(scope="module")
def resnet() -> torch.nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet50(weights=None).eval()


def test_the_stages_are_the_resnets(resnet: Any, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(resnet.state_dict(), file)
    made = backbone.load(f"file:{file}")
    patches = torch.randint(0, 255, (2, 3, 50, 50), dtype=torch.uint8)
    resnet.fc = torch.nn.Identity()
    given = torchvision.transforms.functional.normalize(
        patches.float() / 255, backbone.IMAGENET_MEAN, backbone.IMAGENET_STD
    )
    with torch.no_grad():
        torch.testing.assert_close(made(patches), resnet(given))
    assert made.features == 2048
    assert not any(p.requires_grad for p in made.parameters())


def test_a_simsiam_checkpoint(tmp_path: Path) -> None:
    network = torchvision.models.resnet50(weights=None)
    state = {
        f"module.encoder.{name}": value
        for name, value in network.state_dict().items()
        if not name.startswith("fc.")
    }
    state |= {"module.encoder.fc.0.weight": torch.zeros(3), "module.predictor.0.weight": torch.zeros(2)}
    torch.save({"state_dict": state, "epoch": 99}, tmp_path / "checkpoint.pth.tar")
    made = backbone.load(f"simsiam:{tmp_path / 'checkpoint.pth.tar'}")
    torch.testing.assert_close(made.stages[0].conv1.weight, network.conv1.weight)
    torch.testing.assert_close(made.stages[4][2].conv3.weight, network.layer4[2].conv3.weight)


def test_the_gabor_bank_tells_orientation_scale_and_colour() -> None:
    bank = backbone.load("gabor")
    at = torch.arange(48).float()

    def energy(grating: torch.Tensor) -> torch.Tensor:
        """Of luminance, (scale, orientation), mean over the grid."""
        found = bank(grating.expand(3, 48, 48)[None])[0]
        first = found[27 : 27 + 54].view(6, 9).mean(1)
        second = found[81 : 81 + 3 * 54].view(3, 6, 9)[0].mean(1)
        return torch.stack([first, second])

    fine = energy(0.5 + 0.5 * torch.sin(2 * torch.pi * at / 4)[None, :])
    assert fine.argmax() == 0  # varies along x: the first orientation of the first scale
    assert energy(0.5 + 0.5 * torch.sin(2 * torch.pi * at / 4)[:, None]).argmax() == 3
    assert energy(0.5 + 0.5 * torch.sin(2 * torch.pi * at / 8)[None, :]).argmax() == 6
    grey, red = torch.full((1, 3, 50, 50), 0.5), torch.zeros(1, 3, 50, 50)
    red[:, 0] = 0.5
    assert bank(grey).shape == (1, bank.features) == (1, 405)
    torch.testing.assert_close(bank(grey)[0, 9:27], torch.zeros(18))  # no contrast of colours
    assert (bank(red)[0, 9:18] > 0.4).all()


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        ("resnet", "weights must be 'gabor', 'random'.*got 'resnet'"),
        ("small:none", "small:WIDTH"),
        ("torchvision:BEST", "IMAGENET1K_V1.*got 'BEST'"),
    ],
)
def test_an_unknown_name(weights: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        backbone.load(weights)


def test_files_that_are_not_a_resnets(tmp_path: Path, resnet: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.pth"):
        backbone.load(f"file:{tmp_path / 'none.pth'}")
    torch.save({"encoder.w": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"318 are missing .* 1 are unknown \(encoder\.w\)"):
        backbone.load(f"file:{tmp_path / 'other.pth'}")
    with pytest.raises(ValueError, match=r"keys that begin with 'module\.encoder\.'"):
        backbone.load(f"simsiam:{tmp_path / 'other.pth'}")
    state = {name: value for name, value in resnet.state_dict().items() if not name.startswith("fc")}
    state["layer1.0.conv1.weight"] = torch.zeros(3, 64, 1, 1)
    torch.save(state, tmp_path / "shape.pth")
    with pytest.raises(
        ValueError, match=r"layer1\.0\.conv1\.weight must have shape \(64, 64, 1, 1\), got \(3, 64"
    ):
        backbone.load(f"file:{tmp_path / 'shape.pth'}")
    (tmp_path / "broken.safetensors").write_bytes(b"\x09")
    with pytest.raises(ValueError, match="can't be read as safetensors"):
        backbone.load(f"file:{tmp_path / 'broken.safetensors'}")


class Evil:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('ran')",))


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    torch.save({"a": Evil()}, tmp_path / "zip.pth")
    for name in ("evil.pth", "zip.pth"):
        with pytest.raises(ValueError, match="can't be read with weights_only=True"):
            backbone.load(f"file:{tmp_path / name}")
