"""compute-sanitizer's stand-in."""

from __future__ import annotations


def scripted(*runs):
    """A `run` that gives these in turn, and notes which keys it was asked for."""
    asked = []

    def run(keys):
        asked.append(list(keys))
        return runs[len(asked) - 1]

    return run, asked


PTX = ".entry cubinery_x()\n{\n\tbar.sync \t0;\n\tmov.u32 %r1, %r2;\n\tbarrier.sync 0;\n\tret;\n}\n"
