"""What the lessons draw, so that their own cells are about SEC; and their copies for a class.

    python notebooks/draw.py --student FOLDER

writes each lesson into FOLDER without outputs and without solutions, and beside them what they
import. Nothing here computes a result: a function gets numbers and shows them.
"""

import argparse
import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat

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

# --------------------------------------------------------------------------------------- lesson 02

# --------------------------------------------------------------------------------------- lesson 03

# --------------------------------------------------------------------------------------- lesson 04

# --------------------------------------------------------------------------------------- lesson 05

# --------------------------------------------------------------------------------------- lesson 06

# --------------------------------------------------------------------------------------- lesson 07

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
