// A team of threads that share tasks, on top of OpenMP's threads, on machines whose cores others may use, too.
//
// The caller never waits for a thread that has not begun a task: tasks are claimed one by one, and who comes claims. What
// remains is a thread that loses its core in the middle of a task, or before the end of a region. The caller measures how
// long it waits for those; where that is much of the time, others want the cores, and it works alone for a while.

#pragma once

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::microseconds;
using std::chrono::milliseconds;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether a calling thread should work alone, by how long it waited for others.
class Waits {
 public:
  bool alone() const { return alone_until > Clock::now(); }

  // Waits of up to a twentieth of the time are paid back as it passes. Who owes more than LIMIT works alone.
  void add(Clock::duration wait) {
    const auto now = Clock::now();
    debt = std::max(debt - (now - last) / 20, Clock::duration::zero());
    last = now;
    if (wait < SHORT) {
      if (debt == Clock::duration::zero()) period = SHORTEST;
      return;
    }
    debt += wait;
    if (debt < LIMIT) return;
    alone_until = now + period;
    period = std::min(2 * period, LONGEST);
    debt = LIMIT / 2;
    last = alone_until;
  }

  void work_alone() { alone_until = std::max(alone_until, Clock::now() + SHORTEST); }

  static Waits& local() {
    static thread_local Waits waits;
    return waits;
  }

 private:
  // A thread that has a core finishes a task within SHORT; one that lost it is away for milliseconds.
  static constexpr Clock::duration SHORT = microseconds(50), LIMIT = milliseconds(8);
  static constexpr Clock::duration SHORTEST = milliseconds(100), LONGEST = milliseconds(2000);
  Clock::time_point alone_until{}, last = Clock::now();
  Clock::duration debt{}, period = SHORTEST;
};

// While this exists, OpenMP's parallel regions of the calling thread have one thread.
class OneThread {
 public:
  explicit OneThread(bool is_on = true) : levels(is_on ? omp_get_max_active_levels() : -1) {
    if (levels >= 0) omp_set_max_active_levels(0);
  }
  ~OneThread() {
    if (levels >= 0) omp_set_max_active_levels(levels);
  }
  OneThread(const OneThread&) = delete;

 private:
  const int levels;
};

class Team {
 public:
  // Call `work` on this thread, while up to `threads` - 1 others wait for tasks.
  template <class Work>
  void run(int threads, const Work& work) {
    Waits& waits = Waits::local();
    if (threads <= 1 || waits.alone()) return work();
    helpers = threads - 1;
    finished.store(false, std::memory_order_relaxed);
    waited = Clock::duration::zero();
    Clock::time_point end;
#pragma omp parallel num_threads(threads)
    {
      if (omp_get_thread_num() == 0) {
        work();
        finished.store(true, std::memory_order_release);
        end = Clock::now();
      } else {
        help();
      }
    }
    helpers = 0;
    waits.add(waited + (Clock::now() - end));
  }

  // Call `task(i)` for each i in [0, count) by all threads, from `work`. Returns when all are done.
  template <class Task>
  void share(int64_t count, const Task& task) {
    if (helpers == 0 || count <= 1) {
      for (int64_t i = 0; i < count; ++i) task(i);
      return;
    }
    function = [](const void* context, int64_t i) { (*static_cast<const Task*>(context))(i); };
    context = &task;
    tasks = count;
    done.store(0, std::memory_order_relaxed);
    left.store(((left.load(std::memory_order_relaxed) >> 32) + 1) << 32 | uint64_t(count), std::memory_order_release);
    while (claim()) {
    }
    wait(count);
  }

 private:
  // Do one task. The job is read after a task of it was claimed: until that is done, it is not replaced.
  bool claim() {
    uint64_t current = left.load(std::memory_order_acquire);
    while (uint32_t(current) != 0)
      if (left.compare_exchange_weak(current, current - 1, std::memory_order_acq_rel)) {
        function(context, tasks - int64_t(uint32_t(current)));
        done.fetch_add(1, std::memory_order_release);
        return true;
      }
    return false;
  }

  void help() {
    for (int idle = 0; !finished.load(std::memory_order_acquire); ++idle) {
      if (claim()) idle = 0;
      relax();
      if (idle > SPINS) sched_yield();
    }
  }

  void wait(int64_t count) {
    if (done.load(std::memory_order_acquire) == count) return;
    const auto begin = Clock::now();
    for (int idle = 0; done.load(std::memory_order_acquire) != count; ++idle) {
      relax();
      if (idle > SPINS) sched_yield();
    }
    const auto wait = Clock::now() - begin;
    if (wait > microseconds(20)) waited += wait;
  }

  static constexpr int SPINS = 2000;
  void (*function)(const void*, int64_t) = nullptr;
  const void* context = nullptr;
  int64_t tasks = 0;
  int helpers = 0;
  Clock::duration waited{};
  alignas(64) std::atomic<uint64_t> left{0};  // number of the job << 32 | its tasks that nobody has claimed
  alignas(64) std::atomic<int64_t> done{0};
  alignas(64) std::atomic<bool> finished{false};
};

}  // namespace
