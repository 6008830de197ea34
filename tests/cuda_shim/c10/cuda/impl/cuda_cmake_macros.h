// What torch's build for CUDA generates here, and its build for the CPU leaves out.
#define C10_CUDA_BUILD_SHARED_LIBS
