"""Formats of tasks, one a file; the file's name is the format's.

What a file declares: :mod:`llmfusion.evaluation.task_format`.
"""
