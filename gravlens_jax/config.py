"""The configuration of a run: frozen dataclasses that validate themselves, and their exact form in JSON.

Every field is a command-line option of `scripts/train.py`; the comment beside it is the option's help text.
"""

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from gravlens_jax.errors import InputError, check

CLASSES = ("no", "sphere", "vort")  # of simulated images, and the default; a label is an index into them
REQUIRED_SPLITS = ("train", "val", "test")
SPLITS = (*REQUIRED_SPLITS, "easy")  # each is a file <split>.npz; the index of a split is part of its images' seed
STREAM = "simulate:"
Checkpoint = Literal["best", "final"]  # the epoch of lowest validation loss, or the last one
PriorPreset = Literal["ct1", "model_a", "deeplensesim_i"]
PRIOR_PRESETS: tuple[PriorPreset, ...] = typing.get_args(PriorPreset)
NOT_NEGATIVE, POSITIVE, SEEDS = (0, math.inf), (1, math.inf), (0, 2**31 - 1)  # ranges for `check_ranges`


def check_ranges(config: Any, **ranges: tuple[float, float]) -> None:
    """Raises InputError if a number of a dataclass is NaN, infinite or out of its range (smallest, largest)."""
    for name, value in vars(config).items():
        check(not isinstance(value, float) or math.isfinite(value), f"{name}={value}: expected a finite number")
        if name in ranges and value is not None:
            low, high = ranges[name]
            expected = f"at least {low:g}" if high == math.inf else f"{low:.10g} to {high:.10g}"
            check(low <= value <= high, f"{name}={value}: expected {expected}")


@dataclass(frozen=True)
class SimulationConfig:
    """The images to simulate when no data are given."""

    preset: PriorPreset = "ct1"  # population of lenses: see gravlens_jax/lensing/priors.py
    train: int = 48_000  # training images, all classes together; with --data simulate:PRESET, those of one epoch
    easy: int = 6_000  # curriculum: images with heavier substructure, on which training starts; 0 for none
    val: int = 1_800  # validation images
    test: int = 3_000  # test images
    seed: int = 0  # of the images, not of the training
    folder: str = "data"  # where the files of each set of images have a folder

    def __post_init__(self):
        check_ranges(self, train=NOT_NEGATIVE, easy=NOT_NEGATIVE, val=NOT_NEGATIVE, test=NOT_NEGATIVE, seed=SEEDS)


@dataclass(frozen=True)
class InputConfig:
    """How an image in [0, 1] becomes the network's input; it travels with the network."""

    crop: int = 84  # central pixels kept, height and width
    pool: int = 2  # side of the pixel blocks that are averaged
    stretch: Literal["linear", "log"] = "log"  # log is log(pixel + 0.01) + 2.3: of simulated images mean 0, deviation 1

    def __post_init__(self):
        check_ranges(self, crop=(1, 2**14), pool=POSITIVE)
        check(self.crop % self.pool == 0, f"crop={self.crop} is not a multiple of pool={self.pool}")

    @property
    def cell(self) -> int:
        """Image pixels per pixel of the last feature map, along each axis: the network has two strides of 2."""
        return 4 * self.pool

    @property
    def cells(self) -> int:
        """Height and width of the network's last feature map."""
        return -(-self.crop // self.cell)


@dataclass(frozen=True)
class AugmentConfig:
    """Random changes of training images that keep their class."""

    flip: bool = True  # mirror each axis with probability 1/2
    max_rotation: float = 0.0  # degrees, in either direction
    max_shift: float = 0.0  # fraction of the image, in either direction

    def __post_init__(self):
        check_ranges(self, max_rotation=NOT_NEGATIVE)
        check(0 <= self.max_shift < 1, f"max_shift={self.max_shift}: expected a fraction in [0, 1)")


@dataclass(frozen=True)
class ModelConfig:
    """The residual network."""

    depth: int = 20  # 6n + 2 layers
    width: int = 16  # filters of the first stage; doubled twice
    activation: Literal["relu", "hard_swish"] = "hard_swish"  # hard_swish: 10 % less cross-entropy at equal cost
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters and statistics stay float32

    def __post_init__(self):
        right = 8 <= self.depth <= 1202 and self.depth % 6 == 2
        check(right, f"depth={self.depth}: expected 6n + 2 layers, such as 8, 14, 20 or 32, at most 1202")
        check_ranges(self, width=(1, 2**12))


@dataclass(frozen=True)
class OptimConfig:
    """Muon or Adam; warm-up and decay by step, times a plateau reduction by epoch."""

    method: Literal["muon", "adam"] = "muon"  # muon: for the kernels between channels, Adam for everything else
    learning_rate: float = 0.02  # peak; parameters that Muon leaves to Adam use a tenth
    weight_decay: float = 0.01  # muon: decoupled, of its kernels; adam: L2, added to the gradient of every parameter
    warmup_steps: int = 200  # linear warm-up: step k uses k / warmup_steps of the peak
    decay: Literal["constant", "cosine"] = "cosine"  # after the warm-up; cosine reaches 0 at the last step
    plateau_factor: float = 0.1  # multiplies the learning rate when the validation loss stops falling
    plateau_patience: int = 3  # epochs without improvement that are tolerated (PyTorch's meaning)

    def __post_init__(self):
        check_ranges(self, weight_decay=NOT_NEGATIVE, warmup_steps=NOT_NEGATIVE, plateau_patience=NOT_NEGATIVE)
        check(self.learning_rate > 0, f"learning_rate={self.learning_rate}: expected a positive number")
        check(0 < self.plateau_factor < 1, f"plateau_factor={self.plateau_factor}: expected a number in (0, 1)")


@dataclass(frozen=True)
class Config:
    """Everything that determines the result of a run."""

    run_dir: str = "runs/default"  # folder for checkpoints, metrics and the report
    # folder with train, val, test and perhaps easy.npz, or simulate:PRESET for images simulated during training, each
    # used once. Default: files are simulated first
    data: str | None = None
    seed: int = 0  # of initial parameters, order and augmentation
    epochs: int = 3  # passes over the training images
    batch_size: int = 32  # images per step, over all devices
    # weight of the auxiliary loss (squared error of the predicted deflection). 0: off. Also off for images from
    # elsewhere and with rotation or shift
    deflection_weight: float = 15.0
    device_data: bool = False  # hold all training images in the memory of every accelerator; many steps per call
    simulation: SimulationConfig = field(default_factory=SimulationConfig)
    input: InputConfig = field(default_factory=InputConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self):
        check_ranges(self, epochs=POSITIVE, batch_size=POSITIVE, deflection_weight=NOT_NEGATIVE, seed=SEEDS)
        if self.data is not None and self.data.startswith(STREAM):
            check(self.stream is not None, f"data={self.data}: expected {STREAM} and one of {', '.join(PRIOR_PRESETS)}")
            check(not self.device_data, f"data={self.data} holds no images that device_data could hold; leave one out")

    @property
    def stream(self) -> PriorPreset | None:
        """The preset of the population, if training images are simulated during training; None for files."""
        return next((preset for preset in PRIOR_PRESETS if self.data == STREAM + preset), None)

    @property
    def uses_deflections(self) -> bool:
        """Whether the auxiliary loss is on, if the images have lens parameters."""
        return bool(self.deflection_weight) and not self.augment.max_rotation and not self.augment.max_shift

    def resolve(self) -> "Config":
        """Returns the config that a run saves: with absolute paths."""
        data = self.data if self.data is None or self.stream else str(Path(self.data).absolute())
        simulation = replace(self.simulation, folder=str(Path(self.simulation.folder).absolute()))
        return replace(self, data=data, simulation=simulation)


PRESETS = {
    # 11 to 13 minutes on two CPU cores, simulation included; accuracy 97.2 % on simulated test images.
    "default": Config(),
    # The pretrained network's: 4 hours on two CPU cores, 15 GB; accuracy 98.9 % on simulated test images.
    "best": Config(
        run_dir="runs/best",
        epochs=10,
        simulation=SimulationConfig(train=320_000, easy=6_000, val=3_750, test=7_500, seed=2),
        # At high learning rates the validation loss only seems to stop falling.
        optim=OptimConfig(plateau_patience=20),
    ),
    # Half a minute, for a first try; too short to learn anything.
    "smoke": Config(
        run_dir="runs/smoke",
        epochs=4,
        batch_size=16,
        simulation=SimulationConfig(train=480, easy=96, val=120, test=120),
        input=InputConfig(pool=4),
        model=ModelConfig(depth=8, width=8),
        optim=OptimConfig(warmup_steps=20),
    ),
    # GravLensNet's recipe, with the 20 layers of its README: https://github.com/harish-jhr/GravLensNet.
    "published": Config(
        run_dir="runs/published",
        epochs=20,
        batch_size=200,
        deflection_weight=0.0,
        simulation=SimulationConfig(train=30_000, easy=0, val=3_750, test=3_750),
        input=InputConfig(crop=150, pool=1, stretch="linear"),
        augment=AugmentConfig(flip=False, max_rotation=90.0, max_shift=0.1),
        model=ModelConfig(activation="relu"),
        optim=OptimConfig("adam", learning_rate=1e-4, weight_decay=1e-4, warmup_steps=0, decay="constant"),
    ),
}


def from_dict(cls: type, values: Any, where: str = "config") -> Any:
    """Returns a dataclass, or a NamedTuple of such, from a JSON object; InputError for other fields or wrong types."""
    check(isinstance(values, dict), f"{where}: expected an object, got {values!r:.80}")
    hints = typing.get_type_hints(cls)
    for name in sorted(values.keys() ^ hints.keys()):
        wrong = f"{where}: field {name!r} is {'unknown' if name in values else 'missing'}"
        raise InputError(f"{wrong}; it was written by another version of gravlens_jax: use that one, or make it again")
    return cls(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    options = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        check(value in options, f"{where}: expected one of {options}, got {value!r:.80}")
        return value
    if typing.get_origin(hint) is tuple:  # tuple[str, ...] or tuple[int, int]
        inner = options[:1] * len(value) if Ellipsis in options and isinstance(value, list) else options
        check(isinstance(value, list) and len(value) == len(inner) > 0, f"{where}: expected {hint}, got {value!r:.80}")
        return tuple(_value(kind, item, where) for kind, item in zip(inner, value, strict=True))
    allowed = options if isinstance(hint, types.UnionType) else (hint,)
    if float in allowed and type(value) is int and abs(value) < 2**53:
        value = float(value)
    finite = type(value) is not float or math.isfinite(value)
    check(type(value) in allowed and finite, f"{where}: expected {hint}, got {value!r:.80}")
    return value
