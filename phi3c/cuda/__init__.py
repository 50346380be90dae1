"""CUDA ahead of time: TVM's source becomes machine code where a model is compiled.

TVM's wheel puts CUDA C++ into a library, for whoever loads it to compile. Here NVRTC compiles it at
once (nvrtc.py), and the library gets the machine code in the source's place (codegen.py,
packing.py), in the format that TVM's runtime hands to the driver as it is: a machine with a GPU
needs neither a compiler nor us. What there is of GPUs is asked of the driver (driver.py), as TVM's
CUDA runtime does not load without one (library.py). A decode step is one launch (graph.py).
"""
