"""Predicts the memory of a training run from its settings: the run's own code on tensors without contents.

The model is made without weights, and a step of the run is taken on the meta device. Every storage that comes and goes
is recorded with its owner (`trace`), and a model of the device's allocator lays the record out in memory
(`allocators`).
"""
