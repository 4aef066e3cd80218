"""Fused operators inside transformers' models: what `budwood.optimize` puts there.

registry.py keeps which module classes have a fused forward; llama.py, gpt2.py and bert.py are such
families, one file each; attention.py is an entry of transformers' attention registry; loss.py the
head with its loss; projections.py computes several linear layers of one input together.
"""

from .optimize import OptimizeReport, optimize, unoptimize

__all__ = ["OptimizeReport", "optimize", "unoptimize"]
