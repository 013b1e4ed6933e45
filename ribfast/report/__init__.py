"""A run as one page that needs no network: what its stages gained, and pictures of it."""

from .collect import Report, ReportConfig, Stage, collect, open_stage
from .page import page, write_report

__all__ = ["Report", "ReportConfig", "Stage", "collect", "open_stage", "page", "write_report"]
