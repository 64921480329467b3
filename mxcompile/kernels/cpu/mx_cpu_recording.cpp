// Replay of a recorded graph: the kernels of a compiled graph of few tokens, one after the other, without Python between
// them. Built by cpu/build.py, called by cpu/recording.py.
//
// Steps are one parallel region: the calling thread runs Inductor's kernels, and shares the rows of matmuls with the
// others. A kernel that starts a parallel region of its own ends it; within it, such a kernel has one thread.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "mx_cpu.h"
#include "mx_cpu_linears.h"
#include "mx_cpu_threads.h"

// A kernel of Inductor, which takes pointers and integers alone, with `count` arguments (one of the sizes of `call`, zeros
// behind its own), and whether it may start a parallel region; or, if `kernel` is null, matmuls.
struct Step {
  const void* kernel;
  int64_t count;
  const int64_t* arguments;
  int64_t is_parallel;
  const Linears* linears;

  void run(Team& team, std::vector<CacheLine>& buffer) const;
};

namespace {

template <size_t>
using Argument = int64_t;

template <size_t... I>
void call(const void* kernel, const int64_t* arguments, std::index_sequence<I...>) {
  reinterpret_cast<void (*)(Argument<I>...)>(const_cast<void*>(kernel))(arguments[I]...);
}

void call(const void* kernel, int64_t count, const int64_t* arguments) {
  switch (count) {
    case 8: return call(kernel, arguments, std::make_index_sequence<8>());
    case 16: return call(kernel, arguments, std::make_index_sequence<16>());
    case 32: return call(kernel, arguments, std::make_index_sequence<32>());
    case 64: return call(kernel, arguments, std::make_index_sequence<64>());
    case 128: return call(kernel, arguments, std::make_index_sequence<128>());
    case 256: return call(kernel, arguments, std::make_index_sequence<256>());
  }
}

}  // namespace

void Step::run(Team& team, std::vector<CacheLine>& buffer) const {
  if (kernel != nullptr)
    call(kernel, count, arguments);
  else
    multiply_all(team, *linears, buffer);
}

extern "C" {

// Run all steps. Returns 1, or 0 if one of them threw an exception: an index out of bounds, an integer division by zero.
int mx_replay(const Step* steps, int64_t count, int64_t values, int max_threads) {
  static thread_local std::vector<CacheLine> buffer;
  const int threads = worthwhile_threads(values, max_threads);
  const OneThread alone(threads == 1 || Waits::local().alone());
  Team team;
  bool failed = false;
  const auto protect = [&](const auto& work) {  // no exception may leave a parallel region
    try {
      work();
    } catch (...) {
      failed = true;
    }
  };
  for (const Step *step = steps, *end = steps + count; step != end && !failed;) {
    if (step->is_parallel) {
      protect([&] { step++->run(team, buffer); });
      continue;
    }
    const Step* last = std::find_if(step, end, [](const Step& one) { return one.is_parallel != 0; });
    team.run(threads, [&] { protect([&] { for (; step != last; ++step) step->run(team, buffer); }); });
  }
  return !failed;
}

// From here on OpenMP's parallel regions of this thread have one thread, if others want the cores: `is_busy`, or by the waits
// of its replays. Returns what `mx_end_alone` takes.
int mx_begin_alone(int is_busy) {
  if (is_busy) Waits::local().work_alone();
  if (!Waits::local().alone()) return -1;
  const int levels = omp_get_max_active_levels();
  omp_set_max_active_levels(0);
  return levels;
}

void mx_end_alone(int levels) {
  if (levels >= 0) omp_set_max_active_levels(levels);
}

// How many parallel regions of this thread may be nested; with 0, each has one thread.
int mx_most_levels() { return omp_get_max_active_levels(); }
}
