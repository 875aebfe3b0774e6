// Callers that divide work over one pool, all at once; built with a sanitizer of threads. Every part of every
// piece of work runs once, and its caller sees what was written.
// Usage: native_parallel ROUNDS
#include "parallel.h"

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <random>
#include <vector>

// As XLA's: what is scheduled runs on one of so many threads.
class Pool {
 public:
  explicit Pool(int64_t threads) {
    for (int64_t i = 0; i < threads; i++) threads_.emplace_back([this] { work(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> guard(mutex_);
      is_over_ = true;
    }
    there_is_more_.notify_all();
    for (auto& each : threads_) each.join();
  }
  int64_t num_threads() const { return static_cast<int64_t>(threads_.size()); }
  void Schedule(std::function<void()> task) {
    {
      std::lock_guard<std::mutex> guard(mutex_);
      tasks_.push_back(std::move(task));
    }
    there_is_more_.notify_one();
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      there_is_more_.wait(lock, [this] { return is_over_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      auto task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable there_is_more_;
  std::deque<std::function<void()>> tasks_;
  bool is_over_ = false;
  std::vector<std::thread> threads_;
};

static bool call_often(Pool& pool, long rounds, unsigned seed) {
  std::mt19937 generator(seed);
  auto from = [&](int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); };
  for (long i = 0; i < rounds; i++) {
    std::vector<int64_t> seen(static_cast<size_t>(from(0, 40)));
    const int64_t count = static_cast<int64_t>(seen.size());
    realm::parallel_for(pool, count, from(1, 12), [&](int64_t first, int64_t last) {
      for (int64_t at = first; at < last; at++) seen[static_cast<size_t>(at)] += at + 1;
    });
    for (int64_t at = 0; at < count; at++)
      if (seen[static_cast<size_t>(at)] != at + 1) return std::printf("round %ld: part %ld\n", i, static_cast<long>(at)), false;
    if (from(0, 20) == 0) std::this_thread::sleep_for(std::chrono::microseconds(from(0, 60)));  // helpers fall asleep
  }
  return true;
}

int main(int, char** arguments) {
  const long rounds = std::atol(arguments[1]);
  std::atomic<bool> is_good{true};
  for (int64_t threads = 1; threads <= 4; threads++) {
    Pool pool(threads);
    std::vector<std::thread> callers;
    for (unsigned i = 0; i < 3; i++)
      callers.emplace_back([&, i] {
        if (!call_often(pool, rounds, i)) is_good = false;
      });
    for (auto& each : callers) each.join();
  }
  return is_good ? 0 : 1;
}
