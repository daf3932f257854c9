"""`decode: fast` against `decode: exact`: how much faster, and how near the vectors are.

    python benchmarks/decode.py [PHOTOS_FOLDER] [--photos 60] [--width 4000]

The photos are enlarged to WIDTH px and saved as JPEG (quality 90), as a camera would have them: at a few hundred
pixels JPEG's scaled decoding has nothing to scale, and both ways give the same pixels.
"""

import argparse
import io
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from clipray.job import Model
from clipray.models.image_encoder import ImageEncoder
from clipray.models.preprocess import preprocess_of
from clipray.models.resolve import resolve
from clipray.pipelines.decode import DecodedImage, load_image
from clipray.pipelines.spec import Limits

PHOTOS = Path(__file__).parent.parent.parent / "shared" / "data" / "photos"
MODELS = (
    Model(name="demo", precision="fp32"),
    Model(name="demo-rn", precision="fp32"),
    Model(name="ViT-B-32", pretrained="random", seed=0, precision="fp32"),
)


def enlarged(path: Path, width: int) -> bytes:
    photo = Image.open(path).convert("RGB")
    sink = io.BytesIO()
    size = (width, round(width * photo.height / photo.width))
    photo.resize(size, Image.Resampling.LANCZOS).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def decoded(files: list[bytes], encoder: ImageEncoder, draft_px: int | None) -> tuple[np.ndarray, float]:
    """(n, height, width, 3) uint8 and core-ms a photo."""
    preprocess = preprocess_of(encoder.model)
    start = time.process_time()
    pictures = [load_image(None, data, Limits(), preprocess, draft_px) for data in files]
    ms = (time.process_time() - start) / len(files) * 1e3
    good = [p for p in pictures if isinstance(p, DecodedImage)]
    return np.stack([p.pixels for p in good]), ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=PHOTOS)
    parser.add_argument("--photos", type=int, default=60)
    parser.add_argument("--width", type=int, default=4000)
    options = parser.parse_args()
    paths = sorted(p for p in options.folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))[: options.photos]
    if not paths:
        sys.exit(f"no JPEG photos under {options.folder}: name a folder of photos")
    files = [enlarged(path, options.width) for path in paths]
    print(f"{len(files)} photos of {options.width} px width, {sum(map(len, files)) / len(files) / 2**20:.1f} MiB each")
    for model in MODELS:
        encoder = ImageEncoder(resolve(model), precision="fp32", batch_size=16)
        exact, exact_ms = decoded(files, encoder, None)
        fast, fast_ms = decoded(files, encoder, 2 * max(encoder.image_size))
        cosine = (encoder.encode(exact).vectors["clip"] * encoder.encode(fast).vectors["clip"]).sum(1)
        off = np.abs(exact.astype(np.int16) - fast).mean()
        print(
            f"{model.name}: exact {exact_ms:.0f} ms, fast {fast_ms:.0f} ms a photo; cosine mean {cosine.mean():.5f}, "
            f"lowest {cosine.min():.5f}; pixels differ by {off:.2f} of 255 on average"
        )


if __name__ == "__main__":
    main()
