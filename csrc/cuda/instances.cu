// Compiled once per feature type (VCR_DTYPE: float, double, bf16 or f16): the launchers of csrc/*/cuda.h for it.
// nvcc options that the numbers rely on: --fmad=false (both directions must round alike; multiply-adds are spelled out).
