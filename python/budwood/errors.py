"""The one exception of the package."""

from .version_check import load_extension

#: Every failure budwood reports, in C++ and in Python; a ValueError and a RuntimeError.
Error = load_extension().Error
