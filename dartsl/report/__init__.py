"""A run's report: one HTML file that needs nothing beside it."""

from dartsl.report.sweep import SweepReport
from dartsl.report.write import leave_report, write_report

__all__ = ["SweepReport", "leave_report", "write_report"]
