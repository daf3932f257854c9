"""`label` from Parquet to Parquet against its bound: reading the vectors and one matrix product at the best precision.

    python benchmarks/label.py [--rows 1000000] [--columns 512] [--classes 1000] [--repetitions 3] [--ray]

Both sides have as many processes as cores, each with files of its own, as tasks of one CPU have on a cluster; they take
turns, as other work on the machine comes and goes. The bound reads identities and vectors and multiplies them with the
classes, in bf16 (with the conversion to it) where the hardware does that natively, and throws the scores away. clipray
does what a task of the step does: it also finds the five best classes, their probabilities among all, and writes the
table. With `--ray` the whole step is timed once more, Ray's start not counted.
"""

import argparse
import dataclasses
import os
import resource
import shutil
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import torch

from clipray import tables
from clipray.analysis.prompts import PromptStyle
from clipray.analysis.tensors import native_bf16
from clipray.engine.connect import WORKER_ENV, connected
from clipray.inputs.vector_column import open_vectors, read_vectors
from clipray.job import Column, Label
from clipray.job.load import fingerprint
from clipray.models.resolve import ResolvedModel
from clipray.steps.base.shard_writer import Part
from clipray.steps.base.step import RunContext
from clipray.steps.labels import label as step_of_label
from clipray.steps.labels.label_classes import CLASSES, PromptSet
from clipray.storage.events import Events
from clipray.storage.folder import Folder
from clipray.storage.parquet import chunked

FILE_ROWS = 65_536
PRODUCT_ROWS = 4_096


def clip_like(n: int, k: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (n, d) and classes (k, d) in two cones, variances that fall off; logits of a row vary by about 3."""
    g, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    scale = torch.arange(1, d + 1).float().pow(-0.5)
    scale /= scale.norm()
    cones = torch.linalg.qr(torch.randn(d, 2, generator=g))[0].T
    turn = torch.linalg.qr(torch.randn(d, d, generator=g))[0]
    classes = torch.randn(k, d, generator=g) * scale
    mixed = torch.rand(n, 1, generator=own) * 0.8
    noise = torch.randn(n, d, generator=own) * scale
    shown = classes[torch.randint(k, (n,), generator=own)]
    x = 0.28 * (mixed * shown + (1 - mixed.square()).sqrt() * noise) @ turn + cones[0]
    c = 0.6 * classes @ turn + cones[1]
    return tuple(torch.nn.functional.normalize(v, dim=1).numpy() for v in (x, c))


def write_inputs(home: Path, rows: int, columns: int, classes: int) -> np.ndarray:
    """`home`/vectors/*.parquet as clipray writes vectors; the class vectors."""
    folder = Folder(str(home / "vectors"))
    schema = pa.schema([pa.field("image_id", pa.string(), False), pa.field("clip", tables.vector_type(columns), False)])
    for start in range(0, rows, FILE_ROWS):
        n = min(FILE_ROWS, rows - start)
        x, c = clip_like(n, classes, columns, seed=1 + start)
        ids = pa.array([f"pictures/{row:09d}.jpg" for row in range(start, start + n)])
        data = pa.table([ids, tables.vector_array(x, schema.field("clip").type)], schema=schema)
        tables.write_shard(folder, f"part-{start:09d}.parquet", "reduced", data, {"fingerprint": "bench"})
    return c


def make_step(home: Path, c: np.ndarray) -> step_of_label.LabelStep:
    """The step as a job would make it, its table of classes there already."""
    k, d = c.shape
    output = Folder(str(home / "run"))
    model = ResolvedModel("bench", None, None, 0, "random:0", d, {})
    said = PromptSet(model, "fp32", (PromptStyle("template", tuple(f"class {n}" for n in range(k)), ("a {}",)),), None)
    settings = Label(input=Column(path=str(home / "vectors"), column="clip"), classes=["unused"])
    source = dataclasses.replace(open_vectors(settings.input, output), provenance={"normalize": "l2"})
    step = step_of_label.LabelStep(settings, output, source, said)
    schema = tables.arrow_schema("label_classes", {"vector": d})
    vectors = tables.vector_array(c, schema.field("vector").type)
    names = pa.array(said.styles[0].labels)
    flags, counts = pa.array([False] * k), pa.array([1] * k, pa.int32())
    data = pa.table([pa.array(["template"] * k), names, flags, counts, vectors], schema=schema)
    mark = fingerprint(said.identity)
    metadata = {"fingerprint": mark, "logit_scale": 100.0, "logit_bias": None, "prompts_truncated": 0}
    shard = tables.write_shard(step.companion, CLASSES, "label_classes", data, metadata)
    tables.commit(
        step.companion, "label_classes", schema, [shard],
        fingerprint=mark, inputs={}, settings={}, provenance=metadata, finished_at=tables.now(),
    )  # fmt: skip
    return step


def bound(item: tuple[step_of_label.LabelStep, list, np.ndarray]) -> np.ndarray:
    """Processor seconds to read and to multiply, with the conversion that the product's precision needs."""
    step, row_groups, c = item
    kind = torch.bfloat16 if native_bf16(torch.device("cpu")) else torch.float32
    table = torch.from_numpy(c).to(kind)
    scores = torch.empty(PRODUCT_ROWS, len(c), dtype=kind)
    spent = np.zeros(2)
    for row_group in row_groups:
        start = time.process_time()
        _, x = read_vectors(step.source, row_group)
        read = time.process_time()
        for some in torch.from_numpy(x).split(PRODUCT_ROWS):
            torch.mm(some.to(kind), table.T, out=scores[: len(some)])
        spent += read - start, time.process_time() - read
    return spent


def labelled(item: tuple[step_of_label.LabelStep, list, str]) -> np.ndarray:
    """A task of the step: its processor seconds, and the process's peak memory in MiB."""
    step, row_groups, name = item
    start = time.process_time()
    step_of_label.label_part(Part(row_groups, [name]), step)
    return np.array([time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024])


def one_thread() -> None:
    warnings.simplefilter("ignore", UserWarning)  # torch's, of arrays that must not be written to: none is
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)  # it may have an OpenMP of its own
    pa.set_cpu_count(1)


def side_by_side(step: step_of_label.LabelStep, c: np.ndarray, repetitions: int, processes: int) -> None:
    work = chunked(step.source.row_groups, FILE_ROWS)
    names = [f"part-{n:06d}-template.parquet" for n in range(len(work))]
    walls, cpus = np.zeros((2, repetitions)), np.zeros((2, repetitions))  # of the bound and of clipray
    with ProcessPoolExecutor(processes, get_context("spawn"), one_thread) as pool:
        for n in range(-1, repetitions):  # the first one warms up
            times = [time.perf_counter()]
            read, product = np.sum(list(pool.map(bound, [(step, group, c) for group in work])), axis=0)
            times.append(time.perf_counter())
            found = np.array(list(pool.map(labelled, [(step, *item) for item in zip(work, names, strict=True)])))
            times.append(time.perf_counter())
            if n < 0:
                continue
            walls[:, n], cpus[:, n] = np.diff(times), (read + product, found[:, 0].sum())
            print(
                f"  bound {walls[0, n]:.2f} s; of the processor {read:.2f} s to read + {product:.2f} s to multiply;"
                f" clipray {walls[1, n]:.2f} s, {step.source.n_samples / walls[1, n]:,.0f} rows/s; of the processor {cpus[1, n]:.2f} s;"
                f" peak of a process {found[:, 1].max():.0f} MiB"
            )
    for what, sides in {"seconds": walls, "processor seconds": cpus}.items():
        rounds = sides[0] / sides[1]
        each = ", ".join(f"{ratio:.0%}" for ratio in rounds)
        best = sides[0].min() / sides[1].min()
        print(f"of the bound by {what}: best of each {best:.0%}, median round {np.median(rounds):.0%} ({each})")


def whole_step(step: step_of_label.LabelStep) -> None:
    shutil.rmtree(step.table.url)  # what the tasks have made
    with connected(None) as cluster:
        run = RunContext(lambda: cluster, Events(step.output), lambda _: None, print)
        start = time.perf_counter()
        record = step.write_table(run)
        print(f"the step on Ray: {time.perf_counter() - start:.2f} s for {record.rows:,} rows, workers' start included")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--columns", type=int, default=512)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--home", type=Path, default=Path("benchmarks/out/label"))
    options = parser.parse_args()
    os.environ.update(WORKER_ENV)  # both sides work in processes as Ray's are
    shutil.rmtree(options.home, ignore_errors=True)
    c = write_inputs(options.home, options.rows, options.columns, options.classes)
    step = make_step(options.home, c)
    print(
        f"{options.rows:,} x {options.columns}, {options.classes:,} classes, {options.processes} processes, load {os.getloadavg()[0]:.1f}"
    )
    side_by_side(step, c, options.repetitions, options.processes)
    if options.ray:
        whole_step(step)
    shutil.rmtree(options.home)


if __name__ == "__main__":
    main()
