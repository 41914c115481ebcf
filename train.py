"""Trains SecViT (secvit.py) on real pictures. The recipe is the paper's: DeiT's, in RECIPE.

    python train.py                                  # handwritten digits, on the CPU if need be
    torchrun train.py --model tiny                   # the same as a job of one process
    torchrun --nproc_per_node=8 train.py --model tiny --data IMAGENET      # the paper's recipe
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29400 \\
        train.py --model base --data IMAGENET --out runs/base              # on each machine
    python train.py --resume --out runs/base         # goes on where that run stopped
    python train.py --eval --weights runs/base/best.pt --data IMAGENET

IMAGENET is a folder with train/ and val/, each with a folder of pictures for every class.

A run is one loop over steps. The number of a step and the options decide all that happens in it:
which pictures, how each is augmented, the noise and the learning rate. So a run that starts again
at step s ends with the same weights, and a checkpoint is s, the options and the parts' states.
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
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from secvit import VARIANTS, SecViT, load_weights, read_checkpoint

# ----------------------------------------------------------------------------------------- options

RECIPE = {  # the value for ImageNet, the lowest, the highest, the meaning
    "size": (224, 32, 4096, "side of the square pictures in pixels"),
    "epochs": (300, 1, 10**6, "passes over the training pictures"),
    "batch": (1024, 1, 2**20, "pictures an optimiser step, over all processes"),
    "micro": (128, 1, 2**20, "pictures a process takes at once; gradients add up to --batch"),
    "lr": (1e-3, 0, 100, "peak learning rate; the default scales with --batch"),
    "min_lr": (1e-5, 0, 100, "learning rate at the end of the cosine"),
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
    "repeats": (3, 1, 100, "repeated augmentation: an epoch has a third of the pictures, thrice"),
    "center": (0.875, 0.1, 1, "share of the side that the centre crop of the evaluation keeps"),
    "seed": (0, 0, 2**32 - 1, "of everything that is random"),
    "workers": (-1, -1, 512, "processes that read pictures; -1: one for each core"),
}
SMALL = dict(repeats=1, center=1.0, ema=0.999, erasing=0.0, mixup=0.0)
DIGITS = SMALL | dict(size=32, epochs=8, batch=32, ema=0.98, min_crop=0.6, flip=0.0,
                      rand_augment=0.0, cutmix=0.0)
CIFAR = SMALL | dict(size=32, epochs=100, batch=128, min_crop=0.4)
LARGER = SMALL | dict(size=160, epochs=100, batch=128, min_crop=0.3, center=0.875)
DATA = {  # what differs from the recipe, torchvision's class, how it calls its two parts
    "digits": (DIGITS, None, None, None),
    "cifar10": (CIFAR, datasets.CIFAR10, dict(train=True), dict(train=False)),
    "cifar100": (CIFAR, datasets.CIFAR100, dict(train=True), dict(train=False)),
    "imagenette": (LARGER, datasets.Imagenette, dict(split="train"), dict(split="val")),
    "flowers102": (LARGER, datasets.Flowers102, dict(split="train"), dict(split="val")),
    "pets": (LARGER, datasets.OxfordIIITPet, dict(split="trainval"), dict(split="test")),
}
HALF = dict(bf16=torch.bfloat16, fp16=torch.float16)
FREE = {"workers", "amp", "compile", "micro", "resume", "out"}  # what a resumed run may change

PARSER = argparse.ArgumentParser(  # without a usage its errors are one line, with exit code 2
    prog="train.py", description=__doc__, usage=argparse.SUPPRESS, allow_abbrev=False,
    argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
PARSER.add_argument("--model", choices=VARIANTS, help="default: tiny")
PARSER.add_argument("--set", nargs="+", metavar="FIELD=VALUE",
                    help="fields of SecViTConfig, like lce=False or clusters=64,16,4,1")
PARSER.add_argument("--data", help=f"a folder, or one of {', '.join(DATA)}; default: digits")
PARSER.add_argument("--out", help="folder of the run; default: the next free number in runs")
PARSER.add_argument("--weights", help="a checkpoint to start from or evaluate, ours or released")
PARSER.add_argument("--resume", action="store_true", help="go on with the run in --out")
PARSER.add_argument("--eval", action="store_true", help="evaluate --weights and end")
PARSER.add_argument("--amp", choices=("bf16", "fp16", "off"), help="default: bf16 on a GPU")
PARSER.add_argument("--compile", action=argparse.BooleanOptionalAction, help="use torch.compile")
for name, (value, _, _, meaning) in RECIPE.items():
    PARSER.add_argument("--" + name.replace("_", "-"), type=type(value),
                        help=f"{meaning}; ImageNet: {value:g}")

RANK = int(os.environ.get("RANK", 0))  # torchrun sets these; without it there is one process
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of this machine
DEVICE = torch.device(f"cuda:{LOCAL_RANK}" if torch.cuda.is_available() else "cpu")


def choose(argv):
    """The options of a run: what was typed, else its data set's, else the recipe's."""
    given = vars(PARSER.parse_args(argv))
    for name, (_, low, high, _) in RECIPE.items():
        if name in given and not low <= given[name] <= high:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} {given[name]} is not in {low} to {high}")
    if given.get("resume"):
        if "out" not in given or given.keys() - FREE:
            raise ValueError("--resume needs --out, and has its other options from the run; only "
                             "--amp, --compile, --micro and --workers may be new")
        return load(Path(given["out"], "last.pt"))["options"] | given
    if given.get("eval") and "weights" not in given:
        raise ValueError("--eval needs --weights, a checkpoint")
    half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    options = dict(model="tiny", set=[], data="digits", compile=False,
                   amp=half if DEVICE.type == "cuda" else "off")
    trained = load(given["weights"]).get("options", {}) if "weights" in given else {}
    kept = {"model", "set"} | ({"data", "size", "center"} if given.get("eval") else set())
    options |= {name: trained[name] for name in kept & trained.keys()} | given
    recipe = {name: value for name, (value, *_) in RECIPE.items()}
    recipe |= DATA.get(options["data"], [{}])[0]
    scale = options.get("batch", recipe["batch"]) / recipe["batch"]
    recipe["lr"] *= scale
    recipe["ema"] **= scale
    recipe["warmup"] = min(recipe["warmup"], options.get("epochs", recipe["epochs"]) / 10)
    return recipe | options


def model_config(options, classes):
    """SecViTConfig of the variant with the fields in --set."""
    try:
        pairs = [text.partition("=") for text in options["set"]]
        changes = {name: ast.literal_eval(value) for name, _, value in pairs}
        return replace(VARIANTS[options["model"]], num_classes=classes, **changes)
    except Exception as error:  # what literal_eval can raise has no end
        raise ValueError(f"--set takes FIELD=VALUE; {' '.join(options['set'])}: {error}")


def turns(options):
    """In how many batches, of --micro pictures or fewer, a process takes its share of a step."""
    return math.ceil(options["batch"] / WORLD / options["micro"])


def prepare(argv, store):
    """What can meet bad input, done by rank 0 before the others join; all errors end here.

    Returns options, model, states to start from, pictures to train on and pictures to evaluate.
    """
    try:
        if store.check(["out"]):  # torchrun has started the run again
            argv = ["--resume", "--out", store.get("out").decode()]
        options = choose(argv)
        resume, new = options.pop("resume", False), not options.get("eval")
        train_set, val_set, classes = load_pictures(options["data"])
        config = model_config(options, classes)
        smallest = options["batch"] // (WORLD * turns(options))  # batch norm may need a larger one
        if new:
            with torch.device("meta"):  # shapes without numbers
                SecViT(config)(torch.empty(smallest, 3, options["size"], options["size"]))
        number = next(n for n in range(1, 10**6) if not Path("runs", str(n)).exists())
        last = Path(options.setdefault("out", f"runs/{number}"), "last.pt")
        states = load(last) if resume else {}
        seed_all("weights", options["seed"])
        model = SecViT(config)
        if "model" in states:
            load_weights(model, states)
        elif "weights" in options:
            other = load_weights(model, load(options["weights"]), new_head=new)
            said = "; the classifier is a new one" if other else ""
            print(f"weights from {options['weights']}{said}")
        if new and not resume:  # the last thing that can fail claims the folder
            last.parent.mkdir(parents=True, exist_ok=True)
            with open(last, "xb") as file:
                torch.save(dict(options=options), file)
            store.set("out", options["out"])
        return options, model, states, train_set, val_set
    except FileExistsError as error:
        PARSER.error(f"{error.filename} is there: choose another --out, or --resume --out that run")
    except (KeyError, OSError, ValueError) as error:
        small = "value per channel" in str(error) or "(0, 3, " in str(error)
        hint = "; use a larger --micro, --batch or --size" if small else ""
        PARSER.error(" ".join(str(error).split())[:1000] + hint)


# ---------------------------------------------------------------------------------------- pictures


def seed_all(*key):
    """All that is random in a picture or a step follows from its place in the run."""
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
    """Of a PIL picture to (3 size size) in training and in evaluation; of a batch in training."""
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


class Pictures(Dataset):
    """(picture, label) for a key (index, *where in the run). OSError names what cannot be read."""

    def __init__(self, source, transform):
        self.source, self.transform = source, transform

    def __getitem__(self, key):
        seed_all("picture", *key)
        try:
            picture, label = self.source[key[0]]
            picture = picture.convert("RGB")
        except Exception as error:  # what a damaged picture can raise is not documented
            name = self.source.samples[key[0]][0] if hasattr(self.source, "samples") else key[0]
            error = " ".join(str(error).split())
            raise OSError(f"picture {name} cannot be read, so mend or remove it: {error}")
        return self.transform(picture), label


def load_pictures(data):
    """The pictures to train on, those to evaluate, the number of classes."""
    if data == "digits":
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
        bunch = load_digits()
        pictures = [(Image.fromarray((image * 255 / 16).astype("uint8")), int(label))
                    for image, label in zip(bunch.images, bunch.target)]
        parts = train_test_split(pictures, test_size=0.2, stratify=bunch.target, random_state=0)
        return *parts, len(bunch.target_names)
    if data in DATA:
        _, make, *parts = DATA[data]
        try:
            parts = [make("data", download=True, **part) for part in parts]
        except (OSError, RuntimeError) as error:
            raise ValueError(f"--data {data} cannot be downloaded into data: {error}")
    elif Path(data).is_dir():
        parts = [datasets.ImageFolder(Path(data, part)) for part in ("train", "val")]
    else:
        raise ValueError(f"--data {data} is no folder and none of {', '.join(DATA)}")
    ours, theirs = ({*part.classes} for part in parts)
    if ours != theirs:
        raise ValueError(f"{data}: not in both train and val are {sorted(ours ^ theirs)}")
    return *parts, len(ours)


def schedule(pictures, options, start=0):
    """The keys of each batch that this process takes, from step `start` to the end of the run.

    The pictures of a step are dealt like cards to processes and turns, so that it has the same
    pictures on one process as on many, and the copies of repeated augmentation part.
    """
    batch, steps = options["batch"], max(1, pictures // options["batch"])
    hands = WORLD * turns(options)
    for step in range(start, options["epochs"] * steps):
        epoch, number = divmod(step, steps)
        if step == start or number == 0:
            seed_all("order", options["seed"], epoch)
            order = torch.randperm(pictures).repeat_interleave(options["repeats"])
            order = order.repeat(math.ceil(batch / len(order)))  # fewer pictures than a batch
        for hand in range(RANK, hands, WORLD):
            places = range(number * batch + hand, (number + 1) * batch, hands)
            yield [(int(order[place]), options["seed"], epoch, place) for place in places]


def loader(pictures, transform, options, **keys):
    """Batches of pictures and labels, read by other processes in the order of the keys."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = options["workers"] if options["workers"] >= 0 else max(1, cores // LOCAL_WORLD)
    return DataLoader(Pictures(pictures, transform), **keys, num_workers=workers,
                      pin_memory=DEVICE.type == "cuda", worker_init_fn=catch_signals)


# ------------------------------------------------------------------------------------------- a run

SIGNALS = []  # when SIGTERM or SIGINT came
NOT_FINITE = ("; last.pt is from before: go on with --resume --amp off, or start a run with "
              "--weights last.pt and a lower --lr")


def save(path, write):
    """What write(file) writes: the whole file, or the old one stays."""
    temporary, buffer = path.with_name(path.name + ".tmp"), io.BytesIO()
    write(buffer)  # torch.save straight to a full disk would be an obscure error
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        sys.exit(f"train.py: cannot write {path}: {error.strerror}; what was there before is "
                 f"intact: make room, then go on with --resume --out {path.parent}")


def load(path):
    """The dict in a checkpoint. ValueError for any other file, or none."""
    try:
        return {} | read_checkpoint(path)
    except Exception as error:  # what a damaged file can raise is not documented
        raise ValueError(f"{path} cannot be read: {error!r:.100}")


def catch_signals(worker=None):
    """The first makes a run end before its next step, a second ends the process at once."""
    def on_signal(number, frame):
        SIGNALS.append(time.monotonic())
        if SIGNALS[-1] - SIGNALS[0] > 1:  # torchrun passes on a Ctrl-C that has come here already
            os._exit(128 + number)
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)


def total(*numbers):
    """The sum of each number over all processes."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    if WORLD > 1:
        dist.all_reduce(sums)
    return sums.tolist()


def learning_rate(epoch, options):
    """At `epoch`, with fractions: half a cosine over all epochs; warm-up replaces its start."""
    peak, warmup = options["lr"], options["warmup"]
    low = min(options["min_lr"], peak)
    if epoch < warmup:
        return 1e-6 + (peak - 1e-6) * epoch / warmup
    return low + (peak - low) * (1 + math.cos(math.pi * epoch / options["epochs"])) / 2


def build(options, model, states):
    """The parts of a run, whose states make a checkpoint."""
    model = model.to(DEVICE, memory_format=torch.channels_last)
    if DEVICE.type == "cuda" and WORLD > 1:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    average = get_ema_multi_avg_fn(options["ema"])  # of batch norm's statistics, too
    ema = AveragedModel(model, multi_avg_fn=average, use_buffers=True).eval()
    ema.update_parameters(model)  # the first call copies: the average starts at the first weights
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]  # biases, norms and LayerScale
    optimizer = torch.optim.AdamW([dict(params=weights, weight_decay=options["weight_decay"]),
                                   dict(params=others, weight_decay=0.0)], lr=options["lr"])
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=options["amp"] == "fp16")
    parts = dict(model=model, ema=ema, optimizer=optimizer, scaler=scaler)
    for name, part in parts.items():
        if states.get(name):  # a scaler that is off has no state
            part.load_state_dict(states[name])
    return parts


def train_step(parts, forward, batches, mix, options, step):
    """Gradients of all turns of a step, then the optimiser's. The mean loss over all pictures."""
    parts["model"].train()
    loss_sum = 0.0
    for turn, (pictures, labels) in enumerate(batches):
        seed_all("step", options["seed"], step, turn * WORLD + RANK)
        pictures, labels = (t.to(DEVICE, non_blocking=True) for t in (pictures, labels))
        order = torch.randperm(len(labels))  # v2 mixes neighbours, which could be copies
        pictures, targets = mix(pictures[order], labels[order])
        with torch.autocast(DEVICE.type, HALF.get(options["amp"]), options["amp"] in HALF):
            logits = forward(pictures)
        loss = F.cross_entropy(logits.float(), targets, reduction="sum",
                               label_smoothing=options["smoothing"]) / options["batch"]
        parts["scaler"].scale(loss * WORLD).backward()  # DDP averages gradients over processes
        loss_sum += loss.detach()
    loss, = total(float(loss_sum))
    if not math.isfinite(loss):
        sys.exit(f"train.py: the loss is {loss} in step {step + 1}{NOT_FINITE}")
    parts["scaler"].step(parts["optimizer"])
    parts["scaler"].update()
    parts["ema"].update_parameters(parts["model"])
    parts["optimizer"].zero_grad()
    return loss


@torch.no_grad()
def evaluate(models, pictures, options):
    """Top-1 accuracies in %, exact: every process takes its share, none counts twice."""
    for model in models:
        model.eval()
        for buffer in model.buffers() if WORLD > 1 else ():
            dist.broadcast(buffer, 0)  # without SyncBN each process has its own statistics
    counts = torch.zeros(len(models) + 1)  # right ones, then all
    mine = [(index,) for index in range(RANK, len(pictures), WORLD)]
    _, crop, _ = transforms(options)
    for batch, labels in loader(pictures, crop, options, sampler=mine, batch_size=options["micro"]):
        batch = batch.to(DEVICE, non_blocking=True)
        for i, model in enumerate(models):
            with torch.autocast(DEVICE.type, HALF.get(options["amp"]), options["amp"] in HALF):
                logits = model(batch)
            counts[i] += (logits.argmax(1).cpu() == labels).sum()
        counts[-1] += len(labels)
    *right, number = total(*counts)
    return [100 * count / number for count in right]


def save_run(options, parts, state):
    """Writes last.pt: options, state, and the states of the parts; and log.jsonl, from `state`."""
    out = Path(options["out"])
    if not all(weight.isfinite().all() for weight in parts["model"].parameters()):
        sys.exit(f"train.py: a weight is not finite after step {state['step']}{NOT_FINITE}")
    if RANK == 0:
        states = {name: part.state_dict() for name, part in parts.items()}
        save(out / "last.pt", partial(torch.save, dict(options=options, state=state, **states)))
        lines = "".join(json.dumps(record) + "\n" for record in state["history"])
        save(out / "log.jsonl", lambda file: file.write(lines.encode()))


def train(options, model, states, train_set, val_set):
    """From the step of the checkpoint to the end of the run, or to a signal."""
    steps = max(1, len(train_set) // options["batch"])  # an epoch
    last = options["epochs"] * steps
    parts = build(options, model, states)
    state = dict(step=0, loss=0.0, best=-1.0, history=[])  # what changes beside the parts
    state |= states.get("state", {})
    first, began = state["step"], time.monotonic()
    forward = DistributedDataParallel(parts["model"]) if WORLD > 1 else parts["model"]
    forward = torch.compile(forward) if options["compile"] else forward
    augment, _, mix = transforms(options, model.config.num_classes)
    keys = schedule(len(train_set), options, first)
    batches = iter(loader(train_set, augment, options, batch_sampler=keys))
    catch_signals()
    bar = tqdm(initial=first, total=last, unit="img", unit_scale=options["batch"], leave=False,
               disable=RANK > 0 or not sys.stderr.isatty())
    for step in range(first, last + 1):
        if step == steps * (1 + len(state["history"])):  # an epoch is over
            speed = (step - first) * options["batch"] / (time.monotonic() - began)
            save_run(options, parts, state)  # a kill or a picture may end the evaluation
            raw, averaged = evaluate((parts["model"], parts["ema"].module), val_set, options)
            record = dict(epoch=step // steps, loss=state["loss"] / steps,
                          lr=learning_rate((step - 1) / steps, options), raw_top1=raw,
                          ema_top1=averaged, top1=max(raw, averaged), images_per_s=speed)
            if RANK == 0 and record["top1"] > state["best"]:  # before last.pt: a kill loses nothing
                better = parts["model"] if raw > averaged else parts["ema"].module
                save(Path(options["out"], "best.pt"), partial(torch.save, dict(
                    model=better.state_dict(), config=asdict(model.config), options=options,
                    record=record)))
            state["history"].append(record)
            state.update(loss=0.0, best=max(state["best"], record["top1"]))
            save_run(options, parts, state)
            tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in record.items()))
            first, began = step, time.monotonic()
        if step == last:
            break
        unreadable = None
        try:
            batch = [next(batches) for _ in range(turns(options))]
        except OSError as error:
            unreadable = error
        stop, = total(bool(SIGNALS or unreadable))
        if stop:
            save_run(options, parts, state)
            print(f"saved after step {step} of {last}: go on with --resume --out {options['out']}")
            if unreadable:
                raise unreadable
            return
        rate = learning_rate(step / steps, options)
        for group in parts["optimizer"].param_groups:
            group["lr"] = rate
        loss = train_step(parts, forward, batch, mix, options, step)
        state.update(step=step + 1, loss=state["loss"] + loss)
        bar.update()
        bar.set_postfix(loss=loss, lr=rate)
    print(f"best top-1 {state['best']:.2f} %, {options['out']}/best.pt")


def meet(store):
    """Joins all processes, under a number that no dead group has left its addresses under.

    torchrun counts the restarts of each machine apart, so rank 0 counts them here. It offers a
    number, the others sign it, and when all have signed it is complete.
    """
    if RANK == 0:
        number = str(store.add("starts", 1))
        store.set("open", number)
        store.wait([f"{number} {rank}" for rank in range(1, WORLD)])
        store.set("open", "")  # who comes after a restart waits for the next number
        store.set(number, "complete")
    else:
        number = ""
        while not (number and store.check([number])):
            number = store.get("open").decode() or number
            store.set(f"{number} {RANK}", "here")
            time.sleep(0.05)
    dist.init_process_group(store=dist.PrefixStore(number, store), rank=RANK, world_size=WORLD)


def main(argv):
    sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
    sys.stdout.reconfigure(line_buffering=True)
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    torchrun = "RANK" in os.environ  # its store outlives the processes, which it may start again
    store = next(dist.rendezvous("env://"))[0] if torchrun else dist.HashStore()
    prepared = [prepare(argv, store) if RANK == 0 else None]
    if WORLD > 1:
        meet(store)
        dist.broadcast_object_list(prepared)
    options, model, states, train_set, val_set = prepared[0]
    if options.get("eval"):
        accuracy, = evaluate([model.to(DEVICE)], val_set, options)
        print(f"top-1 {accuracy:.2f} % of {len(val_set):,} pictures")
        return
    print(", ".join(f"{name} {value}" for name, value in options.items()))
    print(f"{len(train_set):,} pictures to train on, {len(val_set):,} to evaluate, "
          f"{model.config.num_classes} classes; {WORLD} process(es) on {DEVICE.type}")
    train(options, model, states, train_set, val_set)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as error:  # a picture; where a worker read it, the message is the last line
        sys.exit("train.py: " + str(error).splitlines()[-1].removeprefix("OSError: "))
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else torch reports the workers' end
        for worker in multiprocessing.active_children():
            worker.kill()  # they catch SIGTERM, and have nothing to save
        if dist.is_initialized():
            dist.destroy_process_group()
