"""Whole initialisations, each in its own process, on one model and the same batches.

    python benchmarks/whole_run.py --output benchmarks/results/whole-run-cpu.json
    python benchmarks/whole_run.py --device cuda --shape llama-2-7b --batches 8 --rows 8 --length 1024 --check-layers 0

Cases: the floor (forward and activation backward, nothing else); loraga (streaming; dense; dense with buffers in host
memory); PEFT's own LoRA-GA (`preprocess_loraga` + `get_peft_model`) and EVA; the procedure of the official LoRA-GA
code, stated anew; and the plain LoRA training step (AdamW) on the same batches, whose peak memory is our yardstick.
All adapters have the same rank and scaling; loraga's start is the mirror (zero-b takes as many triplets and as much
time). Cases ending in -checkpointed run with gradient checkpointing. Time and peak memory above the loaded model, per
case; for LoRA-GA starts also their objective against the exact SVD, on the layers named by `--check-layers`. A peer
that fails or takes longer than `--limit` floors gets its reason instead of a row; a case of ours that fails ends the
script with an error.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import multiprocessing
import re
import resource
import statistics
import sys
import sysconfig
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import _llama
import _machine
import torch
from safetensors.torch import load_file, save_file

SHAPES = {
    # name: hidden, intermediate, layers, heads, kv heads, vocabulary (untied)
    "llama-105m": (768, 2048, 12, 12, 4, 19200),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000),
    "tiny": (256, 512, 2, 4, 2, 512),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHECKPOINTED = "-checkpointed"
# Processes are forked from a server that has these loaded and has computed nothing: no threads, no CUDA context.
# Not loraga, of which the server may find another checkout.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama", "peft"])


def build(shape: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A Llama of random weights, the same in every process, made on `device`."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(_llama.config(*SHAPES[shape]))
    finally:
        torch.set_default_dtype(before)


@functools.cache
def text() -> torch.Tensor:
    """Prose and code of the standard library: its words and signs in order, each as its place by frequency."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:80]
    words = re.findall(r"\w+|[^\w ]", "\n".join(file.read_text("utf-8") for file in files))
    places = {word: i for i, (word, _) in enumerate(Counter(words).most_common())}
    return torch.tensor([places[word] for word in words])


def batches(model: torch.nn.Module, count: int, rows: int, length: int) -> list[dict]:
    """A token per word or sign of `text`, the rare ones all the last of the vocabulary: real statistics of text."""
    ids = text().clamp(max=model.config.vocab_size - 1)
    starts = torch.randint(0, len(ids) - length, (count, rows), generator=torch.Generator().manual_seed(1))
    result = []
    for row in starts:
        batch = torch.stack([ids[i : i + length] for i in row])
        result.append({"input_ids": batch.to(model.device), "labels": batch.to(model.device)})
    return result


class PeakMemory:
    """Peak bytes above the level at entry: allocated on the device, or resident (Linux, by the high-water mark)."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._base = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self._base = self._read("VmRSS")
        return self

    def __exit__(self, *exc: object) -> None:
        peak = torch.cuda.max_memory_allocated() if self._cuda else self._read("VmHWM")
        self.bytes = peak - self._base

    @staticmethod
    def _read(key: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/self/status has no {key}")


def lora_config(rank: int, **kwargs):
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=4 * rank, target_modules=TARGETS, **kwargs)


def floor(model, data, rank):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_(True))
    for batch in data:
        model(**batch).loss.backward()


def loraga_case(**kwargs):
    def run(model, data, rank):
        import loraga

        init = loraga.InitConfig(**kwargs)
        return loraga.fast_init(model, data, lora_config(rank), init=init, show_progress_bar=False)

    return run


def peft_loraga(model, data, rank):
    from peft import LoraGAConfig, get_peft_model
    from peft.tuners.lora.loraga import preprocess_loraga

    config = lora_config(rank, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

    def train_step():
        for batch in data:
            model(**batch).loss.backward()

    preprocess_loraga(model, config, train_step)
    return get_peft_model(model, config)


def peft_eva(model, data, rank):
    """PEFT's EVA: activations instead of gradients, forward only; here for time and memory."""
    from peft import EvaConfig, get_peft_model, initialize_lora_eva_weights

    peft_model = get_peft_model(model, lora_config(rank, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0)))
    initialize_lora_eva_weights(peft_model, data, show_progress_bar=False)
    return peft_model


def official_loraga(model, data, rank):
    """What the authors' code does: each weight gradient goes to host memory, summed there in the model's dtype, then a
    truncated SVD of each, A and B from its singular vectors, and the weight less their product."""
    from peft import get_peft_model

    sums: dict[str, torch.Tensor] = {}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    handles = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS:

            def take(weight, name=name):
                gradient = weight.grad.cpu()
                sums[name] = sums[name].add_(gradient) if name in sums else gradient
                weight.grad = None

            module.weight.requires_grad_(True)
            handles.append(module.weight.register_post_accumulate_grad_hook(take))
    for batch in data:
        model(**batch).loss.backward()
    for handle in handles:
        handle.remove()
    peft_model = get_peft_model(model, lora_config(rank))
    for name, module in peft_model.base_model.model.named_modules():
        if name in sums:
            weight = module.base_layer.weight
            gradient = sums.pop(name).to(weight.device, torch.float32) / len(data)
            u, _, v = torch.svd_lowrank(gradient, q=min(4 * rank, *gradient.shape), niter=4)
            size = gradient.shape[0] ** 0.25 / 4  # stable, gamma 16
            a, b = size * v[:, :rank].T, size * u[:, rank : 2 * rank]
            with torch.no_grad():
                module.lora_A["default"].weight.copy_(a)
                module.lora_B["default"].weight.copy_(b)
                weight -= (module.scaling["default"] * b @ a).to(weight.dtype)
    return peft_model


def lora_step(model, data, rank):
    from peft import get_peft_model

    peft_model = get_peft_model(model, lora_config(rank))
    optimizer = torch.optim.AdamW((p for p in peft_model.parameters() if p.requires_grad), lr=1e-4)
    for batch in data:
        peft_model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return peft_model


RUNS = {
    "floor": floor,
    "loraga": loraga_case(),
    "loraga-dense": loraga_case(estimator="dense", buffer_dtype="bfloat16"),
    "loraga-dense-host": loraga_case(estimator="dense", buffer_dtype="bfloat16", buffer_device="cpu"),
    "peft-loraga": peft_loraga,
    "official-loraga": official_loraga,
    "peft-eva": peft_eva,
    "lora-step": lora_step,
}
CHECKED = ("loraga", "loraga-dense", "loraga-dense-host", "peft-loraga", "official-loraga")  # whose start is LoRA-GA's
PEERS = ("peft-loraga", "official-loraga", "peft-eva")  # which may fail or be stopped
CASES = (*RUNS, *(case + CHECKPOINTED for case in ("floor", "loraga", "lora-step")))


def objectives(args: argparse.Namespace, starts: Path) -> dict[str, dict[str, float]]:
    """LoRA-GA objective |G - (U_B U_Bᵀ G + G V_A V_Aᵀ)| over that of the exact SVD, less one, of all in `starts`.

    U_B and V_A are the directions of B and A, and the exact SVD may take as many; G is the exact mean gradient in
    float64, made once for all cases.
    """
    factors = {file.stem: load_file(file) for file in starts.glob("*.safetensors")}
    model, data = prepare(args)
    modules = dict(model.named_modules())
    names = sorted({key.rpartition(".")[0] for tensors in factors.values() for key in tensors})
    weights = {name: modules[name].weight for name in names}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    grads = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    for batch in data:
        model(**batch).loss.backward()
        for name, weight in weights.items():
            grads[name] += weight.grad.double()
            weight.grad = None
    excess: dict[str, list[float]] = {case: [] for case in factors}
    for name, g in grads.items():
        # eigenvalues of the smaller Gram matrix: a GPU takes minutes for singular values of layers of a 7B model
        squares = torch.linalg.eigvalsh(g @ g.T if len(g) <= g.shape[1] else g.T @ g)
        for case, tensors in factors.items():
            a, b = (tensors[f"{name}.{factor}"].to(g) for factor in "AB")
            u, v = torch.linalg.qr(b).Q, torch.linalg.qr(a.T).Q
            best = squares[: len(squares) - len(a) - b.shape[1]].clamp_min(0).sum().sqrt()
            excess[case].append(float((g - u @ (u.T @ g) - (g @ v) @ v.T).norm() / best - 1))
    return {
        case: {"mean_excess": statistics.fmean(found), "worst_excess": max(found), "layers": len(found)}
        for case, found in excess.items()
    }


def starts_of(peft_model, layers: list[int], directions: int) -> dict[str, torch.Tensor]:
    """The first `directions` of A and of B in the named blocks' layers, `{layer}.A` and `{layer}.B`."""
    found = {}
    for name, module in peft_model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and any(f"layers.{i}." in name for i in layers):
            found[f"{name}.A"] = module.lora_A["default"].weight.detach()[:directions].clone()
            found[f"{name}.B"] = module.lora_B["default"].weight.detach()[:, :directions].clone()
    return found


def prepare(args: argparse.Namespace) -> tuple[torch.nn.Module, list[dict]]:
    """The model and the batches, the same in every process."""
    model = build(args.shape, args.device, getattr(torch, args.dtype))
    return model, batches(model, args.batches, args.rows, args.length)


def _system_seconds() -> float:
    """Of this process until now, all threads: on a CPU nearly all for pages of memory touched anew."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_stime


def run_case(args: argparse.Namespace, case: str, starts: Path | None) -> dict:
    """Time and memory of a case in this process; what it found goes into the folder `starts`."""
    warnings.simplefilter("ignore")
    run = RUNS[case.removesuffix(CHECKPOINTED)]
    model, data = prepare(args)
    if case.endswith(CHECKPOINTED):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    with torch.no_grad():  # first touches of weights and libraries are nobody's cost
        model(**{key: rows[:1] for key, rows in data[0].items()})
    import peft  # noqa: F401

    import loraga.api  # noqa: F401

    with PeakMemory(args.device) as memory:
        began, system = time.perf_counter(), _system_seconds()
        result = run(model, data, args.rank)
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    row = {"case": case, "seconds": seconds, "peak_bytes": memory.bytes, "system_seconds": _system_seconds() - system}
    row["parameters"] = sum(p.numel() for p in model.parameters()) if case == "floor" else None
    report = getattr(result, "loraga_report", None)
    if report is not None:
        row |= {"state_bytes": report.state_bytes, "phases": report.seconds}
    if starts and case in CHECKED:
        directions = args.rank if case in PEERS else args.rank // 2  # a mirror holds each one twice
        save_file(starts_of(result, args.check_layers, directions), starts / f"{case}.safetensors")
    return row


def table(result: dict) -> str:
    """Markdown: a row per case. Checkpointed cases are held against the checkpointed floor and training step."""

    def ratio(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    lines = [
        "| case | seconds | over the floor | peak memory | of the LoRA step's | objective excess, mean / worst layer |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        objective = row.get("objective")
        accuracy = f"{objective['mean_excess']:.2%} / {objective['worst_excess']:.2%}" if objective else ""
        lines.append(
            f"| {row['case']} | {row['seconds']:.1f} | {ratio(row['over_floor'])} | {row['peak_bytes'] / 1e9:.2f} GB "
            f"| {ratio(row['memory_over_lora_step'])} | {accuracy} |"
        )
    lines += [f"| {case} | {reason} |  |  |  |  |" for case, reason in result["failed"].items()]
    return "\n".join(lines)


def alone(task: Callable[..., dict], *args: object, limit: float | None = None) -> dict:
    """`task(*args)` in a process of its own.

    Raises:
        `ChildProcessError`: with the reason, if it fails or takes more than `limit` seconds.
    """
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_send, args=(sender, task, args))
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            raise ChildProcessError(f"stopped after {limit:.0f} s")
        found = receiver.recv()
    except EOFError:
        process.join()
        raise ChildProcessError(f"exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if isinstance(found, str):
        raise ChildProcessError(found)
    return found


def _send(sender: Connection, task: Callable[..., dict], args: tuple[object, ...]) -> None:
    """What `task` returns, or in one line why it failed."""
    try:
        sender.send(task(*args))
    except Exception as error:
        traceback.print_exc()
        sender.send(" ".join(traceback.format_exception_only(error)[-1].split()))


def measure(args: argparse.Namespace, starts: Path) -> Iterator[tuple[list[dict], dict[str, str]]]:
    """A row per case, the median over the repeats, and the reason for each case that has none; so far, after each."""
    runs: dict[str, list[dict]] = {case: [] for case in args.cases}
    failed: dict[str, str] = {}
    limit: float | None = None
    for repeat in range(args.repeats):
        into = starts if args.check_layers and repeat == 0 else None
        for case in args.cases:
            if case in failed:
                continue
            began = time.perf_counter()
            try:
                runs[case].append(alone(run_case, args, case, into, limit=limit if case in PEERS else None))
                print(f"{case}: {runs[case][-1]['seconds']:.2f} s", file=sys.stderr)
            except ChildProcessError as reason:
                failed[case] = str(reason)
                print(f"{case}: {reason}", file=sys.stderr)
            if case == "floor" and args.limit:
                limit = args.limit * (time.perf_counter() - began)
            yield rows_of(runs, failed), failed
    if any(starts.iterdir()):
        found = alone(objectives, args, starts)
        rows = rows_of(runs, failed)
        for row in rows:
            if row["case"] in found:
                row["objective"] = found[row["case"]]
        yield rows, failed


def rows_of(runs: dict[str, list[dict]], failed: dict[str, str]) -> list[dict]:
    """A row per case that has run and not failed; checkpointed ones beside the checkpointed floor and step."""
    rows = {}
    for case, found in runs.items():
        if found and case not in failed:
            row = rows[case] = {key: value for key, value in found[0].items() if value is not None}
            row["seconds"] = statistics.median(run["seconds"] for run in found)
            row["seconds_all"] = [run["seconds"] for run in found]
            for key in ("peak_bytes", "system_seconds"):
                row[key] = statistics.median(run[key] for run in found)
    for case, row in rows.items():
        suffix = CHECKPOINTED if case.endswith(CHECKPOINTED) else ""
        least, step = rows.get("floor" + suffix), rows.get("lora-step" + suffix)
        row["over_floor"] = row["seconds"] / least["seconds"] if least else None
        row["memory_over_lora_step"] = row["peak_bytes"] / step["peak_bytes"] if step else None
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-105m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the model; bfloat16 on cuda, else float32")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3, help="processes per case, in turn; the median is reported")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--check-layers", type=int, nargs="*", default=[0, 6, 11])
    parser.add_argument("--limit", type=float, metavar="FLOORS", help="stop a peer that takes so many times as long")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="print the table of a result file and do nothing else")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    if args.limit and args.cases[0] != "floor":
        parser.error("--limit is in floors: let the floor be the first of the cases")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    result = {
        **_machine.describe(),
        "model": args.shape,
        "tokens": [args.batches, args.rows, args.length],
        "rank": args.rank,
        "dtype": args.dtype,
    }
    with tempfile.TemporaryDirectory() as folder:
        for result["rows"], result["failed"] in measure(args, Path(folder)):
            if args.output:
                _machine.save(result, args.output)
    if args.output:
        print(table(result))
    else:
        _machine.save(result, None)
    if ours := [case for case in result["failed"] if case not in PEERS]:
        sys.exit(f"failed: {', '.join(ours)}")


if __name__ == "__main__":
    main()
