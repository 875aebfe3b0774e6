// What the custom calls share: checks of shapes, and into how many parts work is divided.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "kernels.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace realm {

namespace ffi = xla::ffi;

extern const Kernels* kernels;  // chosen by realm_select

// Memory of the thread that makes a call, for all that help with it; as `scratch`.
void* shared_scratch(size_t bytes);

// Numbers that one part of the work has at least: below, a second thread costs more than it saves.
constexpr int64_t GRAIN = 1 << 15;

inline int64_t at_least(int64_t each, int64_t many) {
  return std::max((GRAIN + each - 1) / std::max<int64_t>(each, 1), many);
}

// How many of `count` things, of so many numbers `each`, are a part: about 64 parts, for a thread may be slow.
inline int64_t grain_of(int64_t count, int64_t each) { return at_least(each, count / 64); }

// The same for weights that meet few rows: two parts a thread, as memory is fastest where it is read on and on.
inline int64_t stream_of(const ffi::ThreadPool& pool, int64_t count, int64_t each) {
  return at_least(each, count / (2 * std::max<int64_t>(pool.num_threads(), 1)));
}

inline ffi::Error invalid(const char* what) { return ffi::Error::InvalidArgument(what); }
inline ffi::Error failed(const char* operation, const char* what) {
  return ffi::Error::InvalidArgument(std::string(operation) + ": " + what);
}

template <class Buffer>
bool has_shape(const Buffer& buffer, std::initializer_list<int64_t> shape) {
  auto dimensions = buffer.dimensions();
  return dimensions.size() == shape.size() && std::equal(shape.begin(), shape.end(), dimensions.begin());
}

template <class Buffer>
bool is_empty(const Buffer& buffer) {
  return buffer.element_count() == 0;
}

}  // namespace realm
