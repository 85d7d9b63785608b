# Sets the environment of processes that train on GPUs. Source this file. It keeps variables that are already set.

# CUDA, cuDNN and NCCL need the rest of the memory. JAX's default of 0.75 wastes memory that tables could use.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

# Starts collectives early and ends them late, so that the exchange of rows and the gathers of fsdp overlap
# with matrix products. Flags set by the user win, since the last of two equal flags counts.
# XLA's defaults are right for command buffers (on for matrix products and fusions), autotuning of matrix products
# (on), and Triton or cuBLAS (the autotuner picks the faster one).
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"

# NCCL reports errors instead of hanging silently.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
