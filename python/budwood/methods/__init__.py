"""Methods that live in C++, on the modules of any torch model.

`families.py` says where the places are, `mirror.py` makes a C++ slot for each of them, the other
files put what a slot computes into the model's forward.
"""

from .families import Family, Site, register_family
from .mirror import Mirror, mirror_of

__all__ = ["Family", "Mirror", "Site", "mirror_of", "register_family"]
