"""What the lessons draw, so that their own cells are about SEC; and their copies for a class.

    python notebooks/draw.py --student FOLDER

writes each lesson into FOLDER without outputs and without solutions, and beside them what they
import. Nothing here computes a result: a function gets numbers and shows them.
"""

import argparse
import math
import os
import re
import shutil
import sys
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import torch
from matplotlib.patches import Wedge

# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#000000")
ORDERED = "cividis"  # for what has an order: a similarity, or clusters from the first to the last
SIGNED = "PuOr"  # for what has a sign; zero is white

plt.rcParams.update({"figure.dpi": 100, "font.size": 12, "axes.titlesize": 13, "figure.constrained_"
                     "layout.use": True, "axes.prop_cycle": plt.cycler(color=COLOURS)})


def panels(number, columns=4, height=3.4, width=3.4):
    """A figure of `number` panels of 340 pixels or more, at most four in a row: a list of axes."""
    columns = min(columns, number)
    rows = -(-number // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows),
                                squeeze=False)
    for ax in axes.flat[number:]:
        ax.axis("off")
    return list(axes.flat[:number])


def picture(ax, values, title="", **options):
    """A picture (height width 3), or a map (height width) in colours."""
    ax.set_title(title)
    ax.axis("off")
    return ax.imshow(values, interpolation="nearest", **options)


# --------------------------------------------------------------------------------------- lesson 01


def idea():
    """SEC in one picture: sixteen toy tokens are sorted by an angle, cut, and attend in pairs."""
    turns = torch.tensor((8, -52, 35, -19, 78, -27, 104, 47, -88, 66, 2, -40, 57, 15, -70, 26)) + 25
    lengths = 0.8 + 0.06 * (7 * torch.arange(16) % 5)
    arrows = lengths[:, None] * torch.stack((turns.deg2rad().cos(), turns.deg2rad().sin()), 1)
    center = arrows.mean(dim=0)
    angles = torch.cosine_similarity(arrows, center, dim=-1).arccos().rad2deg()
    ranks, angles = angles.argsort().argsort().tolist(), angles.tolist()
    place, names = [divmod(token, 4) for token in range(16)], plt.get_cmap("twilight_shifted")
    tones = [names(0.12 + angle / 135) for angle in angles]
    tokens, keys, sort, attend = panels(4)
    tokens.set_title("16 tokens")
    keys.set_title("1  each key: one angle to the centre")
    sort.set_title("2  sort, 3  cut: 4 equal clusters")
    attend.set_title("4  attend inside each cluster")
    for token, (row, column) in enumerate(place):
        for ax, y, x in ((tokens, row, column), (attend, row, column),
                         (sort, *divmod(ranks[token], 4))):
            ax.add_patch(plt.Rectangle((x - 0.42, y - 0.36), 0.84, 0.72, color=tones[token]))
            ax.text(x, y, token, ha="center", va="center", size=14, weight="bold",
                    color="black" if 20 < angles[token] < 81 else "white")
        keys.annotate("", arrows[token], (0, 0),
                      arrowprops=dict(arrowstyle="->", color=tones[token], lw=2))
    keys.annotate("", center, (0, 0), arrowprops=dict(
        arrowstyle="-|>", color="black", lw=5, mutation_scale=24, shrinkA=0, shrinkB=0))
    keys.text(-1, -0.1, "black:\nthe centre,\nthe mean of\nthe keys", weight="bold", va="top")
    for cluster in range(4):
        sort.add_patch(plt.Rectangle((-0.5, cluster - 0.45), 4, 0.9, fill=False, lw=3,
                                     edgecolor=COLOURS[cluster + 4]))
        mine = [place[token] for token in range(16) if ranks[token] // 4 == cluster]
        for one in mine:
            attend.add_patch(plt.Rectangle((one[1] - 0.42, one[0] - 0.36), 0.84, 0.72, lw=4,
                                           fill=False, edgecolor=COLOURS[cluster + 4]))
            for other in mine if cluster == 0 else ():  # one cluster's lines are enough to read
                attend.plot((one[1], other[1]), (one[0], other[0]), lw=4, zorder=0,
                            color=COLOURS[4])
    for ax in (tokens, sort, attend):
        ax.set(xlim=(-0.6, 3.6), ylim=(3.6, -0.6))
    keys.set(xlim=(-1.05, 1.05), ylim=(-0.95, 1.05), aspect="equal")
    for ax in (tokens, keys, sort, attend):
        ax.axis("off")
    plt.show()


def tokens_and_key(colours, token, key):
    """Each photograph as its tokens, (l 3) from 0 to 1, and the numbers of one marked key."""
    *maps, bars = panels(4)
    for ax, (name, colour) in zip(maps, colours.items()):
        side = math.isqrt(len(colour))
        picture(ax, colour.view(side, side, 3), f"{name}: {side} x {side} tokens")
    maps[0].plot(token % side, token // side, "s", mfc="none", mec="white", ms=9, mew=2)
    bars.bar(range(len(key)), key, color=[COLOURS[c] for c in (5, 2, 4) for _ in range(16)])
    bars.axhline(0, color="black", lw=1)
    bars.set(title="the key of the marked token", xlabel="number (red, green, blue)",
             ylabel="normalised value")
    plt.show()


def cluster_map(ax, groups, title):
    """The clusters, token numbers (c m), in their places: 0 is the first of the sequence."""
    c, side = len(groups), math.isqrt(groups.numel())
    place = groups.flatten().argsort().view(side, side) // groups.shape[1]
    return picture(ax, place / max(c - 1, 1), title, cmap=ORDERED + "_r", vmin=0, vmax=1)


def sorted_and_cut(sim, groups, colour, shown=(4, 20, 31)):
    """The similarities (l) as a sorted sequence with its cuts, and some clusters."""
    side, m = math.isqrt(len(sim)), groups.shape[1]
    line, some = panels(2, width=3.8)
    line.plot(sim[groups.flatten()], color="black", lw=1)
    line.vlines(range(0, len(sim) + 1, m), -1, 1, color="silver", lw=0.5)
    line.set(title="sorted, and cut into 32", xlabel="place in the sequence", ylabel="cosine")
    grey = colour.mean(dim=-1, keepdim=True).expand(-1, 3) * 0.6
    picture(some, grey.reshape(side, side, 3), "the same three clusters of stage 1")
    for number, tone in zip(shown, (COLOURS[1], COLOURS[3], COLOURS[5])):
        line.plot(range(number * m, number * m + m), sim[groups[number]], color=tone, lw=7,
                  label=f"cluster {number}")
        some.scatter(groups[number] % side, groups[number] // side, s=7, color=tone, marker="s")
    line.legend()
    plt.show()


def attention_of_token(token, weights, outputs):
    """Attention weights of one token in two ways (l), and all outputs in two ways (l 3)."""
    side = math.isqrt(len(weights[0]))
    axes = panels(4)
    for ax, weight, title in zip(axes, weights, ("full attention of a token",
                                                 "inside its cluster (Eq. 5)")):
        image = picture(ax, weight.clamp_min(1e-6).log10().view(side, side), title, cmap=ORDERED,
                        vmin=-6, vmax=-1)
        ax.plot(token % side, token // side, "s", mfc="none", mec=COLOURS[5], ms=10, mew=3)
    plt.colorbar(image, ax=axes[:2], shrink=0.8, label="attention weight, log10")
    for ax, output, title in zip(axes[2:], outputs, ("all outputs, full attention",
                                                     "all outputs, inside clusters")):
        picture(ax, output.view(side, side, 3), title)
    plt.show()


def cones(ax, plane, colour, arrow, cuts, title):
    """Keys of two numbers (l 2), a centre as an arrow, and the angles at which the cuts lie."""
    middle = math.degrees(math.atan2(arrow[1], arrow[0]))
    edges, reach = [0, *(math.degrees(cut) for cut in cuts), 180], 9
    shades = plt.get_cmap(ORDERED + "_r", len(edges) - 1)
    for number, (start, end) in enumerate(zip(edges, edges[1:])):
        for wedge in ((middle + start, middle + end), (middle - end, middle - start)):
            ax.add_patch(Wedge((0, 0), reach, *wedge, facecolor=shades(number), alpha=0.55,
                               edgecolor="black", lw=1, antialiased=False))
    ax.scatter(*plane[::8].T, s=16, color=colour[::8].numpy(), linewidths=0, antialiaseds=False)
    ax.annotate("", (2 * arrow[0], 2 * arrow[1]), (0, 0),
                arrowprops=dict(arrowstyle="-|>", color=COLOURS[5], lw=4, mutation_scale=22))
    ax.set(title=title, xlabel="red, normalised", ylabel="blue, normalised", aspect="equal",
           xlim=(-2.6, 3), ylim=(-2.6, 3))


def slider(show, start):
    """`show(degrees)` at each move of a slider, or once where nobody is there to move it."""
    names = getattr(sys.modules["__main__"], "__dict__", {})
    if "JPY_SESSION_NAME" in os.environ or "__vsc_ipynb_file__" in names:  # Jupyter or VS Code
        knob = ipywidgets.IntSlider(start, 0, 180, 5, continuous_update=False)
        ipywidgets.interact(show, degrees=knob)
    else:
        show(start)


def arrow_and_clusters(plane, colour, degrees, arrow, cuts, groups, share):
    """The plane with its cones, and the same clusters in the picture."""
    left, right = panels(2, width=3.7, height=3.6)
    cones(left, plane, colour, arrow, cuts, f"{degrees} degrees: {share:.1%} kept")
    image = cluster_map(right, groups, "the clusters in the picture")
    plt.colorbar(image, ax=right, shrink=0.8, ticks=(0, 1), label="0: the first, 1: the last")
    plt.show()


def best_and_worst(arrows):
    """Arrows side by side. [(picture, plane, colour, degrees, (arrow, cuts, groups, kept))]"""
    for ax, (name, plane, colour, degrees, found) in zip(panels(4), arrows):
        arrow, cuts, _, share = found
        cones(ax, plane, colour, arrow, cuts, f"{name}, {degrees} degrees: {share:.0%} kept")
    plt.show()


def all_angles(curves, chance):
    """Attention kept for each angle of the arrow. {picture: {degrees: share}}"""
    ax, = panels(1, width=9)
    for (name, curve), tone in zip(curves.items(), (COLOURS[5], COLOURS[4], COLOURS[2])):
        ax.plot(curve.keys(), [100 * share for share in curve.values()], "o-", color=tone,
                label=name)
    ax.axhline(100 * chance, color="grey", ls="--", label="chance")
    ax.set(title="any arrow between 0 and 180 degrees, 8 clusters", xlabel="angle of the centre",
           ylabel="attention kept, %", xlim=(-4, 184), ylim=(0, None), xticks=range(0, 181, 30))
    ax.legend(loc="lower center", ncols=4)
    plt.show()


def rivals(kept, chance):
    """Attention kept by each rule, one dot a draw. {picture: {rule: shares}}"""
    axes = panels(len(kept), width=4)
    for ax, (name, rules) in zip(axes, kept.items()):
        for y, (rule, shares) in enumerate(rules.items()):
            ax.plot(100 * shares, [y] * len(shares), "o", ms=9, alpha=0.6,
                    color=COLOURS[5] if y == 0 else COLOURS[4])
        ax.axvline(100 * chance, color="grey", ls="--")
        ax.set(title=name, xlabel="attention kept, %", xlim=(0, 14), xticks=(0, 5, 10),
               ylim=(len(rules) - 0.5, -0.5), yticks=range(len(rules)),
               yticklabels=list(rules) if ax is axes[0] else [])
        ax.grid(axis="x", alpha=0.4)
    plt.show()


def ladder(kept):
    """Attention kept from the least free rule to the freest. {picture: {rule: share}}"""
    axes = panels(len(kept), width=4)
    for ax, (name, rules) in zip(axes, kept.items()):
        bars = ax.barh(list(rules), [100 * share for share in rules.values()],
                       color=[COLOURS[n] for n in (5, 4, 2, 0, 7)])
        ax.bar_label(bars, fmt="%.1f", padding=3)
        ax.set(title=name, xlabel="attention kept, %", xlim=(0, 60))
        ax.invert_yaxis()
        if ax is not axes[0]:
            ax.set_yticklabels([])
    plt.show()


def ladder_in_words(kept, seen, l):
    """The ladder's steps, and what is kept beside chance: keys that an average token sees."""
    for name, rules in kept.items():
        sec, five, means, _, own = rules.values()
        gains = {"five numbers": five - sec, "k-means": means - five, "own 98 keys": own - means}
        most = max(gains, key=gains.get)
        print(f"{name}: the step that gains most is {most}",
              f"({', '.join(f'{step} {100 * gain:+.1f}' for step, gain in gains.items())} points)")
        for rule, number, share in (("SEC", 98, sec), ("k-means", seen[name], means)):
            chance = number / l
            print(f"    {rule + ':':8} a token sees {number:3.0f} keys on average, {chance:.1%} of "
                  f"all, and keeps {share:.1%}: {share / chance:.1f} times as much")


def trap(labels, changed):
    """Clusters of the same tokens with different keys or in another order. {title: (l)}, (l)"""
    side = math.isqrt(len(changed))
    axes = panels(4)
    for ax, (title, label) in zip(axes, labels.items()):
        image = picture(ax, label.view(side, side) / label.max(), title, cmap=ORDERED + "_r",
                        vmin=0, vmax=1)
    plt.colorbar(image, ax=axes[2], shrink=0.8, ticks=(0, 1), label="0: the first, 1: the last")
    picture(axes[3], changed.view(side, side), "moved by the shuffle (yellow)", cmap=ORDERED)
    plt.show()


def four_stages(photograph, sim, stages):
    """The figure of the README, and its file where it lies beside the lesson."""
    figure, axes = plt.subplots(2, 3, figsize=(9, 5.8))
    few = photograph.quantize(32, dither=0).convert("RGB")  # of few colours: a smaller file
    picture(axes[0, 0], few, "photograph")
    side = math.isqrt(len(sim))
    image = picture(axes[0, 1], sim.view(side, side), "similarity to the mean", cmap=ORDERED,
                    vmin=-1, vmax=1)
    figure.colorbar(image, ax=axes[0, 1], shrink=0.8, ticks=(-1, 0, 1), label="cosine")
    for number, (ax, groups) in enumerate(zip(axes.flat[2:], stages), 1):
        side, c = math.isqrt(groups.numel()), len(groups)
        image = cluster_map(ax, groups, f"stage {number}: {side} x {side} tokens,\n"
                            f"{c} cluster{'s' * (c > 1)}{' (full attention)' * (c == 1)}")
    figure.colorbar(image, ax=axes[:, 2], shrink=0.6, ticks=(0, 1),
                    label="0: the first cluster, 1: the last")
    if os.access("clusters.png", os.W_OK):
        figure.savefig("clusters.png", dpi=100)
    plt.show()


# --------------------------------------------------------------------------------------- lesson 02

def influence_idea():
    """The block of Eq. 1 between two maps of tokens, and the two ways to ask who hears whom."""
    figure, ax = plt.subplots(figsize=(13.6, 4.6))
    ax.set(xlim=(0, 34), ylim=(0, 11.5), aspect="equal")
    ax.axis("off")
    for left, chosen, colour, name in ((0.5, (1, 3), COLOURS[0], "push one token"),
                                       (28.5, (3, 1), COLOURS[4], "watch one token")):
        for i in range(5):
            for j in range(5):
                face = colour if (i, j) == chosen else "#E6E6E6"
                ax.add_patch(plt.Rectangle((left + j, 7.5 - i), 0.9, 0.9, facecolor=face))
        ax.text(left + 2.5, 9, name, ha="center", fontsize=14)
    boxes = (("CPE", "3x3 convolution"), ("SECA + LCE", "attention in clusters\n+ 5x5 convolution"),
             ("FFN", "two linear layers"))
    ax.annotate("", (28.3, 6), (5.7, 6), zorder=0, arrowprops=dict(arrowstyle="->", lw=2))
    for left, (name, what) in zip((7.6, 14.6, 21.6), boxes):
        ax.add_patch(plt.Rectangle((left, 4.4), 4.8, 3.2, facecolor="white", edgecolor="black",
                                   lw=2))
        ax.text(left + 2.4, 6.8, name, ha="center", va="center", fontsize=15, weight="bold")
        ax.text(left + 2.4, 5.5, what, ha="center", va="center", fontsize=12)
        ax.plot([left - 0.7, left - 0.7, left + 5.4, left + 5.4], [6, 8.4, 8.4, 6.4], lw=2,
                color="black")
        ax.text(left + 5.4, 6, "+", ha="center", va="center", fontsize=14, weight="bold",
                bbox=dict(boxstyle="circle,pad=0.12", facecolor="white", lw=1.5))
    for y, (start, end), colour, text in (
            (10.4, (5.7, 28.3), COLOURS[5], "PUSH: change one token, compare the outputs"),
            (1.6, (28.3, 5.7), COLOURS[2], "GRADIENT: ask autograd what this output hears")):
        ax.annotate("", (end, y), (start, y), arrowprops=dict(arrowstyle="->", lw=4, color=colour))
        ax.text(17, y + 0.3, text, ha="center", fontsize=15, color=colour, weight="bold")
    plt.show()


def mark(ax, row, column):
    """A frame around the watched token of a map."""
    for colour, width in (("white", 5), ("black", 2.5)):
        ax.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=colour,
                                   lw=width, zorder=3))


def photo_and_clusters(photo, labels, row, column):
    """The photograph at the tokens' resolution, and the cluster of each token in both heads."""
    axes = panels(3)
    side, number = photo.shape[0] / labels.shape[-1], int(labels.max()) + 1
    picture(axes[0], photo, "photograph", extent=(-0.5, photo.shape[1] / side - 0.5,
                                                  photo.shape[0] / side - 0.5, -0.5))
    for head, ax in enumerate(axes[1:]):
        drawn = picture(ax, labels[head], f"clusters, head {head + 1}", vmin=-0.5,
                        vmax=number - 0.5, cmap=plt.get_cmap(ORDERED, number))
    for ax in axes:
        mark(ax, row, column)
    axes[0].figure.colorbar(drawn, ax=axes, ticks=range(number),
                            label="cluster (0: most similar to the mean key)")
    plt.show()


KINDS = {"no influence": "#E6E6E6", "heard by the gradient": COLOURS[4],
         "not heard by the gradient, but by this push": COLOURS[0]}


def influence(maps, row, column):
    """{title: map of 0, 1, 2} in the colours of KINDS; the watched token has a frame."""
    axes = panels(len(maps))
    shades = plt.matplotlib.colors.ListedColormap([*KINDS.values()])
    for ax, (title, kinds) in zip(axes, maps.items()):
        picture(ax, kinds, title, cmap=shades, vmin=-0.5, vmax=2.5)
        mark(ax, row, column)
    used = 1 + max(int(kinds.max()) for kinds in maps.values())
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in KINDS.values()]
    handles.append(plt.Rectangle((0, 0), 1, 1, fill=False, edgecolor="black", lw=2.5))
    handles, names = handles[:used] + handles[3:], [*KINDS][:used] + ["the watched token"]
    axes[0].figure.legend(handles, names, loc="outside lower center",
                          ncols=len(names) if len(maps) > 2 else 2, frameon=False)
    plt.show()


def how_often_and_how_far(sizes, often, far):
    """Two panels over the size of a push; often and far: (heard or not, network, size), shares."""
    axes = panels(2, width=5.6, height=4.2)
    for ax, values in zip(axes, (often, far)):
        for kind, networks, colour, marker in zip(list(KINDS)[1:], values, (COLOURS[4], COLOURS[0]),
                                                  "so"):
            for number, network in enumerate(networks):
                ax.plot(sizes, 100 * network, marker, color=colour, ms=10, alpha=0.7, mec="black",
                        label="" if number else kind.split(",")[0])
        ax.set(xscale="log", xlabel="size of the push, relative to the token")
        ax.set_xticks(sizes, sizes)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set(title="How often?", ylabel="pairs that change, %", ylim=(-4, 104))
    axes[0].legend(loc="center left")
    axes[1].set(title="How far, where it changes?", yscale="log", ylabel="median change, %")
    axes[1].yaxis.set_major_formatter("{x:g}")
    plt.show()


def staircase(sizes, curve, smooth, inside, steps):
    """The change of a watched token over the size of a push: pieces between `steps`, blue where the
    pushed token is `inside` its clusters; dashed: full attention."""
    ax, = panels(1, width=11, height=4.4)
    for first, last in zip([0, *steps], [*steps, len(sizes)]):
        ax.plot(sizes[first:last], [100 * value for value in curve[first:last]], lw=5,
                color=COLOURS[4] if inside[first] else COLOURS[0])
    for n in steps:
        ax.axvline(sizes[n], color="#777777", lw=1.2, ls=":")
    ax.plot([], lw=5, color=COLOURS[0], label="8 clusters: not heard by the gradient")
    if any(inside):
        ax.plot([], lw=5, color=COLOURS[4], label="8 clusters: the pushed token is a companion now")
    ax.plot(sizes, [100 * value for value in smooth], lw=3, ls="--", color=COLOURS[4],
            label="1 cluster: full attention")
    ax.plot([], color="#777777", lw=1.2, ls=":", label="the clusters of the watched token change")
    ax.set(xlabel="size of the push on one token elsewhere",
           ylabel="change of the watched token, %")
    ax.legend(loc="upper left")
    plt.show()


# --------------------------------------------------------------------------------------- lesson 03


def two_ways_to_ask():
    """The network as a chain: what a correlation compares, and where an intervention cuts."""
    figure, ax = plt.subplots(figsize=(10.6, 5))
    ax.set(xlim=(0, 10.6), ylim=(-0.4, 4.6))
    ax.axis("off")
    arrow = dict(arrowstyle="-|>", mutation_scale=22, linewidth=2.5, color="black")
    chain = tuple(zip((1, 3.15, 5.3, 7.45, 9.6),
                      ("picture", "keys", "clusters", "attention", "answer")))
    for x, name in chain + ((5.3, "true mask\nof the object"),):
        ax.text(x, 3.9 if "mask" in name else 2.3, name, ha="center", va="center", fontsize=16,
                bbox=dict(boxstyle="round,pad=0.45", facecolor="white", linewidth=2))
    for (left, _), (right, _) in zip(chain, chain[1:]):
        ax.annotate("", (right - 0.78, 2.3), (left + 0.72, 2.3), arrowprops=arrow)
    ax.annotate("", (5.3, 2.72), (5.3, 3.32), arrowprops=arrow | dict(
        arrowstyle="<|-|>", linestyle="--", color=COLOURS[4]))
    ax.text(6.6, 3.9, "Correlate: do clusters\nand mask agree?", color=COLOURS[4], fontsize=16,
            va="center")
    ax.plot([6.1, 6.6], [1.75, 2.85], color=COLOURS[5], linewidth=5)
    ax.text(6.0, 1.45, "Intervene: replace the clusters,\nand see what the answer does",
            color=COLOURS[5], fontsize=16, ha="center", va="top")
    ax.annotate("", (9.6, 1.85), (1, 1.85), arrowprops=arrow | dict(
        connectionstyle="arc3,rad=0.4", color="0.45"))
    ax.text(5.3, -0.3, "other ways through the network", color="0.35", fontsize=16, ha="center")
    plt.show()


def world(n, seed):
    """Discs, rings and crosses: pictures (n 3 32 32), masks (n 1 32 32), classes (n), as many each.

    Two hues at least a quarter turn apart; the brightness is noise.
    """
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(n, *shape, generator=g)
    classes, size, tilt = torch.arange(n) % 3, 7 + 4 * rand(1, 1), 6.28 * rand(1, 1)
    grid = torch.arange(32.0)
    y, x = ((t - size - (31 - 2 * size) * rand(1, 1)) / size for t in (grid[:, None], grid))
    u, v = (x * tilt.cos() + y * tilt.sin()).abs(), (y * tilt.cos() - x * tilt.sin()).abs()
    radius, far, near = (u**2 + v**2).sqrt(), torch.maximum(u, v), torch.minimum(u, v)
    shapes = radius < 0.8, (radius < 1) & (radius > 0.55), (near < 0.28) & (far < 1)
    mask = torch.stack(shapes, 1)[torch.arange(n), classes].float()[:, None]
    hue = 6.28 * rand(1, 1, 1) + (1.57 + 3.14 * rand(1, 1, 1)) * mask  # radians
    third = 2 * torch.pi / 3 * torch.arange(3)[:, None, None]
    noise = 0.12 * torch.randn(n, 1, 32, 32, generator=g)
    return 0.5 + noise + 0.25 * (hue + third).cos(), mask, classes


def pictures_and_brightness(pictures, masks, brightness, names):
    """Above the pictures with the border of the object, below the brightness of their tokens."""
    number = len(pictures)
    axes = panels(2 * number, number)
    for i in range(number):
        picture(axes[i], pictures[i].permute(1, 2, 0).clamp(0, 1), names[i])
        axes[i].contour(masks[i, 0], levels=[0.5], colors="black", linewidths=2.5)
        shown = picture(axes[number + i], brightness[i], "its brightness", cmap=ORDERED,
                        vmin=brightness.min(), vmax=brightness.max())
    axes[0].figure.colorbar(shown, ax=axes[number:], label="mean of the token", aspect=12)
    plt.show()


def dots_of_seeds(ax, columns, lines, ylabel, join=False):
    """A marker for each seed. columns: name -> {seed: value}; lines: name -> value."""
    seeds = list(dict.fromkeys(seed for values in columns.values() for seed in values))
    for i, seed in enumerate(seeds):
        rows = [(x, values[seed]) for x, values in enumerate(columns.values()) if seed in values]
        at = [x + 0.13 * (i - (len(seeds) - 1) / 2) for x, _ in rows]
        heights = [value for _, value in rows]
        ax.plot(at, heights, linewidth=2 * join, color="0.75", zorder=1)
        ax.scatter(at, heights, s=90, color=COLOURS[(4, 5, 2, 6, 1)[i % 5]], edgecolor="black",
                   marker="os^Dv"[i % 5], label=f"seed {seed}", zorder=2)
    for (name, value), style in zip(lines.items(), ("--", ":", "-.")):
        ax.axhline(value, color="black", linestyle=style, linewidth=1.5, label=name, zorder=0)
    ax.set(xticks=range(len(columns)), ylabel=ylabel, ylim=(0, 102),
           xlim=(-0.5, len(columns) - 0.5))
    ax.set_xticklabels([name.replace(" ", "\n") for name in columns])


def correlation_figure(accuracies, scores, lines):
    """Beside each other, for each way to train: accuracy, and the score of the clusters."""
    axes = panels(2, 2, height=4.4, width=6)
    dots_of_seeds(axes[0], accuracies, {"always the same answer": 100 / 3}, "held-out accuracy, %")
    dots_of_seeds(axes[1], scores, lines, "separation, %")
    axes[0].legend(loc="upper right", fontsize=11)
    handles, names = axes[1].get_legend_handles_labels()
    axes[1].legend(handles[-len(lines):], names[-len(lines):], loc="center right", fontsize=11,
                   bbox_to_anchor=(1, 0.74))
    axes[0].set_title("What the network can do")
    axes[1].set_title("What the correlation says")
    plt.show()


def cluster_maps(image, mask, maps):
    """A picture, and the clusters of its tokens. maps: title -> (height width) cluster numbers."""
    axes = panels(1 + len(maps))
    picture(axes[0], image.permute(1, 2, 0).clamp(0, 1), "the picture")
    axes[0].contour(mask[0], levels=[0.5], colors="black", linewidths=2.5)
    for ax, (title, numbers) in zip(axes[1:], maps.items()):
        side, count = len(numbers), int(numbers.max()) + 1
        shown = picture(ax, numbers, title, cmap=plt.get_cmap(ORDERED, count), vmin=-0.5,
                        vmax=count - 0.5)
        place = [(x + 0.5) * side / mask.shape[-1] - 0.5 for x in range(mask.shape[-1])]
        ax.contour(place, place, mask[0], levels=[0.5], colors=COLOURS[5], linewidths=3)
    axes[0].figure.colorbar(shown, ax=axes, aspect=12, ticks=range(count),
                            label="cluster (0: nearest to the mean)")
    plt.show()


def surgery_figure(results, seeds):
    """results: training -> operation -> accuracies of the first seeds; a line joins a seed's."""
    axes = panels(len(results), 2, height=4.8, width=6.6)
    titles = "True labels, no CPE, no LCE", "True labels, with CPE and LCE"
    for ax, columns, title in zip(axes, results.values(), titles):
        named = {name: dict(zip(seeds, values)) for name, values in columns.items()}
        dots_of_seeds(ax, named, {"always the same answer": 100 / 3}, "held-out accuracy, %",
                      join=True)
        ax.legend(loc="lower left", fontsize=11, ncols=3)
        ax.set_title(title)
    plt.show()


# --------------------------------------------------------------------------------------- lesson 04


def token_grid(ax, groups, colours, title, token):
    """Tokens coloured by their group (height width); a white dot marks one of them."""
    picture(ax, groups, title, cmap=plt.matplotlib.colors.ListedColormap(colours), vmin=-0.5,
            vmax=len(colours) - 0.5)
    for edge in range(1, groups.shape[0]):
        ax.axhline(edge - 0.5, color="white", lw=0.6)
        ax.axvline(edge - 0.5, color="white", lw=0.6)
    ax.plot(*reversed(token), "o", color="white", mec="black", ms=11)


def the_exchange(windows, clusters, token):
    """A Swin block with the place that is exchanged, and both ways to form groups of tokens."""
    block, place, kind = panels(3, height=4.2, width=4.2)
    block.set(xlim=(0, 10), ylim=(-0.1, 10.6), title="A block of Swin")
    block.axis("off")
    middle = dict(ha="center", va="center")
    for bottom, height, text, colour in (
            (8.9, 1, "LayerNorm", "#DDDDDD"), (2.9, 1, "LayerNorm", "#DDDDDD"),
            (0.9, 1, "FFN", "#DDDDDD"), (5.0, 2.9, "", COLOURS[3])):
        block.add_patch(plt.Rectangle((0.4, bottom), 8.8, height, fc=colour, ec="black"))
        block.text(4.8, bottom + height / 2, text, **middle)
    block.text(4.8, 7.3, "attention", weight="bold", **middle)
    block.text(4.8, 6.0, "out: windows, shift, bias table\nin: SECA, with the same weights",
               **middle)
    arrow = dict(arrowstyle="->", lw=1.5)
    for start, end in ((10.5, 9.95), (8.9, 7.95), (5.0, 3.95), (2.9, 1.95), (0.9, 0)):
        block.annotate("", (4.8, end), (4.8, start), arrowprops=arrow)
    for start, end in ((10.2, 4.5), (4.25, 0.45)):  # what is added to the result
        block.plot((4.8, 9.8, 9.8), (start, start, end), color="black", lw=1.5)
        block.annotate("", (5.15, end), (9.85, end), arrowprops=arrow)
        block.text(4.8, end, "+", bbox=dict(boxstyle="circle,pad=0.1", fc="white"), **middle)
    token_grid(place, windows, COLOURS[:3] + COLOURS[4:5], "Swin: a window, by place", token)
    token_grid(kind, clusters, COLOURS[:3] + COLOURS[4:5], "SECA: a cluster, by similarity", token)


def dots_of_layers(numbers, title):
    """For each layer a row of dots, one for each seed. numbers: {layer: [number, ...]}"""
    (ax,) = panels(1, width=9)
    for row, (name, values) in enumerate(numbers.items()):
        ax.plot(values, [row] * len(values), "o", color=COLOURS[4], ms=10, alpha=0.6)
    ax.axvline(0, color="grey", lw=1)
    ax.set(yticks=range(len(numbers)), ylim=(len(numbers) - 0.5, -0.5), title=title,
           xlabel="number of the probe (each dot: other weights, another input)")
    ax.set_yticklabels(numbers)


def jigsaws(pictures, titles, changes):
    """Pictures; above each, the change of each network's outputs. changes: {network: [share]}"""
    axes = panels(len(pictures), height=4.3, width=3.6)
    for number, (ax, values, title) in enumerate(zip(axes, pictures, titles)):
        lines = [f"{name}: {100 * shares[number]:.0f} %" if shares[number] > 1e-6 else
                 f"{name}: nothing" for name, shares in changes.items()]
        picture(ax, values, "\n".join([title, *lines] if number else [title]))


def who_notices(maps):
    """How much the output of each token changes, on one scale. maps: {title: (height width)}"""
    axes = panels(len(maps), height=3.9, width=4)
    for ax, (title, values) in zip(axes, maps.items()):
        shown = picture(ax, values, title, cmap=ORDERED, vmin=0, vmax=1)
    axes[0].figure.colorbar(shown, ax=axes, shrink=0.85, extend="max",
                            label="change / median length of outputs")


def cost_of_size(sides, costs):
    """Multiply-adds of the products against the side of the picture. costs: {name: [G, ...]}"""
    (ax,) = panels(1, width=8, height=4)
    for (name, values), marker, colour in zip(costs.items(), "so^", COLOURS[4:6] + COLOURS[2:3]):
        ax.plot(sides, values, marker + "-", color=colour, ms=9, label=name)
    ax.set(xscale="log", yscale="log", xlabel="side of the picture in pixels", xticks=sides,
           xticklabels=sides, ylabel="multiply-adds in G", title="The two products of attention")
    ax.minorticks_off()
    ax.legend()


def who_changes(maps, token, sizes, shares):
    """Left: which tokens change when one is disturbed. Right: the share of outsiders that change.

    maps: {title: (height width), 0 unchanged, 1 outsider, 2 in a group with the token};
    shares: {layer: a list for each seed, with a number in per cent for each size}.
    """
    *places, ax = panels(len(maps) + 1, height=4.3, width=3.9)
    for place, (title, values) in zip(places, maps.items()):
        colours = plt.matplotlib.colors.ListedColormap(["#DDDDDD", COLOURS[0], COLOURS[4]])
        picture(place, values, title, cmap=colours, vmin=0, vmax=2)
        place.plot(*reversed(token), "o", color="white", mec="black", ms=8)
    for (name, seeds), marker, colour in zip(shares.items(), "so", (COLOURS[4], COLOURS[5])):
        for values in seeds:
            ax.plot(range(len(sizes)), values, marker, color=colour, ms=9, alpha=0.6)
        ax.text(len(sizes) - 1.2, 4 + np.mean([values[-2:] for values in seeds]), name,
                ha="right", color=colour)
    ax.set(xticks=range(len(sizes)), ylim=(-5, 105), xlabel="the disturbance",
           title="Outsiders that change, in %")
    ax.set_xticklabels(sizes)
    names = ("unchanged", "changes, shares no group", "changes, shares a group")
    handles = [plt.Rectangle((0, 0), 1, 1, fc=colour) for colour in colours.colors]
    ax.figure.legend(handles, names, loc="outside lower left", ncols=3)


# --------------------------------------------------------------------------------------- lesson 05


def three_failures():
    """The idea: picture, four maps, pyramid, anchors; and where the three failures arise."""
    ax, = panels(1, width=12.5, height=5.4)
    ax.set(xlim=(-0.2, 13), ylim=(-0.3, 5.3), aspect="equal")
    ax.axis("off")
    ax.add_patch(plt.Rectangle((0, 1.1), 2.4, 2.4, fc="#EEEEEE", ec="black"))
    for x, y, radius in ((0.8, 1.9, 0.55), (1.65, 3, 0.12), (2.26, 2.5, 0.12), (1.9, 1.5, 0.2)):
        ax.add_patch(plt.Circle((x, y), radius, color=COLOURS[4]))
    ax.text(1.2, 3.65, "a large picture", ha="center")
    for i, cells in enumerate((16, 8, 4, 2)):
        y, side = 0.05 + i * 1.1, 0.9
        for x, tone in ((5.1, COLOURS[1]), (8.2, COLOURS[0])):
            for line in range(cells + 1):
                step = side * line / cells
                ax.plot([x + step] * 2, [y, y + side], color=tone, lw=0.8)
                ax.plot([x, x + side], [y + step] * 2, color=tone, lw=0.8)
        ax.text(5, y + 0.45, f"stage {i + 1}\nstride {4 << i}", ha="right", va="center")
        ax.text(9.2, y + 0.45, f"P{i + 2}", va="center", fontsize=11)
        ax.annotate("", (8.1, y + 0.45), (6.1, y + 0.45), arrowprops=dict(arrowstyle="->"))
        if i < 3:
            ax.annotate("", (8.65, y + 0.88), (8.65, y + 1.13),
                        arrowprops=dict(arrowstyle="->", lw=2))
    ax.annotate("", (3.9, 2.3), (2.5, 2.3), arrowprops=dict(arrowstyle="->", lw=2))
    ax.annotate("", (10.3, 2.3), (9.7, 2.3), arrowprops=dict(arrowstyle="->"))
    ax.add_patch(plt.Rectangle((10.4, 1.1), 2.4, 2.4, fill=False, ec="black"))
    for x, y, side in ((10.8, 1.5, 0.9), (11.8, 2.8, 0.35), (12.2, 2.1, 0.35)):
        ax.add_patch(plt.Rectangle((x, y), side, side, fill=False, ec=COLOURS[4], lw=2))
        ax.plot(x + side / 2, y + side / 2, ".", color=COLOURS[4])
    ax.text(11.6, 3.65, "anchors around cells", ha="center")
    for number, (x, y, words, left, top) in enumerate((
            (5.3, 4.6, "only one map", 5.65, 4.6),
            (10.4, 0.6, "cells and anchors\napart", 10.75, 0.6),
            (3.15, 2.7, "too few\nclusters for\nmany tokens", 2.55, 1.7)), 1):
        ax.text(x, y, f"{number}", color="white", weight="bold", ha="center", va="center",
                bbox=dict(boxstyle="circle", fc=COLOURS[5], ec="none"))
        ax.text(left, top, words, color=COLOURS[5], va="center")


def large_picture(height=800, width=1333, objects=110, least=12, most=260, seed=5):
    """A picture (3 height width) of bright ellipses that do not touch, and their boxes (k 4)."""
    rng, boxes = np.random.default_rng(seed), np.zeros((0, 4))
    image = np.full((3, height, width), 0.2)
    sides = np.exp(rng.uniform(np.log(least), np.log(most), objects))
    sides = sides.clip(max=min(height, width) / np.exp(0.1))  # none is larger than the picture
    for side in sorted(sides, reverse=True):  # the largest first, so that most find a place
        w, h = np.round(side * np.exp(np.array([1, -1]) * rng.uniform(-0.1, 0.1)))
        for _ in range(100):
            x, y = rng.integers(0, max(width - w, 1)), rng.integers(0, max(height - h, 1))
            apart = ((x > boxes[:, 2] + 3) | (boxes[:, 0] > x + w + 3)
                     | (y > boxes[:, 3] + 3) | (boxes[:, 1] > y + h + 3))
            if apart.all():
                boxes = np.vstack([boxes, (x, y, x + w, y + h)])
                u, v = (np.arange(n) * 2 / n + 1 / n - 1 for n in (w, h))
                inside = u ** 2 + v[:, None] ** 2 < 1
                image[:, y:y + int(h), x:x + int(w)] += inside * rng.uniform(0.3, 0.8, (3, 1, 1))
                break
    return torch.from_numpy(image).float(), torch.from_numpy(boxes).float()


def small_pictures(number):
    """Pictures of 97 x 131 pixels (number 3 97 131), and the boxes in each of them."""
    images, boxes = zip(*(large_picture(97, 131, 8, 12, 60, seed) for seed in range(number)))
    return torch.stack(images), boxes


def objects(image, boxes, reached, title, last=None, cell=None):
    """Boxes over a picture: blue if they have an anchor, else red.

    `last`: the column of the last anchors. `cell`: the columns where a cell of the ninth row looks
    and where its anchors stand.
    """
    ax, = panels(1, width=10, height=6)
    ax.imshow((image.mean(0) * 15).round(), cmap="gray", vmin=0, vmax=22, interpolation="nearest")
    for (x, y, x2, y2), found in zip(boxes.tolist(), reached):
        ax.add_patch(plt.Rectangle((x - 2, y - 2), x2 - x + 4, y2 - y + 4, fill=False, lw=2.2,
                                   ec=COLOURS[1 if found else 5], ls="-" if found else "--"))
    lines = [plt.Line2D([], [], color=COLOURS[1], lw=3),
             plt.Line2D([], [], color=COLOURS[5], lw=3, ls="--")]
    names = ["has an anchor (IoU 0.5 or more)", "lost"]
    if last is not None:
        lines.append(ax.axvline(last, color=COLOURS[3], lw=3, ls=":"))
        names.append("last anchors of the finest map")
    if cell is not None:
        ax.annotate("", (cell[1], 32), (cell[0], 32), arrowprops=dict(
            arrowstyle="-|>", color=COLOURS[6], lw=4, mutation_scale=22, shrinkA=0, shrinkB=0))
        lines.append(plt.Line2D([], [], color=COLOURS[6], lw=4))
        names.append("from where a cell looks to its anchors")
    ax.set(title=title, xlabel="column (pixels)", ylabel="row (pixels)")
    ax.figure.legend(lines, names, loc="outside lower center", ncols=2 if cell else 3)


def cost_curves(sides, fixed, grown, swin, marks):
    """Multiply-adds (all, attention's) of SecViT-T with both kinds of clusters, and of swin_t."""
    ax, = panels(1, width=11, height=5.6)
    pixels = [side ** 2 / 1e6 for side in sides]
    for colour, name, (total, products) in (
            (COLOURS[5], "SecViT-T, fixed clusters", fixed),
            (COLOURS[4], "SecViT-T, cluster_size=98", grown)):
        ax.plot(pixels, total, "o-", color=colour, label=name, lw=2.5, ms=4)
        ax.plot(pixels, products, ":", color=colour, label="its attention alone", lw=2.5)
    ax.plot(pixels, swin, "o-", color="black", label="swin_t", lw=2.5, ms=4)
    for style, (name, x) in zip(("--", "-."), marks.items()):
        ax.axvline(x ** 2 / 1e6, color="gray", ls=style, label=f"{name}:\nfrom {x} px on")
    ax.set(xlabel="millions of pixels (above: the side)", ylabel="multiply-adds (G)",
           xlim=(0, None), ylim=(0, None))
    top = ax.secondary_xaxis("top")
    top.set_xticks(pixels[2:], sides[2:])
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))


def recalls(share):
    """The share of a group of objects that is found. {group: {kind: (seeds, 3)}}

    Untrained, trained, and the share that has an anchor. A dot is a seed.
    """
    axes = panels(len(share), width=4.6, height=4.6)
    for ax, (name, kinds) in zip(axes, share.items()):
        for x, (kind, values) in enumerate(kinds.items()):
            for shift, column, face in ((-0.25, 0, "none"), (0.15, 1, COLOURS[(2, 5, 4)[x]])):
                ax.plot([x + shift - 0.1, x + shift, x + shift + 0.1], 100 * values[:, column], "o",
                        ms=9, mec=COLOURS[(2, 5, 4)[x]], mfc=face, mew=2, clip_on=False)
            ax.plot([x - 0.42, x + 0.42], [100 * values[0, 2]] * 2, "--", color="black", lw=2)
        ax.set(title=name.replace(" (", "\n("), xlim=(-0.5, len(kinds) - 0.5), ylim=(-4, 104))
        ax.set_xticks(range(len(kinds)), [kind.replace(" ", "\n", 1) for kind in kinds])
        ax.grid(axis="y", alpha=0.4)
    axes[0].set_ylabel("objects found (%)")
    marks = [plt.Line2D([], [], color="black", marker="o", ls="", ms=9, mfc=face, mew=2)
             for face in ("none", "black")] + [plt.Line2D([], [], color="black", ls="--", lw=2)]
    axes[0].figure.legend(marks, ["not trained", "trained", "have an anchor"], ncols=3,
                          loc="outside lower center")

# --------------------------------------------------------------------------------------- lesson 06


def machine_picture():
    """What passes between a program and a device, from left to right, and what disturbs it."""
    figure, ax = plt.subplots(figsize=(12, 5.2))
    plain, sec, others = COLOURS[1], COLOURS[5], "#BBBBBB"
    pieces = [(3, 15, plain, "A"), (21, 9, sec, "B"), (33, 6, plain, "A"), (42, 7, sec, "B"),
              (51, 11, others, "other\npeople"), (62, 6, plain, "A"), (71, 7, sec, "B"),
              (81, 8, plain, "A"), (92, 10, sec, "B")]
    for start, length, colour, name in pieces:
        ax.barh(0, length, 0.8, start, color=colour, edgecolor="black")
        ax.text(start + length / 2, 0, name, ha="center", va="center")
        if colour != others:
            ax.barh(0, 1, 0.8, start + length, color="black")
            asked = 51 if start == 62 else start
            for number in range(3):  # three passes, asked for at once
                ask, begin = asked + 0.5 * number, start + length * number / 3
                ax.plot(ask, 1.6, "|", color="black", markersize=16, markeredgewidth=2)
                ax.plot([begin] * 2, [-0.4, 0.4], color="black", linewidth=0.7)
                ax.annotate("", (begin + 0.2, 0.42), (ask, 1.4),
                            arrowprops=dict(arrowstyle="->", color="black"))
    notes = [(10, 0.4, "cold: early passes\ntake longer"), (31, 0.4, "slow to answer: each wait\n"
             "costs a little (black)"), (56, 0.4, "shared: somebody's\nwork comes first"),
             (96, 0.4, "drifting: hot, it\ngets slower")]
    for x, y, text in notes:
        ax.annotate(text, (x, -y), (x - 1, -1.5), ha="center", va="center",
                    arrowprops=dict(arrowstyle="-", color="#777777"))
    ax.annotate("asynchronous: the program asks and goes on; the device works later", (10, 1.1),
                (30, 2.5), ha="center", arrowprops=dict(arrowstyle="-", color="#777777"))
    ax.set(xlim=(-1, 105), ylim=(-2.1, 2.9), xlabel="time", xticks=[], yticks=[0, 1.6],
           yticklabels=["device works", "program asks"])
    ax.set_title("Two jobs, A and B, on a device")
    ax.spines[["top", "left", "right"]].set_visible(False)
    ax.tick_params(length=0)


def claims_table(claims, reports, columns, true):
    """Claimed ratios (reports columns) as a table; white is right, colours are wrong."""
    figure, ax = plt.subplots(figsize=(11, 4.6))
    limit = 1.0
    error = [[min(max(math.log2(value / true), -limit), limit) for value in row] for row in claims]
    image = ax.imshow(error, cmap=SIGNED, vmin=-limit, vmax=limit, aspect="auto")
    for i, row in enumerate(claims):
        for j, value in enumerate(row):
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=15,
                    color="white" if abs(error[i][j]) > 0.7 else "black")
    ax.axvline(0.5, color="black", linewidth=3)
    ax.set_xticks(range(len(columns)), [name.replace(" ", "\n", 1) for name in columns])
    ax.set_yticks(range(len(reports)), reports, fontsize=14)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.set_title(f"What each report claims; the true ratio is {true}", pad=14)
    bar = figure.colorbar(image, ticks=[-limit, 0, limit])
    bar.ax.set_yticklabels(["half or less", "right", "twice or more"])
    bar.set_label("claim / truth")


def ratios_by_tokens(found):
    """found[place, question, tokens] lists measurements: lower quartile, median, upper quartile.
    The last two are joined by lines; one before them is a try."""
    places, questions, tokens = (list(dict.fromkeys(key[i] for key in found)) for i in range(3))
    tokens.sort()
    axes = panels(len(places), width=5.6, height=4.8)
    for ax, place in zip(axes, places):
        ax.axhline(1, color="black", linewidth=2)
        for question, colour, marker in zip(questions, (COLOURS[4], COLOURS[5]), "os"):
            for again, line, fill in ((0, "-", "full"), (1, ":", "none")):
                ends = [found[place, question, n][again - 2] for n in tokens]
                bars = [[m - low for low, m, _ in ends], [high - m for _, m, high in ends]]
                ax.errorbar([n * 1.1 ** again for n in tokens], [m for _, m, _ in ends], bars,
                            color=colour, marker=marker, linestyle=line, fillstyle=fill, capsize=4,
                            label=None if again else question)
            for low, m, high, n in ((*runs[0], n) for (*what, n), runs in found.items()
                                    if what == [place, question] and len(runs) > 2):
                ax.errorbar(n / 1.15, m, [[m - low], [high - m]], color=colour, marker="x",
                            markersize=9, markeredgewidth=2, capsize=4)
        ax.set(xscale="log", yscale="log", title=place, xlabel="tokens")
        ax.minorticks_off()
        ax.set_xticks(tokens, [f"{n:,}" for n in tokens], rotation=30)
        ax.grid(alpha=0.3)
    low, high = min(ax.get_ylim()[0] for ax in axes), max(ax.get_ylim()[1] for ax in axes)
    ticks = [2.0 ** power for power in range(-8, 9) if low < 2.0 ** power < high]
    for ax in axes:
        ax.set(ylim=(low, high), ylabel="ratio of times")
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    for marker, fill, label in (("x", "full", "try"), ("o", "full", "first measurement"),
                                ("o", "none", "second measurement")):
        axes[-1].plot([], [], marker, color="black", fillstyle=fill, label=label)
    axes[-1].legend(loc="upper left", fontsize=11)


# --------------------------------------------------------------------------------------- lesson 07


def twin_idea():
    """Who hears the tile that asks: its window, its neighbourhood, or the group of its colour."""
    axes = panels(3, height=4.2, width=4.4)
    for ax, title in zip(axes, ("Windows: near tiles hear each other",
                                "LCE: a tile sees 5 x 5 tiles around it",
                                "SEC: similar tiles hear each other")):
        ax.set(title=title, xlim=(-0.2, 16.2), ylim=(16.2, -0.2), aspect="equal")
        ax.axis("off")
    for ax in axes[:2]:
        ax.add_patch(plt.Rectangle((0, 0), 16, 16, facecolor="0.85"))
        for (column, row), mark in zip([(2, 2), (13, 11)], "?!"):
            ax.add_patch(plt.Rectangle((column, row), 1, 1, facecolor=COLOURS[5]))
            ax.text(column + 0.5, row - 0.7 + 2.2 * (mark == "?"), mark, ha="center",
                    va="center", weight="bold", fontsize=17)
    for row in range(0, 17, 4):
        axes[0].plot([0, 16], [row, row], color=COLOURS[4], lw=2)
    for column in (0, 8, 16):
        axes[0].plot([column, column], [0, 16], color=COLOURS[4], lw=2)
    axes[0].text(8, 14, "the twin is not in the window", ha="center", va="center",
                 bbox=dict(fc="0.85", ec="none"))
    axes[1].add_patch(plt.Rectangle((0, 0), 5, 5, fill=False, edgecolor=COLOURS[4], lw=3))
    axes[1].annotate("", (4, 2.5), (3, 2.5), arrowprops=dict(arrowstyle="->", lw=2))
    axes[1].text(5.4, 2.5, "the tile to the right is known", va="center")
    axes[1].text(8, 14, "the twin is too far away", ha="center", va="center")
    for row in range(8):
        for column in range(16):
            twin = (column, row) in [(6, 2), (7, 2)]
            axes[2].add_patch(plt.Rectangle(
                (column, 2 * row + 0.2), 0.9, 1.2, facecolor=COLOURS[5] if twin else
                str(0.5 + 0.03 * ((7 * column + 5 * row) % 13))))
        axes[2].add_patch(plt.Rectangle((-0.1, 2 * row), 16.1, 1.6, fill=False, lw=2,
                                        edgecolor=COLOURS[4]))
    for column, mark in ((6.45, "?"), (7.45, "!")):
        axes[2].text(column, 4.8, mark, ha="center", va="center", weight="bold", fontsize=15)


def paint_tiles(colour, dot):
    """Pictures (b 3 48 48) of 16x16 tiles in colours (b 256 3); dot (b 256): its corner, or 0."""
    tiles = colour[..., None, None].repeat(1, 1, 1, 3, 3)
    for corner, place in enumerate(((0, 0), (0, 2), (2, 0), (2, 2)), start=1):
        tiles[(..., *place)] *= (dot != corner)[..., None]
    return tiles.view(-1, 16, 16, 3, 3, 3).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, 48, 48)


def twin_task(image, ask, twin, right):
    """The picture, with some tiles that ask, their twins, the tiles to the right, the answers."""
    ax, = panels(1, height=5.6, width=5.6)
    arrows = "\u2196\u2197\u2199\u2198"  # upper left, upper right, lower left, lower right
    answers = "   ".join(f"{name}: {arrows[first]} {arrows[second]}"
                         for name, (first, second) in zip("ABC", right.tolist()))
    picture(ax, image, "A? asks, A! is its twin, A> is to its right\nAnswers, twin and right:   "
            + answers, extent=(0, 16, 16, 0))
    for places, mark in ((ask, "?"), (twin, "!"), (ask + 1, ">")):
        for name, place in zip("ABC", places.tolist()):
            ax.text(place % 16 + 0.5, place // 16 + 0.5, name + mark, ha="center", va="center",
                    weight="bold", fontsize=9, bbox=dict(boxstyle="round,pad=0.1", fc="white"))


def contestants(result, ceilings, titles, guesses):
    """Accuracy of each contestant (seeds questions), a dot and a bar of `ceilings` a seed."""
    axes = panels(len(titles), height=5.2, width=4.5)
    for i, (ax, title, guess) in enumerate(zip(axes, titles, guesses)):
        for row, (name, accuracy) in enumerate(result.items()):
            place = [row - 0.2, row, row + 0.2]
            ax.plot(100 * accuracy[:, i], place, "o", color=COLOURS[4 if "SEC" in name else 5],
                    markersize=8, alpha=0.8)
            if i == 0 and name in ceilings:
                ax.vlines([100 * c for c in ceilings[name]], [y - 0.14 for y in place],
                          [y + 0.14 for y in place], color="black", lw=3)
        ax.axvline(100 * guess, color="black", linestyle="--", linewidth=1)
        if guess < 0.2:
            ax.axvline(25, color="black", linestyle=":", linewidth=1)
        ax.set(title=title, xlim=(0, 103), xlabel="accuracy (%)", ylim=(len(result) - 0.5, -0.5),
               yticks=range(len(result)), yticklabels=[] if i else list(result))
        ax.grid(axis="y", color="0.9")


def shared_heads(tables, guess):
    """Accuracy (seeds heads), NaN where too few pairs, against the heads in which twins meet."""
    for ax, (name, accuracy) in zip(panels(len(tables), height=3.8, width=4.4), tables.items()):
        for seed, values in enumerate(accuracy):
            ax.plot(range(len(values)), 100 * values, "o-", markersize=9, alpha=0.8,
                    color=COLOURS[(4, 5, 2)[seed]], label=f"seed {seed}")
        ax.axhline(100 * guess, color="black", linestyle="--", linewidth=1, label="guessing")
        ax.set(title=name if "SEC" in name else f"{name}, random groups", ylim=(0, 103),
               xlabel="heads in which the twins meet", ylabel="accuracy, twin (%)",
               xticks=range(accuracy.shape[1]))
    ax.legend(loc="lower right")


def sequence_strip(ax, colours, state, title):
    """The sorted tiles, a row for each cluster; 2: its twin is there, too; 1: the twin is not."""
    clusters = 8
    width = len(colours) // clusters
    picture(ax, colours.reshape(clusters, width, 3), title, aspect="auto")
    for cut in range(1, clusters):
        ax.axhline(cut - 0.5, color="white", linewidth=3)
    for value, mark in ((1, "X"), (2, "o")):
        row, column = (state.reshape(clusters, width) == value).nonzero(as_tuple=True)
        ax.plot(column, row, mark, color="white", markersize=6, markeredgecolor="black",
                linestyle="none")


def rgb(numbers):
    """The palette's colour of each number."""
    return [plt.matplotlib.colors.to_rgb(COLOURS[number]) for number in numbers]


# ------------------------------------------------------------------------------------ reference 08


def model_family():
    """What is built out of what, and the tables of the paper where it is found."""
    boxes = {  # column, row, text, colour
        "seca": (0, 1.5, "SECA\nattention in\nequal clusters", 4),
        "cswin": (0, 4.5, "CSWin's attention\n(Table 6)", 6),
        "swin": (1, 0, "SEC-Swin\n(Table 2)", 2), "faster": (1, 1.5, "SEC-FasterViT\n(Table 2)", 2),
        "secvit": (1, 3, "SecViT T, S, B, L\n(Tables 1, 6, 7)", 4),
        "fpn": (2, 3, "feature pyramid,\n256 channels", 1),
        "uper": (2, 4.5, "UperNet\n(Table 5)", 5),
        "head": (2, 1.5, "classifier\n(Tables 1, 6, 7)", 5),
        "mask": (3, 1.5, "Mask R-CNN, Cascade\n(Tables 3, 4)", 5),
        "retina": (3, 3, "RetinaNet\n(Table 4)", 5),
        "semantic": (3, 4.5, "Semantic FPN\n(Table 5)", 5)}
    arrows = ("seca swin", "seca faster", "seca secvit", "cswin secvit", "secvit head",
              "secvit fpn", "secvit uper", "fpn mask", "fpn retina", "fpn semantic")
    ax, = panels(1, width=12, height=4.6)
    ax.axis("off")
    ax.set(xlim=(-0.45, 3.45), ylim=(5.2, -0.7))
    for start, end in (arrow.split() for arrow in arrows):
        (x, y), (to_x, to_y) = boxes[start][:2], boxes[end][:2]
        ax.annotate("", (to_x - 0.36, to_y), (x + 0.36, y),
                    arrowprops=dict(arrowstyle="-|>", color="#666666", lw=2))
    for x, y, text, colour in boxes.values():
        ax.add_patch(plt.Rectangle((x - 0.36, y - 0.55), 0.72, 1.1, facecolor="white",
                                   edgecolor=COLOURS[colour], lw=3))
        ax.text(x, y, text, ha="center", va="center")


def counts_table(title, rows):
    """Counts beside the paper's. rows {name: (M, G reported or nan, differences in %, counts)}."""
    print(f"\n{title:26}{'counted':>11}{'paper':>7}{'differ':>8} |" + "".join(
        f"{name:>7}{'differ':>9}" for name in ("all", "plain", "norms")) + f" |{'paper':>7}")
    for name, (millions, giga, off, (parameters, *macs)) in rows.items():
        percent = ["" if n != n else f"{n:+.1f} %" for n in off]
        paper = ["" if n != n else f"{n} {unit}" for n, unit in ((millions, "M"), (giga, "G"))]
        line = f"{name:26}{parameters:>11}{paper[0]:>7}{percent[0]:>8} |" + "".join(
            f"{n if float(n) < 20 else f'{float(n):.1f}':>7}{p:>9}"
            for n, p in zip(macs, percent[1:]))
        print((line + f" |{paper[1]:>7}" if macs else line).rstrip(" |"))


def count_differences(found):
    """Counted beside reported in per cent, for the rows of `counts_table` that the paper reports.

    The differences are of the parameters, of all multiply-adds, and of those without attention's
    products. A grey bar is as wide as the rounding of the reported number.
    """
    found = {name: row for name, row in found.items() if row[0] == row[0] or row[1] == row[1]}
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.25 * len(found) + 1.2), sharey=True)
    for y, (millions, giga, off, _) in enumerate(found.values()):
        step = 10 if giga < 20 else 100
        for ax, width in zip(axes, (100 / millions, step / giga)):
            ax.barh(y, width, left=-width / 2, height=1, color="#CCCCCC")
        axes[0].plot(off[0], y, "o", color=COLOURS[4])
        if len(off) > 1:
            axes[1].plot(off[1], y, "D", color=COLOURS[5], ms=5)
            axes[1].plot(off[2], y, "o", color=COLOURS[4])
    axes[0].set(title="parameters", xlim=(-15, 15), ylim=(len(found) - 0.4, -0.6))
    axes[0].set_yticks(range(len(found)), list(found), fontsize=11)
    axes[1].set_title("multiply-adds")
    axes[1].set_xscale("symlog", linthresh=15)
    axes[1].set_xlim(-16, 150)
    axes[1].set_xticks([-10, -5, 0, 5, 10, 100], ["-10", "-5", "0", "5", "10", "100"])
    for ax in axes:
        ax.set_xlabel("counted minus reported, in %")
        ax.grid(color="#DDDDDD")
        ax.set_axisbelow(True)
    axes[1].legend(loc="center right", handles=[
        plt.Line2D([], [], ls="", marker="o", color=COLOURS[4], label="without $QK^T$ and $AV$"),
        plt.Line2D([], [], ls="", marker="D", color=COLOURS[5], label="all"),
        plt.Rectangle((0, 0), 1, 1, color="#CCCCCC", label="the paper's rounding")])


# ----------------------------------------------------------------------------- copies for students

SOLUTION = re.compile(r"^( *)# BEGIN SOLUTION\n.*?^ *# END SOLUTION$", re.DOTALL | re.MULTILINE)
TEACHERS = re.compile(r"<details><summary>For teachers.*?</details>\n*", re.DOTALL)


def unsolved(source):
    """The code of a cell, with `...` in place of what stands between the marks of a solution."""
    return SOLUTION.sub(r"\1...  # your lines", source)


def write_student_copies(folder):
    """Copies of all lessons without outputs, solutions and notes for teachers."""
    here, folder = Path(__file__).parent, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(here / "draw.py", folder)
    shutil.copy(here.parent / "secvit.py", folder)
    for path in sorted(here.glob("*.ipynb")):
        lesson = nbformat.read(path, as_version=4)
        lesson.metadata.pop("widgets", None)  # the output of a slider
        for cell in lesson.cells:
            cell.metadata = nbformat.NotebookNode()  # answers that the suite tries lie here
            cell.source = TEACHERS.sub("", cell.source)
            if cell.cell_type == "code":
                cell.update(source=unsolved(cell.source), outputs=[], execution_count=None)
        nbformat.write(lesson, folder / path.name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", metavar="FOLDER", required=True)
    write_student_copies(parser.parse_args().student)
