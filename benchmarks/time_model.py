"""A model of the time that streaming updates take on GPUs, beside forward and backward of the language model itself.

    python benchmarks/time_model.py --output benchmarks/results/time-model.json
    python benchmarks/time_model.py --layers --output benchmarks/results/time-model-layers.json

Nothing here is measured. Forward and activation backward of the whole model run on the meta device, with the taps, the
waiting pairs and the estimators of loraga, and every operation is noted with its shapes and element types (loraga/
kernels/dev/steps.py). So counts, shapes, groups and bytes are those of the code. The time of an operation is then the
largest of flops / rate, bytes / bandwidth and the least time of a kernel, at the rates of data sheets times an
efficiency; the host's time is a number of microseconds for each operation. These numbers are assumptions. They stand
below and in the result file. With `--layers` it is single shapes of layers, each absorbed in a group, beside the
layer's own two products.
    python benchmarks/time_model.py --table FILE     its table, and nothing else
    python benchmarks/time_model.py --profile FILE   for each row, what its updates spend the device's time on
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "0")  # read when Triton is imported; launches are those of compiled kernels

import _llama
import _machine
import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging

from loraga.capture.isolation import isolated
from loraga.capture.taps import Taps
from loraga.config import InitConfig
from loraga.estimators import LayerSpec, Pending, Streaming, make_estimators
from loraga.kernels.dev.steps import Step, counted
from loraga.kernels.dev.workloads import LLAMA_7B, LLAMA_8B, Case, Layer
from loraga.plan import dry_run

META = torch.device("meta")


@dataclass(frozen=True)
class Device:
    """A card by its data sheet: dense rates in flops per second, bytes per second, and what kernels are built for.

    `half` is the rate of bfloat16 products with float32 sums, `single` and `double` those of float32 and float64
    without tensor cores (of float64 with them where there are such).
    """

    name: str
    arch: int
    bandwidth: float
    half: float
    single: float
    double: float
    processors: int
    clock: float


DEVICES = (
    Device("H100 SXM", 90, 3.35e12, 989e12, 67e12, 67e12, 132, 1.755e9),
    Device("A100 SXM 80 GB", 80, 2.04e12, 312e12, 19.5e12, 19.5e12, 108, 1.41e9),
    Device("RTX 4090", 89, 1.01e12, 165e12, 82.6e12, 1.29e12, 128, 2.52e9),
    Device("L40S", 89, 0.864e12, 362e12, 91.6e12, 1.43e12, 142, 2.52e9),
    Device("B200", 100, 8.0e12, 2250e12, 80e12, 40e12, 148, 1.85e9),
)


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says. Shares are of the data sheet's rates, times are in seconds."""

    bandwidth_share: float = 0.88
    product_share: float = 0.68
    # of Triton's products of float32 numbers, each of which is three products of tf32 numbers
    triton_share: float = 0.4
    # a result of less than 128 x 128 per multiprocessor leaves some idle, unless its sum is cut into parts: by so much
    least_part: int = 256
    # one block of the native core's Cholesky kernel: cycles per column, and share of a multiprocessor's rate
    column_cycles: float = 250.0
    cholesky_share: float = 0.25
    # between the start of a kernel and that of the next, which waits for it
    least_kernel: float = 3e-6
    host_op: float = 7e-6
    host_view: float = 1.5e-6
    host_native: float = 15e-6
    host_triton: float = 25e-6


ASSUMED = Assumptions()

MODELS = {
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000),
    "Llama-3-8B": (4096, 14336, 32, 32, 8, 128256),
}
TOKENS = (1024, 8192)
SEQUENCE = 1024
# A sketch of rank 8 is as wide as one of rank 16, and an update of it takes the same.
RANKS = {"8, 16": 16, "128": 128}
_MICRO_BATCHES = 4  # so that no micro-batch gets a power step
PATHS = ("torch", "Triton")
_HALF = ("bfloat16", "float16")
_PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_")


def seconds(step: Step, device: Device) -> float:
    """The device's time for one step."""
    moved = step.bytes / (device.bandwidth * ASSUMED.bandwidth_share)
    return max(ASSUMED.least_kernel, moved, _work(step, device))


def _work(step: Step, device: Device) -> float:
    """Time of the arithmetic alone."""
    if step.name == "cholesky_inverse":
        return _cholesky(step, device)
    if step.kind == "triton":
        return _triton(step, device)
    if step.flops:
        rate = _rate(device, step.dtype) * ASSUMED.product_share
        return step.flops / (rate * (_busy(step, device) if step.name in _PRODUCTS else 1.0))
    if step.dtype == "float64" or step.name == "linalg_vector_norm":  # whose sums of squares are float64
        return 2 * max(math.prod(shape) for shape in step.shapes) / device.double
    return 0.0


def _rate(device: Device, dtype: str) -> float:
    return device.half if dtype in _HALF else device.double if dtype == "float64" else device.single


def _busy(step: Step, device: Device) -> float:
    """Share of the multiprocessors that a product keeps busy: a block of 128 x 128 of the result each."""
    first = 1 if "add" in step.name else 0  # before the operands stands what they are added to
    left, right = step.shapes[first : first + 2]
    batch = left[0] if len(left) == 3 else 1
    blocks = batch * -(-left[-2] // 128) * -(-right[-1] // 128)
    return min(1.0, blocks * max(1, left[-1] // ASSUMED.least_part) / device.processors)


def _cholesky(step: Step, device: Device) -> float:
    """One block for each matrix, which takes k^3 / 3 multiplications and additions for a factor and its inverse."""
    *batch, k, _ = step.shapes[0]
    rate = _rate(device, step.dtype) / device.processors * ASSUMED.cholesky_share
    rounds = -(-math.prod(batch) // device.processors)
    return rounds * (k * ASSUMED.column_cycles / device.clock + 2 / 3 * k**3 / rate)


# Kernels of an update without a product.
_MOVING = (
    "_fill_kernel",
    "_norms_kernel",
    "_finite_kernel",
    "_commit_kernel",
    "_sum_splits_kernel",
    "_add_splits_kernel",
)


def _triton(step: Step, device: Device) -> float:
    """Time of a Triton kernel's arithmetic.

    Raises:
        ValueError: the kernel is not known here.
    """
    if step.name in _MOVING:
        return 0.0
    busy = min(1.0, step.programs / device.processors)
    if step.name == "_accumulate_kernel":
        (m, n), (tokens, _) = step.shapes[:2]
        return 2 * tokens * m * n / (device.half * ASSUMED.product_share * busy)  # micro-batches here are bfloat16
    if step.name not in ("_gram_kernel", "_product_kernel"):
        raise ValueError(f"How much {step.name} computes is not known to time_model.py.")
    # of a Gram matrix the lower blocks, and of the inverse of a triangular factor the blocks that are not zero
    m, k = step.shapes[0][-2:]
    flops = math.prod(step.shapes[0][:-2]) * m * k * (k + 64)
    rate = device.half / 2 / 3 * ASSUMED.triton_share  # tf32 has half the rate of bfloat16
    return flops / (rate * busy)


def host_seconds(steps: Sequence[Step], views: int) -> float:
    """The host's time to queue `steps`, and to make `views` of tensors between them."""
    each = {"torch": ASSUMED.host_op, "native": ASSUMED.host_native, "triton": ASSUMED.host_triton}
    return sum(each[step.kind] for step in steps) + views * ASSUMED.host_view


@dataclass
class Work:
    """Steps and views of one part of a micro-batch."""

    steps: list[Step]
    views: int


def work_of(name: str, tokens: int, rank: int, arch: int | None) -> tuple[Work, Work, list[int]]:
    """(forward and backward, updates, layers per update) of one later micro-batch of a model in bfloat16.

    `arch` None is the torch path. All linear layers but the head are targets, as in `fast_init`.
    """
    with META:
        model = LlamaForCausalLM(_llama.config(*MODELS[name])).to(torch.bfloat16)
    targets = {key: module for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    targets.pop("lm_head")
    shapes = {key: tuple(module.weight.shape) for key, module in targets.items()}
    specs = [LayerSpec(key, *shape, rank, index, META) for index, (key, shape) in enumerate(shapes.items())]
    estimators = dict(zip(shapes, make_estimators(specs, InitConfig(), _MICRO_BATCHES), strict=True))
    for estimator in estimators.values():  # the first update differs from the others, and is not what is counted
        sizes = (estimator.spec.n, estimator.spec.m)
        estimator.update(*(torch.empty(1, size, dtype=torch.bfloat16, device=META) for size in sizes))
    ids = torch.zeros(tokens // SEQUENCE, SEQUENCE, dtype=torch.long, device=META)
    update, groups = Work([], 0), []
    pending = Pending()

    def absorbed(act: Callable[[], list]) -> None:
        before, views = len(run.steps), run.views
        groups.extend(len(labels) for labels, _ in act())
        update.steps += run.steps[before:]
        update.views += run.views - views
        del run.steps[before:]
        run.views = views

    def on_pair(key: str, x: torch.Tensor, dy: torch.Tensor) -> None:
        estimator = estimators[key]
        if isinstance(estimator, Streaming):  # as `capture.collector` does it on a GPU
            absorbed(lambda: pending.add(key, estimator, x, dy))
        else:
            absorbed(lambda: [([key], estimator.update(x, dy))])

    taps = Taps(targets, on_pair)
    with isolated(model), dry_run.DryRun(), counted(arch, dry_run._FORMULAS) as run, taps:
        taps.backward(model(input_ids=ids, labels=ids).loss)
        absorbed(pending.flush)
    return Work(run.steps, run.views), update, groups


def rows() -> Iterator[dict]:
    """A row for each model, number of tokens, rank, path and device."""
    for name in MODELS:
        for tokens in TOKENS:
            for ranks, rank in RANKS.items():
                for path in PATHS:
                    done: dict[int | None, tuple[Work, Work, list[int]]] = {}
                    for device in DEVICES:
                        arch = None if path == "torch" else device.arch
                        if arch not in done:
                            done[arch] = work_of(name, tokens, rank, arch)
                        yield {"model": name, "tokens": tokens, "ranks": ranks, "path": path} | _row(
                            device, *done[arch]
                        )


def layer_rows() -> Iterator[dict]:
    """A row for each shape of layer, number of tokens, rank and path, on the first device: times per layer."""
    device = DEVICES[0]
    for layer in dict.fromkeys((*LLAMA_7B, *LLAMA_8B)):
        for tokens in TOKENS:
            for ranks, rank in RANKS.items():
                if not Streaming.pays(LayerSpec("", layer.m, layer.n, rank, 0, META)):
                    continue
                count = _group(layer, tokens, rank)
                for path in PATHS:
                    case = Case(layer, tokens, torch.bfloat16, rank, count=count)
                    estimators = case.estimators()
                    case.update(estimators)
                    with counted(None if path == "torch" else device.arch) as run:
                        case.update(estimators)
                    product = Step(
                        "torch",
                        "mm",
                        ((tokens, layer.n), (layer.n, layer.m)),
                        "bfloat16",
                        2 * tokens * (layer.m + layer.n) + 2 * layer.m * layer.n,
                        2 * tokens * layer.m * layer.n,
                    )
                    yield {
                        "layer": f"{layer.name}: {layer.m} x {layer.n}",
                        "device": device.name,
                        "tokens": tokens,
                        "ranks": ranks,
                        "path": path,
                        "group": count,
                        "own_us": 2e6 * seconds(product, device),
                        "update_us": 1e6 * sum(seconds(step, device) for step in run.steps) / count,
                        "host_us": 1e6 * host_seconds(run.steps, run.views) / count,
                        "steps": len(run.steps) / count,
                    }


def _group(layer: Layer, tokens: int, rank: int) -> int:
    """How many of 8 layers of one shape are absorbed together; a block of a model has fewer."""
    case, pending = Case(layer, tokens, torch.bfloat16, rank, count=8), Pending()
    outcomes = [o for i, estimator in enumerate(case.estimators()) for o in pending.add(i, estimator, *case.operands())]
    return max(len(labels) for labels, _ in outcomes + pending.flush())


def _row(device: Device, own: Work, update: Work, groups: list[int]) -> dict:
    model, updates = (sum(seconds(step, device) for step in work.steps) for work in (own, update))
    layers = sum(groups)
    spent: Counter[str] = Counter()
    for step in update.steps:
        spent[f"{step.name} {step.dtype}"] += 1e3 * seconds(step, device)
    return {
        "device": device.name,
        "model_ms": 1e3 * model,
        "model_products_ms": 1e3 * sum(seconds(step, device) for step in own.steps if step.flops),
        "model_host_ms": 1e3 * host_seconds(own.steps, own.views),
        "updates_ms": 1e3 * updates,
        "updates_host_ms": 1e3 * host_seconds(update.steps, update.views),
        "steps_per_layer": len(update.steps) / layers,
        "layers": layers,
        "updates": len(groups),
        "updates_ms_by_step": {key: round(value, 4) for key, value in spent.most_common(12)},
    }


def table(result: dict) -> str:
    """Markdown: a row per model, device, tokens and rank; for each path the updates' time over the model's own.

    Of a result with `--layers` a row per shape, tokens and rank.
    """
    if "layer" in result["rows"][0]:
        return _layer_table(result["rows"])
    cases: dict[tuple, dict[str, dict]] = defaultdict(dict)
    for row in result["rows"]:
        cases[f"{row['model']} on {row['device']}", row["tokens"], row["ranks"]][row["path"]] = row
    lines = [
        "| model | tokens | r | the model: GPU (its products), host | torch: GPU, host | of the model "
        "| of its products | Triton: GPU, host | of the model | of its products |",
        "|---" * 10 + "|",
    ]
    for (model, tokens, ranks), by_path in cases.items():
        own = next(iter(by_path.values()))
        cells = [model, str(tokens), ranks, _own(own)]
        for path in PATHS:
            row = by_path[path]
            cells += [f"{row['updates_ms']:.1f}, {row['updates_host_ms']:.0f} ms"]
            cells += [f"{row['updates_ms'] / row[key]:.2f}" for key in ("model_ms", "model_products_ms")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _layer_table(rows: list[dict]) -> str:
    cases: dict[tuple, dict[str, dict]] = defaultdict(dict)
    for row in rows:
        cases[row["layer"], row["tokens"], row["ranks"]][row["path"]] = row
    lines = [
        "| layer | tokens | r | group | its two products | torch: GPU, host, steps | Triton: GPU, host, steps |",
        "|---" * 7 + "|",
    ]
    for (layer, tokens, ranks), by_path in cases.items():
        own = by_path[PATHS[0]]
        cells = [layer, str(tokens), ranks, str(own["group"]), f"{own['own_us']:.0f} µs"]
        for path in PATHS:
            row = by_path[path]
            cells.append(f"{row['update_us']:.0f} µs, {row['host_us']:.0f} µs, {row['steps']:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _own(row: dict) -> str:
    return f"{row['model_ms']:.0f} ({row['model_products_ms']:.0f}), {row['model_host_ms']:.0f} ms"


def profile(result: dict) -> str:
    """For each row, where the device's time goes."""
    lines = []
    for row in result["rows"]:
        lines.append(
            f"{row['model']}, {row['device']}, {row['tokens']} tokens, r {row['ranks']}, {row['path']}: "
            f"{row['updates_ms']:.1f} ms, {row['steps_per_layer']:.1f} steps a layer, "
            f"{row['layers']} layers in {row['updates']} updates"
        )
        lines += [f"    {value:9.3f} ms  {key}" for key, value in row["updates_ms_by_step"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--layers", action="store_true", help="single layers in place of whole models")
    parser.add_argument("--table", type=Path, help="print the table of a result file and do nothing else")
    parser.add_argument("--profile", type=Path, help="print what the updates of a result file spend their time on")
    args = parser.parse_args()
    for file, show in ((args.table, table), (args.profile, profile)):
        if file is not None:
            print(show(json.loads(file.read_text())))
            return
    logging.set_verbosity_error()
    result = _machine.describe() | {
        "measured": False,
        "devices": [asdict(device) for device in DEVICES],
        "assumed": asdict(ASSUMED),
        "rows": [],
    }
    for row in layer_rows() if args.layers else rows():
        result["rows"].append(row)
    _machine.save(result, args.output)
    print(table(result))


if __name__ == "__main__":
    main()
