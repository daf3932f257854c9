"""open_clip without torch's compiler, which must still be there for those who ask."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
from clipray.models.imports import import_open_clip
import_open_clip()
import open_clip, timm, torch
assert "sympy" not in sys.modules
with torch.inference_mode():
    x = torch.rand(1, 3, 32, 32)
    network = open_clip.CLIP(8, {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32}, {"layers": 1, "heads": 1, "width": 8})
    expected = network.encode_image(x)
    assert timm.create_model("test_vit", num_classes=3)(torch.rand(1, 3, 160, 160)).shape == (1, 3)
assert "torch._dynamo" not in sys.modules
compiled = torch.compile(network.visual, backend="eager")
with torch.inference_mode():
    assert torch.allclose(compiled(x), expected)
assert "torch._dynamo" in sys.modules
"""


def test_open_clip_and_timm_work_without_the_compiler_and_the_compiler_works_after_them() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
