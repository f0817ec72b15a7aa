"""Every setting of a run: one YAML file, dotted overrides after it, typed once here.

`load(path, overrides)` is the only way in. Models are frozen and refuse unknown keys,
with the nearest valid key in the message. Paths stay as written, relative to the folder
the command runs in.
"""

from kdhiera.config.cache import RayConfig
from kdhiera.config.evaluation import EvaluateConfig
from kdhiera.config.loading import ConfigError, dump, load
from kdhiera.config.run import RunConfig
from kdhiera.config.teachers import ScoresConfig, TeacherConfig
from kdhiera.config.training import ObjectiveConfig, StudentConfig, TrainConfig
from kdhiera.config.videos import DecodeConfig

__all__ = [
    "ConfigError",
    "DecodeConfig",
    "EvaluateConfig",
    "ObjectiveConfig",
    "RayConfig",
    "RunConfig",
    "ScoresConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "dump",
    "load",
]
