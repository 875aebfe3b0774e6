// Work divided over XLA's own threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace realm {

// What the threads share. It outlives the call: a thread that comes late finds nothing left and goes.
template <class Body>
struct Shared {
  std::atomic<int64_t> next{0}, done{0};
  const int64_t chunks;
  const Body* body;

  void run() {
    for (int64_t i = next.fetch_add(1); i < chunks; i = next.fetch_add(1)) {
      (*body)(i);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

// body(first, last) has run for every part of [0, count); parts are of `grain`, this thread takes some.
template <class Body>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t count, int64_t grain, const Body& body) {
  const int64_t threads = pool.num_threads(), chunks = (count + grain - 1) / grain;
  if (threads <= 1 || chunks <= 1) {
    if (count > 0) body(0, count);
    return;
  }
  auto part = [&](int64_t i) { body(i * grain, i * grain + grain < count ? i * grain + grain : count); };
  auto shared = std::shared_ptr<Shared<decltype(part)>>(new Shared<decltype(part)>{{0}, {0}, chunks, &part});
  for (int64_t i = 1; i < (threads < chunks ? threads : chunks); i++) pool.Schedule([shared] { shared->run(); });
  shared->run();
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < chunks; spins++)
    if (spins > 4096) std::this_thread::yield();  // the machine is shared: the other thread may be asleep
}

}  // namespace realm
