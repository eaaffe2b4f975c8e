"""The data stages and the training, on Ray.

Whoever imports them imports transformers without scikit-learn, which it loads for one function that nothing here calls.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

NEEDS_IT = "transformers.generation.candidate_generator"
"""Assisted generation: every model of transformers that generates imports it, and with it scikit-learn where that is there."""


class _WithoutScikitLearn(MetaPathFinder):
    """Finds no module; before NEEDS_IT is found elsewhere, it lets transformers believe that scikit-learn is not installed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name == NEEDS_IT:
            vars(sys.modules["transformers.utils"])["is_sklearn_available"] = lambda: False
        return None


# 2 of the 4 CPU seconds that a model class takes to import, in each worker. Only transformers' metrics for GLUE miss it.
sys.meta_path.insert(0, _WithoutScikitLearn())
