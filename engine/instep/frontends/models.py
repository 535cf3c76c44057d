"""The models of a server as connections see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from instep.frontends.shards import Shard
from instep.streaming.api import Refusal
from instep.streaming.service import ModelService
from instep_client.protocol.codes import Code
from instep_client.protocol.wire import ServerInfo


@dataclass(slots=True, eq=False)
class Served:
    """A model as its connections see it."""

    service: ModelService
    info: ServerInfo
    """The contents of WELCOME."""

    def keep_as(self, name: str) -> None:
        """Change the name, because another version has replaced this one; connections and streams stay."""
        self.service.name, self.service.is_former = name, True
        self.info = replace(self.info, model=name)

    def refuse_what_is_new(self) -> None:
        """Refuse new connections, streams and frames, unless the service accepts them."""
        if not self.service.is_ready:
            if self.service.engine.journal.has_failed:
                raise Refusal(Code.SHUTTING_DOWN, "its recording has failed")
            raise Refusal(Code.SHUTTING_DOWN, sentence=self.service.leaves)

    def summary(self) -> tuple[int, int, int, int, int]:
        """The numbers of stepped frames, streams, connections, features and outputs."""
        engine = self.service.engine
        streams = engine.table.open_count + len(self.service.operations.hibernation)
        return engine.stats.frames_total, streams, len(engine.origins), self.info.features, self.info.outputs


class Models:
    """The models by name; the first one is the default. All are served by one shard."""

    def __init__(self, shard: Shard | None = None) -> None:
        self.shard = shard or Shard()
        self._models: dict[str, Served] = {}

    def __iter__(self) -> Iterator[Served]:
        return iter(list(self._models.values()))

    @property
    def default(self) -> Served:
        """The model for connections that name none."""
        return next(iter(self._models.values()))

    def find(self, name: str, may_use: Callable[[str], bool] = lambda name: True) -> Served:
        """The model of that name, or the first one where it is empty, among those that the asker may use.

        Raises:
            Refusal: with UNKNOWN_MODEL.
        """
        models = [each for each in self._models if may_use(each)]
        if name not in models and (name or not models):
            close = get_close_matches(name, models, n=1)
            meant = f"did you mean {close[0]!r}? " if close else ""
            raise Refusal(Code.UNKNOWN_MODEL, f"{name!r:.120}; {meant}it serves {', '.join(map(repr, models))}")
        return self._models[name or models[0]]

    def add(self, served: Served) -> None:
        """Add a model, replacing one of the same name."""
        self._models[served.service.name] = served

    def remove(self, served: Served) -> None:
        """Remove a model."""
        del self._models[served.service.name]

    def reorder(self, names: Sequence[str]) -> None:
        """List the models of these names first."""
        self._models = {name: self._models[name] for name in dict.fromkeys((*names, *self._models))}
