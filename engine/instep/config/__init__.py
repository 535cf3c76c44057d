"""The configuration: sections and defaults, and how files, environment and flags are laid over them."""

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
