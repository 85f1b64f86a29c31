"""What turns a patch into features before anything recurs: ResNet-50's stages, or a fixed bank of Gabor filters.

A ResNet comes from weights named by one text:

    random                           He's initial weights: for tests; its features hardly differ from patch to patch
    torchvision:IMAGENET1K_V2        a name of torchvision's ResNet50_Weights (downloads)
    timm:resnet50.a1_in1k            a model of timm that is built as torchvision's ResNet-50 is (downloads)
    simsiam:checkpoint_0099.pth.tar  a checkpoint of SimSiam (Chen & He 2020)
    file:weights.safetensors         a plain state dict, .safetensors or torch's
    small:8                          five stages of 8 to 32 maps, random: for tests

Files are read without unpickling code: safetensors, or torch.load(weights_only=True).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIMSIAM = "module.encoder."


class Backbone(nn.Module):
    """Five stages, each from maps to maps at half the size or the same: a ResNet without its head.

    Args:
        stages: the modules; widths: the maps that each gives.
        mean, std: of the channels red, green and blue, that patches are standardised by.

    Parameters are frozen and normalisation layers keep their statistics, unless `trainable` is set.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        stages: list[nn.Module],
        widths: list[int],
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        trainable: bool = False,
    ) -> None:
        super().__init__()
        self.stages, self.widths, self.trainable = nn.ModuleList(stages), widths, trainable
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.requires_grad_(trainable)
        self.train(trainable)

    @property
    def features(self) -> int:
        """D, of what `forward` gives."""
        return self.widths[-1]

    def train(self, mode: bool = True) -> Backbone:
        """As nn.Module's; frozen, normalisation layers stay in evaluation."""
        return super().train(mode and self.trainable)

    def standardised(self, patches: Tensor) -> Tensor:
        """Patches (…, 3, P, P), uint8 or in [0, 1], as the first stage takes them."""
        return (as_unit_range(patches, self.mean.dtype) - self.mean) / self.std

    def forward(self, patches: Tensor) -> Tensor:
        """(n, D): the last stage's maps, averaged over pixels, of patches (n, 3, P, P), uint8 or in [0, 1]."""
        maps = self.standardised(patches)
        for stage in self.stages:
            maps = stage(maps)
        return maps.mean((-2, -1))


class GaborBank(nn.Module):
    """Features without a learned weight: Gabor energies and means of luminance and two colour contrasts.

    Pairs of even and odd filters with a wavelength of 4 pixels at six orientations, on a pyramid that halves the patch
    twice: wavelengths of 4, 8 and 16 pixels of luminance (R+G+B)/3, and of 8 and 16 of red - green and
    blue - (red+green)/2. log(1 + 20·√(even² + odd²)) and the channel itself, each averaged over a grid of 3×3: 405
    features. Gaussian envelopes have a standard deviation of 0.56 wavelengths, one octave at half height (Daugman
    1985; complex cells as energies: Adelson & Bergen 1985). The grid, the wavelengths and the logarithm's 20 are
    choices.
    """

    WAVELENGTH, ORIENTATIONS, LEVELS, GRID, SIZE, GAIN = 4, 6, 3, 3, 13, 20.0

    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filters", self._filters())
        energies = self.ORIENTATIONS * (self.LEVELS + 2 * (self.LEVELS - 1))
        self.features = (energies + 3) * self.GRID**2

    @classmethod
    def _filters(cls) -> Tensor:
        """(2·O, 1, SIZE, SIZE): even, odd, even, …, an orientation after the other; even ones without a mean."""
        at = torch.arange(cls.SIZE) - cls.SIZE // 2
        y, x = torch.meshgrid(at, at, indexing="ij")
        envelope = torch.exp(-(x**2 + y**2) / (2 * (0.56 * cls.WAVELENGTH) ** 2))
        envelope = envelope / envelope.sum()
        kernels = []
        for k in range(cls.ORIENTATIONS):
            angle = math.pi * k / cls.ORIENTATIONS
            phase = 2 * math.pi / cls.WAVELENGTH * (x * math.cos(angle) + y * math.sin(angle))
            even = envelope * torch.cos(phase)
            kernels += [even - envelope * even.sum(), envelope * torch.sin(phase)]
        return torch.stack(kernels)[:, None]

    def forward(self, patches: Tensor) -> Tensor:
        """(n, 405) of patches (n, 3, P, P), uint8 or in [0, 1]."""
        red, green, blue = as_unit_range(patches, self.filters.dtype).split(1, dim=1)
        level = torch.cat([(red + green + blue) / 3, red - green, blue - (red + green) / 2], dim=1)
        found = [F.adaptive_avg_pool2d(level, self.GRID)]
        found.append(self._energy(level[:, :1]))
        for _ in range(1, self.LEVELS):
            level = F.avg_pool2d(level, 2)
            found.append(self._energy(level))
        return torch.cat([maps.flatten(1) for maps in found], dim=1)

    def _energy(self, channels: Tensor) -> Tensor:
        """(n, C·O, GRID, GRID) of channels (n, C, h, w), each through all filters."""
        rows, count = channels.shape[:2]
        responses = F.conv2d(channels.flatten(0, 1)[:, None], self.filters, padding=self.SIZE // 2)
        pooled = F.adaptive_avg_pool2d(torch.hypot(responses[:, 0::2], responses[:, 1::2]), self.GRID)
        return torch.log1p(self.GAIN * pooled).view(rows, count * self.ORIENTATIONS, self.GRID, self.GRID)


def as_unit_range(patches: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 patches as [0, 1] in `dtype`; others as they are, in it."""
    return patches.to(dtype) / 255 if patches.dtype == torch.uint8 else patches.to(dtype)


def load(weights: str, trainable: bool = False) -> Backbone | GaborBank:
    """The backbone that `weights` names (see above), or "gabor", the bank of filters.

    Raises ValueError for a name of no known kind, and for weights whose keys or shapes aren't ResNet-50's, naming
    them; FileNotFoundError for a file that isn't there; ModuleNotFoundError without the package it takes.
    """
    kind, _, name = weights.partition(":")
    if kind == "gabor":
        return GaborBank()
    if kind == "small":
        return _small(_width(weights, name), trainable)
    if kind == "random":
        return _resnet(_torchvision().resnet50(weights=None), trainable)
    if kind == "torchvision":
        return _from_torchvision(name, trainable)
    if kind not in ("timm", "simsiam", "file"):
        raise ValueError(
            "weights must be 'gabor', 'random', 'small:WIDTH', 'torchvision:NAME', 'timm:NAME', 'simsiam:FILE' or "
            f"'file:FILE', got {weights!r}"
        )
    state = {"timm": _from_timm, "simsiam": _from_simsiam, "file": read}[kind](name)
    network = _torchvision().resnet50(weights=None)
    _load_strictly(network, state, weights)
    return _resnet(network, trainable)


def read(file: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, .safetensors or torch's, by name; nothing in it is run.

    Raises FileNotFoundError; ValueError for what isn't a dict of tensors, or can't be read without unpickling code.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} can't be read as safetensors: {error}") from None
    found = unpickled(path)
    state = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} must hold a dict of tensors, or one under 'state_dict'")
    return dict(state)


def unpickled(path: Path) -> Any:
    """What torch.save wrote, if it can be read without running code; else ValueError naming the file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what pickle, zipfile and its own reader do
        raise ValueError(
            f"{path} can't be read with weights_only=True: {str(error).splitlines()[0]}"
        ) from None


def _from_simsiam(file: str) -> dict[str, Tensor]:
    """The encoder of a SimSiam checkpoint, without the projector that stands in place of its last layer."""
    state = read(file)
    kept = {
        name.removeprefix(SIMSIAM): value
        for name, value in state.items()
        if name.startswith(SIMSIAM) and not name.startswith(f"{SIMSIAM}fc")
    }
    if not kept:
        raise ValueError(
            f"{file} must have keys that begin with {SIMSIAM!r}, as SimSiam's checkpoints do, got {_some(state)}"
        )
    return kept


def _from_timm(name: str) -> dict[str, Tensor]:
    import timm

    return dict(timm.create_model(name, pretrained=True).state_dict())


def _from_torchvision(name: str, trainable: bool) -> Backbone:
    known = _torchvision().ResNet50_Weights.__members__
    if name not in known:
        raise ValueError(f"weights must be torchvision:NAME with NAME of {', '.join(known)}, got {name!r}")
    return _resnet(_torchvision().resnet50(weights=known[name]), trainable)


def _torchvision() -> Any:
    from torchvision.models import resnet

    return resnet


def _load_strictly(network: nn.Module, state: dict[str, Tensor], weights: str) -> None:
    """Load all but the classifier, which isn't used; every other key and shape must be there, and no other."""
    wanted = network.state_dict()
    missing = sorted(set(wanted) - set(state) - {"fc.weight", "fc.bias"})
    unexpected = sorted(set(state) - set(wanted))
    if missing or unexpected:
        raise ValueError(
            f"{weights} must have ResNet-50's keys: {len(missing)} are missing ({_some(missing)}), "
            f"{len(unexpected)} are not its own ({_some(unexpected)})"
        )
    for name, value in state.items():
        if name not in ("fc.weight", "fc.bias") and value.shape != wanted[name].shape:
            raise ValueError(
                f"{weights}: {name} must have shape {tuple(wanted[name].shape)}, got {tuple(value.shape)}"
            )
    network.load_state_dict(
        {name: value for name, value in state.items() if not name.startswith("fc.")}, strict=False
    )


def _some(names: Any) -> str:
    shown = list(names)[:3]
    return ", ".join(shown) + (", …" if len(list(names)) > 3 else "") if shown else "none"


def _resnet(network: Any, trainable: bool) -> Backbone:
    """The five stages of torchvision's ResNet-50."""
    stem = OrderedDict(conv1=network.conv1, bn1=network.bn1, relu=network.relu, maxpool=network.maxpool)
    stages = [nn.Sequential(stem), network.layer1, network.layer2, network.layer3, network.layer4]
    return Backbone(stages, [64, 256, 512, 1024, 2048], trainable=trainable)


def _width(weights: str, name: str) -> int:
    if not name.isdecimal() or int(name) < 1:
        raise ValueError(f"weights must be small:WIDTH with WIDTH of at least 1, got {weights!r}")
    return int(name)


def _small(width: int, trainable: bool) -> Backbone:
    widths = [width, width, 2 * width, 2 * width, 4 * width]
    stages: list[nn.Module] = []
    for before, after, stride in zip([3, *widths], widths, (2, 1, 2, 2, 2), strict=False):
        convolution = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        stages.append(nn.Sequential(convolution, nn.BatchNorm2d(after), nn.ReLU()))
    return Backbone(stages, widths, trainable=trainable)
