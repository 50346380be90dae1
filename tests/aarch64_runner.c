/* Calls one compiled kernel on tensors from standard input, then writes them to standard output.
 *
 * Input: the number of tensors as an int64; of each the int64s type code (DLPack's), bits, number
 * of extents and the extents, then its values. Output: the values of all, one after another.
 *
 * What a kernel needs of TVM's runtime is here: parallel loops, whose tasks run one after another,
 * workspaces and error messages. A compiled module has variables for the first two.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <tvm/ffi/c_api.h>
#include <tvm/runtime/c_backend_api.h>

enum { MOST_TENSORS = 16, MOST_EXTENTS = 8, ALIGNMENT = 64, TASKS = 3 };

int __tvm_ffi_main(void* self, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result);

static int launch(FTVMParallelLambda task, void* data, int num_task) {
  TVMParallelGroupEnv env = {.num_task = num_task ? num_task : TASKS};
  int failed = 0;
  for (int i = 0; i < env.num_task && !failed; i++) failed = task(i, &env, data);
  return failed;
}

static void* allocate(size_t bytes) {
  return aligned_alloc(ALIGNMENT, (bytes / ALIGNMENT + 1) * ALIGNMENT);
}

static void* alloc_workspace(int device, int id, uint64_t bytes, int code, int bits) {
  return allocate(bytes);
}

static int free_workspace(int device, int id, void* memory) {
  free(memory);
  return 0;
}

int (*__TVMBackendParallelLaunch)(FTVMParallelLambda, void*, int) = launch;
void* (*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = alloc_workspace;
int (*__TVMBackendFreeWorkspace)(int, int, void*) = free_workspace;

void TVMFFIErrorSetRaisedFromCStrParts(const char* kind, const char** parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int i = 0; i < count; i++) fputs(parts[i], stderr);
  fputc('\n', stderr);
}

static void read_whole(void* to, size_t bytes) {
  if (fread(to, 1, bytes, stdin) != bytes) {
    fputs("input: too short\n", stderr);
    exit(2);
  }
}

static int64_t read_number(int64_t most) {
  int64_t number;
  read_whole(&number, sizeof number);
  if (number < 0 || number > most) {
    fprintf(stderr, "input: found %lld; accepted: up to %lld\n", (long long)number,
            (long long)most);
    exit(2);
  }
  return number;
}

static size_t bytes_of(const DLTensor* tensor) {
  size_t bytes = tensor->dtype.bits / 8;
  for (int i = 0; i < tensor->ndim; i++) bytes *= tensor->shape[i];
  return bytes;
}

int main(void) {
  static DLTensor tensors[MOST_TENSORS];
  static int64_t shapes[MOST_TENSORS][MOST_EXTENTS];
  TVMFFIAny args[MOST_TENSORS] = {0}, result = {0};
  int count = read_number(MOST_TENSORS);
  for (int i = 0; i < count; i++) {
    DLTensor* tensor = &tensors[i];
    tensor->device.device_type = kDLCPU;
    tensor->dtype.code = read_number(UINT8_MAX);
    tensor->dtype.bits = read_number(64);
    tensor->dtype.lanes = 1;
    tensor->ndim = read_number(MOST_EXTENTS);
    tensor->shape = shapes[i];
    for (int d = 0; d < tensor->ndim; d++) shapes[i][d] = read_number(INT32_MAX);
    tensor->data = allocate(bytes_of(tensor));
    read_whole(tensor->data, bytes_of(tensor));
    args[i].type_index = kTVMFFIDLTensorPtr;
    args[i].v_ptr = tensor;
  }
  if (__tvm_ffi_main(NULL, args, count, &result)) return 1;
  for (int i = 0; i < count; i++) fwrite(tensors[i].data, 1, bytes_of(&tensors[i]), stdout);
  return 0;
}
