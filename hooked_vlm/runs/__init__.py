"""Run folders: a method over a whole data set, which may be stopped and gone on with."""

from hooked_vlm.runs.origin import provenance
from hooked_vlm.runs.run import Excluded, Loaded, Run, load, open_run

__all__ = ["Excluded", "Loaded", "Run", "load", "open_run", "provenance"]
