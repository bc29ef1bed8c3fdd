"""Merge methods: one file each, whose name is the method's.

A file has a docstring, whose first line is the sentence of tables and ``llmfusion merge --help``, and defines

- ``class Options(MergeOptions)`` with ``method: Literal[NAME]`` and the method's own options, each with a description;
- ``merge(tensor: PivotDeltas, options: Options) -> TensorMerge``.

``merge`` looks at the tensor as often as it needs, block by block, and returns what makes each block of the merge and
what is worth reporting (:mod:`llmfusion.merging.blocks`), so that memory does not grow with the tensor. Arithmetic is
float32 in the order of the models, sums and rates are float64. Tensors are merged in several threads at once: state
belongs into ``merge``, not into the module.

A study is checked in half a second: importing a method must import neither numpy nor numba nor torch
(:mod:`llmfusion.io.lazy`).
"""
