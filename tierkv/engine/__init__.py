"""The bundled engine: transformers models on paged attention, with continuous batching."""

from tierkv.engine.config import EngineConfig
from tierkv.engine.engine import ConnectorFactory, Engine
from tierkv.engine.output import Output, RequestOutput, Sample
from tierkv.engine.pages import PrivatePages
from tierkv.engine.sampling import SamplingParams, TokenLogprobs
from tierkv.engine.stats import EngineStats, RequestStats

__all__ = [
    "ConnectorFactory",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "Output",
    "PrivatePages",
    "RequestOutput",
    "RequestStats",
    "Sample",
    "SamplingParams",
    "TokenLogprobs",
]
