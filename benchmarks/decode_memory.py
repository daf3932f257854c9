"""Peak memory of decoding: what small files can make of the decoding threads of a worker.

    python benchmarks/decode_memory.py [--megapixels 25] [--threads 4] [CASE …]

Each case is a file of about 1 MB at most, decoded twice by each of the threads in a process of its own, with `max_pixels` set to its
number of pixels or to what is said. Figures are above the idle worker, in bytes for each of `max_pixels`; Linux only.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pillow_heif
from PIL import Image

pillow_heif.register_heif_opener()
MAY_TAKE_BYTES = 4 * 2**30  # above the idle worker; what takes more fails
TURNED = Image.Exif()
TURNED[0x0112] = 6


def saved(kind: str, mode: str, **options: Any) -> Callable[[int], bytes]:
    def make(side: int) -> bytes:
        image = Image.new(mode, (side, side))
        if mode == "P":
            image.putpalette([n % 256 for n in range(768)])
        sink = io.BytesIO()
        image.save(sink, kind, **options)
        return sink.getvalue()

    return make


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(height: int, width: int, bits: int, colour: int, samples: int, extra: bytes = b"") -> bytes:
    packer, row = zlib.compressobj(9), b"\0" + bytes((width * samples * bits + 7) // 8)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def of_png(bits: int, colour: int, samples: int, extra: bytes = b"") -> Callable[[int], bytes]:
    return lambda side: png(side, side, bits, colour, samples, extra)


def icon(side: int) -> bytes:
    """An ICO that says 16 x 16 px and holds twice `side` squared, which is more than `max_pixels`."""
    large = png(side, 2 * side, 8, 6, 4)
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(large), 22) + large


def huge_tile(side: int) -> bytes:
    """A TIFF of 16 x 16 px in one tile of twice `side` squared."""
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(2 * side)) for _ in range(side)) + packer.flush()
    data += b"\0" * (len(data) % 2)
    entries = [
        (256, 4, 16), (257, 4, 16), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1),
        (322, 4, 2 * side // 16 * 16), (323, 4, side // 16 * 16), (324, 4, 8), (325, 4, len(data)),
    ]  # fmt: skip
    body = b"".join(
        struct.pack("<HHII" if code == 4 else "<HHIHxx", tag, code, 1, value) for tag, code, value in entries
    )
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(entries)) + body + bytes(4)


STRIP = "tiff_deflate"
CASES: dict[str, Callable[[int], bytes]] = {
    "JPEG": saved("JPEG", "RGB", quality=50),
    "JPEG, turned": saved("JPEG", "RGB", quality=50, exif=TURNED),
    "JPEG, progressive": saved("JPEG", "RGB", quality=20, progressive=True, subsampling=0),
    "JPEG, progressive CMYK": saved("JPEG", "CMYK", quality=20, progressive=True),
    "JPEG, CMYK": saved("JPEG", "CMYK", quality=20),
    "PNG": of_png(8, 2, 3),
    "PNG, grey": of_png(8, 0, 1),
    "PNG, alpha": of_png(8, 6, 4),
    "PNG, alpha, turned": saved("PNG", "RGBA", exif=TURNED),
    "PNG, 16-bit grey": of_png(16, 0, 1),
    "PNG, 16-bit alpha": of_png(16, 6, 4),
    "PNG, transparent palette": saved("PNG", "P", transparency=bytes(range(256))),
    "PNG, 1 MB of text bombs": of_png(8, 2, 3, b"".join(chunk(b"zTXt", b"k%d\0\0" % n + zlib.compress(bytes(2**20), 9)) for n in range(600))),
    "PNG of 1 px height": lambda side: png(1, min(side * side, 60_000), 8, 2, 3),
    "PNG of 1 px width": lambda side: png(min(side * side, 60_000), 1, 8, 2, 3),
    "GIF": saved("GIF", "P"),
    "WebP": saved("WEBP", "RGB", quality=10, method=0),
    "WebP, lossless alpha": saved("WEBP", "RGBA", lossless=True, exact=True, quality=0, method=0),
    "AVIF": saved("AVIF", "RGB", speed=10, quality=30, subsampling="4:4:4"),
    "AVIF, alpha": saved("AVIF", "RGBA", speed=10, quality=30, subsampling="4:4:4"),
    "HEIC": saved("HEIF", "RGB", quality=30, chroma=444),
    "HEIC, alpha": saved("HEIF", "RGBA", quality=30, chroma=444),
    "JPEG 2000": saved("JPEG2000", "RGB"),
    "JPEG 2000, alpha": saved("JPEG2000", "RGBA"),
    "JPEG 2000, 16-bit grey": saved("JPEG2000", "I;16"),
    "TIFF, LZW": saved("TIFF", "RGB", compression="tiff_lzw"),
    "TIFF, alpha in one strip": lambda side: saved("TIFF", "RGBA", compression=STRIP, tiffinfo={278: side})(side),
    "TIFF, floats in one strip": lambda side: saved("TIFF", "F", compression=STRIP, tiffinfo={278: side})(side),
    "TIFF, turned": saved("TIFF", "RGB", compression=STRIP, tiffinfo={0x0112: 6}),
    "TIFF, group 4": saved("TIFF", "1", compression="group4"),
    "TIFF, 16 px in a huge tile": huge_tile,
    "ICO, 16 px that are more": icon,
    "TGA, run lengths": saved("TGA", "RGBA", compression="tga_rle"),
    "QOI": saved("QOI", "RGB"),
}  # fmt: skip


def status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def measured(data: bytes, max_pixels: int, threads: int) -> dict[str, Any]:
    """Above the idle worker; in this process, which decodes nothing else."""
    import pyarrow as pa

    from clipray.job import Model
    from clipray.models.resolve import resolve
    from clipray.pipelines.decode import DecodedImage
    from clipray.pipelines.image_loader import ImageLoader
    from clipray.pipelines.spec import ImageSpec, Limits

    model, limits = resolve(Model(name="demo")), Limits(max_pixels=max_pixels)
    loader = ImageLoader(ImageSpec(model=model, limits=limits, schema=pa.schema([]), threads=threads))
    list(loader.load(pa.table({"bytes": [png(300, 300, 8, 6, 4)] * 8}), 8))
    resource.setrlimit(resource.RLIMIT_DATA, (status_bytes("VmData") + MAY_TAKE_BYTES,) * 2)
    block = pa.table({"bytes": [data] * (2 * threads)})
    Path("/proc/self/clear_refs").write_text("5")
    idle, start = status_bytes("VmRSS"), time.perf_counter()
    results = list(loader.load(block, len(block)))
    peak = status_bytes("VmHWM") - idle
    said = [
        f"{result.height} x {result.width} px" if isinstance(result, DecodedImage) else result.reason
        for result in results
    ]
    return {"peak_bytes": peak, "seconds": time.perf_counter() - start, "said": ", ".join(sorted(set(said)))}


def run(case: str, options: argparse.Namespace) -> None:
    side = int((options.megapixels * 1e6) ** 0.5) // 16 * 16
    while len(data := CASES[case](side)) > 1_050_000 and side > 64:
        side = side * 3 // 4 // 16 * 16
    max_pixels = round(options.megapixels * 1e6)
    command = [sys.executable, __file__, "--inside", str(max_pixels), "--threads", str(options.threads)]
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    if done.returncode:
        print(
            f"| {case} | {len(data) / 1e6:.2f} | failed: {done.stderr.decode().strip().splitlines()[-1:]} |", flush=True
        )
        return
    found = json.loads(done.stdout)
    share = found["peak_bytes"] / max_pixels
    print(f"| {case} | {len(data) / 1e6:.2f} | {found['said']} | {share:.1f} | {found['seconds']:.1f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megapixels", type=float, default=25)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--inside", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}")
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(measured(sys.stdin.buffer.read(), options.inside, options.threads)))
        return
    print("| file | MB | result | bytes for each of max_pixels | s |\n|---|---|---|---|---|")
    for case in options.cases or CASES:
        run(case, options)


if __name__ == "__main__":
    main()
