"""Where and in what precision a process trains: [compute] of a policy, and [engine] of a run file that is simulated."""

from typing import Literal

from pydantic import Field

from fedloom.core.config.parsing import Section

__all__ = ["ComputeOptions"]


class ComputeOptions(Section):
    """What of a machine one process may use, and how it keeps the base model."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$")
    """auto (CUDA where there is such a device, otherwise the CPU), cpu, cuda, cuda:1 or mps."""
    threads: int = Field(default=0, ge=0)
    """Torch threads; 0 leaves torch's own choice."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the frozen base model. The adapter and its head are float32 whatever this is."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """The linear layers of the frozen base: 8bit keeps them as LLM.int8, 4bit as NF4. Both need the extra
    fedloom[quantized]."""
    gradient_checkpointing: bool = False
    """Compute each layer again in the backward pass rather than keep what it computed: less memory, about a third more
    time, the same gradients."""
    memory_mib: int | None = Field(default=None, ge=64)
    """Memory for the process in MiB; the micro-batch is fitted to it. On CUDA the allocator keeps to it. None is what
    is free."""
    activation_cache_mib: int = Field(default=2048, ge=0)
    """Most MiB of an encrypted temporary file with what the frozen blocks below all that is trained give for each
    example, so that they are computed once for it. 0 computes them in every step."""
