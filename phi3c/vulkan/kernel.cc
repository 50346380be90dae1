#include "kernel.h"

#include <dlpack/dlpack.h>
#include <tvm/ffi/container/tensor.h>

#include <cstring>

#include "boundary.h"
#include "device_api.h"

namespace phi3c::vulkan {
namespace {

namespace ffi = tvm::ffi;

const char* const kAxes[] = {"blockIdx.x",  "blockIdx.y",  "blockIdx.z",
                             "threadIdx.x", "threadIdx.y", "threadIdx.z"};

// float32's bits → float16's, to the nearest, ties to even.
uint16_t half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  uint32_t sign = bits >> 16 & 0x8000;
  uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);   // NaN
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);  // to infinity
  if (magnitude < 0x38800000) {  // subnormal: in units of 2^-24
    if (magnitude < 0x33000000) return static_cast<uint16_t>(sign);
    uint32_t shift = 126 - (magnitude >> 23);
    uint32_t mantissa = (magnitude & 0x7FFFFF) | 0x800000;
    uint32_t rest = mantissa & ((1u << shift) - 1), middle = 1u << (shift - 1);
    mantissa >>= shift;
    mantissa += rest > middle || (rest == middle && mantissa & 1);
    return static_cast<uint16_t>(sign | mantissa);
  }
  uint32_t rounded = magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1);
  return static_cast<uint16_t>(sign | rounded >> 13);
}

uint16_t bfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return static_cast<uint16_t>(bits >> 16 | 0x40);  // NaN
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// A floating-point value in the low bytes of its 8.
uint64_t encoded(const ArgumentType& type, double value) {
  uint64_t bits = 0;
  float single = static_cast<float>(value);
  if (type.code == kDLBfloat) {
    bits = bfloat(single);
  } else if (type.bits == 16) {
    bits = half(single);
  } else if (type.bits == 32) {
    std::memcpy(&bits, &single, sizeof single);
  } else {
    std::memcpy(&bits, &value, sizeof value);
  }
  return bits;
}

bool is_float(const ArgumentType& type) {
  return type.code == kDLFloat || type.code == kDLBfloat;
}

bool is_value(const ArgumentType& type) {
  if (type.lanes != 1) return false;
  switch (type.code) {
    case kDLInt:
    case kDLUInt:
    case kDLBool:
      return type.bits >= 1 && type.bits <= 64;
    case kDLFloat:
      return type.bits == 16 || type.bits == 32 || type.bits == 64;
    case kDLBfloat:
      return type.bits == 16;
    default:
      return false;
  }
}

}  // namespace

Kernel::Kernel(std::string name, KernelCode code) : name_(std::move(name)), code_(std::move(code)) {
  for (size_t i = 0; i < code_.arguments.size(); ++i) {
    const ArgumentType& type = code_.arguments[i];
    if (type.code == kDLOpaqueHandle) {
      handles_.push_back(i);
    } else if (is_value(type)) {
      values_.push_back(i);
    } else {
      fail(kArtifactError, "vulkan: kernel ", name_, ": argument ", i, ": found type (",
           int{type.code}, ", ", int{type.bits}, ", ", int{type.lanes},
           "); accepted: a handle, an integer, a float");
    }
  }
  for (const std::string& parameter : code_.launch_parameters) {
    for (int axis = 0; axis < 6; ++axis) {
      if (parameter == kAxes[axis]) axes_.push_back(axis);
    }
    // Its size is an argument; in Vulkan the code itself says how much shared memory there is.
    if (parameter == "tirx.use_dyn_shared_memory") axes_.push_back(-1);
  }
}

Kernel::~Kernel() {
  released([&](Context& context) {
    for (size_t i = 0; i < pipelines_.size(); ++i) {
      if (!pipelines_[i]) continue;
      OpenDevice& open = *context.opened()[i];
      open.stream.release(pipelines_[i], open.pipelines);
    }
  });
}

std::vector<uint64_t> Kernel::constants(ffi::PackedArgs args) const {
  std::vector<uint64_t> found;
  found.reserve(values_.size());
  for (size_t i : values_) {
    const ArgumentType& type = code_.arguments[i];
    int at = static_cast<int>(i);
    found.push_back(is_float(type) ? encoded(type, args[at].cast<double>())
                                   : static_cast<uint64_t>(args[at].cast<int64_t>()));
  }
  return found;
}

std::vector<Buffer*> Kernel::buffers(const Context& context, ffi::PackedArgs args) const {
  std::vector<Buffer*> found;
  found.reserve(handles_.size());
  for (size_t i : handles_) {
    const void* pointer = nullptr;
    int at = static_cast<int>(i);
    if (auto tensor = args[at].try_cast<DLTensor*>()) {  // callers other than compiled code
      if ((*tensor)->byte_offset) {
        fail(kValueError, "vulkan: kernel ", name_, ": argument ", i, ": a tensor at byte ",
             (*tensor)->byte_offset, " of its buffer; accepted: at its begin");
      }
      pointer = (*tensor)->data;
    } else if (auto raw = args[at].try_cast<void*>()) {
      pointer = *raw;
    }
    Buffer* buffer = context.find(pointer);
    if (!buffer) {
      fail(kValueError, "vulkan: kernel ", name_, ": argument ", i, " is no buffer of Vulkan");
    }
    if (!found.empty() && buffer->device != found[0]->device) {
      fail(kValueError, "vulkan: kernel ", name_, ": argument ", i, " is on device ",
           buffer->device, ", others are on device ", found[0]->device);
    }
    found.push_back(buffer);
  }
  return found;
}

bool Kernel::extents(ffi::PackedArgs args, int64_t found[6]) const {
  size_t at = code_.arguments.size();
  if (static_cast<size_t>(args.size()) != at + axes_.size()) {
    fail(kValueError, "vulkan: kernel ", name_, ": found ", args.size(), " arguments; accepted: ",
         at, " and ", axes_.size(), " launch extents");
  }
  bool some = true;
  for (int axis : axes_) {
    int64_t extent = args[static_cast<int>(at++)].cast<int64_t>();
    if (axis < 0) continue;
    if (extent < 0) fail(kValueError, "vulkan: kernel ", name_, ": ", kAxes[axis], ": ", extent);
    found[axis] = extent;
    some = some && extent > 0;
  }
  return some;
}

void Kernel::check_extents(const PhysicalDevice& device, const int64_t found[6]) const {
  const uint32_t* most = device.properties.limits.maxComputeWorkGroupCount;
  for (int axis = 0; axis < 3; ++axis) {
    if (found[axis] > most[axis]) {
      fail(kDeviceError, "vulkan: kernel ", name_, ": ", found[axis], " workgroups along ",
           kAxes[axis], "; ", device.name(), " accepts at most ", most[axis],
           " (maxComputeWorkGroupCount)");
    }
    // 0: the code does not say. An axis without an extent has 1.
    uint32_t threads = code_.shader.local_size[axis];
    if (threads && found[axis + 3] != threads) {
      fail(kValueError, "vulkan: kernel ", name_, ": ", kAxes[axis + 3], ": found ",
           found[axis + 3], "; its code has ", threads);
    }
  }
}

void Kernel::operator()(ffi::PackedArgs args) {
  locked([&](Context& context) {
    int64_t extent[6] = {1, 1, 1, 1, 1, 1};
    if (!extents(args, extent)) return;
    std::vector<uint64_t> constant_values = constants(args);
    std::vector<Buffer*> buffer_list = buffers(context, args);
    int index = buffer_list.empty() ? current_device() : buffer_list[0]->device;
    OpenDevice& open = context.open(index);
    check_extents(open.device.physical, extent);
    if (pipelines_.size() <= static_cast<size_t>(index)) pipelines_.resize(index + 1);
    Pipeline*& pipeline = pipelines_[index];
    if (!pipeline) {
      pipeline = open.pipelines.create(name_, code_.shader, static_cast<uint32_t>(handles_.size()),
                                       static_cast<uint32_t>(8 * values_.size()));
    }
    const uint32_t groups[3] = {static_cast<uint32_t>(extent[0]), static_cast<uint32_t>(extent[1]),
                                static_cast<uint32_t>(extent[2])};
    open.stream.dispatch(*pipeline, buffer_list, constant_values.data(), groups);
  });
}

}  // namespace phi3c::vulkan
