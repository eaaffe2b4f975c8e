"""A worker imports transformers, and what it generates with, without scikit-learn."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMPORT = """
import sys
import pipelines
from transformers import CLIPModel, Gemma2ForCausalLM
assert "transformers.generation.candidate_generator" in sys.modules and "sklearn" not in sys.modules
from sklearn.metrics import roc_curve
"""


def test_models_that_generate_are_imported_without_scikit_learn() -> None:
    """And who asks for scikit-learn itself gets it."""
    run = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
