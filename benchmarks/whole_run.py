"""Whole initialisations, each in its own process, on one model and the same batches.

    python benchmarks/whole_run.py --output benchmarks/results/whole-run-cpu.json

Cases: the floor (forward and activation backward, nothing else), loraga (streaming, dense), PEFT's own LoRA-GA
(`preprocess_loraga` + `get_peft_model`), and the plain LoRA training step (AdamW) on the same batch, whose peak memory
is the yardstick for ours. Time and peak resident memory above the loaded model, per case; for loraga and PEFT also the
objective of LoRA-GA against the exact SVD, on the layers named by `--check-layers`.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import subprocess
import sys
import sysconfig
import time
import warnings
from collections import Counter
from pathlib import Path

import _machine
import torch

SHAPES = {
    # name: hidden, intermediate, layers, heads, kv heads, vocabulary (untied)
    "llama-105m": (768, 2048, 12, 12, 4, 19200),
    "tiny": (256, 512, 2, 4, 2, 512),
}
CASES = ("floor", "loraga", "loraga-dense", "peft-loraga", "lora-step")
RANK, ALPHA = 8, 16


def build(shape: str) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            use_cache=False,
        )
    )


def batches(model: torch.nn.Module, count: int, rows: int, length: int) -> list[dict]:
    """Prose and code of the standard library, a token per word or sign, by frequency: real statistics of text."""
    text = "\n".join(f.read_text("utf-8") for f in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    words = re.findall(r"\w+|[^\w ]", text)
    vocabulary = {word: i for i, (word, _) in enumerate(Counter(words).most_common(model.config.vocab_size - 1))}
    ids = torch.tensor([vocabulary.get(word, model.config.vocab_size - 1) for word in words])
    starts = torch.randint(0, len(ids) - length, (count, rows), generator=torch.Generator().manual_seed(1))
    result = []
    for row in starts:
        batch = torch.stack([ids[i : i + length] for i in row])
        result.append({"input_ids": batch, "labels": batch})
    return result


class PeakMemory:
    """Resident bytes above the level at entry (Linux: the high-water mark is reset at entry)."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        self._base = self._read("VmRSS")
        return self

    def __exit__(self, *exc: object) -> None:
        self.bytes = self._read("VmHWM") - self._base

    @staticmethod
    def _read(key: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/self/status has no {key}")


def lora_config(**kwargs):
    from peft import LoraConfig

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return LoraConfig(r=RANK, lora_alpha=ALPHA, use_rslora=True, target_modules=targets, **kwargs)


def floor(model, data):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_(True))
    for batch in data:
        model(**batch).loss.backward()


def loraga_case(estimator):
    def run(model, data):
        import loraga

        init = loraga.InitConfig(estimator=estimator, buffer_dtype="bfloat16")
        return loraga.fast_init(model, data, lora_config(), init=init, show_progress_bar=False)

    return run


def peft_loraga(model, data):
    from peft import LoraGAConfig, get_peft_model
    from peft.tuners.lora.loraga import preprocess_loraga

    config = lora_config(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

    def train_step():
        for batch in data:
            model(**batch).loss.backward()

    preprocess_loraga(model, config, train_step)
    return get_peft_model(model, config)


def lora_step(model, data):
    from peft import get_peft_model

    peft_model = get_peft_model(model, lora_config())
    optimizer = torch.optim.AdamW((p for p in peft_model.parameters() if p.requires_grad), lr=1e-4)
    for batch in data:
        peft_model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return peft_model


def objective(model, starts: dict[str, tuple[torch.Tensor, torch.Tensor]], data) -> dict[str, float]:
    """LoRA-GA objective |G - (U_B U_Bᵀ G + G V_A V_Aᵀ)| over that of the exact SVD, mean and worst, less one.

    U_B and V_A are the directions of B and A; G is the exact mean gradient in float64.
    """
    modules = dict(model.named_modules())
    weights = {name: modules[name].weight for name in starts}
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
    excess = []
    for name, (a, b) in starts.items():
        g = grads[name]
        u, v = torch.linalg.qr(b.double()).Q, torch.linalg.qr(a.double().T).Q
        best = torch.linalg.svdvals(g)[2 * RANK :].norm()
        excess.append(float((g - u @ (u.T @ g) - (g @ v) @ v.T).norm() / best - 1))
    return {"mean_excess": statistics.fmean(excess), "worst_excess": max(excess), "layers": len(excess)}


def starts_of(peft_model, layers: list[int]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = {}
    for name, module in peft_model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and any(f"layers.{i}." in name for i in layers):
            a = module.lora_A["default"].weight.detach()[:RANK].clone()
            b = module.lora_B["default"].weight.detach()[:, :RANK].clone()
            found[name] = (a, b)
    return found


def run_case(case: str, args: argparse.Namespace) -> dict:
    warnings.simplefilter("ignore")
    run = {
        "floor": floor,
        "loraga": loraga_case("streaming"),
        "loraga-dense": loraga_case("dense"),
        "peft-loraga": peft_loraga,
        "lora-step": lora_step,
    }[case]
    model = build(args.shape)
    data = batches(model, args.batches, args.rows, args.length)
    with torch.no_grad():  # first touches of weights and libraries are nobody's cost
        model(**data[0])
    import peft  # noqa: F401

    with PeakMemory() as memory:
        began = time.perf_counter()
        result = run(model, data)
        seconds = time.perf_counter() - began
    row = {"case": case, "seconds": seconds, "peak_bytes": memory.bytes}
    row["parameters"] = sum(p.numel() for p in build(args.shape).parameters()) if case == "floor" else None
    report = getattr(result, "loraga_report", None)
    if report is not None:
        row |= {"state_bytes": report.state_bytes, "phases": report.seconds}
    if args.check_layers and case.startswith(("loraga", "peft-loraga")):
        starts = starts_of(result, args.check_layers)
        row["objective"] = objective(build(args.shape), starts, data)
    return row


def table(result: dict) -> str:
    """Markdown: a row per case."""
    lines = [
        "| case | seconds | over the floor | peak memory | of the LoRA step's | objective excess, mean / worst layer |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        objective = row.get("objective")
        accuracy = f"{objective['mean_excess']:.2%} / {objective['worst_excess']:.2%}" if objective else ""
        lines.append(
            f"| {row['case']} | {row['seconds']:.1f} | {row['over_floor']:.2f} | {row['peak_bytes'] / 1e9:.2f} GB "
            f"| {row['memory_over_lora_step']:.2f} | {accuracy} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-105m")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3, help="processes per case, in turn; the median is reported")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--check-layers", type=int, nargs="*", default=[0, 6, 11])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--table", type=Path, help="print the table of a result file and do nothing else")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    if args.case:
        print(json.dumps(run_case(args.case, args)))
        return
    options = ["--shape", args.shape, "--batches", str(args.batches), "--rows", str(args.rows)]
    options += ["--length", str(args.length)]
    rows: dict[str, list[dict]] = {case: [] for case in args.cases}
    for repeat in range(args.repeats):
        for case in args.cases:
            checked = ["--check-layers", *(map(str, args.check_layers if repeat == 0 else []))]
            command = [sys.executable, __file__, "--case", case, *options, *checked]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{case} failed:\n{done.stderr}")
            rows[case].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{case}: {rows[case][-1]['seconds']:.2f} s", file=sys.stderr)
    summary = []
    for runs in rows.values():
        row = dict(runs[0])
        row["seconds"] = statistics.median(r["seconds"] for r in runs)
        row["seconds_all"] = [r["seconds"] for r in runs]
        row["peak_bytes"] = statistics.median(r["peak_bytes"] for r in runs)
        summary.append({key: value for key, value in row.items() if value is not None})
    result = {
        **_machine.describe(),
        "model": args.shape,
        "tokens": [args.batches, args.rows, args.length],
        "rank": RANK,
        "rows": summary,
    }
    by_case = {row["case"]: row for row in summary}
    for row in summary:
        row["over_floor"] = row["seconds"] / by_case["floor"]["seconds"] if "floor" in by_case else None
        row["memory_over_lora_step"] = (
            row["peak_bytes"] / by_case["lora-step"]["peak_bytes"] if "lora-step" in by_case else None
        )
    text = json.dumps(result, indent=1)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n")
        print(table(result))
    else:
        print(text)


if __name__ == "__main__":
    main()
