"""The Triton kernels, installed as `xpo_fast.kernels`.

One file per kernel: rows.py, one_read.py, logps.py, gather.py; logits.py is what the first three share. launch.py is
what they declare and look up; gates.py compiles them all for every target (assembly.py reads the compiled code);
timing.py times the candidates of a launch.
"""
