"""A run as one page that needs no network: what its stages gained, and pictures of it."""

from .collect import ReportConfig, Stage, Training, collect, open_stage, open_training
from .page import Report, page, write_report

__all__ = ["Report", "ReportConfig", "Stage", "Training", "collect", "open_stage", "open_training", "page",
           "write_report"]  # fmt: skip
