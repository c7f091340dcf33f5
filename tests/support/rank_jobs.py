"""What `test_distributed` has each rank do: functions of (rank, world, ...) that return plain values."""

from __future__ import annotations

import datetime
import hashlib
import os
import signal
import time
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import layer_kinds as kinds
import tiny
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import loraga
from loraga import InitConfig
from loraga.distributed import ranks as distributed_ranks
from loraga.ops import reference

RANK = 2 * tiny.R  # of factors that are asked for; a start takes R
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def adapter(model) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if "lora_" in name}


def estimate(model, loader, **kwargs):
    return loraga.estimate_factors(model, loader, rank=RANK, **kwargs)


# ---- data parallel


def sixteen(rank, world):
    """The same 16 batches, dealt out to the ranks."""
    model, loader = tiny.build("llama"), tiny.batches("llama", 16, rows=1)
    factors = estimate(model, loader[rank::world])
    gradients = tiny.exact_gradients(model, list(factors), loader) if rank == 0 else {}
    found = {"excess": [tiny.objective_excess(g, factors[name], tiny.R) for name, g in gradients.items()]}
    peft_model = tiny.init(model, loader[rank::world])
    report = peft_model.loraga_report
    found["energy"] = []
    for layer in report.layers if rank == 0 else ():
        squares = torch.linalg.svdvals(gradients[layer.name]).square()
        found["energy"].append(float(layer.captured_energy * squares.sum() / squares[: tiny.R].sum()))
    found["factors"] = digest({f"{n}.{k}": t for n, f in factors.items() for k, t in vars(f).items()})
    found["adapter"] = digest(adapter(peft_model))
    found["report"] = [vars(layer) for layer in report.layers]
    found["counts"] = (report.micro_batches, report.ranks, report.reduced_bytes)
    found["text"] = str(report)
    return found


def uneven(rank, world):
    """5, 3, no and 1 batches; the second of rank 1 is poisoned."""
    model, loader = tiny.build("llama"), tiny.batches("llama", 9, rows=1)
    shares = [loader[:5], loader[5:8], [], loader[8:]]

    def loss(model, batch):
        value = model(**batch).loss
        return value * float("nan") if batch["input_ids"].equal(loader[6]["input_ids"]) else value

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = tiny.init(tiny.build("llama"), shares[rank], loss_fn=loss).loraga_report
        factors = estimate(model, shares[rank], loss_fn=loss)
    kept = loader[:6] + loader[7:]
    found = {
        "counts": (report.micro_batches, report.skipped_batches),
        "layers": {(layer.updates, layer.skipped) for layer in report.layers},
        "warnings": sum("NaN or Inf" in str(w.message) for w in caught),
    }
    if rank == 0:
        gradients = tiny.exact_gradients(model, list(factors), kept)
        found["excess"] = [tiny.objective_excess(gradients[name], f, tiny.R) for name, f in factors.items()]
        found["norm"] = [float(f.S[0] / torch.linalg.svdvals(gradients[name])[0]) for name, f in factors.items()]
    return found


class Own(nn.Linear):
    """No plain `nn.Linear`: its shape is taken from what passes through."""


class Routed(nn.Module):
    """A batch goes through one of two experts; nothing goes through the third."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList([nn.Linear(300, 500), Own(300, 500), nn.Linear(300, 500)])
        self.small = nn.ModuleList([nn.Linear(500, 20), Own(500, 20), nn.Linear(500, 20)])

    def forward(self, x, expert, labels):
        logits = self.small[expert](torch.tanh(self.experts[expert](x)))
        return {"loss": nn.functional.cross_entropy(logits, labels)}


def autocast(rank, world):
    """The whole call inside autocast: what it merges and finishes with is float32 all the same."""
    generator = torch.Generator().manual_seed(5)
    loader = [
        {"x": torch.randn(64, 300, generator=generator), "expert": 0, "labels": torch.arange(64) % 20} for _ in range(2)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        factors = estimate(Routed(), loader[rank::world])
    eye = torch.eye(RANK)
    return [float((basis @ basis.T - eye).abs().max()) for f in factors.values() for basis in (f.U.T, f.Vh)]


def routed(rank, world, estimator):
    """Rank 0 uses expert 0, all others use expert 1."""
    generator = torch.Generator().manual_seed(5)
    loader = [
        {"x": torch.randn(64, 300, generator=generator), "expert": int(i % world > 0), "labels": torch.arange(64) % 20}
        for i in range(2 * world)
    ]
    model = Routed()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        factors = estimate(model, loader[rank::world], estimator=estimator)
    gradients = tiny.exact_gradients(model, list(factors), loader)
    return {
        "captured": [tiny.captured(gradients[name], found) for name, found in factors.items()],
        "norm": [float(found.S[0] / torch.linalg.svdvals(gradients[n])[0]) for n, found in factors.items()],
        "names": list(factors),
        "digest": digest({f"{n}.{k}": t for n, f in factors.items() for k, t in vars(f).items()}),
        "warnings": [str(w.message) for w in caught if "left out" in str(w.message)],
    }


def half(rank, world):
    """float16, where each rank scales its own loss, here over ten decades."""
    model, loader = tiny.MLP().half(), tiny.mlp_batches(4)
    for batch in loader:
        batch["inputs"] = batch["inputs"].half()
    factors = estimate(model, loader[rank::world], loss_fn=lambda m, b: m(**b)["loss"].float() * 10.0 ** (-5 * rank))

    def weighted(m, b):
        index = next(i for i, other in enumerate(loader) if other is b)
        return m(b["inputs"].float(), b["labels"])["loss"] * 10.0 ** (-5 * (index % world))

    gradients = tiny.exact_gradients(model.float(), list(factors), loader, weighted)
    return [float(f.S[0] / torch.linalg.svdvals(gradients[name])[0]) for name, f in factors.items()]


class Conv(nn.Module):
    """A convolution and an embedding that only some batches use, beside a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(30, 24)
        self.conv = nn.Conv1d(24, 20, 3, padding=1)
        self.up = nn.Linear(20, 30)

    def forward(self, tokens, dense):
        x = self.table.weight.new_ones(*tokens.shape, 24).cumsum(-1).sin() if dense else self.table(tokens)
        logits = self.up(torch.tanh(self.conv(x.mT).mT))
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten())}


def not_linear(rank, world, estimator):
    """Gradients that autograd forms; only rank 1 uses the embedding."""
    generator = torch.Generator().manual_seed(5)
    tokens = [torch.randint(0, 30, (6, 9), generator=generator) for _ in range(4)]
    loader = [{"tokens": t, "dense": i % world == 0} for i, t in enumerate(tokens)]
    model, names = Conv(), ["table", "conv", "up"]
    factors = loraga.estimate_factors(model, loader[rank::world], names, 8, estimator=estimator)
    gradients = {name: g.flatten(1) for name, g in tiny.exact_gradients(model, names, loader).items()}
    return {
        "captured": [tiny.captured(gradients[name], factors[name]) for name in names],
        "norm": [float(factors[n].S[0] / torch.linalg.svdvals(gradients[n])[0]) for n in names],
        "digest": digest({f"{n}.{k}": t for n, f in factors.items() for k, t in vars(f).items()}),
    }


def every_kind(rank, world, start):
    """Adapters of convolutions, an embedding and experts, from 4 batches dealt out to the ranks."""
    model = _start_of_every_kind(kinds.build(), kinds.batches(4)[rank::world], kinds.config(), start=start)
    report = model.loraga_report
    return {
        "model": digest(model.state_dict()),
        "ordinary": {layer.name: layer.reason for layer in report.ordinary},
        "spectra": {layer.name: layer.spectrum for layer in report.initialised},
        "updates": {layer.updates for layer in report.layers},
    }


def ordinary(rank, world):
    """Rows and layers that the gradient does not start, in an adapter that each rank drew for itself."""
    model = get_peft_model(tiny.FewAndNone(), tiny.config(r=8))
    made = digest(adapter(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loraga.fast_init(model, tiny.mlp_batches(classes=5)[rank::world], show_progress_bar=False)
    return {"made": made, "started": digest(adapter(model))}


def loaded_back(model):
    """The whole state after what trains was set to zero and each rank's own part of the adapter loaded again."""
    parts = {name: value.clone() for name, value in model.state_dict().items() if "lora_" in name}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    model.load_state_dict(parts, strict=False)
    return get_model_state_dict(model, options=GATHERED)


def every_kind_sharded(rank, world):
    """The same where fully_shard comes after, and before."""
    loader = kinds.batches(4)[rank::world]
    model = _start_of_every_kind(kinds.build(), loader, kinds.config())
    saved = {name: value.clone() for name, value in model.state_dict().items()}
    fully_shard(model)
    state = get_model_state_dict(model, options=GATHERED)
    again = loaded_back(model)
    kept = [rank > 0 or all(torch.equal(saved[n], found[n]) for n in saved) for found in (state, again)]

    model = get_peft_model(kinds.build(), kinds.config())
    fully_shard(model)
    with torch.no_grad():
        model(kinds.batches()[0])  # leaves the weights gathered
    report = _start_of_every_kind(model, loader).loraga_report
    return {
        "kept": kept,
        "initialised": [layer.name for layer in report.initialised],
        "ordinary": {layer.name: layer.reason for layer in report.ordinary},
    }


def _start_of_every_kind(model, loader, lora=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return loraga.fast_init(
            model, loader, lora, init=InitConfig(**options), loss_fn=kinds.loss_of, show_progress_bar=False
        )


def peft_flow(rank, world, folder):
    """PEFT's own calls with 3 and 1 batches, again from the cache, with a rank that fails, and of a sharded model."""
    import peft

    loraga.apply_to_peft()
    loader = tiny.batches("llama", 4, rows=1)
    options = {"init_lora_weights": "lora_ga", "lora_ga_config": peft.LoraGAConfig()}
    cache = Path(folder) / "gradients.pt"

    def start(model, share, fails=False, cache_file=None):
        def step():
            for batch in share:
                model(**batch).loss.backward()
            if fails:
                raise OSError("bad step")

        peft.preprocess_loraga(model, tiny.config(**options), step, cache_file=cache_file)
        return get_peft_model(model, tiny.config(**options))

    def outcome(model, *args):
        try:
            start(model, *args)
            return "nothing"
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    merged = start(tiny.build("llama"), loader[3 * rank : 3 + rank], cache_file=cache)
    cached = start(tiny.build("llama"), [], cache_file=cache)
    plain = tiny.build("llama")
    before = tiny.everything_about(plain)
    found = {
        "counts": (merged.loraga_report.micro_batches, merged.loraga_report.ranks),
        "merged": digest(merged.state_dict()),
        "cached": digest(cached.state_dict()),
        "failed": outcome(plain, loader[rank::world], rank == 1),
    }
    tiny.assert_same(before, tiny.everything_about(plain))
    found["sharded"] = outcome(shard(tiny.build("llama")), loader)
    loraga.restore_peft()
    if rank == 0:
        names = [layer.name for layer in merged.loraga_report.layers]
        gradients = tiny.exact_gradients(tiny.build("llama"), names, loader)
        found["excess"] = []
        for name, g in gradients.items():
            A, B = tiny.pairs(merged, name)
            a, b = torch.linalg.qr(A.double().T).Q, torch.linalg.qr(B.double()).Q
            factors = SimpleNamespace(Vh=a.T, U=torch.cat((b, b), 1))
            found["excess"].append(tiny.objective_excess(g, factors, tiny.R // 2))
    return found


# ---- failures


def failures(rank, world):
    """Every rank but one waits for it; all stop, and each model is as before."""
    found = {}

    def attempt(name, call, *args, **kwargs):
        began = time.monotonic()
        try:
            call(*args, **kwargs)
            outcome = "nothing"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        found[name] = outcome
        found[name + " seconds"] = time.monotonic() - began

    model, loader = tiny.MLP(), tiny.mlp_batches(4)
    before = tiny.everything_about(model)

    def loading():
        yield loader[0]
        if rank == 2:
            raise OSError("disk gone")
        yield loader[1]

    def loss(model, batch):
        if rank == 1 and batch["labels"].equal(loader[2]["labels"]):
            raise ArithmeticError("bad loss")
        return model(**batch)["loss"]

    few = tiny.config(r=2)
    attempt("loader", tiny.init, model, loading(), few)
    attempt("loss", tiny.init, model, loader, few, loss_fn=loss)
    attempt(
        "targets", tiny.init, model, loader, tiny.config(r=2, target_modules=["layers.9" if rank == 1 else "layers.0"])
    )
    attempt("rank", tiny.init, model, loader, tiny.config(r=1 if rank == 3 else 2))
    attempt("empty", tiny.init, model, [], few)

    from loraga.integrations.peft import writing as _writing

    fill, merging = _writing.fill, loraga.estimators.Dense.merging

    def breaks(*args):
        raise MemoryError("no room")

    def breaks_late(slot, *args):
        fill(slot, *args)
        if slot.name == "layers.2":
            breaks()

    if rank == 2:
        _writing.fill = breaks_late
    attempt("writing", tiny.init, model, loader, few)
    _writing.fill = fill
    if rank == 0:
        loraga.estimators.Dense.merging = breaks
    attempt("merging", tiny.init, model, loader, few)
    loraga.estimators.Dense.merging = merging
    tiny.assert_same(before, tiny.everything_about(model))
    attempt("afterwards", tiny.init, model, loader, few)
    return found


def alone(rank, world):
    """Only rank 0 calls; the process group's timeout ends it."""
    dist.distributed_c10d._get_default_store().set_timeout(datetime.timedelta(seconds=2))
    distributed_ranks._PATIENCE = 0.5
    distributed_ranks._SLICE = datetime.timedelta(seconds=0.25)
    if rank == 0:
        import logging

        heard = []
        handler = logging.Handler()
        handler.emit = lambda record: heard.append(record.getMessage())
        logging.getLogger("loraga").addHandler(handler)
        try:
            tiny.init(tiny.MLP(), tiny.mlp_batches(1), tiny.config(r=2))
        except RuntimeError as error:
            return {"error": str(error), "heard": heard}
    return None


# ---- DistributedDataParallel


def ddp(rank, world):
    loader = tiny.mlp_batches(4)
    wrapped = DistributedDataParallel(tiny.MLP())
    names = list(loraga.estimate_factors(wrapped, loader[rank::world], rank=4))
    try:
        tiny.init(wrapped, loader[rank::world], tiny.config(r=2))
        refused = ""
    except ValueError as error:
        refused = str(error)
    peft_model = get_peft_model(tiny.MLP(), tiny.config(r=2))
    wrapped = DistributedDataParallel(peft_model)
    train(wrapped, loader[rank::world], 1)
    same = loraga.fast_init(wrapped, loader[rank::world], show_progress_bar=False) is peft_model
    started = digest(adapter(peft_model))
    losses = train(wrapped, loader[rank::world], 2)
    return {
        "names": names,
        "refused": refused,
        "same": same,
        "started": started,
        "trained": digest(adapter(peft_model)),
        "losses": losses,
    }


def train(model, loader, steps):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _, batch in zip(range(steps), loader, strict=False):
        loss = model(**batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


# ---- sharded


EXACT = {"estimator": "dense", "buffer_dtype": "float32"}


def shard(model):
    base = model.base_model.model if isinstance(model, loraga.integrations.peft.PeftModel) else model
    for layer in base.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def whole(rank, world, start):
    """What the sharded runs are held against: one process, all batches."""
    model = tiny.init(tiny.build("llama"), tiny.batches("llama", 4, rows=2), init=InitConfig(start=start, **EXACT))
    started = {name: value.clone() for name, value in adapter(model).items()}
    return {"start": started, "losses": train(model, tiny.batches("llama", 4, rows=2), 3)}


def sharded(rank, world, start, order, folder):
    """Initialise before or after fully_shard, save as accelerate does, train, load."""
    loader = tiny.batches("llama", 4, rows=2)
    options = {"init": InitConfig(start=start, **EXACT)}
    if order == "before":
        model = shard(tiny.init(tiny.build("llama"), loader[rank::world], **options))
    else:
        model = shard(get_peft_model(tiny.build("llama"), tiny.config()))
        with torch.no_grad():
            model(**loader[0])  # leaves what the outermost module holds gathered
        loraga.fast_init(model, loader[rank::world], show_progress_bar=False, **options)
    kinds = Counter(type(p).__name__ for p in model.parameters())
    state = get_model_state_dict(model, options=GATHERED)
    if rank == 0:
        model.save_pretrained(Path(folder) / f"{start}-{order}", state_dict=state, save_embedding_layers=False)
    losses = train(model, loader, 3)
    state = get_model_state_dict(model, options=GATHERED)
    # what was saved goes in again
    again = loaded_back(model)
    back = rank > 0 or all(torch.equal(state[name], again[name]) for name in state)
    full = state if rank == 0 else {}
    set_model_state_dict(
        model, full, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    )
    return {"kinds": kinds, "losses": losses, "back": back}


class Largest(TorchDispatchMode):
    """The most bytes that any tensor of this process had, inside our own ops too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.shape = 0, ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "loraga":
            with self:
                return getattr(reference, function._schema.name.split("::")[1])(*args, **(kwargs or {}))
        if any(hasattr(leaf, "device_mesh") for leaf in tree_leaves((args, kwargs))):
            return NotImplemented  # DTensor first: then its parts come here
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                size = leaf.numel() * leaf.element_size()
                if size > self.bytes:
                    self.bytes, self.shape = size, (str(function), tuple(leaf.shape))
        return result


def memory(rank, world):
    """The largest tensor of an initialisation and of a training step, of the same sharded model."""
    model, loader = shard(get_peft_model(tiny.build("llama"), tiny.config())), tiny.batches("llama", 4, rows=2)
    with Largest() as step:
        train(model, loader, 1)
    with Largest() as start:
        loraga.fast_init(model, loader[rank::world], show_progress_bar=False)
    weights = sum(p.numel() for p in model.parameters()) * 4
    return {"step": step.bytes, "start": start.bytes, "what": start.shape, "weights": weights}


def refusals(rank, world):
    """What cannot be done with a sharded model, and that nothing is left behind."""
    loader = tiny.batches("llama", 2, rows=1)
    found = {}

    def attempt(name, call, *args, **kwargs):
        try:
            call(*args, **kwargs)
            found[name] = "nothing"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"

    plain = shard(tiny.build("llama"))
    attempt("plain", tiny.init, plain, loader)
    # tapping a plain sharded model works
    whole = estimate(tiny.build("llama"), loader)
    cut = estimate(plain, loader)
    found["factors"] = max(float((whole[name].U - cut[name].U).abs().max()) for name in whole)

    model = shard(get_peft_model(tiny.build("llama"), tiny.config()))
    fast = {"show_progress_bar": False}
    attempt("weights", loraga.fast_init, model, loader, init=InitConfig(scale="weight-svd"), **fast)
    attempt("uneven", loraga.fast_init, model, loader[: 1 + rank], **fast)

    def loss(model, batch):
        model(**batch)
        raise OSError("behind the forward")

    attempt("loss", loraga.fast_init, model, loader, loss_fn=loss, **fast)
    found["kinds"] = {type(p).__name__ for p in model.parameters()}
    attempt("export", loraga.export_adapter, model, "nowhere")
    attempt(
        "dora", loraga.fast_init, shard(get_peft_model(tiny.build("llama"), tiny.config(use_dora=True))), loader, **fast
    )
    early = shard(tiny.init(tiny.build("llama"), loader))
    attempt("again", loraga.fast_init, early, loader, **fast)
    attempt("after all", loraga.fast_init, model, loader, **fast)
    attempt("anew", loraga.fast_init, model, loader, **fast)
    train(model, loader, 1)

    parallel = tiny.build("llama")
    plan = {"up_proj": ColwiseParallel(), "gate_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
    mesh = init_device_mesh("cpu", (world,))
    parallelize_module(parallel, mesh, {f"model.layers.0.mlp.{name}": style for name, style in plan.items()})
    attempt("columns", estimate, parallel, loader, target_modules=["gate_proj"])
    attempt("rows", tiny.init, parallel, loader, tiny.config(target_modules=["down_proj"]))
    beside = estimate(parallel, loader, target_modules=["q_proj"])
    found["beside"] = max(
        float((whole[name].S - factors.S).abs().max() / whole[name].S[0]) for name, factors in beside.items()
    )
    return found


def cut_short(rank, world):
    """Rank 1 fails inside its forward, while rank 0 waits there for its part of the weights; then its process ends."""
    model, loader = shard(get_peft_model(tiny.build("llama"), tiny.config())), tiny.batches("llama", 2, rows=1)

    def fail(*args):
        raise OSError("amid the forward")

    if rank == 1:
        model.base_model.model.model.layers[1].register_forward_pre_hook(fail, prepend=True)
    began = time.monotonic()
    try:
        loraga.fast_init(model, loader, show_progress_bar=False)
        outcome = "nothing"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    return {"outcome": outcome, "seconds": time.monotonic() - began}


def killed(rank, world, moment):
    """Rank 1 is killed, and rank 0 left with whom it waits for."""
    dist.distributed_c10d._get_default_store().set_timeout(datetime.timedelta(seconds=5))
    model, loader = tiny.MLP(), tiny.mlp_batches(3)

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)

    class Interrupted(list):
        def __iter__(self):
            yield self[0]
            die()

    if rank == 1 and moment == "between batches":
        loader = Interrupted(loader)
    elif rank == 1:
        dist.all_reduce = die
    before = tiny.everything_about(model)
    try:
        tiny.init(model, loader)
        outcome = "nothing"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    tiny.assert_same(before, tiny.everything_about(model))
    return outcome
