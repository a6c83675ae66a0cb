"""Subjects: functions and modules (``rows``), models of transformers (``transformers``)."""

from pytest_batchinv.subjects.base import NotRun, RowOutput, RowOutputs, Space, Span, Subject, SubjectInfo

__all__ = ["NotRun", "RowOutput", "RowOutputs", "Space", "Span", "Subject", "SubjectInfo"]
