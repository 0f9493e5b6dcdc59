"""``python -m pennyweight`` is the command line."""

import runpy

runpy.run_module("pennyweight.cli", run_name="__main__")
