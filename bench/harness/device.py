"""Which device a benchmark runs on, how much of its memory it may take, and what its failures are recorded as."""

from __future__ import annotations

import torch

# A case may take this part of the memory that the system says is available.
MEMORY_SHARE = 0.9


def default_device() -> str:
    """The device that "auto" stands for: cuda where torch finds a CUDA device, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raise ValueError unless this torch can use the device."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:<index>', got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} can't be used: torch finds no CUDA device here")
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r} can't be used: torch finds {torch.cuda.device_count()} CUDA devices here"
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether the error says that an allocation failed; on the CPU torch has no exception class for that."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    told = ("not enough memory", "can't allocate memory", "out of memory")
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in told)


def failure(error: Exception) -> tuple[str, str]:
    """The status ("oom" or "error") and the message with which a record tells of an exception."""
    return ("oom" if out_of_memory(error) else "error"), f"{type(error).__name__}: {error}"
