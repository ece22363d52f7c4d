"""FedPEFT (Sun et al., IEEE BigData 2024, arXiv 2210.01708)."""

from dataclasses import dataclass
from typing import Literal

from fedloom.core.errors import ConfigError
from fedloom.core.schema import LORA, Role
from fedloom.strategies.api import Strategy
from fedloom.strategies.transforms.average import Average, select
from fedloom.strategies.transforms.transform import Composed

__all__ = ["FedPEFT"]

_ROLES: dict[str, frozenset[str]] = {
    "lora": LORA,
    "bias": frozenset({Role.BIAS}),
    "adapter": frozenset({"adapter_down", "adapter_down_bias", "adapter_up", "adapter_up_bias"}),
    "head": frozenset({Role.HEAD}),
}


@dataclass(frozen=True)
class FedPEFT(Composed):
    """Freeze the base model, train one named kind of parameter plus the head, and average them.

    The paper's rule is FedAvg on the tuned set, so on a run whose adapter holds just that kind the result is
    FedAvg's, bit for bit. What the name adds is the contract of the paper's prototypes: the kind is stated, a run
    whose adapter lacks it is refused, and nothing else is trained. The average is exact for "bias" and "head", not for
    "adapter"; for "lora", which the paper does not try, it has FedAvg's cross term (FFA and FedSVD have none).

    Args:
        kind: What is tuned beside the head: "lora", "bias" (the paper's FedPEFT-Bias), "adapter" (its FedPEFT-Adapter,
            the adapter kind bottleneck) or "head" (its head-tuning).
        train_head: Whether the head is trained; it is broadcast either way.

    Raises:
        ConfigError: The kind is unknown, or is the head while the head is frozen.
    """

    kind: Literal["lora", "bias", "adapter", "head"] = "lora"
    train_head: bool = True

    def build(self) -> Strategy:
        """Average the kind and the head."""
        if self.kind not in _ROLES:
            raise ConfigError(f"FedPEFT kind is {self.kind!r}; choose one of {', '.join(_ROLES)}")
        if self.kind == "head" and not self.train_head:
            raise ConfigError("FedPEFT kind 'head' with a frozen head trains nothing; set model.head = 'train'")
        return Average(select(*_ROLES[self.kind], head=self.train_head))
