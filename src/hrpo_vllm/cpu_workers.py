"""The worker of vLLM on a CPU, apart: importing vLLM's own puts no-ops in the place of CUDA's streams and events."""

from vllm.v1.worker.cpu_worker import CPUWorker

from hrpo_vllm.workers import ThinkingWorker


class ThinkingCPUWorker(ThinkingWorker, CPUWorker): ...
