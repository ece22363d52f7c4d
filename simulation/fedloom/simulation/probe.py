"""What a frozen base model gives under the same privacy: the figure that an adapter has to beat.

A linear classifier on frozen features is the run itself with adapter kind `head`: the same clients, samples, clip norm,
noise and account, and no block adapted. It is often as good, and it sends a hundredth of the values.
"""

from fedloom.core.config.run import AdapterSection, RunConfig, StrategySection, task_traits
from fedloom.core.errors import ConfigError

__all__ = ["probe_of"]


def probe_of(config: RunConfig, learning_rate: float) -> RunConfig:
    """The same run with the head alone trained, called NAME-probe.

    Args:
        config: The run.
        learning_rate: The head's. A probe has one of its own: what is right beside an adapter is often too small.

    Raises:
        ConfigError: The task has no head.
    """
    if task_traits(config.model.task).generates:
        raise ConfigError(f"{config.model.task} adds no head, so there is no probe to train; leave out --probe")
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"name": f"{config.run.name[:58]}-probe"}),
            "model": config.model.model_copy(update={"head": "train"}),
            "adapter": AdapterSection(kind="head", targets=config.adapter.targets),
            "train": config.train.model_copy(update={"head_learning_rate": learning_rate}),
            "strategy": StrategySection(name="fedavg", weighting=config.strategy.weighting),
            "start": None,
        }
    )
