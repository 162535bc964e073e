"""A GPU and its clock. What calls CUDA stands here and nowhere else in the benchmark."""

from __future__ import annotations

import gc
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType

from .cards import peak_gbps
from .device import Kernel, Times

MIB = 1 << 20
QUERY = (
    "name,driver_version,pstate,temperature.gpu,power.draw,power.limit,clocks.sm,clocks.mem,clocks.max.sm,"
    "clocks.max.mem,ecc.mode.current,mig.mode.current,utilization.gpu"
)


def nvidia_smi() -> dict[str, str]:
    """What the driver says of the current GPU now; empty where there is no nvidia-smi."""
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    for chosen in [] if uuid is None else [f"--id=GPU-{uuid}"], []:
        try:
            done = subprocess.run(
                ["nvidia-smi", *chosen, f"--query-gpu={QUERY}", "--format=csv,noheader"],
                capture_output=True,
                text=True,
                timeout=20,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            continue
        values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
        return dict(zip(QUERY.split(","), values, strict=False))
    return {}


class Cuda:
    """The current CUDA (or ROCm) device."""

    name = "cuda"
    backends: dict[str, str] = {"triton": "vcr_ops Triton", "cuda": "vcr_ops CUDA C++"}  # noqa: RUF012
    backend = "triton"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("PyTorch finds no GPU here; --device rehearsal runs the same code on the CPU")
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.properties = properties
        self.l2_bytes = int(getattr(properties, "L2_cache_size", 0)) or 64 * MIB
        # float64, so that its kernel has a name that no other has; and so large that the host has queued a graph's
        # replay by the time that it is written (some 100 µs).
        self.buffer = torch.empty(max(4 * self.l2_bytes, 256 * MIB) // 8, dtype=torch.float64, device="cuda")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush_names: set[str] = set()

    def flush(self) -> None:
        self.buffer.fill_(1.0)

    def call(self, function: Callable[[], object]) -> Times:
        self.flush()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self.start.record()
        function()
        self.end.record()
        host = time.perf_counter() - begin
        self.end.synchronize()
        return Times(self.start.elapsed_time(self.end) / 1e3, host)

    def queued(self, function: Callable[[], object]) -> float:
        self.flush()
        self.start.record()
        function()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3

    def new_pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def capture(self, function: Callable[[], object], pool: Any = None) -> Callable[[], object]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            function()
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay

    def _kernels(self, function: Callable[[], object]) -> list[Kernel]:
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            function()
            torch.cuda.synchronize()
        recorded = profile.profiler.kineto_results
        events = [event for event in recorded.events() if event.device_type() == DeviceType.CUDA]
        if not events:
            raise RuntimeError("torch.profiler saw no kernels: CUPTI can't be used here")
        return [
            Kernel(event.name(), event.duration_ns() / 1e9)
            for event in sorted(events, key=lambda event: event.start_ns())
        ]

    def segments(self, functions: list[Callable[[], object]]) -> list[list[Kernel]]:
        if not self.flush_names:
            self._kernels(self.flush)  # the first session starts the profiler, and may miss something
            self.flush_names = {kernel.name for kernel in self._kernels(self.flush)}

        def run() -> None:
            for function in functions:
                self.flush()
                function()

        parts: list[list[Kernel]] = []
        for kernel in self._kernels(run):
            if kernel.name in self.flush_names:
                parts.append([])
            elif parts:
                parts[-1].append(kernel)
        if len(parts) != len(functions):
            raise RuntimeError(f"torch.profiler saw {len(parts)} of {len(functions)} steps")
        return parts

    def peak_bytes(self, function: Callable[[], object]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def free(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def describe(self) -> dict[str, Any]:
        properties = self.properties
        clock, width = (int(getattr(properties, name, 0)) for name in ("memory_clock_rate", "memory_bus_width"))
        return {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "l2_mib": self.l2_bytes / MIB,
            "peak_gbps": peak_gbps(properties.name, clock, width),
            "cuda": torch.version.cuda or torch.version.hip,
            "nvidia_smi": nvidia_smi(),
        }
