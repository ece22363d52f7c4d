"""From a run file to what a coordinator is made of: the noise it asks for and the strategy it follows."""

import os
from dataclasses import fields, is_dataclass, replace

from fedloom.core.config.run import RunConfig
from fedloom.core.errors import ConfigError
from fedloom.core.privacy.accounting import calibrate, epsilon
from fedloom.core.privacy.spends import evaluation_spend, evaluations, round_participation
from fedloom.core.registry import build
from fedloom.server.privacy.user_ledger import settled
from fedloom.server.rounds.update_norm import moves_linearly
from fedloom.strategies.api import Strategy
from fedloom.strategies.transforms.buffered import Buffered
from fedloom.strategies.transforms.coded_broadcast import CodedBroadcast
from fedloom.strategies.transforms.noise import KEY_BYTES
from fedloom.strategies.transforms.norm_bound import NormBound
from fedloom.strategies.transforms.user_level_dp import UserLevel

__all__ = ["build_strategy", "calibrated"]


def calibrated(config: RunConfig, own: Strategy | None = None) -> RunConfig:
    """The run file with its noise multipliers and the weights of its clients filled in.

    Each is the smallest with which a client that takes part in every round it may stays within privacy.epsilon or
    user_level.epsilon, by the accountant that judges it later; rounds.spare_rounds may be done again within it. No
    credit is taken for rounds a client may sit out.

    Args:
        config: The run file.
        own: A strategy that is installed nowhere, in place of the one that it names.

    Raises:
        ConfigError: A privacy target cannot be reached.
    """
    privacy = config.privacy
    noise = privacy.noise_multiplier
    if privacy.enabled and noise is None:
        scored = [evaluation_spend(config)] * evaluations(config, config.run.rounds)
        if (cost := epsilon(scored, privacy.delta)) >= privacy.epsilon:
            raise ConfigError(
                f"{len(scored)} evaluations alone cost epsilon {cost:.2f} of privacy.epsilon = {privacy.epsilon:g}; "
                "raise federated_evaluation.every or its noise_multiplier"
            )
        rate, steps = round_participation(config)
        charged = steps * (config.run.rounds + config.rounds.spare_rounds)
        noise = calibrate(privacy.epsilon, privacy.delta, rate, charged, prior=scored)
    private = privacy.model_copy(update={"noise_multiplier": noise if privacy.enabled else None})
    user, weighting = settled(config), config.strategy.weighting
    if weighting == "auto":
        weighting = "examples" if _takes_weights(config, own) else "uniform"
    strategy = config.strategy.model_copy(update={"weighting": weighting})
    return config.model_copy(update={"privacy": private, "user_level": user, "strategy": strategy})


def _takes_weights(config: RunConfig, own: Strategy | None) -> bool:
    """Whether clients may and should count by their examples: in a private run each one's noise is divided by them."""
    if not config.privacy.enabled or config.secure_aggregation.enabled or config.user_level.enabled:
        return False
    try:
        strategy = own or build("strategies", config.strategy.name, config.strategy.options)
        return not strategy.traits.unweighted
    except ConfigError:
        return True  # whoever builds it says what is wrong; a site that only looks at the run need not have it


def build_strategy(config: RunConfig, own: Strategy | None = None) -> Strategy:
    """The run's strategy, told whether the head is trained, and wrapped for what the run file asks beside it.

    The noise's secret is drawn here from the operating system. It matters for a new run only: one that goes on has its
    own in its stored state.

    Args:
        config: The run file.
        own: A strategy that is installed nowhere, in place of the one that it names.

    Raises:
        ConfigError: There is no such strategy, it does not take these options, or it cannot be wrapped.
    """
    if "train_head" in config.strategy.options:
        raise ConfigError('strategy.options.train_head is not yours to set; use model.head = "train" or "frozen"')
    train_head = config.model.head == "train"
    strategy: Strategy
    if own is None:
        options = {**config.strategy.options, "train_head": train_head}
        strategy = build("strategies", config.strategy.name, options)
    elif is_dataclass(own) and any(field.name == "train_head" for field in fields(own)):
        strategy = replace(own, train_head=train_head)
    else:
        strategy = own
    strategy = _with_basis(strategy, config)
    if strategy.traits.linear:
        strategy = CodedBroadcast(strategy, config.wire.broadcast)
    if config.strategy.norm_bound is not None:
        strategy = NormBound(strategy, config.strategy.norm_bound)
    user = settled(config)
    if not user.enabled:
        return Buffered(strategy) if config.rounds.mode == "buffered" else strategy
    assert user.cohort is not None  # both are filled in by `settled`
    assert user.noise_multiplier is not None
    return UserLevel(
        strategy,
        os.urandom(KEY_BYTES),
        user.cohort,
        user.clip_norm,
        user.noise_multiplier,
        user.mechanism,
        user.target_quantile,
        user.clip_rate,
    )


def _with_basis(strategy: Strategy, config: RunConfig) -> Strategy:
    """A strategy that turns the basis of pairs, told to keep it where the run's local steps do not see it.

    Moves that are linear in the gradients are the same moves in every basis, and clients then need no new one. So it is
    with L2 clipping and noise that is alike in all directions.
    """
    open_ = is_dataclass(strategy) and any(field.name == "basis" for field in fields(strategy))
    if not open_ or "basis" in config.strategy.options or not moves_linearly(config):
        return strategy
    try:
        kept: Strategy = replace(strategy, basis="kept")  # type: ignore[type-var]  # it is a dataclass, see above
        return kept
    except ConfigError:
        return strategy  # another option needs the turning
