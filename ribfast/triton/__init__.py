"""Triton kernels with the operators' own signatures, for machines without the C++ CUDA kernels."""
