"""The step `reduce` on real features against scikit-learn's PCA in float64: the same rows in 1, 2, 7 and 64 random shards.

    python benchmarks/pca_demo.py [--pictures 20000] [--components 100]

Pictures of the built-in world go through the built-in ResNet; its last map has 512 channels, and the maxima of each
picture's five regions are its vectors. Each split is a folder of Parquet files that the step reduces, whitened and not.
Printed is the largest difference to scikit-learn of the variances (relative) and of the components (up to their sign),
and of the covariance of the whitened vectors to the identity.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import yaml
from reduce_and_cluster import write_vectors
from sklearn.decomposition import PCA

import clipray
from clipray.demo.world import write_world

SHARDS = 1, 2, 7, 64


def matrix(folder: Path, column: str) -> np.ndarray:
    """(n, d) float32."""
    found = pq.read_table(folder, columns=[column])[column].combine_chunks()
    return found.flatten().to_numpy().reshape(len(found), -1)


def run(home: Path, steps: list[dict]) -> None:
    job = {"output": str(home / "out"), "model": {"name": "demo-rn", "precision": "fp32"}, "steps": steps}
    (home / "job.yaml").write_text(yaml.safe_dump(job))
    clipray.run(home / "job.yaml")


def demo_vectors(home: Path, pictures: int) -> np.ndarray:
    """(5 · pictures, 512) float32."""
    start = time.time()
    world = write_world(home / "world", n_scenes=pictures, n_groups=0, n_words=0, n_places=0, side_px=64)
    print(f"{world.n_images:,} pictures drawn in {time.time() - start:.0f} s", flush=True)
    feature = {"layer": "layer4", "pooling": "mac", "levels": 2, "regions": "grid"}
    run(home, [{"embed_images": {"manifest": str(world.images), "features": {"conv": feature}}}])
    record = json.loads((home / "out/regions/_table.json").read_text())
    print(f"{record['rows']:,} vectors after {time.time() - start:.0f} s", flush=True)
    return matrix(home / "out/regions", "conv")


def off(home: Path, name: str, truth: PCA) -> str:
    table = (
        pl.read_parquet(home / f"out/{name}_components/*.parquet").filter(pl.col("component") >= 0).sort("component")
    )
    variances, vectors = table["variance"].to_numpy(), np.stack(table["vector"].to_numpy())
    signs = np.sign((vectors * truth.components_).sum(1))[:, None]
    return (
        f"variances {np.abs(variances / truth.explained_variance_ - 1).max():.1e}, "
        f"components {np.abs(vectors * signs - truth.components_).max():.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--components", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        x = demo_vectors(home, options.pictures)
        truth = PCA(options.components, svd_solver="covariance_eigh").fit(x.astype(np.float64))
        ratios = truth.explained_variance_ratio_
        print(
            f"{len(x):,} x {x.shape[1]}; {len(ratios)} components explain {ratios.sum():.1%}, the last {ratios[-1]:.1e}"
        )
        random = np.random.default_rng(0)
        for shards in SHARDS:
            (home / f"split-{shards}").mkdir()
            for n, rows in enumerate(np.array_split(random.permutation(len(x)), shards)):
                write_vectors(home / f"split-{shards}/{n:02d}.parquet", x[rows], ids=rows)
            source = {"path": str(home / f"split-{shards}"), "column": "vector"}
            plain, white = f"plain_{shards}", f"white_{shards}"
            common = {"input": source, "components": options.components}
            run(home, [{"reduce": {"name": plain, **common}}, {"reduce": {"name": white, "whiten": True, **common}}])
            z = matrix(home / f"out/{white}", "vector").astype(np.float64)
            identity = np.abs(np.cov(z, rowvar=False) - np.eye(z.shape[1])).max()
            print(f"{shards:3d} shards: {off(home, plain, truth)}, whitened covariance {identity:.1e}", flush=True)


if __name__ == "__main__":
    main()
