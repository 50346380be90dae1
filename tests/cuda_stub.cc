// The functions of NVIDIA's driver and of CUDA's runtime library that TVM calls, for a machine
// without a GPU: device memory is the host's, and everything is done when it is asked for. A kernel
// is what the library named by CUDA_STUB_KERNELS has for it (cuda_emulation.py).
//
// Compiled twice: with DRIVER as libcuda.so.1, without as libcudart.so.13. The device is what
// CUDA_STUB_DEVICE says: "major.minor gigabytes", with a second word of the driver's CUDA version
// after a comma if it is not 13.0; empty for none.
//
// A stream that captures records kernels (with copies of their arguments) and copies instead; a
// graph does them when it is launched. While one captures, allocating, freeing and waiting are
// refused and spoil the capture. Programs read the counters stub_… below from libcuda.so.1.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

namespace {

struct Device {
  int count = 0, major = 0, minor = 0, version = 13000;
  size_t bytes = 0;
};

Device device() {
  Device d;
  const char* text = getenv("CUDA_STUB_DEVICE");
  unsigned long gigabytes = 0;
  int fields = text ? sscanf(text, "%d.%d %lu,%d", &d.major, &d.minor, &gigabytes, &d.version) : 0;
  d.count = fields >= 3;
  d.bytes = gigabytes << 30;
  return d;
}

}  // namespace

#ifdef DRIVER
#include <cuda.h>
#include <dlfcn.h>

#define SHARED extern "C" __attribute__((visibility("default")))
#define EXPORT SHARED CUresult

using Graph = std::vector<std::function<void()>>;

SHARED int stub_kernels = 0;              // launched one by one
SHARED int stub_graph_launches = 0;
SHARED int stub_graphs = 0;               // that can be launched now
SHARED int stub_streams = 0;
SHARED int stub_capturable = 1 << 30;     // kernels of a capture; 0: nothing can be captured

static void* capturing = nullptr;  // the stream
static bool spoiled = false;
static Graph* captured = nullptr;

// For libcudart.so.13.
SHARED bool stub_record_copy(void* stream, void* to, const void* from, size_t size) {
  if (!capturing || stream != capturing) return false;
  captured->push_back([=] { memmove(to, from, size); });
  return true;
}
SHARED bool stub_spoils_capture() { return capturing ? spoiled = true : false; }

EXPORT cuInit(unsigned) { return device().count ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE; }
// NVRTC asks for tables of its own.
EXPORT cuGetExportTable(const void**, const CUuuid*) { return CUDA_ERROR_NOT_FOUND; }
EXPORT cuDriverGetVersion(int* version) {
  *version = device().version;
  return CUDA_SUCCESS;
}
EXPORT cuDeviceGetCount(int* count) {
  *count = device().count;
  return CUDA_SUCCESS;
}
EXPORT cuDeviceGet(CUdevice* found, int index) {
  *found = index;
  return CUDA_SUCCESS;
}
EXPORT cuDeviceGetName(char* name, int size, CUdevice) {
  snprintf(name, size, "a stub");
  return CUDA_SUCCESS;
}
EXPORT cuDeviceTotalMem(size_t* bytes, CUdevice) {
  *bytes = device().bytes;
  return CUDA_SUCCESS;
}
EXPORT cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  Device d = device();
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? d.major : d.minor;
  return CUDA_SUCCESS;
}
EXPORT cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  *context = nullptr;
  return CUDA_SUCCESS;
}
EXPORT cuDevicePrimaryCtxRelease(CUdevice) { return CUDA_SUCCESS; }
EXPORT cuCtxPushCurrent(CUcontext) { return CUDA_SUCCESS; }
EXPORT cuCtxPopCurrent(CUcontext*) { return CUDA_SUCCESS; }
EXPORT cuMemGetInfo(size_t* free, size_t* total) {
  *free = *total = device().bytes;
  return CUDA_SUCCESS;
}
EXPORT cuGetErrorName(CUresult error, const char** name) {
  static char text[32];
  snprintf(text, sizeof text, "CUDA_ERROR %d", error);
  *name = text;
  return CUDA_SUCCESS;
}
EXPORT cuGetErrorString(CUresult error, const char** text) { return cuGetErrorName(error, text); }
EXPORT cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                              const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                              const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return CUDA_ERROR_NOT_SUPPORTED;
}

// A fat binary: its magic number, the header's size and that of what follows.
struct Image {
  unsigned magic;
  unsigned short version, header;
  unsigned long long size;
};

EXPORT cuModuleLoadData(CUmodule* module, const void* image) {
  if (((const Image*)image)->magic != 0xBA55ED50u) return CUDA_ERROR_INVALID_IMAGE;
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}
EXPORT cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }

using Launch = void (*)(void**, unsigned*, unsigned*);
struct Function {
  Launch launch;
  const unsigned* sizes;  // of the arguments, then 0
};

EXPORT cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  const Image* image = (const Image*)module;
  if (!memmem(image, image->header + image->size, name, strlen(name))) return CUDA_ERROR_NOT_FOUND;
  static void* kernels = dlopen(getenv("CUDA_STUB_KERNELS"), RTLD_NOW | RTLD_LOCAL);
  if (!kernels) return CUDA_ERROR_SHARED_OBJECT_INIT_FAILED;
  char launch[256], sizes[256];
  snprintf(launch, sizeof launch, "launch_%s", name);
  snprintf(sizes, sizeof sizes, "sizes_%s", name);
  Function found{(Launch)dlsym(kernels, launch), (const unsigned*)dlsym(kernels, sizes)};
  if (!found.launch || !found.sizes) return CUDA_ERROR_NOT_FOUND;
  *function = (CUfunction) new Function(found);
  return CUDA_SUCCESS;
}
EXPORT cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }

EXPORT cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction function, void** arguments, void**) {
  unsigned grid[3] = {c->gridDimX, c->gridDimY, c->gridDimZ};
  unsigned block[3] = {c->blockDimX, c->blockDimY, c->blockDimZ};
  unsigned most[3] = {2147483647, 65535, 65535};
  for (int i = 0; i < 3; ++i)
    if (!grid[i] || grid[i] > most[i] || !block[i]) return CUDA_ERROR_INVALID_VALUE;
  if (block[0] * block[1] * block[2] > 1024) return CUDA_ERROR_INVALID_VALUE;
  Function f = *(Function*)function;
  if (!capturing || c->hStream != capturing) {
    ++stub_kernels;
    f.launch(arguments, grid, block);
    return CUDA_SUCCESS;
  }
  if ((int)captured->size() >= stub_capturable) {
    spoiled = true;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  std::vector<std::vector<char>> copies;
  for (int i = 0; f.sizes[i]; ++i)
    copies.emplace_back((char*)arguments[i], (char*)arguments[i] + f.sizes[i]);
  captured->push_back([=]() mutable {
    std::vector<void*> pointers;
    for (auto& copy : copies) pointers.push_back(copy.data());
    f.launch(pointers.data(), grid, block);
  });
  return CUDA_SUCCESS;
}

EXPORT cuStreamCreate(CUstream* stream, unsigned) {
  ++stub_streams;
  *stream = (CUstream) new char;
  return CUDA_SUCCESS;
}
EXPORT cuStreamDestroy(CUstream stream) {
  --stub_streams;
  delete (char*)stream;
  return CUDA_SUCCESS;
}
EXPORT cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode) {
  if (!stream || capturing) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (!stub_capturable) return CUDA_ERROR_NOT_SUPPORTED;
  capturing = stream;
  spoiled = false;
  captured = new Graph;
  return CUDA_SUCCESS;
}
EXPORT cuStreamEndCapture(CUstream stream, CUgraph* graph) {
  *graph = nullptr;
  if (stream != capturing) return CUDA_ERROR_ILLEGAL_STATE;
  capturing = nullptr;
  if (!spoiled) {
    *graph = (CUgraph)captured;
    return CUDA_SUCCESS;
  }
  delete captured;
  return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
}
EXPORT cuGraphDestroy(CUgraph graph) {
  delete (Graph*)graph;
  return CUDA_SUCCESS;
}
EXPORT cuGraphInstantiateWithFlags(CUgraphExec* made, CUgraph graph, unsigned long long) {
  ++stub_graphs;
  *made = (CUgraphExec) new Graph(*(Graph*)graph);
  return CUDA_SUCCESS;
}
EXPORT cuGraphExecDestroy(CUgraphExec graph) {
  --stub_graphs;
  delete (Graph*)graph;
  return CUDA_SUCCESS;
}
EXPORT cuGraphLaunch(CUgraphExec graph, CUstream) {
  ++stub_graph_launches;
  for (auto& node : *(Graph*)graph) node();
  return CUDA_SUCCESS;
}

#else
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#define EXPORT extern "C" __attribute__((visibility("default"))) cudaError_t

namespace {

void* of_driver(const char* name) {
  static void* driver = dlopen("libcuda.so.1", RTLD_NOW);
  return dlsym(driver, name);
}
bool recorded(void* stream, void* to, const void* from, size_t size) {
  static auto record = (bool (*)(void*, void*, const void*, size_t))of_driver("stub_record_copy");
  return record(stream, to, from, size);
}
bool refused() {
  static auto spoils = (bool (*)())of_driver("stub_spoils_capture");
  return spoils();
}

}  // namespace

EXPORT cudaGetDeviceCount(int* count) {
  *count = device().count;
  return *count ? cudaSuccess : cudaErrorNoDevice;
}
EXPORT cudaSetDevice(int) { return cudaSuccess; }
EXPORT cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}
EXPORT cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  Device d = device();
  *value = attribute == cudaDevAttrComputeCapabilityMajor   ? d.major
           : attribute == cudaDevAttrComputeCapabilityMinor ? d.minor
           : attribute == cudaDevAttrWarpSize               ? 32
                                                            : 1024;
  return cudaSuccess;
}
EXPORT cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  memset(properties, 0, sizeof *properties);
  properties->totalGlobalMem = device().bytes;
  return cudaSuccess;
}
EXPORT cudaMemGetInfo(size_t* free, size_t* total) {
  *free = *total = device().bytes;
  return cudaSuccess;
}
// What a kernel reads before it writes is seen: fresh memory holds NaN.
EXPORT cudaMalloc(void** pointer, size_t size) {
  if (refused()) return cudaErrorStreamCaptureUnsupported;
  *pointer = aligned_alloc(256, (size + 255) / 256 * 256);
  if (!*pointer) return cudaErrorMemoryAllocation;
  memset(*pointer, 0xff, size);
  return cudaSuccess;
}
EXPORT cudaMallocHost(void** pointer, size_t size) { return cudaMalloc(pointer, size); }
EXPORT cudaFree(void* pointer) {
  if (refused()) return cudaErrorStreamCaptureUnsupported;
  free(pointer);
  return cudaSuccess;
}
EXPORT cudaFreeHost(void* pointer) { return cudaFree(pointer); }
EXPORT cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind,
                       cudaStream_t stream) {
  if (!recorded(stream, to, from, size)) memmove(to, from, size);
  return cudaSuccess;
}
EXPORT cudaMemcpyPeerAsync(void*, int, const void*, int, size_t, cudaStream_t) {
  return cudaErrorNotSupported;
}
EXPORT cudaStreamCreate(cudaStream_t* stream) {
  *stream = nullptr;
  return cudaSuccess;
}
EXPORT cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return cudaStreamCreate(stream);
}
EXPORT cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
EXPORT cudaStreamSynchronize(cudaStream_t) {
  return refused() ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}
EXPORT cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
EXPORT cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { return cudaErrorNotSupported; }
EXPORT cudaStreamEndCapture(cudaStream_t, cudaGraph_t*) { return cudaErrorNotSupported; }
EXPORT cudaGraphInstantiate(cudaGraphExec_t*, cudaGraph_t, unsigned long long) {
  return cudaErrorNotSupported;
}
EXPORT cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return cudaErrorNotSupported; }
EXPORT cudaGraphDestroy(cudaGraph_t) { return cudaErrorNotSupported; }
EXPORT cudaGraphExecDestroy(cudaGraphExec_t) { return cudaErrorNotSupported; }
EXPORT cudaEventCreate(cudaEvent_t* event) {
  *event = nullptr;
  return cudaSuccess;
}
EXPORT cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
EXPORT cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
EXPORT cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
EXPORT cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 0;
  return cudaSuccess;
}
EXPORT cudaGetLastError() { return cudaSuccess; }
EXPORT cudaPeekAtLastError() { return cudaSuccess; }
extern "C" __attribute__((visibility("default"))) const char* cudaGetErrorName(cudaError_t) {
  return "cudaError";
}
extern "C" __attribute__((visibility("default"))) const char* cudaGetErrorString(cudaError_t) {
  return "an error of the stub";
}
#endif
