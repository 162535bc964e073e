"""What the Triton kernels of all ops share. Only launch.py and the kernels' own files import Triton."""
