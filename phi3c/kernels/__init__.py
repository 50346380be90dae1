"""TIR kernels: functions of shapes and dtypes, one folder per family of targets. A leaf."""
