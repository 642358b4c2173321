"""Calibration samples and certificates of the selector's thresholds; numpy alone."""

from __future__ import annotations

from greenprune_calibration.certificate import CertifiedRow, certify, smallest_certifiable_loss
from greenprune_calibration.samples import draw_balanced

__all__ = ["CertifiedRow", "certify", "draw_balanced", "smallest_certifiable_loss"]
