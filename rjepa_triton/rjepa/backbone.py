"""The feedforward part, which turns a patch into features: ResNet-50's stages, or a fixed bank of Gabor filters.

`load` takes the name of the weights:

    gabor                            the bank of Gabor filters, which has no weights
    random                           ResNet-50 with He's initial weights, for tests: its features hardly differ from
                                     patch to patch
    torchvision:IMAGENET1K_V2        a name of torchvision's ResNet50_Weights (downloaded)
    timm:resnet50.a1_in1k            a model of timm with the layers of torchvision's ResNet-50 (downloaded)
    simsiam:checkpoint_0099.pth.tar  a checkpoint of SimSiam (Chen & He 2020)
    file:weights.safetensors         a plain state dict, as .safetensors or saved by torch
    small:8                          five random stages of 8 to 32 maps, for tests

No code in a file is run (`storage`).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _files
from .storage import is_safetensors, read_tensors
from .storage import unpickled as unpickled

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIMSIAM = "module.encoder."


class Backbone(nn.Module):
    """A ResNet without its head: five stages, each of which keeps the size of the maps or halves it.

    Args:
        stages: the modules. widths: how many maps each returns.
        mean, std: of the channels red, green and blue; patches are standardised by them.
        trainable: if False, parameters are frozen and normalisation layers keep their statistics.
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
        self.register_buffer("mean", rearrange(torch.tensor(mean), "c -> c 1 1"))
        self.register_buffer("std", rearrange(torch.tensor(std), "c -> c 1 1"))
        self.requires_grad_(trainable)
        self.train(trainable)

    @property
    def features(self) -> int:
        """D, the number of features that `forward` returns."""
        return self.widths[-1]

    def train(self, mode: bool = True) -> Backbone:
        """As `nn.Module.train`, except that a frozen backbone stays in evaluation mode."""
        return super().train(mode and self.trainable)

    def standardised(self, patches: Tensor) -> Tensor:
        """Patches (…, 3, P, P), uint8 or in [0, 1], standardised for the first stage."""
        return (as_unit_range(patches, self.mean.dtype) - self.mean) / self.std

    def forward(self, patches: Tensor) -> Tensor:
        """Features (n, D) of patches (n, 3, P, P), uint8 or in [0, 1]: the last stage's maps, averaged over pixels."""
        maps = self.standardised(patches)
        for stage in self.stages:
            maps = stage(maps)
        return reduce(maps, "n d h w -> n d", "mean")


class GaborBank(nn.Module):
    """405 features without learned weights: Gabor energies and means of luminance and of two colour contrasts.

    The channels are luminance (R+G+B)/3, R - G and B - (R+G)/2. Pairs of an even and an odd filter, with a wavelength
    of 4 pixels at six orientations, are applied on a pyramid that halves the patch twice. So the wavelengths are 4, 8
    and 16 pixels for luminance, and 8 and 16 for the colour contrasts. The features are log(1 + 20·√(even² + odd²)) and
    the channels themselves, each averaged over a grid of 3×3. Gaussian envelopes have a standard deviation of 0.56
    wavelengths, which is one octave at half height (Daugman 1985; energies as a model of complex cells: Adelson &
    Bergen 1985). The grid, the wavelengths and the factor 20 are choices.
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
        """(2·O, 1, SIZE, SIZE): an even and an odd filter for each orientation in turn; the even ones have mean 0."""
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
        return rearrange(kernels, "f h w -> f 1 h w")

    def forward(self, patches: Tensor) -> Tensor:
        """Features (n, 405) of patches (n, 3, P, P), uint8 or in [0, 1]."""
        red, green, blue = as_unit_range(patches, self.filters.dtype).split(1, dim=1)
        level = torch.cat([(red + green + blue) / 3, red - green, blue - (red + green) / 2], dim=1)
        found = [F.adaptive_avg_pool2d(level, self.GRID)]
        found.append(self._energy(level[:, :1]))
        for _ in range(1, self.LEVELS):
            level = F.avg_pool2d(level, 2)
            found.append(self._energy(level))
        return torch.cat([rearrange(maps, "n c h w -> n (c h w)") for maps in found], dim=1)

    def _energy(self, channels: Tensor) -> Tensor:
        """Log energies (n, C·O, GRID, GRID) of channels (n, C, h, w), each of which goes through all filters."""
        each = rearrange(channels, "n c h w -> (n c) 1 h w")
        responses = F.conv2d(each, self.filters, padding=self.SIZE // 2)
        even, odd = rearrange(responses, "nc (o parity) h w -> parity nc o h w", parity=2)
        pooled = F.adaptive_avg_pool2d(torch.hypot(even, odd), self.GRID)
        return rearrange(torch.log1p(self.GAIN * pooled), "(n c) o h w -> n (c o) h w", n=len(channels))


def as_unit_range(patches: Tensor, dtype: torch.dtype) -> Tensor:
    """Patches as `dtype`: uint8 values are scaled to [0, 1], others are kept."""
    return patches.to(dtype) / 255 if patches.dtype == torch.uint8 else patches.to(dtype)


def load(weights: str, trainable: bool = False) -> Backbone | GaborBank:
    """The backbone that `weights` names, as listed at the top of this module.

    Raises ValueError for a name of an unknown kind, and for weights whose keys or shapes aren't ResNet-50's, naming
    them, and for weights that can't be downloaded or need timm where it is missing; FileNotFoundError;
    ModuleNotFoundError if torchvision or safetensors is needed and missing.
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
    """The tensors of a file, .safetensors or saved by torch, by name. No code in the file is run.

    Raises FileNotFoundError; ValueError if the file holds no dict of tensors, is damaged, or can't be read without
    running code.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if is_safetensors(path):
        return read_tensors(path)
    found = unpickled(path)
    state = found.get("state_dict", found) if isinstance(found, Mapping) else found
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} must hold a dict of tensors, or one under 'state_dict'")
    return dict(state)


def _from_simsiam(file: str) -> dict[str, Tensor]:
    """The encoder of a SimSiam checkpoint, without the projector that replaces its last layer."""
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
    try:
        import timm
    except ModuleNotFoundError:
        raise ValueError(
            f"weights 'timm:{name}' need timm, which is not installed: pip install timm"
        ) from None
    try:
        return dict(timm.create_model(name, pretrained=True).state_dict())
    except (RuntimeError, ValueError, OSError) as error:  # an unknown name, or no way to download it
        raise ValueError(
            f"weights 'timm:{name}' can't be had from timm: {_files.first_line(error)}"
        ) from None


def _from_torchvision(name: str, trainable: bool) -> Backbone:
    known = _torchvision().ResNet50_Weights.__members__
    if name not in known:
        raise ValueError(f"weights must be torchvision:NAME with NAME of {', '.join(known)}, got {name!r}")
    try:
        return _resnet(_torchvision().resnet50(weights=known[name]), trainable)
    except (RuntimeError, OSError, EOFError) as error:  # a download that failed or is damaged
        raise ValueError(f"weights 'torchvision:{name}' can't be had: {_files.first_line(error)}") from None


def _torchvision() -> Any:
    from torchvision.models import resnet

    return resnet


def _load_strictly(network: nn.Module, state: dict[str, Tensor], weights: str) -> None:
    """Load all but the classifier, which isn't used. The other keys and shapes must be exactly the network's."""
    wanted = network.state_dict()
    missing = sorted(set(wanted) - set(state) - {"fc.weight", "fc.bias"})
    unexpected = sorted(set(state) - set(wanted))
    if missing or unexpected:
        raise ValueError(
            f"{weights} must have ResNet-50's keys: {len(missing)} are missing ({_some(missing)}), "
            f"{len(unexpected)} are unknown ({_some(unexpected)})"
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
    """The backbone of torchvision's ResNet-50."""
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
