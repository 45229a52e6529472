"""Published methods of parameter-efficient fine-tuning, put into any model by :func:`attach`."""

from .lora import LoRA
from .summary import Summary, TrainedModule
from .tuning import Tuning, attach, load

__all__ = ["LoRA", "Summary", "TrainedModule", "Tuning", "attach", "load"]
