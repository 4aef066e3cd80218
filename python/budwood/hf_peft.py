"""Being an instance of `peft.PeftModel` without importing peft.

HF's Trainer and its relatives ask `isinstance(model, peft.PeftModel)` before they save and resume
adapters or accept a quantised base.
"""

from __future__ import annotations

import sys

_classes: dict[type, type] = {}


class LooksLikePeft:
    """Answers `isinstance` as the peft class of the same name, from the moment peft is imported."""

    # A fixed base class would miss a peft that is imported after the model was made. This class
    # body has no super(): the cell that super() reads has the same name as this property.
    @property
    def __class__(self) -> type:
        return with_peft_base(type(self))

    @__class__.setter
    def __class__(self, value: type) -> None:
        object.__dict__["__class__"].__set__(self, value)

    # pickle compares the class it makes with __class__.
    def __reduce_ex__(self, protocol: int) -> tuple:
        return _blank, (type(self),), self.__dict__


def _blank(own: type) -> object:
    return own.__new__(own)


def with_peft_base(own: type) -> type:
    """`own`, or once peft is imported a class that derives from it and from its namesake there."""
    peft = sys.modules.get("peft")
    base = getattr(peft, own.__name__, None) or getattr(peft, "PeftModel", None)
    if base is None or issubclass(own, base):
        return own
    if own not in _classes:
        members = {"__module__": own.__module__, "__doc__": own.__doc__}
        _classes[own] = type(own.__name__, (own, base), members)
    return _classes[own]
