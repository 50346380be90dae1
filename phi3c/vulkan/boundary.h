// Between this library and TVM: failures become errors of the classes that Python has registered.
#pragma once

#include <tvm/ffi/error.h>

#include <new>

#include "context.h"

namespace phi3c::vulkan {

template <typename Body>
auto translated(Body&& body) -> decltype(body()) {
  try {
    return body();
  } catch (const Failure& failure) {
    throw tvm::ffi::Error(failure.kind(), failure.what(), "");
  } catch (const std::bad_alloc&) {
    throw tvm::ffi::Error(kOutOfMemoryError, "vulkan: the host is out of memory", "");
  }
}

// `body(context)`, with the lock held.
template <typename Body>
auto locked(Body&& body) -> decltype(body(Context::get())) {
  return translated([&] {
    Context& context = Context::get();
    Context::Lock lock = context.enter();
    return body(context);
  });
}

// The same for what must not fail, and is left undone where nothing may be done.
template <typename Body>
void released(Body&& body) noexcept {
  try {
    Context& context = Context::get();
    if (Context::Lock lock = context.enter_to_release()) body(context);
  } catch (...) {  // what could not be released stays
  }
}

}  // namespace phi3c::vulkan
