"""What a target is once it has been opened: the model as it is, and how samples become its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from headrace.artifact import Subject
from headrace.errors import Unavailable
from headrace.runners.collate import Item


class Instance(msgspec.Struct, frozen=True):
    """A module that the user of the library has handed over as an object.

    Args:
        file: where the ladder's own process has pickled it, for its children alone.
        path: where those find the code of it.
        factory: ``module:function`` that makes another one, without its weights; empty if nobody says.
    """

    file: str
    path: list[str] = []
    factory: str = ""


@dataclass(frozen=True)
class Opened:
    """A model to begin with.

    Args:
        module: a torch module that is called with the inputs by name and gives one tensor of shape (items, …).
        prepare: one sample, as clients would send it, to arrays; raises `InvalidInput`.
        directory: a Hugging Face directory, ``None`` for other targets.
        archive: a file of torch's own, ``None`` for other targets.
        refuses: words of recipes that cannot be applied to it, with the reason.
        make_exportable: changes ``module`` into one that `torch.export` can trace, where it is not; raises
            `Unavailable`.
    """

    subject: Subject
    module: Any
    prepare: Callable[[Any], Item]
    directory: Path | None = None
    archive: Path | None = None
    refuses: Mapping[str, str] = field(default_factory=dict)
    make_exportable: Callable[[], None] | None = None

    def make_ready(self, engine: str, recipe: Sequence[str]) -> None:
        """Before the recipe is applied and, for engines other than torch, the module is exported.

        Raises:
            Unavailable: one of both cannot be done with this target; says why.
        """
        for word in recipe:
            if word in self.refuses:
                raise Unavailable(f"{word} cannot be applied: {self.refuses[word]}", hint=_MODULE)
        if engine == "torch" and list(recipe) == ["sdpa"] and not self._attends():
            raise Unavailable("the module has no attention that can be exchanged: not a model of transformers")
        if engine != "torch" and self.make_exportable is not None:
            self.make_exportable()

    def _attends(self) -> bool:
        return any(hasattr(part, "set_attn_implementation") for part in self.module.modules())


_MODULE = "give module:factory, which has the module itself"
