"""Trains SecViT (secvit.py) on real pictures. The recipe is the paper's: DeiT's, in OPTIONS.

    python train.py                                  # handwritten digits, on the CPU if need be
    torchrun train.py --model tiny                   # the same as a job of one process
    torchrun --nproc_per_node=8 train.py --model tiny --data IMAGENET      # the paper's recipe
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 \\
        train.py --model base --data IMAGENET --out runs/base              # on each machine
    python train.py --resume --out runs/base         # goes on where that run stopped
    python train.py --eval --weights runs/base/best.pt --data IMAGENET
    python train.py --plot runs                      # the curves of all runs in a folder
    python train.py --benchmark --model tiny         # speed and memory beside torchvision's swin_t

IMAGENET is a folder with train/ and val/, each with a folder of pictures for every class.
"""

import argparse
import ast
import contextlib
import io
import json
import math
import multiprocessing
import os
import platform
import shlex
import signal
import statistics
import sys
import time
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageEnhance, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.models import swin_t
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

import secvit
from secvit import VARIANTS, SecViT, count, load_weights, read_checkpoint

# ----------------------------------------------------------------------------------------- options

OPTIONS = {  # the recipe for ImageNet, the lowest and the highest value, what it is
    "size": (224, 32, 4096, "side of the square pictures in pixels"),
    "epochs": (300, 1, 10**6, "passes over the training pictures"),
    "batch": (1024, 1, 2**20, "pictures an optimiser step, over all processes"),
    "micro": (128, 1, 2**20, "pictures a process takes at once; gradients add up to --batch"),
    "lr": (1e-3, 0, 100, "peak learning rate; the default scales with --batch"),
    "min_lr": (1e-5, 0, 100, "learning rate at the end of the cosine"),
    "warmup": (5.0, 0, 10**6, "epochs of linear warm-up from 1e-6"),
    "weight_decay": (0.05, 0, 10, "AdamW's; none on parameters of one dimension"),
    "smoothing": (0.1, 0, 0.99, "label smoothing"),
    "ema": (0.99996**2, 0, 1, "decay of the averaged weights; the default scales with --batch"),
    "min_crop": (0.08, 0.001, 1, "smallest share of a picture that a random crop keeps"),
    "flip": (0.5, 0, 1, "probability of a horizontal flip"),
    "rand_augment": (9.0, 0, 10, "magnitude of RandAugment m9-mstd0.5-inc1; 0: none"),
    "erasing": (0.25, 0, 1, "probability of random erasing"),
    "mixup": (0.8, 0, 100, "Mixup's alpha; 0: none"),
    "cutmix": (1.0, 0, 100, "CutMix's alpha; 0: none; with both, a batch has either"),
    "repeats": (3, 1, 100, "repeated augmentation: copies of a picture in an epoch"),
    "center": (0.875, 0.1, 1, "share of the side that the centre crop of the evaluation keeps"),
    "seed": (0, 0, 2**32 - 1, "of everything that is random"),
}
SMALL = dict(repeats=1, center=1.0, ema=0.999, erasing=0.0, mixup=0.0)
LARGER = SMALL | dict(size=160, epochs=100, batch=128, min_crop=0.3, center=0.875)
PRESETS = {  # what differs from the recipe
    "digits": SMALL | dict(size=32, epochs=8, batch=32, ema=0.98, min_crop=0.6, flip=0.0,
                           rand_augment=0.0, cutmix=0.0),
    "cifar10": SMALL | dict(size=32, epochs=100, batch=128, min_crop=0.4),
    "cifar100": SMALL | dict(size=32, epochs=100, batch=128, min_crop=0.4),
    "imagenette": LARGER, "food101": LARGER, "flowers102": LARGER, "pets": LARGER,
}
DOWNLOADS = {  # torchvision's class, and how it calls the two parts
    "cifar10": (datasets.CIFAR10, dict(train=True), dict(train=False)),
    "cifar100": (datasets.CIFAR100, dict(train=True), dict(train=False)),
    "imagenette": (datasets.Imagenette, dict(split="train"), dict(split="val")),
    "food101": (datasets.Food101, dict(split="train"), dict(split="test")),
    "flowers102": (datasets.Flowers102, dict(split="train"), dict(split="val")),
    "pets": (datasets.OxfordIIITPet, dict(split="trainval"), dict(split="test")),
}
FREE = {"workers", "device", "amp", "compile", "micro", "skip_broken", "resume", "out", "weights"}


class Halt(Exception):
    """Ends the program with one line. code 2: what was asked for is wrong; 1: the run failed.

    Ranks that meet the same error say it once; anywhere=True is for what one rank alone may meet.
    """

    def __init__(self, message, code=2, anywhere=False):
        super().__init__(" ".join(str(message).split()))
        self.code, self.anywhere = code, anywhere


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Halt(f"{message}; --help lists the options")


def parse(argv):
    """The options of a run as a dict: what was typed, else the data set's, else the recipe's."""
    parser = Parser(description=__doc__, argument_default=argparse.SUPPRESS, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add, flag = parser.add_argument, argparse.BooleanOptionalAction
    add("--model", choices=VARIANTS, help="default: tiny")
    add("--set", nargs="+", metavar="FIELD=VALUE", help="of SecViTConfig, like clusters=64,16,4,1")
    add("--data", help=f"a folder, or one of {', '.join(PRESETS)}; default: digits")
    add("--out", help="folder of the run; default: the next free number in runs")
    add("--weights", help="a checkpoint to start from or to evaluate, ours or the authors'")
    add("--resume", action="store_true", help="go on with the run in --out, with its options")
    add("--eval", action="store_true", help="evaluate --weights and end")
    add("--benchmark", action="store_true", help="time --model on synthetic batches and end")
    add("--plot", metavar="FOLDER", help="draw the curves of all runs in a folder and end")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    add("--amp", choices=("bf16", "fp16", "off"), help="default on a GPU: bf16, or else fp16")
    add("--workers", type=int, help="processes that read pictures; default: one a core")
    add("--compile", action=flag, help="use torch.compile")
    add("--skip-broken", action=flag, help="replace unreadable pictures and count them")
    for name, (value, *_, meaning) in OPTIONS.items():
        add("--" + name.replace("_", "-"), type=type(value), help=f"{meaning}; ImageNet: {value:g}")
    given = vars(parser.parse_args(argv))
    if given.get("resume"):
        if "out" not in given:
            raise Halt("--resume needs --out, the folder of the run")
        stored = read_record(Path(given["out"]) / "config.json")["options"]
        for name in given.keys() - FREE:
            if given[name] != stored.get(name):
                raise Halt(f"the run in {given['out']} has --{name} {stored.get(name)}, not "
                           f"{given[name]}: leave the option out, or choose another --out")
        return stored | given
    if given.get("eval") and "weights" not in given:
        raise Halt("--eval needs --weights, a checkpoint")
    trained = load(given["weights"]).get("options", {}) if given.get("eval") else {}
    recipe = {name: value for name, (value, *_) in OPTIONS.items()}
    preset = recipe | PRESETS.get(given.get("data", trained.get("data", "digits")), {})
    if given.get("benchmark"):
        preset = recipe | dict(batch=8)
    options = dict(model="tiny", set=[], data="digits", workers=-1, compile=False,
                   skip_broken=False) | preset | trained | given
    for name, (_, low, high, _) in OPTIONS.items():
        if not low <= options[name] <= high:
            raise Halt(f"--{name.replace('_', '-')} {options[name]} is not in {low} to {high}")
    scale = options["batch"] / preset["batch"]
    automatic = dict(lr=preset["lr"] * scale, ema=preset["ema"] ** scale,
                     warmup=min(preset["warmup"], options["epochs"] / 10))
    return options | {name: value for name, value in automatic.items() if name not in given}


def model_config(options, classes):
    """SecViTConfig of the variant with the fields in --set."""
    changes = {"num_classes": classes}
    for text in options["set"]:
        name, _, value = text.partition("=")
        try:
            changes[name] = ast.literal_eval(value)
        except Exception:
            raise Halt(f"--set {text} is not FIELD=VALUE, like lce=False or clusters=64,16,4,1")
    try:
        return replace(VARIANTS[options["model"]], **changes)
    except (TypeError, ValueError) as error:
        raise Halt(f"--set: {error}; the fields are {', '.join(asdict(VARIANTS['tiny']))}")


# ---------------------------------------------------------------------------------------- pictures


def seed_all(*key):
    """All that is random in a picture or a step follows from where it is in the run.

    So a run that is resumed, or has other workers, draws what it would have drawn.
    """
    torch.manual_seed(zlib.crc32(repr(key).encode()))


FILL = (124, 116, 104)  # ImageNet's mean colour


def affine(img, *matrix):
    return img.transform(img.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC,
                         fillcolor=FILL)


OPERATIONS = {  # the argument at strength u, -1 to 1 with a random sign, and what is done with it
    "AutoContrast": (lambda u: None, lambda img, _: ImageOps.autocontrast(img)),
    "Equalize": (lambda u: None, lambda img, _: ImageOps.equalize(img)),
    "Invert": (lambda u: None, lambda img, _: ImageOps.invert(img)),
    "Rotate": (lambda u: 30 * u, lambda img, degrees: img.rotate(
        degrees, Image.Resampling.BICUBIC, fillcolor=FILL)),
    "ShearX": (lambda u: 0.3 * u, lambda img, s: affine(img, 1, s, 0, 0, 1, 0)),
    "ShearY": (lambda u: 0.3 * u, lambda img, s: affine(img, 1, 0, 0, s, 1, 0)),
    "TranslateX": (lambda u: 0.45 * u, lambda img, s: affine(img, 1, 0, s * img.width, 0, 1, 0)),
    "TranslateY": (lambda u: 0.45 * u, lambda img, s: affine(img, 1, 0, 0, 0, 1, s * img.height)),
    "Color": (lambda u: 1 + 0.9 * u, lambda img, f: ImageEnhance.Color(img).enhance(f)),
    "Contrast": (lambda u: 1 + 0.9 * u, lambda img, f: ImageEnhance.Contrast(img).enhance(f)),
    "Brightness": (lambda u: 1 + 0.9 * u, lambda img, f: ImageEnhance.Brightness(img).enhance(f)),
    "Sharpness": (lambda u: 1 + 0.9 * u, lambda img, f: ImageEnhance.Sharpness(img).enhance(f)),
    "Posterize": (lambda u: max(1, 4 - int(4 * abs(u))), ImageOps.posterize),  # Pillow has no 0
    "Solarize": (lambda u: 256 - int(256 * abs(u)), ImageOps.solarize),
    "SolarizeAdd": (lambda u: int(110 * abs(u)), lambda img, add: img.point(
        [min(255, x + add) if x < 128 else x for x in range(256)] * 3)),
}


class RandAugment:
    """RandAugment m9-mstd0.5-inc1 on RGB PIL pictures: two operations, each done half the time."""

    def __init__(self, magnitude):
        self.magnitude = magnitude

    def __call__(self, img):
        for name in torch.randint(len(OPERATIONS), (2,)).tolist():
            argument, apply = list(OPERATIONS.values())[name]
            level = self.magnitude + 0.5 * torch.randn(()).item()
            skip, sign = (torch.rand(2) < 0.5).tolist()
            u = min(max(level / 10, 0), 1) * (-1 if sign else 1)
            img = img if skip else apply(img, argument(u))
        return img


def train_transform(options):
    """PIL to uint8 (3 size size). What a batch can have at once follows on the device."""
    crop = v2.RandomResizedCrop(options["size"], scale=(options["min_crop"], 1),
                                interpolation=InterpolationMode.BICUBIC, antialias=True)
    augment = [RandAugment(options["rand_augment"])] if options["rand_augment"] else []
    return v2.Compose([crop, v2.RandomHorizontalFlip(options["flip"]), *augment, v2.PILToTensor()])


def eval_transform(options):
    resize = v2.Resize(round(options["size"] / options["center"]), InterpolationMode.BICUBIC)
    return v2.Compose([resize, v2.CenterCrop(options["size"]), v2.PILToTensor()])


class Pictures(Dataset):
    """(uint8 picture, label, complaint) for a key (index, *where in the run).

    In place of a picture that cannot be read stands the next one, and the complaint names it.
    """

    def __init__(self, source, transform):
        self.source, self.transform = source, transform

    def __getitem__(self, key):
        complaint = ""
        for index in range(key[0], key[0] + 100):
            index %= len(self.source)
            seed_all(*key)
            try:
                picture, label = self.source[index]
                return self.transform(picture.convert("RGB")), label, complaint
            except Exception as error:
                files = getattr(self.source, "samples", None)
                complaint += f"{files[index][0] if files else f'picture {index}'}: {error}; "
        raise Halt(f"100 pictures in a row cannot be read: {complaint[:200]}")


class Batches:
    """A batch sampler that knows its place: keys for `Pictures`, from a step of an epoch on.

    The pictures of a step are dealt like cards to accumulation steps and processes, so that it has
    the same pictures on one process as on many, and copies of a picture part.
    """

    def __init__(self, pictures, options, accumulate, rank=0, world=1):
        self.pictures, self.batch, self.seed = pictures, options["batch"], options["seed"]
        self.repeats, self.accumulate = options["repeats"], accumulate
        self.rank, self.world, self.epoch, self.start = rank, world, 0, 0
        self.steps = max(1, pictures // self.batch)

    def __len__(self):
        return (self.steps - self.start) * self.accumulate

    def __iter__(self):
        seed_all(self.seed, self.epoch)
        order = torch.randperm(self.pictures).repeat_interleave(self.repeats)
        order = order.repeat(-(-self.batch // len(order)))  # fewer pictures than a batch
        for step in range(self.start, self.steps):
            places = range(step * self.batch, (step + 1) * self.batch)
            for turn in range(self.accumulate):
                hand = places[turn * self.world + self.rank :: self.accumulate * self.world]
                yield [(int(order[place]), self.seed, self.epoch, place) for place in hand]


def load_pictures(options):
    """Training pictures, validation pictures, the number of classes."""
    data = options["data"]
    if data == "digits":
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
        bunch = load_digits()
        pictures = [(Image.fromarray((image * 255 / 16).astype("uint8")), int(label))
                    for image, label in zip(bunch.images, bunch.target)]
        parts = train_test_split(pictures, test_size=0.2, stratify=bunch.target, random_state=0)
        return *parts, len(bunch.target_names)
    try:
        if data in DOWNLOADS:
            make, *parts = DOWNLOADS[data]
            parts = [make("data", download=True, **part) for part in parts]
        elif Path(data).is_dir():
            parts = [datasets.ImageFolder(Path(data) / part) for part in ("train", "val")]
        else:
            raise Halt(f"--data {data} is no folder and none of {', '.join(PRESETS)}")
    except (OSError, RuntimeError) as error:
        raise Halt(f"--data {data}: {error}")
    ours, theirs = ({*map(str, part.classes)} for part in parts)
    if ours != theirs:
        raise Halt(f"--data {data}: these classes are in train or val alone: "
                   f"{', '.join(sorted(ours ^ theirs))}")
    return *parts, len(ours)


# --------------------------------------------------------------------------------- files of a run


def write(path, data):
    """Writes the whole file or leaves the one that was there."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise Halt(f"cannot write {path}: {error.strerror}; what was there before is intact. "
                   f"Make room, then: {resume_command(path.parent)}", code=1)


def save(path, state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getbuffer())


def load(path):
    """The dict in a checkpoint file, or a Halt that says what is wrong with it."""
    try:
        checkpoint = read_checkpoint(path)
    except Exception as error:  # what a damaged file can raise is not documented
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise Halt(f"{path} is not a checkpoint that can be read: {reason}")
    if not isinstance(checkpoint, dict):
        raise Halt(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def read_record(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Halt(f"{path} is not the record of a run: {error}")


def resume_command(out):
    local = os.environ.get("LOCAL_WORLD_SIZE")
    start = f"torchrun --nproc_per_node={local}" if world() > 1 else "python"
    return f"{start} {shlex.quote(sys.argv[0])} --resume --out {shlex.quote(str(out))}"


def open_run(options):
    """The folder of the run and its last checkpoint or None. Only rank 0 calls this."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    number = next(n for n in range(1, 10**6) if not Path("runs", str(n)).exists())
    number = max(number - restarted, 1)  # torchrun has started the newest run again
    out = Path(options.get("out", Path("runs", str(number))))
    if options.get("resume") or restarted and (out / "config.json").exists():
        return out, load(out / "last.pt") if (out / "last.pt").exists() else None
    record = dict(options=options, torch=torch.__version__, processes=world())
    try:
        out.mkdir(parents=True, exist_ok=True)
        mine = out / f"config.json.{os.getpid()}"
        write(mine, json.dumps(record, indent=1).encode())
        try:
            os.link(mine, out / "config.json")  # fails where another run was first
        finally:
            mine.unlink()
    except FileExistsError:
        raise Halt(f"--out {out} has a run already: go on with {resume_command(out)}, or choose "
                   "another folder")
    except OSError as error:
        raise Halt(f"--out {out}: {error.strerror}")
    return out, None


# ---------------------------------------------------------------------------------------- processes


def rank():
    return int(os.environ.get("RANK", 0))


def world():
    return int(os.environ.get("WORLD_SIZE", 1))


def from_rank_0(function, *args):
    """What the function returns on rank 0, on all ranks; also if it halts."""
    result = [None]
    if rank() == 0:
        try:
            result = [function(*args)]
        except Halt as halt:
            result = [halt]
    if world() > 1:
        dist.broadcast_object_list(result)
    if isinstance(result[0], Halt):
        raise result[0]
    return result[0]


def total(*numbers, device):
    """The sum of each number over all processes."""
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    if world() > 1:
        dist.all_reduce(sums)
    return sums.tolist()


AMP = dict(bf16=torch.bfloat16, fp16=torch.float16)
SIGNALS = []  # when SIGTERM or SIGINT came


def on_signal(number, frame):
    """The first asks for an end after the step, the second ends the process.

    torchrun passes a Ctrl-C on to processes that had it already: within a second is once.
    """
    if SIGNALS and time.monotonic() - SIGNALS[0] > 1:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    SIGNALS.append(time.monotonic())


def ignore_signals(worker):
    """Workers go on reading until the process that they serve has taken its last step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


# ----------------------------------------------------------------------------------------- training


def learning_rate(epoch, options):
    """At `epoch`, with fractions: warm-up from 1e-6, then a cosine whose period is all epochs."""
    peak, warmup = options["lr"], options["warmup"]
    low = min(options["min_lr"], peak)
    if epoch < warmup:
        return 1e-6 + (peak - 1e-6) * epoch / warmup
    return low + (peak - low) * (1 + math.cos(math.pi * epoch / options["epochs"])) / 2


def make_optimizer(model, options):
    """AdamW; weights decay, while biases, norms and LayerScale, of one dimension, do not."""
    groups = {True: [], False: []}
    for parameter in model.parameters():
        groups[parameter.ndim > 1].append(parameter)
    return torch.optim.AdamW(
        [dict(params=groups[True], weight_decay=options["weight_decay"]),
         dict(params=groups[False], weight_decay=0.0)], lr=options["lr"])


def make_ema(model, decay):
    """Averages parameters and buffers, the statistics of BN among them."""
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    ema.update_parameters(model)  # the first call copies: the average starts at the first weights
    return ema.eval()


class BatchTransform:
    """uint8 pictures and labels to normalised, erased, mixed ones, on the device."""

    def __init__(self, options, classes):
        alphas = dict(MixUp=options["mixup"], CutMix=options["cutmix"])
        mixes = [getattr(v2, name)(alpha=alpha, num_classes=classes)
                 for name, alpha in alphas.items() if alpha]
        self.mix = v2.RandomChoice(mixes) if mixes else None
        self.erase = v2.RandomErasing(options["erasing"], scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3),
                                      value="random")

    @staticmethod
    def normalise(pictures):
        mean, std = (torch.tensor(values, device=pictures.device).view(3, 1, 1) * 255
                     for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return (pictures.float() - mean) / std

    def __call__(self, pictures, labels):
        pictures = self.normalise(pictures)
        if self.erase.p:
            pictures = torch.stack([self.erase(picture) for picture in pictures])
        if self.mix:  # v2 mixes neighbours; shuffled, so that copies of a picture seldom meet
            shuffled = torch.randperm(len(pictures))
            pictures, labels = self.mix(pictures[shuffled], labels[shuffled])
        return pictures, labels


def check(complaints, options):
    """Halts at the first picture that could not be read, unless --skip-broken allows for it."""
    for complaint in filter(None, complaints):
        if not options["skip_broken"]:
            raise Halt(f"{complaint}mend or remove it, or use --skip-broken", 1, anywhere=True)


def load_into(model, options):
    """--weights, ours or the authors'; says so where the classifier has to be a new one."""
    checkpoint = load(options["weights"])
    variant = checkpoint.get("options", options)["model"]
    if variant != options["model"]:
        raise Halt(f"--weights {options['weights']} is a SecViT-{variant}: use --model {variant}")
    try:
        replaced = load_weights(model, checkpoint, new_head=not options.get("eval"))
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise Halt(f"--weights {options['weights']}: {error}")
    if rank() == 0:
        print(f"weights from {options['weights']}" + replaced * ": its classifier is for other "
              f"classes and gives way to a new one for {model.config.num_classes}")


class Run:
    """Everything that changes while training, and the steps that change it."""

    def __init__(self, options, config, device):
        self.options, self.device = options, device
        seed_all(options["seed"])
        self.model = SecViT(config).to(device, memory_format=torch.channels_last)
        self.place = dict(epoch=0, step=0, loss=0.0, broken=0, history=[])  # where the run is
        if "weights" in options and not options.get("resume"):
            load_into(self.model, options)
        if device.type == "cuda" and world() > 1:
            self.model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.ema = make_ema(self.model, options["ema"]) if options["ema"] else None
        self.optimizer = make_optimizer(self.model, options)
        self.amp = options.get("amp") or "off" if device.type == "cpu" else options.get(
            "amp", "bf16" if torch.cuda.is_bf16_supported() else "fp16")
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp == "fp16")
        self.parallel = self.model if world() == 1 else DistributedDataParallel(
            self.model, device_ids=[device] if device.type == "cuda" else None)
        self.forward = torch.compile(self.parallel) if options["compile"] else self.parallel

    def open(self):
        """Claims the folder of the run, or goes on from the checkpoint in it."""
        self.out, checkpoint = from_rank_0(open_run, self.options)
        if checkpoint:
            try:
                self.place = checkpoint["place"]
                for name, part in self.parts().items():
                    part.load_state_dict(checkpoint[name])
            except (KeyError, RuntimeError, TypeError, ValueError) as error:
                raise Halt(f"{self.out / 'last.pt'} is of another model or no run's: {error}")

    def parts(self):
        parts = dict(model=self.model, optimizer=self.optimizer, scaler=self.scaler)
        return parts | (dict(ema=self.ema) if self.ema else {})

    def autocast(self):
        dtype = AMP.get(self.amp)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def save(self):
        """last.pt holds all there is to go on from; log.jsonl the finished epochs, a line each."""
        if rank() == 0:
            states = {name: part.state_dict() for name, part in self.parts().items()}
            save(self.out / "last.pt", dict(place=self.place, **states))
            lines = "".join(json.dumps(line) + "\n" for line in self.place["history"])
            write(self.out / "log.jsonl", lines.encode())

    def save_best(self, record):
        """best.pt holds the better of raw and averaged weights at the best epoch."""
        best = max((line["top1"] for line in self.place["history"]), default=-1)
        if rank() == 0 and record["top1"] > best:
            averaged = self.ema and record["ema_top1"] >= record["raw_top1"]
            model = self.ema.module if averaged else self.model
            save(self.out / "best.pt", dict(model=model.state_dict(), config=asdict(model.config),
                                            options=self.options, record=record))

    def step(self, batches, transform, accumulate):
        """One optimiser step: the loss, unreadable pictures, whether to stop, over all ranks."""
        place, loss_sum, complaints = self.place, 0.0, []
        epoch = place["epoch"] + place["step"] / self.steps
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(epoch, self.options)
        for turn in range(accumulate):
            pictures, labels, said = next(batches)
            complaints += filter(None, said)
            seed_all(self.options["seed"], place["epoch"], place["step"], turn, rank())
            pictures, targets = transform(pictures.to(self.device, non_blocking=True),
                                          labels.to(self.device, non_blocking=True))
            last = turn == accumulate - 1 or world() == 1
            with contextlib.nullcontext() if last else self.parallel.no_sync():
                with self.autocast():
                    logits = self.forward(pictures)
                    loss = F.cross_entropy(logits.float(), targets,
                                           label_smoothing=self.options["smoothing"]) / accumulate
                self.scaler.scale(loss).backward()
            loss_sum += loss.detach()
        check(complaints, self.options)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self.ema.update_parameters(self.model)
        numbers = float(loss_sum), len(complaints), len(SIGNALS)
        loss, broken, stop = total(*numbers, device=self.device)
        return loss / world(), int(broken), stop > 0

    def train_epoch(self, loader, transform, accumulate):
        """From `place` to the end of the epoch; pictures/s, or None if a signal cut it short."""
        place, began, first = self.place, time.perf_counter(), self.place["step"]
        loader.batch_sampler.epoch, loader.batch_sampler.start = place["epoch"], first
        self.steps, batches = loader.batch_sampler.steps, iter(loader)
        self.model.train()
        bar = tqdm(total=self.steps, initial=first, leave=False, unit_scale=self.options["batch"],
                   unit="img", disable=rank() > 0 or not sys.stderr.isatty(),
                   desc=f"epoch {place['epoch'] + 1}/{self.options['epochs']}")
        with bar:
            while place["step"] < self.steps:
                loss, broken, stop = self.step(batches, transform, accumulate)
                if not math.isfinite(loss):
                    raise Halt(f"the loss is {loss} in epoch {place['epoch'] + 1}, step "
                               f"{place['step'] + 1}: lower --lr or use --amp off. The last good "
                               f"checkpoint is in {self.out}", code=1)
                place["step"] += 1
                place["loss"] += loss
                place["broken"] += broken
                bar.update()
                bar.set_postfix(loss=loss, lr=self.optimizer.param_groups[0]["lr"])
                if stop:
                    return None
        return (self.steps - first) * self.options["batch"] / (time.perf_counter() - began)

    def end_epoch(self, val, speed):
        """Evaluates, records, saves; best.pt first, so that a kill in between loses nothing."""
        place, options = self.place, self.options
        for module in filter(None, (self.model, self.ema)):
            for buffer in module.buffers() if world() > 1 else ():
                dist.broadcast(buffer, 0)  # without SyncBN each rank has its own statistics
        raw = evaluate(self.model, val, self)
        averaged = evaluate(self.ema.module, val, self) if self.ema else raw
        place["epoch"], place["step"] = place["epoch"] + 1, 0
        record = dict(epoch=place["epoch"], loss=place["loss"] / self.steps, raw_top1=raw,
                      ema_top1=averaged, top1=max(raw, averaged), images_per_s=round(speed, 1),
                      lr=self.optimizer.param_groups[0]["lr"], broken=place["broken"])
        self.save_best(record)
        place["history"].append(record)
        place.update(loss=0.0, broken=0)
        self.save()
        if rank() == 0:
            pictures = (options["epochs"] - place["epoch"]) * self.steps * options["batch"]
            left = pictures / max(speed, 1)
            print(f"epoch {place['epoch']}/{options['epochs']}  loss {record['loss']:.3f}  "
                  f"top-1 {raw:.2f} %, averaged {averaged:.2f} %  lr {record['lr']:.1e}  "
                  f"{speed:.0f} images/s  {left / 60:.1f} min left"
                  + f"  {record['broken']} unreadable pictures replaced" * bool(record["broken"]),
                  flush=True)


@torch.no_grad()
def evaluate(model, loader, run):
    """Top-1 accuracy in %, exact: every process takes its share, and no picture counts twice."""
    model.eval()
    right = count = 0
    for pictures, labels, complaints in loader:
        check(complaints, run.options)
        with run.autocast():
            logits = model(BatchTransform.normalise(pictures.to(run.device, non_blocking=True)))
        right += (logits.argmax(1).cpu() == labels).sum().item()
        count += len(labels)
    right, count = total(right, count, device=run.device)
    return 100 * right / count


# --------------------------------------------------------------------------------------------- main


def plot(folder):
    """Loss, accuracy and learning rate over the epochs of every run in the folder, as one PNG."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    logs = sorted(Path(folder).rglob("log.jsonl"))
    if not logs:
        raise Halt(f"--plot {folder}: no log.jsonl in it; a run writes one after its first epoch")
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    for color, log in enumerate(logs):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for axis, key, label, style in ((0, "loss", "", "-"), (1, "raw_top1", ", raw", "-"),
                                        (1, "ema_top1", ", averaged", "--"), (2, "lr", "", "-")):
            axes[axis].plot([line["epoch"] for line in lines], [line[key] for line in lines], style,
                            color=f"C{color}", label=log.parent.name + label)
    for axis, title in zip(axes, ("training loss", "top-1 accuracy, validation (%)",
                                  "learning rate at the end of the epoch")):
        axis.set(title=title, xlabel="epoch")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize="small")
    figure.savefig(Path(folder) / "curves.png", dpi=110)
    print(f"drew {len(logs)} run(s): {Path(folder) / 'curves.png'}")


def unsorted():
    """A context in which SECA cuts the tokens as they come, to see what sorting costs."""
    return mock.patch.multiple(
        secvit, cluster_order=lambda k: k,
        group=lambda x, k, c: [rearrange(x, "b n (c m) d -> b (n c) m d", c=c)],
        ungroup=lambda parts, k: rearrange(parts[0], "b (n c) m d -> b n (c m) d", n=k.shape[1]))


def contestant(name, options):
    """A model of the benchmark and the context to run it in."""
    config = VARIANTS[options["model"]]
    if name == "swin_t":
        return swin_t(), contextlib.nullcontext
    if name == "one cluster":
        return SecViT(replace(config, clusters=(1, 1, 1, 1))), contextlib.nullcontext
    return SecViT(config), unsorted if name == "unsorted" else contextlib.nullcontext


def one_pass(model, pictures, options, training):
    """A function that runs the model once; with a backward pass and a step of AdamW to train."""
    model.train(bool(training))
    optimizer = torch.optim.AdamW(model.parameters())
    labels = torch.zeros(len(pictures), dtype=torch.long, device=pictures.device)
    forward = torch.compile(model) if options["compile"] else model
    dtype = AMP.get(options.get("amp"))

    def run():
        with torch.set_grad_enabled(bool(training)):
            with torch.autocast(pictures.device.type, dtype, enabled=dtype is not None):
                logits = forward(pictures)
            if training:
                F.cross_entropy(logits.float(), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
        if pictures.is_cuda:
            torch.cuda.synchronize()
    return run


def seconds(run):
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def peak_memory(name, options, training):
    """MiB that a pass takes over the model. On a CPU, /proc of a fresh process tells (Linux)."""
    device, (model, context) = start(options), contestant(name, options)
    pictures = torch.randn(options["batch"], 3, options["size"], options["size"], device=device)
    run = one_pass(model.to(device), pictures, options | dict(compile=False), training)

    def resident(peak):
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        lines = dict(line.split(":") for line in open("/proc/self/status"))
        return int(lines["VmHWM" if peak else "VmRSS"].split()[0]) * 1024
    with context():
        one_pass(model, pictures[:1, :, :32, :32].contiguous(), options | dict(compile=False), 0)()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident(peak=False)
        run()
        return (resident(peak=True) - before) / 2**20


def in_fresh_process(function, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def benchmark(options):
    """Medians over rounds in which every model has its turn, so that a noisy machine is fair."""
    device = start(options)
    names = f"SecViT-{options['model']}", "one cluster", "unsorted", "swin_t"
    size, batch, amp = options["size"], options["batch"], options.get("amp", "off")
    if size % 32:
        raise Halt(f"--size {size}: the benchmark needs a multiple of 32, for `unsorted`")
    matrix = torch.randn(4096, 4096, device=device, dtype=AMP.get(amp, torch.float32))

    def product():
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize()
    peak = 2 * 4096**3 / statistics.median(seconds(product) for _ in range(7))
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    mode = "compiled" if options["compile"] else "eager"
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python "
          f"{platform.python_version()}, {time.strftime('%Y-%m-%d')}; {size} px, batch {batch}, "
          f"amp {amp}, {mode}; matrix peak {peak / 1e9:.0f} GFLOP/s")
    pictures = torch.randn(batch, 3, size, size, device=device)
    for training in (False, True):
        models = {name: contestant(name, options) for name in names}
        runs = {name: one_pass(model.to(device), pictures, options, training)
                for name, (model, _) in models.items()}
        times, began = {name: [] for name in runs}, time.perf_counter()
        for turn in range(12):
            if turn > 3 and time.perf_counter() - began > 120:
                break
            for name, run in runs.items():
                with models[name][1]():
                    times[name].append(seconds(run))
        print(f"\n{'training step' if training else 'inference':14} images/s  spread  of swin_t  "
              f"multiply-adds  of peak  memory over the model; {turn} rounds")
        for name, (model, _) in models.items():
            low, median, high = statistics.quantiles(times[name][1:], n=4)  # the first warms up
            macs = count(model, size)[1]
            memory = in_fresh_process(peak_memory, name, options, training)
            print(f"{name:14}{batch / median:9.2f}  {(high - low) / median:5.0%}  "
                  f"{statistics.median(times['swin_t'][1:]) / median:8.2f}x  {macs / 1e9:11.3f} G  "
                  f"{2 * macs * batch * (3 if training else 1) / median / peak:6.0%}  "
                  f"{memory:6.0f} MiB", flush=True)


def loaders(options, train, val):
    """Batches for training and evaluation, this process's share, and the accumulation steps."""
    share, rest = divmod(options["batch"], world())
    if rest:
        raise Halt(f"--batch {options['batch']} does not divide over {world()} processes: "
                   f"use --batch {share * world() or world()}")
    accumulate = next(a for a in range(1, share + 1)
                      if share % a == 0 and share // a <= options["micro"])
    workers = options["workers"]
    if workers < 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    common = dict(num_workers=workers, pin_memory=torch.cuda.is_available(),
                  persistent_workers=workers > 0, worker_init_fn=ignore_signals)
    batches = Batches(len(train), options, accumulate, rank(), world())
    mine = [(index,) for index in range(rank(), len(val), world())]
    return (DataLoader(Pictures(train, train_transform(options)), batch_sampler=batches, **common),
            DataLoader(Pictures(val, eval_transform(options)), sampler=mine,
                       batch_size=min(options["micro"], share), **common), accumulate)


def start(options):
    """The device, after what it needs has been set."""
    name = options.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise Halt("--device cuda: torch sees no GPU here; leave --device out for the CPU")
    device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)
    if name == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    return device


def train(options):
    """A run from its start, or from where it stopped, to its end."""
    device = start(options)
    if options["data"] in DOWNLOADS:
        from_rank_0(lambda: load_pictures(options)[2])  # one process downloads, then all read
    train_set, val_set, classes = load_pictures(options)
    train_loader, val_loader, accumulate = loaders(options, train_set, val_set)
    config = model_config(options, classes)
    if options.get("eval"):
        run = Run(options | dict(ema=0), config, device)
        accuracy = evaluate(run.model, val_loader, run)
        if rank() == 0:
            print(f"top-1 {accuracy:.2f} % of {len(val_set):,} pictures")
        return
    run = Run(options, config, device)
    run.open()
    if rank() == 0:
        print(", ".join(f"{name} {value}" for name, value in options.items()))
        print(f"SecViT-{options['model']}, {sum(p.numel() for p in run.model.parameters()):,} "
              f"parameters; {len(train_set):,} pictures to train on, {len(val_set):,} to evaluate, "
              f"{classes} classes; {world()} process(es) on {device.type}, {accumulate} "
              f"accumulation step(s); {run.out}", flush=True)
    transform, began = BatchTransform(options, classes), time.perf_counter()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    while run.place["epoch"] < options["epochs"]:
        speed = run.train_epoch(train_loader, transform, accumulate)
        if speed is None:
            run.save()
            if rank() == 0:
                print(f"stopped in epoch {run.place['epoch'] + 1} after step {run.place['step']}, "
                      f"saved; go on with: {resume_command(run.out)}")
            return
        run.end_epoch(val_loader, speed)
    if rank() == 0:
        history = run.place["history"]
        best = max(history, key=lambda line: line["top1"])
        print(f"top-1 {history[-1]['raw_top1']:.2f} %, averaged weights "
              f"{history[-1]['ema_top1']:.2f} % after epoch {options['epochs']} and "
              f"{(time.perf_counter() - began) / 60:.1f} minutes; best {best['top1']:.2f} % after "
              f"epoch {best['epoch']}, {run.out / 'best.pt'}")
        plot(run.out)


def main(argv):
    if world() > 1:  # a restarted group must not find the addresses of the dead one in the store
        store = next(dist.rendezvous("env://"))[0]
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(store=dist.PrefixStore(f"attempt {attempt}", store), rank=rank(),
                                world_size=world())
    try:
        options = from_rank_0(parse, argv)
        if "plot" in options:
            from_rank_0(plot, options["plot"])
        elif options.get("benchmark"):
            benchmark(options)
        else:
            train(options)
    except Halt as halt:
        if halt.anywhere or int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"train.py: {halt}", file=sys.stderr, flush=True)
        return halt.code
    finally:
        for worker in multiprocessing.active_children():
            worker.kill()  # they ignore SIGTERM, and have nothing to save
        if world() > 1:
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
