"""`InitConfig`: every option of an initialisation, checked when the object is made."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Method = Literal["lora-ga", "lora-one"]
Direction = Literal["ArB2r", "A2rBr", "ArBr", "random"]
Scale = Literal["stable", "unit", "gd", "weight-svd"]
StartName = Literal["mirror", "zero-b"]
EstimatorName = Literal["streaming", "dense"]
BufferDtype = Literal["auto", "bfloat16", "float32"]
BufferDevice = Literal["model", "cpu"]

METHODS: tuple[Method, ...] = get_args(Method)
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
SCALES: tuple[Scale, ...] = get_args(Scale)
STARTS: tuple[StartName, ...] = get_args(StartName)
ESTIMATORS: tuple[EstimatorName, ...] = get_args(EstimatorName)
BUFFER_DTYPES: tuple[BufferDtype, ...] = get_args(BufferDtype)
BUFFER_DEVICES: tuple[BufferDevice, ...] = get_args(BufferDevice)


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise `ValueError` unless `value` is allowed. The message names the option, the value and what is allowed."""
    if value not in allowed:
        listed = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{name}={value!r} is not known; allowed are {listed}.")


def check_positive(name: str, value: object) -> None:
    """Raise `TypeError` unless `value` is a number, and `ValueError` unless it is finite and above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number above 0, not {value!r}.")
    if not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name}={value!r} must be finite and above 0.")


def check_positive_int(name: str, value: object) -> None:
    """Raise `TypeError` unless `value` is a whole number, and `ValueError` unless it is at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number above 0, not {value!r}.")
    if value < 1:
        raise ValueError(f"{name}={value!r} must be at least 1.")


@dataclass(frozen=True)
class InitConfig:
    """How a gradient becomes the start of an adapter.

    The options are checked when the object is made, and `dataclasses.replace` checks them again.

    ```py
    init = loraga.InitConfig(scale="unit", estimator="dense", buffer_dtype="float32")
    peft_model = loraga.fast_init(model, batches, lora_config, init=init, loss_fn=loss_fn)
    ```

    In what follows r is the rank of the adapter, s is PEFT's scaling (lora_alpha / r, or lora_alpha / sqrt(r) with
    rsLoRA), and W (m, n) is the weight of a layer. docs/starts.md explains and derives the starts and the scales.

    Args:
        method (`str`): `"lora-ga"` (arXiv 2407.05000) or `"lora-one"` (arXiv 2502.01235).
        direction (`str`): which singular directions A0 and B0 take, with p = r/2 pairs (lora-ga, mirror): `"ArB2r"`
            (A0 takes the first p right vectors and B0 the left vectors p..2p, as in the paper), `"A2rBr"` (the two
            ranges swapped), `"ArBr"` (A0 takes the even and B0 the odd ones of the first 2p, counted from 1),
            `"random"` (two disjoint random halves of the first 2p).
        scale (`str`): how long the rows of A and the columns of B are (lora-ga): `"stable"` (the first step of Adam is
            that of the paper's LoRA-GA at rank r/2 and the same alpha), `"unit"` (1), `"gd"` (the first step of plain
            gradient descent is that of full fine-tuning, projected on the directions of A and B), `"weight-svd"` (the
            mean of sqrt(sigma_i(W) / s) over the r largest singular values of W).
        stable_gamma (`float`): gamma of `scale="stable"`; the paper's A and B have the length m^(1/4)/sqrt(gamma).
        lora_one_gamma (`float`): gamma of `method="lora-one"`.
        start (`str`): the numbers that A and B begin with (lora-ga), in an adapter of rank r. Both are an ordinary
            LoRA, and no base weight is written. `"mirror"`: r/2 pairs, A = [A0; A0] and B = [B0, -B0]. All of it is
            trained, and it trains as the paper's LoRA-GA does. `"zero-b"`: A is the first r right singular vectors and
            B is zero, so that the function at the start is the base's bit for bit.
        estimator (`str`): `"streaming"` (never forms a gradient) or `"dense"` (one (m, n) buffer per layer).
        buffer_dtype (`str`): of the dense buffers: `"bfloat16"`, `"float32"`, or `"auto"` (bfloat16 up to 256
            micro-batches, where rounding stays below the sampling noise; float32 for more, or where their number
            is not known).
        buffer_device (`str`): the memory of the dense buffers: `"model"` (that of the layer's device) or `"cpu"`
            (pinned host memory; the layer's device then needs only `staging_bytes`).
        staging_bytes (`int`): bytes of device memory through which buffers with `buffer_device="cpu"` are summed. A row
            of the widest buffer must fit into a third of it. The default is 256 MiB.

    Raises:
        ValueError: an option has an unknown value or does not go with `method`; the message lists what is allowed.
        TypeError: `stable_gamma` or `lora_one_gamma` is no number, or `staging_bytes` is no whole number.
    """

    method: Method = "lora-ga"
    direction: Direction = "ArB2r"
    scale: Scale = "stable"
    stable_gamma: float = 16.0
    lora_one_gamma: float = 128.0
    start: StartName = "mirror"
    estimator: EstimatorName = "streaming"
    buffer_dtype: BufferDtype = "auto"
    buffer_device: BufferDevice = "model"
    staging_bytes: int = 2**28

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("start", self.start, STARTS)
        check_choice("direction", self.direction, DIRECTIONS)
        check_choice("scale", self.scale, SCALES)
        check_positive("stable_gamma", self.stable_gamma)
        check_positive("lora_one_gamma", self.lora_one_gamma)
        check_choice("estimator", self.estimator, ESTIMATORS)
        check_choice("buffer_dtype", self.buffer_dtype, BUFFER_DTYPES)
        check_choice("buffer_device", self.buffer_device, BUFFER_DEVICES)
        check_positive_int("staging_bytes", self.staging_bytes)
        if self.method == "lora-one":
            self._check_unused(("start", "direction", "scale"), "method='lora-one', which has its own")
        elif self.start == "zero-b":
            self._check_unused(("direction",), "start='zero-b', which takes the leading right directions")

    def _check_unused(self, names: tuple[str, ...], where: str) -> None:
        """Raise `ValueError` if an option that has no effect differs from its default."""
        for name in names:
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(f"{name}={getattr(self, name)!r} does not go with {where}; leave {name} out.")

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values, for JSON. Those that have no effect with this method and start are `None`."""
        if self.method == "lora-one":
            unused: tuple[str, ...] = ("start", "direction", "scale", "stable_gamma")
        else:
            unused = ("lora_one_gamma", "direction") if self.start == "zero-b" else ("lora_one_gamma",)
        return asdict(self) | dict.fromkeys(unused)
