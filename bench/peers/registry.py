"""The peers: which tasks each serves with which gradient, and what it needs. This module imports none of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peer:
    """One peer.

    module, runner  the module and the name of its `Runner`
    tasks           for each task that it serves, the gradient that it gives: "bptt", "rfp" or "eprop"
                    (`tasks.GRADIENTS`); of a stream that is learned from, a name of `tasks.OPTIMIZERS`
    packages        import names of the packages that it needs; their versions are recorded
    compiles        whether its first call compiles something
    cuda            whether it runs only on a CUDA device
    asked           whether it runs only if it is named
    """

    module: str
    runner: str
    tasks: Mapping[str, str]
    packages: tuple[str, ...] = ("torch",)
    compiles: bool = False
    cuda: bool = False
    asked: bool = False

    def missing(self, device: str) -> str | None:
        """Why it can't run here (no CUDA device, or a package that isn't installed); None if it can."""
        if self.cuda and torch.device(device).type != "cuda":
            return "needs a CUDA device"
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                return f"{package} isn't installed: pip install 'rjepa-triton[peers]'"
        return None

    def versions(self) -> dict[str, str | None]:
        """The versions of its packages; None for one that is not installed."""
        found: dict[str, str | None] = {}
        for package in self.packages:
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                found[package] = None
        return found


def _here(name: str) -> str:
    return f"{__package__}.{name}"


def _sequences(gradient: str, *networks: str) -> dict[str, str]:
    return {f"{network}-sequence": gradient for network in networks}


_JAX = ("jax", "jaxlib")
_BRAINTRACE = ("braintrace", "brainstate", *_JAX)
_ALL = ("rgc", "lstm", "gru")
_DIAGONAL = _sequences("bptt", "gru-diagonal")  # by RFP too, which is exact there
_STREAM = {"rgc-stream": "rfp"}


def _stream(runner: str, gradient: str = "rfp", asked: bool = False) -> Peer:
    return Peer(_here("streams"), runner, {"rgc-stream": gradient}, asked=asked)


PEERS: dict[str, Peer] = {
    "rfp-dual": Peer(_here("ours"), "Dual", {**_sequences("rfp", *_ALL), **_DIAGONAL}),
    "bptt": Peer(_here("ours"), "Bptt", _sequences("bptt", *_ALL)),
    "rfp-step": Peer(_here("ours"), "Step", {"rgc-online": "rfp"}),
    "rfp-learner": Peer(_here("ours"), "Learner", {"rgc-online": "rfp"}),
    "stream": _stream("OneCall"),
    "stream-adam": _stream("Adam", "rfp-adam"),
    "stream-step": _stream("StepByStep"),
    "stream-learner": _stream("Loop"),
    "stream-one-thread": _stream("OneThread", asked=True),
    "stream-2": _stream("Two", asked=True),
    "stream-2-one-thread": _stream("TwoByOneThread", asked=True),
    "stream-8": _stream("Eight", asked=True),
    "stream-8-one-thread": _stream("EightByOneThread", asked=True),
    "torch-autograd": Peer(_here("by_torch"), "Eager", _sequences("bptt", "rgc")),
    "torch-compile": Peer(_here("by_torch"), "Compiled", _sequences("bptt", "rgc"), compiles=True),
    "torch-compile-step": Peer(
        _here("by_torch"), "CompiledStep", _sequences("bptt", "rgc"), compiles=True
    ),
    "torch-scan": Peer(_here("by_torch"), "CompiledScan", _sequences("bptt", "rgc"), compiles=True),
    "torch-nn": Peer(_here("by_torch"), "Builtin", _sequences("bptt", "lstm", "gru")),
    "jax-scan": Peer(_here("by_jax"), "Scan", {**_sequences("bptt", *_ALL), **_DIAGONAL}, _JAX, compiles=True),
    "jax-stream": Peer(_here("by_jax"), "Stream", _STREAM, _JAX, compiles=True),
    "braintrace-snap1": Peer(
        _here("by_braintrace"), "SnAp1", {"rgc-online": "rfp", **_sequences("rfp", *_ALL)}, _BRAINTRACE, True
    ),
    "braintrace-d-rtrl": Peer(
        _here("by_braintrace"), "DRTRL", {"rgc-online": "eprop", **_sequences("eprop", *_ALL)}, _BRAINTRACE, True
    ),
    "pararnn": Peer(_here("by_pararnn"), "ParaRNN", _DIAGONAL, ("pararnn",)),
    "flashrnn": Peer(
        _here("by_flashrnn"), "FlashRNN", _sequences("bptt", "lstm", "gru"), ("flashrnn",), True, cuda=True
    ),
    "torchrl": Peer(
        _here("by_torchrl"), "TorchRL", _sequences("bptt", "lstm", "gru"), ("torchrl", "tensordict"), True, cuda=True
    ),
}  # fmt: skip
DEFAULT = tuple(name for name, peer in PEERS.items() if not peer.asked)
