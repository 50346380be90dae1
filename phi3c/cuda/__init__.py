"""CUDA ahead of time: TVM's source is compiled to machine code where a model is compiled.

TVM's wheel puts CUDA C++ into a library, for whoever loads it to compile. Here NVRTC compiles it at
once (nvrtc.py), a text that carries the machine code takes the source's place (carrier.py,
codegen.py), and the loader takes it out again, so a machine with a GPU needs no compiler.
"""
