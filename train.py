"""Trains SecViT (secvit.py) on real pictures. The recipe is the paper's: DeiT's, in RECIPE.

    python train.py                                    # handwritten digits, on any laptop
    torchrun train.py --model tiny                     # the same as a job of one process
    python train.py --data PICTURES --out runs/mine    # from scratch
    python train.py --data PICTURES --out runs/tuned --weights best.pt     # fine-tune
    python train.py --eval --weights runs/mine/best.pt --data PICTURES
    python train.py --predict a.jpg b.png --weights runs/mine/best.pt
    torchrun --nproc_per_node=8 train.py --model tiny --data IMAGENET      # the paper's recipe
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 \\
        train.py --model base --data IMAGENET --out runs/base              # on each machine

PICTURES and IMAGENET are folders with train/ and val/, each with a folder of pictures per class.
--out names a run: if that folder holds one, the command goes on with it; if not, it begins.

A run is one loop over steps. The number of a step and the options decide all that happens in it:
which pictures, how each is augmented, the noise and the learning rate. So a run that starts again
at step s ends with the same weights, to the last bit on a CPU; on a GPU sums have no fixed order.
A checkpoint is s, the options and the states of the parts.
"""

import argparse
import ast
import io
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import zlib
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, models
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from secvit import VARIANTS, SecViT, SecViTConfig, load_weights, read_checkpoint

# ----------------------------------------------------------------------------------------- options

RECIPE = {  # the value for ImageNet, the lowest, the highest, the meaning
    "size": (224, 32, 4096, "side of the square pictures in pixels"),
    "epochs": (300, 1, 10**6, "passes over the training pictures"),
    "batch": (1024, 1, 2**20, "pictures per optimiser step, over all processes"),
    "micro": (128, 1, 1024, "pictures of a process at once; gradients accumulate up to --batch"),
    "lr": (1e-3, 0, 100, "peak learning rate; the default scales with --batch"),
    "min_lr": (1e-5, 0, 100, "learning rate at the end of the cosine; scales with --batch"),
    "warmup": (5.0, 0, 10**6, "epochs of linear warm-up from 1e-6"),
    "weight_decay": (0.05, 0, 10, "AdamW's; none on parameters of one dimension"),
    "smoothing": (0.1, 0, 0.99, "label smoothing"),
    "ema": (0.99996 ** (1024 / 512), 0, 1, "decay of the averaged weights; scales with --batch"),
    "min_crop": (0.08, 0.001, 1, "smallest share of a picture that a random crop keeps"),
    "flip": (0.5, 0, 1, "probability of a horizontal flip"),
    "rand_augment": (9.0, 0, 10, "magnitude of RandAugment m9-mstd0.5-inc1; 0: none"),
    "erasing": (0.25, 0, 1, "probability of random erasing"),
    "mixup": (0.8, 0, 100, "Mixup's alpha; 0: none"),
    "cutmix": (1.0, 0, 100, "CutMix's alpha; 0: none; with both, a batch has either"),
    "repeats": (3, 1, 100, "copies of a picture in an epoch, which has fewer pictures"),
    "center": (0.875, 0.1, 1, "share of the side that the centre crop of the evaluation keeps"),
    "seed": (0, 0, 2**32 - 1, "of everything that is random"),
    "workers": (-1, -1, 512, "processes that read pictures; -1: one for each core"),
}
SMALL = dict(repeats=1, center=1.0, ema=0.999, erasing=0.0, mixup=0.0, cutmix=0.0, rand_augment=0.0)
DIGITS = SMALL | dict(size=32, epochs=8, batch=32, ema=0.98, min_crop=0.6, flip=0.0)
FASHION = SMALL | dict(size=32, epochs=12, batch=64, lr=1e-3, min_crop=0.8, erasing=0.1)
CIFAR = SMALL | dict(size=32, epochs=100, batch=128, min_crop=0.4, cutmix=1.0, rand_augment=9.0)
LARGER = CIFAR | dict(size=160, min_crop=0.3, center=0.875)
FOLDER = SMALL | dict(size=224 if torch.cuda.is_available() else 64,  # or it takes hours
                      epochs=30, batch=32, lr=5e-4, min_crop=0.5)
FINETUNE = FOLDER | dict(size=224, epochs=20, lr=3e-4, min_crop=0.6)
DATA = {  # what differs from the recipe, torchvision's class, how it calls its two parts
    "digits": (DIGITS, None, None, None),
    "fashion": (FASHION, datasets.FashionMNIST, dict(train=True), dict(train=False)),
    "cifar10": (CIFAR, datasets.CIFAR10, dict(train=True), dict(train=False)),
    "cifar100": (CIFAR, datasets.CIFAR100, dict(train=True), dict(train=False)),
    "imagenette": (LARGER, datasets.Imagenette, dict(split="train"), dict(split="val")),
    "flowers102": (LARGER, datasets.Flowers102, dict(split="train"), dict(split="val")),
    "pets": (LARGER, datasets.OxfordIIITPet, dict(split="trainval"), dict(split="test")),
}
HALF = dict(bf16=torch.bfloat16, fp16=torch.float16)
# What may change while a run goes on; data as far as it is a copy of the same pictures.
FREE = {"epochs", "micro", "workers", "amp", "compile", "out", "data"}


class Stopped(Exception):
    """What ended a command, in one line. Exit code 1."""


class BadInput(Stopped, ValueError):
    """Found before anything was done. Exit code 2."""


def refuse(message):
    raise ValueError(message)


PARSER = argparse.ArgumentParser(
    prog="train.py", description=__doc__, allow_abbrev=False, argument_default=argparse.SUPPRESS,
    formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.error = refuse
add, either = PARSER.add_argument, PARSER.add_mutually_exclusive_group().add_argument
add("--model", choices=VARIANTS, help="default: tiny")
add("--set", nargs="+", action="extend", metavar="FIELD=VALUE",
    help="fields of SecViTConfig, like lce=False or clusters=64,16,4,1")
add("--data", type=lambda path: path if path[:-1] in DATA else path.rstrip("/\\"),
    help=f"a folder, or one of {', '.join(DATA)}; default: digits")
add("--out", help="folder of the run; default: the next free number in runs")
add("--weights", help="a checkpoint to start from, to evaluate or to predict with")
either("--eval", action="store_true", help="evaluate --weights and end")
either("--predict", nargs="+", action="extend", metavar="FILE",
       help="name the likeliest classes and end")
add("--amp", choices=("bf16", "fp16", "off"), help="default: bf16 on a GPU")
add("--compile", action=argparse.BooleanOptionalAction, help="use torch.compile")
for name, (value, _, _, meaning) in RECIPE.items():
    add("--" + name.replace("_", "-"), type=type(value), help=f"{meaning}; ImageNet: {value:g}")

RANK = int(os.environ.get("RANK") or 0)  # torchrun sets these; without it there is one process
WORLD = int(os.environ.get("WORLD_SIZE") or 1)
LOCAL_RANK = int(os.environ.get("LOCAL_RANK") or 0)
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # processes of this machine
DEVICE = torch.device(f"cuda:{LOCAL_RANK}" if torch.cuda.is_available() else "cpu")


def parse(argv):
    """The options that were typed, as a dict. ValueError out of their bounds."""
    given = vars(PARSER.parse_args([*map(str, argv)]))  # a script may pass numbers and paths
    for name, (_, low, high, _) in RECIPE.items():
        if not low <= given.get(name, low) <= high:
            raise ValueError(f"--{name.replace('_', '-')} {given[name]} is not in {low} to {high}")
    for name, value in given.items():
        if value in ("", [""]):
            raise ValueError(f"--{name} is empty: type a value, or leave it out")
    if given.keys() & {"eval", "predict"} and "weights" not in given:
        raise ValueError("--eval and --predict need --weights, a checkpoint")
    return given


def choose(given, pictures=10**6, trained={}, new_classes=False):
    """Options of a run, as typed, else its preset's, else the recipe's; and why that preset, a str.

    pictures: how many there are to train on; trained: options of the run that made --weights;
    new_classes: whether that run had other classes, so that this one is fine-tuning.
    """
    half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    options = dict(model="tiny", set=[], data="digits", compile=False,
                   amp=half if DEVICE.type == "cuda" else "off")
    options |= {name: trained[name] for name in ("model", "size", "center") if name in trained}
    options |= given
    preset, why = (FOLDER, "fewer than 100,000 pictures") if pictures < 1e5 else ({}, "ImageNet")
    if options["data"] in DATA:
        preset, why = DATA[options["data"]][0], options["data"]
    if new_classes:
        preset, why = preset | FINETUNE, "fine-tuning, since the weights have other classes"
    recipe = {name: value for name, (value, *_) in RECIPE.items()} | preset
    if options["data"] not in DATA:  # few pictures must be seen more often
        seen = 6000 if new_classes else 48000
        recipe["epochs"] = max(recipe["epochs"], math.ceil(seen / max(pictures, recipe["batch"])))
        if pictures < 400 and not new_classes:  # or they are overfitted
            recipe["rand_augment"] = 9.0
    epochs, batch, size = ((recipe | options)[name] for name in ("epochs", "batch", "size"))
    if DEVICE.type == "cpu":  # about 1 GB for Tiny
        recipe["micro"] = max(2, min(128, 8 * 224**2 // size**2))
    scale = batch / recipe["batch"]
    recipe["lr"] *= scale
    recipe["min_lr"] *= scale
    steps = epochs * max(1, pictures // batch)
    recipe["ema"] = min(recipe["ema"] ** scale, 1e-4 ** (1 / steps))  # the first weights fade
    recipe["warmup"] = min(recipe["warmup"], epochs / 10)
    return recipe | options, why


def model_config(options, checkpoint, classes):
    """SecViTConfig of the checkpoint, or else of the variant, with the fields in --set."""
    types = {field.name: field.type for field in fields(SecViTConfig)}
    trained = checkpoint.get("options", {}).get("model", "tiny")
    base, changes = VARIANTS[options.get("model", trained)], dict(num_classes=classes)
    if "config" in checkpoint and options.get("model", trained) == trained:
        saved = checkpoint["config"]
        base = SecViTConfig(**{name: saved[name] for name in saved.keys() & types.keys()})
    for text in options.get("set", ()):
        name, _, value = text.partition("=")
        if name not in types.keys() - {"num_classes", "in_channels"}:
            raise ValueError(f"--set {text}: write FIELD=VALUE with one of {', '.join(types)}; the "
                             "pictures decide num_classes and in_channels")
        try:
            changes[name] = ast.literal_eval(value)
        except Exception:  # it may raise almost anything
            changes[name] = None
        kind, example = type(changes[name]), getattr(base, name)
        if kind is not types[name] and (kind, types[name]) != (int, float):
            example = ",".join(map(str, example)) if types[name] is tuple else example
            raise ValueError(f"--set {text}: write a value like {name}={example}"
                             + f" or {name}={not example}" * (types[name] is bool))
    return replace(base, **changes)


def micro_steps(options):
    """In how many batches, of --micro pictures or fewer, a process takes its share of a step."""
    return math.ceil(options["batch"] / WORLD / options["micro"])


def going_on(given, old):
    """The options of the run in --out, with those typed that may change."""
    options = {name: value for name, (value, *_) in RECIPE.items()} | old["options"]
    for name in sorted(given.keys() - FREE):  # an option that is newer than the run has its default
        if given[name] != options.get(name):
            has = options.get(name, "begun without it")
            raise ValueError(f"--{name.replace('_', '-')} {given[name]}: the run in {given['out']} "
                             f"has {has}; for another run choose another --out")
    if given.get("epochs", math.inf) * old.get("steps", math.inf) < old["state"]["step"]:
        raise ValueError(f"--epochs {given['epochs']}: {given['out']} has done more, so type more")
    return options | {name: given[name] for name in given.keys() & FREE}


def prepare(given, store):
    """Everything that bad input can break; rank 0 runs it before the others join.

    Returns what a checkpoint says of the run, its model, the states to go on from, the pictures to
    train on and to evaluate, and the output of the model for each of their classes.
    """
    if DEVICE.type == "cuda" and LOCAL_WORLD > torch.cuda.device_count():
        raise ValueError(f"--nproc_per_node {LOCAL_WORLD} is above the number of GPUs, "
                         f"{torch.cuda.device_count()}: type a smaller one")
    if store.check(["out"]):  # torchrun has started the run again
        given["out"] = json.loads(store.get("out"))
    training = "eval" not in given
    last = Path(given["out"], "last.pt") if training and "out" in given else None
    old = read_checkpoint(last) if last and last.exists() else {}
    if last and not old and last.with_name("best.pt").exists():
        raise ValueError(f"{given['out']} has a best.pt, but no last.pt: choose another --out")
    options = going_on(given, old) if old else given
    weights = old or (read_checkpoint(options["weights"]) if "weights" in options else {})
    trained = weights.get("options", {})
    data = options.get("data", "digits" if training else trained.get("data", "digits"))
    train_set, val_set, names = load_pictures(data, training)
    known = weights.get("classes", names)  # in the order of the classifier
    fresh = training and not old and {*known} != {*names}  # fine-tuning, with a new classifier
    classes = names if fresh else known
    new, gone = ({*names} - {*classes}), ({*classes} - {*names})
    if new or gone and training:
        raise ValueError(f"the classes of {data} are not those of {last or options['weights']}: "
                         f"new are {sorted(new)}, gone are {sorted(gone)}; rename their folders, "
                         "or choose another --out or --weights")
    if gone:
        print(f"{data} has no pictures of {', '.join(sorted(gone))}")
    config = model_config(options, weights, len(classes))
    seed_all("weights", options.get("seed", RECIPE["seed"][0]))
    model = SecViT(config)
    if weights:
        fresh |= load_weights(model, weights, new_head=training and not old)
    if fresh:  # also where there are as many classes
        model.init_weights(model.head[5])
    if weights and not old:
        print(f"weights from {options['weights']}, pictures from {data}"
              + "; the classifier is a new one" * fresh)
    if not old:
        options, why = choose(given | dict(data=data), len(train_set) or 10**6, trained, fresh)
        print(f"the settings for {why}, changed by what you typed\n" * training, end="")
    for name, limit in (("warmup", "epochs"), ("min_lr", "lr")):
        if given.get(name, 0) > options[limit]:
            raise ValueError(f"--{name.replace('_', '-')} {given[name]} is above --{limit} "
                             f"{options[limit]}: type a smaller one")
    size, stride = options["size"], 2 ** (1 + len(config.depths))
    smallest = options["batch"] // WORLD // micro_steps(options)
    if size < stride or training and smallest < 1 + (size < 2 * stride):
        raise ValueError(f"batches of {smallest} pictures of --size {size} are too small for batch "
                         f"norm at stride {stride}: use a larger --micro, --batch or --size")
    run = dict(options=options, config=asdict(config), classes=classes,
               pictures=[describe(part) for part in (train_set, val_set)],
               steps=old.get("steps", max(1, len(train_set) // options["batch"])))
    if old and data != old["options"]["data"] and run["pictures"] != old.get("pictures"):
        raise ValueError(f"--data {data}: the run in {options['out']} has other pictures, those of "
                         f"{old['options']['data']}; for another run choose another --out")
    if training:
        number = next(n for n in range(1, 10**6) if not Path("runs", str(n)).exists())
        try:
            os.makedirs(options.setdefault("out", f"runs/{number}"), exist_ok=True)
        except OSError as error:
            raise ValueError(f"{error}: choose another --out")
        store.set("out", json.dumps(options["out"]))  # in ASCII, whatever the name
    return run, model, old, train_set, val_set, [classes.index(name) for name in names]


# ---------------------------------------------------------------------------------------- pictures


def seed_all(*key):
    """Seeds torch from the place of a picture or a step in the run."""
    torch.manual_seed(zlib.crc32(repr(key).encode()))


FILL = (124, 116, 104)  # ImageNet's mean colour


def affine(img, *matrix):
    return img.transform(img.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC,
                         fillcolor=FILL)


OPERATIONS = {  # of RandAugment: a picture at strength u, which is 0 to 1 with a random sign
    "AutoContrast": lambda img, u: ImageOps.autocontrast(img),
    "Equalize": lambda img, u: ImageOps.equalize(img),
    "Invert": lambda img, u: ImageOps.invert(img),
    "Rotate": lambda img, u: img.rotate(30 * u, Image.Resampling.BICUBIC, fillcolor=FILL),
    "ShearX": lambda img, u: affine(img, 1, 0.3 * u, 0, 0, 1, 0),
    "ShearY": lambda img, u: affine(img, 1, 0, 0, 0.3 * u, 1, 0),
    "TranslateX": lambda img, u: affine(img, 1, 0, 0.45 * u * img.width, 0, 1, 0),
    "TranslateY": lambda img, u: affine(img, 1, 0, 0, 0, 1, 0.45 * u * img.height),
    "Color": lambda img, u: ImageEnhance.Color(img).enhance(1 + 0.9 * u),
    "Contrast": lambda img, u: ImageEnhance.Contrast(img).enhance(1 + 0.9 * u),
    "Brightness": lambda img, u: ImageEnhance.Brightness(img).enhance(1 + 0.9 * u),
    "Sharpness": lambda img, u: ImageEnhance.Sharpness(img).enhance(1 + 0.9 * u),
    "Posterize": lambda img, u: ImageOps.posterize(img, max(1, 4 - int(4 * abs(u)))),
    "Solarize": lambda img, u: ImageOps.solarize(img, 256 - int(256 * abs(u))),
    "SolarizeAdd": lambda img, u: img.point(
        [min(255, x + int(110 * abs(u))) if x < 128 else x for x in range(256)] * 3),
}


def rand_augment(img, magnitude):
    """RandAugment m9-mstd0.5-inc1 on RGB PIL pictures: two operations, each done half the time."""
    for number in torch.randint(len(OPERATIONS), (2,)).tolist() if magnitude else ():
        u = min(max((magnitude + 0.5 * torch.randn(()).item()) / 10, 0), 1)
        skip, negative = (torch.rand(2) < 0.5).tolist()
        if not skip:
            img = list(OPERATIONS.values())[number](img, -u if negative else u)
    return img


def transforms(options, classes=None):
    """Three: PIL picture to (3 size size) in training, in evaluation; and the mix of a batch."""
    size, cubic = options["size"], InterpolationMode.BICUBIC
    tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True),
              v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    crop = v2.RandomResizedCrop(size, scale=(options["min_crop"], 1), interpolation=cubic)
    augment = v2.Lambda(partial(rand_augment, magnitude=options["rand_augment"]))
    erase = v2.RandomErasing(options["erasing"], (0.02, 1 / 3), (0.3, 1 / 0.3), value="random")
    resize = v2.Resize(round(size / options["center"]), cubic)
    mixes = [make(alpha=options[name], num_classes=classes)
             for name, make in (("mixup", v2.MixUp), ("cutmix", v2.CutMix)) if options[name]]
    return (v2.Compose([crop, v2.RandomHorizontalFlip(options["flip"]), augment, *tensor, erase]),
            v2.Compose([resize, v2.CenterCrop(size), *tensor]),
            v2.RandomChoice(mixes) if mixes else v2.Identity())


def open_picture(path):
    """RGB as a person sees the picture: turned as its EXIF says, on white where transparent.

    16-bit grey is scaled to 8 bits; a TIFF says how many of the 16 it uses. ValueError for numbers
    whose range nobody knows.
    """
    with Image.open(path) as file:
        picture, tags = ImageOps.exif_transpose(file), getattr(file, "tag_v2", {})
    if picture.mode[0] in "IF":
        values = np.asarray(picture)
        white = 2 ** min(16, tags.get(258, [16])[0] - (tags.get(339) == (2,))) - 1  # bits, signed
        if picture.mode == "F" or values.min() < 0 or values.max() > white:
            raise ValueError(f"nobody knows the range of {values.dtype}: save it with 8 or 16 bits")
        values = np.where(values == picture.info.get("transparency"), white, values)
        grey = (values * (255 / white)).round()
        picture = Image.fromarray((255 - grey if tags.get(262) == 0 else grey).astype("uint8"))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


class Folder(datasets.ImageFolder):
    """One part of a data set of one's own, with a folder of pictures for each class.

    What is hidden or unknown to Pillow is left out. ValueError says how the folders should be.
    """

    def __init__(self, data, part):
        root, folders = Path(data, part), self.find_classes(data)[0]
        if part not in folders or not self.find_classes(root)[0]:
            others = [name for name in folders if name.lower() in ("valid", "validation", "test")]
            hint = f": rename {others[-1]}/ to val/" if others and part == "val" else ""
            raise ValueError(f"{data} needs {part}/ with a folder of pictures for each class{hint}")
        super().__init__(root, loader=open_picture, allow_empty=True, is_valid_file=lambda path:
                         os.sep + "." not in path.removeprefix(str(root)))  # hidden
        formats, files = Image.registered_extensions(), self.samples
        self.samples = [file for file in files
                        if formats.get(os.path.splitext(file[0])[1].lower()) in Image.OPEN]
        self.targets = [label for _, label in self.samples]
        left_out = [Path(path) for path, _ in {*files} - {*self.samples}]
        if left_out:
            endings = sorted({path.suffix or path.name for path in left_out})
            print(f"{len(left_out):,} files in {root} are left out, as Pillow cannot read "
                  f"{', '.join(endings)}")
        empty = sorted({*range(len(self.classes))} - {*self.targets})
        if empty:
            raise ValueError(f"{root / self.classes[empty[0]]} has no picture that Pillow can "
                             "read: add some, or remove the class from train/ and val/")

    def find_classes(self, directory):
        names = sorted(entry.name for entry in os.scandir(directory)
                       if entry.is_dir() and not entry.name.startswith("."))
        return names, {name: index for index, name in enumerate(names)}


def load_pictures(data, train=True):
    """The pictures to train on, none without `train`; those to evaluate; names of the classes."""
    if data in DATA and Path(data, "train").is_dir():
        raise ValueError(f"{data} is a known data set: type ./{data} for the folder, or rename it")
    if data == "digits":
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
        bunch = load_digits()
        pictures = [(Image.fromarray((image * 255 / 16).astype("uint8")), int(label))
                    for image, label in zip(bunch.images, bunch.target)]
        parts = train_test_split(pictures, test_size=0.2, stratify=bunch.target, random_state=0)
        return parts[0] if train else [], parts[1], [str(name) for name in bunch.target_names]
    if data in DATA:
        _, make, *parts = DATA[data]
        try:
            parts = [make("data", download=True, **part) for part in parts[not train:]]
        except (OSError, RuntimeError) as error:
            raise ValueError(f"--data {data} cannot be downloaded, so try again: {error}")
    elif Path(data).is_dir():
        parts = [Folder(data, part) for part in ("train", "val")[not train:]]
    else:
        raise ValueError(f"--data {data} is no folder (with train/ and val/) and none of "
                         f"{', '.join(DATA)}")
    names, others = ([name if isinstance(name, str) else ", ".join(name) for name in part.classes]
                     for part in (parts[0], parts[-1]))
    if {*names} != {*others}:
        raise ValueError(f"{data}: only in train are {sorted({*names} - {*others})}, only in val "
                         f"{sorted({*others} - {*names})}: each class needs a folder in both")
    if train and len(names) < 2:
        raise ValueError(f"{data} has one class, {names[0]}: add a folder of another")
    return parts[0] if train else [], parts[-1], names


def describe(pictures):
    """How many pictures there are, and a checksum of their names."""
    names = [path.removeprefix(str(pictures.root)).replace(os.sep, "/")
             for path, _ in getattr(pictures, "samples", ())]
    return f"{len(pictures)} {zlib.crc32(repr(names).encode()):08x}"


class Pictures(Dataset):
    """Sample (index, seed, epoch, place) -> (picture, label). Stopped names a damaged picture."""

    def __init__(self, source, outputs, transform):
        self.source, self.outputs, self.transform = source, outputs, transform

    def __getitem__(self, sample):
        seed_all("picture", *sample)
        try:
            picture, label = self.source[sample[0]]
            picture = picture.convert("RGB")
        except Exception as error:  # a damaged picture may raise almost anything
            index, samples = sample[0], getattr(self.source, "samples", None)
            raise Stopped(f"picture {samples[index][0] if samples else index} cannot be read, so "
                          f"mend or remove it: {' '.join(str(error).split())}")
        return self.transform(picture), self.outputs[label]


def schedule(pictures, steps, options, start=0):
    """The samples of each batch that this process takes, from step `start` to the end of the run.

    The pictures of a step are dealt round-robin to processes and micro-steps. So a step has the
    same pictures on one process as on many, and copies of one picture land in different batches.
    """
    batch, shares = options["batch"], WORLD * micro_steps(options)
    for step in range(start, options["epochs"] * steps):
        epoch, number = divmod(step, steps)
        if step == start or number == 0:
            seed_all("order", options["seed"], epoch)
            order = torch.randperm(pictures).repeat_interleave(options["repeats"])
            order = order.repeat(math.ceil(steps * batch / len(order)))  # fewer than an epoch needs
        for share in range(RANK, shares, WORLD):
            places = range(number * batch + share, (number + 1) * batch, shares)
            yield [(int(order[place]), options["seed"], epoch, place) for place in places]


def loader(pictures, options, **sampling):
    """Batches of pictures and labels, read by processes that live as long as the loader."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = options["workers"] if options["workers"] >= 0 else max(1, cores // LOCAL_WORLD)
    return DataLoader(pictures, **sampling, num_workers=workers, persistent_workers=workers > 0,
                      pin_memory=DEVICE.type == "cuda", worker_init_fn=catch_signals)


# ------------------------------------------------------------------------------------------- a run

SIGNALS = []  # when SIGTERM or SIGINT came
NOT_FINITE = ("; last.pt is from before: go on with the same command and --amp off, or begin a run "
              "with --weights last.pt, another --out and a lower --lr")


def save(path, write):
    """Writes a file by write(buffer): the whole of it, or the old one stays."""
    temporary, buffer = path.with_name(path.name + ".tmp"), io.BytesIO()
    write(buffer)  # torch.save straight to a full disk would be an obscure error
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise Stopped(f"cannot write {path}: {error.strerror}; the file from before is intact. "
                         "Mend this, then type the same command again")


def set_handlers(handlers):
    """Sets the handlers of signals, which Python lets only the main thread do."""
    with suppress(ValueError, TypeError):  # one of another language is None
        for number, handler in handlers.items():
            signal.signal(number, handler)


def catch_signals(worker=None):
    """A signal ends the run before its next step; another, over 1 s later, ends it at once."""
    def on_signal(number, frame):
        SIGNALS.append(time.monotonic())
        if SIGNALS[-1] - SIGNALS[0] > 1:  # torchrun passes on a Ctrl-C that has come here already
            os._exit(128 + number)
    set_handlers({signal.SIGTERM: on_signal, signal.SIGINT: on_signal})


def total(*numbers):
    """The sum of each number over all processes."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(sums)
    return sums.tolist()


def learning_rate(epoch, options):
    """At `epoch`, a float: half a cosine over all epochs, its start replaced by the warm-up."""
    peak, warmup = options["lr"], options["warmup"]
    low = min(options["min_lr"], peak)
    if epoch < warmup:
        return 1e-6 + (peak - 1e-6) * epoch / warmup
    return low + (peak - low) * (1 + math.cos(math.pi * epoch / options["epochs"])) / 2


def build(options, model, states):
    """The parts of a run, whose states make a checkpoint. Empties `states`, to save memory."""
    model = model.to(DEVICE, memory_format=torch.channels_last)
    if DEVICE.type == "cuda" and WORLD > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    average = get_ema_multi_avg_fn(options["ema"])  # of batch norm's statistics, too
    ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True).eval()
    ema.update_parameters(model)  # the first call copies: the average starts at the first weights
    groups = [dict(params=[p for p in model.parameters() if (p.ndim > 1) == decays],
                   weight_decay=options["weight_decay"] * decays) for decays in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=options["lr"], fused=True)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=options["amp"] == "fp16")
    parts = dict(model=model, ema=ema, optimizer=optimizer, scaler=scaler)
    for name, part in parts.items():
        if states.get(name):  # a scaler that is off has no state
            part.load_state_dict(states[name])
    states.clear()
    return parts


def train_step(parts, forward, batches, mix, options, step):
    """Gradients of all micro-steps, then the optimiser's step. The mean loss over all pictures."""
    parts["model"].train()
    loss_sum = 0.0
    for number, (pictures, labels) in enumerate(batches):
        seed_all("step", options["seed"], step, number * WORLD + RANK)
        pictures, labels = (t.to(DEVICE, non_blocking=True) for t in (pictures, labels))
        order = torch.randperm(len(labels), device=DEVICE)  # v2 pairs neighbours: maybe copies
        pictures, targets = mix(pictures[order], labels[order])
        forward.require_backward_grad_sync = number + 1 == len(batches)  # of DDP: once per step
        with torch.autocast(DEVICE.type, HALF.get(options["amp"]), options["amp"] in HALF):
            logits = forward(pictures)
        loss = F.cross_entropy(logits.float(), targets, reduction="sum",
                               label_smoothing=options["smoothing"]) / options["batch"]
        parts["scaler"].scale(loss * WORLD).backward()  # DDP averages gradients over processes
        loss_sum += loss.detach()
    loss, = total(float(loss_sum))
    if not math.isfinite(loss):
        raise Stopped(f"the loss is {loss} in step {step + 1}{NOT_FINITE}")
    parts["scaler"].step(parts["optimizer"])
    parts["scaler"].update()
    parts["ema"].update_parameters(parts["model"])
    parts["optimizer"].zero_grad()
    return loss


@torch.no_grad()
def evaluate(models, batches, options):
    """Top-1 and top-5 accuracy in % and loss of each model; no picture counts twice."""
    for model in models:
        model.eval()
        for buffer in model.buffers() if WORLD > 1 else ():
            dist.broadcast(buffer, 0)  # without SyncBN each process has its own statistics
    sums = torch.zeros(len(models), 4, dtype=torch.float64)  # top-1, top-5, loss, pictures
    for pictures, labels in batches:
        pictures = pictures.to(DEVICE, non_blocking=True)
        for i, model in enumerate(models):
            with torch.autocast(DEVICE.type, HALF.get(options["amp"]), options["amp"] in HALF):
                logits = model(pictures).float().cpu()
            right = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums[i] += torch.tensor([right[:, 0].sum(), right.sum(), loss, len(labels)])
    sums = torch.tensor(total(*sums.flatten())).view(-1, 4)
    return [dict(top1=100 * one / number, top5=100 * five / number, loss=loss / number)
            for one, five, loss, number in sums.tolist()]


def save_run(run, parts, state):
    """Writes last.pt: the run, `state`, the states of the parts; and log.jsonl, from `state`."""
    out = Path(run["options"]["out"])
    if not all(weight.isfinite().all() for weight in parts["model"].parameters()):
        raise Stopped(f"a weight is not finite after step {state['step']}{NOT_FINITE}")
    if RANK == 0:
        states = {name: part.state_dict() for name, part in parts.items()}
        save(out / "last.pt", partial(torch.save, dict(**run, state=state, **states)))
        lines = "".join(json.dumps(record) + "\n" for record in state["history"])
        save(out / "log.jsonl", lambda file: file.write(lines.encode()))


def end_epoch(run, parts, state, batches):
    """Evaluates the weights and their average, and keeps the record and the best of them."""
    options = run["options"]
    save_run(run, parts, state)  # a kill or a picture may end the evaluation
    raw, ema = evaluate((parts["model"], parts["ema"].module), batches, options)
    better = raw if raw["top1"] > ema["top1"] else ema
    record = dict(epoch=len(state["history"]) + 1, loss=state["loss"] / run["steps"],
                  lr=learning_rate((state["step"] - 1) / run["steps"], options),
                  raw_top1=raw["top1"], ema_top1=ema["top1"], top1=better["top1"],
                  val_loss=better["loss"], images_per_s=state["speed"])
    if RANK == 0 and record["top1"] > state["best"]:  # before last.pt: a kill loses nothing
        best = parts["model"] if better is raw else parts["ema"].module
        save(Path(options["out"], "best.pt"),
             partial(torch.save, dict(**run, model=best.state_dict(), record=record)))
    state["history"].append(record)
    state.update(loss=0.0, best=max(state["best"], record["top1"]))
    save_run(run, parts, state)
    print("  ".join(f"{name} {value:.4g}" for name, value in record.items()))


def train(run, model, states, train_set, batches_to_evaluate, outputs):
    """Trains from the step of the checkpoint to the end of the run, or to a signal."""
    options, steps = run["options"], run["steps"]  # of an epoch
    last = options["epochs"] * steps
    state = dict(step=0, loss=0.0, best=-1.0, speed=0.0, history=[])  # beside those of the parts
    state |= states.get("state", {})
    start, before = state["step"], states.get("options", options)
    best = Path(options["out"], "best.pt")
    if start:
        print(f"going on after step {start} of {last}")
    pictures, known = run["pictures"], states.get("pictures", run["pictures"])
    if pictures != known:
        print("the pictures have changed since the run began; its epochs stay as long as they were")
    anew = pictures[1] != known[1] or not best.exists()  # other pictures to evaluate, or no best.pt
    if anew and len(state["history"]) < options["epochs"]:
        state["best"] = -1.0
    if before["epochs"] != options["epochs"]:
        old, new = (learning_rate(start / steps, values) for values in (before, options))
        print(f"{before['epochs']} epochs are now {options['epochs']}: the learning rate goes on "
              f"at {new:.3g} instead of {old:.3g}")
    parts = build(options, model, states)
    forward = DistributedDataParallel(parts["model"]) if WORLD > 1 else parts["model"]
    forward = torch.compile(forward, dynamic=False) if options["compile"] else forward
    augment, _, mix = transforms(options, len(run["classes"]))
    samples = schedule(len(train_set), steps, options, start)
    batches = iter(loader(Pictures(train_set, outputs, augment), options, batch_sampler=samples))
    SIGNALS.clear()
    catch_signals()
    save_run(run, parts, state)  # a kill before the first epoch ends finds the run
    for epoch in range(len(state["history"]), options["epochs"]):
        first, began = state["step"], time.monotonic()
        bar = tqdm(range(first, (epoch + 1) * steps), initial=first, total=last, unit="step",
                   leave=False, disable=RANK > 0 or None)  # None: if there is no terminal
        for step in bar:
            unreadable = None
            try:
                batch = [next(batches) for _ in range(micro_steps(options))]
            except Stopped as error:
                unreadable = error
            if any(total(bool(SIGNALS or unreadable))):  # in any process
                save_run(run, parts, state)
                print(f"saved after step {step} of {last}; to go on, type the same command, with "
                      f"--out {options['out']}")
                if unreadable:
                    raise unreadable
                return
            rate = learning_rate(step / steps, options)
            for group in parts["optimizer"].param_groups:
                group["lr"] = rate
            loss = train_step(parts, forward, batch, mix, options, step)
            state.update(step=step + 1, loss=state["loss"] + loss)
            bar.set_postfix(loss=loss, lr=rate, refresh=False)
            now = time.monotonic()
            if step == start:  # which also starts the workers and tunes cuDNN
                warm = reported = now
            elif step == start + 4 or bar.disable and now - reported > 60:  # then a line a minute
                pace = (now - warm) / (step - start)  # seconds per step, with evaluations
                whole, left = (tqdm.format_interval(pace * n) for n in (steps, last - step - 1))
                print(f"step {step + 1} of {last}  loss {loss:.4g}  lr {rate:.4g}; an epoch takes "
                      f"about {whole}, {left} left")  # like 3:02:05
                reported = now
        if state["step"] > first:
            state["speed"] = (state["step"] - first) * options["batch"] / (time.monotonic() - began)
        end_epoch(run, parts, state, batches_to_evaluate)
    print(f"best top-1 {state['best']:.2f} %, {best}" + " (which is gone)" * (not best.exists()))


def predict(given, store):
    """Prints the five likeliest classes of each picture, with their probabilities."""
    checkpoint = read_checkpoint(given["weights"])
    names = checkpoint.get("classes", models.ResNet50_Weights.DEFAULT.meta["categories"])
    model = SecViT(model_config(given, checkpoint, len(names))).eval()
    load_weights(model, checkpoint)
    options, _ = choose(given | dict(data="IMAGENET"), 10**6, checkpoint.get("options", {}))
    crop = transforms(options)[1]
    for path in given["predict"]:
        try:
            picture = crop(open_picture(path))
        except Exception as error:  # a damaged picture may raise almost anything
            raise ValueError(f"{path} cannot be read: {error}; mend it or leave it out")
        with torch.no_grad():
            best = model(picture[None]).softmax(dim=1)[0].topk(min(5, len(names)))
        print(f"{path}: " + ", ".join(f"{names[index]} {100 * probability:.1f} %" for
                                      probability, index in zip(*map(torch.Tensor.tolist, best))))


def work(argv):
    """Does what the command line says, in this process."""
    prepared = [None]
    try:  # torchrun's store outlives the processes that it may start again
        torchrun = os.environ.get("RANK") or WORLD > 1
        store = next(dist.rendezvous("env://"))[0] if torchrun else dist.HashStore()
        start = (store.add("started", 1) - 1) // WORLD  # how often the group has started before
        if RANK == 0:
            given = parse(argv)
            prepared = [(predict if "predict" in given else prepare)(given, store)]
    except SystemExit:  # --help
        pass
    except (OSError, ValueError) as error:
        raise BadInput(" ".join(str(error).split())[:1000]) from error
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise BadInput(f"a checkpoint is incomplete, so choose another: {error!r:.180}") from error
    if WORLD > 1:  # with a new prefix: the old one may hold the addresses of dead processes
        dist.init_process_group(store=dist.PrefixStore(str(start), store), rank=RANK,
                                world_size=WORLD)
        dist.broadcast_object_list(prepared)
    if DEVICE.type == "cuda":  # which rank 0 has checked
        torch.cuda.set_device(DEVICE)
        torch.backends.cudnn.benchmark = True
    if not prepared[0]:
        return
    run, model, states, train_set, val_set, outputs = prepared.pop()
    options, classes = run["options"], len(run["classes"])
    batches = loader(
        Pictures(val_set, outputs, transforms(options)[1]), options, batch_size=options["micro"],
        sampler=[(index,) for index in range(RANK, len(val_set), WORLD)])  # no picture twice
    if train_set:
        print(", ".join(f"{name} {value}" for name, value in options.items()))
        print(f"{len(train_set):,} pictures to train on, {len(val_set):,} to evaluate, {classes} "
              f"classes; {WORLD} process(es) on {DEVICE.type}")
        train(run, model, states, train_set, batches, outputs)
    else:
        result, = evaluate([model.to(DEVICE)], batches, options)
        print(f"top-1 {result['top1']:.2f} %" + f", top-5 {result['top5']:.2f} %" * (classes > 5)
              + f" of {len(val_set):,} pictures, loss {result['loss']:.4f}, amp {options['amp']}")


def main(argv):
    """Trains, evaluates or predicts, also in a notebook. BadInput (a ValueError) or Stopped."""
    children = {*multiprocessing.active_children()}
    child = getattr(signal, "SIGCHLD", signal.SIGTERM)  # Windows has none
    handlers = {number: signal.getsignal(number)
                for number in (signal.SIGTERM, signal.SIGINT, child)}
    try:
        with redirect_stdout(sys.stdout if RANK == 0 else None):
            work(argv)
    finally:
        set_handlers({child: signal.SIG_DFL})  # else torch reports the workers' end
        for worker in {*multiprocessing.active_children()} - children:
            worker.kill()  # they catch SIGTERM, and have nothing to save
            worker.join()
        set_handlers(handlers)
        if dist.is_initialized():
            dist.destroy_process_group()


LINES = {
    torch.OutOfMemoryError: "GPU memory is full: type the same command with a smaller --micro",
    BrokenPipeError: "nobody reads what is printed: type the same command without that pipe",
    KeyboardInterrupt: "stopped by Ctrl-C"}  # before the first step; then `catch_signals` takes it


def command_line(argv):
    """`main` with one line for each known error. The exit code: 2 for bad input."""
    try:
        return main(argv)
    except (Stopped, *LINES) as error:  # of a worker, it is the last line of a traceback
        line = LINES.get(type(error)) or str(error).splitlines()[-1].rpartition("Stopped: ")[2]
        bad = isinstance(error, BadInput)
        print(f"train.py: {'error: ' * bad}{line}", file=sys.stderr)
        return 1 + bad


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # for any name
    sys.exit(command_line(sys.argv[1:]))
