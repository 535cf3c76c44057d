"""The configuration: sections and defaults, overridden by files, environment and flags."""

from instep.config.loading import ConfigError, explain_config, load_config, unknown_variables
from instep.config.sections import (
    Config,
    EngineConfig,
    HttpConfig,
    LimitsConfig,
    LogConfig,
    ModelConfig,
    RecordingConfig,
    TransportConfig,
)

__all__ = [
    "Config",
    "ConfigError",
    "EngineConfig",
    "HttpConfig",
    "LimitsConfig",
    "LogConfig",
    "ModelConfig",
    "RecordingConfig",
    "TransportConfig",
    "explain_config",
    "load_config",
    "unknown_variables",
]
