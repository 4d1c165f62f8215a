// A CUDA driver that only writes down how it was called, built against NVIDIA's own declarations.
#include <cuda.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static char log_text[1 << 20], failing[64];
static size_t log_end;
static int failure, quiet, sizes[64], size_count, libraries;
static __thread CUcontext current;

const char* fake_log(void) { return log_text; }
int fake_libraries(void) { return libraries; }
void fake_quiet(int on) { quiet = on; }
void fake_context(int number) { current = (CUcontext)(size_t)number; }

void fake_fail(const char* function, int result) {
    snprintf(failing, sizeof failing, "%s", function);
    failure = result;
}

static void reset_streams(void);

void fake_reset(int count, const int* bytes) {
    log_end = 0;
    log_text[0] = 0;
    failing[0] = 0;
    libraries = 0;
    size_count = count;
    memcpy(sizes, bytes, count * sizeof *bytes);
    current = (CUcontext)1;
    reset_streams();
}

static void note(const char* format, ...) {
    if (quiet) return;
    va_list list;
    va_start(list, format);
    log_end += vsnprintf(log_text + log_end, sizeof log_text - log_end, format, list);
    va_end(list);
}

static CUresult result_of(const char* function) { return strcmp(function, failing) ? CUDA_SUCCESS : failure; }

#define CALLED(...)               \
    pthread_mutex_lock(&mutex);   \
    note("%s", __func__);         \
    note(__VA_ARGS__);            \
    note("\n");                   \
    pthread_mutex_unlock(&mutex); \
    if (result_of(__func__)) return result_of(__func__)

CUresult cuGetErrorName(CUresult error, const char** name) {
    *name = error == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : NULL;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
    *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : NULL;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
    if (result_of(__func__)) return result_of(__func__);
    *context = current;
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
    CALLED(" %zu", (size_t)context);
    current = context;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
    if (result_of(__func__)) return result_of(__func__);
    *device = (int)(size_t)current - 1;
    return CUDA_SUCCESS;
}

// Pinned memory is what begins at 0x5000, or anything while quiet; the device sees it 0x1000 higher.
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr address) {
    if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER || (address != 0x5000 && !quiet))
        return CUDA_ERROR_INVALID_VALUE;
    *(CUdeviceptr*)data = address + 0x1000;
    return CUDA_SUCCESS;
}

CUresult cuLibraryLoadData(CUlibrary* library, const void* code, CUjit_option* jit, void** jit_values,
                           unsigned jits, CUlibraryOption* options, void** values, unsigned count) {
    CALLED(" %.4s %u %u", (const char*)code + 1, jits, count);
    *library = (CUlibrary)0x11;
    libraries++;
    return CUDA_SUCCESS;
}

CUresult cuLibraryUnload(CUlibrary library) {
    CALLED(" %p", (void*)library);
    libraries--;
    return CUDA_SUCCESS;
}

CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary library, const char* name) {
    CALLED(" %p %s", (void*)library, name);
    *kernel = (CUkernel)0x22;
    return CUDA_SUCCESS;
}

CUresult cuKernelGetFunction(CUfunction* function, CUkernel kernel) {
    CALLED(" %p", (void*)kernel);
    *function = (CUfunction)0x33;
    return CUDA_SUCCESS;
}

#ifndef OLD
CUresult cuKernelGetParamInfo(CUkernel kernel, size_t index, size_t* offset, size_t* size) {
    if (kernel != (CUkernel)0x22 || index >= (size_t)size_count) return CUDA_ERROR_INVALID_VALUE;
    *offset = 0;
    *size = sizes[index];
    return CUDA_SUCCESS;
}
#endif

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    const char* name = attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES       ? "shared"
                       : attribute == CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT  ? "carveout"
                       : attribute == CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED ? "cluster"
                                                                                          : "?";
    CALLED(" %p %s %d", (void*)function, name, value);
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters,
                          void** extra) {
    if (quiet) return result_of(__func__);
    pthread_mutex_lock(&mutex);
    note("%s %p grid %u %u %u block %u %u %u shared %u stream %zu", __func__, (void*)function,
         config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX, config->blockDimY,
         config->blockDimZ, config->sharedMemBytes, (size_t)config->hStream);
    for (unsigned i = 0; i < config->numAttrs; ++i) {
        const CUlaunchAttribute* a = config->attrs + i;
        if (a->id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
            note(" cluster %u %u %u", a->value.clusterDim.x, a->value.clusterDim.y, a->value.clusterDim.z);
        else if (a->id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
            note(" programmatic %d", a->value.programmaticStreamSerializationAllowed);
        else
            note(" ?");
    }
    note(extra ? " extra" : " :");
    for (int i = 0; i < size_count; ++i) {
        note((size_t)parameters[i] % sizes[i] ? " unaligned" : " ");
        for (int b = 0; b < sizes[i]; ++b) note("%02x", ((unsigned char*)parameters[i])[b]);
    }
    note("\n");
    pthread_mutex_unlock(&mutex);
    return result_of(__func__);
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* shape, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion l2,
                                CUtensorMapFloatOOBfill fill) {
    const char* names[] = {[CU_TENSOR_MAP_DATA_TYPE_FLOAT16] = "fp16",
                           [CU_TENSOR_MAP_DATA_TYPE_BFLOAT16] = "bf16",
                           [CU_TENSOR_MAP_DATA_TYPE_FLOAT32] = "fp32"};
    const int bytes[] = {[CU_TENSOR_MAP_SWIZZLE_NONE] = 0,
                         [CU_TENSOR_MAP_SWIZZLE_32B] = 32,
                         [CU_TENSOR_MAP_SWIZZLE_64B] = 64,
                         [CU_TENSOR_MAP_SWIZZLE_128B] = 128};
    const int plain = interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
                      l2 == CU_TENSOR_MAP_L2_PROMOTION_L2_256B && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE &&
                      (size_t)map % 64 == 0;
    CALLED(" %s %p plain %d swizzle %d", names[type], address, plain, bytes[swizzle]);
    for (cuuint32_t i = 0; i < rank; ++i)
        note("axis %zu %zu %u %u\n", (size_t)shape[i], i ? (size_t)strides[i - 1] : 0, box[i], steps[i]);
    memset(map, 0xab, sizeof *map);
    return CUDA_SUCCESS;
}

#include "fake_streams.h"
