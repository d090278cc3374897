"""What every section of a recipe is: frozen, strict, and aware of which of its keys were read."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, PrivateAttr


class Section(BaseModel):
    """A frozen group of recipe keys that records which of them were read.

    Reading `options.learning_rate` anywhere marks the key as read; dumping, comparing, hashing and printing do not. A
    key that the user set and that nothing read by the end of a run is our defect, and `LoadedRecipe.unread()` finds it.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    _reads: set[str] = PrivateAttr(default_factory=set)

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name in type(self).__pydantic_fields__:
            private = super().__getattribute__("__pydantic_private__")
            if private is not None:
                private["_reads"].add(name)
        return value

    def __eq__(self, other: object) -> bool:
        """Equal keys make equal sections, whoever has read them."""
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        """By the keys' values, mappings among them."""
        return hash((type(self), json.dumps(self.model_dump(mode="json"), sort_keys=True)))

    def reads(self) -> frozenset[str]:
        """The keys of this section that were read since it was made."""
        return frozenset(self._reads)
