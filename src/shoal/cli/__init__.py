"""The command line: one verb a subsystem, rendered here and nowhere else."""

from shoal.cli.app import main

__all__ = ["main"]
