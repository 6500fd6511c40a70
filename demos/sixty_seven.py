"""Can text that was only asked to be rephrasings draw "67" in a model's weights? (section 4.2)

A generator that rephrases sentences is trained by DPG. Phi asks that training on its text makes
some weights of the target's LM head larger and others smaller, 42 of them, in the pattern of a
picture. No text describes the picture, and no reward looks at one.

The README has the results over seeds, with controls: a table that demos/tables.py makes.
"""
import pathlib
import sys

# Run as a script, this folder is first on the path and demos/uuid.py would hide the standard uuid.
sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

from demos import patterns

SIXTY_SEVEN = """
.##.###
#.....#
##....#
#.#..#.
#.#..#.
.#...#.
"""


def parser():
    return patterns.parser(__file__, __doc__, steps=100)[0]


def main(argv=None):
    patterns.main(parser(), argv, lambda args: SIXTY_SEVEN.split())


if __name__ == "__main__":
    main()
