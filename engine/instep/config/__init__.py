"""The configuration: sections and defaults, and how files, environment and flags are laid over them."""

from instep.config.errors import ConfigError, Problem
from instep.config.loading import explain_config, load_config, unknown_variables
from instep.config.sections import (
    Config,
    EngineConfig,
    HttpConfig,
    LimitsConfig,
    LogConfig,
    ModelConfig,
    RecordingConfig,
    ShutdownConfig,
    TransportConfig,
    VerifyConfig,
)

__all__ = [
    "Config",
    "ConfigError",
    "EngineConfig",
    "HttpConfig",
    "LimitsConfig",
    "LogConfig",
    "ModelConfig",
    "Problem",
    "RecordingConfig",
    "ShutdownConfig",
    "TransportConfig",
    "VerifyConfig",
    "explain_config",
    "load_config",
    "unknown_variables",
]
