// Work divided over the threads of a pool: XLA's own.
//
// A step has some hundred short pieces of work, and to wake a thread takes as long as a small one: so a thread
// that has helped stays awake for some microseconds, in case there is more.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>

namespace realm {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// What the threads share. It outlives the call: a thread that comes late finds nothing left and goes.
struct Job {
  std::atomic<int64_t> next{0}, done{0};
  int64_t chunks = 0;
  const void* body = nullptr;
  void (*call)(const void* body, int64_t chunk) = nullptr;

  void run() {
    for (int64_t i = next.fetch_add(1); i < chunks; i = next.fetch_add(1)) {
      call(body, i);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

// The newest job, and the threads that look for it.
class Board {
 public:
  static Board& shared() {
    static Board* board = new Board;  // never destroyed: threads may look at it while the process ends
    return *board;
  }

  // The job stands on the board; `helpers` threads are there or called.
  template <class Pool>
  void post(Pool& pool, std::shared_ptr<Job> job, int64_t helpers) {
    int64_t missing;
    {
      std::lock_guard<std::mutex> guard(mutex_);
      newest_ = std::move(job);
      number_.fetch_add(1, std::memory_order_release);
      missing = helpers > helpers_ ? helpers - helpers_ : 0;
      helpers_ += missing;
    }
    for (int64_t i = 0; i < missing; i++) pool.Schedule([this] { help(); });
  }

 private:
  static constexpr std::chrono::microseconds AWAKE{20};

  // Helps with the newest job, then with those that are posted soon after.
  void help() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      const uint64_t number = number_.load(std::memory_order_relaxed);
      std::shared_ptr<Job> job = newest_;
      lock.unlock();
      job->run();
      wait(number);
      lock.lock();
      if (number_.load(std::memory_order_relaxed) == number) break;
    }
    helpers_--;
  }

  // Until there is another job, or for as long as a thread stays awake.
  void wait(uint64_t number) const {
    const auto end = std::chrono::steady_clock::now() + AWAKE;
    while (number_.load(std::memory_order_acquire) == number && std::chrono::steady_clock::now() < end) pause();
  }

  std::mutex mutex_;
  std::shared_ptr<Job> newest_;
  std::atomic<uint64_t> number_{0};
  int64_t helpers_ = 0;  // called or awake
};

// body(first, last) has run for every part of [0, count); parts are of `grain`, this thread takes some.
template <class Pool, class Body>
void parallel_for(Pool& pool, int64_t count, int64_t grain, const Body& body) {
  const int64_t threads = pool.num_threads(), chunks = (count + grain - 1) / grain;
  if (threads <= 1 || chunks <= 1) {
    if (count > 0) body(0, count);
    return;
  }
  auto part = [&](int64_t i) { body(i * grain, i * grain + grain < count ? i * grain + grain : count); };
  auto job = std::make_shared<Job>();
  job->chunks = chunks, job->body = &part;
  job->call = [](const void* body, int64_t i) { (*static_cast<const decltype(part)*>(body))(i); };
  Board::shared().post(pool, job, (threads < chunks ? threads : chunks) - 1);
  job->run();
  for (int spins = 0; job->done.load(std::memory_order_acquire) < chunks; spins++) {
    pause();
    if (spins > 4096) std::this_thread::yield();  // the machine is shared: the other thread may be asleep
  }
}

}  // namespace realm
