"""Published methods of parameter-efficient fine-tuning, put into any model by :func:`attach`."""

from .attach import attach, load
from .check_trainable import Finding, TrainableReport, check_trainable
from .combine import Combination, CombinedLayer, combine
from .lora import LoRA
from .merge_report import LayerError, MergeReport, OutputChange
from .multi_lora import MultiLoRA
from .summary import Summary, TrainedModule
from .tuning import Tuning

__all__ = [
    "Combination",
    "CombinedLayer",
    "Finding",
    "LayerError",
    "LoRA",
    "MergeReport",
    "MultiLoRA",
    "OutputChange",
    "Summary",
    "TrainableReport",
    "TrainedModule",
    "Tuning",
    "attach",
    "check_trainable",
    "combine",
    "load",
]
