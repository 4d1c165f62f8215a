// Streams of a driver that does everything as late as it may: when somebody waits for it, and nothing more.
#include <cuda.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    CUstream stream;
    int index;
} Moment;  // of a stream: all that was given before

typedef struct {
    CUstream stream;
    void* to;
    const void* from;  // null where `to` is filled with `value`
    size_t bytes;
    int value, waits, done;
    Moment moment;  // that it waits for
} Work;

static pthread_mutex_t working = PTHREAD_MUTEX_INITIALIZER;
static Work given[1 << 16];
static int given_count, living;
static char* pinned;
static size_t pinned_bytes;

int fake_living(void) { return living; }

static void reset_streams(void) { given_count = living = 0; }

static void run(Moment until) {
    for (int i = 0; i < until.index; ++i) {
        Work* work = given + i;
        if (work->stream != until.stream || work->done) continue;
        work->done = 1;
        if (work->waits)
            run(work->moment);
        else if (work->from)
            memcpy(work->to, work->from, work->bytes);
        else
            memset(work->to, work->value, work->bytes);
    }
}

static void give(Work work) {
    pthread_mutex_lock(&working);
    given[given_count++] = work;
    pthread_mutex_unlock(&working);
}

static void finish(Moment until) {
    pthread_mutex_lock(&working);
    run(until);
    pthread_mutex_unlock(&working);
}

// A kernel on a stream that fills memory.
void fake_fill(size_t stream, void* to, int value, size_t bytes) {
    give((Work){.stream = (CUstream)stream, .to = to, .value = value, .bytes = bytes});
}

CUresult cuStreamCreate(CUstream* stream, unsigned flags) {
    static size_t made = 0x100;
    CALLED(" %u", flags);
    *stream = (CUstream)++made;
    ++living;
    return CUDA_SUCCESS;
}

CUresult cuStreamDestroy(CUstream stream) {
    --living;
    return CUDA_SUCCESS;
}

CUresult cuEventCreate(CUevent* event, unsigned flags) {
    CALLED(" %u", flags);
    *event = (CUevent)calloc(1, sizeof(Moment));
    ++living;
    return CUDA_SUCCESS;
}

CUresult cuEventDestroy(CUevent event) {
    free(event);
    --living;
    return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
    CALLED("");
    *(Moment*)event = (Moment){stream, given_count};
    return CUDA_SUCCESS;
}

CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
    CALLED("");
    give((Work){.stream = stream, .waits = 1, .moment = *(Moment*)event});
    return CUDA_SUCCESS;
}

CUresult cuEventSynchronize(CUevent event) {
    CALLED("");
    finish(*(Moment*)event);
    return CUDA_SUCCESS;
}

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
    CALLED(" %d", *mode);
    *mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
    return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream stream) {
    finish((Moment){stream, given_count});
    return CUDA_SUCCESS;
}

CUresult cuMemHostRegister(void* memory, size_t bytes, unsigned flags) {
    CALLED(" %zu %u", bytes, flags);
    pinned = memory;
    pinned_bytes = bytes;
    ++living;
    return CUDA_SUCCESS;
}

CUresult cuMemHostUnregister(void* memory) {
    living -= memory == pinned;
    return CUDA_SUCCESS;
}

// Refuses memory that is not pinned, where the copy would make the host wait.
CUresult cuMemcpyDtoHAsync(void* to, CUdeviceptr from, size_t bytes, CUstream stream) {
    CALLED(" %zu", bytes);
    if ((char*)to < pinned || (char*)to + bytes > pinned + pinned_bytes) return CUDA_ERROR_INVALID_VALUE;
    give((Work){.stream = stream, .to = to, .from = (const void*)from, .bytes = bytes});
    return CUDA_SUCCESS;
}
