"""Every option of an initialisation, checked when it is made."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass

METHODS = ("lora-ga", "lora-one")
DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = ("stable", "unit", "gd", "weight-svd")
OFFSETS = ("anchor", "subtract", "zero-b", "none")
ESTIMATORS = ("streaming", "dense")
BUFFER_DTYPES = ("auto", "bfloat16", "float32")
BUFFER_DEVICES = ("model", "cpu")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise `ValueError` naming the option, the value and what is allowed."""
    if value not in allowed:
        listed = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{name}={value!r} is not known; allowed are {listed}.")


def check_positive(name: str, value: object) -> None:
    """Raise unless `value` is a finite number above zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number above 0, not {value!r}.")
    if not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name}={value!r} must be finite and above 0.")


def check_whole(name: str, value: object) -> None:
    """Raise unless `value` is a whole number above zero."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number above 0, not {value!r}.")
    if value < 1:
        raise ValueError(f"{name}={value!r} must be at least 1.")


def _offset_of(method: str, offset: str | None) -> str:
    return offset if offset is not None else "none" if method == "lora-one" else "anchor"


@dataclass(frozen=True)
class InitConfig:
    """How gradients become an adapter's start.

    Args:
        method (`str`): `"lora-ga"` (arXiv 2407.05000) or `"lora-one"` (arXiv 2502.01235).
        direction (`str`): which singular directions A and B take (lora-ga): `"ArB2r"` (A the first r right
            vectors, B the left vectors r..2r; the paper's), `"A2rBr"` (swapped), `"ArBr"` (odd and even of
            the first 2r), `"random"` (two disjoint random halves of the first 2r).
        scale (`str`): size of A and B (lora-ga): `"stable"` (m^(1/4)/sqrt(stable_gamma) on both, the paper's),
            `"unit"` (1), `"gd"` (1/s), `"weight-svd"` (mean of sqrt(sigma_i(W)/s) over the top r).
        stable_gamma (`float`): gamma of `scale="stable"`.
        lora_one_gamma (`float`): gamma of `method="lora-one"`.
        offset (`str`, *optional*): how the non-zero start is cancelled: `"anchor"` (default for lora-ga: frozen
            copy in the adapter, base untouched), `"subtract"` (base weights change), `"zero-b"` (B starts at
            zero), `"none"` (nothing is cancelled; the default and only choice for lora-one).
        estimator (`str`): `"streaming"` (never forms a gradient) or `"dense"` (one m x n buffer per layer).
        buffer_dtype (`str`): of the dense buffers: `"bfloat16"`, `"float32"`, or `"auto"` (bfloat16 up to 256
            micro-batches, where rounding stays below the sampling noise; float32 beyond or where their number
            is not known).
        buffer_device (`str`): where dense buffers live: `"model"` (beside the layer) or `"cpu"` (pinned memory;
            on the layer's device only `staging_bytes` are held).
        staging_bytes (`int`): of device memory through which buffers with `buffer_device="cpu"` are summed; a third of
            it must hold a row of the widest buffer. 256 MiB unless given.

    Raises:
        ValueError: an option has an unknown value or does not go with `method`; the message lists what is allowed.
        TypeError: a number is not a number.
    """

    method: str = "lora-ga"
    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: float = 16.0
    lora_one_gamma: float = 128.0
    offset: str = None  # type: ignore[assignment]  # None becomes the method's own
    estimator: str = "streaming"
    buffer_dtype: str = "auto"
    buffer_device: str = "model"
    staging_bytes: int = 2**28

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("direction", self.direction, DIRECTIONS)
        check_choice("scale", self.scale, SCALES)
        check_positive("stable_gamma", self.stable_gamma)
        check_positive("lora_one_gamma", self.lora_one_gamma)
        check_choice("estimator", self.estimator, ESTIMATORS)
        check_choice("buffer_dtype", self.buffer_dtype, BUFFER_DTYPES)
        check_choice("buffer_device", self.buffer_device, BUFFER_DEVICES)
        check_whole("staging_bytes", self.staging_bytes)
        object.__setattr__(self, "offset", _offset_of(self.method, self.offset))
        check_choice("offset", self.offset, OFFSETS)
        if self.method == "lora-one":
            for name, default in (("direction", "ArB2r"), ("scale", "stable")):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} does not go with method='lora-one', which has one of its "
                        f"own; leave {name} out, or use method='lora-ga'."
                    )
        if self.method == "lora-one" and self.offset != "none":
            raise ValueError(
                f"offset={self.offset!r} does not go with method='lora-one', whose start is one gradient step "
                "and is not cancelled; leave offset out, or use method='lora-ga'."
            )
        if self.method == "lora-ga" and self.offset == "none":
            raise ValueError(
                "offset='none' does not go with method='lora-ga': the model's function would change at the "
                "start; allowed are 'anchor', 'subtract', 'zero-b'."
            )

    def triplets(self, rank: int) -> int:
        """How many singular triplets of the gradient an adapter of `rank` needs."""
        return rank if self.method == "lora-one" else 2 * rank

    def to_dict(self) -> dict:
        """The options as plain values, for JSON."""
        return asdict(self)
