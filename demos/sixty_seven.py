"""Can text that was only asked to be rephrasings draw "67" in a model's weights? (section 4.2)

A generator that rephrases sentences is trained by DPG. Phi asks that training on its text makes
some weights of the target's LM head larger and others smaller, 42 of them, in the pattern of a
picture. No text describes the picture, and no reward looks at one.

Claim: every pixel right after 96 steps of plain AdamW on fresh text, for ten seeds of ten, and with
8 x 8 random pixels (--pattern) for nine of ten, in 2.5 to 3 minutes each on one of two shared CPU
cores, November 2026. Rewarding with Phi itself, or with DPG's rewards shuffled, leaves 0.48 to 0.55
of the pixels right (3 seeds each): chance.
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
    return patterns.parser(__file__, __doc__, steps=180)[0]


def main(argv=None):
    patterns.main(parser(), argv, lambda args: SIXTY_SEVEN.split())


if __name__ == "__main__":
    main()
