# Environment of a process that trains on GPUs, in one place; to be sourced. What is set already stays.

# All but what CUDA, cuDNN and NCCL need beside JAX. JAX's own default of 0.75 wastes what tables could use.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}

# Starts collectives early and ends them late, so that the exchange of rows and fsdp's gathers run beside
# matrix products. Flags that came before win, since the last of two equal ones counts.
# Left at XLA's defaults, on purpose: command buffers (on for matrix products and fusions), automatic
# tuning of matrix products (on), and Triton's against cuBLAS's (the tuner picks the faster).
export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true ${XLA_FLAGS:-}"

# NCCL reports what went wrong instead of hanging without a word.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
