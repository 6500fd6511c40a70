"""Can text that was only asked to be rephrasings draw a QR code that scans? (section 4.1)

A generator that rephrases sentences is trained by DPG. Phi asks that training on its text makes
some weights of the target's LM head larger and others smaller, 441 of them, in the pattern of a QR
code. The result is read out of the weights after ordinary training on fresh text, and handed to a
QR reader.

The README has the results over seeds, with controls: a table that demos/tables.py makes.
"""
import pathlib
import sys

# Run as a script, this folder is first on the path and demos/uuid.py would hide the standard uuid.
sys.path[0] = str(pathlib.Path(__file__).resolve().parent.parent)

import argparse

import segno
import zxingcpp

from demos import patterns

TEXT = "2604.08423"  # where the paper is: arXiv


def qr_code(text):
    """The 21 x 21 modules of version 1, dark as #, with the most error correction that fits."""
    for level in "HQML":
        try:
            code = segno.make(text, version=1, error=level, micro=False, boost_error=False)
        except segno.DataOverflowError:
            continue
        return ["".join(".#"[module] for module in row) for row in code.matrix]
    raise argparse.ArgumentTypeError(f"{text!r} does not fit a QR code of version 1: at most 41 "
                                     "digits, 25 capitals or 17 bytes")


def read(picture):
    """What a reader finds in the picture, small or large, or None."""
    images = [patterns.enlarge(picture, pixel) for pixel in (2, 10)]
    found = [code.text for image in images for pure in (True, False)
             for code in zxingcpp.read_barcodes(image, is_pure=pure) if code.valid]
    return found[0] if found else None


def qr_text(text):
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    qr_code(text)
    return text


def parser():
    p, choice = patterns.parser(__file__, __doc__, steps=350)
    choice.add_argument("--text", type=qr_text, default=TEXT, help=f"to encode (default {TEXT})")
    return p


def main(argv=None):
    def more(args, picture):
        return {"text": None if args.pattern is not None else args.text, "payload": read(picture)}

    patterns.main(parser(), argv, lambda args: qr_code(args.text), more=more)


if __name__ == "__main__":
    main()
