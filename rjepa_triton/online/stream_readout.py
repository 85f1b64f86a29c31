"""What compiled code takes as a stream's readout: linear parts and activations, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["Residual"]


class Residual(nn.Module):
    """o = h + inner(h), a readout from (B, N) to (B, N): what `inner` learns is the change.

    Raises TypeError unless `inner` is a torch.nn.Module.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        if not isinstance(inner, nn.Module):
            raise TypeError(f"inner must be a torch.nn.Module, got {type(inner).__name__}")
        self.inner = inner

    def forward(self, h: Tensor) -> Tensor:
        """h (B, N) → (B, N)."""
        out: Tensor = h + self.inner(h)
        return out


def _none(_: nn.Module) -> float:
    return 0.0


LINEAR = 0
GELU_BY_TANH = 8
# The number that readout.h gives an activation, and the setting that it has, if it has one.
ACTIVATIONS: dict[type[nn.Module], tuple[int, Callable[[Any], float]]] = {
    nn.ReLU: (1, _none),
    nn.LeakyReLU: (2, lambda module: module.negative_slope),
    nn.ELU: (3, lambda module: module.alpha),
    nn.Tanh: (4, _none),
    nn.Sigmoid: (5, _none),
    nn.SiLU: (6, _none),
    nn.GELU: (7, _none),
}


@dataclass
class Parts:
    """A readout as compiled code sees it.

    parts      nn.Linear and activations
    residual   whether the readout's input is added to what they give
    inside     the modules with others in them, and those: while they are the same, so are the parts
    """

    parts: list[nn.Module]
    residual: bool
    inside: list[tuple[nn.Module, list[nn.Module | None]]]

    @classmethod
    def of(cls, readout: nn.Module, units: int) -> Parts | str:
        """The parts of a readout of so many units, or why it has none. As torch, Sequentials may be nested."""
        found = cls([], type(readout) is Residual, [])
        if why := found._add(readout.inner if isinstance(readout, Residual) and found.residual else readout):
            return why
        if found.residual:
            found.inside.append((readout, list(readout._modules.values())))
        weights = [part for part in found.parts if isinstance(part, nn.Linear)]
        if not weights:
            return "compiled code takes a readout with an nn.Linear in it"
        size = units
        for part in weights:
            if part.in_features != size:
                return f"the readout's nn.Linear takes {part.in_features} numbers and gets {size}"
            size = part.out_features
        if found.residual and size != units:
            return f"the residual readout gives {size} numbers for {units} units"
        return found

    def _add(self, module: nn.Module) -> str | None:
        if type(module) is nn.Sequential:
            self.inside.append((module, list(module._modules.values())))
            return next((why for each in module if (why := self._add(each))), None)
        if type(module) is not nn.Linear and type(module) not in ACTIVATIONS:
            names = ", ".join(kind.__name__ for kind in ACTIVATIONS)
            return (
                f"compiled code takes a readout of nn.Linear, nn.Sequential, Residual and {names}, got "
                f"{type(module).__name__}"
            )
        self.parts.append(module)
        return None

    @property
    def outputs(self) -> int:
        """O."""
        return next(int(part.out_features) for part in reversed(self.parts) if isinstance(part, nn.Linear))

    def are_still(self) -> bool:
        """Whether the readout's modules are the same, and without hooks."""
        return self.are_the_same() and not any(
            map(has_hooks, (*self.parts, *(module for module, _ in self.inside)))
        )

    def are_the_same(self) -> bool:
        """Whether the readout's modules are the same."""
        return all(list(module._modules.values()) == kept for module, kept in self.inside)

    def parameters(self) -> list[nn.Parameter]:
        """Weight and bias of each nn.Linear, as far as it has them."""
        return [p for part in self.parts for p in part._parameters.values() if p is not None]

    def kinds(self) -> list[tuple[int, float]]:
        """The number of each part's kind, and its setting."""
        found = []
        for part in self.parts:
            kind, setting = ACTIVATIONS.get(type(part), (LINEAR, _none))
            by_tanh = isinstance(part, nn.GELU) and part.approximate == "tanh"
            found.append((GELU_BY_TANH if by_tanh else kind, float(setting(part))))
        return found

    def sizes(self, units: int) -> list[int]:
        """How many numbers each part gives, for a readout of so many units."""
        found: list[int] = []
        for part in self.parts:
            units = int(part.out_features) if isinstance(part, nn.Linear) else units
            found.append(units)
        return found


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module, or its backward pass, calls others that were registered with it."""
    return any(hooks_of(module))


def hooks_of(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    """What is registered with the module for a call of it, or for its backward pass."""
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
