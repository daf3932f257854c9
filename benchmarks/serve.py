"""The served page over a large run: seconds to the first page and answer, latencies, clients at once, memory.

    python benchmarks/serve.py [--rows 1000000] [--towers small] [--home FOLDER] [--queries 400] [--clients 20]

A few images are embedded by a model of random weights, whose towers are those of ViT-B-32 or small ones, with vectors of
`--columns`; the table then gets clustered
random vectors under more ids, with columns to filter by, and an index of `type: auto`. The server and its clients share the
cores of this machine. Each text is new, so no answer comes from what is kept. `--home` keeps the run for another time.
"""

import argparse
import http.client
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import psutil
import pyarrow as pa
import yaml
from index import clustered
from PIL import Image

from clipray import tables
from clipray.storage.folder import Folder

SHARD_ROWS = 131_072
WORDS = [
    *("red", "blue", "old", "small", "wet", "dark", "shiny", "wooden", "broken", "striped"),
    *("dog", "car", "tree", "house", "boat", "cup", "street", "horse", "chair", "cloud"),
    *("near", "under", "behind", "beside", "with", "without", "inside", "above", "like", "against"),
]
PORT = 8231
FILTERS = ("label = 'class 007'", "label = 'class 007' and width > 900", "price < 0.001", "height between 300 and 310")


SMALL = {
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 256, "patch_size": 16, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4},
}


def save_model(home: Path, columns: int, towers: str) -> str:
    """A model whose vectors have `columns` values, with random weights, as a `local-dir:` name."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    config = (SMALL if towers == "small" else open_clip.get_model_config(towers)) | {"embed_dim": columns}
    folder = home / "model"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    weights = open_clip.CLIP(**config).state_dict()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def clipray(home: Path, job: dict) -> None:
    path = home / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    subprocess.run([Path(sys.executable).parent / "clipray", "run", path], check=True, stdout=subprocess.DEVNULL)


def make_run(home: Path, rows: int, columns: int, towers: str) -> None:
    """A run of `rows` images with an index."""
    rng = np.random.default_rng(0)
    (home / "images").mkdir()
    for number in range(16):
        noise = rng.integers(0, 255, (224, 224, 3), np.uint8)
        Image.fromarray(noise).save(home / "images" / f"{number:02d}.jpg")
    few = {
        "image_id": [f"{number:02d}" for number in range(16)],
        "uri": [str(home / "images" / f"{number:02d}.jpg") for number in range(16)],
        "label": ["x"] * 16,
        "price": [0.5] * 16,
    }
    import pyarrow.parquet as pq

    pq.write_table(pa.table(few), home / "few.parquet")
    model = {"name": save_model(home, columns, towers)}
    embed = {"embed_images": {"manifest": str(home / "few.parquet"), "keep": ["label", "price"]}}
    clipray(home, {"output": str(home / "run"), "model": model, "steps": [embed]})
    _grow(Folder(str(home / "run" / "images")), rows, columns, few["uri"])
    clipray(home, {"output": str(home / "run"), "steps": [{"index": {"input": "images.clip"}}]})


def _grow(folder: Folder, rows: int, columns: int, uris: list[str]) -> None:
    """Make a finished table of images one of `rows` rows of the same model."""
    record = tables.read_record(folder)
    name = record.files[0]["name"]
    _, schema, metadata = tables.shard_footer(folder, name)
    metadata = tables.provenance_of(metadata)
    tables.reopen(folder)
    folder.remove(name)
    x, rng, shards = clustered(rows, columns), np.random.default_rng(1), []
    for start in range(0, rows, SHARD_ROWS):
        part = x[start : start + SHARD_ROWS]
        n = len(part)
        values = {
            "image_id": [f"folder/image-{number:08d}.jpg" for number in range(start, start + n)],
            "uri": [uris[number % len(uris)] for number in range(start, start + n)],
            "height": rng.integers(200, 1_000, n).astype(np.int32),
            "width": rng.integers(200, 1_000, n).astype(np.int32),
            "label": [f"class {number:03d}" for number in rng.integers(0, 100, n)],
            "price": rng.random(n),
            "clip": tables.vector_array(part, schema.field("clip").type),
        }
        arrays = [
            pa.array(values[f.name], f.type) if f.name in values and f.name != "clip" else values.get(f.name, pa.nulls(n, f.type))
            for f in schema
        ]  # fmt: skip
        data = pa.table(arrays, schema=schema.remove_metadata())
        shards.append(tables.write_shard(folder, f"part-{start:012d}.parquet", "images", data, metadata))
    facts = {name: getattr(record, name) for name in ("fingerprint", "inputs", "settings", "provenance", "summary")}
    tables.commit(folder, "images", schema, shards, finished_at=tables.now(), **facts)


class Client:
    """A connection that is kept open."""

    def __init__(self) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=60)

    def get(self, path: str, **query: object) -> tuple[int, bytes]:
        self._connection.request("GET", f"{path}?{urlencode(query, doseq=True)}" if query else path)
        answer = self._connection.getresponse()
        return answer.status, answer.read()

    def seconds(self, **query: object) -> float:
        began = time.perf_counter()
        status, body = self.get("/api/search", **query)
        seconds = time.perf_counter() - began
        if status != 200 or not json.loads(body)["hits"]:
            raise RuntimeError(f"{query}: {status} {body[:200]!r}")
        return seconds


def new_text(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=6)) + f" {rng.randrange(10**6)}"


def percentiles(seconds: list[float]) -> str:
    p50, p90, p99 = np.quantile(seconds, [0.5, 0.9, 0.99]) * 1000
    return f"p50 {p50:.1f}, p90 {p90:.1f}, p99 {p99:.1f} ms ({len(seconds)} queries)"


def at_once(clients: int, queries: int) -> list[float]:
    """Seconds of each query of words, from clients that each ask again at once."""
    seconds: list[float] = []
    failed: list[Exception] = []

    def ask(number: int) -> None:
        rng, client = random.Random(1000 + number), Client()
        try:
            for _ in range(queries // clients):
                seconds.append(client.seconds(text=new_text(rng), top=24))
        except Exception as error:
            failed.append(error)

    began = time.perf_counter()
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = len(seconds) / (time.perf_counter() - began)
    print(
        f"{clients} clients: {rate:.1f} queries/s, {percentiles(seconds)}, {len(failed)} failed {failed[:1]}",
        flush=True,
    )
    return seconds


def wait_for(condition, began: float) -> float:
    while True:
        try:
            if condition():
                return time.perf_counter() - began
        except OSError:
            pass
        time.sleep(0.02)


def measure(home: Path, options: argparse.Namespace) -> None:
    began = time.perf_counter()
    command = [Path(sys.executable).parent / "clipray", "serve", home / "run", "--port", str(PORT)]
    server = subprocess.Popen(command)
    try:
        print(f"first page after {wait_for(lambda: Client().get('/')[0] == 200, began):.2f} s", flush=True)
        first = wait_for(lambda: Client().get("/api/search", text="a red circle")[0] == 200, began)
        print(f"first answer to words after {first:.2f} s", flush=True)
        client, rng = Client(), random.Random(0)
        for _ in range(20):
            client.seconds(text=new_text(rng))
        words = [client.seconds(text=new_text(rng), top=24) for _ in range(options.queries)]
        print(f"words, one client: {percentiles(words)}", flush=True)
        ids = [f"folder/image-{rng.randrange(options.rows):08d}.jpg" for _ in range(options.queries)]
        print(f"more like this, one client: {percentiles([client.seconds(like=name, top=24) for name in ids])}")
        for where in FILTERS:
            _, body = client.get("/api/search", text=new_text(rng), where=where)
            cold = json.loads(body)["seconds"]
            seconds = [client.seconds(text=new_text(rng), where=where, top=24) for _ in range(40)]
            print(f"{where}: {json.loads(body)['matching']} rows, first {cold * 1000:.0f} ms, {percentiles(seconds)}")
        at_once(1, options.queries)
        at_once(options.clients, options.queries)
        memory = psutil.Process(server.pid).memory_full_info()
        index_bytes = sum(file.stat().st_size for file in (home / "run" / "index").glob("*.faiss*"))
        print(
            f"memory: rss {memory.rss / 2**20:.0f}, of its own {memory.uss / 2**20:.0f} MiB; index {index_bytes / 2**20:.0f} MiB"
        )
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--columns", type=int, default=256)
    parser.add_argument("--towers", default="ViT-B-32", help="small, or those of a model of open_clip")
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--home", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = options.home or Path(folder)
        home.mkdir(exist_ok=True)
        if not (home / "run" / "index" / "_table.json").exists():
            make_run(home, options.rows, options.columns, options.towers)
        summary = json.loads((home / "run" / "index" / "_table.json").read_text())["figures"]
        print(
            {key: summary[key] for key in ("type", "parameter", "value", "recall@10", "index_bytes") if key in summary}
        )
        measure(home, options)


if __name__ == "__main__":
    main()
