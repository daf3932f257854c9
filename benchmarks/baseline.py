"""What clip-retrieval's inference does, in its essence: one process, fp32, a DataLoader with 2 workers, batches of 64.

python benchmarks/baseline.py MANIFEST.parquet OUT.npy
"""

import sys
import time

import numpy as np
import open_clip
import pyarrow.parquet as pq
import torch
from PIL import Image


class Photos(torch.utils.data.Dataset):
    def __init__(self, uris, preprocess):
        self.uris, self.preprocess = uris, preprocess

    def __len__(self):
        return len(self.uris)

    def __getitem__(self, index):
        return self.preprocess(Image.open(self.uris[index]))


def main(manifest: str, out: str) -> None:
    began = time.time()
    torch.manual_seed(0)
    network, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32")
    network.eval()
    uris = pq.read_table(manifest)["uri"].to_pylist()
    loader = torch.utils.data.DataLoader(Photos(uris, preprocess), batch_size=64, num_workers=2, prefetch_factor=2)
    parts, start = [], time.time()
    with torch.inference_mode():
        for batch in loader:
            parts.append(network.encode_image(batch, normalize=True).numpy())
    np.save(out, np.concatenate(parts))
    print(
        f"{len(uris)} photos, {time.time() - began:.1f} s in all, {len(uris) / (time.time() - start):.1f} a second when running"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
