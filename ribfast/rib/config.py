"""The constants of RIB, and the presets: one procedure, as the paper has it, as it was released, and faster."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

Pooling = Literal["gndrp", "gap"]
Precision = Literal["float32", "float16", "bfloat16", "auto"]


@dataclass(frozen=True)
class RIBConfig:
    steps: int = 10  # maps that are summed: those of theta_0 .. theta_{steps - 1}
    lr: float = 8e-6  # learning rate of what adapts of the backbone, at the first update
    horizon: int | None = None  # updates over which the rate falls to 0; none: as many as steps
    power: float = 0.9  # of the rate's polynomial
    classifier_lr_scale: float = 10.0  # the classifier's learning rate is so many times the backbone's
    weight_decay: float = 1e-4  # of SGD, of all that adapts
    momentum: float = 1e-4  # of SGD; the released code passes its weight decay here
    pooling: Pooling = "gndrp"  # or the plain mean over all positions
    tau: float = 0.4  # where map / maximum is at most this, the map is pooled
    divide_by: Literal["all", "kept"] = (
        "all"  # positions that the pooled sum is divided by; "kept": those that are pooled
    )
    strict: bool = True  # pool where map / maximum < tau instead of <=
    margin: float | None = None  # logits above it count as this much in the loss
    stop_logit: float | None = 600.0  # stop after the step whose own logits sum up to more
    explode_level: float = 0.3  # a map runs away where the part of the image above this share of its maximum ...
    explode_area: float | None = 0.7  # ... is larger than this; none: no such guard
    scales: tuple[float, ...] = (1.0, 0.5, 1.5, 2.0)  # of a target's views; the guard looks at scale 1
    loss_scales: tuple[float, ...] = (1.0, 1.5, 2.0)  # the other scales feed the maps alone
    n_others: int = 20  # other images beside the target's views at each step
    others_crop: int = 512  # side of the square that is cut from each other image
    others_long_side: tuple[int, int] = (320, 640)  # before that its longer side gets a length between these
    disjoint: bool = True  # the others share no class with the target
    anchored: bool = (
        False  # the others' gradient is taken at theta_0 alone, once for each `share_others` images of a label set
    )
    anchor_batches: int = 4  # batches of others that an anchored gradient averages
    share_others: int = 8  # images of one label set that see the same others; what they see never depends on timing
    concurrency: int | None = None  # images at once; none: up to 8 that fit a GPU's memory, and 1 on a CPU
    graphs: bool = True  # steps as CUDA graphs, on a GPU
    precision: Precision = "float32"  # of everything after the trunk; "auto": 16 bits where the device is fast in them

    @classmethod
    def released(cls, **changes) -> "RIBConfig":
        """As the authors' code runs it on VOC."""
        return cls(**changes)

    @classmethod
    def paper(cls, **changes) -> "RIBConfig":
        """As the paper describes it: a margin instead of stops, the plain mean over U_tau, any other images."""
        settings = {"steps": 11, "horizon": 10, "divide_by": "kept", "strict": False, "margin": 600.0}
        settings |= {"stop_logit": None, "explode_area": None, "n_others": 19, "disjoint": False}
        return cls(**settings | changes)

    @classmethod
    def coco(cls, **changes) -> "RIBConfig":
        """The released constants for COCO."""
        settings = {"lr": 5e-6, "tau": 0.5, "stop_logit": 1000.0, "explode_area": 0.8, "n_others": 14}
        return cls(**settings | changes)

    @classmethod
    def fast(cls, **changes) -> "RIBConfig":
        """Approximate: the others' gradient from theta_0, and 16 bits where the device is fast in them."""
        return cls(**{"anchored": True, "share_others": 64, "precision": "auto"} | changes)

    def __post_init__(self):
        def need(name, holds, expected):
            if not holds:
                raise ValueError(f"RIBConfig: expected {name} {expected}, got {getattr(self, name)!r}")

        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
        for name in ("steps", "anchor_batches", "share_others", "others_crop"):
            value = getattr(self, name)
            need(name, isinstance(value, int) and value >= 1, "to be a whole number of at least 1")
        whole = type(self.concurrency) is int and self.concurrency >= 1
        need("concurrency", self.concurrency is None or whole, "to be a whole number of at least 1, or None")
        need("n_others", isinstance(self.n_others, int) and self.n_others >= 0, "to be a whole number of at least 0")
        need("horizon", self.horizon is None or self.horizon >= self.steps - 1, "of at least steps - 1, or None")
        for name in ("lr", "power", "classifier_lr_scale", "weight_decay", "momentum", "tau", "explode_level"):
            value = getattr(self, name)
            need(name, isinstance(value, (int, float)) and 0 <= value < float("inf"), "to be a number of at least 0")
        for name in ("margin", "stop_logit", "explode_area"):
            value = getattr(self, name)
            need(name, value is None or (isinstance(value, (int, float)) and value > 0), "to be above 0, or None")
        need("pooling", self.pooling in get_args(Pooling), f"to be one of {', '.join(get_args(Pooling))}")
        need("divide_by", self.divide_by in ("kept", "all"), "to be 'kept' or 'all'")
        need("precision", self.precision in get_args(Precision), f"to be one of {', '.join(get_args(Precision))}")
        need("scales", len(set(self.scales)) == len(self.scales) > 0, "to be distinct, and one at least")
        need("scales", 1.0 in self.scales and min(self.scales) > 0, "to be above 0 and to hold 1")
        need("scales", max(self.scales) < float("inf") and all(s == s for s in self.scales), "to be finite")
        low, high = self.others_long_side
        need("others_long_side", 1 <= low <= high, "to be two whole numbers, the smaller one first")
        need("loss_scales", self.loss_scales and set(self.loss_scales) <= set(self.scales), "to be among scales")

    def rate(self, step: int) -> float:
        """The backbone's learning rate of an update."""
        return self.lr * (1 - step / (self.horizon or self.steps)) ** self.power
