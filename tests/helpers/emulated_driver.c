/* A libcuda.so.1 with the functions that Triton's launcher calls, for emulated_gpu.py. It loads
   nothing and remembers nothing: a launch is a call of `launched`. */
#include <cuda.h>
#include <stdint.h>

typedef void (*Launched)(uintptr_t function, unsigned num_blocks, unsigned num_threads,
                         unsigned shared_bytes, void **parameters);
static Launched launched;
static uintptr_t num_modules;

void set_launched(Launched callback) { launched = callback; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters,
                          void **extra) {
  if (config->gridDimY != 1 || config->gridDimZ != 1 || config->numAttrs || extra)
    return CUDA_ERROR_NOT_SUPPORTED;
  launched((uintptr_t)function, config->gridDimX, config->blockDimX, config->sharedMemBytes,
           parameters);
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  *module = (CUmodule)++num_modules;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)module;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = 232448; /* the shared memory of a block, which is all that is asked for */
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  *text = "not known to the emulated driver";
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

/* Needed to load the launcher of a Triton between 3.6 and 3.9, not called. */
CUresult cuCtxGetDevice(CUdevice *device) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuDriverGetVersion(int *version) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
