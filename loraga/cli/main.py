"""The command `loraga`: `init` writes an adapter, `plan` predicts, `calibrate` times kernels, `env` says what runs."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

from loraga._atomic_files import atomic_folder
from loraga._messages import one_line
from loraga._version import __version__
from loraga.cli.rows import InputError, make_batches, read_rows
from loraga.config import DIRECTIONS, METHODS, SCALES, STARTS, InitConfig

REPORT_FILE = "loraga_report.json"
PLOT_FILE = "loraga_report.png"
ADAPTER_FILE = "adapter_config.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv (`Sequence[str]`, *optional*): arguments; those of the process if left out.

    Returns:
        `int`: the exit code: 0, 2 for wrong usage or input, 130 for Ctrl-C, 1 for anything else that fails. Errors are
        one line on stderr; with LORAGA_DEBUG=1 in the environment the traceback comes before it.
    """
    args = _parser().parse_args(argv)
    try:
        with _short_warnings():
            args.run(args)
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return _failed(error)


def _failed(error: BaseException) -> int:
    """Print an error as one line on stderr, and return the exit code."""
    if os.environ.get("LORAGA_DEBUG") == "1":
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        code, message = 130, "interrupted; nothing was written"
    elif isinstance(error, InputError):
        code, message = 2, one_line(error)
    elif type(error).__name__ == "OutOfMemoryError":  # torch's, which is not worth importing for this
        code, message = 1, "out of memory: use a smaller --batch-size or --max-length, or --dtype bfloat16"
    else:
        code, message = 1, f"{type(error).__name__}: {one_line(error)}"
    _tell(f"error: {message}")
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print wrong usage as one line, as all errors of this command are printed."""
        self.exit(2, f"loraga: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="loraga", description="LoRA adapters that start where full fine-tuning would go.")
    parser.add_argument("--version", action="version", version=f"loraga {__version__}")
    commands = parser.add_subparsers(required=True, metavar="{init,plan,calibrate,env}", title="commands")
    _add_init(commands)
    _add_plan(commands)
    calibrate = commands.add_parser(
        "calibrate",
        help="time whole updates on this machine's GPU and keep the kernels that win",
        description="Time whole updates on each kind of GPU of this machine, with and without the Triton kernel of "
        "each op. Kernels that do not make them a tenth faster, twice, are not used any more. The choices are stored "
        "in the user's cache directory. Without this command every kernel that gives the right results is used.",
    )
    calibrate.set_defaults(run=_calibrate)
    env = commands.add_parser("env", help="print what is active: devices, Triton kernels, native core, versions")
    env.add_argument("--json", action="store_true", help="as JSON")
    env.set_defaults(run=_env)
    return parser


def _add_init(commands: Any) -> None:
    init = commands.add_parser(
        "init",
        help="write an adapter initialised from the gradient of a few batches",
        description="Write a PEFT adapter initialised from the gradient of a few batches (LoRA-GA), which any trainer "
        "can start from.",
    )
    init.add_argument("model", metavar="MODEL", help="local folder or hub id of a causal, encoder-decoder or masked LM")
    init.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON lines, or a JSON array, of 'text', 'prompt' and 'completion', or 'messages'; "
        "batch-size x max-batches rows are drawn at random",
    )
    init.add_argument("--output", type=Path, required=True, metavar="DIR", help="adapter folder to write")
    init.add_argument("--overwrite", action="store_true", help="replace DIR if it holds an adapter")
    _add_adapter_options(init.add_argument_group("adapter"))
    _add_gradient_options(init.add_argument_group("gradient"))
    _add_recipe_options(init.add_argument_group("recipe"))
    _add_model_options(init.add_argument_group("model"))
    init.add_argument("--quiet", action="store_true", help="print nothing but warnings and errors")
    init.set_defaults(run=_init)


def _add_adapter_options(adapter: Any) -> None:
    adapter.add_argument("--rank", type=_whole, default=16, metavar="R", help="r (default 16)")
    adapter.add_argument("--alpha", type=_positive, metavar="A", help="lora_alpha (default 16 sqrt(r): 64 for rank 16)")
    adapter.add_argument(
        "--target-modules",
        nargs="+",
        default=["all-linear"],
        metavar="NAME",
        help="names of the layers, such as q_proj v_proj (default all-linear)",
    )


def _add_gradient_options(gradient: Any) -> None:
    gradient.add_argument("--max-length", type=_whole, default=512, metavar="N", help="tokens per row (default 512)")
    gradient.add_argument("--batch-size", type=_whole, default=4, metavar="N", help="rows per batch (default 4)")
    gradient.add_argument("--max-batches", type=_whole, default=8, metavar="N", help="batches (default 8)")
    gradient.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw, masking, sketch (default 0)")


def _add_recipe_options(recipe: Any) -> None:
    recipe.add_argument("--method", choices=METHODS, default="lora-ga", help="default lora-ga")
    recipe.add_argument("--direction", choices=DIRECTIONS, default="ArB2r", help="of the mirror (default ArB2r)")
    recipe.add_argument("--scale", choices=SCALES, default="stable", help="of lora-ga (default stable)")
    recipe.add_argument("--gamma", type=_positive, metavar="G", help="default 16 for lora-ga, 128 for lora-one")
    recipe.add_argument(
        "--start", choices=STARTS, default="mirror", help="of lora-ga: mirrored pairs or B zero (default mirror)"
    )


def _add_model_options(model: Any) -> None:
    model.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="of the weights"
    )
    model.add_argument(
        "--device", default="auto", metavar="DEVICE", help="such as cuda:1 (default: a GPU if there is one)"
    )
    model.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="predict state, work and peak memory from a model's configuration",
        description="Predict what an initialisation needs: state, work, time at given ceilings, peak memory beside the "
        "LoRA training step, traffic between ranks. The model is built without weights; nothing is downloaded.",
    )
    plan.add_argument(
        "model",
        metavar="MODEL_CONFIG",
        help="folder, config.json, model in the local cache, or a name such as llama-2-7b, llama-3.1-405b",
    )
    plan.add_argument("--rank", type=_whole, required=True, metavar="R", help="r of the adapter")
    plan.add_argument("--tokens", type=_whole, required=True, metavar="T", help="to look at, on all ranks together")
    plan.add_argument("--micro-batch", type=_whole, default=8, metavar="N", help="rows per micro-batch (default 8)")
    plan.add_argument("--length", type=_whole, default=1024, metavar="N", help="tokens per row (default 1024)")
    plan.add_argument(
        "--target-modules",
        nargs="+",
        default=["all-linear"],
        metavar="NAME",
        help="names of the layers, such as q_proj v_proj (default all-linear)",
    )
    plan.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="of the weights (bfloat16)"
    )
    plan.add_argument("--ranks", type=_whole, default=1, metavar="N", help="data-parallel ranks (default 1)")
    plan.add_argument("--checkpointing", action="store_true", help="count the work of gradient checkpointing too")
    plan.add_argument("--tflops", type=_positive, metavar="F", help="ceiling of the device, for a time: 1e12 flops/s")
    plan.add_argument("--gb-per-second", type=_positive, metavar="B", help="ceiling of its memory: 1e9 bytes/s")
    plan.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    plan.add_argument("--json", action="store_true", help="as JSON")
    plan.set_defaults(run=_plan)


def _whole(text: str) -> int:
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return number


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0")
    return _whole_or_not(number)


def _whole_or_not(number: float) -> float:
    """`number`, as an int where it is a whole number, since some readers of adapters take an int only."""
    return int(number) if number.is_integer() else number


def _init(args: argparse.Namespace) -> None:
    """`loraga init`. Whatever can be checked without the model is checked before the model is loaded."""
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(
            "loraga init is one process, and torchrun started several; run it without, or call loraga.fast_init in a "
            "script of your own."
        )
    init = _init_config(args)
    _check_output(args.output, args.overwrite, keep=(Path(args.model), args.data))
    rows = read_rows(args.data, args.batch_size * args.max_batches, args.seed)
    with _as_input_errors(), _output_folder(args.output) as folder:
        import loraga
        from loraga.integrations import hf_models

        device = _device(args.device)
        if args.quiet:
            hf_models.silence()
        config, tokenizer = hf_models.load_config_and_tokenizer(args.model, args.trust_remote_code)
        task = hf_models.task_of(config)
        max_length = min(args.max_length, tokenizer.model_max_length, hf_models.positions_of(config) or args.max_length)
        batches, notes = make_batches(
            rows, tokenizer, task, max_length=max_length, batch_size=args.batch_size, seed=args.seed
        )
        if max_length < args.max_length and any(batch["input_ids"].shape[1] == max_length for batch in batches):
            notes.append(f"rows are cut off at {max_length} tokens, the model's largest length")
        for note in notes:
            _tell(f"note: {note}")
        model = hf_models.load_model(args.model, config, args.dtype, args.seed, args.trust_remote_code)
        if model.device != device:  # transformers 4 refuses to move an 8-bit model, even to where it is
            model = model.to(device)
        peft_model = loraga.fast_init(
            model, batches, _lora_config(args, task), init=init, seed=args.seed, show_progress_bar=not args.quiet
        )
        peft_model.peft_config["default"].base_model_name_or_path = args.model
        # without this argument PEFT may ask the hub whether the embeddings were resized; they were not
        peft_model.save_pretrained(folder, save_embedding_layers=False)
        report = peft_model.loraga_report
        report.save(folder / REPORT_FILE)
        try:
            report.plot(folder / PLOT_FILE)
        except ImportError as error:
            _tell(f"note: no plot. {error}")
    if not args.quiet:
        print(report)
        print(f"\nAdapter written to {args.output}. Train it at full fine-tuning's learning rate, starting with")
        print(f"  PeftModel.from_pretrained(base_model, {str(args.output)!r}, is_trainable=True)")


@contextmanager
def _as_input_errors() -> Iterator[None]:
    """Turn a `ValueError` into an `InputError`, for which the command exits with code 2."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(one_line(error)) from error


@contextmanager
def _output_folder(target: Path) -> Iterator[Path]:
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(atomic_folder(target))
        except OSError as error:
            raise InputError(f"cannot write to {target.resolve().parent}: {error.strerror or error}.") from error
        yield folder


def _init_config(args: argparse.Namespace) -> InitConfig:
    lora_one = args.method == "lora-one"
    options: dict[str, Any] = {
        "method": args.method,
        "direction": args.direction,
        "scale": args.scale,
        "start": args.start,
    }
    if args.gamma is not None:
        options["lora_one_gamma" if lora_one else "stable_gamma"] = args.gamma
    try:
        return InitConfig(**options)
    except ValueError as error:
        raise InputError(str(error)) from error


def _lora_config(args: argparse.Namespace, task: str) -> Any:
    from loraga.integrations.peft import LoraConfig

    names = [name for names in args.target_modules for name in names.split(",") if name]
    return LoraConfig(
        r=args.rank,
        lora_alpha=getattr(args, "alpha", None) or _whole_or_not(16 * math.sqrt(args.rank)),
        target_modules="all-linear" if names == ["all-linear"] else names,
        task_type={"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}.get(task),
    )


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {name} cannot be used here: {one_line(error)}") from error
    return device


def _check_output(target: Path, overwrite: bool, keep: Sequence[Path]) -> None:
    """Raise `InputError` unless `target` is new, empty, or an adapter to overwrite that contains none of `keep`."""
    if target.is_file():
        raise InputError(f"--output {target} is a file; give a folder.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise InputError(f"--output {target} exists and is not empty; give another folder, or --overwrite.")
    # replacing deletes the folder, so it must be an adapter, and must not contain the model or the data
    if not (target / ADAPTER_FILE).is_file():
        raise InputError(f"--output {target} holds no adapter, so --overwrite will not delete it; give another folder.")
    for path in keep:
        if path.exists() and path.resolve().is_relative_to(target.resolve()):
            raise InputError(f"--output {target} holds {path}, which --overwrite would delete; give another folder.")


def _plan(args: argparse.Namespace) -> None:
    if (args.tflops is None) != (args.gb_per_second is None):
        raise InputError("--tflops and --gb-per-second go together: a time needs both ceilings.")
    import torch

    from loraga.integrations import hf_models
    from loraga.plan.dry_run import Ceilings
    from loraga.plan.plan import plan

    hf_models.silence()
    with _as_input_errors():
        config = hf_models.config_of(args.model, args.trust_remote_code)
    positions = hf_models.positions_of(config)
    if positions is not None and args.length > positions:
        raise InputError(f"--length {args.length} is more than the {positions} positions of {args.model!r}.")
    per_batch = args.micro_batch * args.length * args.ranks
    with _as_input_errors():
        planned = plan(
            hf_models.without_weights(config, hf_models.family_of(config), getattr(torch, args.dtype)),
            _lora_config(args, hf_models.task_of(config)),
            rows=args.micro_batch,
            length=args.length,
            micro_batches=-(-args.tokens // per_batch),
            ranks=args.ranks,
            checkpointing=args.checkpointing,
            ceilings=Ceilings(args.tflops * 1e12, args.gb_per_second * 1e9) if args.tflops else None,
        )
    print(json.dumps(planned.to_dict(), indent=1) if args.json else planned)


def _calibrate(args: argparse.Namespace) -> None:
    from loraga.cli.calibrate import calibrate

    calibrate()


def _env(args: argparse.Namespace) -> None:
    from loraga.cli.environment import describe, environment

    with _as_input_errors():
        found = environment()
    print(json.dumps(found, indent=1) if args.json else describe(found))


def _tell(message: str) -> None:
    print(f"loraga: {message}", file=sys.stderr)


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Print warnings as one line, without the file and line of the source, which do not help at a shell."""
    with warnings.catch_warnings():
        for developers in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", developers)
        warnings.showwarning = lambda message, *_, **__: _tell(f"warning: {' '.join(str(message).split())}")
        yield
