"""Triton kernels for per-sample gradient norms and clipped sums. One file a family, each registering its ops with torch
as ``dpfast_kernels::name`` when it is imported. Imports torch and triton, never dpfast.
"""
