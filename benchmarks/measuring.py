"""Seconds and peak memory of a piece of work: a GPU is waited for, and its own memory is read."""

from __future__ import annotations

import ctypes
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def device() -> torch.device:
    """Where benchmarks compute."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """What a result was measured on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"


def wait() -> None:
    """Wait until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _resident(field: str) -> float:
    """GiB of this process (Linux): VmRSS, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


def timed(work: Callable[[], Any]) -> float:
    """Seconds of a call."""
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def measured(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of a call, and GiB at its peak over what was there before: of the GPU, or of this process."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = timed(work)
        return seconds, (torch.cuda.max_memory_allocated() - before) / 2**30
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the resident memory begins here
    before_gib = _resident("VmRSS")
    seconds = timed(work)
    return seconds, _resident("VmHWM") - before_gib


def peak() -> float:
    """GiB at the peak since the start: of the GPU, or of this process."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else _resident("VmHWM")
