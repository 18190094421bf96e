"""The project's own measurements."""

from .step import StepReport, measure_step

__all__ = ["StepReport", "measure_step"]
