"""What is measured: single kernels (micro), whole models (studies), everything on a GPU (gpu).

Times are taken by nbl_kernels.machine, in turns; results.py writes them down.
"""
