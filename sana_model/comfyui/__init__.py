"""Nodes for ComfyUI. A link to this folder in ComfyUI's `custom_nodes` installs them (README.md beside this file).

ComfyUI loads this file by its path, and the package around it may not be installed: then it is loaded from where the link
leads.
"""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

if find_spec("sana_model") is None:
    folder = Path(__file__).resolve().parents[1]
    spec = spec_from_file_location("sana_model", folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None
    sys.modules["sana_model"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["sana_model"])

from sana_model.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
