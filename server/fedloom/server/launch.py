"""From a run file to what a coordinator is made of: the noise it asks for and the strategy it follows."""

from fedloom.proto.accounting import calibrate
from fedloom.proto.errors import ConfigError
from fedloom.proto.run import RunConfig
from fedloom.strategies.api import Strategy
from fedloom.strategies.registry import load

__all__ = ["build_strategy", "calibrated"]


def calibrated(config: RunConfig) -> RunConfig:
    """The run file with its noise multiplier filled in.

    It is the smallest with which a client that takes part in every round stays within privacy.epsilon, by the
    accountant that the clients use too. No credit is taken for rounds a client may sit out.

    Raises:
        ConfigError: The privacy target cannot be reached.
    """
    privacy, train = config.privacy, config.train
    noise = privacy.noise_multiplier
    if privacy.enabled and noise is None:
        noise = calibrate(privacy.epsilon, privacy.delta, train.sampling_rate, train.steps * config.run.rounds)
    settled = privacy.model_copy(update={"noise_multiplier": noise if privacy.enabled else None})
    return config.model_copy(update={"privacy": settled})


def build_strategy(config: RunConfig) -> Strategy:
    """The run's strategy, told whether the head is trained.

    Raises:
        ConfigError: There is no such strategy, or it does not take these options.
    """
    if "train_head" in config.strategy.options:
        raise ConfigError('strategy.options.train_head is not yours to set; use model.head = "train" or "frozen"')
    return load(config.strategy.name, {**config.strategy.options, "train_head": config.model.head == "train"})
