"""A built-in world: drawn scenes with ground truth, and a small CLIP trained on them, so that everything runs offline.

``scenes``, ``places`` and ``world`` need NumPy, Pillow and pyarrow only.
"""

from pathlib import Path

MODEL_DIR = Path(__file__).parent / "model"
