"""What a GPU did during a run: `record_gpu` runs it under torch's profiler, `analyse` reads a trace that is there.

    timeline = record_gpu(lambda: train(steps=20))
    print(as_text(timeline))

Idle time is told by cause. It sees what the profiler sees: this process, and of a kernel when it ran, not how well. "A
kernel ran" is no load: one block of threads on a large GPU makes it busy too.
"""

from __future__ import annotations

from headrace.profiling.device.analysis import analyse
from headrace.profiling.device.recording import read_memory, record_gpu
from headrace.profiling.device.text import as_text
from headrace.profiling.device.timeline import Gap, Kernel, Memory, Timeline

__all__ = ["Gap", "Kernel", "Memory", "Timeline", "analyse", "as_text", "read_memory", "record_gpu"]
