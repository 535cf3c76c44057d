"""The configuration: sections and defaults, overridden by files, environment and flags."""

from instep.config.loading import ConfigError as ConfigError
from instep.config.loading import explain_config as explain_config
from instep.config.loading import load_config as load_config
from instep.config.loading import unknown_variables as unknown_variables
from instep.config.sections import Config as Config
from instep.config.sections import HttpConfig as HttpConfig
from instep.config.sections import LogConfig as LogConfig
from instep.config.sections import ModelConfig as ModelConfig
from instep.config.sections import TransportConfig as TransportConfig
