"""A battery that every strategy must pass, for pytest: subclass `StrategyConformance` and give it yours.

::

    from fedloom.strategies.conformance import StrategyConformance

    class TestMine(StrategyConformance):
        def strategy(self):
            return Mine()

The laws hold for every weighted mean. A method that breaks one on purpose overrides it with its own closed form.
"""

from fedloom.strategies.conformance.drive import effective, respond, run_round
from fedloom.strategies.conformance.mean_laws import MeanLaws
from fedloom.strategies.conformance.state_laws import StateLaws
from fedloom.strategies.conformance.trait_laws import TraitLaws

__all__ = ["StrategyConformance", "effective", "respond", "run_round"]


class StrategyConformance(MeanLaws, TraitLaws, StateLaws):
    """The battery. Define `strategy`; define `schema` only for a method that needs another adapter."""
