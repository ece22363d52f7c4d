"""LoRA: W = W0 + (alpha / r)·B·A on linear layers (Hu et al., ICLR 2022, arXiv 2106.09685).

Options are papers of their own: rsLoRA's scale alpha / sqrt(r) (Kalajdzievski, 2023, arXiv 2312.03732), and DoRA's
magnitudes, W = m ⊙ V / ‖V‖ row by row with V = W0 + s·B·A and m starting as ‖W0‖ (Liu et al., ICML 2024, 2402.09353),
and the starts PiSSA and OLoRA, see `fedloom.client.adapters.spectral.lora_start`.

GPT-2's Conv1D is a linear layer whose weight is stored transposed, (in, out). Its pair is like any other, A: r×in and
B: out×r; PEFT notes the storage as fan_in_fan_out.
"""

import math
import re
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as _KNOWN
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedloom.client.adapters.api import Host, Traits
from fedloom.client.adapters.head import PEFT_HEADS, Head
from fedloom.client.adapters.numbered_layers import Layers, in_layers, numbered_layers
from fedloom.client.adapters.slot import Slot, schema_name
from fedloom.client.adapters.spectral.lora_start import FROM_WEIGHTS, begin_from_weights, change
from fedloom.client.privacy.dp_sgd.grad_sample import inside, routers
from fedloom.core.config.parsing import Section
from fedloom.core.errors import ModelError
from fedloom.core.limits import MAX_RANK
from fedloom.core.peft_settings import PREFIX
from fedloom.core.schema import Role, Start, TensorSpec

__all__ = ["MAGNITUDE", "LoRA", "Targets", "carrier", "linear_targets", "with_pairs"]


Targets = tuple[str, ...] | Literal["auto", "all-linear"]
"""Names (suffixes) of linear layers, or which of them to take."""

_QUERY_KEY_VALUE = ("query", "key", "value"), ("q", "k", "v")
"""Words by which models tell the three projections of an attention apart, in names alike but for them."""
_FUSED = re.compile(r"qkv|query_key_value", re.IGNORECASE)
"""What a name has if one layer is all three."""

MAGNITUDE = "lora_magnitude"
"""Role of DoRA's m, shape (out,), as its change from the norms of the rows of W0."""


class LoRA(Section):
    """A low-rank pair on every target layer: W = W0 + (alpha / rank) B A.

    Trained parameters: r for each input and each output of a target layer. The average of both factors is not that of
    the models, unless a strategy trains one alone.
    """

    traits: ClassVar[Traits] = Traits()
    rank: int = Field(default=8, ge=1, le=MAX_RANK)
    """LoRA rank r."""
    alpha: float = Field(default=16.0, ge=1e-4, le=1e4)
    """LoRA alpha; the scale is alpha / rank."""
    targets: Targets = "auto"
    """Names of the linear layers that get a pair, or parts of full names such as decoder.fc2. "all-linear": every
    linear layer but the head, the output and routers of experts. "auto": those that PEFT has for the base model's kind;
    where it has none, the queries and values of the attention, and where there are none either, all."""
    layers: Layers = None
    """Numbers of the transformer layers that get pairs: 0 is the first, -1 the last. None: all, and targets outside of
    them. PEFT's layers_to_transform."""
    rslora: bool = False
    """rsLoRA: the scale is alpha / sqrt(rank), under which high ranks learn as fast as low ones."""
    dora: bool = False
    """DoRA: the length of every row of W is trained beside the pair, one parameter for each output. Inexact under
    averaging, whatever the strategy."""
    start: Literal["kaiming", "orthogonal", "pissa", "olora"] = "kaiming"
    """What a pair is before the first round. kaiming: A is drawn as by PEFT, B zero. orthogonal: A is drawn with
    orthonormal rows, B zero. pissa: the leading singular vectors of W0 in both, which are taken out of the frozen
    weight. olora: likewise, the first columns of its QR decomposition. These two need the base model in float32, and
    strategies that multiply the factors refuse them."""

    @property
    def scale(self) -> float:
        """The s in W = W0 + s B A."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def attach(self, host: Host) -> PeftModel:
        """The base model with one pair on every target layer.

        Raises:
            ModelError: No layer has one of the target names, a target is not a linear layer, or the pretrained weight
                does not give the start.
        """
        model = with_pairs(
            host,
            self.targets,
            self.rank,
            self.alpha,
            layers=self.layers,
            use_rslora=self.rslora,
            use_dora=self.dora,
        )
        if self.start in FROM_WEIGHTS:
            begin_from_weights(model, self.start, self.scale)
        return model

    def slots(self, model: PeftModel) -> list[Slot]:
        """The factors of every pair, A before B, and then its magnitudes if there are any, in model order."""
        found: list[Slot] = []
        for name, parameter in model.named_parameters():
            for mark, role in ((".lora_A.", Role.LORA_A), (".lora_B.", Role.LORA_B)):
                if mark in name:
                    found.append(self._factor(name, name.partition(mark)[0], role, parameter))
            if (mark := ".lora_magnitude_vector.") in name:
                module = name.partition(mark)[0].removeprefix(PREFIX)
                spec = TensorSpec(schema_name(name), module, MAGNITUDE, tuple(parameter.shape), Start.ZERO)
                found.append(Slot(spec, parameter, origin=parameter.detach().clone()))
        return found

    def _factor(self, name: str, layer: str, role: str, factor: nn.Parameter) -> Slot:
        module = layer.removeprefix(PREFIX)
        if self.start in FROM_WEIGHTS:
            return change(self.start, module, role, factor)
        start = Start.ORTHOGONAL if self.start == "orthogonal" and role == Role.LORA_A else Start.DRAWN
        return Slot(TensorSpec(schema_name(name), module, role, tuple(factor.shape), start), factor)

    def merge(self, model: PeftModel) -> None:
        """Nothing: PEFT merges pairs."""


def carrier(
    host: Host, targets: Targets, bias: str = "none", saved: tuple[str, ...] = (), layers: Layers = None
) -> PeftModel:
    """A PeftModel for kinds that PEFT does not know: rank-1 pairs whose B stays zero. It loads anywhere.

    Args:
        host: The base model.
        targets: Layers that get such a pair; PEFT needs one.
        bias: Which biases PEFT saves with it, none or all.
        saved: Full names of modules beside the head of which PEFT saves a copy, which takes their place.
        layers: Numbers of the transformer layers whose targets get a pair; None is all.

    Raises:
        ModelError: No layer has one of the target names.
    """
    return with_pairs(host, targets, 1, 1.0, saved, layers, bias=bias)


def with_pairs(
    host: Host,
    targets: Targets,
    rank: int,
    alpha: float,
    saved: tuple[str, ...] = (),
    layers: Layers = None,
    **options: Any,
) -> PeftModel:
    """A PeftModel with one pair on every target layer, which saves the head with them.

    Args:
        host: The base model.
        targets: Layers that get a pair.
        rank: r.
        alpha: PEFT's alpha.
        saved: As for `carrier`.
        layers: As for `carrier`.
        options: Further ones of PEFT's LoraConfig.

    Raises:
        ModelError: No layer has one of the target names, or a target is not a linear layer.
    """
    names = linear_targets(host.base, targets, host.head, layers)
    # PEFT adds the names it knows to those it is given, and does so again where they are given.
    heads = [name for name in host.head.modules if not host.task_type or name not in PEFT_HEADS]
    transposed = any(isinstance(host.base.get_submodule(name), Conv1D) for name in names)
    if layers is not None:
        lists, numbers = numbered_layers(host.base, layers)
        # PEFT matches full names by themselves; this tells its users which layers these are.
        pattern = sorted({each.rpartition(".")[2] for each in lists})
        options = {**options, "layers_to_transform": list(numbers), "layers_pattern": pattern}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=names,
        lora_dropout=0.0,
        task_type=host.task_type,
        modules_to_save=[*heads, *saved] or None,
        fan_in_fan_out=transposed,
        **options,
    )
    with warnings.catch_warnings():
        # peft corrects the setting for each linear layer among Conv1D layers, and says so every time.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        return get_peft_model(host.base, config)


def linear_targets(base: PreTrainedModel, targets: Targets, head: Head, layers: Layers = None) -> list[str]:
    """Full names of the linear layers that get a pair; never any of the head, nor of a pooler that no head reads.

    Args:
        base: The model.
        targets: Last names of layers, or parts of full names that lead to one, such as decoder.fc2; "all-linear" for
            each but the output layer and the routers of a mixture of experts; "auto" for those that PEFT has for this
            kind of model; where it has none, for the queries and values of the attention, or one layer that is both;
            and where there are none either, as "all-linear".
        head: The model's head, which is trained whole.
        layers: Numbers of the transformer layers that they are in; None is all, and what is outside of them.

    Raises:
        ModelError: A target name matches nothing, or there is no such layer; the message lists what the model has.
    """
    apart = (*head.modules, "pooler") if base.base_model is base else head.modules
    linear = [
        name
        for name, module in base.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not inside(name, apart)
    ]
    linear = in_layers(base, layers, linear)
    if isinstance(targets, str):
        output, fixed = base.get_output_embeddings(), routers(base)
        linear = [name for name in linear if base.get_submodule(name) is not output and not inside(name, fixed)]
    last = {name.rpartition(".")[2] for name in linear}
    if isinstance(targets, str):
        chosen = _usual(base, linear) if targets == "auto" else set()
        targets = tuple(chosen or last)
    unknown = [each for each in sorted(targets) if not any(_leads(each, name) for name in linear)]
    if unknown:
        where = "" if layers is None else f" in adapter.layers = {list(layers)}"
        raise ModelError(
            f"adapter.targets {', '.join(unknown)}: {type(base).__name__} has no such linear layer{where}; "
            f'it has {", ".join(sorted(last))}; name some of these, or set adapter.targets = "auto"'
        )
    return [name for name in linear if any(_leads(each, name) for each in targets)]


def _leads(target: str, name: str) -> bool:
    """Whether a full name ends as a target does, and has what is before that in it, in this order.

    >>> [_leads(each, "model.decoder.layers.0.fc2") for each in ("fc2", "decoder.fc2", "encoder.fc2", "decoder")]
    [True, True, False, False]
    """
    (*before, last), (*outer, own) = target.split("."), name.split(".")
    rest = iter(outer)
    return own == last and all(part in rest for part in before)


def _usual(base: PreTrainedModel, linear: list[str]) -> set[str]:
    """Last names of the layers that usually get a pair: as PEFT has them, or queries and values; perhaps none."""
    last = {name.rpartition(".")[2] for name in linear}
    known = _KNOWN.get(base.config.model_type)
    # For a few models PEFT has a pattern of full names, which fits no other class of the family.
    return last.intersection(known if isinstance(known, list) else ()) or set(_queries_and_values(linear))


def _queries_and_values(linear: list[str]) -> Iterator[str]:
    """Last names of linear layers that stand beside a key, alike but for one word, and of those that are all three.

    >>> sorted(set(_queries_and_values(["h.q_lin", "h.k_lin", "h.v_lin", "h.out", "x.Wqkv"])))
    ['Wqkv', 'q_lin', 'v_lin']
    """
    names = set(linear)
    for full in linear:
        parent, dot, name = full.rpartition(".")
        if _FUSED.search(name):
            yield name
        for query, key, value in _QUERY_KEY_VALUE:
            for place in re.finditer(query, name):
                found = [name[: place.start()] + each + name[place.end() :] for each in (query, key, value)]
                if all(f"{parent}{dot}{each}" in names for each in found):
                    yield from (found[0], found[2])
