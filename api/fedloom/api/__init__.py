"""fedloom in Python: `import fedloom.api as fl`.

    run = fl.Run(
        model="minilm-l6",
        task=fl.TextClassification(labels=["negative", "positive"]),
        adapter=fl.LoRA(rank=8),
        privacy=fl.DP(epsilon=6, delta=1e-5),
        train=fl.Train(steps=10, sampling_rate=0.1),
    )
    result = fl.simulate(run, data={"clinic-a": rows_a, "clinic-b": "b.csv"})

Importing it loads no torch; `simulate` does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedloom.api.callbacks import Callback, Checkpoint, EarlyStopping
from fedloom.api.load_adapter import load_adapter
from fedloom.api.result import Result
from fedloom.api.run import Model, Run, load
from fedloom.api.simulate import simulate
from fedloom.api.sweep import Sweep, Trial, sweep
from fedloom.client.tasks.audio_classification import AudioClassification
from fedloom.client.tasks.embedding_regression import EmbeddingRegression
from fedloom.client.tasks.generation.causal_lm import CausalLM
from fedloom.client.tasks.generation.image_text import ImageText
from fedloom.client.tasks.generation.instruct import Instruct
from fedloom.client.tasks.generation.seq2seq import Seq2Seq
from fedloom.client.tasks.generation.speech_recognition import SpeechRecognition
from fedloom.client.tasks.image_classification import ImageClassification
from fedloom.client.tasks.multi_label import MultiLabel
from fedloom.client.tasks.ordinal import Ordinal
from fedloom.client.tasks.preference.kto import KTO
from fedloom.client.tasks.preference.pairs import DPO, ORPO, Reward
from fedloom.client.tasks.question_answering import QuestionAnswering
from fedloom.client.tasks.regression import Regression
from fedloom.client.tasks.sentence_embedding import SentenceEmbedding
from fedloom.client.tasks.text_classification import TextClassification
from fedloom.client.tasks.token_classification import TokenClassification
from fedloom.core.config.data import DataSection as Data
from fedloom.core.config.evaluation import EvaluationSection as Evaluation
from fedloom.core.config.evaluation import FederatedEvaluationSection as FederatedEvaluation
from fedloom.core.config.file_format import Form
from fedloom.core.config.run import EngineSection as Engine
from fedloom.core.config.run import PrivacySection as DP
from fedloom.core.config.run import RoundsSection as RoundRules
from fedloom.core.config.run import SecureAggregationSection as SecureAggregation
from fedloom.core.config.run import StrategySection as Strategy
from fedloom.core.config.run import TrainSection as Train
from fedloom.core.config.run import UserLevelSection as UserLevel
from fedloom.core.config.run import WireSection as Wire
from fedloom.core.config.start import StartSection as Start
from fedloom.core.config.virtual_time import VirtualTimeSection as VirtualTime
from fedloom.core.errors import FedloomError
from fedloom.simulation.callbacks import SoFar, StopRun
from fedloom.strategies.alternating.as_lora import ASLoRA
from fedloom.strategies.alternating.la_lora import LALoRA
from fedloom.strategies.alternating.orthonormal import AlternatingOrthonormal
from fedloom.strategies.alternating.rolora import RoLoRA
from fedloom.strategies.drift.feddyn import FedDyn
from fedloom.strategies.drift.scaffold import SCAFFOLD
from fedloom.strategies.fedask import FedASK
from fedloom.strategies.fedavg import FedAvg
from fedloom.strategies.fedopt import FedOpt
from fedloom.strategies.fedpeft import FedPEFT
from fedloom.strategies.fedsvd import FedSVD
from fedloom.strategies.ffa import FFA
from fedloom.strategies.personal.feddpa import FedDPA
from fedloom.strategies.personal.fedper import FedPer
from fedloom.strategies.personal.fedsa import FedSALoRA
from fedloom.strategies.ranks.flexlora import FlexLoRA
from fedloom.strategies.ranks.hetlora import HetLoRA
from fedloom.strategies.ranks.raflora import RaFLoRA
from fedloom.strategies.stacking.fedex import FedEx
from fedloom.strategies.stacking.flora import FLoRA
from fedloom.strategies.stacking.florist import FLoRIST
from fedloom.strategies.stacking.lora_fair import LoRAFAIR

if TYPE_CHECKING:
    from fedloom.client.adapters.bias import Bias
    from fedloom.client.adapters.bottleneck.compacter import Compacter
    from fedloom.client.adapters.bottleneck.houlsby import Bottleneck
    from fedloom.client.adapters.head_only import HeadOnly as Head
    from fedloom.client.adapters.layer_norm import LayerNorm
    from fedloom.client.adapters.lora import LoRA
    from fedloom.client.adapters.low_rank.dual_lora import DualLoRA
    from fedloom.client.adapters.low_rank.hydra import Hydra
    from fedloom.client.adapters.low_rank.tucker import Tucker
    from fedloom.client.adapters.low_rank.vera import VeRA
    from fedloom.client.adapters.miss import MiSS
    from fedloom.client.adapters.scaling.ia3 import IA3
    from fedloom.client.adapters.scaling.peqa import PEQA
    from fedloom.client.adapters.scaling.ssf import SSF
    from fedloom.client.adapters.sparse.dsee import DSEE
    from fedloom.client.adapters.sparse.entries import Sparse
    from fedloom.client.adapters.spectral.lora_sb import LoRASB
    from fedloom.client.adapters.spectral.svfit import SVFit

__all__ = [
    "DP",
    "DPO",
    "DSEE",
    "FFA",
    "IA3",
    "KTO",
    "ORPO",
    "PEQA",
    "SCAFFOLD",
    "SSF",
    "ASLoRA",
    "AlternatingOrthonormal",
    "AudioClassification",
    "Bias",
    "Bottleneck",
    "Callback",
    "CausalLM",
    "Checkpoint",
    "Compacter",
    "Data",
    "DualLoRA",
    "EarlyStopping",
    "EmbeddingRegression",
    "Engine",
    "Evaluation",
    "FLoRA",
    "FLoRIST",
    "FedASK",
    "FedAvg",
    "FedDPA",
    "FedDyn",
    "FedEx",
    "FedOpt",
    "FedPEFT",
    "FedPer",
    "FedSALoRA",
    "FedSVD",
    "FederatedEvaluation",
    "FedloomError",
    "FlexLoRA",
    "Form",
    "Head",
    "HetLoRA",
    "Hydra",
    "ImageClassification",
    "ImageText",
    "Instruct",
    "LALoRA",
    "LayerNorm",
    "LoRA",
    "LoRAFAIR",
    "LoRASB",
    "MiSS",
    "Model",
    "MultiLabel",
    "Ordinal",
    "QuestionAnswering",
    "RaFLoRA",
    "Regression",
    "Result",
    "Reward",
    "RoLoRA",
    "RoundRules",
    "Run",
    "SVFit",
    "SecureAggregation",
    "SentenceEmbedding",
    "Seq2Seq",
    "SoFar",
    "Sparse",
    "SpeechRecognition",
    "Start",
    "StopRun",
    "Strategy",
    "Sweep",
    "TextClassification",
    "TokenClassification",
    "Train",
    "Trial",
    "Tucker",
    "UserLevel",
    "VeRA",
    "VirtualTime",
    "Wire",
    "load",
    "load_adapter",
    "simulate",
    "sweep",
]

_WITH_TORCH = {
    "Bias": ("fedloom.client.adapters.bias", "Bias"),
    "Bottleneck": ("fedloom.client.adapters.bottleneck.houlsby", "Bottleneck"),
    "Compacter": ("fedloom.client.adapters.bottleneck.compacter", "Compacter"),
    "DSEE": ("fedloom.client.adapters.sparse.dsee", "DSEE"),
    "Head": ("fedloom.client.adapters.head_only", "HeadOnly"),
    "DualLoRA": ("fedloom.client.adapters.low_rank.dual_lora", "DualLoRA"),
    "Hydra": ("fedloom.client.adapters.low_rank.hydra", "Hydra"),
    "IA3": ("fedloom.client.adapters.scaling.ia3", "IA3"),
    "LayerNorm": ("fedloom.client.adapters.layer_norm", "LayerNorm"),
    "LoRA": ("fedloom.client.adapters.lora", "LoRA"),
    "LoRASB": ("fedloom.client.adapters.spectral.lora_sb", "LoRASB"),
    "MiSS": ("fedloom.client.adapters.miss", "MiSS"),
    "PEQA": ("fedloom.client.adapters.scaling.peqa", "PEQA"),
    "SSF": ("fedloom.client.adapters.scaling.ssf", "SSF"),
    "SVFit": ("fedloom.client.adapters.spectral.svfit", "SVFit"),
    "Sparse": ("fedloom.client.adapters.sparse.entries", "Sparse"),
    "Tucker": ("fedloom.client.adapters.low_rank.tucker", "Tucker"),
    "VeRA": ("fedloom.client.adapters.low_rank.vera", "VeRA"),
}


def __getattr__(name: str) -> Any:
    """Adapter kinds, which bring torch, are imported when they are asked for."""
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _WITH_TORCH[name]
    return getattr(import_module(module), attribute)
