"""The Triton kernels, installed as `xpo_fast.kernels`; a file a kernel, and `gates`, which compiles them all."""
