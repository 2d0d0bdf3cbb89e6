// A CUDA driver on the host's memory, for NVIDIA's real bindings to call: what they hand over is checked and done.
//
// Streams run when they are waited for, in order; all but the record of an event takes a millisecond of a clock that
// knows no other time. What a GPU would refuse or crash on answers CUDA_ERROR_INVALID_VALUE or _HANDLE, and stderr says
// why. STUB_CUDA_LOG names a file for the names of the functions that are called; STUB_CUDA_FAIL, such as
// "cuMemAlloc 2", lets the next call of a function answer a status.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum Status { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101,
              INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600 };
enum Kind { CONTEXT = 0x51a0, STREAM, EVENT, GRAPH, EXECUTABLE, MODULE, KERNEL };
enum { MOST = 256, DEVICE = 7, TOTAL_GIB = 80, LEGACY_STREAM = 1 };

typedef void Run(void *argument, unsigned blocks, unsigned threads);

// A copy, a kernel or the record of an event.
struct Work {
    void *target;
    const void *source;
    size_t bytes;
    Run *run;
    unsigned blocks, threads;
    struct Event *event;
};

// Every handle begins with its kind: one of another kind, or none at all, is noticed.
struct Queue { enum Kind kind; struct Work work[MOST]; int count; struct Queue *captured; };
struct Event { enum Kind kind; double at_ms; struct Queue *stream; };
struct Module { enum Kind kind; void *library; };
struct Kernel { enum Kind kind; Run *run; size_t argument_bytes; };
struct Context { enum Kind kind; };
struct Block { char *start; size_t bytes; int on_device; };

static struct Context context = {CONTEXT};
static __thread struct Context *current;
static struct Block blocks[MOST];
static int initialized;
static double now_ms;

static int refuse(enum Status status, const char *why) {
    fprintf(stderr, "stub_cuda.c: %s\n", why);
    return status;
}

static int enter(const char *name, int needs_context) {
    const char *log = getenv("STUB_CUDA_LOG"), *fail = getenv("STUB_CUDA_FAIL");
    FILE *file = log ? fopen(log, "a") : NULL;
    if (file) {
        fprintf(file, "%s\n", name);
        fclose(file);
    }
    size_t length = strlen(name);
    if (fail && !strncmp(fail, name, length) && fail[length] == ' ') {
        int status = atoi(fail + length);
        unsetenv("STUB_CUDA_FAIL");
        return status;
    }
    if (!initialized && strcmp(name, "cuInit")) return refuse(NOT_INITIALIZED, "cuInit was not called");
    return needs_context && !current ? INVALID_CONTEXT : OK;
}

#define ENTER(needs_context) do { int status = enter(__func__, needs_context); if (status) return status; } while (0)
#define REQUIRE(status, condition) do { if (!(condition)) return refuse(status, #condition); } while (0)
#define IS(handle, wanted) ((uintptr_t)(handle) > 4096 && (handle)->kind == (wanted))

static struct Block *block_of(uint64_t address, size_t bytes, int on_device) {
    for (struct Block *block = blocks; block < blocks + MOST; ++block) {
        uint64_t start = (uintptr_t)block->start;
        if (start && block->on_device == on_device && address >= start && address + bytes <= start + block->bytes)
            return block;
    }
    return NULL;
}

static int take(void **address, size_t bytes, int on_device) {
    REQUIRE(INVALID_VALUE, bytes > 0);
    struct Block *block = blocks;
    while (block < blocks + MOST && block->start) ++block;
    size_t rounded = (bytes + 255) / 256 * 256;
    if (block == blocks + MOST || !(block->start = aligned_alloc(256, rounded))) return OUT_OF_MEMORY;
    memset(block->start, 0xff, rounded);  // NaN, where nothing was written
    block->bytes = bytes, block->on_device = on_device;
    *address = block->start;
    return OK;
}

static int give_back(uint64_t address, int on_device) {
    struct Block *block = block_of(address, 1, on_device);
    REQUIRE(INVALID_VALUE, block && (uintptr_t)block->start == address);
    free(block->start);
    block->start = NULL;
    return OK;
}

static int enqueue(struct Queue *stream, struct Work work) {
    REQUIRE(INVALID_HANDLE, IS(stream, STREAM));
    struct Queue *queue = stream->captured ? stream->captured : stream;
    REQUIRE(OUT_OF_MEMORY, queue->count < MOST);
    queue->work[queue->count++] = work;
    return OK;
}

static int run(struct Queue *stream) {
    REQUIRE(INVALID_HANDLE, IS(stream, STREAM) && !stream->captured);
    for (struct Work *work = stream->work; work < stream->work + stream->count; ++work) {
        if (work->event) {
            work->event->at_ms = now_ms;
            continue;
        }
        now_ms += 1;
        if (work->run)
            work->run((void *)work->source, work->blocks, work->threads);
        else
            memcpy(work->target, work->source, work->bytes);
    }
    stream->count = 0;
    return OK;
}

static void *make_queue(enum Kind kind) {
    struct Queue *queue = calloc(1, sizeof(struct Queue));
    queue->kind = kind;
    return queue;
}

int cuInit(unsigned flags) {
    ENTER(0);
    REQUIRE(INVALID_VALUE, flags == 0);
    initialized = 1;
    return OK;
}

int cuDeviceGet(int *device, int ordinal) {
    ENTER(0);
    if (ordinal != 0) return INVALID_DEVICE;
    *device = DEVICE;
    return OK;
}

int cuDeviceGetName(char *name, int bytes, int device) {
    ENTER(0);
    REQUIRE(INVALID_VALUE, device == DEVICE && bytes == 256);
    strcpy(name, "Stub GPU");
    return OK;
}

int cuDeviceGetPCIBusId(char *id, int bytes, int device) {
    ENTER(0);
    REQUIRE(INVALID_DEVICE, device == DEVICE);
    REQUIRE(INVALID_VALUE, bytes >= 13);
    strcpy(id, "0000:3b:00.0");
    return OK;
}

int cuDeviceTotalMem(size_t *bytes, int device) {
    ENTER(0);
    REQUIRE(INVALID_VALUE, device == DEVICE);
    *bytes = (size_t)TOTAL_GIB << 30;
    return OK;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    ENTER(0);
    REQUIRE(INVALID_VALUE, device == DEVICE && (attribute == 75 || attribute == 76));
    *value = attribute == 75 ? 9 : 0;
    return OK;
}

int cuDevicePrimaryCtxRetain(struct Context **made, int device) {
    ENTER(0);
    REQUIRE(INVALID_VALUE, device == DEVICE);
    *made = &context;
    return OK;
}

int cuCtxSetCurrent(struct Context *wanted) {
    ENTER(0);
    REQUIRE(INVALID_CONTEXT, IS(wanted, CONTEXT));
    current = wanted;
    return OK;
}

int cuCtxSynchronize(void) {
    ENTER(1);
    return OK;
}

int cuMemGetInfo(size_t *unused, size_t *total) {
    ENTER(1);
    *unused = *total = (size_t)TOTAL_GIB << 30;
    for (struct Block *block = blocks; block < blocks + MOST; ++block)
        *unused -= block->start && block->on_device ? block->bytes : 0;
    return OK;
}

int cuMemAlloc(uint64_t *address, size_t bytes) {
    ENTER(1);
    return take((void **)address, bytes, 1);
}

int cuMemAllocHost(void **address, size_t bytes) {
    ENTER(1);
    return take(address, bytes, 0);
}

int cuMemFree(uint64_t address) {
    ENTER(1);
    return give_back(address, 1);
}

int cuMemFreeHost(void *address) {
    ENTER(1);
    return give_back((uintptr_t)address, 0);
}

int cuMemcpyHtoDAsync(uint64_t target, const void *source, size_t bytes, struct Queue *stream) {
    ENTER(1);
    REQUIRE(INVALID_VALUE, block_of(target, bytes, 1));
    REQUIRE(INVALID_VALUE, block_of((uintptr_t)source, bytes, 0));  // the project uploads from pinned memory alone
    return enqueue(stream, (struct Work){.target = (void *)(uintptr_t)target, .source = source, .bytes = bytes});
}

int cuMemcpyDtoHAsync(void *target, uint64_t source, size_t bytes, struct Queue *stream) {
    ENTER(1);
    REQUIRE(INVALID_VALUE, !block_of((uintptr_t)target, 1, 1));
    REQUIRE(INVALID_VALUE, block_of(source, bytes, 1));
    return enqueue(stream, (struct Work){.target = target, .source = (void *)(uintptr_t)source, .bytes = bytes});
}

int cuMemcpyDtoDAsync(uint64_t target, uint64_t source, size_t bytes, struct Queue *stream) {
    ENTER(1);
    REQUIRE(INVALID_VALUE, block_of(target, bytes, 1) && block_of(source, bytes, 1));
    return enqueue(stream, (struct Work){.target = (void *)(uintptr_t)target, .source = (void *)(uintptr_t)source,
                                         .bytes = bytes});
}

int cuStreamCreate(struct Queue **stream, unsigned flags) {
    ENTER(1);
    REQUIRE(INVALID_VALUE, flags == 1);  // CU_STREAM_NON_BLOCKING
    *stream = make_queue(STREAM);
    return OK;
}

int cuStreamSynchronize(struct Queue *stream) {
    ENTER(1);
    if ((uintptr_t)stream == LEGACY_STREAM) return OK;
    return run(stream);
}

int cuStreamDestroy(struct Queue *stream) {
    ENTER(1);
    REQUIRE(INVALID_HANDLE, IS(stream, STREAM));
    free(stream);
    return OK;
}

int cuStreamBeginCapture(struct Queue *stream, int mode) {
    ENTER(1);
    REQUIRE(INVALID_HANDLE, IS(stream, STREAM) && !stream->captured);
    REQUIRE(INVALID_VALUE, mode == 1);  // CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    stream->captured = make_queue(GRAPH);
    return OK;
}

int cuStreamEndCapture(struct Queue *stream, struct Queue **graph) {
    ENTER(1);
    REQUIRE(INVALID_HANDLE, IS(stream, STREAM) && stream->captured);
    *graph = stream->captured;
    stream->captured = NULL;
    return OK;
}

int cuGraphInstantiateWithFlags(struct Queue **executable, struct Queue *graph, unsigned long long flags) {
    int status = enter("cuGraphInstantiate", 1);  // as Python calls it
    if (status) return status;
    REQUIRE(INVALID_VALUE, IS(graph, GRAPH) && flags == 0);
    *executable = malloc(sizeof(struct Queue));
    **executable = *graph;
    (*executable)->kind = EXECUTABLE;
    return OK;
}

int cuGraphDestroy(struct Queue *graph) {
    ENTER(1);
    REQUIRE(INVALID_VALUE, IS(graph, GRAPH));
    free(graph);
    return OK;
}

int cuGraphExecDestroy(struct Queue *executable) {
    ENTER(1);
    REQUIRE(INVALID_VALUE, IS(executable, EXECUTABLE));
    free(executable);
    return OK;
}

int cuGraphLaunch(struct Queue *executable, struct Queue *stream) {
    ENTER(1);
    REQUIRE(INVALID_VALUE, IS(executable, EXECUTABLE));
    for (int i = 0; i < executable->count; ++i) {
        int status = enqueue(stream, executable->work[i]);
        if (status) return status;
    }
    return OK;
}

int cuEventCreate(struct Event **event, unsigned flags) {
    ENTER(1);
    REQUIRE(INVALID_VALUE, flags == 0);  // others keep no time
    *event = malloc(sizeof(struct Event));
    **event = (struct Event){EVENT, -1, NULL};
    return OK;
}

int cuEventRecord(struct Event *event, struct Queue *stream) {
    ENTER(1);
    REQUIRE(INVALID_HANDLE, IS(event, EVENT));
    event->at_ms = -1, event->stream = stream;
    return enqueue(stream, (struct Work){.event = event});
}

int cuEventSynchronize(struct Event *event) {
    ENTER(1);
    REQUIRE(INVALID_HANDLE, IS(event, EVENT) && event->stream);
    return run(event->stream);
}

int cuEventElapsedTime(float *milliseconds, struct Event *start, struct Event *end) {
    ENTER(1);
    REQUIRE(INVALID_HANDLE, IS(start, EVENT) && IS(end, EVENT));
    if (start->at_ms < 0 || end->at_ms < 0) return NOT_READY;
    *milliseconds = (float)(end->at_ms - start->at_ms);
    return OK;
}

// An image of machine code is the path of a library here.
int cuModuleLoadData(struct Module **module, const void *image) {
    ENTER(1);
    void *library = dlopen(image, RTLD_NOW | RTLD_LOCAL);
    REQUIRE(INVALID_VALUE, library);
    *module = malloc(sizeof(struct Module));
    **module = (struct Module){MODULE, library};
    return OK;
}

int cuModuleUnload(struct Module *module) {
    ENTER(1);
    REQUIRE(INVALID_HANDLE, IS(module, MODULE));
    free(module);
    return OK;
}

// The library has <name>_on_host to run a kernel, and <name>_bytes for the size of its argument.
int cuModuleGetFunction(struct Kernel **kernel, struct Module *module, const char *name) {
    ENTER(1);
    REQUIRE(INVALID_HANDLE, IS(module, MODULE));
    char run[64], bytes[64];
    snprintf(run, sizeof run, "%s_on_host", name);
    snprintf(bytes, sizeof bytes, "%s_bytes", name);
    const unsigned long *argument_bytes = dlsym(module->library, bytes);
    if (!argument_bytes) return NOT_FOUND;
    *kernel = malloc(sizeof(struct Kernel));
    **kernel = (struct Kernel){KERNEL, (Run *)dlsym(module->library, run), *argument_bytes};
    return OK;
}

// The argument is read now, as CUDA does; the caller may free it at once.
int cuLaunchKernel(struct Kernel *kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, struct Queue *stream, void **arguments,
                   void **extra) {
    ENTER(1);
    REQUIRE(INVALID_HANDLE, IS(kernel, KERNEL));
    REQUIRE(INVALID_VALUE, grid_x > 0 && grid_y == 1 && grid_z == 1);
    REQUIRE(INVALID_VALUE, block_x == 256 && block_y == 1 && block_z == 1);
    REQUIRE(INVALID_VALUE, shared_bytes == 0 && arguments && arguments[0] && !extra);
    void *argument = malloc(kernel->argument_bytes);
    memcpy(argument, arguments[0], kernel->argument_bytes);
    return enqueue(stream, (struct Work){.source = argument, .run = kernel->run, .blocks = grid_x, .threads = block_x});
}

int cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *found) {
    (void)version, (void)flags;
    *function = dlsym(dlopen("libcuda.so.1", RTLD_NOW), name);
    if (found) *found = *function ? 0 : 1;
    return *function ? OK : NOT_FOUND;
}

int cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}
