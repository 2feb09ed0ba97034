"""Deliberately wrong components, one fault each, and correct ones that must not be rejected."""

from __future__ import annotations

from contract_faults import (
    adapters,
    connector_geometry_faults,
    encoder_effect_faults,
    encoder_faults,
    encoder_keeping_faults,
    encoder_pixel_faults,
    encoder_training_faults,
    encoders,
    fusions,
    llm_execution_faults,
    llm_faults,
    llm_generation_faults,
    llms,
)
from fault_record import Fault, Recorder

_RECORDERS: tuple[Recorder, ...] = (
    encoders.fault,
    encoder_faults.fault,
    encoder_pixel_faults.fault,
    encoder_training_faults.fault,
    encoder_effect_faults.fault,
    encoder_keeping_faults.fault,
    fusions.fault,
    adapters.fault,
    connector_geometry_faults.fusion,
    connector_geometry_faults.adapter,
    llms.fault,
    llm_faults.fault,
    llm_generation_faults.fault,
    llm_execution_faults.fault,
)

FAULTS: list[Fault] = [fault for recorder in _RECORDERS for fault in recorder.faults]
CORRECT: list[tuple[str, type]] = [(recorder.kind, cls) for recorder in _RECORDERS for cls in recorder.components]
